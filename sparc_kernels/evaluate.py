"""`sparc-kernels eval`: a trained model on feature files, scored as the paper's repository does, in bounded memory."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import FEATURES, add_stream_argument, refusing
from ._checks import check_device, is_marked, plain, require, writing
from ._progress import Watch, counted, watched
from .checkpoint import (
    CHECKPOINTS,
    OFFICIAL,
    OFFICIAL_CONFIG,
    WEIGHTS,
    checkpoints,
    model_of,
    read_json,
    read_weights,
    write_atomically,
)
from .decoder import decode
from .feature_files import split_dataset
from .features import Features
from .labels import read_labels, read_names, read_pictures
from .metrics import Codes, Rows, activation_cosine, dead_fractions, explained_variance, jaccard, probe_1d, retrieval
from .module import AlignedSAE
from .shards import is_pattern, matching, stream_label

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


# ---------------------------------------------------------------------------------------------------------- the command


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What eval, encode and show have in common."""
    parser.add_argument("--model", type=Path, required=True, help="folder that `train` wrote, model.safetensors, a "
                        "checkpoint, or an official msae_checkpoint.pth")  # fmt: skip
    add_stream_argument(parser, "--stream", FEATURES, required=True)
    parser.add_argument("--k", type=int, help="active latents; needed where weights come without settings, and another "
                        "than the model's where they have them")  # fmt: skip
    parser.add_argument("--topk-type", choices=("global", "local"), help="selection in training; likewise")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide rows by their norm "
                        "(as in training)")  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="let each stream select its latents alone; some of the "
                        "model's streams are enough then")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"rows at a time ({BATCH})")


class Opened(NamedTuple):
    """What a command works on. trained: settings of the training that its arguments replace."""

    model: AlignedSAE
    features: Features
    trained: dict


