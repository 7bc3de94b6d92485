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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from torch import Tensor

from lightning_noise import plots, report, schedules
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.results import Estimate
from lightning_noise.metrics.base import bin_indices
from lightning_noise.report import Report
from lightning_noise.rules import Decision, Governor, SignedGap


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


def report_of(
    curves: dict[str, dict[float, float]], metric: str = "accuracy", *, clean: float = 0.95, half: float = 0.02, **about: Any
) -> Report:
    """Returns a report of the value at each level of each noise."""
    values = {CLEAN: clean} | {Condition(noise, x): y for noise, curve in curves.items() for x, y in curve.items()}
    estimates = tuple(Estimate(place, metric, y, half / 2, y - half, y + half) for place, y in values.items())
    facts: dict[str, Any] = {
        "noises": {noise: f"{noise}()" for noise in curves},
        "levels": {noise: tuple(curve) for noise, curve in curves.items()},
        "units": {noise: f"unit of {noise}" for noise in curves},
        "chance": 0.1,
        "sizes": (200, 200),
    }
    return Report("multiclass", 400, 1, 0, shared=(), estimates=estimates, **(facts | about))


CURVES = {"gaussian": {0.2: 0.8, 0.1: 0.9}, "impulse": {0.05: 0.7}}


def test_a_robustness_curve_has_a_panel_in_the_unit_of_each_noise():
    figure = plots.robustness_curve(report_of(CURVES), baseline=report_of(CURVES, clean=0.5))
    gaussian, impulse = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gaussian", "impulse"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["unit of gaussian", "unit of impulse"]
    assert figure.get_supylabel() == "accuracy (%)"
    curve, baseline, chance = gaussian.lines
    assert points(curve) == [[0, 95], [0.1, 90], [0.2, 80]]
    assert points(impulse.lines[0]) == [[0, 95], [0.05, 70]]
    assert points(baseline)[0] == [0, 50]
    assert (baseline.get_linestyle(), chance.get_linestyle()) == ("--", ":")
    assert np.asarray(chance.get_ydata()).tolist() == [10, 10]
    band = np.asarray(gaussian.collections[0].get_paths()[0].vertices)
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((78, 97))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["95 % interval", "baseline", "chance"]
    assert gaussian.get_ylim() == impulse.get_ylim()


def test_reports_are_lines_with_the_parts_of_their_paths_that_differ(tmp_path):
    for name, clean in {"plain": 0.9, "noisy": 0.8}.items():
        report.write(tmp_path / name / "version_0" / "robustness", report_of(CURVES, clean=clean))
    folders = [tmp_path / name / "version_0" / "robustness" for name in ("plain", "noisy")]
    figure = plots.robustness_curve(*folders)
    assert [points(line)[0][1] for line in figure.axes[0].lines[:2]] == pytest.approx([90, 80])
    assert [line.get_label() for line in figure.axes[0].lines[:2]] == ["plain", "noisy"]
    named = plots.robustness_curve(str(folders[0] / "report.json"), report_of(CURVES), names=["a", "b"])
    assert [line.get_label() for line in named.axes[0].lines[:2]] == ["a", "b"]
    same = plots.robustness_curve(folders[0], folders[0])
    assert [line.get_label() for line in same.axes[0].lines[:2]] == ["report 1", "report 2"]


