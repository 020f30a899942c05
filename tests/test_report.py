"""`jaxbp report`: one page that needs nothing else, with what runs, sweeps and studies left."""

import html.parser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from test_compare import fault, made

from jaxbp.cli import main
from jaxbp.run.report import page


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Page(html.parser.HTMLParser):
    """The tags of a page, the words between them, and that each tag that opens is closed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(Path(path).read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, words: str) -> None:
        self.words.append(words.strip())

    def of(self, tag: str, name: str) -> list[Any]:
        return [attributes.get(name) for which, attributes in self.tags if which == tag]


def picture(folder: Path, name: str, pixels: int = 8) -> None:
    image.imsave(folder / name, np.random.default_rng(0).random((pixels, pixels, 3)))


def test_runs_beside_each_other_with_their_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    """Known pictures come first and say what they show; nothing is fetched, no script is there; text is escaped."""
    one, two = made("runs/one"), made("runs/two", "--train.seed", "1", "--data.name", "<b>.npz")
    for name in ("zoo.png", "study_train_norms.png", "learning_curves.png"):
        picture(one, name)
    assert main(["report", "runs"]) == 0
    assert "report.html: " in capsys.readouterr().out
    found = Page("report.html")
    shown = [alt.split()[0] for alt in found.of("img", "alt")]
    assert shown == ["Curves", "Loss", "Train", "Zoo."]
    assert all(source.startswith("data:image/png;base64,") for source in found.of("img", "src"))
    assert found.of("a", "href") == ["#part-1", "#part-2", "#part-3"]
    assert {"script", "link", "b"}.isdisjoint({tag for tag, _ in found.tags})
    assert "train.seed" in found.words and "<b>.npz" in found.words
    assert "It has no pictures." in found.words and any(w.startswith("Not evaluated: ") for w in found.words)
    assert "exists, --overwrite replaces it" in fault(capsys, "report", str(two))


def test_a_page_has_two_megabytes_at_most(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(page, "MOST_BYTES", 10**5 + 40_000)
    for name in ("one", "two"):
        picture(made(f"runs/{name}", "--train.seed", str(len(name))), "layers.png", 150)
    assert main(["report", "runs/one", "--out", "one.html"]) == main(["report", "runs/two", "--out", "two.html"]) == 0
    assert main(["report", "runs/one", "runs/two"]) == 0
    assert "without 2 pictures" in capsys.readouterr().out
    assert sum(words.startswith("Left out, because a page has 2 MB: 1 of") for words in Page("report.html").words) == 2


def test_what_can_not_be_reported_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fault(capsys, "report", "nowhere") == "nowhere: no such folder"
    made("run")
    assert "should end in .html" in fault(capsys, "report", "run", "--out", "run.pdf")
    assert "can't be written" in fault(capsys, "report", "run", "--out", "no/such/run.html")


@pytest.mark.slow
def test_a_real_run_and_its_study() -> None:
    Path("iris.toml").write_text(
        'data.name = "iris"\nmodel.sizes = [4, 3]\noptimizer.learning_rate = 0.1\n'
        'train = { epochs = 2, plot_format = "svg" }'
    )
    assert main(["run", "iris.toml"]) == main(["study", "runs/iris", "--split", "test"]) == 0
    assert main(["report", "runs/iris"]) == 0
    found = Page("report.html")
    for caption in ("Scores", "On 30 samples of the test set of iris", "By class", "Calibration"):
        assert caption in found.words
    assert {"setosa", "versicolor", "virginica", "ece"} <= set(found.words)
    drawn = [source for source in found.of("img", "src") if source.startswith("data:image/svg+xml;base64,")]
    assert len(drawn) == 6 and "Test set: norms of the gradients of single samples." in found.of("img", "alt")
    assert 500 < int(found.of("img", "width")[0]) < 2000
