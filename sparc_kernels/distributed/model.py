"""An AlignedSAE whose latents are divided among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..core.registry import resolve_impl
from ..core.validation import check_int, require
from ..nn.forward import ForwardState
from ..nn.loss import metrics_of, term_weights
from ..nn.module import AlignedSAE, as_autocast, is_recomputation
from ..nn.optimizer import SparcAdam
from ..nn.outputs import AlignedOutputs
from ..ops.adam_update import grad_square
from ..ops.encode import differentiable_values
from ..ops.gather import gather_sum
from ..ops.records import EncoderParams
from .agreement import agree
from .forward import encode
from .loss import Rows, ShardedLoss, SumOfGradients, SumOfParts
from .ranks import Ranks
from .step import sharded_step

__all__ = ["ShardedSAE", "shard_latents"]

# parameters and buffers of a stream that have latents, and along which dimension
BLOCKED = {"encoders.{}.weight": 0, "decoders.{}.weight": 1, "latent_biases.{}": 0, "stats_last_nonzero_{}": 0}


def shard_latents(model: AlignedSAE, mesh: DeviceMesh, optimizer: SparcAdam | None = None) -> ShardedSAE:
    """Divide a model's latents among the ranks of a mesh, in place.

    Every rank keeps its block of latents of every stream: rows of encoders and decoders, latent biases, dead counters
    and, with `optimizer`, their moments. Pre-biases stay on every rank.

    Args:
        model: the same on every rank; checked by its settings and the bits of its parameters. Neither it nor autocast
            may be float16, whose gradients would have to be scaled before they are made.
        mesh: one dimension, or two named ("data", "latents"), see `Ranks`. Ranks of one replica see the same rows,
            replicas see others.
        optimizer: SparcAdam of the model, whose moments are divided too.

    Returns:
        The model, which now is a ShardedSAE.

    Raises:
        ValueError: on every rank, if the ranks' models differ; also for fewer latents than ranks, tied parameters or
            another mesh.

    Equivalent to:
        the model itself, on all ranks' rows together: the same ids and bits of values, losses and gradients that differ
        by the order of sums.
    """
    require(isinstance(model, AlignedSAE) and not isinstance(model, ShardedSAE), "model", "an AlignedSAE", model)
    if optimizer is not None:
        ok = isinstance(optimizer, SparcAdam) and optimizer.model is model
        require(ok, "optimizer", "a SparcAdam of this model", optimizer)
    ranks, N = Ranks(mesh), model.n_latents
    require(ranks.shards <= N, "mesh", f"at most {N} ranks for {N} latents", f"{ranks.shards}")
    dtype = next(model.parameters()).dtype
    require(dtype != torch.float16, "model", "parameters of float64, float32 or bfloat16", "float16")
    require(model.decoder_layout == "rows", "decoder_layout", "'rows'", repr(model.decoder_layout))
    params = [p for four in model.parameters_by_stream().values() for p in four]
    own = len({id(p) for p in params}) == len(params)
    require(own, "model", "parameters of its own in every stream", "shared ones")
    facts = {"model": model.extra_repr(), "dtype": str(dtype), "torch": torch.__version__}
    agree(facts | {name: _digest(value) for name, value in model.state_dict().items()}, ranks.objects)
    start, stop = ranks.block(N)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for s in model.streams:
        for pattern, dim in BLOCKED.items():
            value = named[pattern.format(s)]
            whole, value.grad = value.shape, None
            value.data = _block(value.data, dim, start, stop)
            state = optimizer.state.get(value, {}) if optimizer else {}
            state.update({name: _block(x, dim, start, stop) for name, x in state.items() if x.shape == whole})
    model.__class__ = ShardedSAE
    sharded: Any = model
    sharded.ranks, sharded.block = ranks, (start, stop)
    return sharded


def _block(x: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """Copy latents start .. stop - 1, in memory of their own; a decoder keeps contiguous columns."""
    return x[start:stop].clone() if dim == 0 else x.t()[start:stop].clone().t()


_DIGEST_PIECE = 2**24  # numbers at a time
_ODD = 0x9E3779B97F4A7C15 - 2**64  # spreads places over 64 bits


def _digest(x: torch.Tensor) -> int:
    """A sum over the bits of a tensor, each number's weighted by its place, modulo 2^64."""
    if x.is_meta:
        return 0
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    bits = (x if x.is_contiguous() else x.t()).detach().reshape(-1).view(kinds[x.element_size()])
    total = 0
    for first in range(0, len(bits), _DIGEST_PIECE):
        piece = bits[first : first + _DIGEST_PIECE].long()
        places = torch.arange(first, first + len(piece), device=x.device) * _ODD + 1
        total += int(((piece + 1) * places).sum())
    return total % 2**64


