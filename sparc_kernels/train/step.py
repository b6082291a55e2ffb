"""One step of the official training loop, eager or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from ..distributed import ShardedSAE
from ..nn.module import AlignedSAE
from ..nn.optimizer import SparcAdam


class Step:
    """Forward, loss, backward and optimizer step, with re-initialisation of dead latents every `reinit_every` steps.

    Args:
        model: in training mode; a ShardedSAE takes its part of the step of all ranks.
        optimizer: SparcAdam of the model; or another optimizer whose step normalises the decoder and projects its
            gradient, for which the host reads every loss before the step.
        reinit_rng: generator of re-initialised rows, on the model's device.
        auxk_coef: weight of the auxiliary loss.
        cross_coef: weight of the cross-reconstruction loss.
        reinit_every: steps between re-initialisations; 0: never.
        bf16: autocast to bfloat16 around forward and loss.
        gradient_free: use `AlignedSAE.training_step`, without weight gradients; no clipping and no `l0` metric.
        graph: replay steps of a SparcAdam from a CUDA graph, see `StepGraph`; off too with `SparcAdam(graph=False)`.
            Falls back to eager steps, with a warning, if the capture fails.

    Attributes:
        updates: steps taken, as the official loop counts them.
        reads_loss: whether the host reads every loss.

    A batch whose loss is not finite is skipped: it updates the dead counters only. If the host reads the loss, the step
    is not counted, as officially. SparcAdam on CUDA decides on the device instead, without synchronising, and the step
    counts towards re-initialisation.
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
        self.reads_loss = not (self.cuda and isinstance(optimizer, SparcAdam))
        self.updates = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        self.graph = graph and isinstance(optimizer, SparcAdam)
        self._name = object()  # tells this step from others of the same optimizer

    @property
    def skipped(self) -> int:
        """Number of batches skipped so far; on CUDA reading it synchronises."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, value: int) -> None:
        self._skipped.fill_(value)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self.graph and cast(SparcAdam, self.optimizer).captured

    def __call__(self, x: dict[str, Tensor], rows: Sequence[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step.

        Args:
            x: batch {s: [b, d_s]}.
            rows: valid rows of every replica, for a ShardedSAE.

        Returns:
            The detached loss and the metrics of `compute_loss`, with `l0`, the mean number of values > 0, unless
            `gradient_free`.
        """
        result = None
        if self.graph and not self.reads_loss:
            key = self._name, self.auxk_coef, self.cross_coef, self.bf16, self.gradient_free
            optimizer = cast(SparcAdam, self.optimizer)
            result = optimizer.graphed(cast(Any, self.eager), x, key, leaves_grads=not self.gradient_free)
        loss, metrics = result or self.eager(x, rows)
        if self.reads_loss and not loss.isfinite():
            return loss, metrics
        if self.reinit_every and self.updates % self.reinit_every == 0:
            self.model.reinit_dead_(generator=self.reinit_rng)
        self.updates += 1
        return loss, metrics

    def eager(self, x: dict[str, Tensor], rows: Sequence[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step eagerly, without re-initialisation and counting; same results as a call.

        Args:
            x: batch {s: [b, d_s]}.
            rows: valid rows of every replica, for a ShardedSAE.
        """
        model, more = self.model, rows_of(self.model, rows)
        self.optimizer.zero_grad(set_to_none=True)
        # no cache: a graph would keep the cast weights of the capture
        autocast = torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16, cache_enabled=False)
        with autocast if self.bf16 else nullcontext():
            if self.gradient_free:
                optimizer = cast(SparcAdam, self.optimizer)  # training_step rejects others
                loss, metrics = model.training_step(x, optimizer, self.auxk_coef, self.cross_coef, **more)
                self._skipped += ~loss.isfinite()
                return loss, metrics
            outputs = model(x, **more)
            loss, metrics = model.compute_loss(outputs, x, self.auxk_coef, self.cross_coef)
        metrics["l0"] = self.l0(outputs, rows)
        finite = loss.detach().isfinite()
        self._skipped += ~finite
        if self.reads_loss and not finite:
            return loss.detach(), metrics
        loss.backward()
        if self.reads_loss:
            self.optimizer.step()
            return loss.detach(), metrics
        optimizer = cast(Any, self.optimizer)
        optimizer.found_inf = (~finite).float()  # 1: the optimizer updates nothing
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        return loss.detach(), metrics

    def l0(self, outputs, rows: Sequence[int] | None = None) -> Tensor:
        """Return the number of values > 0 in a row, averaged over rows and streams.

        Args:
            outputs: of a forward over all streams.
            rows: valid rows of every replica, for a ShardedSAE.
        """
        values, model = [outputs[f"values_{s}"].detach() for s in self.model.streams], self.model
        if not isinstance(model, ShardedSAE) or rows is None:
            return torch.stack([(v > 0).sum() / v.shape[0] for v in values]).mean()
        counts = torch.stack([(v[: rows[model.ranks.replica]] > 0).sum() for v in values])
        if model.ranks.data is not None:
            counts = model.ranks.data.total(counts, "l0")
        return (counts / sum(rows)).mean()


def rows_of(model: AlignedSAE, rows: Sequence[int] | None) -> dict[str, Any]:
    """Return the argument `rows` of a ShardedSAE; an AlignedSAE takes all rows.

    Args:
        model: of the step.
        rows: valid rows of every replica.
    """
    return {"rows": rows} if isinstance(model, ShardedSAE) else {}
