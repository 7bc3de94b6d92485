"""Chance is the best constant guess: a model that sees nothing has no skill, however unbalanced the classes are."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import loader, make_trainer
from helpers_measurements import validated
from sklearn.dummy import DummyClassifier
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_noise import AdaptiveLevel, InputNoise, RobustnessMonitor, noise, report, rules, suggest_level, tasks
from lightning_noise.evaluation.conditions import CLEAN, OVERALL
from lightning_noise.metrics.guess import ConstantGuess

pytestmark = pytest.mark.filterwarnings("ignore:a constant guess is right")


class Outliers(pl.LightningModule):
    """Finds the values that stand out among those of their row by more than four standard deviations."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        spread = x.flatten(1).std(1).view(-1, *[1] * (x.ndim - 1))
        yes = self.scale * (x / spread - 4)
        return torch.stack([torch.zeros_like(yes), yes], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Rare(Outliers):
    """The same for one value of a table."""

    def forward(self, x: Tensor) -> Tensor:
        yes = self.scale * (x[:, 0] / x.std(1) - 4)
        return torch.stack([torch.zeros_like(yes), yes], 1)


def images(n: int = 40) -> TensorDataset:
    """Images of which an object fills 2.5 %."""
    masks = torch.zeros(n, 20, 20, dtype=torch.long)
    for i in range(n):
        masks[i, i % 18 : i % 18 + 2, (7 * i) % 15 : (7 * i) % 15 + 5] = 1
    return TensorDataset(masks.float(), masks)


def table(n: int = 400, rare: int = 20) -> TensorDataset:
    """Rows of which 5 % are of the second class."""
    y = (torch.arange(n) % (n // rare) == 0).long()
    return TensorDataset(torch.cat([y[:, None], torch.linspace(-0.2, 0.2, 40).repeat(n, 1)], 1), y)


UNBALANCED = {"segmentation": (Outliers, images), "table": (Rare, table)}


def intersection_over_union(module: nn.Module, data: TensorDataset, level: float) -> float:
    x, y = data.tensors
    generator = torch.Generator().manual_seed(0)
    found = module(x + level * torch.randn(x.shape, generator=generator)).argmax(1)
    return ((found == 1) & (y == 1)).sum().item() / ((found == 1) | (y == 1)).sum().item()


# --- the faults


@pytest.mark.parametrize("case", UNBALANCED)
def test_a_level_is_suggested_at_which_the_rare_class_is_still_found(case):
    model, data = UNBALANCED[case]
    result = suggest_level(make_trainer(), model(), noise.Gaussian(), dataloaders=loader(data(), batch_size=100))
    assert intersection_over_union(model(), data(), 3.0) < 0.05
    assert result.accuracies[3.16] > 0.94, "the accuracy shows nothing of it"
    assert intersection_over_union(model(), data(), result.level) > 0.8
    assert min(result.curve.values()) < 0.05


@pytest.mark.parametrize("case", UNBALANCED)
def test_the_retention_is_that_of_the_rare_class(case):
    model, data = UNBALANCED[case]
    found = validated(RobustnessMonitor(noise.Gaussian(), [0.001, 1.0]), model(), data(), batch_size=100)
    assert found["accuracy_clean"] == 1
    assert found["gaussian/1/accuracy"] > 0.94
    assert found["accuracy_retention"] == pytest.approx(0.5, abs=0.03), "all is left at the lower level, nothing at the higher"


@pytest.mark.parametrize("case", UNBALANCED)
def test_a_governor_does_not_raise_the_level_until_the_rare_class_is_lost(case):
    model, data = UNBALANCED[case]
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(rules.Governor(step=0.02, warmup=0)))
    trainer = make_trainer([callback], max_epochs=15)
    trainer.fit(model(), loader(data(), batch_size=400), loader(data(), batch_size=400))
    assert callback.adaptive is not None
    levels = [decision.level for decision in callback.adaptive.history]
    assert max(levels) > 0.05, "it rises while all is well"
    assert intersection_over_union(model(), data(), callback.adaptive.level) > 0.6


# --- the laws


class Constant(Outliers):
    """Returns the same for every sample."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.output.expand(len(x), *self.output.shape)


def draw(shape: tuple[int, ...], shares: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(shares), math.prod(shape), replacement=True, generator=generator).view(shape)


def classes_on_axis(n: int, places: tuple[int, ...] = (), last: bool = False) -> list[Tensor]:
    """The outputs of the constant guesses among n classes."""
    guesses = torch.eye(n).view(n, n, *[1] * len(places)).expand(n, n, *places)
    return list(guesses.movedim(1, -1) if last else guesses)


def without(target: Tensor, value: float) -> Tensor:
    """The target without a third of its labels."""
    return target.where(torch.arange(target.numel()).view(target.shape) % 3 > 0, value)


LABELS = torch.stack([draw((60,), [0.1, 0.9]), draw((60,), [0.8, 0.2], 1), draw((60,), [0.5, 0.5], 2)], 1)
ANSWERS = [2.0 * torch.tensor(answer) - 1 for answer in product((0, 1), repeat=3)]
GUESSES: dict[str, tuple[Any, Tensor, list[Tensor]]] = {
    "multiclass": (tasks.Multiclass(), draw((60,), [0.2, 0.5, 0.3]), classes_on_axis(3)),
    "labels that do not count": (
        tasks.Multiclass(ignore_index=1),
        draw((60,), [0.2, 0.5, 0.3]),
        classes_on_axis(3),
    ),
    "pixels": (tasks.Multiclass(ignore_index=255), without(draw((60, 4, 5), [0.7, 0.3]), 255), classes_on_axis(2, (4, 5))),
    "tokens": (
        tasks.Multiclass(ignore_index=-100),
        without(draw((60, 7), [0.1, 0.2, 0.3, 0.4]), -100),
        classes_on_axis(4, (7,), last=True),
    ),
    "binary": (tasks.Binary(), draw((60,), [0.3, 0.7]), [torch.tensor(-1.0), torch.tensor(1.0)]),
    "binary with missing labels": (
        tasks.Binary(),
        without(draw((60,), [0.3, 0.7]).float(), math.nan),
        [torch.tensor(-1.0), torch.tensor(1.0)],
    ),
    "multilabel": (tasks.Multilabel(), LABELS, ANSWERS),
    "multilabel with missing labels": (tasks.Multilabel(), without(LABELS.float(), math.nan), ANSWERS),
    "multilabel, labels at each place": (
        tasks.Multilabel(),
        LABELS[:, :, None].expand(60, 3, 4),
        [answer[:, None].expand(3, 4) for answer in ANSWERS],
    ),
}


def judged(module: Any, target: Tensor, task: Any, batch_size: int = 25) -> report.Report:
    monitor = RobustnessMonitor(noise.Gaussian(), [0.3], task=task)
    validated(monitor, module, TensorDataset(torch.randn(len(target), 5), target), batch_size=batch_size)
    assert monitor.report is not None
    return monitor.report


@pytest.mark.parametrize("case", GUESSES)
def test_chance_is_the_accuracy_of_the_best_constant_guess(case):
    task, target, guesses = GUESSES[case]
    counts = task.counts(target)
    hits = []
    for guess in guesses:
        preds, labels = task.read(guess.expand(len(target), *guess.shape), target.nan_to_num(0.0))
        hits.append((preds.argmax(1) == labels)[... if counts is None else counts].double().mean().item())
    best = hits.index(max(hits))
    found = judged(Constant(guesses[best]), target, task)
    assert found.chance == found.values[CLEAN, "chance"] == found.values[CLEAN, "accuracy"] == hits[best]
    assert math.isnan(found.values[OVERALL, "accuracy_retention"]), "there is no skill to retain"


def test_without_a_group_of_samples_chance_is_that_of_the_others():
    task, target, guesses = GUESSES["labels that do not count"]
    reports = [judged(Constant(guess), target, task) for guess in guesses]
    of_guesses = zip(*(each.rows[CLEAN, "accuracy"].without for each in reports), strict=True)
    assert list(reports[0].rows[CLEAN, "chance"].without) == [max(each) for each in of_guesses]


def test_chance_is_that_of_the_dummy_classifier_of_scikit_learn():
    task, target, guesses = GUESSES["multiclass"]
    dummy = DummyClassifier(strategy="most_frequent").fit(target, target)
    assert judged(Constant(guesses[0]), target, task).chance == dummy.score(target, target)


@pytest.mark.parametrize("n_classes", [2, 3, 7, 10, 1000])
def test_chance_is_exactly_one_of_the_number_of_classes_if_they_are_balanced(n_classes):
    metric = ConstantGuess()
    metric.update(torch.arange(3 * n_classes) % n_classes)
    assert metric.totals()["chance"] == 1 / n_classes


def test_chance_of_many_classes_and_labels_is_exact():
    n = 50_000
    metric = tasks.Multiclass().guess(torch.empty(1, n))
    metric.update(torch.arange(n))
    assert metric.totals()["chance"] == 1 / n
    target = torch.zeros(2, n, dtype=torch.long).index_fill_(1, torch.arange(0, n, 2048), 1)
    metric = tasks.Multilabel().guess(torch.empty(2, 2, n))
    metric.update(tasks.Multilabel().classes(target))
    assert metric.totals()["chance"] == 1


def test_of_more_classes_than_the_first_batch_has_chance_is_not_known():
    metric = ConstantGuess(5000)
    metric.update(torch.tensor([0, 4999, 0]))
    assert metric.totals()["chance"] == 2 / 3
    metric.update(torch.tensor([5000]), torch.tensor([0]))
    assert math.isnan(metric.totals()["chance"])


def test_a_monitor_knows_chance_also_of_a_later_module_with_more_classes():
    monitor = RobustnessMonitor(noise.Gaussian(), [0.3])
    for n in (3, 5000):
        validated(monitor, Constant(torch.zeros(n)), TensorDataset(torch.randn(4, 5), torch.tensor([0, n - 1, 0, 1])))
        assert monitor.report is not None
        assert monitor.report.chance == 0.5


def test_the_number_of_classes_may_differ_between_batches():
    # positions in a document, of which a batch has as many as its longest
    metric = ConstantGuess()
    metric.update(torch.tensor([0, 0, 3]))
    metric.update(torch.tensor([0, 8, 7, 2, 5]))
    assert metric.totals()["chance"] == 3 / 8


@pytest.mark.parametrize("case", ["pixels", "multilabel"])
def test_the_batches_do_not_matter(case):
    task, target, guesses = GUESSES[case]
    one, other = (judged(Constant(guesses[0]), target, task, batch_size=size) for size in (7, 60))
    assert one.rows[CLEAN, "chance"] == other.rows[CLEAN, "chance"]


def test_a_range_test_has_the_chance_of_the_monitor():
    task, target, guesses = GUESSES["pixels"]
    data = loader(TensorDataset(torch.randn(60, 5), target), batch_size=25)
    chance = judged(Constant(guesses[0]), target, task).chance
    with pytest.raises(ValueError, match=f"is not above that of a constant guess, {chance:.3g},"):
        suggest_level(make_trainer(), Constant(guesses[0]), noise.Gaussian(), dataloaders=data, task=task)


@pytest.mark.parametrize("best", [0.95, 0.9])
def test_a_governor_without_room_above_chance_only_falls(best):
    governor = rules.Governor(best=best, warmup=0)
    seen = rules.Observation(clean=0.96, boundary=0.9, standard_error=0.01, signed_gap=0.0, n=100, chance=0.95)
    state, reason = governor.update(governor.init(0.5), seen)
    assert (reason, state["level"]) == ("below_min_skill", 0.25)
    assert "no better than 0.95, that of a constant guess" in governor.describe(seen)


# --- the report


def test_a_report_says_what_chance_is_and_that_there_is_no_skill(tmp_path):
    task, target, guesses = GUESSES["multiclass"]
    blind = judged(Constant(guesses[0]), target, task)
    text = report.write(tmp_path, blind).read_text()
    assert f"the most frequent class: {100 * (target == 1).double().mean():.3g} %" in text
    assert "is not above chance, so there is no skill to retain" in text
    assert report.read(tmp_path).chance == blind.chance


@pytest.mark.filterwarnings("ignore:no prediction of the first batch has changed")  # it does not read its input
def test_a_report_of_a_model_that_may_know_nothing_begins_with_a_doubt():
    target = torch.arange(200) % 2
    outputs = 5.0 * nn.functional.one_hot(torch.where(torch.arange(200) < 8, 1 - target, target), 2)

    class Table(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return outputs[: len(x)]

    for n, doubts in ((20, True), (200, False)):  # 60 % and 96 % are right
        found = judged(Table(outputs[0]), target[:n], tasks.Multiclass(), batch_size=n)
        assert ("may be chance, 50 %, so the skill" in report.headline(found)) == doubts


def test_a_report_of_a_regression_says_that_there_is_no_skill():
    blind = judged(Constant(torch.tensor(1.0)), torch.linspace(-1, 1, 60), tasks.Regression())
    assert "The R² without noise is not above chance, so there is no skill to retain" in report.markdown(blind)


class Fragile(Rare):
    """Returns NaN for large inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).where(x.max() < 2, math.nan)


def test_a_report_does_not_deny_the_skill_of_a_model_that_returns_nan_under_noise():
    monitor = RobustnessMonitor(noise.Gaussian(), [0.001, 1.0])
    assert math.isnan(validated(monitor, Fragile(), table(), batch_size=100)["accuracy_retention"])
    assert monitor.report is not None
    text = report.markdown(monitor.report)
    assert "Accuracy is **100.00 %**" in text
    assert "no skill" not in text
    assert "nan" not in text


def test_retentions_above_another_chance_are_not_compared():
    task, target, guesses = GUESSES["multiclass"]
    new = judged(Constant(guesses[0]), target, task)
    older = replace(new, estimates=tuple(each for each in new.estimates if each.metric != "chance"), chance=1 / 3)
    kept = {change.metric for change in report.differences(new, older)}
    assert kept == {change.metric for change in report.differences(new, new)} - {"chance", "accuracy_retention"}


def test_without_a_target_that_counts_chance_is_unknown(tmp_path):
    _, target, guesses = GUESSES["multiclass"]
    with pytest.warns(UserWarning, match="no target that counts"):
        empty = judged(Constant(guesses[0]), torch.full_like(target, 9), tasks.Multiclass(ignore_index=9))
    report.write(tmp_path, empty)
    assert report.read(tmp_path).chance is None


# --- the warning


@pytest.mark.parametrize(
    ("task", "rare", "said"),
    [
        (
            tasks.Multiclass(),
            2,
            r"right for 95 % .* 20 % of the skill .*\(ignore_index=…\).*type RobustnessMonitor\(task=tasks\.Multiclass\("
            r"more=\['balanced_accuracy'\]\)\) or AdaptiveLevel\(rules\.Governor\(chance=1/2\), "
            r"task=tasks\.Custom\(MulticlassAccuracy\(num_classes=2\)\)\), with MulticlassAccuracy of torchmetrics",
        ),
        (
            tasks.Multiclass(ignore_index=7),
            4,
            r"right for 90 % .* 10 % of the skill above chance; for a metric .*Multiclass\(ignore_index=7, more=",
        ),
        (tasks.Multiclass(more=["balanced_accuracy"]), 2, None),
        (tasks.Multiclass(), 5, None),
        (tasks.Multiclass(), 0, None),  # as in the first batch of sorted data
        (tasks.Binary(), 1, r"right for 97.5 % .*Custom\(BinaryAUROC.*rules.Governor\(chance=1/2\)"),
    ],
)
def test_little_room_above_chance_is_said_once_and_before_the_training(task, rare, said):
    target = (torch.arange(40) < rare).long()
    data = loader(TensorDataset(torch.randn(40, 5), target), batch_size=40)
    callbacks = [RobustnessMonitor(noise.Gaussian(), [0.3], task=task), InputNoise(noise.Gaussian(), AdaptiveLevel(task=task))]
    module = Constant(torch.tensor(1.0) if isinstance(task, tasks.Binary) else torch.tensor([1.0, 0.0]))
    when = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("default", "a constant guess is right")
        trainer = make_trainer(callbacks, max_epochs=3)
        patch.setattr(warnings, "showwarning", lambda message, *_: when.append((str(message), trainer.global_step)))
        patch.setattr(module, "training_step", lambda batch, batch_idx: module.scale.square())
        trainer.fit(module, data, data)
    assert trainer.global_step == 3
    assert [step for _, step in when] == ([0] if said else [])
    assert not said or re.search(said, when[0][0])


def test_a_regression_of_zeros_and_ones_is_said_before_the_training():
    target = torch.tensor([0.0, 1.0, torch.nan, 1.0] * 10)
    data = loader(TensorDataset(torch.randn(40, 5), target), batch_size=40)
    monitor = RobustnessMonitor(noise.Gaussian(), [0.3], task=tasks.Regression())
    with pytest.warns(UserWarning, match=r"0 or 1; .* type task=tasks.Binary\(\) or tasks.Multilabel\(\)"):
        make_trainer([monitor], max_epochs=1).validate(Constant(torch.tensor(0.3)), data, verbose=False)
    for numbers in (target.nan_to_num(2.0), torch.ones(40), target[:10]):
        assert tasks.Regression().target_doubt(numbers) is None
