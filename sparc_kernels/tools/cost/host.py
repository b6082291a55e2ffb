"""Time of a whole step: the device's, beside what the host needs to launch it, or replayed from a CUDA graph."""

from __future__ import annotations

from .gpus import GPU
from .parts import Op

# Measured: host microseconds of an eager step = TRITON_US x Triton launches + TORCH_US x torch's kernels + STEP_US, as
# fitted by `python -m benchmarks host --fit`; FITTED says when and where. Python, autograd, views and allocations are
# in them, CUDA's driver is not.
# They are of steps by autograd and an optimizer; `training_step` takes 0.4 of it. The fit at 9cebda7 gave 44.4, 14 and
# 664, off by 9 % (median): divided by 2.9, which makes the dense step, 4.9 ms there on shared cores, the 1.7 ms that it
# took on another machine whose cores were idle (2026-11-27).
TRITON_US, TORCH_US, STEP_US = 15.3, 4.8, 229.0
FITTED = "fitted on a 2-core AMD EPYC VM, torch 2.13, Triton 3.9, 2026-11-28, scaled to idle cores"
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
