"""What a monitor measures for each task, and how sure it is of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NoReturn

import pytest
import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, N_FEATURES, Classifier, Rows, assert_same, fit, loader, make_trainer, weights
from helpers_measurements import (
    FLOAT32,
    LEVELS,
    OF_BOTH,
    brighter,
    classifier,
    draws_of,
    logged,
    own,
    own_task,
    predicted,
    reported,
    validated,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_squared_error, r2_score, roc_auc_score
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_noise import Key, RandomizedSmoothing, RobustnessMonitor, WeightNoise, noise, report, tasks
from lightning_noise.evaluation.certified import Certified
from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.loop.perturbation import Context
from lightning_noise.metrics.statistics import jackknife_error


class Model(Classifier):
    """The classifier with another net, which is trained for nothing."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net: Any = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


# --- tasks


TASKS = {
    "multiclass": tasks.Multiclass(),
    "pixels": tasks.Multiclass(),
    "binary": tasks.Binary(),
    "multilabel": tasks.Multilabel(),
    "regression": tasks.Regression(),
}


def case(task: str) -> tuple[Model, Rows]:
    torch.manual_seed(0)
    data = Rows(29, features=(1, 3, 4) if task == "pixels" else (N_FEATURES,), seed=1)
    nets = {
        "multiclass": lambda: (nn.Linear(N_FEATURES, N_CLASSES), data.y),
        "pixels": lambda: (nn.Conv2d(1, N_CLASSES, 1), (data.x[:, 0] > 0).long() + (data.x[:, 0] > 1).long()),
        "binary": lambda: (nn.Linear(N_FEATURES, 1), (data.y > 0).float()),
        "multilabel": lambda: (nn.Linear(N_FEATURES, 3), data.x[:, :3] > 0),
        "regression": lambda: (nn.Linear(N_FEATURES, 2), data.x[:, :2].square()),
    }
    net, data.y = nets[task]()
    return Model(net), data


def probabilities(task: str, logits: Tensor) -> Tensor:
    """Of shape (n, K), with a row for each label that is predicted."""
    if task in ("binary", "multilabel"):
        p = logits.double().sigmoid().flatten()
        return torch.stack([1 - p, p], 1)
    return logits.double().softmax(1).movedim(1, -1).flatten(0, -2)


def truth(task: str, noisy: Tensor, clean: Tensor, target: Tensor) -> dict[str, float]:
    """The metrics by other libraries."""
    if task == "regression":
        return {
            "mse": float(mean_squared_error(target, noisy)),
            "mae": float(mean_absolute_error(target, noisy)),
            "r2": float(r2_score(target.flatten(), noisy.flatten())),
        }
    p, label = probabilities(task, noisy), target.long().flatten()
    confidence, chosen = p.max(1)
    n_classes = p.shape[1]
    odds = confidence.logit()
    surest = ((odds / (64 + odds.abs()) + odds.asinh() / 400 + 0.2) / 1.45 * 4096).floor()  # as the monitor bins them
    return {
        "accuracy": float(accuracy_score(label, chosen)),
        "loss": float(log_loss(label, p, labels=range(n_classes))),
        # the sum over the classes, of two as well
        "brier": (p - nn.functional.one_hot(label, n_classes)).square().sum(1).mean().item(),
        "ece": multiclass_calibration_error(p.float(), label, n_classes, n_bins=15, norm="l1").item(),
        "signed_gap": (confidence.mean() - (chosen == label).double().mean()).item(),
        "flip_rate": (chosen != probabilities(task, clean).argmax(1)).double().mean().item(),
        "entropy": -(p * p.log()).sum(1).mean().item(),
        "failure_auroc": float(roc_auc_score(chosen != label, -surest)),
    }


