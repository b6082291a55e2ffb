"""Find the rows that activate a latent most, in every stream."""

from __future__ import annotations

import torch

from ..core.progress import Watch
from ..io.features import Features
from ..metrics import top_rows
from ..nn.module import AlignedSAE
from .evaluate import codes_of


@torch.no_grad()
def top_activations(
    model: AlignedSAE, features: Features, latent: int, n: int, *, batch_size: int = 1024, watch: Watch = iter
) -> dict:
    """Find the rows with a latent's highest activations. Memory: one batch.

    Args:
        model: put in eval mode.
        features: of the model's streams.
        latent: its number.
        n: rows of each stream.
        batch_size: rows encoded at a time.
        watch: wraps the iterator of batches, for a progress bar.

    Returns:
        {s: (rows int64 [m], values [m], number of rows on which it fires)}, m <= n, values descending, ties to the
        earlier row.

    Raises:
        ValueError: a latent outside 0..N-1.
    """
    if not 0 <= latent < model.n_latents:
        raise ValueError(f"latent: expected one in 0..{model.n_latents - 1}, got {latent}")
    model.eval()
    device = next(model.parameters()).device
    best: dict[str, tuple] = {}
    for start, x in watch(features.batches(batch_size)):
        outputs = model({s: rows.to(device) for s, rows in x.items()})
        for s, codes in codes_of(outputs, model.n_latents).items():
            rows, values = top_rows(codes, latent, n)
            fired = int(((codes.indices == latent) & (codes.values > 0)).sum())
            if s in best:
                rows, values = torch.cat([best[s][0], rows + start]), torch.cat([best[s][1], values])
                order = values.sort(descending=True, stable=True).indices[:n]  # ties to earlier rows
                best[s] = rows[order], values[order], best[s][2] + fired
            else:
                best[s] = rows + start, values, fired
    return best
