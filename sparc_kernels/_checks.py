"""Argument checks. Every error is a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value) -> str:
    """A short account of what came, for error messages."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"


def require(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def check_int(argument: str, value, low: int, high: int | None = None, high_name: str = "") -> int:
    bound = f"an int >= {low}" if high is None else f"an int in {low}..{high}{f' ({high_name})' if high_name else ''}"
    ok = isinstance(value, int) and not isinstance(value, bool)
    require(ok and value >= low and (high is None or value <= high), argument, bound, repr(value))
    return value


def check_number(argument: str, value, low: float = 0.0) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < float("inf")
    require(ok, argument, f"a finite number >= {low:g}", repr(value))
    return value


def check_tensor(argument: str, value, shape: tuple, like: torch.Tensor | None = None) -> torch.Tensor:
    """A floating tensor of `shape` (None matches any size, a name in the tuple is any size and said in the message)."""
    want = f"[{', '.join(str(n) if n is not None else '?' for n in shape)}]"
    require(isinstance(value, torch.Tensor), argument, f"a tensor of shape {want}", value)
    require(value.dtype in FLOATS, argument, "a float64, float32, bfloat16 or float16 tensor", value)
    fits = value.dim() == len(shape) and all(
        not isinstance(n, int) or n == m for n, m in zip(shape, value.shape, strict=True)
    )
    require(fits, argument, f"shape {want}", value)
    if like is not None:
        require(value.device == like.device, argument, f"a tensor on {like.device}", value)
        require(value.dtype == like.dtype, argument, f"dtype {str(like.dtype).removeprefix('torch.')}", value)
    return value


def check_indices(argument: str, value, shape: tuple, n_latents: int, device: torch.device) -> torch.Tensor:
    """int64 latent ids. Their range is checked on the CPU only: on a GPU it would be a host synchronisation."""
    want = f"[{', '.join(map(str, shape))}]"
    require(isinstance(value, torch.Tensor), argument, f"an int64 tensor of shape {want}", value)
    require(value.dtype == torch.int64, argument, "an int64 tensor", value)
    fits = value.dim() == len(shape) and all(
        not isinstance(n, int) or n == m for n, m in zip(shape, value.shape, strict=True)
    )
    require(fits, argument, f"shape {want}", value)
    require(value.device == device, argument, f"a tensor on {device}", value)
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        low, high = int(value.min()), int(value.max())
        require(low >= 0 and high < n_latents, argument, f"latent ids in 0..{n_latents - 1}", f"{low}..{high}")
    return value


def check_same_length(first: str, **sequences) -> int:
    """All keyword sequences are non-empty lists or tuples as long as the one called `first`."""
    n = len(sequences[first]) if isinstance(sequences[first], (list, tuple)) else 0
    for name, value in sequences.items():
        require(isinstance(value, (list, tuple)) and len(value) > 0, name, "a non-empty list of tensors", value)
        require(len(value) == n, name, f"{n} tensors, one per stream as in {first}", f"{len(value)}")
    return n
