"""Time of a whole step: the device's, beside what the host needs to launch it, or replayed from a CUDA graph."""

from __future__ import annotations

from .gpus import GPU
from .parts import Op

# Measured: host microseconds of an eager step = TRITON_US x Triton launches + TORCH_US x torch's kernels + STEP_US, as
# fitted by `python -m benchmarks host --fit`; FITTED says when and where. Python, autograd, views and allocations are
# in them, CUDA's driver is not.
TRITON_US, TORCH_US, STEP_US = 61.0, 5.6, 280.0
# The fit at 20ac135 gave 225, 20.9 and 1039 at a load of 5 to 8, off by 12 % (median): divided by 3.7, which makes the
# dense step there the 1.7 ms that it took on the same cores when they were idle (2026-11-27).
FITTED = "fitted on an AMD EPYC, 2 cores, torch 2.13, Triton 3.9, 2026-11-28, on busy cores"
# Assumptions: CUDA's own time for a launch, and the host's for the replay of a graph.
DRIVER_US, REPLAY_US = 2.0, 8.0


def host_seconds(op: Op) -> float:
    """Return the seconds that the host needs to launch the parts in PyTorch's eager mode."""
    torch = sum(p.launches for p in op.parts if p.library)
    triton = op.launches - torch
    return 1e-6 * ((TRITON_US + DRIVER_US) * triton + (TORCH_US + DRIVER_US) * torch + STEP_US)


def step_seconds(op: Op, gpu: GPU, graph: bool) -> float:
    """Return the seconds of a whole step: of the slower of host and device, in a graph of the device and one replay."""
    device = op.seconds(gpu)
    return device + 1e-6 * REPLAY_US if graph else max(device, host_seconds(op))
