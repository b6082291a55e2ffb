import pytest
import torch
from common import assert_close, assert_grads_close, problem
from conftest import CUDA, DEVICE

from sparc_kernels import decode, decode_nmse, inverse_index, reference
from sparc_kernels.ops.records import DecodeTarget, SparseCodes
from sparc_kernels.tools.trace import counted_launches


def sparse(B=6, N=70, k=5, S=3, local=False, dtype=None, seed=3):
    """Indices without repeats in a row; about half of the values are zero, as the ReLU leaves them."""
    g = torch.Generator().manual_seed(seed)
    shape = (S, B) if local else (B,)
    indices = torch.rand(*shape, N, generator=g).argsort(-1)[..., :k].to(DEVICE)
    values = torch.randn(S, B, k, generator=g, dtype=torch.float64).relu()
    return indices, values.to(DEVICE, dtype or problem().xs[0].dtype).requires_grad_()


NAMES = ["values", *[f"{what}[{s}]" for what in ("w_decs", "pre_biases", "xs") for s in range(3)]]


@pytest.mark.parametrize("local", [False, True], ids=["shared", "own"])
def test_decode_and_all_gradients(impl, local):
    p = problem()
    indices, values = sparse(local=local)
    got = decode(indices, values, p.w_decs, p.pre_biases, impl=impl)
    want = reference.decode(indices, values, p.w_decs, p.pre_biases)
    assert got.keys() == want.keys()
    cotangents = {pair: torch.randn_like(r) for pair, r in want.items()}
    for pair in want:
        assert_close(got[pair], want[pair], what=str(pair))
    total = [sum((r[pair] * c).sum() for pair, c in cotangents.items()) for r in (got, want)]
    assert_grads_close(*total, [values, *p.w_decs, *p.pre_biases], NAMES[:7])


@pytest.mark.parametrize("local", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(("B", "N", "k", "S"), [(6, 70, 5, 3), (1, 9, 1, 3), (5, 40, 20, 3)])
def test_decode_nmse_and_all_gradients(impl, local, B, N, k, S):
    p = problem(B=B, N=N)
    indices, values = sparse(B, N, k, S, local)
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    assert_close(got, want)
    weights = torch.randn_like(want)  # every term with an upstream gradient of its own
    tensors = [values, *p.w_decs, *p.pre_biases, *p.xs]
    assert_grads_close((got * weights).sum(), (want * weights).sum(), tensors, NAMES)


@pytest.mark.parametrize("S", [1, 8])
def test_one_and_eight_streams(impl, S):
    widths = tuple(range(3, 3 + S))
    p = problem(B=2, widths=widths)
    indices, values = sparse(B=2, S=S)
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    assert_close(got, want)
    assert_grads_close(got.sum(), want.sum(), [values, *p.w_decs], ["values", *map(str, range(S))])


@pytest.mark.parametrize("local", [False, True], ids=["shared", "own"])
def test_asked_pairs_only(impl, local):
    p = problem()
    indices, values = sparse(local=local)
    pairs = [(0, 2), (2, 0), (2, 1)]
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    mask = torch.zeros_like(want)
    for t, s in pairs:
        mask[t, s] = 1
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, pairs=pairs, impl=impl)
    assert_close(got, want * mask)
    a = torch.autograd.grad(got.sum(), [values, p.w_decs[2]])
    b = torch.autograd.grad((want * mask).sum(), [values, p.w_decs[2]])
    for x, y in zip(a, b, strict=True):
        assert_close(x, y)
    recons = decode(indices, values, p.w_decs, p.pre_biases, pairs=pairs, impl=impl)
    assert set(recons) == set(pairs)


def test_a_hot_latent_on_every_row(impl):
    p = problem(B=25)
    indices, values = sparse(B=25)
    indices[:, 2] = 7
    indices = torch.where((indices == 7) & (torch.arange(5, device=DEVICE) != 2), 70 - 1, indices)
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    assert_grads_close(got.sum(), want.sum(), [values, *p.w_decs], ["values", "w0", "w1", "w2"])


def test_an_index_twice_in_a_row_adds_up(impl):
    p = problem()
    indices, values = sparse()
    indices[:, 1] = indices[:, 0]
    got = decode(indices, values, p.w_decs, p.pre_biases, impl=impl)
    want = reference.decode(indices, values, p.w_decs, p.pre_biases)
    assert_grads_close(
        sum(r.square().sum() for r in got.values()), sum(r.square().sum() for r in want.values()),
        [values, p.w_decs[0]], ["values", "w"],
    )  # fmt: skip


def test_zero_values_still_have_a_gradient(impl):
    p = problem()
    indices, values = sparse()
    values = torch.zeros_like(values).requires_grad_()
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    assert_grads_close(got.sum(), want.sum(), [values], ["values"])


def test_contiguous_decoders_give_the_same(impl):
    p = problem(requires_grad=False)
    indices, values = sparse()
    a = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    b = decode_nmse(indices, values, [w.contiguous() for w in p.w_decs], p.pre_biases, p.xs, impl=impl)
    assert torch.equal(a, b)


def test_given_inverse_index_is_used(impl):
    p = problem(B=3)
    indices, values = sparse(B=3)
    inverse = inverse_index(indices, 70)
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, inverse=inverse, impl=impl)
    want = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    for a, b in zip(*(torch.autograd.grad(m.sum(), p.w_decs) for m in (got, want)), strict=True):
        assert torch.equal(a, b)


