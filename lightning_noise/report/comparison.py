"""Several recipes beside each other: tables, and rows for other programs."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.evaluation.results import Estimate
from lightning_noise.report.changes import corruption, differences, pool
from lightning_noise.report.files import read
from lightning_noise.report.markdown import MCE, Column, column_of, excludes_zero, grid, shown_metrics
from lightning_noise.report.model import Report, by_cell
from lightning_noise.report.runs import check_trainings, find_recipes, read_trainings
from lightning_noise.report.shared import common_levels, higher_is_better, restrict

__all__ = ["WIDTH", "Comparison", "Table", "compare"]

WIDTH = 100  # of a table, in characters
_BESIDE = ("loss", "ece", "mae", "r2")  # the metrics that are shown beside the main metric, and those of the user

Rows = dict[tuple[Condition, str], Estimate]


class Table(NamedTuple):
    """A table with a title. A cell in two pairs of asterisks is bold."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        """Returns the table in Markdown."""
        return f"**{self.title}**\n\n{grid(self.headings, self.rows)}"


@dataclass(frozen=True)
class Comparison:
    """Recipes under the same noises and levels, and their differences to the first of them, the baseline.

    ``print(comparison)`` shows the tables; a notebook shows them without ``print``.

    Attributes:
        recipes: The reports of the trainings of each recipe, the baseline first.
        omitted: The noises and levels that not every recipe has.
        place: The folder of the report within the folder of each run. Empty if the reports were given.
    """

    recipes: Mapping[str, list[Report]]
    omitted: Sequence[str] = ()
    place: str = ""

    @cached_property
    def pooled(self) -> dict[str, Report]:
        """The report of each recipe, whose values are the means over its trainings."""
        return {name: pool(reports) for name, reports in self.recipes.items()}

    @property
    def baseline(self) -> str:
        """The name of the recipe that the others are compared with."""
        return next(iter(self.recipes))

    @cached_property
    def values(self) -> dict[str, Rows]:
        """The values of each recipe, with its mean corruption error against the baseline."""
        before = self.recipes[self.baseline]
        ratios = {name: by_cell(corruption(reports, before)) for name, reports in self.recipes.items()}
        ratios[self.baseline] = {cell: Estimate(*cell, 1.0) for cell in ratios[self.baseline]}
        return {name: {**report.rows, **ratios[name]} for name, report in self.pooled.items()}

    @cached_property
    def changes(self) -> dict[str, Rows]:
        """The differences of each further recipe to the baseline, whose corruption error is 1."""
        others = {name: reports for name, reports in self.recipes.items() if name != self.baseline}
        return {
            name: by_cell(differences(reports, self.recipes[self.baseline]))
            | {
                cell: replace(row, value=row.value - 1, low=row.low - 1, high=row.high - 1)
                for cell, row in self.values[name].items()
                if cell not in self.pooled[name].rows
            }
            for name, reports in others.items()
        }

    def tables(self, width: Callable[[str], int] = len) -> list[Table]:
        """Returns the main metric of each recipe, its differences to the baseline, and further metrics.

        Args:
            width: The characters that a cell takes. A table that would be wider than a page is split.
        """
        first = self.pooled[self.baseline]
        main, *others = [
            metric for metric in shown_metrics(first) if all((CLEAN, metric) in report.rows for report in self.pooled.values())
        ]
        names = {CLEAN: "clean", **{Condition(noise): noise for noise in first.noises}, NOISY: "mean", WORST: "worst"}
        cells = {(condition, main): name for condition, name in names.items()}
        column = column_of(main)
        tables = self._split(width, column.heading, cells)
        if self.changes:
            title = f"{column.name} minus that of {self.baseline}{', points' if column.unit == '%' else ''}"
            tables += self._split(width, title, cells, changes=True)
        own = [metric for metric in others if metric in _BESIDE or column_of(metric) == Column(metric)]
        cells = {
            (condition, metric): f"{column_of(metric).heading}, {names[condition]}"
            for metric in own[:3]
            for condition in (CLEAN, NOISY)
        }
        if self.changes:
            cells[OVERALL, "mce"] = MCE.heading
        return tables + self._split(width, "other metrics", cells)

    def legend(self) -> list[str]:
        """Returns the lines that explain the tables."""
        first, (baseline, *others) = self.pooled[self.baseline], self.recipes
        lines = [self._describe_intervals()]
        if others:
            samples = (
                f"the same {first.n:,} samples" if self._is_paired else "not on the same samples, so that it is not paired"
            )
            lines.append(
                f"`*` differs from {baseline}: the 95 % interval of the difference, on {samples}, excludes 0. By chance this "
                "happens once in twenty comparisons."
            )
            lines.append("Bold: the best of a column.")
        lines.append("mean is over all noises and levels, worst is the worst of them, and a noise is the mean over its levels.")
        if any((OVERALL, "mce") in rows for rows in self.changes.values()):
            lines.append(f"mCE: the errors under noise for each error of {baseline}, the mean over the noises.")
        noises = [f"{name} is `{noise}` at {_enumerate(first.levels[name])}" for name, noise in first.noises.items()]
        lines.append(f"{'; '.join(noises)}.")
        if self.omitted:
            lines.append(f"Not compared, because not every run has it: {'; '.join(self.omitted)}.")
        if self.place:
            lines.append(f"The reports are those of `{self.place}` in each run.")
        return lines

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the value of each metric of each recipe under each condition, with its difference to the baseline."""
        for name in self.recipes:
            for cell, row in self.values[name].items():
                change = self.changes.get(name, {}).get(cell)
                yield {
                    "run": name,
                    "trainings": len(self.recipes[name]),
                    "noise": row.condition.noise,
                    "level": row.condition.level,
                    "metric": row.metric,
                    **{part: getattr(row, part) for part in ("value", "low", "high")},
                    **{f"difference_{part}": getattr(change, part, None) for part in ("value", "low", "high")},
                }

    def __str__(self) -> str:
        """Returns the tables and the legend in Markdown."""
        return "\n\n".join([*map(str, self.tables()), "\n".join(map(_wrap, self.legend()))])

    _repr_markdown_ = __str__

    @property
    def _is_paired(self) -> bool:
        return len({report.sizes for reports in self.recipes.values() for report in reports}) == 1

    def _describe_intervals(self) -> str:
        several = {name: len(reports) for name, reports in self.recipes.items() if len(reports) > 1}
        single = [name for name in self.recipes if name not in several]
        knows_samples = all(reports[0].sizes for reports in self.recipes.values())
        text = "± is half the width of the 95 % interval"
        if not several:
            if not knows_samples:
                return "The metrics have no intervals; several trainings of each recipe give intervals over trainings."
            return f"{text} for the mean over other samples. It does not cover another training, because each recipe has one."
        if not single and len(set(several.values())) == 1:
            means = f"Each row is the mean of {next(iter(several.values()))} trainings"
        else:
            means = _enumerate([f"{name} is the mean of {k} trainings" for name, k in several.items()])
        covered = "other samples and another training" if knows_samples else "another training, but not other samples"
        text = f"{means}. {text}, which covers {covered}"
        has = "has" if len(single) == 1 else "each have"
        return f"{text}; {_enumerate(single)} {has} a single training, and another is not covered." if single else f"{text}."

    def _split(
        self, width: Callable[[str], int], title: str, cells: Mapping[tuple[Condition, str], str], *, changes: bool = False
    ) -> list[Table]:
        """Returns a table of the cells, or several with as many columns each if it would be too wide."""
        columns = {heading: self._column(cell, changes=changes) for cell, heading in cells.items()}
        shown = [(heading, column) for heading, column in columns.items() if any(text != "-" for text in column)]
        names = [name for name in self.recipes if not changes or name != self.baseline]
        room = WIDTH - 4 - max(map(len, names))
        widths = [3 + max(map(width, (heading, *column))) for heading, column in shown]
        size = len(shown)
        while size > 1 and any(sum(widths[i : i + size]) > room for i in range(0, len(shown), size)):
            size -= 1
        return [
            Table(title, ["run", *headings], [[name, *row] for name, *row in zip(names, *texts, strict=True)])
            for headings, texts in (zip(*shown[i : i + size], strict=True) for i in range(0, len(shown), max(1, size)))
        ]

    def _column(self, cell: tuple[Condition, str], *, changes: bool) -> list[str]:
        """Returns the texts of a column, with as many decimals in each row."""
        rows = [rows.get(cell) for rows in (self.changes if changes else self.values).values()]
        column = MCE if cell == (OVERALL, "mce") else column_of(cell[1])
        decimals = _decimals([column.factor * (row.high - row.low) / 2 for row in rows if row is not None])
        texts = [_text(row, column, decimals, is_signed=changes) for row in rows]
        if not changes and len({row.value for row in rows if row is not None}) > 1:
            best = (max if higher_is_better(self.recipes[self.baseline][0], cell[1]) else min)(row.value for row in rows if row)
            texts = [f"**{text}**" if row and row.value == best else text for row, text in zip(rows, texts, strict=True)]
        compared = self.changes.values() if changes else [{}, *self.changes.values()]
        return [text + _mark(each.get(cell)) for text, each in zip(texts, compared, strict=True)]


