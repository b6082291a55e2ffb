"""Checkpoints of a training run, verified by SHA-256: a file of one process, a folder of several."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import torch

from ..core.validation import plain, require
from ..distributed.ranks import Ranks
from .atomic import Hashing, reason_of, write_atomically
from .blocks import Block, Key, by_id, by_name, flat, in_step, latents_dim, marked, nested

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SPACE = ".space"
KIND = "sparc_kernels training checkpoint"
MAGIC = b"SPARC-SHA256:"
TRAILER = len(MAGIC) + 32
FILE, FOLDER = ".pt", ".dcp"  # ends of their names


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


# -------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(folder: Path, step: int, state: dict, keep: int, ranks: Ranks | None = None) -> Path:
    """Write a checkpoint, then delete old ones.

    Args:
        folder: of the run's checkpoints; made if missing.
        step: number of the step.
        state: tensors, numbers and strings, as `RunState.state_dict` returns them.
        keep: checkpoints up to this step that are kept, the newest. Later ones are damaged (the run would have resumed
            from them) and are not counted.
        ranks: of a sharded model, every one of which calls this with its state. More than one write a folder that
            torch.distributed.checkpoint reads, with whole tensors under their official names.

    Returns:
        The file or folder.

    Raises:
        OSError: it cannot be written; with several ranks on all of them, with the number of the first that cannot.
    """
    alone = ranks is None or ranks.size == 1
    path = folder / f"step-{step:09d}{FILE if alone else FOLDER}"
    content = plain({"kind": KIND, "step": step, **state})
    if ranks is None or alone:
        _make(folder)
        write_atomically(path, lambda file: _write(file, content))
        _remove_old(path, keep)
        return path
    from .sharded_checkpoints import write_folder  # a second to import

    in_step(ranks, lambda: _make(folder) if ranks.rank == 0 else None)
    write_folder(path, marked(content, ranks), ranks)
    in_step(ranks, lambda: _remove_old(path, keep) if ranks.rank == 0 else None)
    return path


def _make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def _write(file, content: dict) -> None:
    hashing = Hashing(file)
    with hashing.own_errors():
        torch.save(content, cast(IO[bytes], hashing))  # torch writes and flushes, nothing else
    file.write(MAGIC + hashing.digest.digest())


def _remove_old(path: Path, keep: int) -> None:
    """Delete what `save_checkpoint` does not keep, and the other kind of the same step."""
    step, others = _step_of(path), checkpoints(path.parent)
    for old in [p for p in others if _step_of(p) < step or p == path][:-keep] + [
        p for p in others if _step_of(p) == step and p != path
    ]:
        if old.is_dir():
            from .sharded_checkpoints import remove

            remove(old)
        else:
            old.unlink()


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


# -------------------------------------------------------------------------------------------------------------- reading


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, files and folders, oldest first."""
    return sorted(path for end in (FILE, FOLDER) for path in folder.glob("step-" + "[0-9]" * 9 + end))


def load_checkpoint(path: Path, ranks: Ranks | None = None, without: Sequence[str] = ()) -> dict:
    """Load a checkpoint to the CPU.

    Args:
        path: what `save_checkpoint` wrote.
        ranks: all of which call this: they verify a folder together and leave out the tensors that are sharded, which
            `fill` reads. None, or one rank: everything is loaded, whole.
        without: names at the top of the state that are not read, such as "optimizer".

    Returns:
        The state, with `step` and `kind`.

    Raises:
        ValueError: it is no training checkpoint, or is damaged; with several ranks on all of them.
    """
    if ranks is None or ranks.size == 1:
        _verify(path)
        wanted = (lambda key: key[0] not in without) if without else None
        return _checked(path, lambda: _read(path, wanted=wanted))
    in_step(ranks, lambda: _verify(path, ranks.rank, ranks.size))
    wanted = lambda key: key[0] not in without and latents_dim(key) is None  # noqa: E731
    return in_step(ranks, lambda: _checked(path, lambda: _read(path, wanted=wanted)))


