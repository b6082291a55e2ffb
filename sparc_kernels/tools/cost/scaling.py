"""A training step on D x T GPUs: what is sent, memory of a rank, and modelled time.

T ranks share the latents of a replica, D replicas share the rows. A rank has b = B / D rows and n = N / T latents, each
rounded up. `collectives` is the one list of what a step sends; `memory` and `times` build on it. Assumptions, beside
those of this package:

- Selected latents are spread evenly over the shards, dead ones too.
- Ranks of a replica are neighbours, in nodes of NODE_GPUS. A ring through several nodes uses the network port of each
  of its ranks in a node; an all-to-all sends what leaves the node through the rank's own port.
- One kernel and one collective run at a time, each kind in the order of the program; neither slows the other down.
- Steps are eager: a step lasts at least as long as the host needs, a collective like two launches of torch.

Not modelled: local selection, a network shared with other jobs, ranks that wait for a slower one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...core.validation import require
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
KEY_BYTES = 4  # most of a key, the compared pre-activation
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
        name: of what is sent.
        kind: "all-gather", "all-to-all", "reduce-scatter" or "all-reduce".
        group: "latents" (the shards of a replica) or "data" (the replicas of a shard).
        ranks: of the group.
        piece: bytes of a rank's own piece (all-gather), of what goes to each rank (all-to-all), of a rank's result
            (reduce-scatter) or of the whole tensor (all-reduce).
    """

    name: str
    kind: str
    group: str
    ranks: int
    piece: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives; a ring's for an all-reduce."""
        if self.kind == "all-reduce":
            return 2 * self.piece * (self.ranks - 1) / self.ranks
        return self.piece * (self.ranks - 1)

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
        return 1e-6 * (COLLECTIVE_US + steps) + 1e-9 * moved

    def _near(self, mesh: Mesh) -> int:
        """Ranks of the group in one node."""
        stride = mesh.shards if self.group == "data" else 1
        return min(self.ranks, max(1, NODE_GPUS // stride))


def block(s: Shape, mesh: Mesh) -> Shape:
    """Return the shape of a rank's own rows and latents: the largest block, `dead` its share."""
    n = cdiv(s.N, mesh.shards)
    k, auxk, dead = min(s.k, n), min(s.auxk, n), cdiv(s.dead, mesh.shards)
    return replace(s, B=cdiv(s.B, mesh.replicas), N=n, k=k, auxk=auxk, dead=dead)


def collectives(s: Shape, mesh: Mesh, direct: bool = True) -> list[Collective]:
    """List what a step sends, in the order of the program; groups of one rank send nothing.

    Args:
        s: shape of the whole batch and all latents.
        mesh: of the ranks.
        direct: `training_step`; False: forward, loss, backward and `SparcAdam.step`.
    """
    (D, T), own, S, e = mesh, block(s, mesh), s.S, s.e
    b, M = own.B, own.B * s.k
    R, aux = cdiv(b, T), S * b * s.auxk
    gathered: list[tuple[str, float]] = []  # rows of a replica that every replica of the shard needs
    made = [
        Collective("candidates", "all-gather", "latents", T, b * own.k * (ID + KEY_BYTES)),
        Collective("dead candidates", "all-gather", "latents", T, S * b * own.auxk * (ID + KEY_BYTES)),
        Collective("fired flags", "all-reduce", "data", D, S * own.N),
    ]
    for t, d in enumerate(s.d_streams):
        made.append(Collective(f"partial reconstructions {t}", "all-to-all", "latents", T, S * R * d * WIDE))
        made.append(Collective(f"errors {t}", "all-gather", "latents", T, S * R * d * e))
        gathered.append((f"all errors {t}", S * b * d * e))
        if s.auxk:
            made.append(Collective(f"partial residuals {t}", "all-to-all", "latents", T, R * d * WIDE))
            made.append(Collective(f"AuxK's errors {t}", "all-gather", "latents", T, R * d * e))
            gathered.append((f"all AuxK's errors {t}", b * d * e))
    made.append(Collective("terms, pre-bias gradients", "all-gather", "latents", T, WIDE * (S * S + 3 * S + s.D)))
    if direct:
        gathered += [
            ("all inputs", b * s.D * e),
            ("all codes", M * ID + 2 * S * M * WIDE + S * S * b * WIDE),
            ("all AuxK's codes", aux * (ID + 2 * WIDE) + (S * b * WIDE if s.auxk else 0)),
        ]
        made += [Collective(name, "all-gather", "data", D, size) for name, size in gathered]
    else:
        made.append(Collective("values", "all-reduce", "latents", T, S * M * WIDE))
        gradients = ours.weights(own) * WIDE / D
        made.append(Collective("gradients", "reduce-scatter", "data", D, gradients))
        made.append(Collective("summed gradients", "all-gather", "data", D, gradients))
    made.append(Collective("terms, pre-biases", "all-gather", "data", D, WIDE * (S * S + 3 * S + s.D)))
    return [c for c in made if c.ranks > 1 and c.piece]


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
    sharded = mesh.shards > 1
    codes = rows * s.k * (8 + 8 + 2 * S * WIDE) + S * rows * s.auxk * (8 + 8 + 2 * WIDE)
    sort = 2 * 12 * rows * max(s.k, S * s.auxk)
    wide = max(s.d_streams) * (S + (1 if s.auxk else 0)) * WIDE
    return {
        "weights": ours.parameter_bytes(s) * parameters,
        "moments": 2 * ours.MOMENT * parameters,
        "half-precision copies": e * ours.weights(own) if s.autocast else 0,
        "gradients": 0 if direct else ours.parameter_bytes(s) * parameters,
        "inputs": b * s.D * (4 + 2 * e) + (rows - b) * s.D * e,
        "errors": rows * s.D * e * (S + (1 if s.auxk else 0)),
        "codes, lists, counters": codes + sort + 9 * S * own.N,
        "logits and partial sums": min(b * own.N * e, SCRATCH_BYTES) + PARTIAL_BYTES,
        "reconstructions in flight": 2 * 2 * cdiv(b, mesh.shards) * mesh.shards * wide if sharded else 0,
        "CUDA, NCCL": RUNTIME_BYTES,
    }  # fmt: skip


def fits(s: Shape, mesh: Mesh, gpu: GPU) -> bool:
    """Return whether a rank's memory is enough."""
    return sum(memory(s, mesh).values()) <= USABLE * 1e9 * gpu.memory_gb


# --------------------------------------------------------------------------------------------------------------- time


def _merge(rows: int, candidates: int, k: int) -> tuple[Part, ...]:
    """The k best of the shards' candidates of each row: maxima of groups, then the selector."""
    executed = ours.SELECT_INSTRUCTIONS + ours.BISECTION_STEPS[4] * ours.BISECTION_INSTRUCTIONS
    executed *= select_config(candidates, k).num_warps * rows
    keys = rows * candidates * KEY_BYTES
    return Part("maxima", keys), Part("merge", keys + rows * (candidates * ID + 8 * k), instructions=executed)


@of_gpu
def _computed(s: Shape, mesh: Mesh) -> dict[str, tuple[Part, ...]]:
    """Kernels of a rank's `training_step` by stage; with one shard losses and gradients are of one gather."""
    (D, T), own, S, e = mesh, block(s, mesh), s.S, s.e
    b, n = own.B, own.N
    rows = replace(s, B=b, N=max(n, s.k), auxk=0, dead=0)  # entries of all latents, weights of the own ones
    whole = replace(s, B=D * b, N=max(n, s.k, s.auxk), dead=own.dead)  # rows of all replicas
    stages = {
        "select": (Part("centre", 2 * b * s.D * e), *ours.select(replace(own, auxk=0, dead=0)).parts),
        "merge": _merge(b, T * own.k, s.k) if T > 1 else (),
        "values": tuple(ours._values(rows, n, s.k / T)),
        "lists": tuple(ours._lists(replace(whole, k=s.k), 1)),
        "counters": (Part("count", 16 * S * n), Part("fired", S * b * s.k * 20 + 2 * S * n)),
        "terms": (
            of_torch("term weights", 4 * (S * S + S), 2), Part("target weights", b * s.D * e + 4 * S * b * (1 + S)),
            Part("terms and metrics", 4 * (2 * S * S * b + S * b * s.k), launches=2), ours._bias_sums(rows),
        ),
        "update": (ours._scalars(s), *ours._updates(whole, 1 / T)),
    }  # fmt: skip
    if T == 1:
        stages["losses"] = tuple(ours._gradients(rows, n, s.k, S, shared=True, direct=True))
    else:
        for t, d in enumerate(s.d_streams):
            stages |= _target(rows, n, s.k / T, T, S, t, d)
    if s.auxk:
        present, dead = min(s.auxk, s.dead) / T, max(own.dead, 1)
        aux = replace(rows, k=s.auxk, N=max(n, s.auxk), dead=own.dead)
        one = replace(own, k=own.auxk, auxk=0)
        stages["select dead"] = (
            Part("mark dead", S * n * 9), Part("dead first", S * n * 5), *ours._dead_selections(one)
        )  # fmt: skip
        stages["merge dead"] = _merge(S * b, T * own.auxk, s.auxk) if T > 1 else ()
        stages["AuxK's values"] = tuple(ours._values(aux, dead, present))
        stages["AuxK's lists"] = tuple(ours._lists(replace(whole, k=s.auxk), S))
        for t, d in enumerate(s.d_streams):
            stages |= {f"AuxK's {name}": parts for name, parts in _target(aux, dead, present, T, 1, t, d).items()}
    return stages


def _target(s: Shape, n: int, present: float, T: int, sources: int, t: int, d: int) -> dict[str, tuple[Part, ...]]:
    """Stages of one target: reconstructions from the own latents, errors of the own rows, gradients of the values."""
    moved, R = sources * s.B * d, cdiv(s.B, T)
    entry = s.M * (8 + 4 * sources)

    def gathered(name: str, column: float) -> tuple[Part, ...]:
        return tuple(
            ours._gathers(s, name, [d], n, present, sources=sources, flops=2, column=column, per_slab=entry)
        )  # fmt: skip

    return {
        f"reconstruct {t}": gathered("partial", sources * s.B * WIDE),
        f"errors {t}": (
            of_torch("sum of ranks", sources * R * d * WIDE * (T + 1), 1),
            of_torch("error, norm", sources * R * d * (2 * WIDE + s.e) + R * d * s.e, 4),
        ),
        f"dots {t}": (*gathered("dots", sources * s.B * s.e), Part("dbias", moved * s.e + d * WIDE)),
    }


class Stage(NamedTuple):
    """A stage of the step: kernels, or one collective."""

    name: str
    parts: tuple[Part, ...]
    collective: Collective | None
    after: tuple[str, ...]  # stages that it waits for, beside the one before it of its own kind


def _program(s: Shape, mesh: Mesh) -> Iterator[Stage]:
    """Stages in the order of the program. Targets follow each other: one is sent while the next is gathered."""
    computed, sent = _computed(s, mesh), {c.name: c for c in collectives(s, mesh)}

    def run(name: str, *after: str) -> Stage:
        return Stage(name, computed.get(name, ()), None, after)

    def send(name: str, *after: str) -> Stage:
        return Stage(name, (), sent.get(name), after)

    targets, auxiliary = range(s.S), ("", "AuxK's ") if s.auxk else ("",)
    partial = {"": "partial reconstructions", "AuxK's ": "partial residuals"}
    yield from (run("select"), send("candidates", "select"), send("all inputs", "select"))
    yield from (run("select dead"), send("dead candidates", "select dead"))
    yield from (run("merge", "candidates"), run("values"))
    yield from (run("merge dead", "dead candidates"), run("AuxK's values"))
    yield from (run("losses"), run("counters"), send("fired flags", "counters"))
    for kind in auxiliary:
        for t in targets:
            yield from (run(f"{kind}reconstruct {t}"), send(f"{partial[kind]} {t}", f"{kind}reconstruct {t}"))
        for t in targets:
            yield run(f"{kind}errors {t}", f"{partial[kind]} {t}")
            yield send(f"{kind}errors {t}", f"{kind}errors {t}")
            yield send(f"all {kind}errors {t}", f"{kind}errors {t}", "losses")
        for t in targets:
            yield run(f"{kind}dots {t}", f"{kind}errors {t}")
    yield from (run("terms"), send("terms, pre-bias gradients", "terms"), send("terms, pre-biases", "terms"))
    yield from (send("all codes", "terms"), send("all AuxK's codes", "terms"))
    yield from (run("lists", "all codes"), run("AuxK's lists", "all AuxK's codes"))
    yield run("update", *(name for name in sent))


class Times(NamedTuple):
    """Modelled seconds of a step."""

    step: float  # of the slower of device and host
    compute: float  # of the kernels
    communication: float  # of the collectives
    exposed: float  # by which the device's step is longer than its kernels
    host: float


def times(s: Shape, mesh: Mesh, gpu: GPU) -> Times:
    """Model `training_step` on every rank of a mesh: kernels and collectives side by side, in order."""
    s = replace(s, arch=gpu.arch)
    if mesh.size == 1:
        op = ours.step(s, direct=True)
        device, host = op.seconds(gpu), host_seconds(op)
        return Times(max(device, host), device, 0.0, 0.0, host)
    ends: dict[str, float] = {}
    kernels = network = compute = communication = 0.0
    parts: list[Part] = []
    for name, stage_parts, collective, after in _program(s, mesh):
        ready = max((ends[other] for other in after if other in ends), default=0.0)
        if collective is not None:
            seconds = collective.seconds(gpu, mesh)
            network = max(network, ready) + seconds
            communication += seconds
            ends[name] = max(ends.get(name, 0.0), network)
        elif stage_parts:
            seconds = Op(name, stage_parts).seconds(gpu)
            kernels = max(kernels, ready) + seconds
            compute += seconds
            ends[name] = kernels
            parts += stage_parts
    device = max(kernels, network)
    calls = of_torch("collectives", 0, 2 * len(collectives(s, mesh)))
    host = host_seconds(total("step", [Op("kernels", tuple(parts)), Op("collectives", (calls,))]))
    return Times(max(device, host), compute, communication, device - compute, host)


def meshes(ranks: int) -> list[Mesh]:
    """Return every mesh of that many ranks."""
    return [Mesh(ranks // T, T) for T in range(1, ranks + 1) if ranks % T == 0]


def best(s: Shape, ranks: int, gpu: GPU) -> Mesh | None:
    """Return the mesh whose modelled step is shortest among those that fit, fewer shards among equals; None: none."""
    able = [mesh for mesh in meshes(ranks) if mesh.shards <= s.N and mesh.replicas <= s.B and fits(s, mesh, gpu)]
    return min(able, key=lambda mesh: (times(s, mesh, gpu).step, mesh.shards), default=None)


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


def row(s: Shape, mesh: Mesh, gpu: GPU) -> dict:
    """Return the modelled numbers of a shape on a mesh."""
    time, sent = times(s, mesh, gpu), [c.by_link(mesh) for c in collectives(s, mesh)]
    inside, outside = (sum(link) for link in zip(*sent, strict=True)) if sent else (0.0, 0.0)
    return {
        "N": s.N, "gpus": mesh.size, "replicas": mesh.replicas, "shards": mesh.shards, "modelled": True,
        "memory_gb": sum(memory(s, mesh).values()) / 1e9, "fits": fits(s, mesh, gpu),
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
        "N", "GPUs", "D x T", "GB a rank", "sent a rank: node MB", "network MB", "kernels ms", "collectives ms",
        "not hidden ms", "host ms", "step ms", "rows / s",
    )  # fmt: skip
    lines, rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], []
    for s in shapes:
        for p in ranks:
            mesh = best(s, p, gpu) if shards is None else mesh_of(p, shards)
            if mesh is None:
                smallest = min(sum(memory(s, mesh).values()) for mesh in meshes(p)) / 1e9
                lines.append(f"| {s.N:,} | {p} | does not fit | {smallest:.0f} |" + " |" * (len(head) - 4))
                continue
            r = row(s, mesh, gpu)
            rows.append(r)
            numbers = [r[key] for key in ("compute_ms", "communication_ms", "exposed_ms", "host_ms", "step_ms")]
            cells = [
                f"{s.N:,}", str(p), str(mesh), f"{r['memory_gb']:.0f}" + ("" if r["fits"] else ", too much"),
                f"{r['node_mb']:.0f}", f"{r['network_mb']:.0f}", *(f"{x:.2f}" for x in numbers),
                f"{r['rows_per_s']:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), rows


def rank_tables(s: Shape, mesh: Mesh, gpu: GPU) -> str:
    """Format what a rank holds and sends in one step, and what the step with gradients in memory would add."""
    held, lines = memory(s, mesh), ["| a rank holds | GB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in held.items() if size]
    lines += [f"| sum | {sum(held.values()) / 1e9:.2f} |"]
    if mesh.size > 1:
        lines += ["", "| a rank sends in a step | by | over | MB | us |", "|---|---|---|---|---|"]
        lines += [
            f"| {c.name} | {c.kind} | {c.group} | {c.sent / 1e6:.2f} | {1e6 * c.seconds(gpu, mesh):.0f} |"
            for c in collectives(s, mesh)
        ]
        two, gradients = collectives(s, mesh, direct=False), memory(s, mesh, direct=False)["gradients"]
        sent, ms = sum(c.sent for c in two) / 1e6, 1e3 * sum(c.seconds(gpu, mesh) for c in two)
        lines += [
            "", f"With gradients in memory (loss, backward, optimizer) a rank sends {sent:,.0f} MB in {ms:.1f} ms of "
            f"collectives, and holds {gradients / 1e9:.1f} GB of gradients.",
        ]  # fmt: skip
    return "\n".join(lines)


def scaling_report(shapes: list[Shape], ranks: list[int], shards: int | None, gpu: GPU) -> tuple[str, list]:
    """Format the tables of `sparc-kernels cost --gpus`, and return the numbers of the first."""
    text, rows = scaling_table(shapes, ranks, shards, gpu)
    first = shapes[0]
    title = f"modelled, nothing measured: `training_step` on {gpu.name}, {NODE_GPUS} a node; " + (
        f"B {first.B:,}, k {first.k}, d {'/'.join(map(str, first.d_streams))}, {first.dtype}"
        f"{' with float32 parameters' if first.autocast else ''}{f', AuxK {first.auxk}' if first.auxk else ''}"
    )
    tables = [f"{title}\n\n{text}"]
    if len(shapes) == len(ranks) == 1 and rows:
        mesh = Mesh(rows[0]["replicas"], rows[0]["shards"])
        tables.append(rank_tables(first, mesh, gpu))
    return "\n\n".join(tables), rows
