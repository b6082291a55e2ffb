"""benchmarks/gpu_report.py on a CPU: every section and row, the time limit, what a kill, a crash and a hang leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cases, gpu_report, timing  # noqa: E402
from sparc_kernels import cost  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_report.py"
DONE = ("ran", "ran in part", "failed", "timed out", "absent", "skipped")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def read(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def check_structure(data):
    """Everything ran or says why it did not."""
    assert data["device"] == "cpu"
    assert tuple(data["sections"]) == gpu_report.SECTIONS
    for name, entry in data["sections"].items():
        assert entry["status"] == "ran" or entry["reason"], name
    for entry in data["sections"]["timings"]["groups"]:
        assert entry["status"] == "ran" or entry["reason"], entry
    for row in data["sections"]["timings"]["rows"] + data["sections"]["ceilings"]["rows"]:
        assert {"section", "case", "op", "provider", "dtype", "verified", "device"} <= set(row)
        if row["status"] == "ok":
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["repeats"] >= 2
            assert {"peak_mib", "bytes", "flops", "gb_s", "tflop_s"} <= set(row)
            assert row["predicted_us"] is None and row["measured_over_predicted"] is None  # a CPU is in no table
        else:
            assert row["reason"], row


def test_a_whole_run(tmp_path):
    """From a folder that knows nothing of the checkout, with nothing installed."""
    out = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--minutes", "0.8", "--skip", "verify", "--out", str(out)]
    t0 = time.time()
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    took = time.time() - t0
    assert done.returncode == 0, done.stderr[-2000:]
    data = read(out)
    check_structure(data)
    assert took < 48 + gpu_report.Report(out, data).grace + 10
    assert data["workers"] == 1
    rows = data["sections"]["timings"]["rows"]
    failed = [(r["group"], r["op"], r["provider"], r["reason"]) for r in rows if r["status"] == "failed"]
    assert not failed
    assert {r["reason"] for r in rows if r["status"] == "absent"} == {"CUDA graphs need a CUDA device"}
    # in one precision, every way to compute a step gives one loss and one gradient
    steps = [r for r in rows if r["op"].startswith("step") and r["status"] == "ok"]
    assert len(steps) > 10
    for r in steps:
        rough = "bf16" in r["provider"]
        assert r.get("vs_ours", 0) < (2e-2 if rough else 1e-5), r
        assert r.get("grad_norm_vs_ours", 0) < (5e-2 if rough else 1e-4), r
    for r in rows:
        if not r["op"].startswith("step") and r.get("vs_ours") is not None:
            # bf16 rounds each stream's product before the sum: near ties fall either way
            assert r["vs_ours"] < (0.05 if r["dtype"] == "bfloat16" else 1e-4), r
    assert data["sections"]["profile"]["tables"][0]["kernels"]
    assert data["sections"]["environment"]["torch"] == torch.__version__
    last = done.stdout[-12000:]
    assert "sparc_kernels gpu_report: CPU" in last and "-- step B" in last, "the summary does not fit"
    if data["complete"]:
        assert {e["status"] for e in data["sections"]["timings"]["groups"]} == {"ran"}


def test_the_time_limit_holds(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--minutes", "0.15", "--out", str(out)]
    t0 = time.time()
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    data = read(out)
    assert time.time() - t0 < 9 + gpu_report.Report(out, data).grace + 7
    check_structure(data)
    assert data["sections"]["verify"]["status"] in DONE
    assert not data["complete"] and data["stopped"]


def test_a_killed_run_leaves_what_it_had(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--minutes", "2", "--skip", "verify", "--out", str(out)]
    child = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.05)
            if out.exists() and sum(r["status"] == "ok" for r in read(out)["sections"]["timings"]["rows"]) >= 3:
                break
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    data = read(out)
    check_structure(data)
    assert sum(r["status"] == "ok" for r in data["sections"]["timings"]["rows"]) >= 3
    assert not data["complete"] and data["stopped"] == "still running, or killed"
    assert data["finished"] is None
    time.sleep(0.5)
    stamp = out.stat().st_mtime_ns
    time.sleep(1)
    if sys.platform == "linux":
        assert out.stat().st_mtime_ns == stamp, "the worker outlived its parent"


BAD_WORKER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from benchmarks import cases, gpu_report

def crash(b): os.kill(os.getpid(), signal.SIGSEGV)
def lose(b): os._exit(gpu_report.CUDA_LOST)
def hang(b): time.sleep(60)
def refuse(b): raise RuntimeError("refused")
def exhaust(b): raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")
def good(b): return cases.Job(lambda: [sum(range(10 ** 4))])

makes = dict(before=good, crash=crash, lose=lose, refuse=refuse, exhaust=exhaust, hang=hang, after=good)
providers = [cases.Provider("op", name, "float32", make, seconds=0.1) for name, make in makes.items()]
gpu_report.PATIENCE = 1.5
gpu_report.Worker.needed = lambda self, provider: 0.1
gpu_report.Worker.plan = lambda self: [("bad", "timings", "A", providers), ("good", "timings", "A", providers[-1:])]
gpu_report.Worker(gpu_report.Report.load(gpu_report.Path(sys.argv[-1]))).run()
"""


