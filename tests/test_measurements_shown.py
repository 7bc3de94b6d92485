"""What a monitor reports of its measurements, and where that is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Album, Classifier, Rows, fit, layouts, loader, make_trainer
from helpers_measurements import (
    FLOAT32,
    LEVELS,
    OF_BOTH,
    brighter,
    classifier,
    draws_of,
    logged,
    own_task,
    predicted,
    reported,
    validated,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Subset

from lightning_noise import AdaptiveLevel, InputNoise, RobustnessMonitor, WeightNoise, noise, plots, report, tasks
from lightning_noise.callbacks.robustness import log_key
from lightning_noise.evaluation.conditions import CLEAN, OVERALL, Condition
from lightning_noise.evaluation.positions import N_GROUPS, groups_of

# --- the report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A fit and a test beside a logger of a table."""
    folder = tmp_path_factory.mktemp("run")
    monitor = RobustnessMonitor(
        [noise.Gaussian(), WeightNoise(noise.Gaussian(), 0.0)], {"gaussian": [0.5], "weight": [0.5]}, n_draws=2
    )
    data, held_out, logger = Rows(13, features=(1, 8, 8)), Rows(29, features=(1, 8, 8), seed=1), CSVLogger(folder)
    module, trainer = fit(
        [monitor],
        module=lambda: Classifier(features=64),
        train=loader(data),
        validation=loader(held_out),
        logger=logger,
        max_epochs=1,
    )
    in_fit, of_fit = logged(trainer), monitor.report
    trainer.test(module, loader(Subset(held_out, range(20))), verbose=False)
    in_test, of_test = logged(trainer, "test/robustness"), monitor.report
    return SimpleNamespace(
        folder=Path(logger.log_dir),
        monitor=monitor,
        trainer=trainer,
        module=module,
        held_out=held_out,
        robustness=(in_fit, of_fit, 29),
        **{"test/robustness": (in_test, of_test, 20)},
    )


@pytest.mark.parametrize("place", ["robustness", "test/robustness"])
def test_the_report_beside_the_logs_holds_what_is_logged(run, place):
    values, kept, n = getattr(run, place)
    written = report.read(run.folder / place)
    assert repr(written) == repr(kept), "in words, as what is not a number does not equal itself"
    assert (written.n, written.n_draws, written.seed) == (n, 2, 0)
    assert list(written.sizes) == groups_of(range(n), torch.device("cpu")).bincount(minlength=N_GROUPS).tolist()
    assert (written.noises["gaussian"], written.levels["gaussian"]) == ("Gaussian()", (0.5,))
    assert written.shared == ("weight",)
    rows = {log_key("", *cell).removeprefix("/").removeprefix("_levels/"): value for cell, value in written.values.items()}
    assert len(values) == (10 if place == "test/robustness" else 10 + 2 * 3)
    for key, value in values.items():
        assert rows[key] == pytest.approx(value, abs=FLOAT32, rel=FLOAT32, nan_ok=True), key
    assert (CLEAN, "aurc") in written.rows
    text = (run.folder / place / "report.md").read_text()
    assert f"Evaluated on {n} samples with 2 draws" in text
    assert f"{100 * values['accuracy_clean']:.0f}" in text


def test_the_report_is_a_table_of_pandas(run):
    pytest.importorskip("pandas")
    _, kept, _ = run.robustness
    table = kept.to_pandas()
    assert len(table) == len(kept.estimates)
    (row,) = table[(table.noise == "gaussian") & (table.level == 0.5) & (table.metric == "loss")].itertuples()
    estimate = kept.rows[Condition("gaussian", 0.5), "loss"]
    assert (row.value, row.standard_error, row.low, row.high) == (
        estimate.value,
        estimate.standard_error,
        estimate.low,
        estimate.high,
    )


def test_where_no_logger_takes_figures_they_are_files_beside_the_report(run):
    pictures = {re.sub(r"-\d+\.png$", "", str(path.relative_to(run.folder))) for path in run.folder.rglob("*.png")}
    names = ("curve", "reliability", "gaussian/samples")  # a sample does not show noise in weights
    assert pictures == {f"{place}_figures/{name}" for place in ("robustness", "test/robustness") for name in names}


