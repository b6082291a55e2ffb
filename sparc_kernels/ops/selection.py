"""Latent selection: the encoder's GEMM with an exact TopK.

One GEMM over the streams' concatenated widths takes the maximum of every g contiguous columns while the tile is in
registers; the selector reads those maxima and only the k best groups' logits (exact: docs/math.md). Where a library
GEMM is faster, it computes the logits and a second pass their maxima.
"""

from __future__ import annotations

from functools import partial

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, allow_tf32, is_host_readable, pad_width
from ..core.recorder import launch
from ..core.registry import register
from ..core.side_stream import SideStream
from ..core.target import interpreted
from ..launch.budgets import SCRATCH_BYTES
from ..launch.device import capability, cdiv, dot_precision
from ..launch.select import (
    CAP_MIN_GROUP,
    MAXIMA_BLOCK,
    candidates_config,
    encode_by_library,
    encode_config,
    rows_per_chunk,
    select_config,
    with_span,
)
from .gather import pick
from .joint import joint


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["row0", "M"])
def _encode_kernel(
    x_ptrs, w_ptrs, widths, strides_x, strides_w, bias_ptrs, ids_ptr, count_ptr, logits_ptr, maxima_ptr,
    coarse_ptr, row0, M, N, NG, NC, stride_ids, stride_count,
    S: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, COMPACT: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """logits[m, n] = sum_s <x_s[row0 + m], w_s[n]> + bias_s[n], and the maxima of each GROUP and each SPAN columns.

    No spans when SPAN == GROUP. COMPACT: column n is latent ids[n], and only the first count[0] columns are valid.
    EACH: no sum; program (tile, s) computes stream s, whose M rows follow those of the streams before.
    """
    stream = tl.program_id(1)
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_band = GROUP_M * tl.cdiv(N, BLOCK_N)  # bands of GROUP_M row tiles: neighbours share w tiles in L2
    first = (pid // per_band) * GROUP_M
    band = tl.minimum(tiles_m - first, GROUP_M)
    pid_m = first + (pid % per_band) % band
    pid_n = (pid % per_band) // band
    n_cols = N
    if COMPACT:
        if EACH:
            ids_ptr += stream.to(tl.int64) * stride_ids
            count_ptr += stream * stride_count
        n_cols = tl.load(count_ptr)
    if pid_n * BLOCK_N < n_cols:
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < M
        mask_n = offs_n < n_cols
        rows = (row0 + tl.where(mask_m, offs_m, 0)).to(tl.int64)
        if COMPACT:
            latents = tl.load(ids_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
        else:
            latents = tl.where(mask_n, offs_n, 0).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for s in tl.static_range(1 if EACH else S):
            if EACH:
                x_rows = pick(x_ptrs, stream, S) + rows[:, None] * pick(strides_x, stream, S)
                w_rows = pick(w_ptrs, stream, S) + latents[None, :] * pick(strides_w, stream, S)
                width = pick(widths, stream, S)
            else:
                x_rows = x_ptrs[s] + rows[:, None] * strides_x[s]
                w_rows = w_ptrs[s] + latents[None, :] * strides_w[s]
                width = widths[s]
            for k0 in range(0, width, BLOCK_K):
                offs_k = k0 + tl.arange(0, BLOCK_K)
                mask_k = offs_k < width
                x = tl.load(x_rows + offs_k[None, :], mask=mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
                w = tl.load(w_rows + offs_k[:, None], mask=mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
                acc = tl.dot(x.to(DTYPE), w.to(DTYPE), acc, input_precision=PRECISION, out_dtype=ACC)
        if EACH:
            bias = tl.load(pick(bias_ptrs, stream, S) + latents, mask=mask_n, other=0.0).to(ACC)
        else:
            bias = tl.load(bias_ptrs[0] + latents, mask=mask_n, other=0.0).to(ACC)
        for s in tl.static_range(1, 1 if EACH else S):
            bias += tl.load(bias_ptrs[s] + latents, mask=mask_n, other=0.0).to(ACC)
        acc += bias[None, :]
        acc = tl.where(mask_n[None, :], acc, float("-inf"))  # after the sum: NaN rows must not leak into the tail
        out_rows = offs_m.to(tl.int64)[:, None]
        if EACH:
            out_rows += stream.to(tl.int64) * M
        groups: tl.constexpr = BLOCK_N // GROUP
        maxima = tl.reduce(tl.reshape(acc, (BLOCK_M, groups, GROUP)), 2, _nan_max)
        offs_g = pid_n * groups + tl.arange(0, groups)
        # rounding is monotone, so the rounded maximum is the maximum of the rounded logits
        tl.store(
            maxima_ptr + out_rows * NG + offs_g[None, :], maxima.to(maxima_ptr.dtype.element_ty),
            mask=mask_m[:, None] & (offs_g[None, :] < NG),
        )  # fmt: skip
        if SPAN > GROUP:
            spans: tl.constexpr = BLOCK_N // SPAN
            coarse = tl.reduce(tl.reshape(maxima, (BLOCK_M, spans, SPAN // GROUP)), 2, _nan_max)
            offs_c = pid_n * spans + tl.arange(0, spans)
            tl.store(
                coarse_ptr + out_rows * NC + offs_c[None, :], coarse.to(coarse_ptr.dtype.element_ty),
                mask=mask_m[:, None] & (offs_c[None, :] < NC),
            )  # fmt: skip
        tl.store(
            logits_ptr + out_rows * N + offs_n[None, :], acc.to(logits_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_n[None, :],
        )  # fmt: skip


@triton.jit
def _row_maxima_kernel(
    logits_ptr, maxima_ptr, coarse_ptr, N, NG, NC, GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    """Maxima as in the epilogue of `_encode_kernel`, for logits from a library GEMM."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    offs_n = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * N + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
    maxima = tl.reduce(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1, _nan_max)
    offs_g = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(maxima_ptr + row * NG + offs_g, maxima.to(maxima_ptr.dtype.element_ty), mask=offs_g < NG)
    if SPAN > GROUP:
        coarse = tl.reduce(tl.reshape(maxima, (BLOCK // SPAN, SPAN // GROUP)), 1, _nan_max)
        offs_c = tile * (BLOCK // SPAN) + tl.arange(0, BLOCK // SPAN)
        tl.store(coarse_ptr + row * NC + offs_c, coarse.to(coarse_ptr.dtype.element_ty), mask=offs_c < NC)


@triton.jit
def _ordered_key(x, SHIFT: tl.constexpr):
    """fp32 -> int32 with the order of the values: -0 equals +0, every NaN ranks above +inf, none is INT_MIN.

    SHIFT drops low bits that are constant in a half-precision type: fewer bisection steps.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF) >> SHIFT


@triton.jit
def _kth_largest(key, low, high, k):
    """Find t in [low, high] with at least k keys >= t and at most k keys > t; at least k keys must be >= low."""
    count = k + 1
    while (low < high) & (count != k):
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # rounded up, cannot overflow
        count = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle - 1)
    return low


@triton.jit
def _take(key, t, k):
    """Take exactly k of the keys >= t, larger ones first, then ties by position; return the mask and their ranks."""
    larger, equal = key > t, key == t
    if key.shape[0] < 32768:  # one scan counts both: the larger ones in the low half, ties in the high half
        counts = tl.cumsum(tl.where(larger, 1, tl.where(equal, 65536, 0)), 0)
        above, ties = counts & 0xFFFF, counts >> 16
    else:  # ties might not fit (N beyond 4 million)
        above, ties = tl.cumsum(larger.to(tl.int32), 0), tl.cumsum(equal.to(tl.int32), 0)
    need = k - tl.sum(larger.to(tl.int32), 0)
    return larger | (equal & (ties <= need)), above + tl.minimum(ties, need) - 1


@triton.jit
def _members(ids_ptr, k_ids, limit, WIDTH: tl.constexpr, K_PAD: tl.constexpr):
    """Positions of the WIDTH members of each of the k_ids groups in ids, and which of them are valid (below limit)."""
    offs = tl.arange(0, K_PAD * WIDTH)
    slot = offs // WIDTH
    exists = slot < k_ids
    position = tl.load(ids_ptr + slot, mask=exists, other=0) * WIDTH + offs % WIDTH
    return position, exists & (position < limit)


@triton.jit
def _narrow(
    ids_ptr, values_ptr, keys_ptr, out_ptr, top, floor, k_ids, k, limit,
    WIDTH: tl.constexpr, K_PAD: tl.constexpr, SHIFT: tl.constexpr, KEEP_KEYS: tl.constexpr,
):  # fmt: skip
    """Select the best k members of the k_ids groups in ids, in ascending order; return the k-th largest key."""
    position, exists = _members(ids_ptr, k_ids, limit, WIDTH, K_PAD)
    value = tl.load(values_ptr + position, mask=exists, other=0.0).to(tl.float32)
    key = tl.where(exists, _ordered_key(value, SHIFT), -2147483648)
    # k groups: their maxima bound the k-th key from below. Fewer groups (few columns) give no bound
    low = tl.where(k_ids == k, floor, tl.min(tl.where(exists, key, top), 0))
    kth = _kth_largest(key, low, top, k)
    take, rank = _take(key, kth, k)
    if KEEP_KEYS:
        tl.store(keys_ptr + rank, key, mask=take)
    tl.debug_barrier()
    again, _ = _members(ids_ptr, k_ids, limit, WIDTH, K_PAD)  # reading again needs fewer registers than keeping
    tl.store(out_ptr + rank, again, mask=take)
    tl.debug_barrier()
    return kth


@triton.jit(do_not_specialize=["row0", "M"])
def _select_kernel(
    coarse_ptr, maxima_ptr, logits_ptr, scratch_ptr, ids_ptr, count_ptr, out_ptr, key_ptr, row0, M, N, NG, NC, K,
    stride_ids, stride_count, EACH: tl.constexpr,
    NC_PAD: tl.constexpr, K_PAD: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SHIFT: tl.constexpr,
    COMPACT: tl.constexpr,
):  # fmt: skip
    """One row: the K groups with the largest maxima (ties to the lower) hold a top K; read only their logits.

    key [M, K], if given, receives the logits of the selected columns, -inf where there are fewer columns than K.
    EACH: program (row, s) is one row of stream s, whose M rows follow those of the streams before.
    """
    row = tl.program_id(0).to(tl.int64)
    if EACH:
        stream = tl.program_id(1).to(tl.int64)
        row += stream * M
        if COMPACT:
            ids_ptr += stream * stride_ids
            count_ptr += stream * stride_count
    LOWEST: tl.constexpr = -2147483648
    n_cols = N
    k = K
    if COMPACT:
        n_cols = tl.load(count_ptr)
        k = tl.minimum(K, n_cols)
    offs_k = tl.arange(0, K_PAD)
    if k > 0:
        scratch_ptr += row * (4 * K_PAD)
        n_spans = tl.cdiv(n_cols, SPAN)
        offs_c = tl.arange(0, NC_PAD)
        mask_c = offs_c < n_spans
        coarse = tl.load(coarse_ptr + row * NC + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        key = tl.where(mask_c, _ordered_key(coarse, SHIFT), LOWEST)
        top = tl.max(key, 0)
        n_taken = tl.minimum(k, n_spans)
        low = tl.min(tl.where(mask_c, key, top), 0)
        if NC_PAD > K_PAD:  # K_PAD disjoint sets: the smallest of their maxima has K_PAD keys at or above it
            low = tl.maximum(low, tl.min(tl.max(tl.reshape(key, (K_PAD, NC_PAD // K_PAD)), 1), 0))
        floor = _kth_largest(key, low, top, n_taken)
        take, rank = _take(key, floor, n_taken)
        tl.store(scratch_ptr + rank, offs_c, mask=take)
        tl.debug_barrier()

        ids = scratch_ptr
        if SPAN > GROUP:  # the same step from spans to their groups
            ids = scratch_ptr + K_PAD
            n_groups = tl.cdiv(n_cols, GROUP)
            n_groups_taken = tl.minimum(k, n_groups)
            floor = _narrow(
                scratch_ptr, maxima_ptr + row * NG, ids, ids, top, floor, n_taken, n_groups_taken, n_groups,
                SPAN // GROUP, K_PAD, SHIFT, False,
            )  # fmt: skip
            n_taken = n_groups_taken
        keys = scratch_ptr + 2 * K_PAD
        cols = scratch_ptr + 3 * K_PAD
        _narrow(
            ids, logits_ptr + row * N, keys, cols, top, floor, n_taken, k, n_cols, GROUP, K_PAD, SHIFT, True
        )  # fmt: skip

        mask_k = offs_k < k
        best = tl.load(keys + offs_k, mask=mask_k, other=LOWEST).to(tl.int64)
        # value, then position: selected columns are in ascending order, so lower slots win ties
        ordered = tl.sort((best << 32) | (0x7FFFFFFF - offs_k).to(tl.int64), descending=True)
        slot = 0x7FFFFFFF - (ordered & 0x7FFFFFFF).to(tl.int32)
        latent = tl.load(cols + slot, mask=mask_k, other=0)
        if key_ptr is not None:
            selected = tl.load(logits_ptr + row * N + latent, mask=mask_k, other=0.0)
            tl.store(key_ptr + (row0 + row) * K + offs_k, selected, mask=mask_k)
        if COMPACT:
            latent = tl.load(ids_ptr + latent, mask=mask_k, other=0)
        tl.store(out_ptr + (row0 + row) * K + offs_k, latent.to(tl.int64), mask=mask_k)
    if COMPACT:  # fewer columns than K: the latents that follow in ids fill the row
        mask_rest = (offs_k >= k) & (offs_k < K)
        rest = tl.load(ids_ptr + offs_k, mask=mask_rest, other=0).to(tl.int64)
        tl.store(out_ptr + (row0 + row) * K + offs_k, rest, mask=mask_rest)
        if key_ptr is not None:
            lowest = tl.full((K_PAD,), float("-inf"), tl.float32).to(key_ptr.dtype.element_ty)
            tl.store(key_ptr + (row0 + row) * K + offs_k, lowest, mask=mask_rest)


def keys_dtype(dtype: torch.dtype, impl: str) -> torch.dtype:
    """Return the dtype in which pre-activations are compared, that of the selection's keys.

    Args:
        dtype: of the inputs.
        impl: "triton" or "torch".
    """
    return torch.float32 if impl == "triton" and dtype == torch.float64 else dtype  # the kernels' keys have 32 bits


_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}  # low bits of a key that are constant


def _select_triton(*, xs, w_encs, biases, k, ids, count, keys):
    out = torch.empty(xs[0].shape[0], k, device=xs[0].device, dtype=torch.int64)
    return _select_into(out, keys, xs, w_encs, biases, k, ids, count, False)


def _select_each_triton(*, xs, w_encs, biases, k, ids, count, keys):
    out, first = _select_each_fake(xs, w_encs, biases, k, ids, count, keys), 0
    (B, _), n, arch = xs[0].shape, w_encs[0].shape[0], capability(xs[0].device)
    while first < len(xs):
        step = selected_at_once(B, n, k, [x.shape[1] for x in xs[first:]], xs[0].dtype, arch, ids is not None)
        part = slice(first, first + step) if step > 1 else first
        some = slice(first, first + step)
        _select_into(
            out[part], None if keys is None else keys[part], xs[some], w_encs[some], biases[some], k,
            None if ids is None else ids[part], None if ids is None else count[part], step > 1,
        )  # fmt: skip
        first += step
    return out


def selected_at_once(B, n, k, widths, dtype, arch, compact) -> int:
    """How many streams may be selected by one launch: all of their rows at once, by one kernel, within the scratch."""
    _, encode, _, row_bytes, tiles = selection_settings(B, n, k, dtype, arch, compact)
    if rows_per_chunk(B, row_bytes, encode.block_m, tiles) != (B, 1):
        return 1
    tf32 = dtype == torch.float32 and allow_tf32()
    for s, d in enumerate(widths):
        library = not compact and encode_by_library(B, d, dtype.itemsize, tf32)
        if library or (s + 1) * B * row_bytes > SCRATCH_BYTES:
            return max(s, 1)
    return len(widths)


def selection_settings(B, n, k, dtype, arch, compact):
    """Settings of selector and GEMM, the dtype of the logits, scratch bytes of a row, tiles that may overlap."""
    stored = keys_dtype(dtype, "triton")
    select = select_config(n, k, compact)
    encode = with_span(encode_config(B, dtype.itemsize, arch, compact), select.span)
    columns = n + cdiv(n, select.group) + (0 if select.span == select.group else cdiv(n, select.span))
    # no overlap with a compact GEMM, most of whose columns may be invalid
    tiles = cdiv(B, encode.block_m) * cdiv(n, encode.block_n) if not compact and select.small else 0
    return select, encode, stored, columns * stored.itemsize + 16 * select.k_pad, tiles


def _select_into(out, keys, xs, w_encs, biases, k, ids, count, each):
    """Run `select` into out and keys [B, k], or with `each` `select_each` into [S, B, k], all rows at once."""
    B, n = xs[0].shape[0], w_encs[0].shape[0]
    device, dtype = xs[0].device, xs[0].dtype
    biases = [b.contiguous() for b in biases]
    acc = acc_dtype(dtype)
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    w_encs = [w if w.stride(1) == 1 else w.contiguous() for w in w_encs]
    arch = capability(device)
    select, encode, stored, row_bytes, tiles = selection_settings(B, n, k, dtype, arch, ids is not None)
    block_n = encode.block_n
    n_groups, n_spans = cdiv(n, select.group), cdiv(n, select.span)
    two_levels = select.span == select.group
    chunk, buffers = rows_per_chunk(B, row_bytes, encode.block_m, tiles)
    problems = len(xs) if each else 1
    strides = (ids.stride(0), count.stride(0)) if each and ids is not None else (0, 0)

    def buffer():
        maxima = torch.empty(problems * chunk, n_groups, device=device, dtype=stored)
        return (
            torch.empty(problems * chunk, n, device=device, dtype=stored), maxima,
            maxima if two_levels else torch.empty(problems * chunk, n_spans, device=device, dtype=stored),
            torch.empty(problems * chunk, 4 * select.k_pad, device=device, dtype=torch.int32),
        )  # fmt: skip

    scratch = [buffer() for _ in range(buffers)]
    half = dtype in (torch.bfloat16, torch.float16)
    tf32 = dtype == torch.float32 and allow_tf32()
    precision = "ieee" if dtype != torch.float32 else dot_precision(arch, tf32)
    wide_x = wide_w = None
    if ids is None and not each and encode_by_library(B, sum(x.shape[1] for x in xs), dtype.itemsize, tf32):
        wide_x, wide_w = joint(xs), joint(w_encs)
    side, done = SideStream(device, enabled=buffers > 1), list[torch.cuda.Event | None]()
    limit = encode.registers(arch) if buffers > 1 and select.group >= CAP_MIN_GROUP else {}
    for i, row0 in enumerate(range(0, B, chunk)):
        rows = min(chunk, B - row0)
        logits, maxima, coarse, slots = scratch[i % buffers]
        if i >= buffers:
            side.wait(done[i - buffers])  # until the selector has read this buffer
        if wide_x is not None and wide_w is not None:
            wide_logits = torch.addmm(
                _sum(biases).to(dtype), wide_x[row0 : row0 + rows], wide_w.t(), **_out(logits[:rows], dtype)
            )
            if dtype != stored:
                logits[:rows].copy_(wide_logits)
            block = max(MAXIMA_BLOCK, select.span)
            launch(_row_maxima_kernel, (rows, cdiv(n, block)))(
                logits, maxima, coarse, n, n_groups, n_spans, GROUP=select.group, SPAN=select.span, BLOCK=block,
                num_warps=4,
            )  # fmt: skip
        else:
            launch(_encode_kernel, (cdiv(rows, encode.block_m) * cdiv(n, block_n), problems))(
                tuple(xs), tuple(w_encs), tuple(x.shape[1] for x in xs), tuple(x.stride(0) for x in xs),
                tuple(w.stride(0) for w in w_encs), tuple(biases), ids, count, logits, maxima, coarse,
                row0, rows, n, n_groups, n_spans, *strides, S=len(xs), EACH=each, GROUP=select.group, SPAN=select.span,
                BLOCK_M=encode.block_m, BLOCK_N=block_n, BLOCK_K=encode.block_k,
                GROUP_M=encode.group_m, COMPACT=ids is not None,
                DTYPE=tl.float32 if half and interpreted() else tl_dtype(dtype), ACC=tl_dtype(acc), PRECISION=precision,
                num_warps=encode.num_warps, num_stages=encode.num_stages, **limit,
            )  # fmt: skip

        def best(*, rows=rows, row0=row0, coarse=coarse, maxima=maxima, logits=logits, slots=slots):
            launch(_select_kernel, (rows, problems))(
                coarse, maxima, logits, slots, ids, count, out, keys, row0, rows, n, n_groups, n_spans, k, *strides,
                EACH=each, NC_PAD=select.n_spans_pad, K_PAD=select.k_pad, GROUP=select.group, SPAN=select.span,
                SHIFT=_SHIFTS.get(stored, 0), COMPACT=ids is not None, num_warps=select.num_warps,
                **select.registers(arch),
            )  # fmt: skip

        done.append(side.run(best)[1])
    side.join()
    return out


def _sum(biases):
    """Sum the biases in the accumulator dtype, in the streams' order: [N]."""
    total = biases[0].to(acc_dtype(biases[0].dtype))
    for bias in biases[1:]:
        total = total + bias
    return total


def _out(logits, dtype):
    """Output argument of the library GEMM; none for float64, whose logits are stored as float32."""
    return {"out": logits} if logits.dtype == dtype else {}


def _topk_exact(h, k):
    """Top k of each row, descending, ties to the lowest column, NaN first; on a CPU at the cost of topk."""
    if not is_host_readable(h):
        return torch.sort(h, dim=1, descending=True, stable=True).indices[:, :k]
    values, indices = h.topk(min(k + 1, h.shape[1]), dim=1)  # one more than k shows ties at the border
    above = values[:, :-1] > values[:, 1:]
    indices = indices[:, :k]
    if bool(above.all()):
        return indices
    indices = indices.sort(dim=1).values
    values = h.gather(1, indices)
    indices = indices.gather(1, values.sort(dim=1, descending=True, stable=True).indices)
    # rows where ties cross the k-th value, or NaN hides it, take the stable sort
    if k < h.shape[1] and not bool(above[:, k - 1].all()):
        rows = (~above[:, k - 1]).nonzero().squeeze(1)
        indices[rows] = torch.sort(h[rows], dim=1, descending=True, stable=True).indices[:, :k]
    return indices


def _select_torch(*, xs, w_encs, biases, k, ids, count, keys):
    bias = _sum(biases)
    acc = acc_dtype(xs[0].dtype)
    B, n = xs[0].shape[0], w_encs[0].shape[0]
    out = torch.empty(B, k, dtype=torch.int64, device=xs[0].device)
    n_valid, order = k, None
    on_host = is_host_readable(out)
    if ids is not None and not on_host:  # all columns compete; invalid ones rank last
        order = ids.long()
        w_encs, bias = [w[order] for w in w_encs], bias[order]
    elif ids is not None:
        n = int(count)
        n_valid = min(k, n)
        out[:, n_valid:] = ids[n_valid:k]
        if keys is not None:
            keys[:, n_valid:] = float("-inf")
        if n_valid == 0:
            return out
        order = ids[:n].long()
        w_encs, bias = [w[order] for w in w_encs], bias[order]
    xs, w_encs = [pad_width(x) for x in xs], [pad_width(w) for w in w_encs]
    chunk = max(1, SCRATCH_BYTES // (n * acc.itemsize))
    for row0 in range(0, B, chunk):
        part = slice(row0, row0 + chunk)
        h = bias.to(acc).repeat(min(chunk, B - row0), 1)  # a copy even for one row: it is written to
        for x, w in zip(xs, w_encs, strict=True):
            if x.dtype == acc:
                h.addmm_(x[part], w.T)
            else:
                h += x[part] @ w.T
        h = h.to(xs[0].dtype)  # half precision is compared as the kernels store it
        if order is None or on_host:
            best = _topk_exact(h, n_valid)
        else:  # two stable sorts: -inf in a valid column still comes before any invalid column
            beyond = torch.arange(n, device=h.device) >= count
            h.masked_fill_(beyond, float("-inf"))
            ranks = torch.sort(h, dim=1, descending=True, stable=True).indices
            best = ranks.gather(1, torch.sort(beyond[ranks].int(), dim=1, stable=True).indices[:, :k])
        if keys is not None:
            keys[part, :n_valid] = h.gather(1, best)
        out[part, :n_valid] = best if order is None else order[best]
    return out


def _select_fake(*, xs, w_encs, biases, k, ids, count, keys):
    return xs[0].new_empty(xs[0].shape[0], k, dtype=torch.int64)


select = register(
    "select",
    "(Tensor[] xs, Tensor[] w_encs, Tensor[] biases, int k, Tensor? ids, Tensor? count, str impl) -> Tensor",
    torch_impl=partial(_select_torch, keys=None),
    triton_impl=partial(_select_triton, keys=None),
    fake=partial(_select_fake, keys=None),
)
select.__doc__ = """Select the k latents with the largest summed pre-activations of each row.

Args:
    xs: centred inputs, [B, d_s] each.
    w_encs: [N, d_s] each.
    biases: latent biases, [N] each.
    k: how many latents per row.
    ids: int32 [N]; if given, only the latents ids[:count] compete, and if they are fewer than k the rows end with
        ids[count:k].
    count: int32 [], with ids; stays on the device.
    impl: "triton" or "torch".

Returns:
    int64 [B, k], rows in descending order of the pre-activation compared, ties to the lowest latent, NaN above +inf.
"""

select_keys = register(
    "select_keys",
    "(Tensor[] xs, Tensor[] w_encs, Tensor[] biases, int k, Tensor? ids, Tensor? count, Tensor(a!) keys, str impl)"
    " -> Tensor",
    torch_impl=_select_torch,
    triton_impl=_select_triton,
    fake=_select_fake,
)
select_keys.__doc__ = """Run `select`, which inductor compiles because it changes nothing, and write its keys too.

Args:
    xs: as of `select`.
    w_encs: as of `select`.
    biases: as of `select`.
    k: as of `select`.
    ids: as of `select`.
    count: as of `select`.
    keys: contiguous [B, k] of `keys_dtype`, receives the pre-activations compared, -inf in columns from count on.
    impl: "triton" or "torch".

Returns:
    As of `select`.
"""


def _select_each_torch(*, xs, w_encs, biases, k, ids, count, keys):
    none = [None] * len(xs)
    some = zip(*(none if part is None else part for part in (ids, count, keys)), strict=True)
    streams = zip(xs, w_encs, biases, some, strict=True)
    return torch.stack([
        _select_torch(xs=[x], w_encs=[w], biases=[bias], k=k, ids=i, count=n, keys=own)
        for x, w, bias, (i, n, own) in streams
    ])  # fmt: skip


def _select_each_fake(xs, w_encs, biases, k, ids, count, keys):
    return xs[0].new_empty(len(xs), xs[0].shape[0], k, dtype=torch.int64)


select_each = register(
    "select_each",
    "(Tensor[] xs, Tensor[] w_encs, Tensor[] biases, int k, Tensor? ids, Tensor? count, str impl) -> Tensor",
    torch_impl=partial(_select_each_torch, keys=None),
    triton_impl=partial(_select_each_triton, keys=None),
    fake=partial(_select_each_fake, keys=None),
)
select_each.__doc__ = """Run `select` for every stream by itself.

Args:
    xs: centred inputs, [B, d_s] each.
    w_encs: [N, d_s] each.
    biases: latent biases, [N] each.
    k: how many latents per row and stream.
    ids: int32 [S, N] or None, row s as in `select`.
    count: int32 [S], with ids.
    impl: "triton" or "torch".

Returns:
    int64 [S, B, k].
"""

select_each_keys = register(
    "select_each_keys",
    "(Tensor[] xs, Tensor[] w_encs, Tensor[] biases, int k, Tensor? ids, Tensor? count, Tensor(a!) keys, str impl)"
    " -> Tensor",
    torch_impl=_select_each_torch,
    triton_impl=_select_each_triton,
    fake=_select_each_fake,
)
select_each_keys.__doc__ = """Run `select_each` and write its keys.

Args:
    xs: as of `select_each`.
    w_encs: as of `select_each`.
    biases: as of `select_each`.
    k: as of `select_each`.
    ids: as of `select_each`.
    count: as of `select_each`.
    keys: contiguous [S, B, k], as of `select_keys`.
    impl: "triton" or "torch".

Returns:
    As of `select_each`.
"""


def _topk_positions_triton(keys, k):
    (B, n), device, arch = keys.shape, keys.device, capability(keys.device)
    keys, out = keys.contiguous(), torch.empty(B, k, device=keys.device, dtype=torch.int64)
    config = candidates_config(n, k)
    n_groups, n_spans = cdiv(n, config.group), cdiv(n, config.span)
    row_bytes = ((n_groups if config.group > 1 else 0) + (n_spans if config.span > config.group else 0)) * keys.itemsize
    chunk = min(B, max(1, SCRATCH_BYTES // (row_bytes + 16 * config.k_pad)))
    slots = torch.empty(chunk, 4 * config.k_pad, device=device, dtype=torch.int32)
    maxima = coarse = None
    if config.group > 1:
        coarse = maxima = torch.empty(chunk, n_groups, device=device, dtype=keys.dtype)
    if config.span > config.group:
        coarse = torch.empty(chunk, n_spans, device=device, dtype=keys.dtype)
    for row0 in range(0, B, chunk):
        part = keys[row0 : row0 + chunk]
        if maxima is None:  # each key is the maximum of its group
            best = part, part
        else:
            best, block = (coarse, maxima), max(MAXIMA_BLOCK, config.span)
            launch(_row_maxima_kernel, (len(part), cdiv(n, block)))(
                part, maxima, coarse, n, n_groups, n_spans, GROUP=config.group, SPAN=config.span, BLOCK=block,
                num_warps=4,
            )  # fmt: skip
        launch(_select_kernel, (len(part), 1))(
            *best, part, slots, None, None, out, None, row0, len(part), n, n_groups, n_spans, k, 0, 0, EACH=False,
            NC_PAD=config.n_spans_pad, K_PAD=config.k_pad, GROUP=config.group, SPAN=config.span,
            SHIFT=_SHIFTS.get(keys.dtype, 0), COMPACT=False, num_warps=config.num_warps, **config.registers(arch),
        )  # fmt: skip
    return out


topk_positions = register(
    "topk_positions",
    "(Tensor keys, int k, str impl) -> Tensor",
    torch_impl=lambda keys, k: _topk_exact(keys, k).contiguous(),
    triton_impl=_topk_positions_triton,
    fake=lambda keys, k: keys.new_empty(len(keys), k, dtype=torch.int64),
)
topk_positions.__doc__ = """Find the k largest keys of each row: merges the candidates of several shards.

Of candidates in the order of the shards' ids, each shard's in its own order, ties go to the lowest id, as in one
selection over all latents.

Args:
    keys: [B, M] as `select` wrote them; float64 with impl="torch" only.
    k: how many, at most M and 512.
    impl: "triton" or "torch".

Returns:
    int64 [B, k], positions in descending order of the keys, ties to the lowest, NaN above +inf.
"""
