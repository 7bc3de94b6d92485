"""Misuses, each with the exact message of its error, in one table: `misuses.txt` holds the messages by name.

`python tests/test_misuses.py` writes the messages anew, to be read as a diff.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Rows, loader, make_trainer, weights
from jsonargparse import ArgumentError
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    CutMix,
    EmbeddingNoise,
    InputNoise,
    LabelSmoothing,
    Mixup,
    RandomizedSmoothing,
    ReplayMonitor,
    RobustnessMonitor,
    TargetNoise,
    WeightNoise,
    __version__,
    labels,
    masks,
    noise,
    report,
    rules,
    schedules,
    tasks,
)

MESSAGES = Path(__file__).with_name("misuses.txt")
GAUSSIAN = noise.Gaussian()
Misuse = Callable[[], object]


def flipped(x: Tensor) -> Tensor:
    return x.flip(-1)


# --- what is wrong by itself

VALUES: dict[str, Misuse] = {
    "a negative level": lambda: InputNoise(GAUSSIAN, -0.1),
    "a level that is NaN": lambda: InputNoise(GAUSSIAN, float("nan")),
    "an infinite level": lambda: InputNoise(GAUSSIAN, float("inf")),
    "a level that is None in words": lambda: InputNoise(GAUSSIAN, "None"),  # type: ignore[arg-type]
    "a boolean level": lambda: InputNoise(GAUSSIAN, True),
    "a tensor as level": lambda: InputNoise(GAUSSIAN, torch.tensor([0.1, 0.2])),  # type: ignore[arg-type]
    "a share above 1": lambda: InputNoise(noise.Impulse(), 1.5),
    "a class in place of a noise": lambda: InputNoise(noise.Speckle, 0.1),  # type: ignore[arg-type]
    "a class in place of a schedule": lambda: InputNoise(GAUSSIAN, schedules.Linear),  # type: ignore[arg-type]
    "two noises": lambda: InputNoise([GAUSSIAN, noise.Impulse()], 0.1),  # type: ignore[arg-type]
    "noise and level in the wrong order": lambda: InputNoise(0.1, GAUSSIAN),  # type: ignore[arg-type]
    "an argument of another library": lambda: InputNoise(GAUSSIAN, std_dev=0.1),  # type: ignore[call-arg]
    "a mistyped argument": lambda: InputNoise(GAUSSIAN, 0.1, probabilty=0.5),  # type: ignore[call-arg]
    "a probability in percent": lambda: InputNoise(GAUSSIAN, 0.1, probability=20),
    "a probability in words": lambda: InputNoise(GAUSSIAN, 0.1, probability="0.5"),  # type: ignore[arg-type]
    "bounds in the wrong order": lambda: InputNoise(GAUSSIAN, 0.1, clip=(1.0, 0.0)),
    "one bound": lambda: InputNoise(GAUSSIAN, 0.1, clip=1.0),  # type: ignore[arg-type]
    "a bound that is NaN": lambda: InputNoise(GAUSSIAN, 0.1, clip=(0.0, float("nan"))),
    "an unknown unit": lambda: InputNoise(GAUSSIAN, 0.1, relative="rms"),  # type: ignore[arg-type]
    "a unit for noise without one": lambda: InputNoise(noise.Impulse(), 0.1, relative="std"),
    "a negative deviation of the data": lambda: InputNoise(GAUSSIAN, 0.1, std=-1.0),
    "a deviation of zero": lambda: InputNoise(GAUSSIAN, 0.1, std=[0.2, 0.0, 0.2]),
    "inputs that are a tensor": lambda: fit(InputNoise(GAUSSIAN, 0.1, inputs=torch.zeros(2))),  # type: ignore[arg-type]
    "a function without a generator": lambda: InputNoise(lambda x, level: x + level, 0.1),
    "a transform without a level": lambda: noise.Transform(flipped),
    "noises that are no list": lambda: noise.Compose(GAUSSIAN, noise.Impulse()),  # type: ignore[call-arg]
    "probabilities of noises": lambda: noise.OneOf([GAUSSIAN, noise.Impulse()], probabilities=[0.5, 0.5]),  # type: ignore[call-arg]
    "a factor and its noise in the wrong order": lambda: noise.Scaled(2.0, GAUSSIAN),  # type: ignore[arg-type]
    "a schedule in a monitor": lambda: RobustnessMonitor(GAUSSIAN, [schedules.Linear(0.0, 0.5)]),  # type: ignore[list-item]
    "a noise as sigma": lambda: RandomizedSmoothing(GAUSSIAN),  # type: ignore[arg-type]
    "a share of the skill as a rule": lambda: AdaptiveLevel(0.8),  # type: ignore[arg-type]
    "an exponent by its letter": lambda: noise.ColoredNoise(alpha=1.0),  # type: ignore[call-arg]
    "an exponent in words": lambda: noise.ColoredNoise("pink"),  # type: ignore[arg-type]
    "an axis that is the batch": lambda: noise.Drift(dim=0),
    "a share of a mask above 1": lambda: InputNoise(noise.Masking(), 2.0),
    "a negative patch": lambda: noise.PatchGaussian(-3),
    "no classes": lambda: labels.FlipLabels(0),
    "one class": lambda: labels.FlipLabels(1),
    "smoothing above 1": lambda: LabelSmoothing(1.1),
    "an unknown place of the labels": lambda: TargetNoise(labels.FlipLabels(3), 0.1, via="loss function"),  # type: ignore[arg-type]
    "two targets": lambda: TargetNoise(labels.FlipLabels(3), 0.1, target=["a", "b"]),  # type: ignore[arg-type]
    "a mask of Mixup as a function": lambda: Mixup(0.2, mask=lambda batch: batch),  # type: ignore[arg-type]
    "a negative Mixup": lambda: Mixup(-1.0),
    "a box without axes": lambda: CutMix(1.0, dim=()),
    "a box over the batch": lambda: CutMix(1.0, dim=(0,)),
    "a fraction above 1": lambda: schedules.Linear(0.0, 0.5, until=1.5),
    "an end before the begin": lambda: schedules.Linear(0.0, 0.5, begin=0.6, until=0.2),
    "an unknown unit of time": lambda: schedules.Linear(0.0, 0.5, until=3, unit="epochs"),  # type: ignore[arg-type]
    "a negative time": lambda: schedules.Linear(0.0, 0.5, begin=-1, until=3, unit="epoch"),
    "an exponential from zero": lambda: schedules.Exponential(0.0, 0.5),
    "a period of zero": lambda: schedules.Cyclic(0.0, 0.5, every=0),
    "more boundaries than pieces": lambda: schedules.Piecewise([0.1, 0.2], [0.1, 0.2]),
    "pieces out of order": lambda: schedules.Piecewise([0.1, 0.2, 0.3], [0.5, 0.2]),
    "a schedule of None": lambda: schedules.Constant(None),  # type: ignore[arg-type]
    "a ramp from None": lambda: schedules.Linear(None, 0.5),  # type: ignore[arg-type]
    "bounds of a rule in the wrong order": lambda: rules.Governor(lo=0.5, hi=0.1),
    "a start outside of the bounds": lambda: AdaptiveLevel(rules.Governor(hi=0.2), start=0.5),
    "an unknown rule": lambda: AdaptiveLevel("governor"),  # type: ignore[arg-type]
    "a task in words": lambda: RobustnessMonitor(task="binary"),  # type: ignore[arg-type]
    "a metric in place of a task": lambda: RobustnessMonitor(task=_accuracy()),  # type: ignore[arg-type]
    "a number of classes": lambda: tasks.Multiclass(3),  # type: ignore[call-arg]
    "classes on the axis of the samples": lambda: tasks.Multiclass(class_dim=0),
    "a level in place of levels": lambda: RobustnessMonitor(GAUSSIAN, 0.1),  # type: ignore[arg-type]
    "no levels": lambda: RobustnessMonitor(GAUSSIAN, []),
    "negative levels": lambda: RobustnessMonitor(GAUSSIAN, [-0.1]),
    "a level twice": lambda: RobustnessMonitor(GAUSSIAN, [0.1, 0.1]),
    "levels of an unknown noise": lambda: RobustnessMonitor(GAUSSIAN, {"gausian": [0.1]}),
    "levels of several units": lambda: RobustnessMonitor([GAUSSIAN, noise.Impulse()], [0.1]),
    "a noise twice": lambda: RobustnessMonitor([GAUSSIAN, noise.Gaussian()], [0.1]),
    "no noises": lambda: RobustnessMonitor([], [0.1]),
    "a callback that cannot probe": lambda: RobustnessMonitor(Mixup(0.2)),
    "a noise of other rows": lambda: RobustnessMonitor(noise.SwapNoise(), [0.1]),
    "an unknown metric": lambda: RobustnessMonitor(logged=["auroc"]),
    "no epochs": lambda: RobustnessMonitor(every_n_epochs=0),
    "no batches": lambda: RobustnessMonitor(max_batches=0),
    "half a draw": lambda: RobustnessMonitor(n_draws=0.5),  # type: ignore[arg-type]
    "a name of classes": lambda: RobustnessMonitor(class_names="cat"),
    "a key in place of predictions": lambda: RobustnessMonitor(predict="logits"),  # type: ignore[arg-type]
    "a target of a replay": lambda: ReplayMonitor(target="y"),  # type: ignore[call-arg]
    "a mask in words and a tensor": lambda: masks.find_mask({"x": torch.ones(2)}, torch.ones(2)),  # type: ignore[arg-type]
    "a mask of other positions": lambda: masks.align_mask(torch.ones(2, 3).bool(), torch.ones(2, 4)),
    "integers under a noise of floats": lambda: GAUSSIAN(torch.ones(2).long(), 0.1, generator=torch.Generator()),
    "negative intensities": lambda: noise.Shot()(-torch.ones(2, 2), 0.1, generator=torch.Generator()),
}


def _accuracy() -> Any:
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(N_CLASSES)


# --- what the batch, the module, the trainer or a file refutes


class Dropped(Classifier):
    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list | tuple) else batch
        return sum(parameter.square().sum() for parameter in self.net.parameters()) + (
            0 * x.sum() if isinstance(x, Tensor) and x.is_floating_point() else 0
        )

    def validation_step(self, batch, batch_idx):
        pass


def fit(
    *callbacks: Any, module: Any = Classifier, data: Any = None, validation: Any = None, path: Any = None, **kwargs: Any
) -> None:
    """Fits, and asserts after an exception that the module is as it was, or as its last update left it."""
    pl.seed_everything(0, verbose=False)
    made = module() if isinstance(module, type) else module
    made.lr = 0.0
    before = weights(made)
    train = loader(Rows(16)) if data is None else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(callbacks, **{"max_epochs": 1, **kwargs})
        try:
            trainer.fit(made, train, train if validation is None else validation, ckpt_path=path)
        finally:
            assert all(torch.equal(one, two) for one, two in zip(weights(made), before, strict=True)), "the weights are dirty"


def of_batch(batch: Any, *callbacks: Any) -> Misuse:
    return lambda: fit(*callbacks, module=Dropped, data=DataLoader([batch], batch_size=None, collate_fn=lambda each: each))  # type: ignore[arg-type]


class Later(pl.Callback):
    """Adds a callback while the training runs."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.callbacks.append(InputNoise(GAUSSIAN, 0.1))  # type: ignore[attr-defined]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([Rows(16)[i] for i in range(16)])


