"""The Trainer against a plain loop, what it leaves on disk, and going on after every kind of end."""

import csv
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CUDA, DEVICE
from scripts.kill_and_resume import ROOT, arguments, kill_and_resume, make_features
from sklearn.metrics import r2_score

from sparc_kernels import AlignedSAE, cli
from sparc_kernels.io import run_checkpoints
from sparc_kernels.io.run_checkpoints import load_checkpoint, load_latest, save_checkpoint
from sparc_kernels.io.weights import export_official, load_model
from sparc_kernels.train import log as runlog
from sparc_kernels.train import process
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.data import split
from sparc_kernels.train.trainer import Interrupted, Trainer, TrainingStopped

ROWS, WIDTHS = 700, {"a": 20, "b": 12}
SMALL = TrainConfig(
    n_latents=48, k=4, auxk=6, batch_size=64, epochs=6, lr=3e-3, dead_steps_threshold=9, reinit_every=20, seed=3
)


@functools.cache
def streams() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 6, generator=g)
    return {s: hidden @ torch.randn(6, d, generator=g) + 0.3 * torch.randn(ROWS, d, generator=g)
            for s, d in WIDTHS.items()}  # fmt: skip


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**vars(SMALL), **changes})


def trainer(settings=SMALL, data=None, out=None, **options) -> Trainer:
    return Trainer(settings, data or streams(), out, quiet=True, **{"device": DEVICE, **options})


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(x, b[name]) for name, x in a.items())


