"""What noise in the weights does to a model follows from theory, where the theory is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import LinearRegression, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import Key, WeightNoise, noise
from lightning_noise.perturb.weights import PerturbedParameters, weight_noise

N = 20_000
SIGMA = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def within_five_standard_errors(samples: Tensor, expected: Tensor | float) -> bool:
    """Whether the mean over the first axis is what is expected."""
    error = samples.std(0) / math.sqrt(len(samples))
    return bool(((samples.mean(0) - expected).abs() < 5 * error).all())


# --- a linear model: x (20, 4), w (4,), and as many copies of the weights as there are draws, each in a row


X, W, Y = normal(20, 4), normal(4, seed=1), normal(20, seed=2)


def squared_error(w: Tensor) -> Tensor:
    """The loss of each row of weights."""
    return (w @ X.T - Y).square().mean(-1)


def gradient(w: Tensor) -> Tensor:
    return 2 * (w @ X.T - Y) @ X / len(X)


def draws(member: noise.Noise) -> tuple[Tensor, Tensor]:
    """Noisy copies of the weights, and the gradients of the loss with respect to the clean ones."""
    w = W.repeat(N, 1).requires_grad_()
    noisy = weight_noise(w, member, SIGMA, Key((0,)))
    squared_error(noisy).sum().backward()
    assert w.grad is not None
    return noisy.detach(), w.grad


def test_additive_noise_adds_a_constant_to_the_loss_of_a_linear_model():
    noisy, reparametrized = draws(noise.Gaussian())
    assert within_five_standard_errors(squared_error(noisy) - squared_error(W), SIGMA**2 * X.square().sum(1).mean())
    assert within_five_standard_errors(reparametrized, gradient(W))
    # it is the gradient at the noisy weights, by another order of the same sums
    torch.testing.assert_close(reparametrized, gradient(noisy), rtol=1e-12, atol=1e-13)


MULTIPLICATIVE = {
    "Speckle": (noise.Speckle(), SIGMA**2),
    "DropConnect": (noise.DropConnect(), SIGMA / (1 - SIGMA)),
}


@pytest.mark.parametrize(("member", "variance"), MULTIPLICATIVE.values(), ids=MULTIPLICATIVE)
def test_multiplicative_noise_is_a_ridge_scaled_by_the_data_for_the_reparametrized_gradient_alone(member, variance):
    noisy, reparametrized = draws(member)
    ridge = variance * W.square() * X.square().mean(0)
    assert within_five_standard_errors(squared_error(noisy) - squared_error(W), ridge.sum())
    assert within_five_standard_errors(reparametrized, gradient(W) + 2 * variance * W * X.square().mean(0))
    straight_through = gradient(noisy)
    assert within_five_standard_errors(straight_through, gradient(W))
    assert not within_five_standard_errors(reparametrized, gradient(W))


@pytest.mark.parametrize("layer", ["first", "second"])
def test_noise_in_a_layer_of_a_linear_network_penalises_the_other(layer):
    u, v = normal(3, 4, seed=3), normal(3, seed=4)
    if layer == "second":
        outputs = weight_noise(v.repeat(N, 1), noise.Gaussian(), SIGMA, Key((0,))) @ (X @ u.T).T
        penalty = SIGMA**2 * (X @ u.T).square().sum(1).mean()
    else:
        noisy = weight_noise(u.flatten().repeat(N, 1), noise.Gaussian(), SIGMA, Key((0,))).view(N, 3, 4)
        outputs = torch.einsum("nhd,h,bd->nb", noisy, v, X)
        penalty = SIGMA**2 * v.square().sum() * X.square().sum(1).mean()
    clean = (X @ u.T @ v - Y).square().mean()
    assert within_five_standard_errors((outputs - Y).square().mean(1) - clean, penalty)


def test_the_rise_of_a_quadratic_loss_is_half_the_variance_times_the_trace_of_its_hessian():
    root = normal(4, 4, seed=5)
    hessian, slope, w = root @ root.T, normal(4, seed=6), normal(4, seed=7)

    def loss(w: Tensor) -> Tensor:
        return 0.5 * ((w @ hessian) * w).sum(-1) + w @ slope

    added = weight_noise(w.repeat(N, 1), noise.Gaussian(), SIGMA, Key((0,))) - w
    one_point = loss(w + added) - loss(w)
    two_points = (loss(w + added) + loss(w - added)) / 2 - loss(w)
    expected = 0.5 * SIGMA**2 * hessian.trace()
    assert within_five_standard_errors(one_point, expected)
    assert within_five_standard_errors(two_points, expected)
    # of two points the linear term is gone, draw by draw; what is left is rounding of losses of the order of 10
    torch.testing.assert_close(two_points, 0.5 * ((added @ hessian) * added).sum(-1), rtol=0, atol=1e-13)
    assert two_points.std() < one_point.std()


# --- normalisation: the loss does not depend on the size of the weights


class Normalised(nn.Module):
    """Its weights are followed by batch normalisation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal(5, 10, seed=1))
        self.x = normal(256, 10)
        self.y = (self.x[:, :5] @ normal(5, 5, seed=2)).argmax(1)

    def loss(self) -> Tensor:
        return F.cross_entropy(3 * F.batch_norm(self.x @ self.weight.T, None, None, training=True, eps=1e-30), self.y)


