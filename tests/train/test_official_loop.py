"""The Trainer and `evaluate` against the authors' training loop and evaluation, on the demo's data in float64.

official_loop.npz holds 209 steps of their `train_loop` for both selections, and what their notebook and retrieval made
of the result; record_official_loop.py made it and lists what is in it.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from sparc_kernels.evaluation.evaluate import evaluate, guessing, select_locally
from sparc_kernels.io.features import Features
from sparc_kernels.metrics import jaccard
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.trainer import Trainer

with np.load(Path(__file__).parents[1].joinpath("data", "official_loop.npz")) as file:
    FILE = {key: file[key] for key in file.files}
META = json.loads(str(FILE["meta"]))


def part(name: str) -> dict[str, torch.Tensor]:
    """The float16 features of a part."""
    return {key.split("/")[1]: torch.from_numpy(x) for key, x in FILE.items() if key.startswith(f"{name}/")}


def dense(codes) -> np.ndarray:
    return torch.zeros(len(codes.values), codes.n_latents).double().scatter(1, codes.indices, codes.values).numpy()


@functools.cache
def replayed(kind: str):
    """Our training on the same data with the same seed: the trainer, its losses, and rows reinitialised by step."""
    names = ("n_latents", "k", "auxk", "dead_steps_threshold", "batch_size", "epochs", "lr", "seed")
    config = TrainConfig(**{name: META[name] for name in names}, topk_type=kind, shuffle="official", precision="fp64")
    losses, dead = [], {}
    trainer = Trainer(config, part("train"), device="cpu", quiet=True)
    reinit = trainer.model.reinit_dead_
    trainer.model.reinit_dead_ = lambda generator: dead.update({trainer.step.updates: list(reinit(generator).values())})
    trainer.on_step = lambda step, loss, metrics: losses.append(loss.item())
    trainer.train()
    return trainer, np.array(losses), dead


@pytest.mark.parametrize("kind", ["global", "local"])
def test_two_hundred_steps_are_the_official_ones(kind):
    """The order of the data, the initial weights and the re-initialised rows come from the same draws."""
    _, losses, dead = replayed(kind)
    official = FILE[f"{kind}/loss"]
    assert len(losses) == len(official) > 200
    np.testing.assert_allclose(losses, official, rtol=1e-9)
    recorded = FILE[f"{kind}/dead"]
    assert recorded.sum() > 0
    for step, counts in dead.items():
        assert counts == recorded[step].tolist(), step
    assert sum(map(sum, dead.values())) == recorded.sum()


@pytest.mark.parametrize("kind", ["global", "local"])
def test_alignment_is_what_the_official_evaluation_says(kind):
    model = replayed(kind)[0].model
    labels = torch.from_numpy(FILE["labels"])
    with Features(part("test"), dtype=torch.float64) as features:
        scores, codes = evaluate(model, features, labels, probe=False)
        x = features.read(0, features.rows)
    outputs = select_locally(model)(x)
    official = FILE[f"{kind}/jaccard"]
    np.testing.assert_allclose(jaccard(codes["own"], labels).per_latent.numpy(), official, rtol=1e-12)
    assert scores["own"]["jaccard"] == pytest.approx(official.mean(), rel=1e-12) and official.mean() > 0.1
    alive = (FILE[f"{kind}/active"] > 0).sum(1)
    assert scores["own"]["all_dead"] == pytest.approx((alive == 0).mean())
    assert scores["own"]["mixed"] == pytest.approx(((alive > 0) & (alive < 3)).mean())
    for s, c in codes["own"].items():  # rows on which each latent fires
        fired = torch.bincount(c.indices[c.values > 0], minlength=META["n_latents"]).numpy()
        assert (fired == FILE[f"{kind}/active"][:, list(codes["own"]).index(s)]).all()
    kinds = {"latent": "latent", "cross": "cross_reconstruction", "self": "self_reconstruction"}
    for name in [key.split("/ranks/")[1] for key in FILE if key.startswith(f"{kind}/ranks/")]:
        ranks = FILE[f"{kind}/ranks/{name}"].astype(int)
        what, pair = name.split()
        target, source = pair.split("<-")
        if what == "latent":
            cosines = cosine_similarity(dense(codes["local"][source]), dense(codes["local"][target]))
        else:
            key = f"recon_{target}" if what == "self" else f"cross_recon_{target}_from_{source}"
            cosines = cosine_similarity(outputs[key].numpy(), x[target].numpy())
        # among targets tied with the right one, within float32's roundings, the official order is any, ours has it last
        own = np.diag(cosines)[:, None]
        best, worst = 1 + (cosines > own + 1e-6).sum(1), (cosines >= own - 1e-6).sum(1)
        untied = best == worst
        assert ((best <= ranks) & (ranks <= worst)).all() and untied.mean() > 0.5, name
        assert what == "latent" or untied.mean() > 0.97, name
        ranks = worst
        want = {f"R@{k}": (ranks <= k).mean() for k in (1, 5, 10)} | {"MRR": (1 / ranks).mean()}
        want["median_rank"] = np.sort(ranks)[(len(ranks) - 1) // 2]
        assert scores["retrieval"][kinds[what]][pair] == pytest.approx(want, abs=1e-9), name
    assert scores["chance"] == guessing(len(labels))
