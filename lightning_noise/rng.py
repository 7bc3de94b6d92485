"""Random streams keyed by coordinates, without state.

The seed of a draw is a hash of the place in the run where the draw is used. The same key gives the same draw, whenever and
wherever it is used. A generator with state would have to be saved, restored and synchronized over ranks. With keys, a resumed
run draws what the uninterrupted run draws, a closure that is evaluated again gets the same noise, and global streams are never
touched.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["Key", "seed_torch"]

Coordinate = int | str
# The numbers and the rows of a block at most. More would save little of the cost of calls, and waste more on positions that
# belong to other ranks or to the next batch.
_LIMITS = {"cpu": (2**17, 64), "cuda": (2**24, 256)}
_SMALL_LIMITS = 2**13, 256  # of rows whose call takes longer than their draw


@dataclass(frozen=True)
class Key:
    """The coordinates of a draw.

    A key gives one draw for all rows of a tensor. With ``positions``, it gives a draw for each row, which depends only on the
    position of the row in the data set, not on the batch size or the number of ranks.

    Args:
        coordinates: The values that the draw depends on, such as seed, name, epoch and batch index.
        rank: The rank that draws, or ``None`` if all ranks must draw the same.
        positions: The position of each row in the data set, in any order.

    Example:
        >>> key = Key((0, "input")) / "image"
        >>> one, two = key.generator("cpu"), key.generator("cpu")
        >>> bool((torch.rand(3, generator=one) == torch.rand(3, generator=two)).all())
        True
    """

    coordinates: tuple[Coordinate, ...]
    rank: int | None = None
    positions: Sequence[int] | None = None

    def at(self, *coordinates: Coordinate) -> Key:
        """Returns a key with more coordinates: ``key.at("image")`` or ``key / "image"``, independent of ``key / "mask"``."""
        return Key((*self.coordinates, *coordinates), self.rank, self.positions)

    __truediv__ = at

    @property
    def everywhere(self) -> Key:
        """The key without rank and positions, for a draw that all samples and ranks share."""
        return Key(self.coordinates)

    @property
    def seed(self) -> int:
        """The seed of the draw, which is a hash of coordinates and rank."""
        return _seed(*self.coordinates, "rank", self.rank)

    def generator(self, device: torch.device | str) -> torch.Generator:
        """Returns a new generator on the device, seeded with coordinates and rank."""
        return torch.Generator(device).manual_seed(_seed(*self.coordinates, "rank", self.rank))

    def uniform(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns uniform numbers in [0, 1) of a shape :math:`(B, *)`, whose rows depend only on the key and their index.

        The index has shape (B,). It holds, for example, the position of each sample in the data set.

        Example:
            >>> u = Key((0, "flips")).uniform(torch.tensor([5, 7, 5]), (3, 2))
            >>> bool((u[0] == u[2]).all()), bool((u[0] == u[1]).any())
            (True, False)
        """
        row = _mix(index.long() + self.seed)
        within = torch.arange(math.prod(shape[1:]), device=index.device)
        bits = _mix(row[:, None] + within)
        return ((bits >> 40) & 0xFFFFFF).float().mul_(2**-24).view(shape)  # the 24 bits of a float32 in [0.5, 1)

    def apply(self, noise: Callable[..., Tensor], x: Tensor, level: float | Tensor, mask: Tensor | None = None) -> Tensor:
        """Applies a noise to a tensor of shape :math:`(B, *)` or, with positions, to each row.

        The level is a number, or a tensor of shape (B,). The mask has the shape of ``x``. There must be as many positions as
        rows. A noise whose rows are independent is drawn for many positions at once.
        """
        if self.positions is None:
            return _call(noise, x, level, mask, self.generator(x.device))
        if len(self.positions) != len(x):
            raise ValueError(
                f"a tensor must have a row for each of the {len(self.positions)} positions, got {len(x)} rows; all inputs of a "
                "held-out batch must have the same number of rows"
            )
        if x.numel() == 0:
            return x
        n = _rows_of_block(x) if getattr(noise, "independent_rows", False) else 1
        y, generator = None, torch.Generator(x.device)
        for rows, block, places in _blocks(self.positions, n):
            k = rows.stop - rows.start
            parts: list[Any] = [x, level, mask]
            if k < len(x):
                parts = [part[rows] if isinstance(part, Tensor) else part for part in parts]
            if k < n:
                parts = [_fill(part, n, places) if isinstance(part, Tensor) else part for part in parts]
            own, amount, valid = parts
            seed = _seed(*self.coordinates, "block", n, block)
            drawn = _call(noise, own, amount, valid, generator.manual_seed(seed))
            drawn = drawn if k == n else drawn[places]
            if k == len(x) and places.step == 1:  # every other row of a block is not dense
                return drawn
            y = torch.empty_like(x, dtype=drawn.dtype) if y is None else y
            y[rows] = drawn
        return y  # type: ignore[return-value]


