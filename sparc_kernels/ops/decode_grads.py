"""Losses and gradients of one target's reconstructions, none of which is stored."""

from __future__ import annotations

import math

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype
from ..core.recorder import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.budgets import (
    H_MAX_K_FP32,
    H_MIN_COLUMNS,
    H_MIN_ENTRIES,
    H_MIN_SOURCES,
    PARTIAL_BYTES,
    SCRATCH_BYTES,
)
from ..launch.device import capability, cdiv, next_power_of_2
from ..launch.gather import gather_chunk
from .gather import (
    ALL_ERRORS,
    NO_ERROR,
    gather_dot_torch,
    gather_sum_torch,
    launch_gather,
)
from .latent_reduce import launch_reduce, reduce_torch
from .records import DecodeTarget, GradOut, SparseCodes


# decode_grads: losses and gradients of one target in one pass over the gathered rows
@triton.jit
def _collect_kernel(
    sq_ptrs, dot_ptrs, slabs, coef_ptr, sq_ptr, dv_ptr, rows, K,
    P: tl.constexpr, ADD_SQ: tl.constexpr, ADD_DV: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (source, row): sum the slabs of P launches; dvalues = coef * <W[I], E>, and 0 where coef is 0."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    coef = tl.load(coef_ptr + row).to(ACC)
    dots = tl.zeros((BLOCK_K,), ACC)
    sq = tl.zeros((), ACC)
    for p in tl.static_range(P):
        for slab in range(slabs[p]):
            dots += tl.load(dot_ptrs[p] + (slab * rows + row) * K + offs_k, mask=mask_k, other=0.0)
            sq += tl.load(sq_ptrs[p] + slab * rows + row)
    dv = tl.where(coef != 0.0, coef * dots, 0.0)
    if ADD_DV:
        dv += tl.load(dv_ptr + row * K + offs_k, mask=mask_k, other=0.0)
    tl.store(dv_ptr + row * K + offs_k, dv, mask=mask_k)
    if ADD_SQ:
        sq += tl.load(sq_ptr + row)
    tl.store(sq_ptr + row, sq)


@triton.jit
def _positions_kernel(order_ptr, list_position_ptr, M, BLOCK: tl.constexpr):
    """Inverse permutation of `order`."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    list_position = tl.load(order_ptr + offs, mask=offs < M, other=0)
    tl.store(list_position_ptr + list_position, offs.to(tl.int32), mask=offs < M)


def _decode_grads_triton(
    *, indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    (S, B, k), d, M, device = values.shape, w.shape[1], indices.numel(), w.device
    acc = acc_dtype(w.dtype)
    error_out = w.new_empty(_error_shape(keep, values, x))
    dbias_rows = torch.empty(B, d, device=device, dtype=acc)
    sq_err = torch.empty(S, B, device=device, dtype=acc)
    coef, values = coef.contiguous(), values.contiguous()
    use_h_route, width = False, d
    if dw is not None:
        use_h_route, width = route_of(S, B, k, d, w.dtype, arch=capability(device))
    list_position = None
    if use_h_route:
        list_position = torch.empty_like(order)
        launch(_positions_kernel, (cdiv(M, 1024),))(order, list_position, M, BLOCK=1024, num_warps=4)
    if dw is not None:
        pool = w.new_empty((M if use_h_route else S * B) * width)
    parts, add_sums = [], False
    for c0 in range(0, d, width):
        cols = slice(c0, min(c0 + width, d))
        part = w[:, cols]
        scratch = error_out if keep == ALL_ERRORS else None
        if dw is not None:
            shape = (M, part.shape[1]) if use_h_route else (S, B, part.shape[1])
            scratch = pool[: math.prod(shape)].view(shape)
        parts.append(launch_gather(
            indices, values, part, None if bias is None else bias[cols], x[:, cols], count=count, coef=coef,
            list_position=list_position, err_out=None if use_h_route else scratch,
            h_out=scratch if use_h_route else None, error_out=error_out[:, cols] if keep >= 0 else None,
            error_source=max(keep, 0), dbias_rows=dbias_rows[:, cols], sq_err=True, dot=True,
        ))  # fmt: skip
        # keep the partial sums of several launches: another pass over dvalues costs more
        held_bytes = sum(dots.numel() * dots.element_size() for _, dots in parts)
        if cols.stop == d or held_bytes > PARTIAL_BYTES or len(parts) == 4:
            sqs, dots = zip(*parts, strict=True)
            launch(_collect_kernel, (S * B,))(
                sqs, dots, tuple(len(p) for p in sqs), coef, sq_err, dvalues, S * B, k, P=len(parts), ADD_SQ=add_sums,
                ADD_DV=add_dvalues or add_sums, BLOCK_K=next_power_of_2(k), ACC=tl_dtype(acc), num_warps=1,
            )  # fmt: skip
            parts, add_sums = [], True
        if dw is not None:
            weights, scale = (None, None) if use_h_route else (values, coef)
            launch_reduce(
                out=dw[:, cols], sums=None, order=order, offsets=offsets, ids=ids, coef=weights, scale=scale, gate=None,
                mat=scratch, k=k, add=add_dw,
            )  # fmt: skip
    return sq_err, dbias_rows, error_out


def _error_shape(keep, values, x):
    return (len(values), *x.shape) if keep == ALL_ERRORS else x.shape if keep >= 0 else (0,)


def route_of(S, B, k, d, dtype, *, arch=80) -> tuple[bool, int]:
    """Choose (use_h_route, columns per pass within the scratch) for dw.

    H carries the loss coefficients in the weights' dtype; float16 would lose them, so it takes the route of the errors.
    """
    M, scratch = (
        B * k,
        SCRATCH_BYTES * (2 if S > 3 else 1),
    )  # many sources: fewer passes pay (modelled: 4 % of the step)
    width = scratch // (M * dtype.itemsize)
    short_rows = dtype.itemsize == 2 or k <= H_MAX_K_FP32
    enough_entries = S > H_MIN_SOURCES or (S == H_MIN_SOURCES and M >= H_MIN_ENTRIES and short_rows)
    use_h_route = enough_entries and dtype != torch.float16 and k <= gather_chunk(dtype.itemsize, arch)
    if use_h_route and width >= min(d, H_MIN_COLUMNS):
        return True, min(d, max(width // 128 * 128, 16))
    return False, min(d, max(SCRATCH_BYTES // (S * B * dtype.itemsize) // 128 * 128, H_MIN_COLUMNS))


def _decode_grads_torch(
    *, indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    acc = acc_dtype(w.dtype)
    error = gather_sum_torch(indices, values, w, bias).sub_(x)
    sq_err = error.to(acc).square().sum(2)
    error_out = error[keep].clone() if keep >= 0 else w.new_empty(0)
    active = (coef != 0)[..., None]
    grad_values = torch.where(active, coef[..., None] * gather_dot_torch(indices, w, error, count), 0.0)
    dvalues.copy_(dvalues + grad_values if add_dvalues else grad_values)
    error.masked_fill_(~active, 0.0)
    dbias_rows = torch.einsum("sb,sbd->bd", coef, error.to(acc))
    if dw is not None:
        reduce_torch(
            out=dw, sums=None, order=order, offsets=offsets, ids=ids, coef=values, scale=coef, gate=None, mat=error,
            k=indices.shape[1], add=add_dw,
        )  # fmt: skip
    return sq_err, dbias_rows, error if keep == ALL_ERRORS else error_out


def _decode_grads_fake(
    *, indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    acc = acc_dtype(w.dtype)
    return (
        w.new_empty(values.shape[:2], dtype=acc),
        w.new_empty(x.shape, dtype=acc),
        w.new_empty(_error_shape(keep, values, x)),
    )


decode_grads = register(
    "decode_grads",
    "(Tensor indices, Tensor values, Tensor w, Tensor? bias, Tensor x, Tensor coef, Tensor order, Tensor offsets,"
    " Tensor ids, Tensor? count, int keep, Tensor(a!) dvalues, bool add_dvalues, Tensor(b!)? dw, bool add_dw, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    torch_impl=_decode_grads_torch,
    triton_impl=_decode_grads_triton,
    fake=_decode_grads_fake,
)
decode_grads.__doc__ = """Compute losses and gradients of one target's reconstructions from every source.

E[s, b] = sum_j values[s, b, j] w[indices[b, j]] + bias - x[b], and dloss/dE[s, b] = coef[s, b] E[s, b].

Args:
    indices: int64 [B, k].
    values: [S, B, k].
    w: [N, d].
    bias: [d], or None.
    x: [B, d].
    coef: [S, B]; a source whose coef is 0 is excluded from every gradient, even if its error is not finite.
    order: int32, of the InverseIndex of indices.
    offsets: int32, of the InverseIndex.
    ids: int32, of the InverseIndex.
    count: int32 [], the valid columns of indices (all when None); values beyond it must be zero.
    keep: source whose E is returned, NO_ERROR, or ALL_ERRORS, which requires dw None.
    dvalues: [S, B, k] contiguous, receives the gradient of values.
    add_dvalues: add to dvalues instead of overwriting it.
    dw: [N, d], receives the gradient of w; None: not computed.
    add_dw: add to dw; rows whose latent is in no list are then not touched.
    impl: "triton" or "torch".

Returns:
    |E|^2 [S, B] and sum_s coef E [B, d], whose sum over b is the gradient of bias, in the accumulator dtype; E [B, d]
    of one source in w's dtype (empty for NO_ERROR, [S, B, d] for ALL_ERRORS).
"""


# target_weights: |x|^2 of every target's rows, and dloss/dE = coef * E for given weights of the terms
@triton.jit
def _target_weights_kernel(
    x_ptrs, widths, strides, weights_ptr, norm_ptr, coef_ptr, B, T: tl.constexpr, S: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1)
    for t in tl.static_range(T):
        if target == t:
            total = tl.zeros((BLOCK_D,), ACC)
            for d0 in range(0, widths[t], BLOCK_D):
                cols = d0 + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptrs[t] + b * strides[t] + cols, mask=cols < widths[t], other=0.0).to(ACC)
                total += x * x
            norm = tl.sum(total, 0)
            tl.store(norm_ptr + t * B + b, norm)
            for s in tl.static_range(S):
                weight = tl.load(weights_ptr + t * S + s).to(ACC)
                # an infinite norm gives NaN, not 0
                coef = tl.where(norm < float("inf"), weight * 2.0 / B / norm, float("nan"))
                tl.store(coef_ptr + (t * S + s) * B + b, tl.where(weight != 0.0, coef, 0.0))


def _target_weights_triton(xs, weights):
    (T, S), B, acc = weights.shape, xs[0].shape[0], acc_dtype(xs[0].dtype)
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    norm = torch.empty(T, B, device=weights.device, dtype=acc)
    coef = torch.empty(T, S, B, device=weights.device, dtype=acc)
    launch(_target_weights_kernel, (B, T))(
        tuple(xs), tuple(x.shape[1] for x in xs), tuple(x.stride(0) for x in xs), weights.contiguous(), norm, coef, B,
        T=T, S=S, BLOCK_D=16 if interpreted() else 1024, ACC=tl_dtype(acc), num_warps=4,
    )  # fmt: skip
    return norm, coef


def _target_weights_torch(xs, weights):
    norm = torch.stack([x.to(acc_dtype(x.dtype)).square().sum(1) for x in xs])
    coef = weights[..., None] * (2 / norm.shape[1]) / norm[:, None]
    coef = torch.where(norm[:, None] < float("inf"), coef, float("nan"))
    return norm, torch.where((weights != 0)[..., None], coef, 0.0)


def _target_weights_fake(xs, weights):
    T, S = weights.shape
    B, acc = xs[0].shape[0], acc_dtype(xs[0].dtype)
    return weights.new_empty(T, B, dtype=acc), weights.new_empty(T, S, B, dtype=acc)


target_weights = register(
    "target_weights",
    "(Tensor[] xs, Tensor weights, str impl) -> (Tensor, Tensor)",
    torch_impl=_target_weights_torch,
    triton_impl=_target_weights_triton,
    fake=_target_weights_fake,
)
target_weights.__doc__ = """Coefficients of dloss/dE = coef * E for the loss sum_ts weights[t, s] NMSE(R[t, s], xs[t]).

Args:
    xs: T targets, [B, d_t] each.
    weights: [T, S].
    impl: "triton" or "torch".

Returns:
    |x|^2 [T, B] and coef = 2 weights / (B |x|^2), [T, S, B], in the accumulator dtype. coef is 0 where the weight is 0,
    else NaN where |x|^2 is infinite or NaN.
"""


def grads_of_target(
    codes: SparseCodes,
    target: DecodeTarget,
    coef: torch.Tensor,
    out: GradOut,
    impl: str,
    *,
    error_source: int | None = None,
    keep_all_errors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute losses and gradients of one target by `decode_grads`, for codes shared or per source.

    The inverse index is built if it is missing.

    Args:
        codes: codes of S sources.
        target: decoder and rows that they reconstruct.
        coef: [S, B], dloss/dE over E.
        out: buffers for the gradients.
        impl: "triton" or "torch".
        error_source: source whose error [B, d] is returned; None: no error.
        keep_all_errors: return all errors [S, B, d]; requires out.dw None.

    Returns:
        |E|^2 [S, B]; sum_s coef E [B, d]; the errors, empty if none is requested.
    """
    if codes.inverse is None:
        codes = codes.with_inverse(target.w.shape[0], impl)

    def run(codes, coef, out, source):
        keep = ALL_ERRORS if keep_all_errors else NO_ERROR if source is None else source
        return decode_grads(
            codes.indices, codes.values, *target, coef, *codes.lists(0), codes.n_valid, keep, *out, impl
        )  # fmt: skip

    if codes.shared:
        return run(codes, coef, out, error_source)
    parts = []
    for s in range(len(codes.gathered)):
        only = slice(s, s + 1)
        part = GradOut(out.dvalues[only], out.add_dvalues, out.dw, out.add_dw or s > 0)
        parts.append(run(codes.source(s), coef[only], part, 0 if s == error_source else None))
    sq, g, errors = zip(*parts, strict=True)
    return torch.cat(sq), torch.stack(g).sum(0), torch.cat(errors) if keep_all_errors else errors[error_source or 0]


def grads_of_errors(
    codes: SparseCodes,
    target: DecodeTarget,
    dnmse: torch.Tensor,
    needs: tuple[bool, bool, bool, bool],
    impl: str,
    *,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradients of sum_s dnmse[s] NMSE(R[s], x).

    Args:
        codes: codes of S sources.
        target: decoder and rows that they reconstruct.
        dnmse: [S], gradient of the loss with respect to each NMSE.
        needs: whether values, w_dec, pre_bias and x need a gradient.
        impl: "triton" or "torch".
        into: [N, d], a buffer that dw is added to; None: a new one.

    Returns:
        dvalues [S, B, k], dw [d, N], dpre_bias [d] and dx [B, d], each None if not needed.
    """
    need_v, need_w, need_b, need_x = needs
    w, bias, x = target
    norm, coef = (part[0] for part in target_weights([x], dnmse[None], impl))
    dvalues = torch.empty_like(codes.gathered, dtype=norm.dtype, memory_format=torch.contiguous_format)
    dw = into
    if need_w and into is None:
        dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    sq_err, dbias_rows, _ = grads_of_target(codes, target, coef, GradOut(dvalues, False, dw, into is not None), impl)
    dx = None
    if need_x:
        through_norm = torch.where(coef != 0, coef * sq_err / norm, 0.0).sum(0)[:, None] * x.to(coef.dtype)
        dx = -(dbias_rows + through_norm).to(x.dtype)
    return (
        dvalues if need_v else None,
        dw.t() if need_w and dw is not None else None,
        dbias_rows.sum(0).to(bias.dtype) if need_b else None,
        dx,
    )
