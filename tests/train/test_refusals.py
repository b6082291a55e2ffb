"""What is refused, by name, before training starts."""

import functools
import math
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import warm_process
from conftest import CUDA
from safetensors.torch import save_file
from scripts.kill_and_resume import arguments, make_features

from sparc_kernels import cli
from sparc_kernels.io import features
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.data import split
from sparc_kernels.train.trainer import Trainer

ROWS, WIDTHS = 700, {"a": 20, "b": 12}
DAMAGED = "expected a complete training checkpoint, got a damaged, truncated or foreign file"


@functools.cache
def streams() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {s: torch.randn(ROWS, d, generator=g) for s, d in WIDTHS.items()}


def bad(kind: str, folder: Path) -> tuple[list[str], str]:
    """Arguments that must be refused, and words of the message."""
    a, b = folder / "a.npy", folder / "b.npy"
    np.save(a, streams()["a"].numpy())
    np.save(b, streams()["b"].numpy())
    out, settings = folder / "run", []
    if kind == "no dataset":
        with h5py.File(folder / "b.h5", "w") as file:
            file["embeddings"] = np.ones((ROWS, 3), np.float32)
        b, words = folder / "b.h5", "stream 'b' ({b}): expected a dataset 'features', got embeddings"
    elif kind == "row mismatch":
        np.save(b, np.ones((ROWS - 1, 12), np.float32))
        words = "stream 'b' ({b}): expected 700 rows as in stream 'a' ({a}), got 699 rows"
    elif kind == "NaN rows":
        x = streams()["b"].numpy().copy()
        x[[5, 600], 3] = np.nan
        np.save(b, x)
        words = "stream 'b' ({b}): expected finite features, got NaN or infinity in 2 rows: 5, 600"
    elif kind == "integers":
        np.save(b, np.ones((ROWS, 12), np.int32))
        words = "stream 'b' ({b}): expected float64, float32, float16 or bfloat16 features, got int32"
    elif kind == "empty file":
        b.write_bytes(b"")
        words = "stream 'b' ({b}): expected a NumPy file, got an empty file"
    elif kind == "truncated npy":
        b.write_bytes(b.read_bytes()[:-100])
        words = "stream 'b' ({b}): expected 33,728 bytes, as its header says, got 33,628: the file is truncated"
    elif kind == "truncated HDF5":
        b = folder / "b.h5"
        with h5py.File(b, "w") as file:
            file["features"] = np.ones((ROWS, 12), np.float32)
        b.write_bytes(b.read_bytes()[:-1000])
        words = "stream 'b' ({b}): expected a complete HDF5 file, got one that cannot be read"
    elif kind == "truncated safetensors":
        b = folder / "b.safetensors"
        save_file({"features": torch.ones(ROWS, 12)}, b)
        b.write_bytes(b.read_bytes()[:-1000])
        words = "stream 'b' ({b}): expected a complete safetensors file, got one that cannot be read"
    elif kind == "which tensor":
        b = folder / "b.safetensors"
        save_file({"x": torch.ones(ROWS, 12), "y": torch.ones(ROWS, 12)}, b)
        words = "stream 'b' ({b}): expected a tensor 'features', or only one, got 2 tensors: x, y"
    elif kind == "no such file":
        b, words = folder / "c.npy", "stream 'b' ({b}): expected a file, got nothing there"
    elif kind == "other suffix":
        b, words = folder / "c.csv", "stream 'b' ({b}): expected a file ending in .h5, .hdf5, .safetensors, .npy"
    elif kind == "one dimension":
        np.save(b, np.ones(ROWS, np.float32))
        words = "stream 'b' ({b}): expected rows and columns, [n, d], got shape [700]"
    elif kind == "no rows":
        np.save(b, np.ones((0, 12), np.float32))
        words = "stream 'b' ({b}): expected at least one row and one column, got shape [0, 12]"
    elif kind == "not a npy":
        b.write_bytes(b"these are no features")
        words = "stream 'b' ({b}): expected a NumPy .npy file, got one that cannot be read"
    elif kind == "k above N":
        settings, words = ["--k", "49"], "k: expected an int in 1..48 (at most n_latents and 512), got 49"
    elif kind == "auxk above N":
        settings, words = ["--auxk", "49"], "auxk: expected an int in 0..48"
    elif kind == "learning rate":
        settings, words = ["--lr", "0"], "lr: expected a number > 0, got 0"
    elif kind == "clipping without gradients":
        settings = ["--gradient-free", "--max-grad-norm", "1"]
        words = "max_grad_norm: expected 0 with gradient_free, where no step knows all gradients, got 1.0"
    elif kind == "memory":
        settings, words = ["--memory", "1K"], "memory: expected at least 16,384 bytes for batches of 64, got 1,024"
    elif kind == "validation of everything":
        settings, words = ["--val-fraction", "1.0"], "val_fraction: expected a number in [0, 1), got 1.0"
    elif kind == "validation widths":
        np.save(folder / "v.npy", np.ones((9, 5), np.float32))
        settings = [f"--val-stream=a={folder}/v.npy", f"--val-stream=b={folder}/v.npy"]
        words = "stream 'a' ({folder}/v.npy): expected width 20 as in the training data, got width 5"
    elif kind == "validation zero rows":
        for s, d in WIDTHS.items():
            np.save(folder / f"v{s}.npy", np.zeros((ROWS, d), np.float32))
        settings = [f"--val-stream={s}={folder}/v{s}.npy" for s in WIDTHS]
        words = (
            "validation stream 'a' ({folder}/va.npy) and stream 'b' ({folder}/vb.npy): expected few zero rows, got 700 "
            "zero rows (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...) of 700 and 700 zero rows (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, "
            "...) of 700: most batches would have no finite loss"
        )
    elif kind == "held-out zero row":
        x, (row, _) = streams()["a"].numpy().copy(), split(ROWS, 0.05, 42)[1][0]
        x[row] = 0
        np.save(a, x)
        settings = ["--val-fraction", "0.05", "--seed", "42"]
        words = f"validation stream 'a' ({{a}}): expected few zero rows, got 1 zero rows ({row}) of 36: most batches"
    elif kind == "zero rows of two streams":  # of the same samples once
        for path, s, rows in ((a, "a", slice(3, 9)), (b, "b", slice(8, 13))):
            x = streams()[s].numpy().copy()
            x[rows] = 0
            np.save(path, x)
        words = (
            "stream 'a' ({a}) and stream 'b' ({b}): expected few zero rows (max_skipped 100), got 6 zero rows (3, 4, "
            "5, 6, 7, 8) of 700 and 5 zero rows (8, 9, 10, 11, 12) of 700: without a finite loss, about 7 of 11 batches"
        )
    elif kind == "norms that underflow":
        np.save(b, streams()["b"].numpy() * np.float32(1e-25))
        words = (
            "expected few zero rows (max_skipped 100), got 700 rows whose norm is 0 in float32 (0, 1, 2, 3, 4, 5, 6,"
        )
    elif kind == "validation streams":
        settings = [f"--val-stream=a={a}", f"--val-stream=c={b}"]
        words = "streams: expected a, b, the streams of the training data, got a, c"
    elif kind == "out is a file":
        out.write_text("")
        words = "out: expected a folder, got {out}, a file"
    elif kind == "out below a file":
        out = a / "run"
        words = "out: expected a folder to write to, got {out} ({a}: not a folder)"
    elif kind == "out is a link to nothing":
        out.symlink_to("nowhere")
        words = "out: expected a folder to write to, got {out} ({out}: not a folder)"
    elif kind == "out may not be written to":
        out.mkdir(mode=0o555)
        words = "out: expected a folder to write to, got {out} ({out}: no permission to write there)"
    elif kind == "a lock that cannot be opened":
        (out / ".lock").mkdir(parents=True)
        words = "out: expected a folder to write to, got {out} ({out}/.lock: Is a directory)"
    elif kind == "no weights to start from":
        settings = [f"--init={a}"]
        words = "model {a}: expected a torch file of tensors (Weights only load failed)\n"
    elif kind == "folder holds a run":
        run(folder, out)
        words = "out: expected a folder without a run, or resume, got {out}, which holds one"
    elif kind == "other data":
        run(folder, out)
        np.save(b, streams()["b"].numpy() + 1)
        settings, words = ["--resume"], "train stream 'b' ({b}): expected fingerprint"
    elif kind == "other settings":
        run(folder, out)
        settings, words = ["--resume", "--lr", "0.5"], "lr: expected 0.001 as in {out}/manifest.json, got 0.5"
    elif kind == "other stream":
        run(folder, out)
        settings, words = ["--resume"], "train streams: expected a, b as when the run began, got a"
        return [f"--stream=a={a}", f"--out={out}", *settings], words.format(a=a, b=b, out=out, folder=folder)
    elif kind == "damaged checkpoint":
        run(folder, out)
        for path in (out / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        settings, words = (
            ["--resume"],
            "expected a complete training checkpoint, got a damaged, truncated or foreign file",
        )
    elif kind == "wrong checkpoint kind":
        run(folder, out)
        for path in (out / "checkpoints").iterdir():
            shutil.copy(out / "model.safetensors", path)
        settings, words = (
            ["--resume"],
            "expected a complete training checkpoint, got a damaged, truncated or foreign file",
        )
    elif kind == "damaged manifest":
        run(folder, out)
        (out / "manifest.json").write_text('{"config": ')
        settings, words = ["--resume"], "{out}/manifest.json: expected a JSON file, got one that cannot be read"
    elif kind == "no GPU":
        settings, words = (
            ["--device", "cuda"],
            "device: expected auto, cpu, or cuda or cuda:N of a GPU that is there, got 'cuda' where PyTorch sees no",
        )
    return ([f"--stream=a={a}", f"--stream=b={b}", f"--out={out}", *settings],
            words.format(a=a, b=b, out=out, folder=folder))  # fmt: skip


QUICKLY = ["--n-latents", "48", "--batch-size", "64", "--epochs", "1", "--device", "cpu", "--quiet"]


def run(folder: Path, out: Path) -> None:
    files = [f"--stream={s}={folder / s}.npy" for s in WIDTHS]
    assert cli.main(["train", *files, f"--out={out}", *QUICKLY, "--k", "4", "--auxk", "6", "--lr", "0.001"]) == 0


KINDS = [
    "no dataset", "row mismatch", "NaN rows", "integers", "empty file", "truncated npy", "truncated HDF5",
    "truncated safetensors", "which tensor", "no such file", "other suffix", "one dimension", "no rows", "not a npy",
    "k above N", "auxk above N", "learning rate", "clipping without gradients", "memory",
    "validation of everything", "validation widths", "validation zero rows", "held-out zero row",
    "zero rows of two streams", "norms that underflow", "validation streams",
    "out is a file", "out below a file", "out is a link to nothing",
    "out may not be written to", "a lock that cannot be opened", "no weights to start from",
    "folder holds a run",
    "other data", "other settings", "other stream", "damaged checkpoint", "wrong checkpoint kind",
    "damaged manifest", "no GPU",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refused_by_name_before_training(kind, tmp_path, capsys, monkeypatch):
    if kind == "no GPU" and CUDA:
        pytest.skip("there is one")
    given, words = bad(kind, tmp_path)
    if kind == "out may not be written to":  # also where root runs the tests
        monkeypatch.setattr(os, "access", lambda path, mode, **_: path != tmp_path / "run")
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("training began"))
    defaults = {"--k": "4", "--auxk": "6", "--lr": "0.001"}
    settings = [part for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    device = [] if "--device" in given else ["--device", "cpu"]
    assert cli.main(["train", *QUICKLY[:6], "--quiet", *device, *settings, *given]) == 2
    error = capsys.readouterr().err
    assert words in error, error


def test_a_run_on_shards_is_the_run_on_their_rows_and_goes_on_with_no_others(tmp_path, capsys):
    def cut(s: str, *places: int) -> str:
        for old in tmp_path.glob(f"{s}_*.npy"):
            old.unlink()
        for i, part in enumerate(np.split(streams()[s].numpy(), places)):
            np.save(tmp_path / f"{s}_{i}.npy", part)
        return f"{tmp_path}/{s}_*.npy"

    for s, x in streams().items():
        np.save(tmp_path / f"{s}.npy", x.numpy())
    patterns = {"a": cut("a", 300, 650), "b": cut("b", 64, 64)}
    given = [f"--stream={s}={pattern}" for s, pattern in patterns.items()]
    held_out = [f"--val-stream={s}={pattern}" for s, pattern in patterns.items()]
    settings = [*QUICKLY, "--k", "4", "--auxk", "6", "--lr", "0.001"]
    run(tmp_path, tmp_path / "whole")
    assert cli.main(["train", *given, *held_out, f"--out={tmp_path}/run", *settings]) == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "run")]
    assert weights[0] == weights[1]
    for command in (["encode", "--out", f"{tmp_path}/codes"], ["show", "3"]):
        assert cli.main([*command, "--model", f"{tmp_path}/run", *given]) == 0
    assert cli.main(["train", "--resume", f"--out={tmp_path}/run", *QUICKLY]) == 0
    for places, words in (
        ((300,), "expected a_1.npy, 350 rows as shard 1 when the run began, got a_1.npy, 400 rows"),
        ((300, 650, 700), "expected no file as shard 3 when the run began, got a_3.npy, 0 rows"),
    ):
        cut("a", *places)
        assert cli.main(["train", "--resume", f"--out={tmp_path}/run", *QUICKLY]) == 2
        assert f"train stream 'a' ({patterns['a']}): {words}" in capsys.readouterr().err
    cut("a", 300, 650)
    first, last = np.load(tmp_path / "a_0.npy"), np.load(tmp_path / "a_2.npy")
    np.save(tmp_path / "a_0.npy", np.concatenate([last, first[50:]]))
    assert cli.main(["train", "--resume", f"--out={tmp_path}/run", *QUICKLY, "--quick-check"]) == 2
    assert f"train stream 'a' ({patterns['a']}): expected fingerprint" in capsys.readouterr().err


