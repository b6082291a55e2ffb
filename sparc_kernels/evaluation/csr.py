"""Write the sparse codes of feature files as CSR matrices."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.progress import Watch
from ..core.validation import MARK, require, temporary_of, writing
from ..distributed.processes import Processes
from ..io.atomic import write_atomically
from ..io.features import Features
from ..io.shards import files_of
from ..metrics import Codes
from ..nn.module import AlignedSAE
from .by_rows import ALONE, own_part
from .evaluate import codes_of

FORMATS = ("npz", "safetensors")
_NAME_MAX = 255  # bytes, of most file systems
_COPY = 16 << 20  # bytes copied at a time
_COLLECT = 1 << 21  # values that each process sends at a time


def csr_rows(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Convert codes of b rows to the parts of a CSR matrix; values that are not > 0 are dropped.

    Args:
        codes: of b rows.

    Returns:
        Counts int64 [b], latents int32 [nnz], ascending within a row, and values [nnz].
    """
    order = codes.indices.argsort(1)
    latents, values = codes.indices.gather(1, order), codes.values.gather(1, order)
    fired = values > 0
    return fired.sum(1), latents[fired].int(), values[fired]


class CsrWriter:
    """Write one CSR matrix [n, N] batch by batch; memory: one batch and the row counts.

    `npz` loads with scipy.sparse.load_npz; `safetensors` has the tensors `data`, `indices`, `indptr` and `shape`.

    Args:
        path: of the result; its suffix selects the format.
        n_latents: N.
        folder: for temporary files; None: the system's.
    """

    def __init__(self, path: Path, n_latents: int, folder: Path | None):
        self.path, self.n_latents = path, n_latents
        self.counts: list[np.ndarray] = []
        self.files = {name: tempfile.TemporaryFile(dir=folder) for name in ("indices", "data")}  # noqa: SIM115

    def add(self, codes: Codes) -> None:
        """Append the rows of a batch."""
        counts, latents, values = csr_rows(codes)
        self.counts.append(counts.cpu().numpy())
        self.files["indices"].write(latents.cpu().numpy().data)
        self.files["data"].write(values.cpu().numpy().data)
        self.dtype = values.cpu().numpy().dtype

    def collect(self, processes: Processes) -> None:
        """Append the rows of the other processes, in their order, in the writer of the one that leads.

        Args:
            processes: that have added consecutive rows each, the leading one some; all call this.
        """
        counts = np.concatenate(self.counts) if self.counts else np.empty(0, np.int64)
        every = processes.to_first((counts, getattr(self, "dtype", None)))
        sizes = processes.share(int(counts.sum()))
        if every is not None:
            self.counts = [counts for counts, _ in every]
            self.dtype = next(dtype for _, dtype in every if dtype is not None)
        for name, file in self.files.items():
            file.seek(0)
            for i in range(-(-max(sizes[1:], default=0) // _COLLECT)):
                piece = file.read(_COLLECT * self._itemsize(name)) if every is None and sizes[processes.rank] else b""
                pieces = processes.to_first(piece)
                for rank, piece in enumerate(pieces or ()):
                    if piece:
                        file.seek((sum(sizes[:rank]) + i * _COLLECT) * self._itemsize(name))
                        file.write(piece)

    def _itemsize(self, name: str) -> int:
        return 4 if name == "indices" else self.dtype.itemsize

    def finish(self) -> int:
        """Write the file and return its number of values."""
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(self.counts))])
        small = indptr[-1] < 2**31  # SciPy wants both index arrays in one dtype
        parts = {
            "indices": (np.dtype(np.int32), (int(indptr[-1]),)),
            "indptr": (np.dtype(np.int32 if small else np.int64), (len(indptr),)),
            "data": (self.dtype, (int(indptr[-1]),)),
            "shape": (np.dtype(np.int64), (2,)),
        }
        arrays = {"indptr": indptr.astype(parts["indptr"][0]), "shape": np.array([len(indptr) - 1, self.n_latents])}
        write = self._write_npz if self.path.suffix == ".npz" else self._write_safetensors
        write_atomically(self.path, lambda file: write(file, parts, arrays))
        return int(indptr[-1])

    def close(self) -> None:
        """Delete the temporary files."""
        for file in self.files.values():
            file.close()

    def _copy(self, name: str, arrays: dict, to) -> None:
        if name in arrays:
            to.write(np.ascontiguousarray(arrays[name]).data)
        else:
            self.files[name].seek(0)
            shutil.copyfileobj(self.files[name], to, _COPY)

    def _write_npz(self, file, parts: dict, arrays: dict) -> None:
        import zipfile

        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("format.npy", "w") as member:
                np.lib.format.write_array(member, np.array(b"csr"))
            for name, (dtype, shape) in parts.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    self._copy(name, arrays, member)
            archive.comment = MARK.encode()

    def _write_safetensors(self, file, parts: dict, arrays: dict) -> None:
        header: dict = {"__metadata__": {"generator": MARK, "format": "csr"}}
        kinds, offset = {"int32": "I32", "int64": "I64", "float32": "F32", "float64": "F64"}, 0
        for name, (dtype, shape) in sorted(parts.items(), key=lambda part: -part[1][0].itemsize):  # keeps alignment
            size = dtype.itemsize * int(np.prod(shape))
            entry = {"dtype": kinds[dtype.name], "shape": list(shape), "data_offsets": [offset, offset + size]}
            header[name], offset = entry, offset + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            if name != "__metadata__":
                self._copy(name, arrays, file)


