"""Tables: what their columns become, awkward files, and what `jaxbp data describe` says of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import tomli_w
from test_run_model import message

from jaxbp.run import problem as problems
from jaxbp.run.config import Config, DataConfig, ModelConfig, to_dict
from jaxbp.run.data import description, load, tables
from jaxbp.run.data.labels import MAX_CLASSES
from jaxbp.run.data.tables import Column
from jaxbp.run.evaluate import measured
from jaxbp.run.predict import predict
from jaxbp.run.store.model import Model
from jaxbp.run.store.model import load as load_model

SPECIES = ["cat", "dog", "cat", "dog", "newt", "newt"] * 2
TABLE = pa.table(
    {
        "age": [3, 5, 4, 7, 1, 2] * 2,
        "city": ["Rome", "Oslo", "Rome", "Bern", "Oslo", "Rome"] * 2,
        "tame": [True, True, False, True, False, False] * 2,
        "weight": [4.5, 20.25, 3.0, 31.0, 0.01, 0.5] * 2,
        "species": SPECIES,
    }
)
WRITERS: dict[str, Callable[[pa.Table, str], object]] = {
    ".csv": pa.csv.write_csv,
    ".parquet": pa.parquet.write_table,
    ".feather": pa.feather.write_feather,
    ".arrow": pa.feather.write_feather,
}


def written(folder: Path, content: str | bytes, name: str = "d.csv") -> str:
    """The path of a file with this content."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


def inputs_of(name: str, **keys: Any) -> tuple[dict[str, list[float]], tuple[Column, ...]]:
    """The inputs of both sets by column and category, in some order of the rows; the columns."""
    found = load(DataConfig(name, target="y", test_fraction=0.5, **keys), most_labels=MAX_CLASSES)
    assert found.columns is not None
    names = [f"{c.name} {k}".strip() for c in found.columns for k in c.categories or ("",)]
    x = np.concatenate([found.x_train, found.x_test])
    return {name: x[:, k].tolist() for k, name in enumerate(names)}, found.columns


# --- what columns become ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_inputs(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"d{suffix}")
    WRITERS[suffix](TABLE, path)
    found = load(DataConfig(path, target="species"))
    assert found.columns == (
        Column("age", ()),
        Column("city", ("Bern", "Oslo", "Rome")),
        Column("tame", ("false", "true")),
        Column("weight", ()),
    )
    assert found.classes == ("cat", "dog", "newt")
    assert (found.x_train.dtype, found.y_train.dtype, len(found.x_train)) == (np.float64, np.int32, 9)
    rows = {(5, 0, 1, 0, 0, 1, 20.25, 1), (3, 0, 0, 1, 0, 1, 4.5, 0), (1, 0, 1, 0, 1, 0, 0.01, 2)}
    assert rows <= {(*x, y) for x, y in zip(found.x_train.tolist(), found.y_train.tolist(), strict=True)}


def test_dictionaries_decimals_and_other_types(tmp_path: Path) -> None:
    columns = {
        "grade": pa.array(["b", "a", "b", "c"]).dictionary_encode(),
        "level": pa.array([10, 2, 10, 2]).dictionary_encode(),
        "price": pa.array(["1.50", "2.25", "3.00", "4.75"]).cast(pa.decimal128(5, 2)),
        "big": pa.array([2**53 + 1, 0, 1, 2], pa.uint64()),
        "y": [0.5, 1.5, 2.5, 3.5],
    }
    pa.feather.write_feather(pa.table(columns), str(tmp_path / "d.arrow"))
    found = load(DataConfig(str(tmp_path / "d.arrow"), target="y", test_fraction=0.25))
    assert found.classes is None and found.y_train.shape == (3, 1)
    assert found.columns is not None
    assert [c.categories for c in found.columns] == [("a", "b", "c"), ("10", "2"), (), ()]
    x = np.concatenate([found.x_train, found.x_test])
    assert sorted(x[:, 5].tolist()) == [1.5, 2.25, 3.0, 4.75] and x[:, 6].max() == 2.0**53


@pytest.mark.parametrize(
    ("target", "most", "classes"),
    [
        ("species", 0, ("cat", "dog", "newt")),
        ("tame", 0, ("false", "true")),
        ("age", 0, None),
        ("age", MAX_CLASSES, ("1", "2", "3", "4", "5", "7")),
        ("age", 2, None),
        ("weight", MAX_CLASSES, None),
        (("age", "weight"), MAX_CLASSES, None),
    ],
)
def test_targets(tmp_path: Path, target: Any, most: int, classes: tuple[str, ...] | None) -> None:
    pa.csv.write_csv(TABLE, str(tmp_path / "d.csv"))
    found = load(DataConfig(str(tmp_path / "d.csv"), target=target, test_fraction=0.5), most_labels=most)
    assert found.classes == classes
    if classes is None:
        names = [target] if isinstance(target, str) else target
        y = np.concatenate([found.y_train, found.y_test])
        assert sorted(y.tolist()) == sorted(map(list, zip(*(TABLE[name].to_pylist() for name in names), strict=True)))


