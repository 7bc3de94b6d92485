"""A trial on held-out data before the first training step, for runs without a sanity check."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_noise.loop.internals import evaluation_loaders, first_batch, set_up_validation, to_device
from lightning_noise.loop.snapshot import State, restore_trainer

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["held_out_batches"]

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_CONTAINERS = (list, dict, set, deque, Counter)
_SHARED = (type, FunctionType, ModuleType, Iterator, Tensor, nn.Module)
_SHORT = 100  # a container of more holds data


@contextmanager
def held_out_batches(trainer: Trainer, dataloader_idx: int) -> Iterator[list[Any]]:
    """Yields the first batch of a validation loader, in the stage of a sanity check, and undoes all that is done meanwhile.

    The list is empty if the batch cannot be fetched without side effects: from a stream, which cannot be read again, or if the
    user's code raises an error, which the validation will raise as well. Writes of a data set or sampler to arrays and to
    containers within containers stay.
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
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return []
        with _undone(loader):
            return [to_device(trainer, first_batch(loader), dataloader_idx)]
    except Exception:
        return []


@contextmanager
def _undone(loader: DataLoader) -> Iterator[None]:
    """Lets a loader and the objects that it holds, such as samplers and transforms, change copies of what they remember."""
    before = [(vars(owner), dict(vars(owner))) for owner in _owners(loader)]
    try:
        for attributes, values in before:
            attributes.update({name: _copy(value) for name, value in values.items()})
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)


def _owners(loader: DataLoader) -> list[Any]:
    """Returns the loader and all objects that it holds, also in short containers, but no iterators, tensors and modules."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [loader]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list | tuple | dict) and len(part) <= _SHORT:
            waiting += part.values() if isinstance(part, dict) else part
        elif hasattr(part, "__dict__") and not isinstance(part, _SHARED) and id(part) not in found:
            found[id(part)] = part
            waiting += vars(part).values()
    return list(found.values())


def _copy(value: Any) -> Any:
    """Returns a copy of a generator or container; an object remembers all else by a new value."""
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    return copy.copy(value) if type(value) in _CONTAINERS else value
