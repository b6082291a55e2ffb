"""Training steps replayed from a CUDA graph that is captured without being asked for.

A graph freezes what Python decided while it was captured. `StepGraph` therefore replays only where an eager step would
decide the same: it compares the settings of the step (`_kind`) and the memory that the step uses (`_Captured.valid`)
before each replay, and takes the step eagerly where they differ. The learning rate is the one number that may change
between replays; the captured step reads it from the device.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._device import DeviceContext

from ..core.numerics import allow_tf32, autocast_enabled
from ..core.registry import on_device
from ..core.validation import require
from ..ops.step_scalars import number_as_launched

if TYPE_CHECKING:
    from .module import AlignedSAE
    from .optimizer import SparcAdam

Inputs = Mapping[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]  # loss and metrics
Body = Callable[[Inputs], Result]

EAGER_FIRST = 3  # steps before a capture, which select launch settings and allocate library workspaces
MAX_EAGER_FIRST = 96  # each capture doubles what the next one takes, so that changing settings do not thrash
SWITCH = "SPARC_KERNELS_GRAPH"  # environment variable: 0 switches graphs off that were not asked for
_DEVICE = "cuda"
# attributes of an AlignedSAE that its step reads
_model_settings = operator.attrgetter(
    "training", "count_in_eval", "k", "auxk", "auxk_threshold", "dead_steps_threshold", "topk_type", "impl"
)
_model_hooks = operator.attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl"
)
_optimizer_hooks = operator.attrgetter("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_version, _grad, _requires_grad, _backward_hooks, _accumulate_hooks = map(
    operator.attrgetter, ("_version", "grad", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
)


def switched_on() -> bool:
    """Whether the environment allows graphs that were not asked for."""
    return os.environ.get(SWITCH) != "0"


class StepGraph:
    """The steps of one optimizer: the first eager, then replayed from a CUDA graph.

    After `EAGER_FIRST` steps of one kind (inputs' names, shapes, strides and dtypes; settings of step, model, optimizer
    and torch) the next is captured; a step of another kind takes one off their count. Steps of other kinds than the
    captured one are eager, and captured in its place once they outnumber it. One graph is kept, with the memory that
    one step needs and copies of its inputs.
    """

    def __init__(self) -> None:
        self.captured: _Captured | None = None
        self.failed = False
        self._kind: tuple | None = None  # of the steps that are counted, to be captured next
        self._seen, self._wanted = 0, EAGER_FIRST
        self._stream: torch.cuda.Stream | None = None
        self._static: list[Tensor] = []  # inputs of the step to capture
        self._busy = False

    def release(self) -> None:
        """Free the graph and its memory; the count of steps starts anew."""
        self.captured, self._kind, self._seen, self._static = None, None, 0, []

    def step(self, optimizer: SparcAdam, body: Body, inputs: Inputs, key: tuple, leaves_grads: bool) -> Result | None:
        """Take a step, or return None if the caller has to take it eagerly.

        Args:
            optimizer: whose step is taken; always the same.
            body: takes the step eagerly, without synchronising; begins with `zero_grad` if it `leaves_grads`.
            inputs: stream name -> [B, d_s].
            key: plain values that tell this body from others and name the numbers in it.
            leaves_grads: whether gradients are in `.grad` after the step.

        Returns:
            The loss and metrics in tensors of their own.
        """
        if self._busy or self.failed:
            return None
        kind = _kind(optimizer, inputs, key, leaves_grads, self.captured)
        if kind is None:
            return None
        with on_device(optimizer.param_groups[0]["params"][0].device):
            self._busy = True  # body may come here again
            try:
                return self._step(optimizer, body, inputs, kind, leaves_grads)
            finally:
                self._busy = False

    def _step(self, optimizer, body, inputs, kind, leaves_grads) -> Result | None:
        captured = self.captured
        if captured is not None and captured.kind == kind:
            if captured.valid(optimizer):
                self._seen = max(self._seen - 1, 0)
                return captured.replay(optimizer, inputs)
            self.release()
        if kind != self._kind:
            if self._seen:
                self._seen -= 1
                return body(inputs)
            self._kind, self._static = kind, []
        if self._seen >= self._wanted:
            return self._capture(optimizer, body, inputs, kind, leaves_grads)
        if self._seen == self._wanted - 1:
            result = self._rehearse(optimizer.model, body, inputs)
        else:
            result = body(inputs)
        self._seen += 1  # not reached if the step raises
        return result

    def _rehearse(self, model, body, inputs) -> Result:
        """Take an eager step as the capture will: on its stream, with the copies of the inputs."""
        self._static = [_like(inputs[s]) for s in model.streams]
        torch._foreach_copy_(self._static, [inputs[s] for s in model.streams])
        current = torch.cuda.current_stream()
        self._stream = self._stream or torch.cuda.Stream(self._static[0].device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                results = _Results(*body(dict(zip(model.streams, self._static, strict=True))))
        finally:
            current.wait_stream(self._stream)
        return results.fresh()

    def _capture(self, optimizer, body, inputs, kind, leaves_grads) -> Result | None:
        """Capture the step and replay it; None if that fails. Other threads may use CUDA meanwhile."""
        self.captured, model = None, optimizer.model  # before another one takes memory
        if leaves_grads:
            optimizer.zero_grad()  # as body would, but before the graph takes memory
        optimizer.refresh_shadow(seen_only=True)
        static = dict(zip(model.streams, self._static, strict=True))
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        masks, model._recent_dead = model._recent_dead, dict(model._recent_dead)
        device, lr = self._static[0].device, optimizer.param_groups[0]["lr"]
        if not _is_on(lr, device):
            lr = torch.zeros((), dtype=torch.float64, device=device)
        optimizer.captured_lr = lr
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"), _no_cache(device):
                results = _Results(*body(static))
            self.captured = _Captured(graph, kind, optimizer, self._static, results, lr, leaves_grads)
        except Exception as error:
            self.failed = True
            self.release()
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
            if leaves_grads:
                optimizer.zero_grad()  # they lie in the graph's memory
            warnings.warn(f"the step could not be captured in a CUDA graph, steps run eagerly: {error}", stacklevel=6)
            return None
        finally:
            optimizer.captured_lr, model._recent_dead = None, masks
        self._kind, self._seen, self._static = None, 0, []
        self._wanted = min(2 * self._wanted, MAX_EAGER_FIRST)
        return self.captured.replay(optimizer, inputs)


class _Captured:
    """A captured step: its graph, and everything that it holds on to."""

    def __init__(self, graph, kind, optimizer, static, results, lr, leaves_grads):
        group, model = optimizer.param_groups[0], optimizer.model
        self.graph, self.kind, self.static, self.results = graph, kind, static, results
        self.streams, self.params = list(model.streams), list(group["params"])
        self.lr, self.lr_value, self.own_lr = lr, None, lr is not group["lr"]
        self.grads = [(p, p.grad) for p in self.params] if leaves_grads else []
        # every place in which a module finds a submodule, parameter or buffer
        self.places = [
            (held, name, thing)
            for module in model.modules()
            for held in (module._modules, module._parameters, module._buffers)
            for name, thing in held.items()
        ]
        self.moved = [*self.params, *model.buffers()]
        # kept, so that no other tensor gets their addresses
        self.tensors = [*self.moved, *optimizer.tensors_of_steps(self.params)]
        self.others = [getattr(optimizer, name, None) for name in ("found_inf", "grad_scale")]
        self.memory, self.strides = _addresses(self.tensors), [*map(Tensor.stride, self.params)]
        self.versions = [*map(_version, self.params)]

    def valid(self, optimizer) -> bool:
        """Whether the model and the optimizer still have the tensors, in the memory, that the graph uses."""
        for held, name, thing in self.places:
            if held.get(name) is not thing:
                return False
        group = optimizer.param_groups[0]["params"]
        if not all(map(operator.is_, group, self.params)) or [*map(Tensor.stride, group)] != self.strides:
            return False
        return _addresses([*self.moved, *optimizer.tensors_of_steps(self.params)]) == self.memory

    def replay(self, optimizer, inputs) -> Result:
        """Take the step, with everything that an eager one does on the host."""
        torch._foreach_copy_(self.static, [inputs[s] for s in self.streams])
        if self.own_lr:
            value = float(optimizer.param_groups[0]["lr"])
            if value != self.lr_value:
                self.lr.fill_(number_as_launched(value, optimizer.impl_of(self.params)))
                self.lr_value = value
        if [*map(_version, self.params)] != self.versions:
            optimizer.refresh_shadow(seen_only=True)  # a loaded checkpoint, re-initialised latents
        self.graph.replay()
        torch.autograd.graph.increment_version(self.moved)  # later reads of outputs detect the change
        self.versions = [*map(_version, self.params)]
        for p, grad in self.grads:
            if p.grad is not grad:
                p.grad = grad
        optimizer._opt_called = True  # read by learning rate schedulers
        return self.results.fresh()


class _Results:
    """Loss and metrics, packed into one tensor for each dtype."""

    def __init__(self, loss: Tensor, metrics: dict[str, Tensor]):
        groups: dict[torch.dtype, dict[int, Tensor]] = {}
        addresses = []
        for value in (loss, *metrics.values()):
            groups.setdefault(value.dtype, {})[value.data_ptr()] = value
            addresses.append((value.dtype, value.data_ptr()))
        self.packed = [torch.stack(list(group.values())) for group in groups.values()]
        order = {(dtype, address): i for i, (dtype, address) in enumerate((d, a) for d, g in groups.items() for a in g)}
        self.loss, *places = (order[address] for address in addresses)
        self.metrics = list(zip(metrics, places, strict=True))

    def fresh(self) -> Result:
        """Return the loss and the metrics in memory of their own."""
        values = [value for packed in self.packed for value in packed.clone().unbind()]
        return values[self.loss], {name: values[i] for name, i in self.metrics}


def _kind(
    optimizer: SparcAdam, inputs: Inputs, key: tuple, leaves_grads: bool, captured: _Captured | None
) -> tuple | None:
    """Everything that Python decides in a step, other than the memory it uses; None if the step must be eager."""
    group, model = optimizer.param_groups[0], optimizer.model
    device = group["params"][0].device
    modes = _modes() if device.type == _DEVICE else None
    if modes is None or not isinstance(inputs, Mapping) or len(inputs) != len(model.streams):
        return None
    if any(isinstance(value, Tensor) for value in key):
        return None
    layout = []
    for s in model.streams:
        x = inputs.get(s)
        if type(x) is not Tensor or x.device != device or x.requires_grad or not _is_copyable(x):
            return None
        layout.append((s, x.shape, x.stride(), x.dtype))
    params = group["params"]
    if captured is None:  # later `valid` notices others
        own = {id(p) for p in model.parameters() if type(p) is nn.Parameter}
        if own != {id(p) for p in params}:  # replaced or sharded ones
            return None
    if _hooked(model, optimizer, params):
        return None
    if not leaves_grads and any(grad is not None for grad in map(_grad, params)):  # the step refuses them
        return None
    lr, numbers = group["lr"], (*group["betas"], group["eps"], group["weight_decay"], group["max_grad_norm"])
    if not all(type(value) in (float, int, type(None)) for value in numbers):
        return None
    settings = (
        id(lr) if _is_on(lr, device) else None, numbers, group["normalize"], optimizer.impl,
        id(getattr(optimizer, "found_inf", None)), id(getattr(optimizer, "grad_scale", None)),
    )  # fmt: skip
    return key, modes, layout, settings, _model_settings(model), [*map(_requires_grad, params)]


def _modes() -> tuple | None:
    """Settings of torch that a step depends on; None where it must be eager."""
    eager = (
        torch.is_anomaly_enabled()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._current_graph_task_id() != -1  # inside a backward
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch.cuda.is_current_stream_capturing()
        or (torch._C._len_torch_function_stack() and not _only_default_device())
    )
    if eager:
        return None
    return (
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(_DEVICE) if torch.is_autocast_enabled(_DEVICE) else None,
        torch.get_deterministic_debug_mode(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
        torch.get_default_dtype(),
        allow_tf32(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
    )


def _only_default_device() -> bool:
    """Whether `torch.set_default_device` accounts for all function modes: the step names its devices."""
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    return all(isinstance(mode, DeviceContext) for mode in modes)


def _hooked(model: AlignedSAE, optimizer: SparcAdam, params: list[nn.Parameter]) -> bool:
    """Whether a step may run Python that is not ours."""
    replaced = vars(model)
    if any(_model_hooks(model)) or "forward" in replaced or "compute_loss" in replaced:
        return True
    if torch_module._has_any_global_hook() or any(_optimizer_hooks(optimizer)):
        return True
    if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return True
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):  # that of a learning rate scheduler only counts
        return True
    return any(map(_backward_hooks, params)) or any(map(_accumulate_hooks, params))


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _is_on(value, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _is_copyable(x: Tensor) -> bool:
    """Whether x is a matrix whose elements have memory of their own."""
    if x.layout is not torch.strided or x.dim() != 2:
        return False
    if x.is_contiguous():
        return True
    (rows, columns), (down, across) = x.shape, x.stride()
    return down > 0 < across and (down > (columns - 1) * across or across > (rows - 1) * down)


def _like(x: Tensor) -> Tensor:
    """Memory for a copy of x with its strides, on which library products depend."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _no_cache(device: torch.device):
    """Autocast as it is, without its cache: a graph would keep the cast weights of its capture."""
    if not autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)


