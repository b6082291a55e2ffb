"""What a shard of the latents needs of the operators: absent ids, keys, merged candidates, partial sums."""

from itertools import pairwise

import pytest
import torch
from common import problem
from conftest import CUDA, DEVICE, KERNEL_DTYPE
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_kernels import reference
from sparc_kernels.core.numerics import acc_dtype
from sparc_kernels.launch.device import cdiv, next_power_of_2
from sparc_kernels.launch.gather import GatherConfig
from sparc_kernels.launch.select import SelectConfig, candidates_config, select_config
from sparc_kernels.ops import gather, selection
from sparc_kernels.ops.adam import AFTER, BEFORE, PLAIN, adam_stream_
from sparc_kernels.ops.dead import count_fired_
from sparc_kernels.ops.encode import gather_values
from sparc_kernels.ops.gather import gather_dot, gather_sum
from sparc_kernels.ops.inverse_index import inverse_index, inverse_index_op
from sparc_kernels.ops.latent_adam import latent_adam_
from sparc_kernels.ops.latent_reduce import latent_reduce_
from sparc_kernels.ops.records import ABSENT
from sparc_kernels.ops.selection import keys_dtype, select_each_keys, select_keys, topk_positions

INF, NAN = float("inf"), float("nan")
B, N, S, D = 5, 40, 3, 37


