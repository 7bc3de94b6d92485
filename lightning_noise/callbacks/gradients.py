"""Noise in the gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_noise._tensor import at_least_float32
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback, check_parameters_are_whole
from lightning_noise.loop.dispatch import parameters_of, wrap_closure
from lightning_noise.loop.internals import copy_all_, norms_of, plain_name, structure_of, subtract_all, takes_scaled_gradients
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.noise.draws import draw_normal
from lightning_noise.perturb.groups import Group, are_same, groups_of
from lightning_noise.perturb.sharding import gradient_of, is_sharded, local, whole, with_local
from lightning_noise.perturb.weights import check_dense, check_embeddings_are_dense
from lightning_noise.rng import Key
from lightning_noise.schedules import InverseTime

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

__all__ = ["GradientNoise"]

_MANY = 2**22  # numbers: torch draws a few in the same way on all GPUs


class GradientNoise(NoiseCallback):
    r"""Perturbs the gradients of each update.

    .. math:: g_t \leftarrow \text{noise}(g_t, s_t)

    The callback perturbs the gradients of an optimizer once per update: after the backward pass, the average over ranks and the
    removal of the loss scale, and before the trainer clips gradients. In manual optimization ``clip_gradients`` comes before
    the noise. Under accumulation, the level is that of the last batch. Nothing is undone, because the next update has new
    gradients. Level 0 and a gradient of ``None`` are no-ops.

    An optimizer that steps without Lightning gets noise right before its update, as in ``optimizer.optimizer.step()`` or in a
    hook of the backward pass. Then an average over ranks and a clipping in the code of the module may come before the noise.
    Only optimizers of torch that update parameters of the module in a training step count.

    The draws are the same on all ranks, so that replicas stay equal; each shard of a parameter has its own draw. An elementwise
    noise perturbs gradients of one dtype together, up to four million elements at a time. So the draw of a gradient depends on
    which trained parameters the optimizer has. All evaluations of a closure in one update share a draw, as in LBFGS. In a
    manual step, each update has its own draw, at the level of the batch.

    The log keys are ``train_noise/<name>/level`` and ``train_noise/<name>/ratio``, the norm of the noise over the norm of the
    gradient. Both norms are over all parameters of the last update of the batch.

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
        ValueError: If a level is wrong, the strategy has no whole gradients (FSDPStrategy, DeepSpeedStrategy), the
            devices of the ranks draw different numbers, an optimizer steps without Lightning while Lightning scales the loss,
            or no optimizer steps in the first epoch with noise.

    References:
        Adding Gradient Noise Improves Learning for Very Deep Networks (Neelakantan et al., 2015),
        https://arxiv.org/abs/1511.06807

    Example:
        >>> from lightning_noise import noise
        >>> GradientNoise(noise.Gaussian()).level
        InverseTime(start=0.1, exponent=0.275, timescale=1.0, begin=0.0, unit='step')
    """

    can_probe: ClassVar[bool] = False
    judged_by_epoch: ClassVar[bool] = True  # a step that accumulates gradients has no update

    def __init__(
        self, noise: Noise | NoiseFunction, level: AnyLevel | None = None, *, seed: int | None = None, name: str = "gradient"
    ):
        self.noise = as_noise(noise, "GradientNoise({}, {})")
        super().__init__(InverseTime(0.1) if level is None else level, noise=self.noise, seed=seed, name=name)
        self._trainer: Trainer | None = None  # from the start of the training to the end of the fit
        self._handles: list[RemovableHandle] = []
        self._has_acted = False  # in this fit
        self._layouts: MutableMapping[Optimizer, _Layout] = {}  # of the last update of each optimizer
        # parameters by their id: those that the hook of Lightning has perturbed and that are not updated yet, and how often
        # optimizers have updated each without Lightning in this batch
        self._perturbed: set[int] = set()
        self._updates: Counter[int] = Counter()
        self._updating: list[Optimizer] = []  # nested, outermost first

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        check_embeddings_are_dense(pl_module)
        if self.noise.is_known:  # a function may count its calls
            for parameter in pl_module.parameters():
                if parameter.requires_grad and not is_lazy(parameter):
                    Key(("trial",)).apply(self.noise, torch.zeros_like(local(parameter)), 0.01)

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        perturbation.effective = None if self._has_acted else False
        yield batch  # the gradients do not exist yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parameters_are_whole(trainer, self.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        _check_draws_agree(trainer, self.name)
        self._trainer, self._has_acted, self._layouts = trainer, False, WeakKeyDictionary()
        # global hooks, because a module may have optimizers that Lightning does not know, or call them without Lightning
        self._handles = [
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._perturbed, self._updating, self._updates = set(), [], Counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.last_perturbation is not None:
            # no rank: all ranks must add the same noise
            key = Key((self._seed, self.name, trainer.global_step, "gradient"))
            self._perturb(optimizer, key, _scale(trainer, optimizer))
            self._perturbed |= _ids_of(optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        for handle in self._handles:
            handle.remove()
        self._trainer, self._handles, self._layouts = None, [], {}
        self._perturbed, self._updating, self._updates = set(), [], Counter()

    def describe_no_effect(self, where: str) -> str:
        return (
            f"no optimizer of torch updated the parameters in {where}, so {self.name!r} changed no gradient; return an "
            "optimizer from configure_optimizers, or let a torch.optim.Optimizer make the updates"
        )

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._acts_on(optimizer):
            return None
        if optimizer in self._updating:  # its last update raised an exception
            del self._updating[self._updating.index(optimizer) :]
        self._updating.append(optimizer)
        own, outer = _ids_of(optimizer), self._updating[:-1]
        if not all(own.isdisjoint(_ids_of(each)) for each in outer):  # an optimizer within another shares its gradients
            return None
        self._updates |= dict.fromkeys(own, 1 + max(map(self._updates.__getitem__, own)))
        with_noise = wrap_closure(args, kwargs, lambda closure: partial(self._evaluate, closure, optimizer))
        if with_noise is None:
            self._perturb_unless_done(optimizer)
        return with_noise

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer in self._updating:
            self._updating.remove(optimizer)

    def _evaluate(self, closure: Callable[[], Any], optimizer: Optimizer) -> Any:
        outer, self._updating = self._updating, []  # other optimizers may step in the closure
        loss = closure()
        self._updating = outer
        with torch.no_grad():
            self._perturb_unless_done(optimizer)
        return loss

    def _acts_on(self, optimizer: Optimizer) -> bool:
        """Returns whether the optimizer updates parameters of the module in a training step with noise."""
        if self._trainer is None or self.current_level == 0:
            return False
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        in_step = batches.started > batches.processed  # not in on_train_batch_end, nor between epochs
        _, parameters = structure_of(self._trainer.lightning_module)
        return in_step and not _ids_of(optimizer).isdisjoint(map(id, parameters))

    def _perturb_unless_done(self, optimizer: Optimizer) -> None:
        """Perturbs the gradients if Lightning has not called its hook for them."""
        own, trainer = _ids_of(optimizer), self._trainer
        if trainer is None or own <= self._perturbed:
            self._perturbed -= own
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"{self.name!r} cannot know the loss scale of gradients that an optimizer takes without Lightning; type "
                "optimizer.step(closure) on the optimizer of self.optimizers(), or Trainer(precision='bf16-mixed')"
            )
        update = max(map(self._updates.__getitem__, own))
        key = Key((self._seed, self.name, trainer.current_epoch, self._batch_idx, "gradient", update))
        self._perturb(optimizer, key, getattr(optimizer, "grad_scale", None))  # set by a scaler of the module

    @torch.no_grad()
    def _perturb(self, optimizer: Optimizer, key: Key, scale: Tensor | None) -> None:
        if (perturbation := self.last_perturbation) is None or self._trainer is None:
            return
        signal = error = torch.zeros(())
        layout, gradients = self._lay_out(self._trainer.lightning_module, optimizer)
        for group in layout.groups:
            if not (names := [name for name in group.names if name in gradients]):
                continue
            found = [gradients[name] for name in names]
            parts = found if group.is_flat else [local(gradient) for gradient in found]
            elements = group.empty(parts[0])
            if len(names) < len(group.names):
                elements.zero_()
            clean = group.split(elements, names)
            copy_all_(clean, parts)
            noisy = group.split(self._noisy(elements, group.key(key), scale), names)
            copy_all_(parts, noisy)
            if self._is_logged:
                signal = signal + _energy(found, clean)
                error = error + _energy(found, subtract_all(map(at_least_float32, noisy), map(at_least_float32, clean)))
            perturbation.effective = self._has_acted = True
        if self._is_logged:
            perturbation.stats["ratio"] = (error / signal).sqrt()

    def _lay_out(self, pl_module: LightningModule, optimizer: Optimizer) -> tuple[_Layout, dict[str, Tensor]]:
        """Returns the layout of the last update, or a new one if anything has changed, and the gradients by name."""
        parameters = parameters_of(optimizer)
        gradients = [p.grad if type(p) is Parameter else gradient_of(p) for p in parameters]
        # a trained parameter without a gradient stands for it, so that the draws of the others do not depend on the batch
        tensors = [
            g if g is not None else p if p.requires_grad and not is_lazy(p) else None
            for p, g in zip(parameters, gradients, strict=True)
        ]
        structure, _ = structure_of(pl_module)
        structure += parameters
        kinds: list[Any] = [self.noise.elementwise, self.noise.independent_rows]
        kinds += [
            None if x is None else (x.dtype, x.device, x.layout == torch.strided and (x.shape, x.stride())) for x in tensors
        ]
        layout = self._layouts.get(optimizer)
        if layout is None or kinds != layout.kinds or not are_same(structure, layout.structure):
            names = {parameter: plain_name(name) for name, parameter in pl_module.named_parameters()}
            # a parameter of no module is named by its position in the optimizer
            labels = [names.get(parameter, str(i)) for i, parameter in enumerate(parameters)]
            named = {label: x for label, x in zip(labels, tensors, strict=True) if x is not None}
            for label, x in named.items():
                check_dense(label, x)
            layout = self._layouts[optimizer] = _Layout(structure, kinds, labels, list(groups_of(named, self.noise)))
        return layout, {label: g for label, g in zip(layout.labels, gradients, strict=True) if g is not None}

    def _noisy(self, gradient: Tensor, key: Key, scale: Tensor | None) -> Tensor:
        if scale is None:
            return key.apply(self.noise, gradient, self.current_level)
        noisy = key.apply(self.noise, gradient / scale, self.current_level) * scale
        # the scaler skips the update if it finds inf or NaN, which some noises would remove
        return torch.where(gradient.isfinite(), noisy, gradient)


class _Layout(NamedTuple):
    """The names and groups of the gradients of an optimizer, and the objects and values that they depend on."""

    structure: list[Any]
    kinds: list[Any]
    labels: list[str]
    groups: list[Group]


def _check_draws_agree(trainer: Trainer, name: str) -> None:
    """Raises a ValueError if replicas would drift apart, because their devices draw different numbers from the same key."""
    if trainer.world_size == 1 or any(map(is_sharded, trainer.lightning_module.parameters())):
        return  # each shard has its own draw
    x = torch.empty(_MANY, device=trainer.strategy.root_device)
    drawn = draw_normal(x, Key(("trial",)).generator(x.device)).view(torch.int32).sum().item()
    if not trainer.strategy.reduce_boolean_decision(trainer.strategy.broadcast(drawn) == drawn):
        raise ValueError(
            f"{name!r} must add the same noise on all ranks, but their devices draw different numbers from the same seed; use "
            "GPUs of one model, and if some ranks warn that torch draws the noise, do there what the warning says"
        )


def _ids_of(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """Returns the loss scale if it is still in the gradients."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not takes_scaled_gradients(optimizer):  # only a fused optimizer unscales in its own step
        return None
    return scaler.scale(torch.ones((), device=trainer.strategy.root_device))  # get_scale() would synchronize


def _energy(gradients: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Returns the sum of squares of tensors like the gradients, over all shards, from the parts that this rank holds."""
    if any(map(is_sharded, gradients)):
        return whole(at_least_float32(with_local(gradients[0], parts[0])).abs().square().sum())
    return torch.stack(norms_of(map(at_least_float32, parts))).square().sum()
