"""Logging of a training run: progress bar or lines, log.csv, TensorBoard and wandb."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ..core.progress import LINE_EVERY, terminal_bar
from ..core.validation import missing, require
from ..io.atomic import write_atomically

LOG = "log.csv"
LOGGERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # name, also of the package -> its module
_BAR = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # shorter than tqdm's, to fit figures into 80 columns
_FIRST = ("step", "epoch", "lr", "loss", "explained_variance", "explained_variance_cross", "l0", "dead", "skipped",
          "samples_per_s", "seconds")  # fmt: skip


class RunLog:
    """Writes the rows of a run to all logs.

    Args:
        out: folder of log.csv and TensorBoard's files; None: no files.
        metrics: names of further columns.
        steps: of the whole run, for the bar.
        start: step from which the run continues; later rows are removed from an existing log.csv.
        to: any of "tensorboard", "wandb".
        settings: shown as wandb's config.
        quiet: no bar and no lines.

    Raises:
        ValueError: log.csv is not this run's.
        ImportError: a logger is not installed.
    """

    def __init__(
        self,
        out: Path | None,
        metrics: Sequence[str],
        steps: int,
        start: int = 0,
        *,
        to: Sequence[str] = (),
        settings: dict | None = None,
        quiet: bool = False,
    ):
        self.steps, self.quiet = steps, quiet
        self.bar: Any = None  # of tqdm, which is untyped
        self.file: TextIO | None = None
        self.columns = [*_FIRST, *(name for name in metrics if name not in _FIRST)]
        self.tensorboard: Any = None
        self.wandb: Any = None
        if out is not None:
            self._open_csv(out / LOG, start)
        if "tensorboard" in to:
            self.tensorboard = import_logger("tensorboard").SummaryWriter(str(out or "."))
        if "wandb" in to:
            folder = None if out is None else str(out)
            self.wandb = import_logger("wandb").init(
                project=os.environ.get("WANDB_PROJECT", "sparc"), config=settings or {}, dir=folder, resume="allow"
            )
        if not quiet:
            self.bar = terminal_bar(steps, initial=start, bar_format=_BAR)
        self._said = 0.0

    def _open_csv(self, path: Path, start: int) -> None:
        rows = []
        if path.exists():
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                reader = csv.DictReader(file)
                try:
                    ours = reader.fieldnames is None or reader.fieldnames == self.columns
                    rows = [row for row in reader if _whole(row, self.columns) and int(row["step"]) <= start]
                except csv.Error:
                    ours = False
            expected = f"the log of this run, with columns {', '.join(self.columns[:4])} and so on"
            require(ours, str(path), expected, "another file; move it away")
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115, closed by close()
        self.writer = csv.DictWriter(self.file, self.columns, restval="")

    def advance(self) -> None:
        """Advance the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def row(self, row: dict, important: bool = False) -> None:
        """Log one row.

        Args:
            row: column -> value, with at least the columns that a line shows.
            important: print it even if the last line is less than LINE_EVERY old.
        """
        if self.file is not None:
            self.writer.writerow(row)
            self.file.flush()
        for name, value in row.items():
            if self.tensorboard is not None and isinstance(value, (int, float)) and name != "step":
                self.tensorboard.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        if self.bar is not None:
            self.bar.set_postfix_str(self._fitting(_summary(row)), refresh=False)
        elif not self.quiet and (important or time.monotonic() - self._said > LINE_EVERY):
            self._said = time.monotonic()
            place = f"step {row['step']:>7,}/{self.steps:,}", f"epoch {row['epoch']:>3}"
            print("  ".join([*place, *_summary(row)]), flush=True)

    def _fitting(self, parts: list[str]) -> str:
        """The leading parts that fit into the terminal beside the counts; at least the first."""
        about = self.bar.format_dict
        room = (about["ncols"] or math.inf) - len(self.bar.format_meter(**about | {"postfix": None})) - 3
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """Print a message, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar and all logs."""
        for part in (self.bar, self.file, self.tensorboard):
            if part is not None:
                part.close()
        if self.wandb is not None:
            self.wandb.finish()


def _whole(row: dict, columns: list[str]) -> bool:
    """Whether a row is complete; the last line of a killed run may be truncated."""
    return list(row) == columns and None not in row.values() and row["step"].isdecimal()


def _summary(row: dict) -> list[str]:
    """Figures for a line, the most important first."""
    parts = [f"loss {row['loss']:.4f}", f"{row['samples_per_s']:,.0f} samples/s", f"EV {row['explained_variance']:.3f}"]
    if row.get("explained_variance_cross") is not None:
        parts[-1] += f"/{row['explained_variance_cross']:.3f}"
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']:,}")
    if row.get("val_loss") is not None:
        parts.append(f"validation loss {row['val_loss']:.4f} EV {row['val_explained_variance']:.3f}")
    return [*parts, f"L0 {row['l0']:.1f}", f"dead {row['dead']:,}"]


def import_logger(name: str):
    """Import the module of a logger.

    Args:
        name: one of LOGGERS.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(LOGGERS[name])
    except ImportError as error:
        raise missing(f"logging to {name}", name) from error
