"""Fused Triton kernels and a drop-in module for concept-aligned sparse autoencoders (SPARC, arXiv 2507.06265)."""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "AlignedSAE": "module",
    "AlignedOutputs": "outputs",
    "encode_topk": "encode",
    "values_at": "encode",
    "decode": "decoder",
    "decode_nmse": "decoder",
    "auxk_topk": "dead",
    "update_counters_": "dead",
    "InverseIndex": "latent_grads",
    "inverse_index": "latent_grads",
    "SparcAdam": "optim",
}
_MODULES = ("reference", "metrics", "data")

__all__ = [*_EXPORTS, *_MODULES, "__version__"]


def __getattr__(name):
    """Loads torch (and Triton, where installed) only when something that needs it is asked for."""
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
