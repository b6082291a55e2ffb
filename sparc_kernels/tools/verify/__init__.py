"""`sparc-kernels verify`: every operator and a whole training step against the float64 reference."""
