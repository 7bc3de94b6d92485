"""A fit and a test whose forward passes are slow, with a bar: ``python long_passes.py tqdm|rich [first] FOLDER``."""

import sys
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import RobustnessMonitor, noise


class Slow(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def forward(self, x):
        time.sleep(0.1)
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SlowReport(RobustnessMonitor):
    def _make_report(self):
        time.sleep(1.2)
        return super()._make_report()


if __name__ == "__main__":
    kind, *place, folder = sys.argv[1:]
    pl.seed_everything(0, verbose=False)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)
    bar = TQDMProgressBar() if kind == "tqdm" else RichProgressBar()
    monitor = SlowReport(noise.Gaussian(), [0.1, 0.2, 0.4, 0.8])
    callbacks = [bar, monitor] if place else [monitor, bar]
    trainer = pl.Trainer(
        max_epochs=1, callbacks=callbacks, default_root_dir=folder, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.fit(Slow(), loader, loader)
    trainer.test(Slow(), loader)
