"""Each metric equals an independent computation, for any split into batches."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import trapezoid
from scipy.optimize import minimize_scalar
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss, mean_squared_error, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_noise.metrics import (
    BrierDecomposition,
    BrierScore,
    CalibrationBins,
    CrossEntropy,
    ExpectedCalibrationError,
    FlipRate,
    MeanSquaredError,
    NoiseDetection,
    PredictiveEntropy,
    SelectiveClassification,
    TemperatureScaling,
    area_under_curve,
    aurc,
    bin_indices,
    calibration_floor,
    calibration_z,
    corruption_error,
    debiased_calibration_error,
    error_auroc,
    expected_calibration_error,
    flip_rate,
    mean_corruption_error,
    murphy_decomposition,
    noise_detected,
    retention,
    robustness_summary,
    scores,
)
from lightning_noise.metrics.base import Predictions
from lightning_noise.metrics.monitored import LOGGED, Task, as_classes, check_target, monitor_metrics


def brier_decomposition(n_groups: int = 1) -> BrierDecomposition:
    return BrierDecomposition(num_classes=5, n_groups=n_groups)


def entropy_of_five(n_groups: int = 1) -> PredictiveEntropy:
    return PredictiveEntropy(num_classes=5, n_groups=n_groups)


# the metrics whose sums are whole numbers, for laws that all of them keep
EXACT = [
    ExpectedCalibrationError,
    CalibrationBins,
    TemperatureScaling,
    CrossEntropy,
    BrierScore,
    brier_decomposition,
    entropy_of_five,
    SelectiveClassification,
]
# predictions at the edges: one sample, all right, all wrong, certain and right, certain and wrong, undecided
EDGES = {
    "one": (torch.tensor([[0.3, 0.1, -0.2]]), torch.tensor([1])),
    "right": (torch.eye(3), torch.arange(3)),
    "wrong": (torch.eye(3), torch.tensor([1, 2, 0])),
    "certain": (200 * torch.eye(3), torch.arange(3)),
    "certain and wrong": (200 * torch.eye(3), torch.tensor([1, 2, 0])),
    "undecided": (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])),
}


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


def assert_same(metric, reference, atol: float = 0) -> None:
    torch.testing.assert_close(metric.compute(), reference.compute(), rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("metric", EXACT)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_metric_does_not_depend_on_the_batches(metric, size):
    logits, target = predictions(200)
    whole, parts, shuffled = metric(), metric(), metric()
    whole.update(logits, target)
    for part in zip(logits.split(size), target.split(size), strict=True):
        parts.update(*part)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled.update(logits[order], target[order])
    assert_same(parts, whole)
    assert_same(shuffled, whole)


# all metrics, with what some of them compare: predictions without noise
ALL: list[Any] = [*EXACT, FlipRate, NoiseDetection, MeanSquaredError]


def batch_of(metric: Any, n: int = 200, places: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shape = (n, *places)
    values = {
        "preds": 2 * torch.randn(n, 5, *places, generator=generator),
        "clean_preds": 2 * torch.randn(n, 5, *places, generator=generator),
        "target": torch.randint(0, 5, shape, generator=generator),
        "groups": torch.randint(0, 4, (n,), generator=generator),
    }
    if isinstance(metric, MeanSquaredError):  # eighths, whose squares and their sums are exact
        values["preds"] = torch.randint(-99, 99, shape, generator=generator) / 8
        values["target"] = values["target"].float()
    return metric._filter_kwargs(**values)


def only(batch: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    return {key: value[rows] for key, value in batch.items()}


@pytest.mark.parametrize("metric", ALL)
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
    assert_same(first, whole)
    assert same_values(first.estimates(), whole.estimates())
    for state, value in first.metric_state.items():
        assert torch.equal(value, local[state])


def same_values(*estimates: Any) -> bool:
    first, second = ([total, *rest] for total, rest in estimates)
    return repr(first) == repr(second)  # not a number is as itself


@pytest.mark.parametrize("places", [(), (3,), (2, 3)])
@pytest.mark.parametrize("metric", ALL)
def test_the_estimates_are_those_of_all_data_and_of_the_data_without_each_group(metric, places):
    grouped, whole = metric(n_groups=5), metric()
    batch = batch_of(whole, 60, places)
    for rows in torch.arange(60).split(25):
        grouped.update(**only(batch, rows))
    without_groups = {key: value for key, value in batch.items() if key != "groups"}
    whole.update(**without_groups)
    assert_same(grouped, whole)
    total, rest = grouped.estimates()
    assert same_values((total, []), (whole.estimates()[0], []))
    for group in range(5):  # the last is empty, and so without it are all data
        others = metric()
        others.update(**only(without_groups, batch["groups"] != group))
        assert same_values((rest[group], []), (others.estimates()[0], []))
    assert same_values((rest[4], []), (total, []))
    assert not same_values((rest[0], []), (total, []))
    computed = grouped.compute()
    computed = computed if isinstance(computed, dict) else {grouped.key: computed}
    rounded = {key: torch.tensor(value).float() for key, value in total.items()}
    torch.testing.assert_close(computed, rounded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", ALL)
def test_estimates_are_no_numbers_where_a_prediction_is_none(metric):
    broken = metric(n_groups=4)
    batch = batch_of(broken)
    batch["preds"] = batch["preds"].clone()
    batch["preds"][3] = math.nan
    broken.update(**batch)
    total, rest = broken.estimates()
    assert all(math.isnan(value) for value in total.values())
    bad = batch["groups"][3].item()
    assert [any(math.isnan(value) for value in each.values()) for each in rest] == [group != bad for group in range(4)]


def test_groups_are_at_least_one():
    with pytest.raises(ValueError, match="n_groups must be at least 1, got 0"):
        CrossEntropy(0)


@pytest.mark.parametrize("metric", EXACT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_those_numbers(metric, dtype):
    logits, target = predictions(50)
    half, full = metric(), metric()
    half.update(logits.to(dtype), target)
    full.update(logits.to(dtype).float(), target)
    assert_same(half, full)


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


@pytest.mark.parametrize("metric", EXACT[1:])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_prediction_that_is_no_number_is_an_error(metric, broken):
    logits, target = predictions(20)
    logits[3, 1] = broken
    values = metric()
    values.update(logits, target)
    with pytest.raises(ValueError, match="reads finite predictions, but 1 predictions were not a number"):
        values.compute()
    values.reset()
    values.update(*predictions(20))
    values.compute()


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


def test_losses_of_any_size_add_up_and_those_without_bound_are_none():
    losses = torch.tensor([2.0**40, 2.0**39, 1e9, 2.0**20 + 0.125])  # beyond a few, the loss of (-z, 0) is z
    metric = CrossEntropy()
    for _ in range(100):  # 2^24 times the sum would not fit 64 bits
        metric.update(torch.stack([-losses, torch.zeros(4)], 1), torch.zeros(4, dtype=torch.long))
    assert metric.estimates()[0]["loss"] == losses.double().mean().item()
    for loss in (2.0**41, math.inf):
        metric.reset()
        metric.update(torch.tensor([[-loss, 0.0]]), torch.zeros(1, dtype=torch.long))
        with pytest.raises(ValueError, match="CrossEntropy reads finite predictions, but 1 predictions"):
            metric.compute()


def test_metrics_take_a_class_for_each_pixel():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, 6, generator=generator)
    target = torch.randint(0, 5, (3, 4, 6), generator=generator)
    flat = logits.movedim(1, -1).reshape(-1, 5), target.flatten()
    for kind in EXACT:
        pixels, rows = kind(), kind()
        pixels.update(logits, target)
        rows.update(*flat)
        assert_same(pixels, rows, atol=1e-6)  # the softmax of another memory layout may round otherwise


def test_retention_is_undefined_without_skill():
    assert retention(0.1, 0.1, 0.1) != retention(0.1, 0.1, 0.1)  # not a number
    assert retention(0.9, 0.9, 0.1) == 1
    assert retention(0.1, 0.9, 0.1) == 0


def test_bins_are_at_least_one():
    for metric in (ExpectedCalibrationError, CalibrationBins, TemperatureScaling, partial(BrierDecomposition, 5)):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            metric(0)


def plain_calibration(logits: torch.Tensor, target: torch.Tensor, n_bins: int) -> dict[str, float]:
    """The definitions, in a loop over bins."""
    probabilities = logits.double().softmax(1).numpy()
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == target.numpy()
    bins, n = np.minimum((confidence * n_bins).astype(int), n_bins - 1), len(hit)
    floor = debiased = 0.0
    for b in np.unique(bins):
        c, a = confidence[bins == b], hit[bins == b]
        floor += math.sqrt(2 / math.pi * (c * (1 - c)).sum()) / n
        if len(a) > 1:
            debiased += len(a) / n * ((a.mean() - c.mean()) ** 2 - a.var(ddof=1) / len(a))
    error = plain_ece(logits, target, n_bins)
    deviation = math.sqrt((1 - 2 / math.pi) * (confidence * (1 - confidence)).sum()) / n
    z = (error - floor) / deviation
    values = {"accuracy": hit.mean(), "ece": error, "ece_floor": floor, "ece_z": z, "ece_p": norm.sf(z)}
    return values | {"debiased_squared_error": debiased, "signed_gap": confidence.mean() - hit.mean()}


@pytest.mark.parametrize("n_bins", [1, 15])
@pytest.mark.parametrize("data", [predictions(2), predictions(1001), *(EDGES[key] for key in EDGES if "certain" not in key)])
def test_calibration_equals_its_definitions(data, n_bins):
    metric = CalibrationBins(n_bins)
    metric.update(*data)
    values, reference = metric.compute(), plain_calibration(*data, n_bins=n_bins)
    assert values.keys() == reference.keys()
    for key, value in values.items():
        # confidences are computed in float32; the standard error that z is divided by is as small as 0.01
        assert value.item() == pytest.approx(reference[key], abs=1e-6, rel=1e-5 if key == "ece_z" else 1e-6), key


def test_the_ece_beside_its_floor_is_the_ece():
    error, bins = ExpectedCalibrationError(), CalibrationBins()
    for metric in (error, bins):
        metric.update(*predictions(500))
    assert bins.compute()["ece"] == error.compute()


def test_a_certain_model_is_calibrated_where_it_is_right_and_impossible_where_it_is_wrong():
    right, wrong = CalibrationBins(), CalibrationBins()
    right.update(*EDGES["certain"])
    wrong.update(*EDGES["certain and wrong"])
    assert {key: right.compute()[key].item() for key in ("ece", "ece_floor", "signed_gap")} == dict.fromkeys(
        ("ece", "ece_floor", "signed_gap"), 0
    )
    assert right.compute()["ece_z"].isnan()
    assert right.compute()["ece_p"].isnan()
    values = {key: value.item() for key, value in wrong.compute().items()}
    assert values == {
        "accuracy": 0,
        "ece": 1,
        "ece_floor": 0,
        "ece_z": math.inf,
        "ece_p": 0,
        "debiased_squared_error": 1,
        "signed_gap": 1,
    }


def calibrated(confidence: torch.Tensor, n_runs: int, n_bins: int = 15) -> tuple[torch.Tensor, ...]:
    """Returns the sums in bins, and the hits of each run in rows, of a model that is right as often as it says."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(n_runs, len(confidence), generator=generator, dtype=torch.float64)
    bins = bin_indices(confidence, n_bins)
    zeros = confidence.new_zeros(n_bins)
    sums = [
        zeros.index_add(0, bins, values) for values in (confidence, torch.ones_like(confidence), confidence * (1 - confidence))
    ]
    hits = confidence.new_zeros(n_runs, n_bins).index_add_(1, bins, (draws < confidence).double())
    return *sums, hits


