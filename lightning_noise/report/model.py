"""The report of a monitor: figures with their errors, and their differences to an earlier report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_noise._version import __version__
from lightning_noise.metrics.functional import corruption_error, mean_corruption_error
from lightning_noise.metrics.statistics import jackknife_error, t_interval, wilson_interval

__all__ = ["corruption", "corruption_errors", "differences", "make", "markdown", "read", "values_of", "write"]

Report = dict[str, Any]
Figure = dict[str, Any]

_FILE = "report.json"
_PARTS = ("version", "task", "n", "draws", "seed", "noises", "weights", "sizes", "figures")
# means over samples of what is between 0 and 1
_PROPORTIONS = ("accuracy", "accuracy_mean", "accuracy_area", "flip_rate", "flip_rate_mean", "noise_detected", "score")


def make(
    values: Mapping[str, float],
    without: Sequence[Mapping[str, float]],
    sizes: Sequence[int],
    *,
    n: int | None = None,
    noises: Mapping[str, str],
    levels: Mapping[str, Sequence[float]],
    spread: Mapping[str, float] | None = None,
    weights: Collection[str] = (),
    draws: int = 1,
    task: str = "multiclass",
    seed: int = 0,
) -> Report:
    r"""Returns a report, which is made of what JSON can hold and of NaN.

    The interval of a figure is the value :math:`\pm \, t_{0.975} \sqrt{\text{SE}^2 + \text{spread}^2}` with the error of
    :func:`~lightning_noise.metrics.jackknife_error`. That of an accuracy, a flip rate and their means is Wilson's with the
    number of samples that this error stands for, so that a model without a mistake is not certain to make none. 95 of 100
    intervals hold what the figure is on average over data of this size; it is fewer where few samples make it (86 for a drop
    that 2 of 100 samples make, 92 for 8 of 400) and more for an ECE near its floor.

    Args:
        values: The figures: ``clean/<metric>``, ``<tag>/<level>/<metric>``, and what summarises them.
        without: The same figures without each group of samples in turn.
        sizes: The number of samples in each group; of no groups there are no intervals.
        n: The number of samples; left out, that in the groups.
        noises: What each tag stands for, in words that are the same for equal noises.
        levels: The levels of each tag.
        spread: Standard errors over the draws of figures whose draw all samples share, as noise in weights. That of
            a noise that is drawn for each sample is in the scatter of the groups already.
        weights: The tags of which all samples share a draw.
        draws: The number of draws of each noise, of which the values are means.
        task: The kind of the metrics.
        seed: The seed of the draws.

    Example:
        >>> values, without = {"clean/accuracy": 0.75}, [{"clean/accuracy": 0.5}, {"clean/accuracy": 1.0}]
        >>> report = make(values, without, [2, 2], noises={}, levels={})
        >>> report["figures"]["clean/accuracy"]["standard_error"]  # the groups have 1 and 0.5
        0.25
    """
    spread = spread or {}
    figures = {}
    for key, value in values.items():
        left_out = [group[key] for group in without]
        errors = [(jackknife_error(value, left_out, sizes), _degrees(sizes))]
        if key in spread:
            errors.append((spread[key], draws - 1))
        proportion = key.rpartition("/")[2] in _PROPORTIONS
        interval = wilson_interval(value, errors, sum(sizes)) if proportion else t_interval(value, errors)
        figures[key] = {"value": value, **interval._asdict(), "spread": spread.get(key, 0.0), "without": left_out}
    return {
        "version": __version__,
        "task": task,
        "n": sum(sizes) if n is None else n,
        "draws": draws,
        "seed": seed,
        "noises": {tag: {"noise": noise, "levels": list(levels[tag])} for tag, noise in noises.items()},
        "weights": list(weights),
        "sizes": list(sizes),
        "figures": figures,
    }


def write(folder: str | Path, report: Report, baseline: Report | None = None) -> None:
    """Writes ``report.json``, which can be a baseline later, and ``report.md`` for people into a folder.

    A number that is not finite is null in the JSON file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(report, baseline), encoding="utf-8")
    (folder / _FILE).write_text(json.dumps(_replaced(report, _null), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: str | Path) -> Report:
    """Reads a report from ``report.json`` or the folder that holds it; null becomes NaN.

    Raises:
        ValueError: There is no file, or it is no report.
    """
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no report at {path}; give a report.json that a monitor has written, or its folder")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); give a report.json that a monitor has written") from error
    lacking = [part for part in _PARTS if not isinstance(report, dict) or part not in report]
    if lacking:
        raise ValueError(f"{file} is no report: it lacks {lacking}; give a report.json that a monitor has written")
    return _replaced(report, lambda value: math.nan if value is None else value)


