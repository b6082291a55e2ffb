"""Operators: kernels, launchers, their torch twins, autograd; one operator a file."""
