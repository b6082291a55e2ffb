"""One training step: captured in a CUDA graph, on any of several GPUs, without a copy between host and device."""

import os
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import CUDA, DEVICE, KERNEL_DTYPE

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.core import registry
from sparc_kernels.tools import trace
from sparc_kernels.tools.shape import Shape
from sparc_kernels.tools.trace import InsideOperators
from sparc_kernels.train.step import Step, _Graph
from sparc_kernels.train.trainer import TrainConfig, Trainer

WIDTHS = {"a": 6, "b": 5}


def step(**options) -> Step:
    torch.manual_seed(0)
    model = AlignedSAE(WIDTHS, 20, 3, 3, dead_steps_threshold=1, device=DEVICE, dtype=KERNEL_DTYPE)
    adam = SparcAdam(model, 1e-3, capturable=True)
    return Step(model, adam, torch.Generator(DEVICE).manual_seed(1), reinit_every=0, **options)


def batches(n):
    g = torch.Generator().manual_seed(1)
    return [{s: torch.randn(4, d, generator=g).to(DEVICE, KERNEL_DTYPE) for s, d in WIDTHS.items()} for _ in range(n)]


class Graphs:
    """torch.cuda as far as a captured step needs it. With `error` a capture fails and leaves its stream in place."""

    def __init__(self, monkeypatch, error=None):
        self.error, self.current, self.streams, self.asked = error, "main", [], []
        fakes = dict(
            Stream=self.stream_on, current_stream=lambda *_: SimpleNamespace(wait_stream=lambda other: None),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: None), graph=self.graph, stream=self.on,
            set_stream=self.set,
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def stream_on(self, *device):
        self.streams.append(device)
        return SimpleNamespace(wait_stream=lambda other: None)

    def set(self, stream):
        self.current = "main"

    @contextmanager
    def on(self, stream):
        yield

    @contextmanager
    def graph(self, graph, **options):
        self.asked.append(options)
        self.current = "capture"
        yield
        if self.error:
            raise self.error
        self.current = "main"


def graphed(monkeypatch, error=None):
    graphs, one = Graphs(monkeypatch, error), step()
    one._graph = _Graph(one)
    return graphs, one


def test_other_threads_may_use_the_gpu_while_a_step_is_captured(monkeypatch):
    """The loader's thread waits for its copies; the mode "global" lets that fail, and the capture with it."""
    graphs, one = graphed(monkeypatch)
    for x in batches(5):
        one(x)
    assert one._graph.graph is not None and len(graphs.asked) == 1
    assert graphs.asked[0] == {"stream": one._graph.stream, "capture_error_mode": "thread_local"}


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), ValueError("from a launcher")], ids=type)
def test_a_step_that_cannot_be_captured_goes_on_eagerly_and_says_so_once(monkeypatch, error):
    graphs, one = graphed(monkeypatch, error)
    losses = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses += [float(one(x)[0]) for x in batches(8)]
    said = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    assert said == [f"the step could not be captured in a CUDA graph, steps run eagerly: {error}"]
    assert graphs.current == "main" and len(graphs.asked) == 1  # not tried again
    eager = step()
    want = [float(eager(x)[0]) for x in batches(8)]
    # the failed capture of this stand-in has run once: from there on it is a step ahead
    assert losses[:3] == want[:3] and all(torch.tensor(losses).isfinite())


def test_a_graph_belongs_to_the_gpu_of_its_model(monkeypatch):
    entered = []

    @contextmanager
    def on_device(device):
        entered.append(device)
        yield

    graphs, one = graphed(monkeypatch)
    monkeypatch.setattr("sparc_kernels.train.step.on_device", on_device)
    device = next(one.model.parameters()).device
    one(batches(1)[0])
    assert graphs.streams == [(device,)] and entered[0] == device


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
    adam.prepare([[True] * 4] * 2)
    with NoReading() as mode:
        adam.count_step([True] * 8)
        with pytest.raises(AssertionError, match="a value is read"):
            adam.counts.max().item()
    assert mode.operators == ["adam_scalars_"]


def test_no_output_is_copied_from_the_host_when_it_is_read():
    for topk_type in ("global", "local"):
        with trace.as_on_gpu(90, False, []):
            shape = Shape(256, 2048, 16, (64, 48), "bfloat16")
            model, inputs = trace._model(shape, topk_type, 8), trace._inputs(shape)
            with trace._Tracer([*model.parameters(), *model.buffers(), *inputs.values()]) as seen:
                outputs = model(inputs)
                copied = [key for key in outputs if not seen.knows(outputs[key])]  # made by no operator
                assert copied == []


def test_a_captured_step_refuses_a_learning_rate_that_is_elsewhere(monkeypatch):
    """Its number would be part of the graph, and later changes of it would be lost."""
    one = step()
    adam = one.optimizer
    adam.prepare([[True] * 4] * 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    adam.counts = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    for lr, got in ((1e-3, "a number"), (torch.tensor(1e-3), "cpu")):
        adam.param_groups[0]["lr"] = lr
        with pytest.raises(RuntimeError, match=rf"lr: expected a tensor on cuda:0 in a captured step, got {got}"):
            adam.count_step([True] * 8)


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
