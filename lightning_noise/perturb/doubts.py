"""Warnings of inputs whose values contradict the noise or its level."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_noise._tensor import detached
from lightning_noise._usage import typed
from lightning_noise.batch import Path, describe, find_target, format_path, get, leaves, write_access
from lightning_noise.masks import Mask, align_mask, find_masks, valid_positions
from lightning_noise.noise import Noise
from lightning_noise.noise.composition import parts_of
from lightning_noise.perturb.inputs import snr_db
from lightning_noise.perturb.normalization import Normalization

__all__ = ["OTHER_MASK", "alone_doubt", "channels_doubt", "find_doubts", "looks_like_mask", "tokens_doubt", "values_doubt"]

_HIGHEST_SNR_DB = 45.0  # an eighth of the last bit of an 8-bit image
_LOWEST_SNR_DB = -19.0  # ten times the data
_CHANNELS = (1, 3, 4)
_ENOUGH = 20  # values of a channel, or different values
_SHORTEST_SERIES = 16  # shorter rows may be those of a table


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
    is_sigma: bool = False,
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
        is_sigma: Whether the level is that of a certificate, which takes neither ``relative`` nor ``clip``.
        has_default: Whether no inputs are given.
    """
    for path in paths:
        leaf = get(batch, path)
        x = leaf if isinstance(leaf, Tensor) else leaf[0][None]
        name = f"the input {format_path(path)!r}" if path else "the input"
        if noise.mixes_samples and (alone := alone_doubt(name, x)) is not None:
            yield alone
        if not x.is_floating_point() or x.numel() == 0:
            continue
        values = _valid_values(leaf, find_masks(batch, mask), normalization)
        doubt = values_doubt(name, values, _OTHER_INPUT if mask is None else OTHER_MASK)
        if doubt is None and noisy is not None and not noise.mixes_samples and _spreads(leaf, get(noisy, path)):
            doubt = (
                f"{noise.title} makes finite elements of {name} infinite or NaN, because the data hold infinite values or "
                f"fill the range of {x.dtype}; replace infinite values in the data set by NaN, which counts as missing"
            )
        if doubt is None and mask is None and documents is None and isinstance(leaf, Tensor):
            seen, access = detached(leaf), _write(batch, path)
            doubt = padding_doubt(name, seen, access, batch, paths)
            doubt = doubt or (not noise.mixes_samples and codes_doubt(name, seen, access)) or silence_doubt(name, seen, access)
            doubt = doubt or (missing_doubt(name, values, access) if normalization is None else None)
        doubt = doubt or clip_doubt(name, values, clip)
        if doubt is None and noisy is not None and level and not noise.mixes_samples:
            snr = snr_db(batch, noisy, [path], mask).item()
            doubt = severities_doubt(name, x, values, noise) if are_severities and noise.additive and not relative else None
            doubt = doubt or level_doubt(name, values, noise, level, snr, relative, is_sigma=is_sigma)
            doubt = doubt or counts_doubt(name, x, values, get(noisy, path), is_sigma=is_sigma)
        flags = flags_doubt(name, detached(x), _write(batch, path)) if mask is None else None
        of_axes = (axis_doubt(name, x, part) for part in parts_of(noise))
        rows = rows_doubt(name, x, batch) if isinstance(leaf, Tensor) else None
        yield from (each for each in (doubt, rows, *of_axes, flags) if each is not None)
    if has_default and len(paths) == 1 and (numbers := numbers_doubt(batch, paths[0])) is not None:
        yield numbers
    if has_default and paths == [(0,)] and _are_images(batch):
        yield (
            f"the batch is a sequence of {len(batch)} images, and only the first is the input; if each tensor is a sample, "
            'type inputs=""'
        )


_OTHER_INPUT = "if another leaf is the input, type inputs=…"
OTHER_MASK = "a mask is above 0 at valid positions, so for the opposite type mask=lambda batch: batch[…] == 0"


