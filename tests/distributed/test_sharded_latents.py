"""Latents divided among ranks, and replicas, compute what one process computes on all rows."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from ranks import together
from torch.distributed.device_mesh import init_device_mesh

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.distributed import ShardedSAE, shard_latents
from sparc_kernels.tools.trace import InsideOperators

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
        if reinit and step % 20 == 3:
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
    revivals = [sum(revived[0].values()) for *_, revived, _, _ in found if revived is not None]
    assert steps < 50 or (any(revivals) and len(revivals) > 2), "no dead latent was ever revived"
    names = [name for name, _ in alone.named_parameters()]
    pairs = [(n, model.state_dict()[n], v) for n, v in alone.state_dict().items()]
    for name, mine, his in zip(names, model.parameters(), alone.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            pairs.append((name, optimizers[1].state[mine][moment], optimizers[0].state[his][moment]))
    for name, got, want in pairs:
        error = (got.double() - block_of(name, want, model).double()).abs().max()
        assert error <= tol * want.double().abs().max(), (name, error)


def selections(model_of, x, replicas=1, shards=4) -> None:
    """One forward of each kind on a model that `model_of` makes: every output, loss and gradient."""
    fine = next(iter(x.values())).dtype == torch.float64
    tol = 1e-12 if fine else 1e-5
    for topk_type in ("global", "local"):
        alone, model = model_of(topk_type=topk_type), model_of(topk_type=topk_type)
        shard_latents(model, mesh_of(replicas, shards))
        want, got = alone(x), model(x)
        loss, metrics = alone.compute_loss(want, x)
        own_loss, own_metrics = model.compute_loss(got, x)
        loss.backward()
        own_loss.backward()
        assert set(want) == set(got)
        shown = {key: (got[key].detach(), want[key].detach()) for key in want}
        assert torch.allclose(own_loss, loss, rtol=tol, equal_nan=True), (own_loss, loss)
        for name, value in metrics.items():
            torch.testing.assert_close(own_metrics[name], value, rtol=100 * tol, atol=10 * tol, equal_nan=True)
        for key, (mine, his) in shown.items():
            if key.startswith(("indices", "shared", "mask", "values", "sparse", "avg")):
                assert mine.equal(his), (topk_type, key)
            elif not key.startswith(("auxk_indices", "auxk_values")):  # which latents are behind zeros is arbitrary
                torch.testing.assert_close(mine, his, rtol=10 * tol, atol=10 * tol, msg=f"{topk_type} {key}")
        for name, p in alone.named_parameters():
            mine, his = dict(model.named_parameters())[name].grad, block_of(name, p.grad, model)
            torch.testing.assert_close(mine, his, rtol=100 * tol, atol=tol, msg=lambda m, n=name: f"{n} {m}")
        for name, value in alone.named_buffers():
            assert dict(model.named_buffers())[name].equal(block_of(name, value, model))


def ties() -> None:
    """All latents alike: the first k win, all of them on the first shards."""

    def model_of(**settings):
        model = build(k=8, **settings)
        with torch.no_grad():
            for s in model.streams:
                model.encoders[s].weight.copy_(torch.ones_like(model.encoders[s].weight) / 4)
                model.latent_biases[s].fill_(0.5)
                model.pre_biases[s].zero_()
        return model

    x = {s: v.mul(4).round().div(4) for s, v in batch(0, 8).items()}
    alone = model_of()(x)
    assert alone.indices.equal(torch.arange(8).expand(8, 8))
    selections(model_of, x)


def ties_in_pairs() -> None:
    """Every latent has a twin on another shard."""

    def model_of(**settings):
        model = build(N=28, k=7, **settings)
        with torch.no_grad():
            for s in model.streams:  # short binary fractions: products are exact, in whatever order they are summed
                model.pre_biases[s].zero_()
                for p in (model.encoders[s].weight, model.latent_biases[s]):
                    p.mul_(16).round_().div_(16)
                    p[14:] = p[:14]
        return model

    selections(model_of, {s: v.mul(4).round().div(4) for s, v in batch(0, 8).items()})


def short_fractions(dtype: torch.dtype, replicas: int, shards: int) -> None:
    """Weights and inputs whose products are exact in float32: the same ids and bits, whatever library multiplies."""

    def model_of(**settings):
        model = build(N=101, k=7, dtype=dtype, **settings)
        with torch.no_grad():
            for s in model.streams:
                for p in (model.encoders[s].weight, model.pre_biases[s], model.latent_biases[s]):
                    p.copy_(p.mul(64).round().div(64))
        return model

    x = {s: v.mul(16).round().div(16) for s, v in batch(3, 16, dtype=dtype).items()}
    if replicas == 1:
        selections(model_of, x)
        return
    alone, model = model_of(), shard_latents(model_of(), mesh_of(replicas, shards))
    own = part(x, model.ranks, [16 // replicas] * replicas)
    want, got = alone(x), model(own)
    rows = slice(model.ranks.replica * 16 // replicas, (model.ranks.replica + 1) * 16 // replicas)
    assert got.indices.equal(want.indices[rows])
    assert all(got[f"values_{s}"].equal(want[f"values_{s}"][rows]) for s in x)
    for name, value in alone.named_buffers():
        assert dict(model.named_buffers())[name].equal(block_of(name, value, model))


class Reads(InsideOperators):
    """Fails where a step reads a value on the host, or makes a shape from values; collectives aside."""

    def dispatch(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        bad = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        masks = [i for arg in args if isinstance(arg, (list, tuple)) for i in arg if isinstance(i, torch.Tensor)]
        bad = bad or (name.startswith("index") and any(mask.dtype == torch.bool for mask in masks))
        assert not bad, f"{name} reads a value"
        return func(*args, **kwargs)


def no_waits(D, T, fused, topk_type) -> None:
    """The host waits for no value of a step on the kernels, with padding and AuxK."""
    small = dict(widths={"a": 6, "b": 5}, N=13, k=4, auxk=3, impl="triton")
    model = shard_latents(build(topk_type=topk_type, **small), mesh_of(D, T))
    optimizer = SparcAdam(model, impl="triton")
    x, rows = batch(0, 4, small["widths"]), [4] * (D - 1) + [3]
    take_step(model, optimizer, x, fused, rows)
    optimizer.zero_grad()
    with Reads():
        take_step(model, optimizer, x, fused, rows)


def preferred(latents: slice, k=5):
    """All winners among some latents."""

    def model_of(**settings):
        model = build(k=k, **settings)
        with torch.no_grad():
            for s in model.streams:
                model.latent_biases[s][latents] += 50
        return model

    selections(model_of, batch(0, 8))


def dead_on_one_shard(latents: slice, auxk=4) -> None:
    def model_of(**settings):
        model = build(auxk=auxk, **settings)
        for s in model.streams:
            getattr(model, f"stats_last_nonzero_{s}")[latents] = 100
        return model

    selections(model_of, batch(0, 8))


def special_rows() -> None:
    """NaN, infinities and rows of zeros keep their places in the order."""
    x = batch(0, 9)
    x["a"][1, 0] = float("nan")
    x["b"][2, 1] = float("inf")
    x["c"][3, 2] = float("-inf")
    for s in x:
        x[s][4] = 0
    alone, model = build(k=9), build(k=9)
    shard_latents(model, mesh_of(1, 4))
    want, got = alone(x), model(x)
    loss, own = alone.compute_loss(want, x)[0], model.compute_loss(got, x)[0]
    assert got.indices.equal(want.indices)
    for s in x:
        torch.testing.assert_close(got[f"values_{s}"], want[f"values_{s}"], rtol=0, atol=0, equal_nan=True)
    assert not loss.isfinite() and not own.isfinite()


def nan_row(fused: bool) -> None:
    """A row of one replica without a finite loss: no rank moves its weights, all of them count."""
    model = shard_latents(build(), mesh_of(2, 2))
    optimizer = SparcAdam(model, lr=1e-2)
    take_step(model, optimizer, part(batch(0, 8), model.ranks, [4, 4]), fused)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x = batch(1, 8)
    x["b"][6, 0] = float("nan")
    loss = lost = None
    if fused:
        loss, _ = model.training_step(part(x, model.ranks, [4, 4]), optimizer)
    else:
        optimizer.zero_grad()
        own = part(x, model.ranks, [4, 4])
        lost, _ = model.compute_loss(model(own), own)
        lost.backward()
        optimizer.found_inf = (~lost.detach().isfinite()).float()
        optimizer.step()
        del optimizer.found_inf
    for name, value in model.state_dict().items():
        assert value.equal(before[name]) != name.startswith("stats"), name
    assert not (loss if fused else lost).isfinite()


def padded(D, T, rows, fused) -> None:
    same_training(D, T, rows=rows, steps=4, fused=fused, reinit=False)


def same_bits(D, T, fused) -> None:
    """Two runs give the same bits, and replicas and ranks hold the same copies."""
    runs = []
    for _ in range(2):
        model = shard_latents(build(dtype=torch.float32), mesh_of(D, T))
        optimizer = SparcAdam(model, lr=1e-2)
        losses = []
        for step in range(3):
            x = part(batch(step, 8, dtype=torch.float32), model.ranks, [8 // D] * D)
            losses.append(take_step(model, optimizer, x, fused)[0])
        runs.append((torch.stack(losses), model.state_dict()))
    ranks = model.ranks
    losses = ranks.gather(runs[0][0], "test").flatten(0, 1)
    biases = ranks.gather(torch.cat([p.detach() for p in model.pre_biases.values()]), "test").flatten(0, 1)
    weights = None if ranks.data is None else ranks.data.gather(model.encoders["a"].weight.detach(), "test").wait()
    assert runs[0][0].equal(runs[1][0]) and all(v.equal(runs[1][1][n]) for n, v in runs[0][1].items())
    assert all(other.equal(losses[0]) for other in losses) and all(other.equal(biases[0]) for other in biases)
    assert weights is None or all(other.equal(weights[0]) for other in weights)


def half_precision(fused) -> None:
    """bf16 autocast: the same codes, a loss and weights within rounding of one process's."""
    alone, model = build(dtype=torch.float32), build(dtype=torch.float32)
    shard_latents(model, mesh_of(2, 2))
    pairs = []
    for m in (alone, model):
        shadow = torch.bfloat16 if fused else None
        optimizer = SparcAdam(m, lr=1e-2, shadow=shadow)
        for step in range(4):
            x = batch(step, 8, dtype=torch.float32)
            x = x if m is alone else part(x, m.ranks, [4, 4])
            with torch.autocast("cpu", torch.bfloat16):
                if fused:
                    loss, _ = m.training_step(x, optimizer)
                    continue
                optimizer.zero_grad()
                loss, _ = m.compute_loss(m(x), x)
            loss.backward()
            optimizer.step()
        pairs.append((loss.detach(), m.state_dict()))
    (want, his), (got, mine) = pairs
    assert abs(got - want) <= 2e-2 * want
    for name, value in his.items():
        if not name.startswith("stats"):  # a step of Adam is up to lr, whatever the gradient
            torch.testing.assert_close(mine[name], block_of(name, value, model), rtol=0, atol=2e-2)


