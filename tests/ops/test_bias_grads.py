"""Gradients of the biases: sums over rows in the accumulator dtype, whatever the rows' dtype is."""

import pytest
import torch
from common import COMPOSITE, assert_close
from conftest import DEVICE

from sparc_kernels import AlignedSAE
from sparc_kernels.ops.bias_grads import TORCH_ROWS, pre_bias_grads
from sparc_kernels.tools.trace import InsideOperators

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {"mv", "addmv", "mm", "addmm", "bmm", "baddbmm", "dot"}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_agrees_with_the_product_in_float64(impl, dtype):
    g = torch.Generator().manual_seed(0)
    n, widths = (20, TORCH_ROWS + 50)[impl == "torch"], (5, 40)  # many chunks of rows in either
    w_encs = [(torch.randn(n, d, generator=g) + 1).to(DEVICE, dtype) for d in widths]
    joint = torch.cat(w_encs, 1).split(widths, 1)  # rows wider than the columns, as JointCast lays them
    sums = [(torch.rand(n, generator=g) + 1).to(DEVICE, dtype) for _ in widths]
    like = [w.new_empty(0, dtype=torch.float32) for w in w_encs]
    want = [-(w.double().t() @ s.double()) for w, s in zip(w_encs, sums, strict=True)]
    for laid in (w_encs, joint):
        for got, truth in zip(pre_bias_grads(list(laid), sums, like, impl), want, strict=True):
            assert_close(got, truth, 1e-5)
    rounded = pre_bias_grads(w_encs, sums, w_encs, impl)
    assert [t.dtype for t in rounded] == [dtype] * 2
    for short, got in zip(rounded, pre_bias_grads(w_encs, sums, like, impl), strict=True):
        assert_close(short, got, torch.finfo(dtype).eps)  # the interpreter truncates to bfloat16


class Products(InsideOperators):
    """The lengths that matrix products add up over, by dtype, the package's operators included."""

    composite = COMPOSITE

    def __init__(self):
        super().__init__()
        self.lengths = {}

    def dispatch(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        if name in PRODUCTS:
            last = [a for a in args if isinstance(a, torch.Tensor)][-1]
            length = last.shape[-2] if last.dim() > 1 else last.shape[0]
            self.lengths.setdefault(last.dtype, []).append(length)
        return func(*args, **kwargs)


@pytest.mark.parametrize("dtype", HALF)
def test_nothing_is_added_up_over_the_latents_in_half_precision(impl, dtype):
    """A library may add up the parts of a long half precision product in half precision."""
    torch.manual_seed(0)
    model = AlignedSAE({"a": 9, "b": 6}, 70, 2, impl=impl, device=DEVICE, dtype=dtype)
    x = {s: torch.randn(5, d, device=DEVICE).to(dtype) for s, d in model.d_streams.items()}
    with Products() as seen:
        loss, _ = model.compute_loss(model(x), x)
        loss.backward()
    assert model.pre_biases["a"].grad.abs().max() > 0
    half, full = (seen.lengths.get(some, []) for some in (dtype, torch.float32))
    assert impl == "triton" or (half and 70 in full), "the encoders' products, or the biases', were not seen"
    assert all(length < 70 for length in half), half