def _spreads(clean: Any, noisy: Any) -> bool:
    """Returns whether noise has made an element infinite or NaN."""
    pairs = [(clean, noisy)] if isinstance(clean, Tensor) else zip(clean, noisy, strict=True)
    return any(bool((detached(x).isfinite() & ~detached(y).isfinite()).any()) for x, y in pairs)


def _valid_values(leaf: Any, masks: Any, normalization: Normalization | None) -> Tensor:
    """Returns the valid elements of an input in raw units, as one axis."""
    found = []
    for i, sample in enumerate([leaf] if isinstance(leaf, Tensor) else leaf):
        x = detached(sample) if sample is leaf else detached(sample)[None]
        mask = None if masks is None else align_mask(masks if sample is leaf else masks[i][None], x)
        raw = x if normalization is None else normalization.restore(x)
        found.append(raw[valid_positions(x, mask)].flatten())
    return torch.cat(found)


def alone_doubt(name: str, x: Tensor) -> str | None:
    """Returns a warning if an input that takes values of other rows has a single row.

    Example:
        >>> alone_doubt("the input 'x'", torch.zeros(1, 3)).partition(";")[0]
        "the input 'x' has one row in the first batch, and without other rows it stays as it is"
    """
    if len(x) != 1:
        return None
    return f"{name} has one row in the first batch, and without other rows it stays as it is; type a larger batch_size=…"


def values_doubt(name: str, values: Tensor, advice: str) -> str | None:
    """Returns a warning if the valid elements of an input are all alike.

    Example:
        >>> values_doubt("the input 'x'", torch.zeros(3), "type inputs=…")
        "the input 'x' is 0 everywhere in the first batch; type inputs=…"
    """
    if len(values) == 0:
        return f"{name} has no valid element, only NaN or padding, in the first batch; {advice}"
    if len(values) > 1 and bool((values == values[0]).all()):
        return f"{name} is {values[0].item() + 0.0:g} everywhere in the first batch; {advice}"
    return None


def padding_doubt(name: str, x: Tensor, access: str, batch: Any, paths: list[Path], at_ends: bool = False) -> str | None:
    """Returns a warning if another leaf of the batch marks the padding of an input, or holds lengths.

    With ``at_ends``, a mask counts only if it leaves out one end of a row, and not the same in all rows. Equal tokens elsewhere
    may be masked words, or the first or last token of each sentence.

    Example:
        >>> x, mask = torch.tensor([[5.0, 7.0, 0.0]]), torch.tensor([[1, 1, 0]])
        >>> padding_doubt("the input 'x'", x, "batch['x']", {"x": x, "mask": mask}, [("x",)])
        "the input 'x' is 0 wherever 'mask' marks padding, and noise would go there; type mask='mask'"
    """
    for path, leaf in leaves(batch):
        if path in paths or not (looks_like_mask(path, leaf, x) or (_holds_flags(leaf, x) and not _is_target(batch, path))):
            continue
        for argument, mask in _readings(path, _write(batch, path), detached(leaf), x, access).items():
            try:
                valid = align_mask(mask, x)
            except ValueError:  # the axes are ambiguous
                continue
            if at_ends and (((valid[:, 1:] != valid[:, :-1]).sum(1) > 1).any() or (valid == valid[:1]).all()):
                continue
            padding, data = x[~valid], x[valid]
            if len(padding) and len(data) and (padding == padding[0]).all() and (data != padding[0]).any():
                value = padding[0].item() + 0.0  # not -0
                return (
                    f"{name} is {value:g} wherever {format_path(path)!r} marks padding, and noise would go there; "
                    f"type mask={argument}"
                )
    return None


