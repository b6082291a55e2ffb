"""A trained model on feature files, scored as the paper's repository does, in bounded memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import permutations

import torch
from torch import Tensor

from ..core.progress import Watch
from ..io.features import Features
from ..metrics import Codes, Rows, activation_cosine, dead_fractions, explained_variance, jaccard, probe_1d, retrieval
from ..nn.module import AlignedSAE
from ..ops.decode import decode

BATCH = 1024  # rows encoded at a time


def select_locally(model: AlignedSAE) -> AlignedSAE:
    """The same weights under local selection, where no stream sees what another selects; in eval mode."""
    first = next(model.parameters())
    local = AlignedSAE(
        model.d_streams, model.n_latents, model.k, topk_type="local", impl=model.impl, device="meta", dtype=first.dtype
    ).to_empty(device=first.device)
    local.load_state_dict(model.state_dict())
    return local.decoder_layout_("rows").eval().requires_grad_(False)


def needed_widths(model: AlignedSAE, given: Iterable[str]) -> dict[str, int]:
    """Widths of the streams that features must have: those given where each selects alone, else all."""
    if model.topk_type == "local" and set(given) <= set(model.d_streams):
        return {s: d for s, d in model.d_streams.items() if s in given}
    return model.d_streams


def codes_of(outputs, n_latents: int) -> dict[str, Codes]:
    """Sparse codes by stream."""
    streams = [key.removeprefix("values_") for key in outputs if key.startswith("values_")]
    return {s: Codes(outputs[f"indices_{s}"], outputs[f"values_{s}"], n_latents) for s in streams}


@torch.no_grad()
def encoded_batches(
    model: AlignedSAE, features: Features, batch_size: int, codes: dict[str, Codes], watch: Watch = iter
):
    """(inputs, outputs) of consecutive batches, on the model's device, while `codes` fills with the codes of all."""
    model.eval()
    device = next(model.parameters()).device
    for start, x in watch(features.batches(batch_size)):
        x = {s: rows.to(device) for s, rows in x.items()}
        outputs = model(x)
        for s, part in codes_of(outputs, model.n_latents).items():
            if s not in codes:
                shape = (features.rows, part.values.shape[1])
                codes[s] = Codes(part.indices.new_empty(shape), part.values.new_empty(shape), model.n_latents)
            for whole, piece in zip(codes[s][:2], part[:2], strict=True):
                whole[start : start + len(piece)] = piece
        yield x, outputs


def encode(model: AlignedSAE, features: Features, batch_size: int = BATCH) -> dict[str, Codes]:
    """Codes of all rows, on the model's device: 12 k bytes a row and stream, where dense ones would be 4 N."""
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
) -> tuple[dict, dict[str, dict[str, Codes]]]:
    """Alignment of a trained model on rows it has not seen.

    Args:
        model: selects as it was trained ("own") and, with the same weights, stream by stream ("local").
        features: of the model's streams; some are enough where each selects alone.
        labels: bool [n, C], multi-hot, on any device; without them there is no Jaccard and no probe.
        probe, retrieve: whether to take the time for these.
        tell: called with a line before each part.  watch: takes the batches to encode and gives them on.
        count: of the name of another part and its unit, a `watch` of its steps.

    Returns: scores and codes. scores["own"] and ["local"]: Jaccard, its value for randomly renumbered latents
    (`jaccard_chance`), dead fractions, cosine of activations, explained variance by "t<-s" and its means; `probe` by
    stream. `retrieval`, local codes only: by kind and "target<-source", with `mean` over pairs. `chance`: of retrieval.
    codes["own"] and ["local"]: by stream.
    """
    features.require_widths(needed_widths(model, features.widths), "the model")
    device = next(model.parameters()).device
    labels = None if labels is None else labels.to(device)
    local = select_locally(model)
    codes, scores = {}, {"rows": features.rows}
    for name, chosen in (("own", model), ("local", local)):
        if name == "local" and model.topk_type == "local":
            codes["local"], scores["local"] = codes["own"], scores["own"]
            continue
        how = "each stream alone" if chosen.topk_type == "local" else "streams together"
        tell(f"Encoding {features.rows:,} rows, {how}")
        codes[name] = {}
        batches = encoded_batches(chosen, features, batch_size, codes[name], watch)
        variance = explained_variance((x, recons_of(outputs, x)) for x, outputs in batches)
        scores[name] = _agreement(codes[name], variance, labels, count)
        if probe and labels is not None:
            tell(f"Probing {labels.shape[1]:,} classes")
            scores[name]["probe"] = {s: _probe(c, labels, count("probe", "classes")) for s, c in codes[name].items()}
    if retrieve and features.rows > 1 and len(features.widths) > 1:
        scores["retrieval"] = _retrieval(local, features, codes["local"], tell, count)
        scores["chance"] = guessing(features.rows)
    return scores, codes


