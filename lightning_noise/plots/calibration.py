"""Reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_noise.metrics.calibration import CalibrationBins, calibration_floor, expected_calibration_error
from lightning_noise.plots import style
from lightning_noise.plots.pictures import spread

__all__ = ["reliability_diagram"]

_WITHIN, _OUTSIDE = style.COLORS[0], style.COLORS[3]


@style.styled
def reliability_diagram(panels: Mapping[str, CalibrationBins | Sequence[Tensor]]) -> Figure:
    r"""Draws the accuracy against the mean confidence of binned predictions, a panel for each title.

    In a perfectly calibrated model, the accuracy of a bin lies within the gray bar
    :math:`\text{conf}_b \pm 2 \sqrt{S_b} / n_b` in about 95 of 100 bins. Bins outside their bar are red squares. Below the
    diagonal the model is over-confident, above the diagonal under-confident. The strip at the bottom shows the share of the
    predictions in each bin. The title gives the accuracy, the expected calibration error, and the error that chance alone would
    show, :func:`~lightning_noise.metrics.calibration.calibration_floor`. At most twelve panels are drawn.

    Args:
        panels: By title, a :class:`~lightning_noise.metrics.CalibrationBins`, or four sums over the predictions in each bin:
            the confidence :math:`c`, the number of correct predictions, the number of predictions, and
            :math:`S = \sum c (1 - c)`. Each has shape :math:`(M,)` for :math:`M` bins of equal width.

    Example:
        >>> import torch
        >>> confidence, correct, count = torch.tensor([0.0, 80.0]), torch.tensor([0, 60]), torch.tensor([0, 100])
        >>> figure = reliability_diagram({"clean": (confidence, correct, count, torch.tensor([0.0, 16.0]))})
        >>> figure.axes[0].get_title(loc="left")
        'clean\naccuracy 60.0 %, n = 100\nECE 20.0 %, by chance 3.2 %'
    """
    panels = {title: panels[title] for title in spread(list(panels), 12)}
    figure, grid = style.panels(len(panels), grid=False, one_x=True)
    for axes, (title, found) in zip(grid, panels.items(), strict=True):
        sums = found.bins() if isinstance(found, CalibrationBins) else found
        _draw(axes, title, *(x.double().cpu() for x in sums))
    style.arrange(figure, height=1.6, title_lines=3, legend=style.legend_of(grid))
    style.label_sides(figure, "confidence (%)", "accuracy (%)")
    return figure


def _draw(axes: Axes, title: str, confidence_sum: Tensor, correct: Tensor, count: Tensor, variance_sum: Tensor) -> None:
    n, error = int(count.sum()), expected_calibration_error(confidence_sum, correct, count)
    floor = calibration_floor(variance_sum, count)
    accuracy, error, floor = (f"{100 * x:.1f} %" for x in (correct.sum() / count.sum(), error, floor))
    axes.set_title(f"{style.label_of(title)}\naccuracy {accuracy}, n = {n:,}\nECE {error}, by chance {floor}", fontsize=7)
    # NaN in empty bins
    confidence, share, chance = confidence_sum / count, correct / count, 2 * variance_sum.sqrt() / count
    low, high = (confidence - chance).clamp_min(0), (confidence + chance).clamp_max(1)
    edges = np.linspace(0, 1, len(count) + 1)
    axes.stairs(high.numpy(), edges, baseline=low.numpy(), fill=True, color="0.85", label="calibrated (95 %)")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    outside = (share - confidence).abs() > chance
    looks = (((count > 0) & ~outside, _WITHIN, "o", "within chance"), (outside, _OUTSIDE, "s", "miscalibrated"))
    for bins, color, marker, label in looks:
        x, y = confidence[bins].numpy(), share[bins].numpy()
        axes.vlines(x, x, y, colors=color, linewidth=1)
        axes.plot(x, y, marker, color=color, markersize=3, label=label)
    # the share of the predictions in each bin, in a strip beneath the accuracies
    axes.stairs(
        (0.22 * count / count.max() - 0.3).numpy(), edges, baseline=-0.3, fill=True, color="0.55", label="share of predictions"
    )
    axes.axhline(0, color="black", linewidth=0.6)
    ticks, labels = (0, 0.5, 1), ("0", "50", "100")
    axes.set(xlim=(0, 1), ylim=(-0.3, 1.03), xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
