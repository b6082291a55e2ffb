"""Whether a provider computes what it should, before anything of it is timed.

The truth is `sparc_kernels.reference` in float64. A provider may be off by twice what plain PyTorch is off in the same
precision, plus FLOOR; every quantity is judged by itself. What does not fit in time or memory in float64 is verified at
a twin of the same widths, k and streams with fewer latents or rows, and the row says so.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import torch

from sparc_kernels import reference
from sparc_kernels.tools import cost

from .cases import DEAD_THRESHOLD, PRECISIONS, Problem

Tensor = torch.Tensor
# what is forgiven where PyTorch's own error happens to be tiny: some roundings of the precision
FLOOR = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 4e-3, "float16": 1e-3, "bfloat16 autocast": 4e-3}
FLOPS = {"cpu": 1e12, "cuda": 3e14}  # of the float64 truth: about 15 s on two cores, 5 to 10 s on an H100
CHUNK = {"cpu": 2**30, "cuda": 2**33}  # bytes of [rows, N] tensors in float64 that the truth holds at once


@dataclass
class Verdict:
    verified: bool
    errors: dict[str, float]  # relative to the truth
    allowed: dict[str, float]
    torch_errors: dict[str, float]
    at: dict | None = None  # the twin, where the shape itself was too large

    @property
    def reason(self) -> str | None:
        wrong = [
            f"{name}: error {error:.2g}, allowed {self.allowed[name]:.2g}"
            for name, error in self.errors.items()
            if not error <= self.allowed[name]
        ]
        return "wrong result, not timed; " + "; ".join(wrong) if wrong else None

    def as_dict(self) -> dict:
        return {
            "errors": self.errors, "allowed": self.allowed, "torch_errors": self.torch_errors, "at": self.at,
            "against": "sparc_kernels.reference in float64",
        }  # fmt: skip


def judge(errors: dict[str, float], torch_errors: dict[str, float], dtype: str, at: dict | None) -> Verdict:
    allowed = {name: 2 * torch_errors[name] + FLOOR[dtype] for name in errors}
    return Verdict(all(e <= allowed[name] for name, e in errors.items()), errors, allowed, torch_errors, at)


def twin(s: cost.Shape, device: torch.device) -> cost.Shape:
    """The shape itself, or the largest smaller one whose float64 truth fits; latents go first."""
    limit = FLOPS[device.type]
    memory = torch.cuda.mem_get_info(device)[1] / 4 if device.type == "cuda" else 4e9

    def fits(s: cost.Shape) -> bool:
        return limit >= 2 * s.B * s.N * s.D * (3 + 3 * s.S) and memory >= 2 * 8 * s.N * s.D

    least = max(8 * s.k, 4096)
    while not fits(s):
        if least <= s.N // 2:
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
    """float32 products and autocast as a row's precision says."""
    _, matmul, autocast, _ = PRECISIONS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Truth:
    """What a problem's loss, gradients and selection are in float64, and how far plain PyTorch is from them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._known: dict = {}

    def remember(self, key, make):
        """What make() returned when this was first asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def training(self, dtype: str, found: dict) -> tuple[dict[str, float], dict[str, float]]:
        """(errors, PyTorch's errors) of {"loss": scalar, "w_enc": [per stream], ...}."""
        return distances(found, self.exact()), self.plain(dtype)

    def exact(self) -> dict:
        """Loss and gradients in float64."""
        return self.remember("training", lambda: self._step(torch.float64, "float32"))

    def plain(self, dtype: str) -> dict[str, float]:
        """PyTorch's errors in that precision."""
        return self.remember(
            ("training", dtype), lambda: distances(self._step(PRECISIONS[dtype][0], dtype), self.exact())
        )

    def selection(self, dtype: str, indices: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Judged by the float64 pre-activations of what was selected, so that ties are no fault; twice the same latent
        in a row is one."""
        plain = self.remember(("selection", dtype), lambda: self._selected(self._select(dtype)))
        return self._selected(indices), plain

    def _rows_at_once(self, tensors: int) -> int:
        """Rows of which that many [rows, N] tensors may be held."""
        return max(1, CHUNK[self.problem.device.type] // (8 * self.problem.case.shape.N * tensors))

    @torch.no_grad()
    def _select(self, dtype: str) -> Tensor:
        """int64 [B, k] as plain PyTorch selects in that precision."""
        s, t = self.problem.case.shape, self.problem.tensors
        groups = [[x.to(PRECISIONS[dtype][0]) for x in group] for group in (t.w_encs, t.pre_biases, t.latent_biases)]
        xs = [x.to(PRECISIONS[dtype][0]) for x in t.xs]
        rows = self._rows_at_once(s.S + 1)
        parts = []
        with precision(dtype, self.problem.device):
            for start in range(0, s.B, rows):
                part = [x[start : start + rows] for x in xs]
                hs = [reference.preactivations(*args) for args in zip(part, *groups, strict=True)]
                parts.append(sum(hs[1:], hs[0]).topk(s.k).indices)
        return torch.cat(parts)

    @torch.no_grad()
    def _selected(self, indices: Tensor) -> dict[str, float]:
        s, t = self.problem.case.shape, self.problem.tensors
        rows = self._rows_at_once(s.S + 1)
        above = below = 0.0
        if indices.shape != (s.B, s.k) or int(indices.min()) < 0 or int(indices.max()) >= s.N:
            return {"selected": math.inf}
        ordered = indices.sort(1).values
        if s.k > 1 and bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            return {"selected": math.inf}
        for start in range(0, s.B, rows):
            part = slice(start, start + rows)
            h = None
            for x, w, b, c in zip(t.xs, t.w_encs, t.pre_biases, t.latent_biases, strict=True):
                one = reference.preactivations(x[part].double(), w.double(), b.double(), c.double())
                h = one if h is None else h + one
            best = h.topk(s.k).values
            got = h.gather(1, indices[part]).sort(1, descending=True).values
            above += float((got - best).square().sum())
            below += float(best.square().sum())
        return {"selected": math.sqrt(above / below) if below else math.sqrt(above)}

    def _step(self, dtype: torch.dtype, mode: str) -> dict:
        """Loss and gradients of plain PyTorch, rows by chunks: the loss is a mean over rows. Gradients add up in the
        leaves' dtype; these are float32 at least, and what is computed with is cast from them."""
        p, s = self.problem, self.problem.case.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [[t.to(wide).detach().requires_grad_() for t in group] for group in p.tensors[1:5]]
        rows = self._rows_at_once(s.S * (s.S + 4))  # logits and their gradients; codes of every pair
        dead = self._dead(rows) if s.auxk else None
        loss = 0.0
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
    def _dead(self, rows: int) -> list[Tensor]:
        """The masks that AuxK reads: after this batch has moved the counters."""
        p, t, s = self.problem, self.problem.tensors, self.problem.case.shape
        fired = [torch.zeros(s.N, dtype=torch.bool, device=p.device) for _ in t.xs]
        for start in range(0, s.B, rows):
            hs = [
                reference.preactivations(x[start : start + rows].double(), w.double(), b.double(), c.double())
                for x, w, b, c in zip(t.xs, t.w_encs, t.pre_biases, t.latent_biases, strict=True)
            ]
            chosen = sum(hs[1:], hs[0]).topk(s.k).indices
            for mask, h in zip(fired, hs, strict=True):
                mask[chosen[h.gather(1, chosen) > 1e-3]] = True
        return [(p.counters + 1 > DEAD_THRESHOLD) & ~mask for mask in fired]


@torch.no_grad()
def distances(found: dict, exact: dict) -> dict[str, float]:
    """|found - exact| / |exact|: of the loss, and of all streams' gradients of one kind together."""
    errors = {}
    for name, want in exact.items():
        if want is None or name not in found:
            continue
        got = found[name]
        if name == "loss":
            errors[name] = abs(float(got) - want) / abs(want)
            continue
        above = below = 0.0
        for g, w in zip(got, want, strict=True):
            if g is None or g.shape != w.shape:
                above = math.inf
                continue
            for part, truth in zip(_rows(g), _rows(w), strict=True):  # never a float64 copy of a whole matrix
                above += float((part.double() - truth.double()).square().sum())
                below += float(truth.double().square().sum())
        errors[name] = math.sqrt(above / below) if below else math.sqrt(above)
    return {name: error if error == error else math.inf for name, error in errors.items()}


def _rows(t: Tensor):
    return (t.t() if t.dim() == 2 and t.shape[0] < t.shape[1] else t).split(16384)
