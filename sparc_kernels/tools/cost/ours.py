"""The package's operators: bytes, FLOPs and launches from the shape, with settings from the launchers' own functions.

Symbols as in docs/math.md: B rows, N latents, k active, S streams, D the sum of their widths, M = B k, e bytes of a
weight. `ops_of` is the table of a step; the functions before it make its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...launch.adam import adam_rows, latent_adam_config, latent_adam_streams
from ...launch.budgets import PARTIAL_BYTES
from ...launch.device import cdiv, dot_precision
from ...launch.gather import gather_config
from ...launch.reduce import column_chunk, reduce_chunk, reduce_config
from ...launch.select import encode_by_library, rows_per_chunk, select_config
from ...ops.adam import alike
from ...ops.decode_grads import in_one_pass, route_of
from ...ops.encode import gathered_at_once
from ...ops.gather import in_one_slab, slabs_of
from ...ops.latent_reduce import reduce_groups
from ...ops.selection import selected_at_once, selection_settings
from ..shape import Shape
from .gpus import GPU
from .parts import (
    NO_REUSE,
    Op,
    Part,
    Reuse,
    distinct,
    library_unit,
    of_gpu,
    of_torch,
    on_side_stream,
    product,
    topk_part,
    total,
    when,
)

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


def _dtype(s: Shape) -> torch.dtype:
    return getattr(torch, s.dtype)


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
    """Number of chunks of rows, and whether selectors overlap with the next chunk's GEMM.

    `compact`: selection among the dead latents of one stream.
    """
    _, encode, _, row_bytes, tiles = selection_settings(s.B, s.N, s.k, _dtype(s), s.arch, compact)
    rows, buffers = rows_per_chunk(s.B, row_bytes, encode.block_m, tiles)
    return cdiv(s.B, rows), buffers > 1


def _dead_selections(s: Shape) -> Iterator[Part]:
    """Selection among the dead latents of every stream, of several streams at once where their logits fit the scratch.

    Where no latent is dead, programs read the count and exit; rows are filled with live latents.
    """
    chunks, widths = _chunks(s, True)[0], s.d_streams
    while widths:
        at_once = selected_at_once(s.B, s.N, s.k, widths, _dtype(s), s.arch, True)
        yield from _in_one_launch(
            _selection(s, s.dead, d, compact=True)
            if s.dead else [Part("nothing dead", 8 * s.M, launches=2 * chunks)]
            for d in widths[:at_once]
        )  # fmt: skip
        widths = widths[at_once:]


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


def _slabs(s: Shape, widths: Sequence[int]) -> list[tuple[int, int]]:
    """Columns of one slab and number of slabs of each problem of one launch of the gather kernel."""
    config, widest = gather_config(s.k, max(widths), s.N, s.e, s.arch), max(widths)
    config = replace(config, tiles=min(config.tiles, cdiv(widest, config.block_d)))
    return [(min(config.tiles * config.block_d, d), slabs_of(config, d)) for d in widths]


def _gathers(
    s: Shape, name: str, widths: Sequence[int], n: int, present: float, *, sources: int, flops: int, column: float,
    per_slab: float,
) -> Iterator[Part]:  # fmt: skip
    """Rows of W [n, d] of each problem gathered by slabs of columns, for all sources at once, in one launch.

    Args:
        s: shape of the step.
        name: of the parts.
        widths: columns of each problem's W.
        n: latents.
        present: how many of a row's k entries are one of the n latents.
        sources: whose values are used with a row.
        flops: for each number gathered and source.
        column: bytes moved besides, for each column.
        per_slab: bytes moved besides, for each slab.
    """
    uses, unit = s.B * present, kernel_unit(s, False)
    for i, (d, (columns, n_slabs)) in enumerate(zip(widths, _slabs(s, widths), strict=True)):
        reuse = NO_REUSE
        if present:
            rows = distinct(n, uses)
            reuse = Reuse(uses * d * s.e, rows * d * s.e, rows * columns * s.e)
        moved, executed = d * column + n_slabs * per_slab, flops * sources * uses * d
        yield Part(name, moved, reuse, executed, unit, 16 / sources, launches=int(i == 0))  # columns padded to 16


def _values(s: Shape, n: int, present: float) -> Iterator[Part]:
    """Per stream k encoder rows gathered per row: x, ids and biases read, fp32 values written.

    Where columns are split, the dots of every slab are written, to which a kernel adds the biases. All streams at once,
    or as many as fit the scratch.
    """
    M, widths = s.M, s.d_streams
    while widths:
        at_once = gathered_at_once(s.B, s.k, s.N, widths, _dtype(s), s.arch)
        some, widths = widths[:at_once], widths[at_once:]
        whole = in_one_slab(s.k, s.N, some, s.e, s.arch)
        yield from _gathers(
            s, "dots", some, n, present, sources=1, flops=2, column=s.B * s.e, per_slab=(12 + s.e * whole) * M
        )  # fmt: skip
        slabs = sum(n_slabs for _, n_slabs in _slabs(s, some))
        yield from when(not whole, Part("values", 4 * M * slabs + len(some) * M * (8 + s.e + 4)))


def _lists(s: Shape, groups: int) -> Iterator[Part]:
    """`inverse_index` of `groups` of B k entries each.

    Ids are narrowed to keys of 2 or 4 bytes and sorted; both lists are narrowed, offsets come from a bisection.
    Assumption for torch.sort: one radix pass a byte of a key, which reads and writes keys and int64 positions;
    positions, histogram, scan and a copy besides.
    """
    M, offsets = s.M, groups * (s.N + 1)
    size, key = groups * M, 2 if offsets < 2**15 else 4
    bisection = OFFSETS_INSTRUCTIONS + LISTS_STEP * (M.bit_length() + 1)
    executed = (LISTS_INSTRUCTIONS * max(size, offsets) + bisection * offsets) / 32
    yield Part("keys", size * (8 + key))
    yield of_torch("sort", 2 * key * size * (key + 8) + 8 * size, key + 4)
    yield Part("lists", size * (8 + key + 4 + 4) + 4 * offsets, instructions=executed)


def computes_ahead(s: Shape) -> bool:
    """Return whether the loss computes its gradients in the forward (`ops.aligned_loss.AlignedLoss`)."""
    return not s.compiled and s.dtype != "float16"


def _losses(s: Shape, n: int, present: int, sources: int) -> Iterator[Part]:
    """k decoder rows gathered per row of every target, shared by its sources; x, ids and values read."""
    sq = 4 * sources * s.B
    yield from _gathers(
        s, "losses", s.d_streams, n, present, sources=sources, flops=2, per_slab=s.M * (8 + 4 * sources) + sq,
        column=s.B * s.e * (2 if s.auxk else 1),  # AuxK needs the target's own error
    )  # fmt: skip
    slabs = [n_slabs for _, n_slabs in _slabs(s, s.d_streams)]
    if len(set(slabs)) == 1:
        yield from when(slabs[0] > 1, of_torch("sum of slabs", s.S * sq * (slabs[0] + 1)))
    else:
        split = [n_slabs for n_slabs in slabs if n_slabs > 1]
        yield of_torch("sum of slabs", sq * (sum(split) + len(split)) + 2 * s.S * sq, len(split) + 1)


class Pass(NamedTuple):
    """What `ops.decode_grads` runs at once: targets in one launch, or one target in pieces of its columns."""

    widths: tuple[int, ...]  # of the targets
    through_h: bool
    columns: int  # of a piece

    @property
    def pieces(self) -> list[tuple[int, ...]]:
        """Widths of the problems of each launch."""
        if len(self.widths) > 1:
            return [self.widths]
        (d,) = self.widths
        return [(min(self.columns, d - c),) for c in range(0, d, self.columns)]


def passes(s: Shape, sources: int, *, direct: bool) -> list[Pass]:
    """Return the passes over all targets; `direct`: the errors of all columns are kept, and no dW_dec is made."""
    if direct:
        return [Pass(s.d_streams, False, max(s.d_streams))]
    routes = [route_of(sources, s.B, s.k, d, _dtype(s), arch=s.arch) for d in s.d_streams]
    if computes_ahead(s) and in_one_pass(sources, s.B, s.k, s.d_streams, _dtype(s), arch=s.arch):
        return [Pass(s.d_streams, routes[0][0], max(width for _, width in routes))]
    return [Pass((d,), *route) for d, route in zip(s.d_streams, routes, strict=True)]


def _gradients(s: Shape, n: int, present: int, sources: int, *, shared: bool, direct: bool) -> Iterator[Part]:
    """Losses, dv, sum_s coef E in fp32, and E of all sources or H, of every target; then the sum of slabs, scaling dv.

    With AuxK the target's own E is kept too. `shared`: dv is added up over targets, which have the same codes; in the
    backward each target has its own. `direct`: see `passes`.
    """
    S, B, M, ahead, placed = sources, s.B, s.M, direct or computes_ahead(s), False
    dv, sq = 4 * S * M, 4 * S * B
    for i, run in enumerate(passes(s, sources, direct=direct)):
        if run.through_h and not (ahead and placed):
            placed = True
            yield Part("places", 8 * M)  # inverse permutation of the lists' order
        kept = (M if run.through_h else S * B) + (B if s.auxk and not direct else 0)
        column, per_slab = B * (s.e + 4) + kept * s.e, M * (12 if run.through_h else 8) + 2 * (dv + sq)
        pending: list[int] = []
        slab_sums, earlier = 0, False
        for j, widths in enumerate(run.pieces):
            flops = 6 if run.through_h else 4
            yield from _gathers(
                s, "gather", widths, n, present, sources=S, flops=flops, column=column, per_slab=per_slab
            )  # fmt: skip
            pending.append(sum(n_slabs for _, n_slabs in _slabs(s, widths)))
            slab_sums += pending[-1] * (dv + sq)
            if j == len(run.pieces) - 1 or sum(pending) * dv > PARTIAL_BYTES or len(pending) == 4:
                T, added = len(widths), earlier or (shared and ahead and i > 0)
                written = dv * (1 if shared else T)  # targets of one launch are added up before that
                yield Part("collect", slab_sums + 2 * T * sq + written * (2 if added else 1) + T * sq * earlier)
                pending, slab_sums, earlier = [], 0, True


def _reduces(
    s: Shape, widths: Sequence[int], sources: int, entries: int, *, per_entry: int, column: float, more: int = 0
) -> Iterator[Part]:
    """Per list entry the rows of `sources` through L2, per tile of columns lists, offsets and `per_entry` bytes.

    Then every 64th entry is read to find the lists that were split. In as few launches as `launch_reduces` makes.
    `column`: bytes written for each column, `more` of them beside a stream's own.
    """
    for part, chunk in reduce_groups(widths, s.M, sources, s.arch):
        block = reduce_config(max(widths[part]), s.arch, sources).block_d
        for i, d in enumerate(widths[part]):
            rows, lists = sources * s.B * d * s.e, cdiv(d, block) * (entries * per_entry + 4 * s.N)
            used = Reuse(sources * entries * d * s.e, rows, rows * min(1, block / d)) if entries else NO_REUSE
            moved, flops = lists + column * (d + more), 2 * sources * entries * d
            yield Part("reduce", moved, used, flops=flops, launches=int(i == 0))
            yield from when(chunk < s.M, Part("split lists", s.M, launches=int(i == 0)))


def _decoder_sums(s: Shape, sources: int, entries: int, column: float) -> Iterator[Part]:
    """dW_dec of all targets: segment sums of H in list order; or per list entry weighted errors of the sources.

    `column`: bytes written for each column.
    """
    for run in passes(s, sources, direct=False):
        for widths in run.pieces:
            if run.through_h:
                yield from _segment_sums(s, widths, column)
            else:
                yield from _reduces(s, widths, sources, entries, per_entry=4 + 8 * sources, column=column)


def _segment_sums(s: Shape, widths: Sequence[int], column: float) -> Iterator[Part]:
    """Rows of H added up in list order, each of which is read once."""
    for part, chunk in reduce_groups(widths, s.M, 1, s.arch):
        for i, d in enumerate(widths[part]):
            yield Part("segment sum", s.M * d * s.e + 4 * s.N + column * d, flops=s.M * d, launches=int(i == 0))
            yield from when(chunk < s.M, Part("split lists", s.M, launches=int(i == 0)))


def _bias_sums(s: Shape) -> Part:
    """Sums over the rows of fp32 [B, d_s] of each stream, of chunks of rows, then of these, in the terms' launches."""
    return Part("bias sums", 4 * s.B * s.D + 8 * s.D * cdiv(s.B, column_chunk(s.B)) + s.D * s.e, launches=0)


