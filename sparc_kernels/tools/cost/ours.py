"""The package's operators: bytes, FLOPs and launches from the shape, with settings from the launchers' own functions.

Symbols as in docs/math.md: B rows, N latents, k active, S streams, D the sum of their widths, M = B k, e bytes of a
weight. `ops_of` is the table of a step; the functions before it make its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ...launch.adam import adam_rows, latent_adam_config
from ...launch.budgets import PARTIAL_BYTES, SCRATCH_BYTES
from ...launch.device import cdiv, dot_precision
from ...launch.gather import gather_config
from ...launch.reduce import column_chunk, reduce_chunk, reduce_config
from ...launch.select import encode_by_library, encode_config, rows_per_chunk, select_config, with_span
from ...ops.adam import alike
from ...ops.decode_grads import in_one_pass, route_of
from ...ops.gather import slabs_of
from ...ops.latent_reduce import reduce_groups
from ..shape import Shape
from .gpus import GPU
from .parts import NO_REUSE, Op, Part, Reuse, distinct, library_unit, of_gpu, of_torch, product, topk_part, total, when

# Compiled (sm_90, Triton 3.9): the epilogue adds about 46 / D of the main loop to a 128 x 256 tile.
EPILOGUE = 46
# Assumption: the Triton GEMM's share of the library's rate, as in `launch.select.encode_by_library`.
TRITON_GEMM = 0.93
# Compiled (sm_90, Triton 3.9): a warp of the selector executes about 1,640 instructions outside its two bisections, and
# 73 + 46 a step. Simulated on normal logits (tests/tools/test_cost.py): steps of each bisection, by bytes of a logit.
SELECT_INSTRUCTIONS, BISECTION_INSTRUCTIONS, BISECTION_STEPS = 1640, 119, {2: 7, 4: 9}
# Compiled (sm_90, Triton 3.9): a warp of `_lists_kernel` executes about 20 instructions for 32 entries; for 32 offsets
# 105, most of them a 64-bit division, and 22 for each step of their bisection.
LISTS_INSTRUCTIONS, OFFSETS_INSTRUCTIONS, LISTS_STEP = 20, 105, 22
MOMENT = 4  # bytes of one of Adam's moments


def kernel_unit(s: Shape, tf32: bool) -> str:
    """Return the unit of `tl.dot`, where float32 may be computed in tf32 or not."""
    precision = dot_precision(s.arch, tf32)
    return s.dtype if s.dtype != "float32" else "float32" if precision == "ieee" else precision


# ----------------------------------------------------------------------------------------------------------- selection


def gemm(s: Shape) -> Op:
    """Model the bare encoder GEMM of a library: x and W_enc read, the logits written."""
    return Op("encoder GEMM", (product(s, "GEMM", s.B, s.N, s.D, unit=library_unit(s)),))


def mm_topk(s: Shape) -> Op:
    """Model the GEMM, then torch.topk."""
    return Op("mm + topk", (*gemm(s).parts, topk_part(s, s.k)))


def _chunks(s: Shape, compact: bool) -> tuple[int, bool]:
    """Number of chunks of rows, and whether selectors overlap with the next chunk's GEMM, as in `_select_into`.

    `compact`: selection among the dead latents of one stream.
    """
    config, encode, row_bytes = _selector(s, compact)
    tiles = cdiv(s.B, encode.block_m) * cdiv(s.N, encode.block_n) if config.small and not compact else 0
    rows, buffers = rows_per_chunk(s.B, row_bytes, encode.block_m, tiles)
    return cdiv(s.B, rows), buffers > 1


def _selector(s: Shape, compact: bool):
    """Settings of the selector and of the GEMM, and scratch bytes of a row."""
    config = select_config(s.N, s.k, compact)
    encode = with_span(encode_config(s.B, s.e, s.arch, compact), config.span)
    columns = s.N + cdiv(s.N, config.group) + (cdiv(s.N, config.span) if config.span > config.group else 0)
    return config, encode, columns * s.e + 16 * config.k_pad


def _dead_selections(s: Shape) -> Iterator[Part]:
    """Selection among the dead latents of every stream, of several streams at once where their logits fit the scratch.

    Where no latent is dead, programs read the count and exit; rows are filled with live latents.
    """
    chunks, at_once = _chunks(s, True)[0], 1
    if chunks == 1:
        at_once = max(SCRATCH_BYTES // (s.B * _selector(s, True)[2]), 1)
    for first in range(0, s.S, at_once):
        yield from _in_one_launch(
            _selection(s, s.dead, d, compact=True)
            if s.dead else [Part("nothing dead", 8 * s.M, launches=2 * chunks)]
            for d in s.d_streams[first : first + at_once]
        )  # fmt: skip


def _selection(s: Shape, n: int, d: int, *, library: bool = False, compact: bool = False) -> Iterator[Part]:
    """Top k of n columns by chunks of rows, each of which reads W_enc [n, d].

    The Triton GEMM's epilogue writes the groups' maxima; `library`: a GEMM over joint storage, then one pass over its
    logits. The selector reads maxima and the logits of k groups, and writes int64 ids. Its block fits on a
    multiprocessor beside one of the GEMM's (compiled, sm_90: 216 of the GEMM's registers times 256 threads leave
    10,240, the selector needs 80 times 128); that the GEMM is not slowed down is an assumption.
    """
    (chunks, beside), config, B, k, e = _chunks(s, compact), select_config(s.N, s.k), s.B, s.k, s.e
    two_levels, again = config.group == config.span, (chunks - 1) * n * d * e
    groups, spans = cdiv(n, config.group), 0 if two_levels else cdiv(n, config.span)
    maxima = B * (groups + spans) * e
    if library:
        casts = 2 if e == 2 else 0  # of the sum of biases, to fp32 and back
        biases = n * ((s.S - 1) * (8 + e) + 6 * casts)
        yield product(s, "GEMM", B, n, d, unit=library_unit(s), extra=again, launches=chunks, library=True)
        yield of_torch("sum of biases", chunks * biases, chunks * (s.S - 1 + casts))
        yield Part("row maxima", B * n * e + maxima, launches=chunks)
    else:
        how = {"unit": kernel_unit(s, s.tf32), "padding": (1 + EPILOGUE / d) / TRITON_GEMM, "launches": chunks}
        yield product(s, "GEMM + maxima", B, n, d, extra=again + maxima, **how)
    read = groups if two_levels else spans + k * (config.span // config.group)
    moved = B * (read + min(k * config.group, n)) * e + 8 * B * k
    executed = SELECT_INSTRUCTIONS + BISECTION_STEPS[e] * BISECTION_INSTRUCTIONS
    executed *= (1 if two_levels else 1.5) * config.num_warps * B
    alone = 1 / chunks if beside else 1
    if beside:
        share, count = 1 - alone, chunks - 1
        yield Part("selector, beside", share * moved, instructions=share * executed, launches=count, beside=True)
    yield Part("selector", alone * moved, instructions=alone * executed, launches=1 if beside else chunks)


@of_gpu
def select_fused(s: Shape) -> Op:
    """Model selection, from centred inputs to ids, by the package's own GEMM."""
    return Op("select (fused)", tuple(_selection(s, s.N, s.D)))


