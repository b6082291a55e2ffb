"""How a job is timed: its phases one after the other, cold L2, CUDA events (a clock on a CPU), medians and percentiles.

One execution gives every mode: forward, backward, their sum (full), and with the optimizer's phase the whole step. The
jobs of a group take turns, round by round, so that clocks, heat and other processes affect all of them alike.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from sparc_kernels.core.gpu_timer import event_ms, flush_buffer, host_ms

MIB = 2**20
FLUSH_BYTES = 64 * MIB  # of a CPU: more than most last level caches
QUIET = 0.06  # share of the cores that others may have in a quiet round
FEW = 0.3  # noise, relative, of a row with one or two executions
METHOD = 1  # raised when times of one version may not be compared with another's
MODES = {  # which phases a mode is the sum of
    "forward": ("forward",),
    "backward": ("backward",),
    "full": ("forward", "backward"),
    "step": ("forward", "backward", "optimizer"),
}


@dataclass
class Job:
    """Something ready to run. `reset` runs before each execution, outside the clock."""

    phases: dict[str, Callable[[], Any]]  # in their order; names as in MODES
    reset: Callable[[], Any] = lambda: None
    result: Callable[[], Any] = lambda: None  # after an execution: what verification compares
    modes: tuple[str, ...] = ()  # empty: every mode whose phases are all there
    queued: bool = True  # the GPU is kept busy first, so that launches cost nothing; not for a training step
    gradient_bytes: int = 0  # of the gradients that the peak counts
    captured_peak: int | None = None  # bytes, where a measurement around the run cannot see them (CUDA graphs)
    host_ms: dict[str, float] = field(default_factory=dict)  # CUDA: of the host, to launch each phase

    def of_modes(self) -> dict[str, tuple[str, ...]]:
        """Phases by mode, as far as this job has them."""
        whole = [mode for mode, phases in MODES.items() if set(phases) <= set(self.phases)]
        return {mode: MODES[mode] for mode in self.modes or whole}

    def execute(self, mode: str) -> None:
        """The phases of one mode, as far as there are any."""
        for name in MODES[mode]:
            if name in self.phases:
                self.phases[name]()

    def again(self, mode: str) -> None:
        self.reset()
        self.execute(mode)


@dataclass
class Samples:
    """Milliseconds of every execution, phase by phase, round by round."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)  # executions in each round
    others: list[float] = field(default_factory=list)  # share of the cores that other processes took in each round
    own_clock: bool = False  # the process' own CPU time, which others do not lengthen directly

    @property
    def seconds(self) -> float:
        return sum(map(sum, self.phases.values())) / 1e3

    def summary(self, names: tuple[str, ...]) -> dict:
        """Fields of a row. `noise`: half the distance from p20 to p80 over the median, of the executions or of the
        rounds' medians, whichever is wider; at least the share of the cores that others had, and FEW below three."""
        times = np.sum([self.phases[name] for name in names], axis=0)
        medians = [float(np.median(part)) for part in np.split(times, np.cumsum(self.rounds)[:-1])]
        low, middle, high = np.quantile(times, (0.2, 0.5, 0.8)).tolist()
        spread = max(high - low, float(np.subtract(*np.quantile(medians, (0.8, 0.2)))))
        others = sum(self.others) / len(self.others) if self.others else None
        noise = max(spread / 2 / middle if middle else 0.0, FEW if len(times) < 3 else 0.0)
        return {
            "median_ms": middle, "p20_ms": low, "p80_ms": high, "n": len(times), "rounds": len(self.rounds),
            "round_ms": [float(f"{m:.5g}") for m in medians], "others_cpu": others,
            "noise": max(noise, 0.0 if self.own_clock else others or 0.0),
        }  # fmt: skip


class CpuContention:
    """What other processes, and the machine below, take of the CPU cores meanwhile (Linux; None elsewhere)."""

    def __init__(self):
        self.cores = os.cpu_count() or 1
        self.began = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        """(wall, busy, own) seconds; busy and own summed over the cores."""
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and iowait
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()

    def share(self) -> float | None:
        """Of all cores since this object was made; None where that is too short to tell (clocks tick every 10 ms)."""
        now = self._now()
        if now is None or self.began is None or now[0] - self.began[0] < 0.1:
            return None
        wall, busy, own = (b - a for a, b in zip(self.began, now, strict=True))
        return min(max((busy - own) / (wall * self.cores), 0.0), 1.0)


