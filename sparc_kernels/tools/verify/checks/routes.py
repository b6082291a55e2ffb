"""Checks of code paths that the operators' own checks do not take; each asserts that its path was taken."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from ....nn.graphed import GraphedStep
from ....nn.module import AlignedSAE
from ....nn.optimizer import SparcAdam
from ....ops import selection
from ....ops.encode import encode_topk
from ....train.step import Step
from ...replaced import replaced
from ...trace import counted_launches
from ..judge import BF16, F64, Check, Tensor
from ..problems import Problem, generic, margin_problem
from .encode import judge_encode
from .training import reference_step

LR, DECAY, BETAS, EPS = 1e-3, 0.01, (0.9, 0.999), 1e-8
DEAD_STEPS = 10


def _model(check: Check, p: Problem, dtype=None, auxk: bool = True, topk_type: str = "global"):
    """A model with the problem's weights and counters, and its inputs by stream."""
    c = check.case
    streams = {f"s{s}": d for s, d in enumerate(c.dims)}
    with torch.random.fork_rng(devices=[check.device] if check.device.type == "cuda" else []):
        model = AlignedSAE(
            streams, c.N, c.k, auxk=c.auxk if auxk else None, dead_steps_threshold=DEAD_STEPS, topk_type=topk_type,
            impl=check.impl, device=check.device, dtype=dtype or check.dtype,
        )  # fmt: skip
    groups = zip(p.w_encs, p.w_decs, p.pre_biases, p.latent_biases, strict=True)
    with torch.no_grad():
        for name, tensors in zip(streams, groups, strict=True):
            for parameter, tensor in zip(_of_stream(model, name), tensors, strict=True):
                parameter.copy_(tensor)
    _reset(model, p)
    return model, {name: x.to(dtype or check.dtype) for name, x in zip(streams, p.xs, strict=True)}


def _of_stream(model, s: str) -> list[Tensor]:
    return [model.encoders[s].weight, model.decoders[s].weight, model.pre_biases[s], model.latent_biases[s]]


def _reset(model, p: Problem) -> None:
    for s in model.streams:
        getattr(model, f"stats_last_nonzero_{s}").copy_(torch.where(p.inactive, DEAD_STEPS + 5, 3))


def _autocast(check: Check):
    return torch.autocast("cuda" if check.device.type == "cuda" else "cpu", BF16, cache_enabled=False)


def _gradients(model, p: Problem, inputs, scale: float = 1.0) -> list[Tensor]:
    """Loss and gradients of one step, from reset counters."""
    model.zero_grad(set_to_none=True)
    _reset(model, p)
    loss, _ = model.compute_loss(model(inputs), inputs)
    (loss * scale).backward()
    return [loss.detach().clone(), *(q.grad.clone() for q in model.parameters())]


