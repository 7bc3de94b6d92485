"""A validation or test epoch that is run once more, in a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_noise._tensor import at_least_float32
from lightning_noise.loop.internals import (
    add_callback_metrics,
    current_hook,
    empty_results,
    exchange_evaluation_results,
    logged_name,
    logged_so_far,
    reduce_logged,
    return_to_rng_states,
    set_rng_states,
)
from lightning_noise.loop.loggers import SilentLogger
from lightning_noise.loop.snapshot import Contents, State, restore_trainer

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Replay", "stage_of"]


class Replay:
    """The user's validation or test epoch, run once more from what the module holds now.

    The module logs to another of Lightning's collections of results, which reduces values and names loaders as usual.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.state = State(trainer)
        self._results = empty_results(trainer)
        self._logged = logged_so_far(trainer)
        self._collected: set[str] = set()
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def entered(self, before: Contents) -> Iterator[None]:
        """Exchanges the user's state, results and loggers for those of the replay; ``before`` is from ``state.current()``.

        The trainer is to be restored by the caller, with :func:`~lightning_noise.loop.snapshot.restore_trainer`.
        """
        trainer: Any = self.trainer
        with self.state.entered(before):
            trainer.loggers = [SilentLogger(logger) for logger in trainer.loggers]
            exchange_evaluation_results(trainer, self._results, self._logged)
            yield

    def run_step(
        self,
        step: Callable[..., Any],
        batch: Any,
        indices: tuple[int, ...],
        *,
        batch_idx: int,
        dataloader_idx: int | None,
        rng_of_hook: dict[str, Any],
        rng: dict[str, Any],
    ) -> None:
        """Runs the step, and the module's hooks before and after it, within :meth:`entered`.

        Args:
            step: The step of the strategy.
            batch: The batch, to which the step may write.
            indices: The further arguments of the step.
            batch_idx: The index of the batch, for the hooks.
            dataloader_idx: The index of the loader, or ``None`` if there is one loader.
            rng_of_hook: The random streams with which the hook before the step begins.
            rng: Those with which the step begins.
        """
        results = self._results
        results.dataloader_idx, results.batch, results.batch_size = dataloader_idx, batch, None
        arguments = (batch, batch_idx) if dataloader_idx is None else (batch, batch_idx, dataloader_idx)
        return_to_rng_states(rng_of_hook)
        self._call("batch_start", *arguments)
        set_rng_states(rng)  # no earlier state: the hook may have drawn otherwise
        self._call("batch_end", step(batch, *indices), *arguments)

    @property
    def keys(self) -> list[str]:
        """The keys of what the module has logged for the epoch."""
        return [logged_name(self._results, value) for value in self._logged_for_epoch().values()]

    def end_loader(self, before: Contents) -> None:
        """Computes what was logged for a loader, as Lightning does between two loaders, which may share a metric."""
        with restore_trainer(self.trainer), self.entered(before):
            self._collect()

    def finish(self, before: Contents) -> dict[str, Tensor]:
        """Runs the module's hook at the end of the epoch, and returns what the module logged for the epoch."""
        with restore_trainer(self.trainer), self.entered(before):
            self._results.dataloader_idx = self._results.batch = self._results.batch_size = None
            self._call("epoch_end")
            self._collect()
        return self._values

    def _call(self, event: str, *arguments: Any) -> None:
        module, name = self.trainer.lightning_module, f"on_{stage_of(self.trainer)}_{event}"
        with current_hook(module, name):
            getattr(module, name)(*arguments)

    def _logged_for_epoch(self) -> dict[str, Any]:
        return {key: value for key, value in self._results.valid_items() if value.meta.on_epoch}

    def _collect(self) -> None:
        """Computes, over all ranks, what was logged since the last call."""
        new = {key: value for key, value in self._logged_for_epoch().items() if key not in self._collected}
        if self.trainer.world_size > 1:  # a value that only one rank logs is missing on the others
            new = {key: value for key, value in new.items() if not value.meta.sync.rank_zero_only}
        keys, strategy = list(new), self.trainer.strategy
        if not strategy.reduce_boolean_decision(strategy.broadcast(keys) == keys):
            raise ValueError(f"all ranks must log the same keys to be reduced, but this rank logs {keys}")
        for value in new.values():
            reduce_logged(value, strategy.reduce)
        metrics = self._results.metrics(on_step=False)["callback"]
        add_callback_metrics(self._logged, metrics)
        for name in (logged_name(self._results, value) for value in new.values()):
            self._values[name] = at_least_float32(metrics[name].squeeze())
        self._collected |= new.keys()


def stage_of(trainer: Trainer) -> str:
    """Returns the stage in the names of hooks and steps: validation or test."""
    return "test" if trainer.testing else "validation"
