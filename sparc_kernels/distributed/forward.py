"""A forward over latents that are divided among ranks: exact selection, the own latents' values, the counters."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..nn.forward import EncodeSettings
from ..ops.dead import count_fired_, dead_first
from ..ops.encode import centre_for, gather_codes
from ..ops.records import ABSENT, EncoderParams, SparseCodes
from ..ops.selection import keys_dtype, select_each_keys, select_keys, topk_positions
from .ranks import Ranks


class ShardedCodes:
    """Codes of a forward whose latents are divided among ranks.

    Attributes:
        centred: [B, d_s] of each stream.
        ids: int64 [B, k] or [S, B, k], the selected latents of all ranks.
        codes: those of this rank's block, by their place in it, where they are in `ids`; elsewhere ABSENT.
        aux_ids: int64 [S, B, auxk], AuxK's latents of all ranks, ABSENT where too few are dead; None without AuxK.
        aux: AuxK's codes of this rank's block.
    """

    def __init__(self, centred: list[torch.Tensor], ids: torch.Tensor, codes: SparseCodes):
        self.centred, self.ids, self.codes = centred, ids, codes
        self.aux_ids: torch.Tensor | None = None
        self.aux: SparseCodes | None = None


def encode(
    xs: list[torch.Tensor],
    encoder: EncoderParams,
    counters: list[torch.Tensor],
    settings: EncodeSettings,
    *,
    ranks: Ranks,
    n_latents: int,
    valid: int,
) -> ShardedCodes:
    """Select latents among those of all ranks and gather the values of the own ones, without gradients.

    Args:
        xs: [B, d_s] of S streams.
        encoder: this rank's block of their encoders.
        counters: int64 [n], the block's, of S streams.
        settings: of the forward.
        ranks: that the latents are divided among.
        n_latents: N, of all ranks.
        valid: rows before the padding.
    """
    k, topk_type, auxk, lists, counts, fires_above, dead_after, impl = settings
    blocks, local = ranks.blocks(n_latents), topk_type == "local"
    start, stop = blocks[ranks.shard]
    centred = centre_for(xs, encoder.w_encs, encoder.pre_biases, impl)

    def own(ids: torch.Tensor) -> SparseCodes:
        inside = (ids >= start) & (ids < stop)
        indices = torch.where(inside, ids - start, ABSENT)
        if valid < indices.shape[-2]:
            indices[..., valid:, :] = ABSENT
        return gather_codes(SparseCodes(indices, None), centred, encoder, lists, impl)

    sizes = [min(k, b - a) for a, b in blocks]
    op, shape = (select_each_keys, (len(xs),)) if local else (select_keys, ())
    keys = xs[0].new_empty(*shape, len(xs[0]), sizes[ranks.shard], dtype=keys_dtype(xs[0].dtype, impl))
    ids = op(centred, list(encoder.w_encs), list(encoder.latent_biases), sizes[ranks.shard], None, None, keys, impl)
    ids = _merge(ids + start, keys, k, sizes, ranks, impl)
    result = ShardedCodes(centred, ids, own(ids))
    chosen = None
    # officially AuxK reads the counters before the update in local mode, after it in global mode
    if auxk and local:
        chosen = dead_first(counters, dead_after, impl)
    if counts:
        _count(counters, result.codes, fires_above, ranks, impl)
    if auxk:
        order, n_dead, _ = chosen or dead_first(counters, dead_after, impl)
        sizes = [min(auxk, b - a) for a, b in blocks]
        mine = sizes[ranks.shard]
        keys = keys.new_empty(len(xs), len(xs[0]), mine)
        ids = select_each_keys(
            centred, list(encoder.w_encs), list(encoder.latent_biases), mine, order, n_dead, keys, impl
        )
        exists = torch.arange(mine, device=ids.device) < n_dead[:, None, None]
        ids = _merge(torch.where(exists, ids + start, ABSENT), keys, auxk, sizes, ranks, impl)
        result.aux_ids, result.aux = ids, own(ids)
    return result


def _merge(ids, keys, k, sizes, ranks: Ranks, impl: str) -> torch.Tensor:
    """Select the k best of all ranks' candidates, ties to the lower id.

    Args:
        ids: int64 [..., B, own size], this rank's candidates, descending, ties in ascending order.
        keys: their pre-activations.
        k: how many to select.
        sizes: number of candidates of each rank.
        ranks: that have candidates.
        impl: "triton" or "torch".

    Returns:
        int64 [..., B, k], descending.
    """
    most, mine = max(sizes), sizes[ranks.shard]
    ids = ids.to(torch.int32)
    if mine < most:  # one shape on every rank; the columns are dropped below
        ids, keys = (torch.nn.functional.pad(x, (0, most - mine)) for x in (ids, keys))
    sent = ranks.latents.gather(keys, "keys"), ranks.latents.gather(ids, "ids")
    # side by side in the order of the ranks: among equal keys, a lower position is a lower id
    keys, ids = (
        torch.cat([part[..., :size] for part, size in zip(every.wait(), sizes, strict=True)], -1) for every in sent
    )
    places = topk_positions(keys.flatten(0, -2), k, impl).view(*keys.shape[:-1], k)
    return ids.gather(-1, places).long()


def _count(counters, codes: SparseCodes, fires_above: float, ranks: Ranks, impl: str) -> None:
    """Update the counters of the block: a latent fired if it did in any replica."""
    if ranks.data is None:
        count_fired_(counters, codes.indices, codes.gathered, fires_above, impl)
        return
    fresh = counters[0].new_ones(len(counters), len(counters[0]))  # 1 where a latent fires, 2 elsewhere
    count_fired_(list(fresh), codes.indices, codes.gathered, fires_above, impl)
    fired = ranks.data.reduce_((fresh == 1).to(torch.uint8), dist.ReduceOp.MAX, "fired").wait()
    for counter, mask in zip(counters, fired.bool(), strict=True):
        counter.add_(1).masked_fill_(mask, 1)
