"""Feature files of each stream, one or in shards: HDF5, safetensors, .npy or .pt, memory-mapped, of any size.

Row i of every stream describes the same sample. Opening a file reads nothing but the `indices` beside the features,
which must agree; `Features.check` reads everything once, and `loader.Loader` draws shuffled batches.
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
from .files import MappedRows, open_file
from .shards import Shards, absolute, is_pattern, matching, stream_label

Stream = str | Path | Sequence[str | Path] | Tensor  # what the rows of one are given as
_CHECK_BYTES = 8 << 20  # read at a time by `check`
_SHOWN = 10  # positions of bad rows in a message


class TensorRows:
    """Rows of a tensor that is in memory already."""

    chunk_rows, indices = 1, None

    def __init__(self, x: Tensor):
        self.x, (self.rows, self.width), self.dtype = x, x.shape, x.dtype

    def read(self, start: int, stop: int) -> Tensor:
        return self.x[start:stop]

    def close(self) -> None:
        pass


class RowNumbers(NamedTuple):
    """Attributes: first: numbers of the first few rows of some kind.  count: how many there are."""

    first: list[int]
    count: int

    def add(self, start: int, where: Tensor) -> RowNumbers:
        """With the rows that the mask `where` [b] marks, counted from `start`."""
        more = where.nonzero().flatten()
        return RowNumbers(self.first + (start + more[: _SHOWN - len(self.first)]).tolist(), self.count + len(more))

    def __str__(self) -> str:
        return ", ".join(map(str, self.first)) + ", ..." * (self.count > len(self.first))


class StreamSummary(NamedTuple):
    """What `Features.check` found in one stream.

    Attributes:
        fingerprint: of the bytes read (all, or a sample), the shape and the dtype.
        zero: [m] the rows read whose norm is 0, in order; their loss is infinite and their batch skipped.
        what: they are, in words: zero rows, or others too, whose squares underflow.
        read: [r] the rows of a sample, in order; None: all.
        n_read: how many were read.
        spread: variance / mean square of the (normalised) rows, which turns an NMSE into explained variance.
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
        return len(self.zero)

    def within(self, intervals: Sequence[tuple[int, int]]) -> StreamSummary:
        """The same of the rows in these intervals [start, stop), which follow each other."""
        edges = torch.tensor(intervals, device="cpu").flatten()
        zero, read = (
            None if rows is None else rows[torch.searchsorted(edges, rows, right=True) % 2 == 1]
            for rows in (self.zero, self.read)
        )
        n_read = sum(stop - start for start, stop in intervals) if read is None else len(read)
        return self._replace(zero=zero, read=read, n_read=n_read)

    def zeros(self, rows: int) -> str:
        """For messages, where so many rows might have been read."""
        of = f"{self.n_read:,}{' rows read' * (self.n_read != rows)}"
        return f"{self.n_zero_rows:,} {self.what} ({RowNumbers(self.zero_rows, self.n_zero_rows)}) of {of}"


