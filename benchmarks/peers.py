"""Packages that have the same noise, each of which may be missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lightning_noise import noise

LEVEL, RATE = 0.3, 16_000
MODULES = {
    "kornia": "kornia.augmentation",
    "torchvision": "torchvision.transforms.v2",
    "torch-audiomentations": "torch_audiomentations",
    "audiomentations": "audiomentations",
    "imagecorruptions": "imagecorruptions",
    "noise-injection": "noise_injection",
}
SALT = noise.Impulse(low=0.0, high=1.0)
SAME: list[tuple[noise.Noise, str, Callable[[Any], Any]]] = [
    (noise.Gaussian(), "kornia", lambda m: m.RandomGaussianNoise(std=LEVEL, p=1.0)),
    (noise.Gaussian(), "torchvision", lambda m: m.GaussianNoise(sigma=LEVEL, clip=False)),
    (noise.Gaussian(), "audiomentations", lambda m: m.AddGaussianNoise(LEVEL, LEVEL, p=1.0)),
    (noise.Gaussian(), "imagecorruptions", lambda m: partial(m.corrupt, corruption_name="gaussian_noise")),
    (noise.Speckle(), "imagecorruptions", lambda m: partial(m.corrupt, corruption_name="speckle_noise")),
    (noise.Shot(), "imagecorruptions", lambda m: partial(m.corrupt, corruption_name="shot_noise")),
    (SALT, "imagecorruptions", lambda m: partial(m.corrupt, corruption_name="impulse_noise")),
    (SALT, "kornia", lambda m: m.RandomSaltAndPepperNoise(amount=LEVEL, salt_vs_pepper=0.5, p=1.0)),
    (noise.Masking(), "kornia", lambda m: m.RandomErasing(scale=(LEVEL, LEVEL), ratio=(1.0, 1.0), p=1.0)),
    (noise.SNR(), "audiomentations", lambda m: m.AddGaussianSNR(10.0, 10.0, p=1.0)),
    (noise.ColoredNoise(), "audiomentations", lambda m: m.AddColorNoise(10.0, 10.0, -3.01, -3.01, p=1.0)),
    (
        noise.ColoredNoise(),
        "torch-audiomentations",
        lambda m: m.AddColoredNoise(10.0, 10.0, 1.0, 1.0, p=1.0, sample_rate=RATE, output_type="tensor"),
    ),
]
_missing: dict[str, str] = {}
_used: set[str] = set()


def describe() -> str:
    """Returns the versions of the peers that took part, and why others did not."""
    found = [f"{package} {version(package)}" for package in MODULES if package in _used]
    missing = [f"without {package} ({why})" for package, why in _missing.items() if package not in _used]
    return "; ".join([", ".join(found) or "none", *missing])


def find(package: str, make: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Returns what is made from the module of a package, by its name; nothing if that does not work here."""
    try:
        side = make(import_module(MODULES[package]))
        side()
    except Exception as error:  # a build for another torch raises an OSError or a RuntimeError
        _missing.setdefault(package, str(error).strip().splitlines()[0])
        return {}
    _used.add(package)
    return {package: side}


def of_noise(member: noise.Noise, x: Tensor) -> dict[str, Callable[[], object]]:
    """Returns the same noise of other packages, for images in [0, 1]; the pixels of a channel are the time of audio."""
    audio = x.flatten(2)
    feeds: dict[str, Callable[[Any], object]] = {"torch-audiomentations": lambda function: function(audio)}
    arrays: dict[str, Callable[[Any], object]] = {}
    if x.device.type == "cpu" and x.dtype == torch.float32:  # these take one sample of NumPy at a time
        samples, images = audio.numpy(), (255 * x).byte().movedim(1, -1).numpy()
        arrays["audiomentations"] = lambda function: [function(row, sample_rate=RATE) for row in samples]
        arrays["imagecorruptions"] = lambda function: [function(image, severity=3) for image in images]
    found = {}
    for same, package, make in SAME:
        if same == member and (arrays or package not in ("audiomentations", "imagecorruptions")):
            feed = (feeds | arrays).get(package, lambda function: function(x))
            found |= find(package, lambda module, make=make, feed=feed: partial(feed, make(module)))
    return found


def of_mixing(x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    return find("kornia", lambda m: partial(m.RandomMixUpV2(data_keys=["input", "class"]), x, y)) | find(
        "torchvision", lambda m: partial(m.MixUp(alpha=1.0, num_classes=10), x, y)
    )


def of_weights(module: torch.nn.Module) -> dict[str, Callable[[], object]]:
    def make(package: Any) -> Callable[[], object]:
        draw, chosen = package.generators.gaussian(0.01), package.selectors.by_name("weight")
        inject = partial(package.inject_noise, module, draw, chosen, seed=0, store_tensors=True)
        return lambda: package.remove_noise(module, inject())

    return find("noise-injection", make)
