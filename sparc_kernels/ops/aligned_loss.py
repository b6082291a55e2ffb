"""The training loss over all targets, with gradients: one function for `compute_loss` and `training_step`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .bias_grads import column_sums
from .decode import errors_of
from .decode_grads import grads_of_errors, grads_of_target, target_weights
from .inverse_index import NO_INVERSE, InverseIndex
from .loss_terms import add_auxk, loss_terms, scale_
from .records import DecodeTarget, GradOut, SparseCodes


@dataclass
class LossResult:
    """The loss, and what its gradients are or can be made of. T targets, S sources."""

    loss: torch.Tensor  # []
    terms: torch.Tensor  # metrics as `loss_terms` lays them out
    aux_terms: torch.Tensor | None = None  # as `add_auxk` does
    aux_weights: torch.Tensor | None = None  # [T, 1], 0 where AuxK is left out
    errors: list[torch.Tensor] = field(default_factory=list)  # of each target: its own [B, d] or all [S, B, d]
    coef: torch.Tensor | None = None  # [T, S, B], dloss/dE over E
    aux_errors: list[torch.Tensor] = field(default_factory=list)  # [1, B, d] each, where all errors are kept
    aux_coef: torch.Tensor | None = None  # [T, 1, B]
    dvalues: torch.Tensor | None = None  # [S, B, k]
    daux: torch.Tensor | None = None  # [T, B, auxk]
    dws: list[torch.Tensor | None] = field(default_factory=list)  # [N, d] each
    dbiases: list[torch.Tensor] = field(default_factory=list)  # [d] each


class Gradients(NamedTuple):
    """Which gradients `losses_and_gradients` makes beside those of the values and of the decoders' biases."""

    weights: list[bool]  # of which targets, as dense tensors
    bias_like: list[torch.Tensor] | None  # tensors in whose dtypes the biases' are wanted; None: the accumulator's
    keep_errors: bool = False  # keep every error instead, from which an update of the weights can be made


def losses_and_gradients(
    codes: SparseCodes,
    aux: SparseCodes | None,
    targets: list[DecodeTarget],
    weights: torch.Tensor,
    auxk_coef: float,
    *,
    gradients: Gradients | None,
    impl: str,
) -> LossResult:
    """sum_ts weights[t, s] NMSE(R[t, s], x_t) + auxk_coef * mean_t AuxK_t, and its gradients in the same pass.

    AuxK is left out where its coefficient times its mean is not > 0, so also when it is NaN.

    Args:
        codes: of S sources.
        aux: AuxK's codes, one source for each target, or None.
        targets: decoders and rows of T targets.
        weights: [T, S].
        auxk_coef: >= 0.
        gradients: which ones to make; None for the loss alone.
        impl: "triton" or "torch".
    """
    T = len(targets)
    norm, coef = target_weights([target.x for target in targets], weights, impl)
    dvalues, keep_errors = None, gradients is not None and gradients.keep_errors
    dws: list[torch.Tensor | None] = [None] * T
    if gradients is not None:
        dvalues = _empty_like(codes.values)
        dws = [_empty_like(t.w) if want else None for t, want in zip(targets, gradients.weights, strict=True)]
    sqs, gs, errors = [], [], []
    for t, target in enumerate(targets):
        own = None if aux is None else t  # AuxK's target is what the own reconstruction leaves
        if gradients is None:
            sq, error = errors_of(codes, target, own, impl)
        else:
            out = GradOut(dvalues, t > 0, dws[t], False)
            sq, g, error = grads_of_target(
                codes, target, coef[t], out, impl, error_source=own, keep_all_errors=keep_errors
            )
            gs.append(g)
        sqs.append(sq)
        errors.append(error)
    loss, terms = loss_terms(sqs, norm, weights, codes.values, impl)
    result = LossResult(loss, terms, errors=errors, coef=coef, dvalues=dvalues, dws=dws)
    aux_gs = []
    if aux is not None:
        own_errors = [error[t] if keep_errors else error for t, error in enumerate(errors)]
        aux_gs = _add_auxk(result, aux, targets, own_errors, weights, auxk_coef, gradients, impl)
    if gradients is not None:
        like = [norm] * T if gradients.bias_like is None else gradients.bias_like
        result.dbiases = column_sums(gs, aux_gs, like, impl)
    return result


