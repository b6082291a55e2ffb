"""Checks of a whole step through the model."""

from __future__ import annotations

import torch

from .... import reference
from ....nn.module import AlignedSAE
from ..judge import F64, Case, Check, logit_error
from ..problems import Problem, as_leaves, loss_scale, margin_problem

DEAD_STEPS = 10


def judge_step(check: Check, topk_type: str) -> None:
    """Judge loss, metrics, counters and every parameter's gradient, with AuxK; two steps must give the same bits.

    Args:
        check: gives the case; takes the results.
        topk_type: "global" or "local".
    """
    c, p = check.case, check.problem(margin_problem)
    S = len(c.dims)
    streams = [f"s{s}" for s in range(S)]
    scale = loss_scale(check)
    with torch.random.fork_rng(devices=[check.device] if check.device.type == "cuda" else []):
        model = AlignedSAE(
            dict(zip(streams, c.dims, strict=True)), c.N, c.k, auxk=c.auxk, dead_steps_threshold=DEAD_STEPS,
            topk_type=topk_type, impl=check.impl, device=check.device, dtype=check.dtype,
        )  # fmt: skip
    counters = torch.where(p.inactive, DEAD_STEPS + 5, 3)
    parameters = {
        "dw_enc": [model.encoders[s].weight for s in streams],
        "dw_dec": [model.decoders[s].weight for s in streams],
        "dpre_bias": [model.pre_biases[s] for s in streams],
        "dlatent_bias": [model.latent_biases[s] for s in streams],
    }
    buffers = [getattr(model, f"stats_last_nonzero_{s}") for s in streams]
    with torch.no_grad():
        wanted = (p.w_encs, p.w_decs, p.pre_biases, p.latent_biases)
        for group, tensors in zip(parameters.values(), wanted, strict=True):
            for parameter, tensor in zip(group, tensors, strict=True):
                parameter.copy_(tensor)
    inputs = dict(zip(streams, p.xs, strict=True))

    def step():
        for buffer in buffers:
            buffer.copy_(counters)
        model.zero_grad(set_to_none=True)
        outputs = model(inputs)
        loss, metrics = model.compute_loss(outputs, inputs)
        (loss * scale).backward()
        return outputs, metrics, [loss.detach(), *(q.grad for group in parameters.values() for q in group)]

    outputs, metrics, first = step()
    if not check.interpreted:
        _, _, second = step()
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        check.add("twice", same, "exact" if same else "two runs gave different bits")

    indices = outputs.indices
    selection, p64, own_p = check.selection_judge(), p.to(F64), check.own(p)
    hs = p64.logits()
    errors = [logit_error(check, p64, s, h, selecting=True) for s, h in enumerate(hs)]
    own_hs = own_p.logits()
    own_idx = reference.select(own_hs, c.k, topk_type)
    selection.judge_streams(hs, errors, indices, own_idx, unit=torch.finfo(check.dtype).eps / 2)
    selection.report(check)
    if selection.invalid:
        return

    after = []
    for s, (h, buffer) in enumerate(zip(hs, buffers, strict=True)):
        idx = reference.of_stream(indices, s)
        after.append(reference.update_counters(counters, idx, torch.relu(h.gather(1, idx)), 1e-3))
        check.exact(f"counters[{s}]", buffer, after[s])
    dead = [(counters if topk_type == "local" else a) > DEAD_STEPS for a in after]  # global reads them after the update
    auxk_indices = [outputs[f"auxk_indices_{s}"] for s in streams]
    aux_selection = check.selection_judge()
    for s in range(S):
        own_aux, _ = reference.auxk(own_hs[s], dead[s], c.auxk)
        aux_selection.judge(torch.relu(hs[s] * dead[s]), errors[s] * dead[s], auxk_indices[s], own_aux)
    aux_selection.report(check, "auxk selection")
    if aux_selection.invalid:
        return

    truth_terms, truth_grads = reference_step(p64, c, indices, auxk_indices, dead, scale=scale)
    own_terms, own_grads = reference_step(own_p, c, indices, auxk_indices, dead, scale=scale)
    missing = {name for names in _metric_names(streams).values() for name in names} ^ set(metrics)
    check.add("metric names", not missing, f"missing or unexpected: {sorted(missing)}" if missing else "exact")
    for term, names in _metric_names(streams).items():
        if names and not missing:
            ours = torch.stack([metrics[name] for name in names])
            size = truth_terms[term].abs() if term == "averages" else 1.0  # averages differ in size: relative to each
            check.compare(term, ours / size, truth_terms[term] / size, own_terms[term] / size)
    check.compare("loss", first[0], truth_terms["averages"][-1], own_terms["averages"][-1])
    names = [f"{name}[{s}]" for name in parameters for s in range(S)]
    for name, *three in zip(names, first[1:], truth_grads, own_grads, strict=True):
        check.compare(name, *three)


