"""What ranks tell each other as Python objects: facts that have to be the same, and failures of some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


class Refused(ValueError):
    """All ranks refuse together, with the same message."""


def objects_of(group: dist.ProcessGroup, value: _T) -> list[_T]:
    """Return the values of all ranks of a group, in their order; synchronises.

    Args:
        group: of torch.distributed.
        value: anything that can be pickled.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(facts: dict[str, Any], share: Callable[[Any], list]) -> None:
    """Compare facts between the ranks.

    Args:
        facts: name -> value with a meaningful repr; the same names on every rank, unless they differ too.
        share: returns the values of all ranks, in their order.

    Raises:
        Refused: a rank differs from most (from rank 0, of two); the message names it, the fact and both values.
    """
    every = share({name: repr(value) for name, value in facts.items()})
    for name in dict.fromkeys(name for ours in every for name in ours):
        values = [ours.get(name, "none") for ours in every]
        (most, count), *_ = Counter(values).most_common()
        if count == len(every):
            continue
        usual = most if 2 * count > len(every) else values[0]
        rank, like = (next(i for i, v in enumerate(values) if (v == usual) is same) for same in (False, True))
        raise Refused(f"rank {rank}: {name}: expected {usual} as on rank {like}, got {values[rank]}")


def first_failure(failure: _T | None, share: Callable[[Any], list]) -> tuple[int, _T, bool] | None:
    """Return the first rank on which work failed, how, and whether it did so on all; None: it failed on none.

    Args:
        failure: of this rank; None: its work is done.
        share: returns the values of all ranks, in their order.
    """
    every = share(failure)
    failed = [(rank, how) for rank, how in enumerate(every) if how is not None]
    return (*failed[0], all(how == failed[0][1] for how in every)) if failed else None
