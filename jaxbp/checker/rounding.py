"""How far rounding alone can move a gradient: stochastic arithmetic on the jaxpr of the reference.

The reference's jaxpr is evaluated in float64, and again with the result of every operation moved by a random amount of
the size that the dtype under test would round it by: u |result|, and u (|A| |B|) for a matrix product or a sum. The
spread is an elementwise error bound that knows the function's own conditioning and cancellation, and is the same kind
of bound as c √K u |A||B| for one product (Higham 2002, §3.1), carried through all the operations that follow.

Source: J. Vignes, "A stochastic arithmetic for reliable scientific computation", Math. Comput. Simul. 35, 1993.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

Array = jax.Array
Perturb = Callable[[Any, Sequence[Any], list[Any]], list[Any]]
"""(equation, its inputs, its outputs) ↦ the outputs that the evaluation goes on with."""


class Units(NamedTuple):
    """The relative rounding error of an operation, of a matrix product, and of an argument: that of a backward stable
    algorithm, which gives the exact result for arguments that are off by so much (Higham 2002, §1.5).
    """

    operation: float | Array
    product: float | Array
    input: float | Array


AMPLITUDE = 4.0  # of the random rounding, in units of u: exp or tanh of XLA is not rounded to half a unit
DRAWS, NOISE = 12, 2**14
EXACT = frozenset(
    "abs and argmax argmin broadcast broadcast_in_dim ceil clamp concatenate convert_element_type copy copy_p "
    "device_put dynamic_slice dynamic_update_slice eq expand_dims floor gather ge gt iota is_finite le lt max min ne "
    "neg not optimization_barrier or pad real reduce_and reduce_max reduce_min reduce_or reduce_precision reshape rev "
    "round scatter select_and_gather_add select_n sharding_constraint sign slice sort split squeeze stop_gradient "
    "top_k tile transpose xor".split()
)
LINEAR_SUMS = frozenset(
    "dot_general conv_general_dilated reduce_sum cumsum scatter-add scatter_add reduce_window_sum".split()
)
TIES = frozenset("max min abs clamp reduce_max reduce_min sort cummax cummin".split())


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], perturb: Perturb, removed: str = "custom_vjp_call"
) -> list[Any]:
    """The outputs of a jaxpr, with `perturb` applied after every equation; `removed` is replaced by its primal."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = _called(equation, removed)
        if inner is not None:
            outputs = evaluate(inner.jaxpr, inner.consts, inputs, perturb, removed)
        elif equation.primitive.name == "scan":
            outputs = _scan(equation, inputs, perturb, removed)
        else:
            with equation.ctx.manager:
                bound = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
            bound = list(bound) if equation.primitive.multiple_results else [bound]
            outputs = perturb(equation, inputs, bound)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(equation: Any, removed: str) -> Any:
    """The closed jaxpr of an equation that only calls one: jit, remat, the custom rule to be removed.

    A custom_jvp beside a custom_vjp stays: what `jax.nn.relu` says its derivative at 0 is, is part of the reference.
    """
    name = equation.primitive.name
    if name in ("scan", "while", "cond", "pallas_call", "shard_map") or (
        name.startswith("custom_") and name != removed
    ):
        return None
    inner = [equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params]
    if not inner:
        return None
    closed = inner[0] if hasattr(inner[0], "consts") else core.ClosedJaxpr(inner[0], ())
    return closed if len(closed.jaxpr.invars) == len(equation.invars) else None


def _scan(equation: Any, inputs: Sequence[Any], perturb: Perturb, removed: str) -> list[Any]:
    body, length, reverse = (equation.params[name] for name in ("jaxpr", "length", "reverse"))
    # How many are carried follows from the shapes, an x or y has one axis more outside: the parameters that count
    # them are JAX's own and changed between 0.10 and 0.12.
    n_carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(equation.outvars, body.jaxpr.outvars, strict=True))
    n_held = sum(a.aval.ndim == b.aval.ndim for a, b in zip(equation.invars, body.jaxpr.invars, strict=True))
    consts, carry, xs = inputs[: n_held - n_carry], inputs[n_held - n_carry : n_held], inputs[n_held:]

    def step(carry: Any, x: Any) -> Any:
        outputs = evaluate(body.jaxpr, body.consts, [*consts, *carry, *x], perturb, removed)
        return outputs[:n_carry], outputs[n_carry:]

    carry, ys = lax.scan(step, list(carry), list(xs), length=length, reverse=reverse)
    return [*carry, *ys]


