"""Fits with adaptive levels on one or more processes; each writes what was decided to `<folder>/<rank>.pt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Rows, loader, make_trainer
from pytorch_lightning.callbacks import LambdaCallback
from torch import distributed
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import ActivationNoise, AdaptiveLevel, InputNoise, LabelSmoothing, WeightNoise, noise, tasks
from lightning_noise.rules import Governor, SignedGap

GOVERNOR = Governor(chance=0.0, warmup=0, min_skill=0.01, step=1.0)


class OnTheFirst(IterableDataset):
    """Has samples on the first rank only."""

    def __iter__(self):
        rows = Rows(8, seed=1)
        return iter([] if distributed.is_initialized() and distributed.get_rank() else [rows[i] for i in range(8)])


class Write(pl.Callback):
    """Saves the decisions of the callbacks at the end of a fit."""

    def __init__(self, path: str, callbacks: list[Any]):
        self.path = path
        self.callbacks = callbacks

    def on_train_end(self, trainer, pl_module):
        found = {
            callback.name: {
                "history": [tuple(decision) for decision in callback.adaptive.history],
                "summary": callback.adaptive.summary(),
                "seen": tuple(callback.adaptive._last),
            }
            for callback in self.callbacks
        }
        torch.save(found, f"{self.path}-{trainer.global_rank}.pt")


class Noting(InputNoise):
    """Saves the message of the error that it raises, and continues."""

    path = ""

    def on_validation_epoch_end(self, trainer, pl_module):
        said = ""
        try:
            super().on_validation_epoch_end(trainer, pl_module)
        except ValueError as error:
            said = str(error)
        torch.save(said, f"{self.path}-{trainer.global_rank}.pt")


def make() -> list[Any]:
    own: Any = MulticlassAccuracy(N_CLASSES, average="micro")
    return [
        InputNoise(noise.Gaussian(), AdaptiveLevel(GOVERNOR)),
        InputNoise(noise.Gaussian(), AdaptiveLevel(GOVERNOR, task=tasks.Custom(own)), name="own"),
        WeightNoise(noise.Gaussian(), AdaptiveLevel(GOVERNOR), relative="std"),
        ActivationNoise(noise.Gaussian(), AdaptiveLevel(GOVERNOR), "net.1"),
        LabelSmoothing(AdaptiveLevel(SignedGap())),
    ]


def decide(folder: Path, devices: int, max_epochs: int = 25, ckpt_path: Path | None = None) -> Any:
    settings: dict[str, Any] = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    make_trainer(max_epochs=5).fit(module, loader(Rows(200)))
    module.lr = 0.0  # so that the processes decide upon what one decides upon, whatever they train with
    # batches of all processes together have the samples of one of one process, and so the same draw of the weights
    callbacks = make()
    write = Write(str(folder / "decided"), callbacks)
    save = LambdaCallback(on_train_end=lambda trainer, _: trainer.save_checkpoint(folder / f"{devices}.ckpt"))
    trainer = make_trainer([*callbacks, write, save], max_epochs=max_epochs, limit_train_batches=1, **settings)
    trainer.fit(module, loader(), loader(Rows(101, seed=1), batch_size=20 // devices), ckpt_path=ckpt_path)
    return module


def continued_alone(folder: Path) -> None:
    """Two processes decide for twelve epochs, and one goes on from their checkpoint."""
    decide(folder, 2, max_epochs=12)
    decide(folder, 1, ckpt_path=folder / "2.ckpt")


def main(folder: Path, devices: int) -> None:
    settings: dict[str, Any] = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    module = decide(folder, devices)
    noting = Noting(noise.Gaussian(), AdaptiveLevel(GOVERNOR))
    noting.path = str(folder / "error")
    trainer = make_trainer([noting], max_epochs=1, num_sanity_val_steps=0, use_distributed_sampler=False, **settings)
    trainer.fit(module, loader(), loader(OnTheFirst()))
