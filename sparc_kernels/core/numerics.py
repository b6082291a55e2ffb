"""Even parts, accumulator dtypes, padded and sparse matrices, the state of autocast and tf32, identity of memory."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from .target import current


def even_parts(n: int, parts: int) -> list[tuple[int, int]]:
    """Divide 0..n - 1 into consecutive parts; the first n % parts have one more, as torch.tensor_split has it.

    Args:
        n: number of items.
        parts: their number, >= 1; some are empty if n is less.

    Returns:
        [start, stop) of each part.
    """
    size, more = divmod(n, parts)
    return [*pairwise(i * size + min(i, more) for i in range(parts + 1))]


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for the device's type; False for meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device):
    """Context with autocast off: products run in the dtypes of their operands."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def memory_of(x: torch.Tensor) -> tuple[StorageWeakRef, int]:
    """Identify a tensor's memory, equal for aliases at one offset; the weak reference does not keep it alive."""
    return StorageWeakRef(x.untyped_storage()), x.storage_offset()


def is_host_readable(tensor: torch.Tensor) -> bool:
    """True if reading values does not synchronise (CPU)."""
    return tensor.device.type == "cpu"


def csr(offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """Build a sparse CSR matrix without checks.

    Args:
        offsets: [rows + 1], where each row begins.
        columns: [M].
        values: [M].
        width: number of columns.
    """
    _quietly_beta()
    shape = offsets.numel() - 1, width
    return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)


@functools.cache
def _quietly_beta():
    """Trigger and suppress torch's one warning that its CSR format is beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def pad_width(x: torch.Tensor) -> torch.Tensor:
    """Pad x [rows, d] for a product over d: half precision on a CPU, with zeros to a multiple of 32 columns.

    At other widths oneDNN (its issue 5717, on CPUs with AMX) turns a row with one inf into NaN.
    """
    missing = -x.shape[1] % 32
    return F.pad(x, (0, missing)) if missing and x.device.type == "cpu" and x.dtype.itemsize == 2 else x


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulator dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allow_tf32() -> bool:
    """Whether float32 products may be tf32, by torch's newer setting if it exists.

    Once the newer setting was assigned, torch refuses to read the old one.
    """
    if target := current():
        return target.tf32
    new = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return new == "tf32" if new is not None else torch.get_float32_matmul_precision() != "highest"
