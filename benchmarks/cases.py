"""Named shapes, sweeps, and the tensors of one problem. Nothing is measured in this file.

A shape is a `sparc_kernels.tools.shape.Shape`: bytes, FLOPs and modelled time come from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from sparc_kernels import AlignedSAE, reference
from sparc_kernels.tools import cost

from . import data as data_

Tensor = torch.Tensor
DEAD_THRESHOLD = 1000
GAP = 1e-5  # two pre-activations nearer than this may change places in float32
CHUNK = {"cpu": 2**30, "cuda": 2**33}  # bytes of float64 [rows, N] tensors held at once

# how a row computes: torch dtype of the parameters, float32 matmul precision, autocast's dtype, fields of Shape
PRECISIONS = {
    "float32": (torch.float32, "highest", None, {"dtype": "float32"}),
    "tf32": (torch.float32, "high", None, {"dtype": "float32", "tf32": True}),
    "bfloat16": (torch.bfloat16, "highest", None, {"dtype": "bfloat16"}),
    "float16": (torch.float16, "highest", None, {"dtype": "float16"}),
    "bfloat16 autocast": (torch.float32, "highest", torch.bfloat16, {"dtype": "bfloat16", "autocast": True}),
}


@dataclass(frozen=True)
class Case:
    """One shape with a name; `sweep` names the size that varies where it is one of a series."""

    name: str
    shape: cost.Shape
    data: str = "gaussian"  # or "real": a key of `benchmarks.data.KINDS`
    sweep: str = ""

    @property
    def streams(self) -> dict[str, int]:
        return {f"s{i}": d for i, d in enumerate(self.shape.d_streams)}

    def cost_shape(self, dtype: str, gpu: cost.GPU | None = None) -> cost.Shape:
        """The cost model's shape of a row in one of PRECISIONS, with the launch settings of a GPU."""
        return replace(self.shape, **PRECISIONS[dtype][3], **({"arch": gpu.arch} if gpu else {}))

    def as_dict(self) -> dict:
        s = self.shape
        return {"B": s.B, "N": s.N, "k": s.k, "d_streams": list(s.d_streams), "auxk": s.auxk, "dead": s.dead}