class GraphedStep:
    """A training step with gradients that captures itself in a CUDA graph and replays it.

    Args:
        model: an AlignedSAE.
        optimizer: SparcAdam of the model.
        auxk_coef: weight of the auxiliary loss, >= 0.
        cross_loss_coef: weight of the cross-reconstruction loss, >= 0.
        autocast: torch.bfloat16: forward and loss run under autocast in that dtype; None: as around the call.

    Raises:
        ValueError: the model is wrapped, or the optimizer is another model's.

    Equivalent to, for `loss, metrics = step(inputs)`:
        optimizer.zero_grad()
        with torch.autocast(device_type, autocast):  # if given
            loss, metrics = model.compute_loss(model(inputs), inputs, auxk_coef, cross_loss_coef)
        loss.backward()
        optimizer.step()
        loss = loss.detach()

    Three steps of one shape are eager, later ones replayed, with the same bits; when steps are eager again, and what
    memory the graph takes: docs/integration.md. The gradients stay in `.grad` until the next step, which may
    write its own into the same tensors.
    """

    def __init__(
        self,
        model: AlignedSAE,
        optimizer: SparcAdam,
        *,
        auxk_coef: float = 1 / 32,
        cross_loss_coef: float = 1.0,
        autocast: torch.dtype | None = None,
    ):
        ours = getattr(optimizer, "model", None) is model and hasattr(optimizer, "graphed")
        require(ours, "optimizer", "a SparcAdam of this model, which is not wrapped", optimizer)
        require(autocast in (None, torch.bfloat16), "autocast", "torch.bfloat16 or None", repr(autocast))
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.auxk_coef, self.cross_loss_coef = auxk_coef, cross_loss_coef

    def __call__(self, inputs: Inputs) -> Result:
        """Take one step.

        Args:
            inputs: stream name -> [B, d_s], for every stream.

        Returns:
            The detached loss, and the metrics of `compute_loss`.
        """
        key = "two calls", self.auxk_coef, self.cross_loss_coef, self.autocast
        return self.optimizer.graphed(self._eager, inputs, key, leaves_grads=True) or self._eager(inputs)

    def _eager(self, inputs):
        self.optimizer.zero_grad()
        device = self.optimizer.param_groups[0]["params"][0].device.type
        device = "cpu" if device == "meta" else device  # a traced step
        autocast = self.autocast and torch.autocast(device, self.autocast, cache_enabled=False)
        with autocast or nullcontext():
            outputs = self.model(inputs)
            loss, metrics = self.model.compute_loss(outputs, inputs, self.auxk_coef, self.cross_loss_coef)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), metrics
