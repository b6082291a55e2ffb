"""`sparc-kernels tune`: launch settings for one shape, searched on this machine's GPU and recorded for later launches.

The kernels that the candidates would launch are compiled side by side first. Every candidate's result is compared with
that of the default settings before it is timed. What is at least 3 % faster in two rounds is written to the user's file
(`tuned.py`), where launches find it; no other command ever searches.
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
from .trace import Launch, _Tracer, as_on_gpu

OPS = ("encode", "select", "gather", "reduce")
WRONG = "wrong result"  # a reason that is not a matter of resources
GAIN = 0.97  # a winner takes at most this part of the default's time
COMPILING = 0.6  # of an operator's time, where that is limited
# agreement of two correct results: their sums are in another order, and what is stored is rounded once
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass
class Found:
    """What the search of one operator came to."""

    op: str
    keys: list[str]  # what the settings are recorded for: one for each kind of launch that the problem makes
    default_ms: float
    best_ms: float
    settings: dict | None  # None: the default stays
    tried: int
    candidates: int  # more than `tried` where the time was up
    refused: list[tuple[dict, str]]  # candidates that do not run or do not agree, and why


@dataclass
class Try:
    """Settings to try."""

    fields: dict
    launches: tuple[Launch, ...] = ()  # the kernels that a run with them launches
    wrong: str = ""  # why they are not to be run


def _silent(text: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ problems


@dataclass
class Problem:
    """One operator at one shape: what to run, a CUDA graph can capture it, and how two results compare."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    differs: Callable[[tuple, tuple], str]  # reference, result -> "" or what is wrong


def _data(shape: Shape, device):
    """Inputs, weights and biases of unit scale, the same for every call."""
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
    xs, w_encs, w_decs, pre_biases, latent_biases = _data(shape, device)
    tolerance = TOLERANCE[xs[0].dtype]
    if op in ("encode", "select"):

        def encode():
            with torch.no_grad():
                return (encode_topk(xs, w_encs, pre_biases, latent_biases, shape.k, impl="triton")[0],)

        def differs(reference, result):
            return _selections_differ(reference[0], result[0], xs, w_encs, shape.N, tolerance)

        return Problem(encode, differs)

    with torch.no_grad():
        indices, values = encode_topk(xs, w_encs, pre_biases, latent_biases, shape.k, impl="triton")
    inverse = inverse_index(indices, shape.N)
    if op == "gather":
        # the loss and its gradient in the values: every form of the gather kernel but plain decode
        values = values.detach().requires_grad_()

        def gather():
            loss = decode_nmse(indices, values, w_decs, pre_biases, xs, inverse=inverse, impl="triton")
            return loss.detach(), torch.autograd.grad(loss.sum(), values)[0]

        return Problem(gather, lambda *two: _tensors_differ(*two, tolerance))
    # the decoders' gradients from given gradients of the reconstructions, every source's its own: [S, B, d_t]
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


def _selections_differ(reference, result, xs, w_encs, n, tolerance) -> str:
    """Near ties may be decided otherwise, so what is compared is the pre-activations at the selected latents."""
    if result.shape != reference.shape or bool((result < 0).any() | (result >= n).any()):
        return f"expected latents in 0..{n - 1}"
    ordered = result.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return "a latent is selected twice in a row"
    for first in range(0, len(reference), 256):
        part, chosen = slice(first, first + 256), []
        for indices in (reference[part], result[part]):
            pre = sum(
                torch.einsum("bkd,bd->bk", w[indices].float(), x[part].float()) for w, x in zip(w_encs, xs, strict=True)
            )
            chosen.append(pre.sort(dim=1).values)
        error, scale = float((chosen[0] - chosen[1]).abs().max()), float(chosen[0].abs().max())
        if not error <= tolerance * scale:
            return f"selected pre-activations off by {error:.3g}, of {scale:.3g} at most"
    return ""


# -------------------------------------------------------------------------------------------------------------- search


def candidates(op: str, args: tuple) -> Iterator[dict]:
    """Settings worth trying, all of them accepted by the rules of `launch`; the default first."""
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
    """What a search launches with the settings that are in place, and the candidates.

    The problem runs on meta tensors: nothing is compiled or launched.
    """
    found: list[Launch] = []
    tries, name = [], tuned.device_name()
    with as_on_gpu(arch, allow_tf32(), found, name), _Tracer([]):  # recorded settings of other operators count
        task = problem(op, shape, torch.device("meta"))
        with tuned.observed(op) as wanted:
            task.run()
        default = list(found)
        for fields in candidates(op, next(iter(wanted))):
            found.clear()
            wrong = ""
            try:
                with tuned.trial(op, fields):
                    task.run()
            except ValueError as error:  # accepted for the first launch, not for another
                wrong = _why(error)
            tries.append(Try(fields, tuple(found), wrong))
    return default, tries


