"""Our callbacks in words, and what loggers learn of them at the start of a fit: hyperparameters and a table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from lightning_noise.loop.dispatch import Perturbing, perturbing
from lightning_noise.loop.internals import (
    automatic_hyperparameters,
    class_of_callbacks,
    tensorboard_loggers,
    write_hyperparameters,
    writes_default_metric,
)
from lightning_noise.loop.loggers import log_text, warn_on_failure
from lightning_noise.loop.monitored import LogsKeys, noise_key

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["as_text", "describe_arguments", "log_configuration", "log_hyperparameters", "shorten", "show_hyperparameters"]

_ALWAYS = ("noise", "level")  # also if they are the defaults
_SHOWN: WeakSet[Any] = WeakSet()  # loggers of runs whose hyperparameters are shown


def log_hyperparameters(trainer: Trainer, callback: Any) -> None:
    """Logs the arguments of all noise callbacks as hyperparameters, if the callback is our first one.

    TensorBoard keeps the first hyperparameters of a run, and Lightning logs those of the module after ``on_fit_start``. Called
    in that hook, this function gives TensorBoard both.
    """
    if not _is_first(trainer, callback):
        return
    ours, own = _hyperparameters(trainer), automatic_hyperparameters(trainer)
    for logger in trainer.loggers:
        with warn_on_failure(trainer, "the hyperparameters"):
            if logger not in tensorboard_loggers(trainer):
                logger.log_hyperparams(ours)
                continue
            logger.log_hyperparams(ours, {})  # without metrics they go to hparams.yaml alone
            if own:
                # whoever turns off Lightning's own metric may log other metrics, and TensorBoard keeps the first
                metrics = [*_scores(trainer), "hp_metric"] if writes_default_metric(logger) else None
                write_hyperparameters(logger, {**own, **ours}, metrics)


def show_hyperparameters(trainer: Trainer, callback: Any) -> None:
    """Gives TensorBoard the hyperparameters if neither the module nor the user did, for ``on_train_epoch_start``."""
    if not _is_first(trainer, callback) or automatic_hyperparameters(trainer):
        return
    ours = _hyperparameters(trainer)
    for logger in set(tensorboard_loggers(trainer)).difference(_SHOWN):
        _SHOWN.add(logger)
        with warn_on_failure(trainer, "the hyperparameters"):
            if writes_default_metric(logger) and logger.hparams.keys() == ours.keys():
                # TensorBoard takes the columns of all runs from one run that names metrics, so a run without noise names none
                write_hyperparameters(logger, ours, _scores(trainer) if perturbing(trainer) else None)


def log_configuration(trainer: Trainer, callback: Any) -> None:
    """Logs a table of the arguments of all our callbacks, if the callback is the first of them."""
    if _is_first(trainer, callback):
        log_text(trainer, "lightning_noise/configuration", describe_arguments(class_of_callbacks(trainer, LogsKeys)))


def describe_arguments(callbacks: list[Any]) -> str:
    """Returns the arguments that differ from their defaults as a Markdown table of two columns.

    TensorBoard breaks the words of a third column.
    """
    rows = ["| callback | argument |", "|---|---|"]
    for callback in callbacks:
        title = f"{type(callback).__name__} `{callback.name}`"
        for argument, value in _shown(callback).items():
            rows.append(f"| {title} | `{argument}={shorten(value)}` |")
            title = ""
    return "\n".join(rows)


def shorten(value: Any) -> str:
    """Returns a value as the text that one would type.

    Example:
        >>> from lightning_noise import noise, schedules
        >>> shorten([noise.Gaussian(), schedules.Linear(0.0, 0.5, until=0.6)])
        '[Gaussian(), Linear(0.0, 0.5, until=0.6)]'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shorten(item)}" for key, item in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(shorten, value)) + "]"
    if isinstance(value, Perturbing) or (is_dataclass(value) and not isinstance(value, type)):
        parameters = inspect.signature(type(value)).parameters
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        arguments = [("" if name in required else f"{name}=") + shorten(each) for name, each in _changed(value).items()]
        return f"{type(value).__name__}({', '.join(arguments)})"
    return as_text(value)


def as_text(value: Any, without: Collection[str] = ()) -> str:
    """Returns a value as one line of text that is the same in every run.

    A noise callback is shown as a call of its constructor with every argument, ``without`` some of them.
    """
    if isinstance(value, Perturbing):
        arguments = {name: argument for name, argument in _arguments(value).items() if name not in without}
        return f"{type(value).__name__}({', '.join(f'{name}={as_text(argument)}' for name, argument in arguments.items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {as_text(item)}" for key, item in value.items()) + "}"
    try:
        text = repr(value)
    except Exception:  # of a class of the user
        text = object.__repr__(value)
    # the address of an object differs from run to run
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", text))


def _is_first(trainer: Trainer, callback: Any) -> bool:
    return trainer.is_global_zero and class_of_callbacks(trainer, LogsKeys)[0] is callback


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Returns numbers as numbers and everything else as short texts."""
    callbacks = perturbing(trainer)
    found: dict[str, Any] = {"train_noise/names": ", ".join(callback.name for callback in callbacks) or "none"}
    for callback in callbacks:
        for name, value in _shown(callback).items():
            is_kept = isinstance(value, int | float | str) and not isinstance(value, bool)  # TensorBoard shows True as 1.0000
            found[noise_key(callback.name, name)] = value if is_kept else shorten(value)
    return found


def _scores(trainer: Trainer) -> list[str]:
    keys = (getattr(callback, "score_key", None) for callback in class_of_callbacks(trainer, LogsKeys))
    return [key for key in keys if key is not None]


def _shown(callback: Any) -> dict[str, Any]:
    """Returns noise and level, and what else differs from its default."""
    arguments = _arguments(callback)
    return {name: arguments[name] for name in _ALWAYS if name in arguments} | _changed(callback)


def _changed(value: Any) -> dict[str, Any]:
    """Returns the arguments that differ from their defaults, without the name."""
    parameters = inspect.signature(type(value)).parameters
    arguments = {name: each for name, each in _arguments(value).items() if name != "name"}
    return {name: each for name, each in arguments.items() if as_text(each) != as_text(parameters[name].default)}


def _arguments(value: Any) -> dict[str, Any]:
    """Returns the arguments of a constructor, from the attributes of the same names."""
    return {name: getattr(value, name) for name in inspect.signature(type(value)).parameters if hasattr(value, name)}
