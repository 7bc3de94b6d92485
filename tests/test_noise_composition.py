"""Noises made of other noises do what their parts do, in order, by chance, or at another level."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_noise import ActivationNoise, InputNoise, Key, RobustnessMonitor, noise, testing
from lightning_noise._usage import typed
from lightning_noise.perturb.doubts import find_doubts, level_doubt
from lightning_noise.perturb.weights import weight_noise

SALT = noise.Impulse(low=0.0, high=1.0)
BOTH = r"noise.Gaussian\(\), noise.Impulse\(low=0.0, high=1.0\)"
X = torch.rand(6, 3, 8, 8, generator=torch.Generator(torch.get_default_device()).manual_seed(1))


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@pytest.mark.parametrize("level", [0.3, torch.linspace(0, 0.3, 6)], ids=["number", "tensor"])
def test_a_composition_is_its_noises_one_after_another(level):
    one, generator = noise.Compose([noise.Gaussian(), noise.Compose([SALT, noise.Masking()])]), stream()
    by_hand = X
    for each in (noise.Gaussian(), SALT, noise.Masking()):
        by_hand = each(by_hand, level, generator=generator)
    assert torch.equal(one(X, level, generator=stream()), by_hand)


@pytest.mark.parametrize("factor", [0.1, 1 / 3, 7.0])
@pytest.mark.parametrize("each", [noise.Gaussian(), noise.FeatureDropout(), noise.SNR()], ids=repr)
def test_a_scaled_noise_is_the_noise_at_another_level(each, factor):
    scaled = noise.Scaled(each, factor)
    levels = torch.linspace(0, 1, 6) / 8
    assert torch.equal(scaled(X, levels, generator=stream()), each(X, levels * factor, generator=stream()))
    for i, level in enumerate(levels.tolist()):  # rounded alike
        whole = scaled(X, level, generator=stream())
        assert torch.equal(whole[i], scaled(X, levels, generator=stream())[i])


@pytest.mark.parametrize("factor", [0.1, 0.3, 1 / 3, 0.7, 3.0])
def test_a_scaled_noise_reaches_the_largest_level_and_not_more(factor):
    scaled = noise.Scaled(noise.FeatureDropout(), factor)
    for x in (X, X.double()):
        assert not scaled(x, scaled.max_level, generator=stream()).any()
    with pytest.raises(ValueError, match=r"a level must be in \[0, "):
        scaled(X, 1.01 / factor, generator=stream())


def test_each_sample_has_the_noise_that_is_chosen_for_it():
    noises, weights = [noise.Gaussian(), SALT, noise.Scaled(noise.Uniform(), 2.0)], [1, 2, 5]
    x, generator = torch.full((4000, 8), 0.5), stream()
    y = noise.OneOf(noises, weights)(x, 0.3, generator=stream())
    u = torch.empty(len(x)).uniform_(generator=generator)
    drawn = torch.stack([each(x, 0.3, generator=generator) for each in noises])
    chosen = (u[:, None] >= torch.tensor([1 / 8, 3 / 8])).sum(1)
    assert torch.equal(y, drawn[chosen, torch.arange(len(x))])
    shares = chosen.bincount() / len(x)
    expected = torch.tensor(weights) / 8
    # five standard errors
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / len(x)).sqrt()).all()


def test_the_choice_for_held_out_data_depends_on_the_position_alone():
    either, key = noise.OneOf([noise.Gaussian(), SALT]), Key((0, "probe"), positions=range(6))
    whole = key.apply(either, X, 0.3)
    assert torch.equal(Key((0, "probe"), positions=[4, 1]).apply(either, X[[4, 1]], 0.3), whole[[4, 1]])


def test_the_attributes_are_those_that_all_parts_allow():
    sum_of_two = noise.Compose([noise.Gaussian(), noise.Scaled(noise.Drift(), 0.5)])
    assert sum_of_two.additive
    assert sum_of_two.takes_complex
    assert not sum_of_two.elementwise
    assert sum_of_two.severities == tuple(map(min, zip(noise.Gaussian.severities, (0.22, 0.34, 0.5, 0.74, 1.08), strict=True)))
    shares = noise.OneOf([noise.FeatureDropout(), noise.Scaled(SALT, 0.5), noise.Gaussian()])
    assert (shares.max_level, shares.unit, shares.additive, shares.elementwise) == (1.0, "level", False, False)
    assert noise.Scaled(SALT, 0.5).max_level == 2.0
    with pytest.raises(ValueError, match=r"in \[0, 2\], got 2.5; in noise.Scaled, the limit is that .* over the factor"):
        InputNoise(noise.Compose([noise.Gaussian(), noise.Scaled(SALT, 0.5)]), 2.5)
    assert noise.Compose([noise.Gaussian(), noise.Gaussian()]).unit == "standard deviation"
    assert noise.Compose([noise.Gaussian(), noise.Uniform()]).elementwise
    swaps = noise.Scaled(noise.SwapNoise(), 2.0)
    assert swaps.mixes_samples
    assert swaps(torch.arange(12).view(4, 3), 0.5, generator=stream()).dtype == torch.int64
    assert not noise.Compose([noise.SwapNoise(), noise.Shot()]).independent_rows


def test_parts_of_a_shape_keep_to_the_valid_elements():
    each = noise.Compose([noise.Masking(), noise.SNR(), noise.OneOf([noise.Jitter(), noise.SwapNoise()])])
    testing.keeps_invalid_elements(each)
    testing.does_not_depend_on_invalid_elements(each)


def shifted(x, level, *, generator):
    return x + level


def test_a_function_is_a_part():
    each = noise.Compose([shifted, noise.Scaled(shifted, 2.0)])
    torch.testing.assert_close(each(torch.zeros(2, 3), 0.1, generator=stream()), torch.full((2, 3), 0.3))
    assert not each.is_known
    assert each.severities == ()


def test_a_composition_is_written_as_it_is_typed():
    each = noise.OneOf([noise.Compose([noise.Gaussian(), SALT]), noise.Scaled(noise.Shot(), 0.5)], weights=[1.0, 2.0])
    assert typed(each) == (
        "noise.OneOf([noise.Compose([noise.Gaussian(), noise.Impulse(low=0.0, high=1.0)]), "
        "noise.Scaled(noise.Shot(), 0.5)], weights=(1.0, 2.0))"
    )
    assert eval(repr(each), dict(vars(noise))) == each
    assert eval(typed(each)) == each


def test_numbers_of_other_packages_make_equal_values():
    weights: Any = torch.tensor([1.0, 3.0])
    either = noise.OneOf([noise.Gaussian(), SALT], weights), noise.OneOf([noise.Gaussian(), SALT], [1, 3])
    scaled = noise.Scaled(SALT, weights[0] / 2), noise.Scaled(SALT, 0.5)
    for one, two in (either, scaled):
        assert one == two
        assert hash(one) == hash(two)
        assert eval(typed(one)) == two


def test_additive_parts_can_be_relative_to_a_weight():
    w = 1 + torch.rand(50, 400, dtype=torch.float64, generator=stream(1))
    both = noise.Compose([noise.Gaussian(), noise.Scaled(noise.Gaussian(), 2.0)])
    error = weight_noise(w, both, 0.1, Key((0,)), relative="std") - w
    ratio = error.std().item() / w.std(correction=0).item()
    assert abs(ratio / (0.1 * math.sqrt(5)) - 1) <= 5 / math.sqrt(2 * w.numel())  # five standard errors


def test_decibels_are_advised_if_all_levels_are_ratios():
    recorded = noise.Recorded(torch.ones(1, 9))
    for each in (noise.Compose([noise.SNR(), recorded]), noise.OneOf([recorded])):
        doubt = level_doubt("the input", torch.ones(2), each, 20.0, -26.0, None)
        assert doubt is not None
        assert doubt.endswith("is the noise-to-signal amplitude; for 20 dB type schedules.from_snr_db(20)")
    doubt = level_doubt("the input", torch.ones(2), noise.Scaled(noise.SNR(), 2.0), 20.0, -26.0, None)
    assert doubt is not None
    assert doubt.endswith("type a lower level")


def test_a_part_along_the_channels_is_a_doubt():
    batch = (torch.rand(8, 100, 3), torch.zeros(8))
    for each in (noise.Compose([noise.Gaussian(), noise.Scaled(noise.Drift(), 2.0)]), noise.OneOf([noise.Drift()])):
        (doubt,) = find_doubts(batch, None, [(0,)], each, None)
        assert doubt.endswith("for Drift the series is along the last axis of length 3; for (B, T, C) type noise.Drift(dim=-2)")


def test_levels_of_other_units_are_not_shares():
    salted = {"salt": SALT, "both": noise.Compose([noise.Gaussian(), SALT])}
    with pytest.raises(ValueError, match=r"a list of levels needs one unit, .* 'salt' \(shares of elements\)"):
        RobustnessMonitor(salted, [0.1])
    RobustnessMonitor(salted | {"both": noise.Compose([SALT, noise.FeatureDropout()])}, [0.1])


def test_what_no_part_may_do_is_refused():
    with pytest.raises(ValueError, match=r"Compose cuts the gradient, .*; type noise.Speckle\(\)"):
        ActivationNoise(noise.Compose([noise.Gaussian(), noise.Shot()]), 0.1, "net")
    with pytest.raises(ValueError, match="mixes samples"):
        RobustnessMonitor([noise.OneOf([noise.Gaussian(), noise.SwapNoise()])])
    with pytest.raises(ValueError, match="relative='std' needs an additive noise"):
        InputNoise(noise.Compose([noise.Gaussian(), noise.Speckle()]), 0.1, relative="std")
    with pytest.raises(ValueError, match="the level of Speckle has no unit"):
        InputNoise(noise.Compose([shifted, noise.Speckle()]), 0.1, relative="std")
    with pytest.raises(ValueError, match=r"in \[0, 2\]"):
        InputNoise(noise.Scaled(SALT, 0.5), 2.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: noise.Compose(noise.Gaussian()), r"must be a list of noises, got Gaussian\(\); type noise.Compose\(\["),  # type: ignore[arg-type]
        (lambda: noise.Compose(), r"type noise.Compose\(\[noise.Gaussian\(\), noise.Uniform\(\)\]\)"),  # type: ignore[call-arg]
        (lambda: noise.Compose([]), "must be a list of noises"),
        (lambda: noise.Compose(noise.Gaussian(), SALT), rf"type noise.Compose\(\[{BOTH}\]\)"),  # type: ignore[call-arg,arg-type]
        (lambda: noise.OneOf(noise.Gaussian(), SALT), rf"type noise.OneOf\(\[{BOTH}\]\)"),  # type: ignore[arg-type]
        (
            lambda: noise.OneOf(noise.Gaussian(), SALT, weights=[1, 2]),  # type: ignore[misc,arg-type]
            rf"type noise.OneOf\(\[{BOTH}\], weights=\[1, 2\]\)",
        ),
        (
            lambda: noise.OneOf([noise.Gaussian(), SALT], p=[0.1, 0.9]),  # type: ignore[call-arg]
            r"type noise.OneOf\(\[.*\], weights=\[0.1, 0.9\]\)",
        ),
        (lambda: noise.OneOf([SALT], weights=0.5), r"got 0.5; type weights=\[1.0\]"),  # type: ignore[arg-type]
        (lambda: noise.Scaled(0.3), r"type noise.Scaled\(noise.Gaussian\(\), 0.3\)"),  # type: ignore[call-arg,arg-type]
        (lambda: noise.Scaled(SALT, scale=0.3), r"type noise.Scaled\(noise.Impulse\(.*\), 0.3\)"),  # type: ignore[call-arg]
        (lambda: noise.Compose([noise.Gaussian]), r"type noise.Compose\(\[noise.Gaussian\(\)\]\)"),
        (lambda: noise.OneOf([noise.Gaussian(), 0.3]), r"a noise must be a value .*type noise.OneOf\(\["),  # type: ignore[list-item]
        (lambda: noise.OneOf([SALT, SALT], weights=[1.0]), r"for each of the 2 noises.*type weights=\[1.0, 1.0\]"),
        (lambda: noise.OneOf([SALT], weights=[0.0]), "weights must be a positive number"),
        (
            lambda: noise.OneOf([noise.Gaussian(), SALT], weights={"gaussian": 3, "impulse": 1}),  # type: ignore[arg-type]
            r"in the order of the noises, got \{'gaussian': 3, 'impulse': 1\}; type weights=\[3, 1\]",
        ),
        (lambda: noise.OneOf([SALT, SALT], weights={1, 2}), r"type weights=\[1\.0, 1\.0\]"),  # type: ignore[arg-type]
        (lambda: noise.OneOf([SALT], weights=["a"]), "weight 0 must be a number"),  # type: ignore[list-item]
        (lambda: noise.Scaled(SALT, 0.0), "factor must be positive"),
        (lambda: noise.Scaled(0.5, SALT), "factor must be a number"),  # type: ignore[arg-type]
    ],
)
def test_parts_of_another_kind_are_refused(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_a_composition_perturbs_weights():
    layer = nn.Linear(8, 4)
    both = noise.Compose([noise.Gaussian(), noise.DropConnect()])
    noisy = weight_noise(layer.weight, both, 0.5, Key((0,)))
    assert (noisy == 0).any()
    assert torch.equal(noisy, weight_noise(layer.weight, both, 0.5, Key((0,))))
