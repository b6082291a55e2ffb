"""`sparc-kernels tune`: search launch settings for one shape on this machine's GPU and record them.

The candidates' kernels are compiled in parallel first. Every candidate's result is compared with that of the default
settings before it is timed. Settings at least 3 % faster in two rounds are written to the user's file (`tuned.py`),
which later launches read; no other command searches.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from ..core.gpu_timer import event_ms, flush_buffer, host_ms
from ..core.numerics import allow_tf32
from ..launch import tuned
from ..launch.device import capability
from ..ops.decode import decode_nmse
from ..ops.encode import encode_topk
from ..ops.inverse_index import inverse_index
from ..ops.latent_reduce import latent_reduce
from ..ops.records import WeightedLists
from .compiler import compile_all
from .shape import Shape, parse_shape
from .trace import Launch, Tracer, as_on_gpu

OPS = ("encode", "select", "gather", "reduce")
WRONG = "wrong result"  # prefix of a refusal that is not about resources
GAIN = 0.97  # a winner takes at most this fraction of the default's time
COMPILING = 0.6  # fraction of an operator's time limit
# relative difference of two correct results: another order of summation, one rounding when stored
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass
class SearchResult:
    """Result of the search for one operator."""

    op: str
    keys: list[str]  # under which settings are recorded: one for each kind of launch of the problem
    default_ms: float
    best_ms: float
    settings: dict | None  # None: the default stays
    tried: int
    candidates: int  # more than `tried` if the time limit ended the search
    refused: list[tuple[dict, str]]  # candidates that fail or give another result, and why


@dataclass
class Try:
    """One candidate."""

    fields: dict  # settings by name
    launches: tuple[Launch, ...] = ()  # of a run with them
    wrong: str = ""  # why it must not run; "": it may


def _silent(text: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ problems


@dataclass
class Problem:
    """One operator at one shape: a function that a CUDA graph can capture, and how two results compare."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    differs: Callable[[tuple, tuple], str]  # reference, result -> "" or the difference


