"""Everything a first look at a GPU should bring back, in one command and one JSON file.

    python benchmarks/gpu_report.py [--minutes 8] [--out FILE] [--device auto|cuda|cpu] [--skip SECTION,...]

Sections: environment, verify, memory_checker, timings, profile, ceilings. The file is replaced atomically after every
section and every measured row, so a run that is killed leaves what it had; whatever did not run says why. On a CPU the
same code runs at tiny shapes: its numbers mean nothing and are marked `device: cpu`.

Three processes keep a fault from costing more than one row. This one never touches the GPU: it writes the environment,
runs `sparc_kernels verify` and the memory checker in subprocesses with time limits, and then watches a worker that
measures. When the worker crashes, hangs or loses its CUDA context, the row in progress is marked and a new worker goes
on behind it. Time runs out for everyone at the same moment, `--minutes` after the start.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import faulthandler
import gc
import glob
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SECTIONS = ("environment", "verify", "memory_checker", "timings", "profile", "ceilings")
CUDA_LOST = 70  # exit code of a worker whose CUDA context is beyond use
MAX_WORKERS = 10
PATIENCE = 30.0  # seconds beyond four times the expected ones before a silent worker is taken for hung
MIB = 2**20


def last_lines(text: str, lines: int = 4, chars: int = 700) -> str:
    return "\n".join([line for line in text.strip().splitlines() if line.strip()][-lines:])[-chars:]


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------------- the file


class Report:
    """The JSON, in memory and on disk. One process at a time writes it."""

    def __init__(self, path: Path, data: dict):
        self.path, self.data = path, data

    @classmethod
    def new(cls, path: Path, device: str, minutes: float, started: float) -> Report:
        sections = {name: {"status": "not run", "reason": "not reached"} for name in SECTIONS}
        for name in ("timings", "ceilings"):
            sections[name]["rows"] = []
        sections["timings"]["groups"] = []
        sections["profile"]["tables"] = []
        return cls(
            path,
            {
                "schema": 1, "report": "sparc_kernels gpu_report", "device": device, "complete": False,
                "minutes": minutes, "deadline": started + 60 * minutes, "started": now(), "finished": None,
                "stopped": "still running, or killed", "workers": 0, "watch": None, "sections": sections,
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Report:
        return cls(path, json.loads(path.read_text()))

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(_plain(self.data), indent=1) + "\n")
        os.replace(part, self.path)

    def __getitem__(self, section: str) -> dict:
        return self.data["sections"][section]

    @property
    def left(self) -> float:
        return self.data["deadline"] - time.time()

    @property
    def grace(self) -> float:
        """How far past the deadline something already begun may finish."""
        return min(20.0, 2 + 6 * self.data["minutes"])

    def rows(self) -> list[dict]:
        return self["ceilings"]["rows"] + self["timings"]["rows"]

    def watch(self, what: str, seconds: float) -> None:
        """Tell the parent how long to wait before it takes this for a hang."""
        self.data["watch"] = {"what": what, "until": time.time() + seconds}
        self.save()


def _plain(value):
    """JSON knows no NaN: such numbers become strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@contextlib.contextmanager
def section(report: Report, name: str):
    """Runs one section of this process; a failure is recorded and passed over."""
    entry = report[name]
    entry.update(status="running", reason="killed while it ran")
    report.save()
    t0 = time.time()
    try:
        yield entry
        if entry["status"] == "running":
            entry.update(status="ran", reason=None)
    except Exception:
        entry.update(status="failed", reason=last_lines(traceback.format_exc()))
    finally:
        entry["seconds"] = round(time.time() - t0, 1)
        report.save()
        print(f"[{name}] {entry['status']}, {entry['seconds']} s", flush=True)


# --------------------------------------------------------------------------------------------------------- subprocesses


_LIBC = ctypes.CDLL(None)  # before any fork


def _die_with_parent():
    """Linux: the child is killed when this process is, however that happens."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(command: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=_die_with_parent, **kwargs)


def stop(child: subprocess.Popen) -> None:
    """Ends a child and what it started; it leads its own process group."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the driver must not hold us up
        child.wait(timeout=5)


