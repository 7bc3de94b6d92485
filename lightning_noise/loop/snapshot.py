"""A module run in a state of its own, after which the module and the trainer are as they were.

What a step leaves behind lies in attributes, containers, buffers and metrics of the module. Of these only the contents are
exchanged and never the objects, because a module may hold one object in several places: the same metric as an attribute and in
a dict. Each state has tensors of its own, so that what is written in place never reaches those of the user.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_noise._tensor import like
from lightning_noise.batch import map_tensors
from lightning_noise.loop.dispatch import parameters_of
from lightning_noise.loop.internals import parameters_of_layer, private_attributes, rng_states, set_rng_states, state_of_run

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "Contents",
    "Silent",
    "State",
    "copy_batch",
    "restore_after",
    "restore_rng",
    "restore_trainer",
    "restore_weights",
]

Contents = list[tuple[Any, Any]]  # containers, each with what it holds

# generators and arrays are changed in place, too
_COPIED = (Tensor, np.ndarray, torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_ATOMS = {int, float, bool, str, type(None), Tensor, Parameter}  # what most attributes and lists hold
_NOT_STATE = private_attributes()
# objects of such classes are no state of a module, and through them one would come to the trainer and the data
_FOREIGN = {"torch", "pytorch_lightning", "lightning", "lightning_fabric"} | (
    sys.stdlib_module_names - {"abc", "builtins", "collections", "typing"}
)


class State:
    """What a module holds beside its parameters, at first a copy of what it holds now.

    It is reached through attributes, registered modules, lists, dicts, sets and objects of classes of the user. Learning rates
    and their schedulers belong to it, too.

    Args:
        trainer: The trainer of the module.
    """

    def __init__(self, trainer: Trainer):
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        self._roots = [trainer.lightning_module, *schedulers, *groups]
        self._contents = _copied(_contents(self._roots))

    def held(self) -> Contents:
        """What the module holds now, in its own objects."""
        return _contents(self._roots)

    @contextmanager
    def entered(self, before: Contents) -> Iterator[None]:
        """Puts the state into the module within, keeps what becomes of it there, and puts back what the module held.

        Args:
            before: What :meth:`held` returned; all replays of a batch share it.
        """
        try:
            _put(self._contents)
            yield
        finally:
            self._contents = self.held()
            _put(before)


@contextmanager
def restore_trainer(trainer: Trainer) -> Iterator[None]:
    """Restores random streams, gradients and what the trainer and the parts of it that log hold, after what is done within.

    Raises:
        RuntimeError: An optimizer would update the weights.
    """
    parameters = list(trainer.lightning_module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    kept = [(vars(part), dict(vars(part))) for part in state_of_run(trainer)]
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: _refuse(parameters, optimizer))
    with ExitStack() as stack:
        stack.callback(handle.remove)
        stack.callback(_put, kept)
        stack.enter_context(restore_rng())
        stack.callback(_set_gradients, parameters, gradients)
        _set_gradients(parameters, [None] * len(parameters))
        yield


@contextmanager
def restore_after(trainer: Trainer, module: LightningModule, *others: Any) -> Iterator[None]:
    """Restores what a trainer and a module hold, and the random streams, after a run within that leaves the weights alone.

    The module has a state of its own in that run. Its parameters are restored to the same tensors, wherever and to whatever
    precision the run moved them, with their gradients.

    Args:
        trainer: The trainer; of its strategy, and of the other objects, the attributes are restored.
        module: The module.
        *others: More objects that the run writes to, such as a data module; None is none.
    """
    held, state = _contents([module]), _insides(module.modules())
    weights = [(parameter, parameter.data, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    kept = _of_run(trainer) + [(vars(part), dict(vars(part))) for part in (trainer.strategy, *others) if part is not None]
    with restore_rng():
        try:
            _put(_copied(held))
            # a module that is moved moves the gradients that it has, in place
            _set_gradients([parameter for parameter, *_ in weights], [None] * len(weights))
            yield
        finally:
            for inside, before in state:
                inside.clear()
                inside.update(before)
            for contents in (kept, held):
                _put(contents)
            for parameter, data, gradient, requires_grad in weights:
                parameter.data = data
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)


@contextmanager
def restore_weights(kept: list[tuple[Parameter, Tensor, Tensor]]) -> Iterator[None]:
    """Restores weights that the module exchanges within, be it their values or their tensors.

    Args:
        kept: The parameters, each with its ``data`` and a copy of that.
    """
    try:
        yield
    finally:
        for parameter, data, values in kept:
            data.copy_(values)
            parameter.data = data


@contextmanager
def restore_rng(begin: dict[str, Any] | None = None) -> Iterator[None]:
    """Restores the global random streams of torch, numpy and Python, which may begin as they once were."""
    before = rng_states()
    try:
        if begin is not None:
            set_rng_states(begin)
        yield
    finally:
        set_rng_states(before)


def copy_batch(batch: Any) -> Any:
    """Returns the batch with tensors and containers of its own, so that a step may write to them.

    They are no inference tensors, because a step may differentiate with respect to them.
    """
    with torch.inference_mode(False), torch.no_grad():
        return map_tensors(batch, _clone)


class Silent:
    """Stands for a logger, or for a part of one: numbers and texts are those of the logger, and no call does anything."""

    def __init__(self, logger: Any):
        self._silenced = logger

    @property  # a module may ask which logger it is
    def __class__(self) -> type:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._silenced)

    def __getattr__(self, name: str) -> Any:
        if self._silenced is None:
            return Silent(None)
        value = getattr(self._silenced, name)  # a module may ask for what not every logger has
        return value if isinstance(value, str | int | float | None) else Silent(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Silent:
        return Silent(None)

    __getitem__ = __setitem__ = __enter__ = __call__

    def __exit__(self, *args: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())  # Python would ask `__getitem__` for ever

    def __fspath__(self) -> str:
        return tempfile.gettempdir()  # a module may make a path of what a call returned, and write there


def _insides(modules: Iterable[nn.Module]) -> Contents:
    """The attributes and parameters of modules, also those that are no state."""
    return [(inside, dict(inside)) for module in modules for inside in (vars(module), parameters_of_layer(module))]


def _of_run(trainer: Trainer) -> Contents:
    """What the trainer, its loops and its connectors hold, one within the other."""
    found: Contents = []
    seen: set[int] = set()
    stack: list[Any] = [trainer]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict | list):
            found.append((part, dict(part) if isinstance(part, dict) else list(part)))
        if part is trainer or _runs(part):
            found.append((vars(part), dict(vars(part))))
            stack.extend(vars(part).values())
    return found


def _runs(part: Any) -> bool:
    """Whether it is an object of Lightning's trainer or its loops."""
    package, *names = type(part).__module__.split(".")
    return (
        package in ("pytorch_lightning", "lightning")
        and not {"trainer", "loops"}.isdisjoint(names)
        and hasattr(part, "__dict__")
    )


