"""A classifier of handwritten digits with a LightningCLI. It contains no noise; `noise.yaml` adds the noise."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split


class DigitClassifier(pl.LightningModule):
    """A small convolutional network.

    Args:
        channels: The number of channels of the first layer. The second layer has twice as many.
        lr: The learning rate.
    """

    def __init__(self, channels: int = 16, lr: float = 3e-3):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 4 * 4, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Digits(pl.LightningDataModule):
    """The 1797 digits of scikit-learn, images of 8 x 8 pixels in [0, 1].

    Args:
        batch_size: The number of images in a batch.
    """

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        data = TensorDataset(images, torch.tensor(labels))
        self.train, self.validation = random_split(data, [1397, 400], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation, shuffle=False)

    def _loader(self, data: Dataset, *, shuffle: bool) -> DataLoader:
        return DataLoader(data, batch_size=self.batch_size, shuffle=shuffle)


if __name__ == "__main__":
    cli = LightningCLI(DigitClassifier, Digits)
