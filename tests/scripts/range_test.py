"""A range test on one or more processes, of which the main one writes what it found to `<folder>/found.pt`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
import torch
from helpers import Classifier, Rows, loader, make_trainer

from lightning_noise import noise, suggest_level
from lightning_noise.evaluation.range_test import RangeTest


def found(**kwargs) -> RangeTest:
    """Runs the range test on thirteen rows. The second of two ranks gets a repeated row, whose class changes under noise."""
    pl.seed_everything(0, verbose=False)
    module, data = Classifier(), loader(Rows(13, seed=1), batch_size=kwargs.pop("batch_size", 2))
    return suggest_level(make_trainer(**kwargs), module, noise.Gaussian(), dataloaders=data, flip_rate=0.1, seed=3)


def main(folder: Path, strategy: str, devices: int) -> None:
    torch.save(asdict(found(strategy=strategy, devices=devices)), folder / "found.pt")
