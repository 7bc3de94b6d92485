"""A key is a pure function of its coordinates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from members import NOISES

from lightning_noise import Key, noise
from lightning_noise.testing import global_streams

KEY = Key((0, "input", 3, 7), rank=0)


def draw(key: Key) -> list[float]:
    return torch.rand(4, generator=key.generator(torch.get_default_device())).tolist()


def test_the_same_key_gives_the_same_draw_in_any_order():
    first = draw(KEY)
    draw(KEY / "other")
    assert draw(KEY) == first


@pytest.mark.parametrize(
    "other",
    [
        Key((1, "input", 3, 7), rank=0),
        Key((0, "weight", 3, 7), rank=0),
        Key((0, "input", 7, 3), rank=0),
        Key((0, "input", 3, 7), rank=1),
        KEY.everywhere,
        KEY / "x",
    ],
    ids=repr,
)
def test_another_key_gives_another_draw(other):
    assert draw(other) != draw(KEY)


def test_everywhere_forgets_rank_and_positions():
    assert KEY.everywhere == Key((0, "input", 3, 7)) == Key((0, "input", 3, 7), positions=range(4)).everywhere


def test_a_known_key_has_a_known_seed():
    # a change here would change the noise of every run that is resumed with a newer version
    assert KEY.generator("cpu").initial_seed() == 3100286260731048246
    assert (KEY.everywhere / "x").generator("cpu").initial_seed() == 3451421124859160946


@pytest.mark.parametrize("number", [np.int64, torch.tensor, np.array])
def test_a_coordinate_of_another_package_is_that_of_python(number):
    own = Key((number(0), "input", number(3), number(7)), rank=number(0))
    assert draw(own) == draw(KEY)
    assert draw(KEY / np.str_("x")) == draw(KEY / "x")
    with pytest.raises(TypeError, match="integer"):
        draw(KEY / 0.5)  # type: ignore[operator]


def test_positions_of_numpy_are_those_of_python():
    x, positions = torch.zeros(5, 4), [0, 3, 4, 400, 5]
    ours: list[Any] = [positions, np.array(positions)]
    expected, found = (Key((0,), positions=each).apply(noise.Gaussian(), x, 1.0) for each in ours)
    assert torch.equal(found, expected)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(torch.get_default_device())


def held_out(member: noise.Noise, x: torch.Tensor, level: float | torch.Tensor, positions, mask=None) -> torch.Tensor:
    rows = torch.tensor(list(positions))
    level = level[rows] if isinstance(level, torch.Tensor) else level
    return Key((0, "probe"), positions=positions).apply(member, x[rows], level, None if mask is None else mask[rows])


# weights are not held out, and the draws of AnalogWeights take long
OF_ROWS = [each for each in NOISES if not each.mixes_samples and not isinstance(each, noise.AnalogWeights)]
SHAPES = {"256 rows": (300, 2, 3, 4), "64 rows": (150, 8, 20), "8 rows": (20, 3, 64, 64), "a row": (5, 3, 150, 150)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("member", OF_ROWS, ids=repr)
def test_a_row_depends_on_its_position_alone(member, shape):
    x, generator = rand(*shape), torch.Generator("cpu").manual_seed(1)
    n, level = len(x), torch.linspace(0.1, 0.5, len(x))
    whole = held_out(member, x, level, range(n))
    for size in (1, 7) if n < 50 else (64, n - 1):  # batches
        parts = [held_out(member, x, level, range(i, min(i + size, n))) for i in range(0, n, size)]
        assert torch.equal(torch.cat(parts), whole)
    for rank in range(2):  # processes take turns
        assert torch.equal(held_out(member, x, level, range(rank, n, 2)), whole[rank::2])
    for order in (torch.randperm(n, generator=generator, device="cpu"), torch.tensor([3, 3, 4, 1, 2, 2])):
        assert torch.equal(held_out(member, x, level, order.tolist()), whole[order.to(whole.device)])
    assert torch.equal(held_out(member, x, 0.25, range(2, 5)), held_out(member, x, torch.full((n,), 0.25), range(2, 5)))


def test_rows_of_a_block_are_unrelated_and_blocks_differ():
    y = Key((0,), positions=range(1000)).apply(noise.Gaussian(), torch.zeros(1000, 20), 1.0)
    assert len(y.unique()) > 19_900, "a float32 repeats now and then"
    other = Key((0,), positions=range(128, 1128)).apply(noise.Gaussian(), torch.zeros(1000, 20), 1.0)
    assert torch.equal(other[:-128], y[128:])


class Count(noise.Gaussian):
    calls = 0

    def perturb(self, x, level, generator, mask):
        type(self).calls += 1
        return super().perturb(x, level, generator, mask)


class Dependent(Count):
    independent_rows = False
    calls = 0


def calls_for(kind: type[Count], x: torch.Tensor) -> int:
    kind.calls = 0
    Key((0,), positions=range(len(x))).apply(kind(), x, 1.0)
    return kind.calls


def test_rows_of_a_table_are_drawn_many_at_a_time_if_they_are_independent():
    assert calls_for(Count, torch.zeros(500, 20)) == 2  # of 256 rows, which are the most
    assert calls_for(Count, torch.zeros(500, 50)) == 4  # of 128 rows, because 163 hold 8192 numbers
    assert calls_for(Dependent, torch.zeros(500, 20)) == 500


@pytest.mark.cpu
def test_an_image_is_drawn_with_as_many_others_as_hold_131072_numbers():
    assert calls_for(Count, torch.zeros(128, 1, 28, 28)) == 2  # of 64 images, which are the most
    assert calls_for(Count, torch.zeros(40, 3, 64, 64)) == 5  # of 8 images of 12288 numbers, the next power of two below 131072


@pytest.mark.parametrize("member", OF_ROWS, ids=repr)
def test_a_row_does_not_depend_on_what_is_valid_in_other_rows(member):
    x, mask = rand(2, 40, 2, 6, 6).unbind()
    mask = mask < 0.7
    x[:, 0, 1], mask[3], mask[5] = math.nan, False, True
    whole = held_out(member, x, 0.5, range(40), mask)
    torch.testing.assert_close(whole[~mask], x[~mask], rtol=0, atol=0, equal_nan=True)
    for positions in (range(7, 30, 2), range(3, 6), [39, 5, 3]):
        part = held_out(member, x, 0.5, positions, mask)
        torch.testing.assert_close(part, whole[list(positions)], rtol=0, atol=0, equal_nan=True)


def test_a_key_without_positions_passes_the_mask_on():
    x, mask = torch.rand(5, 20), rand(5, 20) < 0.5
    assert torch.equal(KEY.apply(noise.Gaussian(), x, 0.5, mask) == x, ~mask)


def test_rows_without_positions_differ_and_an_empty_batch_stays_empty():
    x = torch.zeros(3, 4)
    y = Key((0,), positions=range(3)).apply(noise.Gaussian(), x, 1.0)
    assert len(y.unique(dim=0)) == 3
    assert Key((0,), positions=range(0)).apply(noise.Gaussian(), x[:0], 1.0).shape == (0, 4)


@pytest.mark.parametrize("positions", [range(3), range(0, 6, 2), [0, 3, 4]], ids=repr)
def test_a_batch_is_contiguous_whatever_its_places_in_a_block(positions):
    assert Key((0,), positions=positions).apply(noise.Gaussian(), torch.zeros(3, 4), 1.0).is_contiguous()


def test_the_global_streams_are_not_touched():
    before = global_streams()
    KEY.apply(noise.Gaussian(), torch.zeros(3, 4), 1.0)
    Key((0,), positions=range(3)).apply(noise.Gaussian(), torch.zeros(3, 4), 1.0)
    assert global_streams() == before


def test_uniform_numbers_of_an_index_are_uniform_and_unrelated():
    n = 100_000
    key = Key((0, "flips"))
    u = key.uniform(torch.arange(n), (n,)).double()
    assert ((u >= 0) & (u < 1)).all()
    # a hundred bins of a thousand each: the sum of squares has 99 degrees of freedom, and a deviation of sqrt(198)
    counts = torch.bincount((100 * u).long(), minlength=100)
    assert abs((((counts - n / 100).square() / (n / 100)).sum() - 99).item()) <= 5 * math.sqrt(198)
    others = [u.roll(1), (key / "other").uniform(torch.arange(n), (n,)), key.uniform(torch.arange(n), (n, 2))[:, 1]]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([u, other.double()]))[0, 1].item()) <= 5 / math.sqrt(n)  # five standard errors


def test_uniform_numbers_do_not_depend_on_the_batch_and_take_any_index():
    key, index = Key((0, "flips")), torch.tensor([7, -3, 2**62, 0])
    whole = key.uniform(index, (4, 3))
    assert torch.equal(key.uniform(index[2:], (2, 3)), whole[2:])
    assert torch.equal(key.uniform(index.int()[:2], (2, 3)), whole[:2])
    assert len(whole.unique()) == 12