def tokens_doubt(batch: Any) -> str | None:
    """Returns a warning if a leaf of the batch marks the padding of token ids.

    Example:
        >>> tokens_doubt({"ids": torch.tensor([[5, 7, 0], [4, 9, 5]]), "mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
        "the input 'ids' is 0 wherever 'mask' marks padding, and noise would go there; type mask='mask'"
    """
    for path, leaf in leaves(batch):
        is_ids = leaf.ndim == 2 and not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)
        if is_ids and not looks_like_mask(path, leaf, leaf) and not _is_target(batch, path):
            name = f"the input {format_path(path)!r}"
            doubt = padding_doubt(name, detached(leaf), _write(batch, path), batch, [path], at_ends=True)
            if doubt is not None:
                return doubt
    return None


def codes_doubt(name: str, x: Tensor, access: str) -> str | None:
    """Returns a warning if some columns of a table hold small whole numbers, as the codes of categories.

    Example:
        >>> x = torch.stack([torch.tensor([0.5, 0.1, -2.0]), torch.tensor([0.0, 2.0, 1.0])], dim=1)
        >>> codes_doubt("the input 'x'", x, "batch['x']")
        "the input 'x' has whole numbers in the columns [1]; to spare codes of categories, \
type mask=lambda batch: batch['x'].new_tensor([i not in [1] for i in range(2)]).expand_as(batch['x'])"
    """
    if x.ndim != 2 or len(x) == 0:
        return None
    low, high = x.amin(0), x.amax(0)
    is_code = (x == x.round()).all(0) & (low >= 0) & (low <= 1) & (high >= 2) & (high < len(x))
    if not is_code.any() or (x == x.round()).all():
        return None
    columns = is_code.nonzero().flatten().tolist()
    mask = f"{access}.new_tensor([i not in {columns} for i in range({x.shape[1]})]).expand_as({access})"
    return f"{name} has whole numbers in the columns {columns}; to spare codes of categories, type mask=lambda batch: {mask}"


def silence_doubt(name: str, x: Tensor, access: str) -> str | None:
    """Returns a warning if dense series end in zeros from different positions on, as padding does, or begin with them.

    Example:
        >>> silence_doubt("the input", (torch.arange(20) < torch.tensor([[20], [15]])).float(), "batch")
        'the input ends in zeros from different positions on, as padding does; if so, type mask=lambda batch: batch != 0'
    """
    if x.ndim not in (2, 3) or max(x.shape[1:]) < _SHORTEST_SERIES:
        return None
    time = max(range(1, x.ndim), key=lambda dim: x.shape[dim])
    filled = (x != 0).movedim(time, -1).flatten(1, -2).any(1) if x.ndim == 3 else x != 0
    ends = {"ends in zeros from different positions on": filled, "begins with zeros up to different positions": filled.flip(-1)}
    for where, each in ends.items():
        lengths = (each * torch.arange(1, each.shape[-1] + 1, device=x.device)).amax(-1)
        is_sparse = each.sum() < 0.99 * lengths.sum()
        if not is_sparse and lengths.max() - lengths.min() > 2:  # not a common border, or last columns that are 0 in some rows
            return f"{name} {where}, as padding does; if so, type mask=lambda batch: {access} != 0"
    return None


def missing_doubt(name: str, values: Tensor, access: str) -> str | None:
    """Returns a warning if a number far from all others stands for missing values.

    Example:
        >>> missing_doubt("the input 'x'", torch.tensor([1.0, -999.0, 3.0, -999.0]), "batch['x']").partition(";")[0]
        "the input 'x' is -999 at 2 of 4 elements and otherwise in [1, 3], as if -999 stood for missing values"
    """
    values = values[values.isfinite()]
    for extreme in (values.min(), values.max()) if len(values) else ():
        others = values[values != extreme]
        n = len(values) - len(others)
        if n < 2 or len(others) < 2 or extreme == 1:  # which is a flag, as in one-hot columns
            continue
        low, high = others.min(), others.max()
        distance, width = torch.maximum(low - extreme, extreme - high), high - low
        # -1 beside numbers of [0, 1], but not 2 beside 0 and 1
        is_code = extreme < 0 <= low and distance >= width and len(others.unique()) >= _ENOUGH
        is_far = distance > 3 * width or is_code
        if width > 0 and is_far:
            return (
                f"{name} is {extreme.item():g} at {n} of {len(values)} elements and otherwise in [{low.item():g}, "
                f"{high.item():g}], as if {extreme.item():g} stood for missing values; if so, type mask=lambda batch: {access} "
                f"!= {extreme.item():g}"
            )
    return None


