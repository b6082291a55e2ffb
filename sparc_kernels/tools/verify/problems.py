"""Data of `sparc-kernels verify`: inputs and parameters, and what checks draw beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ... import reference
from ...core.numerics import acc_dtype
from ...ops.records import ABSENT
from .judge import BF16, F16, F32, F64, Check, Tensor, logit_error


@dataclass
class Problem:
    """Inputs and parameters of S streams."""

    xs: list[Tensor]  # [B, d]
    w_encs: list[Tensor]  # [N, d]
    w_decs: list[Tensor]  # [d, N]
    pre_biases: list[Tensor]  # [d]
    latent_biases: list[Tensor]  # [N]
    inactive: Tensor  # bool [N]: inactive latents, never near the top k

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
        return Problem(*groups, *biases, self.inactive)

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
    inactive = uniform(c.N) < 0.25
    scale = torch.where(inactive, 0.25, 1.0).to(wide)
    p = Problem(
        xs=[randn(B, d) * (0.5 + uniform(B, 1)) for d in c.dims],
        w_encs=[randn(c.N, d) / d**0.5 * scale[:, None] for d in c.dims],
        w_decs=[(randn(c.N, d) / d**0.5).t() for d in c.dims],
        pre_biases=[0.5 * randn(d) for d in c.dims],
        latent_biases=[0.5 * randn(c.N) * scale for d in c.dims],
        inactive=inactive,
    )
    if c.hot:
        for bias in p.latent_biases:
            bias[c.N // 2] = 30
        inactive[c.N // 2] = False
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
        p.inactive,
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
        inactive=torch.zeros(c.N, dtype=torch.bool, device=check.device),
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
            dead = reference.topk_indices(h.masked_fill(~p.inactive, float("-inf")), min(c.auxk + 4, c.N))
            unused = ~p.inactive[dead]
            for idx in (chosen[s], chosen[-1]):
                safe &= ~near.gather(1, idx).any(1)
            safe &= ~(near.gather(1, dead) & ~unused).any(1)
        rows = safe.nonzero().squeeze(1)[: c.B]
        assert rows.numel() == c.B, f"only {rows.numel()} of {4 * c.B} rows keep away from the border of relu"
        return p.rows(rows)
    g = check.seeded(c.name)
    inactive = torch.rand(c.N, generator=g, device=check.device) < 0.25
    scale = torch.where(inactive, 0.25, 1.0)

    def integers(high, *shape):
        return torch.randint(-high, high + 1, shape, generator=g, device=check.device).float()

    steps = [2.0 ** -round(math.log2(4.3 * d**0.5)) for d in c.dims]  # about unit variance of x, 1 / d of w
    p = Problem(
        xs=[integers(7, c.B, d) / 4 for d in c.dims],
        w_encs=[integers(7, c.N, d) * step * scale[:, None] for d, step in zip(c.dims, steps, strict=True)],
        w_decs=[(torch.randn(c.N, d, generator=g, device=check.device) / d**0.5).t() for d in c.dims],
        pre_biases=[integers(3, d) / 4 for d in c.dims],
        latent_biases=[(integers(60, c.N) + 0.5) * step / 4 * scale for step in steps],
        inactive=inactive,
    )
    if c.hot:
        for bias in p.latent_biases:
            bias[c.N // 2] = 30
        inactive[c.N // 2] = False
    return p.to(check.dtype)


def shard_blocks(n: int, shards: int) -> list[tuple[int, int]]:
    """Return the first latent of each shard and the one behind its last; blocks differ by at most one.

    Args:
        n: N.
        shards: how many.
    """
    ends = [s * (n // shards) + min(s, n % shards) for s in range(shards + 1)]
    return list(pairwise(ends))


def local_ids(indices: Tensor, low: int, high: int) -> Tensor:
    """Return the ids of selected latents in the shard that holds low..high - 1: ABSENT for those of others."""
    return torch.where((indices >= low) & (indices < high), indices - low, ABSENT)


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


def cotangent(check: Check, shape, wide: bool = True) -> Tensor:
    """Random upstream gradient with values exact in the dtype; `wide`: stored in the accumulator's dtype.

    Its mean is not 0, since sums that cancel would be rounding only.
    """
    g = (torch.randn(*shape, generator=check.generator, device=check.device) + 0.5).to(check.dtype)
    return g.to(acc_dtype(check.dtype)) if wide else g


def random_codes(check: Check, local: bool) -> tuple[Tensor, Tensor]:
    """Indices [B, k] or [S, B, k] and non-negative values [S, B, k] with zeros among them."""
    c = check.case
    indices = random_latents(check, len(c.dims) if local else 0)
    if c.name == "tiny":
        indices[..., 0, 1] = indices[..., 0, 0]  # a latent twice in a row adds up
    return indices, torch.relu(cotangent(check, (len(c.dims), c.B, c.k)))


def loss_scale(check: Check) -> float:
    """Loss scale as a gradient scaler would choose it; 2 / (B d) alone is below fp16's normal numbers."""
    return 2.0 ** min(round(math.log2(check.case.B * max(check.case.dims))), 12)
