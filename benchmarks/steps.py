"""Training steps with each callback at level 0 and above, and with the same noise written into the step by hand."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from benchmarks.models import (
    ByHand,
    Classifier,
    make_trainer,
    perceptron,
    perturb_weights,
    resnet_20,
    restore_weights,
    transformer,
)
from benchmarks.tables import Table
from benchmarks.timing import Bench, ratios, spread
from lightning_noise import (
    ActivationNoise,
    CutMix,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
)

WARMUP = 5


class Network(NamedTuple):
    """A network, a batch of inputs, the modules of its activation noise, and the steps of a fit."""

    make: Callable[[], nn.Module]
    x: Tensor
    pattern: str
    steps: int


class Case(NamedTuple):
    """Callbacks at a level for the modules of a pattern, the level, and the same by hand."""

    callbacks: Callable[[float, str], list[pl.Callback]]
    level: float
    hand: ByHand | None = None


def flipped(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), torch.where(torch.rand(y.shape, device=y.device) < 0.1, torch.randint_like(y, 10), y))


def mixed(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    lam, partners = random.betavariate(1, 1), torch.randperm(len(x)).to(x.device)
    return shared(module(lam * x + (1 - lam) * x[partners]), y, y[partners], lam)


def cut(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    lam, partners = random.betavariate(1, 1), torch.randperm(len(x)).to(x.device)
    size = [int((1 - lam) ** 0.5 * n) for n in x.shape[-2:]]
    (top, left), x = [random.randint(0, n - m) for n, m in zip(x.shape[-2:], size, strict=True)], x.clone()
    box = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    x[box] = x[partners][box]
    return shared(module(x), y, y[partners], 1 - size[0] * size[1] / x[0, 0].numel())


def shared(logits: Tensor, y: Tensor, other: Tensor, lam: float) -> Tensor:
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, other)


def swapped(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    other = x.gather(0, torch.randint_like(x, len(x)))
    return F.cross_entropy(module(torch.where(torch.rand(x.shape, device=x.device) < 0.1, other, x)), y)


def of_weights(level: float, relative: bool) -> ByHand:
    def loss(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
        module.clean = perturb_weights(module, level, relative)
        return F.cross_entropy(module(x), y)

    return ByHand(loss, after_backward=lambda module: restore_weights(module.clean))


def reparametrized(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    noisy = {k: w + 0.1 * w.std() * torch.randn_like(w) if w.ndim > 1 else w for k, w in module.net.named_parameters()}
    return F.cross_entropy(functional_call(module.net, noisy, x), y)


@torch.no_grad()
def perturb_gradients(module: Classifier) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(torch.randn_like(parameter), alpha=0.001)


def of_gaussian(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x + 0.1 * torch.randn_like(x)), y)


def of_smoothing(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y, label_smoothing=0.1)


def of_activation(output: Tensor) -> Tensor:
    return output + 0.1 * torch.randn_like(output)


def of_embedding(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    embedding, *rest = module.net.children()
    e = embedding(x)
    return F.cross_entropy(nn.Sequential(*rest)(e + 5.0 / e[0].numel() ** 0.5 * (2 * torch.rand_like(e) - 1)), y)


INPUTS = {
    "InputNoise(Gaussian())": Case(lambda a, _: [InputNoise(noise.Gaussian(), a)], 0.1, ByHand(of_gaussian)),
    "Mixup": Case(lambda a, _: [Mixup(a)], 1.0, ByHand(mixed)),
}
IMAGES = {"CutMix": Case(lambda a, _: [CutMix(a)], 1.0, ByHand(cut))}
TOKENS = {
    "InputNoise(SwapNoise())": Case(lambda a, _: [InputNoise(noise.SwapNoise(), a)], 0.1, ByHand(swapped)),
    "EmbeddingNoise": Case(lambda a, _: [EmbeddingNoise(a)], 5.0, ByHand(of_embedding)),
}
INSIDE = {
    "LabelSmoothing": Case(lambda a, _: [LabelSmoothing(a)], 0.1, ByHand(of_smoothing)),
    "TargetNoise(FlipLabels)": Case(lambda a, _: [TargetNoise(labels.FlipLabels(10), a)], 0.1, ByHand(flipped)),
    "WeightNoise(Gaussian())": Case(lambda a, _: [WeightNoise(noise.Gaussian(), a)], 0.01, of_weights(0.01, False)),
    "WeightNoise, relative": Case(lambda a, _: [WeightNoise(noise.Gaussian(), a, relative="std")], 0.1, of_weights(0.1, True)),
    "WeightNoise, reparametrized": Case(
        lambda a, _: [WeightNoise(noise.Gaussian(), a, relative="std", gradient="reparametrized")], 0.1, ByHand(reparametrized)
    ),
    "GradientNoise(Gaussian())": Case(
        lambda a, _: [GradientNoise(noise.Gaussian(), a)], 0.001, ByHand(after_backward=perturb_gradients)
    ),
    "ActivationNoise(Gaussian())": Case(
        lambda a, pattern: [ActivationNoise(noise.Gaussian(), a, pattern)], 0.1, ByHand(activation=of_activation)
    ),
}


def together(level: float, pattern: str) -> list[pl.Callback]:
    """A callback in each place: inputs, labels, weights, activations and gradients."""
    values = (level * noise.Gaussian.severities[0], noise.Gaussian())
    return [
        InputNoise(noise.SwapNoise() if pattern.endswith("layers.?") else values[1], values[0]),
        LabelSmoothing(values[0]),
        WeightNoise(values[1], values[0], relative="std"),
        ActivationNoise(values[1], values[0], pattern),
        GradientNoise(values[1], 0.01 * values[0]),
    ]


CASES = INPUTS | IMAGES | TOKENS | INSIDE
TOGETHER = {"five callbacks together": Case(together, 1.0)}


class Clock(pl.Callback):
    """The seconds from one batch to the next."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        self.times.append(self.bench.now())


