"""The cost model of our operators and of the step they make: everything here is **modelled**, see `cost_model.py`."""

from __future__ import annotations

from dataclasses import replace

from .cost_model import GPU, NO_REUSE, Op, Part, Reuse, Shape, distinct, gathered, slabs_of, total
from .launch.budgets import (
    H_MAX_K_FP32,
    H_MIN_COLUMNS,
    H_MIN_ENTRIES,
    H_MIN_SOURCES,
    MAX_K,
    PARTIAL_BYTES,
    SCRATCH_BYTES,
)
from .launch.device import cdiv, next_power_of_2
from .launch.reduce import column_chunk
from .launch.select import encode_by_library, rows_per_chunk, select_config

# ------------------------------------------------------------------------------------------------------- encoder's ops

# Compiled (sm_90, Triton 3.9): the epilogue adds about 46 / D of the main loop to a 128 x 256 tile.
EPILOGUE = 46
# Assumption: the share of the library's rate that the Triton GEMM reaches; the one behind `_launch.encode_by_library`.
TRITON_GEMM = 0.93
# Compiled (sm_90, Triton 3.9): a warp of the selector executes about 1,640 instructions outside its two bisections, and
# 73 + 46 a step. Simulated (normal logits, tests/test_cost.py): steps of each bisection, 5 to 9 of 16 or 19 in half
# precision and 8 to 10 of 32 in fp32, because they are bracketed and stop at a count of k.
SELECT_INSTRUCTIONS = 1640
BISECTION_INSTRUCTIONS = 119
BISECTION_STEPS = {2: 7, 4: 9}


def gemm_part(s: Shape, name: str, m: int, n: int, d: int, unit: str, padding: float = 1, extra: float = 0) -> Part:
    """[m, d] x [d, n]: operands read, product written, `extra` bytes beside."""
    return Part(name, (m * d + n * d + m * n) * s.e + extra, flops=2 * m * n * d, unit=unit, padding=padding)


def centre(s: Shape) -> Op:
    """x - b of every stream, for the selection, the values and dW_enc."""
    return Op("centre", (Part("centre", 2 * s.B * s.D * s.e),))


def gemm(s: Shape) -> Op:
    """The bare encoder GEMM of a library: x and W_enc read, the logits written."""
    return Op("encoder GEMM", (gemm_part(s, "GEMM", s.B, s.N, s.D, s.library_unit),))


# torch.topk at thousands of rows is a radix select of 2 bits a pass with ballots, then two collecting passes. Its
# instructions for 32 logits and a pass are an assumption under which bf16 at (4096, 32768) costs about what the GEMM of
# D 2560 does, the figure of the kernels' study; a public timing (ml-explore/mlx issue 3064) suggests twice as many.
TOPK_INSTRUCTIONS = 12


def topk_part(s: Shape, k: int) -> Part:
    """torch.topk of [B, N] logits: rows stay in L2 between the passes; k values and int64 ids written."""
    passes, size = 4 * s.e + 2, s.B * s.N * s.e
    return Part(
        "topk", s.B * k * (s.e + 8), Reuse(passes * size, size, 0),
        instructions=TOPK_INSTRUCTIONS * passes * s.B * s.N / 32, launches=3, library=True,
    )  # fmt: skip


def mm_topk(s: Shape) -> Op:
    """The GEMM, then torch.topk."""
    return Op("mm + topk", (*gemm(s).parts, topk_part(s, s.k)))


