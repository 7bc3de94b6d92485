"""Mixup and CutMix: samples and targets mixed within a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_noise._checks import plain
from lightning_noise._tensor import at_least_float32, column, detached, is_differentiated, like, span, validate_dim
from lightning_noise.batch import (
    Path,
    Selector,
    describe,
    find_inputs,
    find_target,
    format_path,
    get,
    leaves,
    modify,
    select,
)
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import TargetCallback, Via
from lightning_noise.labels import SmoothLabels
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.losses.modes import MixedLabelLoss
from lightning_noise.masks import align_mask, find_mask, valid_positions
from lightning_noise.perturb.doubts import alone_doubt, channels_doubt, looks_like_mask, values_doubt
from lightning_noise.perturb.inputs import check_dense
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["CutMix", "Mixup"]


@dataclass(frozen=True)
class _Mix:
    """The partners and shares of a batch, and the box of CutMix.

    The partner of each sample comes ``shift`` samples before, around the end of the batch. So a tensor is mixed by slices,
    without a copy of the partners.

    Attributes:
        shift: The distance to the partner.
        lam: The share of the sample itself, of shape (1,) in the memory of the CPU, or (B,) on the device of the inputs.
        box: A mask of the pasted elements, of shape (1 or B, *) with the lengths of the axes ``dim``.
        dim: The axes of the box, counted from the end.
    """

    shift: int
    lam: Tensor
    box: Tensor | None = None
    dim: tuple[int, ...] = ()

    def of_input(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the mixed inputs; ``mask`` has the shape of ``x``."""
        if self.box is not None:
            return self.paste(x)
        mixed = self.blend(x if mask is None else torch.where(mask, x, 0))
        if mixed.device.type != "cpu" or mixed.sum().isnan():  # on other devices the question would synchronize
            known = x if mask is None else x.masked_fill(~mask, torch.nan)
            mixed = torch.where(mixed.isnan(), torch.fmax(known, self.partners_of(known)), mixed)
        return mixed if mask is None else torch.where(mask | self.partners_of(mask), mixed, x)

    def of_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """Returns the mask of the mixed inputs, of the shape and dtype of the mask of the inputs ``x``."""
        if self.box is None:
            return torch.maximum(mask, self.partners_of(mask))
        return self.paste(mask.reshape(_view_of(mask, x))).view(mask.shape)

    def partners_of(self, x: Tensor) -> Tensor:
        """Returns the partner of each row."""
        return x.roll(self.shift, 0)

    def blend(self, x: Tensor) -> Tensor:
        if self.lam.device.type == "cpu" and len(self.lam) == 1:
            return self._lerp(x, self.lam.tolist()[0])  # a number of a kernel, which rounds once
        wide = at_least_float32(x)
        return self._lerp(wide, column(self.lam, x).to(wide.dtype)).to(x.dtype)

    def _lerp(self, x: Tensor, lam: float | Tensor) -> Tensor:
        if is_differentiated(x):
            return torch.lerp(self.partners_of(x), x, lam)
        mixed, n = torch.empty_like(x), len(x) - self.shift
        for own, partner in ((slice(self.shift), slice(n, None)), (slice(self.shift, None), slice(n))):
            torch.lerp(x[partner], x[own], lam[own] if isinstance(lam, Tensor) else lam, out=mixed[own])
        return mixed

    def paste(self, x: Tensor) -> Tensor:
        assert self.box is not None
        shape = [len(self.box), *[1] * (x.ndim - 1)]
        for dim, length in zip(self.dim, self.box.shape[1:], strict=True):
            shape[dim] = length
        return torch.where(self.box.view(shape), self.partners_of(x), x)

    def has_box(self, target: Tensor) -> bool:
        """Returns whether the target has the axes of the box."""
        # a row of floats may have the length of the box by chance
        if self.box is None or target.ndim - 1 < -min(self.dim) or (len(self.dim) == 1 and target.is_floating_point()):
            return False
        return tuple(target.shape[dim] for dim in self.dim) == self.box.shape[1:]


def _view_of(mask: Tensor, x: Tensor) -> list[int]:
    """Returns the shape in which a mask that fits ``x`` has the axes of ``x``."""
    new = [1] * (x.ndim - mask.ndim)
    leads = all(n in (1, m) for n, m in zip(mask.shape, x.shape, strict=False))
    return [*mask.shape, *new] if leads else [*mask.shape[:1], *new, *mask.shape[1:]]


