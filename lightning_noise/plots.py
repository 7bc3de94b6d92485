"""Figures of schedules, noisy samples, robustness and calibration.

Each function takes numbers and returns a matplotlib figure without side effects on pyplot. A notebook shows the figures after
``%matplotlib inline``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from lightning_noise.metrics.calibration import calibration_floor, expected_calibration_error
from lightning_noise.rules import Decision
from lightning_noise.schedules import Level, level_at, moments

__all__ = ["adaptation", "range_test", "reliability_diagram", "robustness_curve", "samples", "schedule_preview"]

# few inches keep the text legible in a card of TensorBoard; many dots keep the opened card sharp
_DPI = 130
_MOST_INCHES = 11.5  # of a side: 1495 dots
_MOST_COLUMNS = 11
_MOST_CHANNELS = 8
# the reasons for which a level rose, stayed or fell
_COLORS = {
    1: ("tab:green", "tab:olive"),
    0: ("0.4", "tab:blue", "tab:cyan"),
    -1: ("tab:red", "tab:purple", "tab:pink", "black"),
}
_CAPTION: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": 7,
    "va": "top",
    "bbox": {"facecolor": "white", "alpha": 0.9, "linewidth": 0, "pad": 1},
}


def schedule_preview(schedules: Mapping[str, Level], *, steps: int, epochs: int | None = None) -> Figure:
    r"""Draws the level of each schedule over a run, in a panel with the mean level in the title.

    Args:
        schedules: The schedules by label.
        steps: The optimizer steps of the run.
        epochs: The epochs of the run, which a schedule in epochs needs.

    Example:
        >>> from lightning_noise.schedules import Linear
        >>> figure = schedule_preview({"ramp": Linear(0.0, 0.5)}, steps=100)
        >>> figure.axes[0].get_title(loc="left")
        'ramp\nmean 0.247'
    """
    columns = min(3, math.ceil(math.sqrt(len(schedules))))
    rows = math.ceil(len(schedules) / columns)
    figure = Figure(figsize=(3.4 * columns, min(1.7 * rows, 14.5) + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (label, schedule) in zip(grid, schedules.items(), strict=False):
        levels = [level_at(schedule, progress) for progress in moments(steps, epochs, most=20_000)]
        drawn = _extremes(torch.tensor([levels], dtype=torch.float64), n_stretches=1000)[0]
        times = np.arange(len(drawn)) * (steps / len(drawn))
        axes.step(times, drawn.numpy(), where="post")
        axes.fill_between(times, drawn.numpy(), step="post", alpha=0.2)
        axes.set_title(f"{label}\nmean {sum(levels) / len(levels):.3g}", loc="left", fontsize=9)
        axes.tick_params(labelbottom=True, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(schedules) :]:
        axes.remove()
    grid[0].set(xlim=(0, steps), ylim=(0, None))  # all panels share the axes
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("level", fontsize=9)
    return figure


def robustness_curve(curves: Mapping[str, Mapping[float, float]], *, ylabel: str = "accuracy") -> Figure:
    """Draws a metric against the level of the noise, a line for each noise.

    Args:
        curves: The value at each level, by label. Level 0 is clean.
        ylabel: The name of the metric.

    Example:
        >>> figure = robustness_curve({"gaussian": {0.0: 0.95, 0.2: 0.8, 0.1: 0.9}})
        >>> figure.axes[0].lines[0].get_xydata().tolist()
        [[0.0, 0.95], [0.1, 0.9], [0.2, 0.8]]
    """
    height = 3.0 + 0.2 * math.ceil(len(curves) / 3)  # the rows of the legend
    figure = Figure(figsize=(4.8, min(height, _MOST_INCHES)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(*zip(*sorted(curve.items()), strict=True), marker="o", markersize=4, label=label)
    axes.set(xlabel="level of the noise", ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    _add_grid(axes)
    # inside the axes it would cover lines
    figure.legend(loc="outside upper left", ncols=min(3, len(curves)), frameon=False, fontsize=9)
    return figure


def adaptation(history: Sequence[Decision]) -> Figure:
    """Draws the course of an adaptive level, and beneath it the metric that its rule followed.

    The markers show the reason of each decision. A triangle points up if the level rose and down if the level fell; a dot means
    that the level stayed.

    Args:
        history: The decision at each validation, such as ``callback.adaptive.history``.

    Example:
        >>> moves = [Decision(100, 0.0, 0.9, 0.9, "raised", 0.15), Decision(200, 0.15, 0.9, 0.84, "held", 0.15)]
        >>> [text.get_text() for text in adaptation(moves).axes[0].get_legend().get_texts()]
        ['raised', 'held']
    """
    figure = Figure(figsize=(4.8, 3.6), dpi=_DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [decision.step for decision in history]
    # the level at a validation has held since the validation before
    above.step(steps, [decision.level for decision in history], where="pre", color="0.6", linewidth=1)
    colors = {sign: cycle(colors_of_sign) for sign, colors_of_sign in _COLORS.items()}
    for reason in dict.fromkeys(decision.reason for decision in history):
        moves = [decision for decision in history if decision.reason == reason]
        sign = int(np.sign(np.nan_to_num(sum(decision.next_level - decision.level for decision in moves))))
        x, y = [decision.step for decision in moves], [decision.level for decision in moves]
        # not clipped, so that a marker at level 0 is whole
        above.plot(x, y, "vo^"[sign + 1], color=next(colors[sign]), markersize=4, label=reason, clip_on=False, zorder=3)
    above.set(ylabel="level", ylim=(0, None))
    below.plot(steps, [decision.clean for decision in history], label="without noise", color="tab:blue")
    if any(math.isfinite(decision.boundary) for decision in history):
        below.plot(steps, [decision.boundary for decision in history], label="at the level", color="tab:orange")
    below.set(ylabel="metric", xlabel="step")
    figure.align_ylabels()
    for axes in above, below:
        # above the axes, where the legend covers no point
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, frameon=False, columnspacing=1)
        _add_grid(axes)
    return figure


def range_test(curve: Mapping[float, float], level: float, value: float, *, ylabel: str = "retention") -> Figure:
    """Draws a value against the level on a logarithmic axis, and marks the level that a range test suggests.

    Args:
        curve: The value at each level.
        level: The suggested level, or NaN if the range test suggests no level.
        value: The value at that level.
        ylabel: The name of the value.

    Example:
        >>> figure = range_test({0.01: 1.0, 0.1: 0.95, 1.0: 0.3}, 0.12, 0.9)
        >>> figure.axes[0].get_xscale(), figure.axes[0].texts[0].get_text()
        ('log', '0.12')
    """
    figure = Figure(figsize=(4.8, 3.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.semilogx(*zip(*sorted(curve.items()), strict=True), marker="o", markersize=4)
    axes.axhline(value, color="0.5", linewidth=0.8, linestyle="--")
    if math.isfinite(level):
        axes.plot([level], [value], "o", color="tab:red", markersize=8)
        axes.annotate(f"{level:.2g}", (level, value), (6, 6), textcoords="offset points", color="tab:red")
    axes.set(xlabel="level of the noise", ylabel=ylabel, ylim=(min([0, *filter(math.isfinite, curve.values())]), None))
    _add_grid(axes)
    return figure


def reliability_diagram(panels: Mapping[str, Sequence[Tensor]]) -> Figure:
    r"""Draws the accuracy against the mean confidence of binned predictions, a panel for each title.

    In a perfectly calibrated model, the accuracy of a bin lies within the gray bar
    :math:`\text{conf}_b \pm 2 \sqrt{S_b} / n_b` in about 95 of 100 bins. Bins outside their bar are red. Below the diagonal the
    model is over-confident, above the diagonal under-confident. The strip at the bottom shows the share of the predictions in
    each bin. The title gives the expected calibration error and the error that chance alone would show,
    :func:`~lightning_noise.metrics.calibration.calibration_floor`. Of more than twelve panels, twelve are drawn.

    Args:
        panels: Four sums over the predictions in each bin, by title: the confidence :math:`c`, the number of correct
            predictions, the number of predictions, and :math:`S = \sum c (1 - c)`. Each has shape :math:`(M,)` for :math:`M`
            bins of equal width.

    Example:
        >>> confidence, correct, count = torch.tensor([0.0, 80.0]), torch.tensor([0, 60]), torch.tensor([0, 100])
        >>> figure = reliability_diagram({"clean": (confidence, correct, count, torch.tensor([0.0, 16.0]))})
        >>> figure.axes[0].get_title(loc="left")
        'clean\nECE 0.200, by chance 0.032'
    """
    panels = {title: panels[title] for title in _spread(list(panels), 12)}
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    width, height = 1.8 * columns + 0.3, 1.9 * rows + 0.3
    figure = Figure(figsize=(width, height), dpi=_DPI)
    # by hand, because a constrained layout takes as long as the drawing
    figure.subplots_adjust(0.5 / width, 0.45 / height, 1 - 0.1 / width, 1 - 0.4 / height, wspace=0.25, hspace=0.45)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, sums) in zip(grid, panels.items(), strict=False):
        _draw_reliability(axes, title, *(x.double().cpu() for x in sums))
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("confidence", fontsize=8, y=0.04 / height, va="bottom")
    figure.supylabel("accuracy", fontsize=8, x=0.04 / width, ha="left")
    return figure


def samples(
    columns: Mapping[str, Tensor | Sequence[Tensor]],
    *,
    n_samples: int = 4,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure | None:
    """Draws samples as images or signals, a row for each sample and a column for each tensor.

    An image has shape (C, H, W) or (H, W, C) with one, three or four channels, or (H, W), and no side is many times the other.
    The colors of an image span the range of values of the same sample in the first column; NaN is red. Any other sample is
    drawn as signals: the longest axis is time, and the first eight of the others are drawn as lines. A gap in a line is NaN or
    infinite. Large images and long signals are thinned out, but the peaks of a signal stay. At most eleven columns are drawn.

    Args:
        columns: The tensors by title, all of the same samples. Samples of different sizes come as a list of tensors.
        n_samples: How many samples to draw.
        captions: A short text for each sample, such as the predicted class, by title. A text that differs from the text in the
            first column is red.

    Returns:
        The figure, or ``None`` if there is no sample, or a sample is a single number or has more than three axes.

    Example:
        >>> figure = samples({"clean": torch.zeros(2, 1, 8, 8), "noisy": torch.ones(2, 1, 8, 8)})
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['clean', 'noisy']
        >>> samples({"clean": torch.zeros(2), "noisy": torch.ones(2)}) is None
        True
    """
    titles = _spread(list(columns), _MOST_COLUMNS)
    shown = {title: [_as_real(x) for x in columns[title][:n_samples]] for title in titles}
    first = shown[titles[0]]
    texts = [captions[title][: len(first)] for title in titles] if captions else []
    if not first:
        return None
    if all(_as_image(x) is not None for x in first):
        return _draw_images(shown, texts)
    if all(x.ndim <= 3 and max(x.shape, default=1) > 1 for x in first):
        return _draw_signals(shown, texts)
    return None


def _add_grid(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_reliability(
    axes: Axes, title: str, confidence_sum: Tensor, correct: Tensor, count: Tensor, variance_sum: Tensor
) -> None:
    error, floor = expected_calibration_error(confidence_sum, correct, count), calibration_floor(variance_sum, count)
    axes.set_title(f"{title}\nECE {error:.3f}, by chance {floor:.3f}", loc="left", fontsize=8)
    # NaN in empty bins
    confidence, accuracy, chance = confidence_sum / count, correct / count, 2 * variance_sum.sqrt() / count
    low, high = (confidence - chance).clamp_min(0), (confidence + chance).clamp_max(1)
    edges = np.linspace(0, 1, len(count) + 1)
    axes.stairs(high.numpy(), edges, baseline=low.numpy(), fill=True, color="0.85")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    outside = (accuracy - confidence).abs() > chance
    for bins, color in ((count > 0) & ~outside, "tab:blue"), (outside, "tab:red"):
        x, y = confidence[bins].numpy(), accuracy[bins].numpy()
        axes.vlines(x, x, y, colors=color, linewidth=1)
        axes.plot(x, y, "o", color=color, markersize=3)
    # the share of the predictions in each bin, in a strip beneath the accuracies
    axes.stairs((0.22 * count / count.max() - 0.3).numpy(), edges, baseline=-0.3, fill=True, color="0.6")
    axes.axhline(0, color="black", linewidth=0.8)
    ticks, labels = (0, 0.5, 1), ("0", "0.5", "1")
    axes.set(xlim=(0, 1), ylim=(-0.3, 1.03), xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
    axes.tick_params(labelsize=8, length=2, pad=2)
    axes.spines[["top", "right"]].set_visible(False)


def _spread(items: list[Any], n: int) -> list[Any]:
    """Returns at most n of the items, evenly spaced from the first to the last."""
    return items if len(items) <= n else [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _as_real(x: Tensor) -> Tensor:
    x = x.detach().as_subclass(Tensor).cpu()
    return x.abs() if x.is_complex() else x


def _draw_signals(columns: Mapping[str, Sequence[Tensor]], texts: Sequence[Sequence[str]]) -> Figure:
    """Draws all columns of a row into one axes, because a figure of many axes takes long to draw."""
    rows = [[_as_series(x) for x in row] for row in zip(*columns.values(), strict=True)]
    width, height = min(1.6 * len(columns), _MOST_INCHES - 0.6), min(1.1, (_MOST_INCHES - 0.7) / len(rows))
    figure = Figure(figsize=(width + 0.6, height * len(rows) + 0.7), dpi=_DPI)
    size = np.array([*figure.get_size_inches()])
    (left, bottom), (right, top) = (0.5, 0.25) / size, 1 - (0.1, 0.45) / size
    figure.subplots_adjust(left, bottom, right, top, hspace=0.1)
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, row in zip(grid, rows, strict=True):
        x, y = _side_by_side(row, n_stretches=int(width / len(columns) * _DPI))
        axes.plot(x, y, linewidth=0.8, marker="." if len(row[0][0]) <= 32 else None, markersize=3)
        axes.vlines(range(1, len(row)), 0, 1, colors="0.8", linewidth=0.8, transform=axes.get_xaxis_transform())
        axes.set(xlim=(0, len(row)), xticks=[])
        axes.tick_params(labelsize=7, length=2)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.get_offset_text().set_fontsize(6)
        axes.spines[["top", "right"]].set_visible(False)
    _set_titles(grid[0], columns, 1, min(8, 10 * width / len(columns)))
    (n_lines, n_points), n_channels = rows[0][0].shape, next(iter(columns.values()))[0].numel()
    n_channels //= n_points
    if n_channels > n_lines:
        figure.text(0.5, 0.05 / size[1], f"the first {n_lines} of {n_channels} channels", fontsize=7, ha="center")
    _write(texts, lambda row, column: (grid[row], (column, 1), grid[row].get_xaxis_transform()))
    return figure


def _as_series(x: Tensor) -> Tensor:
    """Returns the first channels of a sample as series along its longest axis, with gaps for what is not finite."""
    time = max(range(x.ndim), key=lambda dim: (x.shape[dim], dim))
    series = x.movedim(time, -1).reshape(-1, x.shape[time])[:_MOST_CHANNELS].float()
    return series.where(series.isfinite(), math.nan)


def _side_by_side(row: Sequence[Tensor], n_stretches: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns places and values of the series of a row, a line for each channel, with a gap between columns of width 1."""
    series = [pad(_extremes(x, n_stretches), (0, 1), value=math.nan) for x in row]
    places = [column + torch.linspace(0.04, 0.96, x.shape[-1]) for column, x in enumerate(series)]
    return torch.cat(places).numpy(), torch.cat(series, -1).T.double().numpy()  # a range of float32 overflows


