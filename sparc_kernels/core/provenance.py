"""Provenance of a result: commit of the checkout and versions of packages."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(PACKAGE.parent), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def commit() -> str | None:
    """Return the commit of the checkout that contains the package; None outside one."""
    try:
        # an installed copy inside some other repository is not tracked there
        _git("ls-files", "--error-unmatch", str(PACKAGE / "reference.py"))
        return _git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def changed(*paths: str) -> bool | None:
    """Whether files below `paths` differ from the commit; None if git fails.

    Args:
        *paths: relative to the checkout.
    """
    try:
        return bool(_git("status", "--porcelain", "--", *paths))
    except (OSError, subprocess.SubprocessError):
        return None


def versions_of(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Return installed versions by name; None for packages that are not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
