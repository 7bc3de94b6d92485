"""Every noise callback keeps the laws of the shell, each in a real fit."""

from __future__ import annotations

import copy
import math
import pickle
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import N_CLASSES, Classifier, Rows, assert_same, fit, loader, make_trainer, search_rate, weights
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    GradientNoise,
    InputNoise,
    Key,
    LabelSmoothing,
    Mixup,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
)
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.callbacks.dispatch import TrainingDispatcher
from lightning_noise.rules import AnyLevel, SignedGap
from lightning_noise.schedules import Level
from lightning_noise.testing import global_streams

CALLBACKS = {
    "input": lambda level: InputNoise(noise.Gaussian(), level),
    "smoothing": LabelSmoothing,
    "flips": lambda level: TargetNoise(labels.FlipLabels(N_CLASSES), level),
    "mixup": Mixup,
    "cutmix": lambda level: CutMix(level, dim=(-1,)),
    "weight": lambda level: WeightNoise(noise.Gaussian(), level),
    "gradient": lambda level: GradientNoise(noise.Gaussian(), level),
    "activation": lambda level: ActivationNoise(noise.Gaussian(), level, "net.1"),
}
# the same with other arguments, held to the laws of draws and levels alone
VARIANTS = {
    "input, some samples": lambda level: InputNoise(noise.Uniform(), level, probability=0.5, per_sample=True, clip=(-2, 2)),
    "input, relative": lambda level: InputNoise(noise.Gaussian(), level, relative=True, seed=3),
    "flips at the loss": lambda level: TargetNoise(labels.FlipLabels(N_CLASSES), level, via="loss"),
    "mixup, sampled": lambda level: Mixup(level, via="sample", per_sample=True),
    "weight, reparametrized": lambda level: WeightNoise(noise.Gaussian(), level, relative="std", gradient="reparametrized"),
    "activation, relative": lambda level: ActivationNoise(noise.Uniform(), level, ["net.1", "net.4"], relative=True),
}
LEVELS: dict[str, Level] = {
    "constant": 0.3,
    "ramp": schedules.Linear(0.0, 0.5),
    "intervals": schedules.Every(0.3, every=2),
    "callable": lambda progress: 0.05 * progress.step,
}
# by a rule that asks for no noise in held-out data
ADAPTIVE: dict[str, AnyLevel] = {"adaptive": AdaptiveLevel(SignedGap(step=0.1, z=0.0), 0.3)}
AFTER_THE_LOSS = (GradientNoise,)  # whose noise is first seen in the weights
every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
every_variant = pytest.mark.parametrize("make", (CALLBACKS | VARIANTS).values(), ids=CALLBACKS | VARIANTS)


