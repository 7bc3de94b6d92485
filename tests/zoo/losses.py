"""Losses in which the input is more than an input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import tasks
from zoo.member import Member, Module, Samples, generator, randn

# --- counts


class Counts(Module):
    """An autoencoder of counts: the Poisson likelihood of the input, which must not be negative, is the loss."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, counts):
        return self.decoder(self.encoder((1 + counts).log()).relu())

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["X"]
        return -torch.distributions.Poisson(self(x).exp(), validate_args=False).log_prob(x).sum(1).mean()

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("elbo_validation", -self._step(batch), batch_size=len(batch["X"]))


def cells() -> list[dict[str, Tensor]]:
    counts = torch.poisson(torch.full((10, 6), 3.0), generator=generator())
    return [{"X": x, "batch": torch.tensor([i % 2]), "labels": torch.tensor([0])} for i, x in enumerate(counts)]


# --- physics


class Named(Tensor):
    """Points with names of their axes, which results of operations do not have."""

    @staticmethod
    def __new__(cls, x: Tensor, names: list[str]):
        return Tensor.__new__(cls, x)

    def __init__(self, x: Tensor, names: list[str]):
        self.names_of_axes = names

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return Named(super().clone(*args, **kwargs).as_subclass(Tensor), self.names_of_axes)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return Named(super().to(*args, **kwargs).as_subclass(Tensor), self.names_of_axes)


class Physics(Module):
    """Solves u' = -u, u(0) = 1: the loss differentiates the output with respect to the input."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, points):
        return self.net(points)

    def _residual(self, batch: dict[str, Any]) -> Tensor:
        points = batch["domain"]
        assert points.names_of_axes == ["t"]
        t = points.as_subclass(Tensor).detach().requires_grad_()
        u = self(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return (slope + u).square().mean() + (self(batch["start"]) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        return self._residual(batch)

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            self.log("pde", self._residual(batch).detach(), batch_size=len(batch["domain"]))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), self.lr, max_iter=3)


def collocation(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"domain": Named(torch.stack(samples), ["t"]), "start": torch.zeros(1, 1)}


# --- pairs


class Pairs(Module):
    """Contrasts two views of each sample."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))

    def forward(self, x):
        return F.normalize(self.net(x), dim=1)

    def _step(self, batch: Any) -> Tensor:
        (one, two), _, _ = batch
        similarity = self(one) @ self(two).T / 0.5
        return F.cross_entropy(similarity, torch.arange(len(similarity)))

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_ssl", self._step(batch), batch_size=len(batch[1]))


def views() -> list[Any]:
    return [((x, x + 0.1), i % 2, f"{i}.png") for i, x in enumerate(randn(10, 6))]


# --- adversaries


class Adversaries(Module):
    """A generator and a discriminator, with manual optimization; the step returns nothing."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(2, 6), nn.Linear(6, 1)

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch, batch_idx):
        images, _ = batch
        g, d = self.optimizers()  # type: ignore[misc]
        z = randn(len(images), 2, seed=batch_idx)
        self.toggle_optimizer(g)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self(z)), torch.ones(len(z), 1))
        g.zero_grad()
        self.manual_backward(loss)
        g.step()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        real, fake = self.discriminator(images), self.discriminator(self(z).detach())
        d.zero_grad()
        self.manual_backward(F.softplus(-real).mean() + F.softplus(fake).mean())
        d.step()
        self.untoggle_optimizer(d)
        self.log("d", real.mean().detach())

    def validation_step(self, batch, batch_idx):
        self.log("realness", self.discriminator(batch[0]).sigmoid().mean())

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), self.lr) for part in (self.generator, self.discriminator)], []


# --- several outputs


class Several(Module):
    """Classifies and predicts a number; returns both in a dict, and loses some samples of each."""

    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x):
        states = self.body(x).relu()
        return {"kind": self.kind(states), "size": self.size(states).squeeze(1)}

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        outputs, known = self(batch["x"]), batch["size"].isfinite()
        error = (outputs["size"] - batch["size"])[known].square().mean()
        return F.cross_entropy(outputs["kind"], batch["kind"], ignore_index=-1) + error

    def training_step(self, batch, batch_idx):
        return {"loss": self._step(batch), "n": len(batch["x"])}

    def validation_step(self, batch, batch_idx):
        self.log_dict({"loss/val": self._step(batch)}, batch_size=len(batch["x"]))


def things() -> list[dict[str, Tensor]]:
    kind, size = torch.arange(10) % 4 - 1, randn(10, seed=1)
    size[::3] = torch.nan
    return [{"x": x, "kind": k, "size": s} for x, k, s in zip(randn(10, 6), kind, size, strict=True)]


def known_kinds(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    known = batch["kind"] >= 0
    return module(batch["x"])["kind"][known], batch["kind"][known]


MEMBERS = {
    "counts": Member(
        Counts,
        lambda: DataLoader(Samples(cells()), batch_size=4),
        lambda batch, shift: batch["X"].add_(shift),
        {"clip": (0.0, None)},
        {"target": "X", "task": tasks.Regression(), "predict": lambda module, batch: module(batch["X"]).exp(), "inputs": "X"},
        lambda module, batch: (module(batch["X"]).exp().flatten(), batch["X"].flatten()),
    ),
    "physics": Member(
        Physics,
        lambda: DataLoader(Samples(list(torch.linspace(0, 1, 10)[:, None])), batch_size=5, collate_fn=collocation),
        lambda batch, shift: batch["domain"].add_(shift),
        {"inputs": "domain"},
        layers="net",
        trainer={"inference_mode": False},
    ),
    "pairs": Member(
        Pairs,
        lambda: DataLoader(Samples(views()), batch_size=5),
        lambda batch, shift: [view.add_(shift) for view in batch[0]],
        {"inputs": "0.*"},
        layers="net.2",
    ),
    "adversaries": Member(
        Adversaries,
        lambda: DataLoader(TensorDataset(randn(10, 6), torch.zeros(10).long()), batch_size=5),
        lambda batch, shift: batch[0].add_(shift),
    ),
    "several outputs": Member(
        Several,
        lambda: DataLoader(Samples(things()), batch_size=4),
        lambda batch, shift: batch["x"].add_(shift),
        {"inputs": "x"},
        {
            "inputs": "x",
            "target": "kind",
            "task": tasks.Multiclass(ignore_index=-1),
            "predict": lambda module, batch: module(batch["x"])["kind"],
        },
        known_kinds,
    ),
}
