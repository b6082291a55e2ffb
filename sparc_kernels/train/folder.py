"""The folder of a training run: ownership of its files, its manifest, and what may be resumed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

from ..core.console import size_text
from ..core.validation import fail, require
from ..io.atomic import read_json, write_json
from ..io.run_checkpoints import CHECKPOINTS, SPACE, checkpoints, reserve
from ..io.shards import stream_label
from ..io.weights import OFFICIAL, OFFICIAL_CONFIG, WEIGHTS
from .config import TrainConfig
from .log import LOG
from .process import LOCK, only_one_run

MANIFEST = "manifest.json"
TIME = "%Y-%m-%dT%H:%M:%S%z"
EXTENSIBLE = ("epochs", "max_steps")  # settings that may change when a run is resumed
_DIGEST = "sha256"  # of the rest of the manifest; absent in manifests without a run id
_STREAM: dict[str, type | tuple[type, ...]] = {
    "path": (str, list, type(None)),
    "rows": int,
    "width": int,
    "dtype": str,
    "fingerprint": str,
}
_OURS = "|".join(map(re.escape, (MANIFEST, LOG, WEIGHTS, OFFICIAL, OFFICIAL_CONFIG, SPACE)))
_REMAINS = re.compile(rf"({_OURS}|step-\d{{9}}\.pt)(\.\d+\.tmp)+|step-\d{{9}}\.dcp(\.old)?\.tmp")


class RunFolder:
    """The folder of a run; nothing is written there before `claim`.

    Args:
        path: the folder, which may be missing.
        resume: resume the run in it.
        official: the official files will be written too.

    Attributes:
        manifest: of the run to resume; None: the run is new.
        run: id of the run.

    Raises:
        ValueError: another process is writing there, there is a run without `resume`, a new run would overwrite files
            without a manifest or official files of other origin, or the manifest is damaged.
    """

    def __init__(self, path: Path, resume: bool, official: bool):
        self.path = path
        with _writing_to(path):
            require(path.is_dir() or not path.exists(), "out", "a folder", f"{path}, a file")
            existing = next(part for part in (path, *path.parents) if part.exists() or part.is_symlink())
            if not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(existing))
            if not os.access(existing, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write there", str(existing))
            if (path / LOCK).exists():
                with only_one_run(path):
                    pass
        self._seen = self._contents()
        self.manifest: dict | None = None
        self.run: str | None = None
        if (path / MANIFEST).exists():
            require(resume, "out", "a folder without a run, or resume", f"{path}, which holds one")
            self.manifest = read_manifest(path / MANIFEST)
            for name in (OFFICIAL, OFFICIAL_CONFIG) if official and not self.manifest.get("export", True) else ():
                got = f"{path / name}, which this run has not written; move it away"
                require(not (path / name).exists(), "export", f"a folder without {name}", got)
            return
        taken = [path / name for name in (LOG, WEIGHTS, *((OFFICIAL, OFFICIAL_CONFIG) if official else ()))]
        taken += checkpoints(path / CHECKPOINTS) or [path / CHECKPOINTS] * (path / CHECKPOINTS).is_file()
        for file in taken:
            if file.exists():
                fail("out", f"a new folder, or the {MANIFEST} of the run that wrote {file.name}", f"{file} without one")

    def _contents(self):
        path = self.path / MANIFEST
        return path.exists() and path.read_bytes(), checkpoints(self.path / CHECKPOINTS)

    def claim(self, closing: ExitStack, size: int, step: int) -> None:
        """Make and lock the folder, delete temporary files of a killed run, check for space, write the manifest.

        Args:
            closing: holds the lock until it is closed.
            size: bytes that must be available.
            step: from which a run is resumed; recorded in the manifest if the run is extended.

        Raises:
            ValueError: the folder cannot be written, is locked or has changed, or has too little space.
            OSError: writing the manifest failed.
        """
        with _writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            closing.enter_context(only_one_run(self.path))
        same = self._contents() == self._seen
        require(same, "out", "the folder as the Trainer found it", f"{self.path}, where another run has been since")
        for path in [*self.path.glob("*.tmp"), *(self.path / CHECKPOINTS).glob("*.tmp")]:
            if _REMAINS.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            reserve(self.path, size)
        except OSError as error:
            needed = f"space for a checkpoint and the weights ({size / 1e6:,.1f} MB)"
            raise ValueError(f"out: expected {needed} in {self.path}, got: {error.strerror}") from error
        manifest, config = self.manifest, self._now["config"]
        if manifest is None:
            manifest = {"run": self.run} | self._now
        elif self._now["export"]:
            manifest = manifest | {"export": True}
        if self.manifest is not None and self._grown(config):
            entry = {"after_step": step} | {name: config[name] for name in EXTENSIBLE} | {"at": time.strftime(TIME)}
            extended = [*manifest.get("extended", []), entry]
            manifest = manifest | {"config": manifest["config"] | config, "extended": extended}
        if manifest != self.manifest:
            write_json(self.path / MANIFEST, manifest | {_DIGEST: _digest(manifest)})

    # ------------------------------------------------------------------------------------------------ the run to resume

    @property
    def _had(self) -> dict:
        """The manifest of the run to resume."""
        assert self.manifest is not None, "a new run has none"
        return self.manifest

    def check_settings(self, settings: dict) -> None:
        """Check that settings other than EXTENSIBLE are the run's.

        Args:
            settings: fields of a `TrainConfig`.

        Raises:
            ValueError: a setting differs.
        """
        before = asdict(TrainConfig()) | self._had["config"]  # defaults for settings newer than the run
        for field, value in settings.items():
            if field not in EXTENSIBLE:
                had = before[field]
                show = size_text if field == "memory" and isinstance(had, int) else repr
                require(had == value, field, f"{show(had)} as in {self.path / MANIFEST}", show(value))

    def check_data(self, data: dict) -> None:
        """Check that the data are the run's.

        Args:
            data: {"train": ..., "validation": ...}, each as of `Features.describe`.

        Raises:
            ValueError: streams, shards, rows, widths, dtypes or fingerprints differ.
        """
        before = self._had["data"]
        for part in sorted({*before, *data}):
            had, now = before.get(part, {}), data.get(part, {})
            require(list(had) == list(now), f"{part} streams", f"{', '.join(had) or 'none'} as when the run began",
                    ", ".join(now) or "none")  # fmt: skip
            for s in had:
                what = f"{part} {stream_label(s, now[s]['path'])}"
                files = zip_longest(had[s].get("shards", ()), now[s].get("shards", ()))
                for i, (old, new) in enumerate(files):
                    require(old == new, what, f"{old or 'no file'} as shard {i} when the run began", new or "no file")
                for key in [key for key in _STREAM if key != "path"]:  # files may have moved
                    require(had[s][key] == now[s][key], what, f"{key} {had[s][key]} as when the run began",
                            f"{key} {now[s][key]}")  # fmt: skip

    def check_run(self, now: dict, per_epoch: int, tell) -> bool:
        """Check that the run can be resumed.

        Args:
            now: the manifest of a new run with the current arguments.
            per_epoch: batches of an epoch.
            tell: called with messages about differences.

        Returns:
            Whether there is a run to resume.

        Raises:
            ValueError: another model, optimizer or initial weights, or fewer steps than before.
        """
        self._now, had, self.run = now, self.manifest, uuid.uuid4().hex
        if had is None:
            return False
        self.run = had.get("run")  # None: the manifest is older than run ids
        self._steps = self._check_steps(TrainConfig(**now["config"]), per_epoch, tell)
        _check_model(self.path / MANIFEST, had["model"], now["model"])
        optimizer, init = had.get("optimizer", now["optimizer"]), had.get("init", now["init"])
        require(optimizer == now["optimizer"], "optimizer", f"{optimizer} as when the run began", now["optimizer"])
        same = now["init"] in (init, None)
        require(same, "init", f"{init or 'none'} as when the run began", str(now["init"]))
        self._tell_differences(tell)
        return True

    def check_checkpoint(self, path: Path, state: dict) -> None:
        """Check that a checkpoint is one of the run that `check_run` has found.

        Args:
            path: the file or folder.
            state: of it.

        Raises:
            ValueError: it is of another run or model, or of a later step than the run has.
        """
        ours, step, now = state.get("run") == self.run, state["step"], self._now
        require(ours, f"checkpoint {path}", f"one of the run that {MANIFEST} describes", "one of another run")
        _check_model(path, state.get("model_config"), now["model"] | {"normalize": now["config"]["normalize"]})
        expected = f"one of the run's {self._steps:,} steps"
        require(step <= self._steps, f"checkpoint {path}", expected, f"step {step:,}")

    def starts_again(self, tell) -> None:
        """Check that a run without a checkpoint can start from its beginning.

        Args:
            tell: called with a note about it.

        Raises:
            ValueError: it has ended, or began with other weights than now.
        """
        weights, init = self.path / WEIGHTS, self._had.get("init")
        require(not weights.exists(), "resume", "a checkpoint to go on from", f"{weights} alone, of an ended run")
        given = self._now["init"] is not None or init is None
        require(given, "init", f"{init} as when the run began, for it has no checkpoint", "none")
        tell(f"Note: no checkpoint in {self.path}, the run starts again")

    def _grown(self, config: dict) -> bool:
        return any(self._had["config"].get(name) != config[name] for name in EXTENSIBLE)

    def _check_steps(self, config: TrainConfig, per_epoch: int, tell) -> int:
        """Check that the run has no fewer steps than before; report if it has more."""
        had = {name: self._had["config"].get(name) for name in EXTENSIBLE}
        before, steps = replace(config, **had).steps(per_epoch), config.steps(per_epoch)
        require(steps >= before, ", ".join(EXTENSIBLE), f"at least the {before:,} steps that the run had", f"{steps:,}")
        if steps > before:
            falls = "" if config.decay == "none" else "; the learning rate falls over all of them"
            tell(f"Note: the run had {before:,} steps and now has {steps:,}{falls}")
        return steps

    def _tell_differences(self, tell) -> None:
        """Report changes of threads, device and versions, which may change results by rounding."""
        had, now = self._had, self._now
        pairs = [(key, had.get(key), now[key]) for key in ("device", "threads")]
        pairs += [(key, had["versions"].get(key), now["versions"][key]) for key in ("torch", "triton", "numpy")]
        changed = ", ".join(f"{key} {new} ({old} when the run began)" for key, old, new in pairs if new != old)
        if changed:
            tell(f"Note: {changed}; results may differ by rounding")


@contextmanager
def _writing_to(path: Path):
    try:
        yield
    except OSError as error:
        fail("out", "a folder to write to", f"{path} ({error.filename}: {error.strerror})")


def _check_model(path: Path, had: dict | None, now: dict) -> None:
    if not isinstance(had, dict):
        fail(str(path), "the settings of a model", "none")
    for key, value in now.items():
        before = had.get(key, value)
        require(before == value, f"model's {key}", f"{before!r} as in {path}", repr(value))


def read_manifest(path: Path) -> dict:
    """Read a run's manifest.

    Args:
        path: the file.

    Returns:
        Its content without the digest.

    Raises:
        ValueError: it is no manifest, or was damaged or edited.
    """
    manifest = read_json(path)
    digest = manifest.pop(_DIGEST, None)
    ok = digest == _digest(manifest) if digest is not None or "run" in manifest else True
    require(ok, str(path), "the manifest as the run wrote it", "a damaged or changed one")
    ok = all(isinstance(manifest.get(key), dict) for key in ("config", "model", "data", "versions"))
    ok = ok and isinstance(manifest.get("full_check"), bool) and isinstance(manifest["data"].get("train"), dict)
    ok = ok and all(isinstance(part, dict) for part in manifest["data"].values())
    lanes = manifest.get("lanes", 1)  # older manifests have none
    ok = ok and isinstance(lanes, int) and lanes > 0
    streams = [stream for part in manifest["data"].values() for stream in part.values()] if ok else []
    ok = ok and all(isinstance(stream, dict) for stream in streams)
    ok = ok and all(isinstance(stream.get(key), kind) for stream in streams for key, kind in _STREAM.items())
    require(ok, str(path), "the manifest of a training run", "another JSON file")
    return manifest


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
