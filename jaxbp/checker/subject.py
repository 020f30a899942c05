"""What is checked, in one form: a rule that returns value and cotangents, and the function it claims to differentiate.

Many kinds of subject come in (a `jax.custom_vjp` or `jax.custom_jvp` function, a gradient, a forward/backward pair, a
network); the checks see one. Arguments and outputs are flat lists of leaves here; paths lead back to what the caller
wrote. A complex leaf is two real ones: its array has an axis more, (2, …), for the real and the imaginary part.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr

from jaxbp.checker.jaxpr import inlined

Leaves = list[Any]
Tree = Any
Function = Callable[..., Any]
ARRAY, COMPLEX = object(), object()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The structure of a call: which leaves of the arguments are arrays, and which of those the rule differentiates.

    `wrt` are positions among the array leaves; `paths` name every array leaf, "[0].w" being field w of argument 0.
    """

    treedef: Any
    static: tuple[Any, ...]  # one entry a leaf, `ARRAY` or `COMPLEX` where an array stands
    wrt: tuple[int, ...]
    wrt_arguments: tuple[int, ...]
    owners: tuple[int, ...]  # the argument that each array leaf belongs to
    paths: tuple[str, ...]
    names: tuple[str, ...]  # of the function's parameters, as far as it says them

    def call(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with these array leaves."""
        arrays = iter(leaves)
        filled = [
            next(arrays) if leaf is ARRAY else from_parts(next(arrays)) if leaf is COMPLEX else leaf
            for leaf in self.static
        ]
        return tuple(jax.tree.unflatten(self.treedef, filled))

    @property
    def has_complex(self) -> bool:
        return any(leaf is COMPLEX for leaf in self.static)

    def differentiated(self, leaves: Sequence[Any]) -> Leaves:
        return [leaves[position] for position in self.wrt]

    def replaced(self, leaves: Sequence[Any], differentiated: Sequence[Any]) -> Leaves:
        new = list(leaves)
        for position, leaf in zip(self.wrt, differentiated, strict=True):
            new[position] = leaf
        return new


class Pulled(NamedTuple):
    """What a rule returns: float outputs, cotangents of the wrt leaves, and the outputs that are no floats."""

    value: Leaves
    cotangents: Leaves
    others: Leaves


@dataclasses.dataclass(frozen=True)
class Subject:
    """A rule, the function it belongs to, and the reference whose derivative is the truth."""

    name: str
    arguments: Arguments
    function: Function
    reference: Function
    rule: Function  # a custom_vjp or custom_jvp function, or (value_and_)gradient
    kind: str  # "vjp", or "gradient": a scalar function's gradient, which takes no cotangent
    has_value: bool  # whether the gradient returns (value, gradient)
    own_reference: bool  # the reference is the function itself
    single: bool  # wrt was an int: the gradient of a "gradient" subject is not a tuple
    project: Mapping[int, Function]
    forward: bool = False  # tangents go in and come out instead of cotangents
    compares: bool = True  # the function's own value with that of the reference

    def outputs(self, function: Function, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """Of a function as it is: floats and others."""
        return split(function(*self.arguments.call(leaves)))

    def own(self, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """Outputs of the function without the rule: floats and others."""
        return self.outputs(without_rule(self.function, self.hides_jvp), leaves)

    @property
    def hides_jvp(self) -> bool:
        """Whether rules for custom_jvp functions are under test as well."""
        return self.rule is self.function

    def reference_of(self, leaves: Leaves) -> Callable[[Leaves], Leaves]:
        """The reference as a function of the differentiated leaves alone, with the custom rule under test removed."""
        reference = without_rule(self.reference, self.hides_jvp and self.own_reference)
        return lambda wrt: self.outputs(reference, self.arguments.replaced(leaves, wrt))[0]

    def referred(self, leaves: Leaves) -> Leaves:
        """The value of the reference."""
        return self.reference_of(leaves)(self.arguments.differentiated(leaves))

    def truth(self, leaves: Leaves, us: Leaves) -> tuple[Leaves, Leaves, Leaves]:
        """The values of the function and of the reference, and by autodiff of the reference what the rule should give.

        Where JAX has no reverse mode for the reference (a while_loop), forward mode gives the Jacobian.
        """
        own = [] if self.own_reference or not self.compares else self.own(leaves)[0]
        reference, wrt = self.reference_of(leaves), self.arguments.differentiated(leaves)
        if self.forward:
            value, tangents = jax.jvp(reference, (wrt,), (_like(us, wrt),))
            return own, value, tangents
        try:
            value, pullback = jax.vjp(reference, wrt)
            return own, value, pullback(_like(us, value))[0]
        except ValueError as error:
            if "Reverse-mode" not in str(error):
                raise
            value = reference(wrt)
            rows = jax.jacfwd(reference)(wrt)
            pulled = [[jnp.tensordot(u, j, u.ndim) for j in row] for u, row in zip(_like(us, value), rows, strict=True)]
            return own, value, [sum(parts[1:], start=parts[0]) for parts in zip(*pulled, strict=True)]

    def pullback(self, leaves: Leaves, us: Leaves) -> Pulled:
        """What the rule under test returns."""
        if self.kind == "vjp":
            run = lambda wrt: self.outputs(self.rule, self.arguments.replaced(leaves, wrt))  # noqa: E731
            wrt = self.arguments.differentiated(leaves)
            if self.forward:
                value, tangents, others = jax.jvp(run, (wrt,), (_like(us, wrt),), has_aux=True)
                return Pulled(value, tangents, others)
            value, pull, others = jax.vjp(run, wrt, has_aux=True)
            return Pulled(value, pull(_like(us, value))[0], others)
        result = self.rule(*self.arguments.call(leaves))
        cotangents, aux = self._matched(result[1] if self.has_value else result, leaves)
        value, others = split(result[0] if self.has_value else aux)
        return Pulled(value, cotangents, others)

    def _matched(self, gradient: Tree, leaves: Leaves) -> tuple[Leaves, Tree]:
        """The leaves of a gradient at the float leaves of the differentiated arguments, and what came beside it.

        An integer leaf may have None or anything else. Another tree is a ValueError.
        """
        arguments = self.arguments.call(leaves)
        wanted, want_tree = _with_none(tuple(arguments[i] for i in self.arguments.wrt_arguments))
        with_aux = isinstance(gradient, tuple) and len(gradient) == 2
        for candidate, aux in ((gradient, ()), *([gradient] if with_aux else [])):
            got, got_tree = _with_none((candidate,) if self.single else candidate)
            if got_tree == want_tree:
                pairs = [(g, a) for g, a in zip(got, wanted, strict=True) if is_inexact(a)]
                # jax.grad returns ∂f/∂x − i ∂f/∂y for a complex argument
                return [parts_of(g.conj()) if is_complex(a) and g is not None else g for g, a in pairs], aux
        raise ValueError(f"the gradient is a tree {_with_none(gradient)[1]}, the arguments' is {want_tree}")


def _with_none(tree: Tree) -> tuple[Leaves, Any]:
    """Leaves and structure, None being a leaf."""
    return jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)


def _like(us: Leaves, value: Leaves) -> Leaves:
    """Cotangents in the dtypes of what they belong to."""
    return [jnp.asarray(u, v.dtype) for u, v in zip(us, value, strict=True)]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers (bfloat16 included)."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_complex(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def is_inexact(leaf: Any) -> bool:
    return is_float(leaf) or is_complex(leaf)


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def parts_of(leaf: Any) -> Any:
    """(2, …): the real and the imaginary part of a complex array."""
    xnp: Any = jnp if isinstance(leaf, jax.Array) else np
    return xnp.stack([xnp.real(leaf), xnp.imag(leaf)])


def from_parts(leaf: Any) -> Any:
    return lax.complex(jnp.asarray(leaf)[0], jnp.asarray(leaf)[1])


def split(tree: Tree) -> tuple[Leaves, Leaves]:
    """The leaves of an output: floating-point numbers, complex ones by their parts, and the others.

    A Python or NumPy number counts.
    """
    leaves = [np.asarray(leaf) if isinstance(leaf, float | complex) else leaf for leaf in jax.tree.leaves(tree)]
    inexact = [parts_of(leaf) if is_complex(leaf) else leaf for leaf in leaves if is_inexact(leaf)]
    others = [np.asarray(leaf) if isinstance(leaf, int) else leaf for leaf in leaves if not is_inexact(leaf)]
    return inexact, [leaf for leaf in others if hasattr(leaf, "dtype") and not is_key(leaf)]


def without_rule(function: Callable[..., Any], jvp_too: bool = False) -> Callable[..., Any]:
    """The function with every `jax.custom_vjp` in it replaced by its own primal, so that autodiff sees the formula."""
    primal = getattr(function, "__wrapped__", None) if isinstance(function, jax.custom_vjp) else None
    return inlined(primal or function, jvp_too)


def arguments_of(
    args: Sequence[Any], wrt: int | Sequence[int] | None, fixed: Sequence[int], names: Sequence[str]
) -> tuple[Arguments, Leaves]:
    """The structure of a call and its array leaves; `fixed` are arguments that are no data (nondiff_argnums).

    Python floats are data; other Python objects, whole numbers and typed keys among them, stay as they are.

    Raises:
      ValueError: wrt names an argument that is not there or has no float leaf.
    """
    located, treedef = jax.tree_util.tree_flatten_with_path(tuple(args))
    common = _common(leaf for _, leaf in located)
    leaves, owners = [_canonical(leaf, common) for _, leaf in located], [path[0].idx for path, _ in located]
    arrays = [n for n, leaf in enumerate(leaves) if owners[n] not in fixed and is_data(leaf)]
    have = sorted({owners[n] for n in arrays if is_inexact(leaves[n])})
    chosen = tuple(have) if wrt is None else (wrt,) if isinstance(wrt, int) else tuple(wrt)
    for i in chosen:
        if i not in have:
            raise ValueError(f"wrt has {i}, but the arguments with floating-point leaves are {have}")
    kinds = {n: COMPLEX if is_complex(leaves[n]) else ARRAY for n in arrays}
    structure = Arguments(
        treedef,
        static=tuple(kinds.get(n, leaf) for n, leaf in enumerate(leaves)),
        wrt=tuple(k for k, n in enumerate(arrays) if owners[n] in chosen and is_inexact(leaves[n])),
        wrt_arguments=chosen,
        owners=tuple(owners[n] for n in arrays),
        paths=tuple(keystr(located[n][0]) for n in arrays),
        names=tuple(names),
    )
    return structure, [_parts(leaves[n]) if is_complex(leaves[n]) else leaves[n] for n in arrays]


def _common(leaves: Iterable[Any]) -> Any:
    """The dtype of Python floats, and of NumPy's float64 beside JAX arrays where JAX has none."""
    found = {jnp.dtype(leaf.dtype) for leaf in leaves if is_float(leaf)}
    shorter = found - {jnp.dtype(np.float64)}
    return next(iter(shorter), np.dtype(np.float64)) if found else np.dtype(jax.dtypes.canonicalize_dtype(float))


def _canonical(leaf: Any, common: Any) -> Any:
    if type(leaf) is float:
        return np.asarray(leaf, common)
    narrow = is_float(leaf) and leaf.dtype == np.float64 and not jax.config.read("jax_enable_x64")
    return leaf.astype(common) if narrow and hasattr(leaf, "astype") else leaf


def is_data(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and not is_key(leaf)


def _parts(leaf: Any) -> Any:
    real = np.dtype(np.float32 if leaf.dtype == np.complex64 else np.float64)
    if not isinstance(leaf, np.ndarray | jax.Array | np.generic):  # a shape and dtype to be drawn
        return dataclasses.replace(leaf, shape=(2, *leaf.shape), dtype=real)
    return np.asarray(parts_of(np.asarray(leaf)))


class Rules(NamedTuple):
    """What `check` was told of a rule: the rule by hand, if any, and the options about it."""

    gradient: Function | None = None
    value_and_grad: Function | None = None
    vjp: tuple[Function, Function] | None = None
    jvp: Function | None = None
    reference: Function | None = None
    wrt: int | Sequence[int] | None = None
    kwargs: Mapping[str, Any] | None = None
    project: Mapping[int, Function] | None = None


def subject_of(fun: Function, args: Sequence[Any], rules: Rules) -> tuple[Subject, Leaves]:
    """The subject that the arguments of `check` describe, and the array leaves of its example arguments.

    Raises:
      TypeError: fun is not callable.
      ValueError: more than one rule, or a custom function whose rule was never defined.
    """
    if not callable(fun):
        raise TypeError(f"fun is {fun!r}, which can't be called")
    if sum(rule is not None for rule in rules[:4]) > 1:
        raise ValueError("give one of gradient, value_and_grad and vjp or jvp, not several")
    _defined(fun)
    names, fixed = _names(fun), tuple(getattr(fun, "nondiff_argnums", ()))
    args = _positional(fun, args)
    by_hand = rules.gradient or rules.value_and_grad
    known: list[Any] = [fun, by_hand, rules.reference]
    if rules.kwargs:
        known = [f if f is None else functools.partial(f, **rules.kwargs) for f in known]
    fun, by_hand, reference = known
    rule: Any = by_hand or fun
    if rules.vjp is not None:
        rule = jax.custom_vjp(lambda *args: fun(*args))  # bare: JAX would hand fun's default arguments to the forward
        rule.defvjp(*rules.vjp)
    if rules.jvp is not None:
        rule = jax.custom_jvp(lambda *args: fun(*args))
        rule.defjvp(rules.jvp)
    wrt = 0 if by_hand is not None and rules.wrt is None else rules.wrt
    arguments, leaves = arguments_of(args, wrt, fixed, names)
    return Subject(
        name=_label(fun),
        arguments=arguments,
        function=fun,
        reference=reference or fun,
        rule=rule,
        kind="gradient" if by_hand else "vjp",
        has_value=rules.value_and_grad is not None,
        own_reference=reference is None,
        single=isinstance(wrt, int) and by_hand is not None,
        project=rules.project or {},
    ), leaves


def _defined(fun: Any) -> None:
    if isinstance(fun, jax.custom_vjp) and getattr(fun, "bwd", None) is None:
        raise ValueError(f"{_label(fun)} is a custom_vjp function without a rule: call its defvjp first")
    if isinstance(fun, jax.custom_jvp) and getattr(fun, "jvp", None) is None:
        raise ValueError(f"{_label(fun)} is a custom_jvp function without a rule: call its defjvp first")


def _label(fun: Any) -> str:
    return str(getattr(fun, "__name__", type(fun).__name__))


def _names(fun: Any) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _positional(fun: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with the defaults that a custom_vjp function's signature fills in."""
    if not isinstance(fun, jax.custom_vjp):
        return tuple(args)
    try:
        bound = inspect.signature(fun).bind(*args)
    except (TypeError, ValueError):
        return tuple(args)
    bound.apply_defaults()
    return tuple(bound.args)
