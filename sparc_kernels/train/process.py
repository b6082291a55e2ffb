"""Process-level support for long runs: signals, a lock on the run's folder, recorded versions."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import threading
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..core.validation import fail

LOCK = ".lock"  # in the folder of a run


def versions() -> dict:
    """Return the versions that a result depends on; `commit` only in a git checkout of this package."""
    record = {"sparc_kernels": __version__, "commit": _commit(), "python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            record[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            record[package] = None
    return record | {"platform": platform.platform()}


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    try:
        ours = [
            "ls-files",
            "--error-unmatch",
            "reference.py",
        ]  # fails in a checkout of another project
        subprocess.run([*git, *ours], capture_output=True, timeout=10, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


@contextmanager
def only_one_run(folder: Path):
    """Lock a run's folder while the context is open (POSIX only).

    Args:
        folder: an existing folder.

    Raises:
        ValueError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield
        return
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail("out", "a folder that no other run is writing to", str(folder))
        yield


class Signals:
    """Context that records SIGINT or SIGTERM; a second signal ends the process at once.

    Attributes:
        received: number of the signal; 0: none.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, signum, frame):
        if self.received:
            os._exit(128 + signum)
        else:
            self.received = signum

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
