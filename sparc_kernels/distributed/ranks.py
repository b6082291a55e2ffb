"""The ranks that train one model: their place in the mesh, and every collective that they run.

Sums are taken in the order of the ranks, whatever the transport does, so that two runs give the same bits and every
rank of a group holds the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..core.numerics import even_parts
from ..core.validation import require
from .agreement import objects_of

LATENTS, DATA = "latents", "data"  # names of the mesh's dimensions
SUM_BYTES = 64 << 20  # of a tensor that is summed over a group at a time

_counters: list[Counter] = []


@contextmanager
def count_bytes() -> Iterator[Counter]:
    """Count the bytes that this rank receives from others inside the context.

    Yields:
        Bytes by (dimension of the mesh, what is sent), such as ("latents", "errors").
    """
    counter: Counter = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class Pending:
    """The result of a collective that runs beside later work.

    Args:
        result: tensor that it fills.
        work: of torch.distributed; None: it is done.
        inputs: kept alive until the end.
    """

    def __init__(self, result: torch.Tensor, work, inputs: torch.Tensor):
        self._result, self._work, self._inputs = result, work, inputs

    def wait(self) -> torch.Tensor:
        """Return the result; on CUDA only later work of the current stream waits."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


class Group:
    """The ranks along one dimension of the mesh.

    Args:
        group: process group of torch.distributed.
        name: of the dimension.

    Attributes:
        size: number of ranks.
        rank: place of this one.
    """

    def __init__(self, group: dist.ProcessGroup, name: str):
        self.group, self.name = group, name
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def _count(self, what: str, received: int) -> None:
        for counter in _counters:
            counter[self.name, what] += received

    def gather(self, x: torch.Tensor, what: str) -> Pending:
        """Collect the tensors of all ranks.

        Args:
            x: of one shape on every rank.
            what: name for `count_bytes`.

        Returns:
            [size, *x.shape], in the order of the ranks.
        """
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        self._count(what, (self.size - 1) * x.numel() * x.element_size())
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        work = all_gather(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return Pending(out, work, x)

    def exchange(self, x: torch.Tensor, what: str) -> Pending:
        """Send part i of x to rank i.

        Args:
            x: [size, ...], of one shape on every rank.
            what: name for `count_bytes`.

        Returns:
            [size, ...], the parts for this rank in the order of the ranks.
        """
        x = x.contiguous()
        out = torch.empty_like(x)
        self._count(what, (self.size - 1) * x[0].numel() * x.element_size())
        return Pending(out, dist.all_to_all_single(out, x, group=self.group, async_op=True), x)

    def total(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Sum a small tensor over the ranks, in their order.

        Args:
            x: of one shape on every rank.
            what: name for `count_bytes`.
        """
        return self.gather(x, what).wait().sum(0)

    def total_(self, x: torch.Tensor, what: str) -> None:
        """Sum a large tensor over the ranks in place, in their order.

        Every rank sums a part and gathers the sums of the others: 2 (size - 1) / size of its bytes are received.

        Args:
            x: of one shape on every rank, contiguous or the transpose of a contiguous matrix.
            what: name for `count_bytes`.
        """
        if self.size == 1:
            return
        flat = (x if x.is_contiguous() else x.t()).view(-1)
        for piece in flat.split(max(self.size, SUM_BYTES // x.element_size())):
            part = -(-len(piece) // self.size)
            padded = piece.new_zeros(self.size, part)
            padded.view(-1)[: len(piece)] = piece
            own = self.exchange(padded, what).wait().sum(0)
            piece.copy_(self.gather(own, what).wait().view(-1)[: len(piece)])

    def reduce_(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType, what: str) -> Pending:
        """Reduce a tensor in place by an operation whose result does not depend on the order.

        Args:
            x: contiguous, of one shape on every rank.
            op: MAX, or SUM where at most one rank has a number other than 0.
            what: name for `count_bytes`.
        """
        self._count(what, 2 * (self.size - 1) * x.numel() * x.element_size() // self.size)
        return Pending(x, dist.all_reduce(x, op, group=self.group, async_op=True), x)

    def objects(self, value: object) -> list:
        """Collect a Python object of every rank; synchronises.

        Args:
            value: anything that can be pickled.
        """
        return objects_of(self.group, value)


class Ranks:
    """The place of this process among those that train one model.

    Args:
        mesh: one dimension, over which the latents are divided; or two, ("data", "latents"): replicas with batches of
            their own, each divided over its ranks.

    Attributes:
        latents: the ranks that hold one replica's latents.
        data: the ranks that hold the same latents in every replica; None without that dimension.
        shard: place among the latents' ranks.
        shards: their number, T.
        replica: number of this replica.
        replicas: D.
        rank: replica * T + shard.
        size: D * T.

    Raises:
        ValueError: the mesh has other dimensions, or does not contain this process.
    """

    def __init__(self, mesh: DeviceMesh):
        require(isinstance(mesh, DeviceMesh), "mesh", "a torch.distributed DeviceMesh", mesh)
        names = mesh.mesh_dim_names
        ok = (mesh.ndim == 1 and names in (None, (LATENTS,))) or names == (DATA, LATENTS)
        require(ok, "mesh", f"one dimension, or two named {(DATA, LATENTS)}", f"{mesh.ndim} named {names}")
        require(
            mesh.get_coordinate() is not None, "mesh", "one that contains this process", f"ranks {mesh.mesh.tolist()}"
        )
        self.latents = Group(mesh.get_group(mesh.ndim - 1), LATENTS)
        self.data = Group(mesh.get_group(0), DATA) if mesh.ndim == 2 else None
        self.shard, self.shards = self.latents.rank, self.latents.size
        self.replica, self.replicas = (self.data.rank, self.data.size) if self.data else (0, 1)
        self.rank, self.size = self.replica * self.shards + self.shard, self.replicas * self.shards

    def __deepcopy__(self, memo) -> Ranks:
        return self

    def __reduce__(self):
        raise TypeError("a sharded model cannot be pickled (its ranks are processes); save its state_dict()")

    def blocks(self, n: int) -> list[tuple[int, int]]:
        """Divide n latents into one block for each shard; the first n % T have one more.

        Args:
            n: number of latents.

        Returns:
            [start, stop) of each block.
        """
        return even_parts(n, self.shards)

    def block(self, n: int) -> tuple[int, int]:
        """Return this rank's block of n latents, [start, stop)."""
        return self.blocks(n)[self.shard]

    def gather(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Collect a small tensor of every rank, [D, T, *x.shape].

        Args:
            x: of one shape on every rank.
            what: name for `count_bytes`.
        """
        parts = self.latents.gather(x, what).wait()
        return parts[None] if self.data is None else self.data.gather(parts, what).wait()

    def objects(self, value: object) -> list:
        """Collect a Python object of every rank, in the order of `rank`; synchronises.

        Args:
            value: anything that can be pickled.
        """
        parts = self.latents.objects(value)
        return parts if self.data is None else [part for some in self.data.objects(parts) for part in some]
