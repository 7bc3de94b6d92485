"""What hooks and callbacks set on a module before a step."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_noise.loop.internals import count_writes
from lightning_noise.loop.side_effects import is_written
from lightning_noise.loop.snapshot import Change, clone, find_contents

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["Watch"]


class Watch:
    """Watches what is set on a module, from :meth:`begin` to :meth:`end`."""

    def __init__(self):
        self._before: dict[int, tuple[Any, Any]] = {}
        self._marks: dict[int, tuple[Any, Any]] = {}  # with the values, so that Python does not give their ids again

    def begin(self, module: LightningModule) -> None:
        """Notes what the module holds."""
        contents = find_contents([module])
        self._before = {id(container): (container, held) for container, held in contents}
        values = [value for _, held in contents if isinstance(held, dict) for value in held.values()]
        self._marks = {id(value): (value, _mark(value)) for value in values if is_written(value)}

    def end(self, module: LightningModule) -> list[Change]:
        """Returns what has changed since :meth:`begin`."""
        changes = [self._compare(container, held) for container, held in find_contents([module])]
        self._before, self._marks = {}, {}
        return [change for change in changes if change is not None]

    def _compare(self, container: Any, now: Any) -> Change | None:
        _, before = self._before.get(id(container), (None, None))
        if before is None:
            return Change(container, now, None)
        if not isinstance(now, dict):
            n = len(before)
            is_longer = len(now) >= n and all(one is two for one, two in zip(before, now, strict=False))
            if is_longer and len(now) == n:
                return None
            return Change(container, now[n:]) if is_longer else Change(container, now, None)
        new = {key: value for key, value in now.items() if key not in before or before[key] is not value or self._is_new(value)}
        removed = before.keys() - now.keys()
        return Change(container, new, removed) if new or removed else None

    def _is_new(self, value: Any) -> bool:
        if id(value) not in self._marks:
            return False
        mark, now = self._marks[id(value)][1], _mark(value)
        return not torch.equal(mark, now) if isinstance(mark, Tensor) else mark != now


def _mark(value: Any) -> Any:
    """Returns what differs after a write to the value."""
    if isinstance(value, Tensor):
        return clone(value) if value.is_inference() else count_writes(value)
    return pickle.dumps(value)
