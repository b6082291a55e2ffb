"""Readers of feature files: HDF5, safetensors, NumPy .npy, torch .pt."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
import os
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ..core.validation import FLOATS, fail, first_line, missing, reading, require

DATASET = "features"  # HDF5 dataset of the official extraction scripts; the default in safetensors and .pt too
INDICES = "indices"  # beside it: the sample of each row
SUFFIXES = {".h5": "HDF5", ".hdf5": "HDF5", ".safetensors": "safetensors", ".npy": "NumPy"}
SUFFIXES |= {".pt": "torch", ".pth": "torch"}
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHECK_BYTES = 8 << 20  # of a record, per CRC update
_COMPARABLE = r"[<>|]?(bool|u?int|float|[biufSU])\d*"  # dtypes of `indices`, as named by NumPy, torch or safetensors
_AROUND = 2 << 20  # bytes around a read that the operating system may have mapped too


class MappedRows:
    """Memory-mapped rows at a constant stride in a file; pages are released once their rows are copied.

    Args:
        path: the file.
        offset: of the first value, in bytes.
        rows: n.
        width: values of a row.
        dtype: of the values.
        strides: bytes from row to row and from value to value; None: contiguous rows.
        record: (start, bytes, CRC-32) of the part of the file that holds the values, for `check`; None: no checksum.

    Attributes:
        rows: n.
        width: values of a row.
        dtype: of the values.
        chunk_rows: rows that one read decompresses together, here 1.
        indices: array [rows], the sample of each row, or None.
    """

    chunk_rows = 1
    indices: np.ndarray | None = None

    def __init__(
        self, path: Path, offset: int, rows: int, width: int, dtype: torch.dtype, *, strides=None, record=None
    ):
        self.rows, self.width, self.dtype, self._record = rows, width, dtype, record
        self._path, self._offset, self._strides = path, offset, strides or (width * dtype.itemsize, dtype.itemsize)
        self._open()

    def _open(self) -> None:
        with open(self._path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop - 1 to the CPU; reopens a closed file.

        Returns:
            [stop - start, width] of `dtype`.
        """
        if self._map.closed:
            self._open()
        shape, size = (stop - start, self.width), self.dtype.itemsize
        first = self._offset + start * self._strides[0]
        out = torch.empty(math.prod(shape) * size, dtype=torch.uint8, device="cpu")
        rows = np.ndarray(shape, f"u{size}", self._map, first, self._strides)
        np.copyto(out.numpy().view(rows.dtype).reshape(shape), rows)
        last = first + sum((n - 1) * stride for n, stride in zip(shape, self._strides, strict=True))
        self._drop(first, last + size)
        return out.view(self.dtype).view(shape)

    def _drop(self, first: int, last: int) -> None:
        """Release the pages of a byte range, which would count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = max(0, first - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, begin, min(last + _AROUND, len(self._map)) - begin)

    def check(self, label: str) -> None:
        """Compare the values with the file's checksum, if it has one (`.pt` only).

        Args:
            label: name of the stream and file in messages.

        Raises:
            ValueError: the checksums differ.
        """
        start, size, expected = self._record or (0, 0, 0)
        if not expected:  # 0: saved without checksums
            return
        if self._map.closed:
            self._open()
        crc = 0
        for first in range(start, start + size, _CHECK_BYTES):
            n = min(_CHECK_BYTES, start + size - first)
            crc = zlib.crc32(np.frombuffer(self._map, np.uint8, n, first).data, crc)
            self._drop(first, first + n)
        require(crc == expected, label, f"values of the CRC-32 {expected:08x} in the file", f"{crc:08x}: it is damaged")

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


class HDF5Rows:
    """Rows of an HDF5 dataset that cannot be mapped (chunked, compressed, external), read by h5py.

    Args:
        label: name of the stream and file in messages.
        name: of the dataset.
        file: open h5py.File.
        dataset: its dataset [n, d].
        dtype: of the values.

    Attributes as of `MappedRows`.
    """

    indices: np.ndarray | None = None

    def __init__(self, label: str, name: str, file, dataset, dtype: torch.dtype):
        (self.rows, self.width), self.dtype = dataset.shape, dtype
        self.chunk_rows = dataset.chunks[0] if dataset.chunks else 1
        self._label, self._name, self._path = label, name, file.filename
        self._file, self._dataset = file, dataset

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows start..stop - 1, [stop - start, width]; reopens a closed file.

        Raises:
            ValueError: the rows are damaged.
        """
        out = torch.empty(stop - start, self.width, dtype=self.dtype, device="cpu")
        with reading(self._label, "rows that can be read", f"damaged ones from row {start:,} to {stop - 1:,}"):
            if not self._file:  # closed
                import h5py

                self._file = h5py.File(self._path, "r")
                self._dataset = self._file[self._name]
            self._dataset.read_direct(out.numpy(), np.s_[start:stop])
        return out

    def close(self) -> None:
        """Close the file, and the one behind an external link."""
        if self._file:
            self._dataset.file.close()  # differs from _file behind an external link
            self._file.close()


