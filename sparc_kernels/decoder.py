"""Decoder: reconstructions across streams, and their normalised errors without ever keeping one.

For a target t every source uses the same gathered rows of W_dec_t, so one pass serves all of them: errors, losses, the
gradient of the values and what the weights' gradient needs. Nothing of size [S, S, B, d] outlives a call.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._checks import check_indices, check_inverse, check_same_length, check_tensor, require
from ._launch import (
    MAX_K,
    MAX_STREAMS,
    SCRATCH_BYTES,
    SPREAD_COLUMNS,
    SPREAD_SOURCES,
    cdiv,
    gather_chunk,
)
from ._ops import acc_dtype, register, resolve_impl
from ._triton import tl, triton
from .gather import KEEP_NONE, gather_dot, gather_dot_torch, gather_error, gather_sum, gather_sum_torch, launch_gather
from .latent_grads import (
    NO_INVERSE,
    InverseIndex,
    inverse_index,
    inverse_sizes,
    latent_reduce,
    launch_reduce,
    reduce_torch,
)


def _per_source(op, indices, sources):
    """op(indices [B, k], sources [S, B, ...]), called once when the sources share indices, else source by source."""
    if indices.dim() == 2:
        return op(indices, sources)
    return torch.cat([op(idx, sources[s : s + 1]) for s, idx in enumerate(indices)])


# decode_grads: losses and gradients of one target in one pass over the gathered rows


def _decode_grads_triton(indices, values, w, bias, x, coef, order, offsets, plan, count, keep, dw, add):
    (S, B, k), d, M, device = values.shape, w.shape[1], indices.numel(), w.device
    acc = acc_dtype(w.dtype)
    one = w.new_empty((B, d) if keep != KEEP_NONE else (0,))
    g = torch.empty(B, d, device=device, dtype=acc)
    asked = (coef != 0)[..., None]
    weights = place = None
    spread, width = _route(S, M, B, k, d, w.dtype) if dw is not None else (False, d)
    if spread:
        positions = torch.arange(M, device=device, dtype=torch.int32)
        place = torch.empty_like(order).scatter_(0, order.long(), positions)
    elif dw is not None:
        weights = torch.where(asked, values * coef[..., None], 0.0)
    sq = dots = None
    for c0 in range(0, d, width):
        cols = slice(c0, min(c0 + width, d))
        part = w[:, cols]
        shape = (M, part.shape[1]) if spread else (S, B, part.shape[1])
        scratch = w.new_empty(shape) if dw is not None else None
        part_sq, part_dots = launch_gather(
            indices, values, part, None if bias is None else bias[cols], x[:, cols], count=count, coef=coef,
            place=place, e=None if spread else scratch, h=scratch if spread else None,
            one=one[:, cols] if keep != KEEP_NONE else None, kept=max(keep, 0), g=g[:, cols], sq=True, dot=True,
        )  # fmt: skip
        sq = part_sq if sq is None else sq.add_(part_sq)
        dots = part_dots if dots is None else dots.add_(part_dots)
        if dw is not None:
            launch_reduce(dw[:, cols], None, order, offsets, plan, weights, scratch, k, add)
    return sq, torch.where(asked, coef[..., None] * dots, 0.0), g, one


def _route(S, M, B, k, d, dtype) -> tuple[bool, int]:
    """Whether the gradient goes by way of H in list order, and how many columns are done at once within the scratch.

    H carries the loss coefficients in the weights' dtype; float16 would lose them, so it keeps to the errors.
    """
    width = SCRATCH_BYTES // (M * dtype.itemsize)
    spread = S >= SPREAD_SOURCES and dtype != torch.float16 and k <= gather_chunk(dtype.itemsize)
    if spread and width >= min(d, SPREAD_COLUMNS):
        return True, min(d, max(width // 128 * 128, 16))
    return False, min(d, max(SCRATCH_BYTES // (S * B * dtype.itemsize) // 128 * 128, SPREAD_COLUMNS))


def _decode_grads_torch(indices, values, w, bias, x, coef, order, offsets, plan, count, keep, dw, add):
    acc = acc_dtype(w.dtype)
    e = gather_sum_torch(indices, values, w, bias).sub_(x)
    sq = e.to(acc).square().sum(2)
    one = w.new_empty(0) if keep == KEEP_NONE else e[keep].clone()
    asked = (coef != 0)[..., None]
    dvalues = torch.where(asked, coef[..., None] * gather_dot_torch(indices, w, e, count), 0.0)
    e.masked_fill_(~asked, 0.0)
    g = torch.einsum("sb,sbd->bd", coef, e.to(acc))
    if dw is not None:
        weights = torch.where(asked, values * coef[..., None], 0.0)
        reduce_torch(dw, None, order, offsets, plan, weights, e, indices.shape[1], add)
    return sq, dvalues, g, one


def _decode_grads_fake(indices, values, w, bias, x, coef, order, offsets, plan, count, keep, dw, add):
    S, B, k = values.shape
    acc = acc_dtype(w.dtype)
    return (
        w.new_empty(S, B, dtype=acc),
        w.new_empty(S, B, k, dtype=acc),
        w.new_empty(x.shape, dtype=acc),
        w.new_empty(x.shape if keep != KEEP_NONE else (0,)),
    )


decode_grads = register(
    "decode_grads",
    "(Tensor indices, Tensor values, Tensor w, Tensor? bias, Tensor x, Tensor coef, Tensor order, Tensor offsets,"
    " Tensor plan, Tensor? count, int keep, Tensor(a!)? dw, bool add, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    torch_impl=_decode_grads_torch,
    triton_impl=_decode_grads_triton,
    fake=_decode_grads_fake,
)
decode_grads.__doc__ = """Losses and gradients of one target's reconstructions from every source.

