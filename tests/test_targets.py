"""Noise in targets meets the loss, or the batch where that is asked for, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Rows, assert_same, fit, loader, weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import AUROC, Accuracy, ConfusionMatrix, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from lightning_noise import LabelSmoothing, Mixup, RobustnessMonitor, TargetNoise, labels, noise, schedules


class Custom(Classifier):
    """A classifier whose training loss is given."""

    def __init__(self, loss, lr: float = 0.1):
        super().__init__(lr=lr)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch)
        x, y = batch
        loss = self.loss(self(x), y)
        if loss is not None:
            self.losses.append(loss.detach())
        return loss


# --- the loss


WEIGHT = torch.tensor([1.0, 2.0, 0.5])
CRITERIA = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "class weights": {"weight": WEIGHT},
    "ignored": {"ignore_index": 2},
}


@pytest.mark.parametrize("kwargs", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("level", [0.1, schedules.Linear(0.3, 0.0)], ids=["constant", "decay"])
def test_smoothing_trains_as_the_criterion_that_smooths(kwargs, level):
    levels: list[float] = []

    class Follow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            levels.append(smoothing.current_level)

    def by_hand(logits, y):
        return F.cross_entropy(logits, y, label_smoothing=levels[len(hand.losses)], **kwargs)

    smoothing = LabelSmoothing(level)
    unmodified = Custom(nn.CrossEntropyLoss(**kwargs))
    hand = Custom(by_hand)
    hand.load_state_dict(unmodified.state_dict(), strict=False)
    fit([smoothing, Follow()], module=unmodified)
    fit(module=hand)
    assert len(levels) == 6
    assert_same(weights(hand.net), weights(unmodified.net))
    assert_same(hand.losses, unmodified.losses)


@pytest.mark.filterwarnings("ignore:No positive samples")  # the AUROC of 8 rows
def test_the_metrics_of_the_training_step_see_the_true_labels():
    class Measured(Classifier):
        def __init__(self):
            super().__init__(lr=0.0)
            self.metrics = MetricCollection(
                {
                    "accuracy": Accuracy(task="multiclass", num_classes=N_CLASSES),
                    "auroc": AUROC(task="multiclass", num_classes=N_CLASSES),
                    "confusion": ConfusionMatrix(task="multiclass", num_classes=N_CLASSES),
                    "ece": MulticlassCalibrationError(num_classes=N_CLASSES),
                }
            )

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            logits = self(x)
            self.metrics.update(logits.softmax(1).detach(), y)
            loss = F.cross_entropy(logits, y)
            self.losses.append(loss.detach())
            return loss

    def measured(callbacks):
        module, _ = fit(callbacks, module=Measured)
        return module.metrics.compute(), module.losses

    metrics, losses = measured([])
    flips = TargetNoise(labels.FlipLabels(N_CLASSES), 0.5, via="loss")
    for callbacks in ([LabelSmoothing(0.3)], [flips]):
        found, softened = measured(callbacks)
        assert softened != losses
        assert found.keys() == metrics.keys()
        for key, value in metrics.items():
            assert torch.equal(found[key], value), key


def test_the_loss_of_validation_and_test_is_not_smoothed():
    def losses(callbacks):
        module, trainer = fit(callbacks, module=lambda: Classifier(lr=0.0))
        value = trainer.callback_metrics["val_loss"]
        return value, trainer.test(module, loader(), verbose=False)[0]["test_loss"]

    assert losses([LabelSmoothing(0.5)]) == losses([])


def test_labels_of_a_binary_cross_entropy_are_smoothed_to_one_half():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).repeat(4, 1)
    train = loader(TensorDataset(x, y))
    module, _ = fit(
        [LabelSmoothing(0.2)], module=Custom(F.binary_cross_entropy_with_logits, lr=0.0), train=train, validation=train_less()
    )
    assert len(module.losses) == 2
    assert torch.equal(module.seen[0][1], y)
    hand = Custom(lambda logits, y: F.binary_cross_entropy_with_logits(logits, y * 0.8 + 0.1), lr=0.0)
    hand.load_state_dict(module.state_dict())
    fit(module=hand, train=train, validation=train_less())
    torch.testing.assert_close(hand.losses, module.losses, rtol=1e-6, atol=0)  # a level in float64 is rounded once more


def train_less() -> DataLoader:
    return loader(Rows(13, seed=1))


def pixelwise(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.unsqueeze(-1).expand(*logits.shape, y.shape[-1]), y)


@pytest.mark.parametrize("via", ["loss", "sample", "batch"])
def test_ignored_pixels_are_left_alone(via):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 8, generator=generator), torch.randint(0, N_CLASSES, (8, 5), generator=generator)
    y[:, 2], y[0] = -100, -100
    train = loader(TensorDataset(x, y))
    callback = TargetNoise(labels.SmoothLabels(N_CLASSES), 0.9, via=via)
    module, _ = fit([callback], module=Custom(pixelwise), train=train, validation=train_less(), max_epochs=1)
    seen = module.seen[0][1]
    ignored = y == -100
    if via == "batch":
        assert (seen.movedim(1, -1)[ignored] == 0).all()
        torch.testing.assert_close(seen.sum(1), (~ignored).float(), rtol=0, atol=1e-6)  # sums of a few float32 numbers
    else:
        assert torch.equal(seen == -100, ignored)
        assert torch.equal(seen, y) is (via == "loss")
    assert module.losses[0].isfinite()


def test_a_criterion_that_smooths_already_is_refused():
    with pytest.raises(
        ValueError, match=r"labels can be smoothed in one place only, but the criterion has label_smoothing=0\.1"
    ):
        fit([LabelSmoothing(0.1)], module=Custom(nn.CrossEntropyLoss(label_smoothing=0.1)))


def squared(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(y, N_CLASSES)).square().sum(1).mean()


@pytest.mark.parametrize("callback", [LabelSmoothing, Mixup], ids=lambda callback: callback.__name__)
@pytest.mark.parametrize("manual", [False, True])
def test_a_step_without_a_loss_of_the_target_is_an_error_that_names_the_ways_out(callback, manual):
    class Manual(Custom):
        def __init__(self, loss):
            super().__init__(loss)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()  # type: ignore[union-attr]

    module = (Manual if manual else Custom)(squared)
    way_out = (
        r"type (Mixup\(|TargetNoise\(labels.SmoothLabels\(n_classes=…\), )…, via='batch'\).*via='sample'\) to put drawn labels"
    )
    with pytest.raises(ValueError, match=rf"computed no cross_entropy.*{way_out}"):
        fit([callback(schedules.Every(0.3, every=2, begin=1))], module=module)
    assert len(module.losses) == 4, "not in the first step that is to be smoothed"


@pytest.mark.parametrize(
    ("build", "way_out"),
    [
        (lambda: LabelSmoothing(0.1), r"TargetNoise\(labels.SmoothLabels\(n_classes=…\), …, via='sample'\)"),
        (lambda: Mixup(1.0), r"Mixup\(…, via='sample'\)"),
        (lambda: TargetNoise(labels.FlipLabels(N_CLASSES), 0.5, via="loss"), r"TargetNoise\(…, via='sample'\)"),
    ],
)
def test_a_loss_that_also_uses_the_target_elsewhere_warns_once_in_each_fit(build, way_out):
    callback = build()
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"also needs sub in squared \(test_targets.*type {way_out}") as caught:
            fit([callback], module=Custom(lambda logits, y: F.cross_entropy(logits, y) + squared(logits, y)))
        assert sum("also needs" in str(warning.message) for warning in caught) == 1


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_loss_that_is_missing_in_a_skipped_step_is_no_error():
    def sometimes(logits, y):
        return None if len(module.seen) < 3 else F.cross_entropy(logits, y)

    module = Custom(sometimes)
    fit([LabelSmoothing(0.2)], module=module)
    assert len(module.losses) == 4


def test_smoothing_and_mixing_go_together_in_either_order():
    def losses(callbacks):
        return fit(callbacks, module=lambda: Classifier(lr=0.0))[0].losses

    one = losses([LabelSmoothing(0.2), Mixup(1.0)])
    assert one == losses([Mixup(1.0), LabelSmoothing(0.2)])
    assert one != losses([Mixup(1.0)]) != losses([])


@pytest.mark.slow
def test_a_level_that_changes_compiles_nothing_anew():
    def graphs(callbacks):
        torch._dynamo.reset()
        counter, module = CompileCounter(), Classifier()
        module.net = torch.compile(module.net, backend=counter)  # type: ignore[assignment]
        fit(callbacks, module=module, train=loader())
        return counter.frame_count

    assert graphs([LabelSmoothing(schedules.Linear(0.3, 0.1))]) == graphs([LabelSmoothing(0.3)]) > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_smoothing_works_in_any_precision(precision):
    module, _ = fit([LabelSmoothing(0.2)], precision=precision)
    assert torch.stack(module.losses).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LabelSmoothing(0.3),
        lambda: Mixup(1.0),
        lambda: TargetNoise(labels.FlipLabels(N_CLASSES), 0.9, via="loss"),
    ],
    ids=["smoothing", "mixup", "flips"],
)
def test_a_loss_that_is_checkpointed_trains_as_one_that_is_not(make, use_reentrant):
    class Checkpointed(Classifier):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Identity()

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.clone().requires_grad_()
            return checkpoint(lambda x, y: F.cross_entropy(self(x), y), x, y, use_reentrant=use_reentrant)

    class Plain(Checkpointed):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    assert_same(weights(fit([make()], module=Checkpointed)[0]), weights(fit([make()], module=Plain)[0]))


@pytest.mark.parametrize("callbacks", [[LabelSmoothing(0.3)], [Mixup(1.0), LabelSmoothing(0.3)]], ids=["one", "two"])
def test_a_hook_between_the_step_and_the_backward_pass_sees_the_true_labels_and_may_fail(callbacks):
    class Outer(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    class Between(Classifier):
        def on_before_backward(self, loss):
            y = self.seen[-1][1]
            z = torch.ones(len(y), N_CLASSES).cumsum(1)
            assert torch.equal(F.cross_entropy(z, y), F.cross_entropy(z, torch.tensor(y.tolist())))
            if len(self.seen) == 2:
                raise KeyError("in a hook")

    with Outer() as outer:
        with pytest.raises(KeyError, match="in a hook"):
            fit(callbacks, module=Between)
        before = outer.calls
        torch.ones(1)
        assert outer.calls == before + 1  # the modes of the step have left the stack, and no other mode has
    fit(callbacks)


def test_what_changes_the_batch_comes_before_what_changes_the_loss():
    flips = TargetNoise(labels.FlipLabels(N_CLASSES), 0.3)
    for later in (flips, TargetNoise(labels.FlipLabels(N_CLASSES), 0.3, via="batch")):
        for first in (LabelSmoothing(0.1), Mixup(1.0)):
            with pytest.raises(ValueError, match=rf"'target' would change the target in the batch after '{first.name}'"):
                fit([first, later])
    module, _ = fit([flips, LabelSmoothing(0.1), Mixup(1.0)])
    assert torch.stack(module.losses).isfinite().all()


# --- flips


class Indexed(Dataset):
    """Rows with the index of the sample."""

    def __init__(self, n: int = 400):
        self.rows = Rows(n)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"x": self.rows.x[i], "y": self.rows.y[i], "i": i}


class Dicts(Classifier):
    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return F.cross_entropy(self(batch["x"]), batch["y"])


def flipped(callback, *, module=Dicts, **kwargs) -> list[dict[int, bool]]:
    """Which samples were flipped, in each epoch."""
    data = Indexed()
    train = DataLoader(data, **{"batch_size": 40, "shuffle": True, **kwargs})
    module, _ = fit([callback], module=module, train=train, max_epochs=3)
    found = [
        dict(zip(batch["i"].tolist(), (batch["y"] != data.rows.y[batch["i"]]).tolist(), strict=True)) for batch in module.seen
    ]
    epochs = len(found) // 3
    return [{k: v for part in found[e * epochs : (e + 1) * epochs] for k, v in part.items()} for e in range(3)]


def test_with_an_index_the_same_samples_flip_in_every_epoch_for_any_batch_size():
    def make():
        return TargetNoise(labels.FlipLabels(N_CLASSES), 0.3, target="y", index="i", seed=0)

    first, *others = flipped(make())
    assert all(epoch == first for epoch in others)
    assert flipped(make(), batch_size=25)[0] == first
    rate = sum(first.values()) / len(first)
    assert abs(rate - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / 400)  # five standard errors


def test_without_an_index_the_flips_are_new_in_each_epoch():
    epochs = flipped(TargetNoise(labels.FlipLabels(N_CLASSES), 0.3, target="y"))
    assert epochs[0] != epochs[1] != epochs[2]
    changed = [value for epoch in epochs for value in epoch.values()]
    assert abs(sum(changed) / len(changed) - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / len(changed))  # five standard errors


def test_flips_at_a_rising_level_are_nested():
    callback = TargetNoise(labels.FlipLabels(N_CLASSES), lambda progress: 0.2 * (1 + progress.epoch), target="y", index="i")
    low, middle, high = ({i for i, changed in epoch.items() if changed} for epoch in flipped(callback))
    assert low < middle < high


def test_flips_at_the_loss_leave_the_batch_alone_and_have_the_loss_of_flips_in_the_batch():
    losses = {}
    for via in ("loss", "sample"):
        noise_ = TargetNoise(labels.FlipLabels(N_CLASSES), 0.5, via=via)
        module, _ = fit([noise_], module=lambda: Classifier(lr=0.0), train=loader())
        losses[via] = module.losses
        unchanged = [torch.equal(y, Rows().y[8 * (i % 3) :][:8]) for i, (_, y) in enumerate(module.seen)]
        assert all(unchanged) is (via == "loss")
    assert losses["loss"] == losses["sample"]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_class_numbers_beyond_half_precision_survive(precision):
    class Many(Classifier):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(8, 5000)

    rows = Rows()
    rows.y = torch.arange(24) + 4001
    for callback in (LabelSmoothing(0.1), TargetNoise(labels.FlipLabels(5000), 0.01), Mixup(0.4), Mixup(0.4, via="sample")):
        module, _ = fit([callback], module=Many, train=loader(rows), precision=precision, validation=loader(rows))
        seen = torch.cat([y for _, y in module.seen[:3]])
        assert seen.dtype == torch.int64
        assert (seen == rows.y).sum() >= 20 if not isinstance(callback, Mixup) else set(seen.tolist()) <= set(rows.y.tolist())
        # of 5000 logarithms the sum, which smoothing takes as torch does, is too large for float16
        assert torch.stack(module.losses).isfinite().all() or (precision == "16-true" and isinstance(callback, LabelSmoothing))


@pytest.mark.parametrize("via", ["loss", "sample"])
def test_a_label_that_the_loss_alone_ignores_is_refused_with_what_to_type(via):
    def loss(logits, y):
        return F.cross_entropy(logits, y, ignore_index=0)

    def build(**kwargs):
        return TargetNoise(labels.FlipLabels(N_CLASSES), 0.9, via=via, **kwargs)

    with pytest.raises(
        ValueError, match="the loss ignores the label 0, which the noise takes for a class; type ignore_index=0"
    ):
        fit([build()], module=Custom(loss))
    module, _ = fit([build(ignore_index=0)], module=Custom(loss), train=loader())
    assert torch.equal(torch.cat([y for _, y in module.seen[:3]]) == 0, Rows().y == 0)


# --- probabilities and regression


def test_probabilities_are_handed_to_the_module():
    module, _ = fit([TargetNoise(labels.ConfusionFlips(CONFUSION), 0.5, via="batch")], train=loader())
    expected = 0.5 * F.one_hot(Rows().y[:8], N_CLASSES) + 0.5 * torch.tensor(CONFUSION)[Rows().y[:8]]
    torch.testing.assert_close(module.seen[0][1], expected, rtol=0, atol=1e-6)  # products and sums of float32 numbers


CONFUSION = [[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4]]


@pytest.mark.parametrize(("via", "expected"), [("batch", [0.9, 0.1]), ("sample", None)])
def test_binary_labels_as_floats_are_changed_one_by_one(via, expected):
    x, y = torch.randn(2000, 8), torch.tensor([[1.0, 0.0]]).repeat(2000, 1)

    def loss(logits, y):
        return F.binary_cross_entropy_with_logits(logits[:, :2], y)

    callback = TargetNoise(labels.FlipLabels(2), 0.1, via=via)
    train = loader(TensorDataset(x, y), batch_size=2000)
    module, _ = fit([callback], module=Custom(loss), train=train, validation=train_less(), max_epochs=1)
    seen = module.seen[0][1]
    assert seen.dtype == y.dtype
    if expected:
        torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=0, atol=1e-6)  # float32
    else:
        rates = (seen != y).double().mean(0)
        assert ((rates - 0.1).abs() <= 5 * math.sqrt(0.09 / 2000)).all()  # five standard errors


def test_gaussian_noise_in_a_regression_adds_its_variance_to_the_loss_and_nothing_to_the_gradient():
    n, sigma = 20_000, 0.7
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)

    class Regression(Custom):
        def __init__(self):
            super().__init__(F.mse_loss, lr=0.0)
            self.net = nn.Sequential(nn.Linear(8, 1))

        def on_after_backward(self):
            weight = next(self.parameters())
            assert weight.grad is not None
            self.gradient = weight.grad.clone()

    def run(callbacks):
        train = loader(TensorDataset(x, y), batch_size=n)
        return fit(callbacks, module=Regression, train=train, max_epochs=1, limit_val_batches=0)[0]

    clean, noisy = run([]), run([TargetNoise(noise.Gaussian(), sigma)])
    residual = (clean.losses[0]).sqrt().item()
    # the error is s^2 + 2 s r + r^2 of independent noise s and residual r: five standard errors
    tolerance = 5 * math.sqrt((2 * sigma**4 + 4 * sigma**2 * residual**2) / n)
    assert abs((noisy.losses[0] - clean.losses[0]).item() - sigma**2) <= tolerance
    # the gradient changes by -2 s x
    assert (noisy.gradient - clean.gradient).abs().max() <= 5 * 2 * sigma / math.sqrt(n)
    assert torch.equal(noisy.seen[0][0], x)


# --- what is refused


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TargetNoise(noise.Gaussian(), 0.1, via="batch"), ValueError, "via and index are for label noise"),
        (lambda: TargetNoise(labels.FlipLabels(3), 0.1, via="metrics"), ValueError, "via must be 'loss', 'batch' or 'sample'"),  # type: ignore[arg-type]
        (
            lambda: LabelSmoothing(0.1, target=["y", "z"]),  # type: ignore[arg-type]
            ValueError,
            r"type a callback for each, such as LabelSmoothing\(…, target='z', name='second'\)",
        ),
        (lambda: TargetNoise(labels.FlipLabels(3), 1.1), ValueError, r"in \[0, 1\], got 1.1"),
        (lambda: TargetNoise(labels.FlipLabels, 0.1), TypeError, "a noise must be a value"),  # type: ignore[arg-type]
        (
            lambda: RobustnessMonitor({"y": LabelSmoothing(0.1)}, [0.1]),
            ValueError,
            "'y' cannot perturb held-out data: LabelSmoothing",
        ),
        (
            lambda: RobustnessMonitor({"mix": Mixup()}, [0.1]),
            ValueError,
            "'mix' cannot perturb held-out data: Mixup mixes samples",
        ),
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (TargetNoise(labels.FlipLabels(2), 0.1), ValueError, r"labels must be in \[0, 2\), got 0 to 2"),
        (TargetNoise(labels.SmoothLabels(), 0.1, via="batch"), ValueError, "SmoothLabels needs n_classes=… here"),
        (TargetNoise(noise.Gaussian(), 0.1), TypeError, r"Gaussian needs floats, but the target '1' is int64 .*FlipLabels"),
        (TargetNoise(labels.FlipLabels(3), 0.1, target=0), TypeError, "labels must be class indices"),
        (
            TargetNoise(labels.FlipLabels(3), 0.1, index=0),
            ValueError,
            r"index must hold an integer for each of the 200 samples",
        ),
        (LabelSmoothing(0.1, target="label"), ValueError, "no leaf 'label' in the batch; leaves are: '0' float32"),
    ],
)
def test_what_does_not_suit_the_batch_is_found_on_the_first_one(callback, error, message):
    with pytest.raises(error, match=message):
        fit([callback], train=loader(Rows(200), batch_size=200))
