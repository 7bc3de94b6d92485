"""What to type in place of a call that cannot be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

__all__ = ["UNKNOWN_END", "Guided", "Value", "match", "name_of", "nearest", "typed", "with_types", "write_call"]

T = TypeVar("T")

_MODULES = ("noise", "schedules", "labels", "tasks", "rules")
# what arguments are called elsewhere
_HABITS = {
    "probability": "p prob",
    "level": "sigma stddev std scale alpha amount strength magnitude rate eps smoothing label_smoothing snr",
    "until": "end stop",
    "n_classes": "num_classes",
    "modules": "layer layers module",
    "params": "layer layers parameters weights",
    "inputs": "input key keys",
    "weights": "p probs probabilities",
    "factor": "scale",
    "exponent": "alpha beta",
    "sample_rate": "rate sr fs sampling_rate",
    "target": "label labels y",
    "every_n_epochs": "every",
}
# what to type for an argument that is missing
_EXAMPLES = {
    "noise": "noise.Gaussian()",
    "level": "0.1",
    "sigma": "0.25",
    "start": "0.0",
    "end": "0.5",
    "size": "8",
    "noises": "[noise.Gaussian(), noise.Uniform()]",
    "factor": "0.5",
    "bank": "'recordings', sample_rate=16000",
    "function": "lambda sample, level: …",
    "every": "2",
}
# why a share of the run is not known
UNKNOWN_END = (
    "the end is unknown: type Trainer(max_steps=…), or max_epochs=… and, if the training loader has no length, "
    "limit_train_batches=…"
)
_COPIED = ...  # stands for the arguments of a copy


class _InitSignature:
    """The signature of a class as that of its ``__init__``; some releases of Python would take that of ``__new__``."""

    def __get__(self, instance: Any, owner: type) -> Signature:
        if instance is not None:  # a noise is called as its ``__call__`` is
            raise AttributeError("__signature__")
        init = _signature(owner)
        return init.replace(parameters=list(init.parameters.values())[1:])


class Guided:
    """Base of the values and callbacks, which say what to type if they are called with other arguments."""

    if not TYPE_CHECKING:  # a type checker reads the arguments of __init__
        __signature__ = _InitSignature()

        def __new__(cls, *args, **kwargs):
            if not (args and args[0] is _COPIED):
                try:
                    _signature(cls).bind(None, *args, **kwargs)
                except TypeError as error:
                    raise TypeError(f"{name_of(cls)}: {error}; type {cls._advise(args, kwargs)}") from None
            return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (_COPIED,)

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Returns the call that the arguments seem to mean."""
        return write_call(cls, match(cls, args, kwargs))


def with_types(base: type[T]) -> type[T]:
    """Evaluates the annotations of a base class.

    jsonargparse evaluates them with the names of the module of a subclass. If that module lacks one of them, such as
    ``ClassVar``, the arguments of the subclass have no types in a configuration file.
    """
    types = get_type_hints(base)
    base.__annotations__ = {name: types[name] for name in base.__annotations__}
    return base


@with_types
class Value(Guided):
    """A value that is used within a callback.

    Attributes:
        usage: The callback to type, with a place for the value.
    """

    usage: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        if name == "setup" or name.startswith("on_"):  # Lightning calls the hooks of all callbacks
            raise AttributeError(f"{typed(self)} is not a callback; type callbacks=[{self.usage.format(typed(self))}]")
        return object.__getattribute__(self, name)


def typed(value: Any, **changes: Any) -> str:
    """Returns a value as one types it, without the fields that have their default.

    Example:
        >>> from lightning_noise.schedules import Linear
        >>> typed(Linear(0.0, 0.5, until=0.6), unit="epoch")
        "schedules.Linear(0.0, 0.5, until=0.6, unit='epoch')"
    """
    if type(value) is list or (type(value) is tuple and any(isinstance(each, Value) for each in value)):
        return f"[{', '.join(map(typed, value))}]"
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown: dict[str, Any] = {field.name: getattr(value, field.name) for field in fields(value)} | changes
    defaults = {field.name: field.default for field in fields(value)}
    given = {name: each for name, each in shown.items() if defaults[name] is MISSING or each != defaults[name]}
    return write_call(type(value), given)


def name_of(cls: type) -> str:
    """Returns the name by which a class is typed, such as ``"noise.Gaussian"``."""
    package, module = (*cls.__module__.split("."), "")[:2]
    return f"{module}.{cls.__name__}" if package == "lightning_noise" and module in _MODULES else cls.__name__


def write_call(cls: type, given: Mapping[str, Any]) -> str:
    """Returns a call, with an example of each argument that is missing.

    Example:
        >>> from lightning_noise.noise import PatchGaussian
        >>> write_call(PatchGaussian, {})
        'noise.PatchGaussian(8)'
    """
    texts = []
    for name, parameter in list(_signature(cls).parameters.items())[1:]:
        is_required = parameter.default is Parameter.empty
        if name in given or is_required or name == "level":
            text = typed(given[name]) if name in given else _EXAMPLES.get(name, "…")
            texts.append(text if is_required and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD else f"{name}={text}")
    return f"{name_of(cls)}({', '.join(texts)})"


def match(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments by the names that they should have, without those that the class does not know."""
    names = list(_signature(cls).parameters)[1:]
    found = dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        habits = [name for name in names if key in _HABITS.get(name, "").split()]
        if name := key if key in names else next(iter(habits), nearest(key, names, 0.8)):
            found.setdefault(name, value)
    return found


def nearest(name: Any, names: Any, cutoff: float = 0.6) -> str | None:
    """Returns the most similar of the names in any case, or ``None`` if no name is similar."""
    by_lower = {each.lower(): each for each in names}
    return next((by_lower[each] for each in get_close_matches(str(name).lower(), by_lower, 1, cutoff)), None)


@cache
def _signature(cls: type) -> Signature:
    return signature(cls.__init__)
