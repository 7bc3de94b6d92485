"""What is wrong with a monitor is said before the first training step, and looking for it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Quiet, Rows, Stochastic, fit, keys_of, loader, weights
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, metrics, noise, schedules, tasks
from lightning_noise.testing import global_streams

MONITORS: dict[str, Callable[..., pl.Callback]] = {
    "monitor": lambda **kwargs: RobustnessMonitor(noise.Gaussian(), [0.1], **kwargs),
    "adaptive level": lambda **kwargs: InputNoise(noise.Gaussian(), AdaptiveLevel(**kwargs)),
}
every_monitor = pytest.mark.parametrize("make", MONITORS.values(), ids=MONITORS)


class Squashed(Classifier):
    def forward(self, x):
        return super().forward(x).softmax(1)


class WithoutForward(pl.LightningModule):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        raise AssertionError("a training step came first")

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


class TakesAll(Classifier):
    def forward(self, x):
        images, _ = x
        return super().forward(images[0])

    def training_step(self, batch, batch_idx):
        raise AssertionError("a training step came first")


class Never(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise AssertionError("a training step came first")


@every_monitor
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Classifier, {"target": 0}, r"the leaves of the batch are '0' float32 \(8, 8\), '1' int64 \(8,\)"),
        (Classifier, {"target": "y"}, r"no leaf 'y' in the batch"),
        (Classifier, {"inputs": 1}, "int64"),
        (Squashed, {}, r"returned probabilities.*type task=tasks\.Multiclass\(probabilities=True\)"),
        (WithoutForward, {}, "the module has no forward"),
        (TakesAll, {}, r"module\(batch\[0\]\) of float32 \(8, 8\) raised .*type predict=lambda module, batch: .*ReplayMonitor"),
    ],
)
def test_what_the_module_or_the_batch_refute_is_said_before_the_first_step(make, sanity, module, arguments, message):
    data = loader(Rows(16))
    with pytest.raises((TypeError, ValueError), match=message):
        fit([make(**arguments), Never()], module=module, train=data, validation=data, num_sanity_val_steps=sanity)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            MulticlassAccuracy(N_CLASSES + 1),
            r"MulticlassAccuracy raised .* returned float32 \(8, 3\), and the target is int64 ",
        ),
        (MulticlassConfusionMatrix(N_CLASSES), "'MulticlassConfusionMatrix' is tensor"),
        (metrics.Perplexity(), r"'Perplexity' has the values \['loss', 'perplexity'\]"),
    ],
    ids=["classes", "matrix", "several values"],
)
def test_metrics_of_ones_own_are_tried_before_the_first_step(sanity, metric, message):
    with pytest.raises(ValueError, match=message):
        fit([MONITORS["monitor"](task=tasks.Custom(metric)), Never()], num_sanity_val_steps=sanity)


@every_monitor
@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("validation", [[], loader(Rows(0))], ids=["no loader", "no rows"])
def test_a_validation_without_batches_is_refused(make, sanity, validation):
    with pytest.raises(ValueError, match="needs held-out data, but the validation has no batch"):
        fit([make(), Never()], validation=validation, num_sanity_val_steps=sanity)


def test_without_a_sanity_check_a_validation_that_comes_late_is_tried_too():
    with pytest.raises(ValueError, match="no leaf 'y'"):
        fit([MONITORS["monitor"](target="y"), Never()], num_sanity_val_steps=0, check_val_every_n_epoch=2)
    with pytest.raises(ValueError, match="saw no batch of dataloader_idx=1"):
        fit([MONITORS["monitor"](dataloader_idx=1), Never()], num_sanity_val_steps=0)


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_replay_monitor_says_so_too(sanity):
    with pytest.raises(ValueError, match="no leaf 'x' in the batch"):
        fit([ReplayMonitor(noise.Gaussian(), [0.1], inputs="x"), Never()], num_sanity_val_steps=sanity)


# --- the trial changes nothing


class Drawing(Rows):
    """Draws from generators of its own and from the global streams."""

    def __init__(self):
        super().__init__(13, seed=1)
        self.rng, self.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + float(self.rng.random()) + torch.rand(()) + torch.rand((), generator=self.generator), y


class Hooked(Stochastic):
    """Keeps state in a transfer hook, and counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.transfers, self.passes, self.stages = 0, 0, []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.transfers += 1
        self.stages.append(str(self.trainer.state.stage))
        return batch

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("kwargs", [{}, {"shuffle": True}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_a_trial_changes_nothing_in_the_run(kwargs):
    found = []
    ours = [MONITORS["monitor"](max_batches=1), ReplayMonitor(noise.Gaussian(), [0.1], every_n_epochs=2)]
    for callbacks in ([], ours):
        generator = torch.Generator().manual_seed(3)
        validation = loader(Drawing(), generator=generator, **kwargs)
        module, trainer = fit(callbacks, module=Hooked, validation=validation, num_sanity_val_steps=0)
        own = {key: value for key, value in keys_of(trainer).items() if not key.startswith(("robustness", "replay"))}
        found.append([own, module.transfers, module.stages, generator.get_state().tolist(), global_streams()])
        found[-1].append([weight.tolist() for weight in weights(module)])
    assert found[0] == found[1]


class Counting:
    def __init__(self):
        self.n = 0

    def __call__(self, x):
        self.n += 1
        return self.n * x


class Remembering(Rows):
    """Counts its accesses, in attributes, in a list and in a transform."""

    def __init__(self):
        super().__init__(13, seed=1)
        self.n, self.read, self.transforms = 0, [], [Counting()]

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        self.n += 1
        self.read.append(i)
        return self.transforms[0](x) + self.n, y


class Epochs(Sampler):
    """Has another order in each epoch, which it counts itself."""

    epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(13, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self):
        return 13


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: ConcatDataset([data])], ids=["data", "concatenated"])
def test_a_trial_undoes_what_samplers_and_data_sets_remember(wrap):
    found = []
    for callbacks in ([], [MONITORS["monitor"]()]):
        data, sampler = Remembering(), Epochs()
        fit(callbacks, module=Stochastic, validation=loader(wrap(data), sampler=sampler), num_sanity_val_steps=0)
        found.append((data.n, data.read, data.transforms[0].n, sampler.epoch))
    assert found[0] == found[1]
    assert found[0][0] > 0


