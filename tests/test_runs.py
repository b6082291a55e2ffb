"""Whose the files of a run's folder are, what may go on from them, and what is settled before the first step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from sparc_kernels import AlignedSAE
from sparc_kernels.checkpoint import (
    checkpoints,
    export_official,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from sparc_kernels.run_folder import read_manifest
from sparc_kernels.train import Trainer
from sparc_kernels.train_config import TrainConfig

ROWS, WIDTHS = 128, {"a": 12, "b": 8}
SMALL = dict(n_latents=24, k=3, auxk=4, batch_size=32, epochs=3, lr=3e-3, dead_steps_threshold=5, reinit_every=5)
STEPS = 12


def streams() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {s: torch.randn(ROWS, d, generator=g) for s, d in WIDTHS.items()}


def trainer(out: Path | None = None, data=None, model=None, **options) -> Trainer:
    """Options of TrainConfig and of Trainer, mixed."""
    names = TrainConfig.__dataclass_fields__
    config = TrainConfig(**(SMALL | {key: options.pop(key) for key in list(options) if key in names}))
    return Trainer(config, data or streams(), out, model=model, **{"device": "cpu", "quiet": True} | options)


def model_of(**changes) -> AlignedSAE:
    torch.manual_seed(1)
    names = ("n_latents", "k", "auxk", "dead_steps_threshold")
    return AlignedSAE(**{"d_streams": WIDTHS} | {name: SMALL[name] for name in names} | changes)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A run with checkpoints after 4, 8 and 12 steps."""
    out = tmp_path_factory.mktemp("runs") / "ended"
    trainer(out, checkpoint_every=4, keep=9).train()
    return out


@pytest.fixture
def copy(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def forget_ids(out: Path) -> None:
    """The folder as it was left before runs had ids."""
    manifest = read_manifest(out / "manifest.json")
    for key in ("run", "optimizer", "init"):
        del manifest[key]
    (out / "manifest.json").write_text(json.dumps(manifest))
    for path in checkpoints(out / "checkpoints"):
        state = load_checkpoint(path)
        del state["run"], state["loss"]
        rewrite(path, state)


def rewrite(path: Path, state: dict) -> None:
    save_checkpoint(path.parent, int(path.stem.split("-")[1]), state, keep=99)


def files(folder: Path) -> list[str]:
    """Feature files as arguments of the command."""
    for s, x in streams().items():
        np.save(folder / f"{s}.npy", x.numpy())
    return [f"--stream={s}={folder / s}.npy" for s in WIDTHS]


def command(out: Path, *more: str) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return ["train", f"--out={out}", "--device=cpu", *flags, *more]


# ------------------------------------------------------------------------------------------------------------ damage


def test_a_configuration_that_is_no_object_is_named(tmp_path):
    path = export_official(model_of(), tmp_path)
    for content, words in (("[1, 2]", "expected a JSON object, got a list"), ("{", "expected a JSON file"),
                           ('{"args": [1]}', "expected settings as a JSON object .*, got a list")):  # fmt: skip
        (tmp_path / "run_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"run_config.json: {words}"):
            load_model(path)
    for k in ('"x"', "25"):
        (tmp_path / "run_config.json").write_text(f'{{"args": {{"k": {k}, "topk_type": "local"}}}}')
        with pytest.raises(ValueError, match=rf"model {path}: k: expected an int in 1\.\.24"):
            load_model(path)
    weights = tmp_path / "model.safetensors"
    for said, words in (("[1]", "expected its settings as a JSON object, got a list"), ("{", "expected a complete")):
        weights.write_bytes(save(model_of().decoder_layout_("contiguous").state_dict(), {"sparc_kernels": said}))
        with pytest.raises(ValueError, match=f"model {weights}: {words}"):
            load_model(weights)
