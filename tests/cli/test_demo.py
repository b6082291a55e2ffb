"""The demo as a user starts it, and its parts."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sparc_kernels import AlignedSAE, cli
from sparc_kernels.cli import demo
from sparc_kernels.data import StreamData, one_thread

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "sparc_kernels", "demo"]
# one thread: two wait for each other beside another test
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.subprocess
def test_ctrl_c_leaves_cleanly(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert "Building the data" in process.stdout.readline()
        time.sleep(1)
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            try:
                _, stderr = process.communicate(timeout=15)
                break
            except subprocess.TimeoutExpired:  # Python loses the first one inside a finaliser of an import
                continue
    finally:
        process.kill()
    assert process.returncode == 130
    lost = r"Exception ignored in.*?\nKeyboardInterrupt: *\n"  # Python's own words on one that it lost
    assert re.sub(lost, "", stderr, flags=re.DOTALL).strip() == "Interrupted."


def test_ctrl_c_while_training_leaves_cleanly(tmp_path, capsys, monkeypatch):
    """Where the Trainer takes the signal, after a step."""
    monkeypatch.setattr(demo, "import_matplotlib", lambda: None)
    monkeypatch.setattr(demo, "QUICK", demo.Settings(steps=5, lr=1e-3, batch_size=8))
    data = StreamData(
        streams(), streams(), torch.ones(64, 2).bool(), ("A", "B"), (), (), {}, torch.arange(64), torch.arange(64)
    )
    monkeypatch.setattr(demo, "unicode_streams", lambda seed, quick: data)
    compute_loss = AlignedSAE.compute_loss

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return compute_loss(*args)

    monkeypatch.setattr(AlignedSAE, "compute_loss", interrupted)
    assert cli.main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_what_stands_in_the_way_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    cases = [
        (["--out", str(tmp_path / "file" / "below")], "--out"),
        (["--out", str(tmp_path / "file")], "--out"),
        (["--out", str(tmp_path), "--seed", "-1"], "--seed: expected an integer in 0..4294967295, got -1"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases.append((["--device", "cuda"], "got 'cuda' where PyTorch sees no GPU"))
    for arguments, message in cases:
        assert cli.main(["demo", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "drawing figures needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_only_data_writes_what_train_and_eval_take(tmp_path, monkeypatch, capsys):
    n = torch.Generator().manual_seed(0)
    x = {s: torch.randn(20, 4, generator=n) for s in ("sans", "serif", "name")}
    rows = torch.arange(20)
    data = StreamData(
        {s: v[:15] for s, v in x.items()}, {s: v[15:] for s, v in x.items()}, rows[:, None] % 3 == torch.arange(3),
        ("A", "B", "C"), ("x",) * 20, tuple(f"NAME {i}" for i in range(20)),
        {"sans": torch.full((20, 5, 5), 3, dtype=torch.uint8)}, rows[:15], rows[15:],
    )  # fmt: skip
    monkeypatch.setattr(demo, "unicode_streams", lambda seed, quick: data)
    assert cli.main(["demo", "--only-data", "--out", str(tmp_path)]) == 0
    assert "Wrote features" in capsys.readouterr().out
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    kinds = ("sans.npy", "serif.npy", "name.npy", "labels.npy", "names.txt", "sans_images.npy")
    assert files == {f"{part}/{kind}" for part in ("train", "test") for kind in kinds} | {"label_names.txt"}
    assert (np.load(tmp_path / "test" / "name.npy") == x["name"][15:].numpy()).all()
    assert (tmp_path / "test" / "names.txt").read_text().splitlines() == [f"NAME {i}" for i in range(15, 20)]
    assert np.load(tmp_path / "train" / "sans_images.npy").max() == 252


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert cli.main(["demo", "--out", str(tmp_path / "new")]) == 2
    assert "cannot write there" in capsys.readouterr().err


def test_arguments():
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    args = parser.parse_args([])
    assert (args.out, args.quick, args.only_data, args.seed) == (Path("sparc-demo"), False, False, 0)
    assert args.device == "auto"


# ------------------------------------------------------------------------------------------------------------ the parts


def streams(n=64, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {s: torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1) for s, d in (("a", 12), ("b", 9))}


def test_training_step_is_in_the_official_order(monkeypatch):
    model, calls = AlignedSAE({"a": 12, "b": 9}, 32, 4), []
    for name in ("forward", "compute_loss", "unit_norm_decoder_", "project_decoder_grad_", "reinit_dead_"):
        method = getattr(model, name)

        def record(*args, name=name, method=method, **kwargs):
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(model, name, record)
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (calls.append("step"), step(self)))
    settings = demo.Settings(steps=3, lr=1e-3, batch_size=40, reinit_every=2)
    before = model.decoders["a"].weight.clone()
    demo.train_steps(model, streams(), 1.0, settings, seed=0)
    one = ["forward", "compute_loss", "unit_norm_decoder_", "project_decoder_grad_", "step"]
    assert calls == [*one, "reinit_dead_", *one, *one, "reinit_dead_"]
    assert not torch.equal(model.decoders["a"].weight, before)


@one_thread()
def test_training_lowers_the_curves_and_repeats():
    settings, x = demo.Settings(steps=100, lr=3e-3, batch_size=40), streams()

    def train():
        torch.manual_seed(0)
        return demo.train_steps(AlignedSAE({"a": 12, "b": 9}, 32, 4), x, 1.0, settings, seed=0)

    curves = train()
    assert curves["step"] == list(range(10, 101, 10))
    for key in ("self", "cross"):
        assert curves[key][-1] < 0.8 * curves[key][0]
    assert train() == curves


def test_leads_needs_every_column():
    def score(value):
        return {part: {"jaccard": value, "R@1": value} for part in ("own", "local", "latent")}

    scores = {"global+cross": score(0.9), "global": score(0.5), "local": score(0.1)}
    assert demo.leads(scores)
    for part in ("own", "local", "latent"):
        worse = {**scores, "global": {**scores["global"], part: {"jaccard": 0.9, "R@1": 0.9}}}
        assert not demo.leads(worse)