def of_each(formula, *sums: torch.Tensor) -> torch.Tensor:
    return torch.stack([formula(*sums[:1], hits, *sums[1:-1]) for hits in sums[-1]])


@pytest.mark.parametrize("n", [500, 5000])
@pytest.mark.parametrize("sharpness", [1.0, 2.0, 3.0])
def test_the_floor_is_the_ece_of_a_calibrated_model(n, sharpness):
    confidence = predictions(n, sharpness=sharpness)[0].double().softmax(1).max(1).values
    conf, count, variance, hits = calibrated(confidence, n_runs=1000)
    errors = of_each(expected_calibration_error, conf, count, hits)
    # the closed form takes bins as normal: within 5 % from 500 predictions on
    assert calibration_floor(variance, count).item() == pytest.approx(errors.mean().item(), rel=0.05)
    z = of_each(calibration_z, conf, count, variance, hits)
    # five standard errors, and what a floor that is a few percent off means in units of the spread
    assert abs(z.mean()) < 0.1 + 5 / math.sqrt(1000)
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * 1000) + 0.02  # the spread of bins that are not quite normal


@pytest.mark.parametrize("n", [20, 500])
def test_the_debiased_error_of_a_calibrated_model_has_mean_zero(n):
    # one confidence in each bin, where the estimate has no bias; some bins are empty and some hold one prediction
    generator = torch.Generator().manual_seed(0)
    confidence = (torch.randint(0, 15, (n,), generator=generator).double() + 0.5) / 15
    conf, count, _, hits = calibrated(confidence, n_runs=4000)
    errors = of_each(debiased_calibration_error, conf, count, hits)
    assert abs(errors.mean()) < 5 * errors.std() / math.sqrt(len(errors))


