"""Score a trained model on feature files as the paper's repository does, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import permutations
from typing import cast

import torch
from torch import Tensor

from ..core.progress import Watch
from ..distributed.processes import Processes
from ..io.features import Features
from ..metrics import (
    BatchVariance,
    Codes,
    Deal,
    Rows,
    activation_cosine,
    batch_variances,
    dead_fractions,
    jaccard,
    merged_variance,
    probe_1d,
    retrieval,
)
from ..nn.module import AlignedSAE
from ..ops.decode import decode
from .by_rows import ALONE, codes_of_all, dealt, own_part

logger = logging.getLogger(__name__)

BATCH = 1024  # rows encoded at a time


def select_locally(model: AlignedSAE) -> AlignedSAE:
    """Copy a model with local selection, where each stream selects independently; in eval mode, without gradients."""
    first = next(model.parameters())
    local = AlignedSAE(
        model.d_streams, model.n_latents, model.k, topk_type="local", impl=model.impl, device="meta", dtype=first.dtype
    ).to_empty(device=first.device)
    local.load_state_dict(model.state_dict())
    return local.decoder_layout_("rows").eval().requires_grad_(False)


def needed_widths(model: AlignedSAE, given: Iterable[str]) -> dict[str, int]:
    """Return the widths of the streams that features must have.

    Args:
        model: its selection decides.
        given: names of the streams at hand.

    Returns:
        {s: d_s} of the given streams under local selection, of all streams under global selection.
    """
    if model.topk_type == "local" and set(given) <= set(model.d_streams):
        return {s: d for s, d in model.d_streams.items() if s in given}
    return model.d_streams


def codes_of(outputs, n_latents: int) -> dict[str, Codes]:
    """Return the sparse codes {s: Codes} of a forward.

    Args:
        outputs: of the model.
        n_latents: N.
    """
    streams = [key.removeprefix("values_") for key in outputs if key.startswith("values_")]
    return {s: Codes(outputs[f"indices_{s}"], outputs[f"values_{s}"], n_latents) for s in streams}


@torch.no_grad()
def encoded_batches(
    model: AlignedSAE,
    features: Features,
    batch_size: int,
    codes: dict[str, Codes],
    watch: Watch = iter,
    starts: range | None = None,
):
    """Iterate over (inputs, outputs) of consecutive batches, on the model's device.

    Args:
        model: put in eval mode.
        features: of the model's streams.
        batch_size: rows of a batch.
        codes: filled in place with the codes of these rows, {s: Codes}.
        watch: wraps the iterator of batches, for a progress bar.
        starts: first rows of the batches; None: of all.
    """
    model.eval()
    device = next(model.parameters()).device
    first, stop = (0, features.rows) if starts is None else features.interval(starts)
    for start, x in watch(features.batches(batch_size, starts)):
        x = {s: rows.to(device) for s, rows in x.items()}
        outputs = model(x)
        for s, batch in codes_of(outputs, model.n_latents).items():
            if s not in codes:
                shape = (stop - first, batch.values.shape[1])
                codes[s] = Codes(batch.indices.new_empty(shape), batch.values.new_empty(shape), model.n_latents)
            for whole, piece in zip(codes[s][:2], batch[:2], strict=True):
                whole[start - first : start - first + len(piece)] = piece
        yield x, outputs


def encode(model: AlignedSAE, features: Features, batch_size: int = BATCH) -> dict[str, Codes]:
    """Return the codes {s: Codes} of all rows, on the model's device: 12 k bytes a row and stream (dense: 4 N).

    Args:
        model: put in eval mode.
        features: of the model's streams.
        batch_size: rows encoded at a time.
    """
    codes: dict[str, Codes] = {}
    for _ in encoded_batches(model, features, batch_size, codes):
        pass
    return codes


@torch.no_grad()
def evaluate(
    model: AlignedSAE,
    features: Features,
    labels: Tensor | None = None,
    *,
    batch_size: int = BATCH,
    probe: bool = True,
    retrieve: bool = True,
    tell=lambda text: None,
    watch: Watch = iter,
    count: Callable[[str, str], Watch] = lambda what, unit: iter,
    processes: Processes = ALONE,
) -> tuple[dict, dict[str, dict[str, Codes]]]:
    """Score the alignment of a trained model on held-out rows.

    Args:
        model: scored with its own selection ("own") and, with the same weights, with local selection ("local").
        features: of the model's streams; a subset is enough under local selection.
        labels: bool [n, C], multi-hot, on any device; None: no Jaccard and no probe.
        batch_size: rows encoded at a time.
        probe: whether to fit the 1-D probes.
        retrieve: whether to score retrieval.
        tell: called with a line before each part.
        watch: wraps the iterator of batches, for a progress bar.
        count: called with the name of another part and its unit; returns a `watch` of its steps.
        processes: that call this function together, with the same arguments: each encodes its part of the batches,
            retrieves by its part of the rows and probes its part of the classes.

    Returns:
        Scores and codes. scores["own"] and ["local"]: Jaccard, its value for randomly renumbered latents
        (`jaccard_chance`), dead fractions, cosine of activations, explained variance by "t<-s" and its means; `probe`
        by stream. `retrieval`, local codes only: by kind and "target<-source", with `mean` over pairs. `chance`: of
        retrieval. codes["own"] and ["local"]: by stream.

    Raises:
        ValueError: features that lack a needed stream or have another width.
    """
    features.require_widths(needed_widths(model, features.widths), "the model")
    device = next(model.parameters()).device
    labels = None if labels is None else labels.to(device)
    local = select_locally(model)
    codes: dict[str, dict[str, Codes]] = {}
    scores: dict = {"rows": features.rows}
    for name, chosen in (("own", model), ("local", local)):
        if name == "local" and model.topk_type == "local":
            codes["local"], scores["local"] = codes["own"], scores["own"]
            continue
        how = "each stream alone" if chosen.topk_type == "local" else "streams together"
        tell(f"Encoding {features.rows:,} rows, {how}")
        starts = own_part(range(0, features.rows, batch_size), processes)
        own: dict[str, Codes] = {}
        batches = encoded_batches(chosen, features, batch_size, own, watch, starts)
        parts = batch_variances((x, recons_of(outputs, x)) for x, outputs in batches)
        variance = merged_variance(parts if processes.size == 1 else _variances_of_all(parts, device, processes))
        codes[name] = codes_of_all(own, model.n_latents, device, processes)
        scores[name] = _agreement(codes[name], variance, labels, count)
        if probe and labels is not None:
            tell(f"Probing {labels.shape[1]:,} classes")
            scores[name]["probe"] = {
                s: _probe(c, labels, count("probe", "classes"), dealt(processes)) for s, c in codes[name].items()
            }
    if retrieve and features.rows > 1 and len(features.widths) > 1:
        scores["retrieval"] = _retrieval(local, features, codes["local"], tell, count, dealt(processes))
        scores["chance"] = guessing(features.rows)
    return scores, codes


def _variances_of_all(parts: Iterable[BatchVariance], device, processes: Processes) -> Iterable[BatchVariance]:
    """Share the batches' contributions to the explained variance; yield those of all in the order of the rows."""

    def moved(part: BatchVariance, to) -> BatchVariance:
        moments = {t: (n, mean.to(to), spread.to(to)) for t, (n, mean, spread) in part.moments.items()}
        return BatchVariance(moments, {pair: error.to(to) for pair, error in part.errors.items()})

    for some in processes.share([moved(part, "cpu") for part in parts]):
        yield from (moved(part, device) for part in some)


