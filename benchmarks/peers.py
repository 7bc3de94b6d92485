"""Packages that have the same noise."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Bench

LEVEL = 0.3
PACKAGES = {
    "kornia": "kornia.augmentation",
    "torchvision": "torchvision.transforms.v2",
    "torch-audiomentations": "torch_audiomentations",
    "audiomentations": "audiomentations",
    "imagecorruptions": "imagecorruptions",
    "noise-injection": "noise_injection",
}
_missing: dict[str, str] = {}
_used: set[str] = set()


def described() -> str:
    """Returns the versions of the peers that took part, and why others did not."""
    found = [f"{package} {version(package)}" for package in PACKAGES if package in _used]
    missing = [f"without {package} ({why})" for package, why in _missing.items() if package not in _used]
    return "; ".join([", ".join(found) or "none", *missing])


def of(package: str, make: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Returns a side of a package, made from its module; nothing if the package cannot be used here."""
    try:
        side = make(import_module(PACKAGES[package]))
        side()
    except Exception as error:  # a build for another torch raises an OSError or a RuntimeError
        _missing.setdefault(package, str(error).strip().splitlines()[0])
        return {}
    _used.add(package)
    return {package: side}


def of_noise(name: str, x: Tensor, bench: Bench) -> dict[str, Callable[[], object]]:
    """Returns the peers of a noise, for images in [0, 1] of shape (B, C, H, W).

    audiomentations and imagecorruptions take one sample of NumPy at a time, on the CPU. Audio has the pixels as its time.
    """
    p, audio = {"p": 1.0}, x.flatten(2)
    on_tensors: dict[str, dict[str, Callable[[Any], Callable[[], object]]]] = {
        "Gaussian()": {
            "kornia": lambda kornia: _call(kornia.RandomGaussianNoise(std=LEVEL, **p), x),
            "torchvision": lambda vision: _call(vision.GaussianNoise(sigma=LEVEL, clip=False), x),
        },
        "Impulse(low=0.0, high=1.0)": {
            "kornia": lambda kornia: _call(kornia.RandomSaltAndPepperNoise(amount=LEVEL, salt_vs_pepper=0.5, **p), x)
        },
        "Masking(dim=(-2, -1), value=0.0)": {
            "kornia": lambda kornia: _call(kornia.RandomErasing(scale=(LEVEL, LEVEL), ratio=(1.0, 1.0), **p), x)
        },
        "ColoredNoise(exponent=1.0, dim=-1)": {
            "torch-audiomentations": lambda audiomentations: _call(
                audiomentations.AddColoredNoise(10.0, 10.0, 1.0, 1.0, **p, sample_rate=16_000, output_type="tensor"), audio
            )
        },
    }
    samples, images = audio.float().cpu().numpy(), (255 * x.float()).byte().movedim(1, -1).cpu().numpy()

    def each(call: Callable[..., Any], rows: Any, **kwargs: Any) -> Callable[[], object]:
        return lambda: [call(row, **kwargs) for row in rows]

    def corrupt(corruption: str) -> dict[str, Callable[[Any], Callable[[], object]]]:
        return {"imagecorruptions": lambda module: each(module.corrupt, images, corruption_name=corruption, severity=3)}

    on_arrays: dict[str, dict[str, Callable[[Any], Callable[[], object]]]] = {
        "Gaussian()": corrupt("gaussian_noise")
        | {"audiomentations": lambda audio: each(audio.AddGaussianNoise(LEVEL, LEVEL, **p), samples, sample_rate=16_000)},
        "Speckle()": corrupt("speckle_noise"),
        "Impulse(low=0.0, high=1.0)": corrupt("impulse_noise"),
        "Shot(scale=1.0)": corrupt("shot_noise"),
        "SNR(center=False)": {
            "audiomentations": lambda audio: each(audio.AddGaussianSNR(10.0, 10.0, **p), samples, sample_rate=16_000)
        },
        "ColoredNoise(exponent=1.0, dim=-1)": {
            "audiomentations": lambda audio: each(
                audio.AddColorNoise(10.0, 10.0, -3.01, -3.01, **p), samples, sample_rate=16_000
            )
        },
    }
    makers = on_tensors.get(name, {}) | (on_arrays.get(name, {}) if bench.on_cpu and x.dtype == torch.float32 else {})
    return {key: side for package, make in makers.items() for key, side in of(package, make).items()}


def of_mixing(x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    return of("kornia", lambda kornia: _call(kornia.RandomMixUpV2(data_keys=["input", "class"]), x, y)) | of(
        "torchvision", lambda vision: _call(vision.MixUp(alpha=1.0, num_classes=10), x, y)
    )


def _call(function: Callable[..., Any], *args: Any) -> Callable[[], object]:
    return lambda: function(*args)
