"""Checks of `sparc-kernels verify` for each operator; criteria and data are in `judge.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ... import reference
from ...core.numerics import acc_dtype
from ...nn.module import AlignedSAE
from ...ops.adam import BEFORE, PLAIN, adam_stream_
from ...ops.dead import auxk_topk, update_counters_
from ...ops.decode import decode, decode_nmse
from ...ops.encode import encode_topk, values_at
from ...ops.inverse_index import inverse_index
from ...ops.latent_adam import latent_adam_
from ...ops.latent_reduce import latent_reduce
from ...ops.records import WeightedLists
from .judge import (
    F64,
    Case,
    Check,
    Problem,
    Tensor,
    as_leaves,
    generic,
    integers,
    logit_error,
    margin_problem,
    random_latents,
)


def judge_encode(check: Check, topk_type: str) -> None:
    """Judge selection and values of `encode_topk`.

    Args:
        check: gives the case; takes the results.
        topk_type: "global" or "local".
    """
    c, p = check.case, check.problem(generic)
    indices, values = encode_topk(*p.encoder, c.k, topk_type, check.impl)
    S = len(c.dims)
    selection = _Selection(c.N)
    truths, owns = [], []
    for rows in torch.arange(c.B).split(max(1, 2**25 // c.N)):  # bounds the memory of dense logits
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        block = p.rows(part)
        block64 = block.to(F64)
        hs, own = block64.logits(), check.own(block).logits()
        idx = indices[..., part, :]
        own_idx = reference.select(own, c.k, topk_type)
        errors = [logit_error(check, block64, s, h, selecting=True) for s, h in enumerate(hs)]
        selection.judge_streams(hs, errors, idx, own_idx, torch.finfo(check.dtype).eps / 2, part.start)
        if selection.invalid:
            break
        truths.append([torch.relu(h.gather(1, reference.of_stream(idx, s))) for s, h in enumerate(hs)])
        owns.append([torch.relu(h.gather(1, reference.of_stream(idx, s))) for s, h in enumerate(own)])
    selection.report(check)
    if not selection.invalid:
        for s in range(S):
            truth, own = (torch.cat([part[s] for part in parts]) for parts in (truths, owns))
            check.compare(f"values[{s}]", values[s], truth, own)


class _Selection:
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

    def judge_streams(self, hs, errors, idx: Tensor, own_idx: Tensor, unit: float, row0: int = 0) -> None:
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


def _exact(check: Check) -> None:
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


def _values_at(check: Check) -> None:
    c, p = check.case, check.problem(generic)
    indices = random_latents(check)
    p64, own_p = p.to(F64), check.own(p)
    names = ("dx", "dw_enc", "dpre_bias", "dlatent_bias")
    for s in range(min(len(c.dims), 2)):
        with torch.no_grad():
            h = reference.preactivations(*p64.stream(s))
            near = (h.abs() < 2 * logit_error(check, p64, s, h)).gather(1, indices)
        # where rounding may decide relu's side either derivative is correct: the cotangent is 0 there
        dvalues = _cotangent(check, indices.shape).masked_fill(near, 0.0)
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


def _cotangent(check: Check, shape, wide: bool = True) -> Tensor:
    """Random upstream gradient with values exact in the dtype; `wide`: stored in the accumulator's dtype.

    Its mean is not 0, since sums that cancel would be rounding only.
    """
    g = (torch.randn(*shape, generator=check.generator, device=check.device) + 0.5).to(check.dtype)
    return g.to(acc_dtype(check.dtype)) if wide else g


def _codes(check: Check, local: bool) -> tuple[Tensor, Tensor]:
    """Indices [B, k] or [S, B, k] and non-negative values [S, B, k] with zeros among them."""
    c = check.case
    indices = random_latents(check, len(c.dims) if local else 0)
    if c.name == "tiny":
        indices[..., 0, 1] = indices[..., 0, 0]  # a latent twice in a row adds up
    return indices, torch.relu(_cotangent(check, (len(c.dims), c.B, c.k)))


def _decode(check: Check, local: bool) -> None:
    c, p = check.case, check.problem(generic)
    indices, values = _codes(check, local)
    S = len(c.dims)
    pairs = [(t, s) for t in range(S) for s in range(S)]
    upstream = [_cotangent(check, (S, c.B, d), wide=False) for d in c.dims]

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


def _decode_nmse(check: Check, local: bool) -> None:
    c, p = check.case, check.problem(generic)
    indices, values = _codes(check, local)
    S = len(c.dims)
    scale = _scale(check)
    upstream = (_cotangent(check, (S, S)).abs() + 0.5) * scale

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


def _scale(check: Check) -> float:
    """Loss scale as a gradient scaler would choose it; 2 / (B d) alone is below fp16's normal numbers."""
    return 2.0 ** min(round(math.log2(check.case.B * max(check.case.dims))), 12)


