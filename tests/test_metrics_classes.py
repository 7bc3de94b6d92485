"""Metrics of the classes, bins of equal mass and quantile forecasts equal published implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DEVICE, Classifier, Rows, fit, keys_of, loader, make_trainer
from helpers_metrics import predictions
from sklearn.metrics import balanced_accuracy_score, mean_pinball_loss, top_k_accuracy_score
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_noise import RobustnessMonitor, noise, tasks
from lightning_noise.evaluation.conditions import CLEAN
from lightning_noise.metrics import (
    AdaptiveCalibrationError,
    BalancedAccuracy,
    ClasswiseCalibrationError,
    MeanAbsoluteError,
    MeanSquaredError,
    PinballLoss,
    TopKAccuracy,
)
from lightning_noise.report import markdown


def skilled(n: int) -> tuple[Tensor, Tensor]:
    """Predictions of which two thirds are right."""
    logits, target = predictions(n)
    return logits, torch.where(torch.arange(n) % 3 > 0, logits.argmax(1), target)


def test_the_balanced_accuracy_equals_those_of_scikit_learn_and_torchmetrics():
    logits, target = skilled(1000)
    target = torch.where(target == 1, 2, target)  # no target is of class 1
    metric = BalancedAccuracy(5)
    metric.update(logits, target)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        reference = balanced_accuracy_score(target.cpu(), logits.argmax(1).cpu())
    assert metric.compute().item() == pytest.approx(reference, abs=1e-7)
    logits, target = skilled(1000)
    metric.reset()
    metric.update(logits, target)
    torch.testing.assert_close(metric.compute(), multiclass_accuracy(logits, target, 5))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_top_k_accuracy_equals_those_of_scikit_learn_and_torchmetrics(k):
    logits, target = skilled(1000)
    metric = TopKAccuracy(k)
    metric.update(logits, target)
    assert metric.compute().item() == pytest.approx(top_k_accuracy_score(target.cpu(), logits.cpu(), k=k), abs=1e-7)
    torch.testing.assert_close(metric.compute(), multiclass_accuracy(logits, target, 5, top_k=k, average="micro"))


def test_equal_logits_have_no_more_than_k_best_classes():
    metric = TopKAccuracy(2)
    metric.update(torch.zeros(5, 5), torch.arange(5))
    assert metric.compute() == 2 / 5


def test_metrics_of_a_collection_stay_different_after_a_batch_without_a_mistake():
    z, target = torch.arange(6.0, 0.0, -1.0).expand(6, 6), torch.arange(6)
    collection = MetricCollection({"one": TopKAccuracy(1), "five": TopKAccuracy(5)})
    collection.update(z, 0 * target)
    collection.update(z, target)
    assert collection.compute() == pytest.approx({"one": 7 / 12, "five": 11 / 12})


@pytest.mark.parametrize(
    ("one", "other", "values"),
    [(MeanSquaredError(), MeanAbsoluteError(), (2.0, 1.0)), (PinballLoss([0.25]), PinballLoss([0.75]), (0.75, 0.25))],
)
def test_errors_of_a_collection_stay_different_after_a_batch_without_an_error(one, other, values):
    y = torch.arange(6.0)
    collection = MetricCollection({"one": one, "other": other})
    for error in (0.0, 2.0):
        preds = y + error
        collection.update(preds[:, None] if isinstance(one, PinballLoss) else preds, y)
    assert collection.compute() == dict(zip(("one", "other"), values, strict=True))


def equal_mass(logits: Tensor, target: Tensor, n_bins: int) -> float:
    """The definition, from sorted predictions."""
    probabilities = logits.double().softmax(1).cpu().numpy()
    order = np.argsort(probabilities.max(1))
    gap = ((probabilities.argmax(1) == target.cpu().numpy()) - probabilities.max(1))[order]
    return sum(abs(part.sum()) for part in np.array_split(gap, n_bins)) / len(gap)


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 10.0])
def test_bins_of_equal_mass_equal_their_definition(sharpness):
    logits, target = skilled(15_000)
    metric = AdaptiveCalibrationError()
    metric.update(sharpness * logits, target)
    assert metric.compute().item() == pytest.approx(equal_mass(sharpness * logits, target, 15), abs=1e-3)


def test_bins_of_equal_mass_are_exact_if_no_bin_splits_an_interval():
    confidence = torch.linspace(0.55, 0.95, 30)  # each in an interval of its own
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    target = (torch.arange(30) % 3 == 0).long()
    metric = AdaptiveCalibrationError(n_bins=10)
    metric.update(logits, target)
    assert metric.compute().item() == pytest.approx(equal_mass(logits, target, 10), abs=1e-7)


def test_one_prediction_has_a_calibration_error():
    metric = AdaptiveCalibrationError()
    metric.update(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(0.25, abs=1e-6)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the numbers belong to the draws of the CPU")
def test_calibration_errors_are_those_of_a_public_package():
    """The numbers are those of uncertainty-calibration 0.1.4: `get_ece_em`, and the marginal error with bins of equal width."""
    logits, target = skilled(5000)
    adaptive, classwise = AdaptiveCalibrationError(), ClasswiseCalibrationError(5)
    adaptive.update(logits, target)
    classwise.update(logits, target)
    assert adaptive.compute().item() == pytest.approx(0.16865042, abs=2e-4)  # whole predictions, not shares of an interval
    assert classwise.compute().item() == pytest.approx(0.07755281, abs=1e-6)


@pytest.mark.parametrize("shape", [(50,), (20, 7)])
def test_the_pinball_loss_equals_that_of_scikit_learn(shape):
    generator = torch.Generator(DEVICE).manual_seed(0)
    target = torch.randn(shape, generator=generator, device=DEVICE)
    preds = torch.randn(*shape, 3, generator=generator, device=DEVICE)
    quantiles = (0.1, 0.5, 0.9)
    metric = PinballLoss(quantiles)
    metric.update(preds, target)
    reference = [
        mean_pinball_loss(target.flatten().cpu(), preds[..., i].flatten().cpu(), alpha=quantile)
        for i, quantile in enumerate(quantiles)
    ]
    assert metric.compute().item() == pytest.approx(np.mean(reference), rel=1e-6)


def test_the_pinball_loss_refuses_another_axis_and_quantiles_in_percent():
    with pytest.raises(ValueError, match=r"expects predictions of shape \(4, 7, 2\), got .*; .* type preds.movedim\(1, -1\)"):
        PinballLoss([0.1, 0.9]).update(torch.zeros(4, 2, 7), torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"between 0 and 1, got \[10, 90\]"):
        PinballLoss([10, 90])


MORE = ("top5_accuracy", "balanced_accuracy", "adaptive_ece", "classwise_ece")


def test_a_monitor_logs_and_reports_further_metrics():
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=tasks.Multiclass(more=MORE))
    _, trainer = fit([monitor], max_epochs=1)
    logged = keys_of(trainer)
    assert monitor.report is not None
    for name in MORE:
        row = monitor.report.rows[monitor.conditions and next(iter(monitor.conditions))._replace(draw=None), name]
        assert logged[f"robustness_levels/gaussian/0.5/{name}"] == pytest.approx(row.value, abs=1e-6)
        assert row.low <= row.value <= row.high
    assert logged["robustness_levels/gaussian/0.5/top5_accuracy"] == 1, "there are three classes"
    heading, _, clean, *_ = [line.split(" | ") for line in markdown(monitor.report).splitlines() if line.startswith("| ")]
    shown = dict(zip(map(str.strip, heading), clean, strict=True))
    assert all(" to " in shown[f"{name}, %"] for name in ("top-5 accuracy", "balanced accuracy"))


class Quantiles(Classifier):
    def __init__(self):
        super().__init__()
        self.net[4] = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


def test_a_monitor_follows_quantile_forecasts():
    data = Rows(13, seed=1)
    data.y = data.x[:, 0]
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=tasks.Custom(PinballLoss([0.1, 0.9])))
    _, trainer = fit([monitor], module=Quantiles, validation=loader(data), max_epochs=1)
    assert trainer.callback_metrics["robustness/score"] < 0, "less is better"
    assert "robustness_levels/gaussian/0.5/PinballLoss" in trainer.callback_metrics


@pytest.mark.parametrize("n_mistakes", [0, 1])
def test_the_interval_of_a_balanced_accuracy_ends_at_1_and_knows_that_a_mistake_is_possible(n_mistakes):
    class Sign(Classifier):
        def forward(self, x):
            return x[:, :1] * torch.tensor([-1.0, 1.0])

        def validation_step(self, batch, batch_idx):
            pass

    data = Rows(100, seed=1)
    data.y = (data.x[:, 0] > 0).long()
    data.y[:n_mistakes] = 1 - data.y[:n_mistakes]
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=tasks.Multiclass(more=["balanced_accuracy"]))
    make_trainer([monitor]).validate(Sign(), loader(data), verbose=False)
    assert monitor.report is not None
    row = monitor.report.rows[CLEAN, "balanced_accuracy"]
    assert 0.9 < row.low < row.value
    assert row.value <= row.high <= 1


def test_a_metric_that_is_named_twice_is_logged_once():
    assert tasks.Multiclass(more=["adaptive_ece", "adaptive_ece"]) == tasks.Multiclass(more="adaptive_ece")


def test_a_further_metric_that_is_logged_without_being_computed_is_refused():
    with pytest.raises(ValueError, match=r"on request; type task=tasks\.Multiclass\(more=\['adaptive_ece'\]\)"):
        RobustnessMonitor(logged=["accuracy", "adaptive_ece"])
    task = tasks.Multiclass(more=["adaptive_ece"])
    assert RobustnessMonitor(task=task, logged=["accuracy", "adaptive_ece"]).task == task


def test_an_unknown_further_metric_is_refused():
    with pytest.raises(ValueError, match=r"got 'top5'; type more=\['top5_accuracy'\]"):
        tasks.Multiclass(more=["top5"])
