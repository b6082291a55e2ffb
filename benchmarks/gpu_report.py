"""Everything that a first look at a GPU should bring back, in two calls of ten minutes at most.

    python benchmarks/gpu_report.py --call correctness [--out FOLDER] [--minutes 6]
    python benchmarks/gpu_report.py --call timing [--out FOLDER] [--minutes 5] [--official CLONE]

correctness: kernels compiled on all cores; `sparc-kernels verify` and its adversarial sets, the exercise of every
kernel and the tests that need a GPU, side by side; then compute-sanitizer over the exercise, alone. Writes
correctness.json, verify.json, adversarial.json and correctness.txt. timing: the kernels compiled, the host's time of a
step (`python -m benchmarks host`), then `python -m benchmarks` on an idle GPU. Writes timing.json, the benchmarks'
record (docs/benchmarks.md). Both have `sections`, replaced atomically as things end, so a call that is killed leaves
what it had; a section that did not run says why.
Nothing need be installed but PyTorch and Triton. On a CPU the same code runs at tiny shapes: its times mean nothing
and are marked `device: cpu`, `tiny: true`.

This process never touches the GPU: it starts the others with time limits. When the worker that measures crashes, hangs
or loses its CUDA context, a new one goes on behind the provider whose turn it was.
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
from collections import Counter
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
    "timing": (5.0, ("compile", "host", "measurements")),
}
GOOD = ("ran", "absent", "skipped")
START_SECONDS = 150  # of a process that imports torch and meets the GPU


def last_lines(text: str, lines: int = 4, chars: int = 700) -> str:
    return "\n".join([line for line in text.strip().splitlines() if line.strip()][-lines:])[-chars:]


class Report:
    """The JSON of a call, in memory and on disk. One process at a time writes it."""

    def __init__(self, folder: Path, call: str, device: str, minutes: float, started: float):
        self.folder, self.call, self.device = folder, call, device
        self.minutes, self.end = minutes, started + 60 * minutes
        self.path = folder / f"{call}.json"
        self.data: dict = {}
        self.sections = {name: {"status": "not run", "reason": "not reached"} for name in CALLS[call][1]}

    def save(self) -> None:
        self.data["sections"] = self.sections
        record.save(self.path, self.data)

    def __getitem__(self, section: str) -> dict:
        return self.sections[section]

    @property
    def left(self) -> float:
        return self.end - time.time()


# --------------------------------------------------------------------------------------------------------- subprocesses

_LIBC = ctypes.CDLL(None)  # before any fork


def _die_with_parent():
    """Linux: the child is killed when this process is, however that happens."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(command: list[str], output=None, **env: str) -> subprocess.Popen:
    """A child that leads its own process group, and imports this checkout."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, preexec_fn=_die_with_parent, stdout=output,
        stderr=output and subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **env},
    )  # fmt: skip


def stop(child: subprocess.Popen) -> None:
    """Ends a child and its own children, which may outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # do not hang on a process stuck in the driver
        child.wait(timeout=5)


