"""A key is a pure function of its coordinates."""

from __future__ import annotations

import math

import pytest
import torch

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


@pytest.mark.parametrize("level", [0.5, torch.linspace(0.1, 1, 12)], ids=["number", "tensor"])
@pytest.mark.parametrize("member", [noise.Gaussian(), noise.Uniform(), noise.Speckle(), noise.Impulse()], ids=repr)
def test_a_row_depends_on_its_position_alone(member, level):
    x = torch.rand(12, 2, 5, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    whole = Key((0, "probe"), positions=range(12)).apply(member, x, level)
    for size in (1, 5, 7):
        parts = [
            Key((0, "probe"), positions=range(i, i + len(part))).apply(
                member, part, level[i : i + size] if isinstance(level, torch.Tensor) else level
            )
            for i, part in zip(range(0, 12, size), x.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    for rank in range(2):  # two processes take turns
        mine = slice(rank, None, 2)
        part = Key((0, "probe"), positions=range(rank, 12, 2)).apply(
            member, x[mine], level[mine] if isinstance(level, torch.Tensor) else level
        )
        assert torch.equal(part, whole[mine])


def test_rows_without_positions_differ_and_an_empty_batch_stays_empty():
    x = torch.zeros(3, 4)
    y = Key((0,), positions=range(3)).apply(noise.Gaussian(), x, 1.0)
    assert len(y.unique(dim=0)) == 3
    assert Key((0,), positions=range(0)).apply(noise.Gaussian(), x[:0], 1.0).shape == (0, 4)


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
