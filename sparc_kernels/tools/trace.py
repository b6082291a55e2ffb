"""Trace a training step on meta tensors: its launches, its memory, and the absence of host synchronisation.

The real module runs forward, loss and backward at the real shape on torch's meta device. Operators run their Triton
launchers and recorders replace kernels, so the trace has what a GPU would launch and allocate; new operators need no
entry here. Reading a value back (`.item()`, `nonzero`, a copy to the host) raises on meta tensors; copies from the
host, which synchronise too, raise here.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import reference
from ..core._triton import HAS_TRITON
from ..core.plan import without_plans
from ..core.registry import operator_of
from ..core.target import Target, as_target
from ..launch.budgets import MAX_K
from ..launch.device import AMD
from .replaced import replaced
from .shape import Shape

FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: everything that the compiler sees."""

    kernel: str  # module:function
    signature: tuple
    constexprs: tuple
    divisible: tuple
    num_warps: int
    num_stages: int
    options: tuple = ()  # further compiler options by name
    small: tuple = ()  # pointers to less than 2 GiB, which AMD's backend addresses differently


@dataclass(frozen=True)
class Allocation:
    """One storage allocated during a trace."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operator: str  # that allocated it
    place: str  # innermost file:line of the package on the stack

    def __str__(self):
        return f"{self.bytes / 2**20:.1f} MiB {self.dtype}{list(self.shape)} by {self.operator} at {self.place}"


@dataclass(frozen=True)
class Trace:
    """Launches and memory of one traced step.

    Bytes are of storages, each counted once however many views it has, without the allocator's rounding and without
    workspaces of library calls (sort, GEMM).
    """

    launches: tuple[Launch, ...]  # in order, repetitions included
    peak_bytes: int  # largest sum of live storages that are not parameters, buffers, inputs or their gradients
    kept_bytes: int  # the same sum between the loss and its backward
    live_bytes_at_end: int  # the same sum after the step's outputs and loss are deleted: leaks
    gradient_bytes: int  # storages behind the .grad of parameters and inputs, counted in none of the above
    largest: tuple[Allocation, ...]  # up to 10 that are live at the peak, largest first


# -------------------------------------------------------------------------------------------------- memory and copies


class InsideOperators(TorchDispatchMode):
    """A dispatch mode that stays active inside the package's operators, where torch disables it."""

    impl: str | None = None  # the implementation that runs; None: the one named in the call
    composite: frozenset[str] = frozenset()  # torch's operators that are decomposed before `dispatch`

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
        """Called before one of the package's operators runs; does nothing here.

        Args:
            name: of the operator.
        """

    def dispatch(self, func, args: tuple, kwargs: dict):
        """Run one of torch's own operators.

        Args:
            func: the operator.
            args: of the call.
            kwargs: of the call.
        """
        return func(*args, **kwargs)


