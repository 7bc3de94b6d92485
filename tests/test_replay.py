"""A replay gives the user's own metrics under noise, and nothing else is different for it."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import replayed
import torch
import torch.nn.functional as F
from conftest import N_CLASSES, Classifier, Rows, assert_same, fit, loader, make_trainer, weights
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_processes import execute
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall

from lightning_noise import ActivationNoise, EmbeddingNoise, InputNoise, Key, ReplayMonitor, WeightNoise, noise
from lightning_noise.callbacks.dispatch import EvaluationDispatcher
from lightning_noise.callbacks.isolation import Silent, State
from lightning_noise.testing import global_streams

HELD_OUT = Rows(13, seed=1)
LEVELS = [0.0, 0.6]


class Meter:
    """What many projects have: a mean of their own."""

    def __init__(self):
        self.sum, self.n = 0.0, 0
        self.history: list[float] = []

    def update(self, value: float, n: int) -> None:
        self.sum, self.n = self.sum + value * n, self.n + n
        self.history.append(value)


class Everything(Classifier):
    """Keeps something of its validation in every place that there is, and logs in every way."""

    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.BatchNorm1d(8))
        self.accuracy = MulticlassAccuracy(N_CLASSES, average="micro")
        self.collection = MetricCollection(
            {
                "precision": MulticlassPrecision(N_CLASSES),
                "recall": MulticlassRecall(N_CLASSES),
                "auroc": MulticlassAUROC(N_CLASSES),
            },
            prefix="val_",
        )
        self.by_name = {"accuracy": self.accuracy, "hidden": MeanMetric()}  # an alias, and a metric that is registered nowhere
        self.outputs: list[Tensor] = []
        self.nested = {"a": [0], "b": deque(maxlen=2), "c": {1}, "d": defaultdict(list)}
        self.counts = np.zeros(N_CLASSES)
        self.in_place = torch.zeros(2)
        self.pair = (torch.zeros(2), [0])
        self.generator = torch.Generator().manual_seed(1)
        self.dice = random.Random(1)
        self.register_buffer("n_seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(1))
        self.meter = Meter()
        self.calls: list[str] = []
        self.logger_of_python = logging.getLogger(__name__)
        self.n_steps = 0
        self.means: list[float] = []

    def on_validation_epoch_start(self) -> None:
        self.outputs = [torch.zeros(0)]
        self.meter = Meter()
        self.calls.append("start")

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.calls.append(f"before {batch_idx}")
        self.log("val_before", float(batch_idx))
        torch.rand(())  # which the step must not find drawn twice

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x) + 0.1 * torch.rand(len(x), N_CLASSES) * random.random() * np.random.rand()
        logits = logits + 0.1 * torch.rand(len(x), N_CLASSES, generator=self.generator) * self.dice.random()
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.collection.update(logits, y)
        self.by_name["hidden"].update(loss)
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        self.log("val_max", loss, reduce_fx="max")
        self.log("val_sum", loss, reduce_fx=torch.sum, logger=False)
        self.log("val_own_size", loss, batch_size=3)
        self.log_dict(self.collection)
        self.outputs.append(logits.argmax(1).float())
        self.nested["a"].append(len(x))
        self.nested["b"].append(batch_idx)
        self.nested["c"].add(batch_idx)
        self.nested["d"][batch_idx].append(loss.item())
        self.counts += np.bincount(logits.argmax(1).numpy(), minlength=N_CLASSES)
        self.in_place += logits.detach().sum()
        self.pair[0].add_(1)
        self.pair[1].append(1)
        self.n_seen += len(x)  # type: ignore[operator]
        self.scratch = self.scratch + loss.detach()
        self.meter.update(loss.item(), len(x))
        self.n_steps += 1
        self.temporary = loss
        self.trainer.of_the_user = loss  # type: ignore[attr-defined]
        if self.meter.n > 8:
            self.log("val_late", loss)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("direct", loss, self.n_steps)
            logger.log_metrics({"metrics": loss.item()}, step=self.n_steps)
        x.zero_()  # the batch is the step's own
        return {"loss": loss, "n": len(y)}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.calls.append(f"after {batch_idx}")
        self.log("val_after", outputs["loss"], batch_size=outputs["n"])

    def on_validation_epoch_end(self) -> None:
        mean = torch.cat(self.outputs).mean()
        self.means.append(mean.item())
        self.log("val_mean", mean)
        self.log("val_meter", self.meter.sum / self.meter.n)
        self.log("val_hidden", self.by_name["hidden"].compute())
        self.log("val_read", self.trainer.callback_metrics["val_loss"])
        self.log("val_counts", float(self.counts[0]))
        self.log("val_in_place", self.in_place.sum())
        self.log("val_pair", self.pair[0].sum() + len(self.pair[1]))
        self.log("val_buffers", self.n_seen + self.scratch)  # type: ignore[arg-type, operator]
        self.log("val_drawn", torch.rand(()))
        self.by_name["hidden"].reset()
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


Pair = namedtuple("Pair", ["x", "y"])


def as_dict(samples):
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"data": {"x": x}, "y": y}


def as_namedtuple(samples):
    return Pair(*(torch.stack(column) for column in zip(*samples, strict=True)))


def as_tensor(samples):
    return torch.stack([torch.cat([x, y[None].float()]) for x, y in samples])


def as_tokens(samples):
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"y": y, "ids": (x > 0).long()}


class Readers(Classifier):
    """Takes what it needs out of any of the batches, as modules do that write to the batch."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(self._pair(batch), batch_idx)

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        super().validation_step(self._pair(batch), 0)

    def _pair(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            return batch[:, :-1], batch[:, -1].long().clamp(0, 2)
        if isinstance(batch, dict):
            y = batch.pop("y")
            return (self.words(batch["ids"]).squeeze(-1) if "ids" in batch else batch["data"]["x"]), y
        return batch.x, batch.y


def keys_of(trainer: pl.Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def split(found: dict[str, float], name: str = "replay") -> tuple[dict[str, float], dict[str, float]]:
    """The user's keys, and the monitor's without their prefix."""
    prefix = f"{name}/"
    own = {key: value for key, value in found.items() if not key.startswith(prefix)}
    return own, {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def under(found: dict[str, float], probe: str) -> dict[str, float]:
    return {key.removeprefix(f"{probe}/"): value for key, value in found.items() if key.startswith(f"{probe}/")}


def plain(value: Any) -> Any:
    """What a module holds, to be compared with ``==``."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque | set):
        return [plain(item) for item in value]
    if isinstance(value, Meter):
        return plain(vars(value))
    return value if isinstance(value, int | float | str | None) else type(value)


def held(module: nn.Module) -> dict[str, Any]:
    names = [(name, part) for name, part in module.named_modules()]
    return {name: plain({key: value for key, value in vars(part).items() if key != "_trainer"}) for name, part in names}


def validated(monitor: ReplayMonitor, module: Any = Classifier, validation: Any = None, **kwargs: Any) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    module = module if isinstance(module, pl.LightningModule) else module()
    trainer = make_trainer([monitor], **kwargs)
    trainer.validate(module, loader(HELD_OUT) if validation is None else validation, verbose=False)
    return keys_of(trainer)


# --- it changes nothing


def events(logger: TensorBoardLogger, prefix: str = "replay/") -> dict[str, list[tuple[int, float]]]:
    logger.finalize("success")
    accumulator = EventAccumulator(logger.log_dir).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith(prefix)]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def run(monitors: Sequence[pl.Callback], folder: Path, **kwargs: Any) -> tuple[Any, ...]:
    loggers = [TensorBoardLogger(folder), CSVLogger(folder)]
    train = loader(shuffle=True)
    validation = loader(Rows(13, seed=1), num_workers=0)
    module, trainer = fit(
        monitors, module=Everything, train=train, validation=validation, logger=loggers, log_every_n_steps=1, **kwargs
    )
    return module, trainer, global_streams(), events(loggers[0]), loggers  # type: ignore[arg-type]


def test_everything_of_the_users_is_as_without_it(tmp_path):
    monitors = [
        ReplayMonitor([noise.Gaussian(), noise.Impulse()], LEVELS),
        ReplayMonitor(WeightNoise(noise.Gaussian(), 0.0), [0.5], name="replay/weights"),
    ]
    without, plain_, streams, written, _ = run([], tmp_path / "without")
    with_, watched, streams_with, written_with, loggers = run(monitors, tmp_path / "with")
    assert split(keys_of(watched))[0] == keys_of(plain_)
    assert streams_with == streams
    assert written_with == written
    assert len(written["direct"]) == 6, "four batches, and two of the sanity check"
    assert_same(weights(with_), weights(without))
    assert held(with_) == held(without)
    assert with_.by_name["accuracy"] is with_.accuracy
    assert watched.loggers == loggers
    assert watched.progress_bar_metrics == plain_.progress_bar_metrics
    assert [o.param_groups[0]["lr"] for o in watched.optimizers] == [o.param_groups[0]["lr"] for o in plain_.optimizers]


def test_level_0_is_exactly_the_users_own_metric(tmp_path):
    _, trainer, *_ = run([ReplayMonitor(noise.Gaussian(), LEVELS)], tmp_path)
    own, replayed = split(keys_of(trainer))
    own = {key: value for key, value in own.items() if key.startswith("val_") and not key.endswith(("_step", "_epoch"))}
    assert under(replayed, "clean") == own
    assert under(replayed, "gaussian/0") == own
    assert len(own) == 20
    noisy = under(replayed, "gaussian/0.6")
    assert noisy.keys() == own.keys()
    same = {key for key, value in noisy.items() if own[key] == value}
    assert same >= {"val_before", "val_pair", "val_drawn"}, "what does not depend on the input"
    # shares of thirteen samples may be the same by chance
    assert not same & {"val_loss", "val_max", "val_sum", "val_auroc", "val_mean", "val_meter", "val_hidden", "val_read"}


def test_the_held_out_data_are_untouched():
    class Writes(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            batch[0].mul_(2)

    data = Rows(13, seed=1)
    whole = loader(list(zip(data.x.split(5), data.y.split(5), strict=True)), batch_size=None)  # type: ignore[arg-type]
    found = validated(ReplayMonitor(noise.Gaussian(), LEVELS), Writes, whole)
    assert torch.equal(data.x, 2 * HELD_OUT.x), "by the module, once"
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"]


class Steers(Classifier):
    """Acts on the run from within its validation."""

    def __init__(self, raises: type[BaseException] | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.raises = raises
        self.entered = 0

    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.entered += 1
        super().validation_step(batch, batch_idx)
        with torch.enable_grad():
            self(batch[0]).sum().backward()
        if self.entered > 5 and self.raises:
            raise self.raises
        self.trainer.should_stop = self.entered >= 6

    def on_validation_epoch_end(self):
        scheduler: Any = self.lr_schedulers()
        scheduler.step(self.trainer.callback_metrics.get("val_loss", 1.0))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)]


def test_a_replay_does_not_steer_the_run():
    results = []
    for monitors in ([], [ReplayMonitor(noise.Gaussian(), LEVELS)]):
        module, trainer = fit(monitors, module=Steers, max_epochs=6)
        gradients = [parameter.grad for parameter in module.parameters()]
        states = trainer.lr_scheduler_configs[0].scheduler.state_dict(), trainer.optimizers[0].param_groups[0]["lr"]
        results.append((trainer.current_epoch, states, weights(module) + gradients))
    one, two = results
    assert one[0] == two[0] < 6, "the module stops the run itself"
    assert one[1] == two[1]
    assert one[1][1] < 0.1
    assert_same(one[2], two[2])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_all_is_as_before_also_after_an_exception(error, tmp_path):
    class Breaks(Everything):
        def validation_step(self, batch, batch_idx):
            if self.breaks:
                self.extra = 1
                super().validation_step(batch, batch_idx)
                raise error
            return super().validation_step(batch, batch_idx)

        def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
            pass  # it comes after Watch, and would draw

        breaks = False

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self.streams, self.held = global_streams(), held(pl_module)

    module, watch = Breaks(), Watch()
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer([ReplayMonitor(noise.Gaussian(), LEVELS), watch], logger=CSVLogger(tmp_path), max_epochs=1)
    trainer.fit(module, loader(), loader(HELD_OUT))
    loggers = trainer.loggers
    Breaks.breaks = True
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.validate(module, loader(HELD_OUT), verbose=False)
    assert global_streams() == watch.streams
    assert trainer.loggers == loggers
    assert not any(isinstance(value, EvaluationDispatcher) for value in vars(trainer.strategy).values())
    before, after = watch.held, held(module)
    for state in (before, after):
        del state[""]["_current_fx_name"], state[""]["_metric_attributes"]  # Lightning's own
    assert after == before


def assert_apart(kind: type[Classifier], **kwargs: Any) -> None:
    """The fit is as without the monitor, and the metrics without noise are the module's own."""
    without, plain_ = fit(module=kind, **kwargs)
    with_, watched = fit([ReplayMonitor(noise.Gaussian(), LEVELS)], module=kind, **kwargs)
    own, found = split(keys_of(watched))
    assert own == keys_of(plain_)
    assert_same(weights(with_), weights(without))
    assert held(with_) == held(without)
    assert under(found, "gaussian/0") == {key: value for key, value in own.items() if key.startswith("val_")}


class Swaps(Classifier):
    """Validates an average of its weights, by exchanging the two before and after."""

    def __init__(self):
        super().__init__()
        self.average = [0.9 * parameter.detach() for parameter in self.parameters()]

    def exchange(self) -> None:
        for parameter, average in zip(self.parameters(), self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def on_validation_epoch_start(self) -> None:
        self.exchange()

    def on_validation_epoch_end(self) -> None:
        self.exchange()


class SwapsInPlace(Swaps):
    def exchange(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.parameters(), self.average, strict=True):
                before = parameter.clone()
                parameter.copy_(average)
                average.copy_(before)


@pytest.mark.parametrize("kind", [Swaps, SwapsInPlace])
def test_weights_that_are_swapped_at_the_end_of_the_epoch_are_the_users(kind):
    assert_apart(kind)


class Frozen(dict):
    def __setitem__(self, *args):
        raise TypeError("this dict is frozen")

    __delitem__ = __setitem__


class KeepsElsewhere(Classifier):
    """Keeps something of its validation where few modules do."""

    of_the_class: list[int] = []  # noqa: RUF012 (it is the case in question)

    def __init__(self):
        super().__init__()
        self.of_the_class.clear()
        self.space = SimpleNamespace(n=0)
        self.parsed = Namespace(n=0)
        self.pair = Pair(torch.zeros(()), [0])
        self.frozen = Frozen(total=torch.zeros(()))
        self.ordered = OrderedDict(a=0, b=0)
        self.mapped = np.zeros(2)
        self.mapped.flags.writeable = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.of_the_class.append(1)
        self.space.n += 1
        self.parsed.n += 1
        self.pair.x.add_(1)
        self.pair.y.append(1)
        self.frozen["total"].add_(1)
        self.ordered.move_to_end("a")
        self.ordered["b"] += 1
        if not hasattr(self, "accuracy"):
            self.accuracy = MulticlassAccuracy(N_CLASSES)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        counts = len(self.of_the_class), self.space.n, self.parsed.n, self.pair.x, len(self.pair.y), self.ordered["b"]
        self.log_dict({f"val_{index}": float(count) for index, count in enumerate(counts)})
        self.log("val_frozen", self.frozen["total"].clone())


def test_what_lies_in_unusual_places_is_the_users():
    assert_apart(KeepsElsewhere)
    assert len(KeepsElsewhere.of_the_class) == 6, "two batches, in two epochs and the sanity check"


def test_arrays_that_nobody_can_write_to_are_not_copied():
    module, trainer = fit(module=KeepsElsewhere)
    state = State(trainer)
    mapped = module.mapped
    with state.entered(state.held()):
        assert module.mapped is mapped


class DrawsBefore(Classifier):
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.mask = torch.rand(len(batch[0]), 1) * np.random.rand() * random.random()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch[0] * self.mask, batch[1]), batch_idx)


def test_the_hook_before_a_step_draws_what_the_users_does():
    assert_apart(DrawsBefore)


class Pops(Readers):
    """Takes what is no tensor out of the batch."""

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        batch["names"].pop("all").pop()
        super().validation_step(batch)


def test_containers_without_tensors_are_the_steps_own():
    data = loader(HELD_OUT, collate_fn=lambda samples: {**as_dict(samples), "names": {"all": ["a"]}})
    assert_apart(Pops, train=data, validation=data)


class Unlike:
    """An experiment that can do what not every one can."""

    def add_scalar(self) -> None:
        raise AssertionError("a replay logged")

    part = {"a": 1}  # noqa: RUF012


def test_a_silent_logger_can_what_the_logger_can_and_does_nothing():
    silent: Any = Silent(Unlike())
    assert isinstance(Silent(Unlike()), Unlike)
    assert not hasattr(silent, "add_figure"), "modules ask which logger it is"
    silent.add_scalar("loss", 1.0)
    with silent.add_scalar() as within:
        within.anything.further()
    assert list(silent.part) == []
    assert "a" not in silent.part
    assert Path(silent.add_scalar()).exists(), "modules write to a folder that they ask for"


# --- it measures what it says


def test_the_values_are_those_of_a_hand_written_loop():
    pl.seed_everything(0, verbose=False)
    module = Everything().eval()
    module.net[4] = nn.Identity()  # type: ignore[index]

    class Plain(Classifier):
        def __init__(self):
            super().__init__()
            self.net = module.net
            self.accuracy = MulticlassAccuracy(N_CLASSES, average="micro")

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.accuracy(self(batch[0]), batch[1])
            self.log("val_accuracy", self.accuracy)

    found = validated(ReplayMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5), Plain)
    key = Key((5, "probe", "soft"), positions=range(13)) / "leaf" / "0"
    with torch.no_grad():
        logits = module(key.apply(noise.Gaussian(), HELD_OUT.x, 0.6))
    accuracy = (logits.argmax(1) == HELD_OUT.y).double().mean().item()
    assert found["replay/soft/0.6/val_accuracy"] == pytest.approx(accuracy, abs=1e-7)
    # sums in float32, in other batches
    assert found["replay/soft/0.6/val_loss"] == pytest.approx(F.cross_entropy(logits, HELD_OUT.y).item(), rel=1e-6)
    assert found["replay/soft/0.6/val_loss"] != found["replay/clean/val_loss"]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_values_do_not_depend_on_the_batch_size(batch_size):
    monitor = ReplayMonitor(noise.Gaussian(), LEVELS)
    whole = validated(monitor, validation=loader(HELD_OUT, batch_size=13))
    # sums in float32, in other batches
    assert validated(monitor, validation=loader(HELD_OUT, batch_size=batch_size)) == pytest.approx(whole, rel=1e-6)


def test_it_replays_in_fit_validate_and_test():
    monitor = ReplayMonitor(noise.Gaussian(), LEVELS)
    module, trainer = fit([monitor])
    in_fit = split(keys_of(trainer))[1]
    assert in_fit.keys() == {"clean/val_loss", "gaussian/0/val_loss", "gaussian/0.6/val_loss"}
    trainer.validate(module, loader(HELD_OUT), verbose=False)
    assert split(keys_of(trainer))[1] == in_fit
    trainer.test(module, loader(HELD_OUT), verbose=False)
    own, in_test = split(keys_of(trainer), "test/replay")
    assert in_test == {key.replace("val_", "test_"): value for key, value in in_fit.items()}
    assert own["test_loss"] == in_test["gaussian/0/test_loss"]


def test_a_monitor_deep_copies_and_pickles_and_serves_a_second_fit():
    monitor = ReplayMonitor([noise.Gaussian()], LEVELS)
    first = keys_of(fit([monitor])[1])
    for again in [monitor, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))]:
        assert keys_of(fit([again])[1]) == first


