"""Noise in the weights equals loops that are written by hand, in every mode of optimization, and leaves the weights clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import N_FEATURES, Classifier, assert_same, fit, loader, weights
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_noise import Key, WeightNoise, noise

EPS = 1e-4  # of Adam, whose own is 0 in float16
LEVELS = {"weight": 0.3, "second": 0.2}


def callbacks(n: int, **kwargs: Any) -> list[WeightNoise]:
    """One or two noises, the second in units of what the first has made of the weights."""
    first = WeightNoise(noise.Gaussian(), LEVELS["weight"], seed=5, **kwargs)
    return [first, WeightNoise(noise.Uniform(), LEVELS["second"], relative="std", name="second", seed=5, **kwargs)][:n]


# --- loops written by hand


class Hand:
    """Adds and removes noise as a loop that is written by hand would."""

    def __init__(self, module: nn.Module, n: int):
        self.module, self.n = module, n

    @contextmanager
    def noise(self, epoch: int, batch_idx: int, updates: int = 0, part: nn.Module | None = None) -> Iterator[None]:
        chosen = {
            name: p
            for name, p in self.module.named_parameters()
            if p.ndim > 1 and (part is None or _is_in(p, part.parameters()))
        }
        clean = {name: p.detach().clone() for name, p in chosen.items()}
        with torch.no_grad():
            for callback, level in [*LEVELS.items()][: self.n]:
                for name, p in chosen.items():
                    p.copy_(self._noisy(callback, level, name, p, (epoch, batch_idx), updates))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in chosen.items():
                    p.copy_(clean[name])

    def _noisy(self, callback: str, level: float, name: str, p: Tensor, place: tuple[int, int], updates: int) -> Tensor:
        key = Key((5, callback, *place), rank=0) / "parameter" / name
        generator = (key / updates if updates else key).generator("cpu")
        w = p.float()
        if callback == "weight":
            drawn = level * torch.empty(p.shape).normal_(generator=generator)
        else:
            drawn = (level * w.std(correction=0)) * torch.empty(p.shape).uniform_(-1, 1, generator=generator)
        return (w + drawn).to(p.dtype)


def _is_in(p: Tensor, parameters: Iterator[nn.Parameter]) -> bool:
    return any(p is q for q in parameters)


def batches(epochs: int = 2) -> Iterator[tuple[int, int, list[Tensor]]]:
    for epoch in range(epochs):
        for batch_idx, batch in enumerate(loader()):
            yield epoch, batch_idx, batch


def loss_of(module: nn.Module, batch: list[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x.to(next(module.parameters()).dtype)), y)


class Network(Classifier):
    """Without dropout, and with the optimizer that is asked for."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **kwargs: Any):
        super().__init__()
        self.net[3] = nn.Identity()
        self.optimizer, self.kwargs = optimizer, {"lr": 0.1, **kwargs}

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.kwargs)