def compare(
    runs: Sequence[str | os.PathLike[str]] | Mapping[str, Any], baseline: str | os.PathLike[str] | None = None
) -> Comparison:
    """Compares runs under the noises and levels that all of them have.

    Args:
        runs: Folders of runs, as ``python -m lightning_noise compare`` reads them; or the reports of each recipe by name. A
            report may be a :class:`Report` or a path, and a list of them is the trainings of a recipe.
        baseline: The name of a recipe, or a further run. Default: the first recipe.

    Raises:
        ValueError: There is no report, the tasks differ, or no noise and level is in all reports.
    """
    first = None if baseline is None else os.fspath(baseline)
    if isinstance(runs, Mapping):
        recipes, place = {name: _load(name, reports) for name, reports in runs.items()}, ""
        if first is not None and first not in recipes:
            raise ValueError(f"baseline must be one of {list(recipes)}, got {first!r}")
    else:
        recipes, place = _search([os.fspath(run) for run in runs], first)
    if first in recipes:
        recipes = {first: recipes[first], **recipes}
    levels, omitted = _find_common(recipes)
    shared = {name: [restrict(report, levels) for report in reports] for name, reports in recipes.items()}
    return Comparison(shared, omitted, place)


def _load(name: str, reports: Any) -> list[Report]:
    listed = [reports] if isinstance(reports, Report | str | os.PathLike) else list(reports)
    loaded = [report if isinstance(report, Report) else read(os.fspath(report)) for report in listed]
    check_trainings(name, loaded, [f"{name} {i}" for i in range(len(loaded))])
    return loaded


