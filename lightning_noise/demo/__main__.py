"""`python -m lightning_noise`: what noise does to a classifier of real images, trained without and with a callback."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    RobustnessMonitor,
    WeightNoise,
    noise,
    rules,
    schedules,
)
from lightning_noise.callbacks.base import NoiseCallback

ON_IMAGES = {"gaussian": (0.1, 0.2, 0.3, 0.4), "speckle": (0.3, 0.6, 0.9), "impulse": (0.05, 0.1, 0.2)}
IN_WEIGHTS = {"weight": (0.2, 0.4, 0.6)}  # in standard deviations of each tensor
LEVELS = ON_IMAGES | IN_WEIGHTS
T = TypeVar("T")
SIZES = {"train": 1097, "validation": 300, "test": 400}


class Recipe(NamedTuple):
    """What the second of the two trainings has that the first has not.

    Attributes:
        title: What it is called in the output.
        callbacks: The callbacks at a level.
        level: The level, where none is given: a number or one that tunes itself.
        meaning: What a number is.
        max_level: The largest one that has a meaning.
        footnote: What is to be said of the noises in the table.
        tag: The noise in the table that the network was trained with, if any.
    """

    title: str
    callbacks: Callable[..., list[pl.Callback]]
    level: float | AdaptiveLevel
    meaning: str
    max_level: float = 10
    footnote: str = "No noise was in the inputs of either training."
    tag: str | None = None

    @property
    def default(self) -> str:
        return "it tunes itself" if isinstance(self.level, AdaptiveLevel) else f"{self.level:g}"


def _input(level: float | AdaptiveLevel) -> pl.Callback:
    risen = level if isinstance(level, AdaptiveLevel) else schedules.Linear(0.0, level, until=0.5)
    return InputNoise(noise.Gaussian(), risen, per_sample=True)


def _smoothing(level: float) -> pl.Callback:
    return LabelSmoothing(schedules.Linear(level, 0.0))


def _weights(level: float) -> pl.Callback:
    return WeightNoise(noise.Gaussian(), schedules.Linear(0.0, level, until=0.5), relative="std", gradient="reparametrized")


def _all(level: float) -> list[pl.Callback]:
    hidden = ActivationNoise(noise.Gaussian(), 0.1 * level, ["net.2", "net.5"], relative="std")
    gradients = GradientNoise(noise.Gaussian(), schedules.InverseTime(0.01 * level))
    return [_input(0.5 * level), _smoothing(0.1 * level), _weights(0.3 * level), hidden, gradients]


RECIPES = {
    "input": Recipe(
        "noise",
        lambda level: [_input(level)],
        level=AdaptiveLevel(rules.Governor(chance=0.1)),
        meaning="what the standard deviation rises to, pixels in [0, 1]",
        footnote="* the kind that was trained with; the others show what transfers.",
        tag="gaussian",
    ),
    "targets": Recipe(
        "label smoothing",
        lambda level: [_smoothing(level)],
        level=0.2,
        meaning="the smoothing at the start, which decays to 0",
        max_level=1,
    ),
    "mixup": Recipe(
        "mixup",
        # the last epochs are clean, so that batch normalisation ends with the statistics of images that are not mixed
        lambda level: [Mixup(schedules.Window(level, until=0.8))],
        level=1.0,
        meaning="alpha, which is 0 in the last fifth",
    ),
    "weights": Recipe(
        "noise in the weights",
        lambda level: [_weights(level)],
        level=0.5,
        meaning="what the noise rises to, in standard deviations of each weight tensor",
        footnote="* the kind that was trained with; no noise was in the inputs of either training.",
        tag="weight",
    ),
    "all": Recipe(
        "noise everywhere",
        _all,
        level=1.0,
        meaning="factor of the noise in inputs, targets, weights, activations and gradients",
        footnote="Noise was in inputs, targets, weights, activations and gradients.",
    ),
}


class DigitClassifier(pl.LightningModule):
    """A small convolutional network with batch normalisation; it knows nothing of noise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *_block(1, 16),
            *_block(16, 16),
            nn.MaxPool2d(2),
            *_block(16, 32),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ProgressLine(pl.Callback):
    """One line that says how far the training is and what the monitor last measured."""

    def __init__(self, label: str):
        self.label = label

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        clean, noisy = (
            100 * trainer.callback_metrics[f"robustness/{key}"].item() for key in ("clean/accuracy", "accuracy_mean")
        )
        accuracy = f"validation accuracy: clean {clean:5.1f} %, under noise {noisy:5.1f} %"
        line = f"  {self.label}  epoch {epoch:>3}/{last}   {accuracy}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if epoch == last else "", flush=True)
        elif epoch % 5 == 0 or epoch == last:
            print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains twice, prints the comparison and says where the logs are."""
    options = _options(arguments)
    recipe = RECIPES[options.recipe]
    _quieten()
    torch.set_num_threads(1)  # for a network as small as this, threads cost more than they give
    began = time.perf_counter()
    data = _digits(options.seed)
    print(f"{sum(SIZES.values())} handwritten digits of 8 x 8 pixels: " + ", ".join(f"{n} {k}" for k, n in SIZES.items()) + ".")
    print(f"One network with batch normalisation, trained twice from the same weights, epochs: {options.epochs}.\n")
    trainings = {"without": [], "with": recipe.callbacks(options.level)}
    results = {which: _run(which, recipe.title, data, options, callbacks) for which, callbacks in trainings.items()}
    said = [_table(results, recipe), *_tuned(trainings["with"]), _conclusion(results, recipe)]
    print("\n" + "\n\n".join(said) + "\n")
    logs = shlex.quote(str(options.root_dir))
    print(f"It took {time.perf_counter() - began:.0f} s. Look at both runs:\n\n  tensorboard --logdir {logs}\n")


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()


def _digits(seed: int) -> dict[str, Subset]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit('lightning_noise: the data come with scikit-learn: pip install "lightning_noise[demo]"')
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    dataset = TensorDataset(x, torch.tensor(labels))
    parts = random_split(dataset, list(SIZES.values()), torch.Generator().manual_seed(seed))
    return dict(zip(SIZES, parts, strict=True))


def _run(
    which: str, title: str, data: dict[str, Subset], options: argparse.Namespace, callbacks: list[pl.Callback]
) -> dict[str, float]:
    """Trains one network and returns what the monitor measured on the test data."""
    label = f"{which} {title}"
    pl.seed_everything(options.seed)  # the same weights and the same order of the data in both runs
    monitors = [
        RobustnessMonitor([noise.Gaussian(), noise.Speckle(), noise.Impulse(low=0.0, high=1.0)], ON_IMAGES),
        RobustnessMonitor(
            {"weight": WeightNoise(noise.Gaussian(), 0.0, relative="std", name="probe")}, IN_WEIGHTS, name="weights"
        ),
    ]
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(options.root_dir, name=label.replace(" ", "_")),
        callbacks=[*callbacks, *monitors, ProgressLine(label.ljust(len("without ") + len(title)))],
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = DigitClassifier()
    loaders = {part: DataLoader(dataset, batch_size=64, shuffle=part == "train") for part, dataset in data.items()}
    trainer.fit(module, loaders["train"], loaders["validation"])
    trainer.test(module, loaders["test"], verbose=False)
    measured = {key.removeprefix("test/"): value.item() for key, value in trainer.callback_metrics.items()}
    shown = ("robustness/", "weights/weight/")
    return {key.partition("/")[2]: value for key, value in measured.items() if key.startswith(shown)}


def _table(results: dict[str, dict[str, float]], recipe: Recipe) -> str:
    without, with_ = results.values()
    line = "-" * 72
    rows = [
        f"{'':22}{'test accuracy, %':^30}{'ECE, %':>14}",
        f"{'':22}{'without':>9}{'with':>9}{'gain':>9}  {'without':>12}{'with':>9}",
        line,
    ]
    for tag, levels in {"clean": (None,), **LEVELS}.items():
        for level in levels:
            key = tag if level is None else f"{tag}/{level:g}"
            label = "clean" if level is None else f"{tag:<10}{level:>5g}" + (" *" if tag == recipe.tag else "")
            numbers = (100 * run[f"{key}/{metric}"] for metric in ("accuracy", "ece") for run in (without, with_))
            rows.append(_row(label, *numbers))
    rows.append(line)
    for tag in LEVELS:
        drops = [100 * run[f"{tag}/accuracy_drop"] for run in (without, with_)]
        rows.append(f"{f'mean drop, {tag}':<22}{drops[0]:>9.1f}{drops[1]:>9.1f}{drops[0] - drops[1]:>+9.1f}")
    return "\n".join([*rows, "", f"{recipe.footnote} ECE: calibration error."])


def _row(label: str, accuracy_without: float, accuracy_with: float, ece_without: float, ece_with: float) -> str:
    gain = accuracy_with - accuracy_without
    return f"{label:<22}{accuracy_without:>9.1f}{accuracy_with:>9.1f}{gain:>+9.1f}  {ece_without:>12.1f}{ece_with:>9.1f}"


def _tuned(callbacks: list[pl.Callback]) -> list[str]:
    """Says of each level that tuned itself what it did, in its own words."""
    moved = [each.adaptive for each in callbacks if isinstance(each, NoiseCallback) and each.adaptive is not None]
    return [f"The level tuned itself. {adaptive.summary()}" for adaptive in moved]


def _conclusion(results: dict[str, dict[str, float]], recipe: Recipe) -> str:
    """Says what training with the recipe gained at the highest levels and what it cost, as far as the test set can tell."""
    sentences = {"raised": [], "lowered": [], "did not measurably change": []}
    where = {"clean": "on clean images"}
    where |= {f"{tag}/{max(levels):g}": f"under {tag} noise {max(levels):g}" for tag, levels in LEVELS.items()}
    for key, place in where.items():
        before, after = (run[f"{key}/accuracy"] for run in results.values())
        sentences[_verdict(before, after)].append(f"{place} ({100 * before:.1f} to {100 * after:.1f} %)")
    said = [f"{verdict} the accuracy {_listed(parts)}" for verdict, parts in sentences.items() if parts]
    return f"Training with {recipe.title} {'; it '.join(said)}." + ("" if sentences["raised"] else " No accuracy was gained.")


def _verdict(before: float, after: float) -> str:
    """Whether two accuracies differ by more than two standard errors of independent samples of the size of the test set."""
    variance = (before * (1 - before) + after * (1 - after)) / SIZES["test"]
    if abs(after - before) <= 2 * math.sqrt(variance):
        return "did not measurably change"
    return "raised" if after > before else "lowered"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _quieten() -> None:
    """Keeps Lightning's advice on loaders and hardware out of the comparison."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", ".*(does not have many workers|GPU available but not used)")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.recipe]
    options.level = getattr(options, "level", recipe.level)
    if isinstance(options.level, float) and options.level > recipe.max_level:
        limits = f"[0, {recipe.max_level:g}] with --recipe {options.recipe}"
        parser.error(f"argument --level: must be a number in {limits}, got {options.level:g}")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lightning_noise: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lightning_noise",
        description="Trains a classifier of real images without and with noise, and compares the two under noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=_epochs, default=20, help="epochs of each training")
    has = "what the second training has: noise in its inputs, label smoothing, mixup, noise in its weights, or all but mixup"
    parser.add_argument("--recipe", type=_recipe, default="input", metavar=f"{{{','.join(RECIPES)}}}", help=has)
    levels = "; ".join(f"{name}: {recipe.meaning} (default: {recipe.default})" for name, recipe in RECIPES.items())
    parser.add_argument("--level", type=_level, default=argparse.SUPPRESS, help=f"level of the recipe; {levels}")
    parser.add_argument("--root-dir", type=_folder, default=Path("lightning_noise_demo"), help="folder of the logs")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of split, weights and noise")
    return parser


def _epochs(text: str) -> int:
    return _parsed(int, text, lambda value: value >= 1, "a whole number, at least 1")


def _level(text: str) -> float:
    return _parsed(float, text, lambda value: 0 <= value <= 10, "a number in [0, 10]")


def _recipe(text: str) -> str:
    return _parsed(str, text, lambda name: name in RECIPES, f"one of {', '.join(RECIPES)}")


def _seed(text: str) -> int:
    return _parsed(int, text, lambda value: 0 <= value < 2**32, "a whole number in [0, 2^32)")


def _folder(text: str) -> Path:
    return _parsed(_made, text, lambda folder: os.access(folder, os.W_OK), "a folder that can be written to")


def _made(text: str) -> Path:
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError from error
    return Path(text)


def _parsed(kind: Callable[[str], T], text: str, holds: Callable[[T], bool], wanted: str) -> T:
    try:
        if holds(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")


if __name__ == "__main__":
    main()
