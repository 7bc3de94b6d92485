"""Predictions for tests of metrics."""

from __future__ import annotations

import torch

from lightning_noise.metrics.base import Predictions


def predictions(n: int, n_classes: int = 5, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(n)
    logits = sharpness * torch.randn(n, n_classes, generator=generator)
    return logits, torch.randint(0, n_classes, (n,), generator=generator)


def plain_ece(logits: torch.Tensor, target: torch.Tensor, n_bins: int) -> float:
    """The definition, in a loop over bins."""
    probabilities = logits.double().softmax(1).cpu().numpy()
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == target.cpu().numpy()
    error = 0.0
    for b in range(n_bins):
        inside = (confidence >= b / n_bins) & ((confidence < (b + 1) / n_bins) | (b == n_bins - 1))
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def middles_of_odds_bins(n: int) -> torch.Tensor:
    """Returns log-odds from 0 on, each in the middle of another bin, so that a tie is a tie in any precision."""
    x = torch.linspace(0, 200, 1_000_000, dtype=torch.float64)
    _, inverse, count = Predictions(torch.stack([x, torch.zeros_like(x)], 1)).odds_bins.unique(
        return_inverse=True, return_counts=True
    )
    return torch.zeros(len(count), dtype=x.dtype).index_add_(0, inverse, x)[1 : n + 1] / count[1 : n + 1]


def assert_same_values(metric, reference, atol: float = 0) -> None:
    torch.testing.assert_close(metric.compute(), reference.compute(), rtol=0, atol=atol, equal_nan=True)
