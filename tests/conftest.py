"""Fixtures of all tests, the order in which the tests run, and the device."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import Metric

torch.set_num_threads(1)  # the models are tiny; threads only cost
LONG = (  # of all tests and of the slow tests, by the processor time of a file
    "test_callbacks",
    "test_demonstration",
    "test_cli",
    "test_terminal",
    "test_processes",
    "test_one_process",
    "test_two_processes",
    "test_monitors",
    "test_noise_cli",
    "test_notebooks",
    "test_callbacks_loop",
    "test_evaluate",
    "test_activations_recomputed",
    "test_physics_of_weights",
    "test_weights_by_hand",
    "test_measurements_shown",
    "test_measurements",
    "test_adaptive_resume",
    "test_physics",
    "test_compare",
    "test_plots",
    "test_readme",
    "test_project_files",
    "test_together",
    "test_suggest",
    "test_task_values",
    "test_loggers",
    "test_replay_isolation",
    "test_first_scripts",
    "test_callbacks_batches",
)
# the laws that hold on every device: those of values, and those of callbacks in a fit
LAWS_OF_VALUES = (
    "test_kernels",
    "test_labels",
    "test_losses",
    "test_losses_derived",
    "test_metrics",
    "test_noise",
    "test_perturb",
    "test_rng",
)
LAWS_OF_FITS = ("test_callbacks", "test_steps")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the laws, such as cuda; tests of the CPU are skipped")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device != "cpu":
        torch.set_default_device(config.option.device)  # before the modules of the tests make tensors


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    on_cpu = (
        collection_path.name.startswith(("test_", "helpers_")) and collection_path.stem not in LAWS_OF_VALUES + LAWS_OF_FITS
    )
    return True if on_cpu and config.option.device != "cpu" else None


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """The longest files come first, so that no process is left alone with one at the end."""
    for item in items:
        if config.option.device != "cpu" and (isinstance(item, pytest.DoctestItem) or item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason="tests what only the CPU does"))
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays; the search for a batch size has garbage collected a dozen times


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(0)


@pytest.fixture(autouse=True)
def _fits_take_their_data_from_the_cpu(request: pytest.FixtureRequest):
    on_cpu = request.path.stem in LAWS_OF_FITS and request.config.option.device != "cpu"
    with torch.device("cpu") if on_cpu else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _no_seed_left_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _packages_are_searched_once():
    """Each trainer asks every installed package for callbacks, which takes longer than the rest of making it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fabric.utilities.registry.entry_points", cache(entry_points))
        yield


@pytest.fixture(autouse=True, scope="session")
def _a_logged_value_is_moved_without_a_search():
    """At each call of ``log``, Lightning searches all that it notes of the value for tensors: a fifth of a fit."""

    def move(metric: Metric, *args: Any, **kwargs: Any) -> Metric:
        held = {key: value for key, value in vars(metric).items() if isinstance(value, Tensor | Metric)}
        vars(metric).update({key: move_data_to_device(value, *args, **kwargs) for key, value in held.items()})
        return metric

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytorch_lightning.trainer.connectors.logger_connector.result._ResultMetric.to", move)
        yield
