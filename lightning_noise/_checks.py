"""Checks of arguments that several modules share."""

from __future__ import annotations

import math

__all__ = ["check_counts", "check_level"]


def check_level(level: float, max_level: float = math.inf) -> float:
    """Returns a level as a float, or raises an error if the level is not a number in [0, max_level]."""
    if isinstance(level, str | bytes | bool) or not hasattr(level, "__float__"):
        raise TypeError(f"a level must be a number, got {level!r}")
    level = float(level)
    if not (0 <= level <= max_level and math.isfinite(level)):
        wanted = "finite and not negative" if max_level == math.inf else f"in [0, {max_level:g}]"
        raise ValueError(f"a level must be {wanted}, got {level}")
    return level


def check_counts(**counts: int | None) -> None:
    """Raises a ValueError if a count is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
