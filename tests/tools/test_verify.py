"""`sparc-kernels verify` passes here, its report can be read, and it catches faults that are planted."""

import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch
import warm_process
from fake_graph import FakeCuda

from sparc_kernels import cli, reference
from sparc_kernels.core import _triton
from sparc_kernels.core._triton import INTERPRETED
from sparc_kernels.nn import forward, fused_step, graphed, half_weights, module
from sparc_kernels.ops import adam_update, aligned_loss, dead, decode, decode_grads, encode
from sparc_kernels.tools.verify import judge, problems, suite
from sparc_kernels.tools.verify import pool as run
from sparc_kernels.tools.verify import run as verify
from sparc_kernels.tools.verify.checks import adam as adam_checks
from sparc_kernels.tools.verify.checks import dead as dead_checks
from sparc_kernels.tools.verify.checks import decode as decode_checks
from sparc_kernels.tools.verify.checks import latent_reduce as reduce_checks
from sparc_kernels.tools.verify.checks import routes
from sparc_kernels.tools.verify.checks import shards as shard_checks
from sparc_kernels.tools.verify.launches import launches_of


def command(*words: str) -> subprocess.CompletedProcess:
    device = () if "--interpret" in words else ("--device", "cpu")
    return warm_process.run("-m", "sparc_kernels", "verify", *device, *words)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The process of `verify --quick` and the report that it wrote."""
    file = tmp_path_factory.mktemp("verify") / "verify.json"
    done = command("--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done, json.loads(file.read_text())


@pytest.mark.subprocess
@pytest.mark.slow
def test_command_passes_and_writes_json(quick):
    done, report = quick
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert re.search(r"^\d+ passed, 0 failed, 0 skipped, in \d+ checks, \d+ s$", done.stdout, re.MULTILINE)
    assert report["passed"] is True
    assert {"torch", "triton", "device", "gpu", "commit", "python"} <= set(report["environment"])
    assert all(r["verdict"] == "ok" for r in report["results"])
    for op, word, _ in suite.CHECKS:
        if word in ("autocast", "shadow"):
            assert {r["dtype"] for r in report["results"] if r["op"] == op} == {"fp32"}, op
        elif word not in ("int64", "beside", "library", "graph", "waits"):  # need a GPU
            assert {r["dtype"] for r in report["results"] if r["op"] == op} == {"fp64", "fp32", "bf16"}, op


@pytest.mark.subprocess
def test_json_on_stdout_is_nothing_else():
    done = command("--quick", "--filter", "inverse_index fp32 tiny", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {r["op"] for r in results} == {"inverse_index"}
    assert "inverse_index" in done.stderr  # the table


@pytest.mark.subprocess
def test_worker_processes_give_the_same_results_in_the_same_order(quick, monkeypatch, capsys):
    fork_workers(monkeypatch)
    assert cli.main(["verify", "--device", "cpu", "--quick", "--jobs", "2", "--filter", "decode_nmse", "--json"]) == 0
    alone = [r for r in quick[1]["results"] if "decode_nmse" in r["op"]]

    def names(rows):
        return [(r["op"], r["dtype"], r["case"], r["tensor"]) for r in rows]

    assert names(json.loads(capsys.readouterr().out)["results"]) == names(alone) != []


def fork_workers(monkeypatch):
    """Workers are forked from a process that has imported what they need, where there are such processes."""
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload([run.__name__])
    monkeypatch.setattr(run, "get_context", lambda kind: context)


@pytest.mark.skipif(not verify.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.subprocess
@pytest.mark.interpreter
def test_interpreted_kernels():
    done = command("--interpret", "--quick", "--filter", "decode local fp64 strided")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("decode local +fp64 strided", done.stdout) and "FAIL" not in done.stdout, done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")
@pytest.mark.interpreter
@pytest.mark.parametrize("checks", ["training global fp32 step", "decode local fp64"])
def test_interpreted_checks(checks):
    results = verify.run_checks("cpu", quick=True, interpret=True, filter=checks)
    assert {f"{r.op} {r.dtype}" for r in results} == {" ".join(checks.split()[:3])}
    assert all(r.passed for r in results), [r for r in results if not r.passed]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--filter", "no such check"), "filter: expected a pattern found in some 'op dtype case'"),
        (("--filter", "("), "unterminated"),
        (("--device", "nowhere"), "verify: device: expected auto, cpu, or cuda or cuda:N"),
        (("--interpret", "--device", "cuda"), "leave out --device"),
        (("--arch", "90"), "verify: --arch is for --compile\n"),
        (("--adversarial", "--jobs", "2"), "verify: --jobs is for --compile or the checks\n"),
        pytest.param(
            ("--device", "cuda"),
            "got 'cuda' where PyTorch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_impossible_requests_exit_with_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(verify, "INTERPRETED", False)
    assert cli.main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_numpy_that_breaks_the_interpreter_is_named(monkeypatch, capsys):
    """Every kernel failed with "only 0-dimensional arrays can be converted"."""
    monkeypatch.setattr(_triton, "TRITON_VERSION", (3, 6))
    monkeypatch.setattr(np, "__version__", "2.4.6")
    monkeypatch.setattr(verify, "INTERPRETED", False)
    assert cli.main(["verify", "--interpret"]) == 2
    assert "needs NumPy before 2.4, got 2.4.6" in capsys.readouterr().err
    monkeypatch.setattr(np, "__version__", "2.3.5")
    assert not _triton.interpreter_problem()


def test_interpreter_must_be_chosen_before_the_import(monkeypatch):
    monkeypatch.setattr(verify, "INTERPRETED", False)
    with pytest.raises(ValueError, match="interpret: expected TRITON_INTERPRET=1"):
        verify.run_checks("cpu", interpret=True)


# ----------------------------------------------------------------------------------------------------- limits that bite


@pytest.fixture(scope="module")
def sound(quick):
    return [SimpleNamespace(**r) for r in quick[1]["results"]]


def test_limits_are_a_few_roundings(sound):
    for r in sound:
        if r.max_limit is not None and "selection" not in r.tensor:
            bound = {"fp64": 1e-13, "fp32": 5e-5, "bf16": 0.06}[r.dtype]
            assert r.max_limit < bound, r
            assert r.rms_limit is None or r.rms_limit < bound, r


def test_little_is_left_out_at_the_border_of_relu(sound):
    notes = [re.match(r"(\d+) of (\d+) entries at relu's border", r.note) for r in sound]
    assert any(notes)  # bf16 has some
    shares = [int(m[1]) / int(m[2]) for m in notes if m]
    assert max(shares) <= 0.2
    assert sum(shares) / len(shares) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gapped_data_keep_away_from_zero(dtype):
    case = verify.CPU_CASES[0]
    check = judge.Check("training global", case, dtype, torch.device("cpu"), "torch", problems={})
    p = problems.margin_problem(check)
    exact = p.to(torch.float64).logits()
    for rounded, h in zip(p.logits(), exact, strict=True):
        indices = reference.topk_indices(h, case.k)
        assert torch.equal(rounded.gather(1, indices) > 0, h.gather(1, indices) > 0)
        if dtype != torch.float32:
            assert h.abs().min() > 0
            assert torch.equal(rounded > 0, h > 0)


def test_errors_are_infinite_where_they_cannot_be_compared():
    truth = torch.tensor([1.0, -2.0, math.inf], dtype=torch.float64)
    assert judge.errors(truth.float(), truth) == (0.0, 0.0)
    assert judge.errors(truth[:2], truth) == (math.inf, math.inf)
    assert judge.errors(torch.tensor([1.0, math.nan, math.inf]), truth) == (math.inf, math.inf)
    assert judge.errors(torch.tensor([1.0, -2.0, 5.0]), truth) == (math.inf, math.inf)
    assert judge.errors(torch.tensor([1.5, -2.0, math.inf]), truth)[0] == 0.25


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [
        ([[3, 1], [0, 2]], ""),
        ([[3, 3], [0, 2]], "a latent twice"),
        ([[3, 4], [0, 2]], "outside 0..3"),
        ([[-1, 3], [0, 2]], "outside 0..3"),
        ([[3, 0], [0, 2]], "left out"),  # 1 is larger than 0
        ([[1, 3], [0, 2]], "descending"),
    ],
)
def test_selection_by_value(indices, complaint):
    score = torch.tensor([[0.0, 2.0, 1.0, 3.0], [9.0, 1.0, 5.0, 2.0]], dtype=torch.float64)
    chosen = judge.SelectionJudge(4)
    chosen.judge(score, torch.full_like(score, 0.01), torch.tensor(indices), torch.tensor([[3, 1], [0, 2]]))
    assert complaint in chosen.invalid + chosen.note
    assert bool(complaint) == bool(chosen.invalid + chosen.note)


def test_near_ties_are_no_fault():
    score = torch.tensor([[1.0, 1.001, 0.5]], dtype=torch.float64)
    chosen = judge.SelectionJudge(3)
    chosen.judge(score, torch.full_like(score, 0.001), torch.tensor([[0]]), torch.tensor([[1]]))
    assert not chosen.invalid + chosen.note


# ------------------------------------------------------------------------------------------------------ planted faults


def relu_mask_missing(patch):
    sound = encode.Values.backward

    def backward(ctx, *dvalues):
        values, aux_values, *rest = ctx.saved_tensors
        fired = [v if v is None else torch.ones_like(v) for v in (values, aux_values)]  # the values: all of them
        more = {name: getattr(ctx, name) for name in ("needs_input_grad", "impl", "S")}
        return sound(SimpleNamespace(saved_tensors=[*fired, *rest], **more), *dvalues)

    patch(encode.Values, "backward", staticmethod(backward))


def row_dropped_by_latent_reduce(patch):
    def dropped(coef):
        coef = coef.clone()
        coef.view(len(coef), -1)[0, -1] = 0
        return coef

    patch_sums(patch, lambda coef, mat: (dropped(coef), mat))


def gradient_of_wrong_row(patch):
    patch_sums(patch, lambda coef, mat: (coef, mat.roll(1, 1)))


def patch_sums(patch, faulty):
    """Every sum over a latent's list, with other coefficients or rows."""
    sound, inner, plain = encode.latent_reduce_, decode_grads.reduce_torch, decode.latent_reduce

    def latent_reduce(lists, *rest):
        coef, mat = faulty(lists.coef, lists.mat)
        return plain(lists._replace(coef=coef, mat=mat), *rest)

    def latent_reduce_(*args):
        pairs = [faulty(coef, mat[None]) for coef, mat in zip(args[5], args[8], strict=True)]
        coefs, mats = zip(*pairs, strict=True)
        return sound(*args[:5], torch.stack(coefs), *args[6:8], list(mats), *args[9:])

    def reduce_torch(**named):
        coef, mat = faulty(named["coef"], named["mat"])
        return inner(**{**named, "coef": coef, "mat": mat})

    for where in (decode, reduce_checks):
        patch(where, "latent_reduce", latent_reduce)
    patch(encode, "latent_reduce_", latent_reduce_)
    patch(decode_grads, "reduce_torch", reduce_torch)


