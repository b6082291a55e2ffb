"""Shards: one stream in several files, given by a pattern (in the order of their numbers) or a list of paths."""

from __future__ import annotations

import glob
import os
import re
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.validation import fail, require
from .files import HDF5Rows, MappedRows, open_file, split_dataset

_COUNT = "[0-9]+(?![0-9A-Za-z])"  # not the 3 of 3f2a
LISTED = "--stream NAME=FILE,FILE"
OPEN = 32  # files open per stream: the usual limit is 1,024 per process, with 8 streams to train on and 8 to validate


def stream_label(name: str, value) -> str:
    """Return the name of a stream in messages.

    Args:
        name: of the stream.
        value: its path, pattern, list of paths or tensor, or None.
    """
    if value is None or isinstance(value, Tensor):
        return f"stream {name!r}"
    several = isinstance(value, (list, tuple))
    return f"stream {name!r} ({f'{value[0]} and {len(value) - 1} more' if several else value})"


def is_pattern(path: Path) -> bool:
    """Whether a path has wildcards and is not itself an existing file."""
    return any(c in str(path) for c in "*?[") and not split_dataset(path)[0].exists()


def absolute(value: str | Path | Sequence[str | Path]) -> Path | list[Path]:
    """Make a path, a pattern or a list of paths absolute."""
    if isinstance(value, (str, os.PathLike)):
        return _absolute(Path(value))
    return [_absolute(Path(path)) for path in value]


def _absolute(path: Path) -> Path:
    return Path(glob.escape(os.getcwd()), path) if is_pattern(path) else path.absolute()


def matching(label: str, pattern: Path) -> tuple[list[Path], Series | None]:
    """Find the files of a pattern in numeric order (2 before 10).

    Args:
        label: name of the stream in messages.
        pattern: PATTERN or PATTERN:DATASET.

    Returns:
        FILE or FILE:DATASET for each file; and their numbers, None for a single file without one varying number.

    Raises:
        ValueError: no file matches, the names differ in more than one number, or a number occurs twice or is missing.
            Gaps in numbers that start at 0 may be row counts: `Shards` checks those.
    """
    file, dataset = split_dataset(pattern)
    files = sorted(glob.glob(str(file)), key=lambda path: (_by_numbers(path, "[0-9]+"), path))
    require(bool(files), label, "files of this pattern", "none")
    parts = [_by_numbers(os.path.splitext(path)[0], _COUNT) for path in files]
    other = next((path for path, names in zip(files, parts, strict=True) if names[::2] != parts[0][::2]), None)
    varying = [i for i, values in enumerate(zip(*parts, strict=False)) if len(set(values)) > 1]
    expected = f"files that differ in one number, or a list of them ({LISTED})"
    require(other is None, label, expected, f"{files[0]} and {other}")
    require(len(varying) < 2, label, expected, f"{files[0]} and {files[-1]}")
    if len(files) == 1:
        varying = _of_wildcards(files[0], str(file))
    numbers = [names[varying[0]] for names in parts] if len(varying) == 1 else [0] * (len(files) == 1)
    for i, paths in enumerate(pairwise(files)):
        require(numbers[i : i + 1] < numbers[i + 1 : i + 2], label, "one file of each number", " and ".join(paths))
    if "[" not in re.sub(r"\[[*?[]\]", "", str(file)):  # a character class selects some on purpose
        count = re.search("[0-9]-of-([0-9]+)", files[0])
        if count and len(files) != int(count[1]):
            got = f"{len(files)}, from {files[0]} to {files[-1]}"
            fail(label, f"{int(count[1])} files, as their names say", got)
        begin = f"numbers from 0 or 1 on, or a list of the files ({LISTED})"
        require(numbers[0] < 2, label, begin, f"{files[0]} as the first")
    series = Series(files, numbers, varying[0]) if len(varying) == 1 else None
    if numbers[0] and series is not None:
        series.check(label)
    return [Path(f"{path}:{dataset}" if dataset else path) for path in files], series