def test_zero_rows_to_validate_on_are_told_and_their_batches_left_out(caplog):
    def run(held_out: dict) -> float:
        config = TrainConfig(n_latents=48, k=4, auxk=6, batch_size=64)
        trainer = Trainer(config, streams(), val_streams=held_out, device="cpu")
        trainer.close()
        return trainer._validate(0)["val_loss"]

    held_out = {s: x[:128].clone() for s, x in streams().items()}
    want = run({s: x[64:] for s, x in held_out.items()})
    assert not caplog.messages
    held_out["b"][5] = 0
    assert run(held_out) == want
    note = "Note: validation stream 'b' has 1 zero rows (5) of 128; batches with one are left out of val_loss"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", note)]


@pytest.mark.parametrize(("size", "words"), [(1, "230 zero rows (0, 2, 5, 8, "), (100, "630 zero rows (0, 1, 2, 3, ")])
def test_a_sample_counts_the_rows_that_it_read(monkeypatch, size, words):
    """Pieces apart, and pieces that overlap, which are all rows here."""
    monkeypatch.setattr(features, "_CHECK_BYTES", 80 * size)
    x = streams() | {"a": streams()["a"].clone()}
    x["a"][:630] = 0
    settings = TrainConfig(n_latents=48, k=4, auxk=6, batch_size=16, max_steps=20)
    with pytest.raises(ValueError) as error:
        Trainer(settings, x, device="cpu", full_check=False)
    of = "256 rows read" if size == 1 else "700"
    assert f"got {words}" in str(error.value) and f"of {of}: without a finite loss, about 20 of 20" in str(error.value)
    x["a"][:630] = math.nan
    with pytest.raises(ValueError, match=f"NaN or infinity in {words[:3]} rows: {words[15:19]}"):
        Trainer(settings, x, device="cpu", full_check=False)


