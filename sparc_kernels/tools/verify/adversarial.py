"""Run `encode_topk` and other top-k kernels on rows on which such kernels have been wrong.

A set is rows of logits that reach the selection without rounding: as products with a one-hot row where the logits are
finite and have few bits, else as a latent bias. Truth is the stable sort of the same logits in float64. A row is wrong
if an index is out of range or occurs twice, if the selected logits, sorted, differ from the sort's, or if a returned
value is not the one at its index. For `encode_topk` the order is judged too, with ties to the lowest latent, on every
code path to the selection (`WAYS`). Rows with NaN are left out for peers that do not document its rank.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import textwrap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from ... import reference
from ...core._triton import INTERPRETED
from ...core.registry import resolve_impl
from ...launch import select as select_settings
from ...ops import selection
from ...ops.encode import encode_topk, values_at
from ..replaced import replaced
from ..trace import Launch, as_on_gpu
from .judge import BF16, F16, F32, SHORT, Tensor
from .launches import META, Answers
from .pool import device_lost
from .sets import BATCH, ROWS, SETS, Set

# ------------------------------------------------------------------------------------------------------------ providers

STREAMS, WIDTH = 3, 16  # number and width of the inputs from which logits are computed
TINY = {
    F16: (2.0**12, 2.0**-14),
    BF16: (2.0**70, 2.0**-70),
}  # a normal number, and one that underflows to 0 when divided by it


def _fits(logits: Tensor) -> Tensor:
    """Rows that a product with 1 does not change, bool [R]: normal numbers, of at most 11 bits if tf32 is allowed."""
    fits = logits.isfinite() & ((logits == 0) | (logits.abs() >= torch.finfo(logits.dtype).smallest_normal))
    if logits.dtype == F32 and (logits.is_cuda or torch.get_float32_matmul_precision() != "highest"):
        fits &= (logits.view(torch.int32) & 0x1FFF) == 0
    return fits.all(1)


def _as_products(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as x [R, D], w [N, D] and bias 0: one column of w for each row. For rows of NaN or infinity x has these.

    A sum of products is -0 only by rounding: in half precision, of a negative number that underflows.
    """
    rows = torch.arange(len(logits), device=logits.device)
    columns = rows % STREAMS * WIDTH + rows // STREAMS
    x = logits.new_zeros(len(logits), STREAMS * WIDTH)
    w = logits.new_zeros(logits.shape[1], STREAMS * WIDTH)
    scale = torch.where(logits.isnan().all(1), torch.nan, torch.where(logits.isinf().all(1), torch.inf, 1.0))
    columns_of_w = torch.where(scale.isfinite()[:, None], logits, logits.sign().nan_to_num())
    if logits.dtype in TINY:
        large, tiny = TINY[logits.dtype]
        minus = (logits == 0) & logits.signbit()
        small = minus.any(1) & (logits * large).isfinite().all(1)
        scale = torch.where(small, 1 / large, scale)
        columns_of_w = torch.where(small[:, None], torch.where(minus, -tiny, logits * large), columns_of_w)
    x[rows, columns] = scale.to(x.dtype)
    w[:, columns] = columns_of_w.t()
    return x, w, w.new_zeros(len(w))


