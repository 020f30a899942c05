"""`jaxbp compare`: runs beside each other: in which keys their configs differ, in which scores, and if by chance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxbp.run.config import choose
from jaxbp.run.errors import UserError
from jaxbp.run.keys import flat
from jaxbp.run.report import text
from jaxbp.run.store import files, runs
from jaxbp.run.store.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED, VALIDATION = "train.seed", "data.validation"
TESTED = ("test_accuracy", "test_rmse", "test_loss")  # the first of them that all runs have
CHANCE = 0.05  # from this p-value on chance may explain a difference

Row = Mapping[str, Any]


class Comparison(NamedTuple):
    """A row a run; a row a group, if one has several runs; what is to be said of them; the keys of the groups."""

    rows: Sequence[Row]
    groups: list[Row]
    lines: list[str]
    keys: list[str]


def compare(
    places: Sequence[Path], by: str | None, sort: str | None, out: Path | None, overwrite: bool, console: Console
) -> None:
    """Prints a row a run and, of runs that differ in seed and fold alone or are grouped `by` a key, a row a group.

    Raises:
      UserError: fewer than two runs, a folder that holds none, an unknown key or column, a file that is there already.
    """
    files.check_new(out, (".csv", ".json", ".md", ".png"), overwrite)
    found = [runs.read(path) for path in runs.folders(places)]
    if len(found) < 2:
        raise UserError(f"compare: {found[0].path} is one run, it takes two; jaxbp show shows one")
    compared = comparison(found, by)
    rows = compared.rows if sort is None else runs.ordered(compared.rows, sort)
    _print(console, rows)
    if compared.groups:
        _print(console, compared.groups)
    for said in compared.lines:
        text.line(console, said)
    if out is not None:
        if out.suffix == ".png" and not any(row["epoch"] for row in rows):
            raise UserError("--out: none of these runs has an epoch to draw")
        _write(out, compared._replace(rows=rows))


def comparison(found: Sequence[Run], by: str | None = None) -> Comparison:
    """The runs beside each other, grouped by the keys that differ but seed and fold, or `by` one of them alone."""
    keys = differing(found)
    rows = table(found, keys)
    if by is not None:
        choose("--by", "key", by, dict.fromkeys(keys))
    folds = all("/" in str(row.get(VALIDATION)) for row in rows)
    repeated = (SEED, VALIDATION) if folds else (SEED,)
    chosen = [key for key in keys if key not in repeated] if by is None else [by]
    groups = grouped([row for row in rows if row["state"] == "finished" and row["epoch"]], chosen)
    if all(len(group) == 1 for group in groups.values()):
        return Comparison(rows, [], [], chosen)
    lines = ["mean ± standard deviation of the finished runs"]
    if len(groups) == 2:
        lines.append(paired(groups, [key for key in keys if key not in chosen]))
    return Comparison(rows, [summary(", ".join(chosen), *item) for item in groups.items()], lines, chosen)


def curves(compared: Comparison) -> "Figure":
    """Loss and score of the runs over one another, those of a group in one colour."""
    from jaxbp.run.report import plots  # matplotlib takes its time

    title = f"runs by {', '.join(compared.keys)}" if compared.keys else "runs"
    drawn = [(_label(row, compared.keys) or row["run"], _epochs(row)) for row in compared.rows if row["epoch"]]
    return plots.compared(drawn, title)


def differing(found: Sequence[Run]) -> list[str]:
    """The dotted keys that have more than one value, in the order of the configs."""
    configs = [flat(run.config) for run in found]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def table(found: Sequence[Run], keys: Sequence[str]) -> list[Row]:
    """A row a run: its folder, state and epochs, its values of the keys, its last scores; None where it has none."""
    names = list(dict.fromkeys(name for run in found for name in run.scores))
    return [
        {"run": str(run.path), "state": run.state, "epoch": run.last.get("epoch")}
        | {key: config.get(key) for key in keys}
        | {name: run.scores.get(name) for name in names}
        for run, config in ((run, flat(run.config)) for run in found)
    ]


def grouped(rows: Sequence[Row], by: Sequence[str]) -> dict[str, list[Row]]:
    """The rows that agree in these keys, by their values in a few words."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_label(row, by), []).append(row)
    return groups


