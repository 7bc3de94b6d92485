"""Figures as they are seen: sizes, texts, colors and files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import Tensor

from lightning_noise import plots, schedules
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.range_test import RangeTest
from lightning_noise.evaluation.results import Estimate
from lightning_noise.plots.style import COLORS, MARKERS
from lightning_noise.report import Report, headline, markdown
from lightning_noise.rules import Decision, Governor, SignedGap

UNITS = [
    ("gaussian", "standard deviation", (0.08, 0.12, 0.18, 0.26, 0.38)),
    ("impulse", "share of elements", (0.03, 0.06, 0.09, 0.17, 0.27)),
    ("weights", "relative to the norm of the filter", (0.3, 0.6, 0.9)),
    ("a_noise_of_a_long_name", "standard deviation of the factor", (1 / 60, 1 / 25, 1 / 12)),
]


def report_of(n: int = 1, levels: int = 5, metric: str = "accuracy", clean: float = 0.95, worst: float = 0.1) -> Report:
    """Returns a report of n noises under which a metric goes from one value to another."""
    noises = {f"{name}{i // 4 or ''}": (unit, of_noise[:levels]) for i in range(n) for name, unit, of_noise in [UNITS[i % 4]]}
    values = {CLEAN: clean} | {
        Condition(name, level): worst + (clean - worst) * math.exp(-3 * level / of_noise[-1])
        for name, (_, of_noise) in noises.items()
        for level in of_noise
    }
    half = 0.02 * abs(clean)
    return Report(
        "multiclass",
        400,
        1,
        0,
        noises={name: name for name in noises},
        levels={name: of_noise for name, (_, of_noise) in noises.items()},
        shared=(),
        sizes=(200, 200),
        estimates=tuple(Estimate(place, metric, y, half / 2, y - half, y + half) for place, y in values.items()),
        units={name: unit for name, (unit, _) in noises.items()},
        chance=0.1,
    )


def history(n: int) -> list[Decision]:
    reasons = [("raised", 0.1), ("lowered", -0.1), ("held", 0.0), ("non_finite", -0.05), ("below_min_skill", -0.1)]
    moves = [reasons[i % 5] for i in range(n)]
    return [Decision(100 * i, 0.5, 0.9, 0.8, reason, 0.5 + move, 0.9 + move) for i, (reason, move) in enumerate(moves)]


def bins(share: float) -> list[Tensor]:
    """Returns sums of predictions that are right as often as a share of their confidence."""
    count = torch.arange(15.0) * 10
    confidence = (torch.arange(15) + 0.5) / 15
    return [count * confidence, (count * confidence * share).round(), count, count * confidence * (1 - confidence)]


def shown(shape: tuple[int, ...], n_levels: int, names: list[str], labelled: bool = True) -> Figure | None:
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    columns = {"clean": x} | {f"gaussian {0.08 * (i + 1):g}": x + 0.1 * i for i in range(n_levels)}
    captions = {title: [names[(row + i) % len(names)] for row in range(4)] for i, title in enumerate(columns)}
    return plots.samples(columns, captions=captions, labels=names[:4] if labelled else None)


DIGITS, LONG = list("0123"), ["golden retriever", "Labrador retriever of great length", "cat", "airplane"]
CURVE = {0.01 * 10 ** (i / 4): 1 - 0.9 / (1 + math.exp(7 - i)) for i in range(13)}
FIGURES: dict[str, tuple[int, Callable[[], Any]]] = {
    **{
        f"curve of {n}": (n, lambda n=n: plots.robustness_curve(report_of(n), baseline=report_of(n, clean=0.8)))
        for n in (1, 3, 9)
    },
    "curve of a level": (1, lambda: plots.robustness_curve(report_of(1, levels=1))),
    "curve of small values": (2, lambda: plots.robustness_curve(report_of(2, metric="mse", clean=2e-5, worst=8e-5))),
    "curve of large values": (2, lambda: plots.robustness_curve(report_of(2, metric="loss", clean=2e5, worst=8e7))),
    "curve of R2": (3, lambda: plots.robustness_curve(report_of(3, metric="r2", clean=0.8, worst=-7.0))),
    "curve of NaN": (2, lambda: plots.robustness_curve(report_of(2, clean=math.nan))),
    "curves of runs": (
        2,
        lambda: plots.robustness_curve(
            *(report_of(2, worst=x) for x in (0.1, 0.3, 0.5)), names=["without noise", "trained with Gaussian noise", "a third"]
        ),
    ),
    "moves": (2, lambda: plots.adaptation(history(30), Governor())),
    "many moves": (2, lambda: plots.adaptation(history(300), Governor())),
    "a move": (2, lambda: plots.adaptation(history(1), SignedGap())),
    "range test": (1, lambda: plots.range_test(CURVE, 0.31, 0.9, unit="standard deviation")),
    "no level": (1, lambda: plots.range_test(CURVE, math.nan, 0.01, metric="flip_rate")),
    "schedules": (
        4,
        lambda: plots.schedule_preview(
            {"ramp": schedules.Linear(0.0, 0.5), "a schedule of a very long name, in words": 0.1, "flat": 0.3, "none": 0.0},
            steps=500,
        ),
    ),
    "many schedules": (
        12,
        lambda: plots.schedule_preview({f"InverseTime(0.5, timescale={i})": 0.1 for i in range(20, 32)}, steps=500),
    ),
    "a diagram": (1, lambda: plots.reliability_diagram({"clean": bins(1.0)})),
    "diagrams": (2, lambda: plots.reliability_diagram({"clean": bins(1.0), "a_noise_of_a_long_name 0.38": bins(0.6)})),
    "images": (1, lambda: shown((1, 8, 8), 5, DIGITS)),
    "few images": (1, lambda: shown((3, 32, 32), 1, LONG, labelled=False)),
    "long names": (1, lambda: shown((3, 48, 64), 5, LONG)),
    "spectrograms": (1, lambda: shown((1, 64, 300), 5, DIGITS)),
    "signals": (4, lambda: shown((2, 500), 5, LONG)),
    "few signals": (4, lambda: shown((16_000,), 1, DIGITS)),
}
QUICK = ("curve of 3", "curves of runs", "moves", "diagrams", "long names", "few signals")
every_figure = pytest.mark.parametrize(
    ("n", "draw"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in FIGURES.items()],
)


def texts_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """Returns each text that is seen, with its place in dots."""
    figure.draw_without_rendering()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _labels_outside(axis)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text not in hidden]


def _labels_outside(axis: Any) -> Iterator[Any]:
    """Yields the labels of the ticks outside the limits, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
        if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
            yield from (tick.label1, tick.label2)


