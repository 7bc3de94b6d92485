"""Hooks that are registered for a while, beside those that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["prepended_hook", "reserve_ids"]


def reserve_ids(hooks: Mapping[int, Any]) -> None:
    """Keeps the next hook from taking the place of one of these.

    Hooks are known by a number, which a process that is spawned counts from 0 again; but the module that it gets has the hooks
    that it had before.

    Example:
        >>> module = nn.ReLU()
        >>> module._forward_hooks[RemovableHandle.next_id] = print
        >>> reserve_ids(module._forward_hooks)
        >>> handle = module.register_forward_hook(print)
        >>> len(module._forward_hooks)
        2
    """
    RemovableHandle.next_id = max([RemovableHandle.next_id, *(key + 1 for key in hooks)])


def prepended_hook(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Registers a hook of the gradient, to run before those that are there."""
    handle = parameter.register_hook(hook)
    hooks: Any = handle.hooks_dict_ref()
    hooks.update([(key, hooks.pop(key)) for key in list(hooks) if key != handle.id])
    return handle
