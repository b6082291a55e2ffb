"""`sparc-kernels demo`: train four configurations on real data built on the spot and compare their latents."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import __version__
from ..core.progress import terminal_bar
from ..core.validation import check_device
from ..data import StreamData, one_thread, unicode_streams
from ..evaluation.evaluate import evaluate, guessing
from ..evaluation.report import import_matplotlib
from ..io.features import Features
from ..metrics import Codes, jaccard
from ..nn.module import AlignedSAE
from ..train.config import TrainConfig
from ..train.trainer import Interrupted, Trainer

CONFIGURATIONS = {  # name -> topk_type, cross_loss_coef; the first is SPARC, the others ablate one part or both
    "global+cross": ("global", 1.0),
    "global": ("global", 0.0),
    "local+cross": ("local", 1.0),
    "local": ("local", 0.0),
}
COLORS = {"global+cross": "#c2410c", "global": "#d97706", "local+cross": "#2563eb", "local": "#64748b"}


@dataclass(frozen=True)
class Settings:
    """One training run. The data have 2,544 rows, 10 steps an epoch, so schedules are shorter than the paper's."""

    steps: int
    lr: float
    n_latents: int = 512
    k: int = 16
    batch_size: int = 256
    dead_steps_threshold: int = 200
    reinit_every: int = 100


