"""The mistakes of the first ten minutes: each error shows a line to type, and the line works."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Classifier, Quiet, Rows, fit, loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_noise
from lightning_noise import AdaptiveLevel, InputNoise, RobustnessMonitor, labels, noise, rules, schedules, tasks

NAMES = {name: getattr(lightning_noise, name) for name in lightning_noise.__all__}
GAUSSIAN = noise.Gaussian()

# what is typed, and what is to be typed
CALLS: dict[str, str] = {
    "noise.Gaussian(0.1)": "InputNoise(noise.Gaussian(), 0.1)",
    "noise.Gaussian(std=0.1)": "InputNoise(noise.Gaussian(), 0.1)",
    "noise.Impulse(0.1)": "InputNoise(noise.Impulse(), 0.1)",
    "noise.SNR(20)": "InputNoise(noise.SNR(), schedules.from_snr_db(20))",
    "noise.PatchGaussian(3, 0.1)": "InputNoise(noise.PatchGaussian(3), 0.1)",
    "noise.Masking(dims=(-1,))": "noise.Masking(dim=(-1,))",
    "InputNoise(noise.Gaussian, 0.1)": "InputNoise(noise.Gaussian(), 0.1)",
    "InputNoise('gausian', 0.1)": "InputNoise(noise.Gaussian(), 0.1)",
    "InputNoise(0.1)": "InputNoise(noise.Gaussian(), 0.1)",
    "InputNoise(schedules.Linear(0.0, 0.5), noise.Gaussian())": "InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.5))",
    "InputNoise([noise.Impulse()], 0.1)": "InputNoise(noise.Impulse(), 0.1)",
    "InputNoise(noise.Gaussian(), (0.0, 0.5))": "schedules.Linear(0.0, 0.5)",
    "InputNoise(noise.Gaussian(), [0.1])": "0.1",
    "InputNoise(noise.Gaussian(), '0.1')": "0.1",
    "InputNoise(noise.Gaussian(), AdaptiveLevel)": "AdaptiveLevel()",
    "InputNoise(noise.Impulse(), 10)": "0.1",
    "InputNoise(noise.Gaussian(), 0.1, p=0.5)": "InputNoise(noise.Gaussian(), level=0.1, probability=0.5)",
    "InputNoise(noise.Gaussian(), sigma=0.1)": "InputNoise(noise.Gaussian(), level=0.1)",
    "Mixup(0.2, num_classes=10)": "Mixup(level=0.2, n_classes=10)",
    "LabelSmoothing(smoothing=0.2)": "LabelSmoothing(level=0.2)",
    "TargetNoise(0.1)": "TargetNoise(labels.FlipLabels(n_classes=10), 0.1)",
    "labels.FlipLabels(0.1)": "TargetNoise(labels.FlipLabels(n_classes=10), 0.1)",
    "WeightNoise(0.1)": "WeightNoise(noise.Gaussian(), 0.1)",
    "ActivationNoise(0.1, 'net.1')": "ActivationNoise(noise.Gaussian(), 0.1, '*')",
    "schedules.Linear(0.5)": "schedules.Linear(0.0, 0.5)",
    "schedules.Cosine(0.0, 0.5, 0.1, 0.6)": "schedules.Cosine(0.0, 0.5, begin=0.1, until=0.6)",
    "schedules.Linear(0.0, 0.5, until=10)": "schedules.Linear(0.0, 0.5, until=10, unit='epoch')",
    "schedules.Linear(0.0, 0.5, unit='epoch')": "schedules.Linear(0.0, 0.5, until=10, unit='epoch')",
    "schedules.Window(0.3, begin=2)": "schedules.Window(0.3, begin=2, unit='epoch')",
    "schedules.Cyclic(0.0, 0.5, every=2)": "schedules.Cyclic(0.0, 0.5, every=2, unit='epoch')",
    "schedules.Exponential(0, 0.5)": "schedules.Linear(0, 0.5)",
    "AdaptiveLevel(0.5)": "AdaptiveLevel(start=0.5)",
    "AdaptiveLevel(rules.Governor)": "AdaptiveLevel()",
    "RobustnessMonitor(0.1)": "RobustnessMonitor(noise.Gaussian(), [0.1])",
    "RobustnessMonitor('impulse')": "RobustnessMonitor(noise.Impulse(), [0.1])",
    "InputNoise()": "InputNoise(noise.Gaussian(), level=0.1)",
    "TargetNoise()": "TargetNoise(labels.FlipLabels(10), level=0.1)",
    "InputNoise(p=0.5)": "InputNoise(noise.Gaussian(), level=0.1, probability=0.5)",
    "schedules.Linear()": "schedules.Linear(0.0, 0.5)",
    "tasks.Multiclass(10)": "tasks.Multiclass()",
    "tasks.Multiclass(num_classes=10)": "tasks.Multiclass()",
}
# arguments to type
ARGUMENTS: dict[str, str] = {
    "RobustnessMonitor(noise.Gaussian(), 0.1)": "levels=[0.1]",
    "RobustnessMonitor([noise.Gaussian(), noise.Impulse()], [0.1])": "levels={'gaussian': [0.1], 'impulse': [0.1]}",
    "RobustnessMonitor(noise.Gaussian(), {'gausian': [0.1]})": "levels={'gaussian': [0.1]}",
    "RobustnessMonitor(task='multiclass')": "task=tasks.Multiclass()",
    "RobustnessMonitor(task=tasks.Binary)": "task=tasks.Binary()",
    "RobustnessMonitor(logged=['acuracy'])": "logged=['accuracy']",
    "RobustnessMonitor(predict='logits')": "predict=lambda module, batch: module(batch[0])['logits']",
    "InputNoise(noise.Gaussian(), 0.1, relative=True)": "relative='std'",
    "InputNoise(noise.Gaussian(), 0.1, probability=50)": "probability=0.5",
    "InputNoise(noise.Gaussian(), 0.1, clip=2.0)": "clip=(0.0, 2.0)",
    "RobustnessMonitor(every_n_epochs=0)": "every_n_epochs=1",
}


def error_of(line: str) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        eval(line, dict(NAMES))
    return str(error.value)


@pytest.mark.parametrize(("line", "to_type"), CALLS.items(), ids=CALLS)
def test_a_call_that_cannot_be_made_shows_the_call_to_type(line, to_type):
    assert re.search(rf"type {re.escape(to_type)}(?![\w.])", error_of(line))
    eval(to_type, dict(NAMES))


@pytest.mark.parametrize(("line", "to_type"), ARGUMENTS.items(), ids=ARGUMENTS)
def test_a_wrong_argument_shows_the_argument_to_type(line, to_type):
    assert f"type {to_type}" in error_of(line)
    call = line.partition("(")[0]
    noises = line.partition("(")[2].split(", ")[0] if call == "InputNoise" else ""
    noises = "[noise.Gaussian(), noise.Impulse()]" if "Impulse" in line else noises
    noises = "noise.Gaussian()" if "levels" in to_type and not noises else noises
    eval(f"{call}({', '.join(filter(None, [noises, to_type]))})", dict(NAMES))


@pytest.mark.parametrize("value", [GAUSSIAN, schedules.Linear(0.0, 0.5), AdaptiveLevel(), labels.FlipLabels(3)], ids=repr)
def test_a_value_among_the_callbacks_shows_its_callback(value):
    with pytest.raises(AttributeError, match=r"is not a callback; type callbacks=\[") as error:
        fit([value])
    eval(re.findall(r"type callbacks=(\[.*\])", str(error.value))[0], dict(NAMES))


class TakesBatch(Classifier):
    def forward(self, x):
        images, _ = x
        return super().forward(images)


class Pair(Classifier):
    def forward(self, x) -> Any:
        return super().forward(x), x

    training_step: Any = lambda self, batch, i: nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    validation_step: Any = lambda self, batch, i: None


@pytest.mark.parametrize("module", [TakesBatch, Pair], ids=lambda module: module.__name__)
def test_a_module_that_cannot_be_read_shows_what_predicts_its_batch(module):
    data = loader(Rows(16))
    with pytest.raises((TypeError, ValueError), match=r"A ReplayMonitor needs none of this") as error:
        make_trainer([RobustnessMonitor()]).validate(quiet(module), data, verbose=False)
    (line,) = re.findall(r"type predict=(.*?), or", str(error.value))
    predict: Callable[..., Any] = eval(line)
    trainer = make_trainer([RobustnessMonitor(predict=predict)])
    trainer.validate(quiet(module), data, verbose=False)
    assert "robustness/score" in trainer.callback_metrics


def quiet(module: type[Classifier]) -> Classifier:
    """Returns a module that only validates."""
    return type(module.__name__, (module,), {"validation_step": Quiet.validation_step})()


def test_the_arguments_of_forward_are_those_of_its_names():
    class Named(Classifier):
        def forward(self, x, scale=None):
            return super().forward(x if scale is None else x * scale)

    rows = Rows(16)
    samples: Any = [{"x": x, "scale": torch.zeros(1), "label": y} for x, y in map(rows.__getitem__, range(16))]
    trainer = make_trainer([RobustnessMonitor(noise.Gaussian(), [0.1], inputs="x")])
    trainer.validate(module := quiet(Named), loader(samples), verbose=False)
    right = module.eval()(rows.x, torch.zeros(16, 1)).argmax(1) == rows.y
    assert trainer.callback_metrics["robustness/accuracy_clean"] == pytest.approx(right.float().mean().item())


def knows_named(self, x, label):
    return self.net(x) + 9 * nn.functional.one_hot(label, 3)


def knows_optional(self, x, label=None):
    return self.net(x) if label is None else knows_named(self, x, label)


def knows_all(self, **batch):
    return knows_optional(self, **batch)


def needs_all(self, **batch):
    return knows_named(self, **batch)


def validate(forward: Callable[..., Any], batch: Any, **options: Any) -> dict[str, float]:
    """Returns what a monitor logs of a module with such a ``forward`` for one batch."""
    module = type("Module", (Quiet,), {"forward": forward})()
    trainer = make_trainer([RobustnessMonitor(**{"noises": noise.Gaussian(), "levels": [0.1]} | options)])
    trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)  # type: ignore[arg-type]
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


ROWS = Rows(64)
RIGHT = {"x": ROWS.x, "label": ROWS.y}


@pytest.mark.parametrize("forward", [knows_optional, knows_all], ids=lambda forward: forward.__name__)
def test_a_prediction_does_not_know_the_target(forward):
    assert validate(forward, RIGHT)["robustness/accuracy_clean"] < 1
    known = validate(forward, RIGHT, predict=lambda module, batch: module(**batch))
    assert known["robustness/accuracy_clean"] == 1


@pytest.mark.filterwarnings("ignore:the target is leaf 1")
@pytest.mark.parametrize(
    ("forward", "batch"),
    [(knows_named, RIGHT), (needs_all, RIGHT), (knows_named, (ROWS.x, ROWS.y, ROWS.y.flip(0)))],
    ids=["by name", "all", "with a third tensor"],
)
def test_a_forward_that_needs_the_target_shows_the_call(forward, batch):
    with pytest.raises((ValueError, TypeError)) as error:
        validate(forward, batch)
    line = re.findall(r"type predict=(lambda module, batch: module\(.*?\))(?:;|, or)", str(error.value))[0]
    assert validate(forward, batch, predict=eval(line))["robustness/accuracy_clean"] == 1


@pytest.mark.parametrize(
    ("third", "options", "is_told"),
    [(ROWS.y.flip(0), {}, True), (ROWS.y.flip(0), {"target": 1}, False), (torch.arange(64), {}, False), (ROWS.x, {}, False)],
    ids=["other labels", "said", "an index", "other inputs"],
)
def test_a_third_leaf_that_could_be_the_target_is_noticed(third, options, is_told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        validate(lambda self, x: self.net(x), (ROWS.x, ROWS.y, third), **options)
    told = [each for each in found if "leaf 2 int64 (64,) could be, too; type target=1 or target=2" in str(each.message)]
    assert len(told) == is_told


def test_noise_that_does_not_reach_the_module_is_an_error():
    batch = {"ids": ROWS.y, "weight": torch.rand(64), "label": ROWS.y}
    forward = lambda self, ids: self.net(nn.functional.one_hot(ids, 8).float())  # noqa: E731
    with pytest.raises(
        ValueError, match=r"the noise is in 'weight', but the module is called with module\(ids=batch\['ids'\]\)"
    ):
        validate(forward, batch)


def test_logits_beside_numbers_are_not_taken_for_the_numbers():
    forward = lambda self, x: {"logits": x[:, 0], "value": x[:, 1]}  # noqa: E731
    with pytest.raises(ValueError, match="the module returned dict"):
        validate(forward, (ROWS.x, ROWS.x[:, 1]), task=tasks.Regression())


def test_an_input_may_be_the_target():
    forward = lambda self, x, mask=None: x  # noqa: E731
    assert validate(forward, {"x": ROWS.x}, target="x", task=tasks.Regression())["robustness/mse_clean"] == 0
    batch = {"x": ROWS.x, "mask": ROWS.y}
    assert validate(forward, batch, inputs="x", target="x", task=tasks.Regression())["robustness/mse_clean"] == 0


@pytest.mark.parametrize(
    ("member", "level", "to_type"),
    [(noise.SNR(), 20.0, "schedules.from_snr_db(20)"), (GAUSSIAN, 25.5, "0.1"), (noise.Speckle(), 30.0, "a lower level")],
    ids=str,
)
def test_a_level_far_above_the_data_is_a_warning(member, level, to_type):
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"image": images, "label": torch.zeros(8).long()}
    forward = lambda self, image: 2 * image.flatten(1)[:, :3]  # noqa: E731
    with pytest.warns(UserWarning, match=rf"dB above the input 'image'.* type {re.escape(to_type)}"):
        validate(forward, batch, noises=member, levels=[0.1, level])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dB above")
        validate(forward, batch, noises=member, levels=[0.1, 1.0])


def test_an_index_in_place_of_a_key_shows_the_key():
    with pytest.raises(ValueError, match="no leaf 1 in the batch; type 'label'"):
        validate(lambda self, x: self.net(x), RIGHT, target=1)


def test_options_of_a_noise_are_typed_by_name():
    assert InputNoise(noise.Masking(dim=-1), 0.1).noise == noise.Masking(dim=(-1,))
    assert AdaptiveLevel().rule == rules.Governor()
    assert tasks.Multiclass(ignore_index=10).ignore_index == 10
