"""A level that tunes itself sees what the model is at that time, moves by it alone, and changes nothing else."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import decided
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import (
    N_CLASSES,
    Classifier,
    Dictionary,
    Rows,
    Stochastic,
    assert_same,
    fit,
    loader,
    make_trainer,
    search_rate,
    weights,
)
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_processes import execute
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import R2Score

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    Key,
    LabelSmoothing,
    Mixup,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
)
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.callbacks.held_out import N_GROUPS, groups_of
from lightning_noise.metrics import BrierScore
from lightning_noise.parameters import weight_noise
from lightning_noise.rules import AnyLevel, Decision, Governor, Observation, Rule, SignedGap, State
from lightning_noise.testing import global_streams

HELD_OUT = Rows(101, seed=1)


def held_out() -> DataLoader:
    return loader(HELD_OUT, batch_size=34)


@dataclass(frozen=True)
class Plan(Rule):
    """Goes through levels whatever it sees, stays at the last, and keeps what it saw."""

    reasons: ClassVar[tuple[str, ...]] = ("held", "moved")

    levels: tuple[float, ...] = ()
    seen: list[Observation] = field(default_factory=list, compare=False)

    def init(self, level: float) -> State:
        return {"level": level, "validations": 0}

    def update(self, state: State, observation: Observation) -> tuple[State, str]:
        self.seen.append(observation)
        level = (*self.levels, *[self.levels[-1]] * 100)[state["validations"]] if self.levels else state["level"]
        reason = "held" if level == state["level"] else "moved"
        return {"level": level, "validations": state["validations"] + 1}, reason


def governor(**kwargs: Any) -> Governor:
    """One that moves in a run of a few validations of a model that learns little."""
    return Governor(**{"chance": 1 / N_CLASSES, "warmup": 0, "min_skill": 0.01, **kwargs})


def history(callback: NoiseCallback) -> list[Decision]:
    assert callback.adaptive is not None
    return callback.adaptive.history


def seen(callback: NoiseCallback) -> list[Observation]:
    assert callback.adaptive is not None
    assert isinstance(callback.adaptive.setting.rule, Plan)
    return callback.adaptive.setting.rule.seen


def level_of(callback: NoiseCallback) -> float:
    assert callback.adaptive is not None
    return callback.adaptive.level


CALLBACKS: dict[str, Callable[[AnyLevel], NoiseCallback]] = {
    "input": lambda level: InputNoise(noise.Gaussian(), level),
    "input, some samples": lambda level: InputNoise(noise.Uniform(), level, probability=0.5, per_sample=True, clip=(-2, 2)),
    "weight": lambda level: WeightNoise(noise.Gaussian(), level, relative="std"),
    "activation": lambda level: ActivationNoise(noise.Gaussian(), level, "net.1"),
}
# the resumed run saves no checkpoints of its own
resumes = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)


class Deterministic(Classifier):
    """Without dropout: a resumed run draws other global numbers, with noise and without."""

    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.net[3] = nn.Identity()


def still() -> Deterministic:
    """It does not learn."""
    return Deterministic(lr=0.0)


# --- it changes nothing but the level


@every_callback
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_a_level_that_stays_is_bitwise_the_constant(make, level):
    runs = []
    for callbacks in [[make(level)], [adaptive := make(AdaptiveLevel(Plan(), level))], *([[]] if level == 0 else [])]:
        module, trainer = fit(callbacks, module=Stochastic, val_check_interval=2)
        own = {key: value.item() for key, value in trainer.callback_metrics.items() if not key.startswith("adaptive")}
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
            levels.append(callback.level_in_force)

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


# --- it sees what it says


class Snapshots(pl.Callback):
    """Keeps the weights at each validation."""

    def __init__(self):
        self.models: list[Deterministic] = []

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            model = Deterministic()
            model.load_state_dict(copy.deepcopy(pl_module.state_dict()))
            self.models.append(model.eval())


@torch.no_grad()
def predicted(model: Classifier, x: Tensor, size: int = 34) -> Tensor:
    return torch.cat([model(part) for part in x.split(size)])


def hits(logits: Tensor) -> Tensor:
    return (logits.argmax(1) == HELD_OUT.y).double()


def at_the_input(model: Deterministic, level: float) -> Tensor:
    key = Key((7, "input", "boundary"), positions=range(101)) / "leaf" / "0"
    return predicted(model, key.apply(noise.Gaussian(), HELD_OUT.x, level))


def at_each_input_its_own(model: Deterministic, level: float) -> Tensor:
    """All samples get noise, also where the callback leaves some out in training, but each at its own level."""
    key = Key((7, "input", "boundary"), positions=range(101))

    def draw(x: Tensor, level: float, *, generator: torch.Generator) -> Tensor:
        return torch.rand(1, generator=generator)

    levels = level * (key / "per_sample").apply(draw, torch.zeros(101), 1.0)
    return predicted(model, (key / "leaf" / "0").apply(noise.Uniform(), HELD_OUT.x, levels).clamp(-2, 2))


@torch.no_grad()
def in_the_weights(model: Deterministic, level: float) -> Tensor:
    """Each batch of 34 has a draw of its own."""
    logits = []
    for batch_idx, x in enumerate(HELD_OUT.x.split(34)):
        noisy = copy.deepcopy(model)
        for name, w in noisy.named_parameters():
            if w.ndim > 1:
                key = Key((7, "weight", "boundary", batch_idx)) / "parameter" / name
                w.copy_(weight_noise(w, noise.Gaussian(), level * w.std(correction=0).item(), key))
        logits.append(noisy(x))
    return torch.cat(logits)


def in_the_activations(model: Deterministic, level: float) -> Tensor:
    key = Key((7, "activation", "boundary"), positions=range(101)) / "module" / "net.1" / 0 / "leaf" / ""
    hidden = predicted(model.net[:2], HELD_OUT.x)  # type: ignore[arg-type]
    return predicted(model.net[2:], key.apply(noise.Gaussian(), hidden, level))  # type: ignore[arg-type]


BY_HAND = [
    (lambda level: InputNoise(noise.Gaussian(), level, seed=7), at_the_input),
    (
        lambda level: InputNoise(noise.Uniform(), level, probability=0.5, per_sample=True, clip=(-2, 2), seed=7),
        at_each_input_its_own,
    ),
    (lambda level: WeightNoise(noise.Gaussian(), level, relative="std", seed=7), in_the_weights),
    (lambda level: ActivationNoise(noise.Gaussian(), level, "net.1", seed=7), in_the_activations),
]


@pytest.mark.parametrize(("make", "noisy"), BY_HAND, ids=CALLBACKS)
def test_clean_and_boundary_are_those_of_a_hand_written_loop(make, noisy):
    callback = make(AdaptiveLevel(Plan((0.8, 1.6, 0.0, 2.4)), 0.8))
    snapshots = Snapshots()
    fit([callback, snapshots], module=Deterministic, validation=held_out(), max_epochs=5)
    assert len(snapshots.models) == 5
    for model, decision, observed in zip(snapshots.models, history(callback), seen(callback), strict=True):
        clean, boundary = predicted(model, HELD_OUT.x), noisy(model, decision.level)
        assert observed.clean == decision.clean == hits(clean).mean().item()
        assert observed.boundary == decision.boundary == hits(boundary if decision.level else clean).mean().item()
        assert observed.n == 101
    assert sum(decision.boundary != decision.clean for decision in history(callback)) >= 3, "the noise was seen"


def jackknife(values: Tensor) -> float:
    """The standard error of the mean of these samples, from the means without each group."""
    groups = groups_of(range(len(values)), values.device)
    n, pseudo = len(values), []
    for group in range(N_GROUPS):
        if m := int((groups == group).sum()):
            pseudo.append((n / m, n / m * values.mean() - (n / m - 1) * values[groups != group].mean()))
    centre = sum(value / h for h, value in pseudo)
    return math.sqrt(sum((value - centre) ** 2 / (h - 1) for h, value in pseudo) / len(pseudo))


def test_gap_and_standard_errors_are_those_of_hand_made_groups():
    callback, snapshots = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.3,)))), Snapshots()
    fit([callback, snapshots], module=lambda: Deterministic(lr=0.5), validation=held_out(), max_epochs=6)
    best = hits(predicted(snapshots.models[0], HELD_OUT.x))
    for model, observed in zip(snapshots.models, seen(callback), strict=True):
        logits = predicted(model, HELD_OUT.x)
        now, confidence = hits(logits), logits.softmax(1).amax(1).double()
        # sums of 101 counts in float64, in another order
        assert observed.standard_error == pytest.approx(jackknife(now - best), rel=1e-9, abs=1e-15)
        # confidences are whole multiples of 2^-24
        assert observed.signed_gap == pytest.approx((confidence - now).mean().item(), abs=2**-24)
        assert observed.signed_gap_error == pytest.approx(jackknife(confidence - now), rel=1e-4)
        if now.sum() > best.sum():
            best = now
    accuracies = [observed.clean for observed in seen(callback)]
    assert accuracies[0] < max(accuracies) > accuracies[-1], "a validation is compared with the best, not the first or last"
    assert seen(callback)[0].standard_error == 0 < seen(callback)[-1].standard_error


def test_the_draw_is_the_same_in_each_validation():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7))
    fit([callback], module=still, validation=held_out(), max_epochs=3)
    assert len({observed.boundary for observed in seen(callback)}) == 1
    assert seen(callback)[0].boundary != seen(callback)[0].clean


@pytest.mark.parametrize("size", [1, 13, 101])
def test_the_batch_size_does_not_matter(size):
    first, other = (InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7)) for _ in range(2))
    fit([first], module=still, validation=held_out(), max_epochs=1)
    fit([other], module=still, validation=loader(HELD_OUT, batch_size=size), max_epochs=1)
    assert seen(other)[0]._replace(signed_gap=0, signed_gap_error=0) == seen(first)[0]._replace(
        signed_gap=0, signed_gap_error=0
    )
    # products of matrices of other sizes, in float32
    assert seen(other)[0].signed_gap == pytest.approx(seen(first)[0].signed_gap, abs=1e-6)


def broken(x: Tensor, level: float, *, generator: torch.Generator) -> Tensor:
    """Not a number on held-out data."""
    return x if torch.is_grad_enabled() else x * torch.nan


class Diverging(Classifier):
    def forward(self, x):
        return super().forward(x) * (1 if torch.is_grad_enabled() else torch.nan)


@pytest.mark.parametrize(("module", "place"), [(Diverging, noise.Gaussian()), (Classifier, broken)], ids=["clean", "noisy"])
def test_predictions_that_are_no_numbers_end_no_run_and_lower_the_level(module, place):
    callback = InputNoise(place, AdaptiveLevel(governor(), 0.5))
    fit([callback], module=module)
    assert [decision.reason for decision in history(callback)] == ["panicked"] * 2
    assert all(math.isnan(decision.boundary) for decision in history(callback))
    assert all(math.isnan(decision.clean) == (module is Diverging) for decision in history(callback))
    assert level_of(callback) == pytest.approx(0.5 * 0.8**4)


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
            InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((1.0,)))),
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


# --- resume


def moving() -> list[NoiseCallback]:
    """Among them two of one class."""
    return [
        InputNoise(noise.Gaussian(), AdaptiveLevel(governor(step=1.0))),
        InputNoise(noise.Speckle(), AdaptiveLevel(Plan((0.1, 0.2, 0.3, 0.4, 0.5))), name="planned"),
        WeightNoise(noise.Gaussian(), AdaptiveLevel(governor(step=0.5)), relative="std"),
    ]


def assert_resumes(folder: Path, train: Callable[[], Any], at: Callable[[int], bool], **kwargs: Any) -> None:
    settings = {"module": Deterministic, "validation": held_out(), "max_epochs": 8, **kwargs}
    uninterrupted, saver = moving(), ModelCheckpoint(folder, save_top_k=-1, filename="{step}")
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
    assert {"grew", "moved"} < moved


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
    with pytest.warns(UserWarning, match="is one of Plan and multiclass, and now it is one of Governor and multiclass"):
        fit([other], max_epochs=3, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [(decision.level, decision.reason) for decision in history(other)[2:]] == [(0.2, "waited")]


def test_at_the_largest_level_that_has_a_meaning_a_governor_holds():
    # everything is left at the boundary, which the prediction does not look at
    level = AdaptiveLevel(governor(step=0.4), predict=lambda module, batch: F.one_hot(batch[1], N_CLASSES).float())
    callback = InputNoise(noise.Impulse(), level)
    fit([callback], max_epochs=5)
    assert [decision.reason for decision in history(callback)] == ["grew", "grew", "grew", "held", "held"]
    assert history(callback)[-1].next_level == 1.0


# --- processes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one process wrote, and what two did."""
    alone, both = (tmp_path_factory.mktemp("decided") / name for name in ("alone", "both"))
    alone.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decided.main(alone, 1)
    execute(Path(decided.__file__), both, 2)
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
            step, level, clean, boundary, reason, next_level = two
            # a metric of torchmetrics counts the sample that the sampler repeats
            assert one == (step, level, pytest.approx(clean, abs=1e-6), pytest.approx(boundary, abs=1e-6), reason, next_level)
        assert result["smoothing"]["seen"][3] == pytest.approx(alone["smoothing"]["seen"][3], abs=1e-6)
        assert [move[4:] for move in result["smoothing"]["history"]] == [move[4:] for move in alone["smoothing"]["history"]]
    assert {"grew", "shrank"} <= {move[4] for name in ("input", "weight", "activation") for move in alone[name]["history"]}


