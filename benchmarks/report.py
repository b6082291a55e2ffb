"""Tables: of one run for a terminal, and those of README.md and docs/results.md from the committed records.

    python -m benchmarks.report            # writes both texts, and the plots, from benchmarks/results/*.json
    python -m benchmarks.report --check    # exit code 1 when a text differs from what the records say

Everything between the markers is made here; nothing measured is typed by hand.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import textwrap
from pathlib import Path

from sparc_kernels.core.console import ends_with_its_pipe

from . import record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by `python -m benchmarks.report`: begin -->", "<!-- end -->"
MIB = 2**20


# ------------------------------------------------------------------------------------------------------------- one run


def ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ok(data: dict, /, **wanted) -> list[dict]:
    """Measured rows with these values."""
    return [
        r for r in data["results"] if r["status"] == "ok" and all(r[name] == value for name, value in wanted.items())
    ]  # fmt: skip


def sections(data: dict) -> list[tuple[tuple, list[dict]]]:
    """Rows by (op, case, data, dtype), in the order of the run."""
    found: dict[tuple, list[dict]] = {}
    for row in data["results"]:
        found.setdefault((row["op"], row["case"], row["data"], row["dtype"]), []).append(row)
    return list(found.items())


def where(data: dict) -> str:
    """Device, versions, commit and date in one line."""
    env, s = data["environment"], data["settings"]
    commit = f"{str(env['commit'])[:7]}{' with changes' if env['dirty'] else ''}"
    parts = [env["device_name"]]
    if env["device"] == "cpu":
        threads = f"{s['threads']} thread{'s' if s['threads'] > 1 else ''}"
        parts += [
            f"{env['cores']} cores",
            threads,
            *(["times are CPU time of the process"] if s["clock"] == "cpu" else []),
        ]
    parts += [f"torch {env['versions'].get('torch')}", env["date"][:10], f"commit {commit}"]
    return ", ".join(parts)


def load(data: dict) -> str:
    env = data["environment"]
    before, after = env.get("load_before"), env.get("load_after")
    if before is None:
        return "load not known"
    others = [r["others_cpu"] for r in ok(data) if r["others_cpu"] is not None]
    busy = f"; other processes had up to {100 * max(others):.0f} % of the cores while rows were timed" if others else ""
    return f"load average {before} before" + ("" if after is None else f", {after} after (its own included)") + busy


def terminal(data: dict, limit: int = 12000) -> str:
    """One table for each operation, case and precision: milliseconds by mode, memory, achieved rates."""
    env = data["environment"]
    lines = [f"{where(data)}; {load(data)}"]
    if not data["complete"]:
        lines.append(f"incomplete: {data['stopped']}")
    lines.append(f"NVML: {env['nvml'].get('reason') or env['nvml'].get('source')}")
    for p in data["providers"]:
        if p["status"] == "absent":
            lines.append(f"absent: {p['name']} ({p['op']}): {p['reason']}")
    lines.append(
        "median ms [p20 p80]; x: times ours; host: ms to launch it; peak MiB of forward + backward; modelled: GB/s, "
        "TFLOP/s, roofline"
    )
    blocks = ["\n".join(lines), *map(_profiled, data["profiles"][:2])]
    blocks += [_block(key, rows) for key, rows in sections(data)]
    text = ""
    for i, block in enumerate(blocks):
        if len(text) + len(block) > limit:
            return text + f"({len(blocks) - i} more tables in the JSON)"
        text += block + "\n"
    return text.rstrip()


def _profiled(profile: dict) -> str:
    """Where a step's time goes: measured beside modelled where there is a model, then the longest kernels."""
    name = f"{profile['case']}{'' if profile['data'] == 'gaussian' else ', real'}, {profile['dtype']}"
    lines = [f"-- profile of {profile['provider']} ({profile['mode']}), {name}: {profile['reason'] or 'ms'}"]
    model = profile.get("modelled")
    if model:
        cells = [
            f"{row['name']} {'-' if row['measured_ms'] is None else ms(row['measured_ms'])} ({ms(row['modelled_ms'])})"
            for row in model["ops"]
        ]
        total = sum(part["ms"] for part in profile["parts"])
        lines.append(f"  measured (modelled for {model['gpu']}): {'; '.join(cells)}; all {ms(total)} "
                     f"({ms(model['modelled_ms'])})")  # fmt: skip
    else:
        lines.append("  " + "; ".join(f"{part['name']} {ms(part['ms'])}" for part in profile["parts"]))
    longest = [f"{k['name'][:44]} {ms(k['ms'])} x{k['calls']:.0f}" for k in profile["kernels"][:10]]
    return "\n".join([*lines, *(["  " + "; ".join(longest)] if longest else [])])


