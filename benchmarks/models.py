"""Networks, their training, and noise that is written into their step by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

Callbacks = Callable[[], list[Any]]


class Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, 2 if after > before else 1, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.out = nn.ReLU()
        self.pad = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.out(y + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.pad)) if self.pad else x))


def resnet_20() -> nn.Module:
    """The network of 20 layers for CIFAR of He et al. (2016), section 4.2."""
    blocks = nn.Sequential(*(Block(before, after) for before, after in pairwise([16] * 4 + [32] * 3 + [64] * 3)))
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def perceptron(features: int = 32) -> nn.Module:
    """A network whose step is little more than the cost of calls."""
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    """A transformer that classifies rows of 64 tokens."""
    layer = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(1000, 64), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64 * 64, 10))


def layers(n: int, width: int = 32) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(n)))


class ByHand(NamedTuple):
    """Noise as one would write it into a module: in its loss, in activations, and after the backward pass."""

    loss: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, x, y: F.cross_entropy(module(x), y)
    activation: Callable[[Tensor], Tensor] | None = None
    after_backward: Callable[[Any], None] = lambda module: None


class Classifier(pl.LightningModule):
    """A network with its loss, and noise by hand, in the outputs of the modules whose names match the pattern."""

    def __init__(self, net: nn.Module, hand: ByHand | None = None, pattern: str = ""):
        super().__init__()
        self.net = net
        self.hand = hand or ByHand()
        self.clean: list[tuple[Tensor, Tensor]] = []
        for name, module in self.named_modules():
            if self.hand.activation is not None and fnmatch(name, pattern):
                module.register_forward_hook(lambda module, args, output: self.hand.activation(output))  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.hand.loss(self, *batch)

    def on_after_backward(self) -> None:
        self.hand.after_backward(self)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(device: torch.device, module: pl.LightningModule, batches: Iterable[Any], callbacks: list[Any], **kwargs: Any) -> None:
    """Trains on batches, and validates on them after each epoch."""
    quiet: dict[str, Any] = dict.fromkeys(
        ["enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"], False
    )
    options: dict[str, Any] = quiet | {"max_epochs": 1, "num_sanity_val_steps": 0} | kwargs
    trainer = pl.Trainer(accelerator="cpu" if device.type == "cpu" else "gpu", devices=1, callbacks=callbacks, **options)
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)


def batches_of(n: int, size: int, *shape: int) -> list[list[Tensor]]:
    return [[torch.rand(size, *shape), torch.randint(10, (size,))] for _ in range(n // size)]


@torch.no_grad()
def perturb_weights(module: nn.Module, level: float, relative: bool = False) -> list[tuple[Tensor, Tensor]]:
    clean: list[tuple[Tensor, Tensor]] = [(w, w.clone()) for w in module.parameters() if w.ndim > 1]
    for w, _ in clean:
        w.add_(torch.randn_like(w) * (level * w.std() if relative else level))
    return clean


@torch.no_grad()
def restore_weights(clean: list[tuple[Tensor, Tensor]]) -> None:
    for w, copy in clean:
        w.copy_(copy)
