"""Gather kernels: what a row's k selected weight rows make of it.

One kernel serves four uses. A program takes one row b, fetches the k selected rows of W tile by tile, and while a tile
is on the chip uses it for every source s at once:

    R[s] = sum_j v[s, j] W[I_j]          (SUM)         a reconstruction, or the gradient of an encoder's input
    E[s] = R[s] + bias - x               (with x)      the error of that reconstruction
    sq[s] = |E[s]|^2                     (SQ)          its square norm
    dot[s, j] = <W[I_j], E[s]>           (DOT)         pre-activations, or the gradient of the values

Both contractions are matrix products with W as the first operand and the sources, padded to 16, as columns. For half
precision weights, columns 0-7 carry the high half of v or E and columns 8-15 the low half, so that nothing is lost
beside the rounding of W itself. Programs of one column slab run next to each other: the slab of W stays in L2.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F

from ._launch import capability, cdiv, gather_chunk, gather_config
from ._ops import acc_dtype, register
from ._triton import INTERPRETED, tl, tl_dtype, triton


@triton.jit
def _split_columns(x, DTYPE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """[ROWS, 8] -> [ROWS, 16] in DTYPE: the rounded values, then what rounding lost."""
    high = x.to(DTYPE)
    low = (x - high.to(ACC)).to(DTYPE)
    return tl.reshape(tl.permute(tl.join(high, low), (0, 2, 1)), (ROWS, 16))


@triton.jit(do_not_specialize=["stored", "tiles"])
def _gather_kernel(
    idx_ptr, v_ptr, w_ptr, bias_ptr, x_ptr, e_ptr, sq_ptr, dot_ptr,
    B, K, D, N, stride_wn, stride_xs, stride_xb, stored, tiles,
    S: tl.constexpr, K_PAD: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_X: tl.constexpr, STORE: tl.constexpr, SQ: tl.constexpr, DOT: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """STORE 1 writes E of every source to [S, B, D], STORE 2 only that of source `stored` to [B, D]."""
    pid = tl.program_id(0)
    slab = pid // B  # slow axis
    b = (pid % B).to(tl.int64)
    COLS: tl.constexpr = 8 if SPLIT else 16
    offs_k = tl.arange(0, K_PAD)
    offs_s = tl.arange(0, COLS)
    mask_k = offs_k < K
    mask_s = offs_s < S
    rows = tl.load(idx_ptr + b * K + offs_k, mask=mask_k, other=0).to(tl.int64)
    inside = (rows >= 0) & (rows < N)  # anything else reads nothing and poisons the result
    mask_w = mask_k & inside
    poison = tl.where(mask_k & (inside == 0), float("nan"), 0.0).to(ACC)
    if SUM:
        v = tl.load(
            v_ptr + (offs_s[None, :] * B + b) * K + offs_k[:, None], mask=mask_s[None, :] & mask_k[:, None], other=0.0
        ).to(ACC)  # [K_PAD, COLS]
        if not DOT:
            mask_w = mask_w & (tl.sum((v != 0.0).to(tl.int32), 1) > 0)  # rows that no source uses cost no traffic
        v += poison[:, None]
        if SPLIT:
            v_op = _split_columns(v, DTYPE, K_PAD, ACC)
        else:
            v_op = v.to(DTYPE)
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
            if HAS_BIAS:
                e += tl.load(bias_ptr + cols, mask=mask_d, other=0.0).to(ACC)[:, None]
            if HAS_X:
                e -= tl.load(x_ptr + b * stride_xb + cols, mask=mask_d, other=0.0).to(ACC)[:, None]
        else:
            e = tl.load(
                x_ptr + offs_s[None, :].to(tl.int64) * stride_xs + b * stride_xb + cols[:, None],
                mask=mask_s[None, :] & mask_d[:, None], other=0.0,
            ).to(ACC)  # fmt: skip  # [BLOCK_D, COLS]
        if STORE == 1:
            tl.store(
                e_ptr + (offs_s[None, :] * B + b) * D + cols[:, None], e.to(e_ptr.dtype.element_ty),
                mask=mask_s[None, :] & mask_d[:, None],
            )  # fmt: skip
        if STORE == 2:
            one = tl.sum(tl.where(offs_s[None, :] == stored, e, 0.0), 1)
            tl.store(e_ptr + b * D + cols, one.to(e_ptr.dtype.element_ty), mask=mask_d)
        if SQ:
            sq += e * e
        if DOT:
            if SPLIT:
                e_op = _split_columns(e, DTYPE, BLOCK_D, ACC)
            else:
                e_op = e.to(DTYPE)
            acc = tl.dot(w, e_op, acc, input_precision=PRECISION, out_dtype=ACC)
    out = (slab * S + offs_s).to(tl.int64) * B + b
    if SQ:
        tl.store(sq_ptr + out, tl.sum(sq, 0), mask=mask_s)
    if DOT:
        if SPLIT:
            dot = tl.sum(tl.reshape(acc, (K_PAD, 2, 8)), 1)
        else:
            dot = acc
        dot += poison[:, None]
        tl.store(dot_ptr + out[None, :] * K + offs_k[:, None], dot, mask=mask_s[None, :] & mask_k[:, None])


def _launch_gather(indices, values, w, bias, x, *, store=0, stored=0, sq=False, dot=False, out_dtype=None):
    """Runs the kernel; returns (E or None, sq [S, B] or None, dot [S, B, k] or None)."""
    B, k = indices.shape
    n, d = w.shape
    acc = acc_dtype(w.dtype)
    if k > gather_chunk(w.element_size()):
        return _launch_gather_in_chunks(
            indices, values, w, bias, x, store=store, stored=stored, sq=sq, dot=dot, out_dtype=out_dtype
        )
    device = w.device
    S = values.shape[0] if values is not None else x.shape[0]
    config = gather_config(k, d, n, w.element_size(), capability(device))
    slabs = cdiv(d, config.block_d * config.tiles)
    indices = indices.contiguous()
    bias = bias.contiguous() if bias is not None else None
    w = w if w.stride(1) == 1 else w.contiguous()
    if values is not None:
        values = values.to(acc).contiguous()
    if x is not None and x.stride(-1) != 1:
        x = x.contiguous()
    shape = (S, B, d) if store == 1 else (B, d) if store == 2 else (0,)
    e = torch.empty(shape, device=device, dtype=out_dtype or w.dtype)
    sq_part = torch.empty((slabs, S, B) if sq else (0,), device=device, dtype=acc)
    dot_part = torch.empty((slabs, S, B, k) if dot else (0,), device=device, dtype=acc)
    half = w.dtype in (torch.bfloat16, torch.float16)
    # the interpreter multiplies bf16 wrongly: there the operands stay fp32, and the low half is zero
    operand = tl.float32 if half and INTERPRETED else tl_dtype(w.dtype)
    _gather_kernel[(slabs * B,)](
        indices, values, w, bias, x, e, sq_part, dot_part,
        B, k, d, n, w.stride(0),
        x.stride(0) if x is not None and x.dim() == 3 else 0, x.stride(-2) if x is not None else 0,
        stored, config.tiles,
        S=S, K_PAD=config.k_pad, BLOCK_D=config.block_d, SUM=values is not None,
        HAS_BIAS=bias is not None, HAS_X=x is not None, STORE=store, SQ=sq, DOT=dot, SPLIT=half,
        DTYPE=operand, ACC=tl_dtype(acc), PRECISION="ieee" if half or acc == torch.float64 else "tf32x3",
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return (
        e if store else None,
        (sq_part[0] if slabs == 1 else sq_part.sum(0)) if sq else None,
        (dot_part[0] if slabs == 1 else dot_part.sum(0)) if dot else None,
    )


def _launch_gather_in_chunks(indices, values, w, bias, x, *, store, stored, sq, dot, out_dtype):
    """The same, a few of the k rows at a time, with E in memory between the launches."""
    chunk = gather_chunk(w.element_size())
    parts = [slice(j, j + chunk) for j in range(0, indices.shape[1], chunk)]
    e = x
    if values is not None:
        acc = acc_dtype(w.dtype)
        e = torch.zeros((), device=w.device, dtype=acc)
        for part in parts:
            e = e + _launch_gather(indices[:, part], values[..., part], w, None, None, store=1, out_dtype=acc)[0]
        if bias is not None:
            e = e + bias
        if x is not None:
            e = e - x
    kept = None if not store else (e if store == 1 else e[stored]).to(out_dtype or w.dtype)
    dots = [_launch_gather(indices[:, part], None, w, None, e, dot=True)[2] for part in parts] if dot else None
    return kept, e.square().sum(2) if sq else None, torch.cat(dots, 2) if dot else None


# gather_dot: out[s, b, j] = <W[indices[b, j]], x[s, b]>


def _gather_dot_triton(indices, w, x):
    return _launch_gather(indices, None, w, None, x, dot=True)[2]


@functools.cache
def _hear_beta_warning():
    """sampled_addmm needs a CSR pattern; torch warns once that the format is beta, which is no news to our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _gather_dot_torch(indices, w, x):
    S, B, d = x.shape
    k = indices.shape[1]
    acc = acc_dtype(w.dtype)
    if w.device.type == "cpu" and w.dtype in (torch.float32, torch.float64):
        # a sampled product reads each selected row once, where bmm would first copy all B * k of them
        _hear_beta_warning()
        crow = torch.arange(0, B * k + 1, k)
        pattern = torch.sparse_csr_tensor(
            crow, indices.reshape(-1), w.new_zeros(B * k), (B, w.shape[0]), check_invariants=False
        )
        dots = [torch.sparse.sampled_addmm(pattern, x_s, w.T, beta=0.0).values().view(B, k) for x_s in x]
        return torch.stack(dots)
    out = torch.empty(S, B, k, device=w.device, dtype=acc)
    for rows in torch.arange(B, device="cpu").split(max(1, 2**24 // (k * d))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        out[:, part] = torch.einsum("bkd,sbd->sbk", w[indices[part]].to(acc), x[:, part].to(acc))
    return out


def _gather_dot_fake(indices, w, x):
    return w.new_empty(x.shape[0], *indices.shape, dtype=acc_dtype(w.dtype))


gather_dot = register(
    "gather_dot",
    "(Tensor indices, Tensor w, Tensor x, str impl) -> Tensor",
    torch_impl=_gather_dot_torch,
    triton_impl=_gather_dot_triton,
    fake=_gather_dot_fake,
)


# gather_sum: out[s, b] = sum_j values[s, b, j] W[indices[b, j]] + bias


def _gather_sum_triton(indices, values, w, bias):
    return _launch_gather(indices, values, w, bias, None, store=1)[0]


def _gather_sum_torch(indices, values, w, bias):
    w = w.contiguous()
    sums = torch.stack([F.embedding_bag(indices, w, mode="sum", per_sample_weights=v.to(w.dtype)) for v in values])
    return sums if bias is None else sums.add_(bias)


def _gather_sum_fake(indices, values, w, bias):
    return w.new_empty(values.shape[0], indices.shape[0], w.shape[1])


gather_sum = register(
    "gather_sum",
    "(Tensor indices, Tensor values, Tensor w, Tensor? bias, str impl) -> Tensor",
    torch_impl=_gather_sum_torch,
    triton_impl=_gather_sum_triton,
    fake=_gather_sum_fake,
)


# gather_error: E[s, b] = gather_sum - x[b]; its square norms, and what is asked for of E and <W, E>


KEEP_NONE, KEEP_ALL = -2, -1  # which E to return; else the number of one source


def _gather_error_triton(indices, values, w, bias, x, keep, dot):
    store = 0 if keep == KEEP_NONE else 1 if keep == KEEP_ALL else 2
    e, sq, dots = _launch_gather(indices, values, w, bias, x, store=store, stored=max(keep, 0), sq=True, dot=dot)
    return sq, w.new_empty(0) if e is None else e, sq.new_empty(0) if dots is None else dots


def _gather_error_torch(indices, values, w, bias, x, keep, dot):
    acc = acc_dtype(w.dtype)
    e = _gather_sum_torch(indices, values, w, bias).sub_(x)
    sq = e.to(acc).square().sum(2)
    dots = _gather_dot_torch(indices, w, e) if dot else w.new_empty(0, dtype=acc)
    kept = w.new_empty(0) if keep == KEEP_NONE else e if keep == KEEP_ALL else e[keep].clone()
    return sq, kept, dots


def _gather_error_fake(indices, values, w, bias, x, keep, dot):
    acc = acc_dtype(w.dtype)
    S, (B, d) = values.shape[0], x.shape
    kept = (0,) if keep == KEEP_NONE else (S, B, d) if keep == KEEP_ALL else (B, d)
    return (
        w.new_empty(S, B, dtype=acc),
        w.new_empty(kept),
        w.new_empty((S, *indices.shape) if dot else (0,), dtype=acc),
    )


gather_error = register(
    "gather_error",
    "(Tensor indices, Tensor values, Tensor w, Tensor bias, Tensor x, int keep, bool dot, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    torch_impl=_gather_error_torch,
    triton_impl=_gather_error_triton,
    fake=_gather_error_fake,
)
gather_error.__doc__ = """Errors of one target's reconstructions from every source, in one pass over the gathered rows.

E[s, b] = sum_j values[s, b, j] W[indices[b, j]] + bias - x[b]

Args:
    indices: int64 [B, k].  values: [S, B, k].  w: [N, d].  bias: [d].  x: [B, d].
    keep: which E to return: KEEP_NONE, KEEP_ALL ([S, B, d]), or a source's number ([B, d]).
    dot: whether to return <W[indices], E>, [S, B, k].
    impl: "triton" or "torch".

Returns: |E|^2 [S, B] in the accumulator dtype, the kept E in w's dtype, the dots in the accumulator dtype.
"""
