"""Noise in every place at once keeps the laws that each keeps alone."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Rows, assert_same, fit, loader, make_trainer, weights
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_noise import (
    ActivationNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
)
from lightning_noise.schedules import Level
from lightning_noise.testing import global_streams


def everything(level: Level) -> list[pl.Callback]:
    return [
        InputNoise(noise.Gaussian(), level),
        TargetNoise(labels.FlipLabels(N_CLASSES), level),
        Mixup(level),
        LabelSmoothing(level),
        WeightNoise(noise.Gaussian(), level, relative="std", gradient="reparametrized"),
        WeightNoise(noise.DropConnect(), level, gradient="reparametrized", name="drop"),
        ActivationNoise(noise.Speckle(), level, ["net.1", "net.4"]),
        GradientNoise(noise.Gaussian(), level),
    ]


def monitors() -> list[pl.Callback]:
    return [
        RobustnessMonitor(
            {
                "image": noise.Gaussian(),
                "weights": WeightNoise(noise.Speckle(), 0.0, name="probe"),
                "hidden": ActivationNoise(noise.Gaussian(), 0.0, "net.1", name="hidden probe"),
            },
            {"image": [0.1], "weights": [0.1], "hidden": [0.1]},
        )
    ]


class Deterministic(Classifier):
    """Without dropout, so that a resumed run draws what the uninterrupted one does."""

    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.net[3] = nn.BatchNorm1d(8)


class Manual(Deterministic):
    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class LBFGS(Deterministic):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=3)


RAMP = schedules.Linear(0.1, 0.5)
RUNS = {
    "automatic": (Deterministic, {}),
    "manual": (Manual, {}),
    "LBFGS": (LBFGS, {}),
    "accumulation": (Deterministic, {"accumulate_grad_batches": 2}),
    "clipping": (Deterministic, {"gradient_clip_val": 0.1}),
    "bf16-mixed": (Deterministic, {"precision": "bf16-mixed"}),
    "bf16-true": (Deterministic, {"precision": "bf16-true"}),
}
SLOW = ("clipping", "bf16-true")
every_run = pytest.mark.parametrize(
    ("module", "settings"),
    [pytest.param(*run, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, run in RUNS.items()],
)


@every_run
def test_level_0_is_bitwise_the_run_without(module, settings):
    without, _ = fit(module=module, **settings)
    streams = global_streams()
    with_, _ = fit([*everything(0.0), *monitors()], module=module, **settings)
    assert_same(weights(with_), weights(without))
    assert global_streams() == streams


@every_run
def test_two_runs_are_equal_and_the_monitor_changes_nothing(module, settings):
    one, _ = fit([*everything(RAMP), *monitors()], module=module, **settings)
    two, _ = fit(everything(RAMP), module=module, **settings)
    assert_same(weights(one), weights(two))


def test_scaled_gradients_go_with_noise_everywhere():
    module, _ = fit(everything(RAMP), module=Deterministic, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert all(w.isfinite().all() for w in weights(module))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves no checkpoints of its own
@pytest.mark.parametrize("module", [Deterministic, Manual])
def test_a_resumed_run_equals_the_uninterrupted_one(module, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole, _ = fit([*everything(RAMP), saver], module=module, train=loader(), max_epochs=4, enable_checkpointing=True)
    for epoch in range(3):
        checkpoint = str(tmp_path / f"epoch={epoch}.ckpt")
        resumed, _ = fit(everything(RAMP), module=module, train=loader(), max_epochs=4, ckpt_path=checkpoint)
        assert_same(weights(resumed), weights(whole))


class Breaking(Deterministic):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(self._break)
        return loss

    def _break(self, gradient: Tensor) -> None:
        raise RuntimeError("stop")


def test_an_exception_leaves_nothing_behind():
    pl.seed_everything(0, verbose=False)
    module = Breaking()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = make_trainer([*everything(0.5), *monitors()])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, loader(), loader(Rows(13, seed=1)))
    assert_same([p.detach() for p in module.parameters()], before)
    assert "training_step" not in vars(trainer.strategy)
    assert not module._state_dict_hooks
    assert not any(child._forward_hooks for child in module.modules())
    assert not any(p._backward_hooks for p in module.parameters())


def test_the_order_of_the_list_is_that_of_the_noise():
    def used(*callbacks: pl.Callback) -> Tensor:
        seen: list[Tensor] = []

        class Looking(Deterministic):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(next(self.parameters()).detach().clone())
                return super().forward(x)

        fit(callbacks, module=lambda: Looking(lr=0.0), limit_val_batches=0, limit_train_batches=1, max_epochs=1)
        return seen[-1]

    def added() -> WeightNoise:
        return WeightNoise(noise.Gaussian(), 0.5, name="added")

    def tripled() -> WeightNoise:
        return WeightNoise(lambda w, level, *, generator: 3 * w, 0.5, name="tripled")

    assert torch.equal(used(added(), tripled()), 3 * used(added()))
    # of numbers of the order of one, each rounded in its own order
    torch.testing.assert_close(used(tripled(), added()), used(added()) + 2 * used(), rtol=0, atol=1e-6)
