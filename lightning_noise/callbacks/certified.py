"""A monitor of the certified accuracy by randomized smoothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_noise import plots
from lightning_noise._checks import check_finite, plain
from lightning_noise._tensor import column
from lightning_noise._usage import typed
from lightning_noise.batch import Selector
from lightning_noise.callbacks.predicting import PredictingMonitor
from lightning_noise.evaluation.certified import Certified, Tally
from lightning_noise.evaluation.conditions import CLEAN, Condition
from lightning_noise.evaluation.engine import Reading
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.evaluation.smoothing import (
    CERTIFICATES,
    Norm,
    certify_counts,
    check_draws,
    check_smoothing,
    lower_bound,
    vote,
)
from lightning_noise.loop import loggers
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.loop.progress import logging_step
from lightning_noise.loop.returning import Returning
from lightning_noise.loop.terminal import shorten
from lightning_noise.masks import Mask
from lightning_noise.perturb.normalization import Numbers
from lightning_noise.report.markdown import grid
from lightning_noise.rng import Key, seed_torch
from lightning_noise.tasks import Multiclass, Task, check_task

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["RandomizedSmoothing"]

_N_POINTS = 101  # of the curve


class RandomizedSmoothing(PredictingMonitor):
    r"""Certifies the predictions of a classifier on held-out data by randomized smoothing.

    The smoothed model predicts the class that the module predicts most often under Gaussian noise. No change of the input
    within the certified radius changes that class; see :func:`~lightning_noise.smooth`. The monitor certifies each sample of
    ``trainer.test`` and ``trainer.validate``, and of the validations of a fit if ``max_batches`` bounds them. A batch costs
    ``1 + n0 + n`` forward passes. Train with ``InputNoise(noise.Gaussian(), sigma)``, because a model that never saw the noise
    certifies little.

    ==============================================  =================================================================
    key                                             value
    ==============================================  =================================================================
    ``certified/radius``                            the average certified radius, with 0 for a wrong class or abstention
    ``certified/accuracy``                          the share of samples whose certified class is right
    ``certified/accuracy_clean``                    the accuracy of the module itself, without noise
    ``certified/abstentions``                       the share of samples without a certified class
    ``certified_radii/<radius>/accuracy``           the share whose class is right and certified up to the radius
    ==============================================  =================================================================

    In ``trainer.test``, the keys begin with ``test/``. ``ModelCheckpoint(monitor="certified/radius", mode="max")`` follows a
    fit with ``max_batches``. The curve of the certified accuracy over the radius is logged as a figure. ``certified.md`` and
    ``certified.json`` are written into the folder of the first logger: in ``certified`` after a fit, else in
    ``validate/certified`` or ``test/certified``. The attribute ``result`` holds the curve and the values, as the JSON file
    does; see :class:`~lightning_noise.evaluation.certified.Certified`.

    The noise of a sample depends only on its position in the order of the loader, as in
    :class:`~lightning_noise.RobustnessMonitor`. Rows that a distributed sampler repeats do not count, and neither do labels
    that the task ignores. If a sample has several targets, as in segmentation, each target is certified alone. If
    several inputs get noise, the radius is that of all of them together. Inputs without noise must not change, and neither must
    positions that ``mask`` leaves out. What the module draws from torch's global streams, as by dropout that stays on, differs
    between the passes.

    Args:
        sigma: The level of the noise: the standard deviation of Gaussian noise, or the half-width of uniform noise.
        n0: The number of draws that select the class.
        n: The number of draws that bound its probability.
        alpha: The largest probability that the radius of a sample is too large.
        norm: The norm of the radii: ``"l2"`` by Gaussian noise, or ``"l1"`` by uniform noise.
        radii: The radii at which the certified accuracy is logged. Default: a quarter, half and three quarters of the largest
            radius, which all ``n`` draws certify if they agree.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        target: Which leaf of the batch is the target. Default: the second element of a sequence.
        task: What the outputs of the module mean: a task of :mod:`lightning_noise.tasks` with classes.
        predict: A callable from module and batch to the output, as in :class:`~lightning_noise.RobustnessMonitor`.
        mask: Which positions of the input are valid, as in :class:`~lightning_noise.InputNoise`.
        mean: The mean with which the input was normalized. Sigma and radii are then in the units before the normalization.
        std: The standard deviation with which the input was normalized.
        every_n_epochs: How often to certify during a fit.
        max_batches: How many batches each rank certifies, in a test, too. Default: all, and none in a fit.
        dataloader_idx: Which of several loaders to certify.
        seed: The seed of the draws.
        name: The first part of the keys. No other monitor of the trainer may have the same name.

    Raises:
        TypeError: If ``task`` is not a task, or the input is not floating-point.
        ValueError: If the task has no classes, ``n`` draws can never certify a class at ``alpha``, an argument is out of range,
            or the module does not return predictions of the target. In a fit, these errors come before the first step.

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019), https://arxiv.org/abs/1902.02918

        Randomized Smoothing of All Shapes and Sizes (Yang et al., 2020), https://arxiv.org/abs/2002.08118

    Example:
        >>> RandomizedSmoothing(0.5, radii=[0.25, 0.5]).logged_radii
        (0.25, 0.5)
    """

    condition_name = "draw"
    is_certificate = True

    def __init__(
        self,
        sigma: float,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        *,
        norm: Norm = "l2",
        radii: Sequence[float] | None = None,
        inputs: Selector | None = None,
        target: int | str | None = None,
        task: Task = Multiclass(),
        predict: Callable[[Any, Any], Any] | None = None,
        mask: Mask | None = None,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        dataloader_idx: int = 0,
        seed: int = 0,
        name: str = "certified",
    ):
        check_task(task)
        if not task.has_classes:
            raise ValueError(
                f"RandomizedSmoothing certifies classes, got task={typed(task)}; type RobustnessMonitor(task={typed(task)})"
            )
        self.sigma = check_smoothing(sigma, norm)
        check_draws(alpha, n0=n0, n=n)
        super().__init__(
            CERTIFICATES[norm].noise,
            [self.sigma],
            inputs=inputs,
            clip=None,
            relative=None,
            mask=mask,
            mean=mean,
            std=std,
            every_n_epochs=every_n_epochs,
            max_batches=max_batches,
            seed=seed,
            name=name,
            n_draws=n0 + n,
        )
        self.n0 = n0
        self.n = n
        self.alpha = alpha
        self.norm: Norm = norm
        self.radii = plain(radii)
        self.target = target
        self.task = task
        self.predict = predict
        self.dataloader_idx = dataloader_idx
        self.result: Certified | None = None
        largest = float(CERTIFICATES[norm].radius(lower_bound(n, n, alpha), self.sigma))
        quarters = [float(f"{share * largest:.2g}") for share in (0.25, 0.5, 0.75)]
        self.logged_radii = _check_radii(quarters if radii is None else radii)
        self._tally = Tally([*self.logged_radii, *np.linspace(0.0, largest, _N_POINTS)])
        self._predictor = Predictor(task, inputs, target, predict)
        self._begin()
        Returning.enable()

    def results(self) -> Certified | None:
        return self.result

    def take_results(self, results: Certified | None) -> None:
        self.result = results

    @property
    def evaluates_in_fit(self) -> bool:
        return self.max_batches is not None

    @property
    def score_key(self) -> str | None:
        """The key of the average certified radius, a metric on the page of hyperparameters in TensorBoard."""
        return f"{self.name}/radius" if self.evaluates_in_fit else None

    def charts(self) -> dict[str, loggers.Chart]:
        accuracies = [f"{self.name}/accuracy", *self._radius_keys(self.name).values()]
        return {f"{self.name}: accuracy": ("Multiline", [f"{re.escape(key)}$" for key in accuracies])}

    def logged_keys(self) -> dict[str, list[str]]:
        summary = [f"{self.name}/{key}" for key in ("radius", "accuracy", "accuracy_clean", "abstentions")]
        keys = {f"{self.name}/": summary, f"{self.name}_radii/": list(self._radius_keys(self.name).values())}
        return keys if self.evaluates_in_fit else {beginning: [] for beginning in keys}

    def count_keys(self) -> int:
        return 4 + len(self.logged_radii)

    def _describe_cost(self) -> str:
        if self.evaluates_in_fit:
            return super()._describe_cost()
        return f"RandomizedSmoothing {self.name!r} certifies nothing in a fit; type max_batches=… to certify in each validation"

    def _radius_keys(self, prefix: str) -> dict[float, str]:
        return {radius: f"{prefix}_radii/{radius:g}/accuracy" for radius in self.logged_radii}

    # --- certification

    def _begin(self) -> None:
        super()._begin()
        self._tally.reset()

    def _evaluate(self, context: Context, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        readings = self._pass.read(context, batch, batch_idx, dataloader_idx, self._perturb)
        counts = classes = torch.empty(0)
        others: list[np.ndarray] = []
        for reading in self._follow(context.trainer, batch_idx, readings):
            logits = _by_target(reading.preds)
            if reading.condition == CLEAN:
                groups = column(reading.groups, reading.target).expand_as(reading.target)
                parts = (vote(logits), reading.target.flatten(), groups.flatten(), reading.samples)
                others = [part.cpu().numpy() for part in parts]
                counts = torch.zeros(2, *logits.shape, dtype=torch.int32, device=logits.device)
                classes = torch.arange(logits.shape[1], device=logits.device)
            else:
                counts[int((reading.condition.draw or 0) >= self.n0)] += vote(logits)[:, None] == classes
        if len(counts):
            selected, counted = counts.cpu().numpy()
            options = {"n": self.n, "alpha": self.alpha, "sigma": self.sigma, "norm": self.norm}
            self._tally.add(*certify_counts(selected, counted, **options), *others)

    def _perturb(self, context: Context, batch: Any, positions: range) -> Iterator[tuple[Condition, Perturbation]]:
        """Yields the noise of each draw. What a module draws itself, as by dropout that stays on, must differ, too."""
        for condition, perturbation in self.conditions.perturb(context, batch, positions):
            key = Key((self.seed, "module", positions.start, condition.draw or 0))
            seed_torch(key.seed, context.module.device)
            yield condition, perturbation

    def _try(self, readings: Iterator[Reading]) -> None:
        for _ in readings:
            pass

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        self._tally.gather(trainer, "RandomizedSmoothing", self._pass)
        self.result = found = self._tally.result(self.sigma, self.norm)
        # the values are those of all ranks; every rank logs them, for its callbacks
        others = {"accuracy": found.accuracy(), "accuracy_clean": found.clean, "abstentions": found.abstentions}
        values = {f"{prefix}/{key}": value for key, value in others.items()}
        values |= {key: found.accuracy(radius) for radius, key in self._radius_keys(prefix).items()}
        pl_module.log(f"{prefix}/radius", found.radius, prog_bar=True, sync_dist=True, rank_zero_only=True)
        pl_module.log_dict(values, sync_dist=True, rank_zero_only=True)
        draw = partial(plots.certified_accuracy, found)
        loggers.log_figure(trainer, f"{prefix}_figures/curve", draw, logging_step(trainer))

    def _conclude(self, trainer: Trainer, prefix: str, folder: str) -> None:
        if not self._tally.saw_batch or self.result is None or not loggers.takes_figures(trainer):
            return
        text, found = self._markdown(self.result), self.result
        loggers.log_text(trainer, f"{prefix}/table", text, logging_step(trainer))
        with loggers.warn_on_failure(trainer, "the table of certified accuracies"):
            path = loggers.log_dir(trainer) / folder / "certified.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            found.write(path.with_suffix(".json"))
            self._outcome = f"{self.name}: {found}\nTable: {shorten(path)}"

    def _markdown(self, found: Certified) -> str:
        rows = []
        for radius in (0.0, *self.logged_radii):
            value, low, high = (100 * each for each in (found.accuracy(radius), *found.interval(radius)))
            rows.append([f"{radius:g}", f"{value:.1f}" if math.isnan(low) else f"{value:.1f} ({low:.1f} to {high:.1f})"])
        about = (
            f"Average certified radius {found.radius:.3g}, abstentions {100 * found.abstentions:.2g} %, accuracy without noise "
            f"{100 * found.clean:.1f} %. Of {found.n:,} targets under {typed(CERTIFICATES[self.norm].noise)} at level "
            f"{self.sigma:g}: {self.n0} draws select a class, {self.n} draws bound its probability, and a radius is too large "
            f"with a probability of at most {self.alpha:g} (seed {self.seed}). The interval is for other samples of the same "
            "kind, and holds in 95 of 100 cases."
        )
        return f"# Certified accuracy\n\n{grid([f'{self.norm.upper()} radius', 'certified accuracy, %'], rows)}\n\n{about}\n"


def _by_target(preds: Tensor) -> Tensor:
    """Returns logits with a row for each target, of shape (N, K)."""
    return preds.movedim(1, -1).flatten(0, -2)


def _check_radii(radii: Sequence[float]) -> tuple[float, ...]:
    if isinstance(radii, str) or not hasattr(radii, "__iter__"):
        raise TypeError(f"radii must be a list, got {radii!r}; type radii=[{radii}]")
    for radius in radii:
        check_finite(radius=radius)
        if radius < 0:
            raise ValueError(f"a radius must not be negative, got {radius}")
    if len({f"{radius:g}" for radius in radii}) < len(radii):
        raise ValueError(f"radii must differ in their first six digits, got {list(radii)}")
    return tuple(map(float, radii))
