"""The page of the docs shows the outcomes of the matrix."""

from __future__ import annotations

from matrix.cells import REFUSED
from matrix.columns import COLUMNS
from matrix.conditions import ONE_PROCESS, TOGETHER, TWO_PROCESSES
from matrix.table import PAGE, written


def test_the_table_in_the_docs_is_that_of_the_matrix():
    page = PAGE.read_text()
    assert page == written(page), "type PYTHONPATH=tests python -m matrix.table"


def test_what_is_refused_is_a_cell_of_the_matrix():
    cells = {(name, column) for name in ONE_PROCESS | TWO_PROCESSES | TOGETHER for column in COLUMNS}
    assert cells >= REFUSED.keys()