def open_file(label: str, value: Path) -> MappedRows | HDF5Rows:
    """Open the rows of FILE or FILE:DATASET without reading values (see `MappedRows.check`).

    Args:
        label: name of the stream and file in messages.
        value: FILE or FILE:DATASET.

    Raises:
        ValueError: no such file, another kind of file, a damaged header or structure, no features [n, d] of that name,
            or not one index per row.
        ImportError: h5py or safetensors is missing.
    """
    path, dataset = split_dataset(value)
    kind = SUFFIXES.get(path.suffix.lower())
    try:
        require(not path.is_dir(), label, f"a file, or a pattern for several ({path / '*.npy'})", "a folder")
        if kind is None:
            fail(label, f"a file ending in {', '.join(SUFFIXES)}", repr(path.name))
        require(path.exists(), label, "a file", "nothing there")
        require(path.is_file(), label, "a file", "a device")
        require(path.stat().st_size > 0, label, f"a {kind} file", "an empty file")
        if kind == "NumPy":
            return _open_npy(label, path)
        return {"HDF5": _open_hdf5, "safetensors": _open_safetensors, "torch": _open_torch}[kind](label, path, dataset)
    except PermissionError:
        fail(label, "a file that may be read", "no permission")


def split_dataset(path: Path) -> tuple[Path, str | None]:
    """Split FILE:DATASET into file and dataset; None for a plain FILE."""
    match = re.fullmatch(r"(.+?\.(?:h5|hdf5|safetensors|pt|pth)):(.+)", str(path), re.IGNORECASE)
    return (Path(match[1]), match[2]) if match and not path.exists() else (path, None)


def _checked_dtype(label: str, shape: tuple, dtype: str, kind: torch.dtype | None) -> torch.dtype:
    """Check shape and dtype of features, and return torch's dtype."""
    require(len(shape) == 2, label, "rows and columns, [n, d]", f"shape {list(shape)}")
    require(shape[1] > 0, label, "at least one row and one column", f"shape {list(shape)}")  # a shard may be empty
    if kind is None:
        fail(label, "float64, float32, float16 or bfloat16 features", dtype)
    return kind


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
    kind = _checked_dtype(label, shape, str(dtype), _numpy_dtype(dtype))
    _check_length(label, path, offset + shape[0] * shape[1] * kind.itemsize)
    strides = (kind.itemsize, shape[0] * kind.itemsize) if by_columns else None
    return MappedRows(path, offset, shape[0], shape[1], kind, strides=strides)


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
        names = list(file.keys())  # safe_open has checked offsets and length
    name = _choose(label, names, name)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entry = header[name]
    shape = tuple(entry["shape"])
    kind = _checked_dtype(label, shape, entry["dtype"], _SAFETENSORS_DTYPES.get(entry["dtype"]))
    source = MappedRows(path, 8 + length + entry["data_offsets"][0], shape[0], shape[1], kind)
    if INDICES in names and name != INDICES:
        with safe_open(path, framework="np") as file:
            shape, dtype = header[INDICES]["shape"], header[INDICES]["dtype"]
            source.indices = _read_indices(label, shape, source.rows, dtype, lambda: file.get_tensor(INDICES))
    return source


def _choose(label: str, names: list[str], name: str | None, inner=()) -> str:
    """Choose the tensor of a file: `name`, the only one or `features`; inner: names in a nested dict."""
    if name is None:
        weights = next((n for n in (*names, *map(str, inner)) if n.startswith("encoders.")), None)
        require(weights is None, label, "features", f"the weights of a model ({weights}, ...)")
        name = names[0] if len(names) == 1 else DATASET
    expected = f"a tensor {name!r}" + ", or only one" * (name == DATASET)
    require(name in names, label, expected, f"{len(names)} tensors: {_listed(names)}")
    return name