def _late_bias_sums(s: Shape, added: bool) -> Part:
    """The same in the backward, by torch for each stream: summed, rounded; `added`: then added to another tensor."""
    half = s.e == 2
    moved = 4 * s.B * s.D + 4 * s.D + (s.D * (4 + s.e) if half else 0) + (3 * s.D * s.e if added else 0)
    return of_torch("biases", moved, s.S * (1 + half + added))


def _auxk(s: Shape, direct: bool) -> Iterator[Part]:
    """AuxK: dead latents moved to the front; per stream selection among them; values; one inverse index; loss, sums.

    Gathers take min(auxk, dead) decoder rows; one makes losses and gradients, unless the backward computes these. The
    latent sums are added in place to latents that have entries, unless the update computes them.
    """
    ahead, S, SB, BD = direct or computes_ahead(s), s.S, s.S * s.B, s.B * s.D
    own, present = replace(s, k=s.auxk, auxk=0), min(s.auxk, s.dead)
    entries = s.B * present
    touched = 2 * s.e * distinct(s.dead, entries) if entries else 0  # bytes of a column, read and written
    norms, residuals = Part("target weights", BD * s.e + 8 * SB), Part("residuals", (2 * BD + s.D) * s.e + 8 * SB)
    # int64 counters against the threshold; masks and lists
    yield from (Part("mark dead", S * s.N * (8 + 1)), Part("dead first", S * s.N * (1 + 4)))
    yield from _dead_selections(own)
    values = tuple(_values(own, s.dead, present))
    yield from (*values, *on_side_stream(values, _lists(own, S)))
    if not ahead:
        yield from _losses(own, s.dead, present, 1)
    yield from _gradients(own, s.dead, present, 1, shared=False, direct=ahead)
    if not direct:
        if ahead:
            yield from _reduces(own, own.d_streams, 1, entries, per_entry=4 + 8, column=touched)
        else:
            yield from _decoder_sums(own, 1, entries, touched)
        # dW_enc and dc: gradient and gate
        yield from _reduces(own, own.d_streams, 1, entries, per_entry=4 + 8, column=touched, more=1)
    # the mean of every term; the total and weights
    yield from (residuals, Part("AuxK terms", 4 * (2 * SB + 5 * S), launches=2))
    if ahead:  # the sums of both losses take AuxK's launches
        yield _bias_sums(s)
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


