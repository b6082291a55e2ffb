"""What a run trains and validates on: opened, checked, and drawn in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch

from ..core.validation import fail, require
from ..distributed.processes import Processes
from ..io.features import Features, Stream, StreamSummary
from ..io.lanes import Lanes
from ..io.shards import stream_label
from .config import TrainConfig

_HELD_OUT_PIECE = 256  # consecutive rows held out together, since neighbours are often similar


class RunData:
    """Features and loaders of a run.

    Args:
        config: settings of the run.
        streams: name -> feature file, its shards or tensor.
        val_streams: the same streams of other samples; None: `val_fraction` of the rows is held out.
        device: of the batches.
        closing: closes the files.
        lanes: among which the rows are dealt, see `Lanes`.
        replica: number of the replica that this process belongs to.
        replicas: their number.

    Attributes:
        features: to train on.
        loader: of the rows to train on.
        val_features: to validate on; None: there are none.
        val_loader: of the rows to validate on, or None.
        rng: generator of the order of the rows of a single lane.
        described: of both parts, as `Features.describe`, for the manifest; set by `check`.
        spread: variance by stream of the features to train on, as `StreamSummary.spread`; set by `check`.
        val_spread: the same of the features to validate on.

    Raises:
        ValueError: a file or its content is wrong; the message names it.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        streams: Mapping[str, Stream],
        val_streams: Mapping[str, Stream] | None,
        device: torch.device,
        closing: ExitStack,
        lanes: int = 1,
        replica: int = 0,
        replicas: int = 1,
    ):
        self.config = config
        self.features = Features(streams, config.normalize, config.dtype)
        closing.callback(self.features.close)
        self.val_features: Features | None = None
        intervals = held_out = None
        if val_streams:
            require(config.val_fraction == 0, "val_fraction", "0 where there are files to validate on", "both")
            self.val_features = Features(val_streams, config.normalize, config.dtype)
            closing.callback(self.val_features.close)
            self.val_features.require_widths(self.features.widths, "the training data")
        elif config.val_fraction:
            self.val_features = self.features
            intervals, held_out = split(self.features.rows, config.val_fraction, config.seed)
        self.rng = torch.Generator().manual_seed(config.seed)
        dealt = partial(
            Lanes,
            lanes=lanes,
            replica=replica,
            replicas=replicas,
            seed=config.seed,
            device=device,
        )
        self.loader = dealt(
            self.features,
            config.batch_size,
            self.rng,
            shuffle=config.shuffle,
            drop_last=config.drop_last,
            memory=config.memory,
            intervals=intervals,
        )
        self.val_loader: Lanes | None = None
        if self.val_features is not None:
            self.val_loader = dealt(
                self.val_features,
                config.batch_size,
                self.rng,
                shuffle="official" if config.shuffle == "official" else "none",
                intervals=held_out,
            )

    def check(self, full: bool, processes: Processes) -> None:
        """Check the features for NaN and infinity, and summarise them.

        Several processes first compare a sample of what each of them reads; then each reads all rows of some streams.

        Args:
            full: read all rows, not a sample.
            processes: of the run.

        Raises:
            ValueError: there are some, and the message names the file and the rows; or a process has other data.
        """
        parts = {"train": self.features}
        if self.val_features is not None and self.val_features is not self.features:
            parts["validation"] = self.val_features
        summaries: dict[str, dict[str, StreamSummary]] = {}
        with processes.together():
            summaries = {part: features.check(full and not processes.grouped) for part, features in parts.items()}
        if processes.grouped:
            described = {part: features.describe(summaries[part]) for part, features in parts.items()}
            processes.require_same(
                {
                    f"{part} stream {s!r}: {key}": value
                    for part, streams in described.items()
                    for s, stream in streams.items()
                    for key, value in stream.items()
                    if key != "path"  # of each machine
                }
            )
            if full:
                summaries = self._check_shares(parts, processes)
        self.described = {part: features.describe(summaries[part]) for part, features in parts.items()}
        self._summaries, self._val_summaries = summaries["train"], summaries.get("validation", summaries["train"])
        self.spread = {s: summary.spread for s, summary in self._summaries.items()}
        self.val_spread = {s: summary.spread for s, summary in self._val_summaries.items()}

    def _check_shares(self, parts: dict[str, Features], processes: Processes) -> dict[str, dict[str, StreamSummary]]:
        """Check all rows, each process those of some streams."""
        streams, own = [(part, s) for part, features in parts.items() for s in features.widths], {}
        with processes.together():
            for part, s in streams[processes.rank :: processes.size]:
                own[part, s] = parts[part].check_stream(s, full=True)
        found = {name: summary for some in processes.share(own) for name, summary in some.items()}
        return {part: {s: found[part, s] for s in features.widths} for part, features in parts.items()}

    def check_zero_rows(self, tell: Callable[[str], None]) -> None:
        """Report zero rows, which make a batch's loss infinite.

        Args:
            tell: called with a note for each part that has some.

        Raises:
            ValueError: too many batches would be skipped.
        """
        self._check_zero_rows(self._summaries, self.loader, tell)
        if self.val_loader is not None:
            self._check_zero_rows(self._val_summaries, self.val_loader, tell)

    def _check_zero_rows(self, summaries: dict[str, StreamSummary], loader: Lanes, tell: Callable[[str], None]) -> None:
        affected = {s: summary.within(loader.intervals) for s, summary in summaries.items() if summary.n_zero_rows}
        affected = {s: summary for s, summary in affected.items() if summary.n_zero_rows}
        if not affected:
            return
        who = " and ".join(stream_label(s, loader.features.paths[s]) for s in affected)
        text = " and ".join(summary.zeros(loader.rows) for summary in affected.values())
        rows = len(torch.cat([summary.zero for summary in affected.values()]).unique())  # in any of the streams
        part = min(1, rows / min(summary.n_read for summary in affected.values()))
        share = 1 - (1 - part) ** min(self.config.batch_size, loader.rows)
        if loader is self.val_loader:
            who, left_out = f"validation {who}", "left out of val_loss"
            require(share <= 0.5, who, "few zero rows", f"{text}: most batches would have no finite loss")
        else:
            most = (share if self.config.shuffle == "window" else part) > 0.5  # unshuffled they may be neighbours
            steps, limit, left_out = self.config.steps(len(loader)), self.config.max_skipped, "skipped, as officially"
            expected = share * steps
            if expected > limit or most:
                got = f"{text}: without a finite loss, about {expected:,.0f} of {steps:,} batches would be skipped"
                fail(who, f"few zero rows (max_skipped {limit:,})", got)
        tell(f"Note: {who} {'have' if len(affected) > 1 else 'has'} {text}; batches with one are {left_out}")


def split(rows: int, fraction: float, seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Hold out random pieces of up to 256 consecutive rows.

    Args:
        rows: number of rows.
        fraction: of the rows to hold out.
        seed: of the random choice.

    Returns:
        Intervals [start, stop) to train on, and to validate on.

    Raises:
        ValueError: no row is left to train on.
    """
    held_out = max(1, round(rows * fraction))
    require(held_out < rows, "val_fraction", "rows left to train on", f"{held_out} of {rows} rows held out")
    piece = max(1, min(_HELD_OUT_PIECE, held_out // 8))
    pieces = -(-rows // piece)
    chosen = torch.zeros(pieces, dtype=torch.bool, device="cpu")
    count = min(max(1, round(held_out / piece)), pieces - 1)
    chosen[torch.randperm(pieces, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]] = True
    parts: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for i, out in enumerate(chosen.tolist()):
        intervals, start, stop = parts[out], i * piece, min((i + 1) * piece, rows)
        if intervals and intervals[-1][1] == start:
            intervals[-1] = (intervals[-1][0], stop)
        else:
            intervals.append((start, stop))
    return parts
