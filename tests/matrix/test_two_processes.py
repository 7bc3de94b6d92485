"""Each callback and monitor under each condition of two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import execute

from matrix.cells import REFUSED, assert_unchanged
from matrix.columns import COLUMNS, everything
from matrix.conditions import TOGETHER, TWO_PROCESSES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, str]]]:
    """What each rank says."""
    folder = tmp_path_factory.mktemp("outcomes")
    subprocess.run([sys.executable, str(Path(__file__).with_name("script.py")), str(folder)], check=True, timeout=900)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_a_callback_works_or_is_refused(name, column, outcomes):
    assert [each[name][column] for each in outcomes] == 2 * [REFUSED.get((name, column), "works")]


def together(folder: Path, name: str) -> None:
    assert_unchanged(TOGETHER[name], everything(0.0))


@pytest.mark.parametrize("name", TOGETHER)
def test_all_callbacks_together_change_nothing_at_level_0(name, tmp_path):
    execute(together, tmp_path / "run", name)