def test_it_replays_every_n_epochs_and_some_batches_of_each_loader():
    calls: list[tuple[int, int]] = []

    class Counts(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            calls.append((self.current_epoch, batch_idx))

    monitor = ReplayMonitor(noise.Gaussian(), [0.5], every_n_epochs=2, max_batches=1)
    fit([monitor], module=Counts, max_epochs=4, num_sanity_val_steps=0)
    assert [calls.count((epoch, 0)) for epoch in range(4)] == [1, 3, 1, 3]
    assert [calls.count((epoch, 1)) for epoch in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("order", [1, -1])
def test_averaged_weights_are_what_is_replayed(order):
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="it came with Lightning 2.6")
    callbacks = [
        averaging.WeightAveraging(avg_fn=lambda average, new, n: 0.5 * (average + new)),
        ReplayMonitor(noise.Gaussian(), LEVELS),
    ]
    found = keys_of(fit(callbacks[::order])[1])
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"] != found["replay/gaussian/0.6/val_loss"]


def test_checkpoints_and_early_stopping_follow_its_keys(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="replay/gaussian/0.6/val_loss", filename="{epoch}")
    stopper = EarlyStopping("replay/gaussian/0.6/val_loss", patience=2, min_delta=100.0)
    _, trainer = fit([saver, stopper, ReplayMonitor(noise.Gaussian(), LEVELS)], max_epochs=9, enable_checkpointing=True)
    assert saver.best_model_score is not None
    assert trainer.current_epoch == 3, "no loss falls by a hundred, so the patience of two epochs ends"


@pytest.mark.parametrize("mode", [{"precision": "bf16-mixed"}, {"precision": "64-true"}, {"fast_dev_run": True}], ids=str)
def test_a_mode_of_the_trainer_works(mode):
    without, _ = fit(**mode)
    with_, trainer = fit([ReplayMonitor(noise.Gaussian(), LEVELS)], **mode)
    found = keys_of(trainer)
    assert_same(weights(with_), weights(without))
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"] != found["replay/gaussian/0.6/val_loss"]


def test_two_processes_give_what_one_does(tmp_path):
    execute(Path(replayed.__file__), tmp_path / "two", 2)
    replayed.main(tmp_path, 1)
    own, one = split(torch.load(tmp_path / "0.pt"))
    two = [split(torch.load(tmp_path / "two" / f"{rank}.pt")) for rank in range(2)]
    assert under(one, "gaussian/0") == own
    for _, found in two:
        # sums in float32, in another order
        assert found == pytest.approx(one, rel=1e-6)
    assert two[0][0]["val_loss"] != two[1][0]["val_loss"], "which the module does not reduce"


def test_processes_that_log_different_keys_are_told(monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", lambda self, decision, all=True: False)
    with pytest.raises(ValueError, match=r"the processes log different keys, .* logs \['validation_step.val_loss'\]"):
        validated(ReplayMonitor(noise.Gaussian()))


# --- batches and steps


@pytest.mark.parametrize("collate", [as_dict, as_namedtuple, as_tensor], ids=lambda collate: collate.__name__)
def test_any_batch_and_a_step_without_an_index_are_replayed(collate):
    data = loader(HELD_OUT, collate_fn=collate)
    module, trainer = fit([ReplayMonitor(noise.Gaussian(), LEVELS)], module=Readers, train=data, validation=data)
    found = keys_of(trainer)
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"] != found["replay/gaussian/0.6/val_loss"]
    assert module.validated, "the module sees its own batches alone"


@pytest.mark.parametrize(
    "probe",
    [
        WeightNoise(noise.Gaussian(), 0.0),
        ActivationNoise(noise.Gaussian(), 0.0, "net.1"),
        EmbeddingNoise(0.0),
        InputNoise(noise.Gaussian(), 0.0, inputs="data.x"),
    ],
    ids=lambda probe: type(probe).__name__,
)
def test_callbacks_are_probes_and_know_their_inputs(probe):
    collate = as_dict if isinstance(probe, InputNoise) else as_tokens
    data = loader(HELD_OUT, collate_fn=collate)
    without, _ = fit(module=Readers, train=data, validation=data)
    with_, trainer = fit([ReplayMonitor({"probe": probe}, LEVELS)], module=Readers, train=data, validation=data)
    found = keys_of(trainer)
    assert_same(weights(with_), weights(without))
    assert found["replay/probe/0/val_loss"] == found["val_loss"] != found["replay/probe/0.6/val_loss"]
    assert not any(part._forward_hooks for part in with_.modules())


class Loaders(Classifier):
    """Logs one metric for two loaders."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.ends = 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.mean(self(batch[0]).mean())
        self.log("val_mean", self.mean)
        self.log(f"val_{dataloader_idx}", batch[0].sum(), add_dataloader_idx=False)

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.ends += dataloader_idx

    def on_validation_epoch_end(self):
        self.log("val_ends", float(self.ends))
        self.log("val_read", self.trainer.callback_metrics.get("val_loss/dataloader_idx_0", 0.0))


def test_several_loaders_are_replayed_one_after_the_other():
    data = [loader(Rows(13, seed=1)), loader(Rows(9, seed=2))]
    own, found = split(keys_of(fit([ReplayMonitor(noise.Gaussian(), LEVELS)], module=Loaders, validation=data)[1]))
    own = {key: value for key, value in own.items() if key.startswith("val_")}
    assert own.keys() >= {"val_loss/dataloader_idx_1", "val_mean/dataloader_idx_0", "val_1", "val_ends"}
    assert under(found, "clean") == under(found, "gaussian/0") == own
    noisy = under(found, "gaussian/0.6")
    assert noisy.keys() == own.keys()
    assert {key for key in own if own[key] == noisy[key]} == {"val_ends"}


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_combined_loaders_are_replayed(mode):
    class Combined(Classifier):
        def validation_step(self, batch, batch_idx):
            for name, part in batch.items():
                if part is not None:
                    self.log(f"val_{name}", F.cross_entropy(self(part[0]), part[1]), batch_size=8)

    data = CombinedLoader({"a": loader(Rows(13, seed=1)), "b": loader(Rows(9, seed=2))}, mode)
    monitor = ReplayMonitor(noise.Gaussian(), LEVELS, inputs="a.0")
    found = keys_of(fit([monitor], module=Combined, validation=data)[1])
    assert found["replay/gaussian/0/val_a"] == found["val_a"] != found["replay/gaussian/0.6/val_a"]
    assert found["replay/gaussian/0.6/val_b"] == found["val_b"]


class Differentiates(Classifier):
    """Differentiates with respect to its input, which a penalty or an attack does."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x.requires_grad_()
            x, y = x.requires_grad_(), y.clone()
            loss = F.cross_entropy(self(x), y)
            loss.backward()
            assert x.grad is not None
            self.log("val_steepness", x.grad.norm())


def test_a_step_may_differentiate_with_respect_to_its_input():
    monitor = ReplayMonitor(noise.Gaussian(), LEVELS)
    module, trainer = fit([monitor], module=Differentiates)
    in_fit = keys_of(trainer)
    assert in_fit["replay/gaussian/0/val_steepness"] == in_fit["val_steepness"] != in_fit["replay/gaussian/0.6/val_steepness"]
    trainer.validate(module, loader(HELD_OUT), verbose=False)
    assert split(keys_of(trainer))[1] == split(in_fit)[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.slow
def test_a_compiled_module_is_replayed():
    class Silent(Classifier):  # in compiled code Lightning cannot log with this torch
        def __init__(self):
            super().__init__()
            self.total = torch.zeros(())

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.total = self.total + F.cross_entropy(self(batch[0]), batch[1])

        def on_validation_epoch_start(self):
            self.total = torch.zeros(())

        def on_validation_epoch_end(self):
            self.log("val_total", self.total)

    pl.seed_everything(0, verbose=False)
    trainer = make_trainer([ReplayMonitor(noise.Gaussian(), LEVELS)])
    trainer.fit(torch.compile(Silent(), backend="eager"), loader(), loader(Rows(16, seed=1)))  # type: ignore[arg-type]
    found = keys_of(trainer)
    assert found["replay/gaussian/0/val_total"] == found["val_total"] != found["replay/gaussian/0.6/val_total"]


# --- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReplayMonitor([]), "noises must be at least one"),
        (lambda: ReplayMonitor(noise.SwapNoise()), "'swapnoise' cannot be a probe: it mixes rows"),
        (lambda: ReplayMonitor(noise.Gaussian(), every_n_epochs=0), "at least 1, got 0"),
        (lambda: fit([ReplayMonitor(noise.Gaussian()), ReplayMonitor(noise.Uniform())]), "two monitors are named 'replay'"),
        (lambda: fit([ReplayMonitor(noise.Gaussian())], limit_val_batches=0), "ReplayMonitor needs a validation"),
        (lambda: fit([ReplayMonitor(noise.Gaussian(), every_n_epochs=3)]), "never comes in a run of 2 epochs"),
    ],
)
def test_what_is_wrong_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class Fetches(Classifier):
    def validation_step(self, dataloader_iter):  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=8)


