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
from ..core.plan import launch
from ..core.registry import register
from ..launch.adam import ADAM_WIDTH, adam_rows, latent_adam_config
from ..launch.device import capability, cdiv
from ..launch.reduce import reduce_chunk, reduce_config
from .adam import PLAIN, AdamHyper, StepScalars, step, step_blocks_torch, step_torch
from .inverse_index import InverseIndex
from .latent_reduce import by_product, listed_torch, lists_torch, sum_entries
from .records import WeightedLists


@triton.jit
def _list_parts_kernel(
    order_ptr, offsets_ptr, ids_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, part_ptr, part_sum_ptr,
    M, ROWS, K, D, N, stride_ms, stride_mr,
    S: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of a list longer than CHUNK.

    In a block of CHUNK places at most one such list begins, which then owns the block's last place, and at most one
    later chunk begins, whose list owns the block's first place. Program 2 q takes the former of block q, 2 q + 1 the
    latter.
    """
    slot = tl.program_id(0).to(tl.int64)
    first = (slot // 2).to(tl.int32) * CHUNK
    later = slot % 2 == 1
    n = tl.load(ids_ptr + tl.where(later, first, tl.minimum(first + CHUNK, M) - 1))
    if (n >= 0) & (n < N):
        begin = tl.load(offsets_ptr + n)
        end = tl.load(offsets_ptr + n + 1)
        low = tl.where(later, begin + tl.cdiv(first - begin, CHUNK) * CHUNK, begin)
        here = tl.where(later, first > begin, begin >= first) & (low < tl.minimum(end, first + CHUNK))
        if here & (end - begin > CHUNK):
            cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = cols < D
            acc, total = sum_entries(
                order_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, low, tl.minimum(low + CHUNK, end), cols, mask_d,
                M, ROWS, K, stride_ms, stride_mr, S, BLOCK_E, BLOCK_D, ACC,
            )  # fmt: skip
            tl.store(part_ptr + slot * D + cols, acc, mask=mask_d)
            if tl.program_id(1) == 0:
                tl.store(part_sum_ptr + slot, tl.sum(total, 0))


@triton.jit
def _add_list(
    acc, total, n, order_ptr, offsets_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, part_ptr, part_sum_ptr, cols,
    mask_d, M, ROWS, K, D, stride_ms, stride_mr,
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
            acc += tl.load(part_ptr + slot * D + cols, mask=mask_d, other=0.0)
            total += tl.load(part_sum_ptr + slot)
    return acc, total


@triton.jit
def _latent_adam_kernel(
    w_ptr, m_ptr, v_ptr, shadow_ptr, bias_ptr, bias_m_ptr, bias_v_ptr, dpre_bias_ptr, scalars_ptr, bias_scalars_ptr,
    order_ptr, offsets_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, part_ptr, part_sum_ptr,
    M, ROWS, K, stride_ms, stride_mr,
    aux_order_ptr, aux_offsets_ptr, aux_coef_ptr, aux_scale_ptr, aux_gate_ptr, aux_mat_ptr, aux_part_ptr,
    aux_part_sum_ptr, AUX_M, AUX_ROWS, AUX_K, aux_stride_ms, aux_stride_mr,
    N, D, stride_sn, LATENTS: tl.constexpr, S: tl.constexpr, AUX_S: tl.constexpr, CHUNK: tl.constexpr,
    AUX_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    EARLY: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the lists of LATENTS latents and update their rows and, if given, their biases.

    BLOCK_D columns, the whole row if it is normalised. dpre_bias_ptr [programs, D], if given, receives the sum of (a
    latent's bias gradient) * (its row before the step).
    """
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
                mat_ptr, part_ptr, part_sum_ptr, cols, mask_d, M, ROWS, K, D, stride_ms, stride_mr, S, CHUNK, BLOCK_E,
                BLOCK_D, ACC,
            )  # fmt: skip
            if aux_order_ptr is not None:
                g, total = _add_list(
                    g, total, n, aux_order_ptr, aux_offsets_ptr, aux_coef_ptr, aux_scale_ptr, aux_gate_ptr, aux_mat_ptr,
                    aux_part_ptr, aux_part_sum_ptr, cols, mask_d, AUX_M, AUX_ROWS, AUX_K, D, aux_stride_ms,
                    aux_stride_mr, AUX_S, AUX_CHUNK, BLOCK_E, BLOCK_D, ACC,
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
            if shadow_ptr is not None:
                out = shadow_ptr + tl.full((), n, tl.int64) * stride_sn + cols
                tl.store(out, w.to(shadow_ptr.dtype.element_ty), mask=mask_d)
            if bias_ptr is not None:
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
        tl.store(dpre_bias_ptr + tl.program_id(0).to(tl.int64) * D + cols, dpre_bias_sum, mask=mask_d)


def _parts(lists, k, n, d, acc):
    """Sum the chunks of long lists; return the kernel's arguments for one set of lists, its sources and its chunk."""
    order, offsets, ids, coef, scale, gate, mat = lists
    coef, scale, gate = (None if t is None else t.contiguous() for t in (coef, scale, gate))
    mat = mat if mat.stride(-1) == 1 else mat.contiguous()
    M, S, rows = order.numel(), mat.shape[0], mat.shape[1]
    config, chunk = reduce_config(d, 80, S), reduce_chunk(M, d)
    slots = 2 * cdiv(M, chunk)
    part = torch.empty(slots, d, device=mat.device, dtype=acc)
    part_sum = torch.empty(slots, device=mat.device, dtype=acc)
    sizes = M, rows, k, mat.stride(0), mat.stride(1)
    launch(_list_parts_kernel, (slots, cdiv(d, config.block_d)))(
        order, offsets, ids, coef, scale, gate, mat, part, part_sum, M, rows, k, d, n, *sizes[3:],
        S=S, CHUNK=chunk, BLOCK_E=config.block_e, BLOCK_D=config.block_d, ACC=tl_dtype(acc),
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    return (order, offsets, coef, scale, gate, mat, part, part_sum, *sizes), S, chunk


_NO_LISTS = (None,) * 8 + (0,) * 5


def _latent_adam_triton(
    *, w, m, v, shadow, bias, scalars, bias_scalars, lists, k, aux, aux_k, normalize, beta1, beta2, eps
):  # fmt: skip
    (n, d), acc = w.shape, m.dtype
    if d > ADAM_WIDTH or not (w.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
        return _latent_adam_torch(
            w=w, m=m, v=v, shadow=shadow, bias=bias, scalars=scalars, bias_scalars=bias_scalars, lists=lists, k=k,
            aux=aux, aux_k=aux_k, normalize=normalize, beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip
    main, S, chunk = _parts(lists, k, n, d, acc)
    other, aux_S, aux_chunk = _parts(aux, aux_k, n, d, acc) if aux else (_NO_LISTS, 1, 1)
    latents = adam_rows(n) if bias else 1
    config, programs = latent_adam_config(d, capability(w.device), normalize == PLAIN), cdiv(n, latents)
    dpre_bias_sum = torch.empty(programs, d, device=w.device, dtype=acc) if bias else None
    launch(_latent_adam_kernel, (programs, cdiv(d, config.block_d)))(
        w, m, v, shadow, *(bias or (None,) * 3), dpre_bias_sum, scalars, bias_scalars, *main, *other, n, d,
        0 if shadow is None else shadow.stride(0), LATENTS=latents, S=S, AUX_S=aux_S, CHUNK=chunk, AUX_CHUNK=aux_chunk,
        NORMALIZE=normalize, BETA1=beta1, BETA2=beta2, EPS=eps, EARLY=config.early, BLOCK_E=config.block_e,
        BLOCK_D=config.block_d, ACC=tl_dtype(acc), num_warps=config.num_warps, num_stages=1,
        **config.registers(capability(w.device)),
    )  # fmt: skip
    return w.new_empty(0, dtype=acc) if dpre_bias_sum is None else dpre_bias_sum.sum(0)


TORCH_BLOCK_ELEMENTS = 2**20  # numbers of the gradient that exist at a time on the torch path, on a CPU
TORCH_BLOCK_ROWS = 1024  # at least so many rows of it


def _latent_adam_torch(
    *, w, m, v, shadow, bias, scalars, bias_scalars, lists, k, aux, aux_k, normalize, beta1, beta2, eps
):  # fmt: skip
    (n, d), acc = w.shape, m.dtype
    sets = []
    for (*inverse, coef, scale, gate, mat), places in ((lists, k), (aux, aux_k)) if aux else ((lists, k),):
        inverse = InverseIndex(*inverse)
        entries, weights, totals = listed_torch(WeightedLists(inverse, coef, scale, gate, mat, places))
        sets.append((inverse.offsets, entries, weights, totals, mat.reshape(-1, d), mat.shape[0]))
    numbers, bias_numbers = StepScalars.of(scalars), StepScalars.of(bias_scalars) if bias else None
    hyper = AdamHyper(normalize, beta1, beta2, eps)
    dpre_bias_sum = torch.zeros(d, device=w.device, dtype=acc) if bias else w.new_empty(0, dtype=acc)
    if bias_numbers is not None:
        totals = [torch.segment_reduce(part[3], "sum", offsets=part[0].long(), axis=0) for part in sets]
        total = totals[0] if len(totals) == 1 else totals[0].add_(totals[1])
        size = TORCH_BLOCK_ROWS if is_host_readable(w) else n
        for first in range(0, n, size):
            dpre_bias_sum += total[first : first + size] @ w[first : first + size].to(acc)
        step_torch(bias, total, bias_numbers, hyper.plain())
    # offsets of the lists can be read on a CPU only
    size = max(TORCH_BLOCK_ROWS, TORCH_BLOCK_ELEMENTS // d) if is_host_readable(w) else n
    buffers = [part[4].new_empty(min(size, n), d) if by_product(part[4], w) else None for part in sets]
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        g, *more = (_block(part, rows, n, acc, buffer) for part, buffer in zip(sets, buffers, strict=True))
        g = g.add_(more[0]) if more else g
        step_blocks_torch([w[rows], m[rows], v[rows]], g, numbers, hyper)
    if shadow is not None:
        shadow.copy_(w)
    return dpre_bias_sum


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
    "(Tensor(a!) w, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? shadow, Tensor(e!)[] bias, Tensor scalars,"
    " Tensor bias_scalars, Tensor?[] lists, int k, Tensor?[] aux, int aux_k, int normalize, float beta1, float beta2,"
    " float eps, str impl) -> Tensor",
    torch_impl=_latent_adam_torch,
    triton_impl=_latent_adam_triton,
    fake=lambda *, w, m, bias, **_: m.new_empty(w.shape[1] if bias else 0),
)
latent_adam_.__doc__ = """Update rows of a weight matrix by one Adam step, summing gradients over the latents' lists.

The gradient of row n is the sum of what `latent_reduce_` would write for `lists` and for `aux`.

Args:
    w: [N, d].
    m: [N, d], first moment in the accumulator dtype.
    v: [N, d], second moment in the accumulator dtype.
    shadow: [N, d] of any floating dtype, receives a copy of the new weights; or None.
    bias: a bias of the latents [N], whose gradient is the sums of the lists' weights, and its moments; or empty.
    scalars: [5], a row that `adam_scalars_` wrote.
    bias_scalars: [5], the row of the bias.
    lists: order, offsets and ids of an InverseIndex over rows * k places; coef, scale (or None), gate (or None) and mat
        as in `latent_reduce_`.
    k: places per row.
    aux: a second set of lists, or empty.
    aux_k: its places per row.
    normalize: as in `adam_stream_`.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the denominator.
    impl: "triton" or "torch". torch holds the gradients of 1,024 latents or 2^20 numbers at a time on a CPU, else all;
        rows wider than 8192 or not contiguous take it in both.

Returns:
    With a bias sum_n (gradient of bias[n]) * (row n before the step), [d] in the accumulator dtype, else empty.
"""


class LatentParams(NamedTuple):
    """A weight matrix with one row per latent, and the tensors that its step updates or reads."""

    w: torch.Tensor  # [N, d]
    m: torch.Tensor  # [N, d]
    v: torch.Tensor  # [N, d]
    half: torch.Tensor | None  # [N, d], receives the rounded new weights
    bias: list[torch.Tensor]  # a bias [N] and its moments, or empty
    scalars: torch.Tensor  # [5]
    bias_scalars: torch.Tensor  # [5]


def update_rows_(
    params: LatentParams, lists: WeightedLists, aux: WeightedLists | None, hyper: AdamHyper, impl: str
) -> torch.Tensor:
    """Call `latent_adam_` with records.

    Args:
        params: weight matrix, moments, copy, bias and scalars.
        lists: of the codes.
        aux: of AuxK's codes, or None.
        hyper: of the parameter group.
        impl: "triton" or "torch".

    Returns:
        As `latent_adam_`.
    """
    more, aux_k = (list(aux.tensors), aux.k) if aux else ([], 0)
    return latent_adam_(*params, list(lists.tensors), lists.k, more, aux_k, *hyper, impl)
