"""Progress over the rows of feature files, on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator

_LINE_EVERY = 5.0  # seconds

Watch = Callable[[Iterable], Iterable]  # takes `Features.batches`, gives them on


def watched(rows: int, what: str) -> Watch:
    """A `watch` that shows how many of so many rows of `what` are done."""

    def watch(batches: Iterable) -> Iterator:
        bar, done, said = _bar(rows, what), 0, time.monotonic()
        try:
            for start, x in batches:
                yield start, x
                n = len(next(iter(x.values())))
                done += n
                if bar is not None:
                    bar.update(n)
                elif time.monotonic() - said >= _LINE_EVERY:
                    said = time.monotonic()
                    print(f"{what}: {done:,} of {rows:,} rows", file=sys.stderr, flush=True)
        finally:
            if bar is not None:
                bar.close()

    return watch


def _bar(rows: int, what: str):
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=rows, desc=what, unit="row", dynamic_ncols=True, leave=False)
