"""How each kind of logger takes figures and texts.

The kinds are told apart by the methods of the logger and of its experiment, so no client has to be installed, and another
logger with the same methods is served, too. A new kind is one more row of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Sink", "experiment_of", "find_sink"]


class Sink(NamedTuple):
    """What a kind of logger does with figures and texts.

    Attributes:
        fits: Returns whether a logger is of this kind.
        log_figure: Logs a figure: logger, key, figure and step.
        log_text: Logs a text in Markdown: logger, key, text and step.
    """

    fits: Callable[[Any], bool]
    log_figure: Callable[[Any, str, Figure, int], Any]
    log_text: Callable[[Any, str, str, int], Any]


def find_sink(logger: Any) -> Sink | None:
    """Returns how a logger takes figures and texts, or ``None`` if it takes numbers alone."""
    return next((sink for sink in _SINKS if sink.fits(logger)), None)


def experiment_of(logger: Any) -> Any:
    """Returns the experiment of a logger, or ``None``: Lightning does not require that a logger has an experiment."""
    return getattr(logger, "experiment", None)


_TENSORBOARD = Sink(
    fits=lambda logger: hasattr(experiment_of(logger), "add_figure"),
    log_figure=lambda logger, key, figure, step: logger.experiment.add_figure(key, figure, step),
    log_text=lambda logger, key, text, step: logger.experiment.add_text(key, text, step),
)
_WANDB = Sink(
    fits=lambda logger: hasattr(logger, "log_image") and hasattr(logger, "log_table"),
    log_figure=lambda logger, key, figure, step: logger.log_image(key, [_to_pixels(figure)], step=step),
    log_text=lambda logger, key, text, step: logger.log_text(key, columns=["text"], data=[[text]], step=step),
)
_IMAGES = Sink(  # any logger with W&B's method for images
    fits=lambda logger: hasattr(logger, "log_image"),
    log_figure=_WANDB.log_figure,
    log_text=lambda *_: None,
)
_MLFLOW = Sink(  # files have no step
    fits=lambda logger: hasattr(logger, "run_id") and hasattr(experiment_of(logger), "log_figure"),
    log_figure=lambda logger, key, figure, step: logger.experiment.log_figure(logger.run_id, figure, f"{key}-{step}.png"),
    log_text=lambda logger, key, text, step: logger.experiment.log_text(logger.run_id, text, f"{key}-{step}.md"),
)
_COMET = Sink(  # texts have no name
    fits=lambda logger: hasattr(experiment_of(logger), "log_figure"),
    log_figure=lambda logger, key, figure, step: logger.experiment.log_figure(key, figure, step=step),
    log_text=lambda logger, key, text, step: logger.experiment.log_text(text, step=step, metadata={"key": key}),
)
_NEPTUNE = Sink(  # a series refuses a step that it already has
    fits=lambda logger: any(kind.__name__ == "NeptuneLogger" for kind in type(logger).__mro__),
    log_figure=lambda logger, key, figure, step: logger.experiment[f"{key}-{step}"].upload(_neptune_file().as_image(figure)),
    log_text=lambda logger, key, text, step: logger.experiment[f"{key}-{step}"].upload(
        _neptune_file().from_content(text, extension="md")
    ),
)
_SINKS = (_TENSORBOARD, _WANDB, _IMAGES, _MLFLOW, _COMET, _NEPTUNE)  # the first that fits


def _to_pixels(figure: Figure) -> np.ndarray:
    """Returns the figure as RGB values of type uint8, of shape (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _neptune_file() -> Any:
    """Returns Neptune's class of files; the client is installed if its logger is used."""
    from neptune.types import File  # pyright: ignore[reportMissingImports]

    return File