@pytest.mark.parametrize("data", [predictions(1), predictions(1000, sharpness=0.3), *EDGES.values()])
def test_the_temperature_is_that_of_least_log_loss_on_the_grid(data):
    logits, target = data
    metric = TemperatureScaling()
    metric.update(logits, target)
    losses = {t: F.cross_entropy(logits.double() / t, target).item() for t in metric.temperatures}
    values = metric.compute()
    # losses are rounded to 2^-24 a sample; where several are as small, as where a certain model is right, the first is taken
    assert losses[min(losses, key=lambda t: abs(t - values["temperature"].item()))] == pytest.approx(
        min(losses.values()), abs=1e-6
    )
    scaled = ExpectedCalibrationError()
    scaled.update(logits / values["temperature"], target)
    assert values["scaled_ece"].item() == pytest.approx(scaled.compute().item(), abs=1e-6)  # float32


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_temperature_is_next_to_the_optimum_and_undoes_a_scale(scale):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    target = logits.softmax(1).multinomial(1, generator=generator).flatten()  # calibrated, so the temperature is the scale
    metric = TemperatureScaling()
    metric.update(scale * logits, target)
    values = metric.compute()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(scale * logits.double() / math.exp(log_temperature), target).item()

    found: Any = minimize_scalar(loss, bounds=(math.log(0.1), math.log(10)), method="bounded")
    optimum = math.exp(found.x)
    step = 10 ** (1 / 15)  # the loss is convex in 1 / T, so the best on the grid is a neighbour of the optimum
    assert optimum / step < values["temperature"].item() < optimum * step
    assert values["temperature"].item() == pytest.approx(scale, rel=step - 1 + 0.05)  # and 4000 samples tell T within 5 %
    unscaled = ExpectedCalibrationError()
    unscaled.update(scale * logits, target)
    assert scale == 1 or values["scaled_ece"] < unscaled.compute() / 3


