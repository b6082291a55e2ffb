"""The state of one forward of AlignedSAE, shared by the outputs, the loss and the fused step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.numerics import autocast_enabled
from ..ops.records import EncoderParams, SparseCodes


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
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # stream -> [B, k]
    grad: bool = True
    inference: bool = False
    autocast: dict = field(default_factory=dict)  # arguments of torch.autocast
    parameter_versions: list[tuple[int, int]] | None = None  # None under torch.compile
    input_versions: list[tuple[int, int]] = field(default_factory=list)

    def record(self) -> ForwardState:
        """Record the gradient and autocast modes and the tensor versions that later reads depend on."""
        assert self.codes.values is not None, "gathered before"
        self.values = dict(zip(self.streams, self.codes.values.unbind(), strict=True))
        self.grad = torch.is_grad_enabled()
        self.autocast = autocast_state(self.codes.indices.device)
        if not torch.compiler.is_compiling():
            self.inference = torch.is_inference_mode_enabled()
            self.parameter_versions = [version_of(p) for p in self.model.parameters()]
            self.input_versions = [version_of(x) for x in self.inputs.values()]
        return self

    def check_unchanged(self) -> None:
        """Check that no parameter or input was modified since the forward.

        Raises:
            RuntimeError: a parameter or an input was changed in place, or a parameter was replaced.
        """
        if self.parameter_versions is None:
            return
        for (name, p), then in zip(self.model.named_parameters(), self.parameter_versions, strict=True):
            if version_of(p) != then:
                raise RuntimeError(
                    f"outputs: parameter {name} was changed in place or replaced after this forward (an optimizer "
                    "step, unit_norm_decoder_?); read outputs and compute the loss before that, or run forward again"
                )
        for (name, x), then in zip(self.inputs.items(), self.input_versions, strict=True):
            if version_of(x) != then:
                raise RuntimeError(
                    f"outputs: inputs[{name!r}] was changed in place after this forward (a reused buffer?); read "
                    "outputs and compute the loss before refilling it"
                )


def autocast_state(device: torch.device) -> dict:
    """Return the arguments of torch.autocast that restore its current state on a device."""
    if not autocast_enabled(device):
        return {"device_type": "cpu" if device.type == "meta" else device.type, "enabled": False}
    return {"device_type": device.type, "enabled": True, "dtype": torch.get_autocast_dtype(device.type)}


def version_of(x: torch.Tensor) -> tuple[int, int]:
    """Return the identity and the in-place version of a tensor; -1 for inference tensors, which have no version."""
    return id(x), -1 if x.is_inference() else x._version
