"""Progress of a training run, in steps, epochs and fractions."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from lightning_noise.loop.internals import batches_that_stepped, is_fast_dev_run, last_epoch_that_trains
from lightning_noise.schedules import Progress

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["check_validation", "logging_step", "outline", "progress_at", "run_seed"]


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


def check_validation(trainer: Trainer, name: str, every_n_epochs: int = 1) -> None:
    """Raises a ValueError if a fit has no validation in which the monitor of this name is due."""
    if not trainer.enable_validation:
        raise ValueError(f"{name} needs a validation: a val_dataloader, a validation_step and limit_val_batches above 0")
    every = math.lcm(every_n_epochs, trainer.check_val_every_n_epoch or 1)
    if 0 < (trainer.max_epochs or 0) < every and not is_fast_dev_run(trainer):
        what = "no validation" if every_n_epochs == 1 else f"every_n_epochs={every_n_epochs} never"
        raise ValueError(
            f"{what} comes in a run of {trainer.max_epochs} epochs with check_val_every_n_epoch="
            f"{trainer.check_val_every_n_epoch}, but {name} needs a validation"
        )


def logging_step(trainer: Trainer) -> int:
    """Returns the step of log entries: batches, not optimizer steps."""
    return batches_that_stepped(trainer)


def run_seed() -> int:
    """Returns the seed that ``seed_everything`` was called with, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
