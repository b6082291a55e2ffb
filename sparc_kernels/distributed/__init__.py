"""Training on several ranks: latents divided among them, and replicas of the model; see docs/scaling.md."""

from .model import ShardedOutputs, ShardedSAE, shard_latents
from .ranks import Ranks, count_bytes

__all__ = ["Ranks", "ShardedOutputs", "ShardedSAE", "count_bytes", "shard_latents"]