class Features:
    """Several streams of features, row by row of the same samples.

    Args:
        streams: name -> path of a .h5, .hdf5, .safetensors, .npy, .pt or .pth file, or a floating tensor [n, d] on the
            CPU. HDF5: the dataset `features`; safetensors, a dict in .pt: the tensor `features` or the only one;
            "FILE:DATASET" takes another. `indices` [n] beside it, as the official scripts write them (HDF5: or of a
            group above), must be those of the other streams; files without are not compared. Shards: a pattern such
            as "feats_*.npy", whose files differ in one number and count from 0 or 1, the same in every stream, or are
            numbered by the rows before them, or a list of paths in the order of their rows.
        normalize: divide every row by (its norm + 1e-8), as the official loader does; zero rows stay zero.
        dtype: of what `read` returns: float32, or float64.

    Attributes: rows: n.  widths: {s: d_s}, as `AlignedSAE` wants d_streams.  paths: {s: what names its files, None for
    a tensor}.

    Raises: ValueError that names the stream, the file and what is wrong with it: other samples in the same rows and
    `indices` that end in zeros, as a stopped extraction leaves them, among it; ImportError where a file needs h5py or
    safetensors and it is missing (the extra `train`).
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
            source.indices = None  # compared, and as long as the rows are many
        self.rows = source.rows
        self.widths = {s: source.width for s, source in self.sources.items()}
        self.paths = {s: None if isinstance(x, Tensor) else absolute(x) for s, x in streams.items()}

    def _check_rows(self, streams, s: str) -> None:
        """Refuse a stream just opened if its rows are not the samples of those before it."""
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
        """Refuse streams or widths other than these, which are those of `what`."""
        got = ", ".join(self.sources)
        require(set(self.sources) == set(widths), "streams", f"{', '.join(widths)}, the streams of {what}", got)
        for s, d in widths.items():
            if self.widths[s] != d:
                fail(stream_label(s, self.paths[s]), f"width {d} as in {what}", f"width {self.widths[s]}")
        self.sources = {s: self.sources[s] for s in widths}
        self.widths = dict(widths)
        return self

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """{s: [stop - start, d_s]} of `dtype`, normalised when asked; consecutive rows of every stream."""
        return {s: self.read_stream(s, start, stop) for s in self.sources}

    def read_stream(self, s: str, start: int, stop: int) -> Tensor:
        x = self.sources[s].read(start, stop).to(self.dtype)
        return normalized(x) if self.normalize else x

    def batches(self, batch_size: int):
        """Consecutive (first row, {s: [b, d_s]}) over all rows, once, in order.

        Before the first of them comes a full `check`, unless it was done.
        """
        if not self._checked:
            self.check()
        for start in range(0, self.rows, batch_size):
            yield start, self.read(start, min(start + batch_size, self.rows))

    def check(self, full: bool = True) -> dict[str, StreamSummary]:
        """Read everything once (or, not `full`, 256 pieces spread over the rows) before it is used.

        Raises: ValueError that names the stream, and the first rows that hold NaN or infinity, or are too large: whose
        values overflow `dtype`, or whose norm does where rows are divided by it (they would become 0). `full`: also the
        `.pt` file whose values have not the checksum that it gives.
        """
        summaries = {s: self._check_stream(s, full) for s in self.sources}
        self._checked = self._checked or full
        return summaries

    def _check_stream(self, s: str, full: bool) -> StreamSummary:
        label, source = stream_label(s, self.paths[s]), self.sources[s]
        if full and isinstance(source, (MappedRows, Shards)):
            source.check(label)
        size = max(1, _CHECK_BYTES // (source.width * source.dtype.itemsize))
        starts = range(0, self.rows, size)
        if not full and len(starts) > 1:
            size = min(size, 64)
            pieces = {int(p) for p in np.linspace(0, self.rows - size, 256)}
            firsts = source.starts.tolist() if isinstance(source, Shards) else ()  # `rows` and empty shards among them
            starts = sorted(pieces.union(first for first in firsts if first < self.rows))
        digest = hashlib.blake2b(f"{source.rows} {source.width} {source.dtype}".encode(), digest_size=16)
        bad = large = RowNumbers([], 0)
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        zero, read, tiny, name = [none], [none], False, str(self.dtype).removeprefix("torch.")
        total, power, count = torch.zeros(source.width, dtype=torch.float64, device="cpu"), 0.0, 0
        stop, sampled = 0, not full and len(starts) > 1
        for start in starts:
            seen = max(stop - start, 0)  # rows of the piece before, in a sample of few
            raw = source.read(start, min(start + size, self.rows)).contiguous()
            digest.update(raw.view(torch.uint8).numpy())
            x = raw.to(self.dtype)
            norm, first, stop = torch.linalg.vector_norm(x, dim=1), start + seen, start + len(x)
            at = (norm[seen:] == 0).nonzero().flatten()
            if len(at):
                zero, tiny = [*zero, first + at], tiny or bool(raw[seen:][at].any())
            if sampled:
                read.append(torch.arange(first, stop, device="cpu"))
            if not norm.isfinite().all():  # it may overflow where the row does not
                finite, fits = raw.isfinite().all(1), norm.isfinite() if self.normalize else x.isfinite().all(1)
                bad, large = bad.add(first, ~finite[seen:]), large.add(first, (finite & ~fits)[seen:])
            x = normalized(x) if self.normalize else x
            total += x.sum(0, dtype=torch.float64)
            power += float(x.square().sum(dtype=torch.float64))
            count += len(x)
        what = "norm fits" if self.normalize else "values fit"
        expected = f"rows whose {what} {name}"
        for rows, wanted, got in ((bad, "finite features", "NaN or infinity"), (large, expected, "too large features")):
            if rows.count:
                place = f" (the first is {source.place(rows.first[0])})" if isinstance(source, Shards) else ""
                fail(label, wanted, f"{got} in {rows.count:,} rows: {rows}{place}")
        spread = 1 - float((total / count).square().sum()) / (power / count) if power else 0.0
        read, words = torch.cat(read) if sampled else None, f"rows whose norm is 0 in {name}" if tiny else "zero rows"
        n_read = len(read) if sampled else self.rows
        return StreamSummary(digest.hexdigest(), torch.cat(zero), words, read, n_read, max(spread, 0.0))

    def describe(self, summaries: Mapping[str, StreamSummary]) -> dict[str, dict]:
        """For a manifest: where each stream came from and what it was."""
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
        for source in self.sources.values():
            source.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _as_text(path: Path | list[Path] | None) -> str | list[str] | None:
    return [str(p) for p in path] if isinstance(path, list) else path and str(path)


def normalized(x: Tensor) -> Tensor:
    """Rows divided by (their norm + 1e-8)."""
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
    if several or is_pattern(Path(value)):
        paths, series = ([Path(path) for path in value], None) if several else matching(label, Path(value))
        found = Shards(name, paths, label, series)
    else:
        found = open_file(label, Path(value))
    if not found.rows:
        found.close()
        fail(label, "at least one row and one column", f"shape [0, {found.width}]")
    return found
