"""`sparc-kernels verify`: check every operator and a whole training step against the float64 reference.

Shapes, dtypes and processes are set here; comparisons in `checks/`, criteria in `judge.py`.
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
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from ... import __version__
from ...core._triton import HAS_TRITON, INTERPRETED, interpreter_problem, triton
from ...core.provenance import PACKAGE, changed, commit
from ...core.registry import resolve_impl
from ...core.validation import check_device
from ...launch.device import AMD, SHARED_LIMIT, capability
from ..compiler import Compilation, compile_all, cores
from ..verify import adversarial
from .judge import BF16, F16, F32, F64, MULTIPLE, SHORT, Case, Result
from .launches import launches_of
from .pool import Key, Pool, Task, checks_of, silence_numpy
from .suite import CHECKS

# --------------------------------------------------------------------------------------------------------------- cases

OPERATORS = "encode exact values decode nmse index reduce auxk counters"
ALL = OPERATORS + " train"

# Every distinct kernel is compiled first, so shapes share settings where possible (k 64, S 3, multiples of 16) and few
# have every dtype. `verify --compile` counts the kernels.
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
    # the official shape again, whose kernels are compiled already
    Case("routes", 256, 8192, 64, (1024, 768, 768), (F32, BF16), "clip scaled direct again waits"),
    Case("routes fp16", 256, 8192, 64, (1024, 768, 768), (F16,), "again"),
    Case("mixed", 256, 8192, 64, (1024, 768, 768), (F32,), "autocast shadow graph"),
    Case("joint", 1024, 4096, 32, (2048, 1024, 1024), (F32,), "autocast", gib=4),
    Case("beside", 4096, 32768, 64, (1024, 768, 768), (BF16,), "beside", gib=10),
    Case("library", 2048, 16384, 32, (4096,), (BF16,), "library", gib=6),
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
    Case("routes", 24, 256, 8, (24, 16), (F64, F32, BF16), "clip scaled direct again", quick=True),
    Case("mixed", 24, 256, 8, (24, 16), (F32,), "autocast shadow", quick=True),
]
_INT = (F32, F64)
INTERPRET_CASES = [  # interpreted, each program of a launch takes milliseconds
    Case("tiny", 4, 40, 5, (20, 13), _INT, OPERATORS),
    Case("step", 3, 20, 3, (17, 6), _INT, "train", quick=True),
    Case("routes", 3, 20, 3, (17, 6), (F32,), "clip scaled direct", quick=True),
    Case("strided", 2, 33, 4, (9, 6), (F64,), "encode decode nmse auxk", strided=True, quick=True),
    Case("hot", 11, 12, 3, (17,), (F32,), "encode values reduce train", hot=True),
    Case("k=1", 3, 33, 1, (16,), (F64,), "encode exact values decode"),
    Case("k=N", 2, 19, 19, (9,), _INT, "encode exact values decode nmse"),
    Case("S=8", 2, 16, 3, (5, 9, 17, 4, 16, 3, 8, 11), (F32,), "encode nmse"),
]


def cases(device: torch.device, interpret: bool = False, quick: bool = False, arch: int | None = None) -> list[Case]:
    """List the cases of a device.

    Args:
        device: CUDA or CPU.
        interpret: whether kernels are interpreted.
        quick: the smallest shapes only.
        arch: as `launch.device.capability` gives it; None: the device's. bf16 needs 80.
    """
    all_cases = INTERPRET_CASES if interpret else CUDA_CASES if device.type == "cuda" else CPU_CASES
    if device.type == "cuda" and (arch or capability(device)) < 80:
        all_cases = [replace(c, dtypes=tuple(d for d in c.dtypes if d != BF16)) for c in all_cases]
    return [c for c in all_cases if c.quick or not quick]


# -------------------------------------------------------------------------------------------------------------- runner


def run_checks(
    device: torch.device | str | None = None,
    impl: str = "auto",
    quick: bool = False,
    filter: str | None = None,
    interpret: bool = False,
    *,
    jobs: int | None = None,
    on_done: Callable[[list[Result], int, int], None] | None = None,
) -> list[Result]:
    """Check every operator and a training step against the float64 reference.

    Args:
        device: that runs the checks; None: CUDA if available, else the CPU.
        impl: "auto", "triton" or "torch", as the operators take it.
        quick: the smallest shapes only.
        filter: regular expression searched in "op dtype case", for example "decode.*bf16".
        interpret: run the Triton kernels in Triton's interpreter, on the CPU; TRITON_INTERPRET=1 must have been set
            before the package was imported (`sparc-kernels verify --interpret` starts such a process).
        jobs: worker processes; None: this process on a CPU, and on CUDA half the cores up to 6, since a kernel's fault
            ends the CUDA context of its process. With workers a script must guard its main module (multiprocessing).
        on_done: called as each check ends, with its results, its number in order of ending, and how many there are.

    Returns:
        One Result for each tensor that was judged. An exception in a check is a failed Result.

    Raises:
        ValueError: the device or interpreter is not available, or the filter matches nothing.
    """
    tasks = _plan(device, impl, quick, filter, interpret)
    device = tasks[0].device
    keys = [(task.case, task.dtype, name) for task in tasks for name in task.names]
    results_of: dict[Key, list[Result]] = {}

    def ended(key: Key, results: list[Result]) -> None:
        results_of[key] = results
        if on_done:
            on_done(results, len(results_of), len(keys))

    if device.type == "cuda" or (jobs or 1) > 1:
        jobs = jobs or max(1, min(6, cores() // 2))
        Pool(tasks, jobs, (torch.get_float32_matmul_precision(), interpret, device), ended).run()
    else:
        for task in tasks:
            for name, (results, _) in zip(task.names, checks_of(task), strict=True):
                ended((task.case, task.dtype, name), results)
    return [result for key in keys for result in results_of[key]]


def _plan(device, impl: str, quick: bool, filter: str | None, interpret: bool) -> list[Task]:
    device = _device(device, interpret)
    tasks = _tasks(cases(device, interpret, quick), device, "triton" if interpret else impl, filter)
    resolve_impl(tasks[0].impl, torch.empty(0, dtype=tasks[0].dtype, device=device))  # raises if impl cannot run
    return tasks


def _device(device, interpret: bool) -> torch.device:
    default = "cpu" if interpret else "auto"
    device = check_device("device", default if device is None else device)
    if interpret and (not INTERPRETED or device.type != "cpu"):
        raise ValueError(
            "interpret: expected TRITON_INTERPRET=1 to be set before sparc_kernels is imported, and device 'cpu'; got "
            f"{'an interpreted' if INTERPRETED else 'a compiled'} process on {device}"
        )
    return device


def _tasks(of: list[Case], device: torch.device, impl: str, filter: str | None) -> list[Task]:
    tasks = [
        Task(case, dtype, device, impl, names)
        for case in of
        for dtype in case.dtypes
        if (names := _chosen(case, dtype, filter))
    ]
    if not tasks:
        raise ValueError(f"filter: expected a pattern found in some 'op dtype case', got {filter!r}")
    return tasks


def _chosen(case: Case, dtype: torch.dtype, filter: str | None) -> tuple[str, ...]:
    words, names = case.ops.split(), (SHORT[dtype], str(dtype).removeprefix("torch."))

    def matches(op):
        return any(re.search(filter or "", f"{op} {name} {case.name}") for name in names)

    return tuple(op for op, word, _ in CHECKS if word in words and matches(op))


def compile_checks(
    arch: int,
    quick: bool = False,
    filter: str | None = None,
    *,
    jobs: int | None = None,
    on_done: Callable[[int, int], None] | None = None,
    adversarial_sets: bool = False,
) -> Compilation:
    """Compile every kernel that `run_checks` launches on a GPU into Triton's cache. Needs no GPU.

    Args:
        arch: 10 * major + minor of a compute capability, or an AMD GPU's gfx number in hexadecimal.
        quick: as in `run_checks`.
        filter: as in `run_checks`.
        jobs: as in `compile_all`.
        on_done: as in `compile_all`.
        adversarial_sets: compile the kernels of the adversarial sets instead.

    Returns:
        A Compilation.

    Raises:
        ValueError: the filter matches nothing.
        RuntimeError: Triton is not installed.
    """
    gpu, tf32 = torch.device("cuda"), torch.get_float32_matmul_precision() != "highest"
    if adversarial_sets:
        return compile_all(adversarial.launch_lists(arch, quick, filter, tf32), arch, jobs, on_done)
    tasks = sorted(_tasks(cases(gpu, quick=quick, arch=arch), gpu, "auto", filter), key=lambda t: -len(t.case.dims))
    lists = [partial(launches_of, t.case, t.dtype, arch, name, tf32) for t in tasks for name in t.names]
    return compile_all(lists, arch, jobs, on_done)


def environment(device: torch.device) -> dict:
    """Return versions and machine for the record.

    Args:
        device: that runs the checks.
    """
    info = {
        "sparc_kernels": __version__,
        "commit": f"{head}{'+' if changed(PACKAGE.name) else ''}" if (head := commit()) else None,
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
        info.update(
            gpu=about.name,
            capability=f"{about.major}.{about.minor}",
            gpu_memory_gib=round(about.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
            hip=torch.version.hip,
        )
    return info


# ------------------------------------------------------------------------------------------------------------- command


ARCHS = {f"gfx{arch:x}" if arch >= AMD else str(arch): arch for arch in SHARED_LIMIT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
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
    parser.add_argument("--jobs", type=_positive, metavar="N", help="worker processes (default: 1, on CUDA up to 6)")
    parser.add_argument(
        "--adversarial",
        action="store_true",
        help="the rows on which top-k kernels were wrong: ours and others', exact or not",
    )
    parser.add_argument("--compile", action="store_true", help="compile what the checks on a GPU launch, run nothing")
    parser.add_argument("--arch", choices=ARCHS, help="for --compile where that GPU is not: 90 for an H100")
    parser.add_argument("--verbose", action="store_true", help="a line for every tensor, not for every check")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run the checks, or the mode that --compile, --interpret or --adversarial selects.

    Args:
        args: as `add_arguments` declares them.

    Returns:
        Exit code: 0; 1 where a check failed; 2 for arguments that cannot run.
    """
    if args.compile:
        return _run_compile(args)
    unused = "--arch" if args.arch else "--jobs" if args.jobs and args.adversarial else None
    if unused:
        print(f"verify: {unused} is for --compile{' or the checks' * (unused == '--jobs')}", file=sys.stderr)
        return 2
    if args.interpret and not INTERPRETED:
        return _run_interpreted(args)
    if args.interpret:
        silence_numpy()
    if args.adversarial:
        return _run_adversarial(args)
    started = time.perf_counter()
    plan_args = (args.device, args.impl, args.quick, args.filter, args.interpret)
    try:
        device = _plan(*plan_args)[0].device
    except (ValueError, RuntimeError, re.error) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    table = _Table(sys.stderr if args.json == "-" else sys.stdout, args.verbose)
    record = _Record(args, environment(device), started)
    table.header(record.head["environment"], args)
    if device.type == "cuda" and HAS_TRITON and args.impl != "torch":
        table.compiled(compile_checks(capability(device), args.quick, args.filter, on_done=table.progress("kernels")))
    table.names()

    def done(results: list[Result], number: int, total: int) -> None:
        record.add(results)  # written before it is printed
        table.done(results, number, total)

    results = run_checks(*plan_args, jobs=args.jobs, on_done=done)
    table.footer(results, time.perf_counter() - started)
    record.end(results)
    return 0 if all(r.passed for r in results) else 1


