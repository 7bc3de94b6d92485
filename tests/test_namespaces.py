"""The callbacks work in the trainers of `pytorch_lightning` and of `lightning.pytorch`, and do the same in both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, N_FEATURES, Rows, assert_same, loader, weights
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import (
    ActivationNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    ReplayMonitor,
    RobustnessMonitor,
    WeightNoise,
    noise,
    schedules,
    suggest_level,
    tasks,
)

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


@pytest.fixture(params=NAMESPACES)
def pl(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(request.param)


@pytest.fixture
def both() -> list[ModuleType]:
    return [pytest.importorskip(name) for name in NAMESPACES]


def classifier(pl: Any) -> Any:
    """A module of one Lightning: the other's trainer refuses it."""

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(N_FEATURES, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, N_CLASSES))
            self.seen: list[torch.Tensor] = []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0])
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Classifier()


def fit(pl: Any, callbacks: Any, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[Any, Any]:
    pl.seed_everything(0, verbose=False)
    module = classifier(pl)
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **kwargs}
    silent = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **silent, **settings)
    trainer.fit(module, loader(), loader(Rows(13, seed=1)), ckpt_path=ckpt_path)
    return module, trainer


def noisy() -> InputNoise:
    return InputNoise(noise.Gaussian(), schedules.Linear(0.1, 1.0))


def watching() -> RobustnessMonitor:
    return RobustnessMonitor([noise.Gaussian(), noise.Impulse()], {"gaussian": [0.2, 0.5], "impulse": [0.2, 0.5]})


def reporting() -> list[Any]:
    """A monitor with all that it measures, one with metrics of the user, and a replay."""
    probes, levels = [noise.Gaussian(), WeightNoise(noise.Gaussian(), 0.0)], {"gaussian": [0.2], "weight": [0.2]}
    own = MetricCollection({"hits": MulticlassAccuracy(N_CLASSES, average="micro")})
    return [
        RobustnessMonitor(probes, levels, n_draws=2),
        RobustnessMonitor(probes, levels, task=tasks.Custom(own), n_draws=2, name="own"),
        ReplayMonitor(probes, levels),
    ]


def test_weights_levels_and_measurements_are_bitwise_those_of_the_other_namespace(both, tmp_path):
    fits, logged = [], []
    for i, pl in enumerate(both):
        logger = pl.loggers.CSVLogger(tmp_path / str(i))
        fits.append(fit(pl, [noisy(), *reporting()], logger=logger, log_every_n_steps=1))
        files = ("metrics.csv", "robustness/report.json", "robustness/report.md", "own/report.json")
        logged.append([(Path(logger.log_dir) / file).read_text() for file in files])
    (one, one_trainer), (two, two_trainer) = fits
    assert_same(weights(one), weights(two))
    assert logged[0] == logged[1]
    for tag in ("train_noise/input/level", "train_noise/input/snr_db", "replay/weight/0.2/val_loss", "robustness/score"):
        assert tag in logged[0][0]
    measured = {key: value.item() for key, value in one_trainer.callback_metrics.items()}
    again = {key: value.item() for key, value in two_trainer.callback_metrics.items()}
    assert measured == pytest.approx(again, rel=0, abs=0, nan_ok=True)  # NaN retention of a model not above chance
    assert {"robustness_levels/gaussian/0.2/loss", "own_levels/weight/0.2/hits"} <= measured.keys()
    assert not torch.equal(weights(one)[0], weights(fit(both[0], [])[0])[0]), "the noise is in both"


def test_noise_everywhere_is_bitwise_that_of_the_other_namespace(both):
    def everywhere() -> list[Any]:
        return [
            noisy(),
            LabelSmoothing(0.1),
            WeightNoise(noise.Speckle(), 0.3, gradient="reparametrized"),
            ActivationNoise(noise.Gaussian(), 0.3, "net.*"),
            GradientNoise(noise.Gaussian()),
        ]

    one, two = (fit(pl, everywhere())[0] for pl in both)
    assert_same(weights(one), weights(two))


