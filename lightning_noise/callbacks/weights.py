"""Noise in the weights of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_noise.callbacks.adaptive import AdaptiveLevel, AnyLevel
from lightning_noise.callbacks.base import NoiseCallback, check_parameters_are_whole
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import check_relative
from lightning_noise.perturb.weights import GradientOf, PerturbedParameters, RelativeTo
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["WeightNoise"]

_HIGH = 1.0  # for a start; 0.3 to 0.6 standard deviations of the weights are usual


class WeightNoise(NoiseCallback):
    r"""Perturbs the weights for the forward and backward pass, and restores them before they are updated.

    .. math:: w_{t+1} = w_t - \eta \, g_t, \quad
        g_t = \nabla L(\tilde w_t) \;\; \text{or} \;\; (\partial \tilde w_t / \partial w_t)^\top \nabla L(\tilde w_t),
        \quad \tilde w_t = \text{noise}(w_t, \sigma u)

    In expectation additive noise adds :math:`\frac{\sigma^2}{2} \operatorname{tr} H` to the loss, where :math:`H` is its
    Hessian: training looks for flat minima, and the model bears wrong weights, such as those of analog hardware. To a linear
    model with a squared error it does nothing. In terms of :math:`\tilde w_t` it is, exactly, gradient descent with injected
    noise whose increments are anticorrelated (Anti-PGD); the restored weights are those without the last injection.

    ``relative`` gives the level in units :math:`u` of each tensor: its standard deviation, its largest absolute value, or, for
    each of its rows, the norm of the row, which is then that of its noise, too (filter normalisation). Multiplicative are
    :class:`~lightning_noise.noise.Speckle` and :class:`~lightning_noise.noise.DropConnect`. Of these and of relative noise
    the gradient at the noisy weights, ``"straight_through"``, is not that of the expected loss: for a linear model with a
    squared error multiplicative noise has no effect that way, and layers before a normalisation grow. ``"reparametrized"`` is
    exact for every noise: the gradient of each process gets the factor :math:`\partial \tilde w / \partial w` before
    gradients are averaged over processes. Where a loss contains gradients it is exact for multiplicative noise, and refused
    for relative noise.

    The noise is in the weights from the start of the training step to the end of the backward pass. In manual optimization it
    stays to the end of the step; each update is one of the restored weights, after which those of its optimizer get another
    draw. Weights come back bit for bit, from a copy, also after an exception. Validation, test, checkpoints, also those that
    are saved within a step, and what callbacks average are clean. Within a step only ``on_before_zero_grad``,
    ``on_before_backward`` and, of callbacks that are listed before this one, ``on_after_backward`` see noisy weights; in
    manual optimization also their ``on_before_optimizer_step``, and with scaled gradients that of all. What the training step
    itself reads is noisy, such as the weights for a teacher that it averages: do that in ``on_train_batch_end``, and there,
    too, clip weights or load others. What the step writes to noisy weights would be lost, and is refused where torch takes
    note of it, which it does not of what is written to ``.data``. The running statistics of batch normalisation are those of
    the noisy passes, as with dropout.

    Each micro-batch of an accumulation and each process has a draw of its own, and each evaluation of a closure in one update
    the same. It takes as much memory as the parameters that are perturbed, and a few times the largest of them.

    It logs ``noise/<name>/level`` and ``noise/<name>/ratio``, the norm of the noise over that of the weights. Where the level
    is in the units of the weights, they can grow until the noise is small beside them: there is a warning when a tensor has
    twice the norm that it had when the noise began in this fit.

    Weights want a level that rises, as ``schedules.Linear(0.0, 0.5, until=0.5)`` does: at equal mean dose it gained a point of
    accuracy under noise over a constant or falling one. An :class:`~lightning_noise.AdaptiveLevel` should start at 0, and there
    is a warning where it starts above 1: at chance a model cannot tell that there is too much.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian`. A row of the tensor is what it takes for a sample.
        level: The amount: a number, a schedule, a callable from :class:`~lightning_noise.schedules.Progress` to a number, or an
            :class:`~lightning_noise.AdaptiveLevel`.
        relative: The unit of the level, for noises that are additive: ``"std"``, where 0.3 to 0.6 is usual, ``"max"``,
            ``"filter"``, or ``None``, the unit of the weights.
        params: Which parameters: a pattern of their names, in which ``*`` stands for any characters, or a list of these. Left
            out: those of two or more dimensions that are trained when the batch starts, so neither biases nor normalisations.
            One that several modules share gets noise once.
        gradient: ``"straight_through"``, or ``"reparametrized"``, which draws once more in the backward pass.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error.

    Raises:
        TypeError: A gradient is sparse and ``"reparametrized"``.
        ValueError: A level or pattern is wrong, nothing is selected, ``relative`` is given for a noise that is not additive,
            the strategy has no whole parameters, as FSDPStrategy and DeepSpeedStrategy, or the training step writes to
            weights with noise in them.

    References:
        The Effects of Adding Noise During Backpropagation Training on a Generalization Performance (An, 1996),
        https://doi.org/10.1162/neco.1996.8.3.643

        Regularization of Neural Networks using DropConnect (Wan et al., 2013),
        https://proceedings.mlr.press/v28/wan13.html

        Anticorrelated Noise Injection for Improved Generalization (Orvieto et al., 2022), https://arxiv.org/abs/2202.02831

    Example:
        >>> from lightning_noise import noise
        >>> callback = WeightNoise(noise.Gaussian(), 0.3, relative="std")
        >>> callback.name
        'weight'
    """

    one_draw_per_batch: ClassVar[bool] = True

    def __init__(
        self,
        noise: Noise | NoiseFunction,
        level: AnyLevel | None = None,
        *,
        relative: RelativeTo | None = None,
        params: str | Sequence[str] | None = None,
        gradient: GradientOf = "straight_through",
        seed: int | None = None,
        name: str = "weight",
    ):
        self.noise = as_noise(noise)
        super().__init__(level, noise=self.noise, seed=seed, name=name)
        if relative not in (None, "std", "max", "filter"):
            raise ValueError(f"relative must be 'std', 'max', 'filter' or None, got {relative!r}")
        if gradient not in ("straight_through", "reparametrized"):
            raise ValueError(f"gradient must be 'straight_through' or 'reparametrized', got {gradient!r}")
        check_relative(self.noise, relative)
        if isinstance(level, AdaptiveLevel) and level.start > _HIGH:
            warnings.warn(
                f"the level of {name!r} starts at {level.start:g}, at which weights may learn nothing before it has come down; "
                "start at 0, from where it rises as far as the model bears it",
                stacklevel=2,
            )
        self.relative: RelativeTo | None = relative
        self.params = params
        self.gradient: GradientOf = gradient
        self._noisy: PerturbedParameters | None = None  # during a perturbation
        self._first_norms: dict[str, Tensor] | None = {}  # of the weights, when the noise began; None after a warning

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        noisy = self._of(pl_module, 0.01, Key(("trial",)))
        if self.noise.is_known:  # a function may count its calls
            try:
                noisy.enter()
            finally:
                noisy.exit()

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        check_parameters_are_whole(context.trainer, self.name)
        # of held-out data the samples have draws of their own, but the model is one
        self._noisy = self._of(context.module, level, key.everywhere if context.is_probe else key)
        try:
            self._noisy.enter()
            if context.is_logged:
                perturbation.stats["ratio"] = self._measure(context.trainer, self._noisy)
            yield batch
            if not context.is_probe:
                self._noisy.check_untouched(self._noisy.names)
        finally:
            self._noisy.exit()
            self._noisy = None

    def pause(self, parameters: list[Parameter]) -> None:
        if self._noisy is not None:
            self._noisy.check_untouched(parameters)
            self._noisy.restore(parameters)

    def resume(self, parameters: list[Parameter], *, updated: bool) -> None:
        if self._noisy is not None:
            if updated:
                self._noisy.updated(parameters)
            self._noisy.perturb(parameters)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parameters_are_whole(trainer, self.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_norms = {}

    def _of(self, pl_module: LightningModule, level: float, key: Key) -> PerturbedParameters:
        return PerturbedParameters(
            pl_module, self.params, self.noise, level, key, relative=self.relative, gradient=self.gradient
        )

    def _measure(self, trainer: Trainer, noisy: PerturbedParameters) -> Tensor:
        """Returns the ratio of the norm of all noise to the norm of all weights."""
        norms = noisy.norms()
        noise, weights = (torch.stack(of_tensors).norm() for of_tensors in zip(*norms.values(), strict=True))
        if noisy.is_absolute:  # other noise grows with the weights
            self._warn_of_growth(trainer, {name: weight for name, (_, weight) in norms.items()})
        return noise / weights

    def _warn_of_growth(self, trainer: Trainer, norms: dict[str, Tensor]) -> None:
        if self._first_norms is None:
            return
        first = self._first_norms = norms | self._first_norms
        # what began at 0 has not grown to escape
        grown = [name for name, norm in norms.items() if norm > 2 * first[name] > 0]
        if grown:
            self._first_norms = None
            if trainer.is_global_zero:
                more = f" and of {len(grown) - 1} more" if len(grown) > 1 else ""
                warnings.warn(
                    f"the norm of {grown[0]!r}{more} is more than twice what it was when the noise {self.name!r} began, so the "
                    "noise is a smaller share of the weights; relative='std' keeps the share, and weight decay the weights",
                    stacklevel=2,
                )
