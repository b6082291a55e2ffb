"""Launch settings of latent sums, column sums and means, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..core._triton import TRITON_VERSION
from ..core.target import interpreted
from .budgets import PARTIAL_BYTES
from .device import RDNA, WARPS, RegisterCapped, cdiv, next_power_of_2
from .tuned import Bound, tunable


@dataclass(frozen=True)
class ReduceConfig(RegisterCapped):
    """Settings of the kernels that sum lists."""

    block_e: int
    block_d: int
    num_warps: int
    max_registers: int = 0


def reduce_chunk(M: int, d: int) -> int:
    """Entries that one program sums; longer lists are split.

    Each block of that many places has two rows of d for partial sums, so chunks grow where the workspace would be
    large.

    Args:
        M: places of the inverse index.
        d: columns.
    """
    chunk = 4 if interpreted() else 64  # small, so that small tests split hot latents
    while chunk < 4096 and 8 * cdiv(M, chunk) * d > PARTIAL_BYTES:
        chunk *= 2
    return chunk


def column_chunk(rows: int) -> int:
    """Rows that one program of the column sums adds; at most 512 partial sums are then added one by one."""
    return max(128, next_power_of_2(cdiv(rows, 512)))


@tunable("reduce", block_e=Bound(1, 16), block_d=Bound(16, 2048), num_warps=WARPS)
def reduce_config(d: int, arch: int = 80, sources: int = 1) -> ReduceConfig:
    """Choose settings for sums of lists.

    Args:
        d: columns.
        arch: as `capability` gives it.
        sources: S.
    """
    if interpreted():
        return ReduceConfig(2, 16, 4)
    block_d = min(max(next_power_of_2(d), 128), 1024)
    # compiled: with 8 sources gfx1100 spills 68 bytes in 4 warps, sm_80 8 bytes with 4 entries of each; 2 entries need
    # 106 registers instead of 174 on sm_90
    block_e = 2 if sources > 4 else 4
    # compiled: sm_80 spills 8 bytes with 8 sources, for 96 registers instead of 127, and in fp32 under a limit of 128
    limit = 168 if arch < 90 and sources > 4 else 0
    if TRITON_VERSION == (3, 8) and arch < 90 and 1 < sources <= 4:
        limit = 128  # compiled: 8 bytes without or with 96, in fp32
    # 256 columns a warp: a thread owns whole columns, so sums over entries stay within a thread
    return ReduceConfig(block_e, block_d, max(block_d // (128 if arch >= RDNA else 256), 1), limit)


def finish_warps(block_d: int) -> int:
    """Warps of the kernel that sums split lists. Compiled (sm_90, fp32): 4 spill 8 bytes, so do 2 with 512 columns."""
    return 2 if block_d > 512 else 1


@dataclass(frozen=True)
class ColumnSumsConfig(RegisterCapped):
    """Settings of column sums.

    Compiled: under Triton 3.8 the weighted sums of three fp32 sources spill 8 bytes without a limit.
    """

    max_registers: int = 128 if TRITON_VERSION == (3, 8) else 0


@dataclass(frozen=True)
class MeansConfig(RegisterCapped):
    """Settings of means and of the chunks of columns in their launch.

    Compiled: without a limit those of three sources spill 8 bytes on sm_100, for 32 registers; under Triton 3.6 others.
    """

    max_registers: int = 128
