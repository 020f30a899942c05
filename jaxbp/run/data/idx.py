"""MNIST and Fashion-MNIST: four IDX files each, downloaded or imported, checked by SHA-256 whenever they are read."""

import gzip
import hashlib
import io
import lzma
import math
import os
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from jaxbp.names import nearest
from jaxbp.run.errors import UserError
from jaxbp.run.store import files

ATTEMPTS = 3  # rounds over the mirrors
PAUSE = 1.0  # seconds before the second round, twice that before the third
TIMEOUT = 30  # seconds without a byte
# What the standard library raises for a file, a stream or an archive that is cut short, damaged or encrypted.
BROKEN = (
    *(OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error, lzma.LZMAError),
    *(zipfile.BadZipFile, tarfile.TarError),
)


class IdxFile(NamedTuple):
    """A file of unsigned bytes: its name, the shape of its array and the SHA-256 of its decompressed bytes."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes: the magic number, one 32-bit length for each dimension, the data."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


class Source(NamedTuple):
    """A data set of four files (train images and labels, test images and labels) and where it is published."""

    files: tuple[IdxFile, IdxFile, IdxFile, IdxFile]
    mirrors: tuple[str, ...]
    classes: tuple[str, ...]


class Unsound(Exception):
    """These bytes are not the file they should be; the message says why."""


def _files(*sha256: str) -> tuple[IdxFile, IdxFile, IdxFile, IdxFile]:
    train_images, train_labels, test_images, test_labels = sha256
    return (
        IdxFile("train-images-idx3-ubyte", (60_000, 28, 28), train_images),
        IdxFile("train-labels-idx1-ubyte", (60_000,), train_labels),
        IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), test_images),
        IdxFile("t10k-labels-idx1-ubyte", (10_000,), test_labels),
    )


SOURCES = {
    "mnist": Source(
        _files(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist"),
        tuple("0123456789"),
    ),
    "fashion_mnist": Source(
        _files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        # The authors' bucket by its REST address: its website address (s3-website.…) answers http only.
        ("https://fashion-mnist.s3.eu-central-1.amazonaws.com",),
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
}


def source_of(name: str) -> Source:
    """The table entry of `name`; a UserError, with the nearest name, for one that is not in the table."""
    if name in SOURCES:
        return SOURCES[name]
    near = nearest(name, SOURCES)
    raise UserError(f"{name!r} can't be downloaded or imported{near or '.'} Allowed: {', '.join(SOURCES)}, text")


def folder_of(name: str) -> Path:
    """The folder of a data set's four files: JAXBP_DATA, or else the user's cache folder, and below it the name."""
    import pooch

    return Path(os.environ.get("JAXBP_DATA") or pooch.os_cache("jaxbp")).expanduser() / name


def is_local(name: str) -> bool:
    """Whether all four files are there; `read_source` is what checks them."""
    return all((folder_of(name) / file.name).is_file() for file in source_of(name).files)


def read_source(name: str) -> list[np.ndarray]:
    """Train images (N, H, W) and labels (N,), test images and labels, uint8; downloads the files that are missing.

    Raises a UserError for a damaged file and for one that no mirror gives.
    """
    for file in (wanted := source_of(name).files):
        if not (path := folder_of(name) / file.name).exists():
            _place(path, _download(name, file))
    return [_array(name, file) for file in wanted]


def import_files(name: str, path: Path) -> Path:
    """Copies the four files of `name` from a folder or an archive into the data folder, which is returned.

    A folder is searched one level down too; an archive is a .zip, .tar, .tar.gz or .tgz. Each file may be gzipped.
    Nothing is written unless all four have their SHA-256. Raises a UserError for a missing or a wrong file.
    """
    source = source_of(name)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        sound, faults = _gather(source, path)
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}") from error
    if missing := [file.name for file in source.files if file.name not in sound]:
        absent = f"{path}: holds no {', '.join(missing)} (gzipped or not)"
        raise UserError(next((faults[file] for file in missing if file in faults), absent))
    for file_name, data in sound.items():
        _place(folder_of(name) / file_name, data)
    return folder_of(name)


def _array(name: str, file: IdxFile) -> np.ndarray:
    """IDX: a magic number, a 32-bit length for each dimension, the data. The SHA-256 vouches for all three."""
    path = folder_of(name) / file.name
    try:
        with path.open("rb") as stream:
            data = _sound(stream, file)
    except (OSError, Unsound) as error:
        raise UserError(f"{path}: {error}; delete it, or run `jaxbp data import {name} PATH`") from error
    return np.frombuffer(data, np.uint8)[-math.prod(file.shape) :].reshape(file.shape)


def _sound(stream: io.BufferedIOBase, file: IdxFile) -> bytes:
    """The decompressed bytes of `file`, read from a seekable stream; Unsound if they are not those published."""
    try:
        zipped = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        # One byte more than the file has is enough to refuse it: a gzip bomb never unfolds.
        data = (gzip.GzipFile(fileobj=stream) if zipped else stream).read(file.size + 1)
    except BROKEN as error:
        raise Unsound(f"cannot be read: {_reason(error)}") from error
    if len(data) > file.size:
        raise Unsound(f"is longer than the {file.size} bytes of {file.name}")
    if (got := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise Unsound(f"SHA-256 of the decompressed data is {got}, expected {file.sha256}")
    return data


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: what the network or the disk said, without the layers around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return " ".join(str(error).split()) or type(error).__name__


def _place(path: Path, data: bytes) -> None:
    with files.writable(f"{path}:"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, data)


# --- download ---------------------------------------------------------------------------------------------------------


class _Body(io.BytesIO):
    """The body of an answer, in memory: nothing unchecked reaches the disk."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def write(self, chunk: Any, /) -> int:  # anything like bytes, which has no name before Python 3.12
        if self.tell() + len(chunk) > self.limit:
            raise OSError(f"the answer is longer than {self.limit} bytes")
        return super().write(chunk)