def differences(report: Report, baseline: Report) -> dict[str, Figure]:
    """Returns the report's figures minus those of a baseline, each with its error and interval.

    Figures are compared where they were measured in both through the same noises at the same levels. Where the groups are of
    equal sizes, the differences are paired: a sample is in the same group of both, so what makes it hard for both cancels. If
    the samples were others after all, the paired error is still right. Where the sizes differ, the errors are independent and
    their squares are added. The spread over draws always counts as independent.

    Example:
        >>> one, two = (make({"clean/loss": x}, [{"clean/loss": x}] * 2, [1, 1], noises={}, levels={}) for x in (0.5, 0.75))
        >>> differences(one, two)["clean/loss"]["value"]
        -0.25
    """
    keys = [key for key in report["figures"] if _seen_through(report, key) == _seen_through(baseline, key)]
    keys = [key for key in keys if key in baseline["figures"]]
    return _compared(lambda new, old: {key: new[key] - old[key] for key in keys}, report, baseline)


def corruption(report: Report, baseline: Report) -> dict[str, Figure]:
    """Returns what :func:`corruption_errors` does, of all noises that are in both reports, with errors and intervals.

    The errors are as in :func:`differences`, but do not hold the spread over draws.
    """
    noises = {tag: noise["levels"] for tag, noise in report["noises"].items() if baseline["noises"].get(tag) == noise}
    return _compared(lambda new, old: corruption_errors(new, old, noises), report, baseline)


