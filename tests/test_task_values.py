"""Tasks notice what the values of outputs and targets refute, and drop the targets that do not count."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import Classifier, Quiet, fit, keys_of, loader, make_trainer
from helpers_measurements import reported
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import AdaptiveLevel, InputNoise, RobustnessMonitor, metrics, noise, plots, suggest_level
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.metrics.base import are_distributions
from lightning_noise.rules import Governor
from lightning_noise.tasks import Binary, Multiclass, Multilabel, Regression, Task

generator = torch.Generator()
# weights of a model that is calibrated, and its data
W = 2 * torch.randn(8, 4, generator=generator.manual_seed(0))
X = torch.randn(400, 8, generator=generator)
LABELS = {
    Multiclass: torch.multinomial((X @ W).softmax(1), 1, generator=generator)[:, 0],
    Binary: torch.bernoulli((X @ W)[:, 0].sigmoid(), generator=generator),
    Multilabel: torch.bernoulli((X @ W).sigmoid(), generator=generator),
}
SQUASH = {Multiclass: lambda z: z.softmax(1), Binary: torch.sigmoid, Multilabel: torch.sigmoid}


class Model(pl.LightningModule):
    """A linear model, whose outputs a function may change."""

    def __init__(self, kind: type[Task], change: Any = None, scale: float = 1.0):
        super().__init__()
        self.kind, self.change = kind, change
        self.weight = nn.Parameter(scale * W)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.weight
        z = z[:, 0] if self.kind is Binary else z
        return z if self.change is None else self.change(z)

    def validation_step(self, batch, batch_idx):
        pass


def values_of(task: Task, model: Model, target: Tensor, level: float = 0.5, **kwargs: Any) -> dict[str, float]:
    trainer = make_trainer([RobustnessMonitor(noise.Gaussian(), [level], task=task, **kwargs)])
    trainer.validate(model, loader(TensorDataset(X, target), batch_size=100), verbose=False)
    return keys_of(trainer)


# --- probabilities

kinds = pytest.mark.parametrize("kind", LABELS, ids=lambda kind: kind.__name__)


@kinds
def test_probabilities_have_the_values_of_their_logits(kind):
    task: Any = kind
    expected = values_of(task(), Model(kind), LABELS[kind])
    found = values_of(task(probabilities=True), Model(kind, SQUASH[kind]), LABELS[kind])
    assert found == pytest.approx(expected, abs=2e-5)
    half = values_of(task(probabilities=True), Model(kind, lambda z: SQUASH[kind](z).half()), LABELS[kind])
    kept = [key for key in expected if "loss" not in key]  # what rounds to 0 or 1 has a loss of 87
    # one prediction in 400 may round to 1/2 and change, which is 1/400 / (0.9 - 1/2) = 6e-3 of the skill above chance
    assert [half[key] for key in kept] == pytest.approx([expected[key] for key in kept], abs=8e-3)


@pytest.mark.parametrize("clamp", [1e-6, 1e-3])
def test_clamped_probabilities_are_no_logits(clamp):
    """The sums of 1000 classes are off by 0.001."""
    many = torch.randn(100, 1000, generator=generator)
    with pytest.raises(ValueError, match=r"returned probabilities.*Multiclass\(probabilities=True\)"):
        values_of(Multiclass(), Model(Multiclass, lambda z: z.softmax(1).clamp(clamp, 1 - clamp)), LABELS[Multiclass])
    assert are_distributions((9 * many).softmax(1).clamp_min(1e-6))
    assert not are_distributions(many.relu())


@pytest.mark.parametrize("change", [torch.sigmoid, lambda z: z.softmax(0)], ids=["sigmoid", "other axis"])
def test_what_does_not_sum_to_1_over_the_classes_is_not_called_probabilities_of_classes(change):
    with pytest.raises(ValueError, match="do not sum to 1 over the classes") as refused:
        values_of(Multiclass(), Model(Multiclass, change), LABELS[Multiclass])
    assert "probabilities=True" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_are_read(dtype):
    expected = values_of(Multiclass(), Model(Multiclass), LABELS[Multiclass])
    assert values_of(Multiclass(ignore_index=-100), Model(Multiclass), LABELS[Multiclass].to(dtype)) == expected


def test_an_unsigned_label_does_not_equal_a_negative_ignore_index():
    assert Multiclass(ignore_index=-100).counts(torch.tensor([0, 156], dtype=torch.uint8)) is None
    counts = Multiclass(ignore_index=255).counts(torch.tensor([0, 255], dtype=torch.uint8))
    assert counts is not None
    assert counts.tolist() == [True, False]


def test_a_softmax_is_as_calibrated_as_its_logits():
    """ECE 0.428 and loss 0.908 if the probabilities are taken for logits."""
    report = reported(
        RobustnessMonitor(noise.Gaussian(), [0.5], task=Multiclass(probabilities=True)),
        Model(Multiclass, SQUASH[Multiclass]),
        TensorDataset(X, LABELS[Multiclass]),
    )
    p = (X @ W).softmax(1)
    assert report.rows[CLEAN, "loss"].value == pytest.approx(F.nll_loss(p.log(), LABELS[Multiclass]).item(), abs=1e-6)
    assert report.rows[CLEAN, "ece"].value < 0.05


def test_certain_probabilities_have_a_finite_loss():
    preds, target = Multiclass(probabilities=True).read(torch.eye(3), torch.tensor([0, 1, 0]))
    metric = metrics.CrossEntropy()
    metric.update(preds, target)
    assert metric.compute() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / 3)
    preds, _ = Binary(probabilities=True).read(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    assert preds.isfinite().all()


@kinds
@pytest.mark.parametrize("trained", [True, False])
def test_probabilities_are_refused_also_before_the_training(kind, trained):
    model, name = Model(kind, SQUASH[kind], scale=1.0 if trained else 1e-3), kind.__name__
    message = rf"returned probabilities, but {name}\(\) expects logits; type task=tasks\.{name}\(probabilities=True\)"
    task: Any = kind
    for predict in (None, lambda module, batch: module(batch[0])):
        with pytest.raises(ValueError, match=message):
            values_of(task(), model, LABELS[kind], predict=predict)
    trainer = make_trainer()
    data = loader(TensorDataset(X, LABELS[kind]), batch_size=100)
    for flip_rate in (None, 0.1):
        with pytest.raises(ValueError, match=message):
            suggest_level(trainer, model, noise.Gaussian(), dataloaders=data, task=task(), flip_rate=flip_rate)


@kinds
def test_logits_are_refused_if_probabilities_are_declared(kind):
    task: Any = kind
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(probabilities=True\) expects probabilities .*type task=tasks"):
        values_of(task(probabilities=True), Model(kind), LABELS[kind])


@pytest.mark.parametrize(
    "change",
    [
        lambda z: F.softmax(torch.stack([0 * z, z], 1), dim=1)[:, 1],
        nn.Sigmoid(),
        lambda z: torch.special.expit(z).half(),
        lambda z: z.clone().sigmoid_(),
    ],
)
def test_each_way_to_a_probability_is_known(change):
    with pytest.raises(ValueError, match="returned probabilities"):
        values_of(Binary(), Model(Binary, change, scale=1e-3), LABELS[Binary])


def test_sigmoids_of_classes_are_no_logits_either():
    with pytest.raises(ValueError, match="returned probabilities"):
        values_of(Multiclass(), Model(Multiclass, torch.sigmoid, scale=1e-3), LABELS[Multiclass])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Multiclass, lambda z: 0.5 + 0.4 * (2 * z).tanh()),
        (Multilabel, lambda z: 0.5 + 0.4 * (2 * z).tanh()),
        (Multilabel, lambda z: 1 / (1 + (-z / 10).exp())),  # probabilities by no function of torch
        (Binary, lambda z: 0.1 + 0.8 * z.sigmoid()),
    ],
)
def test_logits_that_spread_between_0_and_1_alone_are_taken_with_a_warning(kind, change):
    with pytest.warns(UserWarning, match=r"all outputs of the first batch are in \[0, 1\], but .* If they are probabilities: "):
        values_of(kind(), Model(kind, change), LABELS[kind])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Binary, lambda z: 0.4 + z.tanh() / 10),  # as of an untrained module
        (Binary, lambda z: 0.1 + 0.2 * z.sigmoid()),
        (Multiclass, lambda z: torch.linspace(0.1, 0.8, 4) + 0.1 * z.tanh()),
        (Binary, lambda z: z.sigmoid().logit()),
        (Multiclass, lambda z: z.log_softmax(1)),
    ],
)
def test_logits_that_lie_between_0_and_1_are_taken(kind, change):
    values_of(kind(), Model(kind, change), LABELS[kind])


def test_probabilities_of_which_the_function_is_unknown_are_refused_if_they_fill_the_interval():
    with pytest.raises(ValueError, match="returned probabilities"):
        values_of(Binary(), Model(Binary, lambda z: 1 / (1 + (-z).exp())), LABELS[Binary])
    with pytest.raises(ValueError, match="returned probabilities"):
        values_of(Binary(), Model(Binary, lambda z: (z > 0).float()), LABELS[Binary])


def test_an_adaptive_level_refuses_probabilities_before_the_first_step():
    class Squashed(Classifier):
        def forward(self, x):
            return super().forward(x).softmax(1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("a training step came first")

    with pytest.raises(ValueError, match="returned probabilities"):
        fit([InputNoise(noise.Gaussian(), AdaptiveLevel())], module=Squashed)


BARE = [metrics.CrossEntropy, metrics.BrierScore, metrics.CalibrationBins, metrics.SelectiveClassification, metrics.Perplexity]


COUNTING = [metrics.ExpectedCalibrationError, metrics.AdaptiveCalibrationError, metrics.TopKAccuracy]


@pytest.mark.parametrize("make", [*BARE, *COUNTING, metrics.TemperatureScaling, metrics.PredictiveEntropy])
def test_a_bare_metric_refuses_probabilities_and_classes_on_the_last_axis(make):
    z, target = X @ W, LABELS[Multiclass]
    for p in (z.softmax(1), z.softmax(1).half(), z.softmax(1).bfloat16()):
        with pytest.raises(ValueError, match=rf"{make.__name__} expects logits, got probabilities.*type preds\.log\(\)"):
            make().update(p, target)
    make().update(z.log_softmax(1), target)
    if make is not metrics.PredictiveEntropy:
        with pytest.raises(ValueError, match=r"type preds\.movedim\(-1, 1\)"):
            make().update(z.view(100, 4, 4), target.view(100, 4)[:, :3])


@pytest.mark.parametrize("make", [*BARE, *COUNTING, metrics.TemperatureScaling])
def test_a_bare_metric_refuses_labels_that_are_no_class_and_says_how_to_leave_them_out(make):
    z, target = X @ W, LABELS[Multiclass].where(X[:, 0] > 0, -100)
    with pytest.raises(ValueError, match=r"indices in \[0, 4\), got .* to 3; .* update\(preds\[keep\], target\[keep\]\)"):
        make().update(z, target)
    with pytest.raises(ValueError, match=r"from -100 to 4; .* update\(preds\.movedim\(1, -1\)\[keep\], target\[keep\]\)"):
        make().update(z.view(100, 4, 4).movedim(-1, 1), target.where(target != 3, 4).view(100, 4))
    make().update(z[target != -100], target[target != -100])


def test_numbers_of_other_shapes_are_not_broadcast():
    for make in (metrics.MeanSquaredError, metrics.MeanAbsoluteError, metrics.R2Score):
        with pytest.raises(ValueError, match=r"got float32 \(5, 1\) and float32 \(5,\); type preds\.reshape"):
            make().update(torch.zeros(5, 1), torch.zeros(5))


# --- classes on the last axis


def test_classes_on_the_last_axis_have_the_values_of_classes_on_the_second():
    z, target = (X @ W).view(80, 5, 4), LABELS[Multiclass].view(80, 5)
    expected, _ = Multiclass().read(z.movedim(-1, 1), target)
    for task in (Multiclass(), Multiclass(class_dim=-1)):
        assert torch.equal(task.read(z, target)[0], expected)


def test_if_both_readings_fit_the_axis_must_be_typed():
    z, target = torch.randn(2, 4, 4), torch.zeros(2, 4).long()
    with pytest.raises(
        ValueError, match=r"type task=tasks\.Multiclass\(class_dim=1\) or task=tasks\.Multiclass\(class_dim=-1\)"
    ):
        Multiclass().read(z, target)
    assert torch.equal(Multiclass(class_dim=1).read(z, target)[0], z)
    assert torch.equal(Multiclass(class_dim=-1).read(z, target)[0], z.transpose(1, 2))
    with pytest.raises(ValueError, match="class_dim=1 or class_dim=-1"):
        Multiclass(class_dim=0)


def test_a_batch_in_doubt_is_read_as_the_batches_before():
    class Tagger(pl.LightningModule):
        def forward(self, x):
            return x

        def test_step(self, batch, batch_idx):
            pass

    target = torch.arange(12).view(3, 4) % 3
    logits = 9 * F.one_hot(target, 3).float() - 1  # (B, T, K), all right
    batches = [(logits, target), (logits[:, :3], target[:, :3])]  # the second has as many positions as classes
    monitor = RobustnessMonitor(noise.Gaussian(), [0.1])
    trainer = pl.Trainer(logger=False, callbacks=[monitor], enable_progress_bar=False, enable_model_summary=False)
    trainer.test(Tagger(), DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert trainer.callback_metrics["test/robustness/accuracy_clean"] == 1
    with pytest.raises(ValueError, match="class_dim=1"):  # a run that begins with it
        trainer.test(Tagger(), DataLoader(batches[1:], batch_size=None), verbose=False)  # type: ignore[arg-type]


def test_without_labels_the_axis_must_be_typed():
    rows = torch.zeros(6, 8)
    with pytest.raises(ValueError, match="type task=tasks"):
        Multiclass().placeholder(torch.zeros(6, 5, 3), rows)
    for dim, shape in ((1, (6, 3)), (-1, (6, 5))):
        assert Multiclass(class_dim=dim).placeholder(torch.zeros(6, 5, 3), rows).shape == shape


# --- targets that do not count


class Tokens(pl.LightningModule):
    """Logits of a sequence: (B, T, V)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 11)
        self.noisy = nn.Linear(1, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((10 * x).long().clamp(0, 10)) + self.noisy(x[..., None])

    def validation_step(self, batch, batch_idx):
        pass


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(64, 7, generator=g), torch.randint(0, 11, (64, 7), generator=g)
    y[torch.arange(7) >= torch.randint(0, 8, (64, 1), generator=g)] = -100  # of some, no position counts
    return x, y


@pytest.mark.parametrize("batch_size", [64, 10, 1])
def test_a_language_model_is_evaluated_at_the_labels_that_count(batch_size):
    x, y = tokens()
    monitor = RobustnessMonitor(noise.Gaussian(), [0.3], task=Multiclass(ignore_index=-100))
    report = reported(monitor, Tokens(), TensorDataset(x, y), batch_size=batch_size)
    with torch.no_grad():
        loss = F.cross_entropy(Tokens()(x).movedim(-1, 1), y, ignore_index=-100)
    assert report.rows[CLEAN, "loss"].value == pytest.approx(loss.item(), abs=1e-6)
    assert report.rows[CLEAN, "perplexity"].value == pytest.approx(loss.exp().item(), rel=1e-5)
    assert (report.n, report.n_targets) == ((y >= 0).any(1).sum(), (y >= 0).sum())
    assert sum(report.sizes) == report.n
    low, high = (getattr(report.rows[CLEAN, "accuracy"], side) for side in ("low", "high"))
    assert 0 <= low < report.rows[CLEAN, "accuracy"].value < high <= 1


def test_the_report_shows_the_perplexity_of_sequences_alone():
    from lightning_noise.report.markdown import markdown

    sequences = reported(
        RobustnessMonitor(noise.Gaussian(), [0.3], task=Multiclass(ignore_index=-100)), Tokens(), TensorDataset(*tokens())
    )
    text = markdown(sequences)
    assert "| perplexity |" in text
    assert f"samples with {sequences.n_targets} targets with one draw" in text
    rows = TensorDataset(X, LABELS[Multiclass])
    assert "perplexity" not in markdown(reported(RobustnessMonitor(noise.Gaussian(), [0.3]), Model(Multiclass), rows))


MISSING = [
    (Multiclass(ignore_index=-100), Multiclass(), -100),
    (Binary(ignore_index=255), Binary(), 255),
    (Binary(), Binary(), math.nan),
    (Regression(), Regression(), math.nan),
]


@pytest.mark.filterwarnings("ignore:all targets of the first batch are 0 or 1")
@pytest.mark.parametrize(("task", "plain", "label"), MISSING)
def test_rows_that_do_not_count_are_as_if_they_were_not_there(task, plain, label):
    """Values and errors. The noise and group of a row depend on its position, so the rows are the last of the data."""
    kind: Any = Binary if isinstance(task, Regression) else type(task)
    target = LABELS[kind] * (2 if isinstance(task, Regression) else 1)
    kept = 300
    target[kept:] = label
    found, expected = (
        reported(RobustnessMonitor(noise.Gaussian(), [0.5], task=each), Model(kind), TensorDataset(X[:n], target[:n]), 80)
        for each, n in ((task, len(X)), (plain, kept))
    )
    assert repr(found.estimates) == repr(expected.estimates)
    assert found.sizes == expected.sizes
    assert found.n == found.n_targets == kept


def test_missing_labels_of_a_sample_leave_its_others():
    target = LABELS[Multilabel].clone()
    target[::3, 1] = math.nan
    target[::7] = math.nan
    report = reported(
        RobustnessMonitor(noise.Gaussian(), [0.5], task=Multilabel()), Model(Multilabel), TensorDataset(X, target)
    )
    counted = ~target.isnan()
    loss = F.binary_cross_entropy_with_logits((X @ W)[counted], target[counted])
    assert report.rows[CLEAN, "loss"].value == pytest.approx(loss.item(), abs=1e-6)
    assert (report.n, report.n_targets) == (counted.any(1).sum(), counted.sum())


@pytest.mark.filterwarnings("ignore:all targets of the first batch are 0 or 1")
@pytest.mark.parametrize(("place", "is_nan"), [(-1, False), (0, True)])
def test_predictions_that_are_no_numbers_count_if_their_target_does(place, is_nan):
    target = 2 * LABELS[Binary]
    target[-1] = math.nan

    def spoil(z: Tensor) -> Tensor:
        z = z.clone()
        z[place] = math.nan
        return z

    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=Regression())
    report = reported(monitor, Model(Binary, spoil), TensorDataset(X, target), 400)
    assert math.isnan(report.rows[CLEAN, "mse"].value) == is_nan