def same(a, b):
    """Whether two tensors have the same bits, but for the kind of NaN and the sign of zero."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


class Absent:
    """Selected latents, of which some are absent: [B, k], and all streams' own.

    Weights at both ends, which no row selects, are not finite; nor is one row of the inputs.
    """

    def __init__(self, pattern, k, dtype, own=False):
        g = torch.Generator().manual_seed(3)
        lead = (S,) if own else ()

        def randn(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)

        self.whole = torch.randint(1, N - 1, (*lead, B, k), generator=g).to(DEVICE)
        absent = torch.rand(*lead, B, k, generator=g) < 0.5
        absent[..., 0, :], absent[..., 1, :] = True, False
        if pattern != "some":
            absent.fill_(pattern == "all")
        self.absent = absent.to(DEVICE)
        self.indices = torch.where(self.absent, ABSENT, self.whole)
        self.weights = [randn(N, D) for _ in range(S)]
        self.latent_biases = [randn(N) for _ in range(S)]
        self.xs = [randn(B, D) for _ in range(S)]
        self.values = torch.randn(S, B, k, generator=g).to(DEVICE, acc_dtype(dtype))
        self.xs[0][2] = NAN
        for t in (*self.weights, *self.latent_biases):
            t[0], t[-1] = INF, NAN


@pytest.fixture(params=[KERNEL_DTYPE, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


PATTERNS = pytest.mark.parametrize("pattern", ["some", "all", "none"])
ROUTES = pytest.mark.parametrize("k", [5, 20])  # in the interpreter 20 rows of float64 run in chunks


@PATTERNS
@pytest.mark.parametrize("k, own", [(1, False), (5, True), (20, False)])
def test_values_of_absent_latents_are_zero(impl, pattern, k, own, dtype):
    check_values(impl, pattern, k, own, dtype)


@PATTERNS
def test_values_of_absent_latents_are_zero_where_columns_are_split(pattern, dtype, monkeypatch):
    monkeypatch.setattr(gather, "gather_config", lambda *_: GatherConfig(16, 16, 1, 4, 1))
    check_values("triton", pattern, 9, False, dtype)


def check_values(impl, pattern, k, own, dtype):
    c = Absent(pattern, k, dtype, own)
    count = torch.tensor([max(k - s, 1) for s in range(S)], dtype=torch.int32, device=DEVICE) if own else None
    got, *lists = gather_values(c.indices, c.xs, c.weights, c.latent_biases, count, True, impl)
    want, *_ = gather_values(c.whole, c.xs, c.weights, c.latent_biases, count, False, impl)
    assert same(got, torch.where(c.absent, 0.0, want))
    for s, n_valid in enumerate([k] if count is None else count.tolist()):
        order, offsets, ids = (part[s] for part in lists)
        indices = c.indices if count is None else c.indices[s]
        listed = (indices != ABSENT) & (torch.arange(k, device=DEVICE) < n_valid)
        assert int(offsets[-1]) == int(listed.sum())
        assert torch.equal(indices.flatten()[order[: offsets[-1]].long()].int(), ids[: offsets[-1]])


@PATTERNS
@ROUTES
def test_dots_and_sums_read_nothing_of_absent_latents(impl, pattern, k, dtype):
    c = Absent(pattern, k, dtype)
    w, x = c.weights[0], torch.stack(c.xs)
    for count in (None, torch.tensor(max(k - 2, 0), dtype=torch.int32, device=DEVICE)):
        dots = gather_dot(c.indices, w, x, count, impl)
        assert same(dots, torch.where(c.absent, 0.0, gather_dot(c.whole, w, x, count, impl)))
    without = torch.where(c.absent, 0.0, c.values)
    for bias in (None, c.xs[1][0]):
        for wide in (False, True):
            got = gather_sum(c.indices, c.values, w, bias, wide, impl)
            assert got.dtype == (acc_dtype(dtype) if wide else dtype)
            assert same(got, gather_sum(c.whole, without, w, bias, wide, impl))
    poisoned = torch.where(c.absent, INF, c.values)  # values of absent latents are not read either
    assert same(got, gather_sum(c.indices, poisoned, w, bias, True, impl))


def test_wide_sums_are_the_sums_before_they_are_rounded(impl, dtype):
    c = Absent("none", 9, dtype)
    wide, sums = (gather_sum(c.indices, c.values, c.weights[0], None, wide, impl) for wide in (True, False))
    codes = [reference.codes(c.indices, v.double(), N) for v in c.values]
    exact = torch.stack([code[:, 1:-1] @ c.weights[0][1:-1].double() for code in codes])
    scale, eps = exact.abs().max(), torch.finfo(dtype).eps
    assert (wide - exact).abs().max() <= max(4 * eps**2, 1e-14 if wide.dtype == torch.float64 else 1e-6) * scale
    if impl == "triton" and CUDA:  # the interpreter truncates
        assert torch.equal(wide.to(dtype), sums)


def test_sums_without_reading_on_the_host(monkeypatch, dtype):
    """The route of torch on a GPU: absent entries are moved into a bag of their own."""
    c = Absent("some", 9, dtype)
    want = gather_sum(c.indices, c.values, c.weights[0], None, False, "torch")
    monkeypatch.setattr(gather, "is_host_readable", lambda _: False)
    assert same(gather_sum(c.indices, c.values, c.weights[0], None, False, "torch"), want)


@pytest.mark.parametrize("threshold", [1e-3, -1.0])
def test_absent_latents_do_not_fire(impl, threshold):
    c = Absent("some", 9, torch.float32)
    got, want = (torch.arange(N, device=DEVICE) for _ in range(2))
    count_fired_([got], c.indices, c.values[:1], threshold, impl)
    fired = c.whole[(c.values[0] > threshold) & ~c.absent]
    want.add_(1)[fired.unique()] = 1
    assert torch.equal(got, want)
    _, offsets, ids = inverse_index(c.indices, N, impl)
    assert int(offsets[-1]) == int((~c.absent).sum()) and (ids[offsets[-1] :] == N).all()


# Shards: each holds a block of the latents


def blocks(n, shards):
    """First and last latent of each shard's block."""
    ends = [s * (n // shards) + min(s, n % shards) for s in range(shards + 1)]
    return list(pairwise(ends))


def local_ids(indices, low, high):
    return torch.where((indices >= low) & (indices < high), indices - low, ABSENT)


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_gradients_of_shards_are_blocks_of_the_whole(impl, shards):
    g = torch.Generator().manual_seed(5)
    rows, k, n, d = 9, 6, 23, 20

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, KERNEL_DTYPE)

    # hot latents too: lists longer than a chunk
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).to(DEVICE)
    indices[:, 0] = 11
    coef, mat = randn(S, rows, k), randn(S, rows, d)

    def reduced(local, size):
        out, sums = randn(size, d), randn(size)
        lists = inverse_index(local, size, impl)
        latent_reduce_([out], [sums], *lists, coef, None, None, [mat], k, False, impl)
        return out, sums

    out, sums = reduced(indices, n)
    for low, high in blocks(n, shards):
        own_out, own_sums = reduced(local_ids(indices, low, high), high - low)
        assert torch.equal(own_out, out[low:high]) and torch.equal(own_sums, sums[low:high])


