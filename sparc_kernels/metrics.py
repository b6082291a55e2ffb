"""Metrics of agreement between streams, computed on sparse codes in plain PyTorch, on any device.

The codes of one stream are a `Codes(indices, values, n_latents)` or an equal tuple; no function materialises a dense
[B, N]. A latent fires on a row if its value there is greater than 0. Score retrieval with codes selected locally, per
stream: a global selection shares indices between streams, which reveals the partner.

Bad input raises ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .core.validation import check_int, check_tensor, fail, require

# How a range of independent items is worked through: called with the range and with the work on a part of it, which
# returns a tensor with a row an item; returns the rows of all. `evaluation` divides them among processes.
Deal = Callable[[range, Callable[[range], Tensor]], Tensor]

_BLOCK_ELEMENTS = 2**24  # of the largest temporary: 64 MiB in float32
_TIE = 1e-6  # closer cosines are ties: a few roundings of a float32 dot product of unit vectors


def _undivided(items: range, work: Callable[[range], Tensor]) -> Tensor:
    return work(items)


class Codes(NamedTuple):
    """Sparse codes of one stream: row b has `values[b, j]` at latent `indices[b, j]`, 0 elsewhere.

    Attributes:
        indices: int64 [B, k] in 0..n_latents - 1, distinct within a row.
        values: floating [B, k], finite, >= 0.
        n_latents: N.
    """

    indices: Tensor
    values: Tensor
    n_latents: int


class Rows(NamedTuple):
    """Dense features, computed or read on demand.

    Attributes:
        shape: (B, d).
        read: function of (start, stop) -> floating [stop - start, d].
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]


class Jaccard(NamedTuple):
    """Result of `jaccard`.

    Attributes:
        mean: over all N latents.
        mean_alive: over the latents alive in at least one stream.
        per_latent: float64 [N].
        alive: bool [N].
    """

    mean: float
    mean_alive: float
    per_latent: Tensor
    alive: Tensor


class Probe(NamedTuple):
    """Result of `probe_1d`.

    Attributes:
        mean: of per_class, over the classes probed.
        per_class: float64 [C], test log-loss in nats, NaN for classes left out.
        latents: int64 [C], the latent chosen, -1 if none.
    """

    mean: float
    per_class: Tensor
    latents: Tensor


class BatchVariance(NamedTuple):
    """What a batch contributes to `explained_variance`.

    Attributes:
        moments: {t: (rows, mean [d_t], summed squared deviation from the mean)}, float64.
        errors: {(t, s): summed squared error}, float64.
    """

    moments: dict[str, tuple[int, Tensor, Tensor]]
    errors: dict[tuple[str, str], Tensor]


