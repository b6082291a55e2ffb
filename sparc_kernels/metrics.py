"""How well the latents of several streams agree, computed on sparse codes in plain PyTorch, on any device.

The codes of one stream are a `Codes(indices, values, n_latents)`, or any such tuple; no function makes a dense [B, N].
A latent fired on a row when its value there is greater than 0. Score retrieval with codes selected locally, stream by
stream: codes selected together share their indices, which gives the partner away.

Bad input raises ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .core.validation import check_int, check_tensor, require

_BLOCK_ELEMENTS = 2**24  # of the largest temporary: 64 MiB in float32
_TIE = 1e-6  # cosines this close are ties: a few roundings of a float32 dot product of unit vectors


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
    """Dense features that are made or read when they are asked for.

    Attributes:
        shape: (B, d).
        read: function of (start, stop) -> floating [stop - start, d].
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]


class Jaccard(NamedTuple):
    """What `jaccard` returns.

    Attributes:
        mean: over all N latents.
        mean_alive: over the latents alive in one stream or more.
        per_latent: float64 [N].
        alive: bool [N].
    """

    mean: float
    mean_alive: float
    per_latent: Tensor
    alive: Tensor


class Probe(NamedTuple):
    """What `probe_1d` returns.

    Attributes:
        mean: of per_class, over the classes probed.
        per_class: float64 [C], test log-loss in nats, NaN where the class was left out.
        latents: int64 [C], the latent chosen, -1 where none was.
    """

    mean: float
    per_class: Tensor
    latents: Tensor


