"""Every noise callback takes any batch, however the step gets it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Deterministic, Pair, Rows, assert_same, fit, loader, make_trainer, resumes, weights
from helpers_callbacks import LevelLog, assert_resumes
from members import every_callback
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_noise import InputNoise, Key, WeightNoise, noise, schedules


@dataclass
class Sample:
    x: Any
    y: Any
    name: str = "a"
    count: int = 3
    nothing: None = None


COLLATES = {
    "list": (lambda x, y: [x, y], None, lambda batch: (batch[0], batch[1])),
    "tuple": (lambda x, y: (x, y), None, lambda batch: (batch[0], batch[1])),
    "tuple with other leaves": (lambda x, y: (x, y, None, "a", 3), None, lambda batch: (batch[0], batch[1])),
    "dict": (lambda x, y: {"x": x, "y": y, "n": 3, "name": "a", "no": None}, None, lambda batch: (batch["x"], batch["y"])),
    "nested dict": (lambda x, y: {"a": {"b": [x, None]}, "y": y}, "a.b.0", lambda batch: (batch["a"]["b"][0], batch["y"])),
    "namedtuple": (Pair, None, lambda batch: (batch.x, batch.y)),
    "dataclass": (Sample, "x", lambda batch: (batch.x, batch.y)),
    "bare tensor": (lambda x, y: torch.cat([x, y[:, None].float()], 1), None, lambda batch: (batch[:, :-1], batch[:, -1])),
}


@pytest.mark.parametrize("n", [1, 7, 8, 9], ids=lambda n: f"{n} samples")
@pytest.mark.parametrize(("collate", "inputs", "read"), COLLATES.values(), ids=COLLATES)
def test_the_step_gets_a_noisy_batch_of_the_same_type(collate, inputs, read, n):
    class Reading(Classifier):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            x, y = read(batch)
            return F.cross_entropy(self(x), y.long().clamp(0, N_CLASSES - 1))

    data = Rows(n)

    def stacked(samples):
        return collate(*(torch.stack(column) for column in zip(*samples, strict=True)))

    train = DataLoader(data, batch_size=4, collate_fn=stacked)
    module, _ = fit([InputNoise(noise.Gaussian(), 0.5, inputs=inputs)], module=Reading, train=train, max_epochs=1)
    assert len(module.seen) == math.ceil(n / 4)
    for i, batch in enumerate(module.seen):
        clean = stacked([data[j] for j in range(4 * i, min(4 * i + 4, n))])
        assert type(batch) is type(clean)
        noisy_x, noisy_y = read(batch)
        clean_x, clean_y = read(clean)
        assert noisy_x.shape == clean_x.shape
        assert not torch.equal(noisy_x, clean_x)
        if not isinstance(batch, Tensor):  # the one tensor is input and target
            assert torch.equal(noisy_y, clean_y)


def test_a_step_without_batch_idx_gets_noise():
    class Short(Classifier):
        def training_step(self, batch):  # type: ignore[override]
            return super().training_step(batch, 0)

    module, _ = fit([InputNoise(noise.Gaussian(), 0.5)], module=Short, train=loader())
    assert not torch.equal(module.seen[0][0], Rows().x[:8])


# Lightning calls it experimental
iterates = pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")


class Iterating(Deterministic):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter):  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        assert dataloader_iter.fetched > batch_idx
        self.seen.append(batch)
        return F.cross_entropy(self(batch[0]), batch[1])


@iterates
@every_callback
def test_a_step_that_fetches_its_batch_gets_the_noise_of_one_that_is_given_it(make):
    fetching, given = (LevelLog(make(schedules.Linear(0.0, 0.5))) for _ in range(2))
    one, _ = fit([fetching.callback, fetching], module=Iterating, train=loader())
    two, _ = fit([given.callback, given], module=Deterministic, train=loader())
    assert_same(weights(one), weights(two))
    assert fetching.levels == given.levels
    assert len(one.seen) == len(two.seen) == 6
    assert all(torch.equal(x[0], y[0]) for x, y in zip(one.seen, two.seen, strict=True))


@iterates
@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's call into torch
@every_callback
def test_a_run_of_an_iterator_resumed_within_an_epoch_equals_the_uninterrupted_one(make, tmp_path):
    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    assert_resumes(make, schedules.Linear(0.0, 0.5), tmp_path, train, 2, lambda step: step % 5, module=Iterating)


class Joining(Deterministic):
    """Fetches two batches in a step, keeps the weights of each forward pass, and updates nothing."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def training_step(self, dataloader_iter):  # type: ignore[override]
        losses = []
        for _ in range(2):
            (x, y), *_ = next(dataloader_iter)
            losses.append(F.cross_entropy(self(x), y))
            self.weights.append(next(self.parameters()).detach().clone())
        return sum(losses)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@iterates
