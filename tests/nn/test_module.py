"""AlignedSAE: loss and gradients against the reference, outputs, memory, checkpoints, training helpers."""

import copy
import gc
import pickle

import pytest
import torch
from common import assert_close
from conftest import CUDA, DEVICE, KERNEL_DTYPE

from sparc_kernels import AlignedSAE, reference
from sparc_kernels.tools.trace import InsideOperators

WIDTHS = {"image": 20, "text": 13, "sound": 7}


def make(
    impl="torch", topk_type="global", auxk=8, dtype=KERNEL_DTYPE, B=6, N=70, k=5, seed=0, counters=True, widths=WIDTHS
):
    torch.manual_seed(seed)
    model = AlignedSAE(
        widths, N, k, auxk, dead_steps_threshold=2, topk_type=topk_type, impl=impl, dtype=dtype, device=DEVICE
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for s in widths if counters else ():
            getattr(model, f"stats_last_nonzero_{s}").copy_(torch.randint(0, 5, (N,)))
    inputs = {s: torch.randn(B, d, dtype=dtype, device=DEVICE) for s, d in widths.items()}
    return model, inputs


# streams, rows and latents are what costs time in the interpreter
SMALL = dict(B=2, N=12, k=2, auxk=3)
TWO = SMALL | {"widths": {"image": 20, "text": 7}}


def reference_loss(model, inputs, dead, **coefs):
    per_stream = [
        [inputs[s] for s in model.streams],
        [model.encoders[s].weight for s in model.streams],
        [model.decoders[s].weight for s in model.streams],
        [model.pre_biases[s] for s in model.streams],
        [model.latent_biases[s] for s in model.streams],
    ]
    return reference.training_loss(
        *per_stream, model.k, topk_type=model.topk_type, auxk_k=model.auxk,
        dead=dead and [dead[s] for s in model.streams], **coefs,
    )  # fmt: skip


@pytest.mark.parametrize("topk_type", ["global", "local"])
@pytest.mark.parametrize(
    ("auxk", "cross", "dtype"),
    [(4, 1.0, KERNEL_DTYPE), (4, 1.0, torch.float32), (4, 0.0, KERNEL_DTYPE), (None, 1.0, KERNEL_DTYPE)],
)
def test_loss_and_every_gradient(impl, topk_type, auxk, cross, dtype):
    model, inputs = make(impl, topk_type, auxk, dtype, B=3, N=21, k=3)
    dead = model.get_dead_neurons()
    outputs = model(inputs)
    if topk_type == "global":
        dead = model.get_dead_neurons()
    loss, metrics = model.compute_loss(outputs, inputs, auxk_coef=0.25, cross_loss_coef=cross)
    want = reference_loss(model, inputs, dead, auxk_coef=0.25, cross_coef=cross)
    assert_close(loss, want)
    assert metrics["total_loss"] == loss and not any(m.requires_grad for m in metrics.values())
    names = [n for n, _ in model.named_parameters()]
    got = torch.autograd.grad(loss, list(model.parameters()))
    for name, a, b in zip(names, got, torch.autograd.grad(want, list(model.parameters())), strict=True):
        assert_close(a, b, what=name)
        if name.startswith("decoders"):
            assert a.stride() == (1, a.shape[0])


def test_gradients_of_the_inputs(impl):
    model, inputs = make(impl, B=3, N=21, k=3)
    inputs = {s: x.requires_grad_() for s, x in inputs.items()}
    outputs = model(inputs)
    loss, _ = model.compute_loss(outputs, inputs)
    want = reference_loss(model, inputs, model.get_dead_neurons())
    a = torch.autograd.grad(loss, list(inputs.values()))
    b = torch.autograd.grad(want, list(inputs.values()))
    for s, x, y in zip(WIDTHS, a, b, strict=True):
        assert_close(x, y, what=s)


@pytest.mark.parametrize("topk_type", ["global", "local"])
def test_outputs_read_as_the_official_tensors_and_are_differentiable(impl, topk_type):
    model, inputs = make(impl, topk_type, B=3, N=20, widths=TWO["widths"])
    out = model(inputs)
    weights = {s: (model.encoders[s].weight, model.decoders[s].weight) for s in inputs}
    for s in inputs:
        h = reference.preactivations(inputs[s], weights[s][0], model.pre_biases[s], model.latent_biases[s])
        idx = out["shared_indices"] if topk_type == "global" else out[f"indices_{s}"]
        codes = torch.zeros_like(h).scatter(1, idx, torch.relu(h.gather(1, idx)))
        assert_close(out[f"logits_{s}"], h)
        assert_close(out[f"sparse_codes_{s}"], codes)
        assert torch.equal(out[f"mask_{s}"], torch.zeros_like(h, dtype=torch.bool).scatter(1, idx, True))
        assert torch.equal(out[f"indices_{s}"], idx)
        assert out[f"values_{s}"].shape == (3, 5)
        for t in inputs:
            key = f"recon_{s}" if s == t else f"cross_recon_{t}_from_{s}"
            want = codes @ weights[t][1].T + model.pre_biases[t]
            assert_close(out[key], want, what=key)
            params = [weights[t][1], weights[s][0], model.pre_biases[t], model.latent_biases[s]]
            c = torch.randn_like(want)
            for x, y in zip(
                torch.autograd.grad((out[key] * c).sum(), params, retain_graph=True),
                torch.autograd.grad((want * c).sum(), params, retain_graph=True),
                strict=True,
            ):
                assert_close(x, y, what=key)
    assert out["avg_num_active_neurons"] == 5
    assert set(out) == set(out.keys()) and len(out) == len(list(out)) and "nonsense" not in out
    with pytest.raises(KeyError):
        out["nonsense"]
    with pytest.raises(TypeError):
        out["recon_image"] = 1
    assert out["recon_image"] is out["recon_image"]  # kept


def test_any_subset_of_streams_and_the_loss_refuses_it(impl):
    model, inputs = make(impl)
    some = {s: inputs[s] for s in ("text", "image")}  # given in another order
    out = model(some)
    hs = [
        reference.preactivations(inputs[s], model.encoders[s].weight, model.pre_biases[s], model.latent_biases[s])
        for s in ("image", "text")
    ]
    assert torch.equal(out.indices, reference.select(hs, 5))
    assert "recon_sound" not in out and "cross_recon_text_from_image" in out
    with pytest.raises(ValueError, match=r"outputs: expected a forward over all streams"):
        model.compute_loss(out, inputs)
    with pytest.raises(ValueError, match=r"inputs: expected all streams"):
        model.compute_loss(model(inputs), some)


def test_one_stream_alone_behaves_like_local(impl):
    model, inputs = make(impl)
    one = {"text": inputs["text"]}
    local, _ = make(impl, "local")
    local.load_state_dict(model.state_dict())
    assert torch.equal(model(one).indices, local(one)["indices_text"])


def test_reading_after_an_optimizer_step_is_refused_and_what_was_read_stays():
    model, inputs = make()
    out = model(inputs)
    kept = out["recon_text"].detach().clone()
    loss, _ = model.compute_loss(out, inputs)
    loss.backward()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    assert torch.equal(out["recon_text"], kept)
    assert out["sparse_codes_text"].shape == (6, 70)  # made of values that exist
    assert out["auxk_sparse_codes_text"].shape == (6, 70)  # chosen by the loss before the step
    for key in ("recon_image", "logits_text", "cross_recon_text_from_image"):
        with pytest.raises(RuntimeError, match="changed in place"):
            out[key]
    with pytest.raises(RuntimeError, match=r"parameter .* was changed in place"):
        model.compute_loss(out, inputs)


def test_counters_move_once_a_forward_in_training_mode_only():
    model, inputs = make(counters=False)
    before = model.stats_last_nonzero_text.clone()
    out = model(inputs)
    fired = out["sparse_codes_text"] > 1e-3
    assert torch.equal(model.stats_last_nonzero_text, torch.where(fired.any(0), 1, before + 1))
    model.compute_loss(out, inputs)
    model.eval()
    once = model.stats_last_nonzero_text.clone()
    model(inputs)
    assert torch.equal(model.stats_last_nonzero_text, once)
    official = AlignedSAE(WIDTHS, 70, 5, count_in_eval=True, device=DEVICE, dtype=KERNEL_DTYPE).eval()
    official(inputs)
    assert official.stats_last_nonzero_text.min() == 1


def tensors_alive():
    gc.collect()
    return [t for t in gc.get_objects() if torch.is_tensor(t)]


@pytest.mark.parametrize("topk_type", ["global", "local"])
def test_nothing_of_size_B_N_is_alive_or_saved_after_the_loss(impl, topk_type):
    model, inputs = make(impl, topk_type, B=6)
    existing = {id(t) for t in tensors_alive()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = model(inputs)
        loss, _ = model.compute_loss(out, inputs)
    params = {p.data_ptr() for p in model.parameters()}
    largest = 3 * 6 * 8  # values of AuxK for the three streams
    mine = [t for t in tensors_alive() if id(t) not in existing] + saved
    mine = [t for t in mine if t.untyped_storage().data_ptr() not in params and t.data_ptr() not in params]
    assert mine
    sizes = {tuple(t.shape) for t in mine}
    assert not any(6 in s and 70 in s for s in sizes), sizes
    reconstructions = {(3, 6, d) for d in WIDTHS.values()} | {(3, 3, 6, d) for d in WIDTHS.values()}
    assert not sizes & reconstructions, sizes
    # the decoders' gradients exist already, one each
    floats = {t.data_ptr(): t for t in mine if t.is_floating_point()}.values()
    gradients = [tuple(t.shape) for t in floats if t.dim() == 2 and t.shape[1] == 70]
    assert len(gradients) == 3 and set(gradients) == {(d, 70) for d in WIDTHS.values()}, gradients
    rest = [t for t in mine if tuple(t.shape) not in gradients]
    # everything else that is kept is an input-sized residual, codes, or an index over latents
    assert max(t.numel() for t in rest) <= max(largest, 6 * 20, 3 * 6 * 5, 3 * 71), sizes
    assert loss.requires_grad


def test_two_runs_of_a_step_give_the_same_bits(impl):
    def run():
        model, inputs = make(impl, dtype=torch.float32, **({} if CUDA else SMALL))
        out = model(inputs)
        loss, metrics = model.compute_loss(out, inputs)
        loss.backward()
        return [loss.detach(), *metrics.values(), *(p.grad for p in model.parameters()), *model.buffers()]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("topk_type", ["global", "local"])
def test_nan_and_inf_in_the_input_reach_the_loss(impl, topk_type):
    for bad, stream in ((float("nan"), "image"), (float("inf"), "text"), (-float("inf"), "image")):
        model, inputs = make(impl, topk_type, dtype=torch.float32, **TWO | {"B": 3})
        inputs[stream][2, 3] = bad
        loss, _ = model.compute_loss(model(inputs), inputs)
        assert not loss.isfinite()
        loss.backward()  # must neither hang nor fail


def test_aux_is_dropped_when_it_is_nan_and_so_is_its_gradient(impl):
    """A perfect reconstruction leaves Aux 0 / 0 while the main loss is finite."""
    torch.manual_seed(0)
    model = AlignedSAE({"a": 4}, 4, 4, auxk=2, dead_steps_threshold=5, impl=impl, dtype=KERNEL_DTYPE, device=DEVICE)
    with torch.no_grad():
        model.encoders["a"].weight.copy_(torch.eye(4))
        model.decoders["a"].weight.copy_(torch.eye(4))
        model.pre_biases["a"].zero_()
    x = {"a": torch.rand(3, 4, dtype=KERNEL_DTYPE, device=DEVICE)}  # reconstructed exactly: residual 0
    loss, metrics = model.compute_loss(model(x), x)
    assert metrics["auxk_loss_a"].isnan() and loss.isfinite() and metrics["avg_auxk_loss"] == 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trips_keep_the_layout(tmp_path):
    model, inputs = make()

    def layouts(m):
        return [d.weight.stride() for d in m.decoders.values()]

    want = [(1, d) for d in WIDTHS.values()]
    assert layouts(model) == want
    for assign in (False, True):
        other, _ = make(seed=1)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}  # as an official checkpoint has it
        other.load_state_dict(state, strict=True, assign=assign)
        assert layouts(other) == want
        assert torch.equal(other(inputs)["recon_text"], model(inputs)["recon_text"])
    assert layouts(copy.deepcopy(model)) == want
    assert layouts(pickle.loads(pickle.dumps(model))) == want
    assert layouts(model.to(torch.float32)) == want
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other, _ = make(seed=1, dtype=torch.float32)
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert layouts(other) == want
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other, _ = make(seed=1, dtype=torch.float32)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other.decoders["text"].weight, model.decoders["text"].weight)
    model.decoder_layout_("contiguous")
    assert all(d.weight.is_contiguous() for d in model.decoders.values())
    safetensors.save_file(model.state_dict(), str(tmp_path / "file.safetensors"))
    assert layouts(model.decoder_layout_("rows")) == want


