"""Fused Triton kernels and a drop-in module for concept-aligned sparse autoencoders (SPARC, arXiv 2507.06265)."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors, which do not see what `__getattr__` loads
    from . import data as data
    from . import metrics as metrics
    from . import reference as reference
    from .nn.graphed import GraphedStep as GraphedStep
    from .nn.module import AlignedSAE as AlignedSAE
    from .nn.optimizer import SparcAdam as SparcAdam
    from .nn.outputs import AlignedOutputs as AlignedOutputs
    from .ops.dead import auxk_topk as auxk_topk
    from .ops.dead import update_counters_ as update_counters_
    from .ops.decode import decode as decode
    from .ops.decode import decode_nmse as decode_nmse
    from .ops.encode import encode_topk as encode_topk
    from .ops.encode import values_at as values_at
    from .ops.inverse_index import InverseIndex as InverseIndex
    from .ops.inverse_index import inverse_index as inverse_index

_EXPORTS = {
    "AlignedSAE": "nn.module",
    "AlignedOutputs": "nn.outputs",
    "encode_topk": "ops.encode",
    "values_at": "ops.encode",
    "decode": "ops.decode",
    "decode_nmse": "ops.decode",
    "auxk_topk": "ops.dead",
    "update_counters_": "ops.dead",
    "InverseIndex": "ops.inverse_index",
    "inverse_index": "ops.inverse_index",
    "SparcAdam": "nn.optimizer",
    "GraphedStep": "nn.graphed",
}
_MODULES = ("reference", "metrics", "data")

__all__ = [*_EXPORTS, *_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    """Import an exported name on first access, so that importing the package loads neither torch nor Triton."""
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
