"""Forward passes of held-out data without side effects on the module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_noise._tensor import detached, without_overrides
from lightning_noise.loop.internals import (
    copy_all_,
    count_writes,
    empty_results,
    exchange_evaluation_results,
    logged_so_far,
    return_to_rng_states,
    rng_states,
    state_of_run,
    wraps_tensors,
)
from lightning_noise.loop.snapshot import Contents, find_contents, is_shared, put, set_entry, views

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["SideEffects", "is_written"]

# Kernels such as batch normalization write their statistics without counting the write. Larger tensors are masks, caches and
# memories, whose copies would cost time.
_LARGE = 2**20  # bytes
_PLAIN = {int, float, bool, str, type(None), dict, list}


class SideEffects:
    """Undoes what forward passes change in a module, apart from its parameters, what they log, and what they draw.

    Attributes, containers and objects of the user's classes get their contents back. Tensors in attributes and buffers are
    written back from copies. A tensor of more than a megabyte is copied once, and again only after a write that torch counts.
    Tensors in lists and large arrays are shared with the forward pass, which must not write to them.
    """

    def __init__(self):
        self._contents: Contents = []
        self._views: list[Any] = []  # of what each container holds
        self._sizes: list[int] = []
        self._items: list[Any] = []  # in the views, to be compared by identity
        self._results: Any = None  # where the forward passes log
        self._private: list[tuple[dict, Any, Any]] = []  # small arrays and generators, of which a forward pass gets copies
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts: dict[int, int] = {}  # the writes to each large tensor

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Notes the state of the run, the module and the random streams, to which each forward pass of a batch returns."""
        self._rng = rng_states()
        run: Contents = [(vars(part), dict(vars(part))) for part in state_of_run(trainer)]
        self._contents = [*find_contents([module]), *run]
        self._views = [view for container, _ in self._contents for view in views(container)]
        self._sizes, self._items = list(map(len, self._views)), list(chain.from_iterable(self._views))
        held_by_key = [(container, held.items()) for container, held in self._contents[: -len(run)] if isinstance(held, dict)]
        values = [(container, key, value) for container, items in held_by_key for key, value in items if is_written(value)]
        self._private = [each for each in values if not isinstance(each[2], Tensor)]
        tensors = {id(value): value for _, _, value in values if isinstance(value, Tensor)}
        known, counts = self._copies, self._counts
        self._counts = {key: count_writes(each) for key, each in tensors.items() if _is_large(each)}
        self._copies = {
            key: known[key] if key in counts and counts[key] == self._counts.get(key) else (each, detached(each).clone())
            for key, each in tensors.items()
        }

    @contextmanager
    def undone(self, trainer: Trainer) -> Iterator[None]:
        """Undoes what is changed in the body, which may be entered several times for a batch."""
        if self._results is None or self._results:  # the last forward pass has logged
            self._results = empty_results(trainer)
        before = exchange_evaluation_results(trainer, self._results, logged_so_far(trainer))
        try:
            for container, key, value in self._private:
                set_entry(container, key, copy.deepcopy(value))
            yield
        finally:
            exchange_evaluation_results(trainer, *before)
            self._undo()
            return_to_rng_states(self._rng)

    def _undo(self) -> None:
        is_resized = self._sizes != list(map(len, self._views))
        if is_resized or not all(map(is_, chain.from_iterable(self._views), self._items)):
            put(self._contents)
        written = [
            (key, *pair)
            for key, pair in self._copies.items()
            if key not in self._counts or self._counts[key] != count_writes(pair[0])
        ]
        with without_overrides():
            for _, tensor, copied in written:
                if Tensor.size(tensor) != Tensor.size(copied):  # observers are resized in their first forward pass
                    Tensor.resize_(tensor, Tensor.size(copied))
        plain = [tensor if type(tensor) is Tensor else detached(tensor) for _, tensor, _ in written]
        copy_all_(plain, [copied for _, _, copied in written])
        self._counts.update((key, count_writes(tensor)) for key, tensor, _ in written if key in self._counts)


def is_written(value: Any) -> bool:
    """Returns whether a forward pass may write to the value in place."""
    if type(value) in _PLAIN or is_shared(value):
        return False
    if isinstance(value, Tensor):  # an expanded tensor cannot be written to, and a wrapper of tensors has no memory of its own
        is_expanded = value.layout == torch.strided and 0 in value.stride() and value.numel() > 1
        return not is_expanded and not wraps_tensors(value)
    return not (isinstance(value, np.ndarray) and value.nbytes > _LARGE)


def _is_large(tensor: Tensor) -> bool:
    return not tensor.is_inference() and tensor.numel() * tensor.element_size() > _LARGE
