"""What every operator computes, in plain PyTorch: the specification that runs.

Dense, unoptimised, any floating dtype, CPU or GPU. Tests, `verify` and the benchmarks judge against this file and
nothing else. Equations: docs/math.md. Streams are lists in one fixed order; S streams, B rows, N latents, k active,
d_s the width of stream s. `indices` is [B, k] when the streams share their latents (global) and [S, B, k] when each
has its own (local).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def preactivations(x: Tensor, w_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor) -> Tensor:
    """h = (x - b) W_enc^T + c: x [B, d], w_enc [N, d], pre_bias [d], latent_bias [N] -> [B, N]."""
    return F.linear(x - pre_bias, w_enc, latent_bias)


def topk_indices(h: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, descending, ties to the lowest column, NaN above +inf: [B, N] -> [B, k]."""
    return torch.sort(h, dim=-1, descending=True, stable=True).indices[..., :k]


def select(hs: list[Tensor], k: int, topk_type: str = "global") -> Tensor:
    """Latents of each row: [B, k] from the streams' sum ("global"), or [S, B, k] from each alone ("local")."""
    if topk_type == "local":
        return torch.stack([topk_indices(h, k) for h in hs])
    total = hs[0]
    for h in hs[1:]:
        total = total + h
    return topk_indices(total, k)


def of_stream(indices: Tensor, s: int) -> Tensor:
    """The [B, k] indices that stream s uses."""
    return indices if indices.dim() == 2 else indices[s]


