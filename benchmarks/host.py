"""Host time of a training step: what Python, torch and Triton need to launch it, beside a dense step in PyTorch.

    python -m benchmarks host                                     # the official shape; on a GPU where there is one
    python -m benchmarks host --shape 4096,32768,64,1024,3 --auxk 0 --json host.json
    python -m benchmarks host --fit                               # constants of the cost model's host term

Without a GPU everything on the host is real but CUDA's driver (sparc_kernels/tools/stub_driver.py).
docs/benchmarks.md says what is measured and what is not.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from sparc_kernels import AlignedSAE, GraphedStep, SparcAdam, reference
from sparc_kernels.core.gpu_timer import event_ms, flush_buffer
from sparc_kernels.nn import graphed
from sparc_kernels.tools.replaced import replaced
from sparc_kernels.tools.shape import Shape, parse_shape
from sparc_kernels.tools.stub_driver import stub_driver
from sparc_kernels.tools.trace import autocast_on_meta
from sparc_kernels.train.step import Step

from . import environment, record
from .cases import DEAD_THRESHOLD, PRECISIONS
from .timing import QUIET, CpuContention, quiet_stderr
from .verification import library_topk

SCHEMA = "sparc_kernels.host/1"
OFFICIAL = "256,8192,64,1024/768/768,3"
FIT_SHAPES = tuple(f"256,8192,64,{widths}" for widths in ("1024,1", "1024/768,2", "1024/768/768,3", "512,5"))
DTYPES = ("bfloat16", "bfloat16 autocast")
TINY = {"B": 16, "N": 128, "k": 8}  # of steps on a CPU
TINY_WIDTH = 16
WARM_UP = 4  # steps before anything is counted: kernels are compiled, moments allocated, graphs captured


@dataclass
class Row:
    """One kind of step. Times are of one step, in milliseconds, over `repeats` turns."""

    what: str
    dtype: str
    auxk: int
    tensors: str  # "meta", "cpu" or "cuda"
    shape: str
    at: str  # the shape that was timed, on a CPU a tiny one
    host_ms: float = 0.0  # the shortest turn
    cpu_ms: float = 0.0  # the least CPU time of this process in a turn
    median_ms: float = 0.0
    launches: int = 0  # of Triton
    torch_calls: int = 0  # operators of torch, those inside the package's too
    torch_kernels: int = 0  # those of them that launch something: no views, no allocations
    operators: int = 0  # the package's own
    launch_share: float = 0.0  # of the CPU time, in Triton's code
    device_ms: float | None = None  # on a GPU
    repeats: int = 0
    turns: list[tuple[float, float]] = field(default_factory=list, repr=False)

    def __str__(self):
        share = f"{self.launch_share:.0%}" if self.launches else "-"
        device = "" if self.device_ms is None else f"{self.device_ms:10.3f}"
        counts = (self.launches, share, self.torch_calls, self.torch_kernels, self.operators)
        return (
            f"{self.what:<30} {self.dtype:<17} {self.auxk:>4} {self.tensors:<5}"
            + "".join(f"{ms:9.3f}" for ms in (self.host_ms, self.median_ms, self.cpu_ms))
            + "".join(f"{count:>9}" for count in counts) + device
        )  # fmt: skip


HEAD = f"{'step':<30} {'dtype':<17} {'auxk':>4} {'on':<5}" + "".join(
    f"{name:>9}" for name in ("host ms", "median", "CPU ms", "launches", "in them", "torch", "kernels", "own")
)
NOTE = f"""\
on cpu: B {TINY["B"]}, N {TINY["N"]}, k {TINY["k"]}, d {TINY_WIDTH}, where torch's kernels take little time, ours none
in a graph: with one that does nothing; the rest of a replay is real
on meta: the shape itself; torch's operators are partly Python there, slower than CUDA's: an upper bound
launches: of Triton; in them: share of the time in Triton's code; torch: calls of its operators; kernels: those of them
that launch something; own: calls of the package's operators"""