FULL = Settings(steps=1000, lr=1e-3)
QUICK = Settings(steps=200, lr=2e-3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    out = Path("sparc-demo")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of the results (default {out})")
    parser.add_argument(
        "--quick", action="store_true", help="half the characters, a fifth of the steps: rougher figures"
    )
    parser.add_argument(
        "--only-data", action="store_true", help="write the features as files for train and eval, and stop"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        args: as `add_arguments` declares them.

    Returns:
        Exit code: 0; 2 for an invalid argument, an unusable output folder or a missing package; 130 after Ctrl-C, 143
        after SIGTERM while training.
    """
    if not 0 <= args.seed < 2**32:
        return _refuse(f"--seed: expected an integer in 0..{2**32 - 1}, got {args.seed}")
    try:
        device = check_device("device", args.device)
    except ValueError as error:
        return _refuse(str(error))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        return _refuse(f"--out {args.out}: cannot write there ({error.strerror or error})")
    try:
        with one_thread():
            _demo(args.out, args.seed, args.quick, device, args.only_data)
    except (KeyboardInterrupt, Interrupted) as stop:
        print("\nInterrupted.", file=sys.stderr)
        return getattr(stop, "code", 130)
    except ImportError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        raise  # for `ends_with_its_pipe`
    except OSError as error:  # for example a full disk
        return _refuse(str(error))
    return 0


def _refuse(message: str) -> int:
    print(f"sparc-kernels demo: error: {message}", file=sys.stderr)
    return 2


def _demo(out: Path, seed: int, quick: bool, device: torch.device, only_data: bool = False) -> None:
    started = time.perf_counter()
    import_matplotlib()  # a missing package is reported before the work
    settings = QUICK if quick else FULL
    if quick:
        print("Quick run: fewer characters and steps. Leave out --quick for the figures to quote.")
    print("Building the data: Unicode characters, drawn in two fonts, and their names ...", flush=True)
    data = unicode_streams(seed, quick)
    widths = ", ".join(f"{s} {d}" for s, d in data.d_streams.items())
    print(
        f"{len(data.train_rows):,} characters to train on, {len(data.test_rows):,} held out, "
        f"{len(data.label_names)} labels; streams {widths} ({time.perf_counter() - started:.0f} s)"
    )
    if only_data:
        write_files(data, out)
        print(f"Wrote features, labels, names and pictures for train and eval to {out}")
        return
    print(f"Training {len(CONFIGURATIONS)} x {settings.steps} steps, N {settings.n_latents}, k {settings.k}, {device}")
    curves, scores, codes = {}, {}, {}
    for name, (topk_type, cross_coef) in CONFIGURATIONS.items():
        torch.manual_seed(seed)
        model = AlignedSAE(
            data.d_streams,
            settings.n_latents,
            settings.k,
            dead_steps_threshold=settings.dead_steps_threshold,
            topk_type=topk_type,
            device=device,
        )
        with _Progress(name, settings.steps) as progress:
            curves[name] = train_steps(model, data.train, cross_coef, settings, seed, on_step=progress.update)
        scores[name], codes[name] = score(model, data.test, data.test_labels)

    chance, first = guessing(len(data.test_rows)), leads(scores)
    table = format_table(scores, chance, len(data.test_rows))
    verdict = "yes" if first else "NO, unlike the published figures"
    report = f"{table}\n\nglobal+cross first in Jaccard and in latent R@1: {verdict}\n"
    print(f"\n{report}")
    record = {
        "quick": quick,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"sparc_kernels": __version__, "torch": torch.__version__},
        "settings": asdict(settings),
        "held_out": len(data.test_rows),
        "global_cross_first": first,
        "scores": scores,
        "chance": chance,
    }
    (out / "alignment.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "alignment.txt").write_text(report, encoding="utf-8")
    plot_curves(curves, out / "curves.png")
    plot_gallery(data, codes["global+cross"], out / "gallery.png")
    print(f"Wrote alignment.json, alignment.txt, curves.png and gallery.png to {out}")
    print(f"Done in {time.perf_counter() - started:.0f} s")


def write_files(data: StreamData, out: Path) -> None:
    """Write features, labels, names and pictures for `sparc-kernels train`, `eval` and `show`.

    Args:
        data: streams with their splits.
        out: folder that gets label_names.txt and the folders train and test.
    """
    parts = {"train": (data.train, data.train_rows), "test": (data.test, data.test_rows)}
    for part, (streams, rows) in parts.items():
        folder = out / part
        folder.mkdir(exist_ok=True)
        for s, x in streams.items():
            np.save(folder / f"{s}.npy", x.numpy())
        np.save(folder / "labels.npy", data.labels[rows].numpy())
        for kind, images in data.images.items():
            np.save(folder / f"{kind}_images.npy", 255 - images[rows].numpy())
        names = [data.names[row] for row in rows.tolist()]
        (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (out / "label_names.txt").write_text("\n".join(data.label_names) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- training


def train_steps(
    model: AlignedSAE,
    streams: dict[str, Tensor],
    cross_coef: float,
    settings: Settings,
    seed: int,
    *,
    on_step: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> dict[str, list[float]]:
    """Train for `settings.steps` steps in the official order, on shuffled batches.

    Args:
        model: trained in place.
        streams: {s: [n, d_s]}, on the CPU.
        cross_coef: weight of the cross-reconstruction loss.
        settings: steps, learning rate, batch size and intervals.
        seed: of batch order and re-initialisation.
        on_step: called after each step with its number and loss.

    Returns:
        Curves, every tenth step: `step`, and the NMSE of the self and of the cross reconstructions, averaged over
        streams and pairs (also where the cross term is not part of the loss).
    """
    curves = {"step": [], "self": [], "cross": []}

    def follow(step, loss, metrics):
        if step % 10 == 0:
            cross = [v for name, v in metrics.items() if name.startswith("cross_loss_")]
            curves["step"].append(step)
            curves["self"].append(metrics["avg_mse_loss"].item())
            curves["cross"].append(torch.stack(cross).mean().item())
        on_step(step, loss)

    config = TrainConfig(
        n_latents=model.n_latents,
        k=model.k,
        auxk=0,
        dead_steps_threshold=model.dead_steps_threshold,
        topk_type=model.topk_type,
        cross_coef=cross_coef,
        lr=settings.lr,
        batch_size=settings.batch_size,
        epochs=settings.steps,  # an upper bound: max_steps ends the run
        max_steps=settings.steps,
        reinit_every=settings.reinit_every,
        seed=seed,
        normalize=False,  # the data already are
    )
    Trainer(
        config, streams, model=model, optimizer=lambda model: _Adam(model, settings.lr), on_step=follow, quiet=True
    ).train()
    return curves


class _Adam(torch.optim.Adam):
    """PyTorch's Adam after the official normalisation and projection; the README's figures were made with it."""

    def __init__(self, model: AlignedSAE, lr: float):
        super().__init__(model.parameters(), lr=lr)
        self.model = model

    @torch.no_grad()
    def step(self):
        self.model.unit_norm_decoder_()
        self.model.project_decoder_grad_()
        super().step()


class _Progress:
    """A tqdm bar on a terminal, one line for each run elsewhere."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.bar = terminal_bar(steps, desc=f"{name:12}", unit="step")

    def __enter__(self):
        self.started = time.perf_counter()
        return self

    def update(self, step: int, loss: Tensor) -> None:
        if self.bar is not None:
            if step % 20 == 0:
                self.bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            self.bar.update()
        elif step == self.steps:
            print(f"  {self.name:12}  loss {loss.item():.3f}  {time.perf_counter() - self.started:.1f} s", flush=True)

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


# ----------------------------------------------------------------------------------------------------------- evaluation


def score(model: AlignedSAE, streams: dict[str, Tensor], labels: Tensor) -> tuple[dict, dict[str, Codes]]:
    """Score the alignment of a trained model on held-out rows.

    Args:
        model: trained.
        streams: {s: [B, d_s]}, on the CPU.
        labels: bool [B, C].

    Returns:
        Scores, and the codes under local selection. Scores: `own`, with the selection used in training (global
        selection lets streams see each other), and `local`, each stream selecting alone with the same weights: Jaccard,
        dead and mixed fractions, explained variance. `jaccard_chance` is the Jaccard of the same codes with each
        stream's latents renumbered at random. `latent` and `cross_recon`: retrieval, local only, averaged over the
        ordered pairs of streams.
    """
    record, codes = evaluate(model, Features(streams, normalize=False), labels, probe=False)
    means = record["retrieval"]["mean"]
    keys = ("jaccard", "jaccard_alive", "jaccard_chance", "all_dead", "mixed", "explained_variance_self",
            "explained_variance_cross")  # fmt: skip
    scores = {kind: {key: record[kind][key] for key in keys} for kind in ("own", "local")}
    return scores | {"latent": means["latent"], "cross_recon": means["cross_reconstruction"]}, codes["local"]


def leads(scores: dict[str, dict]) -> bool:
    """Return whether global+cross is first in Jaccard, under either selection, and in latent R@1.

    Args:
        scores: configuration -> scores as `score` returns them.
    """
    others = [score for name, score in scores.items() if name != "global+cross"]
    columns = (("own", "jaccard"), ("local", "jaccard"), ("latent", "R@1"))
    return all(scores["global+cross"][part][key] > max(score[part][key] for score in others) for part, key in columns)


def format_table(scores: dict[str, dict], chance: dict[str, float], held_out: int) -> str:
    """Format the alignment table: a column for each configuration, and chance.

    Args:
        scores: configuration -> scores as `score` returns them.
        chance: retrieval scores of a random order.
        held_out: rows scored.
    """
    agreement = (
        ("Jaccard, all latents", "jaccard"),
        ("Jaccard, alive latents", "jaccard_alive"),
        ("Jaccard, chance", "jaccard_chance"),
        ("dead in every stream", "all_dead"),
        ("dead in some (mixed)", "mixed"),
        ("explained variance, self", "explained_variance_self"),
        ("explained variance, cross", "explained_variance_cross"),
    )
    recall = ("R@1", "R@10", "MRR")
    sections = (
        ("Latents selected as in training", [(title, "own", key) for title, key in agreement]),
        ("Each stream selects alone, same weights", [(title, "local", key) for title, key in agreement]),
        ("Retrieval, each stream selects alone", [(f"latent {key}", "latent", key) for key in recall]
         + [(f"cross-reconstruction {key}", "cross_recon", key) for key in recall]),
    )  # fmt: skip
    header = f"{f'{held_out} held-out characters':27}" + "".join(f"{name:>14}" for name in (*scores, "chance"))
    lines = [header, "-" * len(header)]
    for title, rows in sections:
        lines.append(title)
        for label, part, key in rows:
            cells = [f"{score[part][key]:14.3f}" for score in scores.values()]
            guess = f"{chance[key]:14.4f}" if key in chance else f"{'-':>14}"
            lines.append(f"  {label:25}" + "".join(cells) + guess)
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- figures


def plot_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot self and cross NMSE of the training batches over the steps.

    Args:
        curves: configuration -> curves as `train_steps` returns them.
        path: of the image.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure = import_matplotlib()(figsize=(10, 4), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2),
        (("self", "A stream from its own code"), ("cross", "A stream from another stream's code")),
        strict=True,
    ):
        for name, curve in curves.items():
            style = "-" if CONFIGURATIONS[name][1] else "--"
            axes.plot(curve["step"], curve[key], style, label=name, color=COLORS[name], linewidth=1.7)
        axes.set(title=title, xlabel="training step", ylabel="normalised mean squared error", yscale="log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def plot_gallery(data: StreamData, codes: dict[str, Codes], path: Path, columns: int = 3, rows: int = 4) -> None:
    """Draw the best aligned latents with their top held-out characters in every stream.

    Args:
        data: streams with pictures and names.
        codes: of the held-out rows, selected locally, for the streams `sans`, `serif` and `name`.
        path: of the image.
        columns: of the grid of latents.
        rows: of the grid of latents.
    """
    figure = import_matplotlib()(figsize=(5 * columns, 2.55 * rows + 1))
    figure.text(0.025, 0.985, "Twelve latents, three streams each", size=19, weight="bold", va="top")
    note = (
        "global+cross; the held-out characters with the highest activation, each stream selecting its latents alone. "
        "Shaded: found in both fonts. Titles: the name word that fits best."
    )
    figure.text(0.025, 0.957, note, size=10.5, color="#57534e", va="top")
    grid = figure.add_gridspec(rows, columns, left=0.055, right=0.985, top=0.90, bottom=0.01, hspace=0.32, wspace=0.16)
    codes = {s: Codes(c.indices.cpu(), c.values.cpu(), c.n_latents) for s, c in codes.items()}
    activations = {s: _dense(c) for s, c in codes.items()}
    for cell, (latent, word, score) in zip(grid, _best_aligned(activations, codes, data, columns * rows), strict=False):
        sans, serif, names = (
            figure.add_subplot(part) for part in cell.subgridspec(3, 1, height_ratios=(1, 1, 1.35), hspace=0.06)
        )
        sans.set_title(word.lower(), loc="left", size=14, weight="bold", color=COLORS["global+cross"])
        sans.set_title(f"latent {latent}   Jaccard {score:.2f}", loc="right", size=9, color="#78716c")
        best = {s: data.test_rows[_top(a[:, latent], 4 if s == "name" else 9)] for s, a in activations.items()}
        for axes, kind in ((sans, "sans"), (serif, "serif")):
            both = torch.isin(best[kind], best["serif" if kind == "sans" else "sans"])
            strip = _strip(data.images[kind][best[kind]], both, 9)
            axes.imshow(strip.numpy(), interpolation="bicubic", aspect="auto")
        text = "\n".join(_shorten(data.names[row].lower(), 68) for row in best["name"].tolist())
        names.text(0.015, 0.9, text, size=8.2, va="top", linespacing=1.35, transform=names.transAxes, color="#292524")
        for axes, kind in ((sans, "sans"), (serif, "serif"), (names, "name")):
            axes.set(xticks=(), yticks=(), facecolor="white")
            axes.set_ylabel(kind, rotation=0, ha="right", va="center", size=9, color="#78716c", labelpad=4)
            axes.spines[:].set_color("#e7e5e4")
    figure.savefig(path, dpi=130)


def _strip(images: Tensor, shaded: Tensor, places: int) -> Tensor:
    """Lay images uint8 [n, 32, 32], 255 is ink, side by side: float RGB [36, 36 places, 3], dark on shaded or white."""
    empty = places - len(images)
    ink = F.pad(images.float() / 255, (2, 2, 2, 2, 0, empty)).unsqueeze(-1)
    shaded = F.pad(shaded, (0, empty))[:, None, None, None]
    paper = torch.where(shaded, torch.tensor([1.0, 0.93, 0.84]), torch.ones(3))
    return torch.cat(list(paper * (1 - ink) + 0.1 * ink), dim=1)


def _best_aligned(activations, codes, data: StreamData, n: int) -> list[tuple[int, str, float]]:
    """At most n latents with distinct words: (latent, word, Jaccard), by Jaccard times the word's F1, descending.

    A latent's word is the one whose F1 as a predictor of where it fired, averaged over streams, is highest.
    """
    labels = data.test_labels.float()
    jaccards = jaccard(codes, data.test_labels).per_latent
    fired = torch.stack([a > 0 for a in activations.values()]).float()  # [S, B, N]
    hits = fired.transpose(1, 2) @ labels  # [S, N, C]
    f1 = (2 * hits / (fired.sum(1).unsqueeze(2) + labels.sum(0)).clamp_min(1)).mean(0)
    fit, word = f1.sort(dim=1, descending=True, stable=True)  # ties to the more frequent word
    often = (fired.sum(1) >= 5).all(0)
    chosen = {}
    for latent in (jaccards * fit[:, 0] * often).argsort(descending=True).tolist():
        chosen.setdefault(word[latent, 0].item(), latent)
    return [(latent, data.label_names[w], jaccards[latent].item()) for w, latent in list(chosen.items())[:n]]


def _dense(codes: Codes) -> Tensor:
    """Dense activations [B, N]; small enough for a few hundred rows."""
    return torch.zeros(len(codes.values), codes.n_latents).scatter_(1, codes.indices, codes.values)


def _top(activations: Tensor, n: int) -> Tensor:
    """Rows of the n highest activations, positive ones only."""
    best = activations.topk(min(n, len(activations))).indices
    return best[activations[best] > 0]


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
