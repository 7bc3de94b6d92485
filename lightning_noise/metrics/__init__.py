"""Metrics of accuracy, calibration, confidence and robustness, with their standard errors.

What the metrics share is in :class:`~lightning_noise.metrics.base.Sums`: the arguments of ``update``, ``n_groups``, and errors.
"""

from lightning_noise.metrics.calibration import CalibrationBins, ExpectedCalibrationError, TemperatureScaling
from lightning_noise.metrics.confidence import FlipRate, NoiseDetection, PredictiveEntropy, SelectiveClassification
from lightning_noise.metrics.robustness import area_under_curve, corruption_error, mean_corruption_error, retention
from lightning_noise.metrics.scores import (
    BrierDecomposition,
    BrierScore,
    CrossEntropy,
    MeanAbsoluteError,
    MeanSquaredError,
    Perplexity,
    R2Score,
)
from lightning_noise.metrics.statistics import Interval, jackknife_error, t_interval, training_error, wilson_interval

__all__ = [
    "BrierDecomposition",
    "BrierScore",
    "CalibrationBins",
    "CrossEntropy",
    "ExpectedCalibrationError",
    "FlipRate",
    "Interval",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "NoiseDetection",
    "Perplexity",
    "PredictiveEntropy",
    "R2Score",
    "SelectiveClassification",
    "TemperatureScaling",
    "area_under_curve",
    "corruption_error",
    "jackknife_error",
    "mean_corruption_error",
    "retention",
    "t_interval",
    "training_error",
    "wilson_interval",
]
