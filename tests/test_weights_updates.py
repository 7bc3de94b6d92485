"""Every update meets clean weights, whichever optimizer makes it and whatever a step writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import N_FEATURES, Rows, assert_same, fit, loader, make_trainer, weights
from helpers_weights import (
    NOISE,
    Adversarial,
    Manual,
    Network,
    Unwrapped,
    UnwrappedWithPositionalClosure,
    batches,
    by_hand,
    by_sgd,
    callbacks,
    fitted,
    loss_of,
    weights_of,
)
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_noise import RobustnessMonitor, WeightNoise


class Private(Manual):
    """Its optimizer is its own affair."""

    def __init__(self):
        super().__init__()
        self.own = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return None

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        self.manual_backward(loss_of(self, batch))
        self.own.step()


class Outer(torch.optim.Optimizer):
    """An optimizer around another, with an argument of its own."""

    def __init__(self, parameters: Any, lr: float):
        self.inner = torch.optim.SGD(parameters, lr=lr / 2)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None, times: int = 1) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for _ in range(times):
            self.inner.step()
        return loss


class Nested(Unwrapped):
    def update(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            loss.backward()
            return loss

        optimizer.step(closure, 2)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("make", [Private, lambda: Nested(Outer)], ids=["private", "nested"])
def test_an_optimizer_that_the_trainer_does_not_know_updates_clean_weights(make, n):
    # two steps of half the length are one, but for a rounding
    torch.testing.assert_close(weights(fitted(make, n)), weights(by_hand(Network, by_sgd, n)), rtol=0, atol=1e-6)


class SharpnessAware(Manual):
    """Moves the weights up and down again before it updates them, with the gradient from above."""

    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        up = [0.05 * p.grad for p in self.parameters()]  # type: ignore[operator]
        with torch.no_grad():
            for p, e in zip(self.parameters(), up, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        with torch.no_grad():
            for p, e in zip(self.parameters(), up, strict=True):
                p.sub_(e)
        optimizer.step()


def by_sharpness_aware_minimization(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        with hand.noise(epoch, i):
            up = [0.05 * g for g in torch.autograd.grad(loss_of(module, batch), [*module.parameters()])]
            with torch.no_grad():
                for p, e in zip(module.parameters(), up, strict=True):
                    p.add_(e)
            optimizer.zero_grad()
            loss_of(module, batch).backward()
            with torch.no_grad():
                for p, e in zip(module.parameters(), up, strict=True):
                    p.sub_(e)
        optimizer.step()


def test_weights_that_a_step_moves_and_moves_back_are_restored():
    expected = by_hand(SharpnessAware, by_sharpness_aware_minimization, 1)
    # biases have no noise, and keep what is lost to rounding; so do the weights of the loop
    torch.testing.assert_close(weights(fitted(SharpnessAware, 1)), weights(expected), rtol=0, atol=1e-6)


class Moving(torch.optim.Optimizer):
    """Moves the weights before it evaluates its closure, and back after it."""

    def __init__(self, parameters: Any, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.mul_(1.5)
        with torch.enable_grad():
            loss = closure()
        for p, w in zip(parameters, before, strict=True):
            p.copy_(w).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
def test_what_an_optimizer_saves_and_moves_before_its_closure_is_clean(n):
    def make() -> Network:
        return UnwrappedWithPositionalClosure(Moving, lr=0.0)

    module = fitted(make, n)
    pl.seed_everything(0, verbose=False)
    assert_same(weights(module), weights(make()))


class Nesting(Adversarial):
    """Updates one part within the closure of the other, and looks where the noise is."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails = fails
        self.clean = [w.clone() for w in weights_of(self)]
        self.noisy: list[list[bool]] = []

    def configure_optimizers(self) -> Any:
        return (torch.optim.SGD(self.generator.parameters(), lr=0.0), torch.optim.SGD(self.discriminator.parameters(), lr=0.0))

    def look(self) -> None:
        pairs = zip(weights_of(self), self.clean, strict=True)
        self.noisy.append([not torch.equal(w, clean) for w, clean in pairs if w.ndim > 1])

    def training_step(self, batch, batch_idx):
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        outer, inner = optimizers

        def closure():
            inner.step()
            self.look()
            if self.fails:
                raise RuntimeError("caught")

        self.look()
        with suppress(RuntimeError):
            outer.step(closure)
        inner.step()
        self.look()


