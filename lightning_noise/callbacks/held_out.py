"""Where the rows of a held-out batch stand in the data set, so that each has a draw of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Places"]

_BATCH = 2**32  # more rows than a batch has


class Places:
    """Counts the rows of a loader and gives each its place.

    Samplers deal the samples out to the processes in turn, and a distributed sampler repeats some so that all processes get
    equally many. The repetitions come last and are no samples to be counted.
    """

    def __init__(self):
        self.seen = 0  # rows of this process

    def take(self, trainer: Trainer, dataloader_idx: int, batch_idx: int, rows: int) -> tuple[range, int]:
        """Returns the places of the rows of the next batch, and how many of these rows, from the first, count."""
        # not `trainer.val_dataloaders`, which in `trainer.validate` still names the loaders of an earlier fit
        combined: Any = trainer._evaluation_loop._combined_loader
        loader = combined.flattened[dataloader_idx] if combined._mode == "sequential" else None
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
