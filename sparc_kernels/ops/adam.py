"""Adam step over the parameters of a stream: unit norm of decoder rows, projection and update in one pass.

`SparcAdam` calls these operators with dense gradients; `latent_adam.py` calls the device function `step` to update each
latent from its list of rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import acc_dtype, is_host_readable
from ..core.plan import launch
from ..core.registry import register
from ..launch.adam import ADAM_WIDTH, adam_config
from ..launch.device import capability, next_power_of_2

PLAIN, BEFORE, AFTER = 0, 1, 2  # decoder rows: as they are; unit norm before the step, or after it
MODES = {"before": BEFORE, "after": AFTER, None: PLAIN}  # `normalize` of SparcAdam


class AdamHyper(NamedTuple):
    """Hyperparameters that the optimizer's operators take from a parameter group."""

    normalize: int  # PLAIN, BEFORE or AFTER
    beta1: float
    beta2: float
    eps: float

    def plain(self) -> AdamHyper:
        """Return the same for a matrix whose rows are not normalised."""
        return self._replace(normalize=PLAIN)


def adam_hyper(group: dict) -> AdamHyper:
    """Read the hyperparameters of a `SparcAdam` parameter group."""
    beta1, beta2 = group["betas"]
    return AdamHyper(MODES[group["normalize"]], beta1, beta2, group["eps"])


class StepScalars(NamedTuple):
    """Scalars of one parameter from `adam_scalars_`: numbers, or 0-d tensors where reading would synchronise."""

    step_size: float | torch.Tensor  # lr / (1 - beta1^t)
    correction: float | torch.Tensor  # 1 / sqrt(1 - beta2^t)
    keep: float | torch.Tensor  # 1 - lr * weight decay
    scale: float | torch.Tensor  # multiplies the gradient
    go: float | torch.Tensor  # 0: the parameter is not updated

    @classmethod
    def of(cls, scalars: torch.Tensor) -> StepScalars:
        """Unpack one row [5] of what `adam_scalars_` wrote."""
        return cls(*(scalars.tolist() if is_host_readable(scalars) else scalars.unbind()))


DECODER = 1  # position among a stream's parameters: w_enc, the decoder's rows, pre_bias, latent_bias
SCALARS = 5  # scalars of each parameter, see `adam_scalars_`

# adam_scalars_: step counts, bias corrections, learning rate, clipping and skipping on the device


