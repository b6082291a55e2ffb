"""benchmarks/gpu_report.py on a CPU: both calls, their limits, what a kill, a crash and a hang leave."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import pkgutil
import runpy
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch._dynamo  # noqa: F401  as the first optimizer does: here, and not in every child

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as benchmark  # noqa: E402
from benchmarks import ahead, cases, environment, exercise, gpu_report, plan, plot, record, runner  # noqa: E402
from benchmarks.provider import Provider  # noqa: E402
from benchmarks.timing import Job  # noqa: E402
from sparc_kernels.core._triton import HAS_TRITON  # noqa: E402
from sparc_kernels.tools.compiler import Compilation  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_report.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


class Worker:
    """A process like those of subprocess, forked: it need not import torch again."""

    def __init__(self, run):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                code = run()
            except SystemExit as ended:
                code = ended.code or 0
            finally:
                os._exit(code)

    @classmethod
    def start(cls, command, output=None, **env):
        """As `gpu_report.start`, of a command that `gpu_report.module` made."""

        def run():
            os.environ.update(env)
            with open(os.devnull, "w") if output is None else output as sys.stdout:
                sys.stderr = sys.stdout
                sys.argv = command[4:]
                runpy.run_module(command[4], run_name="__main__", alter_sys=True)

        return cls(run)

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout):
        return self.poll(0)


def check_sections(data, name):
    """Everything ran or says why it did not."""
    assert tuple(data["sections"]) == gpu_report.CALLS[name][1]
    for part, entry in data["sections"].items():
        assert entry["status"] == "ran" or entry["reason"], part


def test_the_script_runs_from_a_folder_that_knows_nothing_of_the_checkout(tmp_path):
    command = [sys.executable, str(SCRIPT), "--call", "correctness", "--device", "cpu", "--out", str(tmp_path / "out")]
    command += ["--skip", "compile,verify,adversarial,exercise,contract"]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads((tmp_path / "out" / "correctness.json").read_text())
    assert data["complete"] and {entry["status"] for entry in data["sections"].values()} == {"skipped"}


def test_the_correctness_call(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_report, "start", Worker.start)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    arguments = ["--call=correctness", "--device=cpu", f"--out={tmp_path}", "--skip=contract,compile"]
    assert gpu_report.main(arguments) == 0
    data = json.loads((tmp_path / "correctness.json").read_text())
    check_sections(data, "correctness")
    assert data["complete"] and data["schema"] == gpu_report.SCHEMA and data["settings"]["tiny"], data["stopped"]
    sections = data["sections"]
    verify = sections["verify"]
    assert verify["verified"] and verify["counts"]["ok"] > 20 and verify["header"]["environment"]["torch"]
    assert "exercised global torch.bfloat16 S 3 loss" in sections["exercise"]["exercised"][0]
    assert sections["memcheck"]["reason"] == sections["racecheck"]["reason"] == "no CUDA device"
    exact = json.loads((tmp_path / "adversarial.json").read_text())
    assert sections["adversarial"]["status"] == "ran" and exact["passed"] and len(exact["results"]) > 10
    files = {"correctness.json", "correctness.txt", "verify.json", "adversarial.json"}
    assert {f.name for f in tmp_path.iterdir()} == files
    said = capfd.readouterr().out
    assert "sparc_kernels gpu_report, correctness: CPU (tiny shapes" in said and len(said) < 12000


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("errors", [[], [("_select_kernel", "no")]])
def test_what_was_compiled_is_read(tmp_path, monkeypatch, capsys, errors):
    compiled = []

    def compile_all(launches, arch, on_done):
        compiled.extend(launches)
        on_done(50, 99)
        return Compilation(len(launches), 1.0, 2.0, errors)

    monkeypatch.setattr(ahead, "compile_all", compile_all)
    assert ahead.main(["correctness", "--tiny", "--arch", "90"]) == 0
    report, entry = gpu_report.Report(tmp_path, "correctness", "cpu", 6.0, time.time()), {"status": "ran"}
    gpu_report.compiling(report, 9).read(entry, 0, capsys.readouterr().out)
    assert len(compiled) == entry["kernels"] == 2 and entry["cpu_seconds"] == 1.0
    assert entry["status"] == ("failed" if errors else "ran") and len(entry["errors"]) == len(errors)


def test_the_hosts_times_are_read(tmp_path):
    """Into the section, and in short into the summary; the file of its own goes."""
    row = {"what": "two calls", "dtype": "bfloat16", "auxk": 64, "host_ms": 0.9, "device_ms": 0.25}
    row |= {"launches": 18, "torch_calls": 60}
    made = {"rows": [row], "others_cpu": 0.0, "environment": {"versions": {"torch": "2"}}}
    report = gpu_report.Report(tmp_path, "timing", "cuda", 5.0, time.time())
    part = gpu_report.host_times(report, 60)
    (tmp_path / "host.json").write_text(json.dumps(made))
    report["host"].update(status="ran", reason=None)
    part.read(report["host"], 0, "")
    assert part.command[4:6] == ["benchmarks", "host"] and not (tmp_path / "host.json").exists()
    assert report["host"]["rows"] == [row] and report["host"]["versions"] == {"torch": "2"}
    said = "two calls, bfloat16, auxk 64: host 0.900 ms, device 0.250 ms, 18 launches of Triton, 60 calls of torch"
    assert said in gpu_report.summary_of(report.sections)
    part.read(report["host"], 2, "error: Triton is not installed here")
    assert report["host"]["status"] == "absent"


def test_the_tests_that_need_a_gpu_are_known():
    tests = gpu_report.needing_a_gpu()
    assert sum(map(len, tests.values())) >= 4 and all((ROOT / file).exists() for file in tests)


def test_a_library_that_is_missing_costs_the_tests_of_one_file(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    text = (
        "import pytest\nCUDA = True\n@pytest.mark.skipif(not CUDA, reason='')\n@pytest.mark.filterwarnings('error')\n"
    )
    (root / "tests" / "test_a.py").write_text(text + "def test_one(): pass\ndef test_two(): raise ValueError\n")
    (root / "tests" / "test_b.py").write_text(f"import no_such_library\n{text}def test_three(): pass\n")
    (root / "tests" / "test_c.py").write_text("def test_four(): raise ValueError\n")
    monkeypatch.setattr(gpu_report, "ROOT", root)
    report = gpu_report.Report(tmp_path, "correctness", "cpu", 2, time.time())
    for name in ("compile", "verify", "adversarial", "exercise"):
        report[name].update(status="skipped", reason="not of this test")
    gpu_report.correctness(report)
    entry = report["contract"]
    assert entry["status"] == "failed" and entry["tests"] == ["test_one", "test_three"]
    assert "1 passed" in entry["summary"] and "1 error" in entry["summary"], entry
    assert "no_such_library" in (tmp_path / "correctness.txt").read_text()


def test_the_timing_call(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_report, "start", Worker.start)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    arguments = ["--call=timing", "--device=cpu", "--minutes=2", f"--out={tmp_path}", "--skip=compile,host"]
    assert gpu_report.main([*arguments, "--filter=open-images gaussian (ceiling|select)"]) == 0
    data = record.load(tmp_path / "timing.json")
    check_sections(data, "timing")
    assert data["complete"] and data["settings"]["tiny"] and data["sections"]["measurements"]["workers"] == 1
    assert {r["status"] for r in data["results"]} == {"ok"}
    assert list(dict.fromkeys(r["op"] for r in data["results"])) == ["select", "ceiling"]
    said = capfd.readouterr().out
    assert "sparc_kernels gpu_report, timing: CPU (tiny shapes" in said and "-- select, open-images" in said


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What `gpu_report.begin` returns on a CPU, from this process."""
    out = tmp_path_factory.mktemp("begun") / "record.json"
    runner.Run(plan.Options(tiny=True, minutes=4), out).save()
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", gpu_report.CALLS)
def test_the_time_limit_holds(tmp_path, monkeypatch, begun, name):
    monkeypatch.setattr(gpu_report, "begin", lambda args: copy.deepcopy(begun))
    hang = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu_report, "module", lambda *words: hang)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    t0 = time.time()
    assert gpu_report.main(["--call", name, "--device=cpu", "--minutes=0.1", f"--out={tmp_path}"]) == 0
    assert time.time() - t0 < 6 + 10
    data = json.loads((tmp_path / f"{name}.json").read_text())
    check_sections(data, name)
    assert data["stopped"] and not data["complete"]


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import gpu_report
writes, plain = [], Path.write_text

