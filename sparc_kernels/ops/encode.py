"""Values of the selected latents with their gradients, and the public `encode_topk` and `values_at`.

The selection carries no gradient (`selection.py`). Values are then gathered in fp32, per stream, from the selected rows
of W_enc alone, and carry the gradients.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..core._triton import tl, triton
from ..core.numerics import acc_dtype
from ..core.plan import Planned
from ..core.recorder import launch
from ..core.registry import register, resolve_impl
from ..core.side_stream import SideStream
from ..core.target import interpreted
from ..core.validation import check_indices, check_int, check_inverse, check_same_length, check_tensor, require
from ..launch.budgets import MAX_K, MAX_STREAMS, SCRATCH_BYTES
from ..launch.device import capability, cdiv, next_power_of_2
from ..launch.gather import gather_config
from .bias_grads import pre_bias_grads
from .gather import ABSENT_ID, gather_dot_torch, gather_sum, in_one_slab, launch_gathers, pick, presence, slabs_of
from .inverse_index import InverseIndex, inverse_index_op, inverse_sizes
from .joint import joint, wants_joint
from .latent_reduce import latent_reduce_
from .records import CODES_FLAT, EncoderParams, SparseCodes
from .selection import select, select_each


@triton.jit
def _centre_kernel(
    x_ptrs, bias_ptrs, out_ptrs, widths, strides_x, strides_out, B, S: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x - bias of every stream; program (rows, columns, stream)."""
    offs_b = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    stream = tl.program_id(2)
    for s in tl.static_range(S):
        if stream == s:
            mask = (offs_b < B) & (cols < widths[s])[None, :]
            x = tl.load(x_ptrs[s] + offs_b * strides_x[s] + cols[None, :], mask=mask, other=0.0)
            bias = tl.load(bias_ptrs[s] + cols, mask=cols < widths[s], other=0.0)
            dtype = out_ptrs[s].dtype.element_ty
            if dtype == tl.float64:
                out = x.to(tl.float64) - bias.to(tl.float64)[None, :]
            else:
                out = x.to(tl.float32) - bias.to(tl.float32)[None, :]
            tl.store(out_ptrs[s] + offs_b * strides_out[s] + cols[None, :], out.to(dtype), mask=mask)


def _centre_triton(xs, biases, wide):
    B, widths = xs[0].shape[0], tuple(x.shape[1] for x in xs)
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    biases = [b.contiguous() for b in biases]
    out = _centre_fake(xs, biases, wide)
    block_b, block_d = (2, 16) if interpreted() else (4, 1024)
    launch(_centre_kernel, (cdiv(B, block_b), cdiv(max(widths), block_d), len(xs)))(
        tuple(xs), tuple(biases), tuple(out), widths, tuple(x.stride(0) for x in xs), tuple(c.stride(0) for c in out),
        B, S=len(xs), BLOCK_B=block_b, BLOCK_D=block_d, num_warps=8,
    )  # fmt: skip
    return out


def _centre_torch(xs, biases, wide):
    out = _centre_fake(xs, biases, wide)
    for x, bias, c in zip(xs, biases, out, strict=True):
        torch.sub(x, bias, out=c)
    return out


def _centre_fake(xs, biases, wide):
    if not wide:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    widths = [x.shape[1] for x in xs]
    return list(xs[0].new_empty(xs[0].shape[0], sum(widths)).split(widths, 1))


centre = register(
    "centre",
    "(Tensor[] xs, Tensor[] biases, bool wide, str impl) -> Tensor[]",
    torch_impl=_centre_torch,
    triton_impl=_centre_triton,
    fake=_centre_fake,
)
centre.__doc__ = """Subtract the pre-biases from the inputs.

Args:
    xs: [B, d_s] each.
    biases: [d_s] each.
    wide: write the results side by side, as columns of one [B, D].
    impl: "triton" or "torch".

Returns:
    xs[s] - biases[s], [B, d_s] each.
"""


