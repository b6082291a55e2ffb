"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

from ..core.validation import first_line, require, temporary_of


class Hashing:
    """A file that is hashed while it is written, and synced before it is closed.

    Args:
        file: open for writing.

    Attributes:
        digest: SHA-256 of what was written.
        size: its bytes.
    """

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self._error: OSError | None = None

    @contextlib.contextmanager
    def own_errors(self):
        """Context that raises the file's own error in place of what torch.save makes of it."""
        try:
            yield self
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def _try(self, method: Callable, *data):
        try:
            return method(*data)
        except OSError as error:
            self._error = self._error or error
            raise

    def write(self, data) -> int:
        """Write and hash bytes."""
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self._try(self.file.write, data)

    def flush(self) -> None:
        """Hand over what is buffered to the operating system."""
        self._try(self.file.flush)

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.size

    def fileno(self) -> int:
        """Return the handle of the file."""
        return self.file.fileno()

    def close(self) -> None:
        """Sync and close the file, once."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Write a file atomically: to a temporary file in the same folder, synced, then renamed; removed on failure.

    Args:
        path: the file to write or replace.
        write: called with the open binary file.
    """
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
    """Flush a folder's renames to disk (POSIX only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value) -> None:
    """Write a value as indented JSON, atomically; NumPy numbers become Python's."""
    text = json.dumps(value, indent=2, default=methodcaller("item")) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read or holds no object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file, got one that cannot be read ({error})") from error
    require(isinstance(value, dict), str(path), "a JSON object", value)
    return value


def reason_of(error: Exception) -> str:
    """Return the first sentence of an error, without torch's advice to read the file unsafely."""
    return first_line(error).partition(". ")[0]
