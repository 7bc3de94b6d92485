"""The formulas of the metrics, on sums and counts."""

from lightning_noise.metrics.functional.calibration import (
    bin_indices,
    calibration_floor,
    calibration_z,
    debiased_calibration_error,
    expected_calibration_error,
    signed_gap,
)
from lightning_noise.metrics.functional.confidence import aurc, failure_auroc, flip_rate, noise_detected
from lightning_noise.metrics.functional.robustness import (
    area_under_curve,
    corruption_error,
    mean_corruption_error,
    retention,
)
from lightning_noise.metrics.functional.scores import murphy_decomposition

__all__ = [
    "area_under_curve",
    "aurc",
    "bin_indices",
    "calibration_floor",
    "calibration_z",
    "corruption_error",
    "debiased_calibration_error",
    "expected_calibration_error",
    "failure_auroc",
    "flip_rate",
    "mean_corruption_error",
    "murphy_decomposition",
    "noise_detected",
    "retention",
    "signed_gap",
]
