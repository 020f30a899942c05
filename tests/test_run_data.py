"""Data sets: reading, downloading, importing, splitting, scaling. No test needs the network or the real MNIST."""

import gzip
import hashlib
import http.server
import io
import re
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from jaxbp.run import data
from jaxbp.run.config import DataConfig
from jaxbp.run.data import Scaling, describe, idx, import_files, load, scaling
from jaxbp.run.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (30, 3, 2), np.uint8),
    "train-labels-idx1-ubyte": np.arange(30, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (10, 3, 2), np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
}
FILES = {
    name: bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    for name, array in ARRAYS.items()
}
FIRST, *_, LAST = FILES


@pytest.fixture(autouse=True)
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of four small files under the name mnist, an empty data folder, and no wait between attempts."""
    files = [idx.IdxFile(name, ARRAYS[name].shape, hashlib.sha256(FILES[name]).hexdigest()) for name in FILES]
    monkeypatch.setitem(
        idx.SOURCES,
        "mnist",
        idx.Source((files[0], files[1], files[2], files[3]), ("http://127.0.0.1:1/no",), (*"0123456789",)),
    )
    monkeypatch.setattr(idx, "PAUSE", 0.0)
    monkeypatch.setenv("JAXBP_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("JAXBP_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fails(match: str, call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises: one line in which the pattern `match` is found."""
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stored(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "data").rglob("*") if path.is_file()}


def is_whole(dataset: data.Dataset) -> bool:
    """Whether this is the small data set, every number of it."""
    wanted = [array.reshape(len(array), -1).squeeze() for array in ARRAYS.values()]
    got = [dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test]
    return all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


# --- download ---------------------------------------------------------------------------------------------------------


