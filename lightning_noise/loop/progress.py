"""Progress of a training run, in steps, epochs and fractions."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from lightning_noise.loop.internals import batches_that_stepped, last_epoch_that_trains
from lightning_noise.schedules import Progress

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["logging_step", "outline", "progress_at", "run_seed"]


def progress_at(trainer: Trainer, batch_idx: int) -> Progress:
    """Returns the progress before a training batch of this epoch.

    The fraction is the larger of the shares of ``max_steps`` and ``max_epochs``, or ``None`` if the run has neither.
    """
    fractions = []
    if trainer.max_steps is not None and trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    if (epochs := last_epoch_that_trains(trainer)) > 0:
        batches = trainer.num_training_batches
        within = batch_idx / batches if 0 < batches < math.inf else 0.0
        fractions.append((trainer.current_epoch + within) / epochs)
    return Progress(trainer.global_step, trainer.current_epoch, min(max(fractions), 1.0) if fractions else None)


def outline(trainer: Trainer) -> list[Progress]:
    """Returns the start of the run, and a hundred later steps if the end is known."""
    steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not (0 < steps < math.inf and 0 < batches < math.inf):
        return [progress_at(trainer, 0)]
    if (epochs := last_epoch_that_trains(trainer)) > 0:
        steps = min(steps, epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    moments = [int((steps - 1) * i / 100) for i in range(101)]
    return [Progress(step, int(step * trainer.accumulate_grad_batches // batches), step / steps) for step in moments]


def logging_step(trainer: Trainer) -> int:
    """Returns the step of log entries: batches, not optimizer steps."""
    return batches_that_stepped(trainer)


def run_seed() -> int:
    """Returns the seed that ``seed_everything`` was called with, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