@dataclass
class ShardedState(ForwardState):
    """The state of a forward over the own latents, and what outputs show of all ranks' latents."""

    rows: Rows | None = None
    ids: torch.Tensor | None = None  # int64 [B, k] or [S, B, k], of all ranks
    every_value: torch.Tensor | None = None  # [S, B, k], of all ranks
    aux_ids: torch.Tensor | None = None


class ShardedOutputs(AlignedOutputs):
    """Outputs of a ShardedSAE: codes, masks and indices of all ranks' latents; see `AlignedOutputs`.

    Reading `recon_{s}`, `cross_recon_{t}_from_{s}`, `logits_{s}` and AuxK's keys communicates: read them on every rank,
    in the same order. They carry no gradient; `values_{s}` and `sparse_codes_{s}` do.
    """

    state: ShardedState

    @property
    def indices(self) -> torch.Tensor:
        assert self.state.ids is not None, "a forward makes them"
        return self.state.ids

    def _of_stream(self, s):
        return self.indices if self.indices.dim() == 2 else self.indices[self._stream_position(s)]

    def _make_values(self, s):
        assert self.state.every_value is not None, "a forward makes them"
        return self.state.every_value[self._stream_position(s)]

    @torch.no_grad()
    def _make_logits(self, s):
        own = super()._make_logits(s)
        model = self.state.model
        sizes = [stop - start for start, stop in model.ranks.blocks(model.n_latents)]
        padded = own.new_zeros(len(own), max(sizes))
        padded[:, : own.shape[1]] = own
        every = model.ranks.latents.gather(padded, "logits").wait()
        return torch.cat([part[:, :size] for part, size in zip(every, sizes, strict=True)], 1)

    @torch.no_grad()
    def _make_recon(self, t, s):
        self.state.check_unchanged()
        model, codes, i = self.state.model, self.state.codes, self._stream_position(s)
        return model.decoded(t, codes.indices_of(i), codes.gathered[i])

    @torch.no_grad()
    def _make_aux(self, s, values):
        i, aux, ids = self._stream_position(s), self.state.aux, self.state.aux_ids
        assert aux is not None and ids is not None, "AuxK's keys are planned where it ran"
        if values:
            return SumOfParts.apply(self.state.model.ranks.latents, aux.gathered[i])
        return ids[i].clamp(min=0)  # any latent, of value 0, where too few are dead


