"""Noise in leaves of a batch, with options and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_noise._checks import is_flag, is_number, plain
from lightning_noise._tensor import at_least_float32, column, detached, like, row_norms
from lightning_noise.batch import Path, describe, format_path, get, modify
from lightning_noise.loop.internals import wraps_tensors
from lightning_noise.masks import Mask, align_mask, find_documents, find_masks, in_documents, number_documents, valid_positions
from lightning_noise.noise import Noise, Uniform
from lightning_noise.noise.composition import parts_of
from lightning_noise.perturb.normalization import Normalization, per_channel
from lightning_noise.rng import Key

__all__ = [
    "Clip",
    "Positions",
    "apply_noise",
    "check_dense",
    "check_leaf",
    "check_relative",
    "describe_layout",
    "perturb_batch",
    "snr_db",
    "validate_clip",
]

Bound = float | Sequence[float] | None
Clip = tuple[Bound, Bound]
# from the path of an input and its number of rows to the position of each row in the data set
Positions = Callable[[Path, int], Sequence[int]]


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
    mask: Mask | None = None,
    documents: Mask | None = None,
    normalization: Normalization | None = None,
    positions: Positions | None = None,
) -> Any:
    """Returns a copy of the batch with noise in the inputs at the paths.

    The batch and its tensors do not change. The inputs share the level and the choice of samples, but each input has its own
    draw. At level 0 the batch itself is returned.

    Args:
        batch: A batch.
        paths: The paths of the inputs; see :func:`~lightning_noise.batch.find_inputs`.
        noise: The noise.
        level: The level.
        key: The key of the draws.
        probability: The probability that a sample gets noise.
        per_sample: Whether to draw a level for each sample.
        relative: ``"std"`` for a level in units of the standard deviation of each sample.
        clip: The bounds of the noisy input.
        mask: The mask of the inputs.
        documents: The documents of packed rows of shape (B, T, *).
        normalization: The normalization of the data, if level and bounds are in raw units.
        positions: Gives the positions in the data set of an input, by its path and number of rows. Default: those of the key.
    """
    if level == 0:
        return batch
    found = None if mask is None else find_masks(batch, mask)
    packed = None if documents is None else find_documents(batch, documents)
    every = probability == 1 and not per_sample

    def rows(leaf: Tensor, path: Path, levels: float | Tensor, key: Key, valid: Tensor | None) -> Tensor:
        if leaf.is_complex() and (clip is not None or normalization is not None):
            raise TypeError(
                f"clip, mean and std need real numbers, but the input {format_path(path)!r} is {describe(leaf)}; remove them"
            )
        before = leaf if normalization is None or not leaf.is_floating_point() else normalization.restore(leaf)
        y = apply_noise(before, path, noise, levels, key, relative, valid, packed)
        if clip is not None and y.is_floating_point():  # category codes have no range
            y = _clip(y, *clip)
        if before is not leaf:
            y = normalization.normalize(y, before, leaf)  # type: ignore[union-attr]
        if isinstance(levels, Tensor):  # a sample without noise is not clipped
            y = torch.where(column(levels > 0, leaf), y, leaf)
        return y if valid is None or clip is None else torch.where(valid, y, leaf)

    def perturb(leaf: Any, path: Path) -> Any:
        check_leaf(leaf, path, noise)
        own = key if positions is None else replace(key, positions=positions(path, len(leaf)))
        levels = level if every else _draw_levels(leaf, level, own, probability, per_sample)
        if isinstance(leaf, Tensor):
            return like(leaf, rows(detached(leaf), path, levels, own, None if found is None else _valid(found, leaf)))
        if found is not None and len(found) != len(leaf):
            raise ValueError(
                f"mask=… must have a mask for each of the {len(leaf)} samples of {format_path(path)!r}, got {len(found)}"
            )
        noisy = []
        for i, sample in enumerate(leaf):
            amount = levels[i : i + 1] if isinstance(levels, Tensor) else levels
            valid = None if found is None else _valid(found[i][None], sample[None])
            y = rows(detached(sample)[None], path, amount, _of_sample(own, i), valid)
            noisy.append(like(sample, y[0]))
        return noisy

    return modify(batch, paths, perturb)


def snr_db(clean: Any, noisy: Any, paths: list[Path], mask: Mask | None = None) -> Tensor:
    r"""Returns the signal-to-noise ratio of the valid elements of the inputs in decibels.

    .. math:: 10 \log_{10} \frac{\sum \lVert x \rVert^2}{\sum \lVert y - x \rVert^2}
    """
    signal = error = torch.zeros(())
    found = find_masks(clean, mask)
    for path in paths:
        leaf, changed = get(clean, path), get(noisy, path)
        pairs = [(leaf, changed, found)] if isinstance(leaf, Tensor) else _pairs(leaf, changed, found)
        for x, y, valid in pairs:
            if x.is_floating_point() or x.is_complex():  # a distance of category codes is meaningless
                x, y = (at_least_float32(part) for part in (detached(x), detached(y)))
                mine = valid_positions(x, _valid(valid, x))
                signal, error = signal + _power(x, mine), error + _power(y - x, mine)
    return 10 * torch.log10(signal / error).float()


def check_leaf(leaf: Any, path: Path, noise: Noise, role: Literal["input", "target"] = "input") -> None:
    """Raises a TypeError if a leaf, or a leaf of a list, cannot take the noise."""
    if isinstance(leaf, Tensor) and not leaf.ndim:
        raise TypeError(
            f"the {role} {format_path(path)!r} must have a row for each sample, got {describe(leaf)}; type "
            f"{_ARGUMENTS[role]}=… for another leaf"
        )
    if noise.mixes_samples and not isinstance(leaf, Tensor):
        raise TypeError(
            f"{noise.title} takes values of other rows of a tensor, but the {role} {format_path(path)!r} is a list of "
            f"{len(leaf)} samples; stack them in the collate_fn, or type another noise"
        )
    for each in [leaf] if isinstance(leaf, Tensor) else leaf:
        check_dense(each, path, role)
        if each.is_complex() and not noise.takes_complex:
            raise TypeError(
                f"{noise.title} needs real numbers, but the {role} {format_path(path)!r} is {describe(each)}; type "
                "torch.view_as_real(x) or x.abs() in the data set, or an additive noise such as noise.Gaussian()"
            )
        if noise.requires_float and not (each.is_floating_point() or each.is_complex()):
            raise TypeError(
                f"{noise.title} needs floats, but the {role} {format_path(path)!r} is {describe(each)}. {_WAYS_OUT[role]}"
            )


def check_dense(leaf: Tensor, path: Path, role: Literal["input", "target"] = "input") -> None:
    """Raises a TypeError if a leaf is not dense."""
    if (kind := describe_layout(leaf)) is not None:
        dense = "torch.nested.to_padded_tensor(x, 0.0) and mask=…" if leaf.is_nested else "x.to_dense()"
        dense = "plain tensors and mask=…" if wraps_tensors(leaf) and not leaf.is_nested else dense
        raise TypeError(
            f"noise needs a dense tensor, but the {role} {format_path(path)!r} is {kind}; type {dense} in the data set or "
            f"collate_fn, or {_ARGUMENTS[role]}=… for another leaf"
        )


def describe_layout(leaf: Tensor) -> str | None:
    """Returns what a tensor is if it is not dense: nested, sparse, or made of other tensors."""
    if leaf.is_nested:
        return "a nested tensor"
    if leaf.layout != torch.strided:
        return f"a tensor of {leaf.layout}"
    is_wrapper = type(leaf) is not Tensor and wraps_tensors(leaf)
    return f"a {type(leaf).__name__}, which consists of other tensors" if is_wrapper else None


_ARGUMENTS = {"input": "inputs", "target": "target"}
_WAYS_OUT = {
    "input": "Convert images to floats in the transform of the data set, type EmbeddingNoise() in place of a noise for token "
    "ids, or type inputs=… for another leaf",
    "target": "Type TargetNoise(labels.FlipLabels(), …) for class indices, or target=… for another leaf",
}


def check_relative(noise: Noise, relative: str | None, units: Sequence[str] = ("std",)) -> None:
    """Raises a ValueError if ``relative`` is none of the units, or is set for a noise that is not additive."""
    if is_flag(relative) or relative not in (None, *units):
        names = ", ".join(map(repr, units))
        raise ValueError(f"relative must be {names} or None, got {relative!r}; type relative='std'")
    for part in parts_of(noise) if relative else ():
        if part.is_known and not part.additive:
            raise ValueError(
                f"relative={relative!r} needs an additive noise; the level of {part.title} has no unit, so remove relative"
            )


def validate_clip(clip: Any) -> Clip | None:
    """Returns the bounds as plain numbers, or raises a ValueError."""
    if clip is None:
        return None
    try:
        low, high = (None if bound is None else torch.as_tensor(bound, dtype=torch.float64) for bound in plain(clip))
        given = [bound for bound in (low, high) if bound is not None]
        valid = all(bound.ndim <= 2 and bound.numel() and not bound.isnan().any() for bound in given)
        if not valid or (low is not None and high is not None and not (low < high).all()):
            raise ValueError("not in order")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "clip must be a pair (low, high) with low < high, such as (0.0, 1.0); each bound is a number, a list with a number "
            f"for each channel, or None; got {clip!r}; type clip=(0.0, {clip if is_number(clip) and clip > 0 else 1.0})"
        ) from error
    return _plain(low), _plain(high)


def apply_noise(
    x: Tensor,
    path: Path,
    noise: Noise,
    levels: float | Tensor,
    key: Key,
    relative: Literal["std"] | None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Returns a leaf with noise, drawn by the key and the path."""
    key, levels = key.at("leaf", format_path(path)), levels * _std(x, mask) if relative else levels
    if documents is None or noise.elementwise:
        return key.apply(noise, x, levels, mask)
    numbers = number_documents(documents.to(x.device), x)
    numbers = numbers.view(*numbers.shape, *[1] * (x.ndim - 2)).expand(x.shape)
    return key.apply(in_documents(noise), x, levels, torch.where(valid_positions(x, mask), numbers, -numbers.abs()))


