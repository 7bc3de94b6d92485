"""A level that tunes itself goes on from a checkpoint, and moves as one on several processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Deterministic, Rows, assert_same, execute, fit, loader, resumes, weights
from helpers_adaptive import Plan, governor, held_out, history, level_of, seen
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from scripts import adaptive_levels
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_noise import AdaptiveLevel, InputNoise, WeightNoise, noise
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.rules import Decision

# --- resume


def moving() -> list[NoiseCallback]:
    """Among them two of one class."""
    return [
        InputNoise(noise.Gaussian(), AdaptiveLevel(governor(step=2.0))),
        InputNoise(noise.Speckle(), AdaptiveLevel(Plan((0.1, 0.2, 0.3, 0.4, 0.5))), name="planned"),
        WeightNoise(noise.Gaussian(), AdaptiveLevel(governor(step=0.5)), relative="std"),
    ]


def assert_resumes(
    folder: Path, train: Callable[[], Any], at: Callable[[int], bool], every_n_train_steps: int | None = None, **kwargs: Any
) -> None:
    settings = {"module": Deterministic, "validation": held_out(), "max_epochs": 8, **kwargs}
    uninterrupted = moving()
    saver = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", every_n_train_steps=every_n_train_steps)
    whole, _ = fit([*uninterrupted, saver], train=train(), enable_checkpointing=True, **settings)
    checkpoints = [path for path in folder.glob("*.ckpt") if at(int(path.stem.removeprefix("step=").partition("-")[0]))]
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        callbacks = moving()
        resumed, _ = fit(callbacks, train=train(), ckpt_path=str(checkpoint), **settings)
        assert len(resumed.seen) < len(whole.seen)
        assert_same(weights(resumed), weights(whole))
        for one, two in zip(callbacks, uninterrupted, strict=True):
            assert history(one) == history(two)
            assert level_of(one) == level_of(two)
            assert one.adaptive.summary() == two.adaptive.summary()  # type: ignore[union-attr]
        again, first = seen(callbacks[1]), seen(uninterrupted[1])
        assert again == first[len(first) - len(again) :], (
            "also the standard errors, which are of the difference to the best so far"
        )
    moved = {decision.reason for callback in uninterrupted for decision in history(callback)}
    assert {"raised", "moved"} <= moved


@resumes
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    assert_resumes(tmp_path, loader, lambda step: 3 < step < 24)


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's call into torch
def test_a_run_resumed_within_an_epoch_equals_the_uninterrupted_one(tmp_path):
    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    # not from the end of an epoch: there a stateful loader skips the next one, with noise and without
    assert_resumes(tmp_path, train, lambda step: step % 5 > 0 and step > 5, val_check_interval=2, max_epochs=5)


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_run_saved_before_a_validation_within_an_epoch_makes_up_for_it(tmp_path):
    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    assert_resumes(
        tmp_path, train, lambda step: step % 5 > 0 and step > 5, every_n_train_steps=1, val_check_interval=2, max_epochs=4
    )


@resumes
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_saved_before_the_validation_at_the_end_of_an_epoch_makes_up_for_it(tmp_path):
    assert_resumes(tmp_path, loader, lambda step: 3 < step < 24, every_n_train_steps=3, check_val_every_n_epoch=2)


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_the_callback_that_saves_may_come_first(tmp_path):
    settings: dict[str, Any] = {"module": Deterministic, "validation": held_out(), "val_check_interval": 2, "max_epochs": 2}

    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    uninterrupted, resumed = moving(), moving()
    saver = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
    )
    whole, _ = fit([saver, *uninterrupted], train=train(), **settings)
    again, _ = fit(resumed, train=train(), ckpt_path=str(tmp_path / "7.ckpt"), **settings)
    assert_same(weights(again), weights(whole))
    assert [history(one) for one in resumed] == [history(two) for two in uninterrupted]


class Interrupted(Deterministic):
    """Ends the third validation of a fit with an error."""

    def __init__(self, hook: str = "", at: int = 3):
        super().__init__()
        self.hook, self.at, self.validations = hook, at, 0

    def on_validation_start(self):
        self.validations += 1

    def raise_in(self, hook: str) -> None:
        if hook == self.hook and self.validations == self.at:
            raise RuntimeError("stop")

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            self.raise_in("step")

    def on_validation_epoch_end(self):
        self.raise_in("epoch end")

    def on_validation_end(self):
        self.raise_in("end")


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("hook", ["step", "epoch end", "end"])
@pytest.mark.parametrize("every", [2, 5])  # batches: within an epoch, and at its end
def test_a_run_that_failed_in_a_validation_resumes_with_the_same_levels(tmp_path, hook, every):
    settings: dict[str, Any] = {"validation": held_out(), "val_check_interval": every, "num_sanity_val_steps": 0}
    settings["max_epochs"] = 3 if every == 2 else 5

    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    uninterrupted, resumed = moving(), moving()
    whole, _ = fit(uninterrupted, module=Interrupted, train=train(), **settings)
    path = str(tmp_path / "failed.ckpt")
    saver = LambdaCallback(on_exception=lambda trainer, *_: trainer.save_checkpoint(path))
    with pytest.raises(RuntimeError, match="stop"):
        fit([*moving(), saver], module=lambda: Interrupted(hook), train=train(), **settings)
    again, _ = fit(resumed, module=Interrupted, train=train(), ckpt_path=path, **settings)
    assert_same(weights(again), weights(whole))
    assert [history(one) for one in resumed] == [history(two) for two in uninterrupted]


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_run_that_failed_between_the_decisions_of_two_levels_resumes_with_the_same_levels(tmp_path):
    settings: dict[str, Any] = {"module": Deterministic, "validation": held_out(), "val_check_interval": 2, "max_epochs": 3}
    path = str(tmp_path / "failed.ckpt")

    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    def fail(trainer, _):
        if trainer.global_step == 7:
            raise RuntimeError("stop")

    uninterrupted, resumed = moving(), moving()
    whole, _ = fit(uninterrupted, train=train(), **settings)
    first, *others = moving()
    saver = LambdaCallback(on_validation_epoch_end=fail, on_exception=lambda trainer, *_: trainer.save_checkpoint(path))
    with pytest.raises(RuntimeError, match="stop"):
        fit([first, saver, *others], train=train(), **settings)
    again, _ = fit(resumed, train=train(), ckpt_path=path, **settings)
    assert_same(weights(again), weights(whole))
    assert [history(one) for one in resumed] == [history(two) for two in uninterrupted]


def test_the_state_is_of_primitives_and_each_callback_has_its_own(tmp_path):
    callbacks = moving()
    _, trainer = fit(callbacks, max_epochs=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert len(saved) == len(callbacks)
    for callback in callbacks:
        state = saved[callback.state_key]
        assert state["state"]["level"] == level_of(callback)
        assert [Decision(*decision) for decision in state["history"]] == history(callback)


def test_a_callback_without_an_adaptive_level_saves_nothing(tmp_path):
    _, trainer = fit([InputNoise(noise.Gaussian(), 0.1)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"] == {}


@resumes
def test_testing_a_checkpoint_does_not_set_the_level_back(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2, 0.3))))
    module, trainer = fit([callback, saver], max_epochs=3, enable_checkpointing=True)
    moves = history(callback)
    trainer.test(module, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert history(callback) == moves
    assert callback.adaptive is not None
    assert callback.adaptive.level == 0.3


@resumes
def test_the_state_of_another_rule_gives_its_level_alone(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit([InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2)))), saver], max_epochs=2, enable_checkpointing=True)
    other = InputNoise(noise.Gaussian(), AdaptiveLevel(governor(warmup=9)))
    with pytest.warns(UserWarning, match="was moved by Plan for multiclass, and is now moved by Governor for multiclass"):
        fit([other], max_epochs=3, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [(decision.level, decision.reason) for decision in history(other)[2:]] == [(0.2, "warmup")]


def test_the_state_of_another_rule_replaces_the_best_of_an_earlier_fit():
    reused, other = (InputNoise(noise.Gaussian(), AdaptiveLevel(rule)) for rule in (governor(), Plan((0.1, 0.2))))
    fit([reused])
    assert reused.adaptive is not None
    assert reused.adaptive.state_dict()["best"] is not None
    with pytest.warns(UserWarning, match="is now moved by Governor"):
        reused.load_state_dict(other.state_dict())
    assert reused.adaptive.state_dict()["best"] is None
    assert reused.adaptive.state_dict()["last"] is None


def test_at_the_largest_level_that_has_a_meaning_a_governor_holds():
    # everything is left at the boundary, which the prediction does not look at
    level = AdaptiveLevel(governor(step=0.4), predict=lambda module, batch: 9.0 * F.one_hot(batch[1], N_CLASSES))
    callback = InputNoise(noise.Impulse(), level)
    fit([callback], max_epochs=5)
    assert [decision.reason for decision in history(callback)] == ["raised", "raised", "raised", "held", "held"]
    assert history(callback)[-1].next_level == 1.0


# --- processes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one process wrote, and what two did."""
    alone, both = (tmp_path_factory.mktemp("decided") / name for name in ("alone", "both"))
    alone.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adaptive_levels.main(alone, 1)
    execute(adaptive_levels.main, both, 2)
    return [alone, both]


