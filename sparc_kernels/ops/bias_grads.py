"""Gradients of the biases that a decoder adds and an encoder subtracts: sums over rows, in the accumulator dtype.

Deterministic in two launches for all tensors: partial sums of chunks of rows, then the chunks in order; those of the
decoders' biases are part of the launches of `loss_terms.py`. A library's half-precision matrix-vector product takes one
launch each and may accumulate in half precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype
from ..core.recorder import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.device import capability, cdiv, next_power_of_2
from ..launch.reduce import ColumnSumsConfig, column_chunk


@triton.jit
def column_parts(
    chunk_id, tile, problem, x_ptrs, weight_ptrs, widths, strides, part_ptr, B, D, chunk, T: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part[p, (columns of earlier xs) + c]: sum of chunk p of the rows of x_t, weighted if weights are given."""
    begin = chunk_id * chunk
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_B)
    out_row = part_ptr + tl.full((), chunk_id, tl.int64) * D
    for t in tl.static_range(T):
        if problem == t:
            mask_d = cols < widths[t]
            acc = tl.zeros((BLOCK_B, BLOCK_D), ACC)
            for b0 in range(begin, begin + chunk, BLOCK_B):
                b = b0 + rows
                mask = (b < B)[:, None] & mask_d[None, :]
                x = tl.load(x_ptrs[t] + b[:, None].to(tl.int64) * strides[t] + cols[None, :], mask=mask, other=0.0)
                if weight_ptrs is None:
                    acc += x.to(ACC)
                else:
                    weight = tl.load(weight_ptrs[t] + b, mask=b < B, other=0.0).to(ACC)
                    acc += x.to(ACC) * weight[:, None]
            tl.store(out_row + cols, tl.sum(acc, 0), mask=mask_d)
        out_row += widths[t]


