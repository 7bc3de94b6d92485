"""Every noise callback keeps the laws of the shell, each in a real fit."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import Classifier, Deterministic, Rows, assert_same, fit, loader, make_trainer, resumes, weights
from helpers_callbacks import AFTER_THE_LOSS, Failing, LevelLog, assert_resumes, fit_without, same_weights
from members import every_callback, every_variant
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_noise import AdaptiveLevel, InputNoise, Key, noise, schedules
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.loop.dispatch import TrainingDispatcher
from lightning_noise.rules import SignedGap
from lightning_noise.schedules import Level
from lightning_noise.testing import global_streams

LEVELS: dict[str, Level] = {
    "constant": 0.3,
    "ramp": schedules.Linear(0.0, 0.5),
    "intervals": schedules.Every(0.3, every=2),
    "callable": lambda progress: 0.05 * progress.step,
}
# a ramp differs in each step, so that it stands for the others
RESUMED = [pytest.param(level, id=name, marks=() if name == "ramp" else pytest.mark.slow) for name, level in LEVELS.items()]
# by a rule that asks for no noise in held-out data
ADAPTIVE: dict[str, AnyLevel] = {"adaptive": AdaptiveLevel(SignedGap(step=0.1, z=0.0), 0.3)}


# --- the level 0, repetition and the random streams


@every_variant
@pytest.mark.parametrize("level", [0, 0.0, schedules.Constant(0.0)], ids=repr)
def test_level_0_is_bitwise_the_run_without(make, level):
    without = fit_without()
    with_, _ = fit([make(level)])
    assert_same(weights(with_), weights(without))
    for one, two in zip(with_.seen, without.seen, strict=True):
        assert_same(one, two)


@every_variant
@pytest.mark.parametrize("level", (LEVELS | ADAPTIVE).values(), ids=LEVELS | ADAPTIVE)
def test_two_runs_are_equal_and_differ_from_the_run_without(make, level):
    one, two, without = fit([make(level)])[0], fit([make(level)])[0], fit_without()
    assert_same(weights(one), weights(two))
    assert not same_weights(one, without)


@every_callback
def test_the_global_streams_are_as_without(make):
    fit()
    without = global_streams()
    fit([make(0.5)])
    assert global_streams() == without


def test_the_seed_is_that_of_the_run_and_can_be_fixed():
    def first_noise(seed, run):
        module, _ = fit([InputNoise(noise.Gaussian(), 1.0, seed=seed)], seed=run, train=loader(Rows()), module=Classifier)
        return module.seen[0][0].cpu() - Rows().x[:8]

    # the same numbers up to the rounding of adding and subtracting x
    torch.testing.assert_close(first_noise(None, 5), first_noise(5, 0), rtol=0, atol=1e-6)
    assert not torch.allclose(first_noise(None, 5), first_noise(None, 6))


def test_the_noise_is_the_draw_of_its_key():
    module, _ = fit([InputNoise(noise.Gaussian(), 0.5, seed=7)], train=loader(), max_epochs=2)
    data = Rows()
    for i, (x, y) in enumerate(module.seen):
        epoch, batch_idx = divmod(i, 3)
        key = Key((7, "input", epoch, batch_idx), rank=0) / "leaf" / "0"
        clean = data.x[8 * batch_idx : 8 * batch_idx + 8].to(x.device)
        assert torch.equal(x, noise.Gaussian()(clean, 0.5, generator=key.generator(x.device)))
        assert torch.equal(y.cpu(), data.y[8 * batch_idx : 8 * batch_idx + 8])


def test_two_callbacks_act_in_the_order_of_the_trainer():
    def double(x, level, *, generator):
        return 2 * x

    def add(x, level, *, generator):
        return x + 1

    module, _ = fit([InputNoise(double, 1.0, name="double"), InputNoise(add, 1.0, name="add")], train=loader())
    assert torch.equal(module.seen[0][0].cpu(), 2 * Rows().x[:8] + 1)


# --- resume


@resumes
@every_variant
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("level", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(make, level, accumulate, tmp_path):
    steps = math.ceil(3 / accumulate)  # of an epoch of three batches
    assert_resumes(make, level, tmp_path, loader, steps, lambda step: step < 4 * steps, accumulate_grad_batches=accumulate)


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's call into torch
@every_variant
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_within_an_epoch_equals_the_uninterrupted_one(make, accumulate, tmp_path):
    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    steps = math.ceil(5 / accumulate)  # of an epoch of five batches
    # not from the end of an epoch: there a stateful loader skips the next one, with noise and without
    assert_resumes(
        make, schedules.Linear(0.0, 0.5), tmp_path, train, 2, lambda step: step % steps, accumulate_grad_batches=accumulate
    )


@pytest.mark.slow
@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@every_variant
@pytest.mark.parametrize("is_within", [False, True])
def test_a_run_resumed_from_any_checkpoint_equals_the_uninterrupted_one(make, is_within, tmp_path):
    def train():
        return StatefulDataLoader(Rows(40), batch_size=8) if is_within else loader(Rows(40))

    def at(step):
        return step < 20 and (step % 5 > 0) == is_within

    assert_resumes(make, schedules.Linear(0.0, 0.5), tmp_path, train, 1 if is_within else 5, at, from_all=True)


# --- what must not change


class OwnStorage(Dataset):
    """Whole batches, the same tensors each time."""

    def __init__(self):
        rows = Rows()
        self.batches = [(rows.x[i : i + 8], rows.y[i : i + 8]) for i in range(0, 24, 8)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


class OwnLoader(OwnStorage):
    """A loader that is none of torch's."""

    def __iter__(self):
        return iter(self.batches)


