"""Noise in the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback, check_parameters_are_whole
from lightning_noise.loop.dispatch import parameters_of
from lightning_noise.loop.internals import plain_name, takes_scaled_gradients
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.sharding import gradient_of, local, parameter_key, whole
from lightning_noise.perturb.weights import check_dense
from lightning_noise.rng import Key
from lightning_noise.schedules import InverseTime

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["GradientNoise"]


class GradientNoise(NoiseCallback):
    r"""Perturbs the gradients of each update.

    .. math:: g_t \leftarrow \text{noise}(g_t, s_t)

    The callback perturbs the gradients of an optimizer once per update: after the backward pass, the average over ranks and the
    removal of the loss scale, and before the trainer clips gradients. In manual optimization ``clip_gradients`` comes before
    the noise. Under accumulation, the level is that of the last batch. Nothing is undone, because the next update has new
    gradients. Level 0 and a gradient of ``None`` are no-ops.

    The draws are the same on all ranks, so that replicas stay equal; each shard of a parameter has its own draw. All
    evaluations of a closure in one update share a draw, as in LBFGS. In a manual step, each update has its own draw, at the
    level of the batch.

    The log keys are ``noise/<name>/level`` and ``noise/<name>/ratio``, the norm of the noise over the norm of the gradient.
    Both norms are over all parameters of the last update of the batch.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian`.
        level: The amount of noise: a number, a schedule or a callable. For Gaussian noise, the standard deviation in the units
            of the gradient. Default: ``InverseTime(0.1)``, whose variance after :math:`t` updates is
            :math:`\eta / (1 + t)^{0.55}` with :math:`\eta = 0.01`. The paper also uses ``InverseTime(0.3**0.5)`` and
            ``InverseTime(1.0)``.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages.

    Raises:
        TypeError: If a gradient is sparse.
        ValueError: If a level is wrong, the strategy has no whole gradients (FSDPStrategy, DeepSpeedStrategy), or a manual step
            calls an optimizer that Lightning does not wrap and whose update calls no hook.

    References:
        Adding Gradient Noise Improves Learning for Very Deep Networks (Neelakantan et al., 2015),
        https://arxiv.org/abs/1511.06807

    Example:
        >>> from lightning_noise import noise
        >>> GradientNoise(noise.Gaussian()).level
        InverseTime(start=0.1, exponent=0.275, timescale=1.0, begin=0.0, unit='step')
    """

    can_probe: ClassVar[bool] = False

    def __init__(
        self, noise: Noise | NoiseFunction, level: AnyLevel | None = None, *, seed: int | None = None, name: str = "gradient"
    ):
        self.noise = as_noise(noise)
        super().__init__(InverseTime(0.1) if level is None else level, noise=self.noise, seed=seed, name=name)

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        if self.noise.is_known:  # a function may count its calls
            for parameter in pl_module.parameters():
                if parameter.requires_grad and not is_lazy(parameter):
                    Key(("trial",)).apply(self.noise, torch.zeros_like(local(parameter)), 0.01)

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        yield batch  # the gradients do not exist yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parameters_are_whole(trainer, self.name)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if (perturbation := self.last_perturbation) is not None:
            perturbation.effective = True
            # no rank: all ranks must add the same noise
            key = Key((self._seed, self.name, trainer.global_step)) / "gradient"
            ratio = self._perturb(_gradients(pl_module, optimizer), key, _scale(trainer, optimizer))
            if ratio is not None:
                perturbation.stats["ratio"] = ratio

    def resume(self, parameters: list[Parameter], *, updated: bool) -> None:
        if (perturbation := self.last_perturbation) is not None:
            if updated and not perturbation.effective:
                raise ValueError(self.describe_no_effect("an update"))
            perturbation.effective = None  # each update must call the hook anew

    def describe_no_effect(self, where: str) -> str:
        return (
            f"an optimizer stepped without the hooks of Lightning, so {self.name!r} did not perturb its gradients; "
            "type self.optimizers().step(), without use_pl_optimizer=False"
        )

    @torch.no_grad()
    def _perturb(self, gradients: dict[str, Tensor], key: Key, scale: Tensor | None) -> Tensor | None:
        """Perturbs the gradients, and returns the ratio if it is logged."""
        signal = error = torch.zeros(())
        for name, gradient in gradients.items():
            check_dense(name, gradient)
            clean = gradient.clone() if self._is_logged else None
            part = local(gradient)
            part.copy_(self._noisy(part, parameter_key(key, name, gradient), scale))
            if clean is not None:
                signal, error = signal + _energy(clean), error + _energy(gradient.float() - clean.float())
        return (error / signal).sqrt() if self._is_logged else None

    def _noisy(self, gradient: Tensor, key: Key, scale: Tensor | None) -> Tensor:
        if scale is None:
            return key.apply(self.noise, gradient, self.current_level)
        noisy = key.apply(self.noise, gradient / scale, self.current_level) * scale
        # the scaler skips the update if it finds inf or NaN, which some noises would remove
        return torch.where(gradient.isfinite(), noisy, gradient)


def _gradients(pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the gradients of the optimizer, by the name of their parameter."""
    names = {parameter: plain_name(name) for name, parameter in pl_module.named_parameters()}
    # a parameter of no module is named by its position in the optimizer
    named = {names.get(parameter, str(i)): gradient_of(parameter) for i, parameter in enumerate(parameters_of(optimizer))}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def _scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """Returns the loss scale if it is still in the gradients."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not takes_scaled_gradients(optimizer):  # only a fused optimizer unscales in its own step
        return None
    return scaler.scale(torch.ones((), device=trainer.strategy.root_device))  # get_scale() would synchronize


def _energy(x: Tensor) -> Tensor:
    """Returns the sum of squares over all shards."""
    return whole(x.float().square().sum())
