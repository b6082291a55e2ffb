"""Gradients of the weights, latent by latent: the inverse index and the sums over it.

The backward of a gather is a scatter, and scatters on a GPU mean float atomics: slow on hot latents and different on
every run. Instead the B x k selected ids are sorted once (stable), so that every latent owns the list of the rows that
chose it; each gradient row is then one program's sum over that list, in a fixed order. One index serves the gradients
of all 2S weight matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._checks import check_int, require
from ._launch import cdiv, reduce_chunk, reduce_config
from ._ops import acc_dtype, register
from ._triton import tl, tl_dtype, triton


class InverseIndex(NamedTuple):
    """For each latent n, the flat positions order[offsets[n] : offsets[n + 1]] in `indices` that hold n, ascending."""

    order: torch.Tensor  # int32 [M], M = number of selected ids
    offsets: torch.Tensor  # int32 [N + 1]
    plan: torch.Tensor  # int32, the kernels' work list, see _work_plan


NO_INVERSE = (None, None, None)


def inverse_index(indices: torch.Tensor, n_latents: int) -> InverseIndex:
    """Lists of the places that selected each latent, without a host synchronisation.

    Args:
        indices: int64 of any shape, ids in 0..n_latents-1 (ids outside are in no list).
        n_latents: N.

    Equivalent to: `order = indices.flatten().sort(stable=True).indices`, `offsets = [0, *bincount(indices).cumsum(0)]`.
    """
    require(isinstance(indices, torch.Tensor) and indices.dtype == torch.int64, "indices", "an int64 tensor", indices)
    n_latents = check_int("n_latents", n_latents, 1)
    return InverseIndex(*_inverse_index_op(indices, n_latents, "torch"))


def inverse_sizes(M: int, n_latents: int) -> tuple[int, int, int]:
    """Sizes of an InverseIndex over M places."""
    return M, n_latents + 1, sum(_plan_sizes(M, n_latents, reduce_chunk()))


def _inverse_index(indices, n_latents):
    dtype = torch.int16 if n_latents < 2**15 else torch.int32  # fewer radix passes; ids outside must fit too
    ids, order = torch.sort(indices.reshape(-1).clamp(-1, n_latents).to(dtype), stable=True)
    bounds = torch.arange(n_latents + 1, device=indices.device, dtype=torch.int32)
    offsets = torch.searchsorted(ids.int(), bounds, out_int32=True)
    return order.int(), offsets, torch.cat(_work_plan(offsets, order.numel(), reduce_chunk()))


def _inverse_index_fake(indices, n_latents):
    sizes = inverse_sizes(indices.numel(), n_latents)
    return tuple(indices.new_empty(size, dtype=torch.int32) for size in sizes)


_inverse_index_op = register(
    "inverse_index",
    "(Tensor indices, int n_latents, str impl) -> (Tensor, Tensor, Tensor)",
    torch_impl=_inverse_index,
    triton_impl=_inverse_index,
    fake=_inverse_index_fake,
)


@triton.jit
def _latent_reduce_kernel(
    order_ptr, offsets_ptr, items_ptr, first_ptr, slot_ptr, coef_ptr, mat_ptr, out_ptr, sum_ptr, part_ptr, part_sum_ptr,
    M, K, D, N, stride_ms, stride_mr, stride_on,
    S: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one latent's list, one tile of columns.

    Without coef_ptr the rows of `mat` are in list order already and are only added up. With ADD the sums are added to
    what `out` and `sum` hold, and latents with an empty list are left alone. sum_ptr may be None.
    """
    item = tl.program_id(0)
    tile = tl.program_id(1)
    n = tl.load(items_ptr + item)
    if n < N:  # items beyond the last carry N
        begin = tl.load(offsets_ptr + n)
        end = tl.load(offsets_ptr + n + 1)
        if (ADD == 0) | (end > begin):
            chunk = item - tl.load(first_ptr + n)
            low = begin + chunk * CHUNK
            high = tl.minimum(low + CHUNK, end)
            cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = cols < D
            acc = tl.zeros((BLOCK_D,), ACC)
            total = tl.zeros((BLOCK_E,), ACC)
            for e0 in range(low, high, BLOCK_E):
                e = e0 + tl.arange(0, BLOCK_E)
                mask_e = e < high
                if coef_ptr is None:
                    m = tl.load(
                        mat_ptr + e[:, None].to(tl.int64) * stride_mr + cols[None, :],
                        mask=mask_e[:, None] & mask_d[None, :], other=0.0,
                    )  # fmt: skip  # [BLOCK_E, BLOCK_D]
                    acc += tl.sum(m.to(ACC), 0)
                else:
                    place = tl.load(order_ptr + e, mask=mask_e, other=0)
                    row = (place // K).to(tl.int64)
                    for s in tl.static_range(S):
                        source = tl.full((), s, tl.int64)  # 64-bit, also where the JIT takes a size of 1 for a constant
                        c = tl.load(coef_ptr + source * M + place, mask=mask_e, other=0.0).to(ACC)
                        total += c
                        live = mask_e & (c != 0.0)  # entries killed by the ReLU cost no traffic
                        m = tl.load(
                            mat_ptr + source * stride_ms + row[:, None] * stride_mr + cols[None, :],
                            mask=live[:, None] & mask_d[None, :], other=0.0,
                        )  # fmt: skip  # [BLOCK_E, BLOCK_D]
                        acc += tl.sum(c[:, None] * m.to(ACC), 0)
            if end - begin <= CHUNK:
                out_row = out_ptr + n.to(tl.int64) * stride_on + cols
                if ADD:
                    acc += tl.load(out_row, mask=mask_d, other=0.0).to(ACC)
                tl.store(out_row, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
                if sum_ptr is not None:
                    if tile == 0:
                        total_sum = tl.sum(total, 0)
                        if ADD:
                            total_sum += tl.load(sum_ptr + n)
                        tl.store(sum_ptr + n, total_sum)
            else:
                slot = (tl.load(slot_ptr + n) + chunk).to(tl.int64)
                tl.store(part_ptr + slot * D + cols, acc, mask=mask_d)
                if sum_ptr is not None:
                    if tile == 0:
                        tl.store(part_sum_ptr + slot, tl.sum(total, 0))


@triton.jit
def _latent_finish_kernel(
    hot_ptr, offsets_ptr, slot_ptr, part_ptr, part_sum_ptr, out_ptr, sum_ptr, D, N, stride_on,
    ADD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of one hot latent in order."""
    n = tl.load(hot_ptr + tl.program_id(0))
    tile = tl.program_id(1)
    if n < N:
        count = tl.load(offsets_ptr + n + 1) - tl.load(offsets_ptr + n)
        slot = tl.load(slot_ptr + n).to(tl.int64)
        cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = cols < D
        out_row = out_ptr + n.to(tl.int64) * stride_on + cols
        acc = tl.zeros((BLOCK_D,), ACC)
        total = tl.zeros((1,), ACC)
        for c in range(tl.cdiv(count, CHUNK)):
            acc += tl.load(part_ptr + (slot + c) * D + cols, mask=mask_d, other=0.0)
            if sum_ptr is not None:
                total += tl.load(part_sum_ptr + slot + c)
        if ADD:
            acc += tl.load(out_row, mask=mask_d, other=0.0).to(ACC)
        tl.store(out_row, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
        if sum_ptr is not None:
            if tile == 0:
                sums = sum_ptr + n + tl.arange(0, 1)
                if ADD:
                    total += tl.load(sums)
                tl.store(sums, total)


class _WorkPlan(NamedTuple):
    items: torch.Tensor  # int32 [N + M // chunk], latent of each program, N for none
    first: torch.Tensor  # int32 [N], first program of each latent
    slots: torch.Tensor  # int32 [N], first partial sum of a latent with several chunks
    hot: torch.Tensor  # int32 [max(M // chunk, 1)], latents with several chunks, N for none


def _plan_sizes(M: int, n: int, chunk: int) -> tuple[int, int, int, int]:
    """Static bounds, no counts read back: max(1, ceil(count / chunk)) programs a latent, N + M // chunk in all."""
    return n + M // chunk, n, n, max(M // chunk, 1)


def _work_plan(offsets: torch.Tensor, M: int, chunk: int) -> _WorkPlan:
    n = offsets.numel() - 1
    n_items, _, _, n_hot = _plan_sizes(M, n, chunk)
    count = offsets[1:] - offsets[:-1]
    chunks = torch.clamp((count + chunk - 1) // chunk, min=1)
    ends = chunks.cumsum(0, dtype=torch.int32)
    programs = torch.arange(n_items, device=offsets.device, dtype=torch.int32)
    items = torch.searchsorted(ends, programs, right=True, out_int32=True)
    split = chunks > 1
    partial_ends = torch.where(split, chunks, 0).cumsum(0, dtype=torch.int32)
    ranks = torch.arange(1, n_hot + 1, device=offsets.device, dtype=torch.int32)
    hot = torch.searchsorted(split.cumsum(0, dtype=torch.int32), ranks, out_int32=True)
    return _WorkPlan(items, ends - chunks, partial_ends - torch.where(split, chunks, 0), hot)


def launch_reduce(out, sums, order, offsets, plan, coef, mat, k, add):
    """Runs the kernels; `out` [N, d] may be a slice of columns. coef None: mat [M, d] has its rows in list order."""
    M, n, chunk = order.numel(), offsets.numel() - 1, reduce_chunk()
    S, d = (1 if coef is None else mat.shape[0]), mat.shape[-1]
    acc = acc_dtype(mat.dtype)
    config = reduce_config(d)
    sizes = _plan_sizes(M, n, chunk)
    plan = _WorkPlan(*plan.split(sizes))
    if coef is not None:
        coef = coef.reshape(S, M).to(acc).contiguous()
    if mat.stride(-1) != 1:
        mat = mat.contiguous()
    slots = 2 * (M // chunk) + 1  # a split latent has at most twice as many chunks as whole ones
    part = torch.empty(slots, d, device=mat.device, dtype=acc)
    part_sums = torch.empty(slots, device=mat.device, dtype=acc)
    tiles = cdiv(d, config.block_d)
    common = dict(ADD=add, CHUNK=chunk, BLOCK_D=config.block_d, ACC=tl_dtype(acc), num_warps=config.num_warps)
    _latent_reduce_kernel[(sizes[0], tiles)](
        order, offsets, plan.items, plan.first, plan.slots, coef, mat, out, sums, part, part_sums,
        M, k, d, n, mat.stride(0), mat.stride(-2), out.stride(0), S=S, BLOCK_E=config.block_e, num_stages=1, **common,
    )  # fmt: skip
    _latent_finish_kernel[(sizes[3], tiles)](
        plan.hot, offsets, plan.slots, part, part_sums, out, sums, d, n, out.stride(0), **common
    )


def reduce_torch(out, sums, order, offsets, plan, coef, mat, k, add):
    """The same in torch."""
    S, rows, d = mat.shape
    acc = acc_dtype(mat.dtype)
    order = order.long()
    if out.device.type == "cpu":
        order = order[: int(offsets[-1])]  # what is in no list stands at the end
    coef = coef.reshape(S, -1).to(acc)[:, order]  # [S, M], in list order
    offsets = offsets.long()
    # a bag per latent over the rows of every source: [M, S] entries, the sources of one place side by side
    places = (order // k)[:, None] + torch.arange(S, device=order.device) * rows
    rows_of = F.embedding_bag(
        places.reshape(-1), mat.reshape(S * rows, d), offsets * S, mode="sum",
        per_sample_weights=coef.T.reshape(-1).to(mat.dtype), include_last_offset=True,
    )  # fmt: skip
    out.copy_(out + rows_of if add else rows_of)
    if sums is not None:
        totals = torch.segment_reduce(coef.sum(0), "sum", offsets=offsets, axis=0)
        sums.copy_(sums + totals if add else totals)


_latent_reduce_op = register(
    "latent_reduce_",
    "(Tensor(a!) out, Tensor(b!)? sums, Tensor order, Tensor offsets, Tensor plan, Tensor coef, Tensor mat, int k,"
    " bool add, str impl) -> ()",
    torch_impl=reduce_torch,
    triton_impl=launch_reduce,
    fake=lambda *args: None,
)


def latent_reduce(inverse: InverseIndex, coef, mat, k: int, dtype, impl: str, into=None):
    """Sum, for every latent, the rows that chose it.

    out[n] = sum over places p in list(n), sources s of coef[s, p] * mat[s, p // k];  sums[n] = sum of the coefficients.

    Args:
        inverse: an InverseIndex over rows * k places.
        coef: [S, rows, k] or [S, rows * k] weights; zero skips a row.
        mat: [S, rows, d].
        k: places per row.
        dtype: of `out`.
        impl: "triton" or "torch".
        into: (out, sums) of an earlier call to add to; latents with an empty list are not touched.

    Returns: out [N, d] in `dtype`, sums [N] in the accumulator dtype.
    """
    n = inverse.offsets.numel() - 1
    out, sums = into or (
        mat.new_empty(n, mat.shape[-1], dtype=dtype),
        mat.new_empty(n, dtype=acc_dtype(mat.dtype)),
    )
    _latent_reduce_op(out, sums, *inverse, coef, mat, k, into is not None, impl)
    return out, sums
