"""The demonstration: two trainings, their comparison, and the options of the command."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import rich
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt, path_type, restricted_number_type
from pytorch_lightning import Callback

from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.demo.data import SIZES, make_loaders
from lightning_noise.demo.recipes import RECIPES
from lightning_noise.demo.table import Comparison
from lightning_noise.demo.training import train

__all__ = ["main"]

NewFolder = path_type("dcc")  # a folder that exists or can be created, its parents included
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a classifier without and with a recipe, prints the comparison and where the logs are.

    Args:
        arguments: The arguments of the command. Default: those of the process.
    """
    options = _parse(arguments)
    started = time.perf_counter()
    _silence_lightning()
    torch.set_num_threads(1)  # threads cost a network as small as this more than they give
    sizes = ", ".join(f"{size} {split}" for split, size in SIZES.items())
    rich.print(f"{sum(SIZES.values())} handwritten digits of 8 x 8 pixels: {sizes}.")
    rich.print(f"A convolutional network, trained twice from the same weights. Epochs: {options.epochs}.")
    recipe = RECIPES[options.recipe]
    callbacks = recipe.callbacks(options.level)
    loaders, root_dir = make_loaders(options.seed), str(options.root_dir)
    run = partial(train, loaders=loaders, epochs=options.epochs, seed=options.seed, root_dir=root_dir)
    scores = [run(f"without {recipe.title}", []), run(f"with {recipe.title}", callbacks)]
    _print_comparison(Comparison(recipe, *scores), callbacks)
    rich.print(f"\nIt took {time.perf_counter() - started:.0f} s. Look at both runs:\n")
    print(f"  tensorboard --logdir {shlex.quote(root_dir)}")  # plain text, which can be copied
    print("  http://localhost:6006/?tagFilter=robustness/\n")  # the result first, of all that is logged


def _print_comparison(comparison: Comparison, callbacks: Sequence[Callback]) -> None:
    rich.print()
    rich.print(comparison.table())
    rich.print(f"\n{comparison.recipe.footnote} ECE: expected calibration error.")
    for callback in callbacks:
        if isinstance(callback, NoiseCallback) and callback.adaptive is not None:
            rich.print(f"\nThe level tuned itself. {callback.adaptive.summary()}")
    rich.print(f"\n{comparison.conclusion()}")


def _silence_lightning() -> None:
    """Keeps Lightning's advice on loaders and hardware out of the comparison."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", ".*(does not have many workers|GPU available but not used)")


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong in a single line, without the usage."""
        self.exit(2, f"lightning_noise: {' '.join(message.split())}\n")


def _parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options, with the level of the recipe and a folder that can be written to."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.recipe]
    options.level = options.get("level", recipe.level)
    if isinstance(options.level, float) and options.level > recipe.max_level:
        limits = f"[0, {recipe.max_level:g}] with --recipe {options.recipe}"
        parser.error(f"argument --level: expected a number in {limits}, got {options.level:g}")
    folder = str(options.root_dir)
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"argument --root-dir: expected a folder that can be written to, got {folder!r}: {error.strerror}")
    return options


def _make_parser() -> ArgumentParser:
    parser = _Parser(
        prog="python -m lightning_noise",
        description="Trains a classifier of real images without and with noise, and compares the two under noise.",
        epilog="Further commands: python -m lightning_noise compare --help; python -m lightning_noise evaluate --help",
        allow_abbrev=False,
    )
    parts = "noise in its inputs, label smoothing, mixup, noise in its weights, or all but mixup"
    levels = "; ".join(f"{name}: {recipe.help}" for name, recipe in RECIPES.items())
    parser.add_argument("--epochs", type=PositiveInt, default=20, help="epochs of each training")
    parser.add_argument("--recipe", choices=RECIPES, default="input", help=f"what only the second training has: {parts}")
    parser.add_argument("--level", type=NonNegativeFloat, default=argparse.SUPPRESS, help=f"level of the recipe; {levels}")
    parser.add_argument("--root-dir", type=NewFolder, default="lightning_noise_demo", help="folder of the logs")
    parser.add_argument("--seed", type=Seed, default=0, help="seed of the split, the weights and the noise")
    return parser
