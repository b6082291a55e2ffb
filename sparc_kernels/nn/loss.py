"""The training loss of a forward, and its metrics under their official names."""

from __future__ import annotations

import functools

import torch

from ..core.plan import usable
from ..ops.aligned_loss import AlignedLoss, LossInputs
from ..ops.loss_terms import Terms
from .forward import ForwardState


def loss_of(
    state: ForwardState,
    targets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    weights: torch.Tensor,
    auxk_coef: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the differentiable loss of a forward.

    Args:
        state: of a forward over all streams.
        targets: w_dec [d, N], pre_bias [d] and the rows [B, d] of each stream.
        weights: [T, S], see `term_weights`.
        auxk_coef: weight of AuxK, >= 0.
        impl: "triton" or "torch".

    Returns:
        The loss, its `Terms` as one tensor, and the terms of AuxK or None.
    """
    tensors = LossInputs(state.codes, state.aux, *map(list, zip(*targets, strict=True))).flatten()
    return AlignedLoss.apply(weights, auxk_coef, torch.is_grad_enabled(), impl, len(targets), *tensors)


def term_weights(S: int, dtype: torch.dtype, device: torch.device, cross_loss_coef: float) -> torch.Tensor:
    """Return the weights of the loss terms, made once for each kind where nothing is traced or captured.

    Args:
        S: number of streams.
        dtype: of the weights.
        device: of the weights.
        cross_loss_coef: weight of the mean cross-reconstruction loss.

    Returns:
        [target, source]: 1 / S on the diagonal, cross_loss_coef / (S (S - 1)) elsewhere.
    """
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # the graph's memory is not ours
    if torch.compiler.is_compiling() or captures or not usable():
        return _term_weights.__wrapped__(S, dtype, device, cross_loss_coef)
    with torch.inference_mode(False):
        return _term_weights(S, dtype, device, cross_loss_coef)


@functools.lru_cache(64)
def _term_weights(S, dtype, device, cross_loss_coef):
    cross = cross_loss_coef / (S * (S - 1)) if S > 1 else 0.0
    # filled on the device: a copy from the host would synchronise
    return torch.full((S, S), cross, dtype=dtype, device=device).fill_diagonal_(1 / S)


def metrics_of(
    streams: list[str],
    loss: torch.Tensor,
    terms: torch.Tensor,
    aux_terms: torch.Tensor | None,
    cross_loss_coef: float,
) -> dict[str, torch.Tensor]:
    """Return detached metrics under their official names.

    Args:
        streams: names of all streams, in order.
        loss: the total loss.
        terms: the second result of `loss_of`.
        aux_terms: its third result.
        cross_loss_coef: 0 leaves the average cross losses out.
    """
    S = len(streams)
    parts = Terms(terms, S)
    metrics = {f"mse_loss_{s}": parts.nmse[i][i] for i, s in enumerate(streams)}
    metrics["avg_mse_loss"] = parts.avg_self
    metrics.update({f"num_active_neurons_{s}": parts.k for s in streams})
    metrics.update({f"l1_sparsity_{s}": v for s, v in zip(streams, parts.l1, strict=True)})
    metrics.update(avg_num_active_neurons=parts.k, avg_l1_sparsity=parts.avg_l1)
    if aux_terms is not None:
        metrics["avg_auxk_loss"], metrics["avg_auxk_loss_scaled"], *own = aux_terms.unbind()
        metrics.update({f"auxk_loss_{s}": v for s, v in zip(streams, own, strict=True)})
    for t, row in zip(streams, parts.nmse, strict=True):
        metrics.update({f"cross_loss_{t}_from_{s}": v for s, v in zip(streams, row, strict=True) if s != t})
    if cross_loss_coef > 0 and S > 1:
        metrics.update(avg_cross_loss=parts.avg_cross, avg_cross_loss_scaled=parts.avg_cross_scaled)
    metrics["total_loss"] = loss.detach()  # the terms have no gradient
    return metrics