def test_a_worker_that_dies_costs_one_row(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(BAD_WORKER.format(root=str(ROOT)))
    monkeypatch.setattr(gpu_report, "this", lambda *args: [sys.executable, str(script), args[-1]])
    report = gpu_report.Report.new(tmp_path / "report.json", "cpu", 1.0, time.time())
    report.save()
    data = gpu_report.supervise(report).data
    rows = {(r["group"], r["provider"]): r for r in data["sections"]["timings"]["rows"]}
    said = {name: row["status"] for name, row in rows.items()}
    assert said == {
        ("bad", "before"): "ok", ("bad", "crash"): "failed", ("bad", "lose"): "failed", ("bad", "refuse"): "failed",
        ("bad", "exhaust"): "out of memory", ("bad", "hang"): "failed", ("bad", "after"): "ok", ("good", "after"): "ok",
    }  # fmt: skip
    assert "-11" in rows["bad", "crash"]["reason"] and "70" in rows["bad", "lose"]["reason"]
    assert "hang" in rows["bad", "hang"]["reason"] and "refused" in rows["bad", "refuse"]["reason"]
    assert data["workers"] == 4
    assert [e["status"] for e in data["sections"]["timings"]["groups"]] == ["ran", "ran"]
    json.dumps(data)
    gpu_report.summary({**data, "complete": True})


def test_a_worker_that_never_starts_ends_the_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "this", lambda *args: [sys.executable, "-c", "raise SystemExit(3)"])
    report = gpu_report.Report.new(tmp_path / "report.json", "cpu", 1.0, time.time())
    data = gpu_report.supervise(report).data
    assert data["workers"] == 1
    assert "exit code 3" in data["sections"]["timings"]["reason"]


@pytest.mark.parametrize(
    ("found", "counts", "failed"),
    [
        ([{"name": "a", "verdict": "pass"}, {"name": "b", "verdict": "FAIL"}], {"pass": 1, "fail": 1}, 1),
        ({"gpu": "x", "results": [{"ok": True}, {"ok": False}]}, {"true": 1, "false": 1}, 1),
        ({"results": []}, {}, 0),
    ],
)
def test_verdicts_are_read(found, counts, failed):
    entry = {}
    gpu_report.read_verdicts(entry, found)
    assert entry["counts"] == counts and len(entry["failed"]) == failed


# what only a GPU machine has, stood in for


def test_clocks_come_from_nvml_or_nvidia_smi_or_are_absent(tmp_path, monkeypatch):
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: b"NVIDIA X", nvmlSystemGetDriverVersion=lambda: "580", NVML_CLOCK_SM=1,
        nvmlDeviceGetClockInfo=lambda h, c: 1980, nvmlDeviceGetCurrentClocksThrottleReasons=lambda h: 4,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = gpu_report.gpu_state("abc")
    assert (state["source"], state["name"], state["sm_mhz"], state["throttle_reasons"]) == (
        "pynvml",
        "NVIDIA X",
        1980,
        "0x4",
    )
    assert state["memory_mhz"].startswith("unknown")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_report.gpu_state()["source"] is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA X, 580.1, 1980 MHz'\n")
    tool.chmod(0o755)
    assert gpu_report.gpu_state() == {
        "source": "nvidia-smi", "name": "NVIDIA X", "driver_version": "580.1", "clocks.sm": "1980 MHz"
    }  # fmt: skip


@pytest.mark.parametrize(("errors", "status"), [(0, "clean"), (86, "failed")])
def test_the_memory_checker_is_read(tmp_path, monkeypatch, errors, status):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {errors} errors'\nexit {errors}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report = gpu_report.Report.new(tmp_path / "report.json", "cuda", 8.0, time.time())
    with gpu_report.section(report, "memory_checker") as entry:
        gpu_report.memory_checker(report, entry)
    assert entry["status"] == "ran" and entry["clean"] is (errors == 0), entry
    assert [run["status"] for run in entry["runs"]] == [status, status]
    assert entry["runs"][0]["summary"] == [f"ERROR SUMMARY: {errors} errors"]


