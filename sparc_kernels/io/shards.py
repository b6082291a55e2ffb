"""One stream in several files: shards, by a pattern in the order of their numbers, or a list of paths in its order."""

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
from .files import MappedRows, open_file, split_dataset

_COUNT = "[0-9]+(?![0-9A-Za-z])"  # 3f2a is none
LISTED = "--stream NAME=FILE,FILE"
OPEN = 32  # files of a stream that stay open: a process may have 1,024, and 8 streams are trained on and validated


def stream_label(name: str, value) -> str:
    """A stream in messages, of what it was given as."""
    if value is None or isinstance(value, Tensor):
        return f"stream {name!r}"
    several = isinstance(value, (list, tuple))
    return f"stream {name!r} ({f'{value[0]} and {len(value) - 1} more' if several else value})"


def is_pattern(path: Path) -> bool:
    """Whether it has wildcards and is not the name of a file all the same."""
    return any(c in str(path) for c in "*?[") and not split_dataset(path)[0].exists()


def absolute(value: str | Path | Sequence) -> Path | list[Path]:
    """What means the same from another folder."""
    if isinstance(value, (list, tuple)):
        return [absolute(path) for path in value]
    path = Path(value)
    return Path(glob.escape(os.getcwd()), path) if is_pattern(path) else path.absolute()


def matching(label: str, pattern: Path) -> tuple[list[Path], Series | None]:
    """The files of PATTERN or PATTERN:DATASET, 2 before 10, and their numbers; None: of one file without.

    Raises: ValueError where there is none, where they differ in more than one number, and where one is there twice or
    missing; of numbers with gaps from 0 on, which may count rows, `Shards` tells.
    """
    file, dataset = split_dataset(pattern)
    found = sorted(glob.glob(str(file)), key=lambda path: (_by_numbers(path, "[0-9]+"), path))
    require(bool(found), label, "files of this pattern", "none")
    parts = [_by_numbers(os.path.splitext(path)[0], _COUNT) for path in found]
    other = next((path for path, names in zip(found, parts, strict=True) if names[::2] != parts[0][::2]), None)
    varying = [i for i, values in enumerate(zip(*parts, strict=False)) if len(set(values)) > 1]
    expected = f"files that differ in one number, or a list of them ({LISTED})"
    require(other is None, label, expected, f"{found[0]} and {other}")
    require(len(varying) < 2, label, expected, f"{found[0]} and {found[-1]}")
    if len(found) == 1:
        varying = _of_wildcards(found[0], str(file))
    numbers = [names[varying[0]] for names in parts] if len(varying) == 1 else [0] * (len(found) == 1)
    for i, paths in enumerate(pairwise(found)):
        require(numbers[i : i + 1] < numbers[i + 1 : i + 2], label, "one file of each number", " and ".join(paths))
    if "[" not in re.sub(r"\[[*?[]\]", "", str(file)):  # which takes part of them on purpose
        count = re.search("[0-9]-of-([0-9]+)", found[0])
        if count and len(found) != int(count[1]):
            got = f"{len(found)}, from {found[0]} to {found[-1]}"
            fail(label, f"{int(count[1])} files, as their names say", got)
        begin = f"numbers from 0 or 1 on, or a list of the files ({LISTED})"
        require(numbers[0] < 2, label, begin, f"{found[0]} as the first")
    series = Series(found, numbers, varying[0]) if len(varying) == 1 else None
    if numbers[0]:
        series.check(label)
    return [Path(f"{path}:{dataset}" if dataset else path) for path in found], series