@triton.jit
def column_sums(
    tile, problem, part_ptr, out_ptrs, widths, chunks, D, half, with_half, T: tl.constexpr, TWICE: tl.constexpr,
    NEGATE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[t] = +- the sum of the chunks in order; TWICE: each with that of x_(t + T), unless not `with_half`."""
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    for t in tl.static_range(T):
        if problem == t:
            mask = cols < widths[t]
            acc = tl.zeros((BLOCK_D,), ACC)
            for c in range(chunks):
                row = part_ptr + tl.full((), c, tl.int64) * D
                acc += tl.load(row + cols, mask=mask, other=0.0)
                if TWICE:
                    acc += tl.where(with_half, tl.load(row + half + cols, mask=mask, other=0.0), 0.0)
            if NEGATE:
                acc = -acc
            tl.store(out_ptrs[t] + cols, acc.to(out_ptrs[t].dtype.element_ty), mask=mask)
        part_ptr += widths[t]


@triton.jit
def _column_parts_kernel(
    x_ptrs, weight_ptrs, widths, strides, part_ptr, B, D, chunk, T: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column_parts(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), x_ptrs, weight_ptrs, widths, strides, part_ptr, B, D,
        chunk, T, BLOCK_B, BLOCK_D, ACC,
    )  # fmt: skip


@triton.jit
def _column_sums_kernel(
    part_ptr, out_ptrs, widths, chunks, D, T: tl.constexpr, NEGATE: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    column_sums(
        tl.program_id(0), tl.program_id(1), part_ptr, out_ptrs, widths, chunks, D, 0, 1, T, False, NEGATE, BLOCK_D,
        ACC,
    )  # fmt: skip


class ColumnSums(NamedTuple):
    """How the columns of several tensors are summed: chunks of rows, then the chunks in order."""

    xs: tuple[torch.Tensor, ...]  # [rows, d_t], last stride 1
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    chunk: int  # rows of one program
    chunks: int
    tiles: int  # of BLOCK_D columns, of the widest tensor
    part: torch.Tensor  # [chunks, sum of widths], the chunks' sums
    blocks: dict[str, int]

    @classmethod
    def of(cls, xs) -> ColumnSums:
        """Return the settings of sums of xs, with the memory of the chunks' sums."""
        rows, widths = xs[0].shape[0], tuple(x.shape[1] for x in xs)
        chunk, block_b, block_d = column_chunk(rows), 8, 128
        if interpreted():  # every program costs milliseconds there
            chunk, block_b, block_d = max(16, next_power_of_2(cdiv(rows, 4))), 16, 32
        xs = tuple(x if x.stride(1) == 1 else x.contiguous() for x in xs)
        part = xs[0].new_empty(cdiv(rows, chunk), sum(widths), dtype=acc_dtype(xs[0].dtype))
        return cls(
            xs, widths, tuple(x.stride(0) for x in xs), chunk, cdiv(rows, chunk), cdiv(max(widths), block_d), part,
            dict(BLOCK_B=block_b, BLOCK_D=block_d),
        )  # fmt: skip


def _launch_column_sums(xs, weights, out, negate):
    """out[i] = +- weighted sum over the rows of xs[i]."""
    sums, T = ColumnSums.of(xs), len(xs)
    acc, block_d = tl_dtype(sums.part.dtype), sums.blocks["BLOCK_D"]
    launch(_column_parts_kernel, (sums.chunks, sums.tiles, T))(
        sums.xs, None if weights is None else tuple(w.contiguous() for w in weights), sums.widths, sums.strides,
        sums.part, len(xs[0]), sum(sums.widths), sums.chunk, T=T, **sums.blocks, ACC=acc, num_warps=4,
        **ColumnSumsConfig().registers(capability(sums.part.device)),
    )  # fmt: skip
    launch(_column_sums_kernel, (sums.tiles, T))(
        sums.part, tuple(out), sums.widths, sums.chunks, sum(sums.widths), T=T, NEGATE=negate, BLOCK_D=block_d, ACC=acc,
        num_warps=1,
    )  # fmt: skip
    return out


def _empty_like_columns(xs, like):
    return [b.new_empty(x.shape[1]) for x, b in zip(xs, like, strict=True)]


def column_sums_torch(xs, outs):
    """Sum the rows of each tensor into T outputs, plus those of xs[t + T] if there are 2 T tensors, in torch."""
    for t, out in enumerate(outs):
        total = xs[t].sum(0)
        out.copy_(total + xs[t + len(outs)].sum(0) if len(xs) > len(outs) else total)


def _pre_bias_grads_triton(w_encs, sums, like):
    return _launch_column_sums(w_encs, sums, _empty_like_columns(w_encs, like), True)


TORCH_ROWS = 8192  # of a half-precision weight matrix that the torch path converts at a time


def _pre_bias_grads_torch(w_encs, sums, like):
    out = []
    for w, weight, b in zip(w_encs, sums, like, strict=True):
        acc = acc_dtype(w.dtype)
        size = len(w) if w.dtype == acc else TORCH_ROWS
        parts = [part.to(acc).t() @ some.to(acc) for part, some in zip(w.split(size), weight.split(size), strict=True)]
        out.append((parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)).neg_().to(b.dtype))
    return out


pre_bias_grads = register(
    "pre_bias_grads",
    "(Tensor[] w_encs, Tensor[] sums, Tensor[] like, str impl) -> Tensor[]",
    torch_impl=_pre_bias_grads_torch,
    triton_impl=_pre_bias_grads_triton,
    fake=lambda w_encs, sums, like: _empty_like_columns(w_encs, like),
)
pre_bias_grads.__doc__ = """Gradients of the encoder's pre-biases, -w_encs[s]^T sums[s]; equal to -sum_b dx[b].

Args:
    w_encs: [N, d_s] each.
    sums: [N] each, the gradients of the latent biases.
    like: tensors whose dtypes the results take.
    impl: "triton" or "torch".

Returns:
    [d_s] each, accumulated in the accumulator dtype and rounded once.
"""
