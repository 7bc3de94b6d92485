"""Positions of held-out samples in their data set, which determine the noise and the group of each sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_noise._tensor import detached
from lightning_noise.batch import Path, leaves
from lightning_noise.loop.internals import evaluation_loaders, wraps_tensors
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = [
    "N_GROUPS",
    "SamplePositions",
    "are_copies",
    "check_parts",
    "check_ranks",
    "data_share",
    "fingerprint",
    "groups_of",
    "is_dealt",
    "sum_over_ranks",
]

N_GROUPS = 20  # the groups of the jackknife
_GROUPS = Key(("groups of samples",))
_BATCH = 2**32  # more rows than a batch has


class SamplePositions:
    """Gives each row of a loader its position in the data set.

    Samplers deal the samples out to the ranks in turn. A distributed sampler repeats some samples at the end, so that all ranks
    get equally many rows. The repeated rows do not count.

    If the batches of several loaders are combined, leaves may have different numbers of rows. So each input has positions of
    its own, which count its rows alone.
    """

    def __init__(self):
        self.seen = 0  # the rows of this rank so far
        self._seen: dict[Path, int] = {}  # the same for each input
        self._rows: dict[Path, int] = {}  # of each input of the current batch
        self._first: int | None = None  # the position of the first row, if the item of a data set is a batch
        self._rank, self._replicas = 0, 1

    def take(self, trainer: Trainer, dataloader_idx: int, batch_idx: int, rows: int) -> tuple[range, int]:
        """Returns the positions of the rows of the next batch, and how many of the first rows count."""
        self._seen.update({path: self._seen.get(path, 0) + n for path, n in self._rows.items()})
        self._rows = {}
        loader = _loader(trainer, dataloader_idx)
        sampler = _distributed_sampler(loader)
        self._first, (self._rank, self._replicas) = None, _share(trainer, loader, sampler)
        if isinstance(loader, DataLoader) and loader.batch_sampler is None:  # each item of the data set is a batch
            position = batch_idx * self._replicas + self._rank
            is_repeated = sampler is not None and position >= len(sampler.dataset)  # type: ignore[arg-type]
            self._first = position * _BATCH
            return self._place(0, rows), 0 if is_repeated else rows
        positions = self._place(self.seen, rows)
        counted = rows
        if sampler is not None and rows == _samples_of_batch(loader, sampler, self.seen):  # a row is a sample
            counted = len(range(positions.start, min(positions.stop, len(sampler.dataset)), self._replicas))  # type: ignore[arg-type]
        self.seen += rows
        return positions, counted

    def of_input(self, path: Path, rows: int) -> range:
        """Returns the positions of the rows of an input in the batch that was taken last."""
        self._rows[path] = rows
        return self._place(self._seen.get(path, 0), rows)

    def _place(self, seen: int, rows: int) -> range:
        if self._first is not None:
            return range(self._first, self._first + rows)
        return range(seen * self._replicas + self._rank, (seen + rows) * self._replicas + self._rank, self._replicas)


def check_ranks(trainer: Trainer, name: str, saw_batch: bool) -> None:
    """Raises a ValueError on all ranks if a rank saw no batch. Otherwise, the others would hang in the next collective."""
    if not trainer.strategy.reduce_boolean_decision(saw_batch):
        raise ValueError(
            f"{name} measures on all processes, but one of them saw no batch; let the held-out data "
            "yield at least one batch on each"
        )


def check_parts(trainer: Trainer, name: str, samples: Tensor, dataloader_idx: int) -> None:
    """Warns if all ranks saw the same samples, but at other positions, so that a sample is in several groups.

    Args:
        trainer: The trainer.
        name: The name of the monitor.
        samples: The sum of the :func:`fingerprint` of all batches.
        dataloader_idx: The loader of the samples.
    """
    # sums in another order round differently
    if are_copies(trainer, [samples.float()], dataloader_idx):
        n = trainer.world_size
        rank_zero_warn(
            f"{name} saw the same samples on all {n} processes, so its intervals are too narrow; let the data set of each "
            f"process yield another part, as by itertools.islice(samples, rank, None, {n})"
        )


def data_share(trainer: Trainer) -> tuple[int, int]:
    """Returns which share of the data this rank has, and the number of shares. Ranks of tensor parallelism share theirs."""
    share = trainer.distributed_sampler_kwargs
    return (0, 1) if share is None else (share["rank"], share["num_replicas"])


def sum_over_ranks(trainer: Trainer, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sums of tensors over the shares of the data, by one collective for each dtype."""
    if trainer.world_size == 1:
        return list(tensors)
    copies = trainer.world_size // data_share(trainer)[1]  # ranks that add the same numbers
    sums: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        index = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat: Any = trainer.strategy.reduce(torch.cat([tensors[i].flatten() for i in index]), reduce_op="sum")
        flat = flat / copies if dtype.is_floating_point else flat // copies
        sums.update(zip(index, flat.split([tensors[i].numel() for i in index]), strict=True))
    return [sums[i].view(tensor.shape) for i, tensor in enumerate(tensors)]


