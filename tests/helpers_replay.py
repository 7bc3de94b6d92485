"""Modules and functions for the tests of replays."""

from __future__ import annotations

import logging
import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Rows, keys_of, loader, make_trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall

from lightning_noise import ReplayMonitor

HELD_OUT = Rows(13, seed=1)
LEVELS = [0.0, 0.6]


class Meter:
    """A mean, as many projects write their own."""

    def __init__(self):
        self.sum, self.n = 0.0, 0
        self.history: list[float] = []

    def update(self, value: float, n: int) -> None:
        self.sum, self.n = self.sum + value * n, self.n + n
        self.history.append(value)


class Everything(Classifier):
    """Keeps state of its validation in every place, and logs in every way."""

    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.BatchNorm1d(8))
        self.accuracy = MulticlassAccuracy(N_CLASSES, average="micro")
        self.collection = MetricCollection(
            {
                "precision": MulticlassPrecision(N_CLASSES),
                "recall": MulticlassRecall(N_CLASSES),
                "auroc": MulticlassAUROC(N_CLASSES),
            },
            prefix="val_",
        )
        self.by_name = {"accuracy": self.accuracy, "hidden": MeanMetric()}  # an alias, and an unregistered metric
        self.outputs: list[Tensor] = []
        self.nested = {"a": [0], "b": deque(maxlen=2), "c": {1}, "d": defaultdict(list)}
        self.counts = np.zeros(N_CLASSES)
        self.in_place = torch.zeros(2)
        self.pair = (torch.zeros(2), [0])
        self.generator = torch.Generator().manual_seed(1)
        self.dice = random.Random(1)
        self.register_buffer("n_seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(1))
        self.meter = Meter()
        self.calls: list[str] = []
        self.logger_of_python = logging.getLogger(__name__)
        self.n_steps = 0
        self.means: list[float] = []

    def on_validation_epoch_start(self) -> None:
        self.outputs = [torch.zeros(0)]
        self.meter = Meter()
        self.calls.append("start")

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.calls.append(f"before {batch_idx}")
        self.log("val_before", float(batch_idx))
        torch.rand(())  # the step must not find this drawn twice

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x) + 0.1 * torch.rand(len(x), N_CLASSES) * random.random() * np.random.rand()
        logits = logits + 0.1 * torch.rand(len(x), N_CLASSES, generator=self.generator) * self.dice.random()
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.collection.update(logits, y)
        self.by_name["hidden"].update(loss)
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        self.log("val_max", loss, reduce_fx="max")
        self.log("val_sum", loss, reduce_fx=torch.sum, logger=False)
        self.log("val_own_size", loss, batch_size=3)
        self.log_dict(self.collection)
        self.outputs.append(logits.argmax(1).float())
        self.nested["a"].append(len(x))
        self.nested["b"].append(batch_idx)
        self.nested["c"].add(batch_idx)
        self.nested["d"][batch_idx].append(loss.item())
        self.counts += np.bincount(logits.argmax(1).numpy(), minlength=N_CLASSES)
        self.in_place += logits.detach().sum()
        self.pair[0].add_(1)
        self.pair[1].append(1)
        self.n_seen += len(x)  # type: ignore[operator]
        self.scratch = self.scratch + loss.detach()
        self.meter.update(loss.item(), len(x))
        self.n_steps += 1
        self.temporary = loss
        self.trainer.of_the_user = loss  # type: ignore[attr-defined]
        if self.meter.n > 8:
            self.log("val_late", loss)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("direct", loss, self.n_steps)
            logger.log_metrics({"metrics": loss.item()}, step=self.n_steps)
        x.zero_()  # the step may write to its batch
        return {"loss": loss, "n": len(y)}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.calls.append(f"after {batch_idx}")
        self.log("val_after", outputs["loss"], batch_size=outputs["n"])

    def on_validation_epoch_end(self) -> None:
        mean = torch.cat(self.outputs).mean()
        self.means.append(mean.item())
        self.log("val_mean", mean)
        self.log("val_meter", self.meter.sum / self.meter.n)
        self.log("val_hidden", self.by_name["hidden"].compute())
        self.log("val_read", self.trainer.callback_metrics["val_loss"])
        self.log("val_counts", float(self.counts[0]))
        self.log("val_in_place", self.in_place.sum())
        self.log("val_pair", self.pair[0].sum() + len(self.pair[1]))
        self.log("val_buffers", self.n_seen + self.scratch)  # type: ignore[arg-type, operator]
        self.log("val_drawn", torch.rand(()))
        self.by_name["hidden"].reset()
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def as_dict(samples):
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"data": {"x": x}, "y": y}


class Readers(Classifier):
    """Reads batches of any kind, and removes the target from a mapping."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(self._pair(batch), batch_idx)

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        super().validation_step(self._pair(batch), 0)

    def _pair(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            return batch[:, :-1], batch[:, -1].long().clamp(0, 2)
        if isinstance(batch, dict):
            y = batch.pop("y")
            return (self.words(batch["ids"]).squeeze(-1) if "ids" in batch else batch["data"]["x"]), y
        return batch.x, batch.y


def split(found: dict[str, float], name: str = "replay") -> tuple[dict[str, float], dict[str, float]]:
    """Returns the user's values, and the values of the monitor without their prefix."""
    prefix = f"{name}/"
    own = {key: value for key, value in found.items() if not key.startswith(prefix)}
    return own, {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def under(found: dict[str, float], probe: str) -> dict[str, float]:
    return {key.removeprefix(f"{probe}/"): value for key, value in found.items() if key.startswith(f"{probe}/")}


def validated(monitor: ReplayMonitor, module: Any = Classifier, validation: Any = None, **kwargs: Any) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    module = module if isinstance(module, pl.LightningModule) else module()
    trainer = make_trainer([monitor], **kwargs)
    trainer.validate(module, loader(HELD_OUT) if validation is None else validation, verbose=False)
    return keys_of(trainer)
