"""Writes the table of docs/conditions.md: `PYTHONPATH=tests python -m matrix.table`."""

from __future__ import annotations

import re
from pathlib import Path

from matrix.cells import REFUSED
from matrix.columns import COLUMNS
from matrix.conditions import ONE_PROCESS, TOGETHER, TWO_PROCESSES

PAGE = Path(__file__).parents[2] / "docs" / "conditions.md"
_BEGIN, _END = "<!-- the table, written by `PYTHONPATH=tests python -m matrix.table` -->\n", "<!-- the end of the table -->\n"


def table() -> str:
    """Returns a row for each condition, and below the table the error of each cell that is refused."""
    header = ["", *(re.sub("^Label|Noise|Level|Monitor|(?<=Randomized)Smoothing", "", column).lower() for column in COLUMNS)]
    rows = [header, ["---"] * len(header)]
    for name in TWO_PROCESSES | TOGETHER | ONE_PROCESS:
        rows.append([name, *("refused" if (name, column) in REFUSED else "✓" for column in COLUMNS)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    errors = [f"- `{column}`, {name}: `{error}`" for (name, column), error in REFUSED.items()]
    return "\n".join(["", *lines, "", *errors, "", ""])


def written(page: str) -> str:
    """Returns the page with the table of today."""
    head, rest = page.split(_BEGIN)
    return head + _BEGIN + table() + _END + rest.split(_END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
