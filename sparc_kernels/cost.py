"""The cost model: bytes and FLOPs of every op from its shape, what a GPU could do at best, and which part is the limit.

Everything here is **modelled**. Nothing was measured, and no number is more than its assumptions, which are:

- A kernel takes as long as the slowest of four: bytes through HBM, bytes through L2 (all it moves, HBM's included),
  FLOPs, instructions (only the selector's). Kernels of a step run one after the other, and each adds `launch_us`.
- Tensors are read or written once per kernel, and cross HBM each time: small ones that stay in L2 are not credited.
- Gathered rows cross L2 at every use. HBM delivers each of the distinct rows once while the slab that a kernel works on
  fits in L2; beyond that a repeated use misses with probability 1 - (L2 / slab). Ids are taken as uniform, which is
  the worst case: real latents are skewed.
- Rates are the data sheet's times a fraction that is written beside it. The fractions are assumptions.
- Outside a CUDA graph the host must issue every launch: a step lasts at least launches * `host_us`.

- Launches and the bytes of torch's own kernels are those of the traced step (`_trace.trace`), which the tests hold them
  to; what torch launches inside one of its operators (sorts, `topk`, `index_put`) is an assumption beside each.

Not modelled: wave quantisation, tails, the latency of dependent loads, programs that look at a number and exit, hot
latents split over programs, local selection, fp32 with k > 128 (several launches), clocks.

Symbols as in docs/math.md: B rows, N latents, k active, S streams, D = sum of their widths, M = B k, e = bytes of a
weight.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

from ._checks import check_int, fail, require
from ._launch import (
    L2_BYTES,
    MAX_K,
    MAX_STREAMS,
    PARTIAL_BYTES,
    SCRATCH_BYTES,
    SLAB_BYTES,
    SPREAD_COLUMNS,
    SPREAD_PLACES,
    SPREAD_SOURCES,
    SPREAD_WIDE,
    cdiv,
    encode_by_library,
    next_power_of_2,
    select_config,
    select_rows,
)

# ----------------------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class GPU:
    """Ceilings of one GPU: data sheet rates, and the fraction of them that is taken to be within reach."""

    name: str
    match: tuple[str, ...]  # words that torch's name of the device holds, all of them
    hbm_gb_s: float  # data sheet
    l2_gb_s: float  # taken to be within reach, reads of rows of 1 kB and more: an assumption on every GPU
    l2_bytes: float
    tflop_s: dict[str, float]  # data sheet, dense, by unit; half precision accumulating in fp32
    sms: int
    clock_ghz: float
    without: tuple[str, ...] = ()  # words that the name must not hold
    hbm_fraction: float = 0.9  # assumption
    gemm_fraction: float = 0.8  # assumption, a library GEMM of thousands of rows
    issue_fraction: float = 0.5  # assumption, of 4 instructions a clock and multiprocessor, for code full of barriers
    launch_us: float = 2.0  # assumption, what a kernel costs the device beyond its work: ramp, tail, gap to the next
    host_us: float = 6.0  # assumption, what PyTorch's eager mode needs for a launch, autograd included

    def bytes_per_s(self, level: str) -> float:
        return 1e9 * (self.hbm_gb_s * self.hbm_fraction if level == "HBM" else self.l2_gb_s)

    def flop_per_s(self, unit: str) -> float:
        rate = self.tflop_s["tf32"] / 3 if unit == "tf32x3" else self.tflop_s[unit]  # three tf32 products each
        return 1e12 * rate * self.gemm_fraction

    def instructions_per_s(self) -> float:
        return 4e9 * self.sms * self.clock_ghz * self.issue_fraction


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "tf32": tf32, "float32": fp32}


MIB = 2**20
# Rates, sizes: data sheets NVIDIA A100 (2021), H100 (2023), H200 (2024), HGX B200, L40S; whitepapers "NVIDIA Ada GPU
# Architecture" and "NVIDIA RTX Blackwell GPU Architecture", appendix A; AMD Instinct MI300X (2023). Where NVIDIA quotes
# tensor rates with sparsity half of that stands here; GeForce rates are those that accumulate in fp32. The L40S is
# taken to have the whole L2 of its die, as the L40 has.
# L2 within reach: 5.5 TB/s is what the study of these kernels took for the H200, and taken for the H100 (same die) too;
# A100 the same share of its 5,120 B a clock. RTX 4090 and MI300X (its Infinity Cache: the 4 MB L2s hold no slab) are
# near what Chips and Cheese published, RTX 5090 and L40S scaled from the former. B200 is a guess above its HBM.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", ("a100", "80gb"), 2039, 4200, 40 * MIB, _rates(312, 156, 19.5), 108, 1.41, ("pcie",)),
        GPU("H100", ("h100", "hbm3"), 3350, 5500, 50 * MIB, _rates(989, 494, 67), 132, 1.75, ("nvl", "pcie")),
        GPU("H200", ("h200",), 4800, 5500, 60 * MIB, _rates(989, 494, 67), 132, 1.75, ("nvl", "gh200")),
        GPU("B200", ("b200",), 8000, 10000, 126 * MIB, _rates(2250, 1125, 75), 148, 1.85, ("gb200",)),
        GPU("RTX4090", ("rtx", "4090"), 1008, 5000, 72 * MIB, _rates(165, 82.6, 82.6), 128, 2.52, ("4090 d",)),
        GPU("RTX5090", ("rtx", "5090"), 1792, 6000, 96 * MIB, _rates(209, 105, 105), 170, 2.41, ("5090 d",)),
        GPU("L40S", ("l40s",), 864, 5000, 96 * MIB, _rates(362, 183, 91.6), 142, 2.52),
        GPU("MI300X", ("mi300x",), 5300, 11900, 256 * MIB, _rates(1307, 654, 163), 304, 2.1),
    )
}
DEFAULT_GPU = "H200"
NOT_WHOLE = ("mig ", "laptop", "max-q")  # words of names that say: not the device of the data sheet


def gpu_named(name: str) -> GPU:
    """A GPU of the table by its key, upper or lower case."""
    found = {key.lower(): gpu for key, gpu in GPUS.items()}.get(str(name).lower())
    if found is None:
        fail("gpu", f"one of {', '.join(GPUS)}", repr(name))
    return found


def gpu_of_device(name: str) -> GPU | None:
    """The GPU whose words the device's name holds ("NVIDIA H200" is H200); None when it is not in the table."""
    name = name.lower()
    for gpu in GPUS.values():
        if all(w in name for w in gpu.match) and not any(w in name for w in (*gpu.without, *NOT_WHOLE)):
            return gpu
    return None


