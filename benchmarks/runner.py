"""One run: each provider of a group is built, verified, warmed up and timed in turns with the others.

Every row goes to the file as soon as it is known.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from sparc_kernels.core.validation import precision_name
from sparc_kernels.tools import cost

from . import environment, modelled, record
from .cases import Case, Problem
from .plan import MAIN_MODE, Group, Options, everyone, plan
from .provider import Context, Provider
from .timing import METHOD, Job, Samples, Timer, is_out_of_memory, profile
from .verification import Truth, Verdict, judge, twin


@dataclass(eq=False)
class _Ready:
    provider: Provider
    job: Job
    verdict: Verdict | None = None
    single: float = 0.0  # seconds of one execution, reset included
    peaks: dict[str, int] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)


class Run:
    """Carries out a plan into one file."""

    def __init__(self, options: Options, out: Path, say: Callable[[str], None] = print):
        self.options, self.out, self.say = options, out, say
        self.context = Context(torch.device(options.device), options.official, options.quick)
        self.cuda = options.device == "cuda"
        torch.set_num_threads(options.threads)
        self.timer = Timer(options.device, options.patience, options.clock)
        self.pattern = re.compile(options.filter)
        self.providers = everyone()
        self.started = time.time()
        self._truth: Truth | None = None
        if options.resume and out.exists():
            self.data = record.load(out)
            record.bury(self.data, "the process ended in it")
        else:
            self.data = self._new()
        self.deadline = self.data["deadline"]
        about = self.data["environment"]
        self.sheet = cost.gpu_of_device(about["device_name"]) if self.cuda else None
        if self.sheet:
            self.data["roofline"] = modelled.sheet_of(self.sheet)
        self.monitor = environment.Monitor(about["gpu"]["uuid"]) if self.cuda else None

    # ------------------------------------------------------------------------------------------------------- the record

    def _new(self) -> dict:
        o = self.options
        reasons = [p.absent(self.context) for p in self.providers]
        providers = [
            {"name": p.name, "op": p.op, "what": p.what, "status": "absent" if reason else "available",
             "reason": reason, "dtypes": list(p.dtypes)}
            for p, reason in zip(self.providers, reasons, strict=True)
        ]  # fmt: skip
        return {
            "schema": record.SCHEMA, "complete": False, "stopped": "still running, or killed",
            "started": environment.now(), "finished": None, "seconds": None,
            "deadline": int(self.started + 60 * o.minutes),
            "settings": {**asdict(o), "method": METHOD, "official": o.official is not None, "sweeps": o.sweeps or []},
            "environment": environment.environment(o.device, o.threads), "providers": providers, "active": None,
            "roofline": None, "results": [], "profiles": [], "groups": [],
        }  # fmt: skip

    def save(self) -> None:
        record.save(self.out, self.data)

    def active(self, group: Group, providers: list[Provider], seconds: float) -> None:
        """What is at work, and until when at most: for gpu_report and `record.bury`."""
        rows, until = [self._row(group, p) for p in providers], int(time.time() + max(120, seconds))
        self.data["active"] = {"group": str(group), "until": until, "rows": rows}
        self.save()

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def _row(self, group: Group, p: Provider) -> dict:
        c, mode = group.case, MAIN_MODE.get(group.op, "forward")
        known = {"case": c.name, "data": c.data, "sweep": c.sweep, "shape": c.as_dict()}
        return record.empty_row(provider=p.name, op=group.op, mode=mode, dtype=group.dtype, **known)

    def _add(self, group: Group, p: Provider, status: str, reason: str | None, **known) -> None:
        row = {**self._row(group, p), "status": status, "reason": reason, **known}
        self.data["results"].append(row)
        self.save()
        outcome = f"{row['median_ms']:.4g} ms" if status == "ok" else f"{status}: {(reason or '').splitlines()[-1]}"
        words = (record.case_of(row, " ({})"), group.op, p.name, group.dtype, row["mode"], outcome)
        self.say(" | ".join(words)[:220])

    def _todo(self, group: Group, providers: list[Provider]) -> list[Provider]:
        """Those without a row in the group."""
        return [p for p in providers if not record.of_job(self.data, self._row(group, p))]

    def _wanted(self, group: Group, p: Provider, modes) -> list[str]:
        c, search = group.case, self.pattern.search
        names = {group.dtype, " ".join(map(precision_name, group.dtype.split()))}
        return [m for m in modes if any(search(f"{c.name} {c.data} {group.op} {p.name} {n} {m}") for n in names)]

    # ---------------------------------------------------------------------------------------------------------- the run

    def chosen(self) -> list[tuple[Group, list[Provider]]]:
        """Groups with the providers that are available, fit the shape and match the filter."""
        absent = {(p["op"], p["name"]) for p in self.data["providers"] if p["status"] == "absent"}
        groups = []
        for group in plan(self.options):
            mine = [
                p for p in self.providers
                if (p.op, p.slow) == (group.op, group.slow) and group.dtype in p.dtypes and (p.op, p.name) not in absent
                and not p.fits(group.case) and self._wanted(group, p, ("forward", "backward", "full", "step"))
                and not (group.case.sweep and p.name in ("reference, max-autotune", "ours, CUDA graph"))
            ]  # fmt: skip
            if mine:
                groups.append((group, mine))
        return groups

    def go(self, step: Callable[[], object] = lambda: None) -> dict:
        """Times every group; `step` is called after each. Returns the record."""
        absent = {p["name"]: p["reason"] for p in self.data["providers"] if p["status"] == "absent"}
        said = "; ".join(f"{name} ({reason})" for name, reason in absent.items()) or "none"
        self.say(f"absent: {said}".replace("\n", " "))
        self.save()
        missed = []
        try:
            for group, providers in self.chosen():
                started, todo = time.time(), self._todo(group, providers)
                if todo and self.left < 2:
                    missed.append(str(group))
                    self.data["groups"].append({"name": str(group), "status": "skipped", "reason": "time limit"})
                elif todo:
                    self.group(group, todo)
                    seconds = round(time.time() - started, 1)
                    self.data["groups"].append({"name": str(group), "status": "ran", "seconds": seconds})
                step()
            late = f"time limit of {self.options.minutes:g} minutes: {'; '.join(missed)}" if missed else None
            self.data.update(complete=not missed, stopped=late, active=None)
        except KeyboardInterrupt:
            self.data.update(stopped="interrupted", active=None)
        finally:
            self.data.update(finished=environment.now(), seconds=round(time.time() - self.started, 1))
            self.data["environment"]["load_after"] = environment.load_average()
            self.save()
        return self.data

    def truth(self, case: Case) -> Truth:
        """Of the case's problem. The latest one is kept: groups of a case follow each other."""
        known = self._truth and self._truth.problem.case
        if not known or (known.shape, known.data) != (case.shape, case.data):
            self._truth = None
            self.tidy()
            self._truth = Truth(Problem(case, self.context.device, self.options.seed))
        return self._truth

    def tidy(self) -> None:
        """Frees memory. A lost CUDA context raises here, which ends the process: gpu_report starts another."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def interleaved(self, s: cost.Shape) -> bool:
        """Whether the jobs of a group may all be alive: weights, gradients and two moments, several times."""
        total = torch.cuda.mem_get_info()[1] if self.cuda else 2**20 * (environment.memory_mib() or 2**14)
        return total / 2 > 6 * 4 * 4 * 2 * s.N * s.D

    def group(self, group: Group, providers: list[Provider]) -> None:
        case, verdicts, failure = group.case, {}, None
        self.active(group, providers, 120)
        try:
            small = replace(case, shape=twin(case.shape, self.context.device))
            if small != case:
                verdicts = self._verify_at_twin(group, providers, self.truth(small))
            truth = self.truth(case)
        except Exception as error:
            failure = _failure(error)
        todo = self._todo(group, providers)
        if failure:
            for p in todo:
                self._add(group, p, *failure)
            self._truth = None
            self.tidy()
            return
        together, ready = not group.slow and self.interleaved(case.shape), []
        for p in todo:
            ready += self._verified(group, p, truth, verdicts.get(p.name))
            if ready and (p is todo[-1] or not together):  # alone: its rows come before the next is built
                self._measure(group, ready, self._ours_again(group, p, truth.problem) if group.slow else None)
                ready.clear()
                self.tidy()
        if group.op == "ceiling" and not self.sheet:
            self.data["roofline"] = modelled.roofline_of(self.data) or self.data["roofline"]

    def _attempt(self, group: Group, p: Provider, work: Callable[[], object]):
        """What a turn of a provider returns; None after an exception, which becomes its row."""
        self.active(group, [p], 60 + 4 * p.setup_s)
        try:
            return work()
        except Exception as error:
            failure = _failure(error)
        self._add(group, p, *failure)
        self.data["active"] = None
        self.tidy()
        return None

    def _setup(self, p: Provider) -> float:
        return p.setup_s if self.cuda else (10.0 if "compiled" in p.name else 1.0)

    def _built(self, p: Provider, truth: Truth, dtype: str, verdict: Verdict | None, at: dict | None = None) -> _Ready:
        """Built and executed once; verified unless it was at the twin."""
        job = p.build(self.context, truth.problem, dtype)
        self.timer.once(job, "full")
        if p.check is not None and verdict is None:
            verdict = judge(*p.check(truth, dtype, job.result()), dtype, at)
        job.reset()
        return _Ready(p, job, verdict)

    def _verify_at_twin(self, group: Group, providers: list[Provider], truth: Truth) -> dict[str, Verdict]:
        verdicts, at = {}, truth.problem.case.as_dict()
        for p in providers:
            if p.check is not None and self.left >= self._setup(p):
                one = self._attempt(group, p, lambda p=p: self._built(p, truth, group.dtype, None, at))
                if one:
                    verdicts[p.name] = one.verdict
        return verdicts

    def _verified(self, group: Group, p: Provider, truth: Truth, verdict: Verdict | None) -> list[_Ready]:
        """The provider's job; none where it failed or its result is wrong, and then a row says why."""
        if self.left < self._setup(p):
            self._add(group, p, "skipped", f"{max(self.left, 0):.0f} s left of the time limit")
            return []
        one = self._attempt(group, p, lambda: self._built(p, truth, group.dtype, verdict))
        if one and one.verdict and not one.verdict.verified:
            self._add(group, p, "wrong", one.verdict.reason, verified=False, verification=one.verdict.as_dict())
            return []
        return [one] if one else []

    def _ours_again(self, group: Group, p: Provider, problem: Problem) -> _Ready | None:
        """Ours beside a slow provider, for turns alone: its rows were written earlier."""
        ours = [ours for ours in self.providers if (ours.op, ours.name) == (group.op, "ours")]
        rows = record.of_job(self.data, self._row(group, ours[0])) if ours else []
        if not (any(r["status"] == "ok" for r in rows) and self.interleaved(group.case.shape)):
            return None
        try:
            return _Ready(p, ours[0].build(self.context, problem, group.dtype))
        except Exception as error:
            self.say(f"ours beside the slow providers of {group}: {_failure(error)[1].splitlines()[-1]}"[:220])
            return None

    # -------------------------------------------------------------------------------------------------------- measuring

    def _measure(self, group: Group, ready: list[_Ready], beside: _Ready | None = None) -> None:
        """Rounds in which every job has its turn, until each has had its seconds; its rows follow at once."""
        each = self.options.seconds
        if each is None:
            each = 1.0 if self.cuda else 0.02 if self.options.tiny else 5.0 if self.options.quick else 8.0
        least, most = (5, 40) if self.cuda else (3, 15)
        burst = 0.1 if self.cuda else 0.01  # seconds of one job's turn
        turns = [one for one in ready if self._attempt(group, one.provider, lambda one=one: self._warm(one))]
        if turns and beside and self._attempt(group, beside.provider, lambda: self._warm(beside, peaks=False)):
            turns.append(beside)
        else:
            beside = None
        going = list(turns)
        seconds = 60 + 2 * most * sum(max(burst, one.single) for one in turns)
        self.active(group, [one.provider for one in turns], seconds)
        for i in range(1, most + 1):
            started = time.time()
            for one in going:
                self.timer.round(one.job, one.samples, max(1, min(20, int(burst / max(one.single, 1e-6)))))
            last = i == most or self.left < 1.2 * (time.time() - started)
            for one in [one for one in going if last or (i >= least and one.samples.seconds >= each)]:
                going.remove(one)
                if one is not beside:
                    self._rows(group, one, len(turns) > 1, beside)
            if all(one is beside for one in going):
                break
        for one in turns:
            if group.profiled and one.provider.ops and one is not beside and self.left > 5 * one.single:
                self._profile(group, one)

    def _warm(self, one: _Ready, peaks: bool = True) -> _Ready:
        started = time.time()
        # on CUDA before the peak, which does not count an optimizer's state; a CPU is warm by now
        one.single = self.timer.once(one.job) if self.cuda or not peaks else 0.0
        one.peaks = self.timer.peaks(one.job) if peaks else {}
        one.single = one.single or time.time() - started
        return one

    def _rows(self, group: Group, one: _Ready, interleaved: bool, beside: _Ready | None) -> None:
        energy, verdict, host = self._energy(one), one.verdict, one.job.host_ms
        clocks = self.monitor.clocks() if self.monitor else None
        for mode, phases in one.job.of_modes().items():
            if not self._wanted(group, one.provider, [mode]):
                continue
            numbers = one.samples.summary(phases)
            self._add(
                group, one.provider, "ok", None, mode=mode, **numbers,
                verified=verdict.verified if verdict else None, verification=verdict.as_dict() if verdict else None,
                peak_bytes=one.peaks.get(mode), gradient_bytes=one.job.gradient_bytes or None,
                energy_j=energy.get(mode), clocks=clocks, interleaved=interleaved,
                host_ms=sum(host[name] for name in phases) if host else None,
                ours_ms=beside.samples.summary(phases)["median_ms"] if beside else None,
                **self._modelled(group, one.provider, mode, numbers["median_ms"]),
            )  # fmt: skip

    def _energy(self, one: _Ready) -> dict[str, float | None]:
        """Joules of one execution by mode, over half a second of executions: too long for --quick."""
        if self.options.quick or not self.monitor:
            return {}
        n = max(3, min(500, int(0.5 / max(one.single, 1e-5))))
        whole = [mode for mode in one.job.of_modes() if mode in ("full", "step")] or ["forward"]
        return {
            mode: self.monitor.joules(partial(one.job.again, mode), n, self.timer.sync)
            for mode in whole if n * one.single <= self.left / 10
        }  # fmt: skip

    def _modelled(self, group: Group, p: Provider, mode: str, median: float) -> dict:
        try:
            return modelled.row_fields(group, p, mode, median, self.gpu)
        except Exception as error:  # a fault of the model is no reason to lose what was measured
            self.data["model_failed"] = f"{p.op}, {p.name}: {type(error).__name__}: {error}"
            return {}

    @property
    def gpu(self) -> cost.GPU | None:
        """The device's rates: the data sheet's where the cost model knows the GPU, else the ceilings of this run."""
        rates = (self.data["roofline"] or {}).get("rates")
        return modelled.measured_gpu(self.data["environment"]["device_name"], rates) if rates else self.sheet

    def _profile(self, group: Group, one: _Ready) -> None:
        """Where the time of one step goes, by operator and kernel, beside the cost model."""
        mode, c = "full" if "full" in one.job.of_modes() else "step", group.case
        parts, kernels, ops, reason = [], [], None, None
        try:
            parts, kernels = profile(one.job, self.cuda, mode, calls=1 if self.options.tiny else 3)
            ops = modelled.profile_ops(one.provider.ops(c.cost_shape(group.dtype, self.gpu)), parts, self.gpu)
        except Exception as error:
            parts, kernels, reason = [], [], f"{type(error).__name__}: {error}"
        self.data["profiles"].append(
            {"case": c.name, "data": c.data, "shape": c.as_dict(), "provider": one.provider.name, "mode": mode,
             "dtype": group.dtype, "parts": parts, "kernels": kernels[:40], "modelled": ops, "reason": reason}
        )  # fmt: skip
        self.save()


def _failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a row."""
    text = "\n".join(traceback.format_exception(error)).strip().splitlines()
    return "out of memory" if is_out_of_memory(error) else "failed", "\n".join(text[-3:])[-700:]