class Timer:
    """Times executions of jobs.

    Args:
        device: on CUDA by events, on a CPU by a clock.
        patience: CPU: seconds, in all, to wait for quiet cores and to repeat rounds that others disturbed (QUIET).
        clock: CPU: "wall", or "cpu" for the process' own CPU time of all threads, for a machine that others use too.
    """

    def __init__(self, device: str | torch.device, patience: float = 0.0, clock: str = "wall"):
        device = torch.device(device)
        self.cuda, self.patience = device.type == "cuda", patience
        self.own_clock = clock == "cpu" and not self.cuda
        self.now = time.process_time if self.own_clock else time.perf_counter
        self._flush = flush_buffer(device) if self.cuda else torch.empty(FLUSH_BYTES, dtype=torch.int8)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, job: Job, mode: str = "step") -> float:
        """Seconds of one synchronised execution, reset included; its result is kept."""
        started = time.perf_counter()
        job.again(mode)
        self.sync()
        return time.perf_counter() - started

    def round(self, job: Job, samples: Samples, executions: int = 1) -> None:
        """Adds that many executions to the samples."""
        samples.own_clock = self.own_clock
        times = self._on_cuda(job, executions) if self.cuda else self._undisturbed(job, samples, executions)
        for name, column in zip(job.phases, zip(*times, strict=True), strict=True):
            samples.phases.setdefault(name, []).extend(column)
        samples.rounds.append(executions)
        job.reset()

    def _on_cuda(self, job: Job, executions: int) -> list[list[float]]:
        phases = list(job.phases.values())
        job.host_ms = job.host_ms or dict(zip(job.phases, host_ms(phases, job.reset), strict=True))
        cover = sum(job.host_ms.values()) if job.queued else 0.0
        return event_ms(phases, executions, self._flush, cover, job.reset)

    def _undisturbed(self, job: Job, samples: Samples, executions: int) -> list[list[float]]:
        """A round on a CPU, repeated while others disturb it and patience lasts."""
        while True:
            began = time.perf_counter()
            self._wait()
            others = CpuContention()
            times, share = [self._on_cpu(job) for _ in range(executions)], others.share()
            if share is None or share <= QUIET or self.patience <= 0:
                samples.others += [] if share is None else [share]
                return times
            self.patience -= time.perf_counter() - began

    def _wait(self) -> None:
        """Until other processes leave the cores alone, or patience is used up."""
        share = 1.0
        while self.patience > 0 and share is not None and share >= QUIET:
            others = CpuContention()
            time.sleep(0.2)
            self.patience -= 0.2
            share = others.share()

    def _on_cpu(self, job: Job) -> list[float]:
        job.reset()
        self._flush.zero_()
        marks = [self.now()]
        for run in job.phases.values():
            run()
            marks.append(self.now())
        return [1e3 * (b - a) for a, b in pairwise(marks)]

    def peaks(self, job: Job) -> dict[str, int]:
        """Most bytes each mode holds beyond those before its job began: torch's allocator on CUDA, the allocations that
        torch's profiler reports on a CPU (without what libraries allocate by themselves)."""
        if job.captured_peak is not None:
            return dict.fromkeys(job.of_modes(), job.captured_peak)
        job.reset()
        tops, held = {}, 0
        self.sync()
        base = torch.cuda.memory_allocated() if self.cuda else 0
        for name, run in job.phases.items():
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                run()
                self.sync()
                tops[name] = torch.cuda.max_memory_allocated() - base
            else:
                tops[name], held = _peak_on_cpu(run, held)
        job.reset()
        return {mode: max(0, *(tops[name] for name in names)) for mode, names in job.of_modes().items()}


def _peak_on_cpu(run: Callable[[], Any], held: int) -> tuple[int, int]:
    """(most bytes at one time, bytes left) of one call, when `held` were there before."""
    with quiet_stderr(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    levels = np.cumsum([held, *(change for *_, change in changes)])
    return int(levels.max()), int(levels[-1])


@contextlib.contextmanager
def quiet_stderr():
    """torch's profiler announces itself on the process' standard error."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def profile(job: Job, cuda: bool, mode: str = "full", calls: int = 3) -> tuple[list[dict], list[dict]]:
    """Milliseconds of a mode, a call: by operator of the package, everything outside of them as "torch"; by kernel.

    Device time and kernels on CUDA, host time and no kernels on a CPU.
    """
    job.again(mode)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with quiet_stderr(), torch.profiler.profile(activities=activities) as prof:
        for _ in range(calls):
            job.again(mode)
        if cuda:
            torch.cuda.synchronize()
    parts, kernels = (defaultdict(lambda: [0.0, 0]) for _ in range(2))

    def visit(event, operator: str | None) -> None:
        begins = operator is None and event.name.startswith("sparc_kernels::")
        operator = event.name.split("::")[1] if begins else operator
        part = parts[operator or "torch"]
        part[0] += event.self_device_time_total if cuda else event.self_cpu_time_total
        part[1] += begins
        for child in event.cpu_children:
            visit(child, operator)

    for event in prof.events():
        if "CUDA" in str(event.device_type):
            kernel = kernels[event.name[:120]]
            kernel[0] += event.self_device_time_total
            kernel[1] += 1
        elif event.cpu_parent is None:
            visit(event, None)
    return _by_time(parts, calls), _by_time(kernels, calls)


def _by_time(entries: dict[str, list], calls: int) -> list[dict]:
    rows = [{"name": name, "ms": us / 1e3 / calls, "calls": n / calls} for name, (us, n) in entries.items() if us > 0]
    return sorted(rows, key=lambda row: -row["ms"])


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()
