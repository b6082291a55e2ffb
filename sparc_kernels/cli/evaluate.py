"""`sparc-kernels eval`: score a trained model on feature files as the paper's repository does."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ..core.console import refusing
from ..core.progress import counted, watched
from ..core.validation import is_marked, plain, writing
from ..evaluation.by_rows import joined
from ..evaluation.evaluate import check_rows, evaluate
from ..evaluation.report import html, import_jinja2, import_matplotlib, selections
from ..io.atomic import read_json, write_atomically
from ..io.labels import read_labels, read_names, read_pictures
from .arguments import add_stream_argument
from .inputs import add_model_arguments, inputs_of, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
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
    """Score a model and write scores.json and report.html; under torchrun processes share the work.

    Args:
        args: as `add_arguments` declares them.
    """
    started = time.perf_counter()
    files = [args.out / "scores.json", args.out / "report.html"]
    with joined(args) as processes, ExitStack() as stack:
        leads = processes.leads
        with processes.together():
            import_matplotlib()  # a missing package is reported before the work
            import_jinja2()
            if leads:
                stack.enter_context(writing("--out", files, inputs_of(args), _is_ours))  # checked before the work
            model, features, trained = open_model(args, leads)
            stack.enter_context(features)
            labels, numbers = read_labels(args.labels, features.rows) if args.labels else (None, None)
            names = numbers and [f"class {number}" for number in numbers]
            if args.label_names:
                names = read_names(args.label_names, None if labels is None else labels.shape[1], numbers)
            pictures = read_pictures(args.images, args.texts, features) if leads else {}
        check_rows(features, args.batch_size, processes)
        if leads:
            print(f"Scores and report go to {args.out}", file=sys.stderr)
        scores, codes = evaluate(
            model,
            features,
            labels,
            batch_size=args.batch_size,
            probe=not args.no_probe,
            retrieve=not args.no_retrieval,
            tell=lambda text: print(text, file=sys.stderr, flush=True) if leads else None,
            watch=watched(features.rows // processes.size, "eval") if leads else iter,
            count=counted if leads else lambda what, unit: iter,
            processes=processes,
        )
        settings = {"model": str(args.model), "topk_type": model.topk_type, "n_latents": model.n_latents, "k": model.k}
        settings |= {"normalize": features.normalize, "trained": trained}
        record = settings | {"streams": {s: str(p) for s, p in args.stream.items()}} | scores
        with processes.together():
            if leads:
                text = json.dumps(finite(plain(record)), indent=2, allow_nan=False) + "\n"
                write_atomically(files[0], lambda file: file.write(text.encode()))
                page = html(record, codes, labels, names, pictures)
                write_atomically(files[1], lambda file: file.write(page.encode()))
    if leads:
        print(summary(record))
        print(f"Wrote scores.json and report.html to {args.out} ({time.perf_counter() - started:.0f} s)")


def finite(value):
    """Replace NaN and infinity by None, which JSON can hold, also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(record: dict) -> str:
    """Format the main scores as text.

    Args:
        record: as `eval` writes it to scores.json.
    """
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


def _is_ours(path: Path) -> bool:
    """Whether `eval` wrote this report or scores file."""
    if path.suffix == ".html":
        return is_marked(path)
    try:
        return {"own", "local", "streams", "trained"} <= read_json(path).keys()
    except ValueError:
        return False
