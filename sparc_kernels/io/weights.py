"""Weights of a model: safetensors and the official format, written and read."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.validation import check_bool, check_device, check_int, fail, missing, require, temporary_of
from ..nn.module import AlignedSAE
from .atomic import read_json, reason_of, write_atomically, write_json
from .blocks import in_step
from .run_checkpoints import CHECKPOINTS, FOLDER, MAGIC, TRAILER, load_checkpoint, load_latest
from .streamed_weights import mapped_weights, stream_weights

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
OFFICIAL, OFFICIAL_CONFIG = "msae_checkpoint.pth", "run_config.json"
MODEL_KEYS = (
    "d_streams", "n_latents", "k", "auxk", "auxk_threshold", "dead_steps_threshold", "topk_type", "count_in_eval",
)  # fmt: skip
SETTINGS = (*MODEL_KEYS, "normalize")  # saved beside weights in every format


def model_config(model: AlignedSAE) -> dict:
    """Return the arguments that build the model again, by name."""
    return {key: getattr(model, key) for key in MODEL_KEYS}


def save_weights(model: AlignedSAE, path: str | Path, normalize: bool = True, step: int | None = None) -> None:
    """Save weights as safetensors with the model's configuration in the metadata, all that `load_model` needs.

    Args:
        model: the model to save. Every rank of a sharded one calls this, and rank 0 writes the whole model.
        path: file ending in .safetensors.
        normalize: whether the model was trained on rows divided by their norm.
        step: of the training run; `load_model` of its folder prefers a later checkpoint.

    Raises:
        ValueError: another suffix, or a bad argument.
        ImportError: safetensors is missing (the extra `train`).
    """
    path = Path(path)
    require(path.suffix.lower() == ".safetensors", "path", "a file ending in .safetensors", repr(path.name))
    save = import_save(path)
    config = model_config(model) | {"normalize": check_bool("normalize", normalize)}
    config |= {} if step is None else {"step": check_int("step", step, 0)}
    if _is_divided(model):
        stream_weights(model, path, config)
        return
    state = _cpu_state(model)
    # one entry, since safetensors writes several in varying order
    content = save(state, metadata={"sparc_kernels": json.dumps(config | {"sha256": _digest(config, state)})})
    write_atomically(path, lambda file: file.write(content))


def import_save(path: Path):
    """Import safetensors' `save`.

    Args:
        path: of the file to save, for the message.

    Raises:
        ImportError: safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing(f"{path}, a safetensors file,", "safetensors") from error
    return save


def _is_divided(model: AlignedSAE) -> bool:
    """Whether several ranks hold the model, of which rank 0 writes the files."""
    return model.ranks is not None and model.ranks.size > 1