class Mirror:
    """A server on this machine: `bodies` by path, `replies` that a request uses up first, and the paths asked for."""

    def __init__(self) -> None:
        self.bodies = {f"/mnist/{name}.gz": gzip.compress(FILES[name]) for name in FILES}
        self.replies: dict[str, list[Callable[[http.server.BaseHTTPRequestHandler], None]]] = {}
        self.asked: list[str] = []
        self.server = http.server.HTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handler(mirror) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                if mirror.replies.get(self.path):
                    mirror.replies[self.path].pop(0)(self)
                elif self.path in mirror.bodies:
                    send(self, mirror.bodies[self.path])
                else:
                    self.send_error(404)

            def log_message(self, *_: object) -> None:
                """Keeps the output of the tests clean."""

        return Handler


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, missing: int = 0) -> None:
    """Announces `missing` bytes more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) + missing))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    mirror = Mirror()
    thread = threading.Thread(target=mirror.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("JAXBP_MIRROR", f"{mirror.url}/")
    yield mirror
    mirror.server.shutdown()
    thread.join()
    mirror.server.server_close()


def test_download_and_no_second_one(mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_whole(load(DataConfig("mnist")))
    assert mirror.asked == [f"/mnist/{name}.gz" for name in FILES]
    assert stored(tmp_path) == set(FILES)
    out, err = capsys.readouterr()
    lines = [f"downloading {mirror.url}/mnist/{name}.gz to {tmp_path / 'data' / 'mnist'}" for name in FILES]
    assert (out, err.splitlines()) == ("", lines)
    assert is_whole(load(DataConfig("mnist")))
    assert len(mirror.asked) == 4
    assert capsys.readouterr() == ("", "")


def test_only_the_missing_file_is_downloaded(mirror: Mirror, tmp_path: Path) -> None:
    load(DataConfig("mnist"))
    (tmp_path / "data" / "mnist" / LAST).unlink()
    assert is_whole(load(DataConfig("mnist")))
    assert mirror.asked[4:] == [f"/mnist/{LAST}.gz"]


def test_body_that_the_server_sent_decompressed(mirror: Mirror) -> None:
    mirror.bodies[f"/mnist/{FIRST}.gz"] = FILES[FIRST]
    assert is_whole(load(DataConfig("mnist")))


def tampered(body: bytes) -> bytes:
    raw = bytearray(gzip.decompress(body))
    raw[-1] ^= 1
    return gzip.compress(bytes(raw))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (tampered, "SHA-256 of the decompressed data is [0-9a-f]{64}, expected [0-9a-f]{64}"),
        (lambda body: body[:-20], "cannot be read: Compressed file ended"),
        (lambda body: b"<html>log in first</html>", "SHA-256"),
        (lambda body: b"", "SHA-256"),
        (lambda body: gzip.compress(bytes(10**7)), "is longer than the 196 bytes"),
        (lambda body: bytes(10**6), "the answer is longer than"),
    ],
)
def test_bad_body_is_refused(mirror: Mirror, tmp_path: Path, spoil: Callable[[bytes], bytes], reason: str) -> None:
    url = f"/mnist/{FIRST}.gz"
    mirror.bodies[url] = spoil(mirror.bodies[url])
    message = fails(reason, lambda: load(DataConfig("mnist")))
    assert mirror.url + url in message
    assert "`jaxbp data import mnist PATH`" in message
    assert mirror.asked == [url] * idx.ATTEMPTS
    assert stored(tmp_path) == set()


def test_truncated_answer_is_never_stored(mirror: Mirror, tmp_path: Path) -> None:
    url = f"/mnist/{LAST}.gz"
    body = mirror.bodies[url]
    mirror.replies[url] = [lambda handler: send(handler, body[:-9], missing=9)] * idx.ATTEMPTS
    fails("9 more expected", lambda: load(DataConfig("mnist")))
    assert stored(tmp_path) == set(FILES) - {LAST}
    assert is_whole(load(DataConfig("mnist")))


def test_retry_after_a_closed_connection(mirror: Mirror) -> None:
    url = f"/mnist/{FIRST}.gz"
    mirror.replies[url] = [lambda handler: None]  # no answer: the connection is closed
    assert is_whole(load(DataConfig("mnist")))
    assert mirror.asked[:2] == [url, url]


def test_second_mirror_after_404(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXBP_MIRROR")
    source = idx.SOURCES["mnist"]._replace(mirrors=(f"{mirror.url}/gone", f"{mirror.url}/mnist"))
    monkeypatch.setitem(idx.SOURCES, "mnist", source)
    assert is_whole(load(DataConfig("mnist")))
    assert mirror.asked[:2] == [f"/gone/{FIRST}.gz", f"/mnist/{FIRST}.gz"]


def test_all_mirrors_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    monkeypatch.delenv("JAXBP_MIRROR")
    source = idx.SOURCES["mnist"]._replace(mirrors=(f"{mirror.url}/gone", "http://127.0.0.1:1/closed"))
    monkeypatch.setitem(idx.SOURCES, "mnist", source)
    message = fails("`jaxbp data import mnist PATH`", lambda: load(DataConfig("mnist")))
    assert f"{mirror.url}/gone/{FIRST}.gz: 404 Client Error: Not Found;" in message
    assert re.search(rf"http://127.0.0.1:1/closed/{FIRST}.gz: .*refused;", message)
    assert stored(tmp_path) == set()


def test_mirror_has_to_be_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXBP_MIRROR", "file:///etc")
    fails("JAXBP_MIRROR: 'file:///etc' .* https://", lambda: load(DataConfig("mnist")))


def test_public_mirrors_are_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("JAXBP_MIRROR", raising=False)
    assert len(idx.SOURCES["mnist"].mirrors) == 2
    for name, source in idx.SOURCES.items():
        urls = [url for file in source.files for url in idx._urls(name, file)]
        assert all(re.fullmatch(r"https://[\w./-]+-ubyte\.gz", url) for url in urls)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b"", tampered])
def test_damaged_file_is_named(mirror: Mirror, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    load(DataConfig("mnist"))
    path = tmp_path / "data" / "mnist" / LAST
    path.write_bytes(
        gzip.decompress(tampered(gzip.compress(FILES[LAST]))) if damage is tampered else damage(FILES[LAST])
    )
    message = fails("delete it, or run `jaxbp data import mnist PATH`", lambda: load(DataConfig("mnist")))
    assert message.startswith(f"{path}: ")
    assert len(mirror.asked) == 4


def test_data_folder_that_cannot_be_written(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    fails("data/mnist/.*can't be written", lambda: load(DataConfig("mnist")))


def test_no_part_is_left_when_the_file_cannot_be_put_in_place(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: Path, path: Path) -> None:
        assert part.read_bytes() == FILES[FIRST] and not path.exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    fails(f"{FIRST}: can't be written: No space left on device", lambda: load(DataConfig("mnist")))
    assert stored(tmp_path) == set()


# --- import -----------------------------------------------------------------------------------------------------------


def pack_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "in"


def pack_zip(folder: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / "in.zip"


def pack_tar(folder: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    path = folder / ("in.tar" if mode == "w" else "in.tgz")
    with tarfile.open(path, "w") if mode == "w" else tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pack_tgz(folder: Path, files: dict[str, bytes]) -> Path:
    return pack_tar(folder, files, "w:gz")


Pack = Callable[[Path, dict[str, bytes]], Path]
every_pack = pytest.mark.parametrize("pack", [pack_folder, pack_zip, pack_tar, pack_tgz])
ZIPPED = {f"{name}.gz": gzip.compress(content) for name, content in FILES.items()}


@every_pack
@pytest.mark.parametrize(
    "files",
    [
        FILES,
        ZIPPED,
        {f"raw/{name}": content for name, content in FILES.items()},
        {name.replace("-idx", ".idx"): content for name, content in FILES.items()},
        {f"{name}/{name.replace('-idx', '.idx')}": content for name, content in FILES.items()},
        # The first file of a name is another data set's: the one whose SHA-256 is right counts.
        {f"a/{name}": b"other" for name in FILES} | {f"b/{name}.gz": content for name, content in FILES.items()},
    ],
)
def test_import(tmp_path: Path, pack: Pack, files: dict[str, bytes]) -> None:
    assert import_files("mnist", pack(tmp_path, files)) == tmp_path / "data" / "mnist"
    assert stored(tmp_path) == set(FILES)
    assert is_whole(load(DataConfig("mnist")))


@pytest.mark.parametrize("pack", [pack_zip, pack_tar, pack_tgz])
@pytest.mark.parametrize("prefix", ["../../", "/", "..\\..\\", "C:\\"])
def test_archives_with_paths_that_lead_outside_are_refused(tmp_path: Path, pack: Pack, prefix: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    archive = pack(tmp_path / "a" / "b", {f"{prefix}{name}": content for name, content in FILES.items()})
    fails("refused: it holds '.*', a path that leads out of the archive", lambda: import_files("mnist", archive))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {archive}


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    with tarfile.open(path, "w") as archive:
        for name in FILES:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(member)
    fails("holds no train-images-idx3-ubyte", lambda: import_files("mnist", path))


def test_folder_entries_of_a_zip_are_not_files(tmp_path: Path) -> None:
    archive = pack_zip(tmp_path, {f"{name}/": b"" for name in FILES})
    fails("holds no train-images-idx3-ubyte", lambda: import_files("mnist", archive))


@every_pack
def test_import_checksum(tmp_path: Path, pack: Pack) -> None:
    """One wrong file, and nothing is written; the message has the file, what was got and what was expected."""
    wrong = bytes(len(FILES[LAST]))
    got, expected = (hashlib.sha256(content).hexdigest() for content in (wrong, FILES[LAST]))
    path = pack(tmp_path, FILES | {LAST: wrong})
    message = fails(f"{LAST}: SHA-256 .* is {got}, expected {expected}", lambda: import_files("mnist", path))
    assert str(path) in message
    assert stored(tmp_path) == set()


@every_pack
def test_import_missing_file(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path, {name: content for name, content in FILES.items() if name != LAST})
    fails(f"holds no {LAST} \\(gzipped or not\\)", lambda: import_files("mnist", path))
    assert stored(tmp_path) == set()


@every_pack
@pytest.mark.slow
def test_gzip_bomb(tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB of zeros in 100 kB: refused after one byte more than the file may have."""
    read: list[int] = []
    unzip = gzip.GzipFile.read

    def count(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        content = unzip(self, size)
        read.append(len(content))
        return content

    path = pack(tmp_path, ZIPPED | {f"{FIRST}.gz": gzip.compress(bytes(10**8))})
    if pack is not pack_tgz:  # whose own gzip layer is read with the same method
        monkeypatch.setattr(gzip.GzipFile, "read", count)
    fails(f"{FIRST}.gz: is longer than the 196 bytes", lambda: import_files("mnist", path))
    assert all(size <= 197 for size in read)
    assert stored(tmp_path) == set()


@pytest.mark.parametrize("pack", [pack_zip, pack_tar, pack_tgz])
def test_damaged_archives_are_one_line(tmp_path: Path, pack: Pack) -> None:
    """Cut short, or a few bytes changed: a UserError or, where the harm is in no file's content, the import."""
    path = pack(tmp_path, ZIPPED)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for position in rng.integers(0, max(len(damaged), 1), 4)[: len(damaged)]:
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            import_files("mnist", path)
        except UserError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        assert stored(tmp_path) in (set(), set(FILES))
    path.write_bytes(whole)
    import_files("mnist", path)
    assert is_whole(load(DataConfig("mnist")))


def test_import_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no archive")
    fails("no such file or folder", lambda: import_files("mnist", tmp_path / "nowhere"))
    fails("notes.txt: not a folder, a .zip, a .tar", lambda: import_files("mnist", tmp_path / "notes.txt"))
    fails("'minst' .*, did you mean 'mnist'", lambda: import_files("minst", tmp_path))
    fails("'digits' can't be downloaded or imported. Allowed: mnist", lambda: import_files("digits", tmp_path))


@pytest.mark.slow
def test_real_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real table and the real data folder
    if not idx.is_local("mnist"):
        pytest.skip("MNIST is not imported: jaxbp data import mnist PATH")
    dataset = load(DataConfig("mnist"))
    assert (dataset.x_train.shape, dataset.x_test.shape) == ((60_000, 784), (10_000, 784))
    assert dataset.x_train.dtype == np.uint8 and dataset.y_train.dtype == np.int32
    assert dataset.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(dataset.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    scaling = Scaling.fit(dataset.x_train, "global")
    np.testing.assert_allclose([scaling.mean[0] / 255, scaling.scale[0] / 255], [0.1307, 0.3081], atol=5e-5)


# --- .npz -------------------------------------------------------------------------------------------------------------

X = RNG.normal(size=(20, 3))
LABELS = np.arange(20) % 4
SEQUENCES = np.stack([LABELS, LABELS[::-1]]).T
TARGETS = RNG.normal(size=20)


def npz(tmp_path: Path, **arrays: np.ndarray) -> str:
    np.savez(tmp_path / "d.npz", allow_pickle=True, **arrays)
    return str(tmp_path / "d.npz")


@pytest.mark.parametrize("x", [X, X.astype(np.float32), (X * 9).astype(np.int16), X > 0])
def test_npz_classification(tmp_path: Path, x: np.ndarray) -> None:
    dataset = load(DataConfig(npz(tmp_path, x=x, y=LABELS, other=X)))
    assert (dataset.classes, dataset.image_shape) == (("0", "1", "2", "3"), None)
    assert (dataset.x_train.shape, dataset.x_test.shape) == ((16, 3), (4, 3))
    assert dataset.x_train.dtype == x.dtype and dataset.y_train.dtype == np.int32
    rows = {
        (*inputs, label)
        for inputs, label in zip(x.tolist(), LABELS.tolist(), strict=True)
        for inputs in [tuple(inputs)]
    }
    parts = [(dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)]
    assert rows == {(*a, b) for xs, ys in parts for a, b in zip(xs.tolist(), ys.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.array(["no", "b", "a", "yes"])[LABELS], ("a", "b", "no", "yes")),
        (np.array([b"u", b"v"])[LABELS % 2], ("u", "v")),
        (LABELS > 1, ("False", "True")),
        (LABELS + 1, ("1", "2", "3", "4")),
        (LABELS[:, None] * 2 - 1, ("-1", "1", "3", "5")),
        (LABELS.astype(np.int64) + 2**32, ("4294967296", "4294967297", "4294967298", "4294967299")),
        (LABELS - 1.0, ("-1", "0", "1", "2")),
    ],
)
def test_npz_labels_of_any_kind(tmp_path: Path, y: np.ndarray, classes: tuple[str, ...]) -> None:
    """They are numbered by the order of their classes, also in a test set, which may lack some."""
    x = np.unique(y, return_inverse=True)[1].reshape(20, 1)
    dataset = load(DataConfig(npz(tmp_path, x=x, y=y)), most_labels=4)
    assert (dataset.classes, dataset.y_train.dtype) == (classes, np.int32)
    np.testing.assert_array_equal(dataset.y_train, dataset.x_train[:, 0])
    dataset = load(DataConfig(npz(tmp_path, x=x, y=y, x_test=x[1:2], y_test=y[1:2])), most_labels=4)
    assert dataset.classes == classes and dataset.y_test.tolist() == x[1].tolist()


@pytest.mark.parametrize("most", [0, 3])
def test_npz_whole_numbers_are_targets_where_the_loss_takes_no_labels(tmp_path: Path, most: int) -> None:
    dataset = load(DataConfig(npz(tmp_path, x=X, y=LABELS.astype(float))), most_labels=most)
    assert (dataset.classes, dataset.y_train.shape) == (None, (16, 1))


@pytest.mark.parametrize(("y", "columns"), [(TARGETS, 1), (np.stack([TARGETS, TARGETS]).T.astype(np.float32), 2)])
def test_npz_regression(tmp_path: Path, y: np.ndarray, columns: int) -> None:
    dataset = load(DataConfig(npz(tmp_path, x=X, y=y), test_fraction=0.25, standardize_targets=True))
    assert dataset.classes is None
    assert (dataset.y_train.shape, dataset.y_test.shape) == ((15, columns), (5, columns))
    assert dataset.y_train.dtype == np.float64
    together = np.concatenate([dataset.y_train, dataset.y_test])
    np.testing.assert_array_equal(np.sort(together[:, 0]), np.sort(y.reshape(20, -1)[:, 0]))


def test_npz_with_images_and_its_own_test_set(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (20, 5, 4), np.uint8)
    name = npz(tmp_path, x=images, y=LABELS.astype(np.uint8), x_test=images[:6], y_test=LABELS[:6])
    dataset = load(DataConfig(name, seed=7))
    assert dataset.name == name
    assert dataset.image_shape == (5, 4)
    np.testing.assert_array_equal(dataset.x_train, images.reshape(20, 20))
    np.testing.assert_array_equal(dataset.x_test, images[:6].reshape(6, 20))
    np.testing.assert_array_equal(dataset.y_test, LABELS[:6])
    assert dataset.x_train.dtype == np.uint8 and dataset.y_train.dtype == dataset.y_test.dtype == np.int32
    fails("data.test_fraction: 0.3, but .*d.npz has its own", lambda: load(DataConfig(name, test_fraction=0.3)))


def at(array: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X}, "no array 'y'. There are: x$"),
        ({"y": LABELS, "z": X}, "no array 'x'. There are: y, z"),
        ({"x": X, "y": LABELS, "x_test": X}, "no array 'y_test', did you mean 'x_test'. There are: x, y, x_test"),
        ({"x": X, "y": LABELS, "y_test": LABELS}, "no array 'x_test'"),
        ({"x": X[:19], "y": LABELS}, "x has 19 rows and y has 20"),
        ({"x": X, "y": LABELS, "x_test": X, "y_test": LABELS[:3]}, "x_test has 20 rows and y_test has 3"),
        ({"x": X.astype(object), "y": LABELS}, "d.npz: cannot be read: Object arrays cannot be loaded"),
        ({"x": X.astype(complex), "y": LABELS}, "x is complex128; allowed: integers or floats"),
        ({"x": X, "y": TARGETS.astype(complex)}, "y is complex128; allowed: labels or floats"),
        ({"x": X, "y": np.tile(LABELS.astype(str), (2, 1)).T}, r"y is <U.* of shape \(20, 2\); labels are \(N,\), or"),
        ({"x": at(X, 7, np.nan), "y": LABELS}, "x: row 7 is not finite"),
        ({"x": at(at(X, 3, np.inf), 9, np.nan), "y": LABELS}, "x: row 3 is not finite .* 2 rows"),
        ({"x": X, "y": at(TARGETS, 4, -np.inf)}, "y: row 4 is not finite"),
        ({"x": X, "y": LABELS, "x_test": at(X, 2, np.nan), "y_test": LABELS}, "x_test: row 2 is not finite"),
        ({"x": X[:0], "y": LABELS[:0]}, r"x is empty: its shape is \(0, 3\)"),
        ({"x": X[:, :0], "y": LABELS}, r"x is empty: its shape is \(20, 0\)"),
        ({"x": X, "y": np.float64(1)}, "y is a single number"),
        ({"x": X[:, 0], "y": LABELS}, r"x has shape \(20,\); allowed: \(N, D\)"),
        ({"x": X.reshape(5, 2, 2, 3, 1), "y": LABELS[:5]}, r"x has shape \(5, 2, 2, 3, 1\)"),
        ({"x": X, "y": X[:, :, None]}, r"y has shape \(20, 3, 1\); allowed: \(N,\) or \(N, C\)"),
        ({"x": X, "y": np.ones((20, 2, 2), int)}, r"y is int64 of shape \(20, 2, 2\); labels are \(N,\)"),
        ({"x": X, "y": at(SEQUENCES, 5, -1)}, "y: row 5 is the label -1; allowed: 0 to 65535"),
        ({"x": X, "y": at(SEQUENCES, 6, 10**9)}, "y: row 6 is the label 1000000000"),
        ({"x": X, "y": SEQUENCES, "x_test": X, "y_test": at(SEQUENCES, 8, 4)}, "row 8 is the label 4; .* y is 3"),
        (
            {"x": X, "y": LABELS, "x_test": X, "y_test": SEQUENCES},
            r"y_test: a target has the shape \(2,\), and in y \(\)",
        ),
        ({"x": X, "y": LABELS, "x_test": X, "y_test": at(LABELS, 8, 4)}, "row 8 is the label 4; y has 0, 1, 2, 3$"),
        ({"x": np.zeros((70_000, 1)), "y": np.arange(70_000)}, "y has 70,000 different labels; allowed: 65,536"),
        ({"x": X, "y": LABELS, "x_test": X[:, :2], "y_test": LABELS}, r"x_test: a sample has the shape \(2,\)"),
        ({"x": X, "y": LABELS, "x_test": X, "y_test": TARGETS}, "one of y and y_test has labels"),
        ({"x": X, "y": TARGETS, "x_test": X, "y_test": X}, r"y_test: a target has the shape \(3,\), and in y \(1,\)"),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], match: str) -> None:
    name = npz(tmp_path, **arrays)
    assert name in fails(match, lambda: load(DataConfig(name)))


