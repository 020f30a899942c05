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
from jaxbp.run.data.archive import Raw, flat
from jaxbp.run.data.scaling import chunks
from jaxbp.run.data.tables import Columns
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory

TEST_FRACTION = 0.2
OF_TABLES = ("target", "drop", "missing", "decimal")  # keys of [data]
BUNDLED: dict[str, tuple[int, int, int | None]] = {  # samples, inputs, classes (None: regression)
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
    "breast_cancer": (569, 30, 2),
    "diabetes": (442, 10, None),
}


class Dataset(NamedTuple):
    """Inputs as they were read, (N, D); y is (N,) int32 labels with `classes`, or (N, C) float64 targets without.

    Of sequences y may be (N, T) labels, one for each position. Of a text x are the T characters as numbers (int32), and
    y those that come next.
    image_shape: what the D numbers of a sample were, if not a row;  columns: of which table's they are made.
    x_validation, y_validation: None without a validation set.
    weights: (N,), what each training sample counts in the mean of its batch; None where all count alike.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...] | None
    image_shape: tuple[int, ...] | None
    x_validation: np.ndarray | None = None
    y_validation: np.ndarray | None = None
    weights: np.ndarray | None = None
    columns: Columns | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The sets that there are."""
        return ("train", "test") if self.x_validation is None else ("train", "validation", "test")


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
        return Dataset(config.name, **text.read(config)._asdict(), image_shape=None)
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


def _divided(config: DataConfig, raw: Raw) -> Dataset:
    """Into training, validation and test set, unless the data have their own."""
    if config.standardize_targets and raw.classes is not None:
        raise UserError(f"data.standardize_targets: true, but {config.name} has classes; it is for regression only")
    columns, raw = raw.columns, _with_validation(config, _with_test(config, raw))
    assert raw.x_test is not None and raw.y_test is not None
    sets = (raw.x, raw.y, raw.x_test, raw.y_test)
    others = (raw.x_val, raw.y_val, raw.weights, columns)
    return _filled(config, Dataset(config.name, *sets, raw.classes, raw.image_shape, *others))


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


def _filled(config: DataConfig, dataset: Dataset) -> Dataset:
    """What is missing in the inputs of a table becomes a mean of the training set."""
    if dataset.columns is None or config.missing is None:
        return dataset
    columns, means = tables.fitted(dataset.columns, dataset.x_train)
    sets = {f"x_{split}": getattr(dataset, f"x_{split}") for split in dataset.splits}
    filled: dict[str, Any] = {name: np.where(np.isnan(x), means, x) for name, x in sets.items()}
    return dataset._replace(columns=columns, **filled)


def _read(config: DataConfig, in_place: bool, most_labels: int) -> Raw:
    name = config.name
    if name in BUNDLED:
        return _read_bundled(name)
    if name in idx.SOURCES:
        return _read_images(name)
    if name.endswith(".npz"):
        return archive.read(paths.named("data.name", name), in_place, most_labels)
    if tables.is_table(name):
        x, columns, (y, classes) = tables.load(paths.named("data.name", name), config, most_labels)
        return Raw(x, y, None, None, classes, None, columns=columns)
    if openml.is_openml(name):
        x, columns, (y, classes) = openml.load(config, most_labels)
        return Raw(x, y, None, None, classes, None, columns=columns)
    if (path := paths.named("data.name", name)).is_dir():
        return folders.read(path, in_place, most_labels)
    names = (*BUNDLED, *idx.SOURCES, text.NAME)
    allowed = f"Allowed: {', '.join(names)}, {openml.PREFIX}NAME, a folder of images or of x.npy and y.npy, "
    allowed += f"or a path that ends in .npz, .txt, {', '.join(tables.SUFFIXES)}"
    raise UserError(f"data.name: {name!r} is not a data set{nearest(name, names) or '.'} {allowed}")


def _read_bundled(name: str) -> Raw:
    from sklearn import datasets

    if name == "diabetes":
        data = datasets.load_diabetes(scaled=False)
        return Raw(data.data, data.target[:, None], None, None, None, None)
    data = getattr(datasets, f"load_{name}")()
    classes = tuple(str(label) for label in data.target_names)
    return Raw(data.data, data.target.astype(np.int32), None, None, classes, (8, 8) if name == "digits" else None)


def _read_images(name: str) -> Raw:
    x, y, x_test, y_test = idx.read_source(name)
    height, width = x.shape[1:]
    labels, test_labels = y.astype(np.int32), y_test.astype(np.int32)
    classes = idx.SOURCES[name].classes
    return Raw(flat(x), labels, flat(x_test), test_labels, classes, (height, width))


# --- split ------------------------------------------------------------------------------------------------------------