def test_a_figure_without_a_group_is_that_of_data_without_its_samples():
    module, data = classifier(), Rows(60, seed=1)
    groups = groups_of(range(60), torch.device("cpu"))
    whole = reported(RobustnessMonitor(brighter, [0.5]), module, data)
    assert len(groups.unique()) > 10
    for group in groups.unique().tolist()[:3]:
        kept = (groups != group).nonzero().flatten().tolist()
        alone = reported(RobustnessMonitor(brighter, [0.5]), module, Subset(data, kept))
        # sums of what float32 rounds differently in other batches; z and p divide by them
        without = {cell: parts[1 + group] for cell, parts in whole.parts.items()}
        assert without == pytest.approx(alone.values, abs=1e-5, rel=1e-5, nan_ok=True)


def test_the_report_is_the_same_for_any_batch_size():
    module, data = classifier(), Rows(29, seed=1)
    reports = [reported(RobustnessMonitor(noise.Gaussian(), [0.5]), module, data, size) for size in (1, 7, 29)]
    for other in reports[1:]:
        assert other.rows.keys() == reports[0].rows.keys()
        assert other.sizes == reports[0].sizes
        for cell, estimate in other.rows.items():
            # the logits of other batches are rounded differently
            expected = reports[0].rows[cell]
            assert estimate.value == pytest.approx(expected.value, abs=1e-5, rel=1e-5, nan_ok=True)
            assert estimate.standard_error == pytest.approx(expected.standard_error, abs=1e-5, rel=1e-4, nan_ok=True)


def test_the_report_counts_the_batches_that_were_measured():
    found = reported(RobustnessMonitor(noise.Gaussian(), max_batches=2), classifier(), Rows(29, seed=1))
    assert found.n == sum(found.sizes) == 16


def test_each_monitor_writes_a_report_under_its_name(tmp_path):
    logger = CSVLogger(tmp_path)
    monitors = [
        RobustnessMonitor(noise.Gaussian(), [level], task=own_task(), name=name)
        for level, name in ((0.1, "near"), (0.9, "far"))
    ]
    fit(monitors, logger=logger, max_epochs=1)
    assert report.read(Path(logger.log_dir, "near")).levels["gaussian"] == (0.1,)
    assert report.read(Path(logger.log_dir, "far")).levels["gaussian"] == (0.9,)


# --- against a baseline


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("baseline")
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5)
    report.write(folder, reported(monitor, classifier(), Rows(200, seed=1), 64))
    return folder


def test_a_model_does_not_differ_from_its_own_report(baseline, tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5, baseline=baseline)
    found = validated(monitor, classifier(), Rows(200, seed=1), logger=logger)
    assert found["mce"] == 1
    assert monitor.report is not None
    old = report.read(baseline / "report.json")
    ratios = {(ratio.condition, ratio.metric): ratio.value for ratio in report.corruption(monitor.report, old)}
    assert ratios == {(Condition("soft"), "corruption_error"): 1, (OVERALL, "mce"): 1}
    changes = report.differences(monitor.report, old)
    assert [(change.condition, change.metric) for change in changes] == list(monitor.report.rows)
    for change in changes:
        if math.isnan(monitor.report.values[change.condition, change.metric]):
            assert change.metric == "accuracy_retention", "the module has learned nothing, so there is nothing to retain"
        else:
            assert (change.value, change.standard_error) == (0, 0), change
    text = Path(logger.log_dir, "validate", "robustness", "report.md").read_text()
    assert "For one error of the baseline under noise this model makes" in text
    assert "Against the baseline" not in (baseline / "report.md").read_text()