def test_one_is_a_temperature_and_none_without_predictions():
    assert TemperatureScaling.temperatures[15] == 1
    assert (min(TemperatureScaling.temperatures), max(TemperatureScaling.temperatures)) == (0.1, 10)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert TemperatureScaling().compute()["temperature"].isnan()


def test_a_class_without_probability_has_no_temperature():
    metric = TemperatureScaling()
    metric.update(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    with pytest.raises(ValueError, match="infinite loss"):
        metric.compute()


def plain_murphy(probabilities: np.ndarray, target: np.ndarray, n_bins: int) -> list[float]:
    """The definitions, in loops over classes and bins."""
    reliability = resolution = uncertainty = 0.0
    for k, p in enumerate(probabilities.T):
        hit, bins = target == k, np.minimum((p * n_bins).astype(int), n_bins - 1)
        uncertainty += hit.mean() * (1 - hit.mean())
        for b in np.unique(bins):
            inside = bins == b
            reliability += inside.mean() * (p[inside].mean() - hit[inside].mean()) ** 2
            resolution += inside.mean() * (hit[inside].mean() - hit.mean()) ** 2
    return [reliability, resolution, uncertainty]


@pytest.mark.parametrize("data", [predictions(1), predictions(501), *EDGES.values()])
def test_the_brier_score_equals_that_of_scikit_learn_and_its_parts_their_definitions(data):
    logits, target = data
    n_classes = logits.shape[1]
    metric = BrierDecomposition(n_classes)
    metric.update(logits, target)
    probabilities = logits.softmax(1)
    values = {key: value.item() for key, value in metric.compute().items()}
    per_class = [
        brier_score_loss(target.numpy() == k, probabilities[:, k].double().numpy(), pos_label=1) for k in range(n_classes)
    ]
    score = BrierScore()
    score.update(logits, target)
    for value in (values["brier"], score.compute().item()):
        assert value == pytest.approx(sum(per_class), abs=1e-6)  # float32, as all of these
    parts = plain_murphy(probabilities.double().numpy(), target.numpy(), 15)
    assert list(values.values())[1:] == pytest.approx(parts, abs=1e-6)
    # p - o differs within a bin by the spread of p, at most w = 1/15: a variance of at most w^2 / 4 for each class, and twice a
    # covariance of at most (w / 2)(1 / 2)
    remainder = n_classes * ((1 / 15) ** 2 / 4 + 1 / 15 / 2)
    assert abs(values["brier"] - (parts[0] - parts[1] + parts[2])) <= remainder


def test_the_parts_add_up_to_the_brier_score_where_probabilities_in_a_bin_are_equal():
    generator = torch.Generator().manual_seed(0)
    p = (torch.randint(0, 10, (500,), generator=generator).double() + 0.5) / 10
    hit = (torch.rand(500, generator=generator, dtype=torch.float64) < p).double()
    zeros, bins = torch.zeros(12, dtype=torch.float64), (p * 10).long()  # two bins stay empty
    reliability, resolution, uncertainty = murphy_decomposition(
        *(zeros.index_add(0, bins, values) for values in (p, hit, torch.ones_like(p)))
    )
    torch.testing.assert_close(reliability - resolution + uncertainty, (p - hit).square().mean(), rtol=0, atol=1e-12)


def test_the_brier_score_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match=r"BrierDecomposition\(num_classes=4\) got logits of 5 classes"):
        BrierDecomposition(4).update(*predictions(3))


