"""Figures of schedules, noisy samples, robustness and calibration.

Each function returns a matplotlib figure without side effects on pyplot and on the settings of matplotlib. The figures have one
style, whose colors also differ in gray. ``figure.savefig("figure.pdf")`` writes vectors, with text as text. A notebook shows
the figures after ``%matplotlib inline``.
"""

from lightning_noise.plots.calibration import reliability_diagram
from lightning_noise.plots.certified import certified_accuracy
from lightning_noise.plots.curve import robustness_curve
from lightning_noise.plots.level import adaptation, range_test, schedule_preview
from lightning_noise.plots.pictures import samples

__all__ = [
    "adaptation",
    "certified_accuracy",
    "range_test",
    "reliability_diagram",
    "robustness_curve",
    "samples",
    "schedule_preview",
]
