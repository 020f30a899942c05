"""Tables: CSV, TSV, Parquet, Feather and Arrow files, read by pyarrow, and the inputs that their columns become.

- Numbers are one input, as they are.
- Text, booleans and dictionaries (the categories of pandas) are categories: an input each, 0 or 1, sorted by name.
- Missing values are refused, or filled by ``[data] missing = "mean"``: among numbers by the mean of the training set,
  among categories they are a category of their own. In a CSV an empty field is missing, and so are NA, NaN and null.
- Dates, times and lists are refused by name, and so is a text with more than `MOST_CATEGORIES` different values.
- ``[data] drop`` leaves columns out, ``[data] target`` names the one to learn.

Text and booleans of the target are classes. Its numbers are classes where the loss takes labels, or else the targets of
a regression, see `jaxbp.run.targets.most_labels`. Several targets are a regression.

The first line of a CSV names its columns. They are separated by whichever of , ; tab | is there most often. A column's
type is that of all its values, so one word among numbers makes a text of them: `jaxbp data describe` shows it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbp.names import nearest, short
from jaxbp.run.config import DataConfig
from jaxbp.run.data import labels
from jaxbp.run.data.labels import Targets
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory

SUFFIXES = (".csv", ".tsv", ".parquet", ".feather", ".arrow")
DELIMITERS = ",;\t|"
MOST_CATEGORIES = 1000
BLOCK = 2**23  # bytes of a CSV that a thread reads at once
LARGEST_BLOCK = 2**31 - 1  # and of one whose values decide about the types
NAMES_SHOWN = 20


class Column(NamedTuple):
    """A column and the inputs that it becomes.

    categories: sorted, the missing ones (None) last; () for numbers.
    mean: of the numbers of the training set, which fills in a missing one; None: it is refused.
    """

    name: str
    categories: tuple[str | None, ...]
    mean: float | None = None


Columns = tuple[Column, ...]


def is_table(name: str) -> bool:
    """Whether a data set of this name is a table."""
    return name.lower().endswith(SUFFIXES)


def learned(path: Path | str, table: Any, config: DataConfig, most_labels: int) -> tuple[np.ndarray, Columns, Targets]:
    """The inputs of a `pyarrow.Table`, in which a missing number is NaN, its columns and its targets.

    Raises:
      UserError: whatever `columns_of` and `inputs` refuse; a target that is not there or not named.
    """
    if not config.target:
        raise UserError(f"data.target: name the column of {path} that is to be learned: {_listed(table.column_names)}")
    wanted = _wanted(config)
    check_names(path, table, "data.target", wanted)
    check_names(path, table, "data.drop", config.drop)
    left = [name for name in table.column_names if name not in (*wanted, *config.drop)]
    if not left:
        raise UserError(f"{path}: no column is left to learn from beside {', '.join(wanted)}")
    targets = _targets(path, table, wanted, most_labels)
    columns = columns_of(path, table.select(left), config.missing is not None)
    return inputs(path, table, columns), columns, targets


def samples_like(path: Path, config: DataConfig, columns: Columns, most_labels: int) -> tuple[np.ndarray, Targets]:
    """The inputs and targets of another table than the one with these columns, for the same [data]."""
    table, wanted = read(path, config.decimal), _wanted(config)
    check_names(path, table, "data.target", wanted)
    return inputs(path, table, columns), _targets(path, table, wanted, most_labels)


def _wanted(config: DataConfig) -> tuple[str, ...]:
    return (config.target,) if isinstance(config.target, str) else config.target or ()


def check_names(path: Path | str, table: Any, key: str, names: Iterable[str]) -> None:
    """Raises unless the table has the columns that a key names."""
    there = table.column_names
    for name in names:
        if name not in there:
            near = nearest(name, there)
            raise UserError(f"{key}: {path} has no column {name!r}{near or '.'} There are: {_listed(there)}")


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path, decimal: str = ".") -> Any:
    """The `pyarrow.Table` in a file.

    Raises:
      UserError: no such file, none of its kind, no rows, a column without a name of its own.
    """
    import pyarrow as pa
    from pyarrow import feather, parquet

    if not path.is_file():
        near = nearest(path.name, (file.name for file in path.parent.glob("*.*")))
        raise UserError(f"{path}: no such file{near}")
    memory.check(f"{path}: the file needs", path.stat().st_size)
    readers = {".parquet": parquet.read_table, ".feather": feather.read_table, ".arrow": feather.read_table}
    try:
        suffix = path.suffix.lower()
        table = readers[suffix](path) if suffix in readers else _csv(path, decimal)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {' '.join(str(error)[:300].split())}") from None
    names = table.column_names
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: {names.count(twice[0])} columns have the name {twice[0]!r}")
    if names and all(map(is_number, names)):
        raise UserError(f"{path}: the first line has to name the columns, it holds numbers: {', '.join(names[:4])}")
    if len(table) == 0:
        raise UserError(f"{path}: no rows")
    return table


def _csv(path: Path, decimal: str) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    with path.open("rb") as file:
        head = file.readline(2**16).decode(errors="replace")
    parse = csv.ParseOptions(delimiter=max(DELIMITERS, key=head.count), newlines_in_values=True)
    convert = csv.ConvertOptions(strings_can_be_null=True, decimal_point=decimal)
    whole = min(path.stat().st_size + 1, LARGEST_BLOCK)
    try:  # the first block decides about the types: if the others fit them, they are those of the whole columns
        return csv.read_csv(path, csv.ReadOptions(block_size=min(BLOCK, whole)), parse, convert)
    except pa.ArrowInvalid:
        return csv.read_csv(path, csv.ReadOptions(block_size=whole), parse, convert)


def is_number(text: str) -> bool:
    """Whether a text is one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- its columns ------------------------------------------------------------------------------------------------------


