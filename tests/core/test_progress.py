"""What is seen of long work: whole figures in a terminal of 80 columns, and a line every few seconds without one."""

import os
import re
import struct
import sys

import pytest
import torch

from sparc_kernels import AlignedSAE
from sparc_kernels.core import progress
from sparc_kernels.core.progress import counted
from sparc_kernels.evaluation.evaluate import evaluate
from sparc_kernels.io.features import Features
from sparc_kernels.train.log import RunLog

ROW = {"step": 1_234_567, "epoch": 12, "lr": 1e-4, "loss": 0.1234, "explained_variance": 0.812, "l0": 64.0,
       "dead": 1234, "explained_variance_cross": 0.694, "skipped": 7, "samples_per_s": 123456.0}  # fmt: skip
FIGURES = "loss 0.1234  123,456 samples/s  EV 0.812/0.694  skipped 7  L0 64.0  dead 1,234"


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal of so many columns; returns a function that gives the last line in it."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    reader, writer = os.openpty()
    with open(writer, "w") as file:

        def last_line() -> str:
            file.write("END")
            file.flush()
            text = b""
            while not text.endswith(b"END"):  # what was written arrives a little later
                text += os.read(reader, 1 << 16)
            lines = text.removesuffix(b"END").decode().replace("\n", "\r").split("\r")
            return [line for line in lines if line.strip()][-1]

        def make(columns: int):
            fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            monkeypatch.setattr(sys, "stderr", file)
            return last_line

        yield make
    os.close(reader)


@pytest.mark.parametrize(("columns", "figures"), [(40, 1), (80, 3), (100, 5), (200, 6)])
def test_figures_of_training_are_whole_in_any_terminal(terminal, columns, figures):
    pytest.importorskip("tqdm")
    last_line = terminal(columns)
    log = RunLog(None, [], 2_000_000, start=1_234_567)
    log.row(ROW)
    log.bar.refresh()
    line = last_line()
    log.close()
    shown = "  ".join(FIGURES.split("  ")[:figures])
    assert line.startswith("1234567/2000000 [") and line.endswith(f"<?, {shown}]") and len(line) < columns


def test_counts_of_evaluation_are_whole_in_80_columns(terminal):
    pytest.importorskip("tqdm")
    last_line = terminal(80)
    steps = counted("by reconstructions", "rows")(range(0, 1_000_000, 300))
    assert next(steps) == 0
    assert re.search(r"\| 0/1000000 \[\d\d:\d\d<\?, \?rows/s\]", last_line())
    steps.close()


def test_every_part_of_an_evaluation_says_how_far_it_is(monkeypatch, capsys):
    """Without a terminal; each part by its own measure."""
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    monkeypatch.setattr("sparc_kernels.metrics._BLOCK_ELEMENTS", 4096)
    torch.manual_seed(0)
    x = {"a": torch.randn(130, 6), "b": torch.randn(130, 5)}
    labels = torch.randn(130, 3) > 0
    model = AlignedSAE({s: t.shape[1] for s, t in x.items()}, 16, 3)
    scores, _ = evaluate(model, Features(x), labels, count=counted)
    text = capsys.readouterr().err
    for line in ("probe: 3 of 3 classes", "cosines: 130 of 130 rows", "by latents: 31 of 130 rows",
                 "by latents: 130 of 130 rows", "by reconstructions: 130 of 130 rows"):  # fmt: skip
        assert line in text
    assert scores == evaluate(model, Features(x), labels)[0]
