"""Launch settings of the encoder's GEMM and the selector, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core._triton import TRITON_VERSION
from ..core.target import interpreted
from .budgets import SCRATCH_BYTES, SCRATCH_LEAST_ROWS
from .device import AMD, RDNA, STAGES, WARPS, RegisterCapped, cdiv, next_power_of_2, shared_limit
from .tuned import Bound, tunable

# The selector of one chunk of rows overlaps the GEMM of the next. Modelled: in six parts a sixth of it is exposed, more
# parts cost as much in launches; a GEMM of 512 tiles is still about four waves of a large GPU.
BESIDE_PARTS = 6
BESIDE_TILES = 512


def rows_per_chunk(rows: int, row_bytes: int, block_m: int, tiles: int = 0) -> tuple[int, int]:
    """Choose how many rows of logits a buffer holds, and one or two buffers.

    Two if the selector overlaps the GEMM of the next rows. Chunks are equal, and whole tiles where the scratch allows.

    Args:
        rows: B.
        row_bytes: bytes of scratch per row.
        block_m: rows of a tile.
        tiles: tiles of the GEMM over all rows; 0 forbids a second buffer.

    Returns:
        Rows per chunk; buffers.
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


@dataclass(frozen=True)
class EncodeConfig(RegisterCapped):
    """Settings of the encoder's GEMM."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    max_registers: int = 0  # of a thread; 0: no limit


def _encode_shared(config, rows, itemsize, arch, compact):
    tiles = (config.block_m + config.block_n) * config.block_k * itemsize
    return tiles * (max(config.num_stages - 1, 1) if arch >= AMD else config.num_stages), shared_limit(arch)


# Compiled (sm_90): with maxima of fewer columns the register limit spills 8 bytes, and a block of the selector then
# needs at most 8,192 registers, which fit without it.
CAP_MIN_GROUP = 16
_CAPPED_TILE = 128, 256, 8  # tile and warps whose registers are limited


@tunable(
    "encode", block_m=Bound(16, 256), block_n=Bound(16, 512), block_k=Bound(16, 256),
    group_m=Bound(1, 64, power_of_2=False), num_warps=WARPS, num_stages=STAGES, shared=_encode_shared,
    complete=lambda config, *_: (
        config if (config.block_m, config.block_n, config.num_warps) == _CAPPED_TILE
        else replace(config, max_registers=0)
    ),
)  # fmt: skip
def encode_config(rows: int, itemsize: int, arch: int, compact: bool) -> EncodeConfig:
    """Choose settings of the encoder's GEMM.

    Args:
        rows: B.
        itemsize: bytes of an input.
        arch: as `capability` gives it.
        compact: columns are gathered through a list of ids.
    """
    if interpreted():
        return EncodeConfig(16, 32, 16, 4, 4, 1)  # the interpreter's generic reduction walks every element
    block_k = 128 // itemsize  # one 128-byte line of either operand
    # compiled: 128x128 spills 12 to 156 bytes, fp32 (no matrix instructions) 480 in 64x128, 12 in 64x64
    if arch >= RDNA:
        return EncodeConfig(32, 64, block_k, 8, 8, 2) if itemsize == 4 else EncodeConfig(64, 128, block_k, 8, 8, 2)
    if arch >= AMD:  # two stages are one buffer, the next tile is in registers: 32 kB of the 64 kB (compiled)
        small = itemsize == 4 or rows <= 512
        return EncodeConfig(64 if small else 128, 128, block_k, 8, 8, 2)
    # few rows are launch-bound: smaller tiles fill the GPU. Compiled: the products of tf32x3 spill in larger tiles,
    # and with 4 warps this one spills too, tf32x3 everywhere and bf16 at widths whose loads cannot be vectorised
    if itemsize == 4 and arch in (100, 103):  # compiled: 8 warps spill 48 to 224 bytes with 8 streams, 4 warps none
        return EncodeConfig(64, 128, block_k, 8, 4, 3)
    # compiled (sm_90, fp32): in 64 x 128 two warp groups share rows, which costs a layout conversion in every step (20
    # barriers more, 20 wgmma for 12); 128 x 64 has none, with 147 registers for 210
    if itemsize == 4 and arch == 90 and rows > 64:
        return EncodeConfig(128, 64, block_k, 8, 8, 3)
    if itemsize == 4 or rows <= 512:
        return EncodeConfig(64, 128, block_k, 8, 8, 3)
    if arch in (90, 100, 103) and not compact:
        # compiled: wgmma / tcgen05, no spill, 147 kB of the 227 kB; with gathered columns sm_100 spills. On sm_90 216
        # registers, not the 222 without a limit, leave 10,240 of the 65,536 to a block of the selector
        return EncodeConfig(128, 256, block_k, 8, 8, 3, 216 if arch == 90 else 0)
    if arch >= 120:
        return EncodeConfig(128, 128, block_k // 2, 8, 8, 4)  # compiled: 40 bytes spill as below with 8 streams
    return EncodeConfig(128, 128, block_k, 8, 8, 3)  # compiled: 64 kB, fits the 99 kB of sm_86 and sm_89


def with_span(config: EncodeConfig, span: int) -> EncodeConfig:
    """Return settings whose tiles hold whole spans, of about the same area.

    Args:
        config: settings of the encoder's GEMM.
        span: columns behind one coarse maximum.
    """
    if span <= config.block_n:
        return config
    return replace(config, block_m=max(config.block_m * config.block_n // span, min(config.block_m, 64)), block_n=span)


# Summed width from which a library GEMM and one pass over its logits beat the fused kernel. Modelled: the pass costs
# 2 B N itemsize / HBM, the library's gain (7 % of 2 B N D / peak, if Triton reaches 93 % of it) grows with D.
LIBRARY_WIDTH = 4096
LIBRARY_ROWS = 1024  # with fewer rows nothing waits for the fused kernel's epilogue
MAXIMA_BLOCK = 4096  # logits per program of that pass: 32 a thread in 4 warps


def encode_by_library(rows: int, width: int, itemsize: int, tf32: bool) -> bool:
    """Whether to use the library's GEMM; float32 without tf32 stays fused (tf32x3 is faster than a library's FMA).

    Args:
        rows: B.
        width: summed width of the streams.
        itemsize: bytes of an input.
        tf32: whether float32 products may be tf32.
    """
    return rows >= LIBRARY_ROWS and width >= LIBRARY_WIDTH and (itemsize == 2 or tf32)


@dataclass(frozen=True)
class SelectConfig(RegisterCapped):
    """Settings of the selector."""

    group: int  # contiguous columns behind one maximum
    span: int  # contiguous columns behind one coarse maximum; equal to group when two levels are enough
    k_pad: int
    n_spans_pad: int
    num_warps: int
    max_registers: int = 0

    @property
    def small(self) -> bool:
        """Whether a block fits beside one of the GEMM.

        Compiled (sm_90): at most 10,240 registers for so few candidates (128 threads of 80), 14,976 and more for twice
        as many.
        """
        return self.n_spans_pad <= 2048 and self.k_pad * self.group <= 1024


MAX_CANDIDATES = 8192  # of one step of the selection: 32 keys a thread in 8 warps (compiled: twice that spills)


def _select_with(n: int, k: int, compact: bool, group: int) -> SelectConfig:
    k_pad, span = next_power_of_2(k), group
    if max(next_power_of_2(cdiv(n, group)), k_pad * group) > MAX_CANDIDATES:
        group, span = 16, 128  # N / 128 spans, then 8 groups each of k, then 16 logits each of k
    n_spans_pad = max(next_power_of_2(cdiv(n, span)), 16)
    widest = max(n_spans_pad, k_pad * group)
    # compiled: 16 keys a thread, but 4,096 keys with the list of ids in 8 warps spill 8 bytes on sm_80
    keys = 1024 if compact else 512
    num_warps = min(max(widest // keys, 1), 8)
    limit = 0
    if TRITON_VERSION < (3, 7):  # compiled (sm_90, half precision): 3.6 needs more registers than its successors
        if k_pad * group == MAX_CANDIDATES:
            num_warps = 16  # with 8 it spills 48 to 96 bytes, with 16 none, 8 to 24 where there are spans of groups
        elif compact and widest == 4096:
            num_warps = 8  # with 4 it spills 48 to 56 bytes
        elif not compact and n_spans_pad == 2048 and k_pad <= 64 and k_pad * group <= 1024:
            limit = 80  # 123 without, too many for a block beside one of the GEMM (`SelectConfig.small`); with 2,048
            # candidates in the second step it spills 104 to 120 bytes
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
    """Choose settings of the selector: g near sqrt(N / k) balances N / g maxima and k g logits, in at least k groups.

    Compiled: with twice that g, 16 logits a thread, a thread needs 126 registers instead of 80 (N 32,768, k 64), too
    many for a block of the selector beside one of the GEMM, and 3 % more instructions.

    Args:
        n: N, columns.
        k: how many are selected.
        compact: columns are gathered through a list of ids.
    """
    group = 1
    while group < 128 and (2 * group) ** 2 * k <= n and 2 * group * k <= n:
        group *= 2
    return _select_with(n, k, compact, group)


def candidates_config(n: int, k: int) -> SelectConfig:
    """Choose settings of the selector for stored keys: up to MAX_CANDIDATES are read at once, which saves their maxima.

    Args:
        n: keys of a row.
        k: how many are selected.
    """
    if n > MAX_CANDIDATES:
        return select_config(n, k)
    config = _select_with(n, k, False, 1)
    # compiled: sm_120 spills 8 bytes at 4,096 keys of bf16, k 64, for 80 registers instead of 71
    return replace(config, max_registers=config.max_registers or 168) if config.num_warps == 8 else config