@of_gpu
def select_library(s: Shape) -> Op:
    """Model selection, from centred inputs to ids, by a library's GEMM."""
    return Op("select (library)", tuple(_selection(s, s.N, s.D, library=True)))


def select(s: Shape) -> Op:
    """Model the variant that the package takes.

    The library's GEMM is taken where it pays and the weights are contiguous: with one stream, or with several that
    autocast has just written side by side (`ops.joint.JointCast`).
    """
    joint = s.S == 1 or (s.autocast and all(d % 8 == 0 for d in s.d_streams))
    return select_library(s) if joint and encode_by_library(s.B, s.D, s.e, s.tf32) else select_fused(s)


def even_gemm_share(s: Shape, gpu: GPU) -> float:
    """Return the share of the library's GEMM rate at which the fused variant breaks even."""
    main, *selectors = select_fused(s).parts
    spare = select_library(s).seconds(gpu) - sum(p.seconds(gpu) for p in selectors)
    spare -= 1e-6 * gpu.launch_us * main.launches
    return main.flops * (1 + EPILOGUE / s.D) / gpu.flop_per_s(main.unit) / spare


# --------------------------------------------------------------------------------------------- gathers, lists and sums


def _in_one_launch(streams: Iterable[Iterable[Part]]) -> Iterator[Part]:
    """Parts of several streams whose kernels share their launches."""
    for i, parts in enumerate(streams):
        yield from (p if i == 0 else replace(p, launches=0) for p in parts)


