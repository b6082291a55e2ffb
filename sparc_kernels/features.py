"""Feature files, one for each stream: HDF5, safetensors or .npy, memory-mapped, of any size.

Row i of every file describes the same sample. Opening a file reads nothing but the `indices` beside the features, which
must agree; `Features.check` reads everything once, and `loader.Loader` draws shuffled batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._checks import check_bool, check_tensor, fail, missing, require
from ._launch import MAX_STREAMS

DATASET = "features"  # the HDF5 dataset, as the official extraction scripts name it; preferred in safetensors too
INDICES = "indices"  # beside it: which sample each row describes
SUFFIXES = {".h5": "HDF5", ".hdf5": "HDF5", ".safetensors": "safetensors", ".npy": "NumPy"}
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHECK_BYTES = 8 << 20  # read at a time by `check`
_AROUND = 2 << 20  # bytes beside what is read that the kernel may have mapped with it
_SHOWN = 10  # positions of bad rows in a message


class MappedRows:
    """Rows stored one after another in a file: memory-mapped, and dropped from this process's memory once copied.

    Attributes: rows, width, dtype.  chunk_rows: rows that are read together anyway, 1 here.
    indices: array [rows], which sample each row describes, or None.
    """

    chunk_rows, indices = 1, None

    def __init__(self, path: Path, offset: int, rows: int, width: int, dtype: torch.dtype):
        self.rows, self.width, self.dtype = rows, width, dtype
        self._offset, self._row_bytes = offset, width * dtype.itemsize
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, width], a copy."""
        first, count = self._offset + start * self._row_bytes, (stop - start) * self._row_bytes
        out = torch.empty(count, dtype=torch.uint8, device="cpu")
        np.copyto(out.numpy(), np.frombuffer(self._map, np.uint8, count, first))
        if hasattr(mmap, "MADV_DONTNEED"):  # or the pages would count as this process's until the system is short
            begin = max(0, first - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            length = min(first + count + _AROUND, len(self._map)) - begin
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)
        return out.view(self.dtype).view(stop - start, self.width)

    def close(self) -> None:
        self._map.close()


