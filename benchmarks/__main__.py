"""The benchmark suite, from a clone: every provider verified, then timed side by side; one JSON, one table.

    python -m benchmarks                                          # a GPU where there is one
    python -m benchmarks --device cpu --quick --out run.json      # under two minutes on two cores
    python -m benchmarks --quick --compare old.json --fail-on-regression 10

What each field of the JSON means: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

from sparc_kernels.core.console import ends_with_its_pipe


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--quick", action="store_true", help="the few rows that say most")
    add("--filter", default="", metavar="REGEX", help='searched in "case data op provider dtype mode"')
    add("--minutes", type=float, help="time limit (default 20, with --quick 1.5); what no longer fits is skipped")
    add("--out", type=Path, metavar="FILE.json", help="default benchmarks/results/<device>_<date>_<commit>.json")
    add("--official", type=Path, metavar="PATH", help="a clone of github.com/AtlasAnalyticsLab/SPARC")
    add("--sweep", action="append", choices=("N", "B", "k", "S", "d"), help="only these of the scaling sweeps")
    add("--threads", type=int, help="of torch on the CPU (default: all cores)")
    add("--seed", type=int, default=0)
    add(
        "--patience", type=float, default=0.0, metavar="SECONDS", help="on a CPU: wait that long in all for quiet cores"
    )
    add("--clock", choices=("wall", "cpu"), default="wall", help="on a CPU: its own CPU time, where others work too")
    add("--compare", type=Path, metavar="OLD.json", help="a verdict per row against an earlier run")
    add("--with", dest="other", type=Path, metavar="NEW.json", help="with --compare: compare this file, run nothing")
    add("--fail-on-regression", type=float, metavar="PCT", help="exit code 1 where a row is slower by more than that")
    add("--list", action="store_true", help="print groups and providers, absent ones with the reason, and stop")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    add("--begin", action="store_true", help=argparse.SUPPRESS)  # gpu_report: write the empty record and stop
    add("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        re.compile(args.filter)
    except re.error as error:
        parser.error(f"--filter: expected a regular expression, got {args.filter!r} ({error})")
    if args.minutes is None:
        args.minutes = 1.5 if args.quick else 20.0
    for name, value in (("--minutes", args.minutes), ("--threads", args.threads), ("--seconds", args.seconds)):
        if value is not None and not value > 0:
            parser.error(f"{name}: expected a number > 0, got {value}")
    if args.fail_on_regression is not None and args.compare is None:
        parser.error("--fail-on-regression: expected together with --compare OLD.json")
    if args.other is not None and args.compare is None:
        parser.error("--with: expected together with --compare OLD.json")
    return args


@ends_with_its_pipe
def main(argv=None) -> int:
    args = parse(argv)
    from . import record, report

    old = None
    try:
        if args.compare:
            old = record.load(args.compare)
        if args.other:
            return _verdicts(args, old, record.load(args.other))
    except (OSError, ValueError) as error:
        print(f"benchmarks: error: --compare: {error}", file=sys.stderr)
        return 2

    import torch

    from . import environment, runner

    warnings.filterwarnings("ignore", module=r"torch\._inductor")  # its own deprecations
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: error: --device cuda: PyTorch sees no GPU here; use --device cpu", file=sys.stderr)
        return 2
    options = runner.Options(
        device, args.quick, args.minutes, args.filter, args.official, args.threads or os.cpu_count() or 1, args.seed,
        args.tiny, tuple(args.sweep or ()), args.seconds, args.resume, args.patience, args.clock,
    )  # fmt: skip
    out = args.out
    if out is None:
        name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        sha = (environment.commit()["commit"] or "nocommit")[:7]
        out = environment.ROOT / "benchmarks" / "results" / f"{slug}_{environment.now()[:10]}_{sha}.json"
    bar = _Bar()
    run = runner.Run(options, out, bar.say)
    groups = run.chosen()
    if args.begin:
        run.save()
        return 0
    if args.list:
        for p in run.data["providers"]:
            said = f"absent: {p['reason']}" if p["reason"] else p["what"]
            print(f"{p['op']}: {p['name']}: {said}")
        for group, providers in groups:
            print(f"{group}: {'; '.join(p.name for p in providers)}")
        return 0
    if not groups:
        print(f"benchmarks: error: --filter: nothing matches {args.filter!r}", file=sys.stderr)
        return 2
    bar.start(len(groups))
    data = run.go(bar.step)
    bar.close()
    print("\n" + report.terminal(data))
    print(f"{data['seconds']:.0f} s; {out}")
    if old is None:
        return 0
    return _verdicts(args, old, data)


def _verdicts(args, old: dict, new: dict) -> int:
    from . import compare

    rows = compare.compare(old, new)
    print("\n" + compare.report(old, new, rows))
    if args.fail_on_regression is None:
        return 0
    bad = compare.regressions(rows, args.fail_on_regression)
    comparable = any(r.change is not None for r in rows)
    if bad or not comparable:
        what = f"{len(bad)} rows slower by more than {args.fail_on_regression:g} %" if bad else "nothing was comparable"
        print(f"\nregression: {what}")
        return 1
    return 0


class _Bar:
    """A tqdm bar on a terminal, where tqdm is installed; lines elsewhere."""

    def __init__(self):
        self.bar = None

    def start(self, total: int) -> None:
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=total, unit="group", dynamic_ncols=True)

    def step(self, what: str) -> None:
        if self.bar is not None:
            if self.bar.postfix:
                self.bar.update(1)
            self.bar.set_postfix_str(what)

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text.replace("\n", " "), flush=True)
        else:
            self.bar.write(text.replace("\n", " "))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.total - self.bar.n)
            self.bar.close()


if __name__ == "__main__":
    raise SystemExit(main())