def patch_select(patch, faulty):
    sound = encode.select

    def select_each(xs, w_encs, biases, k, ids, count, impl):
        some = [(None, None)] * len(xs) if ids is None else zip(ids, count, strict=True)
        streams = zip(xs, w_encs, biases, some, strict=True)
        return torch.stack([faulty(sound, [x], [w], [c], k, i, n, impl) for x, w, c, (i, n) in streams])

    patch(encode, "select", lambda *args: faulty(sound, *args))
    for where in (encode, dead):
        patch(where, "select_each", select_each)


def one_rank_off(patch):
    def select(sound, xs, w_encs, biases, k, ids, count, impl):
        if ids is not None or k == w_encs[0].shape[0]:
            return sound(xs, w_encs, biases, k, ids, count, impl)
        return sound(xs, w_encs, biases, k + 1, ids, count, impl)[:, 1:].contiguous()

    patch_select(patch, select)


def last_rank_off(patch):
    """The k-th replaced by the one after it: right but for one place."""

    def select(sound, xs, w_encs, biases, k, ids, count, impl):
        if ids is not None or k == w_encs[0].shape[0]:
            return sound(xs, w_encs, biases, k, ids, count, impl)
        selected = sound(xs, w_encs, biases, k + 1, ids, count, impl)
        return torch.cat([selected[:, : k - 1], selected[:, k:]], 1)

    patch_select(patch, select)