@pytest.mark.parametrize("task", ["multiclass", "pixels", "binary", "multilabel", "regression"])
def test_a_task_is_measured_as_other_libraries_do(task):
    module, data = case(task)
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5, task=TASKS[task])
    found = validated(monitor, module, data)
    assert monitor.report is not None
    values = monitor.report.values
    clean = predicted(module, data.x)
    outputs = {CLEAN: clean, **{Condition("soft", level): predicted(module, draws_of(data, level)[0]) for level in LEVELS}}
    for condition, noisy in outputs.items():
        for metric, value in truth(task, noisy, clean, data.y).items():
            # a confidence at the limit of a bin may fall into the next and be tied there: half of over a hundred pairs
            tolerance = 5e-3 if metric == "failure_auroc" else FLOAT32
            assert values[condition, metric] == pytest.approx(value, abs=tolerance, rel=FLOAT32), (condition, metric)
    loss, main = ("mse", "mse") if task == "regression" else ("loss", "accuracy")
    for metric in (loss, main):
        drop = found[f"{metric}_clean"] - fmean(found[f"soft/{level:g}/{metric}"] for level in LEVELS)
        assert values[OVERALL, f"{metric}_drop"] == pytest.approx(drop, abs=FLOAT32)
        assert values[Condition("soft"), f"{metric}_drop"] == pytest.approx(drop, abs=FLOAT32)
    scored = "r2" if task == "regression" else main
    assert found[f"{scored}_drop"] == pytest.approx(found[f"{scored}_clean"] - found[f"{scored}_noisy"], abs=FLOAT32)
    assert found[f"soft/1/{loss}"] != found[f"{loss}_clean"]
    assert (monitor.report.task, monitor.report.n) == ("multiclass" if task == "pixels" else task, 29)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel", "regression"])
def test_the_score_is_half_that_of_clean_and_half_that_of_noisy_data(task):
    module, data = case(task)
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS, task=TASKS[task])
    score = validated(monitor, module, data)["score"]
    assert monitor.report is not None
    values, metric = monitor.report.values, "r2" if task == "regression" else "accuracy"
    assert score == pytest.approx((values[CLEAN, metric] + values[NOISY, metric]) / 2, abs=FLOAT32)


def test_a_regression_logs_its_errors_and_what_its_score_is_made_of(tmp_path):
    module, data = case("regression")
    logger = CSVLogger(tmp_path)
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS, task=tasks.Regression(), n_draws=2)
    found = validated(monitor, module, data, logger=logger)
    summary = {
        "score",
        "r2_retention",
        "mse_clean",
        "mse_noisy",
        "mse_worst",
        "r2_clean",
        "r2_noisy",
        "r2_drop",
        "mae_clean",
        "mae_noisy",
    }
    assert found.keys() == summary | {f"gaussian/{level:g}/{metric}" for level in LEVELS for metric in ("mse", "mae")}
    written = report.read(Path(logger.log_dir, "validate", "robustness"))
    places = {CLEAN, NOISY, Condition("gaussian"), *(Condition("gaussian", level) for level in LEVELS)}
    metrics, drops = {"mse", "mae", "r2"}, {"mse_drop", "mae_drop", "r2_drop"}
    expected = {(place, metric) for place in places | {WORST} for metric in metrics}
    expected |= {(place, cost) for place in (Condition("gaussian"), OVERALL) for cost in drops | {"r2_retention"}}
    assert written.rows.keys() == expected | {(Condition("gaussian"), "mse_area"), (OVERALL, "score")}
    assert written.values[CLEAN, "r2"] < 0
    assert math.isnan(written.values[OVERALL, "r2_retention"]), "a model that is worse than chance has no skill to retain"
    clean = written.rows[CLEAN, "mse"]
    errors = (predicted(module, data.x) - data.y).square().mean(1).double()
    assert clean.low < errors.mean() < clean.high
    pictures = {path.name for path in tmp_path.rglob("*.png")}
    assert pictures == {"curve-0.png"}, "there is no confidence, and a row of numbers is no picture"


# --- metrics of one's own


