"""Labels, pictures and texts of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.validation import missing, reading, require
from .features import Features

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_MOST = 1 << 34  # labels, one byte each


def read_labels(path: Path, rows: int) -> tuple[Tensor, list[int] | None]:
    """Read the labels of all rows.

    Args:
        path: .npy of 0 and 1 [n, C] or of class numbers [n]; .npz: a matrix of scipy.sparse.save_npz.
        rows: n, for the check.

    Returns:
        bool [n, C]; and, for a file of class numbers, the C numbers that occur, ascending, else None.

    Raises:
        ValueError: the file is missing, damaged or holds something else; the message names it.
        ImportError: a .npz file without SciPy.
    """
    label = f"labels {path}"
    require(path.is_file(), label, "a .npy or .npz file", "nothing there")
    if path.suffix == ".npz":
        try:
            from scipy.sparse import load_npz
        except ImportError as error:
            raise missing(f"{label}, a sparse matrix,", "scipy") from error
        with reading(label, "a matrix of scipy.sparse.save_npz"):
            values = load_npz(path)
        _check_size(label, values.shape)
        with reading(label, "a matrix of scipy.sparse.save_npz"):
            values = values.toarray() != 0
    else:
        with reading(label, "a NumPy .npy file"):
            values = np.load(path, allow_pickle=False)
    require(values.dtype.kind in "bui", label, "whole numbers or booleans", str(values.dtype))
    require(values.ndim > 0, label, "0 and 1 of shape [n, C], or class numbers [n]", "shape []")
    require(len(values) == rows, label, f"{rows:,} rows as the features", f"{len(values):,}")
    if values.ndim == 1:
        require(values.min() >= 0, label, "class numbers >= 0", str(values.min()))
        numbers, columns = np.unique(values, return_inverse=True)  # numbers may be sparse
        _check_size(label, (rows, len(numbers)))
        labels = torch.zeros(rows, len(numbers), dtype=torch.bool, device="cpu")
        labels[torch.arange(rows, device="cpu"), torch.from_numpy(columns)] = True
        return labels, numbers.astype(object).tolist()
    ok = values.ndim == 2 and values.shape[1] > 0 and bool(((values == 0) | (values == 1)).all())
    require(ok, label, "0 and 1 of shape [n, C], or class numbers [n]", f"shape {list(values.shape)}")
    return torch.from_numpy(values != 0), None


def _check_size(label: str, shape: tuple) -> None:
    rows, classes = shape[0], shape[-1]
    most = _MOST // max(rows, 1)
    require(math.prod(shape) <= _MOST, label, f"at most {most:,} classes with {rows:,} rows", f"{classes:,}")


def read_names(path: Path, count: int | None, numbers: list[int] | None) -> list[str]:
    """Read names of classes, one a line.

    Args:
        path: UTF-8 text.
        count: C, the expected number of lines; None: any. Ignored with `numbers`.
        numbers: class numbers, from 0, ascending; selects these lines.

    Returns:
        C names.

    Raises:
        ValueError: the file is missing, is no UTF-8 text or has another number of lines.
    """
    names = _lines(f"label names {path}", path)
    if numbers is not None:
        expected = f"{numbers[-1] + 1:,} lines or more, one a class number"
        require(len(names) > numbers[-1], f"label names {path}", expected, str(len(names)))
        return [names[number] for number in numbers]
    if count is not None:
        require(len(names) == count, f"label names {path}", f"{count} lines, one a class", str(len(names)))
    return names


def read_pictures(images: Mapping | None, texts: Mapping | None, features: Features) -> dict[str, Pictures | list[str]]:
    """Open the pictures or texts of each stream's rows.

    Args:
        images: stream name -> path of `Pictures`.
        texts: stream name -> path of a text file, one line a row.
        features: the streams and their number of rows.

    Raises:
        ValueError: an unknown stream, another number of rows than the features have, or another kind of file.
    """
    shown: dict[str, Pictures | list[str]] = {}
    for flag, given in (("--images", images or {}), ("--texts", texts or {})):
        for s, path in given.items():
            require(s in features.widths, flag, f"a stream among {', '.join(features.widths)}", repr(s))
            label = f"{flag} {s}={path}"
            shown[s] = Pictures(label, path) if flag == "--images" else _lines(label, path)
            require(
                len(shown[s]) == features.rows, label, f"{features.rows:,} rows as the features", str(len(shown[s]))
            )
    return shown


def _lines(label: str, path: Path) -> list[str]:
    require(path.is_file(), label, "a text file", "nothing there")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{label}: expected UTF-8 text ({error})") from error


class Pictures:
    """Pictures of rows, read on demand.

    Args:
        label: name of the pictures in messages.
        path: a folder, in the order of its file names, or a .npy file of uint8 [n, h, w] or [n, h, w, 3].
    """

    def __init__(self, label: str, path: Path):
        self.files: list[Path] | None = None
        self.array: np.ndarray | None = None
        if path.is_dir():
            self.files = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICTURES)
            return
        require(path.is_file(), label, "a folder of pictures or a .npy file", "nothing there")
        with reading(label, "a folder of pictures or a NumPy .npy file"):
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape = self.array.shape
        ok = self.array.dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
        require(ok, label, "uint8 [n, h, w] or [n, h, w, 3]", f"{self.array.dtype} {list(shape)}")

    def __len__(self) -> int:
        return len(self.files or ()) if self.array is None else len(self.array)

    def picture(self, row: int):
        """Return the RGB PIL image of a row.

        Raises:
            ImportError: Pillow is missing.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise missing("showing pictures", "Pillow") from error
        if self.array is not None:
            return Image.fromarray(np.array(self.array[row])).convert("RGB")
        assert self.files is not None, "pictures are an array or files"
        with Image.open(self.files[row]) as image:
            return image.convert("RGB")
