"""Verifying, auditing, tuning and modelling the kernels. Nothing imports this."""
