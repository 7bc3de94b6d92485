"""Metrics of robustness and calibration."""

from lightning_noise.metrics.classification import (
    BrierScore,
    CalibrationBins,
    CrossEntropy,
    ExpectedCalibrationError,
    FlipRate,
    PredictiveEntropy,
    SelectiveClassification,
    TemperatureScaling,
)
from lightning_noise.metrics.functional import (
    aurc,
    bin_indices,
    calibration_floor,
    calibration_z,
    debiased_calibration_error,
    error_auroc,
    expected_calibration_error,
    flip_rate,
    murphy_decomposition,
    retention,
    robustness_summary,
    signed_gap,
)

__all__ = [
    "BrierScore",
    "CalibrationBins",
    "CrossEntropy",
    "ExpectedCalibrationError",
    "FlipRate",
    "PredictiveEntropy",
    "SelectiveClassification",
    "TemperatureScaling",
    "aurc",
    "bin_indices",
    "calibration_floor",
    "calibration_z",
    "debiased_calibration_error",
    "error_auroc",
    "expected_calibration_error",
    "flip_rate",
    "murphy_decomposition",
    "retention",
    "robustness_summary",
    "signed_gap",
]