def _container(value: Any) -> Any:
    """The container in which a value keeps its state, if it is one of those that have one."""
    if isinstance(value, list | dict | set | deque):
        return value
    if isinstance(value, nn.Module | LRScheduler | SimpleNamespace | Namespace):
        return vars(value)
    if not hasattr(value, "__dict__") or isinstance(value, (type, FunctionType, ModuleType, *_COPIED)):
        return None
    return None if any(map(_is_foreign, type(value).__mro__)) else vars(value)


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _FOREIGN


def _shared(kind: type) -> list[Any]:
    """The containers that classes of the user hold for all objects."""
    held = [item for base in kind.__mro__ if not _is_foreign(base) for item in vars(base).items()]
    return [value for name, value in held if isinstance(value, list | dict | set | deque) and not name.startswith("__")]


def _contents(values: list[Any]) -> Contents:
    """All containers that are reached from the values, each with what it holds."""
    found: dict[int, tuple[Any, Any]] = {}
    kinds: set[type] = set()
    stack = list(values)  # and what is found on the way, but for what fills long lists
    while stack:
        value = stack.pop()
        if isinstance(value, tuple):
            stack.extend(value)
        container = _container(value)
        if container is None or id(container) in found:
            continue
        held = _held(container)
        parts = held.values() if isinstance(held, dict) else held
        parts = [part for part in parts if type(part) not in _ATOMS]
        if isinstance(value, nn.Module) and _is_foreign(type(value)):  # a layer, to which nobody adds buffers or modules
            parts = [part for part in parts if type(part) is not dict or part]
        stack.extend(parts)
        found[id(container)] = container, held
        if type(value) not in kinds:
            kinds.add(type(value))
            stack.extend(_shared(type(value)))
    return list(found.values())


def _held(container: Any) -> Any:
    if not isinstance(container, dict):
        return list(container)
    if container.keys().isdisjoint(_NOT_STATE):  # the fast way for long ones
        return dict(container)
    return {key: value for key, value in container.items() if key not in _NOT_STATE}


def _copied(contents: Contents) -> Contents:
    """The same with tensors of their own; what was one tensor in two places is one tensor again."""
    memo: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(own, value))
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return value._make(map(own, value))  # type: ignore[attr-defined]
        if not isinstance(value, _COPIED) or isinstance(value, Parameter):
            return value
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            return value  # as one that is mapped from a file
        if id(value) not in memo:
            memo[id(value)] = _clone(value) if isinstance(value, Tensor) else copy.deepcopy(value)
        return memo[id(value)]

    with torch.inference_mode(False), torch.no_grad():
        return [
            (container, {k: own(v) for k, v in held.items()} if isinstance(held, dict) else [own(v) for v in held])
            for container, held in contents
        ]


def _put(contents: Contents) -> None:
    for container, held in contents:
        if isinstance(container, dict):
            present = _held(container)
            in_order = list(map(id, present)) == list(map(id, held))
            if in_order and all(map(is_, present.values(), held.values())):
                continue
            kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict  # the user's may refuse, or do more
            for key in [] if in_order else present:
                kind.__delitem__(container, key)
            for key, value in held.items():
                kind.__setitem__(container, key, value)
        elif isinstance(container, list):
            container[:] = held
        else:
            container.clear()
            container.extend(held) if isinstance(container, deque) else container.update(held)


def _clone(tensor: Tensor) -> Tensor:
    return like(tensor, tensor.detach().as_subclass(Tensor).clone())


def _set_gradients(parameters: list[Parameter], gradients: list[Any]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _refuse(parameters: list[Parameter], optimizer: Optimizer) -> None:
    if not set(parameters_of(optimizer)).isdisjoint(parameters):
        raise RuntimeError("a step that updates the weights in validation or test cannot be replayed by a ReplayMonitor")
