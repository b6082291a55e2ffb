"""A second CUDA stream beside the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .recorder import recording


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
        self._numbers: dict[torch.cuda.Event, int] = {}  # of events in a record
        if enabled and device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._side = second_stream(self._main.device, self._main.cuda_stream)

    def run(self, work: Callable[[], object]):
        """Call work() on the second stream; return its result and an event for `wait`."""
        if self._side is None:
            return work(), None
        recorder = recording()
        self._side.wait_stream(self._main)
        if recorder is not None:
            recorder.sync("fork")
            recorder.on_side = True
        try:
            with torch.cuda.stream(self._side):
                result, event = work(), self._side.record_event()
        finally:
            if recorder is not None:
                recorder.on_side = False
        if recorder is not None:
            self._numbers[event] = recorder.sync("event")
        return result, event

    def wait(self, event) -> None:
        """Make later launches on the current stream wait for the event."""
        if event is not None:
            self._main.wait_event(event)
            if (recorder := recording()) is not None:
                recorder.sync("wait", self._numbers[event])

    def join(self) -> None:
        """Make later launches on the current stream wait for the second stream."""
        if self._side is not None:
            self._main.wait_stream(self._side)
            if (recorder := recording()) is not None:
                recorder.sync("join")


@functools.cache
def second_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """Return the second stream of a current stream.

    High priority, so small kernels are scheduled first.

    Args:
        device: of the streams.
        main: handle of the current stream.
    """
    return torch.cuda.Stream(device, priority=-1)
