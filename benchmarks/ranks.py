"""Time of a training step whose latents are divided among ranks, beside the same step on one rank alone.

    torchrun --nproc-per-node 8 -m benchmarks ranks --shape 4096,131072,64,1024/768/768,3
    torchrun --nproc-per-node 8 -m benchmarks ranks --tensor-parallel 4 --auxk 64 --json ranks.json
    torchrun --nproc-per-node 1 -m benchmarks ranks               # the same code path on one GPU

NCCL on GPUs, gloo on CPUs (whose times say nothing about GPUs). Each kind of step is verified first, on a small
problem, against one process. B is of the whole batch. Bytes are those that rank 0 receives in a step, counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.distributed import Ranks, count_bytes, shard_latents
from sparc_kernels.distributed.processes import join
from sparc_kernels.tools.shape import Shape, parse_shape

from . import environment
from .cases import DEAD_THRESHOLD, PRECISIONS

SCHEMA = "sparc_kernels.ranks/1"
SMALL = Shape(16, 64, 4, (16, 8), "float32")  # of the verification
TOLERANCE = 1e-5  # of the losses of two steps there, in float32


@dataclass
class Row:
    """One kind of step; times in milliseconds, the slowest rank's."""

    what: str
    ms: float  # least of the repeats
    median_ms: float
    samples_per_s: float  # at the least
    peak_mib: float | None  # of GPU memory, the largest of the ranks
    received: dict[str, int] = field(default_factory=dict)  # bytes by "dimension: what"

    def __str__(self):
        peak = "" if self.peak_mib is None else f"{self.peak_mib:10,.0f}"
        received = sum(self.received.values()) / 1e6
        return f"{self.what:<28}{self.ms:10.3f}{self.median_ms:10.3f}{self.samples_per_s:14,.0f}{received:12,.2f}{peak}"


