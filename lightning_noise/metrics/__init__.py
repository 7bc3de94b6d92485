"""Metrics of robustness and calibration."""

from lightning_noise.metrics.classification import CalibrationBins, CrossEntropy, ExpectedCalibrationError, TemperatureScaling
from lightning_noise.metrics.functional import (
    bin_indices,
    calibration_floor,
    calibration_z,
    debiased_calibration_error,
    expected_calibration_error,
    retention,
    robustness_summary,
    signed_gap,
)

__all__ = [
    "CalibrationBins",
    "CrossEntropy",
    "ExpectedCalibrationError",
    "TemperatureScaling",
    "bin_indices",
    "calibration_floor",
    "calibration_z",
    "debiased_calibration_error",
    "expected_calibration_error",
    "retention",
    "robustness_summary",
    "signed_gap",
]
