"""Noise in the gradients of optimizers that step without Lightning, against loops that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import as_one, assert_same, fit, loader, weights
from pytorch_lightning.plugins import MixedPrecision
from test_gradients import LBFGS, Adam, Manual, Plain
from test_weights_updates import Outer
from torch import Tensor, nn

from lightning_noise import GradientNoise, Key, noise, schedules

pytestmark = pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")


class Raw(Plain):
    """Steps with the optimizer that Lightning wraps."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class RawClosure(Plain):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(optimizer_closure)


class RawLBFGS(LBFGS, RawClosure):
    """Evaluates its closure several times in an update."""


class Unwrapped(Manual):
    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        optimizer.step()


class Private(Manual):
    """Makes its own optimizer, which Lightning does not know."""

    def __init__(self, parameters: Any = None):
        super().__init__()
        self.own = torch.optim.SGD(self.parameters() if parameters is None else parameters, lr=0.1)

    def configure_optimizers(self) -> Any:
        return None

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        self.own.step()


class Fused(Plain):
    """Updates each parameter in the backward pass, as soon as its gradient is known."""

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            own = torch.optim.SGD([parameter], lr=0.1)
            parameter.register_post_accumulate_grad_hook(lambda _, own=own: (own.step(), own.zero_grad())[1])

    def configure_optimizers(self) -> Any:
        return None


class Wrapped(Unwrapped):
    """Its optimizer lets another one make the update, in two halves."""

    def configure_optimizers(self):
        return Outer(self.parameters(), lr=0.2)


def drawn(gradients: dict[str, Tensor], coordinates: tuple[int, ...]) -> dict[str, Tensor]:
    key = Key((0, "gradient", *coordinates[:-1])) / "gradient" / coordinates[-1]
    return as_one(gradients, lambda first, g: noise.Gaussian()(g, 0.5, generator=(key / first).generator("cpu")))


def by_hand(
    optimizer: Callable[..., torch.optim.Optimizer], n_updates: int = 1, one_by_one: bool = False, **kwargs: Any
) -> list[Tensor]:
    """The weights after two epochs with noise that is keyed by the batch and the update."""
    pl.seed_everything(0, verbose=False)
    module = Plain()
    updater = optimizer(module.parameters(), **kwargs)
    for epoch in range(2):
        for i, (x, y) in enumerate(loader()):
            for update in range(1, n_updates + 1):

                def closure(x=x, y=y, at=(epoch, i, update)) -> Tensor:
                    updater.zero_grad()
                    loss = F.cross_entropy(module(x), y)
                    loss.backward()
                    gradients: Any = {name: parameter.grad for name, parameter in module.named_parameters()}
                    for group in ({name: gradients[name]} for name in gradients) if one_by_one else [gradients]:
                        for name, noisy in drawn(group, at).items():
                            module.get_parameter(name).grad = noisy
                    return loss

                updater.step(closure)  # type: ignore[arg-type]
    return weights(module)


RUNS = {
    "optimizer.optimizer.step()": (Raw, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "optimizer.optimizer.step(closure)": (RawClosure, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "LBFGS": (RawLBFGS, torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4}),
    "use_pl_optimizer=False": (Unwrapped, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "an optimizer of the module": (Private, torch.optim.SGD, {"lr": 0.1}),
    "fused backward": (Fused, torch.optim.SGD, {"lr": 0.1, "one_by_one": True}),
}


@pytest.mark.parametrize(("module", "optimizer", "settings"), RUNS.values(), ids=RUNS)
def test_an_optimizer_that_steps_without_lightning_gets_noise(module, optimizer, settings):
    noisy, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=module, train=loader(), limit_val_batches=0)
    assert_same(weights(noisy), by_hand(optimizer, **settings))


def test_each_update_of_a_step_has_its_own_draw():
    class Twice(Unwrapped):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    noisy, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=Twice, train=loader(), limit_val_batches=0)
    assert_same(weights(noisy), by_hand(torch.optim.SGD, n_updates=2, lr=0.1, momentum=0.9))


def test_optimizers_of_the_same_parameters_have_draws_of_their_own():
    class Twice(Unwrapped):
        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.zero_grad()
                F.cross_entropy(self(batch[0]), batch[1]).backward()
                torch.optim.SGD(self.parameters(), lr=0.1).step()

    noisy, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=Twice, train=loader(), limit_val_batches=0)
    assert_same(weights(noisy), by_hand(torch.optim.SGD, n_updates=2, lr=0.1))