def selection_without_latent_bias(patch):
    patch_select(patch, lambda sound, xs, w, biases, *rest: sound(xs, w, [torch.zeros_like(b) for b in biases], *rest))


def ties_to_the_highest(patch):
    def select(sound, xs, w_encs, biases, k, ids, count, impl):
        if ids is not None:
            return sound(xs, w_encs, biases, k, ids, count, impl)
        n = w_encs[0].shape[0]
        return n - 1 - sound(xs, [w.flip(0) for w in w_encs], [b.flip(0) for b in biases], k, None, None, impl)

    patch_select(patch, select)


def ascending_order(patch):
    patch_select(patch, lambda sound, *args: sound(*args).flip(1))


def nan_below_everything(patch):
    def select(sound, xs, w_encs, biases, *rest):
        return sound(xs, w_encs, [torch.where(b.isnan(), -math.inf, b) for b in biases], *rest)

    patch_select(patch, select)


def one_row_selected_twice(patch):
    def select(sound, *args):
        selected = sound(*args)
        selected[-1] = selected[0]
        return selected

    patch_select(patch, select)


def local_selects_globally(patch):
    sound = encode.select_latents

    def select_latents(centred, w_encs, latent_biases, k, topk_type, impl):
        indices = sound(centred, w_encs, latent_biases, k, "global", impl=impl)
        return indices if topk_type == "global" else torch.stack([indices] * len(centred))

    for where in (encode, forward):
        patch(where, "select_latents", select_latents)


