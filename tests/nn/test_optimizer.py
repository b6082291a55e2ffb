"""SparcAdam against torch.optim.Adam and the official normalisation; the training step without gradients against it."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from common import assert_close
from conftest import DEVICE, KERNEL_DTYPE

from sparc_kernels import AlignedSAE, SparcAdam
from sparc_kernels.ops import adam as ops_adam
from sparc_kernels.ops import adam_update, joint, latent_adam
from sparc_kernels.tools.shape import Shape
from sparc_kernels.tools.trace import trace

WIDTHS = {"a": 20, "b": 7}
NEVER = slice(10, 12)  # latents that no row selects
F32, F64 = torch.float32, torch.float64


def model(dtype=F64, N=12, k=3, auxk=2, widths=WIDTHS, never=True, **options):
    torch.manual_seed(0)
    m = AlignedSAE(widths, N, k, auxk, dead_steps_threshold=2, dtype=dtype, device=DEVICE, **options)
    with torch.no_grad():
        for p in (*m.pre_biases.values(), *m.latent_biases.values()):
            p.copy_(0.1 * torch.randn(p.shape))
        for c in m.latent_biases.values() if never else ():
            c[NEVER] = -1e4
        for counter in m.buffers():
            counter.fill_(2)  # what the first step does not select is dead in the second
    return m


def batches(steps, dtype=F64, rows=4, widths=WIDTHS):
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield {s: torch.randn(rows, d, generator=g, dtype=F64).to(DEVICE, dtype) for s, d in widths.items()}


def backward(m, x, **coefs):
    m.zero_grad()
    loss, metrics = m.compute_loss(m(x), x, **coefs)
    loss.backward()
    return loss.detach(), metrics


def official_step(m, optimizer, normalize, clip=None):
    """The official loop's sequence, or the later works' with the division last."""
    if normalize == "before":
        m.unit_norm_decoder_()
    if normalize:
        m.project_decoder_grad_()
    norm = torch.nn.utils.clip_grad_norm_(m.parameters(), clip) if clip else None
    optimizer.step()
    if normalize == "after":
        m.unit_norm_decoder_()
    return norm


def assert_same_weights(a, b, tol=1e-12):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), tol, name)


def assert_same_state(a, b, tol=1e-12):
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert_close(a.state[p][moment], b.state[q][moment].to(a.state[p][moment].dtype), tol, f"{name} {moment}")
        assert int(a.state[p]["step"]) == int(b.state[q]["step"])


@pytest.mark.parametrize(
    ("normalize", "decay", "clip", "steps"),
    [("before", 0.0, None, 100), ("after", 0.0, None, 20), (None, 0.1, None, 20), ("before", 0.1, 0.5, 20),
     ("after", 0.0, 0.5, 20)],
)  # fmt: skip
def test_equals_torchs_adam_and_the_official_helpers(impl, normalize, decay, clip, steps):
    steps = steps if impl == "torch" else 2
    dtype = F64 if impl == "torch" else KERNEL_DTYPE
    ours, theirs = model(dtype, impl="torch"), model(dtype, impl="torch")
    mine = SparcAdam(ours, 1e-2, weight_decay=decay, normalize=normalize, max_grad_norm=clip, impl=impl)
    official = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=decay)
    official.model = theirs
    before, idle = copy.deepcopy(theirs), 0
    tol = 1e-12 if dtype == F64 else 1e-5
    for x in batches(steps):
        x = {s: t.to(dtype) for s, t in x.items()}
        backward(ours, x)
        backward(theirs, x)
        given = [p.grad.clone() for p in ours.parameters()]
        mine.step()
        norm = official_step(theirs, official, normalize, clip)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), given, strict=True)), "gradients changed"
        if clip:
            assert_close(mine.grad_norm, norm, tol, "norm")
        idle = max(idle, int(max(c.max() for n, c in theirs.named_buffers())))
    assert_same_weights(ours, theirs, tol)
    assert_same_state(mine, official, tol)
    never = theirs.encoders["a"].weight[NEVER]
    assert idle == steps + 2 and not official.state[theirs.encoders["a"].weight]["exp_avg_sq"][NEVER].any()
    assert decay or torch.equal(never, before.encoders["a"].weight[NEVER])
    if normalize:
        norms = torch.cat([d.weight.norm(dim=0) for d in ours.decoders.values()])
        assert (norms - 1).abs().max() < (1e-7 if normalize == "after" else 0.2)


def test_float32_is_as_near_the_truth_as_torch_is(impl):
    """Adam's first steps divide gradients by their own size: rounding is judged against float64, beside torch's."""
    truth, ours, theirs = model(F64), model(F32), model(F32)
    for m in (ours, theirs):
        m.load_state_dict(truth.state_dict())
    truth.load_state_dict(ours.state_dict())
    mine, official = SparcAdam(ours, 1e-2, impl=impl), torch.optim.Adam(theirs.parameters(), 1e-2)
    exact = torch.optim.Adam(truth.parameters(), 1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q, r in zip(truth.parameters(), ours.parameters(), theirs.parameters(), strict=True):
            grad = torch.randn(p.shape, generator=g, dtype=F32).to(DEVICE)
            p.grad, q.grad, r.grad = grad.double(), grad.clone(), grad.clone()
        mine.step()
        official_step(theirs, official, "before")
        official_step(truth, exact, "before")
    for (name, p), q, r in zip(truth.named_parameters(), ours.parameters(), theirs.parameters(), strict=True):
        own, torchs = ((x.double() - p).abs().max() / p.abs().max() for x in (q, r))
        assert own <= 2 * torchs + 2**-24, f"{name}: {own:.1e}, torch {torchs:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_moments(impl, dtype):
    m, truth = model(dtype, impl="torch", never=False), model(F64, impl="torch", never=False)
    truth.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in m.state_dict().items()})
    mine, exact = SparcAdam(m, 1e-2, normalize="after", impl=impl), torch.optim.Adam(truth.parameters(), 1e-2)
    g = torch.Generator().manual_seed(0)
    for p, q in zip(m.parameters(), truth.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=g).to(DEVICE, dtype)
        q.grad = p.grad.double()
    mine.step()
    official_step(truth, exact, "after")
    exact.model = truth
    for p, q in zip(m.parameters(), truth.parameters(), strict=True):
        assert p.dtype == dtype and mine.state[p]["exp_avg"].dtype == mine.state[p]["exp_avg_sq"].dtype == F32
        # one rounding to the parameter's dtype; the interpreter truncates where a GPU rounds
        assert_close(p.detach().double(), q.detach(), 1.01 * torch.finfo(dtype).eps)
    assert_same_state(mine, exact, 2e-5 if dtype == torch.bfloat16 else 1e-5)


# the training step without gradients

FORMS = [
    dict(), dict(topk_type="local"), dict(auxk=None), dict(topk_type="local", auxk=None),
    dict(N=5, never=False),  # lists of many entries: split over programs in the interpreter
    dict(widths={"a": 20}),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_step_is_the_step_with_gradients(impl, form):
    dtype = F64 if impl == "torch" else KERNEL_DTYPE
    ours, theirs = model(dtype, impl=impl, **form), model(dtype, impl="torch", **form)
    mine, dense = SparcAdam(ours, 1e-2, impl=impl), SparcAdam(theirs, 1e-2, impl="torch")
    tol = 1e-12 if dtype == F64 else 2e-4
    dead = 0
    for x in batches(20 if impl == "torch" else 2, dtype, widths=ours.d_streams):
        loss, metrics = ours.training_step(x, mine)
        wanted, their_metrics = backward(theirs, x)
        dense.step()
        assert_close(loss, wanted, tol, "loss")
        assert list(metrics) == list(their_metrics)
        for name, value in metrics.items():
            assert_close(value, their_metrics[name], tol, name)
        assert all(p.grad is None for p in ours.parameters())
        dead = max(dead, *(int(d.sum()) for d in theirs.get_dead_neurons().values()))
    assert_same_weights(ours, theirs, tol)
    assert_same_state(mine, dense, tol)
    assert dead or "N" in form, "nothing was dead: AuxK was not tested"
    for name, counter in ours.named_buffers():
        assert torch.equal(counter, theirs.get_buffer(name))


@pytest.mark.parametrize(("normalize", "cross"), [("after", 0.3), (None, 0.0)])
def test_training_step_with_other_coefficients_and_modes(impl, normalize, cross):
    dtype = F64 if impl == "torch" else KERNEL_DTYPE
    ours, theirs = model(dtype, never=False, impl=impl), model(dtype, never=False, impl="torch")
    mine = SparcAdam(ours, 1e-2, normalize=normalize, weight_decay=0.1, impl=impl)
    dense = SparcAdam(theirs, 1e-2, normalize=normalize, weight_decay=0.1, impl="torch")
    for x in batches(2, dtype):
        ours.training_step(x, mine, auxk_coef=0.5, cross_loss_coef=cross)
        backward(theirs, x, auxk_coef=0.5, cross_loss_coef=cross)
        dense.step()
    assert_same_weights(ours, theirs, 1e-12 if dtype == F64 else 2e-4)


def test_training_step_twice_gives_the_same_bits(impl):
    runs = []
    for _ in range(2):
        m = model(F32, never=False, impl=impl)
        optimizer = SparcAdam(m, 1e-2, impl=impl)
        for x in batches(2, F32):
            m.training_step(x, optimizer)
        runs.append([*m.parameters(), *(optimizer.state[p]["exp_avg"] for p in m.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_training_step_under_autocast_keeps_float32_weights():
    """Master weights in float32: the step with gradients rounds dW to bfloat16, this one does not."""
    exact, ours, theirs = model(F32), model(F32), model(F32)
    optimizers = [SparcAdam(m, 1e-3) for m in (exact, ours, theirs)]
    for x in batches(3, F32):
        exact.training_step(x, optimizers[0])
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, _ = ours.training_step(x, optimizers[1])
            wanted, _ = backward(theirs, x)
        optimizers[2].step()
        assert_close(loss, wanted, 1e-2)
    off = [0.0, 0.0]
    for p, q, r in zip(*(m.parameters() for m in (exact, ours, theirs)), strict=True):
        assert q.dtype == F32
        off = [a + (x - p).norm().item() for a, x in zip(off, (q, r), strict=True)]
    assert 0 < off[0] < 1.1 * off[1]


@pytest.mark.parametrize(
    ("impl", "form"),
    [("torch", dict()), ("torch", dict(widths={"a": 16, "b": 8})), ("triton", dict(widths={"a": 16, "b": 8}))],
)
def test_a_shadow_of_the_weights_changes_no_bit(impl, form, monkeypatch):
    """Through all that moves weights: steps of both kinds, new rows, a loaded state; and a batch that is skipped.
    With two widths the encoders lie side by side, for the library's GEMM."""
    monkeypatch.setattr(joint, "LIBRARY_WIDTH", 24)
    # the interpreter truncates where fp32 becomes bfloat16
    half = torch.bfloat16 if impl == "torch" or DEVICE == "cuda" else torch.float16
    plain, shadowed = model(F32, impl=impl, never=False, **form), model(F32, impl=impl, never=False, **form)
    one, two = SparcAdam(plain, 1e-2, impl=impl), SparcAdam(shadowed, 1e-2, shadow=half, impl=impl)
    saved = copy.deepcopy(plain.state_dict())
    for i, x in enumerate(batches(2 if impl == "triton" else 5, F32, widths=plain.d_streams)):
        if i == 3:
            x["a"][0, 0] = float("nan")
        losses = []
        for m, optimizer in ((plain, one), (shadowed, two)):
            with torch.autocast(DEVICE, half):
                losses.append(m.training_step(x, optimizer)[0])
                if i == 1:
                    backward(m, x)
                    optimizer.step()
                    optimizer.zero_grad()
            if i == 0:
                next(m.buffers()).fill_(10**9)
                m.reinit_dead_(generator=torch.Generator(DEVICE).manual_seed(1))
            if i == 2:
                m.load_state_dict(saved)
        assert torch.equal(*losses) or i == 3
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), shadowed.parameters(), strict=True))
    with torch.autocast(DEVICE, half):
        halves = two.half_weights()
    assert (halves[0][0].stride(0) == 24) == bool(form)
    for held, (w_enc, w_dec, *_) in zip(halves, two.streams(), strict=True):
        assert held[0].dtype == half
        assert torch.equal(held[0], w_enc.to(half)) and torch.equal(held[1], w_dec.t().to(half))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_the_shadow_is_read_where_autocast_asks_for_its_dtype_alone(dtype):
    def losses(shadow):
        m = model(F32, never=False)
        optimizer = SparcAdam(m, 1e-2, shadow=shadow)
        for x in batches(2, F32):
            with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
                yield m.training_step(x, optimizer)[0]
            with torch.autocast(DEVICE, shadow or torch.bfloat16):
                for pair in optimizer.half_weights() or ():
                    for held in pair:
                        held.zero_()  # whoever reads it now gets another loss

    (first, planted), (wanted, other) = losses(torch.bfloat16), losses(None)
    assert torch.equal(first, wanted) and torch.equal(planted, other) == (dtype != torch.bfloat16)


