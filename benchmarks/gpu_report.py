"""Everything a first look at a GPU should bring back, in two calls that fit ten minutes each and more than suffice.

    python benchmarks/gpu_report.py --call correctness [--out FOLDER] [--minutes 6]
    python benchmarks/gpu_report.py --call timing [--out FOLDER] [--minutes 5] [--official CLONE]

correctness: kernels compiled on all cores; `sparc-kernels verify` and its adversarial sets, the exercise of every
kernel and the tests that need a GPU, side by side; then compute-sanitizer over the exercise, alone. Writes
correctness.json, verify.json, adversarial.json and correctness.txt. timing: the kernels compiled, then `python -m
benchmarks` on an idle GPU, what says most first. Writes timing.json, the benchmarks' record (docs/benchmarks.md). Both
have `sections`, replaced atomically as things end, so a call that is killed leaves what it had; whatever did not run
says why. From a bare checkout: nothing need be installed. On a CPU the same code runs at tiny shapes: its numbers mean
nothing and are marked `device: cpu`, `tiny: true`.

This process never touches the GPU: it starts the others with time limits and watches the worker that measures. When
that crashes, hangs or loses its CUDA context, the provider in progress is marked and a new worker goes on behind it.
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
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import environment, record  # noqa: E402  torch is not imported here
from sparc_kernels.core.console import ends_with_its_pipe  # noqa: E402  nor here

SCHEMA = "sparc_kernels.gpu_correctness/1"
CALLS = {  # minutes, sections in their order
    "correctness": (6.0, ("compile", "verify", "adversarial", "exercise", "contract", "memcheck", "racecheck")),
    "timing": (5.0, ("compile", "measurements")),
}
MAX_WORKERS = 10


def last_lines(text: str, lines: int = 4, chars: int = 700) -> str:
    return "\n".join([line for line in text.strip().splitlines() if line.strip()][-lines:])[-chars:]


# ------------------------------------------------------------------------------------------------------------- the file


class Report:
    """The JSON of a call, in memory and on disk. One process at a time writes it."""

    def __init__(self, folder: Path, call: str, device: str, minutes: float, started: float):
        self.folder, self.call, self.device = folder, call, device
        self.minutes, self.started = minutes, started
        self.path = folder / f"{call}.json"
        self.data: dict = {}
        self.sections = {name: {"status": "not run", "reason": "not reached"} for name in CALLS[call][1]}

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


# --------------------------------------------------------------------------------------------------------- subprocesses


_LIBC = ctypes.CDLL(None)  # before any fork


def _die_with_parent():
    """Linux: the child is killed when this process is, however that happens."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(command: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=_die_with_parent, **kwargs)


def stop(child: subprocess.Popen) -> None:
    """Ends a child and what it started, which may outlive it; it leads its own process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the driver must not hold us up
        child.wait(timeout=5)


@dataclass
class Part:
    """A section that is one process: what it is, how long it may take and how its output is read."""

    name: str
    command: list[str]
    seconds: float
    read: Callable[[dict, int | None, str], None] = lambda entry, code, output: None
    env: dict[str, str] = field(default_factory=dict)
    after: str | None = None  # a part that must have ended before


def run(report: Report, *parts: Part) -> None:
    """Parts side by side, each to its end or its limit. Their output goes to files of their own while they run, and to
    the call's text file afterwards."""
    waiting = [part for part in parts if report[part.name]["status"] != "skipped"]
    going: list[tuple[Part, subprocess.Popen, float]] = []
    try:
        while waiting or going:
            busy = {part.name for part in waiting} | {part.name for part, _, _ in going}
            for part in [part for part in waiting if part.after not in busy]:
                waiting.remove(part)
                child = _begun(report, part)
                if child:
                    going.append((part, child, time.time()))
            time.sleep(0.1)
            for one in [one for one in going if _over(report, *one)]:
                going.remove(one)
                _ended(report, *one)
    finally:
        for _, child, _ in going:
            stop(child)


def _begun(report: Report, part: Part) -> subprocess.Popen | None:
    """The process of a part, where there is time for it."""
    entry, seconds = report[part.name], min(part.seconds, report.left - 3)
    entry.update(command=" ".join(part.command), limit_s=round(seconds, 1))
    child = None
    if seconds < 2:
        entry.update(status="not run", reason=f"{max(report.left, 0):.0f} s left of the time limit")
    else:
        entry.update(status="running", reason="killed while it ran")
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": PATHS, **part.env}
        with _output(report, part).open("w") as output:
            child = start(part.command, stdout=output, stderr=subprocess.STDOUT, env=env)
    report.save()
    return child


