"""Intervals of means and differences over several trainings of a recipe hold the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_noise import report
from lightning_noise.evaluation.conditions import CLEAN
from lightning_noise.evaluation.results import Estimate
from lightning_noise.metrics import training_error
from lightning_noise.report import Report

N_GROUPS = 20
CELL = CLEAN, "loss"
# parts of the variance of a mean: the training, the samples, and the samples on which trainings disagree
PARTS = [(0.3, 0.4, 0.3), (0.5, 0.5, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5)]
RUNS = 300
NOISE = 3 * math.sqrt(0.05 * 0.95 / RUNS)  # of the share of intervals that hold the truth


def make(losses: np.ndarray) -> Report:
    """The report of losses, each the mean over a group of samples."""
    without = tuple(((losses.sum() - losses) / (N_GROUPS - 1)).tolist())
    found = Estimate(*CELL, float(losses.mean()), without=without)
    return Report("multiclass", N_GROUPS, 1, 0, {}, {}, (), (1,) * N_GROUPS, (found,))


def normal(generator: np.random.Generator, *shape: int, part: float) -> np.ndarray:
    """Normal numbers, of whose mean the variance is the part."""
    return generator.normal(size=shape) * math.sqrt(part * math.prod(shape))


def train(generator: np.random.Generator, k: int, parts: tuple[float, float, float]) -> np.ndarray:
    """The losses of trainings, of shape (k, groups), whose true mean is 0."""
    of_training, of_samples, of_both = parts
    losses = normal(generator, k, 1, part=of_training) + normal(generator, N_GROUPS, part=of_samples)
    return losses + normal(generator, k, N_GROUPS, part=of_both)


def fast(*cases: Any) -> list[Any]:
    """The cases, of which all but the first are slow."""
    return [cases[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[1:])]


@pytest.mark.parametrize(
    ("k", "least", "parts"), fast(*((k, least, parts) for k, least in {3: 0.92, 2: 0.9, 5: 0.925}.items() for parts in PARTS))
)
def test_the_interval_of_a_mean_over_trainings_holds_the_truth(k, least, parts):
    generator, held = np.random.default_rng(k), 0
    for _ in range(RUNS):
        found = report.pool([make(losses) for losses in train(generator, k, parts)]).rows[CELL]
        held += found.low <= 0 <= found.high
    # the scatter of few trainings is known badly, and with it the degrees of freedom
    assert least - NOISE < held / RUNS < 0.965 + NOISE


@pytest.mark.parametrize(
    ("k_new", "k_old", "parts"), fast(*((*ks, parts) for ks in [(3, 3), (2, 2), (2, 5)] for parts in PARTS))
)
def test_the_interval_of_a_difference_of_recipes_holds_the_truth(k_new, k_old, parts):
    generator, held = np.random.default_rng(k_new), 0
    for _ in range(RUNS):
        hardness = 10 * generator.normal(size=N_GROUPS)  # which the recipes share
        new, old = ([make(losses + hardness) for losses in train(generator, k, parts)] for k in (k_new, k_old))
        (found,) = report.differences(new, old)
        held += found.low <= 0 <= found.high
    assert 0.935 - NOISE < held / RUNS < 0.98 + NOISE


@pytest.mark.slow
def test_without_another_training_or_without_the_samples_the_interval_would_be_too_narrow():
    """What the two sources are for: each alone holds the truth far too rarely."""
    generator, parts = np.random.default_rng(0), (0.45, 0.45, 0.1)
    held = np.zeros(2)
    for _ in range(RUNS):
        losses = train(generator, 5, parts)
        (over_samples,) = report.differences(make(losses.mean(0)), make(np.zeros(N_GROUPS)))
        over_trainings = stats.t.interval(0.95, 4, losses.mean(), stats.sem(losses.mean(1)))
        held += [over_samples.low <= 0 <= over_samples.high, over_trainings[0] <= 0 <= over_trainings[1]]
    assert (held / RUNS < 0.95 - NOISE).all()


def test_the_squared_errors_of_both_sources_add_up_to_the_variance_of_the_mean():
    """Unbiased but for the cut at 0, which 8 trainings that differ much never reach."""
    generator, squares = np.random.default_rng(0), []
    for _ in range(RUNS):
        found = report.pool([make(losses) for losses in train(generator, 8, (0.6, 0.2, 0.2))]).rows[CELL]
        squares.append(found.standard_error**2)
    assert np.mean(squares) == pytest.approx(1, abs=5 * float(np.std(squares)) / math.sqrt(RUNS))


def test_trainings_that_differ_on_single_samples_alone_have_no_error_of_the_training():
    losses = np.zeros((2, N_GROUPS))
    losses[0, 3] = losses[1, 5] = 1.0
    pooled, (first, second) = report.pool([make(each) for each in losses]).rows[CELL], losses
    expected = report.differences(make((first + second) / 2), make(np.zeros(N_GROUPS)))[0]
    assert pooled.standard_error == pytest.approx(expected.standard_error, rel=1e-12)


def test_without_groups_the_error_is_that_of_the_textbook():
    assert training_error([1.0, 2.0, 6.0], [[], [], []], []) == pytest.approx(stats.sem([1.0, 2.0, 6.0]), rel=1e-12)
    runs = [Report("custom", 9, 1, 0, {}, {}, (), (), (Estimate(*CELL, value),)) for value in (1.0, 2.0, 6.0)]
    found = report.pool(runs).rows[CELL]
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, 3.0, stats.sem([1.0, 2.0, 6.0])), rel=1e-9)
    assert math.isnan(report.differences(runs, runs[0])[0].low), "of a single training without groups nothing is known"


def test_one_training_is_its_own_mean():
    (run,) = [make(losses) for losses in train(np.random.default_rng(0), 1, (0.3, 0.4, 0.3))]
    assert report.pool([run]) is run
    assert report.differences([run], [run]) == report.differences(run, run)


def test_a_loss_that_is_not_a_number_has_no_interval():
    runs = [make(np.full(N_GROUPS, value)) for value in (math.nan, 1.0)]
    assert math.isnan(report.pool(runs).rows[CELL].low)
