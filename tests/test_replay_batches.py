"""A replay starts each step from what the user's step starts from, and refuses alike on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed
from helpers import Classifier, Rows, fit, keys_of, loader, make_trainer
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, IterableDataset

from lightning_noise import ReplayMonitor, RobustnessMonitor, noise
from lightning_noise.callbacks.monitor import Monitor


class Centered(pl.LightningModule):
    """Logs what was set for the batch: the mean of each row, the number of rows, and the batch itself."""

    kept: tuple[Tensor, ...]

    def __init__(self):
        super().__init__()
        self.n_rows = 0
        self.seen: list[int] = []

    def validation_step(self, batch, batch_idx):
        self.log("centered", (batch - self.center).square().mean())
        self.log("rows", float(self.n_rows + len(self.seen)))
        self.log("kept", self.kept[0].abs().mean())
        self.center = None

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen.append(len(batch))


def prepare(module: Any, batch: Tensor) -> None:
    module.center = batch.mean(1, keepdim=True)
    module.n_rows += len(batch)
    module.kept = (batch,)


class ByHook(Centered):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        prepare(self, batch)
        return batch


class ByFirstHook(Centered):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        prepare(self, batch)
        return batch


class ByCallback(pl.Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        prepare(pl_module, batch)


@pytest.mark.parametrize("n", [16, 15], ids=["equal batches", "a smaller last batch"])
@pytest.mark.parametrize("make", [ByHook, ByFirstHook, Centered])
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_set_for_a_batch_is_part_of_each_replayed_step(make, order, n):
    monitor = ReplayMonitor(noise.Gaussian(), [0.0, 5.0])
    callbacks = [*([ByCallback()] if make is Centered else []), monitor][::order]
    rows: Any = torch.randn(n, 4) * torch.arange(1, n + 1)[:, None]
    trainer = make_trainer(callbacks)
    trainer.validate(make(), DataLoader(rows, batch_size=4), verbose=False)
    found = keys_of(trainer)
    for key in ("centered", "rows", "kept"):
        assert found[key] == found[f"replay/clean/{key}"] == found[f"replay/gaussian/0/{key}"]
    assert found["replay/gaussian/5/rows"] == found["rows"]
    assert found["replay/gaussian/5/kept"] != found["kept"]  # the tensor of the batch that was kept is noisy


class ManyKeys(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log_dict({f"metric_{i}": float(i) for i in range(30)})

    def on_train_start(self):
        raise AssertionError("the fit must not begin")


@pytest.mark.parametrize("n", [0, 2])
def test_more_keys_than_the_pipe_of_a_spawned_process_holds_are_refused_before_the_first_step(monkeypatch, n):
    monkeypatch.setattr("lightning_noise.callbacks.monitor.launches_copies", lambda trainer: True)
    monkeypatch.setattr("lightning_noise.callbacks.replay.launches_copies", lambda trainer: True)
    monitor = ReplayMonitor([noise.Gaussian(), noise.Uniform()], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"logs 270 keys.* strategy='ddp'"):
        fit([monitor], module=ManyKeys, num_sanity_val_steps=n)


def test_the_keys_of_all_monitors_are_counted_together(monkeypatch):
    monkeypatch.setattr("lightning_noise.callbacks.monitor.launches_copies", lambda trainer: True)
    levels = [i / 100 for i in range(1, 101)]
    monitors: list[Monitor] = [ReplayMonitor(noise.Gaussian(), levels), RobustnessMonitor(noise.Gaussian(), levels[:30])]
    for each in monitors:
        fit([each], fast_dev_run=True)
    with pytest.raises(ValueError, match="would hang"):
        fit(monitors, fast_dev_run=True)


class Uneven(IterableDataset):
    """Has data for the first process alone."""

    def __iter__(self):
        is_second = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        yield from [] if is_second else [Rows(16)[i] for i in range(16)]


@pytest.mark.slow
@pytest.mark.parametrize("empty", [[1], [1, 0], [0, 1]], ids=["one loader", "the second loader", "the first loader"])
def test_a_process_without_a_batch_is_refused_on_all_processes(empty):
    class Module(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", self(batch[0]).mean())

    loaders = [DataLoader(Uneven(), 8) if is_empty else loader(Rows(16)) for is_empty in empty]
    trainer = make_trainer([ReplayMonitor(noise.Gaussian(), [0.1])], devices=2, strategy="ddp_fork", accelerator="cpu")
    with pytest.raises(ProcessRaisedException, match="one of them saw no batch"):
        trainer.fit(Module(), loader(), loaders)
