"""Every metric against an independent computation on dense codes: brute force, SciPy or scikit-learn."""

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import DEVICE
from scipy import sparse
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, r2_score
from sklearn.metrics.pairwise import cosine_similarity

from sparc_kernels import metrics
from sparc_kernels.metrics import Codes, dead_fractions, explained_variance, jaccard, probe_1d, retrieval


def random_codes(B=40, N=30, k=4, seed=0, zero=0.3, used=None) -> Codes:
    """Some values are 0, as after a relu; latents from `used` on are never selected."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(B, used or N, generator=g).argsort(1)[:, :k]
    values = torch.rand(B, k, generator=g) * (torch.rand(B, k, generator=g) > zero)
    return Codes(indices.to(DEVICE), values.to(DEVICE), N)


def random_labels(B=40, C=7, p=0.2, seed=0) -> torch.Tensor:
    return (torch.rand(B, C, generator=torch.Generator().manual_seed(seed)) < p).to(DEVICE)


def dense(codes: Codes) -> np.ndarray:
    out = np.zeros((len(codes.values), codes.n_latents))
    np.put_along_axis(out, codes.indices.cpu().numpy(), codes.values.double().cpu().numpy(), axis=1)
    return out


def brute_jaccard(codes: dict, labels: torch.Tensor) -> np.ndarray:
    matrices = [sparse.csc_matrix(dense(c)) for c in codes.values()]
    labels = labels.cpu().numpy().astype(int)
    scores = np.zeros(matrices[0].shape[1])
    for n in range(len(scores)):
        active = [m[:, [n]].indices for m in matrices if m[:, [n]].nnz > 0]
        pairs = list(combinations([labels[rows].sum(0) for rows in active], 2))
        for a, b in pairs:
            union = np.maximum(a, b).sum()
            scores[n] += np.minimum(a, b).sum() / union / len(pairs) if union else 0.0
    return scores


def brute_ranks(query: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Place among all targets, the worst place for ties."""
    cosines = cosine_similarity(query, target).round(6)
    return np.array([rankdata(-row, method="max")[i] for i, row in enumerate(cosines)])


# -------------------------------------------------------------------------------------------------------------- jaccard


@pytest.mark.parametrize("streams", [2, 3])
def test_jaccard_agrees_with_brute_force(streams):
    codes = {f"s{i}": random_codes(seed=i, used=25 if i else 20) for i in range(streams)}
    labels = random_labels()
    got = jaccard(codes, labels)
    want = brute_jaccard(codes, labels)
    assert 0 < want.mean() < 1
    np.testing.assert_allclose(got.per_latent.cpu().numpy(), want, rtol=1e-12)
    assert got.mean == pytest.approx(want.mean())
    alive = np.any([dense(c).any(0) for c in codes.values()], axis=0)
    assert not alive[25:].any() and (got.alive.cpu().numpy() == alive).all()
    assert got.mean_alive == pytest.approx(want[alive].mean())


def test_jaccard_by_hand():
    """Latent 0 fires on rows 0, 1 of a and on 1, 2 of b; latent 1 in a only; latent 2 on unlabelled row 3 of both."""
    a = Codes(torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]]), torch.tensor([[1.0, 1], [1, 0], [1, 0], [1, 0]]), 4)
    b = Codes(torch.tensor([[1, 0], [0, 1], [0, 1], [2, 1]]), torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 0]]), 4)
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()  # the last class is empty
    got = jaccard({"a": a, "b": b}, labels)
    # counts of latent 0: a (2, 1), b (1, 2) -> 2 / 4
    assert got.per_latent.tolist() == [0.5, 0, 0, 0]
    assert got.alive.tolist() == [True, True, True, False]
    assert (got.mean, got.mean_alive) == (0.5 / 4, 0.5 / 3)


def test_jaccard_of_equal_and_of_silent_codes():
    codes, labels = random_codes(zero=0.0), random_labels(p=0.9)
    same = jaccard({"a": codes, "b": codes}, labels)
    assert same.mean_alive == 1.0
    silent = Codes(codes.indices, torch.zeros_like(codes.values), codes.n_latents)
    nothing = jaccard({"a": silent, "b": silent}, labels)
    assert (nothing.mean, nothing.mean_alive) == (0.0, 0.0)
    assert jaccard({"a": codes, "b": silent}, labels).mean == 0.0


# ------------------------------------------------------------------------------------------------------- dead fractions


def test_dead_fractions_agree_with_brute_force():
    codes = {"a": random_codes(B=12, seed=1, used=20), "b": random_codes(B=12, seed=2, used=24)}
    alive = np.array([dense(c).any(0) for c in codes.values()]).sum(0)
    want = {"all_dead": (alive == 0).mean(), "mixed": (alive == 1).mean(), "all_alive": (alive == 2).mean()}
    assert dead_fractions(codes) == pytest.approx(want)
    assert min(want.values()) > 0


