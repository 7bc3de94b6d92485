"""Noise in what the modules of a model return."""

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

from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.loop.internals import plain_name, register_forward_hook, runs_backward
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, Shot, as_noise
from lightning_noise.patterns import match
from lightning_noise.perturb.inputs import check_relative
from lightning_noise.perturb.outputs import perturb_output
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ActivationNoise", "Call", "OutputCallback", "name_modules"]


@dataclass(frozen=True)
class _InForce:
    """What the hooks of a callback act by, as long as a perturbation lasts."""

    batch: Any
    level: float
    key: Key
    calls: Counter[str]  # of each module in this step so far, those in the backward pass left out
    earlier: Counter[str]  # those of them that were for other batches of the step
    ids: dict[str, Any] = field(default_factory=dict)  # the tokens of the first call of each embedding


@dataclass(frozen=True)
class Call:
    """A call of a module while a perturbation is in force, with all that its noise depends on."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    index: int  # which call of the module for this batch it is, from 0
    force: _InForce

    @property
    def key(self) -> Key:
        return self.force.key / "module" / self.name / self.index


class OutputCallback(NoiseCallback):
    """Changes what some modules return, by forward hooks that do nothing unless a perturbation is in force.

    Args:
        level: The amount.
        modules: The patterns of their names; left out, the callback chooses.
        seed: The seed of the draws.
        name: The name in the log.
        noise: The noise, if the callback has one.
    """

    judged_by_epoch: ClassVar[bool] = True  # one of several networks, or an auxiliary one, need not run in each step

    def __init__(
        self,
        level: AnyLevel | None,
        *,
        noise: Noise | None = None,
        modules: str | Sequence[str] | None,
        seed: int | None,
        name: str,
    ):
        super().__init__(level, noise=noise, seed=seed, name=name)
        self.modules = modules
        self._handles: list[RemovableHandle] = []
        self._in_force: _InForce | None = None

    @abstractmethod
    def noisy(self, call: Call) -> Any:
        """Returns what the module returned with noise in it; neither the output nor its tensors are written to."""

    def selected(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Returns the modules whose outputs are changed, by name."""
        return match(name_modules(pl_module), self.modules, "module")  # type: ignore[arg-type]

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        before = self._in_force
        calls = Counter() if before is None else before.calls  # a step that fetches two batches is within both
        with ExitStack() as stack:
            stack.callback(setattr, self, "_in_force", before)
            if context.is_probe:  # a transformer in evaluation would make nested tensors of a batch with padding
                stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
            if not self._handles:  # a probe of a monitor, and no callback of this fit
                stack.callback(self._remove)
                self._register(context.module)
                # what was compiled without hooks would pass them over
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._in_force = _InForce(batch, level, key, calls, earlier=Counter(calls))
            yield batch
        perturbation.effective = bool(calls)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        self._register(pl_module)
        # what an earlier run has compiled knows of no hooks, and torch does not look again (pytorch #117758)
        torch.compiler.reset()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove()

    def after_forward(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Returns what the module returns instead of its output, or ``None`` where that stays."""
        if (force := self._in_force) is None:
            return None
        call = Call(name, module, inputs, output, self._index(name, force), force)
        return self.noisy(call) if force.level else None

    @staticmethod
    def _index(name: str, force: _InForce) -> int:
        """Which call for the batch this is; with activation checkpointing the backward pass repeats one of the forward pass."""
        if not runs_backward():
            force.calls[name] += 1
            return force.calls[name] - force.earlier[name] - 1
        if force.calls[name] > 1:
            raise ValueError(
                f"the backward pass computes {name!r} again, by activation checkpointing, and it is not known which of the "
                f"{force.calls[name]} calls of this step it is; select modules that are called once in a step"
            )
        return 0

    def _register(self, pl_module: LightningModule) -> None:
        for name, module in self.selected(pl_module).items():
            self._handles.append(register_forward_hook(module, _Hook(self, name)))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def describe_no_effect(self, where: str) -> str:
        return (
            f"{where} called none of the modules that {self.name!r} changes the output of, so nothing changed. Only a call "
            "module(x) counts, not module.forward(x) or a use of its weights; select other modules with modules=…"
        )


class ActivationNoise(OutputCallback):
    r"""Perturbs what modules of the network return, in training.

    Where a selected module returns :math:`h`, what called it gets :math:`\text{noise}(h, \text{level})`. Of a tuple, list, dict
    or dataclass, as an LSTM or attention returns it, each floating-point tensor has a draw of its own; one that occurs twice is
    the same noisy tensor in both places. What has no axis, such as a finished loss, and what is inside another object, such
    as a distribution or a cache, gets no noise. The tensors that the module made stay as they are. Gradients flow through the
    noise: multiplicative noise scales them, and with ``relative`` they know of the standard deviation. A module that is called
    twice in a step draws twice, and activation checkpointing gets the draw of the forward pass again.

    It acts from the start of the training step to the end of the backward pass, never in validation, test and prediction. At
    level 0 nothing is done. The draws differ from process to process. The modules have forward hooks from the start of the fit
    to its end; a module that is put in the place of one of them during the fit has none. In a compiled model these break the
    graph, so ``fullgraph=True`` does not go with them, and what was compiled before is compiled again.

    As a probe of a :class:`~lightning_noise.RobustnessMonitor` each sample has a draw of its own, so the first axis of what is
    perturbed must be that of the samples. Meanwhile transformers do not take their fast path of evaluation, so of these level 0
    equals the clean prediction up to rounding.

    It logs ``noise/<name>/level``.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian` or :class:`~lightning_noise.noise.Speckle`.
        level: The amount: a number, a schedule, a callable from :class:`~lightning_noise.schedules.Progress` to a number, or an
            :class:`~lightning_noise.AdaptiveLevel`.
        modules: The name of a module as in ``named_modules()``, a pattern of names, or a list of these; ``*`` stands for any
            characters, dots too. Names are the same whether a module is compiled or not. Where a container and its parts are
            selected, both get noise, as with ``*``. The modules of a parametrization cannot be selected.
        relative: The level is in units of the standard deviation of each row of the first axis, for noises that are additive.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error.

    Raises:
        TypeError: A module that is selected returns no floating-point tensor, or one that is nested or sparse.
        ValueError: A pattern matches no module, an epoch with noise called none of the modules, the noise has no gradient, the
            level is relative to rows of one number, a module that is called several times in a step is computed again by
            activation checkpointing, or the first axis of what a probe perturbs is not that of the samples.

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
        if modules is None:
            raise TypeError("ActivationNoise needs the names of modules; type modules='*' for all of them")
        self.noise = as_noise(noise)
        check_relative(self.noise, relative)
        if isinstance(noise, Shot):
            raise ValueError(
                "the counts of Shot have no gradient, so that what comes before would not learn; use noise.Speckle() instead"
            )
        super().__init__(level, noise=self.noise, modules=modules, seed=seed, name=name)
        self.relative: Literal["std"] | None = relative

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        """What the modules return is not known before they run."""

    def noisy(self, call: Call) -> Any:
        return perturb_output(call.output, self.noise, call.force.level, call.key, module=call.name, relative=self.relative)


class _Hook:
    """A forward hook that asks a callback; in a copy of the module, or in one that was saved and loaded, it does nothing."""

    def __init__(self, callback: OutputCallback | None = None, name: str = ""):
        self.callback = callback
        self.name = name

    # a scheduled level must not be compiled, and a generator cannot be
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.callback is None:
            return None
        return self.callback.after_forward(self.name, module, (*args, *kwargs.values()), output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def name_modules(pl_module: LightningModule) -> dict[str, nn.Module]:
    """Returns the modules by name, without the root and without parametrizations, which compute parameters."""
    named: dict[str, nn.Module] = {}
    for name, module in pl_module.named_modules():
        named.setdefault(plain_name(name), module)  # of a compiled module and what it wraps the first, which is the outer one
    del named[""]
    return {name: module for name, module in named.items() if "parametrizations" not in name.split(".")}
