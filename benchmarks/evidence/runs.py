"""One training and what was measured of its model; without the monitors of the package, which are under test, too."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.evidence import tasks
from benchmarks.evidence.networks import Module, network
from benchmarks.evidence.recipes import callbacks
from benchmarks.tables import RESULTS

RAW = RESULTS / "evidence.jsonl"
BATCH = 64
WEIGHT_PROBES, WEIGHT_DRAWS = (0.2, 0.4, 0.6, 0.8), 3  # in standard deviations of each tensor


class Run(NamedTuple):
    """What is trained."""

    task: str
    net: str
    recipe: str
    seed: int


def quiet() -> None:
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric", "lightning_noise"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def score(output: Tensor, y: Tensor) -> float:
    """The accuracy, or for numbers the coefficient of determination."""
    if y.is_floating_point():
        return 1 - (F.mse_loss(output.squeeze(1), y) / y.var(correction=0)).item()
    return (output.argmax(1) == y).float().mean().item()


def calibration_error(output: Tensor, y: Tensor, n_bins: int = 15) -> float:
    """The expected calibration error of the confidence in bins of equal width."""
    confidence, predicted = output.softmax(1).max(1)
    bins = (confidence * n_bins).long().clamp_max(n_bins - 1)
    gap = torch.zeros(n_bins).index_add_(0, bins, confidence - (predicted == y).float())
    return (gap.abs().sum() / len(y)).item()


def score_with_weights(change: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, y: Tensor) -> float:
    """The score with other weights of more than one dimension, which are put back."""
    weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    clean = [weight.clone() for weight in weights]
    for weight, before in zip(weights, clean, strict=True):
        weight.copy_(change(before))
    found = score(module(x), y)
    for weight, before in zip(weights, clean, strict=True):
        weight.copy_(before)
    return found


def under_weight_noise(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean score with Gaussian noise in the weights."""
    generator = torch.Generator().manual_seed(0)

    def noisy(level: float, weight: Tensor) -> Tensor:
        return weight + level * weight.std() * torch.randn(weight.shape, generator=generator)

    levels = [level for level in WEIGHT_PROBES for _ in range(WEIGHT_DRAWS)]
    return fmean(score_with_weights(partial(noisy, level), module, x, y) for level in levels)


@torch.no_grad()
def measured(module: Module, run: Run, part: str) -> dict[str, float]:
    """Scores and calibration, clean and under each family of noise, and the size of the weights."""
    (x, y), families = tasks.split(run.task, run.seed)[part], tasks.noisy(run.task, run.seed)[part]
    clean, outputs = module(x), {name: [module(each) for each in levels] for name, levels in families.items()}
    values = {"clean": score(clean, y), "loss": module.loss(clean, y).item(), "weights": under_weight_noise(module, x, y)}
    values |= {name: fmean(score(output, y) for output in found) for name, found in outputs.items()}
    values["norm"] = sum(weight.square().sum().item() for weight in module.parameters() if weight.ndim > 1) ** 0.5
    if not y.is_floating_point():
        noisy = [output for found in outputs.values() for output in found]
        first = next(iter(outputs.values()))
        values["ece"], values["noisy ece"] = calibration_error(clean, y), fmean(calibration_error(each, y) for each in noisy)
        values["flips"] = (first[len(first) // 2].argmax(1) != clean.argmax(1)).float().mean().item()
    if tasks.TASKS[run.task].corrupted and part == "test":
        images = tasks.corrupted(run.task, run.seed)
        values["corrupted"] = fmean(score(module(each), y[: len(each)]) for each in images)
    return {name: round(value, 5) for name, value in values.items()}


def fit(task_name: str, net: str, seed: int, chosen: list[Callback]) -> Module:
    """Trains a model; the trainings of a seed begin with the same weights and see the same data in the same order."""
    task, parts = tasks.TASKS[task_name], tasks.split(task_name, seed)
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    module = Module(network(tasks.loaded(task_name)[0], task.n_classes or 1, net))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=task.epochs,
        callbacks=chosen,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = {part: TensorDataset(*parts[part]) for part in ("train", "validation")}
    trainer.fit(module, DataLoader(data["train"], BATCH, shuffle=True), DataLoader(data["validation"], BATCH))
    return module.eval()


def train(run: Run) -> dict[str, Any]:
    """Trains a model and returns what was measured of it."""
    began, chosen = time.process_time(), callbacks(run.task, run.net, run.recipe)
    module = fit(run.task, run.net, run.seed, chosen)
    found = {part: measured(module, run, part) for part in ("validation", "test")}
    levels = {"levels": moved(chosen[0])} if "governed" in run.recipe or "signed gap" in run.recipe else {}
    return {**run._asdict(), **found, **levels, "seconds": round(time.process_time() - began, 1)}


def moved(callback: Any) -> list[float]:
    """The level after each validation."""
    return [round(decision.level, 4) for decision in callback.adaptive.history]


def finished(raw: Path = RAW) -> dict[Run, dict[str, Any]]:
    """The runs in the raw file, and what was measured of each."""
    lines = raw.read_text().splitlines() if raw.exists() else []
    records = [json.loads(line) for line in lines]
    return {Run(*(record[field] for field in Run._fields)): record for record in records}
