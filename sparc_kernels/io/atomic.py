"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

from ..core.validation import first_line, require, temporary_of


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], None]) -> None:
    """`write(file)` to a temporary file in the same folder, synced and renamed; nothing is left of it on failure."""
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=2, default=methodcaller("item")) + "\n"  # NumPy's numbers as Python's
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """Raises: ValueError that names the file, when it cannot be read or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file, got one that cannot be read ({error})") from error
    require(isinstance(value, dict), str(path), "a JSON object", value)
    return value


def reason_of(error: Exception) -> str:
    """Without torch's advice to read the file unsafely."""
    return first_line(error).partition(". ")[0]
