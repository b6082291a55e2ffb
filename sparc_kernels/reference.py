"""The executable specification: every operator in plain PyTorch.

Dense, unoptimised, any floating dtype, CPU or GPU. Tests, `verify` and the benchmarks judge against this file alone.
Equations: docs/math.md. Streams are lists in one fixed order; S streams, B rows, N latents, k active, d_s the width of
stream s. `indices` is [B, k] if the streams share their latents (global) and [S, B, k] if each has its own (local).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def preactivations(x: Tensor, w_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor) -> Tensor:
    """Compute h = (x - b) W_enc^T + c.

    Args:
        x: [B, d].
        w_enc: [N, d].
        pre_bias: b, [d].
        latent_bias: c, [N].

    Returns:
        [B, N].
    """
    return F.linear(x - pre_bias, w_enc, latent_bias)


def topk_indices(h: Tensor, k: int) -> Tensor:
    """Find the columns of the k largest values in each row, descending; ties to the lowest column, NaN above +inf.

    Args:
        h: [B, N].
        k: 1..N.

    Returns:
        int64 [B, k].
    """
    return torch.sort(h, dim=-1, descending=True, stable=True).indices[..., :k]


def select(hs: list[Tensor], k: int, topk_type: str = "global") -> Tensor:
    """Select the latents of each row.

    Args:
        hs: S pre-activations [B, N].
        k: latents per row.
        topk_type: "global" (the top k of the sum over streams) or "local" (of each stream alone).

    Returns:
        int64 [B, k] ("global") or [S, B, k] ("local").
    """
    if topk_type == "local":
        return torch.stack([topk_indices(h, k) for h in hs])
    total = hs[0]
    for h in hs[1:]:
        total = total + h
    return topk_indices(total, k)


def of_stream(indices: Tensor, s: int) -> Tensor:
    """Return the indices of one stream.

    Args:
        indices: int64 [B, k] or [S, B, k].
        s: number of the stream.

    Returns:
        int64 [B, k].
    """
    return indices if indices.dim() == 2 else indices[s]


def encode_topk(
    xs: list[Tensor], w_encs: list[Tensor], pre_biases: list[Tensor], latent_biases: list[Tensor], k: int,
    topk_type: str = "global",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Select latents and compute their values v = relu(h at I).

    Args:
        xs: S inputs [B, d_s].
        w_encs: S encoder weights [N, d_s].
        pre_biases: S biases [d_s].
        latent_biases: S biases [N].
        k: latents per row.
        topk_type: "global" or "local", see `select`.

    Returns:
        indices [B, k] or [S, B, k], and values [S, B, k].
    """
    hs = [preactivations(*args) for args in zip(xs, w_encs, pre_biases, latent_biases, strict=True)]
    indices = select(hs, k, topk_type)
    values = torch.stack([torch.relu(h.gather(1, of_stream(indices, s))) for s, h in enumerate(hs)])
    return indices, values


def codes(indices: Tensor, values: Tensor, n_latents: int) -> Tensor:
    """Scatter sparse codes of one stream to dense ones; repeated indices in a row add up.

    Args:
        indices: int64 [B, k].
        values: [B, k].
        n_latents: N.

    Returns:
        [B, N].
    """
    return values.new_zeros(values.shape[0], n_latents).scatter_add(1, indices, values)


def decode_one(indices: Tensor, values: Tensor, w_dec: Tensor, pre_bias: Tensor) -> Tensor:
    """Reconstruct one stream from one stream's codes.

    Args:
        indices: int64 [B, k].
        values: [B, k].
        w_dec: [d, N].
        pre_bias: [d].

    Returns:
        [B, d].
    """
    return F.linear(codes(indices, values, w_dec.shape[1]), w_dec) + pre_bias


def decode(
    indices: Tensor, values: Tensor | list[Tensor], w_decs: list[Tensor], pre_biases: list[Tensor]
) -> dict[tuple[int, int], Tensor]:
    """Compute every reconstruction R[t<-s] of target t from source s.

    Args:
        indices: int64 [B, k] or [S, B, k].
        values: [S, B, k].
        w_decs: decoder weights [d_t, N] of each target.
        pre_biases: [d_t] of each target.

    Returns:
        {(t, s): [B, d_t]}.
    """
    return {
        (t, s): decode_one(of_stream(indices, s), values[s], w_decs[t], pre_biases[t])
        for t in range(len(w_decs))
        for s in range(len(values))
    }


def nmse(recon: Tensor, x: Tensor) -> Tensor:
    """Normalised mean squared error, uncentred, without epsilon: mean over rows of mean (recon - x)^2 / mean x^2.

    Args:
        recon: [B, d].
        x: [B, d].

    Returns:
        A scalar.
    """
    return ((recon - x).square().mean(1) / x.square().mean(1)).mean()


