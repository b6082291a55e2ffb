"""Criteria of `sparc-kernels verify`, and the data it runs on.

- A tensor: its error against `reference.py` in float64, computed from the same rounded inputs, may be at most twice the
  error that `reference.py` itself makes in that dtype, plus a few units of rounding (`allowance`). Maximum error is
  taken relative to the largest magnitude of the true tensor, RMS error relative to its RMS.
- A selection: by value, never by index, because near ties make correct kernels differ. The true value of a latent left
  out may exceed that of one taken by no more than both logits' rounding (`logit_error`).
- Integer-valued problems have no rounding: the selection must equal the stable sort's, index for index.
- Gradients are compared with the selection held fixed. The derivative of relu jumps at 0, where rounding may decide
  the side, so the data avoid 0: see `margin_problem`, and the cotangents of `_values_at`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ... import reference
from ...core.numerics import acc_dtype
from ...core.registry import resolve_impl

Tensor = torch.Tensor
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHORT = {F64: "fp64", F32: "fp32", BF16: "bf16", F16: "fp16"}

# ------------------------------------------------------------------------------------------------------------- judging


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

    def __init__(self, op: str, case: Case, dtype: torch.dtype, device: torch.device, impl: str, problems: dict):
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


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Problem:
    """Inputs and parameters of S streams."""

    xs: list[Tensor]  # [B, d]
    w_encs: list[Tensor]  # [N, d]
    w_decs: list[Tensor]  # [d, N]
    pre_biases: list[Tensor]  # [d]
    latent_biases: list[Tensor]  # [N]
    quiet: Tensor  # bool [N]: inactive latents, never near the top k

    @property
    def encoder(self) -> tuple[list[Tensor], ...]:
        """Arguments of the encoder: xs, w_encs, pre_biases, latent_biases."""
        return self.xs, self.w_encs, self.pre_biases, self.latent_biases

    def stream(self, s: int) -> tuple[Tensor, ...]:
        """Return the encoder's arguments of one stream."""
        return tuple(group[s] for group in self.encoder)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return contiguous copies in another dtype."""
        groups = [[t.detach().to(dtype, copy=True) for t in g] for g in (*self.encoder[:2], self.w_decs)]
        biases = [[t.detach().to(dtype, copy=True) for t in g] for g in self.encoder[2:]]
        return Problem(*groups, *biases, self.quiet)

    def rows(self, rows) -> Problem:
        """Return the problem with some rows of the inputs: a slice or indices."""
        return replace(self, xs=[x[rows] for x in self.xs])

    def logits(self) -> list[Tensor]:
        """Return the pre-activations [B, N] of each stream by the reference."""
        return [reference.preactivations(*self.stream(s)) for s in range(len(self.xs))]


def generic(check: Check, rows: int | None = None) -> Problem:
    """Make Gaussian data; rows of different norm, biases about as large as the products.

    Args:
        check: gives case, dtype and device.
        rows: number of rows; None: the case's.
    """
    c, g = check.case, check.seeded(check.case.name)
    wide = F64 if check.dtype == F64 else F32

    def randn(*shape):
        return torch.randn(*shape, generator=g, device=check.device, dtype=wide)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, device=check.device, dtype=wide)

    B = rows or c.B
    quiet = uniform(c.N) < 0.25
    scale = torch.where(quiet, 0.25, 1.0).to(wide)
    p = Problem(
        xs=[randn(B, d) * (0.5 + uniform(B, 1)) for d in c.dims],
        w_encs=[randn(c.N, d) / d**0.5 * scale[:, None] for d in c.dims],
        w_decs=[(randn(c.N, d) / d**0.5).t() for d in c.dims],
        pre_biases=[0.5 * randn(d) for d in c.dims],
        latent_biases=[0.5 * randn(c.N) * scale for d in c.dims],
        quiet=quiet,
    )
    if c.hot:
        for bias in p.latent_biases:
            bias[c.N // 2] = 30
        quiet[c.N // 2] = False
    for group in (*p.encoder, p.w_decs):
        group[:] = [t.to(check.dtype) for t in group]
    return stride(p) if c.strided else p


def stride(p: Problem) -> Problem:
    """Return the same values in strided memory: sliced columns, transposed weights, every other entry of biases."""

    def columns(x):
        return torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]]

    def alternate(bias):
        return torch.stack([bias, torch.full_like(bias, float("nan"))], 1)[:, 0]

    return Problem(
        [columns(x) if s % 2 == 0 else x.t().contiguous().t() for s, x in enumerate(p.xs)],
        [w.t().contiguous().t() if s % 2 == 0 else columns(w) for s, w in enumerate(p.w_encs)],
        [w.contiguous() if s % 2 == 0 else columns(w.t().contiguous()).t() for s, w in enumerate(p.w_decs)],
        [alternate(b) for b in p.pre_biases],
        [alternate(b) for b in p.latent_biases],
        p.quiet,
    )


def integers(check: Check) -> Problem:
    """Make small integers, so that pre-activations and their sums over streams are exact, and ties are frequent."""
    c, g = check.case, check.seeded(check.case.name)

    def integers(high, *shape):
        return torch.randint(-high, high + 1, shape, generator=g, device=check.device).to(check.dtype)

    high = 2 if sum(c.dims) < 600 else 1
    p = Problem(
        xs=[integers(high, c.B, d) for d in c.dims],
        w_encs=[integers(1, c.N, d) for d in c.dims],
        w_decs=[integers(1, c.N, d).t() for d in c.dims],
        pre_biases=[torch.zeros(d, dtype=check.dtype, device=check.device) for d in c.dims],
        latent_biases=[integers(4, c.N) for d in c.dims],
        quiet=torch.zeros(c.N, dtype=torch.bool, device=check.device),
    )
    exact_to = {BF16: 2**8, F16: 2**11}.get(check.dtype, 2**24)
    hs = p.to(F64).logits()
    assert all(h.abs().max() <= exact_to for h in (*hs, sum(hs))), "integer problem: sums beyond what is exact"
    return p


def margin_problem(check: Check) -> Problem:
    """Make data on which rounding cannot move a selected pre-activation across 0 or AuxK's threshold.

    float32 and float64: from four times as many Gaussian rows, those with a margin of 8 times the logits' rounding.
    Half precision: multiples of a power of two, latent biases offset by half a step, whose fp32 sums are exact.
    """
    c = check.case
    if check.dtype in (F64, F32):
        p = generic(check, rows=4 * c.B)
        p64 = p.to(F64)
        hs = p64.logits()
        safe = torch.ones(4 * c.B, dtype=torch.bool, device=check.device)
        chosen = [*reference.select(hs, min(c.k + 4, c.N), "local"), reference.select(hs, min(c.k + 4, c.N))]
        for s, h in enumerate(hs):
            near = torch.minimum(h.abs(), (h - 1e-3).abs()) < 8 * logit_error(check, p64, s, h)
            dead = reference.topk_indices(h.masked_fill(~p.quiet, float("-inf")), min(c.auxk + 4, c.N))
            unused = ~p.quiet[dead]
            for idx in (chosen[s], chosen[-1]):
                safe &= ~near.gather(1, idx).any(1)
            safe &= ~(near.gather(1, dead) & ~unused).any(1)
        rows = safe.nonzero().squeeze(1)[: c.B]
        assert rows.numel() == c.B, f"only {rows.numel()} of {4 * c.B} rows keep away from the border of relu"
        return p.rows(rows)
    g = check.seeded(c.name)
    quiet = torch.rand(c.N, generator=g, device=check.device) < 0.25
    scale = torch.where(quiet, 0.25, 1.0)

    def integers(high, *shape):
        return torch.randint(-high, high + 1, shape, generator=g, device=check.device).float()

    steps = [2.0 ** -round(math.log2(4.3 * d**0.5)) for d in c.dims]  # about unit variance of x, 1 / d of w
    p = Problem(
        xs=[integers(7, c.B, d) / 4 for d in c.dims],
        w_encs=[integers(7, c.N, d) * step * scale[:, None] for d, step in zip(c.dims, steps, strict=True)],
        w_decs=[(torch.randn(c.N, d, generator=g, device=check.device) / d**0.5).t() for d in c.dims],
        pre_biases=[integers(3, d) / 4 for d in c.dims],
        latent_biases=[(integers(60, c.N) + 0.5) * step / 4 * scale for step in steps],
        quiet=quiet,
    )
    if c.hot:
        for bias in p.latent_biases:
            bias[c.N // 2] = 30
        quiet[c.N // 2] = False
    return p.to(check.dtype)


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


def random_latents(check: Check, streams: int = 0) -> Tensor:
    """Draw distinct latents in random order; in a hot case every row has the hot latent.

    Args:
        check: gives the case and the generator.
        streams: leading dimension; 0: none.

    Returns:
        int64 [B, k] or [streams, B, k].
    """
    c, g = check.case, check.generator
    shape = (streams, c.B) if streams else (c.B,)
    if c.k * 4 > c.N:
        idx = torch.rand(*shape, c.N, generator=g, device=check.device).argsort(-1)[..., : c.k].contiguous()
    else:  # a random start and random steps: distinct while they sum to less than N
        gaps = torch.randint(1, c.N // c.k + 1, (*shape, c.k), generator=g, device=check.device)
        start = torch.randint(0, c.N, (*shape, 1), generator=g, device=check.device)
        idx = ((start + gaps.cumsum(-1)) % c.N)[..., torch.randperm(c.k, generator=g, device=check.device)]
    if c.hot:
        idx = torch.where((idx == c.N // 2).any(-1, keepdim=True) | is_first(idx), swap(idx, c.N // 2), idx)
    return idx.contiguous()


def is_first(idx: Tensor) -> Tensor:
    """Mask the first column: bool [k]."""
    return torch.arange(idx.shape[-1], device=idx.device) == 0


def swap(idx: Tensor, latent: int) -> Tensor:
    """Swap `latent` with the first entry of each row.

    Args:
        idx: latents [..., k].
        latent: replaces the first entry where it is not in the row.
    """
    moved = torch.where(idx == latent, idx[..., :1], idx)
    return torch.where(is_first(idx), latent, moved)


def as_leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Detach tensors and require their gradients."""
    return [t.detach().requires_grad_() for t in tensors]