def _by_numbers(path: str, number: str) -> list:
    """Texts and numbers in turn, as they follow each other."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(f"({number})", path))]


def _of_wildcards(path: str, pattern: str) -> list[int]:
    """Which of the texts and numbers of a file are numbers that its pattern does not give."""
    before, after = re.search(r"[*?[]", pattern).start(), len(re.search(r"[^*?\]]*$", pattern)[0])
    found = re.finditer(_COUNT, os.path.splitext(path)[0])
    return [2 * i + 1 for i, m in enumerate(found) if m.end() > before and m.start() < len(path) - after]


class Series(NamedTuple):
    """Files that differ in one number.  place: of it in `_by_numbers` of their names."""

    files: list[str]
    numbers: list[int]
    place: int

    def check(self, label: str, starts: Sequence[int] = ()) -> int | None:
        """The number that they are counted from; None where each number is that of the rows before it, `starts`.

        Raises: ValueError that names a file missing among them.
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
        """How many numbers, from the first on, are those wanted."""
        pairs = enumerate(zip(self.numbers, wanted, strict=False))
        return next((i for i, (number, want) in pairs if number != want), len(self.numbers) if len(wanted) else 0)

    def _named(self, i: int, number: int) -> str:
        """The name of file i with another number."""
        stem, suffix = os.path.splitext(self.files[i])
        texts = re.split(f"({_COUNT})", stem)
        texts[self.place] = str(number).zfill(len(texts[self.place]))
        return "".join(texts) + suffix


def _age(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


class Shards:
    """Rows of several files of one width and dtype, one file after another; a file may have none.

    Args:
        stream: its name, for messages.
        paths: FILE or FILE:DATASET, in the order of their rows.
        series: their numbers, where a pattern gave them; what it was is in `label`.

    Attributes: rows, width, dtype, chunk_rows, indices: as of `MappedRows`.  names: of the files, below their folder.
    starts: int64 [files + 1], the first row of each, and `rows`.  begin: the number that the files of a pattern are
    counted from, None where they are not.

    Raises: ValueError that names the file: what `open_file` raises, another width or dtype than the first one's, no
    `indices` where others have them, one that is missing. `read` raises it where a file has changed or has gone.
    """

    def __init__(self, stream: str, paths: Sequence[Path], label: str = "", series: Series | None = None):
        files = [split_dataset(path)[0].absolute() for path in paths]
        folder = os.path.commonpath([file.parent for file in files])
        self.names = [os.path.relpath(file, folder) for file in files]
        self._stream, self._files, self._lock = stream, files, threading.Lock()
        self._parts, self._seen, self._open = [], [], {}
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
        """A file, which stays open until so many others were read, and must not change before it is opened again."""
        if i not in self._open:
            label, asked = stream_label(self._stream, self._files[i]), "the file as it was when opened"
            require(self._files[i].exists(), label, asked, "nothing there")
            require(_age(self._files[i]) == self._seen[i], label, asked, "a changed one")
        self._open[i] = self._open.pop(i, None)
        if len(self._open) > OPEN:
            self._parts[oldest := next(iter(self._open))].close()
            del self._open[oldest]
        return self._parts[i]

    def at(self, row: int) -> tuple[int, int]:
        """The file that a row is in, and its number there."""
        i = int(np.searchsorted(self.starts, row, side="right")) - 1
        return i, row - int(self.starts[i])

    def place(self, row: int) -> str:
        """For messages."""
        i, number = self.at(row)
        return f"row {number:,} of {self.names[i]}"

    def listed(self) -> list[str]:
        """For a manifest."""
        return [f"{name}, {part.rows:,} rows" for name, part in zip(self.names, self._parts, strict=True)]

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, width], a copy."""
        (i, first), left, pieces = self.at(start), stop - start, []
        with self._lock:  # a loader's thread may read what another has closed
            while left:
                n = min(left, self._parts[i].rows - first)
                if n:
                    pieces.append(self._part(i).read(first, first + n))
                i, first, left = i + 1, 0, left - n
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def check(self, label: str) -> None:
        """`MappedRows.check` of each file, which is named in place of `label`."""
        with self._lock:
            for i, part in enumerate(self._parts):
                if isinstance(part, MappedRows):
                    self._part(i).check(stream_label(self._stream, self._files[i]))

    def close(self) -> None:
        for part in self._parts:
            part.close()


def files_of(streams: Mapping) -> list[tuple[str, Path]]:
    """Every file of feature files as `Features` takes them, shards among them, with what messages call it."""
    found = []
    for s, value in streams.items():
        label = stream_label(s, value)
        if isinstance(value, Path) and is_pattern(value):
            value = matching(label, value)[0]
        paths = value if isinstance(value, list) else [value] * (value is not None)  # None: a tensor
        found += [(label, split_dataset(path)[0]) for path in paths]
    return found
