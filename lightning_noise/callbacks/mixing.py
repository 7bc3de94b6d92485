"""Samples mixed with each other, and their targets with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_noise._tensor import column, like, span, validate_dim
from lightning_noise.batch import Path, Selector, describe, find_inputs, find_target, format_path, get, modify
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import TargetCallback, Via
from lightning_noise.labels import SmoothLabels
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.losses.modes import MixedLabelLoss
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["CutMix", "Mixup"]


IGNORED = -100  # the label that losses of torch leave out, unless they are told another


@dataclass(frozen=True)
class _Mix:
    """The partner of each sample, the share of its own, for all or for each, and the box that is pasted into it, if any."""

    partners: Tensor
    lam: Tensor
    box: Tensor | None = None  # of shape (1 or B, *) with the lengths of the axes that dim says, 1 where it is pasted
    dim: tuple[int, ...] = ()

    def of_input(self, x: Tensor) -> Tensor:
        return self.blended(x) if self.box is None else self.pasted(x)

    def blended(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        lam = column(self.lam, x).to(wide.dtype)
        return torch.lerp(wide[self.partners], wide, lam).to(x.dtype)

    def pasted(self, x: Tensor) -> Tensor:
        assert self.box is not None
        shape = [len(self.box), *[1] * (x.ndim - 1)]
        for dim, length in zip(self.dim, self.box.shape[1:], strict=True):
            shape[dim] = length
        return torch.where(self.box.view(shape).expand_as(x), x[self.partners], x)

    def has_the_box(self, target: Tensor) -> bool:
        """Whether a target lies on the axes of the box; a row of floats may be as long as the box is by chance."""
        if self.box is None or target.ndim - 1 < -min(self.dim) or (len(self.dim) == 1 and target.is_floating_point()):
            return False
        return tuple(target.shape[dim] for dim in self.dim) == self.box.shape[1:]


def _beta(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """Draws from Beta(alpha, alpha) with numpy, because the distributions of torch take no generator."""
    return torch.from_numpy(np.random.default_rng(generator.initial_seed()).beta(alpha, alpha, n))


class _Mixing(TargetCallback):
    """Mixes each sample of a batch with another one."""

    def __init__(
        self,
        level: AnyLevel = 1.0,
        *,
        inputs: Selector | None = None,
        target: Selector | None = None,
        via: Via | None = None,
        per_sample: bool = False,
        n_classes: int | None = None,
        seed: int | None = None,
        name: str | None = None,
    ):
        super().__init__(level, target=target, via=via, seed=seed, name=name or type(self).__name__.lower())
        self.inputs = inputs
        self.per_sample = per_sample
        self.n_classes = n_classes

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        targets = [get(batch, path) for path in self._target_paths(batch)]
        for path in find_inputs(batch, self.inputs):
            x = get(batch, path)
            if not x.is_floating_point():
                raise TypeError(
                    f"samples are mixed as floats, but the input {format_path(path)!r} is {describe(x)}; convert images to "
                    "floats in the data set's transform, and mix token ids in the module, as embeddings"
                )
            for target in targets:
                if x.shape[:1] != target.shape[:1]:
                    raise ValueError(
                        f"the input {format_path(path)!r}, {describe(x)}, does not fit the target, {describe(target)}"
                    )
        for target in targets:
            if self.via == "batch" and not target.is_floating_point():
                SmoothLabels(self.n_classes).check(target[target.long() != IGNORED])

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        paths = find_inputs(batch, self.inputs)
        mix = self._mix(get(batch, paths[0]), level, key)
        perturbation.stats["lam"] = mix.lam.mean()
        batch = modify(batch, paths, lambda leaf, path: like(leaf, mix.of_input(leaf.detach().as_subclass(Tensor))))
        modes = []
        with ExitStack() as stack:
            for path in self._target_paths(batch):
                target = get(batch, path)
                if self._is_softened(target, mix):
                    modes.append(stack.enter_context(self._mode(target, mix)))
                else:
                    batch = modify(batch, [path], lambda leaf, path: self._mixed(leaf, mix, key))
            yield batch
        if modes:
            perturbation.effective = any(mode.applied for mode in modes)

    def _target_paths(self, batch: Any) -> list[Path]:
        targets = self.target if isinstance(self.target, list | tuple) else [self.target]
        return [find_target(batch, target) for target in targets]

    def _mode(self, target: Tensor, mix: _Mix) -> MixedLabelLoss:
        # one share for all is a number for the loss, which is that of two calls
        lam = mix.lam if self.per_sample else mix.lam.squeeze(0)
        return MixedLabelLoss(target, mix.partners.to(target.device), lam.to(target.device))

    @property
    def _changes_loss(self) -> bool:
        return self.via in (None, "loss")

    def _is_softened(self, target: Tensor, mix: _Mix) -> bool:
        """Whether the target is mixed at the loss and not in the batch."""
        numbers = self.via is None and target.is_floating_point()
        return self._changes_loss and not numbers and not mix.has_the_box(target)

    @abstractmethod
    def _mix(self, x: Tensor, level: float, key: Key) -> _Mix:
        """What is mixed with what in a batch of inputs like ``x``."""

    def _drawn(self, x: Tensor, level: float, key: Key) -> tuple[Tensor, Tensor]:
        """The partners, and the shares."""
        partners = torch.randperm(len(x), generator=(key / "partners").generator("cpu"))
        lam = _beta(level, len(x) if self.per_sample else 1, (key / "lam").generator("cpu"))
        return partners.to(x.device), lam.float().to(x.device)

    def _mixed(self, target: Tensor, mix: _Mix, key: Key) -> Tensor:
        """The target for the batch."""
        if mix.has_the_box(target):
            return mix.pasted(target)
        if self.via == "sample":
            u = torch.rand(len(target), generator=(key / "sample").generator(target.device), device=target.device)
            return torch.where(column(u < mix.lam, target), target, target[mix.partners])
        if target.is_floating_point():
            return mix.blended(target)
        return mix.blended(SmoothLabels(self.n_classes).probabilities(target, 0.0))


class Mixup(_Mixing):
    r"""Trains on convex combinations of two samples of the batch and of their targets.

    .. math:: \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \quad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    The loss is :math:`\lambda L(y_i) + (1 - \lambda) L(y_{\pi(i)})`, taken where the module computes ``cross_entropy``,
    ``nll_loss`` or ``binary_cross_entropy_with_logits``, so that labels stay integers and the metrics of the training step see
    those of the first of the two samples. Floating-point targets, as of a regression, are mixed in the batch, where a number
    that stands for a missing value is mixed like any other. Labels that are ignored or masked out count for neither sample:
    the own label takes the place of a partner's that is not to count. Masks and weights that the module makes of the labels
    and multiplies the loss by stay those of the first sample; ``via="sample"`` suits these. The level is
    :math:`\alpha \geq 0`: 0.2 to 0.4 is usual on ImageNet and 1, a uniform :math:`\lambda`, on CIFAR-10; 0 switches it off. The
    mean of :math:`\lambda` is 1/2 and its variance :math:`1 / (4 (2 \alpha + 1))`.

    It is no method against noise by itself: it can lower the accuracy on noisy data and make a model less calibrated, while
    an :class:`~lightning_noise.InputNoise` before it can turn this round. Measure it with a
    :class:`~lightning_noise.RobustnessMonitor`. It acts from the start of the training step to the end of the backward pass,
    and never in validation, test and prediction. The draws differ from process to process.

    It logs ``noise/<name>/level`` and ``noise/<name>/lam``, the mean share of the batch.

    Args:
        level: The parameter :math:`\alpha` of the Beta distribution: a number, a schedule, a callable, or an
            adaptive level by :class:`~lightning_noise.rules.SignedGap`.
        inputs: Which leaves of the batch, as in :class:`~lightning_noise.InputNoise`; all are mixed in the same way.
        target: Which leaf is the target, or a list of those of several heads, which are mixed with the same shares; left out,
            the second element of a sequence.
        via: Where labels are mixed: ``"loss"``; ``"batch"``, probabilities of shape :math:`(B, K, *)`, for a loss that takes
            them; or ``"sample"``, the label of one of the two, drawn with their shares, for any loss. Left out, class indices
            at the loss and floating-point targets in the batch.
        per_sample: Draw a :math:`\lambda` for each sample and not one for the batch.
        n_classes: The number of classes, for ``via="batch"``.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error. Left out,
            that of the class in lower case.

    Raises:
        TypeError: An input is no floating-point tensor.
        ValueError: A level or path is wrong, or the first step that was mixed computed no such loss of the target.

    References:
        mixup: Beyond Empirical Risk Minimization (Zhang et al., 2018), https://arxiv.org/abs/1710.09412

    Example:
        >>> from lightning_noise import schedules
        >>> callback = Mixup(schedules.Window(0.4, until=0.8))  # the last fifth of the training is clean
        >>> callback.name
        'mixup'
    """

    def _mix(self, x: Tensor, level: float, key: Key) -> _Mix:
        return _Mix(*self._drawn(x, level, key))


class CutMix(_Mixing):
    r"""Pastes a box of one sample into another, and mixes their targets by the share of its elements.

    .. math:: \tilde x_i = m \odot x_i + (1 - m) \odot x_{\pi(i)}, \quad \lambda = \overline{m}

    The box takes :math:`(1 - \lambda')^{1/k}` of the length of each of its :math:`k` axes for a
    :math:`\lambda' \sim \mathrm{Beta}(\alpha, \alpha)`, around a centre that is uniform over the elements, and is cut off at
    the edges; the :math:`\lambda` of the targets is the share that is in fact left. Targets whose last axes have the lengths of
    those of the box, as a label for each pixel, are pasted and not mixed, unless the box has one axis and they are
    floating-point. All else is as in :class:`Mixup`.

    Args:
        level: The parameter :math:`\alpha` of the Beta distribution; 1 is usual, and 0 switches it off.
        dim: The axes of the box, counted from the end: ``(-2, -1)`` for images, ``(-1,)`` for series and tables.
        inputs: Which leaves of the batch; the axes of the box must be of the same lengths in all of them.
        target: Which leaf is the target; left out, the second element of a sequence.
        via: Where labels are mixed, as in :class:`Mixup`.
        per_sample: Draw a :math:`\lambda` and a box for each sample and not one for the batch.
        n_classes: The number of classes, for ``via="batch"``.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error. Left out,
            that of the class in lower case.

    Raises:
        TypeError: An input is no floating-point tensor.
        ValueError: A level, axis or path is wrong, labels lie on axes of other lengths than those of the box, or the first step
            that was mixed computed no such loss of the target.

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
        dim: Sequence[int] = (-2, -1),
        inputs: Selector | None = None,
        target: Selector | None = None,
        via: Via | None = None,
        per_sample: bool = False,
        n_classes: int | None = None,
        seed: int | None = None,
        name: str | None = None,
    ):
        super().__init__(
            level,
            inputs=inputs,
            target=target,
            via=via,
            per_sample=per_sample,
            n_classes=n_classes,
            seed=seed,
            name=name,
        )
        self.dim = tuple(sorted(validate_dim(dim)))

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        super().check(pl_module, batch)
        first, *others = [get(batch, path) for path in find_inputs(batch, self.inputs)]
        if first.ndim - 1 < -min(self.dim):
            raise ValueError(f"a box of the axes {self.dim} does not fit the input, {describe(first)}")
        for x in others:
            if x.ndim - 1 < -min(self.dim) or any(x.shape[dim] != first.shape[dim] for dim in self.dim):
                raise ValueError(f"one box of the axes {self.dim} does not fit the inputs {describe(first)} and {describe(x)}")
        for target in (get(batch, path) for path in self._target_paths(batch)):
            has_axes = not target.is_floating_point() and target.ndim > len(self.dim)
            if has_axes and any(target.shape[dim] != first.shape[dim] for dim in self.dim):
                raise ValueError(f"labels for each place of the box must be as fine as the input, not {describe(target)}")

    def _mix(self, x: Tensor, level: float, key: Key) -> _Mix:
        partners, lam = self._drawn(x, level, key)
        centres = torch.rand(len(self.dim), len(lam), generator=(key / "box").generator("cpu")).to(x.device)
        side = (1 - lam) ** (1 / len(self.dim))
        box = torch.ones((), dtype=torch.bool, device=x.device)
        for dim, u in zip(self.dim, centres, strict=True):
            n = x.shape[dim]
            half = (side * n / 2).floor_()
            box = box & span((u * n).floor_() - half, 2 * half, x, dim)
        box = box.reshape(len(lam), *(x.shape[dim] for dim in self.dim))
        return _Mix(partners, (~box).flatten(1).float().mean(1), box, self.dim)