def by_sgd(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss_of(module, batch).backward()
        optimizer.step()


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


def by_scaled_gradients(module, hand):
    optimizer, scaler = torch.optim.Adam(module.parameters(), lr=0.1, eps=EPS), torch.amp.GradScaler("cpu")
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            with torch.autocast("cpu", dtype=torch.half):
                loss = loss_of(module, batch)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


class Manual(Network):
    """One forward pass, one backward pass and one update."""

    wrapped = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers(use_pl_optimizer=self.wrapped)
        self.update(optimizer, batch, batch_idx)

    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        optimizer.step()


class Unwrapped(Manual):
    wrapped = False

    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        loss_of(self, batch).backward()
        optimizer.step()


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


class UnwrappedWithPositionalClosure(Manual):
    wrapped = False

    def update(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


class TwoBackwards(Manual):
    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        loss = loss_of(self, batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        optimizer.step()


def by_two_backwards(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss = loss_of(module, batch)
            loss.backward(retain_graph=True)
            loss.backward()
        optimizer.step()


class TwoUpdates(Manual):
    def update(self, optimizer, batch, batch_idx):
        super().update(optimizer, batch, batch_idx)
        super().update(optimizer, batch, batch_idx)


def by_two_updates(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        for updates in range(2):
            optimizer.zero_grad()
            with hand.noise(epoch, i, updates):
                loss_of(module, batch).backward()
            optimizer.step()


class Accumulating(Manual):
    def update(self, optimizer, batch, batch_idx):
        self.manual_backward(loss_of(self, batch) / 2)
        if batch_idx != 0:
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(pl.LightningModule):
    """A generator and a discriminator; the graph of the generator is kept over the update of the discriminator."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(N_FEATURES, N_FEATURES)
        self.discriminator = nn.Sequential(nn.Linear(N_FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.Adam(
            self.discriminator.parameters(), lr=0.1, eps=EPS
        )

    def validation_step(self, batch, batch_idx):
        pass

    def fake(self, x: Tensor) -> Tensor:
        return self.generator(x).tanh() @ self.generator.weight  # which the graph keeps, too

    def training_step(self, batch, batch_idx):
        generates, discriminates = self.optimizers()  # type: ignore[misc]
        x = batch[0]
        fake = self.fake(x)
        discriminates.zero_grad()
        self.manual_backward(self.discriminator(fake.detach()).mean() - self.discriminator(x).mean())
        discriminates.step()
        generates.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        generates.step()


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
    "manual, LBFGS": (lambda: WithClosure(**LBFGS), by_lbfgs, {}),
    "manual, unwrapped LBFGS": (lambda: UnwrappedWithPositionalClosure(**LBFGS), by_lbfgs, {}),
    "manual, two backward passes": (TwoBackwards, by_two_backwards, {}),
    "manual, two updates": (TwoUpdates, by_two_updates, {}),
    "manual, accumulation": (Accumulating, by_accumulation_with_a_ragged_tail, {}),
    "adversarial": (Adversarial, by_adversaries, {}),
    "adversarial, toggling": (Toggling, by_toggling, {}),
}
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def fitted(make: Callable[[], pl.LightningModule], n: int, **kwargs: Any) -> pl.LightningModule:
    return fit(callbacks(n), module=make, train=loader(), limit_val_batches=0, **kwargs)[0]


def by_hand(make: Callable[[], pl.LightningModule], loop: Callable[..., None], n: int, dtype=torch.float32) -> nn.Module:
    pl.seed_everything(0, verbose=False)
    module = make().to(dtype)
    loop(module, Hand(module, n))
    return module


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("make", "loop", "settings"), MODES.values(), ids=MODES)
def test_a_run_equals_a_loop_written_by_hand(make, loop, settings, precision, n):
    expected, without = (by_hand(make, loop, noises, PRECISIONS[precision]) for noises in (n, n - 1))
    assert_same(weights(fitted(make, n, precision=precision, **settings)), weights(expected))
    assert any(not torch.equal(one, two) for one, two in zip(weights(expected), weights(without), strict=True))


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("make", [lambda: Network(**ADAM), lambda: Manual(**ADAM)], ids=["automatic", "manual"])
def test_a_run_with_scaled_gradients_equals_a_loop_written_by_hand(make, n):
    expected = by_hand(make, by_scaled_gradients if make().automatic_optimization else _unclipped, n)
    clip = {"gradient_clip_val": 0.1} if make().automatic_optimization else {}
    # of itself, a CPU would have bfloat16 and no scaler
    found = fitted(make, n, plugins=[MixedPrecision("16-mixed", "cpu")], **clip)
    assert_same(weights(found), weights(expected))


def _unclipped(module, hand):
    optimizer, scaler = torch.optim.Adam(module.parameters(), lr=0.1, eps=EPS), torch.amp.GradScaler("cpu")
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            with torch.autocast("cpu", dtype=torch.half):
                loss = loss_of(module, batch)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
