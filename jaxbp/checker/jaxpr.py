"""Jaxprs taken apart: custom rules replaced by the formula they belong to, every operation repeated in float64.

`evaluate` runs a jaxpr equation by equation, also inside scan, cond, while, shard_map and calls. What it does with an
equation is a `Walk`: `inlined` leaves out custom rules, `Lifted` computes in float64 whatever the dtypes were.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

CALLS = "jaxpr", "call_jaxpr", "fun_jaxpr", "call"
LOOPS = frozenset("scan while cond".split())
OPAQUE = frozenset("pallas_call shard_map pure_callback io_callback custom_linear_solve".split())
AS_TRACED = OPAQUE | {"bitcast_convert_type", "nextafter"}  # these mean something else in another dtype
DTYPES = frozenset("new_dtype dtype preferred_element_type out_dtype".split())
JAX = os.path.dirname(jax.__file__)


class Walk(NamedTuple):
    """What `evaluate` does: `apply` to an equation, `called` says which equations are only calls of a closed jaxpr."""

    apply: Callable[[Any, Sequence[Any]], list[Any]]
    called: Callable[[Any], Any]
    literal: Callable[[Any], Any] = lambda atom: atom.val
    opaque: frozenset[str] = frozenset()  # loops that are not entered


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], walk: Walk) -> list[Any]:
    """The outputs of a jaxpr, equation by equation."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return walk.literal(atom) if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name, inner = equation.primitive.name, walk.called(equation)
        if inner is not None:
            outputs = evaluate(inner.jaxpr, inner.consts, inputs, walk)
        elif name in ENTERED and name not in walk.opaque:
            outputs = ENTERED[name](equation, inputs, walk)
        else:
            outputs = walk.apply(equation, inputs)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(equation: Any, inputs: Sequence[Any], walk: Walk) -> list[Any]:
    body, length, reverse = (equation.params[name] for name in ("jaxpr", "length", "reverse"))
    # How many are carried follows from the shapes, an x or y has one axis more outside: the parameters that count
    # them are JAX's own and changed between 0.10 and 0.12.
    n_carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(equation.outvars, body.jaxpr.outvars, strict=True))
    n_held = sum(a.aval.ndim == b.aval.ndim for a, b in zip(equation.invars, body.jaxpr.invars, strict=True))
    consts, carry, xs = inputs[: n_held - n_carry], inputs[n_held - n_carry : n_held], inputs[n_held:]

    def step(carry: Any, x: Any) -> Any:
        outputs = evaluate(body.jaxpr, body.consts, [*consts, *carry, *x], walk)
        return outputs[:n_carry], outputs[n_carry:]

    carry, ys = lax.scan(step, list(carry), list(xs), length=length, reverse=reverse)
    return [*carry, *ys]


def _cond(equation: Any, inputs: Sequence[Any], walk: Walk) -> list[Any]:
    def branch(closed: Any) -> Callable[..., list[Any]]:
        return lambda *operands: evaluate(closed.jaxpr, closed.consts, operands, walk)

    branches = [branch(closed) for closed in equation.params["branches"]]
    return list(lax.switch(jnp.asarray(inputs[0], jnp.int32), branches, *inputs[1:]))


def _while(equation: Any, inputs: Sequence[Any], walk: Walk) -> list[Any]:
    test, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    split = equation.params["cond_nconsts"], equation.params["cond_nconsts"] + equation.params["body_nconsts"]
    held, held_body, carry = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]

    def going(carry: Any) -> Any:
        return evaluate(test.jaxpr, test.consts, [*held, *carry], walk)[0]

    def step(carry: Any) -> Any:
        after, go = evaluate(body.jaxpr, body.consts, [*held_body, *carry], walk), going(carry)
        # A vmapped loop has an answer for each element: what has stopped stays.
        return [
            jnp.where(lax.expand_dims(go, range(go.ndim, b.ndim)), b, a) if go.ndim else b
            for a, b in zip(carry, after, strict=True)
        ]

    return list(lax.while_loop(lambda carry: jnp.any(going(carry)), step, list(carry)))


def _shard_map(equation: Any, inputs: Sequence[Any], walk: Walk) -> list[Any]:
    params = equation.params
    names = params.get("newly_manual_axes", params.get("manual_axes", frozenset()))
    run: Any = jax.shard_map(
        lambda *args: tuple(evaluate(params["jaxpr"], (), args, walk)),
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=params["out_specs"],
        check_vma=params["check_vma"],
        axis_names=frozenset(names),
    )
    return list(run(*inputs))


ENTERED = {"scan": _scan, "cond": _cond, "while": _while, "shard_map": _shard_map}


def bound(equation: Any, inputs: Sequence[Any], **changed: Any) -> list[Any]:
    """The outputs of one equation as it is, but for changed parameters."""
    with equation.ctx.manager:
        params = equation.primitive.get_bind_params(equation.params)
        found = equation.primitive.bind(*inputs, **{**params, **changed})
    return list(found) if equation.primitive.multiple_results else [found]


def closed_call(equation: Any) -> Any:
    """The closed jaxpr of an equation that only calls one (jit, remat), with custom rules among them; or None."""
    name = equation.primitive.name
    if name in LOOPS or name in OPAQUE or name.startswith("reduce"):  # a reduction repeats its jaxpr
        return None
    inner = [equation.params[key] for key in CALLS if key in equation.params]
    if not inner:
        return None
    closed = inner[0] if hasattr(inner[0], "consts") else core.ClosedJaxpr(inner[0], ())
    return closed if len(closed.jaxpr.invars) == len(equation.invars) else None


