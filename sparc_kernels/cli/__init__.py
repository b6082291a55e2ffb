"""`sparc-kernels SUBCOMMAND`, also `python -m sparc_kernels SUBCOMMAND`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from .. import __version__
from ..core.console import ends_with_its_pipe

PACKAGE = __package__.rpartition(".")[0]
# name -> (module with add_arguments(parser) and run(args) -> exit code, line of help)
SUBCOMMANDS = {
    "demo": ("cli.demo", "train on real data built on the spot, print the alignment table, write figures"),
    "train": ("cli.train", "train on feature files, with checkpoints to resume from"),
    "eval": (
        "cli.evaluate",
        "score a trained model on feature files: alignment, retrieval, explained variance; a report",
    ),
    "encode": ("cli.encode", "write the sparse codes of feature files as CSR matrices"),
    "show": ("cli.show", "the rows that activate a latent most, in every stream"),
    "verify": (
        "tools.verify.run",
        "check every operator and a training step against the float64 reference on this machine",
    ),
    "audit": (
        "tools.audit",
        "compile every Triton kernel for GPUs that are not here: registers, spills, shared memory, instructions",
    ),
    "tune": (
        "tools.tune",
        "search launch settings for one shape on this machine's GPU and record them for later launches",
    ),
    "cost": (
        "tools.cost.report",
        "what a training step should take on a GPU, op by op, and against dense PyTorch: modelled, nothing runs",
    ),
}


def wait_asleep() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the environment already sets how.

    Takes effect only before torch is loaded. Spinning threads hold cores that other work needs (docs/decisions.md).
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line.

    Args:
        argv: subcommand and its arguments, without the program's name.

    Returns:
        The arguments; `command` is the subcommand.

    Raises:
        SystemExit: after printing help, the version or an error of usage.
    """
    parser = argparse.ArgumentParser(prog="sparc-kernels", description="Concept-aligned sparse autoencoders, fast.")
    parser.add_argument("--version", action="version", version=f"sparc_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, (module, text) in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in argv[:1]:  # only the chosen one is imported
            import_module(f"..{module}", __package__).add_arguments(command)
    return parser.parse_args(argv)


class _Lines(logging.Handler):
    """Prints what the package logs: training's notes on stdout, above its lines, all others on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        training = record.name.startswith(f"{PACKAGE}.train.")
        print(record.getMessage(), file=sys.stdout if training else sys.stderr, flush=True)


@contextmanager
def _logs_printed() -> Iterator[None]:
    """Context in which the package's log is printed, and goes to no other handler."""
    logger, lines = logging.getLogger(PACKAGE), _Lines()
    before = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@ends_with_its_pipe
def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: its name and arguments; None: those of the process.

    Returns:
        Exit code.
    """
    wait_asleep()
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        with _logs_printed():
            return import_module(f"..{SUBCOMMANDS[args.command][0]}", __package__).run(args)
    except KeyboardInterrupt:  # also while torch loads, which takes seconds
        return 130
