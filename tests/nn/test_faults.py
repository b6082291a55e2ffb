"""One test for each fault that was found and mended; each fails without its mend."""

import copy
import pickle
import shutil

import pytest
import torch
from common import assert_close, problem
from conftest import CUDA, DEVICE, KERNEL_DTYPE

from sparc_kernels import AlignedSAE, auxk_topk, decode, decode_nmse, encode_topk, inverse_index, reference, values_at
from sparc_kernels.core import numerics
from sparc_kernels.core._triton import tl, triton
from sparc_kernels.ops import aligned_loss, joint
from sparc_kernels.ops.selection import _take

D = {"a": 6, "b": 5}


def model(**options):
    torch.manual_seed(0)
    return AlignedSAE(D, 20, 3, device=DEVICE, **{"dtype": KERNEL_DTYPE, **options})


def batch(B=4, dtype=KERNEL_DTYPE):
    torch.manual_seed(1)
    return {s: torch.randn(B, d, dtype=dtype, device=DEVICE) for s, d in D.items()}


@pytest.mark.parametrize("topk_type", ["global", "local"])
@pytest.mark.parametrize("streams", [["a"], ["a", "b"]])
def test_a_batch_of_one_row_changes_no_argument(impl, topk_type, streams):
    """The selection accumulated into the latent bias itself when it had one row."""
    m = model(impl=impl, topk_type=topk_type)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_()
    before = copy.deepcopy(m.state_dict())
    x = {s: batch(1)[s] for s in streams}
    first, second = m.eval()(x), m(x)
    assert all(torch.equal(before[k], v) for k, v in m.state_dict().items())
    assert torch.equal(first[f"indices_{streams[0]}"], second[f"indices_{streams[0]}"])


def test_biases_of_any_stride(impl):
    """The kernels read bias vectors as contiguous."""
    p = problem(requires_grad=False, widths=(20,))
    x, w, b, c = p.xs[0], p.w_encs[0], p.pre_biases[0], p.latent_biases[0]
    loose = [torch.stack([t, 9 + 0 * t], -1)[..., 0] for t in (b, c)]
    want = encode_topk([x], [w], [b], [c], 5, impl=impl)
    got = encode_topk([x], [w], [loose[0]], [loose[1]], 5, impl=impl)
    assert torch.equal(got[0], want[0])
    assert_close(got[1], want[1])
    dead = torch.arange(70, device=DEVICE) % 3 == 0
    assert torch.equal(auxk_topk(x, w, b, loose[1], dead, 4, impl)[0], auxk_topk(x, w, b, c, dead, 4, impl)[0])
    recon = decode(*want, p.w_decs, [b], impl=impl)[0, 0]
    assert_close(decode(*want, p.w_decs, [loose[0]], impl=impl)[0, 0], recon)
    errors = decode_nmse(*want, p.w_decs, [b], [x], impl=impl)
    assert_close(decode_nmse(*want, p.w_decs, [loose[0]], [x], impl=impl), errors)


def test_the_new_precision_setting_of_torch_can_be_used():
    """Reading the legacy setting after the new one has been written raises."""
    setting = torch.backends.cuda.matmul
    if not hasattr(setting, "fp32_precision"):
        pytest.skip("this torch has only the legacy setting")
    before = setting.fp32_precision
    p = problem(requires_grad=False, dtype=torch.float32)
    want = encode_topk(*p.encoder, 5, impl="torch")
    try:
        for precision in ("tf32", "ieee"):
            setting.fp32_precision = precision
            assert numerics.allow_tf32() == (precision == "tf32")
            indices, values = encode_topk(*p.encoder, 5, impl="triton")
            assert torch.equal(indices, want[0])
            assert_close(values, want[1])
    finally:
        setting.fp32_precision = before


def test_repeated_pairs(impl):
    """More sources than columns left the output unwritten."""
    p = problem(requires_grad=False)
    indices, values = encode_topk(*p.encoder, 5, impl=impl)
    want = decode(indices, values, p.w_decs, p.pre_biases, pairs=[(0, 0)], impl=impl)
    got = decode(indices, values, p.w_decs, p.pre_biases, pairs=[(0, 0)] * 20, impl=impl)
    assert torch.equal(got[0, 0], want[0, 0])


