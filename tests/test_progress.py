"""The progress of a run, whatever its loaders say, its limits are and its optimizers count."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, Deterministic, Rows, TwoOptimizers, assert_same, fit, loader, resumes, weights
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset

from lightning_noise import AdaptiveLevel, InputNoise, noise, rules, schedules
from lightning_noise.schedules import Progress

RAMP = schedules.Linear(0.0, 0.6)
IN_FRACTIONS = [
    RAMP,
    schedules.Linear(0.0, 0.5, begin=0.1, until=0.6),
    schedules.Window(0.4, until=0.8),
    schedules.Cyclic(0.0, 0.5, every=0.2),
    schedules.Piecewise([0.1, RAMP], [2], unit="step"),
    schedules.Product([RAMP, schedules.Every(1.0, every=2)]),
]


class Stream(IterableDataset):
    """Has three batches of 8."""

    def __iter__(self):
        rows = Rows(24)
        return iter([rows[i] for i in range(24)])


class Mistaken(Stream):
    """Says another number of rows."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


class Follow:
    """A level that notes the progress."""

    def __init__(self):
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> float:
        self.seen.append(progress)
        return 0.1 * (progress.fraction or 0.0)


def fractions(data: IterableDataset | None = None, **run: Any) -> list[float | None]:
    """Returns the fraction before each batch."""
    follow = Follow()
    fit([InputNoise(noise.Gaussian(), follow)], train=None if data is None else DataLoader(data, batch_size=8), **run)
    return [progress.fraction for progress in follow.seen[1:]]  # the first is at the start of the fit


# --- streams


@pytest.mark.parametrize("run", [{"max_epochs": 1}, {"max_epochs": 3}, {"max_epochs": -1}], ids=str)
@pytest.mark.parametrize("schedule", IN_FRACTIONS, ids=repr)
def test_a_stream_of_a_number_of_epochs_refuses_fractions_before_the_first_step(schedule, run):
    module = Classifier()
    with pytest.raises(ValueError, match=r"type Trainer\(max_steps=…\).*limit_train_batches=….*or type the times in steps"):
        fit([InputNoise(noise.Gaussian(), schedule)], module=module, train=DataLoader(Stream(), batch_size=8), **run)
    assert not module.seen


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"max_steps": 6}, [i / 6 for i in range(6)]),
        ({"max_epochs": 3, "limit_train_batches": 2}, [i / 6 for i in range(6)]),
        ({"max_epochs": -1, "max_steps": 4, "limit_train_batches": 2}, [i / 4 for i in range(4)]),
        ({"fast_dev_run": 2}, [0, 0.5]),
    ],
    ids=str,
)
def test_a_stream_follows_the_limits_that_are_known(run, expected):
    assert fractions(Stream(), **run) == pytest.approx(expected, abs=1e-12)


def test_a_callable_is_told_that_the_first_epoch_of_a_stream_is_unknown_and_then_its_length():
    assert fractions(Stream(), max_epochs=3) == [None, None, None, *(pytest.approx(i / 9) for i in range(3, 9))]


@pytest.mark.parametrize(
    "level", [schedules.Linear(0.0, 0.5, until=5, unit="step"), schedules.Every(0.3, every=2), 0.2], ids=repr
)
def test_a_stream_takes_levels_that_need_no_fraction(level):
    module, _ = fit([InputNoise(noise.Gaussian(), level)], train=DataLoader(Stream(), batch_size=8), max_epochs=2)
    assert len(module.seen) == 6


def test_a_stream_takes_an_adaptive_level():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(rules.Governor(chance=0.3, warmup=0)))
    fit([callback], train=DataLoader(Stream(), batch_size=8), max_epochs=2)
    assert callback.adaptive is not None
    assert len(callback.adaptive.history) == 2


