"""Gradients of the weights: sums over the inverse index, latent by latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, csr, is_host_readable
from ..core.recorder import launch
from ..core.registry import register
from ..launch.budgets import PARTIAL_BYTES
from ..launch.device import capability, cdiv
from ..launch.reduce import finish_warps, reduce_chunk, reduce_config
from .gather import pick
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
def _problem_of(tile, widths, T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Problem of a tile of columns, when the problems' tiles follow one another; its tile there, its first column."""
    problem = tl.zeros((), tl.int32)
    own = tile
    column = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int32)
    for t in tl.static_range(1, T):
        first += tl.cdiv(widths[t - 1], BLOCK_D)
        before += widths[t - 1]
        here = tile >= first
        problem = tl.where(here, t, problem)
        own = tl.where(here, tile - first, own)
        column = tl.where(here, before, column)
    return problem, own, column


@triton.jit
def _latent_reduce_kernel(
    order_ptr, offsets_ptr, ids_ptr, coef_ptr, scale_ptr, gate_ptr, mat_ptrs, out_ptrs, sum_ptrs, part_ptr,
    part_sum_ptr, M, ROWS, K, widths, D, N, stride_m, stride_o, stride_c, strides_ms, strides_mr, strides_on,
    T: tl.constexpr, S: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one latent's list, one tile of columns of one of T problems.

    Program n < N takes the first CHUNK entries of latent n. A later chunk begins in exactly one block [q CHUNK, (q + 1)
    CHUNK) of the sorted places, and its latent owns place q CHUNK: program N + q takes it, if there is one. So no work
    list is needed.

    Sums as in `sum_entries`. ADD adds them to `out` and `sum`; latents with an empty list are then not touched.
    sum_ptrs may be None. Strides of 0 share the lists (stride_m, stride_o) or coef and gate (stride_c) among the
    problems; scale is [T, S, ROWS]. D is the sum of the widths.
    """
    pid = tl.program_id(0)
    problem, tile, column = _problem_of(tl.program_id(1), widths, T, BLOCK_D)
    width = pick(widths, problem, T)
    order_ptr += problem.to(tl.int64) * stride_m
    offsets_ptr += problem.to(tl.int64) * stride_o
    ids_ptr += problem.to(tl.int64) * stride_m
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
            mask_d = cols < width
            if coef_ptr is not None:
                coef_ptr += problem.to(tl.int64) * stride_c
            if gate_ptr is not None:
                gate_ptr += problem.to(tl.int64) * stride_c
            if scale_ptr is not None:
                scale_ptr += problem.to(tl.int64) * (S * ROWS)
            acc, total = sum_entries(
                order_ptr, coef_ptr, scale_ptr, gate_ptr, pick(mat_ptrs, problem, T), low, high, cols, mask_d, M, ROWS,
                K, pick(strides_ms, problem, T), pick(strides_mr, problem, T), S, BLOCK_E, BLOCK_D, ACC,
            )  # fmt: skip
            if end - begin <= CHUNK:
                out_row = pick(out_ptrs, problem, T) + n.to(tl.int64) * pick(strides_on, problem, T) + cols
                if ADD:
                    acc += tl.load(out_row, mask=mask_d, other=0.0).to(ACC)
                tl.store(out_row, acc.to(out_ptrs[0].dtype.element_ty), mask=mask_d)
                if sum_ptrs is not None:
                    if tile == 0:
                        sum_ptr = pick(sum_ptrs, problem, T) + n
                        total_sum = tl.sum(total, 0)
                        if ADD:
                            total_sum += tl.load(sum_ptr).to(ACC)
                        tl.store(sum_ptr, total_sum.to(sum_ptrs[0].dtype.element_ty))
            else:  # at most one first and one later chunk of split lists begin in a block: two slots
                slot = (2 * (low // CHUNK) + (chunk > 0).to(tl.int32)).to(tl.int64)
                tl.store(part_ptr + slot * D + column + cols, acc, mask=mask_d)
                if sum_ptrs is not None:
                    if tile == 0:
                        tl.store(part_sum_ptr + slot * T + problem, tl.sum(total, 0))


@triton.jit
def _latent_finish_kernel(
    offsets_ptr, ids_ptr, part_ptr, part_sum_ptr, out_ptrs, sum_ptrs, widths, D, N, stride_m, stride_o, strides_on,
    T: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the chunks of one split list in order, in the program of the block where its second chunk begins."""
    first = tl.program_id(0) * CHUNK
    problem, tile, column = _problem_of(tl.program_id(1), widths, T, BLOCK_D)
    offsets_ptr += problem.to(tl.int64) * stride_o
    n = tl.load(ids_ptr + problem.to(tl.int64) * stride_m + first)
    if (n >= 0) & (n < N):
        begin = tl.load(offsets_ptr + n)
        count = tl.load(offsets_ptr + n + 1) - begin
        second = begin + CHUNK
        if (count > CHUNK) & (second >= first) & (second < first + CHUNK):
            cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = cols < pick(widths, problem, T)
            out_row = pick(out_ptrs, problem, T) + n.to(tl.int64) * pick(strides_on, problem, T) + cols
            acc = tl.zeros((BLOCK_D,), ACC)
            total = tl.zeros((1,), ACC)
            for c in range(tl.cdiv(count, CHUNK)):
                slot = 2 * (begin // CHUNK + c).to(tl.int64)
                if c > 0:
                    slot += 1
                acc += tl.load(part_ptr + slot * D + column + cols, mask=mask_d, other=0.0)
                if sum_ptrs is not None:
                    total += tl.load(part_sum_ptr + slot * T + problem)
            if ADD:
                acc += tl.load(out_row, mask=mask_d, other=0.0).to(ACC)
            tl.store(out_row, acc.to(out_ptrs[0].dtype.element_ty), mask=mask_d)
            if sum_ptrs is not None:
                if tile == 0:
                    sums = pick(sum_ptrs, problem, T) + n + tl.arange(0, 1)
                    if ADD:
                        total += tl.load(sums).to(ACC)
                    tl.store(sums, total.to(sum_ptrs[0].dtype.element_ty))


def launch_reduces(*, outs, sums, order, offsets, ids, coef, scale, gate, mats, k, add):
    """Run the kernels of `latent_reduce_` for T problems, in as few launches as their widths and the scratch allow.

    As in `latent_reduce_`, but outs may be slices of columns, and coef None means that mats [M, d_t] have their rows in
    list order. Neighbours share a launch if their lists are split alike, their tiles are about as wide and their
    partial sums stay within PARTIAL_BYTES together.
    """
    M, arch, S = order.shape[-1], capability(mats[0].device), _sources(coef)
    for part, chunk in reduce_groups([out.shape[1] for out in outs], M, S, arch):
        inverse = [t if t.dim() == 1 else t[part] for t in (order, offsets, ids)]
        weights = [t if t is None or t.dim() < 4 else t[part] for t in (coef, gate)]
        _launch_reduce(
            outs[part], sums[part] if sums else None, inverse, weights, None if scale is None else scale[part],
            mats[part], k, add, chunk,
        )  # fmt: skip


def reduce_groups(widths, M, S, arch) -> list[tuple[slice, int]]:
    """Return the problems of each launch of `launch_reduces` and the chunk of their lists.

    Args:
        widths: columns of each problem.
        M: places of the lists.
        S: sources.
        arch: as `capability` gives it.
    """
    settings = [(reduce_config(d, arch, S).block_d, reduce_chunk(M, d)) for d in widths]
    groups, first = [], 0
    while first < len(widths):
        (low, chunk), last = settings[first], first + 1
        high = low
        while last < len(widths) and settings[last][1] == chunk:
            low, high = min(low, settings[last][0]), max(high, settings[last][0])
            if high > 2 * low or 8 * cdiv(M, chunk) * sum(widths[first : last + 1]) > PARTIAL_BYTES:
                break
            last += 1
        groups.append((slice(first, last), chunk))
        first = last
    return groups


def _sources(coef):
    """Number of sources of `coef`, as `latent_reduce_` takes it; 1 without."""
    return 1 if coef is None else coef.shape[1 if coef.dim() == 4 else 0]


def _launch_reduce(outs, sums, inverse, weights, scale, mats, k, add, chunk):
    """Run the kernels of `launch_reduces` once; `weights` are coef and gate."""
    (order, offsets, ids), (coef, gate) = inverse, weights
    M, n, T, acc = order.shape[-1], offsets.shape[-1] - 1, len(mats), acc_dtype(mats[0].dtype)
    S, rows, arch = _sources(coef), mats[0].shape[-2], capability(mats[0].device)
    widths, strides_on = zip(*((out.shape[1], out.stride(0)) for out in outs), strict=True)
    config = reduce_config(max(widths), arch, S)
    coef, scale, gate = (None if t is None else t.contiguous() for t in (coef, scale, gate))
    mats = tuple(mat if mat.stride(-1) == 1 else mat.contiguous() for mat in mats)
    outs, sums = tuple(outs), None if sums is None else tuple(sums)
    blocks, tiles, total = cdiv(M, chunk), sum(cdiv(d, config.block_d) for d in widths), sum(widths)
    part = torch.empty(2 * blocks, total, device=mats[0].device, dtype=acc)
    part_sums = torch.empty(2 * blocks, T, device=mats[0].device, dtype=acc)
    strides = (M, n + 1) if order.dim() == 2 else (0, 0)
    common = dict(T=T, ADD=add, CHUNK=chunk, BLOCK_D=config.block_d, ACC=tl_dtype(acc))
    launch(_latent_reduce_kernel, (n + blocks, tiles))(
        order, offsets, ids, coef, scale, gate, mats, outs, sums, part, part_sums, M, rows, k, widths, total, n,
        *strides, S * M if coef is not None and coef.dim() == 4 else 0, tuple(mat.stride(0) for mat in mats),
        tuple(mat.stride(-2) for mat in mats), strides_on, S=S, BLOCK_E=config.block_e, num_warps=config.num_warps,
        num_stages=1, **config.registers(arch), **common,
    )  # fmt: skip
    if chunk < M:  # else no list is split
        launch(_latent_finish_kernel, (blocks, tiles))(
            offsets, ids, part, part_sums, outs, sums, widths, total, n, *strides, strides_on,
            num_warps=finish_warps(config.block_d), **common,
        )  # fmt: skip


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
    """Run `latent_reduce_` in torch for one problem."""
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


def _reduces_torch(*, outs, sums, order, offsets, ids, coef, scale, gate, mats, k, add):
    for t, (out, mat) in enumerate(zip(outs, mats, strict=True)):
        lists = [part if part.dim() == 1 else part[t] for part in (order, offsets, ids)]
        own_coef, own_gate = (part if part is None or part.dim() < 4 else part[t] for part in (coef, gate))
        reduce_torch(
            out=out, sums=sums[t] if sums else None, order=lists[0], offsets=lists[1], ids=lists[2], coef=own_coef,
            scale=None if scale is None else scale[t], gate=own_gate, mat=mat if mat.dim() == 3 else mat[None], k=k,
            add=add,
        )  # fmt: skip


latent_reduce_ = register(
    "latent_reduce_",
    "(Tensor(a!)[] outs, Tensor(b!)[] sums, Tensor order, Tensor offsets, Tensor ids, Tensor coef, Tensor? scale,"
    " Tensor? gate, Tensor[] mats, int k, bool add, str impl) -> ()",
    torch_impl=_reduces_torch,
    triton_impl=launch_reduces,
    fake=lambda **_: None,
)
latent_reduce_.__doc__ = """Sum, for every latent, the rows that selected it; T problems with lists of one size.

outs[t][n] = sum over places p in list(n), sources s of c[s, p] * mats[t][s, p // k];  sums[t][n] = sum of c[s, p],
where c[s, p] = coef[s, p] * scale[t, s, p // k], and 0 where gate[s, p] <= 0 or the scale is 0.

Args:
    outs: T tensors [N, d_t] of one floating dtype.
    sums: T tensors [N] of one floating dtype, or none.
    order: int32 [M], of an InverseIndex over M = rows * k places for all problems, or [T, M].
    offsets: int32 [N + 1] or [T, N + 1], of the InverseIndex.
    ids: int32 [M] or [T, M], of the InverseIndex.
    coef: [S, rows, k] for all problems, or [T, S, rows, k]. An entry of weight 0 skips its row (the torch path
        multiplies it: keep such rows finite there).
    scale: [T, S, rows], or None.
    gate: as coef, or None.
    mats: T tensors [S, rows, d_t], or [rows, d_t] for one source.
    k: places per row.
    add: add to outs and sums; latents with an empty list are then not touched.
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
    inverse, coef, scale, gate, mat, k = lists
    scale = None if scale is None else scale[None]
    latent_reduce_([out], [sums], *inverse, coef, scale, gate, [mat], k, False, impl)
    return out, sums
