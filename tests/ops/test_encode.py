import pytest
import torch
from common import COMPOSITE, assert_close, assert_grads_close, problem
from conftest import CUDA, DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_kernels import AlignedSAE, encode_topk, reference, values_at
from sparc_kernels.core._triton import tl, triton
from sparc_kernels.launch.select import select_config
from sparc_kernels.ops.encode import centre_for, select_latents
from sparc_kernels.ops.selection import _ordered_key, select
from sparc_kernels.tools.trace import InsideOperators

NAMES = [f"{what}[{s}]" for what in ("xs", "w_encs", "pre_biases", "latent_biases") for s in range(3)]


@pytest.mark.parametrize("topk_type", ["global", "local"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(B=6, N=70, widths=(20, 13, 7), k=5),
        dict(B=1, N=33, widths=(1, 40, 17), k=1),
        dict(B=17, N=16, widths=(5, 3, 2), k=16),  # k = N
        dict(B=3, N=200, widths=(9, 8, 33), k=12),
    ],
    ids=lambda s: f"B{s['B']}-N{s['N']}-k{s['k']}",
)
def test_agrees_with_the_reference_and_so_do_all_gradients(impl, topk_type, shape):
    shape = dict(shape)
    k = shape.pop("k")
    p = problem(**shape)
    indices, values = encode_topk(*p.encoder, k, topk_type, impl)
    want_indices, want_values = reference.encode_topk(*p.encoder, k, topk_type)
    assert torch.equal(indices, want_indices)
    assert_close(values, want_values, what="values")
    cotangent = torch.randn_like(want_values)
    tensors = [t for group in p.encoder for t in group]
    assert_grads_close((values * cotangent).sum(), (want_values * cotangent).sum(), tensors, NAMES)


def chosen(p, w_encs, impl, k=5):
    """The global selection of a problem, its encoders laid out as given."""
    return select_latents(centre_for(p.xs, w_encs, p.pre_biases, impl), w_encs, p.latent_biases, k, "global", impl=impl)


def exact_select(h, k, impl, dtype=torch.float32):
    """Selection among given logits: one stream of identity weights carries them through the GEMM exactly."""
    B, N = h.shape
    x = torch.zeros(B, 1, dtype=dtype, device=DEVICE)
    weights = torch.zeros(N, 1, dtype=dtype, device=DEVICE)
    if B == 1:  # through the bias
        return select([x], [weights], [h[0].to(DEVICE, torch.float32)], k, None, None, impl)
    eye = torch.eye(B, dtype=dtype, device=DEVICE)
    weights, bias = h.T.contiguous().to(DEVICE, dtype), torch.zeros(N, device=DEVICE)
    return select([eye], [weights], [bias], k, None, None, impl)


LEVELS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 7.0])


@settings(max_examples=20 if not CUDA else 200, deadline=None)
@given(data=st.data(), n=st.integers(1, 90))
def test_selection_is_the_stable_sort_on_rows_full_of_ties(data, n):
    k = data.draw(st.integers(1, min(n, 9)))
    h = torch.tensor([data.draw(st.lists(LEVELS, min_size=n, max_size=n)) for _ in range(2)])
    want = reference.topk_indices(h, k)
    for impl in ("torch", "triton"):
        assert torch.equal(exact_select(h, k, impl).cpu(), want), impl


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(70),  # a tie storm
        torch.full((70,), -INF),
        torch.full((70,), INF),
        torch.full((70,), NAN),
        torch.full((70,), -INF).index_fill(0, torch.tensor([69, 3]), 2.0),
        torch.arange(70.0).index_fill(0, torch.tensor([0, 40]), NAN),
        torch.arange(70.0).index_fill(0, torch.tensor([7]), INF),
        -torch.arange(70.0),  # the whole top-k in the first groups
        torch.arange(70.0),  # and in the ragged last one
        torch.full((70,), -1.0),  # no positive value
        torch.tensor([-0.0, 0.0] * 35),  # equal: the lowest index first
    ],
    ids=[
        "ties",
        "-inf",
        "+inf",
        "nan",
        "two finite",
        "some nan",
        "one inf",
        "first",
        "last",
        "negative",
        "signed zero",
    ],
)
def test_hard_rows(impl, row, k):
    assert exact_select(row[None], k, impl).tolist() == reference.topk_indices(row[None], k).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_integers_are_selected_exactly_in_every_dtype(impl, dtype):
    g = torch.Generator().manual_seed(1)
    xs = [torch.randint(-3, 4, (9, d), generator=g).to(DEVICE, dtype) for d in (6, 5)]
    ws = [torch.randint(-2, 3, (50, d), generator=g).to(DEVICE, dtype) for d in (6, 5)]
    h = sum(x.float() @ w.float().T for x, w in zip(xs, ws, strict=True))
    got = select(xs, ws, [torch.zeros(50, device=DEVICE)] * 2, 7, None, None, impl)
    assert torch.equal(got, reference.topk_indices(h, 7))


