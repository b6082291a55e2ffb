"""Argument checks. Every error is a ValueError that names the argument, what was expected and what came.

Messages are built only on failure: under torch.compile a shape may be symbolic, and a symbol has no text.
"""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TORCH_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MARK = "written by sparc_kernels"  # in the first or last bytes of files that a command may write over
_SPELLINGS = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
_SPELLINGS |= {"double": "fp64", "float": "fp32", "half": "fp16", "f64": "fp64", "f32": "fp32", "f16": "fp16"}


def precision_name(text: str) -> str:
    """fp64, fp32, bf16 or fp16 for every usual spelling ("float32", "torch.bfloat16"); another text as it is."""
    name = text.lower().removeprefix("torch.")
    return _SPELLINGS.get(name, name)


def describe(value) -> str:
    """A short account of what came, for error messages."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"


def fail(argument: str, expected: str, got) -> None:
    raise ValueError(f"{argument}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def require(condition: bool, argument: str, expected: str, got) -> None:
    """For messages without shapes in them; `got` is described, or given as text."""
    if not condition:
        fail(argument, expected, got)


def missing(what: str, package: str) -> ImportError:
    """An error that says what installs a package of an extra, however sparc_kernels itself was installed."""
    return ImportError(f"{what} needs {package}: pip install {package}")


@contextlib.contextmanager
def reading(label: str, expected: str, got: str = "one that cannot be read"):
    """Name what the libraries that read files raise, which for a damaged one is nearly anything."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        fail(label, expected, f"{got} ({first_line(error)})")


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_marked(path: Path) -> bool:
    """Whether a file begins or ends with MARK, as those do that sparc_kernels wrote."""
    with open(path, "rb") as file:
        head = file.read(256)
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(MARK)))
        return MARK.encode() in head + file.read()


def temporary_of(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def writing(argument: str, targets: Iterable[Path], inputs: Iterable[tuple[str, Path]], ours: Callable = is_marked):
    """`check_targets`, then make the folder of the targets and try each of them; for the work that ends with them.

    The folder goes again where the work fails and has left nothing in it.

    Raises: ValueError.
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
    """Refuse files to write that are inputs, by this or another path, and what is there and is not `ours`.

    Args:
        inputs: what messages call a file, and the file, which may be missing.
    """
    read = {_identity(file): label for label, file in inputs if os.path.exists(file)}
    for path in filter(os.path.exists, targets):
        require(not path.is_dir(), argument, f"no folder {path.name} in {path.parent}", "one")
        label = read.get(_identity(path))
        require(label is None, argument, "a file that is not read", f"{path}, which is {label}")
        mine, got = path.is_file() and ours(path), f"{path}: take another place, or move it"
        require(mine, argument, "no file that sparc_kernels did not write", got)


def _identity(path: Path) -> tuple[int, int]:
    """Of the file, whatever path leads to it."""
    found = path.stat()
    return found.st_dev, found.st_ino


def check_int(argument: str, value, low: int, high: int | None = None, high_name: str = "") -> int:
    """An integer (Python's or NumPy's, not a bool) in low..high, as an int."""
    ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (ok and value >= low and (high is None or value <= high)):
        bound = f"an int >= {low}" if high is None else f"an int in {low}..{high}"
        fail(argument, f"{bound} ({high_name})" if high_name else bound, repr(value))
    return int(value)


def check_number(argument: str, value, low: float = 0.0) -> float:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value < float("inf")
    if not ok:
        fail(argument, f"a finite number >= {low:g}", repr(value))
    return value


def plain(value):
    """NumPy's numbers and texts as Python's, in dicts, tuples and lists too: torch.load(weights_only=True) reads it."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if type(value) is dict:
        return {plain(key): plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def check_bool(argument: str, value) -> bool:
    """True or False (Python's or NumPy's), as a bool."""
    require(isinstance(value, (bool, np.bool_)), argument, "True or False", repr(value))
    return bool(value)


def check_device(argument: str, value) -> torch.device:
    """A device of this machine, from "cpu", "cuda", "cuda:1" or "auto": CUDA where there is one."""
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
    """A floating tensor of `shape`; a name in place of a size allows any and is said in the message."""
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
    """int64 latent ids. Their range is checked on the CPU only: on a GPU it would be a host synchronisation."""
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
    """An InverseIndex made for these indices, as far as the sizes of its parts can tell."""
    if inverse is None:
        return
    ok = isinstance(inverse, tuple) and len(inverse) == 3 and all(isinstance(t, torch.Tensor) for t in inverse)
    require(ok, argument, "what inverse_index(indices, N) returned", inverse)
    for name, tensor, size in zip(("order", "offsets", "ids"), inverse, sizes, strict=True):
        ok = tensor.dtype == torch.int32 and tensor.device == indices.device and tensor.is_contiguous()
        if not ok or tensor.dim() != 1 or tensor.numel() != size:
            fail(f"{argument}.{name}", f"a contiguous int32 tensor of shape [{size}] on {indices.device}", tensor)


def check_same_length(first: str, **sequences) -> int:
    """All keyword sequences are non-empty lists or tuples as long as the one called `first`."""
    n = len(sequences[first]) if isinstance(sequences[first], (list, tuple)) else 0
    for name, value in sequences.items():
        require(isinstance(value, (list, tuple)) and len(value) > 0, name, "a non-empty list of tensors", value)
        require(len(value) == n, name, f"{n} tensors, one per stream as in {first}", f"{len(value)}")
    return n
