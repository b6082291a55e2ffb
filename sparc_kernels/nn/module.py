"""AlignedSAE, a drop-in replacement for the official SPARC class."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.numerics import acc_dtype, autocast_enabled, memory_of
from ..core.registry import IMPLS, resolve_impl
from ..core.validation import check_bool, check_int, check_number, check_tensor, fail, require
from ..launch.budgets import MAX_K, MAX_STREAMS
from ..ops.encode import differentiable_values
from ..ops.joint import JointCast, wants_joint
from ..ops.records import EncoderParams
from .forward import EncodeSettings, ForwardState, Parameters, encode, version_of
from .fused_step import FusedInputs
from .loss import loss_of, metrics_of, term_weights
from .outputs import AlignedOutputs

if TYPE_CHECKING:
    from .optimizer import SparcAdam


class AlignedSAE(nn.Module):
    """Sparse autoencoder over several streams that share their latents (SPARC, arXiv 2507.06265).

    Args:
        d_streams: stream name -> width, 1 to 8 streams; fixes their order.
        n_latents: N.
        k: active latents per row, 1..min(N, 512).
        auxk: number of dead latents in the auxiliary loss, at most min(N, 512); None or 0 disables it.
        auxk_threshold: a latent fires where its value is greater than this.
        dead_steps_threshold: a latent is dead if it has not fired for more forwards than this.
        use_sparse_decoder: accepted for compatibility and ignored; the decoder is always sparse.
        topk_type: "global" (one selection on the summed pre-activations) or "local" (one per stream).
        impl: "auto" (Triton kernels on CUDA tensors, torch elsewhere), "triton" or "torch".
        count_in_eval: update the dead counters in eval mode too, as the official class does.
        device: of the parameters, as in torch.nn.
        dtype: of the parameters, as in torch.nn: float64, float32, bfloat16 or float16.

    Raises:
        ValueError: an argument is out of range or of another type.

    state_dict keys and shapes are the official ones and load both ways. `decoders[s].weight` is [d, N] with strides
    (1, d), so that a latent's decoder row is contiguous; `decoder_layout_` changes the layout. The initial parameters
    equal the official class's under the same torch seed.
    """

    ranks: Any = None  # of a ShardedSAE: `distributed.Ranks`

    def __init__(
        self,
        d_streams: dict[str, int],
        n_latents: int,
        k: int,
        auxk: int | None = None,
        auxk_threshold: float = 1e-3,
        dead_steps_threshold: int = 1000,
        use_sparse_decoder: bool = False,
        *,
        topk_type: str = "global",
        impl: str = "auto",
        count_in_eval: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_streams(d_streams)
        self.d_streams = {str(s): int(d) for s, d in d_streams.items()}  # NumPy's types do not go into JSON
        self.streams = list(self.d_streams)
        self.n_latents = check_int("n_latents", n_latents, 1)
        limit = f"at most n_latents and {MAX_K}"
        self.k = check_int("k", k, 1, min(n_latents, MAX_K), limit)
        self.auxk = None if auxk is None else check_int("auxk", auxk, 0, min(n_latents, MAX_K), limit) or None
        self.auxk_threshold = float(check_number("auxk_threshold", auxk_threshold))
        self.dead_steps_threshold = check_int("dead_steps_threshold", dead_steps_threshold, 0)
        self.use_sparse_decoder = use_sparse_decoder
        require(topk_type in ("global", "local"), "topk_type", "'global' or 'local'", repr(topk_type))
        require(impl in IMPLS, "impl", f"one of {', '.join(map(repr, IMPLS))}", repr(impl))
        require(dtype is None or dtype in _DTYPES, "dtype", "float64, float32, bfloat16 or float16", repr(dtype))
        self.topk_type, self.impl = str(topk_type), impl
        self.count_in_eval = check_bool("count_in_eval", count_in_eval)
        self.decoder_layout = "rows"

        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        self.pre_biases = nn.ParameterDict()
        self.latent_biases = nn.ParameterDict()
        for s, d in self.d_streams.items():
            encoder = nn.Linear(d, n_latents, bias=False, device=device, dtype=dtype)
            decoder = nn.Linear(n_latents, d, bias=False, device=device, dtype=dtype)  # drawn to keep official seeds
            decoder.weight.data = encoder.weight.data.clone().t()
            self.encoders[s], self.decoders[s] = encoder, decoder
            self.pre_biases[s] = nn.Parameter(torch.zeros(d, device=device, dtype=dtype))
            self.latent_biases[s] = nn.Parameter(torch.zeros(n_latents, device=device, dtype=dtype))
            self.register_buffer(f"stats_last_nonzero_{s}", torch.zeros(n_latents, dtype=torch.long, device=device))
        self.unit_norm_decoder_()
        self.register_load_state_dict_post_hook(_restore_layout)
        # of the latest forwards, for recomputation by activation checkpointing
        self._recent_dead: dict[tuple, torch.Tensor] = {}

    # ------------------------------------------------------------------------------------------------ forward and loss

    def forward(self, inputs: dict[str, torch.Tensor]) -> AlignedOutputs:
        """Select latents, compute their values and update the dead counters.

        Args:
            inputs: stream name -> [B, d_s], for any non-empty subset of the streams, in the parameters' dtype (any
                floating dtype under autocast). Row b of every stream describes the same sample.

        Returns:
            AlignedOutputs, a read-only mapping with every official key; dense tensors are computed on first access.

        Raises:
            ValueError: a stream is unknown, or a tensor has a wrong shape, dtype or device.

        Activation checkpointing around forward and loss updates the counters once (docs/integration.md).
        """
        parameters = self.parameters_by_stream()
        streams = self._check_inputs(inputs, parameters)
        state = self._encode(inputs, streams, self._encoders([parameters[s] for s in streams]))
        parts = state.codes, state.aux, state.xs, state.centred, state.encoder
        state.codes, state.aux = differentiable_values(*parts, impl=state.impl)
        return AlignedOutputs(state.record(parameters))

    def _encode(self, inputs, streams: list[str], encoder: EncoderParams) -> ForwardState:
        """Select latents, gather values and update the counters, without gradients."""
        recomputes = is_recomputation()
        # inverse indices are for gradients
        xs, settings = self._prepare(inputs, streams, encoder, torch.is_grad_enabled(), recomputes)
        with torch.no_grad():
            dead = self._recalled_dead(inputs) if recomputes and self.auxk else None
            encoded = encode(xs, encoder, self._counters(streams), dead, settings)
            if encoded.dead is not None and not recomputes and not torch.compiler.is_compiling():
                self._remember_dead(inputs, encoded.dead)
        return ForwardState(self, dict(inputs), streams, settings.impl, xs, encoder, *encoded[:3])

    def _prepare(
        self, inputs, streams: list[str], encoder: EncoderParams, lists: bool, recomputes: bool
    ) -> tuple[list[torch.Tensor], EncodeSettings]:
        """Return the inputs in the operators' dtype, and the settings of the forward."""
        dtype = encoder.w_encs[0].dtype
        xs = [_as(inputs[s], dtype) for s in streams]
        impl = resolve_impl(self.impl, xs[0])
        counts = (self.training or self.count_in_eval) and not recomputes
        return xs, EncodeSettings(
            self.k, self.topk_type, self.auxk, lists, counts, self.auxk_threshold, self.dead_steps_threshold, impl
        )  # fmt: skip

    def _counters(self, streams: list[str]) -> list[torch.Tensor]:
        return [getattr(self, f"stats_last_nonzero_{s}") for s in streams]

    def _recalled_dead(self, inputs) -> torch.Tensor | None:
        """Return the dead latents of the forward that activation checkpointing runs again; None: by the counters."""
        counts = self.training or self.count_in_eval
        if (dead := self._recent_dead.get(_identity(inputs))) is not None or not counts:
            return dead  # None for a forward in eval mode from a hook
        raise RuntimeError(
            f"inputs: expected those of one of the last {_REMEMBERED} forwards when activation checkpointing runs "
            "one again, got others, whose dead latents are not known; make inputs outside of what is checkpointed, "
            "run backward sooner or set auxk=None"
        )

    def _remember_dead(self, inputs, dead: torch.Tensor) -> None:
        """Keep the dead latents of a forward, for activation checkpointing."""
        key = _identity(inputs)
        self._recent_dead.pop(key, None)
        self._recent_dead[key] = dead
        while len(self._recent_dead) > _REMEMBERED:
            del self._recent_dead[next(iter(self._recent_dead))]

    def __getstate__(self):
        return {**self.__dict__, "_recent_dead": {}}

    def compute_loss(
        self,
        outputs: AlignedOutputs,
        inputs: dict[str, torch.Tensor],
        auxk_coef: float = 1 / 32,
        cross_loss_coef: float = 1.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the total loss without materialising reconstructions or dense codes.

        total = mean_s NMSE(s <- s) + auxk_coef * mean_s Aux_s + cross_loss_coef * mean_{t != s} NMSE(t <- s)

        Args:
            outputs: result of `forward` over all streams; no parameter may have changed since.
            inputs: the targets, stream name -> [B, d_s], for every stream.
            auxk_coef: weight of the auxiliary loss, >= 0.
            cross_loss_coef: weight of the cross-reconstruction loss, >= 0.

        Returns:
            The loss (float32, float64 for float64 parameters), and a dict of detached tensors under the official
            metric names: mse_loss_{s}, auxk_loss_{s}, cross_loss_{t}_from_{s}, num_active_neurons_{s},
            l1_sparsity_{s}, avg_mse_loss (the true mean; the official one aliases total_loss), avg_auxk_loss,
            avg_auxk_loss_scaled, avg_cross_loss, avg_cross_loss_scaled, avg_l1_sparsity, avg_num_active_neurons,
            total_loss.

        Raises:
            ValueError: outputs of another model, of some streams only or of another number of rows.
            RuntimeError: a parameter or an input was changed in place since the forward.
        """
        state, streams = self._check_outputs(outputs, inputs, auxk_coef, cross_loss_coef)
        values, parameters = state.codes.gathered, state.check_unchanged()
        with torch.set_grad_enabled(state.grad and torch.is_grad_enabled()):
            weights = term_weights(len(values), values.dtype, values.device, cross_loss_coef)
            decoders = as_autocast([p for _, *decoder, _ in parameters.values() for p in decoder])
            targets = [*zip(decoders[::2], decoders[1::2], [inputs[s] for s in streams], strict=True)]
            impl = resolve_impl(self.impl, decoders[0])
            loss, terms, aux_terms = loss_of(state, targets, weights=weights, auxk_coef=auxk_coef, impl=impl)
            return loss, metrics_of(streams, loss, terms, aux_terms, cross_loss_coef)

    def _check_outputs(self, outputs, inputs, auxk_coef, cross_loss_coef) -> tuple[ForwardState, list[str]]:
        """Check the arguments of `compute_loss`; return the state of the forward and all streams."""
        require(isinstance(outputs, AlignedOutputs), "outputs", "the AlignedOutputs that forward returned", outputs)
        state = outputs.state
        require(state.model is self, "outputs", "what this model's forward returned", "another model's outputs")
        check_number("auxk_coef", auxk_coef)
        check_number("cross_loss_coef", cross_loss_coef)
        same = isinstance(inputs, Mapping) and inputs.keys() == state.inputs.keys()
        same = same and all(inputs[s] is x for s, x in state.inputs.items())  # then they were checked
        streams = state.streams if same else self._check_inputs(inputs, self.parameters_by_stream())
        require(streams == self.streams, "inputs", f"all streams {self.streams} (the loss needs them)", repr(streams))
        encoded = state.streams
        require(encoded == self.streams, "outputs", f"a forward over all streams {self.streams}", repr(encoded))
        values = state.codes.values
        assert values is not None, "a forward makes them"
        rows, n_rows = inputs[streams[0]].shape[0], values.shape[1]
        if rows != n_rows:
            fail("inputs", f"{n_rows} rows as in outputs", str(rows))
        return state, streams

    def training_step(
        self,
        inputs: dict[str, torch.Tensor],
        optimizer: SparcAdam,
        auxk_coef: float = 1 / 32,
        cross_loss_coef: float = 1.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run forward, loss, backward and optimizer step without materialising weight gradients.

        Each latent's list of rows feeds the update of its weight rows directly. Latents that did not fire are updated
        exactly too: their moments decay and their weights move by momentum. A batch whose loss is NaN or infinite
        updates the dead counters only, decided on the device.

        Args:
            inputs: stream name -> [B, d_s], for every stream.
            optimizer: SparcAdam of this model without max_grad_norm; its settings are read at every call.
            auxk_coef: weight of the auxiliary loss, >= 0.
            cross_loss_coef: weight of the cross-reconstruction loss, >= 0.

        Returns:
            The detached loss, and the metrics of `compute_loss`.

        Raises:
            ValueError: the optimizer clips by norm, which needs all gradients before the first update; a parameter has
                a gradient in `.grad` or does not require one; also for bad inputs and coefficients.

        On CUDA, steps are replayed from a CUDA graph after three of one kind, with the same bits (docs/integration.md;
        off with `SparcAdam(graph=False)`).

        Equivalent to:
            optimizer.zero_grad()
            loss, metrics = self.compute_loss(self(inputs), inputs, auxk_coef, cross_loss_coef)
            loss.backward()
            optimizer.step()
        except that hooks of gradients and of optimizer.step are not called.
        """
        is_sparc_adam = hasattr(optimizer, "fused_step")
        require(is_sparc_adam, "optimizer", "a SparcAdam", optimizer)  # its module imports this one
        if optimizer.model is self:
            key = "training_step", auxk_coef, cross_loss_coef
            body = functools.partial(_training_step, self, optimizer, auxk_coef, cross_loss_coef)
            replayed = optimizer.graphed(body, inputs, key)
            if replayed is not None:
                return replayed
        prepared, settings, streams = self._prepare_step(inputs, optimizer, auxk_coef, cross_loss_coef)
        with torch.no_grad():
            loss, terms, aux_terms = optimizer.fused_step(prepared, settings, auxk_coef)
            return loss, metrics_of(streams, loss, terms, aux_terms, cross_loss_coef)

    def _prepare_step(
        self, inputs, optimizer: SparcAdam, auxk_coef, cross_loss_coef
    ) -> tuple[FusedInputs, EncodeSettings, list[str]]:
        """Check the arguments of `training_step`; return its tensors and settings, and all streams."""
        optimizer.check_fused_step(self)
        check_number("auxk_coef", auxk_coef)
        check_number("cross_loss_coef", cross_loss_coef)
        parameters = self.parameters_by_stream()
        streams = self._check_inputs(inputs, parameters)
        require(streams == self.streams, "inputs", f"all streams {self.streams} (the loss needs them)", repr(streams))
        with torch.no_grad():
            half = optimizer.half_weights()
            encoder = self._encoders([*parameters.values()], None if half is None else [w_enc for w_enc, _ in half])
            w_decs = [w_dec.t() for _, w_dec in half] if half else as_autocast([w for _, w, *_ in parameters.values()])
            xs, settings = self._prepare(inputs, streams, encoder, True, False)
            targets = [*zip(w_decs, encoder.pre_biases, [inputs[s] for s in streams], strict=True)]
            weights = term_weights(len(streams), acc_dtype(xs[0].dtype), xs[0].device, cross_loss_coef)
            return FusedInputs(xs, encoder, self._counters(streams), targets, weights, half), settings, streams

    def _encoders(self, params, w_encs=None) -> EncoderParams:
        """The encoder parameters of some streams in the operators' dtype."""
        weights: list[torch.Tensor] = [w_enc for w_enc, *_ in params]
        if w_encs is not None:
            pass
        elif wants_joint(weights) and autocast_enabled(weights[0].device):
            # the cast writes all weights anyway: adjacent, so that one library GEMM can serve all streams
            w_encs = JointCast.apply(torch.get_autocast_dtype(weights[0].device.type), *weights)
        else:
            w_encs = as_autocast(weights)
        dtype = w_encs[0].dtype
        pre_biases = [_as(pre_bias, dtype) for _, _, pre_bias, _ in params]
        return EncoderParams(w_encs, pre_biases, [_as(bias, dtype) for *_, bias in params])

    def encoder_of(self, s: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the encoder parameters of a stream, cast as autocast would.

        Args:
            s: name of the stream.

        Returns:
            w_enc [N, d], pre_bias [d] and latent_bias [N].
        """
        w_enc, _, *biases = self.parameters_of(s)
        cast_w_enc, pre_bias, latent_bias = as_autocast([w_enc, *biases])
        return cast_w_enc, pre_bias, latent_bias

    def decoder_of(self, s: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decoder parameters of a stream, cast as autocast would.

        Args:
            s: name of the stream.

        Returns:
            w_dec [d, N] and pre_bias [d].
        """
        _, w_dec, pre_bias, _ = self.parameters_of(s)
        cast_w_dec, cast_bias = as_autocast([w_dec, pre_bias])
        return cast_w_dec, cast_bias

    def parameters_of(self, s: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """Return w_enc [N, d], w_dec [d, N], pre_bias [d] and latent_bias [N] of a stream.

        Args:
            s: name of the stream.
        """
        encoders: Any = self.encoders
        decoders: Any = self.decoders
        return encoders[s].weight, decoders[s].weight, self.pre_biases[s], self.latent_biases[s]

    def parameters_by_stream(self) -> Parameters:
        """Return `parameters_of` every stream, in the model's order."""
        own: Any = self._modules
        encoders, decoders = own["encoders"]._modules, own["decoders"]._modules
        pre_biases, latent_biases = own["pre_biases"]._parameters, own["latent_biases"]._parameters
        try:  # the modules' own tables: a tenth of the time of attributes
            weights = [(encoders[s]._parameters["weight"], decoders[s]._parameters["weight"]) for s in self.streams]
            return {s: (*pair, pre_biases[s], latent_biases[s]) for s, pair in zip(self.streams, weights, strict=True)}
        except KeyError:  # parametrized
            return {s: self.parameters_of(s) for s in self.streams}

    def _w_enc(self, s: str) -> nn.Parameter:
        return self.parameters_of(s)[0]

    def _w_dec(self, s: str) -> nn.Parameter:
        return self.parameters_of(s)[1]

    def _check_inputs(self, inputs, parameters: Parameters) -> list[str]:
        """Check the inputs; return their streams in the model's order."""
        ok = isinstance(inputs, Mapping) and len(inputs) > 0
        require(
            ok, "inputs", "a non-empty dict of stream name to tensor", inputs if not isinstance(inputs, dict) else "{}"
        )
        for name in inputs:
            require(name in self.d_streams, "inputs", f"streams among {self.streams}", repr(name))
        streams = [s for s in self.streams if s in inputs]
        rows, autocast = None, autocast_enabled(parameters[streams[0]][0].device)
        for s in streams:
            x, (weight, w_dec, pre_bias, bias) = inputs[s], parameters[s]
            dtype, device = weight.dtype, weight.device
            alike = w_dec.dtype == pre_bias.dtype == bias.dtype == dtype
            if not (alike and w_dec.device == pre_bias.device == bias.device == device):
                self._refuse_parameter(s)
            ok = isinstance(x, torch.Tensor) and x.dim() == 2 and x.device == device and x.shape[1] == weight.shape[1]
            ok = ok and (x.dtype == dtype or (autocast and dtype != torch.float64 and x.dtype in _DTYPES))
            if not ok or x.shape[0] != (rows or x.shape[0]) or x.shape[0] == 0:
                self._refuse_input(inputs, s, streams[0])
            rows = x.shape[0]
        return streams

    def _refuse_input(self, inputs, s: str, first: str) -> None:
        """Raise the error that says what is wrong with the input of a stream."""
        name, weight = f"inputs[{s!r}]", self._w_enc(s)
        x = check_tensor(name, inputs[s], ("B", self.d_streams[s]))
        require(x.device == weight.device, name, f"a tensor on {weight.device}", x)
        ok = x.dtype == weight.dtype or (autocast_enabled(weight.device) and weight.dtype != torch.float64)
        require(ok, name, f"dtype {str(weight.dtype).removeprefix('torch.')} as the parameters", x)
        require(x.shape[0] > 0, name, "at least one row", x)
        fail(name, f"{inputs[first].shape[0]} rows as inputs[{first!r}]", x)

    def _refuse_parameter(self, s: str) -> None:
        """Raise the error that names the parameter of another dtype or device, which the operators cannot take."""
        like, *others = self.parameters_of(s)
        for name, p in zip((f"decoders.{s}.weight", f"pre_biases.{s}", f"latent_biases.{s}"), others, strict=True):
            if p.dtype != like.dtype or p.device != like.device:
                fail(
                    name,
                    f"a {str(like.dtype).removeprefix('torch.')} tensor on {like.device} as encoders.{s}.weight",
                    p,
                )

    # ------------------------------------------------------------------------------------------------ training helpers

    def get_dead_neurons(self, threshold: int | None = None) -> dict[str, torch.Tensor]:
        """Find the dead latents of every stream.

        Args:
            threshold: a latent is dead if it has not fired for more forwards than this; None: dead_steps_threshold.

        Returns:
            {s: bool [N]}.
        """
        threshold = self.dead_steps_threshold if threshold is None else check_int("threshold", threshold, 0)
        return {s: getattr(self, f"stats_last_nonzero_{s}") > threshold for s in self.streams}

    @torch.no_grad()
    def unit_norm_decoder_(self) -> AlignedSAE:
        """Divide every decoder column by (its norm + 1e-8)."""
        for w in self._decoder_weights():
            w.div_(w.norm(dim=0, keepdim=True) + 1e-8)
        return self

    @torch.no_grad()
    def project_decoder_grad_(self) -> AlignedSAE:
        """Remove the component along its column from every decoder gradient; skip decoders without one."""
        for w in self._decoder_weights():
            if w.grad is not None:
                w.grad.sub_((w * w.grad).sum(0, keepdim=True) * w)
        return self

    def _decoder_weights(self) -> list[nn.Parameter]:
        """Each parameter once, also if streams share it."""
        return list({id(w): w for w in map(self._w_dec, self.streams)}.values())

    @torch.no_grad()
    def reinit_dead_(self, generator: torch.Generator | None = None) -> dict[str, int]:
        """Re-initialise dead latents: encoder rows 0.01 * randn, latent bias and counter 0; decoder rows are kept.

        A row or bias that streams share is dead only if it is dead in all of them. Synchronises with the GPU.

        Args:
            generator: of the new rows, on the parameters' device; None: torch's default generator.

        Returns:
            Number of re-initialised latents of each stream.
        """
        counts, all_dead = {}, self.get_dead_neurons()
        for s, dead in all_dead.items():
            weight, bias = self._w_enc(s), self.latent_biases[s]
            for t in self.streams:
                if t != s and (self._w_enc(t) is weight or self.latent_biases[t] is bias):
                    dead = dead & all_dead[t]
            counts[s] = int(dead.sum())
            if counts[s]:
                new_rows = torch.randn(
                    counts[s], weight.shape[1], device=weight.device, dtype=weight.dtype, generator=generator
                )
                weight[dead] = new_rows * 0.01
                bias[dead] = 0
                getattr(self, f"stats_last_nonzero_{s}")[dead] = 0
        return counts

    @torch.no_grad()
    def decoder_layout_(self, layout: str) -> AlignedSAE:
        """Set the memory layout of decoders.{s}.weight.

        Args:
            layout: "rows", strides (1, d), or "contiguous" for tools that require it (FSDP2, safetensors.save_file), at
                the cost of a copy of W_dec in every forward and backward.
        """
        require(layout in ("rows", "contiguous"), "layout", "'rows' or 'contiguous'", repr(layout))
        self.decoder_layout = layout
        for w in map(self._w_dec, self.streams):
            new = w.t().contiguous().t() if layout == "rows" else w.contiguous()
            if new.stride() != w.stride():
                w.data = new
        return self

    def extra_repr(self) -> str:
        return (
            f"streams={self.d_streams}, n_latents={self.n_latents}, k={self.k}, auxk={self.auxk}, "
            f"topk_type={self.topk_type!r}, impl={self.impl!r}"
        )


def is_recomputation() -> bool:
    """Whether a backward runs: then a forward is a recomputation, whose counters were updated by the first one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _identity(inputs) -> tuple:
    """Identify inputs by their memory, version and rows."""
    return tuple((s, memory_of(x), version_of(x), x.shape[0]) for s, x in inputs.items())


_REMEMBERED = 8  # forwards whose dead latents are kept
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _restore_layout(module: AlignedSAE, _) -> None:
    module.decoder_layout_(module.decoder_layout)  # load_state_dict(assign=True) replaces the strides


def _training_step(model: AlignedSAE, optimizer, auxk_coef, cross_loss_coef, inputs):
    return AlignedSAE.training_step(model, inputs, optimizer, auxk_coef, cross_loss_coef)


def as_autocast(params: list) -> list[torch.Tensor]:
    """Cast parameters as autocast would; float64 ones are kept, as in torch."""
    device = params[0].device
    if autocast_enabled(device) and params[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        params = [p.to(dtype) for p in params]
    return params


def _as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x.to(dtype), which takes longer where nothing is to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _check_streams(d_streams) -> None:
    ok = isinstance(d_streams, Mapping) and len(d_streams) > 0
    require(ok, "d_streams", "a non-empty dict of stream name to width", "{}" if d_streams == {} else d_streams)
    require(len(d_streams) <= MAX_STREAMS, "d_streams", f"at most {MAX_STREAMS} streams", str(len(d_streams)))
    for name, width in d_streams.items():
        ok = isinstance(name, str) and name != "" and "." not in name
        ok = ok and not any(hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict))
        require(ok, "d_streams", "stream names that can name a module (no dot, no attribute of ModuleDict)", repr(name))
        check_int(f"d_streams[{name!r}]", width, 1)
    keys = [f"cross_recon_{t}_from_{s}" for t in d_streams for s in d_streams if s != t]
    require(
        len(set(keys)) == len(keys),
        "d_streams",
        "names whose cross_recon_{t}_from_{s} keys differ",
        list(d_streams).__repr__(),
    )
