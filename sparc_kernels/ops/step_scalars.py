"""Scalars of an optimizer step: step counts, bias corrections, learning rate, clipping and skipping on the device."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from ..core._triton import INTERPRETED, tl, tl_dtype, triton
from ..core.numerics import is_host_readable
from ..core.recorder import derived, launch
from ..core.registry import register
from ..launch.device import next_power_of_2

SCALARS = 5  # scalars of each parameter, see `adam_scalars_`


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