def write_text(self, text):
    writes.append(self)
    if len(writes) == {moment}:
        plain(self, text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, text)

Path.write_text = write_text
report = gpu_report.Report(Path({folder!r}), "correctness", "cpu", 5, time.time())
parts = [gpu_report.Part(name, [sys.executable, "-S", "-c", "print(1)"], 9) for name in ("compile", "verify")]
gpu_report.run(report, *parts, gpu_report.Part("contract", parts[0].command, 9, after="compile"))
"""


@pytest.mark.parametrize("moment", [2, 3, 4, 6])
def test_a_call_that_is_killed_while_it_writes_leaves_a_readable_file(tmp_path, moment):
    """At half of a write, as parts begin and end."""
    script = KILLED.format(root=str(ROOT), folder=str(tmp_path), moment=moment)
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGKILL
    data = json.loads((tmp_path / "correctness.json").read_text())
    check_sections(data, "correctness")
    assert any(entry["status"] == "running" for entry in data["sections"].values())


KILLED_CALL = """
import json, sys
sys.path.insert(0, {root!r})
from benchmarks import gpu_report
gpu_report.begin = lambda args: json.load(open({begun!r}))
gpu_report.suite = lambda *_: [sys.executable, "-c", {worker!r}]
gpu_report.main(["--call=timing", "--device=cpu", "--out={folder}", "--skip=compile,host"])
"""
WORKER = """
import time
from benchmarks import record
data = record.load({path!r})
while True:
    times = dict.fromkeys(("p20_ms", "median_ms", "p80_ms"), 1.0)
    row = dict.fromkeys(("op", "case", "data", "mode", "dtype"), "x")
    row |= dict(provider=str(time.time()), shape=dict(), status="ok", reason=None, **times)
    data["results"].append(record.empty_row(**row))
    record.save({path!r}, data)
    time.sleep(0.05)
