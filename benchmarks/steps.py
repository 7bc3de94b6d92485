"""Training steps with each callback at level 0 and above, and with the same noise written into the step by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.models import (
    ByHand,
    Callbacks,
    Classifier,
    fit,
    perceptron,
    perturb_weights,
    resnet_20,
    restore_weights,
    transformer,
)
from benchmarks.tables import Table
from benchmarks.timing import Bench, number, ratios, spread
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

WARMUP, TOGETHER = 2, "five callbacks together"
GAUSSIAN = noise.Gaussian()


class Network(NamedTuple):
    """A network, a batch of inputs, the modules of its activation noise, and the steps of a fit."""

    make: Callable[[], nn.Module]
    x: Tensor
    pattern: str
    steps: int


class Case(NamedTuple):
    """Callbacks at a level for the modules of a pattern, the level, and the same by hand."""

    callbacks: Callable[[float, str], list[Any]]
    level: float
    hand: ByHand | None = None


def flipped(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), torch.where(torch.rand(y.shape, device=y.device) < 0.1, torch.randint_like(y, 10), y))


def mixed(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    lam, partners = random.betavariate(1, 1), torch.randperm(len(x)).to(x.device)
    return _of_both(module(lam * x + (1 - lam) * x[partners]), y, y[partners], lam)


def cut(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    lam, partners = random.betavariate(1, 1), torch.randperm(len(x)).to(x.device)
    height, width = (int((1 - lam) ** 0.5 * n) for n in x.shape[-2:])
    top, left = random.randint(0, x.shape[-2] - height), random.randint(0, x.shape[-1] - width)
    box, x = (..., slice(top, top + height), slice(left, left + width)), x.clone()
    x[box] = x[partners][box]
    return _of_both(module(x), y, y[partners], 1 - height * width / x[0, 0].numel())


def _of_both(logits: Tensor, y: Tensor, other: Tensor, lam: float) -> Tensor:
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, other)


def swapped(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    other = x.gather(0, torch.randint_like(x, len(x)))
    return F.cross_entropy(module(torch.where(torch.rand(x.shape, device=x.device) < 0.1, other, x)), y)


def embedded(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    embedding, *rest = module.net.children()
    e = embedding(x)
    return F.cross_entropy(nn.Sequential(*rest)(e + 5.0 / e[0].numel() ** 0.5 * (2 * torch.rand_like(e) - 1)), y)


def of_weights(level: float, relative: bool) -> ByHand:
    def loss(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
        module.clean = perturb_weights(module, level, relative)
        return F.cross_entropy(module(x), y)

    return ByHand(loss, after_backward=lambda module: restore_weights(module.clean))


def reparametrized(module: Classifier, x: Tensor, y: Tensor) -> Tensor:
    noisy = {k: w + 0.1 * w.std() * torch.randn_like(w) if w.ndim > 1 else w for k, w in module.net.named_parameters()}
    return F.cross_entropy(functional_call(module.net, noisy, x), y)


def perturb_gradients(module: Classifier) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.001)


BY_HAND = {
    "gaussian": ByHand(lambda module, x, y: F.cross_entropy(module(x + 0.1 * torch.randn_like(x)), y)),
    "smoothed": ByHand(lambda module, x, y: F.cross_entropy(module(x), y, label_smoothing=0.1)),
    "activation": ByHand(activation=lambda output: output + 0.1 * torch.randn_like(output)),
}
FLOATS = {
    "InputNoise(Gaussian())": Case(lambda a, _: [InputNoise(GAUSSIAN, a)], 0.1, BY_HAND["gaussian"]),
    "Mixup": Case(lambda a, _: [Mixup(a)], 1.0, ByHand(mixed)),
}
IMAGES = {"CutMix": Case(lambda a, _: [CutMix(a)], 1.0, ByHand(cut))}
TOKENS = {
    "InputNoise(SwapNoise())": Case(lambda a, _: [InputNoise(noise.SwapNoise(), a)], 0.1, ByHand(swapped)),
    "EmbeddingNoise": Case(lambda a, _: [EmbeddingNoise(a)], 5.0, ByHand(embedded)),
}
ANY = {
    "LabelSmoothing": Case(lambda a, _: [LabelSmoothing(a)], 0.1, BY_HAND["smoothed"]),
    "TargetNoise(FlipLabels)": Case(lambda a, _: [TargetNoise(labels.FlipLabels(10), a)], 0.1, ByHand(flipped)),
    "WeightNoise(Gaussian())": Case(lambda a, _: [WeightNoise(GAUSSIAN, a)], 0.01, of_weights(0.01, False)),
    "WeightNoise, relative": Case(lambda a, _: [WeightNoise(GAUSSIAN, a, relative="std")], 0.1, of_weights(0.1, True)),
    "WeightNoise, reparametrized": Case(
        lambda a, _: [WeightNoise(GAUSSIAN, a, relative="std", gradient="reparametrized")], 0.1, ByHand(reparametrized)
    ),
    "GradientNoise(Gaussian())": Case(
        lambda a, _: [GradientNoise(GAUSSIAN, a)], 0.001, ByHand(after_backward=perturb_gradients)
    ),
    "ActivationNoise(Gaussian())": Case(lambda a, modules: [ActivationNoise(GAUSSIAN, a, modules)], 0.1, BY_HAND["activation"]),
}


def together(cases: dict[str, Case]) -> Case:
    """A callback in each place: inputs, labels, weights, activations and gradients."""
    chosen = [next(iter(cases)), "LabelSmoothing", *(each for each in ANY if each.endswith("Noise(Gaussian())"))]
    return Case(lambda a, modules: [c for each in chosen for c in cases[each].callbacks(a * cases[each].level, modules)], 1.0)


def step_seconds(bench: Bench, network: Network, callbacks: Callbacks = list, hand: ByHand | None = None) -> float:
    """Returns the median of the steps of a fit, from batch to batch."""
    times: list[float] = []
    clock = LambdaCallback(on_train_batch_start=lambda *_: times.append(bench.now()))
    warmup, n, x = (1, 2, network.x[:8]) if bench.quick else (WARMUP, network.steps, network.x)
    batches, module = [[x, torch.randint(10, (len(x),))]] * (warmup + n), Classifier(network.make(), hand, network.pattern)
    fit(bench.device, module, batches, [clock, *callbacks()], limit_val_batches=0)
    return median(after - before for before, after in pairwise(times[warmup:]))


def tables(bench: Bench) -> Iterator[Table]:
    images, rows, tokens = torch.rand(32 if bench.on_cpu else 128, 3, 32, 32), torch.rand(64, 32), torch.randint(1000, (32, 64))
    small = Network(perceptron, rows, "net.1", 60)
    yield of_network(bench, "a perceptron, 64 rows of 32 numbers", small, FLOATS | ANY)
    resnet = Network(resnet_20, images, "net.1.*.out", 5)
    yield of_network(bench, f"ResNet-20, {len(images)} images of 3 x 32 x 32", resnet, FLOATS | IMAGES | ANY)
    text = Network(transformer, tokens, "net.1.layers.?", 8)
    yield of_network(bench, "a transformer of 2 layers, 32 rows of 64 tokens", text, TOKENS | ANY)


def of_network(bench: Bench, name: str, network: Network, cases: dict[str, Case]) -> Table:
    table = Table(
        f"Steps of {name}",
        "1 is a step without callbacks, from batch to batch.",
        ["callback", "level 0", "with noise", "by hand", "without, ms"],
    )
    for kind, case in (cases | {TOGETHER: together(cases)}).items():
        timers: dict[str, Callable[[], float]] = {"none": partial(step_seconds, bench, network)}
        for side, level in {"level 0": 0.0, "noise": case.level}.items():
            timers[side] = partial(step_seconds, bench, network, partial(case.callbacks, level, network.pattern))
        if case.hand is not None:
            timers["by hand"] = partial(step_seconds, bench, network, hand=case.hand)
        times = bench.take_turns(timers, rounds=5)
        found = {side: spread(values, ".3f") for side, values in ratios(times).items()}
        cells = [found.get(side, "") for side in ("level 0", "noise", "by hand")]
        table.rows.append([kind if kind == TOGETHER else f"`{kind}`", *cells, number(1e3 * median(times["none"]))])
    return table
