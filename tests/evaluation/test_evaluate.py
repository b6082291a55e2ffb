"""`eval`, `encode` and `show`; every score is computed again by scikit-learn and SciPy on dense codes."""

import base64
import io
import json
import re
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from damage import damaged
from PIL import Image
from safetensors.numpy import load_file
from scipy import sparse
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, r2_score
from sklearn.metrics.pairwise import cosine_similarity

from sparc_kernels import AlignedSAE, cli, metrics
from sparc_kernels.core import progress
from sparc_kernels.evaluation.csr import CsrWriter, write_codes
from sparc_kernels.evaluation.evaluate import codes_of, encode, evaluate, guessing, select_locally
from sparc_kernels.evaluation.top_activations import top_activations
from sparc_kernels.io.features import Features
from sparc_kernels.io.labels import Pictures, read_labels
from sparc_kernels.io.weights import export_official, load_model, save_weights
from sparc_kernels.metrics import Codes, Rows, activation_cosine, retrieval, top_rows
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.trainer import Trainer

ROWS, WIDTHS, CLASSES = 400, {"a": 20, "b": 16, "c": 12}, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features of samples with a class, labels, pictures, texts, and a model trained on them."""
    out = tmp_path_factory.mktemp("eval")
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(CLASSES, (ROWS,), generator=g)
    hidden = torch.randn(CLASSES, 8, generator=g)[classes] + 0.7 * torch.randn(ROWS, 8, generator=g)
    for s, d in WIDTHS.items():
        x = hidden @ torch.randn(8, d, generator=g) + 0.3 * torch.randn(ROWS, d, generator=g)
        np.save(out / f"{s}.npy", x.numpy())
    labels = torch.nn.functional.one_hot(classes, CLASSES).bool() | (torch.rand(ROWS, CLASSES, generator=g) < 0.05)
    np.save(out / "labels.npy", labels.numpy())
    (out / "names.txt").write_text("".join(f"class number {i}\n" for i in range(CLASSES)))
    (out / "texts.txt").write_text("".join(f"text of row {i}\n" for i in range(ROWS)))
    np.save(out / "pictures.npy", torch.randint(256, (ROWS, 9, 9), generator=g, dtype=torch.uint8).numpy())
    config = TrainConfig(
        n_latents=64, k=5, auxk=0, batch_size=64, epochs=25, lr=5e-3, dead_steps_threshold=40, reinit_every=10**6
    )
    files = {s: out / f"{s}.npy" for s in WIDTHS}
    Trainer(config, files, out / "run", device="cpu", quiet=True).train()
    return out


def streams(folder) -> list[str]:
    return [f"--stream={s}={folder / s}.npy" for s in WIDTHS]


@pytest.fixture(scope="module")
def evaluated(folder):
    out = folder / "scores"
    command = ["eval", "--model", str(folder / "run"), *streams(folder), "--device", "cpu", "--batch-size", "70",
               f"--labels={folder / 'labels.npy'}", f"--label-names={folder / 'names.txt'}", f"--out={out}",
               f"--images=a={folder / 'pictures.npy'}", f"--texts=b={folder / 'texts.txt'}"]  # fmt: skip
    assert cli.main(command) == 0
    return json.loads((out / "scores.json").read_text()), out


@pytest.fixture(scope="module", params=["own", "local"])
def dense(request, folder):
    """Codes and reconstructions by the equations of the model, in NumPy, on its float32 weights."""
    state = {k: v.double().numpy() for k, v in weights(folder).items()}
    x = {s: np.load(folder / f"{s}.npy") for s in WIDTHS}
    x = {s: v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-8) for s, v in x.items()}
    logits = {
        s: (v - state[f"pre_biases.{s}"]) @ state[f"encoders.{s}.weight"].T + state[f"latent_biases.{s}"]
        for s, v in x.items()
    }
    codes = {}
    for s, h in logits.items():
        selected = np.argsort(-(sum(logits.values()) if request.param == "own" else h), axis=1, kind="stable")[:, :5]
        codes[s] = np.zeros_like(h)
        np.put_along_axis(codes[s], selected, np.maximum(np.take_along_axis(h, selected, 1), 0), 1)
    recons = {
        (t, s): codes[s] @ state[f"decoders.{t}.weight"].T + state[f"pre_biases.{t}"] for t in WIDTHS for s in WIDTHS
    }
    return request.param, x, codes, recons


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load

    return load(folder / "run" / "model.safetensors")


# ---------------------------------------------------------------------------------------------------- the scores again


def test_jaccard_is_scipys(evaluated, dense, folder):
    kind, _, codes, _ = dense
    labels = np.load(folder / "labels.npy").astype(int)
    counts = {
        s: (sparse.csc_matrix(c > 0).T.astype(int) @ sparse.csr_matrix(labels)).toarray() for s, c in codes.items()
    }
    alive = {s: (c > 0).any(0) for s, c in codes.items()}
    scores = []
    for n in range(64):
        pairs = [(counts[s][n], counts[t][n]) for s, t in combinations(WIDTHS, 2) if alive[s][n] and alive[t][n]]
        scores.append(np.mean([np.minimum(p, q).sum() / max(np.maximum(p, q).sum(), 1) for p, q in pairs] or [0.0]))
    recorded = evaluated[0][kind]
    assert recorded["jaccard"] == pytest.approx(np.mean(scores), abs=1e-9) and 0.1 < recorded["jaccard"] < 1
    assert recorded["jaccard_alive"] == pytest.approx(
        np.mean(np.array(scores)[np.any(list(alive.values()), 0)]), abs=1e-9
    )
    number = sum(v.astype(int) for v in alive.values())
    assert recorded["all_dead"] == pytest.approx((number == 0).mean())
    assert recorded["mixed"] == pytest.approx(((number > 0) & (number < 3)).mean())
    assert recorded["all_alive"] == pytest.approx((number == 3).mean())
    assert recorded["l0"] == pytest.approx({s: (c > 0).sum(1).mean() for s, c in codes.items()})


def test_explained_variance_is_scikit_learns(evaluated, dense):
    kind, x, _, recons = dense
    recorded = evaluated[0][kind]
    want = {f"{t}<-{s}": r2_score(x[t], r, multioutput="variance_weighted") for (t, s), r in recons.items()}
    assert recorded["explained_variance"] == pytest.approx(want, abs=1e-5)
    assert recorded["explained_variance_self"] == pytest.approx(np.mean([want[f"{s}<-{s}"] for s in WIDTHS]), abs=1e-5)
    cross = [want[f"{t}<-{s}"] for s, t in permutations(WIDTHS, 2)]
    assert recorded["explained_variance_cross"] == pytest.approx(np.mean(cross), abs=1e-5)


def test_activation_cosine_is_scikit_learns(evaluated, dense):
    kind, _, codes, _ = dense
    want = [np.diag(cosine_similarity(codes[s].T, codes[t].T)).mean() for s, t in combinations(WIDTHS, 2)]
    assert evaluated[0][kind]["activation_cosine"] == pytest.approx(np.mean(want), abs=1e-6)


def ranks(query, target) -> np.ndarray:
    cosines = cosine_similarity(query, target)
    own = np.diag(cosines)[:, None]
    rank = (cosines >= own - 1e-6).sum(1)
    plain = np.array([rankdata(-row, method="max")[i] for i, row in enumerate(cosines)])
    assert (rank >= plain).all() and (rank == plain).mean() > 0.95  # ties within 1e-6 are few
    return rank


@pytest.mark.parametrize("dense", ["local"], indirect=True)  # retrieval always selects locally
def test_retrieval_is_scikit_learns(evaluated, dense):
    _, x, codes, recons = dense
    recorded = evaluated[0]["retrieval"]
    cases = [("latent", f"{t}<-{s}", codes[s], codes[t]) for s, t in permutations(WIDTHS, 2)]
    cases += [("cross_reconstruction", f"{t}<-{s}", recons[t, s], x[t]) for s, t in permutations(WIDTHS, 2)]
    cases += [("self_reconstruction", f"{s}<-{s}", recons[s, s], x[s]) for s in WIDTHS]
    means = {}
    for name, pair, query, target in cases:
        rank = ranks(query, target)
        want = {f"R@{k}": (rank <= k).mean() for k in (1, 5, 10)}
        want |= {"median_rank": np.sort(rank)[(ROWS - 1) // 2], "MRR": (1 / rank).mean()}
        # a float32 rounding may move a row across a tie
        assert recorded[name][pair] == pytest.approx(want, abs=2 / ROWS), (name, pair)
        means.setdefault(name, []).append(want["R@1"])
    assert len(cases) == sum(len(recorded[name]) for name in means)
    for name, values in means.items():
        assert recorded["mean"][name]["R@1"] == pytest.approx(np.mean(values), abs=2 / ROWS)
    assert evaluated[0]["chance"]["R@5"] == 5 / ROWS


def test_probe_is_scikit_learns(evaluated, dense, folder):
    """With the rows that `probe_1d` draws: the same candidates, the same best one, the same loss."""
    kind, _, codes, _ = dense
    labels = np.load(folder / "labels.npy")
    x, losses = codes["b"], []
    for c in range(CLASSES):
        positive, negative = metrics._balanced_rows(torch.from_numpy(labels[:, c]), c).numpy()
        m = len(positive)
        if m <= 50:
            continue
        cuts = [round(0.7 * m), round(0.7 * m) + round(0.15 * m)]
        train, val, test = (
            np.concatenate(p) for p in zip(np.split(positive, cuts), np.split(negative, cuts), strict=True)
        )
        together = (x[labels[:, c]] > 0).sum(0)
        candidates = [n for n in np.argsort(-together, kind="stable") if (x[train, n] > 0).any()][:20]
        fits = [
            LogisticRegression(tol=1e-10, max_iter=1000).fit(x[train][:, [n]], labels[train, c]) for n in candidates
        ]
        scored = [
            log_loss(labels[val, c], f.predict_proba(x[val][:, [n]])) for f, n in zip(fits, candidates, strict=True)
        ]
        best = int(np.argmin(scored))
        losses.append(log_loss(labels[test, c], fits[best].predict_proba(x[test][:, [candidates[best]]])))
    recorded = evaluated[0][kind]["probe"]["b"]
    assert recorded["classes"] == len(losses) > 0
    assert recorded["log_loss"] == pytest.approx(np.mean(losses), abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_holds_everything_in_one_file(evaluated):
    _, out = evaluated
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(p))) for p in re.findall(r"base64,([^\"]+)", page)]
    figures = [p for p in pictures if p.width > 400]
    assert len(figures) == 3 and all(len(np.unique(np.asarray(f))) > 20 for f in figures)
    assert len(pictures) > 20  # thumbnails of the gallery
    for text in ("Jaccard of the latents", "Dead latents", "Explained variance", "Retrieval", "1-D probes",
                 "class number", "text of row", "cross reconstruction, a&lt;-b", "chance"):  # fmt: skip
        assert text in page, text


def test_without_labels_and_pictures(folder, tmp_path, capsys):
    command = ["eval", "--model", str(folder / "run"), *streams(folder), f"--out={tmp_path}", "--no-retrieval"]
    assert cli.main(command) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert "jaccard" not in scores["own"] and "retrieval" not in scores and "explained_variance" in scores["own"]
    assert "explained variance, self" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "Jaccard" not in page and "What excites" not in page


def test_local_models_have_one_selection(folder, tmp_path):
    model = AlignedSAE(WIDTHS, 64, 5, topk_type="local")
    save_weights(model, tmp_path / "local.safetensors")
    command = ["eval", f"--model={tmp_path / 'local.safetensors'}", *streams(folder), f"--out={tmp_path}"]
    assert cli.main([*command, f"--labels={folder / 'labels.npy'}", "--no-probe"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["own"] == scores["local"] and "probe" not in scores["own"]
    assert "selected as in training" not in (tmp_path / "report.html").read_text()


def test_one_stream_is_enough(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32))
    save_weights(AlignedSAE({"x": 8}, 16, 3), tmp_path / "m.safetensors")
    command = ["eval", f"--model={tmp_path / 'm.safetensors'}", f"--stream=x={tmp_path / 'x.npy'}", f"--out={tmp_path}"]
    assert cli.main(command) == 0
    assert "explained_variance_cross" not in json.loads((tmp_path / "scores.json").read_text())["own"]


# ------------------------------------------------------------------------------------------------------ encode and show


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_encode_writes_the_codes(folder, dense, tmp_path, form):
    kind, _, codes, _ = dense
    command = ["encode", "--model", str(folder / "run"), *streams(folder), f"--out={tmp_path}", f"--format={form}",
               "--batch-size=64", *(["--alone"] if kind == "local" else [])]  # fmt: skip
    assert cli.main(command) == 0
    assert {f.name for f in tmp_path.iterdir()} == {f"{s}.{form}" for s in WIDTHS}
    for s, want in codes.items():
        path = tmp_path / f"{s}.{form}"
        if form == "npz":
            got = sparse.load_npz(path)
        else:
            parts = load_file(path)
            got = sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=parts["shape"])
        assert got.shape == (ROWS, 64) and got.has_canonical_format and (got.data > 0).all()
        np.testing.assert_allclose(got.toarray(), want, atol=1e-6)
        assert ((got.toarray() > 0) != (want > 1e-6)).mean() < 1e-3


def test_show_lists_the_rows_that_fire_most(folder, dense, tmp_path, capsys):
    kind, _, codes, _ = dense
    latent = int(np.argmax(np.min([(c > 0).sum(0) for c in codes.values()], axis=0)))
    command = ["show", str(latent), "--model", str(folder / "run"), *streams(folder), "--top=4", "--batch-size=50",
               f"--texts=b={folder / 'texts.txt'}", f"--images=a={folder / 'pictures.npy'}",
               f"--html={tmp_path / 'latent.html'}", *(["--alone"] if kind == "local" else [])]  # fmt: skip
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    for s, c in codes.items():
        assert f"{s}: latent {latent} fires on {(c[:, latent] > 0).sum():,} of 400 rows" in text
        for row in np.argsort(-c[:, latent], kind="stable")[:4]:
            assert f"{c[row, latent]:8.4f}  row {row}" in text
    assert f"text of row {np.argmax(codes['b'][:, latent])}" in text
    assert "base64," in (tmp_path / "latent.html").read_text()


@pytest.mark.parametrize("given", [["--k=3"], ["--k=3", "--topk-type=local"], ["--no-normalize"], ["--k=5"]])
def test_settings_other_than_the_models_are_said(folder, tmp_path, capsys, given):
    command = ["eval", f"--model={folder / 'run'}", *streams(folder), f"--out={tmp_path}", *given]
    assert cli.main([*command, f"--labels={folder / 'labels.npy'}", "--no-retrieval", "--no-probe"]) == 0
    text, page = capsys.readouterr(), (tmp_path / "report.html").read_text()
    scores = json.loads((tmp_path / "scores.json").read_text())
    if given == ["--k=5"]:  # as trained
        assert scores["trained"] == {} and "Note" not in text.err and "selected as in training" in text.out
        return
    want = {"--k=3": {"k": 5}, "--topk-type=local": {"topk_type": "global"}, "--no-normalize": {"normalize": True}}
    assert scores["trained"] == {key: had for part in given for key, had in want[part].items()}
    for key, had in scores["trained"].items():
        assert f"Note: {key} {scores[key]}, where the model was trained with {had}" in text.err
        assert f"Not as trained: {key} {scores[key]} instead of {had}" in text.out
    but = ", ".join(f"{key} {had}" for key, had in scores["trained"].items())
    assert "as in training" not in text.out + page and f"but {but} in training" in page
    assert ("with k 3" in text.out) == ("with k 3" in page) == (given == ["--k=3"]) and "each stream alone" in page
    assert (scores["own"] == scores["local"]) == (scores["topk_type"] == "local")


def test_alone_wants_only_the_streams_that_are_given(folder, tmp_path, capsys):
    model, (a, b, _) = f"--model={folder / 'run'}", streams(folder)
    for given, out in (([*streams(folder)], "all"), ([b], "one")):
        assert cli.main(["encode", model, *given, "--alone", f"--out={tmp_path / out}"]) == 0
    got, want = (sparse.load_npz(tmp_path / out / "b.npz") for out in ("one", "all"))
    assert (got != want).nnz == 0 and [f.name for f in (tmp_path / "one").iterdir()] == ["b.npz"]
    capsys.readouterr()
    assert cli.main(["show", "1", model, b, "--alone"]) == 0
    assert "b: latent 1 fires on" in capsys.readouterr().out
    labels = f"--labels={folder / 'labels.npy'}"
    assert cli.main(["eval", model, b, a, labels, "--alone", "--no-probe", f"--out={tmp_path}"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["own"]["explained_variance"]) == {f"{t}<-{s}" for t in "ab" for s in "ab"}
    assert set(scores["retrieval"]["latent"]) == {"a<-b", "b<-a"} and scores["topk_type"] == "local"
    for command in (["encode", f"--out={tmp_path}"], ["show", "1"], ["eval", f"--out={tmp_path}"]):
        assert cli.main([*command, model, b]) == 2
        assert "streams: expected a, b, c, the streams of the model" in capsys.readouterr().err
        assert cli.main([*command, model, "--alone", f"--stream=z={folder / 'a.npy'}"]) == 2
        assert "streams: expected a, b, c, the streams of the model" in capsys.readouterr().err


def test_progress_and_where_scores_go_are_said_on_stderr(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    monkeypatch.chdir(tmp_path)
    given = [f"--model={folder / 'run'}", *streams(folder), "--batch-size=300"]
    for command in (["eval", "--no-retrieval"], ["encode", "--out=codes"], ["show", "1"]):
        assert cli.main([*command, *given]) == 0
        text = capsys.readouterr()
        lines = [f"{command[0]}: {rows} of 400 rows" for rows in (300, 400)] * (1 + (command[0] == "eval"))
        assert [line for line in text.err.splitlines() if line.startswith(f"{command[0]}: ")] == lines
        if command[0] == "eval":
            assert "Scores and report go to sparc-eval" in text.err and (tmp_path / "sparc-eval/scores.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_dtype_are_read(folder, tmp_path, dtype):
    save_weights(AlignedSAE(WIDTHS, 64, 5, dtype=dtype), tmp_path / "m.safetensors")
    command = ["encode", f"--model={tmp_path / 'm.safetensors'}", *streams(folder), f"--out={tmp_path}", "--device=cpu"]
    assert cli.main(command) == 0
    assert sparse.load_npz(tmp_path / "a.npz").dtype == (np.float64 if dtype == torch.float64 else np.float32)


def test_what_weights_do_not_tell_is_asked_for_at_once(folder, tmp_path, capsys):
    path = export_official(AlignedSAE(WIDTHS, 64, 5), tmp_path)
    path.with_name("run_config.json").unlink()
    command = ["show", "1", f"--model={path}", *streams(folder)]
    assert cli.main(command) == 2
    assert f"model {path}: expected k and topk_type, which weights do not tell" in capsys.readouterr().err
    assert cli.main([*command, "--k=5", "--topk-type=global"]) == 0


# ------------------------------------------------------------------------------------------------------------- refusals


def refusals(folder):
    other = folder / "other"
    other.mkdir(exist_ok=True)
    np.save(other / "few.npy", np.ones((ROWS - 1, CLASSES), bool))
    np.save(other / "floats.npy", np.ones((ROWS, CLASSES)))
    np.save(other / "one.npy", np.array(3))
    np.save(other / "twos.npy", np.full((ROWS, CLASSES), 2))
    (other / "text.txt").write_text("one line\n")
    (other / "broken.npz").write_bytes(b"PK")
    (other / "weights.safetensors").write_bytes(b"xx")
    torch.save([1, 2], other / "list.pth")
    torch.save({"fc.weight": torch.ones(2, 2)}, other / "other.pth")
    labels = "--labels={}".format
    few, floats, twos = (other / f"{name}.npy" for name in ("few", "floats", "twos"))
    return [
        (["--model=nowhere"], "model nowhere: expected a folder of a training run or a file of weights, got nothing"),
        ([f"--model={other}"], "expected model.safetensors, checkpoints/step-* or msae_checkpoint.pth in it"),
        ([f"--model={other / 'weights.safetensors'}"], "expected a complete safetensors file"),
        ([f"--model={other / 'list.pth'}"], "expected a dict of tensors, got something else"),
        ([f"--model={other / 'other.pth'}"], "expected weights of a SPARC model (encoders.NAME.weight ...)"),
        ([f"--model={other / 'text.txt'}"], "expected a torch file of tensors"),
        (["--stream=d=x.npy"], "stream 'd' (x.npy): expected a file, got nothing there"),
        ([labels(few)], f"labels {few}: expected 400 rows as the features, got 399"),
        ([labels(floats)], f"labels {floats}: expected whole numbers or booleans, got float64"),
        ([labels(twos)], f"labels {twos}: expected 0 and 1 of shape [n, C]"),
        ([labels(other / "one.npy")], "expected 0 and 1 of shape [n, C], or class numbers [n], got shape []"),
        ([labels(other / "broken.npz")], "expected a matrix of scipy.sparse.save_npz"),
        ([labels(other / "none.npy")], "expected a .npy or .npz file, got nothing there"),
        ([labels(folder / "labels.npy"), f"--label-names={other / 'text.txt'}"], "expected 6 lines, one a class"),
        ([f"--texts=b={other / 'text.txt'}"], "expected 400 rows as the features, got 1"),
        (["--texts=z=x.txt"], "--texts: expected a stream among a, b, c, got 'z'"),
        ([f"--images=a={folder / 'a.npy'}"], "expected uint8 [n, h, w] or [n, h, w, 3], got float32 [400, 20]"),
        (["--batch-size=0"], "--batch-size: expected an int >= 1, got 0"),
        ([f"--out={other / 'text.txt'}"], f"which scores.json can be written, got {other / 'text.txt'}, a file"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(19))
def test_refused_by_name(folder, capsys, number):
    given, words = refusals(folder)[number]
    model = [] if any(part.startswith("--model") for part in given) else [f"--model={folder / 'run'}"]
    assert cli.main(["eval", *model, *streams(folder), f"--out={folder / 'x'}", "--device=cpu", *given]) == 2
    error = capsys.readouterr().err
    assert words in error, error


def test_other_refusals(folder, capsys):
    model = ["--model", str(folder / "run")]
    for command, words in (
        (["show", "64", *model, *streams(folder)], "latent: expected one in 0..63, got 64"),
        (["show", "1", *model, *streams(folder), "--top=0"], "--top: expected an int >= 1, got 0"),
        (
            ["encode", *model, *streams(folder)[:2], f"--out={folder / 'y'}"],
            "streams: expected a, b, c, the",
        ),
    ):
        assert cli.main(command) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b", "/nowhere/b"])
def test_codes_go_to_no_other_folder(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((9, 4), np.float32))
    save_weights(AlignedSAE({"b": 4, name: 4}, 16, 3), tmp_path / "m.safetensors")
    command = ["encode", "--model=m.safetensors", "--stream=b=x.npy", f"--stream={name}=x.npy", "--out=out"]
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Features, "check", lambda self: pytest.fail("read before it was refused"))
    assert cli.main(command) == 2
    words = f"streams: expected names that can name a file, without a slash, got {name!r}"
    assert capsys.readouterr().err == f"sparc-kernels encode: error: {words}\n"
    with pytest.raises(ValueError, match="streams: expected names that can name a file"):
        write_codes(load_model("m.safetensors")[0], Features({"b": "x.npy", name: "x.npy"}), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out" / "b.npz").mkdir(parents=True)
    assert cli.main([*command[:3], "--out=out"]) == 2
    assert "out: expected no folder b.npz in out, got one" in capsys.readouterr().err


def test_codes_of_all_streams_are_written_or_none(folder, tmp_path, capsys, monkeypatch):
    finish = CsrWriter.finish

    def full_disk(writer):
        if writer.path.name == "c.npz":
            raise OSError("No space left on device")
        return finish(writer)

    monkeypatch.setattr(CsrWriter, "finish", full_disk)
    assert cli.main(["encode", "--model", str(folder / "run"), *streams(folder), f"--out={tmp_path}"]) == 2
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "encode", "show"])
def test_rows_that_are_not_finite_are_named_and_nothing_is_written(folder, tmp_path, capsys, command):
    x = np.load(folder / "b.npy")
    x[[7, 300], 3] = np.nan
    np.save(tmp_path / "b.npy", x)
    files = [f"--stream={s}={(tmp_path if s == 'b' else folder) / s}.npy" for s in WIDTHS]
    given = {"eval": [f"--out={tmp_path / 'out'}"], "encode": [f"--out={tmp_path / 'out'}"], "show": ["3"]}[command]
    assert cli.main([command, *given, "--model", str(folder / "run"), *files, "--device=cpu"]) == 2
    words = f"stream 'b' ({tmp_path / 'b.npy'}): expected finite features, got NaN or infinity in 2 rows: 7, 300"
    assert capsys.readouterr().err == f"sparc-kernels {command}: error: {words}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["b.npy"]


def test_codes_of_rows_that_are_not_finite_are_refused_in_python_too(folder, tmp_path):
    x = {s: torch.from_numpy(np.load(folder / f"{s}.npy")) for s in WIDTHS}
    x["c"][399, 0] = np.inf
    model = load_model(folder / "run")[0]
    for use in (
        lambda f: write_codes(model, f, tmp_path),
        lambda f: encode(model, f),
        lambda f: top_activations(model, f, 3, 5),
        lambda f: evaluate(model, f),
    ):
        with pytest.raises(
            ValueError, match=r"stream 'c': expected finite features, got NaN or infinity in 1 rows: 399"
        ):
            use(Features(x))
    assert not list(tmp_path.iterdir())


def test_zero_rows_are_told(folder, tmp_path, capsys):
    x = np.load(folder / "b.npy")
    x[[7, 300]] = 0
    np.save(tmp_path / "b.npy", x)
    files = [f"--stream={s}={(tmp_path if s == 'b' else folder) / s}.npy" for s in WIDTHS]
    command = ["eval", "--model", str(folder / "run"), *files, f"--out={tmp_path}", "--device=cpu"]
    assert cli.main(command) == 0
    assert "Note: stream 'b' has 2 zero rows (7, 300) of 400" in capsys.readouterr().err
    assert "NaN" not in (tmp_path / "scores.json").read_text()


@pytest.mark.parametrize("seed", range(30))
def test_damaged_labels_and_pictures_are_refused_by_name_or_read(tmp_path, seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 2, (40, 6)).astype(bool)
    kind, path = ("sparse", "labels", "pictures")[seed % 3], tmp_path / ("x.npy" if seed % 3 else "x.npz")
    if kind == "sparse":
        sparse.save_npz(path, sparse.csr_matrix(x))
    else:
        np.save(path, x if kind == "labels" else generator.integers(255, size=(40, 5, 5), dtype=np.uint8))
    path.write_bytes(damaged(path.read_bytes(), generator))
    try:
        got = Pictures("--images a", path).array if kind == "pictures" else read_labels(path, 40)[0]
    except ValueError as error:
        assert str(error).startswith(("--images a: expected ", f"labels {path}: expected ")), error
    else:
        assert len(got) == (len(np.load(path)) if kind == "pictures" else 40)


def test_sparse_labels_and_class_numbers(folder, tmp_path):
    labels = np.load(folder / "labels.npy")
    sparse.save_npz(tmp_path / "l.npz", sparse.csr_matrix(labels))
    assert (read_labels(tmp_path / "l.npz", ROWS)[0].numpy() == labels).all()
    np.save(tmp_path / "n.npy", np.array([2, 0, 1]))
    assert read_labels(tmp_path / "n.npy", 3)[0].tolist() == [
        [False, False, True],
        [True, False, False],
        [False, True, False],
    ]


# ------------------------------------------------------------------------------------------------------------ the parts


def test_retrieval_of_rows_read_in_blocks(monkeypatch):
    """The same ranks whatever the blocks, and never more than a block of cosines."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 7, generator=g)
    y = x + torch.randn(90, 7, generator=g)
    want = retrieval(x, y)
    asked = []

    def lazily(t):
        return Rows((90, 7), lambda a, b: (asked.append(b - a), t[a:b])[1])

    for elements in (14, 130, 1000):
        monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", elements)
        asked.clear()
        assert retrieval(lazily(x), lazily(y)) == pytest.approx(want)
        assert max(asked) * 7 <= max(elements, 7)
    with pytest.raises(ValueError, match="target: expected shape"):
        retrieval(lazily(x), Rows((90, 8), lambda a, b: x[a:b]))


