"""Terms and metrics of the training loss, with the sums over rows that the biases' gradients are; scaling."""

from __future__ import annotations

import numpy as np
import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import is_host_readable
from ..core.recorder import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.device import capability, cdiv, next_power_of_2
from ..launch.reduce import MeansConfig
from .bias_grads import ColumnSums, column_parts, column_sums, column_sums_torch


# loss_terms: the loss and its metrics from the rows' squared errors
@triton.jit
def _means_kernel(
    sq_ptr, norm_ptr, values_ptr, mean_ptr, part_ptr, B, size, chunk, chunks, x_ptrs, widths, strides, column_part_ptr,
    D, column_chunk, column_chunks, tiles, T: tl.constexpr, S: tl.constexpr, XS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (target, source): mean over rows of |E|^2 / |x|^2.

    Later programs: sum a chunk of a source's values; last ones: sum a chunk of the rows of one of XS tensors.
    """
    first_column = T * S + S * chunks
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    if pid < T * S:
        for start in range(0, B, BLOCK):
            mask = start + offs < B
            sq = tl.load(sq_ptr + pid * B + start + offs, mask=mask, other=0.0)
            total += sq / tl.load(norm_ptr + (pid // S) * B + start + offs, mask=mask, other=1.0)
        tl.store(mean_ptr + pid, tl.sum(total, 0) / B)
    if values_ptr is not None:
        if (pid >= T * S) & (pid < first_column):
            source, first = (pid - T * S) // chunks, ((pid - T * S) % chunks) * chunk
            for start in range(first, first + chunk, BLOCK):
                total += tl.load(values_ptr + source * size + start + offs, mask=start + offs < size, other=0.0)
            tl.store(part_ptr + pid - T * S, tl.sum(total, 0))
    if x_ptrs is not None:
        if pid >= first_column:
            column = (pid - first_column) // column_chunks
            column_parts(
                (pid - first_column) % column_chunks, column % tiles, column // tiles, x_ptrs, None, widths, strides,
                column_part_ptr, B, D, column_chunk, XS, BLOCK_B, BLOCK_D, ACC,
            )  # fmt: skip


@triton.jit
def _terms_kernel(
    mean_ptr, part_ptr, weights_ptr, loss_ptr, terms_ptr, K, rows, chunks, column_part_ptr, out_ptrs, widths,
    column_chunks, D, tiles, T: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    SOURCES: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program 0: loss and metrics, in the layout of `Terms`. Later ones: add up the chunks of columns."""
    if tl.program_id(0) == 0:
        _terms(mean_ptr, part_ptr, weights_ptr, loss_ptr, terms_ptr, K, rows, chunks, T, S, PAIRS, CHUNKS, SOURCES, ACC)
    if out_ptrs is not None:
        if tl.program_id(0) > 0:
            column = tl.program_id(0) - 1
            column_sums(
                column % tiles, column // tiles, column_part_ptr, out_ptrs, widths, column_chunks, D, 0, 1, T, False,
                False, BLOCK_D, ACC,
            )  # fmt: skip


@triton.jit
def _terms(
    mean_ptr, part_ptr, weights_ptr, loss_ptr, terms_ptr, K, rows, chunks, T: tl.constexpr, S: tl.constexpr,
    PAIRS: tl.constexpr, CHUNKS: tl.constexpr, SOURCES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, PAIRS)
    exists = pair < T * S
    own = exists & (pair // S == pair % S)
    nmse = tl.load(mean_ptr + pair, mask=exists, other=0.0)
    weight = tl.load(weights_ptr + pair, mask=exists, other=0.0).to(ACC)
    weighted = tl.where(weight != 0.0, weight * nmse, 0.0)
    crossing = exists & (pair // S != pair % S)
    tl.store(loss_ptr, tl.sum(weighted, 0))
    tl.store(terms_ptr, tl.sum(tl.where(own, nmse, 0.0), 0) / T)
    if T * S > T:
        tl.store(terms_ptr + 1, tl.sum(tl.where(crossing, nmse, 0.0), 0) / (T * S - T))
    else:
        tl.store(terms_ptr + 1, tl.zeros((), ACC))
    tl.store(terms_ptr + 2, tl.sum(tl.where(crossing, weighted, 0.0), 0))
    source = tl.arange(0, SOURCES)
    chunk = tl.arange(0, CHUNKS)
    mask = (source[:, None] < S) & (chunk[None, :] < chunks)
    parts = tl.load(part_ptr + source[:, None] * chunks + chunk[None, :], mask=mask, other=0.0)
    sparsity = tl.sum(parts, 1) / (rows * (tl.full((), K, ACC) + 1e-8))
    tl.store(terms_ptr + 3, tl.sum(sparsity, 0) / S)
    tl.store(terms_ptr + 4, tl.full((), K, ACC))
    tl.store(terms_ptr + 5 + source, sparsity, mask=source < S)
    tl.store(terms_ptr + 5 + S + pair, nmse, mask=exists)


def _means(sq, norm, values, gs):
    """Launch `_means_kernel`.

    Returns:
        The NMSE of every pair [T * S]; partial sums of the sources' values [S * chunks]; chunks; how the columns of gs
        are summed, with their partial sums, None without gs.
    """
    T, S, B = sq.shape
    size = 0 if values is None else values[0].numel()
    chunk = 16 if interpreted() else 16384
    while cdiv(size, chunk) > 256:
        chunk *= 2
    chunks, sums = cdiv(size, chunk), ColumnSums.of(gs) if gs else None
    nmse, parts = norm.new_empty(T * S), norm.new_empty(S * chunks)
    columns: tuple = (None,) * 4 + (0,) * 4
    if sums is not None:
        columns = sums.xs, sums.widths, sums.strides, sums.part, sum(sums.widths), sums.chunk, sums.chunks, sums.tiles
    programs = T * S + S * chunks + (0 if sums is None else len(gs) * sums.tiles * sums.chunks)
    launch(_means_kernel, (programs,))(
        sq.contiguous(), norm, values, nmse, parts, B, size, chunk, chunks, *columns, T=T, S=S, XS=len(gs),
        **(dict(BLOCK_B=1, BLOCK_D=1) if sums is None else sums.blocks), BLOCK=16 if interpreted() else 1024,
        ACC=tl_dtype(norm.dtype), num_warps=4, **MeansConfig().registers(capability(norm.device)),
    )  # fmt: skip
    return nmse, parts, chunks, sums


def _columns(sums, outs):
    """Arguments of the kernels that add up the chunks of columns, and their number of programs."""
    if sums is None:
        return (None, None, None, 0, 0, 0), 1, 0
    columns = sums.part, tuple(outs), sums.widths, sums.chunks, sum(sums.widths), sums.tiles
    return columns, sums.blocks["BLOCK_D"], len(outs) * sums.tiles


def _loss_terms_triton(sq, norm, weights, values, gs, dbiases):
    (T, S), (_, B, k) = weights.shape, values.shape
    nmse, parts, chunks, sums = _means(sq, norm, values.contiguous(), gs)
    loss, terms = _loss_terms_fake(sq, norm, weights, values, gs, dbiases)
    columns, block_d, programs = _columns(sums, dbiases)
    launch(_terms_kernel, (1 + programs,))(
        nmse, parts, weights.contiguous(), loss, terms, k, B, chunks, *columns, T=T, S=S, PAIRS=next_power_of_2(T * S),
        CHUNKS=next_power_of_2(chunks), SOURCES=next_power_of_2(S), BLOCK_D=block_d, ACC=tl_dtype(norm.dtype),
        num_warps=1,
    )  # fmt: skip
    return loss, terms


def _loss_terms_torch(sq, norm, weights, values, gs, dbiases):
    _, B, k = values.shape
    sparsity = values.sum((1, 2), dtype=norm.dtype) / (B * (k + 1e-8))
    column_sums_torch(gs, dbiases)
    return terms_torch((sq / norm[:, None]).mean(2), weights, sparsity, k)


def terms_torch(
    nmse: torch.Tensor, weights: torch.Tensor, sparsity: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `loss_terms` returns from the means over rows.

    Args:
        nmse: [T, S].
        weights: [T, S].
        sparsity: [S], mean_b sum_j values / (k + 1e-8).
        k: active latents per row.
    """
    S = nmse.shape[1]
    weighted = torch.where(weights != 0, weights * nmse, 0.0)
    loss, own = weighted.sum(), nmse.diagonal().mean()
    cross, scaled = nmse.new_zeros(2)
    if S > 1:  # off the diagonal: all but the first of S + 1 columns
        cross, scaled = (m.flatten()[1:].view(S - 1, S + 1)[:, :-1] for m in (nmse, weighted))
        cross, scaled = cross.mean(), scaled.sum()
    few = torch.stack([own, cross, scaled, sparsity.mean(), own.new_full((), k)])
    return loss, torch.cat([few, sparsity, nmse.flatten()])


def _loss_terms_fake(sq, norm, weights, values, gs, dbiases):
    T, S = weights.shape
    return norm.new_empty(()), norm.new_empty(5 + S + T * S)


loss_terms = register(
    "loss_terms",
    "(Tensor sq, Tensor norm, Tensor weights, Tensor values, Tensor[] gs, Tensor(a!)[] dbiases, str impl)"
    " -> (Tensor, Tensor)",
    torch_impl=_loss_terms_torch,
    triton_impl=_loss_terms_triton,
    fake=_loss_terms_fake,
)
loss_terms.__doc__ = """Compute the loss sum_ts weights[t, s] NMSE[t, s], a step's metrics and the biases' gradients.

Args:
    sq: |E|^2 [T, S, B], T = S targets.
    norm: |x|^2 [T, B].
    weights: [T, S].
    values: [S, B, k].
    gs: none, or T tensors [B, d_t], sum_s coef E.
    dbiases: with gs, T tensors [d_t] of any dtype, receive the gradients of the biases, sums over the rows of gs.
    impl: "triton" or "torch".

Returns:
    The loss []; the metrics in one tensor [5 + S + T S], read through `Terms`.
"""


class Terms:
    """Views of the metrics that `loss_terms` returns, by name.

    Args:
        terms: [5 + S + T S].
        S: number of sources.
    """

    def __init__(self, terms: torch.Tensor, S: int):
        every = terms.unbind()
        self.avg_self, self.avg_cross, self.avg_cross_scaled, self.avg_l1, self.k = every[:5]
        self.l1 = every[5 : 5 + S]  # mean_b sum_j values / (k + 1e-8), of each source
        self.nmse = [every[t : t + S] for t in range(5 + S, len(every), S)]  # [t][s]


# add_auxk: the AuxK terms, their part of the loss and the weights of their gradients
@triton.jit
def _auxk_kernel(
    mean_ptr, loss_ptr, total_ptr, terms_ptr, weight_ptr, high, low, zeroed_ptrs, sizes, programs, column_part_ptr,
    out_ptrs, widths, column_chunks, D, tiles, half, T: tl.constexpr, PAD: tl.constexpr, ZEROED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program 0 writes loss, terms and weights; if AuxK is left out, the first programs zero ZEROED tensors.

    Programs after that add up the chunks of columns, those of AuxK only if it counts.
    """
    pid = tl.program_id(0)
    coef = tl.full((), high, ACC) + tl.full((), low, ACC)
    target = tl.arange(0, PAD)
    own = tl.load(mean_ptr + target, mask=target < T, other=0.0)
    mean = tl.sum(own, 0) / T
    counts = mean > 0.0  # not for NaN
    mean = tl.where(counts, mean, 0.0)
    if pid == 0:
        tl.store(total_ptr, tl.load(loss_ptr) + coef * mean)
        tl.store(terms_ptr, mean)
        tl.store(terms_ptr + 1, coef * mean)
        tl.store(terms_ptr + 2 + target, own, mask=target < T)
        tl.store(weight_ptr + target, tl.zeros((PAD,), ACC) + tl.where(counts, coef / T, 0.0), mask=target < T)
    if zeroed_ptrs is not None:
        if (counts == 0) & (pid < programs):
            for t in tl.static_range(ZEROED):
                for block in range(pid, tl.cdiv(sizes[t], BLOCK), programs):
                    offs = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
                    zero = tl.zeros((BLOCK,), ACC).to(zeroed_ptrs[t].dtype.element_ty)
                    tl.store(zeroed_ptrs[t] + offs, zero, mask=offs < sizes[t])
    if out_ptrs is not None:
        if pid >= programs:
            column = pid - programs
            column_sums(
                column % tiles, column // tiles, column_part_ptr, out_ptrs, widths, column_chunks, D, half, counts, T,
                True, False, BLOCK_D, ACC,
            )  # fmt: skip


ZERO_PROGRAMS = 256  # that zero what AuxK would have written; in most steps they have nothing to do


def _add_auxk_triton(sq, norm, loss, coef, zeroed, gs, dbiases):
    T, single = len(sq), float(np.float32(coef))
    nmse, _, _, sums = _means(sq, norm, None, gs)
    total, terms, weight = _add_auxk_fake(sq, norm, loss, coef, zeroed, gs, dbiases)
    columns, block_d, column_programs = _columns(sums, dbiases)
    sizes = tuple(t.numel() for t in zeroed)
    programs = min(cdiv(max(sizes), 4096), ZERO_PROGRAMS) if zeroed else 1
    # Triton rounds numbers to float32; `low` carries the remainder for float64 under the interpreter
    launch(_auxk_kernel, (programs + column_programs,))(
        nmse, loss, total, terms, weight, single, coef - single, tuple(zeroed) or None, sizes or None, programs,
        *columns, sum(g.shape[1] for g in gs[:T]), T=T, PAD=next_power_of_2(T), ZEROED=len(zeroed), BLOCK=4096,
        BLOCK_D=block_d, ACC=tl_dtype(norm.dtype), num_warps=4,
    )  # fmt: skip
    return total, terms, weight


def _add_auxk_torch(sq, norm, loss, coef, zeroed, gs, dbiases):
    T = len(sq)
    own = (sq[:, 0] / norm).mean(1)
    mean = own.mean()
    counts = mean > 0
    mean = torch.where(counts, mean, 0.0)
    weight = (counts.to(norm.dtype) * (coef / T)).repeat(T, 1)
    terms = torch.cat([torch.stack([mean, coef * mean]), own])
    if not (is_host_readable(counts) and bool(counts)):
        gs = [*gs[:T], *(torch.where(counts, g, 0.0) for g in gs[T:])]
        for t in zeroed:
            t.copy_(torch.where(counts, t, 0.0))
    column_sums_torch(gs, dbiases)
    return loss + coef * mean, terms, weight


def _add_auxk_fake(sq, norm, loss, coef, zeroed, gs, dbiases):
    T = len(sq)
    return norm.new_empty(()), norm.new_empty(2 + T), norm.new_empty(T, 1)


add_auxk = register(
    "add_auxk",
    "(Tensor sq, Tensor norm, Tensor loss, float coef, Tensor(a!)[] zeroed, Tensor[] gs, Tensor(b!)[] dbiases,"
    " str impl) -> (Tensor, Tensor, Tensor)",
    torch_impl=_add_auxk_torch,
    triton_impl=_add_auxk_triton,
    fake=_add_auxk_fake,
)
add_auxk.__doc__ = """Add coef * mean_t AuxK[t] to the loss; the mean counts as 0 unless it is > 0 (so also when NaN).

Args:
    sq: |E|^2 [T, 1, B] of each stream's AuxK reconstruction.
    norm: |residual|^2 [T, B].
    loss: [].
    coef: coefficient of AuxK.
    zeroed: contiguous tensors that become 0 where the mean counts as 0: AuxK's gradients, made before it was known.
    gs: none, or 2 T tensors [B, d_t], sum_s coef E of the loss, then of AuxK.
    dbiases: with gs, T tensors [d_t] of any dtype, receive the gradients of the biases, sums over the rows of gs, those
        of AuxK only where it counts.
    impl: "triton" or "torch".

Returns:
    The total []; mean, coef * mean and the T terms, [2 + T]; the weights [T, 1] of the terms in the total.
"""


# scale_
@triton.jit
def _scale_kernel(x_ptrs, sizes, factor_ptr, T: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # the usual backward(): no pass over the gradients
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for t in tl.static_range(T):
            for start in range(first, sizes[t], step):
                offs = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptrs[t] + offs, mask=offs < sizes[t], other=0.0)
                tl.store(x_ptrs[t] + offs, (x * factor).to(x_ptrs[t].dtype.element_ty), mask=offs < sizes[t])


def _scale_triton(xs, factor):
    block, sizes = 4096, tuple(x.numel() for x in xs)
    # enough programs to fill a GPU; in most steps they only read the factor
    launch(_scale_kernel, (min(cdiv(max(sizes), block), 2048),))(
        tuple(xs), sizes, factor, T=len(xs), BLOCK=block, num_warps=8
    )


def _scale_torch(xs, factor):
    if not is_host_readable(factor) or factor != 1:
        for x in xs:
            x.mul_(factor.to(x.dtype))


scale_ = register(
    "scale_",
    "(Tensor(a!)[] xs, Tensor factor, str impl) -> ()",
    torch_impl=_scale_torch,
    triton_impl=_scale_triton,
    fake=lambda xs, factor: None,
)
scale_.__doc__ = """Multiply contiguous tensors in place by a number on the device; a factor of 1 costs no pass.

Args:
    xs: contiguous tensors.
    factor: 0-d.
    impl: "triton" or "torch".
"""
