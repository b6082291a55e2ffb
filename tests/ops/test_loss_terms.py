"""The loss's terms and metrics, AuxK's part and the biases' sums, against their formulas."""

from __future__ import annotations

import pytest
import torch
from common import assert_close
from conftest import DEVICE, KERNEL_DTYPE

from sparc_kernels.ops.decode_grads import residuals, target_weights
from sparc_kernels.ops.loss_terms import Terms, add_auxk, loss_terms, scale_


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        DEVICE, KERNEL_DTYPE
    )


@pytest.mark.parametrize(("S", "B", "k"), [(1, 1, 1), (2, 16, 3), (3, 37, 5), (8, 5, 1)])
def test_terms_are_their_formulas(impl, S, B, k):
    """Rows beyond one block, values beyond one chunk, one stream and eight."""
    sqs, norm, values = [rand(S, B, seed=t) for t in range(S)], rand(S, B, seed=50) + 0.5, rand(S, B, k, seed=60)
    weights = rand(S, S, seed=70)
    weights[0, 0] = 0.0
    loss, terms = loss_terms(torch.stack(sqs), norm, weights, values, [], [], impl)
    nmse = torch.stack([(sq / norm[t]).mean(1) for t, sq in enumerate(sqs)])
    assert_close(loss, (weights * nmse).sum())
    got, off = Terms(terms, S), ~torch.eye(S, dtype=torch.bool, device=DEVICE)
    assert_close(torch.stack([torch.stack(row) for row in got.nmse]), nmse)
    assert_close(got.avg_self, nmse.diagonal().mean())
    l1 = values.sum((1, 2)) / (B * (k + 1e-8))
    assert_close(torch.stack(got.l1), l1)
    assert_close(got.avg_l1, l1.mean())
    assert got.k == k
    if S > 1:
        assert_close(got.avg_cross, nmse[off].mean())
        assert_close(got.avg_cross_scaled, (weights * nmse)[off].sum())


def test_a_pair_without_weight_takes_no_part_whatever_it_is(impl):
    sqs, norm, weights = [rand(2, 4, seed=t) for t in range(2)], rand(2, 4) + 1, rand(2, 2, seed=3)
    sqs[1][0, 2] = float("nan")
    loss, terms = loss_terms(torch.stack(sqs), norm, weights, rand(2, 4, 3), [], [], impl)
    assert loss.isnan() and Terms(terms, 2).nmse[1][0].isnan()
    weights[1, 0] = 0.0
    assert loss_terms(torch.stack(sqs), norm, weights, rand(2, 4, 3), [], [], impl)[0].isfinite()


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_auxk_counts_when_it_is_positive(impl, value):
    sqs, norm, loss = [value * rand(1, 21, seed=t) for t in range(3)], rand(3, 21) + 1, rand(1)[0]
    made, big = [rand(3, 21), rand(2, 5).float()], rand(300, 50)
    gs, dbiases = [rand(21, d, seed=d) for d in (17, 1, 40, 17, 1, 40)], [rand(d) for d in (17, 1, 40)]
    gs[4][2] = float("nan") if value != 1 else 0.5
    zeroed = [t.clone() for t in (*made, big)]
    total, terms, weight = add_auxk(torch.stack(sqs), norm, loss, 0.1, zeroed, gs, dbiases, impl)
    own = torch.stack([(sq[0] / norm[t]).mean() for t, sq in enumerate(sqs)])
    counts = value == 1.0
    mean = own.mean() if counts else torch.zeros_like(loss)
    assert_close(total, loss + 0.1 * mean)
    assert_close(terms[0], mean)
    assert_close(terms[1], 0.1 * mean)
    if value == value:
        assert_close(terms[2:], own)
    assert_close(weight, torch.full_like(weight, 0.1 / 3 if counts else 0.0))
    for got, before in zip(zeroed, (*made, big), strict=True):
        assert torch.equal(got, before if counts else torch.zeros_like(before))
    for got, g, more in zip(dbiases, gs[:3], gs[3:], strict=True):
        assert_close(got, (g + more if counts else g).sum(0))


@pytest.mark.parametrize("auxk", [False, True])
def test_sums_of_columns_beside_the_terms(impl, auxk):
    """Of rows that are contiguous or not, in the dtypes asked for."""
    xs, sq, norm = [rand(41, d, seed=d) for d in (17, 1, 40)], rand(3, 3, 41), rand(3, 41) + 1
    xs[0] = torch.cat([xs[0], xs[0]], 1)[:, :17]
    dtypes = (KERNEL_DTYPE, torch.float32, KERNEL_DTYPE)
    sums = [torch.empty(d, device=DEVICE, dtype=dtype) for d, dtype in zip((17, 1, 40), dtypes, strict=True)]
    if auxk:
        more = [rand(41, d, seed=d + 1) for d in (17, 1, 40)]
        add_auxk(sq[:, :1], norm, norm[0, 0], 0.1, [], [*xs, *more], sums, impl)
    else:
        more = [0, 0, 0]
        loss_terms(sq, norm, rand(3, 3), rand(3, 41, 2), xs, sums, impl)
    for got, x, other in zip(sums, xs, more, strict=True):
        assert_close(got.to(KERNEL_DTYPE), (x + other).sum(0), 1e-6 if got.dtype == torch.float32 else None)


def test_coefficients_of_auxk_are_those_of_its_weights(impl):
    biases, errors = [rand(d, seed=d) for d in (17, 40)], [rand(21, d, seed=d + 1) for d in (17, 40)]
    errors[0][3] = float("inf")
    for weight in (0.1, 0.0):
        xs, norm, coef = residuals(biases, errors, weight, impl)
        for x, bias, error in zip(xs, biases, errors, strict=True):
            assert torch.equal(x, bias - error)
        want = target_weights(xs, norm.new_full((2, 1), weight / 2), impl)
        assert torch.equal(norm, want[0]) and torch.equal(coef.isnan(), want[1].isnan())
        assert_close(coef.nan_to_num(), want[1].nan_to_num())


def test_scaling_by_one_writes_nothing_and_by_anything_else_does(impl):
    x = torch.randn(70, 3, device=DEVICE)
    for factor in (1.0, 0.25, 0.0, float("nan")):
        got, other = x.clone(), x[:5].bfloat16()
        scale_([got, other], torch.tensor(factor, device=DEVICE), impl)
        assert torch.equal(got.nan_to_num(7.0), (x * factor).nan_to_num(7.0))
        assert_close(other.float().nan_to_num(7.0), (x[:5].bfloat16() * factor).float().nan_to_num(7.0), 1e-2)
