"""Plans repeat what a function did, with other tensors, and nothing else."""

import pytest
import torch
from conftest import DEVICE, KERNEL_DTYPE

from sparc_kernels import AlignedSAE
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
