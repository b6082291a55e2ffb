"""Checkpoints of a training run: written atomically, verified by SHA-256."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import torch

from ..core.validation import plain, require
from .atomic import reason_of, write_atomically

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SPACE = ".space"
KIND = "sparc_kernels training checkpoint"
MAGIC = b"SPARC-SHA256:"
TRAILER = len(MAGIC) + 32


class _Hashing:
    """A file that hashes its content while it is written."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def reserve(folder: Path, size: int) -> None:
    """Check for free space by allocating it for a moment.

    Args:
        folder: on the file system to check.
        size: bytes needed.

    Raises:
        OSError: they are not available.
    """
    probe = folder / f"{SPACE}.{os.getpid()}.tmp"
    try:
        with open(probe, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            else:
                file.write(b"\0")
    finally:
        probe.unlink(missing_ok=True)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write a checkpoint, then delete old ones.

    Args:
        folder: of the run's checkpoints; made if missing.
        step: number of the step.
        state: tensors, numbers and strings.
        keep: checkpoints up to this step that are kept, the newest. Later ones are damaged (the run would have resumed
            from them) and are not counted.

    Returns:
        The file.
    """

    def write(file):
        hashing = _Hashing(file)
        content = plain({"kind": KIND, "step": step, **state})
        torch.save(content, cast(IO[bytes], hashing))  # torch writes and flushes, nothing else
        file.write(MAGIC + hashing.digest.digest())

    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    write_atomically(path, write)
    for old in [p for p in checkpoints(folder) if p <= path][:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoint files in a folder, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 9 + ".pt"))


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint to the CPU.

    Args:
        path: file that `save_checkpoint` wrote.

    Returns:
        The state, with `step` and `kind`.

    Raises:
        ValueError: the file is no training checkpoint, or is damaged.
    """
    content = path.read_bytes()
    body, trailer = content[:-TRAILER], content[-TRAILER:]
    ok = trailer[: len(MAGIC)] == MAGIC and hashlib.sha256(body).digest() == trailer[len(MAGIC) :]
    require(ok, f"checkpoint {path}", "a complete training checkpoint", "a damaged, truncated or foreign file")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types
        raise ValueError(f"checkpoint {path}: expected a torch file of tensors ({reason_of(error)})") from error
    ok = isinstance(state, dict) and state.get("kind") == KIND and isinstance(state.get("step"), int)
    require(ok, f"checkpoint {path}", "a training checkpoint of sparc_kernels", "something else")
    return state


def load_latest(
    folder: Path, tell: Callable[[str], None] = logger.warning, after: float = -1
) -> tuple[Path, dict] | None:
    """Load the newest undamaged checkpoint.

    Args:
        folder: of the run's checkpoints.
        tell: called with a message for each damaged checkpoint skipped.
        after: only consider later steps.

    Returns:
        The file and its state; None if there is no such checkpoint.

    Raises:
        ValueError: there are such checkpoints, all damaged.
    """
    error = None
    for path in reversed([path for path in checkpoints(folder) if int(path.stem.removeprefix("step-")) > after]):
        try:
            return path, load_checkpoint(path)
        except ValueError as damage:
            tell(f"Skipped: {damage}")
            error = damage
    if error is not None:
        raise error
    return None