def test_a_zero_row_makes_its_entries_inf_or_nan_as_in_the_reference(impl):
    p = problem(requires_grad=False)
    indices, values = sparse()
    p.xs[1][2] = 0
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    assert got[1].isinf().all() and want[1].isinf().all()
    assert_close(got[[0, 2]], want[[0, 2]])


def test_terms_without_upstream_gradient_do_not_poison_the_others(impl):
    p = problem()
    indices, values = sparse()
    with torch.no_grad():
        p.xs[1][2] = float("nan")
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl)
    grads = torch.autograd.grad((got * torch.tensor([[1.0], [0.0], [1.0]], device=DEVICE)).sum(), [values, *p.w_decs])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2] == 0).all()


@pytest.mark.skipif(CUDA, reason="float64 kernels run in the interpreter only")
def test_gradcheck(impl):
    p = problem(B=2, N=5, widths=(3, 2))
    indices = torch.tensor([[1, 4], [4, 0]])
    values = torch.rand(2, 2, 2, dtype=torch.float64).requires_grad_()

    def errors(values, w0, w1, b0, b1, x0, x1):
        return decode_nmse(indices, values, [w0, w1], [b0, b1], [x0, x1], impl=impl)

    assert torch.autograd.gradcheck(errors, (values, *p.w_decs, *p.pre_biases, *p.xs))


@pytest.mark.parametrize("spread", [1, 99], ids=["in list order", "from the errors"])
@pytest.mark.parametrize("columns", [None, 16], ids=["whole", "by columns"])
def test_both_routes_of_the_decoder_gradient(monkeypatch, spread, columns):
    """H = sum_s coef v E in list order, or the errors of every source; all columns at once, or a few at a time."""
    from sparc_kernels.ops import decode_grads

    p = problem(widths=(40, 13, 7))
    indices, values = sparse()
    indices[:, 2] = 11  # a hot latent on every row
    monkeypatch.setattr(decode_grads, "H_MIN_SOURCES", spread)
    if columns:
        monkeypatch.setattr(decode_grads, "H_MIN_COLUMNS", 8)
        monkeypatch.setattr(decode_grads, "SCRATCH_BYTES", 16 * 6 * (5 if spread == 1 else 3) * values.element_size())
    got = decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl="triton")
    want = reference.decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs)
    weights = torch.randn_like(want)
    weights[0, 1] = weights[2, 2] = 0  # terms that do not count
    tensors = [values, *p.w_decs, *p.pre_biases, *p.xs]
    assert_grads_close((got * weights).sum(), (want * weights).sum(), tensors, NAMES)


def test_the_route_keeps_its_scratch_within_the_limit():
    from sparc_kernels.launch.budgets import SCRATCH_BYTES
    from sparc_kernels.ops.decode_grads import route_of

    assert route_of(2, 4096, 64, 2560, torch.bfloat16) == (False, 2560)
    assert route_of(3, 256, 64, 1024, torch.bfloat16) == (False, 1024)
    assert route_of(3, 4096, 64, 1024, torch.bfloat16) == (True, 512)
    for B, k, S, d in [(8192, 100, 8, 2304), (65536, 64, 8, 2304), (65536, 512, 8, 8192), (4096, 512, 4, 8192)]:
        spread, width = route_of(S, B, k, d, torch.bfloat16)
        assert width * (B * k if spread else S * B) * 2 <= 2 * SCRATCH_BYTES and (width % 128 == 0 or width == d)
        assert spread == (B * k * 128 * 2 <= 2 * SCRATCH_BYTES)
    assert not route_of(8, 8192, 100, 2304, torch.float16)[0]  # float16 would lose the coefficients


@pytest.mark.parametrize("own", [False, True], ids=["shared codes", "own codes"])
@pytest.mark.parametrize("spread", [1, 99], ids=["in list order", "from the errors"])
def test_targets_at_once_are_targets_one_by_one(monkeypatch, own, spread):
    """One launch for all targets, and target by target where their scratch is too large: the same bits."""
    from sparc_kernels.ops import decode_grads

    if not own:
        monkeypatch.setattr(decode_grads, "H_MIN_SOURCES", spread)
    p = problem(widths=(24, 13, 20), requires_grad=False)
    shared, values = sparse()
    values = values.detach()
    indices = torch.stack([shared.roll(t, 0) for t in range(3)]) if own else shared
    n_valid = torch.tensor([3, 2, 3], device=DEVICE, dtype=torch.int32).clamp(max=indices.shape[-1]) if own else None
    if own:
        values = torch.where(torch.arange(values.shape[2], device=DEVICE) < n_valid[:, None, None], values, 0.0)
    codes = SparseCodes(indices, values, n_valid).with_inverse(p.w_decs[0].shape[1], "triton")
    targets = [DecodeTarget(w.t().contiguous(), b, x) for w, b, x in zip(p.w_decs, p.pre_biases, p.xs, strict=True)]
    coef = torch.rand(3, 1 if own else 3, len(p.xs[0]), device=DEVICE, dtype=values.dtype)
    coef[1, 0, 2] = 0.0

    def run():
        dvalues, dws = torch.empty_like(values), [torch.ones_like(t.w) for t in targets]
        out = decode_grads.GradOut(dvalues, False, dws, True)
        sq, gs, errors = decode_grads.grads_of_targets(
            codes, targets, coef, out, "triton", own_codes=own, own_errors=True
        )
        return [sq, dvalues, *gs, *errors, *dws]

    with counted_launches() as together:
        got = run()
    monkeypatch.setattr(decode_grads, "in_one_pass", lambda *args, **_: False)
    with counted_launches() as apart:
        want = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    name = "sparc_kernels.ops.gather:_gather_kernel"
    assert (together[name], apart[name]) == (1, 3)