def test_weights_changed_behind_autograds_back_are_seen_after_refreshing():
    m, (x, y) = model(F32, never=False), batches(2, F32)
    optimizer = SparcAdam(m, 1e-2, shadow=torch.bfloat16)
    optimizer.refresh_shadow()  # nothing is there yet
    with torch.autocast(DEVICE, torch.bfloat16):
        m.training_step(x, optimizer)
        copied = copy.deepcopy(optimizer)  # has none yet, and its own weights
        for each in (m, copied.model):
            each.encoders["a"].weight.data.mul_(2)
        optimizer.refresh_shadow(seen_only=True)
        stale = [held.clone() for held in optimizer.half_weights()[0]]
        optimizer.refresh_shadow()
        assert torch.equal(optimizer.half_weights()[0][0], 2 * stale[0])
        assert torch.equal(m.training_step(y, optimizer)[0], copied.model.training_step(y, copied)[0])


def test_other_weights_at_the_same_address_are_seen():
    m = model(F32, never=False)
    optimizer, w = SparcAdam(m, 1e-2, shadow=torch.bfloat16), m.encoders["a"].weight
    with torch.autocast(DEVICE, torch.bfloat16):
        m.training_step(next(batches(1, F32)), optimizer)
        there, state = torch.from_dlpack(w.detach()), (w.data_ptr(), w._version)
        w.data = there.mul_(2)
        assert (w.data_ptr(), w._version) == state
        assert torch.equal(optimizer.half_weights()[0][0], w.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_whose_loss_is_not_finite_changes_nothing_but_the_counters(impl, bad):
    m = model(KERNEL_DTYPE, never=False, auxk=None, impl=impl)
    optimizer = SparcAdam(m, 1e-2, impl=impl)
    good, wrong = batches(2, KERNEL_DTYPE)
    m.training_step(good, optimizer)
    before = [t.clone() for p in m.parameters() for t in (p, *optimizer.state[p].values())]
    counters = [b.clone() for b in m.buffers()]
    wrong["a"][3, 2] = bad
    loss, _ = m.training_step(wrong, optimizer)
    assert not loss.isfinite()
    after = [t for p in m.parameters() for t in (p, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(counters, m.buffers(), strict=True))
    m.training_step(good, optimizer)
    assert int(optimizer.state[m.encoders["a"].weight]["step"]) == 2


# saved states, schedules, scalers


def test_resumed_from_a_saved_state_bit_for_bit(impl):
    dtype = F32
    straight = model(dtype, never=False, impl=impl)
    optimizer = SparcAdam(straight, 1e-2, capturable=True, impl=impl)
    steps = 2 if impl == "torch" else 1
    for x in batches(steps, dtype):
        straight.training_step(x, optimizer)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file)
    resumed = model(dtype, never=False, impl=impl)
    resumed.load_state_dict(saved[0])
    again = SparcAdam(resumed, 5e-2, capturable=True, impl=impl)
    again.load_state_dict(saved[1])
    saved[1]["state"][0]["exp_avg"].zero_()  # what was loaded is a copy
    assert float(again.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
    copied = copy.deepcopy(again)
    assert copied.model is not resumed
    for x in list(batches(2 * steps, dtype))[steps:]:
        for m, o in ((straight, optimizer), (resumed, again), (copied.model, copied)):
            m.training_step(x, o)
    for m, o in ((resumed, again), (copied.model, copied)):
        for p, q in zip(straight.parameters(), m.parameters(), strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(optimizer.state[p][n], o.state[q][n]) for n in ("step", "exp_avg", "exp_avg_sq"))


def test_loading_keeps_the_addresses_that_a_graph_has_captured():
    m = model(F32)
    optimizer = SparcAdam(m, 1e-2, capturable=True)
    x, y = batches(2, F32)
    m.training_step(x, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    m.training_step(y, optimizer)

    def addresses():
        states = [t for p in m.parameters() for t in optimizer.state[p].values()]
        return [t.data_ptr() for t in (*states, optimizer.param_groups[0]["lr"], optimizer.counts)]

    before = addresses()
    optimizer.load_state_dict(state)
    assert addresses() == before and all(int(optimizer.state[p]["step"]) == 1 for p in m.parameters())


def test_its_own_state_is_loaded_and_lost_moments_are_made_again():
    m = model(F32)
    optimizer = SparcAdam(m, 1e-2)
    x, y = batches(2, F32)
    m.training_step(x, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # its steps are views of the counts
    assert all(int(optimizer.state[p]["step"]) == 1 for p in m.parameters())
    for lost in (lambda state: state.pop("exp_avg"), lambda state: state.update(exp_avg_sq=None)):
        lost(optimizer.state[m.decoders["a"].weight])
        m.training_step(y, optimizer)
    assert all(state[name].any() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


def test_half_precision_moments_are_loaded_as_they_were():
    m = model(torch.bfloat16)
    optimizer = SparcAdam(m, 1e-2)
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = SparcAdam(model(torch.bfloat16), 1e-2)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(m.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])
        assert other.state[q]["exp_avg_sq"].dtype == F32


def test_states_load_from_torchs_adam_and_back():
    theirs = model()
    official = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1)
    x, y, z = batches(3)
    for batch in (x, y):
        backward(theirs, batch)
        official_step(theirs, official, "before")
    ours, back = copy.deepcopy(theirs), copy.deepcopy(theirs)
    mine = SparcAdam(ours, 1.0)
    mine.load_state_dict(copy.deepcopy(official.state_dict()))
    assert mine.param_groups[0]["normalize"] == "before" and mine.param_groups[0]["weight_decay"] == 0.1
    returned = torch.optim.AdamW(back.parameters(), 1.0)
    returned.load_state_dict(copy.deepcopy(mine.state_dict()))
    for m in (theirs, ours, back):
        backward(m, z)
    official_step(theirs, official, "before")
    mine.step()
    official_step(back, returned, "before")
    assert_same_weights(ours, theirs)
    assert_same_weights(back, theirs)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.filterwarnings("error:Detected call of")
def test_learning_rate_schedules(capturable, impl):
    ours, theirs = (
        model(KERNEL_DTYPE, never=False, impl=impl),
        model(KERNEL_DTYPE, never=False, impl="torch"),
    )
    mine = SparcAdam(ours, 1e-2, capturable=capturable, impl=impl)
    official = torch.optim.Adam(theirs.parameters(), 1e-2)
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 2), torch.optim.lr_scheduler.CosineAnnealingLR(o, 3)], [2],
        )
        for o in (mine, official)
    ]  # fmt: skip
    address = mine.param_groups[0]["lr"].data_ptr() if capturable else None
    for i, x in enumerate(batches(4 if impl == "torch" else 2, KERNEL_DTYPE)):
        if i % 2:
            backward(ours, x)
            mine.step()
            mine.zero_grad()
        else:
            ours.training_step(x, mine)
        backward(theirs, x)
        official_step(theirs, official, "before")
        for s in schedules:
            s.step()
    lr = mine.param_groups[0]["lr"]
    assert float(lr) == pytest.approx(official.param_groups[0]["lr"], rel=1e-6)
    assert not capturable or lr.data_ptr() == address
    assert_same_weights(ours, theirs, 1e-6 if capturable else 1e-12 if KERNEL_DTYPE == F64 else 2e-4)


