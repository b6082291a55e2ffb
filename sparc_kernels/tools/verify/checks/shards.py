"""Checks of what shards of the latents need: merged candidates; values, sums and dots without the others' latents."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .... import reference
from ....core.numerics import acc_dtype
from ....ops.dead import dead_first
from ....ops.encode import centre, gather_values
from ....ops.gather import gather_dot, gather_sum
from ....ops.selection import keys_dtype, select_each_keys, select_keys, topk_positions
from ..judge import F64, Check
from ..problems import cotangent, generic, integers, local_ids, random_latents, shard_blocks

SHARDS = 3


def judge_shard_selection(check: Check) -> None:
    """Judge the candidates of several shards, merged by their keys, on integers with infinity and NaN."""
    p = check.problem(integers)
    odd = replace(p, latent_biases=[b.clone() for b in p.latent_biases])
    for place, value in ((1, -math.inf), (2, math.inf), (3, math.nan), (check.case.N - 1, math.inf)):
        odd.latent_biases[0][place] = value
    for what, problem, local in (("global", p, False), ("local", p, True), ("inf, NaN biases", odd, False)):
        hs = problem.to(F64).logits()
        expected = reference.select(hs, check.case.k, "local" if local else "global")
        latents, keys = _merged(check, problem, check.case.k, local)
        check.exact(what, latents, expected)
        logits = torch.stack(hs) if local else sum(hs)
        check.exact(f"{what} keys", keys, logits.gather(-1, expected))
    dead = torch.arange(check.case.N, device=check.device) % 3 != 0
    _, keys = _merged(check, p, check.case.auxk, True, dead)
    among = torch.stack(p.to(F64).logits()).masked_fill(~dead, -math.inf)
    check.exact("auxk keys", keys, among.topk(check.case.auxk).values)


def _merged(check, p, k, local, dead=None):
    """Latents and keys [B, k], or [S, B, k] of every stream: the candidates of the shards, merged; among the dead."""
    S, ids, keys = len(p.xs), [], []
    for low, high in shard_blocks(check.case.N, SHARDS):
        w_encs, biases = ([t[low:high] for t in group] for group in (p.w_encs, p.latent_biases))
        few, lead, listed = min(k, high - low), (S,) if local else (), (None, None)
        key = torch.empty(*lead, check.case.B, few, device=check.device, dtype=keys_dtype(check.dtype, check.resolved))
        if dead is not None:
            listed = dead_first([dead[low:high]] * S, 0, check.resolved)[:2]
        if few:
            op = select_each_keys if local else select_keys
            ids.append(low + op(p.xs, w_encs, biases, few, *listed, key, check.resolved))
            keys.append(key)
    latents, candidates = torch.cat(ids, -1), torch.cat(keys, -1)
    at = topk_positions(candidates.flatten(0, -2), k, check.resolved).view(*candidates.shape[:-1], k)
    return latents.gather(-1, at), candidates.gather(-1, at)


def judge_shard_values(check: Check) -> None:
    """Judge values, sums and dots of the shards' own latents, added up over the shards."""
    c, p = check.case, check.problem(generic)
    indices, acc, S = random_latents(check), acc_dtype(check.dtype), len(c.dims)
    coef = cotangent(check, (S, c.B, c.k)).to(acc)
    centred = centre(p.xs, p.pre_biases, False, check.resolved)
    values, sums, dots = [], [], []
    for low, high in shard_blocks(c.N, SHARDS):
        if low < high:
            own, part = local_ids(indices, low, high), slice(low, high)
            w_encs, biases = ([t[part] for t in group] for group in (p.w_encs, p.latent_biases))
            values.append(gather_values(own, centred, w_encs, biases, None, False, check.resolved)[0])
            rows = p.w_decs[0].t()[part]
            sums.append(gather_sum(own, coef, rows, None, True, check.resolved))
            dots.append(gather_dot(own, rows, p.xs[0][None], None, check.resolved))
    ours = sum(values), sum(sums), sum(dots)

    def dense(p, dtype):
        hs = [torch.relu(h.gather(1, indices)) for h in p.logits()]
        rows = p.w_decs[0].t()
        codes = [reference.codes(indices, x.to(dtype), c.N) for x in coef]
        return torch.stack(hs), torch.stack([x @ rows for x in codes]), (p.xs[0] @ rows.t()).gather(1, indices)[None]

    truth, plain = dense(p.to(F64), F64), dense(check.own(p), check.own_dtype)
    for name, *three in zip(("values", "sums", "dots"), ours, truth, plain, strict=True):
        check.compare(name, *three)
