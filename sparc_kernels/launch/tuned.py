"""Launch settings that `sparc-kernels tune` recorded: where they lie, what is refused, how a launch finds them.

One JSON file a GPU, named after it: the user's, in $SPARC_KERNELS_CACHE or ~/.cache/sparc_kernels, before the one
shipped in launch/records. Read when a kernel is first launched on a CUDA device, never on import; nothing is ever
searched for here. SPARC_KERNELS_TUNED=0 leaves the defaults alone.
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
    low: int
    high: int
    power_of_2: bool = True


@dataclass(frozen=True)
class Tunable:
    """A function of `launch` some of whose settings may be replaced."""

    default: object  # arguments -> settings
    names: tuple[str, ...]  # of the arguments
    bounds: dict[str, Bound]  # of the settings that may be replaced
    shared: object  # settings, arguments -> estimated bytes of shared memory and the limit
    complete: object  # settings, arguments -> settings with what follows from the replaced ones


TUNABLE: dict[str, Tunable] = {}
_trial: dict[str, dict] = {}  # op -> settings being tried by `sparc-kernels tune`
_seen: dict[str, dict] = {}  # op -> arguments that launches asked for, while `observed`


def tunable(op: str, *, shared=None, complete=None, **bounds: Bound):
    """Decorator of a function of `launch`: recorded settings, where they exist for its arguments, replace some."""

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
            found = recorded(name, os.environ.get(CACHE), op, args) if name else None
            return found or default(*args)

        return config

    return wrap


def device_name() -> str | None:
    """The current GPU's name once one is in use and recorded settings are wanted."""
    if not torch.cuda.is_initialized() or os.environ.get("SPARC_KERNELS_TUNED") == "0":
        return None
    return _name_of(torch.cuda.current_device())


@functools.lru_cache
def _name_of(device: int) -> str:
    return torch.cuda.get_device_name(device)


def cache_dir() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "sparc_kernels")


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def key(op: str, args: tuple) -> str:
    """Where settings for these arguments are recorded: sizes are rounded up to powers of two."""
    exact = ("itemsize", "arch")
    parts = []
    for name, value in zip(TUNABLE[op].names, args, strict=True):
        if not isinstance(value, bool) and name not in exact:
            value = 1 << (max(value, 1) - 1).bit_length()
        parts.append(f"{name}={int(value)}")
    return f"{op}({','.join(parts)})"


def apply(op: str, args: tuple, fields: dict):
    """The default settings for these arguments with `fields` in place of some. ValueError for what cannot work."""
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
    """The settings recorded for this GPU and these arguments, or None. What is refused is said once.

    `cache` is what $SPARC_KERNELS_CACHE holds: another folder, another answer.
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
    """key -> (settings, file) of everything recorded for a GPU, the user's over what is shipped."""
    found = {}
    for folder in (SHIPPED, cache_dir()):
        path = folder / f"{slug(name)}.json"
        for where, entry in read(path).items():
            if isinstance(entry, dict) and "settings" in entry:
                found[where] = entry["settings"], path
            else:
                _ignore(path, f"{where}: expected an object with settings, got {entry!r}")
    return found


def read(path: Path) -> dict:
    """The entries of one file; {} where there is none or, with a warning, where it cannot be understood."""
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
    """Add entries to the user's file of a GPU, in one step: readers see the old file or the new one."""
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
    """Files are read again at the next launch."""
    table.cache_clear()
    recorded.cache_clear()


@contextmanager
def observed(op: str):
    """Within it the arguments are collected, as keys of the dict it gives, for which launches of `op` want settings."""
    _seen[op] = {}
    try:
        yield _seen[op]
    finally:
        del _seen[op]


@contextmanager
def trial(op: str, fields: dict):
    """Within it every launch of `op` uses these settings. ValueError at the launch where they cannot work."""
    _trial[op] = fields
    try:
        yield
    finally:
        del _trial[op]
