"""The state of one forward of AlignedSAE, shared by the outputs, the loss and the fused step."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.numerics import autocast_enabled
from ..core.plan import Planned
from ..ops.dead import count_fired_, count_fired_torch, dead_first, select_dead
from ..ops.encode import centre_for, gather_codes, select_latents
from ..ops.records import CODES_FLAT, EncoderParams, SparseCodes

# stream -> w_enc [N, d], w_dec [d, N], pre_bias [d] and latent_bias [N]
Parameters = dict[str, tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]]


class EncodeSettings(NamedTuple):
    """What the launches of a forward depend on besides its tensors."""

    k: int
    topk_type: str
    auxk: int | None  # None: AuxK selects nothing
    lists: bool  # build the inverse indices for gradients
    counts: bool  # update the dead counters
    fires_above: float
    dead_after: int
    impl: str


class Encoded(NamedTuple):
    """Result of `encode` for S streams."""

    centred: list[torch.Tensor]  # [B, d_s]
    codes: SparseCodes
    aux: SparseCodes | None
    dead: torch.Tensor | None  # bool [S, N], what AuxK may select


def encode(
    xs: list[torch.Tensor],
    encoder: EncoderParams,
    counters: list[torch.Tensor],
    dead: torch.Tensor | None,
    settings: EncodeSettings,
) -> Encoded:
    """Select latents, gather their values, update the dead counters and select for AuxK, without gradients.

    Args:
        xs: [B, d_s] of S streams.
        encoder: their encoders.
        counters: int64 [N], of S streams.
        dead: bool [S, N], what AuxK may select; None: by the counters.
        settings: of the forward.
    """
    flat = _encode([*xs, *encoder.w_encs, *encoder.pre_biases, *encoder.latent_biases, *counters, dead],
                   (len(xs), settings), impl=settings.impl)  # fmt: skip
    parts = iter(flat)
    centred, (values, aux_values) = [next(parts) for _ in xs], (next(parts), next(parts))
    codes, aux = ([next(parts) for _ in range(CODES_FLAT)] for _ in range(2))
    return Encoded(
        centred, SparseCodes.unflatten(values, codes),
        None if aux_values is None else SparseCodes.unflatten(aux_values, aux), next(parts),
    )  # fmt: skip


@Planned
def _encode(tensors, S, settings):
    k, topk_type, auxk, lists, counts, fires_above, dead_after, impl = settings
    xs, w_encs, pre_biases, latent_biases, counters = (list(tensors[i : i + S]) for i in range(0, 5 * S, S))
    given, local = tensors[5 * S], topk_type == "local"
    dead = None if given is None or not auxk else dead_first(given.unbind(), 0, impl)
    encoder = EncoderParams(w_encs, pre_biases, latent_biases)
    centred = centre_for(xs, w_encs, pre_biases, impl)
    selected = select_latents(centred, w_encs, latent_biases, k, topk_type, impl=impl)
    # one inverse index serves every gradient, and is only built for gradients
    codes = gather_codes(SparseCodes(selected, None), centred, encoder, lists, impl)
    # officially AuxK reads the counters before the update in local mode, after it in global mode
    if auxk and local and dead is None:
        dead = dead_first(counters, dead_after, impl)
    if counts:
        if local and torch.compiler.is_compiling():
            # not the operator: inductor (torch 2.13) may run it before the counters are read above
            count_fired_torch(counters, selected, codes.gathered, fires_above)
        else:
            count_fired_(counters, selected, codes.gathered, fires_above, impl)
    aux = mask = None
    if auxk:
        ids, n_dead, mask = dead or dead_first(counters, dead_after, impl)
        aux = gather_codes(select_dead(centred, encoder, ids, n_dead, auxk, impl), centred, encoder, lists, impl)
    aux_flat = [None] * CODES_FLAT if aux is None else aux.flatten()
    return [*centred, codes.values, aux and aux.values, *codes.flatten(), *aux_flat, mask]


@dataclass
class ForwardState:
    """Inputs, selection and torch modes of one forward over S streams."""

    model: Any  # the AlignedSAE
    inputs: dict[str, torch.Tensor]
    streams: list[str]  # of the inputs, in the model's order
    impl: str
    xs: list[torch.Tensor]  # inputs in the operators' dtype
    encoder: EncoderParams
    centred: list[torch.Tensor]  # xs - pre_biases
    codes: SparseCodes
    aux: SparseCodes | None  # AuxK's codes, one source per stream
    grad: bool = True
    inference: bool = False
    autocast: dict = field(default_factory=dict)  # arguments of torch.autocast
    parameters: list[torch.Tensor] = field(default_factory=list)  # kept, so that no other tensor gets their identities
    parameter_versions: list[int] | None = None  # None under torch.compile
    input_versions: list[int] = field(default_factory=list)

    def record(self, parameters: Parameters) -> ForwardState:
        """Record the gradient and autocast modes and the tensor versions that later reads depend on.

        Args:
            parameters: of all streams.
        """
        self.grad = torch.is_grad_enabled()
        self.autocast = autocast_state(self.codes.indices.device)
        if not torch.compiler.is_compiling():
            self.inference = torch.is_inference_mode_enabled()
            self.parameters = [p for four in parameters.values() for p in four]
            self.parameter_versions = _versions(self.parameters)
            self.input_versions = _versions([*self.inputs.values()])
        return self

    @cached_property
    def values(self) -> dict[str, torch.Tensor]:
        """The values [B, k] of each stream."""
        return dict(zip(self.streams, self.codes.gathered.unbind(), strict=True))

    def check_unchanged(self) -> Parameters:
        """Check that no parameter or input was modified since the forward; return the parameters.

        Raises:
            RuntimeError: a parameter or an input was changed in place, or a parameter was replaced.
        """
        parameters = self.model.parameters_by_stream()
        if self.parameter_versions is None:
            return parameters
        now = _versions([p for four in parameters.values() for p in four])
        if now != self.parameter_versions:
            half = len(now) // 2  # identities, then versions
            pairs = enumerate(zip(now, self.parameter_versions, strict=True))
            changed = next(i for i, (new, old) in pairs if new != old) % half
            s = self.model.streams[changed // 4]
            names = f"encoders.{s}.weight", f"decoders.{s}.weight", f"pre_biases.{s}", f"latent_biases.{s}"
            raise RuntimeError(
                f"outputs: parameter {names[changed % 4]} was changed in place or replaced after this forward (an "
                "optimizer step, unit_norm_decoder_?); read outputs and compute the loss before that, or run forward "
                "again"
            )
        if (now := _versions([*self.inputs.values()])) != self.input_versions:
            changed = next(i for i, (new, old) in enumerate(zip(now, self.input_versions, strict=True)) if new != old)
            name = [*self.inputs][changed % len(self.inputs)]
            raise RuntimeError(
                f"outputs: inputs[{name!r}] was changed in place after this forward (a reused buffer?); read "
                "outputs and compute the loss before refilling it"
            )
        return parameters


def autocast_state(device: torch.device) -> dict:
    """Return the arguments of torch.autocast that restore its current state on a device."""
    if not autocast_enabled(device):
        return {"device_type": "cpu" if device.type == "meta" else device.type, "enabled": False}
    return {"device_type": device.type, "enabled": True, "dtype": torch.get_autocast_dtype(device.type)}


def version_of(x: torch.Tensor) -> int:
    """Return the in-place version of a tensor; -1 for inference tensors, which have none."""
    return -1 if x.is_inference() else x._version


def _versions(tensors: list) -> list[int]:
    """Identities, then in-place versions."""
    try:
        return [*map(id, tensors), *map(_VERSION, tensors)]
    except RuntimeError:  # an inference tensor
        return [*map(id, tensors), *map(version_of, tensors)]


_VERSION = operator.attrgetter("_version")