def test_activation_cosine_and_top_rows(monkeypatch):
    g = torch.Generator().manual_seed(0)
    codes = {
        s: Codes(torch.rand(50, 20, generator=g).argsort(1)[:, :3], torch.rand(50, 3, generator=g), 20) for s in "ab"
    }
    full = {s: torch.zeros(50, 20).scatter(1, c.indices, c.values) for s, c in codes.items()}
    want = torch.nn.functional.cosine_similarity(full["a"].double(), full["b"].double(), dim=0)
    for elements in (60, 2**24):
        monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(activation_cosine(codes), want, rtol=1e-6, atol=1e-9)
    rows, values = top_rows(codes["a"], 4, 3)
    assert torch.equal(values, full["a"][:, 4].topk(3).values) and torch.equal(full["a"][rows, 4], values)
    assert len(top_rows(codes["a"], 4, 1000)[0]) == (full["a"][:, 4] > 0).sum()
    with pytest.raises(ValueError, match=r"latent: expected an int in 0..19"):
        top_rows(codes["a"], 20, 1)


def test_evaluate_leaves_the_model_alone(folder):
    model = AlignedSAE(WIDTHS, 64, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with Features({s: folder / f"{s}.npy" for s in WIDTHS}) as features:
        scores, codes = evaluate(model, features, retrieve=False)
        again = encode(model, features, 33)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(again["a"].indices, codes["own"]["a"].indices) and scores["rows"] == ROWS


def test_local_selection_keeps_the_weights():
    model = AlignedSAE({"a": 12, "b": 9}, 32, 4)
    local = select_locally(model)
    assert local.topk_type == "local" and not local.training
    assert all(torch.equal(local.state_dict()[key], value) for key, value in model.state_dict().items())
    g = torch.Generator().manual_seed(0)
    x = {s: torch.randn(64, d, generator=g) for s, d in (("a", 12), ("b", 9))}
    codes = codes_of(local(x), 32)
    h = (x["b"] - model.pre_biases["b"]) @ model.encoders["b"].weight.T + model.latent_biases["b"]
    assert torch.equal(codes["b"].indices.sort(1).values, h.topk(4).indices.sort(1).values)


def test_guessing():
    assert guessing(4) == pytest.approx({"R@1": 0.25, "R@5": 1.0, "R@10": 1.0, "MRR": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4})
