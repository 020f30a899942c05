"""The [data] table: scikit-learn's bundled data sets, MNIST, Fashion-MNIST, OpenML's, the user's own; their split."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbp.names import nearest
from jaxbp.run import paths
from jaxbp.run.config import DataConfig
from jaxbp.run.data import archive, folders, idx, openml, tables, text
from jaxbp.run.data.archive import Dataset, flat
from jaxbp.run.data.scaling import chunks
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory

TEST_FRACTION = 0.2
TAKEN = {"test": "test_fraction", "validation": "validation"}  # the sets, and the keys that say how they are taken
OF_TABLES = ("target", "drop", "missing", "decimal")  # keys of [data]
BUNDLED: dict[str, tuple[int, int, int | None]] = {  # samples, inputs, classes (None: regression)
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
    "breast_cancer": (569, 30, 2),
    "diabetes": (442, 10, None),
}


class DataRow(NamedTuple):
    """A line of `jaxbp data list`."""

    name: str
    kind: Literal["classification", "regression", "text"]
    samples: int | None
    inputs: int | None
    classes: int | None
    where: str


def load(config: DataConfig, in_place: bool = False, most_labels: int = 0) -> Dataset:
    """Reads and splits the data that `config` names, downloading MNIST or Fashion-MNIST if they are not there yet.

    Inputs and targets come back unscaled. With `in_place` the arrays of an .npz that is not compressed stay on disk and
    are loaded where they are used; a split copies them. A column of whole numbers that could be the targets of a
    regression is labels where it has at most `most_labels` different ones. Raises a UserError for whatever the user can
    mend.

    >>> load(DataConfig("iris", test_fraction=0.3)).x_test.shape
    (45, 4)
    """
    is_table = tables.is_table(config.name) or openml.is_openml(config.name)
    for key in OF_TABLES if not is_table else ():
        if getattr(config, key) != getattr(DataConfig, key):
            raise UserError(f"data.{key}: {config.name} is no table such as a .csv; leave out")
    if text.is_text(config.name):
        return text.read(config)
    if config.block is not None:
        raise UserError(f"data.block: {config.block}, but {config.name} is no text; leave out")
    return _divided(config, _read(config, in_place, most_labels))


def from_arrays(config: DataConfig, arrays: Sequence[Any] | Mapping[str, Any], most_labels: int = 0) -> Dataset:
    """x and y instead of what `config` names, perhaps x_test and y_test, or a table with the names of an .npz."""
    if not isinstance(arrays, Mapping):
        if len(arrays) not in (2, 4):
            allowed = "(x, y), (x, y, x_test, y_test) or a dictionary with x_val and y_val too"
            raise UserError(f"data: got {len(arrays)} arrays, allowed: {allowed}")
        arrays = dict(zip(("x", "y", "x_test", "y_test"), arrays, strict=False))
    wanted = archive.wanted(Path("data"), ("x", "y"), archive.OPTIONAL, list(arrays))
    if unknown := [name for name in arrays if name not in wanted]:
        raise UserError(f"data: unknown array {unknown[0]!r}{nearest(unknown[0], wanted) or '.'}")
    named = {name: np.asarray(arrays[name]) for name in wanted}
    return _divided(config, archive.raw(Path(config.name), named, most_labels))


def digest(dataset: Dataset) -> str:
    """SHA-256 of the arrays, with their types and shapes: 0.06 s for MNIST."""
    found = hashlib.sha256()
    names = ("x_train", "y_train", "x_test", "y_test", "x_validation", "y_validation", "weights")
    for array in (array for name in names if (array := getattr(dataset, name)) is not None):
        found.update(f"{array.dtype.str} {array.shape} ".encode())
        for part in chunks(array):
            found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()


def describe() -> list[DataRow]:
    """The data sets known by name, and where each one is."""
    rows = [
        DataRow(name, "regression" if classes is None else "classification", samples, inputs, classes, "bundled")
        for name, (samples, inputs, classes) in BUNDLED.items()
    ]
    for name, source in idx.SOURCES.items():
        samples = source.files[0].shape[0] + source.files[2].shape[0]
        where = f"in {idx.folder_of(name)}" if idx.is_local(name) else "to be downloaded"
        inputs = math.prod(source.files[0].shape[1:])
        rows.append(DataRow(name, "classification", samples, inputs, len(source.classes), where))
    where = f"in {text.imported().parent}" if text.imported().is_file() else "to be imported"
    return [*rows, DataRow(text.NAME, "text", None, None, None, where)]


def _read(config: DataConfig, in_place: bool, most_labels: int) -> Dataset:
    name = config.name
    if name in BUNDLED:
        return _read_bundled(name)
    if name in idx.SOURCES:
        x, y, x_test, y_test = idx.read_source(name)
        labels = (y.astype(np.int32), y_test.astype(np.int32))
        return Dataset(name, flat(x), labels[0], flat(x_test), labels[1], idx.SOURCES[name].classes, x.shape[1:])
    path = paths.named("data.name", name)
    if name.endswith(".npz"):
        return archive.read(path, in_place, most_labels)
    if tables.is_table(name) or openml.is_openml(name):
        where: Path | str = path
        if tables.is_table(name):
            table = tables.read(path, config.decimal)
        else:
            where, (table, config) = name, openml.read(config)
        x, columns, (y, classes) = tables.learned(where, table, config, most_labels)
        return Dataset(name, x, y, classes=classes, columns=columns)
    if path.is_dir():
        return folders.read(path, in_place, most_labels)
    names = (*BUNDLED, *idx.SOURCES, text.NAME)
    allowed = f"Allowed: {', '.join(names)}, {openml.PREFIX}NAME, a folder of images or of x.npy and y.npy, "
    allowed += f"or a path that ends in .npz, .txt, {', '.join(tables.SUFFIXES)}"
    raise UserError(f"data.name: {name!r} is not a data set{nearest(name, names) or '.'} {allowed}")


def _read_bundled(name: str) -> Dataset:
    from sklearn import datasets

    if name == "diabetes":
        data = datasets.load_diabetes(scaled=False)
        return Dataset(name, data.data, data.target[:, None])
    data = getattr(datasets, f"load_{name}")()
    classes, shape = tuple(map(str, data.target_names)), (8, 8) if name == "digits" else None
    return Dataset(name, data.data, data.target.astype(np.int32), classes=classes, image_shape=shape)


# --- split ------------------------------------------------------------------------------------------------------------


def _divided(config: DataConfig, dataset: Dataset) -> Dataset:
    """Into training, validation and test set, unless the data have their own; what a table misses is filled in."""
    if config.standardize_targets and dataset.classes is not None:
        raise UserError(f"data.standardize_targets: true, but {config.name} has classes; it is for regression only")
    for split in TAKEN:
        dataset = _with(config, dataset, split)
    dataset = dataset._replace(name=config.name)
    if dataset.columns is None or config.missing is None:
        return dataset
    columns, means = tables.fitted(dataset.columns, dataset.x_train)
    names = [f"x_{split}" for split in dataset.splits]
    filled: dict[str, Any] = {name: np.where(np.isnan(x := getattr(dataset, name)), means, x) for name in names}
    return dataset._replace(columns=columns, **filled)


def _with(config: DataConfig, dataset: Dataset, split: str) -> Dataset:
    """With a part of the training samples as this set, where it has none of its own and is to have one."""
    asked, own = getattr(config, TAKEN[split]), getattr(dataset, f"x_{split}")
    if own is not None and asked is not None:
        raise UserError(f"data.{TAKEN[split]}: {asked}, but {config.name} has its own {split} set; leave out")
    if own is not None or (asked is None and split == "validation"):
        return dataset
    if isinstance(asked, str):
        rows, taken = _fold(config, dataset, asked)
    else:
        rows, taken = _split(config, dataset, split, TEST_FRACTION if asked is None else asked)
    x, y, weights = dataset.x_train, dataset.y_train, dataset.weights
    part: dict[str, Any] = {f"x_{split}": x[taken], f"y_{split}": y[taken]}
    left = None if weights is None else weights[rows]
    return dataset._replace(x_train=x[rows], y_train=y[rows], weights=left, **part)


def _classes(dataset: Dataset) -> np.ndarray | None:
    """(N,), where each training sample has one label: every set has its share of each class then."""
    return None if dataset.classes is None or dataset.y_train.ndim > 1 else dataset.y_train


def _split(config: DataConfig, dataset: Dataset, split: str, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are left, and those of a seeded part."""
    from sklearn.model_selection import train_test_split

    _check_split(config, dataset, split, fraction)
    size = dataset.x_train.nbytes + dataset.y_train.nbytes
    memory.check(f"data.name: {config.name}: a split into training and {split} set needs", size)
    rows = np.arange(len(dataset.x_train))
    rows, taken = train_test_split(rows, test_size=fraction, random_state=config.seed, stratify=_classes(dataset))
    return rows, taken


