"""Gradients of the weights: sums over the inverse index, latent by latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, csr, is_host_readable
from ..core.plan import launch
from ..core.registry import register
from ..launch.device import capability, cdiv
from ..launch.reduce import finish_warps, reduce_chunk, reduce_config
from .inverse_index import InverseIndex
from .records import WeightedLists


@triton.jit
def sum_entries(
    order_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, low, high, cols, mask_d, M, ROWS, K, stride_ms, stride_mr,
    S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum entries low..high - 1 of the lists: their weighted rows [BLOCK_D] and their weights [BLOCK_E].

    The weight of an entry is coef[s, place], times scale[s, row] if given, and 0 where gate[s, place] <= 0. Without
    coef the rows of `mat` are in list order already, with weight 1; the sum of the weights is then 0.
    """
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
                source = tl.full((), s, tl.int64)  # 64-bit, even where the JIT specialises a size of 1
                c = tl.load(coef_ptr + source * M + place, mask=mask_e, other=0.0).to(ACC)
                if gate_ptr is not None:  # NaN passes
                    gate = tl.load(gate_ptr + source * M + place, mask=mask_e, other=0.0)
                    c = tl.where(gate <= 0.0, 0.0, c)
                if scale_ptr is not None:
                    scale = tl.load(scale_ptr + source * ROWS + row, mask=mask_e, other=0.0).to(ACC)
                    c = tl.where(scale != 0.0, c * scale, 0.0)  # scale 0 excludes the entry, even if c is not finite
                total += c
                live = mask_e & (c != 0.0)  # rows of weight 0 (ReLU) are not loaded
                m = tl.load(
                    mat_ptr + source * stride_ms + row[:, None] * stride_mr + cols[None, :],
                    mask=live[:, None] & mask_d[None, :], other=0.0,
                )  # fmt: skip  # [BLOCK_E, BLOCK_D]
                acc += tl.sum(c[:, None] * m.to(ACC), 0)
    return acc, total