@every_callback
@pytest.mark.filterwarnings("ignore:.*reached")
def test_a_step_that_fetches_two_batches_leaves_the_weights(make):
    pl.seed_everything(0, verbose=False)
    before = weights(Joining())
    module, trainer = fit([make(0.1)], module=Joining, train=loader(Rows(32)), max_epochs=1)
    assert trainer.global_step == 2
    assert_same(weights(module), before)


@iterates
def test_noise_in_the_weights_is_one_draw_for_all_batches_that_a_step_fetches():
    callback = WeightNoise(noise.Gaussian(), schedules.Linear(0.1, 0.5))
    module, _ = fit([callback], module=Joining, train=loader(Rows(32)), max_epochs=1)
    one, two, three, four = module.weights
    assert torch.equal(one, two)
    assert torch.equal(three, four)
    assert not torch.equal(one, three)


class Pairwise(Deterministic):
    """Fetches two batches in a step, through an iterator that it has kept."""

    def training_step(self, dataloader_iter):  # type: ignore[override]
        if not self.seen:
            self.kept = dataloader_iter
        assert self.kept is dataloader_iter
        self.seen += [next(self.kept)[0] for _ in range(2)]
        return sum(F.cross_entropy(self(x), y) for x, y in self.seen[-2:])


@iterates
def test_batches_that_are_fetched_in_one_step_have_draws_and_levels_of_their_own():
    zeros = Rows(64)
    zeros.x.zero_()
    callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.8))
    with pytest.warns(UserWarning, match="'0' is 0 everywhere"):
        module, _ = fit([callback], module=Pairwise, train=loader(zeros), max_epochs=1)
    drawn = [batch[0] for batch in module.seen]
    assert len(drawn) == 8
    assert not drawn[0].any(), "the level 0"
    assert all(not torch.equal(one, two) for one, two in combinations(drawn, 2))
    for i, x in enumerate(drawn):
        level = 0.1 * i
        assert abs(x.std().item() - level) <= 5 * level / math.sqrt(2 * 64)  # five standard errors


@iterates
def test_a_step_that_fetches_nothing_logs_nothing(tmp_path):
    class Sometimes(Deterministic):
        def training_step(self, dataloader_iter):  # type: ignore[override]
            if self.global_step % 2 == 0:
                self.seen.append(next(dataloader_iter)[0])
            x, y = self.seen[-1]
            return F.cross_entropy(self(x), y)

    logger = CSVLogger(tmp_path)
    callback = InputNoise(noise.Gaussian(), 0.5)
    # a validation logs the level, too
    settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "log_every_n_steps": 1}
    fit([callback], module=Sometimes, train=loader(), logger=logger, **settings)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[rows[0].split(",").index("step")]) for row in rows[1:] if "0.5" in row]
    assert steps == [0, 2]


@iterates
def test_a_wrong_path_is_found_when_the_first_batch_is_fetched():
    with pytest.raises(ValueError, match="no leaf 'image' in the batch; leaves are: '0' float32"):
        fit([InputNoise(noise.Gaussian(), 0.0, inputs="image")], module=Iterating)


def test_a_step_set_on_the_instance_gets_noise_and_stays():
    module = Classifier()
    seen = []

    def step(batch, batch_idx):
        seen.append(batch)
        return F.cross_entropy(module(batch[0]), batch[1])

    module.training_step = step  # type: ignore[method-assign]
    fit([InputNoise(noise.Gaussian(), 0.5)], module=module, train=loader())
    assert not torch.equal(seen[0][0], Rows().x[:8])
    assert module.training_step is step


def test_a_data_module_that_overrides_the_transfer_is_followed_by_noise():
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader()

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return [part.to(device) for part in batch]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [10 * batch[0], batch[1]]

    module = Classifier()
    make_trainer([InputNoise(noise.Gaussian(), 0.5, seed=0)]).fit(module, datamodule=Data())
    clean = 10 * Rows().x[:8]
    assert torch.equal(module.validated[-3][0], clean)
    drawn = (Key((0, "input", 0, 0), rank=0) / "leaf" / "0").apply(noise.Gaussian(), clean, 0.5)
    assert torch.equal(module.seen[0][0], drawn)
