"""`sparc-kernels verify`: check every operator and a whole training step against the float64 reference."""
