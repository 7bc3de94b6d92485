"""Predictions under noise, as an estimate of their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_noise._checks import check_counts, plain
from lightning_noise._usage import Guided, match, typed
from lightning_noise.batch import Selector
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.callbacks.inputs import AnyProbe, InputNoise, as_probe
from lightning_noise.evaluation.conditions import Condition, Conditions
from lightning_noise.evaluation.engine import Pass, Reading
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.loop.internals import Callback, n_evaluation_loaders
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Gaussian, as_noise
from lightning_noise.tasks import Multiclass, Task, check_task

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["NoisyPrediction", "NoisyPredictions"]


class NoisyPrediction(NamedTuple):
    """The predictions of a batch without noise and under several draws of a noise.

    Predictions of a classifier are probabilities of shape :math:`(B, K, *)`; a task of yes or no has the classes no and yes.
    Predictions of a regression are the outputs. All tensors are on the CPU.

    Attributes:
        positions: The position of each sample in the order of the loader, of shape :math:`(B,)`. If each item of the data set
            is a batch, row :math:`i` of item :math:`j` has the position :math:`2^{32} j + i`.
        clean: The prediction without noise.
        mean: The mean of the predictions under noise.
        spread: Their standard deviation over the draws.
        agreement: The share of the draws in which the most probable class is that without noise, of shape :math:`(B, *)`.
            NaN if a prediction is NaN, and ``None`` for a regression.
    """

    positions: Tensor
    clean: Tensor
    mean: Tensor
    spread: Tensor
    agreement: Tensor | None


class NoisyPredictions(Guided, Callback):
    r"""Predicts each batch of ``trainer.predict`` again under several draws of a noise.

    .. math:: \bar p = \frac{1}{n} \sum_{d=1}^n p_d, \quad
        s = \sqrt{\frac{1}{n - 1} \sum_d (p_d - \bar p)^2}, \quad
        a = \frac{1}{n} \sum_d [\arg\max_k p_{dk} = \arg\max_k p_k]

    Before each ``predict_step``, the module predicts the batch once without noise, :math:`p`, and once for each draw,
    :math:`p_d`. Nothing else changes: ``predict_step`` sees the clean batch and the clean weights, and returns bitwise what it
    returns without the callback. In other runs the callback does nothing.

    ``results`` holds a :class:`NoisyPrediction` for each batch, in the structure that ``trainer.predict`` returns: a list, or
    with several loaders a list of lists. It is complete after the run and grows by an item before each ``predict_step``, so a
    ``BasePredictionWriter`` finds its batch in ``results[-1]``. As for the predictions of Lightning, each rank holds its own
    batches; ``positions`` tell where they belong. Strategies that spawn or fork return no results to the main process.

    The draws of a sample depend on its position in the order of the loader alone, not on the batch size or the number of
    ranks. If rows are padded to the longest of their batch, they also depend on that length. Weight noise is one draw for all
    samples, so the draws are an ensemble of :math:`n` models.

    The level decides what the spread means. Start with the level of the noise in training, or that of ``suggest_level``, and
    check the calibration on labeled data.

    Args:
        noise: A noise for the input, or a noise callback such as :class:`~lightning_noise.WeightNoise`. For more options type
            ``InputNoise(noise, clip=…)``.
        level: The level, a number.
        n_draws: The number of draws, at least 2.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        task: What the outputs of the module mean: a task of :mod:`lightning_noise.tasks`.
        predict: A callable from module and batch to the output, as in :class:`~lightning_noise.RobustnessMonitor`.
        seed: The seed of the draws.

    Raises:
        TypeError: If ``task`` is not a task, or ``noise`` is not a noise.
        ValueError: If the level is wrong, ``n_draws`` is below 2, the outputs do not suit the task, or ``predict_step`` takes
            an iterator instead of a batch.

    References:
        Dropout as a Bayesian Approximation (Gal and Ghahramani, 2016), https://arxiv.org/abs/1506.02142, with dropout in place
        of the noise.

        Test-time data augmentation for estimation of heteroscedastic aleatoric uncertainty in deep neural networks (Ayhan and
        Berens, 2018), https://openreview.net/forum?id=rJZz-knjz

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader
        >>> from lightning_noise import noise
        >>> class Signs(pl.LightningModule):
        ...     def forward(self, x):  # a positive number is of class 1
        ...         return torch.cat([-x, x], 1)
        >>> noisy = NoisyPredictions(noise.Gaussian(), 1.0, n_draws=100)
        >>> trainer = pl.Trainer(callbacks=[noisy], accelerator="cpu", logger=False, enable_progress_bar=False)
        >>> predictions = trainer.predict(Signs(), DataLoader(torch.tensor([[0.1], [4.5]]), batch_size=2))
        >>> noisy.results[0].agreement > 0.99  # the sign of 4.5 is certain
        tensor([False,  True])
    """

    def __init__(
        self,
        noise: AnyProbe,
        level: float,
        n_draws: int = 20,
        *,
        inputs: Selector | None = None,
        task: Task = Multiclass(),
        predict: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
    ):
        check_counts(n_draws=n_draws)
        if n_draws < 2:
            raise ValueError(f"n_draws must be at least 2, because one draw has no spread, got {n_draws}; type n_draws=20")
        check_task(task)
        noise = noise if isinstance(noise, NoiseCallback) else as_noise(noise, "NoisyPredictions({}, {})")
        self.noise = noise
        self.inputs = plain(inputs)
        self.task = task
        self.predict = predict
        self.results: list[Any] = []
        self._probe = as_probe(noise, inputs=inputs)
        self.conditions = Conditions({self._probe.name: self._probe}, [level], n_draws=n_draws, seed=seed)
        self._predictor = Predictor(task, inputs, predict=predict, labelled=False)
        self._passes: list[Pass] = []

    @classmethod
    def _advise(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        call = super()._advise(args, kwargs)
        of_inputs = signature(InputNoise).parameters.keys() - signature(cls).parameters.keys()
        options = [f"{key}={typed(value)}" for key, value in kwargs.items() if key in of_inputs]
        kind = typed(match(cls, args, kwargs).get("noise", Gaussian()))
        return call.replace(kind, f"InputNoise({kind}, {', '.join(options)})", 1) if options else call

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "dataloader_iter" in signature(pl_module.predict_step).parameters:
            raise ValueError(
                "NoisyPredictions needs a predict_step(batch, batch_idx) and cannot predict the batch of a "
                "predict_step(dataloader_iter), which fetches each batch only once"
            )
        if isinstance(self._probe, InputNoise):
            (levels,) = self.conditions.levels.values()
            self._probe.expect(max(levels))
        self._predictor.forget()
        n_loaders = n_evaluation_loaders(trainer)
        self._passes = [Pass(self._predictor, dataloader_idx=i) for i in range(n_loaders)]
        self.results = [] if n_loaders == 1 else [[] for _ in range(n_loaders)]

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # before the step, which may write to the batch
        context, positions = Context(trainer, pl_module, is_probe=True), list[int]()

        def perturb(context: Context, batch: Any, rows: range) -> Iterator[tuple[Condition, Perturbation]]:
            positions.extend(rows)
            return self.conditions.perturb(context, batch, rows)

        readings = self._passes[dataloader_idx].read(context, batch, batch_idx, dataloader_idx, perturb)
        results = self.results if len(self._passes) == 1 else self.results[dataloader_idx]
        results.append(self._summarize(readings, positions))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._passes = []  # which hold copies of what the module held
        self._probe.teardown(trainer, pl_module, stage)  # an interrupt may have kept it from ending

    def _summarize(self, readings: Iterator[Reading], positions: list[int]) -> NoisyPrediction:
        clean = self._read(next(readings).outputs)
        mean, squares = torch.zeros_like(clean), torch.zeros_like(clean)
        agreed = torch.zeros_like(clean.select(1, 0)) if self.task.has_classes else None
        n = 0
        for n, reading in enumerate(readings, 1):  # the recursion of Welford (1962), which keeps one draw at a time
            values = self._read(reading.outputs)
            error = values - mean
            mean += error / n
            squares += error * (values - mean)
            if agreed is not None:
                agreed += values.argmax(1) == clean.argmax(1)
        if agreed is not None:  # argmax takes NaN for the largest
            agreed = (agreed / n).where((clean + mean).isfinite().all(1), math.nan).cpu()
        spread = (squares / (n - 1)).sqrt()
        # a sampler may repeat rows at the end, which are not predicted
        return NoisyPrediction(torch.tensor(positions[: len(clean)]), clean.cpu(), mean.cpu(), spread.cpu(), agreed)

    def _read(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1) if self.task.has_classes else outputs
