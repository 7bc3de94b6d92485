"""Losses of smoothed, noisy and mixed labels."""

__all__: list[str] = []
