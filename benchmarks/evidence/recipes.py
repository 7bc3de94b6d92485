"""What is trained with which callbacks; the name of a recipe says what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.evidence.tasks import TASKS, valid
from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    rules,
    schedules,
    tasks,
)

INPUT_LEVELS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
WEIGHT_LEVELS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
DOSE = {"input": 0.5, "weights": 0.3, "smoothing": 0.1}  # the mean level of the schedules of a site

Callbacks = Callable[[str], list[Any]]


def _shapes(dose: float) -> dict[str, Any]:
    """Schedules of one mean level."""
    return {
        "constant": dose,
        "rising": schedules.Linear(0.0, 2 * dose),
        "falling": schedules.Linear(2 * dose, 0.0),
        "rising, then held": schedules.Linear(0.0, 4 / 3 * dose, until=0.5),
        "up and down": schedules.Cyclic(0.0, 2 * dose, every=1.0),
        "first half": schedules.Window(2 * dose, until=0.5),
        "second half": schedules.Window(2 * dose, begin=0.5),
        "every 2nd epoch": schedules.Every(2 * dose, every=2),
        "every 5th epoch": schedules.Every(5 * dose, every=5),
    }


def _input(task: str, level: Any, kind: noise.Noise | None = None, **options: Any) -> InputNoise:
    first = next(iter(TASKS[task].families.values())).noise
    if task in ("vowels", "languages"):
        options["mask"] = lambda batch: valid(task, batch[0])
    return InputNoise(kind or first, level, **options)


def _task(task: str) -> Any:
    return tasks.Multiclass() if TASKS[task].n_classes else tasks.Regression()


def _governed(task: str, start: float) -> AdaptiveLevel:
    return AdaptiveLevel(rules.Governor(), start, task=_task(task))


def _weights(level: Any, **options: Any) -> WeightNoise:
    return WeightNoise(noise.Gaussian(), level, relative="std", **options)


NONE: dict[str, Callbacks] = {"none": lambda task: []}
INPUTS: dict[str, Callbacks] = {
    **{f"input {a:g}": lambda task, a=a: [_input(task, a, per_sample=True)] for a in INPUT_LEVELS},
    "input governed from 0": lambda task: [_input(task, _governed(task, 0.0), per_sample=True)],
    "input governed from 3": lambda task: [_input(task, _governed(task, 3.0), per_sample=True)],
}
OTHER_INPUTS: dict[str, Callbacks] = {
    "input 0.5 in every sample": lambda task: [_input(task, 0.5)],
    "input 1 in every sample": lambda task: [_input(task, 1.0)],
    "impulse 0.2": lambda task: [_input(task, 0.2, noise.Impulse(low=0.0, high=1.0), per_sample=True)],
    "impulse governed": lambda task: [_input(task, _governed(task, 0.0), noise.Impulse(low=0.0, high=1.0), per_sample=True)],
    "activations 0.3": lambda task: [ActivationNoise(noise.Gaussian(), 0.3, "net.0")],
    "gradients": lambda task: [GradientNoise(noise.Gaussian())],
}
MIXES: dict[str, Callbacks] = {
    "mixup 0.2": lambda task: [Mixup(0.2)],
    "mixup 1": lambda task: [Mixup(1.0)],
    "mixup 1 and input 0.5": lambda task: [Mixup(1.0), _input(task, 0.5, per_sample=True)],
}
WEIGHTS: dict[str, Callbacks] = {
    **{f"weights {a:g}": lambda task, a=a: [_weights(a)] for a in WEIGHT_LEVELS},
    "weights governed": lambda task: [_weights(_governed(task, 0.0))],
}
OTHER_WEIGHTS: dict[str, Callbacks] = {
    "weights 0.6 reparametrized": lambda task: [_weights(0.6, gradient="reparametrized")],
    "weights absolute 0.03": lambda task: [WeightNoise(noise.Gaussian(), 0.03)],
    "DropConnect 0.2": lambda task: [WeightNoise(noise.DropConnect(), 0.2)],
}
SMOOTHINGS: dict[str, Callbacks] = {
    **{f"smoothing {a:g}": lambda task, a=a: [LabelSmoothing(a)] for a in (0.02, 0.05, 0.1, 0.2)},
    "smoothing by the signed gap": lambda task: [LabelSmoothing(AdaptiveLevel(rules.SignedGap()))],
}
FLIPS: dict[str, Callbacks] = {
    "flips 0.1": lambda task: [TargetNoise(labels.FlipLabels(TASKS[task].n_classes), 0.1)],
    "input 0.5 and smoothing 0.1": lambda task: [_input(task, 0.5, per_sample=True), LabelSmoothing(0.1)],
}
SHAPES: dict[str, Callbacks] = {
    **{f"input {k}": lambda task, s=s: [_input(task, s, per_sample=True)] for k, s in _shapes(DOSE["input"]).items()},
    **{f"weights {k}": lambda task, s=s: [_weights(s)] for k, s in _shapes(DOSE["weights"]).items()},
    **{f"smoothing {k}": lambda task, s=s: [LabelSmoothing(s)] for k, s in _shapes(DOSE["smoothing"]).items()},
}
TARGETS: dict[str, Callbacks] = {
    f"targets {a:g}": lambda task, a=a: [TargetNoise(noise.Gaussian(), a)] for a in (0.1, 0.3, 1.0)
}
TEXT: dict[str, Callbacks] = {
    f"NEFTune {a:g}": lambda task, a=a: [EmbeddingNoise(a, mask=lambda batch: valid(task, batch[0]))] for a in (1.0, 5.0, 10.0)
} | {f"typos {a:g}": lambda task, a=a: [_input(task, a)] for a in (0.05, 0.1, 0.2)}

CLASSES = NONE | INPUTS | SMOOTHINGS | MIXES | FLIPS
RECIPES: dict[tuple[str, str], dict[str, Callbacks]] = {
    ("mnist", "plain"): CLASSES | OTHER_INPUTS | WEIGHTS | OTHER_WEIGHTS | SHAPES,
    ("mnist", "batchnorm"): CLASSES | OTHER_INPUTS | WEIGHTS | OTHER_WEIGHTS,
    ("digits", "batchnorm"): CLASSES | WEIGHTS,
    ("power", "plain"): CLASSES | WEIGHTS,
    ("gunpoint", "plain"): CLASSES,
    ("leaves", "plain"): CLASSES,
    ("vowels", "plain"): CLASSES,
    ("cancer", "plain"): CLASSES | WEIGHTS,
    ("wine", "plain"): CLASSES,
    ("diabetes", "plain"): NONE | INPUTS | WEIGHTS | TARGETS,
    ("languages", "transformer"): NONE | TEXT | SMOOTHINGS,
}


def callbacks(task: str, net: str, recipe: str) -> list[Any]:
    return RECIPES[task, net][recipe](task)


def names(places: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """The recipes of some places, as task, network and name."""
    return [(*place, name) for place in places for name in RECIPES[place]]
