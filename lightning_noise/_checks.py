"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from numbers import Integral
from typing import Any

__all__ = [
    "check_counts",
    "check_finite",
    "check_flags",
    "check_level",
    "check_name",
    "check_numbers",
    "is_callable_with",
    "is_flag",
    "is_number",
    "outline",
    "plain",
]


def is_flag(value: Any) -> bool:
    """Returns whether a value is a truth value of Python, NumPy or torch.

    Example:
        >>> import numpy as np
        >>> is_flag(True), is_flag(np.bool_(True)), is_flag(1)
        (True, True, False)
    """
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def is_number(value: Any) -> bool:
    """Returns whether a value is a real number. A truth value is not, also of numpy or torch."""
    return hasattr(value, "__float__") and not is_flag(value) and math.prod(getattr(value, "shape", ())) == 1


def is_callable_with(value: Any, *args: Any, **kwargs: Any) -> bool:
    """Returns whether a value can be called with such arguments, as far as its signature is known.

    Example:
        >>> is_callable_with(lambda x, level: x, 1, 2), is_callable_with(lambda x: x, 1, 2), is_callable_with(0.5, 1, 2)
        (True, False, False)
    """
    try:
        signature(value).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # of a function in C
        return callable(value)
    return True


def outline(value: Any) -> str:
    """Returns a function by its name and parameters, and any other value by its repr.

    Example:
        >>> outline(is_callable_with), outline(0.5)
        ('is_callable_with(value, *args, **kwargs)', '0.5')
    """
    try:
        parameters = signature(value).parameters.values()
    except (TypeError, ValueError):
        return repr(value)
    names = (str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)
    return f"{getattr(value, '__name__', type(value).__name__)}({', '.join(names)})"


def check_numbers(**values: float | None) -> None:
    """Raises a TypeError if a value is neither a number nor ``None``."""
    for name, value in values.items():
        if value is not None and not is_number(value):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_finite(**values: float | None) -> None:
    """Raises an error if a value is neither a finite number nor ``None``."""
    check_numbers(**values)
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_level(level: float, max_level: float = math.inf) -> float:
    """Returns a level as a float, or raises an error if the level is not a number in [0, max_level]."""
    if type(level) is not float and not is_number(level):  # a float is the usual case, in every step
        raise TypeError(f"a level must be a number, got {level!r}; type {_advise_level(level)}")
    level = float(level)
    if not (0 <= level <= max_level and math.isfinite(level)):
        wanted = "finite and not negative" if max_level == math.inf else f"in [0, {max_level:g}]"
        advice = f"; for {level:g} % type {level / 100:g}" if 2 <= level <= 100 and max_level == 1 else ""
        if max_level not in (1, math.inf):
            advice = "; in noise.Scaled, the limit is that of the scaled noise over the factor"
        raise ValueError(f"a level must be {wanted}, got {level}{advice}")
    return level


def _advise_level(value: Any) -> str:
    """Returns what to type for a value that stands where a level is expected."""
    numbers = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    try:
        numbers = [float(number) for number in numbers]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == 1:
        return f"{numbers[0]:g}"
    if len(numbers) == 2:
        return f"schedules.Linear({numbers[0]}, {numbers[1]})"
    if isinstance(value, type) and value.__name__ == "AdaptiveLevel":
        return "AdaptiveLevel()"
    if type(value).__name__ == "AdaptiveLevel" or (callable(value) and not isinstance(value, type)):
        return "a number such as 0.1"  # only arguments that take no schedule come here
    return "a number, a schedule such as schedules.Linear(0.0, 0.5), or AdaptiveLevel()"


def check_name(name: str) -> str:
    """Returns a name, or raises an error if it cannot be a part of log keys and of files in the log folder.

    Example:
        >>> check_name("weight/encoder")
        'weight/encoder'
        >>> check_name("../weight")
        Traceback (most recent call last):
        ValueError: a name must be 1 to 100 printable characters without '..', a leading '/' or a ':', got '../weight'
    """
    if not isinstance(name, str):
        raise TypeError(f"a name must be a string, got {name!r}")
    parts = name.replace("\\", "/").split("/")
    if not (0 < len(name) <= 100 and name.isprintable()) or ".." in parts or not parts[0] or ":" in parts[0]:
        shown = name if len(name) <= 100 else f"{name[:20]}… of {len(name)} characters"
        raise ValueError(f"a name must be 1 to 100 printable characters without '..', a leading '/' or a ':', got {shown!r}")
    return name


def check_counts(**counts: int | None) -> None:
    """Raises an error if a count is not a whole number of at least 1."""
    for name, count in counts.items():
        if count is not None and (is_flag(count) or not isinstance(count, Integral)):
            raise TypeError(f"{name} must be a whole number, got {count!r}")
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}; type {name}=1")


def check_flags(**flags: bool) -> None:
    """Raises a TypeError if a flag is not a boolean, such as a level in its place."""
    for name, flag in flags.items():
        if not is_flag(flag):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def plain(value: Any) -> Any:
    """Returns any sequence, mapping or array, as of a configuration, as lists, dicts and numbers.

    Lists, tuples and dicts stay what they are, but what is in them is converted, too. Everything else is returned as it is.

    Example:
        >>> from collections import UserList
        >>> plain((UserList([0.0, 0.0]), 1.0))
        ([0.0, 0.0], 1.0)
    """
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        children = map(plain, value)
        return tuple(children) if isinstance(value, tuple) else list(children)
    as_list = getattr(value, "tolist", None)  # of an array of numpy, torch or pandas
    return value if as_list is None else as_list()
