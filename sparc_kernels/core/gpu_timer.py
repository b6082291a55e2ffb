"""GPU time by CUDA events, with L2 flushed before each execution; for `tune` and the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
CYCLES = 2e6  # approximate GPU cycles in a millisecond
LONGEST_COVER = 50.0  # milliseconds; a phase whose launches take longer synchronises anyway

Phases = Sequence[Callable[[], object]]


def flush_buffer(device: torch.device) -> torch.Tensor:
    """Allocate a buffer whose overwriting flushes L2."""
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def host_ms(phases: Phases, reset: Callable[[], None] = lambda: None) -> list[float]:
    """Measure the host time to launch each phase, in milliseconds, medians of three.

    Args:
        phases: launched one after the other.
        reset: called before each execution.
    """
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
    """Measure the GPU time of each phase in each execution, in milliseconds.

    Args:
        phases: launched one after the other, with an event between them.
        executions: how many.
        flush: from `flush_buffer`; overwritten before each execution.
        cover_ms: host time of the launches; the GPU spins for twice as long first, so that they are not measured.
        reset: called before each execution, outside the events.

    Returns:
        For each execution one number per phase.
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