# Custom rules left out ------------------------------------------------------------------------------------------------


def inlined(function: Callable[..., Any], jvp_too: bool = False) -> Callable[..., Any]:
    """The function evaluated through its jaxpr with every custom_vjp replaced by its primal.

    With `jvp_too` every custom_jvp as well, but for those of JAX itself: what `jax.nn.relu` says its derivative at 0
    is, is part of a function. Only where nothing else is under test they are.
    """

    def run(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        traced = [n for n, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

        def flat(arrays: Sequence[Any]) -> Any:
            merged = list(leaves)
            for n, array in zip(traced, arrays, strict=True):
                merged[n] = array
            return function(*jax.tree.unflatten(treedef, merged))

        arrays = [jnp.asarray(leaves[n]) for n in traced]
        closed, shape = jax.make_jaxpr(flat, return_shape=True)(arrays)
        walk = Walk(bound, _without(closed.jaxpr, jvp_too))
        outputs = evaluate(closed.jaxpr, closed.consts, arrays, walk)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return run


def _without(jaxpr: Any, jvp_too: bool) -> Callable[[Any], Any]:
    found = [equation for equation in equations(jaxpr) if equation.primitive.name.startswith("custom_")]
    named = {equation.primitive.name for equation in found}
    only_jax = "custom_vjp_call" not in named and all(_of_jax(e) for e in found)

    def called(equation: Any) -> Any:
        name = equation.primitive.name
        kept = name == "custom_jvp_call" and not (jvp_too and (only_jax or not _of_jax(equation)))
        return None if kept or name == "custom_vmap_call" else closed_call(equation)

    return called


def _of_jax(equation: Any) -> bool:
    """Whether a custom_jvp function is one of JAX's own."""
    closed = equation.params.get("call_jaxpr")
    info = getattr(getattr(closed, "jaxpr", None), "debug_info", None)
    return JAX in (getattr(info, "func_src_info", None) or "")


# In float64 -----------------------------------------------------------------------------------------------------------


def lift(value: Any) -> Any:
    """A floating-point or complex array in 64 (128) bits; everything else as it is."""
    if not hasattr(value, "astype"):  # a literal
        return np.asarray(value) if isinstance(value, float | complex) else value
    return value.astype(wide(value.dtype)) if wide(value.dtype) != value.dtype else value


def wide(dtype: Any) -> Any:
    if not isinstance(dtype, type | np.dtype) or dtype is None:
        return dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    return np.dtype(np.complex128) if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def lifted(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """One equation in float64: casts between floating-point dtypes do nothing."""
    name = equation.primitive.name
    if name == "reduce_precision":
        return list(inputs)
    inputs = [lift(value) for value in inputs]
    if name not in AS_TRACED and not any(True for _ in _inner(equation)):
        changed = {key: wide(equation.params[key]) for key in DTYPES & set(equation.params)}
        if "precision" in equation.params:
            changed["precision"] = None
        try:
            return [lift(out) for out in bound(equation, inputs, **changed)]
        except (TypeError, ValueError, NotImplementedError):
            pass  # an operation that float64 has no form of runs in the dtype it was traced in
    short = [
        value.astype(atom.aval.dtype) if hasattr(value, "astype") and wide(atom.aval.dtype) == value.dtype else value
        for value, atom in zip(inputs, equation.invars, strict=True)
    ]
    return [lift(out) for out in bound(equation, short)]


def literals(jaxpr: Any) -> list[Any]:
    """All floating-point literals, in the order of the equations."""
    found = []
    for part in [jaxpr, *(inner for equation in equations(jaxpr) for inner in _inner(equation))]:
        atoms = [atom for equation in part.eqns for atom in equation.invars] + list(part.outvars)
        found += [atom for atom in atoms if isinstance(atom, core.Literal) and _is_real_scalar(atom.aval)]
    return found


def _is_real_scalar(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating)) and aval.shape == ()


def text_of(closed: Any) -> str:
    """The jaxpr with its floating-point dtypes and literals left out: equal for the same function in two dtypes."""
    text = re.sub(r"\b(bf16|f16|f32|f64|bfloat16|float16|float32|float64)\b", "f", str(closed.jaxpr))
    return re.sub(r"[-+.\w]+:f\[\]", "_:f[]", text)


# Looking at jaxprs ----------------------------------------------------------------------------------------------------


def primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives, those of inner jaxprs too."""
    return {equation.primitive.name for equation in equations(jaxpr)}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def reached(jaxpr: Any, marked: Sequence[bool]) -> Iterator[Any]:
    """The equations that depend on some of the arguments, those of inner jaxprs too."""
    known = {id(var) for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}
    for equation in jaxpr.eqns:
        depends = [id(atom) in known for atom in equation.invars]
        if any(depends):
            yield equation
            known |= {id(var) for var in equation.outvars}
            for inner in _inner(equation):  # before the arguments of a branch stands the number of the branch
                count = len(inner.invars)
                yield from reached(inner, depends[-count:] if 0 < count <= len(depends) else [True] * count)


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


TIES = frozenset("max min abs clamp reduce_max reduce_min sort cummax cummin argmax argmin".split())


def splits_ties(jaxpr: Any) -> bool:
    """Whether a derivative of the outputs goes through a max, min, abs or sort, whose ties JAX splits."""
    needed = {id(atom) for atom in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        name = equation.primitive.name
        if name in ("stop_gradient", "custom_jvp_call") or not any(id(var) in needed for var in equation.outvars):
            continue
        if name in TIES or any(splits_ties(inner) for inner in _inner(equation)):
            return True
        needed |= {id(atom) for atom in equation.invars}
    return False
