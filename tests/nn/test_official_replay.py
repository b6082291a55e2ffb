"""AlignedSAE, step for step, against numbers recorded from the authors' own classes in fp64.

official_replay.npz holds seven runs of 14 optimizer steps; record_official_replay.py made it and lists what is in it.
Every recorded selection is clear of a tie by more than 1e-6, so indices are compared exactly.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CUDA
from torch import Tensor

from sparc_kernels import AlignedSAE


@dataclasses.dataclass(frozen=True)
class Run:
    impl: str
    steps: int = 14  # fewer leave out what comes after the last step
    through: tuple[int, ...] = tuple(range(14))  # steps that take `impl`; the others take the path of torch
    rtol: float = 1e-8  # of the largest magnitude in the official tensor; absolute where that is 0


with np.load(Path(__file__).parents[1].joinpath("data", "official_replay.npz")) as file:
    FILE = {key: file[key] for key in file.files}
META = json.loads(str(FILE["meta"]))
CONFIGS = {key.split("/")[0]: json.loads(str(FILE[key])) for key in FILE if key.endswith("/config")}
STREAMS = list(META["d_streams"])
WITH_AUXK = [case for case, config in CONFIGS.items() if config["auxk"]]


def arrays(prefix: str) -> dict[str, Tensor]:
    values = {key.removeprefix(prefix): FILE[key] for key in FILE if key.startswith(prefix)}
    return {key: torch.from_numpy(value) for key, value in values.items() if value.dtype.kind != "U"}


def build(case: str, impl: str) -> AlignedSAE:
    config = CONFIGS[case]
    model = AlignedSAE(
        META["d_streams"],
        META["n_latents"],
        config["k"],
        auxk=config["auxk"],
        auxk_threshold=META["auxk_threshold"],
        dead_steps_threshold=META["dead_steps_threshold"],
        topk_type=config["topk_type"],
        impl=impl,
        dtype=torch.float64,
    )
    model.load_state_dict(arrays(f"state/{config['start']}/"), strict=True)
    return model.train()


class Comparison:
    """Collects every departure from the record, so that a failure shows which came first."""

    def __init__(self, rtol: float):
        self.rtol, self.departures = rtol, []

    def fail(self, where: str, what: str):
        self.departures.append(f"{where}: {what}")

    def exact(self, where: str, ours: Tensor, official: Tensor):
        if ours.shape != official.shape or ours.dtype != official.dtype:
            what = f"{ours.dtype} {tuple(ours.shape)}, officially {official.dtype} {tuple(official.shape)}"
            self.fail(where, what)
        elif not torch.equal(ours, official):
            self.fail(where, f"{(ours != official).sum()} of {official.numel()} entries differ")

    def close(self, where: str, ours: Tensor | None, official: Tensor):
        if ours is None or ours.shape != official.shape:
            self.fail(where, f"{'missing' if ours is None else tuple(ours.shape)}, officially {tuple(official.shape)}")
            return
        scale = official.abs().max().item() or 1.0
        error = (ours.detach().double() - official).abs().max().item() / scale
        if not error <= self.rtol:
            self.fail(where, f"relative error {error:.2e} of magnitude {scale:.2e}")

    def outputs(self, where: str, ours, official: dict[str, Tensor], differentiable: list[str]):
        """Every official output; AuxK's indices only where the code is positive, for the rest of them is arbitrary."""
        for key, expected in official.items():
            if key not in ours:
                self.fail(f"{where} {key}", "missing")
            elif ours[key].requires_grad != (key in differentiable):
                self.fail(f"{where} {key}", f"requires_grad is {ours[key].requires_grad}")
            elif key.startswith("auxk_indices"):
                self.auxk(where, ours, official, key.removeprefix("auxk_indices_"))
            elif key.startswith("auxk_values"):
                pass  # compared together with its indices
            elif expected.is_floating_point():
                self.close(f"{where} {key}", ours[key], expected)
            else:
                self.exact(f"{where} {key}", ours[key], expected)

    def auxk(self, where: str, ours, official: dict[str, Tensor], s: str):
        key = f"auxk_indices_{s}"
        if f"auxk_values_{s}" in official:
            codes = torch.zeros_like(official[f"logits_{s}"])
            codes.scatter_(1, official[key], official[f"auxk_values_{s}"].relu())
        else:
            codes = official[f"auxk_sparse_codes_{s}"]
        indices = ours[key]
        if indices.shape != official[key].shape or indices.dtype != torch.int64:
            self.fail(f"{where} {key}", f"{indices.dtype} {tuple(indices.shape)}")
        elif not ((indices >= 0) & (indices < codes.shape[1])).all():
            self.fail(f"{where} {key}", "out of range")
        else:
            picked = codes.gather(1, indices)  # holding every positive code once each, or it cannot have this sum
            self.exact(f"{where} {key}, positive", (picked > 0).sum(1), (codes > 0).sum(1))
            self.close(f"{where} {key}, codes", picked.sum(1), codes.sum(1))
            if f"auxk_values_{s}" in official:
                self.close(f"{where} auxk_values_{s}", ours[f"auxk_values_{s}"].relu(), picked)


