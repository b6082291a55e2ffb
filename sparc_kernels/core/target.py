"""The GPU that launchers work for, where it is not the one at hand: tracing, compiling ahead, tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ._triton import INTERPRETED


class Target(NamedTuple):
    """What launchers ask of a GPU and of torch's settings."""

    arch: int  # as `launch.device.capability` gives it
    tf32: bool = False  # whether float32 products may be tf32
    interpreted: bool = False  # the small blocks that Triton's interpreter wants
    gpu_name: str | None = None  # whose recorded settings count


_current: Target | None = None


def current() -> Target | None:
    """The target in place; None: the tensors' own GPU."""
    return _current


@contextmanager
def as_target(target: Target) -> Iterator[None]:
    """Launchers work for this GPU until the end."""
    global _current
    before, _current = _current, target
    try:
        yield
    finally:
        _current = before


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which wants few programs on small blocks."""
    return INTERPRETED if _current is None else _current.interpreted
