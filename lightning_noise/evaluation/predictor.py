"""Predictions of a module for a batch of held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_noise.batch import Path, Selector, describe, find_inputs, find_target, format_path, get, is_sequence, leaves
from lightning_noise.evaluation.arguments import Arguments, find_arguments, takes_all_but_last, write_arguments
from lightning_noise.loop.perturbation import Context
from lightning_noise.loop.side_effects import SideEffects
from lightning_noise.loop.snapshot import copy_batch
from lightning_noise.perturb.sharding import is_sharded
from lightning_noise.tasks import MODULE_CALL, Task, suits

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["Predictor"]


@dataclass
class Predictor:
    """How a module predicts the target of a batch.

    Args:
        task: What the outputs mean.
        inputs: Which leaf of the batch is the input.
        target: Which leaf is the target.
        predict: A callable from module and batch to the output. Default: the module, called with the arguments that
            :func:`~lightning_noise.evaluation.arguments.find_arguments` finds, and the ``logits`` of an output that has them.
        labelled: Whether the batch has a target. If not, the input stands in for the target.
    """

    task: Task
    inputs: Selector | None = None
    target: int | str | None = None
    predict: Callable[[Any, Any], Any] | None = None
    labelled: bool = True
    _reader: Task | None = field(default=None, init=False, repr=False, compare=False)  # the task, since a clear batch
    _has_looked: bool = field(default=False, init=False, repr=False, compare=False)
    _has_checked_target: bool = field(default=False, init=False, repr=False, compare=False)
    has_compared: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.predict is not None and not callable(self.predict):
            raise TypeError(
                f"predict must be a function of module and batch, got {self.predict!r}; type "
                f"predict=lambda module, batch: {MODULE_CALL}[{self.predict!r}]"
            )

    def forget(self) -> None:
        """Forgets how the outputs of an earlier module were read."""
        self._reader, self._has_looked, self._has_checked_target, self.has_compared = None, False, False, False

    def locate(self, module: Any, batch: Any) -> tuple[Arguments, Tensor]:
        """Returns the arguments of the module, which ``predict`` may not need, and the target."""
        try:
            path = self._find_target(module, batch) if self.labelled else None
            if self.predict is None:
                arguments = find_arguments(module, batch, self.inputs, path)
            else:
                is_read = self.inputs is not None or not self.labelled
                arguments = Arguments(find_inputs(batch, self.inputs) if is_read else [], {})
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}{self._without}") from None
        target = get(batch, [*arguments.paths, *arguments.named.values()][0] if path is None else path)
        if isinstance(target, list):  # a list of samples stands in for the target
            target = target[0].new_zeros(len(target))
        if target.ndim == 0:
            raise ValueError("the target is one number, but must have a row for each sample; give the loader a batch size")
        return arguments, target

    def _find_target(self, module: Any, batch: Any) -> Path:
        is_last = self.target is None and self.inputs is None and self.predict is None and takes_all_but_last(module, batch)
        return (len(batch) - 1,) if is_last else find_target(batch, self.target)

    def __call__(
        self,
        context: Context,
        perturbation: AbstractContextManager[Any],
        arguments: Arguments,
        target: Tensor,
        side_effects: SideEffects,
    ) -> tuple[Any, Any, Tensor]:
        """Returns the perturbed batch, and its predictions and target as the task reads them."""
        with perturbation as batch:
            output = self._output(context, batch, arguments, side_effects)
        try:
            labels = target if self.labelled else self.task.placeholder(output, target)
            settled = self.task.settled(output, labels)
            if settled is not self.task:
                self._reader = settled
            found = (self._reader or self.task).read(output, labels)
        except ValueError as error:
            found = ", ".join(f"{format_path(path)!r} {describe(leaf)}" for path, leaf in leaves(batch))
            text = str(error).replace(MODULE_CALL, f"module({arguments.write(batch) or '…'})")
            raise ValueError(f"{text}; the leaves of the batch are {found}{self._without}") from None
        if not self._has_checked_target:
            self._check_target(context.module, batch, output)
        return batch, *found

    def check_reach(self, arguments: Arguments, batch: Any, seen: Any) -> None:
        """Raises a ValueError if the noise in a batch is in no argument of the module."""
        if self.predict is None and seen is not batch and arguments.are_same(batch, seen):
            noisy = [path for path, leaf in leaves(batch) if get(seen, path) is not leaf]
            raise ValueError(
                f"the noise is in {', '.join(repr(format_path(path)) for path in noisy)}, but the module is called with "
                f"module({arguments.write(batch)}); type inputs=… for an argument of the module, or predict=…{self._without}"
            )

    def _check_target(self, module: Any, batch: Any, output: Any) -> None:
        """Warns if the target by default is the second of a sequence, and a later leaf could be the target, too."""
        self._has_checked_target = True
        # a task of one's own takes any target
        if not (self.labelled and self.task.knows_chance and is_sequence(batch)) or self.target is not None:
            return
        later = list(enumerate(batch))[self._find_target(module, batch)[0] + 1 :]
        others = [
            i for i, leaf in later if isinstance(leaf, Tensor) and suits(self.task, output, leaf) and not _counts_up(leaf)
        ]
        if others:
            found = f"{others[0]} {describe(batch[others[0]])}"
            rank_zero_warn(
                f"the target is leaf 1 of the batch, and leaf {found} could be, too; type target=1 or target={others[0]}"
            )

    def look(self, outputs: Any, target: Tensor, classes: Tensor | None) -> None:
        """Warns if outputs or targets of the first batch suit another task better, or leave little room above chance."""
        if self._has_looked:
            return
        self._has_looked = True
        doubts = [self.task.outputs_doubt(outputs)]
        if self.labelled:
            doubts.append(self.task.target_doubt(target) if classes is None else self.task.balance_doubt(outputs, classes))
        for doubt in filter(None, doubts):
            rank_zero_warn(doubt)

    def compare(self, same: dict[str, bool]) -> None:
        """Warns of noises that have changed no prediction of the first batch that has any noise."""
        if self.has_compared or not same:
            return
        self.has_compared = True
        if names := [name for name, is_same in same.items() if is_same]:
            advice = "a higher level" if self.predict is None else "predict=lambda module, batch: … that reads batch"
            rank_zero_warn(
                f"no prediction of the first batch has changed under {names}, not even in its last bit, so the noise may not "
                f"reach it; type {advice}"
            )

    def ends_in_squashing(self, context: Context, batch: Any, arguments: Arguments, side_effects: SideEffects) -> bool:
        """Returns whether the module returns what a sigmoid or softmax has made, by one more prediction of the batch."""
        if any(map(is_sharded, context.module.parameters())):
            return False  # ranks that are in no doubt would not take part in the forward pass
        with torch.compiler.set_stance("force_eager"), _LastSquashing() as last:  # a mode would become part of compiled code
            output = self._output(context, batch, arguments, side_effects)
        return last.made(output)

    def _output(self, context: Context, batch: Any, arguments: Arguments, side_effects: SideEffects) -> Any:
        """Returns the output of the module, which may write to its inputs and to the module."""
        with side_effects.undone(context.trainer), context.trainer.precision_plugin.forward_context():
            return self._call(context.module, batch, arguments)

    def _call(self, module: LightningModule, batch: Any, arguments: Arguments) -> Any:
        if self.predict is not None:
            return self._read_logits(self.predict(module, copy_batch(batch)))
        if getattr(module.forward, "__qualname__", "") == "LightningModule.forward":
            layers = next((f".{name}" for name, _ in module.named_children()), "")
            raise ValueError(
                f"the module has no forward; type predict=lambda module, batch: module{layers}({arguments.write(batch)}) "
                f"to return its predictions{self._without}"
            )
        try:
            return self._read_logits(arguments.call(module, batch))
        except torch.cuda.OutOfMemoryError:
            raise
        except (TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, ValueError) and "unpack" not in str(error):
                raise  # what the module itself refuses
            target = self._find_target(module, batch) if self.labelled else None
            kind = RuntimeError if isinstance(error, RuntimeError) else TypeError
            values = [get(batch, path) for path in [*arguments.paths, *arguments.named.values()]]
            raise kind(
                f"module({arguments.write(batch)}) of {', '.join(map(describe, values))} raised {type(error).__name__}: "
                f"{error}. If forward takes other arguments, type predict=lambda module, batch: "
                f"module({write_arguments(module, batch, target)}), or inputs=… for other leaves of the batch{self._without}"
            ) from error

    @property
    def _without(self) -> str:
        """What else to type, at the end of a message. Without labels, no validation step can be called."""
        return ". A ReplayMonitor needs none of this: it calls the validation step" if self.labelled else ""

    def _read_logits(self, output: Any) -> Any:
        """Returns the logits of an output that names them, and any other output as it is."""
        if isinstance(output, Tensor):
            return output
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        others = [leaf for _, leaf in leaves(output) if leaf is not logits and leaf.is_floating_point() and leaf.ndim]
        is_clear = self.task.has_classes or not others  # numbers may also be in another leaf
        return logits if isinstance(logits, Tensor) and is_clear else output


def _counts_up(leaf: Tensor) -> bool:
    """Returns whether a leaf holds the index of each sample."""
    return leaf.ndim == 1 and not leaf.is_floating_point() and bool((leaf.diff() == 1).all())


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
