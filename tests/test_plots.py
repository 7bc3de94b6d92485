"""Plots show the numbers that they were given."""

from __future__ import annotations

import io
import math
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from torch import Tensor

from lightning_noise import plots, schedules
from lightning_noise.metrics.base import bin_indices
from lightning_noise.rules import Decision


def points(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


def test_a_preview_draws_each_schedule_with_its_mean():
    ramp, pulses = schedules.Linear(0.0, 1.0), schedules.Every(0.5, every=2)
    figure = plots.schedule_preview({"ramp": ramp, "pulses": pulses, "flat": 0.2}, steps=10, epochs=5)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ramp\nmean 0.45", "pulses\nmean 0.3", "flat\nmean 0.2"]
    rise, on_and_off = (np.asarray(axes.lines[0].get_ydata()) for axes in figure.axes[:2])
    assert rise == pytest.approx([step / 10 for step in range(10)])
    assert on_and_off.tolist() == [0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1, "heights are compared"


def test_a_robustness_curve_is_sorted_by_level():
    figure = plots.robustness_curve({"gaussian": {0.2: 0.8, 0.0: 0.95, 0.1: 0.9}, "impulse": {0.05: 0.7}}, ylabel="skill")
    axes = figure.axes[0]
    assert points(axes.lines[0]) == [[0, 0.95], [0.1, 0.9], [0.2, 0.8]]
    assert points(axes.lines[1]) == [[0.05, 0.7]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gaussian", "impulse"]
    assert axes.get_ylabel() == "skill"


def calibrated(n: int, n_bins: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Returns sums in bins of calibrated predictions with confidences above 0.5."""
    confidence = 0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    right = (torch.rand(n, generator=generator, dtype=torch.float64) < confidence).double()
    bins, zeros = bin_indices(confidence, n_bins), torch.zeros(n_bins, dtype=torch.float64)
    sums = confidence, right, torch.ones_like(right), confidence * (1 - confidence)
    return tuple(zeros.index_add(0, bins, x) for x in sums)


def points_within_and_outside(axes: Axes) -> tuple[list[list[float]], list[list[float]]]:
    by_color = {line.get_color(): points(line) for line in axes.lines if line.get_marker() == "o"}
    return by_color["tab:blue"], by_color["tab:red"]


def test_a_reliability_diagram_separates_chance_from_miscalibration():
    confidence_sum, correct = torch.tensor([0.0, 30.0, 60.0, 90.0]), torch.tensor([0, 31, 45, 99])
    count, variance_sum = torch.tensor([0, 100, 100, 100]), torch.tensor([0.0, 21.0, 24.0, 9.0])
    figure = plots.reliability_diagram({"clean": (confidence_sum, correct, count, variance_sum)})
    axes = figure.axes[0]
    within, outside = points_within_and_outside(axes)
    # exact up to the rounding of a quotient
    assert within == [pytest.approx([0.3, 0.31])]
    assert outside == [pytest.approx([0.6, 0.45]), pytest.approx([0.9, 0.99])]
    # (1 + 15 + 9) / 300, and sqrt(2 / pi) (sqrt(21) + sqrt(24) + 3) / 300
    assert axes.get_title(loc="left") == "clean\nECE 0.083, by chance 0.033"
    drawn: list[Any] = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    band, shares = drawn
    low, high = (
        [0.3 - 0.02 * 21**0.5, 0.6 - 0.02 * 24**0.5, 0.9 - 0.06],
        [0.3 + 0.02 * 21**0.5, 0.6 + 0.02 * 24**0.5, 0.9 + 0.06],
    )
    tops, edges, bottoms = band.get_data()
    assert np.isnan(tops[0])
    assert tops[1:] == pytest.approx(high)
    assert bottoms[1:] == pytest.approx(low)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    strip = shares.get_data().values
    assert np.ptp(strip[1:]) == 0
    assert strip[0] < strip[1] < 0, "the strip lies beneath the accuracies"


def test_about_one_bin_in_twenty_of_a_calibrated_model_is_outside_the_band(generator):
    panels = {str(i): calibrated(60_000, 150, generator) for i in range(4)}
    found = [points_within_and_outside(axes) for axes in plots.reliability_diagram(panels).axes]
    within, outside = (sum(map(len, which)) for which in zip(*found, strict=True))
    assert within + outside == 4 * 75, "bins below a half are empty"
    share = math.erfc(2**0.5)  # of a normal distribution beyond two standard deviations: 0.0455
    # five standard errors, and 0.01 because bins of about 800 are only nearly normal
    assert outside / (within + outside) == pytest.approx(share, abs=5 * (share * (1 - share) / 300) ** 0.5 + 0.01)


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (4, 4), (5, 3), (6, 3), (11, 4)])
def test_reliability_diagrams_have_at_most_four_columns(n, columns, generator):
    titles = [f"gaussian {i}" for i in range(n)]
    figure = plots.reliability_diagram({title: calibrated(50, 15, generator) for title in titles})
    figure.savefig(io.BytesIO())  # empty bins are drawn without a warning
    assert [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes] == titles
    assert len({round(axes.get_position().x0, 6) for axes in figure.axes}) == columns
    texts = [text for axes in figure.axes for text in axes.get_children() if isinstance(text, Text)]
    boxes = [text.get_window_extent() for text in texts if text.get_text().startswith("gaussian")]
    assert len(boxes) == n
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 20, 30), (6, 28, 28)], ids=str)
def test_images_are_shown_side_by_side_in_the_range_of_the_first(shape):
    clean = 2 + 3 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    figure = plots.samples({"clean": clean, "noisy": clean + 100, "noisier": clean - 100}, n_samples=2)
    assert figure is not None
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "noisy", "noisier"]
    board = np.asarray(axes.images[0].get_array())
    rows, columns = shape[-2] + 2 * max(1, shape[-1] // 16), shape[-1] + 2 * max(1, shape[-1] // 16)
    assert board.shape[:2] == (2 * rows, 3 * columns)
    tile = board[:rows, :columns]
    margin = max(1, shape[-1] // 16)
    inner = tile[margin:-margin, margin:-margin]
    assert inner.min() == 0
    assert inner.max() == 1
    assert board[:, columns : 2 * columns].min() == 1, "too bright is white"
    assert board[margin : rows - margin, 2 * columns + margin : 3 * columns - margin].max() == 0, "too dark is black"


@pytest.mark.parametrize(("shape", "lines"), [((5, 2, 100), 2), ((5, 64), 1), ((5, 7), 1), ((5, 48, 7), 7)], ids=str)
def test_signals_are_drawn_side_by_side_as_lines(shape, lines):
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    figure = plots.samples({"clean": clean, "noisy": clean + 1}, n_samples=3)
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["clean", "noisy"]
    assert len(figure.axes) == 3
    for axes, sample in zip(figure.axes, clean, strict=False):
        channels = sample.view(1, -1) if sample.ndim == 1 else sample if sample.shape[1] > sample.shape[0] else sample.T
        assert len(axes.lines) == lines
        for line, channel in zip(axes.lines, channels, strict=True):
            drawn = np.asarray(line.get_ydata())
            np.testing.assert_array_equal(drawn, np.concatenate([channel, [np.nan], channel + 1, [np.nan]]))


# shapes of samples that are no images by their channels or their aspect ratio
SIGNALS = [(1, 128, 4), (16_000, 1), (3, 1000, 1), (7,), (48, 7), (1, 1, 30_000), (2, 64, 64), (40, 5)]
IMAGES = [(1, 4, 4), (3, 64, 64), (64, 64, 3), (4, 32, 32), (28, 28), (1, 32, 250), (1, 250, 32), (3, 600, 900)]


@pytest.mark.parametrize("shape", SIGNALS + IMAGES, ids=str)
def test_a_picture_of_samples_has_a_bounded_size(shape):
    clean = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    figure = plots.samples({"clean": clean} | {f"noisy {i}": clean + i for i in range(12 if shape[0] < 3 else 3)})
    assert figure is not None
    assert (figure.get_size_inches() * figure.dpi).max() <= 1500
    assert bool(figure.axes[0].images) == (shape in IMAGES)
    assert max(sum(len(np.asarray(line.get_xdata())) for line in axes.lines) for axes in figure.axes) <= 8 * 3 * 1500


@pytest.mark.parametrize("shape", [(1000, 1), (3, 600, 900)], ids=str)
def test_a_picture_is_drawn_quickly(shape):
    start = time.process_time()
    figure = plots.samples({str(i): torch.rand(4, *shape) for i in range(6)})
    assert figure is not None
    figure.savefig(io.BytesIO())
    assert time.process_time() - start < 20  # half a second; a column of images 1000 pixels high took 40


def test_many_samples_and_channels_are_cut():
    x = torch.rand(20, 9, 50, generator=torch.Generator().manual_seed(0))
    figure = plots.samples({"clean": x, "noisy": x}, n_samples=20)
    assert figure is not None
    assert (figure.get_size_inches() * figure.dpi).max() <= 1500
    assert len(figure.axes[0].lines) == 8
    assert figure.texts[0].get_text() == "the first 8 of 9 channels"


def test_long_signals_keep_their_peaks_and_gaps():
    signal = torch.zeros(1, 100_000)
    signal[0, 12_345], signal[0, 67_890], signal[0, 40_000:60_000] = 5.0, -3.0, math.nan
    signal[0, 99] = math.inf
    figure = plots.samples({"clean": signal})
    assert figure is not None
    x, y = points_of(figure.axes[0].lines[0])
    assert len(y) < 1000
    assert (np.nanmax(y), np.nanmin(y)) == (5, -3)
    gap = np.isnan(y) & (x > 0.1) & (x < 0.9)
    assert gap.mean() == pytest.approx(0.2, abs=0.02)
    assert not np.isnan(y[(x < 0.4) | ((x > 0.6) & (x < 0.95))]).any(), "an infinite value is beside finite ones"


def points_of(line: Line2D) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def odd(shape: tuple[int, ...], value: float | None) -> Tensor:
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    if value is not None:
        x[0, ..., 0], x[1] = value, value
    return x


@pytest.mark.parametrize("shape", [(3, 16, 16), (100,)], ids=["images", "signals"])
@pytest.mark.parametrize(
    "make",
    [
        lambda shape: odd(shape, math.nan),
        lambda shape: odd(shape, math.inf),
        lambda shape: odd(shape, -math.inf),
        lambda shape: odd(shape, 3e38),
        lambda shape: torch.zeros(4, *shape),
        lambda shape: (255 * odd(shape, None)).to(torch.uint8),
        lambda shape: odd(shape, None) > 0.5,
        lambda shape: odd(shape, None).bfloat16(),
        lambda shape: torch.complex(odd(shape, None), odd(shape, math.nan)),
        lambda shape: [odd((*shape[:-1], size), None)[0] for size in (shape[-1], 90, 10)],
    ],
    ids=["NaN", "infinity", "-infinity", "huge", "constant", "uint8", "bool", "bfloat16", "complex", "sizes"],
)
def test_odd_values_and_samples_of_different_sizes_are_drawn(make, shape):
    x = make(shape)
    figure = plots.samples({"clean": x, "same": x})
    assert figure is not None
    figure.savefig(io.BytesIO())


def test_missing_pixels_are_red_and_a_constant_is_gray():
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 2, 3], x[1] = math.nan, 7.0
    figure = plots.samples({"clean": x})
    assert figure is not None
    board = np.asarray(figure.axes[0].images[0].get_array())
    assert board[1 + 2, 1 + 3].tolist() == [0.9, 0.3, 0.3]
    assert (np.ptp(board, axis=-1) > 0).sum() == 1
    assert (board[11:19, 1:9] == 0.5).all()


MOVES = [
    Decision(10, 0.0, 0.9, 0.9, "waited", 0.0),
    Decision(20, 0.0, 0.9, 0.9, "grew", 0.15),
    Decision(30, 0.15, 0.9, 0.8, "shrank", 0.12),
    Decision(40, 0.12, 0.9, 0.86, "held", 0.12),
    Decision(50, 0.12, 0.8, 0.78, "guarded", 0.096),
]


def test_the_markers_of_an_adaptation_show_where_the_level_went():
    above, below = plots.adaptation(MOVES).axes
    levels, *reasons = above.lines
    assert points(levels) == [[move.step, move.level] for move in MOVES]
    assert {line.get_label(): line.get_marker() for line in reasons} == {
        "waited": "o",
        "grew": "^",
        "shrank": "v",
        "held": "o",
        "guarded": "v",
    }
    assert len({line.get_color() for line in reasons}) == 5
    assert [line.get_label() for line in below.lines] == ["without noise", "at the level"]
    targets = [move._replace(boundary=math.nan) for move in MOVES]  # a rule that follows a target has no boundary
    assert [line.get_label() for line in plots.adaptation(targets).axes[1].lines] == ["without noise"]


def test_the_legends_of_an_adaptation_cover_no_axes():
    reasons = ["waited", "rested", "held", "grew", "shrank", "guarded", "retreated", "panicked"]
    figure = plots.adaptation([Decision(10 * i, 0.1 * i, 0.9, 0.8, reason, 0.0) for i, reason in enumerate(reasons)])
    figure.draw_without_rendering()
    legends = [legend.get_window_extent() for axes in figure.axes if (legend := axes.get_legend())]
    assert len(legends) == 2
    assert not any(legend.overlaps(axes.get_window_extent()) for legend in legends for axes in figure.axes)
    assert all(legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1 for legend in legends)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1), (4, 3, 8, 8, 8), (0, 3, 8, 8)], ids=str)
def test_numbers_and_volumes_give_no_figure(shape):
    assert plots.samples({"clean": torch.zeros(shape)}) is None


def test_plots_of_values_that_are_not_finite_are_drawn():
    broken = {0.1: math.nan, 1.0: -math.inf}
    for figure in (
        plots.robustness_curve({"a": broken, "b": {0.1: math.inf, 1.0: 0.5}}),
        plots.range_test(broken, math.nan, 0.9),
        plots.adaptation([Decision(10, 0.1, math.nan, math.inf, "non_finite", math.nan)]),
        plots.reliability_diagram({str(i): [torch.zeros(15)] * 4 for i in range(40)}),
    ):
        figure.savefig(io.BytesIO())
        assert (figure.get_size_inches() * figure.dpi).max() <= 1500


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 1, 100)], ids=["images", "signals"])
def test_captions_that_differ_from_the_first_column_are_red(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    captions = {"clean": list("012345"), "noisy": list("092945")}
    figure = plots.samples({"clean": x, "noisy": x}, n_samples=2, captions=captions)
    assert figure is not None
    figure.draw_without_rendering()
    found = [(text.get_text(), text.get_color(), text.get_window_extent()) for axes in figure.axes for text in axes.texts]
    by_row = sorted(found, key=lambda each: (-round(each[2].y0), each[2].x0))
    expected = [("0", "black"), ("0", "black"), ("1", "black"), ("9", "tab:red")]
    assert [(text, color) for text, color, _ in by_row] == expected


def test_a_constant_image_and_half_precision_are_drawn():
    assert plots.samples({"clean": torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)}) is not None


def test_pyplot_keeps_no_figure():
    plots.robustness_curve({"a": {0.1: 0.5}})
    assert plt.get_fignums() == []