def test_an_optimizer_gets_noise_after_another_has_failed():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    class Trying(Unwrapped):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.zeros(1))
            self.failing = Failing([self.other], lr=0.1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

        def training_step(self, batch, batch_idx):
            with pytest.raises(ArithmeticError):
                self.failing.step()
            super().training_step(batch, batch_idx)

    one, two = (
        fit([GradientNoise(noise.Gaussian(), 0.5)], module=module, train=loader(), limit_val_batches=0)[0]
        for module in (Trying, Unwrapped)
    )
    assert_same(weights(one.net), weights(two.net))


def test_an_optimizer_within_another_adds_no_second_noise():
    noisy, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=Wrapped, train=loader(), limit_val_batches=0)
    torch.testing.assert_close(weights(noisy), by_hand(torch.optim.SGD, lr=0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wraps", [True, False], ids=["wrapped", "known to torch"])
def test_the_hook_of_lightning_and_that_of_torch_add_noise_once(wraps):
    class Stepper(torch.optim.SGD):
        """Steps with an optimizer of its own; torch may not know that it is one."""

        def __init__(self, parameters: Any, lr: float):
            super().__init__(parameters, lr=lr)
            inner = self.inner = torch.optim.SGD(self.param_groups, lr=lr)
            if wraps:
                self.step = lambda closure=None: (closure() if closure else None, inner.step())[0]  # type: ignore[method-assign]

    def make(kind: Any) -> type[Plain]:
        class Module(Plain):
            def configure_optimizers(self):
                return kind(self.parameters(), lr=0.1)

        return Module

    one, two = (fit([GradientNoise(noise.Gaussian(), 0.5)], module=make(kind))[0] for kind in (Stepper, torch.optim.SGD))
    assert_same(weights(one), weights(two))


def test_no_noise_is_added_at_level_0_and_to_other_parameters():
    stranger = torch.zeros(3, requires_grad=True)
    for module in (Raw, Fused, Unwrapped):
        one, two = (fit(callbacks, module=module)[0] for callbacks in ([GradientNoise(noise.Gaussian(), 0.0)], []))
        assert_same(weights(one), weights(two))

    class Both(Manual):
        def training_step(self, batch, batch_idx):
            stranger.grad = torch.ones(3)
            torch.optim.SGD([stranger], lr=0.1).step()
            super().training_step(batch, batch_idx)

    fit([GradientNoise(noise.Gaussian(), 0.5)], module=Both, train=loader(), limit_val_batches=0)
    torch.testing.assert_close(stranger, torch.full((3,), -0.6))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_an_update_outside_the_training_step_gets_no_noise(hook):
    class Tempered(Plain):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))
            setattr(self, hook, self.tune)

        def tune(self, *_: Any) -> None:
            self.temperature.grad = torch.ones(1)
            torch.optim.SGD([self.temperature], lr=0.1).step()
            self.temperature.grad = None

    module, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=Tempered, train=loader())
    n = 6 if hook == "on_train_batch_end" else 2
    torch.testing.assert_close(module.temperature.detach(), torch.full((1,), 1 - 0.1 * n))


def test_a_scaler_of_the_module_is_taken_into_account():
    class Scaled(Adam):
        def __init__(self, fused: bool):
            super().__init__()
            self.automatic_optimization, self.fused = False, fused
            self.scaler = torch.amp.GradScaler("cpu")

        def training_step(self, batch, batch_idx):
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.scaler.scale(F.cross_entropy(self(batch[0]), batch[1])).backward()
            self.scaler.step(optimizer)
            self.scaler.update()

    one, two = (
        fit([GradientNoise(noise.Gaussian(), 0.5)], module=lambda f=fused: Scaled(f), limit_val_batches=0)[0]
        for fused in (True, False)
    )
    # steps of 0.01, each rounded in another order
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-5)


def test_gradients_of_an_unknown_scale_are_refused():
    with pytest.raises(ValueError, match=r"cannot know the loss scale of gradients .*; type optimizer\.step\(closure\)"):
        fit([GradientNoise(noise.Gaussian(), 0.5)], module=Raw, plugins=[MixedPrecision("16-mixed", "cpu")])


class ByHand(Plain):
    """Updates its weights without an optimizer."""

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.update)

    def configure_optimizers(self) -> Any:
        return None

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
        parameter.grad = None


@pytest.mark.filterwarnings("ignore:the level of 'gradient' is 0 in all")
def test_a_fit_whose_updates_cannot_be_seen_is_an_error():
    with pytest.raises(ValueError, match=r"no optimizer of torch updated the parameters in the training epoch.*type|return an"):
        fit([GradientNoise(noise.Gaussian(), 0.5)], module=ByHand)
    fit([GradientNoise(noise.Gaussian(), schedules.Window(0.5, begin=9, unit="epoch"))], module=ByHand)


def test_complex_gradients_get_complex_noise():
    class Spectral(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.filter = nn.Parameter(torch.zeros(5, dtype=torch.complex64))

        def training_step(self, batch, batch_idx):
            return (0 * self.filter).abs().sum()

        def validation_step(self, batch, batch_idx): ...

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    callback = GradientNoise(noise.Gaussian(), 0.5)
    module, _ = fit([callback], module=Spectral, limit_val_batches=0, log_every_n_steps=1, max_epochs=1)
    assert module.filter.detach().real.all()
    assert module.filter.detach().imag.all()