def _same(check: Check, what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    check.add(what, same, "exact" if same else "other bits")


# ------------------------------------------------------------------------------------------------------ the encoder's


def judge_two_buffers(check: Check) -> None:
    """Judge two logit buffers, the selector on a side stream beside the GEMM of the next rows."""
    p, rows_per_chunk, buffers = check.problem(generic), selection.rows_per_chunk, []

    def recorded(*args):
        buffers.append(rows_per_chunk(*args)[1])
        return rows_per_chunk(*args)

    def indices():
        with torch.no_grad():
            return encode_topk(*p.encoder, check.case.k, "global", check.impl)[0]

    with replaced(selection, rows_per_chunk=recorded):
        judge_encode(check, topk_type="global")
        first = indices()
        _same(check, "10 runs", [first] * 10, [indices() for _ in range(10)])
    check.add("two buffers", set(buffers) == {2}, f"buffers: {buffers}")
    with replaced(
        selection, rows_per_chunk=lambda rows, row_bytes, block_m, _: rows_per_chunk(rows, row_bytes, block_m)
    ):
        _same(check, "one buffer", [first], [indices()])


@contextmanager
def _by_library(check: Check):
    """Assert that the library's GEMM is taken, by the launches of the kernel for its maxima."""
    with counted_launches() as counts:
        yield
    passes = counts[f"{selection.__name__}:_row_maxima_kernel"]
    check.add("by library", passes > 0, f"{passes} passes over logits that a library made")


def judge_library_gemm(check: Check) -> None:
    """Judge selections from logits that a library made."""
    with _by_library(check):
        judge_encode(check, topk_type="global")


def judge_autocast(check: Check) -> None:
    """Judge autocast: loss and weight gradients equal those of a bfloat16 model bit for bit; joint cast where wide."""
    p = check.problem(margin_problem)
    wide = check.device.type == "cuda" and selection.encode_by_library(check.case.B, sum(check.case.dims), 2, False)
    (model, inputs), (half, half_inputs) = _model(check, p.to(BF16), check.dtype), _model(check, p.to(BF16), BF16)
    with _by_library(check) if wide else nullcontext(), _autocast(check):
        ours = _gradients(model, p, inputs)
    theirs = _gradients(half, p, half_inputs)
    compared = [0, *(i + 1 for i, (name, _) in enumerate(model.named_parameters()) if "pre_bias" not in name)]
    # without pre-biases, whose two gradients are summed in float32 under autocast, in bfloat16 otherwise
    _same(check, "as in bf16", [ours[i] for i in compared], [theirs[i].to(ours[i].dtype) for i in compared])


# ----------------------------------------------------------------------------------------------------- the optimizer's


def _adam_in(dtype, weights: list[Tensor], grads: list[list[Tensor]], max_norm: float | None):
    """AdamW in plain PyTorch, with normalisation, projection, then clipping; four weights a stream, decoders as rows.

    Returns the norms (if clipped), weights and moments after one step for each entry of `grads`.
    """
    weights, norms = [w.to(dtype) for w in weights], []
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for t, given in enumerate(grads, 1):
        given = [g.to(dtype) for g in given]
        for i in range(1, len(weights), 4):  # decoders
            weights[i] = weights[i] / (weights[i].norm(dim=1, keepdim=True) + 1e-8)
            given[i] = given[i] - (weights[i] * given[i]).sum(1, keepdim=True) * weights[i]
        if max_norm is not None:
            norms.append(torch.stack([g.square().sum() for g in given]).sum().sqrt())
            given = [g * (max_norm / (norms[-1] + 1e-6)).clamp(max=1) for g in given]
        for i, g in enumerate(given):
            m, v = moments[i]
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            moments[i] = m, v
            weights[i] = _moved(weights[i], m, v, t)
    return [*norms, *weights, *(t for pair in moments for t in pair)]


def _moved(w, m, v, t: int):
    return w * (1 - LR * DECAY) - LR / (1 - BETAS[0] ** t) * m / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)


def _rows(tensors: list[Tensor]) -> list[Tensor]:
    """The four tensors of one stream with the decoder's transposed to rows."""
    return [t.t() if i == 1 else t for i, t in enumerate(tensors)]


