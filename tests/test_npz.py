"""Arrays of an .npz file that are mapped, not read."""

import mmap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxbp.run.config import DataConfig
from jaxbp.run.data import load, npz

X = np.arange(24, dtype=np.float32).reshape(8, 3)


def base(array: np.ndarray) -> object:
    """What an array's numbers belong to."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base


@pytest.mark.parametrize("array", [X, np.asfortranarray(X), X.astype(">f8"), X[:, 0] > 3, np.arange(8, dtype=np.uint8)])
def test_a_mapped_array_is_the_array(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", before=np.zeros(5), x=array, after=np.ones(3))
    got = npz.mapped(tmp_path / "d.npz", "x")
    assert got is not None and isinstance(base(got), mmap.mmap)
    np.testing.assert_array_equal(got, array, strict=True)
    with pytest.raises(ValueError, match="read-only"):
        got[...] = 0


def test_what_has_to_be_read_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=X)
    assert npz.mapped(path, "x") is None
    np.savez(path, scalar=np.float32(1), empty=np.zeros((0, 3)), pickled=np.array([{}], object))
    assert [npz.mapped(path, name) for name in ("scalar", "empty", "pickled", "absent")] == [None] * 4
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text.npy", b"no array")
    assert npz.mapped(path, "text") is None


def test_a_flipped_bit_and_a_false_header_are_found(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=X)
    data = bytearray(path.read_bytes())
    data[data.index(X.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        npz.mapped(path, "x")
    np.save(tmp_path / "x.npy", X)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes().replace(b"(8, 3)", b"(9, 3)"))
    with pytest.raises(ValueError, match="x: its header promises 108 bytes, it has 96"):
        npz.mapped(path, "x")


def test_a_data_set_with_its_own_test_set_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(8) % 2
    np.savez("d.npz", x=X, y=labels, x_test=X, y_test=labels)
    assert not isinstance(base(load(DataConfig("d.npz")).x_train), mmap.mmap)
    dataset = load(DataConfig("d.npz"), in_place=True)
    assert all(isinstance(base(array), mmap.mmap) for array in (dataset.x_train, dataset.x_test))