def test_double_backward_is_refused(impl):
    """It gave wrong numbers without a word."""
    p = problem()
    indices, values = encode_topk(*p.encoder, 5, impl=impl)
    scalars = [
        values_at(p.xs[0], p.w_encs[0], p.pre_biases[0], p.latent_biases[0], indices, impl=impl).pow(3).sum(),
        decode(indices, values, p.w_decs, p.pre_biases, impl=impl)[0, 1].pow(3).sum(),
        decode_nmse(indices, values, p.w_decs, p.pre_biases, p.xs, impl=impl).sum(),
    ]
    for scalar in scalars:
        (g,) = torch.autograd.grad(scalar, p.pre_biases[0], create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            g.square().sum().backward()


@pytest.mark.compile
@pytest.mark.slow
def test_batch_sizes_share_a_graph():
    """Messages with the batch size in them made every size a graph of its own, and dynamic shapes impossible."""
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module

    m = model(auxk=4, dtype=torch.float32)

    def step(m, x):
        return m.compute_loss(m(x), x)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for B in (5, 6, 9):
        compiled(m, batch(B, torch.float32)).backward()
    assert len(graphs) <= 2
    torch._dynamo.reset()
    dynamic = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    plain = copy.deepcopy(m)
    assert_close(dynamic(m, batch(7, torch.float32)), step(plain, batch(7, torch.float32)))


def test_a_forward_without_gradients_gives_a_loss_without_gradients():
    m, x = model(), batch()
    with torch.no_grad():
        out = m(x)
    loss, _ = m.compute_loss(out, x)
    assert not loss.requires_grad


def test_replaced_parameters_and_refilled_inputs_are_noticed():
    m, x = model(auxk=4), batch()
    out = m(x)
    m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"parameter .* replaced"):
        out["recon_a"]
    out = m(x)
    x["a"].normal_()
    for read in (lambda: out["logits_a"], lambda: m.compute_loss(out, x)):
        with pytest.raises(RuntimeError, match=r"inputs\['a'\] was changed in place"):
            read()


class _Half(torch.nn.Module):
    def forward(self, w):
        return w / 2


def test_weights_that_are_computed_at_every_access_are_noticed():
    """The one of the forward was freed, and that of the loss had its identity."""
    for s in D:
        m, x = model(), batch()
        torch.nn.utils.parametrize.register_parametrization(m.decoders[s], "weight", _Half())
        for _ in range(8):
            out = m(x)
            with pytest.raises(RuntimeError, match=rf"parameter decoders\.{s}\.weight .* replaced"):
                m.compute_loss(out, x)
            with torch.nn.utils.parametrize.cached():
                m.compute_loss(m(x), x)[0].backward()


def test_inference_mode():
    """A model built in it could not run, and reading in it spoiled what the training loss needed."""
    with torch.inference_mode():
        m = AlignedSAE(D, 20, 3, device=DEVICE, dtype=KERNEL_DTYPE)
        assert m(batch())["recon_a"].shape == (4, 6)
    m, x = model(auxk=4), batch()
    out = m(x)
    with torch.inference_mode():
        out["recon_a"], out["auxk_sparse_codes_a"]
    loss, _ = m.compute_loss(out, x)
    (loss + out["recon_a"].sum()).backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.skipif(not CUDA, reason="a CPU checks the range first")
def test_an_id_outside_gives_nan_on_a_gpu():
    p = problem(requires_grad=False)
    indices = torch.arange(30, device=DEVICE).reshape(6, 5)
    indices[1, 1] = 10**6
    got = values_at(p.xs[0], p.w_encs[0], p.pre_biases[0], p.latent_biases[0], indices)
    assert got[1, 1].isnan() and got.isnan().sum() == 1


@pytest.mark.parametrize("name", ["get", "copy", "setdefault", "fromkeys", "popitem", "_keys", "pop", "training"])
def test_stream_names_that_either_container_owns_are_refused(name):
    with pytest.raises(ValueError, match=f"d_streams: .*got {name!r}"):
        AlignedSAE({name: 4}, 20, 3)


def test_mixed_parameter_dtypes_are_refused_by_name():
    m = model(dtype=torch.float32)
    m.decoders["b"].double()
    with pytest.raises(ValueError, match=r"decoders\.b\.weight: expected a float32 tensor .*got a float64"):
        m(batch(dtype=torch.float32))


def test_an_inverse_index_of_something_else_is_refused():
    p = problem(requires_grad=False)
    indices, values = encode_topk(*p.encoder, 5)
    for wrong, what in (
        (inverse_index(indices[:3], 70), r"inverse\.order"),
        (inverse_index(indices, 71), r"inverse\.offsets"),
        (tuple(t.long() for t in inverse_index(indices, 70)), r"inverse\.order"),
        (3, "inverse"),
    ):
        with pytest.raises(ValueError, match=f"{what}: expected"):
            decode(indices, values, p.w_decs, p.pre_biases, inverse=wrong)


def test_outputs_say_that_they_cannot_be_copied():
    out = model()(batch())
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use dict\(outputs\)"):
            duplicate(out)
    assert len(dict(out)) == len(out)


