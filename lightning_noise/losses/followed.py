"""Tensors that tell the active modes which torch functions receive them.

A ``TorchFunctionMode`` would slow down each torch call of the model. A subclass of a tensor is asked only by functions that
receive the tensor. So while a mode is active, the target, and what follows from it, get such a subclass in place: the object,
the memory and the values stay the same. Each function still gets its arguments as plain tensors.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_noise._tensor import without_overrides
from lightning_noise.loop.internals import set_check_of_compiled_inputs

__all__ = ["Mode", "active_modes", "as_plain", "call_seen", "find_tensors", "follow", "resume_modes", "suspend_modes"]


class Mode(ABC):
    """Interface of what is told of the torch functions that receive followed tensors."""

    @abstractmethod
    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a torch function, or something else in its place, and returns the output. The outer modes see the call, too."""

    @abstractmethod
    def see_backward(self, roots: Any) -> None:
        """Prepares for a backward pass from a tensor or several."""


_active: list[Mode] = []  # innermost last
_suspended: list[Mode] = []
_followed: list[weakref.ref[Tensor]] = []
_FOLLOWED_OF: dict[type[Tensor], type[Tensor]] = {}  # the subclass of each class of tensors
_PLAIN_OF: dict[type[Tensor], type[Tensor]] = {}
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})


def active_modes() -> tuple[Mode, ...]:
    """Returns the active modes, innermost first."""
    return tuple(reversed(_active))


def activate(mode: Mode, target: Tensor) -> None:
    if not _active:
        set_check_of_compiled_inputs(False)
    _active.append(mode)
    follow(target)


def deactivate(mode: Mode, tensors: Iterable[Tensor]) -> None:
    """Ends a mode that follows these tensors, and perhaps others."""
    (_active if mode in _active else _suspended).remove(mode)
    _followed.extend([weakref.ref(tensor) for tensor in tensors])  # compiled code may have made them
    if not (_active or _suspended):
        set_check_of_compiled_inputs(True)
        for tensor in [reference() for reference in _followed]:
            if tensor is not None:
                tensor.__class__ = _PLAIN_OF.get(type(tensor), type(tensor))
        _followed.clear()


def suspend_modes() -> None:
    """Keeps the active modes from seeing anything."""
    _suspended.extend(_active)
    _active.clear()


def resume_modes(root: Tensor) -> None:
    """Activates suspended modes again, for a backward pass from a tensor."""
    _active.extend(_suspended)
    _suspended.clear()
    for mode in _active:
        mode.see_backward(root)


def follow(tensor: Tensor) -> Tensor:
    """Returns the tensor, whose functions the active modes see from now on. Compiled code returns another object."""
    kind = type(tensor)
    if torch.compiler.is_compiling():
        return tensor if kind is _FOLLOWED else tensor.as_subclass(_FOLLOWED)
    if kind not in _PLAIN_OF:
        tensor.__class__ = _FOLLOWED_OF.get(kind) or _make_followed(kind)
        _followed.append(weakref.ref(tensor))
    return tensor


def as_plain(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """Returns a context in which no mode sees the functions of the followed tensors in values and nested lists and tuples."""
    return without_overrides() if torch.compiler.is_compiling() else _AsPlain(values)


class _AsPlain:
    def __init__(self, values: Iterable[Any]):
        self._tensors = _find_followed(values)

    def __enter__(self) -> None:
        for tensor, kind in self._tensors:
            tensor.__class__ = kind

    def __exit__(self, *exception: Any) -> None:
        for tensor, kind in self._tensors:
            tensor.__class__ = _FOLLOWED_OF[kind]


def _find_followed(values: Iterable[Any]) -> list[tuple[Tensor, type[Tensor]]]:
    """Returns followed tensors and their plain classes."""
    found = []
    for value in values:
        if (kind := _PLAIN_OF.get(type(value))) is not None:
            found.append((value, kind))
        elif isinstance(value, tuple | list):
            found += _find_followed(value)
    return found


def find_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors in values and nested lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += find_tensors(value)
    return found


def call_seen(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a torch function, which the active modes see; within a mode, these are the outer ones."""
    if not _active:
        with as_plain((*args, *kwargs.values())):
            return func(*args, **kwargs)
    mode = _active.pop()
    try:
        if _active or torch.compiler.is_compiling():
            return mode.see(func, args, kwargs)
        with as_plain((*args, *kwargs.values())):
            return mode.see(func, args, kwargs)
    finally:
        _active.append(mode)


def _dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    kwargs = kwargs or {}
    if func not in _BACKWARD:
        return call_seen(func, args, kwargs)
    for mode in _active:
        mode.see_backward(args[0])
    with as_plain((*args, *kwargs.values())):  # all modes stay active, because a checkpoint computes the loss again
        return func(*args, **kwargs)


def _make_followed(kind: type[Tensor]) -> type[Tensor]:
    made = type(kind)(kind.__name__, (kind,), {"__torch_function__": classmethod(_dispatch)})
    _FOLLOWED_OF[kind], _PLAIN_OF[made] = made, kind
    return made


_FOLLOWED = _make_followed(Tensor)
