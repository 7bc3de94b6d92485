"""The range test finds the levels of closed forms, and leaves the run untouched."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import Classifier, Rows, assert_same, execute, fit, loader, make_trainer, weights
from pytorch_lightning.loggers.logger import DummyLogger
from scripts import range_test
from scripts.range_test import found
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_noise import ActivationNoise, InputNoise, Mixup, RobustnessMonitor, WeightNoise, noise, suggest_level, tasks
from lightning_noise.evaluation.range_test import RangeTest, find_crossing
from lightning_noise.testing import global_streams

NORMAL = NormalDist()


class Linear(pl.LightningModule):
    """Two classes on the two sides of a plane."""

    def __init__(self):
        super().__init__()
        self.before = nn.Identity()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.before(x) @ torch.stack([-self.w, self.w], 1)


class OneLogit(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.before(x) @ self.w[:, None]


def at_distance(distance: float, n: int = 4000) -> tuple[Tensor, Tensor]:
    """Samples at this distance of the plane, half on each side."""
    sides = torch.tensor([1.0, -1.0]).repeat(n // 2)
    along = torch.linspace(-5, 5, n)
    x = distance * sides[:, None] * torch.tensor([0.6, 0.8]) + along[:, None] * torch.tensor([-0.8, 0.6])
    return x, (sides > 0).long()


def found_in(module: Any, probe: Any, data: Any, **kwargs: Any) -> RangeTest:
    return suggest_level(make_trainer(), module, probe, dataloaders=loader(data, batch_size=1000), **kwargs)


def around(level: float) -> list[float]:
    return [level * factor for factor in (0.8, 0.95, 1.05, 1.2)]


# --- the laws


@pytest.mark.parametrize(
    ("module", "probe", "task"),
    [
        (Linear, noise.Gaussian(), tasks.Multiclass()),
        (OneLogit, noise.Gaussian(), tasks.Binary()),
        (Linear, InputNoise(noise.Gaussian(), 7.0), tasks.Multiclass()),
        (Linear, ActivationNoise(noise.Gaussian(), 7.0, "before"), tasks.Multiclass()),
    ],
)
@pytest.mark.parametrize("retention", [None, 0.8])
def test_it_finds_the_level_at_which_that_much_skill_is_left(module, probe, task, retention):
    # accuracy = Phi(distance / level), and the skill above chance is 2 Phi - 1
    z = NORMAL.inv_cdf((1 + (retention or 0.9)) / 2)
    x, y = at_distance(2.0)
    result = found_in(module(), probe, TensorDataset(x, y), task=task, levels=around(2 / z), retention=retention)
    assert result.measured == "retention"
    assert result.wanted == (retention or 0.9)
    assert result.accuracies[0.0] == 1
    # five standard errors of the accuracy, over the slope of Phi(distance / level)
    accuracy = NORMAL.cdf(z)
    error = 5 * (accuracy * (1 - accuracy) / len(x)) ** 0.5 / (NORMAL.pdf(z) * z)
    assert result.level == pytest.approx(2 / z, rel=error)
    assert result.n == len(x)


@pytest.mark.parametrize(
    ("module", "task"), [(Linear, tasks.Multiclass()), (OneLogit, tasks.Binary()), (OneLogit, tasks.Multilabel())]
)
def test_it_finds_the_level_at_which_predictions_change_without_labels(module, task):
    z = NORMAL.inv_cdf(1 - 0.1)
    x, _ = at_distance(2.0)
    # a loader of no more than the inputs
    trainer, data = make_trainer(), torch.utils.data.DataLoader(x, batch_size=1000)  # type: ignore[arg-type]
    result = suggest_level(
        trainer, module(), noise.Gaussian(), dataloaders=data, task=task, levels=around(2 / z), flip_rate=0.1
    )
    assert result.measured == "flip_rate"
    assert result.accuracies == {}
    error = 5 * (0.1 * 0.9 / len(x)) ** 0.5 / (NORMAL.pdf(z) * z)
    assert result.level == pytest.approx(2 / z, rel=error)


def test_labels_are_not_read_for_the_flip_rate():
    x, y = at_distance(2.0, 1000)
    right, wrong = (found_in(Linear(), noise.Gaussian(), TensorDataset(x, labels), flip_rate=0.1) for labels in (y, 9 - y))
    assert right == wrong


@pytest.mark.filterwarnings("ignore:no level is suggested")
@pytest.mark.parametrize(
    "probe",
    [
        noise.Gaussian(),
        noise.Impulse(),
        WeightNoise(noise.Gaussian(), 7.0, relative="std"),
        ActivationNoise(noise.Gaussian(), 7.0, "net.1"),
    ],
)
def test_the_accuracies_are_those_of_the_monitor(probe):
    levels, data = [0.3, 0.6, 0.9], loader(Rows(29, seed=1))
    module, trainer = fit(max_epochs=5)
    result = suggest_level(trainer, module, probe, dataloaders=data, levels=levels, seed=3)
    monitored = make_trainer([monitor := RobustnessMonitor(probe, levels, seed=3)])
    monitored.validate(module, data, verbose=False)
    (tag,) = monitor.levels
    for level, accuracy in result.accuracies.items():
        key = f"robustness_levels/{tag}/{level:g}/accuracy" if level else "robustness/accuracy_clean"
        assert monitored.callback_metrics[key].item() == pytest.approx(accuracy, rel=1e-6)  # it logs in float32
    assert len(set(result.accuracies.values())) > 1


def test_the_retention_is_the_share_of_the_skill_above_chance():
    module, trainer = fit(max_epochs=5)
    result = suggest_level(trainer, module, noise.Gaussian())
    clean, chance = result.accuracies[0.0], Rows(13, seed=1).y.bincount().max().item() / 13
    for level, kept in result.curve.items():
        assert kept == pytest.approx((result.accuracies[level] - chance) / (clean - chance))


def test_the_batch_size_does_not_matter():
    assert found(batch_size=2) == found(batch_size=5) == found(batch_size=13)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_find_what_one_finds(strategy, tmp_path: Path):
    execute(range_test.main, tmp_path / "two", strategy, 2)
    assert torch.load(tmp_path / "two" / "found.pt") == asdict(found())


class Uneven(IterableDataset):
    """Has data for the first process alone."""

    def __iter__(self):
        yield from [] if torch.distributed.get_rank() else zip(*at_distance(2.0, 100), strict=True)


class ManyClasses(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(super().forward(x), (0, 5000), value=-100.0)


@pytest.mark.slow
def test_a_process_without_a_batch_knows_how_many_classes_there_are():
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    few, many = (
        suggest_level(make_trainer(**two), kind(), noise.Gaussian(), dataloaders=DataLoader(Uneven(), 10))
        for kind in (Linear, ManyClasses)
    )
    assert few == many


class Shard(Dataset):
    """The half of some samples that belongs to this process."""

    def __init__(self, data: Dataset):
        self.data: Any = data

    def __len__(self) -> int:
        return len(self.data) // 2

    def __getitem__(self, i: int) -> Any:
        return self.data[2 * i + torch.distributed.get_rank()]


@pytest.mark.slow
@pytest.mark.parametrize("is_split", [False, True])
def test_samples_that_every_process_evaluates_count_once(is_split):
    data = TensorDataset(*at_distance(2.0, 400))
    shown = Shard(data) if is_split else data
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    result = suggest_level(make_trainer(**two), Linear(), noise.Gaussian(), dataloaders=DataLoader(shown, 50))
    assert result.n == 400
    if not is_split:
        assert result == found_in(Linear(), noise.Gaussian(), data)


def test_levels_are_geometric_up_to_the_largest_that_has_a_meaning():
    module, trainer = fit(max_epochs=5)
    unbounded = list(suggest_level(trainer, module, noise.Gaussian(), flip_rate=0.1).curve)
    bounded = list(suggest_level(trainer, module, noise.FeatureDropout(), flip_rate=0.1).curve)
    assert (len(unbounded), unbounded[0], unbounded[-1]) == (13, 0.01, 10.0)
    assert (len(bounded), bounded[0], bounded[-1]) == (9, 0.01, 1.0)
    for low, high in [*pairwise(unbounded), *pairwise(bounded)]:
        assert high / low == pytest.approx(10**0.25, rel=0.01)  # they are rounded to three digits


def test_levels_may_be_in_any_order():
    x, y = at_distance(2.0, 1000)
    data, levels = TensorDataset(x, y), [1.2, 0.9, 1.5]
    assert found_in(Linear(), noise.Gaussian(), data, levels=levels) == found_in(
        Linear(), noise.Gaussian(), data, levels=sorted(levels)
    )


@pytest.mark.parametrize(
    ("curve", "wanted", "level"),
    [
        ({0.01: 1.0, 1.0: 0.0}, 0.5, 0.1),  # straight over the logarithm
        ({0.1: 1.0, 1.0: 0.5, 10.0: 0.0}, 0.5, 1.0),
        ({0.1: 0.5, 1.0: 0.4}, 0.5, 0.1),
        ({0.1: 1.0, 1.0: 0.5, 10.0: 0.5, 100.0: 0.4}, 0.5, 1.0),
        ({0.1: 1.0, 1.0: 0.0, 10.0: 1.0, 100.0: 0.0}, 0.5, 0.1 * 10**0.5),  # the lowest of several
        ({0.1: 1.0, 1.0: 0.9}, 0.5, math.nan),
        ({0.1: 0.4, 1.0: 0.3}, 0.5, math.nan),
        ({0.1: 0.4, 1.0: 0.9, 10.0: 0.3}, 0.5, math.nan),  # the first was below all levels
    ],
)
def test_the_level_lies_on_a_straight_line_over_the_logarithm(curve, wanted, level):
    assert find_crossing(curve, wanted) == pytest.approx(level, nan_ok=True)


@pytest.mark.parametrize(("levels", "way_out"), [([0.01, 0.02], "above 0.02"), ([30.0, 60.0], "below 30")])
@pytest.mark.parametrize("criterion", [{"retention": 0.9}, {"flip_rate": 0.1}])
def test_where_no_level_fits_there_is_a_warning_and_nan(levels, way_out, criterion):
    x, y = at_distance(2.0, 1000)
    with pytest.warns(UserWarning, match=f"give levels {way_out}"):
        result = found_in(Linear(), noise.Gaussian(), TensorDataset(x, y), levels=levels, **criterion)
    assert math.isnan(result.level)
    assert list(result.curve) == levels
    assert len(result.figure().axes[0].lines) == 2  # the curve and what was wanted


def test_the_figure_marks_the_level():
    axes = RangeTest(0.2, {0.1: 0.95, 1.0: 0.5}, 0.9, "retention", {}, 10).figure().axes[0]
    assert axes.get_xscale() == "log"
    wanted, curve, mark = (line.get_xydata().tolist() for line in axes.lines)  # type: ignore[union-attr]
    assert wanted == [[0.0, 90.0], [1.0, 90.0]]
    assert curve == [[0.1, 95.0], [1.0, 50.0]]
    assert mark == [[0.2, 90.0]]


# --- where the data come from


class Data(pl.LightningDataModule):
    """Has its data ready for validation alone, and keeps of which loader it handed over a batch."""

    def __init__(self):
        super().__init__()
        self.moved: list[int] = []

    def setup(self, stage: str) -> None:
        self.rows = {"fit": Rows(), "validate": Rows(13, seed=1)}[stage]

    def train_dataloader(self) -> Any:
        return loader(self.rows)

    def val_dataloader(self) -> Any:
        return [loader(Rows(5, seed=2)), loader(Rows(13, seed=1))]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved.append(dataloader_idx)
        return batch


class WithData(Classifier):
    def val_dataloader(self) -> Any:
        return loader(Rows(13, seed=1))


@pytest.mark.filterwarnings("ignore:no level is suggested")  # of five rows
def test_data_come_from_the_arguments_the_last_run_or_the_module():
    pl.seed_everything(0, verbose=False)
    module = WithData()
    rows = loader(Rows(13, seed=1))
    given = suggest_level(make_trainer(), module, noise.Gaussian(), dataloaders=rows, flip_rate=0.1)
    assert given.n == 13
    assert suggest_level(make_trainer(), module, noise.Gaussian(), flip_rate=0.1) == given
    data = Data()
    assert suggest_level(make_trainer(), module, noise.Gaussian(), datamodule=data, dataloader_idx=1, flip_rate=0.1) == given
    assert suggest_level(make_trainer(), module, noise.Gaussian(), datamodule=data, flip_rate=0.1).n == 5
    plain = Classifier()
    plain.load_state_dict(module.state_dict())
    trainer = make_trainer()
    trainer.validate(plain, rows, verbose=False)
    assert suggest_level(trainer, plain, noise.Gaussian(), flip_rate=0.1) == given
    assert suggest_level(trainer, plain, noise.Gaussian(), max_batches=1, flip_rate=0.1).n == 8


@pytest.mark.filterwarnings("ignore:no level is suggested")  # of five rows
def test_those_of_the_data_module_of_the_last_run_are_handed_over_by_it():
    class Plain(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    data, module, trainer = Data(), Plain(), make_trainer()
    trainer.fit(module, datamodule=data)
    held = dict(vars(data))
    data.moved.clear()
    assert suggest_level(trainer, module, noise.Gaussian(), flip_rate=0.1).n == 5
    assert data.moved == [0, 1, 1]  # a batch of the first loader, and two of the second
    assert vars(data) == held


# --- nothing is touched


class Touchy(Classifier):
    """Changes itself wherever it can, and has a validation that only a validation step bears."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.kept: list[Tensor] = []
        self.count = 0

    def setup(self, stage: str) -> None:
        self.extra = nn.Linear(2, 2)  # draws
        self.stages = [*getattr(self, "stages", []), stage]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.kept.append(x)
        return self.net(self.norm(x)) + 0 * torch.rand(())

    def configure_callbacks(self) -> Any:
        return Refusing()

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "validate":
            raise RuntimeError("there were no outputs")