def test_a_process_without_a_batch_is_an_error_on_all(folders):
    assert torch.load(folders[0] / "error-0.pt") == ""
    for rank in range(2):
        said = torch.load(folders[1] / f"error-{rank}.pt")
        assert said == "AdaptiveLevel of 'input' measures on all processes, but one of them saw no batch"


# --- metrics


def test_a_metric_of_ones_own_is_read():
    own = {
        "torchmetrics": MulticlassAccuracy(N_CLASSES, average="micro"),
        "task": "multiclass",
    }
    callbacks = {
        name: InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, metric=metric), seed=7)  # type: ignore[arg-type]
        for name, metric in own.items()
    }
    for callback in callbacks.values():
        fit([callback], module=still, validation=held_out())
    for one, two in zip(*(seen(callback) for callback in callbacks.values()), strict=True):
        # float32
        assert (one.clean, one.boundary) == pytest.approx((two.clean, two.boundary), abs=1e-7)
        assert one.n == two.n == 101
        assert one.standard_error == math.inf
        assert math.isnan(one.signed_gap)


def test_a_metric_of_the_package_is_read():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, metric=BrierScore()), seed=7)
    module, _ = fit([callback], module=still, validation=held_out())
    for observed, logits in [
        (seen(callback)[0].clean, predicted(module.eval(), HELD_OUT.x)),
        (seen(callback)[0].boundary, at_the_input(module, 0.7)),
    ]:
        target = F.one_hot(HELD_OUT.y, N_CLASSES)
        # sums of squares in float32
        assert observed == pytest.approx((logits.softmax(1) - target).square().sum(1).mean().item(), rel=1e-5)


