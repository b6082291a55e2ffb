"""Values of the selected latents with their gradients, and the public `encode_topk` and `values_at`.

What is selected carries no gradient (`selection.py`). Values are gathered afterwards in fp32, per stream, from the
selected rows of W_enc alone; they are what carries gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..core._triton import INTERPRETED, tl, triton
from ..core.numerics import acc_dtype
from ..core.registry import register, resolve_impl
from ..core.side_stream import Beside
from ..core.validation import check_indices, check_int, check_inverse, check_same_length, check_tensor, require
from ..launch.budgets import MAX_K, MAX_STREAMS, SCRATCH_BYTES
from ..launch.device import cdiv, next_power_of_2
from .bias_grads import pre_bias_grads
from .gather import gather_dot_torch, gather_sum, launch_gather
from .inverse_index import InverseIndex, inverse_index_op, inverse_sizes, lists_of
from .joint import joint, wants_joint
from .latent_reduce import latent_reduce_
from .selection import select


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
    block_b, block_d = (2, 16) if INTERPRETED else (4, 1024)
    _centre_kernel[(cdiv(B, block_b), cdiv(max(widths), block_d), len(xs))](
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
centre.__doc__ = """xs[s] - biases[s], [B, d_s]; with `wide` as columns of one [B, D], side by side."""


@triton.jit
def _finish_values_kernel(
    part_ptrs, bias_ptrs, idx_ptr, count_ptr, values_ptr, slabs, stride_idx, stride_c, B, K, N,
    S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """relu(sum over the slabs + bias) of one row of one stream."""
    b = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    exists = offs_k < K
    if count_ptr is not None:
        exists = exists & (offs_k < tl.load(count_ptr + stream * stride_c))
    latent = tl.load(idx_ptr + stream.to(tl.int64) * stride_idx + b * K + offs_k, mask=exists, other=0)
    inside = exists & (latent >= 0) & (latent < N)  # an id outside has made its sum NaN already
    for s in tl.static_range(S):
        if stream == s:
            pre = tl.load(part_ptrs[s] + b * K + offs_k, mask=exists, other=0.0)
            for slab in range(1, slabs[s]):
                pre += tl.load(part_ptrs[s] + (slab * B + b) * K + offs_k, mask=exists, other=0.0)
            pre += tl.load(bias_ptrs[s] + latent, mask=inside, other=0.0).to(pre.dtype)
            value = tl.where(pre <= 0.0, 0.0, pre)  # NaN stays
            tl.store(values_ptr + (s * B + b) * K + offs_k, tl.where(exists, value, 0.0), mask=offs_k < K)


def _gather_values_triton(*, indices, centred, w_encs, latent_biases, count, lists):
    S, (B, k), n = len(centred), indices.shape[-2:], w_encs[0].shape[0]
    # the lists depend on the ids alone: a dozen short kernels that hide behind the gathers
    beside, inverse = Beside(indices.device, enabled=lists), _no_lists(indices)
    if lists:
        inverse, _ = beside.run(lambda: _lists(indices, n, count, "triton"))
    indices, shared = indices.contiguous(), indices.dim() == 2
    values = torch.empty(S, B, k, device=indices.device, dtype=acc_dtype(centred[0].dtype))
    latent_biases = [c.contiguous() for c in latent_biases]
    parts, first = [], 0
    for s in range(S):
        idx = indices if shared else indices[s]
        limit = None if count is None else count[s]
        parts.append(launch_gather(idx, None, w_encs[s], None, centred[s][None], count=limit, dot=True)[1])
        held = sum(part.numel() * part.element_size() for part in parts)
        if s < S - 1 and held < SCRATCH_BYTES:
            continue
        _finish_values_kernel[(B, len(parts))](
            tuple(parts), tuple(latent_biases[first : s + 1]), idx if shared else indices[first:],
            None if count is None else count[first:],
            values[first:], tuple(part.shape[0] for part in parts), 0 if shared else B * k,
            0 if count is None else count.stride(0), B, k, n,
            S=len(parts), BLOCK_K=next_power_of_2(k), num_warps=1,
        )  # fmt: skip
        parts, first = [], s + 1
    beside.join()
    return values, *inverse


def _lists(indices, n, count, impl):
    return inverse_index_op(indices, 1 if indices.dim() == 2 else len(indices), n, count, impl)


def _no_lists(indices):
    return tuple(indices.new_empty(0, dtype=torch.int32) for _ in range(3))


def _gather_values_torch(*, indices, centred, w_encs, latent_biases, count, lists):
    values = []
    for s, (x, w, bias) in enumerate(zip(centred, w_encs, latent_biases, strict=True)):
        idx = indices if indices.dim() == 2 else indices[s]
        pre = gather_dot_torch(idx, w, x[None], None if count is None else count[s])[0]
        value = torch.relu(pre + bias.to(pre.dtype)[idx])
        if count is not None:
            value = torch.where(torch.arange(value.shape[1], device=x.device) < count[s], value, 0.0)
        values.append(value)
    inverse = _lists(indices, w_encs[0].shape[0], count, "torch") if lists else _no_lists(indices)
    return torch.stack(values), *inverse


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
gather_values.__doc__ = """relu(<w_encs[s][indices], centred[s]> + latent_biases[s][indices]) of every stream.