@pytest.mark.parametrize("dead", [0, 1, 3, 8, 40])
def test_selection_among_given_columns_only(impl, dead):
    p = problem(requires_grad=False)
    x, w = p.xs[0], p.w_encs[0]
    chosen = torch.randperm(70, generator=torch.Generator().manual_seed(2))[:dead].sort().values
    rest = torch.tensor([n for n in range(70) if n not in set(chosen.tolist())])
    ids = torch.cat([chosen, rest]).int().to(DEVICE)
    count = torch.tensor(dead, dtype=torch.int32, device=DEVICE)
    got = select([x], [w], [p.latent_biases[0]], 8, ids, count, impl)
    h = x @ w.T + p.latent_biases[0]
    among = h[:, chosen.to(DEVICE)]
    want = chosen.to(DEVICE)[reference.topk_indices(among, min(8, dead))]
    assert torch.equal(got[:, : min(8, dead)], want)
    assert torch.equal(got[:, dead:], ids[dead:8].long().expand(6, -1))


def test_selection_in_three_levels_is_exact(monkeypatch):
    """Large N with large k adds a level of coarse maxima; here at a tiny shape."""
    from sparc_kernels.launch import select as select_settings
    from sparc_kernels.ops import selection

    assert select_config(2**20, 512).span > select_config(2**20, 512).group
    config = select_settings.SelectConfig(group=4, span=16, k_pad=8, n_spans_pad=16, num_warps=4)
    monkeypatch.setattr(selection, "select_config", lambda n, k, compact: config)
    for seed in range(3):
        h = torch.randint(-4, 5, (2, 150), generator=torch.Generator().manual_seed(seed)).float()
        assert torch.equal(exact_select(h, 6, "triton").cpu(), reference.topk_indices(h, 6))


def test_rows_are_processed_in_chunks_with_the_same_result(impl, monkeypatch):
    from sparc_kernels.launch import select as select_settings
    from sparc_kernels.ops import selection

    p = problem(B=40, requires_grad=False)
    whole = chosen(p, p.w_encs, impl)
    for where in (selection, select_settings):
        monkeypatch.setattr(where, "SCRATCH_BYTES", 70 * 8 * 17)
    monkeypatch.setattr(select_settings, "SCRATCH_LEAST_ROWS", 1)
    assert torch.equal(chosen(p, p.w_encs, impl), whole)


class LikeAMX(InsideOperators):
    """CPU products of half precision as oneDNN makes them on AMX: at a width that is no multiple of 32 a row with an
    inf becomes NaN. Inside the package's operators too."""

    impl, composite = "torch", COMPOSITE

    def dispatch(self, func, args, kwargs):
        out = func(*args, **kwargs)
        if func._schema.name in ("aten::mm", "aten::addmm"):
            rows = args[-2]
            if rows.dtype.itemsize == 2 and rows.shape[1] % 32:
                out.masked_fill_(rows.isinf().any(1, keepdim=True), float("nan"))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [127, 131, 65, 64])
def test_a_row_with_an_inf_is_selected_on_its_own_numbers(dtype, width):
    """On every CPU: 5 of the 9 latents have +inf there, and the lowest of those come first."""
    w = torch.ones(9, width, dtype=dtype)
    w[1::2] = -1  # inf * -1 is -inf, so rows are inf or -inf, never NaN
    x, b, c = torch.ones(3, width, dtype=dtype), torch.zeros(width, dtype=dtype), torch.zeros(9, dtype=dtype)
    x[1, 3] = float("inf")
    torch.manual_seed(0)
    model = AlignedSAE({"a": width}, 9, 7, impl="torch", dtype=dtype)
    with torch.no_grad():
        model.encoders["a"].weight.copy_(w)
    with LikeAMX():
        indices, values = encode_topk([x], [w], [b], [c], 7, impl="torch")
        outputs = model({"a": x})
        logits = outputs["logits_a"]
    assert indices[1].tolist() == outputs.indices[1].tolist() == [0, 2, 4, 6, 8, 1, 3]
    assert values[0, 1].tolist() == [float("inf")] * 5 + [0.0] * 2
    assert logits[1].tolist() == [float("-inf") if n % 2 else float("inf") for n in range(9)]
    assert logits[0].tolist() == [-width if n % 2 else width for n in range(9)]