HEAD = f"{'step':<28}{'ms':>10}{'median':>10}{'samples/s':>14}{'MB received':>12}{'peak MiB':>10}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=parse_shape, default=None, metavar="B,N,k,d,S", help="of the whole batch")
    add("--tensor-parallel", type=int, metavar="T", help="ranks that divide the latents (default: all)")
    add("--dtype", choices=PRECISIONS, help="default bfloat16 autocast on a GPU, float32 on a CPU")
    add("--auxk", type=int, default=0)
    add("--repeats", type=int, default=10)
    add("--alone", action=argparse.BooleanOptionalAction, default=True, help="the undivided model too, if it fits")
    add("--json", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def build(shape: Shape, auxk: int, dtype: torch.dtype, device: torch.device) -> AlignedSAE:
    torch.manual_seed(0)
    widths = {f"s{i}": d for i, d in enumerate(shape.d_streams)}
    model = AlignedSAE(
        widths, shape.N, shape.k, auxk or None, dead_steps_threshold=DEAD_THRESHOLD, device=device, dtype=dtype
    )
    for s in widths:  # a tenth is dead, as in the benchmarks' cases
        getattr(model, f"stats_last_nonzero_{s}")[: shape.N // 10] = 10 * DEAD_THRESHOLD
    return model


def rows(shape: Shape, dtype: torch.dtype, device: torch.device, ranks: Ranks | None) -> dict[str, torch.Tensor]:
    """The batch, or this replica's part of it."""
    g = torch.Generator(device).manual_seed(1)
    x = {f"s{i}": torch.randn(shape.B, d, generator=g, device=device) for i, d in enumerate(shape.d_streams)}
    part = slice(None)
    if ranks is not None:
        own = shape.B // ranks.replicas
        part = slice(ranks.replica * own, (ranks.replica + 1) * own)
    return {s: v[part].to(dtype) for s, v in x.items()}


def two_calls(model, optimizer, x):
    optimizer.zero_grad(set_to_none=True)
    loss, _ = model.compute_loss(model(x), x)
    loss.backward()
    optimizer.step()
    return loss.detach()


def training_step(model, optimizer, x):
    return model.training_step(x, optimizer)[0]


STEPS = {"two calls": two_calls, "training_step": training_step}


def verify(mesh, auxk: int, device: torch.device) -> None:
    """Raise AssertionError unless two steps of each kind give one process's losses."""
    for what, step in STEPS.items():
        losses = []
        for divided in (False, True):
            model = build(SMALL, min(auxk, SMALL.k), torch.float32, device)
            ranks = shard_latents(model, mesh).ranks if divided else None
            optimizer = SparcAdam(model, 1e-2, graph=False)
            x = rows(SMALL, torch.float32, device, ranks)
            losses.append(torch.stack([step(model, optimizer, x) for _ in range(2)]).tolist())
        for want, got in zip(*losses, strict=True):
            assert abs(got - want) <= TOLERANCE * abs(want), f"{what}: loss {got}, expected {want} as of one process"


def timed(what: str, step: Callable[[], object], shape: Shape, repeats: int, processes) -> Row:
    """Run one kind of step on all ranks together."""
    cuda = processes.device.type == "cuda"
    for _ in range(3):
        step()
    with count_bytes() as received:
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        processes.share(None)
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    every = [sorted(part) for part in processes.share(times)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    peaks = processes.share(peak)
    least, median = (max(part[i] for part in every) for i in (0, len(times) // 2))
    names = {f"{group}: {name}": count for (group, name), count in sorted(received.items())}
    return Row(what, least, median, 1e3 * shape.B / least, max(peaks) if cuda else None, names)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    processes = join()
    if not processes.grouped:
        print("benchmarks: error: ranks: expected processes that torchrun has started, got one alone")
        return 2
    device, cuda = processes.device, processes.device.type == "cuda"
    say = print if processes.leads else lambda *_: None
    shape = args.shape or parse_shape("4096,131072,64,1024/768/768,3" if cuda else "64,2048,16,64/48/48,3,fp32")
    dtype, _, half, _ = PRECISIONS[args.dtype or ("bfloat16 autocast" if cuda else "float32")]
    shards = args.tensor_parallel or processes.size
    if processes.size % shards or shape.B % (processes.size // shards):
        wanted = f"a divisor of {processes.size} ranks, whose replicas divide B {shape.B}"
        say(f"benchmarks: error: --tensor-parallel: expected {wanted}, got {shards}")
        return 2
    mesh = init_device_mesh(device.type, (processes.size // shards, shards), mesh_dim_names=("data", "latents"))
    verify(mesh, args.auxk, device)
    say(f"verified; {processes.size // shards} x {shards} ranks, {shape}, auxk {args.auxk}\n{HEAD}")
    found = []
    for divided in (False, True) if args.alone else (True,):
        for what, step in STEPS.items():
            model = build(shape, args.auxk, dtype, device)
            ranks = shard_latents(model, mesh).ranks if divided else None
            shadow = half if what == "training_step" else None
            optimizer = SparcAdam(model, 0.0, shadow=shadow, graph=False)
            x = rows(shape, dtype, device, ranks)
            autocast = partial(torch.autocast, device.type, half or torch.bfloat16, enabled=half is not None)

            def run(step=step, model=model, optimizer=optimizer, x=x, autocast=autocast):
                with autocast():
                    step(model, optimizer, x)

            place = f"{processes.size // shards} x {shards} ranks" if divided else "one rank alone"
            found.append(timed(f"{what}, {place}", run, shape, args.repeats, processes))
            say(found[-1])
            del model, optimizer, x, run
    if args.json and processes.leads:
        record = {"schema": SCHEMA, "environment": environment.environment(device.type, torch.get_num_threads()),
                  "ranks": processes.size, "shards": shards, "shape": shape.record(), "auxk": args.auxk,
                  "rows": [asdict(row) for row in found]}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    processes.leave()
    return 0
