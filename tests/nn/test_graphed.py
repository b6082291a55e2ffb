"""Steps that capture themselves: whatever happens between them, the bits of eager steps.

On a GPU the graphs are real. Elsewhere `fake_graph.py` stands in, which freezes what a capture freezes.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import CUDA, DEVICE, KERNEL_DTYPE
from fake_graph import FakeCuda
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sparc_kernels import AlignedSAE, GraphedStep, SparcAdam
from sparc_kernels.nn import graphed

WIDTHS = {"a": 6, "b": 5}
FIRST = graphed.EAGER_FIRST


class RealCuda:
    """Counts the replays of real graphs."""

    def __init__(self, monkeypatch):
        self.graphs, graphs = [], self.graphs

        class Counted(torch.cuda.CUDAGraph):
            def __new__(cls, *args):
                graphs.append(super().__new__(cls, *args))
                graphs[-1].replays_so_far = 0
                return graphs[-1]

            def replay(self):
                self.replays_so_far += 1
                super().replay()

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)

    @property
    def replays(self):
        return [graph.replays_so_far for graph in self.graphs]


@pytest.fixture
def cuda(monkeypatch):
    return RealCuda(monkeypatch) if CUDA else FakeCuda(monkeypatch)


@pytest.fixture(params=["training_step", "two calls"])
def form(request):
    return request.param


def rows(i, n=4, dtype=KERNEL_DTYPE):
    g = torch.Generator().manual_seed(i)

    def drawn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")

    return {s: drawn(n, d).to(DEVICE, dtype) for s, d in WIDTHS.items()}


class Run:
    """A model and its optimizer, and the next step's arguments, which a scenario may change."""

    def __init__(self, graph, form, dtype=KERNEL_DTYPE, impl="auto", auxk=3, lr=1e-2, autocast=None, **options):
        torch.manual_seed(0)
        self.model = AlignedSAE(WIDTHS, 20, 3, auxk, dead_steps_threshold=1, impl=impl, device=DEVICE, dtype=dtype)
        self.optimizer = SparcAdam(self.model, lr, graph=graph, impl=impl, **options)
        self.form, self.auxk_coef, self.cross, self.autocast, self.x = form, 1 / 32, 1.0, autocast, None
        self.rng = torch.Generator(DEVICE).manual_seed(1)
        self.notes = []  # what a scenario saw

    def step(self):
        if self.form == "training_step":
            with torch.autocast(DEVICE, self.autocast) if self.autocast else nullcontext():
                return self.model.training_step(self.x, self.optimizer, self.auxk_coef, self.cross)
        coefficients = dict(auxk_coef=self.auxk_coef, cross_loss_coef=self.cross)
        return GraphedStep(self.model, self.optimizer, autocast=self.autocast, **coefficients)(self.x)

    @property
    def group(self):
        return self.optimizer.param_groups[0]


def run(graph, form, scenario=None, steps=8, **options):
    """Losses, metrics and gradients of every step, and the states at the end."""
    one, seen = Run(graph, form, **options), []
    for i in range(steps):
        one.x = rows(i, dtype=options.get("dtype", KERNEL_DTYPE))
        with scenario(one, i) if scenario else nullcontext():
            loss, metrics = one.step()
        assert not loss.requires_grad
        grads = [None if p.grad is None else p.grad.clone() for p in one.model.parameters()]
        seen.append([loss, metrics, grads, one.optimizer.grad_norm and one.optimizer.grad_norm.clone()])
    states = one.model.state_dict(), one.optimizer.state_dict()
    return one, seen, states, one.notes


def same(got, want):
    """Check that two trees have the same bits, NaN included."""
    (got, spec), (want, other) = tree_flatten(got), tree_flatten(want)
    assert spec == other
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def as_eager(cuda, form, scenario=None, steps=8, replays=None, **options):
    """Check that steps with and without a graph have the same bits, and how often each graph was replayed."""
    eager = run(False, form, scenario, steps, **options)
    assert cuda.graphs == []
    ours = run(True, form, scenario, steps, **options)
    same(ours[1:], eager[1:])
    assert cuda.replays == ([steps - FIRST] if replays is None else replays)
    return ours[0]


@contextmanager
def at(i, step, enter=None, leave=None):
    """Do something before and after one step."""
    if i == step and enter:
        enter()
    yield
    if i == step and leave:
        leave()