def gradients(model: AlignedSAE) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def reinitialise(model: AlignedSAE, rows: dict[str, Tensor], compare: Comparison):
    """Our re-initialisation, whose random rows then give way to the recorded ones."""
    dead = model.get_dead_neurons()
    before = {s: model.encoders[s].weight.detach().clone() for s in STREAMS}
    model.reinit_dead_(generator=torch.Generator().manual_seed(0))
    for s in STREAMS:
        weight = model.encoders[s].weight.data
        compare.exact(f"reinit {s}: rows changed", (weight != before[s]).any(1), dead[s])
        if not 0.005 < weight[dead[s]].std() < 0.02:
            compare.fail(f"reinit {s}", f"new rows have standard deviation {weight[dead[s]].std():.4f}, not near 0.01")
        weight[dead[s]] = rows[s]


def replay(case: str, run: Run) -> list[str]:
    """Train as the official loop does; returns the departures from the record, in the order in which they appear."""
    config, record, compare = CONFIGS[case], arrays(f"{case}/"), Comparison(run.rtol)
    inputs = arrays("inputs/")
    model = build(case, run.impl)
    optimizer = torch.optim.Adam(model.parameters(), lr=META["lr"], eps=1e-8)

    for step in range(run.steps):
        at = f"step {step}:"
        x = {s: inputs[s][step] for s in STREAMS}
        model.impl = run.impl if step in run.through else "torch"
        optimizer.zero_grad()
        outputs = model(x)
        loss, metrics = model.compute_loss(
            outputs, x, auxk_coef=config["auxk_coef"], cross_loss_coef=config["cross_loss_coef"]
        )
        for name, value in zip(config["metric_names"], record["metrics"][step], strict=True):
            compare.close(f"{at} metric {name}", loss if name == "loss" else metrics.get(name), value)
        for s in STREAMS:
            compare.exact(
                f"{at} counters {s}", getattr(model, f"stats_last_nonzero_{s}"), record[f"counters/{s}"][step]
            )

        detailed = config["steps"].index(step) if step in config["steps"] else None
        if detailed is not None:
            expected = {key: value[detailed] for key, value in arrays(f"{case}/out/").items()}
            compare.outputs(f"{at} output", outputs, expected, config["differentiable"])
        loss.backward()
        grads = gradients(model)
        model.unit_norm_decoder_()
        model.project_decoder_grad_()
        if detailed is not None:
            projected = gradients(model)
            for name in grads:
                official = record[f"grad/{name}"][detailed]
                compare.close(f"{at} gradient of {name}", grads[name], official)
                official = record.get(f"projected/{name}", record[f"grad/{name}"])[detailed]
                compare.close(f"{at} projected gradient of {name}", projected[name], official)
        optimizer.step()
        if step == config["reinit_after"]:
            reinitialise(model, arrays(f"{case}/reinit/"), compare)

    if run.steps == len(record["metrics"]):
        for key, value in model.state_dict().items():
            compare.close(f"after the run: {key}", value, record[f"final/{key}"])
        if config["subset"]:
            optimizer.zero_grad()
            subset(case, model, {s: inputs[s][0] for s in META["subset"]}, compare)
    return compare.departures


