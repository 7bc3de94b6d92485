"""The evaluation of a model on held-out data, without noise and under each condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_noise._tensor import column
from lightning_noise.evaluation.arguments import Arguments
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.positions import SamplePositions, fingerprint, groups_of, is_dealt
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.loop.side_effects import SideEffects

__all__ = ["Pass", "Perturb", "Reading"]

Perturb = Callable[[Context, Any, range], Iterable[tuple[Condition, Perturbation]]]
"""Returns a perturbation of a batch for each condition with noise, from context, batch and the positions of the rows."""


class Reading(NamedTuple):
    """What was seen of a batch under a condition. All tensors lack the rows that a sampler repeats.

    If some positions of the target do not count, ``preds`` has the shape (N, K) or (N,), and ``target`` and ``groups`` have the
    shape (N,), for the N positions that count.

    Attributes:
        condition: The condition.
        batch: The batch as the module saw it, with all rows.
        outputs: The predictions of all positions, as the task reads them.
        preds: The predictions that count.
        target: The target that counts, as the task reads it.
        groups: The group of each row of ``target``.
        samples: The group of each sample of which a position counts.
        classes: What chance depends on, if the task says so; see :meth:`~lightning_noise.tasks.Task.classes`.
    """

    condition: Condition
    batch: Any
    outputs: Any
    preds: Any
    target: Tensor
    groups: Tensor
    samples: Tensor
    classes: Tensor | None


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
        self.samples = torch.zeros(())  # their fingerprint, if other ranks may have seen the same
        self._positions = SamplePositions()
        self._has_checked_outputs = False
        self._side_effects = SideEffects()

    def read(self, context: Context, batch: Any, batch_idx: int, dataloader_idx: int, perturb: Perturb) -> Iterator[Reading]:
        """Yields a reading of the batch without noise, then one under each condition. Other loaders yield nothing."""
        if dataloader_idx != self.dataloader_idx or batch_idx >= self.max_batches:
            return
        arguments, target = self.predictor.locate(context.module, batch)
        positions, n = self._positions.take(context.trainer, dataloader_idx, batch_idx, rows=len(target))
        if not is_dealt(context.trainer, dataloader_idx):
            self.samples = self.samples.to(target.device) + fingerprint(batch).to(target.device)
        counts = self.predictor.task.counts(target[:n]) if self.predictor.labelled else None
        groups = samples = groups_of(positions, target.device)[:n]
        if counts is not None:
            groups, samples = column(groups, counts).expand_as(counts)[counts], groups[counts.reshape(n, -1).any(1)]
        self._side_effects.begin(context.trainer, context.module)
        probing = replace(context, positions=self._positions.of_input)
        clean, same = None, dict[str, bool]()  # for each noise, whether no prediction has changed
        for condition, perturbation in chain([(CLEAN, nullcontext(batch))], perturb(probing, batch, positions)):
            seen, outputs, labels = self.predictor(context, perturbation, arguments, target, self._side_effects)
            self.predictor.check_reach(arguments, batch, seen)
            outputs, labels = outputs[:n], labels[:n]
            preds = outputs if counts is None else _counted(outputs, counts, has_classes=self.predictor.task.has_classes)
            counted = labels if counts is None else labels[counts]
            classes = None
            if condition == CLEAN:
                self._check(context, batch, arguments, preds, target[:n] if counts is None else target[:n][counts])
                classes = self.predictor.task.classes(labels)
                classes = classes if classes is None or counts is None else classes[counts]
                self.predictor.look(outputs, counted, classes)
                clean = outputs
            elif condition.level and not self.predictor.has_compared:
                same[condition.noise] = same.get(condition.noise, True) and _are_same(clean, outputs)
            yield Reading(condition, seen, outputs, preds, counted, groups, samples, classes)
        self.predictor.compare(same)

    def _check(self, context: Context, batch: Any, arguments: Arguments, preds: Any, target: Tensor) -> None:
        """Raises a ValueError if the values of a batch contradict the task; those of the outputs are checked once."""
        task = self.predictor.task
        if self.predictor.labelled:
            task.check(target, preds)
        if not self._has_checked_outputs and len(preds):
            task.check_outputs(preds, lambda: self.predictor.ends_in_squashing(context, batch, arguments, self._side_effects))
            self._has_checked_outputs = True


def _counted(outputs: Tensor, counts: Tensor, *, has_classes: bool) -> Tensor:
    """Returns the predictions at the positions that count: of shape (N, K) for classes, else of shape (N,)."""
    return (outputs.movedim(1, -1) if has_classes else outputs)[counts]


def _are_same(clean: Any, noisy: Any) -> bool:
    """Returns whether predictions that differ between samples are the same under noise, to the last bit."""
    return isinstance(clean, Tensor) and torch.equal(clean, noisy) and bool((clean != clean[:1]).any())
