"""What the laws ask of a module of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset


class Module(pl.LightningModule):
    """A module whose learning rate the laws can set."""

    lr = 0.05

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Samples(Dataset):
    """Hands out its own samples: what is written to one stays written."""

    def __init__(self, samples: Sequence[Any]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.samples[i]


@dataclass(frozen=True)
class Member:
    """A module with its data, and what has to be typed for it.

    Args:
        module: Makes the module.
        loader: Makes the loader, without shuffling, for training and validation.
        move: Adds a number to a batch, by hand and in place, wherever noise belongs.
        typed: What a user types in a noise callback, such as ``{"inputs": "0.x"}``.
        monitored: What a user types in a RobustnessMonitor, or ``None`` if the batch has no target to predict.
        predict: Returns the predictions and targets of a batch, written by hand, as flat rows.
        layers: The layers for noise in activations.
        trained: What the training step receives of a batch of the loader.
        trainer: Arguments of the trainer.
    """

    module: Callable[[], Any]
    loader: Callable[[], Any]
    move: Callable[[Any, float], Any]
    typed: dict[str, Any] = field(default_factory=dict)
    monitored: dict[str, Any] | None = None
    predict: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None
    layers: str = "*"
    trained: Callable[[Any], Any] = lambda batch: batch
    trainer: dict[str, Any] = field(default_factory=dict)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def fresh(batch: Any) -> Any:
    """Returns a copy of a batch in which no two tensors share memory."""
    if not isinstance(batch, Tensor) and hasattr(batch, "clone"):
        return batch.clone()
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone())
