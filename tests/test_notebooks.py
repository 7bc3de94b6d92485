"""The notebooks run from top to bottom, and what is committed in them is what a run shows."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

import lightning_noise

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# what makes each notebook short enough for a test; a notebook without a row fails
SHORTENINGS = {
    "01_start": {
        "EPOCHS = 12": "EPOCHS = 2",
        '"gaussian": [0.1, 0.2, 0.3, 0.4], "impulse": [0.05, 0.1, 0.2]': '"gaussian": [0.1], "impulse": [0.05]',
    },
    "02_monitors": {
        "EPOCHS = 12": "EPOCHS = 1",
        "every_n_epochs=4": "every_n_epochs=1",
        '"gaussian": [0.1, 0.2, 0.3, 0.4], "impulse": [0.05, 0.1, 0.2], "weight": [0.3, 0.6, 0.9]': (
            '"gaussian": [0.4], "impulse": [0.2], "weight": [0.9]'
        ),
        "range(100)": "range(2)",
        "n_draws=50": "n_draws=2",
    },
    "03_closed_loop": {"EPOCHS = 25": "EPOCHS = 4"},
    "04_series": {"EPOCHS = 10": "EPOCHS = 1"},
    "05_text": {"EPOCHS = 6": "EPOCHS = 1", "[::6]": "[::30]"},
    "06_tables": {"EPOCHS = 25": "EPOCHS = 1"},
    "07_tensorboard": {"EPOCHS = 16": "EPOCHS = 2"},
    "08_compare": {"EPOCHS = 12": "EPOCHS = 1", "n_draws=2": "n_draws=1"},
    "noises_and_schedules": {},  # trains nothing
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_is_committed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    committed = nbformat.read(path, as_version=4)
    shortened = _shortened(committed, SHORTENINGS[path.stem])
    # a kernel of the name in the notebook may belong to another interpreter; this one comes first
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # the kernel works in another folder, where a relative path to the package would lead nowhere
    monkeypatch.setenv("PYTHONPATH", str(Path(lightning_noise.__file__).parent.parent), prepend=os.pathsep)
    executed = NotebookClient(shortened, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for notebook in (committed, executed):
        code = _code(notebook)
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not {"error", "stderr"} & set().union(*map(_kinds, code))
    for expected, cell in zip(_code(committed), _code(executed), strict=True):
        assert _kinds(expected) == _kinds(cell), cell.source


def _shortened(notebook: NotebookNode, replacements: dict[str, str]) -> NotebookNode:
    """A copy without outputs in which each text is replaced; it must be there, or the test would quietly become a long one."""
    notebook = copy.deepcopy(notebook)
    for old, new in replacements.items():
        found = [cell for cell in _code(notebook) if old in cell.source]
        assert found, f"there is no {old!r} to be replaced"
        for cell in found:
            cell.source = cell.source.replace(old, new)
    for cell in _code(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _kinds(cell: NotebookNode) -> set[str]:
    """What the outputs of a cell are: the names of streams, the types of data, or an error."""
    kinds = [[output.name] if output.output_type == "stream" else output.get("data", ["error"]) for output in cell.outputs]
    return {kind for group in kinds for kind in group}
