"""Dead latents: the counters, and AuxK's selection among the dead."""

from __future__ import annotations

import torch

from ..core._triton import tl, triton
from ..core.recorder import launch
from ..core.registry import register, resolve_impl
from ..core.target import interpreted
from ..core.validation import check_indices, check_int, check_tensor, require
from ..launch.budgets import MAX_K
from ..launch.device import cdiv, next_power_of_2
from .encode import centre, values_of
from .gather import pick
from .records import ABSENT, EncoderParams, SparseCodes
from .selection import select_each


@triton.jit
def _count_kernel(counter_ptrs, N, S: tl.constexpr, BLOCK: tl.constexpr):
    """One more step for every latent."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counters = pick(counter_ptrs, tl.program_id(1), S) + offs
    tl.store(counters, tl.load(counters, mask=offs < N, other=0) + 1, mask=offs < N)


@triton.jit
def _fired_kernel(counter_ptrs, idx_ptr, values_ptr, threshold, stride_idx, M, N, S: tl.constexpr, BLOCK: tl.constexpr):
    """counter[n] = 1 where a value exceeds the threshold; all writers store 1, so no atomics."""
    stream = tl.program_id(1)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values_ptr + stream.to(tl.int64) * M + offs, mask=offs < M, other=float("-inf"))
    hit = (offs < M) & (value > threshold)
    latent = tl.load(idx_ptr + stream.to(tl.int64) * stride_idx + offs, mask=hit, other=0)
    counters = pick(counter_ptrs, stream, S)
    tl.store(counters + latent, tl.full((BLOCK,), 1, tl.int64), mask=hit & (latent >= 0) & (latent < N))


def _count_fired_triton(counters, indices, values, threshold):
    S, n, M = len(counters), counters[0].numel(), values[0].numel()
    stride, block, counters = (0 if indices.dim() == 2 else M), 1024, tuple(counters)
    launch(_count_kernel, (cdiv(n, block), S))(counters, n, S=S, BLOCK=block, num_warps=4)
    launch(_fired_kernel, (cdiv(M, block), S))(
        counters, indices.contiguous(), values.contiguous(), threshold, stride, M, n, S=S, BLOCK=block, num_warps=4
    )


def count_fired_torch(counters, indices, values, threshold):
    """Run `count_fired_` in torch; see there for the arguments."""
    for s, counter in enumerate(counters):
        n, idx = counter.shape[0], indices if indices.dim() == 2 else indices[s]
        # bucket n takes everything that did not fire: no data-dependent shape
        target = torch.where((values[s] > threshold) & (idx != ABSENT), idx, n).reshape(-1)
        fired = torch.zeros(n + 1, dtype=torch.bool, device=counter.device).index_fill_(0, target, True)[:n]
        counter.add_(1).masked_fill_(fired, 1)


count_fired_ = register(
    "count_fired_",
    "(Tensor(a!)[] counters, Tensor indices, Tensor values, float threshold, str impl) -> ()",
    torch_impl=count_fired_torch,
    triton_impl=_count_fired_triton,
    fake=lambda **_: None,
)
count_fired_.__doc__ = """Update the counters of S streams, see `update_counters_`.

Args:
    counters: int64 [N] each.
    indices: int64 [B, k] shared by the streams, or [S, B, k]; ABSENT counts for nothing.
    values: [S, B, k].
    threshold: a latent fires in a batch if one of its values is greater.
    impl: "triton" or "torch".
"""


@torch.no_grad()
def update_counters_(
    counters: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, threshold: float = 1e-3, impl: str = "auto"
) -> torch.Tensor:
    """Update the steps since each latent last fired in place, from the sparse codes of one batch.

    Args:
        counters: int64 [N].
        indices: int64 [B, k].
        values: [B, k].
        threshold: a latent fires in a batch if one of its values is greater.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns:
        counters.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Equivalent to:
        `fired = (dense_codes > threshold).any(0); counters.add_(1); counters[fired] = 1`
    """
    ok = isinstance(counters, torch.Tensor) and counters.dtype == torch.int64 and counters.dim() == 1
    require(ok, "counters", "an int64 tensor of shape [N]", counters)
    check_tensor("values", values, ("B", "k"))
    n = counters.shape[0]
    check_indices("indices", indices, tuple(values.shape), n, counters.device)
    impl = resolve_impl(impl, values)
    if impl == "triton" and not counters.is_contiguous():
        counters.copy_(update_counters_(counters.contiguous(), indices, values, threshold, impl))
        return counters
    count_fired_([counters], indices, values[None], threshold, impl)
    return counters


def auxk_topk(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    pre_bias: torch.Tensor,
    latent_bias: torch.Tensor,
    dead: torch.Tensor,
    auxk: int,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the auxk dead latents of one stream with the largest pre-activations, and compute their activations.

    Only the dead columns are multiplied. If there are fewer than auxk, live latents with value 0 fill the rows.

    Args:
        x: [B, d].
        w_enc: [N, d].
        pre_bias: [d].
        latent_bias: [N].
        dead: bool [N].
        auxk: 1..min(N, 512).
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns:
        indices: int64 [B, auxk].
        values: [B, auxk], float32 (float64 for float64 inputs), differentiable in x, w_enc, pre_bias and latent_bias.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Equivalent to, up to the latents behind zero values:
        `h = F.linear(x - pre_bias, w_enc, latent_bias) * dead; i = h.topk(auxk).indices; v = relu(h.gather(1, i))`
    """
    check_tensor("x", x, ("B", "d"))
    check_tensor("w_enc", w_enc, ("N", x.shape[1]), like=x)
    check_tensor("pre_bias", pre_bias, (x.shape[1],), like=x)
    n = w_enc.shape[0]
    check_tensor("latent_bias", latent_bias, (n,), like=x)
    ok = isinstance(dead, torch.Tensor) and dead.dtype == torch.bool and dead.shape == (n,) and dead.device == x.device
    require(ok, "dead", f"a bool tensor of shape [{n}] on {x.device}", dead)
    check_int("auxk", auxk, 1, min(n, MAX_K), f"at most N and {MAX_K}")
    impl = resolve_impl(impl, x)
    with torch.no_grad():
        encoder = EncoderParams([w_enc], [pre_bias], [latent_bias])
        centred = centre([x], [pre_bias], False, impl)
        ids, count, _ = dead_first([dead], 0, impl)
        selected = select_dead(centred, encoder, ids, count, auxk, impl)
    return selected.indices[0], values_of(x, encoder, selected, impl)