class Deterministic(Classifier):
    """Without dropout: a resumed run draws other global numbers, with noise and without."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[3] = nn.Identity()


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


# --- the level 0, repetition and the random streams


@every_variant
@pytest.mark.parametrize("level", [0, 0.0, schedules.Constant(0.0)], ids=repr)
def test_level_0_is_bitwise_the_run_without(make, level):
    without, _ = fit()
    with_, _ = fit([make(level)])
    assert_same(weights(with_), weights(without))
    for one, two in zip(with_.seen, without.seen, strict=True):
        assert_same(one, two)


@every_variant
@pytest.mark.parametrize("level", (LEVELS | ADAPTIVE).values(), ids=LEVELS | ADAPTIVE)
def test_two_runs_are_equal_and_differ_from_the_run_without(make, level):
    one, two, without = fit([make(level)])[0], fit([make(level)])[0], fit()[0]
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
        return module.seen[0][0] - Rows().x[:8]

    # the same numbers up to the rounding of adding and subtracting x
    torch.testing.assert_close(first_noise(None, 5), first_noise(5, 0), rtol=0, atol=1e-6)
    assert not torch.allclose(first_noise(None, 5), first_noise(None, 6))


def test_the_noise_is_the_draw_of_its_key():
    module, _ = fit([InputNoise(noise.Gaussian(), 0.5, seed=7)], train=loader(), max_epochs=2)
    data = Rows()
    for i, (x, y) in enumerate(module.seen):
        epoch, batch_idx = divmod(i, 3)
        key = Key((7, "input", epoch, batch_idx), rank=0) / "leaf" / "0"
        clean = data.x[8 * batch_idx : 8 * batch_idx + 8]
        assert torch.equal(x, noise.Gaussian()(clean, 0.5, generator=key.generator("cpu")))
        assert torch.equal(y, data.y[8 * batch_idx : 8 * batch_idx + 8])


def test_two_callbacks_act_in_the_order_of_the_trainer():
    def double(x, level, *, generator):
        return 2 * x

    def add(x, level, *, generator):
        return x + 1

    module, _ = fit([InputNoise(double, 1.0, name="double"), InputNoise(add, 1.0, name="add")], train=loader())
    assert torch.equal(module.seen[0][0], 2 * Rows().x[:8] + 1)


# --- resume

# the resumed run saves no checkpoints of its own
resumes = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def _resumed_equals_uninterrupted(make, level, folder, train, every_n_train_steps, resume_at, **kwargs):
    saver = ModelCheckpoint(folder, every_n_train_steps=every_n_train_steps, save_top_k=-1, filename="{step}")
    kwargs = {"module": Deterministic, "max_epochs": 4, **kwargs}
    whole, _ = fit([make(level), saver], train=train(), enable_checkpointing=True, **kwargs)
    checkpoints = {int(path.stem.removeprefix("step=")): path for path in folder.glob("*.ckpt")}
    resumable = [path for step, path in checkpoints.items() if resume_at(step)]
    assert len(resumable) >= 3
    for checkpoint in resumable:
        resumed, _ = fit([make(level)], train=train(), ckpt_path=str(checkpoint), seed=0, **kwargs)
        assert len(resumed.seen) < len(whole.seen)
        assert_same(weights(resumed), weights(whole))


@resumes
@every_variant
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_resumed_run_equals_the_uninterrupted_one(make, level, accumulate, tmp_path):
    steps = math.ceil(3 / accumulate)  # of an epoch of three batches
    _resumed_equals_uninterrupted(
        make, level, tmp_path, loader, steps, lambda step: step < 4 * steps, accumulate_grad_batches=accumulate
    )


@resumes
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's call into torch
@every_variant
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_within_an_epoch_equals_the_uninterrupted_one(make, accumulate, tmp_path):
    def train():
        return StatefulDataLoader(Rows(40), batch_size=8)

    steps = math.ceil(5 / accumulate)  # of an epoch of five batches
    # not from the end of an epoch: there a stateful loader skips the next one, with noise and without
    _resumed_equals_uninterrupted(
        make, schedules.Linear(0.0, 0.5), tmp_path, train, 2, lambda step: step % steps, accumulate_grad_batches=accumulate
    )


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
            assert torch.equal(batch[0], data.x[8 * batch_idx : 8 * batch_idx + 8])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(batch[0], data.x[8 * batch_idx : 8 * batch_idx + 8])

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


class Failing(Classifier):
    def __init__(self, where: str, error: type[BaseException]):
        super().__init__()
        self.where, self.error = where, error

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.where == "step":
            raise self.error("stop")
        if batch_idx == 1 and self.where == "backward":
            loss.register_hook(self._raise)
        return loss

    def _raise(self, gradient):
        raise self.error("stop")

    def on_train_epoch_end(self):
        if self.where == "epoch end":
            raise self.error("stop")


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
    assert not torch.equal(calls[0][0][0], Rows().x[:8]), "it was given the noisy batch"


# --- modes of the trainer


@every_callback
@pytest.mark.parametrize(
    "mode",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5, "limit_val_batches": 1},
        {"overfit_batches": 1},
        {"accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 4},
        {"gradient_clip_val": 0.1},
        {"detect_anomaly": True},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*:UserWarning")  # Lightning's word on shuffling there
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_a_mode_of_the_trainer_works_as_without(make, mode):
    train = loader if "overfit_batches" in mode else lambda: loader(shuffle=True)
    without, _ = fit(train=train(), **mode)
    zero, _ = fit([make(0.0)], train=train(), **mode)
    noisy, _ = fit([make(0.5)], train=train(), **mode)
    assert_same(weights(zero), weights(without))
    assert len(noisy.seen) == len(without.seen)
    assert all(one[0].dtype == two[0].dtype for one, two in zip(noisy.seen, without.seen, strict=True))
    assert not same_weights(noisy, without)
    assert noisy.losses[0] != without.losses[0] or isinstance(make(0.5), AFTER_THE_LOSS)


@every_callback
def test_learning_rate_0_leaves_the_weights(make):
    module, _ = fit([make(0.5)], module=lambda: Classifier(lr=0.0))
    pl.seed_everything(0, verbose=False)
    assert_same(weights(module), weights(Classifier()))


@every_callback
def test_the_search_for_a_learning_rate_finds_what_it_finds_without(make, tmp_path):
    def found(callbacks):
        losses, module, trainer = search_rate(callbacks, tmp_path)
        trainer.fit(module, loader(), loader())
        return losses, module

    without, clean = found([])
    with_, noisy = found([make(0.5)])
    assert with_ == without
    assert noisy.losses != clean.losses, "the fit after the search has noise"


@every_callback
def test_the_search_for_a_batch_size_finds_what_it_finds_without(make, tmp_path):
    class Data(pl.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return loader()

    class Large(Classifier):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 8:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    def found(callbacks):
        data, trainer, module = Data(), make_trainer(callbacks, default_root_dir=tmp_path), Large()
        Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=5, steps_per_trial=1)
        assert "training_step" not in vars(trainer.strategy)
        assert all(torch.equal(x, Rows().x[: len(x)]) for x, _ in module.seen), "the search has no noise"
        return data.batch_size

    assert found([make(0.5)]) == found([]) == 8


class Diary(NoiseCallback):
    """Perturbs nothing, and writes down what happens when."""

    def __init__(self, name: str, events: list[str]):
        super().__init__(1.0, seed=None, name=name)
        self.events = events

    def check(self, pl_module, batch):
        self.events.append(f"check {self.name}")

    @contextmanager
    def perturbation(self, trainer, pl_module, batch, level, key):
        self.events.append(f"begin {self.name}")
        try:
            yield batch
        finally:
            self.events.append(f"end {self.name}")


class Loop(pl.Callback):
    def __init__(self, events: list[str]):
        self.events = events

    def on_before_backward(self, trainer, pl_module, loss):
        self.events.append("backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.events.append("update")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.events.append("batch end")


def diary_of(module: Callable[[], pl.LightningModule], error: type[BaseException] | None = None, **kwargs) -> list[str]:
    events: list[str] = []
    callbacks = [Diary("a", events), Diary("b", events), Loop(events)]
    settings = {"train": loader(Rows(16)), "max_epochs": 1, "limit_val_batches": 0, **kwargs}
    if error is None:
        fit(callbacks, module=module, **settings)
    else:
        with pytest.raises((error, SystemExit)):
            fit(callbacks, module=module, **settings)
    return events


BEGIN, END = ["begin a", "begin b"], ["end b", "end a"]
FIRST = ["check a", "check b"]


def test_perturbations_nest_and_end_after_the_backward_pass():
    step = [*BEGIN, "backward", *END, "update", "batch end"]
    assert diary_of(Classifier) == FIRST + 2 * step


def test_perturbations_end_before_an_update_that_is_put_off():
    first, second = [*BEGIN, "backward", *END, "batch end"], [*BEGIN, "backward", *END, "update", "batch end"]
    assert diary_of(Classifier, accumulate_grad_batches=2) == FIRST + first + second


def test_perturbations_end_with_a_manual_step():
    assert diary_of(Manual) == FIRST + 2 * [*BEGIN, "backward", "update", *END, "batch end"]


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
def test_perturbations_end_with_a_step_that_returns_nothing():
    class Nothing(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    assert diary_of(Nothing) == FIRST + 2 * [*BEGIN, *END, "update", "batch end"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["step", "backward"])
def test_perturbations_end_after_an_exception(where, error):
    begun = [*BEGIN, "backward", *END, "update", "batch end", *BEGIN]
    failed = [*END] if where == "step" else ["backward", *END]
    assert diary_of(lambda: Failing(where, error), error) == FIRST + begun + failed


def test_perturbations_end_before_a_step_is_tried_again():
    class Stubborn(Classifier):
        def __init__(self):
            super().__init__()
            self.failed = False

        def backward(self, loss):
            if not self.failed:
                self.failed = True
                raise RuntimeError("once")
            loss.backward()

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            try:
                optimizer.step(closure=optimizer_closure)
            except RuntimeError:
                optimizer.step(closure=optimizer_closure)

    events = [event for event in diary_of(Stubborn) if event[:3] in ("beg", "end")]
    assert events == 3 * [*BEGIN, *END]


def test_perturbations_of_a_closure_end_before_the_next_begin():
    class LBFGS(Deterministic):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    events = [event for event in diary_of(LBFGS) if event[:3] in ("beg", "end")]
    assert len(events) > 8
    assert events == len(events) // 4 * [*BEGIN, *END]


def test_every_closure_of_a_step_gets_the_same_noise():
    class LBFGS(Deterministic):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    module, _ = fit([InputNoise(noise.Gaussian(), 0.5)], module=LBFGS, train=loader(), max_epochs=1)
    seen = [batch[0] for batch in module.seen]
    assert len(seen) > 3
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 3


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]


def test_manual_optimization_gets_the_noise_of_automatic():
    manual, _ = fit([InputNoise(noise.Gaussian(), 0.5)], module=Manual)
    automatic, _ = fit([InputNoise(noise.Gaussian(), 0.5)])
    for one, two in zip(manual.seen, automatic.seen, strict=True):
        assert_same(one, two)
    assert_same(weights(manual), weights(automatic))


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
def test_a_skipped_step_and_a_skipped_epoch_leave_nothing_behind():
    class Skipping(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 and batch_idx == 1 else None

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    module, trainer = fit([InputNoise(noise.Gaussian(), 0.5)], module=Skipping, max_epochs=3)
    assert len(module.seen) == 3 + 1 + 3
    assert "training_step" not in vars(trainer.strategy)


class Normalised(Deterministic):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm1d(N_CLASSES))


def test_the_epoch_that_weight_averaging_adds_for_batch_norm_is_clean():
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    callback = InputNoise(noise.Gaussian(), 0.5)
    module, _ = fit([callback, swa], module=Normalised, train=loader(), max_epochs=2)
    data = Rows()
    clean = [torch.equal(batch[0], data.x[i % 3 * 8 : i % 3 * 8 + 8]) for i, batch in enumerate(module.seen)]
    assert clean == [False] * 6 + [True] * 3
    assert callback.level_in_force == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["submodule", "module"])
def test_noise_adds_no_graph_to_a_compiled_model(part):
    from torch._dynamo.testing import CompileCounter

    def graphs(callbacks):
        torch._dynamo.reset()
        counter, module = CompileCounter(), Deterministic()
        if part == "submodule":
            module.net = torch.compile(module.net, backend=counter)  # type: ignore[assignment]
        compiled = torch.compile(module, backend=counter) if part == "module" else module
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # logging from a compiled step crashes in this Lightning
        trainer = make_trainer(callbacks)
        trainer.fit(compiled, loader(), loader())  # type: ignore[arg-type]
        return counter.frame_count

    ramp = schedules.Linear(0.1, 0.5)
    noisy = [InputNoise(noise.Gaussian(), ramp), WeightNoise(noise.Speckle(), ramp, gradient="reparametrized")]
    assert graphs(noisy) == graphs([]) > 0


# --- batches and steps


Pair = namedtuple("Pair", ["x", "y"])


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

    _resumed_equals_uninterrupted(make, schedules.Linear(0.0, 0.5), tmp_path, train, 2, lambda step: step % 5, module=Iterating)


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
    fit([callback], module=Sometimes, train=loader(), max_epochs=1, logger=logger, log_every_n_steps=1)
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


# --- the level


class LevelLog(pl.Callback):
    def __init__(self, callback: InputNoise):
        self.callback = callback
        self.levels: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.levels.append(self.callback.level_in_force)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"max_epochs": 2}, [i / 6 for i in range(6)]),
        ({"max_epochs": 4, "max_steps": 6}, [i / 6 for i in range(6)]),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [i / 6 for i in range(6)]),
        ({"max_epochs": 1000, "max_steps": 3}, [i / 3 for i in range(3)]),
        ({"max_epochs": 4, "limit_train_batches": 1}, [0, 0.25, 0.5, 0.75]),
    ],
    ids=str,
)
def test_a_schedule_in_fractions_follows_the_end_that_comes_first(run, expected):
    callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 1.0))
    log = LevelLog(callback)
    fit([callback, log], **run)
    assert log.levels == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("member", "message"),
    [(noise.Shot(), "Shot needs data that are not negative"), (noise.Masking(), "Masking needs samples of at least 2 axes")],
    ids=repr,
)
def test_a_noise_that_does_not_suit_the_data_is_found_on_the_first_batch_though_it_begins_later(member, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([InputNoise(member, schedules.Window(0.2, begin=0.5))], module=module)
    assert not module.seen
    with pytest.raises(ValueError, match=message):
        fit([RobustnessMonitor(member)], module=module)
    assert not module.seen


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("module", [Deterministic, Normalised])
@pytest.mark.parametrize("run", [{"max_epochs": 3}, {"max_epochs": 9, "max_steps": 9}], ids=str)
def test_a_schedule_in_fractions_ends_with_the_training_and_not_with_the_epoch_of_weight_averaging(run, module, order):
    def levels(*others):
        callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 1.0))
        log = LevelLog(callback)
        fit([callback, *others, log][::order], module=module, **run)
        return log.levels

    without = levels()
    with_ = levels(StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1))
    added = 3 if module is Normalised and "max_steps" not in run else 0
    assert without == pytest.approx([i / 9 for i in range(9)])
    assert with_ == without + added * [0.0]


def test_a_schedule_may_be_wrong_in_the_epoch_that_weight_averaging_adds():
    falling = schedules.Linear(1.0, -0.1, until=6, unit="step")  # two epochs of three steps, of which the last is step 5
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    module, _ = fit([InputNoise(noise.Gaussian(), falling), swa], module=Normalised, max_epochs=2)
    assert len(module.seen) == 9


def test_batches_of_unknown_number_count_whole_epochs():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Rows()[i] for i in range(16)])

    callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 1.0))
    log = LevelLog(callback)
    fit([callback, log], train=DataLoader(Stream(), batch_size=8), max_epochs=4)
    assert log.levels == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_steps_count_updates_and_not_batches():
    callback = InputNoise(noise.Gaussian(), lambda progress: float(progress.step))
    log = LevelLog(callback)
    fit([callback, log], accumulate_grad_batches=2, max_epochs=2)
    assert log.levels == [0, 0, 1, 2, 2, 3]  # three batches an epoch, the last of which is an update of its own


def test_at_level_0_the_step_gets_the_very_batch():
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

        def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx):
            same.append(pl_module.seen[-1] is self.batch)

    same: list[bool] = []
    gate = schedules.Every(0.5, every=3, unit="step")
    fit([InputNoise(noise.Gaussian(), gate, clip=(-0.1, 0.1)), Watch()], max_epochs=2)
    assert same == [False, True, True, False, True, True]


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
        (lambda: InputNoise(noise.Impulse(), 0.1, relative=True), ValueError, "the level of Impulse has no unit"),
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


@pytest.mark.parametrize("run", [{"max_epochs": -1}, {"max_epochs": -1, "max_time": {"seconds": 5}}], ids=str)
def test_a_schedule_in_fractions_is_refused_at_the_start_of_a_run_without_an_end(run):
    module = Classifier()
    with pytest.raises(ValueError, match="needs a run with a known end"):
        fit([InputNoise(noise.Gaussian(), schedules.Every(schedules.Linear(0.0, 1.0), every=5, begin=2))], module=module, **run)
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
    module.eval()
    with torch.no_grad():
        expected = [module(x) for x, _ in data]
        loss = sum(len(y) * F.cross_entropy(module(x), y) for x, y in data) / 24
    assert_same(one, expected)  # type: ignore[arg-type]
    assert_same(two, expected)  # type: ignore[arg-type]
    # a mean of means in float32
    torch.testing.assert_close(trainer.callback_metrics["test_loss"], loss, rtol=1e-6, atol=0)


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
    assert "noise/input/level" in written
    assert "snr_db" not in written
