r"""Noise as a value: a distribution around a tensor, whose amount is scheduled.

A noise maps a tensor :math:`x` and a level to a perturbed copy of :math:`x`. The level is always an amplitude: 0 is no noise,
and a higher level is more noise. The caller provides the randomness. So a noise has no state, compares by its fields, and can
be used in any place and in any order.
"""

from __future__ import annotations

from lightning_noise.noise.analog import AnalogWeights
from lightning_noise.noise.base import Noise, as_noise
from lightning_noise.noise.base import NoiseFunction as NoiseFunction
from lightning_noise.noise.cells import DropConnect, FeatureDropout, SwapNoise
from lightning_noise.noise.composition import Compose, OneOf, Scaled
from lightning_noise.noise.elementwise import Gaussian, Impulse, Rician, Shot, Speckle, Uniform
from lightning_noise.noise.recordings import Recorded
from lightning_noise.noise.regions import Masking, PatchGaussian
from lightning_noise.noise.sensors import Jitter, Quantization
from lightning_noise.noise.series import SNR, ColoredNoise, Drift, Scaling
from lightning_noise.noise.transforms import Transform

__all__ = [
    "SNR",
    "AnalogWeights",
    "ColoredNoise",
    "Compose",
    "Drift",
    "DropConnect",
    "FeatureDropout",
    "Gaussian",
    "Impulse",
    "Jitter",
    "Masking",
    "Noise",
    "OneOf",
    "PatchGaussian",
    "Quantization",
    "Recorded",
    "Rician",
    "Scaled",
    "Scaling",
    "Shot",
    "Speckle",
    "SwapNoise",
    "Transform",
    "Uniform",
    "as_noise",
]
