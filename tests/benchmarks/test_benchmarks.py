"""The benchmark suite on a CPU at tiny shapes: wrong results are refused, slowdowns noticed, records valid."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import (  # noqa: E402
    cases,
    compare,
    data,
    modelled,
    peers,
    plan,
    plot,
    providers,
    record,
    report,
    runner,
    timing,
    verification,
)
from benchmarks.provider import Context, Provider, check_selection, check_training  # noqa: E402
from sparc_kernels import AlignedSAE, reference  # noqa: E402
from sparc_kernels.core import gpu_timer  # noqa: E402
from sparc_kernels.core.registry import OPERATORS  # noqa: E402
from sparc_kernels.tools import cost  # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
CONTEXT = Context(torch.device("cpu"))
OFFICIAL_STUB = """
import torch
from sparc_kernels import AlignedSAE
class MultiStreamSparseAutoencoder(AlignedSAE):
    pass
"""


@pytest.fixture(autouse=True)
def _plain_memory(poisoned_memory):
    torch.use_deterministic_algorithms(False)  # inductor and torch.empty of ceilings: nothing is left unwritten here


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """No test needs a cold cache, nor a collection through all that was imported."""
    import torch._dynamo  # noqa: F401  as the first optimizer does

    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "FLUSH_BYTES", 1)
        yield
    gc.unfreeze()


def provider(name: str, op: str = "training") -> Provider:
    return next(p for p in plan.everyone() if (p.op, p.name) == (op, name))


def run(tmp_path, monkeypatch, made=None, filter="", **options):
    """A tiny run of these providers (default: ours, the eager reference, ceilings), and its record."""
    wanted = made or [p for p in plan.everyone() if p.name in ("ours", "reference, eager") or p.op == "ceiling"]
    monkeypatch.setattr(runner, "everyone", lambda: wanted)
    given = {"tiny": True, "threads": 1, "minutes": 5, "seconds": 0.01, "filter": filter, **options}
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    runner.Run(runner.Options(**given), out, say=lambda text: None).go()
    return record.load(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One record of the command line, with every provider that runs on a CPU but the compiled one; and its path."""
    out, said = tmp_path_factory.mktemp("run") / "run.json", io.StringIO()
    arguments = ["--device", "cpu", "--tiny", "--threads", "1", "--seconds", "0.01", "--out", str(out)]
    with contextlib.redirect_stdout(said):
        assert cli.main([*arguments, "--filter", "^(?!.*compiled)(open-images|batch)"]) == 0
    return out, said.getvalue()


# ------------------------------------------------------------------------------------------------------------- a record


@pytest.mark.subprocess
@pytest.mark.slow
def test_a_run_has_every_mode_verified_and_every_field(made):
    path, said = made
    rec = record.load(path)
    assert rec["complete"] and rec["schema"] == record.SCHEMA
    assert {r["status"] for r in rec["results"]} == {"ok"}
    rows = {(r["op"], r["provider"], r["case"], r["dtype"], r["mode"]): r for r in rec["results"]}
    for mode in ("forward", "backward", "full", "step"):
        for name in ("ours", "reference, eager"):
            row = rows["training", name, "open-images", "float32", mode]
            assert row["verified"] is True and row["n"] >= 3 and row["interleaved"]
            assert max(row["verification"]["errors"].values()) < 1e-5
            assert set(row["verification"]["errors"]) == {"loss", "w_enc", "w_dec", "pre_bias", "latent_bias"}
    ours = rows["training", "ours", "batch", "float32", "full"]
    assert ours["roofline_ms"] > 0 and ours["gb_s"] > 0 and ours["tflop_s"] > 0
    assert ours["peak_bytes"] >= ours["gradient_bytes"] > 0 and ours["energy_j"] is None
    assert rec["roofline"]["modelled"] is True and "model_failed" not in rec
    assert "no NVIDIA GPU" in rec["environment"]["nvml"]["reason"]
    assert {"commit", "dirty", "load_before", "load_after", "versions"} <= set(rec["environment"])
    parts = {part["name"] for part in rec["profiles"][0]["parts"]}
    assert {"select", "torch"} <= parts and len(parts) > 5
    assert "-- training, open-images, float32" in said and "absent: sparsify" in said


def test_absent_providers_are_listed_with_the_reason(made):
    listed = {p["name"]: p for p in record.load(made[0])["providers"]}
    reasons = {name: p["reason"] for name, p in listed.items() if p["status"] == "absent"}
    assert "--official" in reasons["official SPARC"] and "--official" in reasons["official SPARC, OpenAI's kernels"]
    assert "CUDA" in reasons["ours, CUDA graph"] and "CUDA" in reasons["reference, max-autotune"]
    if importlib.util.find_spec("sparsify") is None:
        assert "eai-sparsify" in reasons["sparsify"]
    if importlib.util.find_spec("flashinfer") is None:
        assert "flashinfer-python" in reasons["FlashInfer"]
    assert all(p["reason"] is None for p in listed.values() if p["status"] == "available")
    assert not {r["provider"] for r in record.load(made[0])["results"]} & set(reasons)


def test_a_folder_that_is_no_clone_makes_the_official_class_absent(tmp_path):
    reason = provider("official SPARC").absent(Context(torch.device("cpu"), tmp_path))
    assert "expected a clone" in reason


