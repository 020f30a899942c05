"""A folder of the user's: arrays as x.npy and y.npy, or images in a folder a class.

The files are named as the arrays of an .npz: x.npy and y.npy, perhaps x_test.npy and y_test.npy and so on.

Images are in any format of Pillow, all of one size, and all grayscale or all RGB; a palette is RGB. The names of their
folders are the labels. Where there are folders train and, perhaps, test and val, each with a folder a class, these are
the sets. Hidden files and what lies beside the folders are left alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxbp.run.data import archive
from jaxbp.run.data.archive import Arrays, Dataset
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory

SETS = {"train": ("x", "y"), "test": ("x_test", "y_test"), "val": ("x_val", "y_val")}
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
"""What the kinds of images of Pillow become."""


def read(path: Path, in_place: bool = False, most_labels: int = 0) -> Dataset:
    """As `archive.read`; with `in_place` arrays stay on disk.

    Raises:
      UserError: neither arrays nor images; an array that is missing or damaged; an image that can't be read or is of
        another size or kind than the first one.
    """
    is_arrays = (path / "x.npy").is_file() or (path / "y.npy").is_file()
    return archive.raw(path, _arrays(path, in_place) if is_arrays else _images(path), most_labels)


def _arrays(path: Path, in_place: bool) -> Arrays:
    there = [file.stem for file in path.glob("*.npy")]
    names = archive.wanted(path, ("x", "y"), archive.OPTIONAL, there)
    return {name: array(path / f"{name}.npy", in_place) for name in names}


def array(file: Path, in_place: bool = False) -> np.ndarray:
    """The array of an .npy, which stays on disk with `in_place`; UserError if it can't be read or is too large."""
    memory.check(f"{file}: the array needs", 0 if in_place else file.stat().st_size)
    try:
        found: np.ndarray = np.load(file, mmap_mode="r" if in_place else None, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {' '.join(str(error).split())}") from None
    return found


def images(path: Path, shape: tuple[int, ...], run: str) -> tuple[list[Path], np.ndarray]:
    """The images in a folder and in those below it, with their pixels (N, H, W) or (N, H, W, 3), for a run.

    shape: of a sample that the run was trained on; where that was no image, all have to be like the first one, or else
    there is a UserError.
    """
    below = (file for file in sorted(path.rglob("*")) if file.is_file())
    files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise UserError(f"{path}: no x.npy and no image in it")
    like = f"{run} was trained on"
    if len(shape) == 1:
        like, shape = f"{files[0]} is", _pixels(files[0]).shape
    memory.check(f"{path}: its images need", len(files) * math.prod(shape))
    return files, _stacked(files, shape[:2] if shape[2:] == (1,) else shape, like)


def _images(path: Path) -> Arrays:
    sets = {name: path / name for name in SETS if (path / name).is_dir() and _folders(path / name)}
    if "train" not in sets:
        sets = {"train": path}
    elif unknown := [folder for folder in _folders(path) if folder.name not in SETS]:
        raise UserError(f"{unknown[0]}: a folder beside train; allowed are test and val")
    listed = {name: _listed(folder) for name, folder in sets.items()}
    first = listed["train"][0][0]
    shape = _pixels(first).shape
    memory.check(f"{path}: its images need", sum(map(len, listed.values())) * math.prod(shape))
    found: Arrays = {}
    for name, files in listed.items():
        x_name, y_name = SETS[name]
        found[y_name] = np.array([label for _, label in files])
        found[x_name] = _stacked([file for file, _ in files], shape, f"{first} is")
    return found


def _stacked(files: Sequence[Path], shape: tuple[int, ...], like: str) -> np.ndarray:
    """The pixels of images of this shape, that of what `like` names."""
    found = np.empty((len(files), *shape), np.uint8)
    for row, file in zip(found, files, strict=True):
        pixels = _pixels(file)
        if pixels.shape != shape:
            raise UserError(f"{file} is {_kind(pixels.shape)}, and {like} {_kind(shape)}; all have to agree")
        row[...] = pixels
    return found


def _listed(folder: Path) -> list[tuple[Path, str]]:
    """The images of a set with their labels, folder by folder."""
    found = []
    for of_class in _folders(folder):
        files = sorted(file for file in of_class.iterdir() if not file.name.startswith("."))
        if not files:
            raise UserError(f"{of_class}: there is no image in it")
        found += [(file, of_class.name) for file in files]
    if not found:
        raise UserError(f"{folder}: no x.npy and y.npy in it, and no folders with the images of a class each")
    return found


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _pixels(file: Path) -> np.ndarray:
    """(H, W), or (H, W, 3) in colour."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode not in MODES:
                raise UserError(f"{file}: an image of the mode {image.mode}; allowed are grayscale and RGB")
            return np.asarray(image.convert(MODES[image.mode]))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: can't be read as an image: {' '.join(str(error).split())}") from None


def _kind(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} × {shape[0]} {'RGB' if shape[2:] else 'grayscale'}"
