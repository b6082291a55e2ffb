"""One training step: captured in a CUDA graph, on any of several GPUs, without a copy between host and device."""

import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import CUDA, DEVICE, KERNEL_DTYPE
from fake_graph import FakeCuda

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.core import registry
from sparc_kernels.tools import trace
from sparc_kernels.tools.shape import Shape
from sparc_kernels.tools.trace import InsideOperators
from sparc_kernels.train.step import Step
from sparc_kernels.train.trainer import TrainConfig, Trainer

WIDTHS = {"a": 6, "b": 5}


def step(reinit_every=0, dtype=KERNEL_DTYPE, **options) -> Step:
    torch.manual_seed(0)
    model = AlignedSAE(WIDTHS, 20, 3, 3, dead_steps_threshold=1, device=DEVICE, dtype=dtype)
    adam = SparcAdam(model, 1e-3, capturable=True, graph=options.get("graph", False))
    return Step(model, adam, torch.Generator(DEVICE).manual_seed(1), reinit_every=reinit_every, **options)


def batches(n):
    g = torch.Generator().manual_seed(1)
    return [{s: torch.randn(4, d, generator=g).to(DEVICE, KERNEL_DTYPE) for s, d in WIDTHS.items()} for _ in range(n)]


def steps(graph, x, **options):
    """Losses and metrics of steps as on CUDA, and the state at the end."""
    one, seen = step(graph=graph, **options), []
    one.reads_loss = False
    for i, batch in enumerate(x):
        if i == 5:
            one.optimizer.param_groups[0]["lr"].fill_(1e-2)
        seen.append(one(batch))
    return one, seen, [*one.model.state_dict().values(), one.optimizer.counts, one._skipped]