def test_same_seed_gives_the_official_initialisation():
    torch.manual_seed(3)
    model = AlignedSAE(WIDTHS, 70, 5)
    torch.manual_seed(3)
    for s, d in WIDTHS.items():
        enc = torch.nn.Linear(d, 70, bias=False)
        torch.nn.Linear(70, d, bias=False)
        assert torch.equal(model.encoders[s].weight.cpu(), enc.weight)
        assert_close(model.decoders[s].weight, reference.unit_norm_decoder(enc.weight.t()))
        assert (model.pre_biases[s] == 0).all() and (model.latent_biases[s] == 0).all()


def test_training_helpers():
    model, inputs = make()
    loss, _ = model.compute_loss(model(inputs), inputs)
    loss.backward()
    w = {s: d.weight.detach().clone() for s, d in model.decoders.items()}
    grad = {s: d.weight.grad.clone() for s, d in model.decoders.items()}
    model.unit_norm_decoder_()
    model.project_decoder_grad_()
    for s, decoder in model.decoders.items():
        unit = reference.unit_norm_decoder(w[s])
        assert_close(decoder.weight, unit)
        assert_close(decoder.weight.grad, reference.project_decoder_grad(unit, grad[s]))
    dead = model.get_dead_neurons()
    rows = {s: e.weight.detach().clone() for s, e in model.encoders.items()}
    counts = model.reinit_dead_(generator=torch.Generator(DEVICE).manual_seed(0))
    for s in WIDTHS:
        assert counts[s] == int(dead[s].sum()) > 0
        fresh = model.encoders[s].weight[dead[s]]
        assert fresh.std().item() == pytest.approx(0.01, rel=0.2)
        assert torch.equal(model.encoders[s].weight[~dead[s]], rows[s][~dead[s]])
        assert (model.latent_biases[s][dead[s]] == 0).all()
    assert not any(d.any() for d in model.get_dead_neurons().values())
    assert model.reinit_dead_() == dict.fromkeys(WIDTHS, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype_and_stays_near_float32(dtype):
    model, inputs = make(dtype=torch.float32, auxk=8)
    plain, _ = model.compute_loss(model(inputs), inputs)
    with torch.autocast(DEVICE, dtype):
        out = model(inputs)
        loss, _ = model.compute_loss(out, inputs)
        assert out["recon_text"].dtype == dtype
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - plain) / plain < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    """Loss and gradients against float64 at the same selections, within what rounding to the dtype explains."""
    model, inputs = make(dtype=dtype, auxk=None)
    out = model(inputs)
    loss, _ = model.compute_loss(out, inputs)
    loss.backward()
    exact, _ = make(dtype=torch.float64, auxk=None)
    exact.load_state_dict(model.state_dict())
    x = {s: v.double() for s, v in inputs.items()}
    want = reference_loss(exact, x, None, indices=out.indices)
    assert_close(loss, want, 4 * torch.finfo(dtype).eps)
    grads = torch.autograd.grad(want, list(exact.parameters()))
    for (name, p), g in zip(model.named_parameters(), grads, strict=True):
        assert p.grad.dtype == dtype
        assert_close(p.grad, g, 8 * torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("mode", ["loss", "module"])
@pytest.mark.compile
def test_compiles_as_one_graph(mode):
    model, inputs = make(dtype=torch.float32)
    eager = copy.deepcopy(model)

    def step(model, inputs):
        return model.compute_loss(model(inputs), inputs)

    torch._dynamo.reset()
    if mode == "loss":
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        loss, metrics = compiled(model, inputs)
    else:
        outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs)
        loss, metrics = model.compute_loss(outputs, inputs)
    loss.backward()
    want, want_metrics = step(eager, inputs)
    want.backward()
    assert_close(loss, want)
    assert metrics.keys() == want_metrics.keys()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert_close(a.grad, b.grad, what=name)
    assert torch.equal(model.stats_last_nonzero_text, eager.stats_last_nonzero_text)


