"""Tensors that torch functions derive from a target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ALIAS", "CREATING", "PICKING", "Tracked", "Tracker", "find_functions", "find_tensors"]


class Tracked(NamedTuple):
    """A tensor that derives from the target, with the tensors that are paired with it.

    Each function of the target is applied to the ``labels``, too. The ``share`` has the shape ``()``, or a number for each
    element of the target, which moves with the element.
    """

    target: Tensor
    labels: Any = None
    share: Any = None


class Tracker:
    """Tracks the tensors that torch functions derive from a target.

    The output of a function is tracked if all its tensor arguments are. If the function picks, fills or converts elements,
    the first argument decides alone, because an index or a mask may come from elsewhere. ``zeros_like`` of the target is not
    tracked. The tracker knows tensors by identity and keeps them alive, because Python reuses the identity of a freed object.
    """

    def __init__(self, target: Tensor, labels: Tensor | None = None, share: Tensor | None = None):
        self.target = target
        self._entries = [Tracked(target, labels, share)]
        self._identities = {id(target)}
        self._is_complete = True  # whether the identities are those of all entries; a compiler knows no identity

    def find(self, tensor: Any) -> Tracked | None:
        """Returns the entry of a tensor, or ``None`` if the tensor is not tracked."""
        for entry in self._entries:
            if entry.target is tensor:
                return entry
        return None

    def add(self, tensor: Tensor) -> None:
        """Adds a tensor to those that :meth:`may_contain` looks for."""
        self._identities.add(id(tensor))

    def may_contain(self, values: Iterable[Any]) -> bool:
        """Returns whether nested lists and tuples may contain a tensor that derives from the target."""
        for value in values:
            if id(value) in self._identities or (isinstance(value, (tuple, list)) and self.may_contain(value)):
                return True
        return not self._is_complete

    def track(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Tracks the output of a torch function if it derives from tracked tensors."""
        outputs = _to_tuple(output)
        made = [item for item in outputs if isinstance(item, Tensor)]
        learned = len(made) > 0 and made[0].requires_grad and not self._entries[0].target.requires_grad
        # a function that returns None may write into the target, as an assignment to an index does
        if learned or not (made or output is None) or func in CREATING or func is ALIAS:
            return
        # the condition of where only chooses between the operands
        operands = find_tensors([*(args[1:] if func is torch.where else args), *kwargs.values()])
        sources = [self.find(tensor) for tensor in (operands[:1] if func in PICKING or func in _KEEPING else operands)]
        if not sources or any([source is None for source in sources]):
            return
        labels = self._derive_labels(func, args, kwargs, output)
        shares = self._derive_shares(func, args, kwargs, outputs, sources)
        for item, label, share in zip(outputs, labels, shares, strict=True):
            # the unique values of the labels may be more or fewer than those of the target
            if isinstance(item, Tensor) and self.find(item) is None and (label is None or label.shape == item.shape):
                self._entries.append(Tracked(item, label, share))
                if torch.compiler.is_compiling():
                    self._is_complete = False
                else:
                    self.add(item)

    def _derive_labels(self, func: Any, args: Any, kwargs: Any, output: Any) -> tuple[Any, ...]:
        if self._entries[0].labels is None:
            return (None,) * len(_to_tuple(output))
        labels = self._apply(func, args, kwargs, "labels")
        mask = self.find(args[1]) if func in PICKING and len(args) == 2 else None
        if mask is not None and mask.target.dtype == torch.bool:
            # the label of the target replaces a label that a mask of the labels would not pick
            labels = torch.where(func(mask.labels, args[1]), labels, output)
        return _to_tuple(labels)

    def _derive_shares(self, func: Any, args: Any, kwargs: Any, outputs: tuple[Any, ...], sources: Any) -> tuple[Any, ...]:
        share = sources[0].share
        if share is None or share.ndim == 0:
            return (share,) * len(outputs)
        if func in _MOVING:
            return _to_tuple(self._apply(func, args, kwargs, "share"))
        if func not in _ELEMENTWISE:  # the function may have moved the elements anywhere
            return (share.new_empty(0),) * len(outputs)
        wider = [isinstance(item, Tensor) and item.shape[:-1] == share.shape for item in outputs]  # by one-hot encoding
        return tuple(share.unsqueeze(-1).expand(outputs[i].shape) if wide else share for i, wide in enumerate(wider))

    def _apply(self, func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """Applies a function to the paired tensors of its tracked arguments."""
        if func in PICKING:  # at the positions that are picked from the target
            return func(self._exchange(args[0], name), *args[1:], **kwargs)
        func = _RESHAPING.get(func, func)
        return func(*self._exchange(args, name), **{key: self._exchange(item, name) for key, item in kwargs.items()})

    def _exchange(self, value: Any, name: str) -> Any:
        """Replaces each tracked tensor in an argument by the tensor that is paired with it."""
        if isinstance(value, Tensor):
            entry = self.find(value)
            return value if entry is None else getattr(entry, name)
        if isinstance(value, tuple | list):
            items = [self._exchange(item, name) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value


# A loss that was transformed gets its target as an alias, which is not tracked, so that no mode transforms the loss again.
ALIAS = torch.ops.aten.alias.default


def find_functions(names: str) -> frozenset[Any]:
    """Returns the functions and methods of torch with these names. A compiler does not know the name of a function."""
    found = [getattr(owner, name) for name in names.split() for owner in (torch, Tensor) if hasattr(owner, name)]
    # a mode receives the getter of a property; names such as torch.float are dtypes
    return frozenset(item if callable(item) else item.__get__ for item in found if not isinstance(item, torch.dtype))


# the first argument decides, and the other tensors only say where or how
PICKING = find_functions("__getitem__ gather index_select masked_select take_along_dim")
_KEEPING = find_functions("__setitem__ expand_as masked_fill masked_fill_ reshape_as to type_as view_as")
# elements are moved and not changed
_MOVING = find_functions(
    "T mT broadcast_to cat chunk concat contiguous diagonal expand expand_as flatten flip fliplr flipud hsplit hstack "
    "moveaxis movedim narrow permute ravel repeat repeat_interleave reshape reshape_as roll rot90 select split squeeze stack "
    "swapaxes swapdims t tensor_split tile transpose vsplit unbind unflatten unfold unsqueeze view view_as vstack"
) | {F.pad, *PICKING}
# elements stay where they are
_ELEMENTWISE = find_functions(
    "__and__ __invert__ __or__ __setitem__ add byte clamp clamp_max clamp_min clip clone detach div double eq float ge gt half "
    "int le logical_and logical_not logical_or long lt masked_fill masked_fill_ mul ne remainder requires_grad_ short sub to "
    "type type_as where __add__ __eq__ __ge__ __gt__ __le__ __lt__ __mul__ __ne__ __sub__ __radd__ __rmul__ __rsub__ __mod__ "
    "floor_divide __floordiv__ alias bool bfloat16 char"
) | {F.one_hot, Tensor.cpu, Tensor.cuda}
# paired tensors may have other strides than the target, which view would refuse
_RESHAPING: dict[Any, Any] = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
# the output takes the shape of the argument, but not its values
CREATING = find_functions(
    " ".join(name for name in {*dir(torch), *dir(Tensor)} if name.endswith("_like") or name.startswith("new_"))
)


def find_tensors(value: Any) -> list[Tensor]:
    """Returns the tensors in nested lists and tuples."""
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in find_tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _to_tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)
