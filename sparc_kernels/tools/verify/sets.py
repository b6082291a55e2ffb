"""Sets of `sparc-kernels verify --adversarial`: logits on which top-k kernels have been or could be wrong.

A set is ROWS rows of N logits, made for N, k and a dtype. `adversarial.py` runs and judges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .judge import F16, F32, F64, Tensor

ROWS = 4  # of every set


@dataclass(frozen=True)
class Set:
    """One kind of rows."""

    name: str
    about: str  # what is special, and who reported it
    logits: Callable  # (n, k, dtype, generator) -> [ROWS, n], rounded to the dtype by the caller
    large: bool = False  # needs more than 4,096 columns
    shape: tuple[int, int] | None = None  # fixed n, k; None: the plan's
    nan: bool = False  # contains NaN
    half: bool = False  # in the interpreter, which runs a set in one dtype: fp16


def _steps(g, n: int, low: float, high: float, steps: int) -> Tensor:
    """Random multiples of (high - low) / steps in [low, high)."""
    return low + (high - low) * torch.randint(steps, (ROWS, n), generator=g).double() / steps


def _places(g, n: int) -> Tensor:
    """A random order of the columns of each row: [ROWS, n]."""
    return torch.rand(ROWS, n, generator=g).argsort(1)


def _normal(n, k, dtype, g):
    return (torch.randn(ROWS, n, generator=g).double() * 64).round() / 64


def _bucket(n, k, dtype, g):
    """All but k // 2 columns share sign, exponent and two bits."""
    h = _steps(g, n, 2, 2.5, 256)
    return h.scatter(1, _places(g, n)[:, : k // 2], 3.0)


def _ties(n, k, dtype, g):
    """k // 2 columns above the threshold; of the others on it: half, all, the first 2,049, the last 2,049."""
    h = _steps(g, n, -2, -1, 64)
    h[0, _places(g, n)[0, : n // 2]] = 1
    h[1], h[2, :2049], h[3, -2049:] = 1, 1, 1
    return h.scatter(1, _places(g, n)[:, : k // 2], 3.0)


def _ascending(n, k, dtype, g):
    i = torch.arange(n).double()
    return torch.stack([i, i - n // 2, i.div(64, rounding_mode="floor"), (i - n) / 256])


def _descending(n, k, dtype, g):
    return _ascending(n, k, dtype, g).flip(1)


def _frequency(n, k, dtype, g):
    """Latents ordered by use: large first, large last, a live head, halved from block to block."""
    slope = 1 - torch.arange(n).double() / n
    noise, block = torch.randn(ROWS, n, generator=g).double(), torch.arange(n) * 8 // n
    head = torch.where(torch.arange(n) < max(n // 16, k), noise[2].abs() + 2, noise[2] / 8 - 6)
    return torch.stack([
        noise[0] / 8 + 4 * slope, (noise[1] / 8 + 4 * slope).flip(0), head, noise[3].abs() * 2.0**-block
    ])  # fmt: skip


def _near(n, k, dtype, g, *, value: float, ulp: float, steps: int):
    return _steps(g, n, value, value + steps * ulp, steps)


def _infinities(n, k, dtype, g):
    """Fewer +inf than k, with -inf; exactly k; one, in the last column; k finite columns, the rest -inf."""
    h, at = _normal(n, k, dtype, g), _places(g, n)
    h[0, at[0, : k // 2]], h[0, at[0, k : 2 * k]] = torch.inf, -torch.inf
    h[1, at[1, :k]], h[2, -1], h[3, at[3, k:]] = torch.inf, torch.inf, -torch.inf
    return h


def _many_infinities(n, k, dtype, g):
    h, at = _normal(n, k, dtype, g), _places(g, n)
    h[0, at[0, : 2 * k]], h[1], h[3, -2 * k :] = torch.inf, torch.inf, torch.inf
    h[2] = torch.inf
    h[2, ::2] = -torch.inf
    return h


def _minus_infinity(n, k, dtype, g):
    """Rows of -inf with no finite column; k - 1; the last one; the last k, with the lowest finite number."""
    h = torch.full((ROWS, n), -torch.inf, dtype=F64)
    h[1, _places(g, n)[1, : k - 1]], h[2, -1], h[3, -k:] = 1.0, -5.0, torch.finfo(dtype).min
    return h


def _nan(n, k, dtype, g):
    h, at = _normal(n, k, dtype, g), _places(g, n)
    h[0, at[0, 0]], h[1, at[1, :k]] = torch.nan, torch.nan
    h[2, at[2, : 2 * k]], h[2, at[2, 2 * k : 3 * k]] = torch.nan, torch.inf
    h[3], h[3, at[3, : k // 2]] = torch.inf, torch.nan
    return h


def _equal(n, k, dtype, g):
    return torch.tensor([0.0, 1.0, -3.0, -torch.finfo(dtype).max], dtype=F64)[:, None].repeat(1, n)


def _one_a_group(n, k, dtype, g):
    """One huge value in every 16, 32, 64 or 128 columns, more than k in all, with ties."""
    h, i = _normal(n, k, dtype, g), torch.arange(n)
    for row, width in zip(h, (16, 32, 64, 128), strict=True):
        row[i % width == (i // width * 7) % width] = 1000
    h[:, ::448] = 1008
    return h


def _one_group(n, k, dtype, g):
    """The k largest adjacent: first, last, across borders, ascending in the middle."""
    h, top = _steps(g, n, -2, 0, 64), 4 + torch.arange(k).double() % 64 / 16
    middle, across = n // 2 // 128 * 128, max(n // 4 // 128 * 128 - k // 2, 0)
    h[0, :k], h[1, -k:], h[2, across : across + k], h[3, middle : middle + k] = top.flip(0), top, 5.0, top
    return h


def _borders(n, k, dtype, g):
    """Equal values on both sides of every border between groups, more than k in all."""
    h, i = _steps(g, n, -2, 0, 64), torch.arange(n)
    for row, width in zip(h, (4, 16, 32, 128), strict=True):
        row[(i % width == 0) | (i % width == width - 1)] = 1
    return h


def _last_bit(n, k, dtype, g):
    """Two neighbouring numbers at four scales; fewer than k have the larger one."""
    h = torch.ones(ROWS, n, dtype=F64).scatter(1, _places(g, n)[:, : max(k - 1, 1)], 1 + torch.finfo(dtype).eps)
    h[1] = -h[1]
    return h * torch.tensor([1, 1, 2.0**10, 2.0**-10], dtype=F64)[:, None]


def _subnormal(n, k, dtype, g):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.randint(-64, 64, (ROWS, n), generator=g).double() * smallest


def _zeros(n, k, dtype, g):
    """+0 and -0 alone; with smaller, larger and both kinds of values."""
    h = torch.where(torch.rand(ROWS, n, generator=g) < 0.5, -0.0, 0.0).double()
    at = _places(g, n)
    h[1, at[1, k // 2 :]], h[2, at[2, : k // 2]] = -1.0, 1.0
    h[3, at[3, : k // 2]], h[3, at[3, 2 * k :]] = 1.0, -1.0
    return h


def _negative(n, k, dtype, g):
    return torch.stack([row * s for row, s in zip(_steps(g, n, -2, -1, 64), (1, 64, 2.0**-9, 8192), strict=True)])


def _largest(n, k, dtype, g):
    """The largest finite numbers of both signs."""
    steps = 1 - torch.randint(8, (ROWS, n), generator=g).double() * torch.finfo(dtype).eps
    return steps * torch.finfo(dtype).max * torch.where(torch.rand(ROWS, n, generator=g) < 0.5, 1, -1)


def _any_bits(n, k, dtype, g):
    """Uniform random bits, with all but normal numbers set to 0."""
    kind = torch.int32 if dtype == F32 else torch.int16
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    h = torch.randint(low, high + 1, (ROWS, n), generator=g).to(kind).view(dtype)
    return torch.where(h.isfinite() & (h.abs() >= torch.finfo(dtype).smallest_normal), h, 0)


def _at_k(n, k, dtype, g):
    """k columns above the rest; k - 1 and two equal; k + 1 equal; one above the rest, which are equal."""
    h, at = _steps(g, n, -2, -1, 64), _places(g, n)
    h[0, at[0, :k]], h[1, at[1, : k - 1]], h[1, at[1, k - 1 : k + 1]] = 1, 2, 1
    h[2, at[2, : k + 1]], h[3], h[3, at[3, 0]] = 1, 0, 1
    return h


def _tail(n, k, dtype, g):
    """Large in the last k columns; the last; the first and last; the last group of 16, partial for most N."""
    h, size = _steps(g, n, -2, -1, 64), torch.arange(k).double() % 64 / 16
    h[0, -k:], h[1, -1], h[3, (n - 1) // 16 * 16 :] = size, 1, 1
    h[2, 0] = h[2, -1] = 1
    return h


def _alternating(n, k, dtype, g):
    i = (torch.arange(n) * 512 // n).double()
    return torch.stack([i, -i, torch.full_like(i, 7), torch.where(i % 2 == 0, 100.0, -100.0)])


def _batch(n, k, dtype, g) -> Tensor:
    """ROWS judged rows, then rows that share batches with them: NaN, +inf, the largest numbers of both signs."""
    fine = _steps(g, n, 1, 2, 1024)[0]  # 11 bits
    judged = torch.stack([fine, _ties(n, k, dtype, g)[0], *_alternating(n, k, dtype, g)[[0, 2]]])
    sign = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    largest = 2.0 ** (15 if dtype == F16 else 127)
    return torch.cat([judged, torch.stack([sign * torch.nan, sign.abs() * torch.inf, sign * largest])])


BATCH = Set("batchmates", "a row beside others, FlashMLA #212", _batch)
SETS = [
    Set("bucket", "> 4,096 in a bucket, sglang #36807", _bucket, large=True),
    Set("ties", "> 2,048 ties at k, sglang #35257", _ties, large=True),
    Set("ascending", "sorted rows, vllm #52149", _ascending),
    Set("descending", "sorted rows", _descending),
    Set("infinities", "+inf and -inf, tt-metal #39702", _infinities),
    Set("many inf", "more +inf than k", _many_infinities),
    Set("-inf", "fewer finite numbers than k", _minus_infinity),
    Set("frequency", "latents in order of use, LiteTopK", _frequency),
    Set("near 100", "100 to 100.25, LiteTopK", partial(_near, value=100.0, ulp=2.0**-17, steps=2**15)),
    Set("one value", "distinct in fp32, one in bf16", partial(_near, value=1.0, ulp=2.0**-23, steps=2**14)),
    Set("last bit", "differ in the last bit", _last_bit),
    Set("equal", "all columns equal", _equal),
    Set("one a group", "one huge value in each group", _one_a_group),
    Set("one group", "all of the top k side by side", _one_group),
    Set("borders", "ties across groups' borders", _borders),
    Set("at k", "ties that end at, before, after k", _at_k),
    Set("tail", "the largest in the last columns", _tail),
    Set("negative", "no positive logit", _negative),
    Set("zeros", "+0 and -0", _zeros, half=True),
    Set("subnormal", "below the smallest normal number", _subnormal),
    Set("largest", "the largest finite numbers", _largest),
    Set("any bits", "any bits of a finite number", _any_bits),
    Set("alternating", "rows unlike their neighbours", _alternating),
    Set("NaN", "above +inf, as documented", _nan, nan=True),
    Set("k = 1", "one latent a row", _normal, shape=(131, 1)),
    Set("k = N", "every latent", _normal, shape=(19, 19)),
    Set("k = 512", "the largest k", _normal, shape=(521, 512)),
    Set("N = 3", "fewer columns than a group", _normal, shape=(3, 2)),
    BATCH,
]
