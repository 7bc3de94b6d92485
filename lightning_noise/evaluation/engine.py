"""The evaluation of a model on held-out data, without noise and under each condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.positions import SamplePositions, groups_of
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.loop.perturbation import Context, Perturbation

__all__ = ["Pass", "Perturb", "Reading"]

Perturb = Callable[[Context, Any, range], Iterable[tuple[Condition, Perturbation]]]
"""Returns a perturbation of a batch for each condition with noise, from context, batch and the positions of the rows."""


class Reading(NamedTuple):
    """What was seen of a batch under a condition. All tensors lack the rows that a sampler repeats.

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
        predictor: Predicts the target of a batch.
        max_batches: How many batches of each rank are evaluated. Default: all.
        dataloader_idx: Which of several loaders is evaluated.
    """

    def __init__(self, predictor: Predictor, *, max_batches: int | None = None, dataloader_idx: int = 0):
        self.predictor = predictor
        self.max_batches = math.inf if max_batches is None else max_batches
        self.dataloader_idx = dataloader_idx
        self._positions = SamplePositions()

    def read(self, context: Context, batch: Any, batch_idx: int, dataloader_idx: int, perturb: Perturb) -> Iterator[Reading]:
        """Yields a reading of the batch without noise, then one under each condition. Other loaders yield nothing."""
        if dataloader_idx != self.dataloader_idx or batch_idx >= self.max_batches:
            return
        paths, target = self.predictor.locate(batch)
        positions, counted = self._positions.take(context.trainer, dataloader_idx, batch_idx, rows=len(target))
        groups = groups_of(positions, target.device)[:counted]
        for condition, perturbation in chain([(CLEAN, nullcontext(batch))], perturb(context, batch, positions)):
            seen, preds, labels = self.predictor(context, perturbation, paths, target)
            if condition == CLEAN and self.predictor.labelled:
                self.predictor.task.check(target, preds)
            yield Reading(condition, seen, preds[:counted], labels[:counted], groups)
