"""The corruptions of public benchmarks, as noises for the monitors."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from lightning_noise.evaluation.conditions import Condition
from lightning_noise.metrics.robustness import mean_corruption_error
from lightning_noise.noise import Transform
from lightning_noise.report.model import Report

__all__ = ["ALEXNET_ERRORS", "imagenet_c", "imagenet_c_mce"]

_SEVERITIES = (1, 2, 3, 4, 5)

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""The published error rate of AlexNet for each family of ImageNet-C, as the mean over the five severities."""


def imagenet_c() -> dict[str, Transform]:
    """Returns the fifteen families of ImageNet-C as noises, whose levels are the severities 1 to 5.

    The images have the shape (B, C, H, W) with one or three channels, at least 32 pixels on each side, and values in [0, 1].
    For normalized images, pass ``mean`` and ``std`` to the monitor. The corruptions are those of the package imagecorruptions.
    The benchmark itself consists of stored images with other draws and its own compression.

    Raises:
        ImportError: If imagecorruptions cannot be imported.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261

        https://github.com/bethgelab/imagecorruptions (Michaelis et al., 2019), https://arxiv.org/abs/1907.07484

    Example:
        >>> from lightning_noise import RobustnessMonitor
        >>> monitor = RobustnessMonitor(imagenet_c(), mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # doctest: +SKIP
    """
    try:
        importlib.import_module("imagecorruptions")
    except ImportError as error:
        raise ImportError(
            f"the corruptions need imagecorruptions, which cannot be imported: {error}; type pip install imagecorruptions "
            '"setuptools<81"'
        ) from error
    return {family: Transform(_Corruption(family), levels=_SEVERITIES, pixels=True) for family in ALEXNET_ERRORS}


def imagenet_c_mce(report: Report, baseline: Mapping[str, float] = ALEXNET_ERRORS) -> float:
    """Returns the mean corruption error of a report on all families, as it is published; 1 is the baseline.

    To compare with a model of your own instead, give the monitor its report as ``baseline``. The monitor then logs ``mce``.

    Args:
        report: The ``report`` of a :class:`~lightning_noise.RobustnessMonitor`.
        baseline: The error rate of each family, as a mean over the severities. The default is that of AlexNet, which is
            meaningful only for models of ImageNet.

    Raises:
        ValueError: If the report lacks a family or a severity.

    Example:
        >>> from lightning_noise.evaluation.results import Estimate
        >>> places = [Condition(family, severity) for family in ALEXNET_ERRORS for severity in (1, 2, 3, 4, 5)]
        >>> rows = tuple(Estimate(place, "accuracy", 0.5) for place in places)
        >>> report = Report("multiclass", 4, 1, 0, noises={}, levels={}, shared=(), sizes=(), estimates=rows)
        >>> round(imagenet_c_mce(report), 3)  # the mean of 0.5 over each error of AlexNet
        0.647
    """
    cells = {family: [(Condition(family, float(level)), "accuracy") for level in _SEVERITIES] for family in baseline}
    missing = [family for family, own in cells.items() if not set(own) <= report.values.keys()]
    if missing:
        raise ValueError(
            f"the report has no accuracy at the severities 1 to 5 of {missing}; type "
            "RobustnessMonitor(corruptions.imagenet_c())"
        )
    errors = {family: [1 - report.values[cell] for cell in own] for family, own in cells.items()}
    return mean_corruption_error(errors, {family: [error] * len(_SEVERITIES) for family, error in baseline.items()})


@dataclass(frozen=True)
class _Corruption:
    """A family of corruptions, as a function of pixels and severity."""

    family: str

    @property
    def __name__(self) -> str:  # by which a noise is named
        return self.family

    def __call__(self, pixels: np.ndarray, level: float) -> np.ndarray:
        if level not in _SEVERITIES:
            raise ValueError(f"the severity of {self.family} must be 1, 2, 3, 4 or 5, got {level:g}")
        if self.family == "impulse_noise":
            return _salt_and_pepper(pixels, int(level))
        package: Any = importlib.import_module("imagecorruptions")
        functions: Any = importlib.import_module("imagecorruptions.corruptions")
        # version 1.1.2 uses what newer scikit-image and NumPy 2 no longer have
        with patch.multiple(functions, gaussian=partial(_gaussian, functions.gaussian), np=_NUMPY):
            found = package.corrupt(pixels, severity=int(level), corruption_name=self.family)
        return found[..., : pixels.shape[-1]]  # a gray image comes back as a color image


_NUMPY = SimpleNamespace(**{**vars(np), "float_": np.float64})


def _gaussian(blur: Any, image: np.ndarray, *args: Any, multichannel: bool = False, **kwargs: Any) -> np.ndarray:
    return blur(image, *args, channel_axis=-1 if multichannel else None, **kwargs)


def _salt_and_pepper(pixels: np.ndarray, severity: int) -> np.ndarray:
    """Sets a share of the values to 0 or 255, with the shares of the benchmark.

    The package draws from a generator of scikit-image, which no global stream seeds.
    """
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = np.random.uniform(size=pixels.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 255, pixels)).astype(np.uint8)
