"""What `eval`, `encode` and `show` write, and over which files: never over another's, and tried before the work."""

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import sparse

from sparc_kernels import AlignedSAE, cli
from sparc_kernels.cli.evaluate import finite
from sparc_kernels.evaluation.csr import write_codes
from sparc_kernels.evaluation.report import latent_page
from sparc_kernels.io import labels
from sparc_kernels.io.features import Features
from sparc_kernels.io.labels import read_labels, read_names
from sparc_kernels.io.weights import load_model, save_weights

ROWS, WIDTHS = 40, {"a": 6, "b": 4}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that we are in: features in one file and in shards, labels, texts, and the folder of a model."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    (tmp_path / "run").mkdir()
    save_weights(AlignedSAE(WIDTHS, 16, 3), tmp_path / "run" / "model.safetensors")
    for s, d in WIDTHS.items():
        x = generator.standard_normal((ROWS, d)).astype(np.float32)
        np.save(f"{s}.npy", x)
        save_file({"features": x[:20]}, f"{s}_0.safetensors")
        save_file({"features": x[20:]}, f"{s}_1.safetensors")
    np.save("labels.npy", generator.integers(0, 2, (ROWS, 3)))
    (tmp_path / "texts.txt").write_text("text\n" * ROWS)
    return tmp_path


GIVEN = ["--model=run", "--stream=a=a.npy", "--stream=b=b.npy", "--device=cpu"]
SHARDS = ["--model=run", "--stream=a=a_*.safetensors", "--stream=b=b.npy", "--device=cpu"]


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def link(name: str, target: str) -> None:
    os.makedirs(os.path.dirname(name), exist_ok=True)
    os.link(target, name)


@pytest.mark.parametrize(
    ("command", "make", "words"),
    [
        (["encode", *SHARDS, "--out=o", "--format=safetensors"], lambda: link("o/a.safetensors", "a_1.safetensors"),
         "--out: expected a file that is not read, got o/a.safetensors, which is stream 'a' (a_*.safetensors)"),
        (["encode", *GIVEN, "--out=o"], lambda: link("o/b.npz", "run/model.safetensors"),
         "got o/b.npz, which is of --model run"),
        (["encode", *GIVEN, "--model=run/model.safetensors", "--out=o"],
         lambda: link("o/b.npz", "run/model.safetensors"),
         "got o/b.npz, which is of --model run/model.safetensors"),
        (["encode", *GIVEN, "--out=o"], lambda: (os.mkdir("o"), sparse.save_npz("o/a.npz", sparse.eye(9).tocsr())),
         "--out: expected no file that sparc_kernels did not write, got o/a.npz: take another place, or move it"),
        (["encode", *GIVEN, "--out=.", "--format=safetensors"],
         lambda: save_file({"data": np.ones(3)}, "a.safetensors"),
         "did not write, got a.safetensors: take another place"),
        (["eval", *GIVEN, "--labels=labels.npy", "--out=o"], lambda: link("o/scores.json", "labels.npy"),
         "got o/scores.json, which is --labels"),
        (["eval", *GIVEN, "--texts=a=texts.txt", "--out=o"], lambda: link("o/report.html", "texts.txt"),
         "got o/report.html, which is --texts a"),
        (["eval", *GIVEN, "--out=."], lambda: Path("scores.json").write_text('{"own": 1}'),
         "--out: expected no file that sparc_kernels did not write, got scores.json: take another"),
        (["eval", *GIVEN, "--out=."], lambda: Path("report.html").write_text("<!doctype html><p>mine"),
         "--out: expected no file that sparc_kernels did not write, got report.html: take another"),
        (["show", "3", *GIVEN, "--html=page.html"], lambda: Path("page.html").write_text("mine"),
         "--html: expected no file that sparc_kernels did not write, got page.html: take another"),
        (["show", "3", *GIVEN, "--html=page.html"], lambda: link("./page.html", "b.npy"),
         "--html: expected a file that is not read, got page.html, which is stream 'b' (b.npy)"),
        (["show", "3", *GIVEN, "--html=a.npy"], lambda: None,
         "--html: expected a file ending in .html or .htm, got a.npy"),
        (["show", "3", *GIVEN, "--html=run/model.safetensors"], lambda: None,
         "--html: expected a file ending in .html or .htm, got run/model.safetensors"),
    ],
)  # fmt: skip
def test_no_input_and_no_file_of_anothers_is_written_over(here, capsys, monkeypatch, command, make, words):
    make()
    before = contents(here)
    monkeypatch.setattr(Features, "check", lambda self: pytest.fail("read before it was refused"))
    assert cli.main(command) == 2
    assert words in capsys.readouterr().err
    assert contents(here) == before


