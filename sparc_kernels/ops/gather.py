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

import torch
import torch.nn.functional as F

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, csr, is_host_readable
from ..core.plan import launch
from ..core.registry import register
from ..core.target import interpreted
from ..launch.device import capability, cdiv, dot_precision
from ..launch.gather import gather_chunk, gather_config


@triton.jit
def _split_columns(x, DTYPE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """[ROWS, 8] -> [ROWS, 16] in DTYPE: the rounded values, then the rounding errors."""
    high = x.to(DTYPE)
    low = (x - high.to(ACC)).to(DTYPE)
    return tl.reshape(tl.permute(tl.join(high, low), (0, 2, 1)), (ROWS, 16))


@triton.jit(do_not_specialize=["error_source", "tiles"])
def _gather_kernel(
    idx_ptr, v_ptr, w_ptr, bias_ptr, x_ptr, count_ptr, coef_ptr, list_position_ptr,
    e_ptr, error_ptr, g_ptr, h_ptr, sq_ptr, dot_ptr,
    B, K, D, N, stride_wn, stride_xs, stride_xb, stride_ob, error_source, tiles,
    S: tl.constexpr, K_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every pointer but idx and w is optional; a None input or output is compiled out.

    Inputs: v (without it E = x), bias, x, count (None: all K columns are valid). Outputs: e [S, B, D]; error [B, D] =
    e[error_source]; g [B, D] = sum_s coef_s e_s; h [B * K, D], whose row list_position[p] is sum_s coef_s v_s e_s of
    place p; sq [slabs, S, B]; dot [slabs, S, B, K]. Sources with coef 0 are excluded from g and h, even if their errors
    are not finite.
    """
    SUM: tl.constexpr = v_ptr is not None
    DOT: tl.constexpr = dot_ptr is not None
    pid = tl.program_id(0)
    slab = pid // B  # slow axis
    b = (pid % B).to(tl.int64)
    COLS: tl.constexpr = 8 if SPLIT else 16
    offs_k = tl.arange(0, K_PAD)
    offs_s = tl.arange(0, COLS)
    mask_k = offs_k < K
    mask_s = offs_s < S
    mask_in = mask_k
    if count_ptr is not None:
        mask_in = mask_k & (offs_k < tl.load(count_ptr))
    rows = tl.load(idx_ptr + b * K + offs_k, mask=mask_k, other=0).to(tl.int64)
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
    if h_ptr is not None:
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
            if bias_ptr is not None:
                e += tl.load(bias_ptr + cols, mask=mask_d, other=0.0).to(ACC)[:, None]
            if x_ptr is not None:
                e -= tl.load(x_ptr + b * stride_xb + cols, mask=mask_d, other=0.0).to(ACC)[:, None]
        else:
            e = tl.load(
                x_ptr + offs_s[None, :].to(tl.int64) * stride_xs + b * stride_xb + cols[:, None],
                mask=mask_s[None, :] & mask_d[:, None], other=0.0,
            ).to(ACC)  # fmt: skip  # [BLOCK_D, COLS]
        if e_ptr is not None:
            tl.store(
                e_ptr + (offs_s[None, :] * B + b) * D + cols[:, None], e.to(e_ptr.dtype.element_ty),
                mask=mask_s[None, :] & mask_d[:, None],
            )  # fmt: skip
        if error_ptr is not None:
            error = tl.sum(tl.where(offs_s[None, :] == error_source, e, 0.0), 1)
            tl.store(error_ptr + b * stride_ob + cols, error.to(error_ptr.dtype.element_ty), mask=mask_d)
        if g_ptr is not None:
            g = tl.sum(tl.where(active, coef[None, :] * e, 0.0), 1)
            tl.store(g_ptr + b * stride_ob + cols, g, mask=mask_d)
        if h_ptr is not None:
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
    out = (slab * S + offs_s).to(tl.int64) * B + b
    if sq_ptr is not None:
        tl.store(sq_ptr + out, tl.sum(sq, 0), mask=mask_s)
    if DOT:
        if SPLIT:
            dot = tl.sum(tl.reshape(acc, (K_PAD, 2, 8)), 1)
        else:
            dot = acc
        dot += poison[:, None]
        tl.store(dot_ptr + out[None, :] * K + offs_k[:, None], dot, mask=mask_s[None, :] & mask_k[:, None])


def launch_gather(
    indices, values, w, bias, x, *, count=None, coef=None, list_position=None, err_out=None, error_out=None,
    error_source=0, dbias_rows=None, h_out=None, sq_err=False, dot=False,
):  # fmt: skip
    """Run the gather kernel into the given outputs.

    Outputs may be slices of columns (last stride 1), but `err_out` and `h_out` are contiguous, and `error_out` and
    `dbias_rows` share their row stride.

    Args:
        indices: int64 [B, k].
        values: [S, B, k]; None: E = x.
        w: [N, d].
        bias: [d], or None.
        x: [B, d] with values, else [S, B, d]; or None.
        count: int32 [], the valid columns of indices; None: all.
        coef: [S, B], for dbias_rows and h_out.
        list_position: int32 [B * k], the row of h_out for each place.
        err_out: [S, B, d], receives E.
        error_out: [B, d], receives E of error_source.
        error_source: source of error_out.
        dbias_rows: [B, d], receives sum_s coef E.
        h_out: [B * k, d], receives H.
        sq_err: compute |E|^2.
        dot: compute <W[I_j], E>.

    Returns:
        |E|^2 [slabs, S, B] and dots [slabs, S, B, k], to be summed over slabs; None if not requested.
    """
    B, k = indices.shape
    n, d = w.shape
    acc = acc_dtype(w.dtype)
    if k > gather_chunk(w.element_size(), capability(w.device)):
        return _launch_gather_in_chunks(
            indices, values, w, bias, x, count=count, coef=coef, err_out=err_out, error_out=error_out,
            error_source=error_source, dbias_rows=dbias_rows, sq_err=sq_err, dot=dot,
        )  # fmt: skip
    device = w.device
    S = values.shape[0] if values is not None else x.shape[0]
    config = gather_config(k, d, n, w.element_size(), capability(device))
    slabs = cdiv(d, config.block_d * config.tiles)
    indices = indices.contiguous()
    w = w if w.stride(1) == 1 else w.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if values is not None:
        values = values.to(acc).contiguous()
    if coef is not None:
        coef = coef.to(acc).contiguous()
    if x is not None and x.stride(-1) != 1:
        x = x.contiguous()
    sq_part = torch.empty(slabs, S, B, device=device, dtype=acc) if sq_err else None
    dot_part = torch.empty(slabs, S, B, k, device=device, dtype=acc) if dot else None
    half = w.dtype in (torch.bfloat16, torch.float16)
    # the interpreter multiplies bf16 wrongly: there the operands stay fp32, and the low half is zero
    operand = tl.float32 if half and interpreted() else tl_dtype(w.dtype)
    # bandwidth-bound: tf32 would not be faster, so float32 never uses it here
    precision = "ieee" if w.dtype != torch.float32 else dot_precision(capability(device), False)
    launch(_gather_kernel, (slabs * B,))(
        indices, values, w, bias, x, count, coef, list_position, err_out, error_out, dbias_rows, h_out,
        sq_part, dot_part,
        B, k, d, n, w.stride(0),
        x.stride(0) if x is not None and x.dim() == 3 else 0, x.stride(-2) if x is not None else 0,
        next((t.stride(0) for t in (error_out, dbias_rows) if t is not None), 0), error_source, config.tiles,
        S=S, K_PAD=config.k_pad, BLOCK_D=config.block_d, SPLIT=half,
        DTYPE=operand, ACC=tl_dtype(acc), PRECISION=precision,
        STAGES=config.num_stages, num_warps=config.num_warps, **config.registers(capability(device)),
    )  # fmt: skip
    return sq_part, dot_part


def _launch_gather_in_chunks(
    indices, values, w, bias, x, *, count, coef, err_out, error_out, error_source, dbias_rows, sq_err, dot
):  # fmt: skip
    """Run `launch_gather` on a few of the k rows at a time, with E in memory between the launches."""
    (B, k), chunk, acc = indices.shape, gather_chunk(w.element_size(), capability(w.device)), acc_dtype(w.dtype)
    parts = [slice(j, min(j + chunk, k)) for j in range(0, k, chunk)]
    counts = [None if count is None else (count - part.start).clamp(min=0) for part in parts]
    error = x
    if values is not None:
        S, d = values.shape[0], w.shape[1]
        error = torch.zeros(S, B, d, device=w.device, dtype=acc)
        for part, left in zip(parts, counts, strict=True):
            added = torch.empty_like(error)
            launch_gather(indices[:, part], values[..., part], w, None, None, count=left, err_out=added)
            error += added
        if bias is not None:
            error += bias
        if x is not None:
            error -= x
    if err_out is not None:
        err_out.copy_(error)
    if error_out is not None:
        error_out.copy_(error[error_source])
    if dbias_rows is not None:
        active = (coef != 0)[..., None]
        dbias_rows.copy_(torch.where(active, coef[..., None] * error, 0.0).sum(0))
    dots = None
    if dot:
        dots = [
            launch_gather(indices[:, part], None, w, None, error, count=left, dot=True)[1].sum(0)
            for part, left in zip(parts, counts, strict=True)
        ]
    return error.square().sum(2)[None] if sq_err else None, None if dots is None else torch.cat(dots, 2)[None]


def _sum_slabs(part):
    return part[0] if part.shape[0] == 1 else part.sum(0)


# gather_dot: out[s, b, j] = <W[indices[b, j]], x[s, b]>; 0 in columns from `count` on


def _gather_dot_triton(indices, w, x, count):
    return _sum_slabs(launch_gather(indices, None, w, None, x, count=count, dot=True)[1])


def gather_dot_torch(indices, w, x, count):
    """Run `gather_dot` in torch.

    Args:
        indices: int64 [B, k].
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
    if w.device.type == "cpu" and w.dtype in (torch.float32, torch.float64):
        # a sampled product reads each selected row once; bmm would first copy all B * k of them
        offsets = torch.arange(0, S * B * k + 1, k, device=w.device)
        columns = indices.expand(S, B, k).reshape(-1)
        pattern = csr(offsets, columns, w.new_zeros(S * B * k), w.shape[0])
        return torch.sparse.sampled_addmm(pattern, x.reshape(-1, d), w.T, beta=0.0).values().view(S, B, k)
    out = torch.empty(S, B, k, device=w.device, dtype=acc)
    rows = max(1, 2**24 // (k * d))
    for b in range(0, B, rows):
        part = slice(b, b + rows)
        out[:, part] = torch.einsum("bkd,sbd->sbk", w[indices[part]].to(acc), x[:, part].to(acc))
    return out


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


def _gather_sum_triton(indices, values, w, bias):
    out = w.new_empty(values.shape[0], indices.shape[0], w.shape[1])
    launch_gather(indices, values, w, bias, None, err_out=out)
    return out


def gather_sum_torch(indices, values, w, bias):
    """Run `gather_sum` in torch.

    Args:
        indices: int64 [B, k].
        values: [S, B, k].
        w: [N, d].
        bias: [d], or None.

    Returns:
        [S, B, d] in w's dtype.
    """
    S, B, k = values.shape
    bags, weights = indices.expand(S, B, k).reshape(-1, k), values.reshape(-1, k).to(w.dtype)
    sums = F.embedding_bag(bags, w.contiguous(), mode="sum", per_sample_weights=weights).view(S, B, -1)
    return sums if bias is None else sums.add_(bias)


def _gather_sum_fake(indices, values, w, bias):
    return w.new_empty(values.shape[0], indices.shape[0], w.shape[1])


gather_sum = register(
    "gather_sum",
    "(Tensor indices, Tensor values, Tensor w, Tensor? bias, str impl) -> Tensor",
    torch_impl=gather_sum_torch,
    triton_impl=_gather_sum_triton,
    fake=_gather_sum_fake,
)


# gather_error: |E|^2 of every source and E of one, where E[s, b] = gather_sum - x[b]


NO_ERROR, ALL_ERRORS = -1, -2  # in place of the source whose E is returned


def _gather_error_triton(*, indices, values, w, bias, x, keep, count):
    error_out = w.new_empty(x.shape if keep != NO_ERROR else (0,))
    sq, _ = launch_gather(
        indices, values, w, bias, x, count=count, error_out=error_out if keep != NO_ERROR else None,
        error_source=max(keep, 0), sq_err=True,
    )  # fmt: skip
    return _sum_slabs(sq), error_out


def _gather_error_torch(*, indices, values, w, bias, x, keep, count):
    e = gather_sum_torch(indices, values, w, bias).sub_(x)
    return e.to(acc_dtype(w.dtype)).square().sum(2), w.new_empty(0) if keep == NO_ERROR else e[keep].clone()


def _gather_error_fake(*, indices, values, w, bias, x, keep, count):
    sq = w.new_empty(values.shape[0], x.shape[0], dtype=acc_dtype(w.dtype))
    return sq, w.new_empty(x.shape if keep != NO_ERROR else (0,))


gather_error = register(
    "gather_error",
    "(Tensor indices, Tensor values, Tensor w, Tensor bias, Tensor x, int keep, Tensor? count, str impl)"
    " -> (Tensor, Tensor)",
    torch_impl=_gather_error_torch,
    triton_impl=_gather_error_triton,
    fake=_gather_error_fake,
)
gather_error.__doc__ = """Compute the errors of one target's reconstructions from every source.

E[s, b] = sum_j values[s, b, j] W[indices[b, j]] + bias - x[b]

Args:
    indices: int64 [B, k].
    values: [S, B, k].
    w: [N, d].
    bias: [d].
    x: [B, d].
    keep: source whose E is returned, or NO_ERROR.
    count: int32 [], the valid columns of indices (all when None); values beyond it must be zero.
    impl: "triton" or "torch".

Returns:
    |E|^2 [S, B] in the accumulator dtype; E [B, d] of one source in w's dtype (empty for NO_ERROR).
"""
