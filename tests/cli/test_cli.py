"""What all commands have in common: pipes, precisions, sizes."""

import argparse
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_process

from sparc_kernels import AlignedSAE, cli
from sparc_kernels.cli import train as cli_train
from sparc_kernels.core import console
from sparc_kernels.core.validation import check_device, precision_name
from sparc_kernels.io.features import Features
from sparc_kernels.io.loader import Loader
from sparc_kernels.io.weights import load_model, save_weights
from sparc_kernels.tools.shape import parse_shape
from sparc_kernels.tools.verify import run as verify
from sparc_kernels.train import config as train_config
from sparc_kernels.train import log as runlog

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--n-latents=16", "--k=3", "--auxk=0", "--epochs=1", "--device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli")
    np.save(out / "x.npy", np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32))
    save_weights(AlignedSAE({"x": 8}, 16, 3), out / "m.safetensors")
    return out


RECORD = next((ROOT / "benchmarks" / "results").glob("epyc*.json"))


@pytest.mark.parametrize("command", ["cost", "show", "show 2>&1", "train", "demo", "report"])
@pytest.mark.subprocess
def test_a_pipe_that_is_closed_ends_a_command_quietly(folder, tmp_path, command):
    command, *both = command.split()
    program = ["benchmarks.report", f"--show={RECORD}"] if command == "report" else ["sparc_kernels", command]
    streams = [f"--stream=x={folder / 'x.npy'}"]
    given = {"show": ["1", f"--model={folder / 'm.safetensors'}", *streams], "demo": ["--only-data", "--out", "d"],
             "train": [*TINY, *streams, "--out=run"]}  # fmt: skip
    closed = warm_process.CLOSED  # as `| head` when it has seen enough
    words = ["-m", *program, *given.get(command, [])]
    done = warm_process.run(*words, cwd=tmp_path, stdout=closed, stderr=closed if both else None)
    assert done.returncode == 141, done.stderr
    assert both or not re.search("Traceback|Broken|Error", done.stderr), done.stderr