def _slabs(s: Shape, d: int) -> tuple[int, int]:
    """Columns of one slab of a gather of k rows over d columns of W, and number of slabs."""
    config = gather_config(s.k, d, s.N, s.e, s.arch)
    columns = min(config.tiles * config.block_d, d)
    return columns, cdiv(d, columns)


def _gather(
    s: Shape, name: str, d: int, n: int, present: int, *, sources: int, flops: int, once: float, per_slab: float
) -> Part:
    """Rows of W [n, d] gathered by slabs of columns, for all sources at once.

    Args:
        s: shape of the step.
        name: of the part.
        d: columns of W.
        n: latents.
        present: how many of a row's k entries are one of the n latents.
        sources: whose values are used with a row.
        flops: for each number gathered and source.
        once: bytes moved besides, in total.
        per_slab: bytes moved besides, for each slab.
    """
    (columns, n_slabs), uses, reuse = _slabs(s, d), s.B * present, NO_REUSE
    if present:
        rows = distinct(n, uses)
        reuse = Reuse(uses * d * s.e, rows * d * s.e, rows * columns * s.e)
    flops *= sources * uses * d
    return Part(name, once + n_slabs * per_slab, reuse, flops, kernel_unit(s, False), 16 / sources)  # columns padded


def _values(s: Shape, n: int, present: int) -> Iterator[Part]:
    """Per stream k encoder rows gathered per row: x and ids read, the dots of every slab written.

    Then one kernel for all streams (or as many as fit the scratch) adds slabs and bias, and writes fp32 values.
    """
    M, held, finishes = s.M, 0, 1
    sums = [4 * M * _slabs(s, d)[1] for d in s.d_streams]
    yield from _in_one_launch(
        [_gather(s, "dots", d, n, present, sources=1, flops=2, once=s.B * d * s.e, per_slab=12 * M)]
        for d in s.d_streams
    )
    for size in sums[:-1]:
        held += size
        if held >= SCRATCH_BYTES:
            held, finishes = 0, finishes + 1
    yield Part("finish", sum(sums) + s.S * M * (8 + s.e + 4), launches=finishes)


def _lists(s: Shape, groups: int, beside: bool) -> Iterator[Part]:
    """`inverse_index` of `groups` of B k entries each.

    Ids are narrowed to keys of 2 or 4 bytes and sorted; both lists are narrowed, offsets come from a bisection.
    Assumption for torch.sort: one radix pass a byte of a key, which reads and writes keys and int64 positions;
    positions, histogram, scan and a copy besides.
    """
    M, offsets = s.M, groups * (s.N + 1)
    size, key = groups * M, 2 if offsets < 2**15 else 4
    bisection = OFFSETS_INSTRUCTIONS + LISTS_STEP * (M.bit_length() + 1)
    executed = (LISTS_INSTRUCTIONS * max(size, offsets) + bisection * offsets) / 32
    yield Part("keys", size * (8 + key), beside=beside)
    yield of_torch("sort", 2 * key * size * (key + 8) + 8 * size, key + 4, beside=beside)
    yield Part("lists", size * (8 + key + 4 + 4) + 4 * offsets, instructions=executed, beside=beside)


def computes_ahead(s: Shape) -> bool:
    """Return whether the loss computes its gradients in the forward (`ops.aligned_loss.AlignedLoss`)."""
    return not s.compiled and s.dtype != "float16"