def _over(report: Report, part: Part, child: subprocess.Popen, began: float) -> bool:
    return child.poll() is not None or time.time() > began + report[part.name]["limit_s"]


PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _output(report: Report, part: Part) -> Path:
    return report.folder / f"{part.name}.txt"


def _ended(report: Report, part: Part, child: subprocess.Popen, began: float) -> None:
    """What became of a part; its exit code is None when it was stopped at its limit."""
    code = child.poll()
    stop(child)
    entry, file = report[part.name], _output(report, part)
    output = file.read_text(errors="replace")
    entry.update(exit_code=code, seconds=round(time.time() - began, 1), output_tail=last_lines(output, 12, 2500))
    if code is None:
        entry.update(status="timed out", reason=f"stopped after {entry['limit_s']:.0f} s")
    elif code:
        entry.update(status="failed", reason=f"exit code {code}: {last_lines(output, 3)}")
    else:
        entry.update(status="ran", reason=None)
    try:
        part.read(entry, code, output)
    except Exception:
        entry.update(status="failed", reason=last_lines(traceback.format_exc()))
    report.save()
    with (report.folder / f"{report.call}.txt").open("a") as whole:
        whole.write(f"==== {part.name}: {entry['status']}\n{output}\n")
    file.unlink()
    print(f"[{part.name}] {entry['status']}, {entry['seconds']} s {entry['reason'] or ''}", flush=True)


