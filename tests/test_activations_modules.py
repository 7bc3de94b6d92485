"""Noise in activations acts on the network in training mode: not in evaluation, metrics, losses, and exports."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserList
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from helpers import N_CLASSES, Rows, assert_same, fit, loader, make_trainer, weights
from helpers_activations import Layers, compiled, hooks, within
from test_embeddings import Sentences, Tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import EmbeddingNoise, RobustnessMonitor, WeightNoise, noise, schedules
from lightning_noise.callbacks.activations import ActivationNoise

# --- training mode


class PseudoLabels(Tokens):
    """Learns the labels that it gives in evaluation mode, and keeps the outputs of both modes."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.eval()
        with torch.no_grad():
            pseudo = self(batch["ids"])
        self.train()
        noisy = self(batch["ids"])
        self.seen.append((pseudo, noisy.detach()))
        return F.cross_entropy(noisy, pseudo.argmax(1))


@pytest.mark.parametrize(
    "callback",
    [EmbeddingNoise(5.0, mask="attention_mask"), ActivationNoise(noise.Gaussian(), 0.5, "head")],
    ids=["embedding", "activation"],
)
def test_labels_that_a_step_makes_in_evaluation_are_those_of_the_clean_model(callback):
    def run(*callbacks: pl.Callback) -> list[tuple[Tensor, Tensor]]:
        return fit([*callbacks], module=PseudoLabels, train=DataLoader(Sentences(), 8), limit_val_batches=0)[0].seen

    clean, seen = run(), run(callback)
    assert len(seen) == 4
    for (expected, _), (pseudo, noisy) in zip(clean, seen, strict=True):
        assert torch.equal(pseudo, expected)
        assert not torch.equal(noisy, expected)


def test_a_call_in_evaluation_does_not_move_the_draws_of_the_calls_in_training():
    class Looking(Layers):
        def training_step(self, batch, batch_idx):
            self.eval()
            self.net[1](batch[0])
            self.train()
            return super().training_step(batch, batch_idx)

    one, two = (
        fit([ActivationNoise(noise.Gaussian(), 0.5, "net.1")], module=make, limit_val_batches=0)[0]
        for make in (Looking, Layers)
    )
    assert_same(one.hidden, two.hidden)


def test_each_module_has_its_own_mode():
    class Frozen(Layers):
        def on_train_start(self):
            self.net[1].eval()

    callback = ActivationNoise(noise.Gaussian(), 0.5, ["net.1", "net.4"])
    module, _ = fit([callback], module=Frozen, train=loader(), limit_val_batches=0)
    assert torch.equal(module.hidden[0], module.net[1](Rows().x[:8]))
    with pytest.raises(ValueError, match=r"called no module that 'activation' perturbs.*in training mode counts"):
        fit([ActivationNoise(noise.Gaussian(), 0.5, "net.1")], module=Frozen, limit_val_batches=0)


# --- metrics and losses


class FocalLoss(nn.Module):
    """A loss of one's own, with a value for each sample."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Identity()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        nll = self.scale(F.cross_entropy(logits, target, reduction="none"))
        self.last = nll.detach()
        return (1 - (-nll).exp()).square() * nll


class FocalCriterion(FocalLoss):
    pass


class Hits(nn.Module):
    """A metric of one's own, with a value for each sample."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits.argmax(1) == target).float()


class PerClass(torchmetrics.Metric):
    """Holds a network, as the Fréchet inception distance does."""

    higher_is_better = None

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.add_state("total", torch.zeros(N_CLASSES), dist_reduce_fx="sum")
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(self.network(x).detach())
        self.total += self.seen[-1].sum(0)

    def compute(self) -> Tensor:
        return self.total


