"""The base class of the monitors that predict held-out batches themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_noise.callbacks.monitor import Monitor
from lightning_noise.evaluation.engine import Pass, Reading
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.loop.internals import n_evaluation_loaders
from lightning_noise.loop.perturbation import Context
from lightning_noise.loop.returning import Returning
from lightning_noise.loop.terminal import say
from lightning_noise.loop.trial import held_out_batches

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["PredictingMonitor"]


class PredictingMonitor(Monitor, Returning):
    """Base of the monitors that predict each batch before the user's step, and write files at the end.

    A subclass sets ``dataloader_idx`` and ``_predictor``.
    """

    dataloader_idx: int
    _predictor: Predictor
    _outcome = ""  # to be printed at the end of the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        Returning.enable()
        self._is_tried = False
        self._predictor.forget()
        self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.evaluates_in_fit and not self._is_tried:  # without a sanity check
            with held_out_batches(trainer, self.dataloader_idx) as batches:
                self._check_loader(trainer)
                for batch in batches:
                    self.on_validation_batch_start(trainer, pl_module, batch, 0, self.dataloader_idx)
                self._end_trial(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._begin()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # before the step, which may write to the batch
        context = Context(trainer, pl_module, is_probe=True)
        if self._is_due(trainer):
            self._evaluate(context, batch, batch_idx, dataloader_idx)
        elif trainer.sanity_checking and self.evaluates_in_fit:
            self._is_tried = True
            self._try(self._pass.read(context, batch, batch_idx, dataloader_idx, self.conditions.trials().perturb))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_sanity_check_end(trainer, pl_module)
        if self.evaluates_in_fit:
            self._check_loader(trainer)
            self._end_trial(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._check_loader(trainer)
            self._log(trainer, pl_module, self.name)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._conclude(trainer, self.name, f"validate/{self.name}")
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer, self.name, self.name)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(Context(trainer, pl_module, is_probe=True), batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_loader(trainer)
        self._log(trainer, pl_module, f"test/{self.name}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer, f"test/{self.name}", f"test/{self.name}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._begin()  # lets go of the copies of what the module held
        if self._outcome:
            say(trainer, self._outcome)
        self._outcome = ""

    def _begin(self) -> None:
        """Forgets what was read."""
        self._pass = Pass(self._predictor, max_batches=self.max_batches, dataloader_idx=self.dataloader_idx)

    @abstractmethod
    def _evaluate(self, context: Context, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Evaluates a batch under all conditions."""

    @abstractmethod
    def _try(self, readings: Iterator[Reading]) -> None:
        """Reads a batch under one condition of each noise, before the first step."""

    def _end_trial(self, trainer: Trainer) -> None:
        self._begin()

    @abstractmethod
    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        """Logs the values of a validation or test, with keys that begin with a prefix."""

    @abstractmethod
    def _conclude(self, trainer: Trainer, prefix: str, folder: str) -> None:
        """Writes the files at the end of a run, if a batch was evaluated."""

    def _check_loader(self, trainer: Trainer) -> None:
        if self.dataloader_idx >= (n := n_evaluation_loaders(trainer)):
            raise ValueError(
                f"{type(self).__name__} saw no batch of dataloader_idx={self.dataloader_idx}; the loaders are "
                f"{list(range(n))}, so type dataloader_idx=0"
            )
