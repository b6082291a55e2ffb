import pytest
import torch
from common import assert_close
from conftest import DEVICE, KERNEL_DTYPE
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_kernels import inverse_index
from sparc_kernels.latent_grads import _work_plan, latent_reduce


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), ids=st.lists(st.integers(0, 39), min_size=1, max_size=60))
def test_inverse_index_lists_every_place_once_in_order(n, ids):
    ids = torch.tensor([i % n for i in ids], device=DEVICE)
    order, offsets, _ = inverse_index(ids, n)
    assert offsets[0] == 0 and offsets[-1] == len(ids)
    for latent in range(n):
        places = order[offsets[latent] : offsets[latent + 1]].tolist()
        assert places == (ids == latent).nonzero().flatten().tolist()


@pytest.mark.parametrize("n", [2**15 - 1, 2**15, 2**15 + 1, 2**16])
def test_inverse_index_at_the_edge_of_16_bits(n):
    ids = torch.tensor([n - 1, 0, n - 2, n - 1], device=DEVICE)
    order, offsets, _ = inverse_index(ids, n)
    assert order.tolist() == [1, 2, 0, 3] and offsets[n - 1 :].tolist() == [2, 4]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=30), chunk=st.integers(1, 8))
def test_work_plan_covers_every_list_within_its_static_bounds(counts, chunk):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    M, n = int(offsets[-1]), len(counts)
    plan = _work_plan(offsets, M, chunk)
    done = torch.zeros(M, dtype=torch.int)
    for item, latent in enumerate(plan.items.tolist()):
        if latent < n:
            low = int(offsets[latent]) + (item - int(plan.first[latent])) * chunk
            done[low : min(low + chunk, int(offsets[latent + 1]))] += 1
    assert (done == 1).all()
    assert set(range(n)) <= set(plan.items.tolist())  # empty lists write zeros
    hot = [latent for latent in range(n) if counts[latent] > chunk]
    assert [latent for latent in plan.hot.tolist() if latent < n] == hot
    slots = [int(plan.slots[latent]) + c for latent in hot for c in range(-(-counts[latent] // chunk))]
    assert len(set(slots)) == len(slots) and max(slots, default=0) < 2 * (M // chunk) + 1


@pytest.mark.parametrize(
    ("rows", "k", "n", "d", "S"), [(6, 5, 70, 20, 1), (6, 5, 70, 13, 3), (30, 4, 3, 33, 2), (1, 1, 5, 1, 1)]
)
def test_latent_reduce(impl, rows, k, n, d, S):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, n, (rows, k), generator=g)
    coef = torch.randn(S, rows, k, generator=g, dtype=torch.float64).relu()
    mat = torch.randn(S, rows, d, generator=g, dtype=torch.float64)
    want = torch.zeros(n, d, dtype=torch.float64)
    for s in range(S):
        want.index_add_(0, ids.flatten(), (coef[s][..., None] * mat[s][:, None]).reshape(-1, d))
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, ids.flatten(), coef.sum(0).flatten())
    inverse = inverse_index(ids.to(DEVICE), n)
    args = inverse, coef.to(DEVICE, KERNEL_DTYPE), mat.to(DEVICE, KERNEL_DTYPE), k, KERNEL_DTYPE, impl
    out, got_sums = latent_reduce(*args)
    assert_close(out.double().cpu(), want)
    assert_close(got_sums.double().cpu(), sums)
    again, _ = latent_reduce(*args)
    assert torch.equal(out, again)
    latent_reduce(*args, into=(out, got_sums))
    assert_close(out.double().cpu(), 2 * want)
    assert_close(got_sums.double().cpu(), 2 * sums)


def test_adding_leaves_latents_in_no_list_alone(impl):
    ids = torch.tensor([[1, 3], [3, 5]], device=DEVICE)  # 5 is no latent
    inverse = inverse_index(ids, 5)
    coef = torch.ones(1, 2, 2, device=DEVICE, dtype=KERNEL_DTYPE)
    mat = torch.tensor([[[1.0, 2], [10, 20]]], device=DEVICE, dtype=KERNEL_DTYPE)
    out = torch.full((5, 2), -0.0, device=DEVICE, dtype=KERNEL_DTYPE)
    out[1] = 100
    sums = torch.zeros(5, device=DEVICE, dtype=KERNEL_DTYPE)
    latent_reduce(inverse, coef, mat, 2, KERNEL_DTYPE, impl, into=(out, sums))
    assert out.tolist() == [[0, 0], [101, 102], [0, 0], [11, 22], [0, 0]] and sums.tolist() == [0, 1, 0, 2, 0]
    if impl == "triton":
        assert out[[0, 2, 4]].signbit().all()  # -0 + 0 would be +0: these were not even written