def test_inputs_of_any_strides(impl):
    p = problem(requires_grad=False)
    want = encode_topk(*p.encoder, 5, impl=impl)
    xs = [torch.empty(x.shape[1], x.shape[0], dtype=x.dtype, device=DEVICE).copy_(x.t()).t() for x in p.xs]
    wide = [torch.cat([w, w], 1)[:, : w.shape[1]] for w in p.w_encs]
    strided = [torch.stack([b, b], 1)[:, 0] for b in p.pre_biases]
    got = encode_topk(xs, wide, strided, p.latent_biases, 5, impl=impl)
    assert torch.equal(got[0], want[0])
    assert_close(got[1], want[1])


def test_only_asked_gradients_are_made(impl):
    p = problem(requires_grad=False)
    args = [p.xs[0], p.w_encs[0], p.pre_biases[0], p.latent_biases[0]]
    indices = torch.arange(30, device=DEVICE).reshape(6, 5)
    every = [a.clone().requires_grad_() for a in args]
    full = torch.autograd.grad(values_at(*every, indices, impl=impl).square().sum(), every)
    for i in range(4):
        some = [a.clone().requires_grad_(j == i) for j, a in enumerate(args)]
        values_at(*some, indices, impl=impl).square().sum().backward()
        assert_close(some[i].grad, full[i])
        assert all(a.grad is None for j, a in enumerate(some) if j != i)


@pytest.mark.skipif(CUDA, reason="float64 kernels run in the interpreter only")
def test_gradcheck_of_values(impl):
    p = problem(B=2, N=5, widths=(3, 2))
    indices = torch.tensor([[1, 4], [4, 0]])
    args = (p.xs[0], p.w_encs[0], p.pre_biases[0], p.latent_biases[0])
    assert torch.autograd.gradcheck(lambda *a: values_at(*a, indices, impl=impl), args)


def test_nothing_is_selected_twice_and_values_descend_in_the_sum(impl):
    p = problem(B=9, N=300, dtype=torch.float32, requires_grad=False)
    indices, _ = encode_topk(*p.encoder, 20, impl=impl)
    h = sum(reference.preactivations(*a) for a in zip(*p.encoder, strict=True))
    picked = h.gather(1, indices)
    assert (picked.diff(dim=1) <= 1e-5).all()
    assert all(len(set(row)) == 20 for row in indices.tolist())
    others = h.scatter(1, indices, float("-inf"))
    assert (others.max(1).values <= picked.min(1).values + 1e-5).all()


@triton.jit
def _key_kernel(x_ptr, key_ptr, n: tl.constexpr, SHIFT: tl.constexpr):
    offs = tl.arange(0, n)
    tl.store(key_ptr + offs, _ordered_key(tl.load(x_ptr + offs), SHIFT))


@pytest.mark.parametrize(("dtype", "shift"), [(torch.bfloat16, 16), (torch.float16, 13), (torch.float32, 0)])
def test_keys_order_every_value_as_torch_does(dtype, shift):
    """All 65,536 half precision values (the same bit patterns widened for float32): order, ties and NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    x = bits.view(half).float()  # widened here: the interpreter's cast of bf16 subnormals is wrong
    key = torch.empty(2**16, dtype=torch.int32, device=DEVICE)
    _key_kernel[(1,)](x, key, 2**16, shift)
    order = torch.sort(x, stable=True).indices
    keys, values = key[order], x[order]
    assert (key > torch.iinfo(torch.int32).min).all()
    ordered = values[1:] > values[:-1]
    assert (keys[1:] >= keys[:-1]).all() and (keys[1:] > keys[:-1])[ordered].all()
    tied = values[1:] == values[:-1]
    nan = values.isnan()
    assert (keys[1:] == keys[:-1])[tied].all()
    assert (keys[nan] > keys[~nan].max()).all() and keys[nan].unique().numel() == 1


@pytest.fixture
def library(monkeypatch):
    """The library's GEMM wherever the weights lie side by side."""
    from sparc_kernels.ops import encode, selection

    monkeypatch.setattr(selection, "encode_by_library", lambda *_: True)
    monkeypatch.setattr(encode, "wants_joint", lambda w: True)
    monkeypatch.setattr(selection, "MAXIMA_BLOCK", 32)
    used = []
    kernel = selection._row_maxima_kernel

    class Counting:
        def __getitem__(self, grid):
            used.append(grid)
            return kernel[grid]

    monkeypatch.setattr(selection, "_row_maxima_kernel", Counting())
    return used


