"""Everything a first look at a GPU should bring back, in one command and one JSON file.

    python benchmarks/gpu_report.py [--minutes 8] [--out FILE] [--device auto|cuda|cpu] [--skip SECTION,...]

Sections, the most telling first: verify (`sparc-kernels verify`), measurements (`python -m benchmarks`),
memory_checker (compute-sanitizer over every kernel). The file is the benchmarks' record (docs/benchmarks.md) with
`sections` beside; it is replaced atomically after every row, so a run that is killed leaves what it had; whatever did
not run says why. On a CPU the same code runs at tiny shapes: its numbers mean nothing and are marked `device: cpu`,
`tiny: true`.

Three processes keep a fault from costing more than one row. This one never touches the GPU: it starts the others with
time limits and watches the worker that measures. When that crashes, hangs or loses its CUDA context, the provider in
progress is marked and a new worker goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import glob
import json
import os
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

from benchmarks import environment, record  # noqa: E402  torch is not imported here

SECTIONS = ("verify", "measurements", "memory_checker")
MAX_WORKERS = 10
MEASURE_UNTIL = 0.85  # share of the time; the memory checker has the rest


def last_lines(text: str, lines: int = 4, chars: int = 700) -> str:
    return "\n".join([line for line in text.strip().splitlines() if line.strip()][-lines:])[-chars:]


# ------------------------------------------------------------------------------------------------------------- the file


class Report:
    """The record, in memory and on disk. One process at a time writes it."""

    def __init__(self, path: Path, device: str, minutes: float, started: float):
        self.path, self.device, self.minutes, self.started = path, device, minutes, started
        self.data: dict = {}
        self.sections = {name: {"status": "not run", "reason": "not reached"} for name in SECTIONS}

    def read(self) -> None:
        """What the worker has written."""
        self.data = record.load(self.path)

    def save(self) -> None:
        self.data["sections"] = self.sections
        record.save(self.path, self.data)

    def __getitem__(self, section: str) -> dict:
        return self.sections[section]

    @property
    def left(self) -> float:
        return self.started + 60 * self.minutes - time.time()

    @property
    def grace(self) -> float:
        """How far past the limit something already begun may finish."""
        return min(20.0, 2 + 6 * self.minutes)


@contextlib.contextmanager
def section(report: Report, name: str):
    """Runs one section; a failure is recorded and passed over."""
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


def suite(report: Report, options: list[str], *more: str) -> list[str]:
    """`python -m benchmarks` on this report's file."""
    tiny = [] if report.device == "cuda" else ["--tiny", "--threads", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--device", report.device, "--out", str(report.path)]
    return [*command, "--minutes", f"{report.minutes:g}", *tiny, *options, *more]


# --------------------------------------------------------------------------------------------------------------- verify


def verify(report: Report, entry: dict) -> None:
    """`sparc_kernels verify` in a process of its own: a CUDA fault there ends nothing here."""
    on_gpu = report.device == "cuda"
    entry["verified"] = False
    tries = [[], ["--quick"]] if on_gpu else [["--quick"]]
    for extra in tries:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "verify.json"
            command = [sys.executable, "-m", "sparc_kernels", "verify", *extra, "--json", str(result)]
            # the whole of it is worth a quarter of the time; when that was not enough, its kernels are compiled by now
            seconds = min(180, (0.15 if on_gpu and extra else 0.25) * 60 * report.minutes, report.left - 2)
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
    if report.device != "cuda":
        entry.update(status="skipped", reason="no CUDA device")
        return
    tool, searched = find_sanitizer()
    if tool is None:
        entry.update(status="absent", reason=f"compute-sanitizer is in none of {', '.join(searched)}")
        return
    entry.update(path=tool, runs=[])
    for check in ("memcheck", "racecheck"):
        seconds = min(90.0, report.left - 5)
        run = {"tool": check, "limit_s": round(seconds, 1)}
        entry["runs"].append(run)
        if seconds < 10:
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


# --------------------------------------------------------------------------------------------------------- measurements


def begin(report: Report, options: list[str]) -> None:
    """The record with its environment and providers, made by a process that may touch the GPU."""
    code, output = run_limited(suite(report, options, "--begin"), 150)
    if code != 0 or not report.path.exists():
        raise SystemExit(f"the benchmarks do not start: exit code {code}\n{last_lines(output, 8, 1500)}")
    report.read()
    report.data["deadline"] = int(report.started + MEASURE_UNTIL * 60 * report.minutes)
    report.save()


def measure(report: Report, entry: dict, options: list[str]) -> None:
    """Runs workers until one ends well, time is up, or too many have died."""
    limit = report.data["deadline"] + report.grace
    died: list[str] = []
    idle = 0  # workers that died before they had begun anything
    entry["workers"] = 0
    while entry["workers"] < MAX_WORKERS and report.data["deadline"] - time.time() > 3:
        entry["workers"] += 1
        known = len(report.data["results"])
        if report.data.get("active"):  # what the last one died in: the next marks it, and is given time to start
            report.data["active"]["until"] = int(time.time() + 150)
        report.save()
        child, began, reason = start(suite(report, options, "--resume")), time.time(), None
        try:
            while child.poll() is None and reason is None:
                time.sleep(0.3)
                if time.time() > limit:
                    reason = "stopped at the time limit"
                    break
                active = json.loads(report.path.read_text()).get("active")
                if time.time() > (active["until"] if active else began + 150):
                    what = f"{active['group']}, {active['provider']}" if active else "its start"
                    reason = f"no sign of life in {what}: taken for a hang and stopped"
        finally:
            stop(child)
        report.read()
        if reason is None and child.returncode == 0:
            break
        reason = reason or f"the worker ended with exit code {child.returncode}"
        died.append(reason)
        report.data["died"] = reason
        brought = len(report.data["results"]) > known
        idle = 0 if report.data.get("active") or brought else idle + 1
        if idle == 2:
            break
        report.save()
        print(f"[worker {entry['workers']}] {reason}", flush=True)
    bury(report)
    report.data.pop("died", None)
    cut = None if report.data["complete"] else report.data["stopped"]
    ran = "ran" if report.data["results"] else "failed"
    entry.update(status="ran in part" if cut and report.data["results"] else ran, reason=cut, died=died)
    if not report.data["results"]:
        entry["reason"] = died[-1] if died else "no time was left"


def bury(report: Report) -> None:
    """What the last worker died in has no row yet when no other came after it."""
    active = report.data.get("active")
    if active:
        report.data.setdefault("groups", []).append(
            {"name": active["group"], "status": "failed", "reason": f"{active['provider']}: {report.data.get('died')}"}
        )
        report.data["active"] = None


# -------------------------------------------------------------------------------------------------------------- summary


def summary(report: Report, limit: int = 11000) -> str:
    """What fits in a terminal: the sections, then the benchmarks' own tables."""
    from benchmarks.report import terminal

    ver, mem, got = (report[name] for name in ("verify", "memory_checker", "measurements"))
    device = report.data["environment"]["device_name"]
    lines = [
        f"sparc_kernels gpu_report: {device if report.device == 'cuda' else 'CPU (tiny shapes: times mean nothing)'}",
        f"verify: {ver['status']}, verified {ver.get('verified', False)}, {ver.get('counts') or ver['reason']}",
    ]
    lines += [f"  NOT PASSED {json.dumps(row)[:230]}" for row in ver.get("failed", [])[:6]]
    lines.append(f"memory checker: {mem['status']} {mem['reason'] or ''}"[:200])
    lines += [f"  {r['tool']}: {r['status']} {' '.join(r.get('summary', []))}"[:150] for r in mem.get("runs", [])]
    lines.append(f"measurements: {got['status']}, workers {got.get('workers', 0)} {str(got['reason'] or '')[:300]}")
    text = "\n".join(lines)
    return text + "\n" + terminal(report.data, limit - len(text))


# ----------------------------------------------------------------------------------------------------------------- main


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the whole run (default 8)")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<gpu-or-cpu>_<date>_<commit>.json")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--official", type=Path, metavar="PATH", help="a clone of the official repository")
    parser.add_argument("--filter", default="", metavar="REGEX", help="as of python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="as of python -m benchmarks")
    parser.add_argument("--skip", default="", help=f"sections to leave out: {','.join(SECTIONS)}")
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
        print("\n" + json.dumps(environment.gpu()))
        return 0
    if args.exercise:
        exercise()
        return 0
    started = time.time()
    # a polite stop, such as a scheduler's time limit, ends the children and the file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    exit_code, output = run_limited(this("--probe"), 150)
    gpu = json.loads(output.strip().splitlines()[-1]) if exit_code == 0 else None
    device = ("cuda" if gpu else "cpu") if args.device == "auto" else args.device
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu and device == "cuda" else "cpu"
    sha = (environment.commit()["commit"] or "nocommit")[:7]
    out = args.out or ROOT / "benchmarks" / "results" / f"{name}_{environment.now()[:10]}_{sha}.json"
    report = Report(out.resolve(), device, args.minutes, started)
    out.unlink(missing_ok=True)
    print(f"writing {report.path}", flush=True)
    options = [*(["--quick"] if args.quick else []), *(["--filter", args.filter] if args.filter else [])]
    options += ["--official", str(args.official.resolve())] if args.official else []
    begin(report, options)
    stopped = None
    try:
        for part, run in (("verify", verify), ("measurements", None), ("memory_checker", memory_checker)):
            if part in args.skip:
                report[part].update(status="skipped", reason="asked for with --skip")
                continue
            with section(report, part) as entry:
                if part == "measurements":
                    measure(report, entry, options)
                else:
                    run(report, entry)
    except (KeyboardInterrupt, SystemExit) as error:
        with contextlib.suppress(OSError, ValueError):
            report.read()
        stopped = str(error) or "interrupted"
    missing = [part for part in SECTIONS if report[part]["status"] not in ("ran", "absent", "skipped")]
    if missing and not stopped:
        stopped = "; ".join(f"{part}: {report[part]['reason']}" for part in missing)
    report.data.update(
        complete=stopped is None, stopped=stopped, finished=environment.now(), seconds=round(time.time() - started, 1)
    )  # fmt: skip
    if device == "cuda" and report.left > -report.grace:
        report.data["environment"]["nvml_after"] = environment.gpu_state((gpu or {}).get("uuid"))
    report.save()
    print("\n" + summary(report), flush=True)
    print(f"{report.data['seconds']} s; {report.path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
