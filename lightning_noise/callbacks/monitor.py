"""The base class of the monitors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from lightning_noise._checks import check_counts, check_name, plain
from lightning_noise._usage import Guided
from lightning_noise.batch import Selector
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.callbacks.inputs import AnyProbe, InputNoise, as_probes, name_noises
from lightning_noise.evaluation.conditions import Conditions, Levels
from lightning_noise.loop import description, loggers
from lightning_noise.loop.dispatch import Replaying
from lightning_noise.loop.internals import Callback, class_of_callbacks, launches_copies
from lightning_noise.loop.monitored import check_followed_keys
from lightning_noise.loop.progress import check_held_out_data, check_validation
from lightning_noise.loop.terminal import follow_passes, say
from lightning_noise.masks import Mask
from lightning_noise.noise import Gaussian, Impulse, Noise, NoiseFunction
from lightning_noise.perturb.inputs import Clip, validate_clip
from lightning_noise.perturb.normalization import Numbers

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Monitor", "Noises"]

_KEYS_IN_PIPE = 170  # of up to 370 bytes in 64 KiB
Item = TypeVar("Item")
Noises = Noise | NoiseCallback | Sequence[AnyProbe] | Mapping[str, AnyProbe] | NoiseFunction


class Monitor(Guided, Callback, ABC):
    """Base of the callbacks that evaluate a module under noise in validations and tests.

    The arguments are those of :class:`~lightning_noise.RobustnessMonitor`.

    Attributes:
        condition_name: What a condition is called.
        pass_name: What a condition costs for each batch, in the plural.
        is_certificate: Whether the noise is that of a certificate, which takes neither ``relative`` nor ``clip``.
    """

    condition_name: ClassVar[str] = "condition"
    pass_name: ClassVar[str] = "forward passes"
    is_certificate: ClassVar[bool] = False

    def __init__(
        self,
        noises: Noises | None,
        levels: Levels | None,
        *,
        inputs: Selector | None,
        clip: Clip | None,
        relative: Literal["std"] | None,
        every_n_epochs: int,
        max_batches: int | None,
        seed: int,
        name: str,
        n_draws: int = 1,
        mask: Mask | None = None,
        mean: Numbers | None = None,
        std: Numbers | None = None,
    ):
        check_counts(n_draws=n_draws, every_n_epochs=every_n_epochs, max_batches=max_batches)
        self.noises = name_noises([Gaussian(), Impulse()] if noises is None else noises, type(self).__name__)
        options = {"relative": relative, "clip": clip, "mask": mask, "mean": mean, "std": std}
        self._probes = as_probes(self.noises, inputs=inputs, **options)
        levels = plain(levels)
        self._given = self._probes if isinstance(levels, Sequence) else levels or {}  # noises whose levels are not severities
        self.conditions = Conditions(self._probes, levels, n_draws=n_draws, seed=seed)
        self.levels = self.conditions.levels
        self.inputs = plain(inputs)
        self.clip = validate_clip(clip)
        self.mask = mask
        self.mean = plain(mean)
        self.std = plain(std)
        self.relative: Literal["std"] | None = relative
        self.every_n_epochs = every_n_epochs
        self.max_batches = max_batches
        self.seed = seed
        self.name = check_name(name)

    @property
    def evaluates_in_fit(self) -> bool:
        """Whether the validations of a fit are evaluated, and not only those that are called for."""
        return True

    @abstractmethod
    def charts(self) -> dict[str, loggers.Chart]:
        """Returns the charts of TensorBoard by title."""

    @abstractmethod
    def count_keys(self) -> int:
        """Returns how many keys each validation logs, as far as is known."""

    @abstractmethod
    def logged_keys(self) -> dict[str, list[str]]:
        """Returns the keys that are logged in a fit; see :class:`~lightning_noise.loop.monitored.LogsKeys`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if sum(monitor.name == self.name for monitor in class_of_callbacks(trainer, Monitor)) > 1:
            raise ValueError(f"two monitors are named {self.name!r}, and their keys would mix; give one of them another name=…")
        self._is_laid_out = False
        for name, probe in self._probes.items():
            if isinstance(probe, InputNoise):
                probe.expect(max(self.levels[name]), are_severities=name not in self._given, is_sigma=self.is_certificate)
        self._check_pipe(trainer)
        if stage == "fit":
            say(trainer, self._describe_cost())

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_pipe(trainer, n_others=len(trainer.callback_metrics))  # the sanity check logs no keys of monitors

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.evaluates_in_fit:
            check_validation(trainer, type(self).__name__, self.every_n_epochs)
        description.log_hyperparameters(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.evaluates_in_fit:
            check_held_out_data(trainer, type(self).__name__)
        check_followed_keys(trainer)
        description.log_configuration(trainer, self)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        description.show_hyperparameters(trainer, self)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._check_pipe(trainer)
        if not trainer.sanity_checking and not self._is_laid_out:
            self._is_laid_out = loggers.log_layout(trainer, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for probe in self._probes.values():  # an interrupt may have kept one from ending
            probe.teardown(trainer, pl_module, stage)

    def _is_due(self, trainer: Trainer) -> bool:
        """Returns whether to evaluate in this validation or test. The sanity check is neither."""
        if trainer.state.fn != "fit":
            return True
        is_now = self.evaluates_in_fit and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return is_now and not trainer.sanity_checking

    def _describe_cost(self) -> str:
        n = self._n_passes
        cost = f"{type(self).__name__} {self.name!r}: {n - 1} {self.condition_name}{'s' * (n > 2)} = {n} {self.pass_name} of"
        often = "" if self.every_n_epochs == 1 else f", every {self.every_n_epochs} epochs"
        if self.max_batches is None:
            return f"{cost} each validation batch{often}; bound the cost with max_batches=…"
        if self.max_batches == 1:
            return f"{cost} the first validation batch{often}"
        return f"{cost} each of the first {self.max_batches} validation batches{often}"

    @property
    def _n_passes(self) -> int:
        """The number of passes over a batch: one without noise, and one for each condition."""
        return 1 + len(list(self.conditions))

    def _follow(self, trainer: Trainer, batch_idx: int, passes: Iterable[Item]) -> Iterator[Item]:
        """Yields the passes over a batch, and moves the trainer's bar, which all monitors share."""
        found = [each for each in class_of_callbacks(trainer, Monitor) if each is self or each._is_due(trainer)]
        monitors = sorted(found, key=lambda monitor: isinstance(monitor, Replaying))
        step = 1 / (1 + sum(monitor._n_passes for monitor in monitors))  # the user's step is a pass, too
        begin = batch_idx + step * sum(monitor._n_passes for monitor in monitors[: monitors.index(self)])
        return follow_passes(trainer, passes, begin=begin, step=step)

    def _check_pipe(self, trainer: Trainer, n_others: int = 0) -> None:
        """Raises a ValueError if the run would hang because of its many keys.

        Processes that a strategy spawns or forks hand all keys to the main process through a pipe. The main process empties the
        pipe only after they have ended.

        Args:
            trainer: The trainer.
            n_others: The number of keys that others are known to log.
        """
        if not launches_copies(trainer):
            return
        n_keys = n_others + sum(monitor.count_keys() for monitor in class_of_callbacks(trainer, Monitor))
        if max(n_keys, len(trainer.callback_metrics)) > _KEYS_IN_PIPE:
            raise ValueError(
                f"the run logs {max(n_keys, len(trainer.callback_metrics))} keys, but with strategies that spawn or fork, "
                f"Lightning hands keys to the main process through a pipe that holds about {_KEYS_IN_PIPE}, and the run would "
                "hang; use strategy='ddp', or fewer noises, levels or metrics"
            )
