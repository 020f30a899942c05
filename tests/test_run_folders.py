"""Folders of arrays and of images, and the data sets of OpenML, without a network."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from jaxbp.run.config import DataConfig
from jaxbp.run.data import idx, load
from jaxbp.run.errors import UserError

RNG = np.random.default_rng(0)


def drawn(folder: Path, label: str, count: int, shape: tuple[int, ...] = (5, 4), suffix: str = ".png") -> np.ndarray:
    """Random images in the folder of their label."""
    pixels = RNG.integers(0, 256, (count, *shape), np.uint8)
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / label / f"{i}{suffix}")
    return pixels


def said(path: object, **keys: Any) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load(DataConfig(str(path), **keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_a_folder_a_class(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Labels are the names of the folders; hidden files and files beside them are left alone."""
    cats, dogs = drawn(tmp_path, "cats", 6, shape), drawn(tmp_path, "dogs", 4, shape, ".bmp")
    (tmp_path / "README.txt").write_text("where they come from")
    (tmp_path / "cats" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / ".cache").mkdir()
    found = load(DataConfig(str(tmp_path), test_fraction=0.5))
    assert (found.classes, found.image_shape, found.x_train.dtype) == (("cats", "dogs"), shape, np.uint8)
    for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        np.testing.assert_array_equal(np.bincount(y), [3, 2])
        for row, label in zip(x, y, strict=True):
            assert (row == (cats, dogs)[label].reshape(-1, row.size)).all(axis=1).any()


def test_train_test_and_val(tmp_path: Path) -> None:
    train = [drawn(tmp_path / "train", label, 2) for label in ("3", "10")]
    drawn(tmp_path / "test", "3", 1)
    drawn(tmp_path / "val", "10", 3)
    found = load(DataConfig(str(tmp_path)))
    assert found.classes == ("10", "3") and found.splits == ("train", "validation", "test")
    assert found.y_train.tolist() == [0, 0, 1, 1] and found.y_test.tolist() == [1]
    assert found.y_validation is not None and found.y_validation.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(found.x_train, np.concatenate(train[::-1]).reshape(4, 20))
    assert "has its own test set" in said(tmp_path, test_fraction=0.3)
    (tmp_path / "validation").mkdir()
    assert said(tmp_path) == f"{tmp_path}/validation: a folder beside train; allowed are test and val"


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    drawn(tmp_path, "train", 4), drawn(tmp_path, "test", 4)
    assert load(DataConfig(str(tmp_path))).classes == ("test", "train")


def test_palettes_and_bits_are_colours_and_grays(tmp_path: Path) -> None:
    pixels = drawn(tmp_path / "gray", "a", 3)
    Image.fromarray(pixels[0] > 127).save(tmp_path / "gray" / "a" / "bits.png")
    assert load(DataConfig(str(tmp_path / "gray"))).image_shape == (5, 4)
    drawn(tmp_path / "colour", "a", 3, (5, 4, 3))
    Image.fromarray(pixels[0]).convert("P").save(tmp_path / "colour" / "a" / "palette.png")
    assert load(DataConfig(str(tmp_path / "colour"))).image_shape == (5, 4, 3)


