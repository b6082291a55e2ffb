"""Pictures of a record, from its JSON alone: time and memory against N, speed-ups, where our step's time goes.

    python -m benchmarks.plot FILE.json [--out docs/plots]

Each as PNG and SVG with a transparent ground and middle grey text, so that they read on light and on dark pages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparc_kernels.core.console import ends_with_its_pipe
from sparc_kernels.core.validation import missing

from . import record
from .report import ROOT, load, ms, ok, where

GREY = "#808890"
# colours of middle lightness, told apart by colour-blind readers too; ours is the strongest
COLOURS = {
    "ours": "#d95f02", "ours, CUDA graph": "#e6ab02", "reference, eager": "#1f9e89", "reference, compiled": "#3b8fd6",
    "reference, max-autotune": "#6a7fd0", "official SPARC": "#a06cc8", "official SPARC, OpenAI's kernels": "#d066a8",
    "sparsify": "#6aa84f", "torch.topk": "#3b8fd6", "FlashInfer": "#6aa84f",
}  # fmt: skip
MARKS = "osD^vP*X<>"
MIB = 2**20


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise missing("drawing plots", "matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY,
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "sparc_kernels",
        "legend.frameon": False, "savefig.transparent": True,
    })  # fmt: skip
    return plt


def _caption(fig, data: dict) -> None:
    fig.text(0.01, 0.005, f"{where(data)}\n{load(data)}", fontsize=7, color=GREY, ha="left", va="bottom")


def _ticks(axis, values: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1024:g}k" if v >= 1024 else f"{v:g}"))


def scaling(data: dict):
    """Time and memory of forward + loss + backward against N, with the modelled roofline of ours; None without a
    series of at least two N."""
    rows = [r for r in ok(data, op="training", mode="full") if r["sweep"] == "N"]
    values = sorted({r["shape"]["N"] for r in rows})
    if len(values) < 2:
        return None
    plt = _pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    for i, name in enumerate(names):
        mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["shape"]["N"])
        n = [r["shape"]["N"] for r in mine]
        style = {
            "color": COLOURS.get(name, GREY), "marker": MARKS[i % len(MARKS)], "ms": 4.5,
            "lw": 2.2 if name == "ours" else 1.4, "label": name,
        }  # fmt: skip
        left.plot(n, [r["median_ms"] for r in mine], **style)
        left.fill_between(n, [r["p20_ms"] for r in mine], [r["p80_ms"] for r in mine], color=style["color"], alpha=0.18)
        held = [(r["shape"]["N"], r["peak_bytes"] / MIB) for r in mine if r["peak_bytes"]]
        if held:
            right.plot(*zip(*held, strict=True), **style)
    line = sorted((r["shape"]["N"], r["roofline_ms"]) for r in rows if r["provider"] == "ours" and r["roofline_ms"])
    if line:
        left.plot(*zip(*line, strict=True), color=GREY, ls="--", lw=1.2, label="roofline of ours (modelled)")
    grads = sorted({(r["shape"]["N"], r["gradient_bytes"] / MIB) for r in rows if r["gradient_bytes"]})
    if grads:
        right.plot(*zip(*grads, strict=True), color=GREY, ls=":", lw=1.4, label="the gradients alone")
    for axis, title in ((left, "ms"), (right, "peak MiB beyond weights and inputs")):
        axis.set(xscale="log", yscale="log", xlabel="latents N")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(True, which="major", color=GREY, alpha=0.25, lw=0.6)
        _ticks(axis.xaxis, values)
        axis.legend(fontsize=8, loc="upper left")
    s = rows[0]["shape"]
    fig.suptitle(
        f"Forward + loss + backward against N: B {s['B']:,}, k {s['k']}, d {'/'.join(map(str, s['d_streams']))}, "
        f"{rows[0]['dtype']}", x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    _caption(fig, data)
    return fig


def speedup(data: dict):
    """Bars: each provider's forward + loss + backward over ours in the same precision; None without any."""
    bars = []
    for r in ok(data, op="training", mode="full", provider="ours"):
        if r["sweep"]:
            continue
        same = {name: r[name] for name in ("op", "case", "data", "dtype", "mode")}
        others = [(x["provider"], x["median_ms"] / r["median_ms"]) for x in ok(data, **same) if x["provider"] != "ours"]
        if others:
            kind = "" if r["data"] == "gaussian" else ", real"
            label = f"{r['case']}{kind}\n{r['dtype']}, N {r['shape']['N']:,}, B {r['shape']['B']:,}"
            bars.append((label, others))
    if not bars:
        return None
    plt = _pyplot()
    count = sum(len(others) for _, others in bars)
    fig, axis = plt.subplots(figsize=(8.5, 1.6 + 0.3 * count + 0.25 * len(bars)))
    y, ticks, labels, seen = 0.0, [], [], set()
    for label, others in bars:
        start = y
        for name, ratio in others:
            axis.barh(y, ratio - 1, 0.8, left=1, color=COLOURS.get(name, GREY), label=None if name in seen else name)
            axis.text(
                ratio, y, f" {ratio:.1f}x" if ratio < 10 else f" {ratio:.0f}x", va="center", fontsize=8.5, color=GREY
            )
            seen.add(name)
            y += 1
        ticks.append((start + y - 1) / 2)
        labels.append(label)
        y += 0.8
    axis.axvline(1, color=COLOURS["ours"], lw=2)
    axis.set_yticks(ticks, labels, fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xscale("log")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.9), high * 1.25)
    axis.set_title("Time over ours, forward + loss + backward (ours: the line at 1)", loc="left", fontsize=11)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08 - 0.3 / max(count, 4)), ncols=3)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    _caption(fig, data)
    return fig


