"""Batches of several replicas: rows are dealt to lanes, and each replica reads its part of every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch import Tensor

from ..core.numerics import even_parts
from ..core.validation import check_bool, check_device, check_int, require
from .features import Features
from .loader import MEMORY, Batch, Loader


class Lanes:
    """Batches of a run, of which every replica reads its part.

    The rows are dealt to `lanes` as consecutive parts that differ by at most one row. Every lane is a `Loader` over its
    part, with an order of its own; a batch of the run is the next batch_size / lanes rows of each lane side by side.
    The order depends on the number of lanes, not on the number of replicas that share the batches out.

    Args:
        features: source of the rows.
        batch_size: rows of a batch of the run; divisible by `lanes` and by `replicas`.
        generator: torch.Generator on the CPU, the source of randomness of a single lane, see `Loader`. Several lanes
            draw each epoch from `seed`, the epoch and the lane, and leave it alone.
        lanes: number of lanes.
        replica: number of the replica that reads.
        replicas: number of replicas; each takes a consecutive part of every batch: its own lane where there are as many
            lanes, else several or a part of one, which its replicas then all read.
        seed: of the order of several lanes.
        shuffle: see `Loader`; with several lanes "official" and "none" hold for each lane.
        drop_last: leave the smaller last batch out.
        memory: bytes for the windows of a lane, see `Loader`.
        intervals: rows [start, stop) to deal; None: all.
        device: of the batches.

    Attributes:
        rows: number of rows, over all lanes.
        intervals: as given, or all rows.
        lanes: number of lanes.
        loaders: lane -> its loader, for the lanes of this replica.

    Raises:
        ValueError: as for `Loader`, or `batch_size` is not divisible.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        generator: torch.Generator,
        *,
        lanes: int = 1,
        replica: int = 0,
        replicas: int = 1,
        seed: int = 0,
        shuffle: str = "window",
        drop_last: bool = False,
        memory: int = MEMORY,
        intervals: Sequence[tuple[int, int]] | None = None,
        device: str | torch.device = "cpu",
    ):
        self.features, self.generator = features, generator
        self.lanes, self.replica, self.replicas = check_int("lanes", lanes, 1), replica, replicas
        size = self.batch_size = check_int("batch_size", batch_size, 1)
        divides = size % self.lanes == 0 and size % replicas == 0
        wanted = f"a multiple of {self.lanes} (lanes) and {replicas} (replicas)"
        require(divides, "batch_size", wanted, str(size))
        self.drop_last = check_bool("drop_last", drop_last)
        self.intervals = [(0, features.rows)] if intervals is None else [(start, stop) for start, stop in intervals]
        self.rows = sum(stop - start for start, stop in self.intervals)
        require(self.rows > 0, "intervals", "at least one row", "none")
        if drop_last:
            require(self.rows >= size, "batch_size", f"at most {self.rows}, the rows there are", str(size))
        parts = even_parts(self.rows, lanes)
        self._lane_rows = [stop - start for start, stop in parts]
        self._lane_size = size // lanes
        self._shares = [self._share(r * size // replicas, (r + 1) * size // replicas) for r in range(replicas)]
        self.loaders: dict[int, Loader] = {}
        for lane, _, _ in self._shares[replica]:
            if self._lane_rows[lane]:
                self.loaders[lane] = Loader(
                    features,
                    self._lane_size,
                    generator if lanes == 1 else torch.Generator(),
                    shuffle=shuffle,
                    drop_last=drop_last,
                    memory=memory,
                    intervals=_within(self.intervals, *parts[lane]),
                    device=device,
                    seed_of=None if lanes == 1 else partial(_seed_of, seed, lane),
                )
        self.device = check_device("device", device)

    def _share(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Places first..last - 1 of a batch as (lane, start, stop) within the lanes' parts of it."""
        size = self._lane_size
        lanes = range(first // size, -(-last // size))
        return [(n, max(first - n * size, 0), min(last - n * size, size)) for n in lanes]

    def __len__(self) -> int:
        """Number of batches in an epoch, the same for every number of lanes and replicas."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    @property
    def waited(self) -> float:
        """Seconds in which this replica waited for the disk."""
        return sum(loader.waited for loader in self.loaders.values())

    @property
    def resident(self) -> bool:
        """Whether all rows of this replica are held in memory."""
        return all(loader.resident for loader in self.loaders.values())

    def rows_of(self, number: int) -> tuple[int, ...]:
        """Return the valid rows of a batch for every replica.

        Args:
            number: of the batch in its epoch.
        """
        return tuple(sum(self._parts_of(share, number)) for share in self._shares)

    def _parts_of(self, share: list[tuple[int, int, int]], number: int) -> list[int]:
        """Rows of batch `number` in each part of a replica's share."""
        left = [min(self._lane_rows[lane] - number * self._lane_size, stop) - start for lane, start, stop in share]
        return [max(n, 0) for n in left]

    def epochs(self, first: int, last: int, skip: int = 0) -> Generator[Batch, None, None]:
        """Iterate over this replica's part of the batches of some epochs.

        Every replica gets as many batches, of as many rows, some of which may be padding: zeros behind the valid rows.

        Args:
            first: first epoch.
            last: one past the last epoch.
            skip: batches of epoch `first` to leave out.
        """
        if skip >= len(self) and self.lanes > 1:
            first, skip = first + 1, 0
        sources = {lane: loader.epochs(first, last, skip) for lane, loader in self.loaders.items()}
        if self.lanes == self.replicas == 1:
            return sources[0]
        return self._joined(first, last, skip, sources)

    def _joined(self, first: int, last: int, skip: int, sources: dict[int, Generator]) -> Generator[Batch, None, None]:
        state, share = self.generator.get_state(), self._shares[self.replica]
        if skip >= len(self):
            first, skip = first + 1, 0
        with ExitStack() as stack:
            for source in sources.values():
                stack.enter_context(closing(source))
            for epoch in range(first, last):
                for number in range(skip if epoch == first else 0, len(self)):
                    rows, pieces = self.rows_of(number), []
                    for (lane, start, _), n in zip(share, self._parts_of(share, number), strict=True):
                        if self._lane_rows[lane] > number * self._lane_size:
                            batch = next(b for b in sources[lane] if b.number < len(self))
                            assert (batch.epoch, batch.number) == (epoch, number), "lanes go side by side"
                            state = batch.epoch_state if self.lanes == 1 else state
                            pieces.append({s: x[start : start + n] for s, x in batch.x.items()})
                    x = self._padded(pieces, max(rows))
                    yield Batch(x, epoch, number, number == len(self) - 1, state, rows)

    def _padded(self, pieces: list[dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
        """Put pieces one behind the other and zeros behind them, `rows` in all."""
        if len(pieces) == 1 and len(next(iter(pieces[0].values()))) == rows:
            return pieces[0]
        padded = {}
        for s, d in self.features.widths.items():
            x = padded[s] = torch.zeros(rows, d, dtype=self.features.dtype, device=self.device)
            done = 0
            for piece in pieces:
                n = len(piece[s])
                x[done : done + n] = piece[s]
                done += n
        return padded


def _seed_of(seed: int, lane: int, epoch: int) -> int:
    """Seed of a lane's order in an epoch."""
    digest = hashlib.blake2b(f"{seed} {epoch} {lane}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _within(intervals: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Cut rows first..last - 1, counted through the intervals, out of them."""
    parts, passed = [], 0
    for start, stop in intervals:
        a, b = max(first - passed, 0) + start, min(last - passed, stop - start) + start
        if a < b:
            parts.append((a, b))
        passed += stop - start
    return parts
