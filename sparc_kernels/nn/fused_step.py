"""`AlignedSAE.training_step`: a whole training step in which gradients of the weights never exist.

The order is forced by what is still needed: values, gathers of AuxK and the loss read the weights as they were, and the
loss says whether anything may move. So all of that comes first, with the errors E of every target kept, S x B x D
numbers; then each stream's decoder and encoder are updated from their latents' lists, and last the pre-biases.
"""

from __future__ import annotations

import torch

from ..core.validation import check_number, fail, require
from ..ops.adam import MODES, adam_stream_, rows_of
from ..ops.aligned_loss import residual
from ..ops.bias_grads import column_sums
from ..ops.decode_grads import decode_grads, grads_of_target, target_weights
from ..ops.gather import KEEP_ALL, KEEP_NONE, gather_error
from ..ops.inverse_index import inverse_index_op, lists_of
from ..ops.latent_adam import latent_adam_
from ..ops.loss_terms import add_auxk, loss_terms


@torch.no_grad()
def training_step(model, inputs, optimizer, auxk_coef, cross_loss_coef):
    """See `AlignedSAE.training_step`."""
    _check(model, optimizer)
    check_number("auxk_coef", auxk_coef)
    check_number("cross_loss_coef", cross_loss_coef)
    given = model._check_inputs(inputs)
    require(given == model.streams, "inputs", f"all streams {model.streams} (the loss needs them)", repr(given))
    shadow = optimizer.shadow_matrices()
    c = model._choose(inputs, lists=True, w_encs=shadow and [w_enc for w_enc, _ in shadow])
    targets = _Targets(model, inputs, c, shadow and [w_dec for _, w_dec in shadow])
    weights = model._term_weights(c.values, cross_loss_coef)
    loss, terms, aux_terms = targets.losses_and_gradients(weights, auxk_coef)
    _update(optimizer, c, targets, loss, shadow)
    return loss, model._metrics(loss, terms, aux_terms, cross_loss_coef)


class _Targets:
    """Losses of every target, and of its decoder's gradient what the lists are multiplied with."""

    def __init__(self, model, inputs, c, rows):
        """rows: the decoders' weights [N, d] as the operators take them, if they are there."""
        self.c, self.inputs = c, [inputs[s] for s in c.streams]
        self.rows, self.biases = rows or [model._decoder(s)[0].t() for s in c.streams], c.pre_biases
        self.errors, self.coef = [], None  # of each target [S, B, d]; [T, S, B]
        self.aux_errors, self.aux_coef = [], None  # [1, B, d]; [T, 1, B]
        self.dvalues = torch.empty_like(c.values, memory_format=torch.contiguous_format)
        self.daux = None
        self.dbiases = None  # [d] each, in the accumulator dtype

    def losses_and_gradients(self, weights, auxk_coef):
        """The loss, its terms, and AuxK's or None."""
        c = self.c
        norm, self.coef = target_weights(self.inputs, weights, c.impl)
        sqs, gs, aux_gs, aux_terms = [], [], [], None
        for t in range(len(self.rows)):
            sq, g, error = self._target(t)
            sqs.append(sq)
            gs.append(g)
            self.errors.append(error)
        loss, terms = loss_terms(sqs, norm, weights, c.values, c.impl)
        if c.aux is not None:
            loss, aux_terms, aux_gs = self._auxk(loss, weights, auxk_coef)
        self.dbiases = column_sums(gs, aux_gs, [norm] * len(gs), c.impl)
        return loss, terms, aux_terms

    def _target(self, t):
        c = self.c
        return grads_of_target(
            c.selection.indices, c.values, self.rows[t], self.biases[t], self.inputs[t], self.coef[t], c.selection[2:],
            None, KEEP_ALL, self.dvalues, t > 0, None, False, c.impl,
        )  # fmt: skip

    def _auxk(self, loss, weights, auxk_coef):
        c, T = self.c, len(self.rows)
        residuals = [residual(b, e[t]) for t, (b, e) in enumerate(zip(self.biases, self.errors, strict=True))]
        norm, _ = target_weights(residuals, weights[:, :1], c.impl)
        args = [
            (c.aux.indices[t], c.aux_values[t : t + 1], self.rows[t], self.biases[t], residuals[t]) for t in range(T)
        ]  # fmt: skip
        sqs = [gather_error(*args[t], KEEP_NONE, c.aux.count[t], c.impl)[0] for t in range(T)]
        loss, terms, aux_weights = add_auxk(sqs, norm, loss, auxk_coef, c.impl)
        _, self.aux_coef = target_weights(residuals, aux_weights, c.impl)
        self.daux, gs = torch.empty_like(c.aux_values, memory_format=torch.contiguous_format), []
        for t in range(T):
            _, g, error = decode_grads(
                *args[t], self.aux_coef[t], *c.aux.lists(t), c.aux.count[t], KEEP_ALL, self.daux[t : t + 1], False,
                None, False, c.impl,
            )  # fmt: skip
            gs.append(g)
            self.aux_errors.append(error)
        return loss, terms, gs

    def decoder_lists(self):
        """Lists of each target's decoder, of AuxK (empty without), places per row of both."""
        c, n = self.c, self.rows[0].shape[0]
        coef, k = c.values, c.values.shape[2]
        if c.selection.indices.dim() == 2:
            lists = c.selection.lists(0)
        else:  # every (source, row) has its own list entries: one source with S * B rows
            lists, coef = lists_of(inverse_index_op(c.selection.indices.flatten(1), 1, n, None, c.impl), 0), None
        for t, error in enumerate(self.errors):
            scale = self.coef[t]
            if coef is None:
                error, scale = error.reshape(1, -1, error.shape[-1]), scale.reshape(1, -1)
            main = [*lists, c.values if coef is not None else c.values.reshape(1, -1), scale, None, error]
            aux = []
            if c.aux is not None:
                aux = [*c.aux.lists(t), c.aux_values[t : t + 1], self.aux_coef[t], None, self.aux_errors[t]]
            yield main, aux, k

    def encoder_lists(self, s):
        c, one = self.c, slice(s, s + 1)
        mat = c.centred[s][None]
        main = [*c.selection.lists(s), self.dvalues[one], None, c.values[one], mat]
        aux = []
        if c.aux is not None:
            aux = [*c.aux.lists(s), self.daux[one], None, c.aux_values[one], mat]
        return main, aux


