"""A file that is replaced as a whole, and the one line for a place that can't be written."""

import contextlib
import csv
import io
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxbp.run.errors import UserError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the path of a hidden file beside `path`, to be written; moved there, on disk, if the block ends well.

    A process that is killed, or a disk that fills up, leaves `path` as it was.
    """
    part = path.with_name(f".{secrets.token_hex(4)}.part-{path.name[-100:]}")  # a name has 255 bytes at most
    try:
        yield part
        synced(part)
        os.replace(part, path)
        synced(path.parent)
    finally:
        part.unlink(missing_ok=True)


def replace(path: Path, content: bytes | str) -> None:
    """Writes the whole file, or leaves what was there."""
    with replaced(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def csv_of(rows: Iterable[Sequence[object]]) -> str:
    """The rows as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def check_new(out: Path | None, suffixes: Sequence[str], overwrite: bool) -> None:
    """UserError for an --out that is there already, which --overwrite allows, or that has another suffix."""
    if out is None:
        return
    if out.suffix not in suffixes:
        raise UserError(f"--out: {str(out)!r} should end in {' or '.join(suffixes)}")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {str(out)!r} exists, --overwrite replaces it")


def synced(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writable(where: str, after: str = "") -> Iterator[None]:
    """An OSError in the block becomes a UserError: "<where> can't be written: <why><after>"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} can't be written: {error.strerror or error}{after}") from None