PARTS = ("#d95f02", "#1f9e89", "#a06cc8", "#3b8fd6", "#6aa84f", "#e6ab02", "#d066a8", "#7f6a50", "#50a0a8")


def breakdown(data: dict):
    """Where the time of our forward + loss + backward goes, operator by operator; None without a profile."""
    profiles = [p for p in data["profiles"] if p["parts"]]
    if not profiles:
        return None
    plt = _pyplot()
    fig, axis = plt.subplots(figsize=(9.5, 1.9 + 0.75 * len(profiles)))
    total: dict[str, float] = {}
    for p in profiles:
        whole = sum(part["ms"] for part in p["parts"])
        for part in p["parts"]:
            total[part["name"]] = total.get(part["name"], 0) + part["ms"] / whole
    names = sorted(total, key=lambda name: -total[name])
    shown, rest = names[: len(PARTS)], names[len(PARTS) :]
    colours = dict(zip(shown, PARTS, strict=False))
    labels = []
    for y, p in enumerate(profiles):
        whole, left = sum(part["ms"] for part in p["parts"]), 0.0
        parts = {part["name"]: part["ms"] for part in p["parts"]}
        ordered = [(name, parts[name], colours[name]) for name in shown if name in parts]
        other = sum(parts.get(name, 0) for name in rest)
        for name, took, colour in [*ordered, *([("other", other, GREY)] if other else [])]:
            share = 100 * took / whole
            axis.barh(y, share, 0.62, left=left, color=colour, label=name)
            if share >= 6:
                axis.text(left + share / 2, y, f"{share:.0f} %", ha="center", va="center", fontsize=8.5, color="white")
            left += share
        kind = "" if p["data"] == "gaussian" else ", real"
        labels.append(f"{p['case']}{kind}, {p['dtype']}\nN {p['shape']['N']:,}, {ms(whole)} ms")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=5)
    axis.set_yticks(range(len(profiles)), labels, fontsize=8.5)
    axis.set(xlim=(0, 100))
    axis.xaxis.set_major_formatter("{x:.0f} %")
    axis.invert_yaxis()
    axis.set_title("Where the time of our step goes (torch: everything outside of the package's operators)", loc="left",
                   fontsize=11)  # fmt: skip
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    _caption(fig, data)
    return fig


KINDS = {"scaling": scaling, "speedup": speedup, "breakdown": breakdown}


def draw(path: Path, out: Path) -> list[Path]:
    """Writes what the record has data for; returns the files."""
    data, written = record.load(path), []
    out.mkdir(parents=True, exist_ok=True)
    for kind, make in KINDS.items():
        fig = make(data)
        if fig is None:
            continue
        for ending, how in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
            file = out / f"{path.stem}_{kind}.{ending}"
            fig.savefig(file, **how)
            written.append(file)
        _pyplot().close(fig)
    return written


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots", help="folder (default docs/plots)")
    return parser.parse_args(argv)


@ends_with_its_pipe
def main(argv=None) -> int:
    args = parse(argv)
    try:
        files = draw(args.record, args.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"benchmarks.plot: error: {error}")
        return 2
    print("\n".join(map(str, files)) or "nothing to draw: no measured training steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