def module(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", *words]


@dataclass
class Part:
    """A section that is one process, to its end or its limit; `read` adds to its entry from its output."""

    name: str
    command: list[str]
    seconds: float
    read: Callable[[dict, int | None, str], None] = lambda entry, code, output: None
    env: dict[str, str] = field(default_factory=dict)
    after: str | None = None  # a part that must have ended before
    child: subprocess.Popen | None = None
    began: float = 0.0


def run(report: Report, *parts: Part) -> None:
    """Parts side by side. Their output goes to files of their own, then to the call's text file."""
    waiting, going = [part for part in parts if report[part.name]["status"] != "skipped"], []
    try:
        while waiting or going:
            busy = {part.name for part in (*waiting, *going)}
            for part in [part for part in waiting if part.after not in busy]:
                waiting.remove(part)
                going += [part] if _begin(report, part) else []
            time.sleep(0.1)
            for part in list(going):
                over = time.time() > part.began + report[part.name]["limit_s"]
                if over or part.child.poll() is not None:
                    going.remove(part)
                    _end(report, part)
    finally:
        for part in going:
            stop(part.child)


def _begin(report: Report, part: Part) -> bool:
    """Starts a part, where there is time for it."""
    entry, seconds = report[part.name], min(part.seconds, report.left - 3)
    entry.update(command=" ".join(part.command), limit_s=round(seconds, 1))
    entry.update(status="running", reason="killed while it ran")
    if seconds < 2:
        entry.update(status="not run", reason=f"{max(report.left, 0):.0f} s left of the time limit")
    else:
        with (report.folder / f"{part.name}.txt").open("w") as output:
            part.child, part.began = start(part.command, output, **part.env), time.time()
    report.save()
    return seconds >= 2


def _end(report: Report, part: Part) -> None:
    """Records how a part ended; its exit code is None when it was stopped at its limit."""
    code = part.child.poll()
    stop(part.child)
    entry, file = report[part.name], report.folder / f"{part.name}.txt"
    output = file.read_text(errors="replace")
    entry.update(exit_code=code, seconds=round(time.time() - part.began, 1), output_tail=last_lines(output, 12, 2500))
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


def compiling(report: Report, seconds: float) -> Part:
    """Every kernel that the call launches, into Triton's cache."""
    tiny = [] if report.device == "cuda" else ["--tiny", "--arch", "90"]

    def read(entry: dict, code: int | None, output: str) -> None:
        if code == 0:
            result = json.loads(output.strip().splitlines()[-1])
            entry.update(kernels=result["kernels"], cpu_seconds=round(result["cpu_seconds"], 1))
            entry["errors"] = result["errors"]
            if entry["errors"]:
                entry.update(status="failed", reason=f"{len(entry['errors'])} kernels do not compile")
        elif "Triton is not installed" in output:
            entry.update(status="absent", reason="Triton is not installed")

    # a process that compiles must not be told to interpret
    return Part("compile", module("benchmarks.ahead", report.call, *tiny), seconds, read, {"TRITON_INTERPRET": "0"})


# ---------------------------------------------------------------------------------------------------------- correctness


def correctness(report: Report) -> None:
    """Its parts, each of which the others survive."""
    cuda, whole = report.device == "cuda", 60 * report.minutes
    verdicts, exact = report.folder / "verify.json", report.folder / "adversarial.json"
    for file in (verdicts, exact):
        file.unlink(missing_ok=True)
    tests = needing_a_gpu()
    names = [name for some in tests.values() for name in some]

    def read_contract(entry: dict, code: int | None, output: str) -> None:
        if "No module named pytest" in output:
            entry.update(status="absent", reason="pytest is not installed")
        entry.update(tests=names, summary=last_lines(output, 1))

    few, ties = ([], []) if cuda else (["--quick", "--filter", "select.*fp32"], ["--quick", "--filter", "ties|N = 3"])
    verify = module("sparc_kernels", "verify", *few, "--json", str(verdicts))
    adversarial = module("sparc_kernels", "verify", "--adversarial", *ties, "--json", str(exact))
    # by file and name: a file that cannot be imported, where a library is missing, leaves the others
    options = ("-q", "-p", "no:cacheprovider", "-rfE", "--continue-on-collection-errors", "-k", " or ".join(names))
    run(
        report,
        compiling(report, 0.35 * whole),
        Part("verify", verify, 0.55 * whole, lambda *ended: read_verify(verdicts, *ended)),
        Part("adversarial", adversarial, 0.3 * whole, after="compile"),
        Part("contract", module("pytest", *options, *tests), 0.5 * whole, read_contract,
             {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        Part("exercise", module("benchmarks.exercise"), 0.3 * whole, read_exercise, after="compile"),
    )  # fmt: skip
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
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    tests = {str(file.relative_to(ROOT)): mark.findall(file.read_text()) for file in files}
    return {file: names for file, names in tests.items() if names}


def read_verify(verdicts: Path, entry: dict, code: int | None, output: str) -> None:
    """Counts by verdict and the rows that neither passed nor were skipped."""
    known = json.loads(verdicts.read_text()) if verdicts.exists() else {"results": []}
    rows = known.pop("results")
    failed = [row for row in rows if row["verdict"] not in ("ok", "skip")]
    counts = dict(Counter(row["verdict"].lower() for row in rows))
    entry.update(header=known, rows=len(rows), counts=counts, failed=failed[:50])
    entry["verified"] = code == 0 and bool(rows) and not failed
    if code:
        reason = f"{len(failed)} of {len(rows)} not passed" if failed else "no verdict"
        entry.update(status="failed", reason=f"exit code {code}: {reason}")


def read_exercise(entry: dict, code: int | None, output: str) -> None:
    entry["exercised"] = [line for line in output.splitlines() if line.startswith("exercised")]


def read_sanitizer(entry: dict, code: int | None, output: str) -> None:
    """Clean when the tool says so; what was exercised up to a time limit is kept."""
    read_exercise(entry, code, output)
    entry["summary"] = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    entry["clean"] = code == 0 and bool(entry["summary"])
    if not entry["clean"]:
        entry["output_head"] = "\n".join(line for line in output.splitlines() if line.startswith("====="))[:3000]
    if code == 0 and not entry["summary"]:
        entry.update(status="failed", reason="no summary in its output")


def find_sanitizer() -> tuple[str | None, list[str]]:
    """Its path, and where it was looked for."""
    patterns = ["/usr/local/cuda*/bin", "/opt/nvidia/*", "/opt/nvidia/*/*"]
    patterns += [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for base in {p for p in sys.path if p.endswith("-packages")}:
        patterns += [f"{base}/{f}" for f in ("triton/backends/nvidia/bin", "torch/bin", "nvidia/*/bin", "nvidia/*")]
    folders = [folder for pattern in patterns for folder in sorted(glob.glob(pattern), reverse=True)]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(f"{f}{own}" for f in folders
                              for own in ("", "/compute-sanitizer"))])  # fmt: skip
    return shutil.which("compute-sanitizer", path=search), ["PATH", *patterns]


# --------------------------------------------------------------------------------------------------------------- timing


def begin(args: argparse.Namespace) -> dict:
    """The benchmarks' record with its environment and providers, made by a process that may touch the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "record.json", Path(folder) / "output.txt"
        with output.open("w") as said:
            child = start(suite(args.device, file, args, "--begin"), said)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=START_SECONDS)
        finally:
            stop(child)
        if child.returncode or not file.exists():
            said = last_lines(output.read_text(), 8, 1500)
            raise SystemExit(f"the benchmarks do not start: exit code {child.returncode}\n{said}")
        return json.loads(file.read_text())


def suite(device: str, file: Path, args: argparse.Namespace, *more: str) -> list[str]:
    """`python -m benchmarks` into a file."""
    command = [*module("benchmarks"), "--device", device, "--out", str(file), "--quick", "--minutes"]
    command += [f"{args.minutes:g}", "--seconds", "0.01" if device == "cpu" else "0.4"]
    command += ["--tiny", "--threads", "1"] if device == "cpu" else []
    command += ["--official", str(args.official.resolve())] if args.official else []
    return [*command, "--filter", args.filter, *more]


def host_times(report: Report, seconds: float) -> Part:
    """What a step of each kind costs the host at the official shape, on a GPU beside the device's time."""
    file = report.folder / "host.json"
    file.unlink(missing_ok=True)
    few = ["--repeats", "5", "--seconds", "0.05"]
    if report.device != "cuda":
        few = ["--repeats", "1", "--seconds", "0.01", "--shape", "16,128,8,16,1", "--auxk", "0", "--dtype", "bfloat16"]

    def read(entry: dict, code: int | None, output: str) -> None:
        if "Triton is not installed" in output:
            entry.update(status="absent", reason="Triton is not installed")
        elif code == 0:
            result = json.loads(file.read_text())
            entry.update(
                rows=result["rows"], others_cpu=result["others_cpu"], versions=result["environment"]["versions"]
            )
        file.unlink(missing_ok=True)

    command = module("benchmarks", "host", *few, "--json", str(file))
    return Part("host", command, seconds, read, {"TRITON_INTERPRET": "0"})


def timing(report: Report, command: list[str]) -> None:
    """The compiler, the host, then the benchmarks by themselves; `command` goes on in the report's file."""
    report.data["deadline"] = int(report.end - 8)  # for what is under way then, and the end
    report.save()
    run(report, compiling(report, min(75.0, 15 * report.minutes)))
    run(report, host_times(report, min(60.0, 12 * report.minutes)))
    entry, began = report["measurements"], time.time()
    if entry["status"] == "skipped":
        return
    entry.update(status="running", reason="killed while it ran")
    try:
        measure(report, entry, command)
    except Exception:
        entry.update(status="failed", reason=last_lines(traceback.format_exc()))
    finally:
        entry["seconds"] = round(time.time() - began, 1)
        report.save()
    print(f"[measurements] {entry['status']}, {entry['seconds']} s", flush=True)


def measure(report: Report, entry: dict, command: list[str]) -> None:
    """Workers, until one ends well, time is up, or two died before they began anything."""
    died, reason = [], None
    idle = entry["workers"] = 0
    while idle < 2 and report.data["deadline"] - time.time() > 3:
        entry["workers"] += 1
        rows = len(report.data["results"])
        report.save()
        reason = watch(report, start(command))
        report.data = record.load(report.path)
        if reason is None:
            break
        record.bury(report.data, reason)
        died.append(reason)
        idle = 0 if len(report.data["results"]) > rows else idle + 1
        print(f"[worker {entry['workers']}] {reason}", flush=True)
    cut = None if report.data["complete"] else reason or report.data["stopped"]
    if report.data["results"]:
        entry.update(status="ran in part" if cut else "ran", reason=cut, died=died)
    else:
        entry.update(status="failed", reason=died[-1] if died else "no time was left", died=died)


def watch(report: Report, child: subprocess.Popen) -> str | None:
    """Why a worker did not end well; one whose turn takes too long is taken for a hang and stopped."""
    active = {"group": "its start", "rows": [], "until": time.time() + START_SECONDS}
    try:
        while child.poll() is None:
            time.sleep(0.3)
            active = json.loads(report.path.read_text()).get("active") or active
            if time.time() > report.data["deadline"] + 5:
                return "stopped at the time limit"
            if time.time() > active["until"]:
                turn = ", ".join([active["group"], *(row["provider"] for row in active["rows"])])
                return f"no sign of life in {turn}: taken for a hang and stopped"
    finally:
        stop(child)
    return f"the worker ended with exit code {child.returncode}" if child.returncode else None


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
    lines = []
    for name, entry in sorted(sections.items(), key=lambda item: item[1]["status"] in GOOD):
        figures = [f"{word} {entry[word]}" for word in ("kernels", "cpu_seconds", "counts", "summary") if word in entry]
        said = [entry["status"], f"{entry['seconds']} s" if "seconds" in entry else "", entry["reason"] or "", *figures]
        lines.append(f"{name}: {' '.join(filter(None, said))}"[:400])
        lines += [f"  NOT PASSED {json.dumps(row)[:230]}" for row in entry.get("failed", [])[:20]]
        lines += [f"  {kernel}: {error}"[:230] for kernel, error in entry.get("errors", [])[:10]]
        lines += [f"  {host_line(row)}" for row in entry.get("rows", [])] if name == "host" else []
        if entry["status"] not in GOOD:
            lines += [f"  | {line[:200]}" for line in entry.get("output_tail", "").splitlines()]
    return "\n".join(lines)


def host_line(row: dict) -> str:
    """A row of `python -m benchmarks host`, in short."""
    device = "" if row["device_ms"] is None else f", device {row['device_ms']:.3f} ms"
    counts = f"{row['launches']} launches of Triton, {row['torch_calls']} calls of torch"
    return f"{row['what']}, {row['dtype']}, auxk {row['auxk']}: host {row['host_ms']:.3f} ms{device}, {counts}"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--call", choices=CALLS, help="which of the two")
    parser.add_argument("--minutes", type=float, help="time limit (default: correctness 6, timing 5)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default a new one under benchmarks/results")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--official", type=Path, metavar="PATH", help="timing: a clone of the official repository")
    parser.add_argument("--filter", default="", metavar="REGEX", help="timing: as of python -m benchmarks")
    parser.add_argument("--skip", default="", help="sections to leave out, with commas between them")
    args = parser.parse_args(argv)
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


@ends_with_its_pipe
def main(argv=None) -> int:
    args, started = parse(argv), time.time()
    # a polite stop, such as a scheduler's time limit, ends the children and the file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    first = begin(args)
    about, device = first["environment"], first["environment"]["device"]
    name = f"{environment.slug(about['device_name'] if device == 'cuda' else 'cpu')}_{about['date'][:10]}"
    folder = args.out or record.RESULTS / f"{name}_{(about['commit'] or 'nocommit')[:7]}"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, args.call, device, args.minutes, started)
    for old in (report.path, folder / f"{args.call}.txt"):
        old.unlink(missing_ok=True)
    for part in args.skip:
        report[part].update(status="skipped", reason="left out by --skip")
    print(f"writing {report.path}", flush=True)
    stopped = None
    try:
        if args.call == "correctness":
            same = ("complete", "stopped", "started", "finished", "seconds", "environment")
            settings = {"device": device, "tiny": device == "cpu", "minutes": args.minutes}
            report.data = {"schema": SCHEMA, **{name: first[name] for name in same}, "settings": settings}
            report.save()
            correctness(report)
        else:
            report.data = first
            timing(report, suite(device, report.path, args, "--resume"))
    except (KeyboardInterrupt, SystemExit, BrokenPipeError) as error:
        with contextlib.suppress(OSError, ValueError):
            report.data = json.loads(report.path.read_text())
        gone = isinstance(error, BrokenPipeError)
        stopped = "the reader of the output has gone" if gone else str(error) or "interrupted"
    missing = [part for part in report.sections if report[part]["status"] not in GOOD]
    if missing and not stopped:
        stopped = "; ".join(f"{part}: {report[part]['reason']}" for part in missing)
    seconds = round(time.time() - started, 1)
    report.data.update(complete=stopped is None, stopped=stopped, finished=environment.now(), seconds=seconds)
    if device == "cuda":
        report.data["environment"]["nvml_after"] = environment.gpu_state((about["gpu"] or {}).get("uuid"))
    report.save()
    print("\n" + summary(report), flush=True)
    print(f"{report.data['seconds']} s; {report.path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