def test_what_the_library_logs_is_printed_by_commands_alone(monkeypatch, capsys, caplog):
    """Training's notes on stdout with its lines, others on stderr, and a closed pipe is noticed."""
    train, data = (logging.getLogger(f"sparc_kernels.{name}") for name in ("train.trainer", "io.weights"))

    def run(args):
        train.info("resuming, 100 %s")
        data.warning("older")

    monkeypatch.setattr("sparc_kernels.cli.show.run", run)
    command = ["show", "1", "--model=m", "--stream=x=x.npy"]
    assert cli.main(command) is None
    assert tuple(capsys.readouterr()) == ("resuming, 100 %s\n", "older\n") and not caplog.messages

    def broken(*words, **options):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError), cli._logs_printed():
        data.warning("unread")
    monkeypatch.undo()
    run(None)
    assert tuple(capsys.readouterr()) == ("", "") and caplog.messages == ["older"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says how it waits")
@pytest.mark.parametrize(("said", "spins"), [({}, "0"), ({"GOMP_SPINCOUNT": "500"}, "500")], ids=str)
@pytest.mark.subprocess
def test_threads_sleep_while_they_wait(said, spins):
    """They spun, which beside other work made two threads slower than one; what the user says holds."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **said}
    command = [sys.executable, "-m", "sparc_kernels", "train", "--help"]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[1] == spins


@pytest.mark.parametrize("command", ["train", "eval", "encode", "show 1", "verify", "demo"])
def test_devices_that_are_not_there_are_refused_alike(folder, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for good, device in (("auto", "cuda:1"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert check_device("device", good) == torch.device(device)
    command = command.split()
    if command[0] not in ("verify", "demo"):
        command += [f"--stream=x={folder / 'x.npy'}"]
        command += TINY[:-1] if command[0] == "train" else [f"--model={folder / 'm.safetensors'}"]
    command += [] if command[0] in ("verify", "show") else [f"--out={tmp_path}/out"]
    for device in ("nonsense", "cuda:2", "cuda:9", "cuda:x", "cuda:-1", "meta", "", "2"):
        assert cli.main([*command, f"--device={device}"]) == 2
        expected = "device: expected auto, cpu, or cuda or cuda:N of a GPU that is there, got "
        assert f"{expected}{device!r} where PyTorch sees 2 GPUs\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"device: expected auto, cpu, or cuda .* got 'nonsense'"):
        load_model(folder / "m.safetensors", device="nonsense")
    with Features({"x": folder / "x.npy"}) as features, pytest.raises(ValueError, match=r"device: .* got 'cuda:2'"):
        Loader(features, 4, torch.Generator(), device="cuda:2")


SPELLINGS = {"fp32": "float32 FP32 torch.float32 float f32", "bf16": "bfloat16 BF16 torch.bfloat16",
             "fp16": "float16 half f16", "fp64": "float64 double", "tf32": "tf32 TF32"}  # fmt: skip


def test_precisions_are_spelled_as_one_likes():
    for name, others in SPELLINGS.items():
        for text in (name, *others.split()):
            assert precision_name(text) == name
            if name in ("fp32", "bf16", "fp16"):
                assert parse_shape(f"8,64,4,32,3,{text}") == parse_shape(f"8,64,4,32,3,{name}")
            if name in train_config.PRECISIONS:
                assert train_config.TrainConfig(precision=text) == train_config.TrainConfig(precision=name)
    assert parse_shape("8,64,4,32,3") == parse_shape("8,64,4,32,3,bfloat16")
    with pytest.raises(ValueError, match="PRECISION bf16, fp16 or fp32, got 'fp64'"):
        parse_shape("8,64,4,32,3,fp64")
    with pytest.raises(ValueError, match=r"precision: expected one of 'fp32', .* got 'int8'"):
        train_config.TrainConfig(precision="int8")


def test_commands_take_every_spelling(folder, tmp_path, capsys):
    assert cli.main(["cost", "--shape", "256,2048,16,64,2,fp32"]) == 0
    assert "float32 on H200" in capsys.readouterr().out
    command = ["train", *TINY, f"--stream=x={folder / 'x.npy'}", "--quiet"]
    assert cli.main([*command, f"--out={tmp_path}", "--precision=float64"]) == 0
    assert train_config.TrainConfig(precision="fp64").dtype == load(tmp_path)
    case = verify.CPU_CASES[0]
    for dtype in case.dtypes:
        names = verify.SHORT[dtype], str(dtype).removeprefix("torch.")
        assert verify._chosen(case, dtype, f" {names[0]} ") == verify._chosen(case, dtype, f" {names[1]} ") != ()


def load(run):
    from sparc_kernels.io.weights import load_model

    return load_model(run)[0].encoders["x"].weight.dtype


def test_sizes_are_said_as_they_are_read(folder, tmp_path, capsys):
    for text in ("4 GiB", "500 MiB", "3 KiB", "2 TiB"):
        assert console.size_text(console.memory_size(text)) == text
    for size in (1500, 2000 << 20, 1):
        assert console.memory_size(console.size_text(size)) == size
    assert console.size_text(1500) == "1,500 bytes"
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 500M or 4GiB, got '1e400'"):
        console.memory_size("1e400")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "features may be larger (4 GiB)" in text and "4294967296" not in text
    command = ["train", *TINY, f"--stream=x={folder / 'x.npy'}", "--quiet", f"--out={tmp_path}"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--resume", "--memory=1G"]) == 2
    assert "memory: expected 4 GiB as in" in (error := capsys.readouterr().err) and "got 1 GiB" in error


@pytest.mark.parametrize("words", [["train", "--help"], ["verify"]])
def test_ctrl_c_while_modules_load_leaves_with_130(monkeypatch, words):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(words) == 130


def test_wandbs_project_is_the_environments(monkeypatch):
    asked = []
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: asked.append(given["project"]))
    )
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    runlog.RunLog(None, [], 1, to=("wandb",), quiet=True)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    runlog.RunLog(None, [], 1, to=("wandb",), quiet=True)
    assert asked == ["sparc", "mine"]
    assert "$WANDB_PROJECT" in Path(cli_train.__file__).read_text()
