"""Metrics equal their definitions and other libraries, at the edges too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_metrics import middles_of_odds_bins, plain_ece, predictions
from members import REGRESSION_METRICS
from scipy.integrate import trapezoid
from scipy.optimize import minimize_scalar
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, mean_absolute_error, mean_squared_error, r2_score, roc_auc_score

from lightning_noise.metrics import (
    BrierDecomposition,
    BrierScore,
    CalibrationBins,
    ExpectedCalibrationError,
    FlipRate,
    MeanAbsoluteError,
    MeanSquaredError,
    NoiseDetection,
    PredictiveEntropy,
    R2Score,
    SelectiveClassification,
    TemperatureScaling,
    area_under_curve,
    corruption_error,
    mean_corruption_error,
    scores,
)
from lightning_noise.metrics.base import Predictions, bin_indices
from lightning_noise.metrics.calibration import (
    calibration_floor,
    calibration_z,
    debiased_calibration_error,
    expected_calibration_error,
)
from lightning_noise.metrics.confidence import aurc, failure_auroc, noise_detected
from lightning_noise.metrics.scores import murphy_decomposition

# predictions at the edges: one sample, all right, all wrong, certain and right, certain and wrong, undecided
EDGES = {
    "one": (torch.tensor([[0.3, 0.1, -0.2]]), torch.tensor([1])),
    "right": (3 * torch.eye(3), torch.arange(3)),
    "wrong": (3 * torch.eye(3), torch.tensor([1, 2, 0])),
    "certain": (200 * torch.eye(3), torch.arange(3)),
    "certain and wrong": (200 * torch.eye(3), torch.tensor([1, 2, 0])),
    "undecided": (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])),
}


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


def test_one_is_a_temperature_and_without_predictions_it_is_nan():
    assert TemperatureScaling.temperatures[15] == 1
    assert (min(TemperatureScaling.temperatures), max(TemperatureScaling.temperatures)) == (0.1, 10)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert TemperatureScaling().compute()["temperature"].isnan()


def test_a_class_of_probability_0_is_an_error():
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


def test_the_brier_score_of_certain_predictions_is_not_what_rounding_leaves():
    margin = 7 + torch.rand(1000, generator=torch.Generator().manual_seed(0))
    metric = BrierScore()
    metric.update(torch.stack([torch.zeros(1000), margin], 1), torch.ones(1000, dtype=torch.long))
    expected = 2 * margin.double().neg().sigmoid().square()
    assert metric.totals()["brier"] == pytest.approx(expected.mean().item(), abs=1e-9)  # rounded to 2^-24 a sample


def test_the_parts_add_up_to_the_brier_score_where_probabilities_in_a_bin_are_equal():
    generator = torch.Generator().manual_seed(0)
    p = (torch.randint(0, 10, (500,), generator=generator).double() + 0.5) / 10
    hit = (torch.rand(500, generator=generator, dtype=torch.float64) < p).double()
    zeros, bins = torch.zeros(1, 12, dtype=torch.float64), (p * 10).long()  # two bins stay empty
    reliability, resolution, uncertainty = murphy_decomposition(
        *(zeros.index_add(1, bins, values[None]) for values in (p, hit, torch.ones_like(p)))
    )
    torch.testing.assert_close(reliability - resolution + uncertainty, (p - hit).square().mean(), rtol=0, atol=1e-12)


def test_the_brier_score_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match=r"BrierDecomposition\(num_classes=4\) expects .* got 5 classes"):
        BrierDecomposition(4).update(*predictions(3))


@pytest.mark.parametrize("data", [predictions(1), predictions(501), *EDGES.values()])
def test_the_entropy_equals_that_of_scipy(data):
    metric = PredictiveEntropy()
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
    assert metric.compute() == torch.tensor(expected).float()
    assert same.compute() == 0
    noisy[3, 1] = math.nan
    metric.update(clean, noisy)
    with pytest.raises(ValueError, match="FlipRate expects finite predictions, got 1 that"):
        metric.compute()


def plain_aurc(confidence: np.ndarray, hit: np.ndarray) -> float:
    """The definition, in a loop over ranks, where an error is the mean of those that are as confident."""
    error = np.array([1 - hit[confidence == c].mean() for c in confidence])[np.argsort(-confidence)]
    return float(np.mean([error[:m].mean() for m in range(1, len(error) + 1)]))


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("n_levels", [3, 1000])
def test_selection_equals_its_definitions(n, n_levels):
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(0, n_levels, (n,), generator=generator)  # few levels make many ties
    log_odds = middles_of_odds_bins(n_levels)[level].float()
    target = (torch.rand(n, generator=generator) > log_odds.sigmoid()).long()
    target[:2] = torch.tensor([0, 1])  # a right and a wrong one at least
    metric = SelectiveClassification()
    metric.update(torch.stack([log_odds, torch.zeros(n)], 1), target)
    values = metric.compute()
    hit = (target == 0).numpy()
    assert values["aurc"].item() == pytest.approx(plain_aurc(level.numpy(), hit), abs=1e-6)  # returned in float32
    assert values["failure_auroc"].item() == pytest.approx(roc_auc_score(~hit, -level.numpy()), abs=1e-6)


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
    assert values["failure_auroc"].isnan() if wrong in (0, 1) else values["failure_auroc"] == 0.5


def rival_logits(margin: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Returns logits of which one is above all others by the margin."""
    return torch.cat([margin[:, None], torch.zeros(len(margin), n_classes - 1)], 1).to(margin.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 10, 20, 40, 90])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_confidences_that_round_to_one_are_ranked(n_classes, shift, dtype):
    generator = torch.Generator().manual_seed(0)
    margin = 5 * torch.rand(2000, generator=generator)
    hit = torch.rand(2000, generator=generator) < 0.3 + 0.14 * margin
    margin = (margin + shift).to(dtype)
    selection, detection = SelectiveClassification(), NoiseDetection()
    selection.update(rival_logits(margin, n_classes), (~hit).long())
    noisy, clean = margin.chunk(2)
    detection.update(rival_logits(noisy, n_classes), rival_logits(clean, n_classes))
    values, ranks = selection.totals(), margin.double().numpy()
    # where a bin is widest, at 95, it holds 3 % of the margins
    assert values["failure_auroc"] == pytest.approx(roc_auc_score(hit.numpy(), ranks), abs=1e-3)
    assert values["aurc"] == pytest.approx(plain_aurc(ranks, hit.numpy()), abs=1e-3)
    reference = roc_auc_score(np.repeat([0, 1], 1000), ranks)
    assert detection.totals()["noise_auroc"] == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_log_odds_has_no_end(dtype):
    margin = 2.0 ** torch.arange(127 if dtype == torch.float32 else 1023, dtype=dtype)
    bins = Predictions(rival_logits(torch.cat([-margin.flip(0), margin]), 2)).odds_bins
    assert (bins.diff()[: len(margin) - 1] <= 0).all(), "the other class is the more confident, the further below"
    upwards = bins[len(margin) :][:126].diff()
    assert (upwards > 0).all()