def _as_bias(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as a bias: x [2, D] and w [N, D] are 0."""
    return row.new_zeros(2, STREAMS * WIDTH), row.new_zeros(len(row), STREAMS * WIDTH), row


def _encoded(encode: Callable, logits: Tensor, batch: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [B, k] that an encoder (x, w, bias, k) -> (values, indices) selects from these logits."""
    if batch is not None:
        x, w, bias = _as_products(logits)
        return encode(x[batch], w, bias, k)
    fits = _fits(logits)
    selections = list(zip(*encode(*_as_products(logits.where(fits[:, None], 0)), k), strict=True))
    for row in (~fits).nonzero().squeeze(1).tolist():
        selections[row] = [part[0] for part in encode(*_as_bias(logits[row]), k)]
    return torch.stack([v for v, _ in selections]), torch.stack([i for _, i in selections])


def _one_stream(x, w, bias, k, impl):
    indices, values = encode_topk([x], [w], [x.new_zeros(x.shape[1])], [bias], k, "global", impl)
    return values[0], indices


def _alone(x, w, bias, k, impl):
    """One call for each row."""
    return tuple(torch.cat(p) for p in zip(*(_one_stream(row, w, bias, k, impl) for row in x.split(1)), strict=True))


def _streams(x, w, bias, k, impl):
    """The columns split over three streams; one has the bias."""
    xs, ws = ([part.contiguous() for part in t.split(WIDTH, 1)] for t in (x, w))
    biases = [torch.zeros_like(bias), bias, torch.zeros_like(bias)]
    indices, values = encode_topk(xs, ws, [x.new_zeros(WIDTH)] * STREAMS, biases, k, "global", impl)
    return values.sum(0), indices


def _local(x, w, bias, k, impl):
    """The second of two streams under local selection; the first has negated logits."""
    pre_biases = [x.new_zeros(x.shape[1])] * 2
    indices, values = encode_topk([-x, x], [w, w], pre_biases, [-bias, bias], k, "local", impl)
    return values[1], indices[1]


def _chunks(x, w, bias, k, impl):
    """Chunks of two rows (one row without kernels), with two logit buffers."""
    with replaced(selection, rows_per_chunk=lambda rows, *_: (min(rows, 2), 1 + (rows > 2)), SCRATCH_BYTES=1):
        return _one_stream(x, w, bias, k, impl)


def _library(x, w, bias, k, impl):
    """Logits by a library's GEMM, maxima by a pass over them."""
    block = 128 if INTERPRETED else selection.MAXIMA_BLOCK
    with replaced(selection, encode_by_library=lambda *_: True, MAXIMA_BLOCK=block):
        return _one_stream(x, w, bias, k, impl)


def _spans(x, w, bias, k, impl):
    """Three levels of selection, as for large N."""
    with replaced(select_settings, MAX_CANDIDATES=1):
        return _one_stream(x, w, bias, k, impl)


def _among(x, w, bias, k, impl):
    """Selection among a subset of latents, as AuxK's dead ones; 16 others have +inf."""
    n, most = len(w), bias.new_full((WIDTH,), torch.inf)
    ids = torch.arange(WIDTH, n + 2 * WIDTH, device=x.device, dtype=torch.int32) % (n + WIDTH)
    w, bias = torch.cat([w.new_zeros(WIDTH, w.shape[1]), w]), torch.cat([most, bias])
    count = torch.tensor(n, device=x.device, dtype=torch.int32)
    indices = selection.select([x], [w], [bias], k, ids, count, resolve_impl(impl, x))
    return values_at(x, w, x.new_zeros(x.shape[1]), bias, indices, impl=impl), indices - WIDTH


# name -> (encoder, needs kernels); spans only in the interpreter: compiled runs reach three levels by large N
WAYS = {
    "together": (_one_stream, False),
    "alone": (_alone, False),
    "streams": (_streams, False),
    "local": (_local, False),
    "chunks": (_chunks, False),
    "among": (_among, False),
    "library": (_library, True),
    "spans": (_spans, True),
}


@dataclass(frozen=True)
class Provider:
    """One top-k implementation.

    select(logits [R, N], batch [B] or None for all rows, k) -> values [B, k] or None, indices int64 [B, k].
    """

    name: str
    select: Callable[[Tensor, Tensor | None, int], tuple[Tensor | None, Tensor]]
    way: str = ""  # key of WAYS
    ordered: bool = False  # descending, ties to the lowest index
    relu: bool = False  # applied to the values it returns
    ranks_relu: bool = False  # applied before it selects
    nan: bool = True  # documents how NaN ranks
    absent: str = ""  # why it cannot run


def ours(impl: str, device: torch.device, interpret: bool = False) -> list[Provider]:
    """List `encode_topk` as a provider for each of its code paths in WAYS.

    Args:
        impl: "auto", "triton" or "torch".
        device: that runs it.
        interpret: whether kernels are interpreted.
    """
    kernels = resolve_impl(impl, torch.empty(0, device=device)) == "triton"

    def select(how, logits, batch, k):
        with torch.no_grad():
            return _encoded(partial(how, impl=impl), logits, batch, k)

    ways = [n for n, (_, needs) in WAYS.items() if (kernels or not needs) and (interpret or n != "spans")]
    return [Provider("ours", partial(select, WAYS[n][0]), n, ordered=True, relu=True) for n in ways]


def _batched(top_k: Callable) -> Callable:
    def select(logits, batch, k):
        values, indices = top_k(logits if batch is None else logits[batch], k)
        return values, indices.long()

    return select


def _absent(module: str, package: str, device: torch.device) -> str:
    if importlib.util.find_spec(module) is None:
        return f"not installed (pip install {package})"
    return "" if device.type == "cuda" else "needs CUDA"


@cache
def _sparsify():
    with contextlib.redirect_stdout(io.StringIO()):  # it prints on import
        return importlib.import_module("sparsify.fused_encoder").fused_encoder


def _sparsify_select(logits, batch, k):
    def encode(x, w, bias, k):
        values, indices, _ = _sparsify()(x, w, bias, k, "topk")
        return values, indices.long()

    # eager, since compiling takes seconds for each shape; torch.topk selects either way
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return _encoded(encode, logits, batch, k)


def peers(device: torch.device) -> list[Provider]:
    """List other implementations; those that cannot run on the device have `absent` set."""
    return [
        Provider("torch.topk", _batched(torch.topk)),
        Provider("FlashInfer", _batched(lambda *a: importlib.import_module("flashinfer").top_k(*a)), nan=False,
                 absent=_absent("flashinfer", "flashinfer-python", device)),
        Provider("sparsify", _sparsify_select, relu=True, ranks_relu=True, nan=False,
                 absent=_absent("sparsify", "eai-sparsify", device)),
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- judging


@dataclass
class Outcome:
    """Result of one provider on one set in one dtype and shape, on one code path."""

    set: str
    about: str
    provider: str
    dtype: str
    shape: str
    way: str = ""
    verdict: str = "exact"  # "exact", "wrong" or "refused"
    wrong: int = 0  # rows
    rows: int = 0  # judged
    note: str = ""

    @property
    def passed(self) -> bool:
        """False only where `encode_topk` is not exact; peers may be wrong."""
        return self.provider != "ours" or self.verdict == "exact"


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Equal, or both NaN. +0 equals -0."""
    return (a == b) | ((a != a) & (b != b))


def judge(provider: Provider, logits: Tensor, batch: Tensor | None, k: int) -> tuple[Tensor, str, tuple]:
    """Judge the selection of one provider.

    Args:
        provider: selects.
        logits: [R, N].
        batch: int64 [B], rows of logits; None: all rows.
        k: latents a row.

    Returns:
        Wrong rows bool [B], what is wrong with the first of them ("" if none is), and (values, indices).

    Raises:
        ValueError: indices of another shape than [B, k].
    """
    values, indices = provider.select(logits, batch, k)
    h = logits if batch is None else logits[batch]
    n, expected_shape = h.shape[1], (len(h), k)
    if tuple(indices.shape) != expected_shape:
        raise ValueError(f"indices: expected shape {expected_shape}, got {tuple(indices.shape)}")
    score = torch.relu(h) if provider.ranks_relu else h
    expected = torch.cat([reference.topk_indices(part.double(), k) for part in score.split(64)])
    inside = ((indices >= 0) & (indices < n)).all(1)
    safe = indices.clamp(0, n - 1)
    ordered = safe.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    best, chosen = score.gather(1, expected), score.gather(1, safe)
    largest = chosen.gather(1, reference.topk_indices(chosen.double(), k))
    reasons = {"an index out of range": ~inside, "an index twice": twice}
    reasons["not the largest"] = ~_same(largest, best).all(1)
    if provider.ordered:
        reasons["not in order"] = (indices != expected).any(1)
    if values is not None:
        own = torch.relu(h) if provider.relu else h
        reasons["a value that is not at its index"] = ~_same(values.double(), own.gather(1, safe).double()).all(1)
    wrong = torch.stack(list(reasons.values())).any(0)
    first = next((f"row {int(bad.nonzero()[0])}: {why}" for why, bad in reasons.items() if bad.any()), "")
    return wrong, first, (values, indices)


def judge_batches(provider: Provider, logits: Tensor, batches: list[Tensor], k: int) -> tuple[int, int, str]:
    """Judge batches, and compare each row's bits with those of the first batch that had it.

    Args:
        provider: selects; one that is not `ordered` may return a row's entries in another order.
        logits: [R, N]; rows from ROWS on are not judged.
        batches: rows of each batch, int64.
        k: latents a row.

    Returns:
        Rows that are wrong or have other bits, rows judged, and a note on the first wrong one.
    """
    first, wrong, rows, note = {}, 0, 0, ""
    for batch in batches:
        batch = batch.to(logits.device)
        bad, why, selected = judge(provider, logits, batch, k)
        parts = [part for part in selected if part is not None]
        if not provider.ordered:
            order = selected[1].argsort(1)
            parts = [part.gather(1, order) for part in parts]
        bad, parts = bad.tolist(), [part.cpu() for part in parts]
        for place, row in enumerate(batch.tolist()):
            if row >= ROWS:
                continue
            mine = [part[place] for part in parts]
            differs = any(not bool(_same(a, b).all()) for a, b in zip(mine, first.setdefault(row, mine), strict=True))
            rows, wrong = rows + 1, wrong + (differs or bad[place])
            if not note and (differs or bad[place]):
                how = "other bits than in another batch" if differs else why
                note = f"batch of {len(batch)}, place {place}: {how}"
    return wrong, rows, note


# ----------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """Shapes (n, k), dtypes and batch sizes to run.

    Only the way "together" runs every shape, and single rows beside batches. In the interpreter, which is slow, each
    set runs one of the ways, in turn.
    """

    shapes: tuple[tuple[int, int], ...]
    large: tuple[tuple[int, int], ...]  # of the sets that need many columns
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]  # sizes
    wide_batches: tuple[int, ...] = ()  # sizes for "together" only
    turns: bool = False  # one way for each set
    rows: int = ROWS  # of each set

    def asked(self, way: str, some: Set) -> list[tuple[int, int, torch.dtype]]:
        """List n, k and dtype of the runs of a set.

        Args:
            way: key of WAYS; "": a peer.
            some: the set.
        """
        first = way in ("", "together")
        if self.turns and way:
            ways = ["together"] if some.shape else ["library"] if some.large else list(WAYS)
            skip = way != ways[SETS.index(some) % len(ways)]
        else:
            skip = bool(some.shape) and not first
        if skip:
            return []
        shapes = (some.shape,) if some.shape else self.large if some.large else self.shapes
        shapes = shapes if first and some != BATCH else ((403, 3),) if way == "spans" else shapes[:1]  # k spans or more
        dtypes = (F16,) if self.turns and some.half else self.dtypes
        return [(n, k, dtype) for n, k in shapes for dtype in dtypes]

    def rows_of(self, some: Set) -> int:
        """Return how many rows of a set are judged."""
        return min(self.rows, 2) if self.turns and (some.large or some.shape) else self.rows

    def batches_of(self, way: str) -> list[Tensor]:
        """List the rows of each batch: judged rows alone, then beside others at random places, the last batch twice.

        Args:
            way: key of WAYS; "": a peer.
        """
        g = torch.Generator().manual_seed(0)
        first = way in ("", "together")
        rows = [torch.tensor([row]) for row in range(ROWS)] if first else []
        for size in self.batches + self.wide_batches * first:
            mates = torch.randint(ROWS, ROWS + 3, (size,), generator=g)
            if size == 2:  # a judged row and a mate, in either order
                rows += [torch.stack([torch.tensor(i), mates[0]])[torch.randperm(2, generator=g)] for i in range(ROWS)]
            else:
                mates[: size // 2 + 1] = torch.arange(size // 2 + 1) % ROWS
                rows.append(mates[torch.randperm(size, generator=g)])
        return rows if self.turns else [*rows, rows[-1]]


def plan_of(kind: str, quick: bool, arch: int = 80) -> Plan:
    """Return the plan for a kind of device.

    Args:
        kind: "cuda", "cpu" or "interpret".
        quick: the smallest shapes only.
        arch: as `launch.device.capability` gives it; bf16 needs 80.
    """
    if kind == "interpret":  # its half precision has no subnormal numbers
        return Plan(
            ((53, 3),), ((4513, 3),), (F32,), (2, 7) if quick else (2, 17), turns=True, rows=2 if quick else ROWS
        )
    dtypes = (F32, F16) if kind == "cuda" and arch < 80 else (F32, BF16, F16)
    if kind == "cpu":
        shapes = ((4999, 17),) if quick else ((16384, 64), (10007, 512))
        return Plan(shapes, shapes, (F32, BF16) if quick else dtypes, (2, 7), (64,))
    shapes = ((131072, 64),) if quick else ((131072, 64), (131071, 512), (300000, 512))
    return Plan(shapes, shapes, dtypes, (2, 7, 65), (600,))  # sizes that are no multiples of 16: fewer kernels


@cache
def _logits(some: Set, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = torch.Generator(device).manual_seed(zlib.crc32(some.name.encode()))
    with device:
        return some.logits(n, k, dtype, g).to(dtype)


def chosen(filter: str | None) -> list[Set]:
    """List the sets whose name a regular expression matches; None: all.

    Raises:
        ValueError: no set matches.
    """
    matching = [some for some in SETS if re.search(filter or "", some.name)]
    if not matching:
        raise ValueError(f"filter: expected a pattern found in the name of a set, got {filter!r}")
    return matching


def run_sets(
    providers: list[Provider],
    plan: Plan,
    device: torch.device,
    filter: str | None = None,
    on_done: Callable[[list[Outcome]], None] | None = None,
) -> list[Outcome]:
    """Run every set for one provider after the other.

    Once a provider has lost the device, its remaining sets are refused.

    Args:
        providers: `ours` first, so that a fault of a peer cannot affect them.
        plan: shapes, dtypes and batches.
        device: that runs them.
        filter: regular expression of the sets' names; None: all.
        on_done: called after each set with its outcomes.
    """
    all_outcomes: list[Outcome] = []
    for provider in providers:
        lost, sets = "", [some for some in chosen(filter) if provider.nan or not some.nan]
        for some in [] if provider.absent else sets:
            outcomes = []
            for n, k, dtype in plan.asked(provider.way, some):
                outcome = Outcome(some.name, some.about, provider.name, SHORT[dtype], f"N{n} k{k}", provider.way)
                outcomes.append(outcome)
                if lost:
                    outcome.verdict, outcome.note = "refused", lost
                    continue
                try:
                    _ask(provider, some, outcome, _logits(some, n, k, dtype, device), k=k, plan=plan)
                except Exception as error:
                    text = " ".join(str(error).split())[:200]
                    outcome.verdict, outcome.note = "refused", f"{type(error).__name__}: {text}"
                    lost = device_lost(device)
            all_outcomes += outcomes
            if outcomes and on_done:
                on_done(outcomes)
    return all_outcomes


def _ask(provider: Provider, some: Set, outcome: Outcome, logits: Tensor, *, k: int, plan: Plan) -> None:
    if some == BATCH:
        counts = judge_batches(provider, logits, plan.batches_of(provider.way), k)
        outcome.wrong, outcome.rows, outcome.note = counts
    else:
        wrong, outcome.note, _ = judge(provider, logits[: plan.rows_of(some)], None, k)
        outcome.wrong, outcome.rows = int(wrong.sum()), len(wrong)
    outcome.verdict = "wrong" if outcome.wrong else "exact"


def launches_of(
    way: str, n: int, k: int, dtype: torch.dtype, sizes: tuple[int, ...], *, arch: int, tf32: bool
) -> list[Launch]:
    """Return the distinct launches of one way at one shape, traced on meta tensors.

    Args:
        way: key of WAYS.
        n: latents.
        k: active latents a row.
        dtype: of the logits.
        sizes: of the batches.
        arch: as `launch.device.capability` gives it.
        tf32: whether torch's float32 matmul precision allows tf32.
    """
    recorded: list[Launch] = []
    with as_on_gpu(arch, tf32, recorded), Answers():
        (provider,) = [provider for provider in ours("auto", META) if provider.way == way]
        for size in sizes:
            logits = torch.empty(ROWS, n, dtype=dtype, device=META)
            provider.select(logits, torch.zeros(size, dtype=torch.int64, device=META), k)
    return list(dict.fromkeys(recorded))


def launch_lists(arch: int, quick: bool, filter: str | None, tf32: bool) -> list[Callable[[], list[Launch]]]:
    """Return functions, for `compile_all`, that list all launches of `ours` on a GPU.

    Args:
        arch: as `launch.device.capability` gives it.
        quick: the smallest shapes only.
        filter: regular expression of the sets' names; None: all.
        tf32: whether torch's float32 matmul precision allows tf32.
    """
    plan, sizes = plan_of("cuda", quick, arch), {}
    for way in [way for way in WAYS if way != "spans"]:
        for some in chosen(filter):
            for run_key in plan.asked(way, some):
                more = map(len, plan.batches_of(way)) if some == BATCH else (ROWS, 2)
                sizes.setdefault((way, *run_key), set()).update(more)
    return [
        partial(launches_of, *run_key, tuple(sorted(some)), arch=arch, tf32=tf32) for run_key, some in sizes.items()
    ]


# ---------------------------------------------------------------------------------------------------------------- table

HEADER = """\
Selected from given logits, judged by a stable sort of the same in float64: the k largest, none twice, with
their own values; of ours the order too. Rows are counted over dtypes, shapes and our ways to the selection.
"""


def _row(some: str, about: str, *cells: str) -> str:
    return f"{some:<11} {about:<34} {' '.join(f'{cell:<15}' for cell in cells)}".rstrip()


def table(outcomes: list[Outcome], providers: list[Provider], verbose: bool = False) -> Iterator[str]:
    """Iterate over lines of at most 110 columns: one for each set, then faults, refusals and absent providers.

    Args:
        outcomes: of `run_sets`.
        providers: columns of the table.
        verbose: every fault, instead of the first of each set, provider and verdict.
    """
    absent = {provider.name: provider.absent for provider in providers}
    yield _row("set", "what it is about", *absent)
    for some in [some for some in SETS if any(o.set == some.name for o in outcomes)]:
        cells = [_cell([o for o in outcomes if (o.set, o.provider) == (some.name, name)]) for name in absent]
        yield _row(some.name, some.about, *cells)
    yield ""
    printed = set()
    for o in outcomes:
        if o.verdict != "exact" and (verbose or (o.set, o.provider, o.verdict) not in printed):
            printed.add((o.set, o.provider, o.verdict))
            where = " ".join(filter(None, (o.dtype, o.shape, o.way)))
            count = f" of {o.rows} rows" if o.rows else ""
            line = f"{o.set}, {o.provider}, {where}: {o.verdict} {o.wrong or ''}{count}; {o.note}"
            yield from textwrap.wrap(line, 110, subsequent_indent="    ")
    yield from (f"{name}: {why}" for name, why in absent.items() if why)


def _cell(outcomes: list[Outcome]) -> str:
    verdicts, wrong = {o.verdict for o in outcomes}, sum(o.wrong for o in outcomes)
    if "wrong" in verdicts:
        return f"wrong ({wrong} row{'s' * (wrong != 1)})"
    return "refused" if "refused" in verdicts else "exact" if outcomes else "-"
