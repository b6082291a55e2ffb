"""The inverse index: for every latent, the rows that selected it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core._triton import tl, triton
from ..core.recorder import launch
from ..core.registry import register, resolve_impl
from ..core.validation import check_int, require
from ..launch.device import cdiv


class InverseIndex(NamedTuple):
    """For each latent n, the flat positions order[offsets[n] : offsets[n + 1]] in `indices` that hold n, ascending."""

    order: torch.Tensor  # int32 [M], M = number of selected ids
    offsets: torch.Tensor  # int32 [N + 1]
    ids: torch.Tensor  # int32 [M], the selected ids sorted: ids[i] = indices[order[i]]


NO_INVERSE = (None, None, None)


def inverse_index(indices: torch.Tensor, n_latents: int, impl: str = "auto") -> InverseIndex:
    """List the places that selected each latent, without a host synchronisation.

    Args:
        indices: int64 of any shape, ids in 0..n_latents-1 (ids outside are in no list).
        n_latents: N.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch"; the sort is torch's in both.

    Returns:
        order, offsets and ids of an InverseIndex, int32.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Equivalent to:
        `order = indices.flatten().sort(stable=True).indices`, `offsets = [0, *bincount(indices).cumsum(0)]`
    """
    require(isinstance(indices, torch.Tensor) and indices.dtype == torch.int64, "indices", "an int64 tensor", indices)
    n_latents = check_int("n_latents", n_latents, 1)
    return lists_of(inverse_index_op(indices, 1, n_latents, None, resolve_impl(impl, indices, integers=True)), 0)


def lists_of(inverse, group: int) -> InverseIndex:
    """Return the InverseIndex of one group.

    Args:
        inverse: order, offsets and ids that `inverse_index_op` returned.
        group: which group.
    """
    return InverseIndex(*(part[group] for part in inverse))


def _key_dtype(groups, n_latents):
    return torch.int16 if groups * (n_latents + 1) < 2**15 else torch.int32  # fewer radix passes


def _inverse_index_torch(indices, groups, n_latents, count):
    keys = indices.reshape(groups, -1)
    keys = torch.where((keys < 0) | (keys > n_latents), n_latents, keys)
    if count is not None:
        exists = torch.arange(indices.shape[-1], device=indices.device) < count.reshape(groups, 1, 1)
        keys = torch.where(exists, keys.view(groups, -1, indices.shape[-1]), n_latents).view_as(keys)
    ids, order = torch.sort(keys.to(_key_dtype(1, n_latents)), dim=1, stable=True)
    ids, bounds = ids.int(), torch.arange(n_latents + 1, device=indices.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(ids, bounds.repeat(groups, 1), out_int32=True), ids


@triton.jit
def _keys_kernel(idx_ptr, count_ptr, key_ptr, M, K, N, stride_c, groups, BLOCK: tl.constexpr):
    """Sort keys that keep the groups apart; places in no list come last in their group."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < groups * M
    group = offs // M
    ids = tl.load(idx_ptr + offs, mask=mask, other=0)
    exists = (ids >= 0) & (ids < N)
    if count_ptr is not None:
        exists = exists & (offs % K < tl.load(count_ptr + group * stride_c, mask=mask, other=0))
    key = group * (N + 1) + tl.where(exists, ids, N)
    tl.store(key_ptr + offs, key.to(key_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lists_kernel(
    key_ptr, place_ptr, order_ptr, ids_ptr, offsets_ptr, M, N, groups, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the sorted places and ids of each group, and by bisection where each latent's list begins."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < groups * M
    group = offs // M  # sorting keeps every place in its group
    tl.store(order_ptr + offs, (tl.load(place_ptr + offs, mask=mask, other=0) - group * M).to(tl.int32), mask=mask)
    key = tl.load(key_ptr + offs, mask=mask, other=0).to(tl.int64)
    tl.store(ids_ptr + offs, (key - group * (N + 1)).to(tl.int32), mask=mask)
    if tl.program_id(0) * BLOCK < groups * (N + 1):
        group = offs // (N + 1)
        mask = group < groups
        first = group * M
        low = first
        high = first + M
        for _ in range(STEPS):
            middle = (low + high) // 2
            inside = mask & (middle < high)
            below = inside & (tl.load(key_ptr + middle, mask=inside, other=0).to(tl.int64) < offs)
            low = tl.where(below, middle + 1, low)
            high = tl.where(below, high, middle)
        tl.store(offsets_ptr + offs, (low - first).to(tl.int32), mask=mask)


def _inverse_index_triton(indices, groups, n_latents, count):
    size, k, device = indices.numel(), indices.shape[-1], indices.device
    indices, M = indices.contiguous(), size // groups
    keys = torch.empty(size, device=device, dtype=_key_dtype(groups, n_latents))
    order, ids = (torch.empty(groups, M, device=device, dtype=torch.int32) for _ in range(2))
    offsets = torch.empty(groups, n_latents + 1, device=device, dtype=torch.int32)
    block, stride = 1024, 0 if count is None or count.dim() == 0 else count.stride(0)
    launch(_keys_kernel, (cdiv(size, block),))(
        indices, count, keys, M, k, n_latents, stride, groups, BLOCK=block, num_warps=4
    )
    keys, places = torch.sort(keys, stable=True)
    launch(_lists_kernel, (cdiv(max(size, offsets.numel()), block),))(
        keys, places, order, ids, offsets, M, n_latents, groups, STEPS=M.bit_length() + 1, BLOCK=block, num_warps=4
    )
    return order, offsets, ids


def inverse_sizes(M: int, n_latents: int) -> tuple[int, int, int]:
    """Sizes of order, offsets and ids of an InverseIndex over M places."""
    return M, n_latents + 1, M


def _inverse_index_fake(indices, groups, n_latents, count):
    sizes = inverse_sizes(indices.numel() // groups, n_latents)
    return tuple(indices.new_empty(groups, size, dtype=torch.int32) for size in sizes)


inverse_index_op = register(
    "inverse_index",
    "(Tensor indices, int groups, int n_latents, Tensor? count, str impl) -> (Tensor, Tensor, Tensor)",
    torch_impl=_inverse_index_torch,
    triton_impl=_inverse_index_triton,
    fake=_inverse_index_fake,
)
inverse_index_op.__doc__ = """Build `inverse_index` for several groups of one size with one sort.

Args:
    indices: int64 [..., k], groups * M ids, group by group.
    groups: how many.
    n_latents: N.
    count: int32 [groups]; columns from count[g] on are in no list. None: all columns are in lists.
    impl: "triton" or "torch".

Returns:
    order int32 [groups, M], offsets int32 [groups, N + 1], ids int32 [groups, M].
"""
