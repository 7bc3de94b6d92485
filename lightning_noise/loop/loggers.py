"""What the loggers of a trainer can show beside numbers: figures, texts, histograms and charts of several tags.

The process that logs shows it alone, and nothing here waits for the other processes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_noise.loop.dispatch import Perturbing
from lightning_noise.loop.internals import class_of_callbacks, is_fast_dev_run

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = [
    "Charting",
    "as_text",
    "configuration",
    "folder",
    "lay_out",
    "lay_out_all",
    "show",
    "show_histogram",
    "show_text",
    "takes_figures",
]

Charts = Mapping[str, Sequence[str]]


@runtime_checkable
class Charting(Protocol):
    """A callback whose tags belong together in charts."""

    def charts(self) -> Charts:
        """Returns, for each title of a chart, the regular expressions of its tags; empty as long as they are not known."""
        ...


def takes_figures(trainer: Trainer) -> bool:
    """Returns whether :func:`show` shows anything, so that nothing is drawn for nobody."""
    return trainer.is_global_zero and bool(trainer.loggers) and not is_fast_dev_run(trainer)


def show(trainer: Trainer, key: str, figure: Figure, step: int) -> None:
    """Hands a figure to the loggers that take figures, or else writes ``<key>-<step>.png`` into the folder of the first.

    TensorBoard takes a figure, and Weights & Biases takes an image of it. Without a logger nothing is written.

    Args:
        trainer: The trainer whose loggers are meant.
        key: The tag of the figure.
        figure: The figure.
        step: Its place on the x axis of the logs.
    """
    if not takes_figures(trainer):
        return
    taken = [_hand_over(logger, key, figure, step) for logger in trainer.loggers]
    if not any(taken):
        path = folder(trainer) / f"{key}-{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def show_text(trainer: Trainer, key: str, text: str, step: int = 0) -> None:
    """Hands a text in Markdown to the loggers that take texts."""
    for experiment in _experiments(trainer, "add_text"):
        experiment.add_text(key, text, step)


def show_histogram(trainer: Trainer, key: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
    """Hands a histogram to the loggers that take the counts of one.

    Args:
        trainer: The trainer whose loggers are meant.
        key: The tag of the histogram.
        edges: The edges of the bins, from the lowest to the highest, of shape :math:`(M + 1,)`.
        counts: How many values each bin has, of shape :math:`(M,)`.
        step: Its place on the x axis of the logs.
    """
    limits, n = np.asarray(edges), np.asarray(counts)
    middle = (limits[1:] + limits[:-1]) / 2
    for experiment in _experiments(trainer, "add_histogram_raw"):
        experiment.add_histogram_raw(
            key,
            min=edges[0],
            max=edges[-1],
            num=n.sum(),
            sum=n @ middle,
            sum_squares=n @ middle**2,
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )


def lay_out(trainer: Trainer, charts: Charts) -> None:
    """Gives TensorBoard's custom scalars a chart for each title, with the tags that its regular expressions match.

    TensorBoard reads one layout of a run, so that all charts of a run must come in one call, and matches a regular expression
    from the first character of a tag, but not to its last.
    """
    for experiment in _experiments(trainer, "add_custom_scalars"):
        experiment.add_custom_scalars({"lightning_noise": {title: ["Multiline", list(tags)] for title, tags in charts.items()}})


def lay_out_all(trainer: Trainer, monitor: Charting) -> bool:
    """Lets the first of the callbacks with charts write those of all, as soon as each knows its own.

    For ``on_validation_end`` of each of them, since some learn in a validation which keys there are.

    Returns:
        Whether all knew them, so that the callback need not ask again in this run.
    """
    charting = class_of_callbacks(trainer, Charting)
    charts = [callback.charts() for callback in charting]
    if all(charts) and charting[0] is monitor:
        lay_out(trainer, _levels(trainer) | _merged(charts))
    return all(charts)


def folder(trainer: Trainer) -> Path:
    """Returns where the first logger writes, or would write, on the process that logs."""
    # not `trainer.log_dir`, which waits for the other processes
    logger: Any = trainer.loggers[0]
    if logger.log_dir is not None:
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)  # as ModelCheckpoint does


def configuration(callback: Any) -> str:
    """Returns the arguments that a callback was made with as a table in Markdown, read from its attributes of these names.

    Example:
        >>> from lightning_noise import InputNoise, noise
        >>> print(configuration(InputNoise(noise.Gaussian(), 0.1, clip=(0, 1))))
        **InputNoise**
        <BLANKLINE>
        | argument | value |
        |---|---|
        | noise | `Gaussian()` |
        | level | `0.1` |
        ...
    """
    rows = [f"| {name} | `{as_text(value)}` |" for name, value in _arguments(callback).items()]
    return "\n".join([f"**{type(callback).__name__}**", "", "| argument | value |", "|---|---|", *rows])


def as_text(value: Any, without: Collection[str] = ()) -> str:
    """Returns the value in a line, without the address of an object, which differs from run to run."""
    if isinstance(value, Perturbing):
        arguments = ", ".join(
            f"{name}={as_text(argument)}" for name, argument in _arguments(value).items() if name not in without
        )
        return f"{type(value).__name__}({arguments})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {as_text(item)}" for key, item in value.items()) + "}"
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", repr(value)))


def _hand_over(logger: Any, key: str, figure: Figure, step: int) -> bool:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(key, figure, global_step=step)
        return True
    if hasattr(logger, "log_image"):
        logger.log_image(key, [_pixels(figure)], step=step)
        return True
    return False


def _pixels(figure: Figure) -> np.ndarray:
    """The figure as red, green and blue of whole numbers, of shape (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _experiments(trainer: Trainer, method: str) -> Iterator[Any]:
    """What has the method among the experiments of the loggers, on the process that logs."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if hasattr(experiment := getattr(logger, "experiment", None), method):
            yield experiment


def _levels(trainer: Trainer) -> dict[str, list[str]]:
    """The chart of the levels in force, where any are."""
    noisy = bool(class_of_callbacks(trainer, Perturbing))
    return {"noise": ["noise/.*/level$"]} if noisy else {}


def _merged(charts: Sequence[Charts]) -> dict[str, list[str]]:
    """All charts, of which those of one title become one."""
    merged: dict[str, list[str]] = {}
    for some in charts:
        for title, tags in some.items():
            merged.setdefault(title, []).extend(tags)
    return merged


def _arguments(callback: Any) -> dict[str, Any]:
    names = inspect.signature(type(callback)).parameters
    return {name: getattr(callback, name) for name in names if hasattr(callback, name)}
