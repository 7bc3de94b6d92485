"""Every noise keeps the laws of its family and has the moments of its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from lightning_noise import noise, testing
from lightning_noise.testing import NOISE_LAWS

NOISES = [noise.Gaussian(), noise.Uniform(), noise.Speckle(), noise.Impulse(), noise.Impulse(low=0.0, high=1.0)]
N = 200_000


@pytest.mark.parametrize("law", NOISE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_a_noise_keeps_the_law(member, law):
    law(member)


@dataclass(frozen=True)
class Broken(noise.Noise):
    """A Gaussian with one of the usual mistakes."""

    mistake: str

    def perturb(self, x, level, generator):
        if self.mistake == "leaves_input_and_global_streams_alone":
            return x + level * torch.randn(x.shape)
        if self.mistake == "changes_the_input_above_level_0":
            return x.clone()
        if self.mistake == "is_a_function_of_the_generator":
            return x + level
        if self.mistake == "takes_a_level_for_each_sample":
            level = torch.as_tensor(level).mean()
        return noise.Gaussian().perturb(x, level, generator)


MISTAKES = [
    "changes_the_input_above_level_0",
    "is_a_function_of_the_generator",
    "leaves_input_and_global_streams_alone",
    "takes_a_level_for_each_sample",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_law_finds_the_noise_that_breaks_it(mistake):
    with pytest.raises(AssertionError, match="Broken"):
        getattr(testing, mistake)(Broken(mistake))


def test_the_laws_find_a_function_that_forgets_what_the_base_class_keeps():
    def careless(x, level, *, generator):
        return torch.empty_like(x).normal_(generator=generator).mul_(level).add_(x)

    for law in (testing.does_not_depend_on_the_memory_format, testing.is_the_same_in_half_precision_up_to_rounding):
        with pytest.raises(AssertionError, match="careless"):
            law(careless)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"turned torch\.float32"):
        testing.keeps_shape_dtype_and_device(lambda x, level, generator: x.double())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="x itself at level 0"):
        testing.is_the_identity_at_level_0(lambda x, level, generator: x + 0)  # type: ignore[arg-type]


def moments(member: noise.Noise, value: float, level: float) -> tuple[float, float]:
    """The closed forms of mean and variance at a value in [0, 1]."""
    if isinstance(member, noise.Impulse):
        mean = (1 - level) * value + level / 2
        return mean, (1 - level) * value**2 + level / 2 - mean**2
    variance = {noise.Gaussian: level**2, noise.Uniform: level**2 / 3, noise.Speckle: (level * value) ** 2}
    return value, variance[type(member)]


@pytest.mark.parametrize("level", [0.1, 0.5])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("member", [*NOISES[:3], NOISES[4]], ids=repr)
def test_mean_and_variance_are_those_of_the_formula(member, value, level, generator):
    x = torch.full((N,), value, dtype=torch.float64)
    y = member(x, level, generator=generator)
    mean, variance = moments(member, value, level)
    central = y - mean
    # five standard errors, of the sample itself for the variance; 1e-12 is for what is constant
    assert abs(y.mean().item() - mean) <= 5 * math.sqrt(variance / N) + 1e-12
    assert abs(central.square().mean().item() - variance) <= 5 * central.square().std().item() / math.sqrt(N) + 1e-12


def test_a_gaussian_clipped_at_the_edge_of_the_range_loses_two_thirds_of_its_variance(generator):
    sigma = 0.3
    y = noise.Gaussian()(torch.zeros(N, dtype=torch.float64), sigma, generator=generator).clamp_min(0)
    mean, variance = sigma / math.sqrt(2 * math.pi), sigma**2 * (0.5 - 1 / (2 * math.pi))
    # five standard errors
    assert abs(y.mean().item() - mean) <= 5 * math.sqrt(variance / N)
    assert abs(y.var().item() - variance) <= 5 * (y - mean).square().std().item() / math.sqrt(N)


@pytest.mark.parametrize("member", [noise.Gaussian(), noise.Uniform(), noise.Speckle()], ids=repr)
def test_the_level_scales_one_draw(member):
    x = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half, full = (member(x, level, generator=torch.Generator().manual_seed(0)) - x for level in (0.5, 1.0))
    # the same z at both levels; the subtraction of x rounds at 1e-16 of a number near 1
    torch.testing.assert_close(2 * half, full, rtol=0, atol=1e-14)


def test_the_impulses_of_a_lower_level_are_among_those_of_a_higher_one():
    x = torch.full((1000,), 0.5)
    few, many = (noise.Impulse(0.0, 1.0)(x, level, generator=torch.Generator().manual_seed(0)) != x for level in (0.1, 0.3))
    assert bool((many | ~few).all())
    assert many.sum() > few.sum()


def test_impulses_take_the_extremes_of_their_own_sample(generator):
    x = torch.stack([torch.linspace(0, 1, 500), torch.linspace(-3, 5, 500)])
    y = noise.Impulse()(x, 1.0, generator=generator)
    assert y[0].unique().tolist() == [0, 1]
    assert y[1].unique().tolist() == [-3, 5]


def test_impulses_need_a_range(generator):
    with pytest.raises(ValueError, match="give low and high"):
        noise.Impulse()(torch.zeros(5), 0.5, generator=generator)


@pytest.mark.parametrize("member", NOISES, ids=repr)
@pytest.mark.parametrize("level", [-0.1, math.nan, math.inf])
def test_a_level_that_is_no_amount_is_refused(member, level, generator):
    with pytest.raises(ValueError, match="a level must be"):
        member(torch.zeros(2, 2), level, generator=generator)


def test_a_share_above_one_is_refused(generator):
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        noise.Impulse(0.0, 1.0)(torch.zeros(2, 2), 1.5, generator=generator)


@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_severities_are_five_and_rise(member):
    assert len(member.severities) == 5
    assert list(member.severities) == sorted(set(member.severities))
    assert 0 < member.severities[0] <= member.severities[-1] <= member.max_level


def test_the_severities_of_uniform_have_the_standard_deviations_of_gaussian():
    for half_width, sigma in zip(noise.Uniform.severities, noise.Gaussian.severities, strict=True):
        assert half_width == round(math.sqrt(3) * sigma, 2)
