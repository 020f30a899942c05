"""What is checked, in one form: a rule that returns value and cotangents, and the function it claims to differentiate.

Four kinds of subject come in (a `jax.custom_vjp` function, a gradient, a forward/backward pair, a network); the nine
checks see one. Arguments and outputs are flat lists of leaves here; paths lead back to what the caller wrote.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

Leaves = list[Any]
Tree = Any


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The structure of a call: which leaves of the arguments are arrays, and which of those the rule differentiates.

    `wrt` are positions among the array leaves; `paths` name every array leaf, "[0].w" being field w of argument 0.
    """

    treedef: Any
    static: tuple[Any, ...]  # one entry a leaf, `ARRAY` where an array stands
    wrt: tuple[int, ...]
    wrt_arguments: tuple[int, ...]
    owners: tuple[int, ...]  # the argument that each array leaf belongs to
    paths: tuple[str, ...]

    def call(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with these array leaves."""
        arrays = iter(leaves)
        return tuple(
            jax.tree.unflatten(self.treedef, [next(arrays) if leaf is ARRAY else leaf for leaf in self.static])
        )

    def differentiated(self, leaves: Sequence[Any]) -> Leaves:
        return [leaves[position] for position in self.wrt]

    def replaced(self, leaves: Sequence[Any], differentiated: Sequence[Any]) -> Leaves:
        new = list(leaves)
        for position, leaf in zip(self.wrt, differentiated, strict=True):
            new[position] = leaf
        return new


ARRAY = object()
Pullback = Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]
"""(array leaves of the arguments, cotangents of the float outputs) ↦ (float outputs, cotangents of the wrt leaves)."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A rule, the function it belongs to, and the reference whose derivative is the truth."""

    name: str
    arguments: Arguments
    function: Callable[..., Any]
    reference: Callable[..., Any]
    rule: Callable[..., Any]  # a custom_vjp function, or (value_and_)gradient
    kind: str  # "vjp", or "gradient": a scalar function's gradient, which takes no cotangent
    has_value: bool  # whether the gradient returns (value, gradient)
    own_reference: bool  # the reference is the function itself
    single: bool  # wrt was an int: the gradient of a "gradient" subject is not a tuple

    def value(self, leaves: Leaves) -> Leaves:
        """The float outputs of the undifferentiated function."""
        return floats(self.function(*self.arguments.call(leaves)))

    def truth(self, leaves: Leaves, cotangents: Leaves) -> tuple[Leaves, Leaves]:
        """The function's value and, by autodiff of the reference, the cotangents of its arguments."""
        value, pullback = jax.vjp(self.reference_of(leaves), self.arguments.differentiated(leaves))
        return self.value(leaves), pullback([jnp.asarray(u, v.dtype) for u, v in zip(cotangents, value, strict=True)])[
            0
        ]

    def reference_of(self, leaves: Leaves) -> Callable[[Leaves], Leaves]:
        """The reference as a function of the differentiated leaves alone, with the custom rule under test removed."""
        reference = without_rule(self.reference, jvp_too=self.rule is self.reference)
        return lambda wrt: floats(reference(*self.arguments.call(self.arguments.replaced(leaves, wrt))))

    def pullback(self, leaves: Leaves, cotangents: Leaves) -> tuple[Leaves, Leaves]:
        """What the rule under test returns: float outputs and cotangents."""
        if self.kind == "vjp":
            run = lambda wrt: floats(self.rule(*self.arguments.call(self.arguments.replaced(leaves, wrt))))  # noqa: E731
            value, pull = jax.vjp(run, self.arguments.differentiated(leaves))
            return value, pull([jnp.asarray(u, v.dtype) for u, v in zip(cotangents, value, strict=True)])[0]
        result = self.rule(*self.arguments.call(leaves))
        if not self.has_value:
            return [], self.matched(result, leaves)
        return floats(result[0]), self.matched(result[1], leaves)

    def matched(self, gradient: Tree, leaves: Leaves) -> Leaves:
        """The leaves of a gradient at the float leaves of the differentiated arguments; ValueError for another tree."""
        gradient = (gradient,) if self.single else gradient
        arguments = self.arguments.call(leaves)
        like = tuple(arguments[i] for i in self.arguments.wrt_arguments)
        got, want = (str(jax.tree.structure(tree, is_leaf=lambda leaf: leaf is None)) for tree in (gradient, like))
        if got != want:
            raise ValueError(f"the gradient is a tree {got}, the arguments' is {want}")
        return [g for g, a in zip(jax.tree.leaves(gradient), jax.tree.leaves(like), strict=True) if is_float(a)]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers (bfloat16 included)."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(tree: Tree) -> Leaves:
    """The floating-point leaves of an output; a Python or NumPy float counts."""
    leaves = [np.asarray(leaf) if isinstance(leaf, float) else leaf for leaf in jax.tree.leaves(tree)]
    return [leaf for leaf in leaves if is_float(leaf)]


def without_rule(function: Callable[..., Any], jvp_too: bool = False) -> Callable[..., Any]:
    """The function with every `jax.custom_vjp` in it replaced by its own primal, so that autodiff sees the formula."""
    from jaxbp.checker.rounding import inlined

    primal = getattr(function, "__wrapped__", None) if isinstance(function, jax.custom_vjp) else None
    return inlined(primal or function, jvp_too)


def arguments_of(
    args: Sequence[Any], wrt: int | Sequence[int] | None, fixed: Sequence[int]
) -> tuple[Arguments, Leaves]:
    """The structure of a call and its array leaves; `fixed` are arguments that are no data (nondiff_argnums).

    Raises:
      ValueError: wrt names an argument that is not there or has no float leaf.
      TypeError: a complex leaf.
    """
    located, treedef = jax.tree_util.tree_flatten_with_path(tuple(args))
    data = [
        _Leaf(keystr(path), path[0].idx, _array(leaf) if path[0].idx not in fixed else leaf) for path, leaf in located
    ]
    arrays = [leaf for leaf in data if leaf.argument not in fixed and hasattr(leaf.value, "dtype")]
    for leaf in arrays:
        if jnp.issubdtype(leaf.value.dtype, jnp.complexfloating):
            raise TypeError(f"argument {leaf.path} is complex, allowed: real floating point and integers")
    have = sorted({leaf.argument for leaf in arrays if is_float(leaf.value)})
    chosen = tuple(have) if wrt is None else (wrt,) if isinstance(wrt, int) else tuple(wrt)
    for i in chosen:
        if i not in have:
            raise ValueError(f"wrt has {i}, but the arguments with floating-point leaves are {have}")
    structure = Arguments(
        treedef,
        static=tuple(ARRAY if leaf in arrays else leaf.value for leaf in data),
        wrt=tuple(n for n, leaf in enumerate(arrays) if leaf.argument in chosen and is_float(leaf.value)),
        wrt_arguments=chosen,
        owners=tuple(leaf.argument for leaf in arrays),
        paths=tuple(leaf.path for leaf in arrays),
    )
    return structure, [leaf.value for leaf in arrays]


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    path: str
    argument: int
    value: Any


def _array(leaf: Any) -> Any:
    return np.asarray(leaf) if type(leaf) in (float, int) else leaf


def subject_of(
    fun: Callable[..., Any],
    args: Sequence[Any],
    gradient: Callable[..., Any] | None,
    value_and_grad: Callable[..., Any] | None,
    vjp: tuple[Callable[..., Any], Callable[..., Any]] | None,
    reference: Callable[..., Any] | None,
    wrt: int | Sequence[int] | None,
) -> tuple[Subject, Leaves]:
    """The subject that the arguments of `check` describe, and the array leaves of its example arguments.

    Raises:
      ValueError: more than one of gradient, value_and_grad and vjp.
    """
    if sum(rule is not None for rule in (gradient, value_and_grad, vjp)) > 1:
        raise ValueError("give one of gradient, value_and_grad and vjp, not several")
    by_hand = gradient or value_and_grad
    rule: Any = by_hand or fun
    if vjp is not None:
        rule = jax.custom_vjp(lambda *args: fun(*args))  # bare: JAX would hand fun's default arguments to the forward
        rule.defvjp(*vjp)
    if by_hand is not None and wrt is None:
        wrt = 0
    fixed = tuple(rule.nondiff_argnums) if isinstance(rule, jax.custom_vjp) else ()
    arguments, leaves = arguments_of(_positional(fun, args), wrt, fixed)
    return Subject(
        name=getattr(fun, "__name__", type(fun).__name__),
        arguments=arguments,
        function=fun,
        reference=reference or fun,
        rule=rule,
        kind="gradient" if by_hand else "vjp",
        has_value=value_and_grad is not None,
        own_reference=reference is None,
        single=isinstance(wrt, int) and by_hand is not None,
    ), leaves


def _positional(fun: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with the defaults that a custom_vjp function's signature fills in."""
    if not isinstance(fun, jax.custom_vjp):
        return tuple(args)
    bound = inspect.signature(fun).bind(*args)
    bound.apply_defaults()
    return tuple(bound.args)
