"""Open the model and the feature files of `eval`, `encode` and `show`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ..core.validation import check_device, require
from ..evaluation.evaluate import BATCH, needed_widths, select_locally
from ..io.features import Features
from ..io.run_checkpoints import CHECKPOINTS, checkpoints
from ..io.shards import files_of
from ..io.weights import OFFICIAL, OFFICIAL_CONFIG, WEIGHTS, model_of, read_weights
from ..nn.module import AlignedSAE
from .arguments import FEATURES, add_stream_argument


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that eval, encode and show share."""
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
    """Inputs of a command."""

    model: AlignedSAE
    features: Features
    trained: dict  # settings used in training that the arguments replace


def open_model(args, notes: bool = True) -> Opened:
    """Open the model and the features that the arguments name, and check them against each other.

    Args:
        args: as `add_model_arguments` declares them.
        notes: whether to print a note on stderr for each setting of the training that the arguments replace.

    Returns:
        An Opened; the model's parameters have requires_grad False.

    Raises:
        ValueError: an invalid argument, or features that do not fit the model.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected an int >= 1, got {args.batch_size}")
    device = check_device("device", args.device)
    path, state, stored = read_weights(args.model)
    given = {"k": args.k, "topk_type": args.topk_type, "normalize": args.normalize}
    given = {key: value for key, value in given.items() if value is not None}
    model, normalize = model_of(path, state, stored | given, device)
    trained = {key: stored[key] for key, value in given.items() if stored.get(key, value) != value}
    for key, had in trained.items() if notes else ():
        print(f"Note: {key} {given[key]}, where the model was trained with {had}", file=sys.stderr)
    if args.alone and model.topk_type == "global":
        model, trained = select_locally(model), {"topk_type": "global"} | trained
    if next(model.parameters()).dtype != torch.float64:
        model = model.float()  # exact for half precision weights; rows are read in float32
    some = set(args.stream) < set(model.d_streams) and model.topk_type == "global"
    hint = f"the streams of the model {args.model}, or --alone, with which some of them are enough"
    require(not some, "streams", f"{', '.join(model.d_streams)}, {hint}", ", ".join(args.stream))
    features = Features(args.stream, normalize, next(model.parameters()).dtype)
    features.require_widths(needed_widths(model, args.stream), f"the model {args.model}")
    return Opened(model.requires_grad_(False), features, trained)


def inputs_of(args) -> list[tuple[str, Path]]:
    """Return (what messages call it, path) of every file that eval, encode or show reads.

    Args:
        args: as the subcommand declares them.
    """
    model, options = args.model, vars(args)
    model_files = [model / name for name in (WEIGHTS, OFFICIAL, OFFICIAL_CONFIG)] + checkpoints(model / CHECKPOINTS)
    files = model_files if model.is_dir() else [model, model.with_name(OFFICIAL_CONFIG)]
    named = files_of(args.stream) + [(f"of --model {model}", file) for file in files]
    named += [(f"--{key.replace('_', '-')}", options[key]) for key in ("labels", "label_names") if options.get(key)]
    return named + [
        (f"--{key} {s}", path) for key in ("images", "texts") for s, path in (options.get(key) or {}).items()
    ]