@triton.jit
def _adam_scalars_kernel(
    steps_ptr, out_ptr, lr_ptr, lr_high, lr_low, decay, active, found_inf_ptr, grad_scale_ptr, loss_ptr, square_ptr,
    max_norm, norm_ptr, P, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # float64: 1 - beta2 ** step in float32 is off by 1e-5 in the first steps
    lr = tl.full((), lr_high, tl.float64) + tl.full((), lr_low, tl.float64)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    scale = tl.full((), 1.0, tl.float64)
    go = 1.0
    if grad_scale_ptr is not None:
        scale = scale / tl.load(grad_scale_ptr).to(tl.float64)
    if found_inf_ptr is not None:
        go = tl.where(tl.load(found_inf_ptr) == 0.0, go, 0.0)
    if loss_ptr is not None:
        loss = tl.load(loss_ptr)
        go = tl.where(loss - loss == 0.0, go, 0.0)  # NaN and infinity less themselves are NaN
    if square_ptr is not None:
        norm = tl.sqrt(tl.load(square_ptr).to(tl.float64)) * scale
        tl.store(norm_ptr, norm.to(norm_ptr.dtype.element_ty))
        clip = max_norm / (norm + 1e-6)
        scale = tl.where(clip > 1.0, scale, scale * clip)
    p = tl.arange(0, PAD)
    mask = p < P
    moves = tl.where(((active >> p) & 1) != 0, go, 0.0)
    step = tl.load(steps_ptr + p, mask=mask, other=0.0) + moves
    tl.store(steps_ptr + p, step, mask=mask)
    step = tl.maximum(step.to(tl.float64), 1.0)
    correction1 = 1.0 - tl.exp2(step * tl.full((), LOG_BETA1, tl.float64))
    correction2 = 1.0 - tl.exp2(step * tl.full((), LOG_BETA2, tl.float64))
    out = out_ptr + p * 5
    zero = tl.zeros((PAD,), ACC)
    tl.store(out, (lr / correction1).to(ACC), mask=mask)
    tl.store(out + 1, (1.0 / tl.sqrt(correction2)).to(ACC), mask=mask)
    tl.store(out + 2, zero + (1.0 - lr * decay).to(ACC), mask=mask)
    tl.store(out + 3, zero + scale.to(ACC), mask=mask)
    tl.store(out + 4, moves.to(ACC), mask=mask)


def _log2(beta):
    return math.log2(beta) if beta > 0 else -1e4  # 2 ** -1e4 is 0


def _adam_scalars_triton(
    *, steps, out, lr, lr_value, decay, active, found_inf, grad_scale, loss, square, max_norm, norm, beta1, beta2
):  # fmt: skip
    high = float(np.float32(lr_value))  # Triton rounds numbers to float32
    launch(_adam_scalars_kernel, (1,))(
        steps, out, lr, high, lr_value - high, decay, active, found_inf, grad_scale, loss, square, max_norm, norm,
        len(steps), LOG_BETA1=_log2(beta1), LOG_BETA2=_log2(beta2), PAD=next_power_of_2(len(steps)),
        ACC=tl_dtype(out.dtype), num_warps=1,
    )  # fmt: skip


def _adam_scalars_torch(
    *, steps, out, lr, lr_value, decay, active, found_inf, grad_scale, loss, square, max_norm, norm, beta1, beta2
):  # fmt: skip
    float64 = dict(dtype=torch.float64, device=steps.device)
    lr = torch.full((), lr_value, **float64) if lr is None else lr.double()
    scale, go = torch.ones((), **float64), torch.ones((), dtype=torch.bool, device=steps.device)
    if grad_scale is not None:
        scale = scale / grad_scale.double().squeeze()
    if found_inf is not None:
        go = go & (found_inf == 0).squeeze()
    if loss is not None:
        go = go & loss.isfinite()
    if square is not None:
        total = square.double().sqrt() * scale
        norm.copy_(total)
        scale = scale * (max_norm / (total + 1e-6)).clamp(max=1.0)
    P = len(steps)
    moves = go & ((torch.full_like(steps, active, dtype=torch.int64) >> torch.arange(P, device=steps.device)) & 1)
    steps.add_(moves)
    step = steps.double().clamp(min=1)
    columns = [
        lr / (1 - beta1**step), (1 - beta2**step).rsqrt(), (1 - lr * decay).expand(P), scale.expand(P), moves,
    ]  # fmt: skip
    out.copy_(torch.stack([c.double() for c in columns], 1))


adam_scalars_ = register(
    "adam_scalars_",
    "(Tensor(a!) steps, Tensor(b!) out, Tensor? lr, float lr_value, float decay, int active, Tensor? found_inf,"
    " Tensor? grad_scale, Tensor? loss, Tensor? square, float max_norm, Tensor(c!)? norm, float beta1, float beta2,"
    " str impl) -> ()",
    torch_impl=_adam_scalars_torch,
    triton_impl=_adam_scalars_triton,
    fake=lambda **_: None,
)
adam_scalars_.__doc__ = """Count one step and compute the scalars of the parameters' updates.

Args:
    steps: float32 [P], incremented for every parameter that is updated.
    out: [P, 5] in the accumulator dtype: lr / (1 - beta1^step); 1 / sqrt(1 - beta2^step); 1 - lr * decay; the factor of
        the gradients; 1 if the parameter is updated in this step, else 0.
    lr: 0-d, or None for lr_value.
    lr_value: learning rate where lr is None.
    decay: decoupled weight decay.
    active: bit p is set if parameter p has a gradient.
    found_inf: one element; the step is skipped unless it is 0. None: not checked.
    grad_scale: one element, the loss scale that the gradients carry. None: 1.
    loss: 0-d; the step is skipped unless it is finite. None: not checked.
    square: 0-d, the sum of all squared gradients before unscaling; None: no clipping.
    max_norm: with square, the norm to which gradients are clipped, as by torch.nn.utils.clip_grad_norm_.
    norm: 0-d, with square receives the norm before clipping.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    impl: "triton" or "torch".
"""


# adam_stream_: the parameters of one stream, from gradients in memory


@triton.jit
def divide(x, y):
    """x / y, correctly rounded in float32 too."""
    if x.dtype == tl.float32:
        z = tl.div_rn(x, y)
    else:
        z = x / y
    return z


@triton.jit
def root(x):
    """sqrt(x), correctly rounded in float32 too."""
    if x.dtype == tl.float32:
        z = tl.sqrt_rn(x)
    else:
        z = tl.sqrt(x)
    return z


@triton.jit
def unit(w, ACC: tl.constexpr):
    """w / (|w| + 1e-8) of one row."""
    norm = root(tl.sum(w * w, 0)) + tl.full((), 1e-8, ACC)
    return divide(w, norm + tl.zeros_like(w))


@triton.jit
def step(
    w, g, m, v, mask, scalars_ptr, NORMALIZE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weights and moments of one row after the step; g is already scaled."""
    if NORMALIZE == 1:
        w = unit(w, ACC)
    if NORMALIZE != 0:
        g -= tl.sum(w * g, 0) * w
    m += (g - m) * tl.full((), 1 - BETA1, ACC)
    v += (g * g - v) * tl.full((), 1 - BETA2, ACC)
    deviation = root(v) * tl.load(scalars_ptr + 1).to(ACC) + tl.full((), EPS, ACC)
    w = w * tl.load(scalars_ptr + 2).to(ACC) - tl.load(scalars_ptr).to(ACC) * divide(m, deviation)
    if NORMALIZE == 2:
        w = unit(tl.where(mask, w, 0.0), ACC)
    return w, m, v


@triton.jit
def _move(
    w_ptr, grad_ptr, m_ptr, v_ptr, at, mask, scalars_ptr, NORMALIZE: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if tl.load(scalars_ptr + 4) != 0.0:
        w = tl.load(w_ptr + at, mask=mask, other=0.0).to(ACC)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(ACC) * tl.load(scalars_ptr + 3).to(ACC)
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        w, m, v = step(w, g, m, v, mask, scalars_ptr, NORMALIZE, BETA1, BETA2, EPS, ACC)
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)


@triton.jit
def _adam_stream_kernel(
    enc_ptr, denc_ptr, enc_m_ptr, enc_v_ptr, dec_ptr, ddec_ptr, dec_m_ptr, dec_v_ptr,
    pre_ptr, dpre_ptr, pre_m_ptr, pre_v_ptr, latent_ptr, dlatent_ptr, latent_m_ptr, latent_v_ptr,
    scalars_ptr, N, D, NORMALIZE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update row n of the encoder with its latent bias, or of the decoder; the pre-bias is row N of the encoder.

    A parameter whose gradient is None is not updated.
    """
    n = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    at = n * D + cols
    if tl.program_id(1) == 0:
        if n < N:
            if denc_ptr is not None:
                _move(enc_ptr, denc_ptr, enc_m_ptr, enc_v_ptr, at, mask, scalars_ptr, 0, BETA1, BETA2, EPS, ACC)
            if dlatent_ptr is not None:
                one = n + tl.arange(0, 1)
                scalars = scalars_ptr + 15
                _move(
                    latent_ptr, dlatent_ptr, latent_m_ptr, latent_v_ptr, one, one >= 0, scalars, 0, BETA1, BETA2, EPS,
                    ACC,
                )  # fmt: skip
        else:
            if dpre_ptr is not None:
                scalars = scalars_ptr + 10
                _move(pre_ptr, dpre_ptr, pre_m_ptr, pre_v_ptr, cols, mask, scalars, 0, BETA1, BETA2, EPS, ACC)
    else:
        if ddec_ptr is not None:
            if n < N:
                scalars = scalars_ptr + 5
                _move(dec_ptr, ddec_ptr, dec_m_ptr, dec_v_ptr, at, mask, scalars, NORMALIZE, BETA1, BETA2, EPS, ACC)


def _adam_stream_triton(*, params, grads, exp_avgs, exp_avg_sqs, scalars, normalize, beta1, beta2, eps):
    n, d = params[0].shape
    if d > ADAM_WIDTH or not all(t.is_contiguous() for t in (*params, *exp_avgs, *exp_avg_sqs)):
        return _adam_stream_torch(
            params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, scalars=scalars,
            normalize=normalize, beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip
    config = adam_config(d)
    grads = [None if g is None else g.contiguous() for g in grads]
    if all(grads[i] is None for i in (0, DECODER, 3)):
        n = 0  # the pre-bias alone
    launch(_adam_stream_kernel, (n + 1, 1 if grads[DECODER] is None else 2))(
        *(t for four in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True) for t in four), scalars, n, d,
        NORMALIZE=normalize, BETA1=beta1, BETA2=beta2, EPS=eps, BLOCK_D=config.block_d, ACC=tl_dtype(exp_avgs[0].dtype),
        num_warps=config.num_warps, **config.registers(capability(params[0].device)),
    )  # fmt: skip
    return None


CACHE_BLOCK_ELEMENTS = 2**18  # elements of a tensor per block of the torch path on a CPU: all five stay in cache
THREAD_ELEMENTS = 2**15  # torch gives no thread fewer


def _adam_stream_torch(*, params, grads, exp_avgs, exp_avg_sqs, scalars, normalize, beta1, beta2, eps):
    for i, (w, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if g is not None:
            mode = normalize if i == DECODER else PLAIN
            step_blocks_torch([w, m, v], g, StepScalars.of(scalars[i]), AdamHyper(mode, beta1, beta2, eps))


def row_blocks(w):
    """Split the first dimension into slices that stay in cache on a CPU; one slice elsewhere."""
    size = len(w)
    if is_host_readable(w):
        elements = max(CACHE_BLOCK_ELEMENTS, torch.get_num_threads() * THREAD_ELEMENTS)
        size = max(1, elements // max(w[0].numel(), 1))
    return [slice(i, i + size) for i in range(0, len(w), size)]


def step_blocks_torch(row: list[torch.Tensor], g: torch.Tensor, scalars: StepScalars, hyper: AdamHyper) -> None:
    """Run `step_torch` on blocks of rows that stay in cache, or in one pass where no operand is read twice."""
    w, m, v = row
    one_pass = hyper.normalize == PLAIN and w.dtype == m.dtype and w.is_contiguous()
    for rows in [slice(None)] if one_pass else row_blocks(w):
        step_torch([w[rows], m[rows], v[rows]], g[rows], scalars, hyper)


_fused = getattr(torch, "_fused_adam_", None)  # private operator behind torch.optim.Adam(fused=True)
_LATE_STEP = torch.full((), 2.0**60, dtype=torch.float32, device="cpu")  # its own bias corrections are 1 there


def step_torch(row: list[torch.Tensor], g: torch.Tensor, scalars: StepScalars, hyper: AdamHyper) -> None:
    """Update some rows in place.

    Args:
        row: weights and both moments of the rows.
        g: gradient of the rows, not yet scaled.
        scalars: of their parameter.
        hyper: of their parameter group.
    """
    w, m, v = row
    step_size, correction, keep, scale, go = scalars
    normalize, beta1, beta2, eps = hyper
    on_host = isinstance(go, float)
    if on_host and go == 0:
        return
    moment_dtype = m.dtype
    out = w
    if w.dtype != moment_dtype:
        w, g = w.to(moment_dtype), g.to(moment_dtype)
    if isinstance(go, torch.Tensor):  # go may be 0: then every factor leaves the rows unchanged
        g = torch.where(go != 0, g * scale, 0.0)
        step_size, keep = step_size * go, torch.where(go != 0, keep, 1.0)
    elif scale != 1:
        g = g * scale
    weight1, weight2 = (1 - beta1, 1 - beta2) if on_host else ((1 - beta1) * go, (1 - beta2) * go)
    if normalize == BEFORE:
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True).add_(1e-8)
        w = w.div_(torch.where(go != 0, norm, 1.0) if isinstance(go, torch.Tensor) else norm)
    if normalize != PLAIN:
        g = torch.addcmul(g, (w * g).sum(1, keepdim=True), w, value=-1)
    if not on_host or keep != 1:
        w.mul_(keep)
    dense = all(t.is_contiguous() for t in (w, m, v))
    if on_host and dense and w.device.type == "cpu" and _fused is not None:  # one pass
        _fused(
            [w], [g.contiguous()], [m], [v], [], [_LATE_STEP], lr=step_size / correction, beta1=beta1, beta2=beta2,
            weight_decay=0.0, eps=eps / correction, amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
        )  # fmt: skip
    else:
        m.lerp_(g, weight1)
        v.lerp_(g * g, weight2)
        change = torch.div(m, torch.sqrt(v).mul_(correction).add_(eps))
        w.sub_(change.mul_(step_size))
    if normalize == AFTER:
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True).add_(1e-8)
        w.div_(torch.where(go != 0, norm, 1.0) if isinstance(go, torch.Tensor) else norm)
    if out is not w:
        out.copy_(w)


adam_stream_ = register(
    "adam_stream_",
    "(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor scalars,"
    " int normalize, float beta1, float beta2, float eps, str impl) -> ()",
    torch_impl=_adam_stream_torch,
    triton_impl=_adam_stream_triton,
    fake=lambda **_: None,
)
adam_stream_.__doc__ = """Update the parameters of one stream by one Adam step.

Args:
    params: w_enc [N, d], the decoder's rows [N, d], pre_bias [d], latent_bias [N].
    grads: their gradients; a parameter whose gradient is None is not updated.
    exp_avgs: first moments, in the accumulator dtype.
    exp_avg_sqs: second moments, in the accumulator dtype.
    scalars: [4, 5], rows that `adam_scalars_` wrote.
    normalize: PLAIN; BEFORE: divide decoder rows by (norm + 1e-8), subtract <w, g> w from their gradient, step; AFTER:
        subtract, step, divide.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the denominator.
    impl: "triton" or "torch"; rows wider than 8192 and non-contiguous tensors take the torch path in both.
"""


# grad_square: for clipping


@triton.jit
def _grad_square_kernel(
    dec_ptr, denc_ptr, ddec_ptr, dpre_ptr, dlatent_ptr, out_ptr, N, D, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the squares of one row of `_adam_stream_kernel`: [N + 1] of the encoder, [N + 1] of the decoder."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    at = n * D + cols
    total = tl.zeros((), ACC)
    if tl.program_id(1) == 0:
        if n < N:
            if denc_ptr is not None:
                g = tl.load(denc_ptr + at, mask=mask, other=0.0).to(ACC)
                total += tl.sum(g * g, 0)
            if dlatent_ptr is not None:
                latent = tl.load(dlatent_ptr + n).to(ACC)
                total += latent * latent
        else:
            if dpre_ptr is not None:
                pre = tl.load(dpre_ptr + cols, mask=mask, other=0.0).to(ACC)
                total += tl.sum(pre * pre, 0)
    else:
        if ddec_ptr is not None:
            if n < N:
                dec = tl.load(ddec_ptr + at, mask=mask, other=0.0).to(ACC)
                if NORMALIZE != 0:
                    w = tl.load(dec_ptr + at, mask=mask, other=0.0).to(ACC)
                    if NORMALIZE == 1:
                        w = unit(w, ACC)
                    dec -= tl.sum(w * dec, 0) * w
                total += tl.sum(dec * dec, 0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * (N + 1) + n, total)


def _grad_square_triton(dec, grads, normalize):
    n, d = dec.shape
    if d > ADAM_WIDTH or not dec.is_contiguous():
        return _grad_square_torch(dec, grads, normalize)
    config, acc = adam_config(d), acc_dtype(dec.dtype)
    out = torch.empty(2, n + 1, device=dec.device, dtype=acc)
    grads = [None if g is None else g.contiguous() for g in grads]
    launch(_grad_square_kernel, (n + 1, 2))(
        dec, *grads, out, n, d, NORMALIZE=normalize, BLOCK_D=config.block_d, ACC=tl_dtype(acc),
        num_warps=config.num_warps,
    )  # fmt: skip
    return out.sum()


def _grad_square_torch(dec, grads, normalize):
    acc = acc_dtype(dec.dtype)
    total = torch.zeros((), device=dec.device, dtype=acc)
    for i, g in enumerate(grads):
        for rows in row_blocks(g) if g is not None else ():
            part = g[rows].to(acc)
            if i == DECODER and normalize != PLAIN:
                w = dec[rows].to(acc)
                if normalize == BEFORE:
                    w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).add_(1e-8)
                part = torch.addcmul(part, (w * part).sum(1, keepdim=True), w, value=-1)
            total += part.square().sum()
    return total


grad_square = register(
    "grad_square",
    "(Tensor dec, Tensor?[] grads, int normalize, str impl) -> Tensor",
    torch_impl=_grad_square_torch,
    triton_impl=_grad_square_triton,
    fake=lambda dec, grads, normalize: dec.new_empty((), dtype=acc_dtype(dec.dtype)),
)
grad_square.__doc__ = """Sum of squares of a stream's gradients, after the projection of `adam_stream_`.

Args:
    dec: the decoder's rows [N, d].
    grads: gradients of w_enc, the decoder's rows, pre_bias and latent_bias, each may be None.
    normalize: as in `adam_stream_`.
    impl: "triton" or "torch".

Returns:
    0-d in the accumulator dtype.
"""


def rows_of(tensor: torch.Tensor | None, place: int):
    """View the decoder's [d, N], its gradient or moments as rows [N, d]; other tensors of a stream unchanged.

    Args:
        tensor: one of the stream's tensors, or None.
        place: its position among the stream's parameters.
    """
    return tensor.t() if tensor is not None and place == DECODER else tensor