def _data(shape: Shape, device):
    """Inputs, weights and biases of unit scale, the same in every call."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    xs = [normal(shape.B, d) for d in shape.d_streams]
    w_encs = [normal(shape.N, d, scale=d**-0.5) for d in shape.d_streams]
    w_decs = [normal(shape.N, d, scale=d**-0.5).t() for d in shape.d_streams]
    pre_biases = [torch.zeros(d, device=device, dtype=dtype) for d in shape.d_streams]
    latent_biases = [torch.zeros(shape.N, device=device, dtype=dtype) for _ in shape.d_streams]
    return xs, w_encs, w_decs, pre_biases, latent_biases


def problem(op: str, shape: Shape, device: torch.device) -> Problem:
    """Set up the problem on which one operator is tuned.

    Args:
        op: one of OPS.
        shape: of the step.
        device: CUDA, or meta to trace the launches.
    """
    xs, w_encs, w_decs, pre_biases, latent_biases = _data(shape, device)
    tolerance = TOLERANCE[xs[0].dtype]
    if op in ("encode", "select"):

        def encode():
            with torch.no_grad():
                return (encode_topk(xs, w_encs, pre_biases, latent_biases, shape.k, impl="triton")[0],)

        def differs(reference, result):
            return _selections_differ(reference[0], result[0], xs, w_encs, tolerance)

        return Problem(encode, differs)

    with torch.no_grad():
        indices, values = encode_topk(xs, w_encs, pre_biases, latent_biases, shape.k, impl="triton")
    inverse = inverse_index(indices, shape.N)
    if op == "gather":
        # the loss and its gradient with respect to values: every form of the gather kernel but plain decode
        values = values.detach().requires_grad_()

        def gather():
            loss = decode_nmse(indices, values, w_decs, pre_biases, xs, inverse=inverse, impl="triton")
            return loss.detach(), torch.autograd.grad(loss.sum(), values)[0]

        return Problem(gather, lambda *two: _tensors_differ(*two, tolerance))
    # dW_dec from gradients of the reconstructions, [S, B, d_t] of each target
    upstream = [torch.stack([x.roll(s, 0) for s in range(len(xs))]) for x in xs]

    def reduce():
        lists = [WeightedLists(inverse, values, None, None, g, shape.k) for g in upstream]
        return tuple(latent_reduce(some, some.mat.dtype, "triton")[0] for some in lists)

    return Problem(reduce, lambda *two: _tensors_differ(*two, tolerance))


def _tensors_differ(reference, result, tolerance) -> str:
    for i, (a, b) in enumerate(zip(reference, result, strict=True)):
        if a.shape != b.shape:
            return f"result {i}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}"
        a, b = a.double(), b.double()
        error, scale = float((a - b).abs().max()), float(a.abs().max())
        if not error <= tolerance * scale:  # NaN is an error too
            return f"result {i}: off by {error:.3g}, of {scale:.3g} at most"
    return ""


def _selections_differ(reference, result, xs, w_encs, tolerance) -> str:
    """Compare pre-activations at the selected latents, since near ties may be decided either way."""
    n = w_encs[0].shape[0]
    if result.shape != reference.shape or bool((result < 0).any() | (result >= n).any()):
        return f"expected latents in 0..{n - 1}"
    ordered = result.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return "a latent is selected twice in a row"
    for first in range(0, len(reference), 256):
        part, selected = slice(first, first + 256), []
        for indices in (reference[part], result[part]):
            pre = sum(
                torch.einsum("bkd,bd->bk", w[indices].float(), x[part].float()) for w, x in zip(w_encs, xs, strict=True)
            )
            selected.append(pre.sort(dim=1).values)
        error, scale = float((selected[0] - selected[1]).abs().max()), float(selected[0].abs().max())
        if not error <= tolerance * scale:
            return f"selected pre-activations off by {error:.3g}, of {scale:.3g} at most"
    return ""


# -------------------------------------------------------------------------------------------------------------- search


def candidates(op: str, args: tuple) -> Iterator[dict]:
    """Iterate over the distinct settings to try that the rules of `launch` accept, the default first.

    Args:
        op: one of OPS.
        args: arguments of the operator's function of settings in `launch`.
    """
    default = asdict(tuned.TUNABLE[op].default(*args))
    spaces = {
        "encode": dict(block_m=(64, 128, 256), block_n=(64, 128, 256), num_warps=(4, 8), num_stages=(2, 3, 4)),
        "select": dict(group=(8, 16, 32, 64, 128), num_warps=(1, 2, 4, 8)),
        "gather": dict(block_d=(32, 64, 128, 256), tiles=(1, 2, 4, 8, 16), num_warps=(4, 8), num_stages=(1, 2, 3)),
        "reduce": dict(block_e=(2, 4, 8), block_d=(128, 256, 512, 1024, 2048), num_warps=(1, 2, 4, 8)),
    }
    space = spaces[op]
    first = {name: default[name] for name in space}
    seen = set()
    for fields in (first, *(dict(zip(space, values, strict=True)) for values in product(*space.values()))):
        try:
            config = tuned.apply(op, args, fields)
        except ValueError:
            continue
        if config not in seen:
            seen.add(config)
            yield fields


def plan(op: str, shape: Shape, arch: int) -> tuple[list[Launch], list[Try]]:
    """List the launches with the present settings, and the candidates; nothing is compiled or launched.

    Args:
        op: one of OPS.
        shape: of the step.
        arch: as `launch.device.capability` gives it.

    Returns:
        Launches with the present settings, and a Try for each candidate.
    """
    recorded: list[Launch] = []
    tries, name = [], tuned.device_name()
    with as_on_gpu(arch, allow_tf32(), recorded, name), Tracer([]):  # recorded settings of other operators apply
        task = problem(op, shape, torch.device("meta"))
        with tuned.observed(op) as wanted:
            task.run()
        default = list(recorded)
        for fields in candidates(op, next(iter(wanted))):
            recorded.clear()
            wrong = ""
            try:
                with tuned.trial(op, fields):
                    task.run()
            except ValueError as error:  # accepted for the first launch, refused for another
                wrong = _why(error)
            tries.append(Try(fields, tuple(recorded), wrong))
    return default, tries


def prepare(op: str, shape: Shape, arch: int, seconds: float, tell=_silent) -> list[Try]:
    """Compile the candidates' kernels into Triton's cache.

    Args:
        op: one of OPS.
        shape: of the step.
        arch: as `launch.device.capability` gives it.
        seconds: limit for compiling; math.inf: none.
        tell: called with a line of progress.

    Returns:
        The candidates; `wrong` is set where a kernel does not compile or needs more shared memory than the GPU has.
    """
    default, tries = plan(op, shape, arch)
    all_launches = [*default, *(launch for candidate in tries if not candidate.wrong for launch in candidate.launches)]
    limit = None if seconds == math.inf else seconds
    compilation = compile_all(all_launches, arch, None, lambda i, n: tell(f"{op}: {i} of {n} kernels compiled"), limit)
    for candidate in tries:
        for launch in candidate.launches:
            if launch in compilation.failed:
                candidate.wrong = candidate.wrong or f"{launch.kernel.split(':')[1]}: {compilation.failed[launch]}"
    return tries


def search(
    op: str, task: Problem, timer: Callable[[Callable], float], tries: list[Try], *, tell=_silent,
    until: float = math.inf, now: Callable[[], float] = time.monotonic,
) -> SearchResult:  # fmt: skip
    """Search the fastest settings of one operator whose results agree with the default's.

    Args:
        op: one of OPS.
        task: its problem.
        timer: times a function, in milliseconds a call.
        tries: candidates in the order to try; those with `wrong` set are refused without running.
        tell: called with a line of progress.
        until: when to end by the clock `now`, in seconds; includes the second round of the best.
        now: clock, in seconds.

    Returns:
        A SearchResult; its times are in milliseconds.
    """
    with tuned.observed(op) as wanted:
        reference = task.run()
    began, slowest = now(), 0.0
    default_ms = timer(task.run)
    keys = list(dict.fromkeys(tuned.key(op, args) for args in wanted))
    result = SearchResult(op, keys, default_ms, default_ms, None, 0, len(tries), [])
    for candidate in tries:
        slowest, began = max(slowest, now() - began), now()
        if began + 3 * slowest > until:  # leaves time for one more and the second round
            break
        result.tried += 1
        with tuned.trial(op, candidate.fields):
            wrong = candidate.wrong
            try:
                if not wrong and (difference := task.differs(reference, task.run())):
                    wrong = f"{WRONG}: {difference}"
            except Exception as error:  # settings that do not fit are skipped
                wrong = _why(error)
            if wrong:
                result.refused.append((candidate.fields, wrong))
                continue
            ms = timer(task.run)
        if ms < result.best_ms:
            result.best_ms, result.settings = ms, candidate.fields
        tell(f"{op}: {result.tried} of {len(tries)} tried, best {result.best_ms:.3f} ms")
    if result.settings is not None:  # timed again back to back: clocks and other load drift
        default_ms = timer(task.run)
        with tuned.trial(op, result.settings):
            best_ms = timer(task.run)
        if max(best_ms, result.best_ms) > GAIN * min(default_ms, result.default_ms):
            best_ms, result.settings = default_ms, None
        result.default_ms, result.best_ms = default_ms, best_ms
    return result


def tune(
    shape: Shape, ops, device: torch.device, name: str, timer, *, tell=_silent, minutes: float = math.inf,
    now: Callable[[], float] = time.monotonic,
) -> list[SearchResult]:  # fmt: skip
    """Search every operator and record the winners; each applies while the next operator is searched.

    Args:
        shape: of the step.
        ops: operators, some of OPS.
        device: the GPU.
        name: of the GPU, under which settings are recorded.
        timer: times a function, in milliseconds a call.
        tell: called with a line of progress.
        minutes: limit for everything, shared by the remaining operators; those not begun by then are left out.
        now: clock, in seconds.

    Returns:
        A SearchResult for each operator searched.

    Raises:
        OSError: the cache is not writable; raised before the search.
    """
    about = {"torch": torch.__version__, "triton": _triton_version()}
    tuned.write(name, {}, about)
    results, end = [], now() + 60 * minutes
    for i, op in enumerate(ops):
        began = now()
        if began >= end:
            break
        share = (end - began) / (len(ops) - i)
        tries = prepare(op, shape, capability(device), COMPILING * share, tell)
        result = search(op, problem(op, shape, device), timer, tries, tell=tell, until=began + share, now=now)
        if result.settings is not None:
            measured = {"ms": result.best_ms, "default_ms": result.default_ms, "shape": shape.record()}
            tuned.write(name, {key: {"settings": result.settings, **measured} for key in result.keys}, about)
        results.append(result)
    return results


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _triton_version() -> str:
    import triton

    return triton.__version__


class GraphTimer:
    """Time a call by events: median milliseconds of replays of its CUDA graph, L2 overwritten before each.

    A graph excludes the cost of launching from Python. After a call that cannot be captured, that and all later calls
    run eagerly, each behind a kernel that keeps the GPU busy until the host has launched everything.

    Args:
        device: the GPU.
        say: called with a note when capture fails.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]):
        self.device, self.say, self.captures = device, say, True

    @functools.cached_property
    def flush(self) -> torch.Tensor:
        """Buffer that overwrites L2."""
        return flush_buffer(self.device)

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Stream that captures."""
        return torch.cuda.Stream()

    def __call__(self, run: Callable) -> float:
        graph = self._capture(run) if self.captures else None
        call = graph.replay if graph else run
        (cover,) = [0.0] if graph else host_ms([call])
        return statistics.median(ms for (ms,) in event_ms([call], 22, self.flush, cover)[2:])

    def _capture(self, run: Callable):
        """A graph of the call, after a warm-up on the capturing stream; None if capture fails."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            self.captures = False
            self.say(f"not captured in a CUDA graph, timed as launched from Python: {_why(error)}")
            return None
        return graph


