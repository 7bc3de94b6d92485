"""A fit with every callback on the processes of torchrun or Ray, of which one is killed once; rank 0 writes how it ends."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from crash.fits import Tokens, callbacks
from helpers import Rows, loader, make_trainer, weights
from helpers_adaptive import history
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy

from lightning_noise.callbacks.base import NoiseCallback


class KillOnce(pl.Callback):
    """Kills the second process at the start of the third epoch, unless the file exists."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 2 and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class WriteEnd(pl.Callback):
    """Writes the weights and the decisions at the end of the fit."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        noises = [each for each in trainer.callbacks if isinstance(each, NoiseCallback) and each.adaptive]  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            moves = [[tuple(decision) for decision in history(noise)] for noise in noises]
            torch.save({"weights": weights(pl_module), "moves": moves, "world_size": trainer.world_size}, self.file)


def fit(folder: Path, *, ckpt_path: str | None, more: Any = (), **settings: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    watch = [KillOnce(folder / "killed"), WriteEnd(folder / "end.pt")]
    trainer = make_trainer([*callbacks(), *more, *watch], max_epochs=3, **settings)
    trainer.fit(Tokens(), loader(Rows(64)), loader(Rows(26, seed=1), batch_size=13), ckpt_path=ckpt_path)


def main(folder: Path) -> None:
    """What torchrun starts."""
    saver = ModelCheckpoint(folder, save_last=True)
    # the default is 30 minutes, and torchrun starts processes again that could not find each other
    strategy = DDPStrategy(timeout=timedelta(minutes=2))
    fit(folder, ckpt_path="last", more=[saver], enable_checkpointing=True, devices=2, strategy=strategy)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
