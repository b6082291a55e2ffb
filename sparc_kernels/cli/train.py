"""`sparc-kernels train`: train on feature files."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from ..core.console import memory_size, size_text
from ..core.validation import check_device, precision_name
from ..distributed.processes import LIMIT, STALL, Processes, Refused, join
from ..io.loader import SHUFFLES
from ..io.weights import MODEL_KEYS, SETTINGS, model_config, model_of, read_weights
from ..nn.module import AlignedSAE
from ..train.config import DECAYS, PRECISIONS, TrainConfig
from ..train.folder import MANIFEST, read_manifest
from ..train.log import LOGGERS
from ..train.trainer import Interrupted, Trainer, TrainingStopped
from .arguments import FEATURES, add_stream_argument

_OPTIONS = {  # flag -> help, choices; type and default are TrainConfig's
    "n_latents": "latents",
    "k": "active latents of a row",
    "auxk": "dead latents in the auxiliary loss, 0 without",
    "topk_type": "one selection for all streams, or one each",
    "auxk_threshold": "a value above it counts as fired",
    "dead_steps_threshold": "steps without firing after which a latent is dead",
    "auxk_coef": "weight of the auxiliary loss",
    "cross_coef": "weight of the cross-reconstruction loss",
    "batch_size": "rows of a batch",
    "epochs": "passes over the data",
    "max_steps": "stop after so many batches, 0: no limit",
    "lr": "learning rate of Adam",
    "warmup": "steps in which the learning rate rises",
    "decay": "how it falls to 0 afterwards",
    "weight_decay": "decoupled, as AdamW",
    "max_grad_norm": "clip the gradient's norm, 0: never",
    "unit_norm": "normalise decoder columns before or after the update",
    "gradient_free": "update weights without holding their gradients",
    "reinit_every": "steps between re-initialisations of dead latents, 0: never",
    "seed": "of weights, order and re-initialisation",
    "shuffle": "blocks and rows; the official sampler; in order",
    "drop_last": "leave out the smaller last batch of an epoch",
    "memory": "for shuffled rows; features may be larger",
    "normalize": "divide rows by their norm",
    "val_fraction": "part of the rows to validate on",
    "precision": "of products and parameters",
    "max_skipped": "stop after so many batches without a finite loss",
}
_CHOICES = {
    "topk_type": ("global", "local"),
    "decay": DECAYS,
    "unit_norm": ("before", "after"),
    "shuffle": SHUFFLES,
    "precision": PRECISIONS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_stream_argument(parser, "--stream", f"{FEATURES}; once for each stream")
    add_stream_argument(parser, "--val-stream", "features of other samples, to validate on after every epoch")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out; settings and "
                        "streams that are not given are those of the run, epochs and steps may be more")  # fmt: skip
    parser.add_argument("--init", type=Path, metavar="WEIGHTS", help="start from these: the folder of a run, "
                        "model.safetensors, a checkpoint or msae_checkpoint.pth; settings of the model that are not "
                        "given are theirs")  # fmt: skip
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS", help="0: only at the end (1000)")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that stay (2)")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS", help="between rows of log.csv (50)")
    parser.add_argument("--log", action="append", choices=LOGGERS, default=[], help="report there too; wandb: to the "
                        "project $WANDB_PROJECT, or sparc")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="on CUDA: no CUDA graph")
    parser.add_argument("--quick-check", action="store_true", help="look for NaN and infinity in a sample of the rows")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T", help="under torchrun: processes among "
                        "which the latents are divided; the others are replicas (1)")  # fmt: skip
    parser.add_argument("--lanes", type=int, help="parts of the rows with an order of their own (number of replicas)")
    parser.add_argument("--lost-after", type=float, default=LIMIT, metavar="SECONDS", help="without a sign of life of "
                        f"a process: the others end ({LIMIT:g})")  # fmt: skip
    parser.add_argument("--hangs-after", type=float, default=STALL, metavar="SECONDS", help="without progress of a "
                        f"process ({STALL:g})")  # fmt: skip
    parser.add_argument("--export-official", action="store_true", help="write msae_checkpoint.pth too")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    settings = parser.add_argument_group("settings, with the official defaults")
    for field in fields(TrainConfig):
        default = size_text(field.default) if field.name == "memory" else field.default
        flag, text = "--" + field.name.replace("_", "-"), f"{_OPTIONS[field.name]} ({default})"
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            settings.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
            continue
        kind = {"memory": memory_size, "precision": precision_name}.get(field.name, type(field.default))
        choices = _CHOICES.get(field.name)
        metavar = None if choices else ("SIZE" if kind is memory_size else kind.__name__.upper())
        settings.add_argument(
            flag, type=kind, default=argparse.SUPPRESS, choices=choices, metavar=metavar, help=text.replace("%", "%%")
        )


def run(args: argparse.Namespace) -> int:
    """Train a model, under torchrun as one of several processes.

    Args:
        args: as `add_arguments` declares them.

    Returns:
        Exit code, the same of all processes: 0; 2 for invalid arguments or files, or processes that differ; 1 where
        training stopped; 130 or 143 after a signal. A process that is lost takes the others along, which exit with 75.
    """
    try:
        processes = join(args.device, limit=args.lost_after, stall=args.hangs_after)
    except ValueError as error:
        return _refuse(error)
    try:
        return _run(args, processes)
    finally:
        processes.leave()


def _run(args: argparse.Namespace, processes: Processes) -> int:
    args.quiet = args.quiet or not processes.leads
    try:
        # a restart by torchrun, which counts them by machine, goes on where the processes before it were
        if any(processes.share(int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0)):
            ours = processes.from_first(lambda: _launch_of(args.out / MANIFEST) == processes.launch)
            args.resume = args.resume or ours
        with processes.together():
            config, streams, val_streams, model = _settings(args)
        trainer = Trainer(
            config,
            streams,
            args.out,
            val_streams=val_streams,
            model=model,
            init=args.init and str(args.init.absolute()),
            device=args.device,
            resume=args.resume,
            checkpoint_every=args.checkpoint_every,
            keep=args.keep,
            log_every=args.log_every,
            log_to=tuple(args.log),
            full_check=not args.quick_check,
            graph=args.graph,
            export=args.export_official,
            quiet=args.quiet,
            tensor_parallel=args.tensor_parallel,
            lanes=args.lanes,
            lost_after=args.lost_after,
            hangs_after=args.hangs_after,
        )
        trainer.start()
    except (ValueError, ImportError, OSError) as error:
        return _refuse(error, processes)
    except KeyboardInterrupt:
        return 130
    try:
        trainer.train()
    except BrokenPipeError:
        raise  # for `ends_with_its_pipe`
    except Interrupted as stop:
        if processes.leads:
            print(f"\n{stop}", file=sys.stderr)
        return stop.code
    except (TrainingStopped, ValueError) as error:  # ValueError: rows that --quick-check did not read
        _tell(f"stopped: {error}", error, processes)
        return 1
    except OSError as error:
        _tell(f"stopped at step {trainer.batches:,}, could not write: {error}", error, processes)
        return 1
    if not args.quiet:
        files = " ".join(f"--stream {shlex.quote(s)}=FILE" for s in trainer.data.features.widths)
        command = f"sparc-kernels eval --model {shlex.quote(str(args.out))} {files}"
        print(f"Next, on rows that it was not trained on: {command}")
    return 0


def _launch_of(manifest: Path) -> str:
    """The torchrun that began the run; "" without a run or torchrun."""
    return (read_manifest(manifest).get("launch") if manifest.exists() else None) or ""


def _settings(args) -> tuple[TrainConfig, dict, dict | None, AlignedSAE | None]:
    """Settings, streams, validation streams and the model of --init; --resume fills in what is not given."""
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    streams, val_streams = args.stream, args.val_stream
    manifest = args.out / MANIFEST
    if args.resume and manifest.exists():
        run_manifest = read_manifest(manifest)
        field_names = {field.name for field in fields(TrainConfig)}
        given = {key: value for key, value in run_manifest["config"].items() if key in field_names} | given
        streams = streams or _paths(run_manifest, "train", "--stream")
        val_streams = val_streams or _paths(run_manifest, "validation", "--val-stream")
    if not streams:
        raise ValueError("--stream: expected NAME=FILE for every stream, got none")
    if args.init is None:
        return TrainConfig(**given), streams, val_streams, None
    path, state, stored = read_weights(args.init)
    model, normalize = model_of(path, state, stored | {key: given[key] for key in MODEL_KEYS if key in given})
    for key in SETTINGS:
        if key in given and key in stored and given[key] != (stored[key] or 0) and not args.quiet:  # no auxk: None
            print(f"Note: {key} {given[key]}, where the model was trained with {stored[key]}")
    model_settings = model_config(model) | {"auxk": model.auxk or 0, "normalize": normalize}
    field_names = {field.name for field in fields(TrainConfig)}
    config = TrainConfig(**({key: value for key, value in model_settings.items() if key in field_names} | given))
    return config, streams, val_streams, model.to(check_device("device", args.device), config.dtype)


def _paths(manifest: dict, part: str, flag: str) -> dict | None:
    paths = {s: entry["path"] for s, entry in manifest["data"].get(part, {}).items()}
    if None in paths.values():
        raise ValueError(f"{flag}: expected files, since the run was on tensors, got none")
    return paths or None


def _refuse(error: Exception, processes: Processes | None = None) -> int:
    if processes is not None and isinstance(error, Refused):
        processes.finish()
    _tell(f"error: {error}", error, processes)
    return 2


def _tell(text: str, error: Exception, processes: Processes | None) -> None:
    """Print what ends the command; one process does so where all end for the same reason."""
    if processes is None or processes.leads or not isinstance(error, (Refused, TrainingStopped)):
        who = "" if processes is None or processes.size == 1 or processes.leads else f" (rank {processes.rank})"
        print(f"sparc-kernels train{who}: {text}", file=sys.stderr)
