"""What noise does to a model follows from theory, where the theory is exact."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from helpers import LinearRegression, loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import InputNoise, RobustnessMonitor, noise


@pytest.mark.slow
def test_input_noise_on_a_linear_model_is_ridge_regression():
    """Training with Gaussian noise is Tikhonov regularization (Bishop, 1995)."""
    sigma = 0.5  # not 1, which is its own square
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
    module = LinearRegression(d)
    trainer = make_trainer([InputNoise(noise.Gaussian(), sigma, seed=0)], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=None, sampler=6000 * [slice(None)]))
    # the weights before a step do not depend on its noise, so their mean follows the gradient of the ridge exactly; the means
    # of blocks of 150 steps are nearly independent and give its standard error
    error = module.blocks.std(0) / len(module.blocks) ** 0.5
    assert ((module.blocks.mean(0) - ridge).abs() < 5 * error).all()
    assert ((least_squares - ridge).abs() > 10 * error).any()


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
    assert trainer.callback_metrics["robustness/accuracy_clean"] == 1
    for level in levels:
        p = 0.5 * (1 + math.erf(margin / level / math.sqrt(2)))
        found = trainer.callback_metrics[f"robustness_levels/gaussian/{level:g}/accuracy"].item()
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

    def rises(level: float) -> torch.Tensor:
        """The antithetic rise of the loss for each of the same draws."""
        copies = x.expand(n, 3)
        shifted = noise.Gaussian()(copies, level, generator=torch.Generator().manual_seed(1))
        return (loss(shifted) + loss(2 * copies - shifted)) / 2 - loss(x)

    # twice the level has four times the second order and sixteen times the fourth, which drops out of this combination
    with torch.no_grad():
        rise = (4 * rises(sigma) - rises(2 * sigma) / 4) / 3
    expected = 0.5 * sigma**2 * hessian.trace().item()
    # five standard errors; the sixth order is smaller than the second by sigma^4, 1.6e-7
    assert abs(rise.mean().item() - expected) < 5 * rise.std().item() / math.sqrt(n)
    assert abs(expected) > 50 * rise.std().item() / math.sqrt(n)