def clip_doubt(name: str, values: Tensor, clip: Any) -> str | None:
    """Returns a warning if the bounds of the noisy input cut off data.

    Example:
        >>> clip_doubt("the input 'x'", torch.linspace(-1, 1, 100), (0.0, 1.0)).partition(";")[0]
        "clip=(0.0, 1.0) cuts off 50 % of the input 'x', whose values are in [-1, 1]"
    """
    low, high = clip or (None, None)
    outside = torch.zeros_like(values, dtype=torch.bool)
    outside = outside if not isinstance(low, float) else outside | (values < low)
    outside = outside if not isinstance(high, float) else outside | (values > high)
    share = outside.float().mean().item() if len(values) else 0.0
    if share <= 0.1:  # few values may be cut off on purpose
        return None
    span = f"[{values.min().item():g}, {values.max().item():g}]"
    return (
        f"clip={clip} cuts off {100 * share:.2g} % of {name}, whose values are in {span}; type bounds in the units of the "
        "data, or mean=… and std=… if the data were normalized"
    )


def counts_doubt(name: str, x: Tensor, values: Tensor, noisy: Any, *, is_sigma: bool = False) -> str | None:
    """Returns a warning if noise makes counts negative.

    Example:
        >>> x = torch.tensor([[0.0, 2.0, 5.0]])
        >>> counts_doubt("the input 'x'", x, x, x - 0.5)
        "the input 'x' holds counts, and the noise makes some negative; if the module needs at least 0, type clip=(0.0, None)"
    """
    are_counts = bool((values >= 0).all() & (values == values.round()).all() & (values > 1).any())
    if (
        _is_image(x)
        or not are_counts
        or not any(bool((y < 0).any()) for y in ([noisy] if isinstance(noisy, Tensor) else noisy))
    ):
        return None
    advice = "clamp the input in its forward, as by x.clamp_min(0)" if is_sigma else "type clip=(0.0, None)"
    return f"{name} holds counts, and the noise makes some negative; if the module needs at least 0, {advice}"


def flags_doubt(name: str, x: Tensor, access: str) -> str | None:
    """Returns a warning if a channel of series holds 0 and 1 alone, as a mask or a category does.

    Example:
        >>> x = torch.stack([torch.linspace(0, 2, 20), torch.arange(20) % 2], 1)[None]
        >>> flags_doubt("the input", x, "batch").partition(";")[0]
        'channel 1 of the input, on axis -1, holds 0 and 1 alone, as a mask or a category does, and noise would go there'
    """
    if x.ndim != 3:
        return None
    dim = -2 if x.shape[-2] < x.shape[-1] else -1
    channels = x.movedim(dim, 0).flatten(1)
    if channels.shape[1] < _ENOUGH:
        return None
    are_binary = ((channels == 0) | (channels == 1)).all(1)
    found = (are_binary & (channels.amin(1) < channels.amax(1))).nonzero().flatten().tolist()
    if not found or are_binary.all():  # a black and white image
        return None
    index = f"torch.tensor({found}, device={access}.device)"
    what = (
        f"channel {found[0]} of {name}, on axis {dim}, holds"
        if len(found) == 1
        else f"channels {found} of {name}, on axis {dim}, hold"
    )
    return (
        f"{what} 0 and 1 alone, as a mask or a category does, and noise would go there; to prevent this, type "
        f"mask=lambda batch: torch.ones_like({access}).index_fill({dim}, {index}, 0)"
    )


