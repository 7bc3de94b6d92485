"""Predictions and targets of each task are read as its metrics need them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_metrics import assert_same_values, predictions
from members import TASKS
from torchmetrics import CatMetric, MeanAbsoluteError, MetricCollection
from torchmetrics import R2Score as TorchR2Score
from torchmetrics.wrappers import Running

from lightning_noise import metrics as own
from lightning_noise.metrics import CrossEntropy
from lightning_noise.metrics.base import Predictions
from lightning_noise.tasks import Binary, Custom, Multiclass, Multilabel, Regression, Task


def of_task(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    return TASKS[task](torch.Generator().manual_seed(0))


@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_of_a_task_are_those_of_each_metric_alone(task):
    preds, target = task.read(*of_task(task))
    clean, groups = preds + 1, torch.arange(64) % 20
    metrics = task.metrics(preds, n_groups=20)
    for clean_preds in (clean, Predictions(clean)):
        metrics.reset()
        for rows in torch.arange(64).split(23):
            part = Predictions(clean[rows]) if isinstance(clean_preds, Predictions) else clean[rows]
            metrics.update(preds=preds[rows], target=target[rows], clean_preds=part, groups=groups[rows])
        every = metrics.estimates()
        assert metrics.compute().keys() == metrics.totals().keys() == every.keys() == set(task.names)
        assert {task.main, task.governed, *task.logged, *task.compared} <= every.keys()
        for metric in metrics.values():
            alone: Any = copy.deepcopy(metric)
            alone.reset()
            alone.update(**alone._filter_kwargs(preds=preds, target=target, clean_preds=clean, groups=groups))
            for key, values in alone.estimates().items():
                torch.testing.assert_close(every[key], values, rtol=0, atol=0, equal_nan=True)
                assert len(values) == 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.long])
@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3), (8, 1, 4, 5)])
def test_a_binary_logit_becomes_two_of_the_same_probability_and_loss(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(shape, generator=generator)
    target = torch.randint(0, 2, shape, generator=generator).to(dtype)
    Binary().check(target, torch.zeros(1, 2))
    for task in (Binary(), Multilabel()):
        logits, classes = task.read(z.double(), target)
        assert logits.shape == (shape[0], 2, *shape[1:])
        assert classes.dtype == torch.long
        assert torch.equal(classes, target.long())
        torch.testing.assert_close(logits.softmax(1)[:, 1], z.double().sigmoid())
        loss = CrossEntropy()
        loss.update(logits, classes)
        reference = F.binary_cross_entropy_with_logits(z.double(), target.double()).item()
        assert loss.totals()["loss"] == pytest.approx(reference, abs=2**-24)  # the resolution of the sums
    squeezed, classes = Binary().read(z[:, None], target)
    assert torch.equal(squeezed, logits.float())
    assert classes.shape == shape


def test_predictions_that_are_read_once_can_meet_several_targets():
    logits, target = predictions(50)
    shared, first, second = Predictions(logits), CrossEntropy(), CrossEntropy()
    for labels in (target, target.roll(1)):
        first.update(shared, labels)
        second.update(logits, labels)
    assert_same_values(first, second)


def test_half_precision_is_read_in_float32():
    for task in TASKS:
        preds, target = of_task(task)
        assert task.read(preds.half(), target)[0].dtype == torch.float32


@pytest.mark.parametrize("task", TASKS)
def test_the_governed_metrics_are_those_of_all_metrics(task):
    preds, target = task.read(*of_task(task))
    every, governed = task.metrics(preds, n_groups=20), task.governed_metrics(n_groups=20)
    for metrics in (every, governed):
        metrics.update(preds=preds, clean_preds=preds, target=target, groups=torch.arange(64) % 20)
    found, one = every.estimates(), governed.estimates()
    assert {task.governed, *(["signed_gap"] if task.has_classes else [])} <= one.keys()
    for key, values in one.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=0, equal_nan=True)


def test_the_mean_of_the_target_has_the_metric_of_a_guess():
    target = of_task(Regression())[1]
    metrics = Regression().governed_metrics()
    metrics.update(preds=target.mean().expand(64), clean_preds=target, target=target)
    # a difference of sums of 64 numbers in float64
    assert metrics.totals()["r2"] == pytest.approx(Regression().chance({}), abs=1e-6)


_CALL = "predict=lambda module, batch: module(batch[0])"
_ONE_HOT = torch.eye(3)[[0, 1, 2, 0]]
_NUMBERS = torch.tensor([0.5, -2.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("task", "preds", "target", "advice"),
    [
        (Multiclass(), torch.zeros(4), torch.zeros(4).long(), "type task=tasks.Binary() or task=tasks.Multilabel()"),
        (Multiclass(), torch.zeros(4, 1), torch.zeros(4).long(), "type task=tasks.Binary()"),
        (Multiclass(), torch.zeros(4), _NUMBERS, "type task=tasks.Regression()"),
        (Multiclass(), torch.zeros(4, 1), _NUMBERS[:, None], "type task=tasks.Regression()"),
        (Multiclass(), torch.zeros(4, 1), _NUMBERS, "type task=tasks.Regression()"),
        (Multiclass(), torch.zeros(4, 3), torch.zeros(4, 1).long(), f"type {_CALL}.unsqueeze(1)"),
        (Multiclass(), torch.zeros(4, 3), _ONE_HOT, "the target is one-hot or soft; let the data return target.argmax(1)"),
        (Multiclass(), torch.zeros(4, 3), 0.8 * _ONE_HOT + 0.2 / 3, "let the data return target.argmax(1)"),
        (Multiclass(), torch.zeros(4, 3).long(), torch.zeros(4).long(), "type predict=…, target=…"),
        (Multiclass(), None, torch.zeros(4).long(), f"type {_CALL}…, or another task"),
        (
            Multiclass(),
            {"loss": torch.zeros(()), "logits": torch.zeros(4, 3)},
            torch.zeros(4).long(),
            f"type {_CALL}['logits']",
        ),
        (Multiclass(), (None, torch.zeros(4, 3)), torch.zeros(4).long(), f"type {_CALL}[1]"),
        (Multiclass(class_dim=1), torch.zeros(4, 5, 3), torch.zeros(4, 5).long(), "type "),
        (
            Multiclass(ignore_index=255),
            torch.zeros(4, 3, 6, 7),
            torch.full((4, 1, 6, 7), 255),
            "type target.squeeze(1) in the data",
        ),
        (Binary(), torch.zeros(4, 2), torch.zeros(4).long(), "type task=tasks.Multiclass()"),
        (Binary(), torch.zeros(4), torch.zeros(4, 1), f"type {_CALL}.unsqueeze(1)"),
        (Binary(), torch.zeros(4, 5, 1), torch.zeros(4, 5), f"type {_CALL}.squeeze(-1)"),
        (Binary(), torch.zeros(4).bool(), torch.zeros(4), "type predict=…, target=…"),
        (Multilabel(), torch.zeros(4, 3), torch.zeros(4).long(), "type task=tasks.Multiclass()"),
        (Multilabel(), torch.zeros(4, 1), torch.zeros(4), f"type {_CALL}.squeeze(1) or task=tasks.Binary()"),
        (Regression(), torch.zeros(4), _NUMBERS[:, None], f"type {_CALL}.unsqueeze(1)"),
        (Regression(), torch.zeros(4, 5, 1), torch.rand(4, 5) + 2, f"type {_CALL}.squeeze(-1)"),
        (Regression(), torch.zeros(4), torch.arange(4) + 5, "type target.float() in the data"),
        (Regression(), torch.zeros(4, 3), torch.zeros(4).long(), "type task=tasks.Multiclass()"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_with_what_to_type(task, preds, target, advice):
    name = type(task).__name__
    with pytest.raises(ValueError, match=rf"the module returned .* but {name}\(\) expects .*; ") as refused:
        task.read(preds, target)
    assert f"; {advice}" in str(refused.value)


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        (Multiclass(), torch.tensor([0, 3]), r"class indices in \[0, 3\), got int64 \(2,\) from 0 to 3"),
        (Multiclass(), torch.tensor([0, -1]), "from -1 to 0"),
        (Multiclass(), torch.tensor([0.0, 1.0]), r"got float32 .* target\.long\(\), or type task=tasks\.Binary"),
        (Multiclass(), torch.tensor([0.0, 2.0]), r"got float32 .* let the data return target\.long\(\)$"),
        (Multiclass(), torch.tensor([0.3, 1.0]), r"got float32 .* type task=tasks\.Regression\(\)$"),
        (Multiclass(), torch.tensor([True, False]), "got bool"),
        (Multiclass(), torch.tensor([0, -100]), r"type task=tasks\.Multiclass\(ignore_index=-100\)"),
        (Multiclass(), torch.tensor([0, 255]), r"type task=tasks\.Multiclass\(ignore_index=255\)"),
        (Multiclass(ignore_index=-100), torch.tensor([0, 255]), r"ignore_index=…\)$"),
        (Multiclass(), torch.tensor([1, 3]), r"if the labels begin at 1, let the data return target - 1$"),
        (Binary(), torch.tensor([-1.0, 1.0]), r"if -1 means no, let the data return target\.clamp\(min=0\)$"),
        (Binary(), torch.tensor([0, 1, -100]), r"type task=tasks\.Binary\(ignore_index=-100\)"),
        (Multilabel(), torch.tensor([[0.0, -1.0, 1.0]]), r"type task=tasks\.Multilabel\(ignore_index=-1\)"),
        (Binary(), torch.tensor([0.0, 0.3]), r"Binary\(\) expects targets of 0 and 1, got float32 .*tasks\.Regression"),
        (Multilabel(), torch.tensor([[0, 2]]), r"expects targets of 0 and 1, got int64 .* from 0 to 2; .*tasks\.Multiclass"),
    ],
)
def test_targets_that_are_not_of_the_task_are_refused(task, target, message):
    with pytest.raises(ValueError, match=message):
        task.check(target, torch.zeros(1, 3))


def test_what_targets_can_be_is_taken():
    Multiclass().check(torch.tensor([0, 2]), torch.zeros(2, 3))
    Multiclass().check(torch.zeros(0), torch.zeros(0, 3))
    Regression().check(torch.tensor([0.5, -7.0]), torch.zeros(2))


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_a_better_model_has_a_larger_score(task):
    output, target = of_task(task)
    if not task.has_classes:
        best = target
    else:
        best = 9 * (2 * target - 1) if target.is_floating_point() else 9 * F.one_hot(target, 5).float()
    scores = []
    for each in (output, best):
        preds, read = task.read(each, target)
        metrics = task.metrics(preds)
        metrics.update(preds=preds, clean_preds=preds, target=read)
        scores.append(task.score(metrics.totals()))
    assert scores[0] < scores[1] == 1


def test_metrics_of_ones_own_say_themselves_whether_more_is_better():
    error, r2 = Custom(MeanAbsoluteError()), Custom(MetricCollection([TorchR2Score(), MeanAbsoluteError()]))
    assert (error.main, error.score({error.main: 3.0})) == ("MeanAbsoluteError", -3.0)
    assert (r2.main, r2.score({"R2Score": 0.5}), r2.higher_is_better(error.main)) == ("R2Score", 0.5, False)
    with pytest.raises(TypeError, match="expects a Metric or MetricCollection of torchmetrics, got 'multiclass'"):
        Custom("multiclass")  # type: ignore[arg-type]


@pytest.mark.parametrize("takes_clean", [True, False])
def test_a_wrapper_hands_on_the_clean_predictions_only_if_its_metric_takes_them(takes_clean):
    class Change(MeanAbsoluteError):
        def update(self, preds, target, clean_preds):  # pyright: ignore[reportIncompatibleMethodOverride]
            super().update(preds, clean_preds)

    x = torch.rand(8, 3)
    metrics = Custom(Running(Change() if takes_clean else MeanAbsoluteError(), window=2)).metrics(None)
    metrics.update(preds=x, target=x + 1, clean_preds=x + 3)
    assert metrics.totals() == pytest.approx({"Running": 3 if takes_clean else 1})


def test_metrics_of_ones_own_that_keep_lists_count_each_sample_once_after_a_use():
    class Count(CatMetric):
        def compute(self) -> torch.Tensor:
            return torch.tensor(len(super().compute()))

    collection = MetricCollection({"one": Count(), "two": Count()})
    collection.update(torch.zeros(5))
    metrics = Custom(collection).metrics(None)
    metrics.collection.update(torch.zeros(3))
    assert metrics.totals() == {"one": 3, "two": 3}


def test_metrics_of_ones_own_begin_anew_and_stay_different_after_a_batch_without_a_mistake():
    error, x = own.MeanAbsoluteError(), torch.tensor([0.0, 1.0])
    error.update(x, x + 100)
    metrics = Custom(MetricCollection([error, own.MeanSquaredError()])).metrics(None)
    for target in (x, x + 2):
        metrics.update(preds=x, target=target, clean_preds=x)
    assert metrics.totals() == {"MeanAbsoluteError": 1, "MeanSquaredError": 2}
    assert error.compute() == 100, "that of the user"
