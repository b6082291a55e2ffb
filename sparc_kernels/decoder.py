"""Decoder: reconstructions across streams, and their normalised errors and gradients without ever keeping one.

For a target t every source uses the same gathered rows of W_dec_t, so one pass serves all of them: errors, losses, the
gradient of the values and what the weights' gradient needs. Nothing of size [S, S, B, d] outlives a call.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from ._checks import check_indices, check_inverse, check_same_length, check_tensor, fail, require
from ._launch import (
    MAX_K,
    MAX_STREAMS,
    PARTIAL_BYTES,
    SCRATCH_BYTES,
    SPREAD_COLUMNS,
    SPREAD_PLACES,
    SPREAD_SOURCES,
    SPREAD_WIDE,
    capability,
    cdiv,
    gather_chunk,
    next_power_of_2,
)
from ._ops import acc_dtype, register, resolve_impl
from ._triton import INTERPRETED, tl, tl_dtype, triton
from .gather import (
    KEEP_ALL,
    KEEP_NONE,
    gather_dot,
    gather_dot_torch,
    gather_error,
    gather_sum,
    gather_sum_torch,
    launch_gather,
)
from .latent_grads import (
    NO_INVERSE,
    InverseIndex,
    inverse_index_op,
    inverse_sizes,
    latent_reduce,
    launch_reduce,
    lists_of,
    reduce_torch,
)


def _per_source(op, indices, sources):
    """op(indices [B, k], sources [S, B, ...]), called once when the sources share indices, else source by source."""
    if indices.dim() == 2:
        return op(indices, sources)
    return torch.cat([op(idx, sources[s : s + 1]) for s, idx in enumerate(indices)])


# decode_grads: losses and gradients of one target in one pass over the gathered rows


@triton.jit
def _collect_kernel(
    sq_ptrs, dot_ptrs, slabs, coef_ptr, sq_ptr, dv_ptr, rows, K,
    P: tl.constexpr, ADD_SQ: tl.constexpr, ADD_DV: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (source, row): adds up the slabs of P launches; dvalues = coef * <W[I], E>, 0 where coef is."""
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
def _places_kernel(order_ptr, place_ptr, M, BLOCK: tl.constexpr):
    """Where in the lists each place stands."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(order_ptr + offs, mask=offs < M, other=0)
    tl.store(place_ptr + place, offs.to(tl.int32), mask=offs < M)


def _decode_grads_triton(
    indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    (S, B, k), d, M, device = values.shape, w.shape[1], indices.numel(), w.device
    acc = acc_dtype(w.dtype)
    one = w.new_empty(_kept_shape(keep, values, x))
    g = torch.empty(B, d, device=device, dtype=acc)
    sq = torch.empty(S, B, device=device, dtype=acc)
    coef, values = coef.contiguous(), values.contiguous()
    spread, width = _route(S, M, B, k, d, w.dtype, capability(device)) if dw is not None else (False, d)
    place = None
    if spread:
        place = torch.empty_like(order)
        _places_kernel[(cdiv(M, 1024),)](order, place, M, BLOCK=1024, num_warps=4)
    if dw is not None:
        pool = w.new_empty((M if spread else S * B) * width)
    parts, added = [], False
    for c0 in range(0, d, width):
        cols = slice(c0, min(c0 + width, d))
        part = w[:, cols]
        scratch = one if keep == KEEP_ALL else None
        if dw is not None:
            shape = (M, part.shape[1]) if spread else (S, B, part.shape[1])
            scratch = pool[: math.prod(shape)].view(shape)
        parts.append(launch_gather(
            indices, values, part, None if bias is None else bias[cols], x[:, cols], count=count, coef=coef,
            place=place, e=None if spread else scratch, h=scratch if spread else None,
            one=one[:, cols] if keep >= 0 else None, kept=max(keep, 0), g=g[:, cols], sq=True, dot=True,
        ))  # fmt: skip
        # kept until there are many: another pass over dvalues costs more than they take
        held = sum(dots.numel() * dots.element_size() for _, dots in parts)
        if cols.stop == d or held > PARTIAL_BYTES or len(parts) == 4:
            sqs, dots = zip(*parts, strict=True)
            _collect_kernel[(S * B,)](
                sqs, dots, tuple(len(p) for p in sqs), coef, sq, dvalues, S * B, k, P=len(parts), ADD_SQ=added,
                ADD_DV=add_dvalues or added, BLOCK_K=next_power_of_2(k), ACC=tl_dtype(acc), num_warps=1,
            )  # fmt: skip
            parts, added = [], True
        if dw is not None:
            weights, scale = (None, None) if spread else (values, coef)
            launch_reduce(dw[:, cols], None, order, offsets, ids, weights, scale, None, scratch, k, add_dw)
    return sq, g, one


def _kept_shape(keep, values, x):
    return (len(values), *x.shape) if keep == KEEP_ALL else x.shape if keep >= 0 else (0,)


def _route(S, M, B, k, d, dtype, arch=80) -> tuple[bool, int]:
    """Whether the gradient goes by way of H in list order, and how many columns are done at once within the scratch.

    H carries the loss coefficients in the weights' dtype; float16 would lose them, so it keeps to the errors.
    """
    scratch = SCRATCH_BYTES * (2 if S > 3 else 1)  # many sources: fewer pieces are worth it (modelled: 4 % of the step)
    width = scratch // (M * dtype.itemsize)
    few = dtype.itemsize == 2 or k <= SPREAD_WIDE
    many = S > SPREAD_SOURCES or (S == SPREAD_SOURCES and M >= SPREAD_PLACES and few)
    spread = many and dtype != torch.float16 and k <= gather_chunk(dtype.itemsize, arch)
    if spread and width >= min(d, SPREAD_COLUMNS):
        return True, min(d, max(width // 128 * 128, 16))
    return False, min(d, max(SCRATCH_BYTES // (S * B * dtype.itemsize) // 128 * 128, SPREAD_COLUMNS))


def _decode_grads_torch(
    indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    acc = acc_dtype(w.dtype)
    e = gather_sum_torch(indices, values, w, bias).sub_(x)
    sq = e.to(acc).square().sum(2)
    one = e[keep].clone() if keep >= 0 else w.new_empty(0)
    asked = (coef != 0)[..., None]
    dv = torch.where(asked, coef[..., None] * gather_dot_torch(indices, w, e, count), 0.0)
    dvalues.copy_(dvalues + dv if add_dvalues else dv)
    e.masked_fill_(~asked, 0.0)
    g = torch.einsum("sb,sbd->bd", coef, e.to(acc))
    if dw is not None:
        reduce_torch(dw, None, order, offsets, ids, values, coef, None, e, indices.shape[1], add_dw)
    return sq, g, e if keep == KEEP_ALL else one


def _decode_grads_fake(
    indices, values, w, bias, x, coef, order, offsets, ids, count, keep, dvalues, add_dvalues, dw, add_dw
):  # fmt: skip
    acc = acc_dtype(w.dtype)
    return (
        w.new_empty(values.shape[:2], dtype=acc),
        w.new_empty(x.shape, dtype=acc),
        w.new_empty(_kept_shape(keep, values, x)),
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
decode_grads.__doc__ = """Losses and gradients of one target's reconstructions from every source.

