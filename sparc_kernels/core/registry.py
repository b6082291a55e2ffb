"""Registration of the package's operators with torch, and the choice between their two implementations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from ._triton import HAS_TRITON, INTERPRETED
from .numerics import autocast_enabled, no_autocast
from .target import current

NAMESPACE = "sparc_kernels"
IMPLS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Operator(NamedTuple):
    """Implementations of one operator; they take the schema's arguments by name, without the last, `impl`."""

    names: tuple[str, ...]
    torch_impl: Callable
    triton_impl: Callable
    fake: Callable

    def run(self, *args):
        """Run the implementation named by the last argument."""
        *args, impl = args
        return (self.triton_impl if impl == "triton" else self.torch_impl)(**dict(zip(self.names, args, strict=True)))


OPERATORS: dict[str, Operator] = {}  # every registered operator


def operator_of(func) -> Operator | None:
    """Return the operator that a dispatch mode received, None for torch's own. Its `run` stays inside the mode."""
    return OPERATORS[func._schema.name.split("::")[1]] if func.namespace == NAMESPACE else None


def register(name: str, schema: str, *, torch_impl, triton_impl, fake):
    """Define `sparc_kernels::name` and return the callable operator.

    Operators have no gradients of their own: the autograd.Function that calls them does. Inside, autocast is off and
    the tensors' GPU is the current one.

    Args:
        name: name in the namespace.
        schema: arguments and returns; the last argument must be `str impl`, as `resolve_impl` returns it.
        torch_impl: implementation in torch.
        triton_impl: implementation with Triton kernels.
        fake: shapes and dtypes of the results, for tracing.
    """
    qualname = f"{NAMESPACE}::{name}"
    names = tuple(argument.name for argument in torch._C.parse_schema(f"{qualname}{schema}").arguments[:-1])
    OPERATORS[name] = Operator(names, torch_impl, triton_impl, fake)
    torch.library.define(qualname, schema)

    def dispatch(*args):
        device = next(_tensors(args)).device
        if autocast_enabled(device) or _is_elsewhere(device):  # empty contexts would take 2 us
            with no_autocast(device), on_device(device):
                return OPERATORS[name].run(*args)
        return OPERATORS[name].run(*args)

    torch.library.impl(qualname, "default")(dispatch)  # every device; Triton is chosen by `impl`
    torch.library.register_fake(qualname)(lambda *args: fake(**dict(zip(names, args, strict=False))))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def on_device(device: torch.device):
    """Context in which kernels are launched on the device: Triton uses the current one, not the tensors'."""
    return torch.cuda.device(device) if _is_elsewhere(device) else nullcontext()


def _is_elsewhere(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device()


def _tensors(args):
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def resolve_impl(impl: str, tensor: torch.Tensor, integers: bool = False) -> str:
    """Resolve "auto" to "triton" (CUDA tensors of a supported dtype, Triton installed) or "torch".

    Args:
        impl: "auto", "triton" or "torch".
        tensor: decides by its device and dtype.
        integers: the operator takes int64 instead of floating tensors.

    Raises:
        ValueError: impl is unknown, or "triton" cannot run on the tensor.
    """
    dtypes = (torch.int64,) if integers else TRITON_DTYPES
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if current() is not None:
        return "torch" if impl == "torch" else "triton"
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
