"""Gather kernels: sums and dot products over the k weight rows that each row of the batch selects.

One kernel serves every use. A program takes one row b, fetches the k selected rows of W tile by tile, and uses each
tile for every source s while it is on chip:

    R[s] = sum_j v[s, j] W[I_j]              a reconstruction, or the gradient of an encoder's input
    E[s] = R[s] + bias - x                   the error of that reconstruction
    sq[s] = |E[s]|^2                         its square norm
    dot[s, j] = <W[I_j], E[s]>               pre-activations, or the gradient of the values
    g = sum_s coef[s] E[s]                   the gradient of the decoder's bias, and of its target
    H[j] = sum_s coef[s] v[s, j] E[s]        this row's part of the gradient of latent I_j's decoder row

Both contractions are matrix products with W as the first operand and the sources, padded to 16, as columns. For
half-precision weights, columns 0-7 carry the high half of v or E and columns 8-15 the low half: only W itself is
rounded. Programs of one column slab run next to each other, so that the slab of W stays in L2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, csr, is_host_readable
from ..core.recorder import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.device import capability, cdiv, dot_precision
from ..launch.gather import GatherConfig, gather_chunk, gather_config
from .records import ABSENT

ABSENT_ID = tl.constexpr(ABSENT)


@triton.jit
def _split_columns(x, DTYPE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """[ROWS, 8] -> [ROWS, 16] in DTYPE: the rounded values, then the rounding errors."""
    high = x.to(DTYPE)
    low = (x - high.to(ACC)).to(DTYPE)
    return tl.reshape(tl.permute(tl.join(high, low), (0, 2, 1)), (ROWS, 16))


@triton.jit
def pick(items, i, T: tl.constexpr):
    """items[i] for an i known at run time only."""
    item = items[0]
    for t in tl.static_range(1, T):
        item = tl.where(i == t, items[t], item)
    return item


@triton.jit(do_not_specialize=["error_sources", "tiles"])
def _gather_kernel(
    idx_ptr, v_ptr, w_ptrs, bias_ptrs, x_ptrs, count_ptr, coef_ptr, list_position_ptr,
    e_ptrs, error_ptrs, g_ptrs, h_ptrs, sq_ptr, dot_ptr, c_ptrs,
    B, K, widths, N, strides_wn, strides_xs, strides_xb, strides_ob, stride_idx, stride_v, stride_count,
    error_sources, tiles,
    T: tl.constexpr, S: tl.constexpr, K_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """T problems, each with its own W, width D, bias, x and outputs; program (slab, b), the problems' slabs in a row.

    Every pointer but idx and w is optional; a None input or output is compiled out. Strides of 0 share idx (and
    list_position), v or count among the problems.

    Inputs: v (without it E = x), bias, x, count (None: all K columns are valid), coef [T, S, B]. Outputs: e [S, B, D];
    error [B, D] = e[source], the problem's 3 bits of error_sources; g [B, D] = sum_s coef_s e_s; h [B * K, D], whose
    row list_position[p] is sum_s coef_s v_s e_s of place p; sq [all slabs, S, B]; dot [all slabs, S, B, K]. Sources
    with coef 0 are excluded from g and h, even if their errors are not finite. With c [N], for one slab a problem, dot
    is relu(dot + c[idx]). Columns that are not valid or ABSENT have value and dot 0.
    """
    SUM: tl.constexpr = v_ptr is not None
    DOT: tl.constexpr = dot_ptr is not None
    pid = tl.program_id(0)
    slab_out = pid // B  # slow axis
    b = (pid % B).to(tl.int64)
    slab = slab_out
    D = widths[0]
    w_ptr = w_ptrs[0]
    stride_wn = strides_wn[0]
    if bias_ptrs is not None:
        bias_ptr = bias_ptrs[0]
    if x_ptrs is not None:
        x_ptr = x_ptrs[0]
        stride_xs = strides_xs[0]
        stride_xb = strides_xb[0]
    if e_ptrs is not None:
        e_ptr = e_ptrs[0]
    if strides_ob is not None:
        stride_ob = strides_ob[0]
    if error_ptrs is not None:
        error_ptr = error_ptrs[0]
    if g_ptrs is not None:
        g_ptr = g_ptrs[0]
    if h_ptrs is not None:
        h_ptr = h_ptrs[0]
    if c_ptrs is not None:
        c_ptr = c_ptrs[0]
    if T > 1:
        problem = tl.zeros((), tl.int32)
        first = tl.zeros((), tl.int32)  # slab of the problem
        for t in tl.static_range(1, T):
            total = tl.cdiv(widths[t - 1], BLOCK_D)
            first += tl.cdiv(total, tl.minimum(tiles, total))
            here = slab_out >= first
            problem = tl.where(here, t, problem)
            slab = tl.where(here, slab_out - first, slab)
        D = pick(widths, problem, T)
        tiles = tl.minimum(tiles, tl.cdiv(D, BLOCK_D))
        w_ptr = pick(w_ptrs, problem, T)
        stride_wn = pick(strides_wn, problem, T)
        if bias_ptrs is not None:
            bias_ptr = pick(bias_ptrs, problem, T)
        if x_ptrs is not None:
            x_ptr = pick(x_ptrs, problem, T)
            stride_xs = pick(strides_xs, problem, T)
            stride_xb = pick(strides_xb, problem, T)
        if e_ptrs is not None:
            e_ptr = pick(e_ptrs, problem, T)
        if strides_ob is not None:
            stride_ob = pick(strides_ob, problem, T)
        if error_ptrs is not None:
            error_ptr = pick(error_ptrs, problem, T)
        if g_ptrs is not None:
            g_ptr = pick(g_ptrs, problem, T)
        if c_ptrs is not None:
            c_ptr = pick(c_ptrs, problem, T)
        if h_ptrs is not None:
            h_ptr = pick(h_ptrs, problem, T)
            list_position_ptr += problem.to(tl.int64) * stride_idx
        idx_ptr += problem.to(tl.int64) * stride_idx
        if SUM:
            v_ptr += problem.to(tl.int64) * stride_v
        if count_ptr is not None:
            count_ptr += problem * stride_count
        if coef_ptr is not None:
            coef_ptr += problem.to(tl.int64) * (S * B)
        error_sources = (error_sources >> (3 * problem)) & 7
    COLS: tl.constexpr = 8 if SPLIT else 16
    offs_k = tl.arange(0, K_PAD)
    offs_s = tl.arange(0, COLS)
    mask_k = offs_k < K
    mask_s = offs_s < S
    rows = tl.load(idx_ptr + b * K + offs_k, mask=mask_k, other=0).to(tl.int64)
    mask_in = mask_k & (rows != ABSENT_ID)
    if count_ptr is not None:
        mask_in = mask_in & (offs_k < tl.load(count_ptr))
    inside = (rows >= 0) & (rows < N)  # ids outside read nothing and make the result NaN
    mask_w = mask_in & inside
    poison = tl.where(mask_in & (inside == 0), float("nan"), 0.0).to(ACC)
    if SUM:
        v = tl.load(
            v_ptr + (offs_s[None, :] * B + b) * K + offs_k[:, None], mask=mask_s[None, :] & mask_in[:, None], other=0.0
        ).to(ACC)  # [K_PAD, COLS]
        if not DOT:
            mask_w = mask_w & (tl.sum((v != 0.0).to(tl.int32), 1) > 0)  # rows that no source uses are not loaded
        v += poison[:, None]
        if SPLIT:
            v_op = _split_columns(v, DTYPE, K_PAD, ACC)
        else:
            v_op = v.to(DTYPE)
    if coef_ptr is not None:
        coef = tl.load(coef_ptr + offs_s * B + b, mask=mask_s, other=0.0).to(ACC)  # [COLS]
        active = (coef != 0.0)[None, :]
    if h_ptrs is not None:
        weighted = tl.where(active, v * coef[None, :], 0.0)
        if SPLIT:
            h_op = _split_columns(weighted, DTYPE, K_PAD, ACC)
        else:
            h_op = weighted.to(DTYPE)
        list_position = tl.load(list_position_ptr + b * K + offs_k, mask=mask_k, other=0).to(tl.int64)
    acc = tl.zeros((K_PAD, 16), ACC)
    sq = tl.zeros((BLOCK_D, COLS), ACC)
    for i in tl.range(0, tiles, num_stages=STAGES):
        cols = (slab * tiles + i) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = cols < D
        w = tl.load(
            w_ptr + rows[:, None] * stride_wn + cols[None, :], mask=mask_w[:, None] & mask_d[None, :], other=0.0
        ).to(DTYPE)  # [K_PAD, BLOCK_D]
        if SUM:
            r = tl.dot(tl.trans(w), v_op, input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_D, 16]
            if SPLIT:
                e = tl.sum(tl.reshape(r, (BLOCK_D, 2, 8)), 1)
            else:
                e = r
            if bias_ptrs is not None:
                e += tl.load(bias_ptr + cols, mask=mask_d, other=0.0).to(ACC)[:, None]
            if x_ptrs is not None:
                e -= tl.load(x_ptr + b * stride_xb + cols, mask=mask_d, other=0.0).to(ACC)[:, None]
        else:
            e = tl.load(
                x_ptr + offs_s[None, :].to(tl.int64) * stride_xs + b * stride_xb + cols[:, None],
                mask=mask_s[None, :] & mask_d[:, None], other=0.0,
            ).to(ACC)  # fmt: skip  # [BLOCK_D, COLS]
        if e_ptrs is not None:
            tl.store(
                e_ptr + (offs_s[None, :] * B + b) * D + cols[:, None], e.to(e_ptr.dtype.element_ty),
                mask=mask_s[None, :] & mask_d[:, None],
            )  # fmt: skip
        if error_ptrs is not None:
            error = tl.sum(tl.where(offs_s[None, :] == error_sources, e, 0.0), 1)
            tl.store(error_ptr + b * stride_ob + cols, error.to(error_ptr.dtype.element_ty), mask=mask_d)
        if g_ptrs is not None:
            g = tl.sum(tl.where(active, coef[None, :] * e, 0.0), 1)
            tl.store(g_ptr + b * stride_ob + cols, g, mask=mask_d)
        if h_ptrs is not None:
            e_h = tl.where(active, e, 0.0).to(DTYPE)
            if SPLIT:  # both halves of the weights multiply the same errors
                e_h = tl.reshape(tl.permute(tl.join(e_h, e_h), (0, 2, 1)), (BLOCK_D, 16))
            h = tl.dot(h_op, tl.trans(e_h), input_precision=PRECISION, out_dtype=ACC)  # [K_PAD, BLOCK_D]
            tl.store(
                h_ptr + list_position[:, None] * D + cols[None, :], h.to(h_ptr.dtype.element_ty),
                mask=mask_k[:, None] & mask_d[None, :],
            )  # fmt: skip
        if sq_ptr is not None:
            sq += e * e
        if DOT:
            if SPLIT:
                e_op = _split_columns(e, DTYPE, BLOCK_D, ACC)
            else:
                e_op = e.to(DTYPE)
            acc = tl.dot(w, e_op, acc, input_precision=PRECISION, out_dtype=ACC)
    out = (slab_out * S + offs_s).to(tl.int64) * B + b
    if sq_ptr is not None:
        tl.store(sq_ptr + out, tl.sum(sq, 0), mask=mask_s)
    if DOT:
        if SPLIT:
            dot = tl.sum(tl.reshape(acc, (K_PAD, 2, 8)), 1)
        else:
            dot = acc
        dot += poison[:, None]
        if c_ptrs is not None:
            dot += tl.load(c_ptr + rows, mask=mask_w, other=0.0).to(ACC)[:, None]
            dot = tl.where(dot <= 0.0, 0.0, dot)  # NaN stays
        dot = tl.where(mask_in[:, None], dot, 0.0)  # a source that is not finite makes 0 * e NaN
        tl.store(dot_ptr + out[None, :] * K + offs_k[:, None], dot, mask=mask_s[None, :] & mask_k[:, None])


MAX_GATHERS = 8  # problems of one launch; the kernel has 3 bits for each one's error source


def slabs_of(config: GatherConfig, d: int) -> int:
    """Slabs of columns into which one launch splits a problem.

    Args:
        config: `gather_config` of the widest problem of the launch.
        d: columns of the problem.
    """
    total = cdiv(d, config.block_d)
    return cdiv(total, min(config.tiles, total))


def in_one_slab(k: int, n: int, widths, itemsize: int, arch: int) -> bool:
    """Whether `launch_gathers` runs problems of these widths in one launch without splitting their columns."""
    config = gather_config(k, max(widths), n, itemsize, arch)
    return k <= gather_chunk(itemsize, arch) and all(slabs_of(config, d) == 1 for d in widths)


def launch_gathers(
    indices, values, ws, biases, xs, *, count=None, coef=None, list_position=None, err_outs=None, error_outs=None,
    error_sources=None, dbias_rows=None, h_outs=None, sq_err=False, dot=False, latent_biases=None, values_out=None,
):  # fmt: skip
    """Run T problems of the gather kernel in one launch, into the given outputs.

    The problems have one B, k, N, S and dtype, and the same optional parts; widths and strides may differ. Outputs may
    be slices of columns (last stride 1), but those of `err_outs` and `h_outs` are contiguous, and `error_outs[t]` and
    `dbias_rows[t]` share their row stride. Where k needs chunks, or T > 8, there are several launches.

    Args:
        indices: int64 [B, k] for all problems, or [T, B, k]; may be ABSENT, except for h_outs.
        values: [S, B, k] for all problems, or [T, S, B, k]; None: E = x.
        ws: T weights [N, d_t].
        biases: T biases [d_t], or None.
        xs: T tensors [B, d_t] with values, else [S, B, d_t] or [B, d_t] for one source; or None.
        count: int32 [] for all problems, or [T]: the valid columns of indices; None: all.
        coef: [T, S, B], for dbias_rows and h_outs.
        list_position: int32 [B * k], or [T, B * k] with own indices: the row of h_out for each place.
        err_outs: T tensors [S, B, d_t], receive E.
        error_outs: T tensors [B, d_t], receive E of error_sources.
        error_sources: T sources, each problem's of error_outs.
        dbias_rows: T tensors [B, d_t], receive sum_s coef E.
        h_outs: T tensors [B * k, d_t], receive H.
        sq_err: compute |E|^2.
        dot: compute <W[I_j], E>.
        latent_biases: T biases [N], where each problem has one slab (`in_one_slab`): dots become relu(dot + bias).
        values_out: with latent_biases [T, B, k], receives them.

    Returns:
        |E|^2 [sum of slabs, S, B] and dots [sum of slabs, S, B, k], to be summed over each problem's slabs; None if not
        requested. The slabs of each problem, a tuple of T; those of problem 0 come first.
    """
    T, (B, k), (n, _) = len(ws), indices.shape[-2:], ws[0].shape
    arch, itemsize = capability(ws[0].device), ws[0].element_size()
    if T > MAX_GATHERS or k > gather_chunk(itemsize, arch):
        return _launch_gathers_apart(
            indices, values, ws, biases, xs, count=count, coef=coef, list_position=list_position, err_outs=err_outs,
            error_outs=error_outs, error_sources=error_sources, dbias_rows=dbias_rows, h_outs=h_outs, sq_err=sq_err,
            dot=dot,
        )  # fmt: skip
    device, dtype, acc = ws[0].device, ws[0].dtype, acc_dtype(ws[0].dtype)
    widths = tuple(w.shape[1] for w in ws)
    config = gather_config(k, max(widths), n, itemsize, arch)
    config = replace(config, tiles=min(config.tiles, cdiv(max(widths), config.block_d)))
    slabs = tuple(slabs_of(config, d) for d in widths)
    indices = indices.contiguous()
    ws = tuple(w if w.stride(1) == 1 else w.contiguous() for w in ws)
    if biases is not None:
        biases = tuple(bias.contiguous() for bias in biases)
    if values is not None:
        values = values.to(acc).contiguous()
    if coef is not None:
        coef = coef.to(acc).contiguous()
    if xs is not None:
        xs = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in xs)
    S = _sources(values, xs)
    sq_part = torch.empty(sum(slabs), S, B, device=device, dtype=acc) if sq_err else None
    dot_part = values_out
    if dot and latent_biases is None:
        dot_part = torch.empty(sum(slabs), S, B, k, device=device, dtype=acc)
    rows_out = error_outs or dbias_rows
    half = dtype in (torch.bfloat16, torch.float16)
    # the interpreter multiplies bf16 wrongly: there the operands stay fp32, and the low half is zero
    operand = tl.float32 if half and interpreted() else tl_dtype(dtype)
    # bandwidth-bound: tf32 would not be faster, so float32 never uses it here
    precision = "ieee" if dtype != torch.float32 else dot_precision(arch, False)
    launch(_gather_kernel, (sum(slabs) * B,))(
        indices, values, ws, biases, xs, count, coef, list_position,
        *(outs and tuple(outs) for outs in (err_outs, error_outs, dbias_rows, h_outs)), sq_part, dot_part,
        latent_biases and tuple(latent_biases),
        B, k, widths, n, tuple(w.stride(0) for w in ws),
        None if xs is None else tuple(x.stride(0) if x.dim() == 3 else 0 for x in xs),
        None if xs is None else tuple(x.stride(-2) for x in xs),
        rows_out and tuple(out.stride(0) for out in rows_out),
        0 if indices.dim() == 2 else B * k, 0 if values is None or values.dim() == 3 else S * B * k,
        0 if count is None or count.dim() == 0 else count.stride(0),
        sum(source << 3 * t for t, source in enumerate(error_sources or ())), config.tiles,
        T=T, S=S, K_PAD=config.k_pad, BLOCK_D=config.block_d, SPLIT=half,
        DTYPE=operand, ACC=tl_dtype(acc), PRECISION=precision,
        STAGES=config.num_stages, num_warps=config.num_warps, **config.registers(arch),
    )  # fmt: skip
    return sq_part, dot_part, slabs


def _sources(values, xs):
    """Number of sources: of the values, or of the xs without them."""
    if values is not None:
        return values.shape[-3]
    return xs[0].shape[0] if xs[0].dim() == 3 else 1


def _launch_gathers_apart(
    indices, values, ws, biases, xs, *, count, coef, list_position, err_outs, error_outs, error_sources, dbias_rows,
    h_outs, sq_err, dot,
):  # fmt: skip
    """Run `launch_gathers` problem by problem, in chunks where k needs them."""
    chunked = indices.shape[-1] > gather_chunk(ws[0].element_size(), capability(ws[0].device))
    parts = []
    for t in range(len(ws)):
        own = slice(t, t + 1)
        shared = dict(
            count=count if count is None or count.dim() == 0 else count[t], coef=coef if coef is None else coef[own],
            sq_err=sq_err, dot=dot,
        )  # fmt: skip
        lists = dict(
            err_outs=err_outs, error_outs=error_outs, error_sources=error_sources, dbias_rows=dbias_rows,
        )  # fmt: skip
        lists = {name: items and items[own] for name, items in lists.items()}
        run = _launch_gather_in_chunks
        if not chunked:
            run, lists["h_outs"] = launch_gathers, h_outs and h_outs[own]
            shared["list_position"] = list_position
            if list_position is not None and list_position.dim() == 2:
                shared["list_position"] = list_position[t]
        parts.append(run(
            indices if indices.dim() == 2 else indices[t], values if values is None or values.dim() == 3 else values[t],
            ws[own], biases and biases[own], xs and xs[own], **shared, **lists,
        ))  # fmt: skip
    sqs, dots, slabs = zip(*parts, strict=True)
    return torch.cat(sqs) if sq_err else None, torch.cat(dots) if dot else None, tuple(sum(slabs, ()))


def _launch_gather_in_chunks(
    indices, values, ws, biases, xs, *, count, coef, err_outs, error_outs, error_sources, dbias_rows, sq_err, dot
):  # fmt: skip
    """Run `launch_gathers` for one problem on a few of the k rows at a time, with E in memory between the launches."""
    (B, k), w = indices.shape, ws[0]
    chunk, acc = gather_chunk(w.element_size(), capability(w.device)), acc_dtype(w.dtype)
    parts = [slice(j, min(j + chunk, k)) for j in range(0, k, chunk)]
    counts = [None if count is None else (count - part.start).clamp(min=0) for part in parts]
    error = xs and xs[0]
    if values is not None:
        S, d = values.shape[0], w.shape[1]
        error = torch.zeros(S, B, d, device=w.device, dtype=acc)
        for part, left in zip(parts, counts, strict=True):
            added = torch.empty_like(error)
            launch_gathers(indices[:, part], values[..., part], ws, None, None, count=left, err_outs=[added])
            error += added
        if biases is not None:
            error += biases[0]
        if xs is not None:
            error -= xs[0]
    elif error.dim() == 2:
        error = error[None]
    if err_outs is not None:
        err_outs[0].copy_(error)
    if error_outs is not None:
        error_outs[0].copy_(error[error_sources[0]])
    if dbias_rows is not None:
        active = (coef[0] != 0)[..., None]
        dbias_rows[0].copy_(torch.where(active, coef[0][..., None] * error, 0.0).sum(0))
    dots = None
    if dot:
        dots = [
            launch_gathers(indices[:, part], None, ws, None, [error], count=left, dot=True)[1].sum(0)
            for part, left in zip(parts, counts, strict=True)
        ]
    return error.square().sum(2)[None] if sq_err else None, None if dots is None else torch.cat(dots, 2)[None], (1,)


def _sum_slabs(part):
    return part[0] if part.shape[0] == 1 else part.sum(0)


# gather_dot: out[s, b, j] = <W[indices[b, j]], x[s, b]>; 0 in columns from `count` on and for ABSENT


def _gather_dot_triton(indices, w, x, count):
    return _sum_slabs(launch_gathers(indices, None, [w], None, [x], count=count, dot=True)[1])


def gather_dot_torch(indices, w, x, count):
    """Run `gather_dot` in torch.

    Args:
        indices: int64 [B, k]; the dot of ABSENT is 0.
        w: [N, d].
        x: [S, B, d].
        count: int32 [], the valid columns of indices; None: all.

    Returns:
        [S, B, k] in the accumulator dtype.
    """
    S, B, d = x.shape
    k = indices.shape[1]
    acc = acc_dtype(w.dtype)
    if count is not None:
        if not is_host_readable(count):
            mask = torch.arange(k, device=w.device) < count
            return torch.where(mask, gather_dot_torch(indices, w, x, None), 0.0)
        n_valid = min(k, int(count))
        out = w.new_zeros(S, B, k, dtype=acc)
        if n_valid:
            out[:, :, :n_valid] = gather_dot_torch(indices[:, :n_valid].contiguous(), w, x, None)
        return out
    present, partly = presence(indices)
    if w.device.type == "cpu" and w.dtype in (torch.float32, torch.float64):
        # a sampled product reads each selected row once; bmm would first copy all B * k of them
        if partly and is_host_readable(present):
            offsets, columns = _ends(present.sum(1).repeat(S)), indices[present].repeat(S)
        else:
            offsets = torch.arange(0, S * B * k + 1, k, device=w.device)
            columns = (torch.where(present, indices, 0) if partly else indices).expand(S, B, k).reshape(-1)
        pattern = csr(offsets, columns, w.new_zeros(len(columns)), w.shape[0])
        dots = torch.sparse.sampled_addmm(pattern, x.reshape(-1, d), w.T, beta=0.0).values()
        if partly and is_host_readable(present):
            return dots.new_zeros(S, B, k).masked_scatter_(present.expand(S, B, k), dots)
        dots = dots.view(S, B, k)
        return torch.where(present, dots, 0.0) if partly else dots
    out, indices = torch.empty(S, B, k, device=w.device, dtype=acc), torch.where(present, indices, 0)
    for part in _row_chunks(B, k, d):
        out[:, part] = torch.einsum("bkd,sbd->sbk", w[indices[part]].to(acc), x[:, part].to(acc))
    return out.masked_fill_(~present, 0.0)


def presence(indices):
    """Return which ids are not ABSENT, and whether some may be, which only a CPU can tell without a wait.

    Args:
        indices: int64.
    """
    present = indices != ABSENT
    return present, not (is_host_readable(indices) and bool(present.all()))


def _ends(counts):
    """Offsets [rows + 1] of rows that have so many entries."""
    return F.pad(counts.cumsum(0), (1, 0))


def _row_chunks(B, k, d):
    """Slices of the batch whose k gathered rows of d columns fit in memory."""
    rows = max(1, 2**24 // (k * d))
    return [slice(b, b + rows) for b in range(0, B, rows)]


def _gather_dot_fake(indices, w, x, count):
    return w.new_empty(x.shape[0], *indices.shape, dtype=acc_dtype(w.dtype))


gather_dot = register(
    "gather_dot",
    "(Tensor indices, Tensor w, Tensor x, Tensor? count, str impl) -> Tensor",
    torch_impl=gather_dot_torch,
    triton_impl=_gather_dot_triton,
    fake=_gather_dot_fake,
)


# gather_sum: out[s, b] = sum_j values[s, b, j] W[indices[b, j]] + bias


def _gather_sum_triton(indices, values, w, bias, wide):
    out = _gather_sum_fake(indices, values, w, bias, wide)
    launch_gathers(indices, values, [w], None if bias is None else [bias], None, err_outs=[out])
    return out


def gather_sum_torch(indices, values, w, bias, wide=False):
    """Run `gather_sum` in torch; see there for the arguments."""
    S, B, k = values.shape
    acc, (present, partly) = acc_dtype(w.dtype), presence(indices)
    if wide and w.dtype != acc:  # a bag rounds its sum to w's dtype
        sums = torch.empty(S, B, w.shape[1], device=w.device, dtype=acc)
        values, safe = torch.where(present, values.to(acc), 0.0), torch.where(present, indices, 0)
        for part in _row_chunks(B, k, w.shape[1]):
            rows = torch.where(present[part, :, None], w[safe[part]].to(acc), 0.0)
            sums[:, part] = torch.einsum("sbk,bkd->sbd", values[:, part], rows)
        return sums if bias is None else sums.add_(bias)
    weights, offsets = values.to(w.dtype), None
    if not partly:
        bags, weights = indices.expand(S, B, k).reshape(-1, k), weights.reshape(-1, k)
    elif is_host_readable(present):
        offsets = _ends(present.sum(1).repeat(S))
        bags, weights = indices[present].repeat(S), weights.masked_select(present)
    else:  # absent entries come last, in a bag of their own
        order = present.byte().repeat(S, 1).flatten().argsort(descending=True, stable=True)
        bags, weights = torch.where(present, indices, 0).repeat(S, 1).flatten()[order], weights.flatten()[order]
        offsets = F.pad(_ends(present.sum(1).repeat(S)), (0, 1), value=S * B * k)
    sums = F.embedding_bag(
        bags, w.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=offsets is not None
    )
    sums = sums[: S * B].view(S, B, -1)
    return sums if bias is None else sums.add_(bias)


def _gather_sum_fake(indices, values, w, bias, wide):
    dtype = acc_dtype(w.dtype) if wide else w.dtype
    return w.new_empty(values.shape[0], indices.shape[0], w.shape[1], dtype=dtype)


gather_sum = register(
    "gather_sum",
    "(Tensor indices, Tensor values, Tensor w, Tensor? bias, bool wide, str impl) -> Tensor",
    torch_impl=gather_sum_torch,
    triton_impl=_gather_sum_triton,
    fake=_gather_sum_fake,
)
gather_sum.__doc__ = """Sum the selected rows of w, weighted by the values of each source, and add the bias.

