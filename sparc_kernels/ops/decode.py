"""Public `decode` and `decode_nmse`: reconstructions across streams and their normalised errors."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..core.numerics import acc_dtype
from ..core.registry import resolve_impl
from ..core.validation import check_indices, check_inverse, check_same_length, check_tensor, fail, require
from ..launch.budgets import (
    MAX_K,
    MAX_STREAMS,
)
from .decode_grads import grads_of_errors, target_weights
from .gather import (
    gather_dot,
    gather_errors,
    gather_sum,
)
from .inverse_index import NO_INVERSE, InverseIndex, inverse_index_op, inverse_sizes, lists_of
from .latent_reduce import latent_reduce
from .records import DecodeTarget, SparseCodes, WeightedLists


def _per_source(op, indices, sources):
    """Call op(indices [B, k], sources [S, B, ...]) once if the sources share indices, else source by source."""
    if indices.dim() == 2:
        return op(indices, sources)
    return torch.cat([op(idx, sources[s : s + 1]) for s, idx in enumerate(indices)])


def errors_of(
    codes: SparseCodes, targets: list[DecodeTarget], impl: str, *, own_codes: bool = False, own_errors: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the errors of every source's reconstruction of T targets.

    Args:
        codes: codes of S sources.
        targets: decoders and rows that they reconstruct.
        impl: "triton" or "torch".
        own_codes: target t is reconstructed from source t alone.
        own_errors: return the error of target t from source t.

    Returns:
        |E|^2 [T, S, B], [T, 1, B] with own codes; E [B, d_t] of each target, empty without own errors.
    """
    T, columns = len(targets), [list(column) for column in zip(*targets, strict=True)]
    if own_codes:
        values = codes.gathered[:, None]
        return gather_errors(codes.indices, values, *columns, [0] * T if own_errors else [], codes.n_valid, impl)
    if codes.shared:
        keep = list(range(T)) if own_errors else []
        return gather_errors(codes.indices, codes.gathered, *columns, keep, codes.n_valid, impl)
    sqs, errors = [], []
    for s in range(len(codes.gathered)):
        one = codes.source(s)
        sq, error = gather_errors(one.indices, one.gathered, *columns, [0] * T if own_errors else [], one.n_valid, impl)
        sqs.append(sq)
        errors.append(error)
    return torch.cat(sqs, 1), [errors[min(t, len(errors) - 1)][t] for t in range(T)]


class Decode(torch.autograd.Function):
    """Differentiable reconstructions of one target from S sources, [S, B, d].

    Args:
        impl: "triton" or "torch".
        tensors: values [S, B, k], w_dec [d, N], pre_bias [d], indices [B, k] or [S, B, k], and the three parts of their
            InverseIndex or three times None.
    """

    @staticmethod
    def forward(ctx, impl, *tensors):
        values, w_dec, pre_bias, indices, *inverse = tensors
        rows = w_dec.t()
        ctx.save_for_backward(values, w_dec, indices, *inverse)
        ctx.impl = impl
        return _per_source(lambda i, v: gather_sum(i, v, rows, pre_bias, False, impl), indices, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, drecon):
        values, w_dec, indices, *inverse = ctx.saved_tensors
        rows, impl = w_dec.t(), ctx.impl
        _, need_v, need_w, need_b, *_ = ctx.needs_input_grad
        dvalues = dw = db = None
        if need_v:
            dvalues = _per_source(lambda i, x: gather_dot(i, rows, x, None, impl), indices, drecon).to(values.dtype)
        if need_w:
            if inverse[0] is None:
                inverse = lists_of(inverse_index_op(indices, 1, rows.shape[0], None, impl), 0)
            coef, mat = values, drecon.contiguous()
            if indices.dim() == 3:  # every (source, row) has its own list entries: one source with S * B rows
                coef, mat = coef.reshape(1, -1), mat.reshape(1, -1, mat.shape[-1])
            lists = WeightedLists(InverseIndex(*inverse), coef, None, None, mat, indices.shape[-1])
            dw = latent_reduce(lists, w_dec.dtype, impl)[0].t()
        if need_b:
            db = drecon.sum((0, 1), dtype=acc_dtype(drecon.dtype)).to(drecon.dtype)
        return None, dvalues, dw, db, None, None, None, None


class DecodeNMSE(torch.autograd.Function):
    """Differentiable normalised errors [S] of one target from S sources.

    Args:
        impl: "triton" or "torch".
        tensors: values [S, B, k], w_dec [d, N], pre_bias [d], x [B, d], indices [B, k] or [S, B, k], and the three
            parts of their InverseIndex (used for shared indices) or three times None.
    """

    @staticmethod
    def forward(ctx, impl, *tensors):
        values, w_dec, pre_bias, x, indices, *_ = tensors
        ctx.save_for_backward(*tensors)
        ctx.impl = impl
        sq, _ = errors_of(SparseCodes(indices, values), [DecodeTarget(w_dec.t(), pre_bias, x)], impl)
        norm, _ = target_weights([x], values.new_zeros(1, 1), impl)
        return (sq[0] / norm).mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnmse):
        values, w_dec, pre_bias, x, indices, *lists = ctx.saved_tensors
        # lists over indices [S, B, k] span all sources and are of no use here
        given = indices.dim() == 2 and lists[0] is not None
        codes = SparseCodes(indices, values, None, InverseIndex(*(part[None] for part in lists)) if given else None)
        target = DecodeTarget(w_dec.t(), pre_bias, x)
        grads = grads_of_errors(codes, target, dnmse, ctx.needs_input_grad[1:5], ctx.impl)
        return (None, *grads, None, None, None, None)


