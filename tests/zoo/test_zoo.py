"""Modules that know of no noise: nothing changes at level 0, only the inputs change above, and every number is right."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import assert_same, make_trainer, weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_noise import (
    ActivationNoise,
    GradientNoise,
    InputNoise,
    ReplayMonitor,
    RobustnessMonitor,
    WeightNoise,
    noise,
)
from lightning_noise.batch import leaves
from zoo import forecasting, loops, losses, structures
from zoo.member import Member, Samples, fresh

MEMBERS: dict[str, Member] = {**forecasting.MEMBERS, **structures.MEMBERS, **losses.MEMBERS, **loops.MEMBERS}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer", "ignore:.*training_step.* returned `None`"),
]
every_member = pytest.mark.parametrize("name", MEMBERS)
LEVEL = 0.5
GAUSSIAN = noise.Gaussian()


def shift(x: Tensor, level: float, *, generator: torch.Generator) -> Tensor:
    """A noise without chance, so that its numbers can be computed by hand."""
    return x + level


def input_noise(member: Member, level: float | None = LEVEL, kind: Any = GAUSSIAN) -> Any:
    typed = dict(member.typed)
    return typed.pop("noise")(level, **typed) if "noise" in typed else InputNoise(kind, level, **typed)


CALLBACKS: dict[str, Callable[[Member, float], pl.Callback]] = {
    "input": lambda member, level: input_noise(member, level),
    "weight": lambda member, level: WeightNoise(noise.Gaussian(), level),
    "gradient": lambda member, level: GradientNoise(noise.Gaussian(), level),
    "activation": lambda member, level: ActivationNoise(noise.Gaussian(), level, member.layers),
}


def fit(member: Member, *callbacks: pl.Callback, module: Any = None, loader: Any = None, lr: float | None = None) -> Any:
    """Returns a module after a fit, and what was logged, except for the keys of ours."""
    pl.seed_everything(0, verbose=False)
    module = member.module() if module is None else module
    if lr is not None:
        module.lr = lr
    data = member.loader() if loader is None else loader
    trainer = make_trainer(callbacks, num_sanity_val_steps=0, **member.trainer)
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data, data)
    ours = ("train_noise", "robustness", "replay")
    logged = {key: value.item() for key, value in trainer.callback_metrics.items() if not key.startswith(ours)}
    return module, logged


@functools.cache
def fit_alone(name: str) -> Any:
    return fit(MEMBERS[name])


def batches(member: Member, shift: float = 0.0) -> list[Any]:
    """Returns copies of the batches of the loader, to which a number is added by hand."""
    loader = member.loader()
    loader = loader.val_dataloader() if isinstance(loader, pl.LightningDataModule) else loader
    found = [fresh(batch) for _, batch in zip(range(member.trainer.get("limit_val_batches", 100)), loader, strict=False)]
    for batch in found:
        member.move(batch, shift)
    return found


def assert_same_batches(one: Any, two: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(dict(leaves(one)), dict(leaves(two)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("callback", CALLBACKS)
@every_member
def test_at_level_0_nothing_changes(name, callback):
    module, logged = fit(MEMBERS[name], CALLBACKS[callback](MEMBERS[name], 0.0))
    alone, alone_logged = fit_alone(name)
    assert_same(weights(module), weights(alone))
    assert logged == alone_logged


@every_member
def test_monitors_change_nothing(name):
    member = MEMBERS[name]
    monitors: list[Any] = [ReplayMonitor({"shift": probe(member)}, [LEVEL])]
    if member.monitored is not None:
        monitors.append(RobustnessMonitor({"shift": probe(member)}, [LEVEL], **member.monitored))
    module, logged = fit(member, *monitors)
    alone, alone_logged = fit_alone(name)
    assert_same(weights(module), weights(alone))
    assert logged == alone_logged


@every_member
def test_the_step_receives_the_noise_in_its_inputs_and_nowhere_else(name):
    member, seen = MEMBERS[name], {}
    module = member.module()
    step = module.training_step

    @functools.wraps(step)
    def training_step(batch, *indices):
        if module.trainer.training:  # a validation may call it, and a closure several times
            seen[(module.trainer.current_epoch, *indices)] = fresh(batch)
        return step(batch, *indices)

    module.training_step = training_step
    fit(member, input_noise(member, LEVEL, shift), module=module)
    for batch, moved in zip(seen.values(), 2 * batches(member, LEVEL), strict=True):
        assert_same_batches(batch, member.trained(moved))


class Clean(pl.Callback):
    """Sees batches without noise."""

    def __init__(self, member: Member):
        self.batches = list(map(member.trained, batches(member)))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert_same_batches(batch, self.batches[batch_idx])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert_same_batches(batch, self.batches[batch_idx])


@every_member
def test_batches_and_weights_come_back_clean(name):
    member, data = MEMBERS[name], MEMBERS[name].loader()
    module, spy = member.module(), Clean(member)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    fit(member, *(make(member, LEVEL) for make in CALLBACKS.values()), spy, module=module, loader=data, lr=0.0)
    assert_same([parameter.detach() for parameter in module.parameters()], before)
    loader = data.val_dataloader() if isinstance(data, pl.LightningDataModule) else data
    for batch, clean in zip(loader, batches(member), strict=False):
        assert_same_batches(batch, clean)


def probe(member: Member) -> Any:
    return input_noise(member, None, shift)


def validate(member: Member, module: Any, data: Any, *callbacks: pl.Callback) -> dict[str, float]:
    trainer = make_trainer(callbacks, **member.trainer)
    trainer.validate(module, data, verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


@every_member
def test_a_replay_logs_what_the_validation_of_data_that_were_shifted_by_hand_logs(name):
    member = MEMBERS[name]
    pl.seed_everything(0, verbose=False)
    module = member.module()
    own = validate(member, module, member.loader())
    by_hand = validate(member, module, DataLoader(Samples(batches(member, LEVEL)), batch_size=None, collate_fn=lambda b: b))
    found = validate(member, module, member.loader(), ReplayMonitor({"shift": probe(member)}, [LEVEL]))
    assert own
    for key, value in own.items():
        assert found[key] == value
        assert found[f"replay/clean/{key}"] == value
        if "noise" in member.typed:
            assert found[f"replay/shift/0.5/{key}"] != value
        else:
            assert found[f"replay/shift/0.5/{key}"] == by_hand[key]


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if member.monitored is not None])
def test_a_monitor_measures_what_is_computed_by_hand(name):
    member = MEMBERS[name]
    pl.seed_everything(0, verbose=False)
    module = member.module()
    assert member.monitored is not None
    monitor = RobustnessMonitor({"shift": probe(member)}, [LEVEL], **member.monitored)
    found = validate(member, module, member.loader(), monitor)
    module.eval()
    key = "accuracy" if "robustness/accuracy_clean" in found else "mse"
    assert found[f"robustness/{key}_clean"] == pytest.approx(by_hand(member, module, 0.0), rel=1e-5)
    if "noise" in member.typed:
        assert found["robustness_levels/shift/0.5/loss"] != found["robustness/loss_clean"]
    else:
        assert found[f"robustness_levels/shift/0.5/{key}"] == pytest.approx(by_hand(member, module, LEVEL), rel=1e-5)


@torch.no_grad()
def by_hand(member: Member, module: Any, shift: float) -> float:
    """The accuracy or the mean squared error; a target that is the input stays clean."""
    clean, moved = batches(member), batches(member, shift)
    assert member.predict is not None
    outputs = torch.cat([member.predict(module, batch)[0] for batch in moved])
    target = torch.cat([member.predict(module, batch)[1] for batch in clean])
    return (outputs.argmax(1) == target).double().mean().item() if outputs.ndim == 2 else F.mse_loss(outputs, target).item()


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if "inputs" in member.typed])
def test_inputs_that_must_be_said_are_asked_for_in_one_line(name):
    member = MEMBERS[name]
    with pytest.raises(ValueError, match=r"which leaf is the input\? Type inputs=…, such as inputs='") as error:
        fit(member, InputNoise(noise.Gaussian(), LEVEL))
    assert "\n" not in str(error.value)
    (typed,) = re.findall(r"such as inputs='([^']+)'", str(error.value))
    fit(member, InputNoise(noise.Gaussian(), LEVEL, **{**member.typed, "inputs": typed}))


@every_member
def test_a_trainer_that_is_copied_before_the_fit_trains_alike(name):
    member = MEMBERS[name]
    callbacks = [make(member, LEVEL) for make in CALLBACKS.values()] + [ReplayMonitor({"shift": probe(member)}, [LEVEL])]
    trainer = make_trainer(callbacks, num_sanity_val_steps=0, **member.trainer)
    found = []
    for each in (copy.deepcopy(trainer), trainer):
        pl.seed_everything(0, verbose=False)
        module, data = member.module(), member.loader()
        if isinstance(data, pl.LightningDataModule):
            each.fit(module, datamodule=data)
        else:
            each.fit(module, data, data)
        found.append(({key: value.item() for key, value in each.callback_metrics.items()}, weights(module)))
    (one, ones), (two, twos) = found
    assert one == two
    assert_same(ones, twos)
