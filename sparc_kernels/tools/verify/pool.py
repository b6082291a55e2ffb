"""Run the checks of `verify` in this process, or in worker processes, any of which may die during a check."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context

import torch

from .judge import SHORT, Case, Check, Result
from .suite import CHECKS


@dataclass(frozen=True)
class Task:
    """The checks of one case in one dtype, which share its data."""

    case: Case
    dtype: torch.dtype
    device: torch.device
    impl: str
    names: tuple[str, ...]


def failure(task: Task, op: str, note: str) -> Result:
    """Make the failed result of a check that judged nothing.

    Args:
        task: the check's.
        op: name of the check.
        note: the reason.
    """
    return Result(op, "-", SHORT[task.dtype], task.case.name, task.case.shape, verdict="FAIL", note=note)


def checks_of(task: Task) -> Iterator[tuple[list[Result], str]]:
    """Run a task, check by check.

    Args:
        task: to run.

    Yields:
        Results of a check, and "" or why the device is unusable, which ends the task.
    """
    threads = torch.get_num_threads()
    if task.device.type == "cpu" and not task.case.threads:
        torch.set_num_threads(1)  # on a busy machine synchronising threads take ten times as long
    functions = {op: fn for op, _, fn in CHECKS}
    problems: dict = {}
    lost = ""
    try:
        for name in task.names:
            started = time.perf_counter()
            check = Check(name, task.case, task.dtype, task.device, task.impl, problems=problems)
            if _too_large(task):
                check.add("-", True, f"needs {task.case.gib:g} GiB of free GPU memory")
                check.results[-1].verdict = "skip"
            else:
                lost = _run(functions[name], check, task)
            for result in check.results:
                result.seconds = round(time.perf_counter() - started, 3)
            yield check.results, lost
            if lost:
                return
    finally:
        torch.set_num_threads(threads)
        problems.clear()
        if task.device.type == "cuda" and not lost:
            torch.cuda.empty_cache()  # other processes share the GPU


def _too_large(task: Task) -> bool:
    needed = task.case.gib * 2**30
    return task.device.type == "cuda" and needed > 0 and torch.cuda.mem_get_info(task.device)[0] < needed


def _run(fn: Callable[[Check], None], check: Check, task: Task) -> str:
    try:
        with warnings.catch_warnings():  # some checks use half precision parameters on purpose
            warnings.filterwarnings("ignore", ".*float16 parameters lose updates", RuntimeWarning)
            fn(check)
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)  # a kernel's fault is raised here, not in the next check
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        check.results.append(failure(task, check.op, f"{type(error).__name__}: {text}"))
        return device_lost(task.device)
    return ""


def device_lost(device: torch.device) -> str:
    """Return why the device is unusable, or ""."""
    if device.type != "cuda":
        return ""
    try:
        torch.ones(1, device=device).sum().item()
    except Exception as error:  # a fault in a kernel ends the process's CUDA context for good
        return f"the GPU does not answer ({str(error).splitlines()[0][:100]})"
    return ""


def silence_numpy() -> None:
    """Silence numpy, with which the interpreter computes, about inf and NaN in the data."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)


# ----------------------------------------------------------------------------------------------------------- processes

STARTS = 3  # consecutive failed starts of workers after which the device counts as lost


def work(pipe, precision: str, interpret: bool, device: torch.device) -> None:
    """Serve as a worker: receive tasks, send what `checks_of` yields, until the pipe closes or the device is lost.

    Args:
        pipe: to the parent.
        precision: float32 matmul precision of torch.
        interpret: whether kernels are interpreted.
        device: of the tasks.
    """
    torch.set_float32_matmul_precision(precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by deterministic algorithms
    if interpret:
        silence_numpy()
    try:
        lost = device_lost(device)
        pipe.send(lost)  # "": ready
        while not lost:
            for results, lost in checks_of(pipe.recv()):
                pipe.send((results, lost))
    except (EOFError, BrokenPipeError):  # the parent has ended
        pass


class _Worker:
    """A process and its task; `ready` once it has reported that its device works."""

    def __init__(self, settings: tuple):
        context = get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=work, args=(child_pipe, *settings), daemon=True)
        self.process.start()
        child_pipe.close()
        self.ready, self.task = False, None  # the task with its remaining names

    def give(self, task: Task) -> None:
        """Send a task; no effect on a process that has died, which `_hear` notices."""
        with suppress(OSError):
            self.pipe.send(task)
            self.task = task

    def end(self) -> int | None:
        self.pipe.close()
        self.process.join(1)
        if self.process.exitcode is None:
            self.process.kill()  # a broken CUDA context may prevent exit
            self.process.join()
        return self.process.exitcode


Key = tuple[Case, torch.dtype, str]  # of a check


class Pool:
    """Worker processes that share the tasks.

    One that dies or loses its device fails its current check; the rest of its task goes to a fresh process. Cases that
    need much memory run alone, after the others.

    Args:
        tasks: to run.
        jobs: processes.
        settings: arguments of `work` after the pipe.
        ended: called with the key and the results of each check.
    """

    def __init__(self, tasks: list[Task], jobs: int, settings: tuple, ended: Callable[[Key, list[Result]], None]):
        self.queue = deque(sorted(tasks, key=lambda task: task.case.gib > 0))
        self.jobs, self.settings, self.ended = min(jobs, len(tasks)), settings, ended
        self.workers: list[_Worker] = []
        self.failed_starts, self.why = 0, ""

    def run(self) -> None:
        """Run all tasks; checks that no process could run fail."""
        try:
            while self.queue or any(w.task for w in self.workers):
                while self.queue and len(self.workers) < self.jobs and self.failed_starts < STARTS:
                    self.workers.append(_Worker(self.settings))
                if not self.workers:
                    break
                self._give()
                for pipe in connection.wait([w.pipe for w in self.workers]):
                    self._hear(next(w for w in self.workers if w.pipe is pipe))
            for task in self.queue:
                for name in task.names:
                    self.ended((task.case, task.dtype, name), [failure(task, name, f"not run: {self.why}")])
        finally:
            for worker in self.workers:
                worker.end()

    def _give(self) -> None:
        for worker in self.workers:
            busy = [w.task.case.gib for w in self.workers if w.task]
            alone = any(busy) or (busy and self.queue and self.queue[0].case.gib)
            if self.queue and worker.ready and not worker.task and not alone:
                worker.give(self.queue[0])
                if worker.task:
                    self.queue.popleft()

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            message = None
        if message is None:
            self._gone(worker, "")
        elif not worker.ready and message:
            self._gone(worker, message)
        elif not worker.ready:
            worker.ready, self.failed_starts = True, 0
        else:
            results, lost = message
            self._ended(worker, results)
            if lost:
                self._gone(worker, lost)

    def _ended(self, worker: _Worker, results: list[Result]) -> None:
        task, (name, *left) = worker.task, worker.task.names
        worker.task = replace(task, names=tuple(left)) if left else None
        self.ended((task.case, task.dtype, name), results)

    def _gone(self, worker: _Worker, why: str) -> None:
        """Remove a worker that reported why it cannot continue, or died (`why` is "")."""
        self.workers.remove(worker)
        code = worker.end()
        self.why = why or f"its process died (exit code {code})"
        if not worker.ready:
            self.failed_starts += 1
        if worker.task and not why:
            self._ended(worker, [failure(worker.task, worker.task.names[0], self.why)])
        if worker.task:
            self.queue.appendleft(worker.task)
