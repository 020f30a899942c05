"""The [data] table: scikit-learn's bundled data sets, MNIST, Fashion-MNIST and any .npz, their split and scaling."""

import dataclasses
import difflib
import hashlib
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, with_config

from jaxbp.run import idx, npz, paths, room
from jaxbp.run.errors import UserError
from jaxbp.run.idx import import_files

__all__ = ["DataConfig", "DataRow", "Dataset", "Scaling", "describe", "digest", "import_files", "load"]

TEST_FRACTION = 0.2
MAX_CLASSES = 2**16  # a larger label is an identifier, not a class
CHUNK = 2**22  # numbers converted to float64 at a time (32 MiB)
BUNDLED: dict[str, tuple[int, int, int | None]] = {  # samples, inputs, classes (None: regression)
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
    "breast_cancer": (569, 30, 2),
    "diabetes": (442, 10, None),
}


STRICT = ConfigDict(extra="forbid")  # an unknown key in a table is an error


@with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, which part of them is the test set, and how they are scaled."""

    name: str = "digits"
    """digits, iris, wine, breast_cancer, diabetes, mnist, fashion_mnist, or the path of an .npz with x and y."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Part of the samples kept for the test; None: the data set's own test set, or 0.2 where it has none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the split into training and test set."""
    standardize: Literal["feature", "global", "none"] = "feature"
    """Inputs to mean 0 and standard deviation 1: each column, all by one mean and deviation, or not at all."""
    standardize_targets: bool = False
    """Regression: targets to mean 0 and standard deviation 1, each column."""


class Dataset(NamedTuple):
    """Inputs as they were read, (N, D); y is (N,) int32 labels with `classes`, or (N, C) float64 targets without."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...] | None
    image_shape: tuple[int, int] | None


class Scaling(NamedTuple):
    """x ↦ (x − mean) / scale by columns; both are (D,) float64. Fit it on the training set only."""

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, values: np.ndarray, how: Literal["feature", "global", "none"] = "feature") -> "Scaling":
        """Mean and standard deviation (ddof 0) of (N, D) values; a column that is constant keeps scale 1.

        Raises a UserError when a column is too large for its variance to be a float64.
        """
        if how == "none":
            return cls(np.zeros(values.shape[1]), np.ones(values.shape[1]))
        axis = 0 if how == "feature" else None
        with np.errstate(over="ignore", invalid="ignore"):
            mean = values.mean(axis, dtype=np.float64)
            variances = np.sum([np.square(part - mean).sum(axis=0) for part in _chunks(values)], axis=0) / len(values)
            scale = np.sqrt(variances if how == "feature" else variances.mean())
        if not np.isfinite(mean + scale).all():
            raise UserError(f"can't standardise: the variance of values up to {np.abs(values).max():.3g} overflows")
        # The mean of N equal numbers is rounded: they would be divided by that error, or be as large as it is.
        low, constant = values.min(axis), values.max(axis) == values.min(axis)
        mean, scale = np.where(constant, low, mean), np.where(constant | (scale == 0), 1.0, scale)
        return cls(*(np.broadcast_to(array, values.shape[1:]).copy() for array in (mean, scale)))

    def apply(self, values: np.ndarray, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
        """(values − mean) / scale of (N, D) values, computed in float64 and returned as `dtype`."""
        scaled = [((part - self.mean) / self.scale).astype(dtype) for part in _chunks(values)]
        return np.concatenate(scaled)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """scaled · scale + mean: predictions (N, C) in the units of the targets."""
        return np.asarray(scaled) * self.scale + self.mean


class DataRow(NamedTuple):
    """A line of `jaxbp data list`."""

    name: str
    kind: Literal["classification", "regression"]
    samples: int
    inputs: int
    classes: int | None
    where: str


class _Targets(NamedTuple):
    """(N,) int32 labels with classes, or (N, C) float64 targets without."""

    y: np.ndarray
    classes: tuple[str, ...] | None


class _Raw(NamedTuple):
    """What a file holds; the test arrays are None where there is no test set of its own."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray | None
    y_test: np.ndarray | None
    classes: tuple[str, ...] | None
    image_shape: tuple[int, int] | None


def load(config: DataConfig, in_place: bool = False) -> Dataset:
    """Reads and splits the data that `config` names, downloading MNIST or Fashion-MNIST if they are not there yet.

    Inputs and targets come back unscaled. With `in_place` the arrays of an .npz that is not compressed stay on disk and
    are loaded where they are used; a split copies them. Raises a UserError for whatever the user can mend.

    >>> load(DataConfig("iris", test_fraction=0.3)).x_test.shape
    (45, 4)
    """
    raw = _read(config.name, in_place)
    if config.standardize_targets and raw.classes is not None:
        raise UserError(f"data.standardize_targets: true, but {config.name} has classes; it is for regression only")
    if raw.x_test is None or raw.y_test is None:
        return _split(config, raw)
    if config.test_fraction is not None:
        raise UserError(
            f"data.test_fraction: {config.test_fraction}, but {config.name} has its own test set; leave out"
        )
    return Dataset(config.name, raw.x, raw.y, raw.x_test, raw.y_test, raw.classes, raw.image_shape)


