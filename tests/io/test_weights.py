"""Files of weights: what they keep of a model, and what is refused by name."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from damage import damaged
from safetensors.torch import load_file, save_file

from sparc_kernels import AlignedSAE
from sparc_kernels.io.run_checkpoints import checkpoints
from sparc_kernels.io.weights import OFFICIAL, SETTINGS, export_official, load_model, save_weights
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.trainer import Trainer

WIDTHS = {"b": 6, "a": 8}
# none is the default
CHANGED = {"d_streams": WIDTHS, "n_latents": 32, "k": 3, "auxk": 5, "auxk_threshold": 0.25, "dead_steps_threshold": 7,
           "topk_type": "local", "count_in_eval": True}  # fmt: skip


def model(seed=0, **changes) -> AlignedSAE:
    torch.manual_seed(seed)
    return AlignedSAE(**CHANGED | changes)


def same(one: AlignedSAE, other: AlignedSAE) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.fixture(scope="module", params=[True, False], ids=["normalised", "as-is"])
def run(request, tmp_path_factory):
    """A run in every format, of a model whose settings are not the defaults."""
    out = tmp_path_factory.mktemp("run")
    x = {s: torch.randn(40, d, generator=torch.Generator().manual_seed(1)) for s, d in WIDTHS.items()}
    settings = {name: value for name, value in CHANGED.items() if name not in ("d_streams", "count_in_eval")}
    config = TrainConfig(**settings, normalize=request.param, batch_size=20, epochs=1)
    trained = model()
    Trainer(config, x, out, model=trained, export=True, quiet=True).train()
    return out, trained, CHANGED | {"normalize": request.param}


@pytest.mark.parametrize("form", ["manifest", "folder", "checkpoint", "safetensors", "official"])
def test_every_setting_survives_in_every_format(run, form):
    out, trained, want = run
    official = inspect.signature(AlignedSAE).parameters
    assert {*official} - {"use_sparse_decoder", "impl", "device", "dtype"} == {*CHANGED}
    assert {*SETTINGS} == {*want} and all(official[name].default != value for name, value in CHANGED.items())
    if form == "manifest":
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["model"] | {"normalize": manifest["config"]["normalize"]} == want
        return
    path = {"folder": out, "checkpoint": checkpoints(out / "checkpoints")[-1], "official": out / OFFICIAL,
            "safetensors": out / "model.safetensors"}[form]  # fmt: skip
    again, normalize = load_model(path)
    got = {name: getattr(again, name) for name in CHANGED} | {"normalize": normalize}
    assert got == want and list(again.d_streams) == list(WIDTHS)
    assert same(again, trained)


def test_no_auxk_survives_in_every_format(tmp_path):
    save_weights(model(auxk=None), tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", export_official(model(auxk=None), tmp_path)):
        assert load_model(path)[0].auxk is None


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("form", ["safetensors", "official"])
def test_damaged_files_are_refused_by_name_or_read_right(tmp_path, form):
    """25 damages each. Nothing else may come up, whatever library finds the damage first."""
    whole, generator, refused = model(), np.random.default_rng(0), 0
    if form == "safetensors":
        path = tmp_path / "m.safetensors"
        save_weights(whole, path, normalize=False)
    else:
        path = export_official(whole, tmp_path, normalize=False)
    content = path.read_bytes()
    for number in range(25):
        path.write_bytes(damaged(content, generator))
        try:
            again, normalize = load_model(path)
        except ValueError as error:
            assert f"model {path}: " in str(error), (number, error)
            refused += 1
        else:
            assert same(again, whole) and not normalize, number
            assert {name: getattr(again, name) for name in CHANGED} == CHANGED, number
    assert refused > 15


def test_weights_without_checksums_load(tmp_path):
    """torch.save told not to take them; safetensors files from before there was a digest in them."""
    torch.serialization.set_crc32_options(False)
    try:
        path = export_official(model(), tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_model(path)[0], model())
    save_file({n: v.contiguous() for n, v in model().state_dict().items()}, path.with_name("m.safetensors"))
    assert same(load_model(path.with_name("m.safetensors"), k=3, topk_type="local")[0], model())


STRANGE = {
    "a list of settings": ({}, [1], "expected settings as a JSON object under 'args', got a list"),
    "no object": ({}, None, "run_config.json: expected a JSON object, got None"),
    "a k that is no number": ({}, {"k": "3"}, "k: expected an int in 1..32"),
    "a k that is too large": ({}, {"k": 33}, "k: expected an int in 1..32"),
    "a word for normalize": ({}, {"normalize": "false"}, "normalize: expected True or False"),
    "other widths": ({}, {"d_streams": {"a": 8}}, "expected d_streams {'a': 8}, got weights of d_streams"),
    "tensors by number": ({0: torch.ones(1)}, {}, "expected a dict of tensors"),
    "no latents": ({f"encoders.{s}.weight": torch.ones(0, d) for s, d in WIDTHS.items()}, {"n_latents": 0},
                   "n_latents: expected an int >= 1"),
    "whole numbers": ({f"{part}.a{end}": torch.ones(shape, dtype=torch.int64) for part, end, shape in (
        ("encoders", ".weight", (32, 8)), ("decoders", ".weight", (8, 32)), ("pre_biases", "", 8),
        ("latent_biases", "", 32))}, {}, "encoders.a.weight: expected a floating tensor"),
    "a stream too many": ({"pre_biases.c": torch.ones(3)}, {}, "Unexpected key(s) in state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_not_weights_or_settings_is_refused_by_name(tmp_path, what):
    tensors, settings, words = STRANGE[what]
    path = export_official(model(), tmp_path)
    torch.save(model().state_dict() | tensors, path)
    config = tmp_path / "run_config.json"
    if isinstance(settings, dict):
        settings = {"args": json.loads(config.read_text())["args"] | settings}
    elif settings is not None:
        settings = {"args": settings}
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_model(path)
    assert str(tmp_path) in str(error.value)


# ------------------------------------------------------------------------------------------------------------ arguments


def test_paths_may_be_text(tmp_path):
    save_weights(model(), f"{tmp_path}/m.safetensors")
    path = export_official(model(), str(tmp_path))
    assert same(load_model(f"{tmp_path}/m.safetensors")[0], model()) and same(load_model(str(path))[0], model())
    with pytest.raises(ValueError, match=r"path: expected a file ending in .safetensors, got 'm.bin'"):
        save_weights(model(), f"{tmp_path}/m.bin")


def test_unknown_settings_are_refused(tmp_path):
    path = export_official(model(), tmp_path)
    with pytest.raises(ValueError, match=r"topk_typ: expected a setting among d_streams, .*topk_type.*normalize"):
        load_model(path, topk_typ="local")
    again, normalize = load_model(path, k=2, topk_type="global", normalize=False)
    assert (again.k, again.topk_type, normalize) == (2, "global", False)


def test_a_file_of_two_dtypes_is_not_rounded(tmp_path):
    mixed = {
        name: (value.bfloat16() if name.startswith("encoders") else value).contiguous()
        for name, value in model().state_dict().items()
    }
    mixed["pre_biases.a"] = torch.linspace(0, 1, 8)
    save_file(mixed, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors", k=3, topk_type="local")[0]
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.equal(value, mixed[name].to(value.dtype)) for name, value in again.state_dict().items())
    narrow = {name: v.bfloat16() if v.is_floating_point() else v for name, v in mixed.items()}
    save_file(narrow, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors", k=3, topk_type="local")[0]
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_shared_parameters_are_saved_for_each_stream(tmp_path):
    tied = model(d_streams={"a": 8, "b": 8})
    for part in (tied.pre_biases, tied.latent_biases):
        part["b"] = part["a"]
    tied.encoders["b"].weight, tied.decoders["b"].weight = tied.encoders["a"].weight, tied.decoders["a"].weight
    save_weights(tied, tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", export_official(tied, tmp_path)):
        assert same(load_model(path)[0], tied)
    assert load_file(tmp_path / "m.safetensors").keys() == tied.state_dict().keys()