class Regressor(Deterministic):
    """Predicts the sum of the features."""

    def __init__(self, lr: float = 0.02):
        super().__init__(lr)
        self.net = nn.Linear(8, 1)  # type: ignore[assignment]

    def forward(self, x):
        return self.net(x)[:, 0]

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))


def numbers(n: int, seed: int) -> Rows:
    rows = Rows(n, seed=seed)
    rows.y = rows.x.sum(1)
    return rows


def test_an_error_is_governed_as_the_share_of_the_variance_that_is_explained():
    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module: Any):
            errors.append(F.mse_loss(pl_module(rows.x), rows.y).item())

    errors: list[float] = []
    rows = numbers(101, 1)
    variance = rows.y.var(correction=0).item()
    error = InputNoise(
        noise.Gaussian(),
        AdaptiveLevel(Governor(chance=variance, best=0.0, warmup=0, step=0.5), metric="regression"),
    )
    share = InputNoise(
        noise.Gaussian(), AdaptiveLevel(Governor(chance=0.0, warmup=0, step=0.5, tolerance=1.0), metric=R2Score())
    )
    for callback in (error, share):
        train, validation = loader(numbers(64, 0)), loader(rows, batch_size=34)
        fit([callback, Look()], module=Regressor, train=train, validation=validation, max_epochs=8, num_sanity_val_steps=0)
    # means in float32
    assert [decision.clean for decision in history(error)] == pytest.approx(errors[:8], rel=1e-5)
    for one, two in zip(history(error), history(share), strict=True):
        assert (one.reason, one.next_level) == (two.reason, two.next_level)
        assert 1 - one.clean / variance == pytest.approx(two.clean, abs=1e-5)
        assert 1 - one.boundary / variance == pytest.approx(two.boundary, abs=1e-5)
    assert {"grew", "shrank"} <= {decision.reason for decision in history(error)}


