"""Adam step over the parameters of a stream: unit norm of decoder rows, projection and update in one pass.

`SparcAdam` calls these operators with dense gradients; `latent_adam.py` calls the device function `step` to update each
latent from its list of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..core._triton import INTERPRETED, tl, tl_dtype, triton
from ..core.numerics import acc_dtype, is_host_readable
from ..core.plan import Planned
from ..core.recorder import call, derived, launch
from ..core.registry import register
from ..launch.adam import ADAM_WIDTH, adam_config
from ..launch.budgets import MAX_STREAMS
from ..launch.device import capability, next_power_of_2
from .gather import pick

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


def _to_float32(x: float) -> float:
    return float(np.float32(x))


def _beyond_float32(x: float) -> float:
    return x - _to_float32(x)


def _log2(beta):
    return math.log2(beta) if beta > 0 else -1e4  # 2 ** -1e4 is 0


def number_as_launched(value: float, impl: str) -> float:
    """Return the learning rate that `adam_scalars_` works with if it is given as a number.

    Args:
        value: the number.
        impl: "triton", whose kernel takes it as the sum of two float32 numbers, or "torch".
    """
    if impl != "triton" or INTERPRETED or not math.isfinite(value):
        return value
    high = float(np.float32(value))
    return high + float(np.float32(value - high))


def _adam_scalars_triton(
    *, steps, out, lr, lr_value, decay, active, found_inf, grad_scale, loss, square, max_norm, norm, beta1, beta2
):  # fmt: skip
    # Triton rounds numbers to float32
    high, low = derived(lr_value, _to_float32), derived(lr_value, _beyond_float32)
    launch(_adam_scalars_kernel, (1,))(
        steps, out, lr, high, low, decay, active, found_inf, grad_scale, loss, square, max_norm, norm,
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
    enc_ptrs, denc_ptrs, enc_m_ptrs, enc_v_ptrs, dec_ptrs, ddec_ptrs, dec_m_ptrs, dec_v_ptrs,
    pre_ptrs, dpre_ptrs, pre_m_ptrs, pre_v_ptrs, latent_ptrs, dlatent_ptrs, latent_m_ptrs, latent_v_ptrs,
    scalars_ptrs, widths, N, T: tl.constexpr, NORMALIZE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update row n of a stream's encoder with its latent bias, or of its decoder; the pre-bias is row N of the encoder.

    A parameter whose gradients are None is not updated.
    """
    n = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(2)
    D = pick(widths, stream, T)
    scalars_ptr = pick(scalars_ptrs, stream, T)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    at = n * D + cols
    if tl.program_id(1) == 0:
        if n < N:
            if denc_ptrs is not None:
                _move(
                    pick(enc_ptrs, stream, T), pick(denc_ptrs, stream, T), pick(enc_m_ptrs, stream, T),
                    pick(enc_v_ptrs, stream, T), at, mask, scalars_ptr, 0, BETA1, BETA2, EPS, ACC,
                )  # fmt: skip
            if dlatent_ptrs is not None:
                one = n + tl.arange(0, 1)
                _move(
                    pick(latent_ptrs, stream, T), pick(dlatent_ptrs, stream, T), pick(latent_m_ptrs, stream, T),
                    pick(latent_v_ptrs, stream, T), one, one >= 0, scalars_ptr + 15, 0, BETA1, BETA2, EPS, ACC,
                )  # fmt: skip
        else:
            if dpre_ptrs is not None:
                _move(
                    pick(pre_ptrs, stream, T), pick(dpre_ptrs, stream, T), pick(pre_m_ptrs, stream, T),
                    pick(pre_v_ptrs, stream, T), cols, mask, scalars_ptr + 10, 0, BETA1, BETA2, EPS, ACC,
                )  # fmt: skip
    else:
        if ddec_ptrs is not None:
            if n < N:
                _move(
                    pick(dec_ptrs, stream, T), pick(ddec_ptrs, stream, T), pick(dec_m_ptrs, stream, T),
                    pick(dec_v_ptrs, stream, T), at, mask, scalars_ptr + 5, NORMALIZE, BETA1, BETA2, EPS, ACC,
                )  # fmt: skip


def alike(streams, width, key, most=lambda d: MAX_STREAMS):
    """Group streams that one launch can take: keys agree, and no row takes half of what the widest is padded to.

    Args:
        streams: any records of the streams.
        width: called with a record, gives the columns of its rows.
        key: called with a record; None keeps the stream out of every group.
        most: called with the columns of a group's widest stream, gives the largest size of the group.

    Returns:
        The groups, the widest stream of each first; the streams left out.
    """
    groups: list[tuple] = []
    left_out = []
    for stream in sorted(streams, key=width, reverse=True):
        d, own = width(stream), key(stream)
        if own is None:
            left_out.append(stream)
            continue
        # a width that does not divide by 16 forbids wide loads in the whole launch
        own = own, d % 16 == 0
        for shared, widest, group in groups:
            if own == shared and 2 * next_power_of_2(d) >= widest and len(group) < most(widest):
                group.append(stream)
                break
        else:
            groups.append((own, next_power_of_2(d), [stream]))
    return [group for _, _, group in groups], left_out


def tuples(streams):
    """Turn records of equal length into one tuple for each place, None where the first record has None."""
    return [None if of[0] is None else of for of in zip(*streams, strict=True)]


def _by_stream(scalars, params, *others):
    """Yield the scalars [4, 5] and the four tensors of each list for every stream."""
    for i in range(0, len(params), 4):
        yield scalars[i : i + 4], *(tensors[i : i + 4] for tensors in (params, *others))


