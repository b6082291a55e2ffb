"""The outputs of a forward: the official keys, with dense tensors computed on first access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from ..core.numerics import pad_width
from ..core.registry import resolve_impl
from ..ops.decode import Decode
from ..ops.inverse_index import NO_INVERSE
from .forward import ForwardState


class AlignedOutputs(Mapping[str, torch.Tensor]):
    """Read-only mapping with every official key; dense tensors are computed on first access and cached.

    Also holds `indices` (int64 [B, k], local [S, B, k]) and `values_{s}` ([B, k]), which cost nothing. Tensors are
    differentiable where the official ones are. An access that needs the parameters raises RuntimeError if one of them
    was modified in place since the forward.

    Args:
        state: of the forward.
    """

    def __init__(self, state: ForwardState):
        self.state = state
        self._made: dict[str, torch.Tensor] = {}

    @property
    def indices(self) -> torch.Tensor:
        return self.state.codes.indices

    def _plan(self):
        """key -> (method name after `_make_`, its arguments)."""
        model, streams = self.state.model, self.state.streams
        local = model.topk_type == "local"
        plan: dict[str, tuple] = {"indices": ("indices",), "avg_num_active_neurons": ("count",)}
        if local:
            plan["avg_sparsity"] = ("count",)
        else:
            plan.update(shared_indices=("indices",), shared_mask=("mask", streams[0]))
        for s in streams:
            plan.update({f"values_{s}": ("values", s), f"indices_{s}": ("stream_indices", s)})
            plan.update({f"logits_{s}": ("logits", s), f"sparse_codes_{s}": ("codes", s), f"mask_{s}": ("mask", s)})
            if model.auxk is not None:
                plan.update({f"auxk_indices_{s}": ("aux", s, False), f"auxk_sparse_codes_{s}": ("aux_codes", s)})
                if local:
                    plan[f"auxk_values_{s}"] = ("aux", s, True)
            plan[f"recon_{s}"] = ("recon", s, s)
        for t in streams:
            for s in streams:
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
        """Compute on first access, under the gradient mode and autocast of the forward."""
        if key not in self._made:
            state = self.state
            leave = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not state.inference
            if leave:  # autograd cannot use an inference tensor later
                with torch.inference_mode(False):
                    return self._once(key, make, args)
            with torch.set_grad_enabled(state.grad), torch.autocast(**state.autocast):
                self._made[key] = make(*args)
        return self._made[key]

    def __reduce__(self):
        raise TypeError("AlignedOutputs cannot be copied or pickled (it belongs to its model); use dict(outputs)")

    def __repr__(self):
        return f"AlignedOutputs({', '.join(self)})"

    def _stream_position(self, s):
        return self.state.streams.index(s)

    def _of_stream(self, s):
        return self.state.codes.indices_of(self._stream_position(s))

    def _make_indices(self):
        return self.indices

    def _make_stream_indices(self, s):
        return self._of_stream(s)

    def _make_values(self, s):
        return self.state.values[s]

    def _make_count(self):
        k = float(self.state.model.k)
        return torch.full((), k, device=self.indices.device)  # filled: a copy from the host would synchronise

    def _make_mask(self, s):
        idx = self._of_stream(s)
        mask = torch.zeros(idx.shape[0], self.state.model.n_latents, dtype=torch.bool, device=idx.device)
        return mask.scatter(1, idx, True)

    def _dense(self, idx, values, s):
        dense = values.new_zeros(idx.shape[0], self.state.model.n_latents).scatter_add(1, idx, values)
        return dense.to(self.state.inputs[s].dtype)

    def _make_codes(self, s):
        return self._dense(self._of_stream(s), self._make_values(s), s)

    def _make_logits(self, s):
        self.state.check_unchanged()
        w_enc, pre_bias, latent_bias = self.state.model.encoder_of(s)
        return F.linear(pad_width(self.state.inputs[s].to(w_enc.dtype) - pre_bias), pad_width(w_enc), latent_bias)

    def _make_recon(self, t, s):
        self.state.check_unchanged()
        model, codes, i = self.state.model, self.state.codes, self._stream_position(s)
        w_dec, pre_bias = model.decoder_of(t)
        impl = resolve_impl(model.impl, w_dec)
        lists = NO_INVERSE if codes.inverse is None else codes.lists(i)
        return Decode.apply(impl, self._make_values(s)[None], w_dec, pre_bias, codes.indices_of(i), *lists)[0]

    def _make_aux(self, s, values):
        aux = self.state.aux
        assert aux is not None and aux.values is not None, "AuxK's keys are planned where it ran"
        return (aux.values if values else aux.indices)[self._stream_position(s)]

    def _make_aux_codes(self, s):
        return self._dense(self._make_aux(s, False), self._make_aux(s, True), s)
