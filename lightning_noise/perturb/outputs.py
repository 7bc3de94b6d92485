"""Noise in the outputs of modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_noise._tensor import as_type_of
from lightning_noise.batch import Path, describe, format_path, get, leaves, modify
from lightning_noise.loop.internals import is_batched
from lightning_noise.noise import Noise
from lightning_noise.perturb.inputs import apply_noise, describe_layout
from lightning_noise.rng import Key

__all__ = ["check_output", "find_activations", "perturb_output"]


def perturb_output(
    output: Any,
    noise: Noise,
    level: float,
    key: Key,
    *,
    module: str = "",
    relative: Literal["std"] | None = None,
) -> Any:
    """Returns the output of a module with noise in its tensors.

    Each floating-point tensor with an axis, in tuples, lists, mappings and dataclasses, gets its own draw. Other objects, such
    as a distribution, a cache or a finished loss, stay the same objects. A tensor that occurs twice stays one tensor. The
    output and its tensors do not change. The gradient flows through the noise, and through the deviation of a relative level.

    Args:
        output: The output of the module.
        noise: The noise.
        level: The level.
        key: The key of the draws.
        module: The name of the module in messages.
        relative: ``"std"`` gives the level in units of the standard deviation of each row along the first axis.

    Raises:
        TypeError: If the output has no such tensor, or a tensor is not dense.
        ValueError: If the noise cuts the gradient, or a draw for each sample does not fit the first axis.
    """
    paths = find_activations(output, noise)
    if not paths:
        raise TypeError(
            f"noise needs a floating-point tensor with an axis, but {module!r} returned {describe(output)}; "
            "type modules=… to select other modules"
        )
    noisy: dict[int, Tensor] = {}

    def perturb(leaf: Tensor, path: Path) -> Tensor:
        if id(leaf) not in noisy:
            check_output(leaf, key, module, path, needs_samples=relative is not None or not noise.elementwise)
            noisy[id(leaf)] = _noisy_output(leaf, path, noise, level, key, relative)
        return noisy[id(leaf)]

    return modify(output, paths, perturb)


def find_activations(output: Any, noise: Noise) -> list[Path]:
    """Returns the paths of the tensors of an output that can take the noise."""
    return [
        path
        for path, leaf in leaves(output)
        if (leaf.is_floating_point() or (leaf.is_complex() and noise.takes_complex)) and leaf.ndim and _is_plain(output, path)
    ]


def check_output(leaf: Tensor, key: Key, module: str, path: Path = (), *, needs_samples: bool = True) -> None:
    """Raises an error if a tensor of an output cannot take noise.

    An elementwise noise needs no samples along the first axis.
    """
    where = f"{module!r} returned" + (f" in {format_path(path)!r}" if path else "")
    if (kind := describe_layout(leaf)) is not None:
        raise TypeError(f"noise needs a dense tensor, but {where} {kind}; type modules=… to select other modules")
    if needs_samples and is_batched(leaf):
        raise ValueError(
            f"the noise needs the samples along the first axis, but {where} a tensor within torch.vmap, which hides them; "
            "type noise.Gaussian() or another elementwise noise without relative=…"
        )
    if key.positions is not None and len(leaf) != len(key.positions):
        raise ValueError(
            f"the noise needs a row for each of the {len(key.positions)} samples, but {where} {describe(leaf)}; type modules=… "
            "to select a module whose first axis is the batch dimension"
        )


def _noisy_output(leaf: Tensor, path: Path, noise: Noise, level: float, key: Key, relative: Literal["std"] | None) -> Tensor:
    y = apply_noise(Tensor.as_subclass(leaf, Tensor), path, noise, level, key, relative)
    if torch.is_grad_enabled() and leaf.requires_grad and not y.requires_grad:
        raise ValueError(f"{noise.title} cuts the gradient, so earlier layers would not learn; the noise must not detach x")
    return as_type_of(leaf, y)


def _is_plain(output: Any, path: Path) -> bool:
    """Returns whether the path leads only through containers."""
    for key in path:
        if not (isinstance(output, tuple | list | Mapping) or is_dataclass(output)):
            return False
        output = get(output, (key,))
    return True