def are_copies(trainer: Trainer, sums: Sequence[Tensor], dataloader_idx: int) -> bool:
    """Returns whether all ranks hold equal sums because, without a distributed sampler, each has seen all samples.

    A data set that the user has split by hand has no distributed sampler either, but other sums on each rank.
    """
    if is_dealt(trainer, dataloader_idx):
        return False
    digest = hashlib.blake2b(b"".join(each.cpu().numpy().tobytes() for each in sums)).hexdigest()
    return trainer.strategy.reduce_boolean_decision(trainer.strategy.broadcast(digest) == digest)


def is_dealt(trainer: Trainer, dataloader_idx: int) -> bool:
    """Returns whether each rank has samples of its own for sure: it is the only one, or has a distributed sampler."""
    return trainer.world_size == 1 or _distributed_sampler(_loader(trainer, dataloader_idx)) is not None


def fingerprint(batch: Any) -> Tensor:
    """Returns a number that other samples would change, but neither another order of the samples nor another model.

    The outputs do not tell samples apart if the ranks have different statistics of a batch normalization.

    Example:
        >>> x = torch.arange(6.0).view(3, 2)
        >>> bool(fingerprint(x[:1]) + fingerprint(x[1:]) == fingerprint(x)), bool(fingerprint(x + 1) == fingerprint(x))
        (True, False)
    """
    total = torch.zeros((), dtype=torch.float64)
    for _, leaf in leaves(batch):
        if leaf.ndim and leaf.layout == torch.strided and not wraps_tensors(leaf):
            x = torch.view_as_real(detached(leaf).resolve_conj()) if leaf.is_complex() else detached(leaf)
            rows = (x.flatten(1) if x.ndim > 1 else x[:, None]).double().nan_to_num(0.0, 0.0, 0.0)
            weights = torch.arange(1, 1 + rows.shape[1], device=rows.device, dtype=rows.dtype).cos()
            total = total.to(rows.device) + (rows @ weights).cos().sum()
    return total


def groups_of(positions: range, device: torch.device) -> Tensor:
    """Returns the group of each sample, which depends on its position alone."""
    index = torch.arange(positions.start, positions.stop, positions.step, device=device)
    return (_GROUPS.uniform(index, (len(index),)) * N_GROUPS).long()


def _loader(trainer: Trainer, dataloader_idx: int) -> Any:
    loaders = evaluation_loaders(trainer)
    return None if loaders is None else loaders[dataloader_idx]


def _distributed_sampler(loader: Any) -> DistributedSampler | None:
    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _share(trainer: Trainer, loader: Any, sampler: DistributedSampler | None) -> tuple[int, int]:
    """Returns which share of the data this rank sees, and the number of shares."""
    if sampler is not None:
        return sampler.rank, sampler.num_replicas
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler | RandomSampler):
        return 0, 1  # each rank sees all data
    return data_share(trainer)


def _samples_of_batch(loader: Any, sampler: DistributedSampler, seen: int) -> float:
    size = getattr(loader.batch_sampler, "batch_size", None)
    return math.nan if size is None else min(size, sampler.num_samples - seen)
