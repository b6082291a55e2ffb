"""A training step traced on meta tensors: what it launches, what memory it holds, and that it never waits for a GPU.

The real module runs forward, loss and backward at the real shape on torch's meta device, where tensors have shapes and
no data. Operators run their Triton launchers, kernels are replaced by recorders, so what is noted is what a GPU would
launch and allocate, whatever the package's files hold: new operators and kernels are picked up by themselves. Reading
a value back (`.item()`, `nonzero`, a copy to the host) has no answer on meta tensors and raises; so do copies from the
host, which wait as well.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import reference
from ..core._triton import HAS_TRITON
from ..core.registry import operator_of
from ..core.target import Target, as_target
from ..launch.budgets import MAX_K
from ..launch.device import AMD
from .shape import Shape

FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: everything the compiler sees."""

    kernel: str  # module:function
    signature: tuple
    constexprs: tuple
    divisible: tuple
    num_warps: int
    num_stages: int
    options: tuple = ()  # further compiler options by name
    small: tuple = ()  # pointers to less than 2 GiB, which AMD's backend addresses otherwise


@dataclass(frozen=True)
class Allocation:
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operator: str  # what made it
    place: str  # file:line of the package that called for it

    def __str__(self):
        return f"{self.bytes / 2**20:.1f} MiB {self.dtype}{list(self.shape)} by {self.operator} at {self.place}"


@dataclass(frozen=True)
class Trace:
    """What one traced step did. Bytes are those of storages, each counted once however many views it has, without the
    allocator's rounding and without what library calls allocate inside (sort's and GEMM's workspaces)."""

    launches: tuple[Launch, ...]  # in order, repetitions included
    peak_bytes: int  # largest sum of live storages that are not parameters, buffers, inputs or their gradients
    kept_bytes: int  # the same sum between the loss and its backward
    live_bytes_at_end: int  # the same sum when the step's outputs and loss are gone: what leaks
    gradient_bytes: int  # storages behind the .grad of parameters and inputs, counted in none of the above
    largest: tuple[Allocation, ...]  # what made up the peak, largest first


# -------------------------------------------------------------------------------------------------- memory and copies


class InsideOperators(TorchDispatchMode):
    """A dispatch mode that stays on inside the package's operators, where torch leaves it."""

    impl: str | None = None  # the implementation that runs; None: the one that the call names
    composite: frozenset[str] = frozenset()  # torch's operators that are taken apart before `dispatch` sees them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator, name = operator_of(func), func._schema.name
        if operator is not None:
            self.enter(name.split("::")[1])
            with self:
                return operator.run(*args[:-1], self.impl or args[-1])
        if name in self.composite:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return self.dispatch(func, args, kwargs or {})

    def enter(self, name: str) -> None:
        """One of the package's operators begins."""

    def dispatch(self, func, args: tuple, kwargs: dict):
        """One of torch's own operators."""
        return func(*args, **kwargs)