def _add_auxk(result, aux, targets, own_errors, weights, auxk_coef, gradients, impl):
    """Adds AuxK to the result. Returns the gradients of its errors, [B, d] of each target."""
    residuals = [residual(target.bias, error) for target, error in zip(targets, own_errors, strict=True)]
    targets = [target._replace(x=x) for target, x in zip(targets, residuals, strict=True)]
    sources = [aux.source(t) for t in range(len(targets))]
    norm, _ = target_weights(residuals, weights[:, :1], impl)
    sqs = [errors_of(codes, target, None, impl)[0] for codes, target in zip(sources, targets, strict=True)]
    result.loss, result.aux_terms, result.aux_weights = add_auxk(sqs, norm, result.loss, auxk_coef, impl)
    gs = []
    if gradients is not None:
        result.daux = _empty_like(aux.values)
        _, result.aux_coef = target_weights(residuals, result.aux_weights, impl)
        for t, (codes, target) in enumerate(zip(sources, targets, strict=True)):
            out = GradOut(result.daux[t : t + 1], False, result.dws[t], True)
            _, g, error = grads_of_target(
                codes, target, result.aux_coef[t], out, impl, keep_all_errors=gradients.keep_errors
            )
            gs.append(g)
            result.aux_errors.append(error)
    return gs