def _metric_names(streams: list[str]) -> dict[str, list[str]]:
    cross = [f"cross_loss_{t}_from_{s}" for t in streams for s in streams if s != t]
    averages = ["avg_mse_loss", "avg_num_active_neurons", "avg_l1_sparsity", "avg_auxk_loss", "avg_auxk_loss_scaled"]
    averages += ["avg_cross_loss", "avg_cross_loss_scaled"] if cross else []
    return {
        **{name: [f"{name}_{s}" for s in streams] for name in ("mse_loss", "auxk_loss", "l1_sparsity")},
        "num_active": [f"num_active_neurons_{s}" for s in streams],
        "cross_loss": cross,
        "averages": [*averages, "total_loss"],
    }


def reference_step(p: Problem, c: Case, indices, auxk_indices, dead, *, scale):
    """Compute terms and gradients of a training step by the dense reference, in the dtype of p.

    Args:
        p: problem.
        c: its case.
        indices: selected latents, [B, k] or [S, B, k].
        auxk_indices: AuxK's of each stream, [B, auxk].
        dead: bool [N] of each stream.
        scale: of the loss, for the gradients.

    Returns:
        {term: values}, and gradients of w_encs, w_decs, pre_biases and latent_biases, each of S streams.
    """
    S = len(c.dims)
    groups = [as_leaves(group) for group in (p.w_encs, p.w_decs, p.pre_biases, p.latent_biases)]
    loss = reference.training_loss(
        p.xs, *groups, c.k, auxk_k=c.auxk, dead=dead, indices=indices, auxk_indices=auxk_indices
    )
    grads = torch.autograd.grad(loss * scale, [t for group in groups for t in group])
    with torch.no_grad():
        hs = p.logits()
        values = torch.stack([torch.relu(h.gather(1, reference.of_stream(indices, s))) for s, h in enumerate(hs)])
        matrix = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
        aux = []
        for s, h in enumerate(hs):
            recon = reference.decode_one(reference.of_stream(indices, s), values[s], p.w_decs[s], p.pre_biases[s])
            u = torch.relu((h * dead[s]).gather(1, auxk_indices[s]))
            aux.append(reference.auxk_nmse(p.xs[s], recon, auxk_indices[s], u, p.w_decs[s], p.pre_biases[s]))
        aux = torch.stack(aux)
        l1 = values.sum(2).div(c.k + 1e-8).mean(1)
        k = torch.full_like(l1, c.k)
        cross = matrix[~torch.eye(S, dtype=torch.bool, device=matrix.device)]
        averages = [matrix.diagonal().mean(), k[0], l1.mean(), aux.mean(), aux.mean() / 32]
        averages += [cross.mean()] * 2 if S > 1 else []
        averages = torch.stack([*averages, loss])
    terms = {"mse_loss": matrix.diagonal(), "auxk_loss": aux, "l1_sparsity": l1, "num_active": k, "cross_loss": cross}
    return {**terms, "averages": averages}, grads
