"""Figures of schedules, noisy samples, robustness and calibration.

Each function takes numbers and returns a matplotlib figure without side effects on pyplot. A notebook shows the figures after
``%matplotlib inline``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    figure = Figure(figsize=(3.4 * columns, 1.7 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (label, schedule) in zip(grid, schedules.items(), strict=False):
        levels = [level_at(schedule, progress) for progress in moments(steps, epochs)]
        axes.step(range(steps), levels, where="post")
        axes.fill_between(range(steps), levels, step="post", alpha=0.2)
        axes.set_title(f"{label}\nmean {sum(levels) / steps:.3g}", loc="left", fontsize=9)
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
    figure = Figure(figsize=(4.8, 3.2), dpi=_DPI, layout="constrained")
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
        sign = int(np.sign(sum(decision.next_level - decision.level for decision in moves)))
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
    axes.set(xlabel="level of the noise", ylabel=ylabel, ylim=(min(0, *curve.values()), None))
    _add_grid(axes)
    return figure


def reliability_diagram(panels: Mapping[str, Sequence[Tensor]]) -> Figure:
    r"""Draws the accuracy against the mean confidence of binned predictions, a panel for each title.

    In a perfectly calibrated model, the accuracy of a bin lies within the gray bar
    :math:`\text{conf}_b \pm 2 \sqrt{S_b} / n_b` in about 95 of 100 bins. Bins outside their bar are red. Below the diagonal the
    model is over-confident, above the diagonal under-confident. The strip at the bottom shows the share of the predictions in
    each bin. The title gives the expected calibration error and the error that chance alone would show,
    :func:`~lightning_noise.metrics.calibration.calibration_floor`.

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
    columns: Mapping[str, Tensor], *, n_samples: int = 4, captions: Mapping[str, Sequence[str]] | None = None
) -> Figure | None:
    """Draws samples as images or signals, a row for each sample and a column for each tensor.

    Images have shape (B, C, H, W) with one or three channels, or (B, H, W) with more than eight rows. Signals have shape
    (B, C, T) with up to eight channels, or (B, T) with at least 64 points. The colors of an image span the range of values of
    the same sample in the first column.

    Args:
        columns: The tensors by title, all of the same samples.
        n_samples: How many samples to draw.
        captions: A short text for each sample, such as the predicted class, by title. A text that differs from the text in the
            first column is red.

    Returns:
        The figure, or ``None`` if the tensors are neither images nor signals.

    Example:
        >>> figure = samples({"clean": torch.zeros(2, 1, 8, 8), "noisy": torch.ones(2, 1, 8, 8)})
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['clean', 'noisy']
        >>> samples({"clean": torch.zeros(2, 3)}) is None
        True
    """
    tensors = {label: x[:n_samples].detach().float().cpu() for label, x in columns.items()}
    first = next(iter(tensors.values()))
    texts = [captions[label][: len(first)] for label in columns] if captions else []
    if (first.ndim == 3 and first.shape[1] <= 8) or (first.ndim == 2 and first.shape[1] >= 64):
        return _draw_signals(tensors, texts)
    if first.ndim == 3 or (first.ndim == 4 and first.shape[1] in (1, 3)):
        return _draw_images(tensors, texts)
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


def _draw_signals(columns: Mapping[str, Tensor], texts: Sequence[Sequence[str]]) -> Figure:
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.6 * len(columns), 1.1 * rows + 0.4), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False, sharex=True, sharey="row")
    for column, (label, x) in zip(grid.T, columns.items(), strict=True):
        column[0].set_title(label, fontsize=9)
        for axes, signal in zip(column, x, strict=True):
            axes.plot(signal.view(-1, signal.shape[-1]).T.numpy(), linewidth=0.8)
            axes.tick_params(labelsize=7)
    _write(texts, lambda row, column: (grid[row, column], (0, 1), "axes fraction"))
    return figure


def _draw_images(columns: Mapping[str, Tensor], texts: Sequence[Sequence[str]]) -> Figure:
    """Draws all images as one array, because a figure of many axes takes long to draw."""
    tiles = [_tiles(x, next(iter(columns.values()))) for x in columns.values()]
    rows, height, width, channels = tiles[0].shape
    array = torch.stack(tiles).permute(1, 2, 0, 3, 4).reshape(rows * height, len(tiles) * width, channels)
    figure = Figure(figsize=(len(tiles), rows * height / width + 0.4), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(array.numpy(), cmap="gray", vmin=0, vmax=1)
    # a name and its level stand in two lines, because in one line they would touch the next title
    axes.set_xticks([(i + 0.5) * width - 0.5 for i in range(len(tiles))], [label.replace(" ", "\n") for label in columns])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    _write(texts, lambda row, column: (axes, (column * width, row * height), "data"))
    return figure


def _write(texts: Sequence[Sequence[str]], place: Callable[[int, int], tuple[Axes, tuple[float, float], str]]) -> None:
    """Writes each caption into the axes, at the corner and in the coordinates that ``place`` returns for row and column."""
    for column, captions in enumerate(texts):
        for row, text in enumerate(captions):
            axes, corner, coordinates = place(row, column)
            color = "black" if text == texts[0][row] else "tab:red"
            axes.annotate(text, corner, (6, -6), xycoords=coordinates, color=color, **_CAPTION)


def _tiles(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the images in [0, 1] in the range of the reference, with a white margin and the channels last."""
    images, reference = (x.unsqueeze(1) if x.ndim == 3 else x for x in (images, reference))
    low, high = reference.amin((1, 2, 3), keepdim=True), reference.amax((1, 2, 3), keepdim=True)
    scaled = ((images - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    margin = max(1, scaled.shape[-1] // 16)
    return pad(scaled, (margin, margin, margin, margin), value=1.0).movedim(1, -1)