# ------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--shape", required=True, metavar="B,N,k,d,S[,PRECISION]",
        help="rows, latents, active latents, width of a stream, streams; PRECISION bf16 (default), fp16 or fp32",
    )  # fmt: skip
    parser.add_argument("--op", action="append", choices=OPS, help="search this one only; repeatable (default: all)")
    parser.add_argument(
        "--minutes", type=_minutes, default=math.inf, metavar="M",
        help="a limit for all of it, shared out over the operators; what was best by then counts (default: none)",
    )  # fmt: skip


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Search, record and print the results.

    Args:
        args: as `add_arguments` declares them.

    Returns:
        Exit code: 0; 2 for invalid arguments, without a GPU or compiled kernels, or for an unwritable cache.
    """
    try:
        shape = parse_shape(args.shape)
    except ValueError as error:
        return _fail(str(error))
    from ..core._triton import HAS_TRITON, INTERPRETED

    if not torch.cuda.is_available():
        return _fail("needs a GPU, and torch finds none here")
    if not HAS_TRITON or INTERPRETED:
        return _fail("needs compiled Triton kernels (install triton, unset TRITON_INTERPRET)")
    name = torch.cuda.get_device_name()

    def tell(text):
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    def say(text):
        tell("")
        print(text, file=sys.stderr)

    print(f"{name}, {shape}")
    device, ops = torch.device("cuda"), args.op or OPS
    try:
        results = tune(shape, ops, device, name, GraphTimer(device, say), tell=tell, minutes=args.minutes)
    except OSError as error:
        return _fail(f"{tuned.cache_dir()} cannot be written ({error}); set SPARC_KERNELS_CACHE to a folder that can")
    tell("")
    for result in results:
        tried = f"{result.tried} of {result.candidates} tried, time limit"
        if result.tried == result.candidates:
            tried = f"{result.tried} tried"
        print(f"{result.op:<8} default {result.default_ms:.3f} ms, best {result.best_ms:.3f} ms; {tried}, "
              f"{len(result.refused)} refused: {result.settings or 'the default stays'}")  # fmt: skip
        for fields, why in result.refused:
            if why.startswith(WRONG):  # worth a report
                print(f"  {why} with {fields}")
    for op in ops[len(results) :]:
        print(f"{op:<8} not searched, time limit")
    print(f"recorded in {tuned.cache_dir() / tuned.slug(name)}.json")
    return 0


def _fail(message: str) -> int:
    print(f"sparc-kernels tune: error: {message}", file=sys.stderr)
    return 2
