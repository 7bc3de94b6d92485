"""Noise in weights that a layer computes, renames, exchanges, writes to or averages: right, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Rows, assert_same, fit, loader, make_trainer, weights
from helpers_weights import NOISE, Manual, Network, weights_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_noise import RobustnessMonitor, WeightNoise, noise


class Computed(Network):
    """Computes the weight of its first layer, and keeps what it multiplies with."""

    def __init__(self, compute: Callable[[nn.Module], Any]):
        super().__init__(lr=0.0)
        compute(self.net[1])
        self.used: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.used.append(self.net[1].weight.detach().clone())  # type: ignore[union-attr]
        return loss


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.2)


def normalized(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older one is deprecated
        nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": pruned,
    "weight_norm of hooks": normalized,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_follow_the_noise_of_their_parameters_and_come_back(compute):
    pl.seed_everything(0, verbose=False)
    module = Computed(compute)
    module.net.eval()  # spectral normalization moves its vectors in training
    module.net(Rows().x)
    before, clean = [w.clone() for w in weights_of(module)], module.net[1].weight.detach().clone()  # type: ignore[union-attr]
    fit([WeightNoise(**NOISE)], module=module, limit_val_batches=0)
    assert_same(weights_of(module), before)
    layer: Any = module.net[1]
    assert torch.equal(layer.weight, clean), "as an attribute, before the next forward pass"
    for i, used in enumerate(module.used):
        assert not torch.allclose(used, clean)
        assert not any(torch.equal(used, other) for other in module.used[:i])
        assert not used[clean == 0].any(), "what is pruned stays pruned"
        if compute is parametrizations.orthogonal:
            torch.testing.assert_close(used @ used.T, torch.eye(8), atol=1e-5, rtol=0)


def test_pruning_between_epochs_sees_clean_weights():
    class Pruning(Network):
        def __init__(self):
            super().__init__(lr=0.0)
            prune.identity(self.net[1], "weight")

        def on_train_epoch_end(self):
            prune.l1_unstructured(self.net[1], "weight", 0.3)

    one, two = (fit(callbacks, module=Pruning, limit_val_batches=0)[0] for callbacks in ([WeightNoise(**NOISE)], []))
    assert one.net[1].weight_mask.sum() < 64
    assert torch.equal(one.net[1].weight_mask, two.net[1].weight_mask)


def test_a_name_that_pruning_has_changed_is_refused_before_the_first_step():
    module = Computed(pruned)
    with pytest.raises(ValueError, match=r"no parameter matches 'net\.1\.weight'; type 'net\.1\.weight_orig'; parameters"):
        fit([WeightNoise(**NOISE, params="net.1.weight")], module=module)
    assert not module.used


# --- layers that write to their weights


class MaxNorm(nn.Linear):
    """Bounds the norm of each row in its forward pass, as layers for EEG do."""

    exchanges = True

    def forward(self, input: Tensor) -> Tensor:
        bounded = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        if self.exchanges:
            self.weight.data = bounded
        else:
            self.weight.data.copy_(bounded)
        return super().forward(input)


class Bounded(Network):
    def __init__(self, exchanges: bool = True):
        super().__init__()
        layer = self.net[1] = MaxNorm(8, 8)
        layer.exchanges = exchanges


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "in place"])
def test_a_layer_that_bounds_its_own_weights_is_refused_in_the_first_step_with_its_weights_as_they_were(exchanges):
    module = Bounded(exchanges)
    before = [w.clone() for w in weights_of(module)]
    layer: Any = module.net[1]
    storage = layer.weight.data_ptr()
    with pytest.raises(ValueError, match=r"has written to 'net\.1\.weight' while it held noise; .*type params=…"):
        fit([WeightNoise(**NOISE)], module=module, num_sanity_val_steps=0)
    assert_same(weights_of(module), before)
    assert layer.weight.data_ptr() == storage
    fit([WeightNoise(**NOISE, params="net.4.weight")], module=Bounded(exchanges))


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "in place"])
def test_a_probe_of_such_a_layer_leaves_its_weights(exchanges):
    def validated(*callbacks: pl.Callback) -> list[Tensor]:
        pl.seed_everything(0, verbose=False)
        module = Bounded(exchanges)
        make_trainer([*callbacks]).validate(module, loader(), verbose=False)
        return weights(module)

    assert_same(validated(RobustnessMonitor(WeightNoise(**NOISE), [0.5])), validated())


def test_clipping_in_the_step_is_refused_and_not_lost():
    class Clipping(Manual):
        """As a critic of Wasserstein does."""

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            for parameter in self.parameters():
                parameter.data.clamp_(-0.01, 0.01)

    with pytest.raises(ValueError, match=r"has written to 'net\.1\.weight' while it held noise; .* on_train_batch_end"):
        fit([WeightNoise(**NOISE)], module=Clipping, limit_val_batches=0)


def test_an_optimizer_of_a_flat_copy_is_refused_and_its_update_is_not_lost():
    class Flat(Manual):
        def __init__(self):
            super().__init__()
            self.flat = [torch.cat([p.detach().flatten() for p in self.net.parameters()])]
            parts = self.flat[0].split([p.numel() for p in self.net.parameters()])
            for parameter, part in zip(self.net.parameters(), parts, strict=True):
                parameter.data = part.view_as(parameter)

        def configure_optimizers(self):
            return torch.optim.SGD([self.flat[0].requires_grad_()], lr=0.1)

        def update(self, optimizer, batch, batch_idx):
            self.net.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.flat[0].grad = torch.cat([p.grad.flatten() for p in self.net.parameters()])  # type: ignore[union-attr]
            optimizer.step()

    with pytest.raises(ValueError, match=r"has written to 'net\.1\.weight' while it held noise"):
        fit([WeightNoise(**NOISE)], module=Flat, limit_val_batches=0)


# --- averages, and passes with other weights


class Teaching(Network):
    """Averages its weights into a teacher."""

    def __init__(self, hook: str):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.hook = hook

    @torch.no_grad()
    def average(self) -> None:
        for mean, parameter in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mean.data = 0.9 * mean.data + 0.1 * parameter.data

    def training_step(self, batch, batch_idx):
        if self.hook == "training_step":
            self.average()
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer):
        if self.hook == "on_before_zero_grad":
            self.average()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook == "on_train_batch_end":
            self.average()


@pytest.mark.parametrize("hook", ["training_step", "on_before_zero_grad", "on_train_batch_end"])
def test_a_teacher_that_averages_noisy_weights_is_warned_of_once(hook):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([WeightNoise(**NOISE)], module=lambda: Teaching(hook), limit_val_batches=0)
    said = [str(each.message) for each in caught if "average them in on_train_batch_end" in str(each.message)]
    assert len(said) == (hook != "on_train_batch_end")
    assert all("has written to 'teacher.1.weight', which is not trained" in each for each in said)


def test_a_step_can_compute_with_clean_weights():
    class PseudoLabels(Network):
        def training_step(self, batch, batch_idx):
            clean = torch.func.functional_call(self.net, self.net.state_dict(), (batch[0],))
            self.clean, self.noisy = clean, self.net(batch[0]).detach()
            return super().training_step(batch, batch_idx)

    module, _ = fit([WeightNoise(**NOISE)], module=PseudoLabels(lr=0.0), train=loader(), limit_val_batches=0)
    assert torch.equal(module.clean, module.net(Rows().x[16:]))
    assert not torch.equal(module.noisy, module.clean)


def test_a_copy_of_a_part_made_in_the_step_has_a_state_dict_of_its_own():
    class Copying(Network):
        def training_step(self, batch, batch_idx):
            self.copied = copy.deepcopy(self.net)
            with torch.no_grad():
                self.copied[1].weight.zero_()  # type: ignore[operator]
            return super().training_step(batch, batch_idx)

    module, _ = fit([WeightNoise(**NOISE)], module=Copying, limit_val_batches=0)
    assert not module.copied.state_dict()["1.weight"].any()
    assert not module.net._state_dict_hooks
    assert not module.net[1]._state_dict_hooks


# --- parameters of other kinds


def test_a_lazy_layer_is_refused_before_the_first_step():
    class Lazy(Network):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.LazyLinear(N_CLASSES)

    with pytest.raises(ValueError, match=r"'net\.4\.weight' has no shape before the first forward pass; type module\(inputs\)"):
        fit([WeightNoise(**NOISE)], module=Lazy, num_sanity_val_steps=0)
    fit([WeightNoise(**NOISE)], module=Lazy)  # the sanity check runs a forward pass


def test_adapters_get_noise_and_frozen_weights_do_not():
    class Adapted(Network):
        def __init__(self):
            super().__init__(lr=0.0)
            self.requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(2, 8))
            self.seen_weights: list[list[Tensor]] = []

        def forward(self, x):
            self.seen_weights.append([w.clone() for w in weights_of(self)])
            return super().forward(x + x @ self.a @ self.b)

    module, _ = fit([WeightNoise(noise.Gaussian(), 0.5, relative="std", seed=5)], module=Adapted, limit_val_batches=0)
    for a, b, *others in module.seen_weights:
        assert not torch.equal(a, module.a)
        assert torch.equal(b, module.b), "zeros have no deviation"
        assert_same(others, [p.detach() for p in module.net.parameters()])


class Spectral(pl.LightningModule):
    """Multiplies frequencies with complex weights."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.ones(5, 5, dtype=torch.complex64))
        self.seen: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.filters.detach().clone())
        return (torch.fft.rfft(batch[0]) @ self.filters).abs().square().mean()

    def validation_step(self, batch, batch_idx): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("relative", [None, "std", "max", "filter"])
def test_complex_parameters_get_complex_noise_in_the_unit_of_the_level(relative):
    callback = WeightNoise(noise.Gaussian(), 0.5, relative=relative, seed=5)
    module, _ = fit([callback], module=Spectral, limit_val_batches=0, log_every_n_steps=1)
    assert torch.equal(module.filters.detach(), torch.ones(5, 5, dtype=torch.complex64))
    for seen in module.seen:
        delta = seen - 1
        if relative == "std":  # equal weights have no deviation
            assert not delta.any()
        else:
            assert delta.real.all()
            assert delta.imag.all()
        if relative == "filter":
            torch.testing.assert_close(delta.norm(dim=1), 0.5 * torch.ones(5, 5).norm(dim=1))


def test_a_noise_of_real_numbers_is_refused_for_complex_parameters():
    module = Spectral()
    with pytest.raises(
        TypeError, match=r"Impulse needs real numbers, but the parameter 'filters' is complex64 .*type params=…"
    ):
        fit([WeightNoise(noise.Impulse(), 0.1)], module=module, limit_val_batches=0)
    assert not module.seen
