"""Losses and gradients of all targets' reconstructions, none of which is stored."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, is_host_readable
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
    launch_gathers,
    pick,
)
from .latent_reduce import launch_reduces, reduce_torch
from .records import DecodeTarget, GradOut, SparseCodes


# decode_grads: losses and gradients of all targets in one pass over the gathered rows
@triton.jit
def _sum_slabs(sq_ptr, dot_ptr, first, count, row, rows, K, offs_k, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Sum the slabs first .. first + count - 1 of one row: dots [BLOCK_K] and |E|^2."""
    dots = tl.zeros((BLOCK_K,), ACC)
    sq = tl.zeros((), ACC)
    for slab in range(first, first + count):
        at = tl.full((), slab, tl.int64) * rows + row
        dots += tl.load(dot_ptr + at * K + offs_k, mask=offs_k < K, other=0.0)
        sq += tl.load(sq_ptr + at)
    return dots, sq


@triton.jit
def _collect_kernel(
    sq_ptrs, dot_ptrs, slabs, coef_ptr, sq_ptr, dv_ptr, rows, K,
    T: tl.constexpr, P: tl.constexpr, SHARED: tl.constexpr, ADD_SQ: tl.constexpr, ADD_DV: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (source, row): sum the slabs of each target; dvalues = coef * <W[I], E>, and 0 where coef is 0.

    T targets whose slabs follow one another, or one in P launches. SHARED: dvalues [rows, K] is the sum over targets;
    else [T, rows, K], a target for each program of axis 1.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    if SHARED:
        first = 0
        for t in tl.static_range(T):
            coef = tl.load(coef_ptr + t * rows + row).to(ACC)
            dots, sq = _sum_slabs(sq_ptrs[0], dot_ptrs[0], first, slabs[t], row, rows, K, offs_k, BLOCK_K, ACC)
            for p in tl.static_range(1, P):
                more, more_sq = _sum_slabs(sq_ptrs[p], dot_ptrs[p], 0, slabs[p], row, rows, K, offs_k, BLOCK_K, ACC)
                dots += more
                sq += more_sq
            if ADD_SQ:
                sq += tl.load(sq_ptr + t * rows + row)
            tl.store(sq_ptr + t * rows + row, sq)
            own = tl.where(coef != 0.0, coef * dots, 0.0)
            if t == 0:
                dv = own
            else:
                dv += own
            first += slabs[t]
        if ADD_DV:
            dv += tl.load(dv_ptr + row * K + offs_k, mask=mask_k, other=0.0)
        tl.store(dv_ptr + row * K + offs_k, dv, mask=mask_k)
    else:
        target = tl.program_id(1)
        first = tl.zeros((), tl.int32)
        for t in tl.static_range(1, T):
            first += tl.where(target >= t, slabs[t - 1], 0)
        out = target.to(tl.int64) * rows + row
        count = pick(slabs, target, T)
        dots, sq = _sum_slabs(sq_ptrs[0], dot_ptrs[0], first, count, row, rows, K, offs_k, BLOCK_K, ACC)
        coef = tl.load(coef_ptr + out).to(ACC)
        tl.store(dv_ptr + out * K + offs_k, tl.where(coef != 0.0, coef * dots, 0.0), mask=mask_k)
        tl.store(sq_ptr + out, sq)


@triton.jit
def _positions_kernel(order_ptr, list_position_ptr, M, BLOCK: tl.constexpr):
    """Inverse permutation of `order`."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    list_position = tl.load(order_ptr + offs, mask=offs < M, other=0)
    tl.store(list_position_ptr + list_position, offs.to(tl.int32), mask=offs < M)


def _decode_grads_triton(
    *, indices, values, ws, biases, xs, coef, order, offsets, ids, count, keep, errors, dbias_rows, dvalues,
    add_dvalues, dws, add_dw,
):  # fmt: skip
    (T, S, B), k, w, shared = coef.shape, values.shape[-1], ws[0], indices.dim() == 2
    acc, arch = acc_dtype(w.dtype), capability(w.device)
    sq_err = w.new_empty(T, S, B, dtype=acc)
    coef, values = coef.contiguous(), values.contiguous()
    widths = [x.shape[1] for x in xs]
    routes = [route_of(S, B, k, d, w.dtype, arch=arch) if dws else (False, d) for d in widths]
    at_once = not (add_dvalues and not shared) and (not dws or in_one_pass(S, B, k, widths, w.dtype, arch=arch))
    some = [slice(0, T)] if at_once else [slice(t, t + 1) for t in range(T)]
    list_position = None
    for first, part in enumerate(some):
        use_h_route, width = routes[part.start][0], max(width for _, width in routes[part])
        if use_h_route and list_position is None:
            list_position = torch.empty_like(order)
            M = order.numel()
            launch(_positions_kernel, (cdiv(M, 1024),))(order, list_position, M, BLOCK=1024, num_warps=4)
        own = (lambda t: t) if shared else (lambda t, part=part: None if t is None else t[part])
        passes = dict(
            indices=own(indices), values=own(values), ws=ws[part], biases=biases[part] if biases else None, xs=xs[part],
            coef=coef[part], order=own(order), offsets=own(offsets), ids=own(ids),
            count=count if count is None or count.dim() == 0 else count[part], keep=keep and keep[part],
            dvalues=own(dvalues), dws=dws[part], errors=errors[part], dbias_rows=dbias_rows[part], sq_err=sq_err[part],
        )  # fmt: skip
        _run_passes(
            **passes, add_dvalues=add_dvalues or (shared and first > 0), add_dw=add_dw, width=width,
            list_position=list_position if use_h_route else None,
        )  # fmt: skip
    return sq_err


def _run_passes(
    *, indices, values, ws, biases, xs, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dws, add_dw,
    errors, dbias_rows, sq_err, width, list_position,
):  # fmt: skip
    """Run the kernels of `decode_grads` into the given outputs: targets at once, or one in passes of columns."""
    (T, S, B), k, w, shared = coef.shape, values.shape[-1], ws[0], indices.dim() == 2
    all_errors, use_h_route, d = keep == [ALL_ERRORS] * T, list_position is not None, max(x.shape[1] for x in xs)
    own_errors = bool(keep) and not all_errors
    rows = (B * k,) if use_h_route else (S, B)
    if dws:
        pools = [w.new_empty(math.prod(rows) * min(width, x.shape[1])) for x in xs]
    parts, add_sums = [], False
    for c0 in range(0, d, width):
        last = c0 + width >= d
        cols = slice(c0, d if last else c0 + width)
        scratch = errors if all_errors else None
        if dws:
            widths = [x.shape[1] if T > 1 else cols.stop - c0 for x in xs]
            scratch = [
                pool[: math.prod(rows) * size].view(*rows, size) for pool, size in zip(pools, widths, strict=True)
            ]

        def cut(tensors, cols=cols):
            return tensors if tensors is None or T > 1 else [tensors[0][..., cols]]

        *sums, slabs = launch_gathers(
            indices, values, cut(ws), cut(biases), cut(xs), count=count, coef=coef, list_position=list_position,
            err_outs=None if use_h_route else scratch, h_outs=scratch if use_h_route else None,
            error_outs=cut(errors) if own_errors else None, error_sources=keep if own_errors else None,
            dbias_rows=cut(dbias_rows), sq_err=True, dot=True,
        )  # fmt: skip
        parts.append((*sums, slabs))
        # keep the partial sums of several launches: another pass over dvalues costs more
        held_bytes = sum(dots.numel() * dots.element_size() for _, dots, _ in parts)
        if last or held_bytes > PARTIAL_BYTES or len(parts) == 4:
            sqs, dots, slabs = zip(*parts, strict=True)
            launch(_collect_kernel, (S * B,) if shared else (S * B, T))(
                sqs, dots, sum(slabs, ()), coef, sq_err, dvalues, S * B, k, T=T, P=len(parts), SHARED=shared or T == 1,
                ADD_SQ=add_sums, ADD_DV=add_dvalues or add_sums, BLOCK_K=next_power_of_2(k), ACC=tl_dtype(coef.dtype),
                num_warps=1,
            )  # fmt: skip
            parts, add_sums = [], True
        if dws:
            one = not shared and T == 1  # the lists of one target
            weights, scale = (None, None) if use_h_route else (values[0] if one else values, coef)
            launch_reduces(
                outs=cut(dws), sums=None, order=order[0] if one else order, offsets=offsets[0] if one else offsets,
                ids=ids[0] if one else ids, coef=weights, scale=scale, gate=None, mats=scratch, k=k, add=add_dw,
            )  # fmt: skip


def _scratch_bytes(S):
    return SCRATCH_BYTES * (2 if S > 3 else 1)  # many sources: fewer passes pay (modelled: 4 % of the step)


def route_of(S, B, k, d, dtype, *, arch=80) -> tuple[bool, int]:
    """Choose (use_h_route, columns per pass within the scratch) for dw.

    H carries the loss coefficients in the weights' dtype; float16 would lose them, so it takes the route of the errors.
    """
    M = B * k
    width = _scratch_bytes(S) // (M * dtype.itemsize)
    short_rows = dtype.itemsize == 2 or k <= H_MAX_K_FP32
    enough_entries = S > H_MIN_SOURCES or (S == H_MIN_SOURCES and M >= H_MIN_ENTRIES and short_rows)
    use_h_route = enough_entries and dtype != torch.float16 and k <= gather_chunk(dtype.itemsize, arch)
    if use_h_route and width >= min(d, H_MIN_COLUMNS):
        return True, min(d, max(width // 128 * 128, 16))
    return False, min(d, max(SCRATCH_BYTES // (S * B * dtype.itemsize) // 128 * 128, H_MIN_COLUMNS))


def in_one_pass(S, B, k, widths, dtype, *, arch=80) -> bool:
    """Whether the dw of all targets come from one pass: one route, and no more scratch together than one may take."""
    routes = [route_of(S, B, k, d, dtype, arch=arch) for d in widths]
    use_h_route = routes[0][0]
    alike = all(own == use_h_route and width >= d for (own, width), d in zip(routes, widths, strict=True))
    rows = B * k if use_h_route else S * B
    return alike and (len(widths) == 1 or rows * sum(widths) * dtype.itemsize <= _scratch_bytes(S))


def _decode_grads_torch(
    *, indices, values, ws, biases, xs, coef, order, offsets, ids, count, keep, errors, dbias_rows, dvalues,
    add_dvalues, dws, add_dw,
):  # fmt: skip
    sqs, shared = [], indices.dim() == 2
    for t, (w, x) in enumerate(zip(ws, xs, strict=True)):

        def own(tensor, t=t):
            return tensor if shared or tensor is None or tensor.dim() == 0 else tensor[t]

        lists = dict(order=own(order), offsets=own(offsets), ids=own(ids))
        sq, g, error = _decode_grads_of_one(
            indices=own(indices), values=own(values), w=w, bias=biases[t] if biases else None, x=x, coef=coef[t],
            **lists, count=own(count), keep=keep[t] if keep else NO_ERROR, dvalues=own(dvalues),
            add_dvalues=add_dvalues or (shared and t > 0), dw=dws[t] if dws else None, add_dw=add_dw,
        )  # fmt: skip
        sqs.append(sq)
        dbias_rows[t].copy_(g)
        if keep:
            errors[t].copy_(error)
    return torch.stack(sqs)


def _decode_grads_of_one(
    *, indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    acc = acc_dtype(w.dtype)
    error = gather_sum_torch(indices, values, w, bias).sub_(x)
    sq_err = error.to(acc).square().sum(2)
    error_out = error[keep].clone() if keep >= 0 else w.new_empty(0)
    active = (coef != 0)[..., None]
    grad_values = coef[..., None] * gather_dot_torch(indices, w, error, count)
    if not (is_host_readable(coef) and bool(active.all())):  # the usual step excludes no source
        grad_values = torch.where(active, grad_values, 0.0)
        error.masked_fill_(~active, 0.0)
    if add_dvalues:
        dvalues.add_(grad_values)
    else:
        dvalues.copy_(grad_values)
    dbias_rows = (coef[..., None] * error.to(acc)).sum(0)  # einsum would multiply row by row
    if dw is not None:
        reduce_torch(
            out=dw, sums=None, order=order, offsets=offsets, ids=ids, coef=values, scale=coef, gate=None, mat=error,
            k=indices.shape[1], add=add_dw,
        )  # fmt: skip
    return sq_err, dbias_rows, error if keep == ALL_ERRORS else error_out


def _decode_grads_fake(*, ws, coef, **_):
    return coef.new_empty(coef.shape, dtype=acc_dtype(ws[0].dtype))


decode_grads = register(
    "decode_grads",
    "(Tensor indices, Tensor values, Tensor[] ws, Tensor[] biases, Tensor[] xs, Tensor coef, Tensor order,"
    " Tensor offsets, Tensor ids, Tensor? count, int[] keep, Tensor(a!)[] errors, Tensor(b!)[] dbias_rows,"
    " Tensor(c!) dvalues, bool add_dvalues, Tensor(d!)[] dws, bool add_dw, str impl) -> Tensor",
    torch_impl=_decode_grads_torch,
    triton_impl=_decode_grads_triton,
    fake=_decode_grads_fake,
)
decode_grads.__doc__ = """Compute losses and gradients of T targets' reconstructions from every source.

E[t, s, b] = sum_j values[s, b, j] ws[t][indices[b, j]] + biases[t] - xs[t][b], and dloss/dE = coef[t, s, b] E[t, s, b].

Args:
    indices: int64 [B, k] for all targets, or [T, B, k]: a target has codes of its own.
    values: [S, B, k], or [T, S, B, k].
    ws: T tensors [N, d_t].
    biases: T tensors [d_t], or empty.
    xs: T tensors [B, d_t].
    coef: [T, S, B]; a source whose coef is 0 is excluded from every gradient, even if its error is not finite.
    order: int32 of the InverseIndex of indices, with own codes [T, ...], as the next two.
    offsets: int32, of the InverseIndex.
    ids: int32, of the InverseIndex.
    count: int32 [], or [T] with own codes: the valid columns of indices (all when None); values beyond must be zero.
    keep: the source whose E is kept, for each target; or T times ALL_ERRORS, which requires dws empty; or empty.
    errors: with keep T tensors in the dtype of ws that receive E, [B, d_t] of one source or [S, B, d_t]; else empty.
    dbias_rows: T tensors [B, d_t] in the accumulator dtype, receive sum_s coef E, whose sum over b is the gradient of
        the bias.
    dvalues: contiguous and as values, receives the gradient of values.
    add_dvalues: add to dvalues instead of overwriting it.
    dws: T tensors [N, d_t], receive the gradients of ws; empty: not computed.
    add_dw: add to dws; rows whose latent is in no list are then not touched.
    impl: "triton" or "torch".

Returns:
    |E|^2 [T, S, B] in the accumulator dtype.
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
    return norm, coefficients_torch(norm, weights)


def coefficients_torch(norm, weights):
    """Compute coef of `target_weights` from |x|^2 [T, B] and weights [T, S]."""
    coef = weights[..., None] * (2 / norm.shape[1]) / norm[:, None]
    coef = torch.where(norm[:, None] < float("inf"), coef, float("nan"))
    return torch.where((weights != 0)[..., None], coef, 0.0)


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


# residuals: AuxK's targets
@triton.jit
def _residuals_kernel(
    bias_ptrs, error_ptrs, out_ptrs, widths, strides, norm_ptr, coef_ptr, high, low, B, T: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1)
    for t in tl.static_range(T):
        if target == t:
            total = tl.zeros((BLOCK_D,), ACC)
            for d0 in range(0, widths[t], BLOCK_D):
                cols = d0 + tl.arange(0, BLOCK_D)
                mask = cols < widths[t]
                bias = tl.load(bias_ptrs[t] + cols, mask=mask, other=0.0).to(ACC)
                error = tl.load(error_ptrs[t] + b * strides[t] + cols, mask=mask, other=0.0).to(ACC)
                x = (bias - error).to(out_ptrs[t].dtype.element_ty)
                tl.store(out_ptrs[t] + b * widths[t] + cols, x, mask=mask)
                x = x.to(ACC)
                total += x * x
            norm = tl.sum(total, 0)
            tl.store(norm_ptr + t * B + b, norm)
            weight = (tl.full((), high, ACC) + tl.full((), low, ACC)) / T
            # an infinite norm gives NaN, not 0
            coef = tl.where(norm < float("inf"), weight * 2.0 / B / norm, float("nan"))
            tl.store(coef_ptr + t * B + b, tl.where(weight != 0.0, coef, 0.0))


def _residuals_triton(pre_biases, errors, weight):
    single = float(np.float32(weight))
    T, B, acc = len(errors), len(errors[0]), acc_dtype(errors[0].dtype)
    pre_biases, errors = tuple(b.contiguous() for b in pre_biases), tuple(errors)
    errors = tuple(e if e.stride(1) == 1 else e.contiguous() for e in errors)
    xs, norm, coef = _residuals_fake(pre_biases, errors, weight)
    # Triton rounds numbers to float32; `low` carries the remainder for float64 under the interpreter
    launch(_residuals_kernel, (B, T))(
        pre_biases, errors, tuple(xs), tuple(e.shape[1] for e in errors), tuple(e.stride(0) for e in errors), norm,
        coef, single, weight - single, B, T=T, BLOCK_D=16 if interpreted() else 1024, ACC=tl_dtype(acc), num_warps=4,
    )  # fmt: skip
    return xs, norm, coef


def _residuals_torch(pre_biases, errors, weight):
    xs = [pre_bias - error.to(pre_bias.dtype) for pre_bias, error in zip(pre_biases, errors, strict=True)]
    norm = torch.stack([x.to(acc_dtype(x.dtype)).square().sum(1) for x in xs])
    return xs, norm, coefficients_torch(norm, norm.new_full((len(xs), 1), weight / len(xs)))


def _residuals_fake(pre_biases, errors, weight):
    T, B = len(errors), errors[0].shape[0]
    norm = errors[0].new_empty(T, B, dtype=acc_dtype(errors[0].dtype))
    return [b.new_empty(e.shape) for b, e in zip(pre_biases, errors, strict=True)], norm, norm.new_empty(T, 1, B)


residuals = register(
    "residuals",
    "(Tensor[] pre_biases, Tensor[] errors, float weight, str impl) -> (Tensor[], Tensor, Tensor)",
    torch_impl=_residuals_torch,
    triton_impl=_residuals_triton,
    fake=_residuals_fake,
)
residuals.__doc__ = """AuxK's targets x - R + b, held constant: the bias less the error of the own reconstruction.

Args:
    pre_biases: T tensors [d_t].
    errors: R - x of each target, [B, d_t].
    weight: of the mean of AuxK's T terms in the loss.
    impl: "triton" or "torch".

Returns:
    T tensors [B, d_t] in the biases' dtype; in the accumulator dtype their squared norms [T, B], and the coefficients
    [T, 1, B] that `target_weights` gives for the weights weight / T.
"""


def grads_of_targets(
    codes: SparseCodes,
    targets: list[DecodeTarget],
    coef: torch.Tensor,
    out: GradOut,
    impl: str,
    *,
    own_codes: bool = False,
    own_errors: bool = False,
    keep_all_errors: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Compute losses and gradients of T targets by `decode_grads`, for codes shared or per source.

    The inverse index is built if it is missing.

    Args:
        codes: codes of S sources.
        targets: decoders and rows that they reconstruct.
        coef: [T, S, B], dloss/dE over E; [T, 1, B] with own codes.
        out: buffers for the gradients.
        impl: "triton" or "torch".
        own_codes: target t is reconstructed from source t alone.
        own_errors: return the error [B, d_t] of target t from source t; with own codes of its only source.
        keep_all_errors: return all errors [S, B, d_t]; requires out.dws empty.

    Returns:
        |E|^2 [T, S, B]; sum_s coef E [B, d_t] of each target; the errors, empty if none is requested.
    """
    if codes.inverse is None:
        codes = codes.with_inverse(targets[0].w.shape[0], impl)
    T = len(targets)
    results: list[tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = []
    # buffers of all targets, or one target after the other
    alike = len({dw is None for dw in out.dws}) == 1
    for part in [slice(0, T)] if alike else [slice(t, t + 1) for t in range(T)]:
        sources = [0] * T if own_codes else list(range(T))[part]
        keep = [ALL_ERRORS] * T if keep_all_errors else sources if own_errors else []
        columns = [list(column) for column in zip(*targets[part], strict=True)]
        buffers = out._replace(
            add_dvalues=out.add_dvalues or (part.start > 0 and not own_codes),
            dws=[dw for dw in out.dws[part] if dw is not None],
        )  # fmt: skip
        arguments = columns, coef[part], keep[: len(targets[part])], buffers
        if own_codes:
            results.append(_decode_grads_own(codes, part, *arguments, impl))
        elif codes.shared:
            results.append(_decode_grads(codes, *arguments, impl))
        else:
            results.append(_decode_grads_by_source(codes, *arguments, impl))
    sqs = [sq for sq, *_ in results]
    gs, errors = ([t for result in results for t in result[i]] for i in (1, 2))
    return sqs[0] if alike else torch.cat(sqs), gs, errors


def _decode_grads(codes, columns, coef, keep, out, impl):
    """Call `decode_grads` with codes that all sources share."""
    errors, rows = _errors(columns, coef, keep), _rows(columns, coef)
    sq = decode_grads(
        codes.indices, codes.gathered, *columns, coef, *codes.lists(0), codes.n_valid, keep, errors, rows, *out, impl
    )
    return sq, rows, errors


def _decode_grads_own(codes, part, columns, coef, keep, out, impl):
    """Call `decode_grads` for some targets, each with the codes of its own source."""
    errors, rows = _errors(columns, coef, keep), _rows(columns, coef)
    n_valid = None if codes.n_valid is None else codes.n_valid[part]
    out = out._replace(dvalues=out.dvalues[part, None])
    sq = decode_grads(
        codes.indices[part], codes.gathered[part, None], *columns, coef, *(of[part] for of in codes.inverse), n_valid,
        keep, errors, rows, *out, impl,
    )  # fmt: skip
    return sq, rows, errors


def _errors(columns, coef, keep):
    """New `errors` of `decode_grads`."""
    ws, _, xs = columns
    shapes = [(coef.shape[1], *x.shape) if keep == [ALL_ERRORS] * len(xs) else x.shape for x in xs] if keep else []
    return [w.new_empty(shape) for w, shape in zip(ws, shapes, strict=False)]


def _rows(columns, coef, *sizes):
    """New `dbias_rows` of `decode_grads`, behind further sizes."""
    return [x.new_empty(*sizes, *x.shape, dtype=coef.dtype) for x in columns[2]]


def _decode_grads_by_source(codes, columns, coef, keep, out, impl):
    """Call `decode_grads` for every source, which have indices of their own."""
    S, T, every = len(codes.gathered), len(coef), keep == [ALL_ERRORS] * len(coef)
    sqs, rows, errors = [], _rows(columns, coef, S), _errors(columns, coef, keep if every else [])
    made: list[list[torch.Tensor]] = []
    for s in range(S):
        only, own = slice(s, s + 1), codes.source(s)
        kept = keep if every else [0] * T if s in keep else []
        made.append([error[only] for error in errors] if every else _errors(columns, coef, kept))
        sqs.append(decode_grads(
            own.indices, own.gathered, *columns, coef[:, only], *own.lists(0), own.n_valid, kept, made[s],
            [row[s] for row in rows], out.dvalues[only], out.add_dvalues, out.dws, out.add_dw or s > 0, impl,
        ))  # fmt: skip
    errors = errors if every else [made[s][t] for t, s in enumerate(keep)]
    return torch.cat(sqs, 1), [row.sum(0) for row in rows], errors


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
    out = GradOut(dvalues, False, [dw], into is not None)
    (sq_err,), (dbias_rows,), _ = grads_of_targets(codes, [target], coef[None], out, impl)
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
