"""Outputs of modules with noise in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_noise._tensor import as_type_of
from lightning_noise.batch import Path, describe, format_path, get, leaves, modify
from lightning_noise.noise import Noise
from lightning_noise.perturb.inputs import apply_noise
from lightning_noise.rng import Key

__all__ = ["check_output", "perturb_output"]


def perturb_output(
    output: Any,
    noise: Noise,
    level: float,
    key: Key,
    *,
    module: str = "",
    relative: Literal["std"] | None = None,
) -> Any:
    """Returns what a module returned with noise in each of its floating-point tensors, each with a draw of its own.

    These are the tensors that are reached through tuples, lists, mappings and dataclasses and have a first axis. All else, such
    as a distribution, a cache or a finished loss, is the same object. A tensor that occurs twice is one tensor afterwards, too.
    The output itself and its tensors stay as they are. The gradient is that of the noisy output, also of the standard deviation
    that a relative level is in units of.

    Args:
        output: What the module returned.
        noise: The noise.
        level: The amount.
        key: The key of the draws.
        module: The name of the module, for messages.
        relative: The level is in units of the standard deviation of each row of the first axis.

    Raises:
        TypeError: There is no such tensor, or one is not dense.
        ValueError: The noise cuts the gradient, or with a draw for each sample the first axis is not that of the samples.
    """
    paths = [path for path, leaf in leaves(output) if leaf.is_floating_point() and leaf.ndim and _is_plain(output, path)]
    if not paths:
        raise TypeError(
            f"noise needs a floating-point tensor with an axis, but {module!r} returned {describe(output)}; "
            "select other modules"
        )
    noisy: dict[int, Tensor] = {}

    def perturb(leaf: Tensor, path: Path) -> Tensor:
        if id(leaf) not in noisy:
            check_output(leaf, key, module, path)
            noisy[id(leaf)] = _noisy_output(leaf, path, noise, level, key, relative)
        return noisy[id(leaf)]

    return modify(output, paths, perturb)


def check_output(leaf: Tensor, key: Key, module: str, path: Path = ()) -> None:
    """Raises an error where a tensor that a module returned cannot take noise, with the way out."""
    where = f"{module!r} returned" + (f" in {format_path(path)!r}" if path else "")
    if leaf.layout != torch.strided or leaf.is_nested:
        kind = "a nested tensor" if leaf.is_nested else f"a tensor of {leaf.layout}"
        raise TypeError(f"noise needs a dense tensor, but {where} {kind}; select other modules")
    if key.positions is not None and len(leaf) != len(key.positions):
        raise ValueError(
            f"each of the {len(key.positions)} samples has a draw of its own, but {where} {describe(leaf)}; "
            "select a module whose first axis is that of the samples"
        )


def _noisy_output(leaf: Tensor, path: Path, noise: Noise, level: float, key: Key, relative: Literal["std"] | None) -> Tensor:
    y = apply_noise(leaf.as_subclass(Tensor), path, noise, level, key, relative)
    if torch.is_grad_enabled() and leaf.requires_grad and not y.requires_grad:
        raise ValueError(f"{noise.title} cuts the gradient, so that what comes before would not learn: it must not detach x")
    return as_type_of(leaf, y)


def _is_plain(output: Any, path: Path) -> bool:
    """Whether the path leads through containers alone, and not into an object that makes something of its tensors."""
    return all(
        isinstance(part, tuple | list | Mapping) or is_dataclass(part)
        for part in (get(output, path[:i]) for i in range(len(path)))
    )
