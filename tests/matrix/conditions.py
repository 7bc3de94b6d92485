"""The conditions that each callback meets: what is trained, and how."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from helpers import Rows, loader
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from matrix import modules

N_HELD_OUT = 13


def train() -> DataLoader:
    return loader(shuffle=True)


def validation() -> DataLoader:
    return loader(Rows(N_HELD_OUT, seed=1))


def ordinary(trainer: pl.Trainer, module: Any) -> None:
    trainer.fit(module, train(), validation())


@dataclass(frozen=True)
class Condition:
    """A way to train.

    Args:
        module: Returns the module that trains at a learning rate.
        settings: Returns the arguments of the trainer for a learning rate; each trainer needs new callbacks.
        fit: Trains the module, and returns what a search has found.
        copies: How many callbacks of a class the trainer has.
    """

    module: Callable[[float], pl.LightningModule] = modules.Tokens
    settings: Callable[[float], dict[str, Any]] = lambda lr: {}
    fit: Callable[[pl.Trainer, Any], Any] = ordinary
    copies: int = 1


def with_(**settings: Any) -> Callable[[float], dict[str, Any]]:
    return lambda lr: settings


def beside(make: Callable[[float], pl.Callback]) -> Callable[[float], dict[str, Any]]:
    return lambda lr: {"callbacks": [make(lr)], "max_epochs": 3}


class Stream(IterableDataset):
    """Rows whose number is not known."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.rows.x, self.rows.y, strict=True))


def from_streams(trainer: pl.Trainer, module: Any) -> None:
    trainer.fit(module, loader(Stream(Rows())), loader(Stream(Rows(N_HELD_OUT, seed=1))))


def twice(trainer: pl.Trainer, module: Any) -> None:
    ordinary(trainer, module)
    trainer.fit_loop.max_epochs = 4
    ordinary(trainer, module)


def compiled(trainer: pl.Trainer, module: Any) -> None:
    ordinary(trainer, torch.compile(module, backend="eager"))


def after_search_for_rate(trainer: pl.Trainer, module: Any) -> list[float]:
    finder = Tuner(trainer).lr_find(module, train(), validation(), num_training=5, update_attr=False)
    assert finder is not None
    ordinary(trainer, module)
    return finder.results["loss"]


class Sized(modules.Tokens):
    """Has room for 8 samples."""

    batch_size = 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) > 8:
            raise RuntimeError("CUDA out of memory.")
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return validation()


def after_search_for_size(trainer: pl.Trainer, module: Any) -> tuple[int, list[Tensor]]:
    gc.freeze()  # each trial collects garbage
    Tuner(trainer).scale_batch_size(module, init_val=8, max_trials=4, steps_per_trial=1)
    found = module.batch_size, [*module.losses]
    trainer.fit(module)
    return found


def sharded(by_data: int, by_tensor: int) -> Callable[[float], dict[str, Any]]:
    return lambda lr: {"devices": 2, "strategy": ModelParallelStrategy(by_data, by_tensor)}


# a rate must not be 0; a tiny one changes no weight either
AVERAGE = beside(lambda lr: StochasticWeightAveraging(lr or 1e-30, swa_epoch_start=1, annealing_epochs=1))
ONE_PROCESS: dict[str, Condition] = {
    "one process": Condition(),
    '`precision="bf16-mixed"`': Condition(settings=with_(precision="bf16-mixed")),
    '`precision="bf16-true"`': Condition(settings=with_(precision="bf16-true")),
    '`precision="16-mixed"`': Condition(settings=lambda lr: {"plugins": [MixedPrecision("16-mixed", "cpu")]}),
    '`precision="64-true"`': Condition(settings=with_(precision="64-true")),
    "`torch.compile` of a submodule": Condition(modules.CompiledInPart, with_(max_epochs=1)),
    "`torch.compile` of the module": Condition(modules.LogsLater, with_(max_epochs=1), compiled),
    "`accumulate_grad_batches`": Condition(settings=with_(accumulate_grad_batches=2)),
    "LBFGS": Condition(modules.LBFGS),
    "manual optimization, two optimizers": Condition(modules.Manual),
    "activation checkpointing": Condition(modules.Recomputed),
    "activation checkpointing, reentrant": Condition(modules.RecomputedReentrantly),
    "iterable data": Condition(fit=from_streams),
    "`max_steps`": Condition(settings=with_(max_steps=5, max_epochs=None)),
    "`max_epochs=-1`": Condition(settings=with_(max_steps=5, max_epochs=-1)),
    "`val_check_interval`": Condition(settings=with_(val_check_interval=1)),
    "search for the learning rate": Condition(fit=after_search_for_rate),
    "search for the batch size": Condition(Sized, fit=after_search_for_size),
    "`StochasticWeightAveraging`": Condition(settings=AVERAGE),
    "`WeightAveraging`": Condition(settings=beside(lambda lr: WeightAveraging())),
    "`EMAWeightAveraging`": Condition(settings=beside(lambda lr: EMAWeightAveraging())),
    "`ModelPruning`": Condition(settings=beside(lambda lr: ModelPruning("l1_unstructured", amount=0.25))),
    "quantization-aware training": Condition(modules.Quantized),
    "LoRA by `peft`": Condition(modules.LoRA),
    "two fits of a module": Condition(fit=twice),
    "two callbacks of a class": Condition(copies=2),
}
# each callback alone, in processes that a script starts
TWO_PROCESSES: dict[str, Condition] = {
    "DDP, started by a script": Condition(settings=with_(devices=2, strategy="ddp")),
    "FSDP2": Condition(modules.ShardedByData, sharded(2, 1)),
    "tensor parallelism": Condition(modules.ShardedByTensor, sharded(1, 2)),
}
# all callbacks in one run
TOGETHER: dict[str, Condition] = {
    "DDP, forked": Condition(settings=with_(devices=2, strategy="ddp_fork")),
    "DDP, spawned": Condition(settings=with_(devices=2, strategy="ddp_spawn")),
}