def test_images_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    first = tmp_path / "a" / "0.png"
    assert said(tmp_path) == f"{tmp_path}: no x.npy and y.npy in it, and no folders with the images of a class each"
    (tmp_path / "a").mkdir()
    assert said(tmp_path) == f"{tmp_path}/a: there is no image in it"
    drawn(tmp_path, "a", 2), drawn(tmp_path, "b", 3)
    Image.new("L", (9, 5)).save(tmp_path / "b" / "1.png")
    Image.new("L", (8, 5)).save(tmp_path / "b" / "2.png")
    line = f"{tmp_path}/b/1.png is 9 × 5 grayscale, and {first} is 4 × 5 grayscale; all have to agree"
    assert said(tmp_path) == line
    Image.new("RGB", (4, 5)).save(tmp_path / "b" / "1.png")
    assert said(tmp_path) == line.replace("9 × 5 grayscale", "4 × 5 RGB")
    Image.new("RGBA", (4, 5)).save(tmp_path / "b" / "1.png")
    assert said(tmp_path) == f"{tmp_path}/b/1.png: an image of the mode RGBA; allowed are grayscale and RGB"
    for damaged in (b"", b"text", first.read_bytes()[:-30]):
        (tmp_path / "b" / "1.png").write_bytes(damaged)
        assert said(tmp_path).startswith(f"{tmp_path}/b/1.png: can't be read as an image: ")


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_arrays_in_a_folder_are_those_of_an_npz(tmp_path: Path) -> None:
    arrays = {"x": RNG.normal(size=(12, 3)), "y": np.arange(12) % 3, "x_test": RNG.normal(size=(3, 3))}
    arrays["y_test"] = np.arange(3)
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "a").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "a" / f"{name}.npy", array)
    packed = load(DataConfig(str(tmp_path / "a.npz")))
    for in_place in (False, True):
        found = load(DataConfig(str(tmp_path / "a")), in_place)
        assert found.classes == packed.classes
        for name in ("x_train", "y_train", "x_test", "y_test"):
            np.testing.assert_array_equal(getattr(found, name), getattr(packed, name))
    assert isinstance(found.x_train.base, np.memmap)


def test_arrays_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    assert said(tmp_path) == f"{tmp_path}: no array 'y'. There are: x"
    np.save(tmp_path / "y.npy", np.array([{}], object), allow_pickle=True)
    assert said(tmp_path).startswith(f"{tmp_path}/y.npy: can't be read: Object arrays cannot be loaded")
    (tmp_path / "y.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-8])
    assert said(tmp_path).startswith(f"{tmp_path}/y.npy: can't be read: ")


# --- OpenML -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A data set as scikit-learn gives it: a category, a number, a target; what it was asked for."""
    calls: list[dict[str, Any]] = []
    data = np.stack([np.arange(12) % 2, np.arange(12) / 7, np.arange(12) % 3], axis=1)
    data[5, :2] = np.nan
    found = SimpleNamespace(
        data=data,
        feature_names=["island", "mass", "species"],
        categories={"island": ["north", "south"], "species": ["ant", "bee", "cat"]},
        details={"default_target_attribute": "species"},
    )

    def fetch(**asked: Any) -> Any:
        calls.append(asked)
        return found

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    return calls


def test_a_data_set_of_openml_is_a_table(asked: list[dict[str, Any]]) -> None:
    found = load(DataConfig("openml:wasps", missing="mean"))
    assert found.classes == ("ant", "bee", "cat") and found.columns is not None
    assert [column[:2] for column in found.columns] == [("island", ("north", "south", None)), ("mass", ())]
    np.testing.assert_array_equal(np.bincount([*found.y_train, *found.y_test]), [4, 4, 4])
    assert set(map(tuple, found.x_train[:, :3])) <= {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    own = load(DataConfig("openml:61", target="species", drop=("island",), missing="mean"))
    assert own.x_train.shape == (9, 1)
    assert [call.get("data_id") for call in asked] == [None, 61]
    assert (asked[0]["name"], asked[0]["version"], asked[0]["data_home"]) == ("wasps", 1, str(idx.folder_of("openml")))
    assert said("openml:wasps").startswith("openml:wasps: values are missing: island 1, mass 1; data.missing = ")
    assert said("openml:wasps", target="speces").startswith("data.target: openml:wasps has no column 'speces', did you")


def test_what_openml_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> None:
        def fetch(**asked: Any) -> Any:
            raise error

        monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)

    fails(URLError("no route\nto host"))
    assert said("openml:iris") == (
        "data.name: openml:iris: can't be fetched: <urlopen error no route to host>; a table of yours, such as a .csv, "
        "needs no network"
    )
    fails(ValueError("STRING attributes are not supported for array representation. Try as_frame=True"))
    assert "openml:titanic has columns of free text; save it as a .csv" in said("openml:titanic")
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda **_: SimpleNamespace(data=sparse.csr_matrix((3, 2))))
    assert said("openml:292") == "data.name: openml:292 is sparse; a dense table is allowed"