def _open_torch(label: str, path: Path, name: str | None):
    with open(path, "rb") as file:
        old = file.read(1) == b"\x80"
    require(not old, label, "a file of torch.save since PyTorch 1.6", "an older one or a plain pickle, which cannot be "
            "mapped: load and torch.save it again")  # fmt: skip
    whole = "a complete file of torch.save, of dense tensors"
    with reading(label, whole):
        order, records = _torch_records(path)
    require(order == sys.byteorder, label, f"{sys.byteorder}-endian values, as this machine's", f"{order}-endian ones")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        objects = re.search(r"Unsupported .*?(?= was not|$)", str(error), re.MULTILINE)
        require(objects is None, label, "a file of tensors alone", f"other objects ({objects and objects[0]})")
        require("quantized" not in first_line(error), label, "dense tensors", "a quantised one: save its dequantize()")
        fail(label, whole, f"one that cannot be read ({first_line(error).partition('. ')[0]})")
    if isinstance(content, Tensor):
        require(name is None, label, f"a dict with {name!r}", "a tensor without a name")
        tensors, name, beside = {DATASET: content}, DATASET, None
    else:
        require(isinstance(content, dict), label, "a tensor [n, d] or a dict of them", content)
        model = content.get("model")  # in a training checkpoint
        tensors = {n: x for n, x in content.items() if isinstance(n, str) and isinstance(x, Tensor)}
        if not tensors:
            others, value = [repr(n) for n, x in content.items() if isinstance(x, Tensor)], content.get(name or DATASET)
            require(not others, label, "tensors whose names are texts", ", ".join(others[:5]))
            require(value is None, label, f"a tensor {name or DATASET!r}", value)
        name = _choose(label, list(tensors), name, model if isinstance(model, dict) else ())
        beside = content.get(INDICES) if name != INDICES else None
    storages = {n: x.untyped_storage() for n, x in tensors.items() if x.layout == torch.strided}
    starts = {n: getattr(storage, "_checkpoint_offset", None) for n, storage in storages.items()}
    has_offsets = not (records and starts) or any(start is not None for start in starts.values())
    require(has_offsets, label, "a PyTorch that tells where .pt files have their values, as 2.13 does",
            f"{torch.__version__}, which does not: save them as .npy or safetensors")  # fmt: skip

    def rows_of(name: str, width: int) -> MappedRows:
        x = tensors[name]
        require(x.layout == torch.strided, label, "a dense tensor", f"one of layout {x.layout}")
        require(not x.is_neg(), label, "a plain tensor", "a view that negates its values: save a clone of it")
        size, start = x.element_size(), starts[name]
        first, strides = int(x.storage_offset()) * size, [stride * size for stride in x.stride()]
        stop = first + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + size
        record = None if start is None else records.get(start)
        if start is None or record is None or (x.numel() and stop > record[0]):
            fail(label, f"the values of {name!r} in the file", "none, compressed ones or too few")
        part = (start, *record)
        return MappedRows(path, start + first, len(x), width, x.dtype, strides=(*strides, size)[:2], record=part)

    x = tensors[name]
    _checked_dtype(label, tuple(x.shape), str(x.dtype).removeprefix("torch."), x.dtype if x.dtype in FLOATS else None)
    source = rows_of(name, x.shape[1])
    if isinstance(beside, Tensor):
        indices, kind = rows_of(INDICES, 1), str(beside.dtype).removeprefix("torch.")
        indices.check(label)
        read = functools.partial(indices.read, 0, source.rows)
        source.indices = _read_indices(label, beside.shape, source.rows, kind, lambda: read().flatten().numpy())
    elif beside is not None:
        require(isinstance(beside, (list, tuple)), label, "`indices` in a tensor or a list", beside)
        with reading(label, "`indices` of numbers or texts alone", "others"):
            given = np.array(beside)
            given = np.char.encode(given) if given.dtype.kind == "U" else given  # bytes, as in HDF5
        source.indices = _read_indices(label, given.shape, source.rows, str(given.dtype), lambda: given)
    return source


