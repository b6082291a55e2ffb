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
from .record import RESULTS, ROOT, case_of, key_beside, load_of, mib, ms, ok, where, widths_of

BEGIN, END = "<!-- made by `python -m benchmarks.report`: begin -->", "<!-- end -->"


# ------------------------------------------------------------------------------------------------------------- one run


def terminal(data: dict, limit: int = 12000) -> str:
    """One table for each operation, case and precision: milliseconds by mode, memory, achieved rates."""
    nvml, tables = data["environment"]["nvml"], {}
    lines = [f"{where(data)}; {load_of(data)}", *([] if data["complete"] else [f"incomplete: {data['stopped']}"])]
    lines.append(f"NVML: {nvml.get('reason') or nvml.get('source')}")
    lines += [f"absent: {p['name']} ({p['op']}): {p['reason']}" for p in data["providers"] if p["status"] == "absent"]
    lines.append(
        "median ms [p20 p80]; x: times ours; host: ms to launch it; peak MiB of forward + backward; modelled: GB/s, "
        "TFLOP/s, roofline"
    )
    for row in data["results"]:
        tables.setdefault((row["op"], row["case"], row["data"], row["dtype"]), []).append(row)
    blocks = ["\n".join(lines), *map(_profiled, data["profiles"][:2]), *map(_block, tables.values())]
    text = ""
    for i, block in enumerate(blocks):
        if len(text) + len(block) > limit:
            return text + f"({len(blocks) - i} more tables in the JSON)"
        text += block + "\n"
    return text.rstrip()


def _profiled(profile: dict) -> str:
    """Where a step's time goes: measured beside modelled where there is a model, then the longest kernels."""
    name, model = f"{case_of(profile)}, {profile['dtype']}", profile.get("modelled")
    lines = [f"-- profile of {profile['provider']} ({profile['mode']}), {name}: {profile['reason'] or 'ms'}"]
    if model:
        cells = [
            f"{row['name']} {'-' if row['measured_ms'] is None else ms(row['measured_ms'])} ({ms(row['modelled_ms'])})"
            for row in model["ops"]
        ]
        total = sum(part["ms"] for part in profile["parts"])
        said = f"{'; '.join(cells)}; all {ms(total)} ({ms(model['modelled_ms'])})"
        lines.append(f"  measured (modelled for {model['gpu']}): {said}")
    else:
        lines.append("  " + "; ".join(f"{part['name']} {ms(part['ms'])}" for part in profile["parts"]))
    longest = [f"{k['name'][:44]} {ms(k['ms'])} x{k['calls']:.0f}" for k in profile["kernels"][:10]]
    return "\n".join([*lines, *(["  " + "; ".join(longest)] if longest else [])])


def _block(rows: list[dict]) -> str:
    first, s = rows[0], rows[0]["shape"]
    aux = f", auxk {s['auxk']}" if s["auxk"] else ""
    title = f"-- {first['op']}, {case_of(first, ' ({})')}, {first['dtype']}: B {s['B']:,}, N {s['N']:,}, k {s['k']}"
    lines = [f"{title}, d {widths_of(first)}{aux}"]
    providers: dict[str, dict[str, dict]] = {}
    for r in rows:
        providers.setdefault(r["provider"], {})[r["mode"]] = r
    main = "full" if any("full" in modes for modes in providers.values()) else "forward"
    for name, modes in providers.items():
        bad = next((r for r in modes.values() if r["status"] != "ok"), None)
        if bad:
            lines.append(f"  {name:30} {bad['status'].upper()}: {str(bad['reason']).splitlines()[-1][:160]}")
        else:
            lines.append(f"  {name:30} " + "  ".join(_cells(modes, main, providers.get("ours", {}))))
    return "\n".join(lines)


def _cells(modes: dict[str, dict], main: str, ours: dict[str, dict]) -> list[str]:
    """The line of one provider: its modes, and what else there is of its main one."""
    cells = []
    for mode in [mode for mode in ("forward", "backward", "full", "step") if mode in modes]:
        r = modes[mode]
        spread = f" [{ms(r['p20_ms'])} {ms(r['p80_ms'])}]" if mode == main else ""
        cells.append(f"{mode} {ms(r['median_ms'])}{spread}")
    r = modes.get(main) or next(iter(modes.values()))
    beside = r.get("ours_ms") or ours.get(r["mode"], {}).get("median_ms")
    cells += [f"x{r['median_ms'] / beside:.2f}"] if beside and r["provider"] != "ours" else []
    cells += [f"host {ms(r['host_ms'])}"] if r.get("host_ms") else []
    cells += [mib(r["peak_bytes"])] if r["peak_bytes"] else []
    rates = [f"{r[name]:.3g} {unit}" for name, unit in (("gb_s", "GB/s"), ("tflop_s", "TFLOP/s")) if r[name]]
    rates += [f"roofline {100 * r['roofline_fraction']:.0f} %"] if r["roofline_fraction"] else []
    rates += [f"over the model's time {r['median_ms'] / r['predicted_ms']:.2f}"] if r.get("predicted_ms") else []
    cells += [", ".join(rates)] if rates else []
    return [*cells, *([f"{r['energy_j']:.3g} J"] if r["energy_j"] else [])]