def recons_of(outputs, streams) -> dict[tuple[str, str], Tensor]:
    """(target, source) -> reconstruction [B, d_t]."""
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
    """Every stream's latents under numbers drawn at random."""
    generator = torch.Generator().manual_seed(0)
    return {
        s: c._replace(
            indices=torch.randperm(c.n_latents, generator=generator, device="cpu").to(c.indices.device)[c.indices]
        )
        for s, c in codes.items()
    }


def _probe(codes: Codes, labels: Tensor, watch: Watch) -> dict:
    result = probe_1d(codes, labels, watch=watch)
    found = (~result.per_class.isnan()).sum().item()
    return {"log_loss": result.mean if found else None, "classes": found}


def _retrieval(local: AlignedSAE, features: Features, codes: dict[str, Codes], tell, count) -> dict:
    """By latents, by cross-reconstructions and by a stream's own reconstructions; "t<-s": s asks, t answers."""
    pairs = list(permutations(codes, 2))
    device = next(local.parameters()).device

    def recon(t, s):
        """Reconstruction of t from s, made when asked."""
        weights = [local.decoders[t].weight], [local.pre_biases[t]]
        c = codes[s]

        def read(start, stop):
            return decode(c.indices[start:stop], c.values[None, start:stop], *weights, impl=local.impl)[0, 0]

        return Rows((features.rows, features.widths[t]), read)

    def raw(t):
        return Rows((features.rows, features.widths[t]), lambda a, b: features.read_stream(t, a, b).to(device))

    found: dict = {"latent": {}, "cross_reconstruction": {}, "self_reconstruction": {}}
    for s, t in pairs:
        tell(f"Retrieval of {t} by {s}")
        found["latent"][f"{t}<-{s}"] = retrieval(codes[s], codes[t], watch=count("by latents", "rows"))
        watch = count("by reconstructions", "rows")
        found["cross_reconstruction"][f"{t}<-{s}"] = retrieval(recon(t, s), raw(t), watch=watch)
    for s in codes:
        tell(f"Retrieval of {s} by its own reconstructions")
        watch = count("by reconstructions", "rows")
        found["self_reconstruction"][f"{s}<-{s}"] = retrieval(recon(s, s), raw(s), watch=watch)
    found["mean"] = {kind: mean(list(by_pair.values())) for kind, by_pair in found.items()}
    return found


def mean(scores: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}


def guessing(n: int) -> dict[str, float]:
    """Retrieval scores of a random order of n targets."""
    return {**{f"R@{k}": min(1.0, k / n) for k in (1, 5, 10)}, "MRR": sum(1 / rank for rank in range(1, n + 1)) / n}


def check_rows(features: Features) -> None:
    """Look at all rows, when all that is read in a moment has been, and note zero ones. Raises: ValueError."""
    for s, summary in features.check().items():
        if summary.n_zero_rows:
            print(f"Note: stream {s!r} has {summary.zeros(features.rows)}", file=sys.stderr)
