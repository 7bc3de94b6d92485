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

    It acts once for each update, on the gradients of the optimizer that steps: after the backward pass, the mean over the
    processes and the removal of the loss scale of mixed precision, and before the trainer clips the gradients; in manual
    optimization ``clip_gradients`` comes before it. Under accumulation that is once for all batches of the update, at the
    level of the last. Nothing is undone: the next update begins with new gradients. At level 0, and where a gradient is
    ``None``, nothing is done.

    The draws are the same on all processes, or else the replicas would part; shards of one parameter have draws of their own.
    All evaluations of a closure in one update, as of LBFGS, get the same draw, and the updates of several optimizers in one
    manual step different ones, at the level of their batch.

    It logs ``noise/<name>/level`` and ``noise/<name>/ratio``, the norm of the noise over that of the gradient, both over all
    parameters of the last update of the batch.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian`.
        level: The amount: a number, a schedule, or a callable from :class:`~lightning_noise.schedules.Progress` to a number.
            For Gaussian noise it is the standard deviation, in the units of the gradient. Left out, it is ``InverseTime(0.1)``,
            whose variance is :math:`\eta / (1 + t)^{0.55}` after :math:`t` updates, with :math:`\eta = 0.01`, the smallest of
            the three of the source; the others are ``InverseTime(0.3**0.5)`` and ``InverseTime(1.0)``.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error.

    Raises:
        TypeError: A gradient is sparse.
        ValueError: A level is wrong, the strategy keeps its gradients in flat or partitioned buffers, as FSDPStrategy and
            DeepSpeedStrategy, or in manual optimization an optimizer steps past Lightning, where there is no hook.

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
        self,
        noise: Noise | NoiseFunction,
        level: AnyLevel | None = None,
        *,
        seed: int | None = None,
        name: str = "gradient",
    ):
        self.noise = as_noise(noise)
        super().__init__(InverseTime(0.1) if level is None else level, noise=self.noise, seed=seed, name=name)

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        if self.noise.is_known:  # a function may count its calls
            for parameter in pl_module.parameters():
                if parameter.requires_grad and not is_lazy(parameter):
                    Key(("trial",)).apply(self.noise, torch.zeros_like(local(parameter)), 0.01)

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        yield batch  # the gradients are not there yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parameters_are_whole(trainer, self.name)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._perturbations:
            perturbation = self._perturbations[-1]
            perturbation.effective = True
            # no rank: all ranks must add the same noise
            key = Key((self._seed, self.name, trainer.global_step)) / "gradient"
            ratio = self._perturb(_gradients(pl_module, optimizer), key, _scale(trainer, optimizer))
            if ratio is not None:
                perturbation.stats["ratio"] = ratio

    def resume(self, parameters: list[Parameter], *, updated: bool) -> None:
        if not self._perturbations:
            return
        perturbation = self._perturbations[-1]
        if updated and not perturbation.effective:
            raise ValueError(self.describe_no_effect("an update"))
        perturbation.effective = None  # each update is judged by itself

    def describe_no_effect(self, where: str) -> str:
        return (
            f"an optimizer has stepped past Lightning, so {self.name!r} did nothing to its gradients; "
            "step an optimizer of self.optimizers(), without use_pl_optimizer=False"
        )

    @torch.no_grad()
    def _perturb(self, gradients: dict[str, Tensor], key: Key, scale: Tensor | None) -> Tensor | None:
        """Perturbs the gradients, and returns the ratio of the noise to them if it is logged."""
        signal = error = torch.zeros(())
        for name, gradient in gradients.items():
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
        # what is not finite tells the scaler to skip the update, and some noises would remove it
        return torch.where(gradient.isfinite(), noisy, gradient)


def _gradients(pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor]:
    """The gradients that the optimizer will use, each once, by the name of the parameter."""
    names = {parameter: plain_name(name) for name, parameter in pl_module.named_parameters()}
    # a parameter that no module has is known by its place in the optimizer
    named = {names.get(parameter, str(i)): gradient_of(parameter) for i, parameter in enumerate(parameters_of(optimizer))}
    found = {name: gradient for name, gradient in named.items() if gradient is not None}
    for name, gradient in found.items():
        check_dense(name, gradient)
    return found


def _scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """The factor that is still in the gradients: a fused optimizer removes the loss scale itself, in its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not takes_scaled_gradients(optimizer):
        return None
    return scaler.scale(torch.ones((), device=trainer.strategy.root_device))  # get_scale() would wait for the device


def _energy(x: Tensor) -> Tensor:
    """The sum of the squares, over all shards."""
    return whole(x.float().square().sum())
