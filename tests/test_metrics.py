"""Each metric equals an independent computation, for any split into batches."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_noise.metrics import CrossEntropy, ExpectedCalibrationError, bin_indices, expected_calibration_error, retention


def predictions(n: int, n_classes: int = 5, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    logits = sharpness * torch.randn(n, n_classes, generator=generator)
    return logits, torch.randint(0, n_classes, (n,), generator=generator)


def plain_ece(logits: torch.Tensor, target: torch.Tensor, n_bins: int) -> float:
    """The definition, in a loop over bins."""
    probabilities = logits.double().softmax(1).numpy()
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == target.numpy()
    error = 0.0
    for b in range(n_bins):
        inside = (confidence >= b / n_bins) & ((confidence < (b + 1) / n_bins) | (b == n_bins - 1))
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


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


@pytest.mark.parametrize("metric", [CrossEntropy, ExpectedCalibrationError])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_metric_does_not_depend_on_the_batches(metric, size):
    logits, target = predictions(200)
    whole, parts, shuffled = metric(), metric(), metric()
    whole.update(logits, target)
    for part in zip(logits.split(size), target.split(size), strict=True):
        parts.update(*part)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled.update(logits[order], target[order])
    # the sums of ECE are whole numbers, those of the loss are float32
    atol = 0 if metric is ExpectedCalibrationError else 1e-6
    torch.testing.assert_close(parts.compute(), whole.compute(), rtol=0, atol=atol)
    torch.testing.assert_close(shuffled.compute(), whole.compute(), rtol=0, atol=atol)


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


def test_a_prediction_that_is_no_number_makes_the_error_none_and_not_the_bins():
    logits, target = predictions(20)
    for broken in (math.nan, math.inf):
        logits[3, 1] = broken
        metric = ExpectedCalibrationError()
        metric.update(logits, target)
        assert metric.compute().isnan()
    assert bin_indices(torch.tensor([math.nan]), 10).item() in range(10)


def test_ece_of_p_against_a_coin_of_p_squared_is_one_sixth():
    n, n_bins = 400_000, 100
    generator = torch.Generator().manual_seed(0)
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
    reference = log_loss(target.numpy(), logits.double().softmax(1).numpy(), labels=range(5))
    assert metric.compute().item() == pytest.approx(reference, rel=1e-6)


def test_metrics_take_a_class_for_each_pixel():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=generator)
    target = torch.randint(0, 4, (3, 5, 6), generator=generator)
    flat = logits.movedim(1, -1).reshape(-1, 4), target.flatten()
    for kind in (CrossEntropy, ExpectedCalibrationError):
        pixels, rows = kind(), kind()
        pixels.update(logits, target)
        rows.update(*flat)
        torch.testing.assert_close(pixels.compute(), rows.compute(), rtol=0, atol=1e-6)


def test_retention_is_undefined_without_skill():
    assert retention(0.1, 0.1, 0.1) != retention(0.1, 0.1, 0.1)  # not a number
    assert retention(0.9, 0.9, 0.1) == 1
    assert retention(0.1, 0.9, 0.1) == 0


def test_bins_are_at_least_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ExpectedCalibrationError(0)
