"""Plans: what a function launches, recorded once and replayed with other tensors.

Choosing settings, allocating scratch and binding arguments costs the host far more than the launch itself. All of it
depends on shapes, strides, dtypes, alignment and device alone, so `Planned` does it once for each combination, then
repeats launches and torch calls with the pointers of the tensors at hand. Scratch is one allocation, laid out by when
each part is live.
"""

from __future__ import annotations

import operator
import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """What a recorded function did, written out as a Python function that does it again.

    Args:
        recorder: after the function has returned.
        outputs: the tensors it returned.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[torch.Tensor | None]):
        places = [None if t is None else recorder.place(t) for t in outputs]
        entries = recorder.entries
        self.device = next(t.device for t in recorder.inputs if t is not None)
        self.launches = sum(isinstance(entry, Launch) for entry in entries)
        self.calls = sum(isinstance(entry, Call) for entry in entries)
        self.proven = False  # Triton has taken integers for pointers
        self.refused = False  # it did not take those of the first launch
        source, names = _Source(recorder, places).write()
        self.source = source
        names.update(plan=self, device=self.device)
        exec(source, names)
        self._repeat = names["repeat"]

    def run(
        self, inputs: Sequence[torch.Tensor | None], pointers: Sequence[int], scalars: Sequence[float]
    ) -> list[torch.Tensor | None]:
        """Repeat the function.

        Args:
            inputs: tensors of the recorded kind.
            pointers: of the inputs.
            scalars: its numbers.

        Returns:
            What the function returned, in new memory.

        Raises:
            Unproven: Triton refused the first launch of a plan that never ran.
        """
        if self.proven:
            return self._repeat(inputs, pointers, scalars)
        try:
            out = self._repeat(inputs, pointers, scalars)
        except Exception as error:
            if self.refused:
                raise Unproven(str(error)) from error
            raise
        self.proven = True
        return out


class Unproven(RuntimeError):
    """The first launch of a plan was refused; nothing was launched."""


class _Source:
    """Writes a plan as Python source: binding arguments from lists would take twice the time.

    Buffer i has its tensor in `t{i}` and its pointer in `p{i}`; scratch is one allocation at `base`.
    """

    def __init__(self, recorder: Recorder, outputs: list[Place | None]):
        self.recorder, self.outputs = recorder, outputs
        self.names: dict[str, Any] = {
            "torch": torch, "view": _view, "leaves": tree_leaves, "current_stream": _current_stream,
            "second_stream": second_stream,
        }  # fmt: skip
        entries, like = recorder.entries, recorder.like
        returned = {place.buffer for place in outputs if place is not None}
        called = {p.buffer for e in entries if isinstance(e, Call) for p in _places((e.args, e.kwargs))}
        # tensors of their own: results, operands of torch calls, and everything where kernels are interpreted
        self.allocated = [b for b in like if b in returned or b in called or INTERPRETED]
        scratch = [b for b in like if b not in self.allocated and recorder.sizes[b]]
        placed, self.scratch_bytes = layout(
            {b: (recorder.born[b], recorder.until(b), recorder.sizes[b]) for b in scratch}
        )
        self.scratch = dict(placed)
        # Place of the whole tensor in each buffer, where it is known
        self.whole = {b: like[b] for b in self.allocated}
        for b, t in enumerate(recorder.inputs):
            if t is not None:
                self.whole[b] = Place(b, 0, tuple(t.shape), t.stride(), t.dtype)
        results = {b for e in entries if isinstance(e, Call) for _, b in e.results}
        self.drops: dict[int, list[int]] = {}  # entry -> buffers that end before it
        for b in sorted({*self.allocated, *results} & set(recorder.freed) - returned):
            self.drops.setdefault(recorder.until(b), []).append(b)

    def write(self) -> tuple[str, dict[str, Any]]:
        """Return the source of `repeat(tensors, pointers, scalars)`, and the values that it names."""
        recorder = self.recorder
        entries, n = recorder.entries, len(recorder.inputs)
        compiled = [e for e in entries if isinstance(e, Launch) and e.compiled is not None]
        used = {p.buffer for e in compiled for p in _places(e.args)}
        lines = [_unpack("t", n, "tensors"), _unpack("p", n, "pointers")]
        for b in self.allocated:
            _, _, shape, stride, dtype = recorder.like[b]
            lines.append(f"t{b} = torch.empty_strided({shape}, {stride}, dtype={dtype}, device=device)")
            lines += [f"p{b} = t{b}.data_ptr()"] if b in used else []
        if self.scratch_bytes:
            lines.append(f"scratch = torch.empty({self.scratch_bytes}, dtype=torch.uint8, device=device)")
            lines.append("base = scratch.data_ptr()")
        if recorder.uses_side:
            lines += ["main = torch.cuda.current_stream(device)", "side = second_stream(main.device, main.cuda_stream)"]
            lines.append("side_stream = side.cuda_stream")
        lines += ["stream = current_stream()", "plan.refused = True"] if compiled else []
        for i, entry in enumerate([*entries, None]):
            lines += [f"t{b} = None" for b in self.drops.get(i, ())]
            if isinstance(entry, Launch):
                lines.append(self._launch(entry))
                lines += ["plan.refused = False"] if compiled and entry is compiled[0] else []
            elif isinstance(entry, Call):
                lines += self._call(entry)
                lines += [f"p{b} = t{b}.data_ptr()" for _, b in entry.results if b in used]
            elif isinstance(entry, Sync):
                lines.append(_SYNCS[entry.kind].format(entry.event))
        lines.append(f"return [{', '.join('None' if p is None else self._tensor(p) for p in self.outputs)}]")
        return "\n    ".join(["def repeat(tensors, pointers, scalars):", *lines]), self.names

    def _launch(self, entry: Launch) -> str:
        if entry.compiled is None:
            options = "".join(f"{name}={self._value(arg, self._tensor)}, " for name, arg in entry.options.items())
            args = "".join(f"{self._value(arg, self._tensor)}, " for arg in entry.args)
            return f"{self._named(entry.kernel[entry.grid])}({args}{options})"
        launcher = self._named(entry.compiled[(*entry.grid, 1, 1)[:3]])
        args = "".join(f"{self._value(arg, self._pointer)}, " for arg in entry.args)
        return f"{launcher}({args}stream={'side_stream' if entry.on_side else 'stream'})"

    def _call(self, entry: Call) -> list[str]:
        args = "".join(f"{self._value(arg, self._tensor)}, " for arg in entry.args)
        args += "".join(f"{name}={self._value(arg, self._tensor)}, " for name, arg in entry.kwargs.items())
        call = f"{self._named(entry.func)}({args})"
        returns = entry.func._schema.returns
        if len(returns) == 1 and isinstance(returns[0].type, torch._C.TensorType):
            call = f"t{entry.results[0][1]} = {call}" if entry.results else call
            lines = []
        else:
            call = f"out = leaves({call})"
            lines = [*(f"t{buffer} = out[{i}]" for i, buffer in entry.results), "out = None"]
        return [f"with torch.cuda.stream(side): {call}" if entry.on_side else call, *lines]

    def _value(self, arg, place: Callable[[Place], str]) -> str:
        """Write an argument; `place` writes what is at a place."""
        if isinstance(arg, Place):
            return place(arg)
        if isinstance(arg, Scalar):
            number = f"scalars[{arg.position}]"
            return number if arg.part is None else f"{self._named(arg.part)}({number})"
        if isinstance(arg, (tuple, list)):
            inside = "".join(f"{self._value(a, place)}, " for a in arg)
            return f"({inside})" if isinstance(arg, tuple) else f"[{inside}]"
        return repr(arg) if arg is None or type(arg) in (int, bool) else self._named(arg)

    def _pointer(self, place: Place) -> str:
        buffer, offset = place.buffer, place.offset
        if buffer in self.scratch:
            return f"base + {self.scratch[buffer] + offset}"
        if buffer in self.recorder.like and buffer not in self.allocated:
            return "0"  # no bytes
        return f"p{buffer} + {offset}" if offset else f"p{buffer}"

    def _tensor(self, place: Place) -> str:
        whole = place == self.whole.get(place.buffer)
        return f"t{place.buffer}" if whole else f"view(t{place.buffer}, {self._named(place)})"

    def _named(self, value) -> str:
        self.names[name := f"n{len(self.names)}"] = value
        return name


_SYNCS = {
    "fork": "side.wait_stream(main)", "event": "event{} = side.record_event()", "wait": "main.wait_event(event{})",
    "join": "main.wait_stream(side)",
}  # fmt: skip


def _unpack(letter: str, n: int, source: str) -> str:
    return f"{''.join(f'{letter}{i}, ' for i in range(n))}= {source}"


def _view(base: torch.Tensor, place: Place) -> torch.Tensor:
    """Return the tensor at a place in the memory of another that begins where the place's buffer does."""
    if base.dtype != place.dtype:
        base = base.view(place.dtype)
    return base.as_strided(place.shape, place.stride, base.storage_offset() + place.offset // base.element_size())


def _current_stream() -> int:
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())


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
        key, pointers = kind_of(tensors, static)
        plan = self.plans.get(key)
        if type(plan) is Plan:
            if len(self.plans) >= MOST_PLANS:  # it is the latest; another thread may have dropped it
                self.plans[key] = self.plans.pop(key, plan)
            try:
                with on_device(plan.device):
                    return plan.run(tensors, pointers, scalars)
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


def kind_of(tensors: Sequence[torch.Tensor | None], static: tuple) -> tuple[tuple, list[int]]:
    """Return everything that launches depend on, and the tensors' pointers, 0 for None.

    Launches depend on geometry, alignment, shared memory, static arguments, the device and settings.
    """
    present = [t for t in tensors if t is not None]
    pointers, offsets = [*map(torch.Tensor.data_ptr, present)], [*map(torch.Tensor.storage_offset, present)]
    kind = (
        static, current(), allow_tf32(), present[0].device, *map(_SHAPE, present), *map(torch.Tensor.stride, present),
        *map(_DTYPE, present), *[pointer & 15 for pointer in pointers], *offsets,
    )  # fmt: skip
    if any(offsets) or len({*pointers, 0}) <= len(pointers):  # which of them share a storage
        storages = [t.untyped_storage()._cdata for t in present]
        kind += (tuple(storages.index(s) for s in storages),)
    if len(present) < len(tensors):
        found = iter(pointers)
        pointers = [0 if t is None else next(found) for t in tensors]
        kind += ("None at", *(i for i, t in enumerate(tensors) if t is None))
    return kind, pointers


_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")


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
