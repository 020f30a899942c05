"""Hypothesis strategies: the points and the cotangents at which a hand-written backward pass shows that it is wrong.

>>> from hypothesis import given
>>> from jaxbp.checker import strategies
>>> @given(strategies.points("f32[3] f32[3]"), strategies.cotangents("f32[3]"))
... def test_product(xs, us):
...     want = jax.vjp(jnp.multiply, *xs)[1](*us)
...     assert all(map(np.array_equal, my_backward(*xs, *us), want))

Needs Hypothesis: ``pip install 'jaxbp[hypothesis]'``.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker.data import Spec, parse, text_of
from jaxbp.checker.subject import is_float

try:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as arrays
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "jaxbp.checker.strategies needs Hypothesis: pip install 'jaxbp[hypothesis]'", name="hypothesis"
    ) from None

Tree = Any
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0)


def points(like: Tree, low: float = -np.inf, high: float = np.inf) -> st.SearchStrategy[Tree]:
    """Arguments of a function: trees of NumPy arrays with the shapes and dtypes of `like`.

    An array holds one number (so it may be all zeros or ones), two numbers in any order (ties), equal rows, or a number
    for each place. Floating-point numbers are 0, −0, ±1, halves, small integers, powers of two from the smallest normal
    number to √max, and any other between −√max and √max. Integers reach both ends of their range.

    Args:
      like: a text such as "f32[8,128] i32[8]{0..9}", or a tree of such texts of one array, of arrays or of
        `jax.ShapeDtypeStruct`. The integers of an array say the range of those that are drawn.
      low, high: bounds of the floating-point numbers.

    Raises:
      ValueError: a text that is none; low above high.
    """
    if low > high:
        raise ValueError(f"low {low} is above high {high}")
    leaves, treedef = jax.tree.flatten(_specs(like))
    drawn = st.tuples(*(_array(leaf, low, high) for leaf in leaves))
    return drawn.map(lambda arrays: jax.tree.unflatten(treedef, arrays))


def cotangents(like: Tree) -> st.SearchStrategy[Tree]:
    """Cotangents of an output like this: as `points`, and 1 at one place of one leaf, or 0 in all leaves but one.

    Integer leaves, which have no cotangent, are left as they are drawn.
    """
    leaves, treedef = jax.tree.flatten(_specs(like))
    floating = [n for n, leaf in enumerate(leaves) if is_float(leaf)]
    dense = st.tuples(*(_array(leaf, -np.inf, np.inf) for leaf in leaves))
    places = [(n, place) for n in floating for place in np.ndindex(leaves[n].shape)]
    hot = [st.sampled_from(places).map(lambda place: _hot(leaves, *place))] if places else []
    alone = [dense.map(functools.partial(_alone, n)) for n in floating]
    return st.one_of(*hot, *alone, dense).map(lambda drawn: jax.tree.unflatten(treedef, drawn))


def _specs(like: Tree) -> Tree:
    """The tree with a `Spec` at each leaf; integers of an array have its own range."""
    if isinstance(like, str):
        return parse(like)
    return jax.tree.map(lambda leaf: parse(leaf if isinstance(leaf, str) else text_of(leaf))[0], like)


def _array(spec: Spec, low: float, high: float) -> st.SearchStrategy[Any]:
    if jnp.issubdtype(spec.dtype, jnp.bool_):
        return _filled(spec, st.booleans())
    if not is_float(spec):
        return _filled(spec, st.sampled_from((spec.low, spec.high)) | st.integers(spec.low, spec.high))
    most = float(jnp.finfo(spec.dtype).max) ** 0.5
    low, high = max(low, -most), min(high, most)
    exponents = st.integers(int(jnp.finfo(spec.dtype).minexp), int(np.log2(most)))
    powers = exponents.flatmap(lambda e: st.sampled_from((2.0**e, -(2.0**e)))).filter(lambda x: low <= x <= high)
    special = [x for x in SPECIAL if low <= x <= high]
    return _filled(spec, st.one_of(*[st.sampled_from(special)] * bool(special), st.floats(low, high), powers))


def _filled(spec: Spec, numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An array of one number, of two in any order, of equal rows, or of a number for each place."""
    ties = st.builds(np.where, arrays.arrays(bool, spec.shape), numbers, numbers)
    free = arrays.arrays(object, spec.shape, elements=numbers)
    rows = arrays.arrays(object, spec.shape[-1:], elements=numbers)
    every = st.one_of(numbers, ties, rows, free) if spec.shape else numbers
    return every.map(lambda values: np.broadcast_to(np.asarray(values, object), spec.shape).astype(spec.dtype))


def _hot(leaves: Sequence[Any], leaf: int, place: tuple[Any, ...]) -> list[Any]:
    found = [np.zeros(spec.shape, spec.dtype) for spec in leaves]
    found[leaf][place] = 1
    return found


def _alone(leaf: int, drawn: Sequence[Any]) -> list[Any]:
    return [array if n == leaf else np.zeros_like(array) for n, array in enumerate(drawn)]
