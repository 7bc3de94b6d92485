"""Noise in the weights equals loops that are written by hand, in every mode of optimization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_same, weights
from helpers_weights import (
    EPS,
    Accumulating,
    Adversarial,
    Manual,
    Network,
    TwoBackwards,
    TwoUpdates,
    Unwrapped,
    UnwrappedWithPositionalClosure,
    batches,
    by_hand,
    by_sgd,
    fitted,
    loss_of,
)
from pytorch_lightning.plugins import MixedPrecision
from torch import nn


def by_adam_with_clipping(module, hand):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, eps=EPS)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss_of(module, batch).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()


def by_accumulation_with_a_ragged_tail(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        with hand.noise(epoch, i):
            (loss_of(module, batch) / 2).backward()
        if i != 0:  # of three batches an epoch, the last is alone
            optimizer.step()
            optimizer.zero_grad()


def by_lbfgs(module, hand):
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)
    for epoch, i, batch in batches():

        def closure(epoch=epoch, i=i, batch=batch):
            optimizer.zero_grad()
            with hand.noise(epoch, i):
                loss = loss_of(module, batch)
                loss.backward()
            return loss

        optimizer.step(closure)


def by_scaled_gradients(module, hand, clip: bool):
    optimizer, scaler = torch.optim.Adam(module.parameters(), lr=0.1, eps=EPS), torch.amp.GradScaler("cpu")
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            with torch.autocast("cpu", dtype=torch.half):
                loss = loss_of(module, batch)
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


class WithClosure(Manual):
    def update(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class UnwrappedWithClosure(WithClosure):
    wrapped = False


class ForwardBeforeTheClosure(Manual):
    def update(self, optimizer, batch, batch_idx):
        loss = loss_of(self, batch)

        def closure():
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def by_two_backwards(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss = loss_of(module, batch)
            loss.backward(retain_graph=True)
            loss.backward()
        optimizer.step()


def by_two_updates(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        for updates in range(2):
            optimizer.zero_grad()
            with hand.noise(epoch, i, updates):
                loss_of(module, batch).backward()
            optimizer.step()


def by_adversaries(module, hand):
    generates, discriminates = Adversarial.configure_optimizers(module)
    generator, discriminator = module.generator, module.discriminator
    for epoch, i, (x, _) in batches():
        x = x.to(generator.weight.dtype)
        with hand.noise(epoch, i, part=generator):
            fake = Adversarial.fake(module, x)
            discriminates.zero_grad()
            with hand.noise(epoch, i, part=discriminator):
                (discriminator(fake.detach()).mean() - discriminator(x).mean()).backward()
            discriminates.step()
            generates.zero_grad()
            with hand.noise(epoch, i, 1, part=discriminator):
                (-discriminator(fake).mean()).backward()
        generates.step()


class Toggling(Adversarial):
    def training_step(self, batch, batch_idx):
        generates, discriminates = self.optimizers()  # type: ignore[misc]
        x = batch[0]
        self.toggle_optimizer(generates)
        generates.zero_grad()
        self.manual_backward(-self.discriminator(self.fake(x)).mean())
        generates.step()
        self.untoggle_optimizer(generates)
        self.toggle_optimizer(discriminates)
        discriminates.zero_grad()
        self.manual_backward(self.discriminator(self.fake(x).detach()).mean() - self.discriminator(x).mean())
        discriminates.step()
        self.untoggle_optimizer(discriminates)


def by_toggling(module, hand):
    generates, discriminates = Adversarial.configure_optimizers(module)
    generator, discriminator = module.generator, module.discriminator
    for epoch, i, (x, _) in batches():
        x = x.to(generator.weight.dtype)
        with hand.noise(epoch, i, part=discriminator):
            module.zero_grad()
            with hand.noise(epoch, i, part=generator):
                (-discriminator(Adversarial.fake(module, x)).mean()).backward()
            generates.step()
            module.zero_grad()
            with hand.noise(epoch, i, 1, part=generator):
                fake = Adversarial.fake(module, x).detach()
            (discriminator(fake).mean() - discriminator(x).mean()).backward()
        discriminates.step()


ADAM = {"optimizer": torch.optim.Adam, "eps": EPS}
LBFGS = {"optimizer": torch.optim.LBFGS, "max_iter": 4}
MODES: dict[str, tuple[Callable[[], pl.LightningModule], Callable[..., None], dict[str, Any]]] = {
    "SGD": (Network, by_sgd, {}),
    "Adam with clipping": (lambda: Network(**ADAM), by_adam_with_clipping, {"gradient_clip_val": 0.1}),
    "accumulation": (Network, by_accumulation_with_a_ragged_tail, {"accumulate_grad_batches": 2}),
    "LBFGS": (lambda: Network(**LBFGS), by_lbfgs, {}),
    "manual": (Manual, by_sgd, {}),
    "manual, unwrapped": (Unwrapped, by_sgd, {}),
    "manual, closure": (WithClosure, by_sgd, {}),
    "manual, unwrapped, closure": (UnwrappedWithClosure, by_sgd, {}),
    "manual, unwrapped, positional closure": (UnwrappedWithPositionalClosure, by_sgd, {}),
    "manual, forward pass before the closure": (ForwardBeforeTheClosure, by_sgd, {}),
    "manual, LBFGS": (lambda: WithClosure(**LBFGS), by_lbfgs, {}),
    "manual, unwrapped LBFGS": (lambda: UnwrappedWithPositionalClosure(**LBFGS), by_lbfgs, {}),
    "manual, two backward passes": (TwoBackwards, by_two_backwards, {}),
    "manual, two updates": (TwoUpdates, by_two_updates, {}),
    "manual, accumulation": (Accumulating, by_accumulation_with_a_ragged_tail, {}),
    "adversarial": (Adversarial, by_adversaries, {}),
    "adversarial, toggling": (Toggling, by_toggling, {}),
}
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("make", "loop", "settings"), MODES.values(), ids=MODES)
def test_a_run_equals_a_loop_written_by_hand(make, loop, settings, precision, n):
    expected, without = (by_hand(make, loop, noises, PRECISIONS[precision]) for noises in (n, n - 1))
    assert_same(weights(fitted(make, n, precision=precision, **settings)), weights(expected))
    assert any(not torch.equal(one, two) for one, two in zip(weights(expected), weights(without), strict=True))


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize(
    ("make", "clip"), [(lambda: Network(**ADAM), True), (lambda: Manual(**ADAM), False)], ids=["automatic", "manual"]
)
def test_a_run_with_scaled_gradients_equals_a_loop_written_by_hand(make, clip, n):
    settings = {"gradient_clip_val": 0.1} if clip else {}
    # of itself, a CPU would have bfloat16 and no scaler
    found = fitted(make, n, plugins=[MixedPrecision("16-mixed", "cpu")], **settings)
    assert_same(weights(found), weights(by_hand(make, partial(by_scaled_gradients, clip=clip), n)))
