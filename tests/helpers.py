"""Tiny models, data, a fit and what compares them, for tests that need the real loop."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner.tuning import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

N_FEATURES, N_CLASSES = 8, 3
DEVICE = torch.get_default_device()  # as pytest --device set it
# the resumed run saves no checkpoints of its own
resumes = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


Pair = namedtuple("Pair", ["x", "y"])


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


class Quiet(Classifier):
    """Validates without a metric of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Deterministic(Classifier):
    """Without dropout: a resumed run draws other global numbers, with noise and without."""

    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.net[3] = nn.Identity()


class TwoOptimizers(Deterministic):
    """Updates its layers with an optimizer each, in manual optimization."""

    second_every = 1  # batches

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()  # type: ignore[misc]
        self.manual_backward(loss)
        first.step()
        if batch_idx % self.second_every == 0:
            second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (1, 4)]


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


class LinearRegression(pl.LightningModule):
    """Keeps the means of its weights over the blocks of the second half of the run."""

    def __init__(self, n_features: int, n_blocks: int = 20):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_features, dtype=torch.float64))
        self.blocks = torch.zeros(n_blocks, n_features, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (x @ self.weight - y).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        half = int(self.trainer.estimated_stepping_batches) // 2
        size = half // len(self.blocks)
        if self.global_step > half:
            self.blocks[(self.global_step - half - 1) // size] += self.weight.detach() / size

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def loader(data: Dataset | None = None, batch_size: int | None = 8, **kwargs: Any) -> DataLoader:
    size = {} if "batch_sampler" in kwargs else {"batch_size": batch_size}
    return DataLoader(Rows() if data is None else data, **size, **kwargs)


def make_trainer(callbacks: Sequence[pl.Callback] = (), **kwargs: Any) -> pl.Trainer:
    settings = {
        "accelerator": DEVICE.type,
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 2,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def red() -> Figure:
    """A figure of 30 by 20 red dots."""
    return Figure(figsize=(0.3, 0.2), dpi=100, facecolor="red")


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


def as_one(tensors: Mapping[str, Tensor], perturb: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """What an elementwise noise makes of small tensors, which it perturbs as one, by the name of the smallest."""
    names = sorted(tensors, key=lambda name: (tensors[name].numel(), tensors[name].shape))
    noisy = perturb(names[0], torch.cat([tensors[name].flatten() for name in names]))
    parts = noisy.split([tensors[name].numel() for name in names])
    return {name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)}


def assert_same(one: Sequence[Tensor], two: Sequence[Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(list(one), list(two), rtol=0, atol=0)


def search_rate(callbacks: Sequence[pl.Callback], folder: Path) -> tuple[Any, Any, pl.Trainer]:
    """The losses that a search for the learning rate finds, and the module and the trainer after it."""
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(callbacks, default_root_dir=folder)
    module = Classifier()
    finder = Tuner(trainer).lr_find(module, loader(), loader(), num_training=20)
    assert finder is not None
    return finder.results["loss"], module, trainer


class Album(CSVLogger):
    """Takes images as the logger of Weights & Biases does."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.pages: list[tuple[str, list[np.ndarray], int]] = []

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        self.pages.append((key, images, step))


def layouts(folder: str) -> list[dict[str, dict[str, list[str]]]]:
    """The layouts of a run, read by TensorBoard's own message."""
    messages: Any = layout_pb2  # its classes are made when it is imported
    found = EventAccumulator(folder, size_guidance={"tensors": 0}).Reload()
    if "custom_scalars__config__" not in found.Tags()["tensors"]:
        return []
    parsed = [messages.Layout.FromString(each.tensor_proto.string_val[0]) for each in found.Tensors("custom_scalars__config__")]
    return [
        {category.title: {chart.title: _tags(chart) for chart in category.chart} for category in layout.category}
        for layout in parsed
    ]


def _tags(chart: Any) -> list[str]:
    """Returns the tags of the lines, or those of the value and the edges of a band."""
    bands = [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
    return [*chart.multiline.tag, *bands]


# a server that has imported what takes long forks each process, so that a test does not wait for the imports
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytorch_lightning", "tensorboard.backend.event_processing.event_accumulator"])


def execute(main: Callable[..., None], folder: Path, *arguments: object, ranks: int = 1) -> None:
    """Calls `main` with a new folder in new processes: one, which may start others, or one for each rank."""
    folder.mkdir()
    port = str(find_free_network_port())
    started = [processes.Process(target=_main, args=(main, rank, ranks, port, folder, *arguments)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=900)
        process.kill()  # only a process that hangs is still there
    assert [process.exitcode for process in started] == [0] * ranks, "the error is in the captured output"


def _main(main: Callable[..., None], rank: int, ranks: int, port: str, *arguments: object) -> None:
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(*arguments)


def refusal(command: Callable[[Sequence[str]], None], arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the single line that a command prints about wrong arguments before it exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def keys_of(trainer: pl.Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items()}
