"""What a benchmark gives: rows, each a ratio measured in one run, with its target."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

ROUNDS, MOST_ROUNDS, QUICK_ROUNDS = 11, 41, 3
BUDGET = 2.0  # seconds in which more than ROUNDS are taken

Verdict = Literal["met", "tie", "missed", ""]


class Target(NamedTuple):
    """value ≤ bound, or value ≥ bound."""

    sign: Literal["≤", "≥"]
    bound: float

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.sign == "≤" else value >= self.bound

    def excess(self, value: float) -> float:
        """How many times too much or too little; at most 1 where the target is reached."""
        return value / self.bound if self.sign == "≤" else self.bound / value


class Row(NamedTuple):
    """One measured number.

    what: the ratio, such as "time ÷ jax.value_and_grad" (what has no ratio says "seconds" there);  case: of what;
    value: its median over the rounds;  absolute: jaxbp's own seconds or bytes;  spread: the quartiles of the ratio over
    the rounds, None for what does not scatter;  at: where the row stands on the axis of a growth curve.
    """

    what: str
    case: str
    value: float
    absolute: float
    unit: Literal["s", "B"]
    target: Target | None = None
    spread: tuple[float, float] | None = None
    at: int | None = None

    @property
    def verdict(self) -> Verdict:
        """A tie lies beyond the target, but by less than the rounds scatter."""
        if self.target is None:
            return ""
        if self.target.reached(self.value):
            return "met"
        return "tie" if self.spread and any(map(self.target.reached, self.spread)) else "missed"


class Settings(NamedTuple):
    """How to measure: `quick` takes 3 rounds; peers are NAME ↦ its Python; `note` says what the numbers do not."""

    quick: bool = False
    peers: Mapping[str, str] = {}
    note: Callable[[str], None] = print

    def rounds(self, seconds: float) -> int:
        """How often to measure what takes so many seconds: 11 to 41 times, more where it is cheap."""
        return QUICK_ROUNDS if self.quick else max(ROUNDS, min(MOST_ROUNDS, int(BUDGET / seconds)))