class _Mixing(TargetCallback):
    """Base of Mixup and CutMix."""

    def __init__(
        self,
        level: AnyLevel = 1.0,
        *,
        inputs: Selector | None = None,
        target: Selector | None = None,
        mask: int | str | None = None,
        via: Via | None = None,
        per_sample: bool = False,
        n_classes: int | None = None,
        seed: int | None = None,
        name: str | None = None,
    ):
        super().__init__(level, target=plain(target), via=via, seed=seed, name=name or type(self).__name__.lower())
        if callable(mask):
            raise TypeError(
                f"mask must be a leaf of the batch, because {type(self).__name__} writes the mixed mask back, got a function; "
                "put the mask into the batch in the data set or in collate_fn, and type its key, such as mask='mask'"
            )
        self.inputs = plain(inputs)
        self.mask = mask
        self.per_sample = per_sample
        self.n_classes = n_classes
        self._labels: set[Path] = set()  # floating-point targets that are labels, mixed at the loss

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        targets = {path: get(batch, path) for path in self._target_paths(batch)}
        inputs = find_inputs(batch, self.inputs)
        for path in inputs:
            x = get(batch, path)
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{type(self).__name__} needs one tensor, but the input {format_path(path)!r} is a list of {len(x)} "
                    "samples; pad them in the collate_fn, or mix them in the data set"
                )
            check_dense(x, path)
            if x.dtype == torch.bool:
                raise TypeError(
                    f"{type(self).__name__} mixes masks on their own, but the input {format_path(path)!r} is {describe(x)}; "
                    f"type mask={_selector(path)!r}, and inputs=… without the mask"
                )
            if not x.is_floating_point():
                raise TypeError(
                    f"{type(self).__name__} needs floats, but the input {format_path(path)!r} is {describe(x)}. Convert images "
                    "to floats in the transform of the data set, mix token ids as embeddings in the module, or type inputs=…"
                )
            if (doubt := alone_doubt(f"the input {format_path(path)!r}", x)) is not None:
                rank_zero_warn(f"{self.name!r}: {doubt}")
            self._check_mask(batch, path, {*inputs, *targets})
            for target in targets.values():
                if x.shape[:1] != target.shape[:1]:
                    raise ValueError(
                        f"input and target must have the same number of samples, but the input {format_path(path)!r} is "
                        f"{describe(x)} and the target is {describe(target)}"
                    )
        if self.target is None:
            self._check_others(batch, inputs, next(iter(targets)))
        floating = {path for path, target in targets.items() if target.is_floating_point()}
        for path in targets.keys() - floating if self.via == "batch" else ():
            SmoothLabels(self.n_classes).check(targets[path])
        self._labels = {path for path in floating if self.via is None and _holds_labels(targets[path])}

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        paths = find_inputs(batch, self.inputs)
        first, mask = get(batch, paths[0]), find_mask(batch, self.mask)
        mix = self._mix(first, level, key)
        if context.is_logged:
            perturbation.stats["lam"] = mix.lam.mean()

        def mix_input(leaf: Tensor, path: Path) -> Tensor:
            x = detached(leaf)
            return like(leaf, mix.of_input(x, None if mask is None else align_mask(detached(mask), x)))

        batch = modify(batch, paths, mix_input)
        if self.mask is not None:
            batch = modify(batch, select(batch, self.mask), lambda leaf, path: like(leaf, mix.of_mask(detached(leaf), first)))
        modes = []
        for path in self._target_paths(batch):
            target = get(batch, path)
            is_regression = self.via is None and target.is_floating_point() and path not in self._labels
            if self._changes_loss and not is_regression and not mix.has_box(target):
                lam = mix.lam if self.per_sample else mix.lam.squeeze(0)  # of shape (), as the mode expects
                partners = mix.partners_of(torch.arange(len(target), device=target.device))
                modes.append(MixedLabelLoss(target, partners, lam if lam.ndim == 0 else lam.to(target.device)))
            else:
                batch = modify(batch, [path], lambda leaf, path: self._mix_target(leaf, mix, key))
        with self._change_loss(modes, perturbation):
            yield batch

    def _target_paths(self, batch: Any) -> list[Path]:
        targets = self.target if isinstance(self.target, list | tuple) else [self.target]
        return [find_target(batch, target) for target in targets]

    def _check_mask(self, batch: Any, path: Path, others: Container[Path]) -> None:
        """Raises an error if the mask does not fit an input, and warns of an opposite mask or one that is not given."""
        x, mask = get(batch, path), find_mask(batch, self.mask)
        if mask is not None:
            valid = valid_positions(detached(x), align_mask(detached(mask), x))
            doubt = values_doubt(f"the input {format_path(path)!r}", detached(x)[valid], _OTHER_MASK)
            if doubt is not None:
                rank_zero_warn(f"{self.name!r}: {doubt}")
            return
        for other, leaf in leaves(batch):
            if other not in others and looks_like_mask(other, leaf, x):
                rank_zero_warn(
                    f"{type(self).__name__} mixes the input {format_path(path)!r}, and leaves {format_path(other)!r} "
                    f"{describe(leaf)} as it is. If this marks the valid positions of the input, type "
                    f"mask={_selector(other)!r}; then the mixed samples get the mask of both. If this holds lengths, put such "
                    "a mask into the batch"
                )

    def _check_others(self, batch: Any, inputs: list[Path], target: Path) -> None:
        """Warns if the target by default leaves out a leaf with a row for each sample, which may be another target."""
        x, known = get(batch, inputs[0]), {*inputs, target, *([] if self.mask is None else select(batch, self.mask))}
        for path, leaf in leaves(batch):
            if path not in known and leaf.shape[:1] == x.shape[:1] and not looks_like_mask(path, leaf, x):
                one, other = _selector(target), _selector(path)
                rank_zero_warn(
                    f"{type(self).__name__} mixes the target {format_path(target)!r}, and leaves {format_path(path)!r} "
                    f"{describe(leaf)} as it is. If this is a target, too, type target={[one, other]}; if it is an input, "
                    f"type inputs={[*map(_selector, inputs), other]}; else type target={one!r}"
                )
                return

    @property
    def _changes_loss(self) -> bool:
        return self.via in (None, "loss")

    @abstractmethod
    def _mix(self, x: Tensor, level: float, key: Key) -> _Mix:
        """Returns the mix of a batch of inputs like ``x``."""

    def _draw(self, x: Tensor, level: float, generator: torch.Generator) -> tuple[int, Tensor]:
        """Returns the shift and the shares."""
        u = torch.rand(1 + 2 * (len(x) if self.per_sample else 1), generator=generator, dtype=torch.float64).numpy()
        shift = 1 + int(u[0] * (len(x) - 1)) if len(x) > 1 else 0
        lam = torch.from_numpy(_symmetric_beta(level, *u[1:].reshape(2, -1))).float()
        return shift, lam.to(x.device, non_blocking=True) if self.per_sample else lam

    def _mix_target(self, target: Tensor, mix: _Mix, key: Key) -> Tensor:
        """Returns the mixed target for the batch."""
        if mix.has_box(target):
            return mix.paste(target)
        if self.via == "sample":
            u = torch.rand(len(target), generator=(key / "sample").generator(target.device), device=target.device)
            return torch.where(column(u < mix.lam.to(u.device, non_blocking=True), target), target, mix.partners_of(target))
        if target.is_floating_point():
            return mix.blend(target)
        return mix.blend(SmoothLabels(self.n_classes).probabilities(target, 0.0))