def _block(key: tuple, rows: list[dict]) -> str:
    op, case, kind, dtype = key
    s = rows[0]["shape"]
    widths = "/".join(map(str, s["d_streams"]))
    aux = f", auxk {s['auxk']}" if s["auxk"] else ""
    title = f"-- {op}, {case}{'' if kind == 'gaussian' else f' ({kind})'}, {dtype}: B {s['B']:,}, N {s['N']:,}, "
    lines = [title + f"k {s['k']}, d {widths}{aux}"]
    by_provider: dict[str, dict[str, dict]] = {}
    for r in rows:
        by_provider.setdefault(r["provider"], {})[r["mode"]] = r
    main = "full" if any("full" in modes for modes in by_provider.values()) else "forward"
    ours = by_provider.get("ours", {})
    for name, modes in by_provider.items():
        bad = next((r for r in modes.values() if r["status"] != "ok"), None)
        if bad:
            lines.append(f"  {name:30} {bad['status'].upper()}: {str(bad['reason']).splitlines()[-1][:160]}")
            continue
        cells = []
        for mode in ("forward", "backward", "full", "step"):
            if mode in modes:
                r = modes[mode]
                spread = f" [{ms(r['p20_ms'])} {ms(r['p80_ms'])}]" if mode == main else ""
                cells.append(f"{mode} {ms(r['median_ms'])}{spread}")
        r = modes.get(main) or next(iter(modes.values()))
        beside = r.get("ours_ms") or ours.get(r["mode"], {}).get("median_ms")
        if beside and name != "ours":
            cells.append(f"x{r['median_ms'] / beside:.2f}")
        if r.get("host_ms"):
            cells.append(f"host {ms(r['host_ms'])}")
        if r["peak_bytes"]:
            cells.append(f"{r['peak_bytes'] / MIB:,.0f} MiB")
        rates = [f"{r[name]:.3g} {unit}" for name, unit in (("gb_s", "GB/s"), ("tflop_s", "TFLOP/s")) if r[name]]
        if r["roofline_fraction"]:
            rates.append(f"roofline {100 * r['roofline_fraction']:.0f} %")
        if r.get("predicted_ms"):
            rates.append(f"over the model's time {r['median_ms'] / r['predicted_ms']:.2f}")
        if rates:
            cells.append(", ".join(rates))
        if r["energy_j"]:
            cells.append(f"{r['energy_j']:.3g} J")
        lines.append(f"  {name:30} " + "  ".join(cells))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- README and results


def records(folder: Path = RESULTS) -> list[tuple[str, dict]]:
    """Records that git tracks (all outside of a checkout) by name, the newest of each device last."""
    tracked = _tracked(folder)
    paths = [path for path in sorted(folder.glob("*.json")) if tracked is None or path.name in tracked]
    return sorted(((path.name, record.load(path)) for path in paths), key=lambda item: item[1]["started"])


