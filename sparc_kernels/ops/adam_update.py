"""Adam step of all parameters from their gradients, clipped by their norm; what `SparcAdam` runs."""

from __future__ import annotations

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype
from ..core.plan import Planned
from ..core.recorder import call, launch
from ..core.registry import register
from ..launch.adam import ADAM_WIDTH, adam_config
from .adam import BEFORE, DECODER, PLAIN, adam_stream_, alike, row_blocks, rows_of, tuples, unit
from .gather import pick
from .step_scalars import adam_scalars_


@triton.jit
def _grad_square_kernel(
    dec_ptrs, denc_ptrs, ddec_ptrs, dpre_ptrs, dlatent_ptrs, widths, places, out_ptr, N, T: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the squares of one row of `_adam_stream_kernel` into out [places, 2, N + 1]."""
    n = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(2)
    D = pick(widths, stream, T)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    at = n * D + cols
    total = tl.zeros((), ACC)
    if tl.program_id(1) == 0:
        if n < N:
            if denc_ptrs is not None:
                g = tl.load(pick(denc_ptrs, stream, T) + at, mask=mask, other=0.0).to(ACC)
                total += tl.sum(g * g, 0)
            if dlatent_ptrs is not None:
                latent = tl.load(pick(dlatent_ptrs, stream, T) + n).to(ACC)
                total += latent * latent
        else:
            if dpre_ptrs is not None:
                pre = tl.load(pick(dpre_ptrs, stream, T) + cols, mask=mask, other=0.0).to(ACC)
                total += tl.sum(pre * pre, 0)
    else:
        if ddec_ptrs is not None:
            if n < N:
                dec = tl.load(pick(ddec_ptrs, stream, T) + at, mask=mask, other=0.0).to(ACC)
                if NORMALIZE != 0:
                    w = tl.load(pick(dec_ptrs, stream, T) + at, mask=mask, other=0.0).to(ACC)
                    if NORMALIZE == 1:
                        w = unit(w, ACC)
                    dec -= tl.sum(w * dec, 0) * w
                total += tl.sum(dec * dec, 0)
    row = (pick(places, stream, T) * 2 + tl.program_id(1)).to(tl.int64)
    tl.store(out_ptr + row * (N + 1) + n, total)


def _grad_square_triton(decs, grads, normalize):
    (n, _), acc, device = decs[0].shape, acc_dtype(decs[0].dtype), decs[0].device
    fours = [grads[i : i + 4] for i in range(0, len(grads), 4)]
    if any(dec.shape[1] > ADAM_WIDTH or not dec.is_contiguous() for dec in decs):
        return _grad_square_torch(decs, grads, normalize)
    out = torch.empty(len(decs), 2 * (n + 1), device=device, dtype=acc)
    streams = [
        (place, dec, *(None if g is None else g.contiguous() for g in four))
        for place, (dec, four) in enumerate(zip(decs, fours, strict=True))
    ]

    def key(stream):
        return tuple(None if t is None else t.dtype for t in stream[1:])

    for group in alike(streams, lambda stream: stream[1].shape[1], key)[0]:
        places, *pointers = tuples(group)
        config = adam_config(group[0][1].shape[1])
        launch(_grad_square_kernel, (n + 1, 2, len(group)))(
            *pointers, tuple(dec.shape[1] for dec in pointers[0]), places, out, n, T=len(group), NORMALIZE=normalize,
            BLOCK_D=config.block_d, ACC=tl_dtype(acc), num_warps=config.num_warps,
        )  # fmt: skip
    return out.sum(1).sum()


def _grad_square_torch(decs, grads, normalize):
    totals = []
    for s, dec in enumerate(decs):
        acc = acc_dtype(dec.dtype)
        total = torch.zeros((), device=dec.device, dtype=acc)
        for i, g in enumerate(grads[4 * s : 4 * s + 4]):
            for rows in row_blocks(g) if g is not None else ():
                part = g[rows].to(acc)
                if i == DECODER and normalize != PLAIN:
                    w = dec[rows].to(acc)
                    if normalize == BEFORE:
                        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).add_(1e-8)
                    part = torch.addcmul(part, (w * part).sum(1, keepdim=True), w, value=-1)
                total += part.square().sum()
        totals.append(total)
    return torch.stack([total.to(totals[0]) for total in totals]).sum()


grad_square = register(
    "grad_square",
    "(Tensor[] decs, Tensor?[] grads, int normalize, str impl) -> Tensor",
    torch_impl=_grad_square_torch,
    triton_impl=_grad_square_triton,
    fake=lambda decs, grads, normalize: decs[0].new_empty((), dtype=acc_dtype(decs[0].dtype)),
)
grad_square.__doc__ = """Sum of squares of all gradients, after the projection of `adam_stream_`.

Args:
    decs: the decoders' rows [N, d].
    grads: gradients of w_enc, the decoder's rows, pre_bias and latent_bias of the first stream, each may be None; then
        those of the next.
    normalize: as in `adam_stream_`.
    impl: "triton" or "torch".

Returns:
    0-d in the accumulator dtype.
"""


@Planned
def adam_update_(tensors, hyper, active, max_norm, impl, lr_value, decay):
    """Count a step, clip and update all parameters from their gradients; for `SparcAdam`.

    Args:
        tensors: parameters, gradients (or None), first and second moments of P parameters, four of each stream, the
            decoders' [d, N]; then steps, scalars, lr, found_inf, grad_scale, norm and square as `adam_scalars_` takes
            them; without square it is computed here, to clip.
        hyper: AdamHyper.
        active: as in `adam_scalars_`.
        max_norm: to clip gradients to; None: not clipped.
        impl: "triton" or "torch".
        lr_value: learning rate where lr is None.
        decay: decoupled weight decay.
    """
    P = (len(tensors) - 7) // 4
    params, grads, exp_avgs, exp_avg_sqs = (rows_of(tensors[i : i + P]) for i in range(0, 4 * P, P))
    steps, scalars, lr, found_inf, grad_scale, norm, square = tensors[4 * P :]
    if max_norm is not None and square is None:
        square = grad_square(params[DECODER::4], grads, hyper.normalize, impl).to(scalars)
    call(
        adam_scalars_, steps, scalars, lr, lr_value, decay, active, found_inf, grad_scale, None, square,
        max_norm or 0.0, norm, hyper.beta1, hyper.beta2, impl,
    )  # fmt: skip
    adam_stream_(params, grads, exp_avgs, exp_avg_sqs, scalars, *hyper, impl)
    return []
