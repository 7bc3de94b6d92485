"""The results of an evaluation: how readings of batches become values of all ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics import MeanSquaredError, MetricCollection, SumMetric

from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.engine import Reading
from lightning_noise.evaluation.positions import N_GROUPS, fingerprint, sum_over_ranks
from lightning_noise.evaluation.results import Results
from lightning_noise.metrics.collections import CustomMetrics
from lightning_noise.tasks import Multiclass

NOISY = Condition("gaussian", 0.1, 0)
SHAPES = {
    "rows": [(64, 5)] * 3,
    "rows and the last batch": [(64, 5), (64, 5), (7, 5)],
    "a batch of padding": [(0, 5), (64, 5), (0, 5), (3, 5)],
    "sequences of several lengths": [(4, 5, 9), (4, 5, 7), (4, 5, 7), (2, 5, 9)],
    "large and small batches": [(8, 5), (9000, 5), (8, 5)],
    "more than wait": [(2000, 5)] * 9,
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_are_those_of_metrics_that_each_batch_updates(shapes):
    generator = torch.Generator("cpu").manual_seed(0)
    results = Results(Multiclass())
    one_by_one = {condition: Multiclass().metrics(torch.zeros(1, 5), N_GROUPS) for condition in (CLEAN, NOISY)}
    for shape in shapes:
        target = torch.randint(5, (shape[0], *shape[2:]), generator=generator, device="cpu")
        groups = torch.randint(N_GROUPS, shape[:1], generator=generator, device="cpu")
        preds = {condition: torch.randn(shape, generator=generator, device="cpu") for condition in (CLEAN, NOISY)}
        for condition, metrics in one_by_one.items():
            if len(groups):
                metrics.update(preds=preds[condition].clone(), target=target.clone(), clean_preds=preds[CLEAN], groups=groups)
        own = target.clone()
        results.update(
            Reading(each, None, preds[each], preds[each], own, groups, groups, own if each == CLEAN else None) for each in preds
        )
        if target.numel() < 1000:
            own.zero_()  # as a step may do after the monitor has read the batch
            preds[NOISY].zero_()
    for condition, metrics in one_by_one.items():
        totals = results.metrics[condition].totals()
        assert {name: totals[name] for name in metrics.totals()} == pytest.approx(metrics.totals(), rel=0, abs=0, nan_ok=True)


def test_batches_of_several_dtypes_are_not_converted_to_one():
    generator = torch.Generator("cpu").manual_seed(0)
    whole, parts = Results(Multiclass()), Results(Multiclass())
    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        preds = torch.randn(50, 5, generator=generator, device="cpu").to(dtype)
        target, groups = torch.randint(5, (50,), generator=generator, device="cpu"), torch.arange(50) % N_GROUPS
        for results in (whole, parts):
            results.update([Reading(CLEAN, None, preds, preds, target, groups, groups, target)])
        assert parts.metrics[CLEAN].totals()["accuracy"] > 0  # nothing waits any longer
    assert whole.metrics[CLEAN].totals() == pytest.approx(parts.metrics[CLEAN].totals(), rel=0, abs=0)


def test_metrics_are_reset_in_place_in_any_mode():
    results, target = Results(Multiclass()), torch.tensor([0, 1])
    preds, places = torch.eye(2), []
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            results.reset()
            results.update([Reading(CLEAN, None, preds, preds, target, target, target, target)])
            metrics: Any = results.metrics[CLEAN]
        assert metrics.totals()["accuracy"] == 1
        places.append([value.data_ptr() for metric in metrics.values() for value in metric.metric_state.values()])
    # states that were made in inference mode are made once more; new ones each time would leave gaps in the memory
    assert places[2:] == 2 * places[1:2]


def test_the_sums_of_all_ranks_take_one_collective_for_each_dtype():
    reduced = []

    def reduce(tensor, reduce_op):
        assert reduce_op == "sum"
        reduced.append(tensor.dtype)
        return 2 * tensor  # the other rank has the same

    trainer: Any = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(reduce=reduce), distributed_sampler_kwargs={"num_replicas": 2, "rank": 0}
    )
    tensors = [torch.arange(6).view(2, 3), torch.ones(2, dtype=torch.float64), torch.tensor(7), torch.zeros(0, 4)]
    for tensor, found in zip(tensors, sum_over_ranks(trainer, tensors), strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, 2 * tensor)
    assert reduced == [torch.int64, torch.float64, torch.float32]


def test_the_sum_of_predictions_tells_samples_apart_beside_infinite_predictions():
    seen = []
    for value in (1.0, 2.0):
        metrics = CustomMetrics(MetricCollection(MeanSquaredError()))
        preds = torch.tensor([math.inf, math.inf, math.nan, value])
        metrics.update(preds=preds, target=torch.zeros(4), clean_preds=preds)
        seen.append(metrics.seen)
    assert seen == [1.0, 2.0]


@pytest.mark.parametrize(
    "preds", [torch.tensor([True]), torch.tensor([2]), torch.tensor([1j]).conj(), torch.ones(1).bfloat16()]
)
def test_the_metrics_of_a_user_take_predictions_of_any_dtype(preds):
    class Seen(SumMetric):
        def update(self, preds, target):  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    metrics = CustomMetrics(MetricCollection(Seen()))
    metrics.update(preds=preds, target=torch.zeros(1), clean_preds=preds)
    assert metrics.seen.isfinite()


def test_a_leaf_without_rows_adds_nothing_to_the_fingerprint_of_a_batch():
    x = torch.rand(4, 3)
    assert fingerprint((x, torch.zeros(0, 3), torch.zeros(0))) == fingerprint((x,))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_value_that_is_no_number_leaves_a_fingerprint(value):
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([x, torch.full((4, 40), value)], 1)
    one, other = fingerprint(broken), fingerprint(broken.flip(1))
    assert one.isfinite()
    assert one != other


def test_conjugated_numbers_have_a_fingerprint():
    x = torch.rand(4, 3, dtype=torch.complex64)
    assert fingerprint(x.conj()) == fingerprint(x.conj().resolve_conj())