def residual(pre_bias: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """AuxK's target x - R + b, held constant: the bias less the error of the target's own reconstruction."""
    return pre_bias - error.to(pre_bias.dtype)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class LossInputs(NamedTuple):
    """What `AlignedLoss` takes of T targets."""

    codes: SparseCodes
    aux: SparseCodes | None
    w_decs: list[torch.Tensor]  # [d, N]
    pre_biases: list[torch.Tensor]  # [d]
    xs: list[torch.Tensor]  # [B, d]

    def flatten(self) -> list[torch.Tensor | None]:
        """Values of the codes and of AuxK's first, the 3 T tensors of the targets last."""
        aux = self.aux or SparseCodes(None, None)
        flat = [self.codes.values, aux.values]
        for codes in (self.codes, aux):
            flat += [codes.indices, codes.count, *(codes.inverse or NO_INVERSE)]
        return [*flat, *self.w_decs, *self.pre_biases, *self.xs]

    @classmethod
    def unflatten(cls, tensors, T: int) -> LossInputs:
        values, aux_values, *rest = tensors
        both = []
        for own, part in ((values, rest[:5]), (aux_values, rest[5:10])):
            indices, count, *lists = part
            both.append(None if own is None else SparseCodes(
                indices, own, count, None if lists[0] is None else InverseIndex(*lists)
            ))  # fmt: skip
        return cls(*both, *(list(rest[i : i + T]) for i in range(10, 10 + 3 * T, T)))

    def targets(self) -> list[DecodeTarget]:
        return [DecodeTarget(w.t(), bias, x) for w, bias, x in zip(self.w_decs, self.pre_biases, self.xs, strict=True)]


_LEADING = 5  # arguments of AlignedLoss.forward before the tensors


class AlignedLoss(torch.autograd.Function):
    """The loss of `losses_and_gradients` with gradients.

    The weights are known, so the gradient is taken in the forward, in the one pass over the gathered rows that makes
    the errors; the backward only scales it. Not done where it would not pay or not be exact: without gradients, where a
    target has one itself, under torch.compile (whose graphs cannot use a buffer up), and in float16, where a gradient
    has to be scaled before it is rounded. Then the backward makes the errors again.

    Takes weights [T, S], auxk_coef, grads_in_forward (False forbids it: inside, nothing tells whether gradients are
    wanted), impl, T, then the tensors of a LossInputs.

    Returns: the loss; without gradient the metrics as `loss_terms` lays them out, and those of `add_auxk` (None without
    AuxK).
    """

    @staticmethod
    def forward(ctx, weights, auxk_coef, grads_in_forward, impl, T, *tensors):
        ctx.set_materialize_grads(False)
        inputs = LossInputs.unflatten(tensors, T)
        n = _LEADING + len(tensors)
        need_values, need_w, need_x = (
            ctx.needs_input_grad[_LEADING],
            *(list(ctx.needs_input_grad[i : i + T]) for i in (n - 3 * T, n - T)),
        )
        now = grads_in_forward and (need_values or any(need_w)) and not any(need_x)
        now = now and inputs.w_decs[0].dtype != torch.float16 and not torch.compiler.is_compiling()
        result = losses_and_gradients(
            inputs.codes, inputs.aux, inputs.targets(), weights, auxk_coef,
            gradients=Gradients(need_w, inputs.pre_biases) if now else None, impl=impl,
        )  # fmt: skip
        if result.aux_terms is not None:
            ctx.mark_non_differentiable(result.aux_terms)
        ctx.mark_non_differentiable(result.terms)
        errors = [] if inputs.aux is None else result.errors
        made = (result.dvalues, result.daux, *result.dws, *result.dbiases) if now else ()
        ctx.save_for_backward(weights, result.aux_weights, *tensors, *errors, *made)
        ctx.grads_made, ctx.impl, ctx.sizes = now, impl, (T, len(tensors), len(errors))
        return result.loss, result.terms, result.aux_terms

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        T, n, n_errors = ctx.sizes
        if dloss is None:  # nothing came from above
            return (None,) * (_LEADING + n)
        weights, aux_weights, *rest = ctx.saved_tensors
        inputs, rest = LossInputs.unflatten(rest[:n], T), rest[n:]
        errors, made = rest[:n_errors], rest[n_errors:]
        need_v, need_aux = ctx.needs_input_grad[_LEADING : _LEADING + 2]
        if ctx.grads_made:
            ctx.grads_made = False  # ownership passes to the caller: a second backward makes its own
            dvalues, daux, dws, dbs = _scaled(made, dloss, ctx.impl)
            needs = ctx.needs_input_grad[_LEADING + n - 2 * T : _LEADING + n - T]
            dbs = [db if need else None for db, need in zip(dbs, needs, strict=True)]
            dxs = [None] * T
        else:
            needs = ctx.needs_input_grad[_LEADING + n - 3 * T :]
            needs = [(need_v, need_aux, *needs[t::T]) for t in range(T)]
            weights = weights * dloss, None if aux_weights is None else aux_weights * dloss
            dvalues, daux, dws, dbs, dxs = _made_again(inputs, errors, weights, needs, ctx.impl)
        return *[None] * _LEADING, dvalues if need_v else None, daux, *[None] * (n - 2 - 3 * T), *dws, *dbs, *dxs


def _scaled(made, dloss, impl):
    """The gradients that the forward made times that of the loss, in place: dvalues, daux, dws and dbs."""
    made = [None if m is None else m.data for m in made]  # saved for the backward, and yet they change in place
    scale_([m for m in made if m is not None], dloss, impl)
    dvalues, daux, *rest = made
    T = len(rest) // 2
    return dvalues, daux, [None if dw is None else dw.t() for dw in rest[:T]], rest[T:]


def _made_again(inputs, errors, weights, needs, impl):
    """dvalues, daux, dws, dbs and dxs, from a second pass over the errors."""
    dvalues, dauxs, dws, dbs, dxs = None, [], [], [], []
    weights, aux_weights = weights
    for t, (target, (need_v, need_aux, *wanted)) in enumerate(zip(inputs.targets(), needs, strict=True)):
        dv, dw, db, dx = grads_of_errors(inputs.codes, target, weights[t], (need_v, *wanted), impl)
        dvalues = dv if dvalues is None else dvalues + dv
        if inputs.aux is not None:
            own = target._replace(x=residual(target.bias, errors[t]))
            into = None if dw is None else dw.t()
            dv, dw, more, dx_aux = grads_of_errors(
                inputs.aux.source(t), own, aux_weights[t], (need_aux, *wanted), impl, into=into
            )
            dauxs.append(dv)
            db = None if more is None else db + more
            dx = None if dx_aux is None else dx + dx_aux  # x stands in the residual as it is
        dws.append(dw)
        dbs.append(db)
        dxs.append(dx)
    daux = torch.cat(dauxs) if dauxs and needs[0][1] else None
    return dvalues, daux, dws, dbs, dxs
