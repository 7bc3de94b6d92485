"""The benchmarks run, and the page on performance shows their results."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_noise import callbacks, noise

ROOT = Path(__file__).parents[1]


def read(text: str) -> dict[str, list[list[str]]]:
    """The rows of the tables by title."""
    _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    rows = {each.split("\n", 1)[0]: re.findall(r"^\| (.*) \|$", each, re.MULTILINE)[2:] for each in sections}
    return {title: [row.split(" | ") for row in found] for title, found in rows.items()}


@pytest.mark.slow
def test_a_quick_run_has_all_tables_and_rows():
    command = [sys.executable, "-m", "benchmarks", "--quick"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=900).stdout
    tables = read(output)
    ratios = [
        float(ratio) for rows in tables.values() for row in rows for ratio in re.findall(r"\S+(?= \()", " ".join(row[1:]))
    ]
    assert len(ratios) > 100
    assert all(0 < ratio < math.inf for ratio in ratios)
    measured = {re.split(r"[`(]", row[0])[1] for row in tables["Noises in float32"] if row[0].startswith("`")}
    assert {name for name in noise.__all__ if name not in ("Noise", "Transform", "as_noise")} | {"Mixup"} == measured
    steps = {row[0].strip("`").split("(")[0].split(",")[0] for title in tables if "Steps" in title for row in tables[title]}
    in_training = {name for name in callbacks.__all__ if name.endswith(("Noise", "LabelSmoothing", "ix", "ixup"))}
    assert steps == in_training | {"five callbacks together"}
    assert {title.split(" of ")[0] for title in tables} == {
        *("Noises in float32", "Rows", "Weights perturbed and restored", "Steps", "Validations", "The end"),
        *("Growth with the data", "Memory"),
    }
    assert re.search(r"Peers: (\w\S* \d|none)", output)


def test_the_page_shows_the_results_on_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tables import PAGE, insert

    page = PAGE.read_text()
    assert insert(page) == page
