"""`sparc-kernels verify`: every operator and a whole training step against the float64 reference, on this machine.

Which shapes and dtypes, and in how many processes, stands here; what is compared and how it is judged in
`_verify_checks.py` and `_verify_judge.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from . import __version__
from ._ops import resolve_impl
from ._triton import HAS_TRITON, INTERPRETED, triton
from ._verify_checks import CHECKS
from ._verify_judge import BF16, F16, F32, F64, MULTIPLE, SHORT, Case, Check, Result

# --------------------------------------------------------------------------------------------------------------- cases

OPERATORS = "encode exact values decode nmse index reduce auxk counters"
ALL = OPERATORS + " train"

# Every distinct setting of a kernel is compiled first, about half a second each: shapes share settings where they can
# (k 64, S 3, multiples of 16), and not every one has every dtype. Counted with `audit`'s recorder: about 300 in all.
CUDA_CASES = [
    Case("tiny", 6, 70, 5, (20, 13), (F32, BF16), ALL, quick=True),
    Case("strided", 6, 70, 5, (20, 13), (F32, BF16), "encode values decode nmse auxk", quick=True, strided=True),
    Case("official", 256, 8192, 64, (1024, 768, 768), (F32, BF16, F16), ALL),
    Case("prime", 67, 1021, 17, (131, 97), (BF16,), "encode exact values decode nmse auxk"),
    Case("hot", 512, 1024, 64, (128, 96, 64), (F32, BF16), "encode values decode nmse index reduce train", hot=True),
    Case("k=1", 33, 1000, 1, (64,), (BF16,), "encode exact values decode"),
    Case("k=N", 9, 16, 16, (24,), (F32, BF16), "encode exact decode"),
    Case("k=512", 16, 8192, 512, (256, 192, 64), (F32, BF16), "encode values decode nmse"),
    Case("d=4096", 16, 2048, 64, (4096, 2048, 64), (F32, BF16), "encode values decode nmse"),
    Case("S=8", 32, 2048, 64, (64, 48, 80, 16, 64, 48, 80, 32), (F32, BF16), "encode decode nmse train"),
    Case("S=1", 32, 2048, 64, (320,), (F32, BF16), "encode values decode nmse train"),
    Case("tall", 784, 2064, 64, (160, 96, 64), (F32, BF16), "encode values decode nmse"),
    Case("wide", 16, 131072, 64, (256, 128, 64), (F32, BF16), "encode exact values decode nmse reduce", gib=10),
    Case("wider", 8, 300000, 512, (64,), (BF16,), "encode exact", gib=6),
    Case("chunked", 2100, 131072, 32, (48,), (BF16,), "encode", gib=8),  # logits beyond SCRATCH_BYTES
    Case("int64", 4, 2**20 + 4097, 16, (2048,), (BF16,), "int64", gib=30),  # N d > 2^31
]
_CPU = (F64, F32, BF16)
CPU_CASES = [
    Case("tiny", 6, 70, 5, (20, 13), _CPU, ALL, quick=True),
    Case("strided", 6, 70, 5, (20, 13), _CPU, "encode values decode nmse auxk", quick=True, strided=True),
    Case("official / 4", 32, 2048, 64, (256, 192, 192), _CPU, ALL),
    Case("threads", 32, 2048, 64, (256, 192, 192), (F32,), "encode values decode nmse reduce", threads=True),
    Case("prime", 67, 1021, 17, (131, 97), _CPU, ALL),
    Case("hot", 256, 512, 16, (64, 48), _CPU, "encode values decode nmse index reduce train", hot=True),
    Case("k=1", 33, 1000, 1, (64, 48), _CPU, ALL),
    Case("k=N", 9, 16, 16, (24, 16), _CPU, OPERATORS, quick=True),
    Case("k=512", 8, 1024, 512, (64, 48), _CPU, OPERATORS),
    Case("d=4096", 8, 256, 32, (4096,), _CPU, OPERATORS),
    Case("S=8", 16, 512, 32, (64, 48, 80, 33, 64, 48, 80, 33), _CPU, ALL),
    Case("S=1", 32, 512, 32, (320,), _CPU, ALL),
]
_INT = (F32, F64)
INTERPRET_CASES = [  # a launch takes milliseconds for every program here
    Case("tiny", 4, 40, 5, (20, 13), _INT, OPERATORS),
    Case("step", 3, 20, 3, (17, 6), _INT, "train", quick=True),
    Case("strided", 2, 33, 4, (9, 6), (F64,), "encode decode nmse auxk", strided=True, quick=True),
    Case("hot", 11, 12, 3, (17,), (F32,), "encode values reduce train", hot=True),
    Case("k=1", 3, 33, 1, (16,), (F64,), "encode exact values decode"),
    Case("k=N", 2, 19, 19, (9,), _INT, "encode exact values decode nmse"),
    Case("S=8", 2, 16, 3, (5, 9, 17, 4, 16, 3, 8, 11), (F32,), "encode nmse"),
]


def cases(device: torch.device, interpret: bool = False, quick: bool = False) -> list[Case]:
    every = INTERPRET_CASES if interpret else CUDA_CASES if device.type == "cuda" else CPU_CASES
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        every = [replace(c, dtypes=tuple(d for d in c.dtypes if d != BF16)) for c in every]
    return [c for c in every if c.quick or not quick]


# -------------------------------------------------------------------------------------------------------------- runner


def run_checks(
    device: torch.device | str | None = None,
    impl: str = "auto",
    quick: bool = False,
    filter: str | None = None,
    interpret: bool = False,
    jobs: int | None = None,
    on_done: Callable[[list[Result], int, int], None] | None = None,
) -> list[Result]:
    """Check every operator and a training step against the float64 reference.

    Args:
        device: where; CUDA if there is any, else the CPU.
        impl: "auto", "triton" or "torch", as the operators take it.
        quick: the smallest shapes only.
        filter: a regular expression searched in "op dtype case", for example "decode.*bf16".
        interpret: the Triton kernels in Triton's interpreter, on the CPU; TRITON_INTERPRET=1 must have been set before
            the package was imported (`sparc-kernels verify --interpret` starts such a process).
        jobs: worker processes; None is 1 on a CPU and up to 4 on CUDA, where most of the time is compilation. With
            more than one, a script that calls this must guard its main module, as multiprocessing asks.
        on_done: called as each check ends, with its results, its number in order of ending, and how many there are.

    Returns: one Result for each tensor that was judged. An exception in a check is a failed Result.

    Raises: ValueError where the device or interpreter is not to be had, or the filter leaves nothing.
    """
    tasks = _plan(device, impl, quick, filter, interpret)
    device = tasks[0].device
    total, done = sum(len(task.names) for task in tasks), 0

    def ended(results: list[Result]) -> None:
        nonlocal done
        done += 1
        if on_done:
            on_done(results, done, total)

    if jobs is None:
        jobs = max(1, min(4, (os.cpu_count() or 1) // 2)) if device.type == "cuda" else 1
    if jobs == 1 or len(tasks) == 1:
        return [result for task in tasks for results in _run_task(task, ended) for result in results]
    # the large ones one by one after the others: they share the GPU's memory
    waves = [[t for t in tasks if not t.case.gib], *([t] for t in tasks if t.case.gib)]
    found: dict[_Task, list[list[Result]]] = {}
    settings = (torch.get_float32_matmul_precision(), interpret)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare_worker, settings) as pool:
        for wave in waves:
            running = {pool.submit(_run_task, task): task for task in wave}
            for future in as_completed(running):
                task = running[future]
                try:
                    found[task] = future.result()
                except BrokenProcessPool as error:
                    found[task] = [[_failure(task, name, f"a worker process died: {error}")] for name in task.names]
                for results in found[task]:
                    ended(results)
    return [result for task in tasks for results in found[task] for result in results]


def _plan(device, impl: str, quick: bool, filter: str | None, interpret: bool) -> list[_Task]:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not interpret else "cpu"))
    if interpret and (not INTERPRETED or device.type != "cpu"):
        raise ValueError(
            "interpret: expected TRITON_INTERPRET=1 to be set before sparc_kernels is imported, and device 'cpu'; got "
            f"{'an interpreted' if INTERPRETED else 'a compiled'} process on {device}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a device of this machine, got {device} where CUDA is not available")
    tasks = [
        _Task(case, dtype, device, "triton" if interpret else impl, names)
        for case in cases(device, interpret, quick)
        for dtype in case.dtypes
        if (names := _chosen(case, dtype, filter))
    ]
    if not tasks:
        raise ValueError(f"filter: expected a pattern found in some 'op dtype case', got {filter!r}")
    resolve_impl(tasks[0].impl, torch.empty(0, dtype=tasks[0].dtype, device=device))  # refuses what cannot be
    return tasks


@dataclass(frozen=True)
class _Task:
    """The checks of one case in one dtype, which share its data."""

    case: Case
    dtype: torch.dtype
    device: torch.device
    impl: str
    names: tuple[str, ...]


def _chosen(case: Case, dtype: torch.dtype, filter: str | None) -> tuple[str, ...]:
    words = case.ops.split()
    return tuple(
        op for op, word, _ in CHECKS if word in words and re.search(filter or "", f"{op} {SHORT[dtype]} {case.name}")
    )


_lost = ""  # why this process cannot use its device any more


def _run_task(task: _Task, ended: Callable[[list[Result]], None] | None = None) -> list[list[Result]]:
    """The results of each check of a task."""
    threads = torch.get_num_threads()
    if task.device.type == "cpu" and not task.case.threads:
        torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take ten times as long
    try:
        return _run_checks_of(task, ended)
    finally:
        torch.set_num_threads(threads)


def _run_checks_of(task: _Task, ended: Callable[[list[Result]], None] | None) -> list[list[Result]]:
    global _lost
    functions = {op: fn for op, _, fn in CHECKS}
    cuda = task.device.type == "cuda"
    problems: dict = {}
    found = []
    if cuda and not _lost:
        torch.cuda.empty_cache()
    for name in task.names:
        started = time.perf_counter()
        check = Check(name, task.case, task.dtype, task.device, task.impl, problems)
        if _lost:
            check.results.append(_failure(task, name, f"not run: {_lost}"))
        elif cuda and task.case.gib and torch.cuda.mem_get_info(task.device)[0] < task.case.gib * 2**30:
            check.add("-", True, f"needs {task.case.gib:g} GiB of free GPU memory")
            check.results[-1].verdict = "skip"
        else:
            try:
                fn = functions[name]
                fn(check)
                if cuda:
                    torch.cuda.synchronize(task.device)  # a kernel's fault shows up here, not in the next check
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                check.results.append(_failure(task, name, f"{type(error).__name__}: {text}"))
                _lost = _device_lost(task.device)
        for result in check.results:
            result.seconds = round(time.perf_counter() - started, 3)
        found.append(check.results)
        if ended:
            ended(check.results)
    return found


def _failure(task: _Task, op: str, note: str) -> Result:
    return Result(op, "-", SHORT[task.dtype], task.case.name, task.case.shape, verdict="FAIL", note=note)


def _prepare_worker(precision: str, interpret: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    if interpret:
        _silence_numpy()


def _silence_numpy() -> None:
    """inf and NaN are among the data, and numpy, which the interpreter computes with, says so at each of them."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)