def encode_topk(
    xs: list[Tensor], w_encs: list[Tensor], pre_biases: list[Tensor], latent_biases: list[Tensor], k: int,
    topk_type: str = "global",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Selected latents and their activations v = relu(h at I): -> indices, values [S, B, k]."""
    hs = [preactivations(*args) for args in zip(xs, w_encs, pre_biases, latent_biases, strict=True)]
    indices = select(hs, k, topk_type)
    values = torch.stack([torch.relu(h.gather(1, of_stream(indices, s))) for s, h in enumerate(hs)])
    return indices, values


def codes(indices: Tensor, values: Tensor, n_latents: int) -> Tensor:
    """Dense codes of one stream: indices, values [B, k] -> [B, N]. An index that occurs twice in a row adds up."""
    return values.new_zeros(values.shape[0], n_latents).scatter_add(1, indices, values)


def decode_one(indices: Tensor, values: Tensor, w_dec: Tensor, pre_bias: Tensor) -> Tensor:
    """One reconstruction: indices, values [B, k], w_dec [d, N], pre_bias [d] -> [B, d]."""
    return F.linear(codes(indices, values, w_dec.shape[1]), w_dec) + pre_bias


def decode(
    indices: Tensor, values: Tensor | list[Tensor], w_decs: list[Tensor], pre_biases: list[Tensor]
) -> dict[tuple[int, int], Tensor]:
    """Every reconstruction R[t<-s] of target t from source s: values [S, B, k] -> {(t, s): [B, d_t]}."""
    return {
        (t, s): decode_one(of_stream(indices, s), values[s], w_decs[t], pre_biases[t])
        for t in range(len(w_decs))
        for s in range(len(values))
    }


def nmse(recon: Tensor, x: Tensor) -> Tensor:
    """Normalised mean squared error, uncentred, no epsilon: mean over rows of mean (a - x)^2 / mean x^2."""
    return ((recon - x).square().mean(1) / x.square().mean(1)).mean()


def decode_nmse(
    indices: Tensor, values: Tensor, w_decs: list[Tensor], pre_biases: list[Tensor], xs: list[Tensor]
) -> Tensor:
    """NMSE of every reconstruction: -> [S, S], entry [t, s] for target t from source s."""
    recons = decode(indices, values, w_decs, pre_biases)
    S = len(xs)
    return torch.stack([torch.stack([nmse(recons[t, s], xs[t]) for s in range(S)]) for t in range(S)])


def update_counters(counters: Tensor, indices: Tensor, values: Tensor, threshold: float) -> Tensor:
    """Steps since a latent last fired: 1 where a value exceeds `threshold` in the batch, else one more: int64 [N]."""
    fired = (codes(indices, values, counters.shape[0]) > threshold).any(0)
    return torch.where(fired, torch.ones_like(counters), counters + 1)


def auxk(h: Tensor, dead: Tensor, auxk: int) -> tuple[Tensor, Tensor]:
    """Top-auxk of h [B, N] with live latents set to 0, dead bool [N]: -> indices, values [B, auxk]."""
    masked = h * dead
    indices = topk_indices(masked, auxk)
    return indices, torch.relu(masked.gather(1, indices))


def auxk_nmse(x: Tensor, recon: Tensor, indices: Tensor, values: Tensor, w_dec: Tensor, pre_bias: Tensor) -> Tensor:
    """NMSE of the dead latents' reconstruction of the residual; gradients reach codes, w_dec and pre_bias."""
    target = x - recon.detach() + pre_bias.detach()
    return nmse(decode_one(indices, values, w_dec, pre_bias), target)


def total_loss(nmse_matrix: Tensor, aux: Tensor | None, auxk_coef: float = 1 / 32, cross_coef: float = 1.0) -> Tensor:
    """mean of the diagonal + auxk_coef * mean(aux) + cross_coef * mean off the diagonal.

    `aux` [S] or None. The aux term is left out when its sum is not > 0 (NaN included), the cross term when its
    coefficient is not > 0 or there is one stream only.
    """
    S = nmse_matrix.shape[0]
    total = nmse_matrix.diagonal().mean()
    if aux is not None and aux.sum() > 0:
        total = total + auxk_coef * aux.mean()
    if cross_coef > 0 and S > 1:
        off = ~torch.eye(S, dtype=torch.bool, device=nmse_matrix.device)
        total = total + cross_coef * nmse_matrix[off].mean()
    return total


def training_loss(
    xs: list[Tensor], w_encs: list[Tensor], w_decs: list[Tensor], pre_biases: list[Tensor], latent_biases: list[Tensor],
    k: int, *, topk_type: str = "global", auxk_k: int | None = None, dead: list[Tensor] | None = None,
    auxk_coef: float = 1 / 32, cross_coef: float = 1.0, indices: Tensor | None = None,
    auxk_indices: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The whole loss of one step; differentiate it for every gradient. The baseline of the benchmarks.

    `dead` are the masks that AuxK reads. `indices` and `auxk_indices` hold the selections fixed where near ties would
    make two correct selections differ.
    """
    hs = [preactivations(*args) for args in zip(xs, w_encs, pre_biases, latent_biases, strict=True)]
    if indices is None:
        indices = select(hs, k, topk_type)
    values = [torch.relu(h.gather(1, of_stream(indices, s))) for s, h in enumerate(hs)]
    recons = decode(indices, values, w_decs, pre_biases)
    S = len(xs)
    matrix = torch.stack([torch.stack([nmse(recons[t, s], xs[t]) for s in range(S)]) for t in range(S)])
    aux = None
    if auxk_k is not None:
        if dead is None:
            raise ValueError("dead: expected a mask for each stream with auxk_k, got None")
        terms = []
        for s, h in enumerate(hs):
            if auxk_indices is None:
                idx, val = auxk(h, dead[s], auxk_k)
            else:
                idx = auxk_indices[s]
                val = torch.relu((h * dead[s]).gather(1, idx))
            terms.append(auxk_nmse(xs[s], recons[s, s], idx, val, w_decs[s], pre_biases[s]))
        aux = torch.stack(terms)
    return total_loss(matrix, aux, auxk_coef, cross_coef)


def unit_norm_decoder(w_dec: Tensor) -> Tensor:
    """Each column divided by (its norm + 1e-8): [d, N] -> [d, N]."""
    return w_dec / (w_dec.norm(dim=0, keepdim=True) + 1e-8)


def project_decoder_grad(w_dec: Tensor, grad: Tensor) -> Tensor:
    """The gradient without its component along each column: [d, N], [d, N] -> [d, N]."""
    return grad - (w_dec * grad).sum(0, keepdim=True) * w_dec