def numbers_doubt(batch: Any, path: Path) -> str | None:
    """Returns a warning if the default input is one number for each sample, such as a weight, beside larger leaves.

    Example:
        >>> numbers_doubt({"weight": torch.ones(2), "ids": torch.ones(2, 9).long()}, ("weight",)).partition(";")[0]
        "the input 'weight' is one number for each sample, but 'ids' int64 (2, 9) is larger"
    """
    leaf = get(batch, path)
    if not isinstance(leaf, Tensor) or leaf.ndim != 1:
        return None
    larger = [(other, each) for other, each in leaves(batch) if each.ndim > 1 and not looks_like_mask(other, each, each)]
    if not larger:
        return None
    other, each = larger[0]
    typed = repr(other[0] if len(other) == 1 else format_path(other))
    advice = f"type inputs={typed}" if each.is_floating_point() else "type EmbeddingNoise() for token ids, or inputs=…"
    return (
        f"the input {format_path(path)!r} is one number for each sample, but {format_path(other)!r} {describe(each)} is "
        f"larger; if that is the input, {advice}"
    )


def looks_like_mask(path: Path, leaf: Tensor, x: Tensor) -> bool:
    """Returns whether a leaf seems to hold the valid positions of an input, or its lengths."""
    name = str(path[-1]).lower() if path else ""
    if leaf.layout != torch.strided or leaf.is_nested:
        return False
    if leaf.ndim < 2:
        return "length" in name and leaf.shape == x.shape[:1] and x.ndim > 1 and not leaf.is_floating_point()
    return _covers(leaf, x) and (leaf.dtype == torch.bool or "mask" in name)


def _covers(leaf: Tensor, x: Tensor) -> bool:
    """Returns whether a leaf has the axes of a mask of an input."""
    axes = (x.shape[1 : leaf.ndim], x.shape[x.ndim - leaf.ndim + 1 :])
    return 1 < leaf.ndim <= x.ndim and leaf.shape[0] == x.shape[0] and leaf.shape[1:] in axes


def _is_target(batch: Any, path: Path) -> bool:
    """Returns whether a leaf is the target by default, such as the mask of a segmentation, which marks no padding."""
    try:
        return find_target(batch) == path
    except ValueError:  # the target has no default
        return False


def _holds_flags(leaf: Tensor, x: Tensor) -> bool:
    """Returns whether a leaf says for each position of an input whether it was observed, whatever its name."""
    if leaf.layout != torch.strided or leaf.is_nested or not _covers(leaf, x):
        return False
    return bool(((leaf == 0) | (leaf == 1)).all() & (leaf == 0).any())


def _write(batch: Any, path: Path) -> str:
    return f"batch{write_access(batch, path)}"


def _readings(path: Path, access: str, leaf: Tensor, x: Tensor, of_x: str) -> dict[str, Tensor]:
    """Returns the masks that a leaf may mean, by the argument to type."""
    if leaf.ndim > 1:
        return {repr(path[0] if len(path) == 1 else format_path(path)): leaf, f"lambda batch: {access} == 0": leaf == 0}
    return {  # the next batch may be longer
        f"lambda batch: torch.arange({of_x}.shape[{dim}], device={of_x}.device) < {access}[:, None]": (
            torch.arange(x.shape[dim], device=x.device) < leaf[:, None]
        )
        for dim in (1, -1)
    }


