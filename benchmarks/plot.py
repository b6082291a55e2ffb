"""Pictures of a record, from its JSON alone: time and memory against N, speed-ups, where our step's time goes.

    python -m benchmarks.plot FILE.json [--out docs/plots]

Each as PNG and SVG with a transparent ground and middle grey text, so that they read on light and on dark pages.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from sparc_kernels.core.console import ends_with_its_pipe
from sparc_kernels.core.validation import missing

from . import record
from .record import MIB, ROOT, case_of, key_beside, load_of, ms, ok, where, widths_of

GREY = "#808890"
# colours of middle lightness, told apart by colour-blind readers too; ours is the strongest
COLOURS = {
    "ours": "#d95f02", "ours, CUDA graph": "#e6ab02", "reference, eager": "#1f9e89", "reference, compiled": "#3b8fd6",
    "reference, max-autotune": "#6a7fd0", "official SPARC": "#a06cc8", "official SPARC, OpenAI's kernels": "#d066a8",
    "sparsify": "#6aa84f", "torch.topk": "#3b8fd6", "FlashInfer": "#6aa84f",
}  # fmt: skip
MARKS = "osD^vP*X<>"


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


def _finish(fig, data: dict):
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    fig.text(0.01, 0.005, f"{where(data)}\n{load_of(data)}", fontsize=7, color=GREY, ha="left", va="bottom")
    return fig


def scaling(data: dict, plt):
    """Time and memory of forward + loss + backward against N, with the modelled roofline of ours; None without a
    series of at least two N."""
    rows = [r for r in ok(data, op="training", mode="full") if r["sweep"] == "N"]
    values = sorted({r["shape"]["N"] for r in rows})
    if len(values) < 2:
        return None
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    for i, name in enumerate(dict.fromkeys(r["provider"] for r in rows)):
        mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["shape"]["N"])
        n = [r["shape"]["N"] for r in mine]
        style = {
            "color": COLOURS.get(name, GREY), "marker": MARKS[i % len(MARKS)], "ms": 4.5,
            "lw": 2.2 if name == "ours" else 1.4, "label": name,
        }  # fmt: skip
        left.plot(n, [r["median_ms"] for r in mine], **style)
        left.fill_between(n, [r["p20_ms"] for r in mine], [r["p80_ms"] for r in mine], color=style["color"], alpha=0.18)
        _line(right, mine, "peak_bytes", MIB, **style)
    ours = [r for r in rows if r["provider"] == "ours"]
    _line(left, ours, "roofline_ms", 1, color=GREY, ls="--", lw=1.2, label="roofline of ours (modelled)")
    _line(right, rows, "gradient_bytes", MIB, color=GREY, ls=":", lw=1.4, label="the gradients alone")
    for axis, title in ((left, "ms"), (right, "peak MiB beyond weights and inputs")):
        axis.set(xscale="log", yscale="log", xlabel="latents N")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(True, which="major", color=GREY, alpha=0.25, lw=0.6)
        axis.set_xticks(values, [f"{v / 1024:g}k" if v >= 1024 else f"{v:g}" for v in values])
        axis.xaxis.set_minor_locator(plt.NullLocator())
        axis.legend(fontsize=8, loc="upper left")
    s = rows[0]["shape"]
    fig.suptitle(
        f"Forward + loss + backward against N: B {s['B']:,}, k {s['k']}, d {widths_of(rows[0])}, {rows[0]['dtype']}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return _finish(fig, data)


def _line(axis, rows: list[dict], field: str, unit: float, **style) -> None:
    """A field against N, where rows have it."""
    points = sorted({(r["shape"]["N"], r[field] / unit) for r in rows if r[field]})
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def speedup(data: dict, plt):
    """Bars: each provider's forward + loss + backward over ours in the same precision; None without any."""
    bars = []
    for r in ok(data, op="training", mode="full", provider="ours", sweep=""):
        rows = [x for x in ok(data, **key_beside(r)) if x["provider"] != "ours"]
        others = [(x["provider"], x["median_ms"] / r["median_ms"]) for x in rows]
        if others:
            bars.append((f"{case_of(r)}\n{r['dtype']}, N {r['shape']['N']:,}, B {r['shape']['B']:,}", others))
    if not bars:
        return None
    count = sum(len(others) for _, others in bars)
    fig, axis = plt.subplots(figsize=(8.5, 1.6 + 0.3 * count + 0.25 * len(bars)))
    y, ticks, seen = 0.0, [], set()
    for _, others in bars:
        ticks.append(y + (len(others) - 1) / 2)
        for name, ratio in others:
            axis.barh(y, ratio - 1, 0.8, left=1, color=COLOURS.get(name, GREY), label=None if name in seen else name)
            text = f" {ratio:.1f}x" if ratio < 10 else f" {ratio:.0f}x"
            axis.text(ratio, y, text, va="center", fontsize=8.5, color=GREY)
            seen.add(name)
            y += 1
        y += 0.8
    axis.axvline(1, color=COLOURS["ours"], lw=2)
    axis.set_yticks(ticks, [label for label, _ in bars], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(plt.LogLocator(10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}x")
    axis.xaxis.set_minor_formatter(plt.NullFormatter())
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.9), high * 1.25)
    axis.set_title("Time over ours, forward + loss + backward (ours: the line at 1)", loc="left", fontsize=11)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08 - 0.3 / max(count, 4)), ncols=3)
    return _finish(fig, data)


