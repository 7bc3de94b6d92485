"""Modules for tests of noise in their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import Deterministic, make_trainer
from torch import Tensor, nn

from lightning_noise import Key
from lightning_noise.callbacks.activations import OutputCallback
from lightning_noise.loop.perturbation import Context

KEY = Key((0, "activation", 0, 0), rank=0)


class Layers(Deterministic):
    """Keeps what its second layer gets, and does not call its dropout; at a rate of 0 its weights stay."""

    def __init__(self, lr: float = 0.0):
        super().__init__(lr)
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](x)
        self.hidden.append(hidden)
        return self.net[4](self.net[2](hidden))


def within(
    callback: OutputCallback, module: Any, call: Callable[[], Any], key: Key = KEY, batch: Any = None, level: float = 0.5
):
    """What a call returns while the callback perturbs, outside a fit."""
    with callback.perturbation(Context(make_trainer(), module), batch, level, key):
        return call()


def hooks(module: nn.Module) -> list[Any]:
    return [hook for part in module.modules() for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]


def compiled(part: str, backend: Any) -> tuple[Any, Any]:
    """A module and what is given to the trainer."""
    module = Deterministic(lr=0.1)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # logging from a compiled step crashes in this Lightning
    if part == "layer":
        module.net[1] = torch.compile(module.net[1], backend=backend)  # type: ignore[assignment]
    if part == "submodule":
        module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    if part == "in place":
        module.net.compile(backend=backend)
    return module, torch.compile(module, backend=backend) if part == "module" else module