@pytest.mark.parametrize("data", [predictions(1), predictions(501), *EDGES.values()])
def test_the_entropy_equals_that_of_scipy(data):
    metric = PredictiveEntropy(data[0].shape[1])
    metric.update(data[0])
    reference = scipy_entropy(data[0].double().softmax(1).numpy(), axis=1).mean()
    assert metric.compute().item() == pytest.approx(reference, abs=1e-6)  # float32


def test_the_flip_rate_is_that_of_all_predictions_for_any_batches_and_none_without_noise():
    clean, noisy = predictions(300)[0], predictions(300)[0] + predictions(301)[0][:300]
    metric, same = FlipRate(), FlipRate()
    for part in zip(clean.split(77), noisy.split(77), strict=True):
        metric.update(*part)
    same.update(clean, 2 * clean)
    expected = np.mean(clean.numpy().argmax(1) != noisy.numpy().argmax(1))
    assert 0 < expected < 1
    assert metric.compute() == flip_rate(clean, noisy) == torch.tensor(expected).float()
    assert same.compute() == 0
    noisy[3, 1] = math.nan
    metric.update(clean, noisy)
    with pytest.raises(ValueError, match="FlipRate reads finite predictions, but 1 predictions"):
        metric.compute()


def plain_aurc(confidence: np.ndarray, hit: np.ndarray) -> float:
    """The definition, in a loop over ranks, where an error is the mean of those that are as confident."""
    error = np.array([1 - hit[confidence == c].mean() for c in confidence])[np.argsort(-confidence)]
    return float(np.mean([error[:m].mean() for m in range(1, len(error) + 1)]))


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("n_levels", [3, 1000])
def test_selection_equals_its_definitions(n, n_levels):
    # log-odds in the middle of bins, so that a tie is a tie in any precision; few levels make many
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(0, n_levels, (n,), generator=generator)
    log_odds = (level + 0.5) * 36 / 4096
    target = (torch.rand(n, generator=generator) > log_odds.sigmoid()).long()
    target[:2] = torch.tensor([0, 1])  # a right and a wrong one at least
    metric = SelectiveClassification()
    metric.update(torch.stack([log_odds, torch.zeros(n)], 1), target)
    values = metric.compute()
    hit = (target == 0).numpy()
    assert values["aurc"].item() == pytest.approx(plain_aurc(level.numpy(), hit), abs=1e-6)  # returned in float32
    assert values["error_auroc"].item() == pytest.approx(roc_auc_score(~hit, -level.numpy()), abs=1e-6)


@pytest.mark.parametrize("n_wrong", [0, 1, 3000, 10_000])
def test_aurc_is_the_error_rate_without_a_ranking_and_the_closed_form_with_the_best(n_wrong):
    n, e = 10_000, n_wrong / 10_000
    assert aurc(torch.tensor([n - n_wrong]), torch.tensor([n])).item() == pytest.approx(e, abs=1e-12)  # float64
    best = aurc(torch.tensor([0, 0, n - n_wrong]), torch.tensor([n_wrong, 0, n - n_wrong])).item()
    limit = e + (1 - e) * math.log1p(-e) if e < 1 else 1
    assert best == pytest.approx(limit, abs=1 / n)  # a sum of n terms for an integral of a function that rises by at most 1