def run_limited(command: list[str], seconds: float, env: dict | None = None) -> tuple[int | None, str]:
    """(exit code, output); the exit code is None when it was stopped at its limit."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        child = start(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            code = child.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(child)
        output.seek(0)
        return code, output.read()


def this(*args: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *args]


# ---------------------------------------------------------------------------------------------------------- environment


def probe() -> dict:
    """Versions and device properties as torch sees them. Runs in a process of its own."""
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpu": None}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        found["gpu"] = {
            "name": p.name, "count": torch.cuda.device_count(), "compute_capability": f"{p.major}.{p.minor}",
            "memory_mib": total // MIB, "memory_free_mib": free // MIB, "multiprocessors": p.multi_processor_count,
            "l2_bytes": getattr(p, "L2_cache_size", None), "uuid": str(getattr(p, "uuid", "")) or None,
        }  # fmt: skip
    return found


def gpu_state(uuid: str | None = None) -> dict:
    """Clocks, power, temperature, throttle reasons and driver, now."""
    try:
        return _state_by_nvml(uuid)
    except Exception as error:
        first = f"pynvml: {type(error).__name__}: {error}"
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"source": None, "reason": f"{first}; nvidia-smi: not found"}
    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,temperature.gpu,"
        "clocks_throttle_reasons.active"
    )
    try:
        query = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"source": None, "reason": f"{first}; nvidia-smi: {error}"}
    values = [v.strip() for v in text.strip().splitlines()[0].split(",")]
    return {"source": "nvidia-smi", **dict(zip(fields.split(","), values, strict=False))}


def _state_by_nvml(uuid: str | None) -> dict:
    import pynvml as nv

    nv.nvmlInit()
    try:
        handle = None
        if uuid:
            with contextlib.suppress(Exception):
                handle = nv.nvmlDeviceGetHandleByUUID((uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode())
        if handle is None:
            handle = nv.nvmlDeviceGetHandleByIndex(0)
        questions = {
            "name": lambda: nv.nvmlDeviceGetName(handle),
            "driver": lambda: nv.nvmlSystemGetDriverVersion(),
            "sm_mhz": lambda: nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_SM),
            "sm_max_mhz": lambda: nv.nvmlDeviceGetMaxClockInfo(handle, nv.NVML_CLOCK_SM),
            "memory_mhz": lambda: nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_MEM),
            "memory_max_mhz": lambda: nv.nvmlDeviceGetMaxClockInfo(handle, nv.NVML_CLOCK_MEM),
            "power_limit_w": lambda: nv.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "power_w": lambda: nv.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: nv.nvmlDeviceGetTemperature(handle, nv.NVML_TEMPERATURE_GPU),
            "throttle_reasons": lambda: hex(nv.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            "memory_used_mib": lambda: nv.nvmlDeviceGetMemoryInfo(handle).used // MIB,
        }
        answers = {"source": "pynvml"}
        for name, ask in questions.items():
            try:
                value = ask()
                answers[name] = value.decode() if isinstance(value, bytes) else value
            except Exception as error:  # one question the driver does not answer
                answers[name] = f"unknown: {error}"
        return answers
    finally:
        nv.nvmlShutdown()


def commit() -> dict:
    """The commit measured: git's word, else the variable SPARC_KERNELS_COMMIT (a copy without .git)."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 20}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options)
        if head.returncode == 0:
            status = subprocess.run(["git", "status", "--porcelain"], **options)
            dirty = bool(status.stdout.strip()) if status.returncode == 0 else None
            return {"commit": head.stdout.strip(), "dirty": dirty, "commit_source": "git"}
    given = os.environ.get("SPARC_KERNELS_COMMIT")
    return {"commit": given, "dirty": None, "commit_source": "SPARC_KERNELS_COMMIT" if given else None}


def environment(entry: dict, found: dict, code: dict) -> None:
    entry.update(
        code, python=platform.python_version(), platform=platform.platform(), cpu_count=os.cpu_count(), date=now(),
        command_line=sys.argv, **found,
    )  # fmt: skip
    if found.get("gpu"):
        entry["state"] = gpu_state(found["gpu"]["uuid"])
    said = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_", "PYTORCH_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_")
    entry["variables"] = {name: value for name, value in os.environ.items() if name.startswith(said)}


# --------------------------------------------------------------------------------------------------------------- verify


def verify(report: Report, entry: dict) -> None:
    """`sparc_kernels verify` in a process of its own: a CUDA fault there ends nothing here."""
    on_gpu = report.data["device"] == "cuda"
    entry["verified"] = False
    tries = [[], ["--quick"]] if on_gpu else [["--quick"]]
    for extra in tries:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "verify.json"
            command = [sys.executable, "-m", "sparc_kernels", "verify", *extra, "--json", str(result)]
            # the whole of it is worth a quarter of the time; when that was not enough, its kernels are compiled by now
            seconds = min(180, (0.15 if on_gpu and extra else 0.25) * 60 * report.data["minutes"], report.left - 2)
            code, output = run_limited(command, seconds)
            entry.update(command=" ".join(command[1:]), exit_code=code, limit_s=round(seconds, 1))
            entry["output_tail"] = last_lines(output, 12, 2500)
            if result.exists():
                read_verdicts(entry, json.loads(result.read_text()))
        if code is not None:
            break
        entry.update(status="timed out", reason=f"stopped after {seconds:.0f} s")
    if code is None:
        return
    if "rows" not in entry:
        entry.update(status="failed", reason=f"exit code {code}, no JSON; output_tail has its last lines")
        return
    entry["verified"] = code == 0 and entry["rows"] > 0 and not entry["failed"]
    entry.update(status="ran", reason=None)