def digest(dataset: Dataset) -> str:
    """SHA-256 of the four arrays, with their types and shapes: 0.06 s for MNIST."""
    found = hashlib.sha256()
    for array in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        found.update(f"{array.dtype.str} {array.shape} ".encode())
        for part in _chunks(array):
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
    return rows


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    """Views of a few rows each: MNIST is 47 MB of bytes, and 376 MB as float64; a mapped array may not fit at all."""
    return np.array_split(values, max(1, math.ceil(values.size / CHUNK)))


def _nearest(given: str, names: Iterable[str]) -> str:
    return "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(given, list(names), 1))


def _read(name: str, in_place: bool) -> _Raw:
    if name in BUNDLED:
        return _read_bundled(name)
    if name in idx.SOURCES:
        return _read_images(name)
    if name.endswith(".npz"):
        return _read_npz(paths.below("data.name", name), in_place)
    names = (*BUNDLED, *idx.SOURCES)
    allowed = f"allowed: {', '.join(names)}, or a path that ends in .npz"
    raise UserError(f"data.name: {name!r} is not a data set; {allowed}{_nearest(name, names)}")


def _read_bundled(name: str) -> _Raw:
    from sklearn import datasets

    if name == "diabetes":
        data = datasets.load_diabetes(scaled=False)
        return _Raw(data.data, data.target[:, None], None, None, None, None)
    data = getattr(datasets, f"load_{name}")()
    classes = tuple(str(label) for label in data.target_names)
    return _Raw(data.data, data.target.astype(np.int32), None, None, classes, (8, 8) if name == "digits" else None)


def _read_images(name: str) -> _Raw:
    x, y, x_test, y_test = idx.read_source(name)
    height, width = x.shape[1:]
    labels, test_labels = y.astype(np.int32), y_test.astype(np.int32)
    classes = idx.SOURCES[name].classes
    return _Raw(_flat(x), labels, _flat(x_test), test_labels, classes, (height, width))


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


# --- split ------------------------------------------------------------------------------------------------------------


def _split(config: DataConfig, raw: _Raw) -> Dataset:
    """A seeded split; every class has its share in both parts."""
    from sklearn.model_selection import train_test_split

    fraction = TEST_FRACTION if config.test_fraction is None else config.test_fraction
    _check_split(config, raw, fraction)
    room.check(f"data.name: {config.name}: a split into training and test set needs", raw.x.nbytes + raw.y.nbytes)
    x_train, x_test, y_train, y_test = train_test_split(
        raw.x, raw.y, test_size=fraction, random_state=config.seed, stratify=None if raw.classes is None else raw.y
    )
    return Dataset(config.name, x_train, y_train, x_test, y_test, raw.classes, raw.image_shape)


