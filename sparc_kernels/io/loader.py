"""Shuffled batches of feature files, prefetched by a thread within a memory limit."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..core.registry import on_device
from ..core.validation import check_device, check_int, fail, require
from .features import Features

MEMORY = 4 << 30  # bytes for the windows
SHUFFLES = ("window", "official", "none")
_BLOCK_BYTES = 1 << 20  # of the widest stream per read: large enough for sequential disk speed
_BLOCKS = 16  # per window, at least: fewer would shuffle too little
_AHEAD = 4  # prefetched batches


class Batch(NamedTuple):
    """One batch and its position.

    Attributes:
        x: {s: [b, d_s]} on the loader's device; rows behind the valid ones are padding.
        epoch: number of the epoch, from 0.
        number: of the batch in its epoch, from 0.
        last: whether it ends the epoch.
        epoch_state: the generator's state before the epoch's order was drawn.
        rows: valid rows of every replica (`lanes.Lanes`); one number for a `Loader`, whose rows are all valid.
    """

    x: dict[str, Tensor]
    epoch: int
    number: int
    last: bool
    epoch_state: Tensor
    rows: tuple[int, ...]


class Loader:
    """Batches of a `Features`, every row exactly once an epoch.

    Args:
        features: source of the rows.
        batch_size: rows of a batch; the last one of an epoch may be smaller.
        generator: torch.Generator on the CPU, the only source of randomness.
        shuffle: "window": blocks of consecutive rows are shuffled, gathered into windows of 16 or more blocks, and the
            rows shuffled within a window; if all rows fit into `memory` there is one window.
            "official": the official sampler: runs of `batch_size` consecutive rows in random order, the rest last.
            "none": in order.
        drop_last: leave the smaller last batch out.
        memory: bytes for two windows: the one being drawn from and the one being read.
        intervals: rows [start, stop) of this loader; None: all.
        device: of the batches; copies to CUDA use pinned memory and a stream of their own.
        seed_of: seed of an epoch's order by the epoch's number; None: epoch follows epoch in the generator's states.

    Attributes:
        waited: seconds in which the consumer waited for the disk.

    Raises:
        ValueError: `memory` is too small for a batch, or there are no rows or, with `drop_last`, no full batch.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        generator: torch.Generator,
        *,
        shuffle: str = "window",
        drop_last: bool = False,
        memory: int = MEMORY,
        intervals: Sequence[tuple[int, int]] | None = None,
        device: str | torch.device = "cpu",
        seed_of: Callable[[int], int] | None = None,
    ):
        self.features, self.generator, self.drop_last, self.seed_of = features, generator, drop_last, seed_of
        self.batch_size = check_int("batch_size", batch_size, 1)
        require(shuffle in SHUFFLES, "shuffle", f"one of {', '.join(map(repr, SHUFFLES))}", repr(shuffle))
        self.shuffle, self.device = shuffle, check_device("device", device)
        self.intervals = [(0, features.rows)] if intervals is None else [(start, stop) for start, stop in intervals]
        self.rows = sum(stop - start for start, stop in self.intervals)
        require(self.rows > 0, "intervals", "at least one row", "none")
        if drop_last:
            require(self.rows >= batch_size, "batch_size", f"at most {self.rows}, the rows there are", str(batch_size))
        self.resident = False  # whether one window holds all rows
        self._plan_memory(check_int("memory", memory, 1))
        self._kept: dict[str, Tensor] | None = None  # its rows, if resident
        self.waited = 0.0

    def _plan_memory(self, memory: int) -> None:
        """Choose the rows of a block and the blocks of a window."""
        sources = self.features.sources.values()
        row_bytes = sum(self.features.widths.values()) * self.features.dtype.itemsize
        resident = self.rows * row_bytes <= memory
        window = self.rows if resident else memory // (2 * row_bytes)
        if window < min(self.batch_size, self.rows):
            need = 2 * row_bytes * self.batch_size
            fail("memory", f"at least {need:,} bytes for batches of {self.batch_size}", f"{memory:,}")
        if self.shuffle != "window":
            self.block_rows, self.window_blocks = self.batch_size, 1
            return
        widest = max(source.width * source.dtype.itemsize for source in sources)
        block = max(1, min(_BLOCK_BYTES // widest, window // _BLOCKS))
        chunk = max(source.chunk_rows for source in sources)
        if block > chunk:
            block -= block % chunk  # so that no chunk is decompressed twice
        self.block_rows, self.window_blocks, self.resident = block, max(1, window // block), resident
        if resident:
            self.window_blocks = len(self._blocks())

    def _blocks(self) -> list[tuple[int, int]]:
        """[start, stop) of consecutive rows, at most block_rows each."""
        size = self.block_rows
        if self.shuffle == "official":  # blocks of whole batches; the rest of an interval is one block
            return [(a, min(a + size, stop)) for start, stop in self.intervals for a in range(start, stop, size)]
        return [
            (a, min(a - a % size + size, stop))  # cut at multiples of the size, on chunk boundaries
            for start, stop in self.intervals
            for a in [start, *range(start - start % size + size, stop, size)]
        ]

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def _draw(self, epoch: int) -> tuple[Tensor, list[tuple[list[tuple[int, int]], Tensor]]]:
        """Draw the order of an epoch; return the generator's state before it, too."""
        if self.seed_of is not None:
            self.generator.manual_seed(self.seed_of(epoch))
        return self.generator.get_state(), self._order()

    def _order(self) -> list[tuple[list[tuple[int, int]], Tensor]]:
        """Draw an epoch: for each window its blocks and an order of its rows, numbered through the blocks."""
        blocks = self._blocks()
        size = [stop - start for start, stop in blocks]
        if self.shuffle == "none":
            return [([block], torch.arange(n, device="cpu")) for block, n in zip(blocks, size, strict=True)]
        if self.shuffle == "official":
            whole = [b for b, n in zip(blocks, size, strict=True) if n == self.batch_size]
            rest = [b for b, n in zip(blocks, size, strict=True) if n != self.batch_size]
            order = [whole[i] for i in torch.randperm(len(whole), generator=self.generator, device="cpu").tolist()]
            return [([block], torch.arange(block[1] - block[0], device="cpu")) for block in order + rest]
        if self.resident:
            return [(blocks, torch.randperm(self.rows, generator=self.generator, device="cpu"))]
        order = [blocks[i] for i in torch.randperm(len(blocks), generator=self.generator, device="cpu").tolist()]
        windows = [order[i : i + self.window_blocks] for i in range(0, len(order), self.window_blocks)]
        return [(w, torch.randperm(sum(b - a for a, b in w), generator=self.generator, device="cpu")) for w in windows]

    # ---------------------------------------------------------------------------------------------------- the consumer

    def epochs(self, first: int, last: int, skip: int = 0) -> Generator[Batch, None, None]:
        """Iterate over the batches of some epochs.

        Epoch `first` is drawn from the generator's current state. Later epochs are drawn ahead of time: with more than
        one epoch, nothing else may use the generator meanwhile.

        Args:
            first: first epoch.
            last: one past the last epoch.
            skip: batches of epoch `first` to leave out.
        """
        return self._consume(_Worker(self, first, last, skip))

    def _consume(self, worker: _Worker) -> Generator[Batch, None, None]:
        try:
            while (item := self._next(worker)) is not None:
                yield item
        finally:
            worker.stop()

    def _next(self, worker: _Worker) -> Batch | None:
        started, starved = time.perf_counter(), worker.ready.empty() and not worker.held_up
        item = worker.ready.get()
        if starved:
            self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        if item is None or self.device.type != "cuda":
            return item
        return worker.send(item)


class _Worker:
    """The thread that reads windows and splits them into batches."""

    def __init__(self, loader: Loader, first: int, last: int, skip: int):
        self.loader, self.last = loader, last
        self.order: list[tuple[list[tuple[int, int]], Tensor]] | None
        self.epoch_state, self.order = loader._draw(first)
        # skip a whole epoch: a checkpoint at its end
        self.first, self.skip = first, skip
        if skip >= len(loader):
            self.first, self.skip, self.order = first + 1, 0, None
        self.ready: queue.Queue = queue.Queue(_AHEAD)
        self.stopped = threading.Event()
        self.buffers: list[dict] = [{}, {}]  # for this window and the next
        self.held_up = False  # blocked by copies to the GPU, not by the disk
        self.cuda = loader.device.type == "cuda"
        if self.cuda:
            self.stream = torch.cuda.Stream(loader.device)
            self.free: queue.Queue = queue.Queue()
            for _ in range(_AHEAD + 2):
                with on_device(loader.device):  # pinned memory belongs to this GPU's context
                    rows = {
                        s: torch.empty(loader.batch_size, d, dtype=loader.features.dtype, pin_memory=True, device="cpu")
                        for s, d in loader.features.widths.items()
                    }
                self.free.put((rows, None))
        self.thread = threading.Thread(target=self._run, name="sparc-loader", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.ready.get_nowait()
            except queue.Empty:
                self.thread.join(0.01)

    def send(self, item: Batch) -> Batch:
        """Copy a batch to the GPU and return its pinned buffer to the thread with the event of the copy."""
        slot, n = cast(tuple[dict[str, Tensor], int], item.x)  # of `_place`
        with torch.cuda.stream(self.stream):
            x = {s: rows[:n].to(self.loader.device, non_blocking=True) for s, rows in slot.items()}
            copied = self.stream.record_event()
        current = torch.cuda.current_stream(self.loader.device)
        current.wait_event(copied)
        for t in x.values():
            t.record_stream(current)
        self.free.put((slot, copied))
        return item._replace(x=x)

    def _run(self) -> None:
        try:
            for item in self._batches():
                self._put(item)
            self._put(None)
        except _Stopped:
            pass
        except BaseException as error:
            with contextlib.suppress(_Stopped):
                self._put(error)

    def _put(self, item) -> None:
        while not self.stopped.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        raise _Stopped

    def _windows(self) -> Iterator[_Window]:
        loader, skip = self.loader, self.skip * self.loader.batch_size
        for epoch in range(self.first, self.last):
            if self.order is None:
                self.epoch_state, self.order = loader._draw(epoch)
            state, order, self.order = self.epoch_state, self.order, None
            for i, (blocks, rows) in enumerate(order):
                if skip >= len(rows):  # consumed before the run was resumed
                    skip -= len(rows)
                    continue
                buffer = self.buffers[0]
                self.buffers.reverse()
                yield _Window(loader, buffer, blocks, rows[skip:], epoch=epoch, state=state, last=i == len(order) - 1)
                skip = 0

    def _batches(self) -> Iterator[Batch]:
        """Yield batches in order, reading the next window piece by piece between those of the current one."""
        loader, size, index = self.loader, self.loader.batch_size, self.skip
        windows, left = self._windows(), None  # left: rows of the last window, too few for a batch
        upcoming = next(windows, None)
        while (window := upcoming) is not None:
            window.read_until(1.0)
            if loader.resident:
                loader._kept = window.data
            upcoming = next(windows, None)
            done, total = 0, len(window.order)
            while done < total:
                taken = min(total - done, size - (len(next(iter(left.values()))) if left else 0))
                rows, done = window.order[done : done + taken], done + taken
                x = self._gather(window, rows, left)
                n = len(next(iter(x.values())))
                complete = n == size or (window.last and done == total)
                left = None if complete else x
                if complete and not (loader.drop_last and n < size):
                    yield Batch(self._place(x), window.epoch, index, index == len(loader) - 1, window.state, (n,))
                    index += 1
                if upcoming is not None:
                    upcoming.read_until(done / total)
            if window.last:
                index, left = 0, None

    def _gather(self, window: _Window, rows: Tensor, left) -> dict[str, Tensor]:
        x = {s: data.index_select(0, rows) for s, data in window.data.items()}
        return {s: torch.cat([left[s], x[s]]) for s in x} if left else x

    def _place(self, x: dict[str, Tensor]):
        """Return x for the CPU; for a GPU copy it to a pinned buffer, (buffer, number of rows)."""
        if not self.cuda:
            return x
        self.held_up = True
        slot, copied = self.free.get()
        if copied is not None:
            copied.synchronize()
        self.held_up = False
        n = len(next(iter(x.values())))
        for s, rows in slot.items():
            rows[:n].copy_(x[s])
        return slot, n


class _Window:
    """Blocks of rows, read one by one into `data`, {s: [rows, d_s]}, and the order in which to draw the rows."""

    def __init__(self, loader: Loader, buffer: dict, blocks, order: Tensor, *, epoch: int, state: Tensor, last: bool):
        self.loader, self.blocks, self.order = loader, blocks, order
        self.epoch, self.state, self.last = epoch, state, last
        self.read, self.rows = 0, 0
        kept = loader._kept
        if kept is None:
            rows = min(loader.block_rows * loader.window_blocks, loader.rows)  # of the largest window
            for s, d in loader.features.widths.items():
                if s not in buffer:
                    buffer[s] = torch.empty(rows, d, dtype=loader.features.dtype, device="cpu")
            self.data: dict[str, Tensor] = buffer
        else:
            self.data, self.read = kept, len(blocks)

    def read_until(self, fraction: float) -> None:
        """Read blocks until this fraction of them is in memory."""
        while self.read < fraction * len(self.blocks):
            start, stop = self.blocks[self.read]
            for s, data in self.data.items():
                data[self.rows : self.rows + stop - start] = self.loader.features.read_stream(s, start, stop)
            self.rows += stop - start
            self.read += 1


class _Stopped(Exception):
    """The consumer has stopped."""
