"""The command ``python -m lightning_noise compare``: runs beside each other."""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_noise import plots, report
from lightning_noise.report.comparison import WIDTH, Comparison, Table

__all__ = ["main"]

_EPILOG = """\
A RUN is the folder of a run, such as lightning_logs/version_0, a folder with a report.json, or the file.
A folder with several runs is a recipe: its runs are taken as trainings that differ in their seeds alone, and
the mean over them is compared. Runs whose hparams.yaml differ in more are refused. A single folder
stands for the folders in it. The reports are those of trainer.test if every run has one.

examples:
  compare lightning_logs                         each version against version_0
  compare logs/plain logs/noise                  two recipes, each with a folder for every seed
  compare plain=logs/a/version_[0-2] noise=logs/b/version_0,logs/b/version_4
"""


def main(arguments: Sequence[str]) -> None:
    """Prints tables of runs and their differences, and writes them and a figure to a folder.

    Args:
        arguments: The arguments of the command.
    """
    parser = _make_parser()
    options = parser.parse_args(arguments)
    try:
        comparison = report.compare(options.runs, options.baseline)
    except ValueError as error:
        parser.error(str(error))
    last = "For these tables and a figure as files, add --output FOLDER."
    if options.output is not None:
        _write(comparison, options.output)
        last = f"Written to {options.output}: compare.md, compare.csv, compare.png and compare.pdf."
    try:
        _print(comparison)
        print(f"\n{last}", flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at its exit


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in a single line, without the usage."""
        self.exit(2, f"lightning_noise: {message}\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lightning_noise compare",
        description="Compares the reports of runs under the same noises: a table, paired differences and a figure.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run, a folder of runs, or NAME=RUN,RUN for the seeds of a recipe"
    )
    parser.add_argument("--baseline", metavar="RUN", help="a name in the table, or a further run (default: the first run)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where to write the tables and the figure")
    return parser


def _print(comparison: Comparison) -> None:
    """Prints the tables: aligned and with bold values in a terminal if rich is installed, otherwise as Markdown."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(comparison)
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if not console.is_terminal:
        print(comparison)
        return
    for table in comparison.tables(width=lambda text: len(text.replace("**", ""))):
        console.print(_to_rich(table), "")
    for line in comparison.legend():
        console.print(textwrap.fill(line, min(WIDTH, console.width)))


def _write(comparison: Comparison, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(f"{comparison}\n", encoding="utf-8")
    rows = list(comparison.rows())
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = plots.robustness_curve(*comparison.pooled.values(), names=list(comparison.pooled))
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"compare.{suffix}")


def _to_rich(table: Table) -> Any:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table as RichTable

    made = RichTable(title=escape(table.title), title_justify="left", title_style="bold", box=SIMPLE, show_edge=False)
    made.add_column(table.headings[0], overflow="fold")
    for heading in table.headings[1:]:
        made.add_column(escape(heading), no_wrap=True)
    for name, *cells in table.rows:
        made.add_row(escape(name), *(re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/bold]", cell) for cell in cells))
    return made
