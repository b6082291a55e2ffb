"""Helpers of command lines: sizes, errors as exit code 2, closed pipes."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def memory_size(text: str) -> int:
    """Parse "500M", "4GiB", "1e9" or "1,500 bytes" into bytes; K, M, G and T are powers of 1024.

    Raises:
        argparse.ArgumentTypeError: the text is no size.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([kmgt]?)(i?b|bytes)?", text.strip().lower().replace(",", ""))
    try:
        return int(float(match[1]) * _UNITS[match[2]])
    except (TypeError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 4GiB, got {text!r}") from None


def size_text(size: int) -> str:
    """Format bytes exactly, as `memory_size` reads them: "4 GiB", "1,500 bytes"."""
    for unit in "TGMK":
        if size and size % _UNITS[unit.lower()] == 0:
            return f"{size // _UNITS[unit.lower()]:,} {unit}iB"
    return f"{size:,} bytes"


def ends_with_its_pipe(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a `main`: exit code 141, as in a shell, if the reader of the output has closed it (`| head`)."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):  # Python flushes them at exit
                os.dup2(nowhere, stream.fileno())
            return 141

    return run


def refusing(command: str):
    """Decorate a subcommand's `run` to return an exit code: 0; 2 after a refusal; 130 after Ctrl-C.

    Args:
        command: its name in error messages.
    """

    def wrap(work: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
        @functools.wraps(work)
        def run(args: argparse.Namespace) -> int:
            try:
                work(args)
            except BrokenPipeError:
                raise  # for `ends_with_its_pipe`
            except (ValueError, OSError, ImportError) as error:
                print(f"sparc-kernels {command}: error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                return 130
            return 0

        return run

    return wrap