def latent_bias_missing_in_values(patch):
    sound = encode.gather_values

    def gather_values(indices, centred, w_encs, latent_biases, *rest):
        return sound(indices, centred, w_encs, [torch.zeros_like(c) for c in latent_biases], *rest)

    patch(encode, "gather_values", gather_values)


def decoder_bias_lost(patch):
    sound = decode.gather_sum
    patch(decode, "gather_sum", lambda indices, values, w, bias, *rest: sound(indices, values, w, None, *rest))


def half_precision_sums(patch):
    """bf16-level error in the dot products of wider types."""
    values, dots = encode.gather_values, decode.gather_dot
    rounded = lambda x: x.bfloat16().to(x.dtype)  # noqa: E731
    patch(encode, "gather_values", lambda i, centred, *rest: values(i, [rounded(x) for x in centred], *rest))
    patch(decode, "gather_dot", lambda indices, w, x, *rest: dots(indices, w, rounded(x), *rest))


def error_in_half_precision(patch):
    sound = decode_grads.decode_grads

    def faulty(*args):
        sq = sound(*args)
        for g in args[12]:  # dbias_rows
            g.copy_(g.bfloat16())
        return sq

    patch(decode_grads, "decode_grads", faulty)


def norm_with_epsilon(patch):
    sound = decode_grads.target_weights

    def target_weights(*args):
        norm, coef = sound(*args)
        return norm + 1e-2, coef

    for where in (decode, aligned_loss):
        patch(where, "target_weights", target_weights)


def dead_mask_ignored(patch):
    sound = dead.select_each
    patch(dead, "select_each", lambda xs, ws, biases, k, ids, count, *rest: sound(xs, ws, biases, k, None, None, *rest))


def counters_at_the_threshold(patch):
    sound = dead_checks.update_counters_
    patch(dead_checks, "update_counters_", lambda c, i, v, threshold: sound(c, i, v, threshold - 1e-6))


def nothing_ever_fires(patch):
    sound = forward.count_fired_
    patch(
        forward, "count_fired_", lambda counters, indices, values, _, impl: sound(counters, indices, values, 1e9, impl)
    )


