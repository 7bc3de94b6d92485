"""The files around the package agree with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import lightning_noise

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
YAML = [ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml", *sorted((ROOT / ".github").rglob("*.yml"))]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_noise.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_a_configuration_file_can_be_read(path):
    assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml", ".pre-commit-config.yaml"])
def test_the_targets_that_a_file_names_are_in_the_makefile(name):
    named = set(re.findall(r"(?:`|^ *|run: |entry: )make (\w+)", (ROOT / name).read_text(), re.MULTILINE))
    assert named
    assert named <= set(re.findall(r"^(\w+):.*##", MAKEFILE, re.MULTILINE))


def test_the_tests_for_the_oldest_lightning_exist():
    names = re.search(r"^OLDEST_TESTS := .*,(.*)\)$", MAKEFILE, re.MULTILINE)
    assert names is not None
    for name in names[1].split():
        assert list((ROOT / "tests").glob(f"test_{name}*.py")), name