def test_a_class_of_infinite_odds_is_the_most_confident():
    masked = torch.tensor([[0.0, -math.inf, -math.inf], [3e38, -3e38, 0.0], [200.0, 0.0, -math.inf], [1.0, 1.0, -math.inf]])
    log_odds = Predictions(masked).log_odds
    assert log_odds.tolist() == [math.inf, pytest.approx(3e38), 200, 0]
    metric = SelectiveClassification()
    metric.update(masked, torch.tensor([0, 0, 1, 2]))
    assert metric.compute()["failure_auroc"] == 1
    # a class without probability adds nothing anywhere
    for kind in (BrierScore, CalibrationBins, PredictiveEntropy, SelectiveClassification, ExpectedCalibrationError):
        without, with_mask = kind(), kind()
        logits, target = predictions(100)
        without.update(logits, target)
        with_mask.update(torch.cat([logits, torch.full((100, 2), -math.inf)], 1), target)
        torch.testing.assert_close(with_mask.compute(), without.compute(), rtol=0, atol=1e-6)


def test_a_random_ranking_has_half_of_the_roc_curve():
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    hit, bins = torch.rand(n, generator=generator) < 0.8, torch.randint(0, 4096, (n,), generator=generator)
    correct, count = torch.bincount(bins[hit], minlength=4096), torch.bincount(bins, minlength=4096)
    n_right = int(hit.sum())
    # five standard errors of the Mann-Whitney statistic
    tolerance = 5 * math.sqrt((n + 1) / (12 * n_right * (n - n_right)))
    assert abs(failure_auroc(correct, count).item() - 0.5) < tolerance


def plain_detected(noisy: list[int], clean: list[int]) -> float:
    """The definition, in a loop over thresholds."""
    threshold = max(t for t in range(max(noisy + clean) + 1) if np.mean([c < t for c in clean]) <= 0.05)
    return float(np.mean([c < threshold for c in noisy]))


