"""Results of callbacks that come back from a process that a strategy spawned or forked.

Such a process works on a copy of each callback. Lightning returns the weights and the metrics to the main process, but nothing
of a callback, and calls no hook there. The two methods of its launcher that return the metrics return these results, too.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from abc import ABC, abstractmethod
from functools import wraps
from typing import TYPE_CHECKING, Any

from lightning_noise.loop.internals import class_of_callbacks, launcher_classes

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Returning"]

_KEY = "lightning_noise"  # among what the launcher returns


class Returning(ABC):
    """Interface of the callbacks whose results the main process receives."""

    name: str

    @abstractmethod
    def results(self) -> Any:
        """Returns what the main process should know at the end of a run, which must be picklable."""

    @abstractmethod
    def take_results(self, results: Any) -> None:
        """Takes the results of the same callback in another process."""

    @staticmethod
    def enable() -> None:
        """Prepares the launchers: in the main process before a run, and in a spawned process during the run."""
        for launcher in launcher_classes():
            if not hasattr(launcher.get_extra_results, "__wrapped__"):
                launcher.get_extra_results = _with_results(launcher.get_extra_results)
                launcher.update_main_process_results = _taking_results(launcher.update_main_process_results)


def _with_results(collect: Any) -> Any:
    @wraps(collect)
    def get_extra_results(launcher: Any, trainer: Trainer) -> dict[str, Any]:
        extra = collect(launcher, trainer)
        if callbacks := class_of_callbacks(trainer, Returning):
            # a file, because the pipe to the main process holds little
            with tempfile.NamedTemporaryFile(delete=False) as file:
                pickle.dump({_identity(callback): callback.results() for callback in callbacks}, file)
            extra[_KEY] = file.name
        return extra

    return get_extra_results


def _taking_results(update: Any) -> Any:
    @wraps(update)
    def update_main_process_results(launcher: Any, trainer: Trainer, extra: dict[str, Any]) -> None:
        update(launcher, trainer, extra)
        if path := extra.get(_KEY):
            with open(path, "rb") as file:
                results = pickle.load(file)
            os.remove(path)
            for callback in class_of_callbacks(trainer, Returning):
                callback.take_results(results[_identity(callback)])

    return update_main_process_results


def _identity(callback: Returning) -> tuple[str, str]:
    """Returns what distinguishes the callbacks of a trainer. Their order may differ between processes."""
    return type(callback).__qualname__, callback.name
