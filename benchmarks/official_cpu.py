"""Forward + loss + backward of AlignedSAE beside the official class on a CPU, in one process.

    python benchmarks/official_cpu.py --official CLONE [--rows 256] [--latents 8192] [--threads 1]

CLONE is a clone of github.com/AtlasAnalyticsLab/SPARC. Both get the same weights and inputs; their losses must agree
before anything is timed. Rounds alternate, so that a change of the machine's load meets both.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from record_official_replay import load_official  # noqa: E402

from sparc_kernels import AlignedSAE  # noqa: E402

WIDTHS = {"vision": 1024, "clip_image": 768, "clip_text": 768}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    classes = load_official(args.official)
    official = classes["global"](WIDTHS, args.latents, 64, auxk=64)
    ours = AlignedSAE(WIDTHS, args.latents, 64, auxk=64)
    ours.load_state_dict(official.state_dict())
    x = {s: torch.nn.functional.normalize(torch.randn(args.rows, d), dim=1) for s, d in WIDTHS.items()}

    def step(model):
        model.zero_grad()
        started = time.perf_counter()
        loss, _ = model.compute_loss(model(x), x)
        loss.backward()
        return time.perf_counter() - started, loss.item()

    losses = [step(model)[1] for model in (ours, official)]
    if abs(losses[0] - losses[1]) > 1e-5 * losses[1]:
        raise SystemExit(f"the losses differ: {losses}, nothing is timed")
    times = {"ours": [], "official": []}
    for _ in range(args.rounds):
        for name, model in (("ours", ours), ("official", official)):
            times[name].append(1e3 * step(model)[0])
    print(f"B {args.rows}, N {args.latents}, k 64, auxk 64, fp32, {args.threads} thread(s), torch {torch.__version__}")
    for name, ms in times.items():
        print(f"{name:>9}: median {statistics.median(ms):.0f} ms, {min(ms):.0f} to {max(ms):.0f}")
    print(f"    ratio: {statistics.median(times['official']) / statistics.median(times['ours']):.1f}")


if __name__ == "__main__":
    main()