@pytest.mark.parametrize("widths", [(20,), (20, 13, 7)], ids=["one stream", "three streams"])
def test_library_gemm_and_row_maxima_select_the_same(library, widths, monkeypatch):
    from sparc_kernels.launch import select as select_settings

    p = problem(B=9, widths=widths, requires_grad=False)
    wide = torch.cat(p.w_encs, 1)
    joint = list(wide.split(widths, 1))
    want = chosen(p, p.w_encs, "torch")
    assert torch.equal(chosen(p, joint, "triton"), want)
    assert len(library) == 1
    monkeypatch.setattr(select_settings, "SCRATCH_BYTES", 70 * 8 * 4)  # a few rows at a time
    monkeypatch.setattr(select_settings, "SCRATCH_LEAST_ROWS", 1)
    assert torch.equal(chosen(p, joint, "triton"), want)
    assert len(library) > 2


@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize("levels", [2, 3])
def test_library_selection_on_hard_rows(library, monkeypatch, k, levels):
    from sparc_kernels.launch import device as launch_device
    from sparc_kernels.launch import select as select_settings
    from sparc_kernels.ops import selection

    if levels == 3:
        config = select_settings.SelectConfig(
            group=4, span=16, k_pad=launch_device.next_power_of_2(k), n_spans_pad=16, num_warps=4
        )
        monkeypatch.setattr(selection, "select_config", lambda n, k, compact: config)
    rows = torch.stack(
        [
            torch.zeros(70),
            torch.full((70,), -INF),
            torch.full((70,), INF),
            torch.full((70,), NAN),
            torch.arange(70.0).index_fill(0, torch.tensor([0, 40]), NAN),
            torch.arange(70.0).index_fill(0, torch.tensor([7]), INF),
            -torch.arange(70.0),
            torch.arange(70.0),
            torch.full((70,), -1.0),
        ]
    ).to(DEVICE)
    eye = torch.eye(9, device=DEVICE)
    for i, row in enumerate(rows):  # one at a time: 0 * inf would spread a row over the others
        got = select(
            [eye[i : i + 1, i : i + 1]],
            [row[:, None].contiguous()],
            [torch.zeros(70, device=DEVICE)],
            k,
            None,
            None,
            "triton",
        )
        assert got[0].tolist() == reference.topk_indices(row[None], k)[0].tolist(), i
    assert len(library) == 9


def test_what_lies_side_by_side_is_recognised():
    from sparc_kernels.ops.joint import JointCast, joint

    wide = torch.arange(24.0).reshape(4, 6)
    a, b = wide.split([2, 4], 1)
    assert torch.equal(joint([a, b]), wide) and torch.equal(joint([wide]), wide)
    assert joint([b, a]) is None and joint([a, a]) is None and joint([a, b.clone()]) is None
    assert joint([a, wide[:, 3:]]) is None and joint([wide.t()]) is None
    w = [torch.randn(5, d, dtype=torch.float64, requires_grad=True) for d in (3, 2)]
    cast = JointCast.apply(torch.float32, *w)
    assert joint(cast).shape == (5, 5) and all(torch.equal(c, x.float()) for c, x in zip(cast, w, strict=True))
    grads = torch.autograd.grad(cast[1].square().sum() + 3 * cast[0].sum(), w)
    assert grads[0].dtype == torch.float64 and torch.equal(grads[0], torch.full_like(w[0], 3.0))
    assert torch.equal(grads[1], 2 * w[1].detach().float().double())


@pytest.mark.parametrize("N", [70, 8192, 2**20, 2**23, 2**26])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scratch_of_the_selection_stays_within_its_limit(monkeypatch, N, dtype):
    """On meta tensors with the kernels left out: what is allocated for any B and N."""
    from sparc_kernels.ops import selection

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    sizes = []
    empty = torch.empty
    monkeypatch.setattr(selection, "_encode_kernel", Nothing())
    monkeypatch.setattr(selection, "_select_kernel", Nothing())

    def noted(*size, **options):
        t = empty(*size, **options)
        sizes.append(t.numel() * t.element_size())
        return t

    x, w = (empty(n, 8, device="meta", dtype=dtype) for n in (65536, N))
    bias = empty(N, device="meta", dtype=torch.float32)
    monkeypatch.setattr(torch, "empty", noted)
    out = selection._select_triton(xs=[x], w_encs=[w], biases=[bias], k=32, ids=None, count=None, keys=None)
    assert out.shape == (65536, 32)
    assert sum(sizes) - out.numel() * 8 <= 512 * 2**20