def test_the_difference_to_another_model_is_that_of_the_samples_in_pairs(baseline):
    data, models = Rows(200, seed=1), [classifier(), classifier()]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5, baseline=baseline)
    found = validated(monitor, models[1], data)
    noisy = {level: draws_of(data, level)[0] for level in LEVELS}
    right = np.array([[(predicted(model, noisy[level]).argmax(1) == data.y).tolist() for level in LEVELS] for model in models])
    errors = (1 - right).sum((1, 2))
    assert found["mce"] == pytest.approx(errors[1] / errors[0], rel=FLOAT32)
    assert monitor.report is not None
    old = report.read(baseline)
    changes = {(change.condition, change.metric): change for change in report.differences(monitor.report, old)}
    groups = groups_of(range(200), torch.device("cpu")).numpy()
    for i, level in enumerate(LEVELS):
        change = changes[cell := (Condition("soft", level), "accuracy")]
        gained = right[1, i].astype(float) - right[0, i]
        assert change.value == pytest.approx(gained.mean(), abs=1e-12)
        # of a mean, the pseudo-values of the jackknife are the means of the groups
        parts = [gained[groups == group] for group in np.unique(groups)]
        squares = [(part.mean() - gained.mean()) ** 2 / (200 / len(part) - 1) for part in parts]
        assert change.standard_error == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-9)
        exact = gained.std(ddof=1) / math.sqrt(200)
        # the error of an error with 19 degrees of freedom is one part in the root of 38
        assert abs(change.standard_error / exact - 1) < 5 / math.sqrt(2 * 19)
        unpaired = math.hypot(*(each.rows[cell].standard_error for each in (monitor.report, old)))
        assert exact < unpaired, "what makes a sample hard for both models cancels"
    assert any(change.value != 0 for change in changes.values())


def test_a_baseline_of_other_samples_is_not_paired(baseline):
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5, baseline=baseline)
    found, old = reported(monitor, classifier(), Rows(60, seed=2)), report.read(baseline)
    cell = Condition("soft", LEVELS[0]), "loss"
    (change,) = (each for each in report.differences(found, old) if (each.condition, each.metric) == cell)
    errors = [each.rows[cell].standard_error for each in (found, old)]
    assert change.standard_error == pytest.approx(math.hypot(*errors), rel=1e-9)
    assert "not paired" in report.markdown(found, old)


def test_a_baseline_of_another_task_or_of_other_noises_is_refused(baseline):
    for monitor, message in (
        (RobustnessMonitor(noise.Gaussian(), task=tasks.Regression(), baseline=baseline), "is of the task 'multiclass'"),
        (RobustnessMonitor({"soft": noise.Uniform()}, LEVELS, baseline=baseline), "has no noise at the same levels"),
    ):
        with pytest.raises(ValueError, match=message):
            fit([monitor])


def test_a_baseline_that_cannot_be_read_is_found_before_the_training(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    for path, message in ((tmp_path / "nothing", "no report at"), (tmp_path, "is not a report that can be read: it lacks")):
        module = Classifier()
        with pytest.raises(ValueError, match=message):
            fit([RobustnessMonitor(noise.Gaussian(), baseline=path)], module=module)
        assert not module.seen


# --- loggers


@pytest.mark.parametrize("mode", [{"logger": False}, {"logger": True, "fast_dev_run": True}], ids=str)
def test_without_a_logger_nothing_is_written(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS)
    module, trainer = fit([monitor], max_epochs=1, **mode)
    trainer.validate(module, loader(Rows(13, seed=1)), verbose=False)
    trainer.test(module, loader(Rows(13, seed=1)), verbose=False)
    assert monitor.report is not None
    assert monitor.report.n == (8 if "fast_dev_run" in mode else 13)
    assert not list(tmp_path.rglob("*"))


def test_a_logger_of_images_gets_them_and_no_files(tmp_path):
    album = Album(tmp_path)
    data = Rows(13, features=(1, 8, 8))
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS)
    fit(
        [monitor],
        module=lambda: Classifier(features=64),
        train=loader(data),
        validation=loader(data),
        logger=album,
        max_epochs=1,
    )
    keys = [key for key, _, _ in album.pages]
    assert sorted(keys) == [f"robustness_figures/{name}" for name in ("curve", "gaussian/samples", "reliability")], (
        "nothing is logged twice at the last step"
    )
    for _, images, _ in album.pages:
        (image,) = images
        assert image.ndim == 3
        assert image.std() > 0
    assert not list(tmp_path.rglob("*.png"))
    assert report.read(Path(album.log_dir, "robustness")).n == 13


