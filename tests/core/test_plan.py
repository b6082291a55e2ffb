"""Plans repeat what a function did, with other tensors, and nothing else."""

import itertools
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import warm_process
from conftest import DEVICE, KERNEL_DTYPE
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.core import plan
from sparc_kernels.core._triton import HAS_TRITON, tl, triton
from sparc_kernels.core.recorder import Launch, Recorder, Scalar, derived, launch, recorded
from sparc_kernels.core.side_stream import SideStream
from sparc_kernels.core.target import Target, as_target
from sparc_kernels.nn import forward


def _inputs(model, rows=3):
    return {s: torch.randn(rows, d, device=DEVICE, dtype=KERNEL_DTYPE) for s, d in model.d_streams.items()}


def _model(**settings):
    torch.manual_seed(0)
    return AlignedSAE({"a": 20, "b": 9}, 16, 3, impl="triton", dtype=KERNEL_DTYPE, device=DEVICE, **settings)


@pytest.mark.parametrize("settings", [{}, {"auxk": 4, "dead_steps_threshold": 1}, {"topk_type": "local", "auxk": 4}])
def test_a_replayed_forward_has_the_bits_of_an_ordinary_one(settings):
    model, twin = _model(**settings), _model(**settings)
    for step in range(4):
        x = _inputs(model)
        out = model(x)
        with plan.without_plans():
            expected = twin(x)
        for key in ("indices", *(f"values_{s}" for s in model.streams)):
            assert torch.equal(out[key], expected[key]), (step, key)
        if model.auxk:
            assert all(torch.equal(out[k], expected[k]) for k in out if k.startswith("auxk_"))
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name)), (step, name)
    made = [p for p in forward._encode.plans.values() if type(p) is plan.Plan]
    assert len(made) == 1 and made[0].launches > 5


def _two_calls(model, adam, x):
    adam.zero_grad()
    loss, metrics = model.compute_loss(model(x), x)
    loss.backward()
    adam.step()
    return loss.detach(), metrics


def _fused(model, adam, x):
    return model.training_step(x, adam)


@pytest.mark.parametrize("take", [_two_calls, _fused])
@pytest.mark.parametrize("settings", [{"auxk": 4, "dead_steps_threshold": 1}, {"topk_type": "local", "auxk": 4}])
def test_replayed_steps_have_the_bits_of_ordinary_ones(take, settings):
    models, twins = _model(**settings), _model(**settings)
    adam, twin = (
        SparcAdam(m, 1e-2, impl="triton", max_grad_norm=0.1 if take is _two_calls else None) for m in (models, twins)
    )
    for step in range(4):
        x = _inputs(models)
        for optimizer in (adam, twin):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1) + 1e-9  # another number in every step
        loss, metrics = take(models, adam, x)
        with plan.without_plans():
            expected, wanted = take(twins, twin, x)
        assert torch.equal(loss, expected), step
        assert all(torch.equal(metrics[name], wanted[name]) for name in wanted)
        for p, q in zip(models.parameters(), twins.parameters(), strict=True):
            assert torch.equal(p, q), step
    made = [p for f in plan._functions for p in f.plans.values()]
    assert any(type(p) is plan.Plan for p in made) and plan._REFUSED not in made


@plan.Planned
def _twice(tensors, factor, add):
    """Doubles the first tensor into a new one, by torch calls alone."""
    out = torch.empty_like(tensors[0])
    torch.mul(tensors[0], factor, out=out)
    out += tensors[1]
    return [out, tensors[1]]


def _kinds(*calls):
    """Number of kinds of arguments that plans tell apart."""
    return len({plan.kind_of(tensors, static)[0] for tensors, static in calls})


def test_a_plan_is_for_one_kind_of_arguments():
    x, wide = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 16, device=DEVICE)
    sound = [x, x.clone()], (2,)
    assert _kinds(sound, ([x.clone(), x.clone()], (2,))) == 1
    others = [
        ([x, x], (2,)),  # one memory twice
        ([x, None], (2,)),
        ([x, x.clone()], (3,)),
        ([x[:1], x[:1].clone()], (2,)),  # a size of 1 is a constant of a kernel
        ([x.double(), x.clone()], (2,)),
        ([x.t().contiguous().t(), x.clone()], (2,)),
        ([wide[:, 1:9], x.clone()], (2,)),  # not at 16 bytes
        ([wide[:, 4:12], x.clone()], (2,)),
        ([wide[:, :8], wide[:, 8:]], (2,)),  # side by side in one storage: a library's GEMM
        ([wide[:, :8], wide.clone()[:, 8:]], (2,)),
    ]
    assert _kinds(sound, *others) == 1 + len(others)
    with as_target(Target(90)):
        elsewhere = plan.kind_of(*sound)[0]
    assert elsewhere != plan.kind_of(*sound)[0]