def module(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", *words]


def compiling(report: Report, seconds: float) -> Part:
    """Every kernel that the call launches, into Triton's cache."""
    tiny = [] if report.device == "cuda" else ["--tiny", "--arch", "90"]

    def read(entry: dict, code: int | None, output: str) -> None:
        if code == 0:
            found = json.loads(output.strip().splitlines()[-1])
            entry.update(kernels=found["kernels"], cpu_seconds=round(found["cpu_seconds"], 1), errors=found["errors"])
            if entry["errors"]:
                entry.update(status="failed", reason=f"{len(entry['errors'])} kernels do not compile")
        elif "Triton is not installed" in output:
            entry.update(status="absent", reason="Triton is not installed")

    # a process that compiles must not be told to interpret
    return Part("compile", module("benchmarks.ahead", report.call, *tiny), seconds, read, {"TRITON_INTERPRET": "0"})


# ---------------------------------------------------------------------------------------------------------- correctness


def correctness(report: Report) -> None:
    """Its parts, each of which the others survive."""
    cuda = report.device == "cuda"
    whole = 60 * report.minutes
    verdicts, exact = report.folder / "verify.json", report.folder / "adversarial.json"
    verdicts.unlink(missing_ok=True)
    exact.unlink(missing_ok=True)

    def read_verify(entry: dict, code: int | None, output: str) -> None:
        entry["verified"] = False
        if verdicts.exists():
            read_verdicts(entry, json.loads(verdicts.read_text()))
        if code == 0:
            entry["verified"] = entry.get("rows", 0) > 0 and not entry["failed"]
        elif code is not None:
            reason = f"{len(entry['failed'])} of {entry['rows']} not passed" if entry.get("failed") else "no verdict"
            entry.update(status="failed", reason=f"exit code {code}: {reason}")

    tests = needing_a_gpu()
    names = [name for some in tests.values() for name in some]
    # by file and name: one that cannot be imported, where a library is missing, leaves the others
    options = ("-q", "-p", "no:cacheprovider", "-rfE", "--continue-on-collection-errors", "-k", " or ".join(names))
    pytest = module("pytest", *options, *tests)
    quick = [] if cuda else ["--quick"]

    def read_contract(entry: dict, code: int | None, output: str) -> None:
        if "No module named pytest" in output:
            entry.update(status="absent", reason="pytest is not installed")
        entry.update(tests=names, summary=last_lines(output, 1))

    verify = module("sparc_kernels", "verify", *quick, "--json", str(verdicts))
    few = [] if cuda else ["--quick", "--filter", "ties|N = 3"]
    adversarial = module("sparc_kernels", "verify", "--adversarial", *few, "--json", str(exact))
    run(
        report,
        compiling(report, 0.35 * whole),
        Part("verify", verify, 0.55 * whole, read_verify),
        Part("adversarial", adversarial, 0.3 * whole, after="compile"),
        Part("contract", pytest, 0.5 * whole, read_contract, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        Part("exercise", module("benchmarks.exercise"), 0.3 * whole, read_exercise, after="compile"),
    )
    tool, searched = find_sanitizer()
    for check in ("memcheck", "racecheck"):
        if not cuda:
            report[check].update(status="skipped", reason="no CUDA device")
        elif tool is None:
            report[check].update(status="absent", reason=f"compute-sanitizer is in none of {', '.join(searched)}")
        else:
            command = [tool, "--tool", check, "--error-exitcode", "86", *module("benchmarks.exercise")]
            # every tensor its own allocation, so that a read past its end is seen
            run(report, Part(check, command, 0.4 * whole, read_sanitizer, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))


def needing_a_gpu() -> dict[str, list[str]]:
    """The tests that are skipped without one: names by file."""
    mark = re.compile(r"@pytest\.mark\.skipif\(not CUDA,.*\n(?:@.*\n)*def (test_\w+)")
    found = {f"tests/{f.name}": mark.findall(f.read_text()) for f in sorted((ROOT / "tests").glob("test_*.py"))}
    return {file: names for file, names in found.items() if names}


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


def read_exercise(entry: dict, code: int | None, output: str) -> None:
    entry["exercised"] = [line for line in output.splitlines() if line.startswith("exercised")]


def read_sanitizer(entry: dict, code: int | None, output: str) -> None:
    """Clean when the tool says so; what was exercised up to a time limit counts for something."""
    read_exercise(entry, code, output)
    entry["summary"] = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    entry["clean"] = code == 0 and bool(entry["summary"])
    if not entry["clean"]:
        entry["output_head"] = "\n".join(line for line in output.splitlines() if line.startswith("====="))[:3000]
    if code == 0 and not entry["summary"]:
        entry.update(status="failed", reason="no summary in its output")


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


# --------------------------------------------------------------------------------------------------------------- timing


def suite(report: Report, options: list[str], *more: str) -> list[str]:
    """`python -m benchmarks` on this report's file."""
    tiny = [] if report.device == "cuda" else ["--tiny", "--threads", "1"]
    command = [*module("benchmarks"), "--device", report.device, "--out", str(report.path), "--quick"]
    return [*command, "--seconds", "0.4" if not tiny else "0.01", "--minutes", f"{report.minutes:g}", *tiny, *options,
            *more]  # fmt: skip


def timing(report: Report, options: list[str]) -> None:
    begin(report, options)
    run(report, compiling(report, min(75.0, 15 * report.minutes)))
    entry = report["measurements"]
    if entry["status"] == "skipped":
        return
    t0 = time.time()
    entry.update(status="running", reason="killed while it ran")
    try:
        measure(report, entry, options)
    except Exception:
        entry.update(status="failed", reason=last_lines(traceback.format_exc()))
    finally:
        entry["seconds"] = round(time.time() - t0, 1)
        report.save()
    print(f"[measurements] {entry['status']}, {entry['seconds']} s", flush=True)


def begin(report: Report, options: list[str]) -> None:
    """The record with its environment and providers, made by a process that may touch the GPU."""
    done = limited(suite(report, options, "--begin"), 150)
    if done.returncode != 0 or not report.path.exists():
        said = last_lines(done.stdout, 8, 1500)
        raise SystemExit(f"the benchmarks do not start: exit code {done.returncode}\n{said}")
    report.read()
    report.data["deadline"] = int(report.started + 60 * report.minutes - 8)  # for what is under way then, and the end
    report.save()


def limited(command: list[str], seconds: float) -> subprocess.CompletedProcess:
    """A short command to its end; exit code 124 at its limit."""
    child = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={
        **os.environ, "PYTHONPATH": PATHS})  # fmt: skip
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "")
    finally:
        stop(child)
    return subprocess.CompletedProcess(command, child.returncode, output)


def measure(report: Report, entry: dict, options: list[str]) -> None:
    """Runs workers until one ends well, time is up, or too many have died."""
    limit = report.data["deadline"] + 5
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
    killed = report.data.pop("died", None)
    # a worker that was stopped had no time to say so
    cut = None if report.data["complete"] else killed or report.data["stopped"]
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


# ----------------------------------------------------------------------------------------------------------------- main


def summary(report: Report, limit: int = 11000) -> str:
    """What fits in a terminal: the sections, then the benchmarks' own tables."""
    device = "CPU (tiny shapes: times mean nothing)"
    if report.device == "cuda":
        device = report.data["environment"]["device_name"]
    text = f"sparc_kernels gpu_report, {report.call}: {device}\n{summary_of(report.sections)}"
    if report.call == "timing":
        from benchmarks.report import refused, terminal

        text = "\n".join([text, *refused(report.data)[:25]])
        text += "\n" + terminal(report.data, limit - len(text))
    return text[:limit]


