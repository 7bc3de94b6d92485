"""Figures show the numbers they were given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D

from lightning_noise import figures, schedules


def points(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


def test_a_preview_draws_each_schedule_with_its_mean():
    ramp, pulses = schedules.Linear(0.0, 1.0), schedules.Every(0.5, every=2)
    figure = figures.schedule_preview({"ramp": ramp, "pulses": pulses, "flat": 0.2}, steps=10, epochs=5)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ramp\nmean 0.45", "pulses\nmean 0.3", "flat\nmean 0.2"]
    rise, on_and_off = (np.asarray(axes.lines[0].get_ydata()) for axes in figure.axes[:2])
    assert rise == pytest.approx([step / 10 for step in range(10)])
    assert on_and_off.tolist() == [0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1, "heights are compared"


def test_a_robustness_curve_goes_up_in_level():
    figure = figures.robustness_curve({"gaussian": {0.2: 0.8, 0.0: 0.95, 0.1: 0.9}, "impulse": {0.05: 0.7}}, ylabel="skill")
    axes = figure.axes[0]
    assert points(axes.lines[0]) == [[0, 0.95], [0.1, 0.9], [0.2, 0.8]]
    assert points(axes.lines[1]) == [[0.05, 0.7]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gaussian", "impulse"]
    assert axes.get_ylabel() == "skill"


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 20, 30), (6, 28, 28)], ids=str)
def test_images_are_shown_side_by_side_in_the_range_of_the_first(shape):
    clean = 2 + 3 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    figure = figures.samples({"clean": clean, "noisy": clean + 100, "noisier": clean - 100}, n_samples=2)
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


@pytest.mark.parametrize(("shape", "lines"), [((5, 2, 100), 2), ((5, 64), 1)], ids=str)
def test_signals_are_drawn_as_lines(shape, lines):
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    figure = figures.samples({"clean": clean, "noisy": clean + 1}, n_samples=3)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes[:2]] == ["clean", "noisy"]
    assert len(figure.axes) == 3 * 2
    assert len(figure.axes[0].lines) == lines
    drawn = np.asarray(figure.axes[1].lines[0].get_ydata())
    assert drawn == pytest.approx(clean[0].view(-1, shape[-1])[0].numpy() + 1)


@pytest.mark.parametrize("shape", [(4, 10), (4, 2, 8, 8), (4,), (4, 3, 8, 8, 8)], ids=str)
def test_what_is_neither_image_nor_signal_is_no_picture(shape):
    assert figures.samples({"clean": torch.zeros(shape)}) is None


def test_a_constant_image_and_half_precision_are_drawn():
    assert figures.samples({"clean": torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)}) is not None


def test_pyplot_keeps_no_figure():
    figures.robustness_curve({"a": {0.1: 0.5}})
    assert plt.get_fignums() == []