@triton.jit
def _finish_values_kernel(
    part_ptr, bias_ptrs, idx_ptr, count_ptr, values_ptr, slabs, stride_idx, stride_c, B, K, N,
    S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """relu(sum over the stream's slabs + bias) of one row of one stream."""
    b = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    latent = tl.load(idx_ptr + stream.to(tl.int64) * stride_idx + b * K + offs_k, mask=offs_k < K, other=0)
    exists = (offs_k < K) & (latent != ABSENT_ID)
    if count_ptr is not None:
        exists = exists & (offs_k < tl.load(count_ptr + stream * stride_c))
    inside = exists & (latent >= 0) & (latent < N)  # an id outside made its sum NaN in the gather
    first = tl.zeros((), tl.int64)  # slab of the stream
    for s in tl.static_range(1, S):
        first += tl.where(stream >= s, slabs[s - 1], 0)
    part_ptr += (first * B + b) * K
    pre = tl.load(part_ptr + offs_k, mask=exists, other=0.0)
    for slab in range(1, pick(slabs, stream, S)):
        pre += tl.load(part_ptr + tl.full((), slab, tl.int64) * B * K + offs_k, mask=exists, other=0.0)
    pre += tl.load(pick(bias_ptrs, stream, S) + latent, mask=inside, other=0.0).to(pre.dtype)
    value = tl.where(pre <= 0.0, 0.0, pre)  # NaN stays
    tl.store(values_ptr + (stream * B + b) * K + offs_k, tl.where(exists, value, 0.0), mask=offs_k < K)


def _gather_values_triton(*, indices, centred, w_encs, latent_biases, count, lists):
    S, (B, k), n, arch = len(centred), indices.shape[-2:], w_encs[0].shape[0], capability(indices.device)
    # the lists depend on the ids alone: a dozen short kernels that run beside the gathers
    side, inverse = SideStream(indices.device, enabled=lists), _no_lists(indices)
    if lists:
        inverse, _ = side.run(lambda: _lists(indices, n, count, "triton"))
    indices, own = indices.contiguous(), indices.dim() == 3
    values = torch.empty(S, B, k, device=indices.device, dtype=acc_dtype(centred[0].dtype))
    latent_biases = [c.contiguous() for c in latent_biases]
    first = 0
    while first < S:
        last = first + gathered_at_once(B, k, n, [w.shape[1] for w in w_encs[first:]], w_encs[0].dtype, arch)
        some = slice(first, last)
        idx, counts = indices[some] if own else indices, None if count is None else count[some]
        at_once, itemsize = {}, w_encs[0].element_size()
        if in_one_slab(k, n, [w.shape[1] for w in w_encs[some]], itemsize, arch):
            at_once = dict(latent_biases=latent_biases[some], values_out=values[some])
        _, part, slabs = launch_gathers(
            idx, None, w_encs[some], None, centred[some], count=counts, dot=True, **at_once
        )  # fmt: skip
        if not at_once:
            launch(_finish_values_kernel, (B, last - first))(
                part, tuple(latent_biases[some]), idx, counts, values[first:], slabs, B * k if own else 0,
                0 if count is None else count.stride(0), B, k, n,
                S=last - first, BLOCK_K=next_power_of_2(k), num_warps=1,
            )  # fmt: skip
        first = last
    side.join()
    return values, *inverse


def gathered_at_once(B, k, n, widths, dtype, arch) -> int:
    """How many streams share a launch, so that their partial dots stay within the scratch (one always runs)."""
    config, held_bytes = gather_config(k, max(widths), n, dtype.itemsize, arch), 0
    for s, d in enumerate(widths):
        held_bytes += slabs_of(config, d) * B * k * acc_dtype(dtype).itemsize
        if held_bytes >= SCRATCH_BYTES:
            return s + 1
    return len(widths)


def _lists(indices, n, count, impl):
    return inverse_index_op(indices, 1 if indices.dim() == 2 else len(indices), n, count, impl)


def _no_lists(indices):
    return tuple(indices.new_empty(0, dtype=torch.int32) for _ in range(3))


def _gather_values_torch(*, indices, centred, w_encs, latent_biases, count, lists):
    values = centred[0].new_empty(len(centred), *indices.shape[-2:], dtype=acc_dtype(centred[0].dtype))
    present, partly = presence(indices)
    safe = torch.where(present, indices, 0) if partly else indices
    for s, (x, w, bias) in enumerate(zip(centred, w_encs, latent_biases, strict=True)):
        idx, own = (indices, safe) if indices.dim() == 2 else (indices[s], safe[s])
        pre = gather_dot_torch(idx, w, x[None], None if count is None else count[s])
        torch.add(pre[0], bias[own], out=values[s])
    values.relu_()
    if partly:
        values.masked_fill_(~present, 0.0)
    if count is not None:
        exists = torch.arange(indices.shape[-1], device=values.device) < count[:, None, None]
        values = torch.where(exists, values, 0.0)
    inverse = _lists(indices, w_encs[0].shape[0], count, "torch") if lists else _no_lists(indices)
    return values, *inverse


def _gather_values_fake(*, indices, centred, w_encs, latent_biases, count, lists):
    inverse = _lists(indices, w_encs[0].shape[0], count, "torch") if lists else _no_lists(indices)
    return indices.new_empty(len(centred), *indices.shape[-2:], dtype=acc_dtype(centred[0].dtype)), *inverse


gather_values = register(
    "gather_values",
    "(Tensor indices, Tensor[] centred, Tensor[] w_encs, Tensor[] latent_biases, Tensor? count, bool lists, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    torch_impl=_gather_values_torch,
    triton_impl=_gather_values_triton,
    fake=_gather_values_fake,
)
gather_values.__doc__ = """Compute relu(<w_encs[s][indices], centred[s]> + latent_biases[s][indices]) of every stream.

Args:
    indices: int64 [B, k] for all streams, or [S, B, k]; the value of ABSENT is 0.
    centred: x - pre_bias, [B, d_s] each.
    w_encs: [N, d_s] each.
    latent_biases: [N] each.
    count: int32 [S], the valid columns of indices for each stream (all when None); the others get 0.
    lists: build the inverse index too, at the same time.
    impl: "triton" or "torch".

Returns:
    values [S, B, k] in the accumulator dtype; order, offsets and ids of `inverse_index_op` for the valid columns, empty
    without `lists`.
"""


def gather_codes(
    chosen: SparseCodes, centred: list[torch.Tensor], encoder: EncoderParams, lists: bool, impl: str
) -> SparseCodes:
    """Gather the values of the selected latents and, with `lists`, build their inverse index.

    Args:
        chosen: indices and their count; its values are not read.
        centred: x - pre_bias, [B, d_s] each.
        encoder: encoders of the S streams.
        lists: whether gradients will need the inverse index.
        impl: "triton" or "torch".

    Returns:
        `chosen` with values [S, B, k] and, with `lists`, the inverse index.
    """
    args = list(encoder.w_encs), list(encoder.latent_biases), chosen.n_valid, lists, impl
    values, *inverse = gather_values(chosen.indices, centred, *args)
    return chosen._replace(values=values, inverse=InverseIndex(*inverse) if lists else chosen.inverse)


class Values(torch.autograd.Function):
    """Attach gradients to the values that `gather_values` computed.

    The backward of AuxK's values adds in place to the same gradient buffers, at the few latents that AuxK selected.

    Args:
        impl: "triton" or "torch".
        S: number of streams.
        values: [S, B, k].
        aux_values: AuxK's values [S, B, auxk], or None.
        tensors: other parts of the codes and, with AuxK, of its codes (`SparseCodes.flatten`); then S each of xs,
            w_encs, pre_biases, latent_biases and centred inputs.
    """

    @staticmethod
    def forward(ctx, impl, S, values, aux_values, *tensors):
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.S = impl, S
        ctx.save_for_backward(values, aux_values, *tensors)
        return values, aux_values

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalues, daux):
        S, impl = ctx.S, ctx.impl
        values, aux_values, *tensors = ctx.saved_tensors
        n = CODES_FLAT if aux_values is None else 2 * CODES_FLAT
        needs = ctx.needs_input_grad[4 + n : 4 + n + 4 * S]
        grads = _values_backward([dvalues, daux, values, aux_values, *tensors], (S, needs, impl), impl=impl)
        return *[None] * (4 + n), *grads, *[None] * S


