import pytest
import torch
from common import assert_close
from conftest import DEVICE, KERNEL_DTYPE
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_kernels import inverse_index, reference
from sparc_kernels.ops import latent_reduce as ops_latent_reduce
from sparc_kernels.ops.dead import dead_first
from sparc_kernels.ops.inverse_index import inverse_index_op
from sparc_kernels.ops.latent_reduce import latent_reduce, latent_reduce_
from sparc_kernels.ops.records import WeightedLists


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


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(-1, 6), min_size=1, max_size=60), add=st.booleans())
def test_lists_of_any_length_are_added_up_whatever_blocks_they_lie_across(ids, add):
    """Chunks of 4 in the interpreter: short lists, lists that split, empty ones, ids outside on either end."""
    n, M = 6, len(ids)
    indices = torch.tensor(ids, device=DEVICE)[:, None]
    coef = torch.arange(1, M + 1, device=DEVICE, dtype=KERNEL_DTYPE)
    mat = torch.stack([coef, 2 * coef], 1)[None]
    start = torch.full((n, 2), 0.5, device=DEVICE, dtype=KERNEL_DTYPE)
    out, sums = start.clone(), start[:, 0].clone()
    latent_reduce_([out], [sums], *inverse_index(indices, n, "triton"), coef[None], None, None, [mat], 1, add, "triton")
    want, want_sums = (start.clone(), start[:, 0].clone()) if add else (torch.zeros_like(start), torch.zeros_like(sums))
    for i, c in zip(ids, coef, strict=True):
        if 0 <= i < n:
            want[i] += c * torch.stack([c, 2 * c])
            want_sums[i] += c
    assert torch.equal(out, want) and torch.equal(sums, want_sums)  # small integers and halves: exact


def test_the_last_list_ends_where_it_ends(monkeypatch):
    """On CUDA the last bag reaches to the end of what is given, where ids outside and rows beyond a count stand."""
    bags = torch.nn.functional.embedding_bag

    def as_on_cuda(entries, mat, offsets, **options):
        return bags(entries, mat, torch.cat([offsets[:-1], offsets.new_full((1,), entries.numel())]), **options)

    monkeypatch.setattr(ops_latent_reduce.F, "embedding_bag", as_on_cuda)
    monkeypatch.setattr(ops_latent_reduce, "is_host_readable", lambda tensor: False)
    indices = torch.tensor([[0, 3], [4, 99], [4, -1]])
    inverse = inverse_index(indices, 5, impl="torch")
    coef, mat = torch.rand(1, 3, 2), torch.randn(1, 3, 6).bfloat16()
    rows, _ = ops_latent_reduce.latent_reduce(WeightedLists(inverse, coef, None, None, mat, 2), torch.bfloat16, "torch")
    inside = (indices >= 0) & (indices < 5)
    want = (
        reference.codes(indices.where(inside, 0), coef[0].where(inside, 0.0).bfloat16().double(), 5).T @ mat[0].double()
    )
    assert_close(rows.double(), want, 1e-2)


def test_both_inverse_indices_are_the_same():
    for n, size in ((3, 1), (70, 30), (2**15 - 1, 100), (2**15, 100), (5, 1000)):
        g = torch.Generator().manual_seed(n)
        indices = torch.randint(-2, n + 2, (size,), generator=g).to(DEVICE)
        for a, b in zip(inverse_index(indices, n, "torch"), inverse_index(indices, n, "triton"), strict=True):
            assert a.dtype == b.dtype == torch.int32 and torch.equal(a, b)


def test_inverse_indices_of_groups_are_those_of_each():
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 12, (3, 7, 4), generator=g).to(DEVICE)
    count = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
    for n in (11, 2**15):
        for limit in (None, count):
            both = [inverse_index_op(indices, 3, n, limit, impl) for impl in ("torch", "triton")]
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
            for i, lists in enumerate(zip(*both[0], strict=True)):
                cut = indices[i].clone()
                cut[:, 4 if limit is None else int(count[i]) :] = n
                assert all(torch.equal(a, b) for a, b in zip(lists, inverse_index(cut, n), strict=True))


def test_the_dead_come_first(impl):
    g = torch.Generator().manual_seed(0)
    for n in (1, 15, 16, 70):
        dead = [(torch.rand(n, generator=g) < p).to(DEVICE) for p in (0.0, 0.3, 1.0)]
        ids, count, masks = dead_first(dead, 0, impl)
        by_counters = dead_first([torch.where(mask, 9, 8) for mask in dead], 8, impl)
        assert all(torch.equal(a, b) for a, b in zip(by_counters, (ids, count, masks), strict=True))
        assert torch.equal(masks, torch.stack(dead))
        for mask, row, n in zip(dead, ids, count, strict=True):
            assert int(n) == int(mask.sum())
            assert row.tolist() == [*mask.nonzero().flatten().tolist(), *(~mask).nonzero().flatten().tolist()]


def test_gates_and_scales(impl):
    g = torch.Generator().manual_seed(0)
    rows, k, n, d, S = 7, 4, 9, 5, 2
    ids = torch.randint(0, n, (rows, k), generator=g).to(DEVICE)
    coef, gate, scale, mat = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, KERNEL_DTYPE)
        for shape in ((S, rows, k), (S, rows, k), (S, rows), (S, rows, d))
    )
    scale[1, 2] = 0
    mat[1, 2] = float("nan")  # does not count, whatever it is
    coef[0, 0, 0], gate[0, 0, 0] = float("nan"), -1.0
    weights = torch.where((gate <= 0) | (scale == 0)[..., None], 0.0, coef * scale[..., None])
    want = torch.zeros(n, d, device=DEVICE, dtype=KERNEL_DTYPE)
    for s in range(S):
        rows_of = (weights[s][..., None] * mat[s].nan_to_num()[:, None]).reshape(-1, d)
        want.index_add_(0, ids.flatten(), rows_of)
    out, sums = torch.empty_like(want), torch.empty_like(want[:, 0])
    latent_reduce_([out], [sums], *inverse_index(ids, n), coef, scale[None], gate, [mat], k, False, impl)
    if impl == "torch":  # its sums multiply every row
        out = out.nan_to_num()
        want[ids[2].unique()] = out[ids[2].unique()]
    assert_close(out, want)
    assert_close(sums, torch.zeros_like(sums).index_add_(0, ids.flatten(), weights.sum(0).flatten()))


@pytest.mark.parametrize(
    ("rows", "k", "n", "d", "S"), [(6, 5, 40, 20, 1), (6, 5, 40, 13, 3), (15, 4, 3, 33, 2), (1, 1, 5, 1, 1)]
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
    lists = WeightedLists(inverse, coef.to(DEVICE, KERNEL_DTYPE), None, None, mat.to(DEVICE, KERNEL_DTYPE), k)
    out, got_sums = latent_reduce(lists, KERNEL_DTYPE, impl)
    assert_close(out.double().cpu(), want)
    assert_close(got_sums.double().cpu(), sums)
    again, _ = latent_reduce(lists, KERNEL_DTYPE, impl)
    assert torch.equal(out, again)
    latent_reduce_([out], [got_sums], *lists.tensors[:-1], [lists.mat], k, True, impl)
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
    latent_reduce_([out], [sums], *inverse, coef, None, None, [mat], 2, True, impl)
    assert out.tolist() == [[0, 0], [101, 102], [0, 0], [11, 22], [0, 0]] and sums.tolist() == [0, 1, 0, 2, 0]
    if impl == "triton":
        assert out[[0, 2, 4]].signbit().all()  # -0 + 0 would be +0: these were not even written
