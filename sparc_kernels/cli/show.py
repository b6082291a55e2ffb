"""`sparc-kernels show LATENT`: print the rows that activate a latent most, in every stream."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.console import refusing
from ..core.progress import watched
from ..core.validation import require, writing
from ..evaluation.evaluate import check_rows
from ..evaluation.report import import_jinja2, latent_page
from ..evaluation.top_activations import top_activations
from ..io.atomic import write_atomically
from ..io.labels import Pictures, read_pictures
from .arguments import add_stream_argument
from .inputs import add_model_arguments, inputs_of, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("latent", type=int, help="number of the latent")
    add_model_arguments(parser)
    parser.add_argument("--top", type=int, default=10, help="rows of each stream (10)")
    add_stream_argument(parser, "--images", "pictures: .npy [n, h, w(, 3)] or a folder, in row order; needs --html")
    add_stream_argument(parser, "--texts", "texts, one row a line")
    parser.add_argument("--html", type=Path, help="write a page with the pictures too")


@refusing("show")
def run(args: argparse.Namespace) -> None:
    """Print the top rows of a latent, and write them as a page with --html.

    Args:
        args: as `add_arguments` declares them.
    """
    if args.top < 1:
        raise ValueError(f"--top: expected an int >= 1, got {args.top}")
    if args.html is not None:
        is_page = args.html.suffix.lower() in (".html", ".htm")
        require(is_page, "--html", "a file ending in .html or .htm", str(args.html))
        import_jinja2()  # a missing package is reported before the work
    with writing("--html", [args.html] * (args.html is not None), inputs_of(args)):  # checked before the work
        model, features, _ = open_model(args)
        with features:
            pictures = read_pictures(args.images, args.texts, features)
            check_rows(features)
            watch = watched(features.rows, "show")
            best = top_activations(model, features, args.latent, args.top, batch_size=args.batch_size, watch=watch)
        for s, (rows, values, fired) in best.items():
            print(f"{s}: latent {args.latent} fires on {fired:,} of {features.rows:,} rows")
            for row, value in zip(rows.tolist(), values.tolist(), strict=True):
                print(f"  {value:8.4f}  row {row}{_caption(pictures.get(s), row)}")
        if args.html is not None:
            shown = {s: rows.tolist() for s, (rows, _, _) in best.items()}
            page = latent_page(f"Latent {args.latent} of {args.model}", shown, pictures)
            write_atomically(args.html, lambda file: file.write(page.encode()))
            print(f"Wrote {args.html}")


def _caption(pictures, row: int) -> str:
    if isinstance(pictures, Pictures):
        return f"  {pictures.files[row].name}" if pictures.files else ""
    return f"  {pictures[row]}" if pictures else ""
