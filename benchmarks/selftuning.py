"""Whether a level that tunes itself replaces a search over constant levels: accuracy under noise, clean accuracy, calibration.

Small convolutional networks, with and without batch normalisation, on three sets of real data that come with packages. All
runs of a seed have the same split, the same first weights and the same order of the batches. The best constant level is the one
with the highest mean accuracy under noise in validation, over the seeds; what the table shows is measured on test data. Runs
that are in the raw file are not repeated, so it can be stopped, resumed, and run by several processes.

Run: python -m benchmarks.selftuning
It needs: pip install -c benchmarks/constraints.txt -e ".[selftuning]"
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.evidence.tasks import Arrays, digits, mnist, series
from benchmarks.tables import RESULTS
from lightning_noise import AdaptiveLevel, InputNoise, Key, LabelSmoothing, WeightNoise, noise, rules
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.metrics import ExpectedCalibrationError
from lightning_noise.perturb.weights import PerturbedParameters

EPOCHS, BATCH, RATE = 25, 64, 3e-3
INPUT_LEVELS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
WEIGHT_LEVELS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
SMOOTHINGS = (0.02, 0.05, 0.1)
WEIGHT_PROBES, WEIGHT_DRAWS = (0.2, 0.4, 0.6, 0.8), 3
STARTS = (0.0, 3.0)  # of governed input noise
HARSHER = (1.35, 1.8)  # times the highest severity
REPORT = """# A level that tunes itself, beside the best of a grid of constant levels

Made by `python -m benchmarks.selftuning`, which says what was trained; every run is a line of `selftuning.jsonl`. All numbers
are per cent of the test data, means over seeds. Under noise: the mean over the families of noise, four in the inputs at seven
levels each, and where the noise of the training is in the weights also that, at four levels. Seen: under the family that was
trained with; unseen: under the others. The best constant is the one with the highest mean under noise in validation.
The grids of eight constants took {n_constant} runs so far, the governed ones {n_governed}.

## Noise in inputs and weights

{methods}

Paired differences in percentage points with 95 % t-intervals over the seeds: governed minus the best constant, and in the last
column governed minus none. The last level is that of the last epoch.

{differences}

## Label smoothing