def _check(indices, values, w_decs, pre_biases, *, pairs, inverse):
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
        w, bias = check_tensor(f"w_decs[{t}]", w_decs[t], ("d", n), like=like), pre_biases[t]
        if isinstance(bias, torch.Tensor) and bias.shape == w.shape[1:] != w.shape[:1]:
            fail(f"w_decs[{t}]", f"[d, N] with d {len(bias)} as in pre_biases[{t}] (transposed?)", w)
        check_tensor(f"pre_biases[{t}]", bias, (w.shape[0],), like=like)
    shape = (S, B, k) if getattr(indices, "ndim", 2) == 3 else (B, k)
    check_indices("indices", indices, shape, n, like.device)
    check_inverse("inverse", inverse, indices, inverse_sizes(indices.numel(), n))
    if pairs is None:
        return T, S, {t: list(range(S)) for t in range(T)}
    require(isinstance(pairs, (list, tuple, set, dict)), "pairs", "a list of (target, source) tuples", pairs)
    sources_of: dict[int, list[int]] = {}
    for pair in pairs:
        ok = isinstance(pair, tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
        ok = ok and 0 <= pair[0] < T and 0 <= pair[1] < S
        require(ok, "pairs", f"(target, source) tuples with target in 0..{T - 1} and source in 0..{S - 1}", repr(pair))
        sources = sources_of.setdefault(pair[0], [])
        if pair[1] not in sources:
            sources.append(pair[1])
    return T, S, sources_of


def pick(x: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Return x[places] without the host synchronisation of indexing a CUDA tensor with a list.

    Args:
        x: [n, ...].
        places: positions along the first dimension.
    """
    return torch.stack([x[i] for i in places])


def _sources(indices, values, inverse, wanted):
    """Select the sources in `wanted`; an inverse index over [S, B, k] is valid only for all of them."""
    if wanted == list(range(values.shape[0])):
        return indices, values, inverse
    values = pick(values, wanted)
    return (indices, values, inverse) if indices.dim() == 2 else (pick(indices, wanted), values, NO_INVERSE)


def decode(
    indices: torch.Tensor,
    values: torch.Tensor,
    w_decs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    pairs: list[tuple[int, int]] | None = None,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> dict[tuple[int, int], torch.Tensor]:
    """Reconstruct every target from every source, fetching each selected decoder row once per (row, target).

    Args:
        indices: int64 [B, k] shared by all sources, or [S, B, k]. Ids in 0..N-1 (checked on a CPU; on a GPU an id
            outside gives NaN with Triton, torch's device assert with impl="torch"). Repeated ids in a row add up.
        values: [S, B, k], any floating dtype; used in float32 (float64 for float64 weights). Half precision weights:
            impl="torch" rounds them to the weights' dtype; fp16 cannot hold values beyond 65504 in either.
        w_decs: T tensors [d_t, N]. Best with strides (1, d_t), as `AlignedSAE` keeps them; others are copied.
        pre_biases: T tensors [d_t].
        pairs: (target, source) tuples to compute; all T x S when None.
        inverse: `inverse_index(indices, N)` if the caller already has it.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns:
        {(t, s): [B, d_t]} in the weights' dtype; differentiable in values, w_decs and pre_biases.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Equivalent to:
        `{(t, s): codes[s] @ w_decs[t].T + pre_biases[t]}` with
        `codes[s] = zeros(B, N).scatter(1, indices, values[s])`
    """
    _, _, sources_of = _check(indices, values, w_decs, pre_biases, pairs=pairs, inverse=inverse)
    impl = resolve_impl(impl, w_decs[0])
    recons = {}
    for t, sources in sources_of.items():
        idx, val, inv = _sources(indices, values, inverse or NO_INVERSE, sources)
        out = Decode.apply(impl, val, w_decs[t], pre_biases[t], idx, *inv)
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
    """Compute the normalised mean squared error of every reconstruction without storing any.

    Args:
        indices: as in `decode`.
        values: as in `decode`.
        w_decs: as in `decode`.
        pre_biases: as in `decode`.
        xs: T targets [B, d_t], of the weights' dtype.
        pairs: as in `decode`.
        inverse: as in `decode`.
        impl: as in `decode`.

    Returns:
        [T, S] in float32 (float64 for float64), entry (t, s) for target t from source s; 0 for tuples not in `pairs`.
        Differentiable in values, w_decs, pre_biases and xs. A zero row in a target makes its entries inf or NaN.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Equivalent to:
        `((recon[t, s] - xs[t]).square().mean(1) / xs[t].square().mean(1)).mean()`
    """
    T, S, sources_of = _check(indices, values, w_decs, pre_biases, pairs=pairs, inverse=inverse)
    check_same_length("w_decs", w_decs=w_decs, xs=xs)
    for t in range(T):
        check_tensor(f"xs[{t}]", xs[t], (values.shape[1], w_decs[t].shape[0]), like=w_decs[0])
    impl = resolve_impl(impl, w_decs[0])
    zero = torch.zeros((), device=values.device, dtype=acc_dtype(w_decs[0].dtype))
    entries = {}
    for t, sources in sources_of.items():
        idx, val, inv = _sources(indices, values, inverse or NO_INVERSE, sources)
        row = DecodeNMSE.apply(impl, val, w_decs[t], pre_biases[t], xs[t], idx, *inv)
        entries.update({(t, s): row[i] for i, s in enumerate(sources)})
    return torch.stack([torch.stack([entries.get((t, s), zero) for s in range(S)]) for t in range(T)])