class Stream(IterableDataset):
    """Can be read once."""

    def __init__(self):
        self.rows, self.read = iter([Rows()[i] for i in range(24)] * 2), 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_a_stream_is_not_read_before_its_validation():
    stream, read = Stream(), []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            read.append(stream.read)

    validation = loader(stream)
    fit([MONITORS["monitor"](), Watch()], validation=validation, num_sanity_val_steps=0, limit_val_batches=2, max_epochs=1)
    assert read == [0]


def test_a_batch_that_cannot_be_fetched_yet_is_left_to_the_validation():
    class Late(Rows):
        def __getitem__(self, i):
            if not opened:
                raise RuntimeError("not opened yet")
            return super().__getitem__(i)

    class Opens(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            opened.append(True)

    opened: list[bool] = []
    monitor = MONITORS["monitor"]()
    _, trainer = fit([Opens(), monitor], validation=loader(Late(13)), num_sanity_val_steps=0, max_epochs=1)
    assert "robustness/score" in trainer.callback_metrics


# --- keys that others follow


def checkpoint(key: str) -> ModelCheckpoint:
    return ModelCheckpoint(monitor=key, mode="max")


class Scheduled(Classifier):
    key = "robustness/loss_clen"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.key}}


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("callbacks", "module", "nearest"),
    [
        ([checkpoint("robustness/gaussian/0.1/acuracy")], Classifier, "robustness_levels/gaussian/0.1/accuracy"),
        ([EarlyStopping("robustness/accuracy_nosy")], Classifier, "robustness/accuracy_noisy"),
        ([EarlyStopping("robustness_levels/gaussian/0.2/loss")], Classifier, "robustness_levels/gaussian/0.1/loss"),
        ([], Scheduled, "robustness/loss_clean"),
        ([checkpoint("replay/gausian/0.1/val_loss")], Classifier, "replay/gaussian/0.1/val_loss"),
        ([checkpoint("train_noise/input/retenion")], Classifier, "train_noise/input/retention"),
    ],
)
def test_a_key_that_will_not_be_logged_is_refused_with_the_nearest(tmp_path, callbacks, module, nearest, sanity):
    ours = [make() for make in MONITORS.values()] + [ReplayMonitor(noise.Gaussian(), [0.1])]
    settings: Any = {"num_sanity_val_steps": sanity, "default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(ValueError, match=f"follows '.*', which is not logged; type monitor='{nearest}'"):
        fit([*ours, *callbacks, Never()], module=module, **settings)


def test_the_level_of_a_schedule_can_be_followed_and_what_only_loggers_receive_cannot():
    callback = InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.6))
    _, trainer = fit([callback, EarlyStopping("train_noise/input/level", mode="max")])
    assert trainer.callback_metrics["train_noise/input/level"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"follows 'train_noise/input/snr_db', .*type monitor='train_noise/input/level'"):
        fit([callback, EarlyStopping("train_noise/input/snr_db"), Never()])


