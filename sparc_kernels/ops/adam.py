"""Adam step over the parameters of a stream: unit norm of decoder rows, projection and update in one pass.

From gradients in memory, for `adam_update.py`; `latent_adam.py` calls the device function `step` to update each latent
from its list of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..core._triton import tl, tl_dtype, triton
from ..core.numerics import is_host_readable
from ..core.recorder import launch
from ..core.registry import register
from ..launch.adam import ADAM_WIDTH, adam_config
from ..launch.budgets import MAX_STREAMS
from ..launch.device import capability, next_power_of_2
from .gather import pick
from .step_scalars import StepScalars

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


DECODER = 1  # position among a stream's parameters: w_enc, the decoder's rows, pre_bias, latent_bias


def rows_of(tensors: Sequence[torch.Tensor | None]) -> list:
    """View the decoders' tensors [d, N], every fourth, as rows [N, d].

    Args:
        tensors: parameters, gradients or moments, four of each stream; some may be None.
    """
    return [t.t() if t is not None and i % 4 == DECODER else t for i, t in enumerate(tensors)]


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
