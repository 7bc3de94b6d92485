"""What loggers learn at the start of a fit: hyperparameters, and a table of the arguments."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Classifier, fit
from members import CALLBACKS
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_noise import AdaptiveLevel, InputNoise, LabelSmoothing, Mixup, RobustnessMonitor, WeightNoise, noise, schedules
from lightning_noise.loop.description import describe_arguments, shorten


class Saves(Classifier):
    def __init__(self, lr: float = 0.1, options: Any = None):
        super().__init__(lr)
        self.save_hyperparameters()


class LogsItself(Classifier):
    def on_train_start(self) -> None:
        assert self.logger is not None
        self.logger.log_hyperparams({"own": 3}, {"val_loss": 0.0})  # type: ignore[call-arg]


class SavesAndLogs(Saves):
    def on_train_start(self) -> None:
        assert self.logger is not None
        self.logger.log_hyperparams(self.hparams, {"val_loss": 0.0})  # type: ignore[call-arg]


def monitor() -> RobustnessMonitor:
    return RobustnessMonitor(noise.Gaussian(), [0.1])


def shown(folder: str) -> tuple[dict[str, Any], list[str] | None]:
    """Returns what TensorBoard shows: the first hyperparameters of a run, and the names of the metrics beside them."""
    events = EventAccumulator(folder).Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    if metadata.EXPERIMENT_TAG not in content:
        return values, None
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert {info.name for info in experiment.hparam_infos} == values.keys()
    return values, [info.name.tag for info in experiment.metric_infos]


OURS = {"train_noise/names": "input", "train_noise/input/noise": "Gaussian()", "train_noise/input/level": 0.5}
OWN = {"lr": 0.1, "options/depth": 3}


@pytest.mark.parametrize(
    ("module", "default", "values", "metrics"),
    [
        (Classifier, True, OURS, ["robustness/score"]),
        (lambda: Saves(options={"depth": 3}), True, OURS | OWN, ["robustness/score", "hp_metric"]),
        (lambda: Saves(options={"depth": 3}), False, OURS | OWN, None),
        # what the user logs is shown as without our callbacks
        (LogsItself, True, {"own": 3}, ["val_loss"]),
        (LogsItself, False, {"own": 3}, ["val_loss"]),
    ],
    ids=["alone", "saved", "saved, own metrics", "own", "own, own metrics"],
)
def test_tensorboard_shows_the_hyperparameters_of_noise_and_module_with_the_score(module, default, values, metrics, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    fit([InputNoise(noise.Gaussian(), 0.5), monitor()], module=module, logger=logger, max_epochs=1)
    assert shown(logger.log_dir) == (values, metrics)


def test_the_metrics_that_a_user_logs_with_saved_hyperparameters_stay(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    fit([InputNoise(noise.Gaussian(), 0.5), monitor()], module=SavesAndLogs, logger=logger, max_epochs=1)
    events = EventAccumulator(logger.log_dir).Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.EXPERIMENT_TAG]
    experiment = metadata.parse_experiment_plugin_data(content)
    assert [info.name.tag for info in experiment.metric_infos] == ["val_loss"]


def test_nothing_is_logged_as_a_value_of_a_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit([InputNoise(noise.Gaussian(), 0.5), monitor()], logger=logger, max_epochs=2)
    events = EventAccumulator(logger.log_dir).Reload()
    assert "hp_metric" not in events.Tags()["scalars"]
    assert len(events.Scalars("robustness/score")) == 2


def test_a_run_without_noise_is_beside_the_others(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit([monitor()], logger=logger, max_epochs=1)
    assert shown(logger.log_dir) == ({"train_noise/names": "none"}, None)


def test_each_noise_callback_has_its_noise_level_and_what_was_changed(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callbacks = [
        InputNoise(noise.Impulse(low=0.0), schedules.Linear(0.0, 0.5, until=0.6), per_sample=True),
        WeightNoise(noise.Gaussian(), AdaptiveLevel(), relative="std", name="analog"),
        LabelSmoothing(schedules.Linear(0.2, 0.0)),
        Mixup(0.3),
    ]
    fit(callbacks, logger=logger, max_epochs=1)
    values, _ = shown(logger.log_dir)
    assert {key.removeprefix("train_noise/"): value for key, value in values.items()} == {
        "names": "input, analog, smoothing, mixup",
        "input/noise": "Impulse(low=0.0)",
        "input/level": "Linear(0.0, 0.5, until=0.6)",
        "input/per_sample": "True",  # TensorBoard would show a boolean as 1.0000
        "analog/noise": "Gaussian()",
        "analog/level": "AdaptiveLevel()",
        "analog/relative": "std",
        "smoothing/level": "Linear(0.2, 0.0)",
        "mixup/level": 0.3,
    }


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_file_of_hyperparameters_holds_those_of_noise_and_module(kind, tmp_path):
    logger = kind(tmp_path)
    fit([InputNoise(noise.Gaussian(), 0.5), monitor()], module=Saves, logger=logger, max_epochs=1)
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text()) == OURS | {"lr": 0.1, "options": None}


# --- the table of arguments


class Other:
    """A function with an address in its repr."""

    def __call__(self, module: Any, batch: Any) -> Any: ...


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_the_table_has_every_argument_that_is_no_default(make):
    callback = make(0.3)
    signature = inspect.signature(type(callback))
    changed = [name for name, each in signature.parameters.items() if getattr(callback, name) != each.default]
    rows = [row.split(" | `")[1].split("=")[0] for row in describe_arguments([callback]).splitlines()[2:]]
    assert {*changed} - {"name"} <= {*rows} <= {*changed, "noise", "level"}


def test_the_table_names_each_callback_once():
    text = describe_arguments([Mixup(schedules.Linear(0.0, 0.2), seed=3), WeightNoise(noise.Gaussian(), 0.1)])
    assert text.splitlines() == [
        "| callback | argument |",
        "|---|---|",
        "| Mixup `mixup` | `level=Linear(0.0, 0.2)` |",
        "|  | `seed=3` |",
        "| WeightNoise `weight` | `noise=Gaussian()` |",
        "|  | `level=0.1` |",
    ]


def test_the_table_is_the_same_in_each_run():
    probe = WeightNoise(noise.Gaussian(), 0.1)
    monitor = RobustnessMonitor({"w": probe, "x": noise.Impulse()}, {"w": [0.1], "x": [0.1]}, predict=Other())
    text = describe_arguments([monitor])
    assert "{'w': WeightNoise(Gaussian(), level=0.1), 'x': Impulse()}" in text
    assert " at 0x" not in text
    assert all(row.count(" | ") == 1 for row in text.splitlines()[2:]), "each value is in one line"


def test_a_value_is_what_one_would_type():
    assert shorten({"a": [noise.Gaussian(), 1.0]}) == "{'a': [Gaussian(), 1.0]}"
    assert shorten(schedules.Linear(0.0, 1.0)) == "Linear(0.0, 1.0)"
    ramp = schedules.Linear(0.0, 1.0, until=0.5)
    assert eval(shorten(ramp), {"Linear": schedules.Linear}) == ramp