def _fold(config: DataConfig, dataset: Dataset, fold: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are left, and those of a seeded fold."""
    from sklearn.model_selection import KFold, StratifiedKFold

    number, folds = map(int, fold.split("/"))
    classes, samples, whose = _classes(dataset), len(dataset.x_train), "training samples"
    if dataset.classes is not None and classes is not None:
        labels, counts = np.unique(classes, return_counts=True)
        samples, whose = counts.min(), f"training samples of class {dataset.classes[labels[counts.argmin()]]!r}"
    if not number <= folds or folds < 2:
        raise UserError(f"data.validation: {fold}; allowed: 1/k to k/k for k folds, 2 at least")
    if samples < folds:
        raise UserError(f"data.validation: {fold}: {config.name} has {samples} {whose}, fewer than folds")
    size = dataset.x_train.nbytes + dataset.y_train.nbytes
    memory.check(f"data.name: {config.name}: a split into {folds} folds needs", size)
    kind = KFold if classes is None else StratifiedKFold
    parts = kind(folds, shuffle=True, random_state=config.seed).split(np.arange(len(dataset.x_train)), classes)
    return next(itertools.islice(parts, number - 1, None))


def _check_split(config: DataConfig, dataset: Dataset, split: str, fraction: float) -> None:
    key = TAKEN[split]
    if not 0 < fraction < 1:
        raise UserError(f"data.{key}: {fraction}; it has to lie between 0 and 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"data.seed: {config.seed}; allowed: 0 to 2³² − 1")
    samples, needed, classes = len(dataset.x_train), 1, _classes(dataset)
    if dataset.classes is not None and classes is not None:
        labels, counts = np.unique(classes, return_counts=True)
        needed = len(labels)
        if counts.min() == 1:
            alone = f"class {dataset.classes[labels[counts.argmin()]]!r} has one"
            which = "sample" if split == "test" else "training sample"
            raise UserError(f"data.name: {config.name}: {alone} {which}, so it can't be in both sets")
    taken = math.ceil(fraction * samples)
    if min(taken, samples - taken) < needed:
        each, what = "" if dataset.classes is None else ", one of each class", "test" if split == "test" else "validate"
        sizes = f"{samples - taken} of {samples} samples to train with and {taken} to {what}"
        raise UserError(f"data.{key}: {fraction} leaves {sizes}; each needs {needed}{each}")
