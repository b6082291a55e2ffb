"""Benchmarks: shapes and providers in cases.py, one command for a GPU in gpu_report.py, records written to results/."""
