"""Launch settings of the gather kernels, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..core._triton import TRITON_VERSION
from ..core.target import interpreted
from .budgets import L2_BYTES, MAX_K, SLAB_BYTES
from .device import AMD, RDNA, STAGES, WARPS, RegisterCapped, cdiv, next_power_of_2, shared_limit
from .tuned import Bound, tunable


@dataclass(frozen=True)
class GatherConfig(RegisterCapped):
    """Settings of the gather kernel."""

    k_pad: int
    block_d: int
    tiles: int  # tiles of block_d columns that one program processes
    num_warps: int
    num_stages: int
    max_registers: int = 0


def gather_chunk(itemsize: int, arch: int = 80) -> int:
    """Largest k of one launch of the gather kernel.

    Args:
        itemsize: bytes of a weight.
        arch: as `capability` gives it.
    """
    if interpreted():
        return 16 if itemsize >= 4 else MAX_K  # small, so that small tests run the chunked route
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
    """Choose settings of the gather kernel.

    Args:
        k: selected rows.
        d: columns.
        n: rows of the weight matrix.
        itemsize: bytes of a weight.
        arch: as `capability` gives it.
    """
    k_pad = max(next_power_of_2(k), 16)  # tl.dot needs 16
    if interpreted():
        block_d = 16
    else:
        # [k_pad, block_d] tiles, two or three in flight. Compiled: half where operands live in registers (before sm_90,
        # tf32x3); sm_120 as sm_80 (8 bytes at 128), gfx1100 spills 28 to 68 there and fp32 in 4 warps 472
        wide = itemsize == 2 and (90 <= arch < 120 or AMD <= arch < RDNA)
        tile = 16384 if wide else 8192
        block_d = min(max(tile // (k_pad * itemsize), 16), 128, max(next_power_of_2(d), 16))
    total = cdiv(d, block_d)
    # a slab of W stays in L2 while every row gathers from it; where even 256 columns exceed L2 several times, take the
    # whole width: little would be reused, and every slab costs partial dots (modelled)
    least = max(4, 256 // block_d)
    tiles = min(max(SLAB_BYTES // (n * block_d * itemsize), least), total)
    if n * least * block_d * itemsize > 4 * L2_BYTES:
        tiles = total
    # compiled: with 4 warps these spill 8 to 40 bytes; k 512 would need 64 accumulator registers a thread
    num_warps = 8 if k_pad >= 512 or (k_pad >= 128 and (arch < 90 or itemsize >= 4)) else 4
    if arch >= AMD and (k_pad >= 128 or (arch >= RDNA and itemsize >= 4)):  # compiled: k 256, gfx1100 152 bytes with 8
        num_warps = 16 if arch >= RDNA and k_pad >= 256 else 8
    # compiled: with three stages sm_86 and sm_89 spill 8 bytes at k 64, with two 16 bytes at k 512; AMD's second stage
    # stays in registers
    deep = k_pad * block_d * itemsize <= 16384 and arch < AMD and not (arch in (86, 89) and k_pad == 64)
    # compiled: sm_80 spills 16 bytes at B 1, for 72 registers instead of 92; so does sm_100, 8 to 16 in some variants
    limit = 128 if arch < 90 and itemsize == 2 and k_pad == 64 else 255 if arch in (100, 103) else 0
    # compiled: sm_120 too, with 8 sources, Triton 3.6 without dots, 3.7 and 3.8 with 8 sources, 16 bytes
    spills = {256: arch >= 120 or TRITON_VERSION < (3, 7), 512: (3, 7) <= TRITON_VERSION < (3, 9)}
    if itemsize == 2 and arch < AMD and spills.get(k_pad):
        limit = 255
    return GatherConfig(k_pad, block_d, tiles, num_warps, 3 if deep else 2, limit)
