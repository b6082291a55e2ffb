"""`python -m benchmarks host`, and the driver without a GPU that it runs on."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
import warm_process

from benchmarks import __main__ as benchmark
from benchmarks import host
from sparc_kernels.core._triton import HAS_TRITON, INTERPRETED
from sparc_kernels.tools.shape import Shape
from sparc_kernels.tools.stub_driver import build, stub_driver

TINY = "16,128,8,16,1"  # what steps on a CPU have: the kernels are compiled once
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Output and record of a run at a tiny shape, in a process where kernels are compiled."""
    out = tmp_path_factory.mktemp("host") / "host.json"
    arguments = ["--shape", TINY, "--auxk", "0", "--dtype", "bfloat16", "--repeats", "2", "--seconds", "0.001", "--fit"]
    done = warm_process.run("-m", "benchmarks", "host", *arguments, "--json", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text())


@pytest.mark.compile
@pytest.mark.subprocess
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured on the GPU")
def test_every_row_is_printed_and_recorded(measured):
    said, made = measured
    assert made["schema"] == host.SCHEMA and made["environment"]["threads"] == 1
    assert made["environment"]["command"][:4] == ["python", "-m", "benchmarks", "host"]
    rows = {row["what"]: row for row in made["rows"]}
    assert list(rows) == [*host.OURS, *host.GRAPHS, host.DENSE] and len(made["rows"]) == len(rows)
    for what, row in rows.items():
        assert any(line.startswith(what) for line in said.splitlines())
        assert 0 < row["host_ms"] <= row["median_ms"] and row["cpu_ms"] > 0 and row["device_ms"] is None
        assert row["torch_calls"] > row["torch_kernels"] > 0 and row["repeats"] == 2
        assert (row["launches"] > 0) == (what in host.OURS) and row["operators"] >= 0
        # a replay copies inputs and results, whatever the step does
        assert (row["torch_calls"] < 6) == (what in host.GRAPHS)
        assert 0 <= row["launch_share"] <= 1  # of a few samples
    for word in ("CUDA's driver does nothing", "load average", "x Triton launches +", "an upper bound", "commit"):
        assert word in said
    assert set(made["fit"]) == {"triton_us", "torch_us", "step_us", "rows", "median_error", "largest_error"}


@pytest.mark.compile
@pytest.mark.subprocess
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured on the GPU")
def test_the_driver_counts_what_the_trace_has(measured):
    from sparc_kernels.tools.trace import trace

    shape = Shape(16, 128, 8, (16,))
    rows = {row["what"]: row["launches"] for row in measured[1]["rows"]}
    for what, update in (("two calls", "dense"), ("training_step", "direct")):
        assert rows[what] == len(trace(shape, update=update).launches), what
    assert rows["Trainer's step"] == rows["two calls"]
    assert rows["Trainer's step, gradient_free"] == rows["training_step"]


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_interpreted_kernels_and_other_gpus_are_refused(capsys):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET unset"), stub_driver():
        pass
    assert benchmark.main(["host", "--shape", TINY]) == 2
    assert "benchmarks host: error: Triton interprets kernels here" in capsys.readouterr().err


def test_a_compiler_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for compiler, said in (("/no/such/compiler", "no C compiler: "), ("false", "the C compiler false fails")):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(RuntimeError, match=said):
            build()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C compiler: expected gcc or clang, or the variable CC"):
        build()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "1,2"], "--shape: expected B,N,k,d,S"),
        (["--shape", "16,128,8,16,1,fp32"], "without a precision, which is --dtype"),
        (["--auxk", "-1"], "--auxk: expected a number >= 0 and at most N and 512, got -1"),
        (["--shape", TINY, "--auxk", "129"], "--auxk: expected a number >= 0 and at most N and 512, got 129"),
        (["--repeats", "0"], "--repeats: expected a number >= 1, got 0"),
        (["--seconds", "0"], "--seconds: expected a number > 0, got 0"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
    ],
)
def test_refusals(arguments, said, capsys):
    with pytest.raises(SystemExit) as refused:
        host.parse(arguments)
    assert refused.value.code == 2 and said in capsys.readouterr().err