def columns_of(where: object, table: Any, may_miss: bool) -> Columns:
    """What the columns of a table become.

    Raises:
      UserError: missing values, unless they may be there; a column that is neither numbers nor categories, or with too
        many of those.
    """
    missing = {name: count for name in table.column_names if (count := missing_in(table[name]))}
    if missing and not may_miss:
        shown = ", ".join(f"{name} {count:,}" for name, count in missing.items())
        hint = 'data.missing = "mean" fills them in, data.drop leaves a column out'
        raise UserError(f"{where}: values are missing: {shown}; {hint}")
    return tuple(_column(where, name, table[name]) for name in table.column_names)


def missing_in(column: Any) -> int:
    """How many values are missing, NaN among them."""
    import pyarrow.compute as pc

    return pc.sum(pc.is_null(column, nan_is_null=True)).as_py() or 0


def categories_of(column: Any) -> tuple[str | None, ...]:
    """The values of a column as text, sorted; None, if values are missing, is the last."""
    import pyarrow.compute as pc

    found = pc.unique(texts(column)).to_pylist()
    return (*sorted(name for name in found if name is not None), *([None] if None in found else []))


def texts(column: Any) -> Any:
    """The values of a column as text."""
    import pyarrow as pa

    return plain(column).cast(pa.large_string())