def _update(optimizer, c, targets, loss, shadow):
    group, streams = optimizer.param_groups[0], optimizer.streams()
    moments = optimizer.prepare([[True] * 4 for _ in streams])
    optimizer.count_step([True] * (4 * len(streams)), loss=loss)
    mode, adam = MODES[group["normalize"]], (*group["betas"], group["eps"])
    aux_k = 0 if c.aux is None else c.aux_values.shape[2]
    for s, (main, aux, k) in enumerate(targets.decoder_lists()):
        stream, (ms, vs), impl = streams[s], moments[s], optimizer.impl_of(streams[s])
        w_enc, w_dec, pre_bias, latent_bias = (rows_of(p, i) for i, p in enumerate(stream))
        scalars = optimizer.scalars(s)
        enc_shadow, dec_shadow = shadow[s] if shadow else (None, None)
        latent_adam_(
            w_dec, ms[1], vs[1], dec_shadow, [], scalars[1], scalars[1], main, k, aux, aux_k, mode, *adam, impl,
        )  # fmt: skip
        main, aux = targets.encoder_lists(s)
        bias = [latent_bias, ms[3], vs[3]]
        lean = latent_adam_(
            w_enc, ms[0], vs[0], enc_shadow, bias, scalars[0], scalars[3], main, k, aux, aux_k, 0, *adam, impl,
        )  # fmt: skip
        dpre = targets.dbiases[s] - lean
        params, grads = [w_enc, w_dec, pre_bias, latent_bias], [None, None, dpre, None]
        adam_stream_(params, grads, ms, vs, scalars, mode, *adam, impl)
    torch.autograd.graph.increment_version([p for stream in streams for p in stream])
    if shadow:
        optimizer.shadow_written()
    optimizer._opt_called = True  # learning rate schedulers ask


def _check(model, optimizer):
    require(optimizer.model is model, "optimizer", "a SparcAdam of this model", "another model's")
    if optimizer.param_groups[0]["max_grad_norm"] is not None:
        fail(
            "optimizer",
            "max_grad_norm=None (the norm of all gradients is not known before the first weights move; "
            "use compute_loss, backward and optimizer.step to clip)",
            repr(optimizer.param_groups[0]["max_grad_norm"]),
        )
    for name, p in model.named_parameters():
        require(p.requires_grad, name, "a parameter that is trained (requires_grad)", "one that is not")
        ok = p.grad is None
        require(ok, f"{name}.grad", "None: training_step adds to no gradient (optimizer.zero_grad())", p.grad)
