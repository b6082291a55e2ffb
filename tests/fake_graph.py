"""CUDA graphs without a GPU: a capture records calls of operators, a replay repeats these calls on the same memory.

What a real capture freezes is frozen here: tensors by their memory, numbers by their value, and every decision of
Python. As there, a capture changes nothing and leaves no result, memory made inside belongs to the graph, and reading a
value or copying from the host is refused.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "lift_fresh", "unique", "_unique2"}


def _tensors(tree) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def _poison(t: torch.Tensor) -> None:
    if t.is_floating_point():
        t.fill_(float("nan"))
    elif t.dtype is torch.bool:
        t.fill_(True)
    else:
        t.fill_(torch.iinfo(t.dtype).max // 2)


class Recorder(TorchDispatchMode):
    """Record the calls of operators; run them, since results have to exist, and undo that at the end."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        operands = _tensors((args, kwargs))
        arguments = func._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for t in _tensors([given.get(n) for n in written]):
            if _storage(t) not in self.made and _storage(t) not in self.before:
                whole = (
                    t.detach().new_empty(0).set_(t.untyped_storage(), 0, (t.untyped_storage().nbytes() // t.itemsize,))
                )
                self.before[_storage(t)] = whole, whole.clone()
        results = func(*args, **kwargs)
        known = {_storage(t) for t in operands}
        fresh = [t for t in _tensors(results) if _storage(t) not in known]
        for t in fresh:
            self.made[_storage(t)] = t.detach()
        if fresh or written:  # others are views
            places = [t.detach() if _storage(t) not in known else None for t in _tensors(results)]
            frozen = torch.utils._pytree.tree_map(
                lambda t: t.detach() if isinstance(t, torch.Tensor) else t, (args, kwargs)
            )
            self.calls.append((func, *frozen, places))
        return results

    def undo(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)
        for t in self.made.values():
            _poison(t)


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.replays = None, 0

    @torch.no_grad()
    def replay(self):
        assert self.calls is not None, "replayed before its capture"
        self.replays += 1
        for func, args, kwargs, places in self.calls:
            results = _tensors(func(*args, **kwargs))
            for place, result in zip(places, results, strict=True):
                if place is not None:
                    place.copy_(result)


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, *device, **options):
        self.cuda_stream, self.asked = id(self), device

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class FakeCuda:
    """Puts the stand-ins in the place of torch.cuda's, and lets `StepGraph` take the tests' device for a GPU.

    Args:
        monkeypatch: of pytest.
        fail: raised at the end of captures, as by an operation that a capture does not permit.
    """

    def __init__(self, monkeypatch, fail: Exception | None = None):
        self.fail, self.main, self.graphs, self.asked = fail, Stream(), [], []
        self.current, self.capturing = self.main, False
        fakes = dict(
            CUDAGraph=self._new, Stream=Stream, graph=self.capture, stream=self.on, set_stream=self.set_stream,
            current_stream=lambda *_: self.current, is_current_stream_capturing=lambda: self.capturing,
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr("sparc_kernels.nn.graphed._DEVICE", "cpu")

    @property
    def replays(self) -> list[int]:
        """Replays of every graph so far."""
        return [graph.replays for graph in self.graphs]

    def _new(self):
        self.graphs.append(Graph())
        return self.graphs[-1]

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph, stream=None, **options):
        assert not self.capturing, "a capture inside another"
        self.asked.append({"stream": stream, **options})
        self.current, self.capturing, recorder = stream or Stream(), True, Recorder()
        try:
            with recorder:
                yield
        finally:
            self.capturing = False
            recorder.undo()
        if self.fail:
            raise self.fail  # and its own stream stays current, as with torch
        self.current, graph.calls = self.main, recorder.calls