def test_if_no_target_counts_the_values_are_nan_with_a_warning():
    target = torch.full((40,), -100)
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=Multiclass(ignore_index=-100))
    with pytest.warns(UserWarning, match="RobustnessMonitor saw no target that counts: all are NaN or the ignore_index"):
        report = reported(monitor, Model(Multiclass), TensorDataset(X[:40], target))
    assert report.n == 0
    assert math.isnan(report.rows[CLEAN, "accuracy"].value)
    with pytest.raises(ValueError, match="no target counts"):
        suggest_level(
            make_trainer(),
            Model(Multiclass),
            noise.Gaussian(),
            dataloaders=loader(TensorDataset(X[:40], target)),
            task=Multiclass(ignore_index=-100),
        )


@pytest.mark.parametrize("flip_rate", [None, 0.1])
def test_a_range_test_counts_the_labels_that_count(flip_rate):
    target = LABELS[Multiclass].clone()
    target[300:] = -100

    def found(n: int, task: Task) -> Any:
        data = loader(TensorDataset(X[:n], target[:n]), batch_size=80)
        levels, trainer = [0.1, 0.3, 1.0], make_trainer()
        return suggest_level(
            trainer, Model(Multiclass), noise.Gaussian(), dataloaders=data, task=task, flip_rate=flip_rate, levels=levels
        )

    assert found(400, Multiclass(ignore_index=-100)) == found(300, Multiclass())


