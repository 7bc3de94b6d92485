"""The tensors with which a step compares its predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_noise._tensor import detached
from lightning_noise.loop.internals import share_memory, wraps_tensors

__all__ = ["Comparisons", "watch_comparisons"]

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
_DIFFERENCES = {torch.sub, torch.subtract, torch.dist, Tensor.sub, Tensor.subtract, Tensor.dist}


class Comparisons(TorchFunctionMode):
    """Finds out whether one of some tensors of a batch is the target of a loss.

    It is the target of a loss of torch, or the step subtracts it from another tensor of its shape and uses nothing else of the
    batch that may be a target.
    """

    def __init__(self, tensors: list[Tensor], others: list[Tensor]):
        super().__init__()
        self.tensors, self.others = tensors, others
        self._is_target = self._is_subtracted = self._uses_others = False

    @property
    def found(self) -> bool:
        return self._is_target or (self._is_subtracted and not self._uses_others)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        # at once, because a tensor of vmap is gone after the call
        if func in _LOSSES:
            self._is_target |= self._holds(kwargs["target"] if "target" in kwargs else args[1])
        elif func in _DIFFERENCES and len(given) == 2 and given[0].shape == given[1].shape:
            self._is_subtracted |= self._holds(given[0]) != self._holds(given[1])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor | list | tuple) and not isinstance(result, torch.Size):  # Lightning looks at all sizes
            self._uses_others |= any(arg is other for arg in given for other in self.others)
        return result

    def _holds(self, tensor: Tensor) -> bool:
        if wraps_tensors(tensor):  # noise is in plain tensors only
            return False
        return any(share_memory(detached(tensor), detached(each)) for each in self.tensors)


@contextmanager
def watch_comparisons(tensors: list[Tensor], others: list[Tensor]) -> Iterator[Comparisons]:
    """Watches a step for losses with one of some tensors of the batch as the target. Compiled modules run eagerly meanwhile."""
    # a mode would become part of compiled code
    with torch.compiler.set_stance("force_eager"), Comparisons(tensors, others) as comparisons:
        yield comparisons
