"""Half-precision copies of the weights, updated with them, so that autocast does not cast them in every step."""

from __future__ import annotations

import torch

from ..core.numerics import autocast_enabled, memory_of
from ..ops.joint import wants_joint


class HalfWeights:
    """Half-precision weight matrices of an AlignedSAE, for `training_step` under autocast.

    `latent_adam_` writes them together with the float32 weights. A matrix modified otherwise (a checkpoint,
    `reinit_dead_`, another optimizer) is cast again before use; autograd's version counter reveals it.

    Args:
        dtype: torch.bfloat16 or torch.float16.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._held: list[list[torch.Tensor]] = []  # per stream: W_enc [N, d], W_dec as rows [N, d]
        self._seen: list[list[tuple]] = []

    def serves(self, weight: torch.Tensor) -> bool:
        """Whether autocast would cast this weight to the copies' dtype; True for float32 meta tensors."""
        device = weight.device.type
        if weight.dtype != torch.float32:
            return False
        return device == "meta" or (autocast_enabled(weight.device) and torch.get_autocast_dtype(device) == self.dtype)

    @torch.no_grad()
    def of(self, weights: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Return up-to-date half-precision copies.

        Args:
            weights: [W_enc, W_dec as rows] of every stream, both [N, d].

        Returns:
            Their copies in `dtype`, in the same order.
        """
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

    def copies(self) -> list[torch.Tensor]:
        """Return the copies as they are; none before the first `of`."""
        return [held for pair in self._held for held in pair]

    def written(self, weights: list[list[torch.Tensor]]) -> None:
        """Mark the copies as up to date after a kernel wrote weights and copies together.

        Args:
            weights: [W_enc, W_dec as rows] of every stream.
        """
        self._seen = [[_state(w) for w in pair] for pair in weights]

    def refresh(self, weights: list[list[torch.Tensor]], all_of_it: bool) -> None:
        """Cast modified weights again; no-op before the first `of`.

        Args:
            weights: [W_enc, W_dec as rows] of every stream.
            all_of_it: cast every matrix, modified or not.
        """
        if self._held:
            if all_of_it:
                self._seen = [[()] * 2 for _ in weights]
            self.of(weights)

    def _allocate(self, weights):
        w_encs = [pair[0] for pair in weights]
        widths, like = [w.shape[1] for w in w_encs], w_encs[0]
        if wants_joint(w_encs):  # adjacent columns, so that one library GEMM can serve all streams
            parts = like.new_empty(like.shape[0], sum(widths), dtype=self.dtype).split(widths, 1)
        else:
            parts = [w.new_empty(w.shape, dtype=self.dtype) for w in w_encs]
        return [[part, pair[1].new_empty(pair[1].shape, dtype=self.dtype)]
                for part, pair in zip(parts, weights, strict=True)]  # fmt: skip


def _state(w: torch.Tensor) -> tuple:
    return memory_of(w), w._version
