"""Criteria of `sparc-kernels verify`; its data are in `problems.py`.

- A tensor: its error against `reference.py` in float64, computed from the same rounded inputs, may be at most twice the
  error that `reference.py` itself makes in that dtype, plus a few units of rounding (`allowance`). Maximum error is
  taken relative to the largest magnitude of the true tensor, RMS error relative to its RMS.
- A selection: by value, never by index, because near ties make correct kernels differ. The true value of a latent left
  out may exceed that of one taken by no more than both logits' rounding (`logit_error`).
- Integer-valued problems have no rounding: the selection must equal the stable sort's, index for index.
- Gradients are compared with the selection held fixed. The derivative of relu jumps at 0, where rounding may decide
  the side, so the data avoid 0: see `margin_problem`, and the cotangents of `judge_values_at`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...core.numerics import acc_dtype
from ...core.registry import resolve_impl

if TYPE_CHECKING:
    from .problems import Problem

Tensor = torch.Tensor
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHORT = {F64: "fp64", F32: "fp32", BF16: "bf16", F16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One shape, with the checks and dtypes that run on it."""

    name: str
    B: int
    N: int
    k: int
    dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ops: str  # words of CHECKS
    quick: bool = False  # part of --quick
    hot: bool = False  # one latent is active on every row
    strided: bool = False  # no input is contiguous
    gib: float = 0.0  # free GPU memory needed
    threads: bool = False  # on a CPU: all threads instead of one

    @property
    def auxk(self) -> int:
        """AuxK's k."""
        return max(2, min(self.k, self.N // 8))

    @property
    def shape(self) -> str:
        """Sizes as text."""
        return f"B{self.B} N{self.N} k{self.k} S{len(self.dims)}"


@dataclass
class Result:
    """Result for one tensor, selection or exact comparison. Errors and limits are relative; None: not measured."""

    op: str
    tensor: str
    dtype: str
    case: str
    shape: str
    verdict: str = "ok"  # "ok", "FAIL" or "skip"
    max_error: float | None = None
    rms_error: float | None = None
    torch_max: float | None = None  # PyTorch's own error: the dense reference computed in this dtype
    torch_rms: float | None = None
    max_limit: float | None = None
    rms_limit: float | None = None
    note: str = ""
    seconds: float = 0.0  # of the whole check

    @property
    def passed(self) -> bool:
        """True unless it failed; skipped ones pass."""
        return self.verdict != "FAIL"

    @property
    def share(self) -> float:
        """Error over its limit, the larger of maximum and RMS; inf if it failed."""
        if not self.passed:
            return math.inf
        pairs = ((self.max_error, self.max_limit), (self.rms_error, self.rms_limit))
        return max((error / limit for error, limit in pairs if error and limit), default=-1.0 if self.note else 0.0)


MULTIPLE = 2  # of PyTorch's own error
UNITS = 2  # roundings of the dtype, half an ulp each, for the maximum; half as many for the RMS


def allowance(check: Check) -> float:
    """Return the error allowed beside a multiple of PyTorch's own: units of rounding, and the accumulator's share.

    A sequential sum of n terms is a random walk of sqrt(n) roundings of the accumulator; the dense reference, which
    sums in blocks, has fewer.
    """
    c = check.case
    n = max(*c.dims, c.k, len(c.dims) * c.B, min(c.N, c.B * c.k))  # longest sum: dot, latent's list, W_enc^T dc
    acc = torch.finfo(acc_dtype(check.dtype)).eps / 2
    slack = UNITS * torch.finfo(check.dtype).eps / 2 + acc * math.sqrt(n)
    if check.kernels and check.device.type == "cuda" and check.dtype == F32:
        # tf32x3 drops the product of both low parts; tensor cores truncate the sum after every 8 products (modelled)
        slack += 2**-22 + max(*c.dims, c.k) / 8 * 2**-24
    return slack


def limit(own: float, slack: float) -> float:
    """Return the largest error that passes.

    Args:
        own: PyTorch's own error; counted `MULTIPLE` times if finite.
        slack: added, see `allowance`.
    """
    return slack + MULTIPLE * own if math.isfinite(own) else slack


def errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return maximum error over largest magnitude, and RMS error over RMS.

    Args:
        value: to judge.
        truth: of the same shape.

    Returns:
        Both inf if shapes differ, or if inf or NaN are at other entries.
    """
    if value.shape != truth.shape:
        return math.inf, math.inf
    if truth.numel() == 0:
        return 0.0, 0.0
    value = value.detach().to(truth.dtype)
    finite = truth.isfinite()
    if not torch.equal(value.isfinite(), finite) or not torch.equal(value.isnan(), truth.isnan()):
        return math.inf, math.inf
    truth = torch.where(finite, truth, 0.0)
    error = torch.where(finite, value - truth, 0.0)
    largest, rms = truth.abs().max().item(), truth.square().mean().sqrt().item()
    return error.abs().max().item() / (largest or 1.0), error.square().mean().sqrt().item() / (rms or 1.0)


class Check:
    """One operator on one case in one dtype: its data and its results.

    Args:
        op: name of the check.
        case: shape.
        dtype: of the operator's inputs.
        device: that runs it.
        impl: "auto", "triton" or "torch".
        problems: cache of data, shared by the checks of a case.
    """

    def __init__(self, op: str, case: Case, dtype: torch.dtype, device: torch.device, impl: str, *, problems: dict):
        self.op, self.case, self.dtype, self.device, self.impl = op, case, dtype, device, impl
        self.problems = problems
        self.generator = self.seeded(f"{op} {case.name}")
        self.results: list[Result] = []
        resolved = resolve_impl(impl, torch.empty(0, dtype=dtype, device=device))
        self.kernels = resolved == "triton"
        self.resolved = resolved
        self.interpreted = self.kernels and device.type == "cpu"
        # in float64 the reference is the truth itself: PyTorch's own error is measured in float32 and scaled
        self.own_dtype = F32 if dtype == F64 else dtype
        self.own_scale = 2.0**-29 if dtype == F64 else 1.0

    def seeded(self, text: str) -> torch.Generator:
        """Return a generator on the device, seeded by a text."""
        return torch.Generator(self.device).manual_seed(zlib.crc32(text.encode()))

    def problem(self, kind: Callable[[Check], Problem]) -> Problem:
        """Return the data of this case, made once and shared by its checks.

        Args:
            kind: function that makes them, such as `generic`.
        """
        if kind not in self.problems:
            self.problems[kind] = kind(self)
        return self.problems[kind]

    def own(self, problem: Problem) -> Problem:
        """Return the problem in the dtype in which plain PyTorch's own error is measured."""
        return problem if problem.xs[0].dtype == self.own_dtype else problem.to(self.own_dtype)

    def selection_judge(self) -> SelectionJudge:
        """Return a new judge of selections among the case's latents."""
        return SelectionJudge(self.case.N)

    def add(self, tensor: str, passed: bool, note: str = "", **figures) -> None:
        """Add a result.

        Args:
            tensor: name of what was judged.
            passed: whether it passed.
            note: reason or remark.
            figures: further fields of Result.
        """
        verdict = "ok" if passed else "FAIL"
        names = {"dtype": SHORT[self.dtype], "case": self.case.name, "shape": self.case.shape}
        self.results.append(Result(self.op, tensor, **names, verdict=verdict, note=note, **figures))

    def compare(self, tensor: str, ours: Tensor, truth: Tensor, own: Tensor, note: str = "") -> None:
        """Judge a tensor by its maximum and RMS error.

        Args:
            tensor: its name.
            ours: the operator's result.
            truth: from the reference in float64.
            own: from plain PyTorch in `own_dtype`.
            note: of the result if it passes.
        """
        max_error, rms_error = errors(ours, truth)
        torch_max, torch_rms = (x * self.own_scale for x in errors(own, truth))
        slack = allowance(self)
        max_limit, rms_limit = limit(torch_max, slack), limit(torch_rms, slack / 2)
        passed = max_error <= max_limit and rms_error <= rms_limit
        if not passed and math.isinf(max_error):
            note = f"{describe(ours)}, expected {describe(truth)}"
        elif not passed:
            note = f"error {max_error:.1e} of at most {max_limit:.1e}, RMS {rms_error:.1e} of at most {rms_limit:.1e}"
        self.add(
            tensor, passed, note, max_error=max_error, rms_error=rms_error, torch_max=torch_max, torch_rms=torch_rms,
            max_limit=max_limit, rms_limit=rms_limit,
        )  # fmt: skip

    def exact(self, tensor: str, ours: Tensor, expected: Tensor) -> None:
        """Judge a tensor that must be equal in every entry; NaN equals NaN, dtypes may differ.

        Args:
            tensor: its name.
            ours: the operator's result.
            expected: the same, by other means.
        """
        if ours.shape != expected.shape:
            self.add(tensor, False, f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
            return
        ours = ours.detach().to(expected.dtype)
        differ = (ours != expected) & ~((ours != ours) & (expected != expected))
        count, note = int(differ.sum()), "exact"
        if count:
            at = tuple(differ.nonzero()[0].tolist())
            got, want = ours[at].item(), expected[at].item()
            note = f"{count} of {differ.numel()} entries differ, first {list(at)}: {got}, expected {want}"
        self.add(tensor, count == 0, note)


def describe(x: Tensor) -> str:
    """Format the shape and the numbers of NaN and inf."""
    return f"shape {tuple(x.shape)} with {int(x.isnan().sum())} NaN, {int(x.isinf().sum())} inf"


def logit_error(check: Check, p64: Problem, s: int, h: Tensor, selecting: bool = False) -> Tensor:
    """Bound the rounding error of each pre-activation of one stream.

    Storage: a unit of the largest intermediate, |h| + |c|. Centring: x - b is rounded in the dtype, independently for
    every column, so by the random walk sqrt(sum (x_d w_d)^2), 4 units of it. Accumulation: a random walk in fp32.

    Args:
        check: gives dtype, device and implementation.
        p64: the problem in float64.
        s: stream.
        h: its pre-activations in float64, [B, N].
        selecting: for the product that selection uses, which follows torch.get_float32_matmul_precision.

    Returns:
        [B, N].
    """
    x, w, pre_bias, latent_bias = p64.stream(s)
    spread = ((x - pre_bias).square() @ w.square().T).sqrt()
    unit = torch.finfo(check.dtype).eps / 2
    stored = torch.finfo(F32).eps / 2 if check.kernels and check.dtype == F64 else unit  # keys have 32 bits
    acc = torch.finfo(acc_dtype(check.dtype)).eps / 2
    d = x.shape[1]
    error = stored * (2 * h.abs() + latent_bias.abs()) + (4 * unit + acc * math.sqrt(d)) * spread
    if check.kernels and check.device.type == "cuda" and check.dtype == F32:
        cut = 2**-10 if selecting and torch.get_float32_matmul_precision() != "highest" else 2**-22  # tf32, or tf32x3
        error += (cut + d / 8 * 2**-24) * (h.abs() + 4 * spread)
    return error


class SelectionJudge:
    """Judge selected latents by their true scores, by blocks of rows."""

    def __init__(self, n: int):
        self.n, self.invalid, self.note = n, "", ""
        self.shortfalls, self.own_shortfalls, self.limits = [], [], []

    def judge(self, score: Tensor, error: Tensor, idx: Tensor, own_idx: Tensor, row0: int = 0) -> None:
        """Judge a block of rows.

        Args:
            score: in float64, [B, N].
            error: bound of its rounding error, [B, N].
            idx: selected latents, [B, k].
            own_idx: selected by plain PyTorch in the dtype, [B, k].
            row0: number of the first row, for messages.
        """
        ordered = idx.sort(1).values
        if idx.numel() and (int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= self.n):
            self.invalid = f"latents outside 0..{self.n - 1}: {int(ordered[:, 0].min())}..{int(ordered[:, -1].max())}"
            return
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if twice.any():
            self.invalid = f"row {row0 + int(twice.nonzero()[0])}: a latent twice"
            return
        taken = torch.zeros_like(score, dtype=torch.bool).scatter(1, idx, True)
        low, high = (score - error).masked_fill(taken, float("-inf")), (score + error).gather(1, idx)
        wrong = low.amax(1) > high.amin(1)
        if wrong.any() and not self.note:
            r = int(wrong.nonzero()[0])
            i, j = int(idx[r, high[r].argmin()]), int(low[r].argmax())
            what = f"latent {j} ({score[r, j]:.6g}) left out, {i} ({score[r, i]:.6g}) taken"
            self.note = f"{int(wrong.sum())} of {len(wrong)} rows; row {row0 + r}: {what}"
        at, err = score.gather(1, idx), error.gather(1, idx)
        disorder = (at[:, 1:] - err[:, 1:] > at[:, :-1] + err[:, :-1]).any(1)
        if disorder.any() and not self.note:
            self.note = f"{int(disorder.sum())} rows not in descending order, first {row0 + int(disorder.nonzero()[0])}"
        size = score.abs().amax(1)
        size = torch.where(size > 0, size, 1.0)
        self.shortfalls.append(self._shortfall(score, idx) / size)
        self.own_shortfalls.append(self._shortfall(score, own_idx) / size)
        self.limits.append((error.gather(1, low.argmax(1, keepdim=True)).squeeze(1) + err.amax(1)) / size)

    def judge_streams(self, hs, errors, idx: Tensor, own_idx: Tensor, *, unit: float, row0: int = 0) -> None:
        """Judge global or local selection.

        Args:
            hs: pre-activations of each stream in float64, [B, N].
            errors: bounds of their rounding errors, [B, N].
            idx: [B, k], judged on the streams' sum, or [S, B, k], judged on each stream.
            own_idx: selected by plain PyTorch in the dtype, of the same shape.
            unit: rounding of the dtype, which storing the sum adds.
            row0: number of the first row, for messages.
        """
        if idx.dim() == 2:
            self.judge(sum(hs), sum(errors) + unit * sum(hs).abs(), idx, own_idx, row0)
        else:
            for h, error, i, own in zip(hs, errors, idx, own_idx, strict=True):
                self.judge(h, error, i, own, row0)

    @staticmethod
    def _shortfall(score: Tensor, idx: Tensor) -> Tensor:
        rest = torch.scatter(score, 1, idx, float("-inf"))
        return (rest.amax(1) - score.gather(1, idx).amin(1)).clamp(min=0)

    def report(self, check: Check, tensor: str = "selection") -> None:
        """Add the result of all blocks to a check."""
        if self.invalid:
            check.add(tensor, False, self.invalid)
            return
        ours, own, limit = (torch.cat(parts) for parts in (self.shortfalls, self.own_shortfalls, self.limits))
        check.add(
            tensor, not self.note, self.note,
            max_error=ours.max().item(), rms_error=ours.square().mean().sqrt().item(), max_limit=limit.max().item(),
            torch_max=own.max().item() * check.own_scale, torch_rms=own.square().mean().sqrt().item() * check.own_scale,
        )  # fmt: skip