def _updates(s: Shape, share: float = 1) -> Iterator[Part]:
    """Updates of all matrices: decoders, then encoders; `share`: of the selected entries that are one of the N."""
    for decoder in (True, False):
        groups, _ = alike(
            s.d_streams, lambda d: d, lambda d: (reduce_chunk(s.M, d), reduce_chunk(s.B * s.auxk, d) if s.auxk else 0),
            latent_adam_streams,
        )  # fmt: skip
        for group in groups:
            yield from _in_one_launch(_update(s, d, group[0], decoder, share) for d in group)


def _update(s: Shape, d: int, widest: int, decoder: bool, share: float) -> Iterator[Part]:
    """Update of one matrix of one stream from its lists and AuxK's: latent sums, projection, Adam.

    With the encoder also the latent bias and the pre-bias. `widest`: columns for which the launch was set up.
    """
    sources, per_entry = (s.S, 4 + 8 * s.S) if decoder else (1, 12)
    block, present = latent_adam_config(widest, s.arch, not decoder).block_d, share * min(s.auxk, s.dead)
    for places, rows in ((s.M, sources), *([(s.B * s.auxk, 1)] if s.auxk else [])):
        programs = 2 * cdiv(places, reduce_chunk(places, d)) * cdiv(d, reduce_config(widest, s.arch, rows).block_d)
        yield Part("list parts", 4 * programs)
    M = share * s.M
    entries, rows = sources * M + s.B * present, sources * s.B * d * s.e
    own = s.B * d * s.e if s.auxk and decoder else 0  # AuxK's errors; the encoder reads x again
    sums = 0 if decoder else 4 * cdiv(s.N, adam_rows(s.N)) * d  # of dc W_enc, one of each program
    moved = M * per_entry + 4 * s.N + (s.B * present * 12 + 4 * s.N if s.auxk else 0) + sums
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
    values = tuple(_values(s, N, k))
    table = {
        # x - b of every stream, for the selection, the values and dW_enc
        "centre": [Part("centre", 2 * B * D * e)],
        selected.name: selected.parts,
        "values": values,
        # an int64 a latent and stream read and written; per value its id read and a counter written where it fires
        "counters": [Part("count", 16 * S * N), Part("fired", S * M * (4 + 8 + 8))],
        # beside the gathers of the values
        "inverse index": on_side_stream(values, _lists(s, 1)),
        # losses in the forward, everything again in the backward
        "losses": [] if ahead else _losses(s, N, k, S),
        # losses, dv and E (or H)
        "losses + dv": _gradients(s, N, k, S, shared=True, direct=direct),
        "dW_dec": [] if direct else _decoder_sums(s, S, M, N * e),
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
        "dW_enc": [] if direct else _reduces(s, s.d_streams, 1, M, per_entry=12, column=N * e, more=1),
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
