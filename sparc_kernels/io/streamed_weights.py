"""Weights of a sharded model in one file of safetensors, which rank 0 writes piece by piece as the others send them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..distributed.ranks import Ranks
from ..nn.module import AlignedSAE
from .atomic import write_atomically
from .blocks import PIECE, in_step, sharded_dim

# in the order in which safetensors places them
_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip


class Place(NamedTuple):
    """A whole tensor's place in the file: its bytes begin at `start`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def stream_weights(model: AlignedSAE, path: Path, config: dict) -> None:
    """Write a sharded model's weights with the bytes that `save_weights` writes for the whole model.

    Every rank calls it. Rank 0 holds at most PIECE bytes of what it writes (or one row of a tensor), twice, at a time.

    Args:
        model: ShardedSAE on several ranks.
        path: the file.
        config: settings for the metadata.

    Raises:
        OSError: on every rank, if rank 0 cannot write.
    """
    ranks = model.ranks
    places = places_of(model)
    pieces = _pieces(model, ranks)

    def work():
        try:
            if ranks.rank == 0:
                write_atomically(path, lambda file: _write(file, config, places, pieces))
        finally:  # whatever happens to the file, the others' pieces are received
            for _ in pieces:
                pass

    in_step(ranks, work)


def places_of(model: AlignedSAE) -> dict[str, Place]:
    """Return the places of a model's whole tensors, in the order of the file."""
    whole = {}
    for name, value in model.state_dict().items():
        dim = sharded_dim(name)
        whole[name] = value.dtype, tuple(model.n_latents if d == dim else n for d, n in enumerate(value.shape))
    order, places, start = [*_NAMES], {}, 0
    for name in sorted(whole, key=lambda name: (order.index(whole[name][0]), name)):
        dtype, shape = whole[name]
        stop = start + math.prod(shape) * dtype.itemsize
        places[name] = Place(dtype, shape, start, stop)
        start = stop
    return places


def mapped_weights(path: Path, model: AlignedSAE) -> dict[str, torch.Tensor]:
    """Return the whole state_dict in a file that `stream_weights` wrote, in memory that is mapped to it.

    Args:
        path: the file.
        model: of which it is.
    """
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    state, places = {}, places_of(model)
    for name in model.state_dict():
        dtype, shape, start, stop = places[name]
        content = np.memmap(path, np.uint8, "c", begin + start, (stop - start,))
        state[name] = torch.from_numpy(content).view(dtype).reshape(shape)
    return state


def _header(config: dict, digest: str, places: Mapping[str, Place]) -> bytes:
    """What a file of safetensors begins with: the length of the JSON, padded to 8 bytes, and the JSON."""
    entries: dict[str, dict] = {"__metadata__": {"sparc_kernels": json.dumps(config | {"sha256": digest})}}
    for name, (dtype, shape, start, stop) in places.items():
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file, config: dict, places: Mapping[str, Place], pieces: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write tensors in the order of the digest, each at its place; at last the header, which has the digest."""
    digest = hashlib.sha256(json.dumps(config).encode())
    begin = len(_header(config, digest.hexdigest(), places))
    last = None
    for name, piece in pieces:
        dtype, shape, start, _ = places[name]
        if name != last:
            last = name
            digest.update(f"{name} {dtype} {shape}".encode())
            file.seek(begin + start)
        content = _bits(piece).numpy().data
        digest.update(content)
        file.write(content)
    file.seek(0)
    file.write(_header(config, digest.hexdigest(), places))


def _pieces(model: AlignedSAE, ranks: Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's whole tensors on rank 0, sorted by name, as consecutive pieces of rows on the CPU.

    The first replica's other ranks send their parts while they iterate; other replicas have nothing to do.
    """
    if ranks.replica > 0:
        return
    group, sizes = ranks.latents.group, [stop - start for start, stop in ranks.blocks(model.n_latents)]
    for name, value in sorted(model.state_dict().items()):
        dim, own = sharded_dim(name), value.detach()
        # consecutive rows with the shards that have parts of them, side by side
        owners = {None: [(len(own), [0])], 0: [(n, [shard]) for shard, n in enumerate(sizes)],
                  1: [(len(own), [*range(ranks.shards)])]}[dim]  # fmt: skip
        columns = sum(sizes) if dim == 1 else math.prod(own.shape[1:])
        step = max(1, PIECE // (columns * own.element_size()))
        for rows, shards in owners:
            for first in range(0, rows, step):
                last, parts = min(first + step, rows), []
                for shard in shards:
                    if ranks.shard == shard:
                        parts.append(own[first:last].contiguous())
                        if shard > 0:
                            dist.send(_bits(parts[0]), dist.get_global_rank(group, 0), group=group)
                    elif ranks.shard == 0:
                        shape = (sizes[shard],) if dim == 1 else own.shape[1:]
                        parts.append(own.new_empty(last - first, *shape))
                        dist.recv(_bits(parts[-1]), dist.get_global_rank(group, shard), group=group)
                if ranks.shard == 0:
                    yield name, (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).cpu()


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, as a view."""
    return x.view(-1).view(torch.uint8)