def _run_compile(args: argparse.Namespace) -> int:
    """Compile kernels only; needs no GPU."""
    if args.arch is None and not torch.cuda.is_available():
        print("verify: --compile needs --arch where there is no GPU", file=sys.stderr)
        return 2
    arch = ARCHS[args.arch] if args.arch else capability(torch.device("cuda"))
    table = _Table(sys.stdout, args.verbose)
    try:
        how = {"jobs": args.jobs, "on_done": table.progress("kernels"), "adversarial_sets": args.adversarial}
        done = compile_checks(arch, args.quick, args.filter, **how)
    except (ValueError, RuntimeError, re.error) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    table.compiled(done)
    return 1 if done.errors else 0


def _run_adversarial(args: argparse.Namespace) -> int:
    """Run `encode_topk` and installed peers on the adversarial sets; exit code 1 if `encode_topk` is not exact."""
    started = time.perf_counter()
    try:
        device = _device(args.device, args.interpret)
        providers = adversarial.ours("triton" if args.interpret else args.impl, device, args.interpret)
        adversarial.chosen(args.filter)
    except (ValueError, RuntimeError, re.error) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    providers += adversarial.peers(device)
    output = _Table(sys.stderr if args.json == "-" else sys.stdout, args.verbose)
    record = _Record(args, environment(device), started)
    output.header(record.head["environment"], args, adversarial.HEADER)
    arch = capability(device)
    if device.type == "cuda" and HAS_TRITON and args.impl != "torch":
        how = {"jobs": args.jobs, "on_done": output.progress("kernels"), "adversarial_sets": True}
        output.compiled(compile_checks(arch, args.quick, args.filter, **how))
    plan = adversarial.plan_of("interpret" if args.interpret else device.type, args.quick, arch)
    outcomes = adversarial.run_sets(providers, plan, device, args.filter, on_done=record.add)
    record.end(outcomes)
    lines, failed = adversarial.table(outcomes, providers, args.verbose), sum(not o.passed for o in outcomes)
    print(*lines, file=output.stream, sep="\n")
    print(f"ours: {failed} not exact, in {time.perf_counter() - started:.0f} s", file=output.stream)
    return 1 if failed else 0