def _download(name: str, file: IdxFile) -> bytes:
    """The bytes of `file` from the first mirror that gives them; each is asked ATTEMPTS times."""
    reasons = {}
    for attempt in range(ATTEMPTS):
        time.sleep(attempt * PAUSE)
        if attempt:
            print(f"that failed; attempt {attempt + 1} of {ATTEMPTS}", file=sys.stderr)
        for url in _urls(name, file):
            if not attempt:
                print(f"downloading {url} to {folder_of(name)}", file=sys.stderr)
            try:
                return _get(url, file)
            except Unsound as error:
                reasons[url] = str(error)
    failed = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    raise UserError(f"cannot download {name}: {failed}; with files at hand: `jaxbp data import {name} PATH`")


def _urls(name: str, file: IdxFile) -> list[str]:
    """JAXBP_MIRROR/name/… if it is set, because both data sets have the same file names, or else the public mirrors."""
    base = os.environ.get("JAXBP_MIRROR")
    if base and not base.startswith(("https://", "http://")):
        raise UserError(f"JAXBP_MIRROR: {base!r} is not an address; it has to start with https:// or http://")
    mirrors = (f"{base.rstrip('/')}/{name}",) if base else SOURCES[name].mirrors
    return [f"{mirror}/{file.name}.gz" for mirror in mirrors]


def _get(url: str, file: IdxFile) -> bytes:
    # Pooch compares a hash with the bytes as they were sent; ours is of the decompressed ones, so _sound compares it.
    import pooch

    body = _Body(limit=file.size + 2**16)  # gzip adds 5 bytes to a block of 16 KiB that it can't shorten
    try:
        pooch.HTTPDownloader(timeout=TIMEOUT)(url, body, None)
    except OSError as error:  # every exception of requests is one
        raise Unsound(_reason(error).split(" for url: ")[0]) from error
    body.seek(0)
    return _sound(body, file)


# --- import -----------------------------------------------------------------------------------------------------------


def _gather(source: Source, path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """By file name: the bytes of the sound files found, and what is wrong with the first of each of the others."""
    wanted = {file.name: file for file in source.files}
    sound: dict[str, bytes] = {}
    faults: dict[str, str] = {}
    for member, opened in _members(path):
        if PureWindowsPath(member).anchor or ".." in PureWindowsPath(member).parts:  # / and \\ alike
            raise UserError(f"{path}: refused: it holds {member!r}, a path that leads out of the archive")
        file = wanted.get(_file_name(member))
        if file is None or file.name in sound:
            continue
        try:
            with closing(opened()) as stream:
                sound[file.name] = _sound(stream, file)
        except Unsound as error:
            faults.setdefault(file.name, f"{path}: {member}: {error}")
    return sound, faults


def _file_name(member: str) -> str:
    """a/train-images.idx3-ubyte.gz ↦ train-images-idx3-ubyte."""
    return PurePosixPath(member.replace("\\", "/")).name.removesuffix(".gz").replace(".idx", "-idx")


def _members(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The files in a folder or an archive: the name of each, and what opens it."""
    if path.is_dir():
        for file in sorted([*path.glob("*"), *path.glob("*/*")]):
            if file.is_file():
                yield str(file.relative_to(path)), partial(file.open, "rb")
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isreg():  # no link: it could name any file
                    yield member.name, partial(tar.extractfile, member)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith("/"):  # a folder
                    yield info.filename, partial(archive.open, info)
    else:
        raise UserError(f"{path}: not a folder, a .zip, a .tar or a .tar.gz")