def test_a_governor_follows_the_labels_that_count():
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    padded = TensorDataset(torch.cat([x, x]), torch.cat([y, torch.full_like(y, -100)]))
    decisions = []
    for task, data in ((Multiclass(), TensorDataset(x, y)), (Multiclass(ignore_index=-100), padded)):
        level = AdaptiveLevel(Governor(warmup=0), task=task)
        callback = InputNoise(noise.Gaussian(), level)
        fit([callback], train=loader(TensorDataset(x, y)), validation=loader(data), module=Quiet, max_epochs=3)
        assert callback.adaptive is not None
        decisions.append([repr(decision) for decision in callback.adaptive.history])
    assert decisions[0] == decisions[1]


def test_pictures_show_the_classes_of_all_their_samples(tmp_path, monkeypatch):
    from pytorch_lightning.loggers import CSVLogger

    shown = []
    monkeypatch.setattr(plots, "samples", lambda inputs, captions, labels: shown.append((captions["clean"], labels)))
    monkeypatch.setattr("lightning_noise.evaluation.figures._SMALLEST_PICTURE", 1)
    target = LABELS[Multiclass].clone()
    target[:2] = -100
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], task=Multiclass(ignore_index=-100))
    trainer = make_trainer([monitor], logger=CSVLogger(tmp_path))
    trainer.validate(Model(Multiclass), loader(TensorDataset(X[:20], target[:20])), verbose=False)
    rows = [0, 5, 10, 15]
    # the label of a sample is not known if a label of its batch does not count
    assert shown[-1] == (list(map(str, (X @ W)[rows].argmax(1).tolist())), None)


