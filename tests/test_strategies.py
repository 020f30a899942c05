"""The strategies draw what they say, of the shapes and dtypes that are asked for, and find what they are for."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, find, given, settings

from jaxbp.checker import strategies

LIKE = {
    "x": "f32[2,3]",
    "ids": "i32[4]{2..5}",
    "scale": "bf16[]",
    "mask": "bool[0,2]",
    "half": jnp.zeros(3, jnp.float16),
}
ONE = settings(database=None, max_examples=400, phases=[Phase.generate], derandomize=True)


@pytest.mark.slow
@given(strategies.points(LIKE, low=-2.0, high=1e4))
def test_points_are_as_asked(drawn: dict[str, Any]) -> None:
    shapes = {name: (array.shape, array.dtype.name) for name, array in drawn.items()}
    assert shapes == {
        "x": ((2, 3), "float32"),
        "ids": ((4,), "int32"),
        "scale": ((), "bfloat16"),
        "mask": ((0, 2), "bool"),
        "half": ((3,), "float16"),
    }
    assert np.all((drawn["ids"] >= 2) & (drawn["ids"] <= 5))
    for name in ("x", "scale", "half"):
        values = drawn[name].astype(np.float64)
        assert np.all((values >= -2) & (values <= 1e4)) and (name != "half" or np.all(abs(values) <= 256))


@pytest.mark.parametrize(
    "seen",
    [
        lambda x: np.all(x == 0),
        lambda x: np.all(x == 1),
        lambda x: np.sum(x == np.max(x)) > 1 and np.min(x) < np.max(x),
        lambda x: np.any(x > 1e10),
        lambda x: np.any((x != 0) & (abs(x) < 1e-30)),
        lambda x: np.array_equal(x[0], x[1]) and x[0, 0] != x[0, 1],
        lambda x: len(np.unique(x)) == x.size,
    ],
    ids=["zeros", "ones", "ties", "huge", "tiny", "equal rows", "all different"],
)
@pytest.mark.slow
def test_points_reach(seen: Any) -> None:
    (x,) = find(strategies.points("f32[2,3]"), lambda drawn: bool(seen(drawn[0])), settings=ONE)
    assert seen(x)


@pytest.mark.slow
def test_cotangents_are_one_hot_or_of_one_leaf() -> None:
    like = (jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32))
    drawn = strategies.cotangents(like)
    hot = find(drawn, lambda us: [np.count_nonzero(u) for u in us] == [0, 1] and np.sum(us[1]) == 1, settings=ONE)
    assert [u.shape for u in hot] == [(2, 3), (4,)]
    find(drawn, lambda us: bool(np.all(us[1] == 0)) and np.count_nonzero(us[0]) == 6, settings=ONE)
    find(drawn, lambda us: bool(np.all(us[0] != 0) and np.all(us[1] != 0)), settings=ONE)
    assert find(strategies.cotangents(("i32[2]",)), lambda us: True, settings=ONE)[0].dtype == np.int32


def test_bounds_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"low 1.0 is above high 0.0"):
        strategies.points("f32[2]", 1.0, 0.0)


def test_without_hypothesis_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "jaxbp.checker.strategies")
    with pytest.raises(ModuleNotFoundError, match="strategies needs Hypothesis: pip install"):
        import jaxbp.checker.strategies  # noqa: F401
