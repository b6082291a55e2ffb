"""Kernel launches, and a record of what a function launches, calls and allocates."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ._triton import INTERPRETED
from .registry import operator_of

_local = threading.local()  # .recorder: the active Recorder of this thread


def launch(kernel, grid: tuple[int, ...]) -> Callable[..., object]:
    """Return the function that launches a Triton kernel with its arguments and options.

    Args:
        kernel: decorated by triton.jit.
        grid: programs along one to three axes.
    """
    recorder = recording()
    return kernel[grid] if recorder is None else partial(recorder.launch, kernel, grid)


def recording() -> Recorder | None:
    """Return the recorder of this thread, if a function is being recorded."""
    return getattr(_local, "recorder", None)


@contextmanager
def recorded(inputs: Sequence[torch.Tensor | None]) -> Iterator[Recorder]:
    """Context in which launches, torch calls and allocations of this thread are recorded.

    Args:
        inputs: the tensors that may differ in every replay.
    """
    recorder = Recorder(inputs)
    with recorder, _NoScalars():
        _local.recorder = recorder
        try:
            yield recorder
        finally:
            _local.recorder = None


class Scalar(float):
    """A number that may differ in every replay; plain numbers are constants of a plan.

    What is computed from it would be a constant too: while a plan is recorded, arithmetic, comparisons and torch calls
    with it refuse the plan, though not functions in C that read a float themselves (`math.sqrt`). `derived` is the way
    to compute with it.
    """

    position: int
    part: Callable[[float], float] | None
    __hash__ = float.__hash__  # lost with __eq__

    @classmethod
    def make(cls, value: float, position: int, part: Callable[[float], float] | None = None) -> Scalar:
        """Return the number with its position among the scalars of the plan, and what is computed from it."""
        scalar = cls(value)
        scalar.position, scalar.part = position, part
        return scalar


def _refusing(name: str) -> Callable:
    method = getattr(float, name)

    def compute(self, *others):
        if (recorder := recording()) is not None:
            recorder.refuse(_COMPUTED)
        return method(self, *others)

    return compute


_COMPUTED = "a number that differs between calls is computed with (`derived` may)"
_binary = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
_others = ("neg", "pos", "abs", "round", "trunc", "floor", "ceil", "int", "float", "bool")
for _name in (*_binary, *(f"r{name}" for name in _binary), *_others, "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Scalar, f"__{_name}__", _refusing(f"__{_name}__"))


class _NoScalars(TorchFunctionMode):
    """Refuse plans whose torch calls take a `Scalar`: below, torch makes a plain number of it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(isinstance(arg, Scalar) for arg in tree_leaves((args, kwargs))) and (recorder := recording()):
            recorder.refuse(_COMPUTED)
        return func(*args, **(kwargs or {}))


def derived(number: float, part: Callable[[float], float]) -> float:
    """Return part(number), computed anew in every replay if the number is a `Scalar` as it was passed in."""
    value = part(_plain(number))
    return Scalar.make(value, number.position, part) if isinstance(number, Scalar) else value


def call(operator, *args):
    """Call an operator of the package.

    While a plan is recorded its implementation runs without torch's dispatcher, which makes plain numbers of scalars.

    Args:
        operator: as `register` returned it.
        args: of the operator.
    """
    implementation = operator_of(operator) if recording() is not None and hasattr(operator, "_schema") else None
    return operator(*args) if implementation is None else implementation.run(*args)


class Place(NamedTuple):
    """Geometry of a tensor inside a buffer."""

    buffer: int
    offset: int  # bytes from the buffer's pointer
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    compiled: Any  # of Triton; None: interpreted
    grid: tuple[int, ...]
    args: tuple  # of the kernel, in order if compiled; Place and Scalar where they vary
    options: dict
    on_side: bool


class Call(NamedTuple):
    """One call of a torch operator."""

    func: Any
    args: tuple
    kwargs: dict
    results: tuple[tuple[int, int], ...]  # (position among the flat results, buffer)
    on_side: bool


class Sync(NamedTuple):
    """One dependency between the current stream and a `SideStream`."""

    kind: str  # "fork", "event", "wait" or "join"
    event: int = -1


