"""What a forward returns: the official keys, whose dense tensors are made when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from ..core.numerics import autocast_enabled, pad_width
from ..core.registry import resolve_impl
from ..ops.aligned_loss import AlignedLoss
from ..ops.decode import Decode
from ..ops.inverse_index import NO_INVERSE


class AlignedOutputs(Mapping[str, torch.Tensor]):
    """What `AlignedSAE.forward` returns: every official key, dense tensors made on first reading and then kept.

    Beside the official keys: `indices` (int64 [B, k], local [S, B, k]) and `values_{s}` ([B, k]), which exist already.
    What is read is differentiable where the official tensor is. A reading that needs the parameters raises
    RuntimeError when one of them has been changed in place since the forward.
    """

    def __init__(self, model, inputs, streams, selection, values, aux, aux_values):
        self._model = model
        self._inputs = dict(inputs)
        self._streams = streams
        self._selection = selection
        self._indices = selection.indices
        self._stacked = values  # [S, B, k]
        self._values = dict(zip(streams, values.unbind(), strict=True))
        self._aux, self._aux_values = aux, aux_values  # AuxK's Selection and values [S, B, auxk], or None
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast_state(self._indices.device)
        self._made = {}
        self._inference, self._versions = False, None
        if not torch.compiler.is_compiling():  # neither exists for the tracer
            self._inference = torch.is_inference_mode_enabled()
            self._versions = [version_of(p) for p in model.parameters()]
            self._input_versions = [version_of(x) for x in self._inputs.values()]

    @property
    def indices(self) -> torch.Tensor:
        return self._indices

    def _plan(self):
        """key -> (maker, its arguments)."""
        model, local = self._model, self._model.topk_type == "local"
        plan = {"indices": ("indices",), "avg_num_active_neurons": ("count",)}
        if local:
            plan["avg_sparsity"] = ("count",)
        else:
            plan.update(shared_indices=("indices",), shared_mask=("mask", self._streams[0]))
        for s in self._streams:
            plan.update({f"values_{s}": ("values", s), f"indices_{s}": ("stream_indices", s)})
            plan.update({f"logits_{s}": ("logits", s), f"sparse_codes_{s}": ("codes", s), f"mask_{s}": ("mask", s)})
            if model.auxk is not None:
                plan.update({f"auxk_indices_{s}": ("aux", s, 0), f"auxk_sparse_codes_{s}": ("aux_codes", s)})
                if local:
                    plan[f"auxk_values_{s}"] = ("aux", s, 1)
            plan[f"recon_{s}"] = ("recon", s, s)
        for t in self._streams:
            for s in self._streams:
                if s != t:
                    plan[f"cross_recon_{t}_from_{s}"] = ("recon", t, s)
        return plan

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan())

    def __len__(self) -> int:
        return len(self._plan())

    def __contains__(self, key: object) -> bool:
        return key in self._plan()

    def __getitem__(self, key: str) -> torch.Tensor:
        maker, *args = self._plan()[key]
        return self._once(key, getattr(self, f"_make_{maker}"), args)

    def _once(self, key, make, args):
        """Made on first reading, under the gradient mode and autocast of the forward."""
        if key not in self._made:
            leave = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not self._inference
            if leave:  # an inference tensor could never be part of a gradient afterwards
                with torch.inference_mode(False):
                    return self._once(key, make, args)
            with torch.set_grad_enabled(self._grad), torch.autocast(**self._autocast):
                self._made[key] = make(*args)
        return self._made[key]

    def __reduce__(self):
        raise TypeError("AlignedOutputs cannot be copied or pickled (it belongs to its model); use dict(outputs)")

    def __repr__(self):
        return f"AlignedOutputs({', '.join(self)})"

    def _check_unchanged(self):
        if self._versions is None:
            return
        for (name, p), then in zip(self._model.named_parameters(), self._versions, strict=True):
            if version_of(p) != then:
                raise RuntimeError(
                    f"outputs: parameter {name} was changed in place or replaced after this forward (an optimizer "
                    "step, unit_norm_decoder_?); read outputs and compute the loss before that, or run forward again"
                )
        for (name, x), then in zip(self._inputs.items(), self._input_versions, strict=True):
            if version_of(x) != then:
                raise RuntimeError(
                    f"outputs: inputs[{name!r}] was changed in place after this forward (a reused buffer?); read "
                    "outputs and compute the loss before refilling it"
                )

    def _stream_position(self, s):
        return self._streams.index(s)

    def _of_stream(self, s):
        return self._indices if self._indices.dim() == 2 else self._indices[self._stream_position(s)]

    def _make_indices(self):
        return self._indices

    def _make_stream_indices(self, s):
        return self._of_stream(s)

    def _make_values(self, s):
        return self._values[s]

    def _make_count(self):
        return torch.full((), float(self._model.k), device=self._indices.device)  # a fill, where a copy would wait

    def _make_mask(self, s):
        idx = self._of_stream(s)
        return torch.zeros(idx.shape[0], self._model.n_latents, dtype=torch.bool, device=idx.device).scatter(
            1, idx, True
        )

    def _dense(self, idx, values, s):
        dense = values.new_zeros(idx.shape[0], self._model.n_latents).scatter_add(1, idx, values)
        return dense.to(self._inputs[s].dtype)

    def _make_codes(self, s):
        return self._dense(self._of_stream(s), self._values[s], s)

    def _make_logits(self, s):
        self._check_unchanged()
        w_enc, pre_bias, latent_bias = self._model._encoder(s)
        return F.linear(pad_width(self._inputs[s].to(w_enc.dtype) - pre_bias), pad_width(w_enc), latent_bias)

    def _make_recon(self, t, s):
        self._check_unchanged()
        w_dec, pre_bias = self._model._decoder(t)
        impl = resolve_impl(self._model.impl, w_dec)
        i = self._stream_position(s)
        indices, lists = (
            self._selection.of(i),
            NO_INVERSE if self._selection.order is None else self._selection.lists(i),
        )
        return Decode.apply(self._values[s][None], w_dec, pre_bias, indices, *lists, impl)[0]

    def _make_aux(self, s, part):
        return (self._aux_values if part else self._aux.indices)[self._stream_position(s)]

    def _make_aux_codes(self, s):
        return self._dense(self._make_aux(s, 0), self._make_aux(s, 1), s)

    def _loss(self, weights, auxk_coef, decoders, inputs):
        """AlignedLoss of all streams: the loss, the `Terms` of it, and those of AuxK or None."""
        w_decs, pre_biases = zip(*decoders, strict=True)
        impl = resolve_impl(self._model.impl, w_decs[0])
        aux = self._aux or ()
        tensors = [*self._selection[2:], *aux, *w_decs, *pre_biases, *(inputs[s] for s in self._streams)]
        ahead = torch.is_grad_enabled()
        args = self._stacked, self._aux_values, weights, auxk_coef, ahead, impl, self._indices, len(w_decs)
        return AlignedLoss.apply(*args, *tensors)


def _autocast_state(device: torch.device) -> dict:
    """Arguments of torch.autocast that restore what is on now."""
    if not autocast_enabled(device):
        return {"device_type": "cpu" if device.type == "meta" else device.type, "enabled": False}
    return {"device_type": device.type, "enabled": True, "dtype": torch.get_autocast_dtype(device.type)}


def version_of(x: torch.Tensor) -> tuple[int, int]:
    """Identity and in-place version of a tensor; inference tensors have no version."""
    return id(x), -1 if x.is_inference() else x._version
