"""Snapshots of what a module and its trainer hold, to run a step without side effects.

A step writes to attributes, containers, buffers and metrics of the module. A snapshot exchanges the contents of these objects
and never the objects, because hooks, closures, optimizers and compiled code refer to them. A deep copy of the module would
yield other objects, and would copy everything that the module refers to, such as the data set.
"""

from __future__ import annotations

import copy
import random
import sys
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from types import FunctionType, MappingProxyType, MemberDescriptorType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_noise._tensor import detached, like, without_overrides
from lightning_noise.batch import map_tensors
from lightning_noise.loop.dispatch import parameters_of
from lightning_noise.loop.internals import (
    parameters_of_layer,
    private_attributes,
    return_to_rng_states,
    rng_states,
    state_of_run,
    wraps_tensors,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "Change",
    "Contents",
    "State",
    "clone",
    "copy_batch",
    "copy_leaves",
    "find_contents",
    "is_shared",
    "put",
    "restore_after",
    "restore_rng",
    "restore_trainer",
    "set_entry",
    "views",
]

Contents = list[tuple[Any, Any]]
"""Containers, each with its contents: a dict for a dict or an object with slots, a list for any other."""

_CONTAINERS = (list, dict, set, deque)
# values that are changed in place
_COPIED = (Tensor, np.ndarray, torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
# values that lead to no container, which most attributes and long lists hold
_ATOMS = {int, float, bool, str, type(None), Tensor, Parameter}
_NOT_STATE = private_attributes()
# objects of these packages hold no state of the module, but refer to the trainer and the data
_FOREIGN = {"torch", "pytorch_lightning", "lightning", "lightning_fabric"} | (
    sys.stdlib_module_names - {"abc", "builtins", "collections", "typing"}
)


class Change(NamedTuple):
    """What was changed in a container.

    Attributes:
        container: The container.
        new: The entries of a dict that were set, or the elements that were added to another container.
        removed: The keys that were removed from a dict. ``None`` if ``new`` are all the contents.
    """

    container: Any
    new: Any
    removed: Collection[Any] | None = ()

    def merge(self, own: Any, new: Any) -> Any:
        """Returns the contents of the container in another state; ``own`` is ``None`` if that state lacks the container."""
        if own is None or self.removed is None:
            return new
        if isinstance(own, dict):
            return {key: value for key, value in own.items() if key not in self.removed} | new
        return [*own, *new]


class State:
    """The state of a module apart from its parameters; at first a copy of what the module holds.

    The state is what attributes, registered modules, lists, dicts, sets and objects of the user's classes refer to, and the
    learning rates with their schedulers.
    """

    def __init__(self, trainer: Trainer):
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        self._roots = [trainer.lightning_module, *schedulers, *groups]
        self._contents = _guard_iterators(copy_leaves(find_contents(self._roots)))

    def current(self) -> Contents:
        """Returns what the module holds now."""
        return find_contents(self._roots)

    def take_over(self, changes: Sequence[Change], copies: Mapping[int, Any]) -> None:
        """Makes changes of the module in this state, too; ``copies`` stand for the leaves with these ids."""
        own = {id(container): (container, held) for container, held in self._contents}
        new = copy_leaves([(change.container, change.new) for change in changes], copies)
        for change, (container, entries) in zip(changes, new, strict=True):
            own[id(container)] = container, change.merge(own.get(id(container), (None, None))[1], entries)
        self._contents = list(own.values())

    @contextmanager
    def entered(self, before: Contents) -> Iterator[None]:
        """Puts this state into the module, and then takes the changed state out; ``before`` is from :meth:`current`."""
        try:
            put(self._contents)
            yield
        finally:
            self._contents = self.current()
            put(before)


@contextmanager
def restore_trainer(trainer: Trainer, rng: dict[str, Any] | None = None) -> Iterator[None]:
    """Restores what a step changes outside the module: random streams, gradients, and attributes of the trainer.

    The step begins without gradients. ``rng`` are the current random streams, if they are known.

    Raises:
        RuntimeError: An optimizer is about to update the weights.
    """
    parameters = list(trainer.lightning_module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    attributes = [(vars(part), dict(vars(part))) for part in state_of_run(trainer)]

    def refuse_update(optimizer: Optimizer, *_: Any) -> None:
        if not set(parameters_of(optimizer)).isdisjoint(parameters):
            raise RuntimeError(
                "ReplayMonitor cannot replay a step that updates the weights in validation or test; "
                "use a RobustnessMonitor, or update the weights in training alone"
            )

    handle = register_optimizer_step_pre_hook(refuse_update)
    with restore_rng(rng):
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            put(attributes)
            handle.remove()


@contextmanager
def restore_after(trainer: Trainer, module: LightningModule, *others: Any) -> Iterator[None]:
    """Restores trainer, module, random streams and the attributes of other objects after a run that does not train.

    The run begins with a copy of the module's state and without gradients. Parameters become the same tensors again, even if
    the run moved them to another device or precision. The values of the weights are not copied.
    """
    state = find_contents([module])
    layers = [held for part in module.modules() for held in (vars(part), parameters_of_layer(part))]  # hooks, too
    parts = [vars(part) for part in (trainer.strategy, *others) if part is not None]
    before = [*((held, dict(held)) for held in layers + parts), *_find_run(trainer), *state]
    weights = [(parameter, parameter.data, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    with restore_rng():
        try:
            put(copy_leaves(state))
            for parameter, *_ in weights:
                parameter.grad = None  # moving a module would move its gradients in place
            yield
        finally:
            put(before)
            for parameter, data, gradient, requires_grad in weights:
                parameter.data = data
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)


@contextmanager
def restore_rng(before: dict[str, Any] | None = None) -> Iterator[None]:
    """Restores the global random streams of torch, numpy and Python, also after an exception.

    Args:
        before: The states of the streams, if they are known.
    """
    before = before or rng_states()
    try:
        yield
    finally:
        return_to_rng_states(before)


def copy_batch(batch: Any) -> Any:
    """Returns the batch with new tensors and containers, to which a step may write.

    The new tensors are no inference tensors, because a step may differentiate with respect to them.
    """
    with torch.inference_mode(False), torch.no_grad():
        return map_tensors(batch, clone)


def find_contents(roots: list[Any]) -> Contents:
    """Returns all containers to which the roots lead, with their contents."""
    found: dict[int, tuple[Any, Any]] = {}
    classes: set[type] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if isinstance(value, tuple):
            stack.extend(value)
        containers = [container for container in _containers(value) if id(container) not in found]
        for container in containers:
            held = _held(container)
            found[id(container)] = container, held
            if not _ATOMS.issuperset(map(type, _parts(held))):  # a vocabulary or a long list of numbers takes no time
                stack.extend(part for part in _parts(held) if type(part) not in _ATOMS)
        if containers and type(value) not in classes:  # a class of the user may hold containers that its objects share
            classes.add(type(value))
            own = [item for each in type(value).__mro__ if not _is_foreign(each) for item in vars(each).items()]
            stack.extend(part for name, part in own if isinstance(part, _CONTAINERS) and not name.startswith("__"))
    return list(found.values())


def _containers(value: Any) -> list[Any]:
    """Returns the containers in which a value keeps its state. An object with slots is a container itself."""
    if isinstance(value, _CONTAINERS):
        return [value]
    if isinstance(value, nn.Module | LRScheduler | SimpleNamespace | Namespace):
        return [vars(value)]
    if isinstance(value, (type, FunctionType, ModuleType, *_COPIED)) or any(map(_is_foreign, type(value).__mro__)):
        return []
    own = [vars(value)] if hasattr(value, "__dict__") else []
    return [*own, value] if _slots(type(value)) else own


@lru_cache(maxsize=1000)
def _slots(kind: type) -> tuple[str, ...]:
    """Returns the names of the slots of objects of a class in Python."""
    own = [vars(each) for each in kind.__mro__ if "__slots__" in vars(each)]
    return tuple(name for members in own for name, item in members.items() if isinstance(item, MemberDescriptorType))


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _FOREIGN


def _held(container: Any) -> Any:
    if isinstance(container, dict):
        return {key: value for key, value in container.items() if key not in _NOT_STATE}
    if isinstance(container, _CONTAINERS):
        return list(container)
    return {name: getattr(container, name) for name in _slots(type(container)) if hasattr(container, name)}


def _parts(held: Any) -> Any:
    return held.values() if isinstance(held, dict) else held


def copy_leaves(contents: Contents, copies: Mapping[int, Any] = MappingProxyType({})) -> Contents:
    """Copies tensors, arrays and generators, also within tuples; all else is shared. A leaf in two places is copied once.

    ``copies`` are those that exist already, by the ``id`` of their leaf.
    """
    memo = dict(copies)
    stack = [part for _, held in contents for part in _parts(held)]
    with torch.inference_mode(False), torch.no_grad():
        while stack:
            value = stack.pop()
            if isinstance(value, tuple):
                stack.extend(value)
            elif is_shared(value):
                memo[id(value)] = value
            elif isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = clone(value)
        copied = partial(copy.deepcopy, memo=memo)
        return [
            (container, {key: copied(part) for key, part in held.items()} if isinstance(held, dict) else copied(held))
            for container, held in contents
        ]


def _guard_iterators(contents: Contents) -> Contents:
    """Returns contents in which no item of an iterator can be fetched; objects of the user's classes are restored anyway."""

    def guard(value: Any) -> Any:
        return _Once(value) if isinstance(value, Iterator) and not _containers(value) else value

    return [
        (container, {key: guard(part) for key, part in held.items()} if isinstance(held, dict) else [*map(guard, held)])
        for container, held in contents
    ]


class _Once(Iterator):
    """Stands in a replay for an iterator that the module holds."""

    def __init__(self, iterator: Iterator[Any]):
        self._iterator = iterator

    def __next__(self) -> Any:
        raise RuntimeError(
            f"ReplayMonitor cannot replay a step that fetches from the {type(self._iterator).__name__} that the module holds, "
            "which gives each item only once; keep the items in a list, or use a RobustnessMonitor"
        )


def is_shared(value: Any) -> bool:
    """Returns whether copies of the state share the value, because nothing changes the value in place."""
    is_mapped = isinstance(value, np.ndarray) and not value.flags.writeable  # a file, perhaps larger than the memory
    return is_mapped or isinstance(value, Parameter) or not isinstance(value, _COPIED)


def put(contents: Contents) -> None:
    """Gives each container its contents."""
    for container, held in contents:
        if isinstance(container, dict):
            # the methods of a subclass may refuse, or do more
            kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
            present = _held(container)
            if list(map(id, present)) != list(map(id, held)):
                for key in present:
                    kind.__delitem__(container, key)
            for key, value in held.items():
                kind.__setitem__(container, key, value)
        elif not isinstance(container, _CONTAINERS):
            for name in _held(container).keys() - held.keys():
                object.__delattr__(container, name)
            for name, value in held.items():
                set_entry(container, name, value)
        else:
            items: Any = container
            items.clear()
            (items.update if isinstance(items, set) else items.extend)(held)


def set_entry(container: Any, key: Any, value: Any) -> None:
    """Sets an entry of a dict, or a slot of an object, which may be frozen."""
    if isinstance(container, dict):
        dict.__setitem__(container, key, value)
    else:
        object.__setattr__(container, key, value)


def views(container: Any) -> tuple[Collection[Any], ...]:
    """Returns collections that hold what a container holds, now and later."""
    if isinstance(container, dict):
        return dict.keys(container), dict.values(container)
    return (container if isinstance(container, _CONTAINERS) else _Slots(container),)


class _Slots(Collection):
    """The values in the slots of an object."""

    def __init__(self, owner: Any):
        self._owner = owner

    def __contains__(self, value: Any) -> bool:
        return value in _held(self._owner).values()

    def __len__(self) -> int:
        return len(_held(self._owner))

    def __iter__(self) -> Iterator[Any]:
        return iter(_held(self._owner).values())


def clone(tensor: Tensor) -> Tensor:
    """Returns a copy that shares no memory, by no method that a subclass may override."""
    if wraps_tensors(tensor):
        with without_overrides():
            return Tensor.clone(Tensor.detach(tensor)).requires_grad_(tensor.requires_grad)
    return like(tensor, detached(tensor).clone())


def _find_run(trainer: Trainer) -> Contents:
    """Returns the attributes of the trainer, its loops and its connectors, and the dicts and lists in these attributes."""
    found: dict[int, tuple[Any, Any]] = {}
    stack: list[Any] = [trainer]
    while stack:
        part = stack.pop()
        has_attributes = part is trainer or _is_loop(part)
        if id(part) not in found and (has_attributes or isinstance(part, dict | list)):
            container = vars(part) if has_attributes else part
            found[id(part)] = container, copy.copy(container)
            stack.extend(vars(part).values() if has_attributes else ())
    return list(found.values())


def _is_loop(part: Any) -> bool:
    """Returns whether the object is one of Lightning's loops or connectors."""
    package, *names = type(part).__module__.split(".")
    is_lightning = package in ("pytorch_lightning", "lightning")
    return is_lightning and not {"trainer", "loops"}.isdisjoint(names) and hasattr(part, "__dict__")
