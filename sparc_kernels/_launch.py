"""Launch settings of every kernel, each with its reason. Pure Python: the compile audit uses the same functions.

Functions marked `tunable` give way to what `sparc-kernels tune` recorded on the user's GPU (`_tuned.py`), if anything.

Reasons marked "compiled" come from ahead-of-time compiles (registers, spills, shared memory; see `sparc-kernels
audit`), "modelled" from bytes and bandwidth. None is measured on a GPU yet; docs/design.md says which are open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ._triton import INTERPRETED, TRITON_VERSION
from ._tuned import Bound, tunable

SCRATCH_BYTES = 256 * 2**20  # logits kept at once by the selection; rows are processed in chunks of this size
SCRATCH_LEAST_ROWS = 512  # fewer rows make the GEMM read W_enc too often: then the scratch may be twice as large
PARTIAL_BYTES = 64 * 2**20  # partial sums of the weight gradients
SLAB_BYTES = 25 * 10**6  # slice of a weight matrix meant to stay in L2 while every row gathers from it (modelled)
L2_BYTES = 60 * 10**6  # of H100 and H200 (data sheets)
MAX_K = 512
MAX_STREAMS = 8
# Sources from which a decoder's gradient goes by way of H = sum_s coef_s v_s E_s in list order, written and read once
# (2 B k d through HBM), instead of every list entry reading S errors (S B k d through L2). Modelled: at 3 sources H
# saves 5 % of the step at B 4096, N 32,768, and costs launches where there are few selected places.
SPREAD_SOURCES = 3
SPREAD_PLACES = 65536
SPREAD_WIDE = 64  # with 3 sources, rows in fp32 beyond which H is not made; compiled (sm_90): 128 spill 64 bytes
SPREAD_COLUMNS = 128  # fewer columns of H within SCRATCH_BYTES are not worth a pass


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


AMD = 0x900  # architectures from here on are AMD's: gfx942 is 0x942, gfx1100 is 0x1100
RDNA = 0x1000  # and from here on their warps have 32 threads instead of 64
# Shared memory that one block may use, bytes: CUDA programming guide, technical specifications by compute capability;
# AMD CDNA and RDNA instruction set references, local data share of a workgroup.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}
SHARED_LIMIT |= {0x90A: 65536, 0x942: 65536, 0x1100: 65536}


def shared_limit(arch: int) -> int:
    return SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))


def capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU's compute capability, an AMD GPU's gfx number in hexadecimal, else 80."""
    if device.type != "cuda":
        return 80
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName  # "gfx942:sramecc+:xnack-"
        return int(name.split(":")[0].removeprefix("gfx"), 16)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_precision(arch: int, tf32: bool) -> str:
    """How tl.dot multiplies float32: tensor cores on NVIDIA GPUs; AMD's matrix cores take fp32 as it is."""
    if arch >= AMD:
        return "tf32" if tf32 and arch == 0x942 else "ieee"  # compiled: only gfx942 has the shorter product
    return "tf32" if tf32 else "tf32x3"


# The selector of one chunk of rows runs beside the GEMM of the next. Modelled: in six parts a sixth of it is left over,
# more would cost as much in launches; and a GEMM of 512 tiles is still some four waves of a large GPU.
BESIDE_PARTS = 6
BESIDE_TILES = 512


