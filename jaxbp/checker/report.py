"""What the checks found: rows, a verdict, text for a person and JSON for a machine."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.text import Text

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNEXERCISED"]
CHECKS = CONTRACT, PROVENANCE, ALGEBRA, ORACLE, ADJOINT, NUMERICS, PRODUCTION, TRANSFORMATIONS, EDGES = (
    "contract",
    "provenance",
    "cotangent algebra",
    "float64 oracle",
    "adjoint identity",
    "independent numerics",
    "production dtype",
    "transformations",
    "edges and vacuity",
)
SEVERITY: tuple[Verdict, ...] = ("FAIL", "INCONCLUSIVE", "UNEXERCISED", "PASS")
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One (check, leaf, dtype): its worst element.

    Args:
      check: one of the nine, in `CHECKS`.
      verdict: only PASS passes.
      path: the leaf, as `jax.tree_util.keystr` writes it: "[0].w" is field w of argument 0; "output" the value.
      dtype, regime: what it was computed in, and the points it was worst at.
      index: of the worst element in its leaf.
      got, want: there.
      ratio: error ÷ bound, at most 1 in a PASS.
      diagnosis: what change would make got the same as want, where one was found; or what was not exercised.
      subject: which of several functions a row belongs to (of a network: an activation, the loss, the gradient).
    """

    check: str
    verdict: Verdict
    path: str = ""
    dtype: str = ""
    regime: str = ""
    index: tuple[int, ...] = ()
    got: float | None = None
    want: float | None = None
    ratio: float = 0.0
    diagnosis: str = ""
    subject: str = ""


class CheckFailed(AssertionError):
    """Raised by `Report.raise_if_failed`."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of all checks, failures first and the first cause on top.

    Args:
      name: of the function checked.
      rows: see `Row`.
      not_covered: what could not be checked, and why.
      reproducer: lines of Python that show the first failure again; empty if there is none.
      seconds: the whole check took, compilation included.
      seed, level: as given.
      smallest: the smallest arguments found at which the first failure shows.
    """

    name: str
    rows: tuple[Row, ...]
    not_covered: tuple[str, ...]
    reproducer: str
    seconds: float
    seed: int
    level: str
    smallest: str = ""

    def __repr__(self) -> str:
        return f"Report({self.name}: {self.verdict}, {self._counts()}, {self.seconds:.1f} s)"

    @property
    def passed(self) -> bool:
        """Whether there are rows and every one is a PASS."""
        return self.verdict == "PASS"

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are no PASS, the first cause first."""
        return tuple(row for row in self.rows if row.verdict != "PASS")

    @property
    def verdict(self) -> Verdict:
        """The worst of the rows: FAIL before INCONCLUSIVE before UNEXERCISED before PASS."""
        found = {row.verdict for row in self.rows}
        return next((verdict for verdict in SEVERITY if verdict in found), "UNEXERCISED")

    def raise_if_failed(self) -> None:
        """Raises CheckFailed, an AssertionError whose message is the report, unless everything passed."""
        if not self.passed:
            raise CheckFailed(str(self))

    def json(self) -> str:
        """All rows as one JSON object."""
        whole = dataclasses.asdict(self) | {"verdict": self.verdict, "passed": self.passed}
        return json.dumps(_finite(whole), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        how = f"{self._counts()}; {self.level}, seed {self.seed}, {self.seconds:.1f} s"
        lines = [f"jaxbp.check {self.name}: {self.verdict} ({how})", *self._problems(), *self._passes()]
        lines += [f"  not covered: {line}" for line in self.not_covered]
        lines += [f"smallest case: {self.smallest}"] if self.smallest else []
        again = [f"  {line}" for line in self.reproducer.splitlines()]
        return "\n".join([*lines, *(["reproduce:", *again] if again else [])])

    def _problems(self) -> list[str]:
        """The rows that did not pass: where, what was got and wanted, the diagnosis below."""
        lines = []
        for row in self.failures[:SHOWN]:
            where = f"{row.path}{list(row.index)}" if row.index else row.path
            name = " ".join(filter(None, (row.check, row.subject, where)))
            at = ", ".join(filter(None, (row.dtype, row.regime)))
            numbers = (
                f": got {row.got:.7g}, want {row.want:.7g}, error ÷ bound {row.ratio:.2g}"
                if row.got is not None
                else ""
            )
            lines.append(f"  {row.verdict} {name}{f' ({at})' if at else ''}{numbers}")
            lines += [f"       {row.diagnosis}"] if row.diagnosis else []
        more = len(self.failures) - SHOWN
        return [*lines, f"  … and {more} more rows that did not pass, all of them in json()"] if more > 0 else lines

    def _passes(self) -> list[str]:
        """A line for each check with rows that passed: how many, and the worst error ÷ bound."""
        lines = []
        for check in CHECKS:
            if ratios := [row.ratio for row in self.rows if row.check == check and row.verdict == "PASS"]:
                rows = f"{len(ratios)} row{'s' * (len(ratios) != 1)}"
                lines.append(f"  passed {check}: {rows}, worst error ÷ bound {max(ratios):.2g}")
        return lines

    def _counts(self) -> str:
        counts = Counter(row.verdict for row in self.rows)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in SEVERITY if counts[verdict])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __rich__(self) -> "Text":
        from rich.text import Text

        return Text(str(self))


def ordered(rows: Sequence[Row], rank: dict[str, int]) -> tuple[Row, ...]:
    """Failures first, FAIL before the weaker verdicts; then check by check; in a check by `rank`, the rank of a leaf.

    The backward pass meets the leaves from the output to the input, and so does an error in it: the leaf that the
    forward pass used last is where an error began.
    """

    def place(row: Row) -> tuple[int, int, int]:
        return SEVERITY.index(row.verdict), CHECKS.index(row.check), -rank.get(row.path, -1)

    return tuple(sorted(rows, key=place))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or abs(value) < float("inf") else str(value)