IMAGES = Rows(29, features=(1, 8, 8), seed=1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[tuple[Any, Any]]]:
    """Returns the arguments of each figure of samples in a validation."""

    def draw(monitor: RobustnessMonitor, batch_size: int = 8) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        monkeypatch.setattr(plots, "samples", lambda columns, **texts: found.append((columns, texts)))
        trainer = make_trainer([monitor], logger=CSVLogger(tmp_path))
        torch.manual_seed(0)
        trainer.validate(Classifier(features=64), loader(IMAGES, batch_size), verbose=False)
        return found

    return draw


def test_the_samples_that_are_drawn_are_the_same_for_any_batch_size(drawn):
    figures = [drawn(RobustnessMonitor(noise.Gaussian(), [0.5]), batch_size)[0][0] for batch_size in (3, 8, 29)]
    for columns in figures:
        assert torch.equal(torch.stack(columns["clean"]), IMAGES.x[[0, 7, 14, 21]]), "spread evenly"
        assert torch.equal(torch.stack(columns["gaussian 0.5"]), torch.stack(figures[0]["gaussian 0.5"]))


def test_noise_in_weights_has_no_figure_of_samples(drawn):
    of_weights = WeightNoise(noise.Gaussian(), 0.5)
    ((columns, _),) = drawn(RobustnessMonitor([noise.Gaussian(), of_weights], {"gaussian": [0.5], "weight": [0.5]}))
    assert [*columns] == ["clean", "gaussian 0.5"]
    assert drawn(RobustnessMonitor(of_weights, [0.5])) == []


def test_samples_have_the_names_of_their_classes(drawn):
    (_, numbers), (_, texts) = (
        drawn(RobustnessMonitor(noise.Gaussian(), [0.5], class_names=names))[0] for names in (None, ["cat", "dog", "elk"])
    )
    names = {"0": "cat", "1": "dog", "2": "elk"}
    assert numbers["labels"] == [str(y) for y in IMAGES.y[[0, 7, 14, 21]].tolist()]
    assert texts["labels"] == [names[label] for label in numbers["labels"]]
    assert texts["captions"] == {title: [names[each] for each in shown] for title, shown in numbers["captions"].items()}


