import pytest
import torch
from common import assert_close, assert_grads_close, problem
from conftest import DEVICE

from sparc_kernels import auxk_topk, reference, update_counters_


def test_counters_follow_the_dense_definition():
    g = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 9, (40,), generator=g).to(DEVICE)
    indices = torch.rand(12, 40, generator=g).argsort(1)[:, :4].to(DEVICE)
    values = (torch.rand(12, 4, generator=g) * 2e-3).to(DEVICE)  # around the threshold
    want = reference.update_counters(counters, indices, values, 1e-3)
    assert len(want.unique()) > 3
    got = update_counters_(counters, indices, values, 1e-3)
    assert got is counters and torch.equal(counters, want)


def test_exactly_the_threshold_does_not_fire():
    counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    indices = torch.tensor([[0, 1]], device=DEVICE)
    update_counters_(counters, indices, torch.tensor([[0.5, 0.75]], device=DEVICE), 0.5)
    assert counters.tolist() == [1, 1, 1]
    update_counters_(counters, indices, torch.tensor([[0.5, 0.75]], device=DEVICE), 0.5)
    assert counters.tolist() == [2, 1, 2]


def _dead(count):
    mask = torch.zeros(70, dtype=torch.bool)
    mask[torch.randperm(70, generator=torch.Generator().manual_seed(1))[:count]] = True
    return mask.to(DEVICE)


@pytest.mark.parametrize("count", [0, 3, 8, 30, 70])
def test_auxk_equals_the_dense_definition_where_it_is_observable(impl, count):
    p = problem()
    args = [p.xs[0], p.w_encs[0], p.pre_biases[0], p.latent_biases[0]]
    dead = _dead(count)
    indices, values = auxk_topk(*args, dead, 8, impl)
    want_indices, want_values = reference.auxk(reference.preactivations(*args), dead, 8)
    got, want = (reference.codes(i, v, 70) for i, v in ((indices, values), (want_indices, want_values)))
    assert_close(got, want)
    assert all(len(set(row)) == 8 for row in indices.tolist())
    assert (values[~dead[indices]] == 0).all()
    if count == 0:
        assert (values == 0).all()
    else:
        c = torch.randn_like(want)
        assert_grads_close((got * c).sum(), (want * c).sum(), args, ["x", "w_enc", "pre_bias", "latent_bias"])