@every_callback
@pytest.mark.parametrize("kind", ["samples", "batches", "loader"])
def test_the_data_set_is_untouched(make, kind):
    data = Rows() if kind == "samples" else OwnLoader()
    before = copy.deepcopy(data)
    train = data if kind == "loader" else loader(data, batch_size=8 if kind == "samples" else None)
    noisy, _ = fit([make(0.5)], train=train, max_epochs=3)
    without, _ = fit(train=train, max_epochs=3)
    assert not same_weights(noisy, without)
    assert noisy.losses[0] != without.losses[0] or isinstance(make(0.5), AFTER_THE_LOSS)
    for one, two in zip((data[i] for i in range(len(data))), (before[i] for i in range(len(data))), strict=True):
        assert_same(one, two)


@every_variant
def test_validation_and_sanity_check_never_see_noise(make):
    with_, _ = fit([make(0.5)], val_check_interval=1)
    without, _ = fit(val_check_interval=1)
    assert len(with_.validated) == 2 + 2 * 3 * 2
    for one, two in zip(with_.validated, without.validated, strict=True):
        assert_same(one, two)


@every_callback
def test_other_callbacks_see_the_clean_batch(make):
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert torch.equal(batch[0].cpu(), data.x[8 * batch_idx : 8 * batch_idx + 8])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(batch[0].cpu(), data.x[8 * batch_idx : 8 * batch_idx + 8])

    data = Rows()
    fit([make(0.5), Watch()], train=loader(data))