def _tracked(folder: Path) -> set[str] | None:
    """Names of the files in a folder that git tracks; None where it tracks none, outside of our checkout."""
    command = ["git", "-C", str(folder), "ls-files", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(filter(None, done.stdout.split("\0"))) or None


def newest(found: list[tuple[str, dict]], device: str) -> tuple[str, dict] | None:
    mine = [item for item in found if item[1]["environment"]["device"] == device]
    return mine[-1] if mine else None


def _command(data: dict) -> str:
    words, skip = [], False
    for word in data["environment"]["command"]:
        words.append("CLONE" if skip else word)
        skip = word == "--official"
    return shlex.join(words)


def _times(r: dict) -> str:
    return f"{ms(r['median_ms'])} ms ({ms(r['p20_ms'])} to {ms(r['p80_ms'])})"


def _cell(data: dict, row: dict, provider: str) -> dict | None:
    wanted = {name: row[name] for name in ("op", "case", "data", "dtype", "mode")}
    return next(iter(ok(data, provider=provider, **wanted)), None)


PEERS = ("official SPARC", "reference, eager", "reference, compiled")


def step_table(data: dict, everything: bool) -> str:
    """Forward, loss and backward of the training step: ours, then each peer as a time and a ratio."""
    rows = [r for r in ok(data, op="training", mode="full", provider="ours") if not r["sweep"]]
    peers = [p for p in PEERS if any(_cell(data, r, p) for r in rows)]
    if not everything:
        rows = [r for r in rows if r["dtype"] == "float32" or data["environment"]["device"] == "cuda"]
    head = ["case", "B", "N", "precision", "ours", *(f"{p} | ratio" for p in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (5 + 2 * len(peers))]
    for r in rows:
        s = r["shape"]
        name = r["case"] + ("" if r["data"] == "gaussian" else ", real statistics")
        cells = [name, f"{s['B']:,}", f"{s['N']:,}", r["dtype"], _times(r)]
        for p in peers:
            other = _cell(data, r, p)
            if other:
                cells += [_times(other), f"{other['median_ms'] / r['median_ms']:.1f}"]
            else:
                cells += [_why(data, r, p), "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _why(data: dict, row: dict, provider: str) -> str:
    wanted = {name: row[name] for name in ("op", "case", "data", "dtype")}
    for r in data["results"]:
        if r["provider"] == provider and all(r[name] == value for name, value in wanted.items()):
            return r["status"]
    return "-"


def memory_table(data: dict) -> str:
    """Peak of forward, loss and backward beyond parameters and inputs, and the gradients that are left of it."""
    rows = [r for r in ok(data, op="training", mode="full", provider="ours") if not r["sweep"] and r["peak_bytes"]]
    peers = [p for p in PEERS if any(_cell(data, r, p) for r in rows)]
    lines = [
        "| case | B | N | precision | gradients | ours | " + " | ".join(peers) + " |",
        "|" + "---|" * (6 + len(peers)),
    ]
    for r in rows:
        s = r["shape"]
        name = r["case"] + ("" if r["data"] == "gaussian" else ", real statistics")
        cells = [name, f"{s['B']:,}", f"{s['N']:,}", r["dtype"]]
        cells += [f"{size / MIB:,.0f} MiB" for size in (r["gradient_bytes"], r["peak_bytes"])]
        others = [_cell(data, r, p) for p in peers]
        cells += [f"{o['peak_bytes'] / MIB:,.0f} MiB" if o and o["peak_bytes"] else "-" for o in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(data: dict) -> str:
    """The other operations: every provider's forward, and forward with backward where there is one."""
    lines = ["| operation | case | precision | provider | forward | with backward |", "|---|---|---|---|---|---|"]
    names = ("op", "case", "data", "dtype", "provider")
    found: dict[tuple, dict[str, dict]] = {}
    for r in ok(data):
        if r["op"] != "training":
            found.setdefault(tuple(r[name] for name in names), {})[r["mode"]] = r
    for modes in found.values():
        r = next(iter(modes.values()))
        forward, full = modes.get("forward"), modes.get("full")
        name = r["case"] + ("" if r["data"] == "gaussian" else ", real")
        cells = [r["op"], name, r["dtype"], r["provider"]]
        lines.append(
            "| " + " | ".join([*cells, _times(forward) if forward else "-", _times(full) if full else "-"]) + " |"
        )
    return "\n".join(lines)


def sweep_table(data: dict) -> str:
    rows = [r for r in ok(data, op="training", mode="full", provider="ours") if r["sweep"]]
    if not rows:
        return ""
    names = [p for p in PEERS if any(_cell(data, r, p) for r in rows)]
    lines = ["| varied | B | N | k | d | ours | " + " | ".join(names) + " |", "|" + "---|" * (6 + len(names))]
    for r in rows:
        s = r["shape"]
        others = [_cell(data, r, p) for p in names]
        cells = [r["sweep"], f"{s['B']:,}", f"{s['N']:,}", str(s["k"]), "/".join(map(str, s["d_streams"])),
                 f"{ms(r['median_ms'])} ms"]  # fmt: skip
        lines.append("| " + " | ".join([*cells, *(f"{ms(o['median_ms'])} ms" if o else "-" for o in others)]) + " |")
    return "\n".join(lines)


def refused(data: dict) -> list[str]:
    lines = []
    for r in data["results"]:
        if r["status"] not in ("ok", "skipped"):
            why = str(r["reason"]).splitlines()[-1][:200]
            lines.append(f"- {r['provider']}, {r['op']}, {r['case']}, {r['dtype']}: {r['status']}: {why}")
    return lines


NO_GPU = (
    "**No GPU has run this package yet**, so there is no GPU figure here; modelled ones are printed by `sparc-kernels "
    "cost`."
)


def _wrapped(part: str) -> str:
    """Prose in lines of 120; tables, lists, code, pictures and headings as they are."""
    if part.startswith(("|", "-", "```", "!", "#")):
        return part
    return textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False)


def readme(found: list[tuple[str, dict]]) -> str:
    parts = []
    gpu = newest(found, "cuda")
    if gpu is None:
        parts.append(NO_GPU)
    for device in ("cuda", "cpu"):
        item = newest(found, device)
        if item is None:
            continue
        name, data = item
        parts.append(
            f"{where(data)}; forward + loss + backward, median (p20 to p80), every provider verified against the "
            f"float64 reference first; {load(data)}. Record: `benchmarks/results/{name}`; more, and how: "
            "[docs/results.md](docs/results.md)."
        )
        parts.append(step_table(data, everything=False))
    return "\n\n".join(map(_wrapped, parts))


def results(found: list[tuple[str, dict]]) -> str:
    parts = []
    if newest(found, "cuda") is None:
        parts.append(NO_GPU)
    for name, data in reversed(found):
        env = data["environment"]
        parts.append(f"## {env['device_name']}, {env['date'][:10]}")
        parts.append(f"```sh\n{_command(data)}\n```")
        cut = "" if data["complete"] else f" The run is incomplete: {data['stopped']}."
        said = env["nvml"].get("reason")
        parts.append(
            f"{where(data)}; {load(data)}; record `benchmarks/results/{name}`.{cut} Every row was verified against the "
            f"float64 reference before it was timed; the times are medians (p20 to p80) of runs in turns{_apart(data)}."
            + (f" NVML: {said}." if said else "")
        )
        parts.append("Forward, loss and backward of the training step:")
        parts.append(step_table(data, everything=True))
        parts.append("Most memory at one time beyond parameters and inputs, the gradients that it ends with included:")
        parts.append(memory_table(data))
        plots = _plots_of(name)
        if plots:
            parts += [f"![{what}](plots/{file})" for what, file in plots]
        if any(r["op"] != "training" for r in ok(data)):
            parts += ["Parts of it, and what the machine can do at most (`ceiling`):", parts_table(data)]
        table = sweep_table(data)
        if table:
            parts += ["Sweeps, forward, loss and backward:", table]
        absent = [f"{p['name']} ({p['op']}): {p['reason']}" for p in data["providers"] if p["status"] == "absent"]
        parts += ["Absent:", "\n".join(f"- {line}" for line in absent)] if absent else []
        bad = refused(data)
        parts += ["Not timed:", "\n".join(bad)] if bad else []
    return "\n\n".join(map(_wrapped, parts))


def _apart(data: dict) -> str:
    """Cases that were too large for turns."""
    names = dict.fromkeys(r["case"] for r in ok(data, op="training") if r["interleaved"] is False)
    alone = [n for n in names if len({r["provider"] for r in ok(data, op="training", case=n)}) > 1]
    return f", of {', '.join(alone)} one provider after the other" if alone else ""


def _plots_of(name: str) -> list[tuple[str, str]]:
    stem = name.removesuffix(".json")
    titles = {
        "scaling": "Time and memory against N",
        "speedup": "Times ours",
        "breakdown": "Where our step's time goes",
    }
    folder = ROOT / "docs" / "plots"
    return [
        (title, f"{stem}_{kind}.svg") for kind, title in titles.items() if (folder / f"{stem}_{kind}.svg").exists()
    ]  # fmt: skip


def between(text: str, new: str, where: str) -> str:
    """The text with what is between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{where}: expected the markers {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def texts(root: Path = ROOT, of: str = "") -> dict[Path, str]:
    """What README.md and docs/results.md should say. of: outside of a checkout, only of the records named in it."""
    folder = root / "benchmarks" / "results"
    found = records(folder)
    if of and _tracked(folder) is None:
        found = [(name, data) for name, data in found if name in of]
    made = {}
    for path, new in ((root / "README.md", readme(found)), (root / "docs" / "results.md", results(found))):
        made[path] = between(path.read_text(), new, path.name)
    return made


def stale(root: Path = ROOT) -> list[str]:
    named = (root / "docs" / "results.md").read_text()
    return [path.name for path, text in texts(root, named).items() if path.read_text() != text]


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit code 1 when a text is stale")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="print the table of one record and stop")
    return parser.parse_args(argv)


@ends_with_its_pipe
def main(argv=None) -> int:
    args = parse(argv)
    if args.show:
        print(terminal(record.load(args.show), limit=10**9))
        return 0
    if args.check:
        old = stale()
        print(f"stale: {', '.join(old)}: run python -m benchmarks.report" if old else "up to date")
        return 1 if old else 0
    from . import plot

    names = [name for name, _ in records()]
    for path in sorted(RESULTS.glob("*.json")):
        if path.name not in names:
            print(f"left out {path.relative_to(ROOT)}, which git does not track")
    for name in names:  # first: the text links to plots that exist
        for file in plot.draw(RESULTS / name, ROOT / "docs" / "plots"):
            print(f"wrote {file.relative_to(ROOT)}")
    for path, text in texts().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
