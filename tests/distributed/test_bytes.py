"""The bytes that ranks send in a step, and hold in weights and moments, are those of the cost model, to the last."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import pytest
import torch
from ranks import together
from torch.distributed.device_mesh import init_device_mesh

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.distributed import count_bytes, shard_latents
from sparc_kernels.tools.cost.scaling import Mesh, collectives, memory
from sparc_kernels.tools.shape import Shape

pytestmark = [pytest.mark.subprocess, pytest.mark.slow, pytest.mark.long]  # test_sharded_latents.py runs some too
# rows, latents and widths that neither 2 nor 4 divide; fewer latents than k on a rank; one stream
SHAPES = {
    "uneven": Shape(10, 26, 3, (10, 6, 7), "float32", auxk=4),
    "small blocks": Shape(4, 9, 5, (6, 3), "float32", auxk=4),
    "one stream, autocast": Shape(12, 16, 2, (8,), "bfloat16", autocast=True),
}


def count(s: Shape, replicas: int, shards: int, direct: bool) -> None:
    """Count the bytes of the second step: the first one makes the optimizer's state."""
    torch.manual_seed(0)
    widths = {f"s{i}": d for i, d in enumerate(s.d_streams)}
    model = AlignedSAE(widths, s.N, s.k, s.auxk, dead_steps_threshold=1)
    mesh = (shards,) if replicas == 1 else (replicas, shards)
    names = ("latents",) if replicas == 1 else ("data", "latents")
    model = shard_latents(model, init_device_mesh("cpu", mesh, mesh_dim_names=names))
    optimizer = SparcAdam(model, lr=1e-3)
    x = {name: torch.randn(-(-s.B // replicas), d) for name, d in widths.items()}
    for _ in range(2):
        with count_bytes() as received, torch.autocast("cpu", torch.bfloat16, enabled=s.autocast):
            if direct:
                model.training_step(x, optimizer)
            else:
                optimizer.zero_grad()
                model.compute_loss(model(x), x)[0].backward()
                optimizer.step()
    wanted: Counter = Counter()
    for c in collectives(s, Mesh(replicas, shards), direct, model.ranks.shard):
        wanted[c.group, c.what] += c.sent
    assert {key: size for key, size in received.items() if size} == dict(wanted)
    if model.ranks.shard == 0:  # which has a largest block
        held, moments = memory(s, Mesh(replicas, shards), direct), [*optimizer.state.values()]
        assert sum(p.nbytes for p in model.parameters()) == held["weights"]
        assert sum(moment.nbytes for state in moments for moment in state.values() if moment.dim()) == held["moments"]


CASES = {
    f"{name}, {D} x {T}, {'training step' if direct else 'two calls'}": functools.partial(count, s, D, T, direct)
    for (name, s), (D, T), direct in itertools.product(SHAPES.items(), [(1, 4), (2, 2), (4, 1)], [True, False])
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return together(tmp_path_factory.mktemp("bytes"), 4, CASES)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_cost_model(case, results):
    assert not results[case], "\n".join(results[case])
