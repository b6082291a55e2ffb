"""Problems to run the operators on, and comparisons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from conftest import DEVICE, KERNEL_DTYPE


@dataclass
class Problem:
    xs: list
    w_encs: list
    w_decs: list
    pre_biases: list
    latent_biases: list

    @property
    def encoder(self):
        return self.xs, self.w_encs, self.pre_biases, self.latent_biases

    @property
    def tensors(self):
        return [t for group in vars(self).values() for t in group]


def problem(B=6, N=70, widths=(20, 13, 7), dtype=KERNEL_DTYPE, seed=0, requires_grad=True) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)

    p = Problem(
        xs=[randn(B, d) for d in widths],
        w_encs=[randn(N, d) / d**0.5 for d in widths],
        w_decs=[(randn(N, d) / d**0.5).t() for d in widths],
        pre_biases=[0.1 * randn(d) for d in widths],
        latent_biases=[0.1 * randn(N) for d in widths],
    )
    if requires_grad:
        for t in p.tensors:
            t.requires_grad_()
    return p


COMPOSITE = {"aten::matmul", "aten::einsum", "aten::linear"}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the largest magnitude."""
    scale = want.abs().max().item()
    return (got.double() - want.double()).abs().max().item() / (scale or 1.0)


def assert_close(got, want, tol=None, what="") -> None:
    tol = tol or (1e-12 if want.dtype == torch.float64 else 1e-5)
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = relative(got, want)
    assert error <= tol, f"{what}: relative error {error:.2e} > {tol:.0e}"


def assert_grads_close(got, want, tensors, names, tol=None) -> None:
    """Gradients of two scalars with respect to the same tensors."""
    a = torch.autograd.grad(got, tensors)
    b = torch.autograd.grad(want, tensors)
    assert any(y.abs().max() > 0 for y in b), "the reference gradients are zero, nothing is tested"
    for name, x, y in zip(names, a, b, strict=True):
        assert_close(x, y, tol, f"gradient of {name}")