def test_the_official_class_is_run_from_its_folder(tmp_path, monkeypatch):
    """A stand-in with its layout: loaded alone, its helpers called, its modules gone afterwards."""
    folder = tmp_path / "clone" / "sparc" / "model"
    folder.mkdir(parents=True)
    (folder / "model_global.py").write_text("from sparc.kernels import TritonDecoderAutograd\n" + OFFICIAL_STUB)
    (folder.parent / "loss.py").write_text("")
    (folder / "utils.py").write_text(
        "calls = []\n"
        "def unit_norm_decoder_(d): calls.append('norm')\n"
        "def unit_norm_decoder_grad_adjustment_(d): calls.append('grad')\n"
    )
    rec = run(
        tmp_path, monkeypatch, [provider("official SPARC")], "open-images", official=tmp_path / "clone", minutes=2
    )
    assert {r["mode"] for r in rec["results"]} == {"forward", "backward", "full", "step"}
    assert all(r["verified"] for r in rec["results"])
    assert set(peers.load_official(tmp_path / "clone", kernels=False).helpers.calls) == {"norm", "grad"}
    assert "sparc" not in sys.modules and "sparc.model.utils" not in sys.modules


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(schema="sparc_kernels.benchmark/1"), "record.schema: expected"),
        (lambda d: d.pop("settings"), "record.settings: missing"),
        (lambda d: d["environment"].pop("commit"), "environment.commit: missing"),
        (lambda d: d["results"][0].pop("mode"), r"results\[0\].mode: missing"),
        (lambda d: d["results"][0].update(median_ms="fast"), r"results\[0\].median_ms: expected int or float or null"),
        (lambda d: d["results"][0].update(p20_ms=1e9), "expected p20_ms <= median_ms"),
        (lambda d: d["results"][0].update(verified=False), "status ok with verified false"),
        (lambda d: d["results"][0].update(status="wrong", reason=None), "reason: expected one with status 'wrong'"),
        (lambda d: d["results"][0].update(status="wrong", reason="x"), "median_ms: expected null with status 'wrong'"),
        (lambda d: d["results"][0].update(status="fine"), "status: expected one of ok, wrong"),
        (lambda d: d["results"].append(d["results"][0]), "a second row for"),
    ],
)
def test_the_schema_names_what_is_wrong(made, change, said):
    rec = json.loads(made[0].read_text())
    change(rec)
    with pytest.raises(record.SchemaError, match=said):
        record.validate(rec)


