"""The state of a run: what a checkpoint holds, and how a run goes on from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..core.validation import check_int
from ..distributed.ranks import Ranks
from ..io.lanes import Lanes
from ..io.loader import Batch
from ..io.run_checkpoints import fill
from ..io.weights import model_config
from ..nn.optimizer import SparcAdam
from .config import TrainConfig
from .step import Step


class RunState:
    """Position of a run, with all that moves along: model, optimizer, random states and sums of metrics.

    Args:
        step: takes the steps; has model and optimizer.
        config: settings of the run.
        data_rng: generator of the order of the rows.
        columns: number of metrics that are summed.

    Attributes:
        batches: drawn since the beginning.
        epoch: of the next batch, from 0.
        index: of the next batch in its epoch.
        epoch_state: of `data_rng` before the epoch's order was drawn.
        order_state: of `data_rng` when the checkpoint was written; None: nothing is left to restore.
        shared: whether weights, order and re-initialisation draw from one generator, as officially.
        sums: float64 [1 + columns], number and metrics of the finite batches since the last row of the log.
        loss: of the last row of the log.
    """

    def __init__(self, step: Step, config: TrainConfig, data_rng: torch.Generator, columns: int):
        self.step, self.config, self.data_rng = step, config, data_rng
        self.shared = step.reinit_rng is data_rng
        self.batches = self.epoch = self.index = 0
        self.epoch_state = data_rng.get_state()
        self.order_state: Tensor | None = None
        self.sums = torch.zeros(columns + 1, dtype=torch.float64, device=next(step.model.parameters()).device)
        self.loss = math.nan

    def remaining(self, loader: Lanes, steps: int) -> Iterator[Batch]:
        """Iterate over the batches from the current position on, to the end of the last epoch.

        Args:
            loader: of the run, which draws from `data_rng`.
            steps: of the whole run; nothing is drawn if they are taken.
        """
        if self.batches >= steps:
            return
        self.data_rng.set_state(self.epoch_state)
        # with a shared random state, an epoch's order must not be drawn before the epoch
        spans = [(e, e + 1) for e in range(self.epoch, self.config.epochs)] if self.shared else None
        for first, last in spans or [(self.epoch, self.config.epochs)]:
            batches = loader.epochs(first, last, self.index if first == self.epoch else 0)
            if self.order_state is not None and self.shared:
                self.data_rng.set_state(self.order_state)
            self.order_state = None
            with closing(batches):
                yield from batches

    def advance(self, batch: Batch) -> None:
        """Move behind a batch that was trained on."""
        self.batches += 1
        self.epoch, self.index, self.epoch_state = batch.epoch, batch.number + 1, batch.epoch_state

    def state_dict(self) -> dict:
        """Return what a checkpoint holds; tensors are not copied."""
        return {
            "model": self.step.model.state_dict(),
            "model_config": model_config(self.step.model) | {"normalize": self.config.normalize},
            "optimizer": self.step.optimizer.state_dict(),
            "counts": {
                "batches": self.batches,
                "epoch": self.epoch,
                "index": self.index,
                "updates": self.step.updates,
                "skipped": self.step.skipped,
            },
            "epoch_state": self.epoch_state,
            "order_state": self.data_rng.get_state(),
            "fresh_state": self.step.reinit_rng.get_state(),
            "sums": self.sums,
            "loss": self.loss,
        }

    def load(self, path: Path, state: dict) -> None:
        """Restore a checkpoint.

        Args:
            path: the file or folder, from which every rank of a sharded model reads its blocks.
            state: as `state_dict` returned it; as `load_checkpoint` returns it for the model's ranks.

        Raises:
            ValueError: it does not fit this run.
        """
        try:
            self._load(path, state)
        except Exception as error:  # torch and optimizers raise many types
            text = f"expected the state of this run, got one that does not fit ({type(error).__name__}: {error})"
            raise ValueError(f"checkpoint {path}: {text}") from error

    def _load(self, path: Path, state: dict) -> None:
        ranks = self.step.model.ranks
        if ranks is None or ranks.size == 1:
            self.step.model.load_state_dict(state["model"])
            self.step.optimizer.load_state_dict(state["optimizer"])
        else:
            self._load_blocks(path, state, ranks)
        counts = {name: check_int(name, count, 0) for name, count in state["counts"].items()}
        self.batches, self.epoch, self.index = counts["batches"], counts["epoch"], counts["index"]
        self.step.updates, self.step.skipped = counts["updates"], counts["skipped"]
        self.epoch_state, self.order_state = state["epoch_state"], state["order_state"]
        for drawn in (state["epoch_state"], state["order_state"]):
            self.data_rng.set_state(drawn)
        reinit_rng = self.step.reinit_rng
        same_kind = state["fresh_state"].shape == reinit_rng.get_state().shape  # states of CPU and GPU differ
        if not self.shared and same_kind:
            reinit_rng.set_state(state["fresh_state"])
        self.sums.copy_(state["sums"])
        self.loss = float(state.get("loss", math.nan))

    def _load_blocks(self, path: Path, state: dict, ranks: Ranks) -> None:
        """Restore model and optimizer in place, each tensor of which ranks have blocks from the checkpoint itself."""
        model, optimizer = self.step.model, cast(SparcAdam, self.step.optimizer)
        had, params = state["optimizer"]["state"], [p for stream in optimizer.streams() for p in stream]
        numbers = {id(p): i for i, p in enumerate(optimizer.param_groups[0]["params"])}
        optimizer.prepare(params, [numbers[id(p)] in had for p in params])  # moments to fill
        fill(path, self.state_dict(), ranks)
        own = optimizer.state_dict()
        with torch.no_grad():
            for name, value in state["model"].items():  # what every rank has whole
                model.state_dict()[name].copy_(value)
            for i, values in had.items():
                for name, value in values.items():
                    own["state"][i][name].copy_(value)
        optimizer.load_state_dict({**own, "param_groups": state["optimizer"]["param_groups"]})