def decode_nmse(
    indices: Tensor, values: Tensor, w_decs: list[Tensor], pre_biases: list[Tensor], xs: list[Tensor]
) -> Tensor:
    """Compute the NMSE of every reconstruction.

    Args:
        indices: int64 [B, k] or [S, B, k].
        values: [S, B, k].
        w_decs: S decoder weights [d_t, N].
        pre_biases: S biases [d_t].
        xs: S targets [B, d_t].

    Returns:
        [S, S], entry [t, s] for target t from source s.
    """
    recons = decode(indices, values, w_decs, pre_biases)
    S = len(xs)
    return torch.stack([torch.stack([nmse(recons[t, s], xs[t]) for s in range(S)]) for t in range(S)])


def update_counters(counters: Tensor, indices: Tensor, values: Tensor, threshold: float) -> Tensor:
    """Update the steps since each latent last fired: 1 where a value in the batch exceeds `threshold`, else + 1.

    Args:
        counters: int64 [N].
        indices: int64 [B, k].
        values: [B, k].
        threshold: a latent fires where its value is greater.

    Returns:
        int64 [N].
    """
    fired = (codes(indices, values, counters.shape[0]) > threshold).any(0)
    return torch.where(fired, torch.ones_like(counters), counters + 1)


def auxk(h: Tensor, dead: Tensor, auxk: int) -> tuple[Tensor, Tensor]:
    """Select the top auxk latents with live ones set to 0.

    Args:
        h: pre-activations [B, N].
        dead: bool [N].
        auxk: latents per row.

    Returns:
        indices, int64 [B, auxk], and values [B, auxk].
    """
    masked = h * dead
    indices = topk_indices(masked, auxk)
    return indices, torch.relu(masked.gather(1, indices))


def auxk_nmse(x: Tensor, recon: Tensor, indices: Tensor, values: Tensor, w_dec: Tensor, pre_bias: Tensor) -> Tensor:
    """NMSE of the dead latents' reconstruction of the residual; gradients reach codes, w_dec and pre_bias.

    Args:
        x: [B, d].
        recon: its reconstruction [B, d], treated as a constant.
        indices: of dead latents, int64 [B, auxk].
        values: [B, auxk].
        w_dec: [d, N].
        pre_bias: [d].

    Returns:
        A scalar.
    """
    target = x - recon.detach() + pre_bias.detach()
    return nmse(decode_one(indices, values, w_dec, pre_bias), target)


def total_loss(nmse_matrix: Tensor, aux: Tensor | None, auxk_coef: float = 1 / 32, cross_coef: float = 1.0) -> Tensor:
    """Compute mean of the diagonal + auxk_coef * mean(aux) + cross_coef * mean off the diagonal.

    Args:
        nmse_matrix: [S, S], see `decode_nmse`.
        aux: [S] or None; left out if its sum is not > 0 (NaN included).
        auxk_coef: weight of the auxiliary loss.
        cross_coef: weight of the cross-reconstruction loss; left out if not > 0 or S is 1.

    Returns:
        A scalar.
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
    """Compute the whole loss of one step, differentiable in every tensor; the baseline of the benchmarks.

    Args:
        xs: S inputs [B, d_s].
        w_encs: S encoder weights [N, d_s].
        w_decs: S decoder weights [d_s, N].
        pre_biases: S biases [d_s].
        latent_biases: S biases [N].
        k: latents per row.
        topk_type: "global" or "local", see `select`.
        auxk_k: dead latents per row in the auxiliary loss; None disables it.
        dead: S masks bool [N] of the latents that the auxiliary loss may select.
        auxk_coef: weight of the auxiliary loss.
        cross_coef: weight of the cross-reconstruction loss.
        indices: fixed selection, for comparisons in which near ties would make two correct selections differ.
        auxk_indices: S fixed selections [B, auxk_k] of the auxiliary loss.

    Returns:
        A scalar.

    Raises:
        ValueError: auxk_k without `dead`.
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
    """Divide each column by (its norm + 1e-8).

    Args:
        w_dec: [d, N].

    Returns:
        [d, N].
    """
    return w_dec / (w_dec.norm(dim=0, keepdim=True) + 1e-8)


def project_decoder_grad(w_dec: Tensor, grad: Tensor) -> Tensor:
    """Remove from a gradient its component along each column.

    Args:
        w_dec: [d, N], columns of unit norm.
        grad: [d, N].

    Returns:
        [d, N].
    """
    return grad - (w_dec * grad).sum(0, keepdim=True) * w_dec
