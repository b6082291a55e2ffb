"""Tools beside the package: traces and compiles without a GPU, tuning, verification and the cost model."""