def _shape(B: int, N: int, k: int, *widths: int, auxk: int = 0) -> cost.Shape:
    return cost.Shape(B, N, k, widths, auxk=auxk, dead=N // 10 if auxk else 0)


# auxk 64 with a tenth of the latents dead is the official configuration in mid-training
CASES = {
    case.name: case
    for case in (
        Case("open-images", _shape(256, 8192, 64, 1024, 768, 768, auxk=64)),  # official: DINOv2 L, CLIP-L image, text
        Case("coco", _shape(256, 8192, 64, 768, 512, 512, auxk=64)),  # official: DINOv2 B, CLIP-B image and text
        Case("open-images-32k", _shape(256, 32768, 64, 1024, 768, 768, auxk=64)),
        Case("open-images-32k-B1024", _shape(1024, 32768, 64, 1024, 768, 768, auxk=64)),
        Case("batch", cost.CASES["B"]),  # fills a GPU
        Case("giant", cost.CASES["C"]),  # DINOv2 giant with both SigLIP so400m towers
        Case("openai", _shape(16384, 32768, 32, 768)),  # OpenAI's GPT-2 autoencoder
        Case("sparsify", _shape(16384, 131072, 192, 4096)),  # its command for Llama
        Case("crosscoder", _shape(4096, 65536, 100, *[2304] * 2)),  # of two layers
        Case("crosscoder-8", cost.CASES["D"]),  # of eight
        Case("bionemo-21k", _shape(4096, 21504, 32, 2688)),  # BioNeMo's published shapes, the smallest
        Case("bionemo-86k", _shape(4096, 86016, 32, 2688)),
        Case("stress", _shape(4096, 344064, 32, 2688)),
        Case("stress-1M", cost.CASES["E"]),  # to the largest
        Case("flexsae", _shape(2048, 65536, 64, 2304)),  # published; rows as in its example
        Case("flash-sae", _shape(1024, 65536, 64, 4096)),  # published
        Case("FlashSAE", _shape(4096, 131072, 128, 4096)),  # published
    )
}
# a quarter of the official widths and latents, for a CPU
SMALL = Case("small", _shape(64, 2048, 32, 256, 192, 192, auxk=32))
# each keeps what is special about a case; for tests and for gpu_report on a CPU
TINY = {
    case.name: case
    for case in (
        Case("open-images", _shape(16, 128, 8, 24, 16, 16, auxk=8)),
        Case("batch", _shape(32, 256, 8, 24, 16, 16)),
        Case("openai", _shape(32, 256, 4, 32)),
        Case("crosscoder-8", _shape(24, 128, 12, *[18] * 8)),
    )
}
SWEEPS = {  # what varies around a base, on CUDA and on a CPU
    "cuda": (
        CASES["batch"].shape,
        {
            "N": (8192, 16384, 65536, 131072, 262144, 524288),
            "B": (256, 1024, 16384), "k": (16, 32, 128, 256), "S": (1, 2, 5, 8), "d": (256, 512, 2048),
        },
    ),
    "cpu": (
        replace(SMALL.shape, auxk=0, dead=0),
        {
            "N": (1024, 4096, 8192, 16384, 32768, 65536),
            "B": (16, 256, 1024), "k": (8, 16, 64, 128), "S": (1, 2, 5, 8), "d": (64, 128, 512),
        },
    ),
}  # fmt: skip


def sweep(device: str, axis: str) -> list[Case]:
    """The cases of one axis, the base among them, in ascending order."""
    base, axes = SWEEPS[device]
    widths = base.d_streams

    def shape(value: int) -> cost.Shape:
        if axis == "S":
            return replace(base, d_streams=widths[:1] * value)
        if axis == "d":
            return replace(base, d_streams=tuple(max(8, d * value // widths[0]) for d in widths))
        return replace(base, **{axis: value})

    values = list(axes[axis])
    if axis != "S":  # the base is no member of that series: its streams have different widths
        values.append(widths[0] if axis == "d" else getattr(base, axis))
    return [Case(f"{axis} {value}", shape(value), sweep=axis) for value in sorted(values)]


class Problem:
    """The tensors of one case on one device: float32 masters whose values bfloat16 holds exactly, so that every dtype
    computes the same problem. Rows on which float32 could select otherwise are drawn again.
    """

    def __init__(self, case: Case, device: str | torch.device, seed: int = 0):
        self.case, self.device, self.seed = case, torch.device(device), seed
        self.tensors = data_.KINDS[case.data](case.shape, self.device, seed)
        self._redraw()
        self.counters = torch.zeros(case.shape.N, dtype=torch.long, device=self.device)
        self.counters[data_.dead_ids(case.shape)] = 10 * DEAD_THRESHOLD

    def _redraw(self) -> None:
        """Draws unclear rows again, four times at most."""
        for attempt in range(1, 5):
            unclear = self._unclear()
            if not len(unclear):
                return
            again = self.tensors.draw(len(unclear), self.seed + 1000 * attempt)
            for x, new in zip(self.tensors.xs, again, strict=True):
                x[unclear] = new

    def rows_at_once(self, tensors: int) -> int:
        """Rows of which that many float64 [rows, N] tensors fit into CHUNK."""
        return max(1, CHUNK[self.device.type] // (8 * self.case.shape.N * tensors))

    def preactivations(self, dtype: torch.dtype) -> Iterator[tuple[slice, list[Tensor]]]:
        """Chunks of rows, and their [rows, N] of every stream."""
        t, rows = self.tensors, self.rows_at_once(self.case.shape.S + 1)
        streams = list(zip(t.xs, t.w_encs, t.pre_biases, t.latent_biases, strict=True))
        for start in range(0, self.case.shape.B, rows):
            part = slice(start, start + rows)
            yield part, [reference.preactivations(x[part].to(dtype), *(p.to(dtype) for p in ps)) for x, *ps in streams]

    @torch.no_grad()
    def _unclear(self) -> Tensor:
        """Rows whose k-th and next pre-activation (or AuxK's, in a stream) are within GAP of the row's spread."""
        s, near, dead = self.case.shape, [], data_.dead_ids(self.case.shape)
        for _, hs in self.preactivations(torch.float64):
            near.append(_near(sum(hs[1:], hs[0]), s.k))
            for h in hs if 0 < s.auxk < s.dead else ():
                near[-1] |= _near(h[:, dead].relu(), s.auxk)
        return torch.cat(near).nonzero()[:, 0]

    @cached_property
    @torch.no_grad()
    def dead(self) -> list[Tensor] | None:
        """The masks that AuxK reads: after this batch has moved the counters."""
        s = self.case.shape
        if not s.auxk:
            return None
        fired = [torch.zeros_like(self.counters, dtype=torch.bool) for _ in range(s.S)]
        for _, hs in self.preactivations(torch.float64):
            chosen = sum(hs[1:], hs[0]).topk(s.k).indices
            for mask, h in zip(fired, hs, strict=True):
                mask[chosen[h.gather(1, chosen) > 1e-3]] = True
        return [(self.counters + 1 > DEAD_THRESHOLD) & ~mask for mask in fired]

    def xs(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype) for x in self.tensors.xs]

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return dict(zip(self.case.streams, self.xs(dtype), strict=True))

    def model(self, dtype: torch.dtype) -> AlignedSAE:
        """A new one in training mode; its optimizer takes lr 0, so that every execution computes the same."""
        c = self.case
        sizes, how = (c.streams, c.shape.N, c.shape.k, c.shape.auxk or None), {"device": "meta", "dtype": dtype}
        model = AlignedSAE(*sizes, dead_steps_threshold=DEAD_THRESHOLD, **how)  # draws no weights
        return self.fill(model.to_empty(device=self.device))

    @torch.no_grad()
    def fill(self, model):
        """The problem's weights and counters into an AlignedSAE or the official class, which is returned."""
        for ps, values in zip(groups(model).values(), self.tensors[1:5], strict=True):
            for p, value in zip(ps, values, strict=True):
                p.copy_(value)
        self.reset(model)
        return model

    def reset(self, model) -> None:
        """Counters as at the start."""
        for s in self.case.streams:
            getattr(model, f"stats_last_nonzero_{s}").copy_(self.counters)


def _near(h: Tensor, k: int) -> Tensor:
    """Rows whose k-th largest and the next may change places in float32: bool [rows]."""
    if k == h.shape[1]:
        return h.new_zeros(h.shape[0], dtype=torch.bool)
    top = h.topk(k + 1, dim=1).values
    return (top[:, k - 1] - top[:, k] < GAP * top[:, :1].abs()[:, 0]) & (top[:, k - 1] > 0)


def groups(model) -> dict[str, list[Tensor]]:
    """Parameters of an AlignedSAE or of the official class, in the order of its streams."""
    return {
        "w_enc": [model.encoders[s].weight for s in model.streams],
        "w_dec": [model.decoders[s].weight for s in model.streams],
        "pre_bias": [model.pre_biases[s] for s in model.streams],
        "latent_bias": [model.latent_biases[s] for s in model.streams],
    }
