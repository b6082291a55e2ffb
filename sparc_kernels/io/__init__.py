"""Files: features, weights, checkpoints, labels, and batches read ahead."""
