"""What an adaptive level observes of a model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Deterministic, Dictionary, Rows, as_one, fit, loader
from helpers_adaptive import CALLBACKS, HELD_OUT, Plan, governor, held_out, history, hits, level_of, predicted, seen, still
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import (
    ActivationNoise,
    AdaptiveLevel,
    EmbeddingNoise,
    InputNoise,
    Key,
    LabelSmoothing,
    WeightNoise,
    noise,
    tasks,
)
from lightning_noise.evaluation.positions import N_GROUPS, groups_of
from lightning_noise.metrics import BrierScore, MeanSquaredError, R2Score
from lightning_noise.rules import Governor, SignedGap

# --- it sees what it says


class Snapshots(pl.Callback):
    """Keeps the weights at each validation."""

    def __init__(self):
        self.models: list[Deterministic] = []

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            model = Deterministic()
            model.load_state_dict(copy.deepcopy(pl_module.state_dict()))
            self.models.append(model.eval())


def at_the_input(model: Deterministic, level: float, validation: int = 0) -> Tensor:
    key = Key((7, "input", "boundary"), positions=range(101)) / "leaf" / "0"
    return predicted(model, key.apply(noise.Gaussian(), HELD_OUT.x, level))


def at_each_input_its_own(model: Deterministic, level: float, validation: int) -> Tensor:
    """All samples get noise, also where the callback leaves some out in training, but each at its own level."""
    key = Key((7, "input", "boundary"), positions=range(101))
    levels = level * (key / "per_sample").apply(noise.Uniform(), torch.full((101,), 0.5), 0.5)  # from [0, 1)
    return predicted(model, (key / "leaf" / "0").apply(noise.Uniform(), HELD_OUT.x, levels).clamp(-2, 2))


@torch.no_grad()
def in_the_weights(model: Deterministic, level: float, validation: int) -> Tensor:
    """Each batch of 34 has a draw of its own in each validation."""
    logits = []
    for batch_idx, x in enumerate(HELD_OUT.x.split(34)):
        noisy, key = copy.deepcopy(model), Key((7, "weight", "boundary", validation, batch_idx)) / "parameter"
        matrices = {name: w for name, w in noisy.named_parameters() if w.ndim > 1}
        drawn = as_one(matrices, lambda first, w, key=key: (key / first).apply(noise.Gaussian(), torch.zeros_like(w), 1.0))
        for name, w in matrices.items():
            w.addcmul_(drawn[name], level * w.std(correction=0))
        logits.append(noisy(x))
    return torch.cat(logits)


def in_the_activations(model: Deterministic, level: float, validation: int) -> Tensor:
    key = Key((7, "activation", "boundary"), positions=range(101)) / "module" / "net.1" / 0 / "leaf" / ""
    hidden = predicted(model.net[:2], HELD_OUT.x)  # type: ignore[arg-type]
    return predicted(model.net[2:], key.apply(noise.Gaussian(), hidden, level))  # type: ignore[arg-type]


BY_HAND = [
    (lambda level: InputNoise(noise.Gaussian(), level, seed=7), at_the_input),
    (
        lambda level: InputNoise(noise.Uniform(), level, probability=0.5, per_sample=True, clip=(-2, 2), seed=7),
        at_each_input_its_own,
    ),
    (lambda level: WeightNoise(noise.Gaussian(), level, relative="std", seed=7), in_the_weights),
    (lambda level: ActivationNoise(noise.Gaussian(), level, "net.1", seed=7), in_the_activations),
]


@pytest.mark.parametrize(("make", "noisy"), BY_HAND, ids=CALLBACKS)
def test_clean_and_boundary_are_those_of_a_hand_written_loop(make, noisy):
    callback = make(AdaptiveLevel(Plan((0.8, 1.6, 0.0, 2.4)), 0.8))
    snapshots = Snapshots()
    fit([callback, snapshots], module=Deterministic, validation=held_out(), max_epochs=5)
    assert len(snapshots.models) == 5
    for i, (model, decision, observed) in enumerate(zip(snapshots.models, history(callback), seen(callback), strict=True)):
        clean, boundary = predicted(model, HELD_OUT.x), noisy(model, decision.level, i)
        assert observed.clean == decision.clean == hits(clean).mean().item()
        assert observed.boundary == decision.boundary == hits(boundary if decision.level else clean).mean().item()
        assert observed.n == 101
        difference = hits(clean) - hits(boundary) if decision.level else torch.zeros(101)
        # sums of 101 counts in float64, in another order
        assert observed.boundary_error == pytest.approx(jackknife(difference), rel=1e-9, abs=1e-15)
    assert sum(decision.boundary != decision.clean for decision in history(callback)) >= 3, "the noise was seen"


def jackknife(values: Tensor) -> float:
    """The standard error of the mean of these samples, from the means without each group."""
    groups = groups_of(range(len(values)), values.device)
    n, pseudo = len(values), []
    for group in range(N_GROUPS):
        if m := int((groups == group).sum()):
            pseudo.append((n / m, n / m * values.mean() - (n / m - 1) * values[groups != group].mean()))
    centre = sum(value / h for h, value in pseudo)
    return math.sqrt(sum((value - centre) ** 2 / (h - 1) for h, value in pseudo) / len(pseudo))


def test_gap_and_standard_errors_are_those_of_hand_made_groups():
    callback, snapshots = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan((0.3,)))), Snapshots()
    fit([callback, snapshots], module=lambda: Deterministic(lr=0.5), validation=held_out(), max_epochs=6)
    best = hits(predicted(snapshots.models[0], HELD_OUT.x))
    for model, observed in zip(snapshots.models, seen(callback), strict=True):
        logits = predicted(model, HELD_OUT.x)
        now, confidence = hits(logits), logits.softmax(1).amax(1).double()
        # sums of 101 counts in float64, in another order
        assert observed.standard_error == pytest.approx(jackknife(now - best), rel=1e-9, abs=1e-15)
        # confidences are whole multiples of 2^-24
        assert observed.signed_gap == pytest.approx((confidence - now).mean().item(), abs=2**-24)
        assert observed.signed_gap_error == pytest.approx(jackknife(confidence - now), rel=1e-4)
        if now.sum() > best.sum():
            best = now
    accuracies = [observed.clean for observed in seen(callback)]
    assert accuracies[0] < max(accuracies) > accuracies[-1], "a validation is compared with the best, not the first or last"
    assert seen(callback)[0].standard_error == 0 < seen(callback)[-1].standard_error


def test_the_draw_is_the_same_in_each_validation():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7))
    fit([callback], module=still, validation=held_out(), max_epochs=3)
    assert len({observed.boundary for observed in seen(callback)}) == 1
    assert seen(callback)[0].boundary != seen(callback)[0].clean


@pytest.mark.parametrize("size", [1, 13, 101])
def test_the_batch_size_does_not_matter(size):
    first, other = (InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7)) for _ in range(2))
    fit([first], module=still, validation=held_out(), max_epochs=1)
    fit([other], module=still, validation=loader(HELD_OUT, batch_size=size), max_epochs=1)
    assert seen(other)[0]._replace(signed_gap=0, signed_gap_error=0) == seen(first)[0]._replace(
        signed_gap=0, signed_gap_error=0
    )
    # products of matrices of other sizes, in float32
    assert seen(other)[0].signed_gap == pytest.approx(seen(first)[0].signed_gap, abs=1e-6)


def broken(x: Tensor, level: float, *, generator: torch.Generator) -> Tensor:
    """Not a number on held-out data."""
    return x if torch.is_grad_enabled() else x * torch.nan


class Diverging(Classifier):
    def forward(self, x):
        return super().forward(x) * (1 if torch.is_grad_enabled() else torch.nan)


@pytest.mark.parametrize(("module", "place"), [(Diverging, noise.Gaussian()), (Classifier, broken)], ids=["clean", "noisy"])
def test_predictions_that_are_no_numbers_end_no_run_and_lower_the_level(module, place):
    callback = InputNoise(place, AdaptiveLevel(governor(), 0.5))
    fit([callback], module=module)
    assert [decision.reason for decision in history(callback)] == ["non_finite"] * 2
    assert all(math.isnan(decision.boundary) for decision in history(callback))
    assert all(math.isnan(decision.clean) == (module is Diverging) for decision in history(callback))
    assert level_of(callback) == 0.5 / 4


# --- metrics


def test_a_metric_of_ones_own_is_read():
    own = {
        "torchmetrics": tasks.Custom(MulticlassAccuracy(N_CLASSES, average="micro")),
        "task": tasks.Multiclass(),
    }
    callbacks = {
        name: InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, task=task), seed=7) for name, task in own.items()
    }
    for callback in callbacks.values():
        fit([callback], module=still, validation=held_out())
    for one, two in zip(*(seen(callback) for callback in callbacks.values()), strict=True):
        # float32
        assert (one.clean, one.boundary) == pytest.approx((two.clean, two.boundary), abs=1e-7)
        assert one.n == two.n == 101
        assert one.standard_error == one.boundary_error == math.inf
        assert math.isnan(one.signed_gap)


def test_a_metric_of_the_package_is_read():
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, task=tasks.Custom(BrierScore())), seed=7)
    module, _ = fit([callback], module=still, validation=held_out())
    for observed, logits in [
        (seen(callback)[0].clean, predicted(module.eval(), HELD_OUT.x)),
        (seen(callback)[0].boundary, at_the_input(module, 0.7)),
    ]:
        target = F.one_hot(HELD_OUT.y, N_CLASSES)
        # sums of squares in float32
        assert observed == pytest.approx((logits.softmax(1) - target).square().sum(1).mean().item(), rel=1e-5)


class Regressor(Deterministic):
    """Predicts the sum of the features."""

    def __init__(self, lr: float = 0.02):
        super().__init__(lr)
        self.net = nn.Linear(8, 1)  # type: ignore[assignment]

    def forward(self, x):
        return self.net(x)[:, 0]

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))


def numbers(n: int, seed: int) -> Rows:
    rows = Rows(n, seed=seed)
    rows.y = rows.x.sum(1)
    return rows


def test_an_error_is_governed_as_the_share_of_the_variance_that_is_explained():
    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module: Any):
            errors.append(F.mse_loss(pl_module(rows.x), rows.y).item())

    errors: list[float] = []
    rows = numbers(101, 1)
    variance = rows.y.var(correction=0).item()
    error = InputNoise(
        noise.Gaussian(),
        AdaptiveLevel(Governor(chance=variance, best=0.0, warmup=0, step=0.5), task=tasks.Custom(MeanSquaredError())),
    )
    share = InputNoise(noise.Gaussian(), AdaptiveLevel(Governor(chance=0.0, warmup=0, step=0.5), task=tasks.Custom(R2Score())))
    for callback in (error, share):
        train, validation = loader(numbers(64, 0)), loader(rows, batch_size=34)
        fit([callback, Look()], module=Regressor, train=train, validation=validation, max_epochs=8, num_sanity_val_steps=0)
    # means in float32
    assert [decision.clean for decision in history(error)] == pytest.approx(errors[:8], rel=1e-5)
    for one, two in zip(history(error), history(share), strict=True):
        assert one.reason == two.reason
        assert one.next_level == pytest.approx(two.next_level, rel=1e-3)
        assert 1 - one.clean / variance == pytest.approx(two.clean, abs=1e-5)
        assert 1 - one.boundary / variance == pytest.approx(two.boundary, abs=1e-5)
    assert {"raised", "lowered"} <= {decision.reason for decision in history(error)}


@pytest.mark.parametrize(("task", "outputs"), [(tasks.Binary(), 1), (tasks.Multilabel(), 4)])
def test_a_binary_and_a_multilabel_task_are_read(task, outputs):
    class Labels(Regressor):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Linear(8, outputs)  # type: ignore[assignment]

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    rows = Rows(101, seed=1)
    rows.y = (rows.x[:, :outputs] > 0).float()
    target = rows.y
    if task == tasks.Binary():
        rows.y = target = rows.y[:, :1]
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(Plan(), 0.7, task=task), seed=7)
    if task == tasks.Binary():
        callback = InputNoise(
            noise.Gaussian(),
            AdaptiveLevel(Plan(), 0.7, task=tasks.Binary(), predict=lambda module, batch: module(batch[0])),
            seed=7,
        )
    module, _ = fit([callback], module=Labels, train=loader(rows), validation=loader(rows), max_epochs=1)
    with torch.no_grad():
        assert seen(callback)[0].clean == ((module(rows.x) > 0) == target.bool()).double().mean().item()
        key = Key((7, "input", "boundary"), positions=range(101)) / "leaf" / "0"
        noisy = module(key.apply(noise.Gaussian(), rows.x, 0.7))
        assert seen(callback)[0].boundary == ((noisy > 0) == target.bool()).double().mean().item()


# --- batches


def as_dict(samples):
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"data": {"x": x}, "y": y, "weight": torch.ones(len(y))}  # two leaves could be the input


@pytest.mark.parametrize("adaptive", [{"inputs": "data.x", "target": "y"}, {"target": "y"}], ids=str)
def test_inputs_and_targets_are_found_in_a_dict(adaptive):
    # left out, the inputs are those of the callback
    level = AdaptiveLevel(Plan(), 0.7, **adaptive)
    callback = InputNoise(noise.Uniform(), level, inputs="data.x", seed=7)
    fit(
        [callback],
        module=lambda: Dictionary(lr=0.0),
        train=loader(collate_fn=as_dict),
        validation=loader(HELD_OUT, collate_fn=as_dict),
    )
    pl.seed_everything(0, verbose=False)
    module = still().eval()
    assert seen(callback)[0].clean == hits(predicted(module, HELD_OUT.x)).mean().item()
    key = Key((7, "input", "boundary"), positions=range(101)) / "leaf" / "data.x"
    assert seen(callback)[0].boundary == hits(predicted(module, key.apply(noise.Uniform(), HELD_OUT.x, 0.7))).mean().item()


def test_the_target_of_the_callback_is_read():
    callback = LabelSmoothing(AdaptiveLevel(SignedGap(), 0.02, inputs="data.x"), target="y")
    fit([callback], module=Dictionary, train=loader(collate_fn=as_dict), validation=loader(HELD_OUT, collate_fn=as_dict))
    assert len(history(callback)) == 2


class Tokens(Deterministic):
    """Classifies rows of token ids."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.words = nn.Embedding(10, 8)

    def forward(self, x):
        return self.net(self.words(x).mean(1))


def test_embeddings_of_tokens_are_looked_at_with_noise():
    rows = Rows(101, seed=1)
    rows.x = torch.randint(10, (101, 5), generator=torch.Generator().manual_seed(0))
    callback = EmbeddingNoise(AdaptiveLevel(Plan((30.0, 120.0))), seed=7)
    fit([callback], module=Tokens, train=loader(rows), validation=loader(rows), max_epochs=3)
    assert [decision.level for decision in history(callback)] == [0.0, 30.0, 120.0]
    assert history(callback)[0].clean == history(callback)[0].boundary
    assert history(callback)[2].clean != history(callback)[2].boundary


def test_the_forward_passes_have_the_precision_of_the_trainer():
    def predict(module, batch):
        casting.append(torch.is_autocast_enabled("cpu"))
        return module(batch[0])

    casting: list[bool] = []
    callback = InputNoise(noise.Gaussian(), AdaptiveLevel(governor(), 0.1, predict=predict))
    fit([callback], precision="bf16-mixed")
    assert len(history(callback)) == 2
    assert len(casting) > 8
    assert all(casting)
