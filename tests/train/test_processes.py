"""Training on several processes: as one process with the same lanes, refused together, ended together."""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import together

from sparc_kernels import cli
from sparc_kernels.distributed import ShardedSAE, processes
from sparc_kernels.distributed.processes import LOST, Refused
from sparc_kernels.io.weights import load_model
from sparc_kernels.train import TrainConfig, Trainer
from sparc_kernels.train import trainer as train_trainer
from sparc_kernels.train.folder import read_manifest

pytestmark = [pytest.mark.subprocess, pytest.mark.slow]
ROWS, WIDTHS = 203, {"a": 10, "b": 6}
BASE = TrainConfig(
    n_latents=26, k=3, auxk=4, batch_size=24, epochs=2, lr=3e-3, dead_steps_threshold=3, reinit_every=7, seed=3,
    precision="fp64",
)  # fmt: skip


BEGUN = 7  # steps


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**vars(BASE), **changes})


@functools.cache
def streams(rows: int = ROWS) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 4, generator=g)
    return {s: hidden @ torch.randn(4, d, generator=g) + 0.3 * torch.randn(rows, d, generator=g)
            for s, d in WIDTHS.items()}  # fmt: skip


# name -> settings, rows, number of a row that becomes NaN or -1
RUNS = {
    "global": ({"val_fraction": 0.2, "warmup": 5, "decay": "cosine"}, ROWS, -1),
    "fused": ({"gradient_free": True, "weight_decay": 0.01, "unit_norm": "after", "drop_last": True}, ROWS, -1),
    "local": ({"topk_type": "local", "max_grad_norm": 0.5, "shuffle": "official"}, ROWS, -1),
    "windows": ({"memory": 6000, "shuffle": "window", "auxk": 0}, ROWS, -1),
    "7 rows": ({"batch_size": 4, "shuffle": "none"}, 7, -1),
    "an empty part": ({"batch_size": 8, "epochs": 5}, 9, -1),
    "a NaN row": ({"max_skipped": 4}, ROWS, 100),
    "single": ({"precision": "fp32"}, ROWS, -1),
    "resumed": ({"val_fraction": 0.2, "warmup": 5}, ROWS, -1),
    "half": ({"precision": "bf16", "gradient_free": True}, ROWS, -1),
}
# number of processes -> name -> shards
ON = {
    4: {"global": (1, 2), "fused": (4,), "local": (2,), "7 rows": (1,)},
    2: {"global": (1, 2), "windows": (1,), "7 rows": (1,), "an empty part": (1,), "a NaN row": (1, 2), "fused": (1,),
        "single": (2,), "half": (2,)},
}  # fmt: skip


def train(name: str, out: Path, max_steps: int = 0, **options):
    settings, rows, bad = RUNS[name]
    settings = settings | {"max_steps": max_steps}
    data = {s: x.clone() for s, x in streams(rows).items()}
    losses = []
    run = Trainer(config(**settings), data, out, device="cpu", quiet=True, log_every=4, **options)
    if bad >= 0:
        run.data.features.sources["a"].x[bad] = math.nan
    run.on_step = lambda step, loss, metrics: losses.append((loss.item(), metrics["total_loss"].item()))
    result = run.train()
    return run, {"losses": torch.tensor(losses), "weights": run.model.state_dict(), "skipped": result["skipped"]}


def log_of(out: Path) -> list[dict]:
    with open(out / "log.csv", newline="") as file:
        rows = csv.DictReader(file)
        return [{k: float(v) for k, v in row.items() if v and k not in ("samples_per_s", "seconds")} for row in rows]