def test_what_the_same_command_wrote_is_replaced(here, capsys):
    commands = [["encode", *GIVEN, "--out=o"], ["encode", *GIVEN, "--out=o", "--format=safetensors"],
                ["eval", *GIVEN, "--out=o", "--no-retrieval"], ["show", "3", *GIVEN, "--html=o/page.htm"]]  # fmt: skip
    for command in commands:
        assert cli.main(command) == 0
    before = contents(here)
    assert {path.name for path in (here / "o").iterdir()} == {
        "a.npz", "b.npz", "a.safetensors", "b.safetensors", "scores.json", "report.html", "page.htm"}  # fmt: skip
    for command in commands:
        assert cli.main(command) == 0, capsys.readouterr().err
    assert contents(here).keys() == before.keys()


def test_codes_from_python_go_over_no_features_either(here):
    os.rename("a_0.safetensors", "a.safetensors")
    before = contents(here)
    model = load_model("run")[0]
    for streams in ({"a": ["a.safetensors", "a_1.safetensors"], "b": "b.npy"}, {"a": "a.npy", "b": "b.npy"}):
        with pytest.raises(ValueError, match=r"out: expected .*, got a\.safetensors"), Features(streams) as features:
            write_codes(model, features, "", "safetensors")
    assert contents(here) == before


LONG = "x" * 247 + ".html"  # it fits, but not while it is written


@pytest.mark.parametrize(
    ("command", "file", "got"),
    [
        (["eval", *GIVEN, "--out=locked"], "scores.json", "locked, Permission denied"),
        (["encode", *GIVEN, "--out=locked/o"], "a.npz", "locked/o, Permission denied"),
        (["show", "3", *GIVEN, "--html=locked/x.html"], "x.html", "locked, Permission denied"),
        (["encode", *GIVEN, "--out=a.npy"], "a.npz", "a.npy, a file"),
        (["eval", *GIVEN, "--out=dangling"], "scores.json", "dangling, a link to nothing"),
        (["show", "3", *GIVEN, "--html=a.npy/x.html"], "x.html", "a.npy, a file"),
        (["show", "3", *GIVEN, f"--html={LONG}"], LONG, "., File name too long"),
    ],
)
def test_places_to_write_in_are_tried_before_the_work(here, capsys, monkeypatch, command, file, got):
    (here / "locked").mkdir()
    os.symlink("nowhere", "dangling")
    mkdir, write_bytes = Path.mkdir, Path.write_bytes

    def locked(work):
        def run(path, *args, **kwargs):
            if path.parts[:1] == ("locked",) and len(path.parts) > 1:  # root may write everywhere
                raise PermissionError(13, "Permission denied", str(path))
            return work(path, *args, **kwargs)

        return run

    monkeypatch.setattr(Path, "mkdir", locked(mkdir))
    monkeypatch.setattr(Path, "write_bytes", locked(write_bytes))
    monkeypatch.setattr(Features, "check", lambda self: pytest.fail("read before the place was tried"))
    before = sorted(here.rglob("*"))
    assert cli.main(command) == 2
    flag = command[-1].partition("=")[0]
    words = f"error: {flag}: expected a folder in which {file} can be written, got {got}\n"
    assert capsys.readouterr().err.endswith(words)
    assert sorted(here.rglob("*")) == before


def test_folders_are_made_and_go_again_where_nothing_is_written(here, capsys):
    assert cli.main(["show", "3", *GIVEN, "--html=new/deep/x.html"]) == 0 and (here / "new/deep/x.html").exists()
    for command in (["encode", "--out=o/deep"], ["eval", "--out=o/deep"], ["show", "3", "--html=o/deep/x.html"]):
        assert cli.main([*command, *GIVEN, "--stream=c=none.npy"]) == 2
        assert "stream 'c' (none.npy): expected a file" in capsys.readouterr().err and not (here / "o").exists()