def _losses(s: Shape, n: int, present: int, sources: int) -> Iterator[Part]:
    """k decoder rows gathered per row of every target, shared by its sources; x, ids and values read."""
    sq = 4 * sources * s.B
    yield from _in_one_launch(
        [_gather(
            s, "losses", d, n, present, sources=sources, flops=2, per_slab=s.M * (8 + 4 * sources) + sq,
            once=s.B * d * s.e * (2 if s.auxk else 1),  # AuxK needs the target's own error
        )]
        for d in s.d_streams
    )  # fmt: skip
    widest = max(s.d_streams)
    config = gather_config(s.k, widest, s.N, s.e, s.arch)
    config = replace(config, tiles=min(config.tiles, cdiv(widest, config.block_d)))
    slabs = [slabs_of(config, d) for d in s.d_streams]
    if len(set(slabs)) == 1:
        yield from when(slabs[0] > 1, of_torch("sum of slabs", s.S * sq * (slabs[0] + 1)))
    else:
        split = [n_slabs for n_slabs in slabs if n_slabs > 1]
        yield of_torch("sum of slabs", sq * (sum(split) + len(split)) + 2 * s.S * sq, len(split) + 1)


def route(s: Shape, d: int) -> tuple[bool, int]:
    """Return whether the gradient of a decoder of width d is computed through H, and how many columns at a time."""
    return route_of(s.S, s.B, s.k, d, getattr(torch, s.dtype), arch=s.arch)


def _pieces(d: int, width: int) -> list[int]:
    return [min(width, d - c) for c in range(0, d, width)]


def _one_pass(s: Shape, d: int, n: int, present: int, *, first: bool, direct: bool = False) -> Iterator[Part]:
    """Losses, dv, sum_s coef E in fp32, and E of all sources or H, of one target; then the sum of slabs, scaling dv.

    dv is added to that of earlier targets unless `first`. With AuxK the target's own E is kept too. `direct`: E of all
    columns is kept, for the update without gradients.
    """
    through_h, width = (False, d) if direct else route(s, d)
    S, B, M, pieces = s.S, s.B, s.M, _pieces(d, width)
    dv, sq, pending, slab_sums, added = 4 * S * M, 4 * S * B, [], 0, False
    yield from when(through_h, Part("places", 8 * M))  # inverse permutation of the lists' order
    for i, columns in enumerate(pieces):
        kept = (M if through_h else S * B) + (B if s.auxk and not direct else 0)
        once, per_slab = B * columns * (s.e + 4) + kept * columns * s.e, M * (12 if through_h else 8) + 2 * (dv + sq)
        flops = 6 if through_h else 4
        yield _gather(s, "gather", columns, n, present, sources=S, flops=flops, once=once, per_slab=per_slab)
        pending.append(_slabs(s, columns)[1])
        slab_sums += pending[-1] * (dv + sq)
        if i == len(pieces) - 1 or sum(pending) * dv > PARTIAL_BYTES or len(pending) == 4:
            yield Part("collect", slab_sums + dv + 2 * sq + dv * (added or not first) + sq * added)
            pending, slab_sums, added = [], 0, True


def _reduce(s: Shape, d: int, sources: int, entries: int, *, per_entry: int, written: float) -> Iterator[Part]:
    """Per list entry the rows of `sources` through L2, per tile of columns lists, offsets and `per_entry` bytes.

    Then every 64th entry is read to find the lists that were split.
    """
    block = reduce_config(d, s.arch, sources).block_d
    rows, lists = sources * s.B * d * s.e, cdiv(d, block) * (entries * per_entry + 4 * s.N)
    used = Reuse(sources * entries * d * s.e, rows, rows * min(1, block / d)) if entries else NO_REUSE
    yield Part("reduce", lists + written, used, flops=2 * sources * entries * d)
    yield from when(reduce_chunk(s.M, d) < s.M, Part("finish", s.M))


def _reduces(s: Shape, sources: int, entries: int, *, per_entry: int, column: float, more: int = 0) -> Iterator[Part]:
    """The same for all streams, in as few launches as `launch_reduces` makes.

    `column`: bytes written for each column, `more` of them beside a stream's own.
    """
    for part, _ in reduce_groups(s.d_streams, s.M, sources, s.arch):
        yield from _in_one_launch(
            _reduce(s, d, sources, entries, per_entry=per_entry, written=column * (d + more)) for d in s.d_streams[part]
        )


def _reduce_dec(s: Shape, d: int, through_h: bool, width: int) -> Iterator[Part]:
    """dW_dec of one target: segment sums of H in list order; or per list entry weighted errors of S sources."""
    for columns in _pieces(d, width):
        if through_h:
            moved = s.M * columns * s.e + s.N * (columns * s.e + 4)
            yield Part("segment sum", moved, flops=s.M * columns)
            yield from when(reduce_chunk(s.M, columns) < s.M, Part("finish", s.M))
        else:
            yield from _reduce(s, columns, s.S, s.M, per_entry=4 + 8 * s.S, written=s.N * columns * s.e)


