"""Noise under a mask, beside missing values and in complex data is that of the formula."""

from __future__ import annotations

import math

import pytest
import torch
from members import NOISES

from lightning_noise import noise

N = 20_000


def spans(lengths: torch.Tensor, n: int) -> torch.Tensor:
    return torch.arange(n) < lengths[:, None]


def padded(n: int = 200, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Series, and a mask of the first elements of each."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    mask = spans(torch.randint(2, length + 1, (n,), generator=generator), length)
    return 3 + torch.randn(n, length, dtype=torch.float64, generator=generator), mask


MASKS = {
    "a span at the start": lambda mask: mask,
    "a span at the end": lambda mask: mask.flip(1),
    "with gaps": lambda mask: mask & (torch.arange(mask.shape[1]) % 5 != 2),
}
every_mask = pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)


def power(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, error, 0.0).square().sum(1) / mask.sum(1)


@every_mask
def test_the_signal_to_noise_ratio_is_that_of_the_valid_part(change, generator):
    x, mask = padded()
    mask = change(mask)
    for center in (False, True):
        y = noise.SNR(center=center)(x, 0.1, generator=generator, mask=mask)
        mean = torch.where(mask, x, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True) if center else 0.0
        ratio = power(y - x, mask) / power(x - mean, mask)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.01), rtol=1e-10, atol=0)


@every_mask
@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_colored_noise_has_its_power_and_mean_in_the_valid_part(exponent, change, generator):
    x, mask = padded()
    mask = change(mask)
    for dim, view in ((-1, lambda z: z[:, None]), (-2, lambda z: z[:, :, None])):
        y = noise.ColoredNoise(exponent=exponent, dim=dim)(view(x), 0.3, generator=generator, mask=view(mask))
        error = (y - view(x)).flatten(1)
        several = mask.sum(1) > 1
        torch.testing.assert_close(power(error, mask)[several].sqrt(), torch.full_like(x[several, 0], 0.3), rtol=1e-9, atol=0)
        mean = torch.where(mask, error, 0.0).sum(1) / mask.sum(1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)


def test_a_stretch_of_brown_noise_keeps_the_spectrum_of_the_whole(generator):
    n, length = 4000, 64
    mask = (torch.arange(256) < length).expand(n, 256).contiguous()
    y = noise.ColoredNoise(exponent=2.0)(torch.zeros(n, 256, dtype=torch.float64), 0.3, generator=generator, mask=mask)[
        :, :length
    ]
    steps = y.diff(dim=1)  # a trend is a constant here
    spectrum = (torch.fft.rfft(steps).abs().square() / steps.square().sum(1, keepdim=True)).mean(0)[1:]
    expected = torch.sinc(torch.fft.rfftfreq(length - 1, dtype=torch.float64))[1:].square()  # of differences of 1 / f^2
    ratio = (spectrum / spectrum.mean()) / (expected / expected.mean())
    assert (ratio - 1).abs().max() < 0.1


@pytest.mark.parametrize("level", [0.25, 1e4])
@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_series_with_few_valid_elements_stay_finite_and_keep_the_others(member, level, generator):
    x, mask = torch.full((3, 2, 8), 100.0), torch.ones(3, 2, 8, dtype=torch.bool)
    mask[0], mask[1, :, 1:] = False, False
    y = member(x, min(level, member.max_level), generator=generator, mask=mask)
    assert y.isfinite().all()
    assert torch.equal(y[~mask], x[~mask])


def test_a_walk_counts_valid_steps(generator):
    mask = torch.tensor([False, True, True, False, True, True, False]).expand(N, 7).contiguous()
    for dim, view in ((-1, lambda z: z[:, None]), (-2, lambda z: z[:, :, None])):
        y = noise.Drift(dim=dim)(view(torch.zeros(N, 7)), 0.5, generator=generator, mask=view(mask)).flatten(1)
        assert not y[~mask].any()
        variance = 0.25 * torch.tensor([1, 2, 3, 4]) / 4
        # five standard errors
        assert ((y[mask].view(N, 4).square().mean(0) / variance - 1).abs() <= 5 * math.sqrt(2 / N)).all()


