"""The arguments with which a module is called to predict a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch import Tensor

from lightning_noise._usage import nearest
from lightning_noise.batch import TARGETS, Path, Selector, find_inputs, format_path, get, is_sequence, leaves, write_access
from lightning_noise.loop.snapshot import copy_batch

__all__ = ["Arguments", "find_arguments", "write_arguments"]


class Arguments(NamedTuple):
    """The paths of the arguments of ``forward`` in a batch.

    Attributes:
        paths: The arguments without a name.
        named: The arguments with a name.
    """

    paths: list[Path]
    named: dict[str, Path]

    def call(self, module: Any, batch: Any) -> Any:
        """Returns the output of the module, which may write to its arguments."""
        arguments = [copy_batch(get(batch, path)) for path in self.paths]
        return module(*arguments, **{name: copy_batch(get(batch, path)) for name, path in self.named.items()})

    def write(self, batch: Any) -> str:
        """Returns the call as one types it."""
        texts = [f"batch{write_access(batch, path)}" for path in self.paths]
        return ", ".join([*texts, *(f"{name}=batch{write_access(batch, path)}" for name, path in self.named.items())])

    def are_same(self, batch: Any, other: Any) -> bool:
        """Returns whether two batches hold the very same arguments."""
        return all(get(batch, path) is get(other, path) for path in [*self.paths, *self.named.values()])


def find_arguments(module: Any, batch: Any, inputs: Selector | None, target: Path | None = None) -> Arguments:
    """Returns the arguments with which ``forward`` can be called.

    A mapping whose keys are the names of the parameters is called by name, with every parameter that is a key. If ``forward``
    also takes ``**kwargs``, it receives the whole mapping. The target is left out unless it is an input, too: a prediction must
    not know the target. A sequence with one tensor more than ``forward`` needs is called with all but the last, which is then
    the target. Otherwise the arguments are the inputs. Given ``inputs`` are always among the arguments.

    Example:
        >>> class Module:
        ...     def forward(self, ids, mask=None, label=None): ...
        >>> find_arguments(Module(), {"ids": 1, "mask": 2, "label": 3}, None, ("label",)).named
        {'ids': ('ids',), 'mask': ('mask',)}
    """
    required = _required(module)
    if isinstance(batch, Mapping):
        names = _names(module, batch)
        given = [path[0] for path in ([] if inputs is None else find_inputs(batch, inputs))]
        if names and {*required, *given} <= set(names):
            # without a target, a label is known by its name
            targets = [(name,) for name in TARGETS if name not in required] if target is None else [target]
            labels = [name for name in names if (name,) in targets and name not in given and len(names) > 1]
            if set(labels) & set(required):
                raise ValueError(
                    f"forward needs {labels[0]!r}, which is the target, so the prediction may know the target. If that is "
                    f"meant, type predict=lambda module, batch: module({_by_name(names).write(batch)}); if another leaf is the "
                    "target, type target=…"
                )
            return _by_name(name for name in names if name not in labels)
    elif takes_all_but_last(module, batch) and inputs is None:
        return Arguments([(i,) for i in range(len(required))], {})
    return Arguments(find_inputs(batch, inputs), {})


def takes_all_but_last(module: Any, batch: Any) -> bool:
    """Returns whether ``forward`` needs all tensors of a sequence but the last, and at least two, none of them the target."""
    required = _required(module)
    if len(required) < 2 or set(TARGETS) & set(required):
        return False
    return is_sequence(batch) and len(batch) == len(required) + 1 and all(isinstance(each, Tensor) for each in batch)


def write_arguments(module: Any, batch: Any, target: Path | None) -> str:
    """Returns the arguments to type for a ``forward`` that cannot be called with the inputs."""
    required = _required(module)
    if isinstance(batch, Mapping) and (names := _names(module, batch)) and set(required) <= set(names):
        return "**batch" if len(names) == len(batch) else _by_name(names).write(batch)
    is_free = not set(TARGETS) & set(required)  # whether no parameter is the target
    others = {format_path(path): path for path, _ in leaves(batch) if path and (path != target or not is_free)}
    if len(required) < 2 or not others:
        return "batch"
    chosen = [nearest(name, others) or list(others)[min(i, len(others) - 1)] for i, name in enumerate(required)]
    return ", ".join(f"batch{write_access(batch, others[name])}" for name in chosen)


_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def _by_name(names: Iterable[Any]) -> Arguments:
    return Arguments([], {name: (name,) for name in names})


def _names(module: Any, batch: Mapping[Any, Any]) -> list[Any]:
    """Returns the keys by which ``forward`` can be called."""
    parameters = _parameters(module)
    names = [name for name in parameters if name in batch and parameters[name].kind in _NAMED]
    takes_others = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    return list(batch) if takes_others and (names or len(parameters) == 1) else names


def _parameters(module: Any) -> Mapping[str, Parameter]:
    try:
        return signature(module.forward).parameters
    except (TypeError, ValueError):  # of a module that was compiled or scripted
        return {}


def _required(module: Any) -> list[str]:
    without = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = _parameters(module).items()
    return [name for name, each in parameters if each.default is Parameter.empty and each.kind not in without]