def open_model(args) -> Opened:
    """The model and the features that the arguments name, checked against each other. Notes replaced settings."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected an int >= 1, got {args.batch_size}")
    device = check_device("device", args.device)
    path, state, stored = read_weights(args.model)
    given = {"k": args.k, "topk_type": args.topk_type, "normalize": args.normalize}
    given = {key: value for key, value in given.items() if value is not None}
    model, normalize = model_of(path, state, stored | given, device)
    trained = {key: stored[key] for key, value in given.items() if stored.get(key, value) != value}
    for key, had in trained.items():
        print(f"Note: {key} {given[key]}, where the model was trained with {had}", file=sys.stderr)
    if args.alone and model.topk_type == "global":
        model, trained = select_locally(model), {"topk_type": "global"} | trained
    if next(model.parameters()).dtype != torch.float64:
        model = model.float()  # weights in half precision lose nothing, and rows are read in float32
    some = set(args.stream) < set(model.d_streams) and model.topk_type == "global"
    hint = f"the streams of the model {args.model}, or --alone, with which some of them are enough"
    require(not some, "streams", f"{', '.join(model.d_streams)}, {hint}", ", ".join(args.stream))
    features = Features(args.stream, normalize, next(model.parameters()).dtype)
    features.require_widths(needed_widths(model, args.stream), f"the model {args.model}")
    return Opened(model.requires_grad_(False), features, trained)


def check_rows(features: Features) -> None:
    """Look at all rows, when all that is read in a moment has been, and note zero ones. Raises: ValueError."""
    for s, summary in features.check().items():
        if summary.n_zero_rows:
            print(f"Note: stream {s!r} has {summary.zeros(features.rows)}", file=sys.stderr)


def files_of(streams: Mapping) -> list[tuple[str, Path]]:
    """Every file of feature files as `Features` takes them, shards among them, with what messages call it."""
    found = []
    for s, value in streams.items():
        label = stream_label(s, value)
        if isinstance(value, Path) and is_pattern(value):
            value = matching(label, value)[0]
        paths = value if isinstance(value, list) else [value] * (value is not None)  # None: a tensor
        found += [(label, split_dataset(path)[0]) for path in paths]
    return found


def inputs_of(args) -> list[tuple[str, Path]]:
    """Files that eval, encode or show reads, with what messages call them."""
    model, given = args.model, vars(args)
    beside = [model / name for name in (WEIGHTS, OFFICIAL, OFFICIAL_CONFIG)] + checkpoints(model / CHECKPOINTS)
    files = beside if model.is_dir() else [model, model.with_name(OFFICIAL_CONFIG)]
    found = files_of(args.stream) + [(f"of --model {model}", file) for file in files]
    found += [(f"--{key.replace('_', '-')}", given[key]) for key in ("labels", "label_names") if given.get(key)]
    return found + [(f"--{key} {s}", path) for key in ("images", "texts") for s, path in (given.get(key) or {}).items()]


def _is_ours(path: Path) -> bool:
    """Whether `eval` wrote this report or these scores."""
    if path.suffix == ".html":
        return is_marked(path)
    try:
        return {"own", "local", "streams", "trained"} <= read_json(path).keys()
    except ValueError:
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--labels", type=Path, help="multi-hot [n, C] or class numbers [n] in .npy, or a SciPy .npz")
    parser.add_argument("--label-names", type=Path, help="text file, one class a line")
    add_stream_argument(parser, "--images", "pictures for the gallery: .npy [n, h, w(, 3)] or a folder, in row order")
    add_stream_argument(parser, "--texts", "texts for the gallery, one row a line")
    parser.add_argument("--no-retrieval", action="store_true", help="leave out what takes longest")
    parser.add_argument("--no-probe", action="store_true", help="leave out the 1-D probes")
    parser.add_argument("--out", type=Path, default=Path("sparc-eval"), help="folder of scores.json and report.html "
                        "(sparc-eval)")  # fmt: skip


@refusing("eval")
def run(args: argparse.Namespace) -> None:
    from .report import html, import_matplotlib

    import_matplotlib()  # before the work, so that a missing package is known at once
    started = time.perf_counter()
    files = [args.out / "scores.json", args.out / "report.html"]
    with writing("--out", files, inputs_of(args), _is_ours):  # tried before the work
        model, features, trained = open_model(args)
        with features:
            labels, numbers = read_labels(args.labels, features.rows) if args.labels else (None, None)
            names = numbers and [f"class {number}" for number in numbers]
            if args.label_names:
                names = read_names(args.label_names, None if labels is None else labels.shape[1], numbers)
            pictures = read_pictures(args.images, args.texts, features)
            check_rows(features)
            print(f"Scores and report go to {args.out}", file=sys.stderr)
            scores, codes = evaluate(
                model,
                features,
                labels,
                batch_size=args.batch_size,
                probe=not args.no_probe,
                retrieve=not args.no_retrieval,
                tell=lambda text: print(text, file=sys.stderr, flush=True),
                watch=watched(features.rows, "eval"),
                count=counted,
            )
        settings = {"model": str(args.model), "topk_type": model.topk_type, "n_latents": model.n_latents, "k": model.k}
        settings |= {"normalize": features.normalize, "trained": trained}
        record = settings | {"streams": {s: str(p) for s, p in args.stream.items()}} | scores
        text = json.dumps(finite(plain(record)), indent=2, allow_nan=False) + "\n"
        write_atomically(files[0], lambda file: file.write(text.encode()))
        page = html(record, codes, labels, names, pictures)
        write_atomically(files[1], lambda file: file.write(page.encode()))
        print(summary(record))
        print(f"Wrote scores.json and report.html to {args.out} ({time.perf_counter() - started:.0f} s)")


def finite(value):
    """None for NaN and infinity, which JSON has not, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(record: dict) -> str:
    """The main scores as text, of the record that `eval` writes."""
    from .report import selections

    rows = (
        ("Jaccard, all latents", "jaccard"),
        ("Jaccard, alive latents", "jaccard_alive"),
        ("Jaccard, chance", "jaccard_chance"),
        ("activation cosine", "activation_cosine"),
        ("dead in every stream", "all_dead"),
        ("dead in some (mixed)", "mixed"),
        ("explained variance, self", "explained_variance_self"),
        ("explained variance, cross", "explained_variance_cross"),
    )
    kinds = selections(record)
    lines = [f"Not as trained: {key} {record[key]} instead of {had}" for key, had in record["trained"].items()]
    lines.append(f"{'':28}" + "".join(f"{title:>26}" for title in kinds.values()))
    for title, key in rows:
        if key in record["own"]:
            lines.append(f"{title:28}" + "".join(f"{record[kind][key]:26.3f}" for kind in kinds))
    if "retrieval" in record:
        lines.append(f"{'retrieval, each alone':28}" + "".join(f"{key:>12}" for key in record["chance"]))
        for kind, values in [*record["retrieval"]["mean"].items(), ("chance", record["chance"])]:
            lines.append(f"  {kind.replace('_', ' '):26}" + "".join(f"{values[key]:12.4f}" for key in record["chance"]))
    return "\n".join(lines)
