"""Dtypes of sums, padded and sparse matrices, autocast's state, and which memory a tensor shows."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from .target import current


def autocast_enabled(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device):
    """Context in which products run in the dtypes of their operands."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def memory_of(x: torch.Tensor) -> tuple[StorageWeakRef, int]:
    """Which memory a tensor shows, the same for its aliases. Does not keep it; what lies there later is another."""
    return StorageWeakRef(x.untyped_storage()), x.storage_offset()


def is_host_readable(tensor: torch.Tensor) -> bool:
    """Whether Python may read values of the tensor: everywhere but on a CPU that is a wait for the device."""
    return tensor.device.type == "cpu"


def csr(offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """A sparse matrix of offsets.numel() - 1 rows, unchecked."""
    _quietly_beta()
    shape = offsets.numel() - 1, width
    return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)


@functools.cache
def _quietly_beta():
    """torch warns once that its CSR format is beta, which is no news to our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def pad_width(x: torch.Tensor) -> torch.Tensor:
    """x [rows, d] for a product over d: on a CPU half precision is padded with zeros to a multiple of 32 columns.

    At other widths oneDNN's product (its issue 5717, on CPUs with AMX) turns a row with one inf into NaN.
    """
    missing = -x.shape[1] % 32
    return F.pad(x, (0, missing)) if missing and x.device.type == "cpu" and x.dtype.itemsize == 2 else x


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and losses are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allow_tf32() -> bool:
    """Whether float32 products may be tf32, by torch's newer setting where it exists.

    Once a user has touched that one, torch refuses to read the old one.
    """
    if target := current():
        return target.tf32
    new = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return new == "tf32" if new is not None else torch.get_float32_matmul_precision() != "highest"