# --------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Setting:
    """Where and at what steps are made."""

    shape: Shape
    dtype: str  # one of PRECISIONS
    auxk: int
    device: str

    @property
    def kind(self) -> torch.dtype:
        return PRECISIONS[self.dtype][0]

    @property
    def half(self) -> torch.dtype | None:
        """Autocast's dtype."""
        return PRECISIONS[self.dtype][2]

    @property
    def widths(self) -> dict[str, int]:
        return {f"s{i}": d for i, d in enumerate(self.shape.d_streams)}

    def autocast(self):
        """A context of a training loop's; meta tensors follow the CPU's (`autocast_on_meta`)."""
        device = "cuda" if self.device == "cuda" else "cpu"
        return torch.autocast(device, self.half) if self.half else nullcontext()

    def inputs(self) -> dict[str, torch.Tensor]:
        return {s: torch.randn(self.shape.B, d, device=self.device).to(self.kind) for s, d in self.widths.items()}

    def model(self) -> AlignedSAE:
        s, impl = self.shape, "auto" if self.device == "cuda" else "triton"
        model = AlignedSAE(
            self.widths, s.N, s.k, self.auxk or None, dead_steps_threshold=DEAD_THRESHOLD, impl=impl,
            device=self.device, dtype=self.kind,
        )  # fmt: skip
        if self.device == "cuda":  # a tenth is dead, as in the benchmarks' cases
            for name in self.widths:
                getattr(model, f"stats_last_nonzero_{name}")[: s.N // 10] = 10 * DEAD_THRESHOLD
        return model


def two_calls(s: Setting) -> Callable[[], object]:
    """The loop that people write."""
    model, x = s.model(), s.inputs()
    adam = SparcAdam(model, 0.0)

    def step():
        with s.autocast():
            loss, _ = model.compute_loss(model(x), x)
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def captured_calls(s: Setting) -> Callable[[], object]:
    """The same loop by `GraphedStep`."""
    model, x = s.model(), s.inputs()
    adam = SparcAdam(model, 0.0, graph=True)
    return partial(GraphedStep(model, adam, autocast=s.half), x)


def training_step(graph: bool = False):
    """`AlignedSAE.training_step`, under autocast with half-precision copies of the weights as in the Trainer."""

    def build(s: Setting) -> Callable[[], object]:
        model, x = s.model(), s.inputs()
        adam = SparcAdam(model, 0.0, shadow=s.half, graph=graph)

        def step():
            with s.autocast():
                model.training_step(x, adam)

        return step

    return build


def trainer(gradient_free: bool = False, graph: bool = False):
    """The Trainer's step, without the re-initialisation that it does every hundred steps."""

    def build(s: Setting) -> Callable[[], object]:
        model, x = s.model(), s.inputs()
        half = s.half if gradient_free else None
        adam = SparcAdam(model, 0.0, capturable=graph, shadow=half, graph=graph)
        rng = torch.Generator("cuda" if s.device == "cuda" else "cpu")
        step = Step(model, adam, rng, reinit_every=0, bf16=s.half is not None, gradient_free=gradient_free, graph=graph)
        step.reads_loss = False  # as on CUDA
        return lambda: step(x)

    return build


def dense(s: Setting) -> Callable[[], object]:
    """`reference.training_loss` with torch.topk, unit norm and projection, torch's Adam: fused, on meta foreach."""
    N, widths = s.shape.N, s.shape.d_streams

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=s.device).to(s.kind).requires_grad_()

    w_encs, w_decs = [leaf(N, d) for d in widths], [leaf(d, N) for d in widths]
    biases = [leaf(d) for d in widths], [leaf(N) for _ in widths]
    dead = [torch.arange(N, device=s.device) < N // 10 for _ in widths] if s.auxk else None
    how = {"foreach": True} if s.device == "meta" else {"fused": True}
    adam = torch.optim.Adam([*w_encs, *w_decs, *biases[0], *biases[1]], 0.0, **how)
    xs = list(s.inputs().values())

    def step():
        adam.zero_grad(set_to_none=True)
        with s.autocast():
            loss = reference.training_loss(xs, w_encs, w_decs, *biases, s.shape.k, auxk_k=s.auxk or None, dead=dead)
        loss.backward()
        with torch.no_grad():
            for w in w_decs:
                w.copy_(reference.unit_norm_decoder(w))
                w.grad.copy_(reference.project_decoder_grad(w, w.grad))
        adam.step()

    return step


def _total_loss(matrix, aux, auxk_coef=1 / 32, cross_coef=1.0):
    """`reference.total_loss` without reading values back, which would wait for a GPU."""
    S, total = matrix.shape[0], matrix.diagonal().mean()
    if aux is not None:
        total = total + auxk_coef * aux.mean()
    return total + cross_coef * (matrix.sum() - matrix.diagonal().sum()) / max(S * (S - 1), 1)


OURS = {
    "two calls": two_calls, "training_step": training_step(), "Trainer's step": trainer(),
    "Trainer's step, gradient_free": trainer(gradient_free=True),
}  # fmt: skip
GRAPHS = {
    "two calls, in a graph": captured_calls, "training_step, in a graph": training_step(graph=True),
    "Trainer's step, in a graph": trainer(graph=True),
    "gradient_free, in a graph": trainer(gradient_free=True, graph=True),
}  # fmt: skip
DENSE = "dense, eager"
BY_AUTOGRAD = ("two calls", "Trainer's step", DENSE)


def steps_of(
    shape: Shape, dtypes: Iterable[str], auxks: Iterable[int], cuda: bool, meta: bool
) -> Iterator[tuple[Row, Callable]]:
    """Rows, and what makes the step of each; `meta`: at the shape itself too, where there is no GPU."""
    tiny = replace(shape, **TINY, d_streams=(TINY_WIDTH,) * shape.S)
    for dtype, auxk in itertools.product(dtypes, auxks):
        places = [Setting(shape, dtype, auxk, "cuda")] if cuda else [
            Setting(tiny, dtype, min(auxk, tiny.k), "cpu"), *([Setting(shape, dtype, auxk, "meta")] if meta else []),
        ]  # fmt: skip
        for where in places:
            builds = OURS | (GRAPHS if where.device != "meta" else {})
            if where.device != "meta" or where.half is None:  # torch's operators know no autocast on meta
                builds = builds | {DENSE: dense}
            for what, build in builds.items():
                row = Row(what, dtype, auxk, where.device, *(str(s).rsplit(", ", 1)[0] for s in (shape, where.shape)))
                yield row, partial(build, where)


@contextmanager
def idle_graphs() -> Iterator[None]:
    """Context in which steps on a CPU are captured and replayed as on CUDA, by a graph that does nothing.

    What a replay does on the host besides the driver's launch is real: its checks, copies and results.
    """
    idle = SimpleNamespace(replay=lambda: None, wait_stream=lambda other: None)
    fakes = {name: lambda *_: idle for name in ("CUDAGraph", "Stream", "current_stream", "set_stream")}
    contexts = {name: lambda *_, **__: nullcontext() for name in ("graph", "stream")}
    with (
        replaced(torch.cuda, **fakes, **contexts, is_current_stream_capturing=lambda: False),
        replaced(graphed, _DEVICE="cpu"),
    ):
        yield


# ------------------------------------------------------------------------------------------------------------ counting


# Operators that launch nothing themselves: views, allocations, and those made of others.
NO_KERNEL = {
    "view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "squeeze_", "detach", "detach_",
    "alias", "_unsafe_view", "permute", "unbind", "split", "split_with_sizes", "as_strided", "diagonal", "narrow",
    "_reshape_alias", "view_as", "expand_as", "chunk", "reshape", "to", "contiguous", "empty", "empty_like",
    "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor", "lift_fresh", "result_type", "resolve_conj",
    "resolve_neg", "item", "_local_scalar_dense", "is_nonzero", "set_", "resize_",
    "linear", "matmul", "type_as", "flatten", "unflatten",
}  # fmt: skip


@dataclass
class Calls:
    """Operators that a step calls, seen by torch's profiler: a dispatch mode would switch plans off."""

    torch: int = 0  # not from inside another of torch's
    kernels: int = 0
    own: int = 0

    @classmethod
    def of(cls, step: Callable) -> Calls:
        found = cls()
        with quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
            step()
        for event in prof.events():
            if event.cpu_parent is None:
                found.kernels += found.visit(event, False)
        return found

    def visit(self, event, inside: bool) -> int:
        """Count an event and those in it; return how many kernels of torch it launches."""
        space, _, name = event.name.partition("::")
        own = space == "aten"
        self.torch += own and not inside
        self.own += space == "sparc_kernels"
        below = sum(self.visit(child, inside or own) for child in event.cpu_children)
        return 1 if own and name not in NO_KERNEL else below  # what a kernel on a CPU calls besides is CPU's alone


@contextmanager
def in_triton() -> Iterator[list[bool]]:
    """Context that samples by CPU time whether the main thread is in Triton's code, which its launches are."""
    import triton

    folder, samples = os.path.dirname(triton.__file__), []

    def look(number, frame):
        while frame and not frame.f_code.co_filename.startswith(folder):
            frame = frame.f_back
        samples.append(frame is not None)

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 1e-3, 1e-3)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # backward in this thread, on a GPU too
            yield samples
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def launched() -> Iterator[list[None]]:
    """Context that lists Triton's launches, by its own hook."""
    from triton import knobs

    found = []

    def note(metadata):
        found.append(None)

    knobs.runtime.launch_enter_hook.add(note)
    try:
        yield found
    finally:
        knobs.runtime.launch_enter_hook.remove(note)


