"""Blocks of latents in the files of several processes: which tensors are sharded, and errors that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ..core.validation import first_line

PIECE = 1 << 27  # bytes that are sent, read or copied to the host at a time
_DIMS = {"encoders.": 0, "decoders.": 1, "latent_biases.": 0, "stats_last_nonzero_": 0}
T = TypeVar("T")


class Ranks(Protocol):
    """What files need to know of `sparc_kernels.distributed.Ranks`."""

    rank: int
    size: int
    shard: int
    replica: int
    latents: Any

    def block(self, n: int) -> tuple[int, int]:
        """Return start and stop of the own block of n latents."""

    def blocks(self, n: int) -> list[tuple[int, int]]:
        """Return start and stop of every shard's block of n latents."""


@dataclass(frozen=True, eq=False)
class Block:
    """A rank's block of a sharded tensor.

    Args:
        tensor: the block.
        dim: the dimension of the latents.
        start: first latent of the block.
        total: latents of the whole tensor.
    """

    tensor: torch.Tensor
    dim: int
    start: int
    total: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return torch.Size(self.total if d == self.dim else n for d, n in enumerate(self.tensor.shape))

    def pieces(self) -> list[Block]:
        """Split the block into blocks of at most PIECE bytes, or of one latent."""
        n, bytes_ = self.tensor.shape[self.dim], self.tensor.numel() * self.tensor.element_size()
        step = max(1, n * PIECE // max(1, bytes_))
        return [self.narrow(i, min(step, n - i)) for i in range(0, n, step)]

    def narrow(self, start: int, length: int) -> Block:
        """Return a part of the block.

        Args:
            start: first latent of the part, counted in the block.
            length: number of latents.
        """
        return Block(self.tensor.narrow(self.dim, start, length), self.dim, self.start + start, self.total)


def sharded_dim(name: str) -> int | None:
    """Return the dimension of the latents in a parameter or buffer of the model; None: it has none and is replicated.

    Args:
        name: in the state_dict.
    """
    return next((dim for prefix, dim in _DIMS.items() if name.startswith(prefix)), None)


def ranks_of(model: torch.nn.Module) -> Ranks | None:
    """Return the ranks of a model that is sharded over several processes; None for a model of one process."""
    ranks = getattr(model, "ranks", None)
    return ranks if ranks is not None and ranks.size > 1 else None


def gather(value: T) -> list[T]:
    """Return a small value of every rank, in the order of ranks; a collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(work: Callable[[], T]) -> T:
    """Run a function that may fail on some ranks; a collective.

    Args:
        work: runs without collectives, or takes part in all of them even if it fails.

    Returns:
        Its result on this rank.

    Raises:
        OSError: the function failed with one on the first of the failing ranks, which the message names.
        ValueError: likewise.
        RuntimeError: it failed otherwise.
    """
    result: Any = None
    failure: tuple | None = None
    try:
        result = work()
    except Exception as error:
        failure = told(error)
    for rank, told_error in enumerate(gather(failure)):
        if told_error is not None:
            raise_for(rank, told_error)
    return result


def told(error: BaseException) -> tuple:
    """Describe an error in plain values, which other ranks can read."""
    if isinstance(error, OSError) and error.errno is not None:
        return "OSError", error.errno, error.strerror, error.filename and str(error.filename)
    kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    text = str(error) if kind == "ValueError" else f"{type(error).__name__}: {first_line(error)}"  # type: ignore[arg-type]
    return kind, text


def raise_for(rank: int, told_error: tuple) -> None:
    """Raise what `told` described.

    Args:
        rank: on which it happened.
        told_error: the description.
    """
    kind, *parts = told_error
    if kind == "OSError":
        number, text, filename = parts
        raise OSError(number, f"{text} (rank {rank})", filename)
    raise (ValueError if kind == "ValueError" else RuntimeError)(f"{parts[0]} (rank {rank})")