class Refusing(pl.Callback):
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            raise RuntimeError("no callback is to see it")


class Kept(DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.calls: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def parts(trainer: pl.Trainer) -> dict[str, Any]:
    """What a user can read of a trainer."""
    counters = {name: loop.state_dict() for name, loop in (("fit", trainer.fit_loop), ("validate", trainer.validate_loop))}
    return {
        "callbacks": list(trainer.callbacks),  # type: ignore[attr-defined]
        "loggers": list(trainer.loggers),
        "logged": [len(logger.calls) for logger in trainer.loggers if isinstance(logger, Kept)],
        "metrics": [dict(trainer.callback_metrics), dict(trainer.logged_metrics), dict(trainer.progress_bar_metrics)],
        "state": (trainer.state.fn, trainer.state.status, trainer.state.stage),
        "loaders": (trainer.train_dataloader, trainer.val_dataloaders, trainer.datamodule),  # type: ignore[attr-defined]
        "counters": counters,
        "steps": (trainer.global_step, trainer.current_epoch, trainer.limit_val_batches),
        "strategy": dict(vars(trainer.strategy)),
    }


def inside(module: pl.LightningModule) -> list[Any]:
    """Which objects a module holds, and what is in those that can be written to."""
    holders = [held for part in module.modules() for held in (vars(part), part._parameters, part._buffers, part._modules)]
    lists = [value for value in vars(module).values() if isinstance(value, list)]
    tensors = [tensor for value in (*module.parameters(), *module.buffers()) for tensor in (value, value.grad)]
    return [
        [{name: id(value) for name, value in held.items()} for held in holders],
        [list(map(id, value)) for value in lists],
        [None if x is None else (x.tolist(), x.data_ptr(), x.dtype, x.device, x.requires_grad) for x in tensors],
    ]


def touched_everywhere() -> tuple[Any, pl.Trainer]:
    """A module in a state that no run leaves it in, and its trainer."""
    module, trainer = fit(module=Touchy, max_epochs=3, logger=Kept())
    module.net[1].eval()
    module.net[4].weight.requires_grad_(False)
    module(torch.randn(4, 8)).sum().backward()
    return module, trainer


@pytest.mark.parametrize(
    "probe", [noise.Gaussian(), WeightNoise(noise.Gaussian(), 0.5), ActivationNoise(noise.Gaussian(), 0.5, "net.1")]
)
def test_module_and_trainer_are_as_they_were(probe):
    module, trainer = touched_everywhere()
    of_trainer, of_module, streams = parts(trainer), inside(module), global_streams()
    suggest_level(trainer, module, probe, flip_rate=0.1, max_batches=1)
    assert parts(trainer) == of_trainer
    assert inside(module) == of_module
    assert global_streams() == streams


def test_weights_are_the_same_tensors_after_a_trainer_of_another_precision():
    module, _ = touched_everywhere()
    before = inside(module)
    suggest_level(make_trainer(precision="bf16-true"), module, noise.Gaussian(), flip_rate=0.1, dataloaders=loader())
    assert inside(module) == before


def test_they_are_as_they_were_after_an_exception():
    def predict(module: Any, batch: Any) -> Any:
        module(batch[0])
        raise RuntimeError("the prediction fails")

    module, trainer = touched_everywhere()
    of_trainer, of_module, streams = parts(trainer), inside(module), global_streams()
    with pytest.raises(RuntimeError, match="the prediction fails"):
        suggest_level(trainer, module, noise.Gaussian(), predict=predict)
    assert parts(trainer) == of_trainer
    assert inside(module) == of_module
    assert global_streams() == streams


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_fit_after_it_is_the_fit_without(precision):
    def run(*, tested: bool) -> tuple[Any, pl.Trainer]:
        pl.seed_everything(0, verbose=False)
        module = Touchy()
        trainer = make_trainer(precision=precision, max_epochs=2)
        for epochs in (2, 4):
            if tested:
                suggest_level(trainer, module, noise.Gaussian(), flip_rate=0.1, dataloaders=loader(Rows(13, seed=1)))
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, loader(shuffle=True), loader(Rows(13, seed=1)))
        return module, trainer

    (one, trainer), (two, plain) = run(tested=True), run(tested=False)
    assert_same(weights(one), weights(two))
    assert_same(one.losses, two.losses)
    assert one.stages == two.stages
    assert trainer.callback_metrics == plain.callback_metrics
    assert (trainer.global_step, trainer.current_epoch) == (plain.global_step, plain.current_epoch)