E[s, b] = sum_j values[s, b, j] w[indices[b, j]] + bias - x[b], and dloss/dE[s, b] = coef[s, b] E[s, b].

Args:
    indices: int64 [B, k].  values: [S, B, k].  w: [N, d].  bias: [d].  x: [B, d].
    coef: [S, B]; where it is 0 the source takes no part in any gradient, whatever its error is.
    order, offsets, ids: the InverseIndex of indices.
    count: int32 [], the columns of indices that exist (all when None); the values beyond it are zero.
    keep: the source whose E is returned, KEEP_NONE, or KEEP_ALL, which goes with dw None.
    dvalues: [S, B, k] contiguous, where the gradient of values goes.  dw: [N, d], that of w; None: nobody asks for it.
    add_dvalues, add_dw: add to what they hold; rows of dw whose latent is in no list are then not touched.
    impl: "triton" or "torch".

Returns: |E|^2 [S, B] and sum_s coef E [B, d], whose sum over b is the gradient of bias, in the accumulator dtype; E
[B, d] of one source in w's dtype (empty for KEEP_NONE; for KEEP_ALL [S, B, d]).
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
                # an infinite norm: the gradient is no 0 but NaN
                coef = tl.where(norm < float("inf"), weight * 2.0 / B / norm, float("nan"))
                tl.store(coef_ptr + (t * S + s) * B + b, tl.where(weight != 0.0, coef, 0.0))