@pytest.mark.parametrize("batch_size", [1, 8, 29])
def test_metrics_of_ones_own_are_given_predictions_target_and_clean_predictions(batch_size):
    module, data = classifier(), Rows(29, seed=1)
    metrics = own()
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, task=tasks.Custom(metrics), n_draws=2, seed=5)
    found = validated(monitor, module, data, batch_size)
    assert monitor.report is not None
    clean = predicted(module, data.x)
    expected = {f"{key}_clean": value.item() for key, value in own()(preds=clean, target=data.y, clean_preds=clean).items()}
    for level in LEVELS:
        values = [own()(preds=predicted(module, x), target=data.y, clean_preds=clean) for x in draws_of(data, level, n_draws=2)]
        for key in values[0]:
            of_draws = [value[key].item() for value in values]
            expected[f"soft/{level:g}/{key}"] = fmean(of_draws)
            spread = monitor.report.rows[Condition("soft", level), key].spread
            assert spread == pytest.approx(stdev(of_draws) / math.sqrt(2), abs=FLOAT32)
    for key in ("hits", "f1", "flips"):
        expected[f"{key}_noisy"] = fmean(expected[f"soft/{level:g}/{key}"] for level in LEVELS)
    main = next(iter(own()))
    expected[f"{main}_drop"] = expected[f"{main}_clean"] - expected[f"{main}_noisy"]
    expected[f"{main}_worst"] = min(expected[f"soft/{level:g}/{main}"] for level in LEVELS)
    expected["score"] = (expected[f"{main}_clean"] + expected[f"{main}_noisy"]) / 2
    assert found == pytest.approx(expected, abs=FLOAT32)
    assert found["soft/1/flips"] > found["flips_clean"] == 0
    assert not any(metric.update_called for metric in metrics.values()), "the user's own metrics stay as they are"


def test_of_metrics_of_ones_own_no_interval_is_known(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS, task=own_task(), n_draws=2)
    written = reported(monitor, classifier(), Rows(29, seed=1), logger=logger)
    assert (written.n, written.sizes, written.task) == (29, (), "custom")
    for estimate in written.estimates:
        assert estimate.without == ()
        assert all(math.isnan(part) for part in (estimate.standard_error, estimate.low, estimate.high))
    assert "| gaussian | 0.3  " in Path(logger.log_dir, "validate", "robustness", "report.md").read_text()


def test_metrics_of_ones_own_take_any_predictions_with_a_row_for_each_target():
    module, data = case("regression")
    found = validated(RobustnessMonitor(brighter, [0.5], task=tasks.Custom(MeanAbsoluteError())), module, data)
    expected = (predicted(module, data.x + 0.5) - data.y).abs().mean().item()
    assert found["brighter/0.5/MeanAbsoluteError"] == pytest.approx(expected, rel=FLOAT32)
    monitor = RobustnessMonitor(brighter, [0.5], task=own_task(), predict=lambda module, batch: module(batch[0])[:3])
    with pytest.raises(ValueError, match=r"returned float32 \(3, 3\) for a target of int64 \(8,\)"):
        validated(monitor, classifier(), Rows(29, seed=1))


def test_a_metric_that_is_more_than_a_number_is_refused():
    metrics = MetricCollection({"each": MulticlassAccuracy(N_CLASSES, average=None)})
    with pytest.raises(ValueError, match="must be one number to be logged, but 'each' is tensor"):
        validated(RobustnessMonitor(noise.Gaussian(), task=tasks.Custom(metrics)), classifier(), Rows(29, seed=1))


def test_a_metric_of_which_less_is_better_has_a_score_that_is_larger_for_a_better_model():
    module, data = case("regression")
    found = validated(RobustnessMonitor(brighter, [0.5], task=tasks.Custom(MeanAbsoluteError())), module, data)
    mean = (found["MeanAbsoluteError_clean"] + found["MeanAbsoluteError_noisy"]) / 2
    assert found["score"] == pytest.approx(-mean, rel=FLOAT32)
    assert found["MeanAbsoluteError_worst"] == found["brighter/0.5/MeanAbsoluteError"]


