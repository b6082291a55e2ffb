"""Plans: what a function launches, recorded once and replayed with other tensors.

Choosing settings, allocating scratch and binding arguments costs the host far more than the launch itself. All of it
depends on shapes, strides, dtypes, alignment and device alone, so `Planned` does it once for each combination, then
repeats launches and torch calls with the pointers of the tensors at hand. Scratch is one allocation, laid out by when
each part is live.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ._triton import INTERPRETED, triton
from .numerics import allow_tf32, no_autocast
from .recorder import Call, Launch, Place, Recorder, Scalar, Sync, recorded, recording
from .registry import on_device
from .side_stream import second_stream
from .target import current

ALIGNMENT = 512  # bytes, of torch's CUDA allocations
MOST_PLANS = 32  # of one function; the one not used for longest is forgotten
_enabled = os.environ.get("SPARC_KERNELS_PLANS", "1") != "0"
_functions: weakref.WeakSet[Planned] = weakref.WeakSet()


class Plan:
    """What a recorded function did, to be repeated.

    Args:
        recorder: after the function has returned.
        outputs: the tensors it returned.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[torch.Tensor | None]):
        inputs, entries = recorder.inputs, recorder.entries
        self.outputs = [None if t is None else recorder.place(t) for t in outputs]
        self.device = next(t.device for t in inputs if t is not None)
        self.n_inputs, self.n_buffers, self.n_events = len(inputs), recorder.n_buffers, recorder.events
        self.uses_side = recorder.uses_side
        self.proven = False  # Triton has taken integers for pointers
        returned = {place.buffer for place in self.outputs if place is not None}
        called = {p.buffer for e in entries if isinstance(e, Call) for p in _places((e.args, e.kwargs))}
        # tensors of their own: results, operands of torch calls, and everything where kernels are interpreted
        tensors = [b for b in recorder.like if b in returned or b in called or INTERPRETED]
        self.allocated = [recorder.like[b] for b in tensors]
        scratch = [b for b in recorder.like if b not in tensors and recorder.sizes[b]]
        spans = {b: (recorder.born[b], recorder.until(b), recorder.sizes[b]) for b in scratch}
        self.scratch, self.scratch_bytes = layout(spans)
        held = set(range(self.n_inputs, self.n_buffers)) - set(scratch) - returned
        drops: dict[int, list[int]] = {}
        for buffer in held & set(recorder.freed):
            drops.setdefault(recorder.until(buffer), []).append(buffer)
        self.steps: list[Callable] = []
        compiled: list[Launch] = []  # in a row
        for i, entry in enumerate([*entries, None]):
            if compiled and (entry is None or i in drops or not isinstance(entry, Launch)):
                self.steps.append(_launches_step(compiled))
                compiled = []
            self.steps += [partial(_drop, buffer) for buffer in drops.get(i, ())]
            if isinstance(entry, Launch) and entry.compiled is not None:
                compiled.append(entry)
            elif entry is not None:
                self.steps.append(_STEPS[type(entry)](entry))
        self.launches = sum(isinstance(entry, Launch) for entry in entries)
        self.calls = sum(isinstance(entry, Call) for entry in entries)

    def run(self, inputs: Sequence[torch.Tensor | None], scalars: Sequence[float]) -> list[torch.Tensor | None]:
        """Repeat the function.

        Args:
            inputs: tensors of the recorded geometry.
            scalars: its numbers.

        Returns:
            What the function returned, in new memory.
        """
        replay = _Replay(self, inputs, scalars)
        try:
            for step in self.steps:
                step(replay)
        except Exception as error:
            if self.proven or replay.launched:
                raise
            raise Unproven(str(error)) from error
        self.proven = True
        return [None if place is None else replay.tensor(place) for place in self.outputs]


class Unproven(RuntimeError):
    """The first launch of a plan was refused; nothing was launched."""