def _device_lost(device: torch.device) -> str:
    """Why nothing more can run on the device after an exception, or nothing."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:  # a fault in a kernel ends the process's CUDA context for good
        return f"the GPU does not answer after a failed check ({str(error).splitlines()[0][:100]})"
    return ""


def environment(device: torch.device) -> dict:
    """Versions and machine, for the record."""
    found = {
        "sparc_kernels": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "interpreted": INTERPRETED,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpu": None,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found.update(
            gpu=about.name,
            capability=f"{about.major}.{about.minor}",
            gpu_memory_gib=round(about.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
            hip=torch.version.hip,
        )
    return found


def _commit() -> str | None:
    """The checkout's commit, with a + when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*words):
        run = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "reference.py")  # not some other repository around an installed copy
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--impl", choices=("auto", "triton", "torch"), default="auto", help="implementation to check")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes only")
    parser.add_argument("--filter", metavar="REGEX", help='checks whose "op dtype case" matches, e.g. "decode.*bf16"')
    parser.add_argument(
        "--interpret", action="store_true", help="the Triton kernels without a GPU, in Triton's interpreter"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the results there (no FILE: to stdout)"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="worker processes (default: 1, on CUDA up to 4)")
    parser.add_argument("--verbose", action="store_true", help="a line for every tensor, not for every check")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    if args.interpret and not INTERPRETED:
        return _run_interpreted(args)
    if args.interpret:
        _silence_numpy()
    started = time.perf_counter()
    choice = (args.device, args.impl, args.quick, args.filter, args.interpret)
    try:
        device = _plan(*choice)[0].device
    except (ValueError, RuntimeError, re.error) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    about = environment(device)
    table = _Table(sys.stderr if args.json == "-" else sys.stdout, args.verbose)
    table.header(about, args)
    results = run_checks(*choice, args.jobs, on_done=table.done)
    seconds = time.perf_counter() - started
    passed = all(r.passed for r in results)
    table.footer(results, seconds)
    if args.json:
        _write_json(args, about, results, seconds)
    return 0 if passed else 1


def _run_interpreted(args: argparse.Namespace) -> int:
    """The same command in a process that has TRITON_INTERPRET from the start, as Triton reads it on import."""
    if not HAS_TRITON:
        print("verify: --interpret needs Triton, which is not installed", file=sys.stderr)
        return 2
    if args.device not in (None, "cpu") or args.impl == "torch":
        print("verify: --interpret runs the Triton kernels on the CPU; leave out --device and --impl", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", __package__, "verify", "--interpret"]
    command += [f"--{name}" for name in ("quick", "verbose") if getattr(args, name)]
    command += ["--filter", args.filter] if args.filter else []
    command += ["--jobs", str(args.jobs)] if args.jobs else []
    command += [] if args.json is None else ["--json"] if args.json == "-" else ["--json", args.json]
    parent = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=env, check=False).returncode


def _write_json(args: argparse.Namespace, about: dict, results: list[Result], seconds: float) -> None:
    def plain(x):
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x  # JSON has no inf and no NaN

    found = {
        "schema": 1,
        "environment": about,
        "options": {name: getattr(args, name) for name in ("device", "impl", "quick", "filter", "interpret")},
        "passed": all(r.passed for r in results),
        "seconds": round(seconds, 1),
        "results": [{name: plain(x) for name, x in asdict(r).items()} for r in results],
    }
    text = json.dumps(found, indent=1, allow_nan=False)
    if args.json == "-":
        print(text)
    else:
        Path(args.json).write_text(text + "\n")


def _figure(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}"


class _Table:
    """One line for each check as it ends: its worst tensor, and every failure. At most 110 columns."""

    ROW = "{:<18} {:<4} {:<27} {:<15} {:>7} {:>7} {:>7} {:>7}  {}"

    def __init__(self, stream, verbose: bool):
        self.stream, self.verbose = stream, verbose
        self.live = sys.stderr.isatty()
        self.case = None

    def _print(self, text: str = "") -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(text, file=self.stream, flush=True)

    def header(self, about: dict, args) -> None:
        where = about["gpu"] or f"{about['device']}, {about['threads']} threads"
        how = "Triton's interpreter" if args.interpret else f"impl {args.impl}"
        commit = f" ({about['commit'][:10]}{'+' * about['commit'].endswith('+')})" if about["commit"] else ""
        self._print(
            f"sparc_kernels {about['sparc_kernels']}{commit}, torch {about['torch']}, triton {about['triton']}, "
            f"{where}, {how}"
        )
        self._print(
            f"""\
Against reference.py in float64. A tensor passes when its error is at most {MULTIPLE} x that of plain PyTorch in the
dtype (own) + a few roundings. max: over the largest magnitude, rms: over the RMS. A line is a check: its
tensor that uses most of what it may, and how many passed; --verbose has them all.
"""
        )
        names = ("op", "type", "case", "worst tensor", "max", "rms", "own max", "own rms", "verdict")
        self._print(self.ROW.format(*names))

    def done(self, results: list[Result], number: int, total: int) -> None:
        failed = [r for r in results if not r.passed]
        worst = max(results, key=lambda r: r.share)
        for r in results if self.verbose else failed or [worst]:
            case = f"{r.case}: {r.shape}" if len(r.case) + len(r.shape) < 26 else r.shape
            figures = map(_figure, (r.max_error, r.rms_error, r.torch_max, r.torch_rms))
            verdict = r.verdict if self.verbose or failed or r.verdict == "skip" else f"ok {len(results)}"
            self._print(self.ROW.format(r.op, r.dtype, case, r.tensor[:15], *figures, verdict))
            if r.note and r.note != "exact" and (self.verbose or r.verdict != "ok"):
                self._print(textwrap.fill(r.note, 110, initial_indent="    ", subsequent_indent="    "))
        if failed and len(results) > 1 and not self.verbose:
            self._print(f"    {len(failed)} of the {len(results)} tensors of this check failed")
        if self.live:
            print(f"\r\033[K{number} of {total} checks", end="", file=sys.stderr, flush=True)

    def footer(self, results: list[Result], seconds: float) -> None:
        failed = sum(not r.passed for r in results)
        skipped = sum(r.verdict == "skip" for r in results)
        checks = len({(r.op, r.dtype, r.case) for r in results})
        self._print()
        passed = len(results) - failed - skipped
        self._print(f"{passed} passed, {failed} failed, {skipped} skipped, in {checks} checks, {seconds:.0f} s")
