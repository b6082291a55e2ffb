"""Checks of inverse_index and latent_reduce."""

from __future__ import annotations

import torch

from .... import reference
from ....ops.inverse_index import inverse_index
from ....ops.latent_reduce import latent_reduce
from ....ops.records import WeightedLists
from ..judge import Check
from ..problems import cotangent, random_latents


def judge_inverse_index(check: Check) -> None:
    """Judge the order and the lengths of the lists, also with ids outside 0..N-1."""
    c = check.case
    for name, indices in (("ids", random_latents(check)), ("local ids", random_latents(check, 2))):
        order, offsets, _ = inverse_index(indices, c.N)
        flat = indices.reshape(-1)
        check.exact(f"order, {name}", order, flat.sort(stable=True).indices)
        counts = torch.zeros(c.N, dtype=torch.int64, device=flat.device)
        counts.index_add_(0, flat, torch.ones_like(flat))
        check.exact(f"offsets, {name}", offsets, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    outside = random_latents(check)
    outside[0, 0], outside[-1, -1], outside[0, -1] = -3, c.N, c.N + 10**6
    order, offsets, _ = inverse_index(outside, c.N)
    flat = outside.reshape(-1)
    places = flat.sort(stable=True).indices
    inside = places[(flat[places] >= 0) & (flat[places] < c.N)]
    check.exact("ids outside", order[int(offsets[0]) : int(offsets[-1])], inside)


def judge_latent_reduce(check: Check) -> None:
    """Judge the sums of rows and of coefficients over the lists."""
    c = check.case
    indices = random_latents(check)
    S, d = len(c.dims), c.dims[0]
    coef = cotangent(check, (S, c.B, c.k))
    coef = torch.where(coef.abs() < 0.4, 0.0, coef)  # zeros, as after relu
    mat = torch.randn(S, c.B, d, generator=check.generator, device=check.device).to(check.dtype)
    inverse = inverse_index(indices, c.N)
    ours = latent_reduce(WeightedLists(inverse, coef, None, None, mat, c.k), check.dtype, check.resolved)

    def dense(coef, mat):
        codes = [reference.codes(indices, v, c.N) for v in coef]
        return sum(a.T @ m for a, m in zip(codes, mat, strict=True)), sum(codes).sum(0)

    truth, own = dense(coef.double(), mat.double()), dense(coef.to(check.own_dtype), mat.to(check.own_dtype))
    for name, *three in zip(("rows", "sums"), ours, truth, own, strict=True):
        check.compare(name, *three)
