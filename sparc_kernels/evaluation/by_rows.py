"""Rows divided among the processes of a run, whose results are those of one process.

Each process takes consecutive batches, the same ones as a single process would, so that every batch has the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core.numerics import even_parts
from ..distributed.processes import Processes, Refused, join
from ..metrics import Codes, Deal

ALONE = Processes(torch.device("cpu"), 0.0, 0.0, grouped=False)  # no other process takes part


def own_part(items: range, processes: Processes) -> range:
    """Return this process's part of a range; parts are consecutive and differ by at most one item."""
    part = items[slice(*even_parts(len(items), processes.size)[processes.rank])]
    return range(part.start, min(part.stop, items.stop), part.step)  # a slice's end may lie a step beyond


def dealt(processes: Processes) -> Deal:
    """Return a `Deal` that divides a range among the processes; all of them get the whole result."""

    def deal(items, work):
        own = work(own_part(items, processes))
        return own if processes.size == 1 else torch.cat(processes.share(own.cpu())).to(own.device)

    return deal


def codes_of_all(codes: dict[str, Codes], n_latents: int, device: torch.device, processes: Processes) -> dict:
    """Return the codes {s: Codes} of the rows of all processes, in their order, on every process.

    Args:
        codes: of the own rows; {} without rows.
        n_latents: N.
        device: of the result.
        processes: at least one has rows.
    """
    if processes.size == 1:
        return codes
    result = {}
    for s in next(names for names in processes.share([*codes]) if names):
        own = codes.get(s)
        ids = processes.share(None if own is None else own.indices.int().cpu())
        values = processes.share(None if own is None else own.values.cpu())
        whole = (torch.cat([part for part in parts if part is not None]).to(device) for parts in (ids, values))
        result[s] = Codes(next(whole).long(), next(whole), n_latents)
    return result


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[Processes]:
    """Context in which a command's processes work together, or a single one alone; they leave together.

    Args:
        args: its `device` becomes that of this process.

    Raises:
        SystemExit: with code 2, on all but the process that leads, where all refuse.
    """
    processes = join(args.device)
    if processes.grouped:
        args.device = str(processes.device)
    try:
        yield processes
        processes.finish()
    except Refused:
        processes.finish()
        if processes.leads:
            raise
        raise SystemExit(2) from None
    except BaseException as error:
        processes.fail(error)
        raise
    finally:
        processes.leave()