class _Replay:
    """Memory and streams of one replay."""

    __slots__ = (
        "events", "launched", "main", "pointers", "scalars", "scratch", "side", "side_stream", "stream", "tensors",
    )  # fmt: skip

    def __init__(self, plan: Plan, inputs, scalars):
        more = plan.n_buffers - plan.n_inputs
        self.tensors = tensors = [*inputs, *[None] * more]
        self.pointers = pointers = [0 if t is None else t.data_ptr() for t in inputs]
        pointers += [0] * more
        self.scalars, self.launched = scalars, False
        device = plan.device
        for buffer, _, shape, stride, dtype in plan.allocated:
            tensors[buffer] = tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            pointers[buffer] = tensor.data_ptr()
        if plan.scratch_bytes:
            self.scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=device)
            base = self.scratch.data_ptr()
            for buffer, offset in plan.scratch:
                pointers[buffer] = base + offset
        self.stream = None if INTERPRETED else _current_stream()
        if plan.uses_side:
            self.main, self.events = torch.cuda.current_stream(device), [None] * plan.n_events
            self.side = second_stream(self.main.device, self.main.cuda_stream)
            self.side_stream = self.side.cuda_stream

    def tensor(self, place: Place) -> torch.Tensor:
        """Return a tensor at a place in memory that a tensor holds."""
        base = self.tensors[place.buffer]
        assert base is not None, "scratch has no tensors"
        if not place.offset and base.shape == place.shape and base.stride() == place.stride:
            return base if base.dtype == place.dtype else base.view(place.dtype)
        if base.dtype != place.dtype:
            base = base.view(place.dtype)
        return base.as_strided(place.shape, place.stride, base.storage_offset() + place.offset // base.element_size())


def _current_stream() -> int:
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())


def _drop(buffer: int, replay: _Replay) -> None:
    replay.tensors[buffer] = None


def _interpreted_step(entry: Launch) -> Callable:
    launcher, args = entry.kernel[entry.grid], entry.args

    def step(replay):
        launcher(*_filled(args, replay), **entry.options)

    return step


def _launches_step(entries: list[Launch]) -> Callable:
    """Launch Triton's compiled kernels one after the other; they take pointers as integers.

    Their arguments are written out as Python source, which takes half the time of filling them in from a list.
    """
    names: dict[str, Any] = {}

    def source(arg) -> str:
        if isinstance(arg, Place):
            return f"p[{arg.buffer}] + {arg.offset}" if arg.offset else f"p[{arg.buffer}]"
        if isinstance(arg, Scalar):
            number = f"replay.scalars[{arg.position}]"
            return number if arg.part is None else f"{named(arg.part)}({number})"
        if isinstance(arg, tuple):
            return f"({''.join(source(a) + ', ' for a in arg)})"
        return repr(arg) if arg is None or type(arg) in (int, bool) else named(arg)

    def named(value) -> str:
        names[name := f"n{len(names)}"] = value
        return name

    lines = ["def step(replay):", "    p, stream = replay.pointers, replay.stream"]
    for entry in entries:
        launcher = named(entry.compiled[(*entry.grid, 1, 1)[:3]])
        stream = "replay.side_stream" if entry.on_side else "stream"
        lines.append(f"    {launcher}({''.join(source(a) + ', ' for a in entry.args)}stream={stream})")
        if len(lines) == 3:
            lines.append("    replay.launched = True")
    exec("\n".join(lines), names)
    return names["step"]


def _call_step(entry: Call) -> Callable:
    def run(replay):
        out = entry.func(*_filled(entry.args, replay), **{name: _filled(a, replay) for name, a in entry.kwargs.items()})
        if entry.results:
            leaves = tree_leaves(out)
            for i, buffer in entry.results:
                replay.tensors[buffer] = leaves[i]
                replay.pointers[buffer] = leaves[i].data_ptr()

    def run_on_side(replay):
        with torch.cuda.stream(replay.side):
            run(replay)

    return run_on_side if entry.on_side else run


def _sync_step(entry: Sync) -> Callable:
    def step(replay):
        if entry.kind == "fork":
            replay.side.wait_stream(replay.main)
        elif entry.kind == "event":
            replay.events[entry.event] = replay.side.record_event()
        elif entry.kind == "wait":
            replay.main.wait_event(replay.events[entry.event])
        else:
            replay.main.wait_stream(replay.side)

    return step


_STEPS = {Launch: _interpreted_step, Call: _call_step, Sync: _sync_step}


def _filled(arg, replay):
    """Replace places by tensors and scalars by numbers."""
    if isinstance(arg, Place):
        return replay.tensor(arg)
    if isinstance(arg, Scalar):
        return _number(arg, replay)
    if isinstance(arg, (tuple, list)):
        return type(arg)([_filled(a, replay) for a in arg])
    return arg


def _number(scalar: Scalar, replay) -> float:
    value = replay.scalars[scalar.position]
    return value if scalar.part is None else scalar.part(value)


def _places(args) -> list[Place]:
    """All places in nested tuples, lists and dicts."""
    if isinstance(args, Place):
        return [args]
    if isinstance(args, dict):
        args = list(args.values())
    return [p for a in args for p in _places(a)] if isinstance(args, (tuple, list)) else []


