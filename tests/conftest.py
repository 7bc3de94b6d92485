"""Fixtures of all tests, and the order in which the tests run."""

from __future__ import annotations

import gc
from functools import cache
from importlib.metadata import entry_points

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny; threads only cost
LONG = (
    "test_notebooks",
    "test_demonstration",
    "test_callbacks",
    "test_callbacks_loop",
    "test_callbacks_batches",
    "test_measurements_shown",
    "test_measurements",
    "test_replay",
    "test_replay_isolation",
    "test_monitors",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays; the search for a batch size has garbage collected a dozen times


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
