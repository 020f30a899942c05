"""A text: its characters are the tokens, a block of them is a sample, and the next characters are its targets."""

import gzip
from pathlib import Path

import numpy as np

from jaxbp.run import paths
from jaxbp.run.config import DataConfig
from jaxbp.run.data import idx
from jaxbp.run.data.archive import Dataset
from jaxbp.run.errors import UserError
from jaxbp.run.host import memory
from jaxbp.run.store import files

NAME = "text"  # of the text that was imported
TEST_FRACTION, BLOCK = 0.1, 64
MOST_CHARACTERS = 5000  # different ones: more are no alphabet


def is_text(name: str) -> bool:
    """Whether a data set of this name is a text."""
    return name == NAME or name.endswith((".txt", ".txt.gz"))


def read(config: DataConfig) -> Dataset:
    """The blocks of a text, (N, T) int32, y one character further; classes are the characters, sorted.

    The end of the text is the test set, what comes before that the validation set.

    Raises:
      UserError: no such file, not UTF-8, too short for one block of each set.
    """
    if config.standardize_targets:
        raise UserError("data.standardize_targets: true, but a text has classes; it is for regression only")
    if isinstance(config.validation, str):
        raise UserError(f"data.validation: {config.validation}, but a text has no folds; a fraction is allowed")
    path = imported() if config.name == NAME else paths.named("data.name", config.name)
    if not path.is_file():
        hint = "; jaxbp data import text PATH takes one" if config.name == NAME else ""
        raise UserError(f"data.name: {path}: no such file{hint}")
    memory.check(f"data.name: {path}: the characters need", 8 * path.stat().st_size)
    text = _decoded(path)
    classes = sorted(set(text))
    if len(classes) > MOST_CHARACTERS:
        found = f"{len(classes):,} different characters, at most {MOST_CHARACTERS:,} are allowed"
        raise UserError(f"data.name: {path}: {found}")
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    tokens = np.searchsorted(np.array([ord(c) for c in classes], np.uint32), codes).astype(np.int32)
    characters, length = len(tokens), config.block or BLOCK
    rest = characters - round(characters * (config.test_fraction or TEST_FRACTION))
    train = rest - round(rest * (config.validation or 0))
    cuts = [rest] if config.validation is None else [train, rest]
    parts = [_blocks(part, length) for part in np.split(tokens, cuts)]
    if min(len(x) for x, _ in parts) == 0:
        validated = "" if config.validation is None else f", {rest - train:,} for the validation"
        there = f"{path} has {characters:,} characters, {characters - rest:,} of them for the test{validated}"
        raise UserError(f"data.block: {length} and the next one, but {there}")
    return Dataset(config.name, *parts[0], *parts[-1], tuple(classes), None, *(parts[1] if parts[2:] else ()))


def import_file(path: Path) -> Path:
    """Takes a text as the data set "text"; where it is now. UserError for no UTF-8 text, or where another one is."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    text, target = _decoded(path).encode(), imported()
    if target.exists() and target.read_bytes() != text:
        raise UserError(f"{target}: another text is there, delete it first; data.name may be the path of a .txt too")
    target.parent.mkdir(parents=True, exist_ok=True)
    files.replace(target, text)
    return target


def imported() -> Path:
    """Where the imported text is, if there is one."""
    return idx.folder_of(NAME) / "text.txt"


def _decoded(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def _blocks(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    count = max(len(tokens) - 1, 0) // length
    return tokens[: count * length].reshape(count, length), tokens[1 : count * length + 1].reshape(count, length)
