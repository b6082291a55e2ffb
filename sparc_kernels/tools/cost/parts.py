"""Operations as parts with bytes, FLOPs, instructions and launches, and their time on a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import wraps
from typing import NamedTuple

from ...core.target import Target, as_target
from ..shape import Shape
from .gpus import GPU


class Reuse(NamedTuple):
    """Bytes of rows gathered by id."""

    used: float = 0  # of all uses
    distinct: float = 0  # of the distinct rows
    footprint: float = 0  # competing for L2 at one time


NO_REUSE = Reuse()


@dataclass(frozen=True)
class Part:
    """One kernel, or `launches` kernels of one kind."""

    name: str
    streamed: float = 0  # bytes that cross HBM and L2 once
    reuse: Reuse = NO_REUSE  # bytes that cross L2 at every use, and HBM where they are not in L2
    flops: float = 0  # of the algorithm; a multiply-add is 2
    unit: str = "float32"
    padding: float = 1  # executed FLOPs over `flops`, times the inverse of the share of a library GEMM's rate
    instructions: float = 0  # of warps, for kernels bound by them
    launches: int = 1
    library: bool = False  # torch's kernels, not the package's
    beside: bool = False  # on a side stream, no time of its own; `Wait` has what exceeds the parts beside it

    @property
    def l2(self) -> float:
        """Bytes through L2, HBM's included."""
        return self.streamed + self.reuse.used

    def hbm(self, gpu: GPU) -> float:
        """Return the bytes through HBM."""
        used, distinct, footprint = self.reuse
        missed = max(0.0, 1 - gpu.l2_bytes / footprint) if footprint else 0.0
        return self.streamed + distinct + missed * (used - distinct)

    def limits(self, gpu: GPU) -> dict[str, float]:
        """Return the seconds that each of the four limits would take alone."""
        return {
            "HBM": self.hbm(gpu) / gpu.bytes_per_s("HBM"),
            "L2": self.l2 / gpu.bytes_per_s("L2"),
            "FLOPs": self.padding * self.flops / gpu.flop_per_s(self.unit),
            "instructions": self.instructions / gpu.instructions_per_s(),
        }

    def shares(self, gpu: GPU) -> dict[str, float]:
        """Return the seconds on the device of the limit that binds and of the launches, by name."""
        if self.beside:
            return {}
        name, seconds = max(self.limits(gpu).items(), key=lambda item: item[1])
        return {name: seconds, "launches": 1e-6 * gpu.launch_us * self.launches}

    def seconds(self, gpu: GPU) -> float:
        """Return the seconds on the device."""
        return sum(self.shares(gpu).values())


@dataclass(frozen=True)
class Wait(Part):
    """Time that parts of a side stream take beyond those of the main stream beside them."""

    main: tuple[Part, ...] = ()
    side: tuple[Part, ...] = ()

    def shares(self, gpu: GPU) -> dict[str, float]:
        """Return the seconds on the device as if all of them went to launches."""
        alone = (sum(replace(p, beside=False).seconds(gpu) for p in parts) for parts in (self.side, self.main))
        return {"launches": max(next(alone) - next(alone), 0.0)}


@dataclass(frozen=True)
class Op:
    """Parts that run one after the other; `l2`, `flops` and `launches` are their sums, `l2` in bytes."""

    name: str
    parts: tuple[Part, ...]

    l2 = property(lambda self: sum(p.l2 for p in self.parts))
    flops = property(lambda self: sum(p.flops for p in self.parts))
    launches = property(lambda self: sum(p.launches for p in self.parts))

    def hbm(self, gpu: GPU) -> float:
        """Return the bytes through HBM."""
        return sum(p.hbm(gpu) for p in self.parts)

    def seconds(self, gpu: GPU) -> float:
        """Return the seconds on the device."""
        return sum(p.seconds(gpu) for p in self.parts)

    def bound(self, gpu: GPU) -> str:
        """Return the limit with the largest share of the time: HBM, L2, FLOPs, instructions or launches."""
        seconds = Counter(launches=0.0)
        for part in self.parts:
            seconds.update(part.shares(gpu))
        return max(seconds, key=seconds.__getitem__)


def of_gpu(made):
    """Decorate a function of a shape to use the default launch settings of the shape's architecture.

    The result does not depend on whether this process interprets kernels or has recorded settings.
    """

    @wraps(made)
    def on_gpu(s: Shape, *args, **named):
        with as_target(Target(s.arch, s.tf32)):
            return made(s, *args, **named)

    return on_gpu


def total(name: str, ops: Iterable[Op]) -> Op:
    """Concatenate the parts of several ops."""
    return Op(name, tuple(part for op in ops for part in op.parts))


# ------------------------------------------------------------------------------------------------ kinds of parts


def when(holds: bool, *parts: Part) -> tuple[Part, ...]:
    """Return the parts if `holds`, else none."""
    return parts if holds else ()


def of_torch(name: str, streamed: float, launches: int = 1, **how) -> Part:
    """Make a part of torch's own kernels, by fields of Part."""
    return Part(name, streamed, launches=launches, library=True, **how)


def on_side_stream(main: Iterable[Part], side: Iterable[Part]) -> tuple[Part, ...]:
    """Return the parts `side` as they run beside the parts `main`, with the time by which they take longer."""
    main, side = tuple(main), tuple(replace(p, beside=True) for p in side)
    return (*side, Wait("wait", launches=0, main=main, side=side))


def library_unit(s: Shape) -> str:
    """Return the unit of a library GEMM, a key of `GPU.tflop_s`."""
    return "tf32" if s.dtype == "float32" and s.tf32 else s.dtype


def product(s: Shape, name: str, m: int, n: int, d: int, *, extra: float = 0, **how) -> Part:
    """Make the part of a GEMM [m, d] x [d, n]: operands read, product written, `extra` bytes moved besides."""
    return Part(name, (m * d + n * d + m * n) * s.e + extra, flops=2 * m * n * d, **how)


# Assumption: torch.topk is a radix select of 2 bits a pass, then two collecting passes; instructions for 32 logits and
# a pass such that bf16 at (4096, 32768) costs what the GEMM of D 2560 does (ml-explore/mlx issue 3064: twice as many).
TOPK_INSTRUCTIONS = 12


def topk_part(s: Shape, k: int) -> Part:
    """Model torch.topk of k of each row of [B, N] logits, which stay in L2 between the passes; ids are int64."""
    passes, size = 4 * s.e + 2, s.B * s.N * s.e
    executed = TOPK_INSTRUCTIONS * passes * s.B * s.N / 32
    return of_torch("topk", s.B * k * (s.e + 8), 3, reuse=Reuse(passes * size, size), instructions=executed)


def distinct(n: int, uses: float) -> float:
    """Return the expected number of distinct ids among that many uniform draws from n."""
    return -n * math.expm1(uses * math.log1p(-1 / n)) if n > 1 else 1.0