def test_settings_of_products_have_plans_of_their_own(monkeypatch):
    x = [torch.zeros(2, device=DEVICE)]
    before = plan.kind_of(x, ())[0]
    monkeypatch.setattr(plan, "allow_tf32", lambda: True)
    assert plan.kind_of(x, ())[0] != before


def test_torch_calls_are_repeated_on_the_tensors_at_hand():
    for i in range(5):
        x, y = torch.randn(3, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
        out, same = _twice([x, y], (2.0, None), impl="triton")
        assert torch.equal(out, 2 * x + y) and same is y, i
    (made,) = _twice.plans.values()
    assert (made.calls, made.launches) == (2, 0)
    kept, _ = _twice([x, y], (2.0, None), impl="triton")
    assert kept.data_ptr() != out.data_ptr()  # results have memory of their own


ELSEWHERE = torch.ones(3)


@pytest.mark.parametrize("fault", ["a tensor that is no argument", "a value that the host reads"])
def test_what_cannot_be_repeated_runs_as_usual_and_says_so_once(fault):
    def function(tensors):
        (x,) = tensors
        return [x + (ELSEWHERE.to(x.device) if "tensor" in fault else float(x.sum()))]

    planned, said = plan.Planned(function), []
    for i in range(4):
        x = torch.full((3,), float(i), device=DEVICE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (out,) = planned([x], impl="triton")
        said += [str(w.message) for w in caught]
        assert torch.equal(out, x + (1.0 if "tensor" in fault else 3.0 * i)), i
    (text,) = said
    assert text.startswith("launches of function are prepared anew in every call: ")


@pytest.mark.parametrize(
    "compute",
    [lambda x, lr: x * lr, lambda x, lr: lr * x, lambda x, lr: x + 2 * lr, lambda x, lr: x + (lr if lr > 1 else 1),
     lambda x, lr: torch.full_like(x, lr), lambda x, lr: x.add(x, alpha=lr), lambda x, lr: x + float(lr),
     lambda x, lr: x if lr else x + 1, lambda x, lr: x + lr**2, lambda x, lr: x - int(lr == 2)],
)  # fmt: skip
def test_numbers_that_a_plan_would_freeze_refuse_it(compute):
    planned = plan.Planned(lambda tensors, lr: [compute(tensors[0], lr) + 0])
    x = torch.ones(3, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="prepared anew in every call: a number that differs between calls"):
        for lr in (0.5, 1.5, 2.0, 0.0):
            assert torch.equal(planned([x], (), (lr,), impl="triton")[0], compute(x, lr) + 0)
    assert [*planned.plans.values()] == [plan._REFUSED]


@triton.jit
def _store(out_ptr, root, number):
    tl.store(out_ptr, root)
    tl.store(out_ptr + 1, number)


def test_what_is_derived_from_a_number_is_computed_anew():
    def function(tensors, lr):
        out = torch.empty_like(tensors[0])
        launch(_store, (1,))(out, derived(lr, math.sqrt), lr)
        return [out]

    planned = plan.Planned(function)
    for lr in (4.0, 9.0, 16.0, 25.0):
        (out,) = planned([torch.zeros(2, device=DEVICE)], (), (lr,), impl="triton")
        assert out.tolist() == [math.sqrt(lr), lr]
    assert type(*planned.plans.values()) is plan.Plan


class Compiled:
    """A compiled kernel that notes its arguments, or refuses them."""

    def __init__(self, error=None):
        self.launched, self.error = [], error

    def __getitem__(self, grid):
        def launcher(*args, stream):
            if self.error:
                raise self.error
            self.launched.append((grid, args, stream))

        return launcher


def _plan_of(kernel, x, monkeypatch):
    """A plan with two launches of one kernel: x, a table of pointers, scratch, constants and a number."""
    monkeypatch.setattr(plan, "INTERPRETED", False)
    monkeypatch.setattr(plan, "_current_stream", lambda: 7)
    recorder = Recorder([x])
    place = recorder.place(x[1])
    with recorder:
        scratch = recorder.place(torch.empty(10, device=DEVICE))
    number = derived(Scalar.make(0.5, 0), math.sqrt)
    args = place, (place, (scratch, None, 3)), None, 1, True, torch.float32, number
    recorder.entries += [Launch(None, kernel, (4, 2), args, {}, False)] * 2
    return plan.Plan(recorder, [x])


def test_compiled_kernels_get_pointers_as_integers(monkeypatch):
    kernel, x = Compiled(), torch.zeros(2, 8, device=DEVICE)
    made = _plan_of(kernel, x, monkeypatch)
    other = torch.zeros(2, 8, device=DEVICE)
    (out,) = made.run([other], [other.data_ptr()], [2.25])
    assert out is other and len(kernel.launched) == 2
    grid, (pointer, (again, (scratch, none, three)), absent, one, true, dtype, number), stream = kernel.launched[0]
    assert grid == (4, 2, 1) and stream == 7 and pointer == again == other.data_ptr() + 32
    assert scratch % 16 == 0 and scratch not in (0, pointer) and (none, three, absent, one) == (None, 3, None, 1)
    assert true is True and dtype is torch.float32 and number == 1.5


@pytest.mark.parametrize("launched", [False, True])
def test_a_launch_that_triton_refuses_goes_the_ordinary_way(monkeypatch, launched):
    """Only if nothing was launched yet: repeating a half-done step would count twice."""
    kernel, x = Compiled(TypeError("must be a tensor")), torch.zeros(2, 8, device=DEVICE)
    made = _plan_of(kernel, x, monkeypatch)
    made.proven = launched
    planned = plan.Planned(lambda tensors, _: [tensors[0] + 1])
    planned.plans[plan.kind_of([x], ())[0]] = made
    if launched:
        with pytest.raises(TypeError, match="must be a tensor"):
            planned([x], (), (2.25,), impl="triton")
        return
    with pytest.warns(RuntimeWarning, match="prepared anew in every call: must be a tensor"):
        (out,) = planned([x], (), (2.25,), impl="triton")
    assert torch.equal(out, x + 1) and list(planned.plans.values()) == [plan._REFUSED]


def test_the_second_stream_waits_as_it_did(monkeypatch):
    """Forks, events and joins in their order; what that stream touches is not reused."""
    said = []

    class Stream:
        device, cuda_stream = torch.device("cpu"), 1

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            said.append(f"{self.name} records")
            return f"event of {self.name}"

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: said.append(f"on {stream.name}") or nullcontext())
    monkeypatch.setattr(plan, "second_stream", lambda device, handle: side)
    x, streams = torch.zeros(4, device=DEVICE), SideStream(x_device := torch.device(DEVICE), enabled=False)
    streams._main, streams._side = main, side
    with recorded([x]) as recorder:
        y, event = streams.run(lambda: x + 1)
        streams.wait(event)
        z = x + 2
        streams.join()
        out = y + z
    made = plan.Plan(recorder, [out])
    ordinary, said[:] = list(said), []
    assert recorder.until(recorder.place(y).buffer) == len(recorder.entries)
    assert torch.equal(
        made.run([ones := torch.ones(4, device=x_device)], [ones.data_ptr()], [])[0],
        torch.full((4,), 5.0, device=x_device),
    )
    assert said == ordinary == [
        "side waits for main", "on side", "side records", "main waits for event of side", "main waits for side",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 5000)), max_size=12))
