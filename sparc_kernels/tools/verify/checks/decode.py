"""Checks of decode and decode_nmse."""

from __future__ import annotations

from functools import partial

import torch

from .... import reference
from ....ops.decode import decode, decode_nmse
from ..judge import F64, Check
from ..problems import as_leaves, cotangent, generic, loss_scale, random_codes, random_latents


def judge_decode(check: Check, local: bool) -> None:
    """Judge `decode`, all pairs and one, and its gradients.

    Args:
        check: gives the case; takes the results.
        local: whether every stream has its own indices.
    """
    c, p = check.case, check.problem(generic)
    indices, values = random_codes(check, local)
    S = len(c.dims)
    pairs = [(t, s) for t in range(S) for s in range(S)]
    upstream = [cotangent(check, (S, c.B, d), wide=False) for d in c.dims]

    def outcome(values, w_decs, pre_biases, fn):
        leaves = as_leaves([values, *w_decs, *pre_biases])
        recons = fn(indices, leaves[0], leaves[1 : S + 1], leaves[S + 1 :])
        cotangents = [upstream[t][s].to(recons[t, s].dtype) for t, s in pairs]
        grads = torch.autograd.grad([recons[pair] for pair in pairs], leaves, cotangents)
        return [torch.stack([recons[t, s] for s in range(S)]) for t in range(S)] + list(grads)

    p64, own_p = p.to(F64), check.own(p)
    ours = outcome(values, p.w_decs, p.pre_biases, partial(decode, impl=check.impl))
    truth = outcome(values.double(), p64.w_decs, p64.pre_biases, reference.decode)
    own = outcome(values.to(check.own_dtype), own_p.w_decs, own_p.pre_biases, reference.decode)
    names = [f"recon[{t}]" for t in range(S)] + ["dvalues"]
    names += [f"dw_dec[{t}]" for t in range(S)] + [f"dpre_bias[{t}]" for t in range(S)]
    for name, *three in zip(names, ours, truth, own, strict=True):
        check.compare(name, *three)
    if S > 1:
        some = decode(indices, values, p.w_decs, p.pre_biases, pairs=[(0, S - 1)], impl=check.impl)
        check.compare("one pair", some[0, S - 1], truth[0][S - 1], own[0][S - 1])


def judge_decode_nmse(check: Check, local: bool) -> None:
    """Judge `decode_nmse` and its gradients.

    Args:
        check: gives the case; takes the results.
        local: whether every stream has its own indices.
    """
    c, p = check.case, check.problem(generic)
    indices, values = random_codes(check, local)
    S = len(c.dims)
    scale = loss_scale(check)
    upstream = (cotangent(check, (S, S)).abs() + 0.5) * scale

    def outcome(values, w_decs, pre_biases, xs, fn):
        leaves = as_leaves([values, *w_decs, *pre_biases, *xs])
        matrix = fn(indices, leaves[0], leaves[1 : S + 1], leaves[S + 1 : 2 * S + 1], leaves[2 * S + 1 :])
        return [matrix, *torch.autograd.grad(matrix, leaves, upstream.to(matrix.dtype))]

    p64, own_p = p.to(F64), check.own(p)
    ours = outcome(values, p.w_decs, p.pre_biases, p.xs, partial(decode_nmse, impl=check.impl))
    truth = outcome(values.double(), p64.w_decs, p64.pre_biases, p64.xs, reference.decode_nmse)
    own = outcome(values.to(check.own_dtype), own_p.w_decs, own_p.pre_biases, own_p.xs, reference.decode_nmse)
    names = ["nmse", "dvalues", *(f"{name}[{t}]" for name in ("dw_dec", "dpre_bias", "dx") for t in range(S))]
    for name, *three in zip(names, ours, truth, own, strict=True):
        check.compare(name, *three)


def judge_int64_offsets(check: Check) -> None:
    """Judge `decode` with more than 2^31 decoder entries, read and written at the far end."""
    c, g = check.case, check.generator
    d = c.dims[0]
    w = torch.empty(c.N, d, dtype=check.dtype, device=check.device).normal_(generator=g)
    indices = random_latents(check)
    indices[:, 0], indices[0, 1] = c.N - 1, c.N - 2
    values = cotangent(check, (1, c.B, c.k)).abs() + 0.1
    bias = torch.randn(d, generator=g, device=check.device).to(check.dtype)
    upstream = cotangent(check, (c.B, d), wide=False)
    leaves = as_leaves([values, w.t()])
    recon = decode(indices, leaves[0], [leaves[1]], [bias], impl=check.impl)[0, 0]
    dvalues, dw = torch.autograd.grad(recon, leaves, upstream)
    used, places = indices.unique(return_inverse=True)  # the reference needs the used rows only

    def dense(dtype):
        leaves_used = as_leaves([values.to(dtype), w[used].to(dtype).t()])
        out = reference.decode(places, leaves_used[0], [leaves_used[1]], [bias.to(dtype)])[0, 0]
        return [out, *torch.autograd.grad(out, leaves_used, upstream.to(dtype))]

    ours = [recon, dvalues, dw[:, used]]
    for name, *three in zip(("recon", "dvalues", "dw_dec"), ours, dense(F64), dense(check.dtype), strict=True):
        check.compare(name, *three)
    written = torch.cat([part.ne(0).any(1) for part in dw.t().split(2**17)])
    check.exact("rows written", written.nonzero().squeeze(1), used)
