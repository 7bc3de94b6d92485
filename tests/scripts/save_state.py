"""Saves a checkpoint of this version of the package to `states`: `cd tests && python -m scripts.save_state`.

Later versions load it, or refuse it in words. Run this once for each version whose states differ from those of the last.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from helpers import fit
from helpers_adaptive import governor
from pytorch_lightning import Callback

import lightning_noise
from lightning_noise import AdaptiveLevel, InputNoise, LabelSmoothing, WeightNoise, noise, schedules
from lightning_noise.rules import SignedGap

FOLDER = Path(__file__).parents[1] / "states"


def callbacks() -> list[Callback]:
    """The callbacks with a state; do not change them, because the saved states are theirs."""
    return [
        InputNoise(noise.Gaussian(), AdaptiveLevel(governor(step=2.0))),
        WeightNoise(noise.Gaussian(), AdaptiveLevel(governor(step=0.5)), relative="std"),
        LabelSmoothing(AdaptiveLevel(SignedGap())),
        InputNoise(noise.Speckle(), schedules.Linear(0.0, 0.5, until=20, unit="step"), name="scheduled"),
    ]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, trainer = fit(callbacks(), max_epochs=5)
    trainer.save_checkpoint(FOLDER / f"{lightning_noise.__version__}.ckpt")
