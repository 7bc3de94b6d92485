"""The arguments with which a module is called to predict a batch."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch import Tensor

from lightning_noise._usage import nearest
from lightning_noise.batch import Path, Selector, find_inputs, format_path, get, is_sequence, leaves, write_access
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


def find_arguments(module: Any, batch: Any, inputs: Selector | None) -> Arguments:
    """Returns the arguments with which ``forward`` can be called.

    A mapping whose keys are the names of the parameters is called by name, with every parameter that is a key. If ``forward``
    takes ``**kwargs`` alone, it receives the whole mapping. A sequence with one tensor more than ``forward`` needs is called
    with all but the last, which is then the target. Otherwise the arguments are the inputs. Given ``inputs`` are always among
    the arguments.

    Example:
        >>> class Module:
        ...     def forward(self, ids, mask=None): ...
        >>> find_arguments(Module(), {"ids": 1, "mask": 2, "label": 3}, None).named
        {'ids': ('ids',), 'mask': ('mask',)}
    """
    parameters = _parameters(module)
    required = [name for name, parameter in parameters.items() if _is_required(parameter)]
    if isinstance(batch, Mapping):
        names = [name for name in parameters if name in batch and parameters[name].kind in _NAMED]
        if len(parameters) == 1 and parameters[next(iter(parameters))].kind is Parameter.VAR_KEYWORD:
            names = list(batch)
        given = [] if inputs is None else [path[0] for path in find_inputs(batch, inputs)]
        if names and {*required, *given} <= set(names):
            return Arguments([], {name: (name,) for name in names})
    elif takes_all_but_last(module, batch) and inputs is None:
        return Arguments([(i,) for i in range(len(required))], {})
    return Arguments(find_inputs(batch, inputs), {})


def takes_all_but_last(module: Any, batch: Any) -> bool:
    """Returns whether ``forward`` needs all tensors of a sequence but the last, and at least two."""
    n = sum(map(_is_required, _parameters(module).values()))
    return n >= 2 and is_sequence(batch) and len(batch) == n + 1 and all(isinstance(each, Tensor) for each in batch)


def write_arguments(module: Any, batch: Any, target: Path | None) -> str:
    """Returns the arguments to type for a ``forward`` that cannot be called with the inputs."""
    required = [name for name, parameter in _parameters(module).items() if _is_required(parameter)]
    others = {format_path(path): path for path, _ in leaves(batch) if path and path != target}
    if len(required) < 2 or not others:
        return "batch"
    chosen = [nearest(name, others) or list(others)[min(i, len(others) - 1)] for i, name in enumerate(required)]
    return ", ".join(f"batch{write_access(batch, others[name])}" for name in chosen)


_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def _parameters(module: Any) -> Mapping[str, Parameter]:
    try:
        return signature(module.forward).parameters
    except (TypeError, ValueError):  # of a module that was compiled or scripted
        return {}


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
