"""Noises within a region of a sample: a square, a box or a span."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_counts
from lightning_noise._tensor import center_span, index_valid, span, validate_dim
from lightning_noise.noise.base import Noise, check_axes
from lightning_noise.noise.elementwise import Gaussian

__all__ = ["Masking", "PatchGaussian"]


@dataclass(frozen=True)
class PatchGaussian(Noise):
    r"""Adds Gaussian noise within a random square of each image.

    .. math:: y = x + \sigma m \epsilon, \quad \epsilon \sim \mathcal{N}(0, I)

    The mask :math:`m` is 1 in a square that all channels share. The center is uniform over the pixels, and the square is cut
    off at the edges. A square of even size has its center between pixels, so it reaches all edges alike. Along an axis of
    :math:`n` pixels, a square of size :math:`s \leq n` covers a share of :math:`s / n - \lfloor s^2 / 4 \rfloor / n^2` on
    average. Images are the last two axes. With a mask, only rows and columns with valid pixels count.

    The paper reports the clean accuracy of cutout with the robustness of Gaussian noise. The level is the standard deviation
    :math:`\sigma \geq 0` in the units of the data, with the severities of :class:`Gaussian`.

    Args:
        size: The side of the square in pixels. The paper uses 25 on the 32 pixels of CIFAR-10 and up to 250 on the 224 pixels
            of ImageNet, so the square covers much of the image.

    References:
        Improving Robustness Without Sacrificing Accuracy with Patch Gaussian Augmentation (Lopes et al., 2019),
        https://arxiv.org/abs/1906.02611

    Example:
        >>> y = PatchGaussian(size=3)(torch.zeros(1, 1, 9, 9), 0.5, generator=torch.Generator().manual_seed(0))
        >>> int((y != 0).sum())
        9
    """

    size: int

    severities: ClassVar[tuple[float, ...]] = Gaussian.severities
    unit: ClassVar[str] = "standard deviation in the patch"
    dim: ClassVar[tuple[int, ...]] = (-2, -1)
    independent_rows: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def __post_init__(self):
        check_counts(size=self.size)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, 2)
        real = x.dtype.to_real()
        centers = torch.empty(2, len(x), dtype=real, device=x.device).uniform_(generator=generator)
        height, width = (min(self.size, n) for n in x.shape[-2:])
        z = x.new_empty(*x.shape[:-2], height, width).normal_(generator=generator).mul_(level)
        # tiles of the square over the image: wherever the square lies, it holds each draw at most once
        repeats = (math.ceil(n / m) for n, m in zip(x.shape[-2:], (height, width), strict=True))
        z = z.repeat(*[1] * (x.ndim - 2), *repeats)[..., : x.shape[-2], : x.shape[-1]]
        square = torch.ones((), dtype=real, device=x.device)
        for dim, u in zip(self.dim, centers, strict=True):
            n, index = index_valid(mask, x, dim)
            square = square * span(center_span(u, self.size, n), self.size, x, dim, index).to(real)
        return torch.addcmul(x, z, square.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Masking(Noise):
    r"""Masks a random box of each sample: cutout, random erasing, SpecAugment.

    .. math:: y = \begin{cases} v & \text{in a box with } p^{1/k} \text{ of the length of each of } k \text{ axes} \\
        x & \text{else} \end{cases}

    The level is the share :math:`p \in [0, 1]` of the sample that is masked. Lengths are rounded up or down at random, so that
    the mean of the masked share is exactly :math:`p`. The box lies within the sample. The severities span the range of random
    erasing.

    With a mask, lengths and places count the positions of each axis that hold a valid element. So the mean share of the valid
    part is exactly :math:`p` if this part is a span or a box. For a part of any other shape, the box covers :math:`p` of the
    smallest grid of positions that holds the part.

    Args:
        dim: The axes of the box, counted from the end. Along all other axes the box spans the sample. ``(-2, -1)`` is a box of
            an image, ``(-1,)`` a span of a series or of the time of a spectrogram, ``(-2,)`` a band of frequencies.
        value: The value in the box, :math:`v`. The default 0 is the mean of normalized data.

    References:
        Improved Regularization of Convolutional Neural Networks with Cutout (DeVries and Taylor, 2017),
        https://arxiv.org/abs/1708.04552

        Random Erasing Data Augmentation (Zhong et al., 2017), https://arxiv.org/abs/1708.04896

        SpecAugment (Park et al., 2019), https://arxiv.org/abs/1904.08779

    Example:
        >>> Masking(dim=(-1,))(torch.ones(1, 2, 8), 0.5, generator=torch.Generator().manual_seed(0)).mean(-1)
        tensor([[0.5000, 0.5000]])
    """

    dim: Any = (-2, -1)  # int | Sequence[int]
    value: float = 0.0

    severities: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.33)
    unit: ClassVar[str] = "share masked"
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    takes_complex: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "dim", validate_dim(self.dim))  # a tuple is hashable and not the caller's list

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        check_axes(self, x, -min(self.dim))
        real = x.dtype.to_real()
        level = level if isinstance(level, Tensor) else torch.full((), level, dtype=real, device=x.device)
        share = level.flatten() ** (1 / len(self.dim))
        u = torch.empty(len(self.dim), 2, len(x), dtype=real, device=x.device).uniform_(generator=generator)
        box = torch.ones((), dtype=torch.bool, device=x.device)
        for dim, (rounding, place) in zip(self.dim, u, strict=True):
            n, index = index_valid(mask, x, dim)
            length = (share * n + rounding).floor_()
            box = box & span((place * (n + 1 - length)).floor_(), length, x, dim, index)
        return torch.where(box, self.value, x)
