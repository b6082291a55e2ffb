"""The loss's terms and metrics, AuxK's part and the biases' sums, against their formulas."""

from __future__ import annotations

import pytest
import torch
from common import assert_close
from conftest import DEVICE, KERNEL_DTYPE

from sparc_kernels.ops.aligned_loss import column_sums
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
    loss, terms = loss_terms(torch.stack(sqs), norm, weights, values, impl)
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
    loss, terms = loss_terms(torch.stack(sqs), norm, weights, rand(2, 4, 3), impl)
    assert loss.isnan() and Terms(terms, 2).nmse[1][0].isnan()
    weights[1, 0] = 0.0
    assert loss_terms(torch.stack(sqs), norm, weights, rand(2, 4, 3), impl)[0].isfinite()


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_auxk_counts_when_it_is_positive(impl, value):
    sqs, norm, loss = [value * rand(1, 21, seed=t) for t in range(3)], rand(3, 21) + 1, rand(1)[0]
    total, terms, weight, coef = add_auxk(torch.stack(sqs), norm, loss, 0.1, impl)
    own = torch.stack([(sq[0] / norm[t]).mean() for t, sq in enumerate(sqs)])
    counts = value == 1.0
    mean = own.mean() if counts else torch.zeros_like(loss)
    assert_close(total, loss + 0.1 * mean)
    assert_close(terms[0], mean)
    assert_close(terms[1], 0.1 * mean)
    if value == value:
        assert_close(terms[2:], own)
    assert_close(weight, torch.full_like(weight, 0.1 / 3 if counts else 0.0))
    assert_close(coef, weight[..., None] * (2 / 21) / norm[:, None])


@pytest.mark.parametrize("twice", [False, True])
def test_column_sums(impl, twice):
    xs = [rand(21, d, seed=d) for d in (17, 1, 40)]
    more = [rand(21, d, seed=d + 1) for d in (17, 1, 40)] if twice else []
    like = [torch.empty(0, device=DEVICE, dtype=dtype) for dtype in (KERNEL_DTYPE, torch.float32, KERNEL_DTYPE)]
    for got, x, other, wanted in zip(column_sums(xs, more, like, impl), xs, more or [0, 0, 0], like, strict=True):
        assert got.dtype == wanted.dtype
        assert_close(got.to(KERNEL_DTYPE), (x + other).sum(0), 1e-6 if wanted.dtype == torch.float32 else None)


def test_scaling_by_one_writes_nothing_and_by_anything_else_does(impl):
    x = torch.randn(70, 3, device=DEVICE)
    for factor in (1.0, 0.25, 0.0, float("nan")):
        got, other = x.clone(), x[:5].bfloat16()
        scale_([got, other], torch.tensor(factor, device=DEVICE), impl)
        assert torch.equal(got.nan_to_num(7.0), (x * factor).nan_to_num(7.0))
        assert_close(other.float().nan_to_num(7.0), (x[:5].bfloat16() * factor).float().nan_to_num(7.0), 1e-2)