"""


def test_a_killed_call_leaves_what_it_had(tmp_path, begun):
    first, out = tmp_path / "first.json", tmp_path / "timing.json"
    record.save(first, begun)
    worker = WORKER.format(path=str(out))
    script = KILLED_CALL.format(root=str(ROOT), begun=str(first), worker=worker, folder=tmp_path)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            time.sleep(0.05)
            if out.exists() and len(record.load(out)["results"]) >= 2:  # valid whenever it is looked at
                break
    finally:
        child.kill()
        child.wait()
    data = record.load(out)
    assert len(data["results"]) >= 2
    assert not data["complete"] and data["stopped"] == "still running, or killed" and data["finished"] is None
    assert data["sections"]["measurements"]["reason"] == "killed while it ran"
    if sys.platform == "linux":
        time.sleep(0.2)
        stamp = out.stat().st_mtime_ns
        time.sleep(0.3)
        assert out.stat().st_mtime_ns == stamp, "the worker outlived its parent"


def parts(tmp_path, *made, minutes=5.0):
    """Sections after parts of plain Python have run."""
    report = gpu_report.Report(tmp_path, "correctness", "cpu", minutes, time.time())
    gpu_report.run(report, *made)
    return report


def part(name, code, seconds=30.0, **more):
    return gpu_report.Part(name, [sys.executable, "-S", "-c", code], seconds, **more)


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path):
    def unreadable(entry, code, output):
        raise ValueError("what is this")

    report = parts(
        tmp_path, part("compile", "print('before'); raise SystemExit('broken')"), part("verify", "print(1)"),
        part("contract", "import time; print('begun', flush=True); time.sleep(60)", 2.1),
        part("exercise", "print(2)", after="compile"), part("memcheck", "", read=unreadable, after="contract"),
    )  # fmt: skip
    said = {name: (entry["status"], entry["reason"]) for name, entry in report.sections.items()}
    assert said["compile"] == ("failed", "exit code 1: before\nbroken")
    assert said["verify"] == said["exercise"] == ("ran", None)
    assert said["contract"] == ("timed out", "stopped after 2 s") and "begun" in report["contract"]["output_tail"]
    assert said["memcheck"][0] == "failed" and "what is this" in said["memcheck"][1]
    assert said["racecheck"] == ("not run", "not reached")
    assert [f.name for f in tmp_path.glob("*.txt")] == ["correctness.txt"]
    text = gpu_report.summary_of(report.sections)
    assert text.index("compile: failed") < text.index("contract: timed out") < text.index("verify: ran")


def test_parts_without_time_say_so(tmp_path):
    report = parts(tmp_path, part("verify", "print(1)"), minutes=0.01)
    assert report["verify"]["status"] == "not run" and "left of the time limit" in report["verify"]["reason"]


def test_what_a_crashed_part_started_ends_with_it(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    report = parts(tmp_path, part("verify", code))
    pid = int(report["verify"]["output_tail"])
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


def test_the_call_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_report.parse(["--minutes", "3"])
    assert stopped.value.code == 2
    assert "--call: expected correctness or timing, each a call of its own, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_report.parse(["--call", "timing", "--skip", "verify"])
    assert "--skip: expected sections among compile, host, measurements, got verify" in capsys.readouterr().err


def crash(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error):
    raise RuntimeError(error)


def test_a_worker_that_dies_costs_one_provider(tmp_path, monkeypatch, begun):
    """And in the rounds, where providers take turns, those that did."""
    turns = iter(range(9))
    makes = {
        "before": lambda: 0, "crash": crash, "refuse": lambda: fail("refused"),
        "exhaust": lambda: fail("CUDA out of memory. Tried to allocate 1 TiB"), "hang": lambda: time.sleep(60),
        "after": lambda: 0,
    }  # fmt: skip

    def provider(name, op, make=lambda: None, work=lambda: None):
        return Provider(name, op, "", lambda *_: make() or Job({"forward": work}), None)

    late = provider("late", "select", work=lambda: next(turns) > 1 and crash())
    monkeypatch.setattr(runner, "everyone", lambda: [late, *(provider(n, "ceiling", m) for n, m in makes.items())])
    groups = [plan.Group(cases.TINY["batch"], op, "float32") for op in ("select", "ceiling")]
    monkeypatch.setattr(runner, "plan", lambda options: groups)
    active = runner.Run.active

    def short(self, group, providers, seconds):
        active(self, group, providers, seconds)
        if [p.name for p in providers] == ["hang"]:
            self.data["active"]["until"] = int(time.time())
            self.save()

    monkeypatch.setattr(runner.Run, "active", short)
    monkeypatch.setattr(gpu_report, "start", lambda command: Worker(lambda: benchmark.main(command[5:])))
    report, entry = gpu_report.Report(tmp_path, "timing", "cpu", 4, time.time()), {}
    report.data = copy.deepcopy(begun) | {"deadline": int(time.time() + 200)}
    gpu_report.measure(
        report, entry, gpu_report.suite("cpu", report.path, gpu_report.parse(["--call=timing"]), "--resume")
    )
    rows = {r["provider"]: r for r in report.data["results"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "late": "failed", "before": "ok", "crash": "failed", "refuse": "failed", "exhaust": "out of memory",
        "hang": "failed", "after": "ok",
    }  # fmt: skip
    assert "-9" in rows["crash"]["reason"] and "-9" in rows["late"]["reason"] and "refused" in rows["refuse"]["reason"]
    assert "no sign of life in ceiling, batch, float32, hang" in rows["hang"]["reason"]
    assert [(g["name"], g["status"]) for g in report.data["groups"]] == [("ceiling, batch, float32", "ran")]
    assert entry["workers"] == 4 and len(entry["died"]) == 3 and entry["status"] == "ran"
    record.load(report.path)


def test_a_suite_that_never_starts_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "suite", lambda *_: [sys.executable, "-c", "raise SystemExit('no torch here')"])
    args = gpu_report.parse(["--call=timing", "--minutes=1"])
    with pytest.raises(SystemExit, match="no torch here"):
        gpu_report.begin(args)
    report, entry = gpu_report.Report(tmp_path, "timing", "cpu", 1.0, time.time()), {}
    report.data = {"deadline": int(report.end), "results": [], "complete": False}
    monkeypatch.setattr(record, "load", lambda path: report.data)
    gpu_report.measure(report, entry, gpu_report.suite())
    assert entry == {
        "workers": 2, "status": "failed", "reason": "the worker ended with exit code 1",
        "died": ["the worker ended with exit code 1"] * 2,
    }  # fmt: skip


def test_verdicts_are_read(tmp_path):
    file, entry = tmp_path / "verify.json", {}
    gpu_report.read_verify(file, entry, 1, "")
    assert (entry["rows"], entry["verified"], entry["reason"]) == (0, False, "exit code 1: no verdict")
    failed = {"op": "b", "verdict": "FAIL"}
    file.write_text(json.dumps({"torch": "2", "results": [{"verdict": "ok"}, {"verdict": "skip"}, failed]}))
    gpu_report.read_verify(file, entry, 1, "")
    assert entry["counts"] == {"ok": 1, "skip": 1, "fail": 1} and entry["failed"] == [failed]
    assert entry["header"] == {"torch": "2"} and entry["reason"] == "exit code 1: 1 of 3 not passed"
    gpu_report.read_verify(file, entry, 0, "")
    assert not entry["verified"], "whatever the exit code says"


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


@pytest.mark.parametrize("errors", [0, 86])
def test_the_memory_checker_is_read(tmp_path, monkeypatch, errors):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho exercised it\necho '========= ERROR SUMMARY: {errors} errors'\nexit {errors}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report = gpu_report.Report(tmp_path, "correctness", "cuda", 6.0, time.time())
    for name in ("compile", "verify", "adversarial", "exercise", "contract"):
        report[name].update(status="skipped", reason="not of this test")
    gpu_report.correctness(report)
    for name in ("memcheck", "racecheck"):
        entry = json.loads(report.path.read_text())["sections"][name]
        assert entry["status"] == ("failed" if errors else "ran") and entry["clean"] is (errors == 0), entry
        assert entry["summary"] == [f"ERROR SUMMARY: {errors} errors"] and entry["exercised"] == ["exercised it"]


def test_a_memory_checker_that_is_not_there_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "find_sanitizer", lambda: (None, ["PATH"]))
    report = gpu_report.Report(tmp_path, "correctness", "cuda", 6.0, time.time())
    for name in ("compile", "verify", "adversarial", "exercise", "contract"):
        report[name].update(status="skipped", reason="not of this test")
    gpu_report.correctness(report)
    assert report["memcheck"] == {"status": "absent", "reason": "compute-sanitizer is in none of PATH"}


# ------------------------------------------------------------------------------------------------- what is launched


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_kernel_is_exercised():
    listings = pickle.loads(pickle.dumps(ahead.exercised(90)))  # other processes run them
    launched = {launch.kernel for listing in listings for launch in listing()}
    ops = import_module("sparc_kernels.ops")
    names = [m.name for m in pkgutil.iter_modules(ops.__path__)]
    held = [item for name in names for item in vars(import_module(f"{ops.__name__}.{name}")).items()]
    kernels = [value for name, value in held if name.endswith("_kernel") and hasattr(value, "arg_names")]
    assert launched == {f"{kernel.fn.__module__}:{kernel.fn.__name__}" for kernel in kernels} and len(launched) > 20


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_what_is_timed_is_known_ahead(monkeypatch):
    """Every group in which a kernel of ours runs has its launches listed."""
    case, half = cases.TINY["batch"], "bfloat16"
    listed = {}
    for op, dtype in (("training", half), ("training", "bfloat16 autocast"), ("decode", half), ("ceiling", half)):
        monkeypatch.setattr(ahead, "plan", lambda options, op=op, dtype=dtype: [plan.Group(case, op, dtype)])
        listings = pickle.loads(pickle.dumps(ahead.timed(plan.Options("cuda"), 90)))
        listed[op, dtype] = {x for listing in listings for x in listing()}
    assert listed["ceiling", half] == set()
    assert "_gather_kernel" in {x.kernel.split(":")[1] for x in listed["decode", half]}
    assert listed["training", half] < listed["training", "bfloat16 autocast"]
    assert {"_latent_adam_kernel", "_adam_stream_kernel", "_select_kernel"} <= {
        x.kernel.split(":")[1] for x in listed["training", half]
    }


class Reader(io.StringIO):
    """A pipe whose reader goes after so many lines."""

    def __init__(self, lines: int):
        super().__init__()
        self.lines, self.number = lines, os.open(os.devnull, os.O_WRONLY)

    def write(self, text: str) -> int:
        if self.getvalue().count("\n") == self.lines:
            raise BrokenPipeError
        return super().write(text)

    def fileno(self) -> int:
        return self.number


@pytest.mark.parametrize("script", ["gpu_report", "plot", "exercise", "ahead"])
def test_a_script_ends_quietly_with_its_pipe(tmp_path, monkeypatch, script):
    """And the file says that it was stopped."""
    about = {"device": "cpu", "device_name": "", "date": "2026-01-01", "commit": None, "gpu": None}
    first = {**dict.fromkeys(("complete", "stopped", "started", "finished", "seconds")), "environment": about}
    monkeypatch.setattr(gpu_report, "begin", lambda args: first)
    monkeypatch.setattr(gpu_report, "correctness", lambda report: print("[compile] ran"))
    monkeypatch.setattr(plot, "draw", lambda *args: [tmp_path])
    monkeypatch.setattr(exercise, "PARTS", [lambda device: print(device)] * 2)
    monkeypatch.setattr(ahead, "compile_all", lambda *args, on_done: on_done(50, 99))
    monkeypatch.setattr(ahead, "exercised", lambda arch: [])
    arguments = {
        "gpu_report": (["--call=correctness", "--device=cpu", f"--out={tmp_path}"],), "plot": (["x.json"],),
        "exercise": (), "ahead": (["correctness", "--arch=90"],),
    }  # fmt: skip
    monkeypatch.setattr(sys, "stdout", Reader(script == "gpu_report"))
    monkeypatch.setattr(sys, "stderr", Reader(0))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    assert globals()[script].main(*arguments[script]) == 141
    if script == "gpu_report":
        data = json.loads((tmp_path / "correctness.json").read_text())
        assert not data["complete"] and data["stopped"] == "the reader of the output has gone" and data["finished"]