def _inverse_index(check: Check) -> None:
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


def _latent_reduce(check: Check) -> None:
    c = check.case
    indices = random_latents(check)
    S, d = len(c.dims), c.dims[0]
    coef = _cotangent(check, (S, c.B, c.k))
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


ADAM = (0.9, 0.99, 1e-8)  # betas and eps
SCALARS = (
    0.01,
    1.5,
    0.999,
    0.5,
    1.0,
)  # as `adam_scalars_` writes them: step size, 1 / sqrt(correction), decay, scale, go


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


def _adam(check: Check) -> None:
    """SparcAdam's step of one stream in the official order, from gradients in memory."""
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


def _latent_adam(check: Check) -> None:
    """The same step from latent lists, for an encoder with its latent bias and for a decoder."""
    c, d, S = check.case, check.case.dims[0], len(check.case.dims)
    inverse = inverse_index(indices := random_latents(check), c.N)
    acc = acc_dtype(check.dtype)
    coef = _cotangent(check, (S, c.B, c.k))
    mat = torch.randn(S, c.B, d, generator=check.generator, device=check.device).to(check.dtype)
    (w, b), _, (m, b_m), (v, b_v) = _adam_tensors(check, (c.N, d), (c.N,))
    scalars = torch.tensor(SCALARS, device=check.device, dtype=acc)

    def dense(dtype, unit):
        codes = [reference.codes(indices, x.to(dtype), c.N) for x in coef]
        rows, sums = sum(a.T @ x.to(dtype) for a, x in zip(codes, mat, strict=True)), sum(codes).sum(0)
        ours = _adam_reference(w.to(dtype), rows, m.to(dtype), v.to(dtype), unit)
        bias = () if unit else _adam_reference(b.to(dtype), sums, b_m.to(dtype), b_v.to(dtype), False)
        return [*ours, *bias, *(() if unit else (sums @ w.to(dtype),))]

    for unit, name in ((False, "encoder"), (True, "decoder")):
        updated = [t.clone() for t in (w, m, v)]
        bias = [] if unit else [t.clone() for t in (b, b_m, b_v)]
        lists, mode = [*inverse, coef, None, None, mat], BEFORE if unit else PLAIN
        dpre_bias_sum = latent_adam_(
            *updated, None, bias, scalars, scalars, lists, c.k, [], 0, mode, *ADAM, check.resolved,
        )  # fmt: skip
        parts = ("", " exp_avg", " exp_avg_sq", " bias", " bias exp_avg", " bias exp_avg_sq", " for pre_bias")
        ours = [*updated, *bias, *(() if unit else (dpre_bias_sum,))]
        truth, own = dense(F64, unit), dense(check.own_dtype, unit)
        for part, *three in zip(parts[: len(ours)], ours, truth, own, strict=True):
            check.compare(name + part, *three)


def _auxk_topk(check: Check, how_many: str) -> None:
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
    selection, score = _Selection(c.N), torch.relu(h * dead)
    own_idx, _ = reference.auxk(reference.preactivations(*own_p.stream(s)), dead, c.auxk)
    selection.judge(score, logit_error(check, p64, s, h, selecting=True) * dead, indices, own_idx)
    selection.report(check)
    if selection.invalid:
        return
    near = ((h.abs() < 2 * error) & dead).gather(1, indices)
    dvalues = _cotangent(check, indices.shape).masked_fill(near, 0.0)
    note = f"{int(near.sum())} of {near.numel()} entries at relu's border not differentiated" if near.any() else ""

    def dense(tensors):
        inputs = as_leaves(tensors)
        v = torch.relu((reference.preactivations(*inputs) * dead).gather(1, indices))
        return [v, *torch.autograd.grad(v, inputs, dvalues.to(v.dtype))]

    ours = [values, *torch.autograd.grad(values, leaves, dvalues.to(values.dtype))]
    names = ("values", "dx", "dw_enc", "dpre_bias", "dlatent_bias")
    for name, *three in zip(names, ours, dense(p64.stream(s)), dense(own_p.stream(s)), strict=True):
        check.compare(name, *three, note=note)


def _update_counters(check: Check) -> None:
    c, g = check.case, check.generator
    indices = random_latents(check)
    values = torch.randint(0, 4, (c.B, c.k), generator=g, device=check.device).to(acc_dtype(check.dtype)) / 4
    counters = torch.randint(0, 5000, (c.N,), generator=g, device=check.device)
    expected = reference.update_counters(counters, indices, values, 0.5)  # a value of 0.5 has not fired
    returned = update_counters_(counters, indices, values, 0.5)
    check.exact("counters", counters, expected)
    check.add("in place", returned is counters, "exact" if returned is counters else "another tensor was returned")


