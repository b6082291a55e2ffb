"""`eval` and `encode` on 2 and 3 processes: the bytes of the files that one process writes, and one refusal for all."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import start

from sparc_kernels import AlignedSAE, cli, metrics
from sparc_kernels.evaluation import csr
from sparc_kernels.io.weights import save_weights

ROWS, WIDTHS, CLASSES = 130, {"a": 6, "b": 4, "c": 5}, 3
NAMES = {3: ["eval", "eval-2", "npz", "safetensors", "encode-2", "one-batch"], 2: ["eval", "npz"]}  # by processes
BLOCK = 4096  # elements of a block, so that retrieval has several


def streams(rows: int) -> list[str]:
    return ["--model=model.safetensors", "--device=cpu", *(f"--stream={s}={s}{rows}.npy" for s in WIDTHS)]


# name -> arguments; every one also runs in one process. The last batch is short, or there are fewer than processes.
COMMANDS = {
    "eval": ["eval", *streams(ROWS), "--batch-size=20", "--labels=labels.npy", "--images=a=pictures.npy"],
    "eval-2": ["eval", *streams(2), "--batch-size=1"],
    "npz": ["encode", *streams(ROWS), "--batch-size=16"],
    "safetensors": ["encode", *streams(ROWS), "--batch-size=40", "--format=safetensors", "--alone"],
    "encode-2": ["encode", *streams(2), "--batch-size=1"],
    "one-batch": ["encode", *streams(ROWS)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("by_rows")
    torch.manual_seed(0)
    save_weights(AlignedSAE(WIDTHS, 24, 4), here / "model.safetensors")
    rng = np.random.default_rng(0)
    for s, d in WIDTHS.items():
        x = rng.standard_normal((ROWS, d)).astype(np.float32)
        x[[3, 100]] = 0 if s == "a" else x[[3, 100]]
        np.save(here / f"{s}{ROWS}.npy", x)
        np.save(here / f"{s}2.npy", x[:2])
        x[100] = np.nan if s == "b" else x[100]
        np.save(here / f"{s}0.npy", x)
    np.save(here / "labels.npy", np.arange(ROWS) % CLASSES)
    np.save(here / "pictures.npy", rng.integers(256, size=(ROWS, 4, 4), dtype=np.uint8))
    return here


def run(words: list[str], out: Path, err: Path) -> int:
    with open(err, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            return cli.main([*words, f"--out={out}"])
        except SystemExit as ended:
            return ended.code


def work(rank: int, here: str) -> None:
    os.chdir(here)
    torch.set_num_threads(1)
    metrics._BLOCK_ELEMENTS, csr._COLLECT = BLOCK, 7
    for size in (3, 2):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{here}/meeting{size}", rank=rank, world_size=size)
        codes = {
            name: run(words, Path(f"{name}.{size}"), Path(f"{name}.{size}.err{rank}"))
            for name, words in COMMANDS.items()
            if name in NAMES[size]
        }
        # a NaN that the last process reads; a file of others where the leading one writes; a disk that it fills
        codes["nan"] = run(
            ["encode", *streams(0), "--batch-size=50"], Path(f"nan.{size}"), Path(f"nan.{size}.err{rank}")
        )
        Path("others").mkdir(exist_ok=True)
        Path("others/scores.json").write_text("{}")
        codes["others"] = run(COMMANDS["eval"], Path("others"), Path(f"others.{size}.err{rank}"))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(csr.CsrWriter, "_write_npz", full)
            codes["full"] = run(COMMANDS["npz"], Path(f"full.{size}"), Path(f"full.{size}.err{rank}"))
        Path(f"codes.{size}.{rank}").write_text(json.dumps(codes))
        dist.destroy_process_group()


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="torch without gloo")
@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.long
def test_processes_write_what_one_writes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", BLOCK)
    for name, words in COMMANDS.items():
        assert run(words, Path(f"{name}.1"), Path(f"{name}.1.err0")) == 0
    start(work, (str(folder),), 3)
    for size in (3, 2):
        for name in NAMES[size]:
            alone, together = Path(f"{name}.1"), Path(f"{name}.{size}")
            files = sorted(path.name for path in alone.iterdir())
            assert files == sorted(path.name for path in together.iterdir()) and files
            for file in files:
                assert (alone / file).read_bytes() == (together / file).read_bytes(), (name, size, file)
        for rank in range(size):
            codes = json.loads(Path(f"codes.{size}.{rank}").read_text())
            assert codes == dict.fromkeys(NAMES[size], 0) | {"nan": 2, "others": 2, "full": 2}
            for name in codes:  # one process speaks
                assert rank == 0 or Path(f"{name}.{size}.err{rank}").read_text() == ""
        assert f"rank {size - 1}: stream 'b'" in Path(f"nan.{size}.err0").read_text()
        assert "did not write" in Path(f"others.{size}.err0").read_text()
        assert "No space left" in Path(f"full.{size}.err0").read_text()
        assert not Path(f"nan.{size}").exists() and not Path(f"full.{size}").exists()
        notes = [Path(f"npz.{n}.err0").read_text().splitlines()[0] for n in (1, size)]
        assert notes[0] == notes[1] and "2 zero rows (3, 100) of 130" in notes[0]