@Planned
def _values_backward(tensors, S, needs, impl):
    """Gradients of xs, w_encs, pre_biases and latent_biases, see `Values`; None where not needed."""
    dvalues, daux, values, aux_values, *tensors = tensors
    n = CODES_FLAT if aux_values is None else 2 * CODES_FLAT
    w_encs, pre_biases, latent_biases, centred = (tensors[i : i + S] for i in range(n + S, n + 5 * S, S))
    uses = []
    for i, (v, dv) in enumerate(((values, dvalues), (aux_values, daux))):
        if dv is not None:
            codes = SparseCodes.unflatten(v, tensors[i * CODES_FLAT : (i + 1) * CODES_FLAT])
            uses.append((codes.with_inverse(len(w_encs[0]), impl), dv))
    none: list[torch.Tensor | None] = [None] * S
    dxs, dws, dbs, sums = (none.copy() for _ in range(4))
    wanted = [s for s in range(S) if uses and any(needs[i * S + s] for i in (1, 2, 3))]
    # all streams at once, or the few that are trained one by one
    for part in [slice(0, S)] if len(wanted) == S else [slice(s, s + 1) for s in wanted]:
        outs = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in w_encs[part]]
        totals = [c.new_empty(len(c)) for c in latent_biases[part]]
        for i, (codes, dv) in enumerate(uses):
            inverse = [x[0] if codes.shared else x[part] for x in codes.inverse or ()]
            coef, gate = dv[part, None], codes.gathered[part, None]
            latent_reduce_(outs, totals, *inverse, coef, None, gate, centred[part], dv.shape[2], i > 0, impl)
        sums[part] = totals
        dws[part] = outs
    dcs = [dc if need else None for dc, need in zip(sums, needs[3 * S : 4 * S], strict=True)]
    dws = [dw if need else None for dw, need in zip(dws, needs[S : 2 * S], strict=True)]
    for s in range(S):
        if needs[s]:
            for codes, dv in uses:
                one = slice(s, s + 1)
                dpre = torch.where(codes.gathered[one] <= 0, 0.0, dv[one])
                part = gather_sum(codes.indices_of(s), dpre, w_encs[s], None, False, impl)[0]
                dxs[s] = part if dxs[s] is None else dxs[s] + part
    bias_streams = [s for s in range(S) if uses and needs[2 * S + s]]
    if bias_streams:
        args = ([group[s] for s in bias_streams] for group in (w_encs, sums, pre_biases))
        for s, db in zip(bias_streams, pre_bias_grads(*args, impl), strict=True):
            dbs[s] = db
    return [*dxs, *dws, *dbs, *dcs]


