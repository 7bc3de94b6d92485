"""Figures of levels: schedules, adaptive levels and range tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from lightning_noise.plots.pictures import extremes
from lightning_noise.plots.style import (
    COLORS,
    DPI,
    GRAY,
    PaperFigure,
    arrange,
    finite,
    label_of,
    label_sides,
    legend_of,
    panels,
    set_ticks,
    set_up,
    styled,
)
from lightning_noise.report.markdown import column_of
from lightning_noise.rules import Decision, Rule
from lightning_noise.schedules import Level, level_at, moments

__all__ = ["adaptation", "range_test", "schedule_preview"]

_BLUE, _ORANGE, _BLACK, _RED, _SKY, _GREEN, _PINK = COLORS
# color and marker of the reasons for which a level rose or fell; it stays for many reasons, which share a dot
_RISES = ((_GREEN, "^"), (_SKY, "P"))
_FALLS = ((_RED, "v"), (_BLACK, "X"), (_ORANGE, "s"), (_PINK, "D"))


@styled
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
    figure, grid = panels(len(schedules))
    most = 24 if len(grid) > 9 else 32  # characters above a panel; four stand side by side if there are more than nine
    for axes, (label, schedule) in zip(grid, schedules.items(), strict=True):
        levels = [level_at(schedule, progress) for progress in moments(steps, epochs, most=20_000)]
        drawn = extremes(torch.tensor([levels], dtype=torch.float64), n_stretches=1000)[0].numpy()
        times = np.arange(len(drawn)) * (steps / len(drawn))
        axes.step(times, drawn, where="post", color=_BLUE)
        axes.fill_between(times, drawn, step="post", color=_BLUE, alpha=0.2, linewidth=0)
        axes.set_title(f"{label_of(label, width=most)}\nmean {sum(levels) / len(levels):.3g}")
        axes.set_xlim(0, steps)
        set_ticks(axes.xaxis, 4)
    grid[0].set_ylim(0, None)  # all panels share the axis
    arrange(figure, title_lines=max(axes.get_title(loc="left").count("\n") + 1 for axes in grid))
    label_sides(figure, "optimizer step", "level")
    return figure


@styled
def adaptation(history: Sequence[Decision], rule: Rule | None = None) -> Figure:
    """Draws the course of an adaptive level, and beneath it the number that its rule follows.

    A marker shows the reason of each change: a level that rose or fell. A dashed line is the value of the number at which the
    level settles.

    Args:
        history: The decision at each validation, such as ``callback.adaptive.history``.
        rule: The rule, for the name of the number and its aim.

    Example:
        >>> moves = [Decision(100, 0.0, 0.9, 0.9, "raised", 0.15, 1.0), Decision(200, 0.15, 0.9, 0.84, "held", 0.15, 0.93)]
        >>> [text.get_text() for text in adaptation(moves).legends[0].get_texts()]
        ['raised', 'no change']
    """
    figure = PaperFigure(dpi=DPI)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes in above, below:
        set_up(axes)
    _draw_moves(above, history, () if rule is None else rule.reasons)
    _draw_followed(below, history, rule)
    above.set(ylabel="level", ylim=(0, None))
    below.set(xlabel="step")
    set_ticks(below.xaxis, 5)
    arrange(figure, height=1.15, gap=0.12, title_lines=0, legend=legend_of([above, below]))
    figure.align_ylabels()
    return figure


def _draw_moves(axes: Axes, history: Sequence[Decision], reasons: Sequence[str]) -> None:
    steps = [decision.step for decision in history]
    # the level at a validation has held since the validation before
    axes.step(steps, finite([decision.level for decision in history]), where="pre", color="0.6", linewidth=1)
    looks = {1: list(_RISES), -1: list(_FALLS), 0: [("0.6", ".")]}
    size = 4.5 if len(history) <= 60 else 2.5
    signs = {decision: int(np.sign(np.nan_to_num(decision.next_level - decision.level))) for decision in history}
    moves = dict.fromkeys([*reasons, *(decision.reason for decision in history)])
    for sign, name in [*((sign, reason) for sign in (1, -1) for reason in moves), (0, None)]:
        shown = [each for each in history if signs[each] == sign and name in (each.reason, None)]
        if shown:
            color, marker = looks[sign].pop(0) if len(looks[sign]) > 1 else looks[sign][0]
            x, y = [each.step for each in shown], finite([each.level for each in shown])
            label = "no change" if name is None else name.replace("_", " ")
            # not clipped, so that a marker at level 0 is whole
            axes.plot(x, y, marker, color=color, markersize=size, label=label, clip_on=False, zorder=3 + abs(sign))


def _draw_followed(axes: Axes, history: Sequence[Decision], rule: Rule | None) -> None:
    column = column_of("retention" if rule is None else rule.follows)
    values = column.factor * finite([decision.followed for decision in history])
    axes.plot([decision.step for decision in history], values, color=_BLUE, marker=".")
    axes.set_ylabel(label_of(column.name.replace("_", " "), column.unit))
    if rule is not None and rule.aim is not None:
        axes.axhline(column.factor * rule.aim, color=GRAY, linestyle="--", linewidth=0.8, zorder=1)


@styled
def range_test(
    curve: Mapping[float, float], level: float, value: float, *, metric: str = "retention", unit: str = "level"
) -> Figure:
    """Draws a metric against the level on a logarithmic axis, and marks the level that a range test suggests.

    Args:
        curve: The value at each level. Level 0 has no place on a logarithmic axis and is left out.
        level: The suggested level, or NaN if the range test suggests no level.
        value: The value at that level.
        metric: The name of the metric.
        unit: What the level is.

    Example:
        >>> figure = range_test({0.01: 1.0, 0.1: 0.95, 1.0: 0.3}, 0.12, 0.9)
        >>> figure.axes[0].get_xscale(), figure.axes[0].get_title(loc="left")
        ('log', 'level 0.12 at 90 %')
    """
    figure, (axes,) = panels(1)
    column = column_of(metric)
    levels, values = zip(*sorted(point for point in curve.items() if point[0] > 0), strict=True)
    values = finite([column.factor * each for each in values])
    axes.axhline(column.factor * value, color=GRAY, linewidth=0.8, linestyle="--")
    axes.semilogx(levels, values, color=_BLUE, marker="o", clip_on=False, zorder=3)
    title = "no level is suggested"
    if math.isfinite(level):
        axes.vlines(level, 0, column.factor * value, color=_RED, linewidth=0.8)
        axes.plot([level], [column.factor * value], "D", color=_RED, markersize=6, zorder=4)
        title = f"level {level:.2g} at {column.factor * value:g} {column.unit}".rstrip()
    axes.set_title(title)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    shown = values[np.isfinite(values)]
    axes.set(xlabel=label_of(unit), ylabel=label_of(column.name, column.unit))
    axes.set_ylim(min([0, *shown]), 1.03 * max([column.factor, *shown]))
    axes.set_xlim(levels[0] / 1.2, 1.2 * levels[-1])  # also if a value alone is finite
    arrange(figure)
    return figure
