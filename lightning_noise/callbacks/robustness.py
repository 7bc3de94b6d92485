"""A monitor of the metrics on held-out data without noise and under noise."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_noise import report
from lightning_noise._usage import nearest
from lightning_noise.batch import Selector
from lightning_noise.callbacks.inputs import InputNoise
from lightning_noise.callbacks.monitor import Noises
from lightning_noise.callbacks.predicting import PredictingMonitor
from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition, Levels
from lightning_noise.evaluation.engine import Reading
from lightning_noise.evaluation.figures import Figures
from lightning_noise.evaluation.predictor import Predictor
from lightning_noise.evaluation.results import Estimate, Results, summarize
from lightning_noise.loop import loggers
from lightning_noise.loop.description import as_text
from lightning_noise.loop.internals import show_to_callbacks
from lightning_noise.loop.perturbation import Context
from lightning_noise.loop.progress import ends_run
from lightning_noise.loop.returning import Returning
from lightning_noise.loop.terminal import progress, shorten
from lightning_noise.masks import Mask
from lightning_noise.perturb.inputs import Clip
from lightning_noise.perturb.normalization import Numbers, normalization_of
from lightning_noise.report.changes import corruption_errors, shared_levels
from lightning_noise.tasks import Multiclass, Task, check_task

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["RobustnessMonitor", "log_key"]


class RobustnessMonitor(PredictingMonitor):
    r"""Evaluates a model on held-out data under noise, next to the same data without noise.

    Before each validation or test step, the module predicts the batch without noise and under each noise and level, without
    gradients and with the precision of the trainer. Two noises with five levels each thus cost eleven forward passes per batch;
    ``max_batches`` and ``every_n_epochs`` bound the cost. Memory does not grow with the data. Weights, the user's metrics and
    the global random streams are the same as without the monitor. What a forward pass changes in the module, such as the
    statistics of a quantization observer, is undone, except writes to tensors in lists, to large arrays and to parameters. For
    the user's own metrics under noise there is :class:`~lightning_noise.ReplayMonitor`.

    The noise of a sample depends only on its position in the order of the loader. If the loader does not shuffle, the noise is
    the same in each epoch, for any batch size and any number of ranks. The levels of a noise share a draw, so a curve shows the
    model and not the draws. Weight noise is one draw for all samples. Rows that a distributed sampler repeats do not count.

    =====================================================  ==========================================================
    key                                                    value
    =====================================================  ==========================================================
    ``robustness/score``                                   the mean of the clean and the noisy score of the task
    ``robustness/<metric>_clean``                          a metric without noise
    ``robustness/<metric>_noisy``                          averaged over noises and levels
    ``robustness/accuracy_worst``                          at the worst noise and level
    ``robustness/<metric>_drop``                           clean minus noisy, for the metric of the score
    ``robustness/accuracy_retention``                      the share of the skill above chance that is left under noise
    ``robustness/mce``                                     the errors under noise relative to those of the baseline
    ``robustness_levels/<noise>/<level>/<metric>``         a metric under a noise at a level, averaged over the draws
    =====================================================  ==========================================================

    A larger score is better for every task, so ``ModelCheckpoint(monitor="robustness/score", mode="max")`` always works. The
    score averages the clean and the noisy accuracy of a classifier, or :math:`R^2` of a regression. By default, accuracy, loss
    (cross-entropy) and ECE are logged for a classifier, and MSE, MAE and :math:`R^2` for a regression. The report holds all
    metrics of the task; see :mod:`lightning_noise.metrics`. NaN is logged as NaN and does not stop a run.

    Chance is the metric of the best constant guess: the share of the most frequent class among the targets that count, or an
    :math:`R^2` of 0. If the clean model is not above chance, the retention is NaN.

    In ``trainer.test`` only the summary is logged, and its keys begin with ``test/``. With ``every_n_epochs``, a key keeps its
    old value in between. Then give ModelCheckpoint the same interval, and EarlyStopping ``strict=False``, because no value
    exists before the first evaluation.

    TensorBoard also receives a curve over the level in each validation, and clean next to noisy samples with their predicted
    classes, if the input is an image or a signal. Samples of fewer than 32 numbers, such as the rows of a table, are not drawn.
    *Custom scalars* show the main metric clean, noisy and at its worst, and for each noise a band from clean to its strongest
    level. At the end of a fit, a validation or a test it receives reliability diagrams. The score is a metric of *HParams*.
    Weights & Biases, MLflow, Comet and Neptune receive the figures and texts, too. For other loggers the figures are PNG files
    beside their logs. ``CSVLogger`` receives the summary, but no column for each level. At the end, ``report.json`` and
    ``report.md`` are written into the folder of the first logger, with a 95 % interval for each value and for each difference
    to the baseline: in ``robustness`` after a fit, else in ``validate/robustness`` or ``test/robustness``. The attribute
    ``report`` holds the same :class:`~lightning_noise.report.Report`.

    Args:
        noises: A noise, a list of noises, or a mapping from name to noise. In a list, the name of a noise is its class name in
            lower case. A noise callback is accepted, too. Default: Gaussian and impulse noise.
        levels: The levels of all noises if they have one unit, or a mapping from name to levels. Default: the ``severities``
            of each noise.
        inputs: Which leaf of the batch is the input, as in :class:`~lightning_noise.InputNoise`.
        target: Which leaf of the batch is the target. Default: the second element of a sequence.
        task: What the outputs of the module mean: a task of :mod:`lightning_noise.tasks`. ``tasks.Custom(metrics)`` evaluates
            your own metrics, without intervals.
        predict: A callable from module and batch to the output. Default: ``module(*inputs)``. If the batch is a mapping whose
            keys are the names of the parameters of ``forward``, the module is called by these names, with every parameter that
            is a key except the target. If the batch is a sequence with one tensor more than ``forward`` needs, and at least
            three, the module is called with all but the last, which is the target. If the output has ``logits``, the monitor
            takes these.
        n_draws: The number of draws of each noise, over which values are averaged.
        clip: Bounds of the noisy input, as in :class:`~lightning_noise.InputNoise`.
        relative: With ``"std"``, levels are in units of the standard deviation of each sample.
        mask: Which positions of the input are valid, as in :class:`~lightning_noise.InputNoise`. Labels that do not count are
            marked by the ``ignore_index`` of the task, or by NaN.
        mean: The mean with which the input was normalized, as in :class:`~lightning_noise.InputNoise`.
        std: The standard deviation with which the input was normalized.
        logged: The metrics that are logged at each level. Default: the ``logged`` metrics of the task.
        every_n_epochs: How often to evaluate during a fit.
        max_batches: How many batches each rank evaluates. Default: all.
        dataloader_idx: Which of several loaders to evaluate.
        baseline: The ``report.json`` of an earlier run, or its folder, to compare with. Differences are paired if both runs
            evaluated the same samples.
        class_names: The names of the classes in the figures of samples. Default: the class indices.
        seed: The seed of the draws. It does not depend on the seed of the run, so runs are compared on the same noise.
        name: The first part of the keys. No other monitor of the trainer may have the same name.

    Raises:
        TypeError: If ``task`` is not a task, or the levels are not a list.
        ValueError: If a level, name or path is wrong, the run has no validation, the module does not return predictions of the
            target, the outputs are probabilities and not logits, another callback follows a key that will not be logged, or
            the baseline cannot be read or compared. In a fit, these errors come before the first training step.

    Example:
        >>> from lightning_noise import noise
        >>> levels = {"gaussian": [0.1, 0.2], "impulse": [0.05, 0.1]}
        >>> monitor = RobustnessMonitor([noise.Gaussian(), noise.Impulse()], levels)
        >>> monitor.levels
        {'gaussian': (0.1, 0.2), 'impulse': (0.05, 0.1)}
    """

    def __init__(
        self,
        noises: Noises | None = None,
        levels: Levels | None = None,
        *,
        inputs: Selector | None = None,
        target: int | str | None = None,
        task: Task = Multiclass(),
        predict: Callable[[Any, Any], Any] | None = None,
        n_draws: int = 1,
        clip: Clip | None = None,
        relative: Literal["std"] | None = None,
        mask: Mask | None = None,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        logged: Sequence[str] | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        dataloader_idx: int = 0,
        baseline: str | os.PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        name: str = "robustness",
    ):
        check_task(task)
        if isinstance(class_names, str):
            raise TypeError(f"class_names must be a list of names, got {class_names!r}")
        logged = [logged] if isinstance(logged, str) else logged
        if logged is not None and (unknown := sorted(set(logged) - set(task.names))):
            if requested := [name for name in unknown if name in task.on_request]:
                raise ValueError(
                    f"the metrics {requested} are computed on request; type task=tasks.{type(task).__name__}(more={requested})"
                )
            close = [nearest(name, task.names) for name in logged]
            raise ValueError(
                f"no metrics {unknown}; type logged={[name for name in close if name] or [task.main]}; "
                f"{type(task).__name__}() has {list(task.names)}"
            )
        super().__init__(
            noises,
            levels,
            inputs=inputs,
            clip=clip,
            relative=relative,
            mask=mask,
            mean=mean,
            std=std,
            every_n_epochs=every_n_epochs,
            max_batches=max_batches,
            seed=seed,
            name=name,
            n_draws=n_draws,
        )
        self.target = target
        self.task = task
        self.predict = predict
        self.n_draws = n_draws
        self.logged = logged
        self.dataloader_idx = dataloader_idx
        self.baseline = baseline
        self.class_names = class_names
        self.report: report.Report | None = None
        self._predictor = Predictor(task, inputs, target, predict)
        self._shared = tuple(name for name, probe in self._probes.items() if probe.one_draw_per_batch)
        self._results = Results(task, self._shared)
        is_known = predict is None or inputs is not None  # which leaf the module reads
        self._figures = Figures(
            task,
            self.levels,
            visible=[name for name, probe in self._probes.items() if is_known and isinstance(probe, InputNoise)],
            inputs=self.inputs,
            class_names=class_names,
            normalization=normalization_of(mean, std),
        )
        self._begin()
        Returning.enable()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._baseline = None if self.baseline is None else self._comparable(report.read(os.fspath(self.baseline)))
        self._figures.has_logged_samples = False
        self._results = Results(self.task, self._shared)  # another module may have more classes

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            loggers.log_details(trainer, self._level_keys)
        super().on_validation_end(trainer, pl_module)

    def results(self) -> report.Report | None:
        return self.report

    def take_results(self, results: report.Report | None) -> None:
        self.report = results

    @property
    def score_key(self) -> str:
        """The key of the score, a metric on the page of hyperparameters in TensorBoard."""
        return log_key(self.name, OVERALL, "score")

    def charts(self) -> dict[str, loggers.Chart]:
        main = self.task.main
        clean, noisy, worst = (log_key(self.name, condition, main) for condition in (CLEAN, NOISY, WORST))
        charts: dict[str, loggers.Chart] = {
            f"{self.name}: {main}": ("Multiline", [f"{re.escape(key)}$" for key in (clean, noisy, worst)])
        }
        for noise, levels in self.levels.items() if main in self._logged else ():
            strongest = log_key(self.name, Condition(noise, max(levels)), main)
            charts[f"{self.name}: {main}, clean to {noise} {max(levels):g}"] = loggers.band(strongest, clean)
        return charts

    def logged_keys(self) -> dict[str, list[str]]:
        metrics = dict.fromkeys(self.task.names, 1.0)
        known = {*summarize(dict.fromkeys([CLEAN, *self._places], metrics), self.task)}
        summary = [cell for cell in _summary(self.task) if cell in known or (cell[1] == "mce" and self.baseline is not None)]
        return {
            f"{self.name}/": [log_key(self.name, *cell) for cell in summary],
            f"{self.name}_levels/": self._level_keys,
        }

    @property
    def _level_keys(self) -> list[str]:
        return [log_key(self.name, place, metric) for place in self._places for metric in self._logged]

    @property
    def _places(self) -> list[Condition]:
        return [Condition(noise, level) for noise, levels in self.levels.items() for level in levels]

    def count_keys(self) -> int:
        return len(_summary(self.task)) + len(self._level_keys)

    # --- evaluation

    def _begin(self) -> None:
        super()._begin()
        self._results.reset()
        self._figures.reset()

    def _evaluate(self, context: Context, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        readings = self._pass.read(context, batch, batch_idx, dataloader_idx, self.conditions.perturb)
        if loggers.takes_figures(context.trainer):
            limits = {"dataloader_idx": self.dataloader_idx, "max_batches": self.max_batches}
            readings = self._figures.keep_samples(context.trainer, readings, **limits)
        self._results.update(self._follow(context.trainer, batch_idx, readings))

    def _try(self, readings: Iterator[Reading]) -> None:
        self._results.update(readings)

    def _end_trial(self, trainer: Trainer) -> None:
        # metrics of the user may refuse the outputs or not be one number
        if trainer.strategy.reduce_boolean_decision(not self._results.is_empty):
            self._results.values()
        super()._end_trial(trainer)

    def _comparable(self, baseline: report.Report) -> report.Report:
        """Returns the baseline, or raises a ValueError if there is nothing to compare."""
        if baseline.task != self.task.name:
            raise ValueError(f"the baseline {self.baseline} is of the task {baseline.task!r}, not {self.task.name!r}")
        if not shared_levels(self._descriptions, self.levels, baseline):
            raise ValueError(
                f"the baseline {self.baseline} has no noise at the same levels: it has {baseline.noises} at "
                f"{baseline.levels}, not {self._descriptions} at {self.levels}"
            )
        return baseline

    @property
    def _descriptions(self) -> dict[str, str]:
        """The noises in words, without the arguments that only matter in training."""
        options = "".join(
            f", {key}={as_text(value)}"
            for key, value in {key: getattr(self, key) for key in ("relative", "clip", "mask", "mean", "std")}.items()
            if value is not None
        )
        without = ("level", "seed", "name", "probability")
        return {name: as_text(noise, without=without) + options for name, noise in self.noises.items()}

    # --- log and report

    @property
    def _logged(self) -> Sequence[str]:
        return self.task.logged if self.logged is None else self.logged

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        self._results.gather(trainer, "RobustnessMonitor", self._pass)
        values = self._results.values()
        if self._baseline is not None:
            shared = shared_levels(self._descriptions, self.levels, self._baseline)
            values = {**values, **corruption_errors(values, self._baseline.values, shared)}
        # the values are those of all ranks; every rank logs them, for its callbacks
        summary = {log_key(prefix, *cell): values[cell] for cell in _summary(self.task) if cell in values}
        score = summary.pop(log_key(prefix, OVERALL, "score"))
        pl_module.log(log_key(prefix, OVERALL, "score"), score, prog_bar=True, sync_dist=True, rank_zero_only=True)
        pl_module.log_dict(summary, sync_dist=True, rank_zero_only=True)
        if not trainer.testing:
            cells = [(place, metric) for place in self._places for metric in self._logged]
            show_to_callbacks(trainer, {log_key(prefix, *cell): values[cell] for cell in cells})
        if trainer.state.fn == "fit" and loggers.takes_figures(trainer) and not ends_run(trainer):
            estimates = [Estimate(*cell, value) for cell, value in values.items()]
            self._figures.log_curve(trainer, prefix, self._report(estimates), self._baseline)
            if not self._figures.has_logged_samples:  # the noise is the same in each epoch
                self._figures.log_samples(trainer, prefix)

    def _report(
        self, estimates: Sequence[Estimate], *, n: int = 0, n_targets: int = 0, sizes: Sequence[int] = ()
    ) -> report.Report:
        return report.Report(
            task=self.task.name,
            n=n,
            n_targets=n_targets,
            n_draws=self.n_draws,
            seed=self.seed,
            noises=self._descriptions,
            levels=dict(self.levels),
            units={name: probe.unit for name, probe in self._probes.items()},
            chance=self.task.chance({each.metric: each.value for each in estimates if each.condition == CLEAN}),
            shared=self._shared,
            sizes=tuple(sizes),
            estimates=tuple(estimates),
        )

    def _conclude(self, trainer: Trainer, prefix: str, folder: str) -> None:
        if self._results.is_empty:  # the fit ended before an evaluation was due
            return
        with progress(trainer, "Report", total=4) as advance:
            calibration = self._results.calibration()
            self.report = self._make_report()
            advance()
            if loggers.takes_figures(trainer):
                with loggers.warn_on_failure(trainer, "the report"):
                    path = report.write(loggers.log_dir(trainer) / folder, self.report, self._baseline)
                    self._outcome = f"{self.name}: {report.headline(self.report)}\nReport: {shorten(path)}"
                advance()
                self._figures.log_curve(trainer, prefix, self.report, self._baseline)  # this time with intervals
                self._figures.log_reliability(trainer, prefix, calibration)
                advance()
                self._figures.log_samples(trainer, prefix)

    def _make_report(self) -> report.Report:
        sizes, estimates = self._results.sizes, self._results.estimates()
        return self._report(
            estimates, n=sum(sizes), n_targets=self._results.n_targets, sizes=sizes if estimates[0].without else ()
        )


def log_key(prefix: str, condition: Condition, metric: str) -> str:
    """Returns the key of a metric under a condition.

    Example:
        >>> log_key("robustness", CLEAN, "accuracy"), log_key("robustness", OVERALL, "score")
        ('robustness/accuracy_clean', 'robustness/score')
        >>> log_key("robustness", Condition("gaussian", 0.1), "ece")
        'robustness_levels/gaussian/0.1/ece'
    """
    if condition == OVERALL:
        return f"{prefix}/{metric}"
    if condition in (CLEAN, NOISY, WORST):
        return f"{prefix}/{metric}_{condition.noise}"
    return f"{prefix}_levels/{condition.place}/{metric}"


def _summary(task: Task) -> list[tuple[Condition, str]]:
    """Returns what the summary logs, if there are values: at most eleven keys."""
    main, *others = dict.fromkeys([task.main, task.governed, *task.logged])
    cells = [(OVERALL, "score"), (CLEAN, main), (NOISY, main), (WORST, main)]
    cells += [(OVERALL, f"{task.governed}_drop"), (OVERALL, f"{task.governed}_retention")]
    for metric in others[:2]:
        cells += [(CLEAN, metric), (NOISY, metric)]
    return [*cells, (OVERALL, "mce")]