def maxima_bytes(s: Shape, k: int, n: int) -> tuple[float, float]:
    """(written by whoever takes the maxima, read by the selector beside ids and logits), of n columns, in bytes."""
    config = select_config(s.N, k)
    group, span = config.group, config.span
    groups, spans = cdiv(n, group), cdiv(n, span)
    if group == span:
        return s.B * groups * s.e, s.B * groups * s.e
    return s.B * (groups + spans) * s.e, s.B * (spans + k * (span // group)) * s.e


def _selector(s: Shape, k: int, n: int) -> Part:
    """Maxima and the logits of k groups read, int64 ids written; per warp, what its code executes."""
    config = select_config(s.N, k)
    _, read = maxima_bytes(s, k, n)
    per_warp = SELECT_INSTRUCTIONS + BISECTION_STEPS[s.e] * BISECTION_INSTRUCTIONS
    steps = 1 if config.group == config.span else 1.5  # a third narrowing
    return Part(
        "selector", read + s.B * min(k * config.group, n) * s.e + 8 * s.B * k,
        instructions=steps * per_warp * config.num_warps * s.B,
    )  # fmt: skip


def _chunks(s: Shape, compact: bool = False) -> tuple[int, bool]:
    """Launches of GEMM and selector, one for each part of the rows; whether selectors run beside the next GEMM."""
    config = select_config(s.N, s.k)
    columns = s.N + cdiv(s.N, config.group) + (cdiv(s.N, config.span) if config.span > config.group else 0)
    block_m, block_n = (128, 256) if s.B > 512 else (64, 128)  # of sm_90
    if s.e == 4:
        block_m, block_n = (128, 64) if s.B > 64 else (64, 128)
    tiles = cdiv(s.B, block_m) * cdiv(s.N, max(block_n, config.span)) if config.small and not compact else 0
    rows, buffers = rows_per_chunk(s.B, columns * s.e + 16 * config.k_pad, block_m, tiles)
    return cdiv(s.B, rows), buffers > 1


def _selectors(s: Shape, chunks: int, beside: bool) -> list[Part]:
    """The selector of all rows: those beside a GEMM, and those that have the GPU for themselves.

    Beside: a block of it fits on a multiprocessor next to one of the GEMM (compiled, sm_90: 216 of the GEMM's registers
    times 256 threads leave 10,240, the selector needs 80 times 128), and issues where the tensor cores are waited for.
    That the GEMM is not slowed down is an assumption.
    """
    whole = _selector(s, s.k, s.N)
    if not beside:
        return [replace(whole, launches=chunks)]
    last = 1 / chunks
    return [
        replace(whole, name="selector, beside", streamed=(1 - last) * whole.streamed, launches=chunks - 1,
                instructions=(1 - last) * whole.instructions, beside=True),
        replace(whole, streamed=last * whole.streamed, instructions=last * whole.instructions),
    ]  # fmt: skip


def select_fused(s: Shape) -> Op:
    """Triton GEMM whose epilogue writes group maxima, then the selector. The inputs are centred already."""
    written, _ = maxima_bytes(s, s.k, s.N)
    padding, (chunks, beside) = (1 + EPILOGUE / s.D) / TRITON_GEMM, _chunks(s)
    again = (chunks - 1) * s.N * s.D * s.e  # every chunk of rows reads W_enc
    main = gemm_part(s, "GEMM + maxima", s.B, s.N, s.D, s.kernel_unit, padding, written + again)
    return Op("select (fused)", (replace(main, launches=chunks), *_selectors(s, chunks, beside)))


def select_library(s: Shape) -> Op:
    """One library GEMM over joint storage, one pass over the logits for the maxima, then the selector."""
    written, _ = maxima_bytes(s, s.k, s.N)
    chunks, beside = _chunks(s)
    main = gemm_part(s, "GEMM", s.B, s.N, s.D, s.library_unit, extra=(chunks - 1) * s.N * s.D * s.e)
    casts = 2 if s.e == 2 else 0  # to fp32 and back
    biases = s.N * ((s.S - 1) * (8 + s.e) + 6 * casts)
    sums = Part("sum of biases", chunks * biases, launches=chunks * (s.S - 1 + casts), library=True)
    passed = Part("row maxima", s.B * s.N * s.e + written, launches=chunks)
    selectors = _selectors(s, chunks, beside)
    return Op("select (library)", (replace(main, launches=chunks, library=True), sums, passed, *selectors))


def select(s: Shape) -> Op:
    """The variant that the package takes: the library where its GEMM pays and the weights lie side by side, which those
    of one stream do, and those of several when autocast has just written them (`encode.JointCast`)."""
    joint = s.S == 1 or (s.autocast and all(d % 8 == 0 for d in s.d_streams))
    return select_library(s) if joint and encode_by_library(s.B, s.D, s.e, s.tf32) else select_fused(s)


def even_gemm_share(s: Shape, gpu: GPU) -> float:
    """The share of the library's GEMM rate from which the fused variant is the faster one."""
    main, *selectors = select_fused(s).parts
    spare = select_library(s).seconds(gpu) - sum(p.seconds(gpu) for p in selectors)
    spare -= 1e-6 * gpu.launch_us * main.launches
    return main.flops * (1 + EPILOGUE / s.D) / gpu.flop_per_s(main.unit) / spare


def _dots(s: Shape, d: int, k: int, found: int, n: int) -> tuple[Part, float]:
    """Gather of `found` of k columns that makes dots with x; the bytes of its partial sums, one for each slab."""
    slabs = slabs_of(s, d, k)[1]
    part = 4 * s.B * k * slabs
    streamed = s.B * d * s.e + 8 * s.B * k * slabs + part
    flops = 2 * s.B * found * d
    return Part("dots", streamed, gathered(s, d, k, found, n), flops, s.gather_unit, padding=16), part


def _values(s: Shape, k: int, found: int, n: int) -> tuple[Part, ...]:
    """`values` of k places a row, of which `found` exist, among n latents."""
    made, held, finishes = [_dots(s, d, k, found, n) for d in s.d_streams], 0, 1
    for _, part in made[:-1]:
        held += part
        if held >= SCRATCH_BYTES:
            held, finishes = 0, finishes + 1
    finish = sum(part for _, part in made) + s.S * s.B * k * (8 + s.e + 4)
    return (*(part for part, _ in made), Part("finish", finish, launches=finishes))


def values(s: Shape) -> Op:
    """Per stream k encoder rows gathered per row: centred x and ids read, the dots of every slab written; then one
    kernel for all streams (or as many as the scratch holds dots of) that adds the slabs and the bias, and writes fp32
    values."""
    return Op("values", _values(s, s.k, s.k, s.N))


def counters(s: Shape) -> Op:
    """A byte a latent and stream zeroed, set where a value fires, read with the int64 counters, which are written."""
    SN, SM = s.S * s.N, s.S * s.M
    zeros = Part("zeros", SN, library=True)
    return Op("counters", (zeros, Part("fired", SM * (4 + 8 + 1)), Part("count", SN * (1 + 8 + 8))))


# Compiled (sm_90, Triton 3.9): a warp of `_lists_kernel` executes about 20 instructions for 32 places; for 32 offsets
# 105, most of them a 64-bit division, and 22 for each step of their bisection.
LISTS_INSTRUCTIONS, OFFSETS_INSTRUCTIONS, LISTS_STEP = 20, 105, 22


def _sort(items: int, key: int) -> Part:
    """torch.sort of keys of `key` bytes with int64 positions. Assumption: a radix pass for each byte, which reads and
    writes both, and 4 launches beside: positions, histogram, scan, and a copy."""
    return Part("sort", 2 * key * items * (key + 8) + 8 * items, launches=key + 4, library=True)


def _lists(s: Shape, k: int, groups: int) -> tuple[Part, ...]:
    """`inverse_index` of groups of B k places each, with one sort."""
    M, offsets = s.B * k, groups * (s.N + 1)
    size, key = groups * M, 2 if offsets < 2**15 else 4
    bisection = OFFSETS_INSTRUCTIONS + LISTS_STEP * (M.bit_length() + 1)
    instructions = LISTS_INSTRUCTIONS * max(size, offsets) + bisection * offsets
    lists = Part("lists", size * (8 + key + 4 + 4) + 4 * offsets, instructions=instructions / 32)
    return Part("keys", size * (8 + key)), _sort(size, key), lists


def inverse_index(s: Shape) -> Op:
    """Ids narrowed to keys of 2 or 4 bytes; keys sorted; both lists narrowed, and the offsets found by bisection: all
    beside the gathers of the values."""
    return Op("inverse index", tuple(replace(part, beside=True) for part in _lists(s, s.k, 1)))


# ------------------------------------------------------------------------------------------------------ decoder's ops


def decode_nmse(s: Shape) -> Op:
    """Losses alone: k decoder rows gathered per row and target, once for all S sources; x, ids and values read."""
    parts = []
    for d in s.d_streams:
        slabs = slabs_of(s, d, s.k)[1]
        streamed = s.B * d * s.e + slabs * (s.M * (8 + 4 * s.S) + 4 * s.S * s.B)
        streamed += s.B * d * s.e if s.auxk else 0  # AuxK needs each target's own error
        reuse, flops = gathered(s, d, s.k, s.k, s.N), 2 * s.S * s.M * d
        parts.append(Part("gather", streamed, reuse, flops, s.gather_unit, padding=16 / s.S))
        if slabs > 1:
            parts.append(Part("sum of slabs", 4 * s.S * s.B * (slabs + 1), library=True))
    return Op("losses", tuple(parts))


def route(s: Shape, d: int) -> tuple[bool, int]:
    """Whether a decoder of width d has its gradient made by H, and how many columns at a time, as `decoder._route`."""
    width = SCRATCH_BYTES * (2 if s.S > 3 else 1) // (s.M * s.e)
    chunk = MAX_K if s.e == 2 else 128
    few = s.e == 2 or s.k <= H_MAX_K_FP32
    many = s.S > H_MIN_SOURCES or (s.S == H_MIN_SOURCES and s.M >= H_MIN_ENTRIES and few)
    spread = many and s.dtype != "float16" and s.k <= chunk
    if spread and width >= min(d, H_MIN_COLUMNS):
        return True, min(d, max(width // 128 * 128, 16))
    return False, min(d, max(SCRATCH_BYTES // (s.S * s.B * s.e) // 128 * 128, H_MIN_COLUMNS))


def _pieces(d: int, width: int) -> list[int]:
    return [min(width, d - c) for c in range(0, d, width)]


def _one_pass(s: Shape, d: int, first: bool, found: int, n: int) -> list[Part]:
    """Gather of one target that makes losses, dv, sum_s coef E in fp32, and E of all sources or H; then the kernel that
    adds up its slabs and scales dv, added to that of earlier targets. Of its k places a row `found` exist, among n
    latents. With AuxK the target's own E is kept too."""
    spread, width = route(s, d)
    SM, SB, parts = s.S * s.M, s.S * s.B, []
    if spread:  # where in list order each place stands
        parts.append(Part("places", 8 * s.M))
    held, collected, added = [], 0.0, False
    pieces = _pieces(d, width)
    for i, columns in enumerate(pieces):
        slabs = slabs_of(s, columns, s.k)[1]
        kept = s.M * columns * s.e if spread else s.S * s.B * columns * s.e
        kept += s.B * columns * s.e if s.auxk else 0
        sums = slabs * 4 * (SM + SB)
        read = slabs * (s.M * (8 + (4 if spread else 0)) + 4 * (SM + SB))
        parts.append(Part(
            "gather", s.B * columns * (s.e + 4) + read + kept + sums, gathered(s, columns, s.k, found, n),
            flops=(6 if spread else 4) * SB * found * columns, unit=s.gather_unit, padding=16 / s.S,
        ))  # fmt: skip
        held.append(slabs * 4 * SM)
        collected += sums
        if i == len(pieces) - 1 or sum(held) > PARTIAL_BYTES or len(held) == 4:
            adds = 4 * SM * (added or not first) + 4 * SB * added
            parts.append(Part("collect", collected + 4 * SB + 4 * (SM + SB) + adds))
            held, collected, added = [], 0.0, True
    return parts


def decode_losses_and_gradients(s: Shape) -> Op:
    """One gather pass per target that makes losses, dv and the errors (or H); the weights' sums are `reduce_dec`."""
    alone = not takes_gradient_ahead(s)  # then every target has a dv of its own
    parts = [part for t, d in enumerate(s.d_streams) for part in _one_pass(s, d, alone or t == 0, s.k, s.N)]
    return Op("losses + dv", tuple(parts))


REDUCE_COLUMNS = 1024  # of one program


def _reduced(s: Shape, d: int, per_entry: int, sources: int, written: float, entries: int) -> Part:
    """Per list entry the rows of `sources` out of L2; per tile of columns the list, offsets and per_entry bytes."""
    block = min(max(next_power_of_2(d), 128), REDUCE_COLUMNS)
    rows = sources * s.B * d * s.e
    lists = cdiv(d, block) * (entries * per_entry + 4 * s.N)
    used = Reuse(sources * entries * d * s.e, rows, rows * min(1, block / d)) if entries else NO_REUSE
    return Part("reduce", lists + written, used, flops=2 * sources * entries * d)


def _finish(s: Shape) -> Part:
    """Looks at every 64th place whether a list was split there."""
    return Part("finish", s.M)


def _errors_reduced(s: Shape, d: int, width: int) -> list[Part]:
    """Per list entry the errors of S sources read out of L2, with their weights and scales; dW_dec written."""
    parts = []
    for columns in _pieces(d, width):
        parts.append(_reduced(s, columns, 4 + 8 * s.S, s.S, s.N * columns * s.e, s.M))
        parts.append(_finish(s))
    return parts


def _spread_reduced(s: Shape, d: int, width: int) -> list[Part]:
    """H, in list order, read once and summed in segments; dW_dec written."""
    parts = []
    for columns in _pieces(d, width):
        parts.append(Part("segment sum", s.M * columns * s.e + s.N * (columns * s.e + 4), flops=s.M * columns))
        parts.append(_finish(s))
    return parts


def reduce_errors(s: Shape) -> Op:
    """dW_dec by the E route, whatever S is."""
    return Op("dW_dec (errors)", tuple(part for d in s.d_streams for part in _errors_reduced(s, d, d)))


def reduce_dec(s: Shape) -> Op:
    """dW_dec by the route that the package takes: through H from three sources on where places are many, from four on
    everywhere."""
    parts = []
    for d in s.d_streams:
        spread, width = route(s, d)
        parts += _spread_reduced(s, d, width) if spread else _errors_reduced(s, d, width)
    return Op("dW_dec", tuple(parts))


def decode_grads(s: Shape) -> Op:
    """Losses, dv and dW_dec of every target."""
    return total("decode_grads", [decode_losses_and_gradients(s), reduce_dec(s)])


def reduce_enc(s: Shape) -> Op:
    """Per list entry one row of x - b out of L2, its dv and the value that gates it; dW_enc and dc written."""
    parts = []
    for d in s.d_streams:
        parts += [_reduced(s, d, 4 + 4 + 4, 1, s.N * (d + 1) * s.e, s.M), _finish(s)]
    return Op("dW_enc", tuple(parts))


def bias_grad(s: Shape) -> Op:
    """d pre_bias = -W_enc^T dc: W_enc read once more, all streams in two launches."""
    parts = 2 * 4 * s.D * cdiv(s.N, column_chunk(s.N))
    moved = s.N * s.D * s.e + s.S * s.N * s.e + parts + s.D * s.e
    return Op("d pre_bias", (Part("weighted sums", moved, flops=2 * s.N * s.D, launches=2),))


def takes_gradient_ahead(s: Shape) -> bool:
    """Whether the loss makes its gradients in the forward (`loss.AlignedLoss`)."""
    return not s.compiled and s.dtype != "float16"


def column_sums(s: Shape, tensors: int) -> Part:
    """Sums over the rows of fp32 [B, d_s], of `tensors` for each stream: partial ones, then those of the chunks."""
    parts = 4 * tensors * s.D * cdiv(s.B, column_chunk(s.B))
    return Part("bias sums", 4 * tensors * s.B * s.D + 2 * parts + s.D * s.e, launches=2)


def loss_glue(s: Shape) -> Op:
    """Norms and coefficients of all targets in one launch; the terms' weights; terms and metrics in two; the sums of
    the biases' gradients, in one pass for all targets where the forward makes them."""
    S, SB, BD = s.S, s.S * s.B, s.B * s.D
    parts = [
        Part("term weights, and the 1 that backward starts from", 4 * (S * S + S + 1), launches=3, library=True),
        Part("target weights", BD * s.e + 4 * SB * (1 + S)),
        Part("terms and metrics", 4 * (S * SB + S * SB + S * s.M), launches=2),
        Part("biases added", 3 * s.D * s.e, launches=S, library=True),  # the decoder's to the encoder's
    ]  # fmt: skip
    if takes_gradient_ahead(s):
        parts.append(Part("scale by 1", 4))  # reads the upstream gradient and exits
        parts.append(column_sums(s, 1))
    else:
        # per target its sum over the rows, rounded
        rounded = s.D * (4 + s.e) if s.e == 2 else 0
        parts.append(Part("biases", 4 * BD + 4 * s.D + rounded, launches=S * (2 if s.e == 2 else 1), library=True))
        parts.append(Part("target weights", BD * s.e + 4 * SB * (1 + S), launches=S))
        # weights times the upstream gradient; dv of the targets added up
        parts.append(Part("scaled", (S - 1) * 12 * S * s.M, launches=2 * S - 1, library=True))
    return Op("weights, terms", tuple(parts))


def casts(s: Shape) -> Op:
    """Autocast: both weight matrices and the biases of every stream rounded, their gradients widened. Not traced."""
    rows = s.B * s.D * (4 + s.e)
    return Op("casts", (Part("casts", 2 * 2 * s.N * s.D * (4 + s.e) + rows, launches=11 * s.S, library=True),))


# ----------------------------------------------------------------------------------------------------------------- AuxK


def auxk_select(s: Shape) -> Op:
    """The dead of all streams first; per stream `select` over their columns alone; then min(auxk, dead) encoder rows
    gathered per row and stream."""
    found, chunks, ids = min(s.auxk, s.dead), _chunks(replace(s, k=s.auxk), compact=True)[0], 8 * s.B * s.auxk
    parts = [Part("count dead", s.S * s.N), Part("dead first", s.S * s.N * (1 + 4))]
    for d in s.d_streams:
        if s.dead == 0:  # programs look at the count; the rows are filled with ids of the living
            parts.append(Part("nothing dead", ids, launches=2 * chunks))
            continue
        written, _ = maxima_bytes(s, s.auxk, s.dead)
        padding = (1 + EPILOGUE / d) / TRITON_GEMM
        written += (chunks - 1) * s.dead * d * s.e
        main = gemm_part(s, "GEMM + maxima", s.B, s.dead, d, s.kernel_unit, padding, written)
        parts += [replace(main, launches=chunks), replace(_selector(s, s.auxk, s.dead), launches=chunks)]
    parts.append(Part("stack", 2 * s.S * ids, library=True))
    return Op("AuxK select", (*parts, *_values(s, s.auxk, found, s.dead)))


def auxk(s: Shape) -> Op:
    """AuxK of a step: selection and values; one inverse index for all streams; the loss, and its gradients where the
    main loss makes its own, over min(auxk, dead) decoder rows; the sums added in place to the latents that have
    entries; torch's passes over residuals and terms."""
    found, S, SB, BD, e = min(s.auxk, s.dead), s.S, s.S * s.B, s.B * s.D, s.e
    parts = [Part("dead", 9 * S * s.N, launches=S, library=True)]  # int64 counters against the threshold
    lists = _lists(s, s.auxk, S)
    parts += [*auxk_select(s).parts, *(replace(part, beside=found == s.auxk) for part in lists)]
    residuals = Part("residuals", (2 * BD + s.D) * e, launches=S, library=True)
    norms = Part("target weights", BD * e + 8 * SB)
    parts += [residuals, norms]
    gradients = []
    for d in s.d_streams:
        one = replace(s, k=s.auxk, d_streams=(d,), auxk=0, dead=0)
        slabs, entries = slabs_of(s, d, s.auxk)[1], s.B * found
        parts.append(Part(
            "loss", s.B * d * e + slabs * (12 * one.M + 4 * s.B), gathered(s, d, s.auxk, found, s.dead),
            flops=2 * entries * d, unit=s.gather_unit, padding=16,
        ))  # fmt: skip
        if slabs > 1:
            parts.append(Part("sum of slabs", 4 * s.B * (slabs + 1), library=True))
        gradients += _one_pass(one, d, True, found, s.dead)
        touched = 2 * e * (distinct(s.dead, entries) if entries else 0)  # read, and written
        for columns in _pieces(d, route(one, d)[1]):  # dW_dec: value and scale of an entry
            gradients += [_reduced(one, columns, 4 + 8, 1, touched * columns, entries), _finish(one)]
        # dW_enc and dc: gradient and gate
        gradients += [_reduced(one, d, 4 + 8, 1, touched * (d + 1), entries), _finish(one)]
    parts.append(Part("AuxK terms", 4 * (2 * SB + 3 * S), launches=2))
    if S > 1:
        parts.append(Part("column of the weights", 8 * S, library=True))
    if takes_gradient_ahead(s):  # once more for each target; the biases' sums take twice as many tensors
        parts += [norms, replace(column_sums(s, 1), launches=0)]
    else:
        parts += [residuals, replace(norms, launches=S), Part("scaled", 12 * S, launches=S, library=True)]
        rounded = s.D * (4 + e) if e == 2 else 0
        biases = 4 * BD + 4 * s.D + rounded + 3 * s.D * e
        parts.append(Part("biases", biases, launches=S * (3 if e == 2 else 2), library=True))
        parts.append(Part("values' gradients", 8 * SB * s.auxk, library=True))
    return Op("AuxK", (*parts, *gradients))


def auxk_dense(s: Shape) -> Op:
    """Per stream: all pre-activations written, read and written masked, read by the selection."""
    parts = []
    for d in s.d_streams:
        parts.append(gemm_part(s, "GEMM", s.B, s.N, d, s.library_unit))
        parts.append(Part("mask", 2 * s.B * s.N * s.e))
        parts.append(topk_part(s, s.auxk))
    return Op("AuxK (dense)", tuple(parts))


# ---------------------------------------------------------------------------------------------------------- whole steps


def step_ops(s: Shape) -> list[Op]:
    """Forward, losses and backward of ours, op by op; the optimizer is apart."""
    ops = [centre(s), select(s), values(s), counters(s), inverse_index(s)]
    if not takes_gradient_ahead(s):  # losses in the forward, everything again in the backward
        ops.append(decode_nmse(s))
    ops += [decode_losses_and_gradients(s), reduce_dec(s), loss_glue(s), reduce_enc(s), bias_grad(s)]
    if s.auxk:
        ops.append(auxk(s))
    if s.autocast:
        ops.append(casts(s))
    return ops


def step(s: Shape) -> Op:
    return total("step", step_ops(s))