def moments_are_divided() -> None:
    """A model that was trained by one process goes on among ranks."""
    alone, model = build(), build()
    optimizers = [SparcAdam(m, lr=1e-2) for m in (alone, model)]
    for step in range(3):
        for m, o in zip((alone, model), optimizers, strict=True):
            m.training_step(batch(step, 8), o)
    shard_latents(model, mesh_of(1, 4), optimizers[1])
    for step in range(3, 6):
        for m, o in zip((alone, model), optimizers, strict=True):
            m.training_step(batch(step, 8), o)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], block_of(name, value, model), rtol=1e-12, atol=1e-12)


def refusals() -> None:
    rank, errors = torch.distributed.get_rank(), []

    def refused(call, *texts):
        try:
            call()
            errors.append("nothing")
        except (ValueError, RuntimeError) as error:
            errors.append(None if all(text in str(error) for text in texts) else str(error))

    refused(lambda: shard_latents(build(N=3, auxk=None), mesh_of(1, 4)), "mesh", "at most 3")
    refused(lambda: shard_latents(build(seed=int(rank == 2)), mesh_of(1, 4)), "rank 2: encoders.a.weight", "rank 0")
    refused(lambda: shard_latents(build(k=3 + (rank == 3)), mesh_of(1, 4)), "rank 3: model", "k=3", "k=4")
    turned = build()
    if rank == 1:  # the same numbers in other places
        turned.decoders["a"].weight.data = turned.decoders["a"].weight.data.flip(1)
    refused(lambda: shard_latents(turned, mesh_of(1, 4)), "rank 1: decoders.a.weight")
    refused(lambda: shard_latents(build(), init_device_mesh("cpu", (2, 2))), "mesh", "latents")
    refused(lambda: shard_latents(build(dtype=torch.float16), mesh_of(1, 4)), "float16")
    model, x = shard_latents(build(), mesh_of(2, 2)), batch(0, 4)
    refused(lambda: shard_latents(model, mesh_of(2, 2)), "model")
    refused(lambda: model(x, rows=[4]), "rows", "2 replicas")
    refused(lambda: model(x, rows=[4, 5]), "rows")
    refused(lambda: model(x, rows=[0, 0]), "rows", "at least one")
    halves = {s: v.float() for s, v in x.items()}
    single = shard_latents(build(dtype=torch.float32), mesh_of(2, 2))
    with torch.autocast("cpu", torch.float16):
        refused(lambda: single(halves), "autocast", "float16")
        refused(lambda: single.training_step(halves, SparcAdam(single)), "autocast", "float16")
    refused(lambda: model({s: v.requires_grad_() for s, v in batch(0, 4).items()}), "inputs['a']", "gradient")
    loss, _ = model.compute_loss(model(x), x)
    loss.backward(retain_graph=True)
    refused(loss.backward, "loss", "second")
    assert not any(errors), errors