# --------------------------------------------------------------------------------------------------------------- shapes

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """One training step: sizes, and how it computes."""

    B: int
    N: int
    k: int
    d_streams: tuple[int, ...]
    dtype: str = "bfloat16"  # of the arithmetic, and of the parameters unless autocast
    auxk: int = 0  # AuxK's latents a row, 0 without
    dead: int = 0  # dead latents of each stream
    tf32: bool = False  # what torch's float32 matmul precision allows
    autocast: bool = False  # float32 parameters, rounded to `dtype` in every step
    compiled: bool = False  # under torch.compile, where the gradient is not taken in the forward

    def __post_init__(self):
        for name in ("B", "N"):
            check_int(name, getattr(self, name), 1)
        limit = f"at most N and {MAX_K}"
        check_int("k", self.k, 1, min(self.N, MAX_K), limit)
        check_int("auxk", self.auxk, 0, min(self.N, MAX_K), limit)
        check_int("dead", self.dead, 0, self.N, "N")
        ok = isinstance(self.d_streams, tuple) and 1 <= len(self.d_streams) <= MAX_STREAMS
        require(ok, "d_streams", f"a tuple of 1..{MAX_STREAMS} widths", repr(self.d_streams))
        for s, d in enumerate(self.d_streams):
            check_int(f"d_streams[{s}]", d, 1)
        require(self.dtype in ITEMSIZE, "dtype", f"one of {', '.join(ITEMSIZE)}", repr(self.dtype))
        require(not (self.autocast and self.dtype == "float32"), "autocast", "a half precision dtype", self.dtype)

    @property
    def S(self) -> int:
        return len(self.d_streams)

    @property
    def D(self) -> int:
        return sum(self.d_streams)

    @property
    def M(self) -> int:
        """Selected ids."""
        return self.B * self.k

    @property
    def e(self) -> int:
        """Bytes of a weight."""
        return ITEMSIZE[self.dtype]

    @property
    def library_unit(self) -> str:
        """What a library GEMM computes on."""
        return "tf32" if self.dtype == "float32" and self.tf32 else self.dtype

    @property
    def kernel_unit(self) -> str:
        """What the Triton GEMM computes on: never slower than the library's fp32."""
        return self.dtype if self.dtype != "float32" else "tf32" if self.tf32 else "tf32x3"

    @property
    def gather_unit(self) -> str:
        return self.dtype if self.dtype != "float32" else "tf32x3"

    def __str__(self):
        same = len(set(self.d_streams)) == 1
        widths = f"{self.S} x {self.d_streams[0]}" if same else "/".join(map(str, self.d_streams))
        return f"B {self.B}, N {self.N}, k {self.k}, d {widths}, {self.dtype}"


# -------------------------------------------------------------------------------------------- parts, ops and their time


class Reuse(NamedTuple):
    """Rows gathered by id: bytes used, bytes of the distinct rows, and bytes that compete for L2 at one time."""

    used: float
    distinct: float
    footprint: float


NO_REUSE = Reuse(0, 0, 0)


@dataclass(frozen=True)
class Part:
    """One kernel, or a few of one kind."""

    name: str
    streamed: float = 0  # bytes that cross HBM and L2 once
    reuse: Reuse = NO_REUSE  # bytes that cross L2 at every use and HBM when they are not there
    flops: float = 0  # of the algorithm, a multiply-add is 2
    unit: str = "float32"
    padding: float = 1  # FLOPs executed for one of `flops`, or the inverse of the share of a library GEMM's rate
    instructions: float = 0  # of a warp, where they and not bytes decide
    launches: int = 1
    library: bool = False  # torch's kernels, not the package's
    beside: bool = False  # on a second stream, beside parts that take longer (tests/test_cost.py): no time of its own

    @property
    def l2(self) -> float:
        return self.streamed + self.reuse.used

    def hbm(self, gpu: GPU) -> float:
        used, distinct, footprint = self.reuse
        missed = max(0.0, 1 - gpu.l2_bytes / footprint) if footprint else 0.0
        return self.streamed + distinct + missed * (used - distinct)

    def limits(self, gpu: GPU) -> dict[str, float]:
        """Seconds that each of the four would take alone."""
        return {
            "HBM": self.hbm(gpu) / gpu.bytes_per_s("HBM"),
            "L2": self.l2 / gpu.bytes_per_s("L2"),
            "FLOPs": self.padding * self.flops / gpu.flop_per_s(self.unit),
            "instructions": self.instructions / gpu.instructions_per_s(),
        }

    def seconds(self, gpu: GPU) -> float:
        """On the device, launches included."""
        if self.beside:
            return 0.0
        return max(self.limits(gpu).values()) + 1e-6 * gpu.launch_us * self.launches


@dataclass(frozen=True)
class Op:
    name: str
    parts: tuple[Part, ...]

    @property
    def l2(self) -> float:
        """Bytes between the multiprocessors and L2: all that the op moves."""
        return sum(p.l2 for p in self.parts)

    @property
    def flops(self) -> float:
        return sum(p.flops for p in self.parts)

    @property
    def launches(self) -> int:
        return sum(p.launches for p in self.parts)

    def hbm(self, gpu: GPU) -> float:
        return sum(p.hbm(gpu) for p in self.parts)

    def seconds(self, gpu: GPU) -> float:
        """On the device: its parts one after the other."""
        return sum(p.seconds(gpu) for p in self.parts)

    def bound(self, gpu: GPU) -> str:
        """What most of the time goes to: HBM, L2, FLOPs, instructions or launches."""
        shares: dict[str, float] = {"launches": 0.0}
        for part in self.parts:
            if part.beside:
                continue
            shares["launches"] += 1e-6 * gpu.launch_us * part.launches
            name, seconds = max(part.limits(gpu).items(), key=lambda item: item[1])
            shares[name] = shares.get(name, 0.0) + seconds
        return max(shares, key=shares.get)


def total(name: str, ops: list[Op]) -> Op:
    return Op(name, tuple(part for op in ops for part in op.parts))


def step_seconds(op: Op, gpu: GPU, graph: bool) -> float:
    """A whole step: as long as the device needs, or the host to issue its launches when there is no graph."""
    device = op.seconds(gpu)
    return device if graph else max(device, 1e-6 * gpu.host_us * op.launches)


def _distinct(n: int, uses: float) -> float:
    """Expected distinct ids among `uses` uniform ones of n."""
    return -n * math.expm1(uses * math.log1p(-1 / n)) if n > 1 else 1.0