@pytest.mark.parametrize("data", EDGES.values(), ids=EDGES)
def test_selection_at_the_edges(data):
    metric = SelectiveClassification()
    metric.update(*data)
    wrong = (data[0].argmax(1) != data[1]).float().mean().item()
    values = metric.compute()
    assert values["aurc"].item() == pytest.approx(wrong, abs=1e-6)  # all are as confident
    assert values["error_auroc"].isnan() if wrong in (0, 1) else values["error_auroc"] == 0.5


def test_selection_tells_confidences_near_one_apart():
    # 1 - c from 1e-3 to 1e-6: all but one in the last of 4096 bins of equal width
    log_odds = torch.tensor([3.0, 4.0, 5.0, 6.0]) * math.log(10)
    metric = SelectiveClassification()
    metric.update(torch.stack([log_odds, torch.zeros(4)], 1), torch.tensor([1, 1, 0, 0]))
    assert metric.compute()["error_auroc"] == 1


def test_a_random_ranking_has_half_of_the_roc_curve():
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    hit, bins = torch.rand(n, generator=generator) < 0.8, torch.randint(0, 4096, (n,), generator=generator)
    correct, count = torch.bincount(bins[hit], minlength=4096), torch.bincount(bins, minlength=4096)
    n_right = int(hit.sum())
    # five standard errors of the Mann-Whitney statistic
    tolerance = 5 * math.sqrt((n + 1) / (12 * n_right * (n - n_right)))
    assert abs(error_auroc(correct, count).item() - 0.5) < tolerance


def plain_detected(noisy: list[int], clean: list[int]) -> float:
    """The definition, in a loop over thresholds."""
    threshold = max(t for t in range(max(noisy + clean) + 1) if np.mean([c < t for c in clean]) <= 0.05)
    return float(np.mean([c < threshold for c in noisy]))


