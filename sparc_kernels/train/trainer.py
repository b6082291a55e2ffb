"""Training from feature files or tensors: the official loop and its default settings, designed to run unattended.

`Trainer` draws batches, takes steps, logs, validates and saves; `Step` is one step of the official loop. The command
line is in cli/train.py.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..core.validation import check_bool, check_int, require
from ..distributed import Ranks, shard_latents
from ..distributed.processes import LIMIT, STALL, Refused, join
from ..io.features import Stream
from ..io.loader import Batch
from ..io.run_checkpoints import CHECKPOINTS, load_latest, save_checkpoint
from ..io.weights import OFFICIAL, WEIGHTS, export_official, import_save, model_config, save_weights
from ..nn.module import AlignedSAE
from ..nn.optimizer import SparcAdam
from .config import TrainConfig as TrainConfig  # documented as this module's
from .data import RunData
from .folder import TIME, RunFolder
from .log import LOGGERS, RunLog, import_logger
from .process import Signals, versions
from .resume import RunState
from .step import Step, rows_of

logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """Training cannot continue; the last checkpoint is intact."""


class Interrupted(Exception):
    """A signal ended training, after a checkpoint if the run has a folder.

    Args:
        signum: number of the signal.
        step: of the end.
        saved: whether there is a checkpoint.

    Attributes:
        code: exit code by convention, 128 + signum.
    """

    def __init__(self, signum: int, step: int, saved: bool):
        how = "saved, resume goes on from here" if saved else "nothing is saved"
        super().__init__(f"{signal.Signals(signum).name} after step {step:,}; {how}")
        self.code = 128 + signum


class Trainer:
    """Trains an `AlignedSAE` on feature files or tensors.

    Args:
        config: settings that determine the result.
        streams: name -> feature file, its shards or tensor, see `Features`.
        out: folder of checkpoints, log.csv, manifest.json and the final model.safetensors; None: nothing is written.
        val_streams: the same streams of other samples, for validation after every epoch.
        model: with the config's settings, trained on its device; None: a new one, initialised after
            torch.manual_seed(config.seed).
        optimizer: function of the model that returns its optimizer, see `Step`; None: SparcAdam with the settings.
        device: of a new model: "auto" (CUDA if available), or a torch device; of several processes "auto", "cpu" or
            "cuda", each on the GPU of its LOCAL_RANK.
        resume: resume from the newest checkpoint in `out`, also to more `epochs` or `max_steps` than before; start from
            the beginning if there is none.
        checkpoint_every: steps between checkpoints; 0: only at the end.
        keep: number of checkpoints to keep.
        log_every: steps between rows of the log.
        log_to: any of "tensorboard", "wandb".
        full_check: read all features once before training, instead of a sample.
        graph: capture the step in a CUDA graph, on CUDA.
        export: write the official msae_checkpoint.pth too.
        on_step: called after every step with its number, loss and metrics.
        init: origin of the model's weights, for the manifest.
        quiet: print and log nothing.
        tensor_parallel: number of processes T among which the latents of each replica are divided; of P processes there
            are P / T replicas, each with a part of every batch.
        lanes: parts into which the rows are dealt, each with an order of its own, see `Lanes`; None: as many as
            replicas, or those of the run that is resumed. Must divide `batch_size`, as must the number of replicas.
        lost_after: seconds without a sign of life after which a process counts as lost, and the others end.
        hangs_after: the same without progress of its training.

    Under torchrun, or in a process group that is initialised already, every process makes a Trainer with the same
    arguments and calls the same methods; results, `on_step` and what is raised are the same in all of them, and rank 0
    alone prints and writes logs and manifest. They compare settings, data and versions before the first step. A process
    that ends otherwise ends the others too, with exit code 75 (`sparc_kernels.distributed.processes`).

    The constructor checks files, sizes, every feature for NaN and infinity, the folder and the packages needed, so that
    `train` does not fail late. Resuming requires the same data and settings. Nothing is written before `start`, which
    makes `out` and checks its free space.

    Raises:
        ValueError: a setting, file or its content is wrong; the message names it.
        OSError: the folder or a file cannot be used.
        ImportError: a package is missing; the message names it.
    """

    def __init__(
        self,
        config: TrainConfig,
        streams: Mapping[str, Stream],
        out: str | Path | None = None,
        *,
        val_streams: Mapping[str, Stream] | None = None,
        model: AlignedSAE | None = None,
        optimizer: Callable[[AlignedSAE], torch.optim.Optimizer] | None = None,
        device: str | torch.device = "auto",
        resume: bool = False,
        checkpoint_every: int = 1000,
        keep: int = 2,
        log_every: int = 50,
        log_to: tuple[str, ...] = (),
        full_check: bool = True,
        graph: bool = True,
        export: bool = False,
        on_step: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
        init: str | None = None,
        quiet: bool = False,
        tensor_parallel: int = 1,
        lanes: int | None = None,
        lost_after: float = LIMIT,
        hangs_after: float = STALL,
    ):
        self.config, self.on_step = config, on_step
        self.out = None if out is None else Path(out)
        self.log: RunLog | None = None
        self.folder: RunFolder | None = None
        self.ranks: Ranks | None = None
        self.saved = 0  # batches of the newest checkpoint
        self._closing = ExitStack()
        given = device if model is None else next(model.parameters()).device
        self.processes = join(given, limit=lost_after, stall=hangs_after)
        self._closing.callback(self.processes.stop)
        self.device = self.processes.device
        try:
            with self.processes.together():
                self.export, self.graph = check_bool("export", export), check_bool("graph", graph)
                self.quiet = check_bool("quiet", quiet) or not self.processes.leads
                self.checkpoint_every = check_int("checkpoint_every", checkpoint_every, 0)
                self.keep, self.log_every = check_int("keep", keep, 1), check_int("log_every", log_every, 1)
                self.tensor_parallel = check_int("tensor_parallel", tensor_parallel, 1)
                self.log_to = log_to if self.processes.leads else ()
                self._check_arguments(resume, optimizer, log_to)
            self._join_ranks(lanes)
            manifest = self.processes.from_first(lambda: self._open_folder(resume))
            self.full_check = check_bool("full_check", full_check) if manifest is None else manifest["full_check"]
            self.init = init or ("a model" if model is not None else None)
            replica, replicas = (self.ranks.replica, self.ranks.replicas) if self.ranks else (0, 1)
            with self.processes.together():
                self.lanes = replicas if lanes is None else check_int("lanes", lanes, 1)
                if manifest is not None:
                    had = manifest.get("lanes", 1)
                    require(lanes in (None, had), "lanes", f"{had} as when the run began", str(lanes))
                    self.lanes = had
                streams_of_run = streams, val_streams, self.device, self._closing, self.lanes, replica, replicas
                self.data = RunData(config, *streams_of_run)
            self.data.check(self.full_check, self.processes)
            self.processes.from_first(self._check_data)
            with self.processes.together():
                self.data.check_zero_rows(self._note)
            self._build(model, optimizer)
            self._resume()
        except BaseException as error:
            self._ends(error)
            self.close()
            raise

    def _check_arguments(self, resume: bool, optimizer, log_to: tuple[str, ...]) -> None:
        """Check what needs neither folder nor data, and import the packages that are needed later."""
        require(self.out is not None or not resume, "resume", "a folder to resume from (out)", "none")
        for name in log_to:
            require(name in LOGGERS, "log_to", f"some of {', '.join(LOGGERS)}", repr(name))
        for name in self.log_to:
            import_logger(name)
        if self.out is not None:
            import_save(self.out / WEIGHTS)
        size, T = self.processes.size, self.tensor_parallel
        require(size % T == 0, "tensor_parallel", f"a divisor of the {size} processes", str(T))
        N = self.config.n_latents
        require(N >= T, "tensor_parallel", f"at most {N} for {N} latents", str(T))
        ours = optimizer is None or not self.processes.grouped
        require(ours, "optimizer", "None (SparcAdam) with several processes", "another one")

    def _join_ranks(self, lanes: int | None) -> None:
        """Compare settings and versions, and find this process's place among the others."""
        if not self.processes.grouped:
            return
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        named = ("tensor_parallel", "checkpoint_every", "keep", "log_every", "export", "graph")
        settings = {name: getattr(self, name) for name in named}
        of = {f"version of {name}": version for name, version in versions().items() if name != "platform"}
        self.processes.require_same(asdict(self.config) | settings | {"lanes": lanes, "device": gpu} | of)
        self._mesh = self.processes.mesh(self.tensor_parallel)
        self.ranks = Ranks(self._mesh)
        if self.graph and self.device.type == "cuda":
            self._note("Note: with several processes steps are not captured in a CUDA graph")

    def _open_folder(self, resume: bool) -> dict | None:
        """Open the folder of the run, and return the manifest of the run to resume."""
        if self.out is None:
            return None
        self.folder = RunFolder(self.out, check_bool("resume", resume), self.export)
        if self.folder.manifest is not None:
            self.folder.check_settings(asdict(self.config))
        return self.folder.manifest

    def _check_data(self) -> None:
        if self.folder is not None and self.folder.manifest is not None:
            self.folder.check_data(self.data.described)

    def _ends(self, error: BaseException) -> None:
        """Let the other processes end too, unless all end for the same reason."""
        if isinstance(error, (Refused, Interrupted, TrainingStopped)):
            self.processes.finish()
        else:
            self.processes.fail(error)

    @property
    def batches(self) -> int:
        """Number of batches trained on so far, those before a checkpoint that was restored included."""
        return self.state.batches

    def start(self) -> None:
        """Lock `out`, write the manifest and open the logs; `train` calls it first.

        Raises:
            ValueError: the folder cannot be this run's.
            OSError: it cannot be written.
        """
        if self.log is not None:
            return
        try:
            with self.processes.together():
                if self.folder is not None:
                    size = sum(p.numel() * p.element_size() for p in self.model.parameters())
                    size *= self.tensor_parallel
                    # a checkpoint (weights, two moments) and the final weights
                    self.folder.claim(self._closing, (5 if self.export else 4) * size, self.state.batches)
                columns = list(self.names)
                if self.data.val_loader is not None:
                    columns += ["val_loss", "val_explained_variance", "val_explained_variance_cross"]
                out, settings = self.out if self.processes.leads else None, asdict(self.config)
                self.log = RunLog(
                    out, columns, self.steps, self.state.batches, to=self.log_to, settings=settings, quiet=self.quiet
                )
                self._closing.callback(self.log.close)
        except BaseException as error:
            self._ends(error)
            self.close()
            raise

    def close(self) -> None:
        """Close files and unlock the folder; `train` calls it at its end."""
        self._closing.close()

    # ------------------------------------------------------------------------------------------------------ preparation

    def _build(self, model: AlignedSAE | None, optimizer) -> None:
        """Make model, optimizer and step, at the beginning of the run."""
        config, widths = self.config, self.data.features.widths
        with self.processes.together():
            if model is None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(config.seed)
                    model = config.build(widths, "cpu" if self.ranks else self.device)
                    state = torch.get_rng_state()
                if config.shuffle == "official":  # one random state for weights, order and re-initialisation
                    self.data.rng.set_state(state)
            else:
                self.data.features.require_widths(model.d_streams, "the model")
                config.check_model(model)
        if self.ranks is not None:
            self.processes.require_same({"model": model, "decoder_layout": model.decoder_layout})
            with self.processes.together():  # it compares the weights, and refuses on every rank
                model = shard_latents(model, self._mesh).to(self.device)
        self.model = model.train()
        shared = config.shuffle == "official" and self.device.type == "cpu" and self.lanes == 1
        graph = self.graph and self.device.type == "cuda" and optimizer is None and self.ranks is None
        self.optimizer = (
            optimizer(model)
            if optimizer
            else SparcAdam(
                model,
                config.lr,
                weight_decay=config.weight_decay,
                normalize=config.unit_norm,
                max_grad_norm=config.max_grad_norm or None,
                capturable=graph,
                graph=graph,
                shadow=torch.bfloat16 if config.precision == "bf16" and config.gradient_free else None,
            )
        )
        self.step = Step(
            model,
            self.optimizer,
            self.data.rng if shared else torch.Generator(self.device).manual_seed(config.seed),
            auxk_coef=config.auxk_coef,
            cross_coef=config.cross_coef,
            reinit_every=config.reinit_every,
            bf16=config.precision == "bf16",
            gradient_free=config.gradient_free,
            graph=graph,
        )
        self.steps = config.steps(len(self.data.loader))
        self.names = _metric_names(list(model.d_streams), bool(config.auxk), not config.gradient_free)
        self.state = RunState(self.step, config, self.data.rng, len(self.names))

    def _resume(self) -> None:
        """Restore the newest checkpoint, if the folder has one."""
        if self.out is None:
            return
        folder = self.folder
        resumes = self.processes.from_first(
            lambda: folder is not None and folder.check_run(self._manifest(), len(self.data.loader), self._note)
        )
        if not resumes:
            return
        with self.processes.together():
            latest = load_latest(self.out / CHECKPOINTS, self._note, ranks=self.ranks)
        with self.processes.together():
            if folder is not None:
                folder.check_checkpoint(*latest) if latest else folder.starts_again(self._note)
        if latest is not None:
            with self.processes.together():
                self.state.load(*latest)
            self.saved = self.state.batches
            self._note(f"Resuming after step {self.saved:,} of {self.steps:,} ({latest[0]})", logging.INFO)

    def _note(self, text: str, level: int = logging.WARNING) -> None:
        if not self.quiet:
            logger.log(level, text)

    def _manifest(self) -> dict:
        return {
            "config": asdict(self.config),
            "model": model_config(self.model),
            "optimizer": type(self.optimizer).__name__,
            "init": self.init,
            "export": self.export,
            "data": self.data.described,
            "full_check": self.full_check,
            "lanes": self.lanes,
            "launch": self.processes.launch,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "started": time.strftime(TIME),
        }

    # --------------------------------------------------------------------------------------------------------- training

    def train(self) -> dict[str, float]:
        """Train to the end.

        Returns:
            `steps`, `skipped` batches, the `loss` of the last row of the log, `seconds`, `samples_per_s`, and `waited`,
            the fraction of the time spent waiting for batches: near 0 the run is compute-bound, near 1 data-bound.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved (a second signal ends the process at once).
            TrainingStopped: after too many non-finite losses.
            Refused: as `start`, of several processes.
            ValueError: as `start`.
            OSError: as `start`, or a checkpoint cannot be written.
        """
        self.start()
        assert self.log is not None, "start opens it"
        state, started = self.state, time.perf_counter()
        samples, first = 0, state.batches
        self._since, self._samples = started, 0
        with self._closing, Signals() as signals, _matmul_precision(self.config.precision):
            try:
                for batch in state.remaining(self.data.loader, self.steps):
                    self.processes.at(f"in step {state.batches + 1:,}")
                    rate = self.config.lr_at(self.step.updates, self.steps)
                    _set_lr(self.optimizer, rate)
                    loss, metrics = self.step(batch.x, batch.rows)
                    state.advance(batch)
                    self._count(batch, loss, metrics)
                    samples += sum(batch.rows)
                    self.log.advance()
                    if self.on_step is not None:
                        self.on_step(state.batches, loss, metrics)
                    ends = batch.last or state.batches == self.steps
                    if state.batches % self.log_every == 0 or ends:
                        self.log.row(self._row(batch, rate, ends), important=state.batches == self.steps)
                    if self.checkpoint_every and state.batches % self.checkpoint_every == 0:
                        self.save()
                    signum = self.processes.signal(signals.received, state.batches)
                    if signum:
                        self.save()
                        raise Interrupted(signum, state.batches, self.out is not None)
                    if state.batches == self.steps:
                        break
                    self.processes.at(f"after step {state.batches:,}, reading rows")
                self._finish()
                self.processes.finish()
            except BaseException as error:
                self._ends(error)
                raise
            seconds = time.perf_counter() - started
            result = {
                "steps": state.batches,
                "skipped": self.step.skipped,
                "loss": state.loss,
                "seconds": seconds,
                "samples_per_s": samples / seconds,
                "waited": min(1.0, self.data.loader.waited / seconds),
            }
            if state.batches > first:
                bound = "data (reading them)" if result["waited"] > 0.1 else "compute"
                self.log.say(
                    f"{state.batches - first:,} steps in {seconds:,.1f} s, {result['samples_per_s']:,.0f} samples/s; "
                    f"bound: {bound}, waited for data {result['waited']:.1%} of the time"
                )
            return result

    def _count(self, batch: Batch, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        self._samples += sum(batch.rows)
        values = torch.stack([loss.new_ones(()), *(metrics[name].to(loss.dtype) for name in self.names)])
        self.state.sums += torch.where(loss.isfinite(), values, 0)
        if self.step.reads_loss and not loss.isfinite():
            self._check_skipped()

    def _check_skipped(self) -> None:
        if self.step.skipped > self.config.max_skipped:
            raise self._too_many(f"max_skipped: {self.step.skipped}")

    def _too_many(self, skipped: str) -> TrainingStopped:
        return TrainingStopped(
            f"{skipped} batches had a loss that is not finite, the last by step {self.state.batches}; look at lr "
            f"({self.config.lr:g}) and at zero rows in the data"
        )

    def _row(self, batch: Batch, rate: float, ends: bool) -> dict:
        """Make a row of the log: means over the steps since the previous row."""
        count, *sums = self.state.sums.tolist()
        self._check_skipped()
        means = dict(zip(self.names, (m / count if count else math.nan for m in sums), strict=True))
        self.state.sums.zero_()
        now = time.perf_counter()
        dead = torch.stack(list(self.model.get_dead_neurons().values())).all(0).sum()
        if self.ranks is not None:
            dead = self.ranks.latents.total(dead, "dead")
        row = {
            "step": self.state.batches,
            "epoch": batch.epoch + 1,
            "lr": rate,
            "loss": means["total_loss"],
            **self._explained(means, self.data.spread),
            "l0": means["l0"] if "l0" in means else self._l0(batch),
            "dead": int(dead),
            "skipped": self.step.skipped,
            "samples_per_s": self._samples / (now - self._since),
            "seconds": now - self._since,
            **means,
        }
        self._since, self._samples, self.state.loss = now, 0, row["loss"]
        if ends and self.data.val_loader is not None:
            row |= self._validate(batch.epoch)
            self._since = time.perf_counter()
        return row

    def _explained(self, means: dict[str, float], spread: dict[str, float], prefix: str = "") -> dict:
        """Explained variance from NMSEs: exact if all rows have the same norm, as with `normalize`."""
        streams = self.model.streams

        def mean(pairs):
            values = [1 - means[name] / spread[t] if spread[t] else math.nan for name, t in pairs]
            return sum(values) / len(values) if values else None

        return {
            f"{prefix}explained_variance": mean((f"mse_loss_{s}", s) for s in streams),
            f"{prefix}explained_variance_cross": mean(
                (f"cross_loss_{t}_from_{s}", t) for t in streams for s in streams if s != t
            ),
        }

    @torch.no_grad()
    def _l0(self, batch: Batch) -> float:
        """L0 of one batch under the current weights."""
        mean = self.step.l0(self.model.eval()(batch.x, **rows_of(self.model, batch.rows)), batch.rows).item()
        self.model.train()
        return mean

    @torch.no_grad()
    def _validate(self, epoch: int) -> dict:
        """Mean metrics over the held-out rows; dead counters are not updated."""
        assert self.data.val_loader is not None, "there are rows to validate on"
        config = self.config
        rows: int | Tensor = 0
        total = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        self.model.eval()
        bf16 = torch.autocast(self.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
        for batch in self.data.val_loader.epochs(epoch, epoch + 1):
            self.processes.at(f"validating, batch {batch.number + 1:,}")
            with bf16:
                outputs = self.model(batch.x, **rows_of(self.model, batch.rows))
                loss, metrics = self.model.compute_loss(outputs, batch.x, config.auxk_coef, config.cross_coef)
            n = sum(batch.rows) * loss.isfinite()  # infinite with a zero row
            metrics["l0"] = self.step.l0(outputs, batch.rows)
            total += torch.where(n > 0, n * torch.stack([metrics[name] for name in self.names]), 0)
            rows += n
        self.model.train()
        if not rows:
            self._say("Note: val_loss is nan, no batch to validate on had a finite loss; look at zero rows in the data")
        means = dict(zip(self.names, (total / rows).tolist(), strict=True))
        return {"val_loss": means["total_loss"], **self._explained(means, self.data.val_spread, "val_")}

    # ----------------------------------------------------------------------------------------------------------- saving

    def save(self) -> None:
        """Write a checkpoint of the current state, unless it is written already or there is no folder."""
        if self.out is None or self.saved == self.state.batches:
            return
        self.processes.at(None)  # it may take long
        state = {"run": self.folder.run if self.folder else None} | self.state.state_dict()  # rank 0's is written
        with self.processes.together():
            save_checkpoint(self.out / CHECKPOINTS, self.state.batches, state, self.keep, self.ranks)
        self.saved = self.state.batches

    def _finish(self) -> None:
        """Save a checkpoint and the final weights; raise TrainingStopped instead if most batches were skipped."""
        self.processes.at(None)
        skipped = self.step.skipped
        if skipped < self.state.batches:
            self.save()
        if 2 * skipped > self.state.batches:
            older = f" ({WEIGHTS} is of an earlier step)" if self.out and (self.out / WEIGHTS).exists() else ""
            raise self._too_many(f"no final weights{older}: {skipped} of {self.state.batches}")
        if self.out is None:
            return
        with self.processes.together():
            save_weights(self.model, self.out / WEIGHTS, self.config.normalize, self.state.batches)
            if self.export:
                config = self.config
                settings = {"batch_size": config.batch_size, "num_epochs": config.epochs, "lr": config.lr}
                settings |= {"seed": config.seed, "auxk_coef": config.auxk_coef, "cross_loss_coef": config.cross_coef}
                export_official(self.model, self.out, settings, config.normalize)
        names = " and ".join([WEIGHTS, *([OFFICIAL] if self.export else [])])
        self._say(f"Saved {names} in {self.out}, loss {self.state.loss:.4f} after {self.state.batches:,} steps")

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)
        elif not self.quiet:
            print(text, flush=True)


@contextmanager
def _matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place if it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _metric_names(streams: list[str], auxk: bool, l0: bool) -> list[str]:
    """Names of the log's columns that are means over steps."""
    kinds = ["mse_loss", "l1_sparsity", *(["auxk_loss"] if auxk else [])]
    pairs = [f"cross_loss_{t}_from_{s}" for t in streams for s in streams if s != t]
    return ["total_loss", *(["l0"] if l0 else []), *(f"{kind}_{s}" for kind in kinds for s in streams), *pairs]
