"""Argument checks. Every error is a ValueError that names the argument, what was expected and what was given.

Messages are built only on failure: under torch.compile a shape may be symbolic and cannot be formatted.
"""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TORCH_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MARK = "written by sparc_kernels"  # in the first or last bytes of files that a command may overwrite
_SPELLINGS = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
_SPELLINGS |= {"double": "fp64", "float": "fp32", "half": "fp16", "f64": "fp64", "f32": "fp32", "f16": "fp16"}


def precision_name(text: str) -> str:
    """Return fp64, fp32, bf16 or fp16 for every usual spelling ("float32", "torch.bfloat16"); other text unchanged."""
    name = text.lower().removeprefix("torch.")
    return _SPELLINGS.get(name, name)


def describe(value) -> str:
    """Describe a value briefly, for error messages."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"


def fail(argument: str, expected: str, got) -> NoReturn:
    """Raise a ValueError that names the argument.

    Args:
        argument: its name.
        expected: what was expected.
        got: what was given; text is used as it is, other values are described.
    """
    raise ValueError(f"{argument}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def require(condition: bool, argument: str, expected: str, got) -> None:
    """Call `fail` unless the condition holds; for messages without shapes.

    Args:
        condition: what must hold.
        argument: its name.
        expected: what was expected.
        got: what was given; text is used as it is, other values are described.
    """
    if not condition:
        fail(argument, expected, got)


def missing(what: str, package: str) -> ImportError:
    """Build the error for an optional package that is not installed.

    Args:
        what: what needs it.
        package: name for pip.
    """
    return ImportError(f"{what} needs {package}: pip install {package}")


@contextlib.contextmanager
def reading(label: str, expected: str, got: str = "one that cannot be read"):
    """Context that turns any error of a file reader into a ValueError; a damaged file may raise nearly anything.

    Args:
        label: names the file in the message.
        expected: what was expected.
        got: what was given.

    Raises:
        ValueError: reading failed.
        PermissionError: as raised inside.
    """
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        fail(label, expected, f"{got} ({first_line(error)})")


def first_line(error: Exception) -> str:
    """First line of an error's message, or the name of its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_marked(path: Path) -> bool:
    """Whether a file begins or ends with MARK: sparc_kernels wrote it."""
    with open(path, "rb") as file:
        head = file.read(256)
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(MARK)))
        return MARK.encode() in head + file.read()


def temporary_of(path: Path) -> Path:
    """Name of a file while it is being written."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def writing(argument: str, targets: Iterable[Path], inputs: Iterable[tuple[str, Path]], ours: Callable = is_marked):
    """Context for work that ends with writing files: check the targets, make their folders and try to write there.

    If the work fails, folders made here that are empty are removed.

    Args:
        argument: names the targets in messages.
        targets: files to write.
        inputs: label and path of each file that is read.
        ours: whether an existing file may be overwritten.

    Raises:
        ValueError: a target cannot be written or must not be overwritten.
    """
    targets = list(targets)
    check_targets(argument, targets, inputs, ours)
    made = [p for path in targets for p in path.parents if not os.path.lexists(p)]
    try:
        for path in targets:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary_of(path).write_bytes(b"")
                temporary_of(path).unlink()
            except OSError as error:
                known = {"a file": path.parent.is_file(), "a link to nothing": path.parent.is_symlink()}
                reason = next((what for what in known if known[what]), error.strerror)
                fail(argument, f"a folder in which {path.name} can be written", f"{path.parent}, {reason}")
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_targets(
    argument: str, targets: Iterable[Path], inputs: Iterable[tuple[str, Path]], ours: Callable = is_marked
) -> None:
    """Refuse targets that are inputs, by any path, and existing files that are not `ours`.

    Args:
        argument: names the targets in messages.
        targets: files to write.
        inputs: label and path of each file that is read; files may be missing.
        ours: whether an existing file may be overwritten.

    Raises:
        ValueError: a target is a folder, an input or not ours.
    """
    read = {_identity(file): label for label, file in inputs if os.path.exists(file)}
    for path in filter(os.path.exists, targets):
        require(not path.is_dir(), argument, f"no folder {path.name} in {path.parent}", "one")
        label = read.get(_identity(path))
        require(label is None, argument, "a file that is not read", f"{path}, which is {label}")
        mine, got = path.is_file() and ours(path), f"{path}: take another place, or move it"
        require(mine, argument, "no file that sparc_kernels did not write", got)


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file, equal for all its paths."""
    status = path.stat()
    return status.st_dev, status.st_ino


def check_int(argument: str, value, low: int, high: int | None = None, high_name: str = "") -> int:
    """Check an integer (Python's or NumPy's, not a bool) and return it as an int.

    Args:
        argument: its name.
        value: what was given.
        low: least value.
        high: greatest value; None: no limit.
        high_name: explains `high` in the message.

    Raises:
        ValueError: it is no integer or out of range.
    """
    ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (ok and value >= low and (high is None or value <= high)):
        bound = f"an int >= {low}" if high is None else f"an int in {low}..{high}"
        fail(argument, f"{bound} ({high_name})" if high_name else bound, repr(value))
    return int(value)


