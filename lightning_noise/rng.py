"""Randomness from coordinates: the same key gives the same draw, whenever and wherever it is asked for.

A generator that is carried along has to be saved, restored and kept in step on all processes. A key has no state: its seed is
a hash of where in the run it is used. So a resumed run draws what the uninterrupted one did, a closure that is evaluated
again gets its noise again, and the global streams are never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Key"]

Coordinate = int | str


@dataclass(frozen=True)
class Key:
    """The coordinates of a draw.

    A key is one draw for all rows of a tensor, or, with ``positions``, one draw for each row. Then the noise of a row depends
    on its place in the data set alone, and not on the batch size or the number of processes.

    Args:
        coordinates: What the draw depends on, such as seed, name, epoch and batch index.
        rank: The process that draws; ``None`` where all processes must agree.
        positions: The place in the data set of each row.

    Example:
        >>> key = Key((0, "input")) / "image"
        >>> one, two = key.generator("cpu"), key.generator("cpu")
        >>> bool((torch.rand(3, generator=one) == torch.rand(3, generator=two)).all())
        True
    """

    coordinates: tuple[Coordinate, ...]
    rank: int | None = None
    positions: range | None = None

    def __truediv__(self, coordinate: Coordinate) -> Key:
        """Returns the key of a part: ``key / "image"`` and ``key / "mask"`` are independent."""
        return replace(self, coordinates=(*self.coordinates, coordinate))

    @property
    def everywhere(self) -> Key:
        """The key without rank and positions, for what all samples and processes share."""
        return Key(self.coordinates)

    def generator(self, device: torch.device | str) -> torch.Generator:
        """Returns a new generator on the device, seeded by the coordinates and the rank."""
        return torch.Generator(device).manual_seed(_seed(*self.coordinates, "rank", self.rank))

    def uniform(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns uniform numbers in [0, 1) of a shape (B, *) that depend on the key and on the index of each row alone.

        Args:
            index: An integer for each row, of shape (B,), such as the place of a sample in the data set.
            shape: The shape of the result.

        Example:
            >>> u = Key((0, "flips")).uniform(torch.tensor([5, 7, 5]), (3, 2))
            >>> bool((u[0] == u[2]).all()), bool((u[0] == u[1]).any())
            (True, False)
        """
        row = _mixed(index.long() + _seed(*self.coordinates, "rank", self.rank))
        within = torch.arange(math.prod(shape[1:]), device=index.device)
        bits = _mixed(row[:, None] + within)
        return ((bits >> 40) & 0xFFFFFF).float().mul_(2**-24).view(shape)  # as many bits as a float32 in [0.5, 1) has

    def apply(self, noise: Callable[..., Tensor], x: Tensor, level: float | Tensor) -> Tensor:
        """Returns ``noise(x, level, generator=...)``, drawn for the whole tensor or, with positions, row by row."""
        if self.positions is None:
            return noise(x, level, generator=self.generator(x.device))
        if len(self.positions) != len(x):
            raise ValueError(
                f"there are positions for {len(self.positions)} rows, but the tensor has {len(x)}: "
                "the inputs of a held-out batch must have as many rows as each other"
            )
        generator = torch.Generator(x.device)
        if len(x) == 0:
            return x
        levels = level.split(1) if isinstance(level, Tensor) else [level] * len(x)
        rows = [
            noise(row, amount, generator=generator.manual_seed(_seed(*self.coordinates, "position", position)))
            for row, amount, position in zip(x.split(1), levels, self.positions, strict=True)
        ]
        return torch.cat(rows)


def _mixed(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al., 2014): neighbouring integers become unrelated ones."""
    z = z * -7046029254386353131  # an odd number near 2^64 divided by the golden ratio; int64 wraps around
    z = (z ^ _shifted(z, 30)) * -4658895280553007687
    z = (z ^ _shifted(z, 27)) * -7723592293110705685
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # the sign is a bit like the others


def _seed(*coordinates: Coordinate | None) -> int:
    # a cryptographic hash, because neighbouring seeds must give unrelated streams; 63 bits, because torch takes an int64
    return int.from_bytes(hashlib.blake2b(repr(coordinates).encode(), digest_size=8).digest(), "little") >> 1