def _torch_records(path: Path) -> tuple[str, dict[int, tuple[int, int]]]:
    """Byte order, and {start: (bytes, CRC-32)} of the value records of a torch file; reads the other records whole."""
    order, records = "little", {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if "/data/" not in record.filename:
                content = archive.read(record) if record.CRC else b""  # 0: saved without checksums
                order = content.decode() if record.filename.endswith("/byteorder") and content else order
            elif record.compress_type == zipfile.ZIP_STORED:
                file.seek(record.header_offset)
                signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
                start = record.header_offset + 30 + name + extra
                if signature == b"PK\3\4" and start + record.file_size <= archive.start_dir:
                    records[start] = record.file_size, record.CRC
    return order, records


def _listed(names) -> str:
    """The first five names for a message, with a hint."""
    some = ", ".join(sorted(names)[:5]) + ", ..." * (len(names) > 5)
    return f"{some} (FILE:DATASET takes one of them)" if some else "nothing"


def _read_indices(label: str, shape, rows: int, kind: str, read) -> np.ndarray:
    """Check and return `read()`: `indices` [rows], numbers or texts, of the dtype named `kind`.

    Raises ValueError also for NaN, and for trailing zeros that were never overwritten.
    """
    require(list(shape or ()) == [rows], label, f"`indices` of shape [{rows}]", f"shape {list(shape or ())}")
    compared, is_object = "`indices` that are whole numbers, floats or texts", kind == "object"
    require(is_object or bool(re.fullmatch(_COMPARABLE, kind, re.IGNORECASE)), label, compared, kind)
    with reading(label, "`indices` that can be read", "damaged ones"):
        indices = read()
    require(not is_object or all(isinstance(x, (str, bytes)) for x in indices), label, compared, "objects")
    if indices.dtype.kind not in "biuf":
        return indices
    nan = np.flatnonzero(indices != indices)
    require(not len(nan), label, "`indices` that are no NaN", f"NaN in row {nan[0] if len(nan) else 0:,}")
    zero = indices == 0
    if rows and zero[-1] and zero.sum() > 1:  # a single zero may be an index
        start = 1 if zero.all() else rows - int(np.argmin(zero[::-1]))
        fail(label, "`indices` of every row", f"zeros from row {start:,} to the last, {rows - 1:,}: was it stopped?")
    return indices


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
            shape, stored = tuple(dataset.shape or ()), dataset.dtype
        kind = _checked_dtype(label, shape, str(stored), _numpy_dtype(stored.newbyteorder("=")))
        with reading(label, "a complete HDF5 file"):
            gap, offset = _gap(dataset), _mappable(file, dataset)
            near, *above = (file.get(str(group / INDICES)) for group in PurePosixPath("/", name).parents)
            given = [x for x in (near, *above) if isinstance(x, h5py.Dataset) and (x is near or x.shape == shape[:1])]
            kinds = [str(x.dtype) for x in given[:1]]
        require(not gap, label, f"all of the dataset {name!r}", gap)
        source: MappedRows | HDF5Rows
        if offset is None:
            source = HDF5Rows(label, name, file, dataset, kind)
        else:
            _check_length(label, path, offset + shape[0] * shape[1] * kind.itemsize)
            source = MappedRows(path, offset, shape[0], shape[1], kind)
        for indices, dtype in zip(given, kinds, strict=False):
            source.indices = _read_indices(label, indices.shape, source.rows, dtype, lambda x=indices: x[()])
        if offset is None:
            stack.pop_all()
    return source


def _instead(file, name: str, entry) -> str:
    """Describe what the file has in place of a dataset `name`, for a message."""
    import h5py

    if isinstance(entry, h5py.Group):
        return f"a group of that name with {_listed([f'{name}/{member}' for member in entry])}"
    return _listed(file) if file.get(name, getlink=True) is None else "a link to nothing"


def _mappable(file, dataset) -> int | None:
    """Byte offset of the rows if they are contiguous in `file` itself and of a native type; else None."""
    import h5py

    plist, of = dataset.id.get_create_plist(), h5py.h5o.get_info
    whole = plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0
    native = dataset.id.get_type() == h5py.h5t.py_create(dataset.dtype.newbyteorder("="))
    here = of(dataset.id).fileno == of(file.id).fileno
    return dataset.id.get_offset() if whole and native and here else None


def _gap(dataset) -> str:
    """Describe a part that HDF5 would silently read as fill values; "" if there is none."""
    import h5py

    plist, access = dataset.id.get_create_plist(), dataset.id.get_access_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL:
        return _virtual_gap(dataset)
    if plist.get_layout() == h5py.h5d.CHUNKED:
        chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        missing = chunks - dataset.id.get_num_chunks()
        return f"{missing:,} of {chunks:,} chunks never written" if missing else ""
    if 0 in dataset.shape:
        return ""
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
    """`_gap` of a virtual dataset: in its sources or between them."""
    import h5py

    own, missing = Path(dataset.file.filename), math.prod(dataset.shape)
    folders = Path(os.fsdecode(dataset.id.get_access_plist().get_virtual_prefix())), own.parent, Path()
    for to, name, inner, selection in dataset.virtual_sources():
        missing -= _points(to)
        if "%b" in name + inner:  # numbered files, resolved by HDF5
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
    """Number of values in an HDF5 selection; infinity for an unlimited one."""
    try:
        return selection.get_select_npoints()
    except RuntimeError:
        return math.inf