def test_samples_of_normalized_data_are_drawn_in_raw_units(drawn):
    ((raw, _),) = drawn(RobustnessMonitor(noise.Gaussian(), [0.5], mean=3.0, std=2.0))
    ((normalized, _),) = drawn(RobustnessMonitor(noise.Gaussian(), [0.25]))  # 0.5 in raw units
    for shown, of_normalized in zip(raw.values(), normalized.values(), strict=True):
        assert torch.allclose(torch.stack(shown), 3.0 + 2.0 * torch.stack(of_normalized), atol=1e-5)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What TensorBoard reads of a fit."""
    logger = TensorBoardLogger(tmp_path_factory.mktemp("events"))
    monitor = RobustnessMonitor([noise.Gaussian(), WeightNoise(noise.Gaussian(), 0.0)], OF_BOTH, n_draws=2)
    fit([InputNoise(noise.Gaussian(), 0.1), monitor], logger=logger, max_epochs=1, log_every_n_steps=1)
    logger.finalize("success")
    return EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0, "scalars": 0}).Reload()


def test_tensorboard_has_the_configuration(events):
    (text,) = events.Tensors("lightning_noise/configuration/text_summary")
    assert "| `n_draws=2` |" in text.tensor_proto.string_val[0].decode()


def test_by_default_an_event_file_is_calm(tmp_path):
    """At most eleven cards in the group that tells the result, and at most 60 scalars, for three noises at four levels."""
    logger, data = TensorBoardLogger(tmp_path), Rows(13, features=(1, 8, 8))
    noises = [noise.Gaussian(), noise.Uniform(), noise.Drift()]
    fit(
        [InputNoise(noise.Gaussian(), AdaptiveLevel()), RobustnessMonitor(noises, [0.1, 0.2, 0.3, 0.4])],
        module=lambda: Classifier(features=64),
        train=loader(data),
        validation=loader(data),
        logger=logger,
        log_every_n_steps=1,
    )
    logger.finalize("success")
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    by_group: dict[str, set[str]] = {}
    for tag in (*tags["scalars"], *tags["images"]):
        by_group.setdefault(tag.split("/")[0], set()).add(tag)
    groups = ["epoch", "robustness", "robustness_figures", "robustness_levels", "train_loss", "train_noise", "val_loss"]
    assert sorted(by_group) == groups, "TensorBoard opens the first two"
    assert by_group["robustness"] == {
        "robustness/score",
        *(f"robustness/accuracy_{what}" for what in ("clean", "noisy", "worst", "drop", "retention")),
        *(f"robustness/{metric}_{what}" for metric in ("loss", "ece") for what in ("clean", "noisy")),
    }
    assert len(by_group["robustness"]) == 10
    assert len(by_group["robustness_levels"]) == 12 * 3
    assert by_group["train_noise"] == {f"train_noise/input/{what}" for what in ("level", "retention", "moves")}
    assert len(tags["scalars"]) == 51 <= 60
    assert len(tags["images"]) == 6
    assert tags["histograms"] == []
    assert {tag.removesuffix("/text_summary") for tag in tags["tensors"]} == {
        "lightning_noise/configuration",
        "train_noise/input/moves",
        "custom_scalars__config__",
    }


@pytest.mark.parametrize("task", [tasks.Multiclass(), own_task()], ids=["multiclass", "own"])
def test_a_summary_has_at_most_eleven_cards(task, baseline):
    monitor = RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, task=task, seed=5)
    if task == tasks.Multiclass():
        monitor.baseline = baseline
    found = validated(monitor, classifier(), Rows(200, seed=1))
    assert len({key for key in found if "/" not in key}) == (11 if task == tasks.Multiclass() else 9)


def test_other_metrics_are_logged_at_each_level_on_request():
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS, logged=["brier", "aurc"])
    found = validated(monitor, classifier(), Rows(29, seed=1))
    assert {key for key in found if "/" in key} == {f"gaussian/{level:g}/{m}" for level in LEVELS for m in ("brier", "aurc")}
    assert monitor.report is not None
    for level in LEVELS:
        value = monitor.report.values[Condition("gaussian", level), "brier"]
        assert found[f"gaussian/{level:g}/brier"] == pytest.approx(value, abs=FLOAT32)
    with pytest.raises(
        ValueError, match=r"no metrics \['acuracy'\]; type logged=\['accuracy'\]; Multiclass\(\) has .*'accuracy'"
    ):
        RobustnessMonitor(noise.Gaussian(), logged=["acuracy"])


def test_tensorboard_has_an_overview_and_a_band_for_each_noise(events):
    (layout,) = layouts(events.path)
    charts, tags = layout["lightning_noise"], events.Tags()["scalars"]
    strongest = {noise: f"robustness_levels/{noise}/1/accuracy" for noise in ("gaussian", "weight")}
    assert {title: {tag for each in shown for tag in tags if re.match(each, tag)} for title, shown in charts.items()} == {
        "robustness: accuracy": {f"robustness/accuracy_{what}" for what in ("clean", "noisy", "worst")},
        "level in training": {"train_noise/input/level"},
        **{f"robustness: accuracy, clean to {name} 1": {tag, "robustness/accuracy_clean"} for name, tag in strongest.items()},
    }


def test_tensorboard_has_reliability_diagrams_of_the_end(events):
    images = set(events.Tags()["images"])
    assert images == {"robustness_figures/curve", "robustness_figures/reliability"}
    assert len(events.Images("robustness_figures/reliability")) == 1