def unstable_lists(patch):
    sound = reduce_checks.inverse_index

    def inverse_index(indices, n):
        order, offsets, ids = sound(indices, n)
        order = order.clone()
        hot = int((offsets[1:] - offsets[:-1]).argmax())
        order[offsets[hot] : offsets[hot + 1]] = order[offsets[hot] : offsets[hot + 1]].flip(0)
        return type(sound(indices, n))(order, offsets, ids)

    for where in (reduce_checks, adam_checks):
        patch(where, "inverse_index", inverse_index)


def aux_weight_doubled(patch):
    sound = module.AlignedSAE.compute_loss
    patch(
        module.AlignedSAE, "compute_loss", lambda self, outputs, inputs: sound(self, outputs, inputs, auxk_coef=1 / 16)
    )


def clipping_without_the_norm(patch):
    sound = adam_update.grad_square
    patch(adam_update, "grad_square", lambda *args: sound(*args) * 0)


def _without_argument(patch, name):
    sound = adam_update.adam_scalars_
    place = [argument.name for argument in sound._schema.arguments].index(name)
    for where in (adam_update, fused_step):
        patch(where, "adam_scalars_", lambda *args: sound(*args[:place], None, *args[place + 1 :]))


def scale_not_taken_back(patch):
    _without_argument(patch, "grad_scale")


def infinity_stepped_on(patch):
    _without_argument(patch, "found_inf")


def step_without_auxk(patch):
    sound = fused_step._encoder_lists
    patch(fused_step, "_encoder_lists", lambda *args: (sound(*args)[0], None))


def shadow_not_rounded_again(patch):
    sound = half_weights.HalfWeights.of

    def of(self, weights):
        return [[w + 2**-9 for w in pair] for pair in sound(self, weights)]

    patch(half_weights.HalfWeights, "of", of)


def output_left_unwritten(patch):
    sound = encode.pre_bias_grads

    def pre_bias_grads(*args):
        made = sound(*args)
        unwritten = torch.empty_like(made[0])
        made[0][:1] = torch.where(unwritten[:1].isnan(), unwritten[:1], made[0][:1])
        return made

    patch(encode, "pre_bias_grads", pre_bias_grads)


def another_run_other_bits(patch):
    sound, runs = routes._gradients, []

    def gradients(*args):
        runs.append(1)
        first, *rest = sound(*args)
        return [first * (1 + len(runs) * 1e-3), *rest]

    patch(routes, "_gradients", gradients)


def autocast_in_full_precision(patch):
    patch(module, "as_autocast", lambda params: params)


def absent_taken_for_the_first(patch):
    sound = shard_checks.gather_sum
    patch(shard_checks, "gather_sum", lambda indices, *rest: sound(indices.clamp(min=0), *rest))


def candidates_by_position_reversed(patch):
    sound = shard_checks.topk_positions
    patch(shard_checks, "topk_positions", lambda keys, *rest: keys.shape[1] - 1 - sound(keys.flip(1), *rest))


def first_shard_alone_moves_the_pre_bias(patch):
    sound, sums = adam_checks.latent_adam_, []

    def latent_adam_(*args):
        sound(*args)
        for total in args[6]:
            sums.append(total)
            total.zero_() if len(sums) % 3 != 1 else None

    patch(adam_checks, "latent_adam_", latent_adam_)


# the fault, and the checks that must notice it; every other one must go on passing
FAULTS = {
    relu_mask_missing: "values_at|auxk_topk|training",
    row_dropped_by_latent_reduce: "latent_reduce|values_at|decode|auxk_topk|training",
    gradient_of_wrong_row: "latent_reduce|values_at|decode|auxk_topk|training",
    one_rank_off: "encode_topk|exact|training",
    last_rank_off: "encode_topk|exact|training",
    selection_without_latent_bias: "encode_topk|exact|auxk|training",
    ties_to_the_highest: "exact",
    ascending_order: "encode_topk|exact|auxk|training",
    nan_below_everything: "exact",
    one_row_selected_twice: "encode_topk|exact|auxk|training",
    local_selects_globally: "encode_topk local|exact|training local",
    latent_bias_missing_in_values: "encode_topk|exact|values_at|auxk|training",
    decoder_bias_lost: "decode (global|local)",
    half_precision_sums: "encode_topk|values_at|decode (global|local)|auxk|training",
    error_in_half_precision: "decode_nmse|training",
    norm_with_epsilon: "decode_nmse|training",
    dead_mask_ignored: "exact|auxk|training",
    counters_at_the_threshold: "update_counters_",
    nothing_ever_fires: "training",
    unstable_lists: "inverse_index",
    aux_weight_doubled: "training",
    absent_taken_for_the_first: "shard values",
    candidates_by_position_reversed: "shard selection",
    first_shard_alone_moves_the_pre_bias: "adam of shards",
}
ROUTE_FAULTS = {
    clipping_without_the_norm: "clipping",
    scale_not_taken_back: "scaled",
    infinity_stepped_on: "scaled",
    step_without_auxk: "direct",
    shadow_not_rounded_again: "half weights",
    output_left_unwritten: "again|(scaled|direct|half weights)",
    another_run_other_bits: "again|autocast",
    autocast_in_full_precision: "autocast|half weights",
}