def judge_clipping(check: Check) -> None:
    """Judge two steps of SparcAdam that clip by the norm of all gradients."""
    p = check.problem(margin_problem)
    model, _ = _model(check, p, auxk=False)
    adam = SparcAdam(model, LR, BETAS, EPS, DECAY, max_grad_norm=0.25, impl=check.impl)
    params = [q for s in model.streams for q in _rows(_of_stream(model, s))]
    before, norms = [q.detach().clone() for q in params], []
    grads = [
        [torch.randn(q.shape, generator=check.generator, device=check.device).to(check.dtype) for q in params]
        for _ in range(2)
    ]
    for some in grads:
        for place, s in enumerate(model.streams):
            for q, g in zip(_of_stream(model, s), _rows(some[4 * place : 4 * place + 4]), strict=True):
                q.grad = g
        adam.step()
        norms.append(adam.grad_norm.clone())
    states = [
        [adam.state[q][n] for n in ("exp_avg", "exp_avg_sq")] for s in model.streams for q in _of_stream(model, s)
    ]
    moments = [m.t() if i // 2 % 4 == 1 else m for i, m in enumerate(m for pair in states for m in pair)]
    names = [
        f"{name}[{s}]" for s in range(len(model.streams)) for name in ("w_enc", "w_dec", "pre_bias", "latent_bias")
    ]
    names = ["norm 1", "norm 2", *names, *(f"{n} {m}" for n in names for m in ("exp_avg", "exp_avg_sq"))]
    truth, own = (_adam_in(dtype, before, grads, 0.25) for dtype in (F64, check.own_dtype))
    for name, *three in zip(names, [*norms, *params, *moments], truth, own, strict=True):
        check.compare(name, *three)


def judge_scaled_gradients(check: Check) -> None:
    """Judge steps with the attributes that torch.amp.GradScaler sets.

    The same bits as unscaled, since the scale is a power of two, and no step if `found_inf` is set.
    """
    p, final_params, scale = check.problem(margin_problem), [], 2.0**8
    found_inf = torch.zeros((), device=check.device)
    for factor in (1.0, scale):
        model, inputs = _model(check, p)
        adam = SparcAdam(model, LR, impl=check.impl)
        if factor != 1:
            adam.grad_scale, adam.found_inf = torch.full_like(found_inf, factor), found_inf
        for _ in range(2):
            _gradients(model, p, inputs, factor)
            adam.step()
        final_params.append([q.detach().clone() for q in model.parameters()])
    _same(check, "as unscaled", *final_params)
    found_inf.fill_(1)
    adam.step()
    _same(check, "infinity", final_params[1], [q.detach() for q in model.parameters()])


def judge_training_step(check: Check, topk_type: str) -> None:
    """Judge `training_step` with AuxK: moments by the reference's gradients, weights by Adam from these moments.

    Args:
        check: gives the case; takes the results.
        topk_type: "global" or "local".
    """
    c, p = check.case, check.problem(margin_problem)
    model, inputs = _model(check, p, topk_type=topk_type)
    with torch.no_grad():
        before = [getattr(model, f"stats_last_nonzero_{s}") > DEAD_STEPS for s in model.streams]
        outputs = model(inputs)
    aux = [outputs[f"auxk_indices_{s}"] for s in model.streams]
    dead = before if topk_type == "local" else list(model.get_dead_neurons().values())
    _reset(model, p)
    adam = SparcAdam(model, LR, BETAS, EPS, DECAY, normalize="before", impl=check.impl)
    loss, _ = model.training_step(inputs, adam)
    (truth, grads), (own, own_grads) = (
        reference_step(q, c, outputs.indices, aux, dead, scale=1.0) for q in (p.to(F64), check.own(p))
    )
    check.compare("loss", loss, truth["averages"][-1], own["averages"][-1])
    S = len(c.dims)
    for s, name in enumerate(model.streams):
        ours = _rows(_of_stream(model, name))
        first = _rows([g[s] for g in (p.w_encs, p.w_decs, p.pre_biases, p.latent_biases)])
        expected = [
            _adam_in(dtype, first, [_rows(every[s::S])], None)[4:]
            for dtype, every in ((F64, grads), (check.own_dtype, own_grads))
        ]
        for i, what in enumerate(("w_enc", "w_dec", "pre_bias", "latent_bias")):
            state = adam.state[_of_stream(model, name)[i]]
            m, v = (state[n].t() if i == 1 else state[n] for n in ("exp_avg", "exp_avg_sq"))
            for j, (part, moment) in enumerate((("exp_avg", m), ("exp_avg_sq", v))):
                check.compare(f"{what}[{s}] {part}", moment, expected[0][2 * i + j], expected[1][2 * i + j])
            moved = []  # from our moments: Adam's first step is the gradients' signs, which rounding decides near 0
            for dtype in (F64, check.own_dtype):
                w = first[i].to(dtype)
                w = w / (w.norm(dim=1, keepdim=True) + 1e-8) if i == 1 else w
                moved.append(_moved(w, m.to(dtype), v.to(dtype), 1))
            check.compare(f"{what}[{s}]", ours[i], *moved)


def judge_half_weights(check: Check) -> None:
    """Judge half precision weights kept by the step under autocast: the same bits as casting in every step."""
    p, final_params = check.problem(margin_problem), []
    for shadow in (None, BF16):
        model, inputs = _model(check, p)
        adam = SparcAdam(model, LR, shadow=shadow, impl=check.impl)
        with _autocast(check):
            for _ in range(3):
                model.training_step(inputs, adam)
            if shadow:
                half_weights = adam.half_weights()
                check.add("kept", half_weights is not None, "exact" if half_weights else "no shadow was kept")
        final_params.append([q.detach() for q in model.parameters()])
    _same(check, "as cast", *final_params)


# --------------------------------------------------------------------------------------------- bits, memory, host syncs


def judge_again(check: Check, topk_type: str) -> None:
    """Judge that every run gives the same bits, also with fresh memory filled with NaN.

    Args:
        check: gives the case; takes the results.
        topk_type: "global" or "local".
    """
    p = check.problem(margin_problem)
    (model, inputs), scale = _model(check, p, topk_type=topk_type), 2.0**8
    first = _gradients(model, p, inputs, scale)
    finite = all(bool(t.isfinite().all()) for t in first)
    check.add("finite", finite, "exact" if finite else "NaN or infinity without any in the data")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        _same(check, "poisoned memory", first, _gradients(model, p, inputs, scale))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    runs = 15 if check.device.type == "cuda" else 2
    _same(check, f"{runs} runs", first * runs, [t for _ in range(runs) for t in _gradients(model, p, inputs, scale)])


FORMS = {"fp32": {}, "autocast": {"bf16": True}, "without gradients": {"bf16": True, "gradient_free": True}}


def judge_graph(check: Check, form: str) -> None:
    """Judge 30 steps replayed from a CUDA graph by eager ones, with re-initialisation at step 20: bit for bit.

    Args:
        check: gives the case; takes the results.
        form: key of FORMS.
    """
    p, how, final_states = check.problem(margin_problem), FORMS[form], []
    for graph in (False, True):
        model, inputs = _model(check, p)
        free = how.get("gradient_free", False)
        adam = SparcAdam(model, LR, graph=graph, shadow=BF16 if free else None, impl=check.impl)
        reinit_rng = torch.Generator(check.device).manual_seed(1) if check.device.type != "meta" else None
        step = Step(model, adam, reinit_rng, reinit_every=20, graph=graph, **how)
        step.reads_loss = step.reads_loss and check.device.type == "cpu"
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            for i in range(30 if check.device.type != "meta" else 1):
                step({s: x.roll(i, 0) for s, x in inputs.items()})
        final_states.append(list(model.state_dict().values()))
        if graph:
            captured = step.captured
            why = next((str(w.message)[:300] for w in notes if "CUDA graph" in str(w.message)), "no graph was captured")
            check.add("captured", captured, "exact" if captured else why)
    _same(check, "as eager", *final_states)


def judge_own_graph(check: Check, gradients: bool) -> None:
    """Judge 30 steps that capture themselves by eager ones, bit for bit, whatever happens between them.

    The learning rate is assigned, latents are re-initialised, batches are smaller, and a state is loaded.

    Args:
        check: gives the case; takes the results.
        gradients: `GraphedStep` under autocast instead of `training_step`.
    """
    p, final_states = check.problem(margin_problem), []
    for graph in (False, True):
        model, inputs = _model(check, p)
        adam = SparcAdam(model, LR, graph=graph, impl=check.impl)
        step = GraphedStep(model, adam, autocast=BF16) if gradients else partial(model.training_step, optimizer=adam)
        meta, losses, state = check.device.type == "meta", [], None
        for i in range(1 if meta else 30):
            adam.param_groups[0]["lr"] = LR / (1 + i)
            if i == 10:
                model.reinit_dead_(generator=torch.Generator(check.device).manual_seed(1))
                state = copy.deepcopy((model.state_dict(), adam.state_dict()))
            if state and i == 20:
                model.load_state_dict(state[0])
                adam.load_state_dict(state[1])
            rows = len(next(iter(inputs.values()))) - (i % 9 == 8)
            losses.append(step({s: x.roll(i, 0)[:rows] for s, x in inputs.items()})[0])
        final_states.append([*losses, *model.state_dict().values()])
        if graph:
            check.add("captured", adam.captured, "exact" if adam.captured else "no graph was captured")
    _same(check, "as eager", *final_states)


def judge_no_waits(check: Check) -> None:
    """Judge that after a warm-up no operation synchronises with the device; torch would raise."""
    p = check.problem(margin_problem)
    model, inputs = _model(check, p)
    adam = SparcAdam(model, LR, impl=check.impl)
    cuda = check.device.type == "cuda"
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode) if cuda else None
        try:
            adam.zero_grad()
            model.compute_loss(model(inputs), inputs)[0].backward()
            adam.step()
            adam.zero_grad()
            model.training_step(inputs, adam)
        finally:
            torch.cuda.set_sync_debug_mode("default") if cuda else None
    check.add("no waits", True, "exact")
