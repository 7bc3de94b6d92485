"""The engine: a model evaluated on held-out data, without noise and under each condition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.positions import SamplePositions, groups_of
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.loop.perturbation import Context, Perturbation

__all__ = ["Conditions", "Pass", "Reading", "try_conditions"]


class Conditions(Protocol):
    """The conditions under which a batch is evaluated."""

    def perturbations(
        self, context: Context, batch: Any, batch_idx: int, positions: range
    ) -> Iterable[tuple[Condition, Perturbation]]:
        """Returns a perturbation of the batch for each condition with noise.

        Args:
            context: Where the batch is evaluated.
            batch: The batch.
            batch_idx: Its index.
            positions: The position in the data set of each row.
        """
        ...


class Reading(NamedTuple):
    """What was seen of a batch under a condition. Rows that a sampler repeats are left out of all tensors.

    Attributes:
        condition: The condition.
        batch: The batch as the module saw it, with all rows.
        preds: The predictions, as the task reads them.
        target: The target, as the task reads it.
        groups: The group of each sample, of shape (B,).
    """

    condition: Condition
    batch: Any
    preds: Any
    target: Tensor
    groups: Tensor


class Pass:
    """One pass over held-out data.

    Args:
        predictor: How predictions are read.
        max_batches: How many batches of each process are evaluated. Default: all.
        dataloader_idx: Which of several loaders is evaluated.
    """

    def __init__(self, predictor: Predictor, *, max_batches: int | None = None, dataloader_idx: int = 0):
        self.predictor = predictor
        self.max_batches = math.inf if max_batches is None else max_batches
        self.dataloader_idx = dataloader_idx
        self._positions = SamplePositions()

    def read(
        self, context: Context, batch: Any, batch_idx: int, dataloader_idx: int, conditions: Conditions
    ) -> Iterator[Reading]:
        """Yields a reading of the batch without noise and under each condition, if the batch is to be evaluated."""
        if dataloader_idx != self.dataloader_idx or batch_idx >= self.max_batches:
            return
        paths, target = self.predictor.locate(batch)
        positions, counted = self._positions.take(context.trainer, dataloader_idx, batch_idx, rows=len(target))
        groups = groups_of(positions, target.device)[:counted]
        perturbations = conditions.perturbations(context, batch, batch_idx, positions)
        for condition, perturbation in chain([(CLEAN, unperturbed(batch))], perturbations):
            seen, preds, labels = self.predictor(context, perturbation, paths, target)
            if condition == CLEAN and self.predictor.labelled:
                self.predictor.task.check(target, preds)
            yield Reading(condition, seen, preds[:counted], labels[:counted], groups)


def try_conditions(predictor: Predictor, context: Context, batch: Any, conditions: Conditions) -> None:
    """Raises the error that an evaluation of such a batch will raise."""
    paths, target = predictor.locate(batch)
    perturbations = conditions.perturbations(context, batch, 0, range(len(target)))
    for _, perturbation in chain([(CLEAN, unperturbed(batch))], perturbations):
        _, preds, _ = predictor(context, perturbation, paths, target)
        if predictor.labelled:
            predictor.task.check(target, preds)


def unperturbed(batch: Any) -> Perturbation:
    """Returns the perturbation that changes nothing."""
    return Perturbation(partial(_yield, batch))


def _yield(batch: Any, perturbation: Perturbation) -> Iterator[Any]:
    yield batch
