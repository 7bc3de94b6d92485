"""Rules, callbacks and data for tests of adaptive levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from helpers import N_CLASSES, Classifier, Deterministic, Rows, loader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_noise import ActivationNoise, InputNoise, WeightNoise, noise
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.rules import Decision, Governor, Observation, Rule, State

HELD_OUT = Rows(101, seed=1)


def held_out() -> DataLoader:
    return loader(HELD_OUT, batch_size=34)


@dataclass(frozen=True)
class Plan(Rule):
    """Steps through given levels, stays at the last level, and keeps all observations."""

    reasons: ClassVar[tuple[str, ...]] = ("held", "moved")

    levels: tuple[float, ...] = ()
    seen: list[Observation] = field(default_factory=list, compare=False)

    def init(self, level: float) -> State:
        return {"level": level, "validations": 0}

    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        self.seen.append(observation)
        level = (*self.levels, *[self.levels[-1]] * 100)[state["validations"]] if self.levels else state["level"]
        reason = "held" if level == state["level"] else "moved"
        return {"level": level, "validations": state["validations"] + 1}, reason


def governor(**kwargs: Any) -> Governor:
    """Returns a governor that moves within a few validations, even if the model learns little."""
    return Governor(**{"chance": 1 / N_CLASSES, "warmup": 0, "min_skill": 0.01, **kwargs})


def history(callback: NoiseCallback) -> list[Decision]:
    assert callback.adaptive is not None
    return callback.adaptive.history


def seen(callback: NoiseCallback) -> list[Observation]:
    assert callback.adaptive is not None
    assert isinstance(callback.adaptive.setting.rule, Plan)
    return callback.adaptive.setting.rule.seen


def level_of(callback: NoiseCallback) -> float:
    assert callback.adaptive is not None
    return callback.adaptive.level


CALLBACKS: dict[str, Callable[[AnyLevel], NoiseCallback]] = {
    "input": lambda level: InputNoise(noise.Gaussian(), level),
    "input, some samples": lambda level: InputNoise(noise.Uniform(), level, probability=0.5, per_sample=True, clip=(-2, 2)),
    "weight": lambda level: WeightNoise(noise.Gaussian(), level, relative="std"),
    "activation": lambda level: ActivationNoise(noise.Gaussian(), level, "net.1"),
}


def still() -> Deterministic:
    """Returns a module that does not learn."""
    return Deterministic(lr=0.0)


@torch.no_grad()
def predicted(model: Classifier, x: Tensor, size: int = 34) -> Tensor:
    return torch.cat([model(part) for part in x.split(size)])


def hits(logits: Tensor) -> Tensor:
    return (logits.argmax(1) == HELD_OUT.y).double()