# -------------------------------------------------------------------------------------------------------------- timing


class Measure:
    """Times steps in turns, so that all of them see the same machine.

    Args:
        stub: the driver that counts launches; None on a GPU.
        repeats: turns of each step.
        seconds: of a turn, about.
    """

    def __init__(self, stub, repeats: int, seconds: float):
        self.stub, self.cuda, self.repeats, self.seconds = stub, stub is None, repeats, seconds
        self.steps: list[tuple[Row, Callable, int]] = []

    def add(self, row: Row, step: Callable) -> None:
        """Warm a step up, and count what it calls."""
        for _ in range(WARM_UP):
            step()
        self._sync()
        calls = Calls.of(step)
        row.torch_calls, row.torch_kernels, row.operators = calls.torch, calls.kernels, calls.own
        before = 0 if self.cuda else self.stub.launches
        with launched() if self.cuda else nullcontext() as found:
            step()
        row.launches = len(found) if self.cuda else self.stub.launches - before
        self.steps.append((row, step, max(1, int(self.seconds / max(self._turn(step, 3)[0], 1e-6)))))

    def _sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _turn(self, step: Callable, n: int) -> tuple[float, float]:
        """Seconds of wall and of CPU time in a step, of n. On a GPU each begins with an empty queue and ends when the
        host has launched it."""
        spent = np.zeros(2)
        for _ in range(n):
            self._sync()
            began = time.perf_counter(), time.process_time()
            step()
            spent += np.subtract((time.perf_counter(), time.process_time()), began)
        self._sync()
        return tuple(spent / n)

    def run(self) -> list[Row]:
        """Take the turns."""
        gc.collect()
        gc.freeze()
        for _ in range(self.repeats):
            for row, step, n in self.steps:
                row.turns.append(self._turn(step, n))
        for row, step, _ in self.steps:
            wall, cpu = (sorted(1e3 * t for t in times) for times in zip(*row.turns, strict=True))
            row.host_ms, row.median_ms, row.cpu_ms, row.repeats = wall[0], statistics.median(wall), cpu[0], len(wall)
            with in_triton() as samples:  # some hundred with the default: a share is off by a few per cent
                until = time.process_time() + 4 * self.seconds
                while time.process_time() < until:
                    step()
                self._sync()
            row.launch_share = sum(samples) / max(len(samples), 1)
            if self.cuda:
                flush = flush_buffer(torch.device("cuda"))
                times = event_ms([step], 7, flush, cover_ms=row.host_ms)
                row.device_ms = statistics.median(t for (t,) in times)
        gc.unfreeze()
        return [row for row, *_ in self.steps]