# ------------------------------------------------------------------------------------------------------ what may change


def test_steps_are_captured_after_three_and_have_the_bits_of_eager_ones(cuda, form):
    one = as_eager(cuda, form)
    assert one.optimizer.captured
    if not CUDA:
        (asked,) = cuda.asked  # the loader's thread may use CUDA meanwhile
        assert asked["capture_error_mode"] == "thread_local"


def test_kernels(cuda, form, monkeypatch):
    """After one eager step, since the interpreter is slow."""
    monkeypatch.setattr(graphed, "EAGER_FIRST", 1)
    as_eager(cuda, form, rates(lambda i: 1e-2 / (1 + i)), impl="triton", steps=3, replays=[2])


def rates(rate):
    return lambda one, i: at(i, i, lambda: one.group.update(lr=rate(i)))


RATES = {
    "number": lambda i: 1e-2 / (1 + i),
    "the same again": lambda i: 1e-2 if i % 3 else 3e-3,
    "integer": lambda i: 1 if i == 5 else 0.5,
    "tensor elsewhere": lambda i: torch.tensor(1e-2 / (1 + i), dtype=torch.float64),
}


@pytest.mark.parametrize("rate", [*list(RATES)[: len(RATES) if CUDA else -1]])
def test_learning_rates_that_are_assigned(cuda, form, rate):
    as_eager(cuda, form, rates(RATES[rate]))


@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_schedulers(cuda, form, lr):
    """They fill a tensor in place, and warn of steps that they did not see."""

    def scenario(one, i):
        if i == 0:
            one.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                one.optimizer, 1e-2, total_steps=20, cycle_momentum=False
            )
        return at(i, i, None, one.scheduler.step)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for capturable in [False, True] if lr == "tensor" else [False]:
            value = torch.tensor(1e-2, dtype=torch.float64, device=DEVICE) if lr == "tensor" else 1e-2
            cuda.graphs.clear()
            as_eager(cuda, form, scenario, lr=value, capturable=capturable)


def test_another_tensor_for_the_learning_rate_is_another_step(cuda, form):
    def scenario(one, i):
        return at(i, 5, lambda: one.group.update(lr=torch.tensor(1e-3, dtype=torch.float64, device=DEVICE)))

    as_eager(cuda, form, scenario, lr=torch.tensor(1e-2, dtype=torch.float64, device=DEVICE), replays=[2])


def edits(one, i):
    """Changes of values in place."""
    m, o = one.model, one.optimizer
    if i == 0:
        one.first = copy.deepcopy((m.state_dict(), o.state_dict()))
    if i == 4:
        one.notes.append(m.reinit_dead_(generator=one.rng))
    if i == 5:
        with torch.no_grad():
            m.encoders["a"].weight.mul_(1.5)
            m.stats_last_nonzero_b.fill_(7)
    if i == 6:
        one.later = copy.deepcopy((m.state_dict(), o.state_dict()))
        m.load_state_dict(one.first[0])
    if i == 7:
        o.load_state_dict(one.later[1])
    if i == 8:
        m.load_state_dict(one.later[0])
        m.unit_norm_decoder_()
    return nullcontext()


@pytest.mark.parametrize("shadow", [None, torch.bfloat16])
def test_values_that_change_between_steps(cuda, form, shadow):
    options = dict(dtype=torch.float32, autocast=torch.bfloat16, shadow=shadow) if shadow else {}
    one = as_eager(cuda, form, edits, steps=11, **options)
    assert sum(one.notes[0].values()) > 0


def test_a_skipped_batch(cuda):
    def scenario(one, i):
        return at(i, 5, lambda: one.x["a"].fill_(float("inf")))

    as_eager(cuda, "training_step", scenario)


def replace_data(one):
    for p in one.model.parameters():
        p.data = p.data.clone() * 1.25


def replace_moments(one):
    for state in one.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone() * 0.5


def layout(one):
    one.model.decoder_layout_("contiguous")


def counter(one):
    one.model.stats_last_nonzero_a = one.model.stats_last_nonzero_a + 1


@pytest.mark.parametrize("change", [replace_data, replace_moments, layout, counter], ids=lambda f: f.__name__)
def test_other_memory_ends_a_graph(cuda, form, change):
    def scenario(one, i):
        return at(i, 5, lambda: change(one))

    one = as_eager(cuda, form, scenario, steps=13, replays=[2, 2])  # six eager steps before the next capture
    assert one.optimizer.captured


