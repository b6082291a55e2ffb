"""Baselines: dense PyTorch, the official class and its optimizer, plain copies and gathers."""

from __future__ import annotations

from dataclasses import replace

from ...launch.device import cdiv
from ..shape import Shape
from .ours import weights
from .parts import Op, Part, Reuse, distinct, library_unit, of_torch, product, topk_part, total

# name -> (fields of Shape, whether the step is replayed from a CUDA graph, torch.compile's "reduce-overhead")
DENSE_VARIANTS = {
    "eager fp32": ({"dtype": "float32"}, False),
    "eager tf32": ({"dtype": "float32", "tf32": True}, False),
    "eager bf16 autocast": ({"dtype": "bfloat16", "autocast": True}, False),
    "torch.compile bf16 autocast": ({"dtype": "bfloat16", "autocast": True, "compiled": True}, True),
    "torch.compile bf16": ({"dtype": "bfloat16", "compiled": True}, True),
}
FOREACH_BLOCKS, FOREACH_CHUNK = 320, 65536  # torch's multi-tensor kernels: blocks of a launch, elements of a block


def _gemms(s: Shape, more: int = 0) -> list[Part]:
    """All GEMMs of a step, 2 B N D (3 + 3 S) FLOPs; `more` is added to those of each stream.

    Per stream the encoder, its dW and (the pre-bias has a gradient) its dx; per (target, source) pair the decoder, its
    dW and its dcodes. Each GEMM reads its operands and writes its product.
    """
    n = 3 + 3 * s.S + more
    gemms = [product(s, "GEMM", s.B, s.N, d, unit=library_unit(s), library=True) for d in s.d_streams]
    return [replace(gemm, streamed=n * gemm.streamed, flops=n * gemm.flops, launches=n) for gemm in gemms]


def dense_step(s: Shape) -> Op:
    """Model `reference.training_loss` and its backward with torch.topk, without AuxK. `official_step` does more.

    Eager, passes over [B, N] beside the GEMMs: summing the streams 3 (S - 1); topk (see `topk_part`); per pair zeros
    and an out-of-place scatter_add 3; per stream zeros for the gather's backward 1, and the sum for dc 1.
    Over [d, N]: adding the S gradients of a decoder 3 (S - 1). Over [B, d] in fp32: 21 per pair (bias, difference,
    squares, means, and their backward), 5 per stream. 25 S^2 + 12 S + 13 launches. Checked against torch's dispatcher.

    Compiled, beside the same GEMMs and topk: codes built once per source (equal expressions are merged), zeros written
    and scattered into 1; the sum of the streams S + 1; the gather's backward 1 and dc 1 per stream; gradients of a
    decoder summed and widened in one pass; 4 over [B, d] per pair. About one launch per GEMM, 2 S^2 + 9 S + 10 others.
    Not checked against inductor's output.

    Autocast: both weight matrices read in fp32 and written rounded, gradients widened (in eager mode apart).
    """
    S, e, gemms = s.S, s.e, _gemms(s)
    BN, ND, BD, wide = s.B * s.N, s.N * s.D, s.B * s.D, 4 + s.e
    if s.compiled:
        passes = BN * e * ((S + 1) * (S > 1) + 3 * S) + 16 * S * BD
        matrices = (S > 1) * ND * (S * e + (4 if s.autocast else e)) + s.autocast * ND * wide * (3 if S > 1 else 4)
        others = 2 * S * S + 9 * S + 10
    else:
        passes = BN * e * (3 * (S - 1) + 3 * S * S + 2 * S) + 4 * BD * (21 * S + 5)
        matrices = 3 * (S - 1) * ND * e + s.autocast * 4 * ND * wide
        others = 25 * S * S + 12 * S + 13 - sum(p.launches for p in gemms) + s.autocast * 4 * S
    return Op(
        "dense step",
        (*gemms, topk_part(s, s.k), of_torch("passes", passes, others), of_torch("weights", matrices, 0)),
    )


def _index_put(s: Shape, k: int) -> Part:
    """The backward of x[rows, ids] for B k entries of [B, N]: index_put_ with accumulation.

    Assumption: both int64 ids become one linear index, which is radix sorted with its positions, one pass a byte, then
    summed in order; about 12 launches beside the passes.
    """
    passes = cdiv((s.B * s.N - 1).bit_length(), 8)
    return of_torch("index_put", s.B * k * (8 * 8 + 2 * 16 * passes + 24), 12 + passes)