# --- what is refused


class Within(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        suggest_level(make_trainer(), pl_module, noise.Gaussian())


def test_it_is_refused_within_a_run():
    with pytest.raises(ValueError, match="cannot be called within another"):
        fit([Within()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retention": 0.9, "flip_rate": 0.1}, "not both"),
        ({"retention": 1.0}, r"retention must be in \(0, 1\), got 1"),
        ({"flip_rate": 0.0}, "flip_rate must be in"),
        ({"levels": [0.1]}, "at least two"),
        ({"levels": [0.0, 0.1]}, "above 0"),
        ({"levels": [0.1, -0.1]}, "not negative"),
        ({"task": tasks.Regression()}, r"predicted classes: give task=tasks.Multiclass\(\)"),
        ({"noise": Mixup(0.2)}, "cannot perturb held-out data"),
        ({"noise": noise.SwapNoise()}, "mixes"),
        ({"max_batches": 0}, "max_batches must be at least 1"),
        ({"dataloaders": None}, "no held-out data"),
        ({"datamodule": Data()}, "not both"),
        ({"dataloader_idx": 1}, "no batch of dataloader_idx=1"),
        (
            {"predict": lambda module, batch: module(batch[0]) + 99 * torch.eye(3)[(batch[1] + 1) % 3]},
            "not above that of a constant guess",
        ),
        ({"predict": lambda module, batch: torch.zeros(3), "flip_rate": 0.1}, r"returned float32 \(3,\) for 8 samples"),
    ],
)
def test_what_is_refused(arguments, message):
    defaults = {"noise": noise.Gaussian(), "dataloaders": loader(Rows(13, seed=1))}
    with pytest.raises(ValueError, match=message):
        suggest_level(make_trainer(), Classifier(), **{**defaults, **arguments})


@pytest.mark.parametrize("several", [[noise.Gaussian(), noise.Impulse()], {"noise": noise.Gaussian()}])
def test_several_noises_are_refused(several):
    with pytest.raises(TypeError, match="noise must be one noise or noise callback"):
        suggest_level(make_trainer(), Classifier(), several, dataloaders=loader())


def test_a_trainer_without_metrics_is_refused():
    trainer = pl.Trainer(accelerator="cpu", barebones=True)
    with pytest.raises(ValueError, match="barebones=True"):
        suggest_level(trainer, Classifier(), noise.Gaussian(), dataloaders=loader())


def test_predictions_that_are_not_a_number_are_wrong_ones():
    def broken(x: Tensor, level: Any, *, generator: torch.Generator) -> Tensor:
        return torch.full_like(x, torch.nan)

    data = loader(Rows(64, seed=1))
    levels = {"levels": [0.1, 0.2], "dataloaders": data}
    with pytest.warns(UserWarning, match="no level is suggested"):
        found = suggest_level(make_trainer(), Classifier(), broken, flip_rate=0.5, **levels)
    assert set(found.curve.values()) == {1.0}


def test_strategies_without_whole_parameters_are_refused(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.strategy, "__class__", type("FSDPStrategy", (type(trainer.strategy),), {}))
    with pytest.raises(ValueError, match="FSDPStrategy"):
        suggest_level(trainer, Classifier(), noise.Gaussian())
