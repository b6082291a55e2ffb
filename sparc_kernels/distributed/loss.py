"""The training loss over latents that are divided among ranks, with its gradients.

Every rank reconstructs all rows of its replica from its own latents. The parts are exchanged by rows: each rank adds up
those of its share of the rows, makes their errors and losses, and sends the errors back to all, for the gradients. One
target's parts travel while the next one's are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..core.numerics import acc_dtype
from ..ops.aligned_loss import LossResult, scaled
from ..ops.decode_grads import residuals, target_weights
from ..ops.gather import gather_dot, gather_sum
from ..ops.latent_reduce import latent_reduce_
from ..ops.loss_terms import terms_torch
from ..ops.records import DecodeTarget, SparseCodes
from .ranks import Pending, Ranks


class Rows(NamedTuple):
    """The rows of a batch that is divided among replicas, each of which divides its rows among its ranks."""

    B: int  # rows of every replica, padding included
    valid: int  # rows of this replica before the padding
    total: int  # valid rows of all replicas
    own: int  # rows that each rank adds up, the last ones padded
    start: int  # first of this rank's
    live: int  # valid rows among them

    @classmethod
    def of(cls, B: int, rows: list[int] | None, ranks: Ranks) -> Rows:
        """Divide the rows.

        Args:
            B: rows of every replica.
            rows: valid rows of each replica; None: all.
            ranks: the ranks of the mesh.
        """
        rows = [B] * ranks.replicas if rows is None else rows
        own, valid = -(-B // ranks.shards), rows[ranks.replica]
        start = min(ranks.shard * own, B)
        return cls(B, valid, sum(rows), own, start, min(max(valid - start, 0), own))

    def of_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of x [B, ...], padded with zeros: [own, ...]."""
        x = x[self.start : self.start + self.own]
        return x if len(x) == self.own else F.pad(x, (0, 0) * (x.dim() - 1) + (0, self.own - len(x)))


def losses_and_gradients(
    codes: SparseCodes,
    aux: SparseCodes | None,
    targets: list[DecodeTarget],
    weights: torch.Tensor,
    auxk_coef: float,
    *,
    rows: Rows,
    ranks: Ranks,
    gradients: bool,
    impl: str,
) -> LossResult:
    """Compute the loss of the whole batch and, of the own latents and this replica's rows, what its gradients need.

    Args:
        codes: codes of S sources, with ABSENT ids where other ranks have the latents.
        aux: AuxK's codes, one source for each target, or None.
        targets: the block's decoder rows [n, d], pre_bias [d] and the rows [B, d] of T = S targets.
        weights: [T, S], as in `ops.aligned_loss.losses_and_gradients`.
        auxk_coef: >= 0.
        rows: how the batch is divided.
        ranks: that the latents are divided among.
        gradients: False: the loss alone.
        impl: "triton" or "torch".

    Returns:
        As `ops.aligned_loss.losses_and_gradients` with `keep_errors`; errors are [S, B, d] views, [1, B, d] of AuxK,
        and `dbiases` this replica's part of the gradients, the same on all of its ranks.
    """
    (T, S), k = weights.shape, codes.indices.shape[-1]
    norm, coef = target_weights([target.x for target in targets], weights * (rows.B / rows.total), impl)
    if rows.valid < rows.B:  # padding has no loss
        norm[:, rows.valid :] = 1
        coef[..., rows.valid :] = 0
    sent = [_send(codes, target.w, rows, ranks, "reconstructions", impl) for target in targets]
    own_norm, own_coef = rows.of_rank(norm.T).T, rows.of_rank(coef.permute(2, 0, 1)).permute(1, 2, 0)
    own, returned, nmses, dbiases = [], [], [], []
    for t, target in enumerate(targets):
        error = _errors(sent[t], target.bias, rows.of_rank(target.x))  # [own, S, d]
        nmses.append(_nmse(error, own_norm[t], rows))
        dbiases.append(_bias_part(error, own_coef[t]))
        own.append(error[:, t].to(target.w.dtype))
        if gradients:
            returned.append(ranks.latents.gather(error.to(target.w.dtype), "errors"))
    message = [torch.cat(nmses), codes.gathered.sum((1, 2)), *dbiases]
    aux_parts = None
    if aux is not None:
        aux_parts = _auxk(aux, targets, own, auxk_coef, rows=rows, ranks=ranks, gradients=gradients, impl=impl)
        message += [aux_parts.nmse, *aux_parts.dbiases]
    sizes = [part.numel() for part in message]
    terms = ranks.latents.gather(torch.cat([part.reshape(-1).to(norm.dtype) for part in message]), "loss")
    result = LossResult(norm.new_zeros(()), norm, coef)
    if gradients:  # before the terms, which arrive after all errors
        result.dvalues = torch.zeros_like(codes.gathered, memory_format=torch.contiguous_format)
        for t, (target, errors) in enumerate(zip(targets, returned, strict=True)):
            result.errors.append(_rows_of_all(errors, rows))
            result.dvalues += _dvalues(codes, target.w, result.errors[t], coef[t], impl)
    parts = terms.wait()[None] if ranks.data is None else ranks.data.gather(terms.wait(), "loss").wait()  # [D, T, ...]
    nmse, sums, *every = parts.sum((0, 1)).split(sizes)
    _, _, *biases = parts[ranks.replica].sum(0).split(sizes)
    result.loss, result.terms = terms_torch(nmse.view(T, S), weights, sums / (rows.total * (k + 1e-8)), k)
    result.dbiases = biases[:T]
    if aux is not None and aux_parts is not None:
        _add_auxk(result, aux, aux_parts, targets, every[T], biases[T + 1 :], auxk_coef, rows, impl)
    return result


