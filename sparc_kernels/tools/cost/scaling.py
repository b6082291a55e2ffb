"""A training step on D x T GPUs: what is sent, memory of a rank, and modelled time.

T ranks share the latents of a replica, D replicas share the rows. A rank has b = B / D rows and n = N / T latents, each
rounded up. `collectives` is the one list of what a step sends, and a test holds it to what `sparc_kernels.distributed`
counts; `memory` and `times` build on it. Assumptions, beside those of this package:

- Selected latents are spread evenly over the shards, dead ones too.
- Ranks of a replica are neighbours, in nodes of NODE_GPUS. A ring through several nodes uses the network port of each
  of its ranks in a node; an all-to-all sends what leaves the node through the rank's own port.
- One kernel and one collective run at a time, each kind in the order of the program; neither slows the other down.
  A collective starts after all kernels before it, as torch.distributed has it.
- Steps are eager and without plans: a step lasts at least as long as the host needs, with a collective like two
  launches of torch.

Not modelled: local selection, a network shared with other jobs, ranks that wait for a slower one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...core.numerics import even_parts
from ...core.validation import require
from ...distributed.ranks import SUM_BYTES
from ...launch.budgets import PARTIAL_BYTES, SCRATCH_BYTES
from ...launch.device import cdiv
from ...launch.select import select_config
from ..shape import Shape
from . import ours
from .gpus import COLLECTIVE_US, GPU, LINK_STEP_US, NETWORK_GB_S, NETWORK_STEP_US, NODE_GPUS
from .host import host_seconds
from .parts import Op, Part, of_gpu, of_torch, total

WIDE = 4  # bytes of an accumulator: values, coefficients, partial reconstructions
ID = 4  # bytes of a latent's id as it is sent
RUNTIME_BYTES = 1.5e9  # assumption: CUDA's context, libraries, NCCL's buffers
USABLE = 0.94  # assumption: share of the memory that PyTorch's allocator can fill


class Mesh(NamedTuple):
    """Replicas x shards of the latents; ranks of one replica are neighbours."""

    replicas: int  # D
    shards: int  # T

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.replicas * self.shards

    def __str__(self):
        return f"{self.replicas} x {self.shards}"


# ------------------------------------------------------------------------------------------------------- what is sent


@dataclass(frozen=True)
class Collective:
    """One collective of a step, as every rank takes part in it.

    Args:
        what: is sent, as `sparc_kernels.distributed.count_bytes` names it.
        of: which of several: a stream, "dead" latents or a step of a sum.
        kind: "all-gather", "all-to-all" or "all-reduce".
        group: "latents" (the shards of a replica) or "data" (the replicas of a shard).
        ranks: of the group.
        piece: bytes of a rank's own piece (all-gather), of what goes to each rank (all-to-all), or of the whole tensor
            (all-reduce).
        calls: into which it is divided.
    """

    what: str
    of: str | int
    kind: str
    group: str
    ranks: int
    piece: int
    calls: int = 1

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.what} {self.of}".strip()

    @property
    def sent(self) -> int:
        """Bytes that a rank sends, and receives; a ring's for an all-reduce."""
        return (
            (self.ranks - 1) * self.piece * 2 // self.ranks
            if self.kind == "all-reduce"
            else (self.piece * (self.ranks - 1))
        )

    def by_link(self, mesh: Mesh) -> tuple[float, float]:
        """Return the bytes that a rank sends inside its node, and through its network port."""
        near = self._near(mesh)
        if near == self.ranks:
            return self.sent, 0.0
        if self.kind == "all-to-all":
            return self.piece * (near - 1), self.piece * (self.ranks - near)
        return self.sent * (near - 1) / near, self.sent / near

    def seconds(self, gpu: GPU, mesh: Mesh) -> float:
        """Return the modelled seconds."""
        near, (inside, outside) = self._near(mesh), self.by_link(mesh)
        nodes = cdiv(self.ranks, near)
        steps = (self.ranks - nodes) * LINK_STEP_US + (nodes - 1) * NETWORK_STEP_US
        if self.kind != "all-to-all":  # every byte of a ring passes every rank
            inside = self.sent
        moved = max(inside / gpu.link_gb_s, outside / NETWORK_GB_S) / gpu.link_fraction
        return 1e-6 * self.calls * (COLLECTIVE_US + steps) + 1e-9 * moved

    def _near(self, mesh: Mesh) -> int:
        """Ranks of the group in one node."""
        stride = mesh.shards if self.group == "data" else 1
        return min(self.ranks, max(1, NODE_GPUS // stride))


def block(s: Shape, mesh: Mesh) -> Shape:
    """Return the shape of a rank's own rows and latents: the largest block, `dead` its share."""
    n = cdiv(s.N, mesh.shards)
    k, auxk, dead = min(s.k, n), min(s.auxk, n), cdiv(s.dead, mesh.shards)
    return replace(s, B=cdiv(s.B, mesh.replicas), N=n, k=k, auxk=auxk, dead=dead)


def collectives(s: Shape, mesh: Mesh, direct: bool = True, shard: int = 0) -> list[Collective]:
    """List what a step sends, in the order of the program; groups of one rank send nothing.

    Args:
        s: shape of the whole batch and all latents.
        mesh: of the ranks.
        direct: `training_step`; False: forward, loss, backward and `SparcAdam.step`.
        shard: which of a replica's ranks; the first have the largest blocks.
    """
    (D, T), own, S, e = mesh, block(s, mesh), s.S, s.e
    b, M = own.B, own.B * s.k
    R, aux, auxk = cdiv(b, T), S * b * s.auxk, bool(s.auxk)
    start, stop = even_parts(s.N, T)[shard]
    n = stop - start
    made: list[Collective] = []

    def latents(what: str, of: str | int, piece: int, kind: str = "all-gather") -> None:
        made.append(Collective(what, of, kind, "latents", T, piece))

    def data(what: str, of: str | int, piece: int, kind: str = "all-gather") -> None:
        made.append(Collective(what, of, kind, "data", D, piece))

    latents("keys", "", b * own.k * e)
    latents("ids", "", b * own.k * ID)
    data("fired", "", S * n, "all-reduce")
    latents("keys", "dead", S * b * own.auxk * e)
    latents("ids", "dead", S * b * own.auxk * ID)
    if not direct:
        latents("values", "", S * M * WIDE, "all-reduce")
    for kind, sources in (("", S), ("auxk ", auxk)):
        for t, d in enumerate(s.d_streams):
            latents(f"{kind}reconstructions", t, sources * R * d * WIDE, "all-to-all")
        for t, d in enumerate(s.d_streams):
            latents(f"{kind}errors", t, sources * R * d * e)
    latents("auxk coefficients", "", auxk * S * R * WIDE)
    terms = S * S + S + s.D + auxk * (S + s.D)  # losses and sums of values; the biases' gradients
    latents("loss", "", terms * WIDE)
    data("loss", "of all", T * terms * WIDE)
    latents("pre-biases", "", s.D * WIDE)
    if direct:
        data("codes", "", M * (ID + S * WIDE))
        data("gradients of the values", "", S * M * WIDE)
        data("coefficients", "", S * S * b * WIDE)
        for t, d in enumerate(s.d_streams):
            data("errors", f"{t} of all", S * b * d * e)
        data("codes", "dead", aux * (ID + WIDE))
        data("auxk", "", aux * WIDE + auxk * S * b * WIDE)
        for t, d in enumerate(s.d_streams):
            data("auxk errors", f"{t} of all", auxk * b * d * e)
        data("inputs", "", b * s.D * e)
        data("biases", "", s.D * WIDE)
    else:
        sizes = [ours.parameter_bytes(s) * numbers for d in s.d_streams for numbers in (n * d, n * d, d, n)]
        parts = [_parts(size, ours.parameter_bytes(s), D) for size in sizes]
        piece, calls = sum(size for size, _ in parts), sum(calls for _, calls in parts)
        made.append(Collective("gradients", "exchanged", "all-to-all", "data", D, piece, calls))
        made.append(Collective("gradients", "summed", "all-gather", "data", D, piece, calls))
    return [c for c in made if c.ranks > 1 and c.piece]


def _parts(size: int, itemsize: int, ranks: int) -> tuple[int, int]:
    """Bytes of a rank's part of a tensor that is summed over ranks piece by piece, and the number of pieces."""
    most = max(ranks, SUM_BYTES // itemsize)
    full, rest = divmod(size // itemsize, most)
    return itemsize * (full * cdiv(most, ranks) + cdiv(rest, ranks)), full + (rest > 0)


# ------------------------------------------------------------------------------------------------------------- memory


def memory(s: Shape, mesh: Mesh, direct: bool = True) -> dict[str, float]:
    """Return the bytes that a rank holds at the peak of a step, by what they are.

    Args:
        s: shape of the whole batch and all latents.
        mesh: of the ranks.
        direct: as for `collectives`.
    """
    own, S, e = block(s, mesh), s.S, s.e
    b, parameters = own.B, ours.weights(own) + S * own.N + s.D
    rows = s.B if direct else b  # of the codes and errors from which weights are updated
    codes = rows * s.k * (8 + 8 + 2 * S * WIDE) + S * rows * s.auxk * (8 + 8 + 2 * WIDE)
    sort = 2 * 12 * rows * max(s.k, S * s.auxk)
    in_flight = 2 * cdiv(b, mesh.shards) * mesh.shards * s.D * (S + (1 if s.auxk else 0)) * WIDE  # sent and received
    return {
        "weights": ours.parameter_bytes(s) * parameters,
        "moments": 2 * ours.MOMENT * parameters,
        "half-precision copies": e * ours.weights(own) if s.autocast else 0,
        "gradients": 0 if direct else ours.parameter_bytes(s) * parameters,
        "inputs": b * s.D * (4 + 2 * e) + (rows - b) * s.D * e,
        "errors": rows * s.D * e * (S + (1 if s.auxk else 0)),
        "codes, lists, counters": codes + sort + 9 * S * own.N,
        "logits and partial sums": min(b * own.N * e, SCRATCH_BYTES) + PARTIAL_BYTES,
        "reconstructions in flight": 0 if mesh.size == 1 else in_flight,
        "CUDA, NCCL": RUNTIME_BYTES,
    }  # fmt: skip


def fits(s: Shape, mesh: Mesh, gpu: GPU, direct: bool = True) -> bool:
    """Return whether a rank's memory is enough."""
    return sum(memory(s, mesh, direct).values()) <= USABLE * 1e9 * gpu.memory_gb


# --------------------------------------------------------------------------------------------------------------- time


def _merge(rows: int, candidates: int, k: int, e: int) -> tuple[Part, ...]:
    """The k best of the shards' candidates of each row: side by side, maxima of groups, then the selector."""
    executed = ours.SELECT_INSTRUCTIONS + ours.BISECTION_STEPS[e] * ours.BISECTION_INSTRUCTIONS
    executed *= select_config(candidates, k).num_warps * rows
    keys = rows * candidates * e
    return (
        of_torch("candidates", 2 * (keys + rows * candidates * ID), 2), Part("maxima", keys),
        Part("merge", keys + rows * 8 * k, instructions=executed), of_torch("ids", rows * k * (8 + 3 * ID + 8), 2),
    )  # fmt: skip


@of_gpu
def _computed(s: Shape, mesh: Mesh, direct: bool) -> dict[str, tuple[Part, ...]]:
    """Kernels of a rank's step by stage."""
    (D, T), own, S, e = mesh, block(s, mesh), s.S, s.e
    b, n, D_sum = own.B, own.N, s.D
    rows = replace(s, B=b, N=max(n, s.k), auxk=0, dead=0)  # entries of all latents, weights of the own ones
    whole = replace(s, B=D * b if direct else b, N=max(n, s.k, s.auxk), dead=own.dead)  # rows that update weights
    mine = of_torch("own ids", 6 * 8 * b * s.k, 5)
    stages = {
        "select": (Part("centre", 2 * b * D_sum * e), *ours.select(replace(own, auxk=0, dead=0)).parts),
        "merge": (*_merge(b, T * own.k, s.k, e), mine),
        "values": tuple(ours._values(rows, n, s.k / T)),
        "counters": (Part("count", 16 * S * n), Part("fired", S * b * s.k * 20)),
        "count": (of_torch("count", S * n * (16 + 2), 2),) if D > 1 else (),
        "weights": (of_torch("term weights", 4 * (S * S + S), 3), Part("target weights", b * D_sum * e + 4 * S * b)),
        "terms": (of_torch("terms and metrics", 4 * S * b * s.k + WIDE * D * T * (S * S + S + D_sum), 30),),
        "lists": tuple(ours._lists(replace(whole, k=s.k), 1)),
    }  # fmt: skip
    if direct:
        # rows of all replicas: made contiguous before and after they are sent
        copied = of_torch("copies", (2 * S * b * D_sum * e + 2 * S * D * b * (2 * s.k + S) * WIDE), 4 * S + 6)
        stages["copies"] = (copied,) if D > 1 else ()
        stages["pre-biases"] = (of_torch("pre-biases", 12 * D_sum, 2 * S), Part("pre-biases", 28 * D_sum))
        stages["update"] = (ours._scalars(s), *ours._updates(whole, 1 / T))
    else:
        stages |= _gradients(replace(whole, k=s.k), own, s.k / T, min(s.auxk, s.dead) / T, D)
    for t, d in enumerate(s.d_streams):
        stages |= _target(rows, n, s.k / T, T, S, t, d)
    if s.auxk:
        present, dead = min(s.auxk, s.dead) / T, max(own.dead, 1)
        aux = replace(rows, k=s.auxk, N=max(n, s.auxk), dead=own.dead)
        one = replace(own, k=own.auxk, auxk=0)
        stages["select dead"] = (
            Part("mark dead", S * n * 9), Part("dead first", S * n * 5), *ours._dead_selections(one),
            of_torch("missing", 3 * 8 * S * b * own.auxk, 3),
        )  # fmt: skip
        stages["merge dead"] = (*_merge(S * b, T * own.auxk, s.auxk, e), mine)
        stages["auxk values"] = tuple(ours._values(aux, dead, present))
        stages["auxk lists"] = tuple(ours._lists(replace(whole, k=s.auxk), S))
        stages["residuals"] = (Part("residuals", (2 * cdiv(b, T) * D_sum + D_sum) * e),)
        for t, d in enumerate(s.d_streams):
            stages |= {f"auxk {name}": parts for name, parts in _target(aux, dead, present, T, 1, t, d).items()}
    return stages


def _gradients(s: Shape, own: Shape, present: float, aux_present: float, D: int) -> dict[str, tuple[Part, ...]]:
    """Stages of the gradients of the own latents from this replica's rows, their sum over replicas, and SparcAdam."""
    numbers, size = ours.weights(own), ours.parameter_bytes(s)
    aux = replace(s, k=max(s.auxk, 1), auxk=0)
    column = own.N * s.e

    def reduced(sources: int, per_entry: int, more: int) -> tuple[Part, ...]:
        made = ours._reduces(
            replace(s, auxk=0), s.d_streams, sources, s.B * present, per_entry=per_entry, column=column, more=more
        )  # fmt: skip
        added = ours._reduces(
            aux, s.d_streams, 1, s.B * aux_present, per_entry=12, column=2 * column, more=more
        )  # fmt: skip
        return *made, *(added if s.auxk else ())

    total_bytes = numbers * size
    return {
        "dW_dec": reduced(s.S, 4 + 8 * s.S, 0),
        "dW_enc": (*reduced(1, 12, 1), Part("d pre_bias", s.e * own.N * s.D, launches=2)),
        "widen": (of_torch("widen", numbers * (s.e + size), 2 * s.S),) if s.autocast else (),
        # padded copy, parts summed, copied back
        "sum": (of_torch("sum of replicas", total_bytes * (2 + (D + 1) / D + 2), 16 * s.S),) if D > 1 else (),
        "update": (*ours.sparc_adam(own).parts, Part("copies", numbers * s.e if s.autocast else 0, launches=0)),
    }


def _target(s: Shape, n: int, present: float, T: int, sources: int, t: int, d: int) -> dict[str, tuple[Part, ...]]:
    """Stages of one target: reconstructions from the own latents, errors of the own rows, gradients of the values.

    In PyTorch, over fp32 [R, S, d]: parts summed, bias and x subtracted, squares summed, the bias's gradient; rounded.
    """
    rows, moved = sources * s.B * d, sources * cdiv(s.B, T) * d
    entry = s.M * (8 + 4 * sources)

    def gathered(name: str, column: float) -> tuple[Part, ...]:
        return tuple(
            ours._gathers(s, name, [d], n, present, sources=sources, flops=2, column=column, per_slab=entry)
        )  # fmt: skip

    return {
        f"reconstruct {t}": (*gathered("partial", sources * s.B * WIDE), of_torch("by rows", 2 * rows * WIDE, 2)),
        f"make errors {t}": (of_torch("errors", moved * ((T + 12) * WIDE + s.e), 15),),
        f"dots {t}": (*gathered("dots", sources * s.B * s.e), of_torch("scaled", 6 * sources * s.M * WIDE, 4)),
    }


class Stage(NamedTuple):
    """A stage of the step: kernels, or one collective."""

    name: str
    parts: tuple[Part, ...]
    collective: Collective | None
    after: tuple[str, ...]  # collectives that kernels wait for


def _program(s: Shape, mesh: Mesh, direct: bool = True) -> Iterator[Stage]:
    """Stages in the order of `sparc_kernels.distributed`; one target is sent while the next is gathered."""
    computed, sent = _computed(s, mesh, direct), {c.name: c for c in collectives(s, mesh, direct)}

    def run(name: str, *after: str) -> Stage:
        return Stage(name, computed.get(name, ()), None, tuple(f"send {other}" for other in after))

    def send(name: str) -> Stage:
        return Stage(f"send {name}", (), sent.get(name), ())

    targets, of_all = range(s.S), direct and mesh.replicas > 1  # whether lists are made of all replicas' rows
    yield from (run("select"), send("keys"), send("ids"), run("merge", "keys", "ids"), run("values"))
    yield from () if of_all else (run("lists"),)
    yield from (run("counters"), send("fired"), run("count", "fired"))
    yield from (run("select dead"), send("keys dead"), send("ids dead"), run("merge dead", "keys dead", "ids dead"))
    yield run("auxk values")
    yield from () if of_all else (run("auxk lists"),)
    yield from (send("values"), run("weights", "values"))
    for kind in ("", "auxk "):
        if kind:
            yield run("residuals")
        for t in targets:
            yield from (run(f"{kind}reconstruct {t}"), send(f"{kind}reconstructions {t}"))
        for t in targets:
            yield from (run(f"{kind}make errors {t}", f"{kind}reconstructions {t}"), send(f"{kind}errors {t}"))
    yield from (send("auxk coefficients"), send("loss"))
    yield from (run(f"dots {t}", f"errors {t}") for t in targets)
    yield from (send("loss of all"), run("terms", "loss", "loss of all"))
    yield from (run(f"auxk dots {t}", f"auxk errors {t}", "auxk coefficients") for t in targets)
    if not direct:
        yield from (run("dW_dec"), run("dW_enc"), send("pre-biases"), run("widen", "pre-biases"))
        yield from (send("gradients exchanged"), run("sum", "gradients exchanged"), send("gradients summed"))
        yield run("update", "pre-biases", "gradients summed")
        return
    yield run("copies")
    # all on their way before one is waited for; inputs are waited for before AuxK's codes
    rows = [
        "codes", "gradients of the values", "coefficients", *(f"errors {t} of all" for t in targets),
        "codes dead", "auxk", *(f"auxk errors {t} of all" for t in targets), "inputs",
    ]  # fmt: skip
    yield from (send(name) for name in (*rows, "biases"))
    yield from (run("lists", "codes"), run("auxk lists", *rows)) if of_all else ()
    yield from (run("update", *rows, "biases"), send("pre-biases"), run("pre-biases", "pre-biases"))


class Times(NamedTuple):
    """Modelled seconds of a step."""

    step: float  # of the slower of device and host
    compute: float  # of the kernels
    communication: float  # of the collectives
    exposed: float  # by which the device's step is longer than its kernels
    host: float


def times(s: Shape, mesh: Mesh, gpu: GPU, direct: bool = True) -> Times:
    """Model a step on every rank of a mesh: kernels and collectives side by side, in order.

    Args:
        s: shape of the whole batch and all latents.
        mesh: of the ranks.
        gpu: of each rank.
        direct: as for `collectives`.
    """
    s = replace(s, arch=gpu.arch)
    if mesh.size == 1:
        op = ours.step(s, direct=True) if direct else total("step", [ours.step(s), ours.sparc_adam(s)])
        device, host = op.seconds(gpu), host_seconds(op)
        return Times(max(device, host), device, 0.0, 0.0, host)
    ends: dict[str, float] = {}
    kernels = network = compute = communication = 0.0
    parts: list[Part] = []
    for name, stage_parts, collective, after in _program(s, mesh, direct):
        if collective is not None:
            seconds = collective.seconds(gpu, mesh)
            network = max(network, kernels) + seconds
            communication += seconds
            ends[name] = network
        elif stage_parts:
            seconds = Op(name, stage_parts).seconds(gpu)
            kernels = max([kernels, *(ends[other] for other in after if other in ends)]) + seconds
            compute += seconds
            parts += stage_parts
    device = max(kernels, network)
    calls = of_torch("collectives", 0, 2 * sum(c.calls for c in collectives(s, mesh, direct)))
    host = host_seconds(total("step", [Op("kernels", tuple(parts)), Op("collectives", (calls,))]))
    return Times(max(device, host), compute, communication, device - compute, host)


def meshes(ranks: int) -> list[Mesh]:
    """Return every mesh of that many ranks."""
    return [Mesh(ranks // T, T) for T in range(1, ranks + 1) if ranks % T == 0]


def best(s: Shape, meshes: Iterable[Mesh], gpu: GPU) -> tuple[Mesh, bool] | None:
    """Return the mesh, and whether by `training_step`, whose modelled step is shortest among those that fit."""
    able = [
        (mesh, direct) for mesh in meshes for direct in (True, False)
        if mesh.shards <= s.N and mesh.replicas <= s.B and fits(s, mesh, gpu, direct)
    ]  # fmt: skip
    return min(able, key=lambda way: times(s, way[0], gpu, way[1]).step, default=None)


# -------------------------------------------------------------------------------------------------------------- tables

# What the command models unless shapes are given: float32 parameters with half-precision copies
SIZES = tuple(Shape(4096, n, 64, (1024, 768, 768), autocast=True) for n in (2**17, 2**18, 2**19, 2**20))


def mesh_of(ranks: int, shards: int) -> Mesh:
    """Return the mesh of that many ranks with that many shards.

    Raises:
        ValueError: shards do not divide the ranks.
    """
    ok = 1 <= shards <= ranks and ranks % shards == 0
    require(ok, "tensor-parallel", f"a divisor of --gpus {ranks}", str(shards))
    return Mesh(ranks // shards, shards)


def row(s: Shape, mesh: Mesh, gpu: GPU, direct: bool) -> dict:
    """Return the modelled numbers of a shape on a mesh."""
    time, sent = times(s, mesh, gpu, direct), [c.by_link(mesh) for c in collectives(s, mesh, direct)]
    inside, outside = (sum(link) for link in zip(*sent, strict=True)) if sent else (0.0, 0.0)
    return {
        "N": s.N, "gpus": mesh.size, "replicas": mesh.replicas, "shards": mesh.shards, "modelled": True,
        "training_step": direct, "memory_gb": sum(memory(s, mesh, direct).values()) / 1e9,
        "node_mb": inside / 1e6, "network_mb": outside / 1e6, "compute_ms": 1e3 * time.compute,
        "communication_ms": 1e3 * time.communication, "exposed_ms": 1e3 * time.exposed, "host_ms": 1e3 * time.host,
        "step_ms": 1e3 * time.step, "rows_per_s": s.B / time.step,
    }  # fmt: skip


def scaling_table(shapes: Iterable[Shape], ranks: Iterable[int], shards: int | None, gpu: GPU) -> tuple[str, list]:
    """Format the steps of several shapes on several numbers of GPUs as a Markdown table, and return its numbers.

    Args:
        shapes: of the whole batch.
        ranks: numbers of GPUs.
        shards: T; None: the best.
        gpu: of every rank.
    """
    head = (
        "N", "GPUs", "D x T", "step", "GB a rank", "sent a rank: node MB", "network MB", "kernels ms", "collectives ms",
        "not hidden ms", "host ms", "step ms", "rows / s",
    )  # fmt: skip
    lines, rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], []
    for s in shapes:
        for p in ranks:
            possible = meshes(p) if shards is None else [mesh_of(p, shards)]
            way = best(s, possible, gpu)
            if way is None:
                smallest = min(sum(memory(s, mesh).values()) for mesh in possible) / 1e9
                lines.append(f"| {s.N:,} | {p} | does not fit | | {smallest:.0f} |" + " |" * (len(head) - 5))
                continue
            r = row(s, way[0], gpu, way[1])
            rows.append(r)
            numbers = [r[key] for key in ("compute_ms", "communication_ms", "exposed_ms", "host_ms", "step_ms")]
            cells = [
                f"{s.N:,}", str(p), str(way[0]), "fused" if way[1] else "two calls", f"{r['memory_gb']:.0f}",
                f"{r['node_mb']:.0f}", f"{r['network_mb']:.0f}", *(f"{x:.2f}" for x in numbers),
                f"{r['rows_per_s']:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), rows


def rank_tables(s: Shape, mesh: Mesh, gpu: GPU, direct: bool) -> str:
    """Format what a rank holds and sends in one step, and the same of the other kind of step in a line."""
    held, lines = memory(s, mesh, direct), ["| a rank holds | GB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in held.items() if size]
    lines += [f"| sum | {sum(held.values()) / 1e9:.2f} |"]
    if mesh.size > 1:
        lines += ["", "| a rank sends in a step | by | over | MB | us |", "|---|---|---|---|---|"]
        lines += [
            f"| {c.name} | {c.kind} | {c.group} | {c.sent / 1e6:.2f} | {1e6 * c.seconds(gpu, mesh):.0f} |"
            for c in collectives(s, mesh, direct)
        ]
        other, name = not direct, "two calls (loss, backward, optimizer)" if direct else "`training_step`"
        made, held = collectives(s, mesh, other), memory(s, mesh, other)
        lines += [
            "", f"By {name} a rank sends {sum(c.sent for c in made) / 1e6:,.0f} MB in "
            f"{1e3 * sum(c.seconds(gpu, mesh) for c in made):.1f} ms of collectives, holds "
            f"{sum(held.values()) / 1e9:.1f} GB, and a step takes {1e3 * times(s, mesh, gpu, other).step:.2f} ms.",
        ]  # fmt: skip
    return "\n".join(lines)


def scaling_report(shapes: list[Shape], ranks: list[int], shards: int | None, gpu: GPU) -> tuple[str, list]:
    """Format the tables of `sparc-kernels cost --gpus`, and return the numbers of the first."""
    text, rows = scaling_table(shapes, ranks, shards, gpu)
    first = shapes[0]
    title = f"modelled, nothing measured: a training step on {gpu.name}, {NODE_GPUS} a node; " + (
        f"B {first.B:,}, k {first.k}, d {'/'.join(map(str, first.d_streams))}, {first.dtype}"
        f"{' with float32 parameters' if first.autocast else ''}{f', AuxK {first.auxk}' if first.auxk else ''}"
    )
    tables = [f"{title}\n\n{text}"]
    if len(shapes) == len(ranks) == 1 and rows:
        mesh = Mesh(rows[0]["replicas"], rows[0]["shards"])
        tables.append(rank_tables(first, mesh, gpu, rows[0]["training_step"]))
    return "\n\n".join(tables), rows
