"""A forward pass that changes its module in evaluation runs under a monitor as if it had not run."""

from __future__ import annotations

import io
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import N_CLASSES, N_FEATURES, Classifier, Rows, assert_same, fit, keys_of, loader, make_trainer, weights
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAUROC

from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, noise, suggest_level
from lightning_noise.rules import Governor


class Meter:
    def __init__(self):
        self.n = 0
        self.seen: list[float] = []


@dataclass(slots=True)
class Tally:
    n: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2))


class Observing(Classifier):
    """Writes in its forward pass to everything that a module can hold, to its input, and to the log."""

    smallest: Tensor
    memory: Tensor
    mean: Any
    auroc: Any

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Identity()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("smallest", torch.empty(0))  # torch.ao resizes its observers, too
        self.register_buffer("memory", torch.zeros(600, 600))  # more than a megabyte
        self.running = torch.zeros(())
        self.calls = 0
        self.queue: deque[float] = deque(maxlen=3)
        self.cache: OrderedDict[str, Any] = OrderedDict()
        self.meter = Meter()
        self.tally = Tally()
        self.counts = np.zeros(2)
        self.generator = torch.Generator().manual_seed(3)
        self.mean, self.auroc = MeanMetric(), MulticlassAUROC(N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.log("smallest_input", x.min())
        x.sub_(0.1)
        self.norm.train()  # statistics that are collected in evaluation, by a kernel that does not count its writes
        x = self.norm(x.flatten(1))
        seen = x.detach()
        self.smallest.resize_(8).copy_(seen.amin(0) if self.calls == 0 else seen.amin(0).minimum(self.smallest))
        self.memory[self.calls % 600] += seen.mean()
        self.running += seen.mean()
        self.calls += 1
        self.queue.append(float(seen.mean()))
        self.cache[str(self.calls)] = seen
        self.meter.n, self.meter.seen = self.meter.n + 1, [*self.meter.seen, float(seen.max())]
        self.counts[0] += 1
        self.tally.n += 1
        self.tally.total += seen.mean()
        self.tally.counts[0] += 1
        scores = self.net(x + 0.1 * torch.rand((), generator=self.generator))
        self.mean.update(scores.detach())
        self.auroc.update(scores.detach().softmax(1), torch.arange(len(x)) % N_CLASSES)
        return scores * (1 + 0.01 * self.calls + 0.01 * self.tally.n + self.smallest.mean().clone() + self.memory.mean())

    def state(self) -> list[Any]:
        held = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        del held["prepare_data_per_node"], held["meter"], held["generator"]
        written = io.BytesIO()
        torch.save([held, vars(self.meter), list(self.queue), self.auroc.metric_state, self.generator.get_state()], written)
        return [*weights(self), torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)]


CALLBACKS = {
    "RobustnessMonitor": lambda: RobustnessMonitor([noise.Gaussian()], [0.5, 1.0]),
    "RobustnessMonitor, predict": lambda: RobustnessMonitor(noise.Gaussian(), [1.0], predict=lambda module, b: module(b[0])),
    "ReplayMonitor": lambda: ReplayMonitor([noise.Gaussian()], [0.5]),
    "AdaptiveLevel": lambda: InputNoise(noise.Gaussian(), AdaptiveLevel(Governor(warmup=99))),
}


@pytest.mark.parametrize("settings", [{}, {"inference_mode": False}], ids=str)
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_a_monitor_does_not_change_a_run_whose_forward_pass_changes_the_module(make, settings):
    (one, two), (with_it, without) = zip(
        *(fit(c, module=Observing, max_epochs=1, limit_train_batches=1, **settings) for c in ([make()], [])), strict=True
    )
    assert_same(one.state(), two.state())
    found, expected = keys_of(with_it), keys_of(without)
    assert {key: found[key] for key in expected} == expected


class Graph(Classifier):
    """Holds the edges of its features in a sparse buffer."""

    edges: Tensor

    def __init__(self, layout: torch.layout):
        super().__init__()
        self.register_buffer("edges", torch.eye(N_FEATURES).to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((self.edges @ x.T).T)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_a_module_may_hold_sparse_tensors(make, layout):
    module, _ = fit([make()], module=lambda: Graph(layout), max_epochs=1)
    assert torch.equal(module.edges.to_dense(), torch.eye(N_FEATURES))


def nothing(x: Tensor, level: Any, *, generator: torch.Generator) -> Tensor:
    return x.clone()


@pytest.mark.filterwarnings("ignore:no prediction of the first batch has changed")
def test_each_condition_begins_with_the_same_module():
    monitor = RobustnessMonitor(nothing, [0.1, 0.2], logged=["loss"])
    _, trainer = fit([monitor], module=Observing, max_epochs=1)
    found = keys_of(trainer)
    losses = {found[f"robustness_levels/nothing/{level}/loss"] for level in (0.1, 0.2)} | {found["robustness/loss_clean"]}
    assert len(losses) == 1


@pytest.mark.filterwarnings("ignore:no level is suggested", "ignore:no prediction of the first batch has changed")
def test_a_range_test_leaves_the_module_and_meets_the_same_module_at_each_level():
    module, _ = fit([], module=Observing, max_epochs=1)
    before = module.state()
    found = suggest_level(make_trainer(), module, nothing, levels=[0.1, 0.2], flip_rate=0.1, dataloaders=loader(Rows(13)))
    assert set(found.curve.values()) == {0.0}
    assert_same(module.state(), before)
