"""Compiles the kernels that a call of gpu_report will launch, on all cores. (verify compiles its own.)

    python -m benchmarks.ahead correctness|timing [--arch N] [--tiny]

Prints a count as kernels end and the result as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from sparc_kernels import decode_nmse
from sparc_kernels.core.console import ends_with_its_pipe
from sparc_kernels.launch.device import capability
from sparc_kernels.tools import cost, trace
from sparc_kernels.tools.compiler import compile_all
from sparc_kernels.tools.trace import Launch

from .cases import PRECISIONS
from .exercise import PARTS
from .plan import Options, plan

Listing = Callable[[], list[Launch]]  # takes a second, in a process of `compile_all`


def exercised(arch: int) -> list[Listing]:
    """The launches of `exercise`."""
    return [partial(recorded, part, arch) for part in PARTS]


def recorded(work: Callable[[str], None], arch: int, tf32: bool = False) -> list[Launch]:
    """The launches of work(device), which makes its tensors there."""
    launches: list[Launch] = []
    with trace.as_on_gpu(arch, tf32, launches), trace.Tracer([]):
        work("meta")
    return launches


def timed(options: Options, arch: int) -> list[Listing]:
    """Our launches in the groups of a plan: the step from gradients, the one without, decoding. Under autocast the
    kernels of both precisions; the few that only it has are compiled at their first launch."""
    listings = {}
    for group in plan(options):
        s, (kind, matmul, autocast, _) = group.case.shape, PRECISIONS[group.dtype]
        tf32 = matmul == "high"
        if group.op == "decode":
            listings[s, kind, tf32] = partial(recorded, partial(decoding, s, kind), arch, tf32)
        if group.op not in ("training", "select", "encode"):
            continue
        for dtype in (kind, autocast or kind):
            shape = cost.Shape(s.B, s.N, s.k, s.d_streams, str(dtype).removeprefix("torch."))
            for update, shadow in (("dense", None), ("direct", None if dtype == autocast else autocast)):
                more = {"shadow": shadow} if shadow else {}
                listings[shape, tf32, update, shadow] = partial(
                    traced, shape, arch, auxk=s.auxk or False, tf32=tf32, update=update, **more
                )
    return list(listings.values())


def traced(*args, **named) -> list[Launch]:
    return list(trace.trace(*args, **named).launches)


def decoding(s: cost.Shape, dtype: torch.dtype, device: str) -> None:
    """The decode operation of benchmarks.providers, on zeros."""

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    ids, values = made(s.B, s.k, dtype=torch.int64), made(s.S, s.B, s.k, dtype=torch.float32)
    weights, biases = ([made(*shape).requires_grad_() for shape in shapes] for shapes in (
        [(s.N, d) for d in s.d_streams], [(d,) for d in s.d_streams]))  # fmt: skip
    rows = [made(s.B, d) for d in s.d_streams]
    decode_nmse(ids, values.requires_grad_(), [w.t() for w in weights], biases, rows, impl="triton").mean().backward()


@ends_with_its_pipe
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=("correctness", "timing"))
    parser.add_argument("--arch", type=int, help="compute capability as 90 (default: this machine's GPU)")
    parser.add_argument("--tiny", action="store_true", help="two kernels, to see that it works")
    args = parser.parse_args(argv)
    arch = args.arch or capability(torch.device("cuda"))
    listings = exercised(arch) if args.call == "correctness" else timed(Options("cuda", quick=True), arch)
    launches = listings[-1]()[-2:] if args.tiny else listings

    def done(number: int, total: int) -> None:
        if number % 50 == 0:
            print(f"{number} of {total} kernels", flush=True)

    print(json.dumps(asdict(compile_all(launches, arch, on_done=done))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
