"""A second CUDA stream beside the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


class SideStream:
    """Runs work on a second stream of a GPU, beside what is launched on the current one; elsewhere at once.

    The second stream waits for everything launched before, so memory that was made on the current stream may be used,
    and memory of the second stream's own is never taken back early: its next use comes after a wait as well. Captured
    by a CUDA graph as a fork, and a join at `join`, which must come before the results are used or the memory is freed.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self._main = self._side = None
        if enabled and device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._side = _side_stream(self._main.device, self._main.cuda_stream)

    def run(self, work: Callable[[], object]):
        """Launches what work() launches. Returns (its result, what `wait` takes to wait for it alone)."""
        if self._side is None:
            return work(), None
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            return work(), self._side.record_event()

    def wait(self, event) -> None:
        """What is launched on the current stream from here on comes after the event."""
        if event is not None:
            self._main.wait_event(event)

    def join(self) -> None:
        if self._side is not None:
            self._main.wait_stream(self._side)


@functools.cache
def _side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """One for each stream `main` of the caller's. Urgent: its few blocks go before the many of a large kernel."""
    return torch.cuda.Stream(device, priority=-1)
