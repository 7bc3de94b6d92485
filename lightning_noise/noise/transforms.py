"""Random transforms of other packages as noises."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_noise._checks import check_flags, check_level, is_callable_with, is_number, outline
from lightning_noise._usage import write_call
from lightning_noise.batch import describe
from lightning_noise.noise.base import Noise, check_axes
from lightning_noise.rng import seed_torch

__all__ = ["Transform"]


@dataclass(frozen=True, repr=False)
class Transform(Noise):
    r"""Applies a random transform of another package to each sample, such as a blur, a codec or the weather.

    ``function(sample, level)`` returns the transformed sample. The sample is a tensor without the batch dimension, and the
    level is a number above 0, whose meaning is that of the function. The function may draw from the global random streams of
    torch, NumPy and Python. They are seeded from the generator for each sample. Afterwards they continue as if nothing had
    been drawn, also after an exception. A transform with a generator of its own, as in albumentations 2, must be seeded within
    the function: ``torch.randint(2**31, ()).item()`` is a seed that is keyed. The first batch calls the function once more, and
    raises a ValueError if the two results of a seed differ.

    The function sees 0 at invalid elements, which keep their values. The samples are transformed one after the other, and a GPU
    is synchronized once, so a transform of a large batch takes longer than another noise.

    Args:
        function: A function of sample and level. Its random numbers should not depend on the level.
        levels: The levels at which a monitor evaluates.
        pixels: Whether the function takes and returns a NumPy array of shape (H, W, C) and dtype uint8, for images of shape
            (B, C, H, W) with values in [0, 1]. Values outside are clipped, and all become multiples of 1/255.

    Example:
        >>> def brighten(sample, level):
        ...     return sample + level * torch.rand(())
        >>> noise = Transform(brighten, levels=[0.1, 0.2])
        >>> y = noise(torch.zeros(2, 3), 0.5, generator=torch.Generator().manual_seed(0))
        >>> bool((y[0] == y[0, 0]).all()), bool(y[0, 0] == y[1, 0])  # a draw for each sample
        (True, False)
    """

    function: Callable[..., Any]
    levels: Sequence[float] = ()
    pixels: bool = False

    unit: ClassVar[str] = "level of the transform"
    is_known: ClassVar[bool] = False

    def __post_init__(self):
        if isinstance(self.levels, str) or not isinstance(self.levels, Iterable) or getattr(self.levels, "ndim", 1) == 0:
            example = float(self.levels) if is_number(self.levels) else 0.1  # type: ignore[arg-type]
            raise TypeError(f"levels must be a list of numbers, got {self.levels!r}; type levels=[{example}]")
        check_flags(pixels=self.pixels)
        object.__setattr__(self, "levels", tuple(map(check_level, self.levels)))
        if isinstance(self.function, type) or not is_callable_with(self.function, None, 0.0):
            advice = write_call(Transform, {"levels": list(self.levels)} if self.levels else {})
            raise TypeError(f"function must be a function of sample and level, got {outline(self.function)}; type {advice}")

    def __repr__(self) -> str:  # without the address of the function, by which the reports of two runs would differ
        function = getattr(self.function, "__qualname__", repr(self.function))
        return f"Transform({function}, levels={self.levels}{', pixels=True' if self.pixels else ''})"

    @property
    def severities(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(self.levels)

    @property
    def cuts_gradient(self) -> bool:  # type: ignore[override]
        return self.pixels

    @property
    def title(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, 3 if self.pixels else 0)
        seeds = torch.randint(2**32, (len(x),), generator=generator, device=x.device).tolist()
        levels = level.flatten().tolist() if isinstance(level, Tensor) else [level] * len(x)
        source = x if mask is None else x.where(mask, 0.0)
        given = list(zip(source, levels, seeds, strict=True))
        with _restored_streams(x.device):
            found = [self._transform(*each) for each in given]
            self._check_is_keyed(given, found)
        return torch.stack(found)

    def _check_is_keyed(self, given: Sequence[tuple[Tensor, float, int]], found: list[Tensor]) -> None:
        """Raises a ValueError if the first transform of this noise cannot be repeated."""
        i = next((i for i, (_, level, _) in enumerate(given) if level), None)
        if i is None or "_is_keyed" in vars(self):
            return
        with torch.no_grad():
            again, scale = self._transform(*given[i]), given[i][0].abs().max().item()
        if not torch.allclose(again, found[i], rtol=1e-3, atol=1e-3 * scale, equal_nan=True):  # a GPU may round differently
            raise ValueError(
                f"{self.title} must draw from the global random streams, but two calls from one seed differ; seed its own "
                "generator in the function: transform.set_random_seed(torch.randint(2**31, ()).item()) in albumentations, "
                "np.random.default_rng(torch.randint(2**31, ()).item()) in NumPy"
            )
        vars(self)["_is_keyed"] = True  # no state: it saves the next check alone

    def _transform(self, sample: Tensor, level: float, seed: int) -> Tensor:
        if level == 0:
            return sample
        _seed_streams(seed, sample.device)
        # a copy, because the function may write to the sample
        found = self._apply_to_pixels(sample, level) if self.pixels else self.function(sample.clone(), level)
        if not isinstance(found, Tensor) or found.shape != sample.shape:
            raise ValueError(
                f"{self.title} must return a tensor of the shape of its sample, {describe(sample)}, got "
                f"{describe(found)}; for a function of arrays of shape (H, W, C), "
                "type pixels=True; for a function that returns a batch of one, let it return the first element"
            )
        if not found.is_floating_point():
            raise ValueError(
                f"{self.title} must return floats like those of its sample, got {describe(found)}; for pixels up to 255, "
                "let it return found / 255"
            )
        return found.to(sample)

    def _apply_to_pixels(self, sample: Tensor, level: float) -> Tensor:
        pixels = sample.clamp(0, 1).mul(255).round().byte().movedim(0, -1).cpu().contiguous().numpy()
        found = np.array(self.function(pixels, level))
        if found.dtype != np.uint8:
            raise ValueError(
                f"{self.title} must return an array of dtype uint8, got {found.dtype}; for values in [0, 1], let it return "
                "(255 * found).round().astype(np.uint8)"
            )
        image = torch.from_numpy(found).float() / 255
        return (image if image.ndim == sample.ndim else image[..., None]).movedim(-1, 0)  # OpenCV drops a single channel


@contextmanager
def _restored_streams(device: torch.device) -> Iterator[None]:
    """Restores the global random streams of torch, NumPy and Python."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _seed_streams(seed: int, device: torch.device) -> None:
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed, device)
