"""`sparc-kernels tune`: launch settings for one shape, searched on this machine's GPU and recorded for later launches.

Every candidate's result is compared with that of the default settings before it is timed. What is at least 3 % faster
in two rounds is written to the user's file (`_tuned.py`), where launches find it; no other command ever searches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from . import _tuned
from ._trace import Shape, parse_shape
from .decoder import decode, decode_nmse
from .encode import encode_topk
from .latent_grads import inverse_index

OPS = ("encode", "select", "gather", "reduce")
GAIN = 0.97  # a winner takes at most this part of the default's time
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
    refused: list[tuple[dict, str]]  # candidates that do not run or do not agree, and why


# ------------------------------------------------------------------------------------------------------------ problems


@dataclass
class Problem:
    """One operator at one shape: what to run, and how two results compare."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    differs: Callable[[tuple, tuple], str]  # reference, result -> "" or what is wrong


def _data(shape: Shape, device):
    """Inputs, weights and biases of unit scale, the same for every call."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    xs = [normal(shape.B, d) for d in shape.widths]
    w_encs = [normal(shape.N, d, scale=d**-0.5) for d in shape.widths]
    w_decs = [normal(shape.N, d, scale=d**-0.5).t() for d in shape.widths]
    pre_biases = [torch.zeros(d, device=device, dtype=dtype) for d in shape.widths]
    latent_biases = [torch.zeros(shape.N, device=device, dtype=dtype) for _ in shape.widths]
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
    # the decoders' gradients from given gradients of the reconstructions
    w_decs = [w.detach().requires_grad_() for w in w_decs]
    recons = list(decode(indices, values, w_decs, pre_biases, inverse=inverse, impl="triton").values())
    upstream = [torch.ones_like(r) for r in recons]

    def reduce():
        return torch.autograd.grad(recons, w_decs, upstream, retain_graph=True)

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
    for rows in torch.arange(len(reference)).split(256):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        chosen = []
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
    """Settings worth trying, all of them accepted by the rules of `_launch.py`; the default first."""
    default = asdict(_tuned.TUNABLE[op].default(*args))
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
            config = _tuned.apply(op, args, fields)
        except ValueError:
            continue
        if config not in seen:
            seen.add(config)
            yield fields


def search(op: str, task: Problem, timer: Callable[[Callable], float], tries=None, progress=None) -> Found:
    """The fastest settings of one operator whose results agree with the default's.

    Args:
        timer: calls a function as often as it likes, returns milliseconds of one call.
        tries: settings to try instead of `candidates`.
    """
    with _tuned.observed(op) as wanted:
        reference = task.run()
    default_ms = timer(task.run)
    keys = list(dict.fromkeys(_tuned.key(op, args) for args in wanted))
    found = Found(op, keys, default_ms, default_ms, None, 0, [])
    for fields in list(candidates(op, next(iter(wanted)))) if tries is None else tries:
        found.tried += 1
        with _tuned.trial(op, fields):
            try:
                wrong = task.differs(reference, task.run())
            except Exception as error:  # settings that do not compile or do not fit: the next one
                wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if wrong:
                found.refused.append((fields, wrong))
                continue
            ms = timer(task.run)
        if ms < found.best_ms:
            found.best_ms, found.settings = ms, fields
        if progress:
            progress(found)
    if found.settings is not None:  # once more, one after the other: clocks and neighbours change
        default_ms = timer(task.run)
        with _tuned.trial(op, found.settings):
            best_ms = timer(task.run)
        if max(best_ms, found.best_ms) > GAIN * min(default_ms, found.default_ms):
            best_ms, found.settings = default_ms, None
        found.default_ms, found.best_ms = default_ms, best_ms
    return found


def tune(shape: Shape, ops, device: torch.device, name: str, timer, progress=None) -> list[Found]:
    """Search every operator and record the winners; each is in place while the next is searched.

    Raises: OSError when the cache cannot be written, before anything is searched.
    """
    about = {"torch": torch.__version__, "triton": _triton_version()}
    _tuned.write(name, {}, about)
    results = []
    for op in ops:
        found = search(op, problem(op, shape, device), timer, progress=progress)
        if found.settings is not None:
            measured = {"ms": found.best_ms, "default_ms": found.default_ms, "shape": asdict(shape)}
            _tuned.write(name, {key: {"settings": found.settings, **measured} for key in found.keys}, about)
        results.append(found)
    return results


def _triton_version() -> str:
    import triton

    return triton.__version__


def _gpu_timer(run: Callable) -> float:
    """Median milliseconds of a call by events, after a warm-up, with the L2 cache overwritten before each."""
    run()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(20):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


# ------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", required=True, metavar="B,N,k,d,S[,DTYPE]",
        help="rows, latents, active latents, width of a stream, streams; DTYPE bfloat16 (default), float16 or float32",
    )  # fmt: skip
    parser.add_argument("--op", action="append", choices=OPS, help="search this one only; repeatable (default: all)")


def run(args: argparse.Namespace) -> int:
    try:
        shape = parse_shape(args.shape)
    except ValueError as error:
        return _fail(str(error))
    from ._triton import HAS_TRITON, INTERPRETED

    if not torch.cuda.is_available():
        return _fail("needs a GPU, and torch finds none here")
    if not HAS_TRITON or INTERPRETED:
        return _fail("needs compiled Triton kernels (install triton, unset TRITON_INTERPRET)")
    name = torch.cuda.get_device_name()

    def progress(found):
        if sys.stderr.isatty():
            print(
                f"\r{found.op}: {found.tried} tried, best {found.best_ms:.3f} ms", end="", file=sys.stderr, flush=True
            )

    print(f"{name}, {shape}")
    try:
        results = tune(shape, args.op or OPS, torch.device("cuda"), name, _gpu_timer, progress)
    except OSError as error:
        return _fail(f"{_tuned.cache_dir()} cannot be written ({error}); set SPARC_KERNELS_CACHE to a folder that can")
    for found in results:
        print(f"{found.op:<8} default {found.default_ms:.3f} ms, best {found.best_ms:.3f} ms of {found.tried} tried, "
              f"{len(found.refused)} refused: {found.settings or 'the default stays'}")  # fmt: skip
        wrong = [(fields, why) for fields, why in found.refused if "off by" in why or "select" in why]
        for fields, why in wrong:  # not a matter of resources: worth a report
            print(f"  WRONG RESULT with {fields}: {why}")
    print(f"recorded in {_tuned.cache_dir() / _tuned.slug(name)}.json")
    return 0


def _fail(message: str) -> int:
    print(f"sparc-kernels tune: error: {message}", file=sys.stderr)
    return 2
