"""Launch settings of the optimizer's kernels, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..core._triton import TRITON_VERSION
from ..core.target import interpreted
from .budgets import MAX_STREAMS
from .device import RegisterCapped, next_power_of_2

ADAM_WIDTH = 8192  # columns of a row that one program of the optimizer's kernels holds; wider rows take the torch path


@dataclass(frozen=True)
class AdamConfig(RegisterCapped):
    """Settings of the dense Adam kernel."""

    block_d: int
    num_warps: int

    @property
    def max_registers(self) -> int:
        """Compiled: without a limit sm_120 spills 8 bytes in 4 warps, the form fed by lists 16 on sm_90 in 16 warps."""
        return 128 if self.num_warps >= 16 else 168


def adam_config(d: int) -> AdamConfig:
    """Choose settings for rows of d columns: a whole row per program, so norm and projection need no second pass.

    Eight columns a thread, two 16-byte loads of each of four tensors in flight; 16 a thread beyond 4,096 columns.
    """
    block_d = max(next_power_of_2(d), 32)
    return AdamConfig(block_d, min(max(block_d // 256, 1), 16))


@dataclass(frozen=True)
class LatentAdamConfig(AdamConfig):
    """Settings of the Adam kernel fed by lists."""

    block_e: int
    early: bool  # load moments before the list is summed

    @property
    def max_registers(self) -> int:
        """Compiled: 168 spill 24 bytes with 8 sources in fp32 under Triton 3.6, where other variants need no more."""
        return 255 if TRITON_VERSION < (3, 7) and self.num_warps < 16 else super().max_registers


def latent_adam_config(d: int, arch: int, parts: bool) -> LatentAdamConfig:
    """Choose settings for rows of d columns summed from lists.

    Compiled (sm_90): 108 registers in 4 warps with 2 entries at a time, 142 with 4; in 16 warps, where a thread has
    128, two entries spill 96 to 208 bytes at 16 columns a thread, one with early moments 32; sm_100 spills 8 bytes with
    two in 4 warps.

    Args:
        d: columns.
        arch: as `capability` gives it.
        parts: rows are not normalised, so wide ones are cut at 4,096 columns (compiled: whole at 8,192, sm_100 spills
            24 to 40 bytes with the sum that W_enc needs).
    """
    if interpreted():
        block_d = max(next_power_of_2(d), 16)
        return LatentAdamConfig(min(block_d, 16) if parts else block_d, 4, 2, True)
    config = adam_config(min(d, 4096) if parts else d)
    early = config.num_warps < 16  # compiled: 8 bytes on sm_80 with 4,096 columns, 32 with 8,192
    few = config.num_warps >= 16 or arch in (100, 103)
    return LatentAdamConfig(config.block_d, config.num_warps, 1 if few else 2, early)


def latent_adam_streams(d: int) -> int:
    """Matrices that one launch of the Adam kernel fed by lists updates.

    Compiled (sm_90): with 8 pointers of each kind and 4,096 columns a program spills 8 bytes.

    Args:
        d: columns of the widest.
    """
    return MAX_STREAMS // 2 if d > 2048 else MAX_STREAMS


def adam_rows(n: int) -> int:
    """Latents of one program that sums dc * W_enc; each program's sum is written and read again, 8 bytes a column."""
    return 2 if interpreted() else 8 if n >= 16384 else 4
