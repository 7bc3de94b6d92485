"""What the values of an input say against the noise and its level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_noise._tensor import detached
from lightning_noise.batch import Path, format_path, get
from lightning_noise.masks import Mask, align_mask, find_masks, valid_positions
from lightning_noise.noise import Noise
from lightning_noise.perturb.inputs import snr_db
from lightning_noise.perturb.normalization import Normalization

__all__ = ["find_doubts"]

_HIGHEST_SNR_DB = 45.0  # an eighth of the last bit of an 8-bit image
_CHANNELS = (1, 3, 4)


def find_doubts(
    batch: Any,
    noisy: Any,
    paths: list[Path],
    noise: Noise,
    level: float | None,
    *,
    relative: str | None = None,
    clip: Any = None,
    mask: Mask | None = None,
    documents: Mask | None = None,
    normalization: Normalization | None = None,
    are_severities: bool = False,
    has_default: bool = False,
) -> Iterator[str]:
    """Yields warnings of values that contradict the arguments of an ``InputNoise``.

    Args:
        batch: The first batch.
        noisy: The batch with noise at the level, or ``None`` if the noise cannot be tried.
        paths: The paths of the inputs.
        noise: The noise.
        level: The largest level, or ``None`` if it is not known.
        relative: As in ``InputNoise``, like the next ones.
        clip: The bounds.
        mask: The mask of the inputs.
        documents: The documents of packed rows.
        normalization: The normalization of the data.
        are_severities: Whether the levels are the severities of the noise, and not given.
        has_default: Whether no inputs are given.
    """
    for path in paths:
        leaf = get(batch, path)
        x = leaf if isinstance(leaf, Tensor) else leaf[0][None]
        if not x.is_floating_point() or x.numel() == 0:
            continue
        name = f"the input {format_path(path)!r}" if path else "the input"
        values = _valid_values(leaf, find_masks(batch, mask), normalization)
        doubt = values_doubt(name, values)
        if doubt is None and noise.additive and noisy is not None and level and not relative:
            snr = snr_db(batch, noisy, [path], mask).item()
            doubt = (severities_doubt(name, x, values, noise) if are_severities else None) or level_doubt(
                name, values, noise, level, snr
            )
        yield from (each for each in (doubt, axis_doubt(name, x, noise)) if each is not None)
    if has_default and paths == [(0,)] and _are_images(batch):
        yield (
            f"the batch is a sequence of {len(batch)} images, and only the first is the input; if each tensor is a sample, "
            'type inputs=""'
        )


def _valid_values(leaf: Any, masks: Any, normalization: Normalization | None) -> Tensor:
    """Returns the valid elements of an input in raw units, as one axis."""
    found = []
    for i, sample in enumerate([leaf] if isinstance(leaf, Tensor) else leaf):
        x = detached(sample) if sample is leaf else detached(sample)[None]
        mask = None if masks is None else align_mask(masks if sample is leaf else masks[i][None], x)
        raw = x if normalization is None else normalization.restore(x)
        found.append(raw[valid_positions(x, mask)].flatten())
    return torch.cat(found)


def values_doubt(name: str, values: Tensor) -> str | None:
    """Returns a warning if the valid elements of an input are all alike.

    Example:
        >>> values_doubt("the input 'x'", torch.zeros(3))
        "the input 'x' is 0 everywhere in the first batch; if another leaf is the input, type inputs=…"
    """
    advice = "in the first batch; if another leaf is the input, type inputs=…"
    if len(values) == 0:
        return f"{name} has no valid element, only NaN or padding, {advice}"
    if len(values) > 1 and bool((values == values[0]).all()):
        return f"{name} is {values[0].item():g} everywhere {advice}"
    return None


def level_doubt(name: str, values: Tensor, noise: Noise, level: float, snr_db: float) -> str | None:
    """Returns a warning if the noise vanishes beside the data."""
    if snr_db <= _HIGHEST_SNR_DB:
        return None
    low, high = values.min().item(), values.max().item()
    return (
        f"{noise.title} at level {level:g} is {snr_db:.0f} dB below {name}, whose values are in [{low:g}, {high:g}]: the level "
        f'has the units of the data. {_ways_out(low, high)}type relative="std" for a level in units of their deviation'
    )


def severities_doubt(name: str, x: Tensor, values: Tensor, noise: Noise) -> str | None:
    """Returns a warning if severities for data in [0, 1] are the levels for images of another range."""
    low, high = values.min().item(), values.max().item()
    if not _is_image(x) or (low >= 0 and high <= 1.5):
        return None
    return (
        f"the default levels of {noise.title} are made for data in [0, 1], but {name} has values in [{low:g}, {high:g}]. "
        f'{_ways_out(low, high)}type levels=[…] in the units of the data, or relative="std"'
    )


def axis_doubt(name: str, x: Tensor, noise: Noise) -> str | None:
    """Returns a warning if the noise lies along an axis that looks like the channels.

    Example:
        >>> from lightning_noise.noise import Masking
        >>> "type noise.Masking(dim=(-2,), value=0.0)" in axis_doubt("the input 'x'", torch.ones(8, 100, 3), Masking(dim=(-1,)))
        True
    """
    dim: Any = getattr(noise, "dim", None)
    axes = (dim,) if isinstance(dim, int) else dim
    if axes == (-1,) and x.ndim == 3 and x.shape[-1] < x.shape[-2]:
        what, other, shape = f"the series is along the last axis of length {x.shape[-1]}", (-2,), "(B, T, C)"
    elif axes == (-2, -1) and x.ndim == 4 and x.shape[-1] in _CHANNELS and x.shape[-1] < min(x.shape[1:3]):
        what, other, shape = (
            f"the image is in the last axes of lengths {x.shape[-2]} and {x.shape[-1]}",
            (-3, -2),
            "(B, H, W, C)",
        )
    else:
        return None
    better: Any = replace(noise, dim=other[0] if isinstance(dim, int) else other)  # type: ignore[type-var]
    return f"{name} has shape {tuple(x.shape)}, and for {noise.title} {what}; for {shape} type noise.{better!r}"


def _ways_out(low: float, high: float) -> str:
    if low < 0:
        return "If the data are normalized, type mean=… and std=… as in the normalization; else "
    if high > 1.5:
        return "For pixels up to 255 type std=1/255, or scale the data to [0, 1]; else "
    return "If another leaf is the input, type inputs=…; else "


def _are_images(batch: Any) -> bool:
    return len(batch) > 2 and all(isinstance(leaf, Tensor) and leaf.ndim == 3 and _is_image(leaf[None]) for leaf in batch)


def _is_image(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in _CHANNELS and max(x.shape[2:]) <= 2 * min(x.shape[2:]) and min(x.shape[2:]) >= 8