def read_verdicts(entry: dict, found) -> None:
    """Counts by verdict and the rows that are neither passed nor skipped."""
    rows = found
    if isinstance(found, dict):
        rows = next((v for v in found.values() if isinstance(v, list) and v and isinstance(v[0], dict)), [])
        entry["header"] = {k: v for k, v in found.items() if v is not rows}
    counts: dict[str, int] = {}
    failed = []
    for row in rows:
        word = next((row[name] for name in ("verdict", "status", "ok", "passed") if name in row), "unknown")
        word = str(word).lower().split(":")[0]
        counts[word] = counts.get(word, 0) + 1
        if word not in ("pass", "passed", "ok", "true", "skip", "skipped"):
            failed.append(row)
    entry.update(rows=len(rows), counts=counts, failed=failed[:50])


# ------------------------------------------------------------------------------------------------------- memory checker


def find_sanitizer() -> tuple[str | None, list[str]]:
    found = shutil.which("compute-sanitizer")
    if found:
        return found, ["PATH"]
    patterns = ["/usr/local/cuda*/bin", "/opt/nvidia/*", "/opt/nvidia/*/*"]
    patterns += [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for base in {p for p in sys.path if p.endswith("-packages")}:
        folders = ("triton/backends/nvidia/bin", "torch/bin", "nvidia/*/bin", "nvidia/*")
        patterns += [f"{base}/{folder}" for folder in folders]
    for pattern in patterns:
        for folder in sorted(glob.glob(pattern), reverse=True):
            for path in (f"{folder}/compute-sanitizer", f"{folder}/compute-sanitizer/compute-sanitizer"):
                if os.path.isfile(path) and os.access(path, os.X_OK):
                    return path, ["PATH", *patterns]
    return None, ["PATH", *patterns]


def memory_checker(report: Report, entry: dict) -> None:
    """compute-sanitizer over every kernel at small odd shapes (`--exercise`): memcheck, racecheck if time allows."""
    if report.data["device"] != "cuda":
        entry.update(status="skipped", reason="no CUDA device")
        return
    tool, searched = find_sanitizer()
    if tool is None:
        entry.update(status="absent", reason=f"compute-sanitizer is in none of {', '.join(searched)}")
        return
    entry.update(path=tool, runs=[])
    limit = min(90.0, 0.15 * 60 * report.data["minutes"])
    for check in ("memcheck", "racecheck"):
        seconds = min(limit if check == "memcheck" else limit / 2, report.left - 5)
        run = {"tool": check, "limit_s": round(seconds, 1)}
        entry["runs"].append(run)
        if seconds < 10 or (check == "racecheck" and report.left < 0.6 * 60 * report.data["minutes"]):
            run.update(status="skipped", reason=f"{report.left:.0f} s left of the time limit")
            continue
        t0 = time.time()
        command = [tool, "--tool", check, "--error-exitcode", "86", *this("--exercise")]
        # every tensor its own allocation, so that a read past its end is seen
        code, output = run_limited(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        status = "timed out" if code is None else "clean" if code == 0 and summary else "failed"
        run.update(
            status=status, exit_code=code, seconds=round(time.time() - t0, 1), summary=summary,
            exercised=[line for line in output.splitlines() if line.startswith("exercised")],
            output_head=output[:3000] if status == "failed" else None, output_tail=last_lines(output, 8, 1500),
        )  # fmt: skip
        report.save()
    entry.update(status="ran", reason=None, clean=all(r["status"] in ("clean", "skipped") for r in entry["runs"]))


def exercise() -> None:
    """Launches every kernel at small shapes that divide nothing: what the memory checker looks at."""
    import torch

    from sparc_kernels import AlignedSAE, encode_topk

    device = "cuda" if torch.cuda.is_available() else "cpu"
    widths = {"a": 40, "b": 33, "c": 65, "d": 48}
    for dtype, topk_type, S in (
        (torch.bfloat16, "global", 3), (torch.bfloat16, "global", 4),  # four sources: gradients by way of H
        (torch.float16, "global", 3), (torch.float32, "global", 3), (torch.bfloat16, "local", 3),
    ):  # fmt: skip
        torch.manual_seed(0)
        streams = dict(list(widths.items())[:S])
        model = AlignedSAE(
            streams, 203, 7, 5, dead_steps_threshold=1, topk_type=topk_type, device=device, dtype=torch.float32
        ).to(dtype)
        # a common mean: some latents are chosen by every row, more than a program of the gradient takes at once
        inputs = {s: (torch.randn(133, d, device=device) + 2).to(dtype).requires_grad_() for s, d in streams.items()}
        for _ in range(3):  # the first has no dead latents yet
            outputs = model(inputs)
            loss, _ = model.compute_loss(outputs, inputs)
            # half of it: gradients that were made with the loss are scaled
            (0.5 * loss + outputs["recon_a"].float().square().mean()).backward()
        print(f"exercised {topk_type} {dtype} S {S} loss {float(loss.detach()):.4f}", flush=True)
    # the selection in three levels
    n, d = 2**20 + 5, 16
    w, zeros = torch.randn(n, d, device=device).bfloat16(), torch.zeros(n, device=device).bfloat16()
    indices, _ = encode_topk([w[:3].contiguous()], [w], [zeros[:d]], [zeros], 64)
    print(f"exercised selection among {n}, largest id {int(indices.max())}", flush=True)
    # the library's GEMM and the pass over its logits
    rows, n, d = 1025, 203, 4096
    x, w, biases = (torch.randn(*shape, device=device).bfloat16() for shape in ((rows, d), (n, d), (max(n, d),)))
    indices, _ = encode_topk([x], [w], [biases[:d]], [biases[:n]], 7)
    print(f"exercised selection of {rows} rows, largest id {int(indices.max())}", flush=True)


# ---------------------------------------------------------------------------------------------------- worker: measuring


def cost_model(report: Report):
    """The GPU of `sparc_kernels.cost` that this one is, or None, and what the file says about it."""
    from sparc_kernels import cost

    device = (report["environment"].get("gpu") or {}).get("name") if report.data["device"] == "cuda" else None
    gpu = cost.gpu_of_device(device) if device else None
    reason = None
    if gpu is None:
        reason = f"{device!r} is not one of {', '.join(cost.GPUS)}" if device else "no GPU"
    return gpu, {"gpu": gpu.name if gpu else None, "reason": reason}


class Worker:
    """Runs the plan, row by row, into the report. Rows that are already there are not run again."""

    def __init__(self, report: Report):
        import torch

        from benchmarks import cases, timing

        self.report, self.cases, self.timing, self.torch = report, cases, timing, torch
        self.device = report.data["device"]
        self.cuda = self.device == "cuda"
        self.shapes = cases.CASES if self.cuda else cases.TINY
        self.row_seconds = 1.0 if self.cuda else 0.02
        self.gpu, report.data["cost_model"] = cost_model(report)
        self.timer = None

    def plan(self) -> list[tuple[str, str, str, object]]:
        """(name, section, case, providers), the most telling first."""
        c = self.cases
        step, compiled, aux = c.step_providers(), c.compiled_providers(), c.auxk_step_providers()
        ops, ops_fp32, optimizer = c.op_providers("bfloat16"), c.op_providers("float32"), c.optimizer_providers()
        return [
            ("ceilings B", "ceilings", "B", c.ceiling_providers("bfloat16")),
            ("step B", "timings", "B", step),
            ("step A", "timings", "A", step),
            ("profile B step", "profile", "B", step[0]),
            ("profile B select", "profile", "B", ops[0]),
            ("ops B", "timings", "B", ops),
            ("profile A step", "profile", "A", step[0]),
            ("step+auxk B", "timings", "B", aux),
            ("compiled B", "timings", "B", compiled),
            ("step+auxk A", "timings", "A", aux),
            ("compiled A", "timings", "A", compiled),
            ("optimizer B", "timings", "B", optimizer),
            ("step C", "timings", "C", step),
            ("ops C", "timings", "C", ops),
            ("optimizer A", "timings", "A", optimizer),
            ("step D", "timings", "D", step),
            ("step E", "timings", "E", step),
            ("ops D", "timings", "D", ops),
            ("ops E", "timings", "E", ops),
            ("ops A", "timings", "A", ops),
            ("ops B fp32", "timings", "B", ops_fp32),
        ]

    def run(self) -> None:
        plan = self.plan()
        entries = self.report["timings"]["groups"]
        if not entries:
            entries += [{"name": name, "status": "not run", "reason": "not reached"} for name, *_ in plan]
        for name in ("timings", "profile", "ceilings"):
            if self.report[name]["status"] == "not run":
                self.report[name].update(status="running", reason="the run ended before its end")
        self.report.save()
        self.timer = self.timing.Timer(self.device)
        for (name, part, case, what), entry in zip(plan, entries, strict=True):
            if entry["status"] not in ("not run", "running"):
                continue
            t0 = time.time()
            entry.update(status="running", reason="the run ended in it")
            bench = self.cases.Bench(self.shapes[case], self.device)
            if part == "profile":
                self.profile(bench, name, what, entry)
            else:
                self.group(bench, name, part, what, entry)
            if self.cuda and entry["status"] == "ran":  # while the clocks are still those of the work
                entry["state"] = gpu_state((self.report["environment"].get("gpu") or {}).get("uuid"))
            bench.clear()
            self.tidy()
            entry["seconds"] = round(entry.get("seconds", 0) + time.time() - t0, 2)
            self.report.save()
        self.close(entries, plan)

    def close(self, entries, plan) -> None:
        """A section ran when everything in it did; otherwise its reason lists what did not."""
        for name in ("timings", "profile", "ceilings"):
            mine = [e for e, (_, part, *_) in zip(entries, plan, strict=True) if part == name]
            missing = [f"{e['name']}: {e['reason']}" for e in mine if e["status"] != "ran"]
            ran = len(missing) < len(mine)
            status = "not run" if not ran else "ran in part" if missing else "ran"
            self.report[name].update(status=status, reason="; ".join(missing) or None)
        self.report.data["watch"] = None
        self.report.save()

    def tidy(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()

    def needed(self, provider) -> float:
        if self.cuda:
            return provider.seconds
        return 4.0 if provider.name.startswith("compiled") else 1.0

    def group(self, bench, name: str, part: str, providers, entry: dict) -> None:
        rows = self.report[part]["rows"]
        done = {(r["group"], r["op"], r["provider"]) for r in rows}
        firsts: dict[str, object] = {}  # what each op's first provider returned
        for p in providers:
            if (name, p.op, p.name) in done:
                continue
            verified = bool(self.report["verify"].get("verified"))
            row = {
                "section": part, "group": name, "case": bench.case.name, "op": p.op, "provider": p.name,
                "dtype": p.dtype, "device": self.device, "verified": verified, "status": "running",
                "reason": "the run ended in it",
            }  # fmt: skip
            rows.append(row)
            needed = self.needed(p)
            if self.report.left < needed:
                row.update(status="skipped", reason=f"{self.report.left:.0f} s left, about {needed:.0f} s needed")
                continue
            self.report.watch(f"{name}, {p.op}, {p.name}", 4 * needed + PATIENCE)
            t0 = time.time()
            try:
                self.measure(bench, p, row, firsts)
                row.update(status="ok", reason=None)
            except Exception as error:
                if isinstance(error, NotImplementedError):
                    row.update(status="absent", reason=last_lines(str(error), 1, 300))
                elif self.timing.is_out_of_memory(error):
                    row.update(status="out of memory", reason=last_lines(str(error), 1, 300))
                else:
                    row.update(status="failed", reason=last_lines(traceback.format_exc()))
            row["seconds"] = round(time.time() - t0, 2)
            if row["status"] != "ok":
                self.tidy()
                self.check_context(row)
            self.report.save()
            said = f"{row['median_ms']:.4g} ms" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
            print(f"{name} | {p.op} | {p.name} | {said}".replace("\n", " ")[:200], flush=True)
        mine = [r for r in rows if r["group"] == name]
        bad = [f"{r['op']} {r['provider']}: {r['status']}" for r in mine if r["status"] != "ok"]
        if len(bad) < len(mine):
            entry.update(status="ran", reason="; ".join(bad) or None)
        else:
            same = {r["status"] for r in mine}
            entry.update(status=same.pop() if len(same) == 1 else "failed", reason=mine[0]["reason"])

    def check_context(self, row: dict) -> None:
        """After a failure: is the CUDA context still good? If not, leave the rest to a new process."""
        if not self.cuda:
            return
        try:
            self.torch.cuda.synchronize()
            float(self.torch.ones(1, device="cuda"))
        except Exception as error:
            row.update(status="failed", reason=f"{row['reason']}\nCUDA context lost: {last_lines(str(error), 1, 200)}")
            self.report.save()
            print(f"CUDA context lost in {row['group']}, {row['op']}, {row['provider']}", flush=True)
            os._exit(CUDA_LOST)

    def measure(self, bench, p, row: dict, firsts: dict) -> None:
        is_step = p.op.startswith("step")
        t0 = time.perf_counter()
        job = p.make(bench)
        _, out = self.timer.once(job)
        row["first_call_s"] = round(time.perf_counter() - t0, 3)
        if is_step:
            row.update(loss=float(out), grad_norm=self.timing.norm(job.grads()))
        elif p.compare and self.is_first(row):
            firsts.clear()
            firsts[p.op] = out
        elif p.compare and p.op in firsts:
            row["compared_with"] = "ours"
            try:
                row["vs_ours"] = self.timing.difference(p.compare, firsts[p.op], out)
            except Exception:  # no reason to lose the time
                row.update(vs_ours=None, compare_failed=last_lines(traceback.format_exc(), 2))
        del out
        row.update(self.timer.measure(job, min(self.row_seconds, max(self.report.left, 0.1)), queued=not is_step))
        op = p.op_cost(bench.case)
        size, flops = (op.l2, op.flops) if op else (None, None)
        median = row["median_ms"]
        row.update(
            bytes=size, flops=flops, gb_s=size / median / 1e6 if size else None,
            tflop_s=flops / median / 1e9 if flops else None, predicted_us=None, measured_over_predicted=None,
        )  # fmt: skip
        seconds = p.predicted_seconds(bench.case, self.gpu) if self.gpu else None
        if seconds is not None:
            row.update(predicted_us=1e6 * seconds, measured_over_predicted=1e-3 * median / seconds)
        if is_step:
            self.compare_steps(row["case"], row["op"])

    def is_first(self, row: dict) -> bool:
        rows = self.report[row["section"]]["rows"]
        return next(r for r in rows if (r["group"], r["op"]) == (row["group"], row["op"])) is row

    def compare_steps(self, case: str, op: str) -> None:
        """Each provider against ours in the same precision, ours against our fp32: time, loss, gradient norm."""

        def apart(a, b):  # a NaN that has been through the file is a string
            return abs(float(a) - float(b)) / max(abs(float(b)), 1e-30)

        rows = self.report["timings"]["rows"]
        rows = {r["provider"]: r for r in rows if (r["case"], r["op"]) == (case, op) and "median_ms" in r}
        for name, row in rows.items():
            precision = name.split(" ", 1)[1].removesuffix(" stable sort")
            partner = rows.get("ours fp32" if name.startswith("ours") else f"ours {precision}")
            if partner is None or partner is row:
                continue
            row["compared_with"] = partner["provider"]
            row["vs_ours"] = apart(row["loss"], partner["loss"])
            row["grad_norm_vs_ours"] = apart(row["grad_norm"], partner["grad_norm"])
            row["times_ours"] = row["median_ms"] / partner["median_ms"]

    def profile(self, bench, name: str, provider, entry: dict) -> None:
        """The kernels of a few runs by device time."""
        if self.report.left < (self.needed(provider) if self.cuda else 2):
            entry.update(status="skipped", reason=f"{self.report.left:.0f} s left of the time limit")
            return
        self.report.watch(name, 4 * provider.seconds + PATIENCE)
        try:
            job = provider.make(bench)
            for _ in range(3):
                seconds, _ = self.timer.once(job)
            calls = 3
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda) as prof:
                for _ in range(calls):
                    self.timer.once(job)
            rows = [self.kernel_row(event, calls) for event in prof.key_averages()]
            rows = sorted((r for r in rows if r and r["us"] > 0), key=lambda r: -r["us"])
            table = {
                "name": name, "case": bench.case.name, "provider": f"{provider.op}, {provider.name}",
                "device": self.device, "per": "call, microseconds", "wall_us": round(1e6 * seconds, 1),
                "total_us": round(sum(r["us"] for r in rows), 1), "kernels": rows[:40],
            }  # fmt: skip
            self.report["profile"]["tables"].append(table)
            entry.update(status="ran", reason=None)
        except Exception:
            entry.update(status="failed", reason=last_lines(traceback.format_exc()))
            self.check_context({"group": name, "op": provider.op, "provider": provider.name, "reason": entry["reason"]})

    def kernel_row(self, event, calls: int) -> dict | None:
        if self.cuda:
            if "CUDA" not in str(getattr(event, "device_type", "CUDA")):
                return None  # an operator: its kernels stand for themselves
            us = getattr(event, "self_device_time_total", None)
            us = getattr(event, "self_cuda_time_total", 0) if us is None else us
        else:
            us = event.self_cpu_time_total
        return {"name": event.key[:120], "calls": event.count / calls, "us": round(us / calls, 2)}


# -------------------------------------------------------------------------------------------- parent: the worker's life


def supervise(report: Report) -> Report:
    """Runs workers until one ends well, time is up, or too many have died. Returns the report as it then is."""
    progress = -1
    while report.data["workers"] < MAX_WORKERS and report.left > 3:
        done = len(report.rows()) + sum(e["status"] != "not run" for e in report["timings"]["groups"])
        if done == progress:  # two in a row died before they had begun anything
            break
        progress = done
        report.data["workers"] += 1
        report.watch("start of the worker", 150)
        child = start(this("--worker", str(report.path)))
        reason = None
        try:
            while child.poll() is None and reason is None:
                time.sleep(0.3)
                if report.left < -report.grace:
                    reason = "stopped at the time limit"
                    break
                watch = Report.load(report.path).data["watch"]
                if watch and time.time() > watch["until"]:
                    reason = f"no sign of life in {watch['what']}: taken for a hang and stopped"
        finally:
            stop(child)
        report = Report.load(report.path)
        if reason is None and child.returncode == 0:
            break
        reason = reason or f"the worker ended with exit code {child.returncode}"
        if report.data.get("worker_error"):
            reason += f"\n{report.data.pop('worker_error')}"
        print(f"[worker {report.data['workers']}] {reason}", flush=True)
        for row in report.rows():
            if row["status"] == "running":
                row.update(status="failed", reason=reason)
        for entry in report["timings"]["groups"]:
            # a profile has no rows to go on behind: not again
            if entry["status"] == "running" and entry["name"].startswith("profile"):
                entry.update(status="failed", reason=reason)
        for name in ("timings", "profile", "ceilings"):
            if report[name]["status"] in ("running", "not run"):
                report[name]["reason"] = reason
        report.save()
    for name in ("timings", "profile", "ceilings"):
        if report[name]["status"] == "not run" and report[name]["reason"] == "not reached":
            report[name]["reason"] = f"{report.left:.0f} s left of the time limit"
        if report[name]["status"] == "running":
            entries = report[name].get("rows", report[name].get("tables"))
            report[name]["status"] = "ran in part" if entries else "failed"
    for entry in report["timings"]["groups"]:
        if entry["status"] == "running":
            entry["status"] = "ran in part"
    return report


# -------------------------------------------------------------------------------------------------------------- summary


def summary(data: dict, limit: int = 11000) -> str:
    """What fits in a terminal: ratios to ours, side by side."""
    parts = data["sections"]
    tops = {r["op"]: r for r in parts["ceilings"]["rows"] if r["status"] == "ok"}
    legend = (
        "Tables: median ms [p20 p80] x times the first row, peak MiB; x times ours in the same precision, relative\n"
        "difference from ours (steps: loss and gradient norm) m/p measured over predicted by the cost model | GB/s\n"
        "TFLOP/s (share of the copy's and the GEMM's)"
    )
    text = "\n".join([*_summary_head(data), *_summary_ceilings(tops), legend])
    groups: dict[str, list[dict]] = {}
    for r in parts["timings"]["rows"]:
        title = f"{r['op']} {r['case']}" if r["op"].startswith("step") else r["group"]
        groups.setdefault(title, []).append(r)
    blocks = [_summary_table(title, rows, tops) for title, rows in groups.items()]
    blocks[2:2] = [_summary_profile(table) for table in parts["profile"]["tables"]]
    for i, block in enumerate(blocks):
        if len(text) + len(block) > limit:
            return f"{text}\n({len(blocks) - i} more tables in the JSON)"
        text += "\n" + block
    return text


def _summary_head(data: dict) -> list[str]:
    parts = data["sections"]
    env, ver, mem = parts["environment"], parts["verify"], parts["memory_checker"]
    device = (env.get("gpu") or {}).get("name") if data["device"] == "cuda" else "CPU (tiny shapes: times mean nothing)"
    commit_ = f"{str(env.get('commit'))[:10]}{' dirty' if env.get('dirty') else ''}"
    lines = [
        f"sparc_kernels gpu_report: {device}, torch {env.get('torch')}, triton {env.get('triton')}, commit {commit_}",
        f"{'complete' if data['complete'] else data['stopped']}; workers {data['workers']}",
        f"verify: {ver['status']}, verified {ver.get('verified', False)}, {ver.get('counts') or ver['reason']}",
    ]
    lines += [f"  NOT PASSED {json.dumps(row)[:230]}" for row in ver.get("failed", [])[:6]]
    model = data.get("cost_model") or {"gpu": None, "reason": "nothing was timed"}
    lines.append(f"cost model: {model['gpu'] or 'no predictions, ' + model['reason']}")
    lines.append(f"memory checker: {mem['status']} {mem['reason'] or ''}"[:200])
    lines += [f"  {r['tool']}: {r['status']} {' '.join(r.get('summary', []))}"[:150] for r in mem.get("runs", [])]
    for name in ("timings", "profile", "ceilings"):
        if parts[name]["status"] != "ran":
            reason = str(parts[name]["reason"]).replace("\n", " ")
            lines.append(f"{name}: {parts[name]['status']}: {reason}"[:400])
    return lines


def _summary_ceilings(tops: dict) -> list[str]:
    lines = []
    for op, r in tops.items():
        rate = f"{r['tflop_s']:.4g} TFLOP/s" if r["tflop_s"] else f"{r['gb_s']:.0f} GB/s"
        lines.append(f"ceiling {op} ({r['provider']}, {r['dtype']}): {r['median_ms']:.4f} ms, {rate}")
    return lines


def _summary_table(title: str, rows: list[dict], tops: dict) -> str:
    is_step = rows[0]["op"].startswith("step")
    lines = [f"-- {title}"]
    first: dict[str, float] = {}
    missed = []
    for r in rows:
        label = r["provider"] if is_step else f"{r['op']}: {r['provider']}"
        if r["status"] != "ok":
            why = (r["reason"] or "").splitlines()[-1:] if r["status"] == "failed" else []
            missed.append(" ".join([label, r["status"], *(line[:90] for line in why)]))
            continue
        first.setdefault(r["op"], r["median_ms"])
        line = f"{label[:30]:30} {r['median_ms']:8.4g} [{r['p20_ms']:.4g} {r['p80_ms']:.4g}]"
        line += f" x{r['median_ms'] / first[r['op']]:.2f}"
        line += f" {r['peak_mib']:.0f}" if r["peak_mib"] is not None else ""
        extra = [f"x{r['times_ours']:.2f}"] if "times_ours" in r else []
        extra += [f"{float(r[key]):.0e}" for key in ("vs_ours", "grad_norm_vs_ours") if r.get(key) is not None]
        line += "; " + " ".join(extra) if extra else ""
        rates = []
        if r.get("measured_over_predicted"):
            line += f" m/p {r['measured_over_predicted']:.2f}"
        for key, top in (("gb_s", "copy"), ("tflop_s", "gemm")):
            if r[key]:
                share = f" ({100 * r[key] / tops[top][key]:.0f}%)" if top in tops else ""
                rates.append(f"{r[key]:.3g}{share}")
        lines.append(line + (" | " + " ".join(rates) if rates else ""))
    if missed:
        lines.append(("   not measured: " + "; ".join(missed))[:600])
    return "\n".join(lines)


def _summary_profile(table: dict) -> str:
    kernels = [f"  {k['us']:9.1f} us x{k['calls']:.0f} {k['name'][:60]}" for k in table["kernels"][:9]]
    total = f"-- {table['name']}: kernels {table['total_us']:.0f} us of {table['wall_us']:.0f} us wall"
    return "\n".join([total, *kernels])


# ----------------------------------------------------------------------------------------------------------------- main


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the whole run (default 8)")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<gpu-or-cpu>_<date>_<commit>.json")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--skip", default="", help="sections to leave out: verify,memory_checker,timings")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.skip = {name for name in args.skip.split(",") if name}
    if args.skip - set(SECTIONS):
        parser.error(f"--skip: expected sections among {', '.join(SECTIONS)}, got {', '.join(sorted(args.skip))}")
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a number > 0, got {args.minutes}")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if args.probe:
        print("\n" + json.dumps(probe()))
        return 0
    if args.exercise:
        exercise()
        return 0
    if args.worker:
        faulthandler.enable()
        report = Report.load(args.worker)
        try:
            Worker(report).run()
        except Exception:
            report.data["worker_error"] = last_lines(traceback.format_exc())
            report.save()
            raise
        return 0

    started = time.time()
    # a polite stop, such as a scheduler's time limit, ends the children and the file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    exit_code, output = run_limited(this("--probe"), min(150, 30 * args.minutes))
    found = {"torch": None, "gpu": None, "probe": last_lines(output)}
    if exit_code == 0:
        found = json.loads(output.strip().splitlines()[-1])
    device = ("cuda" if found["gpu"] else "cpu") if args.device == "auto" else args.device
    code = commit()
    gpu = found["gpu"] if device == "cuda" else None
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu"
    out = args.out or ROOT / "benchmarks" / "results" / f"{name}_{now()[:10]}_{(code['commit'] or 'nocommit')[:7]}.json"
    report = Report.new(out.resolve(), device, args.minutes, started)
    print(f"writing {report.path}", flush=True)
    try:
        with section(report, "environment") as entry:
            environment(entry, found, code)
        for part, run in (("verify", verify), ("memory_checker", memory_checker)):
            if part in args.skip:
                report[part].update(status="skipped", reason="asked for with --skip")
                continue
            with section(report, part) as entry:
                run(report, entry)
        if "timings" in args.skip:
            for part in ("timings", "profile", "ceilings"):
                report[part].update(status="skipped", reason="asked for with --skip")
        else:
            report = supervise(report)
        ran = all(report[part]["status"] in ("ran", "absent", "skipped") for part in SECTIONS)
        why = None if ran else f"not everything ran within {args.minutes:g} minutes: see the sections' reasons"
        report.data.update(complete=ran, stopped=why)
    except (KeyboardInterrupt, SystemExit) as stopped:
        with contextlib.suppress(OSError, ValueError):
            report = Report.load(report.path)
        report.data["stopped"] = str(stopped) or "interrupted"
    if device == "cuda" and report.left > -report.grace:
        report["environment"]["state_at_end"] = gpu_state((found["gpu"] or {}).get("uuid"))
    report.data.update(finished=now(), seconds=round(time.time() - started, 1), watch=None)
    report.save()
    print("\n" + summary(report.data), flush=True)
    print(f"{report.data['seconds']} s; {report.path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