def test_buffers_that_live_at_one_time_do_not_overlap(lives):
    spans = {b: (first, first + length, size) for b, (first, length, size) in enumerate(lives)}
    placed, total = plan.layout(spans)
    assert {b for b, _ in placed} == set(spans) and all(offset % plan.ALIGNMENT == 0 for _, offset in placed)
    for (a, at), (b, other) in itertools.combinations(placed, 2):
        if spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]:
            assert at + spans[a][2] <= other or other + spans[b][2] <= at
    rounded = [-(-size // plan.ALIGNMENT) * plan.ALIGNMENT for *_, size in spans.values()]
    most = max(sum(s for s, (f, e, _) in zip(rounded, spans.values(), strict=True) if f <= i < e) for i in range(20))
    assert most <= total <= sum(rounded)


def test_plans_are_not_used_where_torch_is_traced_or_transformed():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert plan.usable()
    with Mode():
        assert not plan.usable()
    with plan.without_plans():
        assert not plan.usable()
    torch.func.vmap(lambda x: x * (1 if not plan.usable() else 1 / 0))(torch.ones(2))


def test_few_plans_are_kept():
    x = [torch.zeros(n, device=DEVICE) for n in range(1, 2 * plan.MOST_PLANS)]
    for t in x:
        _twice([t, t.clone()], (1.0, None), impl="triton")
    assert len(_twice.plans) == plan.MOST_PLANS


@pytest.mark.compile
@pytest.mark.subprocess
@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton and no GPU")
def test_replayed_launches_are_those_of_tritons_jit():
    """Kernel, grid, constants and alignment of every pointer, by the real launcher over a driver that does nothing."""
    script = Path(__file__).parents[1] / "scripts" / "plan_launches.py"
    done = warm_process.run("-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 150