def test_a_scaler_finds_its_attributes_honoured(impl):
    ours, theirs = model(F32, never=False, impl="torch"), model(F32, never=False, impl="torch")
    mine, plain = (SparcAdam(m, 1e-2, impl=impl, max_grad_norm=0.5) for m in (ours, theirs))
    for x in batches(2, F32):
        backward(ours, x)
        backward(theirs, x)
        for p in ours.parameters():
            p.grad *= 1024  # exact
        mine.grad_scale, mine.found_inf = torch.full((), 1024.0, device=DEVICE), torch.zeros(1, device=DEVICE)
        mine.step()
        plain.step()
        assert_close(mine.grad_norm, plain.grad_norm)
    assert_same_weights(ours, theirs, 1e-6)
    before = [p.clone() for p in ours.parameters()]
    mine.found_inf = torch.ones(1, device=DEVICE)
    for p in ours.parameters():
        p.grad.fill_(float("nan"))
    mine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
    assert all(mine.state[p]["step"] == 2 for p in ours.parameters())


def test_torchs_scaler_takes_it():
    m = model(F32)
    optimizer, scaler = SparcAdam(m, 1e-2), torch.amp.GradScaler(DEVICE, init_scale=16.0)
    (x,) = batches(1, F32)
    loss, _ = m.compute_loss(m(x), x)
    scaler.scale(loss).backward()
    before = copy.deepcopy(m)
    scaler.step(optimizer)
    scaler.update()
    backward(before, x)
    SparcAdam(before, 1e-2).step()
    assert_same_weights(m, before, 1e-6)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 3e-5])
