"""Checks of the optimizer's step of one stream, from gradients and from the lists of the latents."""

from __future__ import annotations

import torch

from .... import reference
from ....core.numerics import acc_dtype
from ....ops.adam import BEFORE, adam_stream_
from ....ops.inverse_index import inverse_index
from ....ops.latent_adam import latent_adam_
from ..judge import F64, Check
from ..problems import cotangent, local_ids, random_latents, shard_blocks

ADAM = (0.9, 0.99, 1e-8)  # betas and eps
# as `adam_scalars_` writes them: step size, 1 / sqrt(correction), decay, scale, go
SCALARS = (0.01, 1.5, 0.999, 0.5, 1.0)


def _adam_reference(w, g, m, v, unit: bool):
    """One step of Adam in plain PyTorch, in the dtype of the tensors; `unit`: official normalisation and projection."""
    (beta1, beta2, eps), (step_size, correction, keep, scale, _) = ADAM, SCALARS
    g = g * scale
    if unit:
        w = w / (w.norm(dim=1, keepdim=True) + 1e-8)
        g = g - (w * g).sum(1, keepdim=True) * w
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return w * keep - step_size * m / (v.sqrt() * correction + eps), m, v


def _adam_tensors(check: Check, *shapes):
    """Weights and gradients in the check's dtype, moments in the accumulator's."""

    def normal(shape):
        return torch.randn(shape, generator=check.generator, device=check.device)

    acc = acc_dtype(check.dtype)
    weights, grads = ([normal(shape).to(check.dtype) for shape in shapes] for _ in range(2))
    return weights, grads, [normal(s).to(acc) for s in shapes], [normal(s).square().add(0.1).to(acc) for s in shapes]


def judge_adam(check: Check) -> None:
    """Judge SparcAdam's step of one stream in the official order, from gradients in memory."""
    c, d = check.case, check.case.dims[0]
    tensors = _adam_tensors(check, (c.N, d), (c.N, d), (d,), (c.N,))
    before = [[t.clone() for t in group] for group in tensors]
    params, grads, exp_avgs, exp_avg_sqs = tensors
    scalars = torch.tensor([SCALARS] * 4, device=check.device, dtype=acc_dtype(check.dtype))
    adam_stream_(params, grads, exp_avgs, exp_avg_sqs, scalars, BEFORE, *ADAM, check.resolved)
    for i, name in enumerate(("w_enc", "w_dec", "pre_bias", "latent_bias")):
        of = [[group[i].to(dtype) for group in before] for dtype in (F64, check.own_dtype)]
        truth, own = (_adam_reference(*four, unit=i == 1) for four in of)
        ours = params[i], exp_avgs[i], exp_avg_sqs[i]
        for part, *three in zip(("", " exp_avg", " exp_avg_sq"), ours, truth, own, strict=True):
            check.compare(name + part, *three)


def judge_latent_adam(check: Check, shards: int = 1) -> None:
    """Judge the same step from latent lists, for an encoder with its latent bias and for a decoder.

    Args:
        check: gives the case; takes the results.
        shards: blocks of latents that are updated one by one; then the pre-bias takes a step from the sums of all.
    """
    c, d, S = check.case, check.case.dims[0], len(check.case.dims)
    indices = random_latents(check)
    acc = acc_dtype(check.dtype)
    coef = cotangent(check, (S, c.B, c.k))
    mat = torch.randn(S, c.B, d, generator=check.generator, device=check.device).to(check.dtype)
    (w, b), _, (m, b_m), (v, b_v) = _adam_tensors(check, (c.N, d), (c.N,))
    (pre, *_), _, (pre_m, *_), (pre_v, *_) = _adam_tensors(check, (d,))
    scalars = torch.tensor([SCALARS] * 4, device=check.device, dtype=acc)
    zero = torch.zeros(d, device=check.device, dtype=acc)  # the decoder's part of the pre-bias gradient

    before = [[w, w, pre, b], [m, m, pre_m, b_m], [v, v, pre_v, b_v]]
    updated = [[t.clone(memory_format=torch.contiguous_format) for t in four] for four in before]
    total = zero.clone()
    for low, high in shard_blocks(c.N, shards):
        if low < high:
            own = [[t if i == 2 else t[low:high] for i, t in enumerate(of)] for of in updated]
            lists = [*inverse_index(local_ids(indices, low, high), high - low), coef, None, None, mat]
            sums = [torch.empty_like(zero)] if shards > 1 else []
            latent_adam_(
                *own, [], scalars, [zero], sums, lists, lists, c.k, [], [], 0, BEFORE, *ADAM, check.resolved
            )  # fmt: skip
            total += sum(sums)
    if shards > 1:
        grads = [None, None, zero - total, None]
        adam_stream_(updated[0], grads, *updated[1:], scalars, BEFORE, *ADAM, check.resolved)

    def dense(dtype):
        codes = [reference.codes(indices, x.to(dtype), c.N) for x in coef]
        rows, sums = sum(a.T @ x.to(dtype) for a, x in zip(codes, mat, strict=True)), sum(codes).sum(0)
        grads = rows, rows, -(sums @ w.to(dtype)), sums
        fours = zip(before[0], grads, *before[1:], strict=True)
        return [_adam_reference(*(t.to(dtype) for t in four), unit=i == 1) for i, four in enumerate(fours)]

    truth, own = dense(F64), dense(check.own_dtype)
    for i, name in enumerate(("encoder", "decoder", "pre_bias", "encoder bias")):
        ours = [of[i] for of in updated]
        for part, *three in zip(("", " exp_avg", " exp_avg_sq"), ours, truth[i], own[i], strict=True):
            check.compare(name + part, *three)
