"""Predictions of a module for a batch of held-out data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_noise.batch import Path, Selector, describe, find_inputs, find_target, format_path, get, leaves
from lightning_noise.loop.perturbation import Context
from lightning_noise.loop.side_effects import SideEffects
from lightning_noise.loop.snapshot import copy_batch, restore_rng
from lightning_noise.perturb.sharding import is_sharded
from lightning_noise.tasks import Task

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["Predictor"]


@dataclass(frozen=True)
class Predictor:
    """How a module predicts the target of a batch.

    Args:
        task: What the outputs mean.
        inputs: Which leaf of the batch is the input.
        target: Which leaf is the target.
        predict: A callable from module and batch to the output. Default: ``module(*inputs)``.
        labelled: Whether the batch has a target. If not, the input stands in for the target.
    """

    task: Task
    inputs: Selector | None = None
    target: int | str | None = None
    predict: Callable[[Any, Any], Any] | None = None
    labelled: bool = True

    def locate(self, batch: Any) -> tuple[list[Path], Tensor]:
        """Returns the paths of the inputs, which ``predict`` may not need, and the target."""
        is_read = self.predict is None or self.inputs is not None or not self.labelled
        paths = find_inputs(batch, self.inputs) if is_read else []
        target = get(batch, find_target(batch, self.target) if self.labelled else paths[0])
        if isinstance(target, list):  # a list of samples stands in for the target
            target = target[0].new_zeros(len(target))
        if target.ndim == 0:
            raise ValueError("the target is one number, but must have a row for each sample; give the loader a batch size")
        return paths, target

    def __call__(
        self,
        context: Context,
        perturbation: AbstractContextManager[Any],
        paths: list[Path],
        target: Tensor,
        side_effects: SideEffects,
    ) -> tuple[Any, Any, Tensor]:
        """Returns the perturbed batch, and its predictions and target as the task reads them."""
        with perturbation as batch:
            output = self._output(context, batch, paths, side_effects)
        labels = target if self.labelled else self.task.placeholder(output, target)
        try:
            return batch, *self.task.read(output, labels)
        except ValueError as error:
            found = ", ".join(f"{format_path(path)!r} {describe(leaf)}" for path, leaf in leaves(batch))
            raise ValueError(f"{error}; the leaves of the batch are {found}") from None

    def ends_in_squashing(self, context: Context, batch: Any, paths: list[Path], side_effects: SideEffects) -> bool:
        """Returns whether the module returns what a sigmoid or softmax has made, by one more prediction of the batch."""
        if any(map(is_sharded, context.module.parameters())):
            return False  # ranks that are in no doubt would not take part in the forward pass
        with torch.compiler.set_stance("force_eager"), _LastSquashing() as last:  # a mode would become part of compiled code
            output = self._output(context, batch, paths, side_effects)
        return last.made(output)

    def _output(self, context: Context, batch: Any, paths: list[Path], side_effects: SideEffects) -> Any:
        """Returns the output of the module, which may write to its inputs and to the module."""
        with restore_rng(), side_effects.undone(context.trainer), context.trainer.precision_plugin.forward_context():
            return self._call(context.module, batch, paths)

    def _call(self, module: LightningModule, batch: Any, paths: list[Path]) -> Any:
        if self.predict is not None:
            return self.predict(module, copy_batch(batch))
        if getattr(module.forward, "__qualname__", "") == "LightningModule.forward":
            raise ValueError("the module has no forward; give predict=… to return its predictions; ReplayMonitor needs neither")
        inputs = [copy_batch(get(batch, path)) for path in paths]
        try:
            return module(*inputs)
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            if isinstance(error, ValueError) and "unpack" not in str(error):
                raise  # what the module itself refuses
            raise TypeError(
                f"module({', '.join(map(describe, inputs))}) raised {type(error).__name__}: {error}. If forward takes other "
                "arguments, type predict=lambda module, batch: module(…), or inputs=… for other leaves of the batch. A "
                "ReplayMonitor needs neither: it calls the validation step"
            ) from error


class _LastSquashing(TorchFunctionMode):
    """Remembers the last result of a sigmoid or softmax."""

    def __init__(self):
        super().__init__()
        self._last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SQUASHING:
            self._last = result
        return result

    def made(self, output: Any) -> bool:
        """Returns whether an output consists of values of the result, in any shape and precision."""
        if self._last is None or not isinstance(output, Tensor):
            return False
        return bool(torch.isin(output.flatten()[:1000].float(), self._last.to(output.dtype).float()).all())


_SQUASHING = {
    getattr(place, name)
    for place in (torch, Tensor, torch.nn.functional, torch.special)
    for name in ("sigmoid", "sigmoid_", "softmax", "expit")
    if hasattr(place, name)
}