def _cut(s: Shape, d: int, k: int) -> tuple[int, int]:
    """Columns of one slab of a gather over d columns of W, and how many slabs, as `_launch.gather_config` cuts them."""
    k_pad, tile = max(next_power_of_2(k), 16), 16384 if s.e == 2 else 8192
    block = min(max(tile // (k_pad * s.e), 16), 128, max(next_power_of_2(d), 16))
    least = max(4, 256 // block)
    columns = min(max(SLAB_BYTES // (s.N * block * s.e), least) * block, d)
    if s.N * least * block * s.e > 4 * L2_BYTES:  # little would be reused
        columns = d
    return columns, cdiv(d, columns)


def _gathered(s: Shape, d: int, k: int, found: int, n: int) -> Reuse:
    """`found` of n rows of d columns per row of B, in a launch of k places a row, column slab after column slab."""
    if not found:
        return NO_REUSE
    uses = s.B * found
    distinct = _distinct(n, uses)
    return Reuse(uses * d * s.e, distinct * d * s.e, distinct * _cut(s, d, k)[0] * s.e)


# ------------------------------------------------------------------------------------------------------- encoder's ops

# Compiled (sm_90, Triton 3.9): the epilogue adds about 46 / D of the main loop to a 128 x 256 tile.
EPILOGUE = 46
# Assumption: the share of the library's rate that the Triton GEMM reaches; the one behind `_launch.encode_by_library`.
TRITON_GEMM = 0.93
# Compiled (sm_90, Triton 3.9): a warp of the selector executes about 1,640 instructions outside its two bisections, and
# 73 + 46 a step. Simulated (normal logits, tests/test_cost.py): steps of each bisection, 5 to 9 of 16 or 19 in half
# precision and 8 to 10 of 32 in fp32, because they are bracketed and stop at a count of k.
SELECT_INSTRUCTIONS = 1640
BISECTION_INSTRUCTIONS = 119
BISECTION_STEPS = {2: 7, 4: 9}


def _gemm(s: Shape, name: str, m: int, n: int, d: int, unit: str, padding: float = 1, extra: float = 0) -> Part:
    """[m, d] x [d, n]: operands read, product written, `extra` bytes beside."""
    return Part(name, (m * d + n * d + m * n) * s.e + extra, flops=2 * m * n * d, unit=unit, padding=padding)


def centre(s: Shape) -> Op:
    """x - b of every stream, for the selection, the values and dW_enc."""
    return Op("centre", (Part("centre", 2 * s.B * s.D * s.e),))


def gemm(s: Shape) -> Op:
    """The bare encoder GEMM of a library: x and W_enc read, the logits written."""
    return Op("encoder GEMM", (_gemm(s, "GEMM", s.B, s.N, s.D, s.library_unit),))


# torch.topk at thousands of rows is a radix select of 2 bits a pass with ballots, then two collecting passes. Its
# instructions for 32 logits and a pass are an assumption under which bf16 at (4096, 32768) costs about what the GEMM of
# D 2560 does, the figure of the kernels' study; a public timing (ml-explore/mlx issue 3064) suggests twice as many.
TOPK_INSTRUCTIONS = 12


def _topk(s: Shape, k: int) -> Part:
    """torch.topk of [B, N] logits: rows stay in L2 between the passes; k values and int64 ids written."""
    passes, size = 4 * s.e + 2, s.B * s.N * s.e
    return Part(
        "topk", s.B * k * (s.e + 8), Reuse(passes * size, size, 0),
        instructions=TOPK_INSTRUCTIONS * passes * s.B * s.N / 32, launches=3, library=True,
    )  # fmt: skip


def mm_topk(s: Shape) -> Op:
    """The GEMM, then torch.topk."""
    return Op("mm + topk", (*gemm(s).parts, _topk(s, s.k)))


def maxima_bytes(s: Shape, k: int, n: int) -> tuple[float, float]:
    """(written by whoever takes the maxima, read by the selector beside ids and logits), of n columns, in bytes."""
    config = select_config(s.N, k)
    group, span = config.group, config.span
    groups, spans = cdiv(n, group), cdiv(n, span)
    if group == span:
        return s.B * groups * s.e, s.B * groups * s.e
    return s.B * (groups + spans) * s.e, s.B * (spans + k * (span // group)) * s.e


def _selector(s: Shape, k: int, n: int) -> Part:
    """Maxima and the logits of k groups read, int64 ids written; per warp, what its code executes."""
    config = select_config(s.N, k)
    _, read = maxima_bytes(s, k, n)
    per_warp = SELECT_INSTRUCTIONS + BISECTION_STEPS[s.e] * BISECTION_INSTRUCTIONS
    steps = 1 if config.group == config.span else 1.5  # a third narrowing
    return Part(
        "selector", read + s.B * min(k * config.group, n) * s.e + 8 * s.B * k,
        instructions=steps * per_warp * config.num_warps * s.B,
    )  # fmt: skip


def _chunks(s: Shape, compact: bool = False) -> tuple[int, bool]:
    """Launches of GEMM and selector, one for each part of the rows; whether selectors run beside the next GEMM."""
    config = select_config(s.N, s.k)
    columns = s.N + cdiv(s.N, config.group) + (cdiv(s.N, config.span) if config.span > config.group else 0)
    block_m, block_n = (64, 128) if s.e == 4 or s.B <= 512 else (128, 256)  # of sm_90
    tiles = cdiv(s.B, block_m) * cdiv(s.N, max(block_n, config.span)) if config.small and not compact else 0
    rows, buffers = select_rows(s.B, columns * s.e + 16 * config.k_pad, block_m, tiles)
    return cdiv(s.B, rows), buffers > 1


def _selectors(s: Shape, chunks: int, beside: bool) -> list[Part]:
    """The selector of all rows: those beside a GEMM, and those that have the GPU for themselves.

    Beside: a block of it fits on a multiprocessor next to one of the GEMM (compiled, sm_90: 216 of the GEMM's registers
    times 256 threads leave 10,240, the selector needs 80 times 128), and issues where the tensor cores are waited for.
    That the GEMM is not slowed down is an assumption.
    """
    whole = _selector(s, s.k, s.N)
    if not beside:
        return [replace(whole, launches=chunks)]
    last = 1 / chunks
    return [
        replace(whole, name="selector, beside", streamed=(1 - last) * whole.streamed, launches=chunks - 1,
                instructions=(1 - last) * whole.instructions, beside=True),
        replace(whole, streamed=last * whole.streamed, instructions=last * whole.instructions),
    ]  # fmt: skip


def select_fused(s: Shape) -> Op:
    """Triton GEMM whose epilogue writes group maxima, then the selector. The inputs are centred already."""
    written, _ = maxima_bytes(s, s.k, s.N)
    padding, (chunks, beside) = (1 + EPILOGUE / s.D) / TRITON_GEMM, _chunks(s)
    again = (chunks - 1) * s.N * s.D * s.e  # every chunk of rows reads W_enc
    main = _gemm(s, "GEMM + maxima", s.B, s.N, s.D, s.kernel_unit, padding, written + again)
    return Op("select (fused)", (replace(main, launches=chunks), *_selectors(s, chunks, beside)))


def select_library(s: Shape) -> Op:
    """One library GEMM over joint storage, one pass over the logits for the maxima, then the selector."""
    written, _ = maxima_bytes(s, s.k, s.N)
    chunks, beside = _chunks(s)
    main = _gemm(s, "GEMM", s.B, s.N, s.D, s.library_unit, extra=(chunks - 1) * s.N * s.D * s.e)
    casts = 2 if s.e == 2 else 0  # to fp32 and back
    biases = s.N * ((s.S - 1) * (8 + s.e) + 6 * casts)
    sums = Part("sum of biases", chunks * biases, launches=chunks * (s.S - 1 + casts), library=True)
    passed = Part("row maxima", s.B * s.N * s.e + written, launches=chunks)
    selectors = _selectors(s, chunks, beside)
    return Op("select (library)", (replace(main, launches=chunks, library=True), sums, passed, *selectors))


def select(s: Shape) -> Op:
    """The variant that the package takes: the library where its GEMM pays and the weights lie side by side, which those
    of one stream do, and those of several when autocast has just written them (`encode.JointCast`)."""
    joint = s.S == 1 or (s.autocast and all(d % 8 == 0 for d in s.d_streams))
    return select_library(s) if joint and encode_by_library(s.B, s.D, s.e, s.tf32) else select_fused(s)


def even_gemm_share(s: Shape, gpu: GPU) -> float:
    """The share of the library's GEMM rate from which the fused variant is the faster one."""
    main, *selectors = select_fused(s).parts
    spare = select_library(s).seconds(gpu) - sum(p.seconds(gpu) for p in selectors)
    spare -= 1e-6 * gpu.launch_us * main.launches
    return main.flops * (1 + EPILOGUE / s.D) / gpu.flop_per_s(main.unit) / spare


def _dots(s: Shape, d: int, k: int, found: int, n: int) -> tuple[Part, float]:
    """Gather of `found` of k columns that makes dots with x; the bytes of its partial sums, one for each slab."""
    slabs = _cut(s, d, k)[1]
    part = 4 * s.B * k * slabs
    streamed = s.B * d * s.e + 8 * s.B * k * slabs + part
    flops = 2 * s.B * found * d
    return Part("dots", streamed, _gathered(s, d, k, found, n), flops, s.gather_unit, padding=16), part


def _values(s: Shape, k: int, found: int, n: int) -> tuple[Part, ...]:
    """`values` of k places a row, of which `found` exist, among n latents."""
    made, held, finishes = [_dots(s, d, k, found, n) for d in s.d_streams], 0, 1
    for _, part in made[:-1]:
        held += part
        if held >= SCRATCH_BYTES:
            held, finishes = 0, finishes + 1
    finish = sum(part for _, part in made) + s.S * s.B * k * (8 + s.e + 4)
    return (*(part for part, _ in made), Part("finish", finish, launches=finishes))


def values(s: Shape) -> Op:
    """Per stream k encoder rows gathered per row: centred x and ids read, the dots of every slab written; then one
    kernel for all streams (or as many as the scratch holds dots of) that adds the slabs and the bias, and writes fp32
    values."""
    return Op("values", _values(s, s.k, s.k, s.N))


def counters(s: Shape) -> Op:
    """A byte a latent and stream zeroed, set where a value fires, read with the int64 counters, which are written."""
    SN, SM = s.S * s.N, s.S * s.M
    zeros = Part("zeros", SN, library=True)
    return Op("counters", (zeros, Part("fired", SM * (4 + 8 + 1)), Part("count", SN * (1 + 8 + 8))))


# Compiled (sm_90, Triton 3.9): a warp of `_lists_kernel` executes about 20 instructions for 32 places; for 32 offsets
# 105, most of them a 64-bit division, and 22 for each step of their bisection.
LISTS_INSTRUCTIONS, OFFSETS_INSTRUCTIONS, LISTS_STEP = 20, 105, 22


def _sort(items: int, key: int) -> Part:
    """torch.sort of keys of `key` bytes with int64 positions. Assumption: a radix pass for each byte, which reads and
    writes both, and 4 launches beside: positions, histogram, scan, and a copy."""
    return Part("sort", 2 * key * items * (key + 8) + 8 * items, launches=key + 4, library=True)


def _lists(s: Shape, k: int, groups: int) -> tuple[Part, ...]:
    """`inverse_index` of groups of B k places each, with one sort."""
    M, offsets = s.B * k, groups * (s.N + 1)
    size, key = groups * M, 2 if offsets < 2**15 else 4
    bisection = OFFSETS_INSTRUCTIONS + LISTS_STEP * (M.bit_length() + 1)
    instructions = LISTS_INSTRUCTIONS * max(size, offsets) + bisection * offsets
    lists = Part("lists", size * (8 + key + 4 + 4) + 4 * offsets, instructions=instructions / 32)
    return Part("keys", size * (8 + key)), _sort(size, key), lists


def inverse_index(s: Shape) -> Op:
    """Ids narrowed to keys of 2 or 4 bytes; keys sorted; both lists narrowed, and the offsets found by bisection: all
    beside the gathers of the values."""
    return Op("inverse index", tuple(replace(part, beside=True) for part in _lists(s, s.k, 1)))


# ------------------------------------------------------------------------------------------------------ decoder's ops


def decode_nmse(s: Shape) -> Op:
    """Losses alone: k decoder rows gathered per row and target, once for all S sources; x, ids and values read."""
    parts = []
    for d in s.d_streams:
        slabs = _cut(s, d, s.k)[1]
        streamed = s.B * d * s.e + slabs * (s.M * (8 + 4 * s.S) + 4 * s.S * s.B)
        streamed += s.B * d * s.e if s.auxk else 0  # AuxK needs each target's own error
        reuse, flops = _gathered(s, d, s.k, s.k, s.N), 2 * s.S * s.M * d
        parts.append(Part("gather", streamed, reuse, flops, s.gather_unit, padding=16 / s.S))
        if slabs > 1:
            parts.append(Part("sum of slabs", 4 * s.S * s.B * (slabs + 1), library=True))
    return Op("losses", tuple(parts))


def route(s: Shape, d: int) -> tuple[bool, int]:
    """Whether a decoder of width d has its gradient made by H, and how many columns at a time, as `decoder._route`."""
    width = SCRATCH_BYTES * (2 if s.S > 3 else 1) // (s.M * s.e)
    chunk = MAX_K if s.e == 2 else 128
    few = s.e == 2 or s.k <= SPREAD_WIDE
    many = s.S > SPREAD_SOURCES or (s.S == SPREAD_SOURCES and s.M >= SPREAD_PLACES and few)
    spread = many and s.dtype != "float16" and s.k <= chunk
    if spread and width >= min(d, SPREAD_COLUMNS):
        return True, min(d, max(width // 128 * 128, 16))
    return False, min(d, max(SCRATCH_BYTES // (s.S * s.B * s.e) // 128 * 128, SPREAD_COLUMNS))


def _pieces(d: int, width: int) -> list[int]:
    return [min(width, d - c) for c in range(0, d, width)]


def _one_pass(s: Shape, d: int, first: bool, found: int, n: int) -> list[Part]:
    """Gather of one target that makes losses, dv, sum_s coef E in fp32, and E of all sources or H; then the kernel that
    adds up its slabs and scales dv, added to that of earlier targets. Of its k places a row `found` exist, among n
    latents. With AuxK the target's own E is kept too."""
    spread, width = route(s, d)
    SM, SB, parts = s.S * s.M, s.S * s.B, []
    if spread:  # where in list order each place stands
        parts.append(Part("places", 8 * s.M))
    held, collected, added = [], 0.0, False
    pieces = _pieces(d, width)
    for i, columns in enumerate(pieces):
        slabs = _cut(s, columns, s.k)[1]
        kept = s.M * columns * s.e if spread else s.S * s.B * columns * s.e
        kept += s.B * columns * s.e if s.auxk else 0
        sums = slabs * 4 * (SM + SB)
        read = slabs * (s.M * (8 + (4 if spread else 0)) + 4 * (SM + SB))
        parts.append(Part(
            "gather", s.B * columns * (s.e + 4) + read + kept + sums, _gathered(s, columns, s.k, found, n),
            flops=(6 if spread else 4) * SB * found * columns, unit=s.gather_unit, padding=16 / s.S,
        ))  # fmt: skip
        held.append(slabs * 4 * SM)
        collected += sums
        if i == len(pieces) - 1 or sum(held) > PARTIAL_BYTES or len(held) == 4:
            adds = 4 * SM * (added or not first) + 4 * SB * added
            parts.append(Part("collect", collected + 4 * SB + 4 * (SM + SB) + adds))
            held, collected, added = [], 0.0, True
    return parts


def decode_losses_and_gradients(s: Shape) -> Op:
    """One gather pass per target that makes losses, dv and the errors (or H); the weights' sums are `reduce_dec`."""
    alone = not takes_gradient_ahead(s)  # then every target has a dv of its own
    parts = [part for t, d in enumerate(s.d_streams) for part in _one_pass(s, d, alone or t == 0, s.k, s.N)]
    return Op("losses + dv", tuple(parts))


REDUCE_COLUMNS = 1024  # of one program


def _reduced(s: Shape, d: int, per_entry: int, sources: int, written: float, entries: int) -> Part:
    """Per list entry the rows of `sources` out of L2; per tile of columns the list, offsets and per_entry bytes."""
    block = min(max(next_power_of_2(d), 128), REDUCE_COLUMNS)
    rows = sources * s.B * d * s.e
    lists = cdiv(d, block) * (entries * per_entry + 4 * s.N)
    used = Reuse(sources * entries * d * s.e, rows, rows * min(1, block / d)) if entries else NO_REUSE
    return Part("reduce", lists + written, used, flops=2 * sources * entries * d)


def _finish(s: Shape) -> Part:
    """Looks at every 64th place whether a list was split there."""
    return Part("finish", s.M)


def _errors_reduced(s: Shape, d: int, width: int) -> list[Part]:
    """Per list entry the errors of S sources read out of L2, with their weights and scales; dW_dec written."""
    parts = []
    for columns in _pieces(d, width):
        parts.append(_reduced(s, columns, 4 + 8 * s.S, s.S, s.N * columns * s.e, s.M))
        parts.append(_finish(s))
    return parts


def _spread_reduced(s: Shape, d: int, width: int) -> list[Part]:
    """H, in list order, read once and summed in segments; dW_dec written."""
    parts = []
    for columns in _pieces(d, width):
        parts.append(Part("segment sum", s.M * columns * s.e + s.N * (columns * s.e + 4), flops=s.M * columns))
        parts.append(_finish(s))
    return parts


def reduce_errors(s: Shape) -> Op:
    """dW_dec by the E route, whatever S is."""
    return Op("dW_dec (errors)", tuple(part for d in s.d_streams for part in _errors_reduced(s, d, d)))


def reduce_dec(s: Shape) -> Op:
    """dW_dec by the route that the package takes: through H from three sources on where places are many, from four on
    everywhere."""
    parts = []
    for d in s.d_streams:
        spread, width = route(s, d)
        parts += _spread_reduced(s, d, width) if spread else _errors_reduced(s, d, width)
    return Op("dW_dec", tuple(parts))


def decode_grads(s: Shape) -> Op:
    """Losses, dv and dW_dec of every target."""
    return total("decode_grads", [decode_losses_and_gradients(s), reduce_dec(s)])


def reduce_enc(s: Shape) -> Op:
    """Per list entry one row of x - b out of L2, its dv and the value that gates it; dW_enc and dc written."""
    parts = []
    for d in s.d_streams:
        parts += [_reduced(s, d, 4 + 4 + 4, 1, s.N * (d + 1) * s.e, s.M), _finish(s)]
    return Op("dW_enc", tuple(parts))


def bias_grad(s: Shape) -> Op:
    """d pre_bias = -W_enc^T dc: W_enc read once more."""
    parts = [Part("addmv", (s.N * d + s.N + 2 * d) * s.e, flops=2 * s.N * d, library=True) for d in s.d_streams]
    return Op("d pre_bias", tuple(parts))


def takes_gradient_ahead(s: Shape) -> bool:
    """Whether the loss makes its gradients in the forward (`loss.AlignedLoss`)."""
    return not s.compiled and s.dtype != "float16"


COLUMN_ROWS = 128  # of one program of the sums over rows


def _column_sums(s: Shape, tensors: int) -> Part:
    """Sums over the rows of fp32 [B, d_s], of `tensors` for each stream: partial ones, then those of the chunks."""
    parts = 4 * tensors * s.D * cdiv(s.B, COLUMN_ROWS)
    return Part("bias sums", 4 * tensors * s.B * s.D + 2 * parts + s.D * s.e, launches=2)


def loss_glue(s: Shape) -> Op:
    """Norms and coefficients of all targets in one launch; the terms' weights; terms and metrics in two; the sums of
    the biases' gradients, in one pass for all targets where the forward makes them."""
    S, SB, BD = s.S, s.S * s.B, s.B * s.D
    parts = [
        Part("term weights, and the 1 that backward starts from", 4 * (S * S + S + 1), launches=3, library=True),
        Part("target weights", BD * s.e + 4 * SB * (1 + S)),
        Part("terms and metrics", 4 * (S * SB + S * SB + S * s.M), launches=2),
        Part("biases added", 3 * s.D * s.e, launches=S, library=True),  # the decoder's to the encoder's
    ]  # fmt: skip
    if takes_gradient_ahead(s):
        parts.append(Part("scale by 1", 4))  # reads the upstream gradient and exits
        parts.append(_column_sums(s, 1))
    else:
        # per target its sum over the rows, rounded
        rounded = s.D * (4 + s.e) if s.e == 2 else 0
        parts.append(Part("biases", 4 * BD + 4 * s.D + rounded, launches=S * (2 if s.e == 2 else 1), library=True))
        parts.append(Part("target weights", BD * s.e + 4 * SB * (1 + S), launches=S))
        # weights times the upstream gradient; dv of the targets added up
        parts.append(Part("scaled", (S - 1) * 12 * S * s.M, launches=2 * S - 1, library=True))
    return Op("weights, terms", tuple(parts))


def casts(s: Shape) -> Op:
    """Autocast: both weight matrices and the biases of every stream rounded, their gradients widened. Not traced."""
    rows = s.B * s.D * (4 + s.e)
    return Op("casts", (Part("casts", 2 * 2 * s.N * s.D * (4 + s.e) + rows, launches=11 * s.S, library=True),))


# ----------------------------------------------------------------------------------------------------------------- AuxK


def auxk_select(s: Shape) -> Op:
    """The dead of all streams first; per stream `select` over their columns alone; then min(auxk, dead) encoder rows
    gathered per row and stream."""
    found, chunks, ids = min(s.auxk, s.dead), _chunks(replace(s, k=s.auxk), compact=True)[0], 8 * s.B * s.auxk
    parts = [Part("count dead", s.S * s.N), Part("dead first", s.S * s.N * (1 + 4))]
    for d in s.d_streams:
        if s.dead == 0:  # programs look at the count; the rows are filled with ids of the living
            parts.append(Part("nothing dead", ids, launches=2 * chunks))
            continue
        written, _ = maxima_bytes(s, s.auxk, s.dead)
        padding = (1 + EPILOGUE / d) / TRITON_GEMM
        written += (chunks - 1) * s.dead * d * s.e
        main = _gemm(s, "GEMM + maxima", s.B, s.dead, d, s.kernel_unit, padding, written)
        parts += [replace(main, launches=chunks), replace(_selector(s, s.auxk, s.dead), launches=chunks)]
    parts.append(Part("stack", 2 * s.S * ids, library=True))
    return Op("AuxK select", (*parts, *_values(s, s.auxk, found, s.dead)))


def auxk(s: Shape) -> Op:
    """AuxK of a step: selection and values; one inverse index for all streams; the loss, and its gradients where the
    main loss makes its own, over min(auxk, dead) decoder rows; the sums added in place to the latents that have
    entries; torch's passes over residuals and terms."""
    found, S, SB, BD, e = min(s.auxk, s.dead), s.S, s.S * s.B, s.B * s.D, s.e
    parts = [Part("dead", 9 * S * s.N, launches=S, library=True)]  # int64 counters against the threshold
    lists = _lists(s, s.auxk, S)
    parts += [*auxk_select(s).parts, *(replace(part, beside=found == s.auxk) for part in lists)]
    residuals = Part("residuals", (2 * BD + s.D) * e, launches=S, library=True)
    norms = Part("target weights", BD * e + 8 * SB)
    parts += [residuals, norms]
    gradients = []
    for d in s.d_streams:
        one = replace(s, k=s.auxk, d_streams=(d,), auxk=0, dead=0)
        slabs, entries = _cut(s, d, s.auxk)[1], s.B * found
        parts.append(Part(
            "loss", s.B * d * e + slabs * (12 * one.M + 4 * s.B), _gathered(s, d, s.auxk, found, s.dead),
            flops=2 * entries * d, unit=s.gather_unit, padding=16,
        ))  # fmt: skip
        if slabs > 1:
            parts.append(Part("sum of slabs", 4 * s.B * (slabs + 1), library=True))
        gradients += _one_pass(one, d, True, found, s.dead)
        touched = 2 * e * (_distinct(s.dead, entries) if entries else 0)  # read, and written
        for columns in _pieces(d, route(one, d)[1]):  # dW_dec: value and scale of an entry
            gradients += [_reduced(one, columns, 4 + 8, 1, touched * columns, entries), _finish(one)]
        # dW_enc and dc: gradient and gate
        gradients += [_reduced(one, d, 4 + 8, 1, touched * (d + 1), entries), _finish(one)]
    parts.append(Part("AuxK terms", 4 * (2 * SB + 3 * S), launches=2))
    if S > 1:
        parts.append(Part("column of the weights", 8 * S, library=True))
    if takes_gradient_ahead(s):  # once more for each target; the biases' sums take twice as many tensors
        parts += [norms, replace(_column_sums(s, 1), launches=0)]
    else:
        parts += [residuals, replace(norms, launches=S), Part("scaled", 12 * S, launches=S, library=True)]
        rounded = s.D * (4 + e) if e == 2 else 0
        biases = 4 * BD + 4 * s.D + rounded + 3 * s.D * e
        parts.append(Part("biases", biases, launches=S * (3 if e == 2 else 2), library=True))
        parts.append(Part("values' gradients", 8 * SB * s.auxk, library=True))
    return Op("AuxK", (*parts, *gradients))


def auxk_dense(s: Shape) -> Op:
    """Per stream: all pre-activations written, read and written masked, read by the selection."""
    parts = []
    for d in s.d_streams:
        parts.append(_gemm(s, "GEMM", s.B, s.N, d, s.library_unit))
        parts.append(Part("mask", 2 * s.B * s.N * s.e))
        parts.append(_topk(s, s.auxk))
    return Op("AuxK (dense)", tuple(parts))


# ---------------------------------------------------------------------------------------------------------- whole steps


def step_ops(s: Shape) -> list[Op]:
    """Forward, losses and backward of ours, op by op; the optimizer is apart."""
    ops = [centre(s), select(s), values(s), counters(s), inverse_index(s)]
    if not takes_gradient_ahead(s):  # losses in the forward, everything again in the backward
        ops.append(decode_nmse(s))
    ops += [decode_losses_and_gradients(s), reduce_dec(s), loss_glue(s), reduce_enc(s), bias_grad(s)]
    if s.auxk:
        ops.append(auxk(s))
    if s.autocast:
        ops.append(casts(s))
    return ops


def step(s: Shape) -> Op:
    return total("step", step_ops(s))


# how the reference computes, and whether its step is replayed from a CUDA graph (torch.compile's "reduce-overhead")
DENSE_VARIANTS = {
    "eager fp32": ({"dtype": "float32"}, False),
    "eager tf32": ({"dtype": "float32", "tf32": True}, False),
    "eager bf16 autocast": ({"dtype": "bfloat16", "autocast": True}, False),
    "torch.compile bf16 autocast": ({"dtype": "bfloat16", "autocast": True, "compiled": True}, True),
    "torch.compile bf16": ({"dtype": "bfloat16", "compiled": True}, True),
}


def dense_step(s: Shape) -> Op:
    """`reference.training_loss` and its backward with torch.topk, without AuxK; dtype, tf32, autocast and compiled as
    in s. The official code does more than this: see `official_step`.

    GEMMs: per stream the encoder, its dW and, because the pre-bias has a gradient, its dx; per (target, source) pair
    the decoder, its dW and its dcodes. So 2 B N D (3 + 3 S) FLOPs, each GEMM its operands and its product.

    Eager, passes over [B, N] beside the GEMMs: summing the streams 3 (S - 1); topk (see `_topk`); per pair zeros and an
    out-of-place scatter_add 3; per stream zeros for the gather's backward 1, and the sum for dc 1.
    Over [d, N]: adding the S gradients of a decoder 3 (S - 1). Over [B, d] in fp32: 21 per pair (bias, difference,
    squares, means, and their backward), 5 per stream. 25 S^2 + 12 S + 13 launches. Checked against torch's dispatcher.

    Compiled, beside the same GEMMs and topk: codes built once per source (equal expressions are merged), zeros written
    and scattered into 1; the sum of the streams S + 1; the gather's backward 1 and dc 1 per stream; gradients of a
    decoder summed and widened in one pass; 4 over [B, d] per pair. About one launch per GEMM, 2 S^2 + 9 S + 10 others.
    Not checked against inductor's output.

    Autocast: both weight matrices read in fp32 and written rounded, gradients widened (in eager mode apart).
    """
    B, N, D, S, e = s.B, s.N, s.D, s.S, s.e
    BN, ND, BD = B * N, N * D, B * D
    unit, wide = s.library_unit, 4 + e
    gemms = []
    for d in s.d_streams:
        one = _gemm(s, "GEMM", B, N, d, unit)
        n = 3 + 3 * S
        gemms.append(replace(one, streamed=n * one.streamed, flops=n * one.flops, launches=n))
    topk = _topk(s, s.k)
    n_gemms = sum(p.launches for p in gemms)
    if s.compiled:
        passes = BN * e * ((S + 1 if S > 1 else 0) + S + 2 * S) + 4 * 4 * S * BD
        weights = ND * (S * e + (4 if s.autocast else e) if S > 1 else 0)
        if s.autocast:
            weights += 2 * ND * wide + ND * wide + (0 if S > 1 else ND * wide)
        others = 2 * S * S + 9 * S + 10
    else:
        passes = BN * e * (3 * (S - 1) + 3 * S * S + 2 * S) + 4 * BD * (21 * S + 5)
        weights = 3 * (S - 1) * ND * e + (4 * ND * wide if s.autocast else 0)
        others = 25 * S * S + 12 * S + 13 - n_gemms + (4 * S if s.autocast else 0)
    return Op(
        "dense step", (*gemms, topk, Part("passes", passes, launches=others), Part("weights", weights, launches=0))
    )


def _index_put(s: Shape, k: int, launches: int = 12) -> Part:
    """The backward of x[rows, ids] for B k places of [B, N]: index_put_ with accumulation. Assumption: both int64 ids
    made one linear index, which is sorted with its positions, a radix pass for each byte it needs, then added up in
    order; about 12 launches beside the passes."""
    passes = cdiv((s.B * s.N - 1).bit_length(), 8)
    return Part("index_put", s.B * k * (8 * 8 + 2 * 16 * passes + 24), launches=launches + passes, library=True)


def official_step(s: Shape) -> Op:
    """Forward, compute_loss and backward of the official class (sparc/model/model_global.py at 7f36faa, dense decoder,
    global TopK), eager, in the dtype of s; with s.auxk also its AuxK, which costs the same however many are dead.

    Counted from its source, launches and bytes then checked against torch's dispatcher (tests/test_cost.py). Of e bytes
    an element unless said:

    - GEMMs as the reference's: encoder, its dW and dx per stream; decoder, its dW and its dcodes per pair.
    - Over [B, N]: the streams stacked and summed 3 S + 1; torch.topk; a bool mask of the selection, once and again per
      stream. Per stream dense codes zeroed; the mask widened and summed, in the forward and again in the loss; codes
      against the threshold, and any over the rows; codes' absolute values and their sum; zeros for the backward of the
      indexing; dc: 11 and 5 of one byte. Per stream the S gradients of its codes added, 3 (S - 1).
    - Over [d, N]: the S gradients of a decoder added, 3 (S - 1). Over [B, d]: 20 per pair (bias, difference, squares,
      means, their backward), 5 per stream. Counters 66 bytes a latent and stream; 77 bytes a selected place and stream.
    - 22 S^2 + 36 S + 15 operators (68 at S 1), and what index_put and topk launch inside.
    - AuxK per stream: the logits cloned, multiplied by the dead mask, and gone through by a second topk; a bool mask;
      dense codes; in the backward zeros, the product's and the sum with the other gradient: 11 and 1 of one byte; three
      GEMMs; 25 over [B, d]; 3 over [d, N]; 48 operators, with boolean indexing, each a nonzero.

    Not counted: the waits for the GPU, none of them without AuxK; 4 S + 1 with it, for the sizes of boolean indexing
    and a comparison of the loss; and the training loop's own, which tests the loss for NaN and reads every metric back
    (more than S^2 + 3 S a step).
    """
    B, N, D, S, M, e = s.B, s.N, s.D, s.S, s.M, s.e
    BN, ND, BD = B * N, N * D, B * D
    gemms = []
    for d in s.d_streams:
        one, n = _gemm(s, "GEMM", B, N, d, s.library_unit), 3 + 3 * S + (3 if s.auxk else 0)
        gemms.append(replace(one, streamed=n * one.streamed, flops=n * one.flops, launches=n))
    passes = BN * (e * (3 * S + 1 + 11 * S + 3 * S * (S - 1)) + 1 + 5 * S)
    passes += e * (3 * (S - 1) * ND + BD * (20 * S + 5)) + S * (66 * N + 77 * M) + 9 * M
    operators = 22 * S * S + 36 * S + 15 if S > 1 else 68
    launches = operators - 3 * S * S - 3 * S - 1 - S  # without GEMMs, topk and index_put, which are apart
    parts = [*gemms, _topk(s, s.k), *[_index_put(s, s.k)] * S, Part("passes", passes, launches=launches, library=True)]
    if s.auxk:
        found = B * s.auxk
        passes = S * (BN * (11 * e + 1) + found * (3 * 50 + 120)) + e * (25 * BD + 3 * ND)
        # 3 GEMMs, a topk and 2 index_put of the 48 apart; about 4 launches more for each of 4 nonzeros
        parts.append(Part("AuxK passes", passes, launches=(48 - 6 + 16) * S + 7, library=True))
        parts += [*[_topk(s, s.auxk)] * S, *[_index_put(s, s.auxk)] * (2 * S)]
    return Op("official step", tuple(parts))


# ----------------------------------------------------------------------------------- what benchmarks compare and follow


def dense_dec(s: Shape) -> Op:
    """dW_dec as a GEMM: the codes [S B, N] read for each target, the errors read, dW_dec written."""
    parts = [_gemm(s, "GEMM", s.N, d, s.S * s.B, s.library_unit) for d in s.d_streams]
    return Op("dW_dec (dense)", tuple(parts))


def dense_enc(s: Shape) -> Op:
    """dW_enc as a GEMM: every stream's codes and inputs read, dW_enc written."""
    return Op("dW_enc (dense)", tuple(_gemm(s, "GEMM", s.N, d, s.B, s.library_unit) for d in s.d_streams))


def adam(s: Shape) -> Op:
    """Weight, gradient and two moments read, weight and two moments written, for both weight matrices, in fp32."""
    return Op("Adam", (Part("Adam", 7 * 2 * s.N * s.D * 4),))


def unit_norm(s: Shape) -> Op:
    """Normalising reads W_dec twice and writes it; the projection reads W_dec and its gradient twice and writes it."""
    return Op("unit norm + projection", (Part("passes", 8 * s.N * s.D * 4, launches=8 * s.S),))


def copy(s: Shape) -> Op:
    """A buffer of W's size read and written."""
    return Op("copy", (Part("copy", 2 * s.N * s.D * s.e),))


def gather(s: Shape) -> Op:
    """B k random rows of the widest stream read and written, int64 ids read."""
    d = max(s.d_streams)
    distinct = _distinct(s.N, s.M) * d * s.e
    return Op("gather", (Part("gather", s.M * d * s.e + 8 * s.M, Reuse(s.M * d * s.e, distinct, distinct)),))


# --------------------------------------------------------------------------------------------------------------- claims

CASES = {
    "A": Shape(256, 8192, 64, (1024, 768, 768)),  # the official configuration
    "B": Shape(4096, 32768, 64, (1024, 768, 768)),
    "C": Shape(4096, 131072, 64, (1536, 1152, 1152)),  # DINOv2 giant with the two SigLIP so400m towers
    "D": Shape(8192, 65536, 100, (2304,) * 8),  # a crosscoder over eight layers
    "E": Shape(4096, 2**20, 32, (2688,)),
}


def select_over_gemm(s: Shape, gpu: GPU) -> float:
    """Encode + TopK, as the package does it, as a multiple of the bare library GEMM."""
    return select(s).seconds(gpu) / gemm(s).seconds(gpu)


def decode_fraction(s: Shape, gpu: GPU) -> float:
    """Decode, losses, dv and dW_dec: the time that L2 needs for the gathered bytes alone (decoder rows, and errors
    where they are read per entry), as a share of the whole time."""
    op = decode_grads(s)
    return sum(p.reuse.used for p in op.parts) / gpu.bytes_per_s("L2") / op.seconds(gpu)


def pass_fraction(s: Shape, gpu: GPU) -> float:
    """The same for the one gather pass: losses, dv and errors without the sums of dW_dec."""
    op = decode_losses_and_gradients(s)
    return sum(p.reuse.used for p in op.parts) / gpu.bytes_per_s("L2") / op.seconds(gpu)


def dense_seconds(s: Shape, gpu: GPU) -> dict[str, float]:
    """Seconds of the reference's step by variant."""
    plain = replace(s, auxk=0, dead=0, tf32=False, autocast=False, compiled=False)
    return {
        name: step_seconds(dense_step(replace(plain, **how)), gpu, graph)
        for name, (how, graph) in DENSE_VARIANTS.items()
    }


def official_seconds(s: Shape, gpu: GPU) -> float:
    """Seconds of the official step as shipped: eager, fp32, tf32 not allowed."""
    return step_seconds(official_step(replace(s, dtype="float32", tf32=False, autocast=False)), gpu, graph=False)


class Claim(NamedTuple):
    """One modelled figure, and the goal it is held against (None where there is none)."""

    what: str
    case: str
    shape: str
    value: float
    goal: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def __str__(self):
        verdict = ""
        if self.goal is not None:
            verdict = f"  {'<=' if self.at_most else '>='} {self.goal:g} {'holds' if self.holds else 'DOES NOT HOLD'}"
        return f"{self.what:<52} {self.case:<2} {self.value:>7.2f}{verdict}"


def claims(gpu: GPU | None = None) -> list[Claim]:
    """What the project promises, as modelled on one GPU (the default GPU when None), at the benchmarks' shapes.

    Case A is the official configuration, its step in a CUDA graph as the dense compiled ones are everywhere; "B8" is B
    with N 8192. Encode + TopK is the operator `select`: inputs centred already, as the GEMM's are. AuxK: a tenth dead.
    """
    gpu, found = gpu or GPUS[DEFAULT_GPU], []
    for name, s in {**CASES, "B8": replace(CASES["B"], N=8192)}.items():
        goal = None if s.B < 4096 else 1.15 if s.N >= 32768 else 1.25
        found.append(Claim("encode + TopK over the bare GEMM", name, str(s), select_over_gemm(s, gpu), goal, True))
    for name, s in CASES.items():
        found.append(Claim("gather bandwidth: losses + dv", name, str(s), pass_fraction(s, gpu)))
        found.append(Claim("gather bandwidth: losses + dv + dW_dec", name, str(s), decode_fraction(s, gpu)))
    for name, s in CASES.items():
        official = name == "A"
        dense = dense_seconds(s, gpu)
        goal, best_goal = (10, None) if official else (20, 5)
        auxiliary = replace(s, auxk=64, dead=s.N // 10)
        ours, rounded, with_auxk = (
            step_seconds(step(how), gpu, graph=official) for how in (s, replace(s, autocast=True), auxiliary)
        )
        shipped, shipped_auxk = official_seconds(s, gpu), official_seconds(auxiliary, gpu)
        fp32_parameters = (t for variant, t in dense.items() if DENSE_VARIANTS[variant][0].get("autocast", True))
        for what, value, wanted in (
            ("official step over ours in bf16", shipped / ours, goal),
            ("official step with AuxK over ours", shipped_auxk / with_auxk, goal),
            ("eager fp32 reference over ours in bf16", dense["eager fp32"] / ours, None),
            ("best dense step over ours in bf16", min(dense.values()) / ours, best_goal),
            ("best dense step over ours under autocast", min(fp32_parameters) / rounded, None),
        ):
            found.append(Claim(what, name, str(s), value, wanted))
    return found


# ------------------------------------------------------------------------------------------------------------- printing


def _row(op: Op, gpu: GPU) -> dict:
    return {
        "op": op.name, "hbm_mb": op.hbm(gpu) / 1e6, "l2_mb": op.l2 / 1e6, "gflop": op.flops / 1e9,
        "launches": op.launches, "predicted_us": 1e6 * op.seconds(gpu), "bound_by": op.bound(gpu),
    }  # fmt: skip


def summary(s: Shape, gpu: GPU) -> dict:
    """Everything `table` prints, as numbers."""
    ops = step_ops(s)
    whole = total("step", ops)
    graph, eager = (step_seconds(whole, gpu, graph) for graph in (True, False))
    dense = {"official, fp32 as shipped": official_seconds(s, gpu), **dense_seconds(s, gpu)}
    return {
        "modelled": True, "gpu": gpu.name, "shape": str(s), "rows": [_row(op, gpu) for op in [*ops, whole]],
        "apart": [_row(op, gpu) for op in (adam(s), unit_norm(s))],
        "step_us": {"CUDA graph": 1e6 * graph, "eager": 1e6 * eager},
        "dense_us": {name: 1e6 * seconds for name, seconds in dense.items()},
        "triton_launches": sum(p.launches for p in whole.parts if not p.library),
        "dense_over_ours": {name: seconds / eager for name, seconds in dense.items()},
        "dense_over_ours_in_graph": {name: seconds / graph for name, seconds in dense.items()},
        "select_over_gemm": {
            op.name: op.seconds(gpu) / gemm(s).seconds(gpu) for op in (select_fused(s), select_library(s), mm_topk(s))
        },
        "even_gemm_share": even_gemm_share(s, gpu), "gather_fraction": pass_fraction(s, gpu),
        "decode_fraction": decode_fraction(s, gpu),
    }  # fmt: skip


def table(s: Shape, gpu: GPU) -> str:
    """The modelled step as text: op by op, then against the dense reference."""
    found = summary(s, gpu)
    lines = [
        f"modelled, nothing measured: {s} on {gpu.name}",
        f"{'op':<22} {'HBM MB':>10} {'L2 MB':>10} {'GFLOP':>10} {'launches':>8} {'predicted us':>12}  bound by",
    ]
    lines += [
        f"{r['op']:<22} {r['hbm_mb']:>10.1f} {r['l2_mb']:>10.1f} {r['gflop']:>10.1f} {r['launches']:>8} "
        f"{r['predicted_us']:>12.1f}  {r['bound_by']}"
        for r in [*found["rows"], *found["apart"]]
    ]
    times = found["step_us"]
    launches = gpu.launch_us * found["rows"][-1]["launches"]
    lines.append(
        f"step {times['eager']:.0f} us, in a CUDA graph {times['CUDA graph']:.0f} us, of it launches {launches:.0f} us "
        f"({found['triton_launches']} of Triton; the last two rows are apart)"
    )
    ratios = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in found["select_over_gemm"].items())
    lines.append(f"over the bare GEMM: {ratios}")
    lines.append(
        f"fused selection wins where its GEMM reaches {found['even_gemm_share']:.2f} of the library's rate "
        f"(assumed: {TRITON_GEMM:g})"
    )
    lines.append(
        f"share of the gather bandwidth: losses + dv {found['gather_fraction']:.2f}, with dW_dec "
        f"{found['decode_fraction']:.2f}"
    )
    for name, us in found["dense_us"].items():
        ratio, in_graph = found["dense_over_ours"][name], found["dense_over_ours_in_graph"][name]
        lines.append(f"dense {name:<28} {us:>10.0f} us, x{ratio:.1f} ours, x{in_graph:.1f} ours in a graph")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- subcommand


def parse_shape(text: str) -> Shape:
    """B,N,k,d,S[,DTYPE] as the audit reads it: S streams of width d, or their widths as 1024/768/768."""
    from ._trace import parse_shape

    return of_trace(parse_shape(text))


def of_trace(shape) -> Shape:
    """The shape of a traced or audited step (`_trace.Shape`)."""
    return Shape(shape.B, shape.N, shape.k, shape.widths, shape.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="B,N,k,d,S[,DTYPE]",
        help="repeatable; default: the five of the benchmarks, and the goals",
    )
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(GPUS)} (default {DEFAULT_GPU})")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def run(args: argparse.Namespace) -> int:
    try:
        gpu = gpu_named(args.gpu)
        shapes = [parse_shape(text) for text in args.shape] if args.shape else list(CASES.values())
    except ValueError as error:
        print(f"sparc-kernels cost: error: --{str(error).removeprefix('--')}", file=sys.stderr)
        return 2
    from .cost_optim import table as optimizers  # which imports this module

    print("\n\n".join(f"{table(s, gpu)}\n\n{optimizers(s, gpu)}" for s in shapes))
    goals = [] if args.shape else claims(gpu)
    if goals:
        print(f"\nmodelled goals on {gpu.name}", *goals, sep="\n")
    if args.json:
        data = {
            "shapes": [summary(s, gpu) for s in shapes], "claims": [{**c._asdict(), "holds": c.holds} for c in goals]
        }  # fmt: skip
        with open(args.json, "w") as file:
            json.dump(data, file, indent=1)
    return 0