def raised(results):
    """Results of checks that an exception ended: such a note says nothing about the fault that was planted."""
    return [r for r in results if re.match(r"[A-Za-z_][\w.]*:", r.note)]


@pytest.mark.parametrize("plant", [*FAULTS, *ROUTE_FAULTS], ids=lambda plant: plant.__name__)
def test_planted_fault_is_caught(plant, monkeypatch):
    plant(monkeypatch.setattr)
    # whole steps, which the routes take, notice what any operator does wrong
    routes_only = plant in ROUTE_FAULTS
    wanted = ROUTE_FAULTS[plant] if routes_only else FAULTS[plant]
    filter = "(routes|mixed)$" if routes_only else "(tiny|strided|k=N)$"
    results = verify.run_checks("cpu", quick=True, filter=filter)
    failed = {r.op for r in results if not r.passed}
    others = {op for op in failed if not re.match(wanted, op)}
    assert failed, "nothing noticed it"
    assert not others, f"noticed by {others}, which it does not concern"
    for alternative in re.sub(r"\(.*\)", "", wanted).split("|"):
        assert any(op.startswith(alternative.split(" ")[0]) for op in failed), f"{alternative} did not notice"
    assert all(r.note for r in results if not r.passed)
    assert not raised(results), f"an exception, not the fault, was noticed: {raised(results)[0].note}"
    if plant is half_precision_sums:
        assert {r.dtype for r in results if not r.passed} == {"fp64", "fp32"}


def test_exception_is_a_failed_row_and_the_rest_goes_on(monkeypatch):
    def decode(*args, **more):
        raise RuntimeError("the kernel\nfell over")

    monkeypatch.setattr(decode_checks, "decode", decode)
    results = verify.run_checks("cpu", quick=True, filter="fp32 tiny")
    failed = [r for r in results if not r.passed]
    assert {r.op for r in failed} == {"decode global", "decode local"}
    assert {r.note for r in failed} == {"RuntimeError: the kernel fell over"}
    assert raised(results) == failed
    assert len({r.op for r in results}) > 10


# ----------------------------------------------------------------------------------------------------- lost processes


def with_planted(monkeypatch, plant, **choice):
    fork_workers(monkeypatch)
    monkeypatch.setattr(run, "work", functools.partial(planted.planted, plant))
    return verify.run_checks("cpu", quick=True, jobs=2, **choice)


@pytest.mark.subprocess
@pytest.mark.slow
def test_two_lost_workers_lose_two_checks(monkeypatch):
    """One loses its device, one dies; the rest of their tasks is done by others, in the order of always."""
    choice = {"filter": "(decode|index|counters).* fp32 (tiny|strided|k=N)"}
    sound = verify.run_checks("cpu", quick=True, **choice)
    results = with_planted(monkeypatch, "lost decode global fp32 tiny;kill decode local fp32 strided", **choice)
    failed = [(r.op, r.case, r.note) for r in results if not r.passed]
    assert failed == [
        ("decode global", "tiny", "RuntimeError: an illegal memory access was encountered"),
        ("decode local", "strided", "its process died (exit code -9)"),
    ]
    lost = {("decode global", "tiny"), ("decode local", "strided")}

    def others(results):
        return [(r.op, r.case, r.tensor, r.max_error) for r in results if (r.op, r.case) not in lost]

    assert others(results) == others(sound) and len(others(sound)) > 30


