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
from lightning_noise.loop.internals import share_memory

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


class Comparisons(TorchFunctionMode):
    """Notes in ``found`` whether one of some tensors is the target of a loss of torch."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.tensors = tensors
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:  # at once, because a tensor of vmap is gone after the call
            target = detached(kwargs["target"] if "target" in kwargs else args[1])
            self.found |= any(share_memory(target, detached(tensor)) for tensor in self.tensors)
        return func(*args, **kwargs)


@contextmanager
def watch_comparisons(tensors: list[Tensor]) -> Iterator[Comparisons]:
    """Watches a step for losses with one of some tensors as the target. Compiled modules run eagerly meanwhile."""
    # a mode would become part of compiled code
    with torch.compiler.set_stance("force_eager"), Comparisons(tensors) as comparisons:
        yield comparisons