@pytest.mark.filterwarnings("ignore:no prediction of the first batch has changed")
def test_the_mask_and_the_normalization_of_the_inputs_reach_the_noise():
    """Noise in the last half of the features would change every prediction, and levels are in units before normalization."""
    mask = (torch.arange(8) < 4).expand(len(X), 8)
    data = TensorDataset(X, LABELS[Multiclass], mask)

    def predict(module: Any, batch: Any) -> Tensor:
        kept = torch.cat([0 * batch[0][:, :4], batch[0][:, 4:]], 1)
        return module(kept)

    options: Any = {"predict": predict, "inputs": 0}
    report = reported(RobustnessMonitor(noise.Gaussian(), [0.5], mask=2, **options), Model(Multiclass), data, 100)
    assert report.rows[Condition("gaussian", 0.5), "flip_rate"].value == 0
    assert "mask=2" in report.noises["gaussian"]
    with pytest.warns(UserWarning, match="the flip rate goes from 0 at 0.1 to 0 at 1"):
        suggest_level(
            make_trainer(),
            Model(Multiclass),
            noise.Gaussian(),
            dataloaders=loader(data, batch_size=100),
            flip_rate=0.5,
            levels=[0.1, 1.0],
            mask="2",
            **options,
        )


def test_levels_are_in_the_units_of_the_data_before_the_normalization():
    values = []
    for level, options in ((0.5, {}), (0.125, {"mean": 3.0, "std": 0.25})):
        found = values_of(Multiclass(), Model(Multiclass), LABELS[Multiclass], level=level, **options)
        values.append([value for key, value in found.items() if "levels" not in key])
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_inputs_with_missing_values_are_seen_as_they_are():
    x = X.clone()
    x[::5, 0] = math.nan
    target = LABELS[Multiclass]
    model = Model(Multiclass)
    predict = lambda module, batch: module(batch[0].nan_to_num(0.0))  # noqa: E731
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], predict=predict, inputs=0)
    report = reported(monitor, model, TensorDataset(x, target), 100)
    accuracy = ((x.nan_to_num(0.0) @ W).argmax(1) == target).float().mean().item()
    assert report.rows[CLEAN, "accuracy"].value == pytest.approx(accuracy, abs=1e-6)


# --- memory


def test_memory_does_not_grow_over_validations_without_the_garbage_collector():
    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
            held.append(sum({item.data_ptr(): item.nbytes for item in tensors}.values()))

    held: list[int] = []
    callbacks = [RobustnessMonitor(noise.Gaussian(), [0.1, 0.2]), InputNoise(noise.Gaussian(), AdaptiveLevel()), Watch()]
    gc.collect()
    gc.disable()
    try:
        fit(callbacks, module=Quiet, max_epochs=4)
    finally:
        gc.enable()
    assert held[-1] - held[1] < 2**18
