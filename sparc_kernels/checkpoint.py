"""Weights and checkpoints on disk: the public names of `sparc_kernels.io`."""

from .io.run_checkpoints import load_checkpoint, load_latest, save_checkpoint
from .io.weights import export_official, load_model, model_config, model_of, read_weights, save_weights

__all__ = [
    "export_official", "load_checkpoint", "load_latest", "load_model", "model_config", "model_of", "read_weights",
    "save_checkpoint", "save_weights",
]  # fmt: skip
