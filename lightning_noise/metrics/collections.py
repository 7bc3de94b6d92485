"""All metrics of a task, which are updated together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_noise.batch import describe
from lightning_noise.metrics.base import Sums
from lightning_noise.metrics.calibration import CalibrationBins

__all__ = ["CustomMetrics", "GroupedMetrics", "TaskMetrics"]


class GroupedMetrics(MetricCollection):
    """Metrics of a task with sums for groups of samples; ``read`` computes once what all need of the predictions."""

    def __init__(self, metrics: dict[str, Metric], read: Callable[[Any], Any] | None = None):
        # no two metrics have the same states, so comparing the states finds nothing
        super().__init__(metrics, compute_groups=False)  # type: ignore[arg-type]
        self._read = read

    def reset(self) -> None:
        """Sets all sums to 0, in place."""
        for metric in self._sums():
            metric.reset_in_place()

    def read(self, preds: Any) -> Any:
        """Returns predictions that several collections can be updated with, so that they are read once."""
        return preds if self._read is None else self._read(preds)

    def update(self, *, preds: Any, clean_preds: Any, **kwargs: Any) -> None:
        """Adds ``preds``, ``target``, ``clean_preds``, ``groups`` and ``classes``."""
        super().update(preds=self.read(preds), clean_preds=self.read(clean_preds), **kwargs)

    def totals(self) -> dict[str, float]:
        """Returns the values of all samples of all ranks; NaN if a prediction was NaN."""
        return _merge([metric.totals() for metric in self._sums()])

    def estimates(self) -> dict[str, Tensor]:
        """Returns each value of all samples of all ranks and then without each group, of shape (1 + G,)."""
        return _merge([metric.estimates() for metric in self._sums()])

    def calibration_bins(self) -> list[Tensor] | None:
        """Returns the sums in bins of the confidence, or ``None`` if there is no confidence."""
        return next((metric.bins() for metric in self._sums() if isinstance(metric, CalibrationBins)), None)

    def _sums(self) -> list[Sums]:
        return [metric for metric in self.values(copy_state=False) if isinstance(metric, Sums)]


class CustomMetrics:
    """Metrics of the user, which know no groups of samples. The methods are those of :class:`GroupedMetrics`.

    Attributes:
        seen: The sum of all predictions, which differs between other samples.
        is_whole: Whether this rank has seen all samples, so that nothing is to be added from the others.
    """

    def __init__(self, collection: MetricCollection):
        self.collection = collection
        self.seen, self.is_whole = torch.zeros(()), False
        for metric in collection.values(copy_state=False):
            if isinstance(metric, Sums):
                metric.refuses_nan = False  # NaN does not stop a run
        # a wrapper takes any argument and hands it to its metric, which may refuse it
        updates = [part.update for part in collection.modules() if isinstance(part, Metric)]
        self._takes_clean = any("clean_preds" in signature(update).parameters for update in updates)

    def to(self, device: torch.device) -> CustomMetrics:
        self.collection.to(device)
        return self

    def reset(self) -> None:
        self.collection.reset()
        self.seen, self.is_whole = torch.zeros(()), False

    def read(self, preds: Any) -> Any:
        return preds

    def update(self, *, preds: Any, target: Tensor, clean_preds: Any, groups: Tensor | None = None) -> None:
        real = torch.view_as_real(preds.resolve_conj()) if preds.is_complex() else preds
        self.seen = self.seen.to(preds.device) + real.float().nan_to_num(0.0, 0.0, 0.0).sum()
        given = {"preds": preds, "target": target, **({"clean_preds": clean_preds} if self._takes_clean else {})}
        try:
            self.collection.update(**given)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{', '.join(map(str, self.collection))} raised {type(error).__name__}: {error} The module returned "
                f"{describe(preds)}, and the target is {describe(target)} from {target.min().item()} to {target.max().item()}. "
                "For labels that do not count, type ignore_index=… in the metric; for other outputs, type predict=…"
            ) from error

    def totals(self) -> dict[str, float]:
        with _alone(self.collection) if self.is_whole else nullcontext():
            values = self.collection.compute()
        for name in map(str, self.collection):
            if name not in values:
                raise ValueError(f"a metric must be one number to be logged, but {name!r} has the values {list(values)}")
            value = values[name]
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(
                    f"a metric must be one number to be logged, but {name!r} is {value!r}; choose an average for it"
                )
        return {name: value.item() for name, value in values.items()}

    def estimates(self) -> dict[str, Tensor]:
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in self.totals().items()}

    def calibration_bins(self) -> None:
        return None


@contextmanager
def _alone(collection: MetricCollection) -> Iterator[None]:
    """Keeps metrics, and those that they wrap, from synchronizing."""
    metrics = [metric for metric in collection.modules() if isinstance(metric, Metric)]
    before = [metric.distributed_available_fn for metric in metrics]
    try:
        for metric in metrics:
            metric.distributed_available_fn = lambda: False
        yield
    finally:
        for metric, function in zip(metrics, before, strict=True):
            metric.distributed_available_fn = function


TaskMetrics = GroupedMetrics | CustomMetrics


def _merge(parts: Any) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