@pytest.mark.parametrize("n_levels", [2, 9, 1000])
@pytest.mark.parametrize("n", [1, 20, 400])
def test_detection_equals_its_definitions(n, n_levels):
    # log-odds in the middle of bins, so that a tie is a tie in any precision
    generator = torch.Generator().manual_seed(n_levels)
    noisy = torch.randint(0, n_levels, (n,), generator=generator)
    clean = (torch.randint(0, n_levels, (n,), generator=generator) + n_levels // 4).clamp(max=n_levels - 1)
    logits = [torch.stack([(level + 0.5) * 36 / 4096, torch.zeros(n)], 1) for level in (noisy, clean)]
    metric = NoiseDetection()
    metric.update(*logits)
    values = metric.estimates()[0]
    is_noisy = np.repeat([1, 0], n)
    assert values["noise_auroc"] == pytest.approx(roc_auc_score(is_noisy, -torch.cat([noisy, clean]).numpy()), abs=1e-12)
    assert values["noise_detected"] == plain_detected(noisy.tolist(), clean.tolist())


def test_noise_that_is_not_there_is_not_detected_and_ties_are_told_for_none():
    clean = predictions(1000)[0]
    metric = NoiseDetection()
    metric.update(clean, clean)
    assert metric.compute()["noise_auroc"] == 0.5
    assert 0 < metric.compute()["noise_detected"] <= 0.05
    assert noise_detected(torch.tensor([0, 7]), torch.tensor([0, 5])) == 0
    assert noise_detected(torch.tensor([7, 0]), torch.tensor([0, 5])) == 1
    assert noise_detected(torch.tensor([7, 0]), torch.tensor([2, 38])) == 1  # exactly 5 %
    assert noise_detected(torch.tensor([7, 0]), torch.tensor([3, 37])) == 0


def test_the_histogram_of_the_entropy_is_that_of_numpy():
    logits = torch.cat([predictions(1000)[0], torch.zeros(1, 5), 200 * torch.eye(5)])  # and both ends
    metric = PredictiveEntropy(5)
    metric.update(logits)
    limits, counts = metric.histogram()
    assert (limits[0], limits[-1], len(limits)) == (0, math.log(5), 65)
    entropy = np.minimum(scipy_entropy(logits.double().softmax(1).numpy(), axis=1), math.log(5))
    assert counts == np.histogram(entropy, limits)[0].tolist()
    with pytest.raises(ValueError, match=r"PredictiveEntropy\(num_classes=4\) got logits of 5 classes"):
        PredictiveEntropy(4).update(logits)


def test_the_squared_error_equals_that_of_scikit_learn_and_is_float32_where_there_is_no_other(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    preds, target = torch.randn(2, 50, 3, generator=generator)
    metric = MeanSquaredError()
    metric.update(preds, target)
    assert metric.compute().item() == pytest.approx(mean_squared_error(target.numpy(), preds.numpy()), rel=1e-6)  # float32
    monkeypatch.setattr(scores, "_WITHOUT_FLOAT64", {"meta"})
    assert metric.to("cpu").error_sum.dtype == torch.float64
    metric.to("meta")
    assert metric.error_sum.dtype == torch.float32
    metric.reset()
    assert metric.error_sum.dtype == torch.float32


def of_task(task: Task, n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if task == "multiclass":
        return predictions(n)
    shape = (n, 3) if task == "multilabel" else (n,)
    preds = 2 * torch.randn(shape, generator=generator)
    return preds, torch.randn(shape, generator=generator) if task == "regression" else (torch.randn(shape) > 0).float()


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel", "regression"])
def test_a_monitor_measures_what_each_metric_does(task):
    preds, target = as_classes(*of_task(task), task)
    clean, groups = preds + 1, torch.arange(64) % 20
    metrics = monitor_metrics(task, 5, n_groups=20)
    for clean_preds in (clean, Predictions(clean)):
        metrics.reset()
        for rows in torch.arange(64).split(23):
            part = Predictions(clean[rows]) if isinstance(clean_preds, Predictions) else clean[rows]
            metrics.update(preds=preds[rows], target=target[rows], clean_preds=part, groups=groups[rows])
        total, rest = metrics.estimates()
        assert metrics.compute().keys() == total.keys() == rest[0].keys()
        assert task == "regression" or set(LOGGED) <= total.keys()
        for metric in metrics.values():
            alone: Any = copy.deepcopy(metric)
            alone.reset()
            alone.update(**alone._filter_kwargs(preds=preds, target=target, clean_preds=clean, groups=groups))
            values, without = alone.estimates()
            assert repr(values) == repr({key: total[key] for key in values})
            assert repr(without[7]) == repr({key: rest[7][key] for key in values})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.long])
@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3), (8, 1, 4, 5)])
def test_a_binary_logit_becomes_two_of_the_same_probability_and_loss(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(shape, generator=generator)
    target = torch.randint(0, 2, shape, generator=generator).to(dtype)
    check_target(target, torch.zeros(1, 2), "binary")
    for task in ("binary", "multilabel"):
        logits, classes = as_classes(z.double(), target, task)
        assert logits.shape == (shape[0], 2, *shape[1:])
        assert classes.dtype == torch.long
        assert torch.equal(classes, target.long())
        torch.testing.assert_close(logits.softmax(1)[:, 1], z.double().sigmoid())
        loss = CrossEntropy()
        loss.update(logits, classes)
        reference = F.binary_cross_entropy_with_logits(z.double(), target.double()).item()
        assert loss.estimates()[0]["loss"] == pytest.approx(reference, abs=2**-24)  # the resolution of the sums
    squeezed, classes = as_classes(z[:, None], target, "binary")
    assert torch.equal(squeezed, logits.float())
    assert classes.shape == shape


def test_predictions_that_are_read_once_can_meet_several_targets():
    logits, target = predictions(50)
    shared, first, second = Predictions(logits), CrossEntropy(), CrossEntropy()
    for labels in (target, target.roll(1)):
        first.update(shared, labels)
        second.update(logits, labels)
    assert_same(first, second)


def test_half_precision_is_read_in_float32():
    for task in ("multiclass", "binary", "regression"):
        preds, target = of_task(task)
        assert as_classes(preds.half(), target, task)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("task", "preds", "target"),
    [
        ("multiclass", torch.zeros(4), torch.zeros(4).long()),
        ("multiclass", torch.zeros(4, 1), torch.zeros(4).long()),
        ("multiclass", torch.zeros(4, 3), torch.zeros(4, 1).long()),
        ("multiclass", torch.zeros(4, 3).long(), torch.zeros(4).long()),
        ("multiclass", None, torch.zeros(4).long()),
        ("binary", torch.zeros(4, 2), torch.zeros(4)),
        ("binary", torch.zeros(4), torch.zeros(4, 1)),
        ("binary", torch.zeros(4).bool(), torch.zeros(4)),
        ("multilabel", torch.zeros(4, 3), torch.zeros(4)),
        ("multilabel", torch.zeros(4, 1), torch.zeros(4)),
        ("regression", torch.zeros(4, 1), torch.zeros(4)),
        ("regression", torch.zeros(4), torch.zeros(4).long()),
    ],
)
def test_predictions_that_do_not_fit_are_refused(task, preds, target):
    with pytest.raises(ValueError, match=f"the module returned .* but the task '{task}' reads .*; give predict=…, targets=…"):
        as_classes(preds, target, task)


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        ("multiclass", torch.tensor([0, 3]), r"class indices in \[0, 3\), got int64 \(2,\) from 0 to 3"),
        ("multiclass", torch.tensor([0, -1]), "from -1 to 0"),
        ("multiclass", torch.tensor([0.0, 1.0]), "got float32 .* give 'binary'"),
        ("multiclass", torch.tensor([True, False]), "got bool"),
        ("binary", torch.tensor([0.0, 0.3]), "the task 'binary' reads targets of 0 and 1, got float32"),
        ("multilabel", torch.tensor([[0, 2]]), "the task 'multilabel' reads targets of 0 and 1, got int64 .* from 0 to 2"),
    ],
)
def test_targets_that_are_not_of_the_task_are_refused(task, target, message):
    with pytest.raises(ValueError, match=message):
        check_target(target, torch.zeros(1, 3), task)