class Recorder(TorchDispatchMode):
    """Record launches, torch calls and allocations of a function while it runs.

    Args:
        inputs: its tensors.
    """

    def __init__(self, inputs: Sequence[torch.Tensor | None]):
        super().__init__()
        self.refused = ""  # why there can be no plan
        self.entries: list = []
        self.sizes: dict[int, int] = {}  # bytes of buffers that the function allocated
        self.like: dict[int, Place] = {}  # how they were allocated
        self.born: dict[int, int] = {}
        self.freed: dict[int, int] = {}
        self.on_side, self.uses_side, self.events = False, False, 0
        self._live: dict[int, tuple[int, Any]] = {}  # storage -> buffer, weak reference
        self._side_buffers: set[int] = set()
        self.n_buffers = len(inputs)
        for i, x in enumerate(inputs):
            if x is not None and x.untyped_storage()._cdata not in self._live:
                self._live[x.untyped_storage()._cdata] = i, None
        self.inputs = inputs

    # ------------------------------------------------------------------------------------------------------- recording

    def launch(self, kernel, grid, *args, **options):
        """Launch a kernel and record it."""
        with _disable_current_modes():  # the interpreter calls torch
            compiled = kernel[grid](*tree_map(_plain, args), **{name: _plain(arg) for name, arg in options.items()})
        if self.refused:
            return
        places = tuple(self._placed(arg) for arg in args)
        if INTERPRETED:
            compiled = None
        elif hasattr(compiled, "__getitem__"):  # it takes all arguments in order, and no options
            names = kernel.arg_names
            named = dict(zip(names, places, strict=False)) | {n: self._placed(a) for n, a in options.items()}
            places, options = tuple(named.get(name) for name in names), {}
        else:
            self.refuse(f"{kernel}: its launch returned no compiled kernel")
        self.entries.append(Launch(kernel, compiled, grid, places, options, self.on_side))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = operator_of(func)
        if operator is not None:
            with self:
                return operator.run(*args)
        out = func(*args, **kwargs)
        results = [(i, t) for i, t in enumerate(tree_leaves(out)) if isinstance(t, torch.Tensor)]
        if self.refused:
            return out
        dense = all(t.layout == torch.strided for _, t in results)
        if not results or not dense or func._schema.name in _HOST_READS:
            self.refuse(f"{func} cannot be repeated")
            return out
        new = [(i, t) for i, t in results if t.untyped_storage()._cdata not in self._live]
        if func._schema.name in _ALLOCATIONS:
            buffer = self._new(out)
            self.sizes[buffer], self.born[buffer] = out.untyped_storage().nbytes(), len(self.entries)
            self.like[buffer] = Place(buffer, 0, tuple(out.shape), out.stride(), out.dtype)
        elif new or func._schema.is_mutable:
            placed = tree_map(self._placed, (args, kwargs))
            made = tuple((i, self._new(t)) for i, t in new)
            self.entries.append(Call(func, *placed, made, self.on_side))
        return out

    def sync(self, kind: str, event: int = -1) -> int:
        """Record a dependency between streams.

        Args:
            kind: as in `Sync`.
            event: its number, for "wait".

        Returns:
            The number of a new event, for "event".
        """
        if kind == "event":
            event, self.events = self.events, self.events + 1
        self.uses_side = True
        self.entries.append(Sync(kind, event))
        return event

    def refuse(self, reason: str) -> None:
        """Give up: the function goes on as usual, and there will be no plan."""
        self.refused = self.refused or reason

    def _new(self, tensor) -> int:
        buffer, storage = self.n_buffers, tensor.untyped_storage()
        self.n_buffers += 1
        cdata, entries, freed, live = storage._cdata, self.entries, self.freed, self._live

        def end(_):
            freed[buffer] = len(entries)
            live.pop(cdata, None)

        self._live[cdata] = buffer, weakref.ref(storage, end)
        if self.on_side:
            self._side_buffers.add(buffer)
        return buffer

    def _placed(self, arg):
        """Replace tensors by places, in tuples and lists too."""
        if isinstance(arg, torch.Tensor):
            return self.place(arg)
        if isinstance(arg, tuple) and type(arg) is tuple:
            return tuple(self._placed(a) for a in arg)
        return [self._placed(a) for a in arg] if isinstance(arg, list) else arg

    def place(self, tensor: torch.Tensor) -> Place | None:
        """Find a tensor's place; None, and no plan, if neither the inputs nor the function made its memory."""
        strided = tensor.layout == torch.strided
        entry = self._live.get(tensor.untyped_storage()._cdata) if strided else None
        if entry is None:
            self.refuse(f"a tensor {tuple(tensor.shape)} is not an argument")
            return None
        buffer = entry[0]
        if self.on_side:
            self._side_buffers.add(buffer)
        # meta tensors have no pointers: their storage offsets say the same
        offset = tensor.storage_offset() * tensor.element_size()
        first = self.inputs[buffer] if buffer < len(self.inputs) else None
        offset -= 0 if first is None else first.storage_offset() * first.element_size()
        return Place(buffer, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def until(self, buffer: int) -> int:
        """Return the entry before which a buffer may be reused; what a second stream touched lives to the end."""
        last = len(self.entries)
        return last if buffer in self._side_buffers else self.freed.get(buffer, last)


_ALLOCATIONS = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
}
_HOST_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


def _plain(arg):
    return float.__float__(arg) if isinstance(arg, Scalar) else arg
