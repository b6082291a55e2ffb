"""What training leaves on disk: checkpoints to resume from, final weights, and the official format.

A checkpoint is one torch file, written beside its final name, synced, then renamed, with a digest of itself at the end:
a file under a final name is complete or refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from operator import methodcaller
from pathlib import Path

import torch

from ._checks import check_bool, require
from .features import missing
from .module import AlignedSAE

WEIGHTS = "model.safetensors"
OFFICIAL, OFFICIAL_CONFIG = "msae_checkpoint.pth", "run_config.json"
CHECKPOINTS = "checkpoints"
SPACE = ".space"
KIND = "sparc_kernels training checkpoint"
_MAGIC = b"SPARC-SHA256:"
_TRAILER = len(_MAGIC) + 32
MODEL_KEYS = ("d_streams", "n_latents", "k", "auxk", "auxk_threshold", "dead_steps_threshold", "topk_type")


# ------------------------------------------------------------------------------------------------------- atomic writing


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], None]) -> None:
    """`write(file)` to a temporary file in the same folder, synced and renamed; nothing is left of it on failure."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write `state` (tensors, numbers, strings) as the checkpoint of `step`; then delete all earlier ones but the
    newest, so that `keep` stay. Later ones are damaged, or the run would have gone on from there."""

    def write(file):
        hashing = _Hashing(file)
        torch.save({"kind": KIND, "step": step, **state}, hashing)
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
        raise ValueError(f"checkpoint {path}: expected a torch file of tensors ({_first_line(error)})") from error
    ok = isinstance(state, dict) and state.get("kind") == KIND and isinstance(state.get("step"), int)
    require(ok, f"checkpoint {path}", "a training checkpoint of sparc_kernels", "something else")
    return state


def load_latest(folder: Path, tell: Callable[[str], None] = print) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, None when there is none at all.

    Raises: ValueError when there are checkpoints and all are damaged.
    """
    error = None
    for path in reversed(checkpoints(folder)):
        try:
            return path, load_checkpoint(path)
        except ValueError as damage:
            tell(f"Skipped: {damage}")
            error = damage
    if error is not None:
        raise error
    return None


# -------------------------------------------------------------------------------------------------------------- weights


def model_config(model: AlignedSAE) -> dict:
    """Arguments that build the model again."""
    return {key: getattr(model, key) for key in MODEL_KEYS}


def save_weights(model: AlignedSAE, path: Path, normalize: bool = True) -> None:
    """Weights as safetensors, with the model's configuration in the metadata: `load_model` needs no other file.

    normalize: whether it was trained on rows divided by their norm.
    """
    save, normalize = import_save(path), check_bool("normalize", normalize)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content = save(state, metadata={"sparc_kernels": json.dumps(model_config(model) | {"normalize": normalize})})
    write_atomically(path, lambda file: file.write(content))