def gradients_of(model, loss, **options):
    return torch.autograd.grad(loss, list(model.parameters()), **options)


def test_scaled_accumulated_and_repeated_backwards(impl):
    """The decoders' gradients are taken in the forward: whatever comes from above must still multiply them, once."""
    model, inputs = make(impl, **TWO)
    model.eval()  # the same latents stay dead
    loss, _ = model.compute_loss(model(inputs), inputs)
    first = gradients_of(model, loss, retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:  # as clipping does; autograd must not miss them
        g.zero_()
    again = gradients_of(model, loss)  # the buffers were given away by the first
    for _ in range(2):
        loss, _ = model.compute_loss(model(inputs), inputs)
        (loss / 2).backward()
    loss, _ = model.compute_loss(model(inputs), inputs)
    scaled = gradients_of(model, torch.tensor(-3.0, dtype=loss.dtype, device=DEVICE) * loss)
    for (name, p), g, h, minus in zip(model.named_parameters(), want, again, scaled, strict=True):
        assert_close(h, g, what=name)
        assert_close(p.grad, g, what=name)
        assert_close(minus, -3 * g, what=name)


@pytest.mark.parametrize(
    ("impl", "topk_type", "reentrant"),
    [
        (how, kind, reentrant)
        for how in ("torch", "triton")
        for kind in ("global", "local")
        for reentrant in (False, True)
    ],
)
def test_activation_checkpointing_moves_the_counters_once(impl, topk_type, reentrant):
    from torch.utils.checkpoint import checkpoint

    plain, inputs = make(impl, topk_type, **TWO)
    kept = copy.deepcopy(plain)
    others = {s: torch.randn_like(x) for s, x in inputs.items()}

    def losses(model, wrap):
        return [wrap(lambda anchor, x=x: model.compute_loss(model(x), x)[0] + 0 * anchor) for x in (inputs, others)]

    anchor = torch.zeros((), device=DEVICE, dtype=inputs["text"].dtype, requires_grad=True)  # for the reentrant form
    want = losses(plain, lambda f: f(anchor))
    got = losses(kept, lambda f: checkpoint(f, anchor, use_reentrant=reentrant))  # two in flight
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        a.backward()
        b.backward()
    for (name, p), q in zip(kept.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for s in inputs:
        assert torch.equal(getattr(kept, f"stats_last_nonzero_{s}"), getattr(plain, f"stats_last_nonzero_{s}"))
    assert not copy.deepcopy(kept)._recent_dead


def test_checkpointing_too_many_forwards_at_once_is_refused_by_name():
    from torch.utils.checkpoint import checkpoint

    model, _ = make()
    batches = [{s: torch.randn(6, d, dtype=KERNEL_DTYPE, device=DEVICE) for s, d in WIDTHS.items()} for _ in range(9)]
    losses = [checkpoint(lambda x=x: model.compute_loss(model(x), x)[0], use_reentrant=False) for x in batches]
    losses[-1].backward()
    with pytest.raises(RuntimeError, match="inputs: expected those of one of the last 8 forwards"):
        losses[0].backward()


class Looks(InsideOperators):
    """What reads values of a tensor into Python, or shapes from values."""

    impl = "torch"

    def dispatch(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        bad = name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")
        indexed = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not (bad or indexed), f"{name} reads a value"
        return func(*args, **kwargs)


@pytest.mark.parametrize("topk_type", ["global", "local"])
@pytest.mark.parametrize("dead", [0, 3, 40])
def test_the_torch_path_reads_no_value_where_that_would_wait(monkeypatch, topk_type, dead):
    """As on a GPU with impl="torch": the same results, and nothing looked at."""
    from sparc_kernels.core import numerics, validation
    from sparc_kernels.ops import decode_grads, gather, latent_reduce, loss_terms, selection

    def step(model):
        for s in WIDTHS:
            counter = getattr(model, f"stats_last_nonzero_{s}")
            counter.zero_()[:dead] = 9
        loss, _ = model.compute_loss(model(inputs), inputs)
        loss.backward()
        return loss

    model, inputs = make("torch", topk_type, dtype=torch.float64)
    want, plain = step(model), copy.deepcopy([p.grad for p in model.parameters()])
    model.zero_grad()
    for where in (decode_grads, gather, latent_reduce, loss_terms, numerics, selection):
        monkeypatch.setattr(where, "is_host_readable", lambda tensor: False)
    monkeypatch.setattr(validation, "check_indices", lambda name, value, *rest: value)
    with Looks(), pytest.raises(AssertionError, match="reads a value"):
        want.item()
    with Looks():
        got = step(model)
    assert_close(got, want)
    for (name, p), g in zip(model.named_parameters(), plain, strict=True):
        assert_close(p.grad, g, what=name)


def test_a_loss_without_gradients_makes_none(monkeypatch):
    from sparc_kernels.ops import decode_grads

    model, inputs = make()
    want, _ = model.compute_loss(model(inputs), inputs)
    monkeypatch.setattr(decode_grads, "decode_grads", lambda *args: pytest.fail("gradients were made"))
    model.eval()
    with torch.no_grad():
        loss, _ = model.compute_loss(model(inputs), inputs)
    assert loss.isfinite() and want.requires_grad and not loss.requires_grad


def test_one_hot_latent_on_every_row_and_no_positive_value(impl):
    """Every row selects the same latents; then latent biases so low that the ReLU kills all of them."""
    model, inputs = make(impl, B=12 if CUDA else 4, N=12, k=3, auxk=4, widths=TWO["widths"])
    with torch.no_grad():
        for s in inputs:
            model.latent_biases[s][:3] = 100.0
    loss, _ = model.compute_loss(model(inputs), inputs)
    assert model(inputs).indices.sort(1).values.eq(torch.arange(3, device=DEVICE)).all()
    dead = model.get_dead_neurons()
    loss, _ = model.compute_loss(model(inputs), inputs)
    want = reference_loss(model, inputs, model.get_dead_neurons())
    assert dead.keys() == model.get_dead_neurons().keys()
    for (name, _), a, b in zip(
        model.named_parameters(), gradients_of(model, loss), gradients_of(model, want), strict=True
    ):
        assert_close(a, b, what=name)
    with torch.no_grad():
        for s in inputs:
            model.latent_biases[s][:] = -100.0
    out = model(inputs)
    loss, metrics = model.compute_loss(out, inputs)
    assert all((out[f"values_{s}"] == 0).all() for s in inputs) and metrics["avg_l1_sparsity"] == 0
    want = reference_loss(model, inputs, model.get_dead_neurons())
    assert_close(loss, want)
    for (name, _), a, b in zip(
        model.named_parameters(), gradients_of(model, loss), gradients_of(model, want), strict=True
    ):
        assert_close(a, b, what=name)


def test_autocast_lays_the_encoders_side_by_side_for_the_library(monkeypatch):
    from sparc_kernels.nn import forward, module
    from sparc_kernels.ops import encode, joint

    model, inputs = make(dtype=torch.float32)

    def step():
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss, _ = model.compute_loss(model(inputs), inputs)
        loss.backward()
        return loss, [p.grad for p in model.parameters()]

    apart, want = step()
    monkeypatch.setattr(module, "wants_joint", lambda w: True)
    seen = []
    monkeypatch.setattr(
        forward,
        "select_latents",
        lambda xs, ws, *a, **b: seen.extend(map(joint.joint, (xs, ws))) or encode.select_latents(xs, ws, *a, **b),
    )
    monkeypatch.setattr(encode, "wants_joint", lambda w: True)
    for s in WIDTHS:
        getattr(model, f"stats_last_nonzero_{s}").copy_(
            getattr(make(dtype=torch.float32)[0], f"stats_last_nonzero_{s}")
        )
    together, got = step()
    assert seen[0].shape == (6, 40) and seen[1].shape == (70, 40) and torch.equal(together, apart)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