def select_dead(
    centred: list[torch.Tensor], encoder: EncoderParams, ids: torch.Tensor, count: torch.Tensor, auxk: int, impl: str
) -> SparseCodes:
    """Select the indices of `auxk_topk` for S streams; arguments are not checked.

    Args:
        centred: x - pre_bias, [B, d_s] each.
        encoder: encoders of the S streams.
        ids: int32 [S, N], as `dead_first` lists them.
        count: int32 [S], the number of dead latents, on the device.
        auxk: how many latents per row.
        impl: "triton" or "torch".

    Returns:
        Codes with indices [S, B, auxk] and no values, of which `count` are valid.
    """
    selected = select_each(centred, list(encoder.w_encs), list(encoder.latent_biases), auxk, ids, count, impl)
    return SparseCodes(selected, None, count)


@triton.jit(do_not_specialize=["threshold"])
def _mark_dead_kernel(dead_ptrs, mask_ptr, n_dead_ptr, threshold, N, S: tl.constexpr, BLOCK: tl.constexpr):
    """Mark the dead of one block of latents in mask [S, N], and count them."""
    block, stream = tl.program_id(0), tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    dead = (tl.load(pick(dead_ptrs, stream, S) + offs, mask=offs < N, other=0) > threshold) & (offs < N)
    tl.store(mask_ptr + stream.to(tl.int64) * N + offs, dead.to(tl.uint8), mask=offs < N)
    tl.store(n_dead_ptr + stream * tl.num_programs(0) + block, tl.sum(dead.to(tl.int32), 0))


@triton.jit
def _dead_first_kernel(
    mask_ptr, n_dead_ptr, ids_ptr, count_ptr, N, stride_c, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    block, stream = tl.program_id(0), tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    blocks = tl.arange(0, BLOCKS)
    n_dead = tl.load(n_dead_ptr + stream * tl.num_programs(0) + blocks, mask=blocks < tl.num_programs(0), other=0)
    total = tl.sum(n_dead, 0)
    before = tl.sum(tl.where(blocks < block, n_dead, 0), 0)
    dead = tl.load(mask_ptr + stream.to(tl.int64) * N + offs, mask=mask, other=0) != 0
    rank = before + tl.cumsum(dead.to(tl.int32), 0) - 1  # of this latent among the dead
    place = tl.where(dead, rank, total + offs - rank - 1)
    tl.store(ids_ptr + stream.to(tl.int64) * N + place, offs, mask=mask)
    if block == 0:
        tl.store(count_ptr + stream * stride_c, total)


def _dead_first_triton(dead, threshold):
    S, n, device = len(dead), dead[0].numel(), dead[0].device
    ids, count, mask = _dead_first_fake(dead, threshold)
    block = 16 if interpreted() else 4096
    blocks = cdiv(n, block)
    n_dead = torch.empty(S, blocks, device=device, dtype=torch.int32)
    dead = tuple(t.contiguous().view(torch.uint8) if t.dtype == torch.bool else t.contiguous() for t in dead)
    marks = mask.view(torch.uint8)
    launch(_mark_dead_kernel, (blocks, S))(dead, marks, n_dead, threshold, n, S=S, BLOCK=block, num_warps=4)
    launch(_dead_first_kernel, (blocks, S))(
        marks, n_dead, ids, count, n, count.stride(0), BLOCKS=next_power_of_2(blocks), BLOCK=block, num_warps=4
    )
    return ids, count, mask


def _dead_first_torch(dead, threshold):
    ids, count, mask = _dead_first_fake(dead, threshold)
    torch.gt(torch.stack(list(dead)), threshold, out=mask)
    ids.copy_(mask.byte().argsort(dim=1, descending=True, stable=True))
    count.copy_(mask.sum(1))
    return ids, count, mask


def _dead_first_fake(dead, threshold):
    S, n = len(dead), dead[0].numel()
    # every count 16-byte aligned, so kernels that read one are compiled once
    count = dead[0].new_empty(S, 4, dtype=torch.int32)[:, 0]
    return dead[0].new_empty(S, n, dtype=torch.int32), count, dead[0].new_empty(S, n, dtype=torch.bool)


dead_first = register(
    "dead_first",
    "(Tensor[] dead, int threshold, str impl) -> (Tensor, Tensor, Tensor)",
    torch_impl=_dead_first_torch,
    triton_impl=_dead_first_triton,
    fake=_dead_first_fake,
)
dead_first.__doc__ = """List the latents of each stream with the dead ones first, and count the dead.

Args:
    dead: int64 [N] for each stream, counters, or bool [N].
    threshold: latents whose counter is greater are dead; 0 for bool.
    impl: "triton" or "torch".

Returns:
    ids int32 [S, N], dead and live each in ascending order; count int32 [S]; bool [S, N], which latents are dead.
"""
