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

import math
from dataclasses import dataclass
from typing import NamedTuple

from .core.validation import check_int, fail, require
from .launch.budgets import L2_BYTES, MAX_K, MAX_STREAMS, SLAB_BYTES
from .launch.device import cdiv, next_power_of_2

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
        values = {name: check_int(name, getattr(self, name), 1) for name in ("B", "N")}
        limit = f"at most N and {MAX_K}"
        values["k"] = check_int("k", self.k, 1, min(self.N, MAX_K), limit)
        values["auxk"] = check_int("auxk", self.auxk, 0, min(self.N, MAX_K), limit)
        values["dead"] = check_int("dead", self.dead, 0, self.N, "N")
        ok = isinstance(self.d_streams, tuple) and 1 <= len(self.d_streams) <= MAX_STREAMS
        require(ok, "d_streams", f"a tuple of 1..{MAX_STREAMS} widths", repr(self.d_streams))
        values["d_streams"] = tuple(check_int(f"d_streams[{s}]", d, 1) for s, d in enumerate(self.d_streams))
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen otherwise; Python's numbers, whatever came
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


def distinct(n: int, uses: float) -> float:
    """Expected distinct ids among `uses` uniform ones of n."""
    return -n * math.expm1(uses * math.log1p(-1 / n)) if n > 1 else 1.0


def slabs_of(s: Shape, d: int, k: int) -> tuple[int, int]:
    """Columns of one slab of a gather over d columns of W, and how many slabs, as `_launch.gather_config` cuts them."""
    k_pad, tile = max(next_power_of_2(k), 16), 16384 if s.e == 2 else 8192
    block = min(max(tile // (k_pad * s.e), 16), 128, max(next_power_of_2(d), 16))
    least = max(4, 256 // block)
    columns = min(max(SLAB_BYTES // (s.N * block * s.e), least) * block, d)
    if s.N * least * block * s.e > 4 * L2_BYTES:  # little would be reused
        columns = d
    return columns, cdiv(d, columns)


def gathered(s: Shape, d: int, k: int, found: int, n: int) -> Reuse:
    """`found` of n rows of d columns per row of B, in a launch of k places a row, column slab after column slab."""
    if not found:
        return NO_REUSE
    uses = s.B * found
    rows = distinct(n, uses)
    return Reuse(uses * d * s.e, rows * d * s.e, rows * slabs_of(s, d, k)[0] * s.e)