def test_a_step_that_can_be_captured_multiplies_by_the_same_numbers(impl, rate):
    """Its learning rate is a tensor, as exact as the number that any other step takes."""
    after = []
    for capturable in (False, True):
        m = AlignedSAE({"a": 6, "b": 5}, 20, 3, device=DEVICE)
        adam = SparcAdam(m, rate, weight_decay=0.1, capturable=capturable, impl=impl)
        for _ in range(3):
            for p in m.parameters():
                p.grad = torch.zeros_like(p)
            adam.step()
        after.append(adam.scalars())
    assert torch.equal(*after) and after[0][0, 0] > 0


# layouts, partial gradients, refusals


def test_layouts_and_widths_that_the_kernels_do_not_take(impl, monkeypatch):
    """Contiguous decoders, rows wider than a program holds, gradients with strides of their own: the same results."""
    ours, theirs = (
        model(KERNEL_DTYPE, never=False, impl=impl),
        model(KERNEL_DTYPE, never=False, impl="torch"),
    )
    mine, plain = (
        SparcAdam(ours, 1e-2, impl=impl, max_grad_norm=0.5),
        SparcAdam(theirs, 1e-2, impl="torch", max_grad_norm=0.5),
    )
    direct = SparcAdam(ours, 1e-2, impl=impl)
    for i, x in enumerate(batches(3, KERNEL_DTYPE)):
        if i == 1:
            ours.decoder_layout_("contiguous")  # the moments follow
        if i == 2:
            monkeypatch.setattr(ops_adam, "ADAM_WIDTH", 13)
            monkeypatch.setattr(adam_update, "ADAM_WIDTH", 13)
            monkeypatch.setattr(latent_adam, "ADAM_WIDTH", 13)
            ours.decoder_layout_("rows")
        backward(ours, x)
        backward(theirs, x)
        grad = ours.encoders["a"].weight.grad
        ours.encoders["a"].weight.grad = None
        ours.encoders["a"].weight.grad = grad.t().contiguous().t()
        mine.step()
        plain.step()
        assert mine.state[ours.decoders["a"].weight]["exp_avg"].stride() == ours.decoders["a"].weight.stride()
    tol = 1e-12 if KERNEL_DTYPE == F64 else 1e-4
    assert_same_weights(ours, theirs, tol)
    dense = SparcAdam(theirs, 1e-2, impl="torch")
    for layout, x in zip(("contiguous", "rows"), batches(2, KERNEL_DTYPE), strict=True):
        ours.decoder_layout_(layout)
        ours.zero_grad()
        ours.training_step(x, direct)
        backward(theirs, x)
        dense.step()
    assert_same_weights(ours, theirs, tol)


