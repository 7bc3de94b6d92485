"""A validation under noise on one or more ranks. Each writes what it logged to `<folder>/<rank>.pt`."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Rows, loader, make_trainer
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import ReplayMonitor, noise


class Logs(Classifier):
    """Logs with each reduction, mostly without `sync_dist`."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.accuracy = MulticlassAccuracy(N_CLASSES, average="micro")

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", loss)
        self.log("val_max", logits.max(), reduce_fx="max")
        self.log("val_min", logits.min(), reduce_fx="min")
        self.log("val_sum", logits.sum(), reduce_fx="sum")
        self.log("val_reduced", loss, sync_dist=True)

    def on_validation_end(self):
        found = {key: value.item() for key, value in self.trainer.callback_metrics.items()}
        torch.save(found, self.folder / f"{self.trainer.global_rank}.pt")


def main(folder: Path, devices: int) -> None:
    settings = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    pl.seed_everything(0, verbose=False)
    module, data = Logs(folder), loader(Rows(12, seed=1), batch_size=3)
    make_trainer([ReplayMonitor(noise.Gaussian(), [0.0, 0.5])], **settings).validate(module, data, verbose=False)