@every_figure
def test_a_figure_fits_a_paper_and_all_its_texts_are_legible(n, draw):
    figure = draw()
    width, height = figure.get_size_inches()
    assert 1.9 <= width <= 7.0
    assert 1.5 <= height <= 10.0
    assert len(figure.axes) == n
    found = texts_of(figure)
    canvas = figure.bbox.padded(1)
    cut = [text for text, box in found if not (canvas.contains(box.x0, box.y0) and canvas.contains(box.x1, box.y1))]
    assert not cut
    for (one, first), (two, second) in combinations(found, 2):
        overlap = Bbox.intersection(first, second)
        assert overlap is None or min(overlap.width, overlap.height) <= 2, f"{one!r} covers {two!r}"
    assert all(text.get_fontsize() >= 6 for text in figure.findobj(Text))


@pytest.mark.parametrize(("n", "width"), [(1, 495), (2, 700), (3, 700), (9, 700)])
def test_a_curve_is_so_narrow_that_its_texts_are_legible_in_a_card_of_tensorboard(n, width):
    figure = plots.robustness_curve(report_of(n))
    assert figure.bbox.width == pytest.approx(width), "a card shows 350 dots, without smoothing: every second of 700"


@every_figure
def test_a_figure_is_a_small_file_that_is_not_empty(n, draw, tmp_path):
    figure = draw()
    figure.savefig(tmp_path / "figure.png")
    image = imread(tmp_path / "figure.png")
    assert (figure.get_size_inches() * 150).tolist() == pytest.approx([image.shape[1], image.shape[0]], abs=1)
    assert 5_000 < (tmp_path / "figure.png").stat().st_size < 1_000_000
    assert (image[..., :3].min(-1) < 0.9).mean() > 0.01, "ink"
    assert image[:3].min() > 0.5, "a margin at the top"