def _target_weights_triton(xs, weights):
    (T, S), B, acc = weights.shape, xs[0].shape[0], acc_dtype(xs[0].dtype)
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    norm = torch.empty(T, B, device=weights.device, dtype=acc)
    coef = torch.empty(T, S, B, device=weights.device, dtype=acc)
    _target_weights_kernel[(B, T)](
        tuple(xs), tuple(x.shape[1] for x in xs), tuple(x.stride(0) for x in xs), weights.contiguous(), norm, coef, B,
        T=T, S=S, BLOCK_D=16 if INTERPRETED else 1024, ACC=tl_dtype(acc), num_warps=4,
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
target_weights.__doc__ = """What sum_ts weights[t, s] NMSE(R[t, s], xs[t]) makes of each error: dloss/dE = coef * E.

Args: xs: T targets [B, d_t].  weights: [T, S].  impl: "triton" or "torch".

Returns: |x|^2 [T, B]; coef = 2 weights / (B |x|^2), [T, S, B], 0 where the weight is and NaN where |x|^2 is infinite or
NaN; in the accumulator dtype.
"""


def grads_of_target(indices, values, rows, pre_bias, x, coef, inverse, count, keep, dvalues, add_dv, dw, add_dw, impl):
    """`decode_grads` for indices [B, k], or [S, B, k]; `inverse` [1 or S, ...], or parts of None."""
    if inverse[0] is None:
        groups = 1 if indices.dim() == 2 else len(indices)
        inverse = inverse_index_op(indices, groups, rows.shape[0], None, impl)
    if indices.dim() == 2:
        lists = lists_of(inverse, 0)
        return decode_grads(
            indices, values, rows, pre_bias, x, coef, *lists, count, keep, dvalues, add_dv, dw, add_dw, impl
        )
    parts = []
    for s, idx in enumerate(indices):
        kept = KEEP_ALL if keep == KEEP_ALL else 0 if s == keep else KEEP_NONE
        one, lists = slice(s, s + 1), lists_of(inverse, s)
        args = idx, values[one], rows, pre_bias, x, coef[one], *lists, count, kept, dvalues[one], add_dv
        parts.append(decode_grads(*args, dw, add_dw or s > 0, impl))
    sq, g, error = zip(*parts, strict=True)
    return torch.cat(sq), torch.stack(g).sum(0), torch.cat(error) if keep == KEEP_ALL else error[max(keep, 0)]


def grads_of_errors(values, w_dec, pre_bias, x, indices, inverse, count, dnmse, needs, impl, into=None):
    """Gradients of sum_s dnmse[s] NMSE(R[s], x): dvalues [S, B, k], dw [d, N], d pre_bias, dx; None if not needed.

    `into` [N, d] is a gradient to add dw to.
    """
    need_v, need_w, need_b, need_x = needs
    rows = w_dec.t()
    norm, coef = (part[0] for part in target_weights([x], dnmse[None], impl))
    dvalues = torch.empty_like(values, dtype=norm.dtype, memory_format=torch.contiguous_format)
    dw = into
    if need_w and into is None:
        dw = torch.empty_like(rows, memory_format=torch.contiguous_format)
    sq, g, _ = grads_of_target(
        indices, values, rows, pre_bias, x, coef, inverse, count, KEEP_NONE, dvalues, False, dw, into is not None, impl
    )
    dx = None
    if need_x:
        through_norm = torch.where(coef != 0, coef * sq / norm, 0.0).sum(0)[:, None] * x.to(coef.dtype)
        dx = -(g + through_norm).to(x.dtype)
    return (
        dvalues if need_v else None,
        dw.t() if need_w else None,
        g.sum(0).to(pre_bias.dtype) if need_b else None,
        dx,
    )


def errors_of(indices, values, rows, pre_bias, x, keep, count, impl):
    """|E|^2 [S, B] and E [B, d] of source `keep`, for indices [B, k] or [S, B, k]."""
    if indices.dim() == 2:
        return gather_error(indices, values, rows, pre_bias, x, keep, count, impl)
    parts = [
        gather_error(idx, values[s : s + 1], rows, pre_bias, x, 0 if s == keep else KEEP_NONE, count, impl)
        for s, idx in enumerate(indices)
    ]
    return torch.cat([p[0] for p in parts]), parts[max(keep, 0)][1]


class Decode(torch.autograd.Function):
    """Reconstructions of one target from S sources: [S, B, d]."""

    @staticmethod
    def forward(ctx, values, w_dec, pre_bias, indices, order, offsets, ids, impl):
        rows = w_dec.t()
        ctx.save_for_backward(values, w_dec, indices, order, offsets, ids)
        ctx.impl = impl
        return _per_source(lambda i, v: gather_sum(i, v, rows, pre_bias, impl), indices, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, drecon):
        values, w_dec, indices, *inverse = ctx.saved_tensors
        rows, impl = w_dec.t(), ctx.impl
        dvalues = dw = db = None
        if ctx.needs_input_grad[0]:
            dvalues = _per_source(lambda i, x: gather_dot(i, rows, x, None, impl), indices, drecon).to(values.dtype)
        if ctx.needs_input_grad[1]:
            if inverse[0] is None:
                inverse = lists_of(inverse_index_op(indices, 1, rows.shape[0], None, impl), 0)
            coef, mat = values, drecon.contiguous()
            if indices.dim() == 3:  # every (source, row) has its own list entries: one source with S * B rows
                coef, mat = coef.reshape(1, -1), mat.reshape(1, -1, mat.shape[-1])
            dw = latent_reduce(InverseIndex(*inverse), coef, mat, indices.shape[-1], w_dec.dtype, impl)[0].t()
        if ctx.needs_input_grad[2]:
            db = drecon.sum((0, 1), dtype=acc_dtype(drecon.dtype)).to(drecon.dtype)
        return dvalues, dw, db, None, None, None, None, None


class DecodeNMSE(torch.autograd.Function):
    """Normalised errors [S] of one target from S sources, each with a gradient of its own."""

    @staticmethod
    def forward(ctx, values, w_dec, pre_bias, x, indices, order, offsets, ids, impl):
        ctx.save_for_backward(values, w_dec, pre_bias, x, indices, order, offsets, ids)
        ctx.impl = impl
        sq, _ = errors_of(indices, values, w_dec.t(), pre_bias, x, KEEP_NONE, None, impl)
        norm, _ = target_weights([x], values.new_zeros(1, 1), impl)
        return (sq / norm).mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnmse):
        values, w_dec, pre_bias, x, indices, *inverse = ctx.saved_tensors
        # lists that the caller has are those of shared indices
        given = indices.dim() == 2 and inverse[0] is not None
        inverse = [part[None] for part in inverse] if given else NO_INVERSE
        grads = grads_of_errors(
            values, w_dec, pre_bias, x, indices, inverse, None, dnmse, ctx.needs_input_grad[:4], ctx.impl
        )
        return (*grads, None, None, None, None, None)