def agrees(name: str, folder: Path, T: int) -> None:
    """A run of all processes is that of one process with as many lanes."""
    size = dist.get_world_size()
    out = folder / f"{name}-{size}-{T}"
    want = torch.load(folder / f"{name}-{size // T}.pt", weights_only=True)
    run, got = train(name, out, tensor_parallel=T)
    tol = {"fp64": 1e-12, "fp32": 2e-4, "bf16": 0.05}[run.config.precision]
    assert isinstance(run.model, ShardedSAE) and (run.ranks.replicas, run.ranks.shards) == (size // T, T)
    groups = [of.group for of in (run.ranks.latents, run.ranks.data) if of and of.group is not dist.group.WORLD]
    patience = {group._get_backend(run.device).options._timeout for group in groups}
    assert len(groups) == (size > T) + (1 < T < size) and patience <= {processes._PATIENCE}
    assert got["skipped"] == want["skipped"] == (2 if "NaN" in name else 0)
    torch.testing.assert_close(got["losses"], want["losses"], rtol=tol, atol=tol, equal_nan=True)
    if run.config.precision != "bf16":  # rounding decides there which latents are chosen
        for key, value in want["weights"].items():
            dim = int(key.startswith("decoders"))
            start, stop = run.model.block
            part = value if key.startswith("pre_biases") else value.narrow(dim, start, stop - start)
            torch.testing.assert_close(got["weights"][key], part, rtol=tol, atol=tol, msg=lambda m, key=key: key + m)
        if dist.get_rank() == 0:
            for ours, theirs in zip(log_of(out), log_of(folder / f"{name}-{size // T}"), strict=True):
                assert ours == pytest.approx(theirs, rel=10 * tol, abs=10 * tol, nan_ok=True)
    manifest = read_manifest(out / "manifest.json")
    alone = read_manifest(folder / f"{name}-{size // T}" / "manifest.json")
    assert {k: v for k, v in manifest.items() if k not in ("run", "started")} == {
        k: v for k, v in alone.items() if k not in ("run", "started")
    }


def goes_on(folder: Path) -> None:
    """A run that two processes, or one with two lanes, began is finished by replicas and by divided latents."""
    rank, want = dist.get_rank(), torch.load(folder / "resumed-2.pt", weights_only=True)
    train("resumed", folder / "begun", max_steps=BEGUN)
    dist.barrier()
    if rank == 0:
        for T in (1, 2):
            shutil.copytree(folder / "begun", folder / f"begun-{T}")
    dist.barrier()
    for out, T in (("begun-1", 1), ("begun-2", 2), ("begun alone", 1)):
        run, got = train("resumed", folder / out, resume=True, tensor_parallel=T)
        assert run.lanes == 2
        torch.testing.assert_close(got["losses"], want["losses"][BEGUN:], rtol=1e-12, atol=1e-12)
        is_finished(folder / out, want)


def is_finished(out: Path, want: dict) -> None:
    """The final weights are those of the run that nothing interrupted."""
    weights = load_model(out)[0].double().state_dict()
    for key, value in want["weights"].items():
        torch.testing.assert_close(weights[key], value, rtol=1e-12, atol=1e-12)


def references(folder: Path, size: int, divided: dict[str, tuple[int, ...]]) -> dict:
    """Runs of one process with the lanes of these, and the cases that compare with them."""
    for name, shards in divided.items():
        for D in {size // T for T in shards}:
            _, result = train(name, folder / f"{name}-{D}", lanes=D)
            torch.save(result, folder / f"{name}-{D}.pt")
    return {f"{name}, T {T}": functools.partial(agrees, name, folder, T) for name, Ts in divided.items() for T in Ts}


# ---------------------------------------------------------------------------------------------- refused, on all ranks


def refuses(words: str, change) -> None:
    """All ranks raise the same error, at once, after rank 1 has changed something."""
    options, started = {"config": BASE, "streams": streams(), "device": "cpu", "quiet": True}, time.monotonic()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused) as caught:
        change(options, dist.get_rank(), patch)
        Trainer(**options)
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, (str(caught.value), time.monotonic() - started))
    assert {text for text, _ in every} == {str(caught.value)} and max(seconds for _, seconds in every) < 10
    assert words in str(caught.value)


def on_one(**changes):
    return functools.partial(_change, changes, (1,))


def on_all(**changes):
    return functools.partial(_change, changes, (0, 1))


def _change(changes, ranks, options, rank, patch) -> None:
    options.update(changes if rank in ranks else {})


def other_data(options, rank, patch) -> None:
    if rank == 1:
        options["streams"] = {s: x + (s == "b") for s, x in streams().items()}


def other_rows(options, rank, patch) -> None:
    if rank == 1:
        options["streams"] = {s: x[:-1] for s, x in streams().items()}


def other_version(options, rank, patch) -> None:
    if rank == 1:
        now = train_trainer.versions()
        patch.setattr(train_trainer, "versions", lambda: now | {"triton": "9.9"})


def a_bad_row(options, rank, patch) -> None:
    options["streams"] = {s: x.clone() for s, x in streams().items()}
    options["streams"]["b"][5] = math.nan


def another_model(options, rank, patch) -> None:
    torch.manual_seed(rank)
    options["model"] = BASE.build(WIDTHS)


def another_optimizer(options, rank, patch) -> None:
    options["optimizer"] = lambda model: torch.optim.Adam(model.parameters())


