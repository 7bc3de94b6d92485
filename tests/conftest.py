"""Tiny models, data and a fit, for tests that need the real loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

torch.set_num_threads(1)  # the models are tiny; threads only cost
N_FEATURES, N_CLASSES = 8, 3
LONG = ("test_notebooks", "test_demonstration", "test_callbacks", "test_measurements", "test_replay", "test_monitors")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Rows(Dataset):
    """Hands out its own storage: what is written to a sample stays written."""

    def __init__(self, n: int = 24, features: tuple[int, ...] = (N_FEATURES,), seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, *features, generator=generator)
        self.y = (self.x.flatten(1).sum(1) > 0).long() + (self.x.flatten(1)[:, 0] > 1).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class Classifier(pl.LightningModule):
    """An ordinary module with dropout, so that a touched random stream shows in the weights; it records what it saw."""

    def __init__(self, lr: float = 0.1, features: int = N_FEATURES):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, N_CLASSES))
        self.lr = lr
        self.seen: list[Any] = []
        self.losses: list[Tensor] = []
        self.validated: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch)
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch)
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Stochastic(Classifier):
    """Has running statistics and a metric of its own, and draws from the global streams also in evaluation."""

    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.BatchNorm1d(8))
        self.accuracy = MulticlassAccuracy(N_CLASSES, average="micro")

    def forward(self, x):
        return super().forward(x) + 0.1 * torch.rand(len(x), N_CLASSES)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)


class Dictionary(Classifier):
    """Takes batches whose input is at ``data.x`` and whose target is at ``y``."""

    def _pair(self, batch: Any) -> Any:
        return batch["data"]["x"], batch["y"]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(self._pair(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(self._pair(batch), batch_idx)


def loader(data: Dataset | None = None, batch_size: int | None = 8, **kwargs: Any) -> DataLoader:
    size = {} if "batch_sampler" in kwargs else {"batch_size": batch_size}
    return DataLoader(Rows() if data is None else data, **size, **kwargs)


def make_trainer(callbacks: Sequence[pl.Callback] = (), **kwargs: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 2,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(
    callbacks: Sequence[pl.Callback] = (),
    *,
    module: pl.LightningModule | Callable[[], pl.LightningModule] = Classifier,
    train: Any = None,
    validation: Any = None,
    seed: int = 0,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> tuple[Any, pl.Trainer]:
    """Fits a module, which is made from the same global streams each time where its class is given."""
    pl.seed_everything(seed, verbose=False)
    module = module if isinstance(module, pl.LightningModule) else module()
    trainer = make_trainer(callbacks, **kwargs)
    train = loader(shuffle=True) if train is None else train
    validation = loader(Rows(13, seed=1)) if validation is None else validation
    trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    return module, trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def assert_same(one: Sequence[Tensor], two: Sequence[Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(list(one), list(two), rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _no_seed_left_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _packages_are_searched_once():
    """Each trainer asks every installed package for callbacks, which takes longer than the rest of making it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fabric.utilities.registry.entry_points", cache(entry_points))
        yield


def pytest_collection_finish():
    gc.freeze()  # what is imported stays; the search for a batch size has garbage collected a dozen times


def search_rate(callbacks: Sequence[pl.Callback], folder: Path) -> tuple[Any, Any, pl.Trainer]:
    """The losses that a search for the learning rate finds, and the module and the trainer after it."""
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(callbacks, default_root_dir=folder)
    module = Classifier()
    finder = Tuner(trainer).lr_find(module, loader(), loader(), num_training=20)
    assert finder is not None
    return finder.results["loss"], module, trainer
