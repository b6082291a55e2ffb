"""The cost model: bytes and FLOPs of every op from its shape, its least time on a GPU, and which limit binds.

Everything here is **modelled**. Assumptions:

- A kernel takes as long as the slowest of four: bytes through HBM, bytes through L2 (all it moves, HBM's included),
  FLOPs, instructions (the selector's, torch.topk's and the lists'). Kernels of a step run one after the other, and each
  adds `launch_us`. An eager step lasts at least as long as the host needs to launch it (`host.py`, the one thing here
  that was measured); in a CUDA graph it lasts what the device needs, and one replay.
- Tensors are read or written once per kernel, and cross HBM each time: small ones that stay in L2 are not credited.
- Gathered rows cross L2 at every use. HBM delivers each of the distinct rows once while the slab that a kernel works on
  fits in L2; beyond that a repeated use misses with probability 1 - (L2 / slab). Ids are taken as uniform, the worst
  case: real latents are skewed.
- Rates are the data sheet's times an assumed fraction, given beside it.
- Launches and the bytes of torch's own kernels equal those of the traced step (tested); launches inside one of torch's
  operators (sorts, `topk`, `index_put`) are assumptions, given beside each.

Not modelled: wave quantisation, tails, the latency of dependent loads, programs that exit after reading a count, hot
latents split over programs, local selection, more places than one launch of the gather takes (fp32 with k > 128, 64 on
sm_120), clocks.
"""

from ..shape import Shape
from .dense import adam, copy, dense_step, gather, official_step, unit_norm
from .gpus import DEFAULT_GPU, GPU, GPUS, gpu_named, gpu_of_device
from .host import host_seconds, step_seconds
from .ours import gemm, mm_topk, ops_of, select, step
from .parts import Op, total
from .report import CASES, table

__all__ = [
    "CASES", "DEFAULT_GPU", "GPU", "GPUS", "Op", "Shape", "adam", "copy", "dense_step", "gather", "gemm", "gpu_named",
    "gpu_of_device", "host_seconds", "mm_topk", "official_step", "ops_of", "select", "step", "step_seconds", "table",
    "total", "unit_norm",
]  # fmt: skip
