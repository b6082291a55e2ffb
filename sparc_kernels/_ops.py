"""Registration of the package's operators with torch, and the choice between their two implementations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from ._triton import HAS_TRITON, INTERPRETED

NAMESPACE = "sparc_kernels"
IMPLS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS: dict[str, tuple] = {}  # name -> (torch_impl, triton_impl, fake) of every registered operator


def register(name: str, schema: str, *, torch_impl, triton_impl, fake):
    """Define `sparc_kernels::name` and return the callable operator.

    The last schema argument must be `str impl`, "torch" or "triton", already resolved by `resolve_impl`. Operators are
    raw: gradients come from the autograd.Function that calls them. Autocast is switched off inside, where dtypes are
    already settled, and the tensors' GPU is the current one.
    """
    qualname = f"{NAMESPACE}::{name}"
    OPERATORS[name] = torch_impl, triton_impl, fake
    torch.library.define(qualname, schema)

    def dispatch(*args):
        *args, impl = args
        fn = triton_impl if impl == "triton" else torch_impl
        device = next(_tensors(args)).device
        with no_autocast(device), on_device(device):
            return fn(*args)

    torch.library.impl(qualname, "default")(dispatch)  # every device; Triton is chosen by `impl`
    torch.library.register_fake(qualname)(lambda *args: fake(*args[:-1]))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def autocast_enabled(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device):
    """Context in which products run in the dtypes of their operands."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def on_device(device: torch.device):
    """Context in which kernels are launched on that device: Triton takes the current one, not the tensors'."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def memory_of(x: torch.Tensor) -> tuple[StorageWeakRef, int]:
    """Which memory a tensor shows, the same for its aliases. Does not keep it; what lies there later is another."""
    return StorageWeakRef(x.untyped_storage()), x.storage_offset()


def _tensors(args):
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def resolve_impl(impl: str, tensor: torch.Tensor, integers: bool = False) -> str:
    """Turn "auto" into "triton" (CUDA tensors of a supported dtype, Triton installed) or "torch"; refuse the rest."""
    dtypes = (torch.int64,) if integers else TRITON_DTYPES
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda and HAS_TRITON and tensor.dtype in dtypes else "torch"
    if impl == "triton" and not INTERPRETED:
        if not HAS_TRITON:
            raise ValueError("impl: expected 'torch' or 'auto' because Triton is not installed, got 'triton'")
        if not tensor.is_cuda:
            raise ValueError(
                f"impl: expected 'torch' or 'auto' for tensors on {tensor.device} ('triton' needs CUDA tensors, or "
                "TRITON_INTERPRET=1 set before the package is imported), got 'triton'"
            )
        if tensor.dtype not in dtypes:
            raise ValueError(f"impl: expected 'torch' or 'auto' for {tensor.dtype} tensors, got 'triton'")
    return impl


def may_look(tensor: torch.Tensor) -> bool:
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


class Beside:
    """Runs work on a second stream of a GPU, beside what is launched on the current one; elsewhere at once.

    The second stream waits for everything launched before, so memory that was made on the current stream may be used,
    and memory of the second stream's own is never taken back early: its next use comes after a wait as well. Captured
    by a CUDA graph as a fork, and a join at `join`, which must come before the results are used or the memory is freed.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self._main = self._side = None
        if enabled and device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._side = _side_stream(self._main.device, self._main.cuda_stream)

    def run(self, work: Callable[[], object]):
        """Launches what work() launches. Returns (its result, what `wait` takes to wait for it alone)."""
        if self._side is None:
            return work(), None
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            return work(), self._side.record_event()

    def wait(self, event) -> None:
        """What is launched on the current stream from here on comes after the event."""
        if event is not None:
            self._main.wait_event(event)

    def join(self) -> None:
        if self._side is not None:
            self._main.wait_stream(self._side)


@functools.cache
def _side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """One for each stream `main` of the caller's. Urgent: its few blocks go before the many of a large kernel."""
    return torch.cuda.Stream(device, priority=-1)