def test_a_suggested_level_is_that_of_the_other_namespace(both):
    found = []
    for pl in both:
        module, trainer = fit(pl, [noisy()])
        held = [dict(vars(part)) for part in (trainer, trainer.state, trainer.validate_loop, trainer.strategy, module)]
        found.append(suggest_level(trainer, module, noise.Gaussian(), flip_rate=0.1))
        assert [dict(vars(part)) for part in (trainer, trainer.state, trainer.validate_loop, trainer.strategy, module)] == held
    assert found[0] == found[1]


def test_one_callback_serves_a_trainer_of_each_namespace(both):
    callbacks = [noisy(), watching()]
    one, two, again = (weights(fit(pl, callbacks)[0]) for pl in (*both, both[0]))
    assert_same(one, two)
    assert_same(one, again)


def test_a_callback_is_one_of_each_lightning_that_is_installed(pl):
    for callback in (noisy(), watching(), *reporting()):
        assert isinstance(callback, pl.Callback)


def test_a_single_callback_needs_no_list(pl):
    module, _ = fit(pl, noisy())
    assert not torch.equal(module.seen[0], Rows().x[:8])
    _, trainer = fit(pl, watching())
    assert "robustness/score" in trainer.callback_metrics


def test_callbacks_of_one_class_stand_side_by_side_under_names_of_their_own(pl):
    def double(x, level, *, generator):
        return 2 * x

    def add(x, level, *, generator):
        return x + 1

    callbacks = [InputNoise(double, 1.0, name="double"), InputNoise(add, 1.0, name="add")]
    monitors = [RobustnessMonitor(noise.Gaussian(), [level], name=name) for level, name in ((0.1, "near"), (0.9, "far"))]
    module, trainer = fit(pl, [*callbacks, *monitors])
    assert torch.equal(module.seen[0], 2 * Rows().x[:8] + 1)
    assert {"near_levels/gaussian/0.1/loss", "far_levels/gaussian/0.9/loss"} <= trainer.callback_metrics.keys()
    with pytest.raises(ValueError, match="two noise callbacks are named 'input'"):
        fit(pl, [noisy(), noisy()])
    with pytest.raises(ValueError, match="two monitors are named 'robustness'"):
        fit(pl, [watching(), watching()])


# the resumed run saves no checkpoints of its own
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_follow_the_monitor_and_a_resumed_run_gets_the_noise_of_the_uninterrupted_one(pl, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="robustness/score", save_top_k=-1, filename="{epoch}")
    whole, _ = fit(pl, [noisy(), watching(), saver], max_epochs=3, enable_checkpointing=True)
    assert saver.best_model_score is not None
    assert 0 < saver.best_model_score <= 1
    resumed, _ = fit(pl, [noisy(), watching()], tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert_same(resumed.seen, whole.seen[3:])


def test_nothing_is_left_behind_after_an_exception(pl):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.strategy = trainer.strategy
            raise RuntimeError("stop")

    stop = Stop()
    with pytest.raises(RuntimeError, match="stop"):
        fit(pl, [noisy(), stop])
    assert "training_step" not in vars(stop.strategy)


ALONE = """
import importlib, sys
sys.modules[{missing!r}] = None  # an import of it fails, as where it is not installed
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning_noise import InputNoise, RobustnessMonitor, noise
pl, boring = (importlib.import_module({name!r} + part) for part in ("", ".demos.boring_classes"))

class Module(boring.BoringModel):
    def validation_step(self, batch, batch_idx):
        pass

held_out = DataLoader(TensorDataset(torch.randn(8, 32), torch.randint(2, (8,))), batch_size=4)
callbacks = [InputNoise(noise.Gaussian(), 0.5), RobustnessMonitor(noise.Gaussian(), [0.5])]
trainer = pl.Trainer(fast_dev_run=2, accelerator="cpu", enable_progress_bar=False, callbacks=callbacks)
trainer.fit(Module(), val_dataloaders=held_out)
assert callbacks[0].current_level == 0.5
assert "robustness/score" in trainer.callback_metrics
"""


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(("name", "missing"), [NAMESPACES, NAMESPACES[::-1]])
def test_either_lightning_is_enough(name, missing):
    script = ALONE.format(name=name, missing=missing.split(".")[0])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
