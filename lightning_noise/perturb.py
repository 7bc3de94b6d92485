"""Batches perturbed: the place where a noise, its options and a key meet the leaves of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_noise.batch import Path, described, dotted, get, replace
from lightning_noise.rng import Key

__all__ = ["Clip", "check_floating", "check_options", "perturbed_batch", "snr_db"]

Bound = float | Sequence[float] | None
Clip = tuple[Bound, Bound]


def perturbed_batch(
    batch: Any,
    paths: list[Path],
    noise: Callable[..., Tensor],
    level: float,
    key: Key,
    *,
    probability: float = 1.0,
    per_sample: bool = False,
    relative: bool = False,
    clip: Clip | None = None,
) -> Any:
    """Returns the batch with noise in the leaves at the paths; the batch itself and its tensors stay as they are.

    The leaves share the level and the choice of the samples, but not the draw. At level 0 it is the batch itself. See
    ``InputNoise`` for the options.
    """
    if level == 0:
        return batch
    check_floating(batch, paths, noise)
    for path in paths:
        leaf = get(batch, path)
        x = leaf.detach().as_subclass(Tensor)
        levels = _levels(x, level, key, probability, per_sample)
        y = (key / "leaf" / dotted(path)).apply(noise, x, levels * _std(x) if relative else levels)
        if clip is not None:
            y = _clipped(y, *clip)
        if isinstance(levels, Tensor):  # a sample that is left out is not clipped either
            y = torch.where(_column(levels > 0, x), y, x)
        batch = replace(batch, path, _like(leaf, y))
    return batch


def snr_db(clean: Any, noisy: Any, paths: list[Path]) -> Tensor:
    r"""Returns the signal-to-noise ratio in decibels of the leaves at the paths, a scalar.

    .. math:: 10 \log_{10} \frac{\sum \lVert x \rVert^2}{\sum \lVert y - x \rVert^2}
    """
    signal = error = torch.zeros(())
    for path in paths:
        x, y = get(clean, path).detach().float(), get(noisy, path).detach().float()
        signal, error = signal + x.square().sum(), error + (y - x).square().sum()
    return 10 * torch.log10(signal / error)


def check_floating(batch: Any, paths: list[Path], noise: Callable[..., Tensor]) -> None:
    """Raises a TypeError where a leaf cannot take noise, with the way out."""
    for path in paths:
        if not get(batch, path).is_floating_point():
            raise TypeError(
                f"{type(noise).__name__} needs floats, but the input {dotted(path)!r} is {described(get(batch, path))}. "
                "Convert images to floats in the data set's transform; token ids cannot take noise, their embeddings can; "
                "or name another leaf with inputs=…"
            )


def check_options(noise: Callable[..., Tensor], relative: bool, clip: Clip | None) -> Clip | None:
    """Returns the clip with plain numbers, or raises an error where an option makes no sense for the noise."""
    if isinstance(noise, type) or not callable(noise):
        raise TypeError(f"a noise must be a value such as noise.Gaussian(), got {noise!r}")
    if relative and not getattr(noise, "additive", True):
        raise ValueError(f"relative=True is for additive noise; the level of {type(noise).__name__} has no unit")
    if clip is None:
        return None
    if not (isinstance(clip, list | tuple) and len(clip) == 2):
        raise ValueError(f"clip must be a pair (low, high), either of which may be None, got {clip!r}")
    low, high = map(_plain, clip)
    if low is not None and high is not None and not (torch.tensor(low) < torch.tensor(high)).all():
        raise ValueError(f"the lower bound of clip must be below the upper one, got {clip!r}")
    return low, high


def _plain(bound: Any) -> Bound:
    if bound is None:
        return None
    return float(bound) if getattr(bound, "ndim", 0) == 0 and not isinstance(bound, Sequence) else tuple(map(float, bound))


def _levels(x: Tensor, level: float, key: Key, probability: float, per_sample: bool) -> float | Tensor:
    """The level of each sample, or one number where all have the same."""
    if probability == 1 and not per_sample:
        return level
    levels = torch.full((len(x),), level, dtype=torch.float32, device=x.device)
    if per_sample:
        levels *= (key / "per_sample").apply(_uniform, levels, 1.0)
    if probability < 1:
        levels *= (key / "probability").apply(_uniform, levels, 1.0) < probability
    return levels


def _uniform(x: Tensor, level: float | Tensor, *, generator: torch.Generator) -> Tensor:
    return torch.empty_like(x).uniform_(generator=generator)


def _std(x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"relative=True needs samples of more than one number, got an input of shape {tuple(x.shape)}")
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).std(1, correction=0)


def _clipped(x: Tensor, low: Bound, high: Bound) -> Tensor:
    bounds = [_channels(bound, x) if isinstance(bound, Sequence) else bound for bound in (low, high)]
    x = x if bounds[0] is None else x.clamp_min(bounds[0])  # type: ignore[arg-type]
    return x if bounds[1] is None else x.clamp_max(bounds[1])  # type: ignore[arg-type]


def _channels(bound: Sequence[float], x: Tensor) -> Tensor:
    if x.ndim < 2 or len(bound) != x.shape[1]:
        raise ValueError(f"clip has bounds for {len(bound)} channels, but the input is of shape {tuple(x.shape)}")
    return x.new_tensor(bound).view(-1, *[1] * (x.ndim - 2))


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def _like(leaf: Tensor, y: Tensor) -> Tensor:
    """``y`` as the subclass of ``leaf``, with its attributes and ``requires_grad``."""
    if type(leaf) is not Tensor:
        y = y.as_subclass(type(leaf))
        vars(y).update(vars(leaf))
    return y.requires_grad_(leaf.requires_grad)