def _extremes(series: Tensor, n_stretches: int) -> Tensor:
    """Returns a short series itself, and else the smallest and largest value of each of many stretches, so that peaks stay."""
    n = series.shape[-1]
    size = math.ceil(n / n_stretches)
    if size <= 2:
        return series
    stretches = pad(series, (0, -n % size), value=math.nan).unflatten(-1, (-1, size))
    missing = stretches.isnan()
    low, high = stretches.masked_fill(missing, math.inf).amin(-1), stretches.masked_fill(missing, -math.inf).amax(-1)
    points = torch.stack([low, high], -1).flatten(-2)
    return points.where(points.isfinite(), math.nan)


def _draw_images(columns: Mapping[str, Sequence[Tensor]], texts: Sequence[Sequence[str]]) -> Figure:
    """Draws all images as one array, because a figure of many axes takes long to draw."""
    rows = list(zip(*columns.values(), strict=True))
    side = min(_DPI, max(max(x.shape) for x, *_ in rows))
    tiles = [_tiles(row, side) for row in rows]
    height, width = (max(tile.shape[dim] for row in tiles for tile in row) for dim in (0, 1))
    board = torch.cat([torch.cat([_centered(tile, height, width) for tile in row], 1) for row in tiles])
    aspect = len(tiles) * height / width
    inches = min(1.0, (_MOST_INCHES - 0.5) / max(len(columns), aspect))
    figure = Figure(figsize=(len(columns) * inches, aspect * inches + 0.4), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(board.numpy())
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    _set_titles(axes, columns, width, min(8, 10 * inches))
    _write(texts, lambda row, column: (axes, (column * width, row * height), axes.transData))
    return figure


def _as_image(x: Tensor) -> Tensor | None:
    """Returns a sample of an image's shape as (H, W, C) with one or three channels, or ``None``."""
    if x.ndim == 2:  # may also be a series of time and channels
        return x.unsqueeze(-1) if min(x.shape) >= 8 and max(x.shape) <= 4 * min(x.shape) else None
    for image, shortest in ((x.movedim(0, -1), 2), (x, 8)) if x.ndim == 3 else ():
        *sides, channels = image.shape
        if channels in (1, 3, 4) and shortest <= min(sides) and max(sides) <= 8 * min(sides):
            return image[..., :3]
    return None


def _tiles(row: Sequence[Tensor], side: int) -> list[Tensor]:
    """Returns the images of a row in the colors of the first one, with a longest side near the given and a white margin."""
    images = [image for x in row if (image := _as_image(x)) is not None]
    longest = max(images[0].shape)
    step, factor = math.ceil(longest / side), max(1, side // longest)
    images = [image[::step, ::step].double() for image in images]  # an average of pixels would hide the noise
    images = [image.repeat_interleave(factor, 0).repeat_interleave(factor, 1) for image in images]
    finite = images[0][images[0].isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    margin = max(1, images[0].shape[1] // 16)
    tiles = []
    for image in images:
        colors = ((image - low) / (high - low)).clamp(0, 1).expand(-1, -1, 3)
        colors = torch.where(image.isnan().any(-1, keepdim=True), colors.new_tensor([0.9, 0.3, 0.3]), colors)
        tiles.append(_centered(colors, colors.shape[0] + 2 * margin, colors.shape[1] + 2 * margin))
    return tiles


def _centered(tile: Tensor, height: int, width: int) -> Tensor:
    """Returns a tile in the middle of a white one."""
    above, left = (height - tile.shape[0]) // 2, (width - tile.shape[1]) // 2
    return pad(tile, (0, 0, left, width - tile.shape[1] - left, above, height - tile.shape[0] - above), value=1.0)


def _set_titles(axes: Axes, titles: Iterable[str], width: float, size: float) -> None:
    """Writes a title above each column of a width, in data coordinates; the edge of an image is at -0.5."""
    # a name and its level stand in two lines, because in one line they would touch the next title
    labels = [title.replace(" ", "\n") for title in titles]
    axes.set_xticks([(i + 0.5) * width - 0.5 * bool(axes.images) for i in range(len(labels))], labels)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=size)


def _write(texts: Sequence[Sequence[str]], place: Callable[[int, int], tuple[Axes, tuple[float, float], Any]]) -> None:
    """Writes each caption into the axes, at the corner and in the coordinates that ``place`` returns for row and column."""
    for column, captions in enumerate(texts):
        for row, text in enumerate(captions):
            axes, corner, coordinates = place(row, column)
            color = "black" if text == texts[0][row] else "tab:red"
            axes.annotate(text, corner, (6, -6), xycoords=coordinates, color=color, **_CAPTION)
