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
    """Everything that decides what is trained; the defaults are the official ones where the official code has them.

    Attributes:
        n_latents, k, auxk, topk_type, auxk_threshold, dead_steps_threshold: of `AlignedSAE`; auxk 0 leaves AuxK out.
        auxk_coef, cross_coef: of the two additional losses.
        batch_size, epochs: rows of a batch, passes over the data.
        max_steps: stop after so many batches even if epochs remain; 0: no such limit.
        lr, warmup, decay: learning rate; steps of linear rise to it; "none", "linear" or "cosine" fall to 0 at the end.
        weight_decay, max_grad_norm: AdamW's decay; clipping of the gradient's norm, 0: none.
        unit_norm: when decoder columns are divided by their norm: "before" the update, as officially, or "after" it.
        gradient_free: steps by `AlignedSAE.training_step`, without the weights' gradients in memory; not with clipping.
        reinit_every: steps between re-initialisations of dead latents, 0: never.
        seed: of the initial weights, the order of the data and re-initialisation.
        shuffle, drop_last, memory: of `Loader`; memory in bytes.
        normalize: divide rows by their norm.
        val_fraction: part of the rows to validate on, in pieces of at most 256 consecutive rows.
        precision: "fp32", "tf32" (products on a GPU), "bf16" (autocast) or "fp64"; "float32" and so on are taken too.
        max_skipped: batches with a non-finite loss are skipped; training stops after more than this.
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
        values = {}  # Python's numbers, whatever came: JSON files and checkpoints take no others
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
            object.__setattr__(self, name, value)  # frozen otherwise

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and batches."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def build(self, d_streams: dict[str, int], device: torch.device | str = "cpu") -> AlignedSAE:
        """A new model; draws from torch's global random state, on the CPU whatever the device."""
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
        """Refuse a model that is not the one these settings describe."""
        for name in ("n_latents", "k", "auxk", "auxk_threshold", "dead_steps_threshold", "topk_type"):
            want, got = getattr(self, name), getattr(model, name)
            same = (want or None) == (got or None)  # auxk 0 is a model's None
            require(same, f"model's {name}", f"{want!r} as in the config", repr(got))
        dtype = next(model.parameters()).dtype
        ok = dtype == self.dtype or (self.precision == "bf16" and dtype != torch.float64)  # autocast casts others
        require(ok, "model", f"parameters of {self.dtype}, for precision {self.precision!r}", str(dtype))

    def steps(self, per_epoch: int) -> int:
        """Batches of the whole run, with so many in an epoch."""
        steps = self.epochs * per_epoch
        return min(steps, self.max_steps) if self.max_steps else steps

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of the step with this number, of so many."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        part = min(max(0, step - self.warmup) / max(1, steps - self.warmup), 1.0)
        fall = {"none": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}[self.decay]
        return self.lr * rise * fall