Args:
    indices: int64 [B, k]; ABSENT adds nothing.
    values: [S, B, k].
    w: [N, d].
    bias: [d], or None.
    wide: return the sums in the accumulator dtype, for sums over shards.
    impl: "triton" or "torch".

Returns:
    [S, B, d] in w's dtype, or in the accumulator dtype.
"""


# gather_errors: |E|^2 of every source and E of one, where E[t, s, b] = gather_sum - xs[t][b]


NO_ERROR, ALL_ERRORS = -1, -2  # in place of the source whose E is returned


def _gather_errors_triton(*, indices, values, ws, biases, xs, keep, count):
    errors = [w.new_empty(x.shape if keep else (0,)) for w, x in zip(ws, xs, strict=True)]
    parts, _, slabs = launch_gathers(
        indices, values, ws, biases, xs, count=count, error_outs=errors if keep else None,
        error_sources=keep or None, sq_err=True,
    )  # fmt: skip
    _, S, B = parts.shape
    if len(set(slabs)) == 1:  # of like widths
        return _sum_targets(parts.view(len(ws), slabs[0], S, B)), errors
    return torch.stack([_sum_slabs(part) for part in parts.split(slabs)]), errors


def _sum_targets(parts):
    return parts[:, 0] if parts.shape[1] == 1 else parts.sum(1)


def _gather_errors_torch(*, indices, values, ws, biases, xs, keep, count):
    sqs, errors = [], []
    for t, (w, x) in enumerate(zip(ws, xs, strict=True)):
        idx, v = (indices, values) if indices.dim() == 2 else (indices[t], values[t])
        e = gather_sum_torch(idx, v, w, biases[t]).sub_(x)
        sqs.append(e.to(acc_dtype(w.dtype)).square().sum(2))
        errors.append(e[keep[t]].clone() if keep else w.new_empty(0))
    return torch.stack(sqs), errors


def _gather_errors_fake(*, indices, values, ws, biases, xs, keep, count):
    sq = values.new_empty(len(ws), values.shape[-3], xs[0].shape[0], dtype=acc_dtype(ws[0].dtype))
    return sq, [w.new_empty(x.shape if keep else (0,)) for w, x in zip(ws, xs, strict=True)]


gather_errors = register(
    "gather_errors",
    "(Tensor indices, Tensor values, Tensor[] ws, Tensor[] biases, Tensor[] xs, int[] keep, Tensor? count, str impl)"
    " -> (Tensor, Tensor[])",
    torch_impl=_gather_errors_torch,
    triton_impl=_gather_errors_triton,
    fake=_gather_errors_fake,
)
gather_errors.__doc__ = """Compute the errors of T targets' reconstructions from every source.

E[t, s, b] = sum_j values[s, b, j] ws[t][indices[b, j]] + biases[t] - xs[t][b]

Args:
    indices: int64 [B, k] for all targets, or [T, B, k]: a target has codes of its own.
    values: [S, B, k], or [T, S, B, k].
    ws: T tensors [N, d_t].
    biases: T tensors [d_t].
    xs: T tensors [B, d_t].
    keep: the source whose E is returned, for each target; or empty.
    count: int32 [], or [T] with own codes: the valid columns of indices (all when None); values beyond must be zero.
    impl: "triton" or "torch".

Returns:
    |E|^2 [T, S, B] in the accumulator dtype; for each target E [B, d_t] of one source in w's dtype, or empty.
"""
