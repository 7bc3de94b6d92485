"""A noise callback without a level can be a probe and cannot train; any noise can be made one."""

from __future__ import annotations

import pytest
import torch
from helpers import N_CLASSES, fit

from lightning_noise import (
    ActivationNoise,
    EmbeddingNoise,
    InputNoise,
    Mixup,
    TargetNoise,
    WeightNoise,
    labels,
    noise,
    schedules,
)
from lightning_noise.callbacks.inputs import as_probe

PROBES = {
    "input": lambda: InputNoise(noise.Gaussian()),
    "weight": lambda: WeightNoise(noise.Gaussian()),
    "activation": lambda: ActivationNoise(noise.Gaussian(), modules="net.1"),
    "embedding": EmbeddingNoise,
}


def shift(x, level, *, generator):
    return x + level


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_a_callback_without_a_level_is_refused_in_training_with_the_line_to_type(make):
    callback = make()
    with pytest.raises(ValueError, match=rf"has no level to train with; type {type(callback).__name__}\(…, level=\d\.\d+\)"):
        fit([callback])


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_a_noise_callback_is_its_own_probe(make):
    callback = make()
    assert as_probe(callback) is callback


@pytest.mark.parametrize("member", [noise.Gaussian(), noise.Impulse(), noise.SNR()], ids=repr)
def test_a_probe_has_the_attributes_of_its_noise(member):
    probe = as_probe(member, inputs="x")
    assert isinstance(probe, InputNoise)
    assert (probe.name, probe.inputs, probe.level) == (type(member).__name__.lower(), "x", None)
    assert (probe.severities, probe.max_level) == (member.severities, member.max_level)
    assert probe.can_probe
    assert not probe.one_draw_per_batch
    assert as_probe(WeightNoise(member)).one_draw_per_batch


def test_a_callback_without_a_noise_has_neutral_attributes():
    callback = Mixup()
    assert (callback.severities, callback.max_level, callback.mixes_samples) == ((), float("inf"), False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_probe(Mixup()), "cannot perturb held-out data: Mixup mixes samples"),
        (lambda: as_probe(TargetNoise(labels.FlipLabels(N_CLASSES), 0.1)), "cannot perturb held-out data: TargetNoise"),
        (lambda: as_probe(noise.SwapNoise()), "cannot perturb held-out data: it mixes samples"),
        (lambda: as_probe(WeightNoise(noise.SwapNoise())), "cannot perturb held-out data: it mixes samples"),
        (
            lambda: as_probe(InputNoise(noise.Gaussian()), clip=(0, 1)),
            r"clip do not apply to a noise callback; type them in InputNoise\(…, clip=…\)",
        ),
        (lambda: as_probe(noise.Speckle(), relative="std"), "relative='std' needs an additive noise"),
        (lambda: as_probe(lambda x, level, *, generator: x), "give a mapping from name to noise"),
    ],
)
def test_what_cannot_be_a_probe_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_function_is_a_noise_of_its_own_name_that_takes_a_relative_level():
    x = torch.randn(4, 3)
    member = noise.as_noise(shift)
    assert torch.equal(member(x, 0.5, generator=torch.Generator()), x + 0.5)
    assert noise.as_noise(member) is member
    assert repr(member) == repr(shift)
    assert (as_probe(shift, relative="std").name, as_probe(shift).severities) == ("shift", ())


@pytest.mark.parametrize("member", [noise.Gaussian, schedules.Linear(0.0, 1.0), 0.5, None], ids=repr)
def test_what_is_no_noise_is_refused(member):
    with pytest.raises(TypeError, match=r"a noise must be a value such as noise\.Gaussian\(\)"):
        noise.as_noise(member)
