"""Noise in the targets, and label smoothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_noise._checks import plain
from lightning_noise.batch import describe, find_target, get, modify, select_one
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import TargetCallback, Via
from lightning_noise.labels import FlipLabels, LabelNoise, SmoothLabels
from lightning_noise.loop.internals import class_of_callbacks
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.losses.modes import CheckedLabelLoss, LabelLoss, NoisyLabelLoss, SmoothedLabelLoss
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import check_leaf, perturb_batch
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["LabelSmoothing", "TargetNoise"]


class TargetNoise(TargetCallback):
    r"""Adds noise to the targets of each training batch.

    ``via`` says where labels change:

    - ``"loss"`` leaves the batch as it is. ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy`` and
      ``binary_cross_entropy_with_logits`` of the target, or of a tensor derived from the target, use the noisy labels.
      Accuracies and confusion matrices of the same step see the true labels. If the loss also needs another function of the
      target, such as a Dice term, the callback warns and names the function. A focal loss on top of ``cross_entropy`` is not
      exact; see :class:`~lightning_noise.losses.modes.LabelLoss`.
    - ``"sample"`` draws hard labels and puts them into the batch, for any loss.
    - ``"batch"`` puts probabilities of shape :math:`(N, K, *)` into the batch, for a loss that takes probabilities.

    With ``"sample"`` and ``"batch"``, metrics of the training step see the noisy labels. Callbacks that change the loss of the
    same target must come later in the list. Each floating-point label is an independent binary label.

    The noise acts from the start of the training step to the end of the backward pass, and never in validation, test and
    prediction. At level 0 nothing changes. The draws differ between ranks.

    Let the level of label noise decay. A model trained on smoothed labels to the end is under-confident, above all on noisy
    data. Noise in the target of a regression, such as :class:`~lightning_noise.noise.Gaussian`, does not regularize in
    expectation: it adds the constant :math:`\sigma^2` to the squared error.

    The log key is ``train_noise/<name>/level``.

    Args:
        noise: A label noise, such as :class:`~lightning_noise.labels.FlipLabels`. For a regression, a noise such as
            :class:`~lightning_noise.noise.Gaussian`, which is added in the batch.
        level: The amount of noise: a number, a schedule, a callable or an :class:`~lightning_noise.AdaptiveLevel`.
        target: Which leaf of the batch is the target: an index, a key or a dotted path. Default: the second element of a
            sequence, or else the only leaf named label(s), target(s) or y, or else the only integer leaf.
        via: ``"loss"``, ``"sample"`` or ``"batch"``. Default: ``"loss"`` for :class:`~lightning_noise.labels.SmoothLabels`, and
            ``"sample"`` for other label noises.
        index: Which leaf of the batch holds the index of each sample in the data set. With an index, the draw of a sample is
            the same in every epoch and on every rank, like a label that was recorded wrongly. A label that changes at a level
            also changes at every higher level. Default: the labels are drawn anew for each batch.
        ignore_index: The label of positions that do not count, as in the loss. These labels stay, and no other label becomes
            this label. As probabilities these positions are rows of zeros. NaN among binary labels stays, too.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages, unique in the trainer.

    Raises:
        TypeError: If the target does not suit the noise.
        ValueError: If a level, label or path is wrong, if the criterion smooths labels itself or ignores another label than
            ``ignore_index``, if two callbacks smooth the labels of one target, or if the first step with noise computes none of
            the four losses of the target.

    Example:
        >>> from lightning_noise import labels, schedules
        >>> TargetNoise(labels.FlipLabels(n_classes=10), schedules.Linear(0.2, 0.0)).via
        'sample'
    """

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return super()._advise(args, kwargs if args else {"noise": FlipLabels(n_classes=10)} | kwargs)

    def __init__(
        self,
        noise: LabelNoise | Noise | NoiseFunction,
        level: AnyLevel | None = None,
        *,
        target: int | str | None = None,
        via: Via | None = None,
        index: int | str | None = None,
        ignore_index: int = -100,
        seed: int | None = None,
        name: str = "target",
    ):
        self.noise = (
            noise if isinstance(noise, LabelNoise) else as_noise(noise, "TargetNoise(labels.FlipLabels(n_classes=10), {1})")
        )
        if isinstance(self.noise, Noise):
            if via is not None or index is not None:
                raise ValueError(f"via and index are for label noise, got {self.noise.title}; remove via and index")
        elif via is None:
            via = "loss" if isinstance(noise, SmoothLabels) else "sample"
        if isinstance(target := plain(target), list | tuple) and len(target) > 1:
            raise ValueError(
                f"target must be one leaf, got {target!r}; for several targets type a callback for each, such as "
                f"{type(self).__name__}(…, target={target[1]!r}, name='second')"
            )
        super().__init__(level, noise=self.noise, target=target, via=via, seed=seed, name=name)
        self.index = index
        self.ignore_index = ignore_index

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for other in class_of_callbacks(trainer, TargetNoise) if self._smooths else []:
            if other is not self and other._smooths and other.target == self.target:
                raise ValueError(
                    f"{self.name!r} and {other.name!r} both smooth the labels of one target; type a single LabelSmoothing(…), "
                    "or target=… if each has a target of its own"
                )

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        path = find_target(batch, self.target)
        target = get(batch, path)
        if not isinstance(self.noise, LabelNoise):
            check_leaf(target, path, self.noise, "target")
        elif self._draws or self.via == "batch":
            self.noise.check(target, ignore_index=self.ignore_index)
        if self.index is not None:
            index = select_one(batch, self.index, "index")
            if index.shape != target.shape[:1] or index.is_floating_point():
                raise ValueError(f"index must hold an integer for each of the {len(target)} samples, got {describe(index)}")

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        path = find_target(batch, self.target)
        target = get(batch, path)
        if not isinstance(self.noise, LabelNoise):
            yield perturb_batch(batch, [path], self.noise, level, key)
        elif self.via == "loss":
            if self._draws:
                noisy = self._sample(self.noise, batch, target, level, key)
                mode: LabelLoss = NoisyLabelLoss(target, noisy, ignore_index=self.ignore_index)
            else:
                mode = SmoothedLabelLoss(target, torch.full((), level, dtype=torch.float64))
            with self._change_loss([mode], perturbation):
                yield batch
        elif self.via == "batch":
            soft = self.noise.probabilities(target, level, ignore_index=self.ignore_index)
            yield modify(batch, [path], lambda leaf, path: soft)
        else:
            hard = self._sample(self.noise, batch, target, level, key)
            with CheckedLabelLoss(hard, ignore_index=self.ignore_index):
                yield modify(batch, [path], lambda leaf, path: hard)

    @property
    def _smooths(self) -> bool:
        return self.via == "loss" and not self._draws

    @property
    def _draws(self) -> bool:
        return self.via == "sample" or not isinstance(self.noise, SmoothLabels)

    def _sample(self, noise: LabelNoise, batch: Any, target: Tensor, level: float, key: Key) -> Tensor:
        change, partner = (self._uniform(batch, target, key, part) for part in ("change", "partner"))
        return noise.sample(target, level, change=change, partner=partner, ignore_index=self.ignore_index)

    def _uniform(self, batch: Any, target: Tensor, key: Key, part: str) -> Tensor:
        if self.index is None:
            return torch.rand(target.shape, generator=(key / part).generator(target.device), device=target.device)
        seed, name, *_ = key.coordinates  # without epoch, batch and rank, on which the draw must not depend
        return Key((seed, name, part)).uniform(select_one(batch, self.index, "index"), target.shape)


class LabelSmoothing(TargetNoise):
    r"""Smooths the labels in the loss, and nowhere else.

    .. math:: L = (1 - \epsilon) \, L(y) + \frac{\epsilon}{K} \sum_{k=1}^{K} L(k)

    This is :class:`TargetNoise` with :class:`~lightning_noise.labels.SmoothLabels`. The loss equals
    ``torch.nn.functional.cross_entropy(..., label_smoothing=level)``, including class weights, ignored positions and
    reductions, without a change to the module. Accuracies of the training step see the true labels, and validation is not
    smoothed. Binary and multilabel targets become :math:`(1 - \epsilon) y + \epsilon / 2`.

    Let the level decay, as in ``schedules.Linear(0.2, 0.0)``. This keeps most of the gain in accuracy. A model smoothed to the
    end is usually worse calibrated than a model that was never smoothed, unless that model was far over-confident.
    ``AdaptiveLevel(rules.SignedGap())`` moves the level to where the confidence equals the accuracy.

    Args:
        level: The amount :math:`\epsilon \in [0, 1]`: a number, a schedule, a callable or an
            :class:`~lightning_noise.AdaptiveLevel`. Default: 0.1, as in the first paper.
        target: Which leaf of the batch is the target, as in :class:`TargetNoise`.
        name: The name in log keys and messages, unique in the trainer.

    Raises:
        ValueError: If the criterion smooths labels itself, or the first smoothed step computes no loss that can be smoothed.

    References:
        Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), https://arxiv.org/abs/1512.00567

        When Does Label Smoothing Help? (Müller et al., 2019), https://arxiv.org/abs/1906.02629

    Example:
        >>> from lightning_noise import schedules
        >>> LabelSmoothing(schedules.Linear(0.2, 0.0)).via
        'loss'
    """

    def __init__(self, level: AnyLevel = 0.1, *, target: int | str | None = None, name: str = "smoothing"):
        super().__init__(SmoothLabels(), level, target=target, name=name)

    @property
    def _in_batch(self) -> str:
        return "TargetNoise(labels.SmoothLabels(n_classes=…), …, "
