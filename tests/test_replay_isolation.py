"""A replay has no side effects on the module, the trainer and the data."""

from __future__ import annotations

import itertools
import random
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, Classifier, Pair, Rows, assert_same, fit, keys_of, loader, make_trainer, weights
from helpers_replay import HELD_OUT, LEVELS, Everything, Meter, Readers, as_dict, split, under, validated
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import ReplayMonitor, WeightNoise, noise
from lightning_noise.loop.dispatch import EvaluationDispatcher
from lightning_noise.loop.loggers import SilentLogger
from lightning_noise.loop.snapshot import State, copy_batch
from lightning_noise.testing import global_streams


def plain(value: Any) -> Any:
    """Returns a value as plain Python, to be compared with ``==``."""
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


def test_a_run_with_monitors_equals_the_run_without(tmp_path):
    monitors = [
        ReplayMonitor([noise.Gaussian(), noise.Impulse()], {"gaussian": LEVELS, "impulse": LEVELS}),
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


def test_level_0_gives_exactly_the_users_own_metrics(tmp_path):
    _, trainer, *_ = run([ReplayMonitor(noise.Gaussian(), LEVELS)], tmp_path)
    own, replayed = split(keys_of(trainer))
    own = {key: value for key, value in own.items() if key.startswith("val_") and not key.endswith(("_step", "_epoch"))}
    assert under(replayed, "clean") == own
    assert under(replayed, "gaussian/0") == own
    assert len(own) == 20
    noisy = under(replayed, "gaussian/0.6")
    assert noisy.keys() == own.keys()
    same = {key for key, value in noisy.items() if own[key] == value}
    assert same >= {"val_before", "val_pair", "val_drawn"}, "these do not depend on the input"
    # shares of thirteen samples may be equal by chance
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
    """Steers the run from its validation: stops it and steps the scheduler."""

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
def test_an_exception_in_a_replay_leaves_no_trace(error, tmp_path):
    class Breaks(Everything):
        def validation_step(self, batch, batch_idx):
            if self.breaks:
                self.extra = 1
                super().validation_step(batch, batch_idx)
                raise error
            return super().validation_step(batch, batch_idx)

        def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
            pass  # runs after Watch, and would draw

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
    """Asserts that the fit equals the fit without the monitor, and level 0 the module's own metrics."""
    without, plain_ = fit(module=kind, **kwargs)
    with_, watched = fit([ReplayMonitor(noise.Gaussian(), LEVELS)], module=kind, **kwargs)
    own, found = split(keys_of(watched))
    assert own == keys_of(plain_)
    assert_same(weights(with_), weights(without))
    assert held(with_) == held(without)
    assert under(found, "gaussian/0") == {key: value for key, value in own.items() if key.startswith("val_")}


class Swaps(Classifier):
    """Exchanges its weights for an average for the time of a validation."""

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
def test_weights_that_are_swapped_at_the_end_of_the_epoch_are_restored(kind):
    assert_apart(kind)


class Frozen(dict):
    def __setitem__(self, *args):
        raise TypeError("this dict is frozen")

    __delitem__ = __setitem__


class Tally:
    """Counts in slots, one of which is set in the validation."""

    __slots__ = ("__n", "last", "seen", "total")

    def __init__(self):
        self.__n, self.total = 0, torch.zeros(())
        self.seen: list[int] = []

    def count(self) -> float:
        self.__n += 1
        self.total += 1
        self.seen.append(self.__n)
        self.last = getattr(self, "last", 0) + self.__n
        return float(self.total + self.last + len(self.seen))


class KeepsElsewhere(Classifier):
    """Keeps state of its validation in unusual places."""

    of_the_class: list[int] = []  # noqa: RUF012 (it is the case in question)

    def __init__(self):
        super().__init__()
        self.of_the_class.clear()
        self.space = SimpleNamespace(n=0)
        self.parsed = Namespace(n=0)
        self.pair = Pair(torch.zeros(()), [0])
        self.frozen = Frozen(total=torch.zeros(()))
        self.ordered = OrderedDict(a=0, b=0)
        self.tally = Tally()
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
        self.log("val_tally", self.tally.count())
        if not hasattr(self, "accuracy"):
            self.accuracy = MulticlassAccuracy(N_CLASSES)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        counts = len(self.of_the_class), self.space.n, self.parsed.n, self.pair.x, len(self.pair.y), self.ordered["b"]
        self.log_dict({f"val_{index}": float(count) for index, count in enumerate(counts)})
        self.log("val_frozen", self.frozen["total"].clone())


def test_state_in_unusual_places_is_restored():
    assert_apart(KeepsElsewhere)
    assert len(KeepsElsewhere.of_the_class) == 6, "two batches, in two epochs and the sanity check"


class Fetches(Classifier):
    """Holds an iterator, and may fetch from it in the validation step."""

    def __init__(self, build: Any, *, fetches: bool):
        super().__init__()
        self.build, self.fetches = build, fetches

    def on_validation_epoch_start(self) -> None:
        self.items, self.others = self.build(), [self.build()]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.fetches:
            self.log("val_item", next(self.items) + next(self.others[0]))


ITERATORS = {
    "list_iterator": lambda: iter([1.0] * 9),
    "generator": lambda: (1.0 for _ in range(9)),
    "count": itertools.count,
    "_SingleProcessDataLoaderIter": lambda: iter(DataLoader(torch.ones(9))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", ITERATORS)
def test_a_step_that_fetches_from_an_iterator_of_the_module_is_refused(kind):
    def run(*, fetches: bool) -> None:
        fit([ReplayMonitor(noise.Gaussian(), [0.5])], module=lambda: Fetches(ITERATORS[kind], fetches=fetches), max_epochs=1)

    with pytest.raises(RuntimeError, match=f"cannot replay a step that fetches from the {kind} that the module holds"):
        run(fetches=True)
    run(fetches=False)


SHARED = {
    "parameter": nn.Parameter(torch.zeros(2)),
    "array that nobody can write to": np.broadcast_to(np.zeros(1), (2,)),
    "data set": HELD_OUT,
    "function": print,
}
COPIED = {
    "tensor": torch.zeros(2),
    "tensor of a graph": torch.zeros(2, requires_grad=True) * 1,
    "array": np.zeros(2),
    "generator of torch": torch.Generator(),
    "generator of numpy": np.random.default_rng(0),
    "generator of Python": random.Random(0),
}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 1), lambda x: Pair(1, (x,))], ids=["bare", "tuple", "nested"])
@pytest.mark.parametrize("kind", [*SHARED, *COPIED])
def test_a_state_copies_what_is_changed_in_place_and_shares_the_rest(kind, wrap):
    module, trainer = fit(max_epochs=1)
    leaf = (SHARED | COPIED)[kind]
    module.one, module.other = [wrap(leaf)], {"again": leaf}
    one, other = module.one, module.other
    state = State(trainer)
    with state.entered(state.current()):
        assert module.one is one
        assert module.other is other
        assert type(one[0]) is type(wrap(leaf))
        assert (other["again"] is leaf) is (kind in SHARED)
        (found,) = [value for value in flatten(one) if type(value) is type(leaf)]
        assert found is other["again"], "a leaf in two places is one leaf again"
    assert other["again"] is leaf