class _Tracer(InsideOperators):
    """Runs the package's operators by their launchers and keeps the account of storages."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live = {}  # storage's address -> (weak reference, index of its event)
        self.events = []  # +number: that allocation was made, -number - 1: it was freed
        self.made = []  # Allocation of each number

    def dispatch(self, func, args, kwargs):
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.is_meta for t in (*made, *given)):
            # tensors that no operator made hold a list or number of the host: torch.tensor(...), x[[0, 2]]
            if any(t.dim() > 0 if not t.is_meta else not self.knows(t) for t in given):
                raise RuntimeError(f"{func} at {_place()}: a copy between host and device, which waits for it")
            for t in made:
                self.note(t, func)
        return out

    def knows(self, tensor) -> bool:
        storage = tensor.untyped_storage()
        return storage._cdata in self.known or storage._cdata in self.live or storage.nbytes() == 0

    def note(self, tensor, func):
        storage = tensor.untyped_storage()
        address = storage._cdata
        if self.knows(tensor):
            return
        number = len(self.made)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.made.append(Allocation(storage.nbytes(), tuple(tensor.shape), dtype, str(func), _place()))
        self.events.append(number)

        def freed(_):
            self.events.append(-number - 1)
            self.live.pop(address, None)

        self.live[address] = weakref.ref(storage, freed), number

    def numbers(self, tensors) -> set[int]:
        """The allocations behind the tensors."""
        found = (self.live.get(t.untyped_storage()._cdata) for t in tensors)
        return {entry[1] for entry in found if entry}

    def replay(self, without: set[int], until: int | None = None) -> tuple[int, set[int], int]:
        """Largest sum of bytes, what was live then, and the sum at the end."""
        total = peak = 0
        live, at_peak = set(), set()
        grown = False
        for event in self.events[:until]:
            number = event if event >= 0 else -event - 1
            if number in without:
                continue
            if event >= 0:
                live.add(number)
                total += self.made[number].bytes
                if total > peak:
                    peak, grown = total, True
            else:
                if grown:  # on the way down from a new peak
                    at_peak, grown = set(live), False
                live.discard(number)
                total -= self.made[number].bytes
        return peak, set(live) if grown else at_peak, total


def _place() -> str:
    """The innermost line of the package, of files that are not about tracing, on the stack."""
    package, tools = f"{FOLDER}{os.sep}", f"{FOLDER / 'tools'}{os.sep}"
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(package) and not path.startswith(tools):
            return f"{path.removeprefix(package)}:{frame.f_lineno}"
        frame = frame.f_back
    return "-"


# ------------------------------------------------------------------------------------------------------------ launches


class _Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, name, kernel, small, found):
        self.name, self.kernel, self.small, self.found = name, kernel, small, found
        self.params = list(inspect.signature(kernel.fn).parameters.values())
        plain = getattr(kernel, "do_not_specialize", None)
        if plain is None:  # an interpreted kernel keeps what the decorator was given
            plain = getattr(kernel, "kwargs", {}).get("do_not_specialize")
        self.plain = {p if isinstance(p, str) else self.params[p].name for p in plain or ()}

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, num_warps=4, num_stages=3, **named):
        values = {p.name: arg for p, arg in zip(self.params, args, strict=False)}
        options = {}
        names = {p.name for p in self.params}
        for name, value in named.items():
            (values if name in names else options)[name] = value
        signature, constants, divisible, small = {}, {}, [], []
        for i, param in enumerate(self.params):
            if param.name not in values:
                continue  # has a default
            value = values[param.name]
            if "constexpr" in str(param.annotation):
                signature[param.name] = "constexpr"
                constants[(i,)] = value
            elif param.name in self.plain:
                signature[param.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            else:
                signature[param.name] = _specialise(value, (i,), constants, divisible, small)
        parts = tuple(signature.items()), tuple(constants.items()), tuple(divisible), num_warps, num_stages
        self.found.append(Launch(self.name, *parts, tuple(sorted(options.items())), tuple(small) if self.small else ()))


def _specialise(arg, path, constants, divisible, small):
    """The Triton type of an argument; what the JIT treats as a constant or as divisible by 16 is noted as it does."""
    if isinstance(arg, (tuple, list)):
        return tuple(_specialise(a, (*path, i), constants, divisible, small) for i, a in enumerate(arg))
    if isinstance(arg, bool):
        return "i1"
    if arg is None or (isinstance(arg, int) and arg == 1):
        constants[path] = arg
        return "constexpr"
    if isinstance(arg, int):
        if arg % 16 == 0:
            divisible.append(path)
        return "i32" if -(2**31) <= arg < 2**31 else "i64"
    if isinstance(arg, float):
        return "fp32"
    if arg.storage_offset() * arg.element_size() % 16 == 0:  # torch allocations are aligned
        divisible.append(path)
    if arg.untyped_storage().nbytes() < 2**31:
        small.append(path)
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "bool": "i1"}
    name = str(arg.dtype).removeprefix("torch.")
    return "*" + names.get(name, name.replace("uint", "u").replace("int", "i"))


@contextmanager
def as_on_gpu(arch: int, tf32: bool, found: list[Launch] | None = None, gpu_name: str | None = None):
    """Launchers as they would work for a GPU of that architecture.

    Args:
        arch: as `launch.device.capability` gives it.
        tf32: what torch's float32 matmul precision allows.
        found: where launches are noted instead of being made; None: they are made.
        gpu_name: whose recorded settings count.
    """
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed here: its launchers cannot be traced")
    from triton.runtime.jit import KernelInterface

    launched, recorders = KernelInterface.__getitem__, {}

    def recorder(kernel, grid):
        if kernel not in recorders:
            name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
            recorders[kernel] = _Recorder(name, kernel, arch >= AMD, found)
        return recorders[kernel][grid]

    with as_target(Target(arch, tf32, gpu_name=gpu_name)):
        if found is not None:
            KernelInterface.__getitem__ = recorder
        try:
            yield
        finally:
            KernelInterface.__getitem__ = launched


# ---------------------------------------------------------------------------------------------------------------- steps


def _model(shape: Shape, topk_type: str, auxk: int | None):
    from ..nn.module import AlignedSAE

    widths = {f"s{i}": d for i, d in enumerate(shape.d_streams)}
    return AlignedSAE(
        widths, shape.N, shape.k, auxk, topk_type=topk_type, impl="triton", device="meta",
        dtype=getattr(torch, shape.dtype),
    )  # fmt: skip


def _inputs(shape: Shape, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, shape.dtype)
    return {
        f"s{i}": torch.empty(shape.B, d, dtype=dtype, device="meta", requires_grad=requires_grad)
        for i, d in enumerate(shape.d_streams)
    }


def _auxk(shape: Shape, auxk: bool | int) -> int | None:
    return min(shape.k, shape.N, MAX_K) if auxk is True else auxk or None


def _summary(tracer, found, before_backward, leaves) -> Trace:
    gradients = tracer.numbers([p.grad for p in leaves if p.grad is not None])
    peak, at_peak, at_end = tracer.replay(gradients)
    largest = sorted((tracer.made[n] for n in at_peak), key=lambda a: -a.bytes)
    kept = tracer.replay(gradients, before_backward)[2]
    gradient_bytes = sum(tracer.made[n].bytes for n in gradients)
    return Trace(tuple(found), peak, kept, at_end, gradient_bytes, tuple(largest[:10]))


def trace(
    shape: Shape, arch: int = 90, *, topk_type: str = "global", auxk: bool | int = False, tf32: bool = False,
    input_grads: bool = False, update: str | None = None, **optimizer,
) -> Trace:  # fmt: skip
    """One training step (forward, compute_loss, backward) of an AlignedSAE of this shape, with impl="triton".

    Args:
        shape: sizes; B rows of each of the S streams.
        arch: as `device.capability` gives it.
        topk_type: as in AlignedSAE.  auxk: how many dead latents; True for min(k, N, 512), False for no such loss.
        tf32: what torch's float32 matmul precision allows.
        input_grads: whether the inputs ask for gradients too.
        update: "dense", a step of SparcAdam after it; "direct", `training_step` instead of all of it. Its moments
            exist before.  optimizer: further arguments of SparcAdam.

    Returns: a Trace; its `peak_bytes` counts every storage that lives at one time and is not a parameter, a buffer, an
        input or the gradient of one (a gradient's storage is left out from its allocation on). The outputs object is
        kept until after the backward, as a training loop does.

    Raises: whatever torch raises where a value is read back from a meta tensor, RuntimeError for copies between host
        and device: a step that returns a Trace never waits for the device. Not seen: calls of torch.cuda.synchronize.
    """
    from ..nn.optimizer import SparcAdam

    found: list[Launch] = []
    with as_on_gpu(arch, tf32, found):
        model, inputs = _model(shape, topk_type, _auxk(shape, auxk)), _inputs(shape, input_grads)
        leaves, known = [*model.parameters(), *inputs.values()], []
        if update:
            adam = SparcAdam(model, **optimizer)
            known = [t for both in adam.prepare([[True] * 4] * shape.S) for some in both for t in some]
            known += [adam.counts, adam.scalars()]
            known += [w for pair in adam.half_weights() or () for w in pair]
        with _Tracer([*leaves, *model.buffers(), *known]) as tracer:
            before_backward = None
            if update == "direct":
                _ = model.training_step(inputs, adam)
                del _
            else:
                outputs = model(inputs)
                loss, metrics = model.compute_loss(outputs, inputs)
                before_backward = len(tracer.events)
                loss.backward()
                if update:
                    adam.step()
                del outputs, loss, metrics
        return _summary(tracer, found, before_backward, leaves)


def launches(shape: Shape, arch: int) -> list[Launch]:
    """The distinct kernel launches at this shape on this architecture: training steps with and without AuxK, global
    and local, both tf32 settings, with and without gradients of the inputs; the optimizer's step from gradients, with
    and without clipping, and without any; reconstructions read from the outputs; the public decode and its
    gradients."""
    from ..ops.decode import decode

    found: list[Launch] = []
    for tf32 in (False, True) if shape.dtype == "float32" else (False,):
        found += trace(shape, arch, auxk=True, tf32=tf32, input_grads=True).launches
        found += trace(shape, arch, tf32=tf32).launches
        found += trace(shape, arch, topk_type="local", tf32=tf32).launches
    found += trace(shape, arch, update="dense", max_grad_norm=1.0).launches
    found += trace(shape, arch, auxk=True, update="dense", normalize="after").launches
    found += trace(shape, arch, auxk=True, topk_type="local").launches
    found += trace(shape, arch, update="direct").launches
    found += trace(shape, arch, auxk=True, update="direct").launches
    found += trace(shape, arch, topk_type="local", update="direct", normalize="after").launches
    if shape.dtype == "float32":  # under autocast
        found += trace(shape, arch, update="direct", shadow=torch.bfloat16).launches
    with as_on_gpu(arch, False, found):
        model, inputs = _model(shape, "global", None), _inputs(shape)
        first, *rest = model.streams
        with _Tracer([*model.parameters(), *model.buffers(), *inputs.values()]):
            outputs = model(inputs)
            own = outputs[f"recon_{first}"]
            if rest:
                own = own + outputs[f"cross_recon_{first}_from_{rest[0]}"]
            own.sum().backward()
            with torch.no_grad():
                values = torch.stack([outputs[f"values_{s}"] for s in model.streams])
            w_decs = [decoder.weight for decoder in model.decoders.values()]
            recons = decode(
                outputs.indices, values.requires_grad_(), w_decs, list(model.pre_biases.values()), impl="triton"
            )
            sum(r.sum() for r in recons.values()).backward()
    return list(dict.fromkeys(found))


def reference_peak_bytes(shape: Shape, *, topk_type: str = "global", auxk: bool | int = False) -> int:
    """`Trace.peak_bytes` of the same step through `reference.training_loss` and its backward.

    Only `total_loss`, which works on S * S numbers and reads some of them, is replaced by a sum.
    """
    auxk = _auxk(shape, auxk)
    model, inputs = _model(shape, topk_type, auxk), list(_inputs(shape).values())
    weights = [
        [layer.weight for layer in model.encoders.values()], [layer.weight for layer in model.decoders.values()],
        list(model.pre_biases.values()), list(model.latent_biases.values()),
    ]  # fmt: skip
    dead = [torch.empty(shape.N, dtype=torch.bool, device="meta") for _ in inputs]
    total_loss = reference.total_loss
    reference.total_loss = lambda matrix, aux, *_: matrix.sum() if aux is None else matrix.sum() + aux.sum()
    try:
        with _Tracer([*model.parameters(), *model.buffers(), *inputs, *dead]) as tracer:
            loss = reference.training_loss(
                inputs, *weights, shape.k, topk_type=topk_type, auxk_k=auxk, dead=dead if auxk else None
            )
            before_backward = len(tracer.events)
            loss.backward()
            del loss
    finally:
        reference.total_loss = total_loss
    return _summary(tracer, [], before_backward, list(model.parameters())).peak_bytes
