"""GPU properties that launches depend on: capability, shared memory, dot precision; arithmetic of grids."""

from __future__ import annotations

import torch

from ..core.target import current, interpreted
from .tuned import Bound


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of 2 >= max(n, 1)."""
    return 1 << (max(n, 1) - 1).bit_length()


AMD = 0x900  # architectures from here on are AMD's: gfx942 is 0x942, gfx1100 is 0x1100
RDNA = 0x1000  # from here on AMD's warps have 32 threads instead of 64
# Shared memory that one block may use, bytes: CUDA programming guide, technical specifications by compute capability;
# AMD CDNA and RDNA instruction set references, local data share of a workgroup.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}
SHARED_LIMIT |= {0x90A: 65536, 0x942: 65536, 0x1100: 65536}


def shared_limit(arch: int) -> int:
    """Shared memory of one block in bytes; the smallest known limit for an unknown architecture."""
    return SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))


def capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA compute capability, an AMD gfx number read as hexadecimal; 80 without a GPU."""
    if target := current():
        return target.arch
    if device.type != "cuda":
        return 80
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName  # "gfx942:sramecc+:xnack-"
        return int(name.split(":")[0].removeprefix("gfx"), 16)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_precision(arch: int, tf32: bool) -> str:
    """Return tl.dot's input precision for float32: tensor cores on NVIDIA GPUs; AMD's matrix cores take fp32 itself.

    Args:
        arch: as `capability` gives it.
        tf32: whether tf32 is allowed.
    """
    if arch >= AMD:
        return "tf32" if tf32 and arch == 0x942 else "ieee"  # compiled: only gfx942 has the shorter product
    return "tf32" if tf32 else "tf32x3"


class RegisterCapped:
    """Settings that may limit the registers of a thread.

    A limit above what a kernel needs helps too: without one ptxas spills 8 or 16 bytes in some variants to fit one more
    block (compiled, sm_80), with one it does not.
    """

    max_registers = 0

    def registers(self, arch: int) -> dict:
        """Return the launch option, empty where there is no limit."""
        limited = self.max_registers and arch < AMD and not interpreted()
        return {"maxnreg": self.max_registers} if limited else {}


WARPS, STAGES = Bound(1, 16), Bound(1, 8, power_of_2=False)