def test_missing_values_are_refused_or_filled_from_the_training_set(tmp_path: Path) -> None:
    a, b = (["" if i % step == 0 else f"{i * i}" for i in range(20)] for step in (4, 20))
    rows = "".join(f"{a[i]},{'u' if b[i] else 'NA'},{'pq'[i % 2]}\n" for i in range(20))
    name = written(tmp_path, f"a,b,y\n{rows}")
    said = message(lambda: load(DataConfig(name, target="y")))
    assert said == (
        f'{name}: values are missing: a 5, b 1; data.missing = "mean" fills them in, data.drop leaves a column out'
    )
    found = load(DataConfig(name, target="y", missing="mean", test_fraction=0.5))
    assert found.columns is not None and found.columns[1] == Column("b", ("u", None))
    mean, squares = found.columns[0].mean, [float(number) for number in a if number]
    trained_on = [x for x in found.x_train[:, 0] if x in squares]
    assert mean == pytest.approx(np.mean(trained_on)) and mean not in squares
    assert sorted([*found.x_train[:, 0], *found.x_test[:, 0]]) == sorted([*squares, *[mean] * 5])


# --- awkward files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "keys", "expected"),
    [
        (b"\xef\xbb\xbfa,y\n1,u\n2,u\n3,v\n4,v\n", {}, {"a": [1, 2, 3, 4]}),
        (
            'a,y\n"p\nq",u\n"r, ""s""",u\n"p\nq",v\n"r, ""s""",v\n',
            {},
            {"a p\nq": [0, 0, 1, 1], 'a r, "s"': [0, 0, 1, 1]},
        ),
        ("a;y\n1,5;u\n2,25;u\n3;v\n-4,5;v\n", {"decimal": ","}, {"a": [-4.5, 1.5, 2.25, 3]}),
        ("a\ty\r\n1\tu\r\n2\tu\r\n3\tv\r\n4\tv\r\n", {}, {"a": [1, 2, 3, 4]}),
        ("a,y\n1,u\n2.5,u\n1e3,v\n-0,v\n", {}, {"a": [0, 1, 2.5, 1000]}),
        ("a,y\n1,u\n?,u\n1,v\n?,v\n", {}, {"a 1": [0, 0, 1, 1], "a ?": [0, 0, 1, 1]}),
        ("a,b,y\n1,x,u\n2,x,u\n3,y,v\n4,z,v\n", {"drop": ("b",)}, {"a": [1, 2, 3, 4]}),
        ('"a, b",y\n1,u\n2,u\n3,v\n4,v\n', {}, {"a, b": [1, 2, 3, 4]}),
    ],
)
def test_awkward_files_work(tmp_path: Path, content: str | bytes, keys: Any, expected: dict[str, list[float]]) -> None:
    found, _ = inputs_of(written(tmp_path, content), **keys)
    assert {name: sorted(values) for name, values in found.items()} == expected


def test_types_are_those_of_the_whole_column(tmp_path: Path) -> None:
    """pyarrow looks at a first block of 1 MB, if it is not told otherwise."""
    rows = "".join(f"{i},{'u' if i % 2 else 'v'}{'x' * 90}\n" for i in range(12_000))
    found = tables.read(Path(written(tmp_path, f"a,y\n{rows}0.5,w\n")))
    assert str(found["a"].type) == "double" and found["a"][-1].as_py() == 0.5


@pytest.mark.parametrize("values", [("1", "0.5"), ("", "7"), ("0.5", "x"), ("true", "1"), ("x", "y z"), ("1", "2")])
def test_types_do_not_depend_on_the_blocks_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[str, str]
) -> None:
    """The second value stands in the last row alone; a quoted newline is wherever a block may end."""
    path = Path(written(tmp_path, "a,y\n" + f'{values[0]},"u\nv"\n' * 50 + f"{values[1]},w\n"))
    whole = tables.read(path)
    for size in (16, 100):
        monkeypatch.setattr(tables, "BLOCK", size)
        assert tables.read(path).equals(whole)


ABLE = "a,y\n1,u\n2,v\n"