def _call(
    noise: Callable[..., Tensor], x: Tensor, level: float | Tensor, mask: Tensor | None, generator: torch.Generator
) -> Tensor:
    return noise(x, level, generator=generator) if mask is None else noise(x, level, generator=generator, mask=mask)


def _rows_of_block(x: Tensor) -> int:
    """Returns how many rows are drawn at once. Only their size and the device count, so a row always has the same noise."""
    size, limits = math.prod(x.shape[1:]), (_LIMITS.get(x.device.type, _LIMITS["cuda"]), _SMALL_LIMITS)
    n = max(1, *(min(rows, numbers // size) for numbers, rows in limits))
    return 2 ** (n.bit_length() - 1)


def _blocks(positions: Sequence[int], n: int) -> Iterator[tuple[slice, int, slice]]:
    """Yields rows of one block, in order: the rows, the block, and their places in the block.

    Block ``b`` holds the positions from ``b * n`` to ``(b + 1) * n - 1``. Positions that are not a constant step apart begin
    another copy of their block. Those of a rank are: the step is the number of ranks.
    """
    step = max(1, positions[1] - positions[0]) if len(positions) > 1 else 1
    if isinstance(positions, range) and positions.step > 0:  # without a loop over the rows
        first, last = positions[0], positions[-1]
        begins = sorted({-((first - edge) // step) for edge in range(first - first % n + n, last + 1, n)})
    else:
        begins = [i for i, (p, q) in enumerate(pairwise(positions), 1) if q - p != step or p // n != q // n]
    for begin, end in pairwise([0, *begins, len(positions)]):
        block, place = divmod(positions[begin], n)
        yield slice(begin, end), block, slice(place, place + step * (end - begin - 1) + 1, step)


def _fill(rows: Tensor, n: int, places: slice) -> Tensor:
    """Returns rows as a whole block of ``n`` rows; the first one fills the places without a row."""
    block = rows[:1].expand(n, *rows.shape[1:]).clone()
    block[places] = rows
    return block


def _mix(z: Tensor) -> Tensor:
    """Mixes the bits of integers, so that neighbors become unrelated: the finalizer of SplitMix64 (Steele et al., 2014)."""
    z = z * -7046029254386353131  # an odd number near 2^64 divided by the golden ratio; int64 wraps around
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: the sign is a bit like the others


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's global random streams of the CPU and of a device."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices whose streams are not restored
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _seed(*coordinates: Coordinate | None) -> int:
    text = repr(tuple([each if type(each) in _PLAIN else _plain(each) for each in coordinates]))
    # a cryptographic hash, because neighboring seeds must give unrelated streams; 63 bits, because torch takes an int64
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


_PLAIN = {int, str, type(None)}


def _plain(coordinate: Any) -> Coordinate:
    """Returns a coordinate of NumPy or torch, whose ``repr`` differs, as that of Python."""
    return str(coordinate) if isinstance(coordinate, str) else operator.index(coordinate)