@pytest.mark.parametrize(("task", "outputs"), [("binary", 1), ("multilabel", 4)])
def test_a_binary_and_a_multilabel_task_are_read(task, outputs):
    class Labels(Regressor):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Linear(8, outputs)  # type: ignore[assignment]

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    rows = Rows(101, seed=1)
    rows.y = (rows.x[:, :outputs] > 0).float()
    target = rows.y
    if task == "binary":
        rows.y = target = rows.y[:, :1]
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, metric=task), seed=7)
    if task == "binary":
        callback = InputNoise(
            noise.Gaussian(),
            AdaptiveLevel(Plan(), 0.7, metric="binary", predict=lambda module, batch: module(batch[0])),
            seed=7,
        )
    module, _ = fit([callback], module=Labels, train=loader(rows), validation=loader(rows), max_epochs=1)
    with torch.no_grad():
        assert seen(callback)[0].clean == ((module(rows.x) > 0) == target.bool()).double().mean().item()
        key = Key((7, "input", "boundary"), positions=range(101)) / "leaf" / "0"
        noisy = module(key.apply(noise.Gaussian(), rows.x, 0.7))
        assert seen(callback)[0].boundary == ((noisy > 0) == target.bool()).double().mean().item()


# --- batches


def as_dict(samples):
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"data": {"x": x}, "y": y, "weight": torch.ones(len(y))}  # two leaves could be the input