def test_selected_with_value_zero_is_not_fired():
    codes = Codes(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), 2)
    assert dead_fractions({"a": codes}) == {"all_dead": 0.5, "mixed": 0.0, "all_alive": 0.5}


# ------------------------------------------------------------------------------------------------------------ retrieval


def scores(ranks: np.ndarray) -> dict:
    median = np.sort(ranks)[(len(ranks) - 1) // 2]
    recall = {f"R@{k}": (ranks <= k).mean() for k in (1, 5, 10)}
    return {**recall, "median_rank": median, "MRR": (1 / ranks).mean()}


@pytest.mark.parametrize("block_elements", [1, 130, 2**24])
def test_retrieval_of_codes_agrees_with_scikit_learn(monkeypatch, block_elements):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block_elements)
    query = random_codes(B=43, zero=0.5, seed=1)
    noise = random_codes(B=43, zero=0.5, seed=2).values
    target = Codes(query.indices.flip(1), query.values.flip(1) + noise, query.n_latents)
    assert (query.values.sum(1) == 0).any()  # some queries have no code at all
    want = scores(brute_ranks(dense(query), dense(target)))
    assert 0 < want["R@1"] < 1
    assert retrieval(query, target) == pytest.approx(want)


@pytest.mark.parametrize("block_elements", [1, 130, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_retrieval_of_features_agrees_with_scikit_learn(monkeypatch, block_elements, dtype):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block_elements)
    g = torch.Generator().manual_seed(0)
    query = torch.randn(41, 8, generator=g)
    target = (query + torch.randn(41, 8, generator=g)).to(DEVICE, dtype)
    query = query.to(DEVICE, dtype)
    want = scores(brute_ranks(query.double().cpu().numpy(), target.double().cpu().numpy()))
    assert 0 < want["R@1"] < 1
    assert retrieval(query, target) == pytest.approx(want)


def test_retrieval_of_codes_equals_that_of_their_dense_form():
    query, target = random_codes(seed=1), random_codes(seed=2)
    as_dense = [torch.from_numpy(dense(c)).float() for c in (query, target)]
    assert retrieval(query, target) == pytest.approx(retrieval(*as_dense))


def dealt(items: range, work) -> torch.Tensor:
    """As three processes would: parts of a range, one of them empty."""
    return torch.cat([work(items[:1]), work(items[1:1]), work(items[1:])])


def test_results_do_not_depend_on_how_work_is_dealt(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 300)
    query, target = random_codes(seed=1), random_codes(seed=2)
    assert retrieval(query, target, deal=dealt) == retrieval(query, target)
    codes, labels = random_codes(B=400, seed=3), random_labels(B=400, p=0.3)
    whole, parts = probe_1d(codes, labels), probe_1d(codes, labels, deal=dealt)
    assert parts.mean == whole.mean and parts.per_class.equal(whole.per_class) and parts.latents.equal(whole.latents)
    assert parts.latents.dtype == torch.int64 and (parts.latents >= 0).all()


def test_a_matching_pair_is_found():
    codes = random_codes(B=30, zero=0.0)
    perfect = {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0, "MRR": 1.0}
    assert retrieval(codes, codes) == perfect
    assert retrieval(torch.eye(30), 3 * torch.eye(30)) == perfect


def test_ties_never_help():
    codes = random_codes(B=20)
    silent = Codes(codes.indices, torch.zeros_like(codes.values), codes.n_latents)
    worst = {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "median_rank": 20.0, "MRR": pytest.approx(1 / 20)}
    assert retrieval(silent, silent) == worst
    assert retrieval(silent, codes) == worst
    assert retrieval(torch.zeros(20, 3), torch.zeros(20, 3)) == worst
    constant = torch.full((20, 3), 0.1) * torch.arange(1, 21).unsqueeze(1)  # one direction, rounding apart
    assert retrieval(constant, constant) == worst
    pairs = torch.eye(10).repeat_interleave(2, dim=0)  # every target twice
    assert retrieval(pairs, pairs)["R@1"] == 0.0 and retrieval(pairs, pairs, ks=(2,)) == {
        "R@2": 1.0,
        "median_rank": 2.0,
        "MRR": 0.5,
    }


def test_a_silent_target_ranks_behind_what_is_similar():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # row 0: cosine 0 with its silent partner, 1 and 0 with the others: third
    assert retrieval(query, target, ks=(1, 2)) == pytest.approx(
        {"R@1": 2 / 3, "R@2": 2 / 3, "median_rank": 1.0, "MRR": (1 / 3 + 1 + 1) / 3}
    )


# --------------------------------------------------------------------------------------------------- explained variance


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_explained_variance_agrees_with_scikit_learn(batch):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 6, generator=g) + 100, torch.randn(50, 3, generator=g) * torch.tensor([1, 5, 9])
    inputs = {"a": a, "b": b}
    noise = {("a", "a"): 0.1, ("a", "b"): 0.5, ("b", "a"): 2.0}
    recons = {(t, s): inputs[t] + e * torch.randn(inputs[t].shape, generator=g) for (t, s), e in noise.items()}
    rows = torch.arange(50).split(batch)
    got = explained_variance(
        ({t: x[r] for t, x in inputs.items()}, {pair: x[r] for pair, x in recons.items()}) for r in rows
    )
    assert set(got) == set(noise)
    for (t, s), value in got.items():
        want = r2_score(inputs[t].double(), recons[t, s].double(), multioutput="variance_weighted")
        assert value == pytest.approx(want, abs=1e-9)