def refusals(folder: Path) -> dict:
    np.save(folder / "a.npy", streams()["a"].numpy())
    files = {"a": folder / "a.npy", "b": folder / "gone.npy"}
    cases = {
        "settings": ("rank 1: lr: expected 0.003 as on rank 0, got 0.5", on_one(config=config(lr=0.5))),
        "N": ("rank 1: n_latents: expected 26 as on rank 0, got 27", on_one(config=config(n_latents=27))),
        "shards": ("rank 1: tensor_parallel: expected 1 as on rank 0, got 2", on_one(tensor_parallel=2)),
        "version": ("rank 1: version of triton: expected", other_version),
        "data": ("rank 1: train stream 'b': fingerprint: expected", other_data),
        "rows": (f"rank 1: train stream 'a': rows: expected {ROWS} as on rank 0, got {ROWS - 1}", other_rows),
        "a file": (f"rank 1: stream 'b' ({files['b']}): expected a file, got nothing there", on_one(streams=files)),
        "a bad row": ("stream 'b': expected finite features, got NaN or infinity in 1 rows: 5", a_bad_row),
        "weights": ("rank 1: encoders.a.weight: expected", another_model),
        "folder": ("out: expected a folder without a run, or resume, got", on_all(out=folder / "run")),
        "optimizer": ("optimizer: expected None (SparcAdam) with several processes", another_optimizer),
        "no divisor": ("tensor_parallel: expected a divisor of the 2 processes, got 3", on_all(tensor_parallel=3)),
        "lanes": ("batch_size: expected a multiple of 5 (lanes) and 2 (replicas), got 24", on_all(lanes=5)),
    }  # fmt: skip
    one = Trainer(BASE, streams(), folder / "run", device="cpu", quiet=True)
    one.start()
    one.close()
    return {name: functools.partial(refuses, *case) for name, case in cases.items()}


def passes(results: dict[str, list[str]]) -> None:
    wrong = [f"{name}, {text}" for name, texts in results.items() for text in texts]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
def test_four_processes_train_as_one(tmp_path):
    passes(together(tmp_path, 4, references(tmp_path, 4, ON[4])))


def test_two_processes_train_as_one_and_refuse_together(tmp_path):
    cases = references(tmp_path, 2, ON[2]) | refusals(tmp_path)
    _, whole = train("resumed", tmp_path / "resumed-2", lanes=2)
    torch.save(whole, tmp_path / "resumed-2.pt")
    train("resumed", tmp_path / "begun alone", max_steps=BEGUN, lanes=2)
    passes(together(tmp_path, 2, cases | {"goes on": functools.partial(goes_on, tmp_path)}))
    run, got = train("resumed", tmp_path / "begun", resume=True)  # one process
    assert run.lanes == 2 and len(got["losses"]) == len(whole["losses"]) - BEGUN
    is_finished(tmp_path / "begun", whole)


# ------------------------------------------------------------------------------------------------------------ faults