def level_doubt(
    name: str,
    values: Tensor,
    noise: Noise,
    level: float,
    snr_db: float,
    relative: str | None,
    *,
    is_sigma: bool = False,
) -> str | None:
    """Returns a warning if the noise vanishes beside the data, or the data vanish beside the noise.

    Example:
        >>> from lightning_noise.noise import SNR
        >>> "for 20 dB type schedules.from_snr_db(20)" in level_doubt("the input 'x'", torch.ones(2), SNR(), 20.0, -26.0, None)
        True
    """
    low, high = values.min().item(), values.max().item()
    distance = f"{abs(snr_db):.0f} dB {'above' if snr_db < 0 else 'below'} {name}, whose values are in [{low:g}, {high:g}]"
    has_units = noise.additive and not relative
    if snr_db > _HIGHEST_SNR_DB and has_units:  # infinite data have none
        advice = "a larger sigma" if is_sigma else 'relative="std" for a level in units of their deviation'
        return (
            f"{noise.title} at level {level:g} is {distance}: the level has the units of the data. {_ways_out(low, high)}type "
            f"{advice}"
        )
    if snr_db < _LOWEST_SNR_DB and noise.max_level == math.inf:
        advice = f"type a lower {'sigma' if is_sigma else 'level'}"
        if noise.level_usage != Noise.level_usage:
            advice = f"for {level:g} dB type {noise.level_usage.format(f'{level:g}')}"
        elif has_units and low >= 0 and high <= 1.5:
            advice = f"for a level in units of pixels up to 255 type {level / 255:.2g}"
        return f"{noise.title} at level {level:g} is {distance}: the level is the {noise.unit}; {advice}"
    return None


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
        >>> "type noise.Masking(dim=(-2,))" in axis_doubt("the input 'x'", torch.ones(8, 100, 3), Masking(dim=(-1,)))
        True
    """
    dim: Any = getattr(noise, "dim", None)
    where = channels_doubt(name, x, (dim,) if isinstance(dim, int) else dim, noise.title)
    if where is None:
        return None
    doubt, better = where
    if all(field.name != "dim" for field in fields(noise)):  # type: ignore[arg-type]
        return f"{doubt} type x.movedim(-1, 1) in the data set or collate_fn"
    return f"{doubt} type {typed(noise, dim=better[0] if isinstance(dim, int) else better)}"


def channels_doubt(name: str, x: Tensor, axes: tuple[int, ...] | None, user: str) -> tuple[str, tuple[int, ...]] | None:
    """Returns the beginning of a warning if axes look like the channels, and the axes that may be meant.

    Example:
        >>> channels_doubt("the input 'x'", torch.ones(8, 32, 32, 3), (-2, -1), "CutMix")
        ("the input 'x' has shape (8, 32, 32, 3), and for CutMix the image is in the last axes of lengths 32 and 3; for (B, H, \
W, C)", (-3, -2))
    """
    if axes == (-1,) and x.ndim == 3 and x.shape[-1] < x.shape[-2]:
        what, better, shape = f"the series is along the last axis of length {x.shape[-1]}", (-2,), "(B, T, C)"
    elif axes == (-2, -1) and x.ndim == 4 and x.shape[-1] in _CHANNELS and x.shape[-1] < min(x.shape[1:3]):
        what = f"the image is in the last axes of lengths {x.shape[-2]} and {x.shape[-1]}"
        better, shape = (-3, -2), "(B, H, W, C)"
    else:
        return None
    return f"{name} has shape {tuple(x.shape)}, and for {user} {what}; for {shape}", better


def rows_doubt(name: str, x: Tensor, batch: Any) -> str | None:
    """Returns a warning if the second axis of an input, and not the first, is as long as the target.

    Example:
        >>> rows_doubt("the input 0", torch.ones(20, 6, 8), (torch.ones(20, 6, 8), torch.zeros(6))).partition(";")[0]
        'the input 0 has 20 rows and the target 6, as if the second axis were the samples'
    """
    try:
        target = get(batch, find_target(batch))
    except ValueError:  # the target has no default
        return None
    if x.ndim < 3 or target.ndim == 0 or len(target) == len(x) or len(target) != x.shape[1]:
        return None
    return (
        f"{name} has {len(x)} rows and the target {len(target)}, as if the second axis were the samples; for (T, B, C) let the "
        "collate_fn return x.transpose(0, 1), and type batch_first=True in the layers"
    )


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