# --- draws


def test_values_are_means_over_the_draws_beside_their_standard_error():
    module, data = classifier(), Rows(29, seed=1)
    monitors = [RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5, n_draws=n_draws) for n_draws in (1, 3)]
    one, three = (validated(monitor, module, data) for monitor in monitors)
    reports = [monitor.report for monitor in monitors]
    assert reports[0] is not None
    assert reports[1] is not None
    clean = predicted(module, data.x)
    for level in LEVELS:
        values = [truth("multiclass", predicted(module, x), clean, data.y) for x in draws_of(data, level, n_draws=3)]
        for metric in ("accuracy", "loss", "brier", "flip_rate"):
            cell, of_draws = (Condition("soft", level), metric), [value[metric] for value in values]
            assert reports[0].values[cell] == pytest.approx(of_draws[0], abs=FLOAT32)
            assert reports[1].values[cell] == pytest.approx(fmean(of_draws), abs=FLOAT32)
            assert reports[1].rows[cell].spread == pytest.approx(stdev(of_draws) / math.sqrt(3), abs=FLOAT32)
        assert reports[1].rows[Condition("soft", level), "loss"].spread > 0
    assert three["loss_noisy"] == pytest.approx(fmean(three[f"soft/{level:g}/loss"] for level in LEVELS), abs=FLOAT32)
    for cell, estimate in reports[1].rows.items():
        error = jackknife_error(estimate.value, estimate.without, reports[1].sizes)
        # the scatter of the samples holds that of draws of their own
        assert estimate.standard_error == pytest.approx(error, nan_ok=True), cell
    assert three.keys() == one.keys()


def test_noise_in_weights_is_drawn_once_for_all_samples_and_its_draws_widen_the_intervals():
    module, data = classifier(), Rows(60, seed=1)
    probe = WeightNoise(noise.Gaussian(), 0.0, relative="filter")
    monitor = RobustnessMonitor([probe, noise.Gaussian()], {"weight": LEVELS, "gaussian": LEVELS}, n_draws=3)
    trainer = make_trainer([monitor])
    trainer.validate(module, loader(data), verbose=False)
    found = logged(trainer)
    assert monitor.report is not None
    losses = {}
    for level in LEVELS:
        of_draws = []
        for draw in range(3):
            key = Key((0, "probe", "weight", *([draw] if draw else [])))
            with probe.perturbation(Context(trainer, module, is_probe=True), data.x, level, key) as x:
                of_draws.append(nn.functional.cross_entropy(predicted(module, x), data.y).item())
        losses[level] = fmean(of_draws)
        assert found[f"weight/{level:g}/loss"] == pytest.approx(losses[level], abs=FLOAT32)
        estimate = monitor.report.rows[Condition("weight", level), "loss"]
        assert estimate.spread == pytest.approx(stdev(of_draws) / math.sqrt(3), abs=FLOAT32)
    rows = monitor.report.rows
    rise = fmean(losses.values()) - found["loss_clean"]
    assert rows[Condition("weight"), "sensitivity"].value == pytest.approx(rise, abs=FLOAT32)
    assert (Condition("gaussian"), "sensitivity") not in rows
    for (condition, metric), estimate in rows.items():
        error = jackknife_error(estimate.value, estimate.without, monitor.report.sizes)
        shared = condition not in (CLEAN, Condition("gaussian"), *(Condition("gaussian", level) for level in LEVELS))
        expected = math.hypot(error, estimate.spread if shared else 0.0)
        assert estimate.standard_error == pytest.approx(expected, nan_ok=True), (condition, metric)
    assert rows[NOISY, "loss"].spread > 0


# --- whatever happens