def flatten(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, list | tuple) else [value]


class DrawsBefore(Classifier):
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.mask = torch.rand(len(batch[0]), 1) * np.random.rand() * random.random()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch[0] * self.mask, batch[1]), batch_idx)


def test_the_hook_before_a_replayed_step_draws_what_the_users_hook_draws():
    assert_apart(DrawsBefore)


class Pops(Readers):
    """Removes items that are not tensors from the batch."""

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        batch["names"].pop("all").pop()
        super().validation_step(batch)


def test_containers_without_tensors_are_copied():
    data = loader(HELD_OUT, collate_fn=lambda samples: {**as_dict(samples), "names": {"all": ["a"]}})
    assert_apart(Pops, train=data, validation=data)


class Experiment:
    """An experiment with methods that other experiments lack."""

    def add_scalar(self) -> None:
        raise AssertionError("a replay logged")

    part = {"a": 1}  # noqa: RUF012


def test_a_silent_logger_has_the_methods_of_the_logger_and_does_nothing():
    silent: Any = SilentLogger(Experiment())
    assert isinstance(SilentLogger(Experiment()), Experiment)
    assert not hasattr(silent, "add_figure"), "modules may ask for a method"
    silent.add_scalar("loss", 1.0)
    with silent.add_scalar() as within:
        within.anything.further()
    assert list(silent.part) == []
    assert "a" not in silent.part
    assert Path(silent.add_scalar()).exists(), "modules may write to a returned folder"


def test_copies_share_no_memory_with_a_tensor_that_consists_of_tensors():
    pair = TwoTensor(torch.ones(2), torch.zeros(2))
    copied = copy_batch([pair])[0]
    copied.a.add_(1)
    assert type(copied) is TwoTensor
    assert pair.a.tolist() == [1.0, 1.0]