def benchmark() -> None:
    """`python -m benchmarks ranks` verifies, times and counts."""
    from benchmarks import ranks

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ranks.json")
        shape = ["--shape", "8,64,4,8/6,2,fp32", "--repeats", "2", "--auxk", "2"]
        code = ranks.main([*shape, "--tensor-parallel", "2", "--json", str(file)])
        leads = torch.distributed.get_rank() == 0
        record = json.loads(file.read_text()) if leads else None
    assert code == 0
    if record is not None:
        names = [row["what"] for row in record["rows"]]
        assert names == [f"{what}, {where}" for where in ("one rank alone", "2 x 2 ranks") for what in ranks.STEPS]
        received = [sum(row["received"].values()) for row in record["rows"]]
        assert received[:2] == [0, 0] and min(received[2:]) > 0 and record["rows"][3]["ms"] > 0


def cases() -> dict:
    made: dict = {}
    partial = functools.partial
    for (D, T), fused in itertools.product([(1, 4), (2, 2), (4, 1)], [False, True]):
        how = f"{D} x {T}, {'training step' if fused else 'two calls'}"
        made[how] = partial(same_training, D, T, fused=fused, steps=5)
        made[f"{how}, local"] = partial(same_training, D, T, fused=fused, topk_type="local", steps=5)
        made[f"{how}, same bits"] = partial(same_bits, D, T, fused)
    made["clipped"] = partial(same_training, 2, 2, clip=0.05, steps=5)
    made["one stream"] = partial(same_training, 2, 2, widths={"a": 10}, steps=5)
    made["eight streams"] = partial(same_training, 2, 2, widths={f"s{i}": 3 + i for i in range(8)}, steps=4)
    made["no AuxK"] = partial(same_training, 2, 2, auxk=None, steps=5)
    made["k = N"] = partial(same_training, 1, 4, N=6, k=6, auxk=6, steps=5)
    made["one latent a shard"] = partial(same_training, 1, 4, N=4, k=2, auxk=3, steps=5, topk_type="local")
    made["more shards than k"] = partial(same_training, 1, 4, k=1, auxk=1, steps=5)
    for dtype, (D, T) in itertools.product((torch.float32, torch.float64), ((1, 4), (2, 2))):
        made[f"short fractions, {dtype}, {D} x {T}"] = partial(short_fractions, dtype, D, T)
    made["ties across shards"], made["ties in pairs"] = ties, ties_in_pairs
    made["all winners on the last shard"] = partial(preferred, slice(20, 26))
    made["a shard without winners"] = partial(preferred, slice(0, 14), 7)
    made["dead latents on one shard"] = partial(dead_on_one_shard, slice(7, 14))
    made["one dead latent"] = partial(dead_on_one_shard, slice(25, 26))
    made["all latents dead"] = partial(dead_on_one_shard, slice(0, 26), 26)
    made["special rows"] = special_rows
    for fused in (False, True):
        how = "training step" if fused else "two calls"
        made[f"7 rows on 2 replicas, {how}"] = partial(padded, 2, 2, [4, 3], fused)
        made[f"an empty last part, {how}"] = partial(padded, 4, 1, [2, 2, 1, 0], fused)
        made[f"7 rows of 4 shards, {how}"] = partial(padded, 1, 4, [7], fused)
        made[f"fewer rows than shards, {how}"] = partial(padded, 1, 4, [2], fused)
        made[f"NaN on one replica, {how}"] = partial(nan_row, fused)
        made[f"bf16, {how}"] = partial(half_precision, fused)
        small = dict(widths={"a": 6, "b": 5}, N=13, k=4, auxk=3, impl="triton", reinit=False, steps=2)
        made[f"kernels, {how}"] = partial(same_training, 2, 2, fused=fused, **small)
        made[f"no waits, {how}"] = partial(no_waits, 2, 2, fused, "global")
        made[f"no waits, local, {how}"] = partial(no_waits, 1, 4, fused, "local")
        made[f"kernels, local, {how}"] = partial(same_training, 1, 4, fused=fused, topk_type="local", **small)
    made["benchmark"] = benchmark
    made["moments"], made["refusals"] = moments_are_divided, refusals
    return made


LONG = (
    "kernels",
    "4 x 1, two calls, local",
    "1 x 4, two calls, same",
    "4 x 1, two calls, same",
    "eight",
    "no waits, local",
)
CASES = {name: case for name, case in cases().items() if not name.startswith(LONG)}
FIFTY_STEPS = {
    f"{D} x {T}, {'training step' if fused else 'two calls'}, {topk_type}": functools.partial(
        same_training, D, T, fused=fused, topk_type=topk_type
    )
    for (D, T), fused, topk_type in itertools.product([(1, 4), (2, 2), (4, 1)], [False, True], ["global", "local"])
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return together(tmp_path_factory.mktemp("four"), 4, CASES)


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_process_does(case, results):
    assert not results[case], "\n".join(results[case])


@pytest.mark.long
def test_fifty_steps_of_every_kind_and_the_kernels(tmp_path):
    wrong = together(tmp_path, 4, FIFTY_STEPS | {n: case for n, case in cases().items() if n not in CASES})
    assert not any(wrong.values()), {name: texts for name, texts in wrong.items() if texts}
