"""The networks: small, so that hundreds can be trained on a CPU."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

RATE, WIDTH = 3e-3, 64


def network(x: Tensor, n_outputs: int, net: str) -> nn.Module:
    """A network for inputs of this shape: convolutions for images and series, a perceptron for tables."""
    if net == "transformer":
        return Transformer(int(x.max()) + 1, n_outputs)
    if x.ndim == 2:
        return nn.Sequential(
            nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, n_outputs)
        )
    return convolutions(x, n_outputs, normalized=net == "batchnorm")


def convolutions(x: Tensor, n_outputs: int, normalized: bool) -> nn.Sequential:
    """Two convolutions with stride 2 and two linear layers; 106,000 parameters for 28 x 28 pixels."""
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if x.ndim == 3 else (nn.Conv2d, nn.BatchNorm2d)
    layers: list[nn.Module] = []
    for before, after in ((x.shape[1], 16), (16, 32)):
        layers += [conv(before, after, 3, stride=2, padding=1), *([norm(after)] if normalized else []), nn.ReLU()]
    features = nn.Sequential(*layers, nn.Flatten())
    n_features = features.eval()(x[:1]).shape[1]
    return nn.Sequential(*features.train(), nn.Linear(n_features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, n_outputs))


class Transformer(nn.Module):
    """One layer of attention over letters, and the mean of its outputs."""

    def __init__(self, n_letters: int, n_outputs: int):
        super().__init__()
        self.embedding = nn.Embedding(n_letters, WIDTH, padding_idx=0)
        self.position = nn.Parameter(torch.randn(512, WIDTH) / WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        valid = x != 0
        y = self.layer(self.embedding(x) + self.position[: x.shape[1]], src_key_padding_mask=~valid)
        return self.head((y * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))


class Module(pl.LightningModule):
    """A network and its training, which knows nothing of noise."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), y) if y.is_floating_point() else F.cross_entropy(output, y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