def test_backward_inside_autocast_keeps_its_precision():
    """The two products for the pre-bias gradients ran in half precision there."""
    m, x = model(dtype=torch.float32), batch(dtype=torch.float32)
    loss, _ = m.compute_loss(m(x), x)
    want = torch.autograd.grad(loss, list(m.pre_biases.values()), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(loss, list(m.pre_biases.values()))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_meta_device_and_numpy_integers():
    import numpy as np

    m = AlignedSAE({s: np.int64(d) for s, d in D.items()}, np.int64(20), np.int32(3), device="meta")
    out = m({s: torch.empty(4, d, device="meta") for s, d in D.items()})
    assert out["recon_a"].shape == (4, 6) and type(m.k) is int


@triton.jit
def _rank_kernel(key_ptr, rank_ptr, k, n: tl.constexpr):
    offs = tl.arange(0, n)
    take, rank = _take(tl.load(key_ptr + offs), 5, k)
    tl.store(rank_ptr + offs, tl.where(take, rank, -1))


def test_ties_beyond_sixteen_bits_of_candidates():
    """Counting ties in half an int32 overflowed at 32,768 equal maxima: N beyond 4 million wrote out of bounds."""
    key = torch.full((32768,), 5, dtype=torch.int32, device=DEVICE)
    key[-1] = 6
    rank = torch.empty_like(key)
    _rank_kernel[(1,)](key, rank, 4, 32768)
    assert rank[:3].tolist() == [0, 1, 2] and rank[-1] == 3 and (rank >= 0).sum() == 4


def test_half_precision_is_selected_on_rounded_sums():
    """The torch path selected on unrounded float32 sums where the kernels store, and select on, the inputs' dtype."""
    x = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16, device=DEVICE)
    w = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16, device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.bfloat16, device=DEVICE)
    indices, _ = encode_topk([x], [w], [zeros], [zeros], 1, impl="torch")
    assert indices.item() == reference.topk_indices((x.float() @ w.float().T).bfloat16(), 1).item() == 0


def test_a_loss_without_gradients_takes_none(monkeypatch):
    """Evaluation under no_grad allocated and computed every decoder's gradient: a Function sees requires_grad alone."""
    m, x = model(auxk=4), batch()
    want, _ = m.eval().compute_loss(m(x), x)
    monkeypatch.setattr(aligned_loss, "grads_of_targets", lambda *args, **_: pytest.fail("a gradient was taken"))
    with torch.no_grad():
        got, _ = m.compute_loss(m(x), x)
    assert_close(got, want.detach())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.compile
def test_wide_streams_compile(monkeypatch, autocast):
    """Where weights may lie side by side, torch.compile met questions about storages that it cannot answer."""
    monkeypatch.setattr(joint, "LIBRARY_WIDTH", 16)
    torch.manual_seed(0)
    m = AlignedSAE({"a": 8, "b": 8}, 20, 3, device=DEVICE)
    x = {s: torch.randn(4, 8, device=DEVICE) for s in "ab"}

    def step(m, x):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return m.compute_loss(m(x), x)[0]

    torch._dynamo.reset()
    assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(m, x), step(m, x), 1e-2 if autocast else None)


@pytest.mark.skipif(not (CUDA or shutil.which("g++")), reason="inductor needs a compiler")
@pytest.mark.compile
@pytest.mark.slow
def test_inductor_reads_the_counters_in_order():
    """It let the operator that moves them overtake the reading that local AuxK does before."""
    m = model(auxk=4, topk_type="local", dead_steps_threshold=1, dtype=torch.float32)
    for counter in m.buffers():
        counter.copy_(torch.arange(20) % 3)
    plain, x = copy.deepcopy(m), batch(dtype=torch.float32)
    torch._dynamo.reset()
    _, got = torch.compile(lambda x: m.compute_loss(m(x), x))(x)
    _, want = plain.compute_loss(plain(x), x)
    assert_close(got["avg_auxk_loss"], want["avg_auxk_loss"])
    assert all(torch.equal(a, b) for a, b in zip(m.buffers(), plain.buffers(), strict=True))


def test_a_look_at_the_model_during_backward():
    """It was taken for activation checkpointing and refused; inputs made inside the checkpoint are, with the reason,
    wherever they come to lie."""
    m, x = model(auxk=4), batch()
    loss, _ = m.compute_loss(m(x), x)
    seen = []
    look = m.eval().encoders["a"].weight.register_hook(lambda g: seen.append(m(batch(2))["recon_a"].shape))
    loss.backward()
    look.remove()
    assert seen == [(2, 6)]
    m.train()
    y = torch.utils.checkpoint.checkpoint(lambda x: m(x)["recon_a"].sum(), x, use_reentrant=False)
    other = torch.utils.checkpoint.checkpoint(
        lambda x: m({s: torch.from_dlpack(t) for s, t in x.items()})["recon_a"].sum(), x, use_reentrant=False
    )
    y.backward()
    with pytest.raises(RuntimeError, match="make inputs outside of what is checkpointed"):
        other.backward()


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_loss_that_gets_no_gradient():
    """A Function above may return None: the loss looked for a device on it."""
    m, x = model(auxk=4), batch()
    out = m(x)
    (Cut.apply(m.compute_loss(out, x)[0]) + out["values_a"].sum()).backward()
    assert m.encoders["a"].weight.grad is not None and m.decoders["a"].weight.grad is None