@triton.jit
def _latent_reduce_kernel(
    order_ptr, offsets_ptr, ids_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, out_ptr, sum_ptr, part_ptr, part_sum_ptr,
    M, ROWS, K, D, N, stride_ms, stride_mr, stride_on,
    S: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one latent's list, one tile of columns.

    Program n < N takes the first CHUNK entries of latent n. A later chunk begins in exactly one block [q CHUNK, (q + 1)
    CHUNK) of the sorted places, and its latent owns place q CHUNK: program N + q takes it, if there is one. So no work
    list is needed.

    Sums as in `sum_entries`. ADD adds them to `out` and `sum`; latents with an empty list are then not touched. sum_ptr
    may be None.
    """
    pid = tl.program_id(0)
    tile = tl.program_id(1)
    later = pid >= N
    first = tl.maximum(pid - N, 0) * CHUNK
    owner = tl.load(ids_ptr + first, mask=later, other=0)
    inside = later & (owner >= 0) & (owner < N)
    chunk = (first - tl.load(offsets_ptr + owner, mask=inside, other=0) + CHUNK - 1) // CHUNK
    chunk = tl.where(inside, chunk, 0)
    n = tl.where(later, tl.where(chunk > 0, owner, -1), pid)
    if n >= 0:
        begin = tl.load(offsets_ptr + n)
        end = tl.load(offsets_ptr + n + 1)
        low = begin + chunk * CHUNK
        high = tl.minimum(low + CHUNK, end)
        if (low < end) | ((chunk == 0) & (ADD == 0)):
            cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = cols < D
            acc, total = sum_entries(
                order_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptr, low, high, cols, mask_d, M, ROWS, K, stride_ms,
                stride_mr, S, BLOCK_E, BLOCK_D, ACC,
            )  # fmt: skip
            if end - begin <= CHUNK:
                out_row = out_ptr + n.to(tl.int64) * stride_on + cols
                if ADD:
                    acc += tl.load(out_row, mask=mask_d, other=0.0).to(ACC)
                tl.store(out_row, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
                if sum_ptr is not None:
                    if tile == 0:
                        total_sum = tl.sum(total, 0)
                        if ADD:
                            total_sum += tl.load(sum_ptr + n).to(ACC)
                        tl.store(sum_ptr + n, total_sum.to(sum_ptr.dtype.element_ty))
            else:  # at most one first and one later chunk of split lists begin in a block: two slots
                slot = (2 * (low // CHUNK) + (chunk > 0).to(tl.int32)).to(tl.int64)
                tl.store(part_ptr + slot * D + cols, acc, mask=mask_d)
                if sum_ptr is not None:
                    if tile == 0:
                        tl.store(part_sum_ptr + slot, tl.sum(total, 0))


@triton.jit
def _latent_finish_kernel(
    offsets_ptr, ids_ptr, part_ptr, part_sum_ptr, out_ptr, sum_ptr, D, N, stride_on,
    ADD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the chunks of one split list in order, in the program of the block where its second chunk begins."""
    first = tl.program_id(0) * CHUNK
    tile = tl.program_id(1)
    n = tl.load(ids_ptr + first)
    if (n >= 0) & (n < N):
        begin = tl.load(offsets_ptr + n)
        count = tl.load(offsets_ptr + n + 1) - begin
        second = begin + CHUNK
        if (count > CHUNK) & (second >= first) & (second < first + CHUNK):
            cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = cols < D
            out_row = out_ptr + n.to(tl.int64) * stride_on + cols
            acc = tl.zeros((BLOCK_D,), ACC)
            total = tl.zeros((1,), ACC)
            for c in range(tl.cdiv(count, CHUNK)):
                slot = 2 * (begin // CHUNK + c).to(tl.int64)
                if c > 0:
                    slot += 1
                acc += tl.load(part_ptr + slot * D + cols, mask=mask_d, other=0.0)
                if sum_ptr is not None:
                    total += tl.load(part_sum_ptr + slot)
            if ADD:
                acc += tl.load(out_row, mask=mask_d, other=0.0).to(ACC)
            tl.store(out_row, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
            if sum_ptr is not None:
                if tile == 0:
                    sums = sum_ptr + n + tl.arange(0, 1)
                    if ADD:
                        total += tl.load(sums).to(ACC)
                    tl.store(sums, total.to(sum_ptr.dtype.element_ty))


def launch_reduce(*, out, sums, order, offsets, ids, coef, scale, gate, mat, k, add):
    """Run the kernels of `latent_reduce_`; see there for the arguments.

    `out` [N, d] may be a slice of columns. coef None: mat [M, d] has its rows in list order.
    """
    M, n = order.numel(), offsets.numel() - 1
    S, (rows, d) = (1 if coef is None else mat.shape[0]), mat.shape[-2:]
    acc = acc_dtype(mat.dtype)
    config, chunk = reduce_config(d, capability(mat.device), S), reduce_chunk(M, d)
    coef, scale, gate = (None if t is None else t.contiguous() for t in (coef, scale, gate))
    if mat.stride(-1) != 1:
        mat = mat.contiguous()
    blocks, tiles = cdiv(M, chunk), cdiv(d, config.block_d)
    part = torch.empty(2 * blocks, d, device=mat.device, dtype=acc)
    part_sums = torch.empty(2 * blocks, device=mat.device, dtype=acc)
    common = dict(ADD=add, CHUNK=chunk, BLOCK_D=config.block_d, ACC=tl_dtype(acc))
    launch(_latent_reduce_kernel, (n + blocks, tiles))(
        order, offsets, ids, coef, scale, gate, mat, out, sums, part, part_sums,
        M, rows, k, d, n, mat.stride(0), mat.stride(-2), out.stride(0), S=S, BLOCK_E=config.block_e,
        num_warps=config.num_warps, num_stages=1, **config.registers(capability(mat.device)), **common,
    )  # fmt: skip
    launch(_latent_finish_kernel, (blocks, tiles))(
        offsets, ids, part, part_sums, out, sums, d, n, out.stride(0), num_warps=finish_warps(config.block_d), **common
    )


def listed_torch(lists: WeightedLists):
    """Return the entries of the lists for `lists_torch`.

    Args:
        lists: as in `latent_reduce_`.

    Returns:
        Rows of mat [S * rows, d] and their weights, [M * S] each, the S entries of a place side by side; the weights
        summed over the sources, [M].
    """
    (order, offsets, _), coef, scale, gate, mat, k = lists
    S, rows, _ = mat.shape
    acc = acc_dtype(mat.dtype)
    coef = coef.reshape(S, rows, -1).to(acc)
    if gate is not None:
        coef = torch.where(gate.reshape(coef.shape) <= 0, 0.0, coef)
    if scale is not None:
        scale = scale[..., None].to(acc)
        coef = torch.where(scale != 0, coef * scale, 0.0)
    if is_host_readable(offsets):
        order = order[: int(offsets[-1])]  # places in no list come last
    coef = coef.reshape(S, -1).index_select(1, order)  # [S, M], in list order
    if S == 1:
        return order // k, coef[0].to(mat.dtype), coef[0]
    # the sources of one place side by side
    entries = (order // k)[:, None] + torch.arange(0, S * rows, rows, device=order.device, dtype=order.dtype)
    return entries.reshape(-1), coef.T.reshape(-1).to(mat.dtype), coef.sum(0)


def by_product(mat, out) -> bool:
    """Whether to use a sparse product: several times faster than bags (measured, docs/results.md)."""
    return (
        out.device.type == "cpu"
        and mat.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
    )  # fmt: skip


def lists_torch(entries, weights, offsets, mat):
    """Sum weighted rows of mat for each list of entries, by `F.embedding_bag`.

    Args:
        entries: [M], rows of mat in list order.
        weights: [M].
        offsets: [N + 1], where each list begins.
        mat: [R, d].

    Returns:
        [N, d] in mat's dtype.
    """
    # one more bag for places in no list: on CUDA the last bag extends to the end of entries
    offsets = torch.cat([offsets.long(), offsets.new_full((1,), entries.numel(), dtype=torch.int64)])
    bags = F.embedding_bag(
        entries.long(), mat, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return bags[:-1]


def reduce_torch(*, out, sums, order, offsets, ids, coef, scale, gate, mat, k, add):
    """Run `latent_reduce_` in torch; see there for the arguments."""
    S, _, d = mat.shape
    entries, weights, totals = listed_torch(WeightedLists(InverseIndex(order, offsets, ids), coef, scale, gate, mat, k))
    if sums is not None:
        totals = torch.segment_reduce(totals, "sum", offsets=offsets.long(), axis=0)
        sums.copy_(sums + totals if add else totals)
    offsets, mat = offsets * S, mat.reshape(-1, d)
    latents = None
    if add and is_host_readable(offsets):  # few lists are not empty
        latents = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
        offsets = torch.cat([offsets[latents], offsets[-1:]])
    product_out = None
    if by_product(mat, out):
        lists = csr(offsets, entries, weights, len(mat))
        product_out = out if latents is None and out.dtype == mat.dtype else mat.new_empty(offsets.numel() - 1, d)
        list_sums = torch.addmm(product_out, lists, mat, beta=1 if add and product_out is out else 0, out=product_out)
    else:
        list_sums = lists_torch(entries, weights, offsets, mat)
    if latents is not None:
        out.index_add_(0, latents, list_sums.to(out.dtype))
    elif product_out is not out:
        out.copy_(out + list_sums if add else list_sums)


latent_reduce_ = register(
    "latent_reduce_",
    "(Tensor(a!) out, Tensor(b!)? sums, Tensor order, Tensor offsets, Tensor ids, Tensor coef, Tensor? scale,"
    " Tensor? gate, Tensor mat, int k, bool add, str impl) -> ()",
    torch_impl=reduce_torch,
    triton_impl=launch_reduce,
    fake=lambda **_: None,
)
latent_reduce_.__doc__ = """Sum, for every latent, the rows that selected it.

out[n] = sum over places p in list(n), sources s of c[s, p] * mat[s, p // k];  sums[n] = sum of c[s, p], where
c[s, p] = coef[s, p] * scale[s, p // k], and 0 where gate[s, p] <= 0 or the scale is 0.

Args:
    out: [N, d] of any floating dtype.
    sums: [N] of any floating dtype, or None.
    order: int32, of an InverseIndex over rows * k places.
    offsets: int32, of the InverseIndex.
    ids: int32, of the InverseIndex.
    coef: [S, rows, k] or [S, rows * k]. An entry of weight 0 skips its row (the torch path multiplies it: keep such
        rows finite there).
    scale: [S, rows], or None.
    gate: as coef, or None.
    mat: [S, rows, d].
    k: places per row.
    add: add to out and sums; latents with an empty list are then not touched.
    impl: "triton" or "torch".
"""


def latent_reduce(lists: WeightedLists, dtype: torch.dtype, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `latent_reduce_` with new outputs.

    Args:
        lists: weighted lists of N latents.
        dtype: dtype of out.
        impl: "triton" or "torch".

    Returns:
        out [N, d] in `dtype`, sums [N] in the accumulator dtype.
    """
    n, mat = lists.inverse.offsets.numel() - 1, lists.mat
    out = mat.new_empty(n, mat.shape[-1], dtype=dtype)
    sums = mat.new_empty(n, dtype=acc_dtype(mat.dtype))
    latent_reduce_(out, sums, *lists.tensors, lists.k, False, impl)
    return out, sums
