"""Forward + loss + backward of AlignedSAE beside the official class on a CPU, side by side in one run.

    python benchmarks/official_cpu.py --official CLONE [--case ROWSxLATENTS ...] [--threads N] [--out FILE.json]
    python benchmarks/official_cpu.py --table FILE.json        # the table of docs/results.md

CLONE is a clone of github.com/AtlasAnalyticsLab/SPARC. Both get the same weights and inputs; their losses must agree
before anything is timed. Rounds alternate, so that a change of the machine's load meets both. Memory is the peak of the
resident set during one step beyond what it was before, in a process of its own each (Linux); gradients are part of it.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from record_official_replay import load_official  # noqa: E402

from sparc_kernels import AlignedSAE  # noqa: E402

WIDTHS = {"vision": 1024, "clip_image": 768, "clip_text": 768}
CASES = ("256x8192", "256x32768", "1024x32768")
K = AUXK = 64
MIB = 2**20


def build(which: str, official: Path, latents: int):
    torch.manual_seed(0)
    if which == "official":
        return load_official(official)["global"](WIDTHS, latents, K, auxk=AUXK)
    return AlignedSAE(WIDTHS, latents, K, auxk=AUXK)


def batch(rows: int):
    generator = torch.Generator().manual_seed(1)
    return {
        s: torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1) for s, d in WIDTHS.items()
    }


def step(model, x) -> tuple[float, float]:
    """Seconds of forward, loss and backward, and the loss."""
    model.zero_grad()
    started = time.perf_counter()
    loss, _ = model.compute_loss(model(x), x)
    loss.backward()
    return time.perf_counter() - started, loss.item()


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of_a_step(which: str, official: Path, rows: int, latents: int) -> int:
    """Bytes of resident memory that a first step needs at its peak beyond model and inputs."""
    model, x = build(which, official, latents), batch(rows)
    small = {s: v[:2] for s, v in x.items()}
    step(build(which, official, 256), small)  # libraries load what they load once
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    step(model, x)
    return status("VmHWM") - before


def memory(which: str, args, rows: int, latents: int) -> int | None:
    if sys.platform != "linux":
        return None
    command = [sys.executable, __file__, "--official", str(args.official), "--threads", str(args.threads)]
    command += ["--case", f"{rows}x{latents}", "--peak", which]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def compare(args, rows: int, latents: int) -> dict:
    models = {which: build(which, args.official, latents) for which in ("ours", "official")}
    models["ours"].load_state_dict(models["official"].state_dict())
    x = batch(rows)
    losses = {which: step(model, x)[1] for which, model in models.items()}
    if abs(losses["ours"] - losses["official"]) > 1e-5 * losses["official"]:
        raise SystemExit(f"{rows}x{latents}: the losses differ: {losses}, nothing is timed")
    times = {which: [] for which in models}
    for _ in range(args.rounds):
        for which, model in models.items():
            times[which].append(1e3 * step(model, x)[0])
    del models
    row = {"rows": rows, "latents": latents, "losses": losses}
    for which, ms in times.items():
        row[which] = {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}
        row[which]["peak_bytes"] = memory(which, args, rows, latents)
    return row


def environment(args) -> dict:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "sparc_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "schema": 1,
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip() + (" and changes" if dirty.stdout.strip() else ""),
        "problem": f"widths {'/'.join(map(str, WIDTHS.values()))}, k {K}, auxk {AUXK}, global TopK, float32",
        "rounds": args.rounds,
    }


def table(record: dict) -> str:
    env = record["environment"]
    lines = [
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads, torch {env['torch']}, {env['date']}, commit "
        f"{env['commit'][:7]}{env['commit'][40:]}; {env['problem']}; median of {env['rounds']} rounds (range).",
        "",
        "| B | N | ours | official | ratio | gradients | ours, peak beyond them | official | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        ours, theirs = r["ours"], r["official"]
        spans = [f"{m['median_ms']:,.0f} ms ({m['min_ms']:,.0f} to {m['max_ms']:,.0f})" for m in (ours, theirs)]
        peaks = [m["peak_bytes"] for m in (ours, theirs)]
        memory_cells = ["-"] * 4
        if None not in peaks:
            gradients = 4 * (
                2 * r["latents"] * sum(WIDTHS.values()) + len(WIDTHS) * r["latents"] + sum(WIDTHS.values())
            )
            peaks = [p - gradients for p in peaks]
            memory_cells = [*(f"{p / MIB:,.0f} MiB" for p in (gradients, *peaks)), f"{peaks[1] / peaks[0]:.0f}"]
        cells = [f"{r['rows']:,}", f"{r['latents']:,}", *spans, f"{theirs['median_ms'] / ours['median_ms']:.1f}"]
        lines.append("| " + " | ".join([*cells, *memory_cells]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--case", action="append", metavar="ROWSxLATENTS", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the record there")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print the table of a record and stop")
    parser.add_argument("--peak", choices=("ours", "official"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.official is None:
        parser.error("--official: expected a clone of the official repository, got nothing")
    torch.set_num_threads(args.threads)
    cases = [tuple(map(int, case.split("x"))) for case in args.case or CASES]
    if args.peak:
        print(peak_of_a_step(args.peak, args.official, *cases[0]))
        return
    record = {"environment": environment(args), "rows": []}
    for case in cases:
        record["rows"].append(compare(args, *case))
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