@torch.no_grad()
def jaccard(codes: Mapping[str, Codes], labels: Tensor) -> Jaccard:
    """Compare a latent's meaning between streams by the labels of the rows on which it fires (weighted Jaccard).

    For each stream, count how many of those rows have each label; for a pair of streams, sum over labels of the smaller
    count / sum of the larger (0 if both are 0); average over the pairs of streams in which the latent is alive. 0 for a
    latent alive in fewer than two streams.

    Args:
        codes: stream name -> codes, two or more streams over the same B rows and N latents.
        labels: bool [B, C], multi-hot. Labels without a row and rows without a label count nothing.

    Returns:
        Jaccard; `mean_alive` is 0 if no latent is alive. Memory: N x C floats per stream.

    Raises:
        ValueError: bad codes or labels.

    Equivalent to, with dense codes, the mean over pairs of `minimum(a, b).sum(1) / maximum(a, b).sum(1)` with
    `counts = [(c > 0).T.float() @ labels.float() for c in codes]`.
    """
    codes = _check_streams(codes, at_least=2)
    first = next(iter(codes.values()))
    labels = _check_labels(labels, first.indices)
    counts = [_label_counts(c, labels) for c in codes.values()]
    alive = torch.stack([_alive(c) for c in codes.values()])  # [S, N]
    total = torch.zeros(first.n_latents, dtype=torch.float64, device=labels.device)
    for s, t in combinations(range(len(counts)), 2):
        shared, union = torch.minimum(counts[s], counts[t]), torch.maximum(counts[s], counts[t])
        # 0 if the latent is dead in s or t, whose counts are then 0
        total += shared.sum(1, dtype=torch.float64) / union.sum(1, dtype=torch.float64).clamp_min(1)
    n_alive = alive.sum(0)
    per_latent = total / (n_alive * (n_alive - 1) // 2).clamp_min(1)
    alive = n_alive > 0
    mean_alive = per_latent.sum() / alive.sum().clamp_min(1)  # dead latents add 0
    return Jaccard(per_latent.mean().item(), mean_alive.item(), per_latent, alive)


@torch.no_grad()
def dead_fractions(codes: Mapping[str, Codes]) -> dict[str, float]:
    """Compute the fractions of the N latents that fired in no stream, in some streams, in every stream.

    Args:
        codes: stream name -> codes, over the same B rows and N latents.

    Returns:
        `all_dead`, `mixed` and `all_alive`.
    """
    codes = _check_streams(codes, at_least=1)
    alive = torch.stack([_alive(c) for c in codes.values()])
    all_dead = (~alive.any(0)).double().mean().item()
    all_alive = alive.all(0).double().mean().item()
    return {"all_dead": all_dead, "mixed": 1 - all_dead - all_alive, "all_alive": all_alive}


@torch.no_grad()
def retrieval(
    query: Codes | Tensor | Rows,
    target: Codes | Tensor | Rows,
    ks: Sequence[int] = (1, 5, 10),
    watch: Callable[[range], Iterable[int]] = iter,
    deal: Deal = _undivided,
) -> dict[str, float]:
    """Retrieve row i of `target` by row i of `query` among all B rows, ranked by cosine similarity.

    The rank of row i is 1 + the number of others at least as similar; ties (cosines within 1e-6) count against the
    query. So identical targets never help, and an all-zero row, whose cosines are all 0, ranks behind every row of
    positive similarity; if all codes are zero every rank is B. Chance is R@K = K / B.

    Args:
        query: Codes, or floating [B, d] as a tensor or Rows. float16 and bfloat16 are computed in float32.
        target: the same kind over the same N latents or of the same width (for example raw features for a
            cross-reconstruction).
        ks: the values of K in R@K.
        watch: wraps the range of query blocks, to show progress.
        deal: works through the range of query blocks.

    Returns:
        `R@K` for every K, `median_rank` (the lower of the middle two, as torch.median), and `MRR`, the mean of
        1 / rank.

    Raises:
        ValueError: bad features, or query and target of different kind, width or number of rows.

    Works in blocks: at most 2^24 cosines, and as many numbers of Rows, are in memory at a time.
    """
    query, target = _check_features("query", query), _check_features("target", target)
    for k in ks:
        check_int("ks", k, 1)
    if isinstance(query, Codes):
        if not isinstance(target, Codes):
            fail("target", "Codes as query is", target)
        require(query.n_latents == target.n_latents, "target", f"n_latents {query.n_latents}", str(target.n_latents))
        rows, width = len(query.values), query.n_latents
        require(len(target.values) == rows, "target", f"{rows} rows as in query", target.values)
        block, step = max(1, _BLOCK_ELEMENTS // max(rows, width)), rows
        cosines = _sparse_cosines(query, target)
    else:
        if isinstance(target, Codes):
            fail("target", "a tensor as query is", target)
        rows, width = query.shape
        ok = tuple(target.shape) == (rows, width)
        require(ok, "target", f"shape [{rows}, {width}]", f"shape {list(target.shape)}")
        lazy = isinstance(query, Rows) or isinstance(target, Rows)
        # large query blocks, since the targets are read again for each
        block = max(1, _BLOCK_ELEMENTS // (2 * width if lazy else rows))
        step = max(1, _BLOCK_ELEMENTS // max(block, width)) if lazy else rows
        cosines = _dense_cosines(query, target)

    def ranks_of(starts: range) -> Tensor:
        parts = [torch.empty(0, dtype=torch.int64, device="cpu")]
        for start in watch(starts):
            own, against = cosines(start, min(start + block, rows))
            rank = torch.zeros(len(own), dtype=torch.int64, device=own.device)
            for first in range(0, rows, step):
                rank += (against(first, min(first + step, rows)) >= own - _TIE).sum(1)  # counts row i itself
            parts.append(rank)
        return torch.cat(parts[1:] or parts)

    ranks = deal(range(0, rows, block), ranks_of)
    scores = {f"R@{k}": (ranks <= k).double().mean().item() for k in ks}
    return {**scores, "median_rank": float(ranks.median()), "MRR": ranks.double().reciprocal().mean().item()}


@torch.no_grad()
def activation_cosine(codes: Mapping[str, Codes], watch: Callable[[range], Iterable[int]] = iter) -> Tensor:
    """Compute the cosine between a latent's activations in two streams over all rows, averaged over pairs of streams.

    Needs no labels. 0 for a pair if the latent is dead in either stream.

    Args:
        codes: stream name -> codes, two or more streams over the same B rows and N latents.
        watch: wraps the range of row blocks, to show progress.

    Returns:
        float64 [N].

    Raises:
        ValueError: bad codes.
    """
    streams = list(_check_streams(codes, at_least=2).values())
    S, n = len(streams), streams[0].n_latents
    rows, device = len(streams[0].values), streams[0].values.device
    products = torch.zeros(S, S, n, dtype=torch.float64, device=device)
    block = max(1, _BLOCK_ELEMENTS // (n * S))
    for start in watch(range(0, rows, block)):
        part = slice(start, start + block)
        dense = torch.stack([_block(c, part) for c in streams])  # [S, b, N]
        for s, t in combinations(range(S), 2):
            products[s, t] += (dense[s] * dense[t]).sum(0, dtype=torch.float64)
        products.diagonal(dim1=0, dim2=1).add_(dense.square().sum(1, dtype=torch.float64).T)
    norms = products.diagonal(dim1=0, dim2=1).T.sqrt()  # [S, N]
    pairs = [products[s, t] / (norms[s] * norms[t]).clamp_min(1e-30) for s, t in combinations(range(S), 2)]
    return torch.stack(pairs).mean(0)


@torch.no_grad()
def top_rows(codes: Codes, latent: int, n: int) -> tuple[Tensor, Tensor]:
    """Find the rows on which a latent has its largest values.

    Args:
        codes: of one stream.
        latent: 0..N - 1.
        n: number of rows, at most.

    Returns:
        Rows, int64 [m], and their values [m], descending, ties to the lower row; only positive values, m <= n.
    """
    _check_codes("codes", codes)
    codes = Codes(*codes)
    check_int("latent", latent, 0, codes.n_latents - 1)
    values = torch.where(codes.indices == latent, codes.values, 0).amax(1)
    best = values.sort(descending=True, stable=True)
    keep = best.values[:n] > 0
    return best.indices[:n][keep], best.values[:n][keep]


@torch.no_grad()
def explained_variance(
    batches: Iterable[tuple[Mapping[str, Tensor], Mapping[tuple[str, str], Tensor]]],
) -> dict[tuple[str, str], float]:
    """Compute 1 - FVU of every pair: 1 - sum_b |x_t - R[t<-s]|^2 / sum_b |x_t - mean x_t|^2, the mean over all rows.

    Args:
        batches: pairs (inputs, reconstructions): inputs {t: [b, d_t]}, reconstructions {(t, s): [b, d_t]} of target t
            from source s; every batch has the same pairs. One pass, a batch at a time; sums are float64.

    Returns:
        {(t, s): explained variance}. At most 1; negative if worse than the mean; NaN for a target without variance.

    Raises:
        ValueError: no batch, other pairs than in the first batch, or a wrong shape.

    Equivalent to, for one pair: `sklearn.metrics.r2_score(x, recon, multioutput="variance_weighted")`.
    """
    return merged_variance(batch_variances(batches))


@torch.no_grad()
def batch_variances(
    batches: Iterable[tuple[Mapping[str, Tensor], Mapping[tuple[str, str], Tensor]]],
) -> Iterator[BatchVariance]:
    """Compute what each batch contributes to `explained_variance`, one at a time.

    Args:
        batches: as of `explained_variance`.
    """
    pairs = None
    for inputs, recons in batches:
        require(
            isinstance(recons, Mapping) and len(recons) > 0, "batches", "non-empty dicts of reconstructions", recons
        )
        pairs = set(recons) if pairs is None else pairs
        require(set(recons) == pairs, "batches", f"the pairs {sorted(pairs)} in every batch", repr(sorted(recons)))
        made = BatchVariance({}, {})
        for t in sorted({t for t, _ in recons}):
            require(t in inputs, "batches", f"inputs with stream {t!r}", repr(list(inputs)))
            made.moments[t] = _moments(check_tensor(f"inputs[{t!r}]", inputs[t], ("b", "d")).double())
        for (t, s), recon in recons.items():
            recon = check_tensor(f"reconstructions[{t!r}, {s!r}]", recon, tuple(inputs[t].shape))
            made.errors[t, s] = (recon.double() - inputs[t].double()).square().sum()
        yield made


@torch.no_grad()
def merged_variance(parts: Iterable[BatchVariance]) -> dict[tuple[str, str], float]:
    """Merge the contributions of batches, in their order, into the result of `explained_variance`.

    Args:
        parts: of `batch_variances`.
    """
    moments: dict[str, tuple[int, Tensor, Tensor]] = {}
    errors: dict[tuple[str, str], Tensor] = {}
    for part in parts:
        for t, new in part.moments.items():
            moments[t] = _merge_moments(moments[t], new) if t in moments else new
        for pair, error in part.errors.items():
            errors[pair] = errors[pair] + error if pair in errors else error
    require(len(errors) > 0, "batches", "at least one batch", "none")
    return {
        (t, s): (1 - error / moments[t][2]).item() if moments[t][2] > 0 else float("nan")
        for (t, s), error in errors.items()
    }


@torch.no_grad()
def probe_1d(
    codes: Codes,
    labels: Tensor,
    n_candidates: int = 20,
    min_count: int = 50,
    seed: int = 0,
    watch: Callable[[range], Iterable[int]] = iter,
    deal: Deal = _undivided,
) -> Probe:
    """Predict each class from its best single latent: test log-loss in nats (ln 2 = 0.693 is chance).

    For each class: as many negative rows as positive ones (or the reverse, if negatives are fewer), split 70/15/15 with
    balanced classes; the candidates are the `n_candidates` latents that fire on most of the class's rows (among those
    that fire in the training part; ties to the lower latent); a logistic regression on each (penalty weight^2 / 2,
    scikit-learn's default); the best on validation is scored on test. A class for which no latent fires in the training
    part scores ln 2.

    Args:
        codes: of one stream.
        labels: bool [B, C], multi-hot.
        n_candidates: latents probed per class.
        min_count: classes need more positive and more negative rows than this, at least 6; others are left out (NaN).
        seed: of the sampling; a class's rows do not depend on the other classes.
        watch: wraps the range of classes, to show progress.
        deal: works through the range of classes.

    Returns:
        Probe; its mean is NaN if no class has enough rows.

    Raises:
        ValueError: bad codes, labels or numbers.
    """
    _check_codes("codes", codes)
    codes = Codes(*codes)
    labels = _check_labels(labels, codes.indices)
    check_int("n_candidates", n_candidates, 1)
    check_int("min_count", min_count, 6)
    check_int("seed", seed, 0)

    def probe(classes: range) -> Tensor:
        """Loss and latent of each class, float64 [len(classes), 2]."""
        found = torch.tensor([[float("nan"), -1.0]], dtype=torch.float64, device="cpu").repeat(len(classes), 1)
        for i, c in enumerate(watch(classes)):
            balanced = _balanced_rows(labels[:, c].cpu(), seed + c)
            if balanced.shape[1] <= min_count:
                continue
            n_train, n_val = round(0.7 * balanced.shape[1]), round(0.15 * balanced.shape[1])
            parts = [part.flatten().to(labels.device) for part in balanced.split_with_sizes(
                [n_train, n_val, balanced.shape[1] - n_train - n_val], dim=1)]  # fmt: skip
            candidates = _candidates(codes, labels[:, c], parts[0], n_candidates)
            if len(candidates) == 0:
                found[i, 0] = torch.log(torch.tensor(2.0, dtype=torch.float64, device="cpu"))
                continue
            (x_train, x_val, x_test) = (_columns(codes, rows, candidates) for rows in parts)
            (y_train, y_val, y_test) = (labels[rows, c].double().unsqueeze(1) for rows in parts)
            weight, bias = _fit_logistic(x_train, y_train)
            best = _log_loss(x_val * weight + bias, y_val).argmin()
            found[i, 0] = _log_loss(x_test * weight + bias, y_test)[best]
            found[i, 1] = candidates[best].double()
        return found

    per_class, latents = deal(range(labels.shape[1]), probe).unbind(1)
    return Probe(per_class.nanmean().item(), per_class.contiguous(), latents.long())


def _alive(codes: Codes) -> Tensor:
    """Whether each latent fires on any row, bool [N]."""
    return torch.bincount(codes.indices[codes.values > 0], minlength=codes.n_latents) > 0


def _label_counts(codes: Codes, labels: Tensor) -> Tensor:
    """Number of rows with label c on which latent n fires: float32 [N, C], exact below 2^24."""
    rows, slots = (codes.values > 0).nonzero(as_tuple=True)
    where = torch.stack([codes.indices[rows, slots], rows])
    ones = torch.ones(len(rows), device=labels.device)
    fired = torch.sparse_coo_tensor(where, ones, (codes.n_latents, len(labels)), check_invariants=False)
    return torch.sparse.mm(fired, labels.float())


def _dense_cosines(query: Tensor | Rows, target: Tensor | Rows):
    """Function of a query range -> cosines with the queries' own targets [b, 1], and a function of a target range ->
    cosines [b, t]."""

    def unit(features, start, stop):
        x = features.read(start, stop) if isinstance(features, Rows) else features[start:stop]
        return F.normalize(_at_least_float32(x), eps=1e-8)

    def cosines(start, stop):
        q = unit(query, start, stop)
        own = (q * unit(target, start, stop)).sum(1, keepdim=True)
        return own, lambda first, last: q @ unit(target, first, last).T

    return cosines


def _sparse_cosines(query: Codes, target: Codes):
    """`_dense_cosines` of codes; only the block of queries becomes dense."""
    query = query._replace(values=F.normalize(_at_least_float32(query.values), eps=1e-8))
    target_values = F.normalize(_at_least_float32(target.values), eps=1e-8).to(query.values.dtype)

    def cosines(start, stop):
        dense = _block(query, slice(start, stop))
        own = (dense.gather(1, target.indices[start:stop]) * target_values[start:stop]).sum(1, keepdim=True)
        by_latent = dense.T.contiguous()

        def against(first, last):
            weights = target_values[first:last]
            return F.embedding_bag(target.indices[first:last], by_latent, per_sample_weights=weights, mode="sum").T

        return own, against

    return cosines


def _block(codes: Codes, rows: slice) -> Tensor:
    """Dense codes of some rows, [b, N]."""
    values = codes.values[rows]
    return values.new_zeros(len(values), codes.n_latents).scatter_add(1, codes.indices[rows], values)


def _moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [d] and summed squared deviation from the mean of rows x."""
    mean = x.mean(0)
    return len(x), mean, (x - mean).square().sum()


def _merge_moments(old: tuple[int, Tensor, Tensor], new: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    """Merge the moments of two sets of rows (Chan's formula)."""
    n, _, spread = new
    total, step = old[0] + n, new[1] - old[1]
    return total, old[1] + step * (n / total), old[2] + spread + step.square().sum() * (old[0] * n / total)


def _balanced_rows(positive: Tensor, seed: int) -> Tensor:
    """int64 [2, m]: m random positive rows and m random negative ones, m the smaller number of the two."""
    generator = torch.Generator().manual_seed(seed)
    classes = [where.nonzero().flatten() for where in (positive, ~positive)]
    m = min(map(len, classes))
    return torch.stack([rows[torch.randperm(len(rows), generator=generator, device="cpu")[:m]] for rows in classes])


def _candidates(codes: Codes, positive: Tensor, train_rows: Tensor, n: int) -> Tensor:
    """At most n latents that fire in train_rows, in descending order of the positive rows on which they fire."""
    fired = codes.values > 0
    together = torch.bincount(codes.indices[positive][fired[positive]], minlength=codes.n_latents)
    seen = codes.indices[train_rows][fired[train_rows]].unique()  # ascending
    return seen[together[seen].sort(descending=True, stable=True).indices[:n]]


def _columns(codes: Codes, rows: Tensor, latents: Tensor) -> Tensor:
    """Codes at some rows and latents, float64 [len(rows), len(latents)]."""
    column = torch.full((codes.n_latents,), len(latents), device=rows.device)  # the last column collects other latents
    column[latents] = torch.arange(len(latents), device=rows.device)
    out = torch.zeros(len(rows), len(latents) + 1, dtype=torch.float64, device=rows.device)
    return out.scatter_add_(1, column[codes.indices[rows]], codes.values[rows].double())[:, :-1]


def _log_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over rows: logits [n, M], y [n, 1] -> [M]."""
    return F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none").mean(0)


def _fit_logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """M separate regressions on one variable each: x [n, M], y [n, 1] -> weight, bias [M].

    Minimises n * log-loss + weight^2 / 2 by Newton's method with step halving until the objective descends.
    """
    n = len(x)
    weight, bias = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])

    def objective(weight, bias):
        return n * _log_loss(x * weight + bias, y) + weight.square() / 2

    loss = objective(weight, bias)
    for _ in range(100):
        p = torch.sigmoid(x * weight + bias)
        curvature = p * (1 - p)
        g_w, g_b = ((p - y) * x).sum(0) + weight, (p - y).sum(0)
        h_ww, h_wb, h_bb = (curvature * x * x).sum(0) + 1, (curvature * x).sum(0), curvature.sum(0) + 1e-12
        det = h_ww * h_bb - h_wb * h_wb
        d_w, d_b = (h_bb * g_w - h_wb * g_b) / det, (h_ww * g_b - h_wb * g_w) / det
        if (g_w * d_w + g_b * d_b).max() < 1e-12:
            break
        step = torch.ones_like(weight)
        for _ in range(30):
            new = objective(weight - step * d_w, bias - step * d_b)
            if (new <= loss).all():
                break
            step = torch.where(new <= loss, step, step / 2)
        step = torch.where(new <= loss, step, 0.0)
        if not step.any():  # converged up to rounding
            break
        weight, bias = weight - step * d_w, bias - step * d_b
        loss = torch.minimum(new, loss)
    return weight, bias


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_features(name: str, value) -> Codes | Tensor | Rows:
    """Check features; a tuple of three becomes Codes."""
    if isinstance(value, Rows):
        require(value.shape[0] > 0, name, "at least one row", "none")
        return value
    if isinstance(value, Tensor):
        check_tensor(name, value, ("B", "d"))
        require(len(value) > 0, name, "at least one row", value)
        require(bool(value.isfinite().all()), name, "finite features", "NaN or infinity")
        return value
    _check_codes(name, value)
    return Codes(*value)


def _check_codes(name: str, value) -> None:
    ok = isinstance(value, tuple) and len(value) == 3
    require(ok, name, "Codes(indices, values, n_latents)", value)
    indices, values, n_latents = value
    check_int(f"{name}.n_latents", n_latents, 1)
    check_tensor(f"{name}.values", values, ("B", "k"))
    require(values.numel() > 0, f"{name}.values", "at least one row and one column", values)
    ok = isinstance(indices, Tensor) and indices.dtype == torch.int64 and indices.shape == values.shape
    require(ok, f"{name}.indices", f"an int64 tensor of shape {tuple(values.shape)} as values", indices)
    require(indices.device == values.device, f"{name}.indices", f"a tensor on {values.device} as values", indices)
    low, high = int(indices.min()), int(indices.max())
    require(low >= 0 and high < n_latents, f"{name}.indices", f"latent ids in 0..{n_latents - 1}", f"{low}..{high}")
    ok = bool((values.isfinite() & (values >= 0)).all())
    require(ok, f"{name}.values", "finite values >= 0", "a negative value, NaN or infinity")


def _check_streams(codes, at_least: int) -> dict[str, Codes]:
    """Check codes by stream, over the same rows and latents."""
    ok = isinstance(codes, Mapping) and len(codes) >= at_least
    got = f"{len(codes)} streams" if isinstance(codes, Mapping) else codes
    require(ok, "codes", f"a dict of Codes by stream, of {at_least} or more streams", got)
    first = next(iter(codes))
    for s, value in codes.items():
        name = f"codes[{s!r}]"
        _check_codes(name, value)
        n, rows = codes[first][2], len(codes[first][0])
        require(value[2] == n, f"{name}.n_latents", f"{n} as in codes[{first!r}]", value[2])
        require(len(value[0]) == rows, f"{name}.indices", f"{rows} rows as in codes[{first!r}]", value[0])
        device = codes[first][0].device
        require(value[0].device == device, f"{name}.indices", f"a tensor on {device}", value[0])
    return {s: Codes(*value) for s, value in codes.items()}


def _check_labels(labels, indices: Tensor) -> Tensor:
    want = f"a bool tensor of shape [{len(indices)}, C], C >= 1, on {indices.device}"
    ok = isinstance(labels, Tensor) and labels.dtype == torch.bool and labels.dim() == 2
    ok = ok and len(labels) == len(indices) and labels.shape[1] > 0 and labels.device == indices.device
    require(ok, "labels", want, labels)
    return labels
