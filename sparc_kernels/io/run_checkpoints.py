"""Checkpoints that a training run resumes from: written atomically, checked by SHA-256."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..core.validation import plain, require
from .atomic import reason_of, write_atomically

CHECKPOINTS = "checkpoints"
SPACE = ".space"
KIND = "sparc_kernels training checkpoint"
_MAGIC = b"SPARC-SHA256:"
_TRAILER = len(_MAGIC) + 32


class _Hashing:
    """A file that keeps a digest of what is written to it."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def reserve(folder: Path, size: int) -> None:
    """Raise OSError where `size` more bytes do not fit, by taking them for a moment."""
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
    """Write `state` (tensors, numbers, strings) as the checkpoint of `step`; then delete all earlier ones but the
    newest, so that `keep` stay. Later ones are damaged, or the run would have gone on from there."""

    def write(file):
        hashing = _Hashing(file)
        torch.save(plain({"kind": KIND, "step": step, **state}), hashing)
        file.write(_MAGIC + hashing.digest.digest())

    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    write_atomically(path, write)
    for old in [p for p in checkpoints(folder) if p <= path][:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 9 + ".pt"))


def load_checkpoint(path: Path) -> dict:
    """The state that was saved, on the CPU.

    Raises: ValueError when the file is no training checkpoint or not what was written.
    """
    content = path.read_bytes()
    body, trailer = content[:-_TRAILER], content[-_TRAILER:]
    ok = trailer[: len(_MAGIC)] == _MAGIC and hashlib.sha256(body).digest() == trailer[len(_MAGIC) :]
    require(ok, f"checkpoint {path}", "a complete training checkpoint", "a damaged, truncated or foreign file")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # as _read_torch
        raise ValueError(f"checkpoint {path}: expected a torch file of tensors ({reason_of(error)})") from error
    ok = isinstance(state, dict) and state.get("kind") == KIND and isinstance(state.get("step"), int)
    require(ok, f"checkpoint {path}", "a training checkpoint of sparc_kernels", "something else")
    return state


def load_latest(folder: Path, tell: Callable[[str], None] = print, after: float = -1) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, None when there is none at all of a step later than `after`.

    Raises: ValueError when there are such checkpoints and all are damaged.
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