def select_rows(rows: int, row_bytes: int, block_m: int, tiles: int = 0) -> tuple[int, int]:
    """Rows of logits that are kept at once, and how many such buffers there are: two where the selector runs beside the
    GEMM of the next rows. Equal parts, whole tiles where the scratch allows.

    tiles: of the GEMM over all rows; 0 forbids a second buffer.
    """
    least = SCRATCH_LEAST_ROWS * row_bytes
    parts, buffers = min(BESIDE_PARTS, tiles // BESIDE_TILES), 2
    if parts >= 2 and least <= SCRATCH_BYTES:
        limit = SCRATCH_BYTES // 2 if 2 * least <= SCRATCH_BYTES else SCRATCH_BYTES
    else:
        parts, buffers = 1, 1
        limit = SCRATCH_BYTES if least <= SCRATCH_BYTES else 2 * SCRATCH_BYTES
    most = min(max(1, limit // row_bytes), rows)
    part = cdiv(rows, max(cdiv(rows, most), parts))
    whole = cdiv(part, block_m) * block_m
    part = min(whole, rows) if whole <= most else part
    return part, min(buffers, cdiv(rows, part))


class Limited:
    """Settings that may limit the registers of a thread. A limit above what a kernel needs is of use too: without one
    ptxas spills 8 or 16 bytes here and there to fit one more block (compiled, sm_80), with one it does not."""

    max_registers = 0

    def registers(self, arch: int) -> dict:
        """Option of the launch."""
        limited = self.max_registers and arch < AMD and not INTERPRETED
        return {"maxnreg": self.max_registers} if limited else {}


@dataclass(frozen=True)
class EncodeConfig(Limited):
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    max_registers: int = 0  # of a thread; 0: as many as the compiler takes


WARPS, STAGES = Bound(1, 16), Bound(1, 8, power_of_2=False)


def _encode_shared(config, rows, itemsize, arch, compact):
    tiles = (config.block_m + config.block_n) * config.block_k * itemsize
    return tiles * (max(config.num_stages - 1, 1) if arch >= AMD else config.num_stages), shared_limit(arch)


# Compiled (sm_90): with maxima of fewer columns the limit on registers spills 8 bytes, and a block of the selector then
# needs 8,192 or less, which fit without it.
LIMITED_GROUP = 16
_ROOM = 128, 256, 8  # tile and warps whose registers are limited


@tunable(
    "encode", block_m=Bound(16, 256), block_n=Bound(16, 512), block_k=Bound(16, 256),
    group_m=Bound(1, 64, power_of_2=False), num_warps=WARPS, num_stages=STAGES, shared=_encode_shared,
    complete=lambda config, *_: config if (config.block_m, config.block_n, config.num_warps) == _ROOM else replace(
        config, max_registers=0
    ),
)  # fmt: skip
def encode_config(rows: int, itemsize: int, arch: int, compact: bool) -> EncodeConfig:
    if INTERPRETED:
        return EncodeConfig(16, 32, 16, 4, 4, 1)  # the interpreter's generic reduction walks every element
    block_k = 128 // itemsize  # one 128-byte line of either operand
    if (
        arch >= RDNA
    ):  # compiled: 128x128 spills 12 to 156 bytes, fp32 (no matrix instructions) 480 in 64x128, 12 in 64x64
        return EncodeConfig(32, 64, block_k, 8, 8, 2) if itemsize == 4 else EncodeConfig(64, 128, block_k, 8, 8, 2)
    if arch >= AMD:  # two stages are one buffer, the next tile waits in registers: 32 kB of the 64 kB (compiled)
        small = itemsize == 4 or rows <= 512
        return EncodeConfig(64 if small else 128, 128, block_k, 8, 8, 2)
    # few rows are launch-bound: smaller tiles fill the GPU. Compiled: the products of tf32x3 spill in larger tiles,
    # and with 4 warps this one spills too, tf32x3 everywhere and bf16 at widths whose loads cannot be vectorised
    if itemsize == 4 and arch in (100, 103):  # compiled: 8 warps spill 48 to 224 bytes with 8 streams, 4 warps none
        return EncodeConfig(64, 128, block_k, 8, 4, 3)
    # compiled: in a 64 x 128 tile of fp32 the two warp groups of sm_90 share its rows, and a convert of layout (20
    # barriers more, 20 wgmma for 12) stands in every step; 128 x 64 has none, with 147 registers for 210
    if itemsize == 4 and arch == 90 and rows > 64:
        return EncodeConfig(128, 64, block_k, 8, 8, 3)
    if itemsize == 4 or rows <= 512:
        return EncodeConfig(64, 128, block_k, 8, 8, 3)
    if arch in (90, 100, 103) and not compact:
        # compiled: wgmma / tcgen05, no spill, 147 kB of the 227 kB; with gathered columns sm_100 spills. On sm_90 216
        # registers instead of the 222 that it would take leave 10,240 of the 65,536 to a block of the selector
        return EncodeConfig(128, 256, block_k, 8, 8, 3, 216 if arch == 90 else 0)
    if arch >= 120:
        return EncodeConfig(128, 128, block_k // 2, 8, 8, 4)  # compiled: as below sm_120 spills 40 bytes with 8 streams
    return EncodeConfig(128, 128, block_k, 8, 8, 3)  # compiled: 64 kB, fits the 99 kB of sm_86 and sm_89


def with_span(config: EncodeConfig, span: int) -> EncodeConfig:
    """The same with tiles that hold whole spans, about as large."""
    if span <= config.block_n:
        return config
    return replace(config, block_m=max(config.block_m * config.block_n // span, min(config.block_m, 64)), block_n=span)


# Summed widths from which a library GEMM and one pass over its logits beat the fused kernel. Modelled: the pass costs
# 2 B N itemsize / HBM, what a library GEMM is faster by (7 % of 2 B N D / peak, if Triton reaches 93 % of it) grows
# with D.
LIBRARY_WIDTH = 4096
LIBRARY_ROWS = 1024  # fewer rows leave the fused kernel's epilogue nothing to wait for
MAXIMA_BLOCK = 4096  # logits of one program of that pass: 32 a thread in 4 warps


def encode_by_library(rows: int, width: int, itemsize: int, tf32: bool) -> bool:
    """float32 at the highest precision stays fused: tf32x3 on tensor cores is faster than a library's FMA."""
    return rows >= LIBRARY_ROWS and width >= LIBRARY_WIDTH and (itemsize == 2 or tf32)


@dataclass(frozen=True)
class SelectConfig(Limited):
    group: int  # contiguous columns behind one maximum
    span: int  # contiguous columns behind one coarse maximum; equal to group when two levels are enough
    k_pad: int
    n_spans_pad: int
    num_warps: int
    max_registers: int = 0

    @property
    def small(self) -> bool:
        """Whether a block fits beside one of the GEMM. Compiled (sm_90): at most 10,240 registers for so few candidates
        (128 threads of 80), 14,976 and more for twice as many."""
        return self.n_spans_pad <= 2048 and self.k_pad * self.group <= 1024


WIDEST = 8192  # candidates of one step of the selection: 32 keys a thread in 8 warps (compiled: twice that spills)


def _select_with(n: int, k: int, compact: bool, group: int) -> SelectConfig:
    k_pad, span = next_power_of_2(k), group
    if max(next_power_of_2(cdiv(n, group)), k_pad * group) > WIDEST:
        group, span = 16, 128  # N / 128 spans, then 8 groups each of k, then 16 logits each of k
    n_spans_pad = max(next_power_of_2(cdiv(n, span)), 16)
    widest = max(n_spans_pad, k_pad * group)
    # compiled: 16 keys a thread, but 4,096 keys with the list of ids in 8 warps spill 8 bytes on sm_80
    keys = 1024 if compact else 512
    num_warps = min(max(widest // keys, 1), 8)
    limit = 0
    if TRITON_VERSION < (3, 7):  # compiled (sm_90, half precision): 3.6 needs more registers than its successors
        if k_pad * group == WIDEST:
            num_warps = 16  # with 8 it spills 48 to 96 bytes, with 16 none, 8 to 24 where there are spans of groups
        elif compact and widest == 4096:
            num_warps = 8  # with 4 it spills 48 to 56 bytes
        elif not compact and n_spans_pad == 2048 and k_pad <= 64 and k_pad * group <= 1024:
            limit = 80  # 123 without, too many for a block beside one of the GEMM (`SelectConfig.small`); of 2,048
            # candidates in the second stage they spill 104 to 120 bytes
    # compiled: sm_80 spills 8 bytes at N 65,536, k 256, for 128 registers instead of 154
    if num_warps == 8 and n_spans_pad == k_pad * group == 4096:
        limit = 168
    return SelectConfig(group, span, k_pad, n_spans_pad, num_warps, limit)


@tunable(
    "select", group=Bound(1, 128), num_warps=WARPS,
    complete=lambda config, n, k, compact: replace(
        _select_with(n, k, compact, config.group), num_warps=config.num_warps
    ),
)  # fmt: skip
def select_config(n: int, k: int, compact: bool = False) -> SelectConfig:
    """Group size g near sqrt(N / k) balances two reads, N / g maxima and k g logits; at least k groups must exist.

    Compiled: with twice that, 16 logits a thread, a thread needs 126 registers instead of 80 (N 32,768, k 64), and too
    many for a block of the selector beside one of the GEMM; the instructions are 3 % more.
    """
    group = 1
    while group < 128 and (2 * group) ** 2 * k <= n and 2 * group * k <= n:
        group *= 2
    return _select_with(n, k, compact, group)


@dataclass(frozen=True)
class GatherConfig(Limited):
    k_pad: int
    block_d: int
    tiles: int  # tiles of block_d columns that one program walks
    num_warps: int
    num_stages: int
    max_registers: int = 0


def gather_chunk(itemsize: int, arch: int = 80) -> int:
    """Selected rows that one launch of the gather kernel takes."""
    if INTERPRETED:
        return 16 if itemsize >= 4 else MAX_K  # small, so that tiny tests take the route in chunks
    if itemsize >= 4:  # compiled: the splits of tf32x3 keep a whole tile in registers; sm_120 spills 8 to 24 bytes with
        return 64 if 120 <= arch < AMD else 128  # 128 rows and 4 sources (16 warps: 176 to 2,168)
    return 256 if arch >= AMD else MAX_K  # compiled: with 512 rows gfx942 spills 408 bytes, gfx1100 1,112


@tunable(
    "gather", block_d=Bound(16, 256), tiles=Bound(1, 1024, power_of_2=False), num_warps=WARPS, num_stages=STAGES,
    shared=lambda config, k, d, n, itemsize, arch: (
        config.k_pad * config.block_d * itemsize * config.num_stages, shared_limit(arch)
    ),
)  # fmt: skip
def gather_config(k: int, d: int, n: int, itemsize: int, arch: int) -> GatherConfig:
    k_pad = max(next_power_of_2(k), 16)  # tl.dot needs 16
    if INTERPRETED:
        block_d = 16
    else:
        # a [k_pad, block_d] tile, two or three in flight; 64 rows of 128 columns in bf16 is the form studied on sm_90.
        # Compiled: half of it where the product's operands live in registers (before sm_90, and the splits of tf32x3)
        # sm_120 multiplies as sm_80 does (8 bytes at 128), gfx1100 spills 28 to 68 there and fp32 in 4 warps 472
        wide = itemsize == 2 and (90 <= arch < 120 or AMD <= arch < RDNA)
        tile = 16384 if wide else 8192
        block_d = min(max(tile // (k_pad * itemsize), 16), 128, max(next_power_of_2(d), 16))
    total = cdiv(d, block_d)
    # a slab of W that stays in L2 while every row gathers from it; where even 256 columns of it are several times L2, a
    # row's whole width at once: little would be reused, and every slab costs partial dots (modelled)
    least = max(4, 256 // block_d)
    tiles = min(max(SLAB_BYTES // (n * block_d * itemsize), least), total)
    if n * least * block_d * itemsize > 4 * L2_BYTES:
        tiles = total
    # compiled: with 4 warps these spill 8 to 40 bytes; k 512 would need 64 accumulator registers a thread
    num_warps = 8 if k_pad >= 512 or (k_pad >= 128 and (arch < 90 or itemsize >= 4)) else 4
    if arch >= AMD and (k_pad >= 128 or (arch >= RDNA and itemsize >= 4)):  # compiled: k 256, gfx1100 152 bytes with 8
        num_warps = 16 if arch >= RDNA and k_pad >= 256 else 8
    # compiled: with three stages sm_86 and sm_89 spill 8 bytes at k 64, with two 16 bytes at k 512; AMD's second stage
    # waits in registers
    deep = k_pad * block_d * itemsize <= 16384 and arch < AMD and not (arch in (86, 89) and k_pad == 64)
    # compiled: sm_80 spills 16 bytes at B 1, for 72 registers instead of 92; so does sm_100, 8 to 16 here and there
    limit = 128 if arch < 90 and itemsize == 2 and k_pad == 64 else 255 if arch in (100, 103) else 0
    # compiled: sm_120 too, with 8 sources, Triton 3.6 without dots, 3.7 and 3.8 with 8 sources, 16 bytes
    spills = {256: arch >= 120 or TRITON_VERSION < (3, 7), 512: (3, 7) <= TRITON_VERSION < (3, 9)}
    if itemsize == 2 and arch < AMD and spills.get(k_pad):
        limit = 255
    return GatherConfig(k_pad, block_d, tiles, num_warps, 3 if deep else 2, limit)


@dataclass(frozen=True)
class ReduceConfig(Limited):
    block_e: int
    block_d: int
    num_warps: int
    max_registers: int = 0


def reduce_chunk(M: int, d: int) -> int:
    """Entries that one program adds up; longer lists are split, and each block of so many places has two rows of d for
    partial sums: more entries where that workspace would be large."""
    chunk = 4 if INTERPRETED else 64  # small, so that tiny tests split hot latents
    while chunk < 4096 and 8 * cdiv(M, chunk) * d > PARTIAL_BYTES:
        chunk *= 2
    return chunk


def column_chunk(rows: int) -> int:
    """Rows that one program of the sums over rows adds up: at most 512 partial sums are then added one by one."""
    return max(128, next_power_of_2(cdiv(rows, 512)))


@tunable("reduce", block_e=Bound(1, 16), block_d=Bound(16, 2048), num_warps=WARPS)
def reduce_config(d: int, arch: int = 80, sources: int = 1) -> ReduceConfig:
    if INTERPRETED:
        return ReduceConfig(2, 16, 4)
    block_d = min(max(next_power_of_2(d), 128), 1024)
    # 256 columns a warp: a thread owns whole columns, so the sum over entries never crosses threads
    # compiled: with 8 sources gfx1100 spills 68 bytes in 4 warps; so does sm_80, 8 bytes, with 4 entries of each, and
    # 2 need 106 registers instead of 174 on sm_90
    block_e = 2 if sources > 4 else 4
    # compiled: sm_80 spills 8 bytes with 8 sources, for 96 registers instead of 127, and in fp32 under a limit of 128
    limit = 168 if arch < 90 and sources > 4 else 0
    if TRITON_VERSION == (3, 8) and arch < 90 and 1 < sources <= 4:
        limit = 128  # compiled: 8 bytes without or with 96, in fp32
    return ReduceConfig(block_e, block_d, max(block_d // (128 if arch >= RDNA else 256), 1), limit)


def finish_warps(block_d: int) -> int:
    """Of the kernel that adds up split lists. Compiled (sm_90, fp32): 4 spill 8 bytes, so do 2 with 512 columns."""
    return 2 if block_d > 512 else 1


@dataclass(frozen=True)
class ColumnSumsConfig(Limited):
    """Compiled: under Triton 3.8 the weighted sums of three fp32 sources spill 8 bytes without a limit."""

    max_registers: int = 128 if TRITON_VERSION == (3, 8) else 0


@dataclass(frozen=True)
class MeansConfig(Limited):
    """Compiled: under Triton 3.6 the means of two sources spill 8 bytes without a limit, for 32 registers."""

    max_registers: int = 128 if TRITON_VERSION < (3, 7) else 0


ADAM_WIDTH = 8192  # columns of a row that one program of the optimizer's kernels holds; wider rows are left to torch


@dataclass(frozen=True)
class AdamConfig(Limited):
    block_d: int
    num_warps: int

    @property
    def max_registers(self) -> int:
        """Compiled: without a limit sm_120 spills 8 bytes in 4 warps, the form fed by lists 16 on sm_90 in 16 warps."""
        return 128 if self.num_warps >= 16 else 168


def adam_config(d: int) -> AdamConfig:
    """A whole row in one program: norm and projection then need no second pass. Eight columns a thread, two 16-byte
    loads of each of four tensors in flight; 16 a thread beyond 4,096 columns."""
    block_d = max(next_power_of_2(d), 32)
    return AdamConfig(block_d, min(max(block_d // 256, 1), 16))


@dataclass(frozen=True)
class LatentAdamConfig(AdamConfig):
    block_e: int
    early: bool  # moments are loaded before the list is added up

    @property
    def max_registers(self) -> int:
        """Compiled: 168 spill 24 bytes with 8 sources in fp32 under Triton 3.6, where other variants need no more."""
        return 255 if TRITON_VERSION < (3, 7) and self.num_warps < 16 else super().max_registers


def latent_adam_config(d: int, arch: int, parts: bool) -> LatentAdamConfig:
    """As `adam_config`; `parts`: no norm asks for a whole row, wide ones are cut at 4,096 columns (compiled: whole at
    8,192, sm_100 spills 24 to 40 bytes with the sum that W_enc needs). Compiled (sm_90): 108 registers in 4 warps with
    2 entries at a time, 142 with 4; in 16 warps, where a thread has 128, two entries spill 96 to 208 bytes at 16
    columns a thread, one with early moments 32; sm_100 spills 8 bytes with two in 4 warps."""
    if INTERPRETED:
        block_d = max(next_power_of_2(d), 16)
        return LatentAdamConfig(min(block_d, 16) if parts else block_d, 4, 2, True)
    config = adam_config(min(d, 4096) if parts else d)
    early = config.num_warps < 16  # compiled: 8 bytes on sm_80 with 4,096 columns, 32 with 8,192
    few = config.num_warps >= 16 or arch in (100, 103)
    return LatentAdamConfig(config.block_d, config.num_warps, 1 if few else 2, early)


def adam_rows(n: int) -> int:
    """Latents of one program that adds up dc * W_enc: their sum is written and read once more, 8 bytes a column."""
    return 2 if INTERPRETED else 8 if n >= 16384 else 4
