"""Which cases of a long list run in `make test`; the others are left to `make test-all`."""

from collections.abc import Sequence
from typing import Any

import pytest


def one_in(every: int, cases: Sequence[Any]) -> list[Any]:
    """All cases for `pytest.mark.parametrize`; of each `every` one is quick and the others are marked slow."""
    return [
        case if number % every == 0 else pytest.param(case, marks=pytest.mark.slow) for number, case in enumerate(cases)
    ]


def slow(*cases: tuple[Any, ...]) -> list[Any]:
    """Cases of several parameters each, all of them marked slow."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
