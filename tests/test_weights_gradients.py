"""Gradients through noisy weights are straight-through, or those of the loss as a function of the clean ones."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import Rows, as_one, assert_same, fit, loader, weights
from helpers_weights import Accumulating, Conv, Manual, Network, TwoBackwards, TwoUpdates, loss_of
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.func import functional_call

from lightning_noise import Key, WeightNoise, noise
from lightning_noise.perturb.weights import PerturbedParameters, RelativeTo, weight_noise

UNITS = [(noise.Gaussian(), unit) for unit in (None, "std", "max", "filter")]
MULTIPLICATIVE = [noise.Speckle(), noise.DropConnect(), noise.FeatureDropout(rescale=False), noise.Scaling(), noise.SNR()]


def noisy_weights(
    weights: dict[str, Tensor], member: noise.Noise, level: float, key: Key, unit: RelativeTo | None = None
) -> dict[str, Tensor]:
    """The noisy weights as differentiable functions of the weights."""
    if not member.elementwise:
        return {name: weight_noise(w, member, level, key / name, unit) for name, w in weights.items()}
    if unit is None:
        return as_one(weights, lambda first, w: weight_noise(w, member, level, key / first))
    drawn = as_one(weights, lambda first, w: weight_noise(torch.zeros_like(w), member, 1.0, key / first))
    return {name: w + level * scaled(drawn[name], w, unit) for name, w in weights.items()}


def scaled(z: Tensor, w: Tensor, unit: RelativeTo) -> Tensor:
    """Noise of level 1 in the unit of the weights."""
    if unit == "filter":
        return z * (w.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)).view(-1, *[1] * (w.ndim - 1))
    return z * (w.std(correction=0) if unit == "std" else w.abs().max())


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize(("member", "unit"), [*UNITS, *((member, None) for member in MULTIPLICATIVE)], ids=repr)
def test_the_reparametrized_gradient_is_that_of_the_loss_as_a_function_of_the_clean_weights(member, unit, n):
    pl.seed_everything(0, verbose=False)
    module = Conv().double()
    batch = [Rows(8).x.double(), Rows(8).y]
    keys = [Key((callback, 3)) for callback in ("a", "b")][:n]
    clean = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    noisy = dict(clean)
    for key in keys:
        noisy |= noisy_weights({name: w for name, w in noisy.items() if w.ndim > 1}, member, 0.3, key / "parameter", unit)
    F.cross_entropy(functional_call(module, noisy, (batch[0],)), batch[1]).backward()
    perturbed = []
    for key in keys:  # the second is within the first
        perturbed.append(PerturbedParameters(module, None, member, 0.3, key, relative=unit, gradient="reparametrized"))
        perturbed[-1].enter()
    loss_of(module, batch).backward()
    for one in reversed(perturbed):
        one.exit()
    for name, p in module.named_parameters():
        assert p.grad is not None
        # the same derivative by two orders of the same sums, in float64
        torch.testing.assert_close(p.grad, clean[name].grad, rtol=1e-12, atol=1e-14)
        assert torch.equal(p, clean[name])
        assert not p._backward_hooks


def shifted(w, level, *, generator):
    """Additive, but it does not say so."""
    return w + level * torch.randn(w.shape, generator=generator)


@pytest.mark.parametrize("make", [Network, Manual, TwoBackwards, TwoUpdates, Accumulating])
def test_the_reparametrized_gradient_of_additive_noise_is_the_straight_through_one(make):
    """The derivative of what is added is 1."""
    one, two = (
        fit([WeightNoise(shifted, 0.3, gradient=gradient)], module=make, train=loader())[0]
        for gradient in ("reparametrized", "straight_through")
    )
    assert_same(weights(one), weights(two))


@pytest.mark.parametrize("member", [noise.Speckle(), noise.DropConnect()], ids=repr)
def test_a_gradient_of_a_reparametrized_gradient_is_exact_for_multiplicative_noise(member):
    module, key = Conv().double(), Key(("a",))
    batch = [Rows(8).x.double(), Rows(8).y]
    clean = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    noisy = clean | noisy_weights({name: w for name, w in clean.items() if w.ndim > 1}, member, 0.3, key / "parameter")

    def penalty(loss: Tensor, parameters: list[Any]) -> Tensor:
        return loss + sum(g.square().sum() for g in torch.autograd.grad(loss, parameters, create_graph=True))

    loss = F.cross_entropy(functional_call(module, noisy, (batch[0],)), batch[1])
    expected = torch.autograd.grad(penalty(loss, [*clean.values()]), [*clean.values()])
    perturbed = PerturbedParameters(module, None, member, 0.3, key, gradient="reparametrized")
    perturbed.enter()
    penalty(loss_of(module, batch), [*module.parameters()]).backward()
    perturbed.exit()
    # the same derivative by two orders of the same sums, in float64
    torch.testing.assert_close([p.grad for p in module.parameters()], [*expected], rtol=1e-12, atol=1e-13)


def reparametrized_once(**arguments: Any) -> PerturbedParameters:
    layer = nn.Linear(4, 4)
    module = nn.Sequential(layer, nn.Tanh())
    perturbed = PerturbedParameters(module, None, **{"level": 0.3, "key": Key(()), "gradient": "reparametrized"} | arguments)
    perturbed.enter()
    loss = module(torch.ones(2, 4)).square().sum()
    (gradient,) = torch.autograd.grad(loss, [layer.weight], create_graph=True)
    gradient.sum().backward()
    return perturbed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": noise.Gaussian(), "relative": "std"}, "has no second derivatives of noise that is relative to the weights"),
        (
            {"noise": noise.as_noise(lambda w, level, *, generator: w.detach())},
            "needs a differentiable noise, but the noise detaches x",
        ),
    ],
    ids=["relative", "detached"],
)
def test_a_reparametrized_gradient_that_would_be_wrong_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reparametrized_once(**arguments)


def test_a_sparse_reparametrized_gradient_is_refused():
    module = nn.Embedding(4, 3, sparse=True)
    perturbed = PerturbedParameters(module, None, noise.Speckle(), 0.3, Key(()), gradient="reparametrized")
    perturbed.enter()
    with pytest.raises(TypeError, match=r"needs dense gradients, but the gradient of 'weight' is torch\.sparse_coo"):
        module(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("make", [Network, Manual], ids=["automatic", "manual"])
def test_the_reparametrized_gradient_is_exact_for_scaled_gradients(make):
    """Power-of-two scales do not round, so the scaled run in float32 equals the one that is not scaled."""

    def run(**settings):
        callback = WeightNoise(noise.Speckle(), 0.5, gradient="reparametrized")
        return weights(fit([callback], module=make, train=loader(), **settings)[0])

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    autocast = MixedPrecision("16-mixed", "cpu", scaler)
    autocast.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    assert_same(run(plugins=[autocast]), run())
