"""Records that the operators' wrappers take in place of long lists of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .inverse_index import NO_INVERSE, InverseIndex, inverse_index_op, lists_of

# Local id of a latent of another shard: its value is 0, it is in no list, nothing of it is read. Other ids outside
# 0..N-1 make results NaN.
ABSENT = -(2**31)


class EncoderParams(NamedTuple):
    """Encoders of S streams, in the operators' dtype."""

    w_encs: list[torch.Tensor]  # [N, d_s]
    pre_biases: list[torch.Tensor]  # [d_s]
    latent_biases: list[torch.Tensor]  # [N]


CODES_FLAT = 5  # tensors that `SparseCodes.flatten` returns


class SparseCodes(NamedTuple):
    """The k selected latents of every row and their values in S streams."""

    indices: torch.Tensor  # int64 [B, k] shared by the streams, or [S, B, k]
    values: torch.Tensor | None  # [S, B, k]; None until they are gathered
    n_valid: torch.Tensor | None = None  # int32 [S] ([] of one stream), the valid columns; None: all
    inverse: InverseIndex | None = None  # of the valid columns, its parts [1, ...] or [S, ...]

    def flatten(self) -> tuple[torch.Tensor | None, ...]:
        """Return everything but the values, as autograd functions take it."""
        return self.indices, self.n_valid, *(self.inverse or NO_INVERSE)

    @classmethod
    def unflatten(cls, values: torch.Tensor, tensors) -> SparseCodes:
        """Rebuild codes from their values and the tensors of `flatten`."""
        indices, n_valid, *inverse = tensors
        return cls(indices, values, n_valid, None if inverse[0] is None else InverseIndex(*inverse))

    @property
    def gathered(self) -> torch.Tensor:
        """The values, which must have been gathered."""
        assert self.values is not None, "codes without values"
        return self.values

    @property
    def shared(self) -> bool:
        """Whether all streams share one set of indices."""
        return self.indices.dim() == 2

    def indices_of(self, s: int) -> torch.Tensor:
        """Return the indices of stream s, int64 [B, k]."""
        return self.indices if self.shared else self.indices[s]

    def lists(self, s: int) -> InverseIndex:
        """Return the inverse index of stream s."""
        assert self.inverse is not None, "codes without an inverse index"
        return lists_of(self.inverse, s % len(self.inverse.order))

    def source(self, s: int) -> SparseCodes:
        """Return the codes of stream s alone; every stream must have its own indices."""
        stream = slice(s, s + 1)
        inverse = self.inverse and InverseIndex(*(part[stream] for part in self.inverse))
        n_valid = None if self.n_valid is None else self.n_valid[s]
        return SparseCodes(self.indices[s], self.gathered[stream], n_valid, inverse)

    def with_inverse(self, n_latents: int, impl: str) -> SparseCodes:
        """Return the same codes with their inverse index, built here if missing.

        Args:
            n_latents: N.
            impl: "triton" or "torch".
        """
        if self.inverse is not None:
            return self
        groups = 1 if self.shared else len(self.indices)
        parts = inverse_index_op(self.indices, groups, n_latents, self.n_valid, impl)
        return self._replace(inverse=InverseIndex(*parts))


class DecodeTarget(NamedTuple):
    """One decoder and the rows that it reconstructs."""

    w: torch.Tensor  # [N, d], the decoder's rows
    bias: torch.Tensor  # [d]
    x: torch.Tensor  # [B, d]


class GradOut(NamedTuple):
    """Buffers for the gradients of T targets, and whether to add to their contents."""

    dvalues: torch.Tensor  # [S, B, k] contiguous
    add_dvalues: bool
    dws: list[torch.Tensor | None]  # [N, d] each; None: not computed
    add_dw: bool


class WeightedLists(NamedTuple):
    """Weighted sums: for every latent, coef[s, p] * scale[s, p // k] * mat[s, p // k] over the places p of its list.

    An entry whose gate is <= 0 or whose scale is 0 has weight 0.
    """

    inverse: InverseIndex  # over rows * k places
    coef: torch.Tensor  # [S, rows, k] or [S, rows * k]
    scale: torch.Tensor | None  # [S, rows]
    gate: torch.Tensor | None  # as coef
    mat: torch.Tensor  # [S, rows, d]
    k: int

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All tensors, in the operators' order; `k` follows them there."""
        return (*self.inverse, self.coef, self.scale, self.gate, self.mat)
