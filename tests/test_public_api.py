"""What is public is what `__all__` says, sorted."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import lightning_noise

MODULES = ["lightning_noise", *(module.name for module in pkgutil.walk_packages(lightning_noise.__path__, "lightning_noise."))]
PACKAGES = ("cli", "demo", "evaluation", "loop", "perturb")  # whose modules are imported one by one
MODULES = [name for name in MODULES if not name.endswith(("__main__", "_version", "noise.kernels", *PACKAGES))]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_exists(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__, key=lambda name: (not name.isupper(), name))  # as the linter does
    for member in module.__all__:
        assert hasattr(module, member)


@pytest.mark.parametrize("name", ["noise", "schedules"])
def test_every_public_class_of_a_family_is_in_all(name):
    module = importlib.import_module(f"lightning_noise.{name}")
    own = {
        key for key, value in vars(module).items() if isinstance(value, type) and value.__module__.startswith(module.__name__)
    }
    assert {key for key in own if not key.startswith("_")} <= set(module.__all__)


def test_the_version_is_that_of_the_changelog():
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    released = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert released is not None
    assert released[1] == lightning_noise.__version__