class Judged(Layers):
    """Has metrics and losses among its modules, and outputs of many kinds."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(N_CLASSES, average=None)
        self.metrics = torchmetrics.MetricCollection({"mean": MulticlassAccuracy(N_CLASSES)})
        self.distance = PerClass(nn.Linear(8, N_CLASSES))
        self.cross_entropy = nn.CrossEntropyLoss(reduction="none")
        self.focal = FocalLoss()
        self.criterion = FocalCriterion()
        self.hits = Hits()
        self.kept: list[tuple[Tensor, ...]] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.distance.update(x)
        loss = self.cross_entropy(logits, y) + self.focal(logits, y)
        self.kept.append((logits.detach(), y, self.accuracy(logits, y), self.metrics(logits, y)["mean"], loss.detach()))
        assert torch.equal(self.focal.last, F.cross_entropy(logits, y, reduction="none"))
        assert torch.equal(self.criterion(logits, y), FocalLoss()(logits, y))
        assert torch.equal(self.hits(logits, y), Hits()(logits, y))
        return loss.mean()


def test_metrics_and_losses_are_no_activations():
    module, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, "*")], module=Judged, train=loader(), limit_val_batches=0)
    for logits, y, accuracy, mean, loss in module.kept:
        assert torch.equal(accuracy, MulticlassAccuracy(N_CLASSES, average=None)(logits, y))
        assert torch.equal(mean, MulticlassAccuracy(N_CLASSES)(logits, y))
        nll = F.cross_entropy(logits, y, reduction="none")
        assert torch.equal(loss, nll + (1 - (-nll).exp()).square() * nll)
    for i, features in enumerate(module.distance.seen):
        x = Rows().x[8 * (i % 3) : 8 * (i % 3) + 8]
        assert torch.equal(features, module.distance.network(x))
    assert not torch.equal(module.hidden[0], module.net[1](Rows().x[:8]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("accuracy", "'accuracy' is a metric or loss, MulticlassAccuracy, whose values are not activations; type modules=…"),
        ("metrics.mean", "'metrics' is a metric or loss, MetricCollection"),
        ("distance.network", "'distance' is a metric or loss, PerClass"),
        (["net.1", "cross_entropy"], "'cross_entropy' is a metric or loss, CrossEntropyLoss"),
        ("focal*", r"no module matches 'focal\*'; modules are: 'net'"),
    ],
    ids=str,
)
def test_a_metric_or_loss_that_is_named_is_refused_before_the_first_step(pattern, message):
    module = Judged()
    with pytest.raises(ValueError, match=message):
        fit([ActivationNoise(noise.Gaussian(), 0.5, pattern)], module=module)
    assert not module.seen


def test_a_network_that_a_metric_holds_too_is_refused_with_the_way_out():
    class Sharing(Layers):
        def __init__(self):
            super().__init__()
            self.distance = PerClass(self.net)

    with pytest.raises(ValueError, match=r"the metric 'distance' holds the module 'net\.1', and .*copy\.deepcopy"):
        ActivationNoise(noise.Gaussian(), 0.5, "net.1").select_modules(Sharing())
    module = Sharing()
    module.distance.network = copy.deepcopy(module.net)
    assert list(ActivationNoise(noise.Gaussian(), 0.5, "net.1").select_modules(module)) == ["net.1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_scripted_module_is_refused_with_the_way_out():
    module = Layers()
    module.net[1] = torch.jit.script(module.net[1])  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the module 'net\.1' is scripted and takes no hooks; type modules=…"):
        fit([ActivationNoise(noise.Gaussian(), 0.5, "*")], module=module)
    assert not module.seen


@pytest.mark.parametrize("container", [tuple, UserList])
def test_patterns_may_come_in_any_sequence(container):
    """As those of a configuration."""
    assert list(ActivationNoise(noise.Gaussian(), 0.5, container(["net.1"])).select_modules(Layers())) == ["net.1"]
    assert ActivationNoise(noise.Gaussian(), 0.5, container(["net.1"])).modules in (["net.1"], ("net.1",))
    assert list(EmbeddingNoise(5.0, modules=container(["words"])).select_modules(Tokens())) == ["words"]
    assert WeightNoise(noise.Gaussian(), 0.5, params=container(["net.1.weight"])).params in (
        ["net.1.weight"],
        ("net.1.weight",),
    )


class Returning(Layers):
    """Calls a module that returns something else."""

    def __init__(self, value: Callable[[Tensor], Any]):
        super().__init__()
        self.other = nn.Identity()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        self.other(self.value(x))
        return super().forward(x)


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "a scalar": lambda x: x.mean(),
    "integers": lambda x: x.argmax(1),
    "nothing": lambda x: None,
    "a string": lambda x: "a",
    "a tuple of these": lambda x: (x.argmax(1), None, "a"),
}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_a_pattern_leaves_what_cannot_take_noise_alone_and_a_name_refuses_it(value):
    one, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, "*")], module=lambda: Returning(value), limit_val_batches=0)
    two, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, ["net", "net.*"])], module=Layers, limit_val_batches=0)
    assert_same(one.hidden, two.hidden)
    with pytest.raises(TypeError, match="needs a floating-point tensor with an axis, but 'other' returned"):
        fit([ActivationNoise(noise.Gaussian(), 0.5, ["net.1", "other"])], module=lambda: Returning(value))
    with pytest.raises(ValueError, match="called no module that 'activation' perturbs"):
        fit([ActivationNoise(noise.Gaussian(), 0.5, "othe*")], module=lambda: Returning(value))


class Output(OrderedDict):
    """Keeps its entries as attributes, too, as the outputs of transformers do."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


def test_an_output_that_is_a_mapping_with_attributes_has_the_noise_in_both():
    zeros = torch.zeros(2, 3)
    module = nn.Sequential(nn.Identity())
    noisy: Any = within(
        ActivationNoise(noise.Gaussian(), 0.5, "0"), module, lambda: module(Output(logits=zeros, ids=zeros.long()))
    )
    assert isinstance(noisy, Output)
    logits, ids = (getattr(noisy, name) for name in noisy)
    assert logits is noisy["logits"]
    assert logits.all()
    assert not ids.any()