def test_what_is_not_json_is_said_to_be_so(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(record.SchemaError, match=r"half\.json: not JSON"):
        record.load(tmp_path / "half.json")


@pytest.mark.subprocess
def test_a_killed_run_leaves_a_readable_file_marked_incomplete(tmp_path):
    out = tmp_path / "run.json"
    filter = "open-images .*(select|ceiling|encode|decode|optimizer)"
    pid = os.fork()
    if pid == 0:
        cli.main(["--device=cpu", "--tiny", "--threads=1", f"--out={out}", f"--filter={filter}"])
        os._exit(0)
    try:
        for _ in range(2400):
            time.sleep(0.02)
            if out.exists() and len(record.load(out)["results"]) >= 2:  # valid whenever it is looked at
                break
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    rec = record.load(out)
    assert len(rec["results"]) >= 2 and not rec["complete"] and rec["finished"] is None
    assert rec["stopped"] == "still running, or killed"
    assert "incomplete: still running, or killed" in report.terminal(rec)


def test_a_run_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    made = [provider("ours"), provider("reference, eager")]
    first = run(tmp_path, monkeypatch, made, "batch")
    cut = copy.deepcopy(first)
    rows = {r["provider"]: r for r in cut["results"]}
    cut["results"] = [r for r in cut["results"] if r["provider"] == "ours"]
    stamp = cut["results"][0]["median_ms"]
    empty = [record.empty_row(**{n: rows[p.name][n] for n in (*record.KEY, "shape")}) for p in made]
    cut["active"] = {"group": "training, batch, float32", "until": 0, "rows": empty}
    out = tmp_path / "cut.json"
    record.save(out, cut)
    options = runner.Options(tiny=True, threads=1, filter="batch", resume=True)
    runner.Run(options, out, say=lambda text: None).go()
    again = record.load(out)
    assert again["results"][0]["median_ms"] == stamp
    dead = [r for r in again["results"] if r["provider"] == "reference, eager"]
    assert [(r["status"], r["reason"]) for r in dead] == [("failed", "the process ended in it")]


def test_a_lost_gpu_ends_the_process_behind_the_row_that_lost_it(tmp_path, monkeypatch):
    """gpu_report then starts another, which goes on behind it."""

    def lose(*_):
        monkeypatch.setattr(runner.Run, "tidy", lambda self: lose())  # as `synchronize` does from then on
        raise RuntimeError("an illegal memory access was encountered")

    lost = Provider("lost", "select", "", lose, None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path, monkeypatch, [lost, provider("ours", "select")], "select")
    rec = record.load(tmp_path / "0.json")
    assert [(r["provider"], r["status"]) for r in rec["results"]] == [("lost", "failed")]
    assert "illegal memory access" in rec["results"][0]["reason"]
    assert rec["active"] is None and not rec["complete"]


def test_filter_and_minutes(tmp_path, monkeypatch):
    rec = run(tmp_path, monkeypatch, filter="open-images .*ours float32 (full|step)")
    assert {(r["provider"], r["case"], r["mode"]) for r in rec["results"] if r["op"] == "training"} == {
        ("ours", "open-images", "full"), ("ours", "open-images", "step")
    }  # fmt: skip
    late = run(tmp_path, monkeypatch, minutes=1e-6)
    assert not late["complete"] and late["results"] == [] and "time limit" in late["stopped"]
    assert {g["status"] for g in late["groups"]} == {"skipped"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--filter", "("], "expected a regular expression"),
        (["--minutes", "0"], "expected a number > 0"),
        (["--fail-on-regression", "5"], "expected together with --compare"),
        (["--with", "x.json"], "expected together with --compare"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- verification


def spoiled(what: str):
    """Ours with a planted fault."""

    def build(context, problem, dtype):
        job = provider("ours").build(context, problem, dtype)
        plain = job.result

        def result():
            got = plain()
            if what == "loss":
                got["loss"] = got["loss"] * 1.001
            elif what == "gradient":
                got["w_dec"] = [g * 1.001 for g in got["w_dec"]]
            elif what == "missing":
                got["pre_bias"] = [None for _ in got["pre_bias"]]
            elif what == "nan":
                got["w_enc"] = [g * float("nan") for g in got["w_enc"]]
            return got

        job.result = result
        return job

    return Provider(f"planted {what}", "training", "", build, check_training)


def test_planted_wrong_providers_are_refused_and_not_timed(tmp_path, monkeypatch):
    faults = ("loss", "gradient", "missing", "nan")
    made = [*(spoiled(what) for what in faults), provider("ours"), provider("reference, eager")]
    rec = run(tmp_path, monkeypatch, made, "open-images.*float32")
    rows = {r["provider"]: r for r in rec["results"] if r["mode"] == "full"}
    for what, wrong in zip(faults, ("loss", "w_dec", "pre_bias", "w_enc"), strict=True):
        row = rows[f"planted {what}"]
        assert row["status"] == "wrong" and row["verified"] is False and row["median_ms"] is None, row
        assert f"{wrong}: error" in row["reason"]
        assert sum(r["provider"] == f"planted {what}" for r in rec["results"]) == 1
    assert rows["ours"]["status"] == rows["reference, eager"]["status"] == "ok"
    assert "WRONG" in report.terminal(rec)


@pytest.mark.parametrize("fault", ["worse", "twice", "outside"])
def test_a_planted_wrong_selection_is_refused(tmp_path, monkeypatch, fault):
    def build(context, problem, dtype):
        job = provider("torch.topk", "select").build(context, problem, dtype)
        plain = job.result

        def result():
            ids = plain().clone()
            if fault == "worse":
                ids[3] = (ids[3] + 1) % problem.case.shape.N
            elif fault == "twice":
                ids[3, 1] = ids[3, 0]
            else:
                ids[3, 0] = problem.case.shape.N
            return ids

        job.result = result
        return job

    bad = Provider("planted", "select", "", build, check_selection)
    rec = run(tmp_path, monkeypatch, [bad, provider("ours", "select")], "select")
    said = {r["provider"]: r["status"] for r in rec["results"]}
    assert said == {"planted": "wrong", "ours": "ok"}


def test_tolerance_follows_what_torch_is_off_in_that_precision():
    plain = {"loss": 1e-3}
    assert verification.judge({"loss": 2e-3}, plain, "bfloat16", None).verified
    assert not verification.judge({"loss": 7e-3}, plain, "bfloat16", None).verified
    assert not verification.judge({"loss": 3e-3}, {"loss": 1e-7}, "float32", None).verified
    assert not verification.judge({"loss": float("nan")}, plain, "float32", None).verified


def test_a_step_that_is_too_large_for_float64_is_verified_at_a_twin(tmp_path, monkeypatch):
    small = cost.Shape(16, 64, 8, (24, 16, 16), auxk=8, dead=6)
    monkeypatch.setattr(runner, "twin", lambda s, device: small if s.N == 128 else s)
    rec = run(tmp_path, monkeypatch, [provider("ours"), spoiled("loss")], "open-images.*float32")
    rows = {r["provider"]: r for r in rec["results"] if r["mode"] == "full"}
    assert rows["planted loss"]["status"] == "wrong"
    assert rows["ours"]["status"] == "ok" and rows["ours"]["shape"]["N"] == 128
    assert rows["ours"]["verification"]["at"]["N"] == 64


def test_the_truth_does_not_depend_on_how_many_rows_it_takes_at_once(monkeypatch):
    case = cases.TINY["open-images"]
    whole = verification.Truth(cases.Problem(case, "cpu"))._step(torch.float64, "float32")
    monkeypatch.setitem(cases.CHUNK, "cpu", 8 * case.shape.N * case.shape.S * (case.shape.S + 4) * 3)
    problem = cases.Problem(case, "cpu")
    assert problem.rows_at_once(case.shape.S * (case.shape.S + 4)) == 3
    parts = verification.Truth(problem)._step(torch.float64, "float32")
    assert max(verification.distances(parts, whole).values()) < 1e-12


def test_a_known_gpu_is_given_the_time_of_its_model(tmp_path, monkeypatch):
    """Rows and profiles of a GPU, on a stand-in for its name."""
    gpu = cost.GPUS["H200"]
    monkeypatch.setattr(runner.Run, "gpu", gpu)
    rec = run(tmp_path, monkeypatch, [provider("ours"), provider("ours, training_step")], "^open-images.*float32")
    case = cases.TINY["open-images"].cost_shape("float32")
    row = next(r for r in rec["results"] if r["mode"] == "full")
    seconds = cost.step_seconds(cost.step(case), gpu, False)
    assert row["predicted_ms"] == pytest.approx(1e3 * seconds, rel=1e-4)
    said = report.terminal(rec)
    assert 0 < row["roofline_ms"] < row["predicted_ms"] and "over the model's time" in said
    assert [(p["provider"], p["mode"]) for p in rec["profiles"]] == [
        ("ours", "full"), ("ours, training_step", "step")
    ]  # fmt: skip
    for p, op in zip(rec["profiles"], (cost.step(case), cost.step(case, direct=True)), strict=True):
        model = p["modelled"]
        assert p["reason"] is None
        assert model["gpu"] == "H200" and model["modelled_ms"] == pytest.approx(1e3 * op.seconds(gpu), rel=1e-4)
        assert sum(r["launches"] for r in model["ops"]) == op.launches
        select = next(r for r in model["ops"] if "select" in r["operators"])
        assert select["measured_ms"] == next(part["ms"] for part in p["parts"] if part["name"] == "select")
    assert "measured (modelled for H200): centre" in said


def test_every_operation_of_the_model_is_set_beside_an_operator():
    shapes = [c.cost_shape(t) for c in cases.CASES.values() for t in ("float32", "bfloat16 autocast")]
    names = {op.name.split(" (")[0] for s in shapes for how in (False, True) for op in cost.ops_of(s, how).values()}
    assert names == set(modelled.DOING)
    assert {name for some in modelled.DOING.values() for name in some} <= {*OPERATORS, "torch"}


@pytest.mark.parametrize("name", list(cases.CASES))
def test_every_named_case_has_a_twin_within_reach(name):
    s = verification.twin(cases.CASES[name].shape, torch.device("cpu"))
    flops = 2 * s.B * s.N * s.D * (3 + 3 * s.S)
    assert flops <= verification.FLOPS["cpu"] and s.k <= s.N
    whole = cases.CASES[name].shape
    assert (s.d_streams, s.k) == (whole.d_streams, whole.k)


def test_a_step_without_gradients_is_verified_by_its_moments(tmp_path, monkeypatch):
    direct = provider("ours, training_step")
    rec = run(tmp_path, monkeypatch, [direct], "open-images.*float32")
    (row,) = [r for r in rec["results"] if r["op"] == "training"]
    assert row["mode"] == "step" and row["verified"] and row["predicted_ms"] is None
    assert set(row["verification"]["errors"]) == {"loss", "w_enc", "w_dec", "pre_bias", "latent_bias"}
    problem = cases.Problem(cases.TINY["open-images"], "cpu")
    start = [w.clone() for w in problem.tensors.w_decs]
    job, truth = direct.build(CONTEXT, problem, "float32"), verification.Truth(problem)
    assert all(map(torch.equal, start, problem.tensors.w_decs)), "the next one computes with the same weights"
    made = job.result()
    for name in ("w_enc", "w_dec", "pre_bias", "latent_bias"):
        spoiled = {**made, name: [1.001 * g for g in made[name]]}
        errors, plain = direct.check(truth, "float32", spoiled)
        assert [n for n, e in errors.items() if e > 2 * plain[n] + verification.FLOOR["float32"]] == [name]


# ------------------------------------------------------------------------------------------------------ order and turns


def test_slow_providers_come_last_and_take_turns_with_ours(tmp_path, monkeypatch):
    """The compiled reference is built when every row of what is ready is in the file."""
    seen = {}
    plain = provider("reference, eager")

    def build(context, problem, dtype):
        (file,) = tmp_path.glob("*.json")
        seen[problem.case.name, dtype] = {r["case"] for r in record.load(file)["results"]}
        job = plain.build(context, problem, dtype)
        job.host_ms = {"forward": 1.0, "backward": 2.0, "optimizer": 4.0}
        return job

    slow = replace(plain, name="reference, compiled", build=build, setup_s=45)
    rec = run(tmp_path, monkeypatch, [slow, provider("ours"), plain], "^(openai|batch) .*float32")
    assert all(rows == {"openai", "batch"} for rows in seen.values()) and len(seen) == 2
    providers_in_order = [r["provider"] for r in rec["results"]]
    assert providers_in_order.index(slow.name) == len(providers_in_order) - 8
    for r in rec["results"]:
        slowly = r["provider"] == slow.name
        assert r["interleaved"] and (r["ours_ms"] or 0) > 0 if slowly else r["ours_ms"] is None
        total = {"forward": 1.0, "backward": 2.0, "full": 3.0, "step": 7.0}[r["mode"]]
        assert r["host_ms"] == (total if slowly else None)
    assert "x" in next(line for line in report.terminal(rec).splitlines() if slow.name in line)
    alone = run(tmp_path, monkeypatch, [replace(slow, build=plain.build)], "^batch")
    assert {(r["interleaved"], r["ours_ms"]) for r in alone["results"]} == {(False, None)}


def test_rows_are_written_as_each_provider_ends(tmp_path, monkeypatch):
    seen = []

    def look():
        (file,) = tmp_path.glob("*.json")
        seen.append([r["provider"] for r in record.load(file)["results"]])

    def ceiling(name, work, reset):
        return Provider(name, "ceiling", "", lambda *_: timing.Job({"forward": work}, reset), None)

    one = ceiling("GEMM", lambda: burn(0.02), lambda: None)
    other = ceiling("copy", lambda: None, look)  # which looks outside the clock, and so never has its seconds
    run(tmp_path, monkeypatch, [one, other], clock="cpu")
    assert seen[0] == [] and seen[-1] == ["GEMM"]


# ----------------------------------------------------------------------------------------------------------- comparison


def burn(seconds: float) -> None:
    """Of this process' CPU time: what else the machine does makes no difference."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def slowed(factor: float):
    def build(context, problem, dtype):
        job = provider("ours").build(context, problem, dtype)
        job.phases = {"forward": lambda: burn(0.02 * factor), "backward": lambda: burn(0.01 * factor)}
        return job

    return Provider("ours", "training", "", build, None)


def test_a_planted_twofold_slowdown_is_caught(tmp_path, monkeypatch, capsys):
    files = []
    for i, factor in enumerate((1, 1, 2)):
        rec = run(tmp_path, monkeypatch, [slowed(factor)], "open-images.*float32", seconds=0.1, clock="cpu")
        files.append(tmp_path / f"run{i}.json")
        record.save(files[-1], rec)
    old, same, slow = map(record.load, files)
    assert {r.verdict for r in compare.compare(old, same)} == {"same"}
    assert {r.verdict for r in compare.compare(old, slow)} == {"slower"}
    assert {r.verdict for r in compare.compare(slow, old)} == {"faster"}
    arguments = ["--compare", str(files[0]), "--fail-on-regression", "20", "--with"]
    assert cli.main([*arguments, str(files[1])]) == 0
    assert cli.main([*arguments, str(files[2])]) == 1
    assert "3 rows slower by more than 20 %" in capsys.readouterr().out
    assert cli.main(["--compare", str(files[0]), "--fail-on-regression", "500", "--with", str(files[2])]) == 0


def row(median=10.0, noise=0.01, **more):
    known = {
        "op": "training", "case": "a", "data": "gaussian", "provider": "ours", "mode": "full", "dtype": "float32",
        "status": "ok", "shape": {"B": 1}, "reason": None,
    }  # fmt: skip
    spread = {"p20_ms": median * (1 - noise), "p80_ms": median * (1 + noise)}
    return {**known, "median_ms": median, "noise": noise, **spread, **more}


def records_of(old: list[dict], new: list[dict], **changes):
    env = {"device": "cpu", "device_name": "x", "cores": 2, "threads": 2}
    made = [
        {
            "environment": dict(env),
            "settings": {"method": 1, "clock": "wall", "seed": 0, "tiny": False},
            "results": rows,
        }
        for rows in (old, new)
    ]
    made[1]["environment"].update(changes)
    return made


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(10), row(10.5), "same"),
        (row(10), row(11), "slower"),
        (row(10), row(9), "faster"),
        (row(10, 0.1), row(11.5, 0.1), "same"),
        (row(10, 0.3), row(20, 0.3), "slower"),  # twice is seen through 60 % of noise: the spreads are apart
        (row(10, 0.3), row(16, 0.3), "too noisy"),
        (row(10), row(10, shape={"B": 2}), "not comparable"),
        (row(10), row(10, status="wrong", reason="w_dec"), "missing"),
        (row(10, status="failed", reason="?"), row(10), "new"),
    ],
)
def test_verdicts(old, new, verdict):
    assert [r.verdict for r in compare.compare(*records_of([old], [new]))] == [verdict]


def official(median, **more):
    return row(median, provider="official SPARC", **more)


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([row(10), official(50)], [row(11.5), official(57)], "same"),  # the machine is slower, so say the peers
        ([row(10), official(50)], [row(11.5), official(43)], "same"),  # or cannot hold still
        ([row(10), official(50)], [row(20), official(57)], "slower"),  # twice is more than that
        ([row(10), official(50)], [row(11.5), official(50)], "slower"),
        ([row(10), official(50, case="b")], [row(11.5), official(57, case="b")], "slower"),  # another case
        ([row(10), official(50, data="real")], [row(11.5), official(57, data="real")], "slower"),
        ([row(10), official(50, dtype="tf32")], [row(11.5), official(57, dtype="tf32")], "slower"),
        ([row(10), row(5, provider="copy", op="ceiling", mode="forward", dtype="tf32")],
         [row(11.5), row(5.7, provider="copy", op="ceiling", mode="forward", dtype="tf32")], "same"),
        ([row(10), row(50, mode="step")], [row(11.5), row(57, mode="step")], "slower"),  # ours is no control
        ([row(10), official(50)], [row(11.5), official(57, status="wrong", reason="w_dec")], "slower"),
    ],
)  # fmt: skip
def test_what_the_machine_changed_is_not_ours(old, new, verdict):
    """Rows of code that did not change, timed in turns with ours, show what another machine does to all."""
    verdicts = {r.key: r.verdict for r in compare.compare(*records_of(old, new))}
    assert verdicts[record.key(old[0])] == verdict


def test_a_ceiling_that_changed_is_the_machine():
    old, new = (row(ms, provider="copy", op="ceiling", mode="forward") for ms in (10, 15))
    rows = compare.compare(*records_of([old], [new]))
    assert [r.verdict for r in rows] == ["machine"] and not compare.regressions(rows, 10)


def test_memory_of_an_optimizer_step_is_judged_by_that_of_others():
    """What follows the backward is bound by memory: its change is allowed for its part of the step and no more."""
    old = [row(10), row(15, mode="step"), official(50), official(60, mode="step")]
    moved = [official(50), official(64, mode="step")]  # 10 -> 14 ms after the backward: 40 %
    for step, verdict in ((17, "same"), (18.5, "slower")):  # a third of our step: 13 % and 7 % of noise
        new = [row(10), row(step, mode="step"), *moved]
        ours = {r.key[4]: r for r in compare.compare(*records_of(old, new)) if r.key[3] == "ours"}
        assert ours["step"].verdict == verdict and ours["full"].verdict == "same"
        assert ours["full"].noise < 0.15, "the optimizer's memory says nothing of the backward"
    text = compare.report(*reports_of(old, new))
    assert "2 controls" in text and "optimizer" in text


def reports_of(old, new):
    made = records_of(old, new)
    for each in made:
        each["environment"].update(commit="0" * 40, dirty=False, versions={}, date="2026-01-01T00:00")
        each["complete"] = True
    return (*made, compare.compare(*made))


def test_who_is_ours_is_known_to_the_comparison():
    """Every provider that runs the package's own operators, and no other, is judged and not a control."""
    plain = {"reference, eager", "reference, compiled", "reference, max-autotune", "torch.topk", "embedding_bag"}
    plain |= {"Adam, fused", "Adam, foreach", "GEMM", "copy", "gather"}
    assert {p.name for p in providers.own()} - plain == set(compare.OURS)


def test_rows_and_machines_that_do_not_match():
    a, b = row(case="a"), row(case="b")
    assert {r.key[1]: r.verdict for r in compare.compare(*records_of([a], [b]))} == {"a": "missing", "b": "new"}
    rows = compare.compare(*records_of([a], [a], device_name="y"))
    assert rows[0].verdict == "not comparable" and "device_name differs" in rows[0].reason
    broken = compare.compare(*records_of([a], [row(case="a", status="wrong", reason="w_dec")]))
    assert compare.regressions(broken, 10), "a row that is wrong now is a regression"
    assert not compare.regressions(compare.compare(*records_of([a], [b])), 10), "a row that was left out is none"


# ------------------------------------------------------------------------------------------------------- what is timed


def test_timing_adds_up_phases_and_takes_turns():
    job = timing.Job({"forward": lambda: time.sleep(0.004), "backward": lambda: time.sleep(0.002)})
    timer, samples = timing.Timer("cpu"), timing.Samples()
    for _ in range(4):
        timer.round(job, samples, 2)
    assert list(job.of_modes()) == ["forward", "backward", "full"] and samples.rounds == [2] * 4
    parts = {mode: samples.summary(names) for mode, names in job.of_modes().items()}
    assert parts["full"]["n"] == 8 and parts["full"]["rounds"] == 4 and len(parts["full"]["round_ms"]) == 4
    assert parts["forward"]["median_ms"] >= 4 and parts["backward"]["median_ms"] >= 2
    assert parts["full"]["p20_ms"] >= 6 and 0 <= parts["full"]["noise"] < 10
    one = timing.Samples()
    timer.round(job, one)
    assert one.summary(("forward",))["noise"] >= timing.FEW


def test_noise_sees_drift_between_rounds():
    samples = timing.Samples({"forward": [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]}, [2, 2, 2])
    assert samples.summary(("forward",))["noise"] > 0.2


def test_the_cpu_clock_counts_work_and_not_waiting():
    job = timing.Job({"forward": lambda: time.sleep(0.02), "backward": lambda: sum(range(400_000))})
    timer, samples = timing.Timer("cpu", clock="cpu"), timing.Samples()
    for _ in range(3):
        timer.round(job, samples, 3)
    assert max(samples.phases["forward"]) < 10 < 20 * min(samples.phases["backward"])
    samples.others = [0.9]
    assert samples.summary(("backward",))["noise"] < 0.9, "others do not lengthen it directly"
    samples.own_clock = False
    assert samples.summary(("backward",))["noise"] >= 0.9


def test_rounds_that_others_disturbed_are_repeated(monkeypatch):
    shares = iter([0.0, 0.9, 0.0, 0.01])  # waiting, a round, waiting, the round again
    monkeypatch.setattr(timing.CpuContention, "share", lambda self: next(shares))
    timer, samples = timing.Timer("cpu", patience=60), timing.Samples()
    ran = []
    timer.round(timing.Job({"forward": lambda: ran.append(1)}), samples, 2)
    assert len(ran) == 4 and samples.others == [0.01] and samples.rounds == [2]
    assert 0 < timer.patience < 60
    monkeypatch.setattr(timing.CpuContention, "share", lambda self: 0.9)
    timer.patience = 0.5
    timer.round(timing.Job({"forward": lambda: ran.append(1)}), samples, 2)
    assert samples.others == [0.01, 0.9] and timer.patience <= 0


def test_peak_memory_on_a_cpu():
    held = []

    def forward():
        held.append(torch.empty(4 * 2**20, dtype=torch.uint8))
        torch.empty(8 * 2**20, dtype=torch.uint8)

    def backward():
        torch.empty(2 * 2**20, dtype=torch.uint8)

    peaks = timing.Timer("cpu").peaks(timing.Job({"forward": forward, "backward": backward}, held.clear))
    assert {mode: round(size / timing.MIB) for mode, size in peaks.items()} == {
        "forward": 12,
        "backward": 6,
        "full": 12,
    }


class SimulatedGPU:
    """Work in order behind a host that takes time to launch it; milliseconds."""

    def __init__(self, monkeypatch):
        self.host = self.done = 0.0
        self.spins = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.done, gpu.host)

            def elapsed_time(self, end):
                return end.at - self.at

        def spin(n):
            self.spins.append(n / gpu_timer.CYCLES)
            self.work(n / gpu_timer.CYCLES)

        def synchronize():
            self.host = max(self.host, self.done)

        for name, fake in {
            "Event": Event, "synchronize": synchronize, "_sleep": spin, "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 5 * timing.MIB, "max_memory_allocated": lambda: 8 * timing.MIB,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake, raising=False)
        monkeypatch.setattr(gpu_timer, "time", SimpleNamespace(perf_counter=lambda: self.host / 1e3))
        self.timer = timing.Timer("cpu")
        self.timer.cuda = True

    def work(self, ms, launch=0.0):
        self.host += launch
        self.done = max(self.done, self.host) + ms


def test_launches_cost_nothing_in_gpu_time_and_the_hosts_time_is_kept(monkeypatch):
    """30 launches of 0.1 ms each for 0.01 ms of work: an eager step as the host sees it."""
    gpu, samples = SimulatedGPU(monkeypatch), timing.Samples()

    def launches(n):
        return lambda: [gpu.work(0.01, 0.1) for _ in range(n)]

    phases = {"forward": launches(30), "backward": launches(20)}
    job = timing.Job(phases, queued=True)
    gpu.timer.round(job, samples, 3)
    assert samples.phases["forward"] == pytest.approx([0.3] * 3)
    assert samples.phases["backward"] == pytest.approx([0.2] * 3)
    assert job.host_ms == pytest.approx({"forward": 3.0, "backward": 2.0})
    assert gpu.spins == pytest.approx([2 * 5.0] * 3)
    eager, samples = timing.Job(phases, queued=False), timing.Samples()
    gpu.timer.round(eager, samples, 3)
    assert len(gpu.spins) == 3 and eager.host_ms == pytest.approx(job.host_ms)
    assert samples.phases["forward"][-1] > 2.5, "a step's launches are part of its time"
    waits = timing.Job({"forward": lambda: gpu.work(0.01, 1e4)}, queued=True)
    gpu.timer.round(waits, timing.Samples())
    assert gpu.spins[-1] == pytest.approx(gpu_timer.LONGEST_COVER)


def test_cuda_peak_memory(monkeypatch):
    timer = SimulatedGPU(monkeypatch).timer
    job = timing.Job({"forward": lambda: None, "backward": lambda: None})
    assert timer.peaks(job) == dict.fromkeys(("forward", "backward", "full"), 3 * timing.MIB)
    job.captured_peak = 7
    assert set(timer.peaks(job).values()) == {7}


def test_cases_are_the_shapes_that_people_run():
    shapes = {name: (c.shape.B, c.shape.N, c.shape.k, c.shape.D, c.shape.S) for name, c in cases.CASES.items()}
    assert shapes["open-images"] == (256, 8192, 64, 2560, 3) and shapes["coco"] == (256, 8192, 64, 1792, 3)
    assert shapes["openai"] == (16384, 32768, 32, 768, 1) and shapes["sparsify"] == (16384, 131072, 192, 4096, 1)
    assert shapes["stress"] == (4096, 344064, 32, 2688, 1) and shapes["stress-1M"] == (4096, 2**20, 32, 2688, 1)
    assert {cases.CASES[name].shape for name in ("batch", "giant", "crosscoder-8", "stress-1M")} == {
        cost.CASES[name] for name in "BCDE"
    }
    for device in ("cpu", "cuda"):
        for axis in plan.AXES:
            series = cases.sweep(device, axis)
            assert len(series) >= 4 and len({c.name for c in series}) == len(series)
            assert all(c.sweep == axis for c in series)


def test_every_group_of_every_plan_is_named_once():
    for device in ("cpu", "cuda"):
        for quick in (True, False):
            names = [str(g) for g in runner.plan(runner.Options(device, quick))]
            assert len(names) == len(set(names)) > 2
    groups = runner.plan(runner.Options("cuda", quick=True))
    cases_in_order = list(dict.fromkeys(g.case.name for g in groups))
    assert cases_in_order[:3] == ["open-images", "batch", "bionemo-21k"]
    assert [g.op for g in groups if g.case.name == "open-images"][:8] == [
        *["training"] * 4,
        *["select"] * 2,
        *["ceiling"] * 2,
    ]
    slow = [g.slow for g in groups]
    assert slow == sorted(slow), "nothing slow to set up comes before what is ready"


def test_models_of_what_is_timed_exist_for_every_case():
    """Fractions of the roofline need one; on the data sheet's GPU and on rates that a run measured."""
    for c in cases.CASES.values():
        for p in providers.own():
            op = p.model(c.cost_shape("bfloat16" if "bfloat16" in p.dtypes else "float32")) if p.model else None
            if op is not None:
                assert modelled.roofline_seconds(op, cost.GPUS["H200"]) > 0
            assert op is not None or p.name not in ("ours", "GEMM", "copy") or p.op in ("encode", "decode")


@pytest.mark.parametrize("kind", data.KINDS)
def test_tensors_are_seeded_unit_norm_and_exact_in_bfloat16(kind):
    case = cases.Case("x", cost.Shape(48, 512, 16, (160, 128, 192), auxk=8, dead=50), data=kind)
    one, two = (cases.Problem(case, "cpu", seed=3) for _ in range(2))
    for a, b in zip(one.tensors[:5], two.tensors[:5], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) and torch.equal(x, x.bfloat16().float())
    for w in one.tensors.w_decs:
        assert w.stride(0) == 1
        torch.testing.assert_close(w.norm(dim=0), torch.ones(512), atol=2e-3, rtol=0)  # 2^-9 is bfloat16's rounding
    if kind == "gaussian":
        for x in one.tensors.xs:
            torch.testing.assert_close(x.norm(dim=1), torch.ones(48), atol=2e-3, rtol=0)
    model, x = one.model(torch.float32), one.inputs(torch.float32)
    assert [int(d.sum()) for d in model.get_dead_neurons().values()] == [50] * 3
    start = [counter.clone() for counter in model.buffers()]
    for _ in range(2):
        outputs = model(x)
        assert not any(map(torch.equal, model.buffers(), start)), "the forward moves counters"
        one.reset(model)
        assert all(map(torch.equal, model.buffers(), start))
    assert outputs.indices.shape == (48, 16)
    assert one.counters.gt(1000).sum() == 50


def test_real_statistics_are_those_of_the_trained_model():
    """An extended row has the trained model's pre-activations, divided by sqrt(places)."""
    import numpy as np

    with np.load(data.FILE) as file:
        kept = {name: torch.from_numpy(file[name]).double() for name in file.files}
    widths = [kept[f"x{i}"].shape[1] for i in range(3)]
    n = kept["w_enc0"].shape[0]
    s = cost.Shape(64, n, 16, tuple(widths))  # one place, no mixtures: the model itself, its latents in another order
    t = data.real(s, torch.device("cpu"), seed=0)
    for i in range(3):
        h = reference.preactivations(t.xs[i], t.w_encs[i], t.pre_biases[i], t.latent_biases[i]).double()
        all_h = reference.preactivations(*(kept[f"{name}{i}"] for name in ("x", "w_enc", "pre_bias", "latent_bias")))
        want = all_h.sort(1).values
        nearest = torch.cdist(h.sort(1).values, want).min(1).values / want.norm(dim=1).mean()
        assert nearest.max() < 0.02, "a row's pre-activations are not those of any row of the data"
    wide = data.real(cost.Shape(64, 4 * n, 32, tuple(2 * w for w in widths)), torch.device("cpu"), seed=0)
    top = sum(
        reference.preactivations(*args)
        for args in zip(wide.xs, wide.w_encs, wide.pre_biases, wide.latent_biases, strict=True)
    )

    def tail(h):
        return float(((h - h.mean()) ** 4).mean() / h.var() ** 2)

    assert tail(top) > 4, "trained pre-activations have heavier tails than normal ones (3)"


def test_shapes_narrower_than_the_real_rows_are_refused():
    with pytest.raises(ValueError, match="real statistics: real rows of stream 0 have width"):
        data.real(cost.Shape(4, 64, 4, (32,)), torch.device("cpu"), 0)


def test_the_reference_selects_with_torchs_topk_only_inside():
    before = reference.topk_indices
    with verification.library_topk():
        assert reference.topk_indices is not before
    assert reference.topk_indices is before


# --------------------------------------------------------------------------------------------------------- what is made


def test_plots_are_drawn_from_the_record_alone(made, tmp_path):
    pytest.importorskip("matplotlib")
    rec = json.loads(made[0].read_text())
    rows = record.ok(rec, op="training", case="batch", mode="full")
    for i, n in enumerate((256, 512, 1024), 1):
        for r in rows:
            times = {name: r[name] * i for name in ("p20_ms", "median_ms", "p80_ms")}
            rec["results"].append({**r, **times, "case": f"N {n}", "sweep": "N", "shape": {**r["shape"], "N": n}})
    path = tmp_path / "swept.json"
    record.save(path, rec)
    files = plot.draw(path, tmp_path / "plots")
    assert {f.name for f in files} == {
        f"swept_{kind}.{end}" for kind in ("scaling", "speedup", "breakdown") for end in ("png", "svg")
    }
    assert all(f.stat().st_size > 5000 for f in files)
    bare = {**rec, "results": [], "profiles": []}
    record.save(path, bare)
    assert plot.draw(path, tmp_path / "none") == []


def test_readme_and_results_are_what_the_records_say(tmp_path, capsys):
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"
    copied = tmp_path / "root"
    (copied / "benchmarks").mkdir(parents=True)
    folder = copied / "benchmarks" / "results"
    folder.mkdir()
    for name, _ in report.records():
        shutil.copy(report.RESULTS / name, folder)
    shutil.copytree(ROOT / "docs", copied / "docs")
    shutil.copy(ROOT / "README.md", copied)
    assert report.stale(copied) == []
    path = next(folder.glob("*.json"))
    rec = record.load(path)
    changed = next(r for r in rec["results"] if r["op"] == "training" and r["mode"] == "full" and r["status"] == "ok")
    changed["median_ms"] = changed["p80_ms"] = changed["p80_ms"] * 1.5
    record.save(path, rec)
    assert report.stale(copied) == ["README.md", "results.md"]
    (copied / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match=r"README.md: expected the markers"):
        report.stale(copied)


def test_a_filter_takes_every_spelling():
    group = SimpleNamespace(case=SimpleNamespace(name="c", data="d"), op="training", dtype="bfloat16 autocast")
    for pattern, modes in (("bf16", ["full"]), ("ours bfloat16 autocast", ["full"]), ("fp32", [])):
        run = SimpleNamespace(pattern=re.compile(pattern))
        assert runner.Run._wanted(run, group, SimpleNamespace(name="ours"), ["full"]) == modes


@pytest.mark.parametrize("checkout", [True, False])
def test_a_record_that_was_just_made_makes_no_text_stale(tmp_path, checkout):
    """Texts are of the records that git tracks; without git, of those that they name."""
    (tmp_path / "benchmarks").mkdir()
    folder = tmp_path / "benchmarks" / "results"
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    names = [name for name, _ in report.records()]
    folder.mkdir()
    for name in names:
        shutil.copy(report.RESULTS / name, folder)
    if checkout:
        for command in (["init", "-q"], ["add", "benchmarks"]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    newer = {**record.load(folder / names[-1]), "started": "2999-01-01T00:00:00+00:00"}
    record.save(folder / "user_made.json", newer)
    assert report.stale(tmp_path) == []
    assert [name for name, _ in report.records(folder)] == names + ["user_made.json"] * (not checkout)
    if checkout:
        subprocess.run(["git", "-C", str(tmp_path), "add", "benchmarks"], check=True)
        assert report.stale(tmp_path) == ["README.md", "results.md"]


def test_pytest_benchmark_runs_the_same_cases(tmp_path, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "pytest.json"
    command = ["-q", "-p", "no:cacheprovider", "benchmarks", f"--benchmark-json={out}"]
    command += ["-k", "open-images and training and (ours or eager)"]  # with training_step
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # not a worker of this run
    monkeypatch.chdir(ROOT)
    assert pytest.main(command) == 0
    rec = json.loads(out.read_text())
    assert len(rec["benchmarks"]) == 3
    assert all(b["stats"]["median"] > 0 and b["extra_info"]["verification"] for b in rec["benchmarks"])
    info = rec["machine_info"]
    assert info["sparc_kernels"]["versions"]["torch"] == torch.__version__ and "node" not in info


def test_ours_is_the_package():
    problem = cases.Problem(cases.TINY["batch"], "cpu")
    model = problem.model(torch.float32)
    assert isinstance(model, AlignedSAE)
    assert torch.equal(model.encoders["s0"].weight, problem.tensors.w_encs[0])
    assert torch.equal(model.decoders["s0"].weight, problem.tensors.w_decs[0])
    assert model.decoders["s0"].weight.stride(0) == 1, "a latent's weights lie side by side"
