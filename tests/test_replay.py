"""ReplayMonitor logs the user's own metrics under noise."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Pair, Rows, assert_same, execute, fit, keys_of, loader, make_trainer, weights
from helpers_replay import HELD_OUT, LEVELS, Everything, Readers, as_dict, split, under, validated
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import CombinedLoader
from scripts import replay
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import (
    ActivationNoise,
    EmbeddingNoise,
    InputNoise,
    Key,
    ReplayMonitor,
    RobustnessMonitor,
    WeightNoise,
    noise,
)


def as_namedtuple(samples):
    return Pair(*(torch.stack(column) for column in zip(*samples, strict=True)))


def as_tensor(samples):
    return torch.stack([torch.cat([x, y[None].float()]) for x, y in samples])


def as_tokens(samples):
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"y": y, "ids": (x > 0).long()}


# --- values


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
    # float32 sums over other batches
    assert found["replay/soft/0.6/val_loss"] == pytest.approx(F.cross_entropy(logits, HELD_OUT.y).item(), rel=1e-6)
    assert found["replay/soft/0.6/val_loss"] != found["replay/clean/val_loss"]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_values_do_not_depend_on_the_batch_size(batch_size):
    monitor = ReplayMonitor(noise.Gaussian(), LEVELS)
    whole = validated(monitor, validation=loader(HELD_OUT, batch_size=13))
    # float32 sums over other batches
    assert validated(monitor, validation=loader(HELD_OUT, batch_size=batch_size)) == pytest.approx(whole, rel=1e-6)


def test_the_default_noises_are_those_of_the_robustness_monitor():
    assert ReplayMonitor().levels == RobustnessMonitor().levels
    assert list(ReplayMonitor().levels) == ["gaussian", "impulse"]


def test_a_monitor_replays_in_fit_validate_and_test():
    monitor = ReplayMonitor(noise.Gaussian(), LEVELS)
    module, trainer = fit([monitor])
    in_fit = split(keys_of(trainer))[1]
    assert in_fit.keys() == {f"{place}/val_loss" for place in ("clean", "noisy", "gaussian/0", "gaussian/0.6")}
    assert in_fit["noisy/val_loss"] == pytest.approx((in_fit["gaussian/0/val_loss"] + in_fit["gaussian/0.6/val_loss"]) / 2)
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


def test_every_n_epochs_and_max_batches_bound_the_replays():
    calls: list[tuple[int, int]] = []

    class Counts(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            calls.append((self.current_epoch, batch_idx))

    monitor = ReplayMonitor(noise.Gaussian(), [0.5], every_n_epochs=2, max_batches=1)
    fit([monitor], module=Counts, max_epochs=4, num_sanity_val_steps=0)
    # once more at first, to look at the target
    assert [calls.count((epoch, 0)) for epoch in range(4)] == [1, 4, 1, 3]
    assert [calls.count((epoch, 1)) for epoch in range(4)] == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_layer_takes_its_fast_path_in_each_replay():
    class Pooled(Classifier):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(2, 2, 4, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x):
            x = x.view(len(x), -1, 2)
            is_padding = torch.arange(x.shape[1]) >= x.shape[1] // 2
            # the fast path returns 0 for padding
            return super().forward(self.encoder(x, src_key_padding_mask=is_padding.expand(x.shape[:2])))

    module, data = Pooled(), loader(Rows(13, seed=1), 13)
    one, two = (validated(ReplayMonitor(noise.Gaussian(), levels), module, data) for levels in ([0.5], [0.4, 0.5]))
    assert under(split(one)[1], "gaussian/0.5") == under(split(two)[1], "gaussian/0.5")


@pytest.mark.parametrize("order", [1, -1])
def test_averaged_weights_are_replayed(order):
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="it came with Lightning 2.6")
    callbacks = [
        averaging.WeightAveraging(avg_fn=lambda average, new, n: 0.5 * (average + new)),
        ReplayMonitor(noise.Gaussian(), LEVELS),
    ]
    found = keys_of(fit(callbacks[::order])[1])
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"] != found["replay/gaussian/0.6/val_loss"]


def test_checkpoints_and_early_stopping_can_monitor_the_keys(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="replay/gaussian/0.6/val_loss", filename="{epoch}")
    stopper = EarlyStopping("replay/gaussian/0.6/val_loss", patience=2, min_delta=100.0)
    _, trainer = fit([saver, stopper, ReplayMonitor(noise.Gaussian(), LEVELS)], max_epochs=9, enable_checkpointing=True)
    assert saver.best_model_score is not None
    assert trainer.current_epoch == 3, "no loss falls by a hundred, so the patience of two epochs ends"


@pytest.mark.parametrize("mode", [{"precision": "bf16-mixed"}, {"precision": "64-true"}, {"fast_dev_run": True}], ids=str)
def test_modes_of_the_trainer_are_supported(mode):
    without, _ = fit(**mode)
    with_, trainer = fit([ReplayMonitor(noise.Gaussian(), LEVELS)], **mode)
    found = keys_of(trainer)
    assert_same(weights(with_), weights(without))
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"] != found["replay/gaussian/0.6/val_loss"]


def test_two_ranks_log_what_one_rank_logs(tmp_path):
    execute(replay.main, tmp_path / "two", 2)
    replay.main(tmp_path, 1)
    own, one = split(torch.load(tmp_path / "0.pt"))
    two = [split(torch.load(tmp_path / "two" / f"{rank}.pt")) for rank in range(2)]
    assert under(one, "gaussian/0") == own
    for _, found in two:
        # float32 sums in another order
        assert found == pytest.approx(one, rel=1e-6)
    assert two[0][0]["val_loss"] != two[1][0]["val_loss"], "the module does not reduce its own value"


def test_ranks_that_log_different_keys_raise_an_error(monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", lambda self, decision, all=True: False)
    with pytest.raises(ValueError, match=r"all ranks must log the same keys .* logs \['validation_step.val_loss'\]"):
        validated(ReplayMonitor(noise.Gaussian()))


# --- batches and steps


@pytest.mark.filterwarnings("ignore:.*whole numbers in the columns")  # the labels, in the last column of a tensor
@pytest.mark.parametrize("collate", [as_dict, as_namedtuple, as_tensor], ids=lambda collate: collate.__name__)
def test_any_batch_and_a_step_without_an_index_are_replayed(collate):
    data = loader(HELD_OUT, collate_fn=collate)
    module, trainer = fit([ReplayMonitor(noise.Gaussian(), LEVELS)], module=Readers, train=data, validation=data)
    found = keys_of(trainer)
    assert found["replay/gaussian/0/val_loss"] == found["val_loss"] != found["replay/gaussian/0.6/val_loss"]
    assert module.validated, "the module sees its own batches only"


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
def test_noise_callbacks_find_their_own_inputs(probe):
    collate = as_dict if isinstance(probe, InputNoise) else as_tokens
    data = loader(HELD_OUT, collate_fn=collate)
    without, _ = fit(module=Readers, train=data, validation=data)
    with_, trainer = fit([ReplayMonitor({"probe": probe}, LEVELS)], module=Readers, train=data, validation=data)
    found = keys_of(trainer)
    assert_same(weights(with_), weights(without))
    assert found["replay/probe/0/val_loss"] == found["val_loss"] != found["replay/probe/0.6/val_loss"]
    assert not any(part._forward_hooks for part in with_.modules())


class Reconstructs(Classifier):
    """An autoencoder that returns its input."""

    def __init__(self, compare: Any):
        super().__init__()
        self.compare = compare

    def training_step(self, batch, batch_idx):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        x, y = (batch, batch) if isinstance(batch, torch.Tensor) else batch
        self.log("val_loss", self.compare(x.clone(), y))


AUTOENCODERS = {
    "function": lambda x, y: F.mse_loss(x, y),
    "module": lambda x, y: nn.SmoothL1Loss()(x, y),
    "view": lambda x, y: F.l1_loss(x.view(-1, 2, 4), target=y.view(-1, 2, 4)),
    "by hand": lambda x, y: ((x - y) ** 2).mean(),
    "by hand, of a view": lambda x, y: torch.sub(y.flatten(), other=x.flatten()).abs().mean(),
    "by hand, with a product": lambda x, y: ((d := (x - y)[:, None]) * d).mean(),
    "distance": lambda x, y: x.dist(y),
}


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_module_that_logs_nothing_for_the_epoch_is_a_warning(sanity):
    class Silent(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("at each step", 1.0, on_step=True, on_epoch=False)

    with pytest.warns(UserWarning, match="'replay': the validation steps .* nothing to repeat; type self.log") as found:
        fit([ReplayMonitor(noise.Gaussian(), [0.5])], module=Silent, max_epochs=2, num_sanity_val_steps=sanity)
    assert len([each for each in found if "nothing to repeat" in str(each.message)]) == 1


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("compare", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_a_target_that_is_the_noisy_input_is_a_warning(compare, sanity):
    data: Any = DataLoader(Rows(13, seed=1).x, 5)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="'replay': the input is also the target of the loss") as found:
        fit(
            [ReplayMonitor(noise.Gaussian(), [0.5])],
            module=lambda: Reconstructs(compare),
            train=data,
            validation=data,
            num_sanity_val_steps=sanity,
        )
    assert len([each for each in found if "also the target" in str(each.message)]) == 1


@pytest.mark.parametrize("compare", [lambda x, y: (x - y).abs().mean(), F.l1_loss], ids=["by hand", "function"])
def test_a_part_of_the_input_that_gets_no_noise_may_be_the_target(compare):
    class Forecasts(Reconstructs):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.compare(batch[:, :4] * 2, batch[:, 4:]))

    data: Any = DataLoader(Rows(13, seed=1).x, 5)  # type: ignore[arg-type]
    monitor = ReplayMonitor(noise.Gaussian(), [0.5], mask=lambda batch: (torch.arange(8) < 4).expand_as(batch))
    _, trainer = fit([monitor], module=lambda: Forecasts(compare), train=data, validation=data)
    assert trainer.callback_metrics["replay/gaussian/0.5/val_loss"] > trainer.callback_metrics["replay/clean/val_loss"]


@pytest.mark.parametrize("compare", [*AUTOENCODERS.values(), torch.vmap(F.mse_loss)], ids=[*AUTOENCODERS, "vmap"])
def test_a_second_tensor_stays_a_clean_target(compare):
    x = Rows(13, seed=1).x
    data = loader(TensorDataset(x, x))
    monitor = ReplayMonitor(noise.Gaussian(), [0.5])
    _, trainer = fit([monitor], module=lambda: Reconstructs(lambda x, y: compare(x, y).mean()), train=data, validation=data)
    assert trainer.callback_metrics["replay/gaussian/0.5/val_loss"] > trainer.callback_metrics["replay/clean/val_loss"]


@pytest.mark.parametrize(
    "part",
    [torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)],
    ids=["sparse", "jagged"],
)
def test_a_step_may_subtract_tensors_that_are_not_dense(part):
    class Subtracts(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            assert (2 * part - part).sum() != 0

    fit([ReplayMonitor(noise.Gaussian(), [0.5])], module=Subtracts)


class Images(Classifier):
    """A step that subtracts something of the input from it, with or without a look at the label."""

    def __init__(self, uses: Any):
        super().__init__()
        self.uses = uses

    def validation_step(self, batch, batch_idx):
        x, y = batch
        residual = (x - x.clone().flip(-1)).square().mean(1)
        self.log("val_loss", self.uses(residual, y).mean())


@pytest.mark.parametrize(
    ("uses", "is_loss"),
    [
        (lambda loss, y: loss, True),
        (lambda loss, y: loss[: len(y)], True),
        (lambda loss, y: loss * (y == 0), False),
        (lambda loss, y: loss + sum(y.tolist()), False),
        (lambda loss, y: loss + y.numpy().mean(), False),
        (lambda loss, y: loss + y[0].item(), False),
    ],
)
def test_a_difference_is_a_loss_only_if_nothing_else_of_the_batch_is_used(uses, is_loss):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit([ReplayMonitor(noise.Gaussian(), [0.5])], module=lambda: Images(uses))
    assert any("also the target" in str(each.message) for each in found) == is_loss


def test_a_difference_that_is_scaled_is_no_loss():
    class Density(Classifier):
        def validation_step(self, batch, batch_idx):
            z = (batch[0] - self(batch[0])[:, :1].expand_as(batch[0])) * 0.5
            self.log("val_loss", z.square().mean())

    fit([ReplayMonitor(noise.Gaussian(), [0.5])], module=Density)


class Loaders(Classifier):
    """Logs the same metric for each of two loaders."""

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
    """Differentiates with respect to the input, as a penalty or an attack does."""

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
    class LogsAtTheEnd(Classifier):  # in compiled code Lightning cannot log with this torch
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
    trainer.fit(torch.compile(LogsAtTheEnd(), backend="eager"), loader(), loader(Rows(16, seed=1)))  # type: ignore[arg-type]
    found = keys_of(trainer)
    assert found["replay/gaussian/0/val_total"] == found["val_total"] != found["replay/gaussian/0.6/val_total"]


# --- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReplayMonitor([]), "noises must hold at least one noise"),
        (lambda: ReplayMonitor(noise.SwapNoise()), "'swapnoise' cannot perturb held-out data: it mixes samples"),
        (lambda: ReplayMonitor(noise.Gaussian(), every_n_epochs=0), "at least 1, got 0"),
        (lambda: fit([ReplayMonitor(noise.Gaussian()), ReplayMonitor(noise.Uniform())]), "two monitors are named 'replay'"),
        (lambda: fit([ReplayMonitor(noise.Gaussian())], limit_val_batches=0), "ReplayMonitor needs a validation"),
        (lambda: fit([ReplayMonitor(noise.Gaussian(), every_n_epochs=3)]), "has no validation at every_n_epochs=3"),
    ],
)
def test_wrong_arguments_raise_an_error(build, message):
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
def test_errors_are_raised_before_the_training(monitor, kind, error, message):
    module = kind()
    with pytest.raises(error, match=message):
        fit([monitor], module=module)
    assert not module.seen


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (InputNoise(noise.Gaussian(), inputs="image"), "no leaf 'image'"),
        (WeightNoise(noise.Gaussian(), params="nett.*"), "no parameter matches"),
        (ActivationNoise(noise.Gaussian(), modules="nett"), "no module matches"),
        (EmbeddingNoise(), "expected a single nn.Embedding, got: none"),
    ],
)
def test_a_probe_that_cannot_work_is_refused_before_the_training_without_a_sanity_check(probe, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([ReplayMonitor({"probe": probe}, {"probe": [0.5]})], module=module, num_sanity_val_steps=0)
    assert not module.seen
