"""What training leaves on disk: checkpoints to resume from, final weights, and the official format.

A checkpoint is one torch file, written beside its final name, synced, then renamed, with a digest of itself at the end:
a file under a final name is complete or refused.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from operator import methodcaller
from pathlib import Path

import torch

from ._checks import check_bool, check_device, check_int, first_line, missing, plain, require, temporary_of
from .module import AlignedSAE

WEIGHTS = "model.safetensors"
OFFICIAL, OFFICIAL_CONFIG = "msae_checkpoint.pth", "run_config.json"
CHECKPOINTS = "checkpoints"
SPACE = ".space"
KIND = "sparc_kernels training checkpoint"
_MAGIC = b"SPARC-SHA256:"
_TRAILER = len(_MAGIC) + 32
MODEL_KEYS = (
    "d_streams", "n_latents", "k", "auxk", "auxk_threshold", "dead_steps_threshold", "topk_type", "count_in_eval",
)  # fmt: skip
SETTINGS = (*MODEL_KEYS, "normalize")  # what is saved beside weights, in every format


# ------------------------------------------------------------------------------------------------------- atomic writing


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
        torch.save(plain({"kind": KIND, "step": step, **state}), hashing)
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
        raise ValueError(f"checkpoint {path}: expected a torch file of tensors ({_reason(error)})") from error
    ok = isinstance(state, dict) and state.get("kind") == KIND and isinstance(state.get("step"), int)
    require(ok, f"checkpoint {path}", "a training checkpoint of sparc_kernels", "something else")
    return state


def load_latest(folder: Path, tell: Callable[[str], None] = print, after: float = -1) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, None when there is none at all of a step later than `after`.

    Raises: ValueError when there are such checkpoints and all are damaged.
    """
    error = None
    for path in reversed([path for path in checkpoints(folder) if int(path.stem.removeprefix("step-")) > after]):
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


def save_weights(model: AlignedSAE, path: str | Path, normalize: bool = True, step: int | None = None) -> None:
    """Weights as safetensors, with the model's configuration in the metadata: `load_model` needs no other file.

    Args:
        path: ends in .safetensors.
        normalize: whether the model was trained on rows divided by their norm.
        step: of the run, which tells `load_model` of a run's folder whether a checkpoint is newer.
    """
    path = Path(path)
    require(path.suffix.lower() == ".safetensors", "path", "a file ending in .safetensors", repr(path.name))
    save, state = import_save(path), _cpu_state(model)
    config = model_config(model) | {"normalize": check_bool("normalize", normalize)}
    config |= {} if step is None else {"step": check_int("step", step, 0)}
    # one entry: safetensors writes several in an order that changes
    content = save(state, metadata={"sparc_kernels": json.dumps(config | {"sha256": _digest(config, state)})})
    write_atomically(path, lambda file: file.write(content))


def import_save(path: Path):
    """What makes the content of a safetensors file. Raises: ImportError that says what `path` needs."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing(f"{path}, a safetensors file,", "safetensors") from error
    return save


def _cpu_state(model: AlignedSAE) -> dict[str, torch.Tensor]:
    """state_dict on the CPU, contiguous; tensors that share memory as copies, which safetensors wants."""
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        state[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return state


def _digest(config: dict, state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of settings and weights, in whatever order a file has these."""
    digest = hashlib.sha256(json.dumps(config).encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def export_official(
    model: AlignedSAE, folder: str | Path, settings: Mapping[str, object] | None = None, normalize: bool = True
) -> Path:
    """`msae_checkpoint.pth` and the `run_config.json` that the official code reads beside it.

    Args:
        settings: further entries of run_config.json's "args", such as batch_size, lr and seed.
        normalize: whether the model was trained on rows divided by their norm; an entry that the official code ignores.
    """
    path, state = Path(folder) / OFFICIAL, _cpu_state(model)
    write_atomically(path, lambda file: torch.save(state, file))
    config = model_config(model) | {"use_sparse_decoder": False, "normalize": check_bool("normalize", normalize)}
    config |= dict(settings or {})
    config["auxk"] = config["auxk"] or 0  # the official parser knows numbers only
    write_json(path.with_name(OFFICIAL_CONFIG), {"args": config, "config_file_content": {}})
    return path


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **known: object
) -> tuple[AlignedSAE, bool]:
    """A trained model, in eval mode, and whether it was trained on normalised rows (officially always).

    Args:
        path: a folder that `train` wrote (final weights, or the newest whole checkpoint where it is of a later step,
            as in a run that goes on), model.safetensors, a checkpoint of ours, or an official `msae_checkpoint.pth`,
            whose settings come from the run_config.json beside it.
        dtype: of the parameters; None: the narrowest that holds all of the file's without rounding.
        known: k, topk_type, auxk, normalize, ...: settings that the file does not say, or that replace what it says.

    Raises: ValueError that names the file and what is missing or wrong: other tensors, damage (a digest in our files,
    the checksums of torch's), settings that do not fit.
    """
    for name in known:
        require(name in SETTINGS, name, f"a setting among {', '.join(SETTINGS)}", "an unknown name")
    path, state, config = read_weights(path)
    return model_of(path, state, config | {k: v for k, v in known.items() if v is not None}, device, dtype)


