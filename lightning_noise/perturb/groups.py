"""Groups of tensors that share a draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_noise.noise import Noise
from lightning_noise.perturb.sharding import local, parameter_key
from lightning_noise.rng import Key

__all__ = ["Group", "groups_of"]

AnyTensor = TypeVar("AnyTensor", bound=Tensor)
_ELEMENTS = 2**22  # of several tensors: the temporary memory of a draw is then small beside a large model


class Group(Generic[AnyTensor]):
    """Tensors of one dtype and device, side by side in a flat tensor and each in the order of its memory.

    One call perturbs all of them. Tensors of one shape are neighbors, and form a stack. A group that is not flat is a single
    tensor in its shape.

    Args:
        tensors: The tensors, by name.
        is_flat: Whether the noise perturbs each element alone, so that shapes have no meaning.
    """

    def __init__(self, tensors: Mapping[str, AnyTensor], is_flat: bool):
        self.name, self.tensors, self.is_flat = next(iter(tensors)), list(tensors.values()), is_flat
        self.index = {tensor: i for i, tensor in enumerate(self.tensors)}
        parts = [local(tensor) for tensor in self.tensors]
        self._runs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for (shape, strides), run in groupby(parts, key=lambda part: (part.shape, part.stride())):
            first, *others = run
            dense = strides if first.is_contiguous() else torch.empty_like(first, device="meta").stride()
            self._runs.append(((1 + len(others), *shape), (shape.numel(), *dense)))

    def key(self, key: Key) -> Key:
        """Returns the key of the draw. That of a single tensor depends on its name alone."""
        return parameter_key(key, self.name, self.tensors[0])

    def empty(self) -> Tensor:
        """Returns a tensor for the elements of the group."""
        first = local(self.tensors[0])
        n = sum(shape[0] * strides[0] for shape, strides in self._runs)
        return first.new_empty(n) if self.is_flat else torch.empty_like(first)

    def stacks(self, flat: Tensor) -> Iterator[Tensor]:
        """Yields views of a flat tensor, one for the tensors of each shape. Its rows are the tensors, of at least one axis."""
        for stack in self._stacks(flat):
            yield stack if stack.ndim > 1 else stack[:, None]

    def split(self, elements: Tensor) -> list[Tensor]:
        """Returns a view of the elements for each tensor."""
        return [part for stack in self._stacks(elements) for part in stack.unbind()] if self.is_flat else [elements]

    def pick(self, values: list[Tensor], tensors: Sequence[AnyTensor]) -> list[Tensor]:
        """Returns the values that belong to some of the tensors."""
        return [values[self.index[tensor]] for tensor in tensors]

    def _stacks(self, flat: Tensor) -> Iterator[Tensor]:
        flat = flat.contiguous()
        begin = flat.storage_offset()
        for shape, strides in self._runs:
            yield flat.as_strided(shape, strides, begin)
            begin += shape[0] * strides[0]


def groups_of(tensors: Mapping[str, AnyTensor], noise: Noise) -> Iterator[Group[AnyTensor]]:
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