def _all_dec(s: Shape) -> Iterator[Part]:
    """dW_dec of all targets."""
    if not (computes_ahead(s) and _at_once(s)):
        for d in s.d_streams:
            yield from _reduce_dec(s, d, *route(s, d))
        return
    sources = 1 if route(s, s.d_streams[0])[0] else s.S
    for part, _ in reduce_groups(s.d_streams, s.M, sources, s.arch):
        yield from _in_one_launch(_reduce_dec(s, d, *route(s, d)) for d in s.d_streams[part])


def _at_once(s: Shape) -> bool:
    """Whether one pass makes dW_dec of all targets."""
    return in_one_pass(s.S, s.B, s.k, s.d_streams, getattr(torch, s.dtype), arch=s.arch)


def _passes(s: Shape, direct: bool) -> Iterator[Part]:
    """`_one_pass` of all targets."""
    ahead = direct or computes_ahead(s)
    passes = (
        _one_pass(s, d, s.N, s.k, first=not ahead or t == 0, direct=direct) for t, d in enumerate(s.d_streams)
    )  # fmt: skip
    if direct or (ahead and _at_once(s)):
        yield from _in_one_launch(passes)
    else:
        for t, parts in enumerate(passes):  # the places are the same for all targets
            yield from (p for p in parts if not (ahead and t and p.name == "places"))


def _bias_sums(s: Shape, launches: int = 2) -> Part:
    """Sums over the rows of fp32 [B, d_s] of each stream: of chunks of rows, then over chunks."""
    moved = 4 * s.B * s.D + 8 * s.D * cdiv(s.B, column_chunk(s.B)) + s.D * s.e
    return Part("bias sums", moved, launches=launches)


def _late_bias_sums(s: Shape, added: bool) -> Part:
    """The same in the backward, by torch for each stream: summed, rounded; `added`: then added to another tensor."""
    half = s.e == 2
    moved = 4 * s.B * s.D + 4 * s.D + (s.D * (4 + s.e) if half else 0) + (3 * s.D * s.e if added else 0)
    return of_torch("biases", moved, s.S * (1 + half + added))


def _auxk(s: Shape, direct: bool) -> Iterator[Part]:
    """AuxK: dead latents moved to the front; per stream selection among them; values; one inverse index; loss, sums.

    Gathers take min(auxk, dead) decoder rows. The latent sums are added in place to latents that have entries, unless
    the update computes them.
    """
    ahead, S, SB, BD = direct or computes_ahead(s), s.S, s.S * s.B, s.B * s.D
    own, present, ids = replace(s, k=s.auxk, auxk=0), min(s.auxk, s.dead), 8 * s.B * s.auxk
    entries = s.B * present
    touched = 2 * s.e * distinct(s.dead, entries) if entries else 0  # bytes of a column, read and written
    norms, residuals = Part("target weights", BD * s.e + 8 * SB), Part("residuals", (2 * BD + s.D) * s.e + 4 * SB)
    yield of_torch("dead", 9 * S * s.N, S)  # int64 counters against the threshold
    yield Part("count dead", S * s.N)
    yield Part("dead first", S * s.N * (1 + 4))
    yield from _dead_selections(own)
    yield of_torch("stack", 2 * S * ids)
    yield from _values(own, s.dead, present)
    yield from _lists(own, S, beside=present == s.auxk)
    yield from _losses(own, s.dead, present, 1)
    each = [replace(own, d_streams=(d,)) for d in s.d_streams]
    passes = [_one_pass(one, one.D, s.dead, present, first=True) for one in each]
    at_once = direct or in_one_pass(1, s.B, s.auxk, s.d_streams, getattr(torch, s.dtype), arch=s.arch)
    yield from _in_one_launch(passes) if ahead and at_once else (p for parts in passes for p in parts)
    if not direct:
        if ahead and at_once:  # dW_dec: value and scale of an entry
            yield from _reduces(own, 1, entries, per_entry=4 + 8, column=touched)
        else:
            for one in each:
                for columns in _pieces(one.D, route(one, one.D)[1]):
                    yield from _reduce(one, columns, 1, entries, per_entry=4 + 8, written=touched * columns)
        # dW_enc and dc: gradient and gate
        yield from _reduces(own, 1, entries, per_entry=4 + 8, column=touched, more=1)
    yield from (residuals, Part("AuxK terms", 4 * (3 * SB + 3 * S), launches=2))
    if ahead:  # the biases' sums: twice as many tensors in the launches of the main loss
        yield _bias_sums(s, launches=0)
    else:
        yield from (residuals, replace(norms, launches=S), _late_bias_sums(s, True))
        yield from (of_torch("scaled", 4 * (2 * S + 1)), of_torch("values' gradients", 8 * SB * s.auxk))


