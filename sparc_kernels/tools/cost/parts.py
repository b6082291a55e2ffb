"""Operations as parts with bytes, FLOPs, instructions and launches, and the time that a GPU needs for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

from ...core.target import Target, as_target
from ..shape import Shape
from .gpus import GPU


class Reuse(NamedTuple):
    """Rows gathered by id, in bytes."""

    used: float = 0  # by every use
    distinct: float = 0  # of the distinct rows
    footprint: float = 0  # that compete for L2 at one time


NO_REUSE = Reuse()


@dataclass(frozen=True)
class Part:
    """One kernel, or `launches` of one kind."""

    name: str
    streamed: float = 0  # bytes that cross HBM and L2 once
    reuse: Reuse = NO_REUSE  # bytes that cross L2 at every use, and HBM where they are not in L2
    flops: float = 0  # of the algorithm; a multiply-add is 2
    unit: str = "float32"
    padding: float = 1  # FLOPs executed for one of `flops`, or the inverse of the share of a library GEMM's rate
    instructions: float = 0  # of a warp, where they decide and not bytes
    launches: int = 1
    library: bool = False  # torch's kernels, not the package's
    beside: bool = False  # on a second stream, beside parts that take longer: no time of its own

    @property
    def l2(self) -> float:
        return self.streamed + self.reuse.used

    def hbm(self, gpu: GPU) -> float:
        used, distinct, footprint = self.reuse
        missed = max(0.0, 1 - gpu.l2_bytes / footprint) if footprint else 0.0
        return self.streamed + distinct + missed * (used - distinct)

    def limits(self, gpu: GPU) -> dict[str, float]:
        """Seconds that each of the four limits would take alone."""
        return {
            "HBM": self.hbm(gpu) / gpu.bytes_per_s("HBM"),
            "L2": self.l2 / gpu.bytes_per_s("L2"),
            "FLOPs": self.padding * self.flops / gpu.flop_per_s(self.unit),
            "instructions": self.instructions / gpu.instructions_per_s(),
        }

    def shares(self, gpu: GPU) -> dict[str, float]:
        """Seconds on the device: those of the limit that binds, and those of the launches."""
        if self.beside:
            return {}
        name, seconds = max(self.limits(gpu).items(), key=lambda item: item[1])
        return {name: seconds, "launches": 1e-6 * gpu.launch_us * self.launches}

    def seconds(self, gpu: GPU) -> float:
        return sum(self.shares(gpu).values())


@dataclass(frozen=True)
class Op:
    """Parts that run one after the other. `l2` is all that they move: bytes between the multiprocessors and L2."""

    name: str
    parts: tuple[Part, ...]

    l2 = property(lambda self: sum(p.l2 for p in self.parts))
    flops = property(lambda self: sum(p.flops for p in self.parts))
    launches = property(lambda self: sum(p.launches for p in self.parts))

    def hbm(self, gpu: GPU) -> float:
        return sum(p.hbm(gpu) for p in self.parts)

    def seconds(self, gpu: GPU) -> float:
        return sum(p.seconds(gpu) for p in self.parts)

    def bound(self, gpu: GPU) -> str:
        """What most of the time goes to: HBM, L2, FLOPs, instructions or launches."""
        seconds = {"launches": 0.0}
        for part in self.parts:
            for name, share in part.shares(gpu).items():
                seconds[name] = seconds.get(name, 0.0) + share
        return max(seconds, key=seconds.get)


def of_gpu(made):
    """Decorator of a function of a shape: launch settings are the defaults of its architecture, whether this process
    runs Triton's interpreter or has settings recorded."""

    @wraps(made)
    def on_gpu(s: Shape, *args, **named):
        with as_target(Target(s.arch, s.tf32)):
            return made(s, *args, **named)

    return on_gpu


def total(name: str, ops: Iterable[Op]) -> Op:
    return Op(name, tuple(part for op in ops for part in op.parts))


def step_seconds(op: Op, gpu: GPU, graph: bool) -> float:
    """A whole step: as long as the device needs, or the host to issue its launches when there is no graph."""
    device = op.seconds(gpu)
    return device if graph else max(device, 1e-6 * gpu.host_us * op.launches)


# ------------------------------------------------------------------------------------------------ kinds of parts


def when(holds: bool, *parts: Part) -> tuple[Part, ...]:
    """The parts where a condition holds, else none."""
    return parts if holds else ()


def of_torch(name: str, streamed: float, launches: int = 1, **how) -> Part:
    return Part(name, streamed, launches=launches, library=True, **how)


def library_unit(s: Shape) -> str:
    """What a library GEMM computes on."""
    return "tf32" if s.dtype == "float32" and s.tf32 else s.dtype


def product(s: Shape, name: str, m: int, n: int, d: int, *, extra: float = 0, **how) -> Part:
    """[m, d] x [d, n]: operands read, product written, `extra` bytes besides."""
    return Part(name, (m * d + n * d + m * n) * s.e + extra, flops=2 * m * n * d, **how)


# Assumption: torch.topk is a radix select of 2 bits a pass, then two collecting passes; instructions for 32 logits and
# a pass such that bf16 at (4096, 32768) costs what the GEMM of D 2560 does (ml-explore/mlx issue 3064: twice as many).
TOPK_INSTRUCTIONS = 12


def topk_part(s: Shape, k: int) -> Part:
    """torch.topk of [B, N] logits: rows stay in L2 between the passes; k values and int64 ids written."""
    passes, size = 4 * s.e + 2, s.B * s.N * s.e
    executed = TOPK_INSTRUCTIONS * passes * s.B * s.N / 32
    return of_torch("topk", s.B * k * (s.e + 8), 3, reuse=Reuse(passes * size, size), instructions=executed)


def distinct(n: int, uses: float) -> float:
    """Expected distinct ids among `uses` uniform ones of n."""
    return -n * math.expm1(uses * math.log1p(-1 / n)) if n > 1 else 1.0
