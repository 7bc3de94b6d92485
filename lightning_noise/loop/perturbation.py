"""Perturbations of a batch, as context managers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Context", "Perturbation"]


@dataclass(frozen=True)
class Context:
    """The trainer and module for which a batch is perturbed.

    Attributes:
        trainer: The trainer.
        module: The module that will see the batch.
        is_probe: Whether a monitor evaluates the batch, which is then held-out data and not a training batch.
        is_logged: Whether the statistics of the perturbation will be logged.
        positions: Gives the positions in the data set of an input of held-out data, by its path and number of rows.
    """

    trainer: Trainer
    module: LightningModule
    is_probe: bool = False
    is_logged: bool = False
    positions: Callable[[Any, int], Sequence[int]] | None = None


class Perturbation(AbstractContextManager[Any]):
    """A context manager that yields a noisy batch and undoes other changes.

    Args:
        body: A generator function of the perturbation. It yields the batch once and undoes other changes in ``finally``.

    Attributes:
        stats: The statistics to log, by the last part of their log keys.
        effective: Whether anything was changed, or ``None`` if not known.

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
        self._manager = _run(body, self)

    def __enter__(self) -> Any:
        return self._manager.__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        return self._manager.__exit__(*exception)


@contextmanager
def _run(body: Callable[[Perturbation], Iterator[Any]], perturbation: Perturbation) -> Iterator[Any]:
    return body(perturbation)
