"""`AlignedSAE.training_step`: a training step that never materialises weight gradients.

Values, AuxK's gathers and the loss read the weights before the update, and a loss that is not finite skips the update.
So they come first, with the errors E of all targets in memory (S x B x D numbers); then each stream's decoder and
encoder rows are updated from their latents' lists, and last its pre-bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..core.plan import Planned
from ..core.recorder import call
from ..core.validation import fail, require
from ..ops.adam import AdamHyper, adam_hyper, rows_of
from ..ops.aligned_loss import Gradients, LossResult, losses_and_gradients
from ..ops.inverse_index import InverseIndex, inverse_index_op, lists_of
from ..ops.latent_adam import latent_adam_
from ..ops.records import EncoderParams, WeightedLists
from ..ops.step_scalars import adam_scalars_
from .forward import Encoded, EncodeSettings, encode

if TYPE_CHECKING:
    from .module import AlignedSAE
    from .optimizer import SparcAdam


class FusedInputs(NamedTuple):
    """Tensors of a fused step over S streams, besides the optimizer's."""

    xs: list[torch.Tensor]  # [B, d_s] in the operators' dtype
    encoder: EncoderParams
    counters: list[torch.Tensor]  # int64 [N]
    targets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # w_dec [d, N], pre_bias [d], rows [B, d]
    weights: torch.Tensor  # [T, S], weights of the loss terms
    half: list[list[torch.Tensor]] | None  # half-precision w_enc and w_dec as rows, to be updated too


