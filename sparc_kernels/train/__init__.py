"""Training from feature files or tensors: `Trainer`, its settings `TrainConfig`, and what `Trainer.train` raises."""

from .config import TrainConfig
from .trainer import Interrupted, Trainer, TrainingStopped

__all__ = ["Interrupted", "TrainConfig", "Trainer", "TrainingStopped"]
