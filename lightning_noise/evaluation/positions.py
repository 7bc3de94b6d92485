"""Held-out data: the place of each row, so that it has a draw and a group of its own, and when it is measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_noise.loop.internals import class_of_callbacks, evaluation_loaders, is_fast_dev_run, launches_copies
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = [
    "N_GROUPS",
    "SamplePositions",
    "check_name",
    "check_pipe",
    "check_validation",
    "groups_of",
    "is_due",
    "seen_by_all",
]

T = TypeVar("T")
_GROUPS = Key(("groups of samples",))
_BATCH = 2**32  # more rows than a batch has
_KEYS_IN_PIPE = 170
N_GROUPS = 20  # of which intervals are computed


class SamplePositions:
    """Counts the rows of a loader and gives each its place.

    Samplers deal the samples out to the processes in turn, and a distributed sampler repeats some so that all processes get
    equally many. The repetitions come last and are no samples to be counted.
    """

    def __init__(self):
        self.seen = 0  # rows of this process

    def take(self, trainer: Trainer, dataloader_idx: int, batch_idx: int, rows: int) -> tuple[range, int]:
        """Returns the places of the rows of the next batch, and how many of these rows, from the first, count."""
        loaders = evaluation_loaders(trainer)
        loader = None if loaders is None else loaders[dataloader_idx]
        sampler = _distributed_sampler(loader)
        rank, replicas = _share(trainer, loader, sampler)
        if isinstance(loader, DataLoader) and loader.batch_sampler is None:  # the data set is one of batches
            place = batch_idx * replicas + rank
            padding = sampler is not None and place >= len(sampler.dataset)  # type: ignore[arg-type]
            return range(place * _BATCH, place * _BATCH + rows), 0 if padding else rows
        first = self.seen * replicas + rank
        positions = range(first, first + rows * replicas, replicas)
        counted = rows
        if sampler is not None and rows == _samples_of_batch(loader, sampler, self.seen):  # a row is a sample
            counted = len(range(first, min(positions.stop, len(sampler.dataset)), replicas))  # type: ignore[arg-type]
        self.seen += rows
        return positions, counted


def check_name(trainer: Trainer, monitor: Any) -> None:
    """Raises a ValueError where another monitor of its kind has the name."""
    names = [callback.name for callback in class_of_callbacks(trainer, type(monitor))]
    if names.count(monitor.name) > 1:
        raise ValueError(f"two monitors are named {monitor.name!r}, and their keys would mix; give one of them another name=…")


def is_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Returns whether this validation or test is one to measure in, as the sanity check is not."""
    skipped = trainer.state.fn == "fit" and (trainer.current_epoch + 1) % every_n_epochs != 0
    return not trainer.sanity_checking and not skipped


def seen_by_all(trainer: Trainer, measured: T | None, who: str) -> T:
    """Returns what was measured, or raises a ValueError on all processes where one of them saw no batch.

    Else some would wait for those that raise.
    """
    seen = torch.tensor(float(measured is not None), device=trainer.strategy.root_device)
    seen = trainer.strategy.reduce(seen, reduce_op="sum")
    if measured is None or seen < trainer.world_size:
        raise ValueError(f"{who} measures on all processes, but one of them saw no batch")
    return measured


def check_validation(trainer: Trainer, monitor: str, every_n_epochs: int) -> None:
    """Raises a ValueError where a fit has no validation in which the monitor could measure."""
    if not trainer.enable_validation:
        raise ValueError(f"{monitor} needs a validation: a val_dataloader, a validation_step and limit_val_batches above 0")
    every = math.lcm(every_n_epochs, trainer.check_val_every_n_epoch or 1)
    if 0 < (trainer.max_epochs or 0) < every and not is_fast_dev_run(trainer):
        what = "no validation" if every_n_epochs == 1 else f"every_n_epochs={every_n_epochs} never"
        raise ValueError(
            f"{what} comes in a run of {trainer.max_epochs} epochs with check_val_every_n_epoch="
            f"{trainer.check_val_every_n_epoch}, but {monitor} needs one"
        )


def check_pipe(trainer: Trainer, n_keys: int) -> None:
    """Raises a ValueError where so many keys would block the end of a run for ever.

    Processes that the main one starts as copies of itself hand it all keys through one pipe, which it empties after they have
    ended; it holds 64 KiB, and Lightning needs up to 370 bytes for a key.
    """
    if launches_copies(trainer) and n_keys > _KEYS_IN_PIPE:
        raise ValueError(
            f"with strategies that spawn or fork, Lightning hands keys to the main process through a pipe that holds about "
            f"{_KEYS_IN_PIPE}, and waits for ever where there are more, but the monitors log {n_keys}; use strategy='ddp', or "
            "fewer noises and levels"
        )


def groups_of(positions: range, device: torch.device) -> Tensor:
    """Returns the group of each sample, which depends on its place in the data set alone."""
    places = torch.arange(positions.start, positions.stop, positions.step, device=device)
    return (_GROUPS.uniform(places, (len(places),)) * N_GROUPS).long()


def _distributed_sampler(loader: Any) -> DistributedSampler | None:
    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _share(trainer: Trainer, loader: Any, sampler: DistributedSampler | None) -> tuple[int, int]:
    """Which share of the data this process sees, and of how many."""
    if sampler is not None:
        return sampler.rank, sampler.num_replicas
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler | RandomSampler):
        return 0, 1  # each process sees all
    return trainer.global_rank, trainer.world_size


def _samples_of_batch(loader: Any, sampler: DistributedSampler, seen: int) -> float:
    size = getattr(loader.batch_sampler, "batch_size", None)
    return math.nan if size is None else min(size, sampler.num_samples - seen)