def prepare(op: str, shape: Shape, arch: int, seconds: float, tell=_silent) -> list[Try]:
    """The candidates, after their kernels were compiled into Triton's cache, all or what so many seconds allow.

    Those whose kernels do not compile, or take more shared memory than there is, have a reason not to be run.
    """
    default, tries = plan(op, shape, arch)
    every = [*default, *(launch for one in tries if not one.wrong for launch in one.launches)]
    limit = None if seconds == math.inf else seconds
    done = compile_all(every, arch, None, lambda i, n: tell(f"{op}: {i} of {n} kernels compiled"), limit)
    for one in tries:
        for launch in one.launches:
            if launch in done.failed:
                one.wrong = one.wrong or f"{launch.kernel.split(':')[1]}: {done.failed[launch]}"
    return tries


def search(
    op: str, task: Problem, timer: Callable[[Callable], float], tries: list[Try], tell=_silent,
    until: float = math.inf, now: Callable[[], float] = time.monotonic,
) -> Found:  # fmt: skip
    """The fastest settings of one operator whose results agree with the default's.

    Args:
        timer: calls a function as often as it likes, returns milliseconds of one call.
        tries: in their order; those with a reason not to be run are refused without it.
        tell: called with a line on how far it is.
        until: when to end by the clock `now`, in seconds; the second round of the best is within it.
    """
    with tuned.observed(op) as wanted:
        reference = task.run()
    began, slowest = now(), 0.0
    default_ms = timer(task.run)
    keys = list(dict.fromkeys(tuned.key(op, args) for args in wanted))
    found = Found(op, keys, default_ms, default_ms, None, 0, len(tries), [])
    for one in tries:
        slowest, began = max(slowest, now() - began), now()
        if began + 3 * slowest > until:  # one more and the second round
            break
        found.tried += 1
        with tuned.trial(op, one.fields):
            wrong = one.wrong
            try:
                if not wrong and (difference := task.differs(reference, task.run())):
                    wrong = f"{WRONG}: {difference}"
            except Exception as error:  # settings that do not fit: the next one
                wrong = _why(error)
            if wrong:
                found.refused.append((one.fields, wrong))
                continue
            ms = timer(task.run)
        if ms < found.best_ms:
            found.best_ms, found.settings = ms, one.fields
        tell(f"{op}: {found.tried} of {len(tries)} tried, best {found.best_ms:.3f} ms")
    if found.settings is not None:  # once more, one after the other: clocks and neighbours change
        default_ms = timer(task.run)
        with tuned.trial(op, found.settings):
            best_ms = timer(task.run)
        if max(best_ms, found.best_ms) > GAIN * min(default_ms, found.default_ms):
            best_ms, found.settings = default_ms, None
        found.default_ms, found.best_ms = default_ms, best_ms
    return found


def tune(
    shape: Shape, ops, device: torch.device, name: str, timer, tell=_silent, minutes: float = math.inf,
    now: Callable[[], float] = time.monotonic,
) -> list[Found]:  # fmt: skip
    """Search every operator and record the winners; each is in place while the next is searched.

    minutes: for all of it, shared out over the operators that are left; when they are over the others are left out.

    Raises: OSError when the cache cannot be written, before anything is searched.
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
        found = search(op, problem(op, shape, device), timer, tries, tell, began + share, now)
        if found.settings is not None:
            measured = {"ms": found.best_ms, "default_ms": found.default_ms, "shape": shape.record()}
            tuned.write(name, {key: {"settings": found.settings, **measured} for key in found.keys}, about)
        results.append(found)
    return results


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _triton_version() -> str:
    import triton

    return triton.__version__


class GraphTimer:
    """Median milliseconds of a call by events: replays of a CUDA graph of it, so that launching from Python costs
    nothing, with the L2 cache overwritten before each.

    A call that cannot be captured, and all after it, run eagerly, each behind a kernel that keeps the GPU busy until
    the host has launched everything.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]):
        self.device, self.say, self.captures = device, say, True

    @functools.cached_property
    def flush(self) -> torch.Tensor:
        return flush_buffer(self.device)

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def __call__(self, run: Callable) -> float:
        graph = self._capture(run) if self.captures else None
        call = graph.replay if graph else run
        (cover,) = [0.0] if graph else host_ms([call])
        return statistics.median(ms for (ms,) in event_ms([call], 22, self.flush, cover)[2:])

    def _capture(self, run: Callable):
        """A graph of the call, after a call on the stream that captures; None where that fails."""
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
        results = tune(shape, ops, device, name, GraphTimer(device, say), tell, args.minutes)
    except OSError as error:
        return _fail(f"{tuned.cache_dir()} cannot be written ({error}); set SPARC_KERNELS_CACHE to a folder that can")
    tell("")
    for found in results:
        tried = f"{found.tried} of {found.candidates} tried, time limit"
        if found.tried == found.candidates:
            tried = f"{found.tried} tried"
        print(f"{found.op:<8} default {found.default_ms:.3f} ms, best {found.best_ms:.3f} ms; {tried}, "
              f"{len(found.refused)} refused: {found.settings or 'the default stays'}")  # fmt: skip
        for fields, why in found.refused:
            if why.startswith(WRONG):  # worth a report
                print(f"  {why} with {fields}")
    for op in ops[len(results) :]:
        print(f"{op:<8} not searched, time limit")
    print(f"recorded in {tuned.cache_dir() / tuned.slug(name)}.json")
    return 0


def _fail(message: str) -> int:
    print(f"sparc-kernels tune: error: {message}", file=sys.stderr)
    return 2
