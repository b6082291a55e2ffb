"""Launch settings recorded by `sparc-kernels tune`: storage, validation and look-up at a launch.

One JSON file per GPU, named after it: the user's, in $SPARC_KERNELS_CACHE or ~/.cache/sparc_kernels, takes precedence
over the one shipped in launch/records. Files are read at the first launch on a CUDA device, never on import; nothing is
tuned here. SPARC_KERNELS_TUNED=0 keeps the defaults.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..core.target import current

SHIPPED = Path(__file__).parent / "records"
CACHE = "SPARC_KERNELS_CACHE"
VERSION = 1


class Bound(NamedTuple):
    """Range of a setting, inclusive."""

    low: int
    high: int
    power_of_2: bool = True


@dataclass(frozen=True)
class Tunable:
    """A function of `launch`, some of whose settings may be replaced."""

    default: object  # arguments -> settings
    names: tuple[str, ...]  # names of the arguments
    bounds: dict[str, Bound]  # of the settings that may be replaced
    shared: object  # settings, arguments -> estimated bytes of shared memory, limit
    complete: object  # settings, arguments -> settings with those that depend on the replaced ones


TUNABLE: dict[str, Tunable] = {}
_trial: dict[str, dict] = {}  # op -> settings being tried by `sparc-kernels tune`
_seen: dict[str, dict] = {}  # op -> arguments of launches, while `observed`


def tunable(op: str, *, shared=None, complete=None, **bounds: Bound):
    """Decorate a function of `launch`: settings recorded for its arguments replace some of its own.

    Args:
        op: name in records.
        shared: settings, arguments -> estimated bytes of shared memory and the limit; None: not checked.
        complete: settings, arguments -> settings with those that depend on the replaced ones.
        **bounds: the settings that may be replaced, and their ranges.
    """

    def wrap(default):
        signature = inspect.signature(default)
        TUNABLE[op] = Tunable(default, tuple(signature.parameters), bounds, shared, complete)

        @functools.wraps(default)
        def config(*args, **named):
            if named or len(args) < len(signature.parameters):
                bound = signature.bind(*args, **named)
                bound.apply_defaults()
                args = bound.args
            if op in _seen:
                _seen[op][args] = None
            if op in _trial:
                return apply(op, args, _trial[op])
            name = target.gpu_name if (target := current()) else device_name()
            settings = recorded(name, os.environ.get(CACHE), op, args) if name else None
            return settings or default(*args)

        return config

    return wrap


def device_name() -> str | None:
    """Name of the current GPU; None before CUDA is initialised or if recorded settings are switched off."""
    if not torch.cuda.is_initialized() or os.environ.get("SPARC_KERNELS_TUNED") == "0":
        return None
    return _name_of(torch.cuda.current_device())


@functools.lru_cache
def _name_of(device: int) -> str:
    return torch.cuda.get_device_name(device)


def cache_dir() -> Path:
    """Folder of the user's records."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "sparc_kernels")


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def key(op: str, args: tuple) -> str:
    """Key under which settings for these arguments are recorded; sizes are rounded up to powers of two.

    Args:
        op: name in records.
        args: all arguments of its function.
    """
    exact = ("itemsize", "arch")
    parts = []
    for name, value in zip(TUNABLE[op].names, args, strict=True):
        if not isinstance(value, bool) and name not in exact:
            value = 1 << (max(value, 1) - 1).bit_length()
        parts.append(f"{name}={int(value)}")
    return f"{op}({','.join(parts)})"