def test_a_noise_that_is_in_another_report_only_or_has_another_unit_gets_its_own_panel():
    other = report_of({"gaussian": {1.0: 0.5}, "shot": {0.1: 0.6}}, units={"gaussian": "deviations"})
    figure = plots.robustness_curve(report_of(CURVES), other)
    titles = [(axes.get_title(loc="left"), axes.get_xlabel()) for axes in figure.axes]
    assert titles == [
        ("gaussian", "unit of gaussian"),
        ("impulse", "unit of impulse"),
        ("gaussian", "deviations"),
        ("shot", "level"),
    ]
    assert points(figure.axes[2].lines[0]) == []
    assert points(figure.axes[2].lines[1]) == [[0, 95], [1, 50]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: plots.robustness_curve(), "expected at least one report"),
        (lambda: plots.robustness_curve(report_of(CURVES), metric="f1"), "no report has the metric 'f1'"),
        (lambda: plots.robustness_curve(report_of(CURVES), names=["a", "b"]), "a different name for each of 1 reports"),
        (lambda: plots.robustness_curve("nowhere"), "no report at nowhere"),
    ],
    ids=["none", "metric", "names", "path"],
)
def test_a_robustness_curve_says_what_it_expects(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_curve_of_r2_is_cut_where_the_model_is_worse_than_any_guess():
    curve = report_of({"gaussian": {0.1: 0.2, 0.2: -40.0}}, "r2", chance=0.0)
    axes = plots.robustness_curve(curve).axes[0]
    assert axes.get_ylim() == pytest.approx((-1, 1.03))
    assert points(axes.lines[0])[-1] == [0.2, -40]


def calibrated(n: int, n_bins: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Returns sums in bins of calibrated predictions with confidences above 0.5."""
    confidence = 0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    right = (torch.rand(n, generator=generator, dtype=torch.float64) < confidence).double()
    bins, zeros = bin_indices(confidence, n_bins), torch.zeros(n_bins, dtype=torch.float64)
    sums = confidence, right, torch.ones_like(right), confidence * (1 - confidence)
    return tuple(zeros.index_add(0, bins, x) for x in sums)


def points_within_and_outside(axes: Axes) -> tuple[list[list[float]], list[list[float]]]:
    by_marker = {line.get_marker(): points(line) for line in axes.lines}
    return by_marker["o"], by_marker["s"]


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
    assert axes.get_title(loc="left") == "clean\naccuracy 58.3 %, n = 300\nECE 8.3 %, by chance 3.3 %"
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


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (6, 3), (11, 4)])
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
    factor = max(1, 150 // max(shape[-2:]))
    margin = factor * shape[-1] // 16
    rows, columns = (factor * side + 2 * margin for side in shape[-2:])
    assert board.shape[:2] == (2 * rows, 3 * columns)
    tile = board[:rows, :columns]
    inner = tile[margin:-margin, margin:-margin]
    assert inner.min() == 0
    assert inner.max() == 1
    assert board[:, columns : 2 * columns].min() == 1, "too bright is white"
    assert board[margin : rows - margin, 2 * columns + margin : 3 * columns - margin].max() == 0, "too dark is black"


@pytest.mark.parametrize("title", ["PatchGaussian 0.08", "PatchGaussian\n0.08"])
def test_a_title_that_is_cut_keeps_its_level(title):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    figure = plots.samples(dict.fromkeys(["clean", title, *"abcd"], x))
    assert figure is not None
    assert figure.axes[0].get_xticklabels()[1].get_text() == "PatchGauss…\n0.08"


def test_a_channel_of_unequal_sides_is_a_heat_map():
    spectrogram = torch.rand(2, 1, 64, 300, generator=torch.Generator().manual_seed(0))
    for samples in (spectrogram, spectrogram[:, 0]):
        figure = plots.samples({"clean": samples})
        assert figure is not None
        board = np.asarray(figure.axes[0].images[0].get_array())
        assert (np.ptp(board, axis=-1) > 0.1).mean() > 0.5, "colors"
        assert board.shape[0] > board.shape[1] / 2, "two rows, each at least half as high as wide"


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
    size, margin = 150 // 8, 9  # of a pixel and around an image
    assert board[margin + 2 * size, margin + 3 * size].tolist() == pytest.approx([0.9, 0.3, 0.3])
    assert (np.ptp(board, axis=-1) > 0).sum() == size**2
    below = 8 * size + 3 * margin
    assert (board[below : below + 8 * size, margin:-margin] == 0.5).all()


MOVES = [
    Decision(10, 0.0, 0.9, 0.9, "warmup", 0.0, 1.0),
    Decision(20, 0.0, 0.9, 0.9, "raised", 0.15, 1.0),
    Decision(30, 0.15, 0.9, 0.8, "below_min_skill", 0.12, 0.88),
    Decision(40, 0.12, 0.9, 0.86, "held", 0.12, 0.95),
    Decision(50, 0.12, 0.8, 0.78, "lowered", 0.096, 0.97),
]


def test_the_markers_of_an_adaptation_show_where_the_level_went():
    above = plots.adaptation(MOVES, Governor()).axes[0]
    levels, *reasons = above.lines
    assert points(levels) == [[move.step, move.level] for move in MOVES]
    assert {str(line.get_label()): (line.get_marker(), points(line)) for line in reasons} == {
        "raised": ("^", [[20, 0.0]]),
        "lowered": ("v", [[50, 0.12]]),
        "below min skill": ("X", [[30, 0.15]]),
        "no change": (".", [[10, 0.0], [40, 0.12]]),
    }
    assert len({line.get_color() for line in reasons}) == 4


def test_an_adaptation_shows_the_retention_in_percent_and_the_aim_of_its_rule():
    below = plots.adaptation(MOVES, Governor(retain=0.8)).axes[1]
    assert np.asarray(below.lines[0].get_ydata()).tolist() == pytest.approx([100, 100, 88, 95, 97])
    assert below.get_ylabel() == "skill retained (%)"
    assert np.asarray(below.lines[1].get_ydata()).tolist() == pytest.approx([80, 80])
    gap = plots.adaptation(MOVES, SignedGap()).axes[1]
    assert gap.get_ylabel() == "over-confidence (%)"
    assert np.asarray(gap.lines[1].get_ydata()).tolist() == [0, 0]
    assert len(plots.adaptation(MOVES).axes[1].lines) == 1


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1), (4, 3, 8, 8, 8), (0, 3, 8, 8)], ids=str)
def test_numbers_and_volumes_give_no_figure(shape):
    assert plots.samples({"clean": torch.zeros(shape)}) is None


def test_plots_of_values_that_are_not_finite_are_drawn():
    broken = {0.1: math.nan, 1.0: -math.inf}
    nothing = report_of({"a": broken}, "loss", clean=math.nan)
    for figure in (
        plots.robustness_curve(nothing),
        plots.robustness_curve(report_of({"a": broken, "b": {0.1: math.inf, 1.0: 0.5}}), nothing),
        plots.range_test(broken, math.nan, 0.9),
        plots.range_test({0.1: math.nan, 1.0: 0.9}, 1.0, 0.9),
        plots.adaptation([Decision(10, 0.1, math.nan, math.inf, "non_finite", math.nan)], Governor()),
        plots.reliability_diagram({str(i): [torch.zeros(15)] * 4 for i in range(40)}),
    ):
        figure.savefig(io.BytesIO())
        assert (figure.get_size_inches() * figure.dpi).max() <= 1500


def test_a_range_test_leaves_out_level_0_which_a_logarithmic_axis_lacks():
    (axes,) = plots.range_test({0.0: 1.0, 0.1: 0.9, 1.0: 0.3}, 0.1, 0.9).axes
    assert list(axes.lines[1].get_xdata()) == [0.1, 1.0]  # type: ignore[arg-type]
    assert 0 < axes.get_xlim()[0] < 0.1


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 1, 100)], ids=["images", "signals"])
def test_captions_that_are_wrong_are_red(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    captions = {"clean": list("012345"), "noisy": list("092945")}
    without = plots.samples({"clean": x, "noisy": x}, n_samples=2, captions=captions)
    assert look_of_captions(without) == [("0", "normal"), ("0", "normal"), ("1", "normal"), ("9", "bold")]
    labelled = plots.samples({"clean": x, "noisy": x}, n_samples=2, captions=captions, labels=list("092345"))
    assert look_of_captions(labelled) == [("0 → 0", "normal"), ("0 → 0", "normal"), ("9 → 1", "bold"), ("9 → 9", "normal")]


def look_of_captions(figure: Figure | None) -> list[tuple[str, str]]:
    """Returns text and weight of the captions, row by row."""
    assert figure is not None
    figure.draw_without_rendering()
    found: list[Any] = [text for axes in figure.axes for text in axes.texts]
    assert all((text.get_weight() == "bold") == (text.get_color() != "black") for text in found)
    found.sort(key=lambda text: (-round(text.get_window_extent().y0, -1), text.get_window_extent().x0))
    return [(text.get_text(), str(text.get_weight())) for text in found]


def test_a_constant_image_and_half_precision_are_drawn():
    assert plots.samples({"clean": torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)}) is not None


def test_pyplot_keeps_no_figure():
    plots.robustness_curve(report_of(CURVES))
    assert plt.get_fignums() == []
