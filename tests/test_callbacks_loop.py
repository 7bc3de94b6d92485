"""Every noise callback works in the modes of the trainer, and perturbs from the batch to the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import torch
from helpers import Classifier, Deterministic, Rows, assert_same, fit, loader, make_trainer, weights
from helpers_callbacks import AFTER_THE_LOSS, Failing, Normalised, fit_without, same_weights
from members import every_callback
from pytorch_lightning.callbacks import LambdaCallback, StochasticWeightAveraging

from lightning_noise import InputNoise, WeightNoise, noise, schedules
from lightning_noise.callbacks.base import NoiseCallback


@every_callback
@pytest.mark.parametrize(
    "mode",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5, "limit_val_batches": 1},
        {"overfit_batches": 1},
        {"gradient_clip_val": 0.1},
        {"detect_anomaly": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*:UserWarning")  # Lightning's word on shuffling there
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_a_mode_of_the_trainer_works_as_without(make, mode):
    shuffle = "overfit_batches" not in mode
    without = fit_without(shuffle=shuffle, **mode)
    zero, _ = fit([make(0.0)], train=loader(shuffle=shuffle), **mode)
    noisy, _ = fit([make(0.5)], train=loader(shuffle=shuffle), **mode)
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


class Diary(NoiseCallback):
    """Perturbs nothing, and writes down what happens when."""

    def __init__(self, name: str, events: list[str]):
        super().__init__(1.0, seed=None, name=name)
        self.events = events

    def check(self, pl_module, batch):
        self.events.append(f"check {self.name}")

    def perturb(self, context, batch, level, key, perturbation):
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


def test_the_epoch_that_weight_averaging_adds_for_batch_norm_is_clean():
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    callback = InputNoise(noise.Gaussian(), 0.5)
    module, _ = fit([callback, swa], module=Normalised, train=loader(), max_epochs=2)
    data = Rows()
    clean = [torch.equal(batch[0], data.x[i % 3 * 8 : i % 3 * 8 + 8]) for i, batch in enumerate(module.seen)]
    assert clean == [False] * 6 + [True] * 3
    assert callback.current_level == 0


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


def test_the_seed_of_a_run_is_that_at_its_start(monkeypatch):
    def inputs(seed: int, then: int) -> list[torch.Tensor]:
        change = LambdaCallback(
            on_fit_start=lambda *_: monkeypatch.setenv("PL_GLOBAL_SEED", str(seed)),
            on_train_batch_start=lambda *_: monkeypatch.setenv("PL_GLOBAL_SEED", str(then)),
        )
        module, _ = fit([InputNoise(noise.Gaussian(), 0.3), change], max_epochs=1)
        return [batch[0] for batch in module.seen]

    first, again, other = inputs(1, then=2), inputs(1, then=1), inputs(2, then=1)
    assert_same(first, again)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("is_used", [False, True], ids=["new", "used in an earlier fit"])
@pytest.mark.parametrize("others", [[], [InputNoise(noise.Gaussian(), 0.1)]], ids=["alone", "beside another"])
def test_a_callback_that_is_added_after_the_start_is_refused(others, is_used):
    late = WeightNoise(noise.Gaussian(), 0.1)
    if is_used:
        fit([late])
    add = LambdaCallback(on_train_epoch_start=lambda trainer, _: trainer.callbacks.append(late))
    with pytest.raises(ValueError, match="'weight' was added after the training had started"):
        fit([*others, add])