def differentiable_values(
    codes: SparseCodes,
    aux: SparseCodes | None,
    xs: list[torch.Tensor],
    centred: list[torch.Tensor],
    encoder: EncoderParams,
    *,
    impl: str,
) -> tuple[SparseCodes, SparseCodes | None]:
    """Attach gradients to the values of codes from `gather_codes`.

    Args:
        codes: codes of S streams.
        aux: AuxK's codes, or None.
        xs: [B, d_s] each.
        centred: x - pre_bias, [B, d_s] each.
        encoder: encoders of the S streams.
        impl: "triton" or "torch".

    Returns:
        codes and aux with differentiable values.
    """
    flat = [*codes.flatten(), *(aux.flatten() if aux else ())]
    for group in (xs, *encoder, centred):
        flat += group
    values, aux_values = Values.apply(impl, len(xs), codes.values, aux and aux.values, *flat)
    return codes._replace(values=values), aux and aux._replace(values=aux_values)


def values_of(x: torch.Tensor, encoder: EncoderParams, chosen: SparseCodes, impl: str) -> torch.Tensor:
    """Compute `values_at` of one stream; arguments are not checked.

    Args:
        x: [B, d].
        encoder: encoder of the stream.
        chosen: codes with the indices; their values are not read.
        impl: "triton" or "torch".

    Returns:
        [B, k], differentiable.
    """
    with torch.no_grad():
        centred = centre([x], encoder.pre_biases, False, impl)
        codes = gather_codes(chosen, centred, encoder, False, impl)
    return differentiable_values(codes, None, [x], centred, encoder, impl=impl)[0].gathered[0]