def import_save(path: Path):
    """What makes the content of a safetensors file. Raises: ImportError that says what `path` needs."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing("safetensors", f"{path} is a safetensors file") from error
    return save


def export_official(model: AlignedSAE, folder: Path, settings: Mapping | None = None) -> Path:
    """`msae_checkpoint.pth` and the `run_config.json` that the official code reads beside it.

    Args:
        settings: further entries of run_config.json's "args", such as batch_size, lr and seed.
    """
    path = folder / OFFICIAL
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save(state, file))
    config = model_config(model) | {"use_sparse_decoder": False} | dict(settings or {})
    config["auxk"] = config["auxk"] or 0  # the official parser knows numbers only
    write_json(folder / OFFICIAL_CONFIG, {"args": config, "config_file_content": {}})
    return path


def load_model(path: str | Path, device="cpu", dtype=None, **known) -> tuple[AlignedSAE, bool]:
    """A trained model, in eval mode, and whether it was trained on normalised rows (officially always).

    Args:
        path: a folder that `train` wrote (final weights, else the newest checkpoint), model.safetensors, a checkpoint
            of ours, or an official `msae_checkpoint.pth`, whose settings come from the run_config.json beside it.
        known: n_latents, k, topk_type, auxk, ...: settings that the file does not say, or that replace what it says.

    Raises: ValueError that names the file and what is missing or wrong.
    """
    path = Path(path)
    require(path.exists(), f"model {path}", "a folder of a training run or a file of weights", "nothing there")
    if path.is_dir():
        path = _weights_in(path)
    state, config = (_read_safetensors if path.suffix == ".safetensors" else _read_torch)(path)
    require(isinstance(config, dict), f"model {path}", "its settings as a JSON object", config)
    config = {**config, **{key: value for key, value in known.items() if value is not None}}
    normalize = bool(config.get("normalize", True))
    shapes = _shapes(path, state)  # dicts compare equal in any order, and the configuration has the right one
    for key in ("k", "topk_type"):
        hint = f"{key}, which weights do not tell: give it, or put {OFFICIAL_CONFIG} beside the file"
        require(key in config, f"model {path}", hint, "neither")
    for key, value in shapes.items():
        got = config.get(key, value)
        require(got == value, f"model {path}", f"{key} {got}", f"weights of {key} {value}")
    config = shapes | {key: config[key] for key in MODEL_KEYS if key in config}
    floats = next(value.dtype for name, value in state.items() if name.startswith("encoders."))
    try:
        model = AlignedSAE(**config, device="meta", dtype=dtype or floats).to_empty(device=device)
        model.load_state_dict(state, strict=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"model {path}: {error}") from error
    return model.decoder_layout_("rows").eval(), normalize


def _weights_in(folder: Path) -> Path:
    """The file of a folder to load a model from."""
    for name in (WEIGHTS, OFFICIAL):
        if (folder / name).exists():
            return folder / name
    found = checkpoints(folder / CHECKPOINTS)
    require(bool(found), f"model {folder}", f"{WEIGHTS}, {CHECKPOINTS}/step-*.pt or {OFFICIAL} in it", "none of them")
    return found[-1]


def _read_safetensors(path: Path) -> tuple[dict, dict]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing("safetensors", f"{path} is a safetensors file") from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            config = json.loads((file.metadata() or {}).get("sparc_kernels", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"model {path}: expected a complete safetensors file ({error})") from error
    return state, config


def _read_torch(path: Path) -> tuple[dict, dict]:
    """state_dict and settings from a checkpoint of ours or an official one."""
    with open(path, "rb") as file:
        ours = file.seek(0, os.SEEK_END) > _TRAILER and file.seek(-_TRAILER, os.SEEK_END) >= 0
        ours = ours and file.read(len(_MAGIC)) == _MAGIC
    if ours:
        checkpoint = load_checkpoint(path)
        return checkpoint.get("model"), checkpoint.get("model_config")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zipfile and its own reader raise
        raise ValueError(f"model {path}: expected a torch file of tensors ({_first_line(error)})") from error
    beside = path.with_name(OFFICIAL_CONFIG)
    if not beside.exists():
        return state, {}
    args = read_json(beside).get("args", {})
    require(isinstance(args, dict), str(beside), "settings as a JSON object under 'args'", args)
    return state, args


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _shapes(path: Path, state) -> dict:
    """d_streams and n_latents, as the weights have them."""
    ok = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    require(ok, f"model {path}", "a dict of tensors", "something else")
    widths = {
        name.removeprefix("encoders.").removesuffix(".weight"): tuple(value.shape)
        for name, value in state.items()
        if name.startswith("encoders.") and name.endswith(".weight") and value.dim() == 2
    }
    require(bool(widths), f"model {path}", "weights of a SPARC model (encoders.NAME.weight ...)", "other tensors")
    latents = {n for n, _ in widths.values()}
    require(len(latents) == 1, f"model {path}", "as many latents in every stream", str(sorted(latents)))
    return {"d_streams": {s: d for s, (_, d) in widths.items()}, "n_latents": latents.pop()}
