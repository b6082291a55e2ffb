"""`sparc-kernels encode`: sparse codes of feature files as CSR matrices, for use elsewhere."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from ..core.console import refusing
from ..core.progress import watched
from ..core.validation import writing
from ..evaluation.by_rows import joined
from ..evaluation.csr import FORMATS, paths_of, write_codes
from ..evaluation.evaluate import check_rows
from .inputs import add_model_arguments, inputs_of, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_model_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, default="npz", help="SciPy's .npz or safetensors (npz)")
    parser.add_argument("--out", type=Path, required=True, help="folder; one file for each stream")


@refusing("encode")
def run(args: argparse.Namespace) -> None:
    """Write the sparse codes of every stream; under torchrun each process encodes its part of the rows.

    Args:
        args: as `add_arguments` declares them.
    """
    paths = paths_of(args.stream, args.out, args.format)
    with joined(args) as processes, ExitStack() as stack:
        with processes.together():
            if processes.leads:
                stack.enter_context(writing("--out", paths.values(), inputs_of(args)))  # checked before the work
            model, features, _ = open_model(args, processes.leads)
            stack.enter_context(features)
        check_rows(features, args.batch_size, processes)
        started = time.perf_counter()
        watch = watched(features.rows // processes.size, "encode") if processes.leads else iter
        values = write_codes(
            model, features, args.out, args.format, batch_size=args.batch_size, watch=watch, processes=processes
        )
    if not processes.leads:
        return
    for s, count in values.items():
        share = count / features.rows
        print(f"{paths[s]}: {features.rows:,} x {model.n_latents:,}, {share:.1f} values a row")
    print(f"{features.rows / (time.perf_counter() - started):,.0f} rows/s")