def subset(case: str, model: AlignedSAE, x: dict[str, Tensor], compare: Comparison):
    """A forward without one of the streams, and the gradient of the squares of all that it gives."""
    outputs, expected = model(x), arrays(f"{case}/subset_out/")
    differentiable = [key for key in CONFIGS[case]["differentiable"] if key in expected]
    compare.outputs("subset: output", outputs, expected, differentiable)
    for s in STREAMS:
        expected_counters = torch.from_numpy(FILE[f"{case}/subset_counters/{s}"])
        compare.exact(f"subset: counters {s}", getattr(model, f"stats_last_nonzero_{s}"), expected_counters)
    sum(outputs[key].square().sum() for key in differentiable).backward()
    expected = arrays(f"{case}/subset_grad/")
    for name, grad in gradients(model).items():
        if name in expected:
            compare.close(f"subset: gradient of {name}", grad, expected[name])
        elif grad is not None:
            compare.exact(f"subset: gradient of {name}", grad, torch.zeros_like(grad))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At these sizes a second thread only waits: on two busy cores it turned 3 s for this file into a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# float64 kernels exist in the interpreter only; AuxK finds dead latents in the last of these steps
KERNEL_RUNS = [] if CUDA else [("global_auxk", 4), ("local_auxk", 5)]
RUNS = [(case, Run("torch")) for case in CONFIGS]
RUNS += [(case, Run("triton", steps, (0, steps - 1))) for case, steps in KERNEL_RUNS]


@pytest.mark.parametrize(("case", "run"), RUNS, ids=lambda value: getattr(value, "impl", value))
def test_every_step_agrees_with_the_official_classes(case, run):
    departures = replay(case, run)
    first = "\n  ".join(departures[:20])
    assert not departures, f"{len(departures)} departures from the official run, first:\n  {first}"


@functools.cache
def first_step(case: str):
    """Our model, outputs, loss and metrics on the first recorded batch."""
    model, x = build(case, "torch"), {s: value[0] for s, value in arrays("inputs/").items()}
    outputs = model(x)
    return model, outputs, *model.compute_loss(outputs, x, cross_loss_coef=CONFIGS[case]["cross_loss_coef"])


@pytest.mark.parametrize("case", CONFIGS)
def test_official_keys_are_all_there(case):
    _, outputs, _, metrics = first_step(case)
    assert set(arrays(f"{case}/out/")) <= set(outputs)
    assert set(CONFIGS[case]["metric_names"]) - {"loss"} <= set(metrics)


@pytest.mark.parametrize("case", CONFIGS)
def test_metrics_are_detached_scalars_and_the_loss_is_not(case):
    _, _, loss, metrics = first_step(case)
    assert loss.requires_grad and loss.shape == ()
    for name, value in metrics.items():
        assert isinstance(value, Tensor) and value.shape == (), name
        assert not value.requires_grad and value.grad_fn is None, name


@pytest.mark.parametrize("case", CONFIGS)
def test_state_dict_is_the_official_one(case):
    official = arrays(f"state/{CONFIGS[case]['start']}/")
    ours = build(case, "torch").state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in official.items()}
    for key, value in official.items():
        assert torch.equal(ours[key], value), key


def test_the_record_shows_auxk_idle_partial_and_full():
    """Guards the record, not the model: a new recording must still contain what the replay is for."""
    assert META["smallest_gap"] > 1e-6
    for case in WITH_AUXK:
        dead = np.array(CONFIGS[case]["dead"])  # [step, stream], as AuxK sees them
        assert not dead[:2].any() and all(dead[n - 1].all() for name, n in KERNEL_RUNS if name == case), case
        assert ((dead > 0) & (dead < CONFIGS[case]["auxk"]))[:-1].any(), case
    for case in ("global_auxk", "local_auxk"):  # and AuxK has to choose
        assert np.max(CONFIGS[case]["positive_dead"]) > CONFIGS[case]["auxk"], case