EVERY_TASK = [
    tasks.Multiclass(),
    tasks.Multiclass(probabilities=True),
    tasks.Binary(),
    tasks.Multilabel(),
    tasks.Regression(),
    None,
]


@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_the_keys_are_known_before_the_first_step(task):
    """The score among them, for every task."""
    task = tasks.Custom(MulticlassAccuracy(N_CLASSES)) if task is None else task
    monitor = RobustnessMonitor([noise.Gaussian(), noise.Uniform()], [0.1, 0.2], task=task, predict=_predictions_of(task))
    data = loader(TensorDataset(torch.randn(24, 8), _target_of(task)))
    _, trainer = fit([monitor], validation=data, module=Quiet, max_epochs=1)
    known = monitor.logged_keys()
    logged = {key for key in keys_of(trainer) if key.startswith("robustness")}
    assert logged == {key for keys in known.values() for key in keys}
    assert "robustness/score" in logged


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("task", EVERY_TASK, ids=repr)
def test_the_checkpoint_of_the_best_score_is_kept_for_every_task(task, every, tmp_path):
    task = tasks.Custom(MulticlassAccuracy(N_CLASSES)) if task is None else task
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=task, predict=_predictions_of(task), every_n_epochs=every)
    keep = ModelCheckpoint(tmp_path, monitor="robustness/score", mode="max", every_n_epochs=every)
    scores: list[float] = []

    class Watch(Quiet):
        def on_train_epoch_end(self):
            if (self.current_epoch + 1) % every == 0:
                scores.append(self.trainer.callback_metrics["robustness/score"].item())

    data = loader(TensorDataset(torch.randn(24, 8), _target_of(task)))
    fit([monitor, keep], validation=data, module=Watch, max_epochs=4, enable_checkpointing=True)
    assert len(scores) == 4 // every
    assert keep.best_model_score is not None
    assert keep.best_model_score.item() == max(scores)
    assert Path(keep.best_model_path).exists()


def _target_of(task: tasks.Task) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(task, tasks.Regression):
        return torch.randn(24, generator=generator)
    if isinstance(task, tasks.Multilabel):
        return torch.randint(0, 2, (24, N_CLASSES), generator=generator)
    return torch.randint(0, 2 if isinstance(task, tasks.Binary) else N_CLASSES, (24,), generator=generator)


def _predictions_of(task: tasks.Task) -> Any:
    if isinstance(task, tasks.Multiclass) and task.probabilities:
        return lambda module, batch: module(batch[0]).softmax(1)
    return lambda module, batch: (
        module(batch[0]) if isinstance(task, tasks.Multiclass | tasks.Multilabel | tasks.Custom) else module(batch[0])[:, 0]
    )


def test_a_key_that_comes_later_is_not_refused(tmp_path):
    monitor = RobustnessMonitor(noise.Gaussian(), [0.1], every_n_epochs=2)
    stopping = EarlyStopping("robustness/score", mode="max", strict=False)
    keep = ModelCheckpoint(tmp_path, monitor="robustness/score", mode="max", every_n_epochs=2)
    _, trainer = fit([monitor, stopping, keep], max_epochs=2, enable_checkpointing=True)
    assert keep.best_model_score == trainer.callback_metrics["robustness/score"]


def test_keys_of_the_user_are_followed_whatever_their_names():
    class Own(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("train_noise/own", 1.0)
            self.log("val/score", 1.0)

    callbacks = [InputNoise(noise.Gaussian(), 0.1), EarlyStopping("train_noise/own"), EarlyStopping("val/score")]
    _, trainer = fit([*callbacks, RobustnessMonitor(noise.Gaussian(), [0.1])], module=Own)
    assert trainer.current_epoch == 2