def summary(keys: str, label: str, rows: Sequence[Row]) -> Row:
    """A row a group: its label, how many runs, mean ± s.d. of each score; s.d. is that of a sample, over n − 1."""
    shown = {keys or "all": label, "runs": str(len(rows))}
    for name in filter(lambda name: name.startswith(runs.SCORES), rows[0]):
        values = [row[name] for row in rows if row[name] is not None]
        parts = [np.mean(values)] if values else []
        parts += [np.std(values, ddof=1)] if len(values) > 1 else []
        shown[name.replace("_", " ")] = " ± ".join(text.shown_score(name, float(part)) for part in parts)
    return shown


def paired(groups: Mapping[str, Sequence[Row]], others: Sequence[str]) -> str:
    """Whether two groups differ in the score: Student's t-test of the differences between runs that agree else.

    Such runs have the same values of the `others`: the keys that differ, but for those of the groups; mostly seed and
    fold.
    """
    first, second = groups
    every = [row for rows in groups.values() for row in rows]
    score = next((name for name in TESTED if all(row.get(name) is not None for row in every)), "test_loss")
    mine, theirs = (
        {_label(row, others): row[score] for row in rows if row[score] is not None} for rows in groups.values()
    )
    pairs = np.array([(mine[agreed], theirs[agreed]) for agreed in mine if agreed in theirs]).reshape(-1, 2)
    over = f"{len(pairs)} {'seeds in common' if others == [SEED] else 'pairs of runs that agree in all else'}"
    if len(pairs) < 2:
        return f"{over}: a paired test takes two"
    difference = pairs[:, 0] - pairs[:, 1]
    mean, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(pairs)))
    differs = f"{score.replace('_', ' ')} differs by {text.shown_score(score, abs(mean))}"
    if np.ptp(difference) <= 1e-9 * np.abs(pairs).max():  # scores are ratios: they differ in their last bits
        return f"{differs} in each of {over}: without a spread there is no test"
    from scipy import stats  # takes its time

    p = float(stats.ttest_rel(*pairs.T).pvalue)
    better = first if (mean > 0) == score.endswith(runs.LARGER_IS_BETTER) else second
    verdict = f"{better} is better" if p < CHANCE else "chance may explain it"
    return f"{differs} ± {text.shown_score(score, error)} (s.e.) over {over}, p = {p:.2g}, paired t-test: {verdict}"


def _label(row: Row, keys: Sequence[str]) -> str:
    return ", ".join(text.shown(row[key]) for key in keys)


def _print(console: Console, rows: Sequence[Row]) -> None:
    """Without state and epoch where all are the same, and without the folders of runs where their names suffice."""
    names = [Path(row.get("run", "")).name for row in rows]
    if len(set(names)) == len(rows):
        rows = [{**row, "run": name} if name else row for row, name in zip(rows, names, strict=True)]
    columns = [n for n in rows[0] if n not in ("state", "epoch") or len({row[n] for row in rows}) > 1]
    text.table(console, columns, [[text.cell(name, row[name]) for name in columns] for row in rows])


def _write(out: Path, compared: Comparison) -> None:
    with files.writable(f"--out: {str(out)!r}"), files.replaced(out) as part:
        if out.suffix == ".png":
            from jaxbp.run.report import figures

            figures.save(curves(compared), part)
        elif out.suffix == ".json":
            part.write_text(json.dumps(compared.rows, indent=2) + "\n", encoding="utf-8")
        else:
            written = _csv(compared.rows) if out.suffix == ".csv" else _markdown(compared.rows)
            part.write_text(written, encoding="utf-8")


def _epochs(row: Row) -> list[Row]:
    return list(filter(runs.is_epoch, runs.rows(Path(row["run"], runs.METRICS))))


def _csv(rows: Sequence[Row]) -> str:
    cells = ([v if isinstance(v, float) else text.cell("", v) for v in row.values()] for row in rows)
    return files.csv_of([list(rows[0]), *cells])


def _markdown(rows: Sequence[Row]) -> str:
    cells = [[text.cell(*item).replace("|", "\\|") for item in row.items()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (list(rows[0]), ["---"] * len(rows[0]), *cells))