def test_a_zero_row_is_told_of_the_part_that_has_it_and_no_finite_loss_too(capsys, caplog):
    x = streams() | {"a": streams()["a"].clone()}
    held_out = split(ROWS, 0.5, 42)[1]
    x["a"][held_out[0][0]] = 0
    trainer = Trainer(TrainConfig(n_latents=48, k=4, auxk=6, batch_size=64, val_fraction=0.5), x, device="cpu")
    (text,) = caplog.messages
    assert text.startswith(f"Note: validation stream 'a' has 1 zero rows ({held_out[0][0]}) of 3")
    x["a"].zero_()
    trainer.close()
    assert math.isnan(trainer._validate(0)["val_loss"])
    assert "Note: val_loss is nan, no batch to validate on had a finite loss" in capsys.readouterr().out


def test_damaged_rows_that_the_sample_missed_stop_training_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features, "_CHECK_BYTES", 1)  # one row at a time
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("features", data=streams()["a"].numpy(), chunks=(1, 20), fletcher32=True)
        place = dataset.id.get_chunk_info_by_coord((1, 0)).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    command = ["train", f"--stream=a={path}", "--k=4", "--auxk=6", *QUICKLY]
    assert cli.main([*command, f"--out={tmp_path / 'full'}"]) == 2
    assert cli.main([*command, f"--out={tmp_path / 'quick'}", "--quick-check"]) == 1
    full, quick = capsys.readouterr().err.splitlines()
    words = f"stream 'a' ({path}): expected rows that can be read, got damaged ones from row "
    assert full.startswith(f"sparc-kernels train: error: {words}1 to 1 (")
    assert quick.startswith(f"sparc-kernels train: stopped: {words}0 to ")


