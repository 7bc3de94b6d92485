"""An adaptive level leaves nothing behind after an exception, and refuses what cannot work."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Deterministic, assert_same, fit, loader, make_trainer, weights
from helpers_adaptive import HELD_OUT, Plan, governor, history, level_of, still
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
    tasks,
)
from lightning_noise.metrics import BrierScore
from lightning_noise.rules import Governor, SignedGap


class Failing(Deterministic):
    calls = 0  # of the class, because an adaptive level restores what its forward pass changes in the module

    def __init__(self, at: int):
        super().__init__(lr=0.0)
        self.at, Failing.calls = at, 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.count()

    def count(self):
        Failing.calls += 1
        if Failing.calls == self.at:
            raise RuntimeError("stop")


@pytest.mark.parametrize("where", ["step", "predict"])
@pytest.mark.parametrize("at", range(1, 6))
def test_an_exception_leaves_the_weights_and_a_fit_that_follows_as_they_were(where, at):
    def predict(module, batch):
        if where == "predict" and isinstance(module, Failing):
            module.count()
        return module(batch[0])

    level = AdaptiveLevel(Plan((0.2, 0.4)), 0.5, predict=predict)
    callback = WeightNoise(noise.Gaussian(), level, relative="std")
    pl.seed_everything(0, verbose=False)
    module = Failing(at)
    if where == "predict":
        module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    before, trainer = weights(module), make_trainer([callback], num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, loader(), loader(HELD_OUT, batch_size=34))
    assert_same(weights(module), before)
    done = len(history(callback))
    fit([callback], module=still, num_sanity_val_steps=0)
    assert len(history(callback)) == done + 2  # also if the exception came when a validation was due


BAD = [
    ({"predict": lambda module, batch: None}, "the module returned NoneType for a target"),
    ({"predict": lambda module, batch: module(batch[0]).argmax(1)}, r"the module returned int64 \(8,\)"),
    ({"target": "label"}, "no leaf 'label'"),
    ({"inputs": "image"}, "no leaf 'image'"),
    ({"task": tasks.Binary()}, r"returned float32.*An adaptive level has its own .*: AdaptiveLevel\(task=…\)"),
    ({"task": tasks.Regression(), "rule": Governor()}, "returned float32"),
    ({"task": tasks.Custom(MulticlassAccuracy(N_CLASSES)), "predict": lambda module, batch: None}, "returned NoneType"),
]


@pytest.mark.parametrize(("setting", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_found_before_the_training(setting, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([InputNoise(noise.Gaussian(), AdaptiveLevel(**{"rule": governor(), **setting}))], module=module)
    assert not module.seen


def test_of_several_targets_one_is_to_be_named():
    with pytest.raises(ValueError, match=r"needs one target, but the callback has \[1, 2\]: give AdaptiveLevel"):
        fit([Mixup(AdaptiveLevel(SignedGap()), target=[1, 2])])


def test_noise_that_held_out_data_cannot_take_is_found_before_the_training():
    class Transposed(Classifier):
        def __init__(self):
            super().__init__()
            self.transposed = nn.Identity()

        def forward(self, x):
            return self.transposed(super().forward(x).T).T

    module = Transposed()
    with pytest.raises(ValueError, match=r"a row for each of the 8 samples, but 'transposed' returned"):
        fit([ActivationNoise(noise.Gaussian(), AdaptiveLevel(governor()), "transposed")], module=module)
    assert not module.seen


@pytest.mark.parametrize(
    "make",
    [
        LabelSmoothing,
        lambda level: TargetNoise(labels.FlipLabels(N_CLASSES), level),
        Mixup,
        lambda level: CutMix(level, dim=(-1,)),
        lambda level: GradientNoise(noise.Gaussian(), level),
    ],
    ids=["smoothing", "flips", "mixup", "cutmix", "gradient"],
)
def test_a_rule_that_asks_what_noise_does_is_refused_where_held_out_data_have_none(make):
    message = r"Governor must evaluate the model under the noise of '\w+', which is not possible for label noise"
    with pytest.raises(ValueError, match=message):
        make(AdaptiveLevel(governor()))
    fit([callback := make(AdaptiveLevel(SignedGap(), 0.02))])
    assert all(math.isnan(decision.boundary) for decision in history(callback))
    assert [decision.reason for decision in history(callback)] != []


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: AdaptiveLevel(0.3),  # type: ignore[arg-type]
            TypeError,
            r"rule must be a rule such as rules.Governor\(\), got 0\.3; type AdaptiveLevel\(start=0\.3\)",
        ),
        (lambda: AdaptiveLevel(Governor), TypeError, "rule must be a rule"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(governor(), -0.1), ValueError, "finite and not negative, got -0.1"),
        (lambda: AdaptiveLevel(governor(hi=0.5), 0.6), ValueError, r"the level must start in \[0, 0\.5\], got start=0\.6"),
        (lambda: AdaptiveLevel(governor(lo=0.1)), ValueError, r"the level must start in \[0\.1, inf\], got start=0"),
        (lambda: AdaptiveLevel(governor(), task="accuracy"), TypeError, "task must be a task such as"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(SignedGap(), task=tasks.Regression()), ValueError, "SignedGap follows the confidence"),
        (lambda: AdaptiveLevel(SignedGap(), task=tasks.Custom(BrierScore())), ValueError, "SignedGap follows the confidence"),
        (lambda: AdaptiveLevel(governor(), max_batches=0), ValueError, "max_batches must be at least 1, got 0"),
        (lambda: InputNoise(noise.Impulse(), AdaptiveLevel(governor(), 1.5)), ValueError, r"in \[0, 1\], got 1\.5"),
        (lambda: InputNoise(noise.SwapNoise(), AdaptiveLevel()), ValueError, "the noise of 'input' mixes samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_refused_when_it_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("callback", "run", "message"),
    [
        (
            InputNoise(noise.Gaussian(), AdaptiveLevel(governor())),
            {"limit_val_batches": 0},
            "AdaptiveLevel needs a validation",
        ),
        (
            InputNoise(noise.Gaussian(), AdaptiveLevel(governor())),
            {"check_val_every_n_epoch": 3},
            "a run of max_epochs=2 .* has no validation, but",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_in_which_it_could_not_move_is_refused(callback, run, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([callback], module=module, **run)
    assert not module.seen


@pytest.mark.parametrize(
    "nest",
    [
        lambda level: schedules.Window(level, until=0.5),
        lambda level: schedules.Product([level, 0.5]),
        lambda level: schedules.Piecewise([0.5, level], milestones=[0.5]),
        lambda level: schedules.Every(level, every=2),
    ],
    ids=["window", "product", "piecewise", "every"],
)
def test_an_adaptive_level_is_no_part_of_a_schedule(nest):
    module = Classifier()
    with pytest.raises(
        TypeError, match=r"a level within a schedule must be a number, a schedule or a callable, got AdaptiveLevel\("
    ):
        fit([InputNoise(noise.Gaussian(), nest(AdaptiveLevel(governor())))], module=module)
    assert not module.seen


def test_the_level_stays_where_it_has_a_meaning():
    right = torch.eye(N_CLASSES) * 9  # whatever the noise
    level = AdaptiveLevel(governor(step=0.4), 0.3, predict=lambda module, batch: right[batch[1]])
    callback = InputNoise(noise.Impulse(), level)
    fit([callback], max_epochs=5)
    assert level_of(callback) == 1.0
    assert callback.state_dict()["state"]["level"] == 1.0, "from there it can fall at once"
