"""Every noise keeps the laws of its family and has the moments of its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from members import NOISES

from lightning_noise import InputNoise, noise, testing
from lightning_noise._checks import check_level
from lightning_noise.noise.draws import draw_bits, last_bits
from lightning_noise.testing import NOISE_LAWS

DROPOUTS = (noise.FeatureDropout(), noise.DropConnect())
MASKING = tuple(member for member in NOISES if isinstance(member, noise.Masking))
Draw = Callable[[torch.Generator], torch.Tensor]
ON_CPU = torch.get_default_device().type == "cpu"
# the number of its draws depends on the level; a GPU has a stream for each element
EXEMPT = {(noise.Shot, testing.takes_a_level_for_each_sample)} if ON_CPU else set()
WAITING = noise.Shot | noise.Rician | noise.Transform  # as documented
N = 100_000


@pytest.mark.parametrize("law", NOISE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_a_noise_keeps_the_law(member, law):
    if (type(member), law) in EXEMPT:
        with pytest.raises(AssertionError):  # or else it is not exempt
            law(member)
    else:
        law(member)


KINDS = [each for name in noise.__all__ if isinstance(each := getattr(noise, name), type) and each is not noise.Noise]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_advised_for_a_class_or_a_name_can_be_typed(kind, tmp_path, monkeypatch):
    if kind is noise.Recorded:
        pytest.importorskip("soundfile").write(tmp_path / "hum.wav", [0.5, -0.5], 16_000)
        tmp_path.rename(tmp_path.parent / "recordings")
        monkeypatch.chdir(tmp_path.parent)
    for given in (kind, kind.__name__.lower()):
        with pytest.raises(TypeError, match=f"type InputNoise\\(noise.{kind.__name__}\\(") as caught:
            InputNoise(given, 0.1)  # type: ignore[arg-type]
        advice = str(caught.value).partition("; type ")[2].replace("…", "sample")
        assert type(eval(advice).noise) is kind


@dataclass(frozen=True)
class Broken(noise.Noise):
    """A Gaussian with one of the usual mistakes."""

    mistake: str

    independent_rows = True

    def perturb(self, x, level, generator, mask):
        if self.mistake == "does_not_touch_input_or_global_streams":
            return x + level * torch.randn(x.shape)
        if self.mistake == "changes_the_input_above_level_0":
            return x.clone()
        if self.mistake == "is_a_function_of_the_generator":
            return x + level
        if self.mistake == "takes_a_level_for_each_sample":
            level = torch.as_tensor(level).mean()
        if self.mistake == "has_independent_rows":
            level = level * x.mean()
        return noise.Gaussian().perturb(x, level, generator, mask)


MISTAKES = [
    "changes_the_input_above_level_0",
    "is_a_function_of_the_generator",
    "does_not_touch_input_or_global_streams",
    "takes_a_level_for_each_sample",
    "has_independent_rows",
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


def test_a_law_finds_a_noise_that_takes_some_series_and_refuses_others():
    def fails(x, level, *, generator):
        if x.ndim == 3 and len(x) == 1:
            raise ValueError("one row has no neighbor")
        return x.clone()

    with pytest.raises(AssertionError, match=r"refuses the shapes \[\(1, 2, 2\)\], but takes others of as many axes"):
        testing.keeps_shape_dtype_and_device(fails)  # type: ignore[arg-type]


def moments(member: noise.Noise, value: float, level: float) -> tuple[float, float]:
    """The closed forms of mean and variance of the third of eight elements, which all have one value in [0, 1]."""
    match member:
        case noise.Gaussian() | noise.ColoredNoise():
            return value, level**2
        case noise.Drift():
            return value, level**2 * (3 / 8 if member.dim == -1 else 1)  # the third of eight steps, or the only one
        case noise.Uniform():
            return value, level**2 / 3
        case noise.Speckle() | noise.Scaling():
            return value, (level * value) ** 2
        case noise.SNR():
            return value, 0.0 if member.center else (level * value) ** 2
        case noise.Shot():
            return value, level * value / member.scale
        case noise.PatchGaussian():
            return value, level**2 * member.size / 8  # so many of the eight centres cover it
        case noise.FeatureDropout():
            mean, square = (1 - level) * value, (1 - level) * value**2
            kept = 1 - level if member.rescale else 1
            return mean / kept, (square - mean**2) / kept**2
        case noise.DropConnect():
            return value, level / (1 - level) * value**2
        case noise.Impulse():
            mean = (1 - level) * value + level / 2
            return mean, (1 - level) * value**2 + level / 2 - mean**2
        case noise.SwapNoise() | noise.Jitter():
            return value, 0.0
        case noise.Quantization():
            return value, level**2 / 12
        case noise.Rician():
            a = torch.tensor(value**2 / (2 * level**2), dtype=torch.float64)
            bessel = (1 + a) * torch.special.i0e(a / 2) + a * torch.special.i1e(a / 2)  # the Laguerre polynomial of order 1/2
            mean = level * math.sqrt(math.pi / 2) * bessel.item()
            return mean, value**2 + 2 * level**2 - mean**2
        case noise.OneOf():
            mean, square = (1 - level) * value + level / 2, (1 - level) * (value**2 + level**2) + level / 2
            mean, square = 0.75 * mean + 0.25 * value, 0.75 * square + 0.25 * (value**2 + (2 * level) ** 2 / 3)
            return mean, square - mean**2
        case _:
            raise NotImplementedError(member)


# of the others it depends on the sample or the axis, and each has a test of its own
OTHER_MOMENTS = (noise.Impulse(), noise.ColoredNoise(dim=-2), *MASKING)
OF_THE_SAMPLE = noise.Transform | noise.Recorded | noise.AnalogWeights
CONSTANT_MOMENTS = [member for member in NOISES if member not in OTHER_MOMENTS and not isinstance(member, OF_THE_SAMPLE)]


@pytest.mark.parametrize("level", [0.1, 0.5])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("member", CONSTANT_MOMENTS, ids=repr)
def test_mean_and_variance_are_those_of_the_formula(member, value, level, generator):
    x = torch.full((N, 1, 8), value, dtype=torch.float64)
    y = member(x, level, generator=generator)[:, 0, 2]
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


LINEAR = (
    noise.Gaussian,
    noise.Uniform,
    noise.Speckle,
    noise.SNR,
    noise.ColoredNoise,
    noise.Drift,
    noise.Scaling,
    noise.PatchGaussian,
    noise.Recorded,
)


@pytest.mark.parametrize("member", [member for member in NOISES if isinstance(member, LINEAR)], ids=repr)
def test_the_level_scales_one_draw(member):
    x = torch.rand(5, 2, 7, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    half, full = (
        member(x, level, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) - x for level in (0.5, 1.0)
    )
    # the same z at both levels; the subtraction of x rounds at 1e-16 of a number near 1
    torch.testing.assert_close(2 * half, full, rtol=0, atol=1e-14)


def test_the_impulses_of_a_lower_level_are_among_those_of_a_higher_one():
    x = torch.full((1000,), 0.5)
    few, many = (
        noise.Impulse(low=0.0, high=1.0)(x, level, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) != x
        for level in (0.1, 0.3)
    )
    assert bool((many | ~few).all())
    assert many.sum() > few.sum()


def normals(*shape: int) -> Draw:
    return lambda generator: torch.empty(shape).normal_(generator=generator)


def uniforms(*shape: int) -> Draw:
    return lambda generator: torch.empty(shape).uniform_(generator=generator)


def bits(*shape: int) -> Draw:
    return lambda generator: draw_bits(torch.empty(shape), generator)


# all that a member draws for a batch of shape (6, 3, 8, 8); Poisson draws take as many as they take
DRAWS: dict[type[noise.Noise], list[Draw]] = {
    noise.Gaussian: [normals(6, 3, 8, 8)],
    noise.Uniform: [uniforms(6, 3, 8, 8)],
    noise.Speckle: [normals(6, 3, 8, 8)],
    noise.Impulse: [bits(6, 3, 8, 8)],
    noise.SNR: [normals(6, 3, 8, 8)],
    noise.ColoredNoise: [normals(6, 3, 8, 5, 2)],  # with the mean and the phase of the highest frequency, to be in one piece
    noise.Drift: [normals(6, 3, 8, 8)],
    noise.Scaling: [normals(6, 3, 8, 1)],
    noise.PatchGaussian: [uniforms(2, 6), normals(6, 3, 3, 3)],
    noise.Masking: [uniforms(2, 2, 6)],
    noise.FeatureDropout: [bits(6, 3, 8, 8)],
    noise.DropConnect: [bits(6, 3, 8, 8)],
    noise.SwapNoise: [bits(6, 3, 8, 8)],
    noise.Transform: [lambda generator: torch.randint(2**32, (6,), generator=generator)],  # the seeds
    noise.Rician: [normals(6, 3, 8, 8), normals(6, 3, 8, 8)],
    noise.Quantization: [uniforms(6)],
    noise.Jitter: [normals(6, 1, 1, 8)],
    noise.Recorded: [uniforms(2, 6)],
    noise.AnalogWeights: [normals(3, 2, 6, 3, 8, 8)],
    noise.OneOf: [uniforms(6), normals(6, 3, 8, 8), bits(6, 3, 8, 8), uniforms(6, 3, 8, 8)],
}


@pytest.mark.parametrize(
    "member", [member for member in NOISES if member not in (noise.Shot(), noise.Shot(scale=4.0), MASKING[1])], ids=repr
)
def test_no_more_is_drawn_than_the_noise_needs(member, generator):
    reference = torch.Generator(torch.get_default_device()).manual_seed(0)
    for each in DRAWS[type(member)]:
        each(reference)
    member(torch.rand(6, 3, 8, 8), 0.3, generator=generator)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_a_share_of_the_bits_is_exact_at_its_ends_and_each_bit_is_fair(generator):
    drawn = draw_bits(torch.empty(N + 1), generator)
    assert drawn.dtype == torch.int32
    assert drawn.min() >= 0
    shares = ((drawn[:, None] >> torch.arange(31)) & 1).double().mean(0)
    assert ((shares - 0.5).abs() <= 5 * 0.5 / math.sqrt(N)).all()  # five standard errors
    for level in (0.0, 2**-31, 0.25, 1.0):
        for given in (level, torch.tensor([level])):
            assert int(last_bits(given)) == level * 2**31 - 1


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (12, 3, 16, 16)], ids=["small", "large"])
@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_the_noise_is_the_same_if_autograd_follows(member, shape):
    x = torch.rand(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    holes = torch.rand(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(2)) < 0.7
    for mask in (None, holes):
        one, two = (
            member(each, 0.3, generator=torch.Generator(torch.get_default_device()).manual_seed(0), mask=mask)
            for each in (x, x.clone().requires_grad_())
        )
        assert two.requires_grad
        assert torch.equal(one, two)


@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_a_large_batch_has_the_noise_of_its_level_in_each_row(member):
    x, levels = torch.rand(12, 3, 16, 16), torch.linspace(0, 0.3, 12)
    y = member(x, levels, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    assert torch.equal(y[0], x[0])
    if (type(member), testing.takes_a_level_for_each_sample) not in EXEMPT:
        for i in (1, 6, 11):
            other = member(x, levels[i].item(), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
            assert torch.equal(y[i], other[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("member", [member for member in NOISES if member.takes_half], ids=repr)
def test_a_noise_that_takes_half_precision_rounds_once(member, dtype):
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator(torch.get_default_device()).manual_seed(1)).to(dtype)
    holes = torch.rand(x.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(2)) < 0.7
    for level in (0.3, torch.linspace(0, 0.3, 6).view(6, 1, 1, 1)):
        for mask in (None, holes):
            half, full = (
                member.perturb(each, level, torch.Generator(torch.get_default_device()).manual_seed(0), mask)
                for each in (x, x.float())
            )
            assert torch.equal(half.to(dtype), full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", [member for member in NOISES if not isinstance(member, WAITING)], ids=repr)
def test_a_noise_does_not_wait_for_the_device(member, dtype):
    # a tensor on "meta" takes the path of a GPU, and has no values to look at
    x = torch.empty(6, 3, 8, 8, dtype=dtype, device="meta")
    for level in (0.3, torch.empty(6, device="meta")):
        for mask in (None, torch.empty(x.shape, dtype=torch.bool, device="meta")):
            y = member(x, level, generator=torch.Generator(), mask=mask)
            assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)


def test_impulses_take_the_extremes_of_their_own_sample(generator):
    x = torch.stack([torch.linspace(0, 1, 500), torch.linspace(-3, 5, 500)])
    y = noise.Impulse()(x, 1.0, generator=generator)
    assert y[0].unique().tolist() == [0, 1]
    assert y[1].unique().tolist() == [-3, 5]


def test_impulses_need_a_range(generator):
    with pytest.raises(ValueError, match="give low and high"):
        noise.Impulse()(torch.zeros(5), 0.5, generator=generator)


def test_samples_with_levels_of_their_own_get_shot_noise_of_their_variance(generator):
    x, levels = torch.full((3, N), 0.4, dtype=torch.float64), torch.tensor([0.0, 0.1, 0.5])
    y = noise.Shot()(x, levels, generator=generator)
    assert torch.equal(y[0], x[0])
    for row, level in zip(y[1:], levels[1:].tolist(), strict=True):
        # five standard errors
        assert abs(row.mean().item() - 0.4) <= 5 * math.sqrt(level * 0.4 / N)
        assert abs(row.var().item() - level * 0.4) <= 5 * (row - 0.4).square().std().item() / math.sqrt(N)


@pytest.mark.parametrize(("value", "level"), [(0.5, 1e-20), (1e30, 0.1), (math.inf, 0.1), (0.5, 1e-9)])
def test_counts_too_large_to_draw_leave_the_value(value, level, generator):
    x = torch.full((2, 3), value)
    assert torch.equal(noise.Shot()(x, level, generator=generator), x) is (value / level >= 2**30)
    torch.testing.assert_close(noise.Shot()(x, level, generator=generator), x, rtol=1e-3, atol=0)  # 30 standard errors


def test_counts_are_drawn_anew_at_level_1(generator):
    counts = torch.arange(50.0).view(5, 10)
    y = noise.Shot()(counts, 1.0, generator=generator)
    assert torch.equal(y, y.round())
    assert not torch.equal(y, counts)


def test_shot_noise_of_negative_data_is_refused(generator):
    with pytest.raises(ValueError, match="for normalized data type mean=… and std=…"):
        noise.Shot()(torch.tensor([[0.5, -0.1]]), 0.1, generator=generator)


@pytest.mark.parametrize("level", [0.001, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(4, 50), (4, 1000), (4, 3, 16, 16)])
def test_the_signal_to_noise_ratio_is_exact_in_each_sample(shape, level, generator):
    x = 5 + torch.rand(shape, dtype=torch.float64, generator=generator) * torch.arange(1.0, 5).view(-1, *[1] * (len(shape) - 1))
    for center in (False, True):
        error = (noise.SNR(center=center)(x, level, generator=generator) - x).flatten(1)
        signal = x.flatten(1) - (x.flatten(1).mean(1, keepdim=True) if center else 0)
        ratio = 10 * torch.log10(signal.square().sum(1) / error.square().sum(1))
        # y - x loses what y was rounded by, 1e-16 of a number up to 10, of an error of at least 0.001
        torch.testing.assert_close(ratio, torch.full_like(ratio, -20 * math.log10(level)), rtol=0, atol=1e-11)


def test_the_signal_to_noise_ratio_is_exact_to_1e12_where_nothing_is_cancelled(generator):
    x = torch.randn(4, 1000, dtype=torch.float64, generator=generator)
    error = noise.SNR()(x, 1.0, generator=generator) - x
    ratio = 10 * torch.log10(x.square().sum(1) / error.square().sum(1))
    torch.testing.assert_close(ratio, torch.zeros_like(ratio), rtol=0, atol=1e-12)


@pytest.mark.parametrize("member", [noise.SNR(), noise.SNR(center=True)], ids=repr)
def test_a_silent_sample_stays_silent(member, generator):
    x = torch.zeros(2, 50) if not member.center else torch.full((2, 50), 3.0)
    assert torch.equal(member(x, 1.0, generator=generator), x)


@pytest.mark.parametrize("n", [256, 255])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, -1.0, -2.0])
def test_the_power_spectrum_has_its_slope(exponent, n, generator):
    x = torch.zeros(4000, n, dtype=torch.float64)
    y = noise.ColoredNoise(exponent=exponent)(x, 0.3, generator=generator)
    # without the highest frequency, which may stand for one number and not for two; the logarithm turns the root mean square
    # that each series is divided by into a shift, which no slope sees
    log_power = torch.fft.rfft(y).abs().square().log().mean(0)[1 : n // 2]
    log_f = torch.arange(1.0, len(log_power) + 1, dtype=torch.float64).log()
    centred = log_f - log_f.mean()
    slope = (centred * log_power).sum() / centred.square().sum()
    # five standard errors: the logarithm of a sum of two squares of Gaussians has the variance pi^2 / 6
    assert abs(slope.item() + exponent) <= 5 * math.sqrt(math.pi**2 / 6 / 4000) / centred.norm().item()
    torch.testing.assert_close(y.square().mean(1).sqrt(), torch.full((4000,), 0.3, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(y.mean(1), torch.zeros(4000, dtype=torch.float64), rtol=0, atol=1e-12)


def test_white_noise_has_the_same_power_at_all_frequencies(generator):
    n = 40_000
    y = noise.ColoredNoise(exponent=0.0)(torch.zeros(n, 8, dtype=torch.float64), 1.0, generator=generator)
    power = torch.fft.rfft(y).abs().square()
    # five standard errors around 64 / 7, a seventh of the sum of squares for each of the seven numbers
    error = 5 * power.std(0) / math.sqrt(n)
    assert ((power.mean(0) - 64 / 7).abs() <= error)[1:].all()


@pytest.mark.parametrize("exponent", [-30.0, -100.0, 100.0])
def test_a_steep_spectrum_is_finite(exponent, generator):
    y = noise.ColoredNoise(exponent=exponent)(torch.zeros(3, 2000), 0.3, generator=generator)
    torch.testing.assert_close(y.square().mean(1).sqrt(), torch.full((3,), 0.3), rtol=1e-5, atol=0)  # float32


def test_a_series_that_draws_an_exact_zero_has_no_noise(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, **_: self.zero_())
    assert torch.equal(
        noise.ColoredNoise()(torch.ones(2, 2), 0.3, generator=torch.Generator(torch.get_default_device())), torch.ones(2, 2)
    )


def test_a_series_of_one_element_has_no_color(generator):
    with pytest.raises(ValueError, match="at least two elements"):
        noise.ColoredNoise()(torch.zeros(3, 1), 0.1, generator=generator)


def test_each_series_is_scaled_by_one_factor_of_its_own(generator):
    x = 1 + torch.rand(4, 3, 50, dtype=torch.float64, generator=generator)
    factors = noise.Scaling()(x, 0.3, generator=generator) / x
    # a product and a quotient round once each
    torch.testing.assert_close(factors, factors[..., :1].expand_as(factors), rtol=1e-15, atol=0)
    assert len(factors[..., 0].unique()) == 12


@pytest.mark.parametrize(("size", "shape"), [(3, (9, 9)), (4, (9, 6)), (2, (4, 3)), (1, (5, 5)), (6, (6, 9)), (20, (6, 9))])
def test_a_patch_reaches_every_edge_alike_and_covers_the_share_of_the_formula(size, shape, generator, monkeypatch):
    # every center, and with it both squares of even size around it, once
    centers = [(torch.arange(2 * n) + 0.5) / (2 * n) for n in shape]
    grid = torch.cartesian_prod(*centers).T.contiguous()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *, generator: tensor.copy_(grid))
    changed = noise.PatchGaussian(size)(torch.zeros(grid.shape[1], 2, *shape), 1.0, generator=generator) != 0
    assert torch.equal(changed[:, 0], changed[:, 1])
    rows, columns = changed[:, 0].any(2), changed[:, 0].any(1)
    assert torch.equal(changed[:, 0], rows[:, :, None] & columns[:, None, :])
    times = changed[:, 0].sum(0)
    assert torch.equal(times, times.flip(0))
    assert torch.equal(times, times.flip(1))
    if size <= min(shape):
        shares = [size / n - size**2 // 4 / n**2 for n in shape]
        assert times.double().mean().item() / grid.shape[1] == pytest.approx(math.prod(shares), rel=1e-12)


def test_the_noise_of_a_patch_is_that_of_independent_elements(generator):
    y = noise.PatchGaussian(5)(torch.zeros(2000, 1, 16, 16), 1.0, generator=generator)
    drawn = [row[row != 0] for row in y]
    assert all(len(values.unique()) == len(values) for values in drawn)
    values = torch.cat(drawn)
    assert abs(values.var().item() - 1) <= 5 * math.sqrt(2 / len(values))  # five standard errors


@pytest.mark.parametrize("level", [0.02, 0.3, 0.77])
@pytest.mark.parametrize("dim", [(-1,), (-2,), (-2, -1), (-3, -2, -1)])
def test_the_share_that_is_masked_is_the_level_on_average(dim, level, generator):
    x = torch.ones(20_000, 3, 5, 7)
    share = 1 - noise.Masking(dim=dim)(x, level, generator=generator).flatten(1).mean(1, dtype=torch.float64)
    # five standard errors; 1e-7 for the root of the level in float32
    assert abs(share.mean().item() - level) <= 5 * share.std().item() / math.sqrt(len(x)) + 1e-7


def test_a_mask_is_one_box_through_the_other_axes(generator):
    x = torch.ones(500, 3, 6, 8)
    masked = noise.Masking(dim=(-1, -2), value=-1.0)(x, 0.3, generator=generator) == -1
    assert masked.any(0).all(), "the box does not come everywhere"
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    rows, columns = masked[:, 0].any(2), masked[:, 0].any(1)
    assert torch.equal(masked[:, 0], rows[:, :, None] & columns[:, None, :])
    for line, length in ((rows, 6), (columns, 8)):
        edges = line.int().diff(dim=1).abs().sum(1) + line[:, 0].int() + line[:, -1].int()
        assert ((edges == 2) | (edges == 0)).all(), "not one run of elements"
        # rounded up or down
        assert set(line.sum(1).tolist()) == {math.floor(length * 0.3**0.5), math.ceil(length * 0.3**0.5)}


def test_everything_is_masked_at_level_1(generator):
    x = torch.ones(50, 2, 6, 8)
    assert (noise.Masking(dim=(-3, -2, -1))(x, 1.0, generator=generator) == 0).all()


def test_dropped_features_are_zero_and_the_others_scaled(generator):
    x = 1 + torch.rand(50, 40, dtype=torch.float64, generator=generator)
    for rescale, factor in ((True, 1 / 0.7), (False, 1.0)):
        y = noise.FeatureDropout(rescale=rescale)(x, 0.3, generator=generator)
        torch.testing.assert_close(y[y != 0], (x * factor)[y != 0], rtol=1e-15, atol=0)
    assert (noise.FeatureDropout()(x, 1.0, generator=generator) == 0).all()


@pytest.mark.parametrize("member", DROPOUTS, ids=repr)
@pytest.mark.parametrize("level", [1.0, torch.tensor([0.5, 1.0])], ids=repr)
def test_the_gradient_is_finite_where_all_is_dropped(member, level):
    x = torch.ones(2, 3, requires_grad=True)
    member(x, level, generator=torch.Generator(torch.get_default_device()).manual_seed(0)).sum().backward()
    assert x.grad is not None
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()


def test_drop_connect_is_the_dropout_of_features_under_another_name():
    x = torch.rand(50, 40)
    one, two = (member(x, 0.3, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) for member in DROPOUTS)
    assert torch.equal(one, two)


def test_a_swapped_cell_comes_from_its_column_and_any_other_row(generator):
    rows, columns = 5, 4000
    codes = torch.arange(rows)[:, None] + 10 * torch.arange(columns)  # each cell is another number
    y = noise.SwapNoise()(codes, 0.4, generator=generator)
    assert y.dtype == torch.int64
    assert torch.equal(y // 10, codes // 10)
    origin = y % 10
    for row in range(rows):
        counts = torch.bincount(origin[row], minlength=rows) / columns
        expected = torch.full((rows,), 0.4 / (rows - 1))
        expected[row] = 0.6
        # five standard errors
        assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / columns).sqrt()).all()


def test_the_other_row_is_uniform_also_where_few_are_swapped(generator):
    rows, level = 4096, 1e-3
    x = torch.arange(rows).repeat(64, 1).T.contiguous()
    y = noise.SwapNoise()(x, level, generator=generator)
    donors = torch.bincount(y[y != x], minlength=rows)
    n = donors.sum().item()
    assert abs(n - level * x.numel()) <= 5 * math.sqrt(level * x.numel())
    # five standard errors of the number of rows that give nothing
    empty = rows * math.exp(-n / rows)
    assert abs((donors == 0).sum().item() - empty) <= 5 * math.sqrt(empty)


def test_swaps_keep_the_marginal_of_each_column(generator):
    rows = 200
    column = torch.randint(0, 4, (rows, 1), generator=generator)
    before = torch.bincount(column[:, 0], minlength=4) / rows
    y = torch.stack([noise.SwapNoise()(column, 1.0, generator=generator)[:, 0] for _ in range(500)])
    after = torch.bincount(y.flatten(), minlength=4) / y.numel()
    # five standard errors; a cell cannot be its own partner, which summed over all rows leaves no trace
    assert ((after - before).abs() <= 5 * (before * (1 - before) / y.numel()).sqrt()).all()


def test_a_batch_of_one_row_has_nothing_to_swap(generator):
    x = torch.rand(1, 5)
    y = noise.SwapNoise()(x, 1.0, generator=generator)
    assert torch.equal(y, x)
    assert y is not x


@pytest.mark.parametrize(
    "member",
    [noise.SNR(), noise.ColoredNoise(), noise.Drift(), noise.Scaling(), noise.PatchGaussian(2), *MASKING, noise.Jitter()],
    ids=repr,
)
def test_a_batch_with_too_few_axes_is_refused(member, generator):
    with pytest.raises(ValueError, match=rf"{type(member).__name__} needs samples of at least .*\(5,\)"):
        member(torch.rand(5), 0.1, generator=generator)


@pytest.mark.parametrize(
    "build",
    [
        lambda: noise.Shot(scale=0.0),
        lambda: noise.Shot(scale=math.inf),
        lambda: noise.Impulse(low=math.nan),
        lambda: noise.Impulse(low=1.0, high=0.0),
        lambda: noise.PatchGaussian(size=0),
        lambda: noise.ColoredNoise(exponent=math.nan),
        lambda: noise.ColoredNoise(dim=1),
        lambda: noise.Drift(dim=0),
        lambda: noise.Scaling(dim=1),
        lambda: noise.Masking(dim=()),
        lambda: noise.Masking(dim=(1, 2)),
        lambda: noise.Masking(dim=(-1, -1)),
    ],
)
def test_arguments_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match=r"must be|must not be"):
        build()


@pytest.mark.parametrize(
    ("member", "arguments", "message"),
    [
        (noise.Masking, dict(dim="x"), r"dim must be an axis or a tuple of axes such as \(-1,\), got 'x'"),
        (noise.Masking, dict(dim=0.3), r"dim must be an axis or a tuple of axes such as \(-1,\), got 0.3"),
        (noise.Masking, dict(dim=[-1.0]), "dim must be an axis counted from the end, such as -1, got -1.0"),
        (noise.Drift, dict(dim=(-1,)), r"dim must be an axis counted from the end, such as -1, got \(-1,\)"),
        (noise.ColoredNoise, dict(dim=True), "dim must be an axis counted from the end, such as -1, got True"),
        (noise.PatchGaussian, dict(size=2.5), "size must be a whole number, got 2.5"),
        (noise.PatchGaussian, dict(size=np.bool_(True)), "size must be a whole number, got"),
        (noise.Shot, dict(scale=True), "scale must be a number, got True"),
        (noise.Impulse, dict(low="0"), "low must be a number, got '0'"),
        (noise.ColoredNoise, dict(exponent="pink"), "exponent must be a number, got 'pink'"),
        (noise.SNR, dict(center=0.1), "center must be True or False, got 0.1"),
        (noise.FeatureDropout, dict(rescale=0.2), "rescale must be True or False, got 0.2"),
    ],
)
def test_arguments_of_another_kind_are_refused(member, arguments, message):
    with pytest.raises(TypeError, match=message):
        member(**arguments)


def test_whole_numbers_of_numpy_are_whole_numbers(generator):
    three, axis, half = (cast(Any, number) for number in (np.int64(3), np.int64(-2), np.float32(0.5)))
    assert noise.PatchGaussian(three) == noise.PatchGaussian(3)
    assert noise.Drift(dim=axis) == noise.Drift(dim=-2)
    assert noise.Gaussian()(torch.zeros(2, 3), half, generator=generator).any()


@pytest.mark.parametrize(
    "level", [True, np.bool_(True), torch.tensor(True), np.array(True), torch.ones(2), np.ones(2)], ids=repr
)
def test_a_boolean_or_several_numbers_are_no_level(level):
    with pytest.raises(TypeError, match="a level must be a number, got"):
        check_level(level)


@pytest.mark.parametrize("member", NOISES, ids=repr)
@pytest.mark.parametrize("level", [-0.1, math.nan, math.inf])
def test_a_level_that_is_no_amount_is_refused(member, level, generator):
    with pytest.raises(ValueError, match="a level must be"):
        member(torch.zeros(2, 2, 2), level, generator=generator)


@pytest.mark.parametrize("member", [noise.Impulse(low=0.0, high=1.0), *MASKING, *DROPOUTS, noise.SwapNoise()], ids=repr)
def test_a_share_above_one_is_refused(member, generator):
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        member(torch.zeros(2, 2, 2), 1.5, generator=generator)


@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_severities_are_five_and_rise(member):
    assert len(member.severities) == 5
    assert list(member.severities) == sorted(set(member.severities))
    assert 0 < member.severities[0] <= member.severities[-1] <= member.max_level


@pytest.mark.parametrize(("member", "factor"), [(noise.Uniform, math.sqrt(3)), (noise.Drift, math.sqrt(2))])
def test_the_severities_have_the_power_of_those_of_gaussian(member, factor):
    for severity, sigma in zip(member.severities, noise.Gaussian.severities, strict=True):
        assert severity == round(factor * sigma, 2)


@pytest.mark.parametrize(
    "each",
    [noise.Gaussian(), noise.FeatureDropout(), noise.Impulse(), noise.Drift(), noise.SNR(center=True), noise.Shot()],
    ids=repr,
)
def test_forward_derivatives_are_those_of_the_backward_pass(each):
    x = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    for mask in (None, x < 0.7):

        def perturb(x, mask=mask):
            return each(x, 0.3, generator=torch.Generator(x.device).manual_seed(0), mask=mask)

        value, derivative = torch.func.jvp(perturb, (x,), (x.flip(1),))  # type: ignore[misc]
        assert torch.equal(value, perturb(x))
        backward = torch.autograd.functional.jvp(perturb, x, x.flip(1))[1]
        torch.testing.assert_close(derivative, backward, rtol=1e-12, atol=1e-12)
