"""Groups of tensors that share a draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noise.noise import Noise
from lightning_noise.perturb.sharding import coordinates_of_shard, local
from lightning_noise.rng import Key

__all__ = ["Group", "are_same", "groups_of"]

_ELEMENTS = 2**22  # of several tensors: the temporary memory of a draw is then small beside a large model


class Group:
    """The layout of tensors of one dtype and device, side by side in a flat tensor and each in the order of its memory.

    One call perturbs all of them. Tensors of one shape are neighbors, and form a stack. A group that is not flat is a single
    tensor in its shape. A group does not keep its tensors.

    Args:
        tensors: The tensors, by name.
        is_flat: Whether the noise perturbs each element alone, so that shapes have no meaning.
    """

    def __init__(self, tensors: Mapping[str, Tensor], is_flat: bool):
        self.names, self.is_flat = list(tensors), is_flat
        self.index = {name: i for i, name in enumerate(self.names)}
        self._coordinates = (self.names[0], *coordinates_of_shard(tensors[self.names[0]]))
        self._runs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for (shape, strides), run in groupby(map(local, tensors.values()), key=lambda part: (part.shape, part.stride())):
            first, *others = run
            dense = strides if first.is_contiguous() else torch.empty_like(first, device="meta").stride()
            self._runs.append(((1 + len(others), *shape), (shape.numel(), *dense)))
        self._n = sum(shape[0] * strides[0] for shape, strides in self._runs)

    def key(self, key: Key) -> Key:
        """Returns the key of the draw. That of a single tensor depends on its name alone."""
        return key.at(*self._coordinates)

    def empty(self, tensor: Tensor) -> Tensor:
        """Returns a tensor for the elements of the group, in the dtype and on the device of one of its tensors."""
        return tensor.new_empty(self._n) if self.is_flat else torch.empty_like(tensor)

    def stacks(self, flat: Tensor) -> Iterator[Tensor]:
        """Yields views of a flat tensor, one for the tensors of each shape. Its rows are the tensors, of at least one axis."""
        for stack in self._stacks(flat):
            yield stack if stack.ndim > 1 else stack[:, None]

    def split(self, elements: Tensor, names: Sequence[str] | None = None) -> list[Tensor]:
        """Returns a view of the elements for each tensor, or for some of the tensors, in their order."""
        parts = [part for stack in self._stacks(elements) for part in stack.unbind()] if self.is_flat else [elements]
        return parts if names is None or len(names) == len(parts) else [parts[self.index[name]] for name in names]

    def _stacks(self, flat: Tensor) -> list[Tensor]:
        flat = flat.contiguous()
        begin, stacks = flat.storage_offset(), []
        for shape, strides in self._runs:
            stacks.append(flat.as_strided(shape, strides, begin))
            begin += shape[0] * strides[0]
        return stacks


def groups_of(tensors: Mapping[str, Tensor], noise: Noise) -> Iterator[Group]:
    """Yields groups of tensors. A group has at most 2^22 elements, unless it is a single tensor."""
    is_flat = noise.elementwise and noise.independent_rows
    kinds: dict[Any, list[str]] = {}
    for name, x in tensors.items():
        is_plain = is_flat and type(x) in (nn.Parameter, Tensor) and not x.is_complex()
        kinds.setdefault((x.dtype, x.device) if is_plain else name, []).append(name)
    for kind, names in kinds.items():
        group, n = {}, 0
        for name in sorted(names, key=lambda name: (tensors[name].numel(), tensors[name].shape)):
            n += tensors[name].numel()
            if group and n > _ELEMENTS:
                yield Group(group, is_flat=True)
                group, n = {}, tensors[name].numel()
            group[name] = tensors[name]
        yield Group(group, is_flat=isinstance(kind, tuple))


def are_same(one: list[Any], two: list[Any]) -> bool:
    """Returns whether two lists hold the same objects."""
    return len(one) == len(two) and all(map(is_, one, two))
