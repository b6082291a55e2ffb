"""Command line arguments shared by several subcommands."""

from __future__ import annotations

import argparse
from pathlib import Path

FEATURES = (
    "features of one stream: .h5, .safetensors, .npy or .pt; FILE:DATASET where they are not called `features`; a "
    "pattern in quotes, such as 'feats_*.npy', for shards, in the order of their numbers, or FILE,FILE in another order"
)


def stream_file(text: str) -> tuple[str, Path]:
    """Parse NAME=FILE."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, Path(path)


def stream_features(text: str) -> tuple[str, Path | list[Path]]:
    """Parse NAME=FILE, or NAME=FILE,FILE,... for shards; an existing file whose name contains a comma is one file."""
    from ..io.files import SUFFIXES, split_dataset

    name, path = stream_file(text)
    parts = [Path(part) for part in str(path).split(",")]
    shards = all(split_dataset(part)[0].suffix.lower() in SUFFIXES for part in parts)
    return name, parts if len(parts) > 1 and shards and not split_dataset(path)[0].exists() else path


class _Streams(argparse.Action):
    """Collect repeated NAME=FILE options into a dict; a repeated name is an error."""

    def __call__(self, parser, namespace, value, option_string=None):
        streams = dict(getattr(namespace, self.dest) or {})
        name, path = value
        if name in streams:
            parser.error(f"{option_string}: expected every stream once, got {name!r} twice")
        setattr(namespace, self.dest, {**streams, name: path})


def add_stream_argument(parser, flag: str, text: str, required: bool = False) -> None:
    """Add a repeatable NAME=FILE option.

    Args:
        parser: an argument parser or a group of one.
        flag: name of the option; one that ends in "stream" takes feature files, so shards too.
        text: line of help.
        required: whether the option must be given at least once.
    """
    kind = stream_features if flag.endswith("stream") else stream_file
    parser.add_argument(flag, action=_Streams, type=kind, metavar="NAME=FILE", required=required, help=text)
