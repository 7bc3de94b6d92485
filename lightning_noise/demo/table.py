"""The comparison of two trainings: a table, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from rich.box import Box
from rich.table import Table
from rich.text import Text

from lightning_noise.demo.data import SIZES
from lightning_noise.demo.recipes import Recipe
from lightning_noise.demo.training import Scores
from lightning_noise.evaluation.conditions import CLEAN, Condition

__all__ = ["Comparison"]

# rules of dashes and no other lines, because every terminal, pipe and encoding can show them
_BOX = Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
_STYLES = {"raised": "green", "lowered": "red", "did not measurably change": ""}


@dataclass(frozen=True)
class Comparison:
    """Scores of two trainings under the same noises and levels.

    Attributes:
        recipe: The recipe of the second training.
        without: The scores of the training without the recipe.
        with_: The scores of the training with the recipe.
    """

    recipe: Recipe
    without: Scores
    with_: Scores

    def table(self) -> Table:
        """Returns the scores in percent, and the drop of the accuracy under each noise, averaged over its levels."""
        table = Table(box=_BOX, show_edge=False, pad_edge=False)
        table.add_column()
        for header in ("accuracy, %\nwithout", "\nwith", "\ngain", "ECE, %\nwithout", "\nwith"):
            table.add_column(header, justify="right")
        for condition, before in self.without.items():
            after = self.with_[condition]
            gain = Text(_gain(before.accuracy, after.accuracy), _STYLES[_verdict(before.accuracy, after.accuracy)])
            accuracies = _format(before.accuracy), _format(after.accuracy), gain
            table.add_row(self._label(condition), *accuracies, _format(before.ece), _format(after.ece))
        table.add_section()
        for noise in dict.fromkeys(condition.noise for condition in self.without if condition != CLEAN):
            before, after = _mean_drop(self.without, noise), _mean_drop(self.with_, noise)
            table.add_row(f"mean drop, {noise}", _format(before), _format(after), _gain(after, before))
        return table

    def conclusion(self) -> str:
        """Returns what the recipe gained and cost at the highest levels, as far as the test data can tell."""
        highest = {condition.noise: condition for condition in self.without}  # the levels rise
        changes: dict[str, list[str]] = {verdict: [] for verdict in _STYLES}
        for noise, condition in highest.items():
            before, after = self.without[condition].accuracy, self.with_[condition].accuracy
            place = "on clean images" if condition == CLEAN else f"under {noise} noise {condition.level:g}"
            changes[_verdict(before, after)].append(f"{place} ({_format(before)} to {_format(after)} %)")
        clauses = [f"{verdict} the accuracy {_enumerate(places)}" for verdict, places in changes.items() if places]
        ending = "" if changes["raised"] else " No accuracy was gained."
        return f"Training with {self.recipe.title} {'; it '.join(clauses)}.{ending}"

    def _label(self, condition: Condition) -> str:
        if condition == CLEAN:
            return condition.noise
        return f"{condition.noise:<10}{condition.level:>5g}" + (" *" if condition.noise == self.recipe.trained_noise else "")


def _percent(share: float) -> float:
    # the single precision of the logs, so that ties such as 81.75 % are rounded as there
    return 100 * torch.tensor(share).item()


def _format(share: float) -> str:
    return f"{_percent(share):.1f}"


def _gain(before: float, after: float) -> str:
    return f"{_percent(after) - _percent(before):+.1f}"


def _mean_drop(scores: Scores, noise: str) -> float:
    return fmean(scores[CLEAN].accuracy - score.accuracy for condition, score in scores.items() if condition.noise == noise)


def _verdict(before: float, after: float) -> str:
    """Returns whether two accuracies differ by more than two standard errors of independent test samples."""
    variance = (before * (1 - before) + after * (1 - after)) / SIZES["test"]
    if abs(after - before) <= 2 * math.sqrt(variance):
        return "did not measurably change"
    return "raised" if after > before else "lowered"


def _enumerate(places: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(places[:-1]), places[-1]]))
