"""The checks of `sparc-kernels verify`, named after the operators that they judge; `routes` by code path."""