# ----------------------------------------------------------------------------------------------------------- optimizer


def parameter_bytes(s: Shape) -> int:
    """Return the bytes of a stored weight."""
    return 4 if s.autocast else s.e


def weights(s: Shape) -> int:
    """Return the number of entries of all weight matrices."""
    return 2 * s.N * s.D


def _scalars(s: Shape) -> Part:
    return Part("scalars", 4 * s.S * (8 + 20))


def sparc_adam(s: Shape) -> Op:
    """Model SparcAdam from gradients in memory: one pass reads weight, gradient and moments, writes all but the
    gradient."""
    moved = 3 * parameter_bytes(s) + 4 * MOMENT
    groups, _ = alike(s.d_streams, lambda d: d, lambda d: ())
    streams = (
        part for group in groups
        for part in _in_one_launch([Part("stream", moved * (2 * s.N * d + s.N + d))] for d in group)
    )  # fmt: skip
    return Op("SparcAdam", (_scalars(s), *streams))


def _updates(s: Shape) -> Iterator[Part]:
    """Updates of all matrices: decoders, then encoders."""
    for decoder in (True, False):
        groups, _ = alike(
            s.d_streams, lambda d: d, lambda d: (reduce_chunk(s.M, d), reduce_chunk(s.B * s.auxk, d) if s.auxk else 0)
        )
        for group in groups:
            yield from _in_one_launch(_update(s, d, decoder) for d in group)


