"""Noise in leaves of a batch, with options and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_noise._tensor import column, detached, like
from lightning_noise.batch import Path, describe, format_path, get, modify
from lightning_noise.noise import Noise, Uniform
from lightning_noise.rng import Key

__all__ = ["Clip", "apply_noise", "check_leaf", "check_relative", "perturb_batch", "snr_db", "try_noise", "validate_clip"]

Bound = float | Sequence[float] | None
Clip = tuple[Bound, Bound]


def perturb_batch(
    batch: Any,
    paths: list[Path],
    noise: Noise,
    level: float,
    key: Key,
    *,
    probability: float = 1.0,
    per_sample: bool = False,
    relative: Literal["std"] | None = None,
    clip: Clip | None = None,
) -> Any:
    """Returns a copy of the batch with noise in the leaves at the paths.

    The batch and its tensors do not change. The leaves share the level and the choice of samples, but each leaf has its own
    draw. At level 0 the batch itself is returned. See ``InputNoise`` for the options.
    """
    if level == 0:
        return batch

    def perturb(leaf: Tensor, path: Path) -> Tensor:
        check_leaf(leaf, path, noise)
        x = detached(leaf)
        levels = level if probability == 1 and not per_sample else _draw_levels(x, level, key, probability, per_sample)
        y = apply_noise(x, path, noise, levels, key, relative)
        if clip is not None and y.is_floating_point():  # category codes have no range
            y = _clip(y, *clip)
        if isinstance(levels, Tensor):  # a sample without noise is not clipped
            y = torch.where(column(levels > 0, x), y, x)
        return like(leaf, y)

    return modify(batch, paths, perturb)


def snr_db(clean: Any, noisy: Any, paths: list[Path]) -> Tensor:
    r"""Returns the signal-to-noise ratio of the leaves in decibels.

    .. math:: 10 \log_{10} \frac{\sum \lVert x \rVert^2}{\sum \lVert y - x \rVert^2}
    """
    signal = error = torch.zeros(())
    for path in paths:
        leaf = get(clean, path)
        if leaf.is_floating_point():  # a distance of category codes is meaningless
            x, y = leaf.detach().float(), get(noisy, path).detach().float()
            signal, error = signal + x.square().sum(), error + (y - x).square().sum()
    return 10 * torch.log10(signal / error)


def check_leaf(leaf: Tensor, path: Path, noise: Noise, role: Literal["input", "target"] = "input") -> None:
    """Raises a TypeError if a leaf cannot take the noise."""
    name = f"the {role} {format_path(path)!r}"
    if leaf.layout != torch.strided or leaf.is_nested:
        argument = "inputs" if role == "input" else "target"
        raise TypeError(f"noise needs a dense tensor, but {name} is {leaf.layout}; type {argument}=… for another leaf")
    if noise.requires_float and not leaf.is_floating_point():
        raise TypeError(f"{noise.title} needs floats, but {name} is {describe(leaf)}. {_WAYS_OUT[role]}")


_WAYS_OUT = {
    "input": "Convert images to floats in the transform of the data set, use EmbeddingNoise for token ids, "
    "or type inputs=… for another leaf",
    "target": "Type TargetNoise(labels.FlipLabels(), …) for class indices, or target=… for another leaf",
}


def try_noise(batch: Any, paths: list[Path], noise: Noise, *, relative: Literal["std"] | None, clip: Clip | None) -> None:
    """Raises the error that the noise would raise above level 0."""
    for path in paths:
        check_leaf(get(batch, path), path, noise)
    if noise.is_known:  # a function may have side effects
        perturb_batch(batch, paths, noise, 0.01, Key(("trial",)), relative=relative, clip=clip)


def check_relative(noise: Noise, relative: str | None) -> None:
    """Raises a ValueError if ``relative`` is set for a noise that is not additive."""
    if relative and noise.is_known and not noise.additive:
        raise ValueError(
            f"relative={relative!r} needs an additive noise; the level of {noise.title} has no unit, so remove relative"
        )


def validate_clip(clip: Any) -> Clip | None:
    """Returns the bounds as plain numbers, or raises a ValueError."""
    if clip is None:
        return None
    try:
        low, high = (None if bound is None else torch.as_tensor(bound, dtype=torch.float64) for bound in clip)
        given = [bound for bound in (low, high) if bound is not None]
        valid = all(bound.ndim <= 1 and bound.numel() and not bound.isnan().any() for bound in given)
        if not valid or (low is not None and high is not None and not (low < high).all()):
            raise ValueError("not in order")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "clip must be a pair (low, high) with low < high, such as (0.0, 1.0); each bound is a number, a list with a number "
            f"for each channel, or None; got {clip!r}"
        ) from error
    return _plain(low), _plain(high)


def apply_noise(
    x: Tensor, path: Path, noise: Noise, levels: float | Tensor, key: Key, relative: Literal["std"] | None
) -> Tensor:
    """Returns a leaf with noise, drawn by the key and the path."""
    return (key / "leaf" / format_path(path)).apply(noise, x, levels * _std(x) if relative else levels)


def _plain(bound: Tensor | None) -> Bound:
    if bound is None:
        return None
    return tuple(bound.tolist()) if bound.ndim else bound.item()


def _draw_levels(x: Tensor, level: float, key: Key, probability: float, per_sample: bool) -> Tensor:
    """Returns a level for each sample, 0 for samples without noise."""
    levels = torch.full((len(x),), level, dtype=torch.float32, device=x.device)
    centers = torch.full_like(levels, 0.5)  # of [0, 1)
    if per_sample:
        levels *= (key / "per_sample").apply(Uniform(), centers, 0.5)
    if probability < 1:
        levels *= (key / "probability").apply(Uniform(), centers, 0.5) < probability
    return levels


def _std(x: Tensor) -> Tensor:
    if x.shape[1:].numel() == 1:  # one number has no deviation, not even in an empty batch
        raise ValueError(f"relative='std' needs samples of more than one number, got a tensor of shape {tuple(x.shape)}")
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).std(1, correction=0)


def _clip(x: Tensor, low: Bound, high: Bound) -> Tensor:
    for bound, clamp in ((low, torch.clamp_min), (high, torch.clamp_max)):
        if isinstance(bound, Sequence):
            if x.ndim < 2 or len(bound) != x.shape[1]:
                raise ValueError(
                    f"clip has bounds for {len(bound)} channels, but the input is of shape {tuple(x.shape)}; give a bound for "
                    "each channel of dimension 1"
                )
            x = clamp(x, x.new_tensor(bound).view(-1, *[1] * (x.ndim - 2)))
        elif bound is not None:
            x = clamp(x, bound)
    return x
