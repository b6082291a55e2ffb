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
from .records import EncoderParams, SparseCodes
from .selection import select


@triton.jit
def _fired_kernel(idx_ptr, values_ptr, fired_ptr, threshold, stride_idx, M, N, BLOCK: tl.constexpr):
    """fired[s, n] = 1 where a value exceeds the threshold; all writers store 1, so no atomics."""
    stream = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values_ptr + stream * M + offs, mask=offs < M, other=float("-inf"))
    hit = (offs < M) & (value > threshold)
    latent = tl.load(idx_ptr + stream * stride_idx + offs, mask=hit, other=0)
    tl.store(fired_ptr + stream * N + latent, tl.full((BLOCK,), 1, tl.int8), mask=hit & (latent >= 0) & (latent < N))


@triton.jit
def _count_kernel(counter_ptrs, fired_ptr, N, S: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    for s in tl.static_range(S):
        fired = tl.load(fired_ptr + tl.full((), s, tl.int64) * N + offs, mask=mask, other=0)
        steps = tl.load(counter_ptrs[s] + offs, mask=mask, other=0)
        tl.store(counter_ptrs[s] + offs, tl.where(fired != 0, 1, steps + 1), mask=mask)


def _count_fired_triton(counters, indices, values, threshold):
    S, n, M = len(counters), counters[0].numel(), values[0].numel()
    fired = torch.zeros(S, n, dtype=torch.int8, device=values.device)
    stride, block = (0 if indices.dim() == 2 else M), 1024
    launch(_fired_kernel, (cdiv(M, block), S))(
        indices.contiguous(), values.contiguous(), fired, threshold, stride, M, n, BLOCK=block, num_warps=4
    )
    launch(_count_kernel, (cdiv(n, block),))(tuple(counters), fired, n, S=S, BLOCK=block, num_warps=4)


def count_fired_torch(counters, indices, values, threshold):
    """Run `count_fired_` in torch; see there for the arguments."""
    for s, counter in enumerate(counters):
        n, idx = counter.shape[0], indices if indices.dim() == 2 else indices[s]
        # bucket n takes everything that did not fire: no data-dependent shape
        target = torch.where(values[s] > threshold, idx, n).reshape(-1)
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
    indices: int64 [B, k] shared by the streams, or [S, B, k].
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
        selected = select_dead(centre([x], [pre_bias], False, impl), encoder, [dead], auxk, impl)
    return selected.indices[0], values_of(x, encoder, selected, impl)


def select_dead(
    centred: list[torch.Tensor], encoder: EncoderParams, dead: list[torch.Tensor], auxk: int, impl: str
) -> SparseCodes:
    """Select the indices of `auxk_topk` for S streams; arguments are not checked.

    Args:
        centred: x - pre_bias, [B, d_s] each.
        encoder: encoders of the S streams.
        dead: bool [N] for each stream.
        auxk: how many latents per row.
        impl: "triton" or "torch".

    Returns:
        Codes with indices [S, B, auxk] and no values; `count` is the number of dead latents of each stream, on the
        device.
    """
    ids, count = dead_first(list(dead), impl)
    streams = zip(centred, encoder.w_encs, encoder.latent_biases, ids, count, strict=True)
    selected = [select([x], [w], [c], auxk, i, n, impl) for x, w, c, i, n in streams]
    return SparseCodes(torch.stack(selected), None, count)


@triton.jit
def _count_dead_kernel(dead_ptrs, n_dead_ptr, N, S: tl.constexpr, BLOCK: tl.constexpr):
    block, stream = tl.program_id(0), tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    for s in tl.static_range(S):
        if stream == s:
            dead = tl.load(dead_ptrs[s] + offs, mask=offs < N, other=0).to(tl.int32)
            tl.store(n_dead_ptr + s * tl.num_programs(0) + block, tl.sum(dead, 0))


@triton.jit
def _dead_first_kernel(
    dead_ptrs, n_dead_ptr, ids_ptr, count_ptr, N, stride_c, S: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    block, stream = tl.program_id(0), tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    blocks = tl.arange(0, BLOCKS)
    n_dead = tl.load(n_dead_ptr + stream * tl.num_programs(0) + blocks, mask=blocks < tl.num_programs(0), other=0)
    total = tl.sum(n_dead, 0)
    before = tl.sum(tl.where(blocks < block, n_dead, 0), 0)
    for s in tl.static_range(S):
        if stream == s:
            dead = tl.load(dead_ptrs[s] + offs, mask=mask, other=0).to(tl.int32)
            rank = before + tl.cumsum(dead, 0) - 1  # of this latent among the dead
            place = tl.where(dead != 0, rank, total + offs - rank - 1)
            tl.store(ids_ptr + tl.full((), s, tl.int64) * N + place, offs, mask=mask)
            if block == 0:
                tl.store(count_ptr + s * stride_c, total)


def _dead_first_triton(dead):
    S, n, device = len(dead), dead[0].numel(), dead[0].device
    ids, count = _dead_first_fake(dead)
    block = 16 if interpreted() else 4096
    blocks = cdiv(n, block)
    n_dead = torch.empty(S, blocks, device=device, dtype=torch.int32)
    masks = tuple(mask.contiguous().view(torch.uint8) for mask in dead)
    launch(_count_dead_kernel, (blocks, S))(masks, n_dead, n, S=S, BLOCK=block, num_warps=4)
    launch(_dead_first_kernel, (blocks, S))(
        masks, n_dead, ids, count, n, count.stride(0), S=S, BLOCKS=next_power_of_2(blocks), BLOCK=block, num_warps=4
    )
    return ids, count


def _dead_first_torch(dead):
    ids, count = _dead_first_fake(dead)
    ids.copy_(torch.stack(dead).byte().argsort(dim=1, descending=True, stable=True))
    count.copy_(torch.stack(dead).sum(1))
    return ids, count


def _dead_first_fake(dead):
    S, n = len(dead), dead[0].numel()
    # every count 16-byte aligned, so kernels that read one are compiled once
    return dead[0].new_empty(S, n, dtype=torch.int32), dead[0].new_empty(S, 4, dtype=torch.int32)[:, 0]


dead_first = register(
    "dead_first",
    "(Tensor[] dead, str impl) -> (Tensor, Tensor)",
    torch_impl=_dead_first_torch,
    triton_impl=_dead_first_triton,
    fake=_dead_first_fake,
)
dead_first.__doc__ = """List the latents of each stream with the dead ones first, and count the dead.

Args:
    dead: bool [N] for each stream.
    impl: "triton" or "torch".

Returns:
    ids int32 [S, N], dead and live each in ascending order; count int32 [S].
"""
