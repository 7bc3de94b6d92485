"""The figure of the certified accuracy against the radius."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_noise.evaluation.certified import Certified
from lightning_noise.plots.style import COLORS, arrange, label_of, label_sides, legend_of, panels, set_ticks, styled

__all__ = ["certified_accuracy"]


@styled
def certified_accuracy(*results: Certified, names: Sequence[str] = ()) -> Figure:
    """Draws the certified accuracy against the radius, a line for each result of a ``RandomizedSmoothing``.

    The band is the 95 % interval over samples of the same kind. A line ends in 0 at the largest radius that its draws can
    certify.

    Args:
        results: The results.
        names: The names of the results in the legend. Default: sigma.

    Example:
        >>> about = {"sigma": 0.5, "norm": "l2", "n": 400, "radius": 0.4, "abstentions": 0.01, "clean": 0.97}
        >>> curve = {"accuracies": (0.96, 0.8, 0.4), "low": (0.94, 0.76, 0.35), "high": (0.98, 0.84, 0.45)}
        >>> figure = certified_accuracy(Certified(radii=(0.0, 0.5, 1.0), **curve, **about))
        >>> figure.axes[0].lines[0].get_xydata().tolist()
        [[0.0, 96.0], [0.5, 80.0], [1.0, 40.0], [1.0, 0.0]]
    """
    names = names or [f"$\\sigma$ = {result.sigma:g}" for result in results]
    figure, (axes,) = panels(1)
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        color = COLORS[i % len(COLORS)]
        radii = [*result.radii, result.radii[-1]]
        value, low, high = (100 * np.array([*each, 0.0]) for each in (result.accuracies, result.low, result.high))
        axes.plot(radii, value, color=color, label=name, zorder=3)
        axes.fill_between(radii, low, high, color=color, alpha=0.2, linewidth=0)
    norms = sorted({{"l1": "L1", "l2": "L2"}[result.norm] for result in results})
    axes.set(xlabel=f"{' or '.join(norms)} radius", ylim=(0, 103), xlim=(0, 1.03 * max(result.radii[-1] for result in results)))
    set_ticks(axes.xaxis, 5)
    arrange(figure, legend=legend_of([axes]))
    label_sides(figure, "", label_of("certified accuracy", "%"))
    return figure
