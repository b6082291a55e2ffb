"""Encoder matrices of all streams side by side, for one library GEMM."""

from __future__ import annotations

import torch

from ..launch.select import LIBRARY_WIDTH


def joint(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """View parts [rows, d_s] as one [rows, D]; None unless they lie side by side in one storage."""
    first, offset = parts[0], parts[0].storage_offset()
    for part in parts:
        ok = part.untyped_storage()._cdata == first.untyped_storage()._cdata and part.storage_offset() == offset
        if not ok or part.stride() != (first.stride(0), 1):
            return None
        offset += part.shape[1]
    width = offset - first.storage_offset()
    if first.stride(0) < width:
        return None
    return first.as_strided((first.shape[0], width), first.stride())


def wants_joint(w_encs: list[torch.Tensor]) -> bool:
    """Whether to copy the streams' weights [N, d_s] side by side, so that one library GEMM can take them.

    False under torch.compile, which neither sees addresses nor accepts outputs that share a storage.
    """
    widths = [w.shape[1] for w in w_encs]
    return (
        not torch.compiler.is_compiling()
        and len(widths) > 1
        and sum(widths) >= LIBRARY_WIDTH
        and all(d % 8 == 0 for d in widths)
    )


class JointCast(torch.autograd.Function):
    """Cast weights [N, d_s] and write them side by side into one [N, D].

    Args:
        dtype: dtype of the copies.
        w_encs: [N, d_s] each.

    Returns:
        [N, d_s] each, views of one storage.
    """

    @staticmethod
    def forward(ctx, dtype, *w_encs):
        ctx.dtypes = [w.dtype for w in w_encs]
        widths = [w.shape[1] for w in w_encs]
        wide = w_encs[0].new_empty(w_encs[0].shape[0], sum(widths), dtype=dtype)
        parts = wide.split(widths, 1)
        for part, w in zip(parts, w_encs, strict=True):
            part.copy_(w)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        return None, *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
