"""Checks of encode_topk and values_at."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .... import reference
from ....ops.dead import auxk_topk
from ....ops.encode import encode_topk, values_at
from ..judge import F64, Check, logit_error
from ..problems import as_leaves, cotangent, generic, integers, random_latents


def judge_encode(check: Check, topk_type: str) -> None:
    """Judge selection and values of `encode_topk`.

    Args:
        check: gives the case; takes the results.
        topk_type: "global" or "local".
    """
    c, p = check.case, check.problem(generic)
    indices, values = encode_topk(*p.encoder, c.k, topk_type, check.impl)
    S = len(c.dims)
    selection = check.selection_judge()
    truths, owns = [], []
    for rows in torch.arange(c.B).split(max(1, 2**25 // c.N)):  # bounds the memory of dense logits
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        block = p.rows(part)
        block64 = block.to(F64)
        hs, own = block64.logits(), check.own(block).logits()
        idx = indices[..., part, :]
        own_idx = reference.select(own, c.k, topk_type)
        errors = [logit_error(check, block64, s, h, selecting=True) for s, h in enumerate(hs)]
        selection.judge_streams(hs, errors, idx, own_idx, unit=torch.finfo(check.dtype).eps / 2, row0=part.start)
        if selection.invalid:
            break
        truths.append([torch.relu(h.gather(1, reference.of_stream(idx, s))) for s, h in enumerate(hs)])
        owns.append([torch.relu(h.gather(1, reference.of_stream(idx, s))) for s, h in enumerate(own)])
    selection.report(check)
    if not selection.invalid:
        for s in range(S):
            truth, own = (torch.cat([part[s] for part in parts]) for parts in (truths, owns))
            check.compare(f"values[{s}]", values[s], truth, own)


def judge_exact(check: Check) -> None:
    """Judge selections on integers, where ties are frequent and nothing is rounded, also with infinity and NaN."""
    c, p = check.case, check.problem(integers)
    hs = p.to(F64).logits()
    S = len(c.dims)

    def judge(what, problem, hs):
        for topk_type in ("global", "local"):
            indices, values = encode_topk(*problem.encoder, c.k, topk_type, check.impl)
            expected = reference.select(hs, c.k, topk_type)
            check.exact(f"{what} {topk_type}", indices, expected)
            truth = torch.stack([torch.relu(h.gather(1, reference.of_stream(expected, s))) for s, h in enumerate(hs)])
            if torch.equal(indices, expected):
                clean = torch.stack([x.isfinite().all(1) for x in problem.xs])  # inf - inf inside a kernel is NaN
                check.exact(f"{what} values", values[clean], truth[clean])

    judge("integers", p, hs)

    all_equal = replace(p, xs=[torch.ones_like(x) for x in p.xs], w_encs=[torch.ones_like(w) for w in p.w_encs])
    all_equal.latent_biases = [torch.full_like(b, 3) for b in p.latent_biases]
    judge("all equal", all_equal, all_equal.to(F64).logits())

    odd_biases = replace(p, latent_biases=[b.clone() for b in p.latent_biases])
    for place, value in ((1, -math.inf), (2, math.inf), (3, math.nan), (c.N // 2, -math.inf), (c.N - 1, math.inf)):
        odd_biases.latent_biases[0][place] = value
    judge("inf, NaN biases", odd_biases, odd_biases.to(F64).logits())

    few_finite = replace(p, latent_biases=[b.clone() for b in p.latent_biases])
    few_finite.latent_biases[0][max(c.k - 2, 1) :] = -math.inf  # leaves fewer than k finite pre-activations
    judge("-inf beyond k", few_finite, few_finite.to(F64).logits())

    odd_rows = replace(p, xs=[x.clone() for x in p.xs])
    odd_rows.xs[0][0, 0], odd_rows.xs[0][1 % c.B, -1], odd_rows.xs[S - 1][2 % c.B, 0] = math.nan, math.inf, -math.inf
    judge("inf, NaN rows", odd_rows, odd_rows.to(F64).logits())

    dead = torch.arange(c.N, device=check.device) % 3 != 0
    for s in range(min(S, 2)):
        idx, val = auxk_topk(*p.stream(s), dead, c.auxk, check.impl)
        ref_idx, ref_val = reference.auxk(hs[s], dead, c.auxk)
        check.exact(f"auxk values[{s}]", val, ref_val)
        fired = ref_val > 0  # latents with value 0 are arbitrary
        check.exact(f"auxk indices[{s}]", idx[fired], ref_idx[fired])


def judge_values_at(check: Check) -> None:
    """Judge `values_at` and its gradients."""
    c, p = check.case, check.problem(generic)
    indices = random_latents(check)
    p64, own_p = p.to(F64), check.own(p)
    names = ("dx", "dw_enc", "dpre_bias", "dlatent_bias")
    for s in range(min(len(c.dims), 2)):
        with torch.no_grad():
            h = reference.preactivations(*p64.stream(s))
            near = (h.abs() < 2 * logit_error(check, p64, s, h)).gather(1, indices)
        # where rounding may decide relu's side either derivative is correct: the cotangent is 0 there
        dvalues = cotangent(check, indices.shape).masked_fill(near, 0.0)
        note = f"{int(near.sum())} of {near.numel()} entries at relu's border not differentiated" if near.any() else ""

        def outcome(tensors, fn, dvalues=dvalues):
            leaves = as_leaves(tensors)
            values = fn(*leaves)
            return [values, *torch.autograd.grad(values, leaves, dvalues.to(values.dtype))]

        def dense(x, w, b, c):
            return torch.relu(reference.preactivations(x, w, b, c).gather(1, indices))

        ours = outcome(p.stream(s), lambda x, w, b, c: values_at(x, w, b, c, indices, impl=check.impl))
        truth, own = outcome(p64.stream(s), dense), outcome(own_p.stream(s), dense)
        for name, *three in zip(("values", *names), ours, truth, own, strict=True):
            check.compare(f"{name}[{s}]", *three, note=note)