def rows_of_log(out: Path) -> list[dict]:
    with open(out / runlog.LOG, newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("topk_type", ["global", "local"])
def test_the_trainer_is_the_official_loop(topk_type):
    """Every operation of the loop written out with torch.optim.Adam, on batches in the order that seed 3 draws."""
    settings = config(topk_type=topk_type, precision="fp64")
    losses = []
    run = trainer(settings, on_step=lambda step, loss, metrics: losses.append(loss.item()), device="cpu")
    run.train()

    torch.manual_seed(3)
    model = AlignedSAE(WIDTHS, 48, 4, 6, dead_steps_threshold=9, topk_type=topk_type, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order, reinit_rng = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    data = {s: x.double() / (x.double().norm(dim=1, keepdim=True) + 1e-8) for s, x in streams().items()}
    expected, reinitialised = [], 0
    for _ in range(6):
        for rows in torch.randperm(ROWS, generator=order).split(64):
            x = {s: t[rows] for s, t in data.items()}
            optimizer.zero_grad()
            loss, _ = model.compute_loss(model(x), x)
            loss.backward()
            model.unit_norm_decoder_().project_decoder_grad_()
            optimizer.step()
            if len(expected) % 20 == 0:
                reinitialised += sum(model.reinit_dead_(generator=reinit_rng).values())
            expected.append(loss.item())
    assert reinitialised > 0
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_gradient_free_steps_are_the_same_steps(tmp_path):
    runs = {}
    for free in (False, True):
        settings = config(gradient_free=free, precision="fp64", weight_decay=0.01, unit_norm="after", epochs=3)
        runs[free] = trainer(settings, out=tmp_path / str(free), device="cpu")
        runs[free].train()
    assert all(p.grad is None for p in runs[True].model.parameters())
    for name, value in runs[False].model.state_dict().items():
        torch.testing.assert_close(runs[True].model.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    logs = [rows_of_log(tmp_path / str(free))[-1] for free in (False, True)]
    assert float(logs[1]["loss"]) == pytest.approx(float(logs[0]["loss"])) and 0 < float(logs[1]["l0"]) <= 4


def test_learning_rate_rises_and_falls():
    settings = config(lr=0.1, warmup=4, decay="linear")
    rates = [settings.lr_at(step, 12) for step in range(12)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4:] == pytest.approx([0.1 * (1 - i / 8) for i in range(8)])
    cosine = config(lr=0.1, decay="cosine")
    assert [cosine.lr_at(s, 4) for s in (0, 2, 4)] == pytest.approx([0.1, 0.05, 0])
    assert {config(lr=0.1).lr_at(s, 9) for s in range(9)} == {0.1}
    seen = []
    run = trainer(config(epochs=1, warmup=4, decay="linear"))
    run.on_step = lambda *_: seen.append(float(run.optimizer.param_groups[0]["lr"]))
    run.train()
    assert seen == pytest.approx([run.config.lr_at(i, 11) for i in range(11)])


def test_validation_holds_out_rows_and_moves_nothing(tmp_path):
    settings = config(val_fraction=0.2, precision="fp64", epochs=2)
    run = trainer(settings, out=tmp_path, device="cpu")
    run.train()
    row = rows_of_log(tmp_path)[-1]
    train_rows, val_rows = split(ROWS, 0.2, 3)
    held_out = torch.cat([torch.arange(*i) for i in val_rows])
    both = torch.cat([held_out, *(torch.arange(*i) for i in train_rows)])
    assert torch.equal(both.sort().values, torch.arange(ROWS)) and 130 <= len(held_out) <= 150
    x = {s: t.double()[held_out] / t.double()[held_out].norm(dim=1, keepdim=True) for s, t in streams().items()}
    model = run.model.eval()
    with torch.no_grad():
        loss, _ = model.compute_loss(model(x), x)
    assert float(row["val_loss"]) == pytest.approx(loss.item(), rel=1e-9)
    without = trainer(config(val_fraction=0.2, epochs=2, precision="fp64"), device="cpu")
    without.data.val_loader = None
    without.train()
    assert same(model.state_dict(), without.model.state_dict())


def test_explained_variance_in_the_log_is_scikit_learns(tmp_path):
    """On validation files equal to the training files; exact for rows of one norm."""
    x = {s: t.numpy() / np.linalg.norm(t, axis=1, keepdims=True) for s, t in streams().items()}
    files = {s: tmp_path / f"{s}.npy" for s in x}
    for s, path in files.items():
        np.save(path, x[s])
    run = trainer(config(epochs=3, precision="fp64"), files, tmp_path / "run", val_streams=files, device="cpu")
    run.train()
    row = rows_of_log(tmp_path / "run")[-1]
    outputs = run.model.eval()({s: torch.from_numpy(v).double() for s, v in x.items()})
    want = np.mean([r2_score(x[s], outputs[f"recon_{s}"].detach(), multioutput="variance_weighted") for s in x])
    cross = [r2_score(x[t], outputs[f"cross_recon_{t}_from_{s}"].detach(), multioutput="variance_weighted")
             for t, s in (("a", "b"), ("b", "a"))]  # fmt: skip
    assert float(row["val_explained_variance"]) == pytest.approx(want, abs=1e-6)
    assert float(row["val_explained_variance_cross"]) == pytest.approx(np.mean(cross), abs=1e-6)
    values = torch.stack([outputs[f"values_{s}"] for s in x])
    assert 0 < float(row["l0"]) <= 4 and (values > 0).sum(2).double().mean() <= 4


def test_log_rows_are_means_since_the_last(tmp_path):
    losses = []
    trainer(config(epochs=2), out=tmp_path, log_every=4, on_step=lambda i, loss, m: losses.append(loss.item())).train()
    rows = rows_of_log(tmp_path)
    assert [int(r["step"]) for r in rows] == [4, 8, 11, 12, 16, 20, 22]
    bounds = [0, *(int(r["step"]) for r in rows)]
    for row, first, last in zip(rows, bounds, bounds[1:], strict=False):
        assert float(row["loss"]) == pytest.approx(np.mean(losses[first:last]), rel=1e-5)


def test_batches_without_a_finite_loss_are_skipped_and_counted(tmp_path):
    data = {s: x.clone() for s, x in streams().items()}
    data["a"][100] = 0
    seen = {}
    run = trainer(config(max_skipped=8), data, tmp_path, device="cpu")
    run.on_step = lambda step, loss, metrics: seen.setdefault(step, (loss.item(), run.step.updates))
    run.train()
    skipped = [step for step, (loss, _) in seen.items() if not np.isfinite(loss)]
    assert len(skipped) == run.step.skipped == 6  # once an epoch
    assert run.step.updates == 66 - 6
    assert all(seen[step][1] == seen[step - 1][1] for step in skipped if step > 1)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert rows_of_log(tmp_path)[-1]["skipped"] == "6" and np.isfinite(float(rows_of_log(tmp_path)[-1]["loss"]))


def test_too_many_of_them_stop_training(tmp_path):
    run = trainer(config(lr=1e30, max_skipped=5), out=tmp_path, device="cpu", checkpoint_every=1)
    with pytest.raises(TrainingStopped, match=r"max_skipped: 6 batches .* not finite.*look at lr \(1e\+30\)"):
        run.train()
    assert load_latest(tmp_path / "checkpoints") is not None
    data = {s: x.clone() for s, x in streams().items()}
    data["b"][::7] = 0
    with pytest.raises(
        ValueError, match=r"stream 'b': expected few zero rows \(max_skipped 100\), got 100 zero rows .*"
    ):
        trainer(config(epochs=50), data)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run on the CPU that kept every checkpoint, by shuffle."""
    runs = {}
    for shuffle, memory in (("window", 20_000), ("official", 1 << 30)):
        out = tmp_path_factory.mktemp(shuffle)
        settings = config(shuffle=shuffle, memory=memory, val_fraction=0.1, warmup=10, decay="cosine")
        trainer(settings, out=out, checkpoint_every=7, keep=99, log_every=5, device="cpu").train()
        runs[shuffle] = settings, out
    return runs


@pytest.mark.parametrize("shuffle", ["window", "official"])
def test_resumed_anywhere_the_bits_are_the_same(finished, tmp_path, shuffle):
    settings, out = finished[shuffle]
    want = (out / "model.safetensors").read_bytes()
    log = [{k: v for k, v in row.items() if k not in ("samples_per_s", "seconds")} for row in rows_of_log(out)]
    saved = run_checkpoints.checkpoints(out / "checkpoints")
    assert len(saved) == 9
    for path in saved[1::3]:
        part = tmp_path / path.stem
        shutil.copytree(out, part)
        (part / "model.safetensors").unlink()
        for later in saved[saved.index(path) + 1 :]:
            (part / "checkpoints" / later.name).unlink()
        run = trainer(settings, out=part, resume=True, log_every=5, device="cpu")
        assert run.batches == int(path.stem.split("-")[1])
        run.train()
        assert (part / "model.safetensors").read_bytes() == want, path.name
        again = [{k: v for k, v in row.items() if k in log[0]} for row in rows_of_log(part)]
        assert again == log


def test_rounded_weights_that_are_kept_change_no_bit_and_survive_resuming(tmp_path):
    """bf16 without gradients keeps a shadow of the weights: through new rows of dead latents and a checkpoint."""
    settings, runs = config(precision="bf16", gradient_free=True, epochs=3, dead_steps_threshold=3), {}
    for name in ("shadow", "cast"):
        run = runs[name] = trainer(settings, out=tmp_path / name, checkpoint_every=7, keep=99, device="cpu")
        assert run.optimizer._shadow.dtype == torch.bfloat16
        if name == "cast":
            run.optimizer._shadow = None
        run.train()
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in runs}
    assert weights["shadow"] == weights["cast"]
    saved = run_checkpoints.checkpoints(tmp_path / "shadow" / "checkpoints")
    for later in saved[1:]:
        later.unlink()
    (tmp_path / "shadow" / "model.safetensors").unlink()
    trainer(settings, out=tmp_path / "shadow", resume=True, device="cpu").train()
    assert (tmp_path / "shadow" / "model.safetensors").read_bytes() == weights["shadow"]


def test_a_finished_run_stays_as_it_is(finished, tmp_path):
    settings, out = finished["window"]
    shutil.copytree(out, tmp_path / "run")
    result = trainer(settings, out=tmp_path / "run", resume=True, device="cpu").train()
    assert result["steps"] == 60
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_resuming_before_the_first_checkpoint_starts_again(tmp_path):
    first = trainer(config(epochs=1), out=tmp_path, device="cpu")
    first.start()
    first.close()
    run = trainer(config(epochs=1), out=tmp_path, resume=True, device="cpu")
    assert run.batches == 0
    run.train()
    with pytest.raises(ValueError, match=r"out: expected a folder without a run, or resume, got .*, which holds one"):
        trainer(config(epochs=1), out=tmp_path)


def test_no_damaged_checkpoint_loads(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"model": {"w": torch.arange(100.0)}}, keep=2)
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.arange(100.0))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in [0, 1, 30, len(whole) - 1, *rng.integers(0, len(whole), 40)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="expected a complete training checkpoint"):
            load_checkpoint(path)
    for position in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected a complete training checkpoint"):
            load_checkpoint(path)


def test_resuming_passes_over_a_damaged_checkpoint(tmp_path, caplog):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"x": step}, keep=2)
    assert [p.name for p in run_checkpoints.checkpoints(tmp_path)] == ["step-000000002.pt", "step-000000003.pt"]
    (tmp_path / "step-000000003.pt").write_bytes(b"x" * 1000)
    path, state = load_latest(tmp_path)
    assert path.name == "step-000000002.pt" and state["x"] == 2
    assert "Skipped: checkpoint" in caplog.text
    (tmp_path / "step-000000002.pt").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="expected a complete training checkpoint"):
        load_latest(tmp_path)


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = trainer(config(epochs=2), out=tmp_path, checkpoint_every=5, device="cpu")
    real = os.fsync

    def full(handle):
        if len(list((tmp_path / "checkpoints").glob("*.tmp"))) and len(
            run_checkpoints.checkpoints(tmp_path / "checkpoints")
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        run.train()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000005.pt"]
    resumed = trainer(config(epochs=2), out=tmp_path, resume=True, device="cpu")
    assert resumed.batches == 5
    resumed.train()


def left_on(signum, code, stderr, out):
    """What a run that a signal has ended says and leaves."""
    assert code == 128 + signum
    assert f"{signal.Signals(signum).name} after step" in stderr and "saved, resume goes on from here" in stderr
    assert len(run_checkpoints.checkpoints(out / "checkpoints")) == 1  # only the one made on leaving


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave(tmp_path, capsys, monkeypatch, signum):
    make_features(tmp_path)
    compute_loss, steps = AlignedSAE.compute_loss, []

    def interrupted(*args, **named):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signum)
        return compute_loss(*args, **named)

    monkeypatch.setattr(AlignedSAE, "compute_loss", interrupted)
    code = cli.main(["train", *arguments(tmp_path), "--out", str(tmp_path / "run")])
    left_on(signum, code, capsys.readouterr().err, tmp_path / "run")


@pytest.mark.subprocess
def test_a_signal_from_outside_saves_and_leaves(tmp_path):
    make_features(tmp_path)
    command = [sys.executable, "-m", "sparc_kernels", "train", *arguments(tmp_path), "--out", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        wait_for_row(tmp_path / "run")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    left_on(signal.SIGTERM, process.returncode, stderr, tmp_path / "run")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_signal_leaves_at_once(tmp_path, monkeypatch, second, torchrun):
    """But under torchrun, which forwards SIGTERM, a second one does not."""
    monkeypatch.setattr(process, "launched", lambda: torchrun)
    run = trainer(config(epochs=1), out=tmp_path, device="cpu")
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def interrupt(step, loss, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
            assert not codes
            signal.raise_signal(second)

    run.on_step = interrupt
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as error:
        run.train()
    assert codes == ([] if torchrun and second == signal.SIGTERM else [128 + second])
    assert error.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_kill_at_random_moments_and_resume(tmp_path):
    """One of the moments, and one more after resuming; `python tests/scripts/kill_and_resume.py` tries twenty."""
    wrong = kill_and_resume(tmp_path, moments=1, seed=1)
    assert wrong == [], wrong


def wait_for_row(out: Path) -> None:
    for _ in range(600):
        if (out / runlog.LOG).exists() and len(rows_of_log(out)) > 2:
            return
        time.sleep(0.1)
    raise AssertionError("no step within a minute")


# ------------------------------------------------------------------------------------------------ what it leaves behind


def test_manifest_and_weights_are_enough_to_go_on(finished):
    settings, out = finished["window"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"] == vars(settings)
    assert manifest["model"]["d_streams"] == WIDTHS
    assert set(manifest["versions"]) >= {"torch", "sparc_kernels", "python", "commit", "triton"}
    assert set(manifest["data"]["train"]["a"]) == {"path", "rows", "width", "dtype", "fingerprint"}
    model, normalize = load_model(out)
    assert (model.d_streams, model.k, model.auxk, model.topk_type, normalize) == (WIDTHS, 4, 6, "global", True)
    assert not model.training and model.decoders["a"].weight.stride() == (1, 20)
    older = run_checkpoints.checkpoints(out / "checkpoints")[-1]
    for again, _ in (load_model(out / "model.safetensors"), load_model(older)):
        assert same(again.state_dict(), model.state_dict())


def test_official_files_load_and_are_written(finished, tmp_path):
    _, out = finished["window"]
    model, _ = load_model(out)
    path = export_official(model, tmp_path, {"lr": 1e-4})
    state = torch.load(path, weights_only=True)
    assert {name: tuple(v.shape) for name, v in state.items()} == {f"stats_last_nonzero_{s}": (48,) for s in WIDTHS} | {
        f"encoders.{s}.weight": (48, d) for s, d in WIDTHS.items()
    } | {f"decoders.{s}.weight": (d, 48) for s, d in WIDTHS.items()} | {
        f"pre_biases.{s}": (d,) for s, d in WIDTHS.items()
    } | {f"latent_biases.{s}": (48,) for s in WIDTHS}
    assert all(v.is_contiguous() for v in state.values())
    again, normalize = load_model(path)
    assert same(again.state_dict(), model.state_dict()) and normalize and again.auxk == 6
    (tmp_path / "run_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"expected k and topk_type, which weights do not tell: give them, or put run_config.json"
    ):
        load_model(path)
    bare, _ = load_model(path, k=4, topk_type="local")
    assert (bare.k, bare.topk_type, bare.d_streams) == (4, "local", WIDTHS)
    with np.load(
        Path(__file__).parents[1].joinpath("data", "official_replay.npz")
    ) as file:  # a state of the official class
        prefix = "state/moved/"
        official = {k.removeprefix(prefix): torch.from_numpy(file[k]) for k in file.files if k.startswith(prefix)}
    torch.save(official, path)
    replayed, _ = load_model(path, k=5, topk_type="global")
    assert same(dict(sorted(replayed.state_dict().items())), dict(sorted(official.items())))


def test_the_trainer_exports_when_asked(tmp_path):
    trainer(config(epochs=1), out=tmp_path, export=True, device="cpu").train()
    args = json.loads((tmp_path / "run_config.json").read_text())["args"]
    assert (args["n_latents"], args["k"], args["num_epochs"], args["lr"]) == (48, 4, 1, 3e-3)
    assert same(load_model(tmp_path / "msae_checkpoint.pth")[0].state_dict(), load_model(tmp_path)[0].state_dict())


def test_the_command_trains_resumes_and_says_so(tmp_path, capsys):
    for s, x in streams().items():
        np.save(tmp_path / f"{s}.npy", x.numpy())
    files = [f"--stream={s}={tmp_path / s}.npy" for s in WIDTHS]
    out = str(tmp_path / "run")
    command = ["train", "--out", out, "--n-latents", "48", "--k", "4", "--auxk", "0", "--epochs", "2", "--memory", "1M"]
    assert cli.main([*command, *files]) == 0
    text = capsys.readouterr().out
    assert "loss" in text and "samples/s" in text
    # which of the two, the machine's other work decides
    bound, waited = re.search(r"; bound: (.*), waited for data (\d+\.\d)% of the time", text).groups()
    assert bound == ("data (reading them)" if float(waited) > 10 else "compute")
    assert cli.main(["train", "--out", out, "--resume"]) == 0  # settings and files are the run's
    assert "Resuming after step 6 of 6" in capsys.readouterr().out
    assert cli.main(["train", "--out", out, "--resume", "--lr", "1"]) == 2
    assert "lr: expected 0.0001 as in" in capsys.readouterr().err


def test_logs_elsewhere_only_when_asked_and_installed(tmp_path, monkeypatch):
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"logging to {name} needs {name}: pip install {name}$"):
            trainer(out=tmp_path, log_to=(name,))

    class Writer:
        def __init__(self, folder):
            self.folder, self.rows = folder, []

        def add_scalar(self, name, value, step):
            self.rows.append((name, value, step))

        def close(self):
            self.rows.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = trainer(config(epochs=1), out=tmp_path, log_to=("tensorboard",))
    run.train()
    rows = run.log.tensorboard.rows
    assert rows[-1] == "closed" and {"loss", "explained_variance", "dead"} <= {name for name, *_ in rows[:-1]}


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_a_captured_step_is_the_eager_step(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [trainer(config(), graph=graph) for graph in (False, True)]
        for run in runs:
            run.train()
    assert runs[1].step.captured
    assert same(runs[0].model.state_dict(), runs[1].model.state_dict())
