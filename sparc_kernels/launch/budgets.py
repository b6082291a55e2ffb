"""Bounds on scratch memory and on kernel arguments, each with its reason."""

from __future__ import annotations

SCRATCH_BYTES = 256 * 2**20  # logits held at once by the selection; rows are processed in chunks of this size
SCRATCH_LEAST_ROWS = 512  # with fewer rows the GEMM reads W_enc too often: the scratch may then be twice as large
PARTIAL_BYTES = 64 * 2**20  # partial sums of the weight gradients
SLAB_BYTES = 25 * 10**6  # slice of a weight matrix that should stay in L2 while every row gathers from it (modelled)
L2_BYTES = 60 * 10**6  # of H100 and H200 (data sheets)
MAX_K = 512
MAX_STREAMS = 8
# Sources from which dW_dec takes the route of H: 2 B k d through HBM instead of S B k d through L2. Modelled: at 3
# sources H saves 5 % of the step at B 4096, N 32,768, and costs launches where there are few selected places.
H_MIN_SOURCES = 3
H_MIN_ENTRIES = 65536
H_MAX_K_FP32 = 64  # with 3 sources, the largest k in fp32 for which H is made; compiled (sm_90): 128 spill 64 bytes
H_MIN_COLUMNS = 128  # least columns of H within SCRATCH_BYTES that pay for a pass