def replace_parameter(one):
    p = one.model.encoders["b"].weight
    one.model.encoders["b"].weight = torch.nn.Parameter(p.detach() + 0.5)


def assign(one):
    new = {name: value.clone() for name, value in one.model.state_dict().items()}
    one.model.load_state_dict(new, assign=True)


@pytest.mark.parametrize("change", [replace_parameter, assign], ids=lambda f: f.__name__)
def test_replaced_parameters_end_a_graph(cuda, form, change):
    """Steps stay eager: the optimizer's group does not have the new ones."""

    def scenario(one, i):
        one.optimizer.state_dict = dict  # torch's needs the group's
        return at(i, 5, lambda: change(one))

    as_eager(cuda, form, scenario, steps=13, replays=[2])


# ------------------------------------------------------------------------------------------------ when steps are eager


def test_the_last_batch_of_an_epoch_is_eager_and_leaves_the_graph(cuda, form):
    def scenario(one, i):
        return at(i, i, lambda: one.x.update(rows(i, 3)) if i % 4 == 3 else None)

    # each small one takes a full one off the count
    as_eager(cuda, form, scenario, steps=17, replays=[9])


def test_another_size_is_captured_once_it_prevails(cuda, form):
    def scenario(one, i):
        return at(i, i, lambda: one.x.update(rows(i, 3)) if i >= 6 and i != 8 else None)

    as_eager(cuda, form, scenario, steps=16, replays=[4, 2])


@pytest.mark.parametrize("kept", ["transposed", "sliced", "expanded", "dtype"])
def test_layouts_of_inputs(cuda, form, kept):
    make = {
        "transposed": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "expanded": lambda x: x[:1].expand(4, -1),
        "dtype": lambda x: x.to(torch.bfloat16),
    }[kept]

    def scenario(one, i):
        return at(i, i, lambda: one.x.update({s: make(x) for s, x in one.x.items()}))

    options = dict(dtype=torch.float32, autocast=torch.bfloat16) if kept == "dtype" else {}
    as_eager(cuda, form, scenario, steps=6, replays=[] if kept == "expanded" else None, **options)


def coefficients(one):
    one.auxk_coef, one.cross = 0.5, 0.25