@pytest.mark.parametrize("adaptive", [{"inputs": "data.x", "targets": "y"}, {"targets": "y"}], ids=str)
def test_inputs_and_targets_are_found_in_a_dict(adaptive):
    # left out, the inputs are those of the callback
    level = AdaptiveLevel(Plan(), 0.7, **adaptive)
    callback = InputNoise(noise.Uniform(), level, inputs="data.x", seed=7)
    fit(
        [callback],
        module=lambda: Dictionary(lr=0.0),
        train=loader(collate_fn=as_dict),
        validation=loader(HELD_OUT, collate_fn=as_dict),
    )
    pl.seed_everything(0, verbose=False)
    module = still().eval()
    assert seen(callback)[0].clean == hits(predicted(module, HELD_OUT.x)).mean().item()
    key = Key((7, "input", "boundary"), positions=range(101)) / "leaf" / "data.x"
    assert seen(callback)[0].boundary == hits(predicted(module, key.apply(noise.Uniform(), HELD_OUT.x, 0.7))).mean().item()


def test_the_target_of_the_callback_is_read():
    callback = LabelSmoothing(AdaptiveLevel(SignedGap(), 0.02, inputs="data.x"), targets="y")
    fit([callback], module=Dictionary, train=loader(collate_fn=as_dict), validation=loader(HELD_OUT, collate_fn=as_dict))
    assert len(history(callback)) == 2