@pytest.mark.parametrize("normalize, go", [(PLAIN, 1.0), (BEFORE, 1.0), (AFTER, 1.0), (BEFORE, 0.0)])
def test_adam_steps_of_shards_are_blocks_of_the_whole(impl, normalize, go):
    g = torch.Generator().manual_seed(6)
    rows, k, n, widths, adam = 7, 4, 23, (20, 33), (0.9, 0.99, 1e-8)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, KERNEL_DTYPE)

    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).to(DEVICE)
    indices[:, 0] = 11
    streams = range(len(widths))
    params = [t for d in widths for t in (randn(n, d), randn(n, d), randn(d), randn(n))]
    ms, vs = [randn(*p.shape) for p in params], [randn(*p.shape).square() for p in params]
    scalars = torch.rand(4 * len(widths), 5, generator=g).to(DEVICE, KERNEL_DTYPE)
    scalars[:, 4] = go
    dbiases, mats, coef = [randn(d) for d in widths], [randn(1, rows, d) for d in widths], randn(1, rows, k)
    gate = randn(1, rows, k)

    def stepped(low, high, sums):
        """Parameters and moments after the step of a block."""
        own = [[t[low:high] if i % 4 != 2 else t for i, t in enumerate(of)] for of in (params, ms, vs)]
        own = [[t.clone() for t in of] for of in own]
        inverse = inverse_index(local_ids(indices, low, high), high - low, impl)
        lists = [t for s in streams for t in (*inverse, coef, None, gate, mats[s])]
        latent_adam_(*own, [], scalars, dbiases, sums, lists, lists, k, [], [], 0, normalize, *adam, impl)
        return own

    def pre_biases_stepped(own, sums):
        grads = [None] * len(params)
        grads[2::4] = [dbias - total for dbias, total in zip(dbiases, sums, strict=True)]
        adam_stream_(own[0], grads, *own[1:], scalars, normalize, *adam, impl)

    whole = stepped(0, n, [])
    sums = [randn(d) for d in widths]
    one = stepped(0, n, sums)
    for before, after in zip((params, ms, vs), one, strict=True):
        assert all(torch.equal(before[i], after[i]) for i in range(2, len(params), 4))
    pre_biases_stepped(one, sums)
    for a, b in zip(whole, one, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    totals = [torch.zeros(d, dtype=KERNEL_DTYPE, device=DEVICE) for d in widths]
    for low, high in blocks(n, 3):
        part = [torch.full_like(t, NAN) for t in totals]
        shard = stepped(low, high, part)
        for a, b in zip(whole, shard, strict=True):
            assert all(torch.equal(x[low:high], y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if i % 4 != 2)
        totals = [a + b for a, b in zip(totals, part, strict=True)]
    if go:
        for a, b in zip(totals, sums, strict=True):
            torch.testing.assert_close(a, b)


# Keys and merged candidates


def exact_keys(h, k, impl, dtype=torch.float32, ids=None, count=None):
    """Selection among given logits [B, N] and its keys: identity weights carry the logits through the GEMM exactly."""
    eye = torch.eye(len(h), dtype=dtype, device=DEVICE)
    weights, bias = h.T.contiguous().to(DEVICE, dtype), torch.zeros(h.shape[1], device=DEVICE)
    keys = torch.full((len(h), k), 99.0, dtype=keys_dtype(dtype, impl), device=DEVICE)
    return select_keys([eye], [weights], [bias], k, ids, count, keys, impl), keys


FORMS = [(torch.float32, 1), (torch.float32, 70), (torch.bfloat16, 7), (torch.float16, 7), (torch.float64, 7)]


@pytest.mark.parametrize("dtype, k", FORMS, ids=str)
def test_keys_are_the_logits_compared(impl, dtype, k):
    if CUDA and impl == "triton" and dtype == torch.float64:
        pytest.skip("no float64 kernels on a GPU")
    h = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    h[2] = h[2].round()
    indices, keys = exact_keys(h, k, impl, dtype)
    want = reference.topk_indices(h.to(DEVICE, keys.dtype), k)
    assert torch.equal(indices, want) and torch.equal(keys, h.to(DEVICE, keys.dtype).gather(1, want))


def test_keys_of_rows_that_are_not_finite(impl):
    h = torch.zeros(1, 70)
    h[0, ::3], h[0, 1::3], h[0, 2] = -INF, INF, NAN
    x, w = torch.ones(1, 1, device=DEVICE), torch.zeros(70, 1, device=DEVICE)
    keys = torch.empty(1, 70, device=DEVICE)
    indices = select_keys([x], [w], [h[0].to(DEVICE)], 70, None, None, keys, impl)
    assert same(keys, h.to(DEVICE).gather(1, indices)) and keys[0, 0].isnan()


@pytest.mark.parametrize("dead", [0, 1, 5, 8, 70])
def test_keys_of_listed_columns(impl, dead):
    h = torch.randn(5, 70, generator=torch.Generator().manual_seed(2))
    ids = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    count = torch.tensor(dead, dtype=torch.int32, device=DEVICE)
    indices, keys = exact_keys(h, 8, impl, ids=ids.int().to(DEVICE), count=count)
    n_valid = min(8, dead)
    assert same(keys[:, :n_valid], h.to(DEVICE).gather(1, indices[:, :n_valid]))
    assert (keys[:, n_valid:] == -INF).all() and torch.equal(indices[0, n_valid:].cpu(), ids[n_valid:8])


@pytest.mark.parametrize("listed", [False, True])
def test_keys_of_every_stream(impl, listed):
    p = problem(requires_grad=False, dtype=torch.float32)
    xs, ws, cs, k = p.xs, p.w_encs, p.latent_biases, 6
    ids = torch.stack([torch.arange(70, dtype=torch.int32)] * 3).to(DEVICE) if listed else None
    count = torch.tensor([70, 2, 0], dtype=torch.int32, device=DEVICE) if listed else None
    keys, alone = torch.empty(3, 6, k, device=DEVICE), torch.empty(6, k, device=DEVICE)
    got = select_each_keys(xs, ws, cs, k, ids, count, keys, impl)
    for s in range(3):
        own, part = (None, None) if ids is None else (ids[s], count[s]), slice(s, s + 1)
        assert torch.equal(got[s], select_keys(xs[part], ws[part], cs[part], k, *own, alone, impl))
        assert torch.equal(keys[s], alone)


def test_keys_of_rows_in_chunks(monkeypatch):
    h = torch.randn(20, 70, generator=torch.Generator().manual_seed(4))
    want, keys = exact_keys(h, 5, "triton")
    monkeypatch.setattr(selection, "rows_per_chunk", lambda *_: (16, 1))
    got, again = exact_keys(h, 5, "triton")
    assert torch.equal(want, got) and torch.equal(keys, again)


LEVELS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 7.0])


