"""What every command line needs: sizes, refusals as exit code 2, and ends of pipes."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def memory_size(text: str) -> int:
    """Bytes from "500M", "4GiB", "1e9", "1,500 bytes"; K, M, G and T are powers of 1024."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([kmgt]?)(i?b|bytes)?", text.strip().lower().replace(",", ""))
    try:
        return int(float(found[1]) * _UNITS[found[2]])
    except (TypeError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 4GiB, got {text!r}") from None


def size_text(size: int) -> str:
    """What `memory_size` reads, exactly: "4 GiB", "1,500 bytes"."""
    for unit in "TGMK":
        if size and size % _UNITS[unit.lower()] == 0:
            return f"{size // _UNITS[unit.lower()]:,} {unit}iB"
    return f"{size:,} bytes"


def ends_with_its_pipe(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a `main`: exit code 141, as the shell has it, where the reader of the output has gone (`| head`)."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):  # what is left in them is written when Python ends
                os.dup2(nowhere, stream.fileno())
            return 141

    return run


def refusing(command: str):
    """Decorator of a subcommand's `run`. Exit code: 0; 2 where something is refused; 130 after Ctrl-C."""

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
