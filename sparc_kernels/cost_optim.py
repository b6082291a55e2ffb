"""The cost model of the optimizer and of whole training steps with it: everything here is **modelled**, see `py`.

Bytes a parameter are those of the weight matrices' weights, gradients and moments: what a step must move whatever the
batch is. Biases and what lists and gathers move are in the times, not in that figure.
"""

from __future__ import annotations

from dataclasses import replace

from . import cost, cost_dense
from .cost_model import GPU, Op, Part, Reuse, Shape, gathered, slabs_of, step_seconds, total
from .launch.adam import adam_config, adam_rows
from .launch.device import cdiv, next_power_of_2
from .launch.reduce import reduce_chunk

MOMENT = 4  # bytes of a moment, whatever the parameters are
FOREACH_BLOCKS, FOREACH_CHUNK = 320, 65536  # torch's multi-tensor kernels: chunks of elements, blocks of a launch


def _weight(s: Shape) -> int:
    """Bytes of a parameter."""
    return 4 if s.autocast else s.e


def weights(s: Shape) -> int:
    """Numbers in the weight matrices."""
    return 2 * s.N * s.D


def _scalars(s: Shape) -> Part:
    return Part("scalars", 4 * s.S * (8 + 20))


def sparc_adam(s: Shape) -> Op:
    """SparcAdam from gradients in memory: weight, gradient and moments read, weight and moments written, once."""
    moved = 3 * _weight(s) + 4 * MOMENT
    parts = [Part("stream", moved * (2 * s.N * d + s.N + d)) for d in s.d_streams]
    return Op("SparcAdam", (_scalars(s), *parts))


def clipping(s: Shape) -> Op:
    """What max_grad_norm adds: gradients, and the decoder that they are projected off, read once more."""
    read = [_weight(s) * (3 * s.N * d + s.N + d) + 8 * 4 * (s.N + 1) for d in s.d_streams]
    sums = Part("sums", 8 * 4 * s.S, launches=s.S + 2, library=True)
    return Op("clipping", (*(Part("squares", bytes_) for bytes_ in read), sums))


def foreach_adam(s: Shape) -> Op:
    """torch.optim.Adam as shipped, foreach: by operator m.lerp(g) 3 numbers a parameter, v.mul 2, addcmul 4 (g twice),
    sqrt 2, div 2, add 2, addcdiv 4; and 2 + 1 short lists of step counts and corrections on the host."""
    n = weights(s)
    launches = cdiv(n, FOREACH_BLOCKS * FOREACH_CHUNK)
    steps = (("lerp", 3), ("mul", 2), ("addcmul", 4), ("sqrt", 2), ("div", 2), ("add", 2), ("addcdiv", 4))
    return Op("Adam, foreach", tuple(Part(p, 4 * r * n, launches=launches, library=True) for p, r in steps))


def official_optimizer(s: Shape) -> Op:
    """The official loop's: unit norm, projection, Adam. (Three helpers' host work is in the launches.)"""
    return total("official optimizer", [cost_dense.unit_norm(s), foreach_adam(s)])


def fused_adam(s: Shape) -> Op:
    """The helpers, then torch's fused Adam: 7 numbers a parameter."""
    return total("unit norm, fused Adam", [cost_dense.unit_norm(s), cost_dense.adam(s)])


# ------------------------------------------------------------------------------------- the step without gradients