def step_seconds(
    bench: Bench, network: Network, callbacks: Callable[[], list[pl.Callback]] = list, hand: ByHand | None = None
) -> float:
    """Returns the median of the steps of a fit."""
    clock, warmup, n, x = Clock(bench), WARMUP, network.steps, network.x
    if bench.quick:
        warmup, n, x = 1, 2, x[:8]
    batch = [x, torch.randint(10, (len(x),))]
    trainer = make_trainer(bench.device, [clock, *callbacks()], max_epochs=1)
    trainer.fit(Classifier(network.make(), hand, network.pattern), DataLoader([batch] * (warmup + n), batch_size=None))  # type: ignore[arg-type]
    return statistics.median(after - before for before, after in pairwise(clock.times[warmup:]))


def tables(bench: Bench) -> Iterator[Table]:
    images = torch.rand(32 if bench.on_cpu else 128, 3, 32, 32)
    yield of_network(
        bench, "a perceptron, 64 rows of 32 numbers", Network(perceptron, torch.rand(64, 32), "net.1", 60), INPUTS | INSIDE
    )
    yield of_network(
        bench,
        f"ResNet-20, {len(images)} images of 3 x 32 x 32",
        Network(resnet_20, images, "net.1.*.out", 12),
        INPUTS | IMAGES | INSIDE,
    )
    yield of_network(
        bench,
        "a transformer of 2 layers, 32 rows of 64 tokens",
        Network(transformer, torch.randint(1000, (32, 64)), "net.1.layers.?", 24),
        TOKENS | INSIDE,
    )


def of_network(bench: Bench, name: str, network: Network, cases: dict[str, Case]) -> Table:
    timers: dict[str, Callable[[], float]] = {"none": partial(step_seconds, bench, network)}
    cases = cases | TOGETHER
    for kind, case in cases.items():
        for side, level in {"level 0": 0.0, "noise": case.level}.items():
            timers[f"{kind} {side}"] = partial(step_seconds, bench, network, partial(case.callbacks, level, network.pattern))
        if case.hand is not None:
            timers[f"{kind} by hand"] = partial(step_seconds, bench, network, hand=case.hand)
    times = bench.take_turns(timers, rounds=5)
    found = {side: spread(values, ".3f") for side, values in ratios(times).items()}
    milliseconds = {side: 1e3 * statistics.median(values) for side, values in times.items()}
    table = Table(
        f"Steps of {name}",
        f"1 is a step without callbacks, {milliseconds['none']:.3g} ms from batch to batch. The last column is by how many "
        "milliseconds a step with noise is longer.",
        ["callback", "level 0", "with noise", "by hand", "added, ms"],
    )
    for kind in cases:
        added = milliseconds[f"{kind} noise"] - milliseconds["none"]
        cells = [found.get(f"{kind} {side}", "") for side in ("level 0", "noise", "by hand")]
        table.rows.append([f"`{kind}`" if kind not in TOGETHER else kind, *cells, f"{added:+.2f}"])
    return table