def corruption_errors(
    values: Mapping[str, float], baseline: Mapping[str, float], levels: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Returns how many errors a model makes under noise for each that a baseline makes.

    Args:
        values: Figures, with ``<tag>/<level>/accuracy`` among them.
        baseline: Those of the baseline.
        levels: The levels of each tag.

    Returns:
        ``<tag>/corruption_error``, the errors summed over the levels divided by those of the baseline, for each tag of which
        both have accuracies at all levels, and ``mce``, their mean.

    References:
        Benchmarking Neural Network Robustness (Hendrycks and Dietterich, 2019), https://arxiv.org/abs/1903.12261, where the
        baseline is AlexNet.

    Example:
        >>> corruption_errors({"gaussian/0.1/accuracy": 0.75}, {"gaussian/0.1/accuracy": 0.5}, {"gaussian": [0.1]})
        {'gaussian/corruption_error': 0.5, 'mce': 0.5}
    """
    keys = {tag: [f"{tag}/{level:g}/accuracy" for level in of_tag] for tag, of_tag in levels.items()}
    held = {tag: names for tag, names in keys.items() if names and values.keys() & baseline.keys() >= set(names)}
    if not held:
        return {}
    new, old = ({tag: [1 - found[key] for key in names] for tag, names in held.items()} for found in (values, baseline))
    ratios = {f"{tag}/corruption_error": corruption_error(new[tag], old[tag]) for tag in held}
    return ratios | {"mce": mean_corruption_error(new, old)}


# --- errors and intervals


def _compared(
    function: Callable[[Mapping[str, float], Mapping[str, float]], dict[str, float]],
    report: Report,
    baseline: Report,
) -> dict[str, Figure]:
    """Figures of two reports, whose error is paired where the groups are the same."""
    new, old = values_of(report), values_of(baseline)
    total = function(new, old)
    if report["sizes"] == baseline["sizes"]:
        pairs = zip(_without(report), _without(baseline), strict=True)
        parts = [([function(one, other) for one, other in pairs], report["sizes"])]
    else:
        parts = [
            ([function(one, old) for one in _without(report)], report["sizes"]),
            ([function(new, other) for other in _without(baseline)], baseline["sizes"]),
        ]
    compared = {}
    for key, value in total.items():
        errors = [(jackknife_error(value, [w[key] for w in without], sizes), _degrees(sizes)) for without, sizes in parts]
        errors += [(r["figures"].get(key, {}).get("spread", 0.0), r["draws"] - 1) for r in (report, baseline)]
        compared[key] = {"value": value, **t_interval(value, errors)._asdict(), "paired": len(parts) == 1}
    return compared


def _degrees(sizes: Sequence[int]) -> int:
    return sum(size > 0 for size in sizes) - 1


def values_of(report: Report) -> dict[str, float]:
    """Returns the figures of a report alone."""
    return {key: figure["value"] for key, figure in report["figures"].items()}


def _without(report: Report) -> list[dict[str, float]]:
    return [
        {key: figure["without"][group] for key, figure in report["figures"].items()} for group in range(len(report["sizes"]))
    ]


def _seen_through(report: Report, key: str) -> Any:
    """What two figures of one key must have in common to be compared."""
    if key.startswith("clean/"):
        return None
    for tag, noise in report["noises"].items():
        if any(key.startswith(f"{tag}/{level:g}/") for level in noise["levels"]):
            return noise["noise"]
        if key.startswith(f"{tag}/"):
            return noise
    return report["noises"]  # a mean over all


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replaced(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(part, function) for key, part in value.items()}
    return [_replaced(part, function) for part in value] if isinstance(value, list) else function(value)


# --- for people


class _Column(NamedTuple):
    name: str
    unit: str = ""
    factor: float = 1.0
    note: str = ""

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


_COLUMNS = {
    "accuracy": _Column("accuracy", "%", 100),
    "loss": _Column("loss"),
    "brier": _Column("Brier score"),
    "ece": _Column(
        "ECE",
        "%",
        100,
        "the calibration error / what a perfectly calibrated model of the same confidences would show; bold where they differ "
        "(p < 0.01)",
    ),
    "signed_gap": _Column("too sure by", "%", 100, "mean confidence minus accuracy; negative is too unsure"),
    "flip_rate": _Column("flipped", "%", 100, "predictions that are not those without noise"),
    "entropy": _Column("entropy", "nats", 1, "of the predicted probabilities, on average"),
    "failure_auroc": _Column(
        "AUROC of errors", "", 1, "the chance that a wrong prediction is less sure than a right one; 0.5 is luck"
    ),
    "noise_detected": _Column("seen as noisy", "%", 100, "less sure than 95 % of the clean samples; no aim in itself"),
}
_ASIDE = ("ece_floor", "ece_z", "ece_p", "debiased_squared_error", "aurc", "noise_auroc")  # in the JSON file, or beside others
_SUMMARIES = {
    "accuracy_drop": _Column("accuracy lost", "points", 100),
    "accuracy_retention": _Column("skill kept", "%", 100, "the share of the accuracy above chance that is left"),
    "accuracy_area": _Column("area under accuracy", "%", 100, "over the level, from clean to the largest"),
    "loss_drop": _Column("loss gained", "", -1),
    "sensitivity": _Column("sensitivity", "", 1, "the loss gained by noise in the weights"),
}
_MCE = _Column("mCE")
_NOTHING = "-"
_VALUE, _INTERVAL, _CHANGE = "{value}", "{value} ({low} to {high})", "{signed} ± {half}"
_SAID = "**{value}{unit}** ({low} to {high})"


def markdown(report: Report, baseline: Report | None = None) -> str:
    """Returns the report as Markdown: the outcome, the differences to a baseline, the figures, and how to read them."""
    columns = {metric: _column(metric) for metric in _metrics(report)}
    sections = ["# Robustness report", _outcome(report, next(iter(columns)))]
    if baseline is not None:
        sections += ["## Against the baseline", *_comparison(report, baseline, columns)]
    sections += ["## Figures", _table(report, columns, report["figures"], _valued)]
    summaries = {
        key: column
        for key, column in _SUMMARIES.items()
        if any(f"{tag}/{key}" in report["figures"] for tag in report["noises"])
    }
    if summaries:
        sections += ["## Averaged over the levels", _summary(report, summaries)]
    return "\n\n".join([*sections, "## How to read it", _notes(report, (columns | summaries).values())]) + "\n"


def _outcome(report: Report, metric: str) -> str:
    """The main metric without noise, under noise and at its worst."""
    figures, column = report["figures"], _column(metric)
    said = [f"{_text(figures.get(key), column, _SAID)} {where}" for key, where in _ends(metric).items()]
    noisy = {key: f"under {' at '.join(place)}" for place, key in _positions(report, metric) if key in figures and place[1]}
    if noisy and metric in ("accuracy", "loss"):
        worst = (min if metric == "accuracy" else max)(noisy, key=lambda key: figures[key]["value"])
        said.append(f"{_text(figures[worst], column, _SAID)} at worst, {noisy[worst]}")
    return f"{column.name[0].upper()}{column.name[1:]} is {'; '.join(said)}."


def _ends(metric: str) -> dict[str, str]:
    return {f"clean/{metric}": "without noise", f"{metric}_mean": "on average under noise"}


def _comparison(report: Report, baseline: Report, columns: Mapping[str, _Column]) -> list[str]:
    columns = {
        metric: column._replace(unit="points" if column.unit == "%" else column.unit) for metric, column in columns.items()
    }
    changes, ratios = differences(report, baseline), corruption(report, baseline)
    metric, column = next(iter(columns.items()))
    said = [f"{_text(changes.get(key), column, _CHANGE + '{unit}')} {where}" for key, where in _ends(metric).items()]
    outcome = f"{column.name[0].upper()}{column.name[1:]} changes by {'; '.join(said)}."
    if ratios:
        each = ", ".join(f"{_text(ratios[key], _MCE, _VALUE)} under {key.rpartition('/')[0]}" for key in ratios if key != "mce")
        outcome += (
            f" For one error of the baseline under noise this model makes {_text(ratios['mce'], _MCE, _SAID)} (mCE): {each}."
        )
    legend = "This model minus the baseline; bold where the interval leaves out 0, as one in twenty does by chance."
    if not any(figure["paired"] for figure in changes.values()):
        legend += " The two were not measured on the same samples, so the differences are not paired."
    return [outcome, _table(report, columns, changes, _changed), legend]


def _summary(report: Report, columns: Mapping[str, _Column]) -> str:
    figures = report["figures"]
    rows = [
        [tag, *(_text(figures.get(f"{tag}/{key}"), column, _INTERVAL) for key, column in columns.items())]
        for tag in report["noises"]
    ]
    return _grid(["noise", *(column.heading for column in columns.values())], rows)


def _notes(report: Report, columns: Iterable[_Column]) -> str:
    lines = [f"**{column.name}**: {column.note}." for column in columns if column.note]
    shown = "; ".join(f"{tag} is `{noise['noise']}`" for tag, noise in report["noises"].items())
    draws = "one draw" if report["draws"] == 1 else f"{report['draws']} draws"
    lines += [
        f"Measured on {report['n']:,} samples with {draws} of the noise (seed {report['seed']}): {shown}.",
        "In brackets and after ± is the 95 % interval: what other samples of the same kind would give on average. It does not "
        "tell how another training of the model would turn out.",
    ]
    if report["weights"] and report["draws"] == 1:
        lines.append(
            f"All samples share the draw of {', '.join(report['weights'])}; how others would differ is not in the intervals."
        )
    lines.append(f"All figures with their errors are in `{_FILE}`, written by lightning_noise {report['version']}.")
    return "\n".join(f"- {line}" for line in lines)


def _metrics(report: Report) -> list[str]:
    """The metrics that have a column, the main one first."""
    prefixes = ("clean/", *(f"{tag}/{level:g}/" for tag, noise in report["noises"].items() for level in noise["levels"]))
    found = dict.fromkeys(
        key.removeprefix(prefix) for key in report["figures"] for prefix in prefixes if key.startswith(prefix)
    )
    return [key for key in _COLUMNS if key in found] + [key for key in found if key not in _COLUMNS and key not in _ASIDE]


def _column(metric: str) -> _Column:
    return _COLUMNS.get(metric, _Column(metric))


def _positions(report: Report, metric: str) -> list[tuple[tuple[str, str], str]]:
    """The noise and level of each row, and the key of the metric there."""
    noisy = [(tag, f"{level:g}") for tag, noise in report["noises"].items() for level in noise["levels"]]
    return [
        (("clean", ""), f"clean/{metric}"),
        *(((tag, level), f"{tag}/{level}/{metric}") for tag, level in noisy),
        (("mean", ""), f"{metric}_mean"),
    ]


def _table(
    report: Report,
    columns: Mapping[str, _Column],
    figures: Mapping[str, Figure],
    cell: Callable[[Mapping[str, Figure], str, str], str],
) -> str:
    cells = {metric: [cell(figures, key, metric) for _, key in _positions(report, metric)] for metric in columns}
    kept = [metric for metric in columns if any(text != _NOTHING for text in cells[metric])]
    rows = [[*place, *(cells[metric][i] for metric in kept)] for i, (place, _) in enumerate(_positions(report, ""))]
    return _grid(["noise", "level", *(columns[metric].heading for metric in kept)], rows)


def _valued(figures: Mapping[str, Figure], key: str, metric: str) -> str:
    text = _text(figures.get(key), _column(metric), _INTERVAL if metric in ("accuracy", "loss") else _VALUE)
    place, slash, name = key.rpartition("/")
    floor = figures.get(f"{place}{slash}{name.replace('ece', 'ece_floor')}")
    if metric != "ece" or floor is None:
        return text
    differs = figures.get(f"{key}_p", {}).get("value", math.nan) < 0.01
    return f"{f'**{text}**' if differs else text} / {_text(floor, _column(metric), _VALUE)}"


def _changed(figures: Mapping[str, Figure], key: str, metric: str) -> str:
    figure = figures.get(key)
    text = _text(figure, _column(metric), _CHANGE)
    return f"**{text}**" if figure is not None and (figure["low"] > 0 or figure["high"] < 0) else text


def _text(figure: Figure | None, column: _Column, form: str) -> str:
    """The figure in the units of the column, to the second digit of its half-width."""
    if figure is None or math.isnan(figure["value"]):
        return _NOTHING
    value, (low, high) = column.factor * figure["value"], sorted(column.factor * figure[end] for end in ("low", "high"))
    half = (high - low) / 2
    if not half > 0:  # nothing scatters, or the scatter is not known
        return f"{value:.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(half))))
    shown = {"value": value, "low": low, "high": high, "half": half}
    numbers = {name: f"{number:.{digits}f}" for name, number in shown.items()}
    return form.format(signed=f"{value:+.{digits}f}", unit=f" {column.unit}" if column.unit else "", **numbers)


def _grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
