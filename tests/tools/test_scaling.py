"""The cost model of several GPUs: bytes by hand, one GPU as before, order of stages, tables, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from scripts import write_scaling

from sparc_kernels.cli import main
from sparc_kernels.tools.cost import GPUS, gpus, ours, scaling
from sparc_kernels.tools.cost.scaling import Collective, Mesh, collectives, memory, times
from sparc_kernels.tools.shape import Shape

H200 = GPUS["H200"]
TINY = Shape(8, 16, 2, (4, 2))
# sent before another one of their kind, for which the program waits
UNAWAITED = {"send keys", "send keys dead"}
LARGE = Shape(4096, 2**20, 64, (1024, 768, 768), autocast=True)


def sent(s: Shape, mesh: Mesh, direct: bool = True) -> dict[str, float]:
    return {c.name: c.sent for c in collectives(s, mesh, direct)}


def test_bytes_by_hand():
    """2 replicas of 4 rows, 2 shards of 8 latents, S 2, bf16: one other rank in each group."""
    latents = {
        "keys": 4 * 2 * 2, "ids": 4 * 2 * 4,
        # 2 rows stay with each rank, of both sources, in fp32; then the errors of 2 rows in bf16
        "reconstructions 0": 2 * 2 * 4 * 4, "errors 0": 2 * 2 * 4 * 2,
        "reconstructions 1": 2 * 2 * 2 * 4, "errors 1": 2 * 2 * 2 * 2,
        "loss": 4 * (4 + 2 + 6), "pre-biases": 4 * 6,
    }  # fmt: skip
    data = {
        "fired": 2 * 8, "errors 0 of all": 2 * 4 * 4 * 2, "errors 1 of all": 2 * 4 * 2 * 2, "inputs": 4 * 6 * 2,
        # ids once, values and their gradients of both sources
        "codes": 4 * 2 * 4 + 2 * 4 * 2 * 4, "gradients of the values": 2 * 4 * 2 * 4, "coefficients": 4 * 4 * 4,
        "loss of all": 2 * 4 * (4 + 2 + 6), "biases": 4 * 6,
    }  # fmt: skip
    assert sent(TINY, Mesh(2, 2)) == latents | data
    assert sent(TINY, Mesh(1, 1)) == {}
    assert set(sent(TINY, Mesh(1, 4))) == set(latents) and set(sent(TINY, Mesh(4, 1))) == set(data)
    # two calls: the values of all ranks, and both matrices, pre-biases and latent biases, half each way
    two = sent(TINY, Mesh(2, 2), direct=False)
    assert two["values"] == 2 * 4 * 2 * 4
    assert two["gradients exchanged"] == two["gradients summed"] == (2 * 8 * 6 + 6 + 2 * 8) * 2 / 2
    assert not {"inputs", "errors 0 of all"} & set(two)
    auxiliary = sent(replace(TINY, auxk=2, dead=4), Mesh(2, 2))
    more = {
        "keys dead": 2 * 4 * 2 * 2, "ids dead": 2 * 4 * 2 * 4, "auxk reconstructions 0": 2 * 4 * 4,
        "auxk reconstructions 1": 2 * 2 * 4, "auxk errors 0": 2 * 4 * 2, "auxk errors 1": 2 * 2 * 2,
        "auxk coefficients": 2 * 2 * 4, "auxk errors 0 of all": 4 * 4 * 2, "auxk errors 1 of all": 4 * 2 * 2,
        "codes dead": 2 * 4 * 2 * 8, "auxk": 2 * 4 * 2 * 4 + 2 * 4 * 4,
        "loss": 4 * (4 + 2 + 6 + 2 + 6), "loss of all": 2 * 4 * (4 + 2 + 6 + 2 + 6),
    }  # fmt: skip
    assert auxiliary == latents | data | more


def test_uneven_blocks_are_padded():
    """9 rows on 2 replicas, 5 latents on 3 shards with k 3: blocks of 5 rows and 2 latents, 2 rows to each rank."""
    s, mesh = Shape(9, 5, 3, (4,)), Mesh(2, 3)
    own = scaling.block(s, mesh)
    assert (own.B, own.N, own.k) == (5, 2, 2)
    made = sent(s, mesh)
    assert made["ids"] == 2 * 5 * 2 * 4 and made["reconstructions 0"] == 2 * 2 * 4 * 4
    assert [c.sent for shard in range(3) for c in collectives(s, mesh, shard=shard) if c.what == "fired"] == [2, 2, 1]


def test_links():
    """8 a node: shards inside, replicas outside; a ring leaves the node once, an all-to-all for each rank beyond."""
    gather = Collective("", "", "all-gather", "latents", 8, 10)
    assert gather.by_link(Mesh(8, 8)) == (70, 0)
    assert replace(gather, group="data").by_link(Mesh(8, 8)) == (0, 70)
    assert replace(gather, group="data").by_link(Mesh(8, 4)) == (35, 35)
    wide = Collective("", "", "all-to-all", "latents", 32, 10)
    assert wide.by_link(Mesh(1, 32)) == (70, 240)
    inside, outside = gather.seconds(H200, Mesh(8, 8)), replace(gather, group="data").seconds(H200, Mesh(8, 8))
    assert inside == pytest.approx(1e-6 * (gpus.COLLECTIVE_US + 7 * gpus.LINK_STEP_US) + 70 / 0.8 / 450e9)
    assert outside == pytest.approx(1e-6 * (gpus.COLLECTIVE_US + 7 * gpus.NETWORK_STEP_US) + 70 / 0.8 / 50e9)


def test_memory_by_hand():
    """N 2^20, D 2,560: 2 N D weights and biases, 4 bytes and twice that for moments, 2 for the copies."""
    parameters = 2 * 2**20 * 2560 + 3 * 2**20 + 2560
    for mesh, share in ((Mesh(1, 1), 1), (Mesh(1, 8), 8)):
        held = memory(LARGE, mesh)
        assert held["weights"] == pytest.approx(4 * parameters / share, rel=1e-5)
        assert held["moments"] == 2 * held["weights"]
        assert held["half-precision copies"] == 2 * 2 * 2**20 * 2560 / share
        assert held["gradients"] == 0 and memory(LARGE, mesh, direct=False)["gradients"] == held["weights"]
    assert sum(memory(LARGE, Mesh(8, 1)).values()) > 6 * sum(memory(LARGE, Mesh(1, 8)).values())
    assert not scaling.fits(LARGE, Mesh(1, 1), GPUS["A100"]) and scaling.fits(LARGE, Mesh(1, 8), GPUS["A100"])


@pytest.mark.parametrize("direct", [True, False], ids=["fused", "two calls"])
@pytest.mark.parametrize("s", [LARGE, replace(LARGE, auxk=64, dead=2**16)], ids=["plain", "AuxK"])
def test_times(s, direct):
    alone = times(s, Mesh(1, 1), H200, direct)
    assert alone.communication == alone.exposed == 0
    assert not direct or alone.compute == ours.step(s, direct=True).seconds(H200)
    for mesh in (Mesh(8, 1), Mesh(1, 8), Mesh(2, 4), Mesh(8, 8), Mesh(1, 64)):
        made = times(s, mesh, H200, direct)
        assert made.communication == pytest.approx(sum(c.seconds(H200, mesh) for c in collectives(s, mesh, direct)))
        hidden = made.communication - made.exposed
        # gradients are summed with nothing beside
        some = sum(c.seconds(H200, mesh) for c in collectives(s, mesh, direct) if c.what != "gradients")
        assert made.exposed > 0 and (hidden > 0.01 * some if mesh.shards > 1 else hidden > -1e-12)
        assert made.step == pytest.approx(max(made.compute + made.exposed, made.host))
        assert alone.compute / mesh.size < made.compute < alone.compute
    # what every stage waits for exists, and every collective has its place
    names = {c.name for c in collectives(s, Mesh(2, 4), direct)}
    stages = list(scaling._program(s, Mesh(2, 4), direct))
    assert {stage.name for stage in stages if stage.collective} == {f"send {name}" for name in names}
    places = {stage.name: i for i, stage in enumerate(stages)}
    assert len(places) == len(stages)
    assert all(places[other] < i for i, stage in enumerate(stages) for other in stage.after if other in places)
    waited = {other for stage in stages for other in stage.after}
    assert waited <= set(places) and {stage.name for stage in stages if stage.collective} - waited <= UNAWAITED
    assert set(scaling._computed(s, Mesh(2, 4), direct)) <= {stage.name for stage in stages if stage.parts}


def test_the_best_mesh():
    assert scaling.best(LARGE, scaling.meshes(8), H200) == (Mesh(1, 8), True)
    mesh, direct = scaling.best(replace(LARGE, B=2**16, N=2**14), scaling.meshes(8), H200)
    assert mesh.shards < 8 and not direct, "rows are divided where weights are few, and gradients are fewer than rows"
    assert scaling.best(LARGE, scaling.meshes(1), GPUS["RTX4090"]) is None
    assert scaling.meshes(6) == [Mesh(6, 1), Mesh(3, 2), Mesh(2, 3), Mesh(1, 6)]


def test_the_tables_and_their_json(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    shape = ["--shape", "4096,1048576,64,1024/768/768,3"]
    assert main(["cost", *shape, "--gpus", "1,8", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("modelled, nothing measured: a training step on H200, 8 a node")
    assert "with float32 parameters" in text and text.count("\n| 1,048,576 |") == 2 and "| 1 x 8 |" in text
    one, eight = json.loads(out.read_text())["scaling"]
    assert one["modelled"] and one["gpus"] == 1 and eight["shards"] == 8 and one["step_ms"] > 5 * eight["step_ms"]
    assert main(["cost", *shape, "--gpus", "8", "--tensor-parallel", "4", "--auxk", "64", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    for word in (
        "AuxK 64",
        "| 2 x 4 |",
        "| moments |",
        "| auxk reconstructions 2 | all-to-all | latents |",
        "By ",
    ):
        assert word in text
    assert main(["cost", *shape, "--gpus", "1", "--gpu", "RTX4090"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main(["cost", "--gpus", "8", "--tensor-parallel", "3"]) == 2
    assert "--tensor-parallel: expected a divisor of --gpus 8, got 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cost", "--gpus", "0"])


def test_the_document_has_the_tables_that_the_command_prints():
    """`python tests/scripts/write_scaling.py` writes them."""
    text = write_scaling.DOCUMENT.read_text("utf-8")
    assert len(write_scaling.MARKED.findall(text)) == text.count(": begin -->") == text.count("<!-- end -->") == 6
    assert write_scaling.written(text) == text
