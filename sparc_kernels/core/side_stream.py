"""A second CUDA stream beside the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


class SideStream:
    """Run work on a second stream of a GPU, concurrently with the current one; immediately on other devices.

    Each run waits for everything launched before, so it may use memory of the current stream, and reuse of the second
    stream's memory is ordered too. Call `join` before the results are used or their memory is freed. CUDA graphs
    capture a fork and a join.

    Args:
        device: of the tensors.
        enabled: False: run on the current stream.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self._main = self._side = None
        if enabled and device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._side = _side_stream(self._main.device, self._main.cuda_stream)

    def run(self, work: Callable[[], object]):
        """Call work() on the second stream; return its result and an event for `wait`."""
        if self._side is None:
            return work(), None
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            return work(), self._side.record_event()

    def wait(self, event) -> None:
        """Make later launches on the current stream wait for the event."""
        if event is not None:
            self._main.wait_event(event)

    def join(self) -> None:
        """Make later launches on the current stream wait for the second stream."""
        if self._side is not None:
            self._main.wait_stream(self._side)


@functools.cache
def _side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """One second stream for each current stream. High priority, so small kernels are scheduled first."""
    return torch.cuda.Stream(device, priority=-1)
