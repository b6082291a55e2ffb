"""Files of several processes: blocks of latents, their places in the state of a run, errors that all ranks raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..core.validation import fail, first_line
from ..distributed.agreement import first_failure
from ..distributed.model import BLOCKED
from ..distributed.ranks import Ranks
from ..nn.optimizer import MOMENTS

PIECE = 1 << 27  # bytes that are sent, read or copied to the host at a time
Key = tuple[str, ...]  # place of a value in a run's nested state
T = TypeVar("T")


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

    def check(self, name: str, shape: torch.Size | None) -> None:
        """Raise a ValueError unless the whole tensor has a shape.

        Args:
            name: of the tensor, for the message.
            shape: that there is; None: there is no tensor.
        """
        if shape != self.shape:
            fail(name, f"shape {tuple(self.shape)}", "no such tensor" if shape is None else f"{tuple(shape)}")

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
    return next((dim for pattern, dim in BLOCKED.items() if name.startswith(pattern.partition("{}")[0])), None)


def latents_dim(key: Key) -> int | None:
    """Return the dimension of the latents of what is at a place in a run's state; None: it has none.

    Args:
        key: ("model", name) or ("optimizer", "state", name of a parameter, name of a moment) for what has latents.
    """
    if len(key) == 2 and key[0] == "model":
        return sharded_dim(key[1])
    moment = len(key) == 4 and key[:2] == ("optimizer", "state") and key[3] in MOMENTS
    return sharded_dim(key[2]) if moment else None


def flat(state: Mapping[str, Any], prefix: Key = ()) -> dict[Key, Any]:
    """Return the leaves of nested dicts with names as keys; other values and empty dicts are leaves.

    Args:
        state: the dicts.
        prefix: of all places.
    """
    leaves: dict[Key, Any] = {}
    for name, value in state.items():
        inner = isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value)
        leaves |= flat(value, (*prefix, name)) if inner else {(*prefix, name): value}
    return leaves


def nested(leaves: Mapping[Key, Any]) -> dict[str, Any]:
    """Return the nested dicts that have some leaves.

    Args:
        leaves: by place.
    """
    state: dict[str, Any] = {}
    for (*parents, last), value in leaves.items():
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return state


def by_name(state: dict) -> dict:
    """Return a run's state with names of parameters in the optimizer's, as torch.distributed.checkpoint has them.

    Args:
        state: as `RunState.state_dict` returns it, with numbers for parameters.
    """
    if "optimizer" not in state:
        return state
    names = [name for name in state["model"] if not name.startswith("stats_last_nonzero_")]  # in the order of numbers
    return _renamed(state, dict(enumerate(names)))


def by_id(state: dict) -> dict:
    """Return a run's state with numbers for parameters in the optimizer's.

    Args:
        state: as `by_name` returned it; tensors may be missing.
    """
    if "optimizer" not in state:
        return state
    names = [name for group in state["optimizer"]["param_groups"] for name in group["params"]]
    return _renamed(state, {name: i for i, name in enumerate(names)})


def _renamed(state: dict, new: dict) -> dict:
    optimizer = state["optimizer"]
    groups = [{**group, "params": [new[p] for p in group["params"]]} for group in optimizer["param_groups"]]
    moments = {new[p]: value for p, value in optimizer.get("state", {}).items()}
    return {**state, "optimizer": {**optimizer, "state": moments, "param_groups": groups}}


def marked(state: dict, ranks: Ranks) -> dict:
    """Return a run's state by names of parameters, with Blocks for the tensors of which every rank has a block.

    Args:
        state: as `RunState.state_dict` returns it.
        ranks: of the model.
    """
    if "model" not in state:
        return state
    leaves, n = flat(by_name(state)), state["model_config"]["n_latents"]
    start, _ = ranks.block(n)
    for key, value in leaves.items():
        if (dim := latents_dim(key)) is not None:
            leaves[key] = Block(value, dim, start, n)
    return nested(leaves)


def in_step(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run a function that may fail on some ranks, and raise on all if it does; every rank calls it.

    Args:
        ranks: that call.
        work: without collectives.

    Returns:
        Its result on this rank.

    Raises:
        OSError: the first of the ranks on which it failed did so with one; the message has its number.
        ValueError: likewise.
        RuntimeError: it failed otherwise.
    """
    result: Any = None
    failure: tuple | None = None
    try:
        result = work()
    except OSError as error:
        failure = OSError, error.errno, error.strerror or str(error), error.filename and str(error.filename)
    except ValueError as error:
        failure = ValueError, str(error)
    except Exception as error:
        failure = RuntimeError, f"{type(error).__name__}: {first_line(error)}"
    failed = first_failure(failure, ranks.objects)
    if failed is not None:
        rank, how, _ = failed
        raise _error(rank, *how)
    return result


def _error(rank: int, kind: type, *parts) -> Exception:
    """The error of a rank, with its number."""
    if kind is OSError:
        number, text, name = parts
        return OSError(number, f"{text} (rank {rank})", name)
    return kind(f"{parts[0]} (rank {rank})")