@every_callback
def test_a_callback_deep_copies_and_pickles_and_serves_a_second_fit(make):
    callback = make(schedules.Linear(0.0, 0.5))
    copies = [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
    first = weights(fit([callback])[0])
    for again in [callback, *copies]:
        assert_same(weights(fit([again])[0]), first)


@every_callback
def test_a_trainer_that_goes_on_has_noise_again(make):
    class Updates(Deterministic):
        def on_before_optimizer_step(self, optimizer):
            last: Any = self.net[4]
            updates.append(last.weight.grad.clone())

    def fitted_twice(callbacks):
        updates.clear()
        module, trainer = fit(callbacks, module=lambda: Updates(lr=0.0), train=loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, loader(), loader(Rows(13, seed=1)))
        return list(updates)

    updates: list[Tensor] = []
    noisy, without = fitted_twice([make(0.5)]), fitted_twice([])
    assert len(noisy) == len(without) == 12
    assert not all(torch.equal(one, two) for one, two in zip(noisy[6:], without[6:], strict=True))


ENDS = [("nowhere", RuntimeError)]
ENDS += [(where, error) for where in ("step", "backward", "epoch end") for error in (RuntimeError, KeyboardInterrupt)]


@every_callback
@pytest.mark.parametrize(("where", "error"), ENDS)
def test_strategy_and_module_are_as_before_also_after_an_exception(make, where, error):
    module, trainer = Failing(where, error), make_trainer([make(0.5)])
    on_class = set(vars(type(module)))
    if where == "nowhere":
        trainer.fit(module, loader(), loader())
    else:
        with pytest.raises((error, SystemExit)):
            trainer.fit(module, loader(), loader())
    assert "training_step" not in vars(trainer.strategy)
    assert trainer.strategy.training_step.__func__ is type(trainer.strategy).training_step  # type: ignore[attr-defined]
    other = Failing("nowhere", error)
    make_trainer().fit(other, loader(), loader())
    assert set(vars(module)) == set(vars(other))
    assert set(vars(type(module))) == on_class
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@every_callback
def test_a_fit_after_an_exception_equals_a_first_one(make):
    callback = make(0.5)
    with pytest.raises(RuntimeError, match="stop"):
        fit([callback], module=Failing("step", RuntimeError))
    assert_same(weights(fit([callback])[0]), weights(fit([make(0.5)])[0]))


def test_a_step_that_somebody_set_on_the_strategy_comes_back():
    trainer = make_trainer([InputNoise(noise.Gaussian(), 0.5)])
    calls, original = [], trainer.strategy.training_step

    def mine(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    trainer.strategy.training_step = mine  # type: ignore[method-assign]
    trainer.fit(Classifier(), loader(), loader())
    assert trainer.strategy.training_step is mine
    assert len(calls) == 6
    assert not torch.equal(calls[0][0][0].cpu(), Rows().x[:8]), "it was given the noisy batch"


# --- errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: InputNoise(noise.Gaussian(), -0.1), ValueError, "finite and not negative, got -0.1"),
        (lambda: InputNoise(noise.Gaussian(), math.nan), ValueError, "finite and not negative, got nan"),
        (lambda: InputNoise(noise.Gaussian(), math.inf), ValueError, "finite and not negative, got inf"),
        (lambda: InputNoise(noise.Impulse(), 1.5), ValueError, r"in \[0, 1\], got 1.5"),
        (lambda: InputNoise(noise.Gaussian(), True), TypeError, "a level must be a number, got True"),
        (lambda: InputNoise(noise.Gaussian(), "0.3"), TypeError, "a level must be a number, got '0.3'"),  # type: ignore[arg-type]
        (lambda: InputNoise(noise.Gaussian(), "linear"), TypeError, "a level must be a number, got 'linear'"),  # type: ignore[arg-type]
        (lambda: InputNoise(noise.Gaussian(), 0.1, probability=1.1), ValueError, r"probability must be in \[0, 1\], got 1.1"),
        (lambda: InputNoise(noise.Gaussian(), noise.Gaussian()), TypeError, "a callable or an AdaptiveLevel, got Gau"),  # type: ignore[arg-type]
        (lambda: InputNoise(noise.Gaussian, 0.1), TypeError, r"a value such as noise.Gaussian\(\)"),  # type: ignore[arg-type]
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=0.5), ValueError, "clip must be a pair"),  # type: ignore[arg-type]
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=(1.0, 0.0)), ValueError, "clip must be a pair"),
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=([0.0, 1.0], 0.5)), ValueError, "clip must be a pair"),
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=(math.nan, None)), ValueError, "clip must be a pair"),
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=([0.0, 0.0], [1.0, 1.0, 1.0])), ValueError, "clip must be a pair"),
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=("0", "1")), ValueError, "clip must be a pair"),  # type: ignore[arg-type]
        (lambda: InputNoise(noise.Gaussian(), 0.1, clip=([], None)), ValueError, "clip must be a pair"),
        (lambda: InputNoise(noise.Impulse(), 0.1, relative="std"), ValueError, "the level of Impulse has no unit"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_callback_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        (
            [InputNoise(noise.Gaussian(), 0.1), InputNoise(noise.Uniform(), 0.1)],
            ValueError,
            "two noise callbacks are named 'input'",
        ),
        ([InputNoise(noise.Gaussian(), schedules.Linear(-1.0, 0.0))], ValueError, "finite and not negative, got -1.0"),
        ([InputNoise(noise.Impulse(), lambda progress: 2.0)], ValueError, r"in \[0, 1\], got 2.0"),
        (
            [InputNoise(noise.Gaussian(), 0.1, inputs="image")],
            ValueError,
            r"no leaf 'image' in the batch; leaves are: '0' float32 \(8, 8\), '1'",
        ),
        ([InputNoise(noise.Gaussian(), lambda progress: None)], TypeError, "a level must be a number, got None"),  # type: ignore[arg-type]
        ([InputNoise(noise.Gaussian(), 0.1, inputs=[])], ValueError, r"inputs=\[\] selects nothing; leaves are"),
        ([InputNoise(noise.Gaussian(), 0.1, inputs=1)], TypeError, r"the input '1' is int64 \(8,\)"),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_what_cannot_work_in_this_run_is_refused_in_the_fit(callbacks, error, message):
    with pytest.raises(error, match=message):
        fit(callbacks)


def test_a_schedule_in_fractions_is_refused_at_the_start_of_a_run_without_an_end():
    module = Classifier()
    with pytest.raises(ValueError, match="needs a run with a known end"):
        fit(
            [InputNoise(noise.Gaussian(), schedules.Every(schedules.Linear(0.0, 1.0), every=5, begin=2))],
            module=module,
            max_epochs=-1,
        )
    assert not module.seen


def test_a_dispatcher_is_attached_only_once():
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            dispatcher = TrainingDispatcher.of(trainer)
            assert dispatcher is not None
            assert not isinstance(dispatcher.step, TrainingDispatcher)

    fit([InputNoise(noise.Gaussian(), 0.1), InputNoise(noise.Uniform(), 0.1, name="other"), Watch()])


def test_prediction_and_test_are_clean_and_deterministic():
    module, trainer = fit([InputNoise(noise.Gaussian(), 0.5)])
    data = loader()
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    one, two = trainer.predict(module, data), trainer.predict(module, data)
    trainer.test(module, data, verbose=False)
    device = one[0].device  # type: ignore[index, union-attr]
    module.eval().to(device)
    with torch.no_grad():
        expected = [module(x.to(device)) for x, _ in data]
        loss = sum(len(y) * F.cross_entropy(z, y.to(device)) for z, (_, y) in zip(expected, data, strict=True)) / 24
    assert_same(one, expected)  # type: ignore[arg-type]
    assert_same(two, expected)  # type: ignore[arg-type]
    # a mean of means in float32
    torch.testing.assert_close(trainer.callback_metrics["test_loss"].to(device), loss, rtol=1e-6, atol=0)


def test_a_wrong_path_is_found_on_the_first_batch_though_the_noise_begins_later():
    module = Classifier()
    ramp = schedules.Linear(0.0, 0.5, begin=0.5)
    with pytest.raises(ValueError, match="no leaf 'image'"):
        fit([InputNoise(noise.Gaussian(), ramp, inputs="image")], module=module)
    with pytest.raises(TypeError, match="needs floats"):
        fit([InputNoise(noise.Gaussian(), ramp, inputs=1)], module=module)
    assert not module.seen


@pytest.mark.parametrize("run", [{"max_epochs": 10}, {"max_epochs": -1, "max_steps": 30}], ids=str)
def test_a_level_that_turns_negative_is_refused_before_the_first_step(run):
    module = Classifier()
    with pytest.raises(ValueError, match="finite and not negative"):
        fit([InputNoise(noise.Gaussian(), schedules.Linear(1.0, -1.0))], module=module, **run)
    with pytest.raises(ValueError, match="finite and not negative"):  # in the last step of thirty alone
        fit([InputNoise(noise.Gaussian(), schedules.Linear(1.0, -0.04))], module=module, **run)
    assert not module.seen


def test_a_schedule_may_be_wrong_where_the_run_does_not_come():
    steep = schedules.Linear(0.0, 2.0, until=1000, unit="epoch")
    fit([InputNoise(noise.Impulse(), steep)], max_epochs=1000, max_steps=6)


def test_a_callable_may_read_what_the_run_has_measured():
    class Watch(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.trainer = trainer

    watch = Watch()

    def follow(progress):
        return 0.1 * watch.trainer.callback_metrics["val_loss"].item() if progress.epoch else 0.1

    log = LevelLog(callback := InputNoise(noise.Gaussian(), follow))
    fit([watch, callback, log])
    assert len(set(log.levels)) == 2


def test_a_batch_without_noise_logs_no_ratio(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([InputNoise(noise.Gaussian(), 0.5, probability=0.0)], logger=logger, log_every_n_steps=1)
    written = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "train_noise/input/level" in written
    assert "snr_db" not in written