def test_two_processes_decide_as_one(folders):
    alone = torch.load(folders[0] / "decided-0.pt")
    for rank in range(2):
        result = torch.load(folders[1] / f"decided-{rank}.pt")
        for name in ("input", "weight", "activation"):
            assert result[name]["history"] == alone[name]["history"]
            assert result[name]["summary"] == alone[name]["summary"]
            # confidences of batches of other sizes, in float32
            assert result[name]["seen"] == pytest.approx(alone[name]["seen"], abs=1e-6)
        for one, two in zip(result["own"]["history"], alone["own"]["history"], strict=True):
            decision = Decision(*two)
            # a metric of torchmetrics counts the sample that the sampler repeats
            varied = ("level", "clean", "boundary", "next_level", "followed")
            near = {name: pytest.approx(getattr(decision, name), abs=1e-5) for name in varied}
            assert one == decision._replace(**near)
        assert result["smoothing"]["seen"][3] == pytest.approx(alone["smoothing"]["seen"][3], abs=1e-6)
        assert [move[4:6] for move in result["smoothing"]["history"]] == [move[4:6] for move in alone["smoothing"]["history"]]
    assert {"raised", "lowered"} <= {move[4] for name in ("input", "own") for move in alone[name]["history"]}


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_two(folders, tmp_path):
    execute(adaptive_levels.continued_alone, tmp_path / "continued")
    alone, continued = (torch.load(folder / "decided-0.pt") for folder in (folders[0], tmp_path / "continued"))
    for name in ("input", "weight", "activation"):
        assert continued[name]["history"] == alone[name]["history"]
        assert continued[name]["summary"] == alone[name]["summary"]


def test_a_process_without_a_batch_is_an_error_on_all(folders):
    assert torch.load(folders[0] / "error-0.pt") == ""
    for rank in range(2):
        said = torch.load(folders[1] / f"error-{rank}.pt")
        assert said.startswith("AdaptiveLevel of 'input' measures on all processes, but one of them saw no batch; let the")