def _update(s: Shape, d: int, sources: int, per_entry: int, decoder: bool) -> list[Part]:
    """A matrix of one stream: list sums, AuxK's too, and the step. `per_entry` bytes of an entry beside rows."""
    found = min(s.auxk, s.dead)
    block, tile = adam_config(d).block_d, min(max(next_power_of_2(d), 128), cost.REDUCE_COLUMNS)
    rows = sources * s.B * d * s.e
    read = s.M * per_entry + 4 * s.N
    used = Reuse(sources * s.M * d * s.e, rows, rows)
    flops = 2 * sources * s.M * d
    if s.auxk:
        own = s.B * d * s.e  # AuxK's errors, or x once more
        read += s.B * found * 12 + 4 * s.N
        used = Reuse(used.used + s.B * found * d * s.e, rows + (own if found and decoder else 0), rows + own * decoder)
        flops += 2 * s.B * found * d
    moved = (2 * _weight(s) + 4 * MOMENT) * s.N * (d if decoder else d + 1)
    if s.autocast:  # the rounded weights, SparcAdam's `shadow`
        moved += s.e * s.N * d
    lean = 0 if decoder else 2 * 4 * cdiv(s.N, adam_rows(s.N)) * d
    parts = [Part("list parts", 2 * 4 * cdiv(s.M, reduce_chunk(s.M, d)) * cdiv(d, tile))]
    if s.auxk:
        parts.append(Part("list parts", 2 * 4 * cdiv(s.B * s.auxk, reduce_chunk(s.B * s.auxk, d)) * cdiv(d, tile)))
    return [*parts, Part("weights and moments", read + moved + lean // 2, used, flops=flops * block / d)]


def direct_update(s: Shape) -> Op:
    """Sums of lists, projection and Adam of both matrices of every stream, then the pre-biases."""
    parts = [_scalars(s)]
    for d in s.d_streams:
        parts += _update(s, d, s.S, 4 + 8 * s.S, True)
        parts += _update(s, d, 1, 12, False)
        lean = 4 * cdiv(s.N, adam_rows(s.N)) * d
        parts.append(Part("pre-bias gradient", lean + 16 * d, launches=2, library=True))
        parts.append(Part("pre-bias", (2 * _weight(s) + 4 + 4 * MOMENT) * d))
    return Op("update without gradients", tuple(parts))


def bytes_per_parameter(op: Op, s: Shape) -> float:
    """Of `sparc_adam`, `direct_update` and so on: what is moved of weights, gradients and moments (not of a shadow)."""
    if op.name == "update without gradients":
        return float(2 * _weight(s) + 4 * MOMENT)
    moved = sum(p.streamed for p in op.parts if p.name not in ("scalars", "sums"))
    return moved / weights(s)


def _gathers(s: Shape) -> Op:
    """Losses, dv and the errors of all sources, which are kept whole: the E route, in one piece."""
    parts = []
    for t, d in enumerate(s.d_streams):
        SM, SB, slabs = s.S * s.M, s.S * s.B, slabs_of(s, d, s.k)[1]
        sums = slabs * 4 * (SM + SB)
        parts.append(Part(
            "gather", s.B * d * (s.e + 4) + slabs * (8 * s.M + 4 * (SM + SB)) + SB * d * s.e + sums,
            gathered(s, d, s.k, s.k, s.N), flops=4 * SB * s.k * d, unit=s.gather_unit, padding=16 / s.S,
        ))  # fmt: skip
        parts.append(Part("collect", sums + 4 * SB + 4 * (SM + SB) + 4 * SM * (t > 0)))
    return Op("losses + dv", tuple(parts))


def _glue(s: Shape) -> Op:
    """`cost.loss_glue` without what only a backward has."""
    S, SB, BD = s.S, s.S * s.B, s.B * s.D
    parts = [
        Part("term weights", 4 * (S * S + S), launches=2, library=True),
        Part("target weights", BD * s.e + 4 * SB * (1 + S)),
        Part("terms and metrics", 4 * (2 * S * SB + S * s.M), launches=2),
        cost.column_sums(s, 1),
    ]
    return Op("weights, terms", tuple(parts))


def _auxk(s: Shape) -> Op:
    """`cost.auxk` with gradients in the forward, but for its list sums, which are in the update."""
    parts = list(cost.auxk(replace(s, compiled=False)).parts)
    sums = {i + j for i, p in enumerate(parts) if p.name == "reduce" for j in (0, 1)}  # and what finishes them
    return Op("AuxK", tuple(p for i, p in enumerate(parts) if i not in sums))


def direct_ops(s: Shape) -> list[Op]:
    """`AlignedSAE.training_step`, op by op."""
    ops = [
        cost.centre(s),
        cost.select(s),
        cost.values(s),
        cost.counters(s),
        cost.inverse_index(s),
        _gathers(s),
        _glue(s),
    ]
    if s.auxk:
        ops.append(_auxk(s))
    if s.autocast:  # of inputs and biases; the shadow has the matrices, gradients are never widened
        rows = s.B * s.D * (4 + s.e)
        ops.append(Op("casts", (Part("casts", rows, launches=3 * s.S, library=True),)))
    return [*ops, direct_update(s)]


def direct_step(s: Shape) -> Op:
    return total("training_step", direct_ops(s))


def dense_gradient_step(s: Shape) -> Op:
    """Forward, loss, backward, and SparcAdam from their gradients."""
    return total("step + SparcAdam", [cost.step(s), sparc_adam(s)])


def official_loop(s: Shape) -> Op:
    """The official class, as shipped in float32, and its loop's optimizer."""
    shipped = replace(s, dtype="float32", tf32=False, autocast=False)
    return total("official loop", [cost_dense.official_step(shipped), official_optimizer(shipped)])


def roofline_seconds(s: Shape, gpu: GPU) -> float:
    """The least that a step could take on the GPU: the encoder's GEMM at the library's rate; every weight and moment
    and the inputs through HBM once; through L2 for each selected place a row of W_enc for its value, one of W_dec for
    the losses, and one for each of the gradients. AuxK adds the same for its dead columns and places."""
    found = min(s.auxk, s.dead)
    gemm = 2 * s.B * s.D * (s.N + (s.dead if s.auxk else 0)) / gpu.flop_per_s(s.library_unit)
    hbm = (2 * _weight(s) + 4 * MOMENT) * weights(s) + s.B * s.D * s.e
    rows = 4 * s.B * (s.k + found) * s.D * s.e
    return gemm + hbm / gpu.bytes_per_s("HBM") + rows / gpu.bytes_per_s("L2")


# ------------------------------------------------------------------------------------------------------------- figures


def table(s: Shape, gpu: GPU) -> str:
    """Bytes a parameter and microseconds of each optimizer, and whole steps beside the official loop."""
    lines = [f"modelled, nothing measured: optimizer of {s}{', autocast' if s.autocast else ''} on {gpu.name}"]
    lines.append(f"{'optimizer':<28} {'B / parameter':>13} {'launches':>8} {'predicted us':>12}")
    for op in (direct_update(s), sparc_adam(s), fused_adam(s), official_optimizer(s)):
        us = 1e6 * op.seconds(gpu)
        lines.append(f"{op.name:<28} {bytes_per_parameter(op, s):>13.1f} {op.launches:>8} {us:>12.1f}")
    official = step_seconds(official_loop(s), gpu, graph=False)
    lines.append(f"{'whole step':<28} {'eager us':>13} {'graph us':>8}   official loop over it: eager, in a graph")
    for op in (direct_step(s), dense_gradient_step(s)):
        eager, graph = (step_seconds(op, gpu, how) for how in (False, True))
        times = f"{1e6 * eager:>13.1f} {1e6 * graph:>8.1f}"
        lines.append(f"{op.name:<28} {times} {official / eager:>21.1f} {official / graph:>12.1f}")
    least = roofline_seconds(s, gpu)
    over = step_seconds(direct_step(s), gpu, True) / least
    lines.append(
        f"official loop {1e6 * official:.1f} us; roofline {1e6 * least:.1f} us, training_step {over:.2f} times it"
    )
    return "\n".join(lines)
