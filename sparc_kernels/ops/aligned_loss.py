"""The training loss as one autograd function; its gradients are made in the forward where that pays."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .bias_grads import column_sums
from .decode import errors_of
from .decode_grads import decode_grads, grads_of_errors, grads_of_target, target_weights
from .gather import KEEP_NONE, gather_error
from .inverse_index import lists_of
from .loss_terms import add_auxk, loss_terms, scale_


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
