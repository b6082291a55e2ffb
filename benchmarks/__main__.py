"""The benchmark suite, from a clone: every provider verified, then timed side by side; one JSON, one table.

    python -m benchmarks                                          # a GPU where there is one
    python -m benchmarks --device cpu --quick --out run.json      # under two minutes on two cores
    python -m benchmarks --quick --compare old.json --fail-on-regression 10
    python -m benchmarks host                                     # a step's host time and launches: host.py
    torchrun --nproc-per-node 8 -m benchmarks ranks               # a step over several ranks: ranks.py

What each field of the JSON means: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import re
import sys
import warnings
from dataclasses import fields
from functools import partial
from pathlib import Path

from sparc_kernels.core.console import ends_with_its_pipe
from sparc_kernels.core.progress import terminal_bar


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
    add("--sweep", dest="sweeps", action="append", choices=[*"NBkSd"], help="only these of the scaling sweeps")
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
    # gpu_report: write the empty record and stop; on a CPU that of a tiny run
    add("--begin", action="store_true", help=argparse.SUPPRESS)
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
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ranks"]:
        from . import ranks

        return ranks.main(argv[1:])
    if argv[:1] == ["host"]:
        from . import host

        return host.main(argv[1:])
    args = parse(argv)
    from . import record, report

    try:
        old, new = (record.load(path) if path else None for path in (args.compare, args.other))
    except (OSError, ValueError) as error:
        print(f"benchmarks: error: --compare: {error}", file=sys.stderr)
        return 2
    if new:
        return _verdicts(args, old, new)

    import torch

    from . import runner

    warnings.filterwarnings("ignore", module=r"torch\._inductor")  # its own deprecations
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: error: --device cuda: PyTorch sees no GPU here; use --device cpu", file=sys.stderr)
        return 2
    if args.begin and device == "cpu":
        args.tiny, args.threads = True, 1
    args.device, args.threads = device, args.threads or os.cpu_count() or 1
    options = runner.Options(**{field.name: getattr(args, field.name) for field in fields(runner.Options)})
    run = runner.Run(options, args.out or _default_file(device), partial(print, flush=True))
    if args.begin:
        run.save()
        return 0
    groups = run.chosen()
    if args.list:
        for p in run.data["providers"]:
            print(f"{p['op']}: {p['name']}: {'absent: ' + p['reason'] if p['reason'] else p['what']}")
        for group, providers in groups:
            print(f"{group}: {'; '.join(p.name for p in providers)}")
        return 0
    if not groups:
        print(f"benchmarks: error: --filter: nothing matches {args.filter!r}", file=sys.stderr)
        return 2
    import torch._dynamo  # as the first optimizer does

    gc.freeze()  # collecting between groups would look through everything imported
    atexit.register(gc.unfreeze)  # or libraries call it leaked
    if bar := terminal_bar(len(groups), unit="group"):
        run.say = bar.write  # above it
        with bar:
            data = run.go(bar.update)
    else:
        data = run.go()
    print("\n" + report.terminal(data))
    print(f"{data['seconds']:.0f} s; {run.out}")
    return 0 if old is None else _verdicts(args, old, data)


def _default_file(device: str) -> Path:
    import torch

    from . import environment, record

    name = environment.slug(torch.cuda.get_device_name(0) if device == "cuda" else "cpu")
    sha = (environment.commit()["commit"] or "nocommit")[:7]
    return record.RESULTS / f"{name}_{environment.now()[:10]}_{sha}.json"


def _verdicts(args, old: dict, new: dict) -> int:
    from . import compare

    rows = compare.compare(old, new)
    print("\n" + compare.report(old, new, rows))
    limit = args.fail_on_regression
    bad = [] if limit is None else compare.regressions(rows, limit)
    if limit is None or (not bad and any(r.change is not None for r in rows)):
        return 0
    print("\nregression: " + (f"{len(bad)} rows slower by more than {limit:g} %" if bad else "nothing was comparable"))
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