def _update(s: Shape, d: int, decoder: bool) -> Iterator[Part]:
    """Update of one matrix of one stream from its lists and AuxK's: latent sums, projection, Adam.

    With the encoder also the latent bias and the pre-bias.
    """
    sources, per_entry = (s.S, 4 + 8 * s.S) if decoder else (1, 12)
    block, present = latent_adam_config(d, s.arch, not decoder).block_d, min(s.auxk, s.dead)
    for places, rows in ((s.M, sources), *([(s.B * s.auxk, 1)] if s.auxk else [])):
        programs = 2 * cdiv(places, reduce_chunk(places, d)) * cdiv(d, reduce_config(d, s.arch, rows).block_d)
        yield Part("list parts", 4 * programs)
    entries, rows = sources * s.M + s.B * present, sources * s.B * d * s.e
    own = s.B * d * s.e if s.auxk and decoder else 0  # AuxK's errors; the encoder reads x again
    sums = 0 if decoder else 4 * cdiv(s.N, adam_rows(s.N)) * d  # of dc W_enc, one of each program
    moved = s.M * per_entry + 4 * s.N + (s.B * present * 12 + 4 * s.N if s.auxk else 0) + sums
    moved += (2 * parameter_bytes(s) + 4 * MOMENT) * s.N * (d if decoder else d + 1)
    moved += s.e * s.N * d if s.autocast else 0  # half precision copies, SparcAdam's `shadow`
    used = Reuse(entries * d * s.e, rows + (own if present else 0), rows + own)
    yield Part("weights and moments", moved, used, flops=2 * entries * cdiv(d, block) * block)
    if not decoder:
        yield Part("pre-bias sums", sums + sums // 16)
        yield Part("pre-bias", sums // 16 + (2 * parameter_bytes(s) + 4 + 4 * MOMENT) * d)


# ------------------------------------------------------------------------------------------------- the table of a step


@of_gpu
def ops_of(s: Shape, direct: bool = False) -> dict[str, Op]:
    """Model forward, losses and backward op by op.

    Args:
        s: shape of the step.
        direct: model `AlignedSAE.training_step` instead, its update included.

    Returns:
        {name: Op}, in order; ops that the step does not have are left out.
    """
    B, N, k, S, D, M, e = s.B, s.N, s.k, s.S, s.D, s.M, s.e
    ahead, selected = direct or computes_ahead(s), select(s)
    norms = Part("target weights", B * D * e + 4 * S * B * (1 + S))
    matrices = 0 if direct else 4 * N * D  # the direct update writes them rounded
    table = {
        # x - b of every stream, for the selection, the values and dW_enc
        "centre": [Part("centre", 2 * B * D * e)],
        selected.name: selected.parts,
        "values": _values(s, N, k),
        # a byte a latent and stream zeroed, set where a value fires, read with the int64 counters, which are written
        "counters": [of_torch("zeros", S * N), Part("fired", S * M * (4 + 8 + 1)), Part("count", S * N * (1 + 8 + 8))],
        # beside the gathers of the values
        "inverse index": _lists(s, 1, beside=True),
        # losses in the forward, everything again in the backward
        "losses": [] if ahead else _losses(s, N, k, S),
        # one pass per target for losses, dv and E (or H); unless ahead every target has its own dv
        "losses + dv": _passes(s, direct),
        "dW_dec": [] if direct else _all_dec(s),
        "weights, terms": [
            of_torch("term weights", 4 * (S * S + S), 2),
            norms,
            Part("terms and metrics", 4 * (2 * S * S * B + S * M), launches=2),
            # the 1 that backward starts from, and the decoder's bias gradients added to the encoder's
            *when(not direct, of_torch("upstream", 4), of_torch("biases added", 3 * D * e, S)),
            *when(ahead, _bias_sums(s)),
            *when(ahead and not direct, Part("scale by 1", 4)),  # reads the upstream gradient and exits
            # weights times the upstream gradient; dv of the targets added up
            *when(not ahead, _late_bias_sums(s, False), replace(norms, launches=S)),
            *when(not ahead, of_torch("scaled", 4 * (2 * S * S + 1) + (S - 1) * 12 * S * M, S)),
        ],
        # per list entry one row of x - b, its dv and the value that gates it; dW_enc and dc written
        "dW_enc": [] if direct else _reduces(s, 1, M, per_entry=4 + 4 + 4, column=N * e, more=1),
        # -W_enc^T dc: W_enc read once more, all streams in two launches
        "d pre_bias": when(not direct, Part(
            "weighted sums", e * (N * D + S * N + D) + 8 * D * cdiv(N, column_chunk(N)), flops=2 * N * D, launches=2,
        )),
        "AuxK": _auxk(s, direct) if s.auxk else [],
        # autocast: inputs, biases and matrices rounded, gradients widened; not traced
        "casts": when(s.autocast, of_torch("casts", (matrices + B * D) * (4 + e), (3 if direct else 11) * S)),
        "update without gradients": [] if not direct else [
            _scalars(s), *_updates(s),
        ],
    }  # fmt: skip
    ops = [Op(name, tuple(parts)) for name, parts in table.items()]
    return {op.name: op for op in ops if op.parts}


def step(s: Shape, direct: bool = False) -> Op:
    """Model forward, losses and backward, without an optimizer; `direct`: `AlignedSAE.training_step`."""
    return total("training_step" if direct else "step", ops_of(s, direct).values())


def roofline_seconds(s: Shape, gpu: GPU) -> float:
    """Return a lower bound on the seconds of a step with its update.

    The encoder's GEMM at the library's rate; every weight and moment read and written once and the inputs read once
    through HBM; through L2 for each selected entry a row of W_enc for its value, one of W_dec for the losses, and one
    for each gradient. AuxK adds the same for its dead columns and entries.
    """
    flops = 2 * s.B * s.D * (s.N + (s.dead if s.auxk else 0))
    hbm = (2 * parameter_bytes(s) + 4 * MOMENT) * weights(s) + s.B * s.D * s.e
    rows = 4 * s.B * (s.k + min(s.auxk, s.dead)) * s.D * s.e
    return flops / gpu.flop_per_s(library_unit(s)) + hbm / gpu.bytes_per_s("HBM") + rows / gpu.bytes_per_s("L2")