class Tokens(Deterministic):
    """Classifies rows of token ids."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.words = nn.Embedding(10, 8)

    def forward(self, x):
        return self.net(self.words(x).mean(1))


def test_embeddings_of_tokens_are_looked_at_with_noise():
    rows = Rows(101, seed=1)
    rows.x = torch.randint(10, (101, 5), generator=torch.Generator().manual_seed(0))
    callback = EmbeddingNoise(AdaptiveLevel(Plan((30.0, 60.0))), seed=7)
    fit([callback], module=Tokens, train=loader(rows), validation=loader(rows), max_epochs=3)
    assert [decision.level for decision in history(callback)] == [0.0, 30.0, 60.0]
    assert history(callback)[0].clean == history(callback)[0].boundary
    assert history(callback)[2].clean != history(callback)[2].boundary


def test_the_forward_passes_have_the_precision_of_the_trainer():
    def predict(module, batch):
        casting.append(torch.is_autocast_enabled("cpu"))
        return module(batch[0])

    casting: list[bool] = []
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(governor(), 0.1, predict=predict))
    fit([callback], precision="bf16-mixed")
    assert len(history(callback)) == 2
    assert len(casting) > 8
    assert all(casting)


# --- errors and exceptions


class Failing(Deterministic):
    def __init__(self, at: int):
        super().__init__(lr=0.0)
        self.at, self.n = at, 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.count()

    def count(self):
        self.n += 1
        if self.n == self.at:
            raise RuntimeError("stop")


@pytest.mark.parametrize("where", ["step", "predict"])
@pytest.mark.parametrize("at", range(1, 6))
def test_an_exception_leaves_the_weights_and_a_fit_that_follows_as_they_were(where, at):
    def predict(module, batch):
        if where == "predict" and isinstance(module, Failing):
            module.count()
        return module(batch[0])

    level = AdaptiveLevel(Plan((0.2, 0.4)), 0.5, predict=predict)
    callback = WeightNoise(noise.Gaussian(), level, relative="std")
    pl.seed_everything(0, verbose=False)
    module = Failing(at)
    if where == "predict":
        module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    before, trainer = weights(module), make_trainer([callback], num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, loader(), loader(HELD_OUT, batch_size=34))
    assert_same(weights(module), before)
    done = len(history(callback))
    fit([callback], module=still)
    assert len(history(callback)) == done + 2


BAD = [
    ({"predict": lambda module, batch: None}, "the module returned NoneType for a target"),
    ({"predict": lambda module, batch: module(batch[0]).argmax(1)}, r"the module returned int64 \(8,\)"),
    ({"targets": "label"}, "no leaf 'label'"),
    ({"inputs": "image"}, "no leaf 'image'"),
    ({"metric": "binary"}, "returned float32"),
    ({"metric": "regression", "rule": Governor(chance=1.0, best=0.0)}, "returned float32"),
    ({"metric": MulticlassAccuracy(N_CLASSES), "predict": lambda module, batch: None}, "returned NoneType"),
]


@pytest.mark.parametrize(("setting", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_found_before_the_training(setting, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([InputNoise(noise.Gaussian(), AdaptiveLevel(**{"rule": governor(), **setting}))], module=module)
    assert not module.seen


def test_of_several_targets_one_is_to_be_named():
    with pytest.raises(ValueError, match=r"of the targets \[1, 2\] an adaptive level reads one: give AdaptiveLevel"):
        fit([Mixup(AdaptiveLevel(SignedGap()), targets=[1, 2])])


def test_noise_that_held_out_data_cannot_take_is_found_before_the_training():
    class Transposed(Classifier):
        def __init__(self):
            super().__init__()
            self.transposed = nn.Identity()

        def forward(self, x):
            return self.transposed(super().forward(x).T).T

    module = Transposed()
    with pytest.raises(ValueError, match=r"each of the 8 samples has a draw of its own, but 'transposed' returned"):
        fit([ActivationNoise(noise.Gaussian(), AdaptiveLevel(governor()), "transposed")], module=module)
    assert not module.seen


@pytest.mark.parametrize(
    "make",
    [
        LabelSmoothing,
        lambda level: TargetNoise(labels.FlipLabels(N_CLASSES), level),
        Mixup,
        lambda level: CutMix(level, dim=(-1,)),
        lambda level: GradientNoise(noise.Gaussian(), level),
    ],
    ids=["smoothing", "flips", "mixup", "cutmix", "gradient"],
)
def test_a_rule_that_asks_what_noise_does_is_refused_where_held_out_data_have_none(make):
    message = r"Governor asks what noise does to held-out data, but \w+ mixes samples, or changes labels or gradients"
    with pytest.raises(ValueError, match=message):
        make(AdaptiveLevel(governor()))
    fit([callback := make(AdaptiveLevel(SignedGap(), 0.02))])
    assert all(math.isnan(decision.boundary) for decision in history(callback))
    assert [decision.reason for decision in history(callback)] != []


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AdaptiveLevel(0.3), TypeError, r"rule must be a Rule, such as Governor\(chance=0\.1\), got 0\.3"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(Governor), TypeError, "rule must be a Rule"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(governor(), -0.1), ValueError, "finite and not negative, got -0.1"),
        (lambda: AdaptiveLevel(governor(hi=0.5), 0.6), ValueError, r"the level must start in \[0, 0\.5\], got start=0\.6"),
        (lambda: AdaptiveLevel(governor(lo=0.1)), ValueError, r"the level must start in \[0\.1, inf\], got start=0"),
        (lambda: AdaptiveLevel(governor(), metric="accuracy"), ValueError, "metric must be one of"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(SignedGap(), metric="regression"), ValueError, "SignedGap reads confidences"),
        (lambda: AdaptiveLevel(SignedGap(), metric=BrierScore()), ValueError, "SignedGap reads confidences"),
        (lambda: AdaptiveLevel(governor(), max_batches=0), ValueError, "max_batches must be at least 1, got 0"),
        (lambda: InputNoise(noise.Impulse(), AdaptiveLevel(governor(), 1.5)), ValueError, r"in \[0, 1\], got 1\.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_refused_when_it_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("callback", "run", "message"),
    [
        (InputNoise(noise.SwapNoise(), AdaptiveLevel(governor())), {}, "the noise of 'input' mixes rows"),
        (
            InputNoise(noise.Gaussian(), AdaptiveLevel(governor())),
            {"limit_val_batches": 0},
            "AdaptiveLevel needs a validation",
        ),
        (
            InputNoise(noise.Gaussian(), AdaptiveLevel(governor())),
            {"check_val_every_n_epoch": 3},
            "no validation comes in a run of 2 epochs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_in_which_it_could_not_move_is_refused(callback, run, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([callback], module=module, **run)
    assert not module.seen


@pytest.mark.parametrize(
    "nest",
    [
        lambda level: schedules.Window(level, until=0.5),
        lambda level: schedules.Product([level, 0.5]),
        lambda level: schedules.Piecewise([0.5, level], milestones=[0.5]),
        lambda level: schedules.Every(level, every=2),
    ],
    ids=["window", "product", "piecewise", "every"],
)
def test_an_adaptive_level_is_no_part_of_a_schedule(nest):
    module = Classifier()
    with pytest.raises(
        TypeError, match=r"a level within a schedule must be a number, a schedule or a callable, got AdaptiveLevel\("
    ):
        fit([InputNoise(noise.Gaussian(), nest(AdaptiveLevel(governor())))], module=module)
    assert not module.seen


def test_the_level_stays_where_it_has_a_meaning():
    callback = InputNoise(
        noise.Impulse(), AdaptiveLevel(governor(shrink_below=0.0, grow_above=0.0, step=0.4, tolerance=1.0), 0.3)
    )
    fit([callback], max_epochs=5)
    assert level_of(callback) == 1.0
    assert callback.state_dict()["state"]["level"] == 1.0, "from there it can fall at once"


# --- other callbacks, and the tuner


def test_checkpoints_and_early_stopping_follow_the_level(tmp_path):
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.1, 0.5, 0.3))))
    saver = ModelCheckpoint(tmp_path, monitor="adaptive/input/level", mode="max")
    stopper = EarlyStopping("adaptive/input/level", mode="max", patience=2)
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
    levels, reasons = (events.Scalars(f"adaptive/input/{key}") for key in ("level", "reason"))
    assert [(event.step, event.value) for event in levels] == [(2, 0.25), (5, 0.25), (8, 0.5)]
    assert [(event.step, event.value) for event in reasons] == [(2, 1), (5, 0), (8, 1)]
    texts = events.Tensors("adaptive/input/reason/text_summary")
    words = [text.tensor_proto.string_val[0].decode() for text in texts]
    assert words == [f"{decision.reason}: {decision.clean:.3g} without noise" for decision in history(callback)]
    assert events.Tags()["images"] == ["adaptive/input/moves"]
    (summary,) = events.Tensors("adaptive/input/summary/text_summary")
    said = summary.tensor_proto.string_val[0].decode()
    last = history(callback)[-1]
    assert said == f"input: moved 2 times, held 1 time; from 0 to 0.5: {last.clean:.3g} without noise, when it was 0.25"
    assert callback.adaptive is not None
    assert said == callback.adaptive.summary()
    assert said in caplog.messages


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_other_loggers_and_none_work(kind, tmp_path):
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.25, 0.5))))
    fit([callback], logger=CSVLogger(tmp_path) if kind == "csv" else False)
    if kind == "csv":
        (written,) = tmp_path.rglob("metrics.csv")
        assert "adaptive/input/level" in written.read_text()
        assert [path.name for path in tmp_path.rglob("*.png")] == ["moves-6.png"]


def test_the_configuration_says_the_rule(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(
        [InputNoise(noise.Gaussian(), AdaptiveLevel(governor(), predict=lambda module, batch: module(batch[0])))], logger=logger
    )
    (text,) = EventAccumulator(logger.log_dir).Reload().Tensors("noise/input/configuration/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert re.search(r"\| level \| `AdaptiveLevel\(rule=Governor\(chance=0\.33.*predict=<function", said)
    assert " at 0x" not in said
