"""The one place where a batch of the loop is exchanged for a noisy one.

No Lightning hook lets a callback return a new batch, and the ways around that are each wrong somewhere: writing into the batch
does nothing for tuples and corrupts the data set for tensors, wrapping a transfer hook misses data modules that override it,
and wrapping the module's own step breaks its signature. The strategy's ``training_step`` is looked up for every batch,
whatever the batch and the module look like.
"""

from __future__ import annotations

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_noise.loop.internals import class_of_callbacks
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from torch.utils.hooks import RemovableHandle

__all__ = ["EvaluationDispatcher", "Perturbing", "Replaying", "TrainingDispatcher", "parameters_of", "perturbing"]


class Perturbing(ABC):
    """What the dispatcher asks of a callback.

    Attributes:
        name: The name of the callback, which no other callback of the trainer has.
        current_level: The level of this batch; at level 0 the callback is skipped.
        severities: The levels at which a monitor evaluates the noise by default.
        max_level: The largest level that has a meaning.
        mixes_samples: Whether the noise of a sample depends on the other samples of its batch.
        can_probe: Whether held-out data can be evaluated under the noise.
        one_draw_per_batch: Whether all samples of a batch share one draw, such as that of the weights.
    """

    name: str
    current_level: float
    severities: tuple[float, ...] = ()
    max_level: float = math.inf
    mixes_samples: bool = False
    can_probe: ClassVar[bool] = True
    one_draw_per_batch: ClassVar[bool] = False

    @abstractmethod
    def perturbation(self, context: Context, batch: Any, level: float, key: Key) -> Perturbation:
        """Returns the perturbation of a batch, a context manager that yields the noisy batch."""

    @abstractmethod
    def start_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Sets the level for this training batch."""

    @abstractmethod
    def training_perturbation(self, trainer: Trainer, batch: Any) -> Perturbation:
        """Returns the perturbation of this training batch, which yields the batch to use."""

    def pause(self, parameters: list[Parameter]) -> None:  # noqa: B027  # only noise in parameters has something to do
        """Restores parameters within a perturbation, because an optimizer is about to update them."""

    def resume(self, parameters: list[Parameter], *, updated: bool) -> None:  # noqa: B027
        """Perturbs the parameters again, by another draw where they have been updated."""


def perturbing(trainer: Trainer) -> list[Perturbing]:
    """Returns the callbacks that perturb and are in the trainer now, in its order."""
    return class_of_callbacks(trainer, Perturbing)


class TrainingDispatcher:
    """Stands in for ``strategy.training_step`` and runs it within the perturbations of all noise callbacks.

    The perturbations end after the backward pass, or with the step where none follows. In manual optimization updates lie
    within the step, and are those of parameters without noise, whichever optimizer makes them.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.step = trainer.strategy.training_step
        self.takes_iterator = "dataloader_iter" in inspect.signature(trainer.lightning_module.training_step).parameters
        self.perturbations = ExitStack()  # that end after the backward pass
        self._entered = ExitStack()
        self._fetching: _Fetching | None = None
        self._is_within = False  # a step
        self._updating: list[Optimizer] = []  # one within the other
        self._updated: list[Optimizer] = []  # since the outermost began
        self._handles: list[RemovableHandle] = []
        if not trainer.lightning_module.automatic_optimization:  # of all optimizers: a module may have some of its own
            self._handles.append(register_optimizer_step_pre_hook(self._before_update))
            self._handles.append(register_optimizer_step_post_hook(self._after_update))

    @staticmethod
    def of(trainer: Trainer) -> TrainingDispatcher | None:
        """Returns the dispatcher that is attached to the trainer."""
        attached = vars(trainer.strategy).get("training_step")
        return attached if isinstance(attached, TrainingDispatcher) else None

    @staticmethod
    def attach(trainer: Trainer) -> None:
        """Attaches a dispatcher, unless there is one."""
        if TrainingDispatcher.of(trainer) is None:
            trainer.strategy.training_step = TrainingDispatcher(trainer)  # type: ignore[method-assign]

    @staticmethod
    def detach(trainer: Trainer) -> None:
        """Ends what is still perturbed and leaves the strategy as it was."""
        if dispatcher := TrainingDispatcher.of(trainer):
            for handle in dispatcher._handles:
                handle.remove()
            _put_back(trainer, "training_step", dispatcher.step)
            # by an exception, so that a perturbation only undoes what it did, and does not complain of something else
            dispatcher.perturbations.__exit__(RuntimeError, RuntimeError("the run has ended"), None)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.perturbations.close()  # an update that is tried again after an exception does not come to the end of the first
        with ExitStack() as self._entered:
            self._is_within, self._updating, self._updated = True, [], []
            self._entered.callback(setattr, self, "_is_within", False)
            batch = self._fetching_from(batch) if self.takes_iterator else self._perturbed(batch)
            output = self.step(batch, *args, **kwargs)
            if output is not None and self.trainer.lightning_module.automatic_optimization:
                self.perturbations = self._entered = self._entered.pop_all()  # until the backward pass is over
        return output

    def pause(self, *optimizers: Optimizer) -> None:
        """Restores the parameters of the optimizers."""
        for callback in reversed(perturbing(self.trainer)):  # each restores what it was given
            callback.pause(parameters_of(*optimizers))

    def _resume(self, *optimizers: Optimizer, updated: bool) -> None:
        for callback in perturbing(self.trainer):
            callback.resume(parameters_of(*optimizers), updated=updated)

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_ours(optimizer):
            return None
        if optimizer in self._updating:  # its last update ended in an exception
            del self._updating[self._updating.index(optimizer) :]
        self._updating.append(optimizer)
        self.pause(optimizer)
        if callable(closure := kwargs.get("closure")):
            return args, kwargs | {"closure": self._with_noise(closure, optimizer)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._with_noise(args[1], optimizer), *args[2:]), kwargs
        return None

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_ours(optimizer):
            self._updating.pop()
            self._updated.append(optimizer)
            if not self._updating:
                done, self._updated = self._updated, []
                self._resume(*done, updated=True)

    def _with_noise(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def evaluated() -> Any:  # before the first evaluation and between two the optimizer may move the parameters
            outer, self._updating, self._updated = (self._updating, self._updated), [], []
            self._resume(optimizer, updated=False)
            loss = closure()
            self.pause(optimizer)
            self._updating, self._updated = outer
            return loss

        return evaluated

    def _is_ours(self, optimizer: Optimizer) -> bool:
        """Whether it updates a parameter of the module, in a step."""
        ours = set(self.trainer.lightning_module.parameters()) if self._is_within else set()
        return any(parameter in ours for parameter in parameters_of(optimizer))

    def _perturbed(self, batch: Any) -> Any:
        # those that are in the trainer now: a search for the learning rate takes them out, and must not meet their noise
        for callback in perturbing(self.trainer):
            if callback.current_level != 0:
                batch = self._entered.enter_context(callback.training_perturbation(self.trainer, batch))
        return batch

    def _fetched(self, batch: Any, batch_idx: int) -> Any:
        for callback in perturbing(self.trainer):
            callback.start_batch(self.trainer, batch, batch_idx)
        return self._perturbed(batch)

    def _fetching_from(self, iterator: Iterator[Any]) -> _Fetching:
        # one for an epoch, as the iterator itself, which a module may keep
        if self._fetching is None or self._fetching.iterator is not iterator:
            # the count of the iterator begins at 0 also where a run is resumed within an epoch
            self._fetching = _Fetching(iterator, self.trainer.fit_loop.epoch_loop.batch_idx, self._fetched)
        return self._fetching


class Replaying(ABC):
    """What the dispatcher of validation and test asks of a callback."""

    @abstractmethod
    def replay(self, trainer: Trainer, step: Callable[..., Any], batch: Any, *indices: int) -> None:
        """Runs the step on noisy copies of the batch, and leaves everything as it was."""


class EvaluationDispatcher:
    """Stands in for ``strategy.validation_step`` or ``test_step``, and has the batch replayed before the user's own step.

    It comes before the user's step and not after, so that it has batch and random streams as the user's step is to find them.
    """

    def __init__(self, trainer: Trainer, name: str):
        self.trainer = trainer
        self.step = getattr(trainer.strategy, name)

    @staticmethod
    def attach(trainer: Trainer, name: str) -> None:
        """Attaches a dispatcher to the step of this name, unless there is one."""
        if not isinstance(vars(trainer.strategy).get(name), EvaluationDispatcher):
            setattr(trainer.strategy, name, EvaluationDispatcher(trainer, name))

    @staticmethod
    def detach(trainer: Trainer) -> None:
        """Leaves the strategy as it was."""
        for name in ("validation_step", "test_step"):
            if isinstance(dispatcher := vars(trainer.strategy).get(name), EvaluationDispatcher):
                _put_back(trainer, name, dispatcher.step)

    def __call__(self, batch: Any, *indices: int) -> Any:
        for callback in class_of_callbacks(self.trainer, Replaying):
            callback.replay(self.trainer, self.step, batch, *indices)
        return self.step(batch, *indices)


def parameters_of(*optimizers: Optimizer) -> list[Parameter]:
    """Returns the parameters of the optimizers, each once."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return list(dict.fromkeys(parameter for group in groups for parameter in group["params"]))


def _put_back(trainer: Trainer, name: str, step: Callable[..., Any]) -> None:
    delattr(trainer.strategy, name)
    if getattr(trainer.strategy, name) != step:  # somebody had set it on the instance
        setattr(trainer.strategy, name, step)


class _Fetching(Iterator[Any]):
    """The iterator of a ``training_step(dataloader_iter)``, which fetches its batches itself, and gets noisy ones."""

    def __init__(self, iterator: Iterator[Any], first: int, perturbed: Callable[[Any, int], Any]):
        self.iterator = iterator
        self._indices = itertools.count(first)
        self._perturbed = perturbed

    def __next__(self) -> tuple[Any, int, int]:
        batch, batch_idx, dataloader_idx = next(self.iterator)
        return self._perturbed(batch, next(self._indices)), batch_idx, dataloader_idx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)
