"""A provider: one way to compute one operation, how its result is verified, and the jobs that most providers build.

Operations: `training` (forward and loss, backward, the optimizer with unit norm and projection), `encode` (selection
and values), `select` (ids alone), `decode` (losses of all reconstructions), `optimizer`, `ceiling` (the
device's limit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sparc_kernels import reference
from sparc_kernels.tools import cost

from .cases import PRECISIONS, Case, Problem, groups
from .timing import Job
from .verification import Truth, distances, library_topk, precision

Tensor = torch.Tensor
SLOW = 30.0  # seconds of setup from which a provider is timed in a group of its own, later
Errors = tuple[dict[str, float], dict[str, float]]  # a provider's and PyTorch's own, by tensor


@dataclass(frozen=True)
class Context:
    """Where a run takes place; `official` is a clone of the official repository."""

    device: torch.device
    official: Path | None = None
    quick: bool = False


def needs_cuda(context: Context) -> str | None:
    return None if context.device.type == "cuda" else "needs a CUDA device"


@dataclass(frozen=True)
class Provider:
    name: str
    op: str
    what: str
    build: Callable[[Context, Problem, str], Job]  # of one precision
    check: Callable[[Truth, str, object], Errors] | None  # None: nothing to verify
    dtypes: tuple[str, ...] = tuple(PRECISIONS)
    absent: Callable[[Context], str | None] = lambda context: None  # the reason why it cannot run here
    fits: Callable[[Case], str | None] = lambda case: None  # the reason why it cannot compute this shape
    # bytes and FLOPs without the optimizer, and of what follows the backward in a step
    model: Callable[[cost.Shape], cost.Op | None] | None = None
    after: Callable[[cost.Shape], list[cost.Op]] = lambda s: [cost.unit_norm(s), cost.adam(s)]
    ops: Callable[[cost.Shape], dict[str, cost.Op]] | None = None  # of its profile; None: not profiled
    graph: bool = False
    setup_s: float = 1.0  # before it can be timed, compilation included: on a GPU, at a large shape

    @property
    def slow(self) -> bool:
        return self.setup_s >= SLOW


# ---------------------------------------------------------------------------------------------------------------- jobs


def training_job(problem: Problem, model, dtype: str, loss: Callable[[], Tensor], finish: Callable) -> Job:
    """The phases of a training step.

    Args:
        problem: that the model trains on.
        model: an AlignedSAE or the official class.
        dtype: one of PRECISIONS.
        loss: the forward and the loss.
        finish: the optimizer's phase.
    """
    held: dict = {}

    def forward():
        with precision(dtype, problem.device):
            held["loss"] = loss()

    def backward():
        with precision(dtype, problem.device):
            held["loss"].backward()

    def reset():
        held.clear()
        problem.reset(model)
        model.zero_grad()

    def result():
        return {"loss": held["loss"].detach(), **{n: [p.grad for p in ps] for n, ps in groups(model).items()}}

    phases = {"forward": forward, "backward": backward, "optimizer": finish}
    return Job(phases, reset, result, queued=False, gradient_bytes=size_of(model.parameters()))


def forward_job(problem: Problem, dtype: str, run: Callable, result: Callable = lambda out: out) -> Job:
    """A forward alone; `result` takes from its output what verification compares."""
    held: dict = {}

    def forward():
        with torch.no_grad(), precision(dtype, problem.device):
            held["out"] = run()

    return Job({"forward": forward}, held.clear, lambda: result(held["out"]))


def decode_job(problem: Problem, dtype: str, losses: Callable[..., Tensor]) -> Job:
    """Mean of all [S, S] losses, and its gradients in values, decoder weights and biases."""
    ids, values, weights, biases, xs = decode_operands(problem, dtype)
    leaves, held = [values, *weights, *biases], {}

    def forward():
        with precision(dtype, problem.device):
            held["loss"] = losses(ids, values, weights, biases, xs).mean()

    def reset():
        held.clear()
        for p in leaves:
            p.grad = None

    def result():
        grads = {"values": [values], "w_dec": weights, "pre_bias": biases}
        return {"loss": held["loss"].detach(), **{name: [p.grad for p in ps] for name, ps in grads.items()}}

    phases = {"forward": forward, "backward": lambda: held["loss"].backward()}
    return Job(phases, reset, result, gradient_bytes=size_of(leaves))


def torch_adam(model) -> torch.optim.Adam:
    """Torch's, fused."""
    return torch.optim.Adam(model.parameters(), 0.0, fused=True)


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------------------------------------------------------ operands