def _check(indices, values, w_decs, pre_biases, pairs, inverse):
    T = check_same_length("w_decs", w_decs=w_decs, pre_biases=pre_biases)
    check_tensor("w_decs[0]", w_decs[0], ("d", "N"))
    n, like = w_decs[0].shape[1], w_decs[0]
    require(isinstance(values, torch.Tensor), "values", "a tensor of shape [S, B, k]", values)
    require(values.dim() == 3 and values.is_floating_point(), "values", "a floating tensor of shape [S, B, k]", values)
    require(values.device == like.device, "values", f"a tensor on {like.device}", values)
    S, B, k = values.shape
    require(1 <= S <= MAX_STREAMS, "values", f"1..{MAX_STREAMS} sources", values)
    require(1 <= k <= MAX_K, "values", f"1..{MAX_K} values a row", values)
    require(B > 0, "values", "at least one row", values)
    for t in range(T):
        w, bias = check_tensor(f"w_decs[{t}]", w_decs[t], ("d", n), like=like), pre_biases[t]
        if isinstance(bias, torch.Tensor) and bias.shape == w.shape[1:] != w.shape[:1]:
            fail(f"w_decs[{t}]", f"[d, N] with d {len(bias)} as in pre_biases[{t}] (transposed?)", w)
        check_tensor(f"pre_biases[{t}]", bias, (w.shape[0],), like=like)
    shape = (S, B, k) if getattr(indices, "ndim", 2) == 3 else (B, k)
    check_indices("indices", indices, shape, n, like.device)
    check_inverse("inverse", inverse, indices, inverse_sizes(indices.numel(), n))
    if pairs is None:
        return T, S, {t: list(range(S)) for t in range(T)}
    require(isinstance(pairs, (list, tuple, set, dict)), "pairs", "a list of (target, source) tuples", pairs)
    asked: dict[int, list[int]] = {}
    for pair in pairs:
        ok = isinstance(pair, tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
        ok = ok and 0 <= pair[0] < T and 0 <= pair[1] < S
        require(ok, "pairs", f"(target, source) tuples with target in 0..{T - 1} and source in 0..{S - 1}", repr(pair))
        sources = asked.setdefault(pair[0], [])
        if pair[1] not in sources:
            sources.append(pair[1])
    return T, S, asked


def pick(x: torch.Tensor, places: list[int]) -> torch.Tensor:
    """x[places]; indexing a CUDA tensor with a list would copy the list to the device, a synchronisation."""
    return torch.stack([x[i] for i in places])


def _sources(indices, values, inverse, asked):
    """What a target needs of the sources it asks for; the inverse index stays valid while all of them are asked for."""
    if asked == list(range(values.shape[0])):
        return indices, values, inverse
    values = pick(values, asked)
    return (indices, values, inverse) if indices.dim() == 2 else (pick(indices, asked), values, NO_INVERSE)


def decode(
    indices: torch.Tensor,
    values: torch.Tensor,
    w_decs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    pairs: list[tuple[int, int]] | None = None,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> dict[tuple[int, int], torch.Tensor]:
    """Reconstructions of every target from every source, each selected decoder row fetched once per (row, target).

    Args:
        indices: int64 [B, k] shared by all sources, or [S, B, k]. Ids in 0..N-1 (checked on a CPU; on a GPU an id
            outside gives NaN with Triton, torch's device assert with impl="torch"). An id twice in a row adds up.
        values: [S, B, k], any floating dtype; used in float32 (float64 for float64 weights). Half precision weights:
            impl="torch" rounds them to the weights' dtype; fp16 cannot hold values beyond 65504 in either.
        w_decs: T tensors [d_t, N]. Best with strides (1, d_t), as `AlignedSAE` keeps them; others are copied.
        pre_biases: T tensors [d_t].
        pairs: which (target, source) to make; all T x S when None.
        inverse: `inverse_index(indices, N)` when the caller already has it.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns: {(t, s): [B, d_t]} in the weights' dtype; differentiable in values, w_decs and pre_biases.

    Equivalent to: `{(t, s): codes[s] @ w_decs[t].T + pre_biases[t]}` with
    `codes[s] = zeros(B, N).scatter(1, indices, values[s])`
    """
    _, _, asked = _check(indices, values, w_decs, pre_biases, pairs, inverse)
    impl = resolve_impl(impl, w_decs[0])
    recons = {}
    for t, sources in asked.items():
        idx, val, inv = _sources(indices, values, inverse or NO_INVERSE, sources)
        out = Decode.apply(val, w_decs[t], pre_biases[t], idx, *inv, impl)
        recons.update({(t, s): out[i] for i, s in enumerate(sources)})
    return recons


def decode_nmse(
    indices: torch.Tensor,
    values: torch.Tensor,
    w_decs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    xs: list[torch.Tensor],
    pairs: list[tuple[int, int]] | None = None,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Normalised mean squared error of every reconstruction, without keeping any.

    Args:
        xs: T targets [B, d_t], of the weights' dtype.
        indices, values, w_decs, pre_biases, pairs, inverse, impl: as in `decode`.

    Returns: [T, S] in float32 (float64 for float64), entry (t, s) for target t from source s; 0 where `pairs` does not
        ask. Differentiable in values, w_decs, pre_biases and xs. A zero row in a target makes its entries inf or NaN.

    Equivalent to: `((recon[t, s] - xs[t]).square().mean(1) / xs[t].square().mean(1)).mean()`
    """
    T, S, asked = _check(indices, values, w_decs, pre_biases, pairs, inverse)
    check_same_length("w_decs", w_decs=w_decs, xs=xs)
    for t in range(T):
        check_tensor(f"xs[{t}]", xs[t], (values.shape[1], w_decs[t].shape[0]), like=w_decs[0])
    impl = resolve_impl(impl, w_decs[0])
    zero = torch.zeros((), device=values.device, dtype=acc_dtype(w_decs[0].dtype))
    entries = {}
    for t, sources in asked.items():
        idx, val, inv = _sources(indices, values, inverse or NO_INVERSE, sources)
        row = DecodeNMSE.apply(val, w_decs[t], pre_biases[t], xs[t], idx, *inv, impl)
        entries.update({(t, s): row[i] for i, s in enumerate(sources)})
    return torch.stack([torch.stack([entries.get((t, s), zero) for s in range(S)]) for t in range(T)])
