"""Training on several ranks: latents divided among them, and replicas of the model; see docs/scaling.md."""

from .model import ShardedOutputs, ShardedSAE, shard_latents
from .ranks import Ranks, counted

__all__ = ["Ranks", "ShardedOutputs", "ShardedSAE", "counted", "shard_latents"]
