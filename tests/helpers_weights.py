"""Modules and loops for tests of noise in weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, N_FEATURES, Classifier, as_one, fit, loader
from torch import Tensor, nn

from lightning_noise import Key, WeightNoise, noise

EPS = 1e-4  # of Adam, whose own is 0 in float16
LEVELS = {"weight": 0.3, "second": 0.2}


def callbacks(n: int, **kwargs: Any) -> list[WeightNoise]:
    """One or two noises, the second in units of what the first has made of the weights."""
    first = WeightNoise(noise.Gaussian(), LEVELS["weight"], seed=5, **kwargs)
    return [first, WeightNoise(noise.Uniform(), LEVELS["second"], relative="std", name="second", seed=5, **kwargs)][:n]


class Hand:
    """Adds and removes noise as a loop that is written by hand would."""

    def __init__(self, module: nn.Module, n: int):
        self.module, self.n = module, n

    @contextmanager
    def noise(
        self,
        epoch: int,
        batch_idx: int,
        updates: int = 0,
        part: nn.Module | None = None,
        levels: dict[str, float] = LEVELS,
    ) -> Iterator[None]:
        chosen = {
            name: p
            for name, p in self.module.named_parameters()
            if p.ndim > 1 and (part is None or _is_in(p, part.parameters()))
        }
        clean = {name: p.detach().clone() for name, p in chosen.items()}
        with torch.no_grad():
            for callback, level in [*levels.items()][: self.n]:
                drawn = self._drawn(callback, (epoch, batch_idx), updates)
                for name, p in chosen.items():
                    w = p.float()
                    scale = torch.tensor(level) if callback == "weight" else level * w.std(correction=0)
                    p.copy_(torch.addcmul(w, drawn[name], scale))  # rounds once, unlike a product and a sum
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in chosen.items():
                    p.copy_(clean[name])

    def _drawn(self, callback: str, place: tuple[int, int], updates: int) -> dict[str, Tensor]:
        """One draw for all matrices, also if only those of a part are perturbed."""

        def draw(first: str, w: Tensor) -> Tensor:
            key = Key((5, callback, *place), rank=0) / "parameter" / first
            generator, z = (key / updates if updates else key).generator("cpu"), torch.empty(w.shape)
            return z.normal_(generator=generator) if callback == "weight" else z.uniform_(-1, 1, generator=generator)

        return as_one({name: p for name, p in self.module.named_parameters() if p.ndim > 1}, draw)


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


class TwoUpdates(Manual):
    def update(self, optimizer, batch, batch_idx):
        super().update(optimizer, batch, batch_idx)
        super().update(optimizer, batch, batch_idx)


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


def fitted(make: Callable[[], pl.LightningModule], n: int, **kwargs: Any) -> pl.LightningModule:
    return fit(callbacks(n), module=make, train=loader(), limit_val_batches=0, **kwargs)[0]


def by_hand(make: Callable[[], pl.LightningModule], loop: Callable[..., None], n: int, dtype=torch.float32) -> nn.Module:
    pl.seed_everything(0, verbose=False)
    module = make().to(dtype)
    loop(module, Hand(module, n))
    return module


NOISE = {"noise": noise.Gaussian(), "level": 0.5, "seed": 5}


def weights_of(module: nn.Module) -> list[Tensor]:
    """The parameters themselves; the state dict of a module is clean."""
    return [parameter.detach() for parameter in module.parameters()]


class Conv(Network):
    """A kernel of three axes, and a matrix."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, N_FEATURES)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, N_CLASSES)
        )
