"""GPU time by CUDA events, L2 overwritten before each execution. For `tune` and the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
CYCLES = 2e6  # of a GPU in a millisecond, about
LONGEST_COVER = 50.0  # milliseconds: a phase that takes the host longer synchronises inside

Phases = Sequence[Callable[[], object]]


def flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def host_ms(phases: Phases, reset: Callable[[], None] = lambda: None) -> list[float]:
    """Milliseconds that the host takes to launch each phase, medians of three."""
    executions = []
    for _ in range(3):
        reset()
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        for run in phases:
            run()
            marks.append(time.perf_counter())
        executions.append([1e3 * (b - a) for a, b in pairwise(marks)])
    torch.cuda.synchronize()
    return [statistics.median(times) for times in zip(*executions, strict=True)]


def event_ms(
    phases: Phases, executions: int, flush: torch.Tensor, cover_ms: float = 0.0,
    reset: Callable[[], None] = lambda: None,
) -> list[list[float]]:  # fmt: skip
    """Milliseconds of each phase in each execution.

    Args:
        phases: launched one after the other, with an event between them.
        executions: how many.
        flush: overwritten before each, from `flush_buffer`.
        cover_ms: the GPU spins for twice as long first, so that launches which take the host that long cost nothing.
        reset: called before each, outside the events.
    """
    cycles, marked = int(CYCLES * min(2 * cover_ms, LONGEST_COVER)), []
    for _ in range(executions):
        reset()
        flush.zero_()
        if cycles:
            torch.cuda._sleep(cycles)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        marks[0].record()
        for run, mark in zip(phases, marks[1:], strict=True):
            run()
            mark.record()
        marked.append(marks)
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) for a, b in pairwise(marks)] for marks in marked]