def _symmetric_beta(alpha: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns numbers of the Beta distribution with both parameters ``alpha``, from two uniform numbers each.

    The formula follows from the polar method for Student's t (Bailey, 1994): if T has 2 alpha degrees of freedom, then
    (1 + T / sqrt(2 alpha + T^2)) / 2 has this distribution. NumPy is faster than torch for a few numbers.
    """
    with np.errstate(over="ignore", divide="ignore"):  # infinity stands for a share of 0 or 1
        cosine = np.cos(2 * np.pi * v)
        q = np.expm1(np.log(u) / -alpha) * cosine * cosine  # T^2 / (2 alpha)
        small = 0.5 / ((1 + q) * (1 + (1 + 1 / q) ** -0.5))  # also if it is far below the precision of 1
        return np.where(cosine < 0, small, 1 - small)


_OTHER_MASK = "a mask is above 0 at valid positions, so if mask=… is the opposite, put mask == 0 into the batch"


def _selector(path: Path) -> int | str:
    return path[0] if len(path) == 1 else format_path(path)


def _holds_labels(target: Tensor) -> bool:
    """Returns whether floating-point numbers are labels of a classification. The function synchronizes with the device."""
    known = target[(target == target) & (target != -1) & (target != -100)]
    if known.numel() and ((known == 0) | (known == 1)).all():
        return bool((known == 0).any() or (target != -1).all())  # -1 and 1 are no labels of a binary cross-entropy
    if target.ndim < 2 or target.shape[1] < 2 or not (target >= 0).all():
        return False
    total = target.float().sum(1)
    return torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-3 + 2 * torch.finfo(target.dtype).eps)


class Mixup(_Mixing):
    r"""Mixes pairs of samples and their targets.

    .. math:: \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \quad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    The partner :math:`\pi(i) = i - s \bmod B` comes :math:`s` samples before, with one uniform draw of :math:`s` for the
    batch. Each other sample of the batch is equally likely. Shuffle the training data: a fixed order pairs the same samples.

    The loss is :math:`\lambda L(y_i) + (1 - \lambda) L(y_{\pi(i)})`. It applies if the module computes ``cross_entropy``,
    ``nll_loss``, ``binary_cross_entropy`` or ``binary_cross_entropy_with_logits`` of the target. Class indices stay integers,
    and metrics of the training step see the label of sample :math:`i`. If the loss also needs another function of the target,
    such as a Dice term, the callback warns and names the function.

    Floating-point targets are labels, mixed at the loss, if the first batch of the fit holds zeros and ones alone (NaN, -1 and
    -100 mark missing labels), or probabilities that sum to 1 along the second axis. Other floating-point targets, such as those
    of a regression, are mixed in the batch. There the target is NaN if it is NaN for either sample. Another number that marks a
    missing value is mixed like any number.

    If an element of the input is NaN, or missing, in one of the samples, the mixed sample has the value of the other.

    A label that is ignored or masked does not count for either sample: if the partner's label does not count, the sample's own
    label takes its place. If the module multiplies the loss by masks or weights of the labels, use ``via="sample"``. Otherwise
    these stay the masks and weights of sample :math:`i`, and the callback warns of weights.

    The level is :math:`\alpha \geq 0`; 0 is no mixing. Usual values are 0.2 to 0.4 on ImageNet, and on CIFAR-10 the value 1,
    a uniform :math:`\lambda`. The mean of :math:`\lambda` is 1/2 and its variance :math:`1 / (4 (2 \alpha + 1))`.

    Mixup alone is no reliable protection against noise. It can lower the accuracy on noisy data and worsen the calibration, and
    an :class:`~lightning_noise.InputNoise` before it can reverse both. Measure this with a
    :class:`~lightning_noise.RobustnessMonitor`.

    The samples are mixed from the start of the training step to the end of the backward pass, and never in validation, test
    and prediction. The draws differ between ranks. The log keys are ``train_noise/<name>/level`` and
    ``train_noise/<name>/lam``, the mean share in the batch.

    Args:
        level: The parameter :math:`\alpha` of the Beta distribution: a number, a schedule, a callable, or an
            :class:`~lightning_noise.AdaptiveLevel` with the rule :class:`~lightning_noise.rules.SignedGap`.
        inputs: Which leaves of the batch are inputs, as in :class:`~lightning_noise.InputNoise`. All are mixed alike.
        target: Which leaf of the batch is the target, as in :class:`~lightning_noise.TargetNoise`. A list gives the targets of
            several heads, which are mixed with the same shares. Without this argument, a warning names another leaf that has a
            row for each sample and is not mixed.
        mask: Which leaf of the batch marks the valid positions of the inputs, with numbers above 0. The leaf has the shape of
            the inputs, their first axes, or their first and last ones. A mixed sample is valid where either sample is, and its
            mask says so. Positions that are not valid count as 0.
        via: Where labels are mixed. ``"loss"`` mixes the loss. ``"batch"`` puts probabilities of shape :math:`(B, K, *)` into
            the batch, for a loss that takes probabilities. ``"sample"`` draws the label of one of the two samples by their
            shares, for any loss. Default: labels at the loss, and targets of a regression in the batch.
        per_sample: Whether to draw a :math:`\lambda` for each sample, and not for the batch.
        n_classes: The number of classes, for ``via="batch"``.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages, unique in the trainer. Default: the class name in lower case.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If a level or path is wrong, or the first mixed step computes none of the four losses of the target.

    References:
        mixup: Beyond Empirical Risk Minimization (Zhang et al., 2018), https://arxiv.org/abs/1710.09412

    Example:
        >>> from lightning_noise import schedules
        >>> callback = Mixup(schedules.Window(0.4, until=0.8))  # the last fifth of the training is clean
        >>> callback.name
        'mixup'
    """

    def _mix(self, x: Tensor, level: float, key: Key) -> _Mix:
        return _Mix(*self._draw(x, level, key.generator("cpu")))


class CutMix(_Mixing):
    r"""Pastes boxes between samples and mixes their targets.

    .. math:: \tilde x_i = m \odot x_i + (1 - m) \odot x_{\pi(i)}, \quad \lambda = \overline{m}

    With :math:`\lambda' \sim \mathrm{Beta}(\alpha, \alpha)`, the box takes the fraction :math:`r = (1 - \lambda')^{1/k}` of the
    length of each of its :math:`k` axes. Its center is uniform along each axis, and the box is cut off at the edges. Its edges
    are rounded at random, so that the mean of the pasted fraction is exactly :math:`(r - r^2 / 4)^k`. The share :math:`\lambda`
    of the targets is the fraction of the elements that are not pasted, padding included.

    A target whose last axes have the lengths of the box axes, such as a label for each pixel, is pasted and not mixed. An
    exception is a floating-point target with a box of one axis. Missing values and the mask are pasted, too. Everything else is
    as in :class:`Mixup`.

    Args:
        level: The parameter :math:`\alpha` of the Beta distribution. The usual value is 1; 0 is no mixing.
        dim: The axes of the box, counted from the end: ``(-2, -1)`` for images, ``(-1,)`` for series and tables.
        inputs: Which leaves of the batch are inputs. The box axes must have the same lengths in all inputs.
        target: Which leaf of the batch is the target, as in :class:`Mixup`.
        mask: Which leaf of the batch marks the valid positions of the inputs. It must have the axes of the box.
        via: Where labels are mixed, as in :class:`Mixup`.
        per_sample: Whether to draw a :math:`\lambda` and a box for each sample, and not for the batch.
        n_classes: The number of classes, for ``via="batch"``.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages, unique in the trainer. Default: the class name in lower case.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If a level, axis or path is wrong, if labels lie on axes of other lengths than the box axes, or if the first
            mixed step computes none of the four losses of the target.

    References:
        CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (Yun et al., 2019),
        https://arxiv.org/abs/1905.04899

    Example:
        >>> CutMix(1.0, dim=(-1,)).name
        'cutmix'
    """

    def __init__(
        self,
        level: AnyLevel = 1.0,
        *,
        dim: int | Sequence[int] = (-2, -1),
        inputs: Selector | None = None,
        target: Selector | None = None,
        mask: int | str | None = None,
        via: Via | None = None,
        per_sample: bool = False,
        n_classes: int | None = None,
        seed: int | None = None,
        name: str | None = None,
    ):
        options = {"inputs": inputs, "target": target, "mask": mask, "via": via, "per_sample": per_sample}
        super().__init__(level, **options, n_classes=n_classes, seed=seed, name=name)
        self.dim = tuple(sorted(validate_dim(plain(dim))))

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        super().check(pl_module, batch)
        first, *others = [get(batch, path) for path in find_inputs(batch, self.inputs)]
        if first.ndim - 1 < -min(self.dim):
            raise ValueError(f"the input needs the axes dim={self.dim} of the box, got {describe(first)}; type another dim=…")
        mask = find_mask(batch, self.mask)
        if mask is not None and any(_view_of(mask, first)[dim] != first.shape[dim] for dim in self.dim):
            raise ValueError(
                f"the mask needs the axes dim={self.dim} of the box in the input {describe(first)}, got {describe(mask)}; type "
                "another dim=…, such as dim=(-2,) for the time of (B, T, C)"
            )
        if (where := channels_doubt("the input", first, self.dim, "CutMix")) is not None:
            rank_zero_warn(f"{self.name!r}: {where[0]} type CutMix(…, dim={where[1]})")
        for x in others:
            if x.ndim - 1 < -min(self.dim) or any(x.shape[dim] != first.shape[dim] for dim in self.dim):
                raise ValueError(
                    f"inputs must agree on the axes dim={self.dim} of the box, got {describe(first)} and {describe(x)}"
                )
        for target in (get(batch, path) for path in self._target_paths(batch)):
            has_axes = not target.is_floating_point() and target.ndim > len(self.dim)
            if has_axes and any(target.shape[dim] != first.shape[dim] for dim in self.dim):
                raise ValueError(
                    f"labels with a value for each position must have the axes dim={self.dim} of the input {describe(first)}, "
                    f"got {describe(target)}; resize the labels in the data set"
                )

    def _mix(self, x: Tensor, level: float, key: Key) -> _Mix:
        generator = key.generator("cpu")
        shift, lam = self._draw(x, level, generator)
        u = torch.rand(len(self.dim), 2, len(lam), generator=generator).to(x.device, non_blocking=True)
        side = (1 - lam.to(x.device, non_blocking=True)) ** (1 / len(self.dim))
        box = torch.ones((), dtype=torch.bool, device=x.device)
        for dim, (center, rounding) in zip(self.dim, u, strict=True):
            n = x.shape[dim]
            box = box & span(center * n - side * n / 2 - rounding, side * n, x, dim)
        box = box.reshape(len(lam), *(x.shape[dim] for dim in self.dim))
        return _Mix(shift, (~box).flatten(1).float().mean(1), box, self.dim)
