"""Dead latents: the counters, and AuxK's selection among the dead."""

from __future__ import annotations

import torch

from ._checks import check_indices, check_int, check_tensor, require
from ._launch import MAX_K
from ._ops import resolve_impl
from .encode import Selection, select_latents, values_of


@torch.no_grad()
def update_counters_(counters: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, threshold: float = 1e-3):
    """Steps since each latent last fired, updated in place from the sparse codes of one batch.

    Args:
        counters: int64 [N].  indices: int64 [B, k].  values: [B, k].
        threshold: a latent fires in a batch when one of its values is greater.

    Returns: counters.

    Equivalent to: `fired = (dense_codes > threshold).any(0); counters.add_(1); counters[fired] = 1`
    """
    ok = isinstance(counters, torch.Tensor) and counters.dtype == torch.int64 and counters.dim() == 1
    require(ok, "counters", "an int64 tensor of shape [N]", counters)
    check_tensor("values", values, ("B", "k"))
    n = counters.shape[0]
    check_indices("indices", indices, tuple(values.shape), n, counters.device)
    # one bucket more than there are latents takes everything that did not fire: no data-dependent shape
    target = torch.where(values > threshold, indices, n).reshape(-1)
    fired = torch.zeros(n + 1, dtype=torch.bool, device=counters.device).index_fill_(0, target, True)[:n]
    return counters.add_(1).masked_fill_(fired, 1)


def auxk_topk(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    pre_bias: torch.Tensor,
    latent_bias: torch.Tensor,
    dead: torch.Tensor,
    auxk: int,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The auxk dead latents of one stream with the largest pre-activations, and their activations.

    Only the dead columns are multiplied. Where they are fewer than auxk, live latents with value 0 fill the rows.

    Args:
        x: [B, d].  w_enc: [N, d].  pre_bias: [d].  latent_bias: [N].  dead: bool [N].  auxk: 1..min(N, 512).
        impl: as in `encode_topk`.

    Returns: indices int64 [B, auxk]; values [B, auxk], float32 (float64 for float64 inputs), differentiable in x,
    w_enc, pre_bias and latent_bias.

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
    selection = select_dead(x, w_enc, pre_bias, latent_bias, dead, auxk, impl)
    return selection.indices, values_of(x, w_enc, pre_bias, latent_bias, selection, impl)


def select_dead(x, w_enc, pre_bias, latent_bias, dead, auxk, impl) -> Selection:
    """`auxk_topk`'s indices on unchecked arguments; `count` is the number of dead latents, on the device."""
    ids = torch.argsort(dead, descending=True, stable=True).int()  # the dead first, ascending; then the live
    count = dead.sum(dtype=torch.int32)
    indices = select_latents([x], [w_enc], [pre_bias], [latent_bias], auxk, "global", impl, ids, count)
    return Selection(indices, count)