@pytest.mark.parametrize("n_levels", [2, 9, 1000])
@pytest.mark.parametrize("n", [1, 20, 400])
def test_detection_equals_its_definitions(n, n_levels):
    generator = torch.Generator().manual_seed(n_levels)
    noisy = torch.randint(0, n_levels, (n,), generator=generator)
    clean = (torch.randint(0, n_levels, (n,), generator=generator) + n_levels // 4).clamp(max=n_levels - 1)
    log_odds = middles_of_odds_bins(n_levels).float()
    logits = [torch.stack([log_odds[level], torch.zeros(n)], 1) for level in (noisy, clean)]
    metric = NoiseDetection()
    metric.update(*logits)
    values = metric.totals()
    is_noisy = np.repeat([1, 0], n)
    assert values["noise_auroc"] == pytest.approx(roc_auc_score(is_noisy, -torch.cat([noisy, clean]).numpy()), abs=1e-12)
    assert values["noise_detected"] == plain_detected(noisy.tolist(), clean.tolist())


def test_absent_noise_and_ties_are_not_detected():
    clean = predictions(1000)[0]
    metric = NoiseDetection()
    metric.update(clean, clean)
    assert metric.compute()["noise_auroc"] == 0.5
    assert 0 < metric.compute()["noise_detected"] <= 0.05
    assert noise_detected(torch.tensor([0, 7]), torch.tensor([0, 5])) == 0
    assert noise_detected(torch.tensor([7, 0]), torch.tensor([0, 5])) == 1
    assert noise_detected(torch.tensor([7, 0]), torch.tensor([2, 38])) == 1  # exactly 5 %
    assert noise_detected(torch.tensor([7, 0]), torch.tensor([3, 37])) == 0


@pytest.mark.parametrize(
    ("metric", "reference"),
    [(MeanSquaredError, mean_squared_error), (MeanAbsoluteError, mean_absolute_error), (R2Score, r2_score)],
)
def test_regression_metrics_equal_those_of_scikit_learn(metric, reference):
    generator = torch.Generator().manual_seed(0)
    target = 3 + torch.randn(50, 3, generator=generator)
    preds = target + torch.randn(50, 3, generator=generator)
    metric = metric()
    for part in zip(preds.split(20), target.split(20), strict=True):
        metric.update(*part)
    expected = reference(target.flatten().double().numpy(), preds.flatten().double().numpy())
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)  # returned in float32


def test_r2_is_0_for_the_mean_and_nan_without_variance():
    metric = R2Score()
    metric.update(torch.full((4,), 2.5), torch.arange(1.0, 5.0))
    assert metric.compute() == 0
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.rand(1000), torch.full((1000,), 0.1))  # whose squares round
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.arange(-4.0, 4.0) + 1e6, torch.arange(-3.0, 5.0) + 1e6)
    assert metric.compute().item() == pytest.approx(1 - 1 / 5.25)


@pytest.mark.parametrize("offset", [0.0, 10.0, 30.0, 100.0, 1e4])
def test_r2_from_sums_in_float32_is_right_or_nan(offset, monkeypatch):
    monkeypatch.setattr(scores, "_WITHOUT_FLOAT64", {"cpu"})
    target = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    preds, metric = 0.9 * target, R2Score().to("cpu")
    metric.update(preds + offset, target + offset)
    assert metric.compute().isnan() == (offset > 50)
    if offset < 50:
        assert metric.compute().item() == pytest.approx(r2_score(target.numpy(), preds.numpy()), abs=1e-5)


@pytest.mark.parametrize("metric", REGRESSION_METRICS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_regression_metrics_refuse_errors_that_are_not_finite(metric, broken):
    metric = metric()
    metric.update(torch.tensor([1.0, broken]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="expects finite predictions, got 1 that"):
        metric.compute()


@pytest.mark.parametrize("metric", REGRESSION_METRICS)
def test_regression_metrics_sum_in_float32_on_a_device_without_float64(metric, monkeypatch):
    monkeypatch.setattr(scores, "_WITHOUT_FLOAT64", {"meta"})
    metric = metric()

    def dtypes() -> set[torch.dtype]:
        return {metric.metric_state[state].dtype for state in metric.states}

    metric.to("cpu")
    assert dtypes() == {torch.float64}
    metric.to("meta")
    assert dtypes() == {torch.float32}
    metric.reset()
    assert dtypes() == {torch.float32}


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
    with pytest.raises(ValueError, match="for each level, got 1 and 2"):
        corruption_error([0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"the same noises, got \['a'\] and \['b'\]"):
        mean_corruption_error({"a": [0.1]}, {"b": [0.1]})
