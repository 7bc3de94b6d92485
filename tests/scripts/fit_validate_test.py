"""A fit, a validation and a test on one or more processes; each writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Rows, loader, make_trainer
from pytorch_lightning.callbacks import EarlyStopping
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, default_collate
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import (
    ActivationNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    tasks,
)
from lightning_noise.metrics import FlipRate
from lightning_noise.testing import global_streams

EVALUATED: list[torch.Tensor] = []  # not in the module, where the monitors undo what their forward passes change


class Pairs(BatchSampler):
    """A batch sampler of one's own."""


class Batches(Dataset):
    """A data set of whole batches, of different sizes."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = Rows(13, seed=1)
        return rows.x[5 * i : 5 * i + 5], rows.y[5 * i : 5 * i + 5]


def three_views(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Three rows for each sample."""
    return [part.repeat(3, *[1] * (part.ndim - 1)) for part in default_collate(samples)]


def held_out() -> dict[str, DataLoader]:
    rows = Rows(13, seed=1)
    return {
        # of the second process the last batch is one row, which repeats a row of the first
        "robustness": loader(rows, batch_size=6),
        "subset": loader(rows, batch_size=2, sampler=list(range(7))),
        "pairs": loader(rows, batch_sampler=Pairs(SequentialSampler(rows), 2, False)),
        "batches": loader(Batches(), batch_size=None),
        "views": loader(Rows(12, seed=1), batch_size=4, collate_fn=three_views),
    }


class Recorder(Classifier):
    """Keeps what its forward pass gets of the first loader: each clean batch twice, for the module itself and the monitor."""

    def __init__(self):
        super().__init__()
        self.used: list[torch.Tensor] = []
        self.dataloader_idx = 0
        self.made: list[torch.Tensor] = []  # what a layer has made, and the next one has got
        self.got: list[torch.Tensor] = []
        self.net[1].register_forward_hook(self._keep_made)
        self.net[2].register_forward_pre_hook(self._keep_got)

    def _keep_made(self, layer, args, output):
        self.made.append(output.detach())

    def _keep_got(self, layer, args):
        self.got.append(args[0].detach())

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.dataloader_idx = dataloader_idx
        super().validation_step(batch, batch_idx)

    def forward(self, x):
        if not self.training and self.dataloader_idx == 0:
            EVALUATED.append(x.clone())
        if self.training:
            self.used.append(next(self.parameters()).detach().clone())
        return super().forward(x)


class Gradients(pl.Callback):
    """Keeps the gradients that it finds before each update."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module: Any, optimizer):
        self.kept.append(torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()]))


class Before(pl.Callback):
    """Keeps the global streams as they are before the monitors, which come after it."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.streams = global_streams()


class Write(pl.Callback):
    def __init__(self, folder: Path, before: Before):
        self.folder = folder
        self.before = before
        self.kept: dict[str, Any] = {}

    def on_validation_epoch_start(self, trainer, pl_module: Any):
        EVALUATED.clear()
        self.kept["untouched"] = True

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.kept["untouched"] &= global_streams() == self.before.streams  # the monitors come before this callback

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.kept |= {"evaluated": EVALUATED, "validated": dict(trainer.callback_metrics)}
            torch.save(self.kept, self.folder / f"{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module: Any):
        self.kept |= {
            "seen": [batch[0] for batch in pl_module.seen],
            "used": pl_module.used,
            "activation": [got - made for got, made in zip(pl_module.got, pl_module.made, strict=True)],
            "weights": {key: value.clone() for key, value in pl_module.state_dict().items()},
            "fitted": dict(trainer.callback_metrics),
            "epochs": trainer.current_epoch,
            "data": trainer.train_dataloader.dataset.x.clone(),  # type: ignore[union-attr]
        }
        torch.save(self.kept, self.folder / f"fit-{trainer.global_rank}.pt")


def main(folder: Path, strategy: str, devices: int, level: float) -> None:
    distributed = {"devices": devices, "strategy": strategy}
    loaders = held_out()
    noises, levels = [noise.Gaussian(), noise.Impulse()], {"gaussian": [0.5], "impulse": [0.5]}
    # few keys: the process that starts the others is given all through one pipe
    own = MetricCollection({"accuracy": MulticlassAccuracy(N_CLASSES, average="micro"), "flips": FlipRate()})
    chosen = {"pairs": tasks.Custom(own), "batches": tasks.Custom(own)}
    monitors = [
        RobustnessMonitor(noises, levels, dataloader_idx=i, name=name, task=chosen.get(name, tasks.Multiclass()))
        for i, name in enumerate(loaders)
    ]
    # no score rises by two, so that the patience of one epoch ends the fit on all processes at once
    stopper = EarlyStopping("robustness/score", mode="max", patience=1, min_delta=2.0)
    pl.seed_everything(0, verbose=False)
    module = Recorder()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    perturbed = [
        InputNoise(noise.Gaussian(), level),
        TargetNoise(labels.FlipLabels(N_CLASSES), level),
        LabelSmoothing(level),
        Mixup(level),
        WeightNoise(noise.Gaussian(), level, relative="std", gradient="reparametrized"),
        WeightNoise(noise.Speckle(), level, gradient="reparametrized", name="speckle"),
        before := Gradients(),
        GradientNoise(noise.Gaussian(), level),
        after := Gradients(),
        ActivationNoise(noise.Gaussian(), level, "net.1"),
    ]
    before_monitors = Before()
    write = Write(folder, before_monitors)
    write.kept |= {"gradients": before.kept, "noisy gradients": after.kept}
    trainer = make_trainer([*perturbed, before_monitors, monitors[0], stopper, write], max_epochs=5, **distributed)
    trainer.fit(module, loader(shuffle=True), loaders["robustness"])
    module.load_state_dict(start)
    trainer = make_trainer([before_monitors, *monitors, Write(folder, before_monitors)], **distributed)
    trainer.validate(module, [*loaders.values()], verbose=False)
