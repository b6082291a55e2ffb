"""Benchmarks: `python -m benchmarks`. cases.py and providers.py say what is run, docs/benchmarks.md how."""
