"""Figures, texts and chart layouts for the loggers of a trainer.

Only the rank that logs does anything, and no function waits for another rank. If a logger raises an exception, the run goes on
with a warning.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from matplotlib.figure import Figure

from lightning_noise.loop.dispatch import Perturbing
from lightning_noise.loop.internals import LIGHTNING, class_of_callbacks, is_fast_dev_run
from lightning_noise.loop.progress import logging_step
from lightning_noise.loop.sinks import experiment_of, find_sink

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = [
    "Chart",
    "Charting",
    "SilentLogger",
    "band",
    "log_details",
    "log_dir",
    "log_figure",
    "log_layout",
    "log_text",
    "takes_figures",
    "warn_on_failure",
]

_CSV_LOGGERS = tuple(namespace.loggers.CSVLogger for namespace in LIGHTNING)
_WARNED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


Chart = tuple[Literal["Multiline", "Margin"], Sequence[str]]
"""Regular expressions of tags, or the tags of a value and of the lower and upper edge of a band."""


@runtime_checkable
class Charting(Protocol):
    """A callback that groups its tags into charts."""

    @property
    def evaluates_in_fit(self) -> bool:
        """Whether a fit logs the tags."""
        ...

    def charts(self) -> Mapping[str, Chart]:
        """Returns the charts by title; empty until the tags are known."""
        ...


def log_figure(trainer: Trainer, key: str, draw: Callable[[], Figure | None], step: int) -> None:
    """Logs the figure that ``draw`` returns, if any, to each logger in its own way, or writes it as a PNG file.

    The file of a logger that takes no figures is ``<key>-<step>.png`` in its folder. A logger without a folder has files only
    if it is the first, beside the report. Without a logger nothing is drawn.
    """
    if not takes_figures(trainer):
        return
    figure = None
    with warn_on_failure(trainer, f"the figure {key!r}"):
        figure = draw()
    if figure is None:
        return
    logger: Any
    for logger in trainer.loggers:
        with warn_on_failure(trainer, f"the figure {key!r}"):
            if sink := find_sink(logger):
                sink.log_figure(logger, key, figure, step)
            elif logger is trainer.loggers[0] or logger.log_dir or logger.save_dir:
                path = log_dir(trainer, logger) / f"{key}-{step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)


def takes_figures(trainer: Trainer) -> bool:
    """Returns whether :func:`log_figure` would do anything; if not, a figure need not be drawn."""
    return trainer.is_global_zero and bool(trainer.loggers) and not is_fast_dev_run(trainer)


def log_text(trainer: Trainer, key: str, text: str, step: int = 0) -> None:
    """Logs a text in Markdown to the loggers that accept texts."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        with warn_on_failure(trainer, f"the text {key!r}"):
            if sink := find_sink(logger):
                sink.log_text(logger, key, text, step)


def log_details(trainer: Trainer, keys: Sequence[str]) -> None:
    """Hands callback metrics of a validation to all loggers but CSVLogger, whose file would have a column for each.

    Call this function in ``on_validation_end``, for metrics that were logged with ``logger=False``. Their step is that of the
    other metrics, also if the module logs a ``step``.
    """
    takers = [logger for logger in trainer.loggers if trainer.is_global_zero and not isinstance(logger, _CSV_LOGGERS)]
    if takers:
        step = int(trainer.logged_metrics.get("step", logging_step(trainer)))
        metrics = {key: trainer.callback_metrics[key].item() for key in keys}
        for logger in takers:
            with warn_on_failure(trainer, "the metrics at each level"):
                logger.log_metrics(metrics, step=step)


def log_layout(trainer: Trainer, callback: Charting) -> bool:
    """Logs the charts of all callbacks as one layout, once every callback knows its tags.

    TensorBoard reads a single layout per run, so the first callback with charts logs the charts of all. Call this function in
    ``on_validation_end``, because some callbacks learn their tags in a validation.

    Returns:
        Whether every callback knew its tags, and the layout is final.
    """
    charting = [each for each in class_of_callbacks(trainer, Charting) if each.evaluates_in_fit]
    charts = [each.charts() for each in charting]
    if all(charts) and charting[:1] == [callback]:
        layout = {title: chart for each in charts for title, chart in each.items()}
        if class_of_callbacks(trainer, Perturbing):
            layout["level in training"] = "Multiline", ["train_noise/.*/level$"]
        lines = {title: chart for title, chart in layout.items() if chart[0] == "Multiline"}
        bands = {title: layout[title] for title in reversed(layout) if title not in lines}
        category = {"lightning_noise": lines | bands}  # TensorBoard shows the lines, and then the bands in reverse order
        for logger in trainer.loggers if trainer.is_global_zero else []:
            with warn_on_failure(trainer, "the layout of the charts"):
                if hasattr(experiment := experiment_of(logger), "add_custom_scalars"):
                    experiment.add_custom_scalars(category)
    return all(charts)


def band(noisy: str, clean: str) -> Chart:
    """Returns a chart of a noisy value, and a band from there to the clean value."""
    return "Margin", [noisy, noisy, clean]


def log_dir(trainer: Trainer, logger: Any = None) -> Path:
    """Returns the folder of a logger, by default the first, even if that logger writes no files."""
    # not `trainer.log_dir`, which waits for the other ranks
    logger = logger or trainer.loggers[0]
    if logger.log_dir is not None:
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)  # as ModelCheckpoint does


class SilentLogger:
    """Stands in for a logger, or for a part of a logger, and does nothing if called.

    Its numbers, texts and class are those of the logger, because a module may ask for them. Lightning's ``DummyLogger`` has
    neither.
    """

    def __init__(self, logger: Any):
        self._silenced = logger

    @property
    def __class__(self) -> type:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._silenced)

    def __getattr__(self, name: str) -> Any:
        if self._silenced is None:
            return SilentLogger(None)
        value = getattr(self._silenced, name)
        return value if isinstance(value, str | int | float | None) else SilentLogger(value)

    def __call__(self, *args: Any, **kwargs: Any) -> SilentLogger:
        return SilentLogger(None)

    __getitem__ = __setitem__ = __enter__ = __call__

    def __exit__(self, *args: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())  # otherwise Python would call `__getitem__` without end

    def __fspath__(self) -> str:
        return tempfile.gettempdir()  # a module may write to a path that a call returned


@contextmanager
def warn_on_failure(trainer: Trainer, what: str) -> Iterator[None]:
    """Warns that ``what`` could not be logged instead of raising the exception: a side product must not end a run.

    Each trainer warns once about each product, because a figure that fails in one validation fails in all.
    """
    try:
        yield
    except Exception as error:
        warned = _WARNED.setdefault(trainer, set())
        if what not in warned:
            warned.add(what)
            warnings.warn(f"could not log {what}: {type(error).__name__}: {error}", stacklevel=3)