CHANGES = {
    "coefficients": coefficients,
    "weight_decay": lambda one: one.group.update(weight_decay=0.1),
    "betas": lambda one: one.group.update(betas=(0.5, 0.9)),
    "eps": lambda one: one.group.update(eps=1e-3),
    "normalize": lambda one: one.group.update(normalize="after"),
    "threshold": lambda one: setattr(one.model, "dead_steps_threshold", 0),
    "auxk": lambda one: setattr(one.model, "auxk", 2),
    "eval": lambda one: one.model.eval(),
    "loaded settings": lambda one: one.optimizer.load_state_dict(
        SparcAdam(one.model, 1e-2, weight_decay=0.2).state_dict() | {"state": one.optimizer.state_dict()["state"]}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_change_are_seen(cuda, form, change):
    def scenario(one, i):
        return at(i, 5, lambda: CHANGES[change](one))

    as_eager(cuda, form, scenario, replays=[2])


def test_clipping(cuda):
    one = as_eager(cuda, "two calls", max_grad_norm=1e-3)
    assert one.optimizer.grad_norm > 1e-3
    cuda.graphs.clear()
    as_eager(cuda, "two calls", lambda one, i: at(i, 5, lambda: one.group.update(max_grad_norm=1e-4)),
             max_grad_norm=1e-3, replays=[2])  # fmt: skip


def test_a_parameter_that_is_frozen(cuda):
    def scenario(one, i):
        weight = one.model.encoders["a"].weight
        return at(i, 5, lambda: weight.requires_grad_(False), lambda: weight.requires_grad_(True))

    as_eager(cuda, "two calls", scenario, replays=[4])


def for_one_step(enter):
    """A scenario in which a context is entered around the sixth step alone."""

    @contextmanager
    def scenario(one, i):
        with enter(one) if i == 5 else nullcontext():
            yield

    return scenario


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def hook(handle):
    yield
    handle.remove()


def count(one):
    return lambda *_: one.notes.append("called")


@contextmanager
def attribute(thing, name, value):
    setattr(thing, name, value)
    yield
    delattr(thing, name)


AROUND = {
    "anomaly": lambda one: torch.autograd.detect_anomaly(check_nan=False),
    "autocast": lambda one: torch.autocast(DEVICE, torch.bfloat16),
    "dispatch mode": lambda one: Quiet(),
    "saved tensors": lambda one: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t),
    "deterministic": lambda one: attribute_back(torch.set_deterministic_debug_mode, "default", "error"),
    "forward hook": lambda one: hook(one.model.register_forward_hook(count(one))),
    "global hook": lambda one: hook(torch.nn.modules.module.register_module_forward_hook(count(one))),
    "gradient hook": lambda one: hook(one.model.encoders["a"].weight.register_hook(lambda g: g * 2)),
    "after accumulation": lambda one: hook(
        one.model.encoders["a"].weight.register_post_accumulate_grad_hook(lambda p: (p.grad.mul_(2), None)[1])
    ),
    "step hook": lambda one: hook(one.optimizer.register_step_pre_hook(count(one))),
    "found_inf": lambda one: attribute(one.optimizer, "found_inf", torch.ones((), device=DEVICE)),
    "grad_scale": lambda one: attribute(one.optimizer, "grad_scale", torch.full((), 4.0, device=DEVICE)),
    "forward of its own": lambda one: attribute(one.model, "forward", lambda x: AlignedSAE.forward(one.model, x)),
}


@contextmanager
def attribute_back(setter, value, before):
    setter(value)
    yield
    setter(before)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("around", AROUND)
def test_where_a_graph_would_do_other_than_eager(cuda, form, around):
    dtype = torch.float32 if around == "autocast" else KERNEL_DTYPE
    as_eager(cuda, form, for_one_step(AROUND[around]), dtype=dtype, replays=[4])


def test_the_default_device_is_no_reason(cuda, form):
    before = torch.get_default_device()
    torch.set_default_device("meta" if not CUDA else "cpu")
    try:
        as_eager(cuda, form)
    finally:
        torch.set_default_device(before)


def test_inputs_that_require_gradients(cuda, form):
    def scenario(one, i):
        x = one.x
        return at(i, 5, lambda: x["a"].requires_grad_(), lambda: one.notes.append(x["a"].grad))

    one = as_eager(cuda, form, scenario, replays=[4])
    assert (one.notes[0] is not None) == (form == "two calls")


def test_never_inside_another_capture(cuda, form):
    """Neither captured nor replayed there, and not counted: the caller's graph has the eager step."""
    one, stream = Run(True, form, capturable=True), torch.cuda.Stream()

    def inside():
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            result = one.step()
        return graph, result

    one.x = rows(0)
    for _ in range(2):
        one.step()
    before = copy.deepcopy(one.model.state_dict())
    for _ in range(3):
        inside()
    assert len(cuda.graphs) == 3 and not one.optimizer.captured
    same(one.model.state_dict(), before)
    for _ in range(3):
        one.step()
    assert one.optimizer.captured
    again, (loss, _) = inside()
    other = copy.deepcopy(one.model)
    other_adam = SparcAdam(other, 1e-2, graph=False)
    other_adam.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    again.replay()
    twin = Run(False, form)
    twin.model, twin.optimizer, twin.x = other, other_adam, one.x
    same(loss, twin.step()[0])
    same(one.model.state_dict(), other.state_dict())


def test_a_step_that_torch_compile_traces_is_eager(cuda, form, monkeypatch):
    one = Run(True, form)
    one.x = rows(0)
    with monkeypatch.context() as patch:
        patch.setattr(one.optimizer, "graph", False)  # what is_compiling leads to
        for _ in range(5):
            one.step()
    assert one.optimizer._step_graph is None and cuda.graphs == []


def test_errors_of_a_step_are_its_own_and_not_counted(cuda, form):
    one = Run(True, form)
    for i in range(8):
        one.x = {"a": rows(i)["a"]}
        with pytest.raises(ValueError, match="all streams"):
            one.step()
    one.x = {**rows(0), "b": rows(0)["b"][:, :3]}
    for _ in range(8):
        with pytest.raises(ValueError, match=r"inputs\['b'\]"):
            one.step()
    one.x = rows(0)
    for _ in range(FIRST + 2):
        one.step()
    assert cuda.replays == [2]
    one.auxk_coef = torch.ones(2)
    with pytest.raises(ValueError, match="auxk_coef"):
        one.step()


def test_training_step_still_refuses_gradients(cuda):
    one = Run(True, "training_step")
    one.x = rows(0)
    for _ in range(5):
        one.step()
    one.model.encoders["a"].weight.grad = torch.zeros_like(one.model.encoders["a"].weight)
    with pytest.raises(ValueError, match=r"encoders.a.weight.grad"):
        one.step()
    one.optimizer.zero_grad()
    one.step()
    assert cuda.replays == [3]


# ------------------------------------------------------------------------------------------------- what a step leaves


def test_results_are_kept_by_later_steps(cuda, form):
    one = Run(True, form)
    kept = []
    for i in range(8):
        one.x = rows(i)
        loss, metrics = one.step()
        kept.append((loss, loss.clone(), metrics, {k: v.clone() for k, v in metrics.items()}))
    same([k[::2] for k in kept], [k[1::2] for k in kept])


def test_inputs_are_read_not_kept(cuda, form):
    """A buffer that the caller refills, and tensors that are gone by the next step."""

    def scenario(one, i):
        if i == 0:
            one.buffer = {s: x.clone() for s, x in one.x.items()}
        for s, x in one.x.items():
            one.buffer[s].copy_(x)
        one.x = one.buffer
        return nullcontext()

    as_eager(cuda, form, scenario)


def test_outputs_of_a_forward_before_a_replay_are_refused(cuda, form):
    one = Run(True, form)
    for i in range(6):
        one.x = rows(i)
        outputs = one.model(one.x)
        one.step()
        with pytest.raises(RuntimeError, match="changed in place"):
            _ = outputs["recon_a"]
    assert cuda.replays == [3]


def test_gradients_are_there_until_the_next_step(cuda):
    one = Run(True, "two calls")
    for i in range(9):
        one.x = rows(i)
        one.step()
        assert all(p.grad is not None for p in one.model.parameters())
        if i == 6:
            one.optimizer.zero_grad()
        if i == 7:
            one.model.zero_grad(set_to_none=False)
    assert cuda.replays == [6]


def test_copies_and_pickles_have_no_graph(cuda, form):
    one = Run(True, form)
    for i in range(5):
        one.x = rows(i)
        one.step()
    file = io.BytesIO()
    torch.save(one.optimizer, file)
    file.seek(0)
    copies = [copy.deepcopy(one.optimizer), pickle.loads(pickle.dumps(one.optimizer))]
    copies.append(torch.load(file, weights_only=False))
    assert one.optimizer.captured and not any(c.captured for c in copies) and all(c.graph for c in copies)
    for c in copies:
        other = Run(True, form)
        other.model, other.optimizer = c.model, c
        want = copy.deepcopy(one.optimizer)
        eager = Run(False, form)
        eager.model, eager.optimizer, want.graph = want.model, want, False
        for i in range(5, 10):
            other.x = eager.x = rows(i)
            same(other.step(), eager.step())
        assert c.captured
        same(c.model.state_dict(), want.model.state_dict())
    one.step()
    assert cuda.replays == [3, 2, 2, 2]
    copied = copy.deepcopy(one.model)
    assert copied.state_dict().keys() == one.model.state_dict().keys()


def test_two_models_have_a_graph_each(cuda, form):
    pairs = [[Run(graph, form, auxk=auxk) for auxk in (3, None)] for graph in (False, True)]
    for i in range(8):
        results = []
        for pair in pairs:
            for one in pair:
                one.x = rows(i)
                results.append(one.step())
        same(results[:2], results[2:])
    assert cuda.replays == [5, 5]


def test_another_optimizer_of_the_model(cuda, form):
    """Each has its own graph; one's step is seen by the other."""

    def scenario(one, i):
        if i == 0:
            one.both = one.optimizer, SparcAdam(one.model, 1e-3, graph=one.optimizer.graph)
        one.optimizer = one.both[i % 2]
        return nullcontext()

    as_eager(cuda, form, scenario, steps=10, replays=[2, 2])


def test_both_forms_share_one_graph(cuda):
    """Taken in turn neither is captured."""
    one = Run(True, "training_step")
    for i in range(8):
        one.x, one.form = rows(i), ("training_step", "two calls")[i % 2]
        one.optimizer.zero_grad()
        one.step()
    assert cuda.graphs == []


# ----------------------------------------------------------------------------------------- switches, memory and failure


def test_switches(cuda, form, monkeypatch):
    as_eager(cuda, form, steps=5, replays=[2])
    cuda.graphs.clear()
    monkeypatch.setenv(graphed.SWITCH, "0")
    one = Run(None, form)
    assert not one.optimizer.graph and SparcAdam(one.model, graph=True).graph
    for i in range(6):
        one.x = rows(i)
        one.step()
    assert cuda.graphs == []
    one.optimizer.graph = True
    for _ in range(5):
        one.step()
    assert cuda.replays == [2] and one.optimizer.captured
    one.optimizer.release_graph()
    assert not one.optimizer.captured
    for _ in range(5):
        one.step()
    assert cuda.replays == [2, 2]
    with pytest.raises(ValueError, match="graph: expected True or False"):
        SparcAdam(one.model, graph="yes")


def test_an_old_pickle_has_the_defaults():
    state = SparcAdam(AlignedSAE(WIDTHS, 20, 3), graph=False).__getstate__()
    del state["graph"]
    old = SparcAdam.__new__(SparcAdam)
    old.__setstate__(state)
    assert old.graph and not old.captured and old.captured_lr is None


def test_captures_become_rarer(cuda):
    """Settings that keep changing must not cost a capture every few steps."""

    def scenario(one, i):
        return at(i, i, lambda: setattr(one, "cross", 1 / (1 + i // 6)))

    as_eager(cuda, "training_step", scenario, steps=24, replays=[3])  # then after six


def refuse_while_capturing(monkeypatch, error=None):
    """The step reads a value, which no capture permits, or raises `error` there."""
    prepare = AlignedSAE._prepare

    def reads(self, inputs, *args):
        if torch.cuda.is_current_stream_capturing():
            if error:
                raise error
            next(iter(inputs.values())).sum().item()
        return prepare(self, inputs, *args)

    monkeypatch.setattr(AlignedSAE, "_prepare", reads)


@pytest.mark.parametrize("error", [None, ValueError("from a launcher")], ids=type)
def test_a_step_that_cannot_be_captured_goes_on_eagerly_and_says_so_once(cuda, form, monkeypatch, error):
    eager = run(False, form, edits, steps=9)
    refuse_while_capturing(monkeypatch, error)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = run(True, form, edits, steps=9)
    said = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    assert len(said) == 1 and said[0].startswith("the step could not be captured in a CUDA graph, steps run eagerly: ")
    same(ours[1:], eager[1:])
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(cuda.graphs) == 1 and not ours[0].optimizer.captured and ours[0].optimizer.captured_lr is None
    if not CUDA:
        assert cuda.current is cuda.main


def test_a_capture_that_ends_in_an_error_changes_nothing(form, monkeypatch):
    if CUDA:
        pytest.skip("the stand-in's")
    eager = run(False, form, edits, steps=9)
    cuda = FakeCuda(monkeypatch, fail=RuntimeError("operation not permitted"))
    with pytest.warns(UserWarning, match="could not be captured in a CUDA graph.*: operation not permitted"):
        ours = run(True, form, edits, steps=9)
    same(ours[1:], eager[1:])
    assert cuda.replays == [0] and cuda.current is cuda.main


def test_graphed_step_checks_its_arguments():
    one, other = Run(True, "two calls"), Run(True, "two calls")
    for model in (other.model, torch.nn.Sequential(one.model)):
        with pytest.raises(ValueError, match="optimizer: expected a SparcAdam of this model"):
            GraphedStep(model, one.optimizer)
    with pytest.raises(ValueError, match="optimizer: expected a SparcAdam"):
        GraphedStep(one.model, torch.optim.Adam(one.model.parameters()))
    with pytest.raises(ValueError, match=r"autocast: expected torch.bfloat16 or None"):
        GraphedStep(one.model, one.optimizer, autocast=torch.float16)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_replayed_step_does_not_synchronise(form):
    one = Run(True, form)
    for i in range(FIRST + 1):
        one.x = rows(i)
        one.step()
    one.x = rows(9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.group["lr"] = 1e-3
        one.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_released_graph_frees_its_memory(form):
    one = Run(True, form)
    one.x = rows(0, 512)
    for _ in range(FIRST + 2):
        one.step()
    one.optimizer.zero_grad()
    before = torch.cuda.memory_reserved()
    one.optimizer.release_graph()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before
