"""The level of a noise callback follows its schedule through the run."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import Classifier, Deterministic, fit
from helpers_callbacks import LevelLog, Normalised
from members import every_callback
from pytorch_lightning.callbacks import LambdaCallback, StochasticWeightAveraging

from lightning_noise import InputNoise, RobustnessMonitor, noise, schedules


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"max_epochs": 2}, [i / 6 for i in range(6)]),
        ({"max_epochs": 4, "max_steps": 6}, [i / 6 for i in range(6)]),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [i / 6 for i in range(6)]),
        ({"max_epochs": 1000, "max_steps": 3}, [i / 3 for i in range(3)]),
        ({"max_epochs": 4, "limit_train_batches": 1}, [0, 0.25, 0.5, 0.75]),
    ],
    ids=str,
)
def test_a_schedule_in_fractions_follows_the_end_that_comes_first(run, expected):
    callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 1.0))
    log = LevelLog(callback)
    fit([callback, log], **run)
    assert log.levels == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("member", "message"),
    [(noise.Shot(), "Shot needs data that are not negative"), (noise.Masking(), "Masking needs samples of at least 2 axes")],
    ids=repr,
)
def test_a_noise_that_does_not_suit_the_data_is_found_on_the_first_batch_though_it_begins_later(member, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([InputNoise(member, schedules.Window(0.2, begin=0.5))], module=module)
    assert not module.seen
    with pytest.raises(ValueError, match=message):
        fit([RobustnessMonitor(member)], module=module)
    assert not module.seen


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("module", [Deterministic, Normalised])
@pytest.mark.parametrize("run", [{"max_epochs": 3}, {"max_epochs": 9, "max_steps": 9}], ids=str)
def test_a_schedule_in_fractions_ends_with_the_training_and_not_with_the_epoch_of_weight_averaging(run, module, order):
    def levels(*others):
        callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 1.0))
        log = LevelLog(callback)
        fit([callback, *others, log][::order], module=module, **run)
        return log.levels

    without = levels()
    with_ = levels(StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1))
    added = 3 if module is Normalised and "max_steps" not in run else 0
    assert without == pytest.approx([i / 9 for i in range(9)])
    assert with_ == without + added * [0.0]


def test_a_schedule_may_be_wrong_in_the_epoch_that_weight_averaging_adds():
    falling = schedules.Linear(1.0, -0.1, until=6, unit="step")  # two epochs of three steps, of which the last is step 5
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    module, _ = fit([InputNoise(noise.Gaussian(), falling), swa], module=Normalised, max_epochs=2)
    assert len(module.seen) == 9


@every_callback
@pytest.mark.parametrize("level", [-0.1, math.nan, math.inf, "0.1", torch.full((8,), 0.1)], ids=str)
def test_a_level_that_is_set_in_mid_run_is_checked(make, level):
    callback = make(0.1)
    change = LambdaCallback(on_train_epoch_start=lambda trainer, _: setattr(callback, "level", level))
    with pytest.raises((TypeError, ValueError), match="a level must be"):
        fit([callback, change])


def test_steps_count_updates_and_not_batches():
    callback = InputNoise(noise.Gaussian(), lambda progress: float(progress.step))
    log = LevelLog(callback)
    fit([callback, log], accumulate_grad_batches=2, max_epochs=2)
    assert log.levels == [0, 0, 1, 2, 2, 3]  # three batches an epoch, the last of which is an update of its own


def test_a_function_of_a_fraction_that_is_not_known_is_refused_before_the_training():
    callback = InputNoise(noise.Gaussian(), lambda progress: 0.5 * progress.fraction)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"If it reads progress.fraction, the end is unknown: type Trainer\(max_steps=…\)"):
        fit([callback], max_epochs=-1)
    fit([callback], max_epochs=-1, max_steps=2)
    with pytest.raises(TypeError, match="bad operand type"):  # an error of another kind stays as it is
        fit([InputNoise(noise.Gaussian(), lambda progress: abs(str(progress)))], max_epochs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "is_late"),
    [
        (schedules.Linear(0.0, 0.5, begin=100, until=200, unit="step"), True),
        (schedules.Piecewise([0.0, 0.5], [2], unit="epoch"), True),
        (schedules.Window(0.5, begin=5, until=6, unit="step"), False),  # the last step of two epochs
        (schedules.Linear(0.0, 0.0, until=100, unit="step"), False),  # is 0 on purpose
    ],
)
def test_a_schedule_that_begins_after_the_end_of_the_run_is_a_warning(schedule, is_late):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit([InputNoise(noise.Gaussian(), schedule)], max_epochs=2)
    late = [each for each in found if "is 0 in all 6 steps of this run, and above 0 only later" in str(each.message)]
    assert len(late) == is_late
    fit([InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.5))], max_steps=1)  # begins at 0 in a run of one step


@pytest.mark.filterwarnings("ignore:.*clip=.* cuts off")
def test_at_level_0_the_step_gets_the_very_batch():
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

        def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx):
            same.append(pl_module.seen[-1] is self.batch)

    same: list[bool] = []
    gate = schedules.Every(0.5, every=3, unit="step")
    fit([InputNoise(noise.Gaussian(), gate, clip=(-0.1, 0.1)), Watch()], max_epochs=2)
    assert same == [False, True, True, False, True, True]