def summary_of(sections: dict) -> str:
    """What failed first, with the end of its output."""
    lines, good = [], ("ran", "absent", "skipped")
    for name, entry in sorted(sections.items(), key=lambda item: item[1]["status"] in good):
        figures = [f"{word} {entry[word]}" for word in ("kernels", "cpu_seconds", "counts", "summary") if word in entry]
        said = [entry["status"], f"{entry['seconds']} s" if "seconds" in entry else "", entry["reason"] or "", *figures]
        lines.append(f"{name}: {' '.join(filter(None, said))}"[:400])
        lines += [f"  NOT PASSED {json.dumps(row)[:230]}" for row in entry.get("failed", [])[:20]]
        lines += [f"  {kernel}: {error}"[:230] for kernel, error in entry.get("errors", [])[:10]]
        if entry["status"] not in good:
            lines += [f"  | {line[:200]}" for line in entry.get("output_tail", "").splitlines()]
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--call", choices=CALLS, help="which of the two")
    parser.add_argument("--minutes", type=float, help="time limit (default: correctness 6, timing 5)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default a new one under benchmarks/results")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--official", type=Path, metavar="PATH", help="timing: a clone of the official repository")
    parser.add_argument("--filter", default="", metavar="REGEX", help="timing: as of python -m benchmarks")
    parser.add_argument("--skip", default="", help="sections to leave out, with commas between them")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.probe:
        return args
    if args.call is None:
        parser.error("--call: expected correctness or timing, each a call of its own, got none")
    args.minutes = CALLS[args.call][0] if args.minutes is None else args.minutes
    args.skip = {name for name in args.skip.split(",") if name}
    sections = CALLS[args.call][1]
    if args.skip - set(sections):
        parser.error(f"--skip: expected sections among {', '.join(sections)}, got {', '.join(sorted(args.skip))}")
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a number > 0, got {args.minutes}")
    return args


def probe() -> None:
    """The environment as JSON, from a process that may touch the GPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("\n" + json.dumps(environment.environment(device, torch.get_num_threads())))


@ends_with_its_pipe
def main(argv=None) -> int:
    args = parse(argv)
    if args.probe:
        probe()
        return 0
    started = time.time()
    # a polite stop, such as a scheduler's time limit, ends the children and the file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    done = limited([sys.executable, str(Path(__file__).resolve()), "--probe"], 150)
    if done.returncode:
        raise SystemExit(f"PyTorch does not start: exit code {done.returncode}\n{last_lines(done.stdout, 8, 1500)}")
    about = json.loads(done.stdout.strip().splitlines()[-1])
    device = about["device"] if args.device == "auto" else args.device
    if device == "cuda" and about["device"] != "cuda":
        raise SystemExit("--device cuda: PyTorch sees no GPU here; use --device cpu")
    name = re.sub(r"[^a-z0-9]+", "-", about["device_name"].lower()).strip("-") if device == "cuda" else "cpu"
    sha = (about["commit"] or "nocommit")[:7]
    folder = (args.out or ROOT / "benchmarks" / "results" / f"{name}_{about['date'][:10]}_{sha}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, args.call, device, args.minutes, started)
    for old in (report.path, folder / f"{args.call}.txt"):
        old.unlink(missing_ok=True)
    for part in args.skip:
        report[part].update(status="skipped", reason="asked for with --skip")
    print(f"writing {report.path}", flush=True)
    stopped = None
    try:
        if args.call == "correctness":
            report.data = {
                "schema": SCHEMA, "complete": False, "stopped": "still running, or killed",
                "started": environment.now(), "finished": None, "seconds": None, "environment": about,
                "settings": {"device": device, "tiny": device == "cpu", "minutes": args.minutes},
            }  # fmt: skip
            report.save()
            correctness(report)
        else:
            options = ["--filter", args.filter] if args.filter else []
            timing(report, [*options, *(["--official", str(args.official.resolve())] if args.official else [])])
    except (KeyboardInterrupt, SystemExit, BrokenPipeError) as error:
        if not report.data:
            raise
        with contextlib.suppress(OSError, ValueError):
            report.data = json.loads(report.path.read_text())
        gone = isinstance(error, BrokenPipeError)
        stopped = "the reader of the output has gone" if gone else str(error) or "interrupted"
    missing = [part for part in report.sections if report[part]["status"] not in ("ran", "absent", "skipped")]
    if missing and not stopped:
        stopped = "; ".join(f"{part}: {report[part]['reason']}" for part in missing)
    report.data.update(
        complete=stopped is None, stopped=stopped, finished=environment.now(), seconds=round(time.time() - started, 1)
    )  # fmt: skip
    if device == "cuda":
        report.data["environment"]["nvml_after"] = environment.gpu_state((about["gpu"] or {}).get("uuid"))
    report.save()
    print("\n" + summary(report), flush=True)
    print(f"{report.data['seconds']} s; {report.path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