# ------------------------------------------------------------------------------------------------------------- records


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


def newest(known: list[tuple[str, dict]], device: str) -> tuple[str, dict] | None:
    return next((item for item in reversed(known) if item[1]["environment"]["device"] == device), None)


# -------------------------------------------------------------------------------------------------------------- tables

PEERS = ("official SPARC", "reference, eager", "reference, compiled")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    columns = sum(cell.count("|") + 1 for cell in head)
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * columns,
                      *("| " + " | ".join(cells) + " |" for cells in rows)])  # fmt: skip


def _of_step(data: dict, sweep: bool = False) -> tuple[list[str], list[tuple[dict | None, ...]]]:
    """The peers, and our rows of forward, loss and backward, each with what was measured of the peers."""
    ours = [r for r in ok(data, op="training", mode="full", provider="ours") if bool(r["sweep"]) == sweep]
    beside = {p: [next(iter(ok(data, provider=p, **key_beside(r))), None) for r in ours] for p in PEERS}
    beside = {p: rows for p, rows in beside.items() if any(rows)}
    return list(beside), list(zip(ours, *beside.values(), strict=True))


def _times(r: dict | None) -> str:
    return f"{ms(r['median_ms'])} ms ({ms(r['p20_ms'])} to {ms(r['p80_ms'])})" if r else "-"


def _row_head(r: dict) -> list[str]:
    return [case_of(r, ", {} statistics"), f"{r['shape']['B']:,}", f"{r['shape']['N']:,}", r["dtype"]]


def step_table(data: dict, everything: bool) -> str:
    """Forward, loss and backward of the training step: ours, then each peer as a time and a ratio."""
    (peers, rows), lines = _of_step(data), []
    for r, *others in rows:
        if not everything and r["dtype"] != "float32" and data["environment"]["device"] != "cuda":
            continue
        cells = [*_row_head(r), _times(r)]
        for p, other in zip(peers, others, strict=True):
            cells += [_times(other), f"{other['median_ms'] / r['median_ms']:.1f}"] if other else [_why(data, r, p), "-"]
        lines.append(cells)
    return markdown(["case", "B", "N", "precision", "ours", *(f"{p} | ratio" for p in peers)], lines)


def _why(data: dict, row: dict, provider: str) -> str:
    """The status of a peer that was not measured."""
    key = {**key_beside(row), "provider": provider}
    del key["mode"]  # what failed has one row
    return next((r["status"] for r in data["results"] if key.items() <= r.items()), "-")


def memory_table(data: dict) -> str:
    """Peak of forward, loss and backward beyond parameters and inputs, and the gradients that are left of it."""
    peers, rows = _of_step(data)
    lines = [
        [*_row_head(r), mib(r["gradient_bytes"]), *(mib(x and x["peak_bytes"]) for x in (r, *others))]
        for r, *others in rows if r["peak_bytes"]
    ]  # fmt: skip
    return markdown(["case", "B", "N", "precision", "gradients", "ours", *peers], lines)


def parts_table(data: dict) -> str:
    """The other operations: every provider's forward, and forward with backward where there is one."""
    parts: dict[tuple, dict[str, dict]] = {}
    for r in ok(data):
        if r["op"] != "training":
            parts.setdefault((r["op"], case_of(r), r["dtype"], r["provider"]), {})[r["mode"]] = r
    lines = [[*names, _times(modes.get("forward")), _times(modes.get("full"))] for names, modes in parts.items()]
    return markdown(["operation", "case", "precision", "provider", "forward", "with backward"], lines)


def sweep_table(data: dict) -> str:
    (peers, rows), lines = _of_step(data, sweep=True), []
    for times in rows:
        r, s = times[0], times[0]["shape"]
        lines.append([r["sweep"], f"{s['B']:,}", f"{s['N']:,}", str(s["k"]), widths_of(r),
                      *(f"{ms(t['median_ms'])} ms" if t else "-" for t in times)])  # fmt: skip
    return markdown(["varied", "B", "N", "k", "d", "ours", *peers], lines) if lines else ""