def strict(path: Path) -> Any:
    """The JSON in a file, of which NaN and infinity are no part."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("task", "value", "logger"),
    [("multiclass", math.nan, TensorBoardLogger), ("multilabel", math.inf, CSVLogger), ("regression", math.inf, CSVLogger)],
)
def test_weights_that_are_no_numbers_end_no_run_and_are_null_in_the_report(task, value, logger, tmp_path):
    module, data = case(task)
    broken = logger(tmp_path)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    probe = WeightNoise(noise.Gaussian(), 0.0)
    monitor = RobustnessMonitor(probe, [1.0], task=TASKS[task], n_draws=2)
    _, trainer = fit([monitor], module=module, train=loader(data), validation=loader(data), logger=broken, max_epochs=1)
    assert math.isnan(logged(trainer)["weight/1/mse" if task == "regression" else "weight/1/loss"])
    rows = strict(Path(broken.log_dir, "robustness", "report.json"))["estimates"]
    assert {row["value"] for row in rows if row["metric"] in ("loss", "mse")} == {None}
    baseline = Path(broken.log_dir, "robustness")
    again = RobustnessMonitor(probe, [1.0], task=TASKS[task], n_draws=2, baseline=baseline)
    found = reported(again, module, data)
    report.write(tmp_path, found, report.read(baseline))
    assert "Against the baseline" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("task", [tasks.Multiclass(), own_task()], ids=["multiclass", "own"])
def test_a_single_sample_is_measured(task: tasks.Task, tmp_path):
    module, data = classifier(), Rows(1, seed=1)
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, task=task, n_draws=2, seed=5)
    found = validated(monitor, module, data)
    hit = (predicted(module, data.x).argmax(1) == data.y).double().mean().item()
    assert found["accuracy_clean" if task == tasks.Multiclass() else "hits_clean"] == hit
    assert monitor.report is not None
    report.write(tmp_path, monitor.report)
    assert report.read(tmp_path).n == 1


@pytest.mark.parametrize("task", [tasks.Multiclass(), own_task()], ids=["multiclass", "own"])
def test_a_last_batch_that_is_all_padding_does_not_count(task: tasks.Task):
    module, data = classifier(), Rows(7, seed=1)
    # the second of three processes, which sees samples 1 and 4, and then the first again
    sampler = DistributedSampler(data, num_replicas=3, rank=1, shuffle=False)
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, task=task, seed=5)
    trainer = make_trainer([monitor], use_distributed_sampler=False)
    trainer.validate(module, loader(data, batch_size=1, sampler=sampler), verbose=False)
    found, rows = logged(trainer), [1, 4]
    assert len(sampler) == 3
    clean, noisy = predicted(module, data.x[rows]), predicted(module, draws_of(data, 1.0)[0][rows])
    if task == tasks.Multiclass():
        loss = nn.functional.cross_entropy(noisy, data.y[rows]).item()
        assert found["soft/1/loss"] == pytest.approx(loss, abs=FLOAT32)
    else:
        expected = own()(preds=noisy, target=data.y[rows], clean_preds=clean)
        assert {key: found[f"soft/1/{key}"] for key in expected} == {key: value.item() for key, value in expected.items()}
    assert monitor.report is not None
    assert monitor.report.n == 2


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_predictions_in_half_precision_are_measured_in_float32(task):
    module, data = case(task)
    full, half = (
        validated(RobustnessMonitor(noise.Gaussian(), [0.5], task=TASKS[task], n_draws=2), module, data, precision=precision)
        for precision in ("32-true", "bf16-mixed")
    )
    for key, value in full.items():
        if key.endswith(("/loss", "/mse")):
            # weights, inputs and outputs have 8 bits
            assert half[key] == pytest.approx(value, rel=5 * 2**-8)
    assert half != full


def test_where_only_callbacks_are_probes_and_predict_is_given_no_input_is_looked_for():
    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, y = (torch.stack(column) for column in zip(*samples, strict=True))
        return {"left": x[:, :4], "right": x[:, 4:], "y": y}

    class Halves(Model):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    def joined(module: Any, batch: dict[str, Tensor]) -> Tensor:
        return module(torch.cat([batch["left"], batch["right"]], 1))

    module, data = Halves(classifier().net), Rows(29, seed=1)
    batches = loader(data, collate_fn=collate)
    monitor = RobustnessMonitor(WeightNoise(noise.Gaussian(), 0.0), LEVELS, target="y", predict=joined)
    trainer = make_trainer([monitor])
    trainer.validate(module, batches, verbose=False)
    plain = validated(RobustnessMonitor(WeightNoise(noise.Gaussian(), 0.0), LEVELS), module, data)
    assert logged(trainer) == pytest.approx(plain, rel=0, abs=0, nan_ok=True)
    with pytest.raises(ValueError, match="inputs"):
        make_trainer([RobustnessMonitor(noise.Gaussian(), LEVELS, target="y", predict=joined)]).test(module, batches)


@pytest.mark.parametrize("task", [tasks.Multiclass, own_task], ids=["multiclass", "own"])
def test_a_monitor_reports_each_run_afresh(task: Callable[[], tasks.Task]):
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=task(), n_draws=2)
    reports = []
    validated(monitor, classifier(1), Rows(29, seed=1))
    for _ in range(2):
        _, trainer = fit([monitor], max_epochs=1)
        reports.append((repr(monitor.report), repr(logged(trainer))))
    fresh = RobustnessMonitor(noise.Gaussian(), [0.5], task=task(), n_draws=2)
    _, trainer = fit([fresh], max_epochs=1)
    assert reports == 2 * [(repr(fresh.report), repr(logged(trainer)))]


def test_the_report_of_a_fit_is_that_of_the_last_validation_that_was_measured():
    module = Classifier()
    monitor = RobustnessMonitor(brighter, LEVELS, every_n_epochs=2)

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                losses.append(nn.functional.cross_entropy(predicted(pl_module, held_out.x), held_out.y).item())

    losses: list[float] = []
    held_out = Rows(13, seed=1)
    fit([monitor, Watch()], module=module, max_epochs=5)
    assert monitor.report is not None
    assert monitor.report.n == 13
    assert monitor.report.values[CLEAN, "loss"] == pytest.approx(losses[3], abs=FLOAT32)
    assert losses[3] != pytest.approx(losses[4], abs=10 * FLOAT32)


def test_an_exception_in_a_fit_leaves_trainer_and_weights_as_they_are():
    def first(module: Any) -> Tensor:
        return module.net[1].weight.detach().clone()

    class Failing(Classifier):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails and self.seen and not torch.is_grad_enabled() and not torch.equal(first(self), self.kept):
                raise RuntimeError("stop")  # within the perturbation of the weights
            return super().forward(x)

        def on_validation_start(self) -> None:
            self.kept = first(self)

    module, data = Failing(), Rows(13, seed=1)
    monitor = RobustnessMonitor([noise.Gaussian(), WeightNoise(noise.Gaussian(), 0.0)], OF_BOTH)
    trainer = make_trainer([monitor])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, loader(), loader(data))
    assert torch.equal(first(module), module.kept)
    module.fails = False
    before = weights(module)
    trainer.validate(module, loader(data), verbose=False)
    found = logged(trainer)
    fresh = RobustnessMonitor([noise.Gaussian(), WeightNoise(noise.Gaussian(), 0.0)], OF_BOTH)
    assert repr(found) == repr(validated(fresh, module, data))
    assert repr(monitor.report) == repr(fresh.report)
    assert_same(weights(module), before)


class Shard(Rows):
    """The half of the samples that belongs to this process."""

    def __len__(self) -> int:
        return len(self.y) // 2

    def __getitem__(self, i: int) -> Any:
        return super().__getitem__(2 * i + torch.distributed.get_rank())


class Stream(IterableDataset):
    """All samples, or the part of this process."""

    def __init__(self, rows: Rows, is_shared: bool):
        self.rows, self.is_shared = rows, is_shared

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank()
        yield from (self.rows[i] for i in (range(rank, len(self.rows), 2) if self.is_shared else range(len(self.rows))))


class OfProcess(nn.Module):
    """Differs between the processes, as a batch normalization does after a fit."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.distributed.get_rank())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.parametrize("name", ["multiclass", "regression", "certified"])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("index", [0, 1], ids=["alone", "after a loader with a sampler"])
