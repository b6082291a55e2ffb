"""Records that wrappers of operators take, in place of long lists of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .inverse_index import InverseIndex, inverse_index_op, lists_of


class EncoderParams(NamedTuple):
    """Encoders of S streams, in the dtype in which the operators compute."""

    w_encs: list[torch.Tensor]  # [N, d_s]
    pre_biases: list[torch.Tensor]  # [d_s]
    latent_biases: list[torch.Tensor]  # [N]


class SparseCodes(NamedTuple):
    """The k selected latents of every row and their values in S streams."""

    indices: torch.Tensor  # int64 [B, k] shared by the streams, or [S, B, k]
    values: torch.Tensor | None  # [S, B, k]; None: not made yet
    count: torch.Tensor | None = None  # int32 [S] ([] of one stream): the columns that exist; None: all of them
    inverse: InverseIndex | None = None  # of the columns that exist, its parts [1, ...] or [S, ...]

    @property
    def shared(self) -> bool:
        return self.indices.dim() == 2

    def indices_of(self, s: int) -> torch.Tensor:
        """int64 [B, k] of one stream."""
        return self.indices if self.shared else self.indices[s]

    def lists(self, s: int) -> InverseIndex:
        """The inverse index of one stream's indices."""
        return lists_of(self.inverse, s % len(self.inverse.order))

    def source(self, s: int) -> SparseCodes:
        """The codes of one stream alone, where every stream has its own indices."""
        one = slice(s, s + 1)
        inverse = self.inverse and InverseIndex(*(part[one] for part in self.inverse))
        return SparseCodes(self.indices[s], self.values[one], None if self.count is None else self.count[s], inverse)

    def with_inverse(self, n_latents: int, impl: str) -> SparseCodes:
        """The same with its inverse index, made here unless it is there."""
        if self.inverse is not None:
            return self
        groups = 1 if self.shared else len(self.indices)
        made = inverse_index_op(self.indices, groups, n_latents, self.count, impl)
        return self._replace(inverse=InverseIndex(*made))


class DecodeTarget(NamedTuple):
    """One decoder and the rows that it is to reconstruct."""

    w: torch.Tensor  # [N, d], the decoder's rows
    bias: torch.Tensor  # [d]
    x: torch.Tensor  # [B, d]


class GradOut(NamedTuple):
    """Where gradients of one target go, and whether they are added to what is there."""

    dvalues: torch.Tensor  # [S, B, k] contiguous
    add_dvalues: bool
    dw: torch.Tensor | None  # [N, d]; None: not wanted
    add_dw: bool


class WeightedLists(NamedTuple):
    """For every latent the sum over places p of its list of coef[s, p] * scale[s, p // k] * mat[s, p // k].

    An entry whose gate is not > 0, or whose scale is 0, counts for nothing.
    """

    inverse: InverseIndex  # over rows * k places
    coef: torch.Tensor  # [S, rows, k] or [S, rows * k]
    scale: torch.Tensor | None  # [S, rows]
    gate: torch.Tensor | None  # as coef
    mat: torch.Tensor  # [S, rows, d]
    k: int

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Flat, in the order in which the operators take them: `k` follows."""
        return (*self.inverse, self.coef, self.scale, self.gate, self.mat)
