"""Record what the authors' SPARC classes compute, for tests/nn/test_official_replay.py.

    python tests/scripts/record_official_replay.py --official PATH [--out tests/data/official_replay.npz]

PATH is a clone of github.com/AtlasAnalyticsLab/SPARC. Its two model files are imported from there and run in fp64 on
the CPU for 14 optimizer steps per case; only numbers reach the output. Streams are visited in their declared order (the
classes iterate over a set, whose order varies by process). The first seed is taken for which no selection, relu or
counter is within MIN_GAP of going the other way, and for which AuxK is idle, partial and full at some point.

Arrays in the file (`steps` are the case's few detailed steps, stacked on the first axis):
    inputs/{stream} [14, B, d]    state/{start}/{key}    meta (JSON: constants, seed, smallest gap, torch version)
    {case}/config (JSON: the fields of Case and what `record` saw)    {case}/metrics [14, metric_names]
    {case}/counters/{stream} [14, N]    {case}/final/{key}
    {case}/out/{key} [steps, ...]    {case}/grad/{parameter} and {case}/projected/{decoder} [steps, ...]
    {case}/reinit/{stream} [dead, d], the new encoder rows
    {case}/subset_out/{key}, subset_grad/{parameter}, subset_counters/{stream}: a forward of the streams in SUBSET after
        the run, and the gradient of the sum of the squares of all its outputs
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

D_STREAMS = {"photo": 13, "clip": 20, "caption": 7}
SUBSET = ["photo", "caption"]  # the streams of the extra forward after the run
N_LATENTS, BATCH, STEPS = 70, 12, 14
AUXK_THRESHOLD, DEAD_STEPS_THRESHOLD, LR = 1e-3, 3, 1e-2
MIN_GAP = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded run; `detail` says how many of its steps keep outputs and gradients."""

    topk_type: str
    k: int
    auxk: int | None
    start: str  # "fresh": the official initialisation; "moved": biases non-zero, decoder columns off unit norm
    auxk_coef: float = 1 / 32
    cross_loss_coef: float = 1.0
    detail: int = 3  # the first, one in which some stream has fewer dead latents than auxk, the last; 1: AuxK's fullest
    reinit_after: int | None = None
    subset: bool = False


CASES = {
    "global": Case("global", 5, None, "moved"),
    "global_auxk": Case("global", 5, 12, "fresh", subset=True),
    "local": Case("local", 5, None, "fresh"),
    "local_auxk": Case("local", 5, 12, "moved", subset=True),
    "global_no_cross": Case("global", 5, 12, "moved", cross_loss_coef=0.0, detail=1),
    "local_large_k": Case("local", 45, 12, "moved", detail=1),
    "global_reinit": Case("global", 5, 12, "moved", auxk_coef=0.25, cross_loss_coef=0.5, detail=1, reinit_after=6),
}


class OrderedSet(dict):
    """As much of `set` as the official classes use, iterating in insertion order."""

    def __init__(self, items):
        super().__init__(dict.fromkeys(items))

    def issubset(self, other) -> bool:
        return self.keys() <= other.keys()


