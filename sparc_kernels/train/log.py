"""What a training run says: a progress bar or lines, log.csv, TensorBoard and wandb when asked for."""

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

from ..core.validation import missing, require
from ..io.atomic import write_atomically

LOG = "log.csv"
LOGGERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # name, also of the package -> its module
_LINE_EVERY = 5.0  # seconds between lines where there is no terminal
_BAR = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # tqdm's own leaves figures no room in 80 columns
_FIRST = ("step", "epoch", "lr", "loss", "explained_variance", "explained_variance_cross", "l0", "dead", "skipped",
          "samples_per_s", "seconds")  # fmt: skip


class RunLog:
    """Where the rows of a run go.

    Args:
        out: folder of log.csv and TensorBoard's files, None: no files.
        metrics: names of further columns.
        steps: of the whole run, for the bar.
        start: rows of later steps are removed from an older log.csv: they are about to be made again.
        to: of "tensorboard", "wandb".
        quiet: no bar and no lines.

    Raises: ValueError for a log.csv that is not this run's; ImportError for a logger that is not installed.
    """

    def __init__(
        self,
        out: Path | None,
        metrics: Sequence[str],
        steps: int,
        start: int = 0,
        to: Sequence[str] = (),
        settings: dict | None = None,
        quiet: bool = False,
    ):
        self.steps, self.quiet, self.bar, self.file = steps, quiet, None, None
        self.columns = [*_FIRST, *(name for name in metrics if name not in _FIRST)]
        self.tensorboard = self.wandb = None
        if out is not None:
            self._open_csv(out / LOG, start)
        if "tensorboard" in to:
            self.tensorboard = import_logger("tensorboard").SummaryWriter(str(out or "."))
        if "wandb" in to:
            folder = None if out is None else str(out)
            self.wandb = import_logger("wandb").init(
                project=os.environ.get("WANDB_PROJECT", "sparc"), config=settings or {}, dir=folder, resume="allow"
            )
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self.bar = tqdm(total=steps, initial=start, bar_format=_BAR, dynamic_ncols=True)
        self._said = 0.0

    def _open_csv(self, path: Path, start: int) -> None:
        rows = []
        if path.exists():
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                found = csv.DictReader(file)
                try:
                    ours = found.fieldnames is None or found.fieldnames == self.columns
                    rows = [row for row in found if _whole(row, self.columns) and int(row["step"]) <= start]
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
        if self.bar is not None:
            self.bar.update()

    def row(self, row: dict, important: bool = False) -> None:
        """Log one row; on a line too when it is `important` or the last line is some seconds old."""
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
        elif not self.quiet and (important or time.monotonic() - self._said > _LINE_EVERY):
            self._said = time.monotonic()
            place = f"step {row['step']:>7,}/{self.steps:,}", f"epoch {row['epoch']:>3}"
            print("  ".join([*place, *_summary(row)]), flush=True)

    def _fitting(self, parts: list[str]) -> str:
        """As many of them as the terminal has room for beside the counts; at least the first."""
        about = self.bar.format_dict
        room = (about["ncols"] or math.inf) - len(self.bar.format_meter(**about | {"postfix": None})) - 3
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        for part in (self.bar, self.file, self.tensorboard):
            if part is not None:
                part.close()
        if self.wandb is not None:
            self.wandb.finish()


def _whole(row: dict, columns: list[str]) -> bool:
    """A complete line of these columns: the last line of a killed run may be cut off."""
    return list(row) == columns and None not in row.values() and row["step"].isdecimal()


def _summary(row: dict) -> list[str]:
    """Figures, those that matter most first."""
    parts = [f"loss {row['loss']:.4f}", f"{row['samples_per_s']:,.0f} samples/s", f"EV {row['explained_variance']:.3f}"]
    if row.get("explained_variance_cross") is not None:
        parts[-1] += f"/{row['explained_variance_cross']:.3f}"
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']:,}")
    if row.get("val_loss") is not None:
        parts.append(f"validation loss {row['val_loss']:.4f} EV {row['val_explained_variance']:.3f}")
    return [*parts, f"L0 {row['l0']:.1f}", f"dead {row['dead']:,}"]


def import_logger(name: str):
    """The module of one of LOGGERS. Raises: ImportError that says what to install."""
    try:
        return importlib.import_module(LOGGERS[name])
    except ImportError as error:
        raise missing(f"logging to {name}", name) from error
