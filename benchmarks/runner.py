"""One run: what happens to each provider in a group: built, verified, warmed up, and timed in turns with the others.
Every row goes to the file as soon as it is known.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sparc_kernels.core.validation import precision_name
from sparc_kernels.tools import cost

from . import environment, record
from .cases import Case, Problem
from .plan import Group, Options, plan
from .providers import Context, Provider, everyone
from .timing import METHOD, Job, Samples, Timer, is_out_of_memory, profile
from .verification import Truth, Verdict, judge, twin

MAIN_MODE = {"training": "full", "decode": "full"}  # which row says that something went wrong; else forward
# the model's operations -> the package's operators that do them; AuxK also uses those of the main loss
DOING = {
    "centre": ("centre",), "select": ("select",), "values": ("gather_values", "inverse_index"),
    "inverse index": ("gather_values", "inverse_index"), "counters": ("count_fired_",),
    "losses + dv": ("decode_grads",), "dW_dec": ("decode_grads",), "dW_enc": ("latent_reduce_",),
    "weights, terms": ("target_weights", "loss_terms", "column_sums", "scale_"),
    "AuxK": ("dead_first", "gather_error", "add_auxk"), "d pre_bias": ("torch",), "casts": ("torch",),
    "update without gradients": ("latent_adam_", "adam_stream_", "adam_scalars_"),
}  # fmt: skip
CONTEXT_LOST = 70  # exit code of a process whose CUDA context is beyond use


@dataclass(eq=False)
class _Ready:
    provider: Provider
    job: Job
    verdict: Verdict | None
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
            self.deadline = self.data["deadline"]
            self._bury()
        else:
            self.deadline = self.started + 60 * options.minutes
            self.data = self._new()
        nvml = (self.data["environment"].get("gpu") or {}).get("uuid")
        self.monitor = environment.Monitor(nvml, None if self.cuda else environment.NO_NVML)

    # ------------------------------------------------------------------------------------------------------- the record

    def _new(self) -> dict:
        o = self.options
        providers = []
        for p in self.providers:
            reason = p.absent(self.context)
            providers.append(
                {"name": p.name, "op": p.op, "what": p.what, "status": "absent" if reason else "available",
                 "reason": reason, "dtypes": list(p.dtypes)}
            )  # fmt: skip
        return {
            "schema": record.SCHEMA, "complete": False, "stopped": "still running, or killed",
            "started": environment.now(), "finished": None, "seconds": None, "deadline": int(self.deadline),
            "settings": {
                "device": o.device, "threads": o.threads, "seed": o.seed, "method": METHOD, "quick": o.quick,
                "tiny": o.tiny, "minutes": o.minutes, "filter": o.filter, "official": o.official is not None,
                "sweeps": list(o.sweeps), "patience": o.patience,
                "clock": o.clock,
            },
            "environment": environment.environment(o.device, o.threads), "providers": providers, "active": None,
            "roofline": None, "results": [], "profiles": [], "groups": [],
        }  # fmt: skip

    def save(self) -> None:
        record.save(self.out, self.data)

    def _absent_line(self) -> str:
        absent = {p["name"]: p["reason"] for p in self.data["providers"] if p["status"] == "absent"}
        return "absent: " + ("; ".join(f"{name} ({reason})" for name, reason in absent.items()) or "none")

    def active(self, group: Group, provider: str, seconds: float) -> None:
        """What is under way, and until when at most: for whoever watches, and for the next process after a crash."""
        self.data["active"] = {"group": str(group), "provider": provider, "until": int(time.time() + seconds)}
        self.save()

    def _bury(self) -> None:
        """After a crash: what was under way is marked and not tried again."""
        active = self.data.get("active")
        if not active:
            return
        for group in plan(self.options):
            if str(group) == active["group"]:
                p = next((p for p in self.providers if (p.op, p.name) == (group.op, active["provider"])), None)
                if p and not self._done(group, p):
                    reason = self.data.pop("died", None) or "the process ended in it"
                    self._add(self._row(group, p, MAIN_MODE.get(group.op, "forward")), "failed", reason)
        self.data["active"] = None

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def _row(self, group: Group, p: Provider, mode: str) -> dict:
        c = group.case
        return record.empty_row(
            provider=p.name, op=group.op, case=c.name, data=c.data, sweep=c.sweep, shape=c.as_dict(), mode=mode,
            dtype=group.dtype,
        )  # fmt: skip

    def _add(self, row: dict, status: str, reason: str | None, **known) -> None:
        row.update(known, status=status, reason=reason)
        self.data["results"].append(row)
        self.save()
        said = f"{row['median_ms']:.4g} ms" if status == "ok" else f"{status}: {(reason or '').splitlines()[-1]}"
        data = "" if row["data"] == "gaussian" else f" ({row['data']})"
        self.say(
            f"{row['case']}{data} | {row['op']} | {row['provider']} | {row['dtype']} | {row['mode']} | {said}"[:220]
        )

    def _done(self, group: Group, p: Provider) -> bool:
        return bool(record.of_provider(self.data, group, p.name))

    def _wanted(self, group: Group, p: Provider, modes) -> list[str]:
        c, search = group.case, self.pattern.search
        names = {group.dtype, " ".join(map(precision_name, group.dtype.split()))}
        return [m for m in modes if any(search(f"{c.name} {c.data} {group.op} {p.name} {n} {m}") for n in names)]

    # ---------------------------------------------------------------------------------------------------------- the run

    def chosen(self) -> list[tuple[Group, list[Provider]]]:
        """Groups with the providers that are there, can do the shape and are asked for."""
        absent = {(p["op"], p["name"]) for p in self.data["providers"] if p["status"] == "absent"}
        found = []
        for group in plan(self.options):
            mine = [
                p for p in self.providers
                if (p.op, p.slow) == (group.op, group.slow) and group.dtype in p.dtypes and (p.op, p.name) not in absent
                and not p.fits(group.case) and self._wanted(group, p, ("forward", "backward", "full", "step"))
                and not (group.case.sweep and p.name in ("reference, max-autotune", "ours, CUDA graph"))
            ]  # fmt: skip
            if mine:
                found.append((group, mine))
        return found

    def go(self, step: Callable[[str], None] = lambda what: None) -> dict:
        """Everything; `step` is called as each group begins. Returns the record."""
        self.save()
        self.say(self._absent_line())
        missed = []
        try:
            for group, providers in self.chosen():
                step(str(group))
                todo = [p for p in providers if not self._done(group, p)]
                if not todo:
                    continue
                started = time.time()
                if self.left < 2:
                    missed.append(str(group))
                    self.data["groups"].append({"name": str(group), "status": "skipped", "reason": "time limit"})
                    continue
                self.group(group, todo)
                self.data["groups"].append(
                    {"name": str(group), "status": "ran", "seconds": round(time.time() - started, 1)}
                )
            self.data.update(
                complete=not missed,
                stopped=f"time limit of {self.options.minutes:g} minutes: {'; '.join(missed)}" if missed else None,
            )
        except KeyboardInterrupt:
            self.data["stopped"] = "interrupted"
        finally:
            self.data.update(active=None, finished=environment.now(), seconds=round(time.time() - self.started, 1))
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
        return self._problem[1], self._problem[2]

    def tidy(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def interleaved(self, s: cost.Shape) -> bool:
        """Whether the jobs of a group may all be alive: weights, gradients and two moments, several times."""
        total = torch.cuda.mem_get_info()[1] if self.cuda else 2**20 * (environment.memory_mib() or 2**14)
        return total / 2 > 6 * 4 * 4 * 2 * s.N * s.D

    def group(self, group: Group, providers: list[Provider]) -> None:
        s = group.case.shape
        together = self.interleaved(s)
        self.active(group, providers[0].name, 120)
        try:
            small = twin(s, self.context.device)
            verdicts: dict[str, Verdict] = {}
            if small != s:
                verdicts = self._verify_at_twin(group, providers, replace(group.case, shape=small))
            problem, truth = self.problem(group.case)
        except Exception as error:
            for p in providers:
                if not self._done(group, p):
                    self._failed(group, p, error)
            self._problem = None
            self.tidy()
            return
        ready: list[_Ready] = []
        for p in providers:  # all are verified before any optimizer moves the weights
            if self._done(group, p):  # refused at the twin
                continue
            one = self._verified(group, p, problem, truth, verdicts.get(p.name))
            if one is None:
                continue
            ready.append(one)
            if group.slow or not together:  # a slow one's rows come before the next is built
                self._measure(group, ready, problem, self._ours_again(group, problem) if together else None)
                ready = []
        if ready:
            self._measure(group, ready, problem)
        if group.op == "ceiling":
            self._set_roofline()

    def _ours_again(self, group: Group, problem: Problem) -> _Ready | None:
        """Ours beside a slow provider, for turns alone: its rows were written earlier."""
        ours = next((p for p in self.providers if (p.op, p.name) == (group.op, "ours")), None)
        mine = record.of_provider(self.data, group, "ours")
        if not group.slow or ours is None or not any(r["status"] == "ok" for r in mine):
            return None
        try:
            return _Ready(ours, ours.build(self.context, problem, group.dtype), None)
        except Exception as error:
            self.say(f"ours beside the slow providers of {group}: {type(error).__name__}: {error}"[:220])
            return None

    def _verify_at_twin(self, group: Group, providers: list[Provider], case: Case) -> dict[str, Verdict]:
        problem, truth = self.problem(case)
        verdicts = {}
        for p in providers:
            if p.check is None or self.left < self._setup(p):
                continue
            self.active(group, p.name, 60 + 4 * p.setup_s)
            try:
                job = p.build(self.context, problem, group.dtype)
                self.timer.once(job, ("optimizer",))
                errors, plain = p.check(truth, group.dtype, job.result())
                verdicts[p.name] = judge(errors, plain, group.dtype, case.as_dict())
                job.close()
            except Exception as error:
                self._failed(group, p, error)
            problem.forget()
            self.tidy()
        return verdicts

    def _setup(self, p: Provider) -> float:
        return p.setup_s if self.cuda else (10.0 if "compiled" in p.name else 1.0)

    def _verified(
        self, group: Group, p: Provider, problem: Problem, truth: Truth, verdict: Verdict | None
    ) -> _Ready | None:
        """Built and verified; None where that failed, and then a row says why."""
        main = MAIN_MODE.get(group.op, "forward")
        if self.left < self._setup(p):
            self._add(self._row(group, p, main), "skipped", f"{max(self.left, 0):.0f} s left of the time limit")
            return None
        self.active(group, p.name, 60 + 4 * p.setup_s)
        job = None
        try:
            job = p.build(self.context, problem, group.dtype)
            self.timer.once(job, ("optimizer",))
            if p.check is not None and verdict is None:
                errors, plain = p.check(truth, group.dtype, job.result())
                verdict = judge(errors, plain, group.dtype, None)
            if verdict is not None and not verdict.verified:
                self._add(
                    self._row(group, p, main), "wrong", verdict.reason, verified=False, verification=verdict.as_dict()
                )
                job.close()
                return None
            job.reset()
            return _Ready(p, job, verdict)
        except Exception as error:
            if job is not None:
                job.close()
            self._failed(group, p, error)
            return None

    def _failed(self, group: Group, p: Provider, error: Exception) -> None:
        lines = traceback.format_exc().strip().splitlines()
        text = "\n".join(lines[-3:])[-700:]
        status = "out of memory" if is_out_of_memory(error) else "failed"
        self._add(self._row(group, p, MAIN_MODE.get(group.op, "forward")), status, text)
        del error
        self.tidy()
        if not self.cuda:
            return
        try:
            torch.cuda.synchronize()
            float(torch.ones(1, device="cuda"))
        except Exception as lost:
            self.data["results"][-1]["reason"] += f"\nCUDA context lost: {str(lost).splitlines()[0][:200]}"
            self.data["active"] = None
            self.save()
            raise SystemExit(CONTEXT_LOST) from lost

    def _measure(self, group: Group, ready: list[_Ready], problem: Problem, beside: _Ready | None = None) -> None:
        """Rounds in which every job has its turn, until each has had its seconds; its rows follow at once."""
        each = self.options.seconds
        if each is None:
            each = 1.0 if self.cuda else 0.02 if self.options.tiny else 5.0 if self.options.quick else 8.0
        least, most = (5, 40) if self.cuda else (3, 15)
        burst = 0.1 if self.cuda else 0.01  # seconds of one job's turn
        name = ready[0].provider.name  # who is to blame for what happens in `beside`
        going = []
        for one in [*ready, *([beside] if beside else [])]:
            self.active(group, one.provider.name if one in ready else name, 120)
            try:
                started = time.time()
                # on a CPU it ran twice by now, which is warm enough; the profiler's time only sizes a turn
                if self.cuda:  # before the peak, which does not count an optimizer's state
                    one.single = self.timer.once(one.job)
                one.peaks = self.timer.peaks(one.job) if one in ready else {}
                one.single = one.single or time.time() - started
                going.append(one)
            except Exception as error:
                one.job.close()
                if one in ready:
                    self._failed(group, one.provider, error)
        turns = list(going)
        for i in range(most):
            started = time.time()
            for one in going:
                n = max(1, min(20, int(burst / max(one.single, 1e-6))))
                self.active(group, one.provider.name if one in ready else name, 60 + 10 * one.single * n)
                self.timer.round(one.job, one.samples, n)
            last = i + 1 == most or self.left < 1.2 * (time.time() - started)
            ended = [one for one in going if last or (i + 1 >= least and one.samples.seconds >= each)]
            for one in ended:
                if one in ready:
                    self._rows(group, one, len(turns) > 1, beside if beside in turns else None)
            going = [one for one in going if one not in ended]
            if not any(one in ready for one in going):
                break
        for one in turns:
            if group.profiled and one.provider.ops:
                self._profile(group, one)
            one.job.close()
        problem.forget()
        problem.restore()
        self.tidy()

    def _rows(self, group: Group, one: _Ready, interleaved: bool, beside: _Ready | None) -> None:
        energy = self._energy(one)
        for mode, phases in one.job.of_modes().items():
            if not self._wanted(group, one.provider, [mode]):
                continue
            numbers = one.samples.summary(phases)
            self._add(
                self._row(group, one.provider, mode), "ok", None, **numbers,
                verified=one.verdict.verified if one.verdict else None,
                verification=one.verdict.as_dict() if one.verdict else None,
                peak_bytes=one.peaks.get(mode), gradient_bytes=one.job.gradient_bytes or None,
                energy_j=energy.get(mode), **self._modelled(group, one.provider, mode, numbers["median_ms"]),
                clocks=energy.get("clocks"), interleaved=interleaved,
                host_ms=sum(one.job.host_ms[name] for name in phases) if one.job.host_ms else None,
                ours_ms=beside.samples.summary(phases)["median_ms"] if beside else None,
            )  # fmt: skip

    def _energy(self, one: _Ready) -> dict:
        """Joules of one execution, from NVML's counter over half a second of executions; clocks right after."""
        if self.monitor.nv is None:
            return {}
        if self.options.quick:  # half a second for each mode is too much
            return {"clocks": self.monitor.clocks()}
        found: dict = {}
        modes = one.job.of_modes()
        for mode in ("forward", "full", "step"):
            if mode not in modes or (mode == "forward" and len(modes) > 1):
                continue
            without = tuple(name for name in one.job.phases if name not in modes[mode])
            n = max(3, min(500, int(0.5 / max(one.single, 1e-5))))
            if n * one.single > self.left / 10:
                continue
            self.timer.sync()
            before = self.monitor.energy_j()
            for _ in range(n):
                one.job.reset()
                one.job.execute(without)
            self.timer.sync()
            after = self.monitor.energy_j()
            if before is not None and after is not None and after > before:
                found[mode] = (after - before) / n
        found["clocks"] = self.monitor.clocks()
        return found

    def _modelled(self, group: Group, p: Provider, mode: str, median: float) -> dict:
        """Fields of a row that come from the cost model, and what they make of the measured milliseconds."""
        whole = MAIN_MODE.get(group.op, "forward")
        if p.model is None or mode not in (whole, "step"):
            return {}
        s = self._shape(group, **p.how)
        try:
            op = p.model(s)
            if op is None:
                return {}
            if mode == "step":
                op = cost.total("step", [op, *p.after(s)])
            gpu = self.gpu
            bound = 1e3 * roofline_seconds(op, gpu) if gpu else None
            predicted = None
            if gpu and gpu.name in cost.GPUS:  # launches and padding included; there is no such model of a CPU
                training = group.op == "training"
                predicted = 1e3 * (cost.step_seconds(op, gpu, p.graph) if training else op.seconds(gpu))
        except Exception as error:  # a fault of the model is no reason to lose what was measured
            self.data["model_failed"] = f"{p.op}, {p.name}: {type(error).__name__}: {error}"
            return {}
        return {
            "bytes": op.l2, "flops": op.flops, "gb_s": op.l2 / median / 1e6,
            "tflop_s": op.flops / median / 1e9 or None, "roofline_ms": bound,
            "roofline_fraction": bound / median if bound else None, "predicted_ms": predicted,
        }  # fmt: skip

    def _shape(self, group: Group, **how) -> cost.Shape:
        """The shape of a group's rows with the launch settings of this GPU."""
        gpu = self.gpu
        return group.case.cost_shape(group.dtype, **how, **({"arch": gpu.arch} if gpu else {}))

    @property
    def gpu(self) -> cost.GPU | None:
        """The device's rates: the data sheet's where the cost model knows the GPU, else the ceilings of this run."""
        known = cost.gpu_of_device(self.data["environment"]["device_name"]) if self.cuda else None
        if known:
            self.data["roofline"] = {
                "modelled": True, "source": f"data sheet of {known.name}, fractions of sparc_kernels.cost"
            }  # fmt: skip
            return known
        return self._measured_gpu() if self.data["roofline"] else None

    def _set_roofline(self) -> None:
        rates: dict[str, float] = {}
        for row in self.data["results"]:
            if row["op"] == "ceiling" and row["status"] == "ok":
                rate = row["tflop_s"] if row["provider"] == "GEMM" else row["gb_s"]
                name = f"{row['provider']} {row['dtype']}"
                rates[name] = max(rate or 0.0, rates.get(name, 0.0))
        if any(name.startswith("GEMM") for name in rates) and any(name.startswith("copy") for name in rates):
            self.data["roofline"] = {
                "modelled": True, "rates": rates,
                "source": "bytes and FLOPs of sparc_kernels.cost over the ceilings that this run measured",
            }  # fmt: skip
            self.save()

    def _measured_gpu(self) -> cost.GPU | None:
        rates = self.data["roofline"].get("rates")
        if not rates:
            return None
        gemm = {name.split(" ", 1)[1]: rate for name, rate in rates.items() if name.startswith("GEMM")}
        full = gemm.get("float32") or max(gemm.values())
        half = gemm.get("bfloat16") or full
        copy = max(rate for name, rate in rates.items() if name.startswith("copy"))
        gather = max([rate for name, rate in rates.items() if name.startswith("gather")], default=copy)
        units = {"float32": full, "tf32": gemm.get("tf32") or full, "bfloat16": half, "float16": half}
        return cost.GPU(
            self.data["environment"]["device_name"], (), copy, max(copy, gather), 32 * 2**20, units, 1, 1.0,
            hbm_fraction=1, gemm_fraction=1,
        )  # fmt: skip

    def _profile(self, group: Group, one: _Ready) -> None:
        """Where the time of one step goes, by operator and kernel, beside what the cost model says of it."""
        mode, c = "full" if "full" in one.job.of_modes() else "step", group.case
        try:
            parts, kernels = profile(one.job, self.cuda, mode)
            modelled = self._modelled_parts(one.provider.ops(self._shape(group)), parts)
        except Exception as error:
            parts, kernels, modelled, reason = [], [], None, f"{type(error).__name__}: {error}"
        else:
            reason = None
        self.data["profiles"].append(
            {"case": c.name, "data": c.data, "shape": c.as_dict(), "provider": one.provider.name, "mode": mode,
             "dtype": group.dtype, "parts": parts, "kernels": kernels[:40], "modelled": modelled, "reason": reason}
        )  # fmt: skip
        self.save()

    def _modelled_parts(self, ops: list[cost.Op], parts: list[dict]) -> dict | None:
        """The cost model's operations, with the measured time of the operators that do them; None for a device that the
        model does not know."""
        gpu = self.gpu
        if gpu is None or gpu.name not in cost.GPUS:
            return None
        measured, shared = {part["name"]: part["ms"] for part in parts}, {}
        for op in ops:
            doing = DOING.get(op.name.split(" (")[0], ())
            shared.setdefault(doing or op.name, (doing, []))[1].append(op)
        rows = []
        for doing, some in shared.values():
            found = [measured[name] for name in doing if name in measured]
            rows.append({
                "name": ", ".join(op.name for op in some), "operators": list(doing),
                "measured_ms": sum(found) if found else None,
                "modelled_ms": 1e3 * sum(op.seconds(gpu) for op in some), "launches": sum(op.launches for op in some),
                "bound": cost.total("", some).bound(gpu),
            })  # fmt: skip
        return {"gpu": gpu.name, "modelled_ms": sum(row["modelled_ms"] for row in rows), "ops": rows}


def roofline_seconds(op: cost.Op, gpu: cost.GPU) -> float:
    """The least time of its parts one after the other: bytes through memory and cache, FLOPs; no launches, no padding,
    no instructions."""
    return sum(
        max(
            p.hbm(gpu) / gpu.bytes_per_s("HBM"), p.l2 / gpu.bytes_per_s("L2"),
            p.flops / gpu.flop_per_s(p.unit if p.unit in gpu.tflop_s else "float32"),
        )
        for p in op.parts
    )  # fmt: skip
