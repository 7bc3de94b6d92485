"""A pytest plugin that puts noise without numerical effect into every Trainer.

The callbacks are active in each step: they replace, copy, restore, hook and replay, but the noise returns what it is given. So
whatever a test says about a run must stay true. ``JUDGE=inputs,weights`` chooses some of the callbacks.

With a checkout of Lightning: ``PYTHONPATH=tests pytest -p judge.plugin -n0 path/to/its/tests``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.trainer.connectors import callback_connector
from torch import Tensor

from lightning_noise import ActivationNoise, GradientNoise, InputNoise, ReplayMonitor, WeightNoise


def identity(x: Tensor, level: Any, *, generator: Any) -> Tensor:
    """A noise without effect."""
    return x


CALLBACKS = {
    "inputs": lambda: InputNoise(identity, 0.5, name="judge inputs"),
    "weights": lambda: WeightNoise(identity, 0.5, params="*", name="judge weights"),
    "activations": lambda: ActivationNoise(identity, 0.5, "*", name="judge activations"),
    "gradients": lambda: GradientNoise(identity, 0.5, name="judge gradients"),
    "replay": lambda: ReplayMonitor({"judge": InputNoise(identity, name="judge")}, [0.5], name="judge"),
}


def pytest_configure(config: pytest.Config) -> None:
    chosen = [name for name in os.environ.get("JUDGE", ",".join(CALLBACKS)).split(",") if name]

    def make(group: str) -> list[pl.Callback]:
        return [CALLBACKS[name]() for name in chosen]

    callback_connector._load_external_callbacks = make  # pyright: ignore[reportPrivateImportUsage]
