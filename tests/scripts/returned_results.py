"""Fits in processes that a strategy spawns or forks; rank 0 and then the main process write what they know to `<folder>`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Rows, loader, make_trainer

from lightning_noise import AdaptiveLevel, InputNoise, RobustnessMonitor, noise, schedules
from lightning_noise.rules import Governor


class Knows(pl.Callback):
    """Saves what the callbacks know at the end of a fit."""

    def __init__(self, path: str, callbacks: list[Any]):
        self.path, self.callbacks = path, callbacks

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(known(*self.callbacks), self.path)


def known(tuned: InputNoise, scheduled: InputNoise, monitor: RobustnessMonitor) -> dict[str, Any]:
    assert tuned.adaptive is not None
    assert monitor.report is not None
    return {
        "summary": tuned.adaptive.summary(),
        "state": tuned.adaptive.state_dict(),
        "levels": (tuned.current_level, scheduled.current_level),
        "report": repr(monitor.report),
    }


def make() -> list[Any]:
    governor = Governor(chance=1 / N_CLASSES, warmup=0, min_skill=0.01)
    return [
        InputNoise(noise.Gaussian(), AdaptiveLevel(governor)),
        InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.1), name="scheduled"),
        RobustnessMonitor(noise.Gaussian(), [0.5]),
    ]


def main(folder: Path, strategy: str) -> None:
    pl.seed_everything(0, verbose=False)
    callbacks = make()
    settings: dict[str, Any] = {"devices": 2, "strategy": strategy}
    module = Classifier()
    trainer = make_trainer([*callbacks, Knows(f"{folder}/worker.pt", callbacks)], max_epochs=3, **settings)
    trainer.fit(module, loader(), loader(Rows(64, seed=1)))
    torch.save(known(*callbacks), folder / "main.pt")
    trainer.save_checkpoint(folder / "last.ckpt")
    make_trainer(callbacks, max_epochs=2, **settings).fit(module, loader(), loader(Rows(64, seed=1)))
    torch.save(known(*callbacks), folder / "second.pt")
