"""Memory-mapped feature files of several streams: HDF5, safetensors, .npy or .pt, single files or shards.

Row i of every stream describes the same sample. Opening a file reads only the `indices` beside the features, which must
agree; `Features.check` reads all values once, and `loader.Loader` draws shuffled batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.validation import check_bool, check_tensor, fail, require
from ..launch.budgets import MAX_STREAMS
from .files import HDF5Rows, MappedRows, open_file
from .shards import Shards, absolute, is_pattern, matching, stream_label

Stream = str | Path | Sequence[str | Path] | Tensor  # file, pattern, list of files or tensor
_CHECK_BYTES = 8 << 20  # per read in `check`
_SHOWN = 10  # row numbers shown in a message


class TensorRows:
    """Rows of a tensor in memory.

    Args:
        x: [n, d] on the CPU.
    """

    chunk_rows, indices = 1, None

    def __init__(self, x: Tensor):
        self.x, (self.rows, self.width), self.dtype = x, x.shape, x.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop - 1, a view."""
        return self.x[start:stop]

    def close(self) -> None:
        """Do nothing; other sources close files."""


class RowNumbers(NamedTuple):
    """Numbers of some rows, for messages.

    Attributes:
        first: the first few numbers.
        total: how many rows there are.
    """

    first: list[int]
    total: int

    def add(self, start: int, where: Tensor) -> RowNumbers:
        """Return these rows and those of a mask `where`, bool [b], whose first entry is row `start`."""
        more = where.nonzero().flatten()
        return RowNumbers(self.first + (start + more[: _SHOWN - len(self.first)]).tolist(), self.total + len(more))

    def __str__(self) -> str:
        return ", ".join(map(str, self.first)) + ", ..." * (self.total > len(self.first))


class StreamSummary(NamedTuple):
    """Result of `Features.check` for one stream.

    Attributes:
        fingerprint: hash of the bytes read (all, or a sample), the shape and the dtype.
        zero: int64 [m], the rows read whose norm is 0, ascending; their loss is infinite and their batch skipped.
        what: name of these rows in messages; tells zero rows from rows whose squares underflow.
        read: int64 [r], the rows of a sample, ascending; None: all rows.
        n_read: number of rows read.
        spread: variance / mean square of the (normalised) rows, which converts an NMSE to explained variance.
    """

    fingerprint: str
    zero: Tensor
    what: str
    read: Tensor | None
    n_read: int
    spread: float

    @property
    def zero_rows(self) -> list[int]:
        """The first few of `zero`."""
        return self.zero[:_SHOWN].tolist()

    @property
    def n_zero_rows(self) -> int:
        """Number of rows whose norm is 0."""
        return len(self.zero)

    def within(self, intervals: Sequence[tuple[int, int]]) -> StreamSummary:
        """Restrict the row lists to intervals [start, stop), ascending and disjoint."""
        edges = torch.tensor(intervals, device="cpu").flatten()

        def inside(rows: Tensor) -> Tensor:
            return rows[torch.searchsorted(edges, rows, right=True) % 2 == 1]

        read = None if self.read is None else inside(self.read)
        n_read = sum(stop - start for start, stop in intervals) if read is None else len(read)
        return self._replace(zero=inside(self.zero), read=read, n_read=n_read)

    def zeros(self, rows: int) -> str:
        """Describe the zero rows for a message; `rows` is the number that a full check reads."""
        of = f"{self.n_read:,}{' rows read' * (self.n_read != rows)}"
        return f"{self.n_zero_rows:,} {self.what} ({RowNumbers(self.zero_rows, self.n_zero_rows)}) of {of}"