def _adam_stream_triton(*, params, grads, exp_avgs, exp_avg_sqs, scalars, normalize, beta1, beta2, eps):
    hyper = AdamHyper(normalize, beta1, beta2, eps)
    grads = [None if g is None else g.contiguous() for g in grads]

    def key(stream):
        _, ws, gs, ms, vs = stream
        if ws[0].shape[1] > ADAM_WIDTH or not all(t.is_contiguous() for t in (*ws, *ms, *vs)):
            return None
        return tuple(None if t is None else t.dtype for t in (*ws, *gs, *ms))

    streams = _by_stream(scalars, params, grads, exp_avgs, exp_avg_sqs)
    groups, left_out = alike(streams, lambda stream: stream[1][0].shape[1], key)
    for group in groups:
        _launch_adam_stream(group, hyper)
    for stream in left_out:
        _step_stream(stream, hyper)


def _launch_adam_stream(streams, hyper):
    """Update streams of one group, the widest first."""
    _, params, grads, exp_avgs, _ = streams[0]
    n, d = params[0].shape
    config = adam_config(d)
    if all(grads[i] is None for i in (0, DECODER, 3)):
        n = 0  # the pre-biases alone
    scalars, *fours = zip(*streams, strict=True)
    pointers = [of for place in zip(*(tuples(four) for four in fours), strict=True) for of in place]
    launch(_adam_stream_kernel, (n + 1, 1 if grads[DECODER] is None else 2, len(streams)))(
        *pointers, scalars, tuple(four[0].shape[1] for four in fours[0]), n, T=len(streams), NORMALIZE=hyper.normalize,
        BETA1=hyper.beta1, BETA2=hyper.beta2, EPS=hyper.eps, BLOCK_D=config.block_d, ACC=tl_dtype(exp_avgs[0].dtype),
        num_warps=config.num_warps, **config.registers(capability(params[0].device)),
    )  # fmt: skip


CACHE_BLOCK_ELEMENTS = 2**18  # elements of a tensor per block of the torch path on a CPU: all five stay in cache
THREAD_ELEMENTS = 2**15  # torch gives no thread fewer


def _adam_stream_torch(*, params, grads, exp_avgs, exp_avg_sqs, scalars, normalize, beta1, beta2, eps):
    for stream in _by_stream(scalars, params, grads, exp_avgs, exp_avg_sqs):
        _step_stream(stream, AdamHyper(normalize, beta1, beta2, eps))


def _step_stream(stream, hyper):
    """Update the four parameters of one stream in torch."""
    scalars, params, grads, exp_avgs, exp_avg_sqs = stream
    for i, (w, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if g is not None:
            own = hyper if i == DECODER else hyper.plain()
            step_blocks_torch([w, m, v], g, StepScalars.of(scalars[i]), own)


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
adam_stream_.__doc__ = """Update the parameters of all streams by one Adam step.

Args:
    params: w_enc [N, d], the decoder's rows [N, d], pre_bias [d] and latent_bias [N] of the first stream, then those
        of the next.
    grads: their gradients; a parameter whose gradient is None is not updated.
    exp_avgs: first moments, in the accumulator dtype.
    exp_avg_sqs: second moments, in the accumulator dtype.
    scalars: [P, 5], a row for each parameter, which `adam_scalars_` wrote.
    normalize: PLAIN; BEFORE: divide decoder rows by (norm + 1e-8), subtract <w, g> w from their gradient, step; AFTER:
        subtract, step, divide.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the denominator.
    impl: "triton" or "torch"; rows wider than 8192 and non-contiguous tensors take the torch path in both. Streams
        whose padded widths and dtypes agree are updated in one launch.
"""


# grad_square: for clipping


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


def rows_of(tensors: Sequence[torch.Tensor | None]) -> list:
    """View the decoders' tensors [d, N], every fourth, as rows [N, d].

    Args:
        tensors: parameters, gradients or moments, four of each stream; some may be None.
    """
    return [t.t() if t is not None and i % 4 == DECODER else t for i, t in enumerate(tensors)]


@Planned
def adam_update_(tensors, hyper, active, max_norm, impl, lr_value, decay):
    """Count a step, clip and update all parameters from their gradients; for `SparcAdam`.

    Args:
        tensors: parameters, gradients (or None), first and second moments of P parameters, four of each stream, the
            decoders' [d, N]; then steps, scalars, lr, found_inf, grad_scale and norm as `adam_scalars_` takes them.
        hyper: AdamHyper.
        active: as in `adam_scalars_`.
        max_norm: to clip gradients to; None: not clipped.
        impl: "triton" or "torch".
        lr_value: learning rate where lr is None.
        decay: decoupled weight decay.
    """
    P = (len(tensors) - 6) // 4
    params, grads, exp_avgs, exp_avg_sqs = (rows_of(tensors[i : i + P]) for i in range(0, 4 * P, P))
    steps, scalars, lr, found_inf, grad_scale, norm = tensors[4 * P :]
    square = None
    if max_norm is not None:
        square = grad_square(params[DECODER::4], grads, hyper.normalize, impl).to(scalars)
    call(
        adam_scalars_, steps, scalars, lr, lr_value, decay, active, found_inf, grad_scale, None, square,
        max_norm or 0.0, norm, hyper.beta1, hyper.beta2, impl,
    )  # fmt: skip
    adam_stream_(params, grads, exp_avgs, exp_avg_sqs, scalars, *hyper, impl)
    return []