def apply(op: str, args: tuple, fields: dict):
    """Replace some of the default settings.

    Args:
        op: name in records.
        args: all arguments of its function.
        fields: settings that replace the defaults.

    Raises:
        ValueError: a setting is unknown, out of range or needs too much shared memory.
    """
    entry = TUNABLE[op]
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"{op}: expected an object of settings, got {fields!r}")
    for name, value in fields.items():
        if name not in entry.bounds:
            raise ValueError(f"{op}: expected settings among {', '.join(entry.bounds)}, got {name!r}")
        bound = entry.bounds[name]
        ok = type(value) is int and bound.low <= value <= bound.high
        if not ok or (bound.power_of_2 and value & (value - 1)):
            kind = "a power of two" if bound.power_of_2 else "an int"
            raise ValueError(f"{op}: expected {name} {kind} in {bound.low}..{bound.high}, got {value!r}")
    config = replace(entry.default(*args), **fields)
    if entry.complete:
        config = entry.complete(config, *args)
    if entry.shared:
        needed, limit = entry.shared(config, *args)
        if needed > limit:
            raise ValueError(f"{op}: expected settings within {limit} B of shared memory, got {fields} ({needed} B)")
    return config


@functools.lru_cache(maxsize=4096)
def recorded(name: str, cache: str | None, op: str, args: tuple):
    """Look up the settings recorded for a GPU and arguments; None if there are none. Invalid ones warn once.

    Args:
        name: of the GPU.
        cache: value of $SPARC_KERNELS_CACHE, part of this cache's key.
        op: name in records.
        args: all arguments of its function.
    """
    where = key(op, args)
    fields, path = table(name, cache).get(where, (None, None))
    if fields is None:
        return None
    try:
        return apply(op, args, fields)
    except ValueError as error:
        _ignore(path, f"{where}: {error}")
        return None


@functools.lru_cache
def table(name: str, cache: str | None) -> dict[str, tuple]:
    """Load everything recorded for a GPU; the user's entries replace shipped ones.

    Args:
        name: of the GPU.
        cache: value of $SPARC_KERNELS_CACHE, part of this cache's key.

    Returns:
        key -> (settings, file).
    """
    entries = {}
    for folder in (SHIPPED, cache_dir()):
        path = folder / f"{slug(name)}.json"
        for where, entry in read(path).items():
            if isinstance(entry, dict) and "settings" in entry:
                entries[where] = entry["settings"], path
            else:
                _ignore(path, f"{where}: expected an object with settings, got {entry!r}")
    return entries


def read(path: Path) -> dict:
    """Read the entries of one file; {} if there is none or, with a warning, if it is invalid."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _ignore(path, f"cannot be read ({error})")
        return {}
    ok = isinstance(content, dict) and content.get("version") == VERSION and isinstance(content.get("entries"), dict)
    if not ok:
        _ignore(path, f"expected an object with version {VERSION} and entries")
        return {}
    unknown = [w for w in content["entries"] if w.split("(")[0] not in TUNABLE]
    for where in unknown:
        _ignore(path, f"{where}: expected an operator among {', '.join(TUNABLE)}")
    return {w: e for w, e in content["entries"].items() if w not in unknown}


def _ignore(path, reason: str) -> None:
    warnings.warn(f"{path}: {reason}; ignored, the defaults are used", RuntimeWarning, stacklevel=2)


def write(name: str, entries: dict[str, dict], about: dict) -> Path:
    """Add entries to the user's file of a GPU, atomically.

    Args:
        name: of the GPU.
        entries: key -> entry, an object with "settings".
        about: further fields of the file.

    Returns:
        The file.
    """
    folder = cache_dir()
    path = folder / f"{slug(name)}.json"
    content = {"version": VERSION, "gpu": name, **about, "entries": {**read(path), **entries}}
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    forget()
    return path


def forget() -> None:
    """Clear the caches: files are read again at the next launch."""
    table.cache_clear()
    recorded.cache_clear()


@contextmanager
def observed(op: str):
    """Context that collects the arguments of launches of `op` as keys of the dict that it yields."""
    _seen[op] = {}
    try:
        yield _seen[op]
    finally:
        del _seen[op]


@contextmanager
def trial(op: str, fields: dict):
    """Context in which every launch of `op` uses these settings.

    Args:
        op: name in records.
        fields: settings that replace the defaults.

    Raises:
        ValueError: at a launch, if the settings are invalid for its arguments.
    """
    _trial[op] = fields
    try:
        yield
    finally:
        del _trial[op]
