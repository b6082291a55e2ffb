"""How a job is timed: its phases one after the other, cold L2, CUDA events (a clock on a CPU), medians and percentiles.

One execution gives every mode: forward, backward, their sum (full), and with the optimizer's phase the whole step. The
jobs of a group take turns, round by round, so that clocks, heat and other work on the machine meet all of them alike.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
QUIET = 0.06  # share of the cores that others may have in a quiet round
FEW = 0.3  # noise, relative, of a row with one or two executions
LONGEST_COVER = 50.0  # milliseconds: what takes the host longer waits for the GPU inside
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
    reset: Callable[[], None] = lambda: None
    result: Callable[[], Any] = lambda: None  # after an execution: what verification compares
    modes: tuple[str, ...] = ()  # empty: every mode whose phases are all there
    queued: bool = True  # the GPU is kept busy first, so that launches cost nothing; a step must not be
    gradient_bytes: int = 0  # what the gradients that `peak` counts take
    captured_peak: int | None = None  # bytes, where a measurement around the run cannot see them (CUDA graphs)
    host_ms: dict[str, float] = field(default_factory=dict)  # CUDA: what the host takes to launch each phase
    close: Callable[[], None] = lambda: None

    def of_modes(self) -> dict[str, tuple[str, ...]]:
        """Mode -> its phases, as far as this job has them."""
        found = {mode: phases for mode, phases in MODES.items() if set(phases) <= set(self.phases)}
        return {mode: found[mode] for mode in (self.modes or found)}

    def execute(self, without: tuple[str, ...] = ()) -> None:
        for name, run in self.phases.items():
            if name not in without:
                run()


@dataclass
class Samples:
    """Milliseconds of every execution, phase by phase, round by round."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)  # executions in each round
    others: list[float] = field(default_factory=list)  # share of the cores that other processes took in each round
    own_clock: bool = False  # the times are the process' own CPU time, which others do not lengthen directly

    @property
    def seconds(self) -> float:
        return sum(sum(times) for times in self.phases.values()) / 1e3

    def of(self, names: tuple[str, ...]) -> list[float]:
        return [sum(parts) for parts in zip(*(self.phases[name] for name in names), strict=True)]

    def summary(self, names: tuple[str, ...]) -> dict:
        """`noise` is half the distance from p20 to p80, over the median, of the executions or of the rounds' medians,
        whichever is wider, and the share of the cores that other processes had: what a median of this run can be
        trusted to. Fewer than three executions say little about it: at least FEW then."""
        times, medians, at = self.of(names), [], 0
        for n in self.rounds:
            medians.append(quantile(times[at : at + n], 0.5))
            at += n
        middle, low, high = (quantile(times, q) for q in (0.5, 0.2, 0.8))
        spread = max(high - low, quantile(medians, 0.8) - quantile(medians, 0.2))
        others = sum(self.others) / len(self.others) if self.others else None
        noise = max(spread / 2 / middle if middle else 0.0, FEW if len(times) < 3 else 0.0)
        noise = max(noise, 0.0 if self.own_clock else others or 0.0)
        return {
            "median_ms": middle, "p20_ms": low, "p80_ms": high, "n": len(times), "rounds": len(self.rounds),
            "round_ms": [float(f"{m:.5g}") for m in medians], "noise": noise, "others_cpu": others,
        }  # fmt: skip


