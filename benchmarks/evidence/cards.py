"""What each noise does to a model, and what it does to a model that was trained with it; for the cards of docs/noises.md.

``python -m benchmarks.evidence.cards`` writes ``benchmarks/results/noises.json``, in about twenty minutes. With names such as
``Rician Jitter``, only these noises are measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback
from torch import Tensor

from benchmarks.evidence.claims import difference
from benchmarks.evidence.networks import Module
from benchmarks.evidence.runs import fit, quiet, score, score_with_weights
from benchmarks.evidence.tasks import split
from benchmarks.tables import RESULTS
from lightning_noise import InputNoise, WeightNoise, noise

SEEDS = 5


class Subject(NamedTuple):
    """The data of some noises, and the words for them."""

    task: str
    words: str
    noises: list[noise.Noise]


WALKS = torch.randn(20, 100, generator=torch.Generator().manual_seed(0)).cumsum(-1)
SUBJECTS = [
    Subject(
        "digits",
        "8 x 8 pixels of handwritten digits",
        [
            *(noise.Gaussian(), noise.Uniform(), noise.Speckle(), noise.Impulse(low=0.0, high=1.0), noise.Shot()),
            *(noise.PatchGaussian(size=4), noise.Masking(), noise.DropConnect(), noise.Rician(), noise.Quantization()),
            *(noise.AnalogWeights(time=86_400.0), noise.Compose([noise.Shot(), noise.Gaussian()])),
            *(noise.OneOf([noise.Gaussian(), noise.Masking()]), noise.Scaled(noise.Masking(), 0.5)),
        ],
    ),
    Subject(
        "power",
        "days of power demand",
        [noise.ColoredNoise(), noise.Drift(), noise.Scaling(), noise.SNR(), noise.Jitter()],
    ),
    Subject("power", "days of power demand, with 20 random walks as recordings", [noise.Recorded(WALKS)]),
    Subject("cancer", "30 measurements of tumors", [noise.SwapNoise(), noise.FeatureDropout()]),
]


IN_WEIGHTS = noise.DropConnect | noise.AnalogWeights


def trained_with(value: noise.Noise) -> Callback:
    """The callback: a level up to the highest usual one for each sample, and the middle one for weights."""
    if isinstance(value, IN_WEIGHTS):
        return WeightNoise(value, value.severities[2])
    return InputNoise(value, value.severities[-1], per_sample=True)


@torch.no_grad()
def under(module: Module, value: noise.Noise, x: Tensor, y: Tensor) -> float:
    """The mean accuracy at the usual levels of a noise."""
    generator = torch.Generator().manual_seed(0)
    changes = [partial(value, level=level, generator=generator) for level in value.severities]
    if isinstance(value, IN_WEIGHTS):
        return fmean(score_with_weights(change, module, x, y) for change in changes)
    return fmean(score(module(change(x)), y) for change in changes)


def accuracies(task: str, seed: int, values: list[noise.Noise]) -> Iterator[dict[str, Any]]:
    """The accuracy of a model that was trained without noise, and of one that was trained with it, for each noise."""
    x, y = split(task, seed)["test"]
    plain = fit(task, "plain", seed, [])
    for value in values:
        trained = fit(task, "plain", seed, [trained_with(value)])
        with torch.no_grad():
            clean = [score(module(x), y) for module in (plain, trained)]
        noisy = [under(module, value, x, y) for module in (plain, trained)]
        yield {"noise": value.title, "seed": seed, "clean": clean, "noisy": noisy}


def summary(runs: list[dict[str, Any]]) -> dict[str, str]:
    """The means over the seeds in per cent, and the paired difference that the training with the noise makes."""
    found = {}
    for measure in ("clean", "noisy"):
        without, trained = ({run["seed"]: 100 * run[measure][side] for run in runs} for side in (0, 1))
        found[measure] = f"{fmean(without.values()):.1f} %"
        found[f"{measure} gain"] = str(difference(trained, without))
    return found


def main() -> None:
    quiet()
    names = sys.argv[1:]
    cards = json.loads((RESULTS / "noises.json").read_text()) if names else {}
    for task, words, values in SUBJECTS:
        values = [value for value in values if not names or value.title in names]
        runs = [run for seed in range(SEEDS) for run in accuracies(task, seed, values)]
        for value in values:
            found = summary([run for run in runs if run["noise"] == value.title])
            cards[value.title] = {"data": words, **found}
            print(value.title, cards[value.title], flush=True)
    (RESULTS / "noises.json").write_text(json.dumps(cards, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