DEAD_STEPS = 10


def _training_step(check: Check, topk_type: str) -> None:
    """Loss, metrics, counters and every parameter's gradient, AuxK included; two steps must give the same bits."""
    c, p = check.case, check.problem(margin_problem)
    S = len(c.dims)
    streams = [f"s{s}" for s in range(S)]
    scale = _scale(check)
    with torch.random.fork_rng(devices=[check.device] if check.device.type == "cuda" else []):
        model = AlignedSAE(
            dict(zip(streams, c.dims, strict=True)), c.N, c.k, auxk=c.auxk, dead_steps_threshold=DEAD_STEPS,
            topk_type=topk_type, impl=check.impl, device=check.device, dtype=check.dtype,
        )  # fmt: skip
    counters = torch.where(p.quiet, DEAD_STEPS + 5, 3)
    parameters = {
        "dw_enc": [model.encoders[s].weight for s in streams],
        "dw_dec": [model.decoders[s].weight for s in streams],
        "dpre_bias": [model.pre_biases[s] for s in streams],
        "dlatent_bias": [model.latent_biases[s] for s in streams],
    }
    buffers = [getattr(model, f"stats_last_nonzero_{s}") for s in streams]
    with torch.no_grad():
        wanted = (p.w_encs, p.w_decs, p.pre_biases, p.latent_biases)
        for group, tensors in zip(parameters.values(), wanted, strict=True):
            for parameter, tensor in zip(group, tensors, strict=True):
                parameter.copy_(tensor)
    inputs = dict(zip(streams, p.xs, strict=True))

    def step():
        for buffer in buffers:
            buffer.copy_(counters)
        model.zero_grad(set_to_none=True)
        outputs = model(inputs)
        loss, metrics = model.compute_loss(outputs, inputs)
        (loss * scale).backward()
        return outputs, metrics, [loss.detach(), *(q.grad for group in parameters.values() for q in group)]

    outputs, metrics, first = step()
    if not check.interpreted:
        _, _, second = step()
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        check.add("twice", same, "exact" if same else "two runs gave different bits")

    indices = outputs.indices
    selection, p64, own_p = _Selection(c.N), p.to(F64), check.own(p)
    hs = p64.logits()
    errors = [logit_error(check, p64, s, h, selecting=True) for s, h in enumerate(hs)]
    own_hs = own_p.logits()
    own_idx = reference.select(own_hs, c.k, topk_type)
    selection.judge_streams(hs, errors, indices, own_idx, torch.finfo(check.dtype).eps / 2)
    selection.report(check)
    if selection.invalid:
        return

    after = []
    for s, (h, buffer) in enumerate(zip(hs, buffers, strict=True)):
        idx = reference.of_stream(indices, s)
        after.append(reference.update_counters(counters, idx, torch.relu(h.gather(1, idx)), 1e-3))
        check.exact(f"counters[{s}]", buffer, after[s])
    dead = [(counters if topk_type == "local" else a) > DEAD_STEPS for a in after]  # global reads them after the update
    auxk_indices = [outputs[f"auxk_indices_{s}"] for s in streams]
    aux_selection = _Selection(c.N)
    for s in range(S):
        own_aux, _ = reference.auxk(own_hs[s], dead[s], c.auxk)
        aux_selection.judge(torch.relu(hs[s] * dead[s]), errors[s] * dead[s], auxk_indices[s], own_aux)
    aux_selection.report(check, "auxk selection")
    if aux_selection.invalid:
        return

    truth_terms, truth_grads = reference_step(p64, c, indices, auxk_indices, dead, scale)
    own_terms, own_grads = reference_step(own_p, c, indices, auxk_indices, dead, scale)
    missing = {name for names in _metric_names(streams).values() for name in names} ^ set(metrics)
    check.add("metric names", not missing, f"missing or unexpected: {sorted(missing)}" if missing else "exact")
    for term, names in _metric_names(streams).items():
        if names and not missing:
            ours = torch.stack([metrics[name] for name in names])
            size = truth_terms[term].abs() if term == "averages" else 1.0  # averages differ in size: relative to each
            check.compare(term, ours / size, truth_terms[term] / size, own_terms[term] / size)
    check.compare("loss", first[0], truth_terms["averages"][-1], own_terms["averages"][-1])
    names = [f"{name}[{s}]" for name in parameters for s in range(S)]
    for name, *three in zip(names, first[1:], truth_grads, own_grads, strict=True):
        check.compare(name, *three)