@torch.no_grad()
def fused_step(
    optimizer: SparcAdam, inputs: FusedInputs, settings: EncodeSettings, auxk_coef: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run a forward, compute its loss and update every parameter once.

    Args:
        optimizer: SparcAdam of the model; passes `check`.
        inputs: of all streams.
        settings: of the forward.
        auxk_coef: weight of AuxK, >= 0.

    Returns:
        The loss, its terms and AuxK's, as `losses_and_gradients` returns them.
    """
    streams, half = optimizer.streams(), inputs.half
    params = [p for stream in streams for p in stream]
    exp_avgs, exp_avg_sqs = optimizer.prepare(params, [True] * len(params))
    lr, number = optimizer.read_lr()
    group = optimizer.param_groups[0]
    tensors = [
        *inputs.xs, *(t for part in inputs.encoder for t in part), *inputs.counters,
        *(t for target in inputs.targets for t in target), inputs.weights,
        *params, *exp_avgs, *exp_avg_sqs, *(w for pair in half or () for w in pair), optimizer.counts,
        optimizer.scalars(), lr, getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None),
    ]  # fmt: skip
    static = len(streams), settings, auxk_coef, adam_hyper(group), optimizer.impl_of(streams)
    impl = settings.impl if settings.impl == static[-1] else "torch"  # a plan is all of Triton
    loss, terms, aux_terms = _step(tensors, static, (number, group["weight_decay"]), impl=impl)
    assert loss is not None and terms is not None, "every step has a loss"
    optimizer.stepped(params, half is not None)
    return loss, terms, aux_terms


@Planned
def _step(tensors, S, settings, auxk_coef, hyper, update_impl, lr_value, decay):
    """Run `fused_step` on flat arguments."""
    *tensors, counts, scalars, lr, found_inf, grad_scale = tensors
    xs, *params_of_encoder, counters = (tensors[i : i + S] for i in range(0, 5 * S, S))
    targets = [tuple(tensors[i : i + 3]) for i in range(5 * S, 8 * S, 3)]
    weights, encoder = tensors[8 * S], EncoderParams(*params_of_encoder)
    params, exp_avgs, exp_avg_sqs = (rows_of(tensors[i : i + 4 * S]) for i in range(8 * S + 1, 20 * S + 1, 4 * S))
    half = tensors[20 * S + 1 :]
    encoded = encode(xs, encoder, counters, None, settings)
    gradients = Gradients([False] * S, None, keep_errors=True)
    result = losses_and_gradients(
        encoded.codes, encoded.aux, targets, weights, auxk_coef, gradients=gradients, impl=settings.impl
    )
    call(
        adam_scalars_, counts, scalars, lr, lr_value, decay, 2 ** (4 * S) - 1, found_inf, grad_scale, result.loss, None,
        0.0, None, hyper.beta1, hyper.beta2, update_impl,
    )  # fmt: skip
    update_parameters(
        encoded, result, params, exp_avgs, exp_avg_sqs, half, scalars, hyper, update_impl, impl=settings.impl
    )
    return [result.loss, result.terms, result.aux_terms]


def update_parameters(
    encoded: Encoded, result: LossResult, params, exp_avgs, exp_avg_sqs, half, scalars, hyper: AdamHyper,
    update_impl: str, *, impl: str, dbias_sums: Sequence[torch.Tensor] = (),
) -> None:  # fmt: skip
    """Update every parameter of S streams from the lists of its latents.

    Args:
        encoded: codes with their inverse index, and centred inputs.
        result: of the loss, with all errors.
        params: four of each stream, the decoders as rows.
        exp_avgs: their first moments.
        exp_avg_sqs: their second moments.
        half: half-precision copies to be written too, or empty.
        scalars: of `adam_scalars_`.
        hyper: of the optimizer.
        update_impl: "triton" or "torch", of the update.
        impl: of the other operators.
        dbias_sums: as `latent_adam_` takes them; with them the pre-biases are not updated.
    """
    codes, lists, S = encoded.codes, None, len(encoded.centred)
    if not codes.shared:  # each (source, row) has list entries of its own: treat them as one source of S * B rows
        indices = codes.indices.flatten(1)
        lists = lists_of(inverse_index_op(indices, 1, len(params[0]), None, impl), 0)
    encoders = [_encoder_lists(encoded, result, s) for s in range(S)]
    decoders = [_decoder_lists(encoded, result, s, lists) for s in range(S)]
    (enc_lists, k, enc_aux, aux_k), (dec_lists, _, dec_aux, dec_k) = _flat(encoders), _flat(decoders)
    latent_adam_(
        params, exp_avgs, exp_avg_sqs, half, scalars, result.dbiases, list(dbias_sums), enc_lists, dec_lists, k,
        enc_aux, dec_aux, aux_k or dec_k, *hyper, update_impl,
    )  # fmt: skip


def _decoder_lists(
    state: Encoded, result: LossResult, t: int, lists: InverseIndex | None
) -> tuple[WeightedLists, WeightedLists | None]:
    """Weighted lists whose sum is the gradient of target t's decoder: of the codes, and of AuxK's codes or None.

    `lists` covers all sources as one source of S * B rows; None if the sources share their indices.
    """
    codes, aux = state.codes, state.aux
    coef, scale, error, k = codes.gathered, result.coef[t], result.errors[t], codes.gathered.shape[2]
    if lists is None:
        lists = codes.lists(0)
    else:
        coef, scale, error = coef.reshape(1, -1), scale.reshape(1, -1), error.reshape(1, -1, error.shape[-1])
    main = WeightedLists(lists, coef, scale, None, error, k)
    if aux is None:
        return main, None
    assert result.aux_coef is not None, "AuxK's coefficients come with its codes"
    values = aux.gathered[t : t + 1]
    return main, WeightedLists(aux.lists(t), values, result.aux_coef[t], None, result.aux_errors[t], values.shape[2])


def _encoder_lists(state: Encoded, result: LossResult, s: int) -> tuple[WeightedLists, WeightedLists | None]:
    """Weighted lists of stream s's encoder gradient; the values are the ReLU's gate."""
    one, mat = slice(s, s + 1), state.centred[s][None]

    def lists(codes, dvalues):
        return WeightedLists(codes.lists(s), dvalues[one], None, codes.gathered[one], mat, codes.gathered.shape[2])

    return lists(state.codes, result.dvalues), None if state.aux is None else lists(state.aux, result.daux)


def _flat(pairs: list[tuple[WeightedLists, WeightedLists | None]]) -> tuple[list, int, list, int]:
    """The tensors and places of the codes' lists of all streams, and those of AuxK's."""
    main, aux = zip(*pairs, strict=True)
    more = [lists for lists in aux if lists is not None]
    return (
        [t for lists in main for t in lists.tensors], main[0].k, [t for lists in more for t in lists.tensors],
        more[0].k if more else 0,
    )  # fmt: skip


def check(optimizer: SparcAdam, model: AlignedSAE) -> None:
    """Check that this optimizer can take the fused step of `model`.

    Args:
        optimizer: a SparcAdam.
        model: the model to train.

    Raises:
        ValueError: the optimizer is another model's or clips by norm, a parameter is frozen or has a `.grad`.
    """
    require(optimizer.model is model, "optimizer", "a SparcAdam of this model", "another model's")
    if optimizer.param_groups[0]["max_grad_norm"] is not None:
        fail(
            "optimizer",
            "max_grad_norm=None (the norm of all gradients is not known before the first weights move; "
            "use compute_loss, backward and optimizer.step to clip)",
            repr(optimizer.param_groups[0]["max_grad_norm"]),
        )
    if all(p.requires_grad and p.grad is None for four in model.parameters_by_stream().values() for p in four):
        return
    for name, p in model.named_parameters():
        require(p.requires_grad, name, "a parameter that is trained (requires_grad)", "one that is not")
        ok = p.grad is None
        require(ok, f"{name}.grad", "None: training_step adds to no gradient (optimizer.zero_grad())", p.grad)