def test_the_noise_comes_back_after_an_update_within_a_closure():
    module, _ = fit(callbacks(2), module=Nesting, train=loader(), limit_val_batches=0)
    assert module.noisy == 18 * [[True, True, True]]


def test_the_noise_of_other_parameters_comes_back_after_an_update_that_failed():
    module, _ = fit(callbacks(2), module=lambda: Nesting(fails=True), train=loader(), limit_val_batches=0)
    assert all(look[1:] == [True, True] for look in module.noisy)
    assert_same(weights_of(module), module.clean)


class Writing(Network):
    """Changes its weights within the training step."""

    def __init__(self, write: Callable[[Tensor], Any], automatic: bool):
        super().__init__()
        self.write, self.automatic_optimization = write, automatic

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.manual_backward(loss)
        loss = loss.detach().requires_grad_()  # or torch would refuse the backward pass by itself
        with torch.no_grad():
            self.write(self.net[4].weight)  # type: ignore[arg-type]
        return loss


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("write", [lambda w: w.clamp_(-0.01, 0.01), lambda w: w.lerp_(torch.zeros(()), 0.005)])
def test_what_a_step_writes_to_noisy_weights_is_refused_and_not_lost_in_silence(write, automatic):
    module = Writing(write, automatic)
    before = [w.clone() for w in weights_of(module)]
    with pytest.raises(ValueError, match=r"the training step has written to 'net\.4\.weight' while it held noise"):
        fit([WeightNoise(**NOISE)], module=module, num_sanity_val_steps=0)
    assert_same(weights_of(module), before)
    fit([WeightNoise(**NOISE, params="net.1.weight")], module=Writing(write, automatic))


def test_the_error_of_a_step_is_not_hidden_by_what_it_wrote():
    class Refused(Network):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.net[4].weight.clamp_(-0.01, 0.01)  # type: ignore[operator]
            return loss  # of which torch refuses the backward pass

    class Later(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append(exception)

    seen: list[BaseException] = []
    module = Refused()
    before = [w.clone() for w in weights_of(module)]
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        fit([*callbacks(2), Later()], module=module, num_sanity_val_steps=0)
    assert len(seen) == 1
    assert_same(weights_of(module), before)


def test_an_embedding_that_normalises_itself_is_refused_in_training_and_probed_in_evaluation():
    class Normalising(Network):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(4, N_FEATURES, max_norm=0.5)

        def forward(self, x):
            return super().forward(x + self.words((x[:, 0] > 0).long()))

    fit([RobustnessMonitor(WeightNoise(**NOISE), [0.5])], module=Normalising)
    with pytest.raises(ValueError, match=r"has written to 'words\.weight'"):
        fit([WeightNoise(**NOISE)], module=Normalising)


def test_functions_are_not_called_again_to_see_whether_weights_were_written_to():
    calls: list[None] = []

    def counted(w, level, *, generator):
        calls.append(None)
        return w + level * torch.randn(w.shape)

    fit([WeightNoise(counted, 0.1, name="own"), *callbacks(2)], train=loader(), limit_val_batches=0)
    assert len(calls) == 2 * 6


def test_weights_that_are_not_numbers_are_no_reason_to_complain():
    class Diverging(Network):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    module, _ = fit(callbacks(2), module=Diverging)
    assert all(w.isnan().any() for w in weights_of(module))


def test_a_model_that_was_made_for_inference_can_be_probed():
    with torch.inference_mode():
        module = Network()
    trainer = make_trainer([RobustnessMonitor(WeightNoise(**NOISE), [0.5])])
    trainer.test(module, loader(Rows(13, seed=1)), verbose=False)
    assert "test/robustness/accuracy_worst" in trainer.callback_metrics


def test_an_update_that_the_scaler_skips_does_not_end_the_noise():
    class Overflowing(Manual):
        def update(self, optimizer, batch, batch_idx):
            for factor in (torch.inf, 1.0):
                used.append(weights_of(self)[0].clone())
                optimizer.zero_grad()
                self.manual_backward(loss_of(self, batch) * factor)
                optimizer.step()

    used: list[Tensor] = []
    pl.seed_everything(0, verbose=False)
    module = Overflowing(lr=0.0)
    clean = weights_of(module)[0].clone()
    fit([WeightNoise(**NOISE)], module=module, plugins=[MixedPrecision("16-mixed", "cpu")], limit_val_batches=0)
    assert len(used) == 12
    assert not any(torch.equal(w, clean) for w in used)
    assert torch.equal(weights_of(module)[0], clean)