def plain(column: Any) -> Any:
    """The values of a column, those behind the numbers of a dictionary."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _column(where: object, name: str, column: Any) -> Column:
    if not _is_text(where, name, column.type):
        return Column(name, ())
    categories = categories_of(column)
    words = [word for word in categories if word is not None]
    with_comma = [word for word in words if "," in word]
    if with_comma and all(re.fullmatch(r"[+-]?\d*(,\d+)?", word) for word in words):
        raise UserError(f'{where}: column {name!r} has numbers such as {with_comma[0]}: data.decimal = "," reads them')
    if len(categories) > MOST_CATEGORIES:
        many = f"{len(categories):,} different texts, such as {short(words[0])}"
        raise UserError(f"{where}: column {name!r} has {many}; at most {MOST_CATEGORIES:,} are categories, drop it")
    return Column(name, categories)


def _is_text(where: object, name: str, kind: Any) -> bool:
    """Whether a column of this type is categories, or else numbers; UserError where it is neither."""
    from pyarrow import types as t

    if t.is_dictionary(kind) or str(kind) in ("bool", "string", "large_string", "string_view"):
        return True
    if t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind):
        return False
    found = {"null": "has no values", "binary": "is no UTF-8 text"}.get(str(kind), f"is of the type {kind}")
    allowed = "allowed are numbers, text and booleans; data.drop leaves it out"
    raise UserError(f"{where}: column {name!r} {found}, {allowed}")


# --- inputs and targets -----------------------------------------------------------------------------------------------


def inputs(where: object, table: Any, columns: Columns) -> np.ndarray:
    """(N, D) float64 of the columns, wherever they stand in the table; a missing number is its mean, or NaN.

    table: a `pyarrow.Table`, or what that is made of: a data frame of pandas or polars.

    Raises:
      UserError: a column is not there; a value is no finite number, or no category that was there before.
    """
    import pyarrow as pa

    table = table if isinstance(table, pa.Table) else pa.table(table)
    widths = [len(column.categories) or 1 for column in columns]
    memory.check(f"{where}: its columns as {sum(widths)} inputs need", 8 * len(table) * sum(widths))
    x, begin = np.zeros((len(table), sum(widths))), 0
    for column, width in zip(columns, widths, strict=True):
        if column.name not in table.column_names:
            near = nearest(column.name, table.column_names)
            raise UserError(f"{where}: no column {column.name!r}{near or '.'} There are: {_listed(table.column_names)}")
        values = table[column.name]
        if column.categories:
            x[np.arange(len(x)), begin + _codes(where, column, values)] = 1
        else:
            x[:, begin] = _numbers(where, column, values)
        begin += width
    return x


def fitted(columns: Columns, x: np.ndarray) -> tuple[Columns, np.ndarray]:
    """The columns with the means of their numbers in the inputs (N, D) of a training set; the means of all inputs."""
    there = ~np.isnan(x)
    means = np.sum(x, axis=0, where=there) / np.maximum(there.sum(axis=0), 1)
    begins = np.cumsum([0, *(len(column.categories) or 1 for column in columns)])
    pairs = zip(columns, begins, strict=False)
    return tuple(c if c.categories else c._replace(mean=float(means[begin])) for c, begin in pairs), means


def _numbers(where: object, column: Column, values: Any) -> np.ndarray:
    import pyarrow as pa

    try:
        found: np.ndarray = values.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{where}: column {column.name!r}: {' '.join(str(error).split())}") from None
    if np.isinf(found).any():
        raise UserError(f"{where}: column {column.name!r}: row {np.isinf(found).argmax()} is infinite")
    return found if column.mean is None else np.where(np.isnan(found), column.mean, found)


def _codes(where: object, column: Column, values: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    words = texts(values)
    codes = pc.index_in(words, value_set=pa.array(column.categories, words.type))
    if codes.null_count:
        row = int(pc.is_null(codes).to_numpy().argmax())
        word = words[row].as_py()
        what = "is missing, as none was in training" if word is None else f"is {short(word)}, no category of training"
        raise UserError(f"{where}: column {column.name!r}: row {row} {what}; allowed: {_listed(column.categories)}")
    return codes.to_numpy().astype(np.int32)


def _targets(path: Path | str, table: Any, wanted: Sequence[str], most_labels: int) -> Targets:
    for name in wanted:
        if count := missing_in(table[name]):
            raise UserError(f"{path}: the target {name!r} is missing in {count:,} rows; a target can't be filled in")
    words = [name for name in wanted if _is_text(path, name, table[name].type)]
    if words and len(wanted) > 1:
        raise UserError(f"data.target: of several targets each has to be numbers, {words[0]!r} of {path} is text")
    where = f"{path}: column {wanted[0]!r}"
    if words:
        classes = tuple(map(str, categories_of(table[words[0]])))
        labels.check_count(where, len(classes))
        return Targets(_codes(path, Column(words[0], classes), table[words[0]]), classes)
    y = inputs(path, table, tuple(Column(name, ()) for name in wanted))
    is_labels = len(wanted) == 1 and labels.are_labels(y[:, 0], most_labels)
    return labels.numbered(where, y[:, 0]) if is_labels else Targets(y, None)


def _listed(names: Sequence[str | None]) -> str:
    """The first of them."""
    shown = ", ".join("missing" if name is None else name for name in names[:NAMES_SHOWN])
    return shown + (f", … ({len(names)})" if len(names) > NAMES_SHOWN else "")