class Others:
    """What other processes, and the machine below, take of the CPU cores meanwhile (Linux; None elsewhere)."""

    def __init__(self):
        self.cores, self.tick = os.cpu_count() or 1, 0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.tick = os.sysconf("SC_CLK_TCK")
        self.began = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        """(wall, busy, own) seconds; busy and own summed over the cores."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields[:8])
        busy = (user + nice + system + irq + softirq + steal) / self.tick
        return time.perf_counter(), busy, time.process_time()

    def share(self) -> float | None:
        """Of all cores since this object was made; None where that is too short to tell (clocks tick every 10 ms)."""
        now = self._now()
        if now is None or self.began is None or now[0] - self.began[0] < 0.1:
            return None
        wall, busy, own = (b - a for a, b in zip(self.began, now, strict=True))
        return min(max((busy - own) / (wall * self.cores), 0.0), 1.0)


class Timer:
    """`patience`: seconds, in all, to wait for other processes to leave the cores alone and to repeat rounds in which
    they did not (QUIET); only on a CPU. `clock` there: "wall", or "cpu" for the process' own CPU time, all threads
    together, which is what to take where others use the machine too."""

    def __init__(self, device: str | torch.device, patience: float = 0.0, clock: str = "wall"):
        self.cuda, self.patience = torch.device(device).type == "cuda", patience
        self.own_clock = clock == "cpu" and not self.cuda
        self.now = time.process_time if self.own_clock else time.perf_counter
        size = 64 * MIB  # more than most last level caches
        if self.cuda:
            l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * MIB
            size = max(2 * l2, 128 * MIB)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)
        self._cycles = 0.0  # of torch.cuda._sleep in a millisecond; 0: not measured yet

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, job: Job, without: tuple[str, ...] = ()) -> float:
        """Seconds of one synchronised execution, reset included; what it made is still there."""
        started = time.perf_counter()
        job.reset()
        job.execute(without)
        self.sync()
        return time.perf_counter() - started

    def round(self, job: Job, samples: Samples, executions: int = 1) -> None:
        """Adds that many executions to the samples."""
        samples.own_clock = self.own_clock
        if self.cuda:
            times = self._cuda(job, executions)
        else:
            self._wait()
            times, share = self._watched(job, executions)
            while share is not None and share > QUIET and self.patience > 0:
                began = time.perf_counter()
                self._wait()
                times, share = self._watched(job, executions)
                self.patience -= time.perf_counter() - began
            if share is not None:
                samples.others.append(share)
        for one in times:
            for name, ms in zip(job.phases, one, strict=True):
                samples.phases.setdefault(name, []).append(ms)
        samples.rounds.append(executions)
        job.reset()

    def _watched(self, job: Job, executions: int) -> tuple[list[list[float]], float | None]:
        others = Others()
        return [self._cpu(job) for _ in range(executions)], others.share()

    def _wait(self) -> None:
        """Until other processes leave the cores alone, or patience is at its end."""
        while self.patience > 0:
            others = Others()
            time.sleep(0.2)
            self.patience -= 0.2
            share = others.share()
            if share is None or share < QUIET:
                return

    def _cpu(self, job: Job) -> list[float]:
        job.reset()
        self._flush.zero_()
        marks = [self.now()]
        for run in job.phases.values():
            run()
            marks.append(self.now())
        return [1e3 * (b - a) for a, b in pairwise(marks)]

    def launching(self, job: Job) -> dict[str, float]:
        """Milliseconds that the host takes to launch each phase, medians of three; what waits for the GPU waits."""
        times: dict[str, list[float]] = {}
        for _ in range(3):
            job.reset()
            self.sync()
            for name, run in job.phases.items():
                began = time.perf_counter()
                run()
                times.setdefault(name, []).append(1e3 * (time.perf_counter() - began))
        self.sync()
        return {name: quantile(some, 0.5) for name, some in times.items()}

    def _cover(self, job: Job) -> int:
        """Cycles for which the GPU spins while the host launches the job: half as long again as that took."""
        if not self._cycles:
            probe = 2_000_000
            for _ in range(2):  # clocks rise in the first
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                torch.cuda._sleep(probe)
                end.record()
                self.sync()
                self._cycles = max(self._cycles, probe / start.elapsed_time(end))
        return int(self._cycles * min(1.5 * sum(job.host_ms.values()) + 0.2, LONGEST_COVER))

    def _cuda(self, job: Job, executions: int) -> list[list[float]]:
        job.host_ms = job.host_ms or self.launching(job)
        cover, events = self._cover(job) if job.queued else 0, []
        for _ in range(executions):
            job.reset()
            self._flush.zero_()
            if cover:
                torch.cuda._sleep(cover)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(job.phases) + 1)]
            marks[0].record()
            for mark, run in zip(marks[1:], job.phases.values(), strict=True):
                run()
                mark.record()
            events.append(marks)
        self.sync()
        return [[a.elapsed_time(b) for a, b in pairwise(marks)] for marks in events]

    def peaks(self, job: Job) -> dict[str, int]:
        """Most bytes each mode holds beyond what was there before its job began: torch's allocator on CUDA, the
        allocations that torch's profiler reports on a CPU (what libraries allocate by themselves is not seen)."""
        if job.captured_peak is not None:
            return dict.fromkeys(job.of_modes(), job.captured_peak)
        job.reset()
        tops = {}
        if self.cuda:
            self.sync()
            base = torch.cuda.memory_allocated()
            for name, run in job.phases.items():
                torch.cuda.reset_peak_memory_stats()
                run()
                self.sync()
                tops[name] = torch.cuda.max_memory_allocated() - base
        else:
            held = 0
            for name, run in job.phases.items():
                tops[name], held = _peak_on_cpu(run, held)
        job.reset()
        return {mode: max(0, *(tops[name] for name in names)) for mode, names in job.of_modes().items()}


def _peak_on_cpu(run: Callable[[], Any], held: int) -> tuple[int, int]:
    """(most bytes at one time, bytes left) of one call, when `held` were there before."""
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        run()
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    top = held
    for _, _, change in changes:
        held += change
        top = max(top, held)
    return top, held


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
    """Where the time of a mode goes, in milliseconds a call: the package's operators, and what torch does outside of
    them under one name; then kernel by kernel (CUDA only). On CUDA device time, on a CPU host time."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    skip = tuple(set(job.phases) - set(MODES[mode]))
    job.reset()
    job.execute(skip)
    with quiet_stderr(), torch.profiler.profile(activities=activities) as prof:
        for _ in range(calls):
            job.reset()
            job.execute(skip)
        if cuda:
            torch.cuda.synchronize()
    parts: dict[str, list[float]] = {}

    def visit(event, outer: str | None) -> None:
        name = event.name
        if name.startswith("sparc_kernels::"):
            outer = outer or name.split("::")[1]
        key = outer or "torch"
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        entry = parts.setdefault(key, [0.0, 0])
        entry[0] += own / 1e3 / calls
        entry[1] += outer == name.split("::")[-1] and name.startswith("sparc_kernels::")
        for child in event.cpu_children:
            visit(child, outer)

    for event in prof.events():
        if event.cpu_parent is None and "CPU" in str(event.device_type):
            visit(event, None)
    rows = [{"name": name, "ms": ms, "calls": n / calls} for name, (ms, n) in parts.items() if ms > 0]
    kernels: dict[str, list[float]] = {}
    for event in prof.events():
        if "CUDA" in str(event.device_type):
            entry = kernels.setdefault(event.name[:120], [0.0, 0])
            entry[0] += event.self_device_time_total / 1e3 / calls
            entry[1] += 1
    found = [{"name": name, "ms": ms, "calls": n / calls} for name, (ms, n) in kernels.items()]
    return sorted(rows, key=lambda row: -row["ms"]), sorted(found, key=lambda row: -row["ms"])


def quantile(times: list[float], q: float) -> float:
    """Linear between the two nearest."""
    times = sorted(times)
    place = q * (len(times) - 1)
    low = int(place)
    high = min(low + 1, len(times) - 1)
    return times[low] + (place - low) * (times[high] - times[low])


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()
