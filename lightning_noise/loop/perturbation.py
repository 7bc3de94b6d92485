"""Perturbations: batches that are noisy for a while, and the context in which they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Context", "Perturbation"]


@dataclass(frozen=True)
class Context:
    """Where a batch is perturbed.

    Attributes:
        trainer: The trainer.
        module: The module that will see the batch.
        is_probe: Whether the batch is held-out data that a monitor evaluates, and not the batch of a training step.
        is_logged: Whether the statistics of the perturbation will be logged.
    """

    trainer: Trainer
    module: LightningModule
    is_probe: bool = False
    is_logged: bool = False


class Perturbation(AbstractContextManager[Any]):
    """A context manager that yields the noisy batch, and in the end undoes whatever else was changed.

    Args:
        body: A generator function that takes the perturbation, yields the batch once and undoes its changes in ``finally``.

    Attributes:
        stats: What is to be logged of the batch, by the last part of its key.
        effective: Whether anything was changed; ``None`` if that is not known yet.

    Example:
        >>> def doubled(perturbation):
        ...     perturbation.stats["factor"] = 2.0
        ...     yield 2 * 21
        >>> perturbation = Perturbation(doubled)
        >>> with perturbation as batch:
        ...     print(batch, perturbation.stats)
        42 {'factor': 2.0}
    """

    def __init__(self, body: Callable[[Perturbation], Iterator[Any]]):
        self.stats: dict[str, float | Tensor] = {}
        self.effective: bool | None = None
        self._manager = contextmanager(body)(self)

    def __enter__(self) -> Any:
        return self._manager.__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        return self._manager.__exit__(*exception)