def inlined(function: Callable[..., Any], jvp_too: bool = False) -> Callable[..., Any]:
    """The function evaluated through its jaxpr with every custom_vjp replaced by its primal; with `jvp_too` and no
    custom_vjp in it, every custom_jvp: that is the rule under test then.
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
        only_jvp = jvp_too and "custom_vjp_call" not in primitives(closed.jaxpr)
        under_test = "custom_jvp_call" if only_jvp else "custom_vjp_call"
        outputs = evaluate(closed.jaxpr, closed.consts, arrays, lambda equation, inputs, outputs: outputs, under_test)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return run


def primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives, those of inner jaxprs too."""
    return {equation.primitive.name for equation in equations(jaxpr)}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


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


def with_spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """(args, units, noise) ↦ (outputs, the largest distance that rounding moved each element by)."""

    def run(args: Any, units: Units, noise: Array) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        flat = lambda *leaves: function(*jax.tree.unflatten(treedef, leaves))  # noqa: E731
        closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        exact = evaluate(closed.jaxpr, closed.consts, leaves, lambda equation, inputs, outputs: outputs)

        def draw(noise: Array) -> list[Any]:
            perturb = _Rounding(units, noise)
            moved = [perturb.input(leaf) for leaf in leaves]
            noisy = evaluate(closed.jaxpr, closed.consts, moved, perturb)
            return [jnp.abs(a - b) for a, b in zip(noisy, exact, strict=True)]

        spread = [jnp.max(distance, axis=0) for distance in lax.map(draw, noise)]
        structure = jax.tree.structure(shape)
        return jax.tree.unflatten(structure, exact), jax.tree.unflatten(structure, spread)

    return run


class _Rounding:
    """A `Perturb` that moves every result by up to 4 u of its size, differently at each call."""

    def __init__(self, units: Units, noise: Array):
        self.units, self.noise, self.calls = units, noise, 0

    def __call__(self, equation: Any, inputs: Sequence[Any], outputs: list[Any]) -> list[Any]:
        name = equation.primitive.name
        if name in EXACT:
            return outputs
        u, sizes = self.units.operation, outputs
        if name in LINEAR_SUMS:
            params = equation.primitive.get_bind_params(equation.params)
            sizes = [equation.primitive.bind(*(_magnitude(a) for a in inputs), **params)]
            u = self.units.product if name in ("dot_general", "conv_general_dilated") else u
        return [self._moved(out, u, size) for out, size in zip(outputs, sizes, strict=True)]

    def input(self, leaf: Any) -> Any:
        """An argument moved as if it were the result of an operation."""
        return self._moved(leaf, self.units.input, leaf)

    def _moved(self, a: Any, u: float | Array, size: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        return a + (AMPLITUDE * u * self._uniform(a.shape) * jnp.abs(size)).astype(a.dtype)

    def _uniform(self, shape: tuple[int, ...]) -> Array:
        """Other numbers of the noise at each call, the same again where there are not enough."""
        size = int(np.prod(shape))
        start = self.calls * 7919 % max(1, NOISE - size)
        self.calls += 1
        if size > NOISE:
            return jnp.tile(self.noise, -(-size // NOISE))[:size].reshape(shape)
        return self.noise[start : start + size].reshape(shape)


def noise_of(seed: int) -> np.ndarray:
    """Uniform in [−1, 1], a row for each draw."""
    return np.random.default_rng(seed).uniform(-1, 1, (DRAWS, NOISE))


def _magnitude(a: Any) -> Any:
    return jnp.abs(a) if jnp.issubdtype(a.dtype, jnp.floating) else a


def units_of(dtype: Any) -> Units:
    """u = ε / 2 of the dtype. A GPU multiplies float32 in TF32, a TPU in bfloat16, unless a precision is set.

    In float64, which is there to be strict, the arguments stay where they are: at a kink they must.
    """
    u = float(jnp.finfo(dtype).eps) / 2
    if jnp.dtype(dtype) == jnp.float64:
        return Units(u, u, 0.0)
    default = jax.config.values["jax_default_matmul_precision"] not in ("highest", "float32")
    shorter = jnp.dtype(dtype) == jnp.float32 and default
    product = {"cpu": u, "gpu": 2.0**-11}.get(jax.default_backend(), 2.0**-8) if shorter else u
    return Units(u, product, u)
