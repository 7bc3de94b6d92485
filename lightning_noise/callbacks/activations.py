"""Noise in the outputs of modules."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric, MetricCollection

from lightning_noise._checks import plain
from lightning_noise.batch import get, leaves
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.evaluation.positions import data_share
from lightning_noise.loop.internals import is_loss, original_module, plain_name, register_forward_hook, runs_backward
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.patterns import as_list, match
from lightning_noise.perturb.inputs import check_relative
from lightning_noise.perturb.outputs import find_activations, perturb_output
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ActivationNoise", "Call", "OutputCallback", "find_modules", "name_modules"]


@dataclass(frozen=True)
class _Active:
    """The state that the hooks of a callback read during a perturbation."""

    batch: Any
    level: float
    key: Key
    calls: Counter[str]  # of each module in the forward passes of this step
    earlier: Counter[str]  # of these, the calls for other batches of the step
    is_probe: bool = False
    ids: dict[str, Any] = field(default_factory=dict)  # the tokens of the first call of each embedding

    def count_call(self, name: str) -> int:
        """Counts a call, and returns its index for this batch."""
        if not runs_backward():
            self.calls[name] += 1
            return self.calls[name] - self.earlier[name] - 1
        if self.calls[name] > 1:
            raise ValueError(
                f"activation checkpointing computes {name!r} again in the backward pass, and cannot know which of the "
                f"{self.calls[name]} calls to repeat; type modules=… to select modules that are called once in a step"
            )
        return 0  # activation checkpointing repeats the only call, and must get the same draw


@dataclass(frozen=True)
class Call:
    """A call of a module during a perturbation."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    index: int  # among the calls of the module for this batch
    active: _Active

    @property
    def key(self) -> Key:
        return self.active.key.at("module", self.name, self.index)