def test_a_stream_that_every_process_reads_as_a_whole_is_a_warning(is_shared: bool, name: str, index: int):
    data = Rows(40, seed=1)
    data.y = torch.randn(40, N_CLASSES) if name == "regression" else data.y
    monitors = {
        "multiclass": lambda: RobustnessMonitor(noise.Gaussian(), LEVELS, dataloader_idx=index),
        "regression": lambda: RobustnessMonitor(noise.Gaussian(), LEVELS, task=tasks.Regression(), dataloader_idx=index),
        "certified": lambda: RandomizedSmoothing(0.5, n0=5, n=20, dataloader_idx=index),
    }
    trainer = make_trainer([monitors[name]()], accelerator="cpu", devices=2, strategy="ddp_fork")
    module = Model(nn.Sequential(nn.Linear(N_FEATURES, N_CLASSES), OfProcess()))
    # a warning is an error in the tests, and a process that was forked inherits that
    refused = pytest.raises(ProcessRaisedException, match=r"same samples on all 2 .*islice\(samples, rank, None, 2\)")
    with nullcontext() if is_shared else refused:
        trainer.validate(module, [*[loader()] * index, DataLoader(Stream(data, is_shared), 5)], verbose=False)


class Total(Metric):
    """A sum, in which a sample that is added twice counts twice."""

    total: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total += (preds - target).abs().sum()

    def compute(self) -> Tensor:
        return self.total