def recons_of(outputs, streams) -> dict[tuple[str, str], Tensor]:
    """Return all reconstructions of a forward: {(target, source): [B, d_t]}.

    Args:
        outputs: of the model.
        streams: names.
    """
    return {(t, s): outputs[f"recon_{t}" if s == t else f"cross_recon_{t}_from_{s}"] for t in streams for s in streams}


def _agreement(codes: dict[str, Codes], variance: dict, labels: Tensor | None, count) -> dict:
    scores: dict = {}
    if labels is not None and len(codes) > 1:
        score = jaccard(codes, labels)
        scores |= {"jaccard": score.mean, "jaccard_alive": score.mean_alive}
        scores["jaccard_chance"] = jaccard(_renumbered(codes), labels).mean
    scores |= dead_fractions(codes)
    scores["l0"] = {s: (c.values > 0).sum(1).double().mean().item() for s, c in codes.items()}
    if len(codes) > 1:
        scores["activation_cosine"] = activation_cosine(codes, count("cosines", "rows")).mean().item()
    own = [v for (t, s), v in variance.items() if t == s]
    cross = [v for (t, s), v in variance.items() if t != s]
    scores["explained_variance_self"] = sum(own) / len(own)
    if cross:
        scores["explained_variance_cross"] = sum(cross) / len(cross)
    scores["explained_variance"] = {f"{t}<-{s}": v for (t, s), v in variance.items()}
    return scores


