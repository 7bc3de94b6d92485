"""Everything can be written in a YAML file and on the command line of a LightningCLI, and reads back the same."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from helpers import Classifier, Rows, assert_same, loader, weights
from members import NOISES, SCHEDULES
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI, SaveConfigCallback
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    EmbeddingNoise,
    GradientNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    ReplayMonitor,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    report,
    schedules,
    tasks,
)
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.evaluation.conditions import Condition
from lightning_noise.evaluation.results import Estimate
from lightning_noise.rules import Governor, SignedGap
from lightning_noise.schedules import Progress

ROOT = Path(__file__).parents[1]
# Lightning 2.6 calls what jsonargparse 4.53 deprecates
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])  # a LightningCLI warns where it is given arguments twice


class Module(Classifier):
    """The classifier, validated on two loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        binary = Rows(9, seed=2)
        binary.y = binary.y.clamp(max=1)
        return [loader(Rows(13, seed=1)), loader(binary)]


def halved(progress: Progress) -> float:
    return 0.5 ** (1 + progress.epoch)


# functions of a user may have annotations or not
def shifted(x, level, *, generator):
    return x + level * torch.rand(x.shape, generator=generator)


def logit_of(module: pl.LightningModule, batch: list[Tensor]) -> Tensor:
    return module(batch[0])[:, 0]


def logits(module, batch):
    return module(batch[0])


def everywhere(batch):
    return torch.ones_like(batch[0])


def whole(batch):
    return torch.full((len(batch[0]), 1), batch[0].shape[1])


@dataclass(frozen=True)
class Brighter:
    """A noise of a user that derives from nothing."""

    by: float = 1.0

    def __call__(self, x, level, *, generator):
        return x + self.by * level


def spec(value: Any) -> Any:
    """What stands for a value in YAML: a class with its arguments, the path of a function, or the value itself."""
    if inspect.isfunction(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial):  # a call that is written down instead of made
        return {"class_path": spec(value.func), "init_args": spec(arguments(value))}
    if isinstance(value, InputNoise):
        return {"class_path": spec(InputNoise), "init_args": spec(kept(value))}
    if dataclasses.is_dataclass(value):
        fields = {field.name: spec(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"class_path": spec(type(value)), "init_args": fields}
    if isinstance(value, Mapping):
        return {key: spec(item) for key, item in value.items()}
    return [spec(item) for item in value] if isinstance(value, list | tuple) else value


def arguments(call: partial) -> dict[str, Any]:
    return dict(inspect.signature(call.func).bind(*call.args, **call.keywords).arguments)


def kept(callback: pl.Callback) -> dict[str, Any]:
    """What a callback was made with; the monitor keeps its noises as a mapping, in whatever form they came."""
    names = inspect.signature(type(callback)).parameters
    return {name: getattr(callback, name) for name in names}


def comparable(value: Any) -> Any:
    """A value in which callbacks, which have no equality, are replaced by what they were made with."""
    if isinstance(value, pl.Callback):
        return type(value), comparable(kept(value))
    return {key: comparable(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def trainer_of(callbacks: list[pl.Callback] | pl.Callback | None = None, default_root_dir: str | None = None) -> pl.Trainer:
    """A trainer with two arguments, because to read the forty of the class takes three times as long."""
    return pl.Trainer(callbacks=callbacks, default_root_dir=default_root_dir, accelerator="cpu", logger=False)


def read(config: Path, *flags: str) -> LightningCLI:
    """What a LightningCLI makes of a file and a command line, without a run."""
    return LightningCLI(Module, Data, trainer_class=trainer_of, run=False, args=["--config", str(config), *flags])


def write(folder: Path, callbacks: list[Any], **trainer: Any) -> Path:
    settings = {"callbacks": spec(callbacks), "default_root_dir": str(folder), **trainer}
    path = folder / "written.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": settings}, sort_keys=False))
    return path