def _with_test(config: DataConfig, raw: Raw) -> Raw:
    """With a part of the samples as the test set, where it has none of its own."""
    if raw.x_test is None:
        fraction = TEST_FRACTION if config.test_fraction is None else config.test_fraction
        left, x, y = _split(config, raw, "test_fraction", fraction)
        return left._replace(x_test=x, y_test=y)
    if config.test_fraction is not None:
        raise UserError(
            f"data.test_fraction: {config.test_fraction}, but {config.name} has its own test set; leave out"
        )
    return raw


def _with_validation(config: DataConfig, raw: Raw) -> Raw:
    """With a part of the training samples as the validation set, if one is asked for."""
    if config.validation is None:
        return raw
    if raw.x_val is not None:
        raise UserError(
            f"data.validation: {config.validation}, but {config.name} has its own validation set; leave out"
        )
    if isinstance(config.validation, str):
        left, x, y = _fold(config, raw, config.validation)
    else:
        left, x, y = _split(config, raw, "validation", config.validation)
    return left._replace(x_val=x, y_val=y)


def _split(config: DataConfig, raw: Raw, key: str, fraction: float) -> tuple[Raw, np.ndarray, np.ndarray]:
    """What is left of the samples, then x and y of a seeded part of them; every class has its share in both."""
    from sklearn.model_selection import train_test_split

    _check_split(config, raw, key, fraction)
    what = "training and test set" if key == "test_fraction" else "training and validation set"
    memory.check(f"data.name: {config.name}: a split into {what} needs", raw.x.nbytes + raw.y.nbytes)
    classes = None if raw.classes is None or raw.y.ndim > 1 else raw.y
    rows, taken = train_test_split(
        np.arange(len(raw.x)), test_size=fraction, random_state=config.seed, stratify=classes
    )
    return _parted(raw, rows, taken)


def _fold(config: DataConfig, raw: Raw, fold: str) -> tuple[Raw, np.ndarray, np.ndarray]:
    """What is left of the samples, then x and y of a seeded fold of them; every class has its share in each fold."""
    from sklearn.model_selection import KFold, StratifiedKFold

    number, folds = map(int, fold.split("/"))
    classes = None if raw.classes is None or raw.y.ndim > 1 else raw.y
    samples, whose = len(raw.x), "training samples"
    if raw.classes is not None and classes is not None:
        labels, counts = np.unique(classes, return_counts=True)
        samples, whose = counts.min(), f"training samples of class {raw.classes[labels[counts.argmin()]]!r}"
    if not number <= folds or folds < 2:
        raise UserError(f"data.validation: {fold}; allowed: 1/k to k/k for k folds, 2 at least")
    if samples < folds:
        raise UserError(f"data.validation: {fold}: {config.name} has {samples} {whose}, fewer than folds")
    memory.check(f"data.name: {config.name}: a split into {folds} folds needs", raw.x.nbytes + raw.y.nbytes)
    kind = KFold if classes is None else StratifiedKFold
    parts = kind(folds, shuffle=True, random_state=config.seed).split(np.arange(len(raw.x)), classes)
    return _parted(raw, *next(itertools.islice(parts, number - 1, None)))


def _parted(raw: Raw, rows: np.ndarray, taken: np.ndarray) -> tuple[Raw, np.ndarray, np.ndarray]:
    """The samples in these rows, then x and y of those that are taken out."""
    weights = None if raw.weights is None else raw.weights[rows]
    return raw._replace(x=raw.x[rows], y=raw.y[rows], weights=weights), raw.x[taken], raw.y[taken]


def _check_split(config: DataConfig, raw: Raw, key: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"data.{key}: {fraction}; it has to lie between 0 and 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"data.seed: {config.seed}; allowed: 0 to 2³² − 1")
    samples, needed = len(raw.x), 1
    if raw.classes is not None and raw.y.ndim == 1:
        needed = _count_classes(config.name, raw.y, raw.classes, "" if key == "test_fraction" else "training ")
    taken = math.ceil(fraction * samples)
    if min(taken, samples - taken) < needed:
        each = "" if raw.classes is None else ", one of each class"
        sizes = f"{samples - taken} of {samples} samples to train with and {taken} to "
        sizes += "test" if key == "test_fraction" else "validate"
        raise UserError(f"data.{key}: {fraction} leaves {sizes}; each needs {needed}{each}")


def _count_classes(name: str, y: np.ndarray, classes: tuple[str, ...], which: str) -> int:
    """How many classes have samples; a UserError for one that has a single sample."""
    labels, counts = np.unique(y, return_counts=True)
    if counts.min() == 1:
        alone = classes[labels[counts.argmin()]]
        raise UserError(f"data.name: {name}: class {alone!r} has one {which}sample, so it can't be in both sets")
    return len(labels)