def test_explained_variance_of_the_mean_and_of_constants():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    mean = x.mean(0).expand(2, 2)
    got = explained_variance([({"x": x, "one": torch.ones(2, 1)}, {("x", "x"): mean, ("one", "x"): torch.ones(2, 1)})])
    assert got["x", "x"] == 0.0
    assert math.isnan(got["one", "x"])


# ---------------------------------------------------------------------------------------------------------------- probe


def test_logistic_regression_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.random(80) < 0.5
    x = np.stack([y + 0.5 * rng.standard_normal(80), rng.standard_normal(80), 30.0 * y, 0.01 * y, np.zeros(80)], axis=1)
    weight, bias = metrics._fit_logistic(torch.from_numpy(x), torch.from_numpy(y).double().unsqueeze(1))
    for j in range(x.shape[1]):
        model = LogisticRegression(tol=1e-10, max_iter=1000).fit(x[:, [j]], y)
        assert weight[j].item() == pytest.approx(model.coef_[0, 0], abs=1e-5)
        assert bias[j].item() == pytest.approx(model.intercept_[0], abs=1e-5)


def test_probe_agrees_with_scikit_learn():
    """The whole selection again on dense codes, with the rows that `probe_1d` draws."""
    codes, labels = random_codes(B=200, N=40, k=6, seed=3), random_labels(B=200, C=4, p=0.3, seed=4)
    codes.values[labels[:, 0] & (codes.indices[:, 0] % 2 == 0), 0] += 2  # something to find
    got = probe_1d(codes, labels, n_candidates=5, min_count=30, seed=7)
    x, y_all = dense(codes), labels.cpu().numpy()
    for c in range(4):
        positive, negative = metrics._balanced_rows(labels[:, c].cpu(), 7 + c).numpy()
        m = len(positive)
        assert y_all[positive, c].all() and not y_all[negative, c].any() and len(set(positive) | set(negative)) == 2 * m
        cuts = [round(0.7 * m), round(0.7 * m) + round(0.15 * m)]
        train, val, test = (
            np.concatenate(parts) for parts in zip(np.split(positive, cuts), np.split(negative, cuts), strict=True)
        )
        together = (x[y_all[:, c]] > 0).sum(0)
        candidates = [n for n in np.argsort(-together, kind="stable") if x[train, n].any()][:5]
        model = LogisticRegression(tol=1e-10, max_iter=1000)
        models = [clone(model).fit(x[train][:, [n]], y_all[train, c]) for n in candidates]
        losses = [
            log_loss(y_all[val, c], m.predict_proba(x[val][:, [n]])) for m, n in zip(models, candidates, strict=True)
        ]
        best = int(np.argmin(losses))
        assert got.latents[c].item() == candidates[best]
        want = log_loss(y_all[test, c], models[best].predict_proba(x[test][:, [candidates[best]]]))
        assert got.per_class[c].item() == pytest.approx(want, abs=1e-5)
    assert got.mean == pytest.approx(got.per_class.mean().item())
    assert torch.equal(probe_1d(codes, labels, n_candidates=5, min_count=30, seed=7).per_class, got.per_class)


def test_probe_finds_the_latent_that_tells():
    labels = torch.arange(300).unsqueeze(1) % 2 == 0
    tells = Codes(
        torch.tensor([[3, 5]]).expand(300, 2).contiguous().to(DEVICE),
        torch.cat([labels * 4.0, torch.ones(300, 1)], 1).to(DEVICE),
        8,
    )
    got = probe_1d(tells, labels.to(DEVICE))
    assert got.latents.tolist() == [3]
    assert got.mean < 0.15


