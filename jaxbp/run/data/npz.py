"""Arrays of an .npz file that need not be read: what is not compressed is mapped, and only what is used is loaded."""

import contextlib
import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHUNK = 2**20  # bytes read at a time for the checksum
ENCRYPTED = 1  # bit of a member's flags


class Header(NamedTuple):
    """What an .npy begins with, and how many bytes it takes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int

    @property
    def size(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(archive: zipfile.ZipFile, name: str) -> Header:
    """That of an array; KeyError where there is no such member, ValueError where it is no .npy file."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        return Header(*read(member), member.tell())


def size(path: Path, names: Iterable[str]) -> int:
    """Bytes that arrays of an .npz file take, as their headers say; 0 for a member that is no array or not there."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with contextlib.suppress(KeyError, ValueError):
                total += header(archive, name).size
    return total


def mapped(path: Path, name: str) -> np.ndarray | None:
    """An array (read-only) of which only what is used is loaded; its checksum is compared first, piece by piece.

    None where it is compressed, is no plain array or has no numbers: then it has to be read.

    Raises:
      ValueError: the header promises other bytes than the member has; zipfile.BadZipFile: the checksum is wrong.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            return None
        try:
            head = header(archive, name)
        except ValueError:
            return None
        if head.dtype.hasobject or not head.shape or not head.size:
            return None
        if head.length + head.size != info.file_size:
            raise ValueError(f"{name}: its header promises {head.size} bytes, it has {info.file_size - head.length}")
        with archive.open(info) as member:
            while member.read(CHUNK):
                pass
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # of the member's own header: 30 bytes, its name, more
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    order = "F" if head.fortran else "C"
    return np.asarray(np.memmap(path, head.dtype, "r", begin + head.length, head.shape, order))  # type: ignore[call-overload]