def refused(data: dict) -> list[str]:
    return [
        f"- {r['provider']}, {r['op']}, {r['case']}, {r['dtype']}: {r['status']}: "
        f"{str(r['reason']).splitlines()[-1][:200]}"
        for r in data["results"] if r["status"] not in ("ok", "skipped")
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------- README and results

NO_GPU = (
    "**No GPU has run this package yet**, so there is no GPU figure here; modelled ones are printed by `sparc-kernels "
    "cost`."
)
PLOTS = {
    "scaling": "Time and memory against N", "speedup": "Times ours", "breakdown": "Where our step's time goes",
}  # fmt: skip


def _wrapped(part: str) -> str:
    """Prose in lines of 120; tables, lists, code, pictures and headings as they are."""
    if part.startswith(("|", "-", "```", "!", "#")):
        return part
    return textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False)


def readme(known: list[tuple[str, dict]]) -> str:
    parts = [] if newest(known, "cuda") else [NO_GPU]
    for name, data in filter(None, (newest(known, device) for device in ("cuda", "cpu"))):
        parts.append(
            f"{where(data)}; forward + loss + backward, median (p20 to p80), every provider verified against the "
            f"float64 reference first; {load_of(data)}. Record: `benchmarks/results/{name}`; more, and how: "
            "[docs/results.md](docs/results.md)."
        )
        parts.append(step_table(data, everything=False))
    return "\n\n".join(map(_wrapped, parts))


def results(known: list[tuple[str, dict]]) -> str:
    parts = [] if newest(known, "cuda") else [NO_GPU]
    for name, data in reversed(known):
        parts += _result(name, data)
    return "\n\n".join(map(_wrapped, parts))


def _result(name: str, data: dict) -> list[str]:
    """Paragraphs on one record."""
    env, nvml = data["environment"], data["environment"]["nvml"].get("reason")
    cut = "" if data["complete"] else f" The run is incomplete: {data['stopped']}."
    plots = [(title, f"{name.removesuffix('.json')}_{kind}.svg") for kind, title in PLOTS.items()]
    parts = [
        f"## {env['device_name']}, {env['date'][:10]}",
        f"```sh\n{_command(env['command'])}\n```",
        f"{where(data)}; {load_of(data)}; record `benchmarks/results/{name}`.{cut} Every row was verified against the "
        f"float64 reference before it was timed; the times are medians (p20 to p80) of runs in turns{_apart(data)}."
        + (f" NVML: {nvml}." if nvml else ""),
        "Forward, loss and backward of the training step:",
        step_table(data, everything=True),
        "Most memory at one time beyond parameters and inputs, the gradients that it ends with included:",
        memory_table(data),
        *(f"![{title}](plots/{file})" for title, file in plots if (ROOT / "docs" / "plots" / file).exists()),
    ]
    absent = [f"- {p['name']} ({p['op']}): {p['reason']}" for p in data["providers"] if p["status"] == "absent"]
    for title, text in (
        ("Parts of it, and what the machine can do at most (`ceiling`):",
         parts_table(data) if any(r["op"] != "training" for r in ok(data)) else ""),
        ("Sweeps, forward, loss and backward:", sweep_table(data)),
        ("Absent:", "\n".join(absent)),
        ("Not timed:", "\n".join(refused(data))),
    ):  # fmt: skip
        parts += [title, text] if text else []
    return parts


def _command(words: list[str]) -> str:
    """With CLONE for the path of the official repository."""
    return shlex.join(
        "CLONE" if before == "--official" else word for before, word in zip(["", *words], words, strict=False)
    )


def _apart(data: dict) -> str:
    """Cases that were too large for turns."""
    names = dict.fromkeys(r["case"] for r in ok(data, op="training") if r["interleaved"] is False)
    alone = [n for n in names if len({r["provider"] for r in ok(data, op="training", case=n)}) > 1]
    return f", of {', '.join(alone)} one provider after the other" if alone else ""


def between(text: str, new: str, name: str) -> str:
    """The text with what is between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name}: expected the markers {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def texts(root: Path = ROOT, of: str = "") -> dict[Path, str]:
    """What README.md and docs/results.md should say.

    Args:
        root: of the checkout.
        of: outside of a checkout, only of the records named in this text.
    """
    folder = root / "benchmarks" / "results"
    known = records(folder)
    if of and _tracked(folder) is None:
        known = [(name, data) for name, data in known if name in of]
    made = {root / "README.md": readme(known), root / "docs" / "results.md": results(known)}
    return {path: between(path.read_text(), new, path.name) for path, new in made.items()}


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