@pytest.mark.subprocess
def test_every_check_of_a_task_may_be_lost(monkeypatch):
    plant = "kill update_counters_ fp32 tiny;lost inverse_index fp32 tiny"
    results = with_planted(monkeypatch, plant, filter="(index|counters).* fp32 tiny")
    assert [(r.op, r.passed) for r in results] == [("inverse_index", False), ("update_counters_", False)]


@pytest.mark.parametrize("how", ["kill", "lost"])
@pytest.mark.subprocess
def test_a_device_that_is_gone_for_good_ends_the_run(how, monkeypatch):
    results = with_planted(monkeypatch, f"{how} start", filter="(index|counters).* fp32 tiny")
    why = "it does not answer" if how == "lost" else "its process died (exit code -9)"
    assert [(r.op, r.verdict, r.note) for r in results] == [
        (op, "FAIL", f"not run: {why}") for op in ("inverse_index", "update_counters_")
    ]


@pytest.mark.parametrize("seconds", [0.1, 0.9])
@pytest.mark.subprocess
def test_a_kill_costs_one_check(seconds, tmp_path):
    """The file is whole at every moment, and has what was printed."""
    file = tmp_path / "verify.json"
    line = [sys.executable, "-u", "-m", "sparc_kernels", "verify", "--device", "cpu", "--quick", "--json", str(file)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    printed = []
    for text in process.stdout:
        if re.match(r"(encode|exact|values|decode|auxk|inverse|latent|adam|update|training|shard)", text):
            printed.append(text)
            if len(printed) == 1:
                timer = threading.Timer(seconds, process.kill)
                timer.start()
    timer.cancel()
    assert process.wait() in (-9, 0)
    report = json.loads(file.read_text())
    checked = {(r["op"], r["dtype"], r["case"]) for r in report["results"]}
    assert len(printed) <= len(checked) <= len(printed) + 1
    assert report["complete"] == report["passed"] == (process.returncode == 0)


def test_failure_is_the_exit_code_and_is_printed(monkeypatch, capsys, tmp_path):
    norm_with_epsilon(monkeypatch.setattr)
    file = tmp_path / "out.json"
    words = ["--device", "cpu", "--quick", "--filter", "nmse.*tiny", "--json", str(file)]
    assert cli.main(["verify", *words]) == 1
    out = capsys.readouterr().out
    assert re.search(r"decode_nmse global fp32 .* nmse .* FAIL\n    error .* of at most", out)
    assert max(map(len, out.splitlines())) <= 110
    report = json.loads(file.read_text())
    assert report["passed"] is False
    assert any(r["verdict"] == "FAIL" for r in report["results"])


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")
@pytest.mark.interpreter
def test_planted_fault_is_caught_in_the_kernels(monkeypatch):
    decoder_bias_lost(monkeypatch.setattr)
    results = verify.run_checks("cpu", quick=True, interpret=True, filter="decode global fp64 strided")
    assert [r for r in results if not r.passed] and not raised(results)


@pytest.mark.parametrize("gradients", [False, True])
def test_steps_that_capture_themselves_are_judged(gradients, monkeypatch):
    """With a stand-in for graphs; a learning rate that a graph has frozen is noticed."""
    case = verify.Case("tiny", 6, 70, 5, (20, 13), (torch.float32,), "graph")
    assert launches_of(case, torch.float32, 90, "own graph" if gradients else "own graph fused")
    verdicts = []
    for sound in (True, False):
        with monkeypatch.context() as patch:
            FakeCuda(patch)
            if not sound:
                patch.setattr(graphed, "number_as_launched", lambda value, impl: 1e-3)
            check = judge.Check("own graph", case, torch.float32, torch.device("cpu"), "torch", problems={})
            routes.judge_own_graph(check, gradients)
            verdicts.append({r.tensor: r.passed for r in check.results})
    assert all(verdicts[0].values()) and verdicts[1]["captured"] and not all(verdicts[1].values())