def test_lines_differ_in_gray_or_in_their_markers():
    gray = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in map(to_rgb, COLORS)]
    assert all(abs(one - two) > 0.1 for one, two in combinations(gray[:4], 2)), "four runs differ in gray"
    assert all(abs(one - two) > 0.1 for one, two in pairwise(gray))
    assert len(set(MARKERS)) == len(MARKERS) == len(set(COLORS)) == len(COLORS)
    # a band, a dead band and what is wrong must be seen on white
    assert max(gray) < 0.7


@pytest.mark.parametrize(
    "name", ["moves", "long names", *(pytest.param(name, marks=pytest.mark.slow) for name in ("curve of 3", "diagrams"))]
)
def test_text_stays_text_in_vector_files(name, tmp_path):
    figure = FIGURES[name][1]()
    figure.savefig(tmp_path / "figure.svg")
    figure.savefig(tmp_path / "figure.pdf", metadata={"CreationDate": None})
    svg = (tmp_path / "figure.svg").read_text()
    assert "<text" in svg
    word = {"curve of 3": "standard deviation", "moves": "skill retained", "diagrams": "confidence", "long names": "airplane"}
    assert word[name] in svg
    assert svg.count("<image") == (name == "long names"), "no line is rasterized"
    pdf = (tmp_path / "figure.pdf").read_bytes()
    assert b"/Type42" in pdf or b"/CIDFontType2" in pdf
    assert b"/Subtype /Type3" not in pdf


def test_the_settings_of_matplotlib_stay_and_do_not_change_a_figure():
    before = dict(matplotlib.rcParams)
    plain = pixels(plots.robustness_curve(report_of(1)))
    assert dict(matplotlib.rcParams) == before
    dark: Any = {"axes.facecolor": "black", "figure.facecolor": "black", "text.color": "white", "axes.labelcolor": "white"}
    large: Any = {"font.size": 20, "axes.labelsize": 20, "xtick.labelsize": 20, "lines.linewidth": 9, "axes.grid": True}
    with matplotlib.rc_context({**dark, **large, "xtick.color": "red", "axes.edgecolor": "red"}):
        assert np.array_equal(pixels(plots.robustness_curve(report_of(1))), plain)


def pixels(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return imread(file)


def test_a_notebook_shows_a_report_and_a_range_test_as_markdown(tmp_path: Path):
    report: Any = report_of(2)
    assert report._repr_markdown_() == markdown(report)
    assert str(report) == headline(report)
    found: Any = RangeTest(0.1, {0.1: 0.9, 1.0: 0.2}, 0.9, "retention", {0.0: 0.95, 0.1: 0.86, 1.0: 0.2}, 1000, "half-width")
    first, _, heading, _, row, _ = found._repr_markdown_().splitlines()
    assert first == "**Level 0.1** (half-width): skill retained 90 %. 1,000 predictions at each level."
    assert heading == "| half-width | skill retained, % | accuracy, % |"
    assert row == "| 0.1        | 90.0              | 86.0        |"
    assert str(found) == found._repr_markdown_().replace("*", "").strip()
    nothing: Any = RangeTest(math.nan, {0.1: 0.99, 1.0: 0.98}, 0.9, "flip_rate", {}, 1000)
    assert nothing._repr_markdown_().startswith("No level is suggested")