@resumes
def test_a_resumed_stream_knows_the_length_of_its_epochs(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")  # saved in the validation, before the epoch has ended
    settings: dict[str, Any] = {"module": Deterministic, "max_epochs": 3}
    whole = Follow()
    first, _ = fit(
        [InputNoise(noise.Gaussian(), whole), saver],
        train=DataLoader(Stream(), batch_size=8),
        enable_checkpointing=True,
        **settings,
    )
    resumed = Follow()
    second, _ = fit(
        [InputNoise(noise.Gaussian(), resumed)],
        train=DataLoader(Stream(), batch_size=8),
        ckpt_path=str(tmp_path / "epoch=0.ckpt"),
        **settings,
    )
    assert resumed.seen[1:] == whole.seen[4:]
    assert_same(weights(second), weights(first))


# --- loaders that do not have the length that they say

inaccurate = pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")


@inaccurate
def test_a_loader_that_ends_early_warns_and_then_counts_what_it_had():
    callback = InputNoise(noise.Gaussian(), RAMP)
    with pytest.warns(
        UserWarning, match=r"epoch 0 had 3 batches, but 6 were expected.* from 0.1 to 0.2.*limit_train_batches=3"
    ):
        fit([callback], train=DataLoader(Mistaken(48), batch_size=8), max_epochs=3)
    expected = [0, 1 / 18, 2 / 18, *(i / 9 for i in range(3, 9))]
    assert fractions(Mistaken(48), max_epochs=3) == pytest.approx(expected)


@inaccurate
@resumes
def test_a_resumed_run_counts_what_a_loader_had_that_ended_early(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    whole, resumed = Follow(), Follow()
    settings: dict[str, Any] = {"train": DataLoader(Mistaken(48), batch_size=8), "max_epochs": 4}
    fit([InputNoise(noise.Gaussian(), whole), saver], enable_checkpointing=True, **settings)
    fit([InputNoise(noise.Gaussian(), resumed)], ckpt_path=str(tmp_path / "epoch=1.ckpt"), **settings)
    assert resumed.seen[1:] == whole.seen[7:]


@inaccurate
def test_a_loader_that_has_more_ends_where_it_said():
    assert fractions(Mistaken(16), max_epochs=3) == pytest.approx([i / 6 for i in range(6)])


def test_a_stream_with_two_limits_warns_if_the_epochs_end_first():
    callback = InputNoise(noise.Gaussian(), RAMP)
    with pytest.warns(UserWarning, match=r"epoch 0 had 3 batches, but their number was not known.* from 0.018 to 0.2"):
        fit([callback], train=DataLoader(Stream(), batch_size=8), max_epochs=3, max_steps=100)


@pytest.mark.parametrize(
    "run",
    [
        {"max_epochs": 3},
        {"max_epochs": 2, "limit_train_batches": 0.7},
        {"max_epochs": 2, "overfit_batches": 2},
        {"max_epochs": 3, "max_steps": 4},
        {"max_epochs": 3, "max_steps": 100},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "val_check_interval": 2},
        {"max_epochs": -1, "max_steps": 5, "val_check_interval": 2, "check_val_every_n_epoch": None},
        {"max_epochs": 3, "max_time": "00:12:00:00"},
        {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_fraction_of_a_loader_with_a_length_moves_evenly_and_warns_of_nothing(run, drop_last):
    follow = Follow()
    train = loader(Rows(26), drop_last=drop_last, shuffle="overfit_batches" not in run)
    callbacks = [InputNoise(noise.Gaussian(), RAMP), InputNoise(noise.Gaussian(), follow, name="follow")]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="epoch .* had .* batches, but")
        _, trainer = fit(callbacks, train=train, **run)
    seen = [progress.fraction for progress in follow.seen[1:]]
    n = trainer.num_training_batches * (trainer.max_epochs or 0)
    if 0 < trainer.max_steps < n or n < 0:
        n = trainer.max_steps
    assert seen == pytest.approx([i / n for i in range(int(n))])


class InPairs(Classifier):
    """Fetches two batches in a step."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        pairs = [next(dataloader_iter)[0] for _ in range(2)]
        return sum(F.cross_entropy(self(x), y) for x, y in pairs)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_batches_that_a_step_fetches_are_counted_one_by_one():
    follow = Follow()
    callbacks = [InputNoise(noise.Gaussian(), RAMP), InputNoise(noise.Gaussian(), follow, name="follow")]
    fit(callbacks, module=InPairs, train=loader(Rows(32)))
    assert [progress.fraction for progress in follow.seen[1:]] == pytest.approx([i / 8 for i in range(8)])


def test_batches_that_are_none_are_no_sign_of_an_early_end():
    def collate(rows: Any) -> Any:
        return None if len(rows) < 8 else torch.utils.data.default_collate(rows)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="train_dataloader yielded None")
        module, _ = fit([InputNoise(noise.Gaussian(), RAMP)], train=loader(Rows(20), collate_fn=collate))
    assert len(module.seen) == 4


def test_an_accumulation_that_changes_within_the_run_leaves_fractions_as_they_are():
    accumulation = GradientAccumulationScheduler({0: 1, 1: 3})
    follow = Follow()
    fit([InputNoise(noise.Gaussian(), RAMP), InputNoise(noise.Gaussian(), follow, name="follow"), accumulation], max_epochs=3)
    assert [progress.fraction for progress in follow.seen[1:]] == pytest.approx([i / 9 for i in range(9)])


# --- a limit of time


class Slow(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_of_time_is_a_clock(stream):
    follow, timer = Follow(), Timer(timedelta(seconds=0.5))
    callbacks = [InputNoise(noise.Gaussian(), RAMP), InputNoise(noise.Gaussian(), follow, name="follow"), timer]
    train = DataLoader(Stream(), batch_size=8) if stream else None
    fit(callbacks, module=Slow, train=train, max_epochs=-1, num_sanity_val_steps=0)
    seen = [progress.fraction or 0.0 for progress in follow.seen]
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert 0.5 < seen[-1] <= 1
    assert all(1000 * fraction == pytest.approx(round(1000 * fraction)) for fraction in seen)


@resumes
@pytest.mark.parametrize("limit", ["00:00:01:40", {"seconds": 100}, timedelta(seconds=100)], ids=repr)
def test_each_form_of_max_time_is_a_clock_that_a_resumed_run_continues(limit, tmp_path):
    settings: dict[str, Any] = {"max_epochs": -1, "max_time": limit}
    _, trainer = fit(max_steps=3, **settings)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 90.0
    torch.save(checkpoint, tmp_path / "later.ckpt")
    follow = Follow()
    fit([InputNoise(noise.Gaussian(), follow)], ckpt_path=str(tmp_path / "later.ckpt"), max_steps=6, **settings)
    assert [progress.fraction for progress in follow.seen[1:]] == [0.9, 0.9, 0.9]


# --- several optimizers


class Adversarial(TwoOptimizers):
    """Updates with the second optimizer in every other batch."""

    second_every = 2


def test_steps_of_several_optimizers_are_batches_and_fractions_follow_the_end_of_the_run():
    follow = Follow()
    _, trainer = fit([InputNoise(noise.Gaussian(), follow)], module=Adversarial, max_epochs=2)
    assert trainer.global_step == 10
    assert [progress.step for progress in follow.seen[1:]] == list(range(6))
    follow = Follow()
    fit([InputNoise(noise.Gaussian(), follow)], module=Adversarial, max_epochs=-1, max_steps=6)  # updates of both
    assert [progress.step for progress in follow.seen[1:]] == list(range(4))
    assert [progress.fraction for progress in follow.seen[1:]] == pytest.approx([0, 2 / 6, 3 / 6, 5 / 6])


@resumes
def test_a_resumed_run_of_several_optimizers_equals_the_uninterrupted_one(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    settings: dict[str, Any] = {"module": Adversarial, "max_epochs": 4}

    def falling() -> InputNoise:
        return InputNoise(noise.Gaussian(), schedules.Linear(0.6, 0.0, until=11, unit="step"))

    whole, _ = fit([falling(), saver], train=loader(), enable_checkpointing=True, **settings)
    for epoch in range(3):
        resumed, _ = fit([falling()], train=loader(), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"), **settings)
        assert_same(weights(resumed), weights(whole))