def test_what_targets_can_be_is_taken():
    check_target(torch.tensor([0, 2]), torch.zeros(2, 3), "multiclass")
    check_target(torch.zeros(0), torch.zeros(0, 3), "multiclass")
    check_target(torch.tensor([0.5, -7.0]), torch.zeros(2), "regression")


def test_the_area_is_that_of_numpy_in_units_of_the_level():
    curve = {0.5: 0.2, 0.0: 1.0, 0.1: 0.9, 2.0: 0.1}
    levels = sorted(curve)
    expected = trapezoid([curve[level] for level in levels], levels) / 2
    assert area_under_curve(curve) == pytest.approx(expected, rel=1e-15)
    assert area_under_curve({3.0: 0.7}) == 0.7


def test_corruption_errors_are_ratios_of_sums_and_their_mean():
    assert corruption_error([0.5, 0.25], [1.0, 0.5]) == 0.5
    assert math.isnan(corruption_error([0.1], [0.0]))
    assert mean_corruption_error({"a": [0.5, 0.5], "b": [0.3]}, {"b": [0.2], "a": [1.0, 1.0]}) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="of the levels of the baseline, got 1 and 2"):
        corruption_error([0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"of the noises of the baseline, got \['a'\] and \['b'\]"):
        mean_corruption_error({"a": [0.1]}, {"b": [0.1]})


def test_the_summary_of_a_classifier_and_of_anything_else():
    clean = {"accuracy": 0.9, "loss": 0.3}
    noisy = {
        ("gaussian", 1.0): {"accuracy": 0.7, "loss": 0.5},
        ("gaussian", 0.5): {"accuracy": 0.8, "loss": 0.4},
        ("weight", 0.2): {"accuracy": 0.5, "loss": 1.3},
    }
    summary = robustness_summary(clean, noisy, chance=0.1, weights=["weight"])
    expected = {
        "gaussian/accuracy_drop": 0.15,
        "gaussian/loss_drop": -0.15,
        "gaussian/accuracy_area": 0.8,  # a straight line from 0.9 to 0.7
        "gaussian/accuracy_retention": 0.65 / 0.8,
        "weight/accuracy_drop": 0.4,
        "weight/loss_drop": -1.0,
        "weight/sensitivity": 1.0,
        "weight/accuracy_area": 0.7,
        "weight/accuracy_retention": 0.5,
        "accuracy_mean": 2 / 3,
        "loss_mean": 2.2 / 3,
        "score": (0.9 + 2 / 3) / 2,
    }
    assert summary == pytest.approx(expected)
    unknown = robustness_summary(clean, noisy, chance=None, weights=["weight"])
    assert unknown == {key: value for key, value in summary.items() if not key.endswith("retention")}
    losses = {probe: {"loss": metrics["loss"]} for probe, metrics in noisy.items()}
    own = robustness_summary({"loss": 0.3}, losses, chance=None)
    assert own.keys() == {"gaussian/loss_drop", "weight/loss_drop", "loss_mean"}