def _add_auxk(result, aux, parts, targets, nmse, dbiases, auxk_coef, rows, impl):
    """Add AuxK's loss and gradients to the result, unless its mean is not > 0 (so also when it is NaN)."""
    mean = nmse.mean()
    counts = mean > 0
    mean = torch.where(counts, mean, 0.0)
    result.loss = result.loss + auxk_coef * mean
    result.aux_terms = torch.cat([torch.stack([mean, auxk_coef * mean]), nmse])
    result.dbiases = [b + torch.where(counts, a, 0.0) for b, a in zip(result.dbiases, dbiases, strict=True)]
    if parts.errors:
        coef = parts.coef.wait().permute(1, 0, 2).flatten(1)[:, None, : rows.B]  # [Q, T, own] -> [T, 1, B]
        result.aux_coef = torch.where(counts, coef, 0.0)
        result.daux = torch.zeros_like(aux.gathered, memory_format=torch.contiguous_format)
        for t, (target, errors) in enumerate(zip(targets, parts.errors, strict=True)):
            result.aux_errors.append(_rows_of_all(errors, rows))
            result.daux[t] = _dvalues(aux.source(t), target.w, result.aux_errors[t], result.aux_coef[t], impl)[0]


class _AuxParts(NamedTuple):
    """AuxK's losses and parts of the biases' gradients of this rank's rows; errors and coefficients on their way."""

    nmse: torch.Tensor  # [T]
    dbiases: list[torch.Tensor]  # [d] each
    errors: list[Pending]
    coef: Pending | None


def _auxk(aux, targets, own_errors, auxk_coef, *, rows, ranks, gradients, impl) -> _AuxParts:
    biases = [target.bias for target in targets]
    xs, norm, coef = residuals(biases, own_errors, auxk_coef * (rows.own / rows.total), impl)
    norm[:, rows.live :] = 1
    coef[..., rows.live :] = 0
    sent = [
        _send(aux.source(t), target.w, rows, ranks, "auxk reconstructions", impl) for t, target in enumerate(targets)
    ]
    nmses, dbiases, returned = [], [], []
    for t, target in enumerate(targets):
        error = _errors(sent[t], target.bias, xs[t])  # [own, 1, d]
        nmses.append(_nmse(error, norm[t], rows))
        dbiases.append(_bias_part(error, coef[t]))
        if gradients:
            returned.append(ranks.latents.gather(error.to(target.w.dtype), "auxk errors"))
    coefs = ranks.latents.gather(coef[:, 0], "auxk coefficients") if gradients else None
    return _AuxParts(torch.cat(nmses), dbiases, returned, coefs)