# ----------------------------------------------------------------------------------------------------------------- fit


def fit(rows: list[Row]) -> dict:
    """Fit host us = a * Triton launches + b * torch kernels + c by relative least squares, none negative.

    A torch kernel is a call that launches something; views and allocations are left to the launches beside them.
    CPU time is fitted, which other processes lengthen less, of the steps by autograd and an optimizer: `training_step`
    takes less than half of what they would say. Steps on meta are left out.
    """
    rows = [row for row in rows if row.tensors != "meta" and row.what in BY_AUTOGRAD]
    y = np.array([1e3 * row.cpu_ms for row in rows])
    x = np.array([[row.launches, row.torch_kernels, 1] for row in rows], float)
    best, least = np.zeros(3), np.inf
    for some in (list(c) for n in (1, 2, 3) for c in itertools.combinations(range(3), n)):
        found = np.zeros(3)
        found[some] = np.linalg.lstsq(x[:, some] / y[:, None], np.ones(len(y)), rcond=None)[0]
        error = float(np.square(x @ found / y - 1).sum())
        if (found >= 0).all() and error < least:
            best, least = found, error
    off = np.abs(x @ best / y - 1)
    names = ("triton_us", "torch_us", "step_us")
    return {
        **dict(zip(names, (round(float(v), 2) for v in best), strict=True)), "rows": len(rows),
        "median_error": float(np.median(off)), "largest_error": float(off.max()),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- main


def measure(shapes: list[Shape], dtypes: list[str], args, stub) -> list[Row]:
    """All rows, those of a shape in turns; `stub`: the driver, None on a GPU."""
    rows = []
    with (
        autocast_on_meta() if stub else nullcontext(), idle_graphs() if stub else nullcontext(), library_topk(),
        replaced(reference, total_loss=_total_loss),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        for shape in shapes:
            made = Measure(stub, args.repeats, args.seconds)
            for row, build in steps_of(shape, dtypes, args.auxks, stub is None, not args.fit):
                made.add(row, build())
            rows += made.run()
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", action="append", metavar="B,N,k,d,S", help=f"repeatable; default {OFFICIAL}")
    add("--auxk", type=int, action="append", help="repeatable; default 0 and 64")
    add("--dtype", action="append", choices=[p for p in PRECISIONS if p != "tf32"], help=f"default {DTYPES}")
    add("--arch", type=int, default=90, help="without a GPU: compute capability that kernels are compiled for")
    add("--repeats", type=int, default=7, help="turns of each step")
    add("--seconds", type=float, default=0.1, help="of a turn")
    add("--fit", action="store_true", help="fit the cost model's host term, by default to four numbers of streams")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        default = FIT_SHAPES if args.fit else (OFFICIAL,)
        args.shapes = [parse_shape(text) for text in args.shape or default]
    except ValueError as error:
        parser.error(str(error))
    if any(shape.dtype != "bfloat16" for shape in args.shapes):
        parser.error("--shape: expected B,N,k,d,S without a precision, which is --dtype")
    args.auxks = args.auxk if args.auxk is not None else [0, 64]
    limit = min(shape.N for shape in args.shapes)
    for name, values, low in (("--auxk", args.auxks, 0), ("--repeats", [args.repeats], 1), ("--arch", [args.arch], 70)):
        for value in values:
            if value < low or (name == "--auxk" and value > min(limit, 512)):
                parser.error(f"{name}: expected a number >= {low}{' and at most N and 512' * (low == 0)}, got {value}")
    if not args.seconds > 0:
        parser.error(f"--seconds: expected a number > 0, got {args.seconds}")
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse(argv), time.time()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    about, others = environment.environment("cuda" if cuda else "cpu", 1), CpuContention()
    with ExitStack() as stack:
        try:
            stub = None if cuda else stack.enter_context(stub_driver(args.arch))
        except (RuntimeError, ValueError) as error:
            print(f"benchmarks host: error: {error}", file=sys.stderr)
            return 2
        rows = measure(args.shapes, args.dtype or list(DTYPES), args, stub)
    share, load = others.share(), environment.load_average()
    found = fit(rows) if args.fit else None
    print(report(about, rows, share, load, found))
    if args.json:
        entries = [{name: value for name, value in asdict(row).items() if name != "turns"} for row in rows]
        record.save(args.json, {
            "schema": SCHEMA, "environment": {**about, "load_after": load}, "others_cpu": share, "rows": entries,
            "fit": found, "seconds": round(time.time() - began, 1),
        })  # fmt: skip
    return 0


def report(about: dict, rows: list[Row], share: float | None, load: float | None, found: dict | None) -> str:
    """Format the rows."""
    cuda = about["device"] == "cuda"
    versions = about["versions"]
    commit = (about["commit"] or "none")[:7] + (" (changed)" if about["dirty"] else "")
    driver = about["device_name"] if cuda else "no GPU: CUDA's driver does nothing, its share is not in these times"
    lines = [
        f"host time of a step: {about['cpu']}, one thread; {driver}",
        f"torch {versions['torch']}, Triton {versions.get('triton')}, {about['date'][:10]}, commit {commit}",
    ]
    for shape in dict.fromkeys(row.shape for row in rows):
        lines += ["", shape, HEAD + (" device ms" if cuda else "")]
        lines += [str(row) for row in rows if row.shape == shape]
    if not cuda:
        lines += ["", NOTE]
    if found:
        lines += [
            "", f"host us of a step = {found['triton_us']} x Triton launches + {found['torch_us']} x torch kernels + "
            f"{found['step_us']}; off by {found['median_error']:.0%} (median), {found['largest_error']:.0%} (most)",
            f"TRITON_US, TORCH_US, STEP_US = {found['triton_us']}, {found['torch_us']}, {found['step_us']}",
        ]  # fmt: skip
    lines.append(f"load average {about['load_before']} before, {load} after (its own 1 included)")
    if share is not None and share > QUIET:
        lines.append(
            f"OTHERS HAD {share:.0%} OF THE CORES: times are too long; compare within this run, whose steps took turns"
        )
    return "\n".join(lines)
