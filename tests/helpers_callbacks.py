"""Modules and callbacks for tests of every noise callback."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Deterministic, assert_same, fit, loader, weights
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_noise import GradientNoise, InputNoise

AFTER_THE_LOSS = (GradientNoise,)  # whose noise is first seen in the weights


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


@cache
def fit_without(*, shuffle: bool = True, **kwargs: Any) -> Classifier:
    """The module after a run without noise, which many tests compare with and no test changes."""
    return fit(train=loader(shuffle=shuffle), **kwargs)[0]


def assert_resumes(make, level, folder, train, every_n_train_steps, resume_at, *, from_all=False, **kwargs):
    """Resumes from all checkpoints at the given steps, or from the first, a middle and the last."""
    saver = ModelCheckpoint(folder, every_n_train_steps=every_n_train_steps, save_top_k=-1, filename="{step}")
    kwargs = {"module": Deterministic, "max_epochs": 4, **kwargs}
    whole, _ = fit([make(level), saver], train=train(), enable_checkpointing=True, **kwargs)
    checkpoints = {int(path.stem.removeprefix("step=")): path for path in folder.glob("*.ckpt")}
    resumable = [path for step, path in sorted(checkpoints.items()) if resume_at(step)]
    assert len(resumable) >= 3
    for checkpoint in resumable if from_all else (resumable[0], resumable[len(resumable) // 2], resumable[-1]):
        resumed, _ = fit([make(level)], train=train(), ckpt_path=str(checkpoint), seed=0, **kwargs)
        assert len(resumed.seen) < len(whole.seen)
        assert_same(weights(resumed), weights(whole))


class Failing(Classifier):
    def __init__(self, where: str, error: type[BaseException]):
        super().__init__()
        self.where, self.error = where, error

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.where == "step":
            raise self.error("stop")
        if batch_idx == 1 and self.where == "backward":
            loss.register_hook(self._raise)
        return loss

    def _raise(self, gradient):
        raise self.error("stop")

    def on_train_epoch_end(self):
        if self.where == "epoch end":
            raise self.error("stop")


class Normalised(Deterministic):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm1d(N_CLASSES))


class LevelLog(pl.Callback):
    def __init__(self, callback: InputNoise):
        self.callback = callback
        self.levels: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.levels.append(self.callback.current_level)
