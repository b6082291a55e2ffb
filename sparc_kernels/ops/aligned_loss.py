"""The training loss over all targets, with gradients: one function for `compute_loss` and `training_step`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..core.plan import Planned
from .decode import errors_of
from .decode_grads import grads_of_errors, grads_of_targets, residuals, target_weights
from .latent_reduce import latent_reduce_
from .loss_terms import add_auxk, loss_terms, scale_
from .records import CODES_FLAT, DecodeTarget, GradOut, SparseCodes


@dataclass
class LossResult:
    """The loss with its gradients, or with what they can be computed from. T targets, S sources."""

    loss: torch.Tensor  # []
    terms: torch.Tensor  # metrics in the layout of `loss_terms`
    coef: torch.Tensor  # [T, S, B], dloss/dE over E
    aux_terms: torch.Tensor | None = None  # metrics in the layout of `add_auxk`
    aux_weights: torch.Tensor | None = None  # [T, 1], 0 where AuxK is left out
    aux_coef: torch.Tensor | None = None  # [T, 1, B]
    dvalues: torch.Tensor | None = None  # [S, B, k]
    daux: torch.Tensor | None = None  # [T, B, auxk]
    errors: list[torch.Tensor] = field(default_factory=list)  # per target: its own [B, d], or all [S, B, d]
    aux_errors: list[torch.Tensor] = field(default_factory=list)  # [1, B, d] each, if all errors are kept
    dws: list[torch.Tensor | None] = field(default_factory=list)  # [d, N] each, with contiguous columns
    dbiases: list[torch.Tensor] = field(default_factory=list)  # [d] each


class Gradients(NamedTuple):
    """Gradients that `losses_and_gradients` computes besides those of the values and the decoder biases."""

    weights: list[bool]  # per target: whether dw is computed, as a dense tensor
    bias_like: list[torch.Tensor] | None  # tensors whose dtypes the bias gradients take; None: the accumulator's
    keep_errors: bool = False  # keep every error, for an update of the weights without dw


def losses_and_gradients(
    codes: SparseCodes,
    aux: SparseCodes | None,
    targets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    weights: torch.Tensor,
    auxk_coef: float,
    *,
    gradients: Gradients | None,
    impl: str,
) -> LossResult:
    """Compute sum_ts weights[t, s] NMSE(R[t, s], x_t) + auxk_coef * mean_t AuxK_t and its gradients in one pass.

    The AuxK term counts as 0 unless its mean is > 0, so also when it is NaN.

    Args:
        codes: codes of S sources.
        aux: AuxK's codes, one source for each target, or None.
        targets: w_dec [d, N], pre_bias [d] and the rows [B, d] of T targets.
        weights: [T, S].
        auxk_coef: >= 0.
        gradients: which ones to compute; None for the loss alone.
        impl: "triton" or "torch".

    Returns:
        The loss, its metrics and the gradients or errors that were requested.
    """
    T = len(targets)
    spec = (
        T,
        auxk_coef,
        gradients and (tuple(gradients.weights), gradients.bias_like is not None, gradients.keep_errors),
    )
    like = [None] * T if gradients is None or gradients.bias_like is None else gradients.bias_like
    flat = _losses(
        [weights, *_flat(codes), *_flat(aux), *(t for target in targets for t in target), *like],
        (*spec, impl),
        impl=impl,
    )
    head, rest = flat[:8], [list(flat[8 + i * T : 8 + (i + 1) * T]) for i in range(4)]
    return LossResult(*head, *rest)


@Planned
def _losses(tensors, T, auxk_coef, wanted, impl):
    """Run `losses_and_gradients` on flat arguments."""
    weights, *rest = tensors
    n = 1 + CODES_FLAT
    codes, aux = (_unflat(rest[i : i + n]) for i in (0, n))
    of_targets = zip(*(rest[2 * n + i : 2 * n + 3 * T : 3] for i in range(3)), strict=True)
    targets = [DecodeTarget(w_dec.t(), bias, x) for w_dec, bias, x in of_targets]
    like = rest[2 * n + 3 * T :]
    gradients = wanted and Gradients(list(wanted[0]), like if wanted[1] else None, wanted[2])
    result = _compute(codes, aux, targets, weights, auxk_coef, gradients, impl)
    dws = [None if dw is None else dw.t() for dw in result.dws]
    lists = result.errors, result.aux_errors, dws, result.dbiases
    padded = [t for part in lists for t in [*part, *[None] * (T - len(part))]]
    head = result.loss, result.terms, result.coef, result.aux_terms, result.aux_weights, result.aux_coef
    return [*head, result.dvalues, result.daux, *padded]


def _flat(codes: SparseCodes | None) -> list[torch.Tensor | None]:
    return [None] * (1 + CODES_FLAT) if codes is None else [codes.values, *codes.flatten()]


def _unflat(tensors) -> SparseCodes | None:
    return None if tensors[0] is None else SparseCodes.unflatten(tensors[0], tensors[1:])


def _compute(codes, aux, targets, weights, auxk_coef, gradients, impl) -> LossResult:
    T = len(targets)
    norm, coef = target_weights([target.x for target in targets], weights, impl)
    keep_errors = gradients is not None and gradients.keep_errors
    dvalues: torch.Tensor | None = None
    dws: list[torch.Tensor | None] = [None] * T
    if gradients is not None:
        dvalues = _empty_like(codes.gathered)
        dws = [_empty_columns(t.w) if want else None for t, want in zip(targets, gradients.weights, strict=True)]
    own_errors = aux is not None  # AuxK reconstructs the residual of the target's own reconstruction
    gs: list[torch.Tensor] = []
    if dvalues is None:  # the loss alone
        sq, errors = errors_of(codes, targets, impl, own_errors=own_errors)
    else:
        sq, gs, errors = grads_of_targets(
            codes, targets, coef, GradOut(dvalues, False, dws, False), impl, own_errors=own_errors,
            keep_all_errors=keep_errors,
        )  # fmt: skip
    dbiases: list[torch.Tensor] = []
    if gradients is not None:
        like = [norm] * T if gradients.bias_like is None else gradients.bias_like
        dbiases = [b.new_empty(target.bias.shape) for b, target in zip(like, targets, strict=True)]
    # with AuxK the biases' gradients are summed together with its own
    sums = (gs, dbiases) if aux is None else ([], [])
    loss, terms = loss_terms(sq, norm, weights, codes.values, *sums, impl)
    result = LossResult(loss, terms, coef, errors=errors, dvalues=dvalues, dws=dws, dbiases=dbiases)
    if aux is not None:
        own = [error[t] if keep_errors else error for t, error in enumerate(errors)]
        _add_auxk(result, aux, targets, own, gs, auxk_coef=auxk_coef, gradients=gradients, impl=impl)
    return result


def _add_auxk(result, aux, targets, own_errors, gs, *, auxk_coef, gradients, impl):
    """Add AuxK and its gradients to the result; `gs` as `loss_terms` takes them."""
    xs, norm, coef = residuals([target.bias for target in targets], own_errors, auxk_coef, impl)
    targets = [target._replace(x=x) for target, x in zip(targets, xs, strict=True)]
    if gradients is None:
        sq, _ = errors_of(aux, targets, impl, own_codes=True)
        result.loss, result.aux_terms, result.aux_weights = add_auxk(sq, norm, result.loss, auxk_coef, [], [], [], impl)
        return
    # one gather makes losses and gradients; whether AuxK counts is known after it
    aux = aux.with_inverse(len(targets[0].w), impl)
    daux = _empty_like(aux.values)
    none: list[torch.Tensor | None] = [None] * len(targets)
    sq, aux_gs, errors = grads_of_targets(
        aux, targets, coef, GradOut(daux, False, none, False), impl, own_codes=True, keep_all_errors=True
    )
    result.loss, result.aux_terms, result.aux_weights = add_auxk(
        sq, norm, result.loss, auxk_coef, [coef, daux, *errors], [*gs, *aux_gs], result.dbiases, impl
    )
    result.aux_coef, result.daux = coef, daux
    if gradients.keep_errors:
        result.aux_errors = errors
    wanted = [t for t, dw in enumerate(result.dws) if dw is not None]
    # all targets at once, or the few that are trained one by one
    for part in [slice(0, len(targets))] if len(wanted) == len(targets) else [slice(t, t + 1) for t in wanted]:
        latent_reduce_(
            result.dws[part], [], *(of[part] for of in aux.inverse), aux.values[part, None], coef[part], None,
            errors[part], aux.values.shape[2], True, impl,
        )  # fmt: skip


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_columns(w: torch.Tensor) -> torch.Tensor:
    """Return contiguous rows like w [N, d], allocated as their transpose, which is what is returned in the end."""
    n, d = w.shape
    return torch.empty_strided((d, n), (1, d), dtype=w.dtype, device=w.device).t()


class LossInputs(NamedTuple):
    """Tensors that `AlignedLoss` takes, for T targets."""

    codes: SparseCodes
    aux: SparseCodes | None
    w_decs: list[torch.Tensor]  # [d, N]
    pre_biases: list[torch.Tensor]  # [d]
    xs: list[torch.Tensor]  # [B, d]

    def flatten(self) -> list[torch.Tensor | None]:
        """All tensors in one list: both values first, the 3 T tensors of the targets last."""
        aux: list[torch.Tensor | None] = [None] * (1 + CODES_FLAT)
        if self.aux is not None:
            aux = [self.aux.values, *self.aux.flatten()]
        codes = [self.codes.values, aux[0], *self.codes.flatten(), *aux[1:]]
        return [*codes, *self.w_decs, *self.pre_biases, *self.xs]

    @classmethod
    def unflatten(cls, tensors, T: int) -> LossInputs:
        """Rebuild the record from what `flatten` returned for T targets."""
        values, aux_values, *rest = tensors
        codes = SparseCodes.unflatten(values, rest[:CODES_FLAT])
        aux = None if aux_values is None else SparseCodes.unflatten(aux_values, rest[CODES_FLAT : 2 * CODES_FLAT])
        return cls(codes, aux, *(list(rest[i : i + T]) for i in range(2 * CODES_FLAT, len(rest), T)))

    def targets(self) -> list[DecodeTarget]:
        """Decoder and rows of every target."""
        return [DecodeTarget(w.t(), bias, x) for w, bias, x in zip(self.w_decs, self.pre_biases, self.xs, strict=True)]


_LEADING = 5  # arguments of AlignedLoss.forward before the tensors


class AlignedLoss(torch.autograd.Function):
    """Differentiable loss of `losses_and_gradients`.

    The weights are known, so the forward computes the gradients in the pass that makes the errors, and the backward
    only scales them. The backward recomputes the errors instead when neither values nor decoders need a gradient, when
    a target does, under torch.compile (graphs cannot consume a buffer) and in float16 (scaled before it is rounded).

    Args:
        weights: [T, S].
        auxk_coef: >= 0.
        grads_in_forward: False forbids it; `forward` itself cannot tell whether grad mode is on.
        impl: "triton" or "torch".
        T: number of targets.
        tensors: `LossInputs.flatten()`.

    Returns:
        The loss; without gradient the metrics in the layout of `loss_terms`, and those of `add_auxk` (None without
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
        grads_now = grads_in_forward and (need_values or any(need_w)) and not any(need_x)
        grads_now = grads_now and inputs.w_decs[0].dtype != torch.float16 and not torch.compiler.is_compiling()
        targets = [*zip(inputs.w_decs, inputs.pre_biases, inputs.xs, strict=True)]
        result = losses_and_gradients(
            inputs.codes, inputs.aux, targets, weights, auxk_coef,
            gradients=Gradients(need_w, inputs.pre_biases) if grads_now else None, impl=impl,
        )  # fmt: skip
        ctx.mark_non_differentiable(*(t for t in (result.terms, result.aux_terms) if t is not None))
        errors = [] if inputs.aux is None else result.errors
        grads = (result.dvalues, result.daux, *result.dws, *result.dbiases) if grads_now else ()
        ctx.save_for_backward(weights, result.aux_weights, *tensors, *errors, *grads)
        ctx.grads_made, ctx.impl, ctx.sizes = grads_now, impl, (T, len(tensors), len(errors))
        return result.loss, result.terms, result.aux_terms

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        T, n, n_errors = ctx.sizes
        if dloss is None:  # no gradient reached the loss
            return (None,) * (_LEADING + n)
        weights, aux_weights, *rest = ctx.saved_tensors
        inputs, rest = LossInputs.unflatten(rest[:n], T), rest[n:]
        errors, grads = rest[:n_errors], rest[n_errors:]
        need_v, need_aux = ctx.needs_input_grad[_LEADING : _LEADING + 2]
        if ctx.grads_made:
            ctx.grads_made = False  # ownership passes to the caller; a second backward recomputes
            dvalues, daux, dws, dbs = scaled(grads, dloss, ctx.impl)
            needs = ctx.needs_input_grad[_LEADING + n - 2 * T : _LEADING + n - T]
            dbs = [db if need else None for db, need in zip(dbs, needs, strict=True)]
            dxs = [None] * T
        else:
            needs = ctx.needs_input_grad[_LEADING + n - 3 * T :]
            needs = [(need_v, need_aux, *needs[t::T]) for t in range(T)]
            factors = _scaled_rows(weights, dloss), None if aux_weights is None else _scaled_rows(aux_weights, dloss)
            dvalues, daux, dws, dbs, dxs = _made_again(inputs, errors, factors, needs, ctx.impl)
        return *[None] * _LEADING, dvalues if need_v else None, daux, *[None] * (n - 2 - 3 * T), *dws, *dbs, *dxs


def scaled(grads, dloss: torch.Tensor, impl: str) -> tuple:
    """Scale the forward's gradients in place.

    Args:
        grads: dvalues, daux, T of the decoders and T of their biases; some may be None.
        dloss: [].
        impl: "triton" or "torch".

    Returns:
        dvalues, daux, dws and dbs.
    """
    # .data: saved tensors that change in place, here and by whoever gets them
    grads = [None if grad is None else grad.data for grad in grads]
    _scale([dloss, *(grad for grad in grads if grad is not None)], (impl,), impl=impl)
    dvalues, daux, *rest = grads
    T = len(rest) // 2
    return dvalues, daux, rest[:T], rest[T:]


@Planned
def _scale(tensors, impl):
    scale_(list(tensors[1:]), tensors[0], impl)
    return []


def _scaled_rows(weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply weights [T, S] by a number, into rows that begin at 16 bytes: their kernels are compiled once."""
    if torch.compiler.is_compiling():  # no `out` that is not contiguous
        return weights * factor
    T, S = weights.shape
    return torch.mul(weights, factor, out=weights.new_empty(T, -(-S // 4) * 4)[:, :S])


def _made_again(inputs, errors, weights, needs, impl):
    """Recompute the errors; return dvalues, daux, dws, dbs and dxs."""
    dvalues, dauxs, dws, dbs, dxs = None, [], [], [], []
    weights, aux_weights = weights
    xs: list[torch.Tensor] = []
    if inputs.aux is not None:
        xs, _, _ = residuals(inputs.pre_biases, errors, 0.0, impl)
    for t, (target, (need_v, need_aux, *wanted)) in enumerate(zip(inputs.targets(), needs, strict=True)):
        dv, dw, db, dx = grads_of_errors(inputs.codes, target, weights[t], (need_v, *wanted), impl)
        dvalues = _plus(dvalues, dv)
        if inputs.aux is not None:
            own = target._replace(x=xs[t])
            into = None if dw is None else dw.t()
            dv, dw, more, dx_aux = grads_of_errors(
                inputs.aux.source(t), own, aux_weights[t], (need_aux, *wanted), impl, into=into
            )
            dauxs += [] if dv is None else [dv]
            db, dx = _plus(db, more), _plus(dx, dx_aux)  # d residual / dx = 1
        dws.append(dw)
        dbs.append(db)
        dxs.append(dx)
    return dvalues, torch.cat(dauxs) if dauxs else None, dws, dbs, dxs


def _plus(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    """Add two gradients, of which None is 0."""
    return part if total is None else total if part is None else total + part
