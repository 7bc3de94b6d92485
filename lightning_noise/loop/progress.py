"""Progress of a training run, in steps, epochs and fractions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lightning_noise.loop.internals import (
    LIGHTNING,
    batches_that_stepped,
    class_of_callbacks,
    epochs_before_averaging,
    is_fast_dev_run,
    steps_taken,
)
from lightning_noise.schedules import Progress

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["KEY", "Clock", "check_held_out_data", "check_validation", "ends_run", "is_stopped", "logging_step", "run_seed"]

KEY = "lightning_noise"  # in a checkpoint


class Clock:
    """The progress of a run, in which an epoch has as many batches as the loader says or as the last epoch had.

    Attributes:
        length: The number of batches of the last epoch if the loader has no length, or ended before its length. Else ``None``.
    """

    def __init__(self):
        self.length: int | None = None
        self._timers: list[Any] = []
        self._averages_after = math.inf  # epochs

    def start(self, trainer: Trainer) -> None:
        """Notes at the start of a training what ends the run, beside the limits of the trainer."""
        self._timers = class_of_callbacks(trainer, tuple(namespace.callbacks.Timer for namespace in LIGHTNING))
        self._averages_after = epochs_before_averaging(trainer)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Adds the length to a checkpoint, unless the loader tells it."""
        if self.length is not None:
            checkpoint.setdefault(KEY, {})["epoch_length"] = self.length

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self.length = checkpoint.get(KEY, {}).get("epoch_length")

    def progress(self, trainer: Trainer, batch_idx: int) -> Progress:
        """Returns the progress before a training batch of this epoch. What is not known is no part of the fraction."""
        shares = []
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if self._timers and (share := self._share_of_time(trainer)) is not None:
            shares.append(share)
        length = min(trainer.num_training_batches, math.inf if self.length is None else self.length)
        if (epochs := self._epochs(trainer)) > 0 and length < math.inf:
            shares.append((trainer.current_epoch + min(batch_idx / length, 1.0)) / epochs)
        return Progress(steps_taken(trainer), trainer.current_epoch, min(max(shares), 1.0) if shares else None)

    def outline(self, trainer: Trainer) -> list[Progress]:
        """Returns the start of the run, and a hundred later moments if the end is known."""
        now = self.progress(trainer, 0)
        shares = [i / 100 for i in range(101)]
        if now.fraction is None:
            return [now]
        if (steps := self.total_steps(trainer)) is None:  # the epochs of these moments are not known
            steps = max(trainer.max_steps, 0)
            return [now, *(now._replace(fraction=share, step=max(now.step, int(share * steps))) for share in shares)]
        return list(self.moments(trainer, [int((steps - 1) * share) for share in shares]))

    def moments(self, trainer: Trainer, taken: Iterable[int]) -> Iterator[Progress]:
        """Yields the progress before some of the :meth:`total_steps`, which must be known."""
        steps: Any = self.total_steps(trainer)
        batches, per_step = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        for step in taken:
            yield Progress(step, step * per_step // batches, step / steps)

    def total_steps(self, trainer: Trainer) -> int | None:
        """Returns the steps of the whole run, or ``None`` if they, or the length of an epoch, are not known."""
        steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        if not (0 < steps < math.inf and batches < math.inf):
            return None
        if (epochs := self._epochs(trainer)) > 0:
            steps = min(steps, epochs * math.ceil(batches / trainer.accumulate_grad_batches))
        return int(steps)

    def end_epoch(self, trainer: Trainer, batch_idx: int) -> tuple[Progress, Progress]:
        """Notes the length of an epoch, and returns the progress without and with this knowledge."""
        # a step may have fetched several batches, and a batch that is None has no step
        batches = max(batch_idx, trainer.fit_loop.epoch_loop.batch_idx) + 1
        before = self.progress(trainer, batches)
        self.length = None if batches == trainer.num_training_batches else batches
        epochs = self._epochs(trainer)
        share = min((trainer.current_epoch + 1) / epochs, 1.0) if epochs > 0 else None
        known = [share for share in (before.fraction, share) if share is not None]
        return before, before._replace(fraction=max(known, default=None))

    def _epochs(self, trainer: Trainer) -> float:
        """Returns the number of epochs that train, or at most 0 if there is no limit."""
        return min(trainer.max_epochs or 0, self._averages_after)

    def _share_of_time(self, trainer: Trainer) -> float | None:
        """Returns the share of ``max_time`` that is over, the same on all ranks, or ``None`` without such a limit.

        The share is in thousandths, so that a limit far away leaves the level to the other clocks.
        """
        times = [(timer.time_elapsed(), left) for timer in self._timers if (left := timer.time_remaining()) is not None]
        if not times:
            return None
        share = max(elapsed / (elapsed + left) for elapsed, left in times)
        return trainer.strategy.broadcast(math.floor(1000 * share) / 1000)


def is_stopped(trainer: Trainer) -> bool:
    """Returns whether an epoch ends for another reason than the end of its data."""
    return trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step


def ends_run(trainer: Trainer) -> bool:
    """Returns whether a validation is known to be the last, after the last batch of the run."""
    is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return (trainer.is_last_batch and is_last_epoch) or 0 < trainer.max_steps <= trainer.global_step


def check_validation(trainer: Trainer, name: str, every_n_epochs: int = 1) -> None:
    """Raises a ValueError if a fit has no validation in which the monitor of this name is due."""
    if not trainer.enable_validation:
        raise ValueError(f"{name} needs a validation: a val_dataloader, a validation_step and limit_val_batches above 0")
    every = math.lcm(every_n_epochs, trainer.check_val_every_n_epoch or 1)
    if 0 < (trainer.max_epochs or 0) < every and not is_fast_dev_run(trainer):
        place = "" if every_n_epochs == 1 else f" at every_n_epochs={every_n_epochs}"
        advice = "Trainer(check_val_every_n_epoch=1)" if every_n_epochs == 1 else "every_n_epochs=1"
        raise ValueError(
            f"a run of max_epochs={trainer.max_epochs} with check_val_every_n_epoch={trainer.check_val_every_n_epoch} has no "
            f"validation{place}, but {name} needs one; type {advice}"
        )


def check_held_out_data(trainer: Trainer, name: str) -> None:
    """Raises a ValueError if the loaders of the validation are empty. A validation that comes late has none yet."""
    if trainer.num_val_batches and not any(trainer.num_val_batches):
        raise ValueError(f"{name} needs held-out data, but the validation has no batch; give val_dataloaders with data")


def logging_step(trainer: Trainer) -> int:
    """Returns the step of log entries: batches, not optimizer steps."""
    return batches_that_stepped(trainer)


def run_seed() -> int:
    """Returns the seed that ``seed_everything`` was called with, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
