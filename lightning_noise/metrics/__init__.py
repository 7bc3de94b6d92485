"""Metrics of robustness and calibration."""

from lightning_noise.metrics.classification import CrossEntropy, ExpectedCalibrationError
from lightning_noise.metrics.functional import bin_indices, expected_calibration_error, retention, robustness_summary

__all__ = [
    "CrossEntropy",
    "ExpectedCalibrationError",
    "bin_indices",
    "expected_calibration_error",
    "retention",
    "robustness_summary",
]
