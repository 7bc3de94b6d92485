"""A monitor measures what it says, and nothing else is different for it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import (
    N_CLASSES,
    N_FEATURES,
    Classifier,
    Dictionary,
    Rows,
    Stochastic,
    assert_same,
    fit,
    keys_of,
    loader,
    make_trainer,
    weights,
)
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_noise import (
    ActivationNoise,
    InputNoise,
    Key,
    ReplayMonitor,
    RobustnessMonitor,
    WeightNoise,
    metrics,
    noise,
    plots,
    tasks,
)
from lightning_noise.evaluation.conditions import OVERALL, Condition
from lightning_noise.testing import global_streams

HELD_OUT = Rows(13, seed=1)
LEVELS = (0.0, 0.2, 0.6)
METRICS = ("accuracy", "ece", "loss")


def validated(
    monitor: RobustnessMonitor, module: Callable[[], pl.LightningModule] = Classifier, validation: Any = None
) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer([monitor])
    trainer.validate(module(), loader(HELD_OUT) if validation is None else validation, verbose=False)
    return keys_of(trainer)


# --- it changes nothing


@pytest.mark.parametrize("module", [Classifier, Stochastic])
def test_weights_metrics_and_random_streams_are_as_without(module):
    without, plain = fit(module=module)
    streams = global_streams()
    with_, watched = fit([RobustnessMonitor([noise.Gaussian(), noise.Impulse()])], module=module)
    assert global_streams() == streams
    assert_same(weights(with_), weights(without))
    own = {key: value for key, value in keys_of(watched).items() if not key.startswith("robustness")}
    assert own == keys_of(plain)
    for one, two in zip(with_.validated, without.validated, strict=True):
        assert_same(one, two)


def test_the_held_out_data_are_untouched():
    data = Rows(13, seed=1)
    fit([RobustnessMonitor(noise.Gaussian())], validation=loader(data))
    assert_same([data.x, data.y], [HELD_OUT.x, HELD_OUT.y])


def test_a_monitor_deep_copies_and_pickles_and_serves_a_second_fit():
    monitor = RobustnessMonitor([noise.Gaussian()], LEVELS)
    copies = [copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))]
    first = keys_of(fit([monitor])[1])
    for again in [monitor, *copies]:
        assert keys_of(fit([again])[1]) == first


def test_a_fit_follows_a_validation_of_its_own():
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS)
    validated(monitor)
    assert keys_of(fit([monitor])[1]) == keys_of(fit([RobustnessMonitor(noise.Gaussian(), LEVELS)])[1])


class Centering(Classifier):
    """Writes to the batch in the validation step."""

    def validation_step(self, batch, batch_idx):
        batch[0].zero_()
        super().validation_step(batch, batch_idx)


def test_a_picture_shows_the_batch_before_the_step_writes_to_it(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "samples", lambda inputs, **kwargs: shown.append(torch.stack(inputs["clean"])))
    monkeypatch.setattr("lightning_noise.evaluation.figures._SMALLEST_PICTURE", 1)
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5])
    trainer = make_trainer([monitor], logger=CSVLogger(tmp_path))
    trainer.validate(Centering(), loader(HELD_OUT), verbose=False)
    assert torch.equal(shown[-1], HELD_OUT.x[[i * len(HELD_OUT) // 4 for i in range(4)]])


def test_no_predictions_are_kept_after_a_validation():
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5])
    trainer = make_trainer([monitor])
    trainer.validate(Classifier(), loader(HELD_OUT), verbose=False)
    gc.collect()
    kept = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape == (len(HELD_OUT) % 8, N_CLASSES)]
    assert monitor.report is not None
    assert not kept


# --- it measures what it says


def test_the_values_are_those_of_a_hand_written_loop():
    module = fit(max_epochs=5)[0].eval()
    found = validated(RobustnessMonitor({"soft": noise.Gaussian()}, LEVELS, seed=5), lambda: module)
    accuracy = {}
    for level in LEVELS:
        key = Key((5, "probe", "soft"), positions=range(13)) / "leaf" / "0"
        with torch.no_grad():
            logits = module(key.apply(noise.Gaussian(), HELD_OUT.x, level))
        calibration = metrics.ExpectedCalibrationError()
        calibration.update(logits, HELD_OUT.y)
        accuracy[level] = (logits.argmax(1) == HELD_OUT.y).double().mean().item()
        assert found[f"robustness_levels/soft/{level:g}/accuracy"] == pytest.approx(accuracy[level], abs=1e-7)
        # sums in float32, in other batches
        assert found[f"robustness_levels/soft/{level:g}/loss"] == pytest.approx(
            F.cross_entropy(logits, HELD_OUT.y).item(), rel=1e-6
        )
        assert found[f"robustness_levels/soft/{level:g}/ece"] == pytest.approx(calibration.compute().item(), abs=1e-6)
    clean, mean = accuracy[0.0], sum(accuracy.values()) / 3
    chance = HELD_OUT.y.bincount().max().item() / 13
    retained = sum((value - chance) / (clean - chance) for value in accuracy.values()) / 3
    assert clean > chance
    assert found["robustness/accuracy_clean"] == pytest.approx(clean, abs=1e-7)
    assert found["robustness/accuracy_worst"] == pytest.approx(min(accuracy.values()), abs=1e-7)
    assert found["robustness/accuracy_drop"] == pytest.approx(clean - mean, abs=1e-6)
    assert found["robustness/accuracy_retention"] == pytest.approx(retained, abs=1e-6)
    assert found["robustness/accuracy_noisy"] == pytest.approx(mean, abs=1e-6)
    assert found["robustness/score"] == pytest.approx((clean + mean) / 2, abs=1e-6)


def test_means_are_over_noises_and_levels():
    monitor = RobustnessMonitor([noise.Gaussian(), noise.Uniform()], {"gaussian": [0.5], "uniform": [1.0, 2.0]})
    found = validated(monitor)
    assert monitor.report is not None
    of_noises = monitor.report.values
    for metric in METRICS:
        noisy = [found[f"robustness_levels/{place}/{metric}"] for place in ("gaussian/0.5", "uniform/1", "uniform/2")]
        clean = found[f"robustness/{metric}_clean"]
        assert found[f"robustness/{metric}_noisy"] == pytest.approx(sum(noisy) / 3, abs=1e-6)
        assert of_noises[Condition("uniform"), metric] == pytest.approx(sum(noisy[1:]) / 2, abs=1e-6)
        if metric != "ece":
            assert of_noises[OVERALL, f"{metric}_drop"] == pytest.approx(clean - sum(noisy) / 3, abs=1e-6)
            drop = of_noises[Condition("uniform"), f"{metric}_drop"]
            assert drop == pytest.approx(clean - sum(noisy[1:]) / 2, abs=1e-6)
    worst = min(found[f"robustness_levels/{place}/accuracy"] for place in ("gaussian/0.5", "uniform/1", "uniform/2"))
    assert found["robustness/accuracy_worst"] == worst


@pytest.mark.parametrize("module", [Classifier, Stochastic])
def test_level_0_equals_clean(module):
    _, trainer = fit([RobustnessMonitor(noise.Gaussian(), LEVELS)], module=module)
    found = keys_of(trainer)
    for metric in METRICS:
        assert found[f"robustness_levels/gaussian/0/{metric}"] == found[f"robustness/{metric}_clean"]
    assert found["robustness_levels/gaussian/0.6/loss"] != found["robustness/loss_clean"]


@pytest.mark.parametrize("order", [1, -1])
def test_averaged_weights_are_what_is_measured(order):
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="it came with Lightning 2.6")
    callbacks = [
        averaging.WeightAveraging(avg_fn=lambda average, new, n: 0.5 * (average + new)),
        RobustnessMonitor(noise.Gaussian(), [0.1]),
    ]
    _, trainer = fit(callbacks[::order])
    found = keys_of(trainer)
    # the user's own metric of the same weights; the means are taken over other batches, in float32
    assert found["robustness/loss_clean"] == pytest.approx(found["val_loss"], rel=1e-6)


class Recorder:
    """A `predict` that keeps the inputs."""

    def __init__(self):
        self.inputs: list[torch.Tensor] = []

    def __call__(self, module, batch):
        self.inputs.append(batch[0].clone())
        return module(batch[0])


@pytest.mark.parametrize("probe", [noise.Gaussian(), noise.Uniform(), noise.Speckle(), noise.Impulse()], ids=repr)
def test_the_noise_of_a_sample_is_the_same_for_any_batch_size(probe):
    data, seen = Rows(65, features=(3, 5), seed=1), {}
    for batch_size in (1, 7, 64):
        recorder = Recorder()
        monitor = RobustnessMonitor(probe, [0.3], predict=recorder)
        validated(monitor, lambda: Classifier(features=15), validation=loader(data, batch_size=batch_size))
        seen[batch_size] = torch.cat(recorder.inputs[1::2])
    assert torch.equal(torch.cat(recorder.inputs[::2]), data.x)
    assert not torch.equal(seen[1], data.x)
    assert torch.equal(seen[1], seen[7])
    assert torch.equal(seen[1], seen[64])


def test_the_noise_is_the_same_in_each_epoch_and_scales_with_the_level():
    recorder = Recorder()
    fit([RobustnessMonitor(noise.Gaussian(), [0.5, 1.0], predict=recorder)], max_epochs=3)
    measured = recorder.inputs[4:]  # after the sanity check of two batches, clean and noisy
    clean, half, full = (measured[i::3] for i in range(3))
    assert_same(half[:2], half[2:4])
    assert_same(half[:2], half[4:])
    for x, small, large in zip(clean, half, full, strict=True):
        # one z at both levels, up to the rounding of adding it to x
        torch.testing.assert_close(2 * (small - x), large - x, rtol=0, atol=2e-6)


def test_the_noise_does_not_depend_on_the_seed_of_the_run():
    recorders = [Recorder(), Recorder()]
    for seed, recorder in enumerate(recorders):
        fit([RobustnessMonitor(noise.Gaussian(), [0.5], predict=recorder)], seed=seed)
    assert_same(recorders[0].inputs, recorders[1].inputs)


@pytest.mark.filterwarnings("ignore:.*clip=.* cuts off")
def test_a_clip_of_tensors_is_one_for_each_channel():
    recorder, low = Recorder(), torch.tensor([0.0, 0.5, -1.0])
    monitor = RobustnessMonitor(noise.Gaussian(), [3.0], predict=recorder, clip=(low, low + 0.1))  # type: ignore[arg-type]
    validated(monitor, lambda: Classifier(features=15), validation=loader(Rows(13, features=(3, 5))))
    found = torch.cat(recorder.inputs[1::2]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.stack([found.amin(1), found.amax(1)]), torch.stack([low, low + 0.1]), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*clip=.* cuts off")
def test_clip_and_relative_apply_to_the_noisy_input_alone():
    recorder = Recorder()
    validated(RobustnessMonitor(noise.Gaussian(), [3.0], predict=recorder, clip=(-0.1, 0.1), relative="std"))
    assert torch.equal(torch.cat(recorder.inputs[::2]), HELD_OUT.x)
    assert torch.cat(recorder.inputs[1::2]).abs().max() <= 0.1


@pytest.mark.filterwarnings("ignore:.*clip=.* cuts off")
def test_a_noise_callback_serves_as_a_probe():
    callback = InputNoise(noise.Gaussian(), 0.1, clip=(-1, 1))
    as_callback = validated(RobustnessMonitor({"gaussian": callback}, [0.5]))
    as_noise = validated(RobustnessMonitor(noise.Gaussian(), [0.5], clip=(-1, 1)))
    assert as_callback == pytest.approx(as_noise, rel=0, abs=0, nan_ok=True)
    assert (
        validated(RobustnessMonitor(callback, [0.5]))["robustness_levels/input/0.5/loss"]
        != as_noise["robustness_levels/gaussian/0.5/loss"]
    )


# --- when and where


def test_it_measures_in_fit_validate_and_test():
    monitor = RobustnessMonitor(noise.Gaussian(), LEVELS)
    module, trainer = fit([monitor])
    in_fit = keys_of(trainer)
    trainer.validate(module, loader(HELD_OUT), verbose=False)
    in_validate = keys_of(trainer)
    trainer.test(module, loader(HELD_OUT), verbose=False)
    in_test = keys_of(trainer)
    measured = {key: value for key, value in in_fit.items() if key.startswith("robustness")}
    summary = {key: value for key, value in measured.items() if key.startswith("robustness/")}
    # accuracy, loss and ECE, clean and noisy; accuracy at its worst; its drop and retention; score; three levels
    assert (len(summary), len(measured)) == (10, 10 + 3 * 3)
    assert {key: value for key, value in in_validate.items() if key.startswith("robustness")} == measured
    assert {key: value for key, value in in_test.items() if "robustness" in key} == {
        f"test/{key}": value for key, value in summary.items()
    }


def test_it_measures_every_n_epochs_and_not_in_the_sanity_check():
    recorder = Recorder()

    class Watch(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            calls.append(len(recorder.inputs))

    calls: list[int] = []
    fit([RobustnessMonitor(noise.Gaussian(), [0.5], predict=recorder, every_n_epochs=2), Watch()], max_epochs=5)
    # the sanity check tries two batches; then two in the second and the fourth epoch, each clean and noisy
    assert calls == [4, 4, 8, 8, 12, 12]


def test_max_batches_bounds_what_is_measured():
    recorder = Recorder()
    found = validated(RobustnessMonitor(noise.Gaussian(), [0.5], predict=recorder, max_batches=1))
    assert len(recorder.inputs) == 2
    with torch.no_grad():
        pl.seed_everything(0, verbose=False)
        logits = Classifier().eval()(HELD_OUT.x[:8])
    assert found["robustness/loss_clean"] == pytest.approx(F.cross_entropy(logits, HELD_OUT.y[:8]).item(), rel=1e-6)


class TwoLoaders(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("idx", [0, 1])
def test_one_of_several_loaders_is_measured(idx):
    data = [Rows(13, seed=1), Rows(9, seed=2)]
    found = validated(
        RobustnessMonitor(noise.Gaussian(), [0.5], dataloader_idx=idx), TwoLoaders, validation=[*map(loader, data)]
    )
    alone = validated(RobustnessMonitor(noise.Gaussian(), [0.5]), validation=loader(data[idx]))
    for key in alone:
        if key.startswith("robustness/"):
            assert found[key] == pytest.approx(alone[key], rel=0, abs=0, nan_ok=True)


def test_two_monitors_have_names():
    monitors = [RobustnessMonitor(noise.Gaussian(), [level], name=name) for level, name in ((0.1, "near"), (0.9, "far"))]
    _, trainer = fit(monitors)
    assert {
        "near/score",
        "near_levels/gaussian/0.1/loss",
        "far/score",
        "far_levels/gaussian/0.9/loss",
    } <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    "mode",
    [
        {"fast_dev_run": True},
        {"limit_val_batches": 1},
        {"overfit_batches": 1},
        {"val_check_interval": 1},
        {"check_val_every_n_epoch": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*:UserWarning", "ignore:You requested to overfit")
def test_a_mode_of_the_trainer_works(mode):
    train = loader()
    without, _ = fit(train=train, **mode)
    with_, trainer = fit([RobustnessMonitor(noise.Gaussian(), LEVELS)], train=train, **mode)
    found = keys_of(trainer)
    assert_same(weights(with_), weights(without))
    assert found["robustness_levels/gaussian/0/loss"] == found["robustness/loss_clean"]
    if "precision" in mode:
        # in bfloat16 logits and the user's loss are rounded to 8 bits, a few times over
        assert found["robustness/loss_clean"] == pytest.approx(
            found["val_loss"], rel=5 * 2**-8 if "bf16" in mode["precision"] else 1e-6
        )


def test_the_forward_pass_has_the_precision_of_the_trainer():
    def predict(module, batch):
        casting.append(torch.is_autocast_enabled("cpu"))
        return module(batch[0])

    casting: list[bool] = []
    fit([RobustnessMonitor(noise.Gaussian(), [0.5], predict=predict)], precision="bf16-mixed")
    assert casting
    assert all(casting)


def test_checkpoints_and_early_stopping_follow_its_keys(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="robustness/score", mode="max", filename="{epoch}")
    stopper = EarlyStopping("robustness_levels/gaussian/0.2/accuracy", mode="max", patience=2, min_delta=2.0)
    _, trainer = fit([saver, stopper, RobustnessMonitor(noise.Gaussian(), LEVELS)], max_epochs=10, enable_checkpointing=True)
    assert saver.best_model_score is not None
    assert 0 < saver.best_model_score <= 1
    assert trainer.current_epoch == 3, "no accuracy rises by two, so the patience of two epochs ends"


# --- batches


def test_inputs_and_targets_are_found_in_a_dict():
    def collate(samples):
        x, y = (torch.stack(column) for column in zip(*samples, strict=True))
        return {"data": {"x": x}, "y": y}

    monitor = RobustnessMonitor(noise.Gaussian(), [0.5], inputs="data.x", target="y")
    found = validated(monitor, Dictionary, validation=loader(HELD_OUT, collate_fn=collate))
    plain = validated(RobustnessMonitor({"gaussian": noise.Gaussian()}, [0.5]))
    assert found["robustness/loss_clean"] == plain["robustness/loss_clean"]


def test_a_class_for_each_pixel_is_measured():
    class Segmenter(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, N_CLASSES, 1)  # type: ignore[assignment]

    data = Rows(6, features=(1, 4, 5))
    data.y = (data.x[:, 0] > 0).long()
    module = Segmenter()
    found = validated(RobustnessMonitor(noise.Gaussian(), [0.5]), lambda: module, validation=loader(data))
    accuracy = (module(data.x).argmax(1) == data.y).double().mean().item()
    assert found["robustness/accuracy_clean"] == pytest.approx(accuracy, abs=1e-6)


# --- loggers


def images(accumulator: EventAccumulator) -> set[str]:
    return set(accumulator.Tags()["images"])


@pytest.mark.parametrize(
    ("features", "pictured"),
    [((1, 8, 8), True), pytest.param((2, 70), True, marks=pytest.mark.slow), ((N_FEATURES,), False)],
    ids=str,
)
def test_tensorboard_holds_the_tags_and_the_pictures(features, pictured, tmp_path):
    data = Rows(16, features=features)
    levels = {"gaussian": [0.1, 0.2], "impulse": [0.1, 0.2]}
    callbacks = [InputNoise(noise.Gaussian(), 0.5), RobustnessMonitor([noise.Gaussian(), noise.Impulse()], levels)]
    logger = TensorBoardLogger(tmp_path)
    size = math.prod(features)
    module, trainer = fit(
        callbacks,
        module=lambda: Classifier(features=size),
        train=loader(data),
        validation=loader(data),
        logger=logger,
        log_every_n_steps=2,
        max_epochs=3,
    )
    trainer.test(module, loader(data), verbose=False)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train_noise/input/level", "train_noise/input/snr_db"} <= tags
    assert {"robustness/score", "robustness_levels/gaussian/0.1/ece"} <= tags
    assert {"test/robustness/accuracy_drop", "test/robustness/loss_clean"} <= tags
    levels = events.Scalars("train_noise/input/level")
    # each last batch is logged, and then the validation
    assert [(event.step, event.value) for event in levels] == [(step, 0.5) for step in (1, 1, 3, 3, 5, 5)]
    assert [event.step for event in events.Scalars("robustness/score")] == [1, 3, 5]
    curves = {"robustness_figures/curve", "test/robustness_figures/curve"}
    places = [f"{prefix}robustness_figures/{tag}" for prefix in ("", "test/") for tag in ("gaussian", "impulse")]
    samples = {f"{place}/samples" for place in places if pictured}
    assert images(events) == curves | samples | {f"{prefix}robustness_figures/reliability" for prefix in ("", "test/")}
    assert len(events.Images("robustness_figures/curve")) == 3, "one for each validation, the last with intervals"
    assert len(events.Images("robustness_figures/reliability")) == 1
    if pictured:
        assert len(events.Images("robustness_figures/gaussian/samples")) == 2, (
            "the noise is the same in each epoch, the predictions not"
        )


def test_the_logged_signal_to_noise_ratio_is_that_of_the_batch(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module, _ = fit([InputNoise(noise.Gaussian(), 0.5)], train=loader(), logger=logger, log_every_n_steps=1, max_epochs=1)
    events = EventAccumulator(logger.log_dir).Reload()
    for i, event in enumerate(events.Scalars("train_noise/input/snr_db")):
        clean, noisy = Rows().x[8 * i : 8 * i + 8], module.seen[i][0]
        # float32
        assert event.value == pytest.approx(10 * math.log10(clean.square().sum() / (noisy - clean).square().sum()), rel=1e-5)


def test_points_stand_where_lightning_puts_its_own(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([InputNoise(noise.Gaussian(), 0.5)], logger=logger, log_every_n_steps=2, max_epochs=3, accumulate_grad_batches=2)
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    columns = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    ours = {row["step"] for row in columns if row["train_noise/input/level"]}
    theirs = {row["step"] for row in columns if row["train_loss"]}
    assert ours == theirs != set()


@pytest.mark.parametrize("kind", ["csv", "none", "both"])
def test_other_loggers_and_none_work(kind, tmp_path):
    loggers = {"csv": CSVLogger(tmp_path), "none": False, "both": [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]}
    callbacks = [InputNoise(noise.Gaussian(), 0.5), RobustnessMonitor(noise.Gaussian(), LEVELS)]
    without, _ = fit(callbacks[:1])
    with_, trainer = fit(callbacks, logger=loggers[kind], log_every_n_steps=1)
    assert "robustness/score" in trainer.callback_metrics
    assert_same(weights(with_), weights(without))
    if kind != "none":
        assert "robustness/ece_noisy" in next(tmp_path.rglob("metrics.csv")).read_text()


# --- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RobustnessMonitor([]), "noises must hold at least one noise"),
        (lambda: RobustnessMonitor(noise.Gaussian(), levels=[0.1, -1]), "finite and not negative, got -1"),
        (
            lambda: RobustnessMonitor({"clean": noise.Gaussian()}),
            "no name may have a slash or be one of .*'clean', .*got .*'clean'",
        ),
        (
            lambda: RobustnessMonitor([noise.Impulse(), noise.Impulse(low=0.0)]),
            r"different names, got \['impulse', 'impulse'\]",
        ),
        (lambda: RobustnessMonitor(noise.Gaussian(), [-0.1]), "finite and not negative, got -0.1"),
        (lambda: RobustnessMonitor(noise.Impulse(), [1.2]), r"in \[0, 1\], got 1.2"),
        (lambda: RobustnessMonitor(noise.Gaussian(), []), "'gaussian' needs levels"),
        (lambda: RobustnessMonitor(lambda x, level, generator: x), "a noise needs a name, got <lambda>; give a mapping"),
        (lambda: RobustnessMonitor({"f": lambda x, level, generator: x}), "'f' needs levels"),
        (lambda: RobustnessMonitor(noise.Gaussian(), [0.1, 0.1000001]), "must differ in their first six digits"),
        (lambda: RobustnessMonitor(noise.Impulse(), relative="std"), "the level of Impulse has no unit"),
        (lambda: RobustnessMonitor(InputNoise(noise.Gaussian(), 0.1), clip=(0, 1)), "do not apply to a noise callback"),
        (lambda: RobustnessMonitor(InputNoise(noise.Gaussian(), 0.1), relative="std"), "do not apply to a noise callback"),
        (lambda: RobustnessMonitor(noise.Gaussian(), clip=(1, 0)), "clip must be a pair"),
        (lambda: RobustnessMonitor(noise.SwapNoise()), "'swapnoise' cannot perturb held-out data: it mixes samples"),
        (
            lambda: RobustnessMonitor({"swap": InputNoise(noise.SwapNoise(), 0.1)}),
            "'swap' cannot perturb held-out data: it mixes samples",
        ),
        (
            lambda: RobustnessMonitor(noise.Gaussian(), {"gauss": [0.1]}),
            r"levels are given for \['gauss'\], but the noises are \['gaussian'\]",
        ),
        (lambda: RobustnessMonitor(noise.Gaussian(), every_n_epochs=0), "at least 1, got 0"),
        (lambda: RobustnessMonitor(noise.Gaussian(), max_batches=0), "max_batches must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_monitor_is_made(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_levels_that_are_no_list_are_refused():
    with pytest.raises(TypeError, match=r"levels must be a list, or a mapping from name to lists, got 0\.1"):
        RobustnessMonitor(noise.Gaussian(), 0.1)  # type: ignore[arg-type]


def test_two_monitors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two monitors are named 'robustness'"):
        fit([RobustnessMonitor(noise.Gaussian()), RobustnessMonitor(noise.Uniform())])
    with pytest.raises(ValueError, match="two monitors are named 'same'"):
        fit([RobustnessMonitor(noise.Gaussian(), name="same"), ReplayMonitor(noise.Gaussian(), name="same")])


def test_an_interval_that_never_comes_is_refused():
    with pytest.raises(ValueError, match=r"a run of max_epochs=2 .* has no validation at every_n_epochs=3"):
        fit([RobustnessMonitor(noise.Gaussian(), every_n_epochs=3)])


def test_a_wrong_path_is_found_before_the_training():
    module = Classifier()
    with pytest.raises(ValueError, match="no leaf 'image'"):
        fit([RobustnessMonitor(noise.Gaussian(), inputs="image", every_n_epochs=2)], module=module)
    assert not module.seen


@pytest.mark.parametrize(
    ("probe", "error", "message"),
    [
        (ActivationNoise(noise.Gaussian(), 0.0, "nett.1"), ValueError, "no module matches 'nett.1'"),
        (ActivationNoise(noise.Gaussian(), 0.0, "unused"), ValueError, "the prediction called no module"),
        (ActivationNoise(noise.Gaussian(), 0.0, "transposed"), ValueError, r"'transposed' returned float32 \(3, 8\)"),
        (WeightNoise(noise.Gaussian(), 0.0, params="nett.*"), ValueError, r"no parameter matches 'nett\.\*'"),
        (InputNoise(noise.Gaussian(), 0.0, inputs=1), TypeError, "Gaussian needs floats, but the input '1' is int64"),
    ],
    ids=["no module", "not called", "not of the samples", "no parameter", "no floats"],
)
def test_what_is_wrong_with_a_callback_that_is_a_probe_is_found_before_the_training(probe, error, message):
    class Parts(Classifier):
        def __init__(self):
            super().__init__()
            self.unused, self.transposed = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.transposed(super().forward(x).T).T

    module = Parts()
    with pytest.raises(error, match=message):
        fit([RobustnessMonitor(probe, [0.0, 0.5], every_n_epochs=2)], module=module)
    assert not module.seen


def test_callbacks_that_are_probes_change_nothing():
    probes = [
        ActivationNoise(noise.Gaussian(), 0.0, "net.1"),
        WeightNoise(noise.Gaussian(), 0.0),
        InputNoise(noise.Gaussian(), 0.0),
    ]
    module, sanity = Stochastic, []

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            sanity.append((weights(pl_module), global_streams(), not any(m._forward_hooks for m in pl_module.modules())))

    without, plain = fit([Watch()], module=module)
    with_, watched = fit([RobustnessMonitor(probes, {probe.name: [0.5] for probe in probes}), Watch()], module=module)
    assert_same(weights(with_), weights(without))
    assert_same(sanity[0][0], sanity[1][0])
    assert sanity[0][1:] == sanity[1][1:]
    own = {key: value for key, value in keys_of(watched).items() if not key.startswith("robustness")}
    assert own == keys_of(plain)


def test_a_module_without_forward_is_told_of_predict():
    class Headless(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match="no forward; type predict="):
        validated(RobustnessMonitor(noise.Gaussian()), Headless)


class Diverging(Classifier):
    def forward(self, x):
        return super().forward(x) * torch.nan


@pytest.mark.parametrize("make", [metrics.BrierScore, metrics.CrossEntropy, lambda: metrics.BalancedAccuracy(3)])
def test_a_metric_of_the_package_ends_no_run(make):
    found = validated(RobustnessMonitor(noise.Gaussian(), [0.5], task=tasks.Custom(make())), Diverging)
    assert math.isnan(found["robustness/score"])
    alone = make()
    alone.update(torch.full((4, 3), torch.nan), torch.arange(4) % 3)
    with pytest.raises(ValueError, match="expects finite predictions"):
        alone.compute()


def test_weights_that_are_no_numbers_are_reported_and_end_no_run():
    found = validated(RobustnessMonitor(noise.Gaussian(), [0.5]), Diverging)
    assert math.isnan(found["robustness/loss_clean"])
    assert math.isnan(found["robustness_levels/gaussian/0.5/ece"])


def test_a_run_without_validation_is_refused():
    with pytest.raises(ValueError, match="RobustnessMonitor needs a validation"):
        fit([RobustnessMonitor(noise.Gaussian())], limit_val_batches=0)


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (
            lambda module, batch: None,
            "the module returned NoneType for a target of int64 .* but Multiclass.. expects logits of shape",
        ),
        (lambda module, batch: module(batch[0]).argmax(1), r"the module returned int64 \(8,\) for a target"),
        (lambda module, batch: module(batch[0])[:, 0], r"returned float32 \(8,\)"),
        (lambda module, batch: module(batch[0])[:3], r"returned float32 \(3, 3\) for a target of int64 \(8,\)"),
        (lambda module, batch: module(batch[0])[:, :1], r"returned float32 \(8, 1\)"),
        (lambda module, batch: module(batch[0])[:, :2], r"class indices in \[0, 2\), got int64 \(8,\) from 0 to 2"),
    ],
)
def test_what_is_no_prediction_of_the_target_is_refused(predict, message):
    with pytest.raises(ValueError, match=message):
        validated(RobustnessMonitor(noise.Gaussian(), predict=predict))


def test_targets_that_are_no_classes_are_refused():
    class Regression(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.mse_loss(self(batch[0])[:, 0], batch[1]))

    data = Rows(8)
    data.y = data.y.float()
    with pytest.raises(ValueError, match=r"class indices in \[0, 3\), got float32 \(8,\)"):
        validated(RobustnessMonitor(noise.Gaussian()), Regression, validation=loader(data))


def test_a_loader_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(ValueError, match="saw no batch of dataloader_idx=3"):
        validated(RobustnessMonitor(noise.Gaussian(), dataloader_idx=3))


@pytest.mark.parametrize(
    ("predict", "level", "is_told"),
    [
        (lambda module, batch: module(Rows().x[: len(batch[0])]), 0.5, True),  # does not read the noisy input
        (lambda module, batch: module(batch[0]), 0.5, False),
        (lambda module, batch: module(batch[0]), 0.0, False),
        (lambda module, batch: 0 * module(batch[0]), 0.5, False),  # a head that begins at zero
    ],
)
def test_noise_that_changes_no_prediction_is_a_warning(predict, level, is_told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit([RobustnessMonitor(noise.Gaussian(), [level], predict=predict)], max_epochs=2)
    told = [each for each in found if "under ['gaussian'], not even in its last bit" in str(each.message)]
    assert len(told) == is_told
