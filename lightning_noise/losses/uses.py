"""Parts of a loss that depend on a target through a function that no mode transforms."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from lightning_noise.losses.tracker import ALIAS, CREATING, PICKING, Tracker, find_functions, find_tensors

__all__ = ["Uses"]


class _Content(IntEnum):
    """What a tensor that depends on the labels contains. A function of several tensors keeps the largest."""

    POSITIONS = 1  # which labels differ from a number, as a mask of padding does
    CLASS = 2  # which labels equal a number: a class, or padding
    LABELS = 3  # labels, one-hot rows, entries of a table at the labels


class Uses:
    """Finds the functions that join the labels and a tensor with a gradient, and that the loss needs.

    A metric joins labels and predictions, too, but no gradient flows back through a metric. So a function counts only if
    the backward pass reaches the function. These never count: an order of the labels, a statistic of all labels of the batch,
    and a mask that leaves out padding.

    Args:
        tracker: The tracker of the target, which also knows the tensors that this object follows.
        weights: Whether to count weights of the labels that are multiplied by a transformed loss, and samples of a class
            that are picked for a loss.
        tokens: Whether to count an embedding of sequences of labels, such as that of a decoder that reads the previous labels.
    """

    def __init__(self, tracker: Tracker, *, weights: bool, tokens: bool):
        self._found: dict[str, None] = {}
        self._weights = weights
        self._tokens = tokens
        self._tracker = tracker
        self._batch = tracker.target.shape[:1]
        # by identity, with a weak reference, because Python reuses the identity of a freed object
        self._contents: dict[int, tuple[weakref.ref[Tensor], _Content]] = {}
        self._losses: dict[int, weakref.ref[Tensor]] = {}
        self._loss_nodes: set[Node] = set()
        self._candidates: list[tuple[Node, str, _Content]] = []
        self._add(tracker.target, _Content.LABELS)

    def add_loss(self, loss: Tensor) -> None:
        """Adds a transformed loss, or a function of transformed losses alone."""
        self._losses[id(loss)] = weakref.ref(loss)
        self._tracker.add(loss)
        if loss.grad_fn is not None:
            self._loss_nodes.add(loss.grad_fn)

    def see(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Follows a function and the tensors that the function has made."""
        outputs = args[:1] if func is Tensor.__setitem__ else output if isinstance(output, tuple | list) else [output]
        made = [item for item in outputs if isinstance(item, Tensor)]
        if not made:
            return
        tensors = find_tensors([*args, *kwargs.values()])
        contents = [content for tensor in tensors if (content := self._find(tensor)) is not None]
        learned = [tensor for tensor in tensors if tensor.requires_grad and self._find(tensor) is None]
        of_loss = bool(learned) and all([self._is_loss(tensor) for tensor in learned])
        if not contents and not of_loss:
            return
        content = self._content_of(func, tensors, [*args, *kwargs.values()], max(contents)) if contents else None
        for i, item in enumerate(made):
            if item.requires_grad and learned:
                if of_loss:
                    self.add_loss(item)
                if content is not None and item.grad_fn is not None and self._counts(func, tensors, content, of_loss):
                    self._candidates.append((item.grad_fn, f"{_name(func)} in {_find_caller()}", content))
            elif content is not None and not (func in _SORTING and i == 1) and not self._is_statistic(func, item):
                self._add(item, content)

    def trace(self, roots: list[Node]) -> list[str]:
        """Returns the functions that a backward pass from these or earlier roots needs, each with the place of the call."""
        if self._candidates:
            beside = _reach(roots, self._loss_nodes)  # not through a transformed loss
            reached = _reach(roots, frozenset())
            for node, name, content in self._candidates:
                # what a mask of the labels does to the inputs of the loss, such as attention, is no loss of its own
                if node in (reached if content == _Content.LABELS else beside):
                    self._found.setdefault(name)
        return list(self._found)

    def _counts(self, func: Any, tensors: list[Tensor], content: _Content, of_loss: bool) -> bool:
        if of_loss:
            return self._weights and content > _Content.POSITIONS
        if func is F.embedding and tensors[0].ndim > 1:
            return self._tokens
        return True

    def _content_of(self, func: Any, tensors: list[Tensor], arguments: list[Any], content: _Content) -> _Content | None:
        """Returns what the output of a function of the labels contains, or ``None`` if no label can be told from the output."""
        first = self._find(tensors[0])
        is_itself = func in _COMPARING and len(tensors) == 2 and tensors[0] is tensors[1]  # whether a label is NaN
        if func in CREATING or func in _KNOWING or is_itself:
            return None
        if func in _SHAPING:
            return first
        if func in _COMPARING and len(tensors) == 1:
            return _compare(func, tensors[0], next(item for item in arguments if not isinstance(item, Tensor)))
        if func in _NEGATING and content == _Content.CLASS:
            return _Content.POSITIONS
        if self._weights and func in PICKING and first is None and content == _Content.CLASS:
            return _Content.LABELS  # samples of one class, which weigh 1 and all others 0
        fills = func in _FILLING or (func in PICKING and content == _Content.POSITIONS)
        if fills and first is None and content < _Content.LABELS:
            return None  # padding is filled or left out
        return content

    def _is_statistic(self, func: Any, item: Tensor) -> bool:
        return func in _COUNTING or (func in _REDUCING and item.shape[:1] != self._batch)

    def _find(self, tensor: Tensor) -> _Content | None:
        reference, content = self._contents.get(id(tensor), (None, None))
        return content if reference is not None and reference() is tensor else None

    def _is_loss(self, tensor: Tensor) -> bool:
        reference = self._losses.get(id(tensor))
        return reference is not None and reference() is tensor

    def _add(self, tensor: Tensor, content: _Content) -> None:
        self._contents[id(tensor)] = weakref.ref(tensor), content
        self._tracker.add(tensor)


def _compare(func: Any, labels: Tensor, number: float) -> _Content | None:
    if number < 0 or (number == 0 and func in _SPLITTING_AT_ZERO and not labels.is_floating_point()):
        return None  # all classes are on one side
    if number % 1:
        return _Content.LABELS
    return _Content.CLASS if func in _EQUAL else _Content.POSITIONS


def _reach(roots: list[Node], ends: Iterable[Node]) -> set[Node]:
    """Returns the nodes that a backward pass reaches, if the pass ends at the given nodes."""
    reached, left = set(roots), [node for node in roots if node not in ends]
    while left:
        for node, _ in left.pop().next_functions:
            if node is not None and node not in reached:
                reached.add(node)
                if node not in ends:
                    left.append(node)
    return reached


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _find_caller() -> str:
    """Returns the function that called torch, with its place."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})" if frame else "torch"


_OWN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
# the output is an order, or its second part is
_SORTING = find_functions("sort")
_COMPARING = find_functions("eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__")
_EQUAL = find_functions("eq __eq__")
_SPLITTING_AT_ZERO = find_functions("lt ge __lt__ __ge__")
_NEGATING = find_functions("logical_not __invert__ bitwise_not")
_FILLING = find_functions("masked_fill masked_fill_ __setitem__")
# whether a label is known, and the order of labels
_KNOWING = find_functions("isnan isfinite isinf argsort") | {ALIAS}
# the first argument alone gives the values
_SHAPING = find_functions("expand_as reshape_as view_as to type type_as")
_COUNTING = find_functions("bincount histc unique unique_consecutive")
_REDUCING = find_functions("all amax amin any count_nonzero max mean min prod std sum var")