def _cpu_state(model: AlignedSAE) -> dict[str, torch.Tensor]:
    """state_dict on the CPU, contiguous; shared memory is copied, since safetensors rejects it."""
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        state[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return state


def _digest(config: dict, state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of settings and weights, the weights in the order of their names."""
    digest = hashlib.sha256(json.dumps(config).encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_official(
    model: AlignedSAE, folder: str | Path, settings: Mapping[str, object] | None = None, normalize: bool = True
) -> Path:
    """Write `msae_checkpoint.pth` and `run_config.json`, as the official code reads them.

    Args:
        model: the model to export. Every rank of a sharded one calls this, and rank 0 writes the whole model, by way of
            a temporary file of its weights.
        folder: where both files go; it must exist.
        settings: further entries of run_config.json's "args", such as batch_size, lr and seed.
        normalize: whether the model was trained on rows divided by their norm; the official code ignores this entry.

    Returns:
        Path of the checkpoint.
    """
    path = Path(folder) / OFFICIAL
    config = model_config(model) | {"use_sparse_decoder": False, "normalize": check_bool("normalize", normalize)}
    config |= dict(settings or {})
    config["auxk"] = config["auxk"] or 0  # the official parser takes numbers only

    def write(state: dict[str, torch.Tensor]) -> None:
        write_atomically(path, lambda file: torch.save(state, file))
        write_json(path.with_name(OFFICIAL_CONFIG), {"args": config, "config_file_content": {}})

    if not _is_divided(model):
        write(_cpu_state(model))
        return path
    whole, ranks = temporary_of(path.with_name(WEIGHTS)), model.ranks
    try:
        stream_weights(model, whole, {})
        in_step(ranks, lambda: write(mapped_weights(whole, model)) if ranks.rank == 0 else None)
    finally:
        whole.unlink(missing_ok=True)  # of another name on other ranks
    return path


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **known: object
) -> tuple[AlignedSAE, bool]:
    """Load a trained model.

    Args:
        path: a folder of a training run (final weights, or the newest undamaged checkpoint if it is of a later step, as
            in a resumed run), model.safetensors, a checkpoint of a run (a file, or a folder of several processes), or
            an official `msae_checkpoint.pth` with its settings in the run_config.json beside it.
        device: of the parameters.
        dtype: of the parameters; None: the narrowest that holds the file's without rounding.
        **known: k, topk_type, auxk, normalize, ...: settings that the file lacks, or that replace the file's.

    Returns:
        The model in eval mode, and whether it was trained on normalised rows (officially always).

    Raises:
        ValueError: missing settings or tensors, settings that do not fit the weights, or damage (by the digest of our
            files or the checksums of torch's); the message names the file.
        ImportError: a .safetensors file without safetensors.
    """
    for name in known:
        require(name in SETTINGS, name, f"a setting among {', '.join(SETTINGS)}", "an unknown name")
    path, state, config = read_weights(path)
    return model_of(path, state, config | {k: v for k, v in known.items() if v is not None}, device, dtype)


def read_weights(path: str | Path) -> tuple[Path, dict, dict]:
    """Read weights and settings without building a model.

    Args:
        path: as of `load_model`.

    Returns:
        The file chosen, its state_dict on the CPU, and the SETTINGS it has.

    Raises:
        ValueError: nothing there, damage, or another kind of file.
    """
    path = Path(path)
    require(path.exists(), f"model {path}", "a folder of a training run or a file of weights", "nothing there")
    run = path.is_dir() and path.suffix != FOLDER
    path, state, config = _read_folder(path) if run else (path, *_read_file(path))
    require(isinstance(config, dict), f"model {path}", "its settings as a JSON object", config)
    return path, state, {key: config[key] for key in SETTINGS if key in config}


def model_of(path: Path, state: dict, config: dict, device="cpu", dtype=None) -> tuple[AlignedSAE, bool]:
    """Build the model of weights and settings.

    Args:
        path: of the file, for messages.
        state: state_dict.
        config: SETTINGS; k and topk_type are required.
        device: of the parameters.
        dtype: of the parameters; None: the narrowest that holds the state's without rounding.

    Returns:
        The model in eval mode, and whether it was trained on normalised rows.

    Raises:
        ValueError: settings are missing or do not fit the weights.
    """
    device = check_device("device", device)
    shapes = _shapes(path, state)  # the order of streams comes from the configuration
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


def _read_folder(folder: Path) -> tuple[Path, Any, Any]:
    """The file of a folder to load, with its content: final weights, unless an undamaged checkpoint is later."""
    file, after = next((folder / name for name in (WEIGHTS, OFFICIAL) if (folder / name).exists()), None), -1.0
    if file is not None:
        state, config = _read_file(file)
        step = config.get("step") if isinstance(config, dict) else None
        after = step if isinstance(step, int) else math.inf  # without a step: treated as the latest
    try:
        latest = load_latest(folder / CHECKPOINTS, logger.warning, after, without=("optimizer",))
    except ValueError:
        if file is None:
            raise
        latest = None
    if latest is None:
        if file is None:
            fail(f"model {folder}", f"{WEIGHTS}, {CHECKPOINTS}/step-* or {OFFICIAL} in it", "none of them")
        return file, state, config
    path, saved = latest
    if file is not None:
        logger.warning(f"Note: {path} is loaded, since {file} is older, of step {after:,}")
    return path, saved.get("model"), saved.get("model_config")


def _read_file(path: Path) -> tuple[Any, Any]:
    """state_dict and settings as the file or folder has them, not yet checked."""
    if path.is_dir():
        checkpoint = load_checkpoint(path, without=("optimizer",))
        return checkpoint.get("model"), checkpoint.get("model_config")
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


def _read_torch(path: Path) -> tuple[Any, Any]:
    """state_dict and settings of a run's checkpoint or an official one."""
    with open(path, "rb") as file:
        ours = file.seek(0, os.SEEK_END) > TRAILER and file.seek(-TRAILER, os.SEEK_END) >= 0
        ours = ours and file.read(len(MAGIC)) == MAGIC
    if ours:
        checkpoint = load_checkpoint(path, without=("optimizer",))
        return checkpoint.get("model"), checkpoint.get("model_config")
    try:
        _check_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle or zipfile
        raise ValueError(f"model {path}: expected a torch file of tensors ({reason_of(error)})") from error
    beside = path.with_name(OFFICIAL_CONFIG)
    if not beside.exists():
        return state, {}
    args = read_json(beside).get("args", {})
    require(isinstance(args, dict), str(beside), "settings as a JSON object under 'args'", args)
    return state, args


def _check_checksums(path: Path) -> None:
    """Raise zipfile's error if a record of a torch file is damaged, which torch.load does not check."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0: saved without checksums
                    with archive.open(record) as file:
                        while file.read(1 << 20):
                            pass


def _shapes(path: Path, state) -> dict:
    """d_streams and n_latents of the weights."""
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
