"""Train on features four times larger than the memory limit, and on the same features in memory.

    python tests/scripts/larger_than_memory.py [--repeats 3]

Writes 512 MiB of features (two streams, float32 .npy), then trains on them in processes of their own, in turns: with
`memory` 128 MiB, so that windows of 64 MiB are read while the model trains, and with 1 GiB, so that all of it stays in
memory. Files are dropped from the system's cache before every run. Printed are, after the first 20 steps: samples/s of
wall time, and of the CPU time and waiting of the training thread, which other work on the machine disturbs less;
the part of the time in which it waited; and the process's peak resident memory beyond that of the same run on few rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, STEPS, SKIPPED = 131_072, 512, 240, 20
MIB = 1 << 20


def write_features(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for s in "ab":
        with open(folder / f"{s}.npy", "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, WIDTH)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(64):
                file.write(rng.standard_normal((ROWS // 64, WIDTH), dtype=np.float32).data)
            file.flush()
            os.fsync(file.fileno())
        np.save(folder / f"few-{s}.npy", rng.standard_normal((4096, WIDTH), dtype=np.float32))


def train(folder: Path, prefix: str, memory: int) -> dict:
    """One run, in this process."""
    import torch

    from sparc_kernels.train.config import TrainConfig
    from sparc_kernels.train.trainer import Trainer

    torch.set_num_threads(1)
    marks = []  # of every step: time, CPU time of this thread, time waited
    config = TrainConfig(n_latents=1024, k=16, auxk=0, epochs=99, max_steps=STEPS, memory=memory)
    files = {s: folder / f"{prefix}{s}.npy" for s in "ab"}
    trainer = Trainer(config, files, device="cpu", full_check=False, quiet=True)
    trainer.on_step = lambda *_: marks.append((time.perf_counter(), time.thread_time(), trainer.data.loader.waited))
    trainer.train()
    seconds, busy, waited = (end - start for start, end in zip(marks[SKIPPED - 1], marks[-1], strict=True))
    samples = (STEPS - SKIPPED) * 256
    return {
        "samples_per_s": samples / seconds,
        "undisturbed": samples / (busy + waited),
        "waited": waited / seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "resident": trainer.data.loader.resident,
    }


def run(folder: Path, prefix: str, memory: int) -> dict:
    for file in folder.glob("*.npy"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--one", str(folder), prefix, str(memory)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(Path(args.one[0]), args.one[1], int(args.one[2]))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder)
        few = run(folder, "few-", 128 * MIB)["peak"]
        by_limit: dict[str, list[dict]] = {"128 MiB": [], "1 GiB": []}
        for _ in range(args.repeats):
            for limit, memory in (("128 MiB", 128 * MIB), ("1 GiB", 1024 * MIB)):
                result = run(folder, "", memory)
                by_limit[limit].append(result)
                print(f"memory {limit:8} {result['samples_per_s']:8,.0f} samples/s of wall time "
                      f"{result['undisturbed']:8,.0f} of its own  waited {result['waited']:.1%}  "
                      f"{(result['peak'] - few) / MIB:4.0f} MiB beyond a run on few rows  "
                      f"{'in memory' if result['resident'] else 'windows'}", flush=True)  # fmt: skip
        for key, what in (("samples_per_s", "wall time"), ("undisturbed", "its own time")):
            rates = {limit: statistics.median(r[key] for r in results) for limit, results in by_limit.items()}
            print(f"memory a quarter of the features: {rates['128 MiB'] / rates['1 GiB']:.1%} of the rate in memory "
                  f"(median, {what})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
