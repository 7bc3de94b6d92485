"""Dispatchers that pass noisy batches to the module.

No Lightning hook lets a callback return a new batch, and each workaround fails for some users. Writing into the batch does
nothing for tuples and corrupts the data set for tensors. Wrapping a transfer hook misses data modules that override the hook.
Wrapping the step of the module breaks its signature. The loop looks up ``strategy.training_step`` for every batch, whatever the
batch and the module are.
"""

from __future__ import annotations

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_noise.loop.internals import Callback, class_of_callbacks
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.losses.modes import resume_modes, suspend_modes
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from torch.utils.hooks import RemovableHandle

__all__ = [
    "EvaluationDispatcher",
    "Perturbing",
    "Replaying",
    "TrainingDispatcher",
    "parameters_of",
    "perturbing",
    "wrap_closure",
]


class Perturbing(ABC):
    """Interface of the callbacks that perturb training batches.

    Attributes:
        name: The name of the callback, unique in the trainer.
        current_level: The level of this batch. At level 0 the callback is skipped.
        severities: The levels at which a monitor evaluates the noise by default.
        max_level: The largest meaningful level.
        usual_limit: The level above which an adaptive level does not rise, unless its rule says so.
        unit: What the level is, as the label of an axis.
        dimension: What the levels of several noises must have in common, so that they can be shared; ``""`` if not known.
        mixes_samples: Whether the noise of a sample depends on the other samples of its batch.
        can_probe: Whether held-out data can be evaluated under the noise.
        one_draw_per_batch: Whether all samples of a batch share one draw, as in weights.
    """

    name: str
    current_level: float
    severities: tuple[float, ...] = ()
    max_level: float = math.inf
    usual_limit: float = math.inf
    unit: str = "level"
    dimension: str = ""
    mixes_samples: bool = False
    can_probe: ClassVar[bool] = True
    one_draw_per_batch: ClassVar[bool] = False

    @abstractmethod
    def perturbation(self, context: Context, batch: Any, level: float, key: Key) -> Perturbation:
        """Returns a context manager that yields the noisy batch."""

    @abstractmethod
    def start_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Checks the batch and sets its level."""

    @abstractmethod
    def training_perturbation(self, trainer: Trainer, batch: Any) -> Perturbation:
        """Returns the perturbation of this training batch, at the current level."""

    def pause(self, parameters: list[Parameter]) -> None:  # noqa: B027  # a no-op unless parameters are noisy
        """Restores parameters that an optimizer is about to update."""

    def resume(self, parameters: list[Parameter], *, updated: bool) -> None:  # noqa: B027
        """Perturbs the parameters again, with a new draw if they were updated."""


def perturbing(trainer: Trainer) -> list[Perturbing]:
    """Returns the perturbing callbacks of the trainer, in order."""
    return class_of_callbacks(trainer, Perturbing)


class TrainingDispatcher:
    """Replaces ``strategy.training_step`` and runs it under the noise of all callbacks.

    The perturbations end with the backward pass, before any hook can read the module. They end with the step if no backward
    pass follows, and after an exception before any ``on_exception``. In manual optimization, the step contains the updates.
    Every optimizer then updates the parameters without noise.

    If a step fetches several batches, the noise of each batch acts from its fetch on. A noise with one draw per batch, such as
    noise in weights, acts from the first fetch on, with the draw and level of the first batch.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.step = trainer.strategy.training_step
        self._backward = trainer.precision_plugin.backward
        self._optimize = trainer.fit_loop.epoch_loop.automatic_optimization.run
        self.takes_iterator = "dataloader_iter" in inspect.signature(trainer.lightning_module.training_step).parameters
        self._perturbations = ExitStack()  # the open ones
        self._is_automatic = trainer.lightning_module.automatic_optimization
        self._iterator: _NoisyIterator | None = None
        self.fetched = -1  # the index of the last batch that an iterator gave
        self._callbacks: list[Perturbing] = []  # those among the callbacks of the trainer
        self._found_among: list[Any] = []
        self._covering: list[Perturbing] = []  # the noises that act until the end of this step
        self._in_step = False
        self._updating: list[Optimizer] = []  # nested, outermost first
        self._updated: list[Optimizer] = []  # finished since the outermost update began
        self._handles: list[RemovableHandle] = []
        if not self._is_automatic:
            # global hooks, because a module may have optimizers that Lightning does not know
            self._handles.append(register_optimizer_step_pre_hook(self._before_update))
            self._handles.append(register_optimizer_step_post_hook(self._after_update))

    @staticmethod
    def of(trainer: Trainer) -> TrainingDispatcher | None:
        """Returns the attached dispatcher, or ``None``."""
        attached = vars(trainer.strategy).get("training_step")
        return attached if isinstance(attached, TrainingDispatcher) else None

    @staticmethod
    def attach(trainer: Trainer) -> TrainingDispatcher:
        """Returns the dispatcher, which is attached once."""
        if (attached := TrainingDispatcher.of(trainer)) is not None:
            return attached
        dispatcher = TrainingDispatcher(trainer)
        for owner, name, _, stand_in in dispatcher._stand_ins():
            setattr(owner, name, stand_in)
        return dispatcher

    @staticmethod
    def detach(trainer: Trainer) -> None:
        """Ends open perturbations and restores the strategy."""
        if dispatcher := TrainingDispatcher.of(trainer):
            for handle in dispatcher._handles:
                handle.remove()
            for owner, name, original, _ in dispatcher._stand_ins():
                _put_back(owner, name, original)
            dispatcher._abort(RuntimeError("the run has ended"))

    def _stand_ins(self) -> list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]]:
        """Returns owner, name, original and stand-in of each method that is replaced."""
        trainer = self.trainer
        return [
            (trainer.strategy, "training_step", self.step, self),
            (trainer.precision_plugin, "backward", self._backward, self._run_backward),
            (trainer.fit_loop.epoch_loop.automatic_optimization, "run", self._optimize, self._run_optimization),
        ]

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._perturbations.close()  # a step that is retried after an exception has not ended its perturbations
        self._in_step, self._updating, self._updated, self._covering = True, [], [], []
        try:
            batch = self._noisy_iterator(batch) if self.takes_iterator else self._perturb(batch)
            output = self.step(batch, *args, **kwargs)
        except BaseException as exception:
            self._abort(exception)
            raise
        finally:
            self._in_step = False
        if output is None or not self._is_automatic:  # no backward pass follows
            self._perturbations.close()
        else:
            suspend_modes()  # the loop clears each gradient before the backward pass
        return output

    def _run_backward(self, *args: Any, **kwargs: Any) -> None:
        resume_modes()  # a checkpoint computes the loss again
        self._backward(*args, **kwargs)
        if self._is_automatic:
            self._perturbations.close()

    def _run_optimization(self, *args: Any, **kwargs: Any) -> Any:
        with self._perturbations:  # a backward pass may fail, or be left out
            return self._optimize(*args, **kwargs)

    def _abort(self, exception: BaseException) -> None:
        """Undoes the perturbations without further checks."""
        self._perturbations.__exit__(type(exception), exception, exception.__traceback__)

    def pause(self, *optimizers: Optimizer) -> None:
        """Restores the parameters that the optimizers are about to update."""
        for callback in reversed(perturbing(self.trainer)):  # in reverse: each restores what it received
            callback.pause(parameters_of(*optimizers))

    def _resume(self, *optimizers: Optimizer, updated: bool) -> None:
        for callback in perturbing(self.trainer):
            callback.resume(parameters_of(*optimizers), updated=updated)

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._updates_module(optimizer):
            return None
        if optimizer in self._updating:  # its last update raised an exception
            del self._updating[self._updating.index(optimizer) :]
        self._updating.append(optimizer)
        self.pause(optimizer)
        return wrap_closure(args, kwargs, partial(self._with_noise, optimizer=optimizer))

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._updates_module(optimizer):
            self._updating.pop()
            self._updated.append(optimizer)
            if not self._updating:
                done, self._updated = self._updated, []
                self._resume(*done, updated=True)

    def _with_noise(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def evaluate() -> Any:  # the optimizer may move the parameters before each evaluation
            outer, self._updating, self._updated = (self._updating, self._updated), [], []
            self._resume(optimizer, updated=False)
            loss = closure()
            self.pause(optimizer)
            self._updating, self._updated = outer
            return loss

        return evaluate

    def _updates_module(self, optimizer: Optimizer) -> bool:
        """Returns whether the optimizer updates parameters of the module within a training step."""
        return self._in_step and not set(parameters_of(optimizer)).isdisjoint(self.trainer.lightning_module.parameters())

    def _perturb(self, batch: Any) -> Any:
        among: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if among != self._found_among:  # the learning rate finder removes callbacks for a while, and must not meet their noise
            self._found_among, self._callbacks = list(among), perturbing(self.trainer)
        for callback in self._callbacks:
            if callback.current_level != 0 and callback not in self._covering:
                batch = self._perturbations.enter_context(callback.training_perturbation(self.trainer, batch))
                self._covering += [callback] if callback.one_draw_per_batch else []
        return batch

    def _start_and_perturb(self, batch: Any, batch_idx: int) -> Any:
        self.fetched = batch_idx
        for callback in perturbing(self.trainer):
            if callback not in self._covering:
                callback.start_batch(self.trainer, batch, batch_idx)
        return self._perturb(batch)

    def _noisy_iterator(self, iterator: Iterator[Any]) -> _NoisyIterator:
        # the same object for a whole epoch, because a module may keep it
        if self._iterator is None or self._iterator.iterator is not iterator:
            # the iterator counts from 0 even if a run is resumed within an epoch
            first = self.trainer.fit_loop.epoch_loop.batch_idx
            self._iterator = _NoisyIterator(iterator, first, self._start_and_perturb)
        return self._iterator


class Replaying(ABC):
    """Interface of the callbacks that replay validation and test batches."""

    @abstractmethod
    def before_transfer(self, trainer: Trainer) -> None:
        """Prepares for a batch, before the transfer hooks and the callbacks see the batch."""

    @abstractmethod
    def after_callbacks(self, trainer: Trainer) -> None:
        """Prepares for a batch, after all callbacks and before the module's own hook."""

    @abstractmethod
    def replay(self, trainer: Trainer, step: Callable[..., Any], batch: Any, *indices: int) -> None:
        """Runs the step on noisy copies of the batch, without side effects."""


class EvaluationDispatcher:
    """Replaces ``strategy.validation_step`` or ``test_step`` and replays each batch.

    Replays come before the user's step, because that step may change the batch and the random streams. What transfer hooks and
    callbacks set for the batch belongs to the step, so they are watched: from ``precision_plugin.convert_input``, the first
    method that the loop calls with a batch, to the last callback of the trainer, which is added for the evaluation.
    """

    def __init__(self, trainer: Trainer, name: str):
        self.trainer = trainer
        self.name = name
        self.step = getattr(trainer.strategy, name)
        self._convert = trainer.precision_plugin.convert_input
        self._last = _Last(lambda: self._tell(Replaying.after_callbacks))

    @staticmethod
    def attach(trainer: Trainer, name: str) -> None:
        """Attaches a dispatcher to the step of this name, once."""
        if not isinstance(vars(trainer.strategy).get(name), EvaluationDispatcher):
            dispatcher: Any = EvaluationDispatcher(trainer, name)
            setattr(trainer.strategy, name, dispatcher)
            trainer.precision_plugin.convert_input = dispatcher._convert_input
            trainer.callbacks.append(dispatcher._last)  # type: ignore[attr-defined]

    @staticmethod
    def detach(trainer: Trainer) -> None:
        """Restores strategy, precision plugin and callbacks."""
        for name in ("validation_step", "test_step"):
            if isinstance(dispatcher := vars(trainer.strategy).get(name), EvaluationDispatcher):
                _put_back(trainer.strategy, name, dispatcher.step)
                _put_back(trainer.precision_plugin, "convert_input", dispatcher._convert)
                trainer.callbacks.remove(dispatcher._last)  # type: ignore[attr-defined]

    def __call__(self, batch: Any, *indices: int) -> Any:
        for callback in class_of_callbacks(self.trainer, Replaying):
            callback.replay(self.trainer, self.step, batch, *indices)
        return self.step(batch, *indices)

    def _convert_input(self, batch: Any) -> Any:
        self._tell(Replaying.before_transfer)
        return self._convert(batch)

    def _tell(self, event: Callable[[Any, Trainer], None]) -> None:
        for callback in class_of_callbacks(self.trainer, Replaying):
            getattr(callback, event.__name__)(self.trainer)


class _Last(Callback):
    """The last callback of a trainer, which calls a function before the module's own hook."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.function()

    on_test_batch_start = on_validation_batch_start


def wrap_closure(args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Any], Any]) -> Any:
    """Returns the arguments of an update with a wrapped closure, or ``None`` if the update has no closure."""
    if callable(closure := kwargs.get("closure")):
        return args, kwargs | {"closure": wrap(closure)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None


def parameters_of(*optimizers: Optimizer) -> list[Parameter]:
    """Returns the parameters of the optimizers, each once."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return list(dict.fromkeys(parameters))


def _put_back(owner: Any, name: str, original: Callable[..., Any]) -> None:
    delattr(owner, name)
    if getattr(owner, name) != original:  # it was an attribute of the instance
        setattr(owner, name, original)


class _NoisyIterator(Iterator[Any]):
    """Perturbs the batches that a ``training_step(dataloader_iter)`` fetches."""

    def __init__(self, iterator: Iterator[Any], first: int, perturb: Callable[[Any, int], Any]):
        self.iterator = iterator
        self._indices = itertools.count(first)
        self._perturb = perturb

    def __next__(self) -> tuple[Any, int, int]:
        batch, batch_idx, dataloader_idx = next(self.iterator)
        return self._perturb(batch, next(self._indices)), batch_idx, dataloader_idx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)
