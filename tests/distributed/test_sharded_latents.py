"""Latents divided among ranks, and replicas, compute what one process computes on all rows."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from ranks import together
from torch.distributed.device_mesh import init_device_mesh

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.distributed import ShardedSAE, shard_latents

pytestmark = [pytest.mark.subprocess, pytest.mark.slow]
WIDTHS = {"a": 10, "b": 6, "c": 7}
BLOCKED = ("encoders", "decoders", "latent_biases", "stats")


def build(widths=WIDTHS, N=26, k=3, auxk=4, dtype=torch.float64, seed=0, **settings) -> AlignedSAE:
    torch.manual_seed(seed)
    model = AlignedSAE(widths, N, k, auxk, dead_steps_threshold=3, dtype=dtype, **settings)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in [*model.pre_biases.values(), *model.latent_biases.values()]:
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype))
    return model


def batch(step: int, rows: int, widths=WIDTHS, dtype=torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 + step)
    return {s: torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype) for s, d in widths.items()}


def part(x: dict, ranks, rows: list[int]) -> dict:
    """The rows of this rank's replica, padded to the longest's."""
    first = sum(rows[: ranks.replica])
    B, own = max(rows), {s: v[first : first + rows[ranks.replica]] for s, v in x.items()}
    return {s: torch.cat([v, v.new_full((B - len(v), v.shape[1]), 0.0)]) for s, v in own.items()}


def mesh_of(replicas: int, shards: int):
    if replicas == 1:
        return init_device_mesh("cpu", (shards,))
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("data", "latents"))


def block_of(name: str, value: torch.Tensor, model) -> torch.Tensor:
    if not name.startswith(BLOCKED):
        return value
    start, stop = model.block
    return value[:, start:stop] if name.startswith("decoders") else value[start:stop]


def take_step(model, optimizer, x, fused: bool, rows=None, clip=False):
    more = {} if rows is None else {"rows": rows}
    if fused:
        return *model.training_step(x, optimizer, **more), None
    optimizer.zero_grad()
    outputs = model(x, **more)
    loss, metrics = model.compute_loss(outputs, x)
    loss.backward()
    optimizer.step()
    return loss.detach(), metrics, outputs


def same_training(replicas, shards, *, steps=50, fused=False, rows=None, reinit=True, tol=1e-12, clip=None, **settings):
    """Train one process and the ranks side by side; every metric, the counters and the weights agree."""
    dtype, widths = settings.get("dtype", torch.float64), settings.get("widths", WIDTHS)
    rows = rows or [8 // replicas] * replicas
    alone, model = build(**settings), build(**settings)
    sharded = shard_latents(model, mesh_of(replicas, shards))
    assert sharded is model and isinstance(model, ShardedSAE)
    optimizers = [SparcAdam(m, lr=1e-2, max_grad_norm=clip) for m in (alone, model)]
    rngs = [torch.Generator().manual_seed(5) for _ in range(2)]
    found = []
    for step in range(steps):
        x = batch(step, sum(rows), widths, dtype)
        own = part(x, model.ranks, rows)
        want, want_metrics, want_outputs = take_step(alone, optimizers[0], x, fused)
        got, got_metrics, outputs = take_step(model, optimizers[1], own, fused, rows)
        revived = None
        if reinit and step % 20 == 19:
            revived = [m.reinit_dead_(rng) for m, rng in zip((alone, model), rngs, strict=True)]
        found.append((want, got, want_metrics, got_metrics, want_outputs, outputs, revived))
        counters = {n: v.clone() for n, v in model.state_dict().items() if n.startswith("stats")}
        wanted = {n: block_of(n, v, model).clone() for n, v in alone.state_dict().items() if n.startswith("stats")}
        found[-1] += (counters, wanted)
    first, last = sum(rows[: model.ranks.replica]), sum(rows[: model.ranks.replica + 1])
    for step, (want, got, metrics, got_metrics, outputs, got_outputs, revived, counters, wanted) in enumerate(found):
        assert abs(got - want) <= tol * abs(want), (step, got, want)
        assert list(metrics) == list(got_metrics)
        for name, value in metrics.items():
            torch.testing.assert_close(got_metrics[name], value, rtol=100 * tol, atol=10 * tol, msg=f"{step} {name}")
        for name, value in wanted.items():
            assert counters[name].equal(value), (step, name)
        if revived is not None:
            assert revived[0] == revived[1], step
        if outputs is None:
            continue
        n = last - first
        assert got_outputs.indices[..., :n, :].equal(outputs.indices[..., first:last, :]), step
        for s in alone.streams:
            got, want = got_outputs[f"values_{s}"][:n], outputs[f"values_{s}"][first:last]
            assert got.equal(want) if step == 0 else torch.allclose(got, want, rtol=1e4 * tol, atol=1e3 * tol), (
                step,
                s,
            )
    names = [name for name, _ in alone.named_parameters()]
    pairs = [(n, model.state_dict()[n], v) for n, v in alone.state_dict().items()]
    for name, mine, his in zip(names, model.parameters(), alone.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            pairs.append((name, optimizers[1].state[mine][moment], optimizers[0].state[his][moment]))
    for name, got, want in pairs:
        error = (got.double() - block_of(name, want, model).double()).abs().max()
        assert error <= tol * want.double().abs().max(), (name, error)


def cases() -> dict:
    made = {}
    for (D, T), fused in itertools.product([(1, 4), (2, 2), (4, 1)], [False, True]):
        how = "training step" if fused else "two calls"
        made[f"{D} x {T}, {how}"] = functools.partial(same_training, D, T, fused=fused)
        made[f"{D} x {T}, {how}, local"] = functools.partial(
            same_training, D, T, fused=fused, topk_type="local", steps=25
        )
    return made


CASES = cases()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return together(tmp_path_factory.mktemp("four"), 4, CASES)


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_process_does(case, results):
    assert not results[case], "\n".join(results[case])
