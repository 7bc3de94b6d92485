"""A trial on held-out data before the first training step, for runs without a sanity check."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_noise.loop.internals import evaluation_loaders, first_batch, set_up_validation, to_device
from lightning_noise.loop.snapshot import State, restore_trainer

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["held_out_batches"]

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


@contextmanager
def held_out_batches(trainer: Trainer, dataloader_idx: int) -> Iterator[list[Any]]:
    """Yields the first batch of a validation loader, in the stage of a sanity check, and undoes all that is done meanwhile.

    The list is empty if the batch cannot be fetched without side effects: from a stream, which cannot be read again, or if the
    user's code raises an error, which the validation will raise as well.
    """
    module, state, stage = trainer.lightning_module, State(trainer), trainer.state.stage
    with restore_trainer(trainer), state.entered(state.current()), torch.no_grad():
        try:
            trainer.sanity_checking = True
            set_up_validation(trainer)
            module.eval()
            yield _fetch(trainer, dataloader_idx)
        finally:
            trainer.state.stage = stage


def _fetch(trainer: Trainer, dataloader_idx: int) -> list[Any]:
    loaders = evaluation_loaders(trainer) or []
    loader = loaders[dataloader_idx] if dataloader_idx < len(loaders) else None
    try:
        if isinstance(loader, list | tuple):
            return [to_device(trainer, batch, dataloader_idx) for batch in loader[:1]]
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return []
        with _copied_generators(loader):
            return [to_device(trainer, first_batch(loader), dataloader_idx)]
    except Exception:
        return []


@contextmanager
def _copied_generators(loader: DataLoader) -> Iterator[None]:
    """Lets a loader, its samplers and its data set draw from copies of their generators."""
    owners: list[Any] = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    part: Any = loader.dataset
    while part is not None and part not in owners:
        owners.append(part)
        part = getattr(part, "dataset", None)
    held = [(vars(owner), name, value) for owner in owners if hasattr(owner, "__dict__") for name, value in vars(owner).items()]
    drawn = [(attributes, name, value) for attributes, name, value in held if isinstance(value, _GENERATORS)]
    try:
        for attributes, name, value in drawn:
            attributes[name] = copy.deepcopy(value)
        yield
    finally:
        for attributes, name, value in drawn:
            attributes[name] = value