E[s, b] = sum_j values[s, b, j] w[indices[b, j]] + bias - x[b], and dloss/dE[s, b] = coef[s, b] E[s, b].

Args:
    indices: int64 [B, k].  values: [S, B, k].  w: [N, d].  bias: [d].  x: [B, d].
    coef: [S, B]; where it is 0 the source takes no part in any gradient, whatever its error is.
    order, offsets, plan: the InverseIndex of indices.
    count: int32 [], the columns of indices that exist (all when None); the values beyond it are zero.
    keep: the source whose E is returned, or KEEP_NONE.
    dw: [N, d], where the gradient of w goes; None when nobody asks for it.
    add: add to dw; latents in no list are then not touched.
    impl: "triton" or "torch".

Returns: |E|^2 [S, B]; dvalues [S, B, k]; sum_s coef E [B, d], whose sum over b is the gradient of bias, all in the
accumulator dtype; E [B, d] of one source in w's dtype (empty for KEEP_NONE).
"""


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # the usual backward() costs no pass over the gradient
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < numel, other=0.0)
        tl.store(x_ptr + offs, (x * factor).to(x_ptr.dtype.element_ty), mask=offs < numel)


def _scale_triton(x, factor):
    block = 4096
    _scale_kernel[(cdiv(x.numel(), block),)](x, factor, x.numel(), BLOCK=block, num_warps=8)


def _scale_torch(x, factor):
    if x.device.type != "cpu" or factor != 1:  # on a CPU the look is free
        x.mul_(factor.to(x.dtype))


scale_ = register(
    "scale_",
    "(Tensor(a!) x, Tensor factor, str impl) -> ()",
    torch_impl=_scale_torch,
    triton_impl=_scale_triton,
    fake=lambda x, factor: None,
)
scale_.__doc__ = """Multiply x, contiguous, by a number that stays on the device, in place; 1 costs nothing."""


def _decode_grads(indices, values, rows, pre_bias, x, coef, inverses, count, keep, dw, add, impl):
    """`decode_grads` for indices [B, k], or [S, B, k] with one InverseIndex for each source."""
    n, parts = rows.shape[0], []
    if indices.dim() == 2:
        indices, values, coef, keep = indices[None], values[None], coef[None], [keep]
    else:
        values, coef, keep = values[:, None], coef[:, None], [0 if s == keep else KEEP_NONE for s in range(len(values))]
    for idx, v, c, inverse, kept in zip(indices, values, coef, inverses, keep, strict=True):
        inverse = inverse if inverse[0] is not None else inverse_index(idx, n)
        parts.append(decode_grads(idx, v, rows, pre_bias, x, c, *inverse, count, kept, dw, add, impl))
        add = True
    if len(parts) == 1:
        return parts[0]
    sq, dvalues, g, error = zip(*parts, strict=True)
    return torch.cat(sq), torch.cat(dvalues), torch.stack(g).sum(0), next((e for e in error if e.numel()), error[0])


def _grads_of_errors(values, w_dec, pre_bias, x, indices, inverses, count, dnmse, needs, impl, into=None):
    """Gradients of sum_s dnmse[s] NMSE(R[s], x): dvalues [S, B, k], dw [d, N], d pre_bias, dx; None if not needed.

    `into` [N, d] is a gradient to add dw to.
    """
    need_v, need_w, need_b, need_x = needs
    rows, norm = w_dec.t(), _squared_norm(x)
    coef = _coefficients(dnmse, norm)
    dw = into
    if need_w and into is None:
        dw = torch.empty_like(rows, memory_format=torch.contiguous_format)
    sq, dvalues, g, _ = _decode_grads(
        indices, values, rows, pre_bias, x, coef, inverses, count, KEEP_NONE, dw, into is not None, impl
    )
    dx = None
    if need_x:
        through_norm = torch.where(coef != 0, coef * sq / norm, 0.0).sum(0)[:, None] * x.to(coef.dtype)
        dx = -(g + through_norm).to(x.dtype)
    return (
        dvalues if need_v else None,
        dw.t() if need_w else None,
        g.sum(0).to(pre_bias.dtype) if need_b else None,
        dx,
    )


def _coefficients(dnmse, norm):
    """[S] upstream gradients, [B] squared norms -> [S, B], dloss/dE = coef * E. Terms with upstream 0 do not count."""
    coef = dnmse[:, None] * (2 / norm.shape[0]) / norm
    coef = torch.where(norm.isfinite(), coef, float("nan"))  # inf in x: not a gradient of 0
    return torch.where((dnmse != 0)[:, None], coef, 0.0)


def _errors(indices, values, rows, pre_bias, x, keep, count, impl):
    """|E|^2 [S, B] and E [B, d] of source `keep`, for indices [B, k] or [S, B, k]."""
    if indices.dim() == 2:
        return gather_error(indices, values, rows, pre_bias, x, keep, count, impl)
    parts = [
        gather_error(idx, values[s : s + 1], rows, pre_bias, x, 0 if s == keep else KEEP_NONE, count, impl)
        for s, idx in enumerate(indices)
    ]
    return torch.cat([p[0] for p in parts]), parts[max(keep, 0)][1]


class Decode(torch.autograd.Function):
    """Reconstructions of one target from S sources: [S, B, d]."""

    @staticmethod
    def forward(ctx, values, w_dec, pre_bias, indices, order, offsets, plan, impl):
        rows = w_dec.t()
        ctx.save_for_backward(values, w_dec, indices, order, offsets, plan)
        ctx.impl = impl
        return _per_source(lambda i, v: gather_sum(i, v, rows, pre_bias, impl), indices, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, drecon):
        values, w_dec, indices, *inverse = ctx.saved_tensors
        rows, impl = w_dec.t(), ctx.impl
        dvalues = dw = db = None
        if ctx.needs_input_grad[0]:
            dvalues = _per_source(lambda i, x: gather_dot(i, rows, x, None, impl), indices, drecon).to(values.dtype)
        if ctx.needs_input_grad[1]:
            if inverse[0] is None:
                inverse = inverse_index(indices, rows.shape[0])
            coef, mat = values, drecon.contiguous()
            if indices.dim() == 3:  # every (source, row) has its own list entries: one source with S * B rows
                coef, mat = coef.reshape(1, -1), mat.reshape(1, -1, mat.shape[-1])
            dw = latent_reduce(InverseIndex(*inverse), coef, mat, indices.shape[-1], w_dec.dtype, impl)[0].t()
        if ctx.needs_input_grad[2]:
            db = drecon.sum((0, 1), dtype=acc_dtype(drecon.dtype)).to(drecon.dtype)
        return dvalues, dw, db, None, None, None, None, None


class DecodeNMSE(torch.autograd.Function):
    """Normalised errors [S] of one target from S sources, each with a gradient of its own."""

    @staticmethod
    def forward(ctx, values, w_dec, pre_bias, x, indices, order, offsets, plan, impl):
        ctx.save_for_backward(values, w_dec, pre_bias, x, indices, order, offsets, plan)
        ctx.impl = impl
        sq, _ = _errors(indices, values, w_dec.t(), pre_bias, x, KEEP_NONE, None, impl)
        return (sq / _squared_norm(x)).mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnmse):
        values, w_dec, pre_bias, x, indices, *inverse = ctx.saved_tensors
        inverses = [inverse] if indices.dim() == 2 else [NO_INVERSE] * len(indices)
        grads = _grads_of_errors(
            values, w_dec, pre_bias, x, indices, inverses, None, dnmse, ctx.needs_input_grad[:4], ctx.impl
        )
        return (*grads, None, None, None, None, None)


class TargetLoss(torch.autograd.Function):
    """What one target adds to the loss: sum_s weights[s] NMSE(R[s], x), and AuxK's term of this target.

    The weights are known, so the gradient is taken in the forward, in the one pass over the gathered rows that makes
    the errors; the backward only scales it. Not done where it would not pay or not be exact: without gradients, where x
    has one itself, under torch.compile (whose graphs cannot use a buffer up), and in float16, where a gradient has to
    be scaled before it is rounded. Then the backward makes the errors again.

    `inverses` are the tensors of one InverseIndex for each selection in `indices`, then AuxK's; aux_values None: none.

    Returns: the weighted sum, AuxK's NMSE (0 without), and without gradient the NMSE of each source [S].
    """

    @staticmethod
    def forward(
        ctx, values, w_dec, pre_bias, x, aux_values, weights, keep, impl, indices, aux_indices, aux_count, *inverses
    ):
        need_v, need_w, _, need_x = ctx.needs_input_grad[:4]
        rows, norm = w_dec.t(), _squared_norm(x)
        kept = keep if aux_values is not None else KEEP_NONE
        made = ()
        ahead = (need_v or need_w) and not need_x and w_dec.dtype != torch.float16
        ctx.ahead = ahead and not torch.compiler.is_compiling()
        if ctx.ahead:
            dw = torch.empty_like(rows, memory_format=torch.contiguous_format) if need_w else None
            sq, dvalues, g, error = _decode_grads(
                indices, values, rows, pre_bias, x, _coefficients(weights, norm),
                _triples(inverses)[: _selections(indices)], None, kept, dw, False, impl,
            )  # fmt: skip
            made = dvalues, dw, g.sum(0)
        else:
            sq, error = _errors(indices, values, rows, pre_bias, x, kept, None, impl)
        nmse = (sq / norm).mean(1)
        weighted = torch.where(weights != 0, weights * nmse, 0.0).sum()
        aux_nmse = weighted.new_zeros(())
        if aux_values is not None:
            residual = _residual(pre_bias, error)
            aux_sq, _ = gather_error(
                aux_indices, aux_values[None], rows, pre_bias, residual, KEEP_NONE, aux_count, impl
            )
            aux_nmse = (aux_sq / _squared_norm(residual)).mean()
        ctx.mark_non_differentiable(nmse)
        ctx.save_for_backward(
            values, w_dec, pre_bias, x, aux_values, weights, error, indices, aux_indices, aux_count, *inverses, *made
        )
        ctx.inverses, ctx.impl = len(inverses), impl
        return weighted, aux_nmse, nmse

    @staticmethod
    @once_differentiable
    def backward(ctx, dweighted, daux, _):
        values, w_dec, pre_bias, x, aux_values, weights, error, *rest = ctx.saved_tensors
        indices, aux_indices, aux_count, *rest = rest
        inverses, made = _triples(rest[: ctx.inverses]), rest[ctx.inverses :]
        impl, needs = ctx.impl, ctx.needs_input_grad[:4]
        dx = daux_values = None
        if ctx.ahead:
            ctx.ahead = False  # the buffers are given away: a second backward makes its own
            dvalues, dw, db = made
            dvalues = dvalues * dweighted if needs[0] else None
            db = (db * dweighted).to(pre_bias.dtype) if needs[2] else None
            if needs[1]:
                dw = dw.data  # changed in place below, which a second backward need not mind
                scale_(dw, dweighted, impl)
                dw = dw.t()
        else:
            dvalues, dw, db, dx = _grads_of_errors(
                values, w_dec, pre_bias, x, indices, inverses[: _selections(indices)], None, weights * dweighted, needs,
                impl,
            )  # fmt: skip
        if aux_values is not None:
            dv, dw, aux_db, aux_dx = _grads_of_errors(
                aux_values[None], w_dec, pre_bias, _residual(pre_bias, error), aux_indices, inverses[-1:], aux_count,
                daux[None], (ctx.needs_input_grad[4], *needs[1:]), impl, into=None if dw is None else dw.t(),
            )  # fmt: skip
            daux_values = None if dv is None else dv[0]
            db = None if db is None else db + aux_db
            dx = None if dx is None else dx + aux_dx  # x stands in the residual as it is
        return dvalues, dw, db, dx, daux_values, *[None] * (6 + ctx.inverses)


def _selections(indices):
    return 1 if indices.dim() == 2 else len(indices)


def _triples(tensors):
    return [tensors[i : i + 3] for i in range(0, len(tensors), 3)]


def _residual(pre_bias, error):
    """AuxK's target x - R + b, held constant: the bias less the error of the target's own reconstruction."""
    return pre_bias - error.to(pre_bias.dtype)


def _squared_norm(x: torch.Tensor) -> torch.Tensor:
    """|x|^2 of each row in the accumulator dtype: [B, d] -> [B]."""
    return x.to(acc_dtype(x.dtype)).square().sum(1)


def _check(indices, values, w_decs, pre_biases, pairs, inverse):
    T = check_same_length("w_decs", w_decs=w_decs, pre_biases=pre_biases)
    check_tensor("w_decs[0]", w_decs[0], ("d", "N"))
    n, like = w_decs[0].shape[1], w_decs[0]
    require(isinstance(values, torch.Tensor), "values", "a tensor of shape [S, B, k]", values)
    require(values.dim() == 3 and values.is_floating_point(), "values", "a floating tensor of shape [S, B, k]", values)
    require(values.device == like.device, "values", f"a tensor on {like.device}", values)
    S, B, k = values.shape
    require(1 <= S <= MAX_STREAMS, "values", f"1..{MAX_STREAMS} sources", values)
    require(1 <= k <= MAX_K, "values", f"1..{MAX_K} values a row", values)
    require(B > 0, "values", "at least one row", values)
    for t in range(T):
        check_tensor(f"w_decs[{t}]", w_decs[t], ("d", n), like=like)
        check_tensor(f"pre_biases[{t}]", pre_biases[t], (w_decs[t].shape[0],), like=like)
    shape = (S, B, k) if getattr(indices, "ndim", 2) == 3 else (B, k)
    check_indices("indices", indices, shape, n, like.device)
    check_inverse("inverse", inverse, indices, inverse_sizes(indices.numel(), n))
    if pairs is None:
        return T, S, {t: list(range(S)) for t in range(T)}
    require(isinstance(pairs, (list, tuple, set, dict)), "pairs", "a list of (target, source) tuples", pairs)
    asked: dict[int, list[int]] = {}
    for pair in pairs:
        ok = isinstance(pair, tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
        ok = ok and 0 <= pair[0] < T and 0 <= pair[1] < S
        require(ok, "pairs", f"(target, source) tuples with target in 0..{T - 1} and source in 0..{S - 1}", repr(pair))
        sources = asked.setdefault(pair[0], [])
        if pair[1] not in sources:
            sources.append(pair[1])
    return T, S, asked


def pick(x: torch.Tensor, places: list[int]) -> torch.Tensor:
    """x[places]; indexing a CUDA tensor with a list would copy the list to the device, a synchronisation."""
    return torch.stack([x[i] for i in places])


def _sources(indices, values, inverse, asked):
    """What a target needs of the sources it asks for; the inverse index stays valid while all of them are asked for."""
    if asked == list(range(values.shape[0])):
        return indices, values, inverse
    values = pick(values, asked)
    return (indices, values, inverse) if indices.dim() == 2 else (pick(indices, asked), values, NO_INVERSE)


def decode(
    indices: torch.Tensor,
    values: torch.Tensor,
    w_decs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    pairs: list[tuple[int, int]] | None = None,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> dict[tuple[int, int], torch.Tensor]:
    """Reconstructions of every target from every source, each selected decoder row fetched once per (row, target).

    Args:
        indices: int64 [B, k] shared by all sources, or [S, B, k]. Ids in 0..N-1 (checked on a CPU; on a GPU an id
            outside gives NaN with Triton, torch's device assert with impl="torch"). An id twice in a row adds up.
        values: [S, B, k], any floating dtype; used in float32 (float64 for float64 weights). Half precision weights:
            impl="torch" rounds them to the weights' dtype; fp16 cannot hold values beyond 65504 in either.
        w_decs: T tensors [d_t, N]. Best with strides (1, d_t), as `AlignedSAE` keeps them; others are copied.
        pre_biases: T tensors [d_t].
        pairs: which (target, source) to make; all T x S when None.
        inverse: `inverse_index(indices, N)` when the caller already has it.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns: {(t, s): [B, d_t]} in the weights' dtype; differentiable in values, w_decs and pre_biases.

    Equivalent to: `{(t, s): codes[s] @ w_decs[t].T + pre_biases[t]}` with
    `codes[s] = zeros(B, N).scatter(1, indices, values[s])`
    """
    _, _, asked = _check(indices, values, w_decs, pre_biases, pairs, inverse)
    impl = resolve_impl(impl, w_decs[0])
    recons = {}
    for t, sources in asked.items():
        idx, val, inv = _sources(indices, values, inverse or NO_INVERSE, sources)
        out = Decode.apply(val, w_decs[t], pre_biases[t], idx, *inv, impl)
        recons.update({(t, s): out[i] for i, s in enumerate(sources)})
    return recons


def decode_nmse(
    indices: torch.Tensor,
    values: torch.Tensor,
    w_decs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    xs: list[torch.Tensor],
    pairs: list[tuple[int, int]] | None = None,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Normalised mean squared error of every reconstruction, without keeping any.

    Args:
        xs: T targets [B, d_t], of the weights' dtype.
        indices, values, w_decs, pre_biases, pairs, inverse, impl: as in `decode`.

    Returns: [T, S] in float32 (float64 for float64), entry (t, s) for target t from source s; 0 where `pairs` does not
        ask. Differentiable in values, w_decs, pre_biases and xs. A zero row in a target makes its entries inf or NaN.

    Equivalent to: `((recon[t, s] - xs[t]).square().mean(1) / xs[t].square().mean(1)).mean()`
    """
    T, S, asked = _check(indices, values, w_decs, pre_biases, pairs, inverse)
    check_same_length("w_decs", w_decs=w_decs, xs=xs)
    for t in range(T):
        check_tensor(f"xs[{t}]", xs[t], (values.shape[1], w_decs[t].shape[0]), like=w_decs[0])
    impl = resolve_impl(impl, w_decs[0])
    zero = torch.zeros((), device=values.device, dtype=acc_dtype(w_decs[0].dtype))
    entries = {}
    for t, sources in asked.items():
        idx, val, inv = _sources(indices, values, inverse or NO_INVERSE, sources)
        row = DecodeNMSE.apply(val, w_decs[t], pre_biases[t], xs[t], idx, *inv, impl)
        entries.update({(t, s): row[i] for i, s in enumerate(sources)})
    return torch.stack([torch.stack([entries.get((t, s), zero) for s in range(S)]) for t in range(T)])
