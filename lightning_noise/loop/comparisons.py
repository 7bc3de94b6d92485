"""The tensors with which a step compares its predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_noise._tensor import detached
from lightning_noise.loop.internals import is_batched, share_memory, wraps_tensors

__all__ = ["Comparisons"]

_LOSSES = {
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.cross_entropy,
    functional.gaussian_nll_loss,
    functional.huber_loss,
    functional.kl_div,
    functional.l1_loss,
    functional.mse_loss,
    functional.poisson_nll_loss,
    functional.smooth_l1_loss,
}
_DIFFERENCES = {torch.sub, torch.subtract, Tensor.sub, Tensor.subtract}
_DISTANCES = {torch.dist, Tensor.dist}
_SIZES = {
    getattr(place, name)
    for place in (torch, torch.linalg, Tensor)
    for name in ("abs", "absolute", "__pow__", "norm", "pow", "square", "vector_norm")
    if hasattr(place, name)
}
# which tell nothing of the values; Lightning asks each tensor of a batch for its size
_FACTS = {
    Tensor.size,
    Tensor.dim,
    Tensor.__len__,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device")),
}


class Comparisons(TorchFunctionMode):
    """Finds out whether one of some tensors of a batch is the target of a loss.

    It is the target of a loss of torch, or the step takes the size of its difference to another tensor of its shape and uses
    nothing else of the batch that may be a target. A difference that is scaled first may be a layer, as in a normalizing flow.

    Args:
        noisy: The noisy tensors, each with the clean one. A part that the noise has left alone, such as the future of a series,
            may be the target.
        others: The other tensors of the batch.
    """

    def __init__(self, noisy: list[tuple[Tensor, Tensor]], others: list[Tensor]):
        super().__init__()
        self.changes = [(tensor, _changes(detached(tensor), detached(clean))) for tensor, clean in noisy]
        self.others = others
        self._is_target = self._is_measured = self._uses_others = False
        self._difference: Any = None  # the last one, or a view of it

    @property
    def found(self) -> bool:
        return self._is_target or (self._is_measured and not self._uses_others)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        self._uses_others |= func not in _FACTS and any(arg is other for arg in given for other in self.others)
        # at once, because a tensor of vmap is gone after the call
        if func in _LOSSES:
            self._is_target |= self._holds(kwargs["target"] if "target" in kwargs else args[1])
        is_difference = func in _DIFFERENCES and self._compares(given)
        is_of_difference = bool(given) and given[0] is self._difference
        self._is_measured |= func in _DISTANCES and self._compares(given)
        self._is_measured |= is_of_difference and (func in _SIZES or (len(given) == 2 and given[0] is given[1]))
        result = func(*args, **kwargs)
        if is_difference or (is_of_difference and isinstance(result, Tensor) and _are_views(result, given[0])):
            self._difference = result
        return result

    def _compares(self, given: list[Tensor]) -> bool:
        """Returns whether one of two tensors of one shape is noisy, and the other is not."""
        if len(given) != 2 or given[0].shape != given[1].shape:
            return False
        return self._holds(given[0]) != self._holds(given[1])

    def _holds(self, tensor: Tensor) -> bool:
        # noise is in plain tensors only
        return not wraps_tensors(tensor) and any(_is_noisy(tensor, noisy, changes) for noisy, changes in self.changes)


def _changes(noisy: Tensor, clean: Tensor) -> Tensor:
    """Returns which elements are noisy, in the memory format of the noisy tensor. NaN stays NaN."""
    changes = (noisy != clean).logical_and_(clean == clean)
    return torch.empty_like(noisy, dtype=torch.bool).copy_(changes)


def _is_noisy(tensor: Tensor, noisy: Tensor, changes: Tensor) -> bool:
    """Returns whether a tensor is a view of a noisy one that holds noisy elements."""
    if not _are_views(tensor, noisy):
        return False
    part = detached(tensor)
    if part.dtype != noisy.dtype or is_batched(part):  # such as a view of complex numbers as real ones
        return True
    return bool(changes.as_strided(part.shape, part.stride(), part.storage_offset()).any())


def _are_views(one: Tensor, other: Tensor) -> bool:
    return share_memory(detached(one), detached(other))