Args:
    indices: int64 [B, k] for all streams, or [S, B, k].
    centred: x - pre_bias, [B, d_s] each.  w_encs: [N, d_s] each.  latent_biases: [N] each.
    count: int32 [S], the columns of indices that exist for each stream (all when None); the others get 0.
    lists: whether to make the inverse index too, at the same time.
    impl: "triton" or "torch".

Returns: values [S, B, k] in the accumulator dtype; order, offsets and ids of `inverse_index_op` for the columns that
exist, empty without `lists`.
"""


class Selection(NamedTuple):
    """Latents chosen for every row of a batch, by all streams together or by each of S."""

    indices: torch.Tensor  # int64 [B, k], or [S, B, k]
    count: torch.Tensor | None = None  # int32 [S]: only the first `count[s]` columns exist; None: all
    order: torch.Tensor | None = None  # InverseIndex of the columns that exist, of each group: [1 or S, ...]
    offsets: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    def with_inverse(self, n_latents: int, impl: str) -> Selection:
        if self.order is not None:
            return self
        return Selection(self.indices, self.count, *_lists(self.indices, n_latents, self.count, impl))

    def of(self, s: int) -> torch.Tensor:
        """The indices of one stream, [B, k]."""
        return self.indices if self.indices.dim() == 2 else self.indices[s]

    def lists(self, s: int) -> InverseIndex:
        return lists_of(self[2:], s % len(self.order))


def values_and_lists(selection, centred, w_encs, latent_biases, lists, impl) -> tuple[torch.Tensor, Selection]:
    """`gather_values` of a Selection, which gets its inverse index if it is asked for."""
    indices, count = selection[:2]
    values, *inverse = gather_values(indices, centred, list(w_encs), list(latent_biases), count, lists, impl)
    return values, Selection(indices, count, *inverse) if lists else selection


class Values(torch.autograd.Function):
    """Gives the values [S, B, k] that `gather_values` made their gradients, to everything but the indices.

    Takes them, AuxK's values [S, B, auxk] or None, and flat: the parts of the Selection, of AuxK's if there is one,
    then for the S streams xs, w_encs, pre_biases, latent_biases and centred inputs. AuxK shares the gradients' buffers:
    its sums are added in place to the few latents that it chose.
    """

    @staticmethod
    def forward(ctx, values, aux_values, impl, S, *tensors):
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.S = impl, S
        ctx.save_for_backward(values, aux_values, *tensors)
        return values, aux_values

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalues, daux):
        S, impl = ctx.S, ctx.impl
        values, aux_values, *tensors = ctx.saved_tensors
        size = len(Selection._fields)
        n = size if aux_values is None else 2 * size
        w_encs, pre_biases, latent_biases, centred = (tensors[i : i + S] for i in range(n + S, n + 5 * S, S))
        uses = []
        for i, (v, dv) in enumerate(((values, dvalues), (aux_values, daux))):
            if dv is not None:
                selection = Selection(*tensors[i * size : (i + 1) * size]).with_inverse(len(w_encs[0]), impl)
                uses.append((selection, v, dv))
        needs = ctx.needs_input_grad[4 + n :]
        dxs, dws, dbs, dcs, sums = ([None] * S for _ in range(5))
        for s in range(S) if uses else ():
            w, one = w_encs[s], slice(s, s + 1)
            if needs[S + s] or needs[2 * S + s] or needs[3 * S + s]:
                dw, dc = torch.empty_like(w, memory_format=torch.contiguous_format), latent_biases[s].new_empty(len(w))
                for i, (selection, v, dv) in enumerate(uses):
                    mat, k = centred[s][None], v.shape[2]
                    latent_reduce_(dw, dc, *selection.lists(s), dv[one], None, v[one], mat, k, i > 0, impl)
                dws[s] = dw if needs[S + s] else None
                dcs[s] = dc if needs[3 * S + s] else None
                sums[s] = dc
            if needs[s]:
                for selection, v, dv in uses:
                    dpre = torch.where(v[one] <= 0, 0.0, dv[one])
                    part = gather_sum(selection.of(s), dpre, w, None, impl)[0]
                    dxs[s] = part if dxs[s] is None else dxs[s] + part
        wanted = [s for s in range(S) if uses and needs[2 * S + s]]
        if wanted:
            args = ([group[s] for s in wanted] for group in (w_encs, sums, pre_biases))
            for s, db in zip(wanted, pre_bias_grads(*args, impl), strict=True):
                dbs[s] = db
        return *[None] * (4 + n), *dxs, *dws, *dbs, *dcs, *[None] * S


def differentiable_values(xs, w_encs, pre_biases, latent_biases, centred, selection, values, aux, aux_values, impl):
    """values [S, B, k] of a Selection and AuxK's [S, B, auxk] or None, as `gather_values` made them, with gradients."""
    flat = [*selection, *(aux or ()), *xs, *w_encs, *pre_biases, *latent_biases, *centred]
    return Values.apply(values, aux_values, impl, len(xs), *flat)


