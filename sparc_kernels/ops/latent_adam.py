"""Adam step from the inverse index: dense gradients of the weights are never stored.

A latent's gradient is a weighted sum over its list of rows (`latent_reduce.py`), and its Adam step is independent of
other latents. So one program sums a latent's list, in the order of the dense form, and takes the step with the sum in
registers: weights and moments are read and written once. Latents with empty lists take the same step with a gradient
of 0: their moments decay and their weights move by momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import csr, is_host_readable
from ..core.recorder import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.adam import ADAM_WIDTH, adam_rows, latent_adam_config, latent_adam_streams
from ..launch.device import capability, cdiv
from ..launch.reduce import reduce_chunk, reduce_config
from .adam import PLAIN, AdamHyper, alike, step, step_blocks_torch, step_torch, tuples
from .gather import pick
from .inverse_index import InverseIndex
from .latent_reduce import by_product, listed_torch, lists_torch, sum_entries
from .records import WeightedLists
from .step_scalars import StepScalars


@triton.jit
def _list_parts_kernel(
    order_ptrs, offsets_ptrs, ids_ptrs, coef_ptrs, scale_ptrs, gate_ptrs, mat_ptrs, part_ptr, part_sum_ptr,
    widths, strides_ms, strides_mr, M, ROWS, K, N, slots, stride_part, T: tl.constexpr,
    S: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of a list longer than CHUNK.

    In a block of CHUNK places at most one such list begins, which then owns the block's last place, and at most one
    later chunk begins, whose list owns the block's first place. Program 2 q takes the former of block q, 2 q + 1 the
    latter. Program axis 2: the stream.
    """
    slot = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(2)
    first = (slot // 2).to(tl.int32) * CHUNK
    later = slot % 2 == 1
    offsets_ptr = pick(offsets_ptrs, stream, T)
    n = tl.load(pick(ids_ptrs, stream, T) + tl.where(later, first, tl.minimum(first + CHUNK, M) - 1))
    if (n >= 0) & (n < N):
        begin = tl.load(offsets_ptr + n)
        end = tl.load(offsets_ptr + n + 1)
        low = tl.where(later, begin + tl.cdiv(first - begin, CHUNK) * CHUNK, begin)
        here = tl.where(later, first > begin, begin >= first) & (low < tl.minimum(end, first + CHUNK))
        if here & (end - begin > CHUNK):
            cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = cols < pick(widths, stream, T)
            scale_ptr = None
            if scale_ptrs is not None:
                scale_ptr = pick(scale_ptrs, stream, T)
            gate_ptr = None
            if gate_ptrs is not None:
                gate_ptr = pick(gate_ptrs, stream, T)
            acc, total = sum_entries(
                pick(order_ptrs, stream, T), pick(coef_ptrs, stream, T), scale_ptr, gate_ptr,
                pick(mat_ptrs, stream, T), low, tl.minimum(low + CHUNK, end), cols, mask_d, M, ROWS, K,
                pick(strides_ms, stream, T), pick(strides_mr, stream, T), S, BLOCK_E, BLOCK_D, ACC,
            )  # fmt: skip
            out = tl.full((), stream, tl.int64) * slots + slot
            tl.store(part_ptr + out * stride_part + cols, acc, mask=mask_d)
            if tl.program_id(1) == 0:
                tl.store(part_sum_ptr + out, tl.sum(total, 0))


@triton.jit
def _add_list(
    acc, total, n, order_ptr, offsets_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, part_ptr, part_sum_ptr, cols,
    mask_d, M, ROWS, K, stride_ms, stride_mr, stride_part,
    S: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the sums of latent n's list to acc [BLOCK_D] and total []."""
    begin = tl.load(offsets_ptr + n)
    end = tl.load(offsets_ptr + n + 1)
    if end - begin <= CHUNK:
        rows, weights = sum_entries(
            order_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, begin, end, cols, mask_d,
            M, ROWS, K, stride_ms, stride_mr, S, BLOCK_E, BLOCK_D, ACC,
        )  # fmt: skip
        acc += rows
        total += tl.sum(weights, 0)
    else:
        for c in range(tl.cdiv(end - begin, CHUNK)):
            slot = 2 * (begin // CHUNK + c).to(tl.int64)
            if c > 0:
                slot += 1
            acc += tl.load(part_ptr + slot * stride_part + cols, mask=mask_d, other=0.0)
            total += tl.load(part_sum_ptr + slot)
    return acc, total


@triton.jit
def _latent_adam_kernel(
    w_ptrs, m_ptrs, v_ptrs, shadow_ptrs, bias_ptrs, bias_m_ptrs, bias_v_ptrs, scalars_ptrs, dpre_bias_ptr,
    order_ptrs, offsets_ptrs, coef_ptrs, scale_ptrs, gate_ptrs, mat_ptrs, part_ptr, part_sum_ptr,
    strides_ms, strides_mr, M, ROWS, K, slots,
    aux_order_ptrs, aux_offsets_ptrs, aux_coef_ptrs, aux_scale_ptrs, aux_gate_ptrs, aux_mat_ptrs, aux_part_ptr,
    aux_part_sum_ptr, aux_strides_ms, aux_strides_mr, AUX_M, AUX_ROWS, AUX_K, aux_slots,
    widths, strides_sn, N, stride_part, T: tl.constexpr, PLACE: tl.constexpr, LATENTS: tl.constexpr, S: tl.constexpr,
    AUX_S: tl.constexpr, CHUNK: tl.constexpr, AUX_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, EPS: tl.constexpr, EARLY: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sum the lists of LATENTS latents of one stream and update their rows and, if given, their biases.

    BLOCK_D columns, the whole row if it is normalised. dpre_bias_ptr [T, programs, stride_part], if given, receives the
    sum of (a latent's bias gradient) * (its row before the step). PLACE: of the matrix among the stream's parameters.
    """
    stream = tl.program_id(2)
    D = pick(widths, stream, T)
    scalars_ptr = pick(scalars_ptrs, stream, T) + PLACE * 5
    w_ptr = pick(w_ptrs, stream, T)
    m_ptr = pick(m_ptrs, stream, T)
    v_ptr = pick(v_ptrs, stream, T)
    if shadow_ptrs is not None:
        shadow_ptr = pick(shadow_ptrs, stream, T)
        stride_sn = pick(strides_sn, stream, T)
    if bias_ptrs is not None:
        bias_ptr = pick(bias_ptrs, stream, T)
        bias_m_ptr = pick(bias_m_ptrs, stream, T)
        bias_v_ptr = pick(bias_v_ptrs, stream, T)
        bias_scalars_ptr = scalars_ptr + 15
    order_ptr = pick(order_ptrs, stream, T)
    offsets_ptr = pick(offsets_ptrs, stream, T)
    coef_ptr = pick(coef_ptrs, stream, T)
    scale_ptr = None
    if scale_ptrs is not None:
        scale_ptr = pick(scale_ptrs, stream, T)
    gate_ptr = None
    if gate_ptrs is not None:
        gate_ptr = pick(gate_ptrs, stream, T)
    mat_ptr = pick(mat_ptrs, stream, T)
    stride_ms = pick(strides_ms, stream, T)
    stride_mr = pick(strides_mr, stream, T)
    first_slot = tl.full((), stream, tl.int64) * slots
    part_ptr += first_slot * stride_part
    part_sum_ptr += first_slot
    if aux_order_ptrs is not None:
        aux_order_ptr = pick(aux_order_ptrs, stream, T)
        aux_offsets_ptr = pick(aux_offsets_ptrs, stream, T)
        aux_coef_ptr = pick(aux_coef_ptrs, stream, T)
        aux_scale_ptr = None
        if aux_scale_ptrs is not None:
            aux_scale_ptr = pick(aux_scale_ptrs, stream, T)
        aux_gate_ptr = None
        if aux_gate_ptrs is not None:
            aux_gate_ptr = pick(aux_gate_ptrs, stream, T)
        aux_mat_ptr = pick(aux_mat_ptrs, stream, T)
        aux_stride_ms = pick(aux_strides_ms, stream, T)
        aux_stride_mr = pick(aux_strides_mr, stream, T)
        first_aux_slot = tl.full((), stream, tl.int64) * aux_slots
        aux_part_ptr += first_aux_slot * stride_part
        aux_part_sum_ptr += first_aux_slot
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = cols < D
    dpre_bias_sum = tl.zeros((BLOCK_D,), ACC)
    first = tl.program_id(0) * LATENTS
    for n in range(first, tl.minimum(first + LATENTS, N)):
        if tl.load(scalars_ptr + 4) != 0.0:
            at = tl.full((), n, tl.int64) * D + cols
            w = tl.load(w_ptr + at, mask=mask_d, other=0.0).to(ACC)
            if EARLY:  # in flight while the list is summed
                m = tl.load(m_ptr + at, mask=mask_d, other=0.0)
                v = tl.load(v_ptr + at, mask=mask_d, other=0.0)
            g, total = _add_list(
                tl.zeros((BLOCK_D,), ACC), tl.zeros((), ACC), n, order_ptr, offsets_ptr, coef_ptr, scale_ptr, gate_ptr,
                mat_ptr, part_ptr, part_sum_ptr, cols, mask_d, M, ROWS, K, stride_ms, stride_mr, stride_part, S, CHUNK,
                BLOCK_E, BLOCK_D, ACC,
            )  # fmt: skip
            if aux_order_ptrs is not None:
                g, total = _add_list(
                    g, total, n, aux_order_ptr, aux_offsets_ptr, aux_coef_ptr, aux_scale_ptr, aux_gate_ptr, aux_mat_ptr,
                    aux_part_ptr, aux_part_sum_ptr, cols, mask_d, AUX_M, AUX_ROWS, AUX_K, aux_stride_ms, aux_stride_mr,
                    stride_part, AUX_S, AUX_CHUNK, BLOCK_E, BLOCK_D, ACC,
                )  # fmt: skip
            if not EARLY:
                m = tl.load(m_ptr + at, mask=mask_d, other=0.0)
                v = tl.load(v_ptr + at, mask=mask_d, other=0.0)
            if dpre_bias_ptr is not None:
                dpre_bias_sum += total * w
            scale = tl.load(scalars_ptr + 3).to(ACC)
            w, m, v = step(w, g * scale, m, v, mask_d, scalars_ptr, NORMALIZE, BETA1, BETA2, EPS, ACC)
            tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask_d)
            tl.store(m_ptr + at, m, mask=mask_d)
            tl.store(v_ptr + at, v, mask=mask_d)
            if shadow_ptrs is not None:
                out = shadow_ptr + tl.full((), n, tl.int64) * stride_sn + cols
                tl.store(out, w.to(shadow_ptr.dtype.element_ty), mask=mask_d)
            if bias_ptrs is not None:
                if tl.program_id(1) == 0:
                    one = n + tl.arange(0, 1)
                    b = tl.load(bias_ptr + one).to(ACC)
                    g_bias = tl.zeros((1,), ACC) + total * tl.load(bias_scalars_ptr + 3).to(ACC)
                    b, b_m, b_v = step(
                        b, g_bias, tl.load(bias_m_ptr + one), tl.load(bias_v_ptr + one), one >= 0, bias_scalars_ptr, 0,
                        BETA1, BETA2, EPS, ACC,
                    )  # fmt: skip
                    tl.store(bias_ptr + one, b.to(bias_ptr.dtype.element_ty))
                    tl.store(bias_m_ptr + one, b_m)
                    tl.store(bias_v_ptr + one, b_v)
    if dpre_bias_ptr is not None:
        program = tl.full((), stream, tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(dpre_bias_ptr + program * stride_part + cols, dpre_bias_sum, mask=mask_d)


BLOCK_ROWS = tl.constexpr(16)  # sums of 16 rows, of 16 such sums, and so on: as torch sums columns on a CPU


@triton.jit
def _pre_bias_parts_kernel(
    dpre_bias_ptr, part_ptr, widths, P, stride_part, T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """part[t, q] = sum of the rows 16 q .. 16 q + 15 of dpre_bias[t]."""
    stream = tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < pick(widths, stream, T)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = (tl.full((), stream, tl.int64) * P + rows)[:, None] * stride_part + cols[None, :]
    total = tl.sum(tl.load(dpre_bias_ptr + at, mask=(rows < P)[:, None] & mask[None, :], other=0.0), 0)
    out = tl.full((), stream, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_ptr + out * stride_part + cols, total, mask=mask)


@triton.jit
def _pre_bias_adam_kernel(
    pre_ptrs, m_ptrs, v_ptrs, scalars_ptrs, dbias_ptrs, sum_ptrs, part_ptr, widths, parts, whole_parts, stride_part,
    T: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Update the pre-bias, whose gradient is the decoder's less the sum of the parts; or only write that sum."""
    stream = tl.program_id(1)
    scalars_ptr = pick(scalars_ptrs, stream, T) + 10
    if (sum_ptrs is not None) | (tl.load(scalars_ptr + 4) != 0.0):
        cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = cols < pick(widths, stream, T)
        part_ptr += tl.full((), stream, tl.int64) * parts * stride_part
        # the part of fewer than 16 rows, then fewer than 16 parts, then sums of 16 parts
        last = mask & (tl.zeros_like(cols) + whole_parts < parts)
        total = tl.load(part_ptr + tl.full((), whole_parts, tl.int64) * stride_part + cols, mask=last, other=0.0)
        rest = tl.zeros((BLOCK_D,), ACC)
        sums = tl.zeros((BLOCK_D,), ACC)
        for q in range(0, whole_parts, BLOCK_ROWS):
            rows = q + tl.arange(0, BLOCK_ROWS)
            at = rows[:, None].to(tl.int64) * stride_part + cols[None, :]
            block = tl.sum(tl.load(part_ptr + at, mask=(rows < whole_parts)[:, None] & mask[None, :], other=0.0), 0)
            if q + BLOCK_ROWS <= whole_parts:
                sums += block
            else:
                rest += block
        total = total + rest + sums
        if sum_ptrs is not None:
            tl.store(pick(sum_ptrs, stream, T) + cols, total, mask=mask)
        else:
            g = tl.load(pick(dbias_ptrs, stream, T) + cols, mask=mask, other=0.0).to(ACC) - total
            pre_ptr = pick(pre_ptrs, stream, T)
            m_ptr = pick(m_ptrs, stream, T)
            v_ptr = pick(v_ptrs, stream, T)
            w = tl.load(pre_ptr + cols, mask=mask, other=0.0).to(ACC)
            m = tl.load(m_ptr + cols, mask=mask, other=0.0)
            v = tl.load(v_ptr + cols, mask=mask, other=0.0)
            g *= tl.load(scalars_ptr + 3).to(ACC)
            w, m, v = step(w, g, m, v, mask, scalars_ptr, 0, BETA1, BETA2, EPS, ACC)
            tl.store(pre_ptr + cols, w.to(pre_ptr.dtype.element_ty), mask=mask)
            tl.store(m_ptr + cols, m, mask=mask)
            tl.store(v_ptr + cols, v, mask=mask)


class _Matrix(NamedTuple):
    """One weight matrix of one stream, and what its update reads and writes."""

    params: list[torch.Tensor]  # the stream's four
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    shadow: torch.Tensor | None
    scalars: torch.Tensor  # [4, 5]
    dbias: torch.Tensor  # [d]
    dbias_sum: torch.Tensor | None  # [d], receives what the encoder adds to the gradient of the pre-bias
    lists: list[torch.Tensor | None]  # the tensors of a WeightedLists
    aux: list[torch.Tensor | None]  # of AuxK, or empty


def _matrices(place, params, exp_avgs, exp_avg_sqs, shadows, scalars, dbiases, dbias_sums, lists, aux):
    """The encoder (place 0) or the decoder (place 1) of every stream."""
    return [
        _Matrix(
            params=params[4 * s : 4 * s + 4], exp_avgs=exp_avgs[4 * s : 4 * s + 4],
            exp_avg_sqs=exp_avg_sqs[4 * s : 4 * s + 4], shadow=shadows[2 * s + place] if shadows else None,
            scalars=scalars[4 * s : 4 * s + 4], dbias=dbias, dbias_sum=dbias_sums[s] if dbias_sums else None,
            lists=lists[7 * s : 7 * s + 7], aux=aux[7 * s : 7 * s + 7],
        )
        for s, dbias in enumerate(dbiases)
    ]  # fmt: skip


def _parts(lists, k, widths, n, acc):
    """Sum the chunks of long lists; return the kernel's arguments for one set of lists, its sources and its chunk."""
    order, offsets, ids, coef, scale, gate, mat = tuples(lists)
    coef, scale, gate = (None if of is None else tuple(t.contiguous() for t in of) for of in (coef, scale, gate))
    mat = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in mat)
    T, d, M, (S, rows, _) = len(mat), widths[0], order[0].numel(), mat[0].shape
    config, chunk = reduce_config(d, 80, S), reduce_chunk(M, d)
    slots = 2 * cdiv(M, chunk)
    part = torch.empty(T, slots, d, device=mat[0].device, dtype=acc)
    part_sum = torch.empty(T, slots, device=mat[0].device, dtype=acc)
    strides = tuple(t.stride(0) for t in mat), tuple(t.stride(1) for t in mat)
    launch(_list_parts_kernel, (slots, cdiv(d, config.block_d), T))(
        order, offsets, ids, coef, scale, gate, mat, part, part_sum, widths, *strides, M, rows, k, n, slots, d,
        T=T, S=S, CHUNK=chunk, BLOCK_E=config.block_e, BLOCK_D=config.block_d, ACC=tl_dtype(acc),
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    return (order, offsets, coef, scale, gate, mat, part, part_sum, *strides, M, rows, k, slots), S, chunk


_NO_LISTS = (None,) * 10 + (0,) * 4


def _launch_update(matrices, place, k, aux_k, hyper):
    """Update the encoders or the decoders of one group of streams, the widest first."""
    params, exp_avgs, exp_avg_sqs, shadow, scalars, dbias, dbias_sum, lists, aux = tuples(matrices)
    w, m, v = (tuple(four[place] for four in of) for of in (params, exp_avgs, exp_avg_sqs))
    T, widths, device, acc = len(matrices), tuple(t.shape[1] for t in w), w[0].device, m[0].dtype
    n, d = w[0].shape
    main, S, chunk = _parts(lists, k, widths, n, acc)
    other, aux_S, aux_chunk = _parts(aux, aux_k, widths, n, acc) if aux[0] else (_NO_LISTS, 1, 1)
    encoder = place == 0
    latents = adam_rows(n) if encoder else 1
    config, programs = latent_adam_config(d, capability(device), hyper.normalize == PLAIN), cdiv(n, latents)
    biases: tuple = (None,) * 3
    dpre_bias = None
    if encoder:
        biases = tuple(tuple(four[3] for four in of) for of in (params, exp_avgs, exp_avg_sqs))
        dpre_bias = torch.empty(T, programs, d, device=device, dtype=acc)
    betas = dict(BETA1=hyper.beta1, BETA2=hyper.beta2, EPS=hyper.eps)
    launch(_latent_adam_kernel, (programs, cdiv(d, config.block_d), T))(
        w, m, v, shadow, *biases, scalars, dpre_bias, *main, *other, widths,
        None if shadow is None else tuple(t.stride(0) for t in shadow), n, d, T=T, PLACE=place, LATENTS=latents, S=S,
        AUX_S=aux_S, CHUNK=chunk, AUX_CHUNK=aux_chunk, NORMALIZE=hyper.normalize, **betas, EARLY=config.early,
        BLOCK_E=config.block_e, BLOCK_D=config.block_d, ACC=tl_dtype(acc), num_warps=config.num_warps, num_stages=1,
        **config.registers(capability(device)),
    )  # fmt: skip
    if encoder:
        parts, block = cdiv(programs, BLOCK_ROWS.value), 32 if interpreted() else 128
        part = torch.empty(T, parts, d, device=device, dtype=acc)
        launch(_pre_bias_parts_kernel, (parts, cdiv(d, block), T))(
            dpre_bias, part, widths, programs, d, T=T, BLOCK_D=block, num_warps=4
        )
        pre_bias = (tuple(four[2] for four in of) for of in (params, exp_avgs, exp_avg_sqs))
        launch(_pre_bias_adam_kernel, (cdiv(d, block), T))(
            *pre_bias, scalars, dbias, dbias_sum, part, widths, parts, programs // BLOCK_ROWS.value, d, T=T, **betas,
            BLOCK_D=block, ACC=tl_dtype(acc), num_warps=4,
        )  # fmt: skip


def _latent_adam_triton(
    *, params, exp_avgs, exp_avg_sqs, shadows, scalars, dbiases, dbias_sums, enc_lists, dec_lists, k, enc_aux, dec_aux,
    aux_k, normalize, beta1, beta2, eps,
):  # fmt: skip
    hyper = AdamHyper(normalize, beta1, beta2, eps)
    shared = params, exp_avgs, exp_avg_sqs, shadows, scalars, dbiases, dbias_sums
    for place, lists, aux, own in ((1, dec_lists, dec_aux, hyper), (0, enc_lists, enc_aux, hyper.plain())):

        def key(matrix, place=place):
            d, (main, *_), more = matrix.params[0].shape[1], matrix.lists, matrix.aux
            rows = [of[place] for of in matrix[:3]]
            if d > ADAM_WIDTH or not all(t.is_contiguous() for t in rows):
                return None
            used = (*matrix.params, *matrix.exp_avgs, matrix.shadow, matrix.dbias, *matrix.lists, *more)
            dtypes = tuple(None if t is None else t.dtype for t in used)
            return dtypes, reduce_chunk(main.numel(), d), reduce_chunk(more[0].numel(), d) if more else 0

        matrices = _matrices(place, *shared, lists, aux)
        groups, left_out = alike(matrices, lambda matrix: matrix.params[0].shape[1], key, latent_adam_streams)
        for group in groups:
            _launch_update(group, place, k, aux_k, own)
        for matrix in left_out:
            _update_torch(matrix, place, k, aux_k, own)


TORCH_BLOCK_ELEMENTS = 2**20  # numbers of the gradient that exist at a time on the torch path, on a CPU
TORCH_BLOCK_ROWS = 1024  # at least so many rows of it


def _latent_adam_torch(
    *, params, exp_avgs, exp_avg_sqs, shadows, scalars, dbiases, dbias_sums, enc_lists, dec_lists, k, enc_aux, dec_aux,
    aux_k, normalize, beta1, beta2, eps,
):  # fmt: skip
    hyper = AdamHyper(normalize, beta1, beta2, eps)
    shared = params, exp_avgs, exp_avg_sqs, shadows, scalars, dbiases, dbias_sums
    for place, lists, aux, own in ((1, dec_lists, dec_aux, hyper), (0, enc_lists, enc_aux, hyper.plain())):
        for matrix in _matrices(place, *shared, lists, aux):
            _update_torch(matrix, place, k, aux_k, own)


def _update_torch(matrix, place, k, aux_k, hyper):
    """Update an encoder with its latent bias and pre-bias, or a decoder."""
    rows_of_four = list(zip(matrix.params, matrix.exp_avgs, matrix.exp_avg_sqs, strict=True))
    (w, m, v), pre_bias, bias = (rows_of_four[i] for i in (place, 2, 3))
    (n, d), acc = w.shape, m.dtype
    sets = []
    for (*inverse, coef, scale, gate, mat), places in [(matrix.lists, k), (matrix.aux, aux_k)][
        : 2 if matrix.aux else 1
    ]:
        inverse = InverseIndex(*inverse)
        entries, weights, totals = listed_torch(WeightedLists(inverse, coef, scale, gate, mat, places))
        sets.append((inverse.offsets, entries, weights, totals, mat.reshape(-1, d), mat.shape[0]))
    numbers, encoder = StepScalars.of(matrix.scalars[place]), place == 0
    dpre_bias_sum = torch.zeros(d, device=w.device, dtype=acc)
    if encoder:
        totals = [torch.segment_reduce(part[3], "sum", offsets=part[0].long(), axis=0) for part in sets]
        total = totals[0] if len(totals) == 1 else totals[0].add_(totals[1])
        size = TORCH_BLOCK_ROWS if is_host_readable(w) else n
        for first in range(0, n, size):
            dpre_bias_sum += total[first : first + size] @ w[first : first + size].to(acc)
        step_torch(list(bias), total, StepScalars.of(matrix.scalars[3]), hyper.plain())
    # offsets of the lists can be read on a CPU only
    size = max(TORCH_BLOCK_ROWS, TORCH_BLOCK_ELEMENTS // d) if is_host_readable(w) else n
    buffers = [part[4].new_empty(min(size, n), d) if by_product(part[4], w) else None for part in sets]
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        g, *more = (_block(part, rows, n, acc, buffer) for part, buffer in zip(sets, buffers, strict=True))
        g = g.add_(more[0]) if more else g
        step_blocks_torch([w[rows], m[rows], v[rows]], g, numbers, hyper)
    if matrix.shadow is not None:
        matrix.shadow.copy_(w)
    if encoder and matrix.dbias_sum is not None:
        matrix.dbias_sum.copy_(dpre_bias_sum)
    elif encoder:
        step_torch(list(pre_bias), matrix.dbias - dpre_bias_sum, StepScalars.of(matrix.scalars[2]), hyper.plain())


def _block(part, rows, n, acc, buffer):
    """Return the gradients [rows, d] of some latents; `buffer` [at least rows, d] receives a sparse product."""
    offsets, entries, weights, _, mat, S = part
    offsets = offsets[rows.start : rows.stop + 1]
    if rows.stop - rows.start < n:
        low, high = int(offsets[0]), int(offsets[-1])
        entries, weights = entries[low * S : high * S], weights[low * S : high * S]
        offsets = offsets - low
    offsets = offsets * S
    if buffer is None:
        return lists_torch(entries, weights, offsets, mat).to(acc)
    out = buffer[: rows.stop - rows.start]
    # `@` takes ten times as long
    return torch.addmm(out, csr(offsets, entries, weights, len(mat)), mat, beta=0, out=out)


latent_adam_ = register(
    "latent_adam_",
    "(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] shadows, Tensor scalars,"
    " Tensor[] dbiases, Tensor(e!)[] dbias_sums, Tensor?[] enc_lists, Tensor?[] dec_lists, int k, Tensor?[] enc_aux,"
    " Tensor?[] dec_aux, int aux_k, int normalize, float beta1, float beta2, float eps, str impl) -> ()",
    torch_impl=_latent_adam_torch,
    triton_impl=_latent_adam_triton,
    fake=lambda **_: None,
)
latent_adam_.__doc__ = """Update the parameters of all streams by one Adam step, with gradients summed over the lists.

The gradient of row n of a matrix is the sum of what `latent_reduce_` would write for its lists and its aux, that of the
latent bias the sums of the encoder's weights, and that of the pre-bias dbias - sum_n (gradient of latent_bias[n]) *
(row n of w_enc before the step).

Args:
    params: w_enc [N, d], the decoder's rows [N, d], pre_bias [d] and latent_bias [N] of the first stream, then those
        of the next.
    exp_avgs: first moments, in the accumulator dtype.
    exp_avg_sqs: second moments, in the accumulator dtype.
    shadows: tensors of any floating dtype that receive copies of the new w_enc [N, d] and decoder rows [N, d] of the
        first stream, then of the next; or empty.
    scalars: [P, 5], a row for each parameter, which `adam_scalars_` wrote.
    dbiases: [d] of each stream in the accumulator dtype, the gradient of pre_bias through the decoder.
    dbias_sums: contiguous [d] of each stream in the accumulator dtype: receive sum_n above, and no pre_bias is updated
        (other shards have latents too: `adam_stream_` takes that step, from dbias - the sums of all); or empty.
    enc_lists: of each stream order, offsets and ids of an InverseIndex over rows * k places; coef, scale (or None),
        gate (or None) and mat as in `latent_reduce_`.
    dec_lists: the same for the decoder's rows.
    k: places per row.
    enc_aux: a second set of lists for the encoder, or empty.
    dec_aux: a second set for the decoder's rows, or empty.
    aux_k: their places per row.
    normalize: as in `adam_stream_`, for the decoder's rows.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the denominator.
    impl: "triton" or "torch". torch holds the gradients of 1,024 latents or 2^20 numbers at a time on a CPU, else all;
        rows wider than 8192 or not contiguous take it in both. Streams whose padded widths and dtypes agree are updated
        in one launch.
"""
