"""Progress over rows, on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

LINE_EVERY = 5.0  # seconds between lines without a terminal

Watch = Callable[[Iterable], Iterable]  # passes on the items of `Features.batches`, or of a range


def watched(rows: int, what: str) -> Watch:
    """Return a `watch` that shows progress over the rows of feature batches.

    Args:
        rows: total.
        what: label.
    """
    return lambda batches: _shown(batches, rows, what, "rows", lambda batch: len(next(iter(batch[1].values()))))


def counted(what: str, unit: str) -> Watch:
    """Return a `watch` that shows progress over a range, whose items are the first number of each step.

    Args:
        what: label.
        unit: unit of the numbers.
    """

    def watch(steps: range) -> Iterator:
        return _shown(steps, steps.stop - steps.start, what, unit, lambda start: min(steps.step, steps.stop - start))

    return watch


def _shown(items: Iterable, total: int, what: str, unit: str, size: Callable) -> Iterator:
    bar, done, last_line = terminal_bar(total, desc=what, unit=unit, leave=False), 0, time.monotonic()
    try:
        for item in items:
            yield item
            done += size(item)
            if bar is not None:
                bar.update(size(item))
            elif time.monotonic() - last_line >= LINE_EVERY:
                last_line = time.monotonic()
                print(f"{what}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)
    finally:
        if bar is not None:
            bar.close()


def terminal_bar(total: int, **options: Any) -> Any:
    """Return a bar of tqdm on stderr; None without a terminal or without tqdm, where lines are printed instead.

    Args:
        total: of the bar.
        **options: further arguments of tqdm.
    """
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, dynamic_ncols=True, **options)
