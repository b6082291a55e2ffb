"""Kernel launches."""

from __future__ import annotations

from collections.abc import Callable


def launch(kernel, grid: tuple[int, ...]) -> Callable[..., object]:
    """Return the function that launches a Triton kernel with its arguments and options.

    Args:
        kernel: decorated by triton.jit.
        grid: programs along one to three axes.
    """
    return kernel[grid]