@pytest.mark.parametrize(
    ("content", "keys", "said"),
    [
        ("a,b,y\n1,2,u\n", {"target": None}, "data.target: name the column of d.csv that is to be learned: a, b, y"),
        (ABLE, {"target": "Y"}, "data.target: d.csv has no column 'Y', did you mean 'y'? There are: a, y"),
        (ABLE, {"drop": ("c",)}, "data.drop: d.csv has no column 'c'. There are: a, y"),
        (ABLE, {"drop": ("a",)}, "d.csv: no column is left to learn from beside y"),
        ("a,b,y\n1,2,u\n", {"target": ("a", "y")}, "data.target: of several targets each has to be numbers, 'y' of d."),
        ("a,y\n1,u\n2,\n", {}, "d.csv: the target 'y' is missing in 1 rows; a target can't be filled in"),
        ("a,a,y\n1,2,u\n", {}, "d.csv: 2 columns have the name 'a'"),
        ("1,2,3\n4,5,6\n", {}, "d.csv: the first line has to name the columns, it holds numbers: 1, 2, 3"),
        ("a,y\n", {}, "d.csv: no rows"),
        ("", {}, "d.csv: can't be read: Empty CSV file"),
        (b"a,y\n\xff\xfe,u\n", {}, "d.csv: column 'a' is no UTF-8 text, allowed are "),
        (b"\xff\xfea\x00,\x00", {}, "d.csv: can't be read: "),
        ("a,y\n1,u\n1,2,3\n", {}, "d.csv: can't be read: CSV parse error: Expected 2 columns, got 3: 1,2,3"),
        ("a,y\n2024-01-31,u\n2024-02-01,v\n", {}, "d.csv: column 'a' is of the type date32[day], allowed are "),
        ("a,y\n,u\n,v\n", {"missing": "mean"}, "d.csv: column 'a' has no values, allowed are "),
        ("a,y\ninf,u\n2,v\n", {}, "d.csv: column 'a': row 0 is infinite"),
        ("a;y\n1,5;u\n2;v\n", {}, "d.csv: column 'a' has numbers such as 1,5: data.decimal = \",\" reads them"),
        (
            f"a,y\n{''.join(f'n{i},u{chr(10)}' for i in range(1001))}",
            {},
            "d.csv: column 'a' has 1,001 different texts, such as 'n0'; at most 1,000 are categories, drop it",
        ),
    ],
)
def test_what_is_refused_is_one_line(tmp_path: Path, content: str | bytes, keys: dict[str, Any], said: str) -> None:
    name = written(tmp_path, content)
    config = DataConfig(name, **({"target": "y"} | keys))
    assert message(lambda: load(config)).replace(f"{tmp_path}/", "").startswith(said)


def test_files_that_are_not_what_their_names_say(tmp_path: Path) -> None:
    for suffix in (".parquet", ".feather", ".arrow"):
        name = written(tmp_path, ABLE, f"d{suffix}")
        assert message(lambda name=name: load(DataConfig(name, target="y"))).startswith(f"{name}: can't be read: ")
    written(tmp_path, ABLE)
    missing = str(tmp_path / "D.csv")
    assert message(lambda: load(DataConfig(missing, target="y"))).startswith(
        f"{missing}: no such file, did you mean 'd"
    )
    assert (
        message(lambda: load(DataConfig("iris", target="y")))
        == "data.target: iris is no table such as a .csv; leave out"
    )


# --- with the trained network -----------------------------------------------------------------------------------------


def trained(folder: Path, table: pa.Table = TABLE, **keys: Any) -> Model:
    """The model of a run that has learned nothing yet, in its folder."""
    pa.csv.write_csv(table, str(folder / "d.csv"))
    config = Config(DataConfig(str(folder / "d.csv"), **({"target": "species"} | keys)), ModelConfig(hidden_sizes=(3,)))
    problem = problems.pose(config)
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(problem.config)))
    model = problem.model(problem.initial())
    model.save(folder)
    return model


def test_the_columns_come_back_with_the_model(tmp_path: Path) -> None:
    holes = TABLE.set_column(0, "age", pa.array([None, 5, 4, 7, 1, 2] * 2))
    model = trained(tmp_path, holes, missing="mean")
    again = load_model(tmp_path)
    assert again.columns == model.columns and again.columns is not None and again.columns[0].mean is not None
    assert again.net == model.net and model.net.sizes == (7, 3, 3)
    first = (tmp_path / "params.safetensors").read_bytes()
    again.save(tmp_path)
    assert (tmp_path / "params.safetensors").read_bytes() == first


