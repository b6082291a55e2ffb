"""Parameters that SparcAdam does not step as one would think.

One nn.Parameter in two streams: torch.optim.Adam steps it once; SparcAdam and training_step refuse it by name.
Parameters in half precision: updates round away.
"""

import copy
import warnings

import pytest
import torch
from conftest import DEVICE

from sparc_kernels import AlignedSAE, SparcAdam

WIDTHS = {"a": 6, "b": 6, "c": 4}
PARTS = ("encoders", "decoders", "pre_biases", "latent_biases")


def tie(model, part, to="b", of="a"):
    """The parameter of one stream is the other's from now on."""
    group = getattr(model, part)
    if part in ("encoders", "decoders"):
        group[to].weight = group[of].weight
    else:
        group[to] = group[of]
    return model


def model(*parts, dtype=torch.float64):
    torch.manual_seed(0)
    made = AlignedSAE(WIDTHS, 16, 3, auxk=4, dead_steps_threshold=2, dtype=dtype, device=DEVICE)
    for part in parts:
        tie(made, part)
    return made


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        s: torch.randn(9, d, generator=g, dtype=torch.float64).to(DEVICE) for s, d in (("a", 6), ("b", 6), ("c", 4))
    }


@pytest.mark.parametrize("part", PARTS)
def test_shared_parameters_are_refused_by_name(part):
    end = ".weight" if part in ("encoders", "decoders") else ""
    refused = rf"{part}\.b{end}: expected a parameter of its own \(torch.optim.Adam .*got that of {part}\.a{end}"
    with pytest.raises(ValueError, match=refused):
        SparcAdam(model(part))
    late = model()
    optimizer = SparcAdam(late)
    tie(late, part)
    late.compute_loss(late(batch()), batch())[0].backward()
    before = copy.deepcopy(late.state_dict())
    with pytest.raises(ValueError, match=refused):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=refused):
        late.training_step(batch(), optimizer)
    after = late.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "something moved"


def test_a_square_decoder_that_is_its_encoder_is_refused():
    square = AlignedSAE({"a": 6}, 6, 2)
    square.decoders["a"].weight = square.encoders["a"].weight
    with pytest.raises(ValueError, match=r"decoders\.a\.weight: expected .*got that of encoders\.a\.weight"):
        SparcAdam(square)


def test_a_shared_parameter_has_the_sum_of_the_gradients():
    """Of all parts at once, to the rounding of float64; norm and projection come once."""
    tied, plain = model(*PARTS), model()
    plain.load_state_dict(tied.state_dict())
    for m in (tied, plain):
        m.compute_loss(m(batch()), batch())[0].backward()
    apart = dict(plain.named_parameters())
    for name, p in tied.named_parameters():
        shared = ".a" in name
        want = apart[name].grad + (apart[name.replace(".a", ".b")].grad if shared else 0)
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-14)
    w = tied.decoders["a"].weight
    with torch.no_grad():
        w.mul_(1.5)  # not of unit norm: a second projection would not be the first
    want = w.grad - (w * w.grad).sum(0, keepdim=True) * w
    tied.project_decoder_grad_()
    assert torch.equal(w.grad, want)
    want = w / (w.norm(dim=0, keepdim=True) + 1e-8)
    assert torch.equal(tied.unit_norm_decoder_().decoders["b"].weight, want)


@pytest.mark.parametrize("part", ["encoders", "latent_biases"])
def test_a_shared_row_is_dead_where_no_stream_fires(part):
    tied = model(part)
    for s, dead in (("a", [1, 2]), ("b", [2, 3]), ("c", [4])):
        getattr(tied, f"stats_last_nonzero_{s}")[dead] = 9
    with torch.no_grad():
        tied.latent_biases["a"].fill_(1)
    before = tied.encoders["a"].weight.clone()
    assert tied.reinit_dead_() == {"a": 1, "b": 1, "c": 1}
    assert (tied.encoders["a"].weight != before).any(1).nonzero().flatten().tolist() == [2]
    assert (tied.latent_biases["a"] == 0).nonzero().flatten().tolist() == [2]
    assert tied.stats_last_nonzero_a[1] == 9 and tied.stats_last_nonzero_b[2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_warn_once_by_name(dtype):
    part = rf"encoders\.a\.weight: {str(dtype).removeprefix('torch.')} parameters lose updates"
    with pytest.warns(RuntimeWarning, match=part) as caught:
        SparcAdam(model(dtype=dtype))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparcAdam(model(dtype=torch.float32), shadow=dtype)
        SparcAdam(model(dtype=dtype), lr=0.0)  # loses nothing
        SparcAdam(AlignedSAE(WIDTHS, 16, 3, dtype=dtype, device="meta"))
        mixed = model(dtype=torch.float32)
        mixed.pre_biases["b"] = torch.nn.Parameter(mixed.pre_biases["b"].detach().to(dtype))
        with pytest.raises(RuntimeWarning, match=r"pre_biases\.b: "):
            SparcAdam(mixed)