def layout(spans: dict[int, tuple[int, int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Place buffers in one allocation; those that live at the same time do not overlap.

    Greedy by size, each at the lowest offset that is free while it lives.

    Args:
        spans: buffer -> (first entry, entry before which it ends, bytes).

    Returns:
        (buffer, offset) of each, offsets aligned as torch's allocations are, and the bytes in all.
    """
    placed: list[tuple[int, int, int, int, int]] = []  # offset, end, first, last, buffer
    for buffer, (first, last, size) in sorted(spans.items(), key=lambda item: (-item[1][2], item[0])):
        size, offset = -(-size // ALIGNMENT) * ALIGNMENT, 0
        for low, high, other_first, other_last, _ in sorted(placed):
            if first < other_last and other_first < last and low < offset + size and offset < high:
                offset = high
        placed.append((offset, offset + size, first, last, buffer))
    return [(buffer, offset) for offset, *_, buffer in placed], max((end for _, end, *_ in placed), default=0)


# ------------------------------------------------------------------------------------------------------------ functions

_FIRST, _REFUSED = object(), object()  # the function has run once; it cannot be repeated


class Planned:
    """A function of tensors that is replayed from a plan where its Triton implementation runs.

    The first call with a kind of arguments runs it, the second records it, later ones replay it. A kind is the geometry
    and alignment of the tensors, the other arguments and the device. Functions that cannot be repeated (a tensor that
    is no argument, a value read by the host) run as usual, with one warning.

    Args:
        function: takes a list of tensors (or None), static arguments (hashable) and scalars; returns a list of tensors
            (or None). It must have no other effects than on these tensors, and runs without gradient and autocast.
    """

    def __init__(self, function: Callable[..., list[Any]]):
        self.function = function
        self.plans: OrderedDict[tuple, Any] = OrderedDict()
        _functions.add(self)

    def __call__(
        self, tensors: Sequence[torch.Tensor | None], static: tuple = (), scalars: tuple[float, ...] = (), *, impl: str
    ) -> list[Any]:
        """Run the function or its plan.

        Args:
            tensors: its tensors.
            static: its static arguments.
            scalars: its numbers that may differ in every call.
            impl: "triton" or "torch"; the latter always runs the function.
        """
        if torch.compiler.is_compiling() or impl != "triton" or not usable():
            return self.function(tensors, *static, *scalars)
        key = kind_of(tensors, static)
        plan = self.plans.get(key)
        if type(plan) is Plan:
            self.plans.move_to_end(key)
            try:
                with on_device(plan.device):
                    return plan.run(tensors, scalars)
            except Unproven as error:
                self._refuse(key, str(error))
        elif plan is _FIRST:
            return self._record(key, tensors, static, scalars)
        elif plan is None:
            self.plans[key] = _FIRST
            if len(self.plans) > MOST_PLANS:
                self.plans.popitem(last=False)
        return self.function(tensors, *static, *scalars)

    def _record(self, key, tensors, static, scalars):
        device = next(t.device for t in tensors if t is not None)
        numbers = [Scalar.make(value, i) for i, value in enumerate(scalars)]
        with no_autocast(device), on_device(device), recorded(tensors) as recorder:
            outputs = self.function(tensors, *static, *numbers)
            plan = None if recorder.refused else Plan(recorder, outputs)
        if recorder.refused:
            self._refuse(key, recorder.refused)
        else:
            self.plans[key] = plan
        return outputs

    def _refuse(self, key, reason):
        name = self.function.__name__.strip("_")
        warnings.warn(f"launches of {name} are prepared anew in every call: {reason}", RuntimeWarning, stacklevel=4)
        self.plans[key] = _REFUSED


def usable() -> bool:
    """Whether plans may be recorded and replayed: eager torch, no dispatch mode, no transform."""
    return (
        _enabled
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and recording() is None
    )


def kind_of(tensors: Sequence[torch.Tensor | None], static: tuple) -> tuple:
    """Return everything that launches depend on: geometry, alignment, static arguments, device and settings."""
    kind: list = [static, current(), allow_tf32(), next(t.device for t in tensors if t is not None)]
    pointers, views = [], False
    for t in tensors:
        if t is None:
            kind.append(None)
        else:
            pointer, offset = t.data_ptr(), t.storage_offset()
            views = views or offset > 0
            if pointer:
                pointers.append(pointer)
            kind += [t.shape, t.stride(), t.dtype, pointer & 15, offset]
    if views or len(set(pointers)) < len(pointers):  # which of them share a storage
        storages = [None if t is None else t.untyped_storage()._cdata for t in tensors]
        kind.append(tuple(storages.index(s) for s in storages))
    return tuple(kind)


def forget_plans() -> None:
    """Forget all plans, after launch settings were changed by hand."""
    for function in list(_functions):
        function.plans.clear()


@contextmanager
def without_plans() -> Iterator[None]:
    """Context in which functions run as usual, for tools that replace launches."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
