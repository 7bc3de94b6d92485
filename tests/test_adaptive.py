"""An adaptive level moves only by what its rule observes, and changes nothing else."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import pickle
import re

import pytest
import pytorch_lightning as pl
import torch
from helpers import (
    N_CLASSES,
    Classifier,
    Deterministic,
    Rows,
    Stochastic,
    assert_same,
    fit,
    loader,
    make_trainer,
    resumes,
    search_rate,
    weights,
)
from helpers_adaptive import CALLBACKS, HELD_OUT, Plan, governor, held_out, history, hits, level_of, predicted, seen, still
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_noise import ActivationNoise, AdaptiveLevel, InputNoise, WeightNoise, noise
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.rules import Governor, SignedGap
from lightning_noise.testing import global_streams

every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)


# --- it changes nothing but the level


@every_callback
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_a_level_that_stays_is_bitwise_the_constant(make, level):
    runs = []
    for callbacks in [[make(level)], [adaptive := make(AdaptiveLevel(Plan(), level))], *([[]] if level == 0 else [])]:
        module, trainer = fit(callbacks, module=Stochastic, val_check_interval=2)
        own = {key: value.item() for key, value in trainer.callback_metrics.items() if not key.startswith("train_noise/")}
        runs.append((module, global_streams(), own))
    (first, streams, metrics), *others = runs
    for module, other_streams, other_metrics in others:
        assert_same(weights(module), weights(first))
        assert other_streams == streams
        assert other_metrics == metrics
        for kept in ("seen", "validated"):
            for one, two in zip(getattr(module, kept), getattr(first, kept), strict=True):
                assert_same(one, two)
    assert len(history(adaptive)) == 2


@every_callback
def test_the_level_in_force_is_the_one_last_decided(make):
    levels = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            levels.append(callback.current_level)

    callback = make(AdaptiveLevel(Plan((0.1, 0.0, 0.4)), 0.2))
    fit([callback, Watch()], max_epochs=4)
    assert levels == [0.2] * 3 + [0.1] * 3 + [0.0] * 3 + [0.4] * 3
    assert [(decision.level, decision.next_level) for decision in history(callback)] == [
        (0.2, 0.1),
        (0.1, 0.0),
        (0.0, 0.4),
        (0.4, 0.4),
    ]
    assert [decision.reason for decision in history(callback)] == ["moved", "moved", "moved", "held"]


@pytest.mark.filterwarnings("ignore:.*clip=.* cuts off")
def test_the_held_out_data_are_untouched():
    data = Rows(13, seed=1)
    fit([InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.5), clip=(-1, 1))], validation=loader(data))
    assert_same([data.x, data.y], [Rows(13, seed=1).x, Rows(13, seed=1).y])


def test_a_callback_deep_copies_and_pickles():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(governor()))
    copies = [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
    expected = weights(fit([callback], max_epochs=4)[0])
    for again in copies:
        assert_same(weights(fit([again], max_epochs=4)[0]), expected)
        assert history(again) == history(callback)
    later = pickle.loads(pickle.dumps(callback))
    assert history(later) == history(callback)
    assert level_of(later) == level_of(callback) > 0


def test_the_task_says_the_metric_of_a_guess():
    chance = Rows(13, seed=1).y.bincount().max().item() / 13
    told = InputNoise(noise.Gaussian(), AdaptiveLevel(Governor(chance=chance, warmup=0, min_skill=0.01)))
    asked = InputNoise(noise.Gaussian(), AdaptiveLevel(Governor(warmup=0, min_skill=0.01)))
    for callback in (told, asked):
        fit([callback], max_epochs=6)
    assert history(asked) == history(told)
    assert level_of(asked) > 0


def test_a_rule_is_wrapped_in_an_adaptive_level():
    rule = Governor(warmup=1)
    callback = InputNoise(noise.Gaussian(), rule)
    assert callback.level == AdaptiveLevel(rule)
    assert callback.adaptive is not None
    assert InputNoise(noise.Gaussian(), AdaptiveLevel()).level.rule == Governor()


@pytest.mark.parametrize(
    ("level", "relative", "highest"),
    [
        (AdaptiveLevel(), "std", 1.0),
        (AdaptiveLevel(), None, math.inf),
        (AdaptiveLevel(Governor(hi=2.0)), "std", 2.0),
        (AdaptiveLevel(start=0.9), "max", 1.0),
    ],
    ids=str,
)
def test_noise_in_weights_rises_until_it_is_as_strong_as_the_weights(level, relative, highest):
    adaptive = WeightNoise(noise.Gaussian(), level, relative=relative).adaptive
    assert adaptive is not None
    assert adaptive._rule == dataclasses.replace(level.rule, hi=highest)


# --- when it moves


def test_the_sanity_check_moves_nothing():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.3,))))
    at_the_end = []

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            at_the_end.append((level_of(callback), len(history(callback)), dict(trainer.callback_metrics)))

    fit([callback, Watch()], max_epochs=1)
    assert [(level, moves) for level, moves, _ in at_the_end] == [(0.0, 0)]
    assert not any(key.startswith("adaptive") for key in at_the_end[0][2])
    assert len(history(callback)) == 1


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        ({"max_epochs": 3}, [2, 5, 8]),
        ({"max_epochs": 2, "val_check_interval": 1}, [0, 1, 2, 3, 4, 5]),
        ({"max_epochs": 2, "val_check_interval": 2}, [1, 4]),
        ({"max_epochs": -1, "max_steps": 7}, [2, 5]),
        ({"max_epochs": -1, "max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None}, [1, 3, 5]),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, [5, 11]),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, [1, 3]),
        ({"max_epochs": 2, "num_sanity_val_steps": 0}, [2, 5]),
        ({"fast_dev_run": True}, [0]),
    ],
    ids=str,
)
def test_each_validation_of_a_fit_counts(run, steps):
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2, 0.3))))
    fit([callback], **run)
    assert [decision.step for decision in history(callback)] == steps
    assert level_of(callback) == min(0.1 * len(steps), 0.3) or level_of(callback) == pytest.approx(0.1 * len(steps))


def test_validations_and_tests_of_their_own_move_nothing():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2, 0.3, 0.4))))
    pl.seed_everything(0, verbose=False)
    module, trainer = Classifier(), make_trainer([callback])
    trainer.validate(module, held_out(), verbose=False)
    trainer.fit(module, loader(), held_out())
    trainer.validate(module, held_out(), verbose=False)
    trainer.test(module, held_out(), verbose=False)
    assert len(history(callback)) == len(seen(callback)) == 2
    assert level_of(callback) == 0.2


def test_a_trainer_that_goes_on_moves_on():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2, 0.3, 0.4))))
    module, trainer = fit([callback])
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), held_out())
    assert [decision.next_level for decision in history(callback)] == [0.1, 0.2, 0.3, 0.4]


def test_max_batches_bounds_what_is_looked_at():
    first, all_ = (
        InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, max_batches=n), name=name)
        for n, name in ((2, "first"), (None, "all"))
    )
    module, _ = fit([first, all_], module=still, validation=held_out())
    (of_two,), (of_all,) = seen(first), seen(all_)
    right = hits(predicted(module.eval(), HELD_OUT.x))
    assert (of_two.n, of_two.clean) == (68, right[:68].mean().item())
    assert (of_all.n, of_all.clean) == (101, right.mean().item())


def test_the_first_loader_is_looked_at():
    class TwoLoaders(Deterministic):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    callbacks = [InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7)) for _ in range(2)]
    fit(callbacks[:1], module=still, validation=held_out())
    fit(callbacks[1:], module=lambda: TwoLoaders(lr=0.0), validation=[held_out(), loader(Rows(9, seed=2))])
    assert seen(callbacks[1]) == seen(callbacks[0])


# --- several


def test_several_move_in_turn_in_the_order_of_the_trainer():
    plan = (0.1, 0.2, 0.3)
    callbacks = [
        WeightNoise(noise.Gaussian(), AdaptiveLevel(Plan(plan))),
        InputNoise(noise.Uniform(), 0.1, name="constant"),
        InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(plan))),
        ActivationNoise(noise.Gaussian(), AdaptiveLevel(Plan(plan)), "net.1"),
    ]
    fit(callbacks, max_epochs=7)
    steps = [[decision.step for decision in history(callback)] for callback in callbacks if callback.adaptive]
    assert steps == [[2, 11, 20], [5, 14], [8, 17]]
    assert [level_of(callback) for callback in callbacks if callback.adaptive] == [0.3, 0.2, 0.2]


def test_each_is_looked_at_with_the_others_off():
    def make() -> list[NoiseCallback]:
        return [
            InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((8.0,)))),
            WeightNoise(noise.Gaussian(), AdaptiveLevel(Plan((2.0,))), relative="std"),
            ActivationNoise(noise.Gaussian(), AdaptiveLevel(Plan((2.0,))), "net.1"),
        ]

    together = make()
    fit(together, module=still, validation=held_out(), max_epochs=6)
    for one, among_others in zip(make(), together, strict=True):
        fit([one], module=still, validation=held_out(), max_epochs=2)
        assert seen(among_others) == seen(one)
        assert seen(one)[1].boundary != seen(one)[1].clean


@resumes
def test_one_that_a_checkpoint_does_not_know_takes_turns_with_the_others(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last")
    old = WeightNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2))))
    fit([old, saver], max_epochs=3, enable_checkpointing=True)
    old, new = WeightNoise(noise.Gaussian(), AdaptiveLevel(Plan())), InputNoise(noise.Gaussian(), AdaptiveLevel(Plan()))
    fit([old, new], max_epochs=7, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [decision.step for decision in history(old)] == [2, 5, 8, 14, 20]
    assert [decision.step for decision in history(new)] == [11, 17]


# --- other callbacks, and the tuner


def test_checkpoints_and_early_stopping_follow_the_level(tmp_path):
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.5, 0.3))))
    saver = ModelCheckpoint(tmp_path, monitor="train_noise/input/level", mode="max")
    stopper = EarlyStopping("train_noise/input/level", mode="max", patience=2)
    _, trainer = fit([saver, stopper, callback], max_epochs=10, enable_checkpointing=True)
    assert saver.best_model_score == torch.tensor(0.5)
    assert trainer.current_epoch == 4


def test_the_search_for_a_learning_rate_finds_what_it_finds_without(tmp_path):
    def found(callbacks):
        losses, module, trainer = search_rate(callbacks, tmp_path)
        assert not [decision for callback in callbacks for decision in history(callback)]
        trainer.fit(module, loader(), loader())
        return losses

    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.2)), 0.5))
    assert found([callback]) == found([])
    assert [decision.level for decision in history(callback)] == [0.5, 0.1]


# --- what is logged


def test_tensorboard_holds_the_levels_the_reasons_and_the_figure(tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path)
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.25, 0.25, 0.5))))
    with caplog.at_level(logging.INFO):
        fit([callback], logger=logger, max_epochs=3)
    events = EventAccumulator(logger.log_dir).Reload()
    levels, followed = (events.Scalars(f"train_noise/input/{key}") for key in ("level", "clean"))
    assert [(event.step, event.value) for event in levels] == [(2, 0.25), (5, 0.25), (8, 0.5)]
    # TensorBoard holds float32
    assert [event.value for event in followed] == pytest.approx([decision.clean for decision in history(callback)])
    assert events.Tags()["images"] == ["train_noise/input/moves"]
    (text,) = events.Tensors("train_noise/input/moves/text_summary")
    said, _, table = text.tensor_proto.string_val[0].decode().partition("\n\n")
    first, second, last = (f"{decision.clean:.3g}" for decision in history(callback))
    assert table.splitlines()[2:] == [
        f"| 2 | moved, 1 time | 0 to 0.25 | {first} | {first} |",
        f"| 5 | held, 1 time | 0.25 | {second} | {history(callback)[1].boundary:.3g} |",
        f"| 8 | moved, 1 time | 0.25 to 0.5 | {last} | {history(callback)[2].boundary:.3g} |",
    ]
    last = history(callback)[-1]
    assert said == f"input: moved 2 times, held 1 time; level 0 to 0.5; clean is {last.clean:.3g} at level 0.25."
    assert callback.adaptive is not None
    assert said == callback.adaptive.summary()
    assert said in caplog.messages


@pytest.mark.parametrize("rule", [governor(), SignedGap()])
def test_what_the_rule_follows_is_logged(rule):
    callback = WeightNoise(noise.Gaussian(), rule)
    _, trainer = fit([callback])
    assert callback.adaptive is not None
    assert callback.adaptive._last is not None
    # Lightning logs float32
    assert trainer.callback_metrics[f"train_noise/weight/{rule.follows}"].item() == pytest.approx(
        rule.measure(callback.adaptive._last), nan_ok=True
    )


def test_the_summary_says_what_was_done_and_what_is_left():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(governor(warmup=1), predict=lambda module, batch: 9 * eye[batch[1]]))
    eye = torch.eye(N_CLASSES)
    fit([callback], max_epochs=3)
    assert callback.adaptive is not None
    said = callback.adaptive.summary()
    assert said == "input: warmup 1 time, raised 2 times; level 0 to 0.3; 100 % of the clean skill is retained at level 0.15."


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_other_loggers_and_none_work(kind, tmp_path):
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.25, 0.5))))
    fit([callback], logger=CSVLogger(tmp_path) if kind == "csv" else False)
    if kind == "csv":
        (written,) = tmp_path.rglob("metrics.csv")
        assert "train_noise/input/level" in written.read_text()
        assert [path.name for path in tmp_path.rglob("*.png")] == ["moves-6.png"]


def test_the_configuration_says_the_rule(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(
        [InputNoise(noise.Gaussian(), AdaptiveLevel(governor(), predict=lambda module, batch: module(batch[0])))], logger=logger
    )
    (text,) = EventAccumulator(logger.log_dir).Reload().Tensors("lightning_noise/configuration/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert re.search(r"\| `level=AdaptiveLevel\(rule=Governor\(chance=0\.33.*predict=<function", said)
    assert " at 0x" not in said