@pytest.mark.parametrize("level", [0.02, 0.3, 0.77, 1.0])
@every_mask
def test_the_share_of_a_series_that_is_masked_is_the_level(change, level, generator):
    lengths = torch.arange(5, 9).repeat(5000)
    mask = change(spans(lengths, 10))
    masked = noise.Masking(dim=(-1,), value=-1.0)(torch.ones(len(mask), 10), level, generator=generator, mask=mask) == -1
    assert not (masked & ~mask).any()
    share = masked.sum(1, dtype=torch.float64) / mask.sum(1)
    for length in lengths.unique():
        shares = share[lengths == length]
        # five standard errors
        assert abs(shares.mean().item() - level) <= 5 * shares.std().item() / math.sqrt(len(shares)) + 1e-7
    # a box is one run of valid positions
    valid_runs = [row[valid].int().diff().abs().sum().item() for row, valid in zip(masked[:200], mask[:200], strict=True)]
    assert max(valid_runs) <= 2


@pytest.mark.parametrize("level", [0.1, 0.5])
def test_the_share_of_a_padded_image_that_is_masked_is_the_level(level, generator):
    heights, widths = torch.tensor([4, 6, 3]).repeat(5000), torch.tensor([7, 2, 5]).repeat(5000)
    mask = (spans(heights, 6)[:, :, None] & spans(widths, 7)[:, None]).unsqueeze(1).expand(-1, 2, -1, -1).contiguous()
    masked = noise.Masking(value=-1.0)(torch.ones(mask.shape), level, generator=generator, mask=mask) == -1
    share = masked.flatten(1).sum(1, dtype=torch.float64) / mask.flatten(1).sum(1)
    for kind in range(3):
        shares = share[kind::3]
        # five standard errors; 1e-7 for the root of the level in float32
        assert abs(shares.mean().item() - level) <= 5 * shares.std().item() / math.sqrt(len(shares)) + 1e-7


def test_a_patch_lies_around_a_valid_pixel(generator):
    mask = torch.zeros(2000, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :4, 2:7] = True
    y = noise.PatchGaussian(1)(torch.zeros(mask.shape), 1.0, generator=generator, mask=mask)
    assert ((y != 0).flatten(1).sum(1) == 1).all()
    times = (y != 0).sum((0, 1))[:4, 2:7]
    # five standard errors
    assert ((times - 2000 / 20).abs() <= 5 * math.sqrt(2000 / 20)).all()


def test_impulses_take_the_extremes_of_the_valid_part(generator):
    x = torch.stack([torch.linspace(0, 1, 500), torch.linspace(-3, 5, 500)])
    x[:, :100], x[:, 450:] = -99, torch.nan
    mask = x != -99
    y = noise.Impulse()(x, 1.0, generator=generator, mask=mask)
    for row, before, valid in zip(y, x, mask & ~x.isnan(), strict=True):
        assert row[valid].unique().tolist() == [before[valid].min().item(), before[valid].max().item()]


def test_shot_noise_takes_any_padding(generator):
    x = torch.tensor([[0.5, 0.2, -1.0], [0.1, -100.0, torch.nan]])
    y = noise.Shot()(x, 0.1, generator=generator, mask=x > 0)
    assert torch.equal(y[x <= 0], x[x <= 0])
    with pytest.raises(ValueError, match="got a minimum of -100"):
        noise.Shot()(x, 0.1, generator=generator)


@pytest.mark.parametrize("level", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["codes", "floats with NaN"])
def test_cells_are_swapped_among_the_valid_cells_of_a_column(kind, level, generator):
    rows, columns = 6, 6000
    codes = torch.arange(rows)[:, None] + 10 * torch.arange(columns)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[1] = mask[4] = False
    mask[:, ::2] |= torch.tensor([False, True, False, False, False, False])[:, None]  # four and five valid cells
    if kind == "codes":
        x = torch.where(mask, codes, -1)
        y = noise.SwapNoise()(x, level, generator=generator, mask=mask)
        assert y.dtype == torch.int64
        assert (y[~mask] == -1).all()
    else:
        x = torch.where(mask, codes.double(), torch.nan)
        y = noise.SwapNoise()(x, level, generator=generator)
        assert torch.equal(y.isnan(), ~mask)
    origin = (y.nan_to_num(-1) % 10).long()
    for first, donors in ((0, (0, 1, 2, 3, 5)), (1, (0, 2, 3, 5))):
        for row in donors:
            counts = torch.bincount(origin[row, first::2], minlength=rows)[list(donors)] / (columns // 2)
            expected = torch.full((len(donors),), level / (len(donors) - 1))
            expected[donors.index(row)] = 1 - level
            # five standard errors
            assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / (columns // 2)).sqrt()).all()


def test_a_cell_alone_in_its_column_stays(generator):
    x = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [torch.nan, 2.0]])
    y = noise.SwapNoise()(x, 1.0, generator=generator)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


