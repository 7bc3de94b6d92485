"""Noise in the weights of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter

from lightning_noise._checks import plain
from lightning_noise.callbacks.adaptive import AdaptiveLevel, AnyLevel
from lightning_noise.callbacks.base import NoiseCallback, check_parameters_are_whole
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import check_relative
from lightning_noise.perturb.weights import GradientOf, PerturbedParameters, RelativeTo, Selection, check_embeddings_are_dense
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["WeightNoise"]

_STRONGEST = 3.0  # norms of the weights; a level in standard deviations of the weights is below 1


class WeightNoise(NoiseCallback):
    r"""Perturbs the weights for the forward and backward pass of each batch.

    .. math:: w_{t+1} = w_t - \eta \, g_t, \quad
        g_t = \nabla L(\tilde w_t) \;\; \text{or} \;\; (\partial \tilde w_t / \partial w_t)^\top \nabla L(\tilde w_t),
        \quad \tilde w_t = \text{noise}(w_t, \sigma u)

    To leading order, additive noise adds :math:`\frac{\sigma^2}{2} \operatorname{tr} H` to the expected loss, where :math:`H`
    is the Hessian. Training then looks for flat minima, and the model tolerates errors in its weights, such as those of analog
    hardware. The noise has no expected effect on a linear model with a squared error. The update of the noisy weights
    :math:`\tilde w_t` is exactly gradient descent with anticorrelated noise (Anti-PGD); the restored weights lack the last
    injection.

    ``relative`` sets the unit :math:`u` of the level for each tensor: the standard deviation, the largest absolute value, or,
    for each row, the norm (filter normalization). At level 1 the noise of a row then has the norm of the row.

    The gradient at the noisy weights, ``"straight_through"``, is not the gradient of the expected loss if the noise is relative
    or multiplicative (:class:`~lightning_noise.noise.Speckle`, :class:`~lightning_noise.noise.DropConnect`). Multiplicative
    noise then has no effect on a linear model with a squared error, and layers before a normalization grow.
    ``"reparametrized"`` is exact for every noise: each rank multiplies its gradient by :math:`\partial \tilde w / \partial w`
    before the average over ranks. If a loss contains gradients, this is exact for multiplicative noise and an error for
    relative noise.

    The weights are noisy from the start of the training step to the end of the backward pass. In manual optimization they are
    noisy to the end of the step, except during updates; after an update, the weights of its optimizer get a new draw. Weights
    are restored bit for bit from a copy, even if the step raises an error. Validation, test, averages that callbacks take, and
    checkpoints see clean weights, even if a checkpoint is saved within a step.

    Two hooks see noisy weights: ``on_before_zero_grad`` and ``on_before_backward``. In manual optimization, so does
    ``on_before_optimizer_step`` of callbacks that precede this callback, or of all callbacks if gradients are scaled, and
    ``on_after_backward``. Batch normalization collects its running statistics under the noise, as with dropout.

    The training step reads noisy weights, in evaluation mode, too: pseudo-labels that the step makes under ``eval()`` are those
    of the noisy weights. ``state_dict()`` of any part is clean, so for clean labels type
    ``torch.func.functional_call(self.net, self.net.state_dict(), (x,))``. Average a teacher, clip weights and load weights in
    ``on_train_batch_end``. It is an error if the training step writes to noisy weights, because restoring would lose the write.
    torch does not count writes to ``.data`` in place; they are found in the first step and in each step that is logged. There
    is a warning if the first step writes to parameters that are not trained, because their averages would hold noise.

    The noise is in the parameters. A weight that is computed from parameters, by pruning (``weight_orig``) or a
    parametrization, follows the noise and is computed again after the step. Complex parameters get complex noise.

    Each micro-batch of an accumulation and each rank has its own draw. All evaluations of a closure in one update share a draw.
    An elementwise noise, such as :class:`~lightning_noise.noise.Gaussian`, perturbs parameters of one dtype together, up to
    four million elements at a time. So the draw of a parameter depends on which other parameters are perturbed.

    The memory cost is one copy of the perturbed parameters, and a few copies of the largest parameter or of four million
    elements. With ``"reparametrized"``, the backward pass needs up to two more copies of the small parameters.

    The log keys are ``train_noise/<name>/level`` and ``train_noise/<name>/ratio``, the norm of the noise over the norm of the
    weights. If the level is in the units of the weights, the weights can outgrow the noise. There is a warning if the norm of a
    tensor has doubled since the noise began in this fit, or if the ratio is above 3. A tensor that began at 0 may grow. If all
    weights began at 0, the ratio counts in the second half of the run. The norms are taken every ``log_every_n_steps`` steps.

    Let the level rise, as in ``schedules.Linear(0.0, 0.5, until=0.5)``, so that the model learns the task first. The mean level
    matters more than the shape. An :class:`~lightning_noise.AdaptiveLevel` should start at 0. A start above 1 is a warning,
    because a model at chance cannot show that the level is too high.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian`. The noise takes each row of a tensor for a sample.
        level: The amount of noise: a number, a schedule, a callable or an :class:`~lightning_noise.AdaptiveLevel`. Optional for
            a callback that only monitors use.
        relative: The unit of the level of an additive noise: ``"std"``, for which 0.3 to 0.6 is usual, ``"max"`` or
            ``"filter"``. Default: the unit of the weights.
        params: A name pattern of parameters or a list of patterns; ``*`` matches any characters. Default: all parameters with
            at least two dimensions that are trained when the batch starts, so no biases or normalizations. A parameter that
            several modules share gets noise once.
        gradient: ``"straight_through"``, or ``"reparametrized"``, which draws the noise again in the backward pass.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages.

    Raises:
        TypeError: If a gradient is sparse and ``gradient="reparametrized"``, or a parameter is complex and the noise real.
        ValueError: If a level or pattern is wrong, no parameter is selected, a parameter has no shape yet, ``relative`` is set
            for a noise that is not additive, the strategy has no whole parameters (FSDPStrategy, DeepSpeedStrategy), or the
            training step writes to noisy weights.

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

    place: ClassVar[str] = "weights"
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
        self.noise = as_noise(noise, "WeightNoise({}, {})")
        if relative is not None:
            self.usual_limit = 1.0  # with "std" and "filter", noise as strong as the weights
        super().__init__(level, noise=self.noise, relative=relative, seed=seed, name=name)
        if gradient not in ("straight_through", "reparametrized"):
            raise ValueError(f"gradient must be 'straight_through' or 'reparametrized', got {gradient!r}")
        check_relative(self.noise, relative, units=("std", "max", "filter"))
        if isinstance(level, AdaptiveLevel) and level.start > 1:  # 0.3 to 0.6 standard deviations of the weights are usual
            warnings.warn(
                f"the level of {name!r} starts at {level.start:g}, and the model may learn nothing until the level has fallen; "
                "type AdaptiveLevel(start=0.0), so that the level rises as far as the model tolerates",
                stacklevel=2,
            )
        self.relative: RelativeTo | None = relative
        self.params = plain(params)
        self.gradient: GradientOf = gradient
        self._noisy: PerturbedParameters | None = None  # during a perturbation
        self._selection: Selection | None = None  # of the last training step
        self._first_norms: dict[str, float] | None = {}  # when the noise began; None after a warning
        self._is_watched = True  # until the first step of a fit has ended

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        if self.gradient == "reparametrized":
            check_embeddings_are_dense(pl_module)
        noisy = self._perturbed_parameters(pl_module, 0.01, Key(("trial",)))
        if self.noise.is_known:  # a function may count its calls
            try:
                noisy.enter()
            finally:
                noisy.exit()

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        if context.is_probe:  # a fit has checked it
            check_parameters_are_whole(context.trainer, self.name)
        # the key of a probe differs between samples and ranks, but all of them evaluate the same model
        noisy = self._perturbed_parameters(context.module, level, key.everywhere if context.is_probe else key)
        self._noisy = noisy
        if not context.is_probe:
            self._selection = noisy.selection
        is_watched = self._is_watched and not context.is_probe
        frozen = noisy.frozen_norms() if is_watched else {}
        try:
            noisy.enter()
            if context.is_logged:
                perturbation.stats["ratio"] = self._measure(noisy, context.trainer)
            yield batch
            if not context.is_probe:
                noisy.check_untouched(by_value=is_watched or context.is_logged)
                if is_watched:
                    self._is_watched = False
                    self._warn_of_averages(frozen, noisy.frozen_norms())
        finally:
            noisy.exit()
            self._noisy = None

    def pause(self, parameters: list[Parameter]) -> None:
        if self._noisy is not None:
            self._noisy.check_untouched(parameters)
            self._noisy.pause(parameters)

    def resume(self, parameters: list[Parameter], *, updated: bool) -> None:
        if self._noisy is not None:
            if updated:
                self._noisy.count_update(parameters)
            self._noisy.perturb(parameters)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parameters_are_whole(trainer, self.name)
            self._first_norms, self._is_watched = {}, True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self._noisy is not None:  # an interrupt kept it from ending
            self._noisy.exit()
        self._noisy = self._selection = None

    def _perturbed_parameters(self, module: LightningModule, level: float, key: Key) -> PerturbedParameters:
        return PerturbedParameters(
            module, self.params, self.noise, level, key, relative=self.relative, gradient=self.gradient, last=self._selection
        )

    def _measure(self, noisy: PerturbedParameters, trainer: Trainer) -> Tensor:
        """Returns the norm of all noise over the norm of all weights."""
        names, noise, weights = noisy.norms()
        ratio = noise.norm() / weights.norm()
        if noisy.is_absolute and self._first_norms is not None:  # relative and multiplicative noise grow with the weights
            norms = dict(zip(names, weights.tolist(), strict=True))
            self._first_norms = first = norms | self._first_norms
            progress = self._clock.progress(trainer, trainer.fit_loop.epoch_loop.batch_idx)
            # weights that all began at 0 are small at first
            if ratio.item() > _STRONGEST and (any(first.values()) or (progress.fraction or 0.0) >= 0.5):
                self._warn_of_strength(ratio.item())
            else:
                self._warn_of_growth(norms, first)
        return ratio

    def _warn_of_strength(self, ratio: float) -> None:
        self._first_norms = None
        rank_zero_warn(
            f"the noise {self.name!r} is {ratio:.2g} times as strong as the weights, and its level is in the units of the "
            "weights; type relative='std' for a level in units of their standard deviation, for which 0.3 to 0.6 is usual"
        )

    def _warn_of_growth(self, norms: dict[str, float], first: dict[str, float]) -> None:
        # weights that began at 0 grow in any training
        grown = [name for name, norm in norms.items() if norm > 2 * first[name] > 0]
        if grown:
            self._first_norms = None
            rank_zero_warn(
                f"the norms of {len(grown)} parameters, such as {grown[0]!r}, have more than doubled since the noise "
                f"{self.name!r} began; type relative='std' to keep the ratio of noise to weights, or use weight decay"
            )

    def _warn_of_averages(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        written = [name for name, norm in before.items() if name in after and not torch.equal(norm, after[name])]
        if written:
            rank_zero_warn(
                f"the training step has written to {written[0]!r}, which is not trained, while other weights held the noise "
                f"{self.name!r}; if it averages weights, as a teacher does, average them in on_train_batch_end"
            )