def radial(module: Normalised, **noisy: Any) -> Tensor:
    """The component along the weights of the gradient at the noisy weights."""
    perturbed = PerturbedParameters(module, None, **noisy)
    perturbed.enter()
    module.zero_grad()
    module.loss().backward()
    perturbed.exit()
    assert module.weight.grad is not None
    return (module.weight.detach() * module.weight.grad).sum()


@pytest.fixture(scope="module")
def trained() -> Normalised:
    module = Normalised()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        module.loss().backward()
        optimizer.step()
    return module


def test_without_noise_the_gradient_is_orthogonal_to_the_weights(trained):
    # zero but for the rounding of sums of the order of 0.01
    assert abs(radial(trained, noise=noise.Gaussian(), level=1e-300, key=Key(()))) < 1e-13


@pytest.mark.parametrize(
    ("member", "unit"),
    [(noise.Gaussian(), None), (noise.Gaussian(), "std"), (noise.Gaussian(), "max"), (noise.Speckle(), None)],
    ids=str,
)
def test_the_gradient_at_noisy_weights_makes_them_grow(member, unit, trained):
    level = SIGMA * (1 if unit == "std" or (unit is None and not member.additive) else 0.1)
    samples = torch.stack([radial(trained, noise=member, level=level, key=Key((i,)), relative=unit) for i in range(400)])
    assert samples.mean() < -5 * samples.std() / math.sqrt(len(samples))


@pytest.mark.parametrize(
    ("member", "unit"),
    [*((noise.Gaussian(), unit) for unit in ("std", "max", "filter")), (noise.Speckle(), None), (noise.DropConnect(), None)],
    ids=str,
)
def test_the_reparametrized_gradient_of_relative_noise_is_orthogonal_to_the_weights(member, unit, trained):
    for i in range(20):
        arguments = {"noise": member, "level": SIGMA, "key": Key((i,)), "relative": unit}
        assert abs(radial(trained, gradient="reparametrized", **arguments)) < 1e-13  # as without noise
        assert abs(radial(trained, **arguments)) > 1e-4


# --- whole runs