def test_a_function_keeps_invalid_elements(generator):
    shift = noise.as_noise(lambda x, level, *, generator: x.nan_to_num() + level)
    x = torch.tensor([[1.0, torch.nan, 0.0]])
    assert shift(x, 0.5, generator=generator)[0, :].nan_to_num(-1).tolist() == [1.5, -1.0, 0.5]
    masked = shift(x, 0.5, generator=generator, mask=torch.tensor([[True, True, False]]))
    assert masked.nan_to_num(-1).tolist() == [[1.5, -1.0, 0.0]]


@pytest.mark.parametrize("member", NOISES, ids=repr)
def test_a_mask_of_another_kind_is_refused(member, generator):
    x = torch.rand(2, 3, 4, 4)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(x.shape)):
        with pytest.raises(ValueError, match=r"mask must be a boolean tensor of shape .*; type masks.align_mask\(mask, x\)"):
            member(x, 0.5, generator=generator, mask=mask)


FLOATS = [member for member in NOISES if member.requires_float]


@pytest.mark.parametrize("member", FLOATS, ids=repr)
def test_integers_are_refused_by_what_needs_floats(member, generator):
    with pytest.raises(TypeError, match=rf"{member.title} needs floats, got int64 \(2, 3, 4\); type x.float\(\)"):
        member(torch.ones(2, 3, 4, dtype=torch.int64), 0.5, generator=generator)


COMPLEX = [member for member in NOISES if member.takes_complex]
REAL = [member for member in NOISES if not member.takes_complex]


def complexes(*shape: int, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("member", COMPLEX, ids=repr)
def test_complex_data_are_perturbed_in_their_valid_part(member, dtype, generator):
    x = complexes(6, 3, 8, 8, dtype=dtype)
    mask = torch.rand(x.shape, generator=generator) < 0.7
    x = torch.where(mask, x, complex(torch.nan, torch.inf))
    before = generator.get_state()
    results = []
    for given in (None, mask, mask & ~x.isnan()):
        generator.set_state(before)
        results.append(member(x, 0.5, generator=generator, mask=given))
    y = results[0]
    assert y.dtype == dtype
    assert torch.equal(y.isnan(), ~mask)
    assert (y[mask] != x[mask]).any()
    assert all(torch.equal(torch.view_as_real(other[mask]), torch.view_as_real(y[mask])) for other in results)


@pytest.mark.parametrize("member", REAL, ids=repr)
def test_complex_data_are_refused_by_the_others(member, generator):
    with pytest.raises(TypeError, match=r"needs real numbers, got complex128 \(2, 3\); type torch.view_as_real\(x\) or x.abs"):
        member(complexes(2, 3), 0.5, generator=generator)


@pytest.mark.parametrize(
    ("member", "power"),
    [
        (noise.Gaussian(), 0.25),
        (noise.ColoredNoise(), 0.25),
        (noise.SNR(), 0.25 * 4),
        (noise.Drift(), 0.25 * 5 / 8),
        (noise.Speckle(), 0.25 * 4),
        (noise.Scaling(), 0.25 * 4),
    ],
    ids=repr,
)
def test_complex_noise_is_circular_and_has_the_power_of_the_level(member, power, generator):
    error = (member(torch.full((N, 8), 2j, dtype=torch.complex128), 0.5, generator=generator) - 2j)[:, 4]
    squares = error.abs().square()
    # five standard errors
    limit = 5 * squares.std().item() / math.sqrt(N) + 1e-12
    assert abs(squares.mean().item() - power) <= limit
    assert abs((error * error).mean().item()) <= 5 * power * 2 / math.sqrt(N)
    assert abs(error.mean().item()) <= 5 * math.sqrt(power / N)


def test_complex_colored_noise_has_exactly_its_power(generator):
    y = noise.ColoredNoise(exponent=1.0)(torch.zeros(50, 64, dtype=torch.complex128), 0.3, generator=generator)
    power = y.abs().square().mean(1)
    torch.testing.assert_close(power, torch.full_like(power, 0.09), rtol=1e-12, atol=0)
    assert y.mean(1).abs().max() < 1e-12
