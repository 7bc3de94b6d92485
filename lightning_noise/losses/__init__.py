"""Losses of smoothed, noisy and mixed labels."""

from lightning_noise.losses.functional import (
    smoothed_binary_cross_entropy,
    smoothed_binary_cross_entropy_with_logits,
    smoothed_cross_entropy,
    smoothed_nll_loss,
)
from lightning_noise.losses.modes import CheckedLabelLoss, LabelLoss, MixedLabelLoss, NoisyLabelLoss, SmoothedLabelLoss

__all__ = [
    "CheckedLabelLoss",
    "LabelLoss",
    "MixedLabelLoss",
    "NoisyLabelLoss",
    "SmoothedLabelLoss",
    "smoothed_binary_cross_entropy",
    "smoothed_binary_cross_entropy_with_logits",
    "smoothed_cross_entropy",
    "smoothed_nll_loss",
]
