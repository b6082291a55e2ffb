"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.validation import check_bool, check_int, check_number, precision_name, require
from ..io.loader import MEMORY, SHUFFLES
from ..nn.module import AlignedSAE

DECAYS = ("none", "linear", "cosine")
PRECISIONS = ("fp32", "tf32", "bf16", "fp64")


@dataclass(frozen=True)
class TrainConfig:
    """Settings that determine the training result; defaults are the official ones where the official code has them.

    Attributes:
        n_latents: N, of `AlignedSAE`.
        k: active latents per row.
        auxk: number of dead latents in the auxiliary loss; 0 disables it.
        topk_type: "global" (one selection on the summed pre-activations) or "local" (one per stream).
        auxk_threshold: a latent fires where its value is greater than this.
        dead_steps_threshold: a latent is dead if it has not fired for more steps than this.
        auxk_coef: weight of the auxiliary loss.
        cross_coef: weight of the cross-reconstruction loss.
        batch_size: rows of a batch.
        epochs: passes over the data.
        max_steps: stop after this many batches even if epochs remain; 0: no limit.
        lr: learning rate.
        warmup: steps of linear increase to it.
        decay: "none", or "linear" or "cosine" decrease to 0 at the end.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: clip all gradients together to this norm; 0: no clipping.
        unit_norm: divide decoder columns by their norm "before" the update, as officially, or "after" it.
        gradient_free: use `AlignedSAE.training_step`, without weight gradients in memory; excludes clipping.
        reinit_every: steps between re-initialisations of dead latents; 0: never.
        seed: of the initial weights, the order of the data and re-initialisation.
        shuffle: "window", "official" or "none", see `Loader`.
        drop_last: leave the smaller last batch of an epoch out.
        memory: bytes for the windows of `Loader`.
        normalize: divide rows by their norm.
        val_fraction: fraction of the rows to validate on, in pieces of at most 256 consecutive rows.
        precision: "fp32", "tf32" (matrix products on a GPU), "bf16" (autocast) or "fp64"; also "float32" and so on.
        max_skipped: batches with a non-finite loss are skipped; training stops after more than this.

    Raises:
        ValueError: a setting is out of range or of another type.
    """

    n_latents: int = 8192
    k: int = 64
    auxk: int = 64
    topk_type: str = "global"
    auxk_threshold: float = 1e-3
    dead_steps_threshold: int = 1000
    auxk_coef: float = 1 / 32
    cross_coef: float = 1.0
    batch_size: int = 256
    epochs: int = 50
    max_steps: int = 0
    lr: float = 1e-4
    warmup: int = 0
    decay: str = "none"
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    unit_norm: str = "before"
    gradient_free: bool = False
    reinit_every: int = 100
    seed: int = 42
    shuffle: str = "window"
    drop_last: bool = False
    memory: int = MEMORY
    normalize: bool = True
    val_fraction: float = 0.0
    precision: str = "fp32"
    max_skipped: int = 100

    def __post_init__(self):
        if isinstance(self.precision, str):
            object.__setattr__(self, "precision", precision_name(self.precision))
        values: dict[str, object] = {}  # as Python numbers, for JSON files and checkpoints
        for name in ("n_latents", "k", "batch_size", "epochs", "memory"):
            values[name] = check_int(name, getattr(self, name), 1)
        for name in ("auxk", "dead_steps_threshold", "max_steps", "warmup", "reinit_every", "max_skipped"):
            values[name] = check_int(name, getattr(self, name), 0)
        values["seed"] = check_int("seed", self.seed, 0, 2**32 - 1)
        numbers = ("auxk_threshold", "auxk_coef", "cross_coef", "lr", "weight_decay", "max_grad_norm", "val_fraction")
        for name in numbers:
            values[name] = float(check_number(name, getattr(self, name)))
        require(self.lr > 0, "lr", "a number > 0", values["lr"])
        require(self.val_fraction < 1, "val_fraction", "a number in [0, 1)", values["val_fraction"])
        for name in ("drop_last", "normalize", "gradient_free"):
            values[name] = check_bool(name, getattr(self, name))
        clips = self.gradient_free and self.max_grad_norm > 0
        require(
            not clips, "max_grad_norm", "0 with gradient_free, where no step knows all gradients", self.max_grad_norm
        )
        for name, allowed in (
            ("topk_type", ("global", "local")),
            ("decay", DECAYS),
            ("unit_norm", ("before", "after")),
            ("shuffle", SHUFFLES),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, name)
            require(value in allowed, name, f"one of {', '.join(map(repr, allowed))}", repr(value))
            values[name] = str(value)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def dtype(self) -> torch.dtype:
        """dtype of parameters and batches."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def build(self, d_streams: dict[str, int], device: torch.device | str = "cpu") -> AlignedSAE:
        """Build a new model, initialised on the CPU from torch's global random state.

        Args:
            d_streams: stream name -> width.
            device: where the model goes afterwards.
        """
        return AlignedSAE(
            d_streams,
            self.n_latents,
            self.k,
            self.auxk or None,
            self.auxk_threshold,
            self.dead_steps_threshold,
            topk_type=self.topk_type,
            dtype=self.dtype,
            device="cpu",
        ).to(device)

    def check_model(self, model: AlignedSAE) -> None:
        """Check that a model has these settings.

        Args:
            model: the model to train.

        Raises:
            ValueError: a setting or the parameters' dtype differs.
        """
        for name in ("n_latents", "k", "auxk", "auxk_threshold", "dead_steps_threshold", "topk_type"):
            want, got = getattr(self, name), getattr(model, name)
            same = (want or None) == (got or None)  # auxk 0 is a model's None
            require(same, f"model's {name}", f"{want!r} as in the config", repr(got))
        dtype = next(model.parameters()).dtype
        ok = dtype == self.dtype or (self.precision == "bf16" and dtype != torch.float64)  # autocast casts the rest
        require(ok, "model", f"parameters of {self.dtype}, for precision {self.precision!r}", str(dtype))

    def steps(self, per_epoch: int) -> int:
        """Return the number of batches in the run.

        Args:
            per_epoch: batches of an epoch.
        """
        steps = self.epochs * per_epoch
        return min(steps, self.max_steps) if self.max_steps else steps

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: its number, from 0.
            steps: of the whole run.
        """
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        part = min(max(0, step - self.warmup) / max(1, steps - self.warmup), 1.0)
        fall = {"none": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}[self.decay]
        return self.lr * rise * fall
