"""The module, its outputs, the optimizer and the fused step."""