def test_parameters_without_a_gradient_are_left_alone(impl):
    m, reference = model(KERNEL_DTYPE, never=False), model(KERNEL_DTYPE, never=False)
    frozen = ("encoders.a.weight", "decoders.b.weight", "pre_biases.b", "latent_biases.a")
    mine, official = SparcAdam(m, 1e-2, impl=impl), torch.optim.Adam(reference.parameters(), 1e-2)
    before = copy.deepcopy(m)
    mine.step()  # no gradient anywhere
    assert not mine.state
    for x in batches(2, KERNEL_DTYPE):
        for one in (m, reference):
            backward(one, x)
            for name in frozen:
                one.get_parameter(name).grad = None
        mine.step()
        for s in ("a",):  # the official helper would divide a decoder without gradient too
            w = reference.decoders[s].weight
            w.data.div_(w.norm(dim=0, keepdim=True) + 1e-8)
        reference.project_decoder_grad_()
        official.step()
    assert_same_weights(m, reference, 1e-12 if KERNEL_DTYPE == F64 else 1e-5)
    for name in frozen:
        assert torch.equal(m.get_parameter(name), before.get_parameter(name))
        assert m.get_parameter(name) not in mine.state


def test_outputs_notice_both_forms_of_the_step(impl):
    m = model(F32, never=False, impl=impl)
    optimizer = SparcAdam(m, impl=impl)
    (x,) = batches(1, F32)
    for step in (lambda: (backward(m, x), optimizer.step(), m.zero_grad()), lambda: m.training_step(x, optimizer)):
        outputs = m(x)
        step()
        with pytest.raises(RuntimeError, match="was changed in place"):
            outputs["recon_a"]


