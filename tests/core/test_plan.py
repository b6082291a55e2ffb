"""Plans repeat what a function did, with other tensors, and nothing else."""

import pytest
import torch
from conftest import DEVICE, KERNEL_DTYPE

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.core import plan
from sparc_kernels.nn import forward


def _inputs(model, rows=6):
    return {s: torch.randn(rows, d, device=DEVICE, dtype=KERNEL_DTYPE) for s, d in model.d_streams.items()}


def _model(**settings):
    torch.manual_seed(0)
    return AlignedSAE({"a": 20, "b": 9}, 40, 3, impl="triton", dtype=KERNEL_DTYPE, device=DEVICE, **settings)


@pytest.mark.parametrize("settings", [{}, {"auxk": 4, "dead_steps_threshold": 1}, {"topk_type": "local", "auxk": 4}])
def test_a_replayed_forward_has_the_bits_of_an_ordinary_one(settings):
    model, twin = _model(**settings), _model(**settings)
    for step in range(4):
        x = _inputs(model)
        out = model(x)
        with plan.without_plans():
            expected = twin(x)
        for key in ("indices", *(f"values_{s}" for s in model.streams)):
            assert torch.equal(out[key], expected[key]), (step, key)
        if model.auxk:
            assert all(torch.equal(out[k], expected[k]) for k in out if k.startswith("auxk_"))
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name)), (step, name)
    made = [p for p in forward._encode.plans.values() if type(p) is plan.Plan]
    assert len(made) == 1 and made[0].launches > 5


def _two_calls(model, adam, x):
    adam.zero_grad()
    loss, metrics = model.compute_loss(model(x), x)
    loss.backward()
    adam.step()
    return loss.detach(), metrics


def _fused(model, adam, x):
    return model.training_step(x, adam)


@pytest.mark.parametrize("take", [_two_calls, _fused])
@pytest.mark.parametrize("settings", [{"auxk": 4, "dead_steps_threshold": 1}, {"topk_type": "local", "auxk": 4}])
def test_replayed_steps_have_the_bits_of_ordinary_ones(take, settings):
    models, twins = _model(**settings), _model(**settings)
    adam, twin = (
        SparcAdam(m, 1e-2, impl="triton", max_grad_norm=0.1 if take is _two_calls else None) for m in (models, twins)
    )
    for step in range(4):
        x = _inputs(models)
        for optimizer in (adam, twin):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1) + 1e-9  # another number in every step
        loss, metrics = take(models, adam, x)
        with plan.without_plans():
            expected, wanted = take(twins, twin, x)
        assert torch.equal(loss, expected), step
        assert all(torch.equal(metrics[name], wanted[name]) for name in wanted)
        for p, q in zip(models.parameters(), twins.parameters(), strict=True):
            assert torch.equal(p, q), step
    made = [p for f in plan._functions for p in f.plans.values()]
    assert any(type(p) is plan.Plan for p in made) and plan._REFUSED not in made
