"""One step of the official training loop, eager or replayed from a CUDA graph."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from ..core.registry import on_device
from ..nn.module import AlignedSAE
from ..nn.optimizer import SparcAdam

_EAGER_FIRST = 3  # steps before a capture: they choose launch settings and allocate what libraries keep


class Step:
    """zero_grad, forward, loss, backward, optimizer, and every `reinit_every` steps new rows for dead latents.

    Args:
        model: in training mode.
        optimizer: SparcAdam of the model, capturable with `graph`; or another whose step normalises the decoder and
            projects its gradient, with which every loss is read before the step.
        fresh: generator, on the model's device, of re-initialised rows.
        bf16: autocast around forward and loss.
        gradient_free: `model.training_step`, which never holds the weights' gradients; no clipping, `l0` is not known.
        graph: replay the step from a CUDA graph for batches of the shape seen first; others run eagerly. Falls back to
            eager steps, with a warning, where the capture fails.

    A batch whose loss is not finite is skipped: only the dead counters move. On the CPU the step is not counted either,
    as officially. On CUDA, where reading the loss would make the host wait, the optimizer decides on the device, and
    the step counts towards re-initialisation; `skipped` tells, when it is read, how many there were.
    """

    def __init__(
        self,
        model: AlignedSAE,
        optimizer: torch.optim.Optimizer,
        reinit_rng: torch.Generator,
        *,
        auxk_coef: float = 1 / 32,
        cross_coef: float = 1.0,
        reinit_every: int = 100,
        bf16: bool = False,
        gradient_free: bool = False,
        graph: bool = False,
    ):
        self.model, self.optimizer, self.reinit_rng = model, optimizer, reinit_rng
        self.auxk_coef, self.cross_coef, self.reinit_every, self.bf16 = auxk_coef, cross_coef, reinit_every, bf16
        self.gradient_free = gradient_free
        self.cuda = next(model.parameters()).is_cuda
        self.reads_loss = not (self.cuda and isinstance(optimizer, SparcAdam))  # the host reads every loss
        self.updates = 0  # steps taken, as the official loop counts them
        self._skipped = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        self._graph = _Graph(self) if graph and self.cuda else None

    @property
    def skipped(self) -> int:
        """Batches skipped so far; on CUDA reading it waits for the GPU."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, value: int) -> None:
        self._skipped.fill_(value)

    def __call__(self, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on a batch {s: [b, d_s]}.

        Returns: the loss, and `compute_loss`'s metrics with `l0`, the mean number of values > 0, where it is known.
        Detached; with a CUDA graph they are overwritten by the next step.
        """
        result = self._graph.step(x) if self._graph else None
        loss, metrics = result or self.eager(x)
        if self.reads_loss and not loss.isfinite():
            return loss, metrics
        if self.reinit_every and self.updates % self.reinit_every == 0:
            self.model.reinit_dead_(generator=self.reinit_rng)
        self.updates += 1
        return loss, metrics

    def eager(self, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The step without re-initialisation and counting."""
        model = self.model
        self.optimizer.zero_grad(set_to_none=True)
        # no cache: a captured cast would be of the weights at that time
        autocast = torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16, cache_enabled=False)
        with autocast if self.bf16 else nullcontext():
            if self.gradient_free:
                optimizer = cast(SparcAdam, self.optimizer)  # training_step refuses others
                loss, metrics = model.training_step(x, optimizer, self.auxk_coef, self.cross_coef)
                self._skipped += ~loss.isfinite()
                return loss, metrics
            outputs = model(x)
            loss, metrics = model.compute_loss(outputs, x, self.auxk_coef, self.cross_coef)
        metrics["l0"] = self.l0(outputs)
        finite = loss.detach().isfinite()
        self._skipped += ~finite
        if self.reads_loss and not finite:
            return loss.detach(), metrics
        loss.backward()
        if not self.reads_loss:
            cast(Any, self.optimizer).found_inf = (~finite).float()  # moves nothing where it is 1
        self.optimizer.step()
        return loss.detach(), metrics

    def l0(self, outputs) -> Tensor:
        """Mean number of values > 0 of a row, over streams."""
        values = [outputs[f"values_{s}"].detach() for s in self.model.streams]
        return torch.stack([(v > 0).sum() / v.shape[0] for v in values]).mean()


class _Graph:
    """Replays `Step.eager`, on the model's GPU. The first steps run eagerly on the capture's stream, as it wants."""

    def __init__(self, step: Step):
        self.owner, self.failed, self.seen = step, False, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.device = next(step.model.parameters()).device
        self.stream = torch.cuda.Stream(self.device)
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.x: dict[str, Tensor] = {}
        self.loss: Tensor | None = None
        self.metrics: dict[str, Tensor] = {}

    def step(self, x: dict[str, Tensor]):
        """(loss, metrics), or None where the caller has to take the step."""
        with on_device(self.device):
            return self._step(x)

    def _step(self, x):
        shapes = {s: tuple(t.shape) for s, t in x.items()}
        self.shapes = self.shapes or shapes
        if self.failed or shapes != self.shapes:
            return None
        if self.graph is None:
            if self.seen < _EAGER_FIRST:
                self.seen += 1
                return self._aside(x)
            self.graph = self._capture(x)
            if self.graph is None:
                return None
        for s, t in x.items():
            self.x[s].copy_(t)
        if isinstance(self.owner.optimizer, SparcAdam):
            self.owner.optimizer.refresh_shadow(seen_only=True)  # a checkpoint, new rows of dead latents
        self.graph.replay()
        return self.loss, self.metrics

    def _aside(self, x):
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.owner.eager(x)
        current.wait_stream(self.stream)
        return result

    def _capture(self, x) -> torch.cuda.CUDAGraph | None:
        """Record the step without taking it; None where that fails.

        Other threads may use CUDA meanwhile: the loader waits for its copies.
        """
        self.x, graph = {s: t.clone() for s, t in x.items()}, torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss, self.metrics = self.owner.eager(self.x)
        except Exception as error:
            self.failed = True
            torch.cuda.set_stream(current)  # a capture that does not end well leaves its own stream in place
            self.x, self.loss, self.metrics = {}, None, {}
            self.owner.optimizer.zero_grad(set_to_none=True)  # gradients in the graph's memory
            warnings.warn(f"the step could not be captured in a CUDA graph, steps run eagerly: {error}", stacklevel=5)
            return None
        return graph
