"""The files around the package agree with the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

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


def test_the_benchmarks_differ_from_the_tests_in_two_packages():
    tested, benchmarks = (
        dict(re.findall(r"^(.+)==(.+)$", (ROOT / folder / "constraints.txt").read_text(), re.M))
        for folder in ("", "benchmarks")
    )
    assert {name for name in tested.keys() & benchmarks.keys() if tested[name] != benchmarks[name]} == {"numpy", "pandas"}


def test_the_constraints_pin_the_lightning_that_the_oldest_replaces():
    pins = (ROOT / "constraints.txt").read_text()
    assert "s/^pytorch-lightning==.*/" in MAKEFILE
    assert re.search("^pytorch-lightning==", pins, re.MULTILINE)


PICTURES = sorted((ROOT / "docs" / "images").glob("*.png"))


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_of_tensorboard_has_the_size_of_the_window_and_few_bytes(path):
    height, width, _ = imread(path).shape
    assert (width, height) == (1280, 800)
    assert path.stat().st_size < 150_000


def test_the_page_of_tensorboard_shows_each_picture_once():
    shown = re.findall(r"\(images/(.*?)\)", (ROOT / "docs" / "tensorboard.md").read_text())
    assert sorted(shown) == [path.name for path in PICTURES] != []


@pytest.mark.slow
def test_each_page_of_tensorboard_has_something_to_show():
    subprocess.run([sys.executable, "docs/screenshots.py", "--check"], cwd=ROOT, check=True, timeout=600)
