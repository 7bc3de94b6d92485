"""Claims, each one paired comparison: a recipe beside another one in the same task, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student

from benchmarks.evidence.tasks import TASKS

Records = Mapping[tuple[str, str, str], Mapping[int, dict[str, Any]]]  # by task, network and recipe, and by seed


def families(record: dict[str, Any]) -> list[str]:
    """The noises that count for a recipe, that of its training first; noise in the weights counts for recipes of weights."""
    trained = record["recipe"].split()[0]
    names = [*TASKS[record["task"]].families, *(["weights"] if trained == "weights" else [])]
    return sorted(names, key=lambda name: name != trained)


def _mean(record: dict[str, Any], part: str, names: Sequence[str]) -> float:
    return fmean(record[part][name] for name in names) if names else math.nan


COMPUTED: dict[str, Callable[[dict[str, Any], str], float]] = {
    "noisy": lambda record, part: _mean(record, part, families(record)),
    "seen": lambda record, part: _mean(record, part, families(record)[:1]),
    "unseen": lambda record, part: _mean(record, part, families(record)[1:]),
    "inputs": lambda record, part: _mean(record, part, list(TASKS[record["task"]].families)),
}
PERCENT = {"clean", "noisy", "seen", "unseen", "inputs", "corrupted", "weights", "ece", "noisy ece", "flips"}


def value(record: dict[str, Any], measure: str, part: str = "test") -> float:
    """What was measured of a run; shares in per cent."""
    found = COMPUTED[measure](record, part) if measure in COMPUTED else record[part].get(measure, math.nan)
    return 100 * found if measure in PERCENT else found


def by_seed(runs: Mapping[int, dict[str, Any]], measure: str, part: str = "test") -> dict[int, float]:
    return {seed: value(record, measure, part) for seed, record in runs.items()}


class Difference(NamedTuple):
    """The mean of paired differences, with its standard error and the t of a paired t-test."""

    mean: float
    error: float
    n: int

    @property
    def t(self) -> float:
        if self.mean == 0:
            return 0.0
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean)

    def __str__(self) -> str:
        return f"{round(self.mean, 2) + 0.0:+.2f} ± {self.error:.2f}"  # no -0.00


def difference(one: Mapping[int, float], two: Mapping[int, float]) -> Difference | None:
    """The difference over the seeds that both have, if there are two."""
    pairs = torch.tensor([one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())], dtype=torch.float64)
    if len(pairs) < 2:
        return None
    return Difference(pairs.mean().item(), pairs.std().item() / len(pairs) ** 0.5, len(pairs))


class Claim(NamedTuple):
    """A claim that a recipe changes a measure by at least, or at most, so much.

    Attributes:
        says: The claim, in words.
        task: Where it is tested, with the network.
        recipe: The recipe.
        versus: The recipe that it is compared with, or ``"best input"`` and ``"best weights"`` for the constant level that has
            the highest mean under noise in validation.
        measure: What is compared.
        at_least: The least difference, if the claim is of a gain.
        at_most: The greatest difference, if the claim is of a loss.
    """

    says: str
    task: tuple[str, str]
    recipe: str
    versus: str
    measure: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def verdict(self, found: Difference) -> str:
        """Holds or fails if the 95 % interval is on one side of the bound."""
        bound, sign = (self.at_least, 1) if self.at_least is not None else (self.at_most, -1)
        assert bound is not None
        half = float(student.ppf(0.975, found.n - 1)) * found.error
        above, below = sign * (found.mean - bound) - half > 0, sign * (found.mean - bound) + half < 0
        return "holds" if above else "**fails**" if below else "open"


PLAIN, NORMED, POWER = ("mnist", "plain"), ("mnist", "batchnorm"), ("power", "plain")
ARTICLE: Sequence[Claim] = [
    Claim("Gaussian noise in the inputs helps under noise", PLAIN, "input 0.7", "none", "noisy", at_least=0),
    Claim("… also under noises that were not trained with", PLAIN, "input 0.7", "none", "unseen", at_least=0),
    Claim("… also under blur, changes of brightness and compression", PLAIN, "input 0.7", "none", "corrupted", at_least=0),
    Claim("… and with batch normalization", NORMED, "input 0.7", "none", "noisy", at_least=0),
    Claim("Mixup helps under noise", PLAIN, "mixup 1", "none", "noisy", at_least=0),
    Claim("… and with batch normalization", NORMED, "mixup 1", "none", "noisy", at_least=0),
    Claim("Noise in the weights generalizes: a higher clean accuracy", PLAIN, "weights 0.6", "none", "clean", at_least=0),
    Claim("… and a higher accuracy under noise", PLAIN, "weights 0.6", "none", "inputs", at_least=0),
    Claim("Noise makes weights larger", PLAIN, "weights 0.6", "none", "norm", at_least=0),
    Claim(
        "… which helps: more than with the exact gradient",
        PLAIN,
        "weights 0.6",
        "weights 0.6 reparametrized",
        "noisy",
        at_least=0,
    ),
    Claim("Soft labels calibrate: a lower ECE", PLAIN, "smoothing 0.1", "none", "ece", at_most=0),
    Claim("… also under noise", PLAIN, "smoothing 0.1", "none", "noisy ece", at_most=0),
    Claim(
        "Noise at intervals costs at most 0.5 points beside noise in each batch",
        PLAIN,
        "input every 2nd epoch",
        "input constant",
        "noisy",
        at_least=-0.5,
    ),
    Claim("More noise later is better, in inputs", PLAIN, "input rising", "input falling", "noisy", at_least=0),
    Claim("… in weights", PLAIN, "weights rising", "weights falling", "noisy", at_least=0),
    Claim("… in labels: a lower ECE", PLAIN, "smoothing rising", "smoothing falling", "ece", at_most=0),
    Claim("Too much noise shows in clean accuracy", PLAIN, "input 1 in every sample", "none", "clean", at_most=0),
]
OURS: Sequence[Claim] = [
    Claim("C1: Gaussian noise gains 3 points under noise", PLAIN, "input 0.7", "none", "noisy", at_least=3),
    Claim("C1: … and clean accuracy loses at most 1 point", PLAIN, "input 0.7", "none", "clean", at_least=-1),
    Claim("C3: fewer predictions flip under noise", PLAIN, "input 0.7", "none", "flips", at_most=0),
    Claim("C4: noise in the weights gains under noise in the weights", PLAIN, "weights 0.6", "none", "weights", at_least=0),
    Claim("C4: … and 1 point under noise in the inputs", PLAIN, "weights 0.6", "none", "inputs", at_least=1),
    Claim("C5: smoothing 0.1 raises the ECE by 6 points", PLAIN, "smoothing 0.1", "none", "ece", at_least=6),
    Claim("C6: smoothing by the signed gap lowers the ECE", PLAIN, "smoothing by the signed gap", "none", "ece", at_most=0),
    Claim("C6: … also below that of smoothing 0.05", PLAIN, "smoothing by the signed gap", "smoothing 0.05", "ece", at_most=0),
    Claim("C7: mixup 1 loses 1 point under noise", PLAIN, "mixup 1", "none", "noisy", at_most=-1),
    Claim("C7: … and noise in the inputs turns this around", PLAIN, "mixup 1 and input 0.5", "none", "noisy", at_least=0),
    *[
        Claim(
            f"C8: governed from {start}, at most 1 point below the best constant",
            place,
            f"input governed from {start}",
            "best input",
            measure,
            at_least=-1,
        )
        for place in (PLAIN, NORMED)
        for start in (0, 3)
        for measure in ("noisy", "clean")
    ],
    *[
        Claim(
            "Governed weights, at most 1 point below the best constant",
            place,
            "weights governed",
            "best weights",
            "noisy",
            at_least=-1,
        )
        for place in (PLAIN, NORMED, ("digits", "batchnorm"), ("cancer", "plain"))
    ],
    Claim(
        "Governed impulse noise, at most 1 point below 0.2",
        PLAIN,
        "impulse governed",
        "impulse 0.2",
        "noisy",
        at_least=-1,
    ),
    *[
        Claim(
            "The signed gap costs at most 0.5 points of ECE",
            place,
            "smoothing by the signed gap",
            "none",
            "ece",
            at_most=0.5,
        )
        for place in (("digits", "batchnorm"), POWER, ("leaves", "plain"), ("cancer", "plain"))
    ],
    *[
        Claim(
            "Governed noise in series and tables gains under noise",
            (task, "plain"),
            "input governed from 0",
            "none",
            "noisy",
            at_least=0,
        )
        for task in ("power", "gunpoint", "leaves", "vowels", "cancer", "wine")
    ],
    Claim(
        "Noise in columns gains under noise: R² of a regression",
        ("diabetes", "plain"),
        "input governed from 0",
        "none",
        "noisy",
        at_least=0,
    ),
    Claim(
        "Noise in the targets of a regression costs at most 1 point of R²",
        ("diabetes", "plain"),
        "targets 0.3",
        "none",
        "clean",
        at_least=-1,
    ),
    Claim("NEFTune raises the clean accuracy", ("languages", "transformer"), "NEFTune 5", "none", "clean", at_least=0),
    Claim("Typos in training help under typos", ("languages", "transformer"), "typos 0.1", "none", "noisy", at_least=0),
]


def best_constant(records: Records, place: tuple[str, str], site: str) -> str | None:
    """The recipe of the constant level with the highest mean under noise in validation, over the seeds that all levels have."""
    constants = {
        recipe: by_seed(runs, "noisy", "validation")
        for (*where, recipe), runs in records.items()
        if tuple(where) == place
        and recipe.startswith(f"{site} ")
        and recipe.split()[1].replace(".", "").isdigit()
        and len(recipe.split()) == 2
    }
    common = set.intersection(*map(set, constants.values())) if constants else set()
    if not common:
        return None
    return max(constants, key=lambda recipe: sum(constants[recipe][seed] for seed in common))


def outcome(claim: Claim, records: Records) -> tuple[str, Difference] | None:
    """What the claim was compared with and the difference, if both sides were trained."""
    versus: str | None = claim.versus
    if claim.versus.startswith("best "):
        versus = best_constant(records, claim.task, claim.versus.removeprefix("best "))
    one, two = records.get((*claim.task, claim.recipe)), records.get((*claim.task, versus or ""))
    if versus is None or one is None or two is None:
        return None
    found = difference(by_seed(one, claim.measure), by_seed(two, claim.measure))
    return (versus, found) if found else None
