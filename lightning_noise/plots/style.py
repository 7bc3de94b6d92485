"""The style of the figures: colors, markers, sizes and axes.

The colors are those of Okabe and Ito, which people with color blindness tell apart, in an order in which neighbors also differ
in gray. Lines of one panel differ in their markers, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from textwrap import wrap
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = [
    "CARD",
    "COLORS",
    "DPI",
    "GRAY",
    "MARKERS",
    "MOST_INCHES",
    "WIDEST",
    "PaperFigure",
    "arrange",
    "finite",
    "label_of",
    "label_sides",
    "legend_of",
    "panels",
    "set_ticks",
    "set_up",
    "styled",
]

COLORS = ("#0072B2", "#E69F00", "#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
MARKERS = "osD^vPX"
GRAY = "0.45"
# few inches keep the text legible in a card of TensorBoard; many dots keep the opened card sharp
DPI = 150
MOST_INCHES = 9.9  # of a side: 1485 dots

_STYLE: Any = {
    "axes.edgecolor": "0.3",
    "axes.facecolor": "white",
    "axes.labelcolor": "black",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlecolor": "black",
    "axes.titlesize": 8,
    "axes.titley": 1.0,  # otherwise each title would measure all ticks
    "figure.facecolor": "white",
    "figure.labelsize": 8,
    "font.size": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.color": "black",
}
_VECTORS: Any = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}
WIDEST = 6.9  # inches, of two columns of a paper
CARD = 14 / 3  # inches: 700 dots, of which a card of TensorBoard shows every second
_WIDTHS = {1: 3.3, 2: CARD, 3: WIDEST, 4: WIDEST}

P = ParamSpec("P")
T = TypeVar("T")


class PaperFigure(Figure):
    """A figure whose text stays text in PDF and SVG files, so that a paper can embed its fonts."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        with rc_context(_VECTORS):
            super().savefig(*args, **kwargs)


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Lets a function draw in the style of the package; the settings of the user stay as they are."""

    @wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> T:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


def panels(n: int, *, grid: bool = True, one_x: bool = False) -> tuple[Figure, list[Axes]]:
    """Returns a figure of n panels that share their y axis.

    If all have the same x axis, only the lowest panel of each column labels the ticks, because texts take long to draw.
    """
    columns = n if n <= 3 else 2 if n == 4 else 3 if n <= 9 else 4
    figure = PaperFigure(dpi=DPI)
    places = figure.add_gridspec(math.ceil(n / columns), columns)
    first = figure.add_subplot(places[0])
    every = [first, *(figure.add_subplot(places[i], sharey=first) for i in range(1, n))]
    for i, axes in enumerate(every):
        set_up(axes, grid=grid)
        if i % columns:
            axes.tick_params(labelleft=False)
        if one_x and i + columns < n:
            axes.tick_params(labelbottom=False)
    return figure, every


def arrange(
    figure: Figure,
    *,
    width: float = WIDEST,
    height: float = 1.25,
    gap: float | None = None,
    title_lines: int = 1,
    label_lines: int = 1,
    legend: Mapping[str, Any] | None = None,
) -> None:
    """Sets the size and the margins of a figure: as wide as a column of a paper, or as two.

    A constrained layout would take as long as the drawing.

    Args:
        figure: The figure.
        width: The largest width in inches.
        height: The height of a panel in inches.
        gap: The inches between two rows. Default: enough for labels and titles.
        title_lines: The lines of a title.
        label_lines: The lines of the labels of the x axes.
        legend: What the legend above the panels explains, by name.
    """
    rows, columns = figure.axes[0].get_gridspec().get_geometry()  # type: ignore[union-attr]
    width, left, right, between = min(_WIDTHS[columns], width), 0.6, 0.12, 0.22
    names = list(legend or ())
    widths = [0.45 + 0.052 * len(name) for name in names]  # of the entries of the legend
    n_across = len(names) if sum(widths) < width - 0.1 else int((width - 0.1) / max(widths))
    header = 0.03 + 0.13 * math.ceil(len(names) / max(1, n_across))
    above, below = 0.07 + 0.14 * title_lines, 0.22 + 0.14 * label_lines
    gap = above + below if gap is None else gap
    height = min(height, (MOST_INCHES - header - above - below - (rows - 1) * gap) / rows)
    total = header + above + rows * height + (rows - 1) * gap + below
    across = (width - left - right - (columns - 1) * between) / columns
    figure.set_size_inches(width, total)
    figure.subplots_adjust(
        left / width,
        below / total,
        1 - right / width,
        1 - (header + above) / total,
        wspace=between / across,
        hspace=gap / height,
    )
    if names:
        figure.legend(
            list((legend or {}).values()),
            names,
            loc="upper left",
            bbox_to_anchor=(0.05 / width, 1 - 0.03 / total),
            ncols=n_across,
            borderaxespad=0,
            borderpad=0,
            handletextpad=0.5,
            columnspacing=1.2,
            labelspacing=0.25,
        )


def legend_of(grid: Iterable[Axes]) -> dict[str, Any]:
    """Returns what a legend of all axes explains, by name."""
    found: dict[str, Any] = {}
    for axes in grid:
        found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | found
    return found


def label_sides(figure: Figure, x: str, y: str) -> None:
    """Writes one label beneath all panels and one beside them."""
    width, height = figure.get_size_inches()
    if x:
        figure.supxlabel(x, y=0.04 / height, va="bottom")
    figure.supylabel(y, x=0.05 / width, ha="left")


def set_up(axes: Axes, *, grid: bool = True) -> None:
    """Gives axes the ticks and grid of the style; ticks are made when a figure is drawn, outside its style."""
    axes.tick_params(labelsize=7, length=2.5, width=0.6, pad=2, color="0.3", labelcolor="black")
    axes.set_axisbelow(True)
    set_ticks(axes.yaxis, 5)
    if grid:
        axes.grid(color="0.9", linewidth=0.6, linestyle="-")


def set_ticks(axis: Axis, n: int) -> None:
    """Gives an axis about n ticks at round numbers, written in as few digits as possible."""
    axis.set_major_locator(_RoundNumbers(n, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "\N{MINUS SIGN}")))


class _RoundNumbers(MaxNLocator):
    """Finds ticks within the limits alone; a tick takes long to make, even if it is not drawn."""

    axis: Any

    def __call__(self) -> Any:
        low, high = sorted(self.axis.get_view_interval())
        ticks, rounding = np.asarray(super().__call__()), 1e-9 * (high - low)
        return ticks[(ticks >= low - rounding) & (ticks <= high + rounding)]


def label_of(name: str, unit: str = "", width: int = 32) -> str:
    """Returns the label of an axis, in lines of about equal length if it is longer than a width.

    Example:
        >>> label_of("accuracy", "%")
        'accuracy (%)'
    """
    label = f"{name} ({unit})" if unit else name
    n_lines = math.ceil(len(label) / width)
    return label if n_lines <= 1 else "\n".join(wrap(label, min(width, len(label) // n_lines + 6)))


def finite(values: Any) -> np.ndarray:
    """Returns numbers as an array in which gaps stand for what is not finite."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)