def _send(codes: SparseCodes, w: torch.Tensor, rows: Rows, ranks: Ranks, what: str, impl: str) -> Pending:
    """Reconstruct all rows from the own latents and send each rank its rows: [Q, own, S, d], to be summed over Q."""
    if codes.shared:
        part = gather_sum(codes.indices, codes.gathered, w, None, True, impl)
    else:
        part = torch.cat([
            gather_sum(idx, v[None], w, None, True, impl) for idx, v in zip(codes.indices, codes.gathered, strict=True)
        ])  # fmt: skip
    S, B, d = part.shape
    out = part.new_empty(ranks.shards * rows.own, S, d)
    out[:B] = part.transpose(0, 1)
    out[B:] = 0
    return ranks.latents.exchange(out.view(ranks.shards, rows.own, S, d), what)


def _errors(parts: Pending, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add up the ranks' parts of this rank's rows and subtract x [own, d]: [own, S, d] in the accumulator dtype."""
    recon = parts.wait().sum(0)
    return recon.add_(bias.to(recon.dtype)).sub_(x.to(recon.dtype)[:, None])


def _rows_of_all(errors: Pending, rows: Rows) -> torch.Tensor:
    """[Q, own, S, d] of all ranks as [S, B, d]."""
    return errors.wait().flatten(0, 1)[: rows.B].transpose(0, 1)


def _nmse(error, norm, rows: Rows) -> torch.Tensor:
    """Sum of |E|^2 / |x|^2 over this rank's rows, by source, over the rows of the whole batch: [S]."""
    sq = error.square().sum(2)  # [own, S]
    return (sq[: rows.live] / norm[: rows.live, None]).sum(0) / rows.total


def _bias_part(error, coef) -> torch.Tensor:
    """sum over rows and sources of coef E, [d]; coef 0 excludes a source, even if its error is not finite."""
    coef = coef.T[..., None]
    return torch.where(coef != 0, coef * error, 0.0).sum((0, 1))


def _dvalues(codes: SparseCodes, w, errors, coef, impl: str) -> torch.Tensor:
    """coef * <w[I], E> for every source, [S, B, k]."""
    if codes.shared:
        dots = gather_dot(codes.indices, w, errors, None, impl)
    else:
        dots = torch.cat([gather_dot(idx, w, errors[s : s + 1], None, impl) for s, idx in enumerate(codes.indices)])
    coef = coef[..., None]
    return torch.where(coef != 0, coef * dots, 0.0)


def decoder_grads(
    codes: SparseCodes, aux: SparseCodes | None, result: LossResult, targets: list[DecodeTarget], wanted: list[bool],
    impl: str,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Compute the gradients of the block's decoders from the errors in memory.

    Args:
        codes: as `losses_and_gradients` takes them, with their inverse index.
        aux: AuxK's, with theirs, or None.
        result: of `losses_and_gradients` with gradients.
        targets: as there.
        wanted: whether each target's is computed.
        impl: "triton" or "torch".

    Returns:
        [d, n] of each target, with contiguous columns; None where not wanted.
    """
    dws: list[torch.Tensor | None] = []
    for t, (target, want) in enumerate(zip(targets, wanted, strict=True)):
        if not want:
            dws.append(None)
            continue
        dw = torch.empty_like(target.w, memory_format=torch.contiguous_format)
        for s in range(1 if codes.shared else len(codes.gathered)):
            part = slice(None) if codes.shared else slice(s, s + 1)
            latent_reduce_(
                [dw], [], *codes.lists(s), codes.gathered[part], result.coef[t][None, part], None,
                [result.errors[t][part]], codes.indices.shape[-1], s > 0, impl,
            )  # fmt: skip
        if aux is not None:
            assert result.aux_coef is not None, "AuxK's coefficients come with its codes"
            latent_reduce_(
                [dw], [], *aux.lists(t), aux.gathered[t : t + 1], result.aux_coef[t][None], None,
                [result.aux_errors[t]], aux.indices.shape[-1], True, impl,
            )  # fmt: skip
        dws.append(dw.t())
    return dws


class ShardedLoss(torch.autograd.Function):
    """Differentiable loss of `losses_and_gradients`; its forward computes the gradients, its backward scales them.

    Args:
        weights: [T, S].
        auxk_coef: >= 0.
        grads: whether grad mode is on; `forward` itself cannot tell.
        how: rows, ranks and impl.
        codes: their values are replaced by the tensor that follows.
        aux: AuxK's codes, or None.
        tensors: values of the codes and of AuxK (or None), then T each of w_dec [d, n], pre_bias and rows.

    Returns:
        The loss; without gradient the metrics and those of AuxK, as `ops.aligned_loss.AlignedLoss` returns them.
    """

    @staticmethod
    def forward(ctx, weights, auxk_coef, grads, how, codes, aux, values, aux_values, *tensors):
        ctx.set_materialize_grads(False)
        rows, ranks, impl = how
        T = len(tensors) // 3
        targets = [
            DecodeTarget(w.t(), bias, x)
            for w, bias, x in zip(tensors[:T], tensors[T : 2 * T], tensors[2 * T :], strict=True)
        ]
        codes, aux = codes._replace(values=values), aux and aux._replace(values=aux_values)
        grads = grads and any(ctx.needs_input_grad)
        result = losses_and_gradients(
            codes, aux, targets, weights, auxk_coef, rows=rows, ranks=ranks, gradients=grads, impl=impl
        )
        ctx.impl, ctx.T, ctx.has_aux = impl, T, aux is not None
        if grads:
            need_w = list(ctx.needs_input_grad[8 : 8 + T])
            dws = decoder_grads(codes, aux, result, targets, need_w, impl)
            dbiases = [db.to(target.bias.dtype) for db, target in zip(result.dbiases, targets, strict=True)]
            ctx.save_for_backward(result.dvalues, result.daux, *dws, *dbiases)
        ctx.mark_non_differentiable(*(t for t in (result.terms, result.aux_terms) if t is not None))
        return result.loss, result.terms, result.aux_terms

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        T = ctx.T
        if dloss is None:
            return (None,) * (8 + 3 * T)
        if ctx.T == 0:
            raise RuntimeError("loss: expected one backward of a sharded model's loss, got a second; compute it again")
        ctx.T = 0  # ownership of the gradients passes to the caller
        dvalues, daux, dws, dbs = scaled(ctx.saved_tensors, dloss, ctx.impl)
        dbs = [db if need else None for db, need in zip(dbs, ctx.needs_input_grad[8 + T : 8 + 2 * T], strict=True)]
        return *[None] * 6, dvalues if ctx.needs_input_grad[6] else None, daux, *dws, *dbs, *[None] * T


class SumOfGradients(torch.autograd.Function):
    """Identity whose gradients are summed over the ranks of a group: for parameters of which every rank has a copy."""

    @staticmethod
    def forward(ctx, group, *xs):
        ctx.group = group
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        sizes = [g.numel() for g in grads]
        total = ctx.group.total(torch.cat([g.reshape(-1).to(acc_dtype(g.dtype)) for g in grads]), "pre-biases")
        return None, *(part.to(g.dtype) for part, g in zip(total.split(sizes), grads, strict=True))


class SumOfParts(torch.autograd.Function):
    """Sum over ranks of which at most one has a number other than 0; every rank's part gets the sum's gradient."""

    @staticmethod
    def forward(ctx, group, x):
        out = x.detach().clone(memory_format=torch.contiguous_format)
        return group.reduce_(out, torch.distributed.ReduceOp.SUM, "values").wait()

    @staticmethod
    def backward(ctx, grad):
        return None, grad