def test_a_table_is_predicted_in_any_order_of_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tmp_path)
    assert model.columns is not None
    expected = model.predict(tables.inputs("", TABLE, model.columns))
    new = TABLE.select(["weight", "tame", "city", "age"])
    np.testing.assert_array_equal(model.predict(new), expected)
    pa.parquet.write_table(new, tmp_path / "new.parquet")
    predict(tmp_path, tmp_path / "new.parquet", None)
    names = [line.split(",")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert model.classes is not None and names == [model.classes[k] for k in expected.argmax(axis=1)]


def test_a_table_is_evaluated_by_the_names_of_its_target(tmp_path: Path) -> None:
    """Some of the rows, in another order, without a class of the training."""
    model, rows = trained(tmp_path), [k for k, name in enumerate(SPECIES) if name != SPECIES[0]][::-1]
    pa.parquet.write_table(TABLE.take(rows), tmp_path / "some.parquet")
    name, found = measured(tmp_path, tmp_path / "some.parquet")
    assert model.columns is not None and model.classes is not None
    guesses = model.predict(tables.inputs("", TABLE.take(rows), model.columns)).argmax(axis=1)
    right = [model.classes[guess] == SPECIES[row] for guess, row in zip(guesses, rows, strict=True)]
    assert found["scores"]["accuracy"] == [np.mean(right)] and name.startswith(f"{len(rows)} samples of")
    pa.parquet.write_table(TABLE.drop_columns("species"), tmp_path / "none.parquet")
    said = message(lambda: measured(tmp_path, tmp_path / "none.parquet"))
    assert "none.parquet has no column 'species'" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("age,city,tame\n1,Rome,true\n", "no column 'weight'. There are: age, city, tame"),
        ("age,city,tame,weight\n1,Rome,true,2\n1,Paris,true,2\n", "column 'city': row 1 is 'Paris', no category of "),
        (
            "age,city,tame,weight\n1,,true,2\n",
            "column 'city': row 0 is missing, as none was in training; allowed: Bern",
        ),
        ("age,city,tame,weight\n1,Rome,true,\n", "row 0 has a missing number, and the run has no mean for it"),
        ("age,city,tame,weight\nold,Rome,true,2\n", "column 'age': Failed to parse string: 'old'"),
    ],
)
def test_a_table_that_does_not_fit_the_run(tmp_path: Path, content: str, said: str) -> None:
    trained(tmp_path)
    new = Path(written(tmp_path, content, "new.csv"))
    assert message(lambda: predict(tmp_path, new, None)).startswith(f"{new}: {said}")


def test_another_table_is_not_that_of_the_run(tmp_path: Path) -> None:
    model = trained(tmp_path)
    other = TABLE.set_column(1, "town", TABLE["city"])
    pa.csv.write_csv(other, str(tmp_path / "d.csv"))
    assert "is not the data that the run was trained on" in message(lambda: problems.of_run(tmp_path, model))


# --- describe ---------------------------------------------------------------------------------------------------------


def test_describe_says_what_it_understands(tmp_path: Path) -> None:
    pa.csv.write_csv(TABLE, str(tmp_path / "d.csv"))
    rows, lines = description.describe(tmp_path / "d.csv", ["species"])
    assert [tuple(row) for row in rows] == [
        ("age", "number", "1 to 7, 6 different", "0"),
        ("city", "category", "3 different: Rome 6, Oslo 4, Bern 2", "0"),
        ("tame", "category", "2 different: false 6, true 6", "0"),
        ("weight", "number", "0.01 to 31, 6 different", "0"),
        ("species", "category", "3 different: cat 4, dog 4, newt 4", "0"),
    ]
    count, target, *suspicious = lines
    assert count == "12 rows"
    assert target == "target species: classes, 3 different: cat 4, dog 4, newt 4"
    assert len(suspicious) == 1 and suspicious[0].startswith("suspicious: 6 rows repeat the inputs of another one, ")


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("c", lambda i: "7", "column 'c' is constant"),
        ("id", lambda i: f"p{i}", "column 'id' is different in every row; data.drop leaves an identifier out"),
        (
            "n",
            lambda i: "?" if i == 3 else f"{i % 9}",
            "column 'n' is text because of '?'; most of its values are numbers",
        ),
        ("leak", lambda i: "ab"[i % 2], "column 'leak' tells the target 'y': each of its values goes with one of the "),
        ("on", lambda i: f"2024-01-{i + 1:02}", "column 'on' is of the type date32[day], allowed are "),
    ],
)
def test_describe_says_what_is_suspicious(tmp_path: Path, header: str, row: Callable[[int], str], said: str) -> None:
    rows = "".join(f"{i * i / 7},{row(i)},{'uv'[i % 2]}\n" for i in range(20))
    _, (_, _, *suspicious) = description.describe(Path(written(tmp_path, f"a,{header},y\n{rows}")), ["y"])
    assert len(suspicious) == 1 and suspicious[0].startswith(f"suspicious: {said}")
