"""Process-level support for long runs: signals, a lock on the run's folder, recorded versions."""

from __future__ import annotations

import os
import platform
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .. import __version__
from ..core.provenance import commit, versions_of
from ..core.validation import fail
from ..distributed.processes import launched

LOCK = ".lock"  # in the folder of a run


def versions() -> dict:
    """Return the versions that a result depends on; `commit` only in a git checkout of this package."""
    packages = versions_of(("torch", "triton", "numpy"))
    own = {"sparc_kernels": __version__, "commit": commit(), "python": platform.python_version()}
    return own | packages | {"platform": platform.platform()}


@contextmanager
def only_one_run(folder: Path):
    """Lock a run's folder while the context is open.

    Args:
        folder: an existing folder.

    Raises:
        ValueError: another process holds the lock.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        fail("out", "a folder that no other run is writing to", str(folder))
    try:
        yield
    finally:
        lock.release()


class Signals:
    """Context that records SIGINT or SIGTERM; a second signal ends the process at once.

    Under torchrun a second SIGTERM does not: a scheduler sends one to every process, and torchrun forwards its own.

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
        if not self.received:
            self.received = signum
        elif signum == signal.SIGINT or not launched():
            os._exit(128 + signum)

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