def killed(step: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halted(step: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def broken(step: int) -> None:
    raise RuntimeError("something broke")


def hanging(step: int) -> None:
    time.sleep(600)


def terminated(step: int) -> None:
    for _ in range(2):  # one from the scheduler, one forwarded by torchrun
        os.kill(os.getpid(), signal.SIGTERM)


def untroubled(step: int) -> None:
    pass


LIMIT = 8  # seconds
# name -> number of processes, the one that misbehaves, what it does, exit codes of it and the others, what those print
FAULTS = {
    "kill -9": (3, 1, killed, -signal.SIGKILL, LOST, "rank 1 is lost: its process is gone"),
    "kill -9 of rank 0": (2, 0, killed, -signal.SIGKILL, LOST, "rank 0 or the launcher is gone"),
    "stopped": (2, 1, halted, None, LOST, f"rank 1 is lost: no sign of life for {LIMIT} s"),
    "exception": (3, 2, broken, 1, LOST, "rank 2 is lost: RuntimeError: something broke"),
    "hang": (2, 1, hanging, 1, LOST, f"rank 1 is lost: no progress for {LIMIT} s (in step 3)"),
    "SIGTERM": (2, 1, terminated, 143, 143, ""),
    "nothing": (2, 1, untroubled, 0, 0, ""),
}


def misbehave(rank: int, world: int, port: int, folder: Path, who: int, fault, epochs: int, restarts: int) -> None:
    """One process of a run that is started by hand, with the environment of a launcher."""
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_RESTART_COUNT": str(restarts * rank),  # counted by machine: rank 0 is on a new one
                   "TORCHELASTIC_RUN_ID": folder.name}  # fmt: skip

    def on_step(step, loss, metrics):
        (folder / f"{rank}.step").write_text(str(step))
        if step == 3 and rank == who:
            fault(step)

    from sparc_kernels.cli import train as command

    command.Trainer = functools.partial(Trainer, on_step=on_step)
    limits = [f"--lost-after={LIMIT}", f"--hangs-after={LIMIT if fault is hanging else 300}", "--checkpoint-every=2"]
    given = [f"--stream={s}={folder.parent / s}.npy" for s in WIDTHS]
    sys.exit(cli.main(["train", *given, f"--out={folder}/run", "--n-latents=26", "--k=3", "--auxk=4",
                       "--batch-size=24", f"--epochs={epochs}", "--device=cpu", *limits]))  # fmt: skip


class Group:
    """Processes of one run, started by hand; a new attempt goes on in the folder of the one before it."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, folder: Path, name: str, port: int, restarts: int = 0):
        self.folder, self.name, (self.world, self.who, fault, *_) = folder / name, name, FAULTS[name]
        self.folder.mkdir(exist_ok=True)
        ends = name in ("kill -9 of rank 0", "nothing")  # of one epoch, finished by the next attempt
        more = self.folder, self.who, untroubled if restarts else fault, 1 if ends else 999, restarts
        self.processes = [
            self.context.Process(target=misbehave, args=(rank, self.world, port, *more)) for rank in range(self.world)
        ]
        for process in self.processes:
            process.start()

    def end(self) -> tuple[list[int | None], list[str]]:
        """Exit codes and outputs; a process that is stopped has no code."""
        for rank, process in enumerate(self.processes):
            process.join(5 if (rank, self.name) == (self.who, "stopped") else 300)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes, [(self.folder / f"{rank}.txt").read_text() for rank in range(self.world)]

    def seconds(self) -> float:
        """From the fault until the last of the others has told why it ends."""
        others = [self.folder / f"{rank}.txt" for rank in range(self.world) if rank != self.who]
        return max(p.stat().st_mtime for p in others) - (self.folder / f"{self.who}.step").stat().st_mtime


SOME = "kill -9", "kill -9 of rank 0", "exception", "nothing"


@pytest.mark.parametrize("names", [SOME, pytest.param([*FAULTS], marks=pytest.mark.long)], ids=["some", "all"])
def test_a_lost_process_ends_the_others_with_its_number_and_reason(tmp_path, names):
    Group.context.set_forkserver_preload(["sparc_kernels.cli.train", "torch._dynamo", "torch.distributed.tensor"])
    for s, x in streams().items():
        np.save(tmp_path / f"{s}.npy", x.numpy())
    with contextlib.ExitStack() as held:  # all at once, so that they differ
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in [*names, "again"]]
        ports = [s.getsockname()[1] for s in sockets]
    groups = [Group(tmp_path, name, port) for name, port in zip(names, ports, strict=False)]
    wrong, outputs = [], {}
    for group in groups:
        _, who, _, own_code, code, words = FAULTS[group.name]
        wanted = [own_code if rank == who else code for rank in range(group.world)]
        codes, texts = outputs[group.name] = group.end()
        if codes != wanted or not all(words in text for rank, text in enumerate(texts) if rank != who):
            wrong.append(f"{group.name}: exit codes {codes}, expected {wanted}: {texts}")
        if group.name.startswith("kill") and group.seconds() > 30:
            wrong.append(f"{group.name}: the others left after {group.seconds():.0f} s")
    assert not wrong, "\n".join(wrong)
    if "SIGTERM" in names:
        steps = {int((tmp_path / "SIGTERM" / f"{rank}.step").read_text()) for rank in range(2)}
        told = [text.count("SIGTERM after step 4") for text in outputs["SIGTERM"][1]]
        assert steps == {4} and told == [1, 0], outputs["SIGTERM"]
    again = Group(tmp_path, "kill -9 of rank 0", ports[-1], restarts=1).end()
    assert again[0] == [0, 0] and "Resuming after step 2 of 9" in again[1][0], again
    finished, want = (tmp_path / name / "run" / "model.safetensors" for name in ("kill -9 of rank 0", "nothing"))
    assert finished.read_bytes() == want.read_bytes()


# --------------------------------------------------------------------------------------------- one process of its own


def test_one_process_under_torchrun_takes_the_same_way(tmp_path):
    passes(together(tmp_path, 1, references(tmp_path, 1, {"global": (1,)})))