def test_rows_kept_at_once_are_equal_parts_within_the_limit():
    from sparc_kernels.launch.budgets import SCRATCH_BYTES
    from sparc_kernels.launch.device import cdiv
    from sparc_kernels.launch.select import rows_per_chunk

    for rows in (1, 100, 4096, 5000, 65536):
        for row_bytes in (2**14, 2**17, 2**20 + 999, 2**21, 2**22, 2**30):
            for tiles in (0, 100, cdiv(rows, 128) * row_bytes // 512):
                part, buffers = rows_per_chunk(rows, row_bytes, 128, tiles)
                assert 1 <= part <= rows and (buffers * part * row_bytes <= 2 * SCRATCH_BYTES or part == 1)
                if part > 128 and part < rows and 1024 * row_bytes <= SCRATCH_BYTES:
                    assert buffers * part * row_bytes <= SCRATCH_BYTES
                assert buffers == 1 if tiles < 1024 or part == rows else buffers <= 2
    assert rows_per_chunk(4096, 2**16, 128) == (4096, 1) and rows_per_chunk(4096, 2**17, 128) == (2048, 1)
    assert rows_per_chunk(4096, 2**16, 128, 4096) == (768, 2)  # six parts, in whole tiles of rows
    assert rows_per_chunk(4096, 2**14, 128, 1024) == (2048, 2)  # two of 512
    # two buffers of the whole scratch: shorter parts would cost more
    assert rows_per_chunk(4096, 2**18 + 2**15, 128, 2**14) == (768, 2)
    assert rows_per_chunk(4096, 2**21, 128, 2**17) == (
        256,
        1,
    )  # one, where two would make the GEMM read W_enc too often


class Late:
    """`SideStream`, as late as it may be: work is done when something waits for it, and not before."""

    def __init__(self, device, enabled=True):
        self.enabled, self.work, self.ran = enabled, [], 0

    def run(self, work):
        if not self.enabled:
            return work(), None
        self.work.append(work)
        return None, len(self.work)

    def wait(self, mark):
        for work in self.work[self.ran : mark or 0]:
            work()
        self.ran = max(self.ran, mark or 0)

    def join(self):
        self.wait(len(self.work))


class TooLate(Late):
    """Waits for nothing but the end."""

    def wait(self, mark):
        if mark == len(self.work):
            super().wait(mark)


@pytest.mark.parametrize(("beside", "right"), [(Late, True), (TooLate, False)])
def test_a_selector_that_runs_late_finds_its_logits(monkeypatch, beside, right):
    """The GEMM of later rows must not write where a selector still has to read, nor the result be used too early."""
    from sparc_kernels.launch import select as select_settings
    from sparc_kernels.ops import selection

    p, made = problem(B=64, requires_grad=False), []
    want = chosen(p, p.w_encs, "torch")
    monkeypatch.setattr(select_settings, "BESIDE_TILES", 3)
    monkeypatch.setattr(selection, "SideStream", lambda *args, **named: made.append(beside(*args, **named)) or made[-1])
    assert torch.equal(chosen(p, p.w_encs, "triton"), want) == right
    assert len(made[0].work) == made[0].ran == 4


def test_values_of_many_streams_a_few_at_a_time(monkeypatch):
    from sparc_kernels.ops import encode

    p = problem(widths=(20, 13, 7, 5))
    whole = [encode_topk(*p.encoder, 5, topk_type, impl="triton")[1] for topk_type in ("global", "local")]
    monkeypatch.setattr(encode, "SCRATCH_BYTES", 1)
    parts = [encode_topk(*p.encoder, 5, topk_type, impl="triton")[1] for topk_type in ("global", "local")]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("split", ["columns", "latents", ""])
@pytest.mark.parametrize("topk_type", ["global", "local"])
def test_values_are_finished_after_gathers_that_split(monkeypatch, split, topk_type):
    """And by the gather itself where it has all columns of all latents."""
    from sparc_kernels.launch import gather
    from sparc_kernels.ops import encode

    launched, launch = [], encode.launch
    monkeypatch.setattr(encode, "launch", lambda kernel, grid: launched.append(kernel) or launch(kernel, grid))
    if split == "columns":
        monkeypatch.setattr(gather, "SLAB_BYTES", 1)
    p = problem(B=3, N=40, widths=(290 if split == "columns" else 20, 13))
    k = 20 if split == "latents" else 5
    indices, values = encode_topk(*p.encoder, k, topk_type, "triton")
    want_indices, want_values = reference.encode_topk(*p.encoder, k, topk_type)
    assert torch.equal(indices, want_indices)
    assert_close(values, want_values, what="values")
    assert (encode._finish_values_kernel in launched) == bool(split) or CUDA