@settings(max_examples=15 if not CUDA else 150, deadline=None)
@given(data=st.data(), n=st.integers(1, 60), shards=st.integers(1, 6))
def test_merged_candidates_of_shards_are_the_selection_of_the_whole(data, n, shards):
    k = data.draw(st.integers(1, min(n, 9)))
    h = torch.tensor([data.draw(st.lists(LEVELS, min_size=n, max_size=n)) for _ in range(2)])
    want = reference.topk_indices(h, k)
    for impl in ("torch", "triton"):
        ids, keys = [], []
        for low, high in blocks(n, shards):
            if low < high:
                own, key = exact_keys(h[:, low:high], min(k, high - low), impl)
                ids.append(own + low)
                keys.append(key)
        merged = topk_positions(torch.cat(keys, 1), k, impl)
        assert torch.equal(torch.cat(ids, 1).gather(1, merged).cpu(), want), impl


def hard_keys(M):
    g = torch.Generator().manual_seed(M)
    rows = [torch.zeros(M), torch.full((M,), -INF), torch.full((M,), NAN), torch.arange(M * 1.0)]
    rows += [-rows[3], torch.randn(M, generator=g), torch.randint(-2, 3, (M,), generator=g).float()]
    rows += [torch.tensor([-0.0, 0.0] * M)[:M], torch.randn(M, generator=g)]
    rows[-1][torch.rand(M, generator=g) < 0.3] = NAN
    rows[-1][torch.rand(M, generator=g) < 0.2] = INF
    rows[-1][torch.rand(M, generator=g) < 0.2] = -INF
    return torch.stack(rows).to(DEVICE)


SIZES = pytest.mark.parametrize("M, k", [(1, 1), (37, 5), (64, 64), (150, 65), (1100, 1)])


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_of_the_largest_keys(impl, M, k, dtype):
    keys = hard_keys(M).to(dtype)
    assert torch.equal(topk_positions(keys, k, impl), reference.topk_indices(keys, k))


@SIZES
@pytest.mark.parametrize("levels", [2, 3])
def test_positions_found_through_maxima(M, k, levels, monkeypatch):
    config = select_config(M, k)
    if levels == 3:
        spans = max(16, next_power_of_2(cdiv(M, 16)))
        config = SelectConfig(group=4, span=16, k_pad=config.k_pad, n_spans_pad=spans, num_warps=4)
    monkeypatch.setattr(selection, "candidates_config", lambda *_: config)
    keys = hard_keys(M)
    assert torch.equal(topk_positions(keys, k, "triton"), reference.topk_indices(keys, k))


def test_more_keys_than_are_read_at_once(impl):
    keys = hard_keys(9000)[5:]
    assert candidates_config(9000, 3).group > 1
    assert torch.equal(topk_positions(keys, 3, impl), reference.topk_indices(keys, 3))


def test_positions_of_rows_in_chunks(monkeypatch):
    keys = hard_keys(300)
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 600)
    assert torch.equal(topk_positions(keys, 9, "triton"), reference.topk_indices(keys, 9))


def test_float64_keys_are_compared_in_float64():
    keys = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64, device=DEVICE)
    assert topk_positions(keys, 3, "torch").tolist() == [[1, 0, 2]]


def test_lists_of_local_selection_skip_absent_latents(impl):
    c = Absent("some", 9, torch.float32, own=True)
    order, offsets, ids = inverse_index_op(c.indices, S, N, None, impl)
    for s in range(S):
        size = int(offsets[s, -1])
        assert size == int((~c.absent[s]).sum()) and (ids[s, size:] == N).all()
        assert torch.equal(c.indices[s].flatten()[order[s, :size].long()].int(), ids[s, :size])