@pytest.mark.slow
@pytest.mark.parametrize("data", [Rows, Shard])
@pytest.mark.parametrize(
    "task",
    [tasks.Multiclass(), tasks.Regression(), tasks.Custom(Total())],
    ids=["multiclass", "regression", "custom"],
)
def test_samples_that_every_process_evaluates_count_once(task: tasks.Task, data: type[Rows]):
    def evaluated(data: Rows, **settings: Any) -> tuple[report.Report | None, Certified | None]:
        data.y = data.y if task.has_classes else torch.randn(len(data.y), N_CLASSES, generator=torch.Generator().manual_seed(0))
        measured = RobustnessMonitor(noise.Gaussian(), LEVELS, task=task)
        certified = RandomizedSmoothing(0.5, n0=5, n=20)
        callbacks = [measured, certified] if task.has_classes else [measured]
        trainer = make_trainer(callbacks, accelerator="cpu", use_distributed_sampler=False, **settings)
        trainer.validate(Model(nn.Linear(N_FEATURES, N_CLASSES)), loader(data), verbose=False)
        return measured.report, certified.result

    pl.seed_everything(0, verbose=False)
    alone, certified_alone = evaluated(Rows(40, seed=1))
    pl.seed_everything(0, verbose=False)
    found, certified_found = evaluated(data(40, seed=1), devices=2, strategy="ddp_fork")
    assert alone is not None
    assert found is not None
    assert (found.n, found.n_targets) == (alone.n, alone.n_targets)
    if data is Rows:
        assert repr(found) == repr(alone)
        assert certified_found == certified_alone
    else:
        clean = {metric: row.value for (condition, metric), row in alone.rows.items() if condition == CLEAN}
        assert {metric: found.rows[CLEAN, metric].value for metric in clean} == pytest.approx(
            clean, abs=1e-6, rel=1e-6
        )  # float32