def test_streams_whose_names_are_too_long_for_a_file_are_refused_at_once(here, capsys, monkeypatch):
    monkeypatch.setattr(Features, "check", lambda self: pytest.fail("read before it was refused"))
    most = 255 - len(f".npz.{os.getpid()}.tmp")
    for name in ("n" * (most + 1), "\N{GREEK SMALL LETTER ALPHA}" * (most // 2 + 1)):
        assert cli.main(["encode", *GIVEN, f"--stream={name}=a.npy", "--out=o"]) == 2
        assert f"streams: expected names of at most {most} bytes, got '{name}'" in capsys.readouterr().err
    monkeypatch.undo()
    os.chdir(here)
    save_weights(AlignedSAE({"n" * most: 6}, 16, 3), here / "m.safetensors")
    assert cli.main(["encode", "--model=m.safetensors", f"--stream={'n' * most}=a.npy", "--out=o"]) == 0


@pytest.mark.parametrize("command", [["eval", "--out=o"], ["show", "3", "--html=page.html"]])
def test_the_package_that_makes_pages_is_named_before_the_work(here, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(Features, "check", lambda self: pytest.fail("read before it was refused"))
    assert cli.main([*command, *GIVEN]) == 2
    assert capsys.readouterr().err.endswith("error: writing a page needs jinja2: pip install jinja2\n")


class Parsed(HTMLParser):
    """The elements and the texts of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def test_names_and_texts_are_no_html():
    name, title, texts = 'a<i>"', "run <b>&amp; 'more'", ["<script>alert(1)</script>", "2 < 3 & 4"]
    page = Parsed(latent_page(title, {name: [0, 1], "b": [7, 5]}, {name: texts}))
    assert {tag for tag, _ in page.elements} == {"html", "meta", "title", "style", "h1", "div", "b", "br"}
    assert page.elements[2] == ("meta", {"name": "generator", "content": "written by sparc_kernels"})
    assert page.texts[:1] + page.texts[2:] == [title, title, name, *texts, "b", "rows 7, 5"]


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("large", [10**7, 10**12, 2**64 - 1])
def test_class_numbers_may_be_large(here, large):
    """Columns are the numbers that occur, and scores those of small ones."""
    kinds = np.arange(ROWS) % 3
    command = ["eval", *GIVEN, "--no-retrieval", "--no-probe", "--texts=a=texts.txt"]
    scores, pages = [], []
    for name, numbers in (("small", [0, 1, 2]), ("large", [0, 5, large])):
        np.save(f"{name}.npy", np.array(numbers, np.uint64)[kinds])
        assert cli.main([*command, f"--labels={name}.npy", f"--out={name}"]) == 0
        scores.append(json.loads((here / name / "scores.json").read_text()))
        pages.append((here / name / "report.html").read_text())
    assert scores[0] == scores[1] and "jaccard" in scores[0]["own"]
    got, numbers = read_labels(here / "large.npy", ROWS)
    assert got.shape == (ROWS, 3) and got.int().argmax(1).tolist() == kinds.tolist() and numbers == [0, 5, large]
    named = {re.sub("<.*", "", title) for title in re.findall("<h3>(class [0-9]+)", pages[1])}
    assert named and named <= {f"class {number}" for number in (0, 5, large)}


def test_names_are_those_of_class_numbers(here):
    (here / "names.txt").write_text("zero\none\ntwo\nthree\n")
    assert read_names(Path("names.txt"), 2, [0, 2]) == ["zero", "two"]
    with pytest.raises(ValueError, match=r"label names names.txt: expected 5 lines or more, one a class number, got 4"):
        read_names(Path("names.txt"), 2, [0, 4])
    with pytest.raises(ValueError, match=r"expected 3 lines, one a class, got 4"):
        read_names(Path("names.txt"), 3, None)


def test_more_labels_than_memory_holds_are_refused_by_name(here, monkeypatch):
    monkeypatch.setattr(labels, "_MOST", 400)
    np.save("n.npy", np.arange(ROWS))
    sparse.save_npz("m.npz", sparse.csr_matrix((ROWS, 10**12)))
    for name, count in (("n.npy", "40"), ("m.npz", "1,000,000,000,000")):
        with pytest.raises(ValueError, match=f"labels {name}: expected at most 10 classes with 40 rows, got {count}$"):
            read_labels(Path(name), ROWS)


def test_labels_are_read_before_all_features_are_looked_at(here, capsys, monkeypatch):
    monkeypatch.setattr(Features, "check", lambda self: pytest.fail("read before labels were"))
    assert cli.main(["eval", *GIVEN, "--labels=texts.txt", "--out=o"]) == 2
    assert "labels texts.txt: expected a NumPy .npy file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["encode", "--out=o"], ["eval", "--out=o"], ["show", "3"]])
def test_alone_is_named_where_streams_are_missing(here, capsys, command):
    only = [*command, "--model=run", "--stream=b=b.npy", "--device=cpu"]
    assert cli.main(only) == 2
    words = "expected a, b, the streams of the model run, or --alone, with which some of them are enough, got b\n"
    assert capsys.readouterr().err.endswith(words)
    assert cli.main([*only, "--stream=z=a.npy"]) == 2 and "--alone" not in capsys.readouterr().err
    assert cli.main([*only, "--alone"]) == 0


# --------------------------------------------------------------------------------------------------------------- scores


def test_scores_without_a_value_are_null(here):
    for s, d in WIDTHS.items():
        np.save(f"{s}.npy", np.ones((1, d), np.float32))
    np.save("labels.npy", np.ones((1, 3), int))
    assert cli.main(["eval", *GIVEN, "--labels=labels.npy", "--out=o"]) == 0
    scores = json.loads((here / "o" / "scores.json").read_text(), parse_constant=pytest.fail)
    assert scores["own"]["explained_variance"] == {f"{t}<-{s}": None for t in WIDTHS for s in WIDTHS}
    assert scores["own"]["explained_variance_self"] is None and scores["own"]["jaccard"] is not None
    assert finite({"x": [float("inf"), 1.5, "NaN"]}) == {"x": [None, 1.5, "NaN"]}
