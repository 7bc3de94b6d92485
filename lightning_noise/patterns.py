"""Patterns of parameter and module names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

__all__ = ["as_list", "match"]

T = TypeVar("T")


def as_list(patterns: str | Sequence[str]) -> list[str]:
    """Returns a pattern or several patterns as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


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
        raise ValueError(f"no {kind} matches {wanted}; {kind}s are: {', '.join(map(repr, named)) or 'none'}")
    return {name: value for name, value in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