def read_weights(path: str | Path) -> tuple[Path, dict, dict]:
    """The file that `path` means, its state_dict on the CPU, and those of SETTINGS that it says."""
    path = Path(path)
    require(path.exists(), f"model {path}", "a folder of a training run or a file of weights", "nothing there")
    path, state, config = _read_folder(path) if path.is_dir() else (path, *_read_file(path))
    require(isinstance(config, dict), f"model {path}", "its settings as a JSON object", config)
    return path, state, {key: config[key] for key in SETTINGS if key in config}


def model_of(path: Path, state: dict, config: dict, device="cpu", dtype=None) -> tuple[AlignedSAE, bool]:
    """`load_model` of what `read_weights` returned, with these settings."""
    device = check_device("device", device)
    shapes = _shapes(path, state)  # dicts compare equal in any order, and the configuration has the right one
    lacking = [key for key in ("k", "topk_type") if key not in config]
    hint = f"{' and '.join(lacking)}, which weights do not tell: give them, or put {OFFICIAL_CONFIG} beside the file"
    require(not lacking, f"model {path}", hint, "neither")
    for key, value in shapes.items():
        got = config.get(key, value)
        require(got == value, f"model {path}", f"{key} {got}", f"weights of {key} {value}")
    normalize = config.get("normalize", True)
    try:
        check_bool("normalize", normalize)
        for name, value in state.items():
            floating = value.is_floating_point() or not _is_parameter(name)
            require(floating, name, "a floating tensor", value)
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, (v.dtype for n, v in state.items() if _is_parameter(n)))
        settings = shapes | {key: config[key] for key in MODEL_KEYS if key in config}
        model = AlignedSAE(**settings, device="meta", dtype=dtype).to_empty(device=device)
        model.load_state_dict(state, strict=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"model {path}: {error}") from error
    return model.decoder_layout_("rows").eval(), normalize


def _is_parameter(name: str) -> bool:
    return name.startswith(("encoders.", "decoders.", "pre_biases.", "latent_biases."))


def _read_folder(folder: Path) -> tuple[Path, dict, dict]:
    """The file to load a model from, with its content: final weights, unless a whole checkpoint is of a later step."""
    file, after = next((folder / name for name in (WEIGHTS, OFFICIAL) if (folder / name).exists()), None), -1
    if file is not None:
        state, config = _read_file(file)
        step = config.get("step") if isinstance(config, dict) else None
        after = step if isinstance(step, int) else math.inf  # files that do not say it are taken as the last
    try:
        found = load_latest(folder / CHECKPOINTS, _tell, after)
    except ValueError:
        if file is None:
            raise
        found = None
    if found is None:
        expected = f"{WEIGHTS}, {CHECKPOINTS}/step-*.pt or {OFFICIAL} in it"
        require(file is not None, f"model {folder}", expected, "none of them")
        return file, state, config
    path, saved = found
    if file is not None:
        _tell(f"Note: {path} is loaded, since {file} is older, of step {after:,}")
    return path, saved.get("model"), saved.get("model_config")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _read_file(path: Path) -> tuple[dict, dict]:
    return (_read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch)(path)


def _read_safetensors(path: Path) -> tuple[dict, dict]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing(f"{path}, a safetensors file,", "safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            config = json.loads((file.metadata() or {}).get("sparc_kernels", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model {path}: expected a complete safetensors file ({error})") from error
    digest = config.pop("sha256", None) if isinstance(config, dict) else None
    whole = digest is None or digest == _digest(config, state)
    require(whole, f"model {path}", "settings and weights of the digest in it", "others: the file is damaged or edited")
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
        _check_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zipfile and its own reader raise
        raise ValueError(f"model {path}: expected a torch file of tensors ({_reason(error)})") from error
    beside = path.with_name(OFFICIAL_CONFIG)
    if not beside.exists():
        return state, {}
    args = read_json(beside).get("args", {})
    require(isinstance(args, dict), str(beside), "settings as a JSON object under 'args'", args)
    return state, args


def _reason(error: Exception) -> str:
    """Without torch's advice to read the file unsafely."""
    return first_line(error).partition(". ")[0]


def _check_checksums(path: Path) -> None:
    """Raise zipfile's error where a record of a torch file is damaged; torch.load does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0: torch was told not to take them
                    with archive.open(record) as file:
                        while file.read(1 << 20):
                            pass


def _shapes(path: Path, state) -> dict:
    """d_streams and n_latents, as the weights have them."""
    ok = isinstance(state, dict) and all(isinstance(v, torch.Tensor) and isinstance(n, str) for n, v in state.items())
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