class HDF5Rows:
    """Rows of an HDF5 dataset that cannot be mapped, as h5py reads them: in chunks, compressed, in other files."""

    indices = None

    def __init__(self, label: str, file, dataset, dtype: torch.dtype):
        (self.rows, self.width), self.dtype = dataset.shape, dtype
        self.chunk_rows = dataset.chunks[0] if dataset.chunks else 1
        self._label, self._file, self._dataset = label, file, dataset

    def read(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, self.width, dtype=self.dtype, device="cpu")
        with reading(self._label, "rows that can be read", f"damaged ones from row {start:,} to {stop - 1:,}"):
            self._dataset.read_direct(out.numpy(), np.s_[start:stop])
        return out

    def close(self) -> None:
        self._dataset.file.close()  # another file behind an external link
        self._file.close()


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
        zero_rows: the first few rows that are zero; their loss is infinite and their batch skipped.
        n_zero_rows: how many there are among the rows read.
        spread: variance / mean square of the (normalised) rows, which turns an NMSE into explained variance.
    """

    fingerprint: str
    zero_rows: list[int]
    n_zero_rows: int
    spread: float

    def zeros(self, rows: int) -> str:
        """For messages, of so many rows."""
        return f"{self.n_zero_rows:,} zero rows ({RowNumbers(self.zero_rows, self.n_zero_rows)}) of {rows:,}"


class Features:
    """Several streams of features, row by row of the same samples.

    Args:
        streams: name -> path of a .h5, .hdf5, .safetensors or .npy file, or a floating tensor [n, d] on the CPU.
            HDF5: the dataset `features`; safetensors: the tensor `features` or the only one; "FILE:DATASET" takes
            another. `indices` [n] beside it, as the official scripts write them, must be those of the other streams;
            files without are not compared.
        normalize: divide every row by (its norm + 1e-8), as the official loader does; zero rows stay zero.
        dtype: of what `read` returns: float32, or float64.

    Attributes: rows: n.  widths: {s: d_s}, as `AlignedSAE` wants d_streams.  paths: {s: path, None for tensors}.

    Raises: ValueError that names the stream, the file and what is wrong with it: other samples in the same rows and
    `indices` that end in zeros, as a stopped extraction leaves them, among it; ImportError where a file needs h5py or
    safetensors and it is missing (the extra `train`).
    """

    def __init__(self, streams: Mapping[str, str | Path | Tensor], normalize: bool = True, dtype=torch.float32):
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
        self.paths = {s: None if isinstance(x, Tensor) else Path(x).absolute() for s, x in streams.items()}

    def _check_rows(self, streams, s: str) -> None:
        """Refuse a stream just opened if its rows are not the samples of those before it."""
        label, source = _label(s, streams[s]), self.sources[s]
        first, *_ = self.sources
        rows = self.sources[first].rows
        if source.rows != rows:
            fail(label, f"{rows:,} rows as in {_label(first, streams[first])}", f"{source.rows:,} rows")
        numbered = next((o for o in self.sources if self.sources[o].indices is not None), s)
        if numbered != s and source.indices is not None:
            had, got, source.indices = self.sources[numbered].indices, source.indices, None
            for row in np.flatnonzero(had != got)[:1]:
                expected = f"`indices` {had[row]} in row {row:,} as in {_label(numbered, streams[numbered])}"
                fail(label, expected, f"{got[row]}: rows are paired by position, and these are other samples")

    def require_widths(self, widths: Mapping[str, int], what: str) -> Features:
        """Refuse streams or widths other than these, which are those of `what`."""
        got = ", ".join(self.sources)
        require(set(self.sources) == set(widths), "streams", f"{', '.join(widths)}, the streams of {what}", got)
        for s, d in widths.items():
            if self.widths[s] != d:
                fail(_label(s, self.paths[s]), f"width {d} as in {what}", f"width {self.widths[s]}")
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
        values overflow `dtype`, or whose norm does where rows are divided by it (they would become 0).
        """
        summaries = {s: self._check_stream(s, full) for s in self.sources}
        self._checked = self._checked or full
        return summaries

    def _check_stream(self, s: str, full: bool) -> StreamSummary:
        source = self.sources[s]
        size = max(1, _CHECK_BYTES // (source.width * source.dtype.itemsize))
        starts = range(0, self.rows, size)
        if not full and len(starts) > 1:
            size = min(size, 64)
            starts = sorted({int(p) for p in np.linspace(0, self.rows - size, 256)})
        digest = hashlib.blake2b(f"{source.rows} {source.width} {source.dtype}".encode(), digest_size=16)
        bad = large = zero = RowNumbers([], 0)
        total, power, count = torch.zeros(source.width, dtype=torch.float64, device="cpu"), 0.0, 0
        for start in starts:
            raw = source.read(start, min(start + size, self.rows)).contiguous()
            digest.update(raw.view(torch.uint8).numpy())
            x = raw.to(self.dtype)
            norm = torch.linalg.vector_norm(x, dim=1)
            zero = zero.add(start, norm == 0)
            if not norm.isfinite().all():  # it may overflow where the row does not
                finite, fits = raw.isfinite().all(1), norm.isfinite() if self.normalize else x.isfinite().all(1)
                bad, large = bad.add(start, ~finite), large.add(start, finite & ~fits)
            x = normalized(x) if self.normalize else x
            total += x.sum(0, dtype=torch.float64)
            power += float(x.square().sum(dtype=torch.float64))
            count += len(x)
        label, what = _label(s, self.paths[s]), "norm fits" if self.normalize else "values fit"
        require(not bad.count, label, "finite features", f"NaN or infinity in {bad.count:,} rows: {bad}")
        expected = f"rows whose {what} {str(self.dtype).removeprefix('torch.')}"
        require(not large.count, label, expected, f"too large features in {large.count:,} rows: {large}")
        spread = 1 - float((total / count).square().sum()) / (power / count) if power else 0.0
        return StreamSummary(digest.hexdigest(), *zero, max(spread, 0.0))

    def describe(self, summaries: Mapping[str, StreamSummary]) -> dict[str, dict]:
        """For a manifest: where each stream came from and what it was."""
        return {
            s: {
                "path": str(self.paths[s]) if self.paths[s] else None,
                "rows": source.rows,
                "width": source.width,
                "dtype": str(source.dtype).removeprefix("torch."),
                "fingerprint": summaries[s].fingerprint,
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


def normalized(x: Tensor) -> Tensor:
    """Rows divided by (their norm + 1e-8)."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)


def _label(name: str, value) -> str:
    return f"stream {name!r}" if value is None or isinstance(value, Tensor) else f"stream {name!r} ({value})"


def _open(name: str, value):
    what = f"streams[{name!r}]"
    if isinstance(value, Tensor):
        check_tensor(what, value, ("n", "d"))
        require(value.layout == torch.strided, what, "a dense tensor", f"one of layout {value.layout}")
        require(value.device.type == "cpu", what, "a tensor on the CPU", value)
        require(value.numel() > 0, what, "at least one row and one column", value)
        return TensorRows(value.detach())
    require(isinstance(value, (str, os.PathLike)), what, "a path or a torch.Tensor [n, d]", value)
    label, (path, dataset) = _label(name, value), _split(Path(value))
    kind = SUFFIXES.get(path.suffix.lower())
    require(kind is not None, label, f"a file ending in {', '.join(SUFFIXES)}", repr(path.name))
    try:
        require(path.exists(), label, "a file", "nothing there")
        require(path.is_file(), label, "a file", "a folder or device")
        require(path.stat().st_size > 0, label, f"a {kind} file", "an empty file")
        if kind == "NumPy":
            return _open_npy(label, path)
        return (_open_hdf5 if kind == "HDF5" else _open_safetensors)(label, path, dataset)
    except PermissionError:
        fail(label, "a file that may be read", "no permission")


def _split(path: Path) -> tuple[Path, str | None]:
    """The file and the dataset of FILE:DATASET, None without."""
    found = re.fullmatch(r"(.+?\.(?:h5|hdf5|safetensors)):(.+)", str(path), re.IGNORECASE)
    return (Path(found[1]), found[2]) if found and not path.exists() else (path, None)


@contextlib.contextmanager
def reading(label: str, expected: str, got: str = "one that cannot be read"):
    """Name what the libraries that read files raise, which for a damaged one is nearly anything."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        fail(label, expected, f"{got} ({error})")


def _check_shape(label: str, shape: tuple, dtype: str, kind: torch.dtype | None) -> None:
    require(len(shape) == 2, label, "rows and columns, [n, d]", f"shape {list(shape)}")
    require(min(shape) > 0, label, "at least one row and one column", f"shape {list(shape)}")
    require(kind is not None, label, "float64, float32, float16 or bfloat16 features", dtype)


def _numpy_dtype(dtype: np.dtype) -> torch.dtype | None:
    if not dtype.isnative or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        return None
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _open_npy(label: str, path: Path):
    with open(path, "rb") as file, reading(label, "a NumPy .npy file"):
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](file)
        offset = file.tell()
    kind = _numpy_dtype(dtype)
    _check_shape(label, shape, str(dtype), kind)
    require(not by_columns, label, "an array stored by rows (C order)", "one stored by columns (Fortran order)")
    _check_length(label, path, offset + shape[0] * shape[1] * kind.itemsize)
    return MappedRows(path, offset, *shape, kind)


def _check_length(label: str, path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size < expected:
        fail(label, f"{expected:,} bytes, as its header says", f"{size:,}: the file is truncated")


def _open_safetensors(label: str, path: Path, name: str | None):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise missing(f"{label}, a safetensors file,", "safetensors") from error
    with reading(label, "a complete safetensors file"), safe_open(path, framework="np") as file:
        names = list(file.keys())  # offsets and the length of the file are checked by now
    if name is None:
        name = names[0] if len(names) == 1 else DATASET
    expected = f"a tensor {name!r}" + ", or only one" * (name == DATASET)
    require(name in names, label, expected, f"{len(names)} tensors: {_listed(names)}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entry = header[name]
    kind = _SAFETENSORS_DTYPES.get(entry["dtype"])
    _check_shape(label, tuple(entry["shape"]), entry["dtype"], kind)
    found = MappedRows(path, 8 + length + entry["data_offsets"][0], *entry["shape"], kind)
    if INDICES in names and name != INDICES:
        with safe_open(path, framework="np") as file:
            found.indices = _read_indices(label, header[INDICES]["shape"], found.rows, lambda: file.get_tensor(INDICES))
    return found


def _listed(names) -> str:
    """For messages, with a hint."""
    some = ", ".join(sorted(names)[:5]) + ", ..." * (len(names) > 5)
    return f"{some} (FILE:DATASET takes one of them)" if some else "nothing"


def _open_hdf5(label: str, path: Path, name: str | None):
    try:
        import h5py
    except ImportError as error:
        raise missing(f"{label}, an HDF5 file,", "h5py") from error
    with contextlib.ExitStack() as stack:
        with reading(label, "a complete HDF5 file"):
            file = stack.enter_context(h5py.File(path, "r"))
            name = DATASET if name is None else name
            dataset = file.get(name)
            instead = "" if isinstance(dataset, h5py.Dataset) else _instead(file, name, dataset)
        require(not instead, label, f"a dataset {name!r}", instead)
        with reading(label, "a complete HDF5 file"):
            shape, stored = dataset.shape or (), dataset.dtype
        kind = _numpy_dtype(stored.newbyteorder("="))
        _check_shape(label, shape, str(stored), kind)
        with reading(label, "a complete HDF5 file"):
            gap, offset = _gap(dataset), _mappable(file, dataset)
            beside = file.get(f"{name.rpartition('/')[0]}/{INDICES}")
        require(not gap, label, f"all of the dataset {name!r}", gap)
        if offset is None:
            found = HDF5Rows(label, file, dataset, kind)
        else:
            _check_length(label, path, offset + shape[0] * shape[1] * kind.itemsize)
            found = MappedRows(path, offset, *shape, kind)
        if isinstance(beside, h5py.Dataset):
            found.indices = _read_indices(label, beside.shape, found.rows, lambda: beside[()])
        if offset is None:
            stack.pop_all()
    return found


def _instead(file, name: str, found) -> str:
    """For a message: what there is in place of a dataset `name`."""
    import h5py

    if isinstance(found, h5py.Group):
        return f"a group of that name with {_listed([f'{name}/{member}' for member in found])}"
    return _listed(file) if file.get(name, getlink=True) is None else "a link to nothing"


def _mappable(file, dataset) -> int | None:
    """Where rows lie in `file` as h5py reads them: in one piece, of a native type, in no other file; else None."""
    import h5py

    plist, of = dataset.id.get_create_plist(), h5py.h5o.get_info
    whole = plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0
    native = dataset.id.get_type() == h5py.h5t.py_create(dataset.dtype.newbyteorder("="))
    here = of(dataset.id).fileno == of(file.id).fileno
    return dataset.id.get_offset() if whole and native and here else None


def _gap(dataset) -> str:
    """A part that HDF5 would read as fill values without a word; "" where there is none."""
    import h5py

    plist, access = dataset.id.get_create_plist(), dataset.id.get_access_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL:
        return _virtual_gap(dataset)
    if plist.get_layout() == h5py.h5d.CHUNKED:
        chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        missing = chunks - dataset.id.get_num_chunks()
        return f"{missing:,} of {chunks:,} chunks never written" if missing else ""
    left = math.prod(dataset.shape) * dataset.id.get_type().get_size()
    if dataset.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        return "rows never written"
    for name, offset, size in dataset.external or ():
        place, need = Path(os.fsdecode(access.get_efile_prefix()), name), offset + min(size, left)
        if place.is_file() and place.stat().st_size < need:
            return f"{place.stat().st_size:,} of {need:,} bytes in {name}"
        left -= need - offset
    return ""


def _virtual_gap(dataset) -> str:
    """The same in the sources of a virtual dataset, or between them."""
    import h5py

    own, missing = Path(dataset.file.filename), math.prod(dataset.shape)
    folders = Path(os.fsdecode(dataset.id.get_access_plist().get_virtual_prefix())), own.parent, Path()
    for to, name, inner, selection in dataset.virtual_sources():
        missing -= _points(to)
        if "%b" in name + inner:  # numbered files, which HDF5 looks for
            return ""
        places = [folder / part for part in (name, Path(name).name) for folder in folders]
        place = own if name == "." else next((place for place in places if place.is_file()), None)
        if place is None:
            return f"a part of it in {name}, where nothing is"
        with h5py.File(place, "r") as file:
            source = file.get(inner)
            gap = _gap(source) if isinstance(source, h5py.Dataset) else "no such dataset"
            if not gap and selection.get_select_type() == h5py.h5s.SEL_HYPERSLABS and _points(selection) < math.inf:
                ends = selection.get_select_bounds()[1]
                if any(end >= n for end, n in zip(ends, source.shape, strict=True)):
                    gap = f"shape {list(source.shape)}, less than is taken from it"
        if gap:
            return f"a part of it in {name}, {inner!r}: {gap}"
    return f"{missing:,} values that are in no source" if missing > 0 else ""


def _points(selection) -> float:
    """Values in an HDF5 selection, infinity in one without an end."""
    try:
        return selection.get_select_npoints()
    except RuntimeError:
        return math.inf


def _read_indices(label: str, shape, rows: int, read) -> np.ndarray:
    """What `read()` returns: `indices` [rows], refused where they end in zeros that were never overwritten."""
    require(list(shape or ()) == [rows], label, f"`indices` of shape [{rows}]", f"shape {list(shape or ())}")
    with reading(label, "`indices` that can be read", "damaged ones"):
        indices = read()
    zero = indices == 0
    if zero[-1] and zero.sum() > 1:  # one zero may be the index of the sample
        start = 1 if zero.all() else rows - int(np.argmin(zero[::-1]))
        fail(label, "`indices` of every row", f"zeros from row {start:,} to the last, {rows - 1:,}: was it stopped?")
    return indices
