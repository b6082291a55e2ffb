"""SparcAdam: Adam for an AlignedSAE, fused with decoder normalisation and gradient projection."""

from __future__ import annotations

import numbers
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..core.numerics import acc_dtype
from ..core.registry import IMPLS, resolve_impl
from ..core.validation import check_bool, check_number, fail, plain, require
from ..ops.adam import DECODER, MODES, adam_hyper, rows_of
from ..ops.adam_update import adam_update_
from ..ops.step_scalars import SCALARS
from .forward import EncodeSettings
from .fused_step import FusedInputs, check, fused_step
from .graphed import Body, Inputs, Result, StepGraph, switched_on
from .half_weights import HalfWeights
from .module import AlignedSAE

MOMENTS = "exp_avg", "exp_avg_sq"


class SparcAdam(torch.optim.Optimizer):
    """Adam (AdamW with weight_decay) that also keeps decoder rows at unit norm, in one pass over each latent's rows.

    Args:
        model: an AlignedSAE, also wrapped by torch.compile or DistributedDataParallel. All its parameters are
            optimized, as one group.
        lr: a number, or a 0-d tensor on the parameters' device, which learning rate schedulers then change in place.
        betas: Adam's decay rates of the two moments.
        eps: Adam's term in the denominator.
        weight_decay: decoupled, as in torch.optim.AdamW.
        normalize: "before", the official order: divide every decoder column by (its norm + 1e-8), remove from its
            gradient the component along it, then Adam; columns are near unit norm between steps. "after": remove the
            component (of columns assumed to have unit norm), Adam, then divide. None: Adam alone.
        max_grad_norm: clip the gradients of all parameters together to this norm, computed after the projection (where
            the official loop would call clip_grad_norm_) without synchronising; `grad_norm` then holds the norm of the
            latest step.
        capturable: allow capture of the step in a CUDA graph; a number for lr becomes a tensor.
        shadow: torch.bfloat16 or torch.float16: under autocast in that dtype, `AlignedSAE.training_step` keeps a
            half-precision copy of the weight matrices, 2 bytes a parameter, and updates it in the pass that updates the
            weights, instead of casting them in every step; same bits. Call `refresh_shadow` after changes that autograd
            does not see (`p.data`), and after any change of the weights before the replay of a CUDA graph.
        graph: on CUDA, `AlignedSAE.training_step` and `GraphedStep` capture themselves in a CUDA graph after three
            steps of one kind and replay it; the same bits. None: unless the environment has `SPARC_KERNELS_GRAPH=0`. It
            may be assigned later; `release_graph` frees the graph's memory.
        impl: "auto" (Triton on CUDA tensors, torch elsewhere), "triton" or "torch".

    Moments and arithmetic are float32 (float64 for float64 parameters), also for bfloat16 and float16 parameters, whose
    moments torch.optim.Adam keeps in half precision. Such parameters are rounded after every step, which loses updates
    below half a unit in the last place (bfloat16: 1/512 of a weight); a RuntimeWarning reports it.
    Gradients are read, never changed, but with replicas (`distributed.shard_latents`): there each step sums them in
    `.grad`. A parameter without a gradient is not updated, decoders included, and its step is
    not counted. Step counts stay on the device, so the step never synchronises. The state has torch.optim.Adam's names
    and shapes, and loads both ways. `grad_scale` and `found_inf` of torch.amp.GradScaler are honoured on the device.

    Raises:
        ValueError: bad arguments, more parameter groups, a state of another shape or of an Adam with unsupported
            options; also in steps if two streams share an nn.Parameter.

    Equivalent to (normalize="before"):
        model.unit_norm_decoder_().project_decoder_grad_()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)  # if given
        torch.optim.AdamW(model.parameters(), lr, betas, eps, weight_decay).step()
    """

    graph = True
    captured_lr: torch.Tensor | None = None  # while `StepGraph` captures: the learning rate that the graph reads
    _step_graph: StepGraph | None = None

    def __init__(
        self,
        model: AlignedSAE,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        normalize: str | None = "before",
        max_grad_norm: float | None = None,
        capturable: bool = False,
        shadow: torch.dtype | None = None,
        graph: bool | None = None,
        impl: str = "auto",
    ):
        self.model = _unwrapped(model)
        if not isinstance(lr, torch.Tensor):
            lr = float(check_number("lr", lr))
        elif lr.dim() != 0 or not lr.is_floating_point():
            fail("lr", "a number or a floating tensor of shape []", lr)
        ok = isinstance(betas, (tuple, list)) and len(betas) == 2
        ok = ok and all(isinstance(b, numbers.Real) and 0 <= b < 1 for b in betas)
        require(ok, "betas", "two numbers in [0, 1)", repr(betas))
        eps, weight_decay = float(check_number("eps", eps)), float(check_number("weight_decay", weight_decay))
        require(normalize in MODES, "normalize", "'before', 'after' or None", repr(normalize))
        if max_grad_norm is not None:
            max_grad_norm = float(check_number("max_grad_norm", max_grad_norm))
            require(max_grad_norm > 0, "max_grad_norm", "a number > 0 or None", repr(max_grad_norm))
        capturable = check_bool("capturable", capturable)
        self.graph = switched_on() if graph is None else check_bool("graph", graph)
        require(impl in IMPLS, "impl", f"one of {', '.join(map(repr, IMPLS))}", repr(impl))
        halves = (None, torch.bfloat16, torch.float16)
        require(shadow in halves, "shadow", "torch.bfloat16, torch.float16 or None", repr(shadow))
        self.impl = impl
        self._shadow = None if shadow is None else HalfWeights(shadow)
        self.streams()
        if isinstance(lr, torch.Tensor) or lr > 0:
            _warn_of_half(self.model)
        params = list(self.model.parameters())
        if capturable and not isinstance(lr, torch.Tensor):
            # float64: as exact as the Python number in an uncaptured step
            lr = torch.full((), lr, device=params[0].device, dtype=torch.float64)
        self.grad_norm: torch.Tensor | None = None  # 0-d, of the latest step, with max_grad_norm
        self._step_supports_amp_scaling = True
        self.counts: torch.Tensor | None = None  # step counts [P], stream by stream
        self._scalars: torch.Tensor | None = None  # step scalars [P, 5]
        super().__init__(
            params,
            dict(
                lr=lr, betas=tuple(map(float, betas)), eps=eps, weight_decay=weight_decay, normalize=plain(normalize),
                max_grad_norm=max_grad_norm, capturable=capturable, decoupled_weight_decay=True,
            ),
        )  # fmt: skip

    def add_param_group(self, param_group: dict) -> None:
        """Raise ValueError after construction: the one group holds all of the model's parameters."""
        require(not self.param_groups, "param_group", "none (SparcAdam has one group, its model's parameters)", "one")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's closure returns a float
        self, closure: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Update the parameters from their gradients.

        Args:
            closure: recomputes the loss with gradients before the step.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        streams = self.streams()
        params = [p for stream in streams for p in stream]
        grads = [p.grad for p in params]
        if any(g is not None for g in grads):
            self._update(streams, params, grads)
        return loss

    def _update(self, streams, params, grads):
        group = self.param_groups[0]
        moving = [g is not None for g in grads]
        exp_avgs, exp_avg_sqs = self.prepare(params, moving)
        active = sum(moves << i for i, moves in enumerate(moving))
        lr, number = self.read_lr()
        if group["max_grad_norm"] is not None and self.grad_norm is None:
            self.grad_norm = torch.zeros_like(self.scalars()[0, 0])
        norm = None if group["max_grad_norm"] is None else self.grad_norm
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        impl, square, hyper = self.impl_of(streams), None, adam_hyper(group)
        model: Any = self.model
        if model.ranks is not None:  # a ShardedSAE
            model.sum_gradients_(grads)
            if norm is not None:
                square = model.total_square(rows_of(params)[DECODER::4], rows_of(grads), hyper.normalize, impl)
                square = square.to(self.scalars())
            found_inf = None if found_inf is None else model.any_inf(found_inf)
        own = self.counts, self._scalars, lr, found_inf, grad_scale, norm, square
        adam_update_(
            [*params, *grads, *exp_avgs, *exp_avg_sqs, *own], (hyper, active, group["max_grad_norm"], impl),
            (number, group["weight_decay"]), impl=impl,
        )  # fmt: skip
        moved = [p for p, moves in zip(params, moving, strict=True) if moves]
        torch.autograd.graph.increment_version(moved)  # later reads of outputs detect the change

    # ------------------------------------------------------------------------------------------- steps in a CUDA graph

    def graphed(self, body: Body, inputs: Inputs, key: tuple, leaves_grads: bool = False) -> Result | None:
        """Take a step by way of a CUDA graph, see `StepGraph.step`.

        Args:
            body: takes the step eagerly.
            inputs: stream name -> [B, d_s].
            key: plain values that tell this body from others.
            leaves_grads: whether gradients are in `.grad` after the step.

        Returns:
            The loss and metrics, or None if the caller has to take the step eagerly.
        """
        if not self.graph or torch.compiler.is_compiling() or self.model.ranks is not None:
            return None
        if self._step_graph is None:
            self._step_graph = StepGraph()
        return self._step_graph.step(self, body, inputs, key, leaves_grads)

    @property
    def captured(self) -> bool:
        """Whether there is a CUDA graph from which steps are replayed."""
        return self._step_graph is not None and self._step_graph.captured is not None

    def release_graph(self) -> None:
        """Free the CUDA graph of steps, its memory included; later steps capture one again."""
        self._step_graph = None

    def tensors_of_steps(self, params: list[torch.nn.Parameter]) -> list[torch.Tensor | None]:
        """Return what a step reads and writes besides parameters and buffers, always in one order.

        Args:
            params: of the model.
        """
        shadow = () if self._shadow is None else self._shadow.copies()
        tensors = [self.counts, self._scalars, self.grad_norm, *shadow]
        for state in map(self.state.get, params):
            if state:
                tensors += state["exp_avg"], state["exp_avg_sq"]
        return tensors

    # --------------------------------------------------------------------------------------- shared with the fused step

    def streams(self) -> list[list[torch.nn.Parameter]]:
        """Return w_enc [N, d], w_dec [d, N], pre_bias and latent_bias of every stream.

        Raises:
            ValueError: two of them are one parameter.
        """
        m = self.model
        params = [[*four] for four in m.parameters_by_stream().values()]
        if len({id(p) for stream in params for p in stream}) < 4 * len(params):
            _refuse_shared(m, params)
        return params

    def check_fused_step(self, model: AlignedSAE) -> None:
        """Check that `model.training_step` can use this optimizer.

        Args:
            model: the model to train.

        Raises:
            ValueError: the optimizer is another model's or clips by norm, a parameter is frozen or has a `.grad`.
        """
        check(self, model)

    def fused_step(
        self, inputs: FusedInputs, settings: EncodeSettings, auxk_coef: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run a forward, compute its loss and update every parameter, see `AlignedSAE.training_step`.

        Args:
            inputs: of all streams.
            settings: of the forward.
            auxk_coef: weight of AuxK, >= 0.
        """
        return fused_step(self, inputs, settings, auxk_coef)

    def refresh_shadow(self, seen_only: bool = False) -> None:
        """Cast the weights to half precision again.

        Args:
            seen_only: only matrices whose version counter shows a change other than by `training_step`.
        """
        if self._shadow:
            self._shadow.refresh(self._matrices(), not seen_only)

    def half_weights(self) -> list[list[torch.Tensor]] | None:
        """Return the half-precision [W_enc, W_dec as rows] of every stream; None if autocast would not use them."""
        weights = self._matrices()
        if self._shadow is None or not all(self._shadow.serves(w) for pair in weights for w in pair):
            return None
        return self._shadow.of(weights)

    def stepped(self, params: list[torch.nn.Parameter], half: bool) -> None:
        """Note that a fused step has changed the parameters.

        Args:
            params: of all streams.
            half: whether it wrote the half-precision copies too.
        """
        torch.autograd.graph.increment_version(params)
        if half and self._shadow is not None:
            self._shadow.written(self._matrices())
        self._opt_called = True  # read by learning rate schedulers

    def _matrices(self):
        return [[w_enc, w_dec.t()] for w_enc, w_dec, *_ in self.streams()]

    def impl_of(self, streams: list[list[torch.nn.Parameter]]) -> str:
        """Return "triton" or "torch" for the parameters of all streams; "torch" unless every stream can take Triton."""
        impls = {resolve_impl(self.impl, stream[0]) for stream in streams}
        return "triton" if impls == {"triton"} else "torch"

    def scalars(self, s: int | None = None) -> torch.Tensor:
        """Return the step scalars that the latest step read.

        Args:
            s: number of a stream; None: all streams.

        Returns:
            [4, 5] of the stream's four parameters, or [P, 5].
        """
        assert self._scalars is not None, "prepare makes them"
        return self._scalars if s is None else self._scalars[4 * s : 4 * s + 4]

    def prepare(
        self, params: list[torch.nn.Parameter], moving: list[bool]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Allocate missing state and return the moments.

        Args:
            params: of all streams, in the order of `streams()`.
            moving: whether each of them is updated.

        Returns:
            First and second moments, with the strides of the parameters; empty for those that were never updated.
        """
        device = params[0].device
        states: list[Any] = [self.state.get(p) for p in params]
        if self.counts is not None and self.counts.device == device and all(states):
            first, second = ([state.get(name) for state in states] for name in MOMENTS)
            if _are_like(params, first, second):
                return first, second
        for p in params:
            require(p.device == device, "model", f"parameters on one device, {device}", p)
        if self.counts is None or self.counts.device != device:
            group = self.param_groups[0]
            if group["capturable"]:  # the captured step reads it on the parameters' device
                group["lr"] = torch.as_tensor(group["lr"], device=device)
            zero = torch.zeros((), device=device)
            counts = [self.state[p]["step"].to(zero) if self.state.get(p) else zero for p in params]
            self.counts = torch.stack(counts)
            for p, count in zip(params, self.counts, strict=True):
                if self.state.get(p):
                    self.state[p]["step"] = count
            wide = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
            self._scalars = torch.zeros(len(params), SCALARS, device=device, dtype=wide)
        states = [self._state(p, i, moves) for i, (p, moves) in enumerate(zip(params, moving, strict=True))]
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in MOMENTS)
        return exp_avgs, exp_avg_sqs

    def _state(self, p, index, moves):
        if not moves and not self.state.get(p):
            return dict.fromkeys(MOMENTS, p.new_empty(0, 0))
        state = self.state[p]
        if not state:
            assert self.counts is not None, "prepare makes them"
            state["step"] = self.counts[index]
        for name in MOMENTS:
            state[name] = _like(p, state.get(name))
        return state

    def read_lr(self) -> tuple[torch.Tensor | None, float]:
        """Return the learning rate as a tensor on the parameters' device, or None and a number.

        Raises:
            RuntimeError: a CUDA graph of the caller's captures the step, and it is not capturable or lr is no tensor
                on the device.
        """
        assert self.counts is not None, "prepare makes them"
        group = self.param_groups[0]
        lr = group["lr"] if self.captured_lr is None else self.captured_lr
        if self.captured_lr is None and self.counts.is_cuda and torch.cuda.is_current_stream_capturing():
            if not group["capturable"]:
                raise RuntimeError("capturable: expected True for a step that a CUDA graph captures, got False")
            if not isinstance(lr, torch.Tensor) or lr.device != self.counts.device:
                got = lr.device if isinstance(lr, torch.Tensor) else "a number"
                raise RuntimeError(f"lr: expected a tensor on {self.counts.device} in a captured step, got {got}")
        if not isinstance(lr, torch.Tensor) or lr.device != self.counts.device:
            return None, float(lr)
        return lr, 0.0

    # ------------------------------------------------------------------------------------------------------ state dicts

    def state_dict(self) -> dict:
        """Return the state as torch.optim.Adam does, with NumPy numbers converted to Python's."""
        state = super().state_dict()
        return {**state, "param_groups": plain(state["param_groups"])}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of a SparcAdam, torch.optim.Adam or AdamW of the same model.

        Existing tensors are overwritten in place, so a captured CUDA graph stays valid.

        Args:
            state_dict: result of `state_dict`.

        Raises:
            ValueError: another shape, several groups, or options that SparcAdam does not support.
        """
        saved = _check_saved(state_dict)
        ids = dict(zip(self.param_groups[0]["params"], saved["params"], strict=False))
        lr, capturable, before = self.param_groups[0]["lr"], self.param_groups[0]["capturable"], dict(self.state)
        for p, i in ids.items():
            for name in MOMENTS:
                moment = state_dict["state"].get(i, {}).get(name)
                if moment is not None and moment.shape != p.shape:
                    fail(f"state_dict: {name} of parameter {i}", f"shape {tuple(p.shape)}", moment)
        super().load_state_dict(state_dict)
        group = self.param_groups[0]
        for name in _TORCHS:
            group.pop(name, None)
        for name in ("normalize", "max_grad_norm"):
            group.setdefault(name, self.defaults[name])
        group.update(capturable=capturable, betas=tuple(map(float, group["betas"])), decoupled_weight_decay=True)
        if isinstance(lr, torch.Tensor):
            group["lr"] = lr.fill_(float(group["lr"]))
        for p, i in ids.items():
            state, previous = self.state.get(p), before.get(p, {})
            if not state:
                continue
            for name in MOMENTS:  # torch casts loaded moments to the parameter's dtype
                moment = state_dict["state"][i][name] if p.dtype != acc_dtype(p.dtype) else state[name]
                state[name] = _like(p, previous.get(name)).copy_(moment)
        counts, self.counts = self.counts, None
        if counts is not None:
            for index, p in enumerate(p for stream in self.streams() for p in stream):
                if self.state.get(p):  # its own state_dict holds views of these counts
                    self.state[p]["step"] = counts[index].copy_(self.state[p]["step"])
                else:
                    counts[index].zero_()
            self.counts = counts

    def __getstate__(self):
        return {
            **super().__getstate__(), "model": self.model, "impl": self.impl, "grad_norm": None, "counts": None,
            "_scalars": None, "_step_supports_amp_scaling": True,
            "_shadow": self._shadow and HalfWeights(self._shadow.dtype), "graph": self.graph,
        }  # fmt: skip


_TORCHS = ("amsgrad", "maximize", "foreach", "fused", "differentiable")  # options of torch.optim.Adam alone


def _check_saved(state_dict):
    """Check a state to load; return its one parameter group."""
    ok = isinstance(state_dict, dict) and {"state", "param_groups"} <= set(state_dict)
    require(ok, "state_dict", "what an optimizer's state_dict() gave", state_dict)
    groups = state_dict["param_groups"]
    require(len(groups) == 1, "state_dict", "one parameter group", f"{len(groups)}")
    for name in ("amsgrad", "maximize"):
        require(not groups[0].get(name), "state_dict", f"{name}=False", repr(groups[0].get(name)))
    coupled = groups[0].get("weight_decay", 0) != 0 and not groups[0].get("decoupled_weight_decay", True)
    require(not coupled, "state_dict", "decoupled weight decay (AdamW) or none", "Adam's, which goes into the gradient")
    return groups[0]


def _warn_of_half(model) -> None:
    for name, p in model.named_parameters():
        if p.dtype in (torch.bfloat16, torch.float16) and not p.is_meta:  # a traced step trains nothing
            dtype = str(p.dtype).removeprefix("torch.")
            text = f"{name}: {dtype} parameters lose updates below half a unit of their last place, and training stalls"
            how = f"keep float32 parameters and use torch.autocast in {dtype} (docs/integration.md)"
            warnings.warn(f"{text}; {how}", RuntimeWarning, stacklevel=3)
            return


def _refuse_shared(model, streams) -> None:
    seen: dict[int, str] = {}
    for s, params in zip(model.streams, streams, strict=True):
        names = f"encoders.{s}.weight", f"decoders.{s}.weight", f"pre_biases.{s}", f"latent_biases.{s}"
        for name, p in zip(names, params, strict=True):
            own = "a parameter of its own (torch.optim.Adam steps shared ones; with compute_loss and backward)"
            require(id(p) not in seen, name, own, f"that of {seen.get(id(p))}")
            seen[id(p)] = name


def _like(p, tensor):
    """A moment with p's layout and device in the accumulator dtype; zeros if `tensor` is None."""
    dtype = acc_dtype(p.dtype)
    if tensor is None:
        return torch.zeros_like(p, dtype=dtype)
    if (tensor.dtype, tensor.device, tensor.stride()) == (dtype, p.device, p.stride()):
        return tensor
    return torch.zeros_like(p, dtype=dtype).copy_(tensor)


def _are_like(params, first, second) -> bool:
    """Whether all moments have the layout and device of their parameters and the accumulator dtype."""
    strides = [*map(torch.Tensor.stride, params)]
    try:
        if strides != [*map(torch.Tensor.stride, first)] or strides != [*map(torch.Tensor.stride, second)]:
            return False
    except TypeError:  # one is missing
        return False
    wanted = [(p.device, acc_dtype(p.dtype)) for p in params]
    return wanted == [*map(_PLACE, first)] == [*map(_PLACE, second)]


_PLACE = operator.attrgetter("device", "dtype")


def _unwrapped(model) -> AlignedSAE:
    inner = model
    while isinstance(inner, torch.nn.Module) and not isinstance(inner, AlignedSAE):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    require(isinstance(inner, AlignedSAE), "model", "an AlignedSAE", model)
    return inner