@pytest.mark.subprocess
def test_no_space_is_refused_before_training(tmp_path):
    """A limit on the size of files, as a full disk would give it."""
    make_features(tmp_path)
    words = ["train", *arguments(tmp_path), "--out", str(tmp_path / "run")]
    code = (
        "import resource, sys; from sparc_kernels import cli; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(cli.main({words}))"
    )
    done = warm_process.run("-c", code)
    assert done.returncode == 2, done.stderr
    assert "out: expected space for a checkpoint and the weights (" in done.stderr and "File too large" in done.stderr


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    config = TrainConfig(n_latents=48, k=4, auxk=6, epochs=1)
    first = Trainer(config, streams(), tmp_path, device="cpu", quiet=True)
    first.start()
    with pytest.raises(ValueError, match="out: expected a folder that no other run is writing to"):
        Trainer(config, streams(), tmp_path, resume=True, device="cpu", quiet=True)
    first.close()
    Trainer(config, streams(), tmp_path, resume=True, device="cpu", quiet=True).close()


def test_an_unknown_option_or_a_stream_twice_is_refused(tmp_path, capsys):
    for given, words in (
        (["--stream", "a"], "expected NAME=FILE, got 'a'"),
        (["--stream", "a=x", "--stream", "a=y"], "expected every stream once, got 'a' twice"),
        (["--memory", "lots"], "expected a size such as 500M or 4GiB, got 'lots'"),
        (["--decay", "step"], "invalid choice: 'step'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["train", "--out", str(tmp_path / "run"), *given])
        assert words in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path / "run")]) == 2
    assert "--stream: expected NAME=FILE for every stream, got none" in capsys.readouterr().err
