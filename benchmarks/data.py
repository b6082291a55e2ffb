"""Rows and weights: Gaussian rows and fresh weights, or the statistics of a trained model on real data.

    python -m benchmarks.data        # trains the demo's model and writes real_statistics.npz again

How long a selection and the latent sums take depends on the numbers: a trained model has heavy-tailed logits, latents
that fire for every tenth row and others that hardly do. `real` extends a trained model of 512 latents to any shape:

- A wide row is r rows of the data side by side, scaled to unit norm, and a latent belongs to one of the r places. So
  its pre-activations are those of the trained model, divided by sqrt(r).
- Each stream is then turned by a random orthogonal matrix, so that no weight is zero and no product gets cheaper.
- Latents beyond r * 512 are mixtures of two trained ones (0.8 and 0.6); more than three streams repeat the three.

Every number is rounded to bfloat16 once, so that every dtype computes the same problem.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sparc_kernels.tools import cost

Tensor = torch.Tensor
FILE = Path(__file__).with_name("real_statistics.npz")
ROWS = 768  # of the data that are kept


class Tensors(NamedTuple):
    """float32 masters of one problem; rows of xs and columns of w_decs have unit norm."""

    xs: list[Tensor]  # [B, d_s]
    w_encs: list[Tensor]  # [N, d_s]
    w_decs: list[Tensor]  # [d_s, N] with strides (1, d_s)
    pre_biases: list[Tensor]  # [d_s]
    latent_biases: list[Tensor]  # [N]
    draw: Callable[[int, int], list[Tensor]]  # (rows, seed) -> other rows of the same kind for every stream


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def dead_ids(s: cost.Shape) -> slice:
    """The dead latents: evenly spaced, `s.dead` of them."""
    return slice(0, s.N // s.dead * s.dead, s.N // s.dead) if s.dead else slice(0, 0)


def gaussian(s: cost.Shape, device: torch.device, seed: int) -> Tensors:
    """Normal rows of unit norm; weights as AlignedSAE starts. Dead latents have a bias that keeps them out of the
    selection while some of their pre-activations stay positive."""
    g = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, seed: int) -> list[Tensor]:
        own = torch.Generator(device).manual_seed(seed)
        xs = [torch.randn(rows, d, device=device, generator=own) for d in s.d_streams]
        return [rounded(x / x.norm(dim=1, keepdim=True)) for x in xs]

    w_encs, w_decs, latent_biases = [], [], []
    for d in s.d_streams:
        w = torch.rand(s.N, d, device=device, generator=g).mul_(2).sub_(1).mul_(d**-0.5)
        w_encs.append(rounded(w))
        w_decs.append(rounded(w.div_(w.norm(dim=1, keepdim=True))).t())
        bias = torch.zeros(s.N, device=device)
        bias[dead_ids(s)] = -1.6 * (3 * d) ** -0.5  # 1.6 standard deviations of a pre-activation
        latent_biases.append(rounded(bias))
    pre_biases = [torch.zeros(d, device=device) for d in s.d_streams]
    return Tensors(draw(s.B, seed + 1), w_encs, w_decs, pre_biases, latent_biases, draw)


def real(s: cost.Shape, device: torch.device, seed: int) -> Tensors:
    """See the head of this file. Raises ValueError for a stream that is narrower than the data's rows."""
    with np.load(FILE) as file:  # python -m benchmarks.data writes it
        kept = {name: torch.from_numpy(file[name]).float().to(device) for name in file.files}
    g = torch.Generator(device).manual_seed(seed)
    widths = [kept[f"x{i % 3}"].shape[1] for i in range(s.S)]
    for i, (d, width) in enumerate(zip(s.d_streams, widths, strict=True)):
        if d < width:
            raise ValueError(f"real statistics: real rows of stream {i} have width {width}, the shape has {d}")
    places = min(d // width for d, width in zip(s.d_streams, widths, strict=True))
    n, scale = kept["w_enc0"].shape[0], places**-0.5

    def pick(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=device, generator=g)

    turns = [
        torch.linalg.qr(torch.randn(d, d, device=device, generator=g)).Q[: places * width]
        for d, width in zip(s.d_streams, widths, strict=True)
    ]

    def draw(rows: int, seed: int) -> list[Tensor]:
        own = torch.Generator(device).manual_seed(seed)
        ids = torch.randint(kept["x0"].shape[0], (rows, places), device=device, generator=own)
        return [rounded((kept[f"x{i % 3}"][ids].flatten(1) * scale) @ turn) for i, turn in enumerate(turns)]

    # which trained latent, in which place, and which other is mixed in; in random order
    number = torch.randperm(s.N, device=device, generator=g).argsort()
    latent, place, other = number % n, number // n % places, pick(n, s.N)
    mixed = number >= n * places
    made = Tensors(draw(s.B, seed + 1), [], [], [], [], draw)
    for i, (d, width) in enumerate(zip(s.d_streams, widths, strict=True)):
        of, turn = i % 3, turns[i].view(places, width, d)
        made.pre_biases.append(rounded((kept[f"pre_bias{of}"].repeat(places) * scale) @ turns[i]))
        bias = kept[f"latent_bias{of}"]
        bias = torch.where(mixed, 0.8 * bias[latent] + 0.6 * bias[other], bias[latent]) * scale
        for name, group in (("w_enc", made.w_encs), ("w_dec", made.w_decs)):
            trained = kept[f"{name}{of}"]
            wide = torch.empty(s.N, d, device=device)
            for p in range(places):
                mine = (place == p).nonzero()[:, 0]
                w = trained[latent[mine]]
                mix = 0.8 * w + 0.6 * trained[other[mine]]
                wide[mine] = torch.where(mixed[mine, None], mix, w) @ turn[p]
            if name == "w_dec":
                wide = (wide / (wide.norm(dim=1, keepdim=True) + 1e-8)).t()
            group.append(rounded(wide))
        dead = dead_ids(s)
        sample = (made.xs[i][:256] - made.pre_biases[i]) @ made.w_encs[i][dead].T
        bias[dead] -= 1.6 * sample.std() if sample.numel() > 1 else 0
        made.latent_biases.append(rounded(bias))
    return made


KINDS = {"gaussian": gaussian, "real": real}


def build() -> None:
    """Trains the demo's global+cross configuration and writes the tensors of `real`, in float16."""
    from sparc_kernels import AlignedSAE
    from sparc_kernels.cli.demo import FULL, train_steps
    from sparc_kernels.data import one_thread, unicode_streams

    with one_thread():
        data = unicode_streams(0)
        torch.manual_seed(0)
        model = AlignedSAE(data.d_streams, FULL.n_latents, FULL.k, dead_steps_threshold=FULL.dead_steps_threshold)
        train_steps(model, data.train, 1.0, FULL, 0)
    model.unit_norm_decoder_()
    kept = {}
    for i, s in enumerate(model.streams):
        tensors = {
            "x": data.train[s][:ROWS], "w_enc": model.encoders[s].weight, "w_dec": model.decoders[s].weight.t(),
            "pre_bias": model.pre_biases[s], "latent_bias": model.latent_biases[s],
        }  # fmt: skip
        kept |= {f"{name}{i}": x.detach().half().numpy() for name, x in tensors.items()}
    np.savez_compressed(FILE, **kept)
    size = sum(x.nbytes for x in kept.values())
    print(f"{FILE}: {FILE.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB unpacked")


if __name__ == "__main__":
    build()
