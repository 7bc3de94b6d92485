"""Predictions for tests of metrics."""

from __future__ import annotations

import torch


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


def assert_same_values(metric, reference, atol: float = 0) -> None:
    torch.testing.assert_close(metric.compute(), reference.compute(), rtol=0, atol=atol, equal_nan=True)
