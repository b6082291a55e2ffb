"""Verify, audit, tune and model the kernels. Only `cli` and `benchmarks` import this package."""
