"""Ordinary classifiers and segmenters whose steps and data are written in an unusual way."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import tasks
from zoo.member import Member, Module, Samples, randn

LABELS = torch.arange(10) % 3


def table(batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(randn(10, 6), LABELS), batch_size=batch_size)


class Shared(Module):
    """Its validation step calls its training step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.seen = MulticlassAccuracy(3, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.seen(logits, y)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss" if self.training else "valid_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("valid/acc", self.seen)
        return self.training_step(batch, batch_idx)


def on_the_instance() -> Module:
    """Its steps are functions that are set on the instance."""
    module = Shared()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("iou", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    module.training_step = MethodType(training_step, module)  # type: ignore[method-assign]
    module.validation_step = MethodType(validation_step, module)  # type: ignore[method-assign]
    return module


class Memory(Module):
    """Fits nothing by gradients: the training step fills a bank of features and returns nothing."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)
        self.bank: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        self.bank.append(self.net(batch["image"]).detach())

    def validation_step(self, batch, batch_idx):
        bank = torch.cat(self.bank) if self.bank else torch.zeros(1, 4)
        self.log("image_score", torch.cdist(self.net(batch["image"]), bank).amin(1).mean(), batch_size=len(batch["image"]))

    def configure_optimizers(self):
        return None


class Augmenting(pl.LightningDataModule):
    """Changes the batches after their transfer, in training alone."""

    def train_dataloader(self):
        return table()

    def val_dataloader(self):
        return table()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x.flip(1), y) if self.trainer.training else (x, y)  # type: ignore[union-attr]


class Segmenter(Module):
    """Collects what its steps return, and computes the metric at the end of an epoch."""

    def __init__(self):
        super().__init__()
        self.net, self.outputs = nn.Conv2d(3, 3, 3, padding=1), []

    def forward(self, image):
        return self.net((image - 0.5) / 0.25)

    def shared_step(self, batch, stage):
        logits = self.forward(batch["image"])
        right = (logits.argmax(1) == batch["mask"]) & (batch["mask"] != 255)
        loss = F.cross_entropy(logits, batch["mask"].long(), ignore_index=255)
        return {"loss": loss, "right": right.sum(), "n": (batch["mask"] != 255).sum()}

    def training_step(self, batch, batch_idx):
        return self.shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.outputs.append(self.shared_step(batch, "valid"))

    def on_validation_epoch_end(self):
        total = {key: torch.stack([output[key] for output in self.outputs]).sum() for key in ("right", "n")}
        self.outputs.clear()
        self.log("valid_dataset_iou", total["right"] / total["n"])


def pictures() -> list[dict[str, Any]]:
    images = randn(10, 3, 8, 8).sigmoid()
    masks = (images.sum(1) * 2 - 2).long().clamp(0, 2).to(torch.uint8)
    masks[:, :2] = 255
    return [
        {"image": image, "mask": mask, "image_path": f"{i}.jpg"}
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]


def known_pixels(module: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    known = batch["mask"] != 255
    return module(batch["image"]).movedim(1, -1)[known], batch["mask"][known].long()


class Steps(Module):
    """A classifier with logits of (B, T, classes) for targets of (B, T)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).movedim(-1, 1), batch[1], ignore_index=-100)

    def validation_step(self, batch, batch_idx):
        self.log("token_loss", self.training_step(batch, batch_idx))  # type: ignore[arg-type]


def steps() -> DataLoader:
    labels = torch.arange(60).view(10, 6) % 4
    labels[:, 4:] = -100
    return DataLoader(TensorDataset(randn(10, 6, 2), labels), batch_size=4)


def moved(batch: Any, shift: float) -> None:
    batch[0].add_(shift)


def classes(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return module(batch[0]), batch[1]


MEMBERS = {
    "a validation step that calls the training step": Member(Shared, table, moved, {}, {}, classes),
    "steps on the instance": Member(on_the_instance, table, moved, {}, {}, classes),
    "a step that returns nothing": Member(
        Memory,
        lambda: DataLoader(Samples([{"image": x, "name": "a"} for x in randn(10, 6)]), batch_size=4),
        lambda batch, shift: batch["image"].add_(shift),
    ),
    "a data module that augments": Member(
        Shared, Augmenting, moved, {}, {}, classes, trained=lambda batch: [batch[0].flip(1), batch[1]]
    ),
    "segmentation": Member(
        Segmenter,
        lambda: DataLoader(Samples(pictures()), batch_size=4),
        lambda batch, shift: batch["image"].add_(shift),
        {},
        {"target": "mask", "task": tasks.Multiclass(ignore_index=255)},
        known_pixels,
    ),
    "a class for each step of a series": Member(
        Steps,
        steps,
        moved,
        {},
        {"task": tasks.Multiclass(ignore_index=-100)},
        lambda module, batch: tuple(part[batch[1] >= 0] for part in (module(batch[0]), batch[1])),
    ),
}
