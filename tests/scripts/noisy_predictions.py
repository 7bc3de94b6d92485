"""Predictions under noise on one or more ranks. Each writes its results to `<folder>/<rank>.pt`."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from helpers import Classifier, Rows, loader, make_trainer

from lightning_noise import NoisyPredictions, noise


class Saves(NoisyPredictions):
    folder: Path

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save([tuple(each) for each in self.results], self.folder / f"{trainer.global_rank}.pt")


class Predicts(Classifier):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def main(folder: Path, devices: int) -> None:
    settings = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    pl.seed_everything(0, verbose=False)
    noisy = Saves(noise.Gaussian(), 0.5, n_draws=5)
    noisy.folder = folder
    data = loader(Rows(13, seed=1), batch_size=13 if devices == 1 else 3)
    make_trainer([noisy], **settings).predict(Predicts(), data, return_predictions=False)
