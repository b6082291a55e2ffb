"""How a job is timed: cold L2, CUDA events (perf_counter on a CPU), medians and percentiles, peak memory.

A job has `run()`, `reset()` (before each run, outside the clock) and `peak_bytes` (or None); `cases.Job` is one.
"""

from __future__ import annotations

import math
import time

import torch

MIB = 2**20


class Timer:
    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        size = MIB
        if self.cuda:
            l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * MIB
            size = max(2 * l2, 128 * MIB)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, job) -> tuple[float, object]:
        """Seconds of one synchronised run, and what it returned."""
        job.reset()
        self.sync()
        t0 = time.perf_counter()
        out = job.run()
        self.sync()
        return time.perf_counter() - t0, out

    def peak(self, job) -> tuple[float, int | None]:
        """Seconds of one synchronised run, and the most memory it held beyond what was allocated before (GPU only)."""
        job.reset()
        if not self.cuda:
            return self.once(job)[0], None
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        seconds, out = self.once(job)
        del out
        return seconds, torch.cuda.max_memory_allocated() - base

    def many(self, job, repeats: int, queued: bool) -> list[float]:
        """Milliseconds of each run. `queued` keeps the GPU busy first: the host runs ahead, launches cost nothing."""
        if not self.cuda:
            return [self._cpu(job) for _ in range(repeats)]
        events = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            job.reset()
            self._flush.zero_()
            if queued:
                torch.cuda._sleep(2_000_000)  # about a millisecond
            begin.record()
            job.run()
            end.record()
            events.append((begin, end))
        self.sync()
        return [begin.elapsed_time(end) for begin, end in events]

    def _cpu(self, job) -> float:
        job.reset()
        self._flush.zero_()
        t0 = time.perf_counter()
        job.run()
        return 1000 * (time.perf_counter() - t0)

    def measure(self, job, seconds: float, queued: bool) -> dict:
        """Median, p20, p80 and peak memory of a job that has run once; about `seconds` long, 5 to 200 repeats.

        A job of more than a second is run twice.
        """
        single, peak = self.peak(job)
        if job.peak_bytes is not None:
            peak = job.peak_bytes
        queued = queued and self.cuda
        slow = single > 1
        self.many(job, 1 if slow else 2, queued)  # warm-up
        repeats = 2 if slow else max(5, min(200, int(seconds / max(single, 1e-5))))
        times = self.many(job, repeats, queued)
        job.reset()
        return {
            "median_ms": quantile(times, 0.5), "p20_ms": quantile(times, 0.2), "p80_ms": quantile(times, 0.8),
            "repeats": repeats, "queued": queued, "peak_mib": None if peak is None else round(peak / MIB, 2),
        }  # fmt: skip


def quantile(times: list[float], q: float) -> float:
    """Linear between the two nearest."""
    times = sorted(times)
    place = q * (len(times) - 1)
    low = int(place)
    high = min(low + 1, len(times) - 1)
    return times[low] + (place - low) * (times[high] - times[low])


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


@torch.no_grad()
def difference(kind: str, ours, theirs) -> float:
    """For "ids" the fraction of theirs that ours did not select, row by row; for "tensor" |theirs - ours| / |ours|."""
    if kind == "ids":
        base = torch.arange(ours.shape[0], device=ours.device)[:, None] << 32
        return 1 - float(torch.isin(theirs + base, ours + base).double().mean())
    pairs = list(zip(ours, theirs, strict=True)) if isinstance(ours, (list, tuple)) else [(ours, theirs)]
    above = below = 0.0
    for a, b in pairs:
        for a_rows, b_rows in zip(a.split(4096), b.split(4096), strict=True):  # never a float32 copy of a whole matrix
            above += float((b_rows.float() - a_rows.float()).square().sum(dtype=torch.float64))
            below += float(a_rows.float().square().sum(dtype=torch.float64))
    return math.sqrt(above / below) if below else math.sqrt(above)


@torch.no_grad()
def norm(tensors) -> float:
    """Euclidean norm of all tensors together; None counts as nothing."""
    total = 0.0
    for t in tensors:
        if t is not None:
            rows = t.t() if t.dim() == 2 and t.stride(0) == 1 else t
            total += sum(float(part.float().square().sum(dtype=torch.float64)) for part in rows.split(16384))
    return math.sqrt(total)
