"""Whether a provider computes what it should, before anything of it is timed.

The truth is `sparc_kernels.reference` in float64. Each quantity may have twice the error of plain PyTorch in the same
precision, plus FLOOR. A shape that does not fit in time or memory in float64 is verified at a twin of the same widths,
k and streams with fewer latents or rows, and the row says so.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, replace

import torch

from sparc_kernels import reference
from sparc_kernels.tools import cost
from sparc_kernels.tools.verify.judge import limit

from .cases import PRECISIONS, Problem

Tensor = torch.Tensor
# allowed beside PyTorch's own error, which may happen to be tiny: some roundings of the precision
FLOOR = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 4e-3, "float16": 1e-3, "bfloat16 autocast": 4e-3}
FLOPS = {"cpu": 1e12, "cuda": 3e14}  # of the float64 truth: about 15 s on two cores, 5 to 10 s on an H100


@dataclass
class Verdict:
    errors: dict[str, float]  # relative to the truth
    allowed: dict[str, float]
    torch_errors: dict[str, float]
    at: dict | None = None  # the twin, where the shape itself was too large
    against: str = "sparc_kernels.reference in float64"

    @property
    def wrong(self) -> list[str]:
        return [name for name, error in self.errors.items() if not error <= self.allowed[name]]

    @property
    def verified(self) -> bool:
        return not self.wrong

    @property
    def reason(self) -> str | None:
        said = [f"{name}: error {self.errors[name]:.2g}, allowed {self.allowed[name]:.2g}" for name in self.wrong]
        return "wrong result, not timed; " + "; ".join(said) if said else None

    def as_dict(self) -> dict:
        return asdict(self)


def judge(errors: dict[str, float], torch_errors: dict[str, float], dtype: str, at: dict | None = None) -> Verdict:
    return Verdict(errors, {name: limit(torch_errors[name], FLOOR[dtype]) for name in errors}, torch_errors, at)


def twin(s: cost.Shape, device: torch.device) -> cost.Shape:
    """The shape itself, or the largest smaller one whose float64 truth fits; latents go first."""
    memory = torch.cuda.mem_get_info(device)[1] / 4 if device.type == "cuda" else 4e9

    def fits(s: cost.Shape) -> bool:
        return FLOPS[device.type] >= 2 * s.B * s.N * s.D * (3 + 3 * s.S) and memory >= 2 * 8 * s.N * s.D

    while not fits(s):
        if max(8 * s.k, 4096) <= s.N // 2:
            s = replace(s, N=s.N // 2, dead=s.dead // 2)
        elif s.B >= 32:
            s = replace(s, B=s.B // 2)
        else:
            break
    return s


@contextlib.contextmanager
def library_topk():
    """The reference with torch.topk, as the official code selects, in place of the stable sort that defines ties."""
    before = reference.topk_indices
    reference.topk_indices = _library_topk
    try:
        yield
    finally:
        reference.topk_indices = before


def _library_topk(h: Tensor, k: int) -> Tensor:
    return h.topk(k, dim=-1).indices


@contextlib.contextmanager
def precision(name: str, device: torch.device):
    """float32 products and autocast as in one of PRECISIONS."""
    _, matmul, autocast, _ = PRECISIONS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Truth:
    """Loss, gradients and selection of a problem in float64, and the errors of plain PyTorch against them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._known: dict = {}

    def remember(self, key, make):
        """make(), once for each key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def exact(self) -> dict:
        """Loss and gradients in float64."""
        return self.remember("training", lambda: self._step(torch.float64, "float32"))

    def plain(self, dtype: str) -> dict[str, float]:
        """PyTorch's errors in that precision."""

        def errors():
            return distances(self._step(PRECISIONS[dtype][0], dtype), self.exact())

        return self.remember(("training", dtype), errors)

    def selection(self, dtype: str, ids: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Errors of selected ids [B, k] and of PyTorch's, by the float64 pre-activations of what was selected: ties are
        no fault, the same latent twice in a row is one."""
        return self._selected(ids), self.remember(("selection", dtype), lambda: self._selected(self._select(dtype)))

    @torch.no_grad()
    def _select(self, dtype: str) -> Tensor:
        """int64 [B, k] as plain PyTorch selects in that precision."""
        with precision(dtype, self.problem.device):
            chunks = [sum(hs[1:], hs[0]) for _, hs in self.problem.preactivations(PRECISIONS[dtype][0])]
            return torch.cat([h.topk(self.problem.case.shape.k).indices for h in chunks])

    @torch.no_grad()
    def _selected(self, ids: Tensor) -> dict[str, float]:
        s, above, below = self.problem.case.shape, 0.0, 0.0
        if ids.shape != (s.B, s.k) or int(ids.min()) < 0 or int(ids.max()) >= s.N:
            return {"selected": math.inf}
        if bool((ids.sort(1).values.diff(dim=1) == 0).any()):
            return {"selected": math.inf}
        for part, hs in self.problem.preactivations(torch.float64):
            h = sum(hs[1:], hs[0])
            best = h.topk(s.k).values
            above += float((h.gather(1, ids[part]).sort(1, descending=True).values - best).square().sum())
            below += float(best.square().sum())
        return {"selected": _relative(above, below)}

    def _step(self, dtype: torch.dtype, mode: str) -> dict:
        """Loss and gradients of plain PyTorch, by chunks of rows: the loss is a mean over rows. Gradients add up in
        float32 at least; the operands are cast from such leaves."""
        p, s = self.problem, self.problem.case.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [[t.to(wide).detach().requires_grad_() for t in group] for group in p.tensors[1:5]]
        rows = p.rows_at_once(s.S * (s.S + 4))  # logits and their gradients; codes of every pair
        dead, loss = p.dead, 0.0
        for start in range(0, s.B, rows):
            xs = [x[start : start + rows].to(dtype) for x in p.tensors.xs]
            with precision(mode, p.device), library_topk():
                params = [[t.to(dtype) for t in group] for group in leaves]
                part = reference.training_loss(xs, *params, s.k, auxk_k=s.auxk or None, dead=dead)
                part = part * (xs[0].shape[0] / s.B)
            part.backward()
            loss += float(part.detach())
        names = ("w_enc", "w_dec", "pre_bias", "latent_bias")
        return {"loss": loss, **{n: [t.grad for t in group] for n, group in zip(names, leaves, strict=True)}}


@torch.no_grad()
def distances(result: dict, exact: dict) -> dict[str, float]:
    """|result - exact| / |exact|: of the loss, and of all streams' gradients of one kind together."""
    errors = {}
    for name in exact.keys() & result.keys():
        if name == "loss":
            errors[name] = abs(float(result[name]) - exact[name]) / abs(exact[name])
            continue
        above = below = 0.0
        for got, want in zip(result[name], exact[name], strict=True):
            if got is None or got.shape != want.shape:
                above = math.inf
                continue
            for part, truth in zip(_rows(got), _rows(want), strict=True):  # no float64 copy of a whole matrix
                above += float((part.double() - truth.double()).square().sum())
                below += float(truth.double().square().sum())
        errors[name] = _relative(above, below)
    return {name: math.inf if math.isnan(errors[name]) else errors[name] for name in exact if name in errors}


def _relative(above: float, below: float) -> float:
    return math.sqrt(above / below) if below else math.sqrt(above)


def _rows(t: Tensor):
    return (t.t() if t.dim() == 2 and t.shape[0] < t.shape[1] else t).split(16384)
