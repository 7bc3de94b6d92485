"""Trains what is not in the raw file yet, and writes the tables; it can be stopped and started again.

It needs ``pip install -c benchmarks/constraints.txt -e ".[evidence]"``, and about two hours on two processors for five seeds.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.evidence.recipes import RECIPES, names
from benchmarks.evidence.report import report, summary
from benchmarks.evidence.runs import RAW, Run, finished, quiet, train
from benchmarks.tables import RESULTS, ROOT, insert

PAGES = [ROOT / "docs" / "evidence.md", ROOT / "README.md"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    every = list(dict.fromkeys(task for task, _ in RECIPES))
    parser.add_argument("--tasks", nargs="+", choices=every, default=every, help="some of the tasks")
    parser.add_argument("--processes", type=int, default=2, help="how many trainings run side by side")
    parser.add_argument("--table", action="store_true", help="train nothing, and write the tables")
    return parser.parse_args()


def planned(options: argparse.Namespace) -> list[Run]:
    """The runs that are missing; those of a seed and task together, which share their data."""
    places = [place for place in RECIPES if place[0] in options.tasks]
    done = finished()
    runs = [Run(*name, seed) for seed in range(options.seeds) for name in names(places)]
    return [run for run in runs if run not in done]


def keep(record: dict[str, Any]) -> None:
    with RAW.open("a") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    options = parse()
    if not options.table:
        with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=quiet) as pool:
            for record in pool.map(train, planned(options)):
                keep(record)
                print(*(record[field] for field in Run._fields), record["seconds"], record["test"], flush=True)
    runs = finished()
    (RESULTS / "evidence.md").write_text(report(runs))
    (RESULTS / "evidence-summary.md").write_text(summary(runs))
    for page in PAGES:
        page.write_text(insert(page.read_text()))


if __name__ == "__main__":
    main()