def official_step(s: Shape) -> Op:
    """Model forward, compute_loss and backward of the official class, eager, in the dtype of s.

    The class is sparc/model/model_global.py at 7f36faa, dense decoder, global TopK; with s.auxk also its AuxK, which
    costs the same however many latents are dead. Counted from its source; launches and bytes are checked against
    torch's dispatcher (tests/tools/test_cost.py). Elements have e bytes unless stated:

    - Over [B, N]: the streams stacked and summed 3 S + 1; torch.topk; a bool mask of the selection, once and again per
      stream. Per stream dense codes zeroed; the mask widened and summed, in the forward and again in the loss; codes
      against the threshold, and any over the rows; codes' absolute values and their sum; zeros for the backward of the
      indexing; dc: 11 and 5 of one byte. Per stream the S gradients of its codes added, 3 (S - 1).
    - Over [d, N]: the S gradients of a decoder added, 3 (S - 1). Over [B, d]: 20 per pair (bias, difference, squares,
      means, their backward), 5 per stream. Counters 66 bytes a latent and stream; 77 bytes a selected place and stream.
    - 22 S^2 + 36 S + 15 operators (68 at S 1), and what index_put and topk launch inside.
    - AuxK per stream: the logits cloned, multiplied by the dead mask, and selected by a second topk; a bool mask;
      dense codes; in the backward zeros, the product's and the sum with the other gradient: 11 and 1 of one byte; three
      GEMMs; 25 over [B, d]; 3 over [d, N]; 48 operators, with boolean indexing, each a nonzero.

    Not counted: synchronisations, none of them without AuxK; 4 S + 1 with it, for the sizes of boolean indexing and a
    comparison of the loss; and the training loop's own, which tests the loss for NaN and reads every metric back (more
    than S^2 + 3 S a step).
    """
    S, M, e = s.S, s.M, s.e
    BN, ND, BD = s.B * s.N, s.N * s.D, s.B * s.D
    passes = BN * (e * (3 * S + 1 + 11 * S + 3 * S * (S - 1)) + 1 + 5 * S)
    passes += e * (3 * (S - 1) * ND + BD * (20 * S + 5)) + S * (66 * s.N + 77 * M) + 9 * M
    operators = 22 * S * S + 36 * S + 15 if S > 1 else 68
    apart = 3 * S * S + 3 * S + 1 + S  # GEMMs, topk and index_put, counted on their own
    parts = [*_gemms(s, 3 if s.auxk else 0), topk_part(s, s.k), *[_index_put(s, s.k)] * S]
    parts.append(of_torch("passes", passes, operators - apart))
    if s.auxk:
        passes = S * (BN * (11 * e + 1) + s.B * s.auxk * (3 * 50 + 120)) + e * (25 * BD + 3 * ND)
        # of the 48, 3 GEMMs, a topk and 2 index_put count on their own; 4 nonzeros take about 4 launches more each
        parts.append(of_torch("AuxK passes", passes, (48 - 6 + 16) * S + 7))
        parts += [*[topk_part(s, s.auxk)] * S, *[_index_put(s, s.auxk)] * (2 * S)]
    return Op("official step", tuple(parts))


def as_shipped(s: Shape) -> Shape:
    """Return the shape in the arithmetic of the official code: fp32 without tf32 or autocast."""
    return replace(s, dtype="float32", tf32=False, autocast=False)


def official_loop(s: Shape) -> Op:
    """Model the official class and its loop's optimizer, as shipped."""
    return total("official loop", [official_step(as_shipped(s)), official_optimizer(s)])


# ------------------------------------------------------------------------------------------ optimizers, copy and gather


def adam(s: Shape) -> Op:
    """Model one pass of Adam over both weight matrices in fp32: weight, gradient and two moments read, all but the
    gradient written."""
    return Op("Adam", (of_torch("Adam", 7 * weights(s) * 4),))


def unit_norm(s: Shape) -> Op:
    """Model normalisation (W_dec read twice, written once) and projection (W_dec and its gradient read twice, the
    gradient written)."""
    return Op("unit norm + projection", (of_torch("passes", 8 * s.N * s.D * 4, 8 * s.S),))


def fused_adam(s: Shape) -> Op:
    """Model `unit_norm`, then torch's fused Adam: 7 numbers a parameter."""
    return total("unit norm, fused Adam", [unit_norm(s), adam(s)])


def official_optimizer(s: Shape) -> Op:
    """Model the official loop's optimizer: unit norm, projection, and torch.optim.Adam as shipped (foreach)."""
    # numbers a parameter that each operator moves (addcmul reads g twice)
    n, launches = weights(s), cdiv(weights(s), FOREACH_BLOCKS * FOREACH_CHUNK)
    steps = {"lerp": 3, "mul": 2, "addcmul": 4, "sqrt": 2, "div": 2, "add": 2, "addcdiv": 4}
    foreach = Op("Adam, foreach", tuple(of_torch(name, 4 * moved * n, launches) for name, moved in steps.items()))
    return total("official optimizer", [unit_norm(s), foreach])


def copy(s: Shape) -> Op:
    """Model a copy of a buffer of W's size."""
    return Op("copy", (of_torch("copy", 2 * s.N * s.D * s.e),))


def gather(s: Shape) -> Op:
    """Model a gather of B k random rows of the widest stream: rows read and written, int64 ids read."""
    d = max(s.d_streams)
    rows = distinct(s.N, s.M) * d * s.e
    return Op("gather", (of_torch("gather", s.M * d * s.e + 8 * s.M, reuse=Reuse(s.M * d * s.e, rows, rows)),))