class ShardedSAE(AlignedSAE):
    """An AlignedSAE of which this rank holds a block of latents; made by `shard_latents`.

    Forward, loss, training step and `reinit_dead_` communicate: every rank calls them, in the same order. Parameters,
    counters, `state_dict`, `get_dead_neurons` and what is per latent are of the block; `n_latents`, indices and codes
    are of all ranks.

    Attributes:
        ranks: the ranks of the mesh.
        block: [start, stop) of the latents here.
    """

    ranks: Ranks
    block: tuple[int, int]

    def forward(self, inputs: dict[str, torch.Tensor], rows: Sequence[int] | None = None) -> ShardedOutputs:
        """Select among the latents of all ranks, compute the own ones' values and update the own counters.

        Args:
            inputs: stream name -> [B, d_s], as of `AlignedSAE.forward`, without gradients. The ranks of one replica
                have the same rows; every replica has B rows.
            rows: of each replica, the number of rows before the padding, which counts for nothing; None: all.

        Returns:
            Read-only mapping with every official key.

        Raises:
            ValueError: as `AlignedSAE.forward`; also for rows that are not D numbers of 0..B, not all 0.
            RuntimeError: activation checkpointing runs the forward again.
        """
        parameters = self.parameters_by_stream()
        streams = self._check_inputs(inputs, parameters)
        encoder = self._encoders([parameters[s] for s in streams])
        own_rows = self._rows(inputs, rows, encoder)
        if is_recomputation():
            raise RuntimeError("forward: expected no activation checkpointing of a sharded model, got a recomputation")
        xs, settings = self._prepare(inputs, streams, encoder, torch.is_grad_enabled(), False)
        with torch.no_grad():
            made = encode(
                xs, encoder, self._counters(streams), settings, ranks=self.ranks, n_latents=self.n_latents,
                valid=own_rows.valid,
            )  # fmt: skip
        # every rank has a part of the pre-biases' gradient
        shared = SumOfGradients.apply(self.ranks.latents, *encoder.pre_biases)
        encoder = encoder._replace(pre_biases=list(shared))
        state = ShardedState(
            self, dict(inputs), streams, settings.impl, xs, encoder, made.centred, made.codes, made.aux
        )
        state.codes, state.aux = differentiable_values(
            made.codes, made.aux, xs, made.centred, encoder, impl=settings.impl
        )
        state.rows, state.ids, state.aux_ids = own_rows, made.ids, made.aux_ids
        state.every_value = SumOfParts.apply(self.ranks.latents, state.codes.gathered)
        return ShardedOutputs(state.record(parameters))

    def _rows(self, inputs, rows, encoder: EncoderParams) -> Rows:
        require(encoder.w_encs[0].dtype != torch.float16, "autocast", "bfloat16 or none", "float16")
        for s, x in inputs.items():
            require(not x.requires_grad, f"inputs[{s!r}]", "a tensor that needs no gradient", "one that does")
        D, B = self.ranks.replicas, next(iter(inputs.values())).shape[0]
        if rows is not None:
            ok = isinstance(rows, Sequence) and len(rows) == D
            require(ok, "rows", f"a number for each of {D} replicas", rows)
            rows = [check_int("rows", count, 0, B, f"at most {B}, the rows of inputs") for count in rows]
            require(sum(rows) > 0, "rows", "at least one row in a replica", repr(rows))
        return Rows.of(B, rows, self.ranks)

    def compute_loss(
        self,
        outputs: AlignedOutputs,
        inputs: dict[str, torch.Tensor],
        auxk_coef: float = 1 / 32,
        cross_loss_coef: float = 1.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of the whole batch, over all replicas; see `AlignedSAE.compute_loss`.

        Its gradients are of the own latents and this replica's rows; `SparcAdam.step` sums them over replicas. It can
        be differentiated once.

        Args:
            outputs: result of `forward` over all streams.
            inputs: the targets, as many rows as in the forward.
            auxk_coef: weight of the auxiliary loss, >= 0.
            cross_loss_coef: weight of the cross-reconstruction loss, >= 0.
        """
        state, streams = self._check_outputs(outputs, inputs, auxk_coef, cross_loss_coef)
        assert isinstance(state, ShardedState) and state.rows is not None, "its forward makes it"
        parameters = state.check_unchanged()
        values = state.codes.gathered
        with torch.set_grad_enabled(state.grad and torch.is_grad_enabled()):
            weights = term_weights(len(values), values.dtype, values.device, cross_loss_coef)
            decoders = as_autocast([p for _, *decoder, _ in parameters.values() for p in decoder])
            how = state.rows, self.ranks, state.impl
            loss, terms, aux_terms = ShardedLoss.apply(
                weights, auxk_coef, torch.is_grad_enabled(), how, state.codes, state.aux, values,
                state.aux and state.aux.values, *decoders[::2], *decoders[1::2], *(inputs[s] for s in streams),
            )  # fmt: skip
            return loss, metrics_of(streams, loss, terms, aux_terms, cross_loss_coef)

    def training_step(
        self,
        inputs: dict[str, torch.Tensor],
        optimizer: SparcAdam,
        auxk_coef: float = 1 / 32,
        cross_loss_coef: float = 1.0,
        rows: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run forward, loss, backward and optimizer step without weight gradients; see `AlignedSAE.training_step`.

        Replicas exchange codes, inputs and errors, and each updates its parameters from the whole batch.

        Args:
            inputs: stream name -> [B, d_s], for every stream.
            optimizer: SparcAdam of this model without max_grad_norm.
            auxk_coef: weight of the auxiliary loss, >= 0.
            cross_loss_coef: weight of the cross-reconstruction loss, >= 0.
            rows: as of `forward`.
        """
        prepared, settings, streams = self._prepare_step(inputs, optimizer, auxk_coef, cross_loss_coef)
        with torch.no_grad():
            loss, terms, aux_terms = sharded_step(
                self, optimizer, prepared, settings, auxk_coef, self._rows(inputs, rows, prepared.encoder)
            )
            return loss, metrics_of(streams, loss, terms, aux_terms, cross_loss_coef)

    @torch.no_grad()
    def decoded(self, t: str, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Reconstruct a stream from all ranks' latents; communicates.

        Args:
            t: name of the stream.
            ids: int64 [B, k], own latents, ABSENT where other ranks have them.
            values: [B, k].

        Returns:
            [B, d], on every rank.
        """
        w_dec, bias = self.decoder_of(t)
        part = gather_sum(ids, values[None], w_dec.t(), None, True, resolve_impl(self.impl, w_dec))[0]
        return (self.ranks.latents.total(part, "reconstructions") + bias).to(w_dec.dtype)

    # ------------------------------------------------------------------------------------------------ training helpers

    @torch.no_grad()
    def reinit_dead_(self, generator: torch.Generator | None = None) -> dict[str, int]:
        """Re-initialise the dead latents of all ranks, with the rows that one process would draw.

        Args:
            generator: in the same state on every rank; None: torch's default generator.

        Returns:
            Number of re-initialised latents of each stream, over all ranks.
        """
        counts, all_dead = {}, self.get_dead_neurons()
        numbers = torch.stack([dead.sum() for dead in all_dead.values()])
        every = self.ranks.latents.gather(numbers, "dead").wait().tolist()  # [T][S]
        for i, (s, dead) in enumerate(all_dead.items()):
            weight, bias = self._w_enc(s), self.latent_biases[s]
            before, own = sum(part[i] for part in every[: self.ranks.shard]), every[self.ranks.shard][i]
            counts[s] = sum(part[i] for part in every)
            if counts[s]:
                new_rows = torch.randn(
                    counts[s], weight.shape[1], device=weight.device, dtype=weight.dtype, generator=generator
                )
                weight[dead] = new_rows[before : before + own] * 0.01
                bias[dead] = 0
                getattr(self, f"stats_last_nonzero_{s}")[dead] = 0
        return counts

    def extra_repr(self) -> str:
        start, stop = self.block
        return f"{super().extra_repr()}, block={start}..{stop - 1}, rank={self.ranks.rank} of {self.ranks.size}"

    # ------------------------------------------------------------------------------------------------ for the optimizer

    def sum_gradients_(self, grads: Sequence[torch.Tensor | None] | None = None) -> None:
        """Sum the gradients over replicas in place, in the order of the replicas; `SparcAdam.step` calls it.

        Args:
            grads: in one order on every rank, None for a parameter without one; None: `.grad` of all parameters.
        """
        if self.ranks.data is not None:
            for g in [p.grad for p in self.parameters()] if grads is None else grads:
                if g is not None:
                    self.ranks.data.total_(g, "gradients")

    def total_square(self, decs, grads, normalize: int, impl: str) -> torch.Tensor:
        """Sum the squares of all ranks' gradients, as `ops.adam_update.grad_square` does for one process."""
        biases = [g if i % 4 == 2 else None for i, g in enumerate(grads)]
        blocks = [None if i % 4 == 2 else g for i, g in enumerate(grads)]
        own = grad_square(decs, blocks, normalize, impl)
        return self.ranks.latents.total(own, "norm") + grad_square(decs, biases, normalize, impl)

    def any_inf(self, found_inf: torch.Tensor) -> torch.Tensor:
        """Return `found_inf` of torch.amp, 1 where it is so on any rank."""
        return self.ranks.gather(found_inf, "found_inf").amax((0, 1))
