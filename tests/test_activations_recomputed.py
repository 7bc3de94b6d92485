"""Noise in the outputs of modules is the same if they are computed again or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import assert_same, fit, loader, make_trainer, weights
from helpers_activations import KEY, Layers, compiled, hooks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_noise import noise, schedules
from lightning_noise.callbacks.activations import ActivationNoise
from lightning_noise.loop.perturbation import Context


class Checkpointed(Layers):
    """Computes its layers again in the backward pass."""

    def __init__(self, use_reentrant: bool | None, twice: bool = False):
        super().__init__(lr=0.1)
        self.use_reentrant, self.twice = use_reentrant, twice

    def block(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()  # without, the reentrant kind has no gradient
        calls = [x, 2 * x] if self.twice else [x]
        if self.use_reentrant is None or not self.training:
            return self.net[4](sum(self.block(x) for x in calls))
        return self.net[4](sum(checkpoint(self.block, x, use_reentrant=self.use_reentrant) for x in calls))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_what_is_computed_again_in_the_backward_pass_gets_the_noise_of_the_forward_pass(use_reentrant):
    def trained(use_reentrant):
        # Speckle, whose draw the gradient depends on
        return fit([ActivationNoise(noise.Speckle(), 0.5, ["net.1", "net.2"])], module=lambda: Checkpointed(use_reentrant))[0]

    assert_same(weights(trained(use_reentrant)), weights(trained(None)))


def test_what_is_computed_again_twice_gets_the_noise_of_the_forward_pass():
    class Manual(Checkpointed):
        def __init__(self, use_reentrant):
            super().__init__(use_reentrant)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            optimizer.step()

    def trained(use_reentrant):
        return fit([ActivationNoise(noise.Speckle(), 0.5, "net.1")], module=lambda: Manual(use_reentrant))[0]

    assert_same(weights(trained(False)), weights(trained(None)))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_module_that_is_called_twice_is_refused_when_it_is_computed_again(use_reentrant):
    def trained(use_reentrant):
        callback = ActivationNoise(noise.Speckle(), 0.5, "net.1")
        return fit([callback], module=lambda: Checkpointed(use_reentrant, twice=True))[0]

    trained(None)
    with pytest.raises(ValueError, match=r"computes 'net.1' again.*which of the 2 calls.*called once"):
        trained(use_reentrant)


def test_a_module_that_is_called_for_each_of_two_batches_of_a_step_is_refused_when_it_is_computed_again():
    module, x = nn.Sequential(nn.Identity()), torch.ones(4, 3, requires_grad=True)
    callback = ActivationNoise(noise.Speckle(), 0.5, "0")
    with callback.perturbation(Context(make_trainer(), module), None, 0.5, KEY):  # type: ignore[arg-type]
        first = checkpoint(module, x, use_reentrant=True)
        with callback.perturbation(Context(make_trainer(), module), None, 0.5, KEY / "second"):  # type: ignore[arg-type]
            second: Any = checkpoint(module, x, use_reentrant=True)
            with pytest.raises(ValueError, match=r"computes '0' again.*which of the 2 calls"):
                (first + second).sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides its own warning, but not from an error
@pytest.mark.parametrize("part", ["layer", "submodule", "in place", "module"])
def test_a_compiled_model_gets_the_same_noise_in_every_fit_and_is_not_compiled_at_every_step(part):
    from torch._dynamo.testing import CompileCounter

    def fits(part, callback=None):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        counter, after, graphs = CompileCounter(), [], []  # the counter runs the graph as it is
        module, given = compiled(part, counter)
        for callbacks in ([], [callback], [], [callback]) if callback else ([], [], [], []):
            make_trainer(callbacks, max_epochs=2).fit(given, loader(), loader())
            after.append(weights(module))
            graphs.append(counter.frame_count)
            assert not hooks(module)
        return after, graphs

    def callback(level):
        return ActivationNoise(noise.Gaussian(), level, ["net.1", "net.2"])

    ramp = callback(schedules.Linear(0.1, 0.5))
    (noisy, graphs), (expected, _), (without, _) = fits(part, ramp), fits("none", ramp), fits("none")
    for i, (one, two) in enumerate(zip(noisy, expected, strict=True)):
        assert_same(one, two)
        assert all(map(torch.equal, one, without[i])) is (i == 0)
    assert graphs[-1] > 0
    assert graphs == fits(part, callback(0.3))[1], "a level that changes compiles nothing"
