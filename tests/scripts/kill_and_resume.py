"""Kill a training run at random moments, resume it, and compare with a run that was left alone.

    python tests/scripts/kill_and_resume.py [--moments 20] [--seed 0]

Each time a new run is started, killed with SIGKILL at a moment drawn between its first step and shortly before its end
(now and then killed again after resuming), then resumed until it is done. Reported is what differs from what should be:
the same final weights bit for bit, every checkpoint under a final name loadable, at most the last interval lost.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
EVERY = 5  # steps between checkpoints
SETTINGS = ["--n-latents", "256", "--k", "8", "--auxk", "16", "--batch-size", "64", "--lr", "1e-3", "--device", "cpu",
            "--dead-steps-threshold", "20", "--reinit-every", "10", "--memory", "100K", "--log-every", "1"]  # fmt: skip


def make_features(folder: Path) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1500, 10))
    for s, width in (("a", 48), ("b", 32)):
        np.save(folder / f"{s}.npy", (hidden @ rng.standard_normal((10, width))).astype(np.float32))


def arguments(folder: Path, epochs: int = 100_000, checkpoint_every: int = 0) -> list[str]:
    return [*SETTINGS, "--stream", f"a={folder / 'a.npy'}", "--stream", f"b={folder / 'b.npy'}", "--epochs",
            str(epochs), "--checkpoint-every", str(checkpoint_every)]  # fmt: skip


class Run:
    """A training process, forked from one that has imported what it needs."""

    def __init__(self, folder: Path, out: Path, resume: bool = False):
        words = [*arguments(folder, 3, EVERY), "--out", str(out), *(["--resume"] if resume else [])]
        self.output = out.with_suffix(".txt")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sparc_kernels.cli.train", "sparc_kernels.train", "torch._dynamo"])
        self.process = context.Process(target=train, args=(words, self.output))
        self.process.start()

    def ended(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        self.process.join()
        return self.process.exitcode, self.output.read_text()


def train(words: list[str], output: Path) -> None:
    import torch

    from sparc_kernels import cli

    torch.set_num_threads(1)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(["train", *words]))


def steps_of(out: Path) -> int:
    """Steps that a run has logged."""
    try:
        with open(out / "log.csv", newline="") as file:
            return max((int(row["step"]) for row in csv.DictReader(file) if (row["step"] or "").isdigit()), default=0)
    except FileNotFoundError:
        return 0


def kill_at(run: Run, out: Path, step: int, delay: float) -> int:
    """SIGKILL a little after the run has logged a step; returns the steps it had logged, 0 if it had ended by then."""
    while steps_of(out) < step and run.ended() is None:
        time.sleep(0.002)
    time.sleep(delay)
    run.process.kill()
    code, _ = run.wait()
    return steps_of(out) if code == -signal.SIGKILL else 0


def check_checkpoints(out: Path) -> list[str]:
    """Checkpoints under a final name that do not load."""
    from sparc_kernels.io.run_checkpoints import checkpoints, load_checkpoint

    wrong = []
    for path in checkpoints(out / "checkpoints"):
        try:
            load_checkpoint(path)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def kill_and_resume(folder: Path, moments: int, seed: int, tell=lambda text: None) -> list[str]:
    """Returns what went wrong, one line each."""
    make_features(folder)
    reference = folder / "reference"
    code, output = Run(folder, reference).wait()
    if code:
        return [f"the run that was left alone failed: {output}"]
    want, steps = (reference / "model.safetensors").read_bytes(), steps_of(reference)
    rng, wrong = random.Random(seed), []
    for i in range(moments):
        out, kills = folder / f"run-{i}", []
        run = Run(folder, out)
        for _ in range(1 + (rng.random() < 0.3)):
            before = steps_of(out)
            reached = kill_at(run, out, rng.randint(before + 1, steps - 1), rng.random() * 0.02)
            kills.append(reached)
            wrong += [f"run {i}: {problem}" for problem in check_checkpoints(out)]
            run = Run(folder, out, resume=True)
        code, output = run.wait()
        resumed = [int(line.split("step ")[1].split()[0].replace(",", "")) for line in output.splitlines()
                   if line.startswith("Resuming after")]  # fmt: skip
        at = resumed[0] if resumed else 0
        if code:
            wrong.append(f"run {i}: resuming failed: {output}")
        elif (out / "model.safetensors").read_bytes() != want:
            wrong.append(f"run {i}, killed at {kills}: other weights")
        if kills[-1] - at > EVERY:
            wrong.append(f"run {i}: killed at step {kills[-1]}, resumed after {at}: more than an interval lost")
        tell(f"{i + 1:3}  killed after step {', '.join(map(str, kills)):8} of {steps}  resumed after step {at:4}  "
             f"{'same bits' if not wrong else 'WRONG'}")  # fmt: skip
        shutil.rmtree(out)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = kill_and_resume(Path(folder), args.moments, args.seed, tell=lambda text: print(text, flush=True))
    print("\n".join(wrong) or f"{args.moments} runs killed and resumed: the same final weights bit for bit")
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