def _plain(bound: Tensor | None) -> Bound:
    if bound is None:
        return None
    return tuple(bound.tolist()) if bound.ndim else bound.item()


def _pairs(clean: list[Tensor], noisy: list[Tensor], masks: Any) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Returns the samples of two lists as batches of one row, each with its mask."""
    rows = [None] * len(clean) if masks is None else [mask[None] for mask in masks]
    return [(x[None], y[None], mask) for x, y, mask in zip(clean, noisy, rows, strict=True)]


def _valid(mask: Any, x: Tensor) -> Tensor | None:
    if isinstance(mask, list):
        raise ValueError(f"mask=… is a list with a mask for each sample, but the input is {describe(x)}; type a tensor")
    return None if mask is None else align_mask(mask.to(x.device), x)


def _of_sample(key: Key, i: int) -> Key:
    """Returns the key of one sample of a list."""
    return key / i if key.positions is None else replace(key, positions=key.positions[i : i + 1])


def _draw_levels(leaf: Any, level: float, key: Key, probability: float, per_sample: bool) -> Tensor:
    """Returns a level for each sample, 0 for samples without noise."""
    device = leaf.device if isinstance(leaf, Tensor) else leaf[0].device
    levels = torch.full((len(leaf),), level, dtype=torch.float32, device=device)
    centers = torch.full_like(levels, 0.5)  # of [0, 1)
    if per_sample:
        levels *= (key / "per_sample").apply(Uniform(), centers, 0.5)
    if probability < 1:
        levels *= (key / "probability").apply(Uniform(), centers, 0.5) < probability
    return levels


def _std(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the standard deviation of the valid elements of each row."""
    if x.shape[1:].numel() == 1:  # one number has no deviation, not even in an empty batch
        raise ValueError(f"relative='std' needs samples of more than one number, got a tensor of shape {tuple(x.shape)}")
    rows = at_least_float32(x.flatten(1))
    if mask is None:
        std = rows.std(1, correction=0)
        if x.device.type == "cpu" and not std.isnan().any():  # elsewhere, to look would wait for the device
            return std
        # a row without NaN must not depend on the others, to the last bit
        return torch.where(std.isnan(), _std(x, torch.ones_like(x, dtype=torch.bool)), std)
    valid = valid_positions(rows, mask.flatten(1))
    n = valid.sum(1, keepdim=True).clamp_min_(1)
    centered = rows.where(valid, 0.0)
    centered.sub_(centered.sum(1, keepdim=True) / n).mul_(valid)
    return row_norms(centered) * n.squeeze(1).rsqrt()


def _power(x: Tensor, valid: Tensor) -> Tensor:
    # in float64, because squares of float32 leave its range if data are as small or large as 10^-20 or 10^20
    wide = x.dtype if x.device.type == "mps" else torch.promote_types(x.dtype, torch.float64)
    return torch.linalg.vector_norm(x.where(valid, 0.0), dtype=wide).square()


def _clip(x: Tensor, low: Bound, high: Bound) -> Tensor:
    for bound, clamp in ((low, torch.clamp_min), (high, torch.clamp_max)):
        x = x if bound is None else clamp(x, per_channel("clip", bound, x))
    return x