class Quadratic(pl.LightningModule):
    """A small network in float64, which keeps the weights that it computes with, and those that it is left with."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.optimizer = optimizer
        self.noisy: list[list[Tensor]] = []
        self.clean: list[list[Tensor]] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

    def kept(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def on_train_batch_start(self, batch, batch_idx):
        self.clean.append(self.kept())

    def training_step(self, batch, batch_idx):
        self.noisy.append(self.kept())
        return self.loss(batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def trained_in_noise(optimizer: Callable[..., torch.optim.Optimizer], steps: int = 30) -> Quadratic:
    module = Quadratic(optimizer)
    callback = WeightNoise(noise.Gaussian(), SIGMA, params="*", seed=0)
    trainer = make_trainer([callback], max_epochs=steps, limit_val_batches=0)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=len(X)))
    return module


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_perturbing_and_restoring_is_descent_with_anticorrelated_noise(optimizer):
    """Anti-PGD (Orvieto et al., 2022): the noisy weights z follow z + update(z) + xi' - xi."""
    module = trained_in_noise(optimizer)
    xi = [[z - w for z, w in zip(noisy, clean, strict=True)] for noisy, clean in zip(module.noisy, module.clean, strict=True)]
    hand = Quadratic(optimizer)
    step = hand.configure_optimizers()
    with torch.no_grad():
        for p, z in zip(hand.parameters(), module.noisy[0], strict=True):
            p.copy_(z)
    for t in range(1, len(xi)):
        step.zero_grad()
        hand.loss([X, Y]).backward()
        step.step()
        with torch.no_grad():
            for p, after, before in zip(hand.parameters(), xi[t], xi[t - 1], strict=True):
                p.add_(after - before)
        for p, z in zip(hand.parameters(), module.noisy[t], strict=True):
            torch.testing.assert_close(p.detach(), z, rtol=0, atol=1e-12)


def test_increments_of_the_noise_telescope_and_are_anticorrelated():
    module = trained_in_noise(lambda parameters: torch.optim.SGD(parameters, lr=0.0), steps=300)
    first, last = module.clean[0], module.clean[-1]
    assert all(torch.equal(one, two) for one, two in zip(first, last, strict=True))
    xi = torch.stack([torch.cat([(z - w).flatten() for z, w in zip(noisy, first, strict=True)]) for noisy in module.noisy])
    increments = xi.diff(dim=0)
    # what a sum of 300 numbers of the order of 1 loses to rounding
    torch.testing.assert_close(increments.sum(0), xi[-1] - xi[0], rtol=0, atol=1e-12)
    # means over time of each weight, which are independent of each other
    assert within_five_standard_errors(increments.square().mean(0), 2 * SIGMA**2)
    assert within_five_standard_errors((increments[1:] * increments[:-1]).mean(0), -(SIGMA**2))
    assert within_five_standard_errors((increments[2:] * increments[:-2]).mean(0), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reparametrized", "straight_through"])
def test_drop_connect_on_a_linear_model_is_ridge_regression_for_the_reparametrized_gradient_alone(how):
    """(X'X + p / (1 - p) diag X'X)^-1 X'y, and least squares for the gradient at the noisy weights."""
    gram, moment, share = X.T @ X, X.T @ Y, 0.3
    ridge = torch.linalg.solve(gram + share / (1 - share) * gram.diag().diag(), moment)
    least_squares = torch.linalg.solve(gram, moment)
    module = LinearRegression(4)
    callback = WeightNoise(noise.DropConnect(), share, params="weight", gradient=how, seed=0)
    trainer = make_trainer([callback], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=None, sampler=6000 * [slice(None)]))  # type: ignore[arg-type]
    found, other = (ridge, least_squares) if how == "reparametrized" else (least_squares, ridge)
    # the expected gradient is linear in the weights, so the means of blocks, nearly independent, give the standard error
    error = module.blocks.std(0) / len(module.blocks) ** 0.5
    assert ((module.blocks.mean(0) - found).abs() < 5 * error).all()
    assert ((module.blocks.mean(0) - other).abs() > 5 * error).any()


# --- predictions under several draws


def test_draws_that_are_the_same_tell_nothing_and_others_at_most_the_entropy_of_their_mean():
    """The mutual information of prediction and weights lies between 0 and the entropy of the mean prediction."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def information(seeds: list[int]) -> tuple[Tensor, Tensor]:
        predictions = []
        for seed in seeds:
            perturbed = PerturbedParameters(module, None, noise.Gaussian(), SIGMA, Key((seed,)), relative="std")
            perturbed.enter()
            predictions.append(module(X).softmax(1).detach())
            perturbed.exit()
        mean = torch.stack(predictions).mean(0)
        return entropy(mean) - torch.stack([entropy(p) for p in predictions]).mean(0), entropy(mean)

    same, _ = information([3] * 8)
    assert same.abs().max() < 1e-14  # a few roundings of an entropy of the order of 1
    other, whole = information([*range(8)])
    assert (other > 0).all()
    assert (other < whole).all()


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(1)