def _verify(path: Path, rank: int = 0, size: int = 1) -> None:
    """Verify a checkpoint, or this rank's share of a folder; one rank verifies a file."""
    if path.suffix == FOLDER:
        from .sharded_checkpoints import verify

        verify(path, rank, size)
    elif rank == 0:
        _verify_file(path)


def _verify_file(path: Path) -> None:
    digest, rest = hashlib.sha256(), path.stat().st_size - TRAILER
    with open(path, "rb") as file:
        while rest > 0 and (part := file.read(min(rest, 1 << 20))):
            digest.update(part)
            rest -= len(part)
        ok = rest == 0 and file.read() == MAGIC + digest.digest()
    require(ok, f"checkpoint {path}", "a complete training checkpoint", "a damaged, truncated or foreign file")


def _read(path: Path, blocks: Mapping[Key, Block] | None = None, wanted: Callable[[Key], bool] | None = None) -> dict:
    """Read what a checkpoint has; tensors into blocks, and what else is wanted into the result, by parameter ids."""
    if path.suffix == FOLDER:
        from .sharded_checkpoints import read_folder

        return by_id(read_folder(path, blocks, wanted))
    if blocks is None and wanted is None:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = flat(
        by_name({name: value for name, value in mapped.items() if blocks or wanted is None or wanted((name,))})
    )
    for key, block in (blocks or {}).items():
        block.check(".".join(key), getattr(state.get(key), "shape", None))
    for key, block in (blocks or {}).items():
        block.tensor.copy_(state[key].narrow(block.dim, block.start, block.tensor.shape[block.dim]))
    left = {key: value for key, value in state.items() if wanted is None or wanted(key)}
    copied = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in left.items()}
    return by_id(nested(copied))


def _checked(path: Path, read: Callable[[], dict]) -> dict:
    try:
        state = read()
    except Exception as error:  # torch.load raises many types
        raise ValueError(f"checkpoint {path}: expected a torch file of tensors ({reason_of(error)})") from error
    ok = isinstance(state, dict) and state.get("kind") == KIND and isinstance(state.get("step"), int)
    require(ok, f"checkpoint {path}", "a training checkpoint of sparc_kernels", "something else")
    return state


def fill(path: Path, state: dict, ranks: Ranks) -> None:
    """Read a checkpoint's sharded tensors; every rank calls it.

    Args:
        path: a checkpoint that `load_checkpoint` verified, of any number of processes.
        state: as `RunState.state_dict` returns it; the tensors of which this rank has a block are filled in place.
        ranks: of the model.

    Raises:
        ValueError: on every rank, if the checkpoint does not have such a tensor, or has one of another shape.
    """
    found = {key: value for key, value in flat(marked(state, ranks)).items() if isinstance(value, Block)}
    with torch.no_grad():
        in_step(ranks, lambda: _read(path, found, wanted=lambda key: False))


def load_latest(
    folder: Path,
    tell: Callable[[str], None] = logger.warning,
    after: float = -1,
    ranks: Ranks | None = None,
    without: Sequence[str] = (),
) -> tuple[Path, dict] | None:
    """Load the newest undamaged checkpoint.

    Args:
        folder: of the run's checkpoints.
        tell: called with a message for each damaged checkpoint skipped.
        after: only consider later steps.
        ranks: as of `load_checkpoint`.
        without: likewise.

    Returns:
        The file or folder and its state; None if there is no such checkpoint.

    Raises:
        ValueError: there are such checkpoints, all damaged.
    """
    error, found = None, [path for path in checkpoints(folder) if _step_of(path) > after]
    if ranks is not None:  # what rank 0 sees: the folder of another machine may be seen late
        found = ranks.objects(found)[0]
    for path in reversed(found):
        try:
            return path, load_checkpoint(path, ranks, without)
        except ValueError as damage:
            tell(f"Skipped: {damage}")
            error = damage
    if error is not None:
        raise error
    return None
