"""Predictions and targets of each task are read as its metrics need them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_metrics import assert_same_values, predictions

from lightning_noise.evaluation.old_tasks import LOGGED, Task, as_classes, check_target, monitor_metrics
from lightning_noise.metrics import CrossEntropy
from lightning_noise.metrics.base import Predictions


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
    assert_same_values(first, second)


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
    with pytest.raises(ValueError, match=f"the module returned .* but the task '{task}' reads .*; give predict=…, target=…"):
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