def test_npz_files(tmp_path: Path) -> None:
    name = npz(tmp_path, x=X, y=LABELS)
    whole = Path(name).read_bytes()
    fails(r"D.npz: no such file, did you mean 'd.npz'", lambda: load(DataConfig(str(tmp_path / "D.npz"))))
    fails("no such file", lambda: load(DataConfig(str(tmp_path / "nowhere" / "e.npz"))))
    np.save(tmp_path / "array.npy", X)
    for content in (b"", b"text", whole[:-30], (tmp_path / "array.npy").read_bytes()):
        Path(name).write_bytes(content)
        fails("d.npz: not an .npz file", lambda: load(DataConfig(name)))
    with zipfile.ZipFile(name, "w") as archive:
        archive.writestr("x", b"text")
        archive.writestr("y", b"text")
    fails("d.npz: x is no array; allowed: integers or floats", lambda: load(DataConfig(name)))
    rng = np.random.default_rng(2)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        Path(name).write_bytes(damaged)
        try:
            load(DataConfig(name))
        except UserError as error:
            assert "\n" not in str(error)


# --- the names, the split ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "samples", "inputs", "classes", "image_shape"),
    [
        ("digits", 1797, 64, 10, (8, 8)),
        ("iris", 150, 4, 3, None),
        ("wine", 178, 13, 3, None),
        ("breast_cancer", 569, 30, 2, None),
        ("diabetes", 442, 10, None, None),
    ],
)
def test_bundled(
    name: str, samples: int, inputs: int, classes: int | None, image_shape: tuple[int, int] | None
) -> None:
    dataset = load(DataConfig(name))
    test = -(-samples // 5)
    assert dataset.x_train.shape == (samples - test, inputs)
    assert dataset.x_test.shape == (test, inputs)
    assert dataset.image_shape == image_shape
    if classes is None:
        assert dataset.classes is None
        assert dataset.y_train.shape == (samples - test, 1) and dataset.y_train.dtype == np.float64
    else:
        assert dataset.classes is not None and len(dataset.classes) == classes
        assert all(type(label) is str for label in dataset.classes)
        assert dataset.y_train.shape == (samples - test,) and dataset.y_train.dtype == np.int32
        assert dataset.y_train.max() == classes - 1
    row = next(row for row in describe() if row.name == name)
    kind = "regression" if classes is None else "classification"
    assert row == (name, kind, samples, inputs, classes, "bundled")


def test_diabetes_is_unscaled() -> None:
    assert 20 < load(DataConfig("diabetes")).x_train[:, 0].mean() < 80  # years


def test_describe_says_where(tmp_path: Path) -> None:
    where = {row.name: row.where for row in describe()}
    assert list(where) == ["digits", "iris", "wine", "breast_cancer", "diabetes", "mnist", "fashion_mnist", "text"]
    assert where["mnist"] == where["fashion_mnist"] == "to be downloaded"
    import_files("mnist", pack_folder(tmp_path, FILES))
    assert {row.name: row.where for row in describe()}["mnist"] == f"in {tmp_path / 'data' / 'mnist'}"
    assert describe()[-2][1:5] == ("classification", 70_000, 784, 10)


def test_unknown_name() -> None:
    fails(
        "data.name: 'digts' is not a data set, did you mean 'digits'. Allowed: digits, .*fashion_mnist.*npz",
        lambda: load(DataConfig("digts")),
    )


def test_seed_decides_the_split() -> None:
    first, again, other = (load(DataConfig("iris", seed=seed)) for seed in (3, 3, 4))
    for a, b in zip(first[1:5], again[1:5], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.x_test, other.x_test)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_split_is_stratified(tmp_path: Path, fraction: float) -> None:
    y = np.repeat([0, 1, 2], [400, 40, 80])
    name = npz(tmp_path, x=np.arange(520.0)[:, None], y=y)
    dataset = load(DataConfig(name, test_fraction=fraction))
    counts = [round(fraction * count) for count in (400, 40, 80)]
    assert np.bincount(dataset.y_test).tolist() == counts
    np.testing.assert_array_equal(
        np.sort(np.concatenate([dataset.x_train, dataset.x_test]), axis=0)[:, 0], np.arange(520)
    )


def test_impossible_splits(tmp_path: Path) -> None:
    name = npz(tmp_path, x=X, y=at(np.zeros(20, int), 3, 2))
    fails("class '2' has one sample", lambda: load(DataConfig(name)))
    name = npz(tmp_path, x=X, y=LABELS)
    for fraction, train, test in ((0.05, 19, 1), (0.9, 2, 18)):
        match = f"{fraction} leaves {train} of 20 samples to train with and {test} to test; each needs 4"
        fails(match, partial(load, DataConfig(name, test_fraction=fraction)))
    name = npz(tmp_path, x=X[:1], y=TARGETS[:1])
    fails("each needs 1$", lambda: load(DataConfig(name)))
    fails("data.test_fraction: 1.5; it has to lie", lambda: load(DataConfig("iris", test_fraction=1.5)))
    fails("data.test_fraction: nan", lambda: load(DataConfig("iris", test_fraction=float("nan"))))
    fails("data.seed: -1; allowed: 0 to", lambda: load(DataConfig("iris", seed=-1)))
    fails("data.standardize_targets: true, but iris", lambda: load(DataConfig("iris", standardize_targets=True)))


def test_classes_without_samples_are_none(tmp_path: Path) -> None:
    """Labels 0 and 3 alone."""
    dataset = load(DataConfig(npz(tmp_path, x=X, y=3 * (LABELS % 2)), test_fraction=0.5))
    assert dataset.classes == ("0", "3")
    assert np.bincount(dataset.y_test).tolist() == [5, 5]


def test_own_test_set_takes_no_fraction(mirror: Mirror) -> None:
    fails("data.test_fraction: 0.2, but mnist", lambda: load(DataConfig("mnist", test_fraction=0.2)))


# --- validation -------------------------------------------------------------------------------------------------------


def test_validation_is_a_stratified_part_of_the_training_set(tmp_path: Path) -> None:
    y = np.repeat([0, 1, 2], [400, 40, 80])
    name = npz(tmp_path, x=np.arange(520.0)[:, None], y=y)
    without, found, again = (load(DataConfig(name, validation=share)) for share in (None, 0.25, 0.25))
    assert without.splits == ("train", "test") and found.splits == ("train", "validation", "test")
    np.testing.assert_array_equal(found.x_test, without.x_test)
    assert np.bincount(found.y_validation).tolist() == [80, 8, 16]
    parts = np.concatenate([found.x_train, found.x_validation])
    np.testing.assert_array_equal(np.sort(parts, axis=0), np.sort(without.x_train, axis=0))
    np.testing.assert_array_equal(found.x_validation, again.x_validation)
    other = load(DataConfig(name, validation=0.25, seed=1))
    assert not np.array_equal(found.x_validation, other.x_validation)
    assert len({data.digest(dataset) for dataset in (without, found, other)}) == 3


def test_folds_are_as_large_as_those_of_scikit_learn(tmp_path: Path) -> None:
    """By class; together the validation sets are the training set, each sample once, with the weight of its own."""
    y = np.repeat(range(3), (21, 13, 6))
    np.savez(tmp_path / "a.npz", x=np.arange(40.0)[:, None], y=y, weights=1 + np.arange(40.0))
    own = load(DataConfig(str(tmp_path / "a.npz"), seed=3))
    reference = StratifiedKFold(4, shuffle=True, random_state=3).split(own.x_train, own.y_train)
    taken = []
    for fold, (rows, held_out) in enumerate(reference, 1):
        part = load(DataConfig(str(tmp_path / "a.npz"), seed=3, validation=f"{fold}/4"))
        assert part.x_validation is not None and part.y_validation is not None and part.weights is not None
        np.testing.assert_array_equal(np.bincount(part.y_validation), np.bincount(own.y_train[held_out]))
        np.testing.assert_array_equal(np.bincount(part.y_train), np.bincount(own.y_train[rows]))
        np.testing.assert_array_equal(part.weights, 1 + part.x_train[:, 0])
        np.testing.assert_array_equal(part.x_test, own.x_test)
        assert not set(part.x_train.flat) & set(part.x_validation.flat)
        taken += [*part.x_validation.flat]
    assert sorted(taken) == sorted(own.x_train.flat)


def test_folds_of_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(20.0)[:, None], y=np.arange(20.0) / 3)
    parts = [load(DataConfig(str(tmp_path / "a.npz"), validation=f"{k}/3")) for k in (1, 2, 3)]
    assert sorted((len(part.x_train), part.x_validation.shape) for part in parts if part.x_validation is not None) == [
        (10, (6, 1)),
        (11, (5, 1)),
        (11, (5, 1)),
    ]


