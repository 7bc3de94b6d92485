"""A report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.evaluation.results import Estimate
from lightning_noise.report.changes import corruption, differences
from lightning_noise.report.model import FILE, Report, by_cell

__all__ = ["MCE", "Column", "capitalize", "column_of", "excludes_zero", "grid", "headline", "markdown", "shown_metrics"]

Rows = Mapping[tuple[Condition, str], Estimate]


class Column(NamedTuple):
    """How a metric is shown: its name, its unit, the factor from the value to the unit, and a note for the reader."""

    name: str
    unit: str = ""
    factor: float = 1.0
    note: str = ""

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


_COLUMNS = {
    "accuracy": Column("accuracy", "%", 100),
    "loss": Column("loss"),
    "perplexity": Column("perplexity", note="the exponential of the loss"),
    "mse": Column("MSE"),
    "mae": Column("MAE"),
    "r2": Column("R²", note="1 is perfect, 0 is the mean of the targets"),
    "brier": Column("Brier score", note="the squared error of the probabilities, summed over all classes, also for yes and no"),
    "ece": Column(
        "ECE",
        "%",
        100,
        "the expected calibration error, and after the slash that of a calibrated model with these confidences; bold if they "
        "differ (p < 0.01)",
    ),
    "top5_accuracy": Column("top-5 accuracy", "%", 100),
    "balanced_accuracy": Column("balanced accuracy", "%", 100, "the mean of the accuracies of the classes"),
    "adaptive_ece": Column("adaptive ECE", "%", 100, "in bins of equally many predictions"),
    "classwise_ece": Column("class-wise ECE", "%", 100, "of the probability of each class, averaged over the classes"),
    "signed_gap": Column("over-confidence", "%", 100, "mean confidence minus accuracy; a negative value is under-confidence"),
    "flip_rate": Column("flipped", "%", 100, "predictions that differ from those without noise"),
    "entropy": Column("entropy", "nats", 1, "mean entropy of the predicted probabilities"),
    "failure_auroc": Column(
        "failure AUROC", note="the probability that a wrong prediction is less confident than a right one; 0.5 is chance"
    ),
    "retention": Column("skill retained", "%", 100),
    "noise_detected": Column("seen as noisy", "%", 100, "less confident than 95 % of the clean samples; not a goal in itself"),
}
# only in the JSON file, or shown beside another metric
_HIDDEN = ("chance", "ece_floor", "ece_z", "ece_p", "debiased_squared_error", "aurc", "noise_auroc")
_WITH_INTERVAL = ("accuracy", "top5_accuracy", "balanced_accuracy", "loss", "mse")
_COSTS = {
    "accuracy_drop": Column("accuracy lost", "points", 100),
    "accuracy_retention": Column("skill retained", "%", 100, "the share of the accuracy above chance that is left"),
    "r2_retention": Column("skill retained", "%", 100, "the share of the R2 that is left"),
    "accuracy_area": Column("area under accuracy", "%", 100, "the mean of its curve over the level, from 0 to the largest"),
    "loss_drop": Column("loss gained", "", -1),
    "mse_drop": Column("MSE gained", "", -1),
    "sensitivity": Column("sensitivity", "", 1, "the loss gained by noise in the weights"),
}
MCE = Column("mCE")
_NOTHING = "-"
# forms of an estimate
_VALUE, _INTERVAL, _CHANGE = "{value}", "{value} ({low} to {high})", "{signed} ± {half}"
_OUTCOME = "**{value}{unit}** ({low} to {high})"


def markdown(report: Report, baseline: Report | None = None) -> str:
    """Returns the report as Markdown: the outcome, the differences to a baseline, all estimates, and how to read them."""
    columns = {metric: column_of(metric) for metric in shown_metrics(report)}
    sections = ["# Robustness report", _outcome(report, next(iter(columns)))]
    if baseline is not None:
        sections += ["## Against the baseline", *_comparison(report, baseline, columns)]
    sections += ["## Estimates", _table(report, columns, report.rows, _show_value)]
    costs = {
        metric: column
        for metric, column in _COSTS.items()
        if any((Condition(noise), metric) in report.rows for noise in report.noises)
    }
    if costs:
        sections += ["## Averaged over the levels", _cost_table(report, costs)]
    return "\n\n".join([*sections, "## How to read it", _notes(report, [*columns.values(), *costs.values()])]) + "\n"


def headline(report: Report) -> str:
    """Returns the first sentence of the report as plain text, for a terminal."""
    return _outcome(report, next(iter(shown_metrics(report)))).replace("**", "")


def _outcome(report: Report, metric: str) -> str:
    """Returns a sentence on the main metric without noise, under noise and at its worst."""

    def said(condition: Condition) -> str:
        return _text(report.rows.get((condition, metric)), column_of(metric), _OUTCOME)

    parts = [f"{said(CLEAN)} without noise", f"{said(NOISY)} on average under noise"]
    worst = report.rows.get((WORST, metric))
    for place, condition in _places(report).items():
        found = report.rows.get((condition, metric))
        if worst is not None and condition.level is not None and found is not None and found.value == worst.value:
            parts.append(f"{said(condition)} at worst, under {' at '.join(place)}")
            break
    return " ".join([f"{capitalize(column_of(metric).name)} is {'; '.join(parts)}.", *_doubts(report)])


def _doubts(report: Report) -> list[str]:
    """Returns what to know first about a model that may have no skill."""
    for metric in ("accuracy", "r2"):
        clean = report.rows.get((CLEAN, metric))
        if clean is None or report.chance is None:
            continue
        column = column_of(metric)
        name = f"The {column.name} without noise"
        if clean.value <= report.chance:
            return [f"{name} is not above chance, so there is no skill to retain."]
        if clean.low <= report.chance:
            chance = f"{column.factor * report.chance:.3g} {column.unit}".rstrip()
            return [f"{name} may be chance, {chance}, so the skill retained says little."]
    return []


def _comparison(report: Report, baseline: Report, columns: Mapping[str, Column]) -> list[str]:
    columns = {
        metric: column._replace(unit="points" if column.unit == "%" else column.unit) for metric, column in columns.items()
    }
    changes = by_cell(differences(report, baseline))
    metric, column = next(iter(columns.items()))
    clean, noisy = (_text(changes.get((condition, metric)), column, _CHANGE + "{unit}") for condition in (CLEAN, NOISY))
    outcome = f"{capitalize(column.name)} changes by {clean} without noise; {noisy} on average under noise."
    ratios = by_cell(corruption(report, baseline))
    if ratios:
        mce = ratios.pop((OVERALL, "mce"))
        each = ", ".join(f"{_text(ratio, MCE, _VALUE)} under {condition.noise}" for (condition, _), ratio in ratios.items())
        outcome += f" For one error of the baseline under noise this model makes {_text(mce, MCE, _OUTCOME)} (mCE): {each}."
    legend = "This model minus the baseline; bold if the interval excludes 0, which happens by chance once in twenty."
    if report.sizes != baseline.sizes:
        legend += " The two were not evaluated on the same samples, so the differences are not paired."
    return [outcome, _table(report, columns, changes, _show_change), legend]


def _cost_table(report: Report, columns: Mapping[str, Column]) -> str:
    rows = [
        [noise, *(_text(report.rows.get((Condition(noise), metric)), column, _INTERVAL) for metric, column in columns.items())]
        for noise in report.noises
    ]
    return grid(["noise", *(column.heading for column in columns.values())], rows)


def _notes(report: Report, columns: Iterable[Column]) -> str:
    lines = [f"**{column.name}**: {column.note}." for column in columns if column.note]
    units = {name: f" (level: {unit})" for name, unit in report.units.items() if unit != "level"}
    noises = "; ".join(f"{name} is `{noise}`{units.get(name, '')}" for name, noise in report.noises.items())
    trainings = (
        "The values are means over trainings, and the interval also covers another training."
        if report.n_trainings > 1
        else "It does not cover another training of the model."
    )
    guess = report.rows.get((CLEAN, "chance"))
    if guess is not None and not math.isnan(guess.value):
        lines.append(
            f"**chance**: the accuracy of the best constant guess, the most frequent class: {100 * guess.value:.3g} %."
        )
    draws = "one draw" if report.n_draws == 1 else f"{report.n_draws} draws"
    targets = f" with {report.n_targets:,} targets" if report.n_targets > report.n else ""
    lines += [
        f"Evaluated on {report.n:,} samples{targets} with {draws} of the noise (seed {report.seed}): {noises}.",
        "The row **mean** is the mean over all noises and levels.",
        f"The 95 % interval, in brackets or after ±, is for the mean over other samples of the same kind. {trainings}",
    ]
    if report.shared and report.n_draws == 1:
        lines.append(f"All samples share the draw of {', '.join(report.shared)}; the intervals do not cover other draws.")
    lines.append(f"All estimates with their errors are in `{FILE}`, written by lightning_noise {report.version}.")
    return "\n".join(f"- {line}" for line in lines)


def shown_metrics(report: Report) -> list[str]:
    """Returns the metrics that have a column, the main metric first."""
    found = dict.fromkeys(metric for condition, metric in report.rows if condition == CLEAN or condition.level is not None)
    hidden = _HIDDEN if report.n_targets > report.n else (*_HIDDEN, "perplexity")  # of sequences
    return [metric for metric in dict.fromkeys([*_COLUMNS, *found]) if metric in found and metric not in hidden]


def column_of(metric: str) -> Column:
    """Returns how a metric is shown."""
    return _COLUMNS.get(metric, Column(metric))


def excludes_zero(change: Estimate | None) -> bool:
    """Returns whether a difference has an interval that excludes 0."""
    return change is not None and (change.low > 0 or change.high < 0)


def _places(report: Report) -> dict[tuple[str, ...], Condition]:
    """Returns the condition of each row of a table, by the noise and level that the row shows."""
    noisy = {(noise, f"{level:g}"): Condition(noise, level) for noise, levels in report.levels.items() for level in levels}
    return {("clean", ""): CLEAN, **noisy, ("mean", ""): NOISY}


def _table(report: Report, columns: Mapping[str, Column], rows: Rows, show: Callable[[Rows, Condition, str], str]) -> str:
    places = _places(report)
    cells = {metric: [show(rows, condition, metric) for condition in places.values()] for metric in columns}
    shown = [metric for metric in columns if any(text != _NOTHING for text in cells[metric])]
    lines = [[*place, *(cells[metric][i] for metric in shown)] for i, place in enumerate(places)]
    return grid(["noise", "level", *(columns[metric].heading for metric in shown)], lines)


def _show_value(rows: Rows, condition: Condition, metric: str) -> str:
    text = _text(rows.get((condition, metric)), column_of(metric), _INTERVAL if metric in _WITH_INTERVAL else _VALUE)
    floor = rows.get((condition, "ece_floor"))
    if metric != "ece" or floor is None or text == _NOTHING:
        return text
    p = rows.get((condition, "ece_p"))
    expected = f"{column_of(metric).factor * floor.value:.{len(text.partition('.')[2])}f}"  # as many decimals
    return f"{f'**{text}**' if p is not None and p.value < 0.01 else text} / {expected}"


def _show_change(rows: Rows, condition: Condition, metric: str) -> str:
    change = rows.get((condition, metric))
    text = _text(change, column_of(metric), _CHANGE)
    return f"**{text}**" if excludes_zero(change) else text


def _text(estimate: Estimate | None, column: Column, form: str) -> str:
    """Returns the estimate in the units of the column, to the second digit of its half-width."""
    if estimate is None or math.isnan(estimate.value):
        return _NOTHING
    value, (low, high) = column.factor * estimate.value, sorted([column.factor * estimate.low, column.factor * estimate.high])
    half, unit = (high - low) / 2, f" {column.unit}" if column.unit else ""
    if not half > 0:  # nothing varies, or the error is unknown
        return f"{value:.4g}{unit if '{unit}' in form else ''}"
    digits = min(6, max(0, 1 - math.floor(math.log10(half))))
    numbers = {"value": value, "low": low, "high": high, "half": half}
    shown = {name: f"{number:.{digits}f}" for name, number in numbers.items()}
    return form.format(signed=f"{value:+.{digits}f}", unit=unit, **shown)


def capitalize(text: str) -> str:
    """Returns a text whose first letter is a capital."""
    return text[0].upper() + text[1:]


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown, with columns that are aligned in a terminal."""
    lines = [headings, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# a notebook shows a report as Markdown, and print a sentence; set here, because this module imports that of the class
Report._repr_markdown_ = markdown  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
Report.__str__ = headline  # pyright: ignore[reportAttributeAccessIssue]
