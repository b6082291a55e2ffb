"""Several processes of one gloo group that run many cases, so that they are started once."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = [
    "conftest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "sparc_kernels.cli.train",
    "sparc_kernels.tools.trace",
]


def together(folder: Path, world: int, cases: dict[str, Callable[[], None]]) -> dict[str, list[str]]:
    """Run cases on every rank of a new group, one after the other.

    A case compares after its last collective, so that its failure on one rank leaves the others in step.

    Returns:
        For each case what went wrong, by rank.
    """
    start(_work, (str(folder), world, cases), world)
    results: list[dict] = [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(world)]
    return {name: [f"rank {r}: {result[name]}" for r, result in enumerate(results) if result[name]] for name in cases}


def start(work: Callable, args: tuple, world: int) -> None:
    """Run work(rank, *args) in new processes, which begin with the usual modules imported; wait for them."""
    multiprocessing.set_forkserver_preload(PRELOADED)  # imported once, unless another test has started the server
    mp.start_processes(work, args, nprocs=world, start_method="forkserver")


def _work(rank: int, folder: str, world: int, cases) -> None:
    from conftest import CUDA  # noqa: F401, chooses the interpreter

    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")  # poisons fresh memory
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=limit)
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, case in cases.items():
            try:
                case()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()