def values_of(x, w_enc, pre_bias, latent_bias, selection, impl):
    """`values_at` of a Selection, on unchecked arguments."""
    with torch.no_grad():
        centred = centre([x], [pre_bias], False, impl)
        values, _ = values_and_lists(selection, centred, [w_enc], [latent_bias], False, impl)
    args = [x], [w_enc], [pre_bias], [latent_bias], centred, selection, values, None, None, impl
    return differentiable_values(*args)[0][0]


def values_at(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    pre_bias: torch.Tensor,
    latent_bias: torch.Tensor,
    indices: torch.Tensor,
    inverse: InverseIndex | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Activations of one stream at given latents; the differentiable half of `encode_topk`.

    Args:
        x: [B, d].  w_enc: [N, d].  pre_bias: [d].  latent_bias: [N]; all of one dtype, on one device.
        indices: int64 [B, k], ids in 0..N-1. Checked on a CPU; on a GPU an id outside gives NaN with Triton and torch's
            own device assert with impl="torch".
        inverse: `inverse_index(indices, N)` when the caller already has it; made in the backward otherwise.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Returns: values [B, k], float32 (float64 for float64 inputs).

    Equivalent to: `relu(F.linear(x - pre_bias, w_enc, latent_bias).gather(1, indices))`
    """
    check_tensor("x", x, ("B", "d"))
    check_tensor("w_enc", w_enc, ("N", x.shape[1]), like=x)
    check_tensor("pre_bias", pre_bias, (x.shape[1],), like=x)
    check_tensor("latent_bias", latent_bias, (w_enc.shape[0],), like=x)
    check_indices("indices", indices, (x.shape[0], "k"), w_enc.shape[0], x.device)
    check_inverse("inverse", inverse, indices, inverse_sizes(indices.numel(), w_enc.shape[0]))
    selection = Selection(indices, None, *(part[None] for part in inverse or ()))
    return values_of(x, w_enc, pre_bias, latent_bias, selection, resolve_impl(impl, x))


def encode_topk(
    xs: list[torch.Tensor],
    w_encs: list[torch.Tensor],
    pre_biases: list[torch.Tensor],
    latent_biases: list[torch.Tensor],
    k: int,
    topk_type: str = "global",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k latents that each row selects and every stream's activations there.

    Args:
        xs: S tensors [B, d_s].  w_encs: S tensors [N, d_s].  pre_biases: S tensors [d_s].  latent_biases: S tensors
            [N]. One floating dtype, one device; S <= 8. Any strides (rows that are not contiguous are copied).
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

    Raises: ValueError naming the argument.  Source: SPARC, arXiv 2507.06265, section 3.

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
    check_int("k", k, 1, min(n, MAX_K), f"at most N and {MAX_K}")
    impl, lists = resolve_impl(impl, xs[0]), torch.is_grad_enabled()
    with torch.no_grad():
        centred = centre_for(xs, w_encs, pre_biases, impl)
        indices = select_latents(centred, w_encs, latent_biases, k, topk_type, impl)
        values, selection = values_and_lists(Selection(indices), centred, w_encs, latent_biases, lists, impl)
    args = xs, w_encs, pre_biases, latent_biases, centred, selection, values, None, None, impl
    return indices, differentiable_values(*args)[0]


def centre_for(xs, w_encs, pre_biases, impl):
    """xs less their biases; side by side where the weights are and the library may be chosen."""
    wide = wants_joint(w_encs) and joint(w_encs) is not None
    return centre(list(xs), list(pre_biases), wide, impl)


def select_latents(centred, w_encs, latent_biases, k, topk_type, impl):
    """`select` for "global", [B, k], or for every stream, [S, B, k]."""
    w_encs, latent_biases = list(w_encs), list(latent_biases)
    if topk_type == "global":
        return select(centred, w_encs, latent_biases, k, None, None, impl)
    streams = zip(centred, w_encs, latent_biases, strict=True)
    return torch.stack([select([x], [w], [c], k, None, None, impl) for x, w, c in streams])