def values_at(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    pre_bias: torch.Tensor,
    latent_bias: torch.Tensor,
    indices: torch.Tensor,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute one stream's activations at given latents; the differentiable half of `encode_topk`.

    Args:
        x: [B, d]; all tensors but indices have one dtype, and all are on one device.
        w_enc: [N, d].
        pre_bias: [d].
        latent_bias: [N].
        indices: int64 [B, k], ids in 0..N-1. Checked on a CPU; on a GPU an id outside gives NaN with Triton and torch's
            own device assert with impl="torch".
        inverse: `inverse_index(indices, N)` if the caller already has it; else built in the backward.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns:
        values [B, k], float32 (float64 for float64 inputs); differentiable in x, w_enc, pre_bias and latent_bias.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Equivalent to:
        `relu(F.linear(x - pre_bias, w_enc, latent_bias).gather(1, indices))`
    """
    check_tensor("x", x, ("B", "d"))
    check_tensor("w_enc", w_enc, ("N", x.shape[1]), like=x)
    check_tensor("pre_bias", pre_bias, (x.shape[1],), like=x)
    check_tensor("latent_bias", latent_bias, (w_enc.shape[0],), like=x)
    check_indices("indices", indices, (x.shape[0], "k"), w_enc.shape[0], x.device)
    check_inverse("inverse", inverse, indices, inverse_sizes(indices.numel(), w_enc.shape[0]))
    lists = inverse and InverseIndex(*(part[None] for part in inverse))
    encoder = EncoderParams([w_enc], [pre_bias], [latent_bias])
    return values_of(x, encoder, SparseCodes(indices, None, None, lists), resolve_impl(impl, x))


def encode_topk(
    xs: list[torch.Tensor],
    w_encs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    latent_biases: list[torch.Tensor],
    k: int,
    topk_type: str = "global",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select k latents for each row and compute every stream's activations there.

    All tensors have one floating dtype and are on one device; any strides (non-contiguous rows are copied).

    Args:
        xs: S tensors [B, d_s], S <= 8.
        w_encs: S tensors [N, d_s].
        pre_biases: S tensors [d_s].
        latent_biases: S tensors [N].
        k: 1..min(N, 512).
        topk_type: "global", one selection on the streams' summed pre-activations, or "local", one for each stream.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns:
        indices: int64 [B, k] (global) or [S, B, k] (local), in descending order of the pre-activation selected on, ties
            to the lowest latent, NaN above +inf. It is summed in float32 and rounded to the inputs' dtype for half
            precision (impl="torch" rounds each stream's product too); float32 products follow
            torch.get_float32_matmul_precision: "highest" is tf32x3 in Triton, anything else tf32.
        values: relu of each stream's own pre-activation there, [S, B, k], float32 (float64 for float64 inputs);
            differentiable in xs, w_encs, pre_biases and latent_biases.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Source: SPARC, arXiv 2507.06265, section 3.

    Equivalent to (global):
        h = [F.linear(x - b, w, c) for x, w, b, c in zip(xs, w_encs, pre_biases, latent_biases)]
        indices = sum(h).topk(k).indices
        values = stack([relu(h_s.gather(1, indices)) for h_s in h])
    """
    S = check_same_length("xs", xs=xs, w_encs=w_encs, pre_biases=pre_biases, latent_biases=latent_biases)
    require(S <= MAX_STREAMS, "xs", f"at most {MAX_STREAMS} streams", str(S))
    require(topk_type in ("global", "local"), "topk_type", "'global' or 'local'", repr(topk_type))
    B, n = None, None
    for s in range(S):
        check_tensor(f"xs[{s}]", xs[s], (B if B is not None else "B", "d"), like=xs[0] if s else None)
        B = xs[0].shape[0]
        require(B > 0, f"xs[{s}]", "at least one row", xs[s])
        check_tensor(f"w_encs[{s}]", w_encs[s], (n if n is not None else "N", xs[s].shape[1]), like=xs[0])
        n = w_encs[0].shape[0]
        check_tensor(f"pre_biases[{s}]", pre_biases[s], (xs[s].shape[1],), like=xs[0])
        check_tensor(f"latent_biases[{s}]", latent_biases[s], (n,), like=xs[0])
    check_int("k", k, 1, min(w_encs[0].shape[0], MAX_K), f"at most N and {MAX_K}")
    impl, lists = resolve_impl(impl, xs[0]), torch.is_grad_enabled()
    with torch.no_grad():
        centred = centre_for(xs, w_encs, pre_biases, impl)
        indices = select_latents(centred, w_encs, latent_biases, k, topk_type, impl=impl)
        encoder = EncoderParams(w_encs, pre_biases, latent_biases)
        codes = gather_codes(SparseCodes(indices, None), centred, encoder, lists, impl)
    return indices, differentiable_values(codes, None, xs, centred, encoder, impl=impl)[0].gathered


def centre_for(xs, w_encs, pre_biases, impl):
    """Centre xs; write the results side by side if the weights lie so and the library GEMM may be chosen.

    Args:
        xs: [B, d_s] each.
        w_encs: [N, d_s] each.
        pre_biases: [d_s] each.
        impl: "triton" or "torch".

    Returns:
        x - pre_bias, [B, d_s] each.
    """
    wide = wants_joint(w_encs) and joint(w_encs) is not None
    return centre(list(xs), list(pre_biases), wide, impl)


def select_latents(centred, w_encs, latent_biases, k, topk_type, *, impl):
    """Select latents once for all streams or for every stream.

    Args:
        centred: x - pre_bias, [B, d_s] each.
        w_encs: [N, d_s] each.
        latent_biases: [N] each.
        k: how many latents per row.
        topk_type: "global" or "local".
        impl: "triton" or "torch".

    Returns:
        int64 [B, k] for "global", [S, B, k] for "local".
    """
    w_encs, latent_biases = list(w_encs), list(latent_biases)
    op = select if topk_type == "global" else select_each
    return op(centred, w_encs, latent_biases, k, None, None, impl)
