"""The traced step: launches, memory, no synchronisation. Kernels compiled ahead of time for GPUs that are not here."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import warm_process
from scripts import record_audit

pytest.importorskip("triton")
from sparc_kernels import cli
from sparc_kernels.nn import module
from sparc_kernels.tools.audit import Compiled, Shape, _name, _summary, _table, launches, reference_peak_bytes, trace

SMALL = Shape(256, 2048, 16, (64, 48), "bfloat16")
PAPER = Shape(4096, 65536, 64, (1024, 768, 768), "bfloat16")
ROOT = Path(__file__).resolve().parents[2]


def audit(*arguments, tmp_path):
    """In a process of its own: there TRITON_INTERPRET is unset."""
    out = tmp_path / "audit.json"
    done = warm_process.run("-m", "sparc_kernels", "audit", *arguments, "--json", out)
    return done, json.loads(out.read_text())["rows"] if out.exists() else []


def test_the_quick_audit_found_no_fault_in_these_kernels():
    record = json.loads(record_audit.RECORD.read_text())
    assert record["kernels"] > 800 and record["faults"] == 0
    assert record["digest"] == record_audit.digest(), (
        "kernels or launch settings changed: run python tests/scripts/record_audit.py"
    )


def test_the_digest_is_that_of_code(tmp_path):
    code = '@triton.jit\ndef _kernel(x, N):\n    if N:  # comment\n        """Text."""\n        y = x + 1\n\n\n'
    code += 'def f():\n    "g"\n'
    file = tmp_path / "file.py"

    def of(text, everything=False):
        file.write_text(text)
        return record_audit.code_of(file, everything)

    assert of(code) == "@triton.jit↵def_kernel(x,N):↵⇥ifN:↵⇥↵y=x+1↵⇤⇤"
    assert of(code.replace("comment", "other").replace("Text", "Words").replace("f()", "h()")) == of(code)
    assert of(code, True) != of(code.replace("f()", "h()"), True)
    for old, new in (("+ 1", "+ 2"), ("        y", "    y"), ("N:", "not N:")):
        assert of(code.replace(old, new)) != of(code)


@pytest.mark.compile
@pytest.mark.subprocess
@pytest.mark.slow
def test_nothing_spills_and_everything_fits(tmp_path):
    """The encoder's GEMM on every architecture, gathers on one; test_stand_in.py has every kernel once."""
    matrix = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma", 0x942: "mfma"}
    archs = [word for arch in ("80", "90", "100", "120", "gfx942") for word in ("--arch", arch)]
    shape = ("--shape", "4096,32768,64,768,1")
    rows = []
    for more in ((*archs, "--kernel", "^_encode"), ("--arch", "90", "--kernel", "^_gather")):
        done, some = audit(*shape, *more, tmp_path=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        rows += some
    assert {row["launch"]["kernel"].split(":")[1] for row in rows} == {"_encode_kernel", "_gather_kernel"}
    assert {row["arch"] for row in rows} == set(matrix)
    for row in rows:
        assert row["registers"] > 0 and row["spill_bytes"] == 0
        if row["launch"]["kernel"].endswith("_encode_kernel"):
            assert row["matrix"] == matrix[row["arch"]]
        assert row["load_bits"] >= 128, row


@pytest.mark.compile
@pytest.mark.subprocess
def test_a_spilling_kernel_is_found(tmp_path):
    """The smallest fault there is: settings that need more registers than a thread has."""
    code = (
        "import sys; from sparc_kernels import cli; from sparc_kernels.ops import selection\n"
        "from sparc_kernels.launch.select import EncodeConfig\n"
        "selection.encode_config = lambda *a: EncodeConfig(64, 256, 32, 8, 2, 2)\n"
        "sys.exit(cli.main('audit --shape 256,2048,16,64,1 --arch 80 --workers 1 --kernel _encode_k'.split()))"
    )
    done = warm_process.run("-c", code)
    assert done.returncode == 1 and "FAULT: spills" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("shape", ["1,2,3", "4096,8192,64,0,3", "4096,8192,64,1024,9", "8,8,9,8,1", "8,64,8,8,1,int8"])
def test_bad_shapes_are_refused(shape, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["audit", "--shape", shape])
    assert left.value.code == 2 and "--shape: expected" in capsys.readouterr().err


@pytest.mark.compile
@pytest.mark.subprocess
def test_kernels_are_picked_by_name(tmp_path):
    done, rows = audit("--shape", "8,8,4,8,1", "--arch", "sm_90", "--kernel", "^_centre", tmp_path=tmp_path)
    assert done.returncode == 0 and {r["launch"]["kernel"].split(":")[1] for r in rows} == {"_centre_kernel"}
    assert (
        re.search(rf"^centre +{len(rows)} ", done.stdout, re.MULTILINE) and done.stdout.count("\ncentre ") == 2
    )  # cost's
    done, _ = audit("--kernel", "(", tmp_path=tmp_path)
    assert done.returncode == 2 and "--kernel: expected a regular expression" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("topk_type", ["global", "local"])
@pytest.mark.parametrize("auxk", [False, True])
def test_a_step_never_waits_for_the_device(dtype, topk_type, auxk):
    """On meta tensors any reading of a value raises; what is returned has run to the end."""
    step = trace(Shape(256, 2048, 16, (64, 48), dtype), topk_type=topk_type, auxk=auxk, input_grads=True)
    assert {launch.kernel.split(":")[1] for launch in step.launches} >= {"_encode_kernel", "_select_kernel"}
    # nothing outlives the step but AuxK's masks of dead latents, which the module remembers for checkpointing
    assert step.live_bytes_at_end == (2 * 2048 if auxk else 0), step.largest


def test_an_audit_is_summarised():
    """A line for every kernel's name with the most of all its variants; every one of them in the table."""
    compiled = [Compiled(90, launch, SMALL, registers=i, spill_bytes=0) for i, launch in enumerate(launches(SMALL, 90))]
    names = {_name(r) for r in compiled}
    _, *lines = _summary(compiled).splitlines()
    assert [line.split()[0] for line in lines] == sorted(names) and len(names) < len(compiled)
    for line in lines:
        name, count, registers, *_ = line.split()
        mine = [r for r in compiled if _name(r) == name]
        assert (int(count), int(registers)) == (len(mine), mine[-1].registers)
    assert len(_table(compiled).splitlines()) == len(compiled) + 1


def plant(monkeypatch, fault):
    """Runs `fault` on the loss and the values of every compute_loss."""
    sound = module.AlignedSAE.compute_loss

    def faulty(self, outputs, *args):
        loss, metrics = sound(self, outputs, *args)
        kept = fault(loss, outputs["values_s0"])
        return loss if kept is None else loss + kept[(0,) * kept.dim()], metrics

    monkeypatch.setattr(module.AlignedSAE, "compute_loss", faulty)


@pytest.mark.parametrize(
    "fault",
    [
        lambda loss, values: loss.item() and None,
        lambda loss, values: bool(loss > 0) and None,
        lambda loss, values: values.cpu() and None,
        lambda loss, values: values[values > 0] and None,
        lambda loss, values: values.nonzero() and None,
        lambda loss, values: values[[0, 2]],  # the list is copied to the device
        lambda loss, values: values * torch.tensor([2.0], device=values.device),
        lambda loss, values: values * torch.ones(16).to(values.device),
    ],
    ids=["item", "bool", "cpu", "mask", "nonzero", "list", "tensor", "to"],
)
def test_a_planted_synchronisation_is_caught(fault, monkeypatch):
    trace(SMALL)
    plant(monkeypatch, fault)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|waits for it"):
        trace(SMALL)


def test_peak_memory_counts_what_lives_at_one_time(monkeypatch):
    honest = trace(SMALL)
    assert 0 < honest.kept_bytes < honest.peak_bytes
    assert honest.gradient_bytes == 2 * (2 * 2048 * (64 + 48) + 2 * 2048 + 64 + 48)
    size = 100 * 2**20
    plant(monkeypatch, lambda loss, values: values.new_zeros(size // 4, dtype=torch.float32))
    planted = trace(SMALL)
    assert planted.largest[0].bytes == size and planted.largest[0].shape == (size // 4,)
    assert size < planted.peak_bytes < size + honest.peak_bytes
    # one after the other is not together
    plant(monkeypatch, lambda loss, values: [values.new_zeros(size, dtype=torch.uint8) for _ in range(2)] and None)
    assert trace(SMALL).peak_bytes >= 2 * size
    plant(
        monkeypatch, lambda loss, values: [values.new_zeros(size, dtype=torch.uint8).sum() for _ in range(2)] and None
    )
    assert size <= trace(SMALL).peak_bytes < 3 * size


def test_reference_peak_is_that_of_dense_tensors():
    """Nothing dense fits below one [B, N]; codes of 3 streams, their pre-activations and a sort are well beyond."""
    dense = PAPER.B * PAPER.N * 2
    assert 10 * dense < reference_peak_bytes(PAPER) < 40 * dense
    assert reference_peak_bytes(PAPER, auxk=True) > reference_peak_bytes(PAPER)


def test_peak_memory_is_a_twentieth_of_the_reference():
    for dtype in ("bfloat16", "float32"):
        shape = dataclasses.replace(PAPER, dtype=dtype)
        for options in ({}, {"auxk": True}, {"topk_type": "local"}):
            assert 20 * trace(shape, **options).peak_bytes <= reference_peak_bytes(shape, **options), (dtype, options)


def test_launches_know_the_architecture_and_the_shape():
    listed = launches(PAPER, 90)
    assert len(listed) == len(set(listed))
    encode = [launch for launch in listed if launch.kernel.endswith(":_encode_kernel")]
    streams = {len(dict(launch.signature)["x_ptrs"]) for launch in encode}
    assert streams == {1, 3}  # AuxK and local, global
    assert {x.num_warps for x in launches(PAPER, 80)} and set(listed) != set(launches(PAPER, 80))
