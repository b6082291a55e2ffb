"""Compile kernels ahead of time, in parallel, into Triton's cache, so that a first run on a GPU compiles nothing.

Needs no GPU: nothing runs and no CUDA context is created. Cache keys are internal to the JIT and differ between
releases, so a worker passes each recorded launch to the JIT itself, with arguments specialised like the recorded ones
and a driver that only knows the target.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context

from ..core._triton import HAS_TRITON
from ..launch.device import AMD, RDNA, SHARED_LIMIT
from .trace import Launch


@dataclass
class Compilation:
    """Result of `compile_all`."""

    kernels: int = 0  # in the cache now, those that already were included
    cpu_seconds: float = 0.0  # summed over the workers and the assemblers they started
    seconds: float = 0.0
    errors: list[tuple[str, str]] = field(default_factory=list)  # kernel, message
    failed: dict[Launch, str] = field(default_factory=dict)  # the same by launch


# Largest kernels first, so that no core ends with one of them alone.
_LONGEST = ("_encode_kernel", "_latent_adam_kernel", "_gather_kernel", "_latent_reduce_kernel")


def compile_all(
    launches: Iterable[Launch | Callable[[], list[Launch]]],
    arch: int,
    jobs: int | None = None,
    on_done: Callable[[int, int], None] | None = None,
    seconds: float | None = None,
) -> Compilation:
    """Compile each distinct launch for one architecture into Triton's cache.

    Args:
        launches: as `trace` records them, or functions that list some; those run in the processes too.
        arch: as `launch.device.capability` gives it.
        jobs: processes; None: one for each core. They are spawned: a script that calls this must guard its main module.
        on_done: called as each kernel ends, with how many have ended and how many there are.
        seconds: after which kernels that no process has taken are given up; None: all are compiled.

    Returns:
        A Compilation; a kernel that does not compile or needs more shared memory than the GPU has, or a function of
        launches that fails, is one of its errors.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed here: nothing can be compiled")
    started, compilation, requests = time.perf_counter(), Compilation(), list(launches)
    lists, to_compile = [x for x in requests if callable(x)], [x for x in requests if not callable(x)]
    if not requests:
        return compilation
    with _compiled_processes(), ProcessPoolExecutor(min(jobs or cores(), len(requests)), get_context("spawn")) as pool:

        def outcomes(running: dict, seconds: float | None = None):
            """Results of the futures as they end, None where they failed; notes CPU time and errors."""
            for future in _ended(running, seconds):
                try:
                    result, error, cpu_seconds = future.result()
                except BrokenProcessPool as broken:
                    result, error, cpu_seconds = None, f"a compiling process died: {broken}", 0.0
                compilation.cpu_seconds += cpu_seconds
                launch = running[future]
                if error:
                    compilation.errors.append((_name(launch) if launch else "-", error))
                if error and launch:
                    compilation.failed[launch] = error
                yield result

        for outcome in outcomes({pool.submit(_timed, listing): None for listing in lists}):
            to_compile += outcome or ()
        to_compile = sorted(dict.fromkeys(to_compile), key=_rank)
        running = {pool.submit(_timed, _compile, launch, arch): launch for launch in to_compile}
        for i, outcome in enumerate(outcomes(running, seconds)):
            compilation.kernels += bool(outcome)
            if on_done:
                on_done(i + 1, len(to_compile))
    compilation.seconds = time.perf_counter() - started
    return compilation


def _ended(futures, seconds: float | None):
    """The futures as they end; those not started within `seconds` are cancelled and left out."""
    seen = set()
    try:
        for future in as_completed(futures, seconds):
            seen.add(future)
            yield future
    except TimeoutError:
        yield from as_completed([f for f in futures if f not in seen and not f.cancel()])


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def target_of(arch: int):
    """Return Triton's GPUTarget of an architecture, as `launch.device.capability` gives it."""
    from triton.backends.compiler import GPUTarget

    if arch >= AMD:
        return GPUTarget("hip", f"gfx{arch:x}", 64 if arch < RDNA else 32)
    return GPUTarget("cuda", arch, 32)


def reason(error: Exception) -> str:
    """Format an error of Triton by its cause, on one line: the cause says what was wrong."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[-200:]}"


def _name(launch: Launch) -> str:
    return launch.kernel.split(":")[1]


def _rank(launch: Launch) -> int:
    name = _name(launch)
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)


@contextmanager
def _compiled_processes():
    """Unset TRITON_INTERPRET, so that processes started inside compile kernels."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _timed(work, *args) -> tuple[object, str, float]:
    """Result of `work`, why it failed or "", and CPU seconds. Runs in a worker process."""
    before, result, error = sum(os.times()[:4]), None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run that uses the kernels repeats them
            result = work(*args)
    except Exception as problem:
        error = reason(problem)
    return result, error, sum(os.times()[:4]) - before


def _compile(launch: Launch, arch: int) -> bool:
    shared, limit = ask_jit(launch, arch).metadata.shared, SHARED_LIMIT.get(arch, math.inf)
    if shared > limit:
        raise ValueError(f"shared memory {shared} B > {limit} B")
    return True


def ask_jit(launch: Launch, arch: int):
    """Let Triton's JIT compile a recorded launch into its cache, without a GPU and without running it.

    Args:
        launch: as `trace` records it.
        arch: as `launch.device.capability` gives it.

    Returns:
        Triton's compiled kernel.

    Raises:
        Exception: whatever Triton raises for a kernel that does not compile.
    """
    from triton.runtime import driver

    driver.set_active(_Driver(target_of(arch)))
    module, name = launch.kernel.split(":")
    kernel = getattr(import_module(module), name)
    known = {"constants": dict(launch.constexprs), "divisible": set(launch.divisible), "small": set(launch.small)}
    signature = dict(launch.signature)
    args = {arg: _like(signature[arg], (i,), known) for i, arg in enumerate(kernel.arg_names) if arg in signature}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **dict(launch.options)}
    return kernel.run(**args, **options, grid=(1,), warmup=True)


@dataclass(frozen=True)
class _Driver:
    """The part of a GPU's driver that the JIT uses before it compiles."""

    target: object

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the JIT caches by device: one for each architecture

    def get_current_stream(self, device) -> int:
        return 0


@dataclass(frozen=True)
class _Pointer:
    """The part of a tensor that the JIT reads."""

    dtype: object
    address: int
    bytes: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.bytes


def _like(kind, path: tuple, known: dict):
    """An argument that the JIT specialises like the recorded one."""
    import torch

    if isinstance(kind, tuple):
        return tuple(_like(part, (*path, i), known) for i, part in enumerate(kind))
    if kind == "constexpr":
        return known["constants"][path]
    divisible = path in known["divisible"]
    if kind.startswith("*"):
        names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "i1": "bool"}
        name = names.get(kind[1:], kind[1:].replace("u", "ui").replace("i", "int"))
        return _Pointer(getattr(torch, name), 16 if divisible else 8, 2**20 if path in known["small"] else 2**31)
    if kind == "i1":
        return True
    if kind.startswith("fp"):
        return 0.5
    return (2**32 if kind == "i64" else 16) + (0 if divisible else 3)