def found(cli: LightningCLI) -> list[Any]:
    """Our callbacks, to be compared."""
    callbacks: list[pl.Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return [
        comparable(callback)
        for callback in callbacks
        if isinstance(callback, NoiseCallback | RobustnessMonitor | ReplayMonitor)
    ]


def saved(cli: LightningCLI) -> Path:
    """The config.yaml that a run would leave, written by the callback that writes it."""
    callbacks: list[pl.Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (save,) = [callback for callback in callbacks if isinstance(callback, SaveConfigCallback)]
    save.setup(cli.trainer, cli.model, "fit")
    return Path(cli.trainer.default_root_dir) / "config.yaml"


def assert_reads_back(call: partial, folder: Path) -> None:
    expected = [comparable(call())]
    cli = read(write(folder, [call]))
    assert found(cli) == expected
    assert found(read(saved(cli))) == expected


# reading takes long, so a run reads both
WRITABLE = [member for member in NOISES if not isinstance(member, noise.Recorded)]  # a file holds the folder of recordings
BOTH = list(islice(zip(cycle(WRITABLE), cycle(SCHEDULES), strict=False), max(len(WRITABLE), len(SCHEDULES))))


@pytest.mark.parametrize(("member", "level"), BOTH, ids=repr)
def test_a_noise_and_a_schedule_read_back_from_a_file_and_from_what_a_run_saves(member, level, tmp_path: Path):
    assert_reads_back(partial(InputNoise, member, level), tmp_path)


def test_a_folder_of_recordings_reads_back_among_other_noises(tmp_path: Path):
    pytest.importorskip("soundfile").write(tmp_path / "hum.wav", [0.5, -0.5], 8000)
    recorded = noise.Recorded(str(tmp_path), sample_rate=8000)
    assert_reads_back(partial(InputNoise, noise.Compose([recorded, noise.Scaled(noise.Gaussian(), 0.5)]), 0.1), tmp_path)


RAMP = schedules.Linear(0.1, 0.5, begin=1, until=3, unit="epoch")


@pytest.mark.parametrize(
    "call",
    [
        partial(InputNoise, noise.Gaussian(), 1, inputs="0.image", clip=(0.0, None), mask="mask", mean=0.5, std=[1.0, 2.0]),
        partial(InputNoise, Brighter(2.0), halved, inputs=2, clip=([0.0, -1.0], [1.0, 2.0])),
        partial(InputNoise, shifted, schedules.Every(halved, every=2), inputs=["x.*", 1], clip=(None, [1.0, 2.0])),
        partial(GradientNoise, noise.Gaussian()),
        partial(GradientNoise, shifted, halved),
        partial(RobustnessMonitor, noise.Gaussian(), inputs="image", target="label"),
        partial(RobustnessMonitor, shifted, [0.1, 2], inputs=[0, "x"], target=2, predict=logits),
        partial(RobustnessMonitor, InputNoise(noise.Uniform(), RAMP, relative="std", name="own"), [0.5]),
        partial(
            RobustnessMonitor,
            [noise.Uniform(), noise.Impulse(low=0.0, high=1.0)],
            clip=(None, [1.0, 2.0]),
            mask="m",
            mean=0.5,
            std=[1.0, 2.0],
        ),
        partial(RobustnessMonitor, [shifted, Brighter(3.0)], {"brighter": [0.1, 0.2], "shifted": [3]}, clip=(0.0, None)),
        partial(RobustnessMonitor, {"salt": noise.Impulse(low=0.0, high=1.0), "mine": shifted, "bright": Brighter()}, [0.1]),
        partial(RobustnessMonitor, {"b": noise.Gaussian(), "a": InputNoise(noise.Speckle(), RAMP)}, {"a": [0.1], "b": [1]}),
    ],
    ids=lambda call: str(spec(call)["init_args"]),
)
def test_every_form_of_an_argument_reads_back(call, tmp_path: Path):
    assert_reads_back(call, tmp_path)


ON_TARGETS = [
    partial(TargetNoise, labels.FlipLabels(3), RAMP, target=1, via="loss", index="i", ignore_index=2, seed=3, name="flips"),
    partial(LabelSmoothing, RAMP, target="y", name="soft"),
    partial(Mixup, RAMP, inputs="x", target="y", mask="m", via="batch", per_sample=True, n_classes=3, seed=3, name="mix"),
    partial(
        CutMix, RAMP, dim=(-1,), inputs=[0], target="y", mask="m", via="batch", per_sample=True, n_classes=3, seed=3, name="cut"
    ),
]
IN_THE_MODEL = [
    partial(WeightNoise, Brighter(2.0), halved, params="net.*"),
    partial(
        WeightNoise,
        noise.Uniform(),
        RAMP,
        relative="filter",
        params=["*.weight"],
        gradient="reparametrized",
        seed=3,
        name="in",
    ),
    partial(GradientNoise, noise.Uniform(), RAMP, seed=3, name="grad"),
    partial(ActivationNoise, noise.Uniform(), RAMP, ["net.1", "net.4"], relative="std", seed=3, name="hidden"),
    partial(EmbeddingNoise, RAMP, modules="words", mask="attention_mask", documents="position_ids", seed=3, name="tokens"),
]
REPLAYS = [
    partial(ReplayMonitor, [noise.Gaussian(), shifted], {"gaussian": [0.1], "shifted": [1.0]}),
    partial(
        ReplayMonitor,
        {"small": noise.Uniform(), "mine": shifted},
        {"small": [0.1, 0.2], "mine": [0.3]},
        inputs=["x.*", 1],
        clip=(None, 2.0),
        relative="std",
        mask="mask",
        mean=[0.1],
        std=2.0,
        every_n_epochs=2,
        max_batches=1,
        seed=4,
        name="again",
    ),
]
LABELS = [
    labels.SmoothLabels(),
    labels.SmoothLabels(n_classes=4),
    labels.FlipLabels(3),
    labels.ConfusionFlips([[0.9, 0.1], [0.5, 0.5]]),
    noise.Gaussian(),
    shifted,
]


GOVERNOR = partial(
    Governor,
    chance=0.4,
    best=0.9,
    retain=0.8,
    step=0.1,
    lo=0.05,
    hi=2.0,
    average=0.5,
    warmup=1,
    min_skill=0.2,
    z=1.0,
)
ADAPTIVE = partial(
    AdaptiveLevel,
    GOVERNOR(),
    0.1,
    task=tasks.Multilabel(),
    inputs=["x.*", 1],
    target="y",
    predict=logits,
    max_batches=3,
)
GAP = partial(SignedGap, step=0.02, hi=0.5, average=0.4, z=1.5)


@pytest.mark.parametrize(
    "call",
    [
        partial(InputNoise, noise.Gaussian(), ADAPTIVE()),
        partial(WeightNoise, noise.Gaussian(), AdaptiveLevel(Governor(0.1)), relative="std"),
        partial(ActivationNoise, noise.Speckle(), AdaptiveLevel(Governor(0.1), inputs=0, target=1), "net.1"),
        partial(EmbeddingNoise, AdaptiveLevel(Governor(0.1))),
        partial(LabelSmoothing, AdaptiveLevel(GAP(), 0.1, task=tasks.Binary())),
        partial(GradientNoise, noise.Gaussian(), AdaptiveLevel(GAP())),
    ],
    ids=lambda call: call.func.__name__,
)
def test_an_adaptive_level_reads_back(call, tmp_path: Path):
    assert_reads_back(call, tmp_path)


def test_an_adaptive_level_by_a_metric_of_ones_own_reads_back(tmp_path: Path):
    own: Any = partial(MulticlassAccuracy, 3, average="micro")
    task: Any = partial(tasks.Custom, own)
    level: Any = partial(AdaptiveLevel, Governor(0.3), task=task)
    cli = read(write(tmp_path, [partial(InputNoise, noise.Gaussian(), level)]))
    for each in (cli, read(saved(cli))):
        callbacks: list[pl.Callback] = each.trainer.callbacks  # type: ignore[attr-defined]
        (read_back,) = [callback.level for callback in callbacks if isinstance(callback, InputNoise)]
        assert isinstance(read_back, AdaptiveLevel)
        assert isinstance(read_back.task, tasks.Custom)
        assert isinstance(read_back.task.collection, MulticlassAccuracy)
        assert (read_back.task.collection.average, read_back.rule) == ("micro", Governor(0.3))


@pytest.mark.parametrize("call", ON_TARGETS, ids=lambda call: call.func.__name__)
def test_noise_in_targets_reads_back_with_all_arguments(call, tmp_path: Path):
    assert_reads_back(call, tmp_path)


@pytest.mark.parametrize("call", IN_THE_MODEL, ids=lambda call: str(spec(call)["init_args"]))
def test_noise_in_the_model_reads_back(call, tmp_path: Path):
    assert_reads_back(call, tmp_path)


def test_metrics_of_ones_own_read_back(tmp_path: Path):
    hits: Any = partial(MulticlassAccuracy, 3, average="micro")
    metrics: Any = partial(MetricCollection, {"hits": hits})
    custom: Any = partial(tasks.Custom, metrics)
    cli = read(write(tmp_path, [partial(RobustnessMonitor, noise.Gaussian(), task=custom)]))
    for each in (cli, read(saved(cli))):
        callbacks: list[pl.Callback] = each.trainer.callbacks  # type: ignore[attr-defined]
        (task,) = [callback.task for callback in callbacks if isinstance(callback, RobustnessMonitor)]
        assert isinstance(task, tasks.Custom)
        read_back = task.collection
        assert isinstance(read_back, MetricCollection)
        assert isinstance(read_back["hits"], MulticlassAccuracy)
        assert read_back["hits"].average == "micro"


@pytest.mark.parametrize("call", REPLAYS, ids=lambda call: str(spec(call)["init_args"]))
def test_a_replay_reads_back(call, tmp_path: Path):
    assert_reads_back(call, tmp_path)


@pytest.mark.parametrize("member", LABELS, ids=lambda member: getattr(member, "__name__", repr(member)))
def test_a_label_noise_reads_back(member, tmp_path: Path):
    assert_reads_back(partial(TargetNoise, member, 0.1), tmp_path)


CALLBACKS = [
    partial(
        InputNoise,
        noise.Uniform(),
        RAMP,
        inputs=[0],
        probability=0.5,
        per_sample=True,
        relative="std",
        clip=(-9.0, None),
        mask=everywhere,
        documents=whole,
        mean=0.1,
        std=2.0,
        seed=3,
        name="first",
    ),
    partial(
        RobustnessMonitor,
        {"small": noise.Gaussian(), "mine": shifted},
        {"small": [0.1, 0.2], "mine": [0.3]},
        inputs=0,
        target=1,
        predict=logit_of,
        task=tasks.Binary(),
        logged=["accuracy", "brier"],
        n_draws=2,
        baseline="earlier",
        clip=(-9.0, 9.0),
        relative="std",
        mask=everywhere,
        mean=0.5,
        std=2.0,
        every_n_epochs=2,
        max_batches=1,
        dataloader_idx=1,
        class_names=["zero", "one"],
        seed=4,
        name="second",
    ),
]

# the same two; a class of the package may be named without its module, once the package is imported
FLAGS = """
    --trainer.callbacks+=InputNoise
    --trainer.callbacks.noise=Uniform
    --trainer.callbacks.level=Linear
    --trainer.callbacks.level.start=0.1
    --trainer.callbacks.level.end=0.5
    --trainer.callbacks.level.begin=1
    --trainer.callbacks.level.until=3
    --trainer.callbacks.level.unit=epoch
    --trainer.callbacks.inputs=[0]
    --trainer.callbacks.probability=0.5
    --trainer.callbacks.per_sample=true
    --trainer.callbacks.relative=std
    --trainer.callbacks.clip=[-9.0, null]
    --trainer.callbacks.mask=test_cli.everywhere
    --trainer.callbacks.documents=test_cli.whole
    --trainer.callbacks.mean=0.1
    --trainer.callbacks.std=2.0
    --trainer.callbacks.seed=3
    --trainer.callbacks.name=first
    --trainer.callbacks+=RobustnessMonitor
    --trainer.callbacks.noises.small=Gaussian
    --trainer.callbacks.noises.mine=test_cli.shifted
    --trainer.callbacks.levels={small: [0.1, 0.2], mine: [0.3]}
    --trainer.callbacks.inputs=0
    --trainer.callbacks.target=1
    --trainer.callbacks.predict=test_cli.logit_of
    --trainer.callbacks.task=Binary
    --trainer.callbacks.logged=[accuracy, brier]
    --trainer.callbacks.n_draws=2
    --trainer.callbacks.baseline=earlier
    --trainer.callbacks.mask=test_cli.everywhere
    --trainer.callbacks.mean=0.5
    --trainer.callbacks.std=2.0
    --trainer.callbacks.clip=[-9.0, 9.0]
    --trainer.callbacks.relative=std
    --trainer.callbacks.every_n_epochs=2
    --trainer.callbacks.max_batches=1
    --trainer.callbacks.dataloader_idx=1
    --trainer.callbacks.class_names=[zero, one]
    --trainer.callbacks.seed=4
    --trainer.callbacks.name=second
"""
SETTINGS = {
    "accelerator": "cpu",
    "logger": False,
    "max_epochs": 2,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize(
    "call",
    [*CALLBACKS, *ON_TARGETS, *IN_THE_MODEL[1:], *REPLAYS[1:], GOVERNOR, ADAPTIVE, GAP],
    ids=lambda call: call.func.__name__,
)
def test_no_argument_is_left_at_its_default(call):
    given = arguments(call)
    for name, parameter in inspect.signature(call.func).parameters.items():
        assert name in given, f"{name} is not written in YAML by any test"
        assert given[name] != parameter.default, name


def fit(config: Path, *flags: str) -> LightningCLI:
    return LightningCLI(Module, Data, args=["fit", "--config", str(config), *flags], save_config_kwargs={"overwrite": True})


@pytest.mark.parametrize("way", ["file", "command line"])
def test_a_run_repeats_itself_from_the_config_that_it_saves(way, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimates = [Estimate(Condition("small", level), "accuracy", 0.5) for level in (0.1, 0.2)]
    described = "Gaussian(), relative='std', clip=(-9.0, 9.0), mask=<function everywhere>, mean=0.5, std=2.0"
    noises, levels = {"small": described}, {"small": (0.1, 0.2)}
    report.write("earlier", report.Report("binary", 0, 1, 0, noises, levels, (), (), tuple(estimates)))
    expected = [comparable(call()) for call in CALLBACKS]
    config = write(tmp_path, CALLBACKS if way == "file" else [], **SETTINGS)
    flags = [line.strip() for line in FLAGS.strip().splitlines()] if way == "command line" else []
    first = fit(config, *flags)
    assert found(first) == expected
    keys = {"second_levels/small/0.1/accuracy", "second_levels/small/0.1/brier", "second/mce"}
    assert keys <= first.trainer.callback_metrics.keys()
    second = fit(tmp_path / "config.yaml")
    assert found(second) == expected
    assert_same(weights(first.model), weights(second.model))
    # in words, as what is not a number does not equal itself
    one, two = ({key: str(value.item()) for key, value in cli.trainer.callback_metrics.items()} for cli in (first, second))
    assert one == two


def test_the_command_line_changes_one_argument_of_the_last_callback_of_a_file(tmp_path: Path):
    config = write(tmp_path, [CALLBACKS[1], CALLBACKS[0]])
    changed = schedules.Linear(0.1, 0.9, begin=1, until=3, unit="epoch")
    callbacks = read(config, "--trainer.callbacks.level.end=0.9").trainer.callbacks  # type: ignore[attr-defined]
    assert [callback.level for callback in callbacks if isinstance(callback, InputNoise)] == [changed]


def test_a_class_of_the_package_may_be_named_without_its_module(tmp_path: Path):
    level = {"class_path": "Product", "init_args": {"factors": [{"class_path": "Constant", "init_args": {"value": 0.5}}, 0.4]}}
    short = {"class_path": "InputNoise", "init_args": {"noise": "Gaussian", "level": level}}
    assert found(read(write(tmp_path, [short]))) == [
        comparable(InputNoise(noise.Gaussian(), schedules.Product([schedules.Constant(0.5), 0.4])))
    ]


LINEAR = {"class_path": "lightning_noise.schedules.Linear", "init_args": {"start": 0.0, "end": 0.5}}


def adapted(rule: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    governor = {"class_path": "lightning_noise.rules.Governor", "init_args": {"chance": 0.1} | (rule or {})}
    return {"class_path": "lightning_noise.AdaptiveLevel", "init_args": {"rule": governor} | changed}


def linear(**changed: Any) -> dict[str, Any]:
    return {"class_path": LINEAR["class_path"], "init_args": LINEAR["init_args"] | changed}


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("InputNoise", {"levle": 0.1}, ["Option 'levle' is not accepted"]),
        ("InputNoise", {"level": "much"}, ['"level"', "Expected a dot import path string: much"]),
        (
            "InputNoise",
            {"level": linear(start="abc")},
            ['"level"', "schedules.Linear", '"start"', "a <class 'float'>. Got value: abc"],
        ),
        ("InputNoise", {"level": linear(unit="weeks")}, ['"level"', "schedules.Linear", '"unit"', "'step']. Got value: weeks"]),
        ("InputNoise", {"level": linear(untill=0.5)}, ['"level"', "schedules.Linear", "Option 'untill' is not accepted"]),
        (
            "InputNoise",
            {"noise": "lightning_noise.noise.Gauss"},
            ['"noise"', "'lightning_noise.noise' has no attribute 'Gauss'"],
        ),
        ("InputNoise", {"level": adapted({"factr": 0.5})}, ['"level"', "AdaptiveLevel", "Option 'factr' is not accepted"]),
        ("InputNoise", {"level": adapted(task="accuracy")}, ['"level"', "AdaptiveLevel", "accuracy"]),
        (
            "InputNoise",
            {"level": {"class_path": "Window", "init_args": {"level": adapted(), "until": 0.5}}},
            ['"level"', "Window", "AdaptiveLevel"],
        ),
        ("InputNoise", {"probability": "half"}, ['"probability"', "a <class 'float'>. Got value: half"]),
        ("InputNoise", {"clip": [0.0]}, ['"clip"', "Expected a tuple with 2 elements"]),
        ("RobustnessMonitor", {"noises": ["Gaussian", "Gauss"]}, ['"noises"', "Expected a dot import path string: Gauss"]),
        (
            "RobustnessMonitor",
            {"noises": [{"class_path": "lightning_noise.noise.Impulse", "init_args": {"lo": 0.0}}]},
            ['"noises"', "noise.Impulse", "Option 'lo' is not accepted"],
        ),
        (
            "RobustnessMonitor",
            {"levels": 0.1},
            ['"levels"', "Expected a <class 'collections.abc.Sequence'>", "Given value: 0.1"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_said_with_the_name_of_the_argument(kind, changed, message, tmp_path: Path, capsys):
    required = {"noise": "Gaussian", "level": 0.1} if kind == "InputNoise" else {"noises": "Gaussian"}
    with pytest.raises(SystemExit) as stopped:
        read(write(tmp_path, [{"class_path": kind, "init_args": required | changed}]))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.partition("error: ")[2]
    assert re.search(".*".join(map(re.escape, [kind, *message])), said, re.DOTALL), said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"level": -0.1}, "a level must be finite and not negative, got -0.1"),
        (
            {"level": linear(begin=0.6, until=0.3)},
            "times must satisfy 0 <= begin < until <= 1 for unit='fraction', got begin=0.6 and until=0.3",
        ),
        (
            {"level": {"class_path": "lightning_noise.noise.Gaussian"}},
            "level must be a number, a schedule, a callable or an AdaptiveLevel",
        ),
        ({"level": adapted({"retain": 2.0})}, "a Governor needs 0 <= retain < 1, got Governor(chance=0.1"),
        ({"level": adapted({"hi": 0.5}, start=0.6)}, "the level must start in [0, 0.5], got start=0.6"),
        ({"level": adapted(max_batches=0)}, "max_batches must be at least 1, got 0"),
        ({"noise": LINEAR}, "a noise must be a value such as noise.Gaussian(), got Linear("),
        ({"clip": [1.0, 0.0]}, "clip must be a pair (low, high) with low < high"),
        ({"noise": "Impulse", "level": 1.5}, "a level must be in [0, 1], got 1.5"),
    ],
    ids=str,
)
def test_what_is_read_but_wrong_is_refused_in_the_words_of_the_class(changed, message, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write(tmp_path, [{"class_path": "InputNoise", "init_args": {"noise": "Gaussian", "level": 0.1} | changed}]))


def test_the_lines_of_the_guide_read(tmp_path: Path):
    (lines,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "howto" / "cli.md").read_text(), re.DOTALL)
    config = tmp_path / "guide.yaml"
    config.write_text(lines)
    assert found(read(config, "--seed_everything=0")) == [
        comparable(
            RobustnessMonitor([noise.Gaussian(), noise.Impulse()], {"gaussian": [0.1, 0.2, 0.4], "impulse": [0.05, 0.1]})
        ),
        comparable(InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.5, begin=0.1, until=0.6))),
    ]


