"""What a data set is; and an .npz of the user's: x and y, perhaps x_test and y_test, x_val and y_val, weights."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbp.names import nearest
from jaxbp.run.data import labels, npz
from jaxbp.run.data.idx import BROKEN
from jaxbp.run.data.labels import MAX_CLASSES, Targets
from jaxbp.run.data.scaling import chunks
from jaxbp.run.data.tables import Columns
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory

Arrays = dict[str, np.ndarray]
OPTIONAL = (("x_test", "y_test"), ("x_val", "y_val"), ("weights",))


class Dataset(NamedTuple):
    """Inputs as they were read, (N, D); y is (N,) int32 labels with `classes`, or (N, C) float64 targets without.

    Of sequences y may be (N, T) labels, one for each position. Of a text x are the T characters as numbers (int32), and
    y those that come next.
    x_test, y_test: None before the samples are divided;  x_validation, y_validation: None without a validation set.
    image_shape: what the D numbers of a sample were, if not a row;  columns: of which table's they are made.
    weights: (N,), what each training sample counts in the mean of its batch; None where all count alike.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    image_shape: tuple[int, ...] | None = None
    x_validation: np.ndarray | None = None
    y_validation: np.ndarray | None = None
    weights: np.ndarray | None = None
    columns: Columns | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The sets that there are."""
        return ("train", "test") if self.x_validation is None else ("train", "validation", "test")


def read(path: Path, in_place: bool, most_labels: int = 0) -> Dataset:
    """x (N, D) or images and y (N,), (N, T) labels or (N,), (N, C) floats, not yet divided.

    x_test and y_test, x_val and y_val likewise: both of a set or neither. weights (N,) or none.
    most_labels: floats that are whole numbers are labels, too, where at most so many different ones are there.
    """
    return raw(path, arrays(path, ("x", "y"), OPTIONAL, in_place, "data.name: "), most_labels)


def raw(path: Path, found: Arrays, most_labels: int) -> Dataset:
    """The arrays x and y, and of other sets, looked at; `path` begins what is said of them."""
    x, train, image_shape = _part(path, found, "x", "y", most_labels)
    made = Dataset(str(path), x, train.y, classes=train.classes, image_shape=image_shape)
    if "weights" in found:
        made = made._replace(weights=_weights(f"{path}: weights", found["weights"], len(x)))
    for x_name, y_name, split in (("x_test", "y_test", "test"), ("x_val", "y_val", "validation")):
        if x_name not in found:
            continue
        other_x, other, _ = _part(path, found, x_name, y_name, MAX_CLASSES if train.classes else 0)
        if (other_shape := found[x_name].shape[1:]) != (shape := found["x"].shape[1:]):
            raise UserError(f"{path}: {x_name}: a sample has the shape {other_shape}, and in x {shape}")
        sets: dict[str, Any] = {f"x_{split}": other_x, f"y_{split}": _as_taught(path, train, other, y_name).y}
        made = made._replace(**sets)
    return made


def _part(
    path: Path, arrays: Arrays, x_name: str, y_name: str, most_labels: int
) -> tuple[np.ndarray, Targets, tuple[int, ...] | None]:
    """The inputs (N, D) and targets of a set; (H, W) or (H, W, C) of inputs that came as images."""
    x = arrays[x_name]
    _check_numbers(f"{path}: {x_name}", x)
    if x.ndim not in (2, 3, 4):
        allowed = "(N, D), or (N, H, W) and (N, H, W, C) for images"
        raise UserError(f"{path}: {x_name} has shape {x.shape}; allowed: {allowed}")
    targets = _targets(f"{path}: {y_name}", arrays[y_name], most_labels)
    if len(x) != len(targets.y):
        raise UserError(f"{path}: {x_name} has {len(x)} rows and {y_name} has {len(targets.y)}; they have to agree")
    return flat(x), targets, x.shape[1:] if x.ndim > 2 else None


def arrays(
    path: Path, needed: Sequence[str], optional: Sequence[Sequence[str]] = (), in_place: bool = False, key: str = ""
) -> Arrays:
    """The arrays of these names; of each optional group all or none. Nothing is unpickled. `key` begins an error.

    Raises:
      UserError: no such file, no .npz file, one of the names is missing, more than memory holds.
    """
    if not path.is_file():
        near = nearest(path.stem, (file.stem for file in path.parent.glob("*.npz")), "{}.npz")
        raise UserError(f"{key}{path}: no such file{near}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz file (numpy.savez writes one), or cut short")
    try:
        # Opened here because numpy leaves a file open whose archive turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = wanted(path, needed, optional, archive.files)
            found = {name: npz.mapped(path, name) if in_place else None for name in names}
            read = [name for name, array in found.items() if array is None]
            memory.check(f"{path}: its arrays need", npz.size(path, read))
            arrays = {name: archive[name] if array is None else array for name, array in found.items()}
    except (*BROKEN, MemoryError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is no .npy file
            raise UserError(f"{path}: {name} is no array; allowed: integers or floats")
    return arrays


def wanted(path: Path, needed: Sequence[str], optional: Sequence[Sequence[str]], there: Sequence[str]) -> Sequence[str]:
    """The names of the arrays that are read, of those that are there; UserError for one that is not."""
    groups = [group for group in optional if any(name in there for name in group)]
    names = [*needed, *(name for group in groups for name in group)]
    for name in names:
        if name not in there:
            listed = ", ".join(there) or "none"
            raise UserError(f"{path}: no array {name!r}{nearest(name, there) or '.'} There are: {listed}")
    return names


def _targets(where: str, y: np.ndarray, most_labels: int) -> Targets:
    """Text, booleans and integers are labels, and of sequences those from 0 on; floats are targets of a regression."""
    if y.dtype == object and all(isinstance(label, str) for label in y.flat):  # as data frames have text
        y = y.astype(str)
    if y.dtype.kind not in "US":
        _check_numbers(where, y, "labels or floats")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind == "f" and not (y.ndim == 1 and labels.are_labels(y, most_labels)):
        if y.ndim not in (1, 2):
            raise UserError(f"{where} has shape {y.shape}; allowed: (N,) or (N, C) for regression")
        return Targets(flat(y).astype(np.float64), None)
    if y.ndim == 1 and y.size:
        return labels.numbered(where, y)
    if y.ndim != 2 or y.dtype.kind not in "biu":
        allowed = "labels are (N,), or (N, T) integers of sequences, and targets of a regression floats"
        raise UserError(f"{where} is {y.dtype} of shape {y.shape}; {allowed}")
    wrong = np.argwhere((y < 0) | (y >= MAX_CLASSES))
    if wrong.size:
        label = y[tuple(wrong[0])]
        raise UserError(f"{where}: row {wrong[0][0]} is the label {label}; allowed: 0 to {MAX_CLASSES - 1}")
    return Targets(y.astype(np.int32), tuple(str(label) for label in range(int(y.max()) + 1)))


def _weights(where: str, weights: np.ndarray, samples: int) -> np.ndarray:
    _check_numbers(where, weights)
    if weights.shape != (samples,):
        raise UserError(f"{where} has shape {weights.shape}; allowed: ({samples},), a number for each row of x")
    if not (weights > 0).all():
        row = int(np.argmin(weights > 0))
        raise UserError(f"{where}: row {row} is {weights[row]:.4g}; allowed: numbers above 0")
    return weights.astype(np.float64)


def _check_numbers(where: str, array: np.ndarray, allowed: str = "integers or floats") -> None:
    """Raises unless these are finite real numbers, at least one."""
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} is {array.dtype}; allowed: {allowed}")
    if array.size == 0 or array.ndim == 0:
        raise UserError(f"{where} is {'empty' if array.size == 0 else 'a single number'}: its shape is {array.shape}")
    rows = np.flatnonzero(~np.concatenate([np.isfinite(part).all(axis=1) for part in chunks(flat(array))]))
    if rows.size:
        raise UserError(f"{where}: row {rows[0]} is not finite (NaN or infinite), and {rows.size} rows in all")


def _as_taught(path: Path, train: Targets, other: Targets, name: str) -> Targets:
    """The targets of another set by the classes of the training set; raises unless it asks for what that teaches."""
    if (train.classes is None) != (other.classes is None):
        raise UserError(f"{path}: one of y and {name} has labels (integers), the other one targets (floats)")
    if train.y.shape[1:] != other.y.shape[1:]:
        shapes = f"{other.y.shape[1:]}, and in y {train.y.shape[1:]}"
        raise UserError(f"{path}: {name}: a target has the shape {shapes}")
    if train.classes and train.y.ndim == 1:
        return labels.like(f"{path}: {name}", train, other)
    beyond = np.argwhere(other.y > train.y.max()) if train.classes else np.zeros((0, 1), int)
    if beyond.size:
        label = other.y[tuple(beyond[0])]
        raise UserError(f"{path}: {name}: row {beyond[0][0]} is the label {label}; the largest in y is {train.y.max()}")
    return other


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)
