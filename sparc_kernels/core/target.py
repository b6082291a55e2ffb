"""The GPU that launchers prepare for, if not the tensors' own: tracing, compiling ahead of time, tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ._triton import INTERPRETED


class Target(NamedTuple):
    """Properties of a GPU and of torch's settings that launchers read."""

    arch: int  # as `launch.device.capability` gives it
    tf32: bool = False  # whether float32 products may be tf32
    interpreted: bool = False  # small blocks, as for Triton's interpreter
    gpu_name: str | None = None  # GPU whose recorded settings are used


_current: Target | None = None


def current() -> Target | None:
    """Return the active target; None: the tensors' own GPU."""
    return _current


@contextmanager
def as_target(target: Target) -> Iterator[None]:
    """Context in which launchers prepare for this GPU."""
    global _current
    before, _current = _current, target
    try:
        yield
    finally:
        _current = before


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where few programs on small blocks are fastest."""
    return INTERPRETED if _current is None else _current.interpreted