class OutputCallback(NoiseCallback):
    """Base of the callbacks that perturb the outputs of modules.

    As with dropout, the noise acts only on modules in training mode. A frozen backbone that stays in evaluation mode gets no
    noise, and neither do pseudo-labels that the training step makes under ``eval()``. Monitors probe modules in any mode.

    The forward hooks are registered from the start of a fit to its end, and do nothing outside a perturbation. A module that
    replaces a selected module during the fit has no hook. At level 0 the graph of a compiled model stays whole. Above level 0
    the hooks break the graph, so ``fullgraph=True`` fails. The first noise of a fit compiles the model again.
    ``torch.export.export`` and ``torch.jit.trace`` work outside a training step; ``torch.jit.script`` refuses hooks.
    """

    place: ClassVar[str] = "outputs"
    judged_by_epoch: ClassVar[bool] = True  # an auxiliary network, or one network of several, need not run in each step

    def __init__(
        self,
        level: AnyLevel | None,
        *,
        noise: Noise | None = None,
        relative: str | None = None,
        seed: int | None,
        name: str,
    ):
        super().__init__(level, noise=noise, relative=relative, seed=seed, name=name)
        self._handles: list[RemovableHandle] = []
        self._is_compiled_with_hooks = False
        self._active: _Active | None = None

    @abstractmethod
    def select_modules(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Returns the modules whose outputs are perturbed, by name."""

    @abstractmethod
    def perturb_call(self, call: Call) -> Any:
        """Returns the noisy output of a call, out of place."""

    def takes(self, name: str, inputs: tuple[Any, ...], output: Any) -> bool:
        """Returns whether the output of a module can be perturbed, or else is left alone."""
        return True

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        before = self._active
        calls = Counter() if before is None else before.calls  # the perturbations of a step with two batches are nested
        with ExitStack() as stack:
            stack.callback(setattr, self, "_active", before)
            if context.is_probe:  # in evaluation, the fast path of a transformer turns a padded batch into nested tensors
                stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
            if not self._handles:  # a probe that is not a callback of the trainer
                stack.callback(self._remove)
                self._register(context.trainer, context.module)
                # code that was compiled without the hooks would not call them
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            elif not self._is_compiled_with_hooks:
                # nor does code that was compiled before the fit: torch does not check for new hooks (pytorch #117758)
                torch.compiler.reset()
                self._is_compiled_with_hooks = True
            self._active = _Active(batch, level, key, calls, Counter(calls), context.is_probe)
            yield batch
        perturbation.effective = bool(calls)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._remove()
        self._register(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove()

    @property
    def is_active(self) -> bool:
        """Whether a perturbation is open."""
        return self._active is not None

    @torch.compiler.disable  # a compiled hook would keep its first level, and torch cannot compile a generator
    def after_forward(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Returns the noisy output, or ``None`` to keep the output."""
        active = self._active
        if active is None or not (active.is_probe or original_module(module).training) or not self.takes(name, inputs, output):
            return None
        is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if is_traced or torch.compiler.is_compiling():  # an export, because compiled code runs this eagerly
            raise RuntimeError(
                f"the noise {self.name!r} would become part of the exported graph; type module.eval() before the export, or "
                "export the module outside the training step"
            )
        call = Call(name, module, inputs, output, active.count_call(name), active)
        return self.perturb_call(call) if active.level else None

    def _register(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if data_share(trainer)[1] < trainer.world_size:
            raise ValueError(
                f"{self.name!r} cannot work with tensor parallelism, in which a rank may hold a part of an output; "
                "type ModelParallelStrategy(tensor_parallel_size=1), or perturb inputs or weights"
            )
        for name, module in self.select_modules(pl_module).items():
            self._handles.append(register_forward_hook(module, _Hook(self, name)))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_compiled_with_hooks = [], False

    def describe_no_effect(self, where: str) -> str:
        return (
            f"{where} called no module that {self.name!r} perturbs, so nothing changed. Only a call module(x) in training mode "
            "counts, not module.forward(x) or a use of its weights; type modules=… to select other modules, or module.train() "
            "before the fit if an earlier run has left the module in evaluation mode"
        )


class ActivationNoise(OutputCallback):
    r"""Perturbs the outputs of modules in training.

    If a selected module returns :math:`h`, its caller receives :math:`\text{noise}(h, \text{level})`. In a tuple, list, dict or
    dataclass, such as the output of an LSTM or of attention, each floating-point tensor has its own draw; a tensor that occurs
    twice remains a single tensor. A tensor without dimensions, such as a finished loss, gets no noise; neither does the content
    of any other object, such as a distribution or a cache. Metrics and losses are not activations: patterns skip the metrics of
    torchmetrics, the losses of torch, modules whose class is named ``…Loss`` or ``…Criterion``, and everything that these hold.
    A pattern with ``*`` also skips modules that return nothing that can take noise, and modules that cut the gradient, as a
    metric of one's own does. The noise is out of place. Gradients flow through the noise: multiplicative noise scales them, and
    with ``relative`` they include the gradient of the standard deviation. Two calls of a module in a step have two draws.
    Activation checkpointing repeats the draw of the forward pass.

    The noise acts from the start of the training step to the end of the backward pass, never in validation, test and
    prediction. Level 0 is a no-op. The draws differ between ranks. The log key is ``train_noise/<name>/level``. See
    :class:`~lightning_noise.callbacks.activations.OutputCallback` about hooks and compiled models.

    As a probe of a :class:`~lightning_noise.RobustnessMonitor`, each sample has its own draw, so the first dimension of the
    output must be the batch dimension. The fast path of transformers is off under a probe, so at level 0 their prediction
    equals the clean prediction only up to rounding.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian` or :class:`~lightning_noise.noise.Speckle`.
        level: The amount of noise: a number, a schedule, a callable or an :class:`~lightning_noise.AdaptiveLevel`. Optional for
            a callback that only monitors use.
        modules: A name as in ``named_modules()``, a pattern or a list of patterns; ``*`` matches any characters, dots included.
            A compiled module keeps its name. If a pattern matches a container and its parts, as ``*`` does, all get noise. The
            modules of a parametrization cannot be selected.
        relative: With ``"std"``, the level of an additive noise is in units of the standard deviation of each row of the first
            dimension.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages.

    Raises:
        TypeError: If a module that is selected by its full name returns no floating-point tensor, or if a selected module
            returns a nested or sparse tensor.
        ValueError: If a pattern matches no module or names a metric or loss, a selected module is scripted or part of a metric,
            an epoch with noise calls no selected module, the noise has no gradient, or the level is relative to rows of a
            single number. If activation checkpointing repeats a module that is called several times in a step. If the first
            dimension of an output is not the batch dimension under a probe. If ``torch.vmap`` hides the samples from a noise
            that needs them.

    References:
        Explicit Regularisation in Gaussian Noise Injections (Camuto et al., 2020), https://arxiv.org/abs/2007.07368

        Dropout: A Simple Way to Prevent Neural Networks from Overfitting (Srivastava et al., 2014), section 10, for
        multiplicative noise, https://jmlr.org/papers/v15/srivastava14a.html

    Example:
        >>> from lightning_noise import noise, schedules
        >>> callback = ActivationNoise(noise.Speckle(), schedules.Linear(0.0, 0.5), modules=["encoder.*", "head"])
        >>> callback.name
        'activation'
    """

    def __init__(
        self,
        noise: Noise | NoiseFunction,
        level: AnyLevel | None = None,
        modules: str | Sequence[str] | None = None,
        *,
        relative: Literal["std"] | None = None,
        seed: int | None = None,
        name: str = "activation",
    ):
        self.noise = as_noise(noise, f"ActivationNoise({{}}, {{}}, {modules or '*'!r})")
        if modules is None:
            raise TypeError("ActivationNoise needs the names of modules; type modules='*' for all modules")
        check_relative(self.noise, relative)
        if self.noise.cuts_gradient:
            raise ValueError(f"{self.noise.title} cuts the gradient, so earlier layers would not learn; type noise.Speckle()")
        super().__init__(level, noise=self.noise, relative=relative, seed=seed, name=name)
        self.modules = plain(modules)
        self.relative: Literal["std"] | None = relative

    def select_modules(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        return find_modules(pl_module, self.modules)

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        self.select_modules(pl_module)  # the outputs are not known before the modules run

    def takes(self, name: str, inputs: tuple[Any, ...], output: Any) -> bool:
        if name in as_list(self.modules):
            return True
        found = [get(output, path) for path in find_activations(output, self.noise)]
        # a module that cuts the gradient, such as a metric of the user, returns no activations
        is_cut = torch.is_grad_enabled() and not any(leaf.requires_grad for leaf in found)
        return bool(found) and not (is_cut and any(leaf.requires_grad for _, leaf in leaves(inputs)))

    def perturb_call(self, call: Call) -> Any:
        level, relative = call.active.level, self.relative
        return perturb_output(call.output, self.noise, level, call.key, module=call.name, relative=relative)


class _Hook:
    """A forward hook that calls a callback."""

    def __init__(self, callback: OutputCallback | None = None, name: str = ""):
        self.callback = callback
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # torch compiles this line and guards it: there is a whole graph without noise, and a broken graph with noise
        if self.callback is not None and self.callback.is_active:
            return self.callback.after_forward(self.name, module, (*args, *kwargs.values()), output)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:  # in a copied or loaded module, the hook does nothing
        return _Hook, ()

    @property
    def __name__(self) -> str:  # which torch.jit.script asks for
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of ActivationNoise and EmbeddingNoise; type "
            "torch.export.export(module, inputs) or torch.jit.trace(module, inputs), or script the module after the fit"
        )


def find_modules(pl_module: LightningModule, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Returns the modules of the network that match a pattern.

    Raises:
        ValueError: If a pattern matches no module or names a metric or loss, or if a module that matches is scripted or part of
            a metric.
    """
    for name, judge in _find_judges(pl_module).items():
        if any(f"{pattern}.".startswith(f"{name}.") for pattern in as_list(patterns)):
            raise ValueError(
                f"{name!r} is a metric or loss, {type(judge).__name__}, whose values are not activations; "
                "type modules=… to select modules of the network"
            )
    found = match(name_modules(pl_module), patterns, "module")
    held = {module: name for name, judge in _find_judges(pl_module).items() if _is_metric(judge) for module in judge.modules()}
    for name, module in found.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"the module {name!r} is scripted and takes no hooks; type modules=… to select other modules, or call "
                "torch.jit.script after the fit"
            )
        if module in held:
            raise ValueError(
                f"the metric {held[module]!r} holds the module {name!r}, and would see its noise; give the metric a copy, "
                "copy.deepcopy(…), or type modules=… to select other modules"
            )
    return found


def name_modules(pl_module: LightningModule) -> dict[str, nn.Module]:
    """Returns the modules of the network by name: without the root, parametrizations, metrics and losses."""
    named: dict[str, nn.Module] = {}
    for name, module in pl_module.named_modules(memo=set(_find_judges(pl_module).values())):
        named.setdefault(plain_name(name), module)  # a compiled module comes before the module that it wraps
    del named[""]
    return {name: module for name, module in named.items() if "parametrizations" not in name.split(".")}


def _find_judges(pl_module: LightningModule) -> dict[str, nn.Module]:
    """Returns the metrics and losses that the module holds, by name."""
    named = {plain_name(name): module for name, module in pl_module.named_modules()}
    return {name: module for name, module in named.items() if name and (_is_metric(module) or _is_loss(module))}


def _is_metric(module: nn.Module) -> bool:
    return isinstance(original_module(module), Metric | MetricCollection)


def _is_loss(module: nn.Module) -> bool:
    loss = original_module(module)
    return is_loss(loss) or type(loss).__name__.endswith(("Loss", "Criterion"))  # the usual names of losses that users write
