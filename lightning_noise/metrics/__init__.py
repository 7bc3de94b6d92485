"""Metrics of robustness and calibration."""

from lightning_noise.metrics.calibration import CalibrationBins, ExpectedCalibrationError, TemperatureScaling
from lightning_noise.metrics.confidence import FlipRate, NoiseDetection, PredictiveEntropy, SelectiveClassification
from lightning_noise.metrics.functional import (
    area_under_curve,
    aurc,
    bin_indices,
    calibration_floor,
    calibration_z,
    corruption_error,
    debiased_calibration_error,
    expected_calibration_error,
    failure_auroc,
    flip_rate,
    mean_corruption_error,
    murphy_decomposition,
    noise_detected,
    retention,
    robustness_summary,
    signed_gap,
)
from lightning_noise.metrics.scores import BrierDecomposition, BrierScore, CrossEntropy, MeanSquaredError
from lightning_noise.metrics.statistics import Interval, jackknife_error, t_interval, wilson_interval

__all__ = [
    "BrierDecomposition",
    "BrierScore",
    "CalibrationBins",
    "CrossEntropy",
    "ExpectedCalibrationError",
    "FlipRate",
    "Interval",
    "MeanSquaredError",
    "NoiseDetection",
    "PredictiveEntropy",
    "SelectiveClassification",
    "TemperatureScaling",
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
    "jackknife_error",
    "mean_corruption_error",
    "murphy_decomposition",
    "noise_detected",
    "retention",
    "robustness_summary",
    "signed_gap",
    "t_interval",
    "wilson_interval",
]