def _check_split(config: DataConfig, raw: _Raw, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"data.test_fraction: {fraction}; it has to lie between 0 and 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"data.seed: {config.seed}; allowed: 0 to 2³² − 1")
    needed = 1 if raw.classes is None else _count_classes(config.name, raw.y, raw.classes)
    samples = len(raw.x)
    test = math.ceil(fraction * samples)
    if min(test, samples - test) < needed:
        each = "" if raw.classes is None else ", one of each class"
        sizes = f"{samples - test} of {samples} samples to train with and {test} to test"
        raise UserError(f"data.test_fraction: {fraction} leaves {sizes}; each needs {needed}{each}")


def _count_classes(name: str, y: np.ndarray, classes: tuple[str, ...]) -> int:
    """How many classes have samples; a UserError for one that has a single sample."""
    labels, counts = np.unique(y, return_counts=True)
    if counts.min() == 1:
        alone = classes[labels[counts.argmin()]]
        raise UserError(f"data.name: {name}: class {alone!r} has one sample, so it can't be in both sets")
    return len(labels)


# --- .npz -------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path, in_place: bool) -> _Raw:
    """x (N, D) or (N, H, W) and y (N,) integers or (N,), (N, C) floats; x_test and y_test likewise, or neither."""
    arrays = _arrays(path, in_place)
    x, train, image_shape = _part(path, arrays, "x", "y")
    if "x_test" not in arrays:
        return _Raw(x, train.y, None, None, train.classes, image_shape)
    x_test, test, _ = _part(path, arrays, "x_test", "y_test")
    if arrays["x"].shape[1:] != arrays["x_test"].shape[1:]:
        shapes = f"{arrays['x_test'].shape[1:]}, and in x {arrays['x'].shape[1:]}"
        raise UserError(f"{path}: x_test: a sample has the shape {shapes}")
    _check_test_targets(path, train, test)
    return _Raw(x, train.y, x_test, test.y, train.classes, image_shape)


def _part(
    path: Path, arrays: dict[str, np.ndarray], x_name: str, y_name: str
) -> tuple[np.ndarray, _Targets, tuple[int, int] | None]:
    """The inputs, targets and image shape of the training or the test set."""
    x, image_shape = _inputs(f"{path}: {x_name}", arrays[x_name])
    targets = _targets(f"{path}: {y_name}", arrays[y_name])
    if len(x) != len(targets.y):
        raise UserError(f"{path}: {x_name} has {len(x)} rows and {y_name} has {len(targets.y)}; they have to agree")
    return x, targets, image_shape


def _arrays(path: Path, in_place: bool) -> dict[str, np.ndarray]:
    """The arrays named x, y, x_test and y_test; nothing is unpickled."""
    if not path.is_file():
        near = _nearest(path.name, (file.name for file in path.parent.glob("*.npz")))
        raise UserError(f"data.name: {path}: no such file{near}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz file (numpy.savez writes one), or cut short")
    try:
        # Opened here because numpy leaves a file open whose archive turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = _wanted(path, archive.files)
            found = {name: npz.mapped(path, name) if in_place else None for name in wanted}
            read = [name for name, array in found.items() if array is None]
            room.check(f"{path}: its arrays need", room.of_npz(path, read))
            arrays = {name: archive[name] if array is None else array for name, array in found.items()}
    except (*idx.BROKEN, MemoryError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is no .npy file
            raise UserError(f"{path}: {name} is no array; allowed: integers or floats")
    return arrays


def _wanted(path: Path, there: list[str]) -> list[str]:
    """The names to read: x and y, and both test arrays or neither; all others are left alone."""
    needed = ["x", "y"] + ["x_test", "y_test"] * ("x_test" in there or "y_test" in there)
    for name in needed:
        if name not in there:
            raise UserError(
                f"{path}: no array {name!r}; there are: {', '.join(there) or 'none'}{_nearest(name, there)}"
            )
    return needed


def _inputs(where: str, x: np.ndarray) -> tuple[np.ndarray, tuple[int, int] | None]:
    """(N, D) inputs, and (H, W) if they came as images (N, H, W)."""
    _check_numbers(where, x)
    if x.ndim not in (2, 3):
        raise UserError(f"{where} has shape {x.shape}; allowed: (N, D), or (N, H, W) for images")
    return _flat(x), (x.shape[1], x.shape[2]) if x.ndim == 3 else None


def _targets(where: str, y: np.ndarray) -> _Targets:
    """Integers are labels of the classes 0 … max; floats are the targets of a regression."""
    _check_numbers(where, y)
    if y.dtype.kind == "f":
        if y.ndim not in (1, 2):
            raise UserError(f"{where} has shape {y.shape}; allowed: (N,) or (N, C) for regression")
        return _Targets(_flat(y).astype(np.float64), None)
    if y.ndim != 1:
        raise UserError(f"{where} is {y.dtype} of shape {y.shape}; labels are (N,), and targets of a regression floats")
    wrong = np.flatnonzero((y < 0) | (y >= MAX_CLASSES))
    if wrong.size:
        raise UserError(f"{where}: row {wrong[0]} is the label {y[wrong[0]]}; allowed: 0 to {MAX_CLASSES - 1}")
    return _Targets(y.astype(np.int32), tuple(str(label) for label in range(int(y.max()) + 1)))


def _check_numbers(where: str, array: np.ndarray) -> None:
    """Raises unless these are finite real numbers, at least one."""
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} is {array.dtype}; allowed: integers or floats")
    if array.size == 0 or array.ndim == 0:
        raise UserError(f"{where} is {'empty' if array.size == 0 else 'a single number'}: its shape is {array.shape}")
    rows = np.flatnonzero(~np.concatenate([np.isfinite(part).all(axis=1) for part in _chunks(_flat(array))]))
    if rows.size:
        raise UserError(f"{where}: row {rows[0]} is not finite (NaN or infinite), and {rows.size} rows in all")


def _check_test_targets(path: Path, train: _Targets, test: _Targets) -> None:
    """Raises unless the test set asks for what the training set teaches."""
    if (train.classes is None) != (test.classes is None):
        raise UserError(f"{path}: one of y and y_test has labels (integers), the other one targets (floats)")
    if train.y.shape[1:] != test.y.shape[1:]:
        raise UserError(f"{path}: y_test has {test.y.shape[1]} columns, y has {train.y.shape[1]}")
    beyond = np.flatnonzero(test.y > train.y.max()) if train.classes else np.zeros(0, int)
    if beyond.size:
        label = test.y[beyond[0]]
        raise UserError(f"{path}: y_test: row {beyond[0]} is the label {label}; the largest in y is {train.y.max()}")