def check_number(argument: str, value, low: float = 0.0) -> float:
    """Check a finite real number (not a bool) and return it.

    Args:
        argument: its name.
        value: what was given.
        low: least value.

    Raises:
        ValueError: it is no finite number or less than `low`.
    """
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value < float("inf")
    if not ok:
        fail(argument, f"a finite number >= {low:g}", repr(value))
    return value


def plain(value):
    """Convert NumPy scalars to Python's, in containers too, so that torch.load(weights_only=True) reads them."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if type(value) is dict:
        return {plain(key): plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def check_bool(argument: str, value) -> bool:
    """Check True or False (Python's or NumPy's) and return it as a bool.

    Raises:
        ValueError: it is neither.
    """
    require(isinstance(value, (bool, np.bool_)), argument, "True or False", repr(value))
    return bool(value)


def check_device(argument: str, value) -> torch.device:
    """Check a device and return it.

    Args:
        argument: its name.
        value: "cpu", "cuda", "cuda:1", a torch.device, or "auto": CUDA if there is a GPU.

    Raises:
        ValueError: it is no CPU or GPU of this machine.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if value == "auto":
        value = torch.device("cuda", torch.cuda.current_device()) if gpus else "cpu"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        device = None
    ok = device is not None and (device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < gpus))
    seen = f"PyTorch sees {gpus or 'no'} GPU{'s' * (gpus > 1)}"
    require(ok, argument, "auto, cpu, or cuda or cuda:N of a GPU that is there", f"{str(value)!r} where {seen}")
    return device


def _shape_text(shape: tuple) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _fits(value: torch.Tensor, shape: tuple) -> bool:
    return value.dim() == len(shape) and all(
        isinstance(n, str) or n == m for n, m in zip(shape, value.shape, strict=True)
    )


def check_tensor(argument: str, value, shape: tuple, like: torch.Tensor | None = None) -> torch.Tensor:
    """Check a floating tensor and return it.

    Args:
        argument: its name.
        value: what was given.
        shape: sizes; a name in place of a size allows any and is part of the message.
        like: tensor whose device and dtype it must have.

    Raises:
        ValueError: type, dtype, shape or device is wrong.
    """
    if not isinstance(value, torch.Tensor):
        fail(argument, f"a tensor of shape {_shape_text(shape)}", value)
    require(value.dtype in FLOATS, argument, "a float64, float32, bfloat16 or float16 tensor", value)
    if not _fits(value, shape):
        fail(argument, f"shape {_shape_text(shape)}", value)
    if like is not None:
        require(value.device == like.device, argument, f"a tensor on {like.device}", value)
        require(value.dtype == like.dtype, argument, f"dtype {str(like.dtype).removeprefix('torch.')}", value)
    return value


def check_indices(argument: str, value, shape: tuple, n_latents: int, device: torch.device) -> torch.Tensor:
    """Check int64 latent ids and return them; their range on a CPU only, since on a GPU reading synchronises.

    Args:
        argument: its name.
        value: what was given.
        shape: sizes; a name in place of a size allows any.
        n_latents: N.
        device: where they must be.

    Raises:
        ValueError: type, dtype, shape, device or, on a CPU, an id is wrong.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        fail(argument, f"an int64 tensor of shape {_shape_text(shape)}", value)
    if not _fits(value, shape):
        fail(argument, f"shape {_shape_text(shape)}", value)
    require(value.device == device, argument, f"a tensor on {device}", value)
    real = type(value) is torch.Tensor and not torch.compiler.is_compiling()
    if value.device.type == "cpu" and real and value.numel():
        low, high = int(value.min()), int(value.max())
        require(low >= 0 and high < n_latents, argument, f"latent ids in 0..{n_latents - 1}", f"{low}..{high}")
    return value


def check_inverse(argument: str, inverse, indices: torch.Tensor, sizes: tuple[int, int, int]) -> None:
    """Check that an InverseIndex fits the indices, by the sizes of its parts.

    Args:
        argument: its name.
        inverse: what was given; None is allowed.
        indices: the indices.
        sizes: elements of order, offsets and ids.

    Raises:
        ValueError: a part has another dtype, device or size, or is not contiguous.
    """
    if inverse is None:
        return
    ok = isinstance(inverse, tuple) and len(inverse) == 3 and all(isinstance(t, torch.Tensor) for t in inverse)
    require(ok, argument, "what inverse_index(indices, N) returned", inverse)
    for name, tensor, size in zip(("order", "offsets", "ids"), inverse, sizes, strict=True):
        ok = tensor.dtype == torch.int32 and tensor.device == indices.device and tensor.is_contiguous()
        if not ok or tensor.dim() != 1 or tensor.numel() != size:
            fail(f"{argument}.{name}", f"a contiguous int32 tensor of shape [{size}] on {indices.device}", tensor)


def check_same_length(first: str, **sequences) -> int:
    """Check that all sequences are non-empty lists or tuples of one length, and return it.

    Args:
        first: name of the sequence that sets the length.
        **sequences: the sequences by name.

    Raises:
        ValueError: one is no list or tuple, is empty or has another length.
    """
    n = len(sequences[first]) if isinstance(sequences[first], (list, tuple)) else 0
    for name, value in sequences.items():
        require(isinstance(value, (list, tuple)) and len(value) > 0, name, "a non-empty list of tensors", value)
        require(len(value) == n, name, f"{n} tensors, one per stream as in {first}", f"{len(value)}")
    return n
