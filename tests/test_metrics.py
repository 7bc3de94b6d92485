"""Each metric equals an independent computation, for any split into batches."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from helpers_metrics import assert_same_values, plain_ece, predictions
from members import EXACT_METRICS, METRICS, REGRESSION_METRICS
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_noise.metrics import (
    BrierDecomposition,
    CalibrationBins,
    CrossEntropy,
    ExpectedCalibrationError,
    TemperatureScaling,
    retention,
)
from lightning_noise.metrics.base import bin_indices
from lightning_noise.metrics.calibration import expected_calibration_error


@pytest.mark.parametrize("n", [1, 2, 100, 1001])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_ece_equals_its_definition(n, n_bins):
    logits, target = predictions(n)
    metric = ExpectedCalibrationError(n_bins)
    metric.update(logits, target)
    # confidences are computed in float32
    assert metric.compute().item() == pytest.approx(plain_ece(logits, target, n_bins), abs=1e-6)


def test_ece_equals_that_of_torchmetrics_away_from_confidence_one():
    logits, target = predictions(1000)
    metric = ExpectedCalibrationError(15)
    metric.update(logits, target)
    reference = multiclass_calibration_error(logits.softmax(1), target, num_classes=5, n_bins=15)
    torch.testing.assert_close(metric.compute(), reference, rtol=0, atol=1e-6)  # float32 means


@pytest.mark.parametrize("metric", EXACT_METRICS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_metric_does_not_depend_on_the_batches(metric, size):
    logits, target = predictions(200)
    whole, parts, shuffled = metric(), metric(), metric()
    whole.update(logits, target)
    for part in zip(logits.split(size), target.split(size), strict=True):
        parts.update(*part)
    order = torch.randperm(200, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    shuffled.update(logits[order], target[order])
    assert_same_values(parts, whole)
    assert_same_values(shuffled, whole)


def batch_of(metric: Any, n: int = 200, places: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(n)
    shape = (n, *places)
    values = {
        "preds": 2 * torch.randn(n, 5, *places, generator=generator),
        "clean_preds": 2 * torch.randn(n, 5, *places, generator=generator),
        "target": torch.randint(0, 5, shape, generator=generator),
        "groups": torch.randint(0, 4, (n,), generator=generator),
    }
    if isinstance(metric, tuple(REGRESSION_METRICS)):  # eighths, whose squares and their sums are exact
        values["preds"] = torch.randint(-99, 99, shape, generator=generator) / 8
        values["target"] = values["target"].float()
    return metric._filter_kwargs(**values)


def only(batch: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    return {key: value[rows] for key, value in batch.items()}


@pytest.mark.parametrize("metric", METRICS)
def test_two_halves_merge_into_the_whole(metric):
    whole, first, second = metric(n_groups=4), metric(n_groups=4), metric(n_groups=4)
    batch = batch_of(whole)
    whole.update(**batch)
    first.update(**only(batch, slice(77)))
    second.update(**only(batch, slice(77, None)))
    # as two processes, of which the first gathers the states of both
    others = itertools.cycle(second.metric_state.values())
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda state, group: [state, next(others)]
    local = {state: value.clone() for state, value in first.metric_state.items()}
    assert_same_values(first, whole)
    assert repr(listed(first)) == repr(listed(whole))  # NaN equals itself
    for state, value in first.metric_state.items():
        assert torch.equal(value, local[state])


def listed(metric: Any) -> list[dict[str, float]]:
    """The values of all samples, and then without each group."""
    values = {key: each.tolist() for key, each in metric.estimates().items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@pytest.mark.parametrize("places", [(), (3,), (2, 3)])
@pytest.mark.parametrize("metric", METRICS)
def test_the_estimates_are_those_of_all_data_and_of_the_data_without_each_group(metric, places):
    grouped, whole = metric(n_groups=5), metric()
    batch = batch_of(whole, 60, places)
    for rows in torch.arange(60).split(25):
        grouped.update(**only(batch, rows))
    without_groups = {key: value for key, value in batch.items() if key != "groups"}
    whole.update(**without_groups)
    assert_same_values(grouped, whole)
    total, *rest = listed(grouped)
    assert repr(total) == repr(listed(whole)[0]) == repr(grouped.totals())
    for group in range(5):  # the last is empty, and so without it are all data
        others = metric()
        others.update(**only(without_groups, batch["groups"] != group))
        assert repr(rest[group]) == repr(others.totals())
    assert repr(rest[4]) == repr(total) != repr(rest[0])
    computed = grouped.compute()
    computed = computed if isinstance(computed, dict) else {grouped.key: computed}
    rounded = {key: torch.tensor(value).float() for key, value in total.items()}
    torch.testing.assert_close(computed, rounded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_estimates_are_nan_if_a_prediction_is_nan(metric):
    broken = metric(n_groups=4)
    batch = batch_of(broken)
    batch["preds"] = batch["preds"].clone()
    batch["preds"][3] = math.nan
    broken.update(**batch)
    total, *rest = listed(broken)
    assert all(math.isnan(value) for value in total.values())
    bad = batch["groups"][3].item()
    assert [any(math.isnan(value) for value in each.values()) for each in rest] == [group != bad for group in range(4)]


@pytest.mark.parametrize("metric", METRICS)
def test_a_reset_leaves_the_tensors_that_others_hold(metric):
    # forward of torchmetrics 1.0 holds the sums of earlier batches while it resets, and adds them again
    metric = metric(n_groups=4)
    metric.update(**batch_of(metric))
    held, sums = metric.metric_state, {state: value.clone() for state, value in metric.metric_state.items()}
    metric.reset()
    assert not any(value.any() for value in metric.metric_state.values())
    assert all(torch.equal(held[state], value) for state, value in sums.items())


def test_groups_are_at_least_one():
    with pytest.raises(ValueError, match="n_groups must be at least 1, got 0"):
        CrossEntropy(0)


@pytest.mark.parametrize("metric", EXACT_METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_those_numbers(metric, dtype):
    logits, target = predictions(50)
    half, full = metric(), metric()
    half.update(logits.to(dtype), target)
    full.update(logits.to(dtype).float(), target)
    assert_same_values(half, full)


def test_memory_does_not_grow_with_the_data():
    metric = ExpectedCalibrationError()
    for _ in range(10):
        metric.update(*predictions(100))
    assert sum(torch.as_tensor(state).numel() for state in metric.metric_state.values()) == 3 * 15 + 1


def test_confidence_one_falls_in_the_last_bin():
    logits = torch.tensor([[0.0, -200.0], [math.log(0.95), math.log(0.05)]])  # certain and wrong, 0.95 and right
    metric = ExpectedCalibrationError(10)
    metric.update(logits, torch.tensor([1, 0]))
    # one bin: confidence (1 + 0.95) / 2, accuracy 1 / 2
    assert metric.compute().item() == pytest.approx(0.475, abs=1e-6)
    assert bin_indices(torch.tensor([0.0, 1.0]), 10).tolist() == [0, 9]


@pytest.mark.parametrize(("right", "expected"), [(True, 0.0), (False, 1.0)])
def test_ece_of_a_certain_model_is_its_error(right, expected):
    logits = torch.tensor([[200.0, 0.0]] * 8)
    metric = ExpectedCalibrationError()
    metric.update(logits, torch.zeros(8, dtype=torch.long) if right else torch.ones(8, dtype=torch.long))
    assert metric.compute().item() == expected


def test_a_nan_prediction_makes_the_ece_nan():
    logits, target = predictions(20)
    for broken in (math.nan, math.inf):
        logits[3, 1] = broken
        metric = ExpectedCalibrationError()
        metric.update(logits, target)
        assert metric.compute().isnan()
    assert bin_indices(torch.tensor([math.nan]), 10).item() in range(10)


@pytest.mark.parametrize("metric", EXACT_METRICS[1:])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_an_error(metric, broken):
    logits, target = predictions(20)
    logits[3, 1] = broken
    values = metric()
    values.update(logits, target)
    with pytest.raises(ValueError, match="expects finite predictions, got 1 that are NaN"):
        values.compute()
    values.reset()
    values.update(*predictions(20))
    values.compute()


def test_ece_of_p_against_a_coin_of_p_squared_is_one_sixth():
    n, n_bins = 400_000, 100
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    hits = (torch.rand(n, generator=generator, dtype=torch.float64) < p**2).double()
    bins = bin_indices(p, n_bins)
    sums = [torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bins, values) for values in (p, hits, torch.ones_like(p))]
    # five standard errors of the mean of hit - p, whose variance is below 1/4; where p - p^2 is small, near 0 and 1, a bin's
    # sign may err: by less than its standard error of below sqrt(4000) / 2 hits, in fewer than 10 bins
    tolerance = 5 * 0.5 / math.sqrt(n) + 10 * math.sqrt(4000) / 2 / n
    assert abs(expected_calibration_error(*sums).item() - 1 / 6) < tolerance


@pytest.mark.parametrize("n", [1, 500])
def test_cross_entropy_equals_that_of_scikit_learn(n):
    logits, target = predictions(n)
    metric = CrossEntropy()
    metric.update(logits, target)
    reference = log_loss(target.cpu().numpy(), logits.double().softmax(1).cpu().numpy(), labels=range(5))
    assert metric.compute().item() == pytest.approx(reference, rel=1e-6)


def test_losses_of_any_size_add_up_and_infinite_losses_are_refused():
    losses = torch.tensor([2.0**40, 2.0**39, 1e9, 2.0**20 + 0.125])  # beyond a few, the loss of (-z, 0) is z
    metric = CrossEntropy()
    for _ in range(100):  # 2^24 times the sum would not fit 64 bits
        metric.update(torch.stack([-losses, torch.zeros(4)], 1), torch.zeros(4, dtype=torch.long))
    assert metric.totals()["loss"] == losses.double().mean().item()
    for loss in (2.0**41, math.inf):
        metric.reset()
        metric.update(torch.tensor([[-loss, 0.0]]), torch.zeros(1, dtype=torch.long))
        with pytest.raises(ValueError, match="CrossEntropy expects finite predictions, got 1 that"):
            metric.compute()


def test_metrics_take_a_class_for_each_pixel():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    logits = torch.randn(3, 5, 4, 6, generator=generator)
    target = torch.randint(0, 5, (3, 4, 6), generator=generator)
    flat = logits.movedim(1, -1).reshape(-1, 5), target.flatten()
    for kind in EXACT_METRICS:
        pixels, rows = kind(), kind()
        pixels.update(logits, target)
        rows.update(*flat)
        assert_same_values(pixels, rows, atol=1e-6)  # the softmax of another memory layout may round otherwise


def test_retention_is_undefined_without_skill():
    assert retention(0.1, 0.1, 0.1) != retention(0.1, 0.1, 0.1)  # not a number
    assert retention(0.9, 0.9, 0.1) == 1
    assert retention(0.1, 0.9, 0.1) == 0


def test_bins_are_at_least_one():
    for metric in (ExpectedCalibrationError, CalibrationBins, TemperatureScaling, partial(BrierDecomposition, 5)):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            metric(0)


@pytest.mark.cpu  # the plot of torchmetrics makes tensors on the default device
@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_plots_its_values_within_its_bounds(metric):
    metric = metric(n_groups=4)
    metric.update(**batch_of(metric))
    value = metric.compute()
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    figure, axes = metric.plot()
    try:
        assert axes.get_ylabel() == type(metric).__name__
        drawn = [float(line.get_ydata()[0]) for line in axes.lines]
        assert drawn == pytest.approx([number.item() for number in numbers])
        low, high = (-math.inf if metric.plot_lower_bound is None else metric.plot_lower_bound), metric.plot_upper_bound
        assert all(low <= number <= (math.inf if high is None else high) for number in drawn)
        assert metric.higher_is_better is None or (high if metric.higher_is_better else metric.plot_lower_bound) is not None
        nothing, again = metric.plot([value, value], ax=axes)
        assert (nothing, again) == (None, axes)
        assert [len(line.get_ydata()) for line in axes.lines[len(numbers) :]] == [2] * len(numbers)
    finally:
        plt.close(figure)
