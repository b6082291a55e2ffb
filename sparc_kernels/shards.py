"""One stream in several files: shards, by a pattern in the order of their numbers, or a list of paths in its order."""

from __future__ import annotations

import glob
import os
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._checks import fail, require
from .feature_files import open_file, split_dataset

_COUNT = "[0-9]+(?![0-9A-Za-z])"  # 3f2a is none
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


def matching(label: str, pattern: Path) -> list[Path]:
    """The files of PATTERN or PATTERN:DATASET, 2 before 10.

    Raises: ValueError where there is none, or one of their numbers is missing or there twice.
    """
    file, dataset = split_dataset(pattern)
    found = sorted(glob.glob(str(file)), key=lambda path: (_by_numbers(path, "[0-9]+"), path))
    require(bool(found), label, "files of this pattern", "none")
    series: dict[tuple, list] = {}
    for path in found:
        parts = _by_numbers(os.path.splitext(path)[0], _COUNT)
        series.setdefault(tuple(parts[::2]), []).append((path, parts[1::2]))
    for members in series.values():
        _check_series(label, members, all_of_them="[" not in str(file))
    return [Path(f"{path}:{dataset}" if dataset else path) for path in found]


def _by_numbers(path: str, number: str) -> list:
    """Texts and numbers in turn, as they follow each other."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(f"({number})", path))]


def _check_series(label: str, members: list[tuple[str, list[int]]], all_of_them: bool) -> None:
    """Refuse a gap in files that differ in numbers alone; the last number counts fastest, from where it began."""
    (first, begin), (last, _) = members[0], members[-1]
    for (path, numbers), (found, following) in pairwise(members):
        i = next((i for i, (a, b) in enumerate(zip(numbers, following, strict=True)) if a != b), None)
        require(i is not None, label, "one file of each number", f"{path} and {found}")
        expected = [*numbers[:i], numbers[i] + 1, *begin[i + 1 :]]
        if following != expected:
            stem, suffix = os.path.splitext(path)
            texts = re.split(f"({_COUNT})", stem)
            texts[1::2] = (str(n).zfill(len(text)) for n, text in zip(expected, texts[1::2], strict=True))
            after = f"{os.path.basename(found)} after {os.path.basename(path)}"
            fail(label, f"{''.join(texts)}{suffix}", f"{after}: a shard is missing")
    count = re.search("[0-9]-of-([0-9]+)", first)
    if count and all_of_them and len(members) != int(count[1]):
        fail(label, f"{int(count[1])} files, as their names say", f"{len(members)}, from {first} to {last}")


def _age(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


class Shards:
    """Rows of several files of one width and dtype, one file after another; a file may have none.

    Attributes: rows, width, dtype, chunk_rows, indices: as of `MappedRows`.  names: of the files, below their folder.
    starts: int64 [files + 1], the first row of each, and `rows`.
    """

    def __init__(self, stream: str, paths: Sequence[Path]):
        files = [split_dataset(path)[0].absolute() for path in paths]
        folder = os.path.commonpath([file.parent for file in files])
        self.names = [os.path.relpath(file, folder) for file in files]
        self._stream, self._files, self._lock = stream, files, threading.Lock()
        self._parts, self._seen, self._open = [], [], {}
        try:
            for i, path in enumerate(paths):
                label = stream_label(stream, path)
                self._parts.append(open_file(label, path.absolute()))
                self._seen.append(_age(files[i]))
                self._part(i)
                for what in ("width", "dtype"):
                    want, got = (getattr(self._parts[at], what) for at in (0, i))
                    require(want == got, label, f"{what} {want} as in {paths[0]}", f"{what} {got}")
            self.indices = self._joined_indices(stream, paths)
        except BaseException:
            self.close()
            raise
        self.width, self.dtype = self._parts[0].width, self._parts[0].dtype
        self.chunk_rows = max(part.chunk_rows for part in self._parts)
        self.starts = np.cumsum([0, *(part.rows for part in self._parts)])
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
            same = _age(self._files[i]) == self._seen[i]
            require(same, stream_label(self._stream, self._files[i]), "the file as it was when opened", "a changed one")
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

    def close(self) -> None:
        for part in self._parts:
            part.close()
