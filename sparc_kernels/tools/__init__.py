"""Verify, audit, tune and model the kernels. Imported only by the command line, benchmarks and tests."""