def test_the_guide_nests_noises(tmp_path: Path):
    (nested,) = re.findall(r"`(noise: {.*?}})`", (ROOT / "docs" / "howto" / "cli.md").read_text(), re.DOTALL)
    callback = {"class_path": "lightning_noise.InputNoise", "init_args": {**yaml.safe_load(nested), "level": 0.1}}
    config = tmp_path / "guide.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    both = noise.Compose([noise.Shot(), noise.Gaussian()])
    assert found(read(config, "--seed_everything=0")) == [comparable(InputNoise(both, 0.1))]


@pytest.mark.slow
def test_the_example_trains_in_growing_noise_and_keeps_the_weights_with_the_best_score(tmp_path: Path, monkeypatch):
    folder = ROOT / "notebooks" / "configs"
    flags = ["--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks.level.end=0.8"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    monkeypatch.setattr(sys, "argv", ["digits.py", "fit", "--config", str(folder / "noise.yaml"), *flags, *quiet])
    cli = runpy.run_path(str(folder / "digits.py"), run_name="__main__")["cli"]
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, InputNoise)]
    assert callback.level == schedules.Linear(0.0, 0.8, until=0.5)
    assert callback.current_level == 0.8
    best = cli.trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    assert best.best_model_score is not None
    score = best.best_model_score.item()
    assert score >= cli.trainer.callback_metrics["robustness/score"].item()
    assert score > 0.3  # of ten classes
    assert Path(best.best_model_path).name.endswith(f"-score={score:.3f}.ckpt")
    assert Path(best.best_model_path).is_file()
    assert (Path(cli.trainer.log_dir) / "config.yaml").is_file()
