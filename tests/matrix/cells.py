"""What must hold in a cell: for a callback or monitor under a condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from helpers import assert_same, make_trainer, weights
from torch import Tensor

from lightning_noise.perturb.sharding import coordinates_of_shard, local
from matrix.columns import MONITORS, NOISES
from matrix.conditions import N_HELD_OUT, Condition

LR, LEVEL = 0.1, 0.5
OUTPUTS = (
    "cannot work with tensor parallelism, in which a rank may hold a part of an output; "
    "type ModelParallelStrategy(tensor_parallel_size=1), or perturb inputs or weights"
)
# the whole error of each cell that does not work, by condition and callback
REFUSED = {
    ("two callbacks of a class", "LabelSmoothing"): (
        "ValueError: 'smoothing' and 'second' both smooth the labels of one target; "
        "type a single LabelSmoothing(…), or target=… if each has a target of its own"
    ),
    ("tensor parallelism", "ActivationNoise"): f"ValueError: 'activation' {OUTPUTS}",
    ("tensor parallelism", "EmbeddingNoise"): f"ValueError: 'embedding' {OUTPUTS}",
}


class Log(pl.Callback):
    """Keeps what was logged until the end of each batch and of each validation."""

    def __init__(self):
        self.kept: list[dict[str, float]] = []

    def keep(self, trainer: pl.Trainer) -> None:
        self.kept.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.keep(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(trainer)


class Run(NamedTuple):
    weights: list[Tensor]  # and buffers; what this rank has of them
    parameters: list[Tensor]  # alone
    whole: list[Tensor]  # the weights that each rank has whole
    logged: list[dict[str, float]]
    found: Any  # by a search


def run(condition: Condition, callbacks: Sequence[pl.Callback], lr: float = LR) -> Run:
    pl.seed_everything(0, verbose=False)
    module, settings = condition.module(lr), condition.settings(lr)
    log = Log()
    with TemporaryDirectory() as folder:
        trainer = make_trainer([*callbacks, *settings.pop("callbacks", []), log], default_root_dir=folder, **settings)
        found = condition.fit(trainer, module)
    log.keep(trainer)  # what processes that were started return
    parts, parameters = weights(module), [p.detach() for p in module.parameters()]
    whole = [local(w) for w in parts if not coordinates_of_shard(w)]
    return Run([*map(local, parts)], [*map(local, parameters)], whole, log.kept, found)


@cache
def run_without(condition: Condition, lr: float = LR) -> Run:
    return run(condition, [], lr)


def assert_unchanged(condition: Condition, callbacks: Sequence[pl.Callback]) -> Run:
    """The run is bit for bit the run without callbacks, in its weights, in what it logs, and in what a search finds."""
    with_, without = run(condition, callbacks), run_without(condition)
    assert_same(with_.weights, without.weights)
    for ours, theirs in zip(with_.logged, without.logged, strict=True):
        assert ours.items() >= theirs.items()
    assert with_.found == without.found
    return with_


def assert_perturbed(condition: Condition, make: Any) -> None:
    """The noise has changed the run, but neither a search nor parameters that do not learn; observers may see the noise."""
    noisy, without = run(condition, make(LEVEL)), run_without(condition)
    assert not all(torch.equal(one, two) for one, two in zip(noisy.weights, without.weights, strict=True))
    assert all(w.isfinite().all() for w in noisy.weights)
    assert all(math.isfinite(value) for logged in noisy.logged for value in logged.values())
    assert noisy.found == without.found
    assert_same(run(condition, make(LEVEL), lr=0.0).parameters, run_without(condition, lr=0.0).parameters)
    if torch.distributed.is_initialized():  # the weights that each rank has whole are the same on both
        for w in noisy.whole:
            both = [torch.empty_like(w), torch.empty_like(w)]
            torch.distributed.all_gather(both, w)
            assert torch.equal(*both)


def check(condition: Condition, column: str) -> None:
    names = [{}, {"name": "second"}][: condition.copies]
    if column in MONITORS:
        monitors = [MONITORS[column](**name) for name in names]
        measured = assert_unchanged(condition, monitors)
        assert measured.logged[-1].keys() > run_without(condition).logged[-1].keys()
        assert column != "RobustnessMonitor" or all(each.report.n == N_HELD_OUT for each in monitors)
        assert column != "RandomizedSmoothing" or all(each.result.n == N_HELD_OUT for each in monitors)
        return

    def make(level: float) -> list[pl.Callback]:
        return [NOISES[column](level, **name) for name in names]

    assert_unchanged(condition, make(0.0))
    assert_perturbed(condition, make)


def outcome(condition: Condition, column: str) -> str:
    """Returns "works", or the error."""
    try:
        check(condition, column)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"