def _metric_names(streams: list[str]) -> dict[str, list[str]]:
    cross = [f"cross_loss_{t}_from_{s}" for t in streams for s in streams if s != t]
    averages = ["avg_mse_loss", "avg_num_active_neurons", "avg_l1_sparsity", "avg_auxk_loss", "avg_auxk_loss_scaled"]
    averages += ["avg_cross_loss", "avg_cross_loss_scaled"] if cross else []
    return {
        **{name: [f"{name}_{s}" for s in streams] for name in ("mse_loss", "auxk_loss", "l1_sparsity")},
        "num_active": [f"num_active_neurons_{s}" for s in streams],
        "cross_loss": cross,
        "averages": [*averages, "total_loss"],
    }


def reference_step(p: Problem, c: Case, indices, auxk_indices, dead, scale):
    """Compute terms and gradients of a training step by the dense reference, in the dtype of p.

    Args:
        p: problem.
        c: its case.
        indices: selected latents, [B, k] or [S, B, k].
        auxk_indices: AuxK's of each stream, [B, auxk].
        dead: bool [N] of each stream.
        scale: of the loss, for the gradients.

    Returns:
        {term: values}, and gradients of w_encs, w_decs, pre_biases and latent_biases, each of S streams.
    """
    S = len(c.dims)
    groups = [as_leaves(group) for group in (p.w_encs, p.w_decs, p.pre_biases, p.latent_biases)]
    loss = reference.training_loss(
        p.xs, *groups, c.k, auxk_k=c.auxk, dead=dead, indices=indices, auxk_indices=auxk_indices
    )
    grads = torch.autograd.grad(loss * scale, [t for group in groups for t in group])
    with torch.no_grad():
        hs = p.logits()
        values = torch.stack([torch.relu(h.gather(1, reference.of_stream(indices, s))) for s, h in enumerate(hs)])
        matrix = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
        aux = []
        for s, h in enumerate(hs):
            recon = reference.decode_one(reference.of_stream(indices, s), values[s], p.w_decs[s], p.pre_biases[s])
            u = torch.relu((h * dead[s]).gather(1, auxk_indices[s]))
            aux.append(reference.auxk_nmse(p.xs[s], recon, auxk_indices[s], u, p.w_decs[s], p.pre_biases[s]))
        aux = torch.stack(aux)
        l1 = values.sum(2).div(c.k + 1e-8).mean(1)
        k = torch.full_like(l1, c.k)
        cross = matrix[~torch.eye(S, dtype=torch.bool, device=matrix.device)]
        averages = [matrix.diagonal().mean(), k[0], l1.mean(), aux.mean(), aux.mean() / 32]
        averages += [cross.mean()] * 2 if S > 1 else []
        averages = torch.stack([*averages, loss])
    terms = {"mse_loss": matrix.diagonal(), "auxk_loss": aux, "l1_sparsity": l1, "num_active": k, "cross_loss": cross}
    return {**terms, "averages": averages}, grads


def _int64_offsets(check: Check) -> None:
    """Decode with more than 2^31 decoder entries, read and written at the far end."""
    c, g = check.case, check.generator
    d = c.dims[0]
    w = torch.empty(c.N, d, dtype=check.dtype, device=check.device).normal_(generator=g)
    indices = random_latents(check)
    indices[:, 0], indices[0, 1] = c.N - 1, c.N - 2
    values = _cotangent(check, (1, c.B, c.k)).abs() + 0.1
    bias = torch.randn(d, generator=g, device=check.device).to(check.dtype)
    upstream = _cotangent(check, (c.B, d), wide=False)
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


# name, its word in Case.ops, function
OPERATOR_CHECKS: list[tuple[str, str, Callable[[Check], None]]] = [
    ("encode_topk global", "encode", partial(judge_encode, topk_type="global")),
    ("encode_topk local", "encode", partial(judge_encode, topk_type="local")),
    ("exact selection", "exact", _exact),
    ("values_at", "values", _values_at),
    ("decode global", "decode", partial(_decode, local=False)),
    ("decode local", "decode", partial(_decode, local=True)),
    ("decode_nmse global", "nmse", partial(_decode_nmse, local=False)),
    ("decode_nmse local", "nmse", partial(_decode_nmse, local=True)),
    ("inverse_index", "index", _inverse_index),
    ("latent_reduce", "reduce", _latent_reduce),
    ("adam", "reduce", _adam),
    ("adam of lists", "reduce", _latent_adam),
    *((f"auxk_topk {n}", "auxk", partial(_auxk_topk, how_many=n)) for n in ("none", "few", "many")),
    ("update_counters_", "counters", _update_counters),
    ("training global", "train", partial(_training_step, topk_type="global")),
    ("training local", "train", partial(_training_step, topk_type="local")),
    ("decode int64", "int64", _int64_offsets),
]
