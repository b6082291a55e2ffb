"""Kill one process of a run under torchrun, which starts all anew, and compare with a run that was left alone.

    python tests/scripts/kill_ranks.py [--moments 10] [--processes 2] [--tensor-parallel 1] [--seed 0]

Each time another process is killed with SIGKILL during another step. Reported is what differs from what should be: the
others say which process was lost and why and leave within 30 s, the run resumes by itself, and its final weights have
the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from scripts.kill_and_resume import EVERY, arguments, make_features  # noqa: E402

EPOCHS, STEPS = 1, 24
LIMIT = 30  # seconds until the others have left
MOMENT = "MOMENT"  # environment variable: number of the process to kill, step, seconds after it


def run(out: Path, processes: int, shards: int, moment: str = "") -> subprocess.CompletedProcess:
    """Train under torchrun, with one restart."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        "1",
    ]
    words = [*launcher, "--monitor-interval", "0.1", __file__, "--worker", *arguments(out.parent, EPOCHS, EVERY),
             "--out", str(out), "--tensor-parallel", str(shards)]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1", MOMENT: moment}
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)


def worker(words: list[str]) -> int:
    """One process, which kills itself at its moment unless it has been restarted."""
    import functools

    import torch

    from sparc_kernels import cli
    from sparc_kernels.cli import train

    torch.set_num_threads(1)
    leave = os._exit

    def tells(code):
        print(f"left at {time.time()}", file=sys.stderr, flush=True)
        leave(code)

    os._exit = tells
    rank, step, delay = (os.environ[MOMENT] or "-1 0 0").split()

    def on_step(done, loss, metrics):
        mine = int(rank) == int(os.environ["RANK"]) and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0
        if mine and done == int(step):
            print(f"killed at {time.time() + float(delay)}", file=sys.stderr, flush=True)
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()

    train.Trainer = functools.partial(train.Trainer, on_step=on_step)
    return cli.main(["train", *words])


def kill_ranks(folder: Path, moments: int, processes: int, shards: int, seed: int, tell=lambda text: None) -> list[str]:
    """Returns what went wrong, one line each."""
    make_features(folder)
    alone = run(folder / "reference", processes, shards)
    if alone.returncode:
        return [f"the run that was left alone failed: {alone.stdout}{alone.stderr}"]
    want, rng, wrong = (folder / "reference" / "model.safetensors").read_bytes(), random.Random(seed), []
    for i in range(moments):
        rank, step = rng.randrange(processes), 2 + (i * (STEPS - 4)) // max(1, moments - 1)
        out = folder / f"run-{i}"
        found = run(out, processes, shards, f"{rank} {step} {rng.random() * 0.02:.4f}")
        output, before = found.stdout + found.stderr, len(wrong)
        resumed = re.findall(r"Resuming after step (\d+)", output)
        if found.returncode:
            wrong.append(f"run {i}: exit code {found.returncode}: {output}")
        elif (out / "model.safetensors").read_bytes() != want:
            wrong.append(f"run {i}: other weights after rank {rank} was killed in step {step}")
        told = {int(n) for n in re.findall(rf"rank (\d+) ends, since rank {rank} is lost: its process is gone", output)}
        if told != {*range(processes)} - {rank}:
            wrong.append(f"run {i}: ranks {sorted(told)} have told that rank {rank} was lost: {output}")
        killed, left = ([float(at) for at in re.findall(rf"{what} at ([\d.]+)", output)] for what in ("killed", "left"))
        seconds = max(left, default=math.inf) - min(killed, default=0.0)
        if seconds > LIMIT:
            wrong.append(f"run {i}: the others left {seconds:.1f} s after rank {rank}")
        at = resumed[0] if resumed else 0
        verdict = "same bits" if len(wrong) == before else "WRONG"
        when = f"killed after step {step:2}, the others left after {seconds:.1f} s, resumed after step {at:>2}"
        tell(f"{i + 1:3}  rank {rank} {when}: {verdict}")
    return wrong


def main() -> int:
    if "--worker" in sys.argv[:2]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--moments", 10), ("--processes", 2), ("--tensor-parallel", 1), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = kill_ranks(
            Path(folder),
            args.moments,
            args.processes,
            args.tensor_parallel,
            args.seed,
            lambda text: print(text, flush=True),
        )
    print("\n".join(wrong) or f"{args.moments} runs in which a process was killed: the same final weights bit for bit")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