def encode_operands(problem: Problem, dtype: str) -> list[list[Tensor]]:
    """xs, w_encs, pre_biases and latent_biases in a precision."""
    t = problem.tensors
    return [[x.to(PRECISIONS[dtype][0]) for x in g] for g in (t.xs, t.w_encs, t.pre_biases, t.latent_biases)]


def wide_gemm(problem: Problem, dtype: str) -> Callable[[], Tensor]:
    """One library GEMM over all streams side by side, with the biases: [B, N], in a buffer that is reused."""
    xs, w_encs, pre_biases, latent_biases = encode_operands(problem, dtype)
    x = torch.cat([x - b for x, b in zip(xs, pre_biases, strict=True)], 1)
    w, bias = torch.cat(w_encs, 1), torch.stack(latent_biases).float().sum(0).to(x.dtype)
    out = x.new_empty(x.shape[0], w.shape[0])
    return lambda: torch.addmm(bias, x, w.T, out=out)


def decode_operands(problem: Problem, dtype: str):
    """The float64 selection's ids and values, and the decoder's side of the model, as leaves."""
    kind, t = PRECISIONS[dtype][0], problem.tensors
    ids, values = float64_selection(problem)
    weights = [w.t().to(kind).t().detach().requires_grad_() for w in t.w_decs]
    biases = [b.to(kind).detach().requires_grad_() for b in t.pre_biases]
    return ids, values.float().requires_grad_(), weights, biases, problem.xs(kind)


@torch.no_grad()
def float64_selection(problem: Problem) -> tuple[Tensor, Tensor]:
    """int64 [B, k] and float64 [S, B, k], by chunks of rows."""
    parts = []
    for _, hs in problem.preactivations(torch.float64):
        with library_topk():
            ids = reference.select(hs, problem.case.shape.k)
        parts.append((ids, torch.stack([h.gather(1, ids).relu() for h in hs])))
    return torch.cat([ids for ids, _ in parts]), torch.cat([values for _, values in parts], 1)


# -------------------------------------------------------------------------------------------------------------- checks


def check_training(truth: Truth, dtype: str, result: dict) -> Errors:
    return distances(result, truth.exact()), truth.plain(dtype)


def check_selection(truth: Truth, dtype: str, ids: Tensor) -> Errors:
    return truth.selection(dtype, ids)


def check_direct(truth: Truth, dtype: str, result: dict) -> Errors:
    """As `check_training`; decoders' moments hold their gradient without its part along each row."""
    exact, along = truth.exact(), []
    for trio in zip(result["w_dec"], truth.problem.tensors.w_decs, exact["w_dec"], strict=True):
        parts = []
        for got, w, g in zip(*(t.t().split(16384) for t in trio), strict=True):  # no float64 copy of a whole matrix
            w = reference.unit_norm_decoder(w.to(g.dtype).t()).t()
            parts.append(got + ((w * g).sum(1, keepdim=True) * w).to(got.dtype))
        along.append(torch.cat(parts).t())
    return check_training(truth, dtype, {**result, "w_dec": along})


def check_decode(truth: Truth, dtype: str, result: dict) -> Errors:
    def of(kind: torch.dtype, mode: str) -> dict:
        ids, values, weights, biases, xs = decode_operands(truth.problem, mode)
        # every provider takes float32 values; they are computed with in `kind`, gradients in float32 at least
        wide = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [[t.detach().to(wide).requires_grad_() for t in group] for group in ([values], weights, biases)]
        with precision(mode, truth.problem.device):
            (cast,), weights, biases = ([t.to(kind) for t in group] for group in leaves)
            loss = reference.decode_nmse(ids, cast, weights, biases, [x.to(kind) for x in xs]).mean()
        loss.backward()
        grads = ([t.grad for t in group] for group in leaves)
        return {"loss": float(loss.detach()), **dict(zip(("values", "w_dec", "pre_bias"), grads, strict=True))}

    exact = truth.remember("decode", lambda: of(torch.float64, "float32"))
    plain = truth.remember(("decode", dtype), lambda: distances(of(PRECISIONS[dtype][0], dtype), exact))
    return distances(result, exact), plain
