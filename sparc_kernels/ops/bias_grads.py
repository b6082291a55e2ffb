"""Gradients of the biases that a decoder adds and an encoder subtracts: sums over rows, in the accumulator dtype.

Deterministic in two launches for all tensors: partial sums of chunks of rows, then the chunks in order. A library's
half-precision matrix-vector product takes one launch each and may accumulate in half precision.
"""

from __future__ import annotations

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype
from ..core.recorder import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.device import capability, cdiv, next_power_of_2
from ..launch.reduce import ColumnSumsConfig, column_chunk


@triton.jit
def _column_parts_kernel(
    x_ptrs, weight_ptrs, widths, strides, part_ptr, B, D, chunk, T: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part[p, (columns of earlier xs) + c]: sum of chunk p of the rows of x_t, weighted if weights are given."""
    begin = tl.program_id(0) * chunk
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_B)
    out_row = part_ptr + tl.program_id(0).to(tl.int64) * D
    for t in tl.static_range(T):
        if tl.program_id(2) == t:
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
def _column_sums_kernel(
    part_ptr, out_ptrs, widths, chunks, D, half, T: tl.constexpr, TWICE: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    for t in tl.static_range(T):
        if tl.program_id(1) == t:
            mask = cols < widths[t]
            acc = tl.zeros((BLOCK_D,), ACC)
            for c in range(chunks):
                row = part_ptr + tl.full((), c, tl.int64) * D
                acc += tl.load(row + cols, mask=mask, other=0.0)
                if TWICE:
                    acc += tl.load(row + half + cols, mask=mask, other=0.0)
            if NEGATE:
                acc = -acc
            tl.store(out_ptrs[t] + cols, acc.to(out_ptrs[t].dtype.element_ty), mask=mask)
        part_ptr += widths[t]


def _launch_column_sums(xs, weights, out, negate):
    """out[i] = +- sum over the rows of xs[i], plus those of xs[i + len(out)] if there are twice as many."""
    rows, widths, T = xs[0].shape[0], tuple(x.shape[1] for x in xs), len(out)
    acc, chunk, block_b, block_d = acc_dtype(xs[0].dtype), column_chunk(rows), 8, 128
    if interpreted():  # every program costs milliseconds there
        chunk, block_b, block_d = max(16, next_power_of_2(cdiv(rows, 4))), 16, 32
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    chunks, tiles = cdiv(rows, chunk), cdiv(max(widths), block_d)
    part = xs[0].new_empty(chunks, sum(widths), dtype=acc)
    launch(_column_parts_kernel, (chunks, tiles, len(xs)))(
        tuple(xs), None if weights is None else tuple(w.contiguous() for w in weights), widths,
        tuple(x.stride(0) for x in xs), part, rows, sum(widths), chunk, T=len(xs), BLOCK_B=block_b, BLOCK_D=block_d,
        ACC=tl_dtype(acc), num_warps=4, **ColumnSumsConfig().registers(capability(part.device)),
    )  # fmt: skip
    launch(_column_sums_kernel, (tiles, T))(
        part, tuple(out), widths[:T], chunks, sum(widths), sum(widths[:T]), T=T, TWICE=len(xs) > T, NEGATE=negate,
        BLOCK_D=block_d, ACC=tl_dtype(acc), num_warps=1,
    )  # fmt: skip
    return out


def _empty_like_columns(xs, like):
    return [b.new_empty(x.shape[1]) for x, b in zip(xs, like, strict=True)]


def _column_sums_triton(xs, more, like):
    return _launch_column_sums([*xs, *more], None, _empty_like_columns(xs, like), False)


def _column_sums_torch(xs, more, like):
    sums = [x.sum(0) for x in xs]
    sums = [a + x.sum(0) for a, x in zip(sums, more, strict=True)] if more else sums
    return [a.to(b.dtype) for a, b in zip(sums, like, strict=True)]


column_sums = register(
    "column_sums",
    "(Tensor[] xs, Tensor[] more, Tensor[] like, str impl) -> Tensor[]",
    torch_impl=_column_sums_torch,
    triton_impl=_column_sums_triton,
    fake=lambda xs, more, like: _empty_like_columns(xs, like),
)
column_sums.__doc__ = """Sum the rows of each tensor.

Args:
    xs: T tensors, [B, d_t] each.
    more: none, or T tensors [B, d_t] whose rows are added too.
    like: T tensors whose dtypes the results take.
    impl: "triton" or "torch".

Returns:
    [d_t] each, accumulated in the accumulator dtype.
"""


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