def test_every_kernel_is_exercised(capsys):
    gpu_report.exercise()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "nan" not in " ".join(lines)


def test_cuda_events_and_peak_memory(monkeypatch):
    """Timer's CUDA branch over a torch.cuda that only counts."""

    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 1
            self.at = Event.clock

        def elapsed_time(self, end):
            return end.at - self.at

    calls = {"sleep": 0, "reset": 0}
    for name, fake in {
        "Event": Event, "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 5 * timing.MIB, "max_memory_allocated": lambda: 8 * timing.MIB,
        "_sleep": lambda cycles: calls.update(sleep=calls["sleep"] + 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    timer = timing.Timer("cpu")
    timer.cuda = True
    job = cases.Job(lambda: time.sleep(0.001), lambda: calls.update(reset=calls["reset"] + 1))
    found = timer.measure(job, 0.02, queued=True)
    assert found["median_ms"] == found["p80_ms"] == 1.0 and found["peak_mib"] == 3.0 and found["queued"]
    assert calls["sleep"] == found["repeats"] + 2 and calls["reset"] > found["repeats"]
    assert timer.measure(cases.Job(lambda: None, peak_bytes=timing.MIB), 0.01, queued=False)["peak_mib"] == 1.0


def test_cases_match_the_shapes_of_the_model():
    assert [(c.B, c.N, c.k, c.D, c.S) for c in cases.CASES.values()] == [
        (256, 8192, 64, 2560, 3), (4096, 32768, 64, 2560, 3), (4096, 131072, 64, 3840, 3), (8192, 65536, 100, 18432, 8),
        (4096, 2**20, 32, 2688, 1),
    ]  # fmt: skip


def test_every_row_of_ours_has_a_prediction():
    """Measured over predicted needs a model of what is timed; those without one say nothing."""
    gpu = cost.GPUS["H200"]
    for name, case in cases.CASES.items():
        groups = [cases.step_providers(), cases.compiled_providers(), cases.auxk_step_providers()]
        groups += [cases.op_providers("bfloat16"), cases.op_providers("float32"), cases.optimizer_providers()]
        for p in [p for group in [*groups, cases.ceiling_providers("bfloat16")] for p in group]:
            seconds = p.predicted_seconds(case, gpu)
            assert (seconds or 0) > 0 or not p.name.startswith("ours"), (name, p.op, p.name)
            if p.op_cost(case):
                assert p.op_cost(case).l2 > 0
    timed = {p.name: p.predicted_seconds(cases.CASES["A"], gpu) for p in cases.step_providers()}
    assert timed["ours bf16 graph"] < timed["ours bf16"]  # the host is what eager waits for
    assert timed["reference fp32 stable sort"] is None


def test_the_gpu_is_found_by_name_or_said_to_be_unknown(tmp_path):
    report = gpu_report.Report.new(tmp_path / "report.json", "cuda", 1.0, time.time())
    for name, found in (("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA X", None)):
        report["environment"]["gpu"] = {"name": name}
        gpu, said = gpu_report.cost_model(report)
        assert (gpu.name if gpu else None) == found == said["gpu"]
        assert (said["reason"] is None) == (found is not None)
    assert "'NVIDIA X' is not one of A100" in said["reason"]
    report.data["device"] = "cpu"
    assert gpu_report.cost_model(report) == (None, {"gpu": None, "reason": "no GPU"})


def test_tensors_are_seeded_and_as_described():
    one, two = (cases.Bench(cases.TINY["A"], "cpu") for _ in range(2))
    for x, y in zip(one.xs(torch.float32), two.xs(torch.float32), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(16))
    for p, q in zip(one.model(torch.bfloat16).parameters(), two.model(torch.float32).parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()) and p.stride() == q.stride()
    model = one.model(torch.float32, auxk=True)
    inputs = dict(zip(model.streams, one.xs(torch.float32), strict=True))
    for _ in range(3):
        outputs = model(inputs)
    assert all(int(dead.sum()) == 13 for dead in model.get_dead_neurons().values())
    assert float((outputs["auxk_sparse_codes_s0"] > 0).float().mean()) > 0


def test_difference_and_quantile():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and timing.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    a = torch.tensor([[1, 2], [3, 4]])
    assert timing.difference("ids", a, a.flip(1)) == 0 and timing.difference("ids", a, a.flip(0)) == 1
    assert timing.difference("tensor", [torch.ones(3)], [torch.full((3,), 1.5)]) == pytest.approx(0.5)
    assert timing.norm([torch.full((2, 8), 0.5).t(), None]) == pytest.approx(2.0)