def test_probe_leaves_out_rare_classes_and_scores_silence_as_chance():
    codes, labels = random_codes(B=120), torch.zeros(120, 3, dtype=torch.bool, device=DEVICE)
    labels[:50, 0] = True  # not more than min_count
    labels[:60, 1] = True
    labels[:, 2] = True  # no negatives
    silent = Codes(codes.indices, torch.zeros_like(codes.values), codes.n_latents)
    got = probe_1d(silent, labels)
    assert got.per_class.isnan().tolist() == [True, False, True]
    assert got.mean == pytest.approx(math.log(2)) and got.latents.tolist() == [-1, -1, -1]
    assert math.isnan(probe_1d(codes, labels[:, :1]).mean)


# ------------------------------------------------------------------------------------------------------------ bad input


def bad_codes():
    good = random_codes()
    return {
        "codes['a']: expected Codes": good.values,
        "codes['a'].n_latents: expected an int >= 1, got 0": good._replace(n_latents=0),
        "codes['a'].values: expected at least one row": Codes(good.indices[:0], good.values[:0], 30),
        "codes['a'].indices: expected an int64 tensor of shape (40, 4)": good._replace(indices=good.indices[:, :2]),
        "codes['a'].indices: expected an int64 tensor": good._replace(indices=good.indices.int()),
        "codes['a'].indices: expected latent ids in 0..4, got": good._replace(n_latents=5),
        "codes['a'].values: expected finite values >= 0": good._replace(values=-good.values),
        "codes['a'].values: expected finite values >= 0, got": good._replace(values=good.values / 0),
        "codes['a'].values: expected a float64": good._replace(values=good.values.long()),
    }


@pytest.mark.parametrize("message, codes", bad_codes().items(), ids=range(len(bad_codes())))
def test_bad_codes_are_named(message, codes):
    for call in (lambda: dead_fractions({"a": codes}), lambda: jaccard({"a": codes, "b": codes}, random_labels())):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message)


def test_bad_arguments_are_named():
    codes, labels, x = random_codes(), random_labels(), torch.ones(4, 3, device=DEVICE)
    fewer, wider = random_codes(B=39), random_codes(N=31)
    cases = [
        (lambda: jaccard({"a": codes}, labels), "codes: expected a dict of Codes by stream, of 2 or more"),
        (lambda: jaccard([codes, codes], labels), "codes: expected a dict"),
        (lambda: jaccard({"a": codes, "b": fewer}, labels), "codes['b'].indices: expected 40 rows"),
        (lambda: jaccard({"a": codes, "b": wider}, labels), "codes['b'].n_latents: expected 30"),
        (lambda: jaccard({"a": codes, "b": codes}, labels.float()), "labels: expected a bool tensor of shape [40, C]"),
        (lambda: jaccard({"a": codes, "b": codes}, labels[1:]), "labels: expected a bool tensor"),
        (lambda: jaccard({"a": codes, "b": codes}, labels[:, :0]), "labels: expected a bool tensor"),
        (lambda: dead_fractions({}), "codes: expected a dict"),
        (lambda: retrieval(codes, x), "target: expected Codes as query is"),
        (lambda: retrieval(x, codes), "target: expected a tensor as query is"),
        (lambda: retrieval(codes, wider), "target: expected n_latents 30, got 31"),
        (lambda: retrieval(codes, fewer), "target: expected 40 rows as in query"),
        (lambda: retrieval(x, x[:3]), "target: expected shape [4, 3]"),
        (lambda: retrieval(x / 0, x), "query: expected finite features"),
        (lambda: retrieval(x[:0], x[:0]), "query: expected at least one row"),
        (lambda: retrieval(x, x, ks=(0,)), "ks: expected an int >= 1"),
        (lambda: explained_variance([]), "batches: expected at least one batch"),
        (lambda: explained_variance([({"a": x}, {})]), "batches: expected non-empty dicts of reconstructions"),
        (lambda: explained_variance([({"a": x}, {("b", "a"): x})]), "batches: expected inputs with stream 'b'"),
        (lambda: explained_variance([({"a": x}, {("a", "a"): x[:, :2]})]), "reconstructions['a', 'a']: expected shape"),
        (
            lambda: explained_variance([({"a": x}, {("a", "a"): x}), ({"a": x}, {("a", "b"): x})]),
            "batches: expected the pairs [('a', 'a')] in every batch",
        ),
        (lambda: probe_1d(codes, labels, n_candidates=0), "n_candidates: expected"),
        (lambda: probe_1d(codes, labels, min_count=5), "min_count: expected"),
        (lambda: probe_1d(codes, labels[:, 0]), "labels: expected"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message)


def test_no_warnings_and_no_graph():
    codes, x = random_codes(), torch.rand(40, 5, requires_grad=True)
    codes.values.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not jaccard({"a": codes, "b": codes}, random_labels()).per_latent.requires_grad
        retrieval(codes, codes)
        explained_variance([({"x": x}, {("x", "x"): x * 0.9})])
        probe_1d(codes, random_labels(p=0.5), min_count=6)
