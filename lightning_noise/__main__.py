"""`python -m lightning_noise`: what noise does to a classifier of real images, with noise in its training and without."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_noise import InputNoise, RobustnessMonitor, noise, schedules

LEVELS = {"gaussian": (0.1, 0.2, 0.3, 0.4), "speckle": (0.3, 0.6, 0.9), "impulse": (0.05, 0.1, 0.2)}
SIZES = {"train": 1097, "validation": 300, "test": 400}


class DigitClassifier(pl.LightningModule):
    """A small convolutional network with batch normalisation; it knows nothing of noise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *_block(1, 32),
            *_block(32, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
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

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ProgressLine(pl.Callback):
    """One line that says how far the training is and what the monitor last measured."""

    def __init__(self, label: str):
        self.label = label

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clean, noisy = (
            100 * trainer.callback_metrics[f"robustness/{key}"].item() for key in ("clean/accuracy", "accuracy_mean")
        )
        print(
            f"\r  {self.label:<15} epoch {trainer.current_epoch + 1:>2}/{trainer.max_epochs}   "
            f"validation accuracy: clean {clean:5.1f} %, under noise {noisy:5.1f} %",
            end="",
            flush=True,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print()


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains twice, prints the comparison and says where the logs are."""
    options = _parser().parse_args(arguments)
    _quieten()
    began = time.perf_counter()
    data = _digits(options.seed)
    print(f"{sum(SIZES.values())} handwritten digits of 8 x 8 pixels: " + ", ".join(f"{n} {k}" for k, n in SIZES.items()) + ".")
    print(f"One network with batch normalisation, trained twice for {options.epochs} epochs from the same weights.\n")
    ramp = schedules.Linear(0.0, options.level, until=0.5)
    results = {
        "without noise": _run("without noise", data, options, []),
        "with noise": _run("with noise", data, options, [InputNoise(noise.Gaussian(), ramp, per_sample=True)]),
    }
    print(f"\n{_table(results)}\n\n{_conclusion(results)}\n")
    print(f"It took {time.perf_counter() - began:.0f} s. Look at both runs:\n\n  tensorboard --logdir {options.root_dir}\n")


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


def _run(label: str, data: dict[str, Subset], options: argparse.Namespace, callbacks: list[pl.Callback]) -> dict[str, float]:
    """Trains one network and returns what the monitor measured on the test data."""
    pl.seed_everything(options.seed, verbose=False)  # the same weights and the same order of the data in both runs
    monitor = RobustnessMonitor([noise.Gaussian(), noise.Speckle(), noise.Impulse(low=0.0, high=1.0)], LEVELS)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(options.root_dir, name=label.replace(" ", "_")),
        callbacks=[*callbacks, monitor, ProgressLine(label)],
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = DigitClassifier()
    loaders = {part: DataLoader(dataset, batch_size=64, shuffle=part == "train") for part, dataset in data.items()}
    trainer.fit(module, loaders["train"], loaders["validation"])
    trainer.test(module, loaders["test"], verbose=False)
    return {key.removeprefix("test/robustness/"): value.item() for key, value in trainer.callback_metrics.items()}


def _table(results: dict[str, dict[str, float]]) -> str:
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
            label = "clean" if level is None else f"{tag:<10}{level:>5g}" + (" *" if tag == "gaussian" else "")
            rows.append(_row(label, *(100 * run[f"{key}/{metric}"] for metric in ("accuracy", "ece") for run in (without, with_))))
    rows.append(line)
    for tag in LEVELS:
        drops = [100 * run[f"{tag}/accuracy_drop"] for run in (without, with_)]
        rows.append(f"{f'mean drop, {tag}':<22}{drops[0]:>9.1f}{drops[1]:>9.1f}{drops[0] - drops[1]:>+9.1f}")
    return "\n".join([*rows, "", "* the kind that was trained with; the others show what transfers. ECE: calibration error."])


def _row(label: str, accuracy_without: float, accuracy_with: float, ece_without: float, ece_with: float) -> str:
    gain = accuracy_with - accuracy_without
    return f"{label:<22}{accuracy_without:>9.1f}{accuracy_with:>9.1f}{gain:>+9.1f}  {ece_without:>12.1f}{ece_with:>9.1f}"


def _conclusion(results: dict[str, dict[str, float]]) -> str:
    """Says what training with noise gained, beyond what chance explains, and what it cost."""
    said = {True: [], False: []}
    for tag, levels in LEVELS.items():
        before, after = (sum(run[f"{tag}/{level:g}/accuracy"] for level in levels) / len(levels) for run in results.values())
        said[_differs(before, after) and after > before].append(f"{tag} noise ({100 * before:.1f} to {100 * after:.1f} %)")
    before, after = (run["clean/accuracy"] for run in results.values())
    if _differs(before, after):
        cost = f"Clean accuracy went {'up' if after > before else 'down'} from {100 * before:.1f} to {100 * after:.1f} %."
    else:
        cost = f"Clean accuracy did not change measurably ({100 * before:.1f} and {100 * after:.1f} %)."
    gained = f"Training with noise raised the mean accuracy under {_listed(said[True])}." if said[True] else ""
    nothing = f"Nothing was gained under {_listed(said[False])}." if said[False] else ""
    return " ".join(part for part in (gained, nothing, cost) if part)


def _differs(before: float, after: float) -> bool:
    """Whether two accuracies on the test set differ by more than two standard errors of independent samples."""
    variance = (before * (1 - before) + after * (1 - after)) / SIZES["test"]
    return abs(after - before) > 2 * math.sqrt(variance)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _quieten() -> None:
    """Keeps Lightning's advice on loaders and hardware out of the comparison."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lightning_noise: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lightning_noise", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--epochs", type=_epochs, default=20, help="epochs of each training (default: %(default)s)")
    parser.add_argument(
        "--level", type=_level, default=0.5, help="standard deviation that the noise rises to, pixels in [0, 1] (default: %(default)s)"
    )
    parser.add_argument("--root-dir", type=_folder, default="lightning_noise_demo", help="folder of the logs (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of split, weights and noise (default: %(default)s)")
    return parser


def _epochs(text: str) -> int:
    return _parsed(int, text, lambda value: value >= 1, "a whole number, at least 1")


def _level(text: str) -> float:
    return _parsed(float, text, lambda value: 0 <= value < math.inf, "a number, not negative")


def _seed(text: str) -> int:
    return _parsed(int, text, lambda value: 0 <= value < 2**32, "a whole number in [0, 2^32)")


def _folder(text: str) -> Path:
    return _parsed(Path, text, lambda value: value.is_dir() or not value.exists(), "a folder, or the name of a new one")


def _parsed(kind, text, holds, wanted):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value


if __name__ == "__main__":
    main()