@pytest.mark.parametrize("form", [{}, {"gradient_free": True}, {"bf16": True, "dtype": torch.float32}], ids=str)
def test_a_captured_step_is_the_eager_step(monkeypatch, form):
    """With re-initialisation, a learning rate filled in, smaller batches and a batch that is skipped."""
    cuda = None if CUDA else FakeCuda(monkeypatch)
    x = [{s: t.to(form.get("dtype", t.dtype)) for s, t in batch.items()} for batch in batches(12)]
    x[5]["a"] = x[5]["a"] * float("nan")
    x[7] = {s: t[:3] for s, t in x[7].items()}
    (_, want, state), (one, got, other) = (steps(graph, x, reinit_every=4, **form) for graph in (False, True))
    assert one.captured and one.skipped == 1 and not hasattr(one.optimizer, "found_inf")
    assert cuda is None or cuda.replays == [8]
    for (a, b), (c, d) in zip(got, want, strict=True):
        torch.testing.assert_close((a, b), (c, d), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(other, state, rtol=0, atol=0)


def test_two_steps_of_one_optimizer_do_not_share_a_graph(monkeypatch):
    """Each counts its own skipped batches."""
    cuda = None if CUDA else FakeCuda(monkeypatch)
    one = step(graph=True)
    other = Step(one.model, one.optimizer, one.reinit_rng, reinit_every=0, graph=True)
    one.reads_loss = other.reads_loss = False
    for batch in batches(5):
        one(batch)
    batch["a"].fill_(float("nan"))
    other(batch)
    assert (one.skipped, other.skipped) == (0, 1) and (cuda is None or cuda.replays == [2])


def test_a_graph_belongs_to_the_gpu_of_its_model(monkeypatch):
    entered = []

    @contextmanager
    def on_device(device):
        entered.append(device)
        yield

    cuda, one = None if CUDA else FakeCuda(monkeypatch), step(graph=True)
    one.reads_loss = False
    monkeypatch.setattr("sparc_kernels.nn.graphed.on_device", on_device)
    device = next(one.model.parameters()).device
    for batch in batches(5):
        one(batch)
    assert set(entered) == {device} and one.captured
    assert cuda is None or cuda.asked[0]["stream"].asked == (device,)


def test_the_tensors_gpu_is_made_the_current_one(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextmanager(lambda: (yield))()
    )
    for name, expected in (("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cuda", []), ("cpu", []), ("meta", [])):
        entered.clear()
        with registry.on_device(torch.device(name)):
            assert entered == [torch.device(d) for d in expected], name


def test_every_operator_is_launched_there(monkeypatch):
    entered = []
    monkeypatch.setattr(registry, "_is_elsewhere", lambda device: True)
    monkeypatch.setattr(registry, "on_device", lambda device: entered.append(device) or nullcontext())
    step()(batches(1)[0])
    assert len(entered) > 10 and {device.type for device in entered} == {DEVICE}


READS = {f"aten::{name}" for name in ("item", "is_nonzero", "equal", "nonzero", "_local_scalar_dense")}


class NoReading(InsideOperators):
    """Refuses what reads a value of a tensor, also inside the package's operators."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def enter(self, name):
        self.operators.append(name)

    def dispatch(self, func, args, kwargs):
        assert func._schema.name not in READS, "a value is read"
        return func(*args, **kwargs)


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3, dtype=torch.float64)], ids=["number", "tensor"])
def test_the_kernels_optimizer_reads_no_value(lr):
    """With CUDA as the default device a tensor made to round a number is on the GPU, and reading it back waits."""
    model = AlignedSAE(WIDTHS, 20, 3, impl="triton", device=DEVICE, dtype=KERNEL_DTYPE)
    adam = SparcAdam(model, lr.to(DEVICE) if isinstance(lr, torch.Tensor) else lr, capturable=True, impl="triton")
    adam.param_groups[0].update(lr=lr)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with NoReading() as mode:
        adam.step()
        with pytest.raises(AssertionError, match="a value is read"):
            adam.counts.max().item()
    assert mode.operators == ["adam_scalars_", "adam_stream_"]


def test_no_output_is_copied_from_the_host_when_it_is_read():
    for topk_type in ("global", "local"):
        with trace.as_on_gpu(90, False, []):
            shape = Shape(256, 2048, 16, (64, 48), "bfloat16")
            model, inputs = trace._model(shape, topk_type, 8), trace._inputs(shape)
            with trace.Tracer([*model.parameters(), *model.buffers(), *inputs.values()]) as seen:
                outputs = model(inputs)
                copied = [key for key in outputs if not seen.knows(outputs[key])]  # made by no operator
                assert copied == []


def test_a_captured_step_refuses_a_learning_rate_that_is_elsewhere(monkeypatch):
    """Its number would be part of the graph, and later changes of it would be lost."""
    one = step()
    adam = one.optimizer
    params = [p for stream in adam.streams() for p in stream]
    adam.prepare(params, [True] * len(params))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    adam.counts = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    for lr, got in ((1e-3, "a number"), (torch.tensor(1e-3), "cpu")):
        adam.param_groups[0]["lr"] = lr
        with pytest.raises(RuntimeError, match=rf"lr: expected a tensor on cuda:0 in a captured step, got {got}"):
            adam.read_lr()


def test_training_with_another_default_device():
    """Rows, orders and buffers of the host stay there, whatever torch.set_default_device says."""
    features = {s: torch.randn(64, d) for s, d in WIDTHS.items()}
    config = TrainConfig(n_latents=20, k=3, auxk=3, batch_size=8, epochs=2)
    default, runs = torch.get_default_device(), []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            runs.append(Trainer(config, features, device=DEVICE, quiet=True))
            runs[-1].train()
        finally:
            torch.set_default_device(default)
    states = [r.model.state_dict() for r in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.skipif(not CUDA, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = batches(1)[0]
    losses = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        model = AlignedSAE(WIDTHS, 20, 3, 3, dead_steps_threshold=1).to(device)
        here = {s: t.to(device) for s, t in x.items()}
        loss, _ = model.compute_loss(model(here), here)
        loss.backward()
        losses.append(loss.detach().cpu())
    assert torch.equal(*losses)


def test_cublas_is_told_to_be_deterministic():
    """torch.use_deterministic_algorithms(True), under which all tests run, refuses its products on CUDA otherwise."""
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