@torch.no_grad()
def jaccard(codes: Mapping[str, Codes], labels: Tensor) -> Jaccard:
    """Do a latent's activations mean the same in every stream, judged by the labels of the rows it fires on?

    For each stream, count how many of those rows carry each label; for a pair of streams, sum over labels of the
    smaller count / sum of the larger (0 when neither met a label); average over the pairs of streams in which the
    latent is alive. 0 for a latent alive in fewer than two streams.

    Args:
        codes: of two or more streams over the same B rows and N latents.
        labels: bool [B, C], multi-hot. Labels without a row and rows without a label are allowed; they count nothing.

    Returns: Jaccard; `mean_alive` is 0 when no latent is alive. Memory: N x C floats for each stream.

    Equivalent to, with dense codes: counts = [(c > 0).T.float() @ labels.float() for c in codes], then the mean over
    pairs of minimum(a, b).sum(1) / maximum(a, b).sum(1).
    """
    codes = _check_streams(codes, at_least=2)
    first = next(iter(codes.values()))
    labels = _check_labels(labels, first.indices)
    counts = [_label_counts(c, labels) for c in codes.values()]
    alive = torch.stack([_alive(c) for c in codes.values()])  # [S, N]
    total = torch.zeros(first.n_latents, dtype=torch.float64, device=labels.device)
    for s, t in combinations(range(len(counts)), 2):
        shared, union = torch.minimum(counts[s], counts[t]), torch.maximum(counts[s], counts[t])
        # 0 where the latent is dead in s or t, as its counts are
        total += shared.sum(1, dtype=torch.float64) / union.sum(1, dtype=torch.float64).clamp_min(1)
    n_alive = alive.sum(0)
    per_latent = total / (n_alive * (n_alive - 1) // 2).clamp_min(1)
    alive = n_alive > 0
    mean_alive = per_latent.sum() / alive.sum().clamp_min(1)  # dead latents add 0
    return Jaccard(per_latent.mean().item(), mean_alive.item(), per_latent, alive)


@torch.no_grad()
def dead_fractions(codes: Mapping[str, Codes]) -> dict[str, float]:
    """Fractions of the N latents that fired in no stream, in some, in every one: `all_dead`, `mixed`, `all_alive`."""
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
) -> dict[str, float]:
    """Does row i of `query` find row i of `target` among all B by cosine similarity?

    The rank of the right answer is 1 + the number of others at least as similar: ties, cosines within 1e-6, count
    against the query. So identical targets never help, and an all-zero row, whose cosine is 0 with everything, ranks
    behind whatever is similar at all: if all codes are zero every rank is B. Chance is R@K = K / B.

    Args:
        query, target: both Codes over the same N latents, or both floating [B, d] (a cross-reconstruction and the raw
            features, say), as tensors or as Rows. float16 and bfloat16 are computed in float32.
        ks: the K of R@K.
        watch: takes the range of queries, whose step is a block, and gives it on: to show progress.

    Returns: `R@K` for every K, `median_rank` (the lower of the middle two, as torch.median), and `MRR`, the mean of
    1 / rank. Works in blocks: at most 2^24 cosines, and as many numbers of Rows, are in memory at a time.
    """
    sparse = _check_features("query", query), _check_features("target", target)
    require(sparse[0] == sparse[1], "target", "Codes as query is" if sparse[0] else "a tensor as query is", target)
    for k in ks:
        check_int("ks", k, 1)
    if sparse[0]:
        query, target = Codes(*query), Codes(*target)
        require(query.n_latents == target.n_latents, "target", f"n_latents {query.n_latents}", str(target.n_latents))
        rows, width = len(query.values), query.n_latents
        require(len(target.values) == rows, "target", f"{rows} rows as in query", target.values)
        block, step = max(1, _BLOCK_ELEMENTS // max(rows, width)), rows
    else:
        rows, width = query.shape
        ok = tuple(target.shape) == (rows, width)
        require(ok, "target", f"shape [{rows}, {width}]", f"shape {list(target.shape)}")
        lazy = isinstance(query, Rows) or isinstance(target, Rows)
        # few passes over targets that are read again for every block of queries
        block = max(1, _BLOCK_ELEMENTS // (2 * width if lazy else rows))
        step = max(1, _BLOCK_ELEMENTS // max(block, width)) if lazy else rows
    cosines = _sparse_cosines(query, target) if sparse[0] else _dense_cosines(query, target)
    ranks = []
    for start in watch(range(0, rows, block)):
        own, against = cosines(start, min(start + block, rows))
        rank = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        for first in range(0, rows, step):
            rank += (against(first, min(first + step, rows)) >= own - _TIE).sum(1)  # its own is among them
        ranks.append(rank)
    ranks = torch.cat(ranks)
    scores = {f"R@{k}": (ranks <= k).double().mean().item() for k in ks}
    return {**scores, "median_rank": float(ranks.median()), "MRR": ranks.double().reciprocal().mean().item()}


@torch.no_grad()
def activation_cosine(codes: Mapping[str, Codes], watch: Callable[[range], Iterable[int]] = iter) -> Tensor:
    """Cosine between a latent's activations in two streams over all rows, averaged over the pairs: float64 [N].

    Needs no labels. 0 in a pair where the latent is dead in one of the two. watch: takes the range of rows, whose step
    is a block, and gives it on: to show progress.
    """
    codes = list(_check_streams(codes, at_least=2).values())
    n, rows, device = codes[0].n_latents, len(codes[0].values), codes[0].values.device
    products = torch.zeros(len(codes), len(codes), n, dtype=torch.float64, device=device)
    block = max(1, _BLOCK_ELEMENTS // (n * len(codes)))
    for start in watch(range(0, rows, block)):
        part = slice(start, start + block)
        dense = torch.stack([_block(c, part) for c in codes])  # [S, b, N]
        for s, t in combinations(range(len(codes)), 2):
            products[s, t] += (dense[s] * dense[t]).sum(0, dtype=torch.float64)
        products.diagonal(dim1=0, dim2=1).add_(dense.square().sum(1, dtype=torch.float64).T)
    norms = products.diagonal(dim1=0, dim2=1).T.sqrt()  # [S, N]
    pairs = [products[s, t] / (norms[s] * norms[t]).clamp_min(1e-30) for s, t in combinations(range(len(codes)), 2)]
    return torch.stack(pairs).mean(0)


@torch.no_grad()
def top_rows(codes: Codes, latent: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows on which a latent fires most: int64 [m] and their values [m], descending, m <= n; ties to the lower row."""
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
    """1 - FVU for every pair: 1 - sum_b |x_t - R[t<-s]|^2 / sum_b |x_t - mean x_t|^2, the mean being that of all rows.

    Args:
        batches: pairs (inputs, reconstructions): inputs {t: [b, d_t]}, reconstructions {(t, s): [b, d_t]} of target t
            from source s; every batch has the same pairs. One pass, a batch at a time; sums are float64.

    Returns: {(t, s): explained variance}. At most 1; negative when the mean alone would do better; NaN for a target
    without variance.

    Equivalent to, for one pair: sklearn.metrics.r2_score(x, recon, multioutput="variance_weighted").
    """
    moments, errors, pairs = {}, {}, None
    for inputs, recons in batches:
        require(
            isinstance(recons, Mapping) and len(recons) > 0, "batches", "non-empty dicts of reconstructions", recons
        )
        pairs = set(recons) if pairs is None else pairs
        require(set(recons) == pairs, "batches", f"the pairs {sorted(pairs)} in every batch", repr(sorted(recons)))
        for t in sorted({t for t, _ in recons}):
            require(t in inputs, "batches", f"inputs with stream {t!r}", repr(list(inputs)))
            moments[t] = _merge_moments(moments.get(t), check_tensor(f"inputs[{t!r}]", inputs[t], ("b", "d")).double())
        for (t, s), recon in recons.items():
            recon = check_tensor(f"reconstructions[{t!r}, {s!r}]", recon, tuple(inputs[t].shape))
            errors[t, s] = errors.get((t, s), 0) + (recon.double() - inputs[t].double()).square().sum()
    require(pairs is not None, "batches", "at least one batch", "none")
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
) -> Probe:
    """How well one latent alone predicts a class: test log-loss of the best one, in nats (ln 2 = 0.693 is chance).

    For each class: as many negative rows as positive ones (or the reverse, where negatives are fewer), divided
    70/15/15 with equal halves; the candidates are the `n_candidates` latents that fire on most of the class's rows
    (among those that fire in the training part; ties to the lower latent); a logistic regression on each (penalty
    weight^2 / 2, scikit-learn's default); the best on validation is scored on test. A class for which no latent fires
    in the training part scores ln 2.

    Args:
        codes: of one stream.
        labels: bool [B, C], multi-hot.
        min_count: classes need more positive and more negative rows than this, at least 6; others are left out (NaN).
        seed: of the sampling; a class's rows do not depend on the other classes.
        watch: takes the range of classes and gives it on: to show progress.

    Returns: Probe; its mean is NaN when no class has enough rows.
    """
    _check_codes("codes", codes)
    codes = Codes(*codes)
    labels = _check_labels(labels, codes.indices)
    check_int("n_candidates", n_candidates, 1)
    check_int("min_count", min_count, 6)
    check_int("seed", seed, 0)
    per_class = torch.full((labels.shape[1],), float("nan"), dtype=torch.float64, device="cpu")
    latents = torch.full((labels.shape[1],), -1, device="cpu")
    for c in watch(range(labels.shape[1])):
        balanced = _balanced_rows(labels[:, c].cpu(), seed + c)
        if balanced.shape[1] <= min_count:
            continue
        n_train, n_val = round(0.7 * balanced.shape[1]), round(0.15 * balanced.shape[1])
        parts = [part.flatten().to(labels.device) for part in balanced.split_with_sizes(
            [n_train, n_val, balanced.shape[1] - n_train - n_val], dim=1)]  # fmt: skip
        candidates = _candidates(codes, labels[:, c], parts[0], n_candidates)
        if len(candidates) == 0:
            per_class[c] = torch.log(torch.tensor(2.0, dtype=torch.float64, device="cpu"))
            continue
        (x_train, x_val, x_test) = (_columns(codes, rows, candidates) for rows in parts)
        (y_train, y_val, y_test) = (labels[rows, c].double().unsqueeze(1) for rows in parts)
        weight, bias = _fit_logistic(x_train, y_train)
        best = _log_loss(x_val * weight + bias, y_val).argmin()
        per_class[c] = _log_loss(x_test * weight + bias, y_test)[best]
        latents[c] = candidates[best]
    return Probe(per_class.nanmean().item(), per_class, latents)


def _alive(codes: Codes) -> Tensor:
    """bool [N]: fired on some row."""
    return torch.bincount(codes.indices[codes.values > 0], minlength=codes.n_latents) > 0


def _label_counts(codes: Codes, labels: Tensor) -> Tensor:
    """float32 [N, C], exact below 2^24: rows with label c on which latent n fired."""
    rows, slots = (codes.values > 0).nonzero(as_tuple=True)
    where = torch.stack([codes.indices[rows, slots], rows])
    ones = torch.ones(len(rows), device=labels.device)
    fired = torch.sparse_coo_tensor(where, ones, (codes.n_latents, len(labels)), check_invariants=False)
    return torch.sparse.mm(fired, labels.float())


def _dense_cosines(query: Tensor | Rows, target: Tensor | Rows):
    """Function of a range of queries -> their cosines with their own targets [b, 1], and a function of a range of
    targets -> cosines [b, t]."""

    def unit(features, start, stop):
        x = features.read(start, stop) if isinstance(features, Rows) else features[start:stop]
        return F.normalize(_at_least_float32(x), eps=1e-8)

    def cosines(start, stop):
        q = unit(query, start, stop)
        own = (q * unit(target, start, stop)).sum(1, keepdim=True)
        return own, lambda first, last: q @ unit(target, first, last).T

    return cosines


def _sparse_cosines(query: Codes, target: Codes):
    """The same for codes. Only that block of queries becomes dense."""
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
    """Some rows, dense: [b, N]."""
    values = codes.values[rows]
    return values.new_zeros(len(values), codes.n_latents).scatter_add(1, codes.indices[rows], values)


def _merge_moments(old: tuple[int, Tensor, Tensor] | None, x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Rows, mean [d] and summed squared deviation from it, of the rows so far and x together (Chan's formula)."""
    n, mean = len(x), x.mean(0)
    spread = (x - mean).square().sum()
    if old is None:
        return n, mean, spread
    total, step = old[0] + n, mean - old[1]
    return total, old[1] + step * (n / total), old[2] + spread + step.square().sum() * (old[0] * n / total)


def _balanced_rows(positive: Tensor, seed: int) -> Tensor:
    """int64 [2, m]: m random positive rows and m random negative ones, m the smaller number of the two."""
    generator = torch.Generator().manual_seed(seed)
    classes = [where.nonzero().flatten() for where in (positive, ~positive)]
    m = min(map(len, classes))
    return torch.stack([rows[torch.randperm(len(rows), generator=generator, device="cpu")[:m]] for rows in classes])


def _candidates(codes: Codes, positive: Tensor, train_rows: Tensor, n: int) -> Tensor:
    """At most n latents that fire in train_rows, those that fire on most positive rows first."""
    fired = codes.values > 0
    together = torch.bincount(codes.indices[positive][fired[positive]], minlength=codes.n_latents)
    seen = codes.indices[train_rows][fired[train_rows]].unique()  # ascending
    return seen[together[seen].sort(descending=True, stable=True).indices[:n]]


def _columns(codes: Codes, rows: Tensor, latents: Tensor) -> Tensor:
    """float64 [len(rows), len(latents)]: the codes at these rows and latents."""
    column = torch.full((codes.n_latents,), len(latents), device=rows.device)  # the last column takes what is not asked
    column[latents] = torch.arange(len(latents), device=rows.device)
    out = torch.zeros(len(rows), len(latents) + 1, dtype=torch.float64, device=rows.device)
    return out.scatter_add_(1, column[codes.indices[rows]], codes.values[rows].double())[:, :-1]


def _log_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over rows: logits [n, M], y [n, 1] -> [M]."""
    return F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none").mean(0)


def _fit_logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """M separate regressions on one variable each: x [n, M], y [n, 1] -> weight, bias [M].

    Minimises n * log-loss + weight^2 / 2 by Newton's method, halving a step as long as it does not descend.
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
        if not step.any():  # only rounding is left
            break
        weight, bias = weight - step * d_w, bias - step * d_b
        loss = torch.minimum(new, loss)
    return weight, bias


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_features(name: str, value) -> bool:
    """True for Codes, False for a dense tensor or Rows."""
    if isinstance(value, Rows):
        require(value.shape[0] > 0, name, "at least one row", "none")
        return False
    if isinstance(value, Tensor):
        check_tensor(name, value, ("B", "d"))
        require(len(value) > 0, name, "at least one row", value)
        require(bool(value.isfinite().all()), name, "finite features", "NaN or infinity")
        return False
    _check_codes(name, value)
    return True


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
    """Codes by stream, all over the same rows and latents."""
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
