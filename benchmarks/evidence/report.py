"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

import torch

from benchmarks.evidence.claims import ARTICLE, OURS, Claim, Records, by_seed, difference, outcome
from benchmarks.evidence.recipes import DOSE, RECIPES, SHAPES
from benchmarks.evidence.runs import Run
from benchmarks.tables import Table

DATA = {
    "mnist": "MNIST: 3,000 images of digits",
    "digits": "digits: 1,097 images of 8 x 8 pixels",
    "power": "ItalyPowerDemand: 656 series",
    "gunpoint": "GunPoint: 100 series",
    "leaves": "OSULeaf: 222 series",
    "vowels": "JapaneseVowels: 340 padded series of 12 channels",
    "cancer": "breast cancer: a table of 341 rows",
    "wine": "wine: a table of 98 rows",
    "diabetes": "diabetes: a regression of 242 rows",
}
NETS = {"plain": "", "batchnorm": ", with batch normalization"}
DEFAULT = "input governed from 0"
MEASURES = {
    "clean": "clean",
    "noisy": "under noise",
    "inputs": "noisy inputs",
    "seen": "seen",
    "unseen": "unseen",
    "corrupted": "corrupted",
    "weights": "noisy weights",
    "ece": "ECE",
    "noisy ece": "ECE under noise",
    "flips": "flips",
    "norm": "norm of the weights",
}
HEAD = """# Evidence

Means over up to {seeds} seeds with their standard errors, measured on test data by `python -m benchmarks.evidence`. All
measures but the norm are in per cent. For the regression, clean and under noise are R².

- `input 0.7`: the level of a sample is drawn between 0 and 0.7. Impulse noise and schedules of the inputs do likewise.
- noisy inputs: the mean over the noises of the task, five levels each.
- under noise: the same; for recipes that begin with `weights`, noise in the weights counts as one more noise.
- seen: under the noise of the recipe, or the first noise of the task if the recipe has none of them. unseen: under the others.
- corrupted: blur, brightness, compression and the like from imagecorruptions, at severities 2 and 4.
- flips: predictions that the middle level of the first noise changes.

A difference is paired by seed. A claim holds if the 95 % interval of its difference lies within the bound, fails if the
interval lies outside, and is open otherwise. A seed also draws the split of the data. The splits of two seeds overlap, so the
intervals say little about other data."""


def of_default(records: Records) -> Table:
    """What the adaptive level makes of each set of data; the table of the README."""
    table = Table(
        "Evidence",
        "Test accuracy of a network that trained without noise, and how much `InputNoise(noise.Gaussian(), AdaptiveLevel(), "
        "per_sample=True)` changes it, in per cent: means over seeds, and standard errors of the paired differences. For the "
        "regression, R² takes the place of the accuracy. Values under noise are means over five levels of each noise.",
        ["training data", "seeds", "clean", "under Gaussian noise", "under noises not trained with"],
    )
    for task, net in (place for place in RECIPES if DEFAULT in RECIPES[place]):
        without, trained = records.get((task, net, "none"), {}), records.get((task, net, DEFAULT), {})
        changes = {each: difference(by_seed(trained, each), by_seed(without, each)) for each in ("clean", "seen", "unseen")}
        cells = [
            f"{fmean(by_seed(without, each)[seed] for seed in without.keys() & trained.keys()):.1f}, {change}"
            for each, change in changes.items()
            if change is not None
        ]
        if cells:
            table.rows.append([DATA[task] + NETS[net], str(len(without.keys() & trained.keys())), *cells])
    return table


def of_claims(title: str, text: str, claims: Iterable[Claim], records: Records) -> Table:
    table = Table(title, text, ["claim", "data", "comparison", "measure", "seeds", "difference", "t", "bound", "verdict"])
    for claim in claims:
        found = outcome(claim, records)
        if found is not None:
            versus, d = found
            cells = [claim.says, ", ".join(claim.task), f"{claim.recipe}, not {versus}", MEASURES[claim.measure], str(d.n)]
            table.rows.append([*cells, str(d), f"{d.t:.1f}", claim.bound, claim.verdict(d)])
    return table


def of_shapes(records: Records) -> Iterator[Table]:
    """Schedules of one mean level, beside the constant level."""
    place = ("mnist", "plain")
    for site, dose in DOSE.items():
        measures = ["clean", "noisy", "ece", "noisy ece", "norm"]
        table = Table(
            f"Schedules of the mean level {dose:g}: {site}",
            f"Paired differences from the constant level on {', '.join(place)}; the first row has the means.",
            ["schedule", "seeds", *(MEASURES[each] for each in measures)],
        )
        constant = records.get((*place, f"{site} constant"), {})
        for recipe in (each for each in SHAPES if each.startswith(f"{site} ") and (*place, each) in records):
            runs = records[(*place, recipe)]
            cells = [
                with_error(by_seed(runs, each).values())
                if recipe.endswith("constant")
                else str(difference(by_seed(runs, each), by_seed(constant, each)) or "")
                for each in measures
            ]
            table.rows.append([recipe.removeprefix(f"{site} "), str(len(runs)), *cells])
        if constant:
            yield table


def of_place(place: tuple[str, str], records: Records) -> Table:
    """All recipes of a task and network; "under noise" is left out, which differs between recipes."""
    runs = {name: records[(*place, name)] for name in RECIPES[place] if (*place, name) in records}
    measures = [
        each
        for each in MEASURES
        if each != "noisy" and any(value == value for one in runs.values() for value in by_seed(one, each).values())
    ]
    table = Table(
        f"All recipes: {', '.join(place)}",
        "Means and standard errors.",
        ["recipe", "seeds", *(MEASURES[each] for each in measures)],
    )
    for name, one in runs.items():
        table.rows.append([name, str(len(one)), *(with_error(by_seed(one, each).values()) for each in measures)])
    return table


def with_error(values: Iterable[float]) -> str:
    found = torch.tensor(list(values))
    if not len(found) or found.isnan().any():
        return ""
    return f"{found.mean():.1f}" + (f" ± {found.std() / len(found) ** 0.5:.1f}" if len(found) > 1 else "")


def by_recipe(finished: dict[Run, dict[str, Any]]) -> Records:
    records: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for run, record in finished.items():
        records.setdefault((run.task, run.net, run.recipe), {})[run.seed] = record
    return records


def summary(finished: dict[Run, dict[str, Any]]) -> str:
    return str(of_default(by_recipe(finished))).removeprefix("#") + "\n"


def report(finished: dict[Run, dict[str, Any]]) -> str:
    records = by_recipe(finished)
    seeds = max((len(runs) for runs in records.values()), default=0)
    tables = [
        of_claims("Claims of others", "What is often said of noise.", ARTICLE, records),
        of_claims("Claims of this package", "What its defaults and rules rest on.", OURS, records),
        *of_shapes(records),
        *(of_place(place, records) for place in RECIPES if any(key[:2] == place for key in records)),
    ]
    return "\n\n".join([HEAD.format(seeds=seeds), *map(str, tables)]) + "\n"
