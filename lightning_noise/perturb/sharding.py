"""Parameters that are sharded over ranks, as DTensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:  # a build of torch without torch.distributed
    DTensor = FSDPModule = type("Absent", (), {})

__all__ = [
    "check_rows_are_whole",
    "coordinates_of_shard",
    "gathering",
    "gradient_of",
    "is_sharded",
    "local",
    "reshard",
    "whole",
    "with_local",
]


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether this rank may hold only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor gathered from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: Tensor, part: Tensor) -> Tensor:
    """Returns a tensor like ``tensor`` whose part on this rank is ``part``."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Returns the gradient, sharded like its parameter.

    The gradient may still be a partial sum on each rank. Noise in each partial sum would add up.
    """
    gradient = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)
    return parameter.grad


def coordinates_of_shard(tensor: Tensor) -> list[int]:
    """Returns what distinguishes the part of this rank from the other parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return []
    places = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    return [coordinate for coordinate, placement in places if placement.is_shard()]


def check_rows_are_whole(parameter: Tensor, name: str) -> None:
    """Raises a ValueError if a row is spread over ranks."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    if any(placement.is_shard() and not placement.is_shard(0) for placement in placements):
        raise ValueError(f"relative='filter' needs whole filters, but {name!r} is sharded as {placements}; type relative='std'")


def gathering(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the modules that gather sharded parameters."""
    return [module for module in modules if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[nn.Module]) -> None:
    """Frees the copies of sharded parameters that modules have gathered.

    After an evaluation, a module still holds these copies as its parameters. They do not follow changes of the shards.
    """
    for module in modules:
        module.reshard()  # type: ignore[operator]
