"""What a module predicts of a batch of held-out data, beside the target."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_noise.batch import Path, Selector, describe, find_inputs, find_target, get
from lightning_noise.evaluation.old_tasks import Task, as_classes, check_target, validate_rows
from lightning_noise.loop.internals import isolate_rng

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Predictor"]


@dataclass(frozen=True)
class Predictor:
    """Where the inputs and the target are in a batch, and how a module predicts the one of the other.

    Args:
        inputs: Which leaf of the batch is the input.
        target: Which leaf holds the target.
        predict: A callable from module and batch to predictions; left out, ``module(input)``.
        metrics: The task, or metrics of one's own, which decides how predictions and target are read.
        labelled: Whether the batch has a target; without, a task has the input stand for its rows, and nothing is compared.
    """

    inputs: Selector | None
    target: int | str | None
    predict: Callable[[Any, Any], Any] | None
    metrics: Task | Metric | MetricCollection
    labelled: bool = True

    def locate(self, batch: Any, *, noisy_inputs: bool) -> tuple[list[Path], Tensor]:
        """Returns the paths of the inputs, where they are needed or named, and the target."""
        needed = noisy_inputs or self.predict is None or self.inputs is not None or not self.labelled
        paths = find_inputs(batch, self.inputs) if needed else []
        target = get(batch, find_target(batch, self.target) if self.labelled else paths[0])
        if target.ndim == 0:
            raise ValueError("the target is one number, but must have a row for each sample; give the loader a batch size")
        return paths, target

    def read(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        perturbation: AbstractContextManager[Any],
        paths: list[Path],
        target: Tensor,
    ) -> tuple[Any, Tensor, Tensor]:
        """Returns the batch within the perturbation, and what the module predicts of it there, with the target of that."""
        with perturbation as noisy, isolate_rng(), trainer.precision_plugin.forward_context():
            output = self._predict(pl_module, noisy, paths)
        if isinstance(self.metrics, Metric | MetricCollection):
            return noisy, validate_rows(output, target), target
        return noisy, *as_classes(output, target if self.labelled else _as_target(output, target, self.metrics), self.metrics)

    def check(self, target: Tensor, preds: Tensor) -> None:
        """Raises a ValueError where the target is not what the task reads, for which the device is waited for."""
        if isinstance(self.metrics, str) and self.labelled:
            check_target(target, preds, self.metrics)

    def _predict(self, pl_module: LightningModule, batch: Any, paths: list[Path]) -> Any:
        if self.predict is not None:
            return self.predict(pl_module, batch)
        if getattr(pl_module.forward, "__qualname__", "") == "LightningModule.forward":
            raise ValueError("the module has no forward; give predict=… to return its predictions; ReplayMonitor needs neither")
        return pl_module(*(get(batch, path) for path in paths))


def _as_target(output: Any, rows: Tensor, task: Task) -> Tensor:
    """A tensor of the shape that the target of such predictions would have."""
    of_classes = task == "multiclass"
    if not isinstance(output, Tensor) or output.ndim < 1 + of_classes or len(output) != len(rows):
        raise ValueError(
            f"the module returned {describe(output)} for {len(rows)} samples, but the task {task!r} reads logits with a row "
            "for each; give predict=… or another task"
        )
    return output[:, 0] if of_classes else output
