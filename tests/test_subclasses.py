"""Copies of tensor subclasses keep class and attributes, and call nothing that a subclass may override."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_noise import Key, noise
from lightning_noise.loop.snapshot import copy_batch
from lightning_noise.perturb.inputs import perturb_batch


class Overriding(Tensor):
    """Its methods read an attribute that the results of operations lack."""

    labels: Any

    def requires_grad_(self, mode: bool = True) -> Any:
        result: Any = super().requires_grad_(mode)
        result.labels = self.labels
        return result

    def detach(self) -> Any:
        result: Any = super().detach()
        result.labels = self.labels
        return result

    def clone(self, *args: Any, **options: Any) -> Any:
        return type(self)(super().clone(), self.labels)


class Propagating(Tensor):
    """Each operation hands on the attribute of its first argument."""

    labels: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Propagating):
            result.labels = args[0].labels
        return result


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("labelled", [False, True], ids=["without the attribute", "with the attribute"])
@pytest.mark.parametrize("kind", [Overriding, Propagating])
@pytest.mark.parametrize(
    "copied",
    [copy_batch, lambda x: perturb_batch(x, [()], noise.Gaussian(), 0.5, Key((0,)), probability=0.5, clip=(0.0, 1.0))],
    ids=["copy", "noise"],
)
def test_a_copy_of_a_subclass_is_of_its_class_and_has_what_it_has(copied, kind, labelled, requires_grad):
    x: Any = torch.rand(6, 2).as_subclass(kind)
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.requires_grad_(x, requires_grad)
    if labelled:
        x.labels = ["a", "b"]
    y = copied(x)
    assert type(y) is kind
    assert vars(y) == vars(x)
    with torch._C.DisableTorchFunctionSubclass():
        assert (y.requires_grad, y.is_leaf) == (requires_grad, True)
        assert y.data_ptr() != x.data_ptr()
