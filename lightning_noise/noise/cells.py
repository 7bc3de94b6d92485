"""Noises that drop or swap elements: of tables and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_noise._checks import check_flags
from lightning_noise._tensor import column, is_fast_as_bits
from lightning_noise.noise.base import Noise, find_valid
from lightning_noise.noise.draws import draw_bits, fuse, is_fused, last_bits

__all__ = ["DropConnect", "FeatureDropout", "SwapNoise"]


@dataclass(frozen=True, kw_only=True)
class FeatureDropout(Noise):
    r"""Sets elements to zero and scales up the others: dropout of inputs.

    .. math:: y = \frac{m}{1 - p} \, x, \quad m \sim \mathrm{Bernoulli}(1 - p)

    The mean is preserved and the variance is :math:`x^2 p / (1 - p)`, as with ``torch.nn.Dropout``. Without ``rescale`` the
    mean is :math:`(1 - p) x` and the variance :math:`p (1 - p) x^2`. The level is the share :math:`p \in [0, 1]` of elements.
    For tables 0.1 to 0.2 is usual; 0 is the mean of a normalized column.

    Args:
        rescale: Whether to divide by :math:`1 - p`, so that inputs have the same mean with and without noise. Give ``False``
            for missing values, as in a denoising autoencoder or to measure the cost of a lost feature.

    References:
        Dropout: A Simple Way to Prevent Neural Networks from Overfitting (Srivastava et al., 2014),
        https://jmlr.org/papers/v15/srivastava14a.html

        Extracting and Composing Robust Features with Denoising Autoencoders (Vincent et al., 2008),
        https://doi.org/10.1145/1390156.1390294

    Example:
        >>> FeatureDropout()(torch.ones(1000), 0.2, generator=torch.Generator().manual_seed(0)).unique()
        tensor([0.0000, 1.2500])
    """

    rescale: bool = True

    severities: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.3, 0.4, 0.5)
    unit: ClassVar[str] = "share of elements"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def __post_init__(self):
        check_flags(rescale=self.rescale)

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        last, factor = last_bits(level), self._factor(x, level)
        if is_fused(x, level):
            return fuse("bits", "drop", x, generator, mask, last, high=factor)
        mask, bits = find_valid(x, mask), draw_bits(x, generator)
        if is_fast_as_bits(x):
            y = torch.mul(x.view(torch.int32), bits.gt_(last), out=bits).view(x.dtype)
        else:
            y = torch.where(bits > last, x, 0.0)
        y = y.mul_(factor) if self.rescale else y
        return y if mask is None else torch.where(mask, y, x)

    def _factor(self, x: Tensor, level: float | Tensor) -> float | Tensor:
        if not self.rescale:
            return 1.0
        # a factor for each sample must round as that of all; at p = 1, an infinite factor would make the gradient NaN
        real = torch.promote_types(x.dtype, torch.float32).to_real()
        level = level if isinstance(level, Tensor) else torch.full([1] * x.ndim, level, dtype=real, device=x.device)
        return (1 - level).clamp_min_(2**-24).reciprocal_()


@dataclass(frozen=True)
class DropConnect(Noise):
    r"""Sets weights to zero and scales up the others: :class:`FeatureDropout` of weights.

    The level is the share :math:`p \in [0, 1]` of weights. The paper uses 0.5 in fully connected layers.

    References:
        Regularization of Neural Networks using DropConnect (Wan et al., 2013),
        https://proceedings.mlr.press/v28/wan13.html
    """

    severities: ClassVar[tuple[float, ...]] = FeatureDropout.severities
    unit: ClassVar[str] = "share of weights"
    elementwise: ClassVar[bool] = True
    independent_rows: ClassVar[bool] = True
    max_level: ClassVar[float] = 1.0
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        return FeatureDropout().perturb(x, level, generator, mask)


@dataclass(frozen=True)
class SwapNoise(Noise):
    r"""Replaces cells of a table by cells of other rows of the batch.

    .. math:: y_{ij} = \begin{cases} x_{kj} & u_{ij} < p, \; k \sim \mathcal{U}\{1, \dots, B\} \setminus \{i\} \\
        x_{ij} & \text{else} \end{cases}

    The column stays the same, so a cell of the result has exactly the distribution of its column. The noise suits categories
    as well as numbers, and keeps integers. A cell changes with probability :math:`p \, P(x_{ij} \neq x_{kj})`. A column is a
    position of the sample, so images and series can be swapped, too. A batch of one row does not change.

    The level is the share :math:`p \in [0, 1]` of cells. For denoising autoencoders of tables 0.15 is usual; VIME uses 0.3 and
    SCARF 0.6. The noise of a row depends on the other rows, so it cannot probe held-out data. Name the leaves to swap, because
    ``inputs="*"`` would also swap integer labels.

    References:
        VIME: Extending the Success of Self- and Semi-supervised Learning to Tabular Domain (Yoon et al., 2020),
        https://proceedings.neurips.cc/paper/2020/hash/7d97667a3e056acab9aaf653807b4a03-Abstract.html

        SCARF: Self-Supervised Contrastive Learning using Random Feature Corruption (Bahri et al., 2022),
        https://arxiv.org/abs/2106.15147

    Example:
        >>> codes = torch.tensor([[1, 10], [2, 20], [3, 30]])
        >>> y = SwapNoise()(codes, 1.0, generator=torch.Generator().manual_seed(0))
        >>> bool((y != codes).all()), bool((y[:, 1] >= 10).all())
        (True, True)
    """

    severities: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.15, 0.3, 0.6)
    unit: ClassVar[str] = "share of cells"
    max_level: ClassVar[float] = 1.0
    requires_float: ClassVar[bool] = False
    mixes_samples: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True
    keeps_invalid: ClassVar[bool] = True

    def perturb(self, x: Tensor, level: float | Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        n, size = len(x), x[0].numel()
        if n < 2:
            return x.clone()
        mask = find_valid(x, mask)
        if mask is None:
            steps, source = _draw_steps(x, level, n - 1, generator), torch.cat([x, x])
            after = torch.arange(size, size + x.numel(), dtype=steps.dtype, device=x.device)  # the cells of the next row
            cells = after.add_(steps.view(-1), alpha=size)
        else:
            valid, source = mask.cumsum(0), x
            rows = _pass_valid(_draw_steps(x, level, valid[-1:] - 1, generator), valid, mask)
            cells = torch.arange(size, device=x.device).view(x.shape[1:]).add(rows, alpha=size).view(-1)
        return source.view(-1).index_select(0, cells).view(x.shape)  # takes a quarter of the time of a gather


def _draw_steps(x: Tensor, level: float | Tensor, others: int | Tensor, generator: torch.Generator) -> Tensor:
    """Returns how many rows each cell skips before it takes the value of the next row, in a circle of rows.

    A share ``level`` of the cells skips fewer rows than there are ``others``. The remaining cells skip all others, so the next
    row is their own.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    level = level.to(wide).clamp_min(2**-60) if isinstance(level, Tensor) else level
    others = others.to(wide) if isinstance(others, Tensor) else others
    # for u < p, u / p is uniform, and for u >= p, it is at least 1; with u = 0, a level of 0 would swap a cell
    u = draw_bits(x, generator).bitwise_or_(1).to(wide)
    steps = u.mul_(others / (level * 2**31)).clamp_max_(others)
    return steps.to(torch.int32 if 2 * x.numel() < 2**31 else torch.int64)


def _pass_valid(steps: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
    """Returns the next row for a cell that skips valid rows in a circle of valid rows. An invalid cell gets its own row."""
    n, own = valid[-1:], column(torch.arange(len(mask), device=mask.device), mask)
    rank = torch.where(mask, valid - 1, n + own - valid)  # valid rows first
    order = torch.empty_like(rank).scatter_(0, rank, own.expand_as(rank))
    place = valid + steps
    place.sub_(n * (place >= n))
    return order.gather(0, torch.where(mask, place, rank))
