"""benchmarks/gpu_report.py on a CPU: every section, the time limit, what a kill, a crash and a hang leave."""

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

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import environment, gpu_report, record  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_report.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = "^(?!.*compiled)open-images gaussian (ceiling|training|select).*float32"


def command(out: Path, minutes: float, *more: str) -> list[str]:
    given = [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", str(minutes), "--out", str(out)]
    return [*given, "--filter", QUICK, *more]


def check_structure(data):
    """Everything ran or says why it did not."""
    assert tuple(data["sections"]) == gpu_report.SECTIONS
    for name, entry in data["sections"].items():
        assert entry["status"] == "ran" or entry["reason"], name


def test_a_whole_run(tmp_path):
    """From a folder that knows nothing of the checkout."""
    out = tmp_path / "report.json"
    done = subprocess.run(
        command(out, 1, "--skip", "verify"), cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = record.load(out)
    check_structure(data)
    assert data["complete"] and data["settings"]["tiny"] and data["sections"]["measurements"]["workers"] == 1
    assert {r["status"] for r in data["results"]} == {"ok"}
    assert {r["op"] for r in data["results"]} == {"ceiling", "training", "select"}
    assert data["sections"]["memory_checker"]["reason"] == "no CUDA device"
    assert "sparc_kernels gpu_report: CPU (tiny shapes" in done.stdout and "-- training, open-images" in done.stdout


def test_the_time_limit_holds(tmp_path):
    out = tmp_path / "report.json"
    t0 = time.time()
    done = subprocess.run(command(out, 0.15), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.time() - t0 < 9 + 80  # the start of torch in each process, on a busy machine, is not the run's
    data = record.load(out)
    check_structure(data)
    assert data["sections"]["verify"]["status"] in ("timed out", "ran")
    if not data["complete"]:
        assert data["stopped"]


def test_a_killed_run_leaves_what_it_had(tmp_path):
    out = tmp_path / "report.json"
    child = subprocess.Popen(
        command(out, 2, "--skip", "verify"), cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(3000):
            time.sleep(0.05)
            if out.exists() and sum(r["status"] == "ok" for r in record.load(out)["results"]) >= 2:
                break
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    data = record.load(out)
    assert sum(r["status"] == "ok" for r in data["results"]) >= 2
    assert not data["complete"] and data["stopped"] == "still running, or killed" and data["finished"] is None
    if sys.platform == "linux":
        time.sleep(0.5)
        stamp = out.stat().st_mtime_ns
        time.sleep(1)
        assert out.stat().st_mtime_ns == stamp, "the worker outlived its parent"


BAD_SUITE = """
import os, signal, sys, time, torch
sys.path.insert(0, {root!r})
from benchmarks import __main__, cases, providers, runner, timing
from benchmarks.providers import Provider

def crash(*_): os.kill(os.getpid(), signal.SIGSEGV)
def lose(*_): os._exit(runner.CONTEXT_LOST)
def hang(*_): time.sleep(60)
def refuse(*_): raise RuntimeError("refused")
def exhaust(*_): raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")
def good(*_): return timing.Job({{"forward": lambda: sum(range(10 ** 4))}})

makes = dict(before=good, crash=crash, lose=lose, refuse=refuse, exhaust=exhaust, hang=hang, after=good)
runner.everyone = lambda: [Provider(name, "ceiling", "", make, None) for name, make in makes.items()]
runner.plan = lambda options: [runner.Group(cases.TINY["batch"], "ceiling", "float32")]
active = runner.Run.active
runner.Run.active = lambda self, group, provider, seconds: active(self, group, provider, 12)
raise SystemExit(__main__.main(sys.argv[1:]))
"""


def test_a_worker_that_dies_costs_one_provider(tmp_path, monkeypatch):
    script = tmp_path / "suite.py"
    script.write_text(BAD_SUITE.format(root=str(ROOT)))
    plain = gpu_report.suite

    def suite(report, options, *more):
        given = plain(report, options, *more)
        return [sys.executable, str(script), *given[given.index("benchmarks") + 1 :]]

    monkeypatch.setattr(gpu_report, "suite", suite)
    report = gpu_report.Report(tmp_path / "report.json", "cpu", 4, time.time())
    gpu_report.begin(report, [])
    with gpu_report.section(report, "measurements") as entry:
        gpu_report.measure(report, entry, [])
    rows = {r["provider"]: r for r in report.data["results"]}
    said = {name: row["status"] for name, row in rows.items()}
    assert said == {
        "before": "ok", "crash": "failed", "lose": "failed", "refuse": "failed", "exhaust": "out of memory",
        "hang": "failed", "after": "ok",
    }  # fmt: skip
    assert "-11" in rows["crash"]["reason"] and "70" in rows["lose"]["reason"]
    assert "hang" in rows["hang"]["reason"] and "refused" in rows["refuse"]["reason"]
    assert entry["workers"] == 4 and len(entry["died"]) == 3
    record.load(report.path)


def test_a_suite_that_never_starts_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "suite", lambda *_: [sys.executable, "-c", "raise SystemExit('no torch here')"])
    report = gpu_report.Report(tmp_path / "report.json", "cpu", 1.0, time.time())
    with pytest.raises(SystemExit, match="no torch here"):
        gpu_report.begin(report, [])


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


def test_clocks_and_energy_come_from_nvml_or_nvidia_smi_or_are_absent(tmp_path, monkeypatch):
    joules = iter([1000, 3500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: b"NVIDIA X", nvmlSystemGetDriverVersion=lambda: "580", NVML_CLOCK_SM=1,
        nvmlDeviceGetClockInfo=lambda h, c: 1980, nvmlDeviceGetCurrentClocksThrottleReasons=lambda h: 0x4 | 0x40,
        nvmlDeviceGetTotalEnergyConsumption=lambda h: next(joules),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = environment.gpu_state("abc")
    assert (state["source"], state["name"], state["sm_mhz"]) == ("pynvml", "NVIDIA X", 1980)
    assert state["throttle"] == ["software power cap", "hardware thermal"]
    assert state["memory_mhz"].startswith("unknown")
    monitor = environment.Monitor("abc")
    assert monitor.reason is None and monitor.clocks()["sm_mhz"] == 1980
    assert monitor.energy_j() == 1.0 and monitor.energy_j() == 3.5
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_state()["source"] is None
    absent = environment.Monitor()
    assert "pynvml" in absent.reason and absent.energy_j() is None and absent.clocks() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA X, 580.1, 1980 MHz'\n")
    tool.chmod(0o755)
    assert environment.gpu_state() == {
        "source": "nvidia-smi", "name": "NVIDIA X", "driver_version": "580.1", "clocks.sm": "1980 MHz"
    }  # fmt: skip


@pytest.mark.parametrize(("errors", "status"), [(0, "clean"), (86, "failed")])
def test_the_memory_checker_is_read(tmp_path, monkeypatch, errors, status):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {errors} errors'\nexit {errors}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report = gpu_report.Report(tmp_path / "report.json", "cuda", 8.0, time.time())
    with gpu_report.section(report, "memory_checker") as entry:
        gpu_report.memory_checker(report, entry)
    assert entry["status"] == "ran" and entry["clean"] is (errors == 0), entry
    assert [run["status"] for run in entry["runs"]] == [status, status]
    assert entry["runs"][0]["summary"] == [f"ERROR SUMMARY: {errors} errors"]
    assert json.loads(report.path.read_text())["sections"]["memory_checker"]["clean"] is (errors == 0)


def test_every_kernel_is_exercised(capsys):
    gpu_report.exercise()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "nan" not in " ".join(lines)
