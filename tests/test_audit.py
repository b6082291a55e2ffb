"""Kernels compiled ahead of time for GPUs that are not here, at the real shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def audit(*arguments, tmp_path):
    """In a process of its own: there TRITON_INTERPRET is unset."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    out = tmp_path / "audit.json"
    command = [sys.executable, "-m", "sparc_kernels", "audit", *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    return done, json.loads(out.read_text())["rows"] if out.exists() else []


def test_nothing_spills_and_everything_fits_on_sm80_sm90_sm100(tmp_path):
    done, rows = audit("--quick", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["arch"] for row in rows} == {80, 90, 100}
    kernels = {row["launch"]["kernel"].split(":")[1] for row in rows}
    assert kernels == {f"_{k}_kernel" for k in ("encode", "select", "gather", "latent_reduce", "latent_finish")}
    assert all(row["spill_bytes"] == 0 and row["registers"] > 0 for row in rows)
    for row in rows:
        kernel, arch = row["launch"]["kernel"], row["arch"]
        if kernel.endswith("_encode_kernel"):
            assert row["matrix"] == {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]
        if (
            row["shape"]["k"] > 1
            and row["shape"]["d"] % 8 == 0
            and kernel.endswith(("_encode_kernel", "_gather_kernel", "_latent_reduce_kernel"))
        ):
            assert row["load_bits"] == 128, row


def test_a_spilling_kernel_is_found(tmp_path):
    """The smallest fault there is: settings that need more registers than a thread has."""
    code = (
        "import sys; from sparc_kernels import _launch, encode, cli\n"
        "from sparc_kernels._launch import EncodeConfig\n"
        "encode.encode_config = lambda *a: EncodeConfig(128, 256, 32, 8, 4, 3)\n"
        "sys.exit(cli.main(['audit', '--shape', '4096,8192,64,1024,3,float32', '--arch', '80', '--workers', '1']))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1 and "FAULT: spills" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("shape", ["1,2,3", "4096,8192,64,0,3", "4096,8192,64,1024,9", "8,8,9,8,1", "8,64,8,8,1,int8"])
def test_bad_shapes_are_refused(shape, tmp_path):
    done, _ = audit("--shape", shape, tmp_path=tmp_path)
    assert done.returncode != 0 and "--shape: expected" in done.stderr
