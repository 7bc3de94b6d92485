"""Noise in the targets of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_noise.batch import describe, find_target, get, modify, select_one
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import TargetCallback, Via
from lightning_noise.labels import LabelNoise, SmoothLabels
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.losses.modes import LabelLoss, NoisyLabelLoss, SmoothedLabelLoss
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import check_floating, perturb_batch
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["LabelSmoothing", "TargetNoise"]


class TargetNoise(TargetCallback):
    r"""Perturbs the target of each training batch.

    There are three ways. ``via="loss"`` leaves the batch as it is: where the module computes ``cross_entropy``, ``nll_loss`` or
    ``binary_cross_entropy_with_logits`` of the target, or of what it makes of it, the loss is that of the noisy labels,
    while accuracies and confusion matrices of the same step see the true ones. See
    :class:`~lightning_noise.losses.modes.LabelLoss` for what it follows; a focal loss on top of ``cross_entropy`` is not exact.
    ``via="sample"`` puts hard labels that are drawn into the batch, for any loss, and ``via="batch"`` probabilities of shape
    :math:`(N, K, *)`, for a loss that takes them; then the metrics of the training step see these, and callbacks that change
    the loss of the same target come after it in the list. Floating-point labels are yes or no, each for itself.

    It acts from the start of the training step to the end of the backward pass, never in validation, test and prediction.
    At level 0 nothing is done. The draws differ from process to process.

    Label noise wants a level that decays: a model whose labels are smooth to the end says less than it knows, on noisy data
    above all. Noise in the target of a regression, such as :class:`~lightning_noise.noise.Gaussian`, regularises nothing in
    expectation: to the squared error it adds the constant :math:`\sigma^2`.

    It logs ``noise/<name>/level``.

    Args:
        noise: A label noise such as :class:`~lightning_noise.labels.FlipLabels`; or for a regression a noise such as
            :class:`~lightning_noise.noise.Gaussian`, which goes into the batch.
        level: The amount: a number, a schedule, a callable from :class:`~lightning_noise.schedules.Progress` to a number, or an
            :class:`~lightning_noise.AdaptiveLevel`.
        target: Which leaf of the batch: an index, a key or a dotted path; left out, the second element of a sequence.
        via: Where the noise goes; left out, ``"loss"`` for :class:`~lightning_noise.labels.SmoothLabels` and ``"sample"`` for
            the others.
        index: Which leaf of the batch holds the index of each sample in the data set. With it the draw of a sample is the
            same in every epoch and process, as of data that were labelled wrongly once; what has changed at a level stays
            changed at every higher one.
        ignore_index: The label that marks what does not count; it is left alone, and as probabilities it is a row of zeros.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error.

    Raises:
        TypeError: The target does not suit the noise.
        ValueError: A level, label or path is wrong, the criterion smooths labels already, or the first step with noise
            computed no such loss of the target.

    Example:
        >>> from lightning_noise import labels, schedules
        >>> TargetNoise(labels.FlipLabels(n_classes=10), schedules.Linear(0.2, 0.0)).via
        'sample'
    """

    def __init__(
        self,
        noise: LabelNoise | Noise | NoiseFunction,
        level: AnyLevel,
        *,
        target: int | str | None = None,
        via: Via | None = None,
        index: int | str | None = None,
        ignore_index: int = -100,
        seed: int | None = None,
        name: str = "target",
    ):
        self.noise = noise if isinstance(noise, LabelNoise) else as_noise(noise)
        if isinstance(self.noise, Noise):
            if via is not None or index is not None:
                raise ValueError(f"via and index are for labels; {self.noise.title} goes into the batch")
        elif via is None:
            via = "loss" if isinstance(noise, SmoothLabels) else "sample"
        super().__init__(level, noise=self.noise, target=target, via=via, seed=seed, name=name)
        self.index = index
        self.ignore_index = ignore_index

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        path = find_target(batch, self.target)
        target = get(batch, path)
        if not isinstance(self.noise, LabelNoise):
            check_floating(batch, [path], self.noise)
        elif self._draws or self.via == "batch":
            self.noise.check(target[target != self.ignore_index])
        if self.index is not None:
            index = select_one(batch, self.index, "index")
            if index.shape != target.shape[:1] or index.is_floating_point():
                raise ValueError(f"index must be an integer for each of the {len(target)} samples, got {describe(index)}")

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        path = find_target(batch, self.target)
        target = get(batch, path)
        if not isinstance(self.noise, LabelNoise):
            yield perturb_batch(batch, [path], self.noise, level, key)
        elif self.via == "loss":
            with self._mode(self.noise, batch, target, level, key) as mode:
                yield batch
            perturbation.effective = mode.applied
        elif self.via == "batch":
            soft = self.noise.probabilities(target, level, ignore_index=self.ignore_index)
            yield modify(batch, [path], lambda leaf, path: soft)
        else:
            hard = self._sampled(self.noise, batch, target, level, key)
            yield modify(batch, [path], lambda leaf, path: hard)

    @property
    def _draws(self) -> bool:
        return self.via == "sample" or not isinstance(self.noise, SmoothLabels)

    def _mode(self, noise: LabelNoise, batch: Any, target: Tensor, level: float, key: Key) -> LabelLoss:
        if self._draws:
            return NoisyLabelLoss(target, self._sampled(noise, batch, target, level, key))
        return SmoothedLabelLoss(target, torch.tensor(level, dtype=torch.float64))

    def _sampled(self, noise: LabelNoise, batch: Any, target: Tensor, level: float, key: Key) -> Tensor:
        change, partner = (self._uniform(batch, target, key, part) for part in ("change", "partner"))
        return noise.sample(target, level, change=change, partner=partner, ignore_index=self.ignore_index)

    def _uniform(self, batch: Any, target: Tensor, key: Key, part: str) -> Tensor:
        if self.index is None:
            return torch.rand(target.shape, generator=(key / part).generator(target.device), device=target.device)
        seed, name, *_ = key.coordinates  # and neither epoch, batch nor process
        return Key((seed, name, part)).uniform(select_one(batch, self.index, "index"), target.shape)


class LabelSmoothing(TargetNoise):
    r"""Smooths the labels where the loss is computed, and leaves them alone everywhere else.

    .. math:: L = (1 - \epsilon) \, L(y) + \frac{\epsilon}{K} \sum_{k=1}^{K} L(k)

    It is the short form of :class:`TargetNoise` with :class:`~lightning_noise.labels.SmoothLabels`. The loss is that of
    ``torch.nn.functional.cross_entropy(..., label_smoothing=level)``, with class weights, ignored positions and reductions, of
    a module that knows nothing of it; accuracies of the training step see the true labels, and validation is not touched.
    Binary labels, one or many, become :math:`(1 - \epsilon) y + \epsilon / 2`.

    Let the level decay, as ``schedules.Linear(0.2, 0.0)`` does: it keeps most of the gain in accuracy, while a model that is
    smoothed to the end is as a rule worse calibrated than one that never was, unless that was far too confident. Or let it
    move, by ``AdaptiveLevel(SignedGap())`` of :mod:`lightning_noise.rules`, to where confidence is accuracy.

    Args:
        level: The amount :math:`\epsilon \in [0, 1]`: a number, a schedule, a callable or an adaptive level.
        target: Which leaf of the batch; left out, the second element of a sequence.
        name: The name in the log.

    Raises:
        ValueError: The criterion smooths labels already, or the first step with smoothing computed no loss of the target.

    References:
        Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), https://arxiv.org/abs/1512.00567

        When Does Label Smoothing Help? (Müller et al., 2019), https://arxiv.org/abs/1906.02629

    Example:
        >>> from lightning_noise import schedules
        >>> LabelSmoothing(schedules.Linear(0.2, 0.0)).via
        'loss'
    """

    def __init__(self, level: AnyLevel, *, target: int | str | None = None, name: str = "smoothing"):
        super().__init__(SmoothLabels(), level, target=target, name=name)
