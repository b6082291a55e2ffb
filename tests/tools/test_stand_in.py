"""Every launch passes through Triton's own JIT, on machines without a GPU too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from sparc_kernels.core._triton import INTERPRETED
from sparc_kernels.core.registry import OPERATORS
from sparc_kernels.nn.fused_step import fused_step  # noqa: F401  the last operators are registered there
from sparc_kernels.tools.shape import Shape
from sparc_kernels.tools.stand_in import stand_in
from sparc_kernels.tools.trace import launches, trace

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.compile, pytest.mark.subprocess, pytest.mark.slow]  # one process for all of them


@pytest.fixture(scope="module")
def seen():
    """What launch_everything.py says, in a process where TRITON_INTERPRET is unset."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "scripts" / "launch_everything.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_nothing_is_refused(seen):
    assert seen["refused"] == [] and seen["launches"] > 7000


def test_every_operator_and_every_kernel_is_launched(seen):
    kernels = {
        f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}:{name}"
        for path in (ROOT / "sparc_kernels").rglob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert seen["operators"] == sorted(OPERATORS)
    assert set(seen["kernels"]) == kernels
    assert set(seen["ended"]) == kernels  # and compiled to the end once
    assert seen["faults"] == []


def test_sizes_come_to_the_launches_that_they_are_there_for(seen):
    assert all(seen["ways"].values()), seen["ways"]


def test_what_is_compiled_ahead_of_time_is_what_the_jit_asks_for(seen):
    """Launch by launch, by the keys of Triton's cache; none that the recorder takes for another."""
    assert seen["differ"] == [] and seen["noted"] == seen["compiled"]


@pytest.mark.parametrize(
    "fault, message",
    [
        ("empty grid", "_fired_kernel: ValueError: grid: expected an int in 1..2147483647 for x, got 0"),
        ("high grid", "_fired_kernel: ValueError: grid: expected an int in 1..65535 for y, got 70000"),
        ("wide grid", "_fired_kernel: ValueError: grid: expected an int in 1..2147483647 for x, got 2147483648"),
        ("grid of floats", "_fired_kernel: ValueError: grid: expected an int in 1..2147483647 for x, got 2.0"),
        ("64 warps", "_fired_kernel: OutOfResources: out of resource: threads, Required: 2048, Hardware limit: 1024"),
        ("3 warps", "_fired_kernel: AssertionError: num_warps must be a power of 2"),
        ("unknown option", "_fired_kernel: KeyError: 'Keyword argument num_wraps was specified but unrecognised'"),
        ("missing argument", "_fired_kernel: TypeError: dynamic_func() missing 1 required positional argument: 'N'"),
        ("numpy number", "_fired_kernel: TypeError: failed to specialize argument of type: "),
        ("list", "_fired_kernel: TypeError: failed to specialize argument of type: list"),
        ("complex tensor", "_fired_kernel: KeyError: 'complex64'"),
        (
            "tensor on the host",
            "_fired_kernel: ValueError: values_ptr: expected a tensor on the device, got one on cpu",
        ),
        ("float indices", "invalid operands of type pointer<int64> and triton.language.float32"),
        ("shared memory", "_encode_kernel: OutOfResources: out of resource: shared memory, Required: 294912, Hardware"),
    ],
)
def test_a_planted_fault_is_refused(seen, fault, message):
    assert message in seen["said"][fault]


def test_it_leaves_nothing_behind(seen):
    assert seen["left"] == []


def test_the_audit_has_the_kernels_of_a_usual_step():
    shape = Shape(256, 2048, 16, (96, 64, 40), "bfloat16")
    audited = set(launches(shape, 90))
    for step in (
        {}, {"auxk": True}, {"topk_type": "local"}, {"auxk": True, "topk_type": "local"}, {"update": "dense"},
        {"auxk": True, "update": "dense", "normalize": "after"}, {"update": "direct"},
        {"auxk": True, "update": "direct"},
    ):  # fmt: skip
        missing = set(trace(shape, 90, **step).launches) - audited
        assert not missing, (step, sorted(launch.kernel for launch in missing))


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET unset"), stand_in():
        pass
