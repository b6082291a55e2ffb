"""The training loss: its terms, its metrics, and its gradients, which are made in the forward where that pays."""

from __future__ import annotations

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ._launch import MeansConfig, capability, cdiv, next_power_of_2
from ._ops import may_look, register
from ._triton import INTERPRETED, tl, tl_dtype, triton
from .bias_grads import column_sums
from .decoder import decode_grads, errors_of, grads_of_errors, grads_of_target, target_weights
from .gather import KEEP_NONE, gather_error
from .latent_grads import lists_of

# loss_terms: the loss, and every metric of it, out of the rows' squared errors


@triton.jit
def _means_kernel(
    sq_ptrs, norm_ptr, values_ptr, mean_ptr, part_ptr, B, size, chunk, T: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (target, source): the mean over rows of |E|^2 / |x|^2. Later programs: the sum of one chunk of one source's
    `size` values."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for t in tl.static_range(T):
        if pid // S == t:
            for start in range(0, B, BLOCK):
                mask = start + offs < B
                sq = tl.load(sq_ptrs[t] + (pid % S) * B + start + offs, mask=mask, other=0.0)
                total += sq / tl.load(norm_ptr + t * B + start + offs, mask=mask, other=1.0)
            tl.store(mean_ptr + pid, tl.sum(total, 0) / B)
    if values_ptr is not None:
        if pid >= T * S:
            chunks = tl.cdiv(size, chunk)
            source, first = (pid - T * S) // chunks, ((pid - T * S) % chunks) * chunk
            for start in range(first, first + chunk, BLOCK):
                total += tl.load(values_ptr + source * size + start + offs, mask=start + offs < size, other=0.0)
            tl.store(part_ptr + pid - T * S, tl.sum(total, 0))


@triton.jit
def _terms_kernel(
    mean_ptr, part_ptr, weights_ptr, loss_ptr, terms_ptr, K, rows, chunks, T: tl.constexpr, S: tl.constexpr,
    PAIRS: tl.constexpr, CHUNKS: tl.constexpr, SOURCES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Layout of terms: see `Terms`."""
    pair = tl.arange(0, PAIRS)
    exists = pair < T * S
    own = exists & (pair // S == pair % S)
    nmse = tl.load(mean_ptr + pair, mask=exists, other=0.0)
    weight = tl.load(weights_ptr + pair, mask=exists, other=0.0).to(ACC)
    weighted = tl.where(weight != 0.0, weight * nmse, 0.0)
    crossing = exists & (pair // S != pair % S)
    tl.store(loss_ptr, tl.sum(weighted, 0))
    tl.store(terms_ptr, tl.sum(tl.where(own, nmse, 0.0), 0) / T)
    if T * S > T:
        tl.store(terms_ptr + 1, tl.sum(tl.where(crossing, nmse, 0.0), 0) / (T * S - T))
    else:
        tl.store(terms_ptr + 1, tl.zeros((), ACC))
    tl.store(terms_ptr + 2, tl.sum(tl.where(crossing, weighted, 0.0), 0))
    source = tl.arange(0, SOURCES)
    chunk = tl.arange(0, CHUNKS)
    mask = (source[:, None] < S) & (chunk[None, :] < chunks)
    parts = tl.load(part_ptr + source[:, None] * chunks + chunk[None, :], mask=mask, other=0.0)
    sparsity = tl.sum(parts, 1) / (rows * (tl.full((), K, ACC) + 1e-8))
    tl.store(terms_ptr + 3, tl.sum(sparsity, 0) / S)
    tl.store(terms_ptr + 4, tl.full((), K, ACC))
    tl.store(terms_ptr + 5 + source, sparsity, mask=source < S)
    tl.store(terms_ptr + 5 + S + pair, nmse, mask=exists)


def _means(sqs, norm, values):
    """NMSE of every pair [T * S], and sums of each source's values in `chunks` parts [S * chunks] (none without)."""
    T, (S, B) = len(sqs), sqs[0].shape
    size = 0 if values is None else values[0].numel()
    chunk = 16 if INTERPRETED else 16384
    while cdiv(size, chunk) > 256:
        chunk *= 2
    chunks = cdiv(size, chunk)
    nmse, parts = norm.new_empty(T * S), norm.new_empty(S * chunks)
    _means_kernel[(T * S + S * chunks,)](
        tuple(sq.contiguous() for sq in sqs), norm, values, nmse, parts, B, size, chunk,
        T=T, S=S, BLOCK=16 if INTERPRETED else 1024, ACC=tl_dtype(norm.dtype), num_warps=4,
        **MeansConfig().registers(capability(norm.device)),
    )  # fmt: skip
    return nmse, parts, chunks


def _loss_terms_triton(sqs, norm, weights, values):
    (T, S), (_, B, k) = weights.shape, values.shape
    nmse, parts, chunks = _means(sqs, norm, values.contiguous())
    loss, terms = _loss_terms_fake(sqs, norm, weights, values)
    _terms_kernel[(1,)](
        nmse, parts, weights.contiguous(), loss, terms, k, B, chunks, T=T, S=S, PAIRS=next_power_of_2(T * S),
        CHUNKS=next_power_of_2(chunks), SOURCES=next_power_of_2(S), ACC=tl_dtype(norm.dtype), num_warps=1,
    )  # fmt: skip
    return loss, terms


def _loss_terms_torch(sqs, norm, weights, values):
    S, B, k = values.shape
    nmse = (torch.stack(sqs) / norm[:, None]).mean(2)
    weighted = torch.where(weights != 0, weights * nmse, 0.0)
    loss, own = weighted.sum(), nmse.diagonal().mean()
    cross, scaled = nmse.new_zeros(2)
    if S > 1:  # off the diagonal: all but the first of S + 1 columns
        cross, scaled = (m.flatten()[1:].view(S - 1, S + 1)[:, :-1] for m in (nmse, weighted))
        cross, scaled = cross.mean(), scaled.sum()
    sparsity = values.sum((1, 2), dtype=norm.dtype) / (B * (k + 1e-8))
    few = torch.stack([own, cross, scaled, sparsity.mean(), own.new_full((), k)])
    return loss, torch.cat([few, sparsity, nmse.flatten()])


def _loss_terms_fake(sqs, norm, weights, values):
    T, S = weights.shape
    return norm.new_empty(()), norm.new_empty(5 + S + T * S)


loss_terms = register(
    "loss_terms",
    "(Tensor[] sqs, Tensor norm, Tensor weights, Tensor values, str impl) -> (Tensor, Tensor)",
    torch_impl=_loss_terms_torch,
    triton_impl=_loss_terms_triton,
    fake=_loss_terms_fake,
)
loss_terms.__doc__ = """sum_ts weights[t, s] NMSE[t, s], and what a training step reports of it.

Args: sqs: |E|^2 [S, B] of each of T = S targets.  norm: |x|^2 [T, B].  weights: [T, S].  values: [S, B, k].  impl.

Returns: the loss []; the metrics in one tensor [5 + S + T S], read through `Terms`.
"""


class Terms:
    """Names for what `loss_terms` returns; each is a view."""

    def __init__(self, terms: torch.Tensor, S: int):
        self.avg_self, self.avg_cross, self.avg_cross_scaled, self.avg_l1, self.k = terms[:5].unbind()
        self.l1 = terms[5 : 5 + S].unbind()  # mean_b sum_j values / (k + 1e-8), of each source
        self.nmse = [row.unbind() for row in terms[5 + S :].view(-1, S).unbind()]  # [t][s]


# add_auxk: AuxK's terms, its part of the loss, and the weight of its gradient


@triton.jit
def _auxk_kernel(mean_ptr, loss_ptr, total_ptr, terms_ptr, weight_ptr, high, low, T: tl.constexpr, PAD: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    coef = tl.full((), high, ACC) + tl.full((), low, ACC)
    target = tl.arange(0, PAD)
    own = tl.load(mean_ptr + target, mask=target < T, other=0.0)
    mean = tl.sum(own, 0) / T
    counts = mean > 0.0  # not for NaN
    mean = tl.where(counts, mean, 0.0)
    tl.store(total_ptr, tl.load(loss_ptr) + coef * mean)
    tl.store(terms_ptr, mean)
    tl.store(terms_ptr + 1, coef * mean)
    tl.store(terms_ptr + 2 + target, own, mask=target < T)
    tl.store(weight_ptr + target, tl.zeros((PAD,), ACC) + tl.where(counts, coef / T, 0.0), mask=target < T)


def _add_auxk_triton(sqs, norm, loss, coef):
    T, single = len(sqs), float(np.float32(coef))
    nmse, _, _ = _means(sqs, norm, None)
    total, terms, weight = _add_auxk_fake(sqs, norm, loss, coef)
    # Triton rounds numbers to float32; the rest of them matters in the float64 of the interpreter
    _auxk_kernel[(1,)](
        nmse, loss, total, terms, weight, single, coef - single, T=T, PAD=next_power_of_2(T),
        ACC=tl_dtype(norm.dtype), num_warps=1,
    )  # fmt: skip
    return total, terms, weight


def _add_auxk_torch(sqs, norm, loss, coef):
    own = (torch.cat(list(sqs)) / norm).mean(1)
    mean = own.mean()
    mean = torch.where(mean > 0, mean, 0.0)
    weight = ((mean > 0).to(norm.dtype) * (coef / len(sqs))).repeat(len(sqs), 1)
    return loss + coef * mean, torch.cat([torch.stack([mean, coef * mean]), own]), weight


def _add_auxk_fake(sqs, norm, loss, coef):
    return norm.new_empty(()), norm.new_empty(2 + len(sqs)), norm.new_empty(len(sqs), 1)


add_auxk = register(
    "add_auxk",
    "(Tensor[] sqs, Tensor norm, Tensor loss, float coef, str impl) -> (Tensor, Tensor, Tensor)",
    torch_impl=_add_auxk_torch,
    triton_impl=_add_auxk_triton,
    fake=_add_auxk_fake,
)
add_auxk.__doc__ = """loss + coef * mean_t AuxK[t]; the mean counts as 0 unless it is > 0 (so also when it is NaN).

Args: sqs: |E|^2 [1, B] of each of T streams' AuxK reconstructions.  norm: |residual|^2 [T, B].  loss: [].  coef, impl.

Returns: the total []; mean, coef * mean and the T terms, [2 + T]; the weights [T, 1] of the terms in the total.
"""


# scale_


@triton.jit
def _scale_kernel(x_ptrs, sizes, factor_ptr, T: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # the usual backward() costs no pass over the gradients
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for t in tl.static_range(T):
            for start in range(first, sizes[t], step):
                offs = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptrs[t] + offs, mask=offs < sizes[t], other=0.0)
                tl.store(x_ptrs[t] + offs, (x * factor).to(x_ptrs[t].dtype.element_ty), mask=offs < sizes[t])


def _scale_triton(xs, factor):
    block, sizes = 4096, tuple(x.numel() for x in xs)
    # enough programs to fill a GPU: most steps they only look at the factor
    _scale_kernel[(min(cdiv(max(sizes), block), 2048),)](tuple(xs), sizes, factor, T=len(xs), BLOCK=block, num_warps=8)


def _scale_torch(xs, factor):
    if not may_look(factor) or factor != 1:
        for x in xs:
            x.mul_(factor.to(x.dtype))


scale_ = register(
    "scale_",
    "(Tensor(a!)[] xs, Tensor factor, str impl) -> ()",
    torch_impl=_scale_torch,
    triton_impl=_scale_triton,
    fake=lambda xs, factor: None,
)
scale_.__doc__ = """Multiply contiguous tensors by a number that stays on the device, in place; 1 costs nothing."""


class AlignedLoss(torch.autograd.Function):
    """The loss over all targets: sum_ts weights[t, s] NMSE(R[t, s], x_t), and auxk_coef times the mean of AuxK's terms,
    which is left out when it is not > 0 (so also when it is NaN).

    The weights are known, so the gradient is taken in the forward, in the one pass over the gathered rows that makes
    the errors; the backward only scales it. Not done where it would not pay or not be exact: without gradients, where a
    target has one itself, under torch.compile (whose graphs cannot use a buffer up), and in float16, where a gradient
    has to be scaled before it is rounded. Then the backward makes the errors again. `ahead` False forbids it: inside,
    nothing tells whether gradients are wanted.

    Takes values [S, B, k], AuxK's values [T, B, auxk] or None, and flat: the InverseIndex [1 or S, ...] of `indices`
    (parts of None when nobody needs it); with AuxK its indices [T, B, auxk], their count [T] and their InverseIndex;
    then w_decs, pre_biases and xs of the T targets.

    Returns: the loss; without gradient the metrics as `loss_terms` lays them out, and those of `add_auxk` (None without
    AuxK).
    """

    @staticmethod
    def forward(ctx, values, aux_values, weights, auxk_coef, ahead, impl, indices, T, *tensors):
        ctx.set_materialize_grads(False)
        t = _LossTensors(tensors, T, aux_values is not None)
        needs = ctx.needs_input_grad[8 + len(tensors) - 3 * T :]
        need_w, need_x = needs[:T], needs[2 * T :]
        ahead = ahead and (ctx.needs_input_grad[0] or any(need_w)) and not any(need_x)
        ahead = ahead and t.w_decs[0].dtype != torch.float16 and not torch.compiler.is_compiling()
        norm, coef = target_weights(t.xs, weights, impl)
        sqs, errors, dws, gs, aux_gs = [], [], [None] * T, [], []
        dvalues = torch.empty_like(values, memory_format=torch.contiguous_format) if ahead else None
        for i in range(T):
            rows, keep = t.w_decs[i].t(), KEEP_NONE if aux_values is None else i
            if ahead:
                if need_w[i]:
                    dws[i] = torch.empty_like(rows, memory_format=torch.contiguous_format)
                sq, g, error = grads_of_target(
                    indices, values, rows, t.pre_biases[i], t.xs[i], coef[i], t.inverse, None, keep, dvalues, i > 0,
                    dws[i], False, impl,
                )  # fmt: skip
                gs.append(g)
            else:
                sq, error = errors_of(indices, values, rows, t.pre_biases[i], t.xs[i], keep, None, impl)
            sqs.append(sq)
            errors.append(error)
        loss, terms = loss_terms(sqs, norm, weights, values, impl)
        aux_terms = aux_weights = daux = None
        if aux_values is not None:
            residuals = [residual(b, e) for b, e in zip(t.pre_biases, errors, strict=True)]
            norm, _ = target_weights(residuals, weights[:, :1], impl)
            sqs = [
                gather_error(
                    t.aux_indices[i], aux_values[i : i + 1], t.w_decs[i].t(), t.pre_biases[i], residuals[i], KEEP_NONE,
                    t.aux_count[i], impl,
                )[0]
                for i in range(T)
            ]  # fmt: skip
            loss, aux_terms, aux_weights = add_auxk(sqs, norm, loss, auxk_coef, impl)
            if ahead:
                daux = torch.empty_like(aux_values, memory_format=torch.contiguous_format)
                _, coef = target_weights(residuals, aux_weights, impl)
                for i in range(T):
                    one = slice(i, i + 1)
                    _, g, _ = decode_grads(
                        t.aux_indices[i], aux_values[one], t.w_decs[i].t(), t.pre_biases[i], residuals[i], coef[i],
                        *lists_of(t.aux_inverse, i), t.aux_count[i], KEEP_NONE, daux[one], False, dws[i], True, impl,
                    )  # fmt: skip
                    aux_gs.append(g)
            ctx.mark_non_differentiable(aux_terms)
        ctx.mark_non_differentiable(terms)
        kept = [] if aux_values is None else errors
        made = (dvalues, daux, *dws, *column_sums(gs, aux_gs, t.pre_biases, impl)) if ahead else ()
        ctx.save_for_backward(values, aux_values, weights, aux_weights, indices, *tensors, *kept, *made)
        ctx.ahead, ctx.impl, ctx.sizes = ahead, impl, (T, len(tensors), len(kept))
        return loss, terms, aux_terms

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        (T, n, n_kept), impl = ctx.sizes, ctx.impl
        if dloss is None:  # nothing came from above
            return (None,) * (8 + n)
        values, aux_values, weights, aux_weights, indices, *rest = ctx.saved_tensors
        t = _LossTensors(rest[:n], T, aux_values is not None)
        errors, made = rest[n : n + n_kept], rest[n + n_kept :]
        need_v, need_aux = ctx.needs_input_grad[:2]
        needs = ctx.needs_input_grad[8 + n - 3 * T :]
        daux, dws, dbs, dxs = None, [None] * T, [None] * T, [None] * T
        if ctx.ahead:
            ctx.ahead = False  # the buffers are given away: a second backward makes its own
            made = [None if m is None else m.data for m in made]  # and need not mind that they change in place
            scale_([m for m in made if m is not None], dloss, impl)
            dvalues, daux, *made = made
            dws = [None if dw is None else dw.t() for dw in made[:T]]
            dbs = [made[T + i] if needs[T + i] else None for i in range(T)]
        else:
            dvalues, dauxs = None, []
            for i in range(T):
                wanted = needs[i : 3 * T : T]
                dv, dws[i], dbs[i], dxs[i] = grads_of_errors(
                    values, t.w_decs[i], t.pre_biases[i], t.xs[i], indices, t.inverse, None, weights[i] * dloss,
                    (need_v, *wanted), impl,
                )  # fmt: skip
                dvalues = dv if dvalues is None else dvalues + dv
                if aux_values is not None:
                    target, into = residual(t.pre_biases[i], errors[i]), None if dws[i] is None else dws[i].t()
                    dv, dws[i], db, dx = grads_of_errors(
                        aux_values[i : i + 1], t.w_decs[i], t.pre_biases[i], target, t.aux_indices[i],
                        [part[i : i + 1] for part in t.aux_inverse], t.aux_count[i], aux_weights[i] * dloss,
                        (need_aux, *wanted), impl, into=into,
                    )  # fmt: skip
                    dauxs.append(dv)
                    dbs[i] = None if db is None else dbs[i] + db
                    dxs[i] = None if dx is None else dxs[i] + dx  # x stands in the residual as it is
            daux = torch.cat(dauxs) if need_aux else None
        return dvalues if need_v else None, daux, *[None] * (6 + n - 3 * T), *dws, *dbs, *dxs


class _LossTensors:
    """The flat tensors of an AlignedLoss by name."""

    def __init__(self, tensors, T, with_aux):
        self.inverse = tensors[:3]
        n = len(tensors)
        self.w_decs, self.pre_biases, self.xs = (tensors[i : i + T] for i in range(n - 3 * T, n, T))
        if with_aux:
            self.aux_indices, self.aux_count, *self.aux_inverse = tensors[3:8]


def residual(pre_bias, error):
    """AuxK's target x - R + b, held constant: the bias less the error of the target's own reconstruction."""
    return pre_bias - error.to(pre_bias.dtype)