class Features:
    """Feature rows of several streams, paired by position.

    Args:
        streams: name -> path of a .h5, .hdf5, .safetensors, .npy, .pt or .pth file, or a floating tensor [n, d] on the
            CPU. HDF5: the dataset `features`; safetensors, a dict in .pt: the tensor `features` or the only one;
            "FILE:DATASET" selects another. `indices` [n] beside it, as the official scripts write them (HDF5: or of a
            group above), must equal those of the other streams; files without are not compared. Shards: a pattern
            such as "feats_*.npy", whose files differ in one number and count from 0 or 1, the same in every stream, or
            are numbered by the rows before them; or a list of paths in the order of their rows.
        normalize: divide every row by (its norm + 1e-8), as the official loader does; zero rows stay zero.
        dtype: of the rows that `read` returns: float32 or float64.

    Attributes:
        rows: n.
        widths: {s: d_s}, the d_streams of an `AlignedSAE`.
        paths: {s: absolute path, pattern or list of paths; None for a tensor}.

    Raises:
        ValueError: a file or tensor is unusable, rows of two streams describe different samples, or `indices` end in
            zeros, as an interrupted extraction leaves them; the message names the stream and the file.
        ImportError: a file needs h5py or safetensors (the extra `train`).
    """

    def __init__(self, streams: Mapping[str, Stream], normalize: bool = True, dtype=torch.float32):
        ok, expected = isinstance(streams, Mapping), f"a dict of 1 to {MAX_STREAMS} streams, name to file"
        require(ok, "streams", expected, streams)
        require(0 < len(streams) <= MAX_STREAMS, "streams", expected, f"{len(streams)} streams")
        require(dtype in (torch.float32, torch.float64), "dtype", "torch.float32 or torch.float64", repr(dtype))
        self.normalize, self.dtype = check_bool("normalize", normalize), dtype
        self.sources, self._checked = {}, False
        try:
            for name, value in streams.items():
                self.sources[name] = _open(name, value)
                self._check_rows(streams, name)
        except BaseException:
            self.close()
            raise
        for source in self.sources.values():
            source.indices = None  # no longer needed: n numbers
        self.rows = source.rows
        self.widths = {s: source.width for s, source in self.sources.items()}
        self.paths = {s: None if isinstance(x, Tensor) else absolute(x) for s, x in streams.items()}

    def _check_rows(self, streams, s: str) -> None:
        """Check that the stream just opened has the same samples in its rows as the streams before it."""
        label, source = stream_label(s, streams[s]), self.sources[s]
        first, *_ = self.sources
        rows = self.sources[first].rows
        if source.rows != rows:
            fail(label, f"{rows:,} rows as in {stream_label(first, streams[first])}", f"{source.rows:,} rows")
        begins = {o: x.begin for o, x in self.sources.items() if isinstance(x, Shards) and x.begin is not None}
        for other, begin in begins.items():
            if begins.get(s, begin) != begin:
                expected = f"shards from number {begin} on as in {stream_label(other, streams[other])}"
                fail(label, expected, f"{begins[s]} as the first: name the files one by one where none is missing")
        numbered = next((o for o in self.sources if self.sources[o].indices is not None), s)
        if numbered != s and source.indices is not None:
            had, got, source.indices = self.sources[numbered].indices, source.indices, None
            for row in np.flatnonzero(had != got)[:1]:
                expected = f"`indices` {had[row]} in row {row:,} as in {stream_label(numbered, streams[numbered])}"
                fail(label, expected, f"{got[row]}: rows are paired by position, and these are other samples")

    def require_widths(self, widths: Mapping[str, int], what: str) -> Features:
        """Check the streams and their widths, and adopt the given order of streams.

        Args:
            widths: stream name -> expected width.
            what: what has these widths, for messages.

        Returns:
            self.

        Raises:
            ValueError: other streams or another width.
        """
        got = ", ".join(self.sources)
        require(set(self.sources) == set(widths), "streams", f"{', '.join(widths)}, the streams of {what}", got)
        for s, d in widths.items():
            if self.widths[s] != d:
                fail(stream_label(s, self.paths[s]), f"width {d} as in {what}", f"width {self.widths[s]}")
        self.sources = {s: self.sources[s] for s in widths}
        self.widths = dict(widths)
        return self

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return consecutive rows of every stream, normalised if `normalize`.

        Args:
            start: first row.
            stop: one past the last row.

        Returns:
            {s: [stop - start, d_s]} of `dtype`.
        """
        return {s: self.read_stream(s, start, stop) for s in self.sources}

    def read_stream(self, s: str, start: int, stop: int) -> Tensor:
        """Return rows start..stop - 1 of one stream, as `read` does."""
        x = self.sources[s].read(start, stop).to(self.dtype)
        return normalized(x) if self.normalize else x

    def batches(self, batch_size: int, starts: range | None = None):
        """Iterate once over all rows in order, after a full `check` unless one was done.

        Args:
            batch_size: rows of a batch; the last may be smaller.
            starts: first rows of some consecutive batches, which alone are read; None: all.

        Yields:
            (first row, {s: [b, d_s]}).
        """
        starts = range(0, self.rows, batch_size) if starts is None else starts
        if not self._checked:
            self.check(rows=self.interval(starts))
        for start in starts:
            yield start, self.read(start, min(start + batch_size, self.rows))

    def interval(self, starts: range) -> tuple[int, int]:
        """Return the rows [start, stop) of consecutive batches, by their first rows; (0, 0) for none."""
        return (starts[0], min(starts[-1] + starts.step, self.rows)) if starts else (0, 0)

    def check(self, full: bool = True, rows: tuple[int, int] | None = None) -> dict[str, StreamSummary]:
        """Read all features once, or a sample, and check their values.

        Args:
            full: read everything; False: 256 pieces spread over the rows.
            rows: [start, stop) of the rows to read, with `full`; None: all. Checksums of whole files are compared with
                the first row.

        Returns:
            A summary of each stream.

        Raises:
            ValueError: rows hold NaN or infinity, or are too large: their values overflow `dtype`, or their norm does
                with `normalize` (they would become 0); with `full` also values of a `.pt` file with another checksum.
                The message names the stream and the first such rows.
        """
        summaries = {s: self.check_stream(s, full, rows) for s in self.sources}
        self._checked = self._checked or full
        return summaries

    def check_stream(self, s: str, full: bool = True, rows: tuple[int, int] | None = None) -> StreamSummary:
        """Check one stream, as `check` does.

        Args:
            s: its name.
            full: read everything; False: 256 pieces.
            rows: as of `check`.
        """
        begin, end = (0, self.rows) if rows is None else rows
        label, source = stream_label(s, self.paths[s]), self.sources[s]
        if full and begin == 0 < end and isinstance(source, (MappedRows, Shards)):
            source.check(label)
        size = max(1, _CHECK_BYTES // (source.width * source.dtype.itemsize))
        starts: Sequence[int] = range(begin, end, size)
        if not full and len(starts) > 1:
            size = min(size, 64)
            pieces = {int(p) for p in np.linspace(0, self.rows - size, 256)}
            firsts = source.starts.tolist() if isinstance(source, Shards) else ()  # ends with `rows`
            starts = sorted(pieces.union(first for first in firsts if first < self.rows))
        digest = hashlib.blake2b(f"{source.rows} {source.width} {source.dtype}".encode(), digest_size=16)
        bad = large = RowNumbers([], 0)
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        zero, sample, tiny, name = [none], [none], False, str(self.dtype).removeprefix("torch.")
        total, power, count = torch.zeros(source.width, dtype=torch.float64, device="cpu"), 0.0, 0
        stop, sampled = 0, not full and len(starts) > 1
        for start in starts:
            seen = max(stop - start, 0)  # overlap with the piece before
            raw = source.read(start, min(start + size, end)).contiguous()
            digest.update(raw.view(torch.uint8).numpy())
            x = raw.to(self.dtype)
            norm, first, stop = torch.linalg.vector_norm(x, dim=1), start + seen, start + len(x)
            at = (norm[seen:] == 0).nonzero().flatten()
            if len(at):
                zero, tiny = [*zero, first + at], tiny or bool(raw[seen:][at].any())
            if sampled:
                sample.append(torch.arange(first, stop, device="cpu"))
            if not norm.isfinite().all():  # the norm may overflow although the values do not
                finite, fits = raw.isfinite().all(1), norm.isfinite() if self.normalize else x.isfinite().all(1)
                bad, large = bad.add(first, ~finite[seen:]), large.add(first, (finite & ~fits)[seen:])
            x = normalized(x) if self.normalize else x
            total += x.sum(0, dtype=torch.float64)
            power += float(x.square().sum(dtype=torch.float64))
            count += len(x)
        what = "norm fits" if self.normalize else "values fit"
        expected = f"rows whose {what} {name}"
        unfit = (bad, "finite features", "NaN or infinity"), (large, expected, "too large features")
        for those, wanted, got in unfit:
            if those.total:
                place = f" (the first is {source.place(those.first[0])})" if isinstance(source, Shards) else ""
                fail(label, wanted, f"{got} in {those.total:,} rows: {those}{place}")
        spread = 1 - float((total / count).square().sum()) / (power / count) if power else 0.0
        read, words = torch.cat(sample) if sampled else None, f"rows whose norm is 0 in {name}" if tiny else "zero rows"
        n_read = end - begin if read is None else len(read)
        return StreamSummary(digest.hexdigest(), torch.cat(zero), words, read, n_read, max(spread, 0.0))

    def describe(self, summaries: Mapping[str, StreamSummary]) -> dict[str, dict]:
        """Describe the source and content of each stream for a manifest.

        Args:
            summaries: result of `check`.
        """
        return {
            s: {
                "path": _as_text(self.paths[s]),
                "rows": source.rows,
                "width": source.width,
                "dtype": str(source.dtype).removeprefix("torch."),
                "fingerprint": summaries[s].fingerprint,
                **({"shards": source.listed()} if isinstance(source, Shards) else {}),
            }
            for s, source in self.sources.items()
        }

    def close(self) -> None:
        """Close all files."""
        for source in self.sources.values():
            source.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _as_text(path: Path | list[Path] | None) -> str | list[str] | None:
    if isinstance(path, list):
        return [str(p) for p in path]
    return None if path is None else str(path)


def normalized(x: Tensor) -> Tensor:
    """Divide rows of x [n, d] by (their norm + 1e-8)."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)


def _open(name: str, value):
    what = f"streams[{name!r}]"
    if isinstance(value, Tensor):
        check_tensor(what, value, ("n", "d"))
        require(value.layout == torch.strided, what, "a dense tensor", f"one of layout {value.layout}")
        require(value.device.type == "cpu", what, "a tensor on the CPU", value)
        require(value.numel() > 0, what, "at least one row and one column", value)
        return TensorRows(value.detach())
    several = isinstance(value, (list, tuple)) and len(value) > 0
    ok = all(isinstance(path, (str, os.PathLike)) for path in (value if several else [value]))
    require(ok, what, "a path, a list of paths or a torch.Tensor [n, d]", value)
    label = stream_label(name, value)
    source: MappedRows | HDF5Rows | Shards
    if several or is_pattern(Path(value)):
        paths, series = ([Path(path) for path in value], None) if several else matching(label, Path(value))
        source = Shards(name, paths, label, series)
    else:
        source = open_file(label, Path(value))
    if not source.rows:
        source.close()
        fail(label, "at least one row and one column", f"shape [0, {source.width}]")
    return source