PARTS = ("#d95f02", "#1f9e89", "#a06cc8", "#3b8fd6", "#6aa84f", "#e6ab02", "#d066a8", "#7f6a50", "#50a0a8")


def breakdown(data: dict, plt):
    """Where the time of our forward + loss + backward goes, operator by operator; None without a profile."""
    profiles = [p for p in data["profiles"] if p["parts"]]
    if not profiles:
        return None
    fig, axis = plt.subplots(figsize=(9.5, 1.9 + 0.75 * len(profiles)))
    wholes = [sum(part["ms"] for part in p["parts"]) for p in profiles]
    shares = [{part["name"]: 100 * part["ms"] / whole for part in p["parts"]}
              for p, whole in zip(profiles, wholes, strict=True)]  # fmt: skip
    total = Counter()
    for share in shares:
        total.update(share)
    colours = dict(zip((name for name, _ in total.most_common()), PARTS, strict=False))
    for y, share in enumerate(shares):
        known = [(name, share[name], colour) for name, colour in colours.items() if name in share]
        other, left = sum(part for name, part in share.items() if name not in colours), 0.0
        for name, part, colour in [*known, *([("other", other, GREY)] if other else [])]:
            axis.barh(y, part, 0.62, left=left, color=colour, label=name)
            if part >= 6:
                axis.text(left + part / 2, y, f"{part:.0f} %", ha="center", va="center", fontsize=8.5, color="white")
            left += part
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=5)
    labels = [f"{case_of(p)}, {p['dtype']}\nN {p['shape']['N']:,}, {ms(whole)} ms"
              for p, whole in zip(profiles, wholes, strict=True)]  # fmt: skip
    axis.set_yticks(range(len(profiles)), labels, fontsize=8.5)
    axis.set(xlim=(0, 100))
    axis.xaxis.set_major_formatter("{x:.0f} %")
    axis.invert_yaxis()
    axis.set_title("Where the time of our step goes (torch: everything outside of the package's operators)", loc="left",
                   fontsize=11)  # fmt: skip
    return _finish(fig, data)


KINDS = {"scaling": scaling, "speedup": speedup, "breakdown": breakdown}


def draw(path: Path, out: Path) -> list[Path]:
    """Writes what the record has data for; returns the files."""
    data, written, plt = record.load(path), [], _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    for kind, make in KINDS.items():
        fig = make(data, plt)
        if fig is None:
            continue
        for ending, how in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
            file = out / f"{path.stem}_{kind}.{ending}"
            fig.savefig(file, **how)
            written.append(file)
        plt.close(fig)
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