def step(change=lambda m, o: None, inputs=None, **options):
    m = model(F32, never=False)
    optimizer = SparcAdam(m, **options)
    change(m, optimizer)
    (x,) = batches(1, F32)
    m.training_step(x if inputs is None else inputs(x), optimizer)


def loaded(**changes):
    m = model(F32, never=False)
    state = torch.optim.Adam(m.parameters()).state_dict()
    for p in (group := state["param_groups"][0])["params"][:1]:
        state["state"][p] = {"step": torch.ones(()), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    group.update(changes)
    SparcAdam(m).load_state_dict(state)


REFUSALS = {
    "a module": (lambda: SparcAdam(torch.nn.Linear(2, 2)), "model: expected an AlignedSAE, got a Linear"),
    "parameters": (lambda: SparcAdam(list(model().parameters())), "model: expected an AlignedSAE, got a list"),
    "lr negative": (lambda: SparcAdam(model(), -1.0), "lr: expected a finite number >= 0, got -1.0"),
    "lr a vector": (lambda: SparcAdam(model(), torch.ones(2)), r"lr: expected .*shape \[\], got .*\(2,\)"),
    "one beta": (lambda: SparcAdam(model(), betas=(0.9,)), r"betas: expected two numbers in \[0, 1\)"),
    "beta of 1": (lambda: SparcAdam(model(), betas=(0.9, 1.0)), "betas: expected"),
    "eps": (lambda: SparcAdam(model(), eps=float("nan")), "eps: expected a finite number"),
    "shadow": (lambda: SparcAdam(model(), shadow=F32), "shadow: expected torch.bfloat16, torch.float16 or None"),
    "decay": (lambda: SparcAdam(model(), weight_decay=-0.1), "weight_decay: expected"),
    "mode": (lambda: SparcAdam(model(), normalize="both"), "normalize: expected 'before', 'after' or None, got 'both'"),
    "norm of 0": (lambda: SparcAdam(model(), max_grad_norm=0.0), "max_grad_norm: expected a number > 0 or None"),
    "capturable": (lambda: SparcAdam(model(), capturable=1), "capturable: expected True or False"),
    "impl": (lambda: SparcAdam(model(), impl="cuda"), "impl: expected one of"),
    "a group": (
        lambda: SparcAdam(model()).add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
        "param_group: expected none .*one group",
    ),
    "no state": (lambda: SparcAdam(model()).load_state_dict({}), "state_dict: expected what an optimizer's"),
    "amsgrad": (lambda: loaded(amsgrad=True), "state_dict: expected amsgrad=False, got True"),
    "maximize": (lambda: loaded(maximize=True), "state_dict: expected maximize=False"),
    "L2": (lambda: loaded(weight_decay=0.1), "state_dict: expected decoupled weight decay"),
    "shape": (loaded, r"state_dict: exp_avg of parameter 0: expected shape \(12, 20\), got .*\(3,\)"),
    "another optimizer": (
        lambda: model(F32).training_step(next(batches(1, F32)), torch.optim.Adam(model().parameters())),
        "optimizer: expected a SparcAdam, got a Adam",
    ),
    "another model's": (
        lambda: model(F32).training_step(next(batches(1, F32)), SparcAdam(model(F32))), "optimizer: .*another model's",
    ),
    "clipping": (lambda: step(max_grad_norm=1.0), "optimizer: expected max_grad_norm=None .*got 1.0"),
    "a gradient": (
        lambda: step(lambda m, o: setattr(m.encoders["a"].weight, "grad", torch.ones_like(m.encoders["a"].weight))),
        r"encoders\.a\.weight\.grad: expected None",
    ),
    "frozen": (
        lambda: step(lambda m, o: m.pre_biases["b"].requires_grad_(False)), r"pre_biases\.b: expected a parameter that",
    ),
    "a stream missing": (lambda: step(inputs=lambda x: {"a": x["a"]}), "inputs: expected all streams"),
    "coefficient": (
        lambda: model(F32).training_step(next(batches(1, F32)), None, -1.0), "optimizer: expected a SparcAdam",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_has_moved_where_a_step_is_refused():
    m = model(F32)
    optimizer = SparcAdam(m)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="auxk_coef"):
        m.training_step(next(batches(1, F32)), optimizer, auxk_coef=-1.0)
    with pytest.raises(ValueError, match="all streams"):
        m.training_step({"a": next(batches(1, F32))["a"]}, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


# what a GPU would launch

SMALL = Shape(256, 2048, 16, (64, 48), "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("update", ["dense", "direct"])
def test_the_optimizer_never_waits_for_the_device(dtype, update):
    """A step on meta tensors: reading a value back, or a copy from the host, raises."""
    shape = replace(SMALL, dtype=dtype)
    clip = 1.0 if update == "dense" else None
    for topk_type in ("global", "local"):
        for auxk in (True, False):
            traced = trace(shape, topk_type=topk_type, auxk=auxk, update=update, max_grad_norm=clip)
            # nothing outlives the step but AuxK's masks of dead latents, which the module remembers for checkpointing
            masks = 2 * 2048 if auxk else 0
            assert traced.live_bytes_at_end == (masks + 4 if update == "dense" else 0), traced.largest  # 4: the norm


def test_launches_of_the_optimizer():
    """Beside the step's own launches: scalars, and one for all streams of like widths; with clipping one more."""
    for widths, groups in (((64, 48), 1), ((64, 48, 32), 1), ((64, 48, 16), 2), ((64, 40), 2)):
        shape = replace(SMALL, d_streams=widths)
        plain = len(trace(shape).launches)
        assert len(trace(shape, update="dense").launches) == plain + 1 + groups
        assert len(trace(shape, update="dense", max_grad_norm=1.0).launches) == plain + 1 + 2 * groups


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_gradient_of_a_weight_exists(dtype):
    shape = Shape(4096, 65536, 64, (1024, 768, 768), dtype)
    direct, dense = trace(shape, auxk=True, update="direct"), trace(shape, auxk=True, update="dense")
    size = 2 if dtype == "bfloat16" else 4
    assert direct.gradient_bytes == 0 and dense.gradient_bytes >= 2 * 65536 * 2560 * size
    # errors of every target, [3, 4096, 2560], beside what the step with gradients has
    errors = 2 * 3 * 4096 * 2560 * size
    assert direct.peak_bytes < dense.peak_bytes + errors < dense.peak_bytes + dense.gradient_bytes / 4
    assert all(a.shape != (65536, d) for a in direct.largest for d in (1024, 768))