def load_official(root: Path) -> dict[str, type]:
    """Import the official model files alone: the package's own __init__ pulls in data and evaluation libraries."""

    def load(name: str, file: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, root / "sparc" / file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        if name.startswith("sparc.model.model_"):
            module.set = OrderedSet
        spec.loader.exec_module(module)
        return module

    for name in ("sparc", "sparc.model", "sparc.kernels"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sparc.kernels"].TritonDecoderAutograd = None  # only the dense decoder is recorded
    load("sparc.loss", "loss.py")
    load("sparc.model.utils", "model/utils.py")
    return {
        kind: load(f"sparc.model.model_{kind}", f"model/model_{kind}.py").MultiStreamSparseAutoencoder
        for kind in ("global", "local")
    }


def coarse(x: Tensor) -> Tensor:
    """Round to multiples of 2^-10, so that drawn numbers compress."""
    return (x * 1024).round() / 1024


def draw(seed: int, fresh: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs [STEPS, B, d] per stream, rows of unequal norm around a non-zero mean, and the "moved" start."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    row_scale = torch.exp(0.3 * randn(STEPS, BATCH, 1))
    spread = torch.full((STEPS, 1, 1), 1.0)
    spread[: STEPS // 2] = 0.6  # like rows at first, so that many latents die; unlike ones later, so that few stay dead
    inputs = {
        s: coarse(scale * row_scale * (spread * randn(STEPS, BATCH, d) + 0.3 * randn(d)))
        for (s, d), scale in zip(D_STREAMS.items(), (1.0, 0.5, 2.0), strict=True)
    }
    moved = {}
    for key, value in fresh.items():
        moved[key] = coarse(value + 0.05 * randn(*value.shape)) if value.is_floating_point() else value.clone()
        if key.startswith("latent_biases"):
            moved[key][:4] -= 4.0  # latents that never fire: dead, and with no positive pre-activation
        if key.startswith("decoders"):
            moved[key][:, 10:16] = coarse(moved[key][:, 10:16] * 0.02)  # short enough for the 1e-8 of unit norm to show
            moved[key][:, 16] = 0
    return inputs, moved


class Gap:
    """The smallest distance of any decision in a run from its alternative."""

    def __init__(self):
        self.value = float("inf")

    def see(self, distances: Tensor):
        if distances.numel():
            self.value = min(self.value, distances.abs().min().item())

    def see_forward(self, model, outputs: dict[str, Tensor], dead: dict[str, Tensor], case: Case):
        logits = {s: outputs[f"logits_{s}"].detach() for s in D_STREAMS if f"logits_{s}" in outputs}
        total = sum(logits.values())
        for s, h in logits.items():
            key = total if case.topk_type == "global" else h
            order = key.sort(dim=1, descending=True)
            self.see(order.values[:, : case.k].diff(dim=1))  # the order of the indices
            self.see(order.values[:, case.k - 1] - order.values[:, case.k])  # and where the selection ends
            selected = h.gather(1, order.indices[:, : case.k])
            self.see(selected)  # relu
            self.see(selected - model.auxk_threshold)  # counters
            if case.auxk is not None:
                self.see(h[:, dead[s]])
                ranked = (h * dead[s]).sort(dim=1, descending=True).values
                full = ranked[:, case.auxk - 1] > 0
                self.see((ranked[:, case.auxk - 1] - ranked[:, case.auxk])[full])
                if (ranked[:, case.auxk - 1] < 0).any():
                    self.value = 0.0  # a negative auxk_values entry would be compared against an arbitrary fill


def record(model, helpers, case: Case, inputs: dict[str, Tensor], seed: int, gap: Gap) -> tuple[dict, dict]:
    """Train `model` as the official loop does. Returns (arrays, what was seen)."""
    stats = {s: getattr(model, f"stats_last_nonzero_{s}") for s in D_STREAMS}
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, eps=1e-8)
    gen = torch.Generator().manual_seed(seed)
    rows, counters, details, dead_counts, positives, reinit = [], [], [], [], [], {}
    for step in range(STEPS):
        x = {s: inputs[s][step] for s in D_STREAMS}
        optimizer.zero_grad()
        dead = model.get_dead_neurons()
        outputs = model(x)
        if case.topk_type == "global":
            dead = model.get_dead_neurons()  # global counts before AuxK reads, local after
        gap.see_forward(model, outputs, dead, case)
        loss, metrics = model.compute_loss(outputs, x, case.auxk_coef, case.cross_loss_coef)
        loss.backward()
        detail = {f"out/{key}": value.detach().clone() for key, value in outputs.items()}
        differentiable = sorted(key for key, value in outputs.items() if value.requires_grad)
        detail |= {f"grad/{name}": p.grad.clone() for name, p in model.named_parameters()}
        for s in D_STREAMS:
            helpers.unit_norm_decoder_(model.decoders[s])
            helpers.unit_norm_decoder_grad_adjustment_(model.decoders[s])
            detail[f"projected/decoders.{s}.weight"] = model.decoders[s].weight.grad.clone()
        optimizer.step()

        row = {key: value.detach().double().item() for key, value in metrics.items()}
        row["avg_mse_loss"] = float(np.mean([row[f"mse_loss_{s}"] for s in D_STREAMS]))  # officially total_loss itself
        rows.append({"loss": loss.item(), **row})
        counters.append({s: c.clone() for s, c in stats.items()})
        details.append(detail)
        dead_counts.append([int(dead[s].sum()) for s in D_STREAMS])
        positives.append([int((outputs[f"logits_{s}"] * dead[s] > 0).sum(1).max()) for s in D_STREAMS])

        if step == case.reinit_after:
            for s, mask in model.get_dead_neurons().items():
                reinit[s] = 0.01 * torch.randn(int(mask.sum()), D_STREAMS[s], generator=gen, dtype=torch.float64)
                model.encoders[s].weight.data[mask] = reinit[s]
                model.latent_biases[s].data[mask] = 0
                stats[s][mask] = 0

    partial = [t for t, counts in enumerate(dead_counts[:-1]) if any(0 < n < (case.auxk or 0) for n in counts)]
    if case.detail == 1:
        steps = [max(range(STEPS), key=lambda t: max(positives[t]))]
    else:
        steps = [0, max(partial, key=lambda t: max(positives[t]), default=STEPS // 2), STEPS - 1]
    arrays = {key: torch.stack([details[t][key] for t in steps]) for key in details[0]}
    arrays |= {f"counters/{s}": torch.stack([c[s] for c in counters]) for s in D_STREAMS}
    arrays |= {f"reinit/{s}": value for s, value in reinit.items()}
    arrays |= {f"final/{key}": value.clone() for key, value in model.state_dict().items()}
    arrays["metrics"] = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    seen = {
        "metric_names": list(rows[0]),
        "steps": steps,
        "differentiable": differentiable,
        "dead": dead_counts,
        "positive_dead": positives,
    }
    if case.subset:
        optimizer.zero_grad()
        x = {s: inputs[s][0] for s in SUBSET}
        dead = model.get_dead_neurons()
        outputs = model(x)
        gap.see_forward(model, outputs, model.get_dead_neurons() if case.topk_type == "global" else dead, case)
        arrays |= {f"subset_out/{key}": value.detach() for key, value in outputs.items()}
        sum(value.square().sum() for value in outputs.values() if value.requires_grad).backward()
        arrays |= {f"subset_grad/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        arrays |= {f"subset_counters/{s}": c for s, c in stats.items()}
    return arrays, seen


def lacking(name: str, case: Case, dead: np.ndarray, positive: np.ndarray) -> str:
    """What a case with AuxK fails to show; `dead` and `positive` (the most in any row) are [STEPS, S]."""
    if case.auxk is None:
        return ""
    if dead[:DEAD_STEPS_THRESHOLD].any() or not dead.any():
        return f"{name}: no dead latents at first, some later"
    if not ((dead > 0) & (dead < case.auxk))[:-1].any():
        return f"{name}: a stream with fewer dead latents than auxk before the last step"
    if case.detail == 3 and not (positive > case.auxk).any():
        return f"{name}: a row with more than auxk positive dead latents"
    if name == "local_large_k" and not (positive > 0).any():
        return f"{name}: a positive dead latent"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="root of a clone of the official repository")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1].joinpath("data", "official_replay.npz"))
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    official = load_official(args.official)

    for seed in range(200):
        gap, arrays, seen = Gap(), {}, {}
        states: dict[str, dict[str, Tensor]] = {}
        for name, case in CASES.items():
            torch.manual_seed(seed)
            model = official[case.topk_type](
                D_STREAMS, N_LATENTS, case.k, case.auxk, AUXK_THRESHOLD, DEAD_STEPS_THRESHOLD
            ).train()
            if not states:
                states["fresh"] = {key: value.clone() for key, value in model.state_dict().items()}
                inputs, states["moved"] = draw(seed, states["fresh"])
            model.load_state_dict(states[case.start])
            recorded, seen[name] = record(model, sys.modules["sparc.model.utils"], case, inputs, seed, gap)
            arrays |= {f"{name}/{key}": value for key, value in recorded.items()}
        missing = [
            lacking(n, c, np.array(seen[n]["dead"]), np.array(seen[n]["positive_dead"])) for n, c in CASES.items()
        ]
        if gap.value > MIN_GAP and not any(missing):
            break
        print(f"seed {seed} refused: smallest gap {gap.value:.1e}; without {list(filter(None, missing))}")
    else:
        raise SystemExit("no seed under 200 will do")

    arrays |= {f"inputs/{s}": value for s, value in inputs.items()}
    arrays |= {f"state/{start}/{key}": value for start, state in states.items() for key, value in state.items()}
    packed = {key: value.numpy() for key, value in arrays.items()}
    for name, case in CASES.items():
        packed[f"{name}/config"] = np.array(json.dumps(dataclasses.asdict(case) | seen[name]))
        print(f"{name}: dead {seen[name]['dead']}\n  most positive in a row {seen[name]['positive_dead']}")
    packed["meta"] = np.array(
        json.dumps(
            {
                "source": "github.com/AtlasAnalyticsLab/SPARC",
                "torch": torch.__version__,
                "seed": seed,
                "smallest_gap": gap.value,
                "d_streams": D_STREAMS,
                "subset": SUBSET,
                "n_latents": N_LATENTS,
                "auxk_threshold": AUXK_THRESHOLD,
                "dead_steps_threshold": DEAD_STEPS_THRESHOLD,
                "lr": LR,
            }
        )
    )
    np.savez_compressed(args.out, **packed)
    size = args.out.stat().st_size / 1e6
    print(f"seed {seed}, smallest gap {gap.value:.2e}, {args.out} {size:.2f} MB, {len(packed)} arrays")


if __name__ == "__main__":
    main()
