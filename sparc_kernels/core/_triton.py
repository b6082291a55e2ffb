"""Triton, or a stand-in with which kernel files import where it is not installed."""

from __future__ import annotations

import os

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows, Arm laptops: the torch path runs everything
    HAS_TRITON = False

    class _Absent:
        """Has any attribute; kernels decorated with it are never launched, HAS_TRITON is checked first."""

        def jit(self, fn=None, **options):
            return fn or (lambda fn: fn)

        def __getattr__(self, name):
            return _Absent()

        def __call__(self, *args):  # tl.constexpr
            return _Absent()

    triton = tl = _Absent()

# Register use differs between releases, and some launch settings with it. (0, 0) without Triton.
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2])) if HAS_TRITON else (0, 0)
# Read once, as Triton does: kernels decorated under the interpreter stay interpreted.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def interpreter_problem() -> str:
    """Return why Triton's interpreter would fail in every kernel here, or ""."""
    import numpy

    if not HAS_TRITON or TRITON_VERSION >= (3, 7) or numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0":
        return ""
    return (
        f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4, got {numpy.__version__}: "
        'pip install "numpy<2.4", or Triton 3.7 or newer'
    )


if INTERPRETED and interpreter_problem():
    raise ImportError(f"TRITON_INTERPRET is set, but {interpreter_problem()}")


def tl_dtype(dtype):
    """Return the Triton dtype of a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


__all__ = ["HAS_TRITON", "INTERPRETED", "TRITON_VERSION", "interpreter_problem", "tl", "tl_dtype", "triton"]