{smoothing}
"""

NETS = ["plain", "batchnorm"]
SITES = ["input", "weight", "smoothing"]
METHODS = ["none", "constant", "governed"]


class Task(NamedTuple):
    """A set of data.

    Attributes:
        load: Samples of one channel, and their classes.
        sizes: Samples for training, validation and test.
        classes: The number of classes.
        families: The noises of the probes by name, the one of the training first.
        nets: The networks, without and with batch normalisation.
        sites: The places of the noise.
        unit: What the severities of additive noises are multiplied by; they are for data in [0, 1].
    """

    load: Callable[[], Arrays]
    sizes: tuple[int, int, int]
    classes: int
    families: dict[str, noise.Noise]
    nets: Sequence[str]
    sites: Sequence[str]
    unit: float = 1.0


class Run(NamedTuple):
    """What is trained; the level of a governed run is where it starts."""

    set: str
    net: str
    site: str
    method: str
    level: float
    seed: int


class Classifier(pl.LightningModule):
    """Two convolutions with stride 2 and two linear layers, for series as for images; 106,000 parameters for 28 x 28 pixels."""

    def __init__(self, shape: torch.Size, classes: int, normalised: bool):
        super().__init__()
        series = len(shape) == 1
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if series else (nn.Conv2d, nn.BatchNorm2d)
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32)):
            layers += [conv(before, after, 3, stride=2, padding=1), *([norm(after)] if normalised else []), nn.ReLU()]
        features = 32 * torch.Size(n // 4 for n in shape).numel()
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


ON_IMAGES: dict[str, noise.Noise] = {
    "gaussian": noise.Gaussian(),
    "shot": noise.Shot(),
    "impulse": noise.Impulse(low=0.0, high=1.0),
    "speckle": noise.Speckle(),
}
ON_SERIES: dict[str, noise.Noise] = {
    "gaussian": noise.Gaussian(),
    "pink": noise.ColoredNoise(exponent=1.0),
    "impulse": noise.Impulse(),
    "speckle": noise.Speckle(),
}
TASKS = {
    "mnist": Task(mnist, (3000, 500, 1500), 10, ON_IMAGES, NETS, SITES),
    "digits": Task(digits, (1097, 300, 400), 10, ON_IMAGES, ["batchnorm"], ["input", "smoothing"]),
    # the standard deviation of a series is 1, that of the digits about 1/3
    "power": Task(
        lambda: series("italy_power_demand"), (656, 220, 220), 2, ON_SERIES, ["plain"], ["input", "smoothing"], unit=3.0
    ),
}


def planned(sets: Iterable[str], sites: Iterable[str], methods: Iterable[str], seeds: int) -> Iterator[Run]:
    """All runs that are asked for, those of a set and seed together."""
    levels = {
        ("all", "none"): (0.0,),
        ("input", "constant"): INPUT_LEVELS,
        ("weight", "constant"): WEIGHT_LEVELS,
        ("smoothing", "constant"): SMOOTHINGS,
        ("input", "governed"): STARTS,
        ("weight", "governed"): (0.0,),
        ("smoothing", "governed"): (0.0,),
    }
    for set_, seed in product(sets, range(seeds)):
        task = TASKS[set_]
        for net, site, method in product(task.nets, ("all", *(site for site in task.sites if site in sites)), methods):
            yield from (Run(set_, net, site, method, level, seed) for level in levels.get((site, method), ()))


def noise_callback(run: Run) -> NoiseCallback:
    rule = rules.SignedGap() if run.site == "smoothing" else rules.Governor(chance=1 / TASKS[run.set].classes)
    level = AdaptiveLevel(rule, start=run.level) if run.method == "governed" else run.level
    if run.site == "smoothing":
        return LabelSmoothing(level)
    if run.site == "weight":
        return WeightNoise(noise.Gaussian(), level, relative="std")
    return InputNoise(noise.Gaussian(), level, per_sample=True)


@cache
def loaded(set_: str) -> Arrays:
    return TASKS[set_].load()


@lru_cache(maxsize=1)
def split(set_: str, seed: int) -> dict[str, Arrays]:
    """Train, validation and test data with the same shares of the classes."""
    from sklearn.model_selection import train_test_split

    (x, y), (train, validation, test) = loaded(set_), TASKS[set_].sizes
    rest, indices = range(len(y)), {}
    for part, size in (("test", test), ("validation", validation), ("train", train)):
        if len(rest) > size:
            rest, indices[part] = train_test_split(rest, test_size=size, stratify=y[list(rest)], random_state=seed)
        else:
            indices[part] = rest
    return {part: (x[list(rows)], y[list(rows)]) for part, rows in indices.items()}


@lru_cache(maxsize=1)
def probes(set_: str, seed: int) -> dict[str, dict[str, list[Tensor]]]:
    """Validation and test inputs under each family at each level, the same for all runs of a seed."""
    task, parts = TASKS[set_], split(set_, seed)
    noisy: dict[str, dict[str, list[Tensor]]] = {}
    for part in ("validation", "test"):
        noisy[part] = {}
        for name, family in task.families.items():
            generator = torch.Generator().manual_seed(seed)
            unit = task.unit if family.additive else 1.0
            levels = [unit * level for level in (*family.severities, *(h * family.severities[-1] for h in HARSHER))]
            noisy[part][name] = [family(parts[part][0], level, generator=generator) for level in levels]
    return noisy


def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    return (module(x).argmax(1) == y).float().mean().item()


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def under_weight_noise(module: nn.Module, x: Tensor, y: Tensor, level: float, draw: int) -> float:
    noisy = PerturbedParameters(
        module, None, noise.Gaussian(), level, Key((draw,)), relative="std", gradient="straight_through"
    )
    noisy.enter()
    try:
        return accuracy(module, x, y)
    finally:
        noisy.exit()


@torch.inference_mode()
def measured(module: nn.Module, run: Run, part: str) -> dict[str, float]:
    """Clean accuracy, loss and calibration error, and the mean accuracy over the levels of each family."""
    module.eval()
    x, y = split(run.set, run.seed)[part]
    logits, ece = module(x), ExpectedCalibrationError()
    ece.update(logits, y)
    values = {
        "clean": (logits.argmax(1) == y).float().mean().item(),
        "loss": F.cross_entropy(logits, y).item(),
        "ece": ece.compute().item(),
    }
    families = probes(run.set, run.seed)[part]
    values |= {name: mean(accuracy(module, noisy, y) for noisy in at_levels) for name, at_levels in families.items()}
    draws = product(WEIGHT_PROBES, range(WEIGHT_DRAWS))
    values["weight"] = mean(under_weight_noise(module, x, y, level, draw) for level, draw in draws)
    return {key: round(value, 5) for key, value in values.items()}


def train(run: Run) -> dict[str, Any]:
    """Trains a network and returns what was measured of it."""
    began = time.process_time()
    pl.seed_everything(run.seed, verbose=False)  # the same weights and the same order of the data in all runs of a seed
    parts, task = split(run.set, run.seed), TASKS[run.set]
    callbacks = [] if run.method == "none" else [noise_callback(run)]
    module = Classifier(parts["train"][0].shape[2:], task.classes, run.net == "batchnorm")
    loaders = {
        part: DataLoader(TensorDataset(*parts[part]), batch_size=BATCH, shuffle=part == "train")
        for part in ("train", "validation")
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=list[pl.Callback](callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loaders["train"], loaders["validation"])
    found = {part: measured(module, run, part) for part in ("validation", "test")}
    moves = {"moves": moved(callbacks[0])} if run.method == "governed" else {}
    return {**run._asdict(), **found, **moves, "seconds": round(time.process_time() - began, 1)}


def moved(callback: NoiseCallback) -> dict[str, list[Any]]:
    """What a governed callback saw and did, a value for each validation; the level is that of the epoch before it."""
    assert callback.adaptive is not None
    keys = ["level", "clean", "reason", *(["boundary"] if callback.adaptive.setting.rule.needs_boundary else [])]
    columns = {key: [getattr(decision, key) for decision in callback.adaptive.history] for key in keys}
    return {key: [v if key == "reason" else round(v, 4) for v in column] for key, column in columns.items()}


def finished(raw: Path) -> dict[Run, dict[str, Any]]:
    """The runs in the raw file, and what was measured of each."""
    lines = raw.read_text().splitlines() if raw.exists() else []
    records = [json.loads(line) for line in lines]
    return {Run(*(record[field] for field in Run._fields)): record for record in records}


class Group(NamedTuple):
    """The runs of one method at one level, a seed each, seen as noise of one site."""

    method: str
    level: float
    site: str
    records: dict[int, dict[str, Any]]

    @property
    def name(self) -> str:
        return {"none": "none", "constant": f"constant {self.level:g}", "governed": f"governed from {self.level:g}"}[
            self.method
        ]

    def values(self, score: str, part: str = "test") -> dict[int, float]:
        """A score by seed; in per cent."""
        return {seed: 100 * scored(record, self.site, part)[score] for seed, record in self.records.items()}

    def mean(self, score: str, part: str = "test") -> float:
        return mean(self.values(score, part).values())

    def less(self, other: Group, score: str) -> str:
        """The mean of the paired differences to another group, and the half-width of its 95 % t-interval."""
        one, two = self.values(score), other.values(score)
        return interval([one[seed] - two[seed] for seed in one.keys() & two.keys()])

    def last_levels(self) -> str:
        levels = [record["moves"]["level"][-1] for record in self.records.values()]
        return f"{mean(levels):.2f} ({min(levels):.2f} to {max(levels):.2f})"


def scored(record: dict[str, Any], site: str, part: str) -> dict[str, float]:
    """Accuracies under all noises, under that of the training, and under those that it had not."""
    found = record[part]
    noisy = [found[family] for family in TASKS[record["set"]].families]
    seen, *unseen = [found["weight"], *noisy] if site == "weight" else noisy
    return {"clean": found["clean"], "ece": found["ece"], "noisy": mean([seen, *unseen]), "seen": seen, "unseen": mean(unseen)}


def interval(values: list[float]) -> str:
    from scipy.stats import t

    if len(values) < 2:
        return f"{mean(values):+.2f}"
    half = t.ppf(0.975, len(values) - 1) * torch.tensor(values).std().item() / len(values) ** 0.5
    return f"{mean(values):+.2f} ± {half:.2f}"


def grouped(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], list[Group]]:
    """The groups by data, network and site; the runs without noise are in each."""
    found: dict[tuple[str, str, str], dict[tuple[str, float], Group]] = {}
    for record in sorted(records, key=lambda record: METHODS.index(record["method"])):
        for site in SITES if record["method"] == "none" else [record["site"]]:
            method, level = key = record["method"], record["level"]
            groups = found.setdefault((record["set"], record["net"], site), {})
            groups.setdefault(key, Group(method, level, site, {})).records[record["seed"]] = record
    return {
        place: sorted(groups.values(), key=lambda group: (group.method == "governed", group.level))
        for place, groups in found.items()
        if len(groups) > 1
    }


def best_constant(groups: list[Group]) -> Group:
    """The constant level with the highest mean accuracy under noise in validation, over the seeds that all levels have."""
    constants = [group for group in groups if group.method == "constant"]
    values = [group.values("noisy", "validation") for group in constants]
    common = set.intersection(*(set(by_seed) for by_seed in values))
    means = [mean(by_seed[seed] for seed in common) for by_seed in values]
    return constants[means.index(max(means))]


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; numbers are written with one decimal."""
    columns = head.split(", ")
    lines = [columns, ["---"] * len(columns), *([f"{c:.1f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_methods(places: dict[tuple[str, str, str], list[Group]]) -> Iterator[list[object]]:
    for place, groups in places.items():
        best = best_constant(groups)
        for group in groups:
            if group.method != "constant" or group is best:
                name = f"best {group.name}" if group is best else group.name
                yield [*place, name, len(group.records), *map(group.mean, ("clean", "noisy", "seen", "unseen"))]


def of_differences(places: dict[tuple[str, str, str], list[Group]]) -> Iterator[list[object]]:
    for place, groups in places.items():
        none, best = groups[0], best_constant(groups)
        for group in groups:
            if group.method == "governed":
                to_best = [group.less(best, score) for score in ("noisy", "seen", "unseen", "clean")]
                yield [*place, group.name, group.last_levels(), f"{best.level:g}", *to_best, group.less(none, "clean")]


def of_smoothing(places: dict[tuple[str, str, str], list[Group]]) -> Iterator[list[object]]:
    for (set_, net, _), groups in places.items():
        none = groups[0]
        for group in groups:
            ratio = f"{group.mean('ece') / none.mean('ece'):.2f}"
            last = group.last_levels() if group.method == "governed" else ""
            means = map(group.mean, ("clean", "noisy", "ece"))
            yield [set_, net, group.name, len(group.records), *means, ratio, group.less(none, "noisy"), last]


def report(records: list[dict[str, Any]]) -> str:
    places = grouped(records)
    noises = {place: groups for place, groups in places.items() if place[2] != "smoothing"}
    smoothings = {place: groups for place, groups in places.items() if place[2] == "smoothing"}
    tuned = [record["method"] for record in records if record["site"] in ("input", "weight")]
    return REPORT.format(
        n_constant=tuned.count("constant"),
        n_governed=tuned.count("governed"),
        methods=table("data, network, noise in, level, runs, clean, under noise, seen, unseen", of_methods(noises)),
        differences=table(
            "data, network, noise in, level, last level (range), best constant, under noise, seen, unseen, clean, clean - none",
            of_differences(noises),
        ),
        smoothing=table(
            "data, network, smoothing, runs, clean, under noise, ECE, ECE / none, under noise - none, last level (range)",
            of_smoothing(smoothings),
        ),
    )


def main() -> None:
    options = parsed()
    raw = RESULTS / "selftuning.jsonl"
    for run in planned(options.sets, options.sites, options.only, options.seeds) if not options.table else ():
        if run not in finished(raw):
            record = train(run)
            with raw.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(*run, record["seconds"], record["test"], flush=True)
    (RESULTS / "selftuning.md").write_text(report(list(finished(raw).values())))


def parsed() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--sets", type=listed, default=list(TASKS), help="sets of data, with commas")
    parser.add_argument("--sites", type=listed, default=SITES, help="places of the noise, with commas")
    parser.add_argument("--only", type=listed, default=METHODS, help="methods, with commas")
    parser.add_argument("--table", action="store_true", help="train nothing and write the table")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    main()