class Tracer(InsideOperators):
    """Run the package's operators by their launchers and record when storages are allocated and freed."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live = {}  # storage's address -> (weak reference, number of its Allocation)
        self.events = []  # number: allocated; -number - 1: freed
        self.made = []  # Allocations by number

    def dispatch(self, func, args, kwargs):
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.is_meta for t in (*results, *operands)):
            # meta tensors that no traced operator returned come from host data: torch.tensor(...), x[[0, 2]]
            if any(t.dim() > 0 if not t.is_meta else not self.knows(t) for t in operands):
                raise RuntimeError(f"{func} at {_place()}: a copy between host and device, which waits for it")
            for t in results:
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
        """Numbers of the Allocations behind the tensors."""
        entries = (self.live.get(t.untyped_storage()._cdata) for t in tensors)
        return {entry[1] for entry in entries if entry}

    def replay(self, without: set[int], until: int | None = None) -> tuple[int, set[int], int]:
        """Largest sum of bytes, numbers of the Allocations live then, and the sum at the end.

        Args:
            without: numbers of Allocations left out.
            until: count of events to replay; None: all.
        """
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
    """The innermost file:line on the stack that is in the package but not in tools."""
    package, tools = f"{FOLDER}{os.sep}", f"{FOLDER / 'tools'}{os.sep}"
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(package) and not path.startswith(tools):
            return f"{path.removeprefix(package)}:{frame.f_lineno}"
        frame = frame.f_back
    return "-"


# ------------------------------------------------------------------------------------------------------------ launches


class Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, name, kernel, small, recorded):
        self.name, self.kernel, self.small, self.recorded = name, kernel, small, recorded
        self.params = list(inspect.signature(kernel.fn).parameters.values())
        plain = getattr(kernel, "do_not_specialize", None)
        if plain is None:  # an interpreted kernel keeps the decorator's arguments
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
                continue  # left at its default
            value = values[param.name]
            if "constexpr" in str(param.annotation):
                signature[param.name] = "constexpr"
                constants[(i,)] = value
            elif param.name in self.plain:
                signature[param.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            else:
                signature[param.name] = _specialise(value, (i,), constants, divisible, small)
        parts = tuple(signature.items()), tuple(constants.items()), tuple(divisible), num_warps, num_stages
        options = tuple(sorted(options.items()))
        self.recorded.append(Launch(self.name, *parts, options, tuple(small) if self.small else ()))


def _specialise(arg, path, constants, divisible, small):
    """The Triton type of an argument; adds its path to `constants`, `divisible` (by 16) and `small` as the JIT does."""
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
def as_on_gpu(arch: int, tf32: bool, recorded: list[Launch] | None = None, gpu_name: str | None = None):
    """Run launchers as for a GPU of an architecture.

    Args:
        arch: as `launch.device.capability` gives it.
        tf32: whether torch's float32 matmul precision allows tf32.
        recorded: list that launches are appended to instead of being launched; None: they are launched.
        gpu_name: GPU whose recorded settings are used; None: the defaults.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed here: its launchers cannot be traced")
    from triton.runtime.jit import KernelInterface

    recorders: dict = {}

    def recorder(kernel, grid):
        if kernel not in recorders:
            name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
            recorders[kernel] = Recorder(name, kernel, arch >= AMD, recorded)
        return recorders[kernel][grid]

    recording = nullcontext() if recorded is None else replaced(KernelInterface, __getitem__=recorder)
    with as_target(Target(arch, tf32, gpu_name=gpu_name)), without_plans(), recording:
        yield


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Context in which the package's code on meta tensors, for which torch has no autocast, follows the CPU's."""
    from ..core import registry
    from ..nn import half_weights, module

    get = torch.get_autocast_dtype

    def enabled(device):
        return torch.is_autocast_enabled("cpu")

    def off(device):
        return torch.autocast("cpu", enabled=False) if enabled(device) else nullcontext()

    with (
        replaced(module, autocast_enabled=enabled),
        replaced(half_weights, autocast_enabled=enabled),
        replaced(registry, no_autocast=off),
        replaced(torch, get_autocast_dtype=lambda kind: get("cpu" if kind == "meta" else kind)),
    ):
        yield


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Context that counts the launches of each kernel, "module:function"; they go on as before."""
    from triton.runtime.jit import KernelInterface

    look_up, counts = KernelInterface.__getitem__, Counter[str]()

    def count(kernel, grid):
        counts[f"{kernel.fn.__module__}:{kernel.fn.__name__}"] += 1
        return look_up(kernel, grid)

    with without_plans(), replaced(KernelInterface, __getitem__=count):
        yield counts


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


def _summary(tracer, recorded, before_backward, leaves) -> Trace:
    gradients = tracer.numbers([p.grad for p in leaves if p.grad is not None])
    peak, at_peak, at_end = tracer.replay(gradients)
    largest = sorted((tracer.made[n] for n in at_peak), key=lambda a: -a.bytes)
    kept = tracer.replay(gradients, before_backward)[2]
    gradient_bytes = sum(tracer.made[n].bytes for n in gradients)
    return Trace(tuple(recorded), peak, kept, at_end, gradient_bytes, tuple(largest[:10]))


def trace(
    shape: Shape, arch: int = 90, *, topk_type: str = "global", auxk: bool | int = False, tf32: bool = False,
    input_grads: bool = False, update: str | None = None, **optimizer,
) -> Trace:  # fmt: skip
    """Trace one training step (forward, compute_loss, backward) of an AlignedSAE with impl="triton".

    A step that returns a Trace never synchronises with the device, except by torch.cuda.synchronize, which is not seen.

    Args:
        shape: sizes; B rows of each of the S streams.
        arch: as `launch.device.capability` gives it.
        topk_type: as in AlignedSAE.
        auxk: dead latents a row; True: min(k, N, 512); False: no AuxK.
        tf32: whether torch's float32 matmul precision allows tf32.
        input_grads: whether the inputs require gradients too.
        update: "dense": a step of SparcAdam follows; "direct": `training_step` replaces all of it; None: no update.
            The optimizer's moments exist before.
        optimizer: further arguments of SparcAdam.

    Returns:
        A Trace. Its `peak_bytes` counts every live storage that is not a parameter, a buffer, an input or the gradient
        of one (a gradient's storage is left out from its allocation on). The outputs object is kept until after the
        backward, as in a training loop.

    Raises:
        RuntimeError: a copy between host and device, or Triton is not installed.
        Exception: whatever torch raises where a value is read back from a meta tensor.
    """
    from ..nn.optimizer import SparcAdam

    recorded: list[Launch] = []
    with as_on_gpu(arch, tf32, recorded):
        model, inputs = _model(shape, topk_type, _auxk(shape, auxk)), _inputs(shape, input_grads)
        leaves, known = [*model.parameters(), *inputs.values()], []
        if update:
            adam = SparcAdam(model, **optimizer)
            params = [p for stream in adam.streams() for p in stream]
            known = [t for moments in adam.prepare(params, [True] * len(params)) for t in moments]
            known += [adam.counts, adam.scalars()]
            known += [w for pair in adam.half_weights() or () for w in pair]
        with Tracer([*leaves, *model.buffers(), *known]) as tracer:
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
        return _summary(tracer, recorded, before_backward, leaves)


