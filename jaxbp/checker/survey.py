"""The rules of a package or a file, each with its report or the reason why it has none; and annotations for GitHub."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from jaxbp.checker.arguments import found_out, told
from jaxbp.checker.check import check
from jaxbp.checker.finder import Rule
from jaxbp.checker.report import SEVERITY, Report
from jaxbp.checker.trial import first_line

Level = Literal["fast", "full"]
NOT_EXERCISED, SKIPPED = "not exercised", "skipped"  # the arguments are not known; the TOML says so
VERDICTS = (*reversed(SEVERITY), NOT_EXERCISED, SKIPPED)
LEVELS = {"FAIL": "error", "INCONCLUSIVE": "warning", "UNEXERCISED": "warning", NOT_EXERCISED: "notice"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule, its verdict and what that comes from: a report, or the reason why there is none."""

    rule: Rule
    verdict: str  # one of `VERDICTS`
    arguments: str = ""  # it was checked with, as text
    report: Report | None = None
    reason: str = ""

    def json(self) -> dict[str, Any]:
        """The entry as a table of the survey's JSON."""
        rule = {name: getattr(self.rule, name) for name in ("name", "kind", "file", "line")}
        report = json.loads(self.report.json()) if self.report else None
        return rule | {name: getattr(self, name) for name in ("verdict", "arguments", "reason")} | {"report": report}

    def __str__(self) -> str:
        """A line, and the report below it unless it passed."""
        head = f"{self.verdict} {self.rule.name} ({self.rule.kind}): {self.arguments}"
        if self.report is None:
            return f"{head}{', ' if self.arguments else ''}{self.reason}"
        below = [] if self.report.passed else str(self.report).splitlines()
        return "\n".join([head, *(f"  {line}" for line in below)])


@dataclasses.dataclass(frozen=True)
class Survey:
    """All rules of a package or a file."""

    name: str
    entries: tuple[Entry, ...]
    failed: tuple[str, ...] = ()  # a line for each module that could not be imported, so that its rules are not known

    @property
    def counts(self) -> dict[str, int]:
        """How many rules were found, how many were checked, and how many have each verdict."""
        verdicts = Counter(entry.verdict for entry in self.entries)
        checked = sum(entry.report is not None for entry in self.entries)
        return {"found": len(self.entries), "checked": checked, **{verdict: verdicts[verdict] for verdict in VERDICTS}}

    @property
    def passed(self) -> bool:
        """Whether a rule passed, and every one that is not skipped."""
        counts = self.counts
        return 0 < counts["PASS"] == counts["found"] - counts[SKIPPED]

    def json(self) -> str:
        """Counts, rules with their reports, modules that could not be imported, as one JSON object."""
        whole = {
            **{name: getattr(self, name) for name in ("name", "passed", "counts", "failed")},
            "rules": [entry.json() for entry in self.entries],
        }
        return json.dumps(whole, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{count} {name}" for name, count in self.counts.items())


def examined(rule: Rule, table: Mapping[str, Any] | None, level: Level = "fast", seed: int = 0) -> Entry:
    """A rule, checked with the arguments of its table in the TOML, or with those that can be found out."""
    if table and "skip" in table:
        return Entry(rule, SKIPPED, reason=table["skip"])
    try:
        call = told(rule, table) if table else found_out(rule)
    except (ValueError, ImportError, AttributeError) as error:
        return Entry(rule, NOT_EXERCISED, reason=f"its arguments: {first_line(error)}")
    if call is None:
        return Entry(rule, NOT_EXERCISED, reason="its arguments could not be found out")
    try:
        report = check(call.fun, call.args, level=level, seed=seed, **call.options)
    except Exception as error:  # of the rule, which is anyone's code; the others are checked all the same
        return Entry(rule, NOT_EXERCISED, call.text, reason=f"raised {first_line(error)}")
    return Entry(rule, report.verdict, call.text, report)


def annotations(survey: Mapping[str, Any]) -> list[str]:
    """Lines that GitHub shows beside the code, from the JSON of a survey: an error for each FAIL, a warning for each
    INCONCLUSIVE or UNEXERCISED, a notice for what was not exercised.

    Example:
      >>> rule = {"name": "m:f", "file": "m.py", "line": 3, "verdict": "not exercised", "reason": "50% known"}
      >>> annotations({"rules": [rule]})
      ['::notice file=m.py,line=3,title=m%3Af::not exercised: 50%25 known']
    """
    lines = []
    for rule in survey["rules"]:
        if level := LEVELS.get(rule["verdict"]):
            place = {"file": os.path.relpath(rule["file"]), "line": rule["line"], "title": rule["name"]}
            shown = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in place.items())
            lines.append(f"::{level} {shown}::{_escaped(_message(rule))}")
    return lines


def _message(rule: Mapping[str, Any]) -> str:
    """The verdict and the first cause."""
    if not rule.get("report"):
        return f"{rule['verdict']}: {rule['reason']}"
    row = next((row for row in rule["report"]["rows"] if row["verdict"] == rule["verdict"]), None)
    if row is None:
        return f"{rule['verdict']}: no check was made"
    numbers = "" if row["got"] is None else f": got {row['got']}, want {row['want']}"
    where = f"{row['check']} {row['path']}{row['index'] or ''}".strip()
    return f"{rule['verdict']} {where}{numbers}" + (f"\n{row['diagnosis']}" if row["diagnosis"] else "")


def _escaped(text: str, more: str = "") -> str:
    for letter in f"%\r\n{more}":
        text = text.replace(letter, f"%{ord(letter):02X}")
    return text
