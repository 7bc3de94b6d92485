"""Metrics of accuracy, calibration, confidence and robustness, with their standard errors.

What the metrics share is in :class:`~lightning_noise.metrics.base.Sums`: the arguments of ``update``, ``n_groups``, and errors.
"""

from lightning_noise.metrics.calibration import (
    AdaptiveCalibrationError,
    CalibrationBins,
    ExpectedCalibrationError,
    TemperatureScaling,
)
from lightning_noise.metrics.classes import BalancedAccuracy, ClasswiseCalibrationError, TopKAccuracy
from lightning_noise.metrics.confidence import FlipRate, NoiseDetection, PredictiveEntropy, SelectiveClassification
from lightning_noise.metrics.robustness import area_under_curve, corruption_error, mean_corruption_error, retention
from lightning_noise.metrics.scores import (
    BrierDecomposition,
    BrierScore,
    CrossEntropy,
    MeanAbsoluteError,
    MeanSquaredError,
    Perplexity,
    PinballLoss,
    R2Score,
)
from lightning_noise.metrics.statistics import Interval, jackknife_error, t_interval, training_error, wilson_interval

__all__ = [
    "AdaptiveCalibrationError",
    "BalancedAccuracy",
    "BrierDecomposition",
    "BrierScore",
    "CalibrationBins",
    "ClasswiseCalibrationError",
    "CrossEntropy",
    "ExpectedCalibrationError",
    "FlipRate",
    "Interval",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "NoiseDetection",
    "Perplexity",
    "PinballLoss",
    "PredictiveEntropy",
    "R2Score",
    "SelectiveClassification",
    "TemperatureScaling",
    "TopKAccuracy",
    "area_under_curve",
    "corruption_error",
    "jackknife_error",
    "mean_corruption_error",
    "retention",
    "t_interval",
    "training_error",
    "wilson_interval",
]