def _by_numbers(path: str, number: str) -> list:
    """Split a path into alternating texts and numbers; `number` is their pattern."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(f"({number})", path))]


def _of_wildcards(path: str, pattern: str) -> list[int]:
    """Indices, in `_by_numbers` of a path, of the numbers that the pattern's wildcards match."""
    before = min(pattern.index(c) for c in "*?[" if c in pattern)
    after = len(pattern) - 1 - max(map(pattern.rfind, "*?]"))
    matches = re.finditer(_COUNT, os.path.splitext(path)[0])
    return [2 * i + 1 for i, m in enumerate(matches) if m.end() > before and m.start() < len(path) - after]


class Series(NamedTuple):
    """Files whose names differ in one number.

    Attributes:
        files: paths in the order of their numbers.
        numbers: of the files.
        place: index of the number in `_by_numbers` of their names.
    """

    files: list[str]
    numbers: list[int]
    place: int

    def check(self, label: str, starts: Sequence[int] = ()) -> int | None:
        """Check that no file is missing.

        Args:
            label: name of the stream in messages.
            starts: first row of each file, which the numbers may be instead of a count.

        Returns:
            The first number of the count; None if the numbers are `starts`.

        Raises:
            ValueError: a file is missing; the message names it.
        """
        counted = range(self.numbers[0], self.numbers[0] + len(self.numbers))
        agree = [self._agreeing(wanted) for wanted in (counted, starts)]
        i = max(agree)
        if i < len(self.files):
            names = [self._named(i - 1, w[i]) for w, n in zip((counted, starts), agree, strict=True) if n == i]
            before, got = (os.path.basename(self.files[at]) for at in (i - 1, i))
            fail(label, " or ".join(names), f"{got} after {before}: a shard is missing")
        return self.numbers[0] if agree[0] == i else None

    def _agreeing(self, wanted: Sequence[int]) -> int:
        """Number of leading entries that `numbers` and `wanted` share."""
        pairs = enumerate(zip(self.numbers, wanted, strict=False))
        return next((i for i, (number, want) in pairs if number != want), len(self.numbers) if len(wanted) else 0)

    def _named(self, i: int, number: int) -> str:
        """Name of file i with another number."""
        stem, suffix = os.path.splitext(self.files[i])
        texts = re.split(f"({_COUNT})", stem)
        texts[self.place] = str(number).zfill(len(texts[self.place]))
        return "".join(texts) + suffix