@pytest.mark.parametrize(
    ("name", "fold", "said"),
    [
        ("iris", "3/2", "data.validation: 3/2; allowed: 1/k to k/k for k folds, 2 at least"),
        ("iris", "1/1", "data.validation: 1/1; allowed: 1/k to k/k for k folds, 2 at least"),
        ("iris", "1/41", "data.validation: 1/41: iris has 40 training samples of class 'setosa', fewer than folds"),
        ("diabetes", "1/400", "data.validation: 1/400: diabetes has 353 training samples, fewer than folds"),
        ("x.txt", "1/5", "data.validation: 1/5, but a text has no folds; a fraction is allowed"),
    ],
)
def test_impossible_folds(name: str, fold: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(DataConfig(name, validation=fold))
    assert str(caught.value) == said


def test_npz_with_its_own_validation_set(tmp_path: Path) -> None:
    images = np.arange(60.0).reshape(5, 4, 3)
    name = npz(
        tmp_path, x=images, y=LABELS[:5], x_val=images[:2], y_val=LABELS[:2], x_test=images[3:], y_test=LABELS[3:5]
    )
    found = load(DataConfig(name))
    assert found.x_validation is not None and found.x_validation.shape == (2, 12)
    np.testing.assert_array_equal(found.y_validation, LABELS[:2])
    assert len(found.x_train) == 5 and len(found.x_test) == 2
    fails("data.validation: 0.2, but .* has its own validation set", lambda: load(DataConfig(name, validation=0.2)))
    name = npz(tmp_path, x=X, y=LABELS, x_val=X[:3], y_val=LABELS[:3])
    assert [len(part) for part in load(DataConfig(name))[1:5:2]] == [16, 4]  # the test set is taken from the others
    for arrays, match in (
        ({"x_val": X}, "no array 'y_val'"),
        ({"x_val": X[:, :1], "y_val": LABELS}, "x_val: a sample has the shape"),
        ({"x_val": X, "y_val": LABELS + 9}, "y_val: row 0 is the label"),
        ({"x_val": X, "y_val": LABELS[1:]}, "x_val has 20 rows and y_val has 19"),
    ):
        fails(match, partial(load, DataConfig(npz(tmp_path, x=X, y=LABELS, **arrays))))


def test_npz_with_weights(tmp_path: Path) -> None:
    """They stay with their samples; the test set has none."""
    weights = np.arange(1.0, 21)
    found = load(DataConfig(npz(tmp_path, x=weights[:, None], y=LABELS, weights=weights), validation=0.3))
    assert found.weights is not None
    np.testing.assert_array_equal(found.weights, found.x_train[:, 0])
    assert load(DataConfig(npz(tmp_path, x=X, y=LABELS))).weights is None
    for wrong, match in (
        (weights[1:], r"weights has shape \(19,\); allowed: \(20,\)"),
        (weights - 1, "weights: row 0 is 0; allowed: numbers above 0"),
        (at(weights, 3, np.nan), "weights: row 3 is not finite"),
    ):
        fails(match, partial(load, DataConfig(npz(tmp_path, x=X, y=LABELS, weights=wrong))))


def test_impossible_validation(tmp_path: Path) -> None:
    name = npz(tmp_path, x=X, y=at(at(np.zeros(20, int), 3, 1), 4, 1))
    fails("class '1' has one training sample", lambda: load(DataConfig(name, test_fraction=0.5, validation=0.5)))
    name = npz(tmp_path, x=X, y=LABELS)
    match = "data.validation: 0.01 leaves 15 of 16 samples to train with and 1 to validate; each needs 4"
    fails(match, lambda: load(DataConfig(name, validation=0.01)))


def test_a_text_is_validated_on_what_comes_before_its_test_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 40)
    found = load(DataConfig(str(tmp_path / "a.txt"), validation=0.25, block=4))
    assert found.x_validation is not None and [len(x) for x in (found.x_train, found.x_validation)] == [67, 22]
    np.testing.assert_array_equal(found.x_validation[0], np.arange(270, 274) % 10)
    short = DataConfig(str(tmp_path / "a.txt"), validation=0.01, block=4)
    fails("data.block: 4 and the next one, but .* 400 characters, 40 of them for the test, 4 for", lambda: load(short))


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [RNG.normal(5, 3, (1000, 7)), RNG.integers(0, 256, (1000, 7), np.uint8)])
def test_feature_scaling(values: np.ndarray) -> None:
    train, test = values[:600], values[600:]
    scaling = Scaling.fit(train)
    np.testing.assert_allclose(scaling.mean, train.astype(float).mean(0), rtol=1e-13)
    np.testing.assert_allclose(scaling.scale, train.astype(float).std(0), rtol=1e-13)
    np.testing.assert_allclose(scaling.apply(train).mean(0), 0, atol=1e-13)
    np.testing.assert_allclose(scaling.apply(train).std(0), 1, rtol=1e-13)
    np.testing.assert_allclose(scaling.apply(test), (test - train.mean(0)) / train.std(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scaling.inverse(scaling.apply(test)), test, rtol=1e-13, atol=1e-12)
    np.testing.assert_array_equal(scaling.apply(test, np.float32), scaling.apply(test).astype(np.float32))


def test_global_scaling_and_none() -> None:
    values = RNG.integers(0, 256, (50, 4), np.uint8)
    scaling = Scaling.fit(values, "global")
    assert scaling.mean.shape == scaling.scale.shape == (4,)
    np.testing.assert_allclose(scaling.mean, values.mean(), rtol=1e-13)
    np.testing.assert_allclose(scaling.scale, values.std(), rtol=1e-13)
    np.testing.assert_array_equal(Scaling.fit(values, "none").apply(values), values)
    np.testing.assert_array_equal(Scaling.fit(values * 0, "global").apply(values), values)


def test_scaling_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.normal(3, 2, (101, 5))
    whole = Scaling.fit(values)
    monkeypatch.setattr(scaling, "CHUNK", 37)
    parts = Scaling.fit(values)
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-14)
    np.testing.assert_array_equal(whole.apply(values), (values - whole.mean) / whole.scale)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -1e30, 1e-300])
def test_constant_column_keeps_scale_one(constant: float) -> None:
    """The mean of ten times 0.1 is not 0.1: a deviation of 1e-17 has to count as none."""
    values = np.column_stack([np.full(10, constant), np.arange(10.0)])
    scaling = Scaling.fit(values)
    assert scaling.scale[0] == 1 and scaling.scale[1] > 2
    assert scaling.mean[0] == constant and not scaling.apply(values)[:, 0].any()


def test_scaling_of_extreme_values() -> None:
    fails("variance of values up to 1e[+]200 overflows", lambda: Scaling.fit(np.array([[1e200], [-1e200]])))
    tiny = Scaling.fit(np.array([[1e-200], [3e-200]]))  # the variance underflows
    assert tiny.scale[0] == 1
