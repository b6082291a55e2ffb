"""`training_step` over latents that are divided among ranks, and over replicas.

Where replicas see other rows, they exchange rows, not gradients: codes, their gradients, centred inputs and errors.
Every replica then updates its block from the lists of the whole batch, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..nn.forward import EncodeSettings
from ..nn.fused_step import FusedInputs, update_parameters
from ..ops.adam import adam_hyper, adam_stream_, rows_of
from ..ops.aligned_loss import LossResult
from ..ops.records import DecodeTarget, SparseCodes
from ..ops.step_scalars import adam_scalars_
from .forward import ShardedCodes, encode
from .loss import Rows, losses_and_gradients
from .ranks import Group

if TYPE_CHECKING:
    from ..nn.optimizer import SparcAdam
    from .model import ShardedSAE


@torch.no_grad()
def sharded_step(
    model: ShardedSAE, optimizer: SparcAdam, inputs: FusedInputs, settings: EncodeSettings, auxk_coef: float, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run a forward, compute the whole batch's loss and update this rank's block and the pre-biases once.

    Args:
        model: to train.
        optimizer: SparcAdam of the model; passes `nn.fused_step.check`.
        inputs: of all streams.
        settings: of the forward.
        auxk_coef: weight of AuxK, >= 0.
        rows: how the batch is divided.

    Returns:
        The loss, its terms and AuxK's, as `losses_and_gradients` returns them.
    """
    ranks, impl = model.ranks, settings.impl
    settings = settings._replace(lists=ranks.data is None)  # else they are made of all replicas' rows
    encoded = encode(
        inputs.xs, inputs.encoder, inputs.counters, settings, ranks=ranks, n_latents=model.n_latents,
        valid=rows.valid,
    )  # fmt: skip
    targets = [DecodeTarget(w_dec.t(), bias, x) for w_dec, bias, x in inputs.targets]
    result = losses_and_gradients(
        encoded.codes, encoded.aux, targets, inputs.weights, auxk_coef, rows=rows, ranks=ranks, gradients=True,
        impl=impl,
    )  # fmt: skip
    streams, half = optimizer.streams(), inputs.half
    n, params = len(inputs.encoder.w_encs[0]), [p for stream in streams for p in stream]
    if ranks.data is not None:
        _gather_rows(encoded, result, n, ranks.data, impl)
    exp_avgs, exp_avg_sqs = optimizer.prepare(params, [True] * len(params))
    lr, number = optimizer.read_lr()
    group = optimizer.param_groups[0]
    hyper, update_impl = adam_hyper(group), optimizer.impl_of(streams)
    scalars = optimizer.scalars()
    adam_scalars_(
        optimizer.counts, scalars, lr, number, group["weight_decay"], 2 ** len(params) - 1,
        getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None), result.loss, None, 0.0, None,
        hyper.beta1, hyper.beta2, update_impl,
    )  # fmt: skip
    rows_of_params, first, second = (rows_of(of) for of in (params, exp_avgs, exp_avg_sqs))
    dbias_sums = [torch.empty_like(m) for m in exp_avgs[2::4]]
    update_parameters(
        encoded, result, rows_of_params, first, second, [w for pair in half or () for w in pair], scalars, hyper,
        update_impl, impl=impl, dbias_sums=dbias_sums,
    )  # fmt: skip
    # through the encoder, of all ranks' latents; the rows are those of the whole batch already
    through = ranks.latents.total(torch.cat(dbias_sums), "pre-biases").split([len(d) for d in dbias_sums])
    grads = [g for db, d in zip(result.dbiases, through, strict=True) for g in (None, None, db.to(d) - d, None)]
    adam_stream_(rows_of_params, grads, first, second, scalars, *hyper, update_impl)
    optimizer.stepped(params, half is not None)
    return result.loss, result.terms, result.aux_terms


def _gather_rows(encoded: ShardedCodes, result: LossResult, n: int, data: Group, impl: str) -> None:
    """Replace codes, gradients, coefficients, inputs and errors by those of all replicas' rows, side by side."""

    def rows_of_all(x: torch.Tensor, dim: int, what: str) -> Callable[[], torch.Tensor]:
        """Send [..., B, ...]; the result returns [..., D * B, ...], of every replica."""
        sent = data.gather(x.movedim(dim, 0), what)  # [D, B, ...]
        return lambda: sent.wait().flatten(0, 1).movedim(0, dim)

    def codes_of_all(codes: SparseCodes) -> Callable[[], SparseCodes]:
        ids = rows_of_all(codes.indices.to(torch.int32), codes.indices.dim() - 2, "codes")
        values = rows_of_all(codes.gathered, 1, "codes")
        return lambda: SparseCodes(ids().long().contiguous(), values().contiguous()).with_inverse(n, impl)

    assert result.dvalues is not None, "a step has gradients"
    codes, dvalues = codes_of_all(encoded.codes), rows_of_all(result.dvalues, 1, "gradients of the values")
    coef = rows_of_all(result.coef, 2, "coefficients")
    errors = [rows_of_all(error, 1, "errors") for error in result.errors]
    aux: list[Callable] = []
    if encoded.aux is not None:
        assert result.daux is not None and result.aux_coef is not None, "AuxK has gradients"
        aux = [codes_of_all(encoded.aux), rows_of_all(result.daux, 1, "auxk"), rows_of_all(result.aux_coef, 2, "auxk")]
        aux += [rows_of_all(error, 1, "auxk errors") for error in result.aux_errors]
    centred = [rows_of_all(x, 0, "inputs") for x in encoded.centred]
    biases = data.gather(torch.cat(result.dbiases), "biases")  # they are this replica's part
    # on their way together; the lists of the codes are made meanwhile
    encoded.codes, result.dvalues, result.coef = codes(), dvalues().contiguous(), coef().contiguous()
    result.errors, encoded.centred = [error() for error in errors], [x() for x in centred]
    if aux:
        encoded.aux, result.daux, result.aux_coef, *result.aux_errors = (part() for part in aux)
        result.daux, result.aux_coef = result.daux.contiguous(), result.aux_coef.contiguous()
    result.dbiases = [*biases.wait().sum(0).split([len(db) for db in result.dbiases])]