def call_shard_operators(shape: Shape) -> None:
    """Call on meta tensors what only a shard of the latents calls: keys, candidates of shards, partial sums.

    Args:
        shape: of the shard.
    """
    from ..ops.adam import PLAIN, adam_stream_
    from ..ops.gather import gather_sum
    from ..ops.latent_adam import latent_adam_
    from ..ops.selection import keys_dtype, select_each_keys, select_keys, topk_positions

    (B, N, k), widths, S = (shape.B, shape.N, shape.k), shape.d_streams, len(shape.d_streams)
    dtype, acc = getattr(torch, shape.dtype), torch.float32

    def empty(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    xs, w_encs, latent_biases = [empty(B, d) for d in widths], [empty(N, d) for d in widths], [empty(N)] * S
    keys = empty(S, B, k, dtype=keys_dtype(dtype, "triton"))
    select_keys(xs, w_encs, latent_biases, k, None, None, keys[0], "triton")
    dead = empty(S, N, dtype=torch.int32), empty(S, 4, dtype=torch.int32)[:, 0]
    for listed in ((None, None), dead):
        select_each_keys(xs, w_encs, latent_biases, k, *listed, keys, "triton")
    for shards in (2, 8, 64):
        topk_positions(empty(B, shards * k, dtype=keys.dtype), k, "triton")
    gather_sum(empty(B, k, dtype=torch.int64), empty(S, B, k, dtype=acc), w_encs[0], None, True, "triton")
    params = [t for w, d in zip(w_encs, widths, strict=True) for t in (w, w, empty(d), empty(N))]
    moments, scalars = [empty(*p.shape, dtype=acc) for p in params], empty(len(params), 5, dtype=acc)
    sums = [empty(d, dtype=acc) for d in widths]
    inverse = [empty(n, dtype=torch.int32) for n in (B * k, N + 1, B * k)]
    lists = [t for x in xs for t in (*inverse, empty(1, B, k, dtype=acc), None, None, x[None])]
    adam = PLAIN, 0.9, 0.999, 1e-8, "triton"
    latent_adam_(params, moments, moments, [], scalars, sums, sums, lists, lists, k, [], [], 0, *adam)
    grads = [sums[i // 4] if i % 4 == 2 else None for i in range(len(params))]
    adam_stream_(params, grads, moments, moments, scalars, *adam)


def launches(shape: Shape, arch: int) -> list[Launch]:
    """Return the distinct kernel launches at one shape on one architecture.

    Covers training steps with and without AuxK, global and local, both tf32 settings, with and without gradients of the
    inputs; the optimizer's step from gradients, with and without clipping, and without gradients; reconstructions read
    from the outputs; the public decode and its gradients; what shards of the latents need.

    Args:
        shape: of the step.
        arch: as `launch.device.capability` gives it.
    """
    from ..ops.decode import decode

    recorded: list[Launch] = []
    for tf32 in (False, True) if shape.dtype == "float32" else (False,):
        recorded += trace(shape, arch, auxk=True, tf32=tf32, input_grads=True).launches
        recorded += trace(shape, arch, tf32=tf32).launches
        recorded += trace(shape, arch, topk_type="local", tf32=tf32).launches
    recorded += trace(shape, arch, update="dense", max_grad_norm=1.0).launches
    recorded += trace(shape, arch, auxk=True, update="dense", normalize="after").launches
    recorded += trace(shape, arch, auxk=True, topk_type="local").launches
    recorded += trace(shape, arch, update="direct").launches
    recorded += trace(shape, arch, auxk=True, update="direct").launches
    recorded += trace(shape, arch, topk_type="local", update="direct", normalize="after").launches
    if shape.dtype == "float32":  # under autocast
        recorded += trace(shape, arch, update="direct", shadow=torch.bfloat16).launches
    with as_on_gpu(arch, False, recorded):
        model, inputs = _model(shape, "global", None), _inputs(shape)
        first, *rest = model.streams
        with Tracer([*model.parameters(), *model.buffers(), *inputs.values()]):
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
        with InsideOperators():
            call_shard_operators(shape)
    return list(dict.fromkeys(recorded))


def reference_peak_bytes(shape: Shape, *, topk_type: str = "global", auxk: bool | int = False) -> int:
    """Return `Trace.peak_bytes` of the same step through `reference.training_loss` and its backward.

    Only `total_loss`, which reads some of its S * S numbers, is replaced by a sum.

    Args:
        shape: of the step.
        topk_type: as in AlignedSAE.
        auxk: as in `trace`.
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
        with Tracer([*model.parameters(), *model.buffers(), *inputs, *dead]) as tracer:
            loss = reference.training_loss(
                inputs, *weights, shape.k, topk_type=topk_type, auxk_k=auxk, dead=dead if auxk else None
            )
            before_backward = len(tracer.events)
            loss.backward()
            del loss
    finally:
        reference.total_loss = total_loss
    return _summary(tracer, [], before_backward, list(model.parameters())).peak_bytes
