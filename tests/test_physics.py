"""What noise does to a model follows from theory, where the theory is exact."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from conftest import loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import InputNoise, RobustnessMonitor, noise
from lightning_noise.schedules import Level


class LinearRegression(pl.LightningModule):
    """Averages its weights over the last half of the run, which removes the scatter of the last steps."""

    def __init__(self, n_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_features, dtype=torch.float64))
        self.mean = torch.zeros(n_features, dtype=torch.float64)
        self.averaged = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (x @ self.weight - y).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step > self.trainer.estimated_stepping_batches / 2:
            self.averaged += 1
            self.mean += (self.weight.detach() - self.mean) / self.averaged

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def fitted(x: torch.Tensor, y: torch.Tensor, level: Level) -> torch.Tensor:
    """The mean weights of full-batch gradient descent under input noise."""
    module = LinearRegression(x.shape[1])
    trainer = make_trainer([InputNoise(noise.Gaussian(), level, seed=0)], max_epochs=6000, limit_val_batches=0)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=None, sampler=[slice(None)]))
    return module.mean


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_input_noise_on_a_linear_model_is_ridge_regression(sigma):
    """Training with Gaussian noise is Tikhonov regularization (Bishop, 1995)."""
    generator = torch.Generator().manual_seed(0)
    n, d = 60, 4
    # correlated columns, so that the ridge turns the solution and does not only shrink it
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) @ torch.tensor(
        [[1.0, 0.9, 0, 0], [0, 0.4, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 0.5]], dtype=torch.float64
    )
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64) + 0.1 * torch.randn(
        n, dtype=torch.float64, generator=generator
    )
    gram, moment = x.T @ x, x.T @ y
    ridge = torch.linalg.solve(gram + n * sigma**2 * torch.eye(d, dtype=torch.float64), moment)
    least_squares = torch.linalg.solve(gram, moment)
    found = fitted(x, y, sigma)
    # the average over 3000 draws of 60 rows scatters by less than 0.02; least squares is more than 1 away
    assert (found - ridge).abs().max() < 0.05
    assert (least_squares - ridge).norm() > 1


class Plane(pl.LightningModule):
    """Two classes either side of a plane."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        score = x @ self.weight
        return torch.stack([-score, score], 1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_a_linear_classifier_under_gaussian_noise_has_the_accuracy_of_its_margin(margin):
    """Of samples at the distance m from the plane, the share Phi(m / sigma) stays on their side."""
    generator = torch.Generator().manual_seed(0)
    n, d, levels = 8000, 5, (0.5, 1.0, 3.0)
    weight = torch.randn(d, generator=generator)
    unit = weight / weight.norm()
    y = torch.randint(0, 2, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator)
    x = x - (x @ unit)[:, None] * unit + (2 * y - 1)[:, None] * margin * unit
    trainer = make_trainer([RobustnessMonitor(noise.Gaussian(), levels)])
    trainer.validate(Plane(weight), loader(TensorDataset(x, y), batch_size=1000), verbose=False)  # type: ignore[arg-type]
    assert trainer.callback_metrics["robustness/clean/accuracy"] == 1
    for level in levels:
        p = 0.5 * (1 + math.erf(margin / level / math.sqrt(2)))
        found = trainer.callback_metrics[f"robustness/gaussian/{level:g}/accuracy"].item()
        assert abs(found - p) < 5 * math.sqrt(p * (1 - p) / n)  # five standard errors


def test_noise_raises_the_loss_by_half_its_variance_times_the_trace_of_the_hessian():
    """The second-order term of Bishop (1995), with antithetic draws so that the first order cancels exactly."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    x = torch.randn(1, 3, dtype=torch.float64, generator=generator)

    def loss(points: torch.Tensor) -> torch.Tensor:
        return (network(points) - 0.3).square()[:, 0]

    hessian = torch.autograd.functional.hessian(lambda point: loss(point)[0], x).view(3, 3)  # type: ignore[arg-type]
    sigma, n = 0.02, 100_000
    with torch.no_grad():
        copies = x.expand(n, 3)
        shifted = noise.Gaussian()(copies, sigma, generator=generator)
        rise = (loss(shifted) + loss(2 * copies - shifted)) / 2 - loss(x)
    expected = 0.5 * sigma**2 * hessian.trace().item()
    # five standard errors, and the fourth order, which is smaller by about sigma^2 and some tens for these weights
    assert abs(rise.mean().item() - expected) < 5 * rise.std().item() / math.sqrt(n) + 50 * sigma**2 * abs(expected)