def row(launches: int, kernels: int, us: float, tensors: str = "cpu", what: str = "two calls") -> host.Row:
    made = host.Row(what, "bfloat16", 0, tensors, "", "", cpu_ms=us / 1e3, launches=launches)
    made.torch_kernels = kernels
    return made


def test_the_fit_finds_its_three_numbers():
    """From exact times; of what no eager step on a real device is, nothing is used."""
    counts = list(itertools.product((10, 20, 40), (5, 50, 300)))
    rows = [row(a, b, 20 * a + 3 * b + 100) for a, b in counts]
    rows += [row(10, 5, 9e9, "meta"), row(0, 0, 9e9, what="Trainer's step, in a graph")]
    rows += [row(10, 5, 1.0, what="training_step")]  # neither autograd nor an optimizer's step
    found = host.fit(rows)
    assert (found["triton_us"], found["torch_us"], found["step_us"]) == (20, 3, 100)
    assert found["rows"] == len(counts) and found["largest_error"] < 1e-6
    found = host.fit([row(a, b, 20 * a) for a, b in counts])
    assert (found["triton_us"], found["torch_us"], found["step_us"]) == (20, 0, 0), "never negative"


def test_calls_of_torch_are_told_from_those_that_launch():
    x = torch.ones(4, 3)

    def step():
        y = x.t()[1:].contiguous()  # two views, a copy
        y.add_(1)
        x.to(torch.float32), x.reshape(12)
        torch.nn.functional.linear(y, y)  # a view and a product
        torch._foreach_add_([x, y], 1.0)

    calls = host.Calls.of(step)
    assert calls.kernels == 4 and calls.torch > calls.kernels and calls.own == 0


def test_samples_tell_tritons_code_from_the_rest():
    import triton

    code = compile("def spin(seconds):\n while clock() < seconds: pass", f"{triton.__path__[0]}/made_up.py", "exec")
    names = {"clock": time.process_time}
    exec(code, names)

    def spin(seconds):
        while time.process_time() < seconds:
            pass

    with host.in_triton() as samples:
        names["spin"](time.process_time() + 0.15)
        spin(time.process_time() + 0.15)
    assert len(samples) > 10 and 0.2 < sum(samples) / len(samples) < 0.8


def test_hooks_see_launches():
    from triton import knobs

    with host.launched() as found:
        knobs.runtime.launch_enter_hook(None)
    knobs.runtime.launch_enter_hook(None)
    assert len(found) == 1


def test_on_a_gpu_the_devices_time_stands_beside_the_hosts(monkeypatch):
    """Each step from an empty queue; a graph's kernels are not counted as launches."""
    waits, covered, x = [], [], torch.ones(3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(host, "flush_buffer", lambda device: None)
    monkeypatch.setattr(host, "event_ms", lambda phases, n, flush, cover_ms: covered.append(cover_ms) or [[0.5]] * n)
    measure = host.Measure(None, 2, 1e-6)
    rows = [row for row, _ in host.steps_of(Shape(16, 128, 8, (16, 16)), ["bfloat16 autocast"], [8], True, True)]
    assert [one.what for one in rows] == [*host.OURS, *host.GRAPHS, host.DENSE]
    assert {(one.tensors, one.at) for one in rows} == {("cuda", "B 16, N 128, k 8, d 2 x 16")}
    for one in rows[0], rows[5]:
        measure.add(one, lambda: x + 1)
    eager, graph = measure.run()
    assert (eager.torch_calls, eager.torch_kernels, eager.launches) == (1, 1, 0) and len(waits) > 10
    assert eager.device_ms == 0.5 and covered == [eager.host_ms, graph.host_ms] and eager.repeats == 2
    about = {"cpu": "c", "device": "cuda", "device_name": "G", "versions": {"torch": "2"}, "date": "2026-01-01T"}
    said = host.report({**about, "commit": None, "dirty": None, "load_before": 1}, [eager, graph], 0.5, 1, None)
    assert "device ms" in said and "c, one thread; G" in said and "OTHERS HAD 50% OF THE CORES" in said