class Updates(Classifier):
    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            F.cross_entropy(self(batch[0]), batch[1]).backward()
        self.optimizer().step()

    def optimizer(self) -> Any:
        return self.trainer.optimizers[0]


class Adapts(Updates):
    def optimizer(self) -> Any:
        return torch.optim.SGD(self.net[1].parameters(), 0.1)  # type: ignore[index]


@pytest.mark.parametrize(
    ("monitor", "kind", "error", "message"),
    [
        (ReplayMonitor(noise.Gaussian(), inputs="image"), Classifier, ValueError, "no leaf 'image'"),
        (ReplayMonitor(noise.Gaussian(), inputs=1), Classifier, TypeError, "Gaussian needs floats"),
        (ReplayMonitor(WeightNoise(noise.Gaussian(), 0.0, params="nett.*")), Classifier, ValueError, "no parameter matches"),
        (ReplayMonitor(noise.Gaussian()), Fetches, ValueError, r"cannot replay a validation_step\(dataloader_iter\)"),
        (ReplayMonitor(noise.Gaussian()), Updates, RuntimeError, "updates the weights in validation or test"),
        (ReplayMonitor(noise.Gaussian()), Adapts, RuntimeError, "updates the weights in validation or test"),
    ],
    ids=["no leaf", "no floats", "no parameter", "an iterator", "an update", "an optimizer of its own"],
)
@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_what_does_not_fit_is_said_before_the_training(monitor, kind, error, message):
    module = kind()
    with pytest.raises(error, match=message):
        fit([monitor], module=module)
    assert not module.seen
