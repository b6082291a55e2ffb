"""Weights rounded once, where they are written, instead of in every step: what autocast would make of them."""

from __future__ import annotations

import torch

from ..core.numerics import autocast_enabled, memory_of
from ..ops.joint import wants_joint


class HalfWeights:
    """The weight matrices of an AlignedSAE in half precision, for `training_step` under autocast.

    `latent_adam_` writes them together with the float32 weights. A matrix that anything else has changed since (a
    checkpoint, `reinit_dead_`, another optimizer) is rounded again before it is used; autograd's version counter tells.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._held: list[list[torch.Tensor]] = []  # of every stream: W_enc [N, d] and W_dec as rows [N, d]
        self._seen: list[list[tuple]] = []

    def serves(self, weight: torch.Tensor) -> bool:
        """Whether autocast would round this weight to the shadow's dtype. (On meta tensors, which know no autocast.)"""
        device = weight.device.type
        if weight.dtype != torch.float32:
            return False
        return device == "meta" or (autocast_enabled(weight.device) and torch.get_autocast_dtype(device) == self.dtype)

    @torch.no_grad()
    def of(self, weights: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """The shadow of [W_enc, W_dec as rows] of every stream, up to date."""
        shapes = [[(w.shape, w.device) for w in pair] for pair in weights]
        if shapes != [[(w.shape, w.device) for w in pair] for pair in self._held]:
            self._held = self._allocate(weights)
            self._seen = [[()] * 2 for _ in weights]
        for pair, held, seen in zip(weights, self._held, self._seen, strict=True):
            for i, w in enumerate(pair):
                if seen[i] != _state(w):
                    held[i].copy_(w)
                    seen[i] = _state(w)
        return self._held

    def written(self, weights: list[list[torch.Tensor]]) -> None:
        """The weights have moved and their shadow with them."""
        self._seen = [[_state(w) for w in pair] for pair in weights]

    def refresh(self, weights: list[list[torch.Tensor]], all_of_it: bool) -> None:
        """Rounds again what has changed, or everything; nothing where there is no shadow yet."""
        if self._held:
            if all_of_it:
                self._seen = [[()] * 2 for _ in weights]
            self.of(weights)

    def _allocate(self, weights):
        w_encs = [pair[0] for pair in weights]
        widths, like = [w.shape[1] for w in w_encs], w_encs[0]
        if wants_joint(w_encs):  # side by side, so that one library GEMM can take all streams
            parts = like.new_empty(like.shape[0], sum(widths), dtype=self.dtype).split(widths, 1)
        else:
            parts = [w.new_empty(w.shape, dtype=self.dtype) for w in w_encs]
        return [[part, pair[1].new_empty(pair[1].shape, dtype=self.dtype)]
                for part, pair in zip(parts, weights, strict=True)]  # fmt: skip


def _state(w: torch.Tensor) -> tuple:
    return memory_of(w), w._version