def _search(runs: Sequence[str], baseline: str | None) -> tuple[dict[str, list[Report]], str]:
    """Returns the reports of each recipe, and their place in each run. A baseline that is a run comes first."""
    found, place = find_recipes(runs)
    names = [recipe.name for recipe in found]
    if baseline is not None and baseline not in names:
        try:
            found, place = find_recipes(runs, baseline)
        except ValueError as error:
            raise ValueError(f"baseline must be one of {names} or a run: {error}") from error
    return {recipe.name: read_trainings(recipe) for recipe in found}, place


def _find_common(recipes: Mapping[str, Sequence[Report]]) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Returns the levels of each noise that all recipes have, and what is left out."""
    reports = {name: reports[0] for name, reports in recipes.items()}
    tasks = {name: report.task for name, report in reports.items()}
    if len(set(tasks.values())) > 1:
        described = _enumerate([f"{name} is {task}" for name, task in tasks.items()])
        raise ValueError(f"the runs are of different tasks: {described}; compare runs of one task")
    levels = common_levels(list(reports.values()))
    if not levels:
        has = "; ".join(f"{name} has {_describe(report, report.levels)}" for name, report in reports.items())
        raise ValueError(
            f"the runs have no noise at the same level: {has}. Test each with the same monitor: type "
            "RobustnessMonitor(noises, levels) with equal arguments"
        )
    left = {
        name: {noise: [x for x in of_noise if x not in levels.get(noise, ())] for noise, of_noise in report.levels.items()}
        for name, report in reports.items()
    }
    omitted = [f"{_describe(reports[name], missing)} of {name}" for name, missing in left.items() if any(missing.values())]
    return levels, omitted


def _describe(report: Report, levels: Mapping[str, Sequence[float]]) -> str:
    noises = {noise: f"{noise} ({report.noises[noise]})" for noise in levels}
    return _enumerate([f"{noises[noise]} at {_enumerate(of_noise)}" for noise, of_noise in levels.items() if of_noise])


def _decimals(halves: Sequence[float]) -> int | None:
    """Returns the decimals that show two digits of the widest interval and one of the narrowest; None without intervals."""
    halves = [half for half in map(abs, halves) if half > 0]
    if not halves:
        return None
    return min(6, max(0, 1 - math.floor(math.log10(max(halves))), -math.floor(math.log10(min(halves)))))


def _text(row: Estimate | None, column: Column, decimals: int | None, *, is_signed: bool) -> str:
    if row is None or math.isnan(row.value):
        return "-"
    sign = "+" if is_signed else ""
    value, half = column.factor * row.value, abs(column.factor) * (row.high - row.low) / 2
    if decimals is None:
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.{decimals}f}" + ("" if math.isnan(half) else f"±{half:.{decimals}f}")


def _mark(change: Estimate | None) -> str:
    return " *" if excludes_zero(change) else ""


def _wrap(line: str) -> str:
    return textwrap.fill(f"- {line}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _enumerate(items: Sequence[Any]) -> str:
    texts = [f"{item:g}" if isinstance(item, float) else str(item) for item in items]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else ""
