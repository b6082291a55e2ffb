"""Checks of auxk_topk and update_counters_."""

from __future__ import annotations

import torch

from .... import reference
from ....core.numerics import acc_dtype
from ....ops.dead import auxk_topk, update_counters_
from ..judge import F64, Check, logit_error
from ..problems import as_leaves, cotangent, generic, random_latents


def judge_auxk_topk(check: Check, how_many: str) -> None:
    """Judge AuxK's selection, its values and their gradients.

    Args:
        check: gives the case; takes the results.
        how_many: latents that are dead: "none", "few" (fewer than auxk) or "many".
    """
    c, p = check.case, check.problem(generic)
    p64, own_p, s = p.to(F64), check.own(p), len(c.dims) - 1
    h = reference.preactivations(*p64.stream(s))
    error = logit_error(check, p64, s, h)
    count = {"none": 0, "few": max(c.auxk // 2, 1), "many": max(c.N // 2, c.auxk)}[how_many]
    # few: latents that reach far above 0, so that no latent's values are all small differences of large numbers
    order = h.amax(0) if how_many == "few" else torch.rand(c.N, generator=check.generator, device=check.device)
    dead = torch.zeros(c.N, dtype=torch.bool, device=check.device)
    dead[order.topk(count).indices] = True
    leaves = as_leaves(p.stream(s))
    indices, values = auxk_topk(*leaves, dead, c.auxk, check.impl)
    # only positive pre-activations of dead latents count; entries that fill up a row have value 0
    selection, score = check.selection_judge(), torch.relu(h * dead)
    own_idx, _ = reference.auxk(reference.preactivations(*own_p.stream(s)), dead, c.auxk)
    selection.judge(score, logit_error(check, p64, s, h, selecting=True) * dead, indices, own_idx)
    selection.report(check)
    if selection.invalid:
        return
    near = ((h.abs() < 2 * error) & dead).gather(1, indices)
    dvalues = cotangent(check, indices.shape).masked_fill(near, 0.0)
    note = f"{int(near.sum())} of {near.numel()} entries at relu's border not differentiated" if near.any() else ""

    def dense(tensors):
        inputs = as_leaves(tensors)
        v = torch.relu((reference.preactivations(*inputs) * dead).gather(1, indices))
        return [v, *torch.autograd.grad(v, inputs, dvalues.to(v.dtype))]

    ours = [values, *torch.autograd.grad(values, leaves, dvalues.to(values.dtype))]
    names = ("values", "dx", "dw_enc", "dpre_bias", "dlatent_bias")
    for name, *three in zip(names, ours, dense(p64.stream(s)), dense(own_p.stream(s)), strict=True):
        check.compare(name, *three, note=note)


def judge_update_counters(check: Check) -> None:
    """Judge the counters, moved in place."""
    c, g = check.case, check.generator
    indices = random_latents(check)
    values = torch.randint(0, 4, (c.B, c.k), generator=g, device=check.device).to(acc_dtype(check.dtype)) / 4
    counters = torch.randint(0, 5000, (c.N,), generator=g, device=check.device)
    expected = reference.update_counters(counters, indices, values, 0.5)  # a value of 0.5 has not fired
    returned = update_counters_(counters, indices, values, 0.5)
    check.exact("counters", counters, expected)
    check.add("in place", returned is counters, "exact" if returned is counters else "another tensor was returned")