def _run_interpreted(args: argparse.Namespace) -> int:
    """Run the same command in a process with TRITON_INTERPRET set from the start, since Triton reads it on import."""
    if not HAS_TRITON:
        print("verify: --interpret needs Triton, which is not installed", file=sys.stderr)
        return 2
    if problem := interpreter_problem():
        print(f"verify: {problem}", file=sys.stderr)
        return 2
    if args.device not in (None, "cpu") or args.impl == "torch":
        print("verify: --interpret runs the Triton kernels on the CPU; leave out --device and --impl", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "sparc_kernels", "verify", "--interpret"]
    command += [f"--{name}" for name in ("adversarial", "quick", "verbose") if getattr(args, name)]
    command += ["--filter", args.filter] if args.filter else []
    command += ["--jobs", str(args.jobs)] if args.jobs else []
    command += [] if args.json is None else ["--json"] if args.json == "-" else ["--json", args.json]
    parent = str(PACKAGE.parent)
    paths = os.pathsep.join([parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=env, check=False).returncode


class _Record:
    """The JSON file, rewritten after every check, so that a crash loses at most one."""

    def __init__(self, args: argparse.Namespace, about: dict, started: float):
        self.target, self.started, self.rows = args.json, started, []
        options = {
            name: getattr(args, name) for name in ("device", "impl", "quick", "filter", "interpret", "adversarial")
        }
        self.head = {"schema": 1, "complete": False, "environment": about, "options": options, "passed": False}

    def add(self, results: list[Result]) -> None:
        if self.target and self.target != "-":
            self.rows += map(self._row, results)
            self._write()

    def end(self, results: list[Result]) -> None:
        """Write all results, in the order of the cases."""
        if self.target:
            self.rows = [self._row(r) for r in results]
            self.head.update(complete=True, passed=all(r.passed for r in results))
            self._write()

    @staticmethod
    def _row(result: Result) -> str:
        def plain(x):
            return str(x) if isinstance(x, float) and not math.isfinite(x) else x  # JSON has neither inf nor NaN

        return json.dumps({name: plain(x) for name, x in asdict(result).items()}, allow_nan=False)

    def _write(self) -> None:
        head = json.dumps(self.head | {"seconds": round(time.perf_counter() - self.started, 1)}, indent=1)
        rows = ",\n  ".join(self.rows)
        text = f'{head.removesuffix("}").rstrip()},\n "results": [\n  {rows}\n ]\n}}\n'
        if self.target == "-":
            print(text, end="")
            return
        part = Path(f"{self.target}.part")
        part.write_text(text)
        part.replace(self.target)  # atomic for readers


def _figure(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}"


class _Table:
    """Print one line for each check as it ends: its worst tensor, and every failure. At most 110 columns."""

    ROW = "{:<18} {:<4} {:<27} {:<15} {:>7} {:>7} {:>7} {:>7}  {}"

    def __init__(self, stream, verbose: bool):
        self.stream, self.verbose = stream, verbose
        self.live = sys.stderr.isatty()
        self.case = None

    def _print(self, text: str = "") -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(text, file=self.stream, flush=True)

    LEGEND = f"""\
Against reference.py in float64. A tensor passes when its error is at most {MULTIPLE} x that of plain PyTorch in the
dtype (own) + a few roundings. max: over the largest magnitude, rms: over the RMS. A line is a check: its
tensor that uses most of what it may, and how many passed; --verbose has them all.
"""

    def header(self, about: dict, args, legend: str = LEGEND) -> None:
        where = about["gpu"] or f"{about['device']}, {about['threads']} threads"
        how = "Triton's interpreter" if args.interpret else f"impl {args.impl}"
        commit = f" ({about['commit'][:10]}{'+' * about['commit'].endswith('+')})" if about["commit"] else ""
        self._print(
            f"sparc_kernels {about['sparc_kernels']}{commit}, torch {about['torch']}, triton {about['triton']}, "
            f"{where}, {how}"
        )
        self._print(legend)

    def names(self) -> None:
        names = ("op", "type", "case", "worst tensor", "max", "rms", "own max", "own rms", "verdict")
        self._print(self.ROW.format(*names))

    def compiled(self, done: Compilation) -> None:
        self._print(
            f"{done.kernels} kernels compiled in {done.seconds:.0f} s on {cores()} cores, "
            f"{done.cpu_seconds:.0f} CPU seconds, {len(done.errors)} failed"
        )
        for kernel, error in done.errors:
            self._print(textwrap.fill(f"{kernel}: {error}", 110, initial_indent="    ", subsequent_indent="    "))
        self._print()

    def progress(self, what: str) -> Callable[[int, int], None]:
        def show(number: int, total: int) -> None:
            if self.live:
                print(f"\r\033[K{number} of {total} {what}", end="", file=sys.stderr, flush=True)

        return show

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
        self.progress("checks")(number, total)

    def footer(self, results: list[Result], seconds: float) -> None:
        failed = sum(not r.passed for r in results)
        skipped = sum(r.verdict == "skip" for r in results)
        checks = len({(r.op, r.dtype, r.case) for r in results})
        self._print()
        passed = len(results) - failed - skipped
        self._print(f"{passed} passed, {failed} failed, {skipped} skipped, in {checks} checks, {seconds:.0f} s")