def paths_of(streams: Iterable[str], out: Path, form: str) -> dict[str, Path]:
    """Return the output file of each stream.

    Args:
        streams: names.
        out: folder.
        form: suffix of the files, one of FORMATS.

    Returns:
        {s: path}.

    Raises:
        ValueError: a name that contains a slash or is too long for a file.
    """
    paths = {}
    for s in streams:
        require(Path(s).name == s, "streams", "names that can name a file, without a slash", repr(s))
        paths[s] = out / f"{s}.{form}"
        max_bytes = _NAME_MAX - len(os.fsencode(temporary_of(paths[s]).name.removeprefix(s)))
        require(len(os.fsencode(s)) <= max_bytes, "streams", f"names of at most {max_bytes} bytes", repr(s))
    return paths


@torch.no_grad()
def write_codes(
    model: AlignedSAE,
    features: Features,
    out: str | Path,
    form: str = "npz",
    *,
    batch_size: int = 1024,
    watch: Watch = iter,
    processes: Processes = ALONE,
) -> dict:
    """Write the codes of all rows to out/NAME.npz or out/NAME.safetensors, one file for each stream.

    Args:
        model: put in eval mode.
        features: of the model's streams.
        out: folder.
        form: one of FORMATS.
        batch_size: rows encoded at a time.
        watch: wraps the iterator of batches, for a progress bar.
        processes: that call this function together: each encodes its part of the batches, and the leading one writes
            the codes of all. The others keep theirs in temporary files of their own system until then.

    Returns:
        {s: number of values in its file}; on other processes than the leading one {}.

    Raises:
        ValueError: as `paths_of` and `Features.check`; a folder that is not writable; files there that are the
            features' own or that sparc_kernels did not write. No output is left behind.
    """
    out = Path(out)
    paths = paths_of(features.widths, out, form)
    device = next(model.parameters()).device
    model.eval()
    with ExitStack() as stack:
        with processes.together():
            if processes.leads:
                stack.enter_context(writing("out", paths.values(), files_of(features.paths)))
            folder = out if processes.leads else None
            writers = {s: CsrWriter(path, model.n_latents, folder) for s, path in paths.items()}
            for writer in writers.values():
                stack.callback(writer.close)
        for _, x in watch(features.batches(batch_size, own_part(range(0, features.rows, batch_size), processes))):
            outputs = model({s: rows.to(device) for s, rows in x.items()})
            for s, codes in codes_of(outputs, model.n_latents).items():
                writers[s].add(codes)
        values: dict[str, int] = {}
        if processes.size > 1:
            for writer in writers.values():
                writer.collect(processes)
        with processes.together():
            try:
                for s, writer in writers.items() if processes.leads else ():
                    values[s] = writer.finish()
            except BaseException:  # for example a full disk: no partial set of streams stays
                for s in values:
                    paths[s].unlink()
                raise
        return values
