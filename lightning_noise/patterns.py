"""Names of parameters and modules, and the patterns that select them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

__all__ = ["match"]

T = TypeVar("T")


def match(named: Mapping[str, T], patterns: str | Sequence[str], kind: str) -> dict[str, T]:
    """Returns what a pattern or one of several selects, in which ``*`` stands for any characters, dots too.

    Args:
        named: What there is, by name.
        patterns: The patterns, each of which must match something.
        kind: What it is, for the message.

    Raises:
        ValueError: A pattern matches nothing; the message lists all names.

    Example:
        >>> match({"net.0": 1, "net.1": 2, "head": 3}, ["net.*"], "module")
        {'net.0': 1, 'net.1': 2}
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]
    if unmatched or not patterns:
        wanted = repr(unmatched[0]) if unmatched else "an empty list"
        raise ValueError(f"no {kind} matches {wanted}; {kind}s are: {', '.join(map(repr, named)) or 'none'}")
    return {name: value for name, value in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