def test_complex_activations_get_complex_noise():
    module, x = nn.Sequential(nn.Identity()), torch.zeros(4, 3, dtype=torch.complex64)
    noisy = within(ActivationNoise(noise.Gaussian(), 0.5, "0"), module, lambda: module(x))
    assert noisy.is_complex()
    assert noisy.real.all()
    assert noisy.imag.all()


# --- functional transformations and exports


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def small() -> tuple[Small, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    module = Small()
    return module, dict(module.named_parameters()), torch.randn(4, 3)


def test_functional_calls_and_their_derivatives_have_the_noise():
    module, parameters, x = small()

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    def by_autograd() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x).square().sum(), list(module.parameters()))

    def gradient() -> tuple[Tensor, ...]:
        return tuple(torch.func.grad(loss)(parameters, x).values())

    def tangent() -> Any:
        return torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))

    def per_sample() -> dict[str, Tensor]:
        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)

    callback = ActivationNoise(noise.Speckle(), 0.5, "a")
    torch.testing.assert_close(within(callback, module, gradient), within(callback, module, by_autograd))
    value, derivative = within(callback, module, tangent)
    assert torch.equal(value, within(callback, module, lambda: loss(parameters, x)))
    assert derivative != tangent()[1]
    noisy, clean = within(callback, module, per_sample)["a.weight"], per_sample()["a.weight"]
    assert (noisy != clean).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "callback",
    [ActivationNoise(noise.Drift(), 0.5, "a"), ActivationNoise(noise.Gaussian(), 0.5, "a", relative="std")],
    ids=["along an axis", "relative"],
)
def test_a_noise_that_needs_the_samples_is_refused_under_vmap(callback):
    module, _, x = small()
    with pytest.raises(ValueError, match=r"'a' returned a tensor within torch\.vmap, which hides them; type noise\.Gaussian"):
        within(callback, module, lambda: torch.vmap(module, randomness="different")(x))


EXPORTS: dict[str, Callable[..., Any]] = {
    "export": lambda module, x: torch.export.export(module, (x,)).module(),
    "trace": lambda module, x: torch.jit.trace(module, (x,)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:`isinstance")
@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_an_export_is_clean_and_one_with_noise_is_refused(export):
    class Exporting(Layers):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.eval()
                self.exported = [export(self.net, batch[0])]
                self.train()
                with pytest.raises(
                    RuntimeError, match=r"'activation' would become part of the exported graph; type module\.eval"
                ):
                    export(self.net, batch[0])
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.exported.append(export(self.net, Rows().x[:8]))

    module, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, "net.1")], module=Exporting, train=loader(), max_epochs=1)
    for exported in module.exported:
        assert torch.equal(exported(Rows().x[:8]), module.net(Rows().x[:8]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_script_in_the_fit_is_refused_with_the_way_out():
    class Scripting(Layers):
        def on_train_epoch_end(self):
            with pytest.raises(AttributeError, match=r"torch\.jit\.script cannot compile the hooks .*torch\.export\.export"):
                torch.jit.script(self.net)

    module, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, "net.1")], module=Scripting, max_epochs=1)
    torch.jit.script(module.net)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides its own warning, but not from an error
def test_at_level_0_the_graph_of_a_compiled_model_stays_whole():
    from torch._dynamo.testing import CompileCounter

    def graphs(*callbacks: pl.Callback, epochs: int = 2) -> tuple[int, list[Tensor]]:
        torch._dynamo.reset()
        counter = CompileCounter()
        pl.seed_everything(0, verbose=False)
        module, _ = compiled("in place", counter)
        module.net(Rows().x[:8])  # the fit does not compile this again
        make_trainer([*callbacks], max_epochs=epochs).fit(module, loader(), loader())
        return counter.frame_count, weights(module)

    plain, expected = graphs()
    at_0, found = graphs(ActivationNoise(noise.Gaussian(), 0.0, ["net.1", "net.2"]))
    assert at_0 == plain
    assert_same(found, expected)
    # both graphs are kept: a level that comes and goes compiles nothing more
    gated = schedules.Every(0.5, every=2, unit="step")
    few, _ = graphs(ActivationNoise(noise.Gaussian(), gated, ["net.1", "net.2"]))
    many, _ = graphs(ActivationNoise(noise.Gaussian(), gated, ["net.1", "net.2"]), epochs=6)
    assert plain < few == many


@pytest.mark.slow
def test_a_monitor_sees_the_noise_of_a_compiled_model_whose_training_is_at_level_0():
    def worst(level: float) -> float:
        module, given = compiled("in place", "eager")
        del module.log
        callback = ActivationNoise(noise.Gaussian(), level, "net.1")
        trainer = make_trainer([callback, RobustnessMonitor(callback, [5.0])], max_epochs=1)
        trainer.fit(given, loader(), loader())
        assert not hooks(module)
        metrics = trainer.callback_metrics
        return float(metrics["robustness_levels/activation/5/loss"] - metrics["robustness/loss_clean"])

    assert worst(0.0) > 0.01