def _age(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


class Shards:
    """Concatenated rows of several files with one width and dtype; a file may be empty.

    Args:
        stream: name of the stream, for messages.
        paths: FILE or FILE:DATASET, in the order of their rows.
        label: the stream with its pattern, for messages about `series`.
        series: the files' numbers, if a pattern gave them.

    Attributes:
        rows: n, over all files.
        width: values of a row.
        dtype: of the values.
        chunk_rows: rows that one read decompresses together, at most.
        indices: array [rows], the sample of each row, or None.
        names: of the files, relative to their common folder.
        starts: int64 [files + 1], first row of each file, then `rows`.
        begin: first number of the files of a pattern; None if they are not counted.

    Raises:
        ValueError: a file is unusable (see `open_file`) or missing, differs from the first in width or dtype, or lacks
            `indices` that others have; the message names it. `read` raises it if a file has changed or is gone.
    """

    def __init__(self, stream: str, paths: Sequence[Path], label: str = "", series: Series | None = None):
        files = [split_dataset(path)[0].absolute() for path in paths]
        folder = os.path.commonpath([file.parent for file in files])
        self.names = [os.path.relpath(file, folder) for file in files]
        self._stream, self._files, self._lock = stream, files, threading.Lock()
        self._parts: list[MappedRows | HDF5Rows] = []
        self._seen: list[tuple[int, int]] = []
        self._open: dict[int, None] = {}  # ordered by last use
        try:
            for i, path in enumerate(paths):
                part = stream_label(stream, path)
                self._parts.append(open_file(part, path.absolute()))
                self._seen.append(_age(files[i]))
                self._part(i)
                for what in ("width", "dtype"):
                    want, got = (getattr(self._parts[at], what) for at in (0, i))
                    require(want == got, part, f"{what} {want} as in {paths[0]}", f"{what} {got}")
            self.indices = self._joined_indices(stream, paths)
            self.starts = np.cumsum([0, *(part.rows for part in self._parts)])
            self.begin = series and series.check(label, self.starts[:-1].tolist())
        except BaseException:
            self.close()
            raise
        self.width, self.dtype = self._parts[0].width, self._parts[0].dtype
        self.chunk_rows = max(part.chunk_rows for part in self._parts)
        self.rows = int(self.starts[-1])

    def _joined_indices(self, stream: str, paths: Sequence[Path]) -> np.ndarray | None:
        with_rows = [(path, part) for path, part in zip(paths, self._parts, strict=True) if part.rows]
        numbered = [path for path, part in with_rows if part.indices is not None]
        for path, part in with_rows:
            lacks = bool(numbered) and part.indices is None
            require(not lacks, stream_label(stream, path), f"`indices` as in {numbered and numbered[0]}", "none")
        joined = np.concatenate([part.indices for _, part in with_rows]) if numbered else None
        for part in self._parts:
            part.indices = None
        return joined

    def _part(self, i: int):
        """File i, kept open while among the last OPEN used; raises ValueError if it changed before it is reopened."""
        if i not in self._open:
            label, expected = stream_label(self._stream, self._files[i]), "the file as it was when opened"
            require(self._files[i].exists(), label, expected, "nothing there")
            require(_age(self._files[i]) == self._seen[i], label, expected, "a changed one")
        self._open.pop(i, None)
        self._open[i] = None
        if len(self._open) > OPEN:
            self._parts[oldest := next(iter(self._open))].close()
            del self._open[oldest]
        return self._parts[i]

    def at(self, row: int) -> tuple[int, int]:
        """Return the index of a row's file and its row number there."""
        i = int(np.searchsorted(self.starts, row, side="right")) - 1
        return i, row - int(self.starts[i])

    def place(self, row: int) -> str:
        """Return the position of a row for messages."""
        i, number = self.at(row)
        return f"row {number:,} of {self.names[i]}"

    def listed(self) -> list[str]:
        """List the files and their number of rows for a manifest."""
        return [f"{name}, {part.rows:,} rows" for name, part in zip(self.names, self._parts, strict=True)]

    def read(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop - 1, [stop - start, width].

        Raises:
            ValueError: a file has changed or is gone, or its rows are damaged.
        """
        (i, first), left, pieces = self.at(start), stop - start, []
        with self._lock:  # loader threads share the open files
            while left:
                n = min(left, self._parts[i].rows - first)
                if n:
                    pieces.append(self._part(i).read(first, first + n))
                i, first, left = i + 1, 0, left - n
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def check(self, label: str) -> None:
        """Run `MappedRows.check` on each file; messages name the file instead of `label`."""
        with self._lock:
            for i, part in enumerate(self._parts):
                if isinstance(part, MappedRows):
                    self._part(i).check(stream_label(self._stream, self._files[i]))

    def close(self) -> None:
        """Close all files."""
        for part in self._parts:
            part.close()


def files_of(streams: Mapping) -> list[tuple[str, Path]]:
    """List every feature file, shards included.

    Args:
        streams: stream name -> path, pattern or list of paths, or None for a tensor.

    Returns:
        (label of its stream, path) of each file.
    """
    files = []
    for s, value in streams.items():
        label = stream_label(s, value)
        if isinstance(value, Path) and is_pattern(value):
            value = matching(label, value)[0]
        paths = value if isinstance(value, list) else [value] * (value is not None)  # None: a tensor
        files += [(label, split_dataset(path)[0]) for path in paths]
    return files