def _renumbered(codes: dict[str, Codes]) -> dict[str, Codes]:
    """Renumber the latents of every stream by a random permutation."""
    generator = torch.Generator().manual_seed(0)
    return {
        s: c._replace(
            indices=torch.randperm(c.n_latents, generator=generator, device="cpu").to(c.indices.device)[c.indices]
        )
        for s, c in codes.items()
    }


def _probe(codes: Codes, labels: Tensor, watch: Watch, deal: Deal) -> dict:
    result = probe_1d(codes, labels, watch=watch, deal=deal)
    classes = (~result.per_class.isnan()).sum().item()
    return {"log_loss": result.mean if classes else None, "classes": classes}


def _retrieval(local: AlignedSAE, features: Features, codes: dict[str, Codes], tell, count, deal: Deal) -> dict:
    """Score retrieval by latents, cross- and self-reconstructions; key "t<-s": query s, target t."""
    pairs = list(permutations(codes, 2))
    device = next(local.parameters()).device

    def recon(t, s):
        """Reconstruction of t from s, decoded as it is read."""
        c, w_dec, pre_bias = codes[s], cast(torch.nn.Parameter, local.decoders[t].weight), local.pre_biases[t]

        def read(start, stop):
            return decode(c.indices[start:stop], c.values[None, start:stop], [w_dec], [pre_bias], impl=local.impl)[0, 0]

        return Rows((features.rows, features.widths[t]), read)

    def raw(t):
        return Rows((features.rows, features.widths[t]), lambda a, b: features.read_stream(t, a, b).to(device))

    scores: dict = {"latent": {}, "cross_reconstruction": {}, "self_reconstruction": {}}
    for s, t in pairs:
        tell(f"Retrieval of {t} by {s}")
        scores["latent"][f"{t}<-{s}"] = retrieval(codes[s], codes[t], watch=count("by latents", "rows"), deal=deal)
        watch = count("by reconstructions", "rows")
        scores["cross_reconstruction"][f"{t}<-{s}"] = retrieval(recon(t, s), raw(t), watch=watch, deal=deal)
    for s in codes:
        tell(f"Retrieval of {s} by its own reconstructions")
        watch = count("by reconstructions", "rows")
        scores["self_reconstruction"][f"{s}<-{s}"] = retrieval(recon(s, s), raw(s), watch=watch, deal=deal)
    scores["mean"] = {kind: mean(list(by_pair.values())) for kind, by_pair in scores.items()}
    return scores


def mean(scores: list[dict[str, float]]) -> dict[str, float]:
    """Average each key over several scores."""
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}


def guessing(n: int) -> dict[str, float]:
    """Return the expected retrieval scores of a random order of n targets."""
    return {**{f"R@{k}": min(1.0, k / n) for k in (1, 5, 10)}, "MRR": sum(1 / rank for rank in range(1, n + 1)) / n}


def check_rows(features: Features, batch_size: int = BATCH, processes: Processes = ALONE) -> None:
    """Check all rows, and log a warning for each stream with zero rows.

    Args:
        features: files that were opened.
        batch_size: rows of a batch.
        processes: each checks the batches that it encodes; all refuse what one refuses.

    Raises:
        ValueError: as `Features.check`.
    """
    with processes.together():
        summaries = features.check(rows=features.interval(own_part(range(0, features.rows, batch_size), processes)))
    for s, summary in summaries.items():
        zero, what = torch.cat(processes.share(summary.zero)), max(processes.share(summary.what), key=len)
        summary = summary._replace(zero=zero, what=what, n_read=features.rows)
        if summary.n_zero_rows and processes.leads:
            logger.warning(f"Note: stream {s!r} has {summary.zeros(features.rows)}")
