"""Launches every kernel at small odd shapes, for the memory checker.

    python -m benchmarks.exercise

Without a GPU the first part alone, on torch's own operators.
"""

from __future__ import annotations

from functools import partial

import torch

from sparc_kernels import AlignedSAE, SparcAdam, encode_topk
from sparc_kernels.core.console import ends_with_its_pipe

WIDTHS = {"a": 40, "b": 33, "c": 65, "d": 48}


def steps(dtype: torch.dtype, topk_type: str, S: int, input_grads: bool, device: str) -> None:
    """Training in each of its forms; with gradients of the inputs, none are made in the forward."""
    torch.manual_seed(0)
    streams = dict(list(WIDTHS.items())[:S])
    model = AlignedSAE(
        streams, 203, 7, 5, dead_steps_threshold=1, topk_type=topk_type, device=device, dtype=torch.float32
    ).to(dtype)
    # a common mean: some latents are selected in every row, more than one program of the gradient takes
    rows = {s: (torch.randn(133, d, device=device) + 2).to(dtype) for s, d in streams.items()}
    inputs = {s: x.clone().requires_grad_(input_grads) for s, x in rows.items()}
    for _ in range(3):  # the first has no dead latents yet
        outputs = model(inputs)
        loss, _ = model.compute_loss(outputs, inputs)
        # half of it: gradients that were made with the loss are scaled
        (0.5 * loss + outputs["recon_a"].float().square().mean()).backward()
    SparcAdam(model, max_grad_norm=1.0).step()
    model.zero_grad()
    model.training_step(rows, SparcAdam(model))
    _say(f"{topk_type} {dtype} S {S} loss", loss)


def three_levels(device: str) -> None:
    """The selection among very many."""
    n, d = 2**20 + 5, 16
    w, zeros = torch.randn(n, d, device=device).bfloat16(), torch.zeros(n, device=device).bfloat16()
    indices, _ = encode_topk([w[:3].contiguous()], [w], [zeros[:d]], [zeros], 64)
    _say(f"selection among {n}, largest id", indices.max())


def library_gemm(device: str) -> None:
    """The library's GEMM and the pass over its logits."""
    rows, n, d = 1025, 203, 4096
    x, w, biases = (torch.randn(*shape, device=device).bfloat16() for shape in ((rows, d), (n, d), (max(n, d),)))
    indices, _ = encode_topk([x], [w], [biases[:d]], [biases[:n]], 7)
    _say(f"selection of {rows} rows, largest id", indices.max())


def many_selected(device: str) -> None:
    """Values of more latents than one gather takes."""
    rows, n, d, k = 5, 403, 40, 300
    x, w, biases = (torch.randn(*shape, device=device) for shape in ((rows, d), (n, d), (max(n, d),)))
    _, values = encode_topk([x], [w], [biases[:d]], [biases[:n]], k)
    _say(f"values of {k} latents, sum", values.sum())


PARTS = (  # each takes a device; "meta" to record launches
    partial(steps, torch.bfloat16, "global", 3, False),
    partial(steps, torch.bfloat16, "global", 4, True),  # four sources: gradients by way of H
    partial(steps, torch.float16, "global", 3, False),
    partial(steps, torch.float32, "global", 3, False),
    partial(steps, torch.bfloat16, "local", 3, True),
    three_levels,
    library_gemm,
    many_selected,
)


def _say(what: str, number: torch.Tensor) -> None:
    if not number.is_meta:
        print(f"exercised {what} {float(number.detach()):.6g}", flush=True)


@ends_with_its_pipe
def main() -> int:
    cuda = torch.cuda.is_available()
    for part in PARTS if cuda else PARTS[:1]:
        part("cuda" if cuda else "cpu")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
