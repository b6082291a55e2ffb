"""One run: each provider of a group is built, verified, warmed up and timed in turns with the others.

Every row goes to the file as soon as it is known.
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
        self._problem: tuple[object, Problem, Truth] | None = None
        if options.resume and out.exists():
            self.data = record.load(out)
            self._bury()
        else:
            self.data = self._new()
        self.deadline = self.data["deadline"]
        uuid = (self.data["environment"].get("gpu") or {}).get("uuid")
        self.monitor = environment.Monitor(uuid, None if self.cuda else environment.NO_NVML)

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
            "settings": {
                "device": o.device, "threads": o.threads, "seed": o.seed, "method": METHOD, "quick": o.quick,
                "tiny": o.tiny, "minutes": o.minutes, "filter": o.filter, "official": o.official is not None,
                "sweeps": list(o.sweeps), "patience": o.patience, "clock": o.clock,
            },
            "environment": environment.environment(o.device, o.threads), "providers": providers, "active": None,
            "roofline": None, "results": [], "profiles": [], "groups": [],
        }  # fmt: skip

    def save(self) -> None:
        record.save(self.out, self.data)

    def active(self, group: Group, p: Provider | None, seconds: float) -> None:
        """The provider that is set up, None in the rounds of its group, and until when at most: for gpu_report, and for
        the next process after a crash."""
        until = int(time.time() + max(120, seconds))
        self.data["active"] = {"group": str(group), "provider": p.name if p else "rounds", "until": until}
        self.save()

    def _bury(self) -> None:
        """After a crash: the provider that was set up, or its group in the rounds, is marked and not tried again."""
        reason = self.data.pop("died", None) or "the process ended in it"
        active, self.data["active"] = self.data.get("active"), None
        if active and active["provider"] == "rounds":
            self.data["groups"].append({"name": active["group"], "status": "failed", "reason": reason})
        for group in plan(self.options) if active else ():
            if str(group) == active["group"]:
                for p in self._todo(group, [p for p in self.providers if p.name == active["provider"]]):
                    self._add(self._row(group, p), "failed", reason)

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def _row(self, group: Group, p: Provider, mode: str | None = None) -> dict:
        c, mode = group.case, mode or MAIN_MODE.get(group.op, "forward")
        known = {"case": c.name, "data": c.data, "sweep": c.sweep, "shape": c.as_dict()}
        return record.empty_row(provider=p.name, op=group.op, mode=mode, dtype=group.dtype, **known)

    def _add(self, row: dict, status: str, reason: str | None, **known) -> None:
        row.update(known, status=status, reason=reason)
        self.data["results"].append(row)
        self.save()
        outcome = f"{row['median_ms']:.4g} ms" if status == "ok" else f"{status}: {(reason or '').splitlines()[-1]}"
        case = row["case"] + ("" if row["data"] == "gaussian" else f" ({row['data']})")
        self.say(" | ".join([case, *(row[name] for name in ("op", "provider", "dtype", "mode")), outcome])[:220])

    def _todo(self, group: Group, providers: list[Provider]) -> list[Provider]:
        """Those of the group's operation without a row in it; none where its rounds failed."""
        failed = any(g["name"] == str(group) and g["status"] == "failed" for g in self.data["groups"])
        rows = record.of_provider
        return [p for p in providers if p.op == group.op and not failed and not rows(self.data, group, p.name)]

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
        self.say("absent: " + ("; ".join(f"{name} ({reason})" for name, reason in absent.items()) or "none"))
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

    def problem(self, case: Case) -> tuple[Problem, Truth]:
        """The latest one is kept: groups of a case follow each other."""
        if self._problem is None or self._problem[0] != (case.shape, case.data):
            self._problem = None
            self.tidy()
            problem = Problem(case, self.context.device, self.options.seed)
            self._problem = (case.shape, case.data), problem, Truth(problem)
        return self._problem[1:]

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
        together, verdicts, failure = self.interleaved(group.case.shape), {}, None
        self.active(group, providers[0], 120)
        try:
            small = twin(group.case.shape, self.context.device)
            if small != group.case.shape:
                verdicts = self._verify_at_twin(group, providers, replace(group.case, shape=small))
            problem, truth = self.problem(group.case)
        except Exception as error:
            failure = _failure(error)
        if failure:
            for p in self._todo(group, providers):
                self._add(self._row(group, p), *failure)
            self._problem = None
            self.tidy()
            return
        ready: list[_Ready] = []
        for p in self._todo(group, providers):  # all are verified before any optimizer moves the weights
            one = self._verified(group, p, problem, truth, verdicts.get(p.name))
            if one is None:
                continue
            ready.append(one)
            if group.slow or not together:  # a slow one's rows come before the next is built
                self._measure(group, ready, problem, self._ours_again(group, p, problem) if together else None)
                ready = []
        if ready:
            self._measure(group, ready, problem)
        if group.op == "ceiling":
            self.data["roofline"] = modelled.roofline_of(self.data) or self.data["roofline"]

    @contextlib.contextmanager
    def _guard(self, group: Group, p: Provider) -> Iterator[None]:
        """A turn of a provider: an exception becomes its row."""
        self.active(group, p, 60 + 4 * p.setup_s)
        try:
            yield
        except Exception as error:
            self._add(self._row(group, p), *_failure(error))
            self.data["active"] = None

    def _setup(self, p: Provider) -> float:
        return p.setup_s if self.cuda else (10.0 if "compiled" in p.name else 1.0)

    def _verify_at_twin(self, group: Group, providers: list[Provider], case: Case) -> dict[str, Verdict]:
        problem, truth = self.problem(case)
        verdicts = {}
        for p in providers:
            if p.check is None or self.left < self._setup(p):
                continue
            with self._guard(group, p):
                one = self._built(group, p, problem, truth, None, case.as_dict())
                verdicts[p.name] = one.verdict
                one.job.close()
            problem.forget()
            self.tidy()
        return verdicts

    def _built(self, group: Group, p: Provider, problem: Problem, truth: Truth, verdict, at: dict | None) -> _Ready:
        """Built and executed once; verified unless it was at the twin."""
        job = p.build(self.context, problem, group.dtype)
        self.timer.once(job, ("optimizer",))
        if p.check is not None and verdict is None:
            verdict = judge(*p.check(truth, group.dtype, job.result()), group.dtype, at)
        return _Ready(p, job, verdict)

    def _verified(self, group: Group, p: Provider, problem: Problem, truth: Truth, verdict) -> _Ready | None:
        """None where that failed or the result is wrong, and then a row says why."""
        if self.left < self._setup(p):
            self._add(self._row(group, p), "skipped", f"{max(self.left, 0):.0f} s left of the time limit")
            return None
        with self._guard(group, p):
            one = self._built(group, p, problem, truth, verdict, None)
            wrong = one.verdict is not None and not one.verdict.verified
            one.job.close() if wrong else one.job.reset()
            if not wrong:
                return one
            known = {"verified": False, "verification": one.verdict.as_dict()}
            self._add(self._row(group, p), "wrong", one.verdict.reason, **known)
            return None
        self.tidy()
        return None

    def _ours_again(self, group: Group, p: Provider, problem: Problem) -> _Ready | None:
        """Ours beside a slow provider, for turns alone: its rows were written earlier."""
        rows = record.of_provider(self.data, group, "ours")
        ours = [ours for ours in self.providers if (ours.op, ours.name) == (group.op, "ours")]
        if not (group.slow and ours and any(r["status"] == "ok" for r in rows)):
            return None
        try:
            return _Ready(p, ours[0].build(self.context, problem, group.dtype))
        except Exception as error:
            self.say(f"ours beside the slow providers of {group}: {type(error).__name__}: {error}"[:220])
            return None

    # -------------------------------------------------------------------------------------------------------- measuring

    def _measure(self, group: Group, ready: list[_Ready], problem: Problem, beside: _Ready | None = None) -> None:
        """Rounds in which every job has its turn, until each has had its seconds; its rows follow at once."""
        each = self.options.seconds
        if each is None:
            each = 1.0 if self.cuda else 0.02 if self.options.tiny else 5.0 if self.options.quick else 8.0
        least, most = (5, 40) if self.cuda else (3, 15)
        burst = 0.1 if self.cuda else 0.01  # seconds of one job's turn
        turns = [one for one in ready if self._warm(group, one)]
        turns += [beside] if turns and beside and self._warm(group, beside, peaks=False) else []
        beside = beside if beside in turns else None
        going = list(turns)
        self.active(group, None, 60 + 2 * most * sum(max(burst, one.single) for one in turns))
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
            one.job.close()
        problem.forget()
        problem.restore()
        self.tidy()

    def _warm(self, group: Group, one: _Ready, peaks: bool = True) -> bool:
        with self._guard(group, one.provider):
            started = time.time()
            # a CPU is warm by now; on CUDA before the peak, which does not count an optimizer's state
            one.single = self.timer.once(one.job) if self.cuda else 0.0
            one.peaks = self.timer.peaks(one.job) if peaks else {}
            one.single = one.single or time.time() - started
            return True
        one.job.close()
        self.tidy()
        return False

    def _rows(self, group: Group, one: _Ready, interleaved: bool, beside: _Ready | None) -> None:
        energy, verdict, host = self._energy(one), one.verdict, one.job.host_ms
        for mode, phases in one.job.of_modes().items():
            if not self._wanted(group, one.provider, [mode]):
                continue
            numbers = one.samples.summary(phases)
            self._add(
                self._row(group, one.provider, mode), "ok", None, **numbers,
                verified=verdict.verified if verdict else None, verification=verdict.as_dict() if verdict else None,
                peak_bytes=one.peaks.get(mode), gradient_bytes=one.job.gradient_bytes or None,
                energy_j=energy.get(mode), clocks=energy.get("clocks"), interleaved=interleaved,
                host_ms=sum(host[name] for name in phases) if host else None,
                ours_ms=beside.samples.summary(phases)["median_ms"] if beside else None,
                **self._modelled(group, one.provider, mode, numbers["median_ms"]),
            )  # fmt: skip

    def _energy(self, one: _Ready) -> dict:
        """Joules of one execution, from NVML's counter over half a second of executions; clocks right after."""
        if self.monitor.nv is None:
            return {}
        joules: dict = {}
        modes = one.job.of_modes()
        if self.options.quick:  # half a second for each mode is too much
            modes = {}
        for mode in [mode for mode in ("forward", "full", "step") if mode in modes]:
            n = max(3, min(500, int(0.5 / max(one.single, 1e-5))))
            if (mode == "forward" and len(modes) > 1) or n * one.single > self.left / 10:
                continue
            run = one.job.of_mode(mode)
            self.timer.sync()
            before = self.monitor.energy_j()
            for _ in range(n):
                run()
            self.timer.sync()
            after = self.monitor.energy_j()
            if before is not None and after is not None and after > before:
                joules[mode] = (after - before) / n
        return {**joules, "clocks": self.monitor.clocks()}

    def _modelled(self, group: Group, p: Provider, mode: str, median: float) -> dict:
        try:
            return modelled.row_fields(group, p, mode, median, self.gpu)
        except Exception as error:  # a fault of the model is no reason to lose what was measured
            self.data["model_failed"] = f"{p.op}, {p.name}: {type(error).__name__}: {error}"
            return {}

    @property
    def gpu(self) -> cost.GPU | None:
        """The device's rates: the data sheet's where the cost model knows the GPU, else the ceilings of this run."""
        name = self.data["environment"]["device_name"]
        known = cost.gpu_of_device(name) if self.cuda else None
        if known:
            self.data["roofline"] = modelled.sheet_of(known)
            return known
        rates = (self.data["roofline"] or {}).get("rates")
        return modelled.measured_gpu(name, rates) if rates else None

    def _profile(self, group: Group, one: _Ready) -> None:
        """Where the time of one step goes, by operator and kernel, beside the cost model."""
        mode, c = "full" if "full" in one.job.of_modes() else "step", group.case
        parts, kernels, ops, reason = [], [], None, None
        try:
            parts, kernels = profile(one.job, self.cuda, mode, calls=1 if self.options.tiny else 3)
            ops = modelled.profile_ops(one.provider.ops(modelled.shape_of(group, self.gpu)), parts, self.gpu)
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