class Probabilities(Classifier):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Number(Classifier):
    def forward(self, x):
        return super().forward(x)[:, 0]


class WithoutForward(Dropped):
    forward = pl.LightningModule.forward


class WithoutLoss(Classifier):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


class Smoothed(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


class WithoutValidation(Classifier):
    validation_step: Any = pl.LightningModule.validation_step  # type: ignore[assignment]


class Fetching(Dropped):
    def validation_step(self, dataloader_iter):  # type: ignore[override]
        next(dataloader_iter)


class Cli(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.set_defaults({"trainer.logger": False, "trainer.enable_checkpointing": False})


def read(*lines: str) -> None:
    """Reads a configuration with a callback."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text("trainer:\n  callbacks:\n" + "".join(f"    {line}\n" for line in lines))
        options: Any = {"save_config_callback": None, "parser_kwargs": {"exit_on_error": False}}
        Cli(Classifier, args=["--config", str(path)], run=False, **options)


def resumed(change: Callable[[dict[str, Any]], None], *callbacks: Any, saved: Any = None) -> Misuse:
    """Saves a run, changes the checkpoint, and resumes."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            kept = [InputNoise(GAUSSIAN, AdaptiveLevel(rules.Governor(chance=0.3)))] if saved is None else saved
            fit(*kept, ModelCheckpoint(folder, filename="a"), enable_checkpointing=True)
            checkpoint = torch.load(f"{folder}/a.ckpt", weights_only=False)
            change(checkpoint)
            torch.save(checkpoint, f"{folder}/b.ckpt")
            fit(*callbacks, path=f"{folder}/b.ckpt", max_epochs=2)

    return run


def state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return next(state for key, state in checkpoint["callbacks"].items() if key.startswith("InputNoise"))


def of_report(text: str) -> Misuse:
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "report.json").write_text(text)
            report.read(f"{folder}/report.json")

    return run


X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
MONITOR: Callable[..., Any] = lambda **kwargs: RobustnessMonitor(GAUSSIAN, [0.1], **kwargs)  # noqa: E731
ADAPTIVE = AdaptiveLevel(rules.Governor(chance=0.3))

RUNS: dict[str, Misuse] = {
    # batches
    "a leaf that is not there": of_batch({"x": X, "y": Y}, InputNoise(GAUSSIAN, 0.1, inputs="image")),
    "a mistyped leaf": of_batch({"image": X, "x": X}, InputNoise(GAUSSIAN, 0.1, inputs="imgae")),
    "an index of a dict": of_batch({"x": X, "y": Y}, InputNoise(GAUSSIAN, 0.1, inputs=0)),
    "a key of a tuple": of_batch((X, Y), InputNoise(GAUSSIAN, 0.1, inputs="x")),
    "several floats": of_batch({"x": X, "z": X}, InputNoise(GAUSSIAN, 0.1)),
    "token ids": of_batch({"input_ids": Y[:, None], "attention_mask": Y[:, None]}, InputNoise(GAUSSIAN, 0.1)),
    "integers": of_batch((Y, Y), InputNoise(GAUSSIAN, 0.1)),
    "bytes of images": of_batch((X.to(torch.uint8), Y), InputNoise(GAUSSIAN, 0.1)),
    "complex numbers": of_batch((torch.complex(X, X), Y), InputNoise(noise.Impulse(), 0.1)),
    "one number": of_batch({"x": torch.tensor(1.0), "y": Y}, InputNoise(GAUSSIAN, 0.1)),
    "a sparse tensor": of_batch((X.to_sparse(), Y), InputNoise(GAUSSIAN, 0.1)),
    "a packed sequence": of_batch((pack_sequence([X[0], X[1]]), Y), InputNoise(GAUSSIAN, 0.1)),
    "no tensor": of_batch({"x": "a"}, InputNoise(GAUSSIAN, 0.1)),
    "a mask of another shape": of_batch({"x": X, "mask": torch.ones(4, 7)}, InputNoise(GAUSSIAN, 0.1, mask="mask")),
    "lengths for a mask": of_batch({"x": X, "lengths": Y}, InputNoise(GAUSSIAN, 0.1, mask="lengths")),
    "a mask that is ambiguous": of_batch(
        {"x": torch.ones(4, 8, 8), "mask": torch.ones(4, 8).bool()}, InputNoise(GAUSSIAN, 0.1, inputs="x", mask="mask")
    ),
    "ids of documents": of_batch(
        {"x": X, "ids": torch.full((4, 8), 3)}, InputNoise(noise.Drift(), 0.1, inputs="x", documents="ids")
    ),
    "relative noise in single numbers": of_batch((X[:, :1], Y), InputNoise(GAUSSIAN, 0.1, relative="std")),
    "channels that do not fit": of_batch((X, Y), InputNoise(GAUSSIAN, 0.1, mean=[0.1, 0.2, 0.3])),
    "an axis that the input lacks": of_batch((X, Y), InputNoise(noise.Masking(dim=(-2, -1)), 0.1)),
    "negative intensities in a batch": of_batch((X, Y), InputNoise(noise.Shot(), 0.1)),
    "Mixup of labels alone": of_batch((Y, Y), Mixup(0.2)),
    "Mixup of other rows": of_batch((X, Y[:3]), Mixup(0.2)),
    "Mixup without a target": of_batch(X, Mixup(0.2)),
    "CutMix of rows": of_batch((X, Y), CutMix(1.0)),
    "flipped floats": of_batch((X, X[:, 0]), TargetNoise(labels.FlipLabels(3), 0.1)),
    "labels beyond the classes": of_batch((X, Y + 5), TargetNoise(labels.FlipLabels(3), 0.1)),
    "an index that is no integer": of_batch((X, Y, X[:, 0]), TargetNoise(labels.FlipLabels(3), 0.1, index=2)),
    # modules
    "a loss that does not know the target": lambda: fit(LabelSmoothing(0.1), module=WithoutLoss),
    "a loss that smooths itself": lambda: fit(LabelSmoothing(0.1), module=Smoothed),
    "a layer that is a module": lambda: fit(ActivationNoise(GAUSSIAN, 0.1, nn.Linear(1, 1))),  # type: ignore[arg-type]
    "a layer that is not there": lambda: fit(ActivationNoise(GAUSSIAN, 0.1, "encoder.*")),
    "weights that are not there": lambda: fit(WeightNoise(GAUSSIAN, 0.1, params="encoder.*")),
    "no embeddings": lambda: fit(EmbeddingNoise(0.1)),
    "probabilities": lambda: fit(MONITOR(), module=Probabilities),
    "one output for classes": lambda: fit(MONITOR(), module=Number),
    "no forward": lambda: fit(MONITOR(), module=WithoutForward),
    "labels for a regression": lambda: fit(MONITOR(task=tasks.Regression())),
    "classes for yes or no": lambda: fit(MONITOR(task=tasks.Binary())),
    "another target": lambda: fit(MONITOR(target=0)),
    "no target of this name": lambda: fit(MONITOR(target="label")),
    "a replay of an iterator": lambda: fit(ReplayMonitor(GAUSSIAN, [0.1]), module=Fetching),
    # trainers
    "no level": lambda: fit(InputNoise(GAUSSIAN)),
    "two callbacks of one name": lambda: fit(InputNoise(GAUSSIAN, 0.1), InputNoise(GAUSSIAN, 0.2)),
    "two monitors of one name": lambda: fit(MONITOR(), RobustnessMonitor(noise.Impulse(), [0.1])),
    "a callback that comes late": lambda: fit(InputNoise(GAUSSIAN, 0.1, name="other"), Later()),
    "labels that change after they were read": lambda: fit(LabelSmoothing(0.1), TargetNoise(labels.FlipLabels(3), 0.1)),
    "no validation": lambda: fit(MONITOR(), module=WithoutValidation),
    "no validation for an adaptive level": lambda: fit(InputNoise(GAUSSIAN, ADAPTIVE), limit_val_batches=0),
    "a validation that never comes": lambda: fit(MONITOR(every_n_epochs=5)),
    "an empty validation": lambda: fit(MONITOR(), validation=loader(Rows(0))),
    "an empty validation for an adaptive level": lambda: fit(InputNoise(GAUSSIAN, ADAPTIVE), validation=loader(Rows(0))),
    "another loader": lambda: fit(MONITOR(dataloader_idx=1)),
    "fractions of a stream": lambda: fit(InputNoise(GAUSSIAN, schedules.Linear(0.0, 0.5)), data=DataLoader(Stream(), 4)),
    "a run without end": lambda: fit(InputNoise(GAUSSIAN, schedules.Linear(0.0, 0.5)), max_epochs=-1),
    "a schedule beyond the noise": lambda: fit(InputNoise(noise.Impulse(), schedules.Linear(0.0, 4.0))),
    "a schedule that is negative": lambda: fit(InputNoise(GAUSSIAN, lambda progress: -0.1)),
    "a schedule that returns nothing": lambda: fit(InputNoise(GAUSSIAN, lambda progress: None)),  # type: ignore[arg-type,return-value]
    "a mistyped key of a checkpoint": lambda: fit(
        MONITOR(), ModelCheckpoint(monitor="robustness/scor"), enable_checkpointing=True
    ),
    "a mistyped key to stop at": lambda: fit(MONITOR(), EarlyStopping("robustness/accuracy_cleen")),
    "a value among the callbacks": lambda: fit(GAUSSIAN),
    "a baseline that is not there": lambda: fit(MONITOR(baseline="nowhere/report.json")),
    # data that are no numbers
    "numbers for classes": lambda: fit(MONITOR(), validation=loader(TensorDataset(X, X[:, 0]))),
    "a label to ignore": lambda: fit(MONITOR(), validation=loader(TensorDataset(X, torch.tensor([0, 1, -100, 2])))),
    "labels that begin at 1": lambda: fit(MONITOR(), validation=loader(TensorDataset(X, Y + 1))),
    # checkpoints
    "a level that is NaN in a state": resumed(lambda c: _spoil(state_of(c)), InputNoise(GAUSSIAN, ADAPTIVE)),
    # reports
    "a report that is no JSON": of_report("not JSON"),
    "a report of something else": of_report(json.dumps({"a": 1})),
    "an empty report": of_report(""),
}


def _spoil(state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, dict):
            _spoil(value)
        elif key == "level":
            state[key] = float("nan")


def message_of(misuse: Misuse) -> str:
    """Returns the type and the message of the error, without what differs between machines."""
    with pytest.raises((TypeError, ValueError, AttributeError)) as error:
        misuse()
    text = re.sub(r"\S*/(?=report\.json is)", "…/", str(error.value))
    text = re.sub(r"got Governor\(.*\)", "got Governor(…)", text)
    text = text.replace(f"lightning_noise {__version__}", "lightning_noise …")
    return f"{error.type.__name__}: {text}"


def messages() -> dict[str, str]:
    lines = MESSAGES.read_text().splitlines()
    return dict(zip(lines[::2], map(str.strip, lines[1::2]), strict=True))


def test_the_table_is_complete():
    assert list(messages()) == [*VALUES, *RUNS]
    assert len(messages()) >= 120


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_cannot_be_meant_is_refused_in_one_line(name):
    assert message_of(VALUES[name]) == messages()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_be_meant_is_refused_in_one_line_and_leaves_the_weights_clean(name):
    assert message_of(RUNS[name]) == messages()[name]


INPUT = ("- class_path: lightning_noise.InputNoise", "  init_args:", "    noise: {class_path: lightning_noise.noise.Gaussian}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((*INPUT, "    levle: 0.1"), "Option 'levle' is not accepted"),
        (("- class_path: lightning_noise.InputNoize",), "module 'lightning_noise' has no attribute 'InputNoize'"),
        ((*INPUT, "    level: high"), "Expected a <class 'float'>"),
        ((*INPUT, "    level: -0.1"), "a level must be finite and not negative, got -0.1"),
        ((*INPUT, "    relative: rms"), "rms"),
    ],
    ids=["argument", "class", "words", "number", "unit"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_that_cannot_be_meant_is_refused(lines, message):
    """The messages are those of jsonargparse, which differ between versions, around ours."""
    with pytest.raises((ArgumentError, ValueError), match=re.escape(message)):
        read(*lines)


if __name__ == "__main__":
    MESSAGES.write_text("".join(f"{name}\n    {message_of(misuse)}\n" for name, misuse in {**VALUES, **RUNS}.items()))
