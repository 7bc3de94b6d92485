"""Patterns of parameter and module names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from lightning_noise._usage import nearest

__all__ = ["as_list", "match"]

T = TypeVar("T")


def as_list(patterns: str | Sequence[str]) -> list[str]:
    """Returns a pattern or several patterns as a list."""
    names = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Sequence) else list(patterns)
    if others := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"expected names or patterns such as 'net.*', got {others[0]!r}; print(module) shows the names")
    return names


def match(named: Mapping[str, T], patterns: str | Sequence[str], kind: str) -> dict[str, T]:
    """Returns the entries whose names match a pattern. ``*`` matches any characters, including dots.

    A pattern that matches no name is a ValueError, whose message lists all names of this kind.

    Example:
        >>> match({"net.0": 1, "net.1": 2, "head": 3}, ["net.*"], "module")
        {'net.0': 1, 'net.1': 2}
    """
    patterns = as_list(patterns)
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]
    if unmatched or not patterns:
        wanted = repr(unmatched[0]) if unmatched else "an empty list"
        close = _find_close(unmatched[0], named) if any(unmatched) else None
        advice = f"type {close!r}; " if close else ""
        raise ValueError(f"no {kind} matches {wanted}; {advice}{kind}s are: {', '.join(map(repr, named)) or 'none'}")
    return {name: value for name, value in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _find_close(pattern: str, names: Iterable[str]) -> str | None:
    """Returns the name that begins with a pattern, a pattern for several such names, or else a similar name."""
    for ending in (".", ""):  # the parts of net.1, but not net.10
        longer = [name for name in names if name.startswith(pattern + ending)]
        if longer:
            return longer[0] if len(longer) == 1 else f"{pattern}{ending}*"
    return nearest(pattern, names)
