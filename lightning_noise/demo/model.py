"""The classifier of the demonstration, and its progress in the terminal."""

from __future__ import annotations

import pytorch_lightning as pl
import rich
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

__all__ = ["DigitClassifier", "ProgressLine"]


class DigitClassifier(pl.LightningModule):
    """Classifies digits with a small convolutional network, and knows nothing of noise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *_block(1, 16),
            *_block(16, 16),
            nn.MaxPool2d(2),
            *_block(16, 32),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._log_loss("train_loss", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._log_loss("val_loss", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._log_loss("test_loss", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _log_loss(self, name: str, batch: list[Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log(name, loss)
        return loss


class ProgressLine(pl.Callback):
    """Prints how far a training is and the last accuracies on the validation data.

    A terminal shows a single line, which is overwritten after each epoch. A pipe or a file gets a line every five epochs.

    Args:
        title: The name of the training.
    """

    def __init__(self, title: str):
        self.title = title

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rich.print(f"\n{self.title}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, last, metrics = trainer.current_epoch + 1, trainer.max_epochs, trainer.callback_metrics
        clean, noisy = (100 * metrics[f"robustness/accuracy_{data}"].item() for data in ("clean", "noisy"))
        line = f"  epoch {epoch:>3}/{last}   validation accuracy: clean {clean:5.1f} %, under noise {noisy:5.1f} %"
        if rich.get_console().is_terminal:
            rich.print(line, end="\n" if epoch == last else "\r")
        elif epoch % 5 == 0 or epoch == last:
            rich.print(line)


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
